"""A predictor that watches its forecasts come true: as much part of a series as its state, and never of the future."""

import json

import numpy as np
import pytest
import torch
from test_predictor import START, P, make_model, make_series, rows_of, stamp, walk

from tsgdn.data.series import Series
from tsgdn.model import artefact
from tsgdn.streaming import snapshot, tuning
from tsgdn.streaming.adapt import Learning
from tsgdn.streaming.durable import DurablePredictor
from tsgdn.streaming.predictor import StatefulPredictor
from tsgdn.streaming.stores import open_store
from tsgdn.streaming.tuning import Tuning


@pytest.fixture(scope="module")
def model():
    return make_model(width=16)


def watched(model, **options):
    return StatefulPredictor(model, freq="h", **{"calibrate": True, "signals": True, **options})


def held(predictor, items=None):
    return {name: tensor.numpy().tobytes() for name, tensor in predictor.state_tensors(items).items()}


def noise(item_id, steps, seed=0, spread=1.0):
    return Series(item_id, START, "h", 10 + spread * np.random.default_rng(seed).normal(size=(1, steps)))


def test_rows_cut_into_calls_in_any_way_leave_the_same_scores_and_are_worth_the_same(model):
    histories = [make_series(f"s{i}", 9 * P + i, seed=i) for i in range(5)]
    queues = {one.item_id: rows_of(one) for one in histories}
    del queues["s1"][13:17], queues["s2"][-2]
    rows = [row for queue in queues.values() for row in queue]
    whole, singly, cut = (watched(model, exact=True) for _ in range(3))
    report = whole.observe(rows)
    worth = {row[:2]: float(pit) for row, pit in zip(rows, report.pit[:, 0], strict=True)}
    assert report.pit.shape == (len(rows), 1)
    assert np.isnan(report.pit).sum() < 6 * P  # the first patches, and those after a gap
    alarms = list(whole.signals())
    found, told = {}, []
    for row in rows:
        found[row[:2]] = float(singly.observe([row]).pit[0, 0])
        told += singly.signals()
    np.testing.assert_array_equal(list(found.values()), list(worth.values()))
    assert sorted(map(str, told)) == sorted(map(str, alarms))
    assert {alarm.kind for alarm in told} > {"anomaly"}
    rng = np.random.default_rng(0)
    while any(queues.values()):
        some = [queue.pop(0) for queue in queues.values() for _ in range(rng.integers(0, 2 * P)) if queue]
        cut.observe([some[i] for i in rng.permutation(len(some))])
    for item in ("s0", "s1", "s2", "s3", "s4"):
        assert held(whole, [item]) == held(singly, [item]) == held(cut, [item])


def test_cells_of_a_patch_may_come_in_any_order_and_a_long_silence_however_it_is_told(model):
    values = walk(50 * P)
    values[:, 6 * P + 2 : 44 * P] = np.nan
    rows = rows_of(Series("a", START, "h", values))
    explicit, absent, shuffled = (watched(model, exact=True) for _ in range(3))
    explicit.observe(rows)
    given = [row for row in rows if not np.isnan(row[2])]
    for row in given:
        absent.observe([row])
    for begin in range(0, len(given), P):
        part = given[begin : begin + P]
        shuffled.observe([part[0]]) if begin == 0 else None
        shuffled.observe(part[::-1])
    scores = [{k: v for k, v in held(one).items() if k.startswith("watch")} for one in (explicit, absent, shuffled)]
    assert scores[0] == scores[1] == scores[2]
    warm = watched(model)
    warm.warm_up(Series("a", START, "h", values))
    assert warm.summary("a").count == explicit.summary("a").count
    np.testing.assert_allclose(warm.summary("a").means, explicit.summary("a").means, rtol=1e-4)


