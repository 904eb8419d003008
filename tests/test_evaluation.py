"""Scores equal GluonTS's, the published protocol is met to the printed digits, and the evaluator gives nothing away."""

import csv
import json
import multiprocessing
import runpy
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tsgdn.bench import record
from tsgdn.data import catalog
from tsgdn.data.series import Series
from tsgdn.evaluation import backtest, baselines, metrics
from tsgdn.evaluation.prequential import RunningScores, RunningSeasonalError

LEVELS = backtest.REPORT_LEVELS


def make_series(values, item_id="a", **fields) -> Series:
    values = np.atleast_2d(np.asarray(values, float))
    names = ("target",) if len(values) == 1 else tuple(f"v{i}" for i in range(len(values)))
    return Series(item_id, np.datetime64("2020-01-01"), "h", values, variates=names, **fields)


@dataclass
class SmallTask:
    """Windows at the end of a few series, as the catalogue cuts them."""

    series: list
    horizon: int = 6
    windows: int = 3
    seasonality: int = 4
    name: str = "small"

    def split(self):
        instances = []
        for one in self.series:
            for w in range(self.windows):
                origin = len(one) - self.horizon * (self.windows - w)
                instances.append((one.slice(0, origin), one.values[:, origin : origin + self.horizon]))
        return [one.slice(0, len(one) - self.horizon * self.windows) for one in self.series], instances


class Oracle:
    """Knows the truth, which no evaluated predictor does."""

    def __init__(self, series):
        self.truth = {one.item_id: one.values for one in series}

    def predict(self, contexts, horizon, quantile_levels):
        ahead = [self.truth[c.item_id][:, len(c) : len(c) + horizon] for c in contexts]
        return [np.repeat(np.nan_to_num(x)[..., None], len(quantile_levels), -1) for x in ahead]


@pytest.fixture
def rng():
    return np.random.default_rng(7)


# ---- metrics --------------------------------------------------------------------------------------------------------


@pytest.fixture
def random_windows(rng):
    """Contexts of different lengths, some shorter than a season, constant or without any value; labels with NaN."""
    H = 5
    contexts = [rng.normal(size=n).cumsum() for n in (30, 3, 1, 4, 17, 40)]
    contexts[0][rng.random(30) < 0.3] = np.nan
    contexts += [np.full(12, 3.0), np.full(9, np.nan), np.where(np.arange(10) == 6, 2.0, np.nan)]
    target = rng.normal(size=(len(contexts), H)) * 3
    target[rng.random(target.shape) < 0.2] = np.nan
    target[4] = np.nan
    quantiles = np.sort(rng.normal(size=(*target.shape, len(LEVELS))) * 3, -1)
    quantiles[1, :, 7] = np.nan_to_num(target[1])  # hits: y <= f counts
    return contexts, target, quantiles


@pytest.mark.parametrize("m", [1, 4, 12])
def test_every_score_equals_the_one_of_gluonts(random_windows, m):
    import pandas as pd
    from gluonts.ev import metrics as theirs
    from gluonts.model.evaluation import evaluate_forecasts
    from gluonts.model.forecast import QuantileForecast

    contexts, target, quantiles = random_windows
    start = pd.Period("2020-01-01", freq="h")
    data = SimpleNamespace(
        input=[{"start": start, "target": c} for c in contexts], label=[{"start": start, "target": y} for y in target]
    )
    forecasts = [QuantileForecast(f.T, start, [str(q) for q in LEVELS]) for f in quantiles]
    with np.errstate(all="ignore"):
        table = evaluate_forecasts(
            forecasts,
            test_data=data,
            axis=None,
            seasonality=m,
            metrics=[
                theirs.MeanWeightedSumQuantileLoss(list(metrics.WQL_LEVELS)),
                theirs.ND(),
                theirs.MASE(),
                theirs.AverageMeanScaledQuantileLoss(list(metrics.WQL_LEVELS)),
                *[theirs.Coverage(q) for q in LEVELS],
            ],
        )
    expected = {name: float(np.ravel(values)[0]) for name, values in table.items()}
    given = {"target": target, "quantiles": quantiles, "levels": LEVELS}
    error = np.array([metrics.seasonal_error(past=c, seasonality=m) for c in contexts])
    ours = {
        "mean_weighted_sum_quantile_loss": metrics.wql(**given),
        "ND[0.5]": metrics.nd(**given),
        "MASE[0.5]": metrics.mase(**given, past_error=error),
        "average_mean_scaled_quantile_loss": metrics.sql(**given, past_error=error),
        **{f"coverage[{q}]": metrics.coverage(**given, level=q) for q in LEVELS},
    }
    assert expected.keys() == ours.keys()
    for name, value in expected.items():
        assert ours[name] == pytest.approx(value, rel=1e-9, abs=1e-12), name


