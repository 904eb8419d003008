"""Retention: the references reach the numbers of the specification, and scores, claims and probes their definitions."""

import numpy as np
import pytest

from tsgdn.data.retention import COMMON_PROBE, RARE_PROBE, TASKS, block
from tsgdn.evaluation import retention as scores

NAMES = ("filter", "knn", "attention", "ridge", "rls", "last")


@pytest.fixture
def rng():
    return np.random.default_rng(5)


def pooled(task, names, *, sequences=400, seed=2, **axes):
    """Ret of references on rare and on common probes, and on T5 their stale intrusion, pooled over sequences."""
    error, base, stale = {}, np.zeros(2), {name: [] for name in names}
    for index in range(sequences // 50):
        batch = block(task, index=index, seed=seed, split="test", batch=50, **axes)
        asked = scores.probes(batch)
        for name in ("memoryless", *names):
            got = scores.recall(batch, name)
            sums = [scores.squared_errors(got, asked.truth, asked.kind == k).sum() for k in (RARE_PROBE, COMMON_PROBE)]
            error[name] = error.get(name, 0) + np.array(sums)
            if task == "T5" and name in stale:
                row, p = np.nonzero((asked.kind == COMMON_PROBE) & (asked.version > 0))
                old = batch.truth["theta"][row, asked.regime[row, p], asked.version[row, p] - 1]
                stale[name].append((got[row, p], asked.truth[row, p], old))
    base = error.pop("memoryless")
    with np.errstate(invalid="ignore"):
        ret = {name: 1 - error[name] / base for name in names}
    return ret, {
        k: scores.stale_intrusion(*map(np.concatenate, zip(*v, strict=True)))[1] for k, v in stale.items() if v
    }


TABLE = [
    ("T2", {"gap": 256}, ".99/.997 .99/.99 .99/.99 .70/.92 .65/.93 -1.05/-.81"),
    ("T3", {"gap": 256}, ".99/.997 .99/.99 .99/.99 .70/.92 .65/.93 -1.05/-.81"),
    ("T3", {"gap": 256, "similarity": 0.6}, ".99/.997 .99/.99 .99/.99 .51/.86 .42/.88 -1.05/-.81"),
    ("T5", {"gap": 512}, ".99/.997 .99/.28 .99/.905 .68/.38 -.16/.91 -1.03/-.72"),
    ("T3", {"gap": 2048}, ".99/1.0 .99/.99 .99/.995 .48/.99 -1.60/.94 -1.03/-.79"),
    ("T3", {"gap": 2048, "common": 32}, ".99/.997 .99/.99 .99/.995 -.88/.23 -3.3/-1.1 -1.03/-.96"),
    ("T5", {"gap": 2048}, ".99/.999 .99/.31 .99/.96 .59/.41 -1.56/.95 -1.04/-.81"),
]


@pytest.mark.parametrize(
    ("task", "axes", "row"),
    [pytest.param(*cell, marks=[pytest.mark.slow] if cell[1]["gap"] > 512 else []) for cell in TABLE],
)
def test_references_reach_the_numbers_of_the_specification(task, axes, row):
    got, stale = pooled(task, NAMES, **axes)
    for name, cell in zip(NAMES, row.split(), strict=True):
        # Where errors exceed the values' power, a sum over 400 sequences scatters in proportion to it; so does the
        # last value of T2, which is one number per sequence.
        for ret, expected in zip(got[name], map(float, cell.split("/")), strict=True):
            tolerance = (0.3 if task == "T2" else 0.15) if name == "last" else 0.03 * max(1, 1 - expected)
            assert ret == pytest.approx(expected, abs=tolerance), name
    if axes == {"gap": 512}:
        for name, expected in {"filter": 0, "knn": 0.5, "attention": 0.11, "ridge": 0.48, "rls": 0.12}.items():
            assert stale[name] == pytest.approx(expected, abs=0.03), name


@pytest.mark.parametrize(("gap", "ridge"), [(256, 0.98), (2048, 0.97)])
def test_references_of_the_repeat_haystack_reach_theirs(gap, ridge):
    got, _ = pooled("T1", ("filter", "knn", "ridge"), gap=gap)
    assert [got[n][0] for n in ("filter", "knn", "ridge")] == pytest.approx([0.995, 0.99, ridge], abs=0.01)


@pytest.mark.parametrize(("pairs", "ridge"), [(4, 0.70), (8, 0.65), (16, 0.55), (32, 0.39), (64, 0.23)])
def test_references_of_numeric_recall_reach_theirs(pairs, ridge):
    got, _ = pooled("T4", ("filter", "knn", "ridge"), pairs=pairs, channels=8)
    assert [got[n][0] for n in ("filter", "knn", "ridge")] == pytest.approx([0.962, 0.960, ridge], abs=0.03)


def test_one_exposure_leaves_the_errors_that_theory_says():
    batch = block("T4", index=0, split="test", batch=200, pairs=32)
    asked = scores.probes(batch)
    noisy = asked.at(batch.values)
    for name, expected in {"oracle": 0.04, "filter": 0.0785, "knn": 0.08, "memoryless": 1.04, "last": 2.08}.items():
        error = np.mean((scores.recall(batch, name) - noisy) ** 2)
        # `last` knows the answer where the last pair is asked for: one of 32.
        assert error == pytest.approx(expected, rel=0.05), name


@pytest.mark.parametrize(
    ("channels", "expected"),
    [
        (8, {"filter": 0.99, "knn_channel": 0.99, "knn": -0.6, "ridge": 0.34, "ridge_channel": 0.84}),
        (2, {"ridge": 0.80, "ridge_channel": 0.84}),
        pytest.param(32, {"ridge": -0.31, "ridge_channel": 0.81}, marks=pytest.mark.slow),
    ],
)
def test_references_of_crossed_channels_reach_theirs(channels, expected):
    got, _ = pooled("T6", expected, gap=256, channels=channels, sequences=400 if channels < 32 else 200)
    for name, ret in expected.items():
        assert got[name][0] == pytest.approx(ret, abs=0.03 if ret > 0.9 else 0.12), name


def test_references_of_action_effects_reach_theirs():
    for actions, expected in (
        (6, {"filter": (0.977, None), "last": (-1.1, None), "ridge": (0.68, 0.91), "rls": (0.62, 0.97)}),
        (16, {"ridge": (0.33, None), "rls": (-0.71, None)}),
    ):
        batch = block("T7", index=0, split="test", batch=400, gap=256, actions=actions, do="rare")
        truth = batch.truth["effects"]
        for name, (rare, common) in expected.items():
            got = scores.effects(batch, name)
            # Forgetting leaves the rare effect to the prior: a heavy-tailed error.
            tolerance = {"filter": 0.005, "last": 0.15, "ridge": 0.07, "rls": 0.2}[name]
            assert scores.effect_retention(got[:, -1], truth[:, -1]) == pytest.approx(rare, abs=tolerance), name
            if common is not None:
                assert scores.effect_retention(got[:, :-1], truth[:, :-1]) == pytest.approx(common, abs=0.02)


def test_references_of_topologies_reach_theirs():
    batch = block("T8", index=0, split="test", batch=200, gap=256)
    P = batch.truth["topology"].astype(float)
    got = {name: scores.binding(scores.topology(batch, name), P) for name in ("oracle", "filter", "var", "window")}
    assert got["oracle"] == (1, 1, 0)
    assert got["filter"].ret == pytest.approx(0.958, abs=0.005) and got["filter"].driver_accuracy == 1
    assert got["var"][:2] == pytest.approx((0.01, 0.24), abs=0.03)
    assert got["window"][:2] == pytest.approx((-0.9, 0.15), abs=0.05)
    memoryless = scores.topology(batch, "memoryless")
    assert scores.binding(memoryless, P).ret == pytest.approx(0)
    assert scores.binding(memoryless, P).driver_accuracy == pytest.approx(1 / 7, abs=0.03)

    before, now = (batch.values[:, s].astype(float) for s in (slice(0, -3), slice(1, -2)))
    row, regime = np.arange(200)[:, None], batch.regime[:, 1:-2]
    laws = {
        1: 0.9 * P[row, regime],
        8.3: 0.9 * P[row, (regime + 1) % 5],
        4.7: memoryless[:, None],
        5.3: np.zeros((8, 8)),
    }
    for expected, law in laws.items():
        assert np.mean((now - (law @ before[..., None])[..., 0]) ** 2) == pytest.approx(expected, rel=0.02)


def test_swapped_topologies_are_told_from_lost_ones():
    batch = block("T8", index=0, split="test", batch=20, gap=32)
    P = batch.truth["topology"].astype(float)
    swapped = scores.binding(0.9 * P[:, 0], P)
    assert swapped.driver_accuracy + swapped.swap_rate == pytest.approx(1)
    assert swapped.swap_rate > 0.8 and swapped.ret < 0
    lost = scores.binding(np.broadcast_to(np.eye(8), (20, 8, 8)), P)
    assert (lost.driver_accuracy, lost.swap_rate) == (0, 0), "no channel drives itself"


@pytest.mark.slow
def test_references_of_switching_streams_reach_theirs():
    batch = block("T9", index=0, split="test", batch=200)
    assert (batch.regime == 4).mean() == pytest.approx(0.014, abs=0.002)
    mean = {name: scores.switching_errors(batch, name)[0].mean(0) for name in ("oracle", "filter", "window", "zero")}
    gaps = scores.switching_errors(batch, "zero")[1]
    assert [mean[name].mean() for name in ("oracle", "filter", "zero")] == pytest.approx([1, 1.1, 5.2], rel=0.07)
    assert mean["window"][0] == mean["zero"][0] == pytest.approx(5.1, abs=0.6), "nothing is known at the first step"
    assert mean["window"][-1] == pytest.approx(2.1, abs=0.3)
    assert len(gaps) / 200 == pytest.approx(1.8, abs=0.25)
    assert np.quantile(gaps, [0.1, 0.5, 0.9]) == pytest.approx([150, 1160, 3600], rel=0.5)


@pytest.mark.parametrize("phases", [2, 3, 5])
def test_values_without_tracking_are_worth_one_over_the_number_of_phases(phases):
    batch = block("T9b", index=0, split="test", batch=200, gap=200, phases=phases)
    truth = scores.probes(batch).truth
    ret = {
        n: scores.effect_retention(scores.phase(batch, n), truth)
        for n in ("oracle", "memoryless", "untracked", "filter")
    }
    assert (ret["oracle"], ret["memoryless"]) == (1, 0)
    assert ret["untracked"] == pytest.approx(1 / phases, abs=0.04)
    assert ret["filter"] == pytest.approx(1 - 0.04 / 16.04, abs=0.002)


def test_references_fail_the_controls_that_a_memory_must_fail():
    for control in ("no_exposure", "new_cue"):
        names = ("filter", "ridge", "rls", "delta") if control == "no_exposure" else ("ridge", "rls", "delta")
        got, _ = pooled("T3", names, gap=64, channels=4, control=control, sequences=100)
        assert all(got[name][0] <= 0.05 for name in names), control
    shown, _ = pooled("T3", ("ridge", "last"), gap=512, channels=4, control="shown", sequences=100)
    plain, _ = pooled("T3", ("ridge", "last"), gap=512, channels=4, sequences=100)
    assert shown["ridge"][0] > plain["ridge"][0] + 0.1
    at_once, _ = pooled("T3", ("filter", "ridge"), gap=0, sequences=100)
    assert at_once["filter"][0] == pytest.approx(0.99, abs=0.003) and at_once["ridge"][0] > 0.7


def test_hand_set_memories_trade_rare_recall_against_revision_on_the_tasks():
    got, _ = pooled("T5", ("delta", "gated_delta_.99"), gap=512, channels=4, sequences=200)
    assert got["delta"][0] > got["gated_delta_.99"][0] + 0.1


@pytest.mark.parametrize(("name", "alpha"), [("delta", 1.0), ("gated_delta_.99", 0.99)])
def test_memories_set_by_hand_are_the_recurrence_of_the_probes(name, alpha):
    batch = block("T3", index=0, split="test", batch=3, gap=32, channels=2)
    first = batch.values.shape[1] - 8
    k = batch.cue[:, :first].astype(float)
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    q = batch.cue[:, first].astype(float)
    q /= np.linalg.norm(q, axis=-1, keepdims=True)
    read = scores.run_memory(k, k, batch.values[:, :first].astype(float), np.full((3, first, 1), alpha), q)
    assert np.allclose(scores.recall(batch, name)[:, 0], alpha * read)  # the probe's step decays, too


@pytest.mark.parametrize("task", ["T1", "T2", "T2e", "T3", "T4", "T5", "T6"])
def test_no_reference_reads_hidden_values(task):
    batch = block(task, index=0, split="test", batch=4, gap=32)
    other = batch._replace(values=np.where(batch.observed, batch.values, np.float32(1e6)))
    for name in (*scores.RECALL, *scores.HAND_SET):
        assert np.array_equal(scores.recall(batch, name), scores.recall(other, name)), name


def test_references_of_questions_between_visible_steps_see_only_the_past():
    batch = block("T4", index=0, split="test", batch=3, pairs=4, filler=True)
    asked = scores.probes(batch)
    for name in ("knn", "attention", "ridge", "rls"):
        got = scores.recall(batch, name)
        for row in range(3):
            for p, t in enumerate(asked.time[row]):
                values = batch.values.copy()
                values[row, t:] = 50
                assert np.allclose(scores.recall(batch._replace(values=values), name)[row, p], got[row, p])


def test_reference_bytes_follow_their_state():
    batch = block("T3", index=0, batch=2, gap=32)
    visible = 48 + 32
    expected = {"memoryless": 0, "last": 64, "filter": 4 * 12 * 17, "knn": 4 * visible * 32, "rls": 4 * (256 + 256)}
    assert {name: scores.recall_bytes(batch, name) for name in expected} == expected
    assert scores.recall_bytes(batch, "delta") == 4 * 256
    crossed = block("T6", index=0, batch=2, gap=32)
    assert scores.recall_bytes(crossed, "ridge") == 4 * (64 * 64 + 64 * 8)
    assert scores.recall_bytes(crossed, "ridge_channel") == 4 * 8 * (64 + 8)


def test_unknown_references_and_tasks_without_recall_are_refused():
    batch = block("T2", index=0, batch=2, gap=32)
    with pytest.raises(ValueError, match="not known"):
        scores.recall(batch, "median")
    with pytest.raises(ValueError, match="not known"):
        scores.recall_bytes(batch, "median")
    with pytest.raises(ValueError, match="no recall probes"):
        scores.recall(block("T8", index=0, batch=2, gap=32), "ridge")
    for score, task in ((scores.effects, "T7"), (scores.topology, "T8"), (scores.phase, "T9b")):
        with pytest.raises(ValueError, match="not known"):
            score(block(task, index=0, batch=2, gap=32), "median")
    with pytest.raises(ValueError, match="not known"):
        scores.switching_errors(block("T9", index=0, batch=2, gap=64), "median")


@pytest.mark.parametrize("task", [name for name in TASKS if name not in ("T7", "T8", "T9")])
def test_the_oracle_makes_no_error_and_the_memoryless_has_no_retention(task):
    batch = block(task, index=0, split="test", batch=6, gap=32)
    asked = scores.probes(batch)
    answer = scores.phase if task == "T9b" else scores.recall
    everything = np.ones(asked.truth.shape, bool)
    oracle, none = (scores.squared_errors(answer(batch, n), asked.truth, everything) for n in ("oracle", "memoryless"))
    assert scores.retention(oracle, none) == 1 and scores.retention(none, none) == 0


def test_retention_pools_sums_and_subtracts_the_oracle():
    error, none = np.array([1.0, 3.0]), np.array([2.0, 6.0])
    assert scores.retention(error, none) == pytest.approx(0.5)
    assert scores.retention(error, none, np.array([1.0, 1.0])) == pytest.approx(1 - 2 / 6)
    assert np.isnan(scores.retention(error, np.zeros(2)))
    assert scores.nmse(error, none) == pytest.approx(0.5)
    assert scores.aurc(np.array([1.0, 0.5, 0.0, 0.0, -0.5])) == pytest.approx(0.2)
    assert scores.failed(np.array([[0.09, 1.0], [0.1, 0.0], [np.nan, 1.0]])).tolist() == [True, False, True]
    with pytest.raises(ValueError, match="not finite"):
        scores.squared_errors(np.full((1, 1, 1), np.nan), np.zeros((1, 1, 1)), np.ones((1, 1), bool))


def test_squared_errors_count_the_probes_in_use_only():
    forecast, truth = np.array([[[1.0, 2.0], [np.nan, 5.0]]]), np.zeros((1, 2, 2))
    assert scores.squared_errors(forecast, truth, np.array([[True, False]])).tolist() == [5]
    assert scores.squared_errors(forecast, truth, np.array([[[False, True], [False, True]]])).tolist() == [29]


def test_half_lives_are_interpolated_in_the_logarithm_and_censored_at_the_ends():
    grid = np.array([32, 128, 512])
    assert scores.half_life(grid, np.array([0.9, 0.6, 0.4])).at == pytest.approx(256)
    assert scores.half_life(grid, np.array([0.4, 0.3, 0.1])) == (32, "below")
    assert scores.half_life(grid, np.array([0.9, 0.8, 0.7])) == (512, "above")
    assert scores.half_life(grid, np.array([0.9, 0.5, 0.1])) == (pytest.approx(128), None)
    assert scores.non_increasing(np.array([0.5, 0.9, 0.1, 0.2])).tolist() == pytest.approx([0.7, 0.7, 0.15, 0.15])
    with pytest.raises(ValueError, match="increasing"):
        scores.half_life(np.array([32, 32]), np.array([0.9, 0.1]))


def test_the_isotonic_fit_is_the_nearest_of_all(rng):
    y = rng.normal(size=5)
    fit = scores.non_increasing(y)
    assert (np.diff(fit) <= 0).all()
    others = -np.sort(-(fit + rng.normal(0, 0.3, (2000, 5))), axis=1)
    assert ((others - y) ** 2).sum(1).min() >= ((fit - y) ** 2).sum()


def test_bits_are_those_of_the_gaussian_channel_and_capped_at_the_filters():
    written = scores.written_bits(channels=16, visible=4, noise=0.2)
    assert written == pytest.approx(53.3, abs=0.05)
    ceiling = 1 - 0.04 / 4.04
    assert scores.recalled_bits(ceiling, channels=16, filter_ret=ceiling) == pytest.approx(written)
    assert scores.recalled_bits(0.9999, channels=16, filter_ret=ceiling) == pytest.approx(written)
    assert scores.recalled_bits(0.75, channels=2, filter_ret=ceiling) == pytest.approx(2)
    assert scores.recalled_bits(-3, channels=16, filter_ret=ceiling) == 0


def test_stale_intrusion_finds_the_mixture(rng):
    new, old = rng.normal(size=(2, 40, 3))
    assert scores.stale_intrusion(0.7 * new + 0.2 * old, new, old) == pytest.approx((0.7, 0.2))


def test_cross_talk_is_found_and_is_zero_on_average_without_it(rng):
    theta, parked = rng.normal(size=(300, 8, 5)), rng.integers(0, 4, (300, 8))
    current = np.take_along_axis(theta, parked[..., None], -1)[..., 0]
    own = theta[..., 4] + 0.3 * rng.normal(size=(300, 8))
    clean = scores.cross_talk(own, theta, parked, targets=4)
    assert clean.coefficients.shape == (4, 9)
    assert clean.coefficients[:, 0] == pytest.approx(1, abs=0.1) and abs(clean.score) < 3e-4
    mixed = scores.cross_talk(own + 0.5 * current[:, 7:], theta, parked, targets=4)
    assert mixed.coefficients[:, -1] == pytest.approx(0.5, abs=0.1)
    assert mixed.score == pytest.approx(0.25 / 8, rel=0.25)
    stuck = scores.cross_talk(current, theta, parked, targets=4)
    assert stuck.coefficients[:, 1] == pytest.approx(1) and stuck.coefficients[:, 0] == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="take more"):
        scores.cross_talk(own[:9], theta[:9], parked[:9], targets=4)


