"""A correction learned from targets that have been seen, and from nothing else."""

import numpy as np
import pytest

from tsgdn.streaming import adapt
from tsgdn.streaming.adapt import AdaptState, Learning
from tsgdn.streaming.watch import Watch

LEVELS = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)
Z = np.array([-2.33, -1.64, -1.28, -0.67, 0.0, 0.67, 1.28, 1.64, 2.33])


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def _collected(x: np.ndarray, e: np.ndarray, learning: Learning) -> AdaptState:
    """One series and range: features (T, D), residuals (T,)."""
    state = adapt.empty(1, 1, 1, x.shape[1])
    for row, residual in zip(x, e, strict=True):
        seen = np.ones((1, 1, 1), bool)
        state = adapt.collect(state, np.full((1, 1, 1), residual), row[None, None, None], seen, learning)
    return state


def test_the_bias_is_a_shrunken_mean(rng: np.random.Generator):
    learning = Learning(forget=1.0, prior=20.0)
    e = 0.7 + 0.1 * rng.normal(size=200)
    state = adapt.consume(_collected(np.ones((200, 1)), e, learning), learning)
    assert state.weights.item() == pytest.approx(e.sum() / 220)


def test_the_weights_are_those_of_recursive_least_squares(rng: np.random.Generator):
    learning = Learning(features=3, forget=0.98, prior=5.0)
    x = np.concatenate([np.ones((120, 1)), rng.normal(size=(120, 3))], 1)
    e = x @ np.array([0.3, -0.5, 0.2, 0.0]) + 0.05 * rng.normal(size=120)
    state = adapt.consume(_collected(x, e, learning), learning)
    discount = 0.98 ** np.arange(120)[::-1]
    gram = (discount[:, None] * x).T @ x + 5.0 * np.eye(4)
    assert state.weights[0, 0, 0] == pytest.approx(np.linalg.solve(gram, (discount * e) @ x), rel=1e-9)
    # the textbook recursion, whose prior is forgotten too
    P, w = np.eye(4) / (5.0 * 0.98**-120), np.zeros(4)
    for row, target in zip(x, e, strict=True):
        gain = P @ row / (0.98 + row @ P @ row)
        w = w + gain * (target - row @ w)
        P = (P - np.outer(gain, row @ P)) / 0.98
    assert state.weights[0, 0, 0] == pytest.approx(w, rel=1e-6)


def test_consuming_often_or_once_gives_the_same_weights(rng: np.random.Generator):
    learning = Learning(features=1)
    x = np.concatenate([np.ones((60, 1)), rng.normal(size=(60, 1))], 1)
    e = rng.normal(size=60)
    once = adapt.consume(_collected(x, e, learning), learning)
    often = adapt.empty(1, 1, 1, 2)
    for row, residual in zip(x, e, strict=True):
        residual = np.full((1, 1, 1), residual)
        often = adapt.collect(often, residual, row[None, None, None], np.ones((1, 1, 1), bool), learning)
        often = adapt.consume(often, learning)
    assert often.weights == pytest.approx(once.weights, rel=1e-10)
    again = adapt.consume(once, learning)
    for a, b in zip(once, again, strict=True):
        assert np.array_equal(a, b)


def test_collecting_corrects_nothing(rng: np.random.Generator):
    learning = Learning()
    state = _collected(np.ones((50, 1)), 5 + rng.normal(size=50), learning)
    assert (state.weights == 0).all() and (adapt.shift(state, np.ones((1, 1, 1))) == 0).all()


def test_wild_residuals_are_cut_and_missing_ones_left_out():
    learning = Learning(forget=1.0, prior=1.0, limit=2.0)
    state = adapt.consume(_collected(np.ones((1, 1)), np.array([1e9]), learning), learning)
    assert state.weights.item() == pytest.approx(1.0)  # 2 / (1 + 1)
    unseen = adapt.collect(
        state, np.full((1, 1, 1), np.nan), np.full((1, 1, 1, 1), np.nan), np.zeros((1, 1, 1), bool), learning
    )
    for a, b in zip(state, unseen, strict=True):
        assert np.array_equal(a, b)


