"""The retention tasks do what their definition says, from a seed alone."""

import json

import numpy as np
import pytest

from tsgdn.data import retention
from tsgdn.data.retention import COMMON_PROBE, OTHER, RARE_PROBE, REENTRY, TASKS, block

AXES = {"T3": {"channels": 3}, "T5": {"channels": 2}, "T4": {"channels": 2, "pairs": 4}}


def draw(task, **change):
    """A small block."""
    gap = 200 if task == "T9" else 48
    return block(task, **({"index": 0, "split": "test", "batch": 5, "gap": gap} | AXES.get(task, {}) | change))


def equal(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("task", TASKS)
def test_a_block_depends_on_its_seed_alone(task):
    one = draw(task)
    assert retention.digest(one) == retention.digest(draw(task))
    for change in ({"seed": 1}, {"split": "train"}, {"split": "validation"}, {"index": 1}):
        other = draw(task, **change)
        assert retention.digest(one) != retention.digest(other)
        same = np.isin(other.values, one.values).mean()
        assert same < 0.01 or task == "T4", "streams of other seeds share no numbers but by chance; T4 has blanks"


@pytest.mark.parametrize("task", TASKS)
def test_hidden_values_never_reach_the_tokens(task):
    batch = draw(task)
    other = batch._replace(values=np.where(batch.observed, batch.values, np.float32(77)))
    ours, theirs = retention.tokens(batch), retention.tokens(other)
    assert np.array_equal(ours.inputs, theirs.inputs)
    assert batch.observed.all() or not np.array_equal(ours.targets, theirs.targets)


@pytest.mark.parametrize("task", TASKS)
def test_a_token_knows_its_step_and_the_next_cue_and_action_but_not_the_next_value(task):
    batch = draw(task)
    got = retention.tokens(batch)
    C, dc, du = (x.shape[-1] for x in (batch.values, batch.cue, batch.action))
    t = 20
    parts = np.split(got.inputs[:, t], np.cumsum([C, C, dc, dc, du, du]), axis=-1)
    shown = np.where(batch.observed[:, t], batch.values[:, t], 0)
    expected = (
        shown,
        batch.observed[:, t],
        batch.cue[:, t],
        batch.cue[:, t + 1],
        batch.action[:, t],
        batch.action[:, t + 1],
    )
    assert all(np.array_equal(a, b) for a, b in zip(parts[:6], expected, strict=True))
    assert np.array_equal(got.targets[:, t], batch.values[:, t + 1])
    if task == "T2e":
        assert np.array_equal(parts[6][:, 0], batch.elapsed[:, t])
        assert np.array_equal(got.gap[:, t], batch.elapsed[:, t] - 1)
    else:
        assert parts[6].size == 0 and (got.gap == 0).all()


@pytest.mark.parametrize("task", TASKS)
def test_the_loss_weights_are_means_over_probes_reentries_and_visible_steps(task):
    batch = draw(task)
    weight = retention.tokens(batch).weight.astype(float)
    kind = np.broadcast_to(batch.kind if batch.kind.ndim == 3 else batch.kind[..., None], batch.values.shape)[:, 1:]
    shown = 0.1 * batch.observed[:, 1:] / max(1, batch.observed[:, 1:].sum())
    for member in (RARE_PROBE, COMMON_PROBE, REENTRY):
        if (kind == member).any():
            own = (weight - shown)[kind == member]
            assert own.sum() == pytest.approx(1, rel=1e-4)
            assert np.ptp(own) < 1e-6
    rest = (kind != RARE_PROBE) & (kind != COMMON_PROBE) & (kind != REENTRY)
    assert np.allclose(weight[rest], shown[rest], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("task", ["T2", "T3", "T5"])
@pytest.mark.parametrize("gap", [0, 1, 33, 300])
def test_the_gap_is_exact_and_the_rare_regimes_stay_away(task, gap):
    batch = draw(task, gap=gap, exposures=2)
    M, R, opening = batch.meta["common"], batch.meta["rare"], batch.meta["preamble"]
    assert opening == (M + 2 * R) * 4
    assert batch.values.shape[1] == opening + gap + R + 4
    between = batch.regime[:, opening : opening + gap]
    assert (between < M).all() and batch.observed[:, : opening + gap].all()
    assert not batch.observed[:, opening + gap :].any()
    asked = batch.regime[:, opening + gap :]
    kind = batch.kind[:, opening + gap :]
    for row in range(len(asked)):
        assert sorted(asked[row][kind[row] == RARE_PROBE]) == list(range(M, M + R))
        assert (
            len(set(asked[row][kind[row] == COMMON_PROBE])) == 4 and (asked[row][kind[row] == COMMON_PROBE] < M).all()
        )
        counts = np.bincount(batch.regime[row, :opening], minlength=M + R)
        assert (counts == [4] * M + [8] * R).all()


def test_regimes_of_the_gap_follow_zipfs_law_in_segments_of_mean_sixteen():
    batch = draw("T2", gap=8192, batch=16)
    between = batch.regime[:, batch.meta["preamble"] : batch.meta["preamble"] + 8192]
    switches = (np.diff(between.astype(int), axis=1) != 0).sum()
    assert 16 * 8192 / switches == pytest.approx(16, rel=0.06)
    # Choosing by w among the others visits r in proportion to w_r (1 - w_r).
    w = 1 / np.arange(1, 9) / np.sum(1 / np.arange(1, 9))
    assert np.allclose(np.bincount(between.ravel()) / between.size, w * (1 - w) / np.sum(w * (1 - w)), atol=0.02)


@pytest.mark.parametrize("task", ["T2", "T3", "T5"])
def test_a_reentry_is_the_first_step_of_a_segment_whose_value_was_seen(task):
    batch = draw(task, gap=200, exposures=2)
    for row in range(len(batch.regime)):
        seen, previous = set(), None
        for t in np.flatnonzero(batch.observed[row, :, 0]):
            now = (batch.regime[row, t], batch.version[row, t])
            expected = 0 if now == previous else REENTRY if now in seen else OTHER
            assert batch.kind[row, t] == expected
            seen.add(now)
            previous = now


@pytest.mark.parametrize("revisions", [1, 2, 4])
def test_revised_values_come_one_version_at_a_time_when_they_are_due(revisions):
    gap = 256
    batch = draw("T5", gap=gap, revisions=revisions, batch=12)
    M, opening = batch.meta["common"], batch.meta["preamble"]
    for row in range(len(batch.regime)):
        latest = np.zeros(M, int)
        for t in range(opening, opening + gap):
            r = batch.regime[row, t]
            if t == opening or r != batch.regime[row, t - 1]:
                latest[r] += (revisions + 1) * (t - opening) // gap > latest[r]
            assert batch.version[row, t] == latest[r]
        asked = batch.kind[row] == COMMON_PROBE
        assert (batch.version[row, asked] == latest[batch.regime[row, asked]]).all()
        assert (batch.version[row, asked] > 0).sum() == min(4, (latest > 0).sum()), (
            "revised regimes are asked for first"
        )
        assert (batch.version[row, batch.kind[row] == RARE_PROBE] == 0).all()
    row = np.arange(len(batch.regime))[:, None]
    assert np.array_equal(batch.mean, batch.truth["theta"][row, batch.regime, batch.version])


@pytest.mark.parametrize(("similarity", "spread"), [(0, 0.25), (0.3, 0.21), (0.6, 0.12), (0.9, 0.03)])
def test_codes_have_the_mean_cosine_and_spread_asked_for(similarity, spread):
    codes = retention.draw_codes(np.random.default_rng(0), batch=400, count=6, width=16, similarity=similarity)
    cosine = np.einsum("bid,bjd->bij", codes, codes)[:, *np.triu_indices(6, 1)]
    assert np.allclose(np.linalg.norm(codes, axis=-1), 1)
    assert cosine.mean() == pytest.approx(similarity, abs=0.03)
    assert cosine.std() == pytest.approx(spread, abs=0.02)


def test_noise_has_the_scales_asked_for():
    batch = draw("T3", gap=400, cue_noise=0.2, noise=0.5, batch=20)
    clean = batch.truth["codes"][np.arange(20)[:, None], batch.regime]
    assert np.std(batch.values - batch.mean) == pytest.approx(0.5, rel=0.02)
    assert np.sqrt(np.mean(np.sum((batch.cue - clean) ** 2, -1))) == pytest.approx(0.2, rel=0.02)
    assert np.array_equal(draw("T3", noise=0).values, draw("T3", noise=0).mean)


def test_the_repeated_haystack_is_the_same_everywhere_and_of_unit_power():
    batch = draw("T1", gap=64, noise=0, cue_noise=0)
    other = draw("T1", gap=64, noise=0, cue_noise=0, seed=9)
    inside = slice(8, 72)
    assert np.array_equal(batch.values[:, inside], other.values[:, inside])
    assert np.array_equal(batch.cue[:, inside], other.cue[:, inside])
    assert np.array_equal(batch.values[:, 8:24], batch.values[:, 24:40])
    assert np.mean(batch.values[0, inside] ** 2) == pytest.approx(1, rel=1e-5)
    assert not batch.observed[:, -1].any() and batch.observed[:, :-1].all()
    assert (batch.mean[:, -1] == batch.mean[:, 0]).all()


def test_events_add_up_to_the_gap_and_keep_the_cue_where_it_is_needed():
    batch = draw("T2e", gap=400, batch=20)
    opening = batch.meta["preamble"]
    inside = slice(opening, opening + 200)
    assert (batch.elapsed >= 1).all()
    assert np.allclose(batch.elapsed[:, inside].sum(1), 400, rtol=1e-5)
    extra = batch.elapsed[:, inside].ravel() - 1
    assert extra.mean() == pytest.approx(1, rel=1e-4) and extra.std() == pytest.approx(1, rel=0.05)
    there = np.abs(batch.cue).sum(-1) > 0
    assert there[:, -8:].all() and there[(batch.kind == REENTRY) | (batch.kind == OTHER)].all()
    assert there[batch.kind == 0].mean() == pytest.approx(0.5, abs=0.03)


def test_each_pair_is_shown_once_and_asked_once_mostly_soon():
    batch = draw("T4", pairs=8, batch=200)
    gap = batch.meta["gap"]
    assert batch.values.shape[1] == 8 + gap + 32
    assert (np.sort(batch.regime[:, :8], 1) == np.arange(8)).all()
    asked = batch.kind == RARE_PROBE
    assert (np.sort(batch.regime[asked].reshape(200, 8), 1) == np.arange(8)).all()
    assert not asked[:, : 8 + gap].any() and not batch.observed[:, 8:].any()
    assert (batch.cue[~asked & (np.arange(asked.shape[1]) >= 8)] == 0).all()
    # A pair's first choice is by slot^(a - 1).
    odds = np.arange(1.0, 33) ** -0.99
    first = np.bincount(batch.truth["slot"][:, 0], minlength=32) / 200
    assert first[0] == pytest.approx(odds[0] / odds.sum(), abs=0.09)
    filled = draw("T4", pairs=8, filler=True)
    assert filled.observed[:, 8 + gap :].any() and not filled.observed[filled.kind == RARE_PROBE].any()


@pytest.mark.parametrize("coincidence", [0, 0.25, 1])
def test_target_channels_stay_parked_while_others_switch(coincidence):
    batch = draw("T6", gap=400, batch=8, coincidence=coincidence)
    opening, targets = batch.meta["preamble"], batch.meta["targets"]
    assert (opening, targets, batch.regime.shape[-1]) == (20, 4, 8)
    path = batch.regime[:, opening - 1 : -1].astype(int)
    assert (path < 4).all() and (np.diff(path[..., :targets], axis=1) == 0).all()
    assert np.array_equal(path[:, -1], batch.truth["parked"])
    moved = (np.diff(path, axis=1) != 0).sum(-1)
    assert (moved > 0).mean() == pytest.approx(1 / 8, abs=0.03)
    if coincidence in (0, 1):
        assert set(moved[moved > 0]) == {4 if coincidence else 1}
    assert (batch.kind[:, opening:-1] == REENTRY).sum() == moved.sum()
    for channel in range(8):
        assert (np.sort(batch.regime[:, :20:4, channel], 1) == np.arange(5)).all()
    assert (batch.regime[:, -1, :targets] == 4).all() and np.array_equal(
        batch.regime[:, -1, targets:], path[:, -1, targets:]
    )
    assert not batch.observed[:, -1].any()


def test_similar_channels_share_their_codes_and_the_twin_holds_the_same_streams():
    batch = draw("T6", similarity=0.6, batch=100, channels=2)
    codes = batch.truth["codes"]
    across = np.einsum("brd,brd->br", codes[:, 0], codes[:, 1])
    within = np.einsum("bd,bd->b", codes[:, 0, 0], codes[:, 0, 1])
    assert across.mean() == pytest.approx(0.6, abs=0.05) and within.mean() == pytest.approx(0, abs=0.08)
    twin = retention.split_channels(batch)
    assert twin.values.shape == (200, batch.values.shape[1], 1) and twin.cue.shape[-1] == 8
    assert np.array_equal(twin.values[7, :, 0], batch.values[3, :, 1])
    assert np.array_equal(twin.cue[7], batch.cue[3, :, 8:])
    assert np.array_equal(twin.truth["codes"][7, 0], codes[3, 1])


@pytest.mark.parametrize("lag", [1, 4, 16])
def test_branches_differ_by_the_effect_of_the_action_alone(lag):
    do, none, common = (draw("T7", lag=lag, do=branch) for branch in ("rare", "none", 2))
    at = do.meta["branch_step"]
    assert np.array_equal(do.values[:, : at + lag], none.values[:, : at + lag])
    effects = do.truth["effects"]
    assert np.allclose(do.values[:, -1] - none.values[:, -1], effects[:, -1], atol=1e-5)
    assert np.allclose(do.mean[:, -1] - none.mean[:, -1], effects[:, -1], atol=1e-5)
    assert np.allclose(common.mean[:, -1] - none.mean[:, -1], effects[:, 2], atol=1e-5)
    assert (do.kind[:, -1] == RARE_PROBE).all() and (none.kind[:, -1] == COMMON_PROBE).all()
    assert not do.observed[:, at + 1 :].any() and do.observed[:, : at + 1].all()
    assert not none.action[:, at:].any() and not do.action[:, at + 1 :].any()
    mixed = draw("T7", lag=lag, do="random", batch=40)
    assert set(mixed.truth["branch"]) == {-1, 5}


def test_rare_actions_are_used_four_times_and_common_effects_drift():
    batch = draw("T7", gap=2000, batch=40, do="none", noise=0)
    assert ((batch.regime == 5).sum(1) == 4).all() and ((batch.regime[:, :64] == 5).sum(1) == 4).all()
    assert (batch.regime[:, 64:-5] >= 0).mean() == pytest.approx(0.25, abs=0.01)
    residual = batch.values[:, 4:] - 0.5 * batch.values[:, 3:-1]
    assert np.allclose(residual, batch.truth["at_use"][:, :-4], atol=1e-5)
    own = batch.truth["at_use"]
    rare = own[batch.regime == 5].reshape(40, 4, -1)
    assert np.ptp(rare, axis=1).max() == 0
    assert own[(batch.regime >= 0) & (batch.regime < 5)].std() == pytest.approx(1, abs=0.05), "drift keeps the variance"


@pytest.mark.parametrize("channels", [4, 8])
@pytest.mark.parametrize("share", [0, 0.5])
def test_topologies_are_cycles_through_all_channels(channels, share):
    batch = draw("T8", channels=channels, shared_edges=share, batch=10)
    P = batch.truth["topology"].astype(float)
    assert P.shape == (10, 5, channels, channels)
    power = np.eye(channels)
    for n in range(1, channels + 1):
        power = P @ power
        trace = np.trace(power, axis1=-2, axis2=-1)
        assert (trace == (channels if n == channels else 0)).all()
    assert ((P.sum(1) == 5).sum((1, 2)) >= share * channels).all()


def test_forks_of_a_topology_stream_differ_by_the_impulse_alone():
    zero, three = (draw("T8", impulse=i) for i in (0, 3))
    assert np.array_equal(zero.values[:, :-2], three.values[:, :-2])
    assert np.array_equal(zero.values[:, -2], np.tile(3 * np.eye(8)[0], (5, 1)))
    column = three.truth["topology"][:, 4, :, 3]
    assert np.allclose(three.mean[:, -1], 2.7 * column)
    assert (three.regime[:, -2:] == 4).all() and (three.regime[:, :64] == 4).all()
    assert (three.regime[:, 64:-2] < 4).all() and three.values.shape[1] == 64 + 128 + 48 + 2
    row = np.arange(5)[:, None]
    law = 0.9 * three.truth["topology"][row, three.regime[:, 1:-2]]
    assert np.allclose(three.mean[:, 1:-2], np.einsum("btij,btj->bti", law, three.values[:, :-3]), atol=1e-5)


def test_switching_streams_dwell_and_rotate_as_defined():
    batch = draw("T9", gap=4000, batch=20)
    Q = batch.truth["rotation"].astype(float)
    assert np.allclose(Q @ Q.swapaxes(-1, -2), np.eye(4), atol=1e-5)
    edges = [np.flatnonzero(np.diff(row, prepend=-1)) for row in batch.regime]
    stays = np.concatenate([np.diff(edge) for edge in edges])
    assert stays.min() >= 16 and stays.max() <= 512
    assert (stays < 32).mean() == pytest.approx(1 - 2**-1.5, abs=0.04)
    row = np.arange(20)[:, None]
    law = 0.9 * Q[row, batch.regime[:, 1:]]
    assert np.allclose(batch.mean[:, 1:], np.einsum("btij,btj->bti", law, batch.values[:, :-1]), atol=1e-4)
    assert np.var(batch.values) == pytest.approx(1 / 0.19, rel=0.05)
    rows, steps, gaps = retention.reentries(batch)
    for r, s, g in zip(rows, steps, gaps, strict=True):
        assert batch.regime[r, s] == 4 and (batch.regime[r, s - g : s] < 4).all() and batch.regime[r, s - g - 1] == 4
        assert (batch.kind[r, s : s + 8] == RARE_PROBE)[: 4000 - s].all()
    inside = steps + 8 <= 4000
    assert (batch.kind == RARE_PROBE).sum() == 8 * inside.sum() + (4000 - steps[~inside]).sum() > 0


def test_mixed_switches_blend_the_laws_around_the_switch():
    sharp, mixed = (draw("T9", mixed=flag, gap=400) for flag in (False, True))
    assert np.array_equal(sharp.regime, mixed.regime)
    Q = 0.9 * mixed.truth["rotation"].astype(float)
    row, t = 0, int(np.flatnonzero(np.diff(mixed.regime[0]))[0]) + 1
    old, new = (Q[row, mixed.regime[row, s]] for s in (t - 1, t))
    for step, weight in ((t, 0.5), (t + 4, 1 / (1 + np.exp(-0.25))), (t - 4, 1 / (1 + np.exp(0.25)))):
        law = weight * new + (1 - weight) * old
        assert np.allclose(mixed.mean[row, step], law @ mixed.values[row, step - 1], atol=1e-5)


def test_cues_of_switching_streams_can_be_noisy_or_absent():
    assert draw("T9", cue="none").cue.shape[-1] == 0
    assert np.array_equal(draw("T9", cue="none").values, draw("T9").values)
    spread = [
        np.std(x.cue - x.truth["codes"][np.arange(5)[:, None], x.regime]) * 4
        for x in (draw("T9"), draw("T9", cue="noisy"))
    ]
    assert np.allclose(spread, [0.05, 0.5], rtol=0.05)


@pytest.mark.parametrize("phases", [2, 3, 5])
def test_phases_advance_by_their_pulses_and_all_were_shown(phases):
    batch = draw("T9b", phases=phases, gap=640)
    shift = batch.action @ np.arange(1, phases)
    phase = batch.version.astype(int)
    assert ((phase[:, :1] + np.cumsum(shift, 1)) % phases == phase).all()
    assert np.array_equal(batch.mean, np.take_along_axis(batch.truth["theta"], phase[..., None], 1))
    assert (np.sort(phase[:, : 16 * phases : 16], 1) == np.arange(phases)).all()
    assert (shift[:, 16 * phases :] > 0).mean() == pytest.approx(1 / 16, abs=0.015)
    assert batch.observed[:, : 16 * phases].all() and not batch.observed[:, 16 * phases :].any()


def test_controls_change_one_thing_and_leave_the_rest():
    plain = draw("T3")
    hidden, new, shown = (draw("T3", control=name) for name in ("no_exposure", "new_cue", "shown"))
    assert np.array_equal(plain.values, hidden.values) and np.array_equal(plain.cue, hidden.cue)
    rare = plain.regime >= plain.meta["common"]
    assert not hidden.observed[rare].any() and np.array_equal(hidden.observed[~rare], plain.observed[~rare])
    asked = plain.kind == RARE_PROBE
    differs = (plain.cue != new.cue).any(-1)
    assert differs[asked].all() and not differs[~asked].any()
    assert shown.values.shape[1] == plain.values.shape[1] + 16
    assert (shown.regime[:, -24:-8] >= 8).all() and shown.observed[:, -24:-8].all()
    fixed = [draw("T3", control="fixed", split=split, seed=seed) for split, seed in (("train", 0), ("test", 3))]
    assert np.array_equal(fixed[0].truth["theta"], fixed[1].truth["theta"])
    assert not np.array_equal(fixed[0].values, fixed[1].values)
    assert np.ptp(fixed[0].truth["codes"], axis=0).max() == 0


def test_training_gaps_are_drawn_per_block_each_as_likely():
    gaps = [retention.training_gap(retention.Streams(task=2, block=i)) for i in range(700)]
    values, counts = np.unique(gaps, return_counts=True)
    assert tuple(values) == retention.TRAIN_GAPS and counts.min() > 65
    batch = block("T2", index=3, batch=2)
    assert batch.meta["gap"] == gaps[3] == batch.values.shape[1] - 48 - 8


def test_written_blocks_hold_the_arrays_and_their_digests(tmp_path):
    path = retention.write_blocks(tmp_path, task="T5", blocks=2, gap=32, batch=3, channels=2)
    meta = json.loads(path.read_text())
    assert meta["parameters"]["revisions"] == 1 and meta["suite"] == retention.SUITE_VERSION
    for index, (name, record) in enumerate(meta["blocks"].items()):
        batch = block("T5", index=index, split="test", gap=32, batch=3, channels=2)
        assert record == {"sha256": retention.digest(batch), "gap": 32}
        with np.load(tmp_path / name) as stored:
            assert equal(dict(stored), retention.arrays(batch))


@pytest.mark.parametrize(
    ("task", "wrong", "says"),
    [
        ("T12", {}, "not known"),
        ("T2", {"split": "dev"}, "split"),
        ("T2", {"seed": -1}, "at least 0"),
        ("T2", {"common": 1}, "followed by another"),
        ("T2", {"common": 0}, "nothing to show"),
        ("T2", {"gap": -1}, "at least 0"),
        ("T2", {"similarity": 2}, "mean cosine"),
        ("T2", {"control": "none"}, "control"),
        ("T2e", {"gap": 33}, "even"),
        ("T6", {"channels": 1}, "channels"),
        ("T6", {"coincidence": 2}, "share"),
        ("T7", {"do": "all"}, "do is"),
        ("T7", {"lag": 0}, "lag"),
        ("T8", {"shared_edges": 1}, "share"),
        ("T8", {"impulse": 8}, "impulse"),
        ("T9", {"cue": "loud"}, "cue"),
        ("T9b", {"phases": 1}, "phases"),
    ],
)
def test_wrong_arguments_are_refused_by_name(task, wrong, says):
    with pytest.raises(ValueError, match=says):
        draw(task, **wrong)