def test_control_regret_is_none_for_the_truth_and_whole_for_a_guess(rng):
    truth, goal = rng.normal(size=(4000, 6, 4)), rng.normal(size=(4000, 4))
    assert scores.control_regret(truth, truth, goal) == 0
    assert scores.control_regret(rng.normal(size=truth.shape), truth, goal) == pytest.approx(1, abs=0.05)
    assert scores.control_regret(-truth, truth, goal) > 1.5
    assert scores.effect_retention(truth / 2, truth) == pytest.approx(0.75)


def cells(rng, gain, *, seeds=10, gaps=5, sequences=200, spread=0.02):
    """Errors of two mixers whose Ret differs by `gain`, on shared sequences, with a random effect per seed."""
    none = rng.chisquare(8, (seeds, gaps, sequences))
    noise = none * rng.normal(0, 0.05, none.shape)
    shift = gain + spread * rng.normal(size=(seeds, 1, 1))
    return none * (0.5 - shift) + noise, none * 0.5 + noise, none


def test_the_bootstrap_covers_the_difference_and_its_width_is_that_of_the_seeds(rng):
    # Ten paired seeds of spread .05 give half a width of 1.96 * .05 / sqrt(10) = .031, less the bootstrap's sqrt(9/10).
    ours, theirs, none = cells(rng, 0.1, spread=0.05, sequences=500)
    got = scores.paired_difference(ours, theirs, none, draws=4000, resamples=100)
    low, high = got.interval()
    seeds = np.mean(scores.retention(ours, none) - scores.retention(theirs, none), -1)
    assert got.estimate == pytest.approx(seeds.mean())
    assert low < 0.1 < high
    assert (high - low) / 2 == pytest.approx(1.96 * seeds.std() / 10**0.5, rel=0.1)


