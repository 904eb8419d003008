"""The late window: what comes late or corrected leaves the state that the rows in order would have left."""

import numpy as np
import pytest
import torch
from test_predictor import START, P, assert_same_forecasts, digest, make_model, make_series, rows_of, stamp, walk

from tsgdn.data.series import Series
from tsgdn.model.forecaster import Forecaster
from tsgdn.streaming import snapshot
from tsgdn.streaming.late import Anchors
from tsgdn.streaming.predictor import StatefulPredictor

L = 2


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def exact_model():
    return make_model().double()


def assert_same_states(a, b, rtol):
    one, two = a.state_tensors(), b.state_tensors()
    assert set(one) == set(two)
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=rtol, atol=rtol, equal_nan=True, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("late", [1, L * P - 1])
def test_late_values_within_the_window_count_as_if_they_had_come_in_order(dtype, rtol, late):
    model = make_model().to(dtype)
    ordered, patched = (StatefulPredictor(model, freq="h", late_window=L) for _ in range(2))
    histories = [make_series("a", 45), make_series("b", 38, seed=1), make_series("c", 9, seed=2)]
    waiting = []
    for t in range(45):
        now = [rows_of(one)[t] for one in histories if t < len(one)]
        held_back = [row for i, row in enumerate(now) if (t + i) % 11 == 3]
        prompt = [row for row in now if row not in held_back]
        assert ordered.observe(now).set_aside == ()
        assert patched.observe(prompt).set_aside == ()
        for row in held_back:  # a row that says nothing keeps the clock running
            patched.observe([(row[0], row[1], None)])
        waiting.append((t, held_back))
        while waiting and t - waiting[0][0] >= late:
            _, rows = waiting.pop(0)
            assert patched.observe(rows).revised == len(rows)
    for _, rows in waiting:
        assert patched.observe(rows).revised == len(rows)
    assert ordered.held() == {}
    assert_same_states(ordered, patched, rtol)
    assert_same_forecasts(ordered, patched, rtol=rtol)


def test_absent_rows_that_come_late_are_revised_and_older_ones_set_aside(model):
    predictor = StatefulPredictor(model, freq="h", late_window=L)
    rows = rows_of(make_series("a", 40))
    absent = [3, 26, 33]
    predictor.observe([row for i, row in enumerate(rows) if i not in absent])
    before = digest(predictor)
    assert predictor.observe([rows[3]]).late == 1
    assert digest(predictor) == before
    assert predictor.observe([rows[26]]).late == 1  # of the patch before the window
    report = predictor.observe([rows[33]])
    assert (report.revised, report.late, report.accepted) == (1, 0, 0)
    assert predictor.observe([rows[33]]).duplicate == 1
    ordered = StatefulPredictor(model, freq="h", late_window=L)
    ordered.observe([row for i, row in enumerate(rows) if i not in absent[:2]])
    assert_same_states(ordered, predictor, 1e-5)


def test_a_correction_is_refused_or_takes_the_place_of_the_first_value(exact_model):
    rows = rows_of(make_series("a", 41))
    firm = StatefulPredictor(exact_model, freq="h", late_window=L)
    soft, ordered = (StatefulPredictor(exact_model, freq="h", late_window=L, on_conflict="replace") for _ in range(2))
    for one in (firm, soft):
        one.observe(rows)
    for place in (33, 38, 40):  # in the model already, in the last whole patch, in the pending one
        new = (*rows[place][:2], 77.0 + place)
        report = firm.observe([new])
        assert [bad.code for bad in report.set_aside] == ["ts.conflict"]
        assert soft.observe([new]).revised == 1
        rows[place] = new
    assert [bad.code for bad in soft.observe([("a", stamp(20), 1.0)]).set_aside] == ["ts.conflict"]
    twice = soft.observe([("a", stamp(41), 1.0), ("a", stamp(41), 2.0)])
    assert (twice.accepted, twice.revised) == (1, 1)
    rows.append(("a", stamp(41), 2.0))
    ordered.observe(rows)
    assert_same_states(ordered, soft, 1e-12)
    with pytest.raises(ValueError, match="give late_window"):
        StatefulPredictor(exact_model, freq="h", on_conflict="replace")
    for wrong in (-1, True, 10**6):
        with pytest.raises(ValueError, match="late_window is"):
            StatefulPredictor(exact_model, freq="h", late_window=wrong)


