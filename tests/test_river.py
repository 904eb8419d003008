"""The adapter for river: the numbers of the stateful predictor, river's own checks, and its evaluation."""

import copy
import pickle
from datetime import UTC, date, datetime

import numpy as np
import pytest
import torch

from tsgdn.data.clock import Clock
from tsgdn.model import artefact
from tsgdn.model.forecaster import Forecaster
from tsgdn.streaming.predictor import StatefulPredictor

river = pytest.importorskip("river", reason="needs river: pip install 'tsgdn[river]'")

from tsgdn.adapters.river import GDNForecaster  # noqa: E402

START = np.datetime64("2024-02-27T05:00", "ns")


def small_model(user_features=0, freq="h", calendar=True) -> Forecaster:
    """Random weights; laws hold for any."""
    torch.manual_seed(3)
    known = user_features + (Clock(freq).calendar_size if calendar else 0)
    sizes = {"patch_size": 4, "patches_ahead": 2, "seasons": (1, 24), "width": 8, "depth": 1}
    model = Forecaster(known_features=known, **sizes).eval()
    with torch.no_grad():  # the head starts at zero: make every part count
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def walk(steps):
    return (np.random.default_rng(0).normal(size=steps).cumsum() + 10).tolist()


def stamp(step):
    return START + np.timedelta64(step, "h")


@pytest.mark.parametrize("horizon", [1, 7, 30])
def test_forecasts_are_those_of_the_stateful_predictor_at_every_step(horizon):
    model, values = small_model(), walk(23)
    values[5], values[11] = float("nan"), None
    ours = GDNForecaster(model, start=START, freq="h")
    plain = StatefulPredictor(model, freq="h")
    for step, value in enumerate(values):
        ours.learn_one(value)
        plain.observe([("y", stamp(step), value)])
        if horizon > 8 and step % 5:
            continue
        want = plain.forecast(horizon=horizon)
        assert ours.forecast(horizon) == want.median[0, 0].tolist()
    assert horizon < model.direct_steps or "rollout" in want.flags[0]
    levels = (0.02, 0.3, 0.5, 0.995)
    quantiles = ours.forecast_quantiles(horizon, levels)
    want = plain.forecast(horizon=horizon, quantile_levels=levels).values[0, 0]
    assert [list(one) for one in quantiles] == [list(levels)] * horizon
    np.testing.assert_array_equal([list(one.values()) for one in quantiles], want)


def test_a_model_folder_says_its_frequency(tmp_path):
    model = small_model()
    artefact.save(model, tmp_path, series={"freq": "h", "calendar": True})
    ours, other = GDNForecaster(str(tmp_path), start="2024-02-27 05:00"), GDNForecaster(model, start=START, freq="h")
    for value in walk(9):
        ours.learn_one(value)
        other.learn_one(value)
    assert ours.forecast(20) == other.forecast(20)


def test_steps_may_be_left_out_where_x_tells_times():
    model, values = small_model(), walk(40)
    ours = GDNForecaster(model, time="at", freq="h")
    plain = StatefulPredictor(model, freq="h")
    for step in (0, 1, 2, 9, 10, 300, 301):
        value = values[step % 40]
        ours.learn_one(value, {"at": stamp(step).astype("M8[s]").item()})
        plain.observe([("y", stamp(step), value)])
    assert ours.forecast(20) == plain.forecast(horizon=20).median[0, 0].tolist()
    assert ours.predictor.head("y") == 302
    ours.learn_one(values[301 % 40], {"at": stamp(301)})  # told twice, counts once
    assert ours.predictor.head("y") == 302


def test_times_with_an_offset_and_dates_are_read():
    model = small_model(freq="D")
    days = GDNForecaster(model, time="day", freq="D")
    offset = GDNForecaster(model, time="day", freq="D")
    for day in range(1, 10):
        days.learn_one(float(day), {"day": date(2024, 3, day)})
        offset.learn_one(float(day), {"day": datetime(2024, 3, day, tzinfo=UTC)})
    assert days.forecast(5) == offset.forecast(5)