def test_sequences_count_when_seeds_agree(rng):
    none = rng.chisquare(8, (4, 2, 50))
    ours = none * 0.5 * rng.uniform(0, 2, none.shape)
    one = scores.paired_difference(ours, 0.5 * none, none, draws=2000, resamples=400)
    many = scores.paired_difference(
        *(np.tile(x, (1, 1, 16)) for x in (ours, 0.5 * none, none)), draws=2000, resamples=400
    )
    assert one.draws.std() > many.draws.std() > 0
    pair = scores.paired_difference(ours, ours, none, draws=50, resamples=20)
    assert (pair.draws == 0).all(), "paired: what both share does not count"


def test_failed_seeds_are_counted_apart_and_can_be_left_out(rng):
    ours, theirs, none = cells(rng, 0.1, seeds=6)
    ours[0] = none[0] * 1.1
    got = scores.paired_difference(ours, theirs, none, common=(ours * 1.04, theirs), draws=200, resamples=20)
    assert got.failure == pytest.approx((1 / 6, 0))
    assert got.nmse_ratio == pytest.approx(1.04 * ours.sum() / theirs.sum())
    use = ~scores.failed(scores.retention(ours, none))
    learned = scores.paired_difference(ours, theirs, none, use=use, draws=200, resamples=20)
    assert learned.failure == (0, 0) and learned.estimate > got.estimate
    with pytest.raises(ValueError, match="at least 2"):
        scores.paired_difference(ours, theirs, none, use=np.arange(6) < 1)


