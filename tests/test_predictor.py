"""The stateful predictor: stream = batch, purity, verdicts on rows, snapshots."""

import hashlib
from dataclasses import replace
from datetime import datetime

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch

from tsgdn.data.clock import Clock
from tsgdn.data.series import Series
from tsgdn.model import artefact
from tsgdn.model.forecaster import Forecaster
from tsgdn.streaming import snapshot
from tsgdn.streaming.predictor import StatefulPredictor
from tsgdn.streaming.replay import replay
from tsgdn.streaming.rows import from_objects
from tsgdn.types import Batch

START = np.datetime64("2024-02-27T05:00", "ns")
P = 4


def make_model(seed=0, *, user_features=0, static=(), freq="h", patch_size=P, width=8, depth=2):
    torch.manual_seed(seed)
    model = Forecaster(
        patch_size=patch_size,
        patches_ahead=2,
        seasons=(1, 24),
        known_features=Clock(freq).calendar_size + user_features,
        static_cardinalities=static,
        width=width,
        depth=depth,
        mixer_args={"heads": 1, "key_dim": 8},
    )
    with torch.no_grad():
        for parameter in model.parameters():  # no part is at its initial zero
            parameter += 0.05 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture
def predictor(model):
    return StatefulPredictor(model, freq="h")


def walk(steps, seed=0, variates=1):
    return np.random.default_rng(seed).normal(size=(variates, steps)).cumsum(1) + 10


def make_series(item_id, steps, seed=0, start=START, **more):
    return Series(item_id, start, "h", walk(steps, seed), **more)


def test_past_covariates_are_observed_and_not_forecast(model):
    names = ("load", "wind", "sun")
    predictor = StatefulPredictor(model, freq="h", variates=names, targets=1)
    history = Series("a", START, "h", walk(40, variates=3), variates=names)
    predictor.warm_up(history)
    forecast = predictor.forecast(horizon=6)
    assert forecast.variates == ("load",)
    assert forecast.values.shape[:3] == (1, 1, 6)
    calm = StatefulPredictor(model, freq="h", variates=names, targets=1)
    calm.warm_up(replace(history, values=np.where(np.arange(3)[:, None] == 1, 0.0, history.values)))
    assert not np.allclose(calm.forecast(horizon=6).values, forecast.values), "the covariate is not read"
    assert predictor.verify(history).ok
    (origin,) = [
        moment for moment in replay(calm.fork([]), [history], 6, every=30, warm_up=20) if moment.origin[0] < 40
    ][:1]
    assert origin.truth.shape == (1, 1, 6)
    with pytest.raises(ValueError, match="targets is 4"):
        StatefulPredictor(model, freq="h", variates=names, targets=4)


def stamp(step, start=START):
    return start + np.timedelta64(step, "h")


def rows_of(series):
    return [(series.item_id, t, float(x)) for t, x in zip(series.timestamps, series.values[0], strict=True)]


def digest(predictor):
    hashed = hashlib.blake2b()
    for name, tensor in sorted(predictor.state_tensors().items()):
        hashed.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return hashed.hexdigest()


def assert_same_forecasts(a, b, rtol=1e-5, items=None, horizon=20):
    one, two = a.forecast(items, horizon=horizon), b.forecast(items or one_ids(a), horizon=horizon)
    assert one.item_ids == two.item_ids
    assert (one.start == two.start).all()
    np.testing.assert_allclose(one.values, two.values, rtol=rtol, atol=rtol)


def one_ids(predictor):
    return predictor.item_ids