def test_known_features_have_an_order_and_dicts_are_left_as_they_are():
    model, values = small_model(user_features=2), walk(22)
    features = np.random.default_rng(1).normal(size=(2, 60)).astype(np.float32)
    ours = GDNForecaster(model, start=START, freq="h", features=["wind", "sun"])
    plain = StatefulPredictor(model, freq="h")
    for step, value in enumerate(values):
        x = {"sun": features[1, step], "other": "text", "wind": features[0, step]}
        kept = copy.deepcopy(x)
        ours.learn_one(value, x)
        assert x == kept
        assert list(x) == list(kept)
        plain.observe([("y", stamp(step), value)], known={"y": features[:, step : step + 1]})
    xs = [{"sun": features[1, 22 + k], "wind": features[0, 22 + k]} for k in range(30)]
    kept = copy.deepcopy(xs)
    want = plain.forecast(horizon=30, known={"y": features[:, 22:52]}).median[0, 0]
    assert ours.forecast(30, xs) == want.tolist()
    assert xs == kept
    assert ours.forecast(30) == plain.forecast(horizon=30).median[0, 0].tolist() != want.tolist()
    xs[3] = {"wind": None}
    features[:, 25] = np.nan
    want = plain.forecast(horizon=30, known={"y": features[:, 22:52]}).median[0, 0]
    assert ours.forecast(30, xs) == want.tolist()


def test_a_forecast_changes_nothing_and_before_the_first_value_it_is_missing():
    ours = GDNForecaster(small_model(), start=START, freq="h")
    assert np.isnan(ours.forecast(3)).all()
    ours.learn_one(None)
    assert np.isnan(ours.forecast(3)).all()
    for value in walk(6):
        ours.learn_one(value)
    first = ours.forecast(12)
    ours.forecast(40)
    assert ours.forecast(12) == first


def test_clones_start_anew_and_copies_go_on_alone():
    ours = GDNForecaster(small_model(), start=START, freq="h")
    values = walk(20)
    for value in values[:13]:
        ours.learn_one(value)
    fresh = ours.clone()
    assert len(fresh.predictor) == 0
    twins = [copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), ours.clone(include_attributes=True)]
    before = ours.forecast(20)
    assert twins[0].predictor.model is ours.predictor.model
    for twin in twins:
        assert twin.forecast(20) == before
        for value in values[13:]:
            twin.learn_one(value)
    assert ours.forecast(20) == before
    for value in values[13:]:
        ours.learn_one(value)
    assert [twin.forecast(20) for twin in twins] == [ours.forecast(20)] * 3


def river_checks():
    from river import checks

    model = GDNForecaster(**next(GDNForecaster._unit_test_params()))
    return [pytest.param(check, model, id=check.__name__) for check in checks.yield_checks(model)]


@pytest.mark.parametrize(("check", "model"), river_checks())
def test_river_finds_nothing_wrong(check, model):
    check(model.clone())


class Oracle(river.time_series.base.Forecaster):
    """Forecasts a ramp without error."""

    def __init__(self):
        self.last = 0

    def learn_one(self, y, x=None):
        self.last = y

    def forecast(self, horizon, xs=None):
        return [self.last + 1 + k for k in range(horizon)]