def test_a_cells_interval_holds_its_value(rng):
    ours, _, none = cells(rng, 0.2)
    value, low, high = scores.mean_interval(ours[:, 0], none[:, 0], draws=1000, resamples=50)
    assert low < value < high and value == pytest.approx(0.7, abs=0.03) and high - low < 0.1


def test_holm_steps_down():
    assert scores.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert scores.holm([0.9, 0.8]) == [1, 1]


def normal(mean, sd, *, nmse=1.0):
    """A difference with normal draws, exact quantiles."""
    levels = (np.arange(10_000) + 0.5) / 10_000
    grid = np.sort(np.random.default_rng(0).normal(size=10_000))
    grid = (grid - grid.mean()) / grid.std()
    assert np.quantile(grid, levels[9750]) == pytest.approx(1.96, abs=0.1)
    return scores.Difference(mean, mean + sd * grid, (0.0, 0.0), nmse)


def test_bounds_of_a_family_are_wider_and_follow_holms_order():
    family = {
        "sure": normal(0.5, 0.02),
        "near": normal(0.1, 0.02),
        "none": normal(0.0, 0.02),
        "less": normal(-0.1, 0.02),
    }
    bounds = scores.holm_bounds(family)
    assert list(bounds) == list(family)
    assert [bounds[name].level for name in family] == pytest.approx(
        [1 - 0.05 / 4, 1 - 0.05 / 3, 1 - 0.05 / 2, 1 - 0.05 / 2]
    )
    for name, bound in bounds.items():
        low, high = family[name].interval()
        assert bound.low < low and bound.high > high
    alone = scores.holm_bounds({"near": family["near"]})["near"]
    assert alone[:2] == family["near"].interval() and alone.low > 0.05
    # near: .1 - 2.39 * .02 exceeds .05 at its own level in the family, and would not at a quarter more noise
    assert bounds["near"].low > 0.05
    assert scores.holm_bounds(family | {"near": normal(0.1, 0.025)})["near"].low < 0.05


