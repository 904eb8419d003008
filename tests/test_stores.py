"""One contract for every kind of store: what is acknowledged stays, what is not what was written is noticed."""

import contextlib
import json
import os
import shutil
import sqlite3
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fakeredis
import numpy as np
import pytest
import redis

from tsgdn.streaming.stores import (
    DeadLetter,
    StateStore,
    StoreBusy,
    StoreDamaged,
    StoreError,
    StoreFailed,
    StoreFenced,
    StoreFull,
    StoreRefused,
    disk,
    open_store,
    sqlite_file,
)
from tsgdn.streaming.stores import record as records_of
from tsgdn.streaming.stores import redis as redis_store
from tsgdn.streaming.stores.record import Record, RecordDamaged, layout_digest, pack, pack_many, unpack
from tsgdn.streaming.stores.redis import RedisStore

MODEL, LAYOUT = b"the model's name", b"its leaves' name"
KEY = bytes(range(32))
STRANGE = (
    "",
    " ",
    "a'; DROP TABLE item; --",
    "../../x",
    "\u00e9",
    "e\u0301",
    "\ud800",
    "a\0b",
    "%s{0}",
    "x" * 1000,
    "雪",
)


def record(item: str, *, seq: int = 1, epoch: int = 1, leaves: bytes = b"state", key: bytes | None = None) -> bytes:
    plain = Record(item, MODEL, LAYOUT, epoch, seq, 0, 5, 3, "h", "UTC", leaves, b"offset", b"extra", 0x300)
    return pack(plain, key=key)


class Files:
    """Stores in a folder."""

    key = None

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def store(self, **options: Any) -> StateStore:
        return open_store(self.folder, **{"key": self.key, **options})

    def sql(self, statement: str, *values: Any) -> None:
        """Behind the store's back."""
        with contextlib.closing(sqlite3.connect(self.folder / "00.sqlite")) as db, db:
            db.execute(statement, values)

    def flip(self, item: str) -> None:
        """Changes a byte of a record."""
        with contextlib.closing(sqlite3.connect(self.folder / "00.sqlite")) as db, db:
            name = records_of.name_bytes(item)
            (data,) = db.execute("SELECT record FROM state JOIN item USING(slot) WHERE item_id=?", (name,)).fetchone()
            wrong = data[:110] + bytes([data[110] ^ 1]) + data[111:]
            db.execute("UPDATE state SET record=? WHERE slot=(SELECT slot FROM item WHERE item_id=?)", (wrong, name))

    def swap(self, item: str, other: str) -> None:
        """Puts a record under another name."""
        a, b = (records_of.name_bytes(x) for x in (item, other))
        sub = "(SELECT record FROM state JOIN item USING(slot) WHERE item_id=?)"
        self.sql(f"UPDATE state SET record={sub} WHERE slot=(SELECT slot FROM item WHERE item_id=?)", a, b)

    def lose(self, item: str) -> None:
        self.sql("DELETE FROM state WHERE slot=(SELECT slot FROM item WHERE item_id=?)", records_of.name_bytes(item))

    def spoil_offset(self) -> None:
        self.sql("UPDATE position SET offset=? WHERE source=?", b"wrong", b"feed")

    def spoil_journal(self) -> None:
        self.sql("UPDATE journal SET batch=zeroblob(length(batch)) WHERE seq=2")

    def lose_tick(self) -> None:
        self.sql("DELETE FROM journal WHERE seq=2")


class SealedFiles(Files):
    """... under a key."""

    key = KEY


class Server:
    """Stores in an imitation of a Redis server."""

    key = None

    def __init__(self, folder: Path) -> None:
        self.server = fakeredis.FakeServer()

    @property
    def client(self) -> Any:
        return fakeredis.FakeRedis(server=self.server)

    def store(self, *, client: Any = None, **options: Any) -> StateStore:
        return RedisStore(
            "redis://here", client=client or self.client, **{"key": self.key, "unchecked": True, **options}
        )

    def flip(self, item: str) -> None:
        name = records_of.name_bytes(item)
        data = self.client.hget("tsgdn:{00}:state", name)
        self.client.hset("tsgdn:{00}:state", name, data[:110] + bytes([data[110] ^ 1]) + data[111:])

    def swap(self, item: str, other: str) -> None:
        a, b = (records_of.name_bytes(x) for x in (item, other))
        self.client.hset("tsgdn:{00}:state", b, self.client.hget("tsgdn:{00}:state", a))

    def lose(self, item: str) -> None:
        self.client.hdel("tsgdn:{00}:state", records_of.name_bytes(item))

    def spoil_offset(self) -> None:
        value = self.client.hget("tsgdn:{00}:position", "feed")
        self.client.hset("tsgdn:{00}:position", "feed", value[:-1] + b"?")

    def spoil_journal(self) -> None:
        rows = self.client.xrange("tsgdn:{00}:journal")
        self.client.delete("tsgdn:{00}:journal")
        for name, fields in rows:
            self.client.xadd("tsgdn:{00}:journal", {b"ticks": fields[b"ticks"][:-1] + b"\0"}, id=name)

    def lose_tick(self) -> None:
        self.client.xdel("tsgdn:{00}:journal", "2-0")


class SealedServer(Server):
    """... under a key."""

    key = KEY