def test_a_level_that_was_not_forecast_and_a_forecast_of_nan_are_refused(random_windows):
    _, target, quantiles = random_windows
    with pytest.raises(ValueError, match=r"no level 0\.33"):
        metrics.coverage(target=target, quantiles=quantiles, levels=LEVELS, level=0.33)
    quantiles[0, 0, 0] = np.nan
    with pytest.raises(ValueError, match=r"1 of .* NaN"):
        metrics.wql(target=target, quantiles=quantiles, levels=LEVELS)


def test_crps_from_uneven_levels_nears_the_closed_form_of_the_normal(rng):
    from statistics import NormalDist

    normal = NormalDist()
    levels = np.sort(np.concatenate([np.linspace(0.001, 0.999, 700), rng.uniform(0.001, 0.999, 700)]))
    quantiles = np.array([normal.inv_cdf(q) for q in levels])
    y = np.linspace(-2, 2, 9)
    exact = [v * (2 * normal.cdf(v) - 1) + 2 * normal.pdf(v) - 1 / np.sqrt(np.pi) for v in y]
    got = metrics.crps(target=y[:, None], quantiles=np.tile(quantiles, (9, 1, 1)), levels=tuple(levels))
    assert got == pytest.approx(np.mean(exact), rel=2e-3)


def test_interval_coverage_counts_the_share_within(rng):
    y = np.arange(1000.0)[:, None]
    low_high = np.tile([100.0, 500.0, 899.0], (1000, 1, 1))
    share = metrics.interval_coverage(target=y, quantiles=low_high, levels=(0.1, 0.5, 0.9), share=0.8)
    assert share == 0.8


# ---- baselines ------------------------------------------------------------------------------------------------------


def test_naive_forecasts_are_what_they_say():
    context = np.array([[np.nan, 1.0, 2.0, np.nan, 4.0, np.nan], [np.nan] * 6])
    np.testing.assert_array_equal(baselines.persistence(context, 3, (0.5,))[..., 0], [[4, 4, 4], [0, 0, 0]])
    np.testing.assert_array_equal(baselines.SeasonalNaive(4)(context, 5, (0.5,))[0, :, 0], [2, 2, 4, 4, 2])
    np.testing.assert_array_equal(baselines.SeasonalNaive(7)(context, 2, (0.5,))[0, :, 0], [14 / 6] * 2)
    np.testing.assert_allclose(baselines.drift(context, 2, (0.1, 0.9))[0], [[4.6, 4.6], [5.2, 5.2]])


def test_seasonal_naive_equals_the_predictor_of_gluonts(rng):
    import pandas as pd
    from gluonts.model.seasonal_naive import SeasonalNaivePredictor

    for length in (2, 5, 6, 40):
        target = rng.normal(size=length).astype(np.float32)
        target[rng.random(length) < 0.3] = np.nan
        for season in (1, 6):
            entry = {"start": pd.Period("2020-01-01", freq="h"), "target": target}
            theirs = next(SeasonalNaivePredictor(prediction_length=9, season_length=season).predict([entry])).samples[0]
            ours = baselines.SeasonalNaive(season)(target[None].astype(float), 9, (0.5,))[0, :, 0]
            np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_naive_forecasts_from_all_origins_are_those_from_each(rng):
    values = rng.normal(size=(2, 50))
    values[:, 20:30][rng.random((2, 10)) < 0.5] = np.nan
    origins = np.array([1, 5, 23, 24, 25, 49, 50])
    for season in (1, 6, 24):
        naive = baselines.SeasonalNaive(season)
        at_once = naive.at_origins(values, origins=origins, horizon=30, levels=(0.1, 0.5))
        each = np.stack([naive(values[:, :o], 30, (0.1, 0.5)) for o in origins])
        np.testing.assert_allclose(at_once, each, rtol=1e-12)


