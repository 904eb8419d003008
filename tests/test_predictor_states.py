"""States as a whole: bits that do not depend on neighbours, eviction, compaction, handles, and random interleavings."""

import sys
from functools import cache
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from test_predictor import START, P, assert_same_forecasts, digest, make_model, make_series, rows_of, stamp, walk

from tsgdn.data.series import Series
from tsgdn.model.forecaster import Forecaster
from tsgdn.streaming import snapshot
from tsgdn.streaming.predictor import StatefulPredictor


@pytest.fixture(scope="module")
def model():
    return make_model(width=16)


def bits(predictor, item):
    """What is held of one series, to the bit."""
    return {name: tensor.numpy().tobytes() for name, tensor in predictor.state_tensors([item]).items()}


@pytest.mark.parametrize("late_window", [0, 2])
def test_exact_states_and_forecasts_have_the_same_bits_whatever_the_neighbours_and_cuts(model, late_window):
    histories = [make_series(f"s{i}", 13 + 2 * i, seed=i) for i in range(9)]
    jumps = Series("jump", START, "h", np.where(np.arange(60 * P) % (40 * P) < 9, walk(60 * P, 3), np.nan))
    queues = {one.item_id: [row for row in rows_of(one) if not np.isnan(row[2])] for one in [*histories, jumps]}
    alone = StatefulPredictor(model, freq="h", exact=True, late_window=late_window)
    for item in queues:
        alone.observe(queues[item])
    wanted = {item: (bits(alone, item), alone.forecast([item], horizon=20).values.tobytes()) for item in queues}
    for seed in range(3):
        rng = np.random.default_rng(seed)
        left = {item: list(queues[item]) for item in rng.permutation(list(queues))}
        if late_window:  # the first row is the first, others come up to a patch late
            for one in histories:
                rows = left[one.item_id]
                order = np.argsort(np.arange(len(rows)) + rng.uniform(0, P, len(rows)) * (np.arange(len(rows)) > 0))
                left[one.item_id] = [rows[i] for i in order]
        mixed = StatefulPredictor(model, freq="h", exact=True, late_window=late_window)
        while any(left.values()):
            rows = [left[item].pop(0) for item in left for _ in range(rng.integers(0, 2 * P)) if left[item]]
            mixed.observe([rows[i] for i in rng.permutation(len(rows))])
        together = mixed.forecast(list(queues), horizon=20).values
        for row, item in enumerate(queues):
            held, forecast = wanted[item]
            assert bits(mixed, item) == held
            assert together[row : row + 1].tobytes() == forecast


def test_exact_calls_have_one_size_and_go_patch_by_patch(model, monkeypatch):
    shapes = set()
    real = Forecaster.forward

    def seen(self, batch, state=None, *, read=None):
        shapes.add(tuple(batch.values.shape))
        return real(self, batch, state, read=read)

    monkeypatch.setattr(Forecaster, "forward", seen)
    predictor = StatefulPredictor(model, freq="h", exact=True)
    predictor.observe([row for i in range(19) for row in rows_of(make_series(f"s{i}", 9 + i % 5, seed=i))])
    predictor.forecast()
    assert shapes == {(16, 1, P)}
    assert predictor.verify(make_series("x", 30)).ok
    with pytest.raises(ValueError, match="leave block out"):
        StatefulPredictor(model, freq="h", exact=True, block=8)


def test_exact_is_refused_where_the_bits_of_a_row_depend_on_its_place(model, monkeypatch):
    real = Forecaster.forward

    def leans(self, batch, state=None, *, read=None):
        quantiles, state = real(self, batch, state, read=read)
        place = torch.arange(len(state.readout))[:, None, None] == 3
        return quantiles, state._replace(readout=torch.where(place, state.readout * (1 + 1e-6), state.readout))

    StatefulPredictor(model, freq="h", exact=True)
    monkeypatch.setattr(Forecaster, "forward", leans)
    with pytest.raises(ValueError, match="depend on their place in a call of 16"):
        StatefulPredictor(model, freq="h", exact=True)