@pytest.fixture(params=[Files, SealedFiles, Server, SealedServer], ids=["sqlite", "sqlite-key", "redis", "redis-key"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    return request.param(tmp_path / "store")


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path / "store")


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return Server(tmp_path)


def opened(place: Any, **options: Any) -> StateStore:
    store = place.store(**options)
    store.open(model=MODEL, layout=LAYOUT, owner="test")
    return store


def written(place: Any, items: tuple[str, ...], store: StateStore, *, seq: int = 1, **more: Any) -> dict[str, bytes]:
    made = {item: record(item, seq=seq, epoch=store.epoch, key=place.key, **more) for item in items}
    store.commit(made, seq=seq)
    return made


# ---- records --------------------------------------------------------------------------------------------------------

# written out by hand from the table in record.py, so that a change of the format shows
GOLDEN = (
    b"TSGS" + struct.pack("<HH", 1, 0x200) + MODEL + LAYOUT + struct.pack("<QQ", 3, 7)
    + struct.pack("<qqq", -1_000_000_000, 12, 10) + struct.pack("<HHHH", 2, 1, 3, 0) + struct.pack("<IIQ", 1, 4, 6)
    + b"leaves" + "é".encode() + b"h" + b"UTC" + b"9" + b"more"
)  # fmt: skip
GOLDEN += struct.pack("<I", zlib.crc32(GOLDEN))
GOLDEN_HEX = (
    "5453475301000002746865206d6f64656c2773206e616d65697473206c656176657327206e616d650300000000000000"
    "0700000000000000003665c4ffffffff0c000000000000000a0000000000000002000100030000000100000004000000"
    "06000000000000006c6561766573c3a968555443396d6f726595047da9"
)


def golden() -> Record:
    return Record("é", MODEL, LAYOUT, 3, 7, -1_000_000_000, 12, 10, "h", "UTC", b"leaves", b"9", b"more", 0x200)


def test_a_record_of_format_1_is_these_bytes_for_ever():
    assert GOLDEN.hex() == GOLDEN_HEX
    assert pack(golden()) == GOLDEN
    assert unpack(GOLDEN, item_id="é") == golden()


def test_every_flipped_bit_and_every_truncation_of_a_record_is_noticed():
    for key in (None, KEY):
        whole = pack(golden(), key=key)
        assert unpack(whole, key=key)._replace(flags=0x200) == golden()
        for bit in range(8 * len(whole)):
            wrong = bytearray(whole)
            wrong[bit // 8] ^= 1 << bit % 8
            with pytest.raises(RecordDamaged):
                unpack(bytes(wrong), key=key)
        for size in range(len(whole)):
            with pytest.raises(RecordDamaged):
                unpack(whole[:size], key=key)
        with pytest.raises(RecordDamaged):
            unpack(whole + b"\0", key=key)


def test_who_has_no_key_cannot_forge_a_record():
    with pytest.raises(RecordDamaged, match="no keyed seal") as error:
        unpack(pack(golden()), key=KEY)
    assert error.value.code == "state.key"
    with pytest.raises(RecordDamaged, match="checksum differs"):
        unpack(pack(golden(), key=bytes(32)), key=KEY)
    with pytest.raises(RecordDamaged, match="none was given"):
        unpack(pack(golden(), key=KEY))


def test_a_record_under_another_name_is_found_out():
    with pytest.raises(RecordDamaged, match="another item's") as error:
        unpack(GOLDEN, item_id="e")
    assert error.value.code == "state.item"


def test_many_records_are_packed_to_the_bytes_of_each():
    leaves = np.arange(3 * 40, dtype=np.uint8).reshape(3, 40)
    names = ["a", "雪" * 20, "\ud800"]
    for key in (None, KEY):
        many = pack_many(
            names, leaves, model=MODEL, layout=LAYOUT, epoch=2, seq=np.array([1, 2, 3]), start=np.array([-5, 0, 5]),
            head=9, count=np.array([7, 8, 9]), freq="D", tz="Europe/Paris", offset=b"o", extras=[b"", b"xy", b"z"],
            flags=np.array([0, 0x100, 0x200]), key=key,
        )  # fmt: skip
        for i, name in enumerate(names):
            one = Record(
                name, MODEL, LAYOUT, 2, i + 1, 5 * (i - 1), 9, 7 + i, "D", "Europe/Paris", leaves[i].tobytes(), b"o",
                (b"", b"xy", b"z")[i], 0x100 * i,
            )  # fmt: skip
            assert many[name] == pack(one, key=key)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"model": b"short"}, "expected 16 each"),
        ({"flags": 2}, "only bits 8 to 15"),
        ({"seq": -1}, "does not fit"),
        ({"item_id": "x" * 70_000}, "shorten it"),
    ],
)
def test_a_field_that_does_not_fit_is_refused_by_name(change, text):
    with pytest.raises(ValueError, match=text):
        pack(golden()._replace(**change))


def test_an_older_format_is_brought_up_step_by_step_and_the_original_stays(monkeypatch):
    """The chain itself: formats 2 and 3 of an imagined future, each with one more word in `extra`."""

    def add(word: bytes) -> Callable[[bytes], bytes]:
        def step(body: bytes) -> bytes:
            version = int.from_bytes(body[4:6], "little") + 1
            size = int.from_bytes(body[92:96], "little") + len(word)
            return body[:4] + struct.pack("<H", version) + body[6:92] + struct.pack("<I", size) + body[96:] + word

        return step

    before = bytes(GOLDEN)
    newer = records_of.migrate(GOLDEN, to=3, steps={1: add(b"+2"), 2: add(b"+3")})
    assert before == GOLDEN
    monkeypatch.setattr(records_of, "FORMAT", 3)
    assert unpack(newer).extra == b"more+2+3"
    with pytest.raises(RecordDamaged, match="nothing leads on"):
        unpack(GOLDEN)
    monkeypatch.setattr(records_of, "MIGRATIONS", {1: add(b"+2"), 2: add(b"+3")})
    assert unpack(GOLDEN) == unpack(newer)


def test_a_newer_format_is_refused_by_its_number():
    body = GOLDEN[:4] + struct.pack("<H", 2) + GOLDEN[6:-4]
    with pytest.raises(RecordDamaged, match="has format 2, this version reads 1 to 1: upgrade"):
        unpack(body + struct.pack("<I", zlib.crc32(body)))


def test_another_name_shape_type_or_order_is_another_layout():
    leaves = [("a", (2, 3), "float32"), ("b", (), "int64")]
    digests = {
        layout_digest(leaves),
        layout_digest(leaves[::-1]),
        layout_digest([("a", (3, 2), "float32"), leaves[1]]),
        layout_digest([("a", (2, 3), "bfloat16"), leaves[1]]),
        layout_digest([("c", (2, 3), "float32"), leaves[1]]),
    }
    assert len(digests) == 5