def test_bootstrap_random_walk_spreads_as_the_root_of_time(rng):
    past = rng.normal(size=(1, 5000)).cumsum(-1)
    walk = baselines.BootstrapRandomWalk(paths=40_000)
    out = walk(past, 16, (0.1, 0.5, 0.9))
    width = out[0, :, 2] - out[0, :, 0]
    np.testing.assert_allclose(width, 2 * 1.2816 * np.sqrt(np.arange(1, 17)), rtol=0.05)
    np.testing.assert_array_equal(out, walk(past, 16, (0.1, 0.5, 0.9)))
    # what else is forecast changes nothing
    np.testing.assert_array_equal(out, walk.predict([make_series(past), make_series(-past)], 16, (0.1, 0.5, 0.9))[0])


# ---- the evaluator --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("horizon", [1, 2, 7, 24])
def test_an_oracle_scores_zero_at_every_horizon(rng, horizon):
    series = [
        make_series(
            rng.normal(size=(V, 100)).cumsum(-1),
            f"s{V}",
        )
        for V in (1, 2)
    ]
    series[0].values[0, 90:93] = np.nan
    task = SmallTask(series, horizon=horizon)
    scores = backtest.evaluate(Oracle(series), task)
    assert (scores.wql, scores.nd, scores.mase, scores.sql, scores.crps) == (0, 0, 0, 0, 0)
    assert scores.coverage80 == scores.coverage98 == 1
    assert scores.n == 3 + 2 * 3
    # a ramp shows an evaluator that is off by one
    ramp = [make_series(np.arange(60.0))]
    late = backtest.evaluate(baselines.persistence, SmallTask(ramp, horizon=horizon, windows=1, seasonality=1))
    assert late.mase == pytest.approx((horizon + 1) / 2)


class Burglar:
    """Looks for what follows its contexts."""

    def __init__(self, truth):
        self.truth, self.found, self.ends = truth, [], []

    def predict(self, contexts, horizon, quantile_levels):
        for context in contexts:
            self.ends.append(context.values.shape[-1])
            for array in (context.values, context.known):
                if array is None:
                    continue
                base = array
                while base is not None:
                    self.found.append(np.shares_memory(base, self.truth.values))
                    self.found.append(np.shares_memory(base, self.truth.known))
                    self.found.append(base.shape[-1] > context.values.shape[-1] + horizon)
                    base = base.base
            context.values[:] = np.nan  # vandalism must not reach the next window, or the scores
        return baselines.persistence.predict([self.truth] * len(contexts), horizon, quantile_levels)


def test_a_predictor_cannot_reach_the_labels_nor_change_them(rng):
    truth = make_series(rng.normal(size=100), known=rng.normal(size=(2, 130)))
    before = truth.values.copy()
    burglar = Burglar(truth)
    task = SmallTask([truth])
    scores = backtest.evaluate(burglar, task)
    assert burglar.ends == [82, 88, 94]
    assert burglar.found
    assert not any(burglar.found)
    np.testing.assert_array_equal(truth.values, before)
    assert np.isfinite(scores.mase)


def test_values_after_the_context_do_not_change_a_forecast_by_one_bit(rng):
    truth = make_series(rng.normal(size=100))
    poisoned = replace(truth, values=np.where(np.arange(100) >= 94, np.nan, truth.values))
    for predictor in (baselines.persistence, baselines.SeasonalNaive(4), baselines.BootstrapRandomWalk(paths=500)):
        clean = backtest.evaluate(predictor, SmallTask([truth])).windows
        dirty = backtest.evaluate(predictor, SmallTask([poisoned])).windows
        np.testing.assert_array_equal(clean.quantiles, dirty.quantiles)