def batch_forecast(model, series, origin, horizon):
    """The token's own quantiles out of one parallel pass; inside a patch over the closed patch."""
    length = -(-origin // P) * P
    values = np.full((1, 1, length), np.nan)
    values[0, :, :origin] = series.values[:, :origin]
    known = series.clock.calendar(series.start, 0, length + model.span)[None]
    batch = Batch(torch.tensor(np.nan_to_num(values)), torch.tensor(~np.isnan(values)), torch.tensor(known))
    with torch.no_grad():
        quantiles, _ = model(batch)
    begin = origin % P or P
    return quantiles.unscaled()[0, :, -1, begin : begin + horizon].numpy()


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_replayed_forecasts_equal_those_of_one_parallel_pass_at_every_step(dtype, rtol):
    model = make_model().to(dtype)
    histories = [make_series("a", 30), make_series("b", 25, seed=1, start=stamp(3))]
    seen = 0
    for origin, forecast, truth in replay(StatefulPredictor(model, freq="h"), histories, 8):
        for row, item in enumerate(forecast.item_ids):
            series = next(one for one in histories if one.item_id == item)
            want = batch_forecast(model, series, int(origin[row]), 8)
            np.testing.assert_allclose(forecast.values[row], want, rtol=rtol, atol=rtol)
            assert forecast.start[row] == series.start + np.timedelta64(int(origin[row]), "h")
            ahead = series.values[:, origin[row] : origin[row] + 8]
            np.testing.assert_array_equal(truth[row][:, : ahead.shape[1]], ahead)
            assert np.isnan(truth[row][:, ahead.shape[1] :]).all()
            seen += 1
    assert seen == 29 + 24


def test_replay_can_start_after_a_warm_up_and_keep_whole_truths_only(predictor):
    histories = [make_series("a", 40), make_series("b", 30, seed=1)]
    origins = list(replay(predictor, histories, 6, every=5, warm_up={"a": 20, "b": 10}, full=True))
    assert [one.origin.tolist() for one in origins] == [[20, 10], [25, 15], [30, 20]]
    assert not any(np.isnan(one.truth).any() for one in origins)


def test_verify_certifies_the_stream_and_leaves_the_states_alone(predictor):
    predictor.warm_up(make_series("a", 13))
    before = digest(predictor)
    report = predictor.verify([make_series("x", 50), make_series("y", 31, seed=2)])
    assert report.ok
    assert report.forecasts >= 14
    assert digest(predictor) == before
    assert "x" not in predictor


def test_verify_finds_a_stream_that_says_nothing_and_does_not_certify_nothing(model, monkeypatch):
    predictor = StatefulPredictor(model, freq="h")
    assert not predictor.verify(make_series("x", 0)).ok
    with pytest.raises(ValueError, match="rtol"):
        predictor.verify(make_series("x", 9), rtol=float("nan"))
    real = Forecaster.forecast
    monkeypatch.setattr(Forecaster, "forecast", lambda *args, **more: real(*args, **more) * torch.nan)
    assert predictor.verify(make_series("x", 20)).error == np.inf


def test_verify_finds_a_model_whose_state_forgets(model, monkeypatch):
    real = Forecaster.forward

    def forgets(self, batch, state=None, *, read=None):
        if state is not None:
            state = state._replace(scaling=type(state.scaling)(*(torch.zeros_like(x) for x in state.scaling)))
        return real(self, batch, state, read=read)

    monkeypatch.setattr(Forecaster, "forward", forgets)
    assert not StatefulPredictor(model, freq="h").verify(make_series("x", 50)).ok


def test_forecasting_over_and_over_changes_nothing(predictor):
    predictor.observe(rows_of(make_series("a", 4 * P + 2)))
    before = digest(predictor)
    first = predictor.forecast(horizon=3 * P).values
    for _ in range(40):
        predictor.forecast(horizon=2)
    predictor.forecast(horizon=40, quantile_levels=(0.001, 0.5))
    assert digest(predictor) == before
    np.testing.assert_array_equal(predictor.forecast(horizon=3 * P).values, first)


def test_warm_up_equals_streaming_row_by_row_and_can_go_on_from_a_state(model):
    histories = [make_series(f"s{i}", 13 + 6 * i, seed=i) for i in range(4)]
    warm, chunked, twice, streamed = (StatefulPredictor(model, freq="h") for _ in range(4))
    warm.warm_up(histories)
    chunked.warm_up(histories, chunk=8)
    twice.warm_up([one.slice(0, 11) for one in histories])
    twice.warm_up([one.slice(11) for one in histories])
    for one in histories:
        for row in rows_of(one):
            assert streamed.observe([row]).accepted == 1
    for other in (chunked, twice, streamed):
        assert_same_forecasts(warm, other)
        for name, tensor in warm.state_tensors().items():
            torch.testing.assert_close(other.state_tensors()[name], tensor, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert [warm.head(one.item_id) for one in histories] == [13, 19, 25, 31]


def test_any_order_and_any_cut_of_the_rows_give_the_same_forecasts(model):
    histories = [make_series(f"s{i}", 30 + i, seed=i) for i in range(3)]
    rows = [row for one in histories for row in rows_of(one)]
    whole, shuffled, subsets = (StatefulPredictor(model, freq="h") for _ in range(3))
    assert whole.observe(rows).accepted == len(rows)
    order = np.random.default_rng(0).permutation(len(rows))
    assert shuffled.observe([rows[i] for i in order]).accepted == len(rows)
    rng = np.random.default_rng(1)
    queues = {one.item_id: rows_of(one) for one in histories}
    while any(queues.values()):
        some = [queues[item].pop(0) for item in queues if queues[item] and rng.random() < 0.6]
        assert subsets.observe(some).accepted == len(some)
    items = [one.item_id for one in histories]
    assert_same_forecasts(whole, shuffled, items=items)
    assert_same_forecasts(whole, subsets, items=items)


def test_a_series_does_not_depend_on_its_neighbours(model):
    histories = [make_series(f"s{i}", 26 + 5 * i, seed=i) for i in range(5)]
    together, alone, permuted = (StatefulPredictor(model, freq="h") for _ in range(3))
    together.warm_up(histories)
    permuted.warm_up(histories[::-1])
    alone.warm_up(histories[2])
    assert_same_forecasts(together, alone, items=["s2"])
    assert_same_forecasts(together, permuted, items=["s3", "s0", "s2"])


@pytest.mark.parametrize(("gap", "phase"), [(1, 0), (3, 3), (5 * P + 1, 2), (32 * P + 3, 1), (60 * P, 0)])
def test_absent_rows_equal_explicit_missing_ones(model, gap, phase):
    head = 5 * P + phase
    values = walk(head + gap + 2 * P + 1)
    values[:, head : head + gap] = np.nan
    explicit, absent = StatefulPredictor(model, freq="h"), StatefulPredictor(model, freq="h")
    rows = rows_of(Series("a", START, "h", values))
    told = explicit.observe(rows)
    assert (told.missing, told.gap) == (gap, 0)
    given = [row for row in rows if not np.isnan(row[2])]
    for i, row in enumerate(given):
        report = absent.observe([row])
        assert report.gap == (gap if i == head else 0)
    assert explicit.head("a") == absent.head("a")
    assert_same_forecasts(explicit, absent)


def test_a_silence_of_a_hundred_thousand_steps_is_crossed_without_a_loop(model, monkeypatch):
    predictor = StatefulPredictor(model, freq="h", max_jump=10**6)
    predictor.observe(rows_of(make_series("a", 10)))
    fed = []
    real = Forecaster.forward

    def counted(self, batch, state=None, *, read=None):
        fed.append(batch.values.shape[-1])
        return real(self, batch, state, read=read)

    monkeypatch.setattr(Forecaster, "forward", counted)
    assert predictor.observe([("a", stamp(100_000), 1.0)]).gap == 99_990
    assert predictor.head("a") == 100_001
    assert sum(fed) < 40 * P


def test_each_bad_row_gets_its_verdict_and_leaves_no_trace(model):
    predictor, oracle = StatefulPredictor(model, freq="h"), StatefulPredictor(model, freq="h")
    history = rows_of(make_series("a", 30))
    predictor.observe(history)
    oracle.observe(history)
    before = digest(predictor)
    wrong = {
        "ts.conflict": ("a", stamp(29), 1e6),
        "ts.late": ("a", stamp(2), 1.0),
        "ts.grid": ("a", stamp(30) + np.timedelta64(1, "m"), 1.0),
        "ts.syntax": ("a", "yesterday", 1.0),
        "ts.type": ("a", 1_700_000_000, 1.0),
        "ts.range": ("a", "9999-01-01", 1.0),
        "value.nonfinite": ("a", stamp(30), float("inf")),
        "value.range": ("a", stamp(30), 1.1e100),
        "value.type": ("a", stamp(30), "1.5"),
        "value.count": ("a", stamp(30), [1.0, 2.0]),
        "item.id": ("a\0b", stamp(30), 1.0),
    }
    for code, row in wrong.items():
        report = predictor.observe([row])
        assert [bad.code for bad in report.set_aside] == [code]
        assert report.first[code][0] == row[0].replace("\0", "\\x00")
        assert report.late + report.rejected == 1
        assert digest(predictor) == before
    assert [bad.code for bad in predictor.observe([("a", stamp(30), True)]).set_aside] == ["value.type"]
    again = predictor.observe(history[-5:])
    assert (again.duplicate, again.accepted) == (5, 0)
    assert digest(predictor) == before

    mixed = predictor.observe([*wrong.values(), ("a", stamp(30), 5.0), ("a", stamp(30), 5.0), ("a", stamp(31), None)])
    assert (mixed.accepted, mixed.missing, mixed.duplicate, mixed.late) == (1, 1, 1, 1)
    assert mixed.rejected == len(wrong) - 1
    assert {bad.code: bad.row for bad in mixed.set_aside} == {code: i for i, code in enumerate(wrong)}
    oracle.observe([("a", stamp(30), 5.0), ("a", stamp(31), np.nan)])
    assert digest(predictor) == digest(oracle)


def test_a_missing_cell_is_filled_only_while_its_patch_is_open_and_nobody_called_it_missing(model):
    predictor, oracle = StatefulPredictor(model, freq="h"), StatefulPredictor(model, freq="h")
    values = [(("a", stamp(i), float(i))) for i in range(2 * P)]
    predictor.observe([row for i, row in enumerate(values) if i not in (2, P + 1)][: 2 * P - 3])  # ends in patch two
    head = predictor.head("a")
    assert P < head < 2 * P
    assert predictor.observe([values[2]]).late == 1  # its patch is closed
    assert predictor.observe([values[P + 1]]).accepted == 1
    assert predictor.observe([values[P + 1]]).duplicate == 1
    oracle.observe([("a", t, None if i == 2 else x) for i, (_, t, x) in enumerate(values[:head])])
    assert_same_forecasts(predictor, oracle, rtol=0)
    predictor.observe([("a", stamp(head), None)])
    assert predictor.observe([("a", stamp(head), 3.0)]).late == 1


@pytest.mark.parametrize("absent", [0, 2])
def test_a_patch_stays_open_until_its_cells_are_told_or_a_row_beyond_it_comes(model, absent):
    filled, passed, oracle, blind = (StatefulPredictor(model, freq="h") for _ in range(4))
    rows = [("a", stamp(i), float(i * i)) for i in range(2 * P + 1)]
    late = rows.pop(P + absent)
    for one in (filled, passed):
        for row in rows[: 2 * P - 1]:  # the end of the second patch is told, one of its cells is not
            one.observe([row])
        assert one.head("a") == 2 * P
    assert_same_forecasts(filled, passed, rtol=0)
    assert filled.observe([late]).accepted == 1
    assert filled.observe([late]).duplicate == 1
    assert filled.observe(rows[-1:]).accepted == 1
    oracle.observe([*rows, late])
    blind.observe([*rows, (*late[:2], None)])
    assert passed.observe(rows[-1:]).accepted == 1
    assert passed.observe([late]).late == 1
    assert_same_forecasts(filled, oracle)
    assert_same_forecasts(passed, blind)
    assert not np.allclose(filled.forecast().values, passed.forecast().values)


@pytest.mark.parametrize("gap", [32 * P + 2, 40 * P])
def test_a_patch_after_a_long_silence_stays_open_likewise(model, gap):
    apart, whole = StatefulPredictor(model, freq="h"), StatefulPredictor(model, freq="h")
    begin = 6 + gap
    rows = [("a", stamp(begin + i), float(i)) for i in range(2 * P - begin % P)]
    for one in (apart, whole):
        one.observe(rows_of(make_series("a", 6)))
    apart.observe([rows[-1]])
    assert apart.observe(rows[-P:-1]).accepted == P - 1
    whole.observe(rows[-P:])
    assert_same_forecasts(apart, whole)


def test_bad_rows_with_errors_raise_apply_nothing(predictor):
    predictor.observe(rows_of(make_series("a", 10)))
    before = digest(predictor)
    rows = [("a", stamp(10), 1.0), ("b", stamp(0), 1.0), ("a", stamp(3), 99.0)]
    with pytest.raises(ValueError, match=r"ts\.conflict.*nothing was applied"):
        predictor.observe(rows, errors="raise")
    assert digest(predictor) == before
    assert "b" not in predictor


def test_one_wrong_date_does_not_poison_a_series(predictor):
    predictor.observe(rows_of(make_series("a", 10)))
    before = digest(predictor)
    assert predictor.observe([("a", stamp(1_000_000), 1.0)]).held == 1
    assert digest(predictor) == before
    report = predictor.observe([("a", stamp(10), 1.0)])
    assert report.accepted == 1
    assert [(bad.code, bad.row) for bad in report.set_aside] == [("ts.jump", None)]
    assert predictor.head("a") == 11


def test_a_real_outage_heals_when_three_rising_rows_agree(model):
    waited, trusted = StatefulPredictor(model, freq="h"), StatefulPredictor(model, freq="h", max_jump=10**7)
    far = [("a", stamp(1_000_000 + i), float(i)) for i in range(3)]
    for predictor in (waited, trusted):
        predictor.observe(rows_of(make_series("a", 10)))
    assert [waited.observe([row]).held for row in far] == [1, 1, 0]
    trusted.observe(far)
    assert waited.head("a") == trusted.head("a") == 1_000_003
    assert_same_forecasts(waited, trusted)


def test_held_rows_survive_save_and_load(predictor, model, tmp_path):
    predictor.observe(rows_of(make_series("a", 10)))
    predictor.observe([("a", stamp(1_000_000), 1.0)])
    predictor.save(tmp_path)
    other = StatefulPredictor(model, freq="h")
    other.load(tmp_path)
    assert other.held() == predictor.held() == {("a", str(stamp(1_000_000))[:16].replace("T", " ")): [1.0]}
    other.observe([("a", stamp(1_000_001), 1.0), ("a", stamp(1_000_002), 1.0)])
    assert other.head("a") == 1_000_003


@pytest.mark.parametrize("dialect", ["pandas", "pandas_tz", "polars", "arrow", "nixtla", "mapping", "arrays", "text"])
def test_every_way_to_give_rows_means_the_same(model, dialect):
    series = make_series("a", 19)
    oracle, predictor = StatefulPredictor(model, freq="h"), StatefulPredictor(model, freq="h")
    oracle.warm_up(series)
    times, values = series.timestamps, series.values[0]
    frame = pd.DataFrame({"item_id": "a", "timestamp": times, "target": values})
    if dialect == "mapping":
        for t, x in zip(times, values, strict=True):
            predictor.observe({"a": x}, timestamp=t)
    else:
        data = {
            "pandas": lambda: frame,
            "pandas_tz": lambda: frame.assign(
                timestamp=frame.timestamp.dt.tz_localize("UTC").dt.tz_convert("Asia/Tokyo")
            ),
            "polars": lambda: pl.from_pandas(frame),
            "arrow": lambda: pl.from_pandas(frame).to_arrow(),
            "nixtla": lambda: frame.rename(columns={"item_id": "unique_id", "timestamp": "ds", "target": "y"}),
            "arrays": lambda: (np.array(["a"] * 19), times, values),
            "text": lambda: [
                ("a", f"{pd.Timestamp(t).isoformat()}+00:00", x) for t, x in zip(times, values, strict=True)
            ],
        }[dialect]()
        assert predictor.observe(data).accepted == 19
    assert_same_forecasts(oracle, predictor)


@pytest.mark.parametrize("year", [1, 1600, 9999])
def test_a_time_that_nanoseconds_do_not_reach_is_refused_from_a_frame_too(predictor, year):
    frame = pl.DataFrame({"item_id": ["a"], "timestamp": [datetime(year, 1, 1)], "target": [1.0]})
    assert [bad.code for bad in predictor.observe(frame).set_aside] == ["ts.range"]
    seconds = pd.DataFrame(
        {"item_id": "a", "timestamp": pd.Series(np.array([f"{year:04}-01-01"], "M8[s]")), "target": [1.0]}
    )
    assert [bad.code for bad in predictor.observe(seconds).set_aside] == ["ts.range"]


@pytest.mark.parametrize("text", ["2024-01-31T12:00+99:99", "2024-01-31T12:00+02:75", "2024-01-31T1200", "2024-1-31"])
def test_times_that_are_not_iso_are_refused(predictor, text):
    assert [bad.code for bad in predictor.observe([("a", text, 1.0)]).set_aside] == ["ts.syntax"]


@pytest.mark.parametrize("size", [9e99, 1e-30, 1e-99, 1e-120, 1e-200, 1e-308, 1e-320])
def test_huge_and_tiny_values_leave_forecasts_and_states_finite(model, size):
    predictor, scaled = StatefulPredictor(model, freq="h"), StatefulPredictor(model, freq="h")
    values = np.clip(walk(30)[0] / 20, -1, 1)
    predictor.observe([("a", stamp(i), float(x * size)) for i, x in enumerate(values)])
    predictor.warm_up(Series("warm", START, "h", values[None] * size))
    found = predictor.forecast(horizon=9).values
    assert np.isfinite(found).all()
    leaves = {name: leaf for name, leaf in predictor.state_tensors().items() if name.startswith("state.")}
    assert all(leaf.isfinite().all() for name, leaf in leaves.items() if "known" not in name)
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5)
    if size >= 1e-99:
        scaled.observe([("a", stamp(i), float(x)) for i, x in enumerate(values)])
        np.testing.assert_allclose(found[0] / size, scaled.forecast(horizon=9).values[0], rtol=1e-4)
    else:  # counts as zero
        scaled.observe([("a", stamp(i), 0.0) for i in range(30)])
        np.testing.assert_allclose(found[0], scaled.forecast(horizon=9).values[0], rtol=1e-4, atol=1e-10)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"values": np.full((1, 5), 1e120)}, "beyond 1e"),
        ({"item_id": "a\0b"}, "control character"),
        ({"item_id": "\ud800"}, "Unicode"),
        ({"static": (1, 2)}, "2 categories, expected 1"),
        ({"known": np.full((2, 5), 1e39)}, "beyond float32"),
    ],
)
def test_a_history_that_cannot_be_taken_applies_nothing(change, text):
    predictor = StatefulPredictor(make_model(user_features=2, static=(3,)), freq="h")
    good = make_series("good", 5)
    bad = replace(make_series("bad", 5, seed=1), **change)
    with pytest.raises(ValueError, match=text):
        predictor.warm_up([good, bad])
    assert len(predictor) == 0
    with pytest.raises(ValueError, match="chunk"):
        predictor.warm_up(good, chunk=0)


