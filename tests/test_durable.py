"""A predictor that is killed at any moment loses nothing that it acknowledged, and counts nothing twice."""

import os
import random
import signal
import time
from functools import cache

import numpy as np
import pytest
import torch

from tsgdn.data.series import Series
from tsgdn.model.forecaster import Forecaster
from tsgdn.streaming import durable as durable_module
from tsgdn.streaming.durable import DurablePredictor
from tsgdn.streaming.predictor import StatefulPredictor
from tsgdn.streaming.rows import Rows
from tsgdn.streaming.stores import StoreBusy, StoreDamaged, StoreRefused, open_store
from tsgdn.streaming.ticks import Tick, packed, unpacked

P, ITEMS, TICKS = 4, 6, 24
START = np.datetime64("2026-03-01T00", "ns")
HOUR = np.timedelta64(1, "h")


def make_model(seed: int = 0, width: int = 8) -> Forecaster:
    torch.manual_seed(seed)
    model = Forecaster(P, 2, (1, 6), width=width, depth=1, mixer_args={"heads": 1, "key_dim": 4}, variate_every=0)
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def make_predictor(model: Forecaster | None = None, **options) -> StatefulPredictor:
    return StatefulPredictor(model or make_model(), freq="h", calendar=False, device="cpu", **options)


@cache
def ticks() -> list[list[tuple[str, np.datetime64, float]]]:
    """Rows of some of the series, some late, missing or twice."""
    rng, heads, out = np.random.default_rng(3), np.zeros(ITEMS, int), []
    for _ in range(TICKS):
        rows = []
        for i in rng.permutation(ITEMS)[: rng.integers(1, ITEMS + 1)].tolist():
            for _ in range(int(rng.integers(1, 4))):
                heads[i] += int(rng.integers(1, 3))
                value = float("nan") if rng.random() < 0.1 else float(rng.normal(10, 3))
                rows.append((f"s{i}", START + int(heads[i]) * HOUR, value))
        if out and rng.random() < 0.3:
            rows.append(out[-1][0])
        out.append(rows)
    return out


def contents(predictor: StatefulPredictor) -> dict[str, torch.Tensor]:
    return predictor.state_tensors(sorted(predictor.item_ids))


def assert_same(got: StatefulPredictor, want: StatefulPredictor) -> None:
    assert set(got.item_ids) == set(want.item_ids)
    mine, theirs = contents(got), contents(want)
    assert mine.keys() == theirs.keys()
    for name, leaf in mine.items():
        assert torch.equal(leaf.nan_to_num(7.0), theirs[name].nan_to_num(7.0)), name
    assert got.held() == want.held()


def uninterrupted(count: int = TICKS) -> StatefulPredictor:
    predictor = make_predictor()
    for rows in ticks()[:count]:
        predictor.observe(rows)
    return predictor


def open_durable(folder, model=None, **options) -> DurablePredictor:
    return DurablePredictor(make_predictor(model), open_store(folder), **options)


# ---- without a kill


def test_a_stream_that_is_closed_and_opened_goes_on_bit_by_bit(tmp_path):
    for begin in range(0, TICKS, 7):
        durable = open_durable(tmp_path / "store")
        assert durable.recovery.offset == (str(begin).encode() if begin else None)
        assert durable.recovery.ticks == 0, "a checkpoint was written on closing"
        for number, rows in enumerate(ticks()[begin : begin + 7], begin + 1):
            durable.observe(rows, offset=str(number).encode())
        durable.close()
    durable = open_durable(tmp_path / "store")
    assert_same(durable.predictor, uninterrupted())
    durable.close()