# ---- the contract ---------------------------------------------------------------------------------------------------


def test_what_was_committed_is_there_for_the_next_owner(place):
    store = opened(place)
    made = {
        item: record(item, epoch=store.epoch, key=place.key, leaves=item.encode("utf-8", "replace")) for item in STRANGE
    }
    store.commit(made, seq=1, offsets={"feed": b"\0\xff", "sink": b"3"}, outbox={b"id": b"message"})
    store.close()
    again = opened(place)
    assert again.epoch == store.epoch + 1
    assert again.read(STRANGE) == made
    assert dict(again.records()) == made
    assert set(again.item_ids()) == set(STRANGE) and len(again) == len(STRANGE)
    assert again.offsets() == {"feed": b"\0\xff", "sink": b"3"}
    assert list(again.outbox()) == [(b"id", b"message")]
    assert (again.seq, again.committed, dict(again.lost)) == (1, 1, {})
    assert again.read(["unknown"]) == {}
    again.close()


def test_the_journal_gives_back_what_was_appended_behind_the_states(place):
    store = opened(place)
    store.append([b"one", b"two"], seq=1)
    store.append([b"three"], seq=3)
    assert store.seq == 3
    store.commit(seq=1)  # within a row of several ticks
    store.close()
    again = opened(place)
    assert (again.committed, again.seq) == (1, 3)
    assert list(again.journal()) == [(2, b"two"), (3, b"three")]
    assert list(again.journal(2)) == [(3, b"three")]
    again.append([b"four"], seq=4)
    again.commit(seq=4)
    assert list(again.journal()) == []
    assert again.info().journal == 0
    again.append([b"five"], seq=5)
    assert list(again.journal()) == [(5, b"five")]
    again.close()


def test_numbers_that_turn_back_or_leave_a_gap_are_refused(place):
    store = opened(place)
    store.append([b"x"], seq=1)
    for seq in (1, 3, 0):
        with pytest.raises(ValueError, match="expected 2"):
            store.append([b"y"], seq=seq)
    with pytest.raises(ValueError, match="append it first"):
        store.commit(seq=2)
    with pytest.raises(ValueError, match="no tick"):
        store.append([], seq=2)
    with pytest.raises(ValueError, match="empty tick"):
        store.append([b""], seq=2)
    store.commit(seq=1)
    store.commit(seq=9)  # a replayable source needs no journal
    with pytest.raises(ValueError, match="only grow"):
        store.commit(seq=8)
    with pytest.raises(ValueError, match="are in the states and gone"):
        next(store.journal(3))
    with pytest.raises(ValueError, match="without a name"):
        store.commit(offsets={"": b""})
    assert store.seq == 9
    store.close()


def test_a_commit_larger_than_a_slice_moves_the_offset_last(place, monkeypatch):
    store = opened(place)
    made = {f"s{i}": record(f"s{i}", epoch=store.epoch, seq=2, key=place.key, leaves=bytes(3 << 20)) for i in range(5)}
    seen = []
    beside = place.store().view()

    def between() -> None:
        seen.append((len(list(beside.item_ids())), beside.offsets()))
        store.append([b"tick"], seq=store.seq + 1)

    store.append([b"a", b"b"], seq=1)
    store.commit(made, seq=2, offsets={"feed": b"2"}, between=between)
    assert seen == [(2, {}), (4, {})]
    assert beside.offsets() == {"feed": b"2"} and len(beside) == 5
    assert list(store.journal()) == [(3, b"tick"), (4, b"tick")]
    assert store.read(made) == made
    beside.close()
    store.close()


def test_a_deleted_series_is_gone_and_no_older_record_brings_it_back(place):
    store = opened(place)
    made = written(place, ("a", "b"), store)
    store.commit(dead=[DeadLetter("x", "a", b"a's row"), DeadLetter("x", "b", b"b's row")])
    store.append([b"rows of a"], seq=2)
    store.commit(seq=2, deleted=["a", "never seen"])
    assert store.read(["a", "b"]) == {"b": made["b"]}
    assert list(store.journal()) == []
    assert [letter.item_id for letter in store.dead_letters()] == ["b"]
    with pytest.raises(StoreRefused, match="deleted at 2"):
        store.commit({"a": record("a", seq=2, epoch=store.epoch, key=place.key)})
    with pytest.raises(ValueError, match="both written and deleted"):
        store.commit(made, deleted=["a"])
    store.close()
    again = opened(place)
    assert again.tombstones() == {"a": 2, "never seen": 2}
    with pytest.raises(StoreRefused, match="deleted at 2"):
        again.commit({"a": record("a", seq=1, epoch=again.epoch, key=place.key)})
    newer = record("a", seq=3, epoch=again.epoch, key=place.key)
    again.commit({"a": newer}, seq=3)  # it came back by new rows
    assert again.read(["a"]) == {"a": newer}
    assert again.tombstones() == {"never seen": 2}
    assert again.prune(tombstones=2) == 1
    assert again.tombstones() == {}
    again.close()


def test_no_byte_of_a_deleted_series_stays_in_the_files(files):
    store = opened(files)
    secret = b"the secret state of a series" * 400
    store.commit({"a": record("a", epoch=store.epoch, leaves=secret), "b": record("b", epoch=store.epoch)}, seq=1)
    store.append([secret], seq=2)
    store.commit(seq=2, deleted=["a"])
    for path in files.folder.iterdir():
        assert b"the secret" not in path.read_bytes(), path
    store.close()