@pytest.mark.parametrize(
    ("means", "sd", "nmse", "expected"),
    [
        ((0.2, 0.2, 0.0), 0.01, 1.0, "better"),
        ((0.2, 0.2, 0.0), 0.01, 1.05, "better"),
        ((0.2, 0.2, 0.0), 0.01, 1.06, "inconclusive"),
        ((0.2, 0.2, 0.0), 0.01, float("nan"), "inconclusive"),
        ((0.2, 0.2, -0.2), 0.01, 1.0, "inconclusive"),
        ((0.2, 0.0, 0.0), 0.01, 1.0, "inconclusive"),
        ((0.01, 0.0, -0.01), 0.01, 1.0, "equivalent"),
        ((0.01, 0.0, -0.01), 0.04, 1.0, "inconclusive"),
        ((-0.2, -0.2, 0.0), 0.01, 1.0, "worse"),
        ((-0.2, -0.2, 0.2), 0.01, 1.0, "inconclusive"),
    ],
)
def test_the_claim_rule_is_the_pre_registered_one(means, sd, nmse, expected):
    family = {str(i): normal(mean, sd, nmse=nmse) for i, mean in enumerate(means)}
    bounds = scores.holm_bounds(family)
    assert scores.verdict(list(family.values()), list(bounds.values())) == expected
    with pytest.raises(ValueError, match="expected one each"):
        scores.verdict(list(family.values()), list(bounds.values())[1:])