def test_without_a_checkpoint_the_journal_brings_everything_back(tmp_path):
    durable = open_durable(tmp_path / "store", checkpoint_every=1e9)
    for number, rows in enumerate(ticks(), 1):
        durable.observe(rows, offset=str(number).encode())
    durable.store.close()  # no checkpoint
    again = open_durable(tmp_path / "store")
    assert again.recovery.ticks == TICKS
    assert again.recovery.series == 0
    assert again.recovery.offset == str(TICKS).encode()
    assert set(again.recovery.last) == {item for item, *_ in ticks()[-1]}
    assert_same(again.predictor, uninterrupted())
    again.close()


def test_a_tick_is_read_back_as_it_was_written():
    rows = Rows(
        ["a", "\ud800b", "a"],
        START + np.arange(3) * HOUR,
        np.array([[1.0, np.nan], [2.5, -0.0], [np.pi, 1e100]]),
        np.arange(3),
        [],
    )
    tick = Tick(rows, {"a": np.array([[1.0, np.nan, 3.0]]), "b": np.zeros((2, 0))}, b"\x00\xffplace")
    again = unpacked(packed(tick))
    assert again.rows.item_ids == rows.item_ids
    assert np.array_equal(again.rows.stamps, rows.stamps)
    assert np.array_equal(again.rows.values, rows.values, equal_nan=True)
    assert again.offset == tick.offset
    assert again.known.keys() == tick.known.keys()
    assert all(np.array_equal(again.known[k], v, equal_nan=True) for k, v in tick.known.items())
    assert again.known["b"].shape == (2, 0)


def test_histories_and_deletions_are_there_after_reopening(tmp_path):
    history = Series("long", START, "h", np.random.default_rng(0).normal(size=(1, 50)))
    durable = open_durable(tmp_path / "store", checkpoint_every=1e9)
    durable.warm_up(history)
    durable.observe([("gone", START, 1.0), ("stays", START, 2.0)])
    durable.delete(["gone"])
    durable.store.close()
    again = open_durable(tmp_path / "store")
    assert set(again.predictor.item_ids) == {"long", "stays"}
    want = make_predictor()
    want.warm_up(history)
    want.observe([("stays", START, 2.0)])
    assert_same(again.predictor, want)
    again.close()


def test_rows_that_wait_for_others_and_registered_names_survive(tmp_path):
    durable = DurablePredictor(make_predictor(on_unknown="reject"), open_store(tmp_path / "store"))
    durable.predictor.register(["a", "b"])
    durable.observe([("a", START, 1.0)])
    durable.observe([("a", START + 20_000 * HOUR, 2.0)])
    assert durable.predictor.held()
    held = durable.predictor.held()
    durable.close()
    again = DurablePredictor(make_predictor(on_unknown="reject"), open_store(tmp_path / "store"))
    assert again.predictor.held() == held
    assert again.observe([("b", START, 1.0), ("c", START, 1.0)]).rejected == 1
    again.close()


def test_states_of_another_model_frequency_or_owner_are_refused(tmp_path):
    durable = open_durable(tmp_path / "store")
    durable.observe(ticks()[0])
    with pytest.raises(StoreBusy):
        open_durable(tmp_path / "store")
    durable.close()
    with pytest.raises(StoreRefused) as error:
        open_durable(tmp_path / "store", model=make_model(seed=1))
    assert "\n" not in str(error.value)
    daily = StatefulPredictor(make_model(), freq="D", calendar=False, device="cpu")
    with pytest.raises(StoreRefused):
        DurablePredictor(daily, open_store(tmp_path / "store"))
    used = make_predictor()
    used.observe(ticks()[0])
    with pytest.raises(ValueError, match="series already"):
        DurablePredictor(used, open_store(tmp_path / "store"))


def test_a_series_whose_record_was_lost_is_named_and_the_others_are_served(tmp_path):
    durable = open_durable(tmp_path / "store")
    durable.observe([("a", START, 1.0), ("b", START, 2.0)])
    durable.checkpoint()
    durable.store.quarantine("a", "state.checksum")
    durable.store.close()
    again = open_durable(tmp_path / "store")
    assert again.recovery.lost == {"a": "state.checksum"}
    report = again.observe([("a", START + HOUR, 1.0), ("b", START + HOUR, 2.0)])
    assert (report.accepted, report.rejected) == (1, 1)
    assert report.first["state.lost"][0] == "a"
    again.begin_anew(["a"])
    assert again.observe([("a", START + HOUR, 1.0)]).accepted == 1
    again.close()