def test_a_history_off_the_grid_applies_nothing():
    predictor = StatefulPredictor(make_model(freq="MS"), freq="MS")
    with pytest.raises(ValueError, match="not on the grid"):
        predictor.warm_up(Series("a", np.datetime64("2024-01-15", "ns"), "MS", walk(5)))
    assert len(predictor) == 0


def test_a_name_given_as_text_is_one_series_and_not_its_letters(predictor):
    predictor.warm_up([make_series("ab", 9), make_series("a", 9), make_series("b", 9)])
    assert predictor.fork("ab").item_ids == ("ab",)
    assert predictor.fork(["a", "a"]).item_ids == ("a",)
    assert predictor.evict("ab") == 1
    assert predictor.item_ids == ("a", "b")
    predictor.reset("a")
    assert predictor.item_ids == ("b",)


def test_many_bad_names_and_many_filled_cells_cost_no_more_than_their_number(model):
    # quadratic work on this many rows takes seconds
    many = 4_000
    names = [f"s\0{i}" for i in range(many)]
    assert len(from_objects(names, [START] * many, [1.0] * many, ("target",)).bad) == many
    predictor = StatefulPredictor(model, freq="h", variates=("x", "y"))
    ids = [f"s{i}" for i in range(800)]
    predictor.observe({item: [1.0, None] for item in ids}, timestamp=START)
    report = predictor.observe({item: [None, 2.0] for item in ids}, timestamp=START)
    assert report.accepted == len(ids)