@pytest.mark.parametrize("fault", ["flip", "swap", "lose"])
def test_a_spoilt_record_is_set_aside_and_the_others_are_served(place, fault):
    store = opened(place)
    made = written(place, ("a", "b", "c"), store)
    store.close()
    place.swap("b", "a") if fault == "swap" else getattr(place, fault)("a")
    beside = place.store().view()
    assert dict(beside.records()) == {"b": made["b"], "c": made["c"]}
    assert list(beside.lost) == ["a"]
    beside.close()
    again = opened(place)
    assert again.read(["a", "b", "c"]) == {"b": made["b"], "c": made["c"]}
    assert again.lost["a"] == {"flip": "state.checksum", "swap": "state.item", "lose": "state.missing"}[fault]
    again.close()
    third = opened(place)  # it is known from now on, without reading it
    assert list(third.lost) == ["a"] and len(third) == 2
    assert third.info().lost == 1
    newer = record("a", seq=2, epoch=third.epoch, key=place.key)
    third.commit({"a": newer}, seq=2)
    assert third.read(["a"]) == {"a": newer}
    assert list(third.lost) == ["a"]  # the answer keeps its flag until somebody says that he knows
    third.release(["a"])
    assert dict(third.lost) == {}
    third.close()
    assert dict(opened(place).lost) == {}


def test_a_caller_can_set_a_record_aside(place):
    store = opened(place)
    written(place, ("a", "b"), store)
    store.quarantine("a", "kernel.mismatch")
    store.quarantine("never seen", "why")
    assert list(store.read(["a", "b"])) == ["b"]
    assert dict(store.lost) == {"a": "kernel.mismatch", "never seen": "why"}
    store.commit(deleted=["a"])
    assert dict(store.lost) == {"never seen": "why"}
    store.close()


@pytest.mark.parametrize("fault", ["spoil_offset", "spoil_journal", "lose_tick"])
def test_spoilt_offsets_and_ticks_are_refused(place, fault):
    store = opened(place)
    for seq in (1, 2, 3):
        store.append([b"tick %d" % seq], seq=seq)
    store.commit(offsets={"feed": b"place"})
    store.close()
    getattr(place, fault)()
    with pytest.raises(StoreDamaged):
        list(opened(place).journal())


def test_a_buried_tick_is_passed_over_and_kept(place):
    store = opened(place)
    store.append([b"one", b"two", b"three"], seq=1)
    store.append([b"four"], seq=4)
    store.append([b"five"], seq=5)
    store.bury(2, "crashes")
    store.bury(4, "crashes")
    assert list(store.journal()) == [(1, b"one"), (3, b"three"), (5, b"five")]
    assert list(store.dead_letters()) == [DeadLetter("crashes", "", b"two", 2), DeadLetter("crashes", "", b"four", 4)]
    with pytest.raises(ValueError, match="no tick 6"):
        store.bury(6, "crashes")
    store.append([b"six"], seq=6)
    store.close()
    again = opened(place)
    assert list(again.journal()) == [(1, b"one"), (3, b"three"), (5, b"five"), (6, b"six")]
    again.close()


def test_outbox_and_dead_letters_keep_their_order_until_they_are_done(place):
    store = opened(place)
    store.commit(seq=1, outbox={b"2": b"first", b"1": b"second"}, dead=[DeadLetter("value.type", "é", b"\0raw")])
    store.commit(seq=2, outbox={b"0": b"third"}, dead=[DeadLetter("ts.late", "", b"row", 1)])
    store.sent([b"1"])
    assert list(store.outbox()) == [(b"2", b"first"), (b"0", b"third")]
    assert list(store.dead_letters()) == [
        DeadLetter("value.type", "é", b"\0raw", 1),
        DeadLetter("ts.late", "", b"row", 1),
    ]
    assert store.prune(dead=1) == 2
    assert list(store.dead_letters()) == []
    store.close()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"model": b"another model's "}, "states of model"),
        ({"layout": b"another layout's"}, "states of layout"),
        ({"shards": 2}, "states of shards 1, this is 2"),
    ],
)
def test_states_of_another_model_layout_or_number_of_shards_are_refused(place, change, text):
    store = opened(place)
    written(place, ("a",), store)
    store.close()
    shards = {"shards": change["shards"]} if "shards" in change else {}
    with pytest.raises(StoreRefused, match=text) as error:
        place.store(**shards).open(**{"model": MODEL, "layout": LAYOUT, "owner": "x", **change} if not shards else
                                   {"model": MODEL, "layout": LAYOUT, "owner": "x"})  # fmt: skip
    assert "\n" not in str(error.value)
    assert opened(place).epoch == 2  # nothing was changed


def test_a_store_is_opened_with_the_key_it_was_written_with(place):
    store = opened(place)
    written(place, ("a",), store)
    store.close()
    with pytest.raises(StoreRefused, match="a key: give"):
        opened(place, key=None if place.key else KEY)
    if place.key:
        with pytest.raises(StoreRefused, match="another key"):
            opened(place, key=bytes(32))
        with pytest.raises(StoreRefused, match="another key"):
            place.store(key=bytes(32)).view()
    assert len(opened(place)) == 1


def test_records_that_do_not_belong_are_refused_before_anything_is_written(place):
    store = opened(place)
    good = record("a", epoch=store.epoch, key=place.key)
    plain = Record("b", MODEL, LAYOUT, store.epoch, 1, 0, 0, 0, "h", "", b"")
    for wrong, text in (
        (b"no record", "cannot be stored"),
        (pack(plain._replace(model=b"another model's "), key=place.key), "another model"),
        (pack(plain._replace(layout=b"another layout's"), key=place.key), "another layout"),
        (pack(plain._replace(epoch=9), key=place.key), "epoch 9, this owner has 1"),
        (pack(plain._replace(item_id="c"), key=place.key), "another item"),
        (pack(plain, key=None if place.key else KEY), "another kind of seal"),
    ):
        with pytest.raises(StoreRefused, match=text):
            store.commit({"a": good, "b": wrong}, seq=1)
    assert (len(store), store.seq) == (0, 0)
    store.close()


def test_a_second_writer_is_told_who_has_the_store(place):
    store = opened(place)
    with pytest.raises(StoreBusy, match=f"process {os.getpid()} on .* \\(test\\)"):
        opened(place)
    with pytest.raises(StoreBusy, match="lease runs"):
        place.store().open(model=MODEL, layout=LAYOUT, owner="second", takeover=True)
    written(place, ("a",), store)  # the first one is not disturbed
    with pytest.raises(StoreRefused, match="open already"):
        store.open(model=MODEL, layout=LAYOUT, owner="test")
    store.close()
    store.close()
    assert opened(place).epoch == 2