def test_exact_forecasts_are_those_of_any_other_predictor(model):
    exact, plain = StatefulPredictor(model, freq="h", exact=True), StatefulPredictor(model, freq="h")
    for one in (exact, plain):
        one.warm_up([make_series("a", 30), make_series("b", 26, seed=1)])
        one.observe([("a", stamp(31), 3.0), ("b", stamp(26 + 50 * P), 4.0)])
    assert_same_forecasts(exact, plain)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("silence", [1, P, 50 * P + 1])
def test_a_forecast_as_of_a_later_time_has_seen_silence_until_then(model, silence, exact):
    predictor = StatefulPredictor(model, freq="h", exact=exact)
    predictor.observe(rows_of(make_series("a", 2 * P + 1)) + rows_of(make_series("b", 3 * P, seed=1)))
    before, last = digest(predictor), 3 * P - 1 + silence
    told = predictor.fork()
    told.observe([(item, stamp(last), None) for item in ("a", "b")])
    ahead = predictor.forecast(horizon=9, as_of=stamp(last) + np.timedelta64(59, "m"))
    want = told.forecast(horizon=9)
    assert (ahead.start == stamp(last + 1)).all()
    np.testing.assert_allclose(ahead.values, want.values, rtol=1e-5, atol=1e-5)
    assert ahead.flags == want.flags
    assert digest(predictor) == before
    own = predictor.forecast(["b"], horizon=9)
    np.testing.assert_array_equal(predictor.forecast(["b"], horizon=9, as_of=str(stamp(3 * P - 1))).values, own.values)
    with pytest.raises(ValueError, match=r"'b' has seen .* rewind a fork"):
        predictor.forecast(as_of=stamp(3 * P - 2))


def test_the_series_not_observed_for_longest_are_evicted_first(model):
    predictor = StatefulPredictor(model, freq="h")
    for t, items in enumerate(["abcde", "abcde", "ade", "ae"]):
        predictor.observe(dict.fromkeys(items, 1.0 + t), timestamp=stamp(t))
    predictor.forecast(["b"])  # does not count as use
    assert predictor.evict(keep=3) == 2
    assert predictor.item_ids == ("a", "d", "e")
    assert predictor.evict(["a", "d"], keep=2) == 1
    assert predictor.item_ids == ("a", "e")
    assert predictor.evict(keep=9) == 0
    assert predictor.evict(["e"]) == 1
    assert predictor.delete("a") == 1
    for wrong in ({}, {"keep": -1}):
        with pytest.raises(ValueError, match="keep"):
            predictor.evict(**wrong)
    with pytest.raises(KeyError, match="'a' is not known"):
        predictor.evict(["a"])


def test_a_full_predictor_rejects_or_makes_room_but_not_at_the_cost_of_the_same_call(model, tmp_path):
    predictor = StatefulPredictor(model, freq="h", max_series=3, on_full="evict")
    for t, items in enumerate(["abc", "ac", "c"]):
        predictor.observe(dict.fromkeys(items, 1.0), timestamp=stamp(t))
    predictor.observe({"d": 1.0, "a": 2.0}, timestamp=stamp(3))
    assert set(predictor.item_ids) == {"a", "c", "d"}
    report = predictor.observe(dict.fromkeys("acdef", 1.0), timestamp=stamp(4))
    assert [bad.code for bad in report.set_aside] == ["series.quota"] * 2
    assert report.accepted == 3
    predictor.warm_up([make_series("g", 5), make_series("h", 5)])
    assert len(predictor) == 3
    assert {"g", "h"} < set(predictor.item_ids)
    with pytest.raises(ValueError, match="max_series is 3"):
        predictor.warm_up([make_series(item, 5) for item in "klmn"])
    assert predictor.observe([("x", "2024-01-01", "text"), ("y", START, 1.0)]).accepted == 1
    before = digest(predictor)
    with pytest.raises(ValueError, match=r"value\.type"):
        predictor.observe([("z", START, 1.0), ("x", START, "text")], errors="raise")
    assert digest(predictor) == before
    big = StatefulPredictor(model, freq="h")
    big.warm_up([make_series(item, 5) for item in "klmn"])
    big.save(tmp_path)
    for merge in ("replace", "newer"):
        with pytest.raises(ValueError, match="max_series is 3"):
            predictor.load(tmp_path, merge=merge)
    assert digest(predictor) == before


