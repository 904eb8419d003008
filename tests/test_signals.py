"""Anomalies, drifts and surprise: false alarms at the stated rate, delays as promised."""

import numpy as np
import pytest

from tsgdn.streaming import signals
from tsgdn.streaming.signals import Signals, SignalState, Thresholds


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(5)


def _heard(z: np.ndarray, thresholds: Thresholds | None = None) -> tuple[SignalState, list[Signals]]:
    """Streams of z (B, T) through `update`."""
    state, out = signals.empty(len(z), 1), []
    for step in range(z.shape[1]):
        steps = np.full(len(z), step)
        state, heard = signals.update(state, steps, z[:, step : step + 1], thresholds or Thresholds())
        out.append(heard)
    return state, out


def _alarms(z: np.ndarray, kind: str, thresholds: Thresholds | None = None) -> np.ndarray:
    return np.stack([heard.alarm[:, 0, signals.KINDS.index(kind)] for heard in _heard(z, thresholds)[1]], 1)


def test_false_alarms_are_as_rare_as_stated(rng: np.random.Generator):
    z = rng.normal(size=(1000, 1500))
    state, _ = _heard(z)
    every = z.size / state.alarms.sum((0, 1))
    assert every[0] == pytest.approx(10_000, rel=0.25)
    assert every[1] == pytest.approx(10_000, rel=0.25)
    assert every[2] == pytest.approx(45_000, rel=0.5)


@pytest.mark.parametrize(
    ("kind", "change", "delay"),
    [(0, {"shift": 1.0}, 17), (0, {"shift": -1.0}, 17), (1, {"spread": 2.0}, 16), (1, {"spread": 0.5}, 366)],
)
def test_drifts_are_found_after_the_stated_delay(kind: int, change: dict[str, float], delay: int):
    first = signals.simulate(Thresholds(), **change, streams=600, steps=1200)
    assert first[:, kind].mean() == pytest.approx(delay, rel=0.1)


def test_a_drift_names_its_direction_and_when_it_began(rng: np.random.Generator):
    z = rng.normal(size=(200, 120))
    z[:, 60:] += 1.5
    first = np.full(200, -1)
    for step, heard in enumerate(_heard(z)[1]):
        new = heard.alarm[:, 0, 1] & (first < 0) & (step >= 60)
        first = np.where(new, heard.since[:, 0, 1], first)
        assert (heard.score[new, 0, 1] >= 8).all()
    assert (first >= 0).mean() > 0.99
    assert np.median(np.abs(first - 60)) <= 3
    down = [heard for heard in _heard(-z)[1] if heard.alarm[:, 0, 1].any()]
    assert all((heard.score[heard.alarm[:, 0, 1], 0, 1] <= -8).any() for heard in down)


def test_the_sums_are_those_of_page(rng: np.random.Generator):
    z = rng.normal(size=400) * 1.3 + 0.2
    up = down = wide = narrow = 0.0
    for x, heard in zip(z, _heard(z[None])[1], strict=True):
        level = min(max(x, -4.0), 4.0)
        spread = min((x * x - 1) / np.sqrt(2), 4.0)
        up, down = max(0.0, up + level - 0.5), max(0.0, down - level - 0.5)
        wide, narrow = max(0.0, wide + spread - 0.5), max(0.0, narrow - spread - 0.5)
        assert heard.score[0, 0, 1] == pytest.approx(up if up >= down else -down, abs=1e-12)
        assert heard.score[0, 0, 2] == pytest.approx(wide if wide >= narrow else -narrow, abs=1e-12)
        assert heard.alarm[0, 0].tolist() == [abs(x) >= 3.89, max(up, down) >= 8, max(wide, narrow) >= 12]
        if heard.alarm[0, 0, 1]:
            up = down = 0.0
        if heard.alarm[0, 0, 2]:
            wide = narrow = 0.0


def test_one_wild_value_is_an_anomaly_and_no_drift():
    z = np.zeros((1, 50))
    z[0, 20] = 7.9
    _, heard = _heard(z)
    assert [int(h.alarm[0, 0, 0]) for h in heard] == [int(i == 20) for i in range(50)]
    assert heard[20].since[0, 0, 0] == 20
    assert not any(h.alarm[0, 0, 1:].any() for h in heard)


def test_missing_values_change_nothing(rng: np.random.Generator):
    z = rng.normal(size=(3, 30))
    state, _ = _heard(z)
    after, heard = signals.update(state, np.full(3, 30), np.full((3, 1), np.nan), Thresholds())
    for a, b in zip(state, after, strict=True):
        assert np.array_equal(a, b)
    assert np.isnan(heard.score).all() and not heard.alarm.any() and (heard.since == -1).all()


def test_events_are_the_alarms_alone(rng: np.random.Generator):
    z = rng.normal(size=(40, 2)) * 3
    _, heard = signals.update(signals.empty(40, 2), np.arange(40), z, Thresholds())
    found = signals.events(heard)
    assert len(found.row) == heard.alarm.sum() > 0
    for row, variate, kind, score, since in zip(*found, strict=True):
        assert kind == 0 and abs(z[row, variate]) >= 3.89 and score == z[row, variate] and since == row