def test_an_owner_who_slept_through_a_takeover_commits_nothing(place):
    asleep = opened(place, lease=0.05)
    made = written(place, ("a",), asleep)
    asleep.append([b"durable"], seq=2)
    time.sleep(0.06)
    awake = place.store()
    assert awake.open(model=MODEL, layout=LAYOUT, owner="second", takeover=True) == 2
    for write in (
        lambda: asleep.append([b"lost"], seq=3),
        lambda: asleep.commit({"a": record("a", seq=2, epoch=1, key=place.key)}, seq=2),
        lambda: asleep.quarantine("a", "x"),
        lambda: asleep.sent([b"1"]),
        asleep.renew,
    ):
        with pytest.raises(StoreFenced, match="taken over by epoch 2, this owner had 1"):
            write()
    asleep.close()
    assert awake.read(["a"]) == made
    assert list(awake.journal()) == [(2, b"durable")]
    awake.append([b"goes on"], seq=3)
    awake.close()


def test_readers_look_beside_the_writer_and_change_nothing(place):
    with pytest.raises(StoreRefused, match="there is no store"):
        place.store().view()
    store = opened(place)
    beside = place.store().view()
    made = written(place, ("a",), store)
    store.append([b"tick"], seq=2)
    assert beside.read(["a"]) == made
    assert list(beside.journal(1)) == [(2, b"tick")]
    for write in (lambda: beside.append([b"x"], seq=1), lambda: beside.commit(seq=2), lambda: beside.sent([b"x"])):
        with pytest.raises((StoreRefused, ValueError)):
            write()
    info = beside.info()
    assert (info.items, info.seq, info.committed, info.journal) == (1, 2, 1, 1)
    assert (info.owner, info.pid, info.epoch, info.model, info.shards) == ("test", os.getpid(), 1, MODEL, 1)
    store.close()
    assert beside.info().owner == ""
    beside.close()
    with pytest.raises(StoreRefused, match="not open"):
        beside.read(["a"])


def test_a_copy_holds_all_of_one_moment(place, tmp_path):
    store = opened(place)
    made = written(place, STRANGE, store, seq=3)
    store.append([b"four", b"five"], seq=4)
    store.append([b"six"], seq=6)
    store.bury(5, "crashes")
    store.commit(offsets={"feed": b"6"}, outbox={b"1": b"m"}, deleted=[" "])
    store.quarantine("\u00e9", "why")
    store.copy(tmp_path / "copy")
    store.append([b"later"], seq=7)
    with pytest.raises(StoreRefused, match="exists"):
        store.copy(tmp_path / "copy")
    copy = open_store(tmp_path / "copy", key=place.key)
    assert copy.open(model=MODEL, layout=LAYOUT, owner="reader") == store.epoch + 1
    assert dict(copy.records()) == {item: data for item, data in made.items() if item not in (" ", "\u00e9")}
    assert list(copy.journal()) == [(4, b"four"), (6, b"six")]
    assert (copy.committed, copy.seq) == (3, 6)
    assert copy.offsets() == {"feed": b"6"} and list(copy.outbox()) == [(b"1", b"m")]
    assert copy.tombstones() == store.tombstones() and dict(copy.lost) == {"\u00e9": "why"}
    assert list(copy.dead_letters()) == list(store.dead_letters())
    copy.close()
    assert {path.name for path in (tmp_path / "copy").iterdir()} <= {"00.sqlite", "00.lock"}
    store.close()


def test_without_a_journal_ticks_are_only_counted(place):
    store = opened(place, durability="memory")
    store.append([b"one", b"two"], seq=1)
    assert store.seq == 2 and list(store.journal()) == []
    store.commit(seq=2)
    store.append([b"three"], seq=3)
    store.commit(offsets={"x": b"1"})
    assert store.seq == 3
    store.close()
    again = opened(place)
    assert (again.seq, again.committed) == (2, 2)
    again.close()


def test_shards_do_not_touch_each_other(place):
    stores = [place.store(shard=shard, shards=3) for shard in range(3)]
    for number, store in enumerate(stores):
        store.open(model=MODEL, layout=LAYOUT, owner=f"worker {number}")
        written(place, (f"s{number}",), store)
    assert [list(store.item_ids()) for store in stores] == [["s0"], ["s1"], ["s2"]]
    for store in stores:
        store.close()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"url": "x", "key": b"short"}, "expected 16 to 64"),
        ({"url": "x", "shard": 3, "shards": 3}, "expected 0 to 2"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, text):
    with pytest.raises(ValueError, match=text):
        open_store(**arguments)


def test_an_address_of_no_store_is_refused():
    with pytest.raises(StoreRefused, match="kafka:// is no kind of store"):
        open_store("kafka://broker")