def test_anchors_lie_at_multiples_of_the_window_however_the_rows_came(model):
    series = make_series("a", 61)
    singly, warm, chunks, leaps = (StatefulPredictor(model, freq="h", late_window=3) for _ in range(4))
    for row in rows_of(series):
        singly.observe([row])
    warm.warm_up(series)
    chunks.warm_up(series, chunk=7)
    leaps.observe(rows_of(series)[:2])
    leaps.observe(rows_of(series)[2:])
    for one in (singly, warm, chunks, leaps):
        assert one.state_tensors()["anchor.steps"].tolist() == [[48, 60]]
        late = one.fork()
        late.rewind(["a"], stamp(49))
        assert late.head("a") == 50
    for other in (warm, chunks, leaps):
        assert_same_states(singly, other, 1e-4)


def test_a_silence_beyond_the_window_leaves_anchors_inside_it(exact_model):
    predictor, ordered = (StatefulPredictor(exact_model, freq="h", late_window=L) for _ in range(2))
    far = 60 * P + 1
    for row in rows_of(make_series("a", 10)):
        predictor.observe([row])
    predictor.observe([("a", stamp(far), 3.0)])
    assert predictor.observe([("a", stamp(far - L * P), 4.0)]).revised == 1
    ordered.observe(rows_of(make_series("a", 10)))
    ordered.observe([("a", stamp(far - L * P), 4.0)])
    ordered.observe([("a", stamp(far), 3.0)])
    assert_same_forecasts(ordered, predictor, rtol=1e-12)


def test_many_revisions_are_few_calls_of_the_model(model, monkeypatch):
    predictor = StatefulPredictor(model, freq="h", late_window=L)
    items = [f"s{i}" for i in range(60)]
    for t in range(30):
        predictor.observe(
            {item: None if t == 24 + i % 3 else float(t) for i, item in enumerate(items)}, timestamp=stamp(t)
        )
    calls = []
    real = Forecaster.forward

    def counted(self, batch, state=None, *, read=None):
        calls.append(batch.values.shape[0])
        return real(self, batch, state, read=read)

    monkeypatch.setattr(Forecaster, "forward", counted)
    rows = [(item, stamp(24 + i % 3), float(24 + i % 3)) for i, item in enumerate(items)]
    assert predictor.observe(rows).revised == 60
    assert len(calls) <= 3


def test_a_series_rewound_is_as_if_the_rest_had_never_come(exact_model):
    rows = rows_of(make_series("a", 43)) + rows_of(make_series("b", 30, seed=1))
    whole = StatefulPredictor(exact_model, freq="h", late_window=L)
    whole.observe(rows)
    # the head of a lies at 43 = 10 patches and 3 cells, so its anchors at 8 and 10 patches
    for last in (42, 40, 39, 38, 32, 31):
        back, short = whole.fork(), StatefulPredictor(exact_model, freq="h", late_window=L)
        back.rewind("a", str(stamp(last)))
        short.observe([row for row in rows if row[0] == "b" or row[1] <= stamp(last)])
        assert back.head("a") == last + 1
        assert_same_forecasts(short, back, rtol=1e-12, items=["a", "b"])
        assert back.observe(rows).accepted == 42 - last
        assert_same_forecasts(whole, back, rtol=1e-12)
    before = digest(whole)
    with pytest.raises(ValueError, match=f"earliest time that is held is {str(stamp(31)).replace('T', ' ')[:16]}"):
        whole.rewind(["a"], stamp(30))
    with pytest.raises(ValueError, match="its last step is"):
        whole.rewind(["a", "b"], stamp(40))
    with pytest.raises(ValueError, match="is not ISO 8601"):
        whole.rewind(["a"], "yesterday")
    assert digest(whole) == before