def test_what_spills_on_eviction_is_brought_back_bit_for_bit_by_the_next_row(model):
    class Stored(StatefulPredictor):
        def _spill(self, items):
            shelf.update({item: self._contents([item]) for item in items})

        def _reload(self, items):
            for item in items:
                if item in shelf:
                    self._restore(*shelf.pop(item))

    shelf = {}
    small = Stored(model, freq="h", exact=True, max_series=2, on_full="evict", late_window=1)
    large = StatefulPredictor(model, freq="h", exact=True, late_window=1)
    rng = np.random.default_rng(0)
    for t in range(6 * P):
        some = rng.choice(list("abcd"), 2, replace=False).tolist()
        for one in (small, large):
            one.observe(dict.fromkeys(some, float(t)), timestamp=stamp(t))
        assert len(small) == 2
    for item in small.item_ids:
        assert bits(small, item) == bits(large, item)
    gone = sorted(shelf)
    assert len(gone) == 2
    small.delete(small.item_ids)
    assert sorted(shelf) == gone
    small.observe([(item, stamp(0), 0.0) for item in gone])
    for item in gone:
        assert small.head(item) == large.head(item)


@pytest.mark.parametrize("late_window", [0, 2])
def test_compaction_moves_rows_and_frees_slabs_and_changes_no_bit(model, late_window):
    known = np.random.default_rng(0).normal(size=(2, 90)).astype(np.float32)
    model = make_model(user_features=2)
    predictor = StatefulPredictor(model, freq="h", late_window=late_window)
    items = [f"s{i}" for i in range(150)]
    histories = [Series(item, START, "h", walk(13 + i % 7, i), known=known) for i, item in enumerate(items)]
    for begin in (0, 50, 100):
        predictor.warm_up(histories[begin : begin + 50])
    predictor.observe([(item, stamp(90_000), 1.0) for item in items[140:143]])  # held
    rest = items[3:140:29] + items[139:]
    predictor.evict([item for item in items if item not in rest])
    before = {item: bits(predictor, item) for item in rest}
    capacity, held, forecast = predictor._pool.capacity, predictor.held(), predictor.forecast().values
    stale = predictor.handles(rest)
    assert predictor.compact() == (capacity - predictor._pool.capacity) * predictor.nbytes_per_series > 0
    assert sorted(predictor._slots.values()) == list(range(len(rest)))
    assert predictor.item_ids == tuple(rest)
    assert {item: bits(predictor, item) for item in rest} == before
    np.testing.assert_array_equal(predictor.forecast().values, forecast)
    assert predictor.held() == held
    assert predictor.compact() == 0
    with pytest.raises(ValueError, match="stale"):
        predictor.observe_at(stale, np.ones(len(rest)), stamp(30))
    fresh = StatefulPredictor(model, freq="h", late_window=late_window)
    for one in (predictor, fresh):
        one.observe([("new", stamp(i), float(i)) for i in range(9)])
    np.testing.assert_array_equal(predictor.forecast(["new"]).values, fresh.forecast().values)
    predictor.evict(keep=0)
    predictor.compact()
    assert predictor._pool.capacity == 0
    predictor.observe([("new", stamp(i), float(i)) for i in range(9)])
    np.testing.assert_array_equal(predictor.forecast(["new"]).values, fresh.forecast().values)


def test_a_part_is_saved_and_merged_with_what_is_there(model, tmp_path):
    source = StatefulPredictor(model, freq="h")
    source.warm_up([make_series("a", 20), make_series("b", 20, seed=1), make_series("c", 20, seed=2)])
    source.save(tmp_path, item_ids=["b", "c"], offset=7)
    target = StatefulPredictor(model, freq="h")
    target.warm_up([make_series("b", 12, seed=1), make_series("d", 9, seed=3)])
    ahead = target.fork()
    ahead.observe([("b", stamp(12 + i), float(i)) for i in range(10)])
    refused = digest(target)
    with pytest.raises(snapshot.SnapshotRefused, match=r"'b' .* is here already"):
        target.load(tmp_path, merge="refuse")
    assert digest(target) == refused
    other, own, kept = bits(target, "d"), bits(ahead, "b"), target.fork(["d"])
    assert target.load(tmp_path, merge="newer") == 7
    assert set(target.item_ids) == {"b", "c", "d"}
    assert bits(target, "b") == bits(source, "b")
    assert bits(target, "c") == bits(source, "c")
    assert bits(target, "d") == other
    ahead.load(tmp_path, merge="newer")
    assert bits(ahead, "b") == own
    assert bits(ahead, "c") == bits(source, "c")
    kept.load(tmp_path, merge="refuse")
    assert set(kept.item_ids) == {"b", "c", "d"}
    kept.load(tmp_path)
    assert kept.item_ids == ("b", "c")
    with pytest.raises(KeyError, match="'zz'"):
        source.save(tmp_path, item_ids=["zz"])