def test_wrong_frames_raise_before_anything_is_applied(predictor):
    good = pd.DataFrame({"item_id": ["a"], "timestamp": [START], "target": [1.0]})
    for wrong, text in [
        (good.drop(columns="target"), "target or y is missing"),
        (good.assign(extra=1), "unknown column 'extra'"),
        (good.assign(target="1.0"), "expected numbers"),
        (good.assign(target=True), "expected numbers"),
        ([("a", 1.0)], "a row is"),
        ({"a": 1.0}, "timestamp="),
        (3, "cannot read"),
    ]:
        with pytest.raises(ValueError, match=text):
            predictor.observe(wrong)
    assert len(predictor) == 0


def test_unknown_series_are_created_or_rejected_and_quotas_hold(model):
    strict = StatefulPredictor(model, freq="h", on_unknown="reject")
    assert strict.observe([("a", START, 1.0)]).first["item.unknown"][0] == "a"
    strict.register(["a"])
    assert strict.observe([("a", START, 1.0)]).accepted == 1
    small = StatefulPredictor(model, freq="h", max_series=2)
    report = small.observe([(item, START, 1.0) for item in "abcd"])
    assert (report.accepted, [bad.code for bad in report.set_aside]) == (2, ["series.quota"] * 2)
    with pytest.raises(KeyError, match="'zz' is not known"):
        small.forecast(["zz"])


def test_a_series_reset_or_evicted_starts_anew_and_slots_are_used_again(predictor, model):
    predictor.warm_up([make_series("a", 30), make_series("b", 30, seed=1)])
    size = predictor.nbytes_per_series
    assert predictor.evict(["a"]) == 1
    predictor.reset(["b"])
    assert len(predictor) == 0
    fresh = StatefulPredictor(model, freq="h")
    for one in (predictor, fresh):
        one.warm_up([make_series("c", 21, seed=3), make_series("b", 17, seed=4)])
    assert digest(predictor) == digest(fresh)
    assert predictor.nbytes_per_series == size