def test_a_checkpoint_without_a_journal_that_was_cut_off_lends_its_number_to_no_later_tick(tmp_path, monkeypatch):
    durable = DurablePredictor(make_predictor(), open_store(tmp_path / "store", durability="memory"))
    monkeypatch.setattr(durable, "_at_once", 1)
    for number in range(1, 5):
        durable.observe([("a", START + number * HOUR, 1.0), ("b", START + number * HOUR, 2.0)])
    real, calls = durable.store.commit, []

    def cut_off(*args, **options):
        if calls:
            raise StoreRefused("the machine stops here")
        calls.append(real(*args, **options))

    monkeypatch.setattr(durable.store, "commit", cut_off)
    with pytest.raises(StoreRefused):
        durable.checkpoint()
    durable.store.close()
    again = open_durable(tmp_path / "store", checkpoint_every=1e9)
    assert again.predictor.item_ids == ("a",)
    for number in range(1, 7):  # the source gives its rows again
        again.observe([("a", START + number * HOUR, 1.0), ("b", START + number * HOUR, 2.0)])
    again.store.close()
    third = open_durable(tmp_path / "store")
    assert third.recovery.ticks == 6
    assert [third.head(item) for item in "ab"] == [6, 6]
    third.close()


# ---- several sources


def test_each_source_has_a_place_of_its_own_with_a_checkpoint_or_without(tmp_path):
    durable = open_durable(tmp_path / "store", source="file", checkpoint_every=1e9)
    durable.observe(ticks()[0], offset=b"line 7")
    durable.observe(ticks()[1], offset=b"entry 3", source="redis")
    durable.observe(ticks()[2])
    durable.store.close()
    again = open_durable(tmp_path / "store", source="redis", checkpoint_every=1e9)
    assert again.recovery.offset == b"entry 3"
    assert again.recovery.offsets == {"file": b"line 7", "redis": b"entry 3"}
    again.observe(ticks()[3], offset=b"entry 4")
    again.close()
    third = open_durable(tmp_path / "store", source="new", checkpoint_every=1e9)
    assert third.recovery.offset is None
    assert third.recovery.offsets == {"file": b"line 7", "redis": b"entry 4"}
    third.close()
    assert_same(third.predictor, uninterrupted(4))


# ---- more series than room


def narrow(folder, room: int = 2, **options) -> DurablePredictor:
    predictor = make_predictor(wide(), exact=True, max_series=room, on_full="evict")
    return DurablePredictor(predictor, open_store(folder), **options)


@cache
def wide() -> Forecaster:
    return make_model(width=16)


def with_room_for_all(count: int = TICKS) -> StatefulPredictor:
    predictor = make_predictor(wide(), exact=True)
    for rows in ticks()[:count]:
        predictor.observe(rows)
    return predictor


def assert_same_with_little_room(got: DurablePredictor, want: StatefulPredictor) -> None:
    assert set(got.item_ids) == set(want.item_ids)
    assert len(got.predictor) <= 2 < ITEMS
    held = {}
    for item in want.item_ids:
        got.evict(list(got.predictor.item_ids))
        got.forecast([item])
        mine, theirs = got.predictor.state_tensors([item]), want.state_tensors([item])
        for name, leaf in mine.items():
            assert torch.equal(leaf.nan_to_num(7.0), theirs[name].nan_to_num(7.0)), (item, name)
        held |= got.predictor.held()
    assert held == want.held()
    mine, theirs = got.forecast(sorted(want.item_ids)), want.forecast(sorted(want.item_ids))
    assert mine.item_ids == theirs.item_ids and mine.flags == theirs.flags
    assert np.array_equal(mine.values, theirs.values)
    assert np.array_equal(mine.start, theirs.start)