def test_an_executor_and_small_chunks_change_nothing(rng):
    task = SmallTask([make_series(rng.normal(size=60 + i), f"s{i}") for i in range(5)])
    plain = backtest.evaluate(baselines.SeasonalNaive(4), task)
    told = []
    _, instances = task.split()
    with ThreadPoolExecutor(2) as pool:
        windows = backtest.forecast_windows(
            baselines.SeasonalNaive(4),
            instances,
            seasonality=4,
            executor=pool,
            chunk=100,
            progress=lambda done, of: told.append((done, of)),
        )
    assert backtest.score(windows, seasonality=4) == replace(plain, windows=None)
    assert told[-1] == (15, 15)
    assert len(told) > 5
    np.testing.assert_array_equal(windows.quantiles, plain.windows.quantiles)


def test_wrong_shapes_nan_and_missing_forecasts_are_refused(rng):
    task = SmallTask([make_series(rng.normal(size=60))])

    def predictor(change):
        return SimpleNamespace(predict=lambda c, h, q: change(baselines.persistence.predict(c, h, q)))

    with pytest.raises(ValueError, match=r"the forecast is \(1, 5, 15\), not \(1, 6, 15\)"):
        backtest.evaluate(predictor(lambda out: [x[:, 1:] for x in out]), task)
    with pytest.raises(ValueError, match="NaN"):
        backtest.evaluate(predictor(lambda out: [x * np.nan for x in out]), task)
    with pytest.raises(ValueError, match="2 forecasts for 3"):
        backtest.evaluate(predictor(lambda out: out[1:]), task)


def test_the_table_per_item_holds_the_same_windows(rng):
    task = SmallTask([make_series(rng.normal(size=60), f"s{i}") for i in range(4)])
    scores = backtest.evaluate(baselines.persistence, task)
    table = scores.table()
    assert [row["item_id"] for row in table] == ["s0", "s1", "s2", "s3"]
    assert np.mean([row["mase"] for row in table]) == pytest.approx(scores.mase)
    assert sum(row["cells"] for row in table) == scores.cells


# ---- every origin, and live -----------------------------------------------------------------------------------------


def test_scores_at_every_origin_are_those_of_the_windows_there(rng):
    values = rng.normal(size=(2, 80)).cumsum(-1)
    values[1, 30:34] = np.nan
    series, H, m = make_series(values), 6, 5
    origins = np.arange(3, 81, 3)
    quantiles = baselines.SeasonalNaive(m).at_origins(values, origins=origins, horizon=H, levels=LEVELS)
    windows = backtest.every_origin((origins, quantiles), values, levels=LEVELS, seasonality=m, first=10)
    kept = origins[(origins >= 10) & (origins < 80)]
    padded = np.concatenate([values, np.full((2, H), np.nan)], -1)
    instances = [(series.slice(0, o), padded[:, o : o + H]) for o in kept.tolist()]
    expected = backtest.forecast_windows(baselines.SeasonalNaive(m), instances, seasonality=m)
    for got, want in ((windows.target, expected.target), (windows.past_error, expected.past_error)):
        np.testing.assert_allclose(got, want, rtol=1e-12)
    ours, theirs = (backtest.score(w, seasonality=m).numbers() for w in (windows, expected))
    assert ours == pytest.approx(theirs, nan_ok=True)
    leads = backtest.by_lead(windows, seasonality=m)
    assert [row["lead"] for row in leads] == [1, 2, 3, 4, 5, 6]
    assert sum(row["cells"] for row in leads) == ours["cells"]


def test_an_oracle_scores_zero_at_every_origin_and_lead(rng):
    values = rng.normal(size=(1, 50))
    origins, H = np.arange(1, 51), 7
    steps = np.minimum(origins[:, None] + np.arange(H), 49)
    quantiles = np.repeat(values[:, steps].transpose(1, 0, 2)[..., None], len(LEVELS), -1)
    windows = backtest.every_origin((origins, quantiles), values, levels=LEVELS, seasonality=1, first=2)
    assert all(row["wql"] == 0 == row["mase"] for row in backtest.by_lead(windows, seasonality=1))
    shifted = backtest.every_origin((origins - 1, quantiles), values, levels=LEVELS, seasonality=1, first=2)
    assert all(row["wql"] > 0 for row in backtest.by_lead(shifted, seasonality=1))