def test_equivalence_is_two_one_sided_tests():
    assert scores.equivalent(normal(0.0, 0.029)) and not scores.equivalent(normal(0.0, 0.032))  # .05 / 1.645 = .0304
    assert not scores.equivalent(normal(0.04, 0.01))


def memory(rng, *, channelwise=False, decay=0.9, T=40, Dk=6, Dv=3, lead=(4,)):
    """Inputs of a random gated delta memory."""
    k = rng.normal(size=(*lead, T, Dk))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    beta = rng.uniform(0.2, 1, (*lead, T, 1))
    z = beta * rng.normal(size=(*lead, T, Dv))
    alpha = rng.uniform(decay, 1, (*lead, T, Dk if channelwise else 1))
    return k, beta * k, z, alpha, rng.normal(size=(*lead, Dk))


@pytest.mark.parametrize("channelwise", [False, True])
def test_a_contribution_is_what_the_read_loses_without_the_write(rng, channelwise):
    k, e, z, alpha, q = memory(rng, channelwise=channelwise)
    exposure = np.isin(np.arange(40), [3, 4, 5, 11])
    whole = scores.run_memory(k, e, z, alpha, q, scale=0.4)
    without = scores.run_memory(k, e, np.where(exposure[:, None], 0, z), alpha, q, scale=0.4)
    got = scores.contribution(k, e, z, alpha, q, exposure, scale=0.4)
    assert np.abs(got - (whole - without)).max() < 1e-10
    everything = scores.contribution(k, e, z, alpha, q, np.ones(40, bool), scale=0.4)
    assert np.abs(everything - whole).max() < 1e-10