@pytest.mark.parametrize(("closes", "slice_size"), [(True, 1 << 30), (False, 1)])
def test_series_for_which_there_is_no_room_wait_in_the_store_bit_by_bit(tmp_path, monkeypatch, closes, slice_size):
    monkeypatch.setattr(durable_module, "SLICE", slice_size)  # written with the checkpoint, or at once
    for begin in range(0, 12, 5):
        durable = narrow(tmp_path / "store", checkpoint_every=1e9)
        for number, rows in enumerate(ticks()[begin : min(12, begin + 5)], begin + 1):
            durable.observe(rows, offset=str(number).encode())
        durable.close() if closes else durable.store.close()
    durable = narrow(tmp_path / "store")
    assert durable.recovery.offset == b"12"
    assert set(durable.recovery.last) == (set() if closes else {item for item, *_ in ticks()[11]})
    assert_same_with_little_room(durable, with_room_for_all(12))
    durable.close()


def test_a_row_of_a_call_with_more_series_than_room_is_told_as_if_there_were_room(tmp_path):
    durable, oracle = narrow(tmp_path / "store"), make_predictor(wide(), exact=True)
    for rows in ticks()[:8]:
        assert durable.observe(rows) == oracle.observe(rows)
    durable.close()


def test_histories_that_do_not_fit_and_names_that_are_deleted_after_eviction(tmp_path):
    rng = np.random.default_rng(0)
    histories = [Series(f"h{i}", START, "h", rng.normal(size=(1, 9 + i))) for i in range(5)]
    durable = narrow(tmp_path / "store", checkpoint_every=1e9)
    assert durable.warm_up(histories).accepted == sum(map(len, histories))
    assert len(durable) == 5 and len(durable.predictor) == 2
    durable.delete(["h0", "h4"])
    with pytest.raises(KeyError, match="not known"):
        durable.delete(["h1", "h0"])
    durable.store.close()
    again = narrow(tmp_path / "store", checkpoint_every=1e9)
    assert set(again.item_ids) == {"h1", "h2", "h3"}
    assert "h0" not in again and "h2" in again
    assert again.observe([("h0", START, 1.0)]).accepted == 1, "it begins anew"
    want = make_predictor(wide(), exact=True)
    want.warm_up(histories[1:4])
    want.observe([("h0", START, 1.0)])
    assert_same_with_little_room(again, want)
    again.close()


def test_an_evicted_series_whose_record_is_damaged_does_not_begin_anew_unnoticed(tmp_path):
    durable = narrow(tmp_path / "store", checkpoint_every=1e9)
    durable.observe([(f"s{i}", START, float(i)) for i in range(6)])
    durable.checkpoint()
    db = durable.store._db
    where = "WHERE slot=(SELECT slot FROM item WHERE item_id=?)"
    (data,) = db.execute(f"SELECT record FROM state {where}", (b"s0",)).fetchone()
    db.execute(f"UPDATE state SET record=? {where}", (data[:110] + bytes([data[110] ^ 1]) + data[111:], b"s0"))
    report = durable.observe([(f"s{i}", START + HOUR, 1.0) for i in (0, 1)])
    assert (report.accepted, report.rejected) == (1, 1)
    assert report.first["state.lost"][0] == "s0"
    with pytest.raises(StoreDamaged, match="s0"):
        durable.forecast(["s0"])
    durable.close()


def test_a_fork_evicts_nothing_into_the_store(tmp_path):
    durable = narrow(tmp_path / "store")
    durable.observe([("a", START, 1.0), ("b", START, 2.0)])
    fork = durable.predictor.fork()
    fork.observe([("b", START + HOUR, 9.0), ("c", START, 3.0)])
    assert "a" not in fork and "a" in durable.predictor
    fork.observe([("a", START + HOUR, 9.0)])
    assert fork.head("a") == 1, "the fork has forgotten it"
    assert set(durable.item_ids) == {"a", "b"}
    durable.close()