def test_the_evaluation_of_river_is_one_step_off_and_right_where_times_are_told():
    """The first three lines of the loop in river 0.26: forecast, compare with what follows y, learn y."""
    from river import evaluate, metrics

    ramp = [({"at": stamp(k)}, float(k)) for k in range(1, 31)]
    off = evaluate.evaluate(ramp, Oracle(), metrics.MAE(), horizon=3)
    assert off.get() == [1.0, 1.0, 1.0], "river compares as it should now: mend the text of GDNForecaster"

    data = [({"at": stamp(k)}, y) for k, y in enumerate(walk(40))]
    model = small_model()
    started = evaluate.evaluate(data, GDNForecaster(model, start=START, freq="h"), metrics.MAE(), horizon=3)
    timed = evaluate.evaluate(data, GDNForecaster(model, time="at", freq="h"), metrics.MAE(), horizon=3)
    plain = StatefulPredictor(model, freq="h")
    errors, errors_in_time = [], []
    for k, (_, y) in enumerate(data[:-3]):
        if k >= 3:
            ahead = plain.forecast(horizon=4).median[0, 0]
            truth = np.array([value for _, value in data[k + 1 : k + 4]])
            errors.append(np.abs(ahead[:3] - truth))
            errors_in_time.append(np.abs(ahead[1:] - truth))
        plain.observe([("y", stamp(k), y)])
    np.testing.assert_allclose(started.get(), np.mean(errors, 0), rtol=1e-12)
    np.testing.assert_allclose(timed.get(), np.mean(errors_in_time, 0), rtol=1e-12)


def test_wrong_values_are_refused_in_one_line_and_nothing_is_learnt():
    ours = GDNForecaster(small_model(), start=START, freq="h")
    ours.learn_one(1.0)
    for wrong, text in ((float("inf"), "inf"), ("many", "y is 'many', expected a number"), ([1], r"y is \[1\]")):
        with pytest.raises(ValueError, match=text) as raised:
            ours.learn_one(wrong)
        assert "\n" not in str(raised.value)
    assert ours.predictor.head("y") == 1
    with pytest.raises(ValueError, match="horizon is 0"):
        ours.forecast(0)
    assert len(ours.forecast(np.int64(2))) == 2
    with pytest.raises(ValueError, match="xs holds 1 dicts, expected 2"):
        ours.forecast(2, [{}])
    with pytest.raises(ValueError, match="quantile levels"):
        ours.forecast_quantiles(2, (0.9, 0.1))


def test_wrong_times_are_refused():
    ours = GDNForecaster(small_model(), time="at", freq="h")
    for x in (None, {}, {"at": None}):
        with pytest.raises(ValueError, match="x has no 'at'"):
            ours.learn_one(1.0, x)
    for wrong in ("soon", 5, float("nan")):
        with pytest.raises(ValueError, match="expected a timestamp"):
            ours.learn_one(1.0, {"at": wrong})
    assert len(ours.predictor) == 0
    for step in range(20):
        ours.learn_one(float(step), {"at": stamp(step)})
    with pytest.raises(ValueError, match="not on the grid"):
        ours.learn_one(1.0, {"at": stamp(20) + np.timedelta64(1, "m")})
    with pytest.raises(ValueError, match=r"ts\.late"):
        ours.learn_one(1.0, {"at": stamp(1)})
    with pytest.raises(ValueError, match="not after what has been learnt"):
        ours.forecast(2, [{"at": stamp(19)}, {"at": stamp(20)}])
    assert ours.forecast(2, [{"at": stamp(21)}, {"at": stamp(23)}]) == np.take(ours.forecast(4), [1, 3]).tolist()


def test_wrong_arguments_are_refused(tmp_path):
    model = small_model(user_features=1)
    with pytest.raises(ValueError, match="either start="):
        GDNForecaster(model, freq="h")
    with pytest.raises(ValueError, match="takes 1 known features besides the calendar"):
        GDNForecaster(model, START, freq="h")
    with pytest.raises(ValueError, match=r"expected a list of names: \['w'\]"):
        GDNForecaster(model, START, freq="h", features="w")
    with pytest.raises(ValueError, match="give freq="):
        GDNForecaster(model, START, features=["w"])
    with pytest.raises(ValueError, match="cannot start at"):
        GDNForecaster(small_model(freq="MS"), "2024-01-02", freq="MS")
    with pytest.raises(ValueError, match="feature 'w' is 'x'"):
        GDNForecaster(model, START, freq="h", features=["w"]).learn_one(1.0, {"w": "x"})
    artefact.save(small_model(), tmp_path, series={"freq": "h", "calendar": True, "variates": ["a", "b"]})
    with pytest.raises(ValueError, match="a forecaster of river has one"):
        GDNForecaster(tmp_path, START)