def test_bytes_per_series_do_not_grow(predictor):
    predictor.observe(rows_of(make_series("a", 1)))
    size = predictor.nbytes_per_series
    held = sum(tensor.nbytes for tensor in predictor.state_tensors().values())
    predictor.warm_up(Series("a", stamp(1), "h", walk(3000)))
    assert predictor.nbytes_per_series == size
    assert sum(tensor.nbytes for tensor in predictor.state_tensors().values()) == held


def test_what_happens_to_a_fork_does_not_reach_the_original(predictor):
    predictor.warm_up([make_series("a", 30), make_series("b", 22, seed=1)])
    before, forecast = digest(predictor), predictor.forecast(["b"]).values
    what_if = predictor.fork(["b"])
    assert what_if.item_ids == ("b",)
    np.testing.assert_array_equal(what_if.forecast().values, forecast)
    what_if.observe([("b", stamp(22 + i), 100.0) for i in range(P)])
    assert not np.array_equal(what_if.forecast().values, forecast)
    assert digest(predictor) == before


def test_saved_and_loaded_continues_bit_for_bit(predictor, model, tmp_path):
    histories = [make_series(f"s{i}", 21 + 3 * i, seed=i) for i in range(4)]
    predictor.warm_up([one.slice(0, 15 + i) for i, one in enumerate(histories)])
    predictor.save(tmp_path / "state", offset={"line": 7})
    restored = StatefulPredictor(model, freq="h")
    assert restored.load(tmp_path / "state") == {"line": 7}
    assert digest(restored) == digest(predictor)
    for other in (predictor, restored):
        other.observe([row for i, one in enumerate(histories) for row in rows_of(one)[15 + i :]])
        other.observe([("new", START, 3.0)])
    assert digest(restored) == digest(predictor)
    np.testing.assert_array_equal(restored.forecast(horizon=20).values, predictor.forecast(horizon=20).values)
    predictor.save(tmp_path / "state")
    assert len(list((tmp_path / "state").glob("*.safetensors"))) == 1


def test_snapshots_that_do_not_belong_are_refused_by_name(predictor, model, tmp_path):
    predictor.warm_up(make_series("a", 20))
    predictor.save(tmp_path)
    other = StatefulPredictor(make_model(seed=1), freq="h")
    with pytest.raises(snapshot.SnapshotRefused, match="belong to model"):
        other.load(tmp_path)
    with pytest.raises(snapshot.SnapshotRefused, match="freq 'h', expected '2h'"):
        StatefulPredictor(model, freq="2h").load(tmp_path)
    with pytest.raises(FileNotFoundError):
        other.load(tmp_path / "nowhere")
    header, states = tmp_path / "header.json", next(tmp_path.glob("*.safetensors"))
    good_header, good_states = header.read_bytes(), states.read_bytes()
    fresh = StatefulPredictor(model, freq="h")
    for place in range(0, len(good_states), 997):
        states.write_bytes(good_states[:place] + bytes([good_states[place] ^ 1]) + good_states[place + 1 :])
        with pytest.raises(snapshot.SnapshotRefused, match="damaged"):
            fresh.load(tmp_path)
    states.write_bytes(good_states)
    for place in range(0, len(good_header), 13):
        header.write_bytes(good_header[:place] + bytes([good_header[place] ^ 1]) + good_header[place + 1 :])
        with pytest.raises(snapshot.SnapshotRefused):
            fresh.load(tmp_path)
    header.write_bytes(good_header.replace(b'"format": 1', b'"format": 2'))
    with pytest.raises(snapshot.SnapshotRefused, match="upgrade"):
        fresh.load(tmp_path)
    assert len(fresh) == 0
    header.write_bytes(good_header)
    fresh.load(tmp_path)
    assert digest(fresh) == digest(predictor)


