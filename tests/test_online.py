"""The online protocol: splits, one pass over a stream, scores, corrections without a leak, fits for squared error."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from tsgdn.bench import online, online_plot
from tsgdn.bench.online import HORIZONS, Rows, build, recipe_of
from tsgdn.bench.online_fit import Recipe, base_errors, fit, lead_weights
from tsgdn.bench.online_stream import Corrector, every_origin
from tsgdn.cli.main import Misuse
from tsgdn.cli.main import main as tsgdn
from tsgdn.data import catalog
from tsgdn.data.catalog import DataNotFound, OnlineTask, online_task, online_tasks
from tsgdn.data.series import Series
from tsgdn.evaluation.baselines import Persistence, SeasonalNaive
from tsgdn.evaluation.metrics import WQL_LEVELS, quantile_loss
from tsgdn.evaluation.prequential import StreamScores, rolling_mean
from tsgdn.model.forecaster import Forecaster
from tsgdn.streaming.adapt import Learning
from tsgdn.streaming.predictor import StatefulPredictor

START = np.datetime64("2020-01-06T00", "ns")
LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def model_of(P: int = 1, K: int = 4, **given) -> Forecaster:
    torch.manual_seed(0)
    small = {"key_dim": 4, "value_dim": 4, "heads": 2}
    options = {"patch_size": P, "patches_ahead": K, "seasons": (1, 6), "width": 16, "depth": 2, "mixer_args": small}
    return Forecaster(**{**options, "quantile_levels": LEVELS, **given}).eval()


def wave(steps: int, variates: int = 2, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    t = np.arange(steps)
    return np.stack([np.sin(t / (2 + v)) + 0.1 * rng.normal(size=steps).cumsum() + v for v in range(variates)])


def each(values: np.ndarray, static: bool = False) -> list[Series]:
    return [
        Series(f"v{i}", START, "h", values[i : i + 1], static=(i + 1,) if static else ()) for i in range(len(values))
    ]


def gathered(model: Forecaster, series: list[Series], horizon: int, **given) -> tuple[np.ndarray, np.ndarray]:
    parts = list(every_origin(model, series, horizon, **given))
    return np.concatenate([at for at, _ in parts]), np.concatenate([values for _, values in parts])


# Splits


@pytest.mark.parametrize(
    ("name", "persistence", "seasonal"),
    [
        ("exchange_rate_dsof", (0.0089, 0.0861, 0.1648), None),
        pytest.param("ettm1_dsof", (0.120, 1.495, 2.640), (0.910, 0.910, 0.910), marks=pytest.mark.slow),
        ("etth1_dsof", (0.363, 2.796, 2.932), (0.925, 0.926, 1.069)),
        pytest.param("wth_dsof", (0.207, 0.614, 0.747), (0.639, 0.638, 0.733), marks=pytest.mark.slow),
        ("etth1_adaptz", (0.1937, 1.3411, 1.3882), (0.4235, 0.4246, 0.4847)),
    ],
)
def test_persistence_has_the_errors_that_were_printed(name: str, persistence: tuple, seasonal: tuple | None) -> None:
    task = online_task(name)
    try:
        rows = Rows.of(task)
    except DataNotFound as error:
        pytest.skip(str(error))
    truth = rows.whole.values
    for wanted, season in ((persistence, 1), (seasonal, task.seasonality)):
        if wanted is None:
            continue
        scores = StreamScores(truth, scale=rows.sd, levels=WQL_LEVELS, horizons=HORIZONS, first=task.test[0])
        for begin in range(task.test[0], task.test[1], 4096):
            at = np.arange(begin, min(begin + 4096, task.test[1]))
            scores.update(at, SeasonalNaive(season).at_origins(truth, origins=at, horizon=48, levels=WQL_LEVELS))
        digits = 3 if wanted[1] in (1.495, 2.796, 0.614) or wanted[0] in (0.910, 0.925, 0.639) else 4
        assert tuple(round(line["mse"], digits) for line in scores.table) == pytest.approx(wanted, abs=1e-9)
        assert [line["windows"] for line in scores.table] == [task.test[1] - task.test[0] - H + 1 for H in HORIZONS]


def test_parts_follow_one_another_and_agree_with_the_catalogue() -> None:
    for task in online_tasks().values():
        assert task.train[0] == 0
        assert task.train[1] == task.validation[0] < task.validation[1] == task.test[0]
        assert task.test[1] <= catalog.entry(task.dataset).length  # pyright: ignore[reportOperatorIssue]
        assert task.name in online.RECIPES
    split = catalog.entry("wth").split["dsof"]
    task = online_task("wth_dsof")
    assert [list(task.train), list(task.validation), list(task.test)] == [split["train"], split["val"], split["test"]]
    with pytest.raises(KeyError, match="did you mean etth1_dsof"):
        online_task("etth1_dso")


# One pass


@pytest.mark.parametrize("P", [1, 3])
def test_one_pass_gives_what_a_predictor_forecasts_after_each_row(P: int) -> None:
    model, values = model_of(P, -(-4 // P), static_cardinalities=[2]), wave(29)
    at, found = gathered(model, each(values, static=True), 4, piece=20)
    assert at.tolist() == list(range(1, 30))
    live = StatefulPredictor(model, freq="h", calendar=False, horizon=4)
    live.warm_up(each(values[:, :1], static=True))
    for step in range(1, 30):
        wanted = live.forecast(["v0", "v1"]).values[:, 0]
        np.testing.assert_allclose(found[step - 1], wanted, rtol=1e-5, atol=1e-5)
        if step < 29:
            stamps = np.full(2, START + np.timedelta64(step, "h"))
            live.observe((np.array(["v0", "v1"]), stamps, values[:, step]))


def test_a_series_of_several_variates_is_walked_like_the_parallel_path_and_in_any_pieces() -> None:
    model, values = model_of(1, 4), wave(20, 3)
    series = [Series("all", START, "h", values, variates=("a", "b", "c"))]
    at, parallel = gathered(model, series, 4)
    _, pieces = gathered(model, series, 4, piece=9)
    np.testing.assert_allclose(pieces, parallel, rtol=1e-5, atol=1e-5)
    some = np.array([2, 3, 11, 20])
    where, few = gathered(model, series, 4, at=some)
    assert where.tolist() == some.tolist()
    np.testing.assert_allclose(few, parallel[some - 1], rtol=1e-5, atol=1e-5)
    late = wave(20, 3)
    late[1, 0] = np.nan  # a missing value takes the other path
    gaps = [dataclasses.replace(series[0], values=late)]
    _, walked = gathered(model, gaps, 4, at=np.arange(2, 21))
    assert np.isfinite(walked).all()
    assert at.tolist() == list(range(1, 21))


@pytest.mark.parametrize("P", [1, 3])
def test_values_after_an_origin_change_nothing_up_to_it(P: int) -> None:
    model, values, known = model_of(P, 4), wave(30), 17
    poisoned = values.copy()
    poisoned[:, known:] = np.nan
    at = np.arange(1, known + 1)
    _, clean = gathered(model, each(values), 4, at=at, piece=8)
    _, other = gathered(model, each(poisoned), 4, at=at, piece=8)
    assert np.array_equal(clean, other)


# Scores


def test_stream_scores_are_those_of_every_window_that_fits() -> None:
    rng = np.random.default_rng(1)
    truth, horizons, first = wave(25), (1, 3), 10
    quantiles = np.sort(rng.normal(size=(25, 2, 3, 9)), -1)
    mean = rng.normal(size=(25, 2, 3))
    scale = np.array([0.5, 2.0])
    scores = StreamScores(truth, scale=scale, levels=LEVELS, horizons=horizons, first=first)
    for at in np.array_split(np.arange(25), 4):
        scores.update(at, quantiles[at], mean[at])
    for line, H in zip(scores.table, horizons, strict=True):
        windows = range(first, 25 - H + 1)
        y = np.stack([truth[:, o : o + H] for o in windows])
        q, m = quantiles[list(windows), :, :H], mean[list(windows), :, :H]
        error = (y - m) / scale[:, None]
        loss = quantile_loss(target=y, quantiles=q, levels=LEVELS).mean(-1)
        assert line["windows"] == len(windows)
        assert line["mse"] == pytest.approx((error**2).mean())
        assert line["mae"] == pytest.approx(np.abs(error).mean())
        assert line["wql"] == pytest.approx(loss.sum() / np.abs(y).sum())
        assert line["coverage80"] == pytest.approx(((q[..., 0] <= y) & (y <= q[..., -1])).mean())
        assert scores.by_origin[horizons.index(H), first] == pytest.approx((error[0] ** 2).mean())
    assert np.isnan(scores.by_origin[:, :first]).all()
    bad = quantiles[:1].copy()
    bad[0, 0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="holds NaN"):
        scores.update(np.array([12]), bad)
    with pytest.raises(ValueError, match="expected"):
        scores.update(np.array([12]), quantiles[:1, :, :2])


def test_a_rolling_mean_leaves_out_what_is_missing() -> None:
    found = rolling_mean(np.array([np.nan, 1.0, 3.0, np.nan, 5.0, 7.0]), 2)
    np.testing.assert_allclose(found, [np.nan, 1, 2, 3, 5, 6])


# Corrections


def corrector(**given) -> Corrector:
    options = {"scale": np.ones(1), "centre": np.zeros(1), "horizon": 4, "seasonality": 3}
    return Corrector(**{**options, "learning": Learning(forget=1.0, prior=0.1), **given})


def test_the_newest_pair_of_a_lead_is_the_forecast_issued_that_many_steps_ago() -> None:
    """Every forecast of lead h errs by 1; nothing is known of it before the first of them has come true."""
    for lead in range(1, 5):
        one = corrector()
        bias = np.zeros((1, 4))
        bias[0, lead - 1] = 1.0
        shifts = np.stack([one.correct(origin, np.zeros(1), bias)[0] for origin in range(10, 24)])
        others = np.delete(shifts, lead - 1, 1)
        assert np.abs(others).max() == 0
        # issued at 10, its target is seen at origin 10 + lead; what is issued there is seen to be better by 10 + 2 lead
        assert np.flatnonzero(shifts[:, lead - 1])[0] == 2 * lead
        assert shifts[-1, lead - 1] == pytest.approx(-1.0, abs=0.1)


def test_corrections_up_to_a_step_do_not_depend_on_what_comes_later() -> None:
    rng = np.random.default_rng(3)
    values, means = rng.normal(size=(60, 1)), rng.normal(size=(60, 1, 4)) + 2
    clean, poisoned = corrector(), corrector()
    later = values.copy()
    later[40:] = np.nan
    one = np.zeros(1)
    for origin in range(1, 41):
        one = clean.correct(origin, values[origin - 1], means[origin])
        assert np.array_equal(one, poisoned.correct(origin, later[origin - 1], means[origin]))
    assert np.abs(one).max() > 0


def test_what_a_correction_looks_at_was_known_when_the_forecast_was_issued() -> None:
    rng = np.random.default_rng(5)
    values, means, m = rng.normal(size=80), rng.normal(size=(81, 1, 4)), 3
    one = corrector()
    for origin in range(1, 81):
        one.correct(origin, values[origin - 1 : origin], means[origin])
        if origin < 20:
            continue
        y, f = values[:origin], means[origin, 0]
        for lead in range(1, 5):
            season = origin + lead - 1 - m * -(-lead // m)
            assert season < origin
            wanted = [
                1.0,
                y[-1] - f[lead - 1],
                y[season] - f[lead - 1],
                y[season - m] - f[lead - 1],
                y[-m:].mean() - f[lead - 1],
                f[lead - 1],
                y[-1] - means[origin - lead, 0, lead - 1],
                y[season] - means[season - lead + 1, 0, lead - 1],
                y[-1] - means[origin - 1, 0, 0],
                *(y[-1 - k] - y[-1] for k in Corrector.LAGS),
            ]
            found = one._features[origin % one._ring, 0, lead - 1]
            np.testing.assert_allclose(found, wanted, atol=1e-12)


def test_a_perfect_forecast_is_left_alone_and_a_missing_value_teaches_nothing() -> None:
    truth = wave(80, 1)
    one = corrector()
    for origin in range(1, 70):
        newest = np.array([np.nan]) if origin % 7 == 0 else truth[:, origin - 1]
        assert np.abs(one.correct(origin, newest, truth[:, origin : origin + 4])).max() == 0


def test_a_correction_learns_what_persistence_knows() -> None:
    rng = np.random.default_rng(4)
    walk = rng.normal(size=400).cumsum()
    one, frozen, adapted = corrector(learning=Learning(forget=0.999, prior=1.0)), [], []
    for origin in range(1, 390):
        mean = np.full((1, 4), 0.5 * walk[origin - 1])  # shrunk where nothing should be
        shift = one.correct(origin, walk[origin - 1 : origin], mean)
        if origin > 200:
            truth = walk[origin : origin + 4]
            frozen.append((truth - mean[0]) ** 2)
            adapted.append((truth - mean[0] - shift[0]) ** 2)
    assert np.mean(adapted) < 0.5 * np.mean(frozen)


# Fits


def test_the_loss_weighs_leads_by_the_horizons_that_they_are_in() -> None:
    values = wave(200)
    base = base_errors(values, (1, 6), 6)
    for H, found in zip((1, 6), base, strict=True):
        origins = np.arange(6, 200 - H + 1)
        y = np.stack([values[:, o : o + H] for o in origins])
        errors = []
        for baseline in (Persistence(), SeasonalNaive(6)):
            points = baseline.at_origins(values, origins=origins, horizon=H, levels=(0.5,))[..., 0]
            errors.append(((y - points) ** 2).mean())
        assert found == pytest.approx(min(errors), rel=0.02)
    weights = lead_weights((1, 6), base, 6)
    assert weights[0] == pytest.approx((1 / base[0] + 1 / (6 * base[1])) / 2)
    assert weights[5] == pytest.approx(1 / (12 * base[1]))


TINY = Recipe(
    seasons=(1, 6), width=16, depth=1, steps=12, batch=4, window=24, loss_tokens=8, validations=3, lr=5e-3, dropout=0.0
)


def small_build(recipe: Recipe, categories: int) -> Forecaster:
    given = {"static_cardinalities": [categories]} if categories else {"variate_every": 1}
    return model_of(recipe.patch_size, 4, depth=recipe.depth, seasons=recipe.seasons, **given)


@pytest.mark.parametrize("multivariate", [False, True])
def test_a_fit_keeps_the_weights_of_its_best_validation(multivariate: bool) -> None:
    values = wave(300)
    recipe = dataclasses.replace(TINY, multivariate=multivariate)
    series = [Series("all", START, "h", values, variates=("a", "b"))] if multivariate else each(values, static=True)
    found = fit(series, train=220, horizons=(1, 4), seasonality=6, recipe=recipe, build=small_build)
    assert [step for step, *_ in found.curve] == [0, 4, 8, 12]
    assert found.best[1] < found.curve[0][1]
    at = np.arange(220, 300)
    scores = StreamScores(values, scale=np.ones(2), levels=LEVELS, horizons=(1, 4), first=220)
    for origins, quantiles in every_origin(found.model, series, 4, at=at):
        scores.update(origins, quantiles)
    assert [line["mse"] for line in scores.table] == pytest.approx(found.best[2], rel=1e-4)
    # nothing after the training rows enters the weights, but for the choice among them
    moved = values.copy()
    moved[:, 220:] += 1.0
    again = each(moved, static=True) if not multivariate else [dataclasses.replace(series[0], values=moved)]
    other = fit(again, train=220, horizons=(1, 4), seasonality=6, recipe=recipe, build=small_build)
    if other.best[0] == found.best[0]:
        for mine, theirs in zip(found.model.parameters(), other.model.parameters(), strict=True):
            assert torch.equal(mine, theirs)


def test_a_stream_is_scored_beside_the_naive_ones_and_a_predictor_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(online, "COLD_STEPS", (1, 4, 16))
    monkeypatch.setattr(online, "COLD_STARTS", 3)
    values = 3 * wave(160) + 10
    task = OnlineTask(
        name="tiny", dataset="none", train=(0, 60), validation=(60, 90), test=(90, 160), seasonality=6, protocol="here"
    )
    whole = Series("none", START, "h", values, variates=("a", "b"))
    rows = Rows(task, whole, values[:, :60].mean(1), values[:, :60].std(1))
    model = small_build(TINY, 2)
    found = online.stream(model, rows, TINY, (1, 4))
    assert set(found.scores) == {"frozen", "adapted", "persistence", "seasonal_naive"}
    assert [line["windows"] for line in found.scores["frozen"].table] == [70, 67]
    if found.learning is None:
        assert found.scores["adapted"].table == found.scores["frozen"].table
    last = values[:, 89:-1]
    square = ((values[:, 90:] - last) / rows.sd[:, None]) ** 2
    assert found.scores["persistence"].table[0]["mse"] == pytest.approx(square.mean())
    assert set(found.validation) == {str(learning) for learning in online.LEARNING}
    difference, microseconds = online.replayed(model, rows, TINY, found.stretch, most=10)
    assert difference < 1e-4
    assert microseconds > 0
    cold = online.cold_start(model, rows, TINY, (1, 4))
    assert cold["cold"].shape == cold["persistence"].shape == (2, 3)
    # what the test part holds changes no choice that was made before it
    moved = values.copy()
    moved[:, 90:] *= -1
    other = online.stream(
        model, dataclasses.replace(rows, whole=dataclasses.replace(whole, values=moved)), TINY, (1, 4)
    )
    assert other.learning == found.learning
    assert other.validation == found.validation


def test_pictures_are_drawn_from_what_a_stream_left(tmp_path) -> None:
    folder = tmp_path / "runs" / "etth1_dsof" / "gated_deltanet" / "0"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(6)
    kept: dict[str, Any] = {
        name: rng.random((2, 50)) for name in ("frozen", "adapted", "persistence", "seasonal_naive")
    }
    cold: dict[str, Any] = {f"cold_{name}": rng.random((2, 3)) for name in ("cold", "frozen", "persistence")}
    np.savez(folder / "stream.npz", first=np.array(10), seen=np.array([1, 4, 16]), **kept, **cold)
    found = online_plot.plot(tmp_path / "runs", ["etth1_dsof", "wth_dsof"], tmp_path, (1, 4))
    assert [path.name for path in found] == ["online_etth1_dsof.png", "online_cold_etth1_dsof.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in found)
    assert online_plot.plot(tmp_path / "runs", ["etth1_dsof"], tmp_path, (1, 4, 8)) == []


# Command line


def test_options_of_a_recipe_are_told_in_one_line() -> None:
    recipe = recipe_of("etth1_dsof", ["steps=3", "seasons=[1, 24]", "multivariate=true", "half_life=null"])
    assert (recipe.steps, recipe.seasons, recipe.multivariate, recipe.half_life) == (3, (1, 24), True, None)
    for text, said in (("stepz=3", "one of seasons"), ("steps", "OPTION=VALUE"), ("steps=many", "no number")):
        with pytest.raises(ValueError, match=said):
            recipe_of("etth1_dsof", [text])
    model = build("h", "mamba2")(dataclasses.replace(recipe, multivariate=False), 7)
    assert model.direct_steps == 48
    assert model.config["static_cardinalities"] == [7]


def test_misuse_of_the_command_is_told(capsys: pytest.CaptureFixture[str], tmp_path) -> None:
    for options, said in (
        (("--tasks", "etth9"), "etth1_dsof"),
        (("--horizons", "0"), "whole numbers"),
        (("--report", "--root", str(tmp_path)), "no streams to draw"),
        (("--mixers", "lstm"), "gated_deltanet"),
    ):
        assert tsgdn(["bench", "online", *options]) == 2
        assert said in capsys.readouterr().err
    assert issubclass(Misuse, Exception)
