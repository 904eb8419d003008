"""Scores against a forecast and interval widths that learn from their misses."""

import math
from statistics import NormalDist

import numpy as np
import pytest

from tsgdn.evaluation import metrics
from tsgdn.streaming import conformal, scores
from tsgdn.streaming.conformal import Rules
from tsgdn.streaming.scores import Grid
from tsgdn.types import QUANTILE_LEVELS

NORMAL = NormalDist()
GRID = Grid(QUANTILE_LEVELS)
Z = np.array([NORMAL.inv_cdf(p) for p in QUANTILE_LEVELS])


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(3)


def _score(values: np.ndarray, quantiles: np.ndarray, grid: Grid = GRID, scale: float = 1.0) -> scores.Scores:
    """Scores of values (n,) against one forecast (Q,) or one each (n, Q)."""
    y = np.asarray(values, np.float64)[:, None]
    q = np.broadcast_to(quantiles, (len(y), len(grid.levels)))[:, None].astype(np.float64)
    median = q[..., len(grid.levels) // 2]
    size = np.full_like(y, scale)
    found = scores.score(y, q.copy(), median.copy(), size, grid, ~np.isnan(y))
    return scores.Scores(*(x[:, 0] for x in found))


# ---- scores ---------------------------------------------------------------------------------------------------------


def test_a_normal_forecast_gives_normal_scores_back_within_its_levels():
    y = np.linspace(-2.3, 2.3, 101)
    found = _score(y, Z)
    assert found.z == pytest.approx(y, abs=2e-3)
    assert found.pit == pytest.approx([NORMAL.cdf(x) for x in y], abs=1e-3)
    assert found.log_score == pytest.approx([-math.log(NORMAL.pdf(x)) for x in y], abs=5e-3)


def test_tails_are_exponential_and_go_on_from_the_density_inside():
    y = np.linspace(2.4, 6.0, 30)
    found = _score(np.concatenate([y, -y]), Z)
    reach = 0.01 / NORMAL.pdf(Z[-1])
    tail = 0.01 * np.exp(-(y - Z[-1]) / reach)
    assert found.pit[30:] == pytest.approx(tail, rel=1e-3)
    assert found.log_score[:30] == pytest.approx(-np.log(tail / reach), abs=1e-3)
    assert found.z[:30] == pytest.approx(-found.z[30:], abs=1e-9)
    edges = _score(np.array([Z[-1] - 0.01, Z[-1] + 0.01]), Z)
    assert edges.log_score[0] == pytest.approx(edges.log_score[1], abs=0.06)


def test_values_beyond_all_bounds_have_finite_scores():
    found = _score(np.array([1e9, -1e9, 1e90]), Z)
    assert all(np.isfinite(x).all() for x in found)
    assert np.abs(found.z).max() < 8
    assert found.log_score == pytest.approx(-math.log(scores.DENSITY_FLOOR))


def test_ties_are_halved():
    levels = (0.1, 0.3, 0.5, 0.7, 0.9)
    grid = Grid(levels)
    tied = _score(np.zeros(1), np.array([0.0, 0.0, 0.0, 0.0, 2.0]), grid)
    assert tied.pit[0] == pytest.approx(0.35, abs=1e-4)  # no mass below 0, P(Y <= 0) = 0.7
    inner = _score(np.array([1.0]), np.array([0.0, 1.0, 1.0, 1.0, 3.0]), grid)
    assert inner.pit[0] == pytest.approx(0.5, abs=1e-4)  # (0.3 + 0.7) / 2
    constant = _score(np.array([5.0, 6.0, 4.0]), np.full(5, 5.0), grid)
    assert constant.pit == pytest.approx([0.5, 1.0, 0.0], abs=1e-6)
    assert np.isfinite(constant.log_score).all() and constant.crps[0] == 0


def test_ties_survive_half_precision():
    grid = Grid((0.1, 0.3, 0.5, 0.7, 0.9))
    near = np.array([0.7, 0.7, 0.0, 0.3, 2.0]) * [-1, -1, 0, 1, 1]  # the lowest two at 0, the median at 0.7
    unit = np.abs(near).max()
    kept = 0.7 + unit * (near / unit).astype(np.float16).astype(np.float64)
    found = _score(np.zeros(1), kept, grid)
    assert found.pit[0] == pytest.approx(0.15, abs=1e-3)  # none below, 0.3 at 0


def test_the_crps_is_that_of_the_evaluation(rng: np.random.Generator):
    y = rng.normal(size=40)
    q = np.sort(rng.normal(size=(40, 21)), -1)
    found = _score(y, q)
    for i in range(40):
        want = metrics.crps(target=y[i : i + 1, None], quantiles=q[i : i + 1, None], levels=QUANTILE_LEVELS)
        assert found.crps[i] == pytest.approx(want, rel=1e-12)
    normal = _score(np.array([0.3]), Z).crps[0]  # closed form of the normal distribution
    exact = 0.3 * (2 * NORMAL.cdf(0.3) - 1) + 2 * NORMAL.pdf(0.3) - 1 / math.sqrt(math.pi)
    assert normal == pytest.approx(exact, rel=0.03)


def test_scores_follow_the_unit_of_the_series(rng: np.random.Generator):
    y, q = rng.normal(size=50), np.sort(rng.normal(size=(50, 21)), -1)
    a, b = _score(y, q), _score(7.5 * y + 1e4, 7.5 * q + 1e4, scale=7.5)
    assert b.pit == pytest.approx(a.pit, abs=1e-9)
    assert b.crps == pytest.approx(7.5 * a.crps, rel=1e-9)
    assert b.log_score == pytest.approx(a.log_score + math.log(7.5), abs=1e-6)


def test_pits_of_right_forecasts_are_uniform_and_fill_the_histogram_evenly(rng: np.random.Generator):
    state = scores.empty(2000, 1)
    q = np.broadcast_to(Z, (2000, 1, 21)).copy()
    ones = np.ones((2000, 1))
    for _ in range(10):
        y = rng.normal(size=(2000, 1))
        found = scores.score(y, q, 0 * ones, ones, GRID, ones > 0)
        state = scores.update(state, found, decay=0.998)
    shares = state.histogram.sum((0, 1)) / state.histogram.sum()
    assert np.abs(shares - 0.05).max() < 0.006
    assert (state.count == 10).all()


def test_running_means_are_decayed_means_of_what_was_scored(rng: np.random.Generator):
    state, kept = scores.empty(1, 1), []
    for i in range(60):
        value = math.nan if i % 7 == 3 else float(rng.normal())
        y = np.array([[value]])
        found = scores.score(y, Z[None, None].copy(), np.zeros((1, 1)), np.ones((1, 1)), GRID, ~np.isnan(y))
        before = state
        state = scores.update(state, found, decay=0.9)
        if math.isnan(value):
            assert all(np.array_equal(a, b) for a, b in zip(before, state, strict=True))
        else:
            kept.append((found.log_score[0, 0], found.crps[0, 0], abs(found.error[0, 0])))
    weights = 0.9 ** np.arange(len(kept))[::-1]
    want = (weights[:, None] * np.array(kept)).sum(0) / weights.sum()
    assert scores.means(state)[0, 0] == pytest.approx(want, rel=1e-12)
    assert state.count[0, 0] == len(kept) and state.count.dtype == np.int64
    assert state.histogram.sum() == pytest.approx(weights.sum(), rel=1e-5)


def test_counts_go_past_the_integers_of_float32():
    state = scores.empty(1, 1)._replace(count=np.full((1, 1), 2**24))
    y = np.zeros((1, 1))
    found = scores.score(y, Z[None, None].copy(), y, y + 1, GRID, y == 0)
    assert scores.update(state, found, decay=0.99).count[0, 0] == 2**24 + 1


def test_a_score_does_not_depend_on_its_neighbours(rng: np.random.Generator):
    y, q = 3 * rng.normal(size=37), np.sort(rng.normal(size=(37, 21)), -1)
    whole = _score(y, q)
    for i in range(37):
        for a, b in zip(_score(y[i : i + 1], q[i : i + 1]), whole, strict=True):
            assert a[0] == b[i]


@pytest.mark.parametrize("levels", [(0.5,), (0.5, 0.1), (0.0, 0.5), (0.5, 1.0), (0.1, 0.1)])
def test_bad_levels_are_refused(levels: tuple[float, ...]):
    with pytest.raises(ValueError, match="quantile levels are"):
        Grid(levels)


# ---- widths ---------------------------------------------------------------------------------------------------------

NINETY = NORMAL.inv_cdf(0.95)


def _stream(
    sd: np.ndarray, *, delay: int, rules: Rules, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, conformal.ConformalState]:
    """Coverage per step of the issued intervals and of the raw ones, on normal values; sd (T,)."""
    draws, B = np.random.default_rng(seed), 50
    state = conformal.empty(B, 1, 1, 1)
    edge, start = np.full((B, 1, 1, 1), NINETY), np.zeros((1, 1))
    thetas, issued, raw = [], [], []
    for t, size in enumerate(sd):
        thetas.append(state.theta)
        theta = thetas[max(0, t - delay)]
        y = size * draws.normal(size=(B, 1, 1))
        issued.append(np.mean(np.abs(y) <= np.exp(theta[..., 0]) * NINETY))
        raw.append(np.mean(np.abs(y) <= NINETY))
        state = conformal.update(state, y, edge, edge, theta, np.ones((B, 1, 1), bool), start, rules)
    return np.array(issued), np.array(raw), state


@pytest.mark.parametrize("delay", [0, 24])
def test_widths_keep_their_coverage_when_the_spread_changes(delay: int):
    n = 3000
    rules = Rules(coverages=(0.9,), gamma=0.05, warm=0)
    issued, raw, _ = _stream(np.repeat([1.0, 3.0, 0.5], n), delay=delay, rules=rules)
    assert issued.reshape(3, n).mean(1) == pytest.approx([0.90, 0.893, 0.911], abs=0.008)
    assert raw.reshape(3, n).mean(1) == pytest.approx([0.90, 0.416, 0.999], abs=0.008)
    settled = issued.reshape(3, n)[:, 500:].mean(1)
    assert settled == pytest.approx([0.9, 0.9, 0.9], abs=0.004)


def test_the_mean_error_is_the_way_that_theta_went(rng: np.random.Generator):
    rules = Rules(coverages=(0.5, 0.9), gamma=0.05, warm=0)
    B, T = 20, 2000
    state = conformal.empty(B, 2, 3, 2)
    start = rng.normal(size=(3, 2)) * 0.1
    edge = np.broadcast_to([0.67, 1.64], (B, 2, 3, 2)).copy()
    for _ in range(T):
        y = rng.standard_t(4, size=(B, 2, 3)) * 1.5
        seen = rng.random((B, 2, 3)) < 0.8
        state = conformal.update(state, y, edge, edge, start + state.theta, seen, start, rules)
        assert (start + state.theta > rules.lowest).all() and (start + state.theta < rules.highest).all()
    n = state.scored[..., None]
    way = state.theta / (rules.gamma * n)
    assert np.abs(state.misses / n - (1 - np.array(rules.coverages)) - way).max() < 1e-12


def test_theta_stops_at_its_bounds_and_comes_back():
    rules = Rules(coverages=(0.9,), warm=0, lowest=-1.0, highest=1.0)
    state, edge, seen = conformal.empty(1, 1, 1, 1), np.ones((1, 1, 1, 1)), np.ones((1, 1, 1), bool)
    start = np.full((1, 1), 0.25)
    for _ in range(1000):
        theta = start + state.theta
        state = conformal.update(state, np.zeros((1, 1, 1)), edge, edge, theta, seen, start, rules)
    assert (start + state.theta).item() == pytest.approx(-1.0)
    for _ in range(60):
        theta = start + state.theta
        state = conformal.update(state, np.full((1, 1, 1), 1e9), edge, edge, theta, seen, start, rules)
    assert (start + state.theta).item() == pytest.approx(1.0)


def test_a_series_keeps_the_common_start_for_its_first_scores():
    rules = Rules(coverages=(0.9,), warm=50)
    state, edge, seen = conformal.empty(1, 1, 1, 1), np.ones((1, 1, 1, 1)), np.ones((1, 1, 1), bool)
    start = np.zeros((1, 1))
    for i in range(60):
        assert (state.theta == 0).all() == (i <= 50)
        state = conformal.update(state, np.full((1, 1, 1), 9.0), edge, edge, state.theta, seen, start, rules)
    assert state.misses.item() == 10 and state.scored.item() == 60
    assert state.theta.item() == pytest.approx(10 * 0.05 * 0.9)


def test_what_is_missing_changes_nothing():
    rules = Rules(coverages=(0.9,), warm=0)
    state = conformal.ConformalState(*(np.ones_like(x) for x in conformal.empty(3, 1, 1, 1)))
    edge = np.ones((3, 1, 1, 1))
    y = np.full((3, 1, 1), np.nan)
    after = conformal.update(state, y, edge, edge, state.theta, np.zeros((3, 1, 1), bool), np.zeros((1, 1)), rules)
    for a, b in zip(state, after, strict=True):
        assert np.array_equal(a, b)


def test_live_coverage_shows_the_raw_and_the_calibrated_intervals():
    rules = Rules(coverages=(0.9,), gamma=0.05, warm=0)
    _, _, state = _stream(np.full(2500, 3.0), delay=0, rules=rules)
    raw, calibrated = conformal.coverage(state)
    assert raw.mean() == pytest.approx(0.416, abs=0.02)
    assert calibrated.mean() == pytest.approx(0.9, abs=0.01)
    assert np.isnan(conformal.coverage(conformal.empty(1, 1, 1, 1))[0]).all()


def test_intervals_are_wider_for_a_larger_coverage(rng: np.random.Generator):
    theta = rng.normal(size=(200, 4))
    edges = np.sort(rng.random((200, 4)), -1)
    for side in conformal.shown(theta, edges, edges):
        assert (np.diff(side, axis=-1) >= 0).all()


def test_widened_quantiles_increase_and_hold_the_interval_of_each_coverage(rng: np.random.Generator):
    coverages = (0.5, 0.8, 0.9, 0.98)
    q = np.sort(rng.normal(size=(30, 2, 5, 21)), -1)
    theta, every = 0.8 * rng.normal(size=(30, 2, 5, 4)), np.arange(5)
    wide = conformal.widen(q, QUANTILE_LEVELS, theta, coverages, every)
    assert (np.diff(wide, axis=-1) >= 0).all()
    assert np.array_equal(wide[..., 10], q[..., 10])
    assert conformal.widen(q, QUANTILE_LEVELS, 0 * theta, coverages, every) == pytest.approx(q, abs=1e-14)
    only = conformal.widen(q, QUANTILE_LEVELS, np.full_like(theta, math.log(2)), coverages, every)
    assert only - q[..., 10:11] == pytest.approx(2 * (q - q[..., 10:11]), rel=1e-12)
    steep = np.sort(theta, -1)  # wider for larger coverages anyway: no interval hides another
    below, above = (np.abs(q[..., i] - q[..., 10:11]) for i in ([5, 2, 1, 0], [15, 18, 19, 20]))
    low, high = conformal.shown(steep, below, above)
    got = conformal.widen(q, QUANTILE_LEVELS, steep, coverages, every)
    assert got[..., [15, 18, 19, 20]] == pytest.approx(q[..., 10:11] + high, rel=1e-12)
    assert got[..., [5, 2, 1, 0]] == pytest.approx(q[..., 10:11] - low, rel=1e-12)


def test_widths_are_measured_from_the_median():
    with pytest.raises(ValueError, match=r"expected 0\.5 among them"):
        conformal.widen(np.zeros((1, 1, 1, 2)), (0.1, 0.9), np.zeros((1, 1, 1, 1)), (0.8,), np.zeros(1, np.int64))


def test_the_start_has_the_coverage_of_the_validation_part(rng: np.random.Generator):
    rules = Rules(coverages=(0.5, 0.9))
    n = 4000
    y = rng.normal(size=(2, n)) * np.array([[3.0], [0.4]])
    y[0, :100] = np.nan
    edge = np.broadcast_to([NORMAL.inv_cdf(0.75), NINETY], (2, n, 2)).copy()
    theta = conformal.starting_theta(y, edge, edge, rules)
    assert np.exp(theta) == pytest.approx(np.array([[3.0, 3.0], [0.4, 0.4]]), rel=0.06)
    inside = np.abs(y)[..., None] <= np.exp(theta)[:, None] * edge
    assert inside[0, 100:].mean(0) == pytest.approx([0.5, 0.9], abs=1e-3)
    empty = conformal.starting_theta(y * np.nan, edge, edge, rules)
    assert (empty == 0).all()


@pytest.mark.parametrize(
    "rules",
    [
        Rules(coverages=()),
        Rules(coverages=(0.9, 0.5)),
        Rules(coverages=(0.5, 1.0)),
        Rules(gamma=0.0),
        Rules(decay=1.0),
        Rules(warm=-1),
        Rules(lowest=0.5),
    ],
)
def test_bad_rules_are_refused(rules: Rules):
    with pytest.raises(ValueError, match="expected"):
        conformal.check_rules(rules)