@pytest.mark.parametrize("exact", [False, True])
def test_watching_changes_no_bit_of_states_and_uncalibrated_forecasts(model, exact):
    plain, other = StatefulPredictor(model, freq="h", exact=exact), watched(model, exact=exact, learning=Learning())
    for t in range(5 * P + 2):
        rows = {f"s{i}": float(x) for i, x in enumerate(walk(4, seed=t)[0])}
        report = plain.observe(rows, timestamp=stamp(t))
        assert report.pit is None
        assert other.observe(rows, timestamp=stamp(t))._replace(pit=None) == report
    bits = held(other)
    assert {name: leaf for name, leaf in bits.items() if not name.startswith("watch")} == held(plain)
    one, two = plain.forecast(horizon=15), other.forecast(horizon=15, calibrated=False)
    np.testing.assert_array_equal(one.values, two.values)
    assert one.flags == (frozenset({"rollout"}),) * 4
    assert two.flags == (frozenset({"rollout", "uncalibrated"}),) * 4
    assert plain.signals() == ()
    with pytest.raises(ValueError, match="watches nothing"):
        plain.summary()
    listening = watched(model, calibrate=False, exact=exact)
    listening.warm_up(make_series("a", 9 * P))
    assert listening.forecast().flags == (frozenset(),)
    np.testing.assert_array_equal(listening.forecast().values, listening.forecast(calibrated=False).values)
    assert plain.nbytes_per_series < other.nbytes_per_series


def test_the_mean_error_is_the_way_that_theta_went(model):
    predictor = watched(model)
    predictor.warm_up([noise(f"s{i}", 60 * P, seed=i, spread=1 + i) for i in range(3)])
    for t in range(60 * P, 64 * P):
        predictor.observe({f"s{i}": 10.0 + i for i in range(3)}, timestamp=stamp(t))
    watch = predictor._series.watch
    state, rules = watch.conformal, watch.rules
    moved = state.scored[:3] - rules.warm
    assert (moved > 100).all()
    error = state.misses[:3] / moved[..., None] - (1 - np.array(rules.coverages))
    inside = np.abs(state.theta[:3] + watch.start) < 3
    assert inside.any()
    apart = error - state.theta[:3] / (rules.gamma * moved[..., None])
    assert np.abs(apart[inside]).max() < 1e-12


def test_calibrated_coverage_comes_to_what_was_asked_for(model):
    predictor = watched(model, calibrate=(0.5, 0.8), signals=())
    predictor.warm_up([noise(f"s{i}", 150 * P, seed=i, spread=3.0) for i in range(10)])
    summary = predictor.summary()
    assert np.abs(summary.raw.mean((0, 1)) - (0.5, 0.8)).max() > 0.05
    np.testing.assert_allclose(summary.calibrated.mean((0, 1)), np.tile((0.5, 0.8), (2, 1)), atol=0.02)
    levels = (0.1, 0.25, 0.5, 0.75, 0.9)
    ours, raw = (predictor.forecast(horizon=2 * P, quantile_levels=levels, calibrated=flag) for flag in (True, False))
    np.testing.assert_array_equal(ours.median, raw.median)
    assert (np.diff(ours.values, axis=-1) >= 0).all()
    assert not np.allclose(ours.values, raw.values)
    assert ours.flags == (frozenset(),) * 10
    stretch = np.exp(summary.theta[:, :, [0] * P + [1] * P])
    for side, c in ((1, 0), (3, 0), (0, 1), (4, 1)):
        apart = raw.values[..., side] - raw.median
        np.testing.assert_allclose(ours.values[..., side] - ours.median, stretch[..., c] * apart, rtol=1e-6, atol=1e-9)
    fresh = watched(model)
    fresh.observe([("a", START, 1.0)])
    assert "uncalibrated" in fresh.forecast().flags[0]