def test_a_crash_inside_save_leaves_the_snapshot_before(predictor, model, tmp_path, monkeypatch):
    predictor.warm_up(make_series("a", 20))
    predictor.save(tmp_path)
    before = digest(predictor)
    predictor.observe([("a", stamp(20), 1.0)])
    replaced = []

    def crash(source, target):
        if replaced:
            raise OSError("the machine stops here")
        replaced.append(target)
        source.rename(target)

    monkeypatch.setattr(artefact.os, "replace", crash)
    with pytest.raises(OSError, match="stops here"):
        predictor.save(tmp_path)
    restored = StatefulPredictor(model, freq="h")
    restored.load(tmp_path)
    assert digest(restored) == before
    monkeypatch.undo()
    (tmp_path / "states-0.safetensors.partial").write_bytes(b"a crash while writing left this")
    predictor.save(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_levels_are_interpolated_in_order_and_flags_say_what_to_trust(predictor):
    predictor.warm_up([make_series("a", 41), make_series("short", 2)])
    own = predictor.forecast(["a"], horizon=8)
    chosen = predictor.forecast(["a"], horizon=8, quantile_levels=(0.1, 0.12, 0.15, 0.5, 0.995))
    np.testing.assert_array_equal(chosen.quantile(0.1), own.quantile(0.1))
    np.testing.assert_array_equal(chosen.quantile(0.15), own.quantile(0.15))
    assert (np.diff(chosen.values, axis=-1) >= 0).all()
    assert (chosen.quantile(0.995) >= own.quantile(0.99)).all()
    assert chosen.flags == (frozenset({"tail"}),)
    assert own.flags == (frozenset(),)
    assert predictor.forecast(["a"], horizon=11).flags == (frozenset(),)  # 3 steps of its own patch, then 8
    assert predictor.forecast(["a"], horizon=12).flags == (frozenset({"rollout"}),)
    assert predictor.forecast(["short"], horizon=8).flags == (frozenset({"cold"}),)
    predictor.observe([("void", START, None)])
    void = predictor.forecast(["void"])
    assert np.isnan(void.values).all()
    assert void.flags == (frozenset({"cold"}),)
    for levels in ((), (0.0,), (0.5, 0.4), (float("nan"),)):
        with pytest.raises(ValueError, match="quantile levels"):
            predictor.forecast(quantile_levels=levels)
    for horizon in (0, -1, True, 10**9):
        with pytest.raises(ValueError, match="horizon"):
            predictor.forecast(horizon=horizon)


def test_step_observes_and_forecasts_what_rows_came_for(predictor):
    predictor.warm_up([make_series("a", 9), make_series("b", 9)])
    forecast = predictor.step({"b": 3.0}, timestamp=stamp(9), horizon=4)
    assert forecast.item_ids == ("b",)
    assert forecast.start[0] == stamp(10)
    assert predictor.last_report.accepted == 1


def test_variates_of_one_step_may_come_apart_and_stream_equals_batch(model):
    histories = [Series(f"s{i}", START, "h", walk(13 + i, i, 3), variates=("x", "y", "z")) for i in range(2)]
    whole = StatefulPredictor(model, freq="h", variates=("x", "y", "z"))
    apart = StatefulPredictor(model, freq="h", variates=("x", "y", "z"))
    whole.warm_up(histories)
    for one in histories:
        for t, (x, y, z) in zip(one.timestamps, one.values.T.tolist(), strict=True):
            assert apart.observe([(one.item_id, t, [x, None, None])]).accepted == 1
            assert apart.observe([(one.item_id, t, [None, y, z])]).accepted == 1
    assert_same_forecasts(whole, apart)
    for name, tensor in whole.state_tensors().items():
        torch.testing.assert_close(apart.state_tensors()[name], tensor, rtol=1e-4, atol=1e-5, equal_nan=True)
    frame = pd.DataFrame({"item_id": "s0", "timestamp": [stamp(13)], "x": [1.0], "y": [np.nan], "z": [2.0]})
    assert whole.observe(frame).accepted == 1
    assert whole.verify(histories, origins=3).ok
    assert whole.forecast(horizon=5).values.shape[:3] == (2, 3, 5)


def test_known_features_of_the_user_stream_like_the_batch_and_may_be_lent_to_one_forecast(tmp_path):
    model = make_model(user_features=2, static=(3,))
    rng = np.random.default_rng(0)
    known = rng.normal(size=(2, 60)).astype(np.float32)
    series = Series("a", START, "h", walk(41), known=known, static=(2,))
    predictor = StatefulPredictor(model, freq="h")
    assert predictor.verify(series).ok
    predictor.warm_up(series.slice(0, 10))
    streamed = StatefulPredictor(model, freq="h")
    streamed.warm_up(series)
    predictor.save(tmp_path)
    restored = StatefulPredictor(model, freq="h")
    restored.load(tmp_path)
    for one in (predictor, restored):
        for t in range(10, 41):
            one.observe({"a": series.values[0, t]}, timestamp=stamp(t))
    assert_same_forecasts(streamed, predictor)
    assert digest(restored) == digest(predictor)
    before, plain = digest(predictor), predictor.forecast(horizon=6).values
    bare = StatefulPredictor(model, freq="h")
    bare.observe(rows_of(make_series("a", 2 * P + 1)))
    blind = bare.forecast(horizon=6).values
    lent = bare.forecast(horizon=6, known={"a": np.ones((2, 30))}).values
    assert not np.array_equal(blind, lent)
    np.testing.assert_array_equal(bare.forecast(horizon=6).values, blind)
    for wrong in (np.ones((3, 30)), np.full((2, 30), np.inf), np.full((2, 30), "x")):
        with pytest.raises(ValueError, match="known features"):
            bare.forecast(known={"a": wrong})
        with pytest.raises(ValueError, match="known features"):
            bare.observe([("a", stamp(2 * P + 1), 1.0)], known={"a": wrong})
    with pytest.raises(ValueError, match="'b': the series is not known"):
        bare.observe([("a", stamp(2 * P + 1), 1.0)], known={"b": np.ones((2, 30))})
    with pytest.raises(KeyError, match="'b' is not known"):
        bare.forecast(known={"b": np.ones((2, 30))})
    assert bare.head("a") == 2 * P + 1
    assert digest(predictor) == before
    np.testing.assert_array_equal(predictor.forecast(horizon=6).values, plain)


def test_known_features_may_come_bit_by_bit(model):
    model = make_model(user_features=2)
    known = np.random.default_rng(0).normal(size=(2, 60)).astype(np.float32)
    series = Series("a", START, "h", walk(30), known=known)
    whole, bits, twice = (StatefulPredictor(model, freq="h") for _ in range(3))
    whole.warm_up(series)
    lent = np.full((2, 1), np.nan, np.float32)
    for t, x in enumerate(series.values[0]):
        lent = known[:, t : t + model.span + 2 * P].copy()
        bits.observe({"a": x}, timestamp=stamp(t), known={"a": lent})
        lent[:] = 0  # the caller's array is the caller's
    assert_same_forecasts(whole, bits, horizon=8)
    twice.warm_up(series.slice(0, 21))
    twice._features.forget(0)
    overlap = series.slice(15)
    twice.warm_up(overlap)  # its first steps are known already, its features are not
    bare = StatefulPredictor(model, freq="h")
    bare.warm_up(replace(series, known=None))
    assert not np.allclose(twice.forecast(horizon=8).values, bare.forecast(horizon=8).values)
    assert_same_forecasts(whole, twice, horizon=8)


def test_ten_thousand_rows_of_one_step_are_one_call_of_the_model(model, monkeypatch):
    predictor = StatefulPredictor(model, freq="h", max_series=300)
    assert predictor.block >= 1024
    blocks = StatefulPredictor(model, freq="h", block=128)
    calls = []
    real = Forecaster.forward

    def counted(self, batch, state=None, *, read=None):
        calls.append(batch.values.shape[0])
        return real(self, batch, state, read=read)

    monkeypatch.setattr(Forecaster, "forward", counted)
    items = [f"s{i}" for i in range(300)]
    for step in range(2 * P):
        predictor.observe(dict.fromkeys(items, float(step)), timestamp=stamp(step))
    assert calls == [300, 300]
    calls.clear()
    for step in range(P):
        blocks.observe(dict.fromkeys(items, float(step)), timestamp=stamp(step))
    assert calls == [128, 128, 44]


@pytest.mark.parametrize(("freq", "start"), [("MS", "2023-11-01"), ("B", "2024-02-27"), ("D", "2024-02-28T06:00")])
def test_calendar_frequencies_keep_their_own_grid(freq, start):
    model = make_model(freq=freq)
    clock, start = Clock(freq), np.datetime64(start, "ns")
    predictor = StatefulPredictor(model, freq=freq)
    stamps = clock.timestamp(start, np.arange(14))
    later = clock.timestamp(start, np.arange(5, 14))
    predictor.observe([("a", t, float(i)) for i, t in enumerate(stamps)])
    predictor.observe([("b", t, float(i)) for i, t in enumerate(later)])
    assert predictor.observe([("a", stamps[-1] + np.timedelta64(1, "h"), 0.0)]).rejected == 1
    forecast = predictor.forecast(horizon=3)
    assert (forecast.start == clock.timestamp(start, 14)).all()
    assert predictor.verify([Series("a", start, freq, walk(30))]).ok


@pytest.mark.parametrize("freq", ["QS", "YS"])
def test_long_steps_do_not_look_beyond_the_years_that_nanoseconds_reach(freq):
    model = make_model(freq=freq, patch_size=1)
    start = np.datetime64("2001-01-01", "ns")
    predictor = StatefulPredictor(model, freq=freq)
    predictor.warm_up(Series("a", start, freq, walk(83)))
    late = StatefulPredictor(model, freq=freq)
    late.observe(
        [("a", t, float(x)) for t, x in zip(Clock(freq).timestamp(start, np.arange(83)), walk(83)[0], strict=True)]
    )
    assert_same_forecasts(predictor, late, horizon=4)


def test_a_folder_says_what_it_forecasts(model, tmp_path):
    artefact.save(model, tmp_path, series={"freq": "h", "calendar": True, "variates": ["target"], "horizon": 5})
    predictor = StatefulPredictor.from_pretrained(tmp_path, device="cpu")
    predictor.observe([("a", START, 1.0)])
    assert predictor.forecast().values.shape[2] == 5
    artefact.save(model, tmp_path, series={})
    with pytest.raises(ValueError, match="give freq="):
        StatefulPredictor.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="calendar"):
        StatefulPredictor(make_model(freq="YS"), freq="h")