def test_what_was_rewound_stays_so(tmp_path):
    durable = narrow(tmp_path / "store", checkpoint_every=1e9)
    for step in range(3):
        durable.observe([(f"s{i}", START + step * HOUR, float(i + step)) for i in range(4)])
    durable.rewind("s0", START + HOUR)
    durable.store.close()
    again = narrow(tmp_path / "store")
    assert again.forecast(["s0", "s1"]).start.tolist() == [(START + n * HOUR).astype(int) for n in (2, 3)]
    again.close()


# ---- killed


def child(folder, pipe, checkpoint_every, opened=open_durable):
    """Streams from where the store says; tells each acknowledged tick."""
    durable = opened(folder, checkpoint_every=checkpoint_every)
    begin = int(durable.recovery.offset or b"0")
    os.write(pipe, b"%d\n" % begin)
    for number, rows in enumerate(ticks()[begin:], begin + 1):
        durable.observe(rows, offset=str(number).encode())
        os.write(pipe, b"%d\n" % number)
    durable.close()


def killed_once(folder, rng, checkpoint_every, opened=open_durable) -> int:
    """The last tick that was acknowledged by a process that was killed at a random moment, or that finished."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:  # pragma: no cover
        try:
            os.close(reader)
            child(folder, writer, checkpoint_every, opened)
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
    os.close(writer)
    told, heard = b"", rng.randrange(1, 12)
    with os.fdopen(reader, "rb") as pipe:
        while told.count(b"\n") < heard and (part := pipe.readline()):
            told += part
        time.sleep(rng.random() * 0.02)
        os.kill(pid, signal.SIGKILL)
        told += pipe.read()
    _, status = os.waitpid(pid, 0)
    assert not os.WIFEXITED(status) or os.WEXITSTATUS(status) == 0
    lines = [line for line in told.split(b"\n")[:-1] if line]
    return int(lines[-1]) if lines else 0


@pytest.mark.parametrize("checkpoint_every", [0.0, 1e9], ids=["always", "never"])
def test_what_was_acknowledged_survives_any_kill_and_nothing_counts_twice(tmp_path, checkpoint_every):
    rng, folder, acknowledged = random.Random(5), tmp_path / "store", 0
    oracle, fed = make_predictor(), 0
    for _ in range(40):
        acknowledged = max(acknowledged, killed_once(folder, rng, checkpoint_every))
        durable = open_durable(folder, checkpoint_every=1e9)
        reached = int(durable.recovery.offset or b"0")
        assert reached >= acknowledged
        for rows in ticks()[fed:reached]:
            oracle.observe(rows)
        fed = reached
        assert_same(durable.predictor, oracle)
        durable.store.close()
        if reached == TICKS:
            break
    assert reached == TICKS


@pytest.mark.parametrize(
    ("checkpoint_every", "kills"), [(0.0, 4), pytest.param(1e9, 40, marks=pytest.mark.slow)], ids=["always", "never"]
)
def test_a_kill_while_series_come_and_go_loses_nothing(tmp_path, monkeypatch, checkpoint_every, kills):
    monkeypatch.setattr(durable_module, "SLICE", 1)  # each eviction is a write
    rng, folder, acknowledged = random.Random(7), tmp_path / "store", 0
    for _ in range(kills):
        acknowledged = max(acknowledged, killed_once(folder, rng, checkpoint_every, narrow))
        durable = narrow(folder, checkpoint_every=1e9)
        reached = int(durable.recovery.offset or b"0")
        assert reached >= acknowledged
        durable.store.close()
        if reached == TICKS:
            break
    durable = narrow(folder)
    assert_same_with_little_room(durable, with_room_for_all(reached))
    durable.close()