def test_values_after_t_do_not_reach_any_output_up_to_t(model):
    def story(values):
        predictor = watched(model, learning=Learning())
        out = []
        for t, value in enumerate(values):
            report = predictor.observe({"a": value, "b": -value}, timestamp=stamp(t))
            if t % 5 == 0:
                out.append(predictor.adapt())
            out += [report.pit, predictor.forecast(horizon=3 * P).values, str(predictor.signals())]
            out += [np.array(x) for x in predictor.summary()]
        return out

    values = walk(5 * P)[0].tolist()
    changed = [*values[: 3 * P + 1], *(5 - 3 * x for x in values[3 * P + 1 :])]
    one, two = story(values), story(changed)
    same = [a == b if isinstance(a, str) else a.tobytes() == b.tobytes() for a, b in zip(one, two, strict=True)]
    cut = len(story(values[: 3 * P + 1]))
    assert all(same[:cut])
    assert not all(same[cut:])


def test_scores_are_saved_forked_merged_and_moved_bit_for_bit(model, tmp_path):
    predictor = watched(model, learning=Learning(), exact=True)
    histories = [make_series(f"s{i}", 8 * P + 3 * i, seed=i) for i in range(12)]
    predictor.warm_up(histories)
    predictor.adapt()
    predictor.save(tmp_path / "states")
    restored, part = watched(model, learning=Learning(), exact=True), watched(model, learning=Learning(), exact=True)
    restored.load(tmp_path / "states")
    part.observe(rows_of(histories[3])[:9])
    part.load(tmp_path / "states", merge="newer")
    fork = predictor.fork()
    more = [(one.item_id, stamp(len(one) + t), float(t)) for one in histories[:5] for t in range(2 * P)]
    for other in (predictor, restored, fork, part):
        other.observe(more)
        other.adapt(["s1", "s2"])
    wanted = held(predictor, ["s0", "s1", "s3"])
    for other in (restored, fork, part):
        assert held(other, ["s0", "s1", "s3"]) == wanted
        np.testing.assert_array_equal(other.forecast(["s1"]).values, predictor.forecast(["s1"]).values)
    restored.evict([f"s{i}" for i in range(2, 11)])
    before = held(restored, ["s11"])
    restored.compact()
    assert restored._slots["s11"] == 2
    assert held(restored, ["s11"]) == before
    fork.reset("s3")
    fresh = watched(model, learning=Learning(), exact=True)
    for other in (fork, fresh):
        other.observe([("s3", stamp(i), float(i % 7)) for i in range(4 * P)])
    assert held(fork, ["s3"]) == held(fresh, ["s3"])
    for options, text in (({"calibrate": False, "signals": ()}, "is not watched"), ({"calibrate": (0.5,)}, "0.98")):
        with pytest.raises(snapshot.SnapshotRefused, match=text):
            watched(model, **options).load(tmp_path / "states")
    plain = StatefulPredictor(model, freq="h")
    plain.warm_up(histories[:1])
    plain.save(tmp_path / "plain")
    begun = watched(model)
    begun.load(tmp_path / "plain")
    assert begun.summary("s0").count == 0
    begun.observe([("s0", stamp(8 * P + t), 1.0) for t in range(3 * P)])
    assert begun.summary("s0").count > 0


def test_what_was_scored_survives_a_kill_and_eviction_to_a_store(model, tmp_path):
    def opened():
        return DurablePredictor(watched(model, exact=True), open_store(tmp_path / "store"))

    whole = watched(model, exact=True)
    durable = opened()
    for t in range(6 * P + 2):
        rows = {"a": float(t % 5), "b": float(-t)}
        whole.observe(rows, timestamp=stamp(t))
        durable.observe(rows, timestamp=stamp(t))
        if t == 3 * P + 1:
            durable.checkpoint()
        if t == 5 * P:
            durable.store.close()  # no last checkpoint: the journal holds the rest
            durable = opened()
            assert durable.recovery.ticks > 0
    for item in ("a", "b"):
        assert held(durable.predictor, [item]) == held(whole, [item])
    durable.close()