def test_rows_further_ahead_of_their_receipt_than_is_believed_are_rejected(model):
    predictor = StatefulPredictor(model, freq="h", max_future_skew=3600)
    rows = rows_of(make_series("a", 10))
    predictor.observe(rows)  # a file: nobody says when it was received
    before = digest(predictor)
    report = predictor.observe([("a", stamp(12), 1.0), ("b", stamp(12), 1.0)], received=str(stamp(10)))
    assert [(bad.code, bad.row) for bad in report.set_aside] == [("ts.future", 0), ("ts.future", 1)]
    assert digest(predictor) == before
    assert "b" not in predictor
    mixed = [("a", stamp(11), 1.0), ("a", "yesterday", 1.0), ("a", stamp(10), 2.0), ("a", stamp(14), 3.0)]
    times = [stamp(10), stamp(10), stamp(9), stamp(12)]
    report = predictor.observe(mixed, received=times)
    assert [(bad.code, bad.row) for bad in report.set_aside] == [("ts.syntax", 1), ("ts.future", 3)]
    assert report.accepted == 2
    assert StatefulPredictor(model, freq="h").observe(mixed[:1], received=START).accepted == 1
    with pytest.raises(ValueError, match="received has 1 times for 2 rows"):
        predictor.observe(rows[:2], received=[START])
    with pytest.raises(ValueError, match="is not ISO 8601"):
        predictor.observe(rows[:2], received="now")
    with pytest.raises(ValueError, match="max_future_skew"):
        StatefulPredictor(model, freq="h", max_future_skew=-1)