def test_the_order_of_use_survives_a_snapshot(model, tmp_path):
    predictor = StatefulPredictor(model, freq="h")
    for t, items in enumerate(["abc", "bc", "b"]):
        predictor.observe(dict.fromkeys(items, 1.0), timestamp=stamp(t))
    predictor.save(tmp_path)
    restored = StatefulPredictor(model, freq="h")
    restored.load(tmp_path)
    restored.observe([("a", stamp(1), 1.0)])
    restored.evict(keep=2)
    assert restored.item_ids == ("a", "b")


def test_a_tick_by_handles_is_a_tick_by_names(model):
    by_name, by_handle = (StatefulPredictor(model, freq="h", exact=True, late_window=1) for _ in range(2))
    items = [f"s{i}" for i in range(11)]
    handles = by_handle.handles(items, create=True)
    rng = np.random.default_rng(0)
    order = rng.permutation(11)
    for t in range(4 * P):
        values = rng.normal(size=11)
        values[rng.random(11) < 0.2] = np.nan
        observed = rng.random(11) < 0.9
        told = np.where(observed, values, np.nan)
        expected = by_name.observe(dict(zip(items, told.tolist(), strict=True)), timestamp=stamp(t))
        report = by_handle.observe_at(handles[order], values[order], stamp(t), observed=observed[order])
        assert report == expected
        if t == P:
            handles = by_handle.handles(items)
    for item in items:
        assert bits(by_name, item) == bits(by_handle, item)
    assert by_handle.observe_at(handles, np.where(np.arange(11) > 0, told, 1e200), stamp(4 * P - 1))[:2] == (0, 10)
    odd = by_handle.observe_at(handles[:4], np.array([1.0, np.inf, 1e120, np.nan]), str(stamp(4 * P)))
    assert (odd.accepted, odd.missing) == (1, 1)
    assert [(bad.code, bad.row) for bad in odd.set_aside] == [("value.nonfinite", 1), ("value.range", 2)]
    assert by_handle.observe_at(handles, np.ones(11), stamp(4 * P) + np.timedelta64(1, "m")).rejected == 11
    assert by_handle.observe_at(handles[:0], np.ones(0), START).accepted == 0
    twice = by_handle.observe_at(handles[[5, 5]], np.array([1.0, 2.0]), stamp(4 * P))
    assert (twice.accepted, twice.rejected) == (1, 1)


def test_handles_of_series_that_are_gone_are_refused(model):
    predictor = StatefulPredictor(model, freq="h", variates=("x", "y"))
    predictor.observe([(item, START, [1.0, 2.0]) for item in "abc"])
    handles = predictor.handles(["a", "b", "c"])
    before = digest(predictor)
    for wrong in (np.ones((2, 2)), np.ones(3), np.ones((3, 1))):
        with pytest.raises(ValueError, match="values have shape"):
            predictor.observe_at(handles, wrong, stamp(1))
    with pytest.raises(ValueError, match="observed has shape"):
        predictor.observe_at(handles, np.ones((3, 2)), stamp(1), observed=np.ones(3, bool))
    with pytest.raises(ValueError, match="is not one of this predictor's"):
        predictor.observe_at(np.array([-5]), np.ones((1, 2)), stamp(1))
    with pytest.raises(KeyError, match="'z' is not known"):
        predictor.handles(["z"])
    with pytest.raises(ValueError, match="control character"):
        predictor.handles(["z\n"], create=True)
    assert digest(predictor) == before
    predictor.evict(["b"])
    predictor.observe([("d", START, [3.0, 4.0])])  # in the slot that b had
    with pytest.raises(ValueError, match="handle 1 is stale"):
        predictor.observe_at(handles, np.ones((3, 2)), stamp(1))
    assert predictor.observe_at(handles[[0, 2]], np.ones((2, 2)), stamp(1)).accepted == 2