def test_series_variates_and_ranges_learn_apart(rng: np.random.Generator):
    learning = Learning(forget=1.0, prior=1e-6)
    bias = rng.normal(size=(3, 2, 4))
    state = adapt.empty(3, 2, 4, 1)
    for _ in range(10):
        state = adapt.collect(state, bias, np.ones((3, 2, 4, 1)), np.ones((3, 2, 4), bool), learning)
    state = adapt.consume(state, learning)
    assert adapt.shift(state, np.ones((3, 2, 1))) == pytest.approx(bias, rel=1e-5)


@pytest.mark.parametrize(
    "learning", [Learning(features=16), Learning(features=-1), Learning(forget=0.0), Learning(prior=0.0)]
)
def test_settings_out_of_range_are_refused(learning: Learning):
    with pytest.raises(ValueError, match="expected"):
        adapt.check_learning(learning)


# ---- in a stream ----------------------------------------------------------------------------------------------------

P, K = 4, 3
LEADS = np.arange(1, K * P + 1)


def _watch(**options: object) -> Watch:
    watch = Watch(variates=1, patch_size=P, ahead=K, levels=LEVELS, **options)
    watch.grow(1)
    return watch


def _live(watch: Watch, values: np.ndarray, *, every: int | None) -> list[np.ndarray]:
    """Persistence with a bias of 2 scales, which is frozen; every so many patches the correction is learned."""
    slot, shown = np.zeros(1, np.int64), []
    for t, value in enumerate(values):
        watch.observe(slot, np.array([t]), np.array([[value]]))
        if (t + 1) % P == 0:
            frozen = np.broadcast_to(value + 4.0 + 2.0 * Z, (1, 1, K * P, len(Z))).copy()
            scale = np.full((1, 1), 2.0)
            watch.issue(slot, np.array([t + 1]), frozen, scale)
            if every is not None and (t + 1) // P % every == 0:
                watch.adapt(slot)
            shown.append(watch.calibrate(slot, watch.correct(slot, frozen, LEADS, scale), LEVELS, LEADS))
    return shown


def test_observing_never_corrects(rng: np.random.Generator):
    values = np.cumsum(rng.normal(size=200))
    watch = _watch(learning=Learning())
    _live(watch, values, every=None)
    assert watch.correction is not None and (watch.correction.weights == 0).all()
    plain = _watch()
    with pytest.raises(ValueError, match="learning"):
        plain.adapt(np.zeros(1, np.int64))


def test_a_correction_removes_a_bias_and_stands_beside_the_frozen_forecast_and_persistence(rng: np.random.Generator):
    values = np.cumsum(0.3 * rng.normal(size=600))
    watch = _watch(learning=Learning())
    _live(watch, values, every=1)
    assert watch.correction is not None
    assert watch.correction.weights[0, 0, :, 0] == pytest.approx([-2.0, -2.0, -2.0], abs=0.4)
    frozen, adapted, persistence = np.moveaxis(watch.summary(np.zeros(1, np.int64)).standings[0, 0], -1, 0)
    assert (adapted < 0.4 * frozen).all()
    assert (persistence < adapted).all()  # which has nothing to learn
    assert frozen == pytest.approx([2.0] * 3, abs=0.3)


def test_values_after_t_do_not_reach_any_output_up_to_t(rng: np.random.Generator):
    values = np.cumsum(rng.normal(size=160))
    other = values.copy()
    t = 97
    other[t:] = np.where(np.arange(160 - t) % 3 == 0, np.nan, 1e6)
    a = _live(_watch(learning=Learning()), values, every=1)
    b = _live(_watch(learning=Learning()), other, every=1)
    for n in range(len(a)):
        assert np.array_equal(a[n], b[n]) == ((n + 1) * P <= t)