@pytest.mark.parametrize(("freq", "start", "tenth"), [("h", START, 360), ("MS", "2024-01-01", 2 * 86_400)])
def test_times_near_the_grid_move_onto_it_if_asked(freq, start, tenth):
    model, clock = make_model(freq=freq), Clock(freq)
    near, exact = StatefulPredictor(model, freq=freq, grid="nearest"), StatefulPredictor(model, freq=freq)
    stamps = clock.timestamp(np.datetime64(start, "ns"), np.arange(3 * P))
    rng = np.random.default_rng(0)
    jitter = rng.integers(-tenth, tenth + 1, size=3 * P)
    jitter[:3] = (0, -tenth, tenth)
    for t, shift in zip(stamps, jitter.tolist(), strict=True):
        value = float(rng.normal())
        exact.observe([("a", t, value)])
        assert near.observe([("a", t + np.timedelta64(shift, "s"), value)]).accepted == 1
    assert digest(near) == digest(exact)
    assert near.observe([("a", stamps[-1] + np.timedelta64(tenth, "s"), value)]).duplicate == 1
    wide = np.timedelta64(4 * tenth, "s")
    assert [bad.code for bad in near.observe([("a", stamps[-1] + wide, 1.0)]).set_aside] == ["ts.grid"]
    assert [bad.code for bad in exact.observe([("a", stamps[-1] + wide // 4, 1.0)]).set_aside] == ["ts.grid"]


@pytest.mark.parametrize("exact", [False, True])
def test_a_value_after_more_silence_than_max_gap_finds_an_empty_memory(exact):
    model, G = make_model(width=16), 6 * P
    far = 10 * P + 8 * P  # after 7 empty patches and a half
    values = walk(far + 5 * P)
    values[:, 10 * P + 2 : far] = np.nan
    rows = rows_of(Series("a", START, "h", values))
    given = [row for row in rows if not np.isnan(row[2])]
    explicit, absent, warm, patient = (
        StatefulPredictor(model, freq="h", max_gap=gap, exact=exact and way != "warm")
        for way, gap in (("explicit", G), ("absent", G), ("warm", G), ("patient", 8 * P))
    )
    explicit.observe(rows)
    for row in given:
        absent.observe([row])
    warm.warm_up(Series("a", START, "h", values))
    patient.observe(rows)
    fresh = StatefulPredictor(model, freq="h", exact=exact)
    fresh.observe([row for row in given if row[1] >= stamp(far)])
    for one in (explicit, absent, warm):
        assert_same_forecasts(fresh, one, horizon=9)
        assert one.head("a") == far + 5 * P
        assert one.state("a").count == 5 * P
    assert not np.allclose(patient.forecast(horizon=9).values, fresh.forecast(horizon=9).values)
    assert explicit.forecast().flags == (frozenset(),)
    for one in (explicit, absent):
        one.rewind("a", stamp(far + 5 * P - 1))  # nothing is gone
    short = StatefulPredictor(model, freq="h", max_gap=G)
    short.observe(given[: 10 * P + 2])
    short.observe([("a", stamp(far + 1), 1.0)])
    assert short.forecast().flags == (frozenset(),), "the patch is open: the memory is what it was"
    short.observe([("a", stamp(far + P), 1.0)])
    assert short.forecast().flags == (frozenset({"cold", "gap_reset"}),)
    assert short.state("a").flags == {"cold", "gap_reset"}
    restored = short.fork()
    assert restored.forecast().flags == short.forecast().flags
    with pytest.raises(ValueError, match="max_gap is 3"):
        StatefulPredictor(model, freq="h", max_gap=3)


def test_several_silences_in_one_history_each_empty_the_memory(model):
    values = walk(60 * P)
    for begin in (5, 20, 41):
        values[:, begin * P + 1 : (begin + 9) * P + 2] = np.nan
    predictor, one_by_one = (StatefulPredictor(model, freq="h", max_gap=5 * P, late_window=2) for _ in range(2))
    predictor.warm_up([Series("a", START, "h", values), make_series("b", 60 * P)])
    for row in rows_of(Series("a", START, "h", values)):
        one_by_one.observe([row])
    fresh = StatefulPredictor(model, freq="h")
    fresh.observe([row for row in rows_of(Series("a", START, "h", values)) if row[1] >= stamp(50 * P)])
    assert_same_forecasts(fresh, predictor, items=["a"])
    assert_same_forecasts(fresh, one_by_one)
    assert predictor.state("a").count == one_by_one.state("a").count == fresh.state("a").count
    plain = StatefulPredictor(model, freq="h")
    plain.warm_up(make_series("b", 60 * P))
    assert_same_forecasts(plain, predictor, items=["b"])


def test_rows_that_wait_are_flagged_and_the_state_and_health_are_told(model):
    predictor = StatefulPredictor(model, freq="h", max_series=9)
    predictor.observe(rows_of(make_series("a", 4 * P + 1)) + rows_of(make_series("b", 3)))
    predictor.observe([("a", stamp(1_000_000), 1.0)])
    assert predictor.forecast(["a", "b"], horizon=2).flags == (frozenset({"held"}), frozenset({"cold"}))
    state = predictor.state("a")
    assert (state.start, state.head, state.applied, state.count) == (START, 4 * P + 1, 4 * P, 4 * P + 1)
    assert state.flags == {"held"}
    state.tensors["readout"].fill_(0)
    assert predictor.state("a").tensors["readout"].any()
    health = predictor.health()
    assert (health.series, health.max_series, health.held, health.values) == (2, 9, 1, 4 * P + 4)
    assert health.last.held == 1
    with pytest.raises(KeyError, match="'zz'"):
        predictor.state("zz")


def test_categories_and_pins_may_be_registered_before_the_first_row(tmp_path):
    model = make_model(static=(3,))
    history = make_series("a", 9, static=(2,))
    oracle = StatefulPredictor(model, freq="h")
    oracle.warm_up(history)
    predictor = StatefulPredictor(model, freq="h", on_unknown="reject")
    predictor.register(["a", "b"], static={"a": (2,)})
    predictor.save(tmp_path)
    restored = StatefulPredictor(model, freq="h", on_unknown="reject")
    restored.load(tmp_path)
    for one in (predictor, restored):
        one.observe(rows_of(history))
        assert_same_forecasts(oracle, one)
    for wrong, text in (({"c": (1, 2)}, "has 2 categories"), ({"a": (1,)}, "is there already")):
        with pytest.raises(ValueError, match=text):
            predictor.register(["c"], static=wrong)
    assert predictor.observe([("c", START, 1.0)]).rejected == 1
    small = StatefulPredictor(model, freq="h", max_series=2, on_full="evict")
    small.register(["x"], pinned=True)
    for t, item in enumerate("xyz"):
        small.observe([(item, stamp(t), 1.0)])
    assert small.item_ids == ("x", "z")
    small.register(["z"], pinned=True)
    assert [bad.code for bad in small.observe([("w", START, 1.0)]).set_aside] == ["series.quota"]
    with pytest.raises(ValueError, match="the others are pinned"):
        small.warm_up(make_series("w", 5))
    small.register(["x"])
    small.observe([("w", START, 1.0)])
    assert small.item_ids == ("z", "w")


def test_one_row_taken_in_by_itself_leaves_what_rows_leave_together(model):
    single, arrays = StatefulPredictor(model, freq="h"), StatefulPredictor(model, freq="h")
    rows = rows_of(make_series("a", 5 * P))
    rows[P] = ("a", stamp(P), 7)
    rows[P + 1] = ("a", str(stamp(P + 1)), -0.0)
    rows[P + 2] = ("a", stamp(P + 2), 1e-320)
    rows[2 * P] = ("a", stamp(2 * P), float("nan"))
    del rows[3 * P]
    for item, when, value in rows:
        one = single.observe([(item, when, value)])
        two = arrays.observe((np.array([item]), np.array([when], "M8[ns]"), np.array([float(value)])))
        assert one == two
        assert single.last_report == two
    assert digest(single) == digest(arrays)
    for row in (("a", stamp(5 * P), True), ("a", stamp(5 * P), 1e101), ("a", np.datetime64("NaT"), 1.0)):
        assert single.observe([row]).rejected == 1
    assert digest(single) == digest(arrays)


@pytest.mark.parametrize("exact", [False, True])
def test_short_runs_of_many_series_leave_what_their_rows_leave_one_by_one(exact):
    model = make_model(width=16)
    together, singly = (StatefulPredictor(model, freq="h", exact=exact, late_window=1) for _ in range(2))
    rng = np.random.default_rng(0)
    heads = np.zeros(20, int)
    for _ in range(5):
        rows = []
        for i in range(20):
            steps = heads[i] + np.cumsum(rng.integers(1, 4, size=rng.integers(1, 5))) - 1
            heads[i] = steps[-1] + 1
            rows += [(f"s{i}", stamp(t), None if rng.random() < 0.1 else float(rng.normal())) for t in steps.tolist()]
        report = together.observe([rows[i] for i in rng.permutation(len(rows))])
        counts = np.zeros(10, int)
        for row in sorted(rows, key=lambda row: row[1]):
            one = singly.observe([row])
            counts += [x if isinstance(x, int) else 0 for x in one[:10]]
        assert [x if isinstance(x, int) else 0 for x in report[:10]] == counts.tolist()
    assert_same_forecasts(together, singly, rtol=0 if exact else 1e-5, items=[f"s{i}" for i in range(20)])
    if exact:
        items = sorted(together.item_ids)
        one, two = (p.state_tensors(items) for p in (together, singly))
        assert all(one[name].numpy().tobytes() == two[name].numpy().tobytes() for name in one)


def test_one_patch_is_compiled_for_the_sizes_that_are_asked_for(model, monkeypatch):
    asked = []
    monkeypatch.setattr(Forecaster, "compile_steps", lambda self, series, *, variates: asked.append((series, variates)))
    StatefulPredictor(model, freq="h")
    StatefulPredictor(model, freq="h", compiled=True, variates=("x", "y"))
    StatefulPredictor(model, freq="h", compiled=(1, 64))
    StatefulPredictor(make_model(width=16), freq="h", compiled=True, exact=True)
    assert asked == [((1,), 2), ((1, 64), 1), ((16,), 1)]