def test_a_dense_tick_runs_as_many_lines_of_python_for_a_thousand_series_as_for_ten(model):
    def lines(count):
        predictor = StatefulPredictor(model, freq="h", late_window=1)
        handles = predictor.handles([f"s{i}" for i in range(count)], create=True)
        for t in range(3 * P):
            predictor.observe_at(handles, np.full(count, float(t)), stamp(t))
        ran = 0

        def trace(frame, event, _):
            nonlocal ran
            if "tsgdn" not in frame.f_code.co_filename:
                return None
            ran += event == "line"
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            for t in range(3 * P, 4 * P):
                assert predictor.observe_at(handles, np.full(count, float(t)), stamp(t)).accepted == count
        finally:
            sys.settrace(before)
        return ran

    assert lines(1000) == lines(10) > 50


WINDOW = 2
VALUES = st.sampled_from([-3.0, 0.0, 0.5, 8.0])


class Interleaved(RuleBasedStateMachine):
    """Whatever happened to a predictor, it forecasts as one that was fed once, in order, what the rows left behind.

    The oracle is a mapping per series from step to value (None: told to be missing), and the head.
    """

    items = st.sampled_from("abc")

    def __init__(self):
        super().__init__()
        self.model = state_machine_model()
        self.folder = TemporaryDirectory()
        self.predictor = self.empty()
        self.seen, self.heads, self.rewound = {}, {}, {}
        self.saved = None

    @initialize(lengths=st.tuples(*[st.integers(1, 6 * P)] * 2))
    def begin(self, lengths):
        """Two series with a history: most of what may go wrong needs one."""
        for item, length in zip("ab", lengths, strict=True):
            self.told([(item, i, None if i % 5 == 3 else i % 7 + 0.5) for i in range(length + 2 * P) if i % 6 != 4])

    def empty(self):
        return StatefulPredictor(
            self.model, freq="h", late_window=WINDOW, on_conflict="replace", max_jump=10**6, block=2
        )

    def teardown(self):
        self.agree()
        self.folder.cleanup()

    def told(self, rows):
        """Observes rows (item, step, value); the oracle takes those that the report does not set aside."""
        starts = {item: min(cells) for item, cells in self.seen.items()}
        report = self.predictor.observe([(item, stamp(step), value) for item, step, value in rows])
        aside = {bad.row for bad in report.set_aside}
        for place, (item, step, value) in enumerate(rows):
            if place in aside:
                assert item in starts, "the first row of a series was set aside"
                assert step < self.heads[item], "a row at the head or beyond was set aside"
                continue
            cells = self.seen.setdefault(item, {})
            if value is not None or step not in cells:
                cells[step] = value
            self.heads[item] = max(step + 1, self.heads.get(item, 0))
        return report

    @rule(ahead=st.dictionaries(items, st.sampled_from([1, 1, 1, 2, 5, 40 * P]), min_size=1), value=VALUES)
    def go_on(self, ahead, value):
        rows = [(item, self.heads.get(item, 0) + n - 1, value + n) for item, n in ahead.items()]
        report = self.told(rows)
        assert report.accepted == len(rows)

    @rule(item=items, steps=st.integers(1, 3 * P), shuffled=st.randoms(use_true_random=False), value=VALUES)
    def run(self, item, steps, shuffled, value):
        head = self.heads.get(item, 0)
        rows = [(item, head + i, None if i % 5 == 3 else value + i % 3) for i in range(steps)]
        shuffled.shuffle(rows)
        assert self.told(rows).rejected == 0

    @precondition(lambda self: self.seen)
    @rule(data=st.data(), backs=st.lists(st.integers(1, (WINDOW + 2) * P), min_size=1, max_size=4), value=VALUES)
    def look_back(self, data, backs, value):
        """Rows of the past, one by one: late, repeated or corrected, by what was there."""
        for i, back in enumerate(backs):
            self.look_back_once(data.draw(st.sampled_from(sorted(self.seen))), back, value + i)

    def look_back_once(self, item, back, value):
        step, first = self.heads[item] - back, min(self.seen[item])
        before, here = self.seen[item].get(step), digest(self.predictor)
        report = self.told([(item, step, value)])
        assert report.accepted + report.revised + report.duplicate + len(report.set_aside) == 1
        if before == value:
            assert report.duplicate + report.late == 1
        if step < first or report.late or report.rejected or report.duplicate:
            assert digest(self.predictor) == here
        if first <= step and back <= P and step >= self.rewound.get(item, 0):  # a rewind drops anchors
            assert report.accepted + report.revised + report.duplicate == 1

    @precondition(lambda self: self.seen)
    @rule(data=st.data(), back=st.integers(0, 3 * P))
    def rewind(self, data, back):
        item = data.draw(st.sampled_from(sorted(self.seen)))
        head, first = self.heads[item] - back, min(self.seen[item])
        here = digest(self.predictor)
        try:
            self.predictor.rewind([item], stamp(head - 1))
        except ValueError:  # further back than anchors reach; a rewind drops some
            assert back > 0
            assert head <= first or back > P or head < self.rewound.get(item, 0)
            assert digest(self.predictor) == here
            return
        assert head > first
        self.heads[item], self.rewound[item] = head, max(head, self.rewound.get(item, 0))
        self.seen[item] = {step: value for step, value in self.seen[item].items() if step < head}

    @rule()
    def fork(self):
        """Goes on with a copy; what happens to the one before must not matter."""
        before, self.predictor = self.predictor, self.predictor.fork()
        if self.seen:
            item = sorted(self.seen)[0]
            before.observe([(item, stamp(self.heads[item] + i), 1e6) for i in range(2 * P)])
            before.evict(keep=0)

    @precondition(lambda self: self.seen)
    @rule(data=st.data())
    def evict(self, data):
        item = data.draw(st.sampled_from(sorted(self.seen)))
        self.predictor.evict([item])
        del self.seen[item], self.heads[item]

    @rule()
    def compact(self):
        here = digest(self.predictor)
        self.predictor.compact()
        assert digest(self.predictor) == here

    @rule()
    def save(self):
        self.predictor.save(self.folder.name, offset=len(self.seen))
        self.saved = {item: dict(cells) for item, cells in self.seen.items()}, dict(self.heads), digest(self.predictor)

    @precondition(lambda self: self.saved)
    @rule(fresh=st.booleans())
    def load(self, fresh):
        seen, self.heads, here = self.saved[0], dict(self.saved[1]), self.saved[2]
        self.seen = {item: dict(cells) for item, cells in seen.items()}
        self.predictor = self.empty() if fresh else self.predictor
        assert self.predictor.load(self.folder.name) == len(self.seen)
        assert digest(self.predictor) == here

    @rule()
    def agree(self):
        assert set(self.predictor.item_ids) == set(self.seen)
        items = sorted(self.seen)
        if not items:
            return
        oracle = self.empty()
        for item, cells in self.seen.items():
            spoken = {**cells, self.heads[item] - 1: cells.get(self.heads[item] - 1)}
            oracle.observe([(item, stamp(step), spoken[step]) for step in sorted(spoken)])
        here = digest(self.predictor)
        ours, theirs = (one.forecast(items, horizon=2 * P) for one in (self.predictor, oracle))
        assert (ours.start == theirs.start).all()
        np.testing.assert_allclose(ours.values, theirs.values, rtol=1e-9, atol=1e-9)
        assert ours.flags == theirs.flags
        assert digest(self.predictor) == here


@cache
def state_machine_model():
    return make_model(depth=1).double().eval()


def test_random_interleavings_leave_what_one_feed_in_order_leaves():
    run_state_machine_as_test(Interleaved, settings=settings(max_examples=5, stateful_step_count=8))


@pytest.mark.slow
def test_many_random_interleavings_leave_what_one_feed_in_order_leaves():
    run_state_machine_as_test(Interleaved, settings=settings(max_examples=60, stateful_step_count=25))