def test_without_a_window_only_the_waiting_cells_can_be_rewound(model):
    predictor = StatefulPredictor(model, freq="h")
    predictor.observe(rows_of(make_series("a", 2 * P + 3)))
    with pytest.raises(ValueError, match="late_window"):
        predictor.rewind(["a"], stamp(2 * P - 2))
    predictor.rewind(["a"], stamp(2 * P))
    short = StatefulPredictor(model, freq="h")
    short.observe(rows_of(make_series("a", 2 * P + 1)))
    assert short.head("a") == predictor.head("a") == 2 * P + 1
    assert_same_forecasts(short, predictor, rtol=0.0)


def test_anchors_are_saved_forked_and_forgotten_with_their_series(model, tmp_path):
    predictor = StatefulPredictor(model, freq="h", late_window=L)
    predictor.warm_up([make_series("a", 37), make_series("b", 41, seed=1)])
    predictor.save(tmp_path)
    restored = StatefulPredictor(model, freq="h", late_window=L)
    restored.load(tmp_path)
    fork = predictor.fork()
    for one in (restored, fork):
        assert digest(one) == digest(predictor)
    for one in (predictor, restored, fork):
        one.rewind(["a"], stamp(33))
        one.observe([("a", stamp(34), 5.0)])
    assert digest(restored) == digest(predictor) == digest(fork)
    with pytest.raises(snapshot.SnapshotRefused, match="late_window 2, expected 0"):
        StatefulPredictor(model, freq="h").load(tmp_path)
    predictor.evict(["a", "b"])
    fresh = StatefulPredictor(model, freq="h", late_window=L)
    for one in (predictor, fresh):
        one.observe([("c", START, 1.0), ("c", stamp(9), 2.0)])
        one.observe([("c", stamp(2), 7.0)])
    assert digest(predictor) == digest(fresh)


def test_a_window_costs_about_thrice_the_memory_and_says_so(model):
    plain, late = StatefulPredictor(model, freq="h"), StatefulPredictor(model, freq="h", late_window=L)
    for one in (plain, late):
        one.warm_up(make_series("a", 30))
    assert 2.5 < late.nbytes_per_series / plain.nbytes_per_series < 3.5
    held = sum(tensor.nbytes for tensor in late.state_tensors().values())
    late.warm_up(Series("a", stamp(30), "h", walk(500)))
    assert sum(tensor.nbytes for tensor in late.state_tensors().values()) == held


def test_replays_read_the_known_features_and_categories_of_their_steps():
    model = make_model(user_features=2, static=(3,)).double()
    known = np.random.default_rng(0).normal(size=(2, 80)).astype(np.float32)
    series = Series("a", START, "h", walk(50), known=known, static=(2,))
    ordered, late = (StatefulPredictor(model, freq="h", late_window=L) for _ in range(2))
    ordered.warm_up(series)
    late.warm_up(series.slice(0, 43))
    gone = [row for row in rows_of(series) if row[1] == stamp(44)]
    late.observe([row for row in rows_of(series)[43:] if row not in gone], known={"a": known[:, 43:]})
    assert late.observe(gone).revised == 1
    assert_same_forecasts(ordered, late, rtol=1e-12, horizon=8)


def test_stops_lie_where_the_last_two_anchors_will_be():
    anchors = Anchors(lambda count: (torch.zeros(count, 1),), stride=8)
    at, end = np.array([0, 0, 3, 17, 16]), np.array([7, 31, 31, 30, 24])
    stops = []
    while (at < end).any():
        at = np.where(at < end, anchors.next_stop(at, end), at)
        stops.append(at.tolist())
    assert stops == [[7, 16, 16, 24, 24], [7, 24, 24, 30, 24], [7, 31, 31, 30, 24]]