@pytest.mark.parametrize("late", [1, 2 * P - 1])
def test_late_values_and_rewound_series_are_scored_as_if_they_had_come_in_order(late):
    model = make_model().double()
    rows = rows_of(make_series("a", 11 * P + 3))
    ordered, patched = (watched(model, late_window=2) for _ in range(2))
    waiting = []
    for t, row in enumerate(rows):
        ordered.observe([row])
        if t % 9 == 4:
            patched.observe([("a", row[1], None)])
            waiting.append((t, row))
        else:
            patched.observe([row])
        while waiting and t - waiting[0][0] >= late:
            row, applied = waiting.pop(0)[1], patched.state("a").applied
            report = patched.observe([row])
            assert report.revised == 1
            for alarm in patched.signals():  # what a revision changes about the past is not told
                assert (alarm.kind, alarm.timestamp) == ("anomaly", row[1]) or alarm.timestamp >= stamp(applied)
    for _, row in waiting:
        patched.observe([row])
    one, two = ordered.state_tensors(), patched.state_tensors()
    assert set(one) == set(two)
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-9, atol=1e-9, equal_nan=True, msg=lambda m, n=name: n + m)
    back, short = ordered.fork(), watched(model, late_window=2)
    back.rewind("a", stamp(9 * P + 1))
    short.observe(rows[: 9 * P + 2])
    for field, (a, b) in zip(short.summary()._fields, zip(short.summary(), back.summary(), strict=True), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-9, atol=1e-9, err_msg=field)
    for row in rows[9 * P + 2 :]:
        back.observe([row])
    for a, b in zip(ordered.summary(), back.summary(), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="learning= needs late_window=0"):
        watched(model, late_window=2, learning=Learning())


def test_a_wild_value_is_told_at_once_and_a_drift_when_its_patch_is_finished(model):
    predictor, by_handle, deaf = watched(model), watched(model), watched(model, signals="anomaly")
    for one in (predictor, by_handle, deaf):
        one.warm_up([noise("a", 20 * P), noise("b", 20 * P, seed=1)])
        assert one.signals() == ()
    handles = by_handle.handles(["b", "a"])
    kinds = []
    for t in range(20 * P, 28 * P):
        a, b = (1e4 if t == 20 * P + 1 else 10.0), 10.0 + (40.0 if t >= 22 * P else 0.1)
        report = predictor.observe({"a": a, "b": b}, timestamp=stamp(t))
        dense = by_handle.observe_at(handles, np.array([b, a]), stamp(t))
        np.testing.assert_array_equal(dense.pit, report.pit[::-1])
        assert sorted(map(str, by_handle.signals())) == sorted(map(str, predictor.signals()))
        deaf.observe({"a": a, "b": b}, timestamp=stamp(t))
        assert {alarm.kind for alarm in deaf.signals()} <= {"anomaly"}
        if t == 20 * P + 1:
            (alarm,) = (alarm for alarm in predictor.signals() if alarm.item_id == "a")
            assert alarm[:3] == ("a", "target", "anomaly")
            assert (alarm.timestamp, alarm.since) == (stamp(t), stamp(t))
        kinds += [(alarm.item_id, alarm.kind) for alarm in predictor.signals()]
    assert ("b", "level") in kinds
    assert predictor.summary(["b"]).alarms[0, 0, 1] > 0
    with pytest.raises(ValueError, match="signal 'mood' is not known"):
        watched(model, signals=("mood",))


def test_set_aside_and_repeated_rows_are_worth_nothing(model):
    predictor = watched(model)
    predictor.observe(rows_of(make_series("a", 3 * P)))
    rows = [("a", stamp(3 * P), 3.0), ("a", stamp(3 * P), 3.0), ("a", "yesterday", 1.0), ("a", stamp(3 * P + 1), None)]
    report = predictor.observe(rows)
    assert np.isfinite(report.pit[0, 0]) != np.isfinite(report.pit[1, 0])
    assert np.isnan(report.pit[2:]).all()
    assert predictor.observe([]).pit.shape == (0, 1)


def test_only_targets_are_watched_and_each_variate_by_itself(model):
    names = ("x", "y", "z")
    predictor = watched(model, variates=names, targets=2)
    values = walk(9 * P, variates=3)
    values[1, : 4 * P] = np.nan
    predictor.warm_up(Series("a", START, "h", values, variates=names))
    count = predictor.summary("a").count[0]
    assert count.tolist() == [8 * P, 4 * P]  # y is forecast since the patch in which it began
    assert predictor.observe([("a", stamp(9 * P), [1.0, 2.0, 3.0])]).pit.shape == (1, 2)


