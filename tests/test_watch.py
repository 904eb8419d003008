"""The whole watch against a plain one, and the promises of a pool: rows, neighbours, growth, the order of time."""

import math
from itertools import pairwise
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch

from tsgdn.model.forecaster import Forecaster
from tsgdn.streaming import signals
from tsgdn.streaming.adapt import Learning
from tsgdn.streaming.conformal import Rules
from tsgdn.streaming.scores import DENSITY_FLOOR, HALF, TAIL_FLOOR, WIDTH_FLOOR
from tsgdn.streaming.signals import Thresholds
from tsgdn.streaming.watch import Ranges, Watch
from tsgdn.types import Batch

NORMAL = NormalDist()
LEVELS = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)
COVERAGES = (0.5, 0.8, 0.98)
PAIRS = [(3, 5), (2, 6), (0, 8)]
V, P, K = 2, 3, 4
LAST = (0, 1, 3)  # of each range of leads, patches between issue and target
RULES = Rules(coverages=COVERAGES, gamma=0.05, warm=5, decay=0.97)
LEARNING = Learning(features=1, forget=0.99, prior=3.0)
THRESHOLDS = Thresholds(anomaly=2.0, level=3.0, spread=3.0)
START = np.array([[0.1, 0.0, -0.1], [0.9, -0.9, 0.2], [0.0, 0.1, 0.3]])  # the second hides one interval by another


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(11)