def test_a_forecast_for_lead_h_teaches_h_steps_after_it_was_issued():
    watch = _watch(learning=Learning(forget=1.0))
    slot, counts = np.zeros(1, np.int64), []
    values = np.zeros(8 * P)
    for t, value in enumerate(values):
        watch.observe(slot, np.array([t]), np.array([[value]]))
        assert watch.correction is not None
        counts.append(watch.correction.new_count[0, 0].tolist())
        if (t + 1) % P == 0:
            watch.issue(slot, np.array([t + 1]), np.zeros((1, 1, K * P, 9)) + Z, np.ones((1, 1)))
    for t, count in enumerate(counts):
        # the first forecast begins at step P; range n looks n patches further (K = 3: every patch is a range)
        assert count == [max(0, t + 1 - (n + 1) * P) for n in range(K)]
    assert watch.adapt(slot).tolist() == [sum(counts[-1])]
    assert watch.adapt(slot).tolist() == [0]


def test_an_oracle_scores_zero_at_every_horizon(rng: np.random.Generator):
    """Forecasts that know the future have no error at any range of leads: nothing is off by one."""
    values = rng.normal(size=40 * P)
    watch = _watch(learning=Learning())
    slot = np.zeros(1, np.int64)
    for t in range(30 * P):
        watch.observe(slot, np.array([t]), values[None, [t]])
        if (t + 1) % P == 0:
            truth = values[None, None, t + 1 : t + 1 + K * P, None]
            watch.issue(slot, np.array([t + 1]), np.repeat(truth, 9, -1), np.ones((1, 1)))
    summary = watch.summary(slot)
    assert (summary.standings[0, 0, :, :2] == 0).all() and (summary.standings[0, 0, :, 2] > 0.5).all()
    assert summary.means[0, 0, 1] == 0 and summary.means[0, 0, 2] == 0
    assert summary.count[0, 0] == 29 * P
    assert watch.adapt(slot)[0] > 0
    assert watch.correction is not None and (watch.correction.weights == 0).all()


def test_the_frozen_error_is_known_after_the_correction(rng: np.random.Generator):
    """A residual is that of the frozen forecast, so the correction does not chase itself."""
    watch = _watch(learning=Learning(forget=1.0, prior=1e-9))
    _live(watch, np.zeros(120), every=1)
    assert watch.correction is not None
    assert watch.correction.weights[0, 0, :, 0] == pytest.approx([-2.0] * 3, abs=1e-6)


def test_features_of_the_moment_of_issue_explain_the_error(rng: np.random.Generator):
    watch = Watch(variates=1, patch_size=P, ahead=1, levels=LEVELS, learning=Learning(features=2, forget=1.0))
    watch.grow(1)
    slot, x = np.zeros(1, np.int64), np.zeros(2)
    for patch in range(120):
        for phase in range(P):
            noise = 0.1 * rng.normal()
            value = 3.0 * (x[0] - 0.5 * x[1]) + noise
            watch.observe(slot, np.array([patch * P + phase]), np.array([[value]]))
        x = rng.normal(size=2)
        flat = np.broadcast_to(Z, (1, 1, P, 9)).copy()
        watch.issue(slot, np.array([(patch + 1) * P]), flat, np.full((1, 1), 3.0), x[None, None])
    watch.adapt(slot)
    assert watch.correction is not None
    assert watch.correction.weights[0, 0, 0] == pytest.approx([0.0, 1.0, -0.5], abs=0.08)
    moved = watch.correct(slot, np.zeros((1, 1, P, 9)), LEADS[:P], np.full((1, 1), 3.0), np.array([[[1.0, 0.0]]]))
    assert moved == pytest.approx(np.full((1, 1, P, 9), 3.0), abs=0.2)
    with pytest.raises(ValueError, match="features are none"):
        watch.correct(slot, np.zeros((1, 1, P, 9)), LEADS[:P], np.full((1, 1), 3.0))