def test_a_correction_is_learned_when_it_is_asked_for_and_by_those_who_learn(model):
    assert not hasattr(watched(model), "adapt")
    with pytest.raises(AttributeError, match="learning=Learning"):
        watched(model).adapt()
    with pytest.raises(ValueError, match="features"):
        watched(model, learning=Learning(features=2))
    frozen, adapted = (watched(model, learning=Learning(), signals=()) for _ in range(2))
    ramp = 10 + np.arange(60 * P) / P + np.random.default_rng(0).normal(size=60 * P)
    for one in (frozen, adapted):
        one.warm_up(Series("a", START, "h", ramp[None, : 40 * P]))
    np.testing.assert_array_equal(frozen.forecast().values, adapted.forecast().values)
    assert adapted.adapt().tolist() == [39 * P + 38 * P]
    assert adapted.adapt(["a"]).tolist() == [0]
    two = [one.forecast(horizon=2 * P, calibrated=False).values for one in (adapted, frozen)]
    moved = two[0] - two[1]
    weights = adapted._series.watch.correction.weights[0, 0, :, 0]
    assert (weights > 0.1).all()  # forecasts run behind the ramp
    scale = moved[0, 0, 0, 0] / weights[0]
    np.testing.assert_allclose(moved[0, 0], np.repeat(scale * weights, P)[:, None] * np.ones(21), rtol=1e-9)
    assert 0.5 * ramp[: 40 * P].std() < scale < 2 * ramp[: 40 * P].std()
    for t in range(40 * P, 60 * P):
        adapted.observe([("a", stamp(t), float(ramp[t]))])
        adapted.adapt()
    standings = adapted.summary("a").standings[0, 0, -1]
    assert standings[1] != standings[0]


def test_what_a_watch_starts_from_is_measured_written_and_read(model, tmp_path):
    predictor = watched(model)
    found = tuning.tune(predictor, [noise(f"v{i}", 40 * P + i, seed=i, spread=3.0) for i in range(8)], arl=300)
    assert len(predictor) == 0
    assert Tuning.of_json(json.loads(json.dumps(found.as_json()))) == found
    artefact.save(model, tmp_path, series={"freq": "h"})
    assert (
        StatefulPredictor.from_pretrained(tmp_path, device="cpu", calibrate=True)._series.watch.start.tolist()
        == [[0.0] * 4] * 2
    )
    path = tuning.write(tmp_path, found)
    read = StatefulPredictor.from_pretrained(tmp_path, device="cpu", calibrate=True, signals=True)
    np.testing.assert_allclose(read._series.watch.start, found.start)
    assert read._series.watch.thresholds == found.thresholds
    some = StatefulPredictor.from_pretrained(tmp_path, device="cpu", calibrate=(0.5, 0.8))
    np.testing.assert_allclose(some._series.watch.start, np.array(found.start)[:, :2])
    assert StatefulPredictor.from_pretrained(tmp_path, device="cpu")._series.watch is None
    test = [noise(f"t{i}", 12 * P, seed=90 + i, spread=3.0) for i in range(8)]
    cover = []
    for one in (read, watched(model)):  # none has scored enough to leave the common start
        one.warm_up(test)
        cover.append(one.summary().calibrated.mean((0, 1, 2)))
    wanted = np.array(read._series.watch.rules.coverages)
    assert np.abs(cover[0] - wanted).max() < np.abs(cover[1] - wanted).max()
    for wrong in (b"{", b"[]", b'{"format": 2}', b'{"format": 1, "coverages": [0.5]}'):
        path.write_bytes(wrong)
        with pytest.raises(ValueError, match=r"watch\.json"):
            StatefulPredictor.from_pretrained(tmp_path, device="cpu", calibrate=True)