class Plain:
    """One series, one variate: the same rules in scalars and dictionaries, keeping everything for ever."""

    def __init__(self) -> None:
        self.issued: dict[tuple[int, int], dict[str, Any]] = {}  # (range, patch)
        self.scored: set[int] = set()
        self.current = -1
        self.last: tuple[int, float] | None = None
        self.theta = {(n, c): 0.0 for n in range(3) for c in range(3)}
        self.scores_of_range = [0, 0, 0]
        self.hits: list[list[tuple[list[bool], list[bool]]]] = [[], [], []]
        self.sums = [0.0] * 4
        self.began = [0] * 4
        self.kept: list[tuple[float, float, float]] = []
        self.pits: list[float] = []
        self.errors: list[list[tuple[float, float, float]]] = [[], [], []]
        self.residuals: list[list[tuple[np.ndarray, float]]] = [[], [], []]
        self.consumed = [0, 0, 0]

    def weights(self, n: int) -> np.ndarray:
        """By least squares over all that was consumed."""
        used = self.residuals[n][: self.consumed[n]]
        gram, moment = LEARNING.prior * np.eye(2), np.zeros(2)
        for age, (x, e) in enumerate(reversed(used)):
            gram = gram + LEARNING.forget**age * np.outer(x, x)
            moment = moment + LEARNING.forget**age * x * min(max(e, -LEARNING.limit), LEARNING.limit)
        return np.linalg.solve(gram, moment)

    def adapt(self) -> None:
        self.consumed = [len(known) for known in self.residuals]

    def issue(self, origin: int, quantiles: np.ndarray, scale: float, feature: float) -> None:
        patch = origin // P
        self.current = max(self.current, patch)
        for n, ahead in enumerate(LAST):
            x = np.array([1.0, feature])
            shift = float(self.weights(n) @ x)
            raw = quantiles[ahead * P : (ahead + 1) * P]
            self.issued[n, patch + ahead] = {
                "quantiles": raw + shift * scale, "scale": scale, "shift": shift, "x": x,
                "last": None if self.last is None else self.last[1],
                "theta": [START[n, c] + self.theta[n, c] for c in range(3)],
                "good": bool(np.isfinite(quantiles).all()),
            }  # fmt: skip

    def observe(self, step: int, value: float) -> tuple[float, ...] | None:
        """PIT, z, log score, CRPS and error of a value that counts and was forecast."""
        if math.isnan(value) or step in self.scored or step // P < self.current:
            self.current = max(self.current, step // P)
            return None
        self.current = step // P
        self.scored.add(step)
        found = None
        for n in range(3):
            told = self.issued.get((n, step // P))
            if told is None or not told["good"]:
                continue
            q = told["quantiles"][step % P]
            d = value - q[4]
            raw, issued = [], []
            low = high = 0.0
            for c, (i, j) in enumerate(PAIRS):
                stretch = math.exp(told["theta"][c])
                low, high = max(low, stretch * (q[4] - q[i])), max(high, stretch * (q[j] - q[4]))
                raw.append(-(q[4] - q[i]) * (1 + HALF) <= d <= (q[j] - q[4]) * (1 + HALF))
                issued.append(-low * (1 + HALF) <= d <= high * (1 + HALF))
                if self.scores_of_range[n] >= RULES.warm:
                    self.theta[n, c] += RULES.gamma * ((not issued[-1]) - (1 - COVERAGES[c]))
            self.scores_of_range[n] += 1
            self.hits[n].append((raw, issued))
            e = d / told["scale"]
            self.residuals[n].append((told["x"], e + told["shift"]))
            if told["last"] is not None:
                self.errors[n].append((abs(e + told["shift"]), abs(e), abs(value - told["last"]) / told["scale"]))
            if n == 0:
                found = self.score(value, q, told["scale"])
        if self.last is None or step >= self.last[0]:
            self.last = step, value
        return found

    def score(self, y: float, q: np.ndarray, scale: float) -> tuple[float, ...]:
        window = HALF * abs(y - q[4]) + WIDTH_FLOOR * scale
        (a, a_rest), (b, b_rest) = self.distribution(y - window, q), self.distribution(y + window, q)
        pit, rest = (a + b) / 2, (a_rest + b_rest) / 2
        z = NORMAL.inv_cdf(max(pit, TAIL_FLOOR)) if pit < 0.5 else -NORMAL.inv_cdf(max(rest, TAIL_FLOOR))
        mass = b - a if pit < 0.5 else a_rest - b_rest
        log_score = math.log(scale) - math.log(max(mass / (2 * window / scale), DENSITY_FLOOR))
        edges = [0.0, *((p + r) / 2 for p, r in pairwise(LEVELS)), 1.0]
        crps = sum(
            2 * (edges[i + 1] - edges[i]) * max(p * (y - q[i]), (p - 1) * (y - q[i])) for i, p in enumerate(LEVELS)
        )
        self.kept.append((log_score, crps, abs(y - q[4])))
        self.pits.append(pit)
        return pit, z, log_score, crps, y - q[4]

    def distribution(self, y: float, q: np.ndarray) -> tuple[float, float]:
        z = [NORMAL.inv_cdf(p) for p in LEVELS]
        if y < q[0]:
            reach = LEVELS[0] * (q[1] - q[0]) / (NORMAL.pdf(z[0]) * (z[1] - z[0]))
            p = LEVELS[0] * math.exp(-(q[0] - y) / reach)
            return p, 1 - p
        if y >= q[-1]:
            reach = LEVELS[0] * (q[-1] - q[-2]) / (NORMAL.pdf(z[-1]) * (z[-1] - z[-2]))
            rest = LEVELS[0] * math.exp(-(y - q[-1]) / reach)
            return 1 - rest, rest
        i = max(k for k in range(len(q) - 1) if q[k] <= y)
        x = z[i] + (y - q[i]) / (q[i + 1] - q[i]) * (z[i + 1] - z[i])
        return NORMAL.cdf(x), NORMAL.cdf(-x)

    def hear(self, step: int, z: float) -> list[tuple[int, int]]:
        """Kinds that speak, each with the step since when."""
        spread = min((z * z - 1) / math.sqrt(2), 4.0)
        level = min(max(z, -4.0), 4.0)
        for i, x in enumerate((level, -level, spread, -spread)):
            if self.sums[i] == 0:
                self.began[i] = step
            self.sums[i] = max(0.0, self.sums[i] + x - 0.5)
        heard = [(0, step)] if abs(z) >= THRESHOLDS.anomaly else []
        for kind, (i, height) in enumerate(((0, THRESHOLDS.level), (2, THRESHOLDS.spread))):
            j = i + 1 if self.sums[i + 1] > self.sums[i] else i
            if self.sums[j] >= height:
                heard.append((kind + 1, self.began[j]))
                self.sums[i] = self.sums[i + 1] = 0.0
        return heard


def _decayed(rows: list[Any]) -> np.ndarray:
    weights = RULES.decay ** np.arange(len(rows))[::-1]
    return np.tensordot(weights, np.array(rows, float), 1) / weights.sum()


def _watch(slots: int, **options: Any) -> Watch:
    given = {"rules": RULES, "start": START, "thresholds": THRESHOLDS, "learning": LEARNING}
    watch = Watch(variates=V, patch_size=P, ahead=K, levels=LEVELS, **{**given, **options})
    watch.grow(slots)
    return watch


def _forecast(rng: np.random.Generator, count: int) -> np.ndarray:
    """Random quantiles that half precision holds exactly: eighths of their widest distance."""
    steps = rng.integers(1, 5, size=(count, V, K * P, len(LEVELS) - 1)) / 4
    q = np.concatenate([np.zeros((count, V, K * P, 1)), steps.cumsum(-1)], -1)
    widest = 16.0
    q[..., 0], q[..., -1] = q[..., 4] - widest, q[..., 4] + widest
    return q - q[..., 4:5] + rng.integers(-8, 8, size=(count, V, K * P, 1)) / 4


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_random_interleavings_give_what_plain_bookkeeping_gives(seed: int):
    rng = np.random.default_rng(seed)
    slots = 4
    watch = _watch(2)
    watch.grow(slots)
    plain = [[Plain() for _ in range(V)] for _ in range(slots)]
    head = np.zeros(slots, np.int64)  # the patch that is open
    alarms = worth = 0
    for _ in range(300):
        choice = rng.random()
        some = np.flatnonzero(rng.random(slots) < 0.7)
        if choice < 0.7 and len(some):
            # cells of the open patch in any order, now and then again, late, or of the next patch
            rows = rng.permutation(np.repeat(some, rng.integers(1, 4)))
            ahead = rng.choice([-1, 0, 0, 0, 0, 0, 1], size=len(rows), p=[0.05, *[0.18] * 5, 0.05])
            steps = np.maximum(0, (head[rows] + ahead) * P + rng.integers(0, P, len(rows)))
            values = rng.normal(size=(len(rows), V)) * rng.choice([1.0, 6.0])
            values[rng.random(values.shape) < 0.15] = np.nan
            got = watch.observe(rows, steps, values)
            spoken = [x.tolist() for x in signals.events(got.signals)]
            heard = {(row, v, kind): since for row, v, kind, _, since in zip(*spoken, strict=True)}
            for i, (slot, step) in enumerate(zip(rows.tolist(), steps.tolist(), strict=True)):
                for v in range(V):
                    # the clock is the series': a value of any variate overtakes the patches before
                    plain[slot][v].current = max(one.current for one in plain[slot])
                for v in range(V):
                    want = plain[slot][v].observe(step, float(values[i, v]))
                    found = [float(x[i, v]) for x in got.scores]
                    if want is None:
                        assert all(math.isnan(x) for x in found)
                        continue
                    assert found == pytest.approx(list(want), rel=1e-6, abs=1e-6)
                    worth += 1
                    for kind, since in plain[slot][v].hear(step, found[1]):
                        assert heard.pop((i, v, kind)) == since
                        alarms += 1
            assert not heard
        elif choice < 0.9 and len(some):
            head[some] += rng.choice([1, 1, 1, 2, 7], size=len(some))
            q, scale = _forecast(rng, len(some)), rng.choice([0.5, 1.0, 2.0], size=(len(some), V))
            q[rng.random((len(some), V)) < 0.05] = np.nan
            x = rng.normal(size=(len(some), V, 1)).astype(np.float32).astype(np.float64)
            watch.issue(some, head[some] * P, q, scale, x)
            for i, slot in enumerate(some.tolist()):
                for v in range(V):
                    plain[slot][v].issue(int(head[slot]) * P, q[i, v], float(scale[i, v]), float(x[i, v, 0]))
        elif choice < 0.95:
            watch.adapt(some)
            for slot in some.tolist():
                for one in plain[slot]:
                    one.adapt()
        elif choice < 0.97 and len(some):
            watch.clear(some[:1])
            plain[some[0]] = [Plain() for _ in range(V)]
            head[some[0]] = 0
        else:  # rows move to other slots
            order = rng.permutation(slots)
            rows = watch.rows(order)
            watch.clear(np.arange(slots))
            watch.put(np.arange(slots), rows)
            plain, head = [plain[i] for i in order], head[order]
    assert alarms > 20
    summary = watch.summary(np.arange(slots))
    for slot in range(slots):
        for v in range(V):
            one = plain[slot][v]
            assert summary.count[slot, v] == len(one.kept)
            for n in range(3):
                assert summary.theta[slot, v, n] == pytest.approx(
                    [START[n, c] + one.theta[n, c] for c in range(3)], abs=1e-9
                )
                if one.hits[n]:
                    raw, issued = _decayed([[a, b] for a, b in one.hits[n]])
                    assert summary.raw[slot, v, n] == pytest.approx(raw, abs=1e-9)
                    assert summary.calibrated[slot, v, n] == pytest.approx(issued, abs=1e-9)
                if one.errors[n]:
                    assert summary.standings[slot, v, n] == pytest.approx(_decayed(one.errors[n]), rel=1e-6)
            if one.kept:
                assert summary.means[slot, v] == pytest.approx(_decayed(one.kept), rel=1e-6)
                shares = _decayed([np.arange(20) == min(19, int(pit * 20)) for pit in one.pits])
                assert summary.histogram[slot, v] == pytest.approx(shares, abs=1e-5)
    assert worth > 300 and sum(one.consumed[0] for row in plain for one in row) > 50


# ---- conformal widths through the watch -----------------------------------------------------------------------------


def _normal(watch: Watch, rng: np.random.Generator, sd: np.ndarray) -> None:
    """Values of spread sd (T,) against forecasts of spread 1."""
    slots = np.arange(watch.capacity)
    z = np.array([NORMAL.inv_cdf(p) for p in LEVELS])
    y = sd * rng.normal(size=(len(slots), V, len(sd)))
    flat = np.broadcast_to(z, (len(slots), V, K * P, len(z))).copy()
    for t in range(len(sd)):
        watch.observe(slots, np.full(len(slots), t), y[:, :, t])
        if (t + 1) % P == 0:
            watch.issue(slots, np.full(len(slots), t + 1), flat, np.ones((len(slots), V)))


def test_the_identity_of_the_mean_error_holds_at_every_range(rng: np.random.Generator):
    watch = _watch(5, learning=None, rules=Rules(coverages=COVERAGES, warm=0))
    _normal(watch, rng, np.repeat([1.0, 3.0, 0.5], 200))
    state = watch.conformal
    n = state.scored[..., None]
    assert (n > 500).all()
    error = state.misses / n - (1 - np.array(COVERAGES))
    assert np.abs(error - state.theta / (watch.rules.gamma * n)).max() < 1e-12


def test_live_coverage_follows_the_spread_at_every_range(rng: np.random.Generator):
    watch = _watch(60, learning=None, rules=Rules(coverages=COVERAGES, decay=0.99))
    _normal(watch, rng, np.full(600, 3.0))
    summary = watch.summary(np.arange(60))
    assert summary.calibrated.mean((0, 1)) == pytest.approx(np.tile(COVERAGES, (3, 1)), abs=0.02)
    want = [2 * NORMAL.cdf(NORMAL.inv_cdf((1 + c) / 2) / 3) - 1 for c in COVERAGES]
    assert summary.raw.mean((0, 1)) == pytest.approx(np.tile(want, (3, 1)), abs=0.02)
    assert np.exp(summary.theta).mean((0, 1)) == pytest.approx(np.full((3, 3), 3.0), rel=0.1)
    assert watch.calibrated(np.arange(60)).all()


def test_a_forecast_gets_the_widths_of_its_leads():
    watch = _watch(1)
    watch.conformal.theta[0, :, 1] = 0.5
    watch.conformal.theta[0, :, 2] = 1.0
    leads = np.arange(1, 20)
    flat = np.broadcast_to(np.arange(-4.0, 5.0), (1, V, 19, 9)).copy()
    wide = watch.calibrate(np.zeros(1, np.int64), flat, LEVELS, leads)
    ranges = [0] * 3 + [1] * 3 + [2] * 13  # leads 1-3, 4-6, 7-12 and whatever lies beyond
    assert wide[0, 0, :, 0] == pytest.approx([-4 * math.exp(START[n, 2] + 0.5 * n) for n in ranges])
    assert np.array_equal(wide[..., 4], flat[..., 4])
    assert not watch.calibrated(np.zeros(1, np.int64)).any()


@pytest.mark.parametrize(("ahead", "last"), [(1, [0]), (2, [0, 1]), (3, [0, 1, 2]), (4, [0, 1, 3]), (8, [0, 1, 3, 7])])
def test_ranges_of_leads_double(ahead: int, last: list[int]):
    ranges = Ranges(3, ahead)
    assert ranges.last.tolist() == last
    assert ranges.entries == sum(last) + len(last)
    found = ranges.of(np.arange(1, 3 * ahead + 1))
    want = [next(n for n, k in enumerate(last) if patch <= k) for patch in range(ahead) for _ in range(3)]
    assert found.tolist() == want


# ---- promises of a pool ---------------------------------------------------------------------------------------------


def _story(watch: Watch, rng: np.random.Generator, patches: int, slots: np.ndarray, first: int = 0) -> list[np.ndarray]:
    """Random patches of all slots, told for some of them; everything that comes out."""
    out: list[np.ndarray] = []
    leads, ones = np.arange(1, K * P + 1), np.ones((len(slots), V))
    for n in range(first, first + patches):
        y = 2 * rng.normal(size=(watch.capacity, V, P))
        y[rng.random(y.shape) < 0.1] = np.nan
        q, x = _forecast(rng, watch.capacity)[slots], rng.normal(size=(watch.capacity, V, 1))[slots]
        for p in range(P):
            scored = watch.observe(slots, np.full(len(slots), n * P + p), y[slots, :, p])
            out += [*scored.scores, *scored.signals]
        watch.issue(slots, np.full(len(slots), (n + 1) * P), q, ones, x)
        if n % 3 == 2:
            watch.adapt(slots)
        out.append(watch.calibrate(slots, watch.correct(slots, q, leads, ones, x), LEVELS, leads))
    return out


def _same(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return all(np.array_equal(x, y, equal_nan=True) for x, y in zip(a, b, strict=True))


def test_a_series_does_not_depend_on_its_neighbours():
    slots = np.arange(7)
    whole, part = _watch(7), _watch(7)
    a = _story(whole, np.random.default_rng(1), 12, slots)
    for few in (slots[[4]], slots[[6, 0, 2]]):
        b = _story(part, np.random.default_rng(1), 12, few)
        assert _same([x[few] for x in a], b)
        for name, rows in part.rows(few).items():
            assert np.array_equal(rows, whole.rows(few)[name]), name


def test_a_value_changes_only_what_comes_after_it():
    """Poison: from a cell inside a patch on, values are others; everything up to it stays bit for bit."""
    slot, P_at = np.zeros(1, np.int64), 7 * P + 1
    rng = np.random.default_rng(5)
    y, q = rng.normal(size=(1, V, 10 * P)), [_forecast(rng, 1) for _ in range(10)]
    poisoned = y.copy()
    poisoned[:, :, P_at:] = rng.choice([np.nan, 1e9, -1e9], size=poisoned[:, :, P_at:].shape)
    outs: list[list[list[np.ndarray]]] = []
    for values in (y, poisoned):
        watch, out = _watch(1), []
        for t in range(10 * P):
            scored = watch.observe(slot, np.array([t]), values[:, :, t])
            out.append([*scored.scores, *scored.signals])
            if (t + 1) % P == 0:
                watch.issue(slot, np.array([t + 1]), q[t // P], np.ones((1, V)), np.zeros((1, V, 1)))
                watch.adapt(slot)
            leads = np.arange(1, K * P + 1)
            moved = watch.correct(slot, q[t // P], leads, np.ones((1, V)), np.zeros((1, V, 1)))
            out[-1].append(watch.calibrate(slot, moved, LEVELS, leads))
        outs.append(out)
    equal = [_same(a, b) for a, b in zip(*outs, strict=True)]
    assert all(equal[:P_at]) and not any(equal[P_at:])


def test_a_value_is_scored_against_what_was_issued_before_it():
    watch, slot = _watch(1), np.zeros(1, np.int64)
    early = np.zeros((1, V, K * P, 9)) + np.arange(-4.0, 5.0)
    late, x, one = early + 100.0, np.zeros((1, V, 1)), np.ones((1, V))
    watch.issue(slot, np.array([P]), early, one, x)
    found = watch.observe(slot, np.array([P]), one)
    watch.issue(slot, np.array([2 * P]), late, one, x)
    assert found.scores.error.tolist() == [[1.0, 1.0]]
    assert watch.observe(slot, np.array([2 * P]), one).scores.error.tolist() == [[-99.0, -99.0]]
    overtaken = watch.observe(slot, np.array([P + 1]), one)  # its patch has closed: late
    assert np.isnan(overtaken.scores.error).all()


def test_a_patch_that_an_issue_has_overtaken_is_late():
    watch, slot = _watch(1), np.zeros(1, np.int64)
    q, x, one = np.zeros((1, V, K * P, 9)) + np.arange(-4.0, 5.0), np.zeros((1, V, 1)), np.ones((1, V))
    watch.issue(slot, np.array([P]), q, one, x)
    watch.issue(slot, np.array([4 * P]), q, one, x)
    watch.observe(slot, np.array([2 * P]), one)  # the first issue forecast it, one patch further ahead
    assert not watch.conformal.scored.any() and not watch.pending.latest_step.any()
    watch.observe(slot, np.array([4 * P]), one)
    assert watch.conformal.scored[0].tolist() == [[1, 0, 1]] * V  # of the second issue, and of the first


def test_a_cell_counts_once():
    watch, slot = _watch(1), np.zeros(1, np.int64)
    _story(watch, np.random.default_rng(5), 4, slot)
    step, value = np.array([4 * P + 1]), np.ones((1, V))
    assert np.isfinite(watch.observe(slot, step, value).scores.pit).all()
    before = watch.rows(slot)
    again = watch.observe(slot, step, value)
    assert np.isnan(again.scores.pit).all() and not again.signals.alarm.any()
    missing = watch.observe(slot, step + 1, np.full((1, V), np.nan))
    assert np.isnan(missing.scores.pit).all()
    for name, rows in watch.rows(slot).items():
        assert np.array_equal(rows, before[name]), name
    part = np.array([[np.nan, 3.0]])
    assert np.isfinite(watch.observe(slot, step + 1, part).scores.pit).tolist() == [[False, True]]
    assert np.isfinite(watch.observe(slot, step + 1, 2 * value).scores.pit).tolist() == [[True, False]]


def test_variates_are_watched_apart():
    slot = np.zeros(1, np.int64)
    both, swapped = _watch(1), _watch(1)
    rng = np.random.default_rng(6)
    for n in range(8):
        q, y, x = _forecast(rng, 1), rng.normal(size=(1, V, P)), rng.normal(size=(1, V, 1))
        for p in range(P):
            a = both.observe(slot, np.array([n * P + p]), y[:, :, p])
            b = swapped.observe(slot, np.array([n * P + p]), y[:, ::-1, p].copy())
            assert np.array_equal(a.scores.log_score, b.scores.log_score[:, ::-1], equal_nan=True)
            assert np.array_equal(a.signals.score, b.signals.score[:, ::-1], equal_nan=True)
        for watch, order in ((both, slice(None)), (swapped, slice(None, None, -1))):
            watch.issue(slot, np.array([(n + 1) * P]), q[:, order].copy(), np.ones((1, V)), x[:, order].copy())


def test_rows_leave_and_come_back_bit_for_bit():
    a, b = _watch(3), _watch(9)
    slots, places = np.arange(3), np.array([8, 0, 5])
    _story(a, np.random.default_rng(7), 9, slots)
    b.put(places, a.rows(slots))
    rng = np.random.default_rng(9)
    y, q, x = rng.normal(size=(3, V)), _forecast(rng, 3), rng.normal(size=(3, V, 1))
    for watch, s in ((a, slots), (b, places)):
        watch.observe(s, np.full(3, 9 * P), y)
        watch.issue(s, np.full(3, 10 * P), q, np.ones((3, V)), x)
    for name, rows in a.rows(slots).items():
        assert np.array_equal(rows, b.rows(places)[name]), name
        assert rows.dtype in (np.float16, np.float32, np.float64, np.int64, np.bool_), name  # what a snapshot holds


def test_growing_keeps_what_is_there_and_new_rows_are_zero():
    watch = _watch(3)
    _story(watch, np.random.default_rng(10), 7, np.arange(3))
    before, size = watch.rows(np.arange(3)), watch.bytes_per_slot
    watch.grow(8)
    watch.grow(4)
    assert watch.capacity == 8 and watch.bytes_per_slot == size
    for name, rows in watch.rows(np.arange(3)).items():
        assert np.array_equal(rows, before[name]), name
    for name, rows in watch.rows(np.arange(3, 8)).items():
        assert not rows.any(), name


def test_a_cleared_row_is_as_if_never_seen():
    slot = np.zeros(1, np.int64)
    used, fresh = _watch(1), _watch(1)
    _story(used, np.random.default_rng(11), 7, slot)
    used.clear(slot)
    assert not any(rows.any() for rows in used.rows(slot).values())
    a, b = (_story(watch, np.random.default_rng(12), 5, slot) for watch in (used, fresh))
    assert _same(a, b)


def test_rows_of_another_kind_of_watch_are_refused_whole():
    watch, slot = _watch(1, learning=Learning()), np.zeros(1, np.int64)
    watch.observe(slot, slot, np.ones((1, V)))
    before = watch.rows(slot)
    with pytest.raises(ValueError, match=r"correction\.new_gram are missing"):
        watch.put(slot, _watch(1, learning=None).rows(slot))
    same, other = (
        _watch(1, learning=Learning(), rules=Rules(coverages=c), start=None).rows(slot) for c in (COVERAGES, (0.5,))
    )
    with pytest.raises(ValueError, match=r"conformal\.theta is float64 .* expected"):
        watch.put(slot, {**same, "conformal.theta": other["conformal.theta"]})
    for name, rows in watch.rows(slot).items():
        assert np.array_equal(rows, before[name]), name


def test_no_row_is_ever_other_than_finite_and_its_size_is_constant():
    watch, slots = _watch(4), np.arange(4)
    rng = np.random.default_rng(14)
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        for n in range(30):
            for p in range(P):
                y = rng.choice([0.0, -0.0, 1e-300, 1e30, -1e100, 1e100, np.nan, 3.0], size=(4, V))
                watch.observe(slots, np.full(4, n * P + p), y)
            q = _forecast(rng, 4) * rng.choice([0.0, 1e-30, 1.0, 1e90], size=(4, V, 1, 1))
            q[rng.random((4, V)) < 0.2] = np.nan
            scale = rng.choice([1e-30, 1.0, 1e90, 0.0, np.nan, np.inf], size=(4, V))
            watch.issue(slots, np.full(4, (n + 1) * P), q, scale, np.zeros((4, V, 1)))
            watch.adapt(slots)
            rows = watch.rows(slots)
            assert all(np.isfinite(x).all() for x in rows.values())
            assert sum(x.nbytes for x in rows.values()) == 4 * watch.bytes_per_slot


def test_scores_hold_at_a_level_far_above_the_noise(rng: np.random.Generator):
    """Half precision keeps distances from the median, not values."""
    low, high = _watch(1), _watch(1)
    slot, x = np.zeros(1, np.int64), np.zeros((1, V, 1))
    for n in range(20):
        q, y = _forecast(rng, 1), rng.normal(size=(1, V, P))
        for p in range(P):
            a = low.observe(slot, np.array([n * P + p]), y[:, :, p])
            b = high.observe(slot, np.array([n * P + p]), y[:, :, p] + 1e8)
            assert b.scores.pit == pytest.approx(a.scores.pit, abs=1e-4, nan_ok=True)
            assert b.scores.crps == pytest.approx(a.scores.crps, abs=1e-6, nan_ok=True)
        low.issue(slot, np.array([(n + 1) * P]), q, np.ones((1, V)), x)
        high.issue(slot, np.array([(n + 1) * P]), q + 1e8, np.ones((1, V)), x)


def test_half_precision_costs_less_than_a_thousandth(rng: np.random.Generator):
    watch, slots = _watch(50, learning=None), np.arange(50)
    q = np.sort(rng.normal(size=(50, V, K * P, 9)), -1)
    watch.issue(slots, np.full(50, P), q, np.ones((50, V)))
    due = watch.pending.due(slots, np.full(50, P + 1), rng.normal(size=(50, V)))
    distance = np.abs(q[:, :, 1] - q[:, :, 1, 4:5])
    assert (np.abs(due.quantiles - q[:, :, 1]) <= distance * 2**-11 + 1e-6).all()


def test_a_history_in_one_call_is_the_same_as_patch_by_patch(rng: np.random.Generator):
    whole, stepwise = _watch(3), _watch(3)
    slots, N = np.arange(3), 6
    begin = np.array([0, 6, 30])
    y = rng.normal(size=(3, V, N * P))
    q = np.stack([_forecast(rng, 3) for _ in range(N)], 2)
    q[1, :, 2] = np.nan  # no token: nothing is issued
    scale, x = np.ones((3, V, N)), rng.normal(size=(3, V, N, 1))
    found = whole.run(slots, begin, y, q, scale, x)
    for n in range(N):
        part, steps = slice(n * P, (n + 1) * P), begin[:, None] + np.arange(n * P, (n + 1) * P)
        # a patch at once, each series with all of its rows
        scored = stepwise.observe(np.repeat(slots, P), steps.ravel(), y[:, :, part].swapaxes(1, 2).reshape(-1, V))
        log_score = scored.scores.log_score.reshape(3, P, V).swapaxes(1, 2)
        assert np.array_equal(log_score, found.scores.log_score[:, :, part], equal_nan=True)
        stepwise.issue(slots, steps[:, -1] + 1, q[:, :, n], scale[:, :, n], x[:, :, n])
    for name, rows in whole.rows(slots).items():
        assert np.array_equal(rows, stepwise.rows(slots)[name]), name
    assert np.isnan(found.scores.pit[1, :, 3 * P : 4 * P]).all() and np.isfinite(found.scores.pit[0, :, P:]).all()


def test_no_rows_are_no_trouble():
    watch, none = _watch(2), np.zeros(0, np.int64)
    before = watch.rows(np.arange(2))
    scored = watch.observe(none, none, np.zeros((0, V)))
    watch.issue(none, none, np.zeros((0, V, K * P, 9)), np.zeros((0, V)), np.zeros((0, V, 1)))
    assert scored.scores.pit.shape == (0, V) and len(watch.adapt(none)) == 0
    assert all(np.array_equal(rows, before[name]) for name, rows in watch.rows(np.arange(2)).items())


def test_surprise_is_kept_per_series():
    watch, slots = _watch(3), np.array([2, 0])
    for step in range(200):
        residual = np.ones((2, V))
        residual[0] = 9.0 if step >= 185 else 1.0
        ratio, high = watch.surprise(slots, np.full(2, step), residual)
    assert high.tolist() == [[True, True], [False, False]]
    assert ratio[1] == pytest.approx([1.0, 1.0])
    assert watch.signals.tokens[:, 0].tolist() == [200, 0, 200]


def test_misuse_is_named():
    watch, two = _watch(2), np.arange(2)
    q, ones, x = np.zeros((2, V, K * P, 9)), np.ones((2, V)), np.zeros((2, V, 1))
    with pytest.raises(ValueError, match="a slot was issued twice"):
        watch.issue(two * 0, two * P, q, ones, x)
    with pytest.raises(ValueError, match="origin 4 is not the beginning of a patch of 3 steps"):
        watch.issue(two, np.array([3, 4]), q, ones, x)
    with pytest.raises(ValueError, match="quantiles are 11 steps of 9 levels, expected 12 of 9"):
        watch.issue(two, two * P, q[:, :, 1:], ones, x)
    with pytest.raises(ValueError, match="features are none"):
        watch.issue(two, two * P, q, ones)
    with pytest.raises(ValueError, match="5 steps for 1 tokens"):
        watch.run(two, two * P, np.zeros((2, V, 5)), q[:, :, None], ones[..., None], x[:, :, None])
    with pytest.raises(ValueError, match=r"no 0\.05: leave the coverage out"):
        Watch(variates=1, patch_size=1, ahead=1, levels=(0.1, 0.5, 0.9), rules=Rules(coverages=(0.9,)))
    with pytest.raises(ValueError, match="start has shape"):
        _watch(1, start=np.zeros((1, 1)))


# ---- difficult numbers ----------------------------------------------------------------------------------------------


def test_a_constant_series_has_narrow_intervals_and_recovers_when_it_moves(rng: np.random.Generator):
    watch, slot = _watch(1, learning=None, rules=Rules(coverages=COVERAGES)), np.zeros(1, np.int64)
    z = np.array([NORMAL.inv_cdf(p) for p in LEVELS])
    q = np.broadcast_to(5.0 + z, (1, V, K * P, 9)).copy()
    for t in range(900):
        value = np.full((1, V), 5.0) if t < 300 else 5.0 + rng.normal(size=(1, V))
        scored = watch.observe(slot, np.array([t]), value)
        if P <= t < 300:
            assert scored.scores.pit == pytest.approx(np.full((1, V), 0.5), abs=1e-9)
        if t == 299:
            summary = watch.summary(slot)
            assert (summary.theta[..., 0] == watch.rules.lowest).all()
            assert (summary.calibrated == 1).all()
        if (t + 1) % P == 0:
            watch.issue(slot, np.array([t + 1]), q, np.ones((1, V)))
    assert watch.summary(slot).theta[..., :2] == pytest.approx(np.zeros((1, V, 3, 2)), abs=0.5)


def test_a_series_that_is_nearly_always_zero_is_scored_by_its_ties(rng: np.random.Generator):
    watch, slots = _watch(40, learning=None, rules=Rules(coverages=COVERAGES)), np.arange(40)
    q = np.zeros((40, V, K * P, 9))
    q[..., 8] = 3.0  # 99 % of the values are at most 3; at least 95 % are zero
    for t in range(40 * P):
        y = np.where(rng.random((40, V)) < 0.02, 6 * rng.random((40, V)), 0.0) * rng.choice([1.0, -1.0])
        scored = watch.observe(slots, np.full(40, t), np.abs(y) if t % 2 else y.clip(min=-0.0))
        zero = (y == 0) & ~np.isnan(scored.scores.pit)
        assert np.unique(scored.scores.pit[zero].round(4)).tolist() in ([], [0.475])  # (0 + 0.95) / 2
        if (t + 1) % P == 0:
            watch.issue(slots, np.full(40, t + 1), q, np.ones((40, V)))
    summary = watch.summary(slots)
    assert (summary.raw[..., 0] > 0.9).all() and np.isfinite(summary.theta).all() and np.isfinite(summary.means).all()


def test_what_is_seen_does_not_depend_on_the_unit():
    """f(a x) = a f(x), bit for bit where a is a power of two; signals and widths do not change at all."""
    rng, slot = np.random.default_rng(15), np.zeros(1, np.int64)
    watches = {a: _watch(1) for a in (1.0, 2.0**-100, 2.0**100)}
    for n in range(15):
        q, y, x = _forecast(rng, 1), 3 * rng.normal(size=(1, V, P)), rng.normal(size=(1, V, 1))
        for p in range(P):
            found = {a: w.observe(slot, np.array([n * P + p]), a * y[:, :, p]) for a, w in watches.items()}
            for a, scored in found.items():
                want = found[1.0]
                assert np.array_equal(scored.scores.z, want.scores.z, equal_nan=True)
                assert np.array_equal(scored.scores.crps, a * want.scores.crps, equal_nan=True)
                assert np.array_equal(scored.signals.score, want.signals.score, equal_nan=True)
        for a, watch in watches.items():
            watch.issue(slot, np.array([(n + 1) * P]), a * q, np.full((1, V), a), x)
            watch.adapt(slot)
            assert np.array_equal(watch.conformal.theta, watches[1.0].conformal.theta)


# ---- the validation part --------------------------------------------------------------------------------------------


def test_the_validation_part_sets_widths_and_thresholds(rng: np.random.Generator):
    levels = np.array([NORMAL.inv_cdf(p) for p in LEVELS])
    B, N = 80, 100
    y = 2.0 * rng.normal(size=(B, V, N * P))  # twice as wide as is forecast
    q = np.broadcast_to(levels, (B, V, N, K * P, 9)).copy()
    watch = _watch(1, learning=None, start=None)
    start, thresholds = watch.tune(y, q, np.ones((B, V, N)), arl=2000)
    assert np.exp(start) == pytest.approx(np.full((3, 3), 2.0), rel=0.05)
    assert not any(rows.any() for rows in watch.rows(np.zeros(1, np.int64)).values())
    tuned = _watch(B, learning=None, start=start, thresholds=thresholds)
    fresh = 2.0 * rng.normal(size=(B, V, N * P))
    tuned.run(np.arange(B), np.zeros(B, np.int64), fresh, q, np.ones((B, V, N)))
    summary = tuned.summary(np.arange(B))
    scored = summary.count.sum()
    assert scored / summary.alarms.sum((0, 1)) == pytest.approx([2000.0] * 3, rel=0.6)
    assert summary.calibrated.mean((0, 1)) == pytest.approx(np.tile(COVERAGES, (3, 1)), abs=0.02)


# ---- with a model ---------------------------------------------------------------------------------------------------


def test_a_model_is_watched_alike_in_one_pass_and_patch_by_patch():
    """The calls (a) and (b) at the top of the module, on a model that nobody trained."""
    torch.manual_seed(0)
    size, N = 4, 12
    model = Forecaster(patch_size=size, patches_ahead=3, seasons=(1,), width=8, depth=1).eval()
    rng = np.random.default_rng(16)
    y = rng.normal(size=(2, 1, N * size)).cumsum(2)
    y[0, 0, 9] = np.nan
    values = torch.from_numpy(y)
    batch = Batch(values.nan_to_num(), ~values.isnan())
    slots, zero = np.arange(2), np.zeros(2, np.int64)
    watches = [Watch(variates=1, patch_size=size, ahead=3, levels=model.quantile_levels) for _ in range(2)]
    for watch in watches:
        watch.grow(2)
    with torch.no_grad():
        tokens, _ = model(batch, None)
        whole = watches[0].run(slots, zero, y, tokens.unscaled()[..., size:, :].numpy(), tokens.scale.numpy())
        state = None
        for n in range(N):
            part = slice(n * size, (n + 1) * size)
            steps = np.tile(np.arange(n * size, (n + 1) * size), 2)
            scored = watches[1].observe(np.repeat(slots, size), steps, y[:, :, part].reshape(-1, 1))
            got = scored.scores.log_score.reshape(2, 1, size)
            assert got == pytest.approx(whole.scores.log_score[:, :, part], rel=1e-3, abs=1e-3, nan_ok=True)
            token, state = model(Batch(batch.values[:, :, part], batch.observed[:, :, part]), state)
            ahead = token.unscaled()[:, :, -1, size:].numpy()
            watches[1].issue(slots, zero + (n + 1) * size, ahead, token.scale[:, :, -1].numpy())
    assert np.isnan(whole.scores.pit[0, 0, 9]) and np.isfinite(whole.scores.pit[1, 0, size:]).all()
    assert watches[0].scores.count[:, 0].tolist() == [(N - 1) * size - 1, (N - 1) * size]