@pytest.mark.parametrize("channelwise", [False, True])
def test_decay_loss_and_erase_overlap_add_up(rng, channelwise):
    k, e, z, alpha, q = memory(rng, channelwise=channelwise)
    exposure = np.arange(40) < 4
    got = scores.attribute(k, e, z, alpha, q, exposure)
    assert np.allclose(got.decay_loss + got.erase_overlap, np.log(got.survived))
    if not channelwise:  # a scalar decay multiplies whatever is there
        assert np.allclose(got.decay_loss, np.log(alpha[:, 4:, 0]).sum(1))
        assert np.allclose(got.survived, got.without_erase * got.without_decay)
    pure = scores.attribute(k, 0 * e, z, alpha, q, exposure)
    assert np.allclose(pure.erase_overlap, 0) and (pure.decay_loss < 0).all()
    kept = scores.attribute(k, e, z, np.ones_like(alpha), q, exposure)
    assert np.allclose(kept.decay_loss, 0)
    with pytest.raises(ValueError, match="no step"):
        scores.attribute(k, e, z, alpha, q, np.zeros(40, bool))


def test_orthogonal_keys_lose_nothing_to_erasing_and_decay_takes_its_product():
    T, D = 9, 9
    k = np.eye(D)[None]
    z = np.ones((1, T, 2))
    alpha = np.full((1, T, 1), 0.9)
    got = scores.attribute(k, k, z, alpha, np.eye(D)[:1], np.arange(T) < 1)
    assert got.survived == pytest.approx(0.9**8) and got.erase_overlap == pytest.approx(0, abs=1e-12)