def test_redis_is_wanted_by_the_name_of_its_extra():
    code = (
        "import sys\nsys.modules['redis'] = None\nfrom tsgdn.streaming.stores import open_store, StoreRefused\n"
        "try: open_store('redis://x')\nexcept StoreRefused as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "pip install 'tsgdn[redis]'" in done.stdout, done.stderr


# ---- files ----------------------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_what_was_committed(files):
    """Room for so many pages more and no further: whatever the write that fails, the state before is there."""
    store: Any = opened(files)
    made = written(files, ("a", "b"), store)
    store.append([b"tick"], seq=2)
    refused = 0
    for extra in range(12):
        # the limit is counted where pages are, in the file and its log together
        (pages,) = store._db.execute("PRAGMA page_count").fetchone()
        store._db.execute(f"PRAGMA max_page_count={pages + extra}")
        try:
            store.append([bytes(20_000)], seq=store.seq + 1)
            break
        except StoreFull:
            refused += 1
        with pytest.raises(StoreFull, match="what was committed is intact"):
            store.commit({"c": record("c", epoch=1, leaves=bytes(200_000))}, seq=2, offsets={"feed": b"2"})
        assert store.read(["a", "b", "c"]) == made
        assert list(store.journal()) == [(2, b"tick")] and store.offsets() == {}
    assert refused > 2
    store._db.execute("PRAGMA max_page_count=1000000")  # somebody made room
    store.commit({"c": record("c", epoch=1, leaves=bytes(200_000))}, seq=2, offsets={"feed": b"2"})
    assert len(store) == 3
    store.close()
    assert len(opened(files)) == 3


def test_a_device_that_fails_ends_all_writing(files):
    code = f"""
import resource, signal, sys
from tsgdn.streaming.stores import *
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
store = open_store({str(files.folder)!r})
store.open(model={MODEL!r}, layout={LAYOUT!r}, owner="x")
store.append([b"durable"], seq=1)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
for size in (300_000, 10):
    try: store.append([bytes(size)], seq=store.seq + 1)
    except StoreError as error: print(type(error).__name__, flush=True)
print(list(store.journal()) == [(1, b"durable")], flush=True)
store.close()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["StoreFailed", "StoreFailed", "True"], done.stderr
    store = opened(files)
    assert list(store.journal()) == [(1, b"durable")]
    store.close()


def crashed(files: Files, target: Path, store: StateStore) -> Files:
    """The files as a kill would leave them now."""
    shutil.copytree(files.folder, target)
    return Files(target)


def test_a_log_that_was_not_copied_is_missed(files, tmp_path):
    store = opened(files)
    written(files, ("a",), store)
    torn = crashed(files, tmp_path / "torn", store)
    whole = crashed(files, tmp_path / "whole", store)
    store.close()
    assert len(opened(whole)) == 1
    (torn.folder / "00.sqlite-wal").unlink()
    (torn.folder / "00.sqlite-shm").unlink(missing_ok=True)
    for use in (lambda: opened(torn), lambda: torn.store().view()):
        with pytest.raises(StoreDamaged, match=r"00\.sqlite-wal is missing, and the states in it"):
            use()
    older = opened(torn, unchecked=True)  # somebody decided so
    assert older.epoch == 2
    older.close()


def test_a_store_that_was_killed_and_then_refused_is_left_as_it_is(files, tmp_path):
    store = opened(files)
    made = written(files, ("a",), store)
    store.append([b"two"], seq=2)
    killed = crashed(files, tmp_path / "killed", store)
    store.close()
    before = {path.name: path.read_bytes() for path in killed.folder.glob("*.sqlite*") if path.suffix != ".sqlite-shm"}
    with pytest.raises(StoreRefused, match="states of model"):
        killed.store().open(model=b"another model's ", layout=LAYOUT, owner="x")
    with pytest.raises(StoreRefused, match="without a key"):
        opened(killed, key=KEY)
    assert all((killed.folder / name).read_bytes() == data for name, data in before.items())
    assert {path.name for path in killed.folder.iterdir()} >= {"00.sqlite", "00.sqlite-wal"}
    again = opened(killed)
    assert again.read(["a"]) == made and list(again.journal()) == [(2, b"two")]
    again.close()


def test_a_process_that_ends_without_closing_leaves_a_store_that_opens(files):
    code = f"""
from tsgdn.streaming.stores import *
store = open_store({str(files.folder)!r})
store.open(model={MODEL!r}, layout={LAYOUT!r}, owner="x")
store.append([b"durable"], seq=1)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    store = opened(files)
    assert list(store.journal()) == [(1, b"durable")]
    store.close()


@pytest.mark.parametrize("left", ["nothing but the log", "an empty file"])
def test_a_store_that_is_gone_is_not_made_anew(files, tmp_path, left):
    store = opened(files)
    written(files, ("a",), store)
    torn = crashed(files, tmp_path / "torn", store)
    store.close()
    (torn.folder / "00.sqlite").unlink()
    if left == "an empty file":
        (torn.folder / "00.sqlite").touch()
    with pytest.raises(StoreDamaged, match="put it back"):
        opened(torn)


def test_a_file_that_is_no_store_is_refused(files):
    files.folder.mkdir()
    (files.folder / "00.sqlite").write_text("item,time,value\n" * 1000)
    with pytest.raises(StoreDamaged, match="not a database"):
        opened(files)
    (files.folder / "00.sqlite").unlink()
    files.sql("CREATE TABLE other(x)")
    with pytest.raises(StoreRefused, match="is no store of tsgdn"):
        opened(files)


def test_a_store_of_a_newer_format_is_refused_untouched(files):
    opened(files).close()
    value = b"2"
    seal = records_of.seal_of(None, "meta", b"format", value)
    files.sql("UPDATE meta SET value=?, seal=? WHERE key=?", value, seal, b"format")
    before = (files.folder / "00.sqlite").read_bytes()
    for use in (lambda: opened(files), lambda: files.store().view()):
        with pytest.raises(StoreRefused, match="has format 2, this version reads up to 1: upgrade tsgdn"):
            use()
    assert (files.folder / "00.sqlite").read_bytes() == before


def a_small_store(folder: Path) -> Files:
    files = Files(folder)
    store = opened(files)
    written(files, ("a", "b", "c"), store, leaves=b"state" * 300)
    store.append([b"two"], seq=2)
    store.append([b"three"], seq=3)
    store.commit(offsets={"feed": b"3"}, deleted=["c"], outbox={b"1": b"m"}, dead=[DeadLetter("x", "y", b"z")])
    store.close()
    return files


def contents(files: Files) -> dict[str, Any]:
    store = opened(files)
    try:
        return {
            "records": dict(store.records()), "found": store.read(["a", "b", "c"]), "journal": list(store.journal()),
            "offsets": store.offsets(), "outbox": list(store.outbox()), "dead": list(store.dead_letters()),
            "tombstones": store.tombstones(), "counts": (store.seq, store.committed, store.epoch),
            "lost": dict(store.lost),
        }  # fmt: skip
    finally:
        store.close()


def check_flips(folder: Path, places: Any) -> dict[str, int]:
    """Flips a bit at each place; the store must refuse, name what is lost, or give what it gave before."""
    files = a_small_store(folder / "good")
    good = (files.folder / "00.sqlite").read_bytes()
    before = contents(a_small_store(folder / "same"))
    torn = Files(folder / "torn")
    torn.folder.mkdir()
    found = {"refused": 0, "lost": 0, "unused": 0}
    for place, bit in places(len(good)):
        for path in torn.folder.iterdir():
            path.unlink()
        wrong = bytearray(good)
        wrong[place] ^= 1 << bit
        (torn.folder / "00.sqlite").write_bytes(wrong)
        try:
            after = contents(torn)
        except StoreError:
            found["refused"] += 1
            continue
        lost = after.pop("lost")
        assert set(lost) <= {"a", "b"}
        for name in ("records", "found"):
            assert after.pop(name) == {item: data for item, data in before[name].items() if item not in lost}, place
        assert {**before, **after} == before, place
        found["lost" if lost else "unused"] += 1
    return found


def test_a_flipped_bit_in_the_file_is_noticed_or_lies_where_nothing_is(tmp_path):
    rng = np.random.default_rng(0)

    def some(size: int) -> Any:
        # half of them within what is filled: headers of pages and the rows at their ends
        filled = [page + at for page in range(0, size, 4096) for at in (0, 3, 5, 8, 9, *range(3300, 4096, 97))]
        places = [*rng.choice(filled, 110, replace=False).tolist(), *rng.integers(0, size, 40).tolist()]
        return zip(places, rng.integers(0, 8, len(places)).tolist(), strict=True)

    found = check_flips(tmp_path, some)
    assert found["refused"] > 10 and found["lost"] > 2, found


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_flipped_bit_in_any_byte_of_the_file_is_noticed_or_lies_where_nothing_is(tmp_path):
    found = check_flips(tmp_path, lambda size: ((place, (place * 5 + place // 8) % 8) for place in range(size)))
    print(json.dumps(found))
    assert found["refused"] > 1000 and found["lost"] > 1000


def test_a_child_that_was_forked_may_not_use_the_store_nor_take_its_lock_along(files):
    code = f"""
import os, sys, time
from tsgdn.streaming.stores import *
store = open_store({str(files.folder)!r})
store.open(model={MODEL!r}, layout={LAYOUT!r}, owner="x")
store.append([b"durable"], seq=1)
child = os.fork()
if not child:
    for use in (lambda: store.append([b"x"], seq=2), lambda: list(store.journal()), lambda: store.read(["a"])):
        try: use()
        except StoreRefused as error: print("open it after the fork" in str(error), flush=True)
    store.close()
    del store
    sys.exit()
os.waitpid(child, 0)
store.append([b"goes on"], seq=2)
sleeper = os.fork()
if not sleeper:
    os.close(1); os.close(2); time.sleep(60)
print(sleeper, flush=True)
os._exit(0)  # killed; a child of it is still there
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    *said, sleeper = done.stdout.split()
    assert said == ["True"] * 3, done.stderr
    try:
        store = opened(files)
        assert [tick for _, tick in store.journal()] == [b"durable", b"goes on"]
        store.close()
    finally:
        os.kill(int(sleeper), 9)


def test_another_process_is_told_which_one_has_the_store(files):
    code = f"""
import sys
from tsgdn.streaming.stores import *
store = open_store({str(files.folder)!r})
store.open(model={MODEL!r}, layout={LAYOUT!r}, owner="the other one")
print("open", flush=True)
sys.stdin.read()
"""
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdin is not None and child.stdout is not None
    with child:
        assert child.stdout.readline() == "open\n"
        with pytest.raises(StoreBusy, match=f"process {child.pid} on .* \\(the other one\\)"):
            opened(files)
        child.kill()
    store = opened(files)  # the system's lock died with it
    assert store.epoch == 2
    store.close()


def test_a_folder_on_a_network_is_refused(files, tmp_path, monkeypatch):
    mounts = tmp_path / "mountinfo"
    rows = (
        "22 1 0:21 / / rw - ext4 /dev/vda rw",
        f"23 22 0:22 / {tmp_path} rw shared:1 - tmpfs tmpfs rw",
        f"24 23 0:23 / {files.folder} rw - nfs4 server:/x rw",
    )
    mounts.write_text("\n".join(rows))
    files.folder.mkdir()
    assert disk.filesystem(files.folder, mounts) == "nfs4"
    assert disk.filesystem(tmp_path / "other", mounts) == "tmpfs"
    assert disk.filesystem(Path("/"), mounts) == "ext4"
    assert disk.filesystem(files.folder, tmp_path / "absent") == ""
    monkeypatch.setattr(sqlite_file, "filesystem", lambda folder: "nfs4")
    with pytest.raises(StoreRefused, match="lies on nfs4"):
        opened(files)
    opened(files, unchecked=True).close()


def test_a_place_whose_locks_keep_nobody_out_is_refused(files, monkeypatch):
    monkeypatch.setattr(disk.fcntl, "flock", lambda handle, how: None)
    with pytest.raises(StoreRefused, match="locks keep nobody out"):
        opened(files)


def test_a_folder_that_cannot_be_written_is_refused(files, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StoreRefused, match="cannot be made"):
        opened(Files(tmp_path / "file" / "store"))


# ---- servers --------------------------------------------------------------------------------------------------------


class Broken:
    """A client whose connection breaks on chosen commands, before or after the server has carried them out."""

    def __init__(self, client: Any, breaks: list[str]) -> None:
        self._client, self.breaks = client, breaks

    def __getattr__(self, name: str) -> Any:
        if self.breaks[:1] == ["gone"]:
            raise redis.ConnectionError("connection refused")
        return getattr(self._client, name)

    def pipeline(self, **options: Any) -> Any:
        pipe = self._client.pipeline(**options)
        execute = pipe.execute

        def broken(*args: Any) -> Any:
            how = self.breaks.pop(0) if self.breaks else ""
            if how == "before":
                pipe.reset()
                raise redis.ConnectionError("connection reset")
            done = execute(*args)
            if how == "after":
                raise redis.WatchError("a ConnectionError occurred while watching")
            return done

        pipe.execute = broken
        return pipe


@pytest.mark.parametrize("breaks", [["before"], ["after"], ["before", "before", "after"], ["before", "after"]])
def test_a_connection_that_breaks_in_a_commit_neither_loses_nor_doubles_it(server, monkeypatch, breaks):
    monkeypatch.setattr(redis_store.time, "sleep", lambda seconds: None)
    client = Broken(server.client, [])
    store = opened(server, client=client)
    client.breaks = list(breaks)
    store.append([b"one"], seq=1)
    client.breaks = list(breaks)
    store.commit({"a": record("a")}, seq=1, offsets={"feed": b"1"}, dead=[DeadLetter("x", "", b"once")])
    assert (store.seq, store.committed) == (1, 1)
    assert [letter.raw for letter in store.dead_letters()] == [b"once"]
    store.append([b"two"], seq=2)
    assert list(store.journal()) == [(2, b"two")]
    store.close()


@pytest.mark.parametrize("breaks", [["before"] * 4, ["before"] * 3 + ["after"]])
def test_after_a_server_did_not_answer_the_store_finds_out_what_it_did(server, monkeypatch, breaks):
    monkeypatch.setattr(redis_store.time, "sleep", lambda seconds: None)
    client = Broken(server.client, [])
    store = opened(server, client=client)
    client.breaks = list(breaks)
    with pytest.raises(StoreFailed, match="does not answer"):
        store.append([b"one"], seq=1)
    store.renew()
    assert store.seq == (1 if "after" in breaks else 0)
    store.append([b"next"], seq=store.seq + 1)
    assert [seq for seq, _ in store.journal()] == list(range(1, store.seq + 1))
    client.breaks = ["gone"]
    with pytest.raises(StoreFailed, match="does not answer"):
        store.read(["a"])
    client.breaks = []
    store.close()


def test_a_server_that_lost_writes_is_found_out(server):
    store = opened(server)
    store.append([b"one"], seq=1)
    old = server.client.hget("tsgdn:{00}:meta", "now")
    store.append([b"two"], seq=2)
    server.client.hset("tsgdn:{00}:meta", "now", old)  # a replica that had not heard of it
    server.client.xdel("tsgdn:{00}:journal", "2-0")
    with pytest.raises(StoreDamaged, match="holds tick 1, 2 was durable"):
        store.append([b"three"], seq=3)
    store.close()
    server.client.hset("tsgdn:{00}:meta", "until", "0")
    again = opened(server)
    assert list(again.journal()) == [(1, b"one")]
    again.close()


def test_a_server_that_lost_a_part_of_a_store_is_refused(server):
    store = opened(server)
    written(server, ("a", "b"), store)
    store.append([b"two"], seq=2)
    store.close()
    kept = server.client.xrange("tsgdn:{00}:journal")
    server.client.delete("tsgdn:{00}:journal")
    with pytest.raises(StoreDamaged, match="journal ends at tick 1, 2 was durable"):
        opened(server)
    for name, fields in kept:
        server.client.xadd("tsgdn:{00}:journal", fields, id=name)
    server.client.delete("tsgdn:{00}:state")
    lossy = opened(server)
    assert dict(lossy.lost) == {"a": "state.missing", "b": "state.missing"}
    lossy.close()
    server.client.delete("tsgdn:{00}:meta")
    with pytest.raises(StoreDamaged, match="lost its description"):
        opened(server)


def test_a_server_that_may_evict_is_refused(server):
    class Told:
        """A client that knows its server's settings."""

        def __init__(self, **settings: str) -> None:
            self.client, self.settings = server.client, settings

        def __getattr__(self, name: str) -> Any:
            return getattr(self.client, name)

        def info(self, section: str) -> dict[str, str]:
            raise redis.ResponseError("unknown command")

        def config_get(self, name: str) -> dict[bytes, bytes]:
            value = self.settings.get(name.replace("-", "_"))
            return {} if value is None else {name.encode(): value.encode()}

    for settings in ({}, {"maxmemory_policy": "allkeys-lru"}):
        with pytest.raises(StoreRefused, match="set noeviction"):
            opened(server, client=Told(**settings), unchecked=False)
    good = {"maxmemory_policy": "noeviction"}
    with pytest.raises(StoreRefused, match="appendfsync no file"):
        opened(server, client=Told(**good), unchecked=False, durability="full")
    with pytest.raises(StoreRefused, match="appendfsync everysec"):
        opened(
            server, client=Told(**good, appendonly="yes", appendfsync="everysec"), unchecked=False, durability="full"
        )
    opened(
        server, client=Told(**good, appendonly="yes", appendfsync="always"), unchecked=False, durability="full"
    ).close()
    opened(server, client=Told(**good), unchecked=False).close()


def test_a_server_without_room_says_so_and_keeps_what_it_has(server):
    store: Any = opened(server)
    store.append([b"one"], seq=1)
    client = server.client

    class Full:
        def __getattr__(self, name: str) -> Any:
            return getattr(client, name)

        def pipeline(self, **options: Any) -> Any:
            pipe = client.pipeline(**options)

            def refuse(*args: Any) -> None:
                raise redis.OutOfMemoryError("command not allowed when used memory > 'maxmemory'.")

            pipe.execute = refuse
            return pipe

    store._client = Full()
    with pytest.raises(StoreFull, match="what was committed is intact"):
        store.append([b"two"], seq=2)
    store._client = client
    store.append([b"two"], seq=2)
    assert list(store.journal()) == [(1, b"one"), (2, b"two")]
    store.close()


def test_messages_of_a_log_are_acknowledged_in_the_transaction_of_the_state(server):
    store: Any = opened(server)
    store.also = lambda pipe: pipe.set("acknowledged", "1")
    store.commit({"a": record("a")}, seq=1)
    assert server.client.get("acknowledged") == b"1"
    store.close()


def test_a_password_does_not_get_into_messages():
    store = RedisStore("redis://user:secret@host:1/0", unchecked=True)
    assert "secret" not in store.place and "host:1/0" in store.place