def test_running_scores_equal_those_of_all_windows_together(rng):
    values = rng.normal(size=(2, 70)).cumsum(-1)
    values[0, 40:45] = np.nan
    H, m = 4, 6
    naive, running = baselines.SeasonalNaive(m), RunningScores(levels=LEVELS, horizon=H)
    error = RunningSeasonalError(variates=2, seasonality=m)
    error.observe(values[:, :8])
    origins = np.arange(8, 67)
    for origin in origins:
        forecast = naive(values[:, :origin], H, LEVELS)
        running.update(int(origin), forecast, values[:, origin : origin + H], past_error=error.value)
        error.observe(values[:, origin : origin + 1])
    quantiles = naive.at_origins(values, origins=origins, horizon=H, levels=LEVELS)
    windows = backtest.every_origin((origins, quantiles), values, levels=LEVELS, seasonality=m)
    scores = backtest.score(windows, seasonality=m)
    expected = {"wql": scores.wql, "mase": scores.mase, "coverage": scores.coverage80}
    assert running.overall == pytest.approx(expected, rel=1e-12)
    assert running.n == len(origins)
    assert running.last_origin == 66
    leads = backtest.by_lead(windows, seasonality=m)
    np.testing.assert_allclose(running.by_lead["mase"], [row["mase"] for row in leads], rtol=1e-12)


def test_the_running_seasonal_error_is_that_of_the_past_at_any_time(rng):
    values = rng.normal(size=(2, 40))
    values[rng.random(values.shape) < 0.2] = np.nan
    running = RunningSeasonalError(variates=2, seasonality=7)
    for n in range(1, 41):
        running.observe(values[:, n - 1 : n])
        np.testing.assert_allclose(running.value, metrics.seasonal_error(past=values[:, :n], seasonality=7), rtol=1e-12)


def test_decayed_scores_forget_a_bad_start():
    running = RunningScores(levels=LEVELS, horizon=1, half_life=5)
    for n in range(200):
        forecast = np.full((1, 1, len(LEVELS)), 100.0 if n < 100 else 1.0)
        running.update(n, forecast, np.ones((1, 1)), past_error=np.ones(1))
    assert running.overall["mase"] < 1e-3


# ---- the protocol ---------------------------------------------------------------------------------------------------

# The catalogue holds the published figures; those of jena are what GluonTS gives on our copy of the weather data, which
# is within 3e-4 of them.
LOCKED = [task for task in catalog.cells() if task.seasonal_naive]


@pytest.mark.data
@pytest.mark.parametrize("task", LOCKED, ids=[task.name for task in LOCKED])
def test_seasonal_naive_gets_the_published_scores_to_the_printed_digits(task):
    try:
        scores = backtest.evaluate(baselines.SeasonalNaive(task.seasonality), task, levels=metrics.WQL_LEVELS)
    except catalog.DataNotFound as error:
        pytest.skip(str(error))
    tolerance = 1.01e-6  # one unit of the last printed digit
    assert scores.wql == pytest.approx(task.seasonal_naive["wql"], abs=tolerance)
    assert scores.mase == pytest.approx(task.seasonal_naive["mase"], abs=tolerance)
    assert scores.nd == pytest.approx(scores.wql, rel=1e-12)


@pytest.mark.data
@pytest.mark.filterwarnings("ignore:Period with BDay freq:FutureWarning")
@pytest.mark.parametrize("name", ["exchange_rate", "tourism_yearly", "m4_hourly", "us_births/M"])
def test_the_same_through_gluonts_alone(name):
    from gluonts.ev.metrics import MASE, MeanWeightedSumQuantileLoss
    from gluonts.model.evaluation import evaluate_model
    from gluonts.model.seasonal_naive import SeasonalNaivePredictor

    from tsgdn.adapters.gluonts import Instances

    task = catalog.task(name)
    table = evaluate_model(
        SeasonalNaivePredictor(prediction_length=task.horizon, season_length=task.seasonality),
        test_data=Instances.of(task.split()[1]),
        metrics=[MeanWeightedSumQuantileLoss(list(metrics.WQL_LEVELS)), MASE()],
        axis=None,
        seasonality=task.seasonality,
    )
    wql, mase = table.iloc[0]
    assert wql == pytest.approx(task.seasonal_naive["wql"], abs=1.01e-6)
    assert mase == pytest.approx(task.seasonal_naive["mase"], abs=1.01e-6)