def test_many_delta_writes_leave_the_residual_outside_their_span(rng):
    common, rare = rng.normal(size=(2, 5, 12)), rng.normal(size=(2, 12))
    common /= np.linalg.norm(common, axis=-1, keepdims=True)
    rare /= np.linalg.norm(rare, axis=-1, keepdims=True)
    k = np.concatenate([rare[:, None], common[:, rng.integers(0, 5, 3000)]], 1)
    z = rng.normal(size=(2, 3001, 2))
    coefficient = scores.write_coefficients(k, k, np.ones((2, 3001, 1)), rare)[:, 0]
    assert coefficient == pytest.approx(scores.span_residual(common, rare), abs=1e-6)
    got = scores.attribute(k, k, z, np.ones((2, 3001, 1)), rare, np.arange(3001) < 1)
    assert got.erase_overlap == pytest.approx(np.log(coefficient), abs=1e-6)


@pytest.mark.parametrize(
    ("keys", "common", "alpha", "rare", "revised"),
    [
        ("orthonormal", 8, 1.0, 1.00, 0.010),
        ("orthonormal", 8, 0.999, 0.593, 0.010),
        ("orthonormal", 8, 0.99, 0.005, 0.017),
        ("random", 8, 1.0, 0.50, 0.011),
        ("random", 8, 0.999, 0.293, 0.012),
        ("random", 8, 0.99, 0.0, 0.058),
        ("random", 12, 1.0, 0.25, 0.058),
        ("random", 12, 0.999, 0.135, 0.063),
        ("random", 12, 0.99, -0.02, 0.18),
    ],
)
def test_memories_set_by_hand_reach_the_numbers_of_the_specification(keys, common, alpha, rare, revised):
    got = scores.hand_set_memory(keys=keys, common=common, alpha=alpha)
    # Three standard errors of the difference: the specification's number is a mean over 300 trials, too.
    assert got.rare == pytest.approx(rare, abs=0.002 + 3 * 2**0.5 * got.rare_error)
    assert got.revised_nmse == pytest.approx(revised, rel=0.2)


def test_memories_that_only_decay_trade_the_rare_against_the_revised():
    kept = scores.hand_set_memory(keys="orthonormal", common=8, delta=False)
    lost = scores.hand_set_memory(keys="orthonormal", common=8, delta=False, alpha=0.99)
    assert (kept.rare, kept.revised_nmse) == (pytest.approx(1, abs=0.01), pytest.approx(0.53, abs=0.02))
    assert (lost.rare, lost.revised_nmse) == (pytest.approx(0.99**520, abs=1e-4), pytest.approx(0.012, abs=0.002))
    with pytest.raises(ValueError, match="do not fit"):
        scores.hand_set_memory(keys="orthonormal", common=16)


def test_prediction_over_cells_is_scored_by_explained_variance(rng):
    predicted = rng.uniform(size=50)
    assert scores.explained(predicted, 0.2 + 0.5 * predicted) == pytest.approx(1)
    assert scores.explained(predicted, rng.normal(size=50)) < 0.2
    assert scores.combine_heads(np.array([[1.0, 0.0]]), np.array([[3.0, 1.0]])) == pytest.approx(0.75)