def test_thresholds_are_those_of_the_stated_rate(rng: np.random.Generator):
    found = signals.fit_thresholds(rng.normal(size=(300, 1000)), arl=10_000)
    assert found.anomaly == pytest.approx(signals.normal_anomaly(10_000), abs=0.15)
    assert found.level == pytest.approx(8.0, abs=0.5)
    again = rng.normal(size=(400, 1000))
    for kind in ("level", "spread"):
        assert again.size / _alarms(again, kind, found).sum() == pytest.approx(10_000, rel=0.5)


def test_dependent_scores_get_higher_thresholds(rng: np.random.Generator):
    shared = np.repeat(rng.normal(size=(200, 150)), 8, 1) * np.sqrt(0.5) + rng.normal(size=(200, 1200)) * np.sqrt(0.5)
    found = signals.fit_thresholds(shared, arl=5000)
    assert found.level > 12
    fresh = np.repeat(rng.normal(size=(200, 150)), 8, 1) * np.sqrt(0.5) + rng.normal(size=(200, 1200)) * np.sqrt(0.5)
    assert fresh.size / _alarms(fresh, "level", found).sum() == pytest.approx(5000, rel=0.5)
    assert fresh.size / max(1, _alarms(fresh, "level").sum()) < 500


def test_a_short_stretch_is_extended(rng: np.random.Generator):
    found = signals.fit_thresholds(rng.normal(size=(10, 2000)), arl=50_000)
    assert found.level == pytest.approx(9.7, abs=1.2)
    assert found.anomaly == pytest.approx(signals.normal_anomaly(50_000), abs=0.5)


def test_missing_scores_do_not_count_in_the_rate(rng: np.random.Generator):
    z = rng.normal(size=(100, 600))
    holed = np.full((100, 1200), np.nan)
    holed[:, ::2] = z
    assert signals.fit_thresholds(holed, arl=2000) == signals.fit_thresholds(z, arl=2000)


def test_rates_that_cannot_be_measured_are_refused(rng: np.random.Generator):
    with pytest.raises(ValueError, match="at least 1000"):
        signals.fit_thresholds(rng.normal(size=(1, 999)))
    with pytest.raises(ValueError, match="at least 10 values"):
        signals.fit_thresholds(rng.normal(size=(1, 1000)), arl=1)
    with pytest.raises(ValueError, match="too few to extend"):
        signals.fit_thresholds(np.zeros((1, 1000)))
    with pytest.raises(ValueError, match="expected a positive number"):
        signals.check_thresholds(Thresholds(level=0.0))


# ---- surprise -------------------------------------------------------------------------------------------------------


def test_surprise_is_the_fast_mean_over_the_slow_one(rng: np.random.Generator):
    x = rng.random(500) + 0.1
    x[300:] *= 6
    thresholds = Thresholds(surprise=2.5, warm=50)
    state = signals.empty(1, 1)
    speaks, began = [], []
    for t, value in enumerate(x):
        state, ratio, high = signals.surprise(state, np.array([t]), np.array([[value]]), thresholds)
        means = []
        for rate in (signals.FAST, signals.SLOW):
            weights = (1 - rate) ** np.arange(t + 1)[::-1]
            means.append((weights * x[: t + 1]).sum() / weights.sum())
        assert ratio.item() == pytest.approx(means[0] / means[1], rel=1e-9)
        if high.item():
            began.append(began[-1] if speaks and speaks[-1] == t - 1 else t)
            speaks.append(t)
        assert state.surprised.item() == (began[-1] + 1 if high.item() else 0)
    assert speaks and 300 <= speaks[0] <= 315
    assert len(set(began)) < len(began) and speaks[-1] < 499


def test_a_residual_that_is_missing_or_broken_changes_nothing():
    state = signals.empty(2, 1)
    state, _, _ = signals.surprise(state, np.zeros(2, np.int64), np.ones((2, 1)), Thresholds())
    broken = np.array([[np.nan], [np.inf]])
    after, ratio, high = signals.surprise(state, np.ones(2, np.int64), broken, Thresholds())
    for a, b in zip(state, after, strict=True):
        assert np.array_equal(a, b)
    assert np.isnan(ratio).all() and not high.any()


def test_the_threshold_of_surprise_is_exceeded_at_the_stated_rate(rng: np.random.Generator):
    ratios = np.exp(0.3 * rng.normal(size=100_000))
    found = signals.fit_surprise(ratios, arl=1000)
    assert (ratios > found).mean() == pytest.approx(1e-3, rel=0.05)
    with pytest.raises(ValueError, match="at least arl"):
        signals.fit_surprise(ratios[:10])


# ---- against river --------------------------------------------------------------------------------------------------


def test_drifts_are_found_where_adwin_finds_them(rng: np.random.Generator):
    drift = pytest.importorskip("river.drift", reason="river is not installed")
    z = rng.normal(size=(20, 2000))
    z[:, 1000:] += 1.0
    ours = _alarms(z, "level")
    ours_first = np.array([1000 + np.flatnonzero(row[1000:])[0] for row in ours])
    theirs = []
    for row in z:
        adwin = drift.ADWIN()
        for t, value in enumerate(row):
            adwin.update(float(value))
            if adwin.drift_detected and t >= 1000:
                theirs.append(t)
                break
    assert len(theirs) == len(z)
    assert ours_first.mean() <= np.mean(theirs)