@pytest.mark.data
def test_the_floor_of_exchange_rate_nips_is_where_it_was_computed():
    task = catalog.task("exchange_rate_nips")
    scores = backtest.evaluate(baselines.BootstrapRandomWalk(paths=10_000), task)
    assert 0.0070 < scores.wql < 0.0077
    assert 0.0092 < scores.nd < 0.0097


# ---- pictures, rows and tables --------------------------------------------------------------------------------------


def test_a_fan_chart_is_a_picture_and_opens_no_window(tmp_path, rng):
    pytest.importorskip("matplotlib")
    from tsgdn.evaluation.plots import Fan, fan_charts, lead_chart

    times = np.datetime64("2020-01-01", "ns") + np.arange(30) * np.timedelta64(1, "h")
    quantiles = np.sort(rng.normal(size=(6, len(LEVELS))), -1)
    fan = Fan("one", times, rng.normal(size=24), quantiles, LEVELS, rng.normal(size=6), {"naive": np.zeros(6)})
    path = fan_charts([fan] * 3, tmp_path / "new" / "fan.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 20_000
    scores = backtest.evaluate(baselines.persistence, SmallTask([make_series(rng.normal(size=60))]))
    leads = backtest.by_lead(scores.windows, seasonality=4)
    assert lead_chart({"naive": leads}, tmp_path / "lead.png").stat().st_size > 10_000
    from matplotlib import pyplot

    assert pyplot.get_fignums() == []
    with pytest.raises(ValueError, match="no panels"):
        fan_charts([], tmp_path / "none.png")


def write_rows(path, count, worker):
    for i in range(count):
        record.append(path, record.row(metric="wql", value=i, origin=ORIGIN, task="t" * 300, worker=worker))


ORIGIN = {"commit": "abc", "dirty": 0, "date": "2026-01-01T00:00:00Z", "hardware": "x", "torch": "2", "triton": ""}


def test_rows_of_writers_side_by_side_do_not_mix(tmp_path):
    path = tmp_path / "results.csv"
    spawn = multiprocessing.get_context("fork")
    workers = [spawn.Process(target=write_rows, args=(path, 50, w)) for w in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert sorted((int(r["worker"]), int(r["value"])) for r in rows) == [(w, i) for w in range(4) for i in range(50)]
    assert list(rows[0])[:15] == list(record.COLUMNS)


def test_a_row_with_other_columns_is_refused_and_the_file_stays(tmp_path):
    path = tmp_path / "results.csv"
    good = record.row(metric="wql", value=0.5, origin=ORIGIN, task="a")
    record.append(path, good)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"\['model', 'task'\]"):
        record.append(path, good, record.row(metric="wql", value=1, origin=ORIGIN, model="b"))
    assert path.read_bytes() == before
    with pytest.raises(ValueError, match="columns of every row already"):
        record.row(metric="wql", value=1, origin=ORIGIN, commit="mine")


def test_a_row_says_where_it_comes_from():
    row = record.row(metric="wql", value=0.1, task="a")
    assert list(row) == [*record.COLUMNS, "task"]
    assert row["torch"]
    assert row["hardware"]
    assert row["date"].endswith("Z")


README = """# Scores

<!-- results results.csv rows=task,model columns=metric where=metric:wql|mase digits=3 best=min -->
<!-- end of results -->
"""


def test_render_fills_tables_and_check_detects_a_changed_one(tmp_path, capsys):
    render = runpy.run_path(str(Path(__file__).parents[1] / "experiments" / "render.py"))["main"]
    folder = tmp_path / "experiments" / "accuracy"
    folder.mkdir(parents=True)
    readme, results = folder / "README.md", folder / "results.csv"
    readme.write_text(README)
    for seed, wql in ((0, 0.1), (1, 0.3), (0, 0.2)):  # the last row of a seed counts
        record.append(results, record.row(metric="wql", value=wql, seed=seed, origin=ORIGIN, task="a", model="ours"))
    record.append(results, record.row(metric="wql", value=0.9, origin=ORIGIN, task="a", model="naive"))
    record.append(results, record.row(metric="mase", value="OOM", origin=ORIGIN, task="a", model="naive"))

    assert render(["--root", str(tmp_path), "--check"]) == 1
    assert readme.read_text() == README
    assert render(["--root", str(tmp_path)]) == 0
    text = readme.read_text()
    assert "| a | ours | **0.250 ± 0.071 (2)** |  |" in text
    assert "| a | naive | 0.900 | OOM |" in text
    assert "Commit abc, 2026-01-01, x." in text
    assert render(["--root", str(tmp_path), "--check"]) == 0

    readme.write_text(text.replace("0.250", "0.150"))
    assert render(["--root", str(tmp_path), "--check"]) == 1
    assert "differs from its rows" in capsys.readouterr().err
    assert render(["--root", str(tmp_path)]) == 0
    assert readme.read_text() == text

    for wrong in ("where=metrik", "where=model,metric"):
        readme.write_text(README.replace("where=metric", wrong))
        assert render(["--root", str(tmp_path), "--check"]) == 2


# ---- the commands ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A model with random weights for the simulated set."""
    import torch

    from tsgdn.data.module import resolve
    from tsgdn.model import artefact
    from tsgdn.model.forecaster import Forecaster

    torch.manual_seed(0)
    shape = resolve("simulated")
    names = ("patch_size", "patches_ahead", "seasons", "known_features")
    model = Forecaster(**{name: shape[name] for name in names}, width=16, depth=1)
    series = {"dataset": "simulated", "variates": ["target"], **{k: shape[k] for k in ("freq", "calendar", "horizon")}}
    return artefact.save(model, tmp_path_factory.mktemp("model"), series=series)


def test_evaluate_prints_and_saves_what_gluonts_computes_too(model_folder, tmp_path, capsys):
    from tsgdn.cli.main import main

    assert main(["evaluate", "--model", str(model_folder), "--out", str(tmp_path / "out"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    model, naive, _ = found["rows"]
    assert [row["forecaster"] for row in found["rows"]] == ["model", "seasonal_naive", "persistence"]
    assert model["gluonts"]["wql"] == pytest.approx(model["wql"], rel=1e-5)
    assert model["gluonts"]["mase"] == pytest.approx(model["mase"], rel=1e-5)
    assert model["n"] == naive["n"] == 160
    assert all(Path(path).is_file() for path in found["files"])
    with (tmp_path / "out" / "items.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 3 * 16
    assert json.loads((tmp_path / "out" / "scores.json").read_text()) == found


def test_evaluate_on_all_leaves_out_what_is_not_here_or_of_another_frequency(
    model_folder, tmp_path, capsys, monkeypatch
):
    from tsgdn.cli.main import main

    monkeypatch.setenv("TSGDN_DATA", str(tmp_path))
    options = ["--out", str(tmp_path / "out"), "--dataset", "all", "--baselines", "--no-gluonts", "--json"]
    assert main(["evaluate", "--model", str(model_folder), *options]) == 0
    said = capsys.readouterr()
    assert [row["task"] for row in json.loads(said.out)["rows"]] == ["simulated"]
    assert "left out: us_births has freq 'D'" in said.err
    assert "left out: m4_hourly is not here" in said.err


def test_evaluate_says_where_gluonts_finds_something_else(model_folder, tmp_path, capsys, monkeypatch):
    from tsgdn.cli import evaluate
    from tsgdn.cli.main import main

    monkeypatch.setattr(evaluate, "_through_gluonts", lambda *_: {"wql": 1.0, "mase": 1.0, "nd": 1.0})
    assert main(["evaluate", "--model", str(model_folder), "--out", str(tmp_path), "--baselines"]) == 1
    assert "through GluonTS; one is wrong" in capsys.readouterr().err


def test_backtest_scores_every_patch_end_of_the_test_part(model_folder, tmp_path, capsys):
    from tsgdn.cli.main import main

    assert main(["backtest", "--model", str(model_folder), "--out", str(tmp_path), "--horizon", "6"]) == 0
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [["simulated", w] for w in ("model", *evaluate_names())]
    assert str(tmp_path / "by_lead_simulated.png") in said.err
    with (tmp_path / "by_lead.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(r["lead"]) for r in rows] == [1, 2, 3, 4, 5, 6] * 3
    # 240 test steps hold 30 patches of 8; the last end has nothing after it
    assert {int(r["n"]) for r in rows} == {16 * 30}


@pytest.mark.parametrize(("option", "value", "least"), [("--horizon", "0", 1), ("--first", "-1", 0)])
def test_a_backtest_takes_no_zero_for_nothing_said(model_folder, tmp_path, capsys, option, value, least):
    from tsgdn.cli.main import main

    assert main(["backtest", "--model", str(model_folder), "--out", str(tmp_path), option, value]) == 2
    assert f"{option} {value}: expected at least {least}" in capsys.readouterr().err


def test_what_neither_can_score_is_no_disagreement(capsys):
    from tsgdn.cli.evaluate import _agree

    ours = {"wql": 1.0, "nd": 1.0, "mase": float("nan")}
    assert _agree("x", {**ours, "mase": float("inf")}, ours)
    assert not _agree("x", {**ours, "mase": 1.0}, ours)


def test_a_bench_runs_a_cell_again_with_other_options_only_and_survives_a_failure(tmp_path, monkeypatch):
    from tsgdn.bench import fits as cells
    from tsgdn.bench import gluonts

    results, fits = tmp_path / "results.csv", []
    scores = backtest.Scores(*[0.5] * 8, n=3, cells=6, horizon=2, seasonality=1)

    def fit(cell, root, sizes, options, score):
        fits.append((cell.seed, *options))
        if cell.seed == 1:
            raise ValueError("the forecast holds NaN")
        return scores, {"train_seconds": 1.0}

    monkeypatch.setattr(cells, "_fit", fit)
    monkeypatch.setattr(gluonts, "baselines", lambda *_: {})
    given = {"results": results, "root": tmp_path}
    assert gluonts.run(["simulated"], ["mamba2"], [0, 1], **given) == 1
    assert gluonts.run(["simulated"], ["mamba2"], [0], **given) == 0
    assert gluonts.run(["simulated"], ["mamba2"], [0], options=["--model.lr=1e-4"], **given) == 0
    assert fits == [(0,), (1,), (0, "--model.lr=1e-4")]
    with results.open(newline="") as file:
        assert {line["config"] for line in csv.DictReader(file)} == {"simulated", "simulated --model.lr=1e-4"}


def test_a_bench_of_a_preset_that_is_no_cell_is_misuse(capsys, tmp_path):
    from tsgdn.cli.main import main

    assert main(["bench", "gluonts", "--tasks", "demo", "--results", str(tmp_path / "r.csv")]) == 2
    assert "--tasks demo: expected evaluation cells that have a preset" in capsys.readouterr().err


def evaluate_names():
    from tsgdn.cli.evaluate import NAIVE

    return NAIVE


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--dataset", "etth"], "no data set or evaluation cell 'etth'"),
        (["--dataset", "simulated", "us_births"], "us_births has freq 'D', the model was fitted on 'h'"),
        (["--baselines", "oracle"], "no baseline 'oracle'"),
        (["--device", "quantum"], "--device quantum cannot be used here"),
        (["--model", "/nowhere"], "/nowhere holds no model"),
        (["--out", __file__], "is a file"),
    ],
)
def test_misuse_is_one_line_and_nothing_is_written(model_folder, tmp_path, capsys, options, complaint):
    from tsgdn.cli.main import main

    out = tmp_path / "out"
    assert main(["evaluate", "--model", str(model_folder), "--out", str(out), *options]) == 2
    said = capsys.readouterr()
    assert complaint in said.err
    assert said.err.count("\n") == 1
    assert said.out == ""
    assert not out.exists()
