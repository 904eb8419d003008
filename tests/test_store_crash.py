"""Processes that write to a store are killed at any moment: what was acknowledged is there, and nothing counts twice.

A worker follows a feed whose ticks follow from their number, so that what the states must be after tick n is known. It
reports each tick that the store has acknowledged. It is killed, its successor recovers what is there, compares it with
what it must be, and goes on; it must not know less than was acknowledged. Workers are forked by a process that has
imported everything, so that a kill costs milliseconds.
"""

import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

MODEL, LAYOUT = b"the model's name", b"its leaves' name"
SERIES = 12


# ---- the worker: runs in a process of its own, knows nothing of pytest -----------------------------------------------


def tick_of(seq: int) -> list[list[Any]]:
    """Events of a tick: [series, value], or [series] that is deleted."""
    rng = random.Random(seq)
    events = [[rng.randrange(SERIES), rng.randrange(1 << 30)] for _ in range(rng.randrange(1, 6))]
    return [*events, [rng.randrange(SERIES)]] if seq % 7 == 0 else events


def applied(state: tuple[int, int], value: int) -> tuple[int, int]:
    """A state that tells how many values went in, which, and in what order."""
    return state[0] + 1, zlib.crc32(struct.pack("<Iq", state[1], value))


def truth(seq: int) -> dict[str, tuple[int, int]]:
    """The states after a tick."""
    states: dict[str, tuple[int, int]] = {}
    for number in range(1, seq + 1):
        for series, *value in tick_of(number):
            if value:
                states[f"s{series}"] = applied(states.get(f"s{series}", (0, 0)), value[0])
            else:
                states.pop(f"s{series}", None)
    return states


class Worker:
    """Follows the feed through a store."""

    def __init__(self, order: dict[str, Any]) -> None:
        from tsgdn.streaming import stores

        self.order, self.plant = order, order.get("plant")
        self.rng = random.Random(order["seed"])
        stores.SLICE = order.get("slice", 30_000)
        stores.slices.__defaults__ = (order.get("slice", 30_000),)
        if "statement" in order:
            self.die_at_statement(order["statement"])
        options = {"durability": order.get("durability", "normal"), "unchecked": "://" in order["url"]}
        self.store = stores.open_store(order["url"], **options)
        self.states: dict[str, tuple[int, int]] = {}
        self.dirty: set[str] = set()
        self.deleted: set[str] = set()

    def die_at_statement(self, number: int) -> None:
        from tsgdn.streaming.stores import sqlite_file as sqlite

        connect, count = sqlite.sqlite3.connect, 0

        def traced(*args: Any, **options: Any) -> Any:
            def seen(statement: str) -> None:
                nonlocal count
                count += 1
                if count == number:
                    die()

            db = connect(*args, **options)
            db.set_trace_callback(seen)
            return db

        class Module:
            def __getattr__(self, name: str) -> Any:
                return traced if name == "connect" else getattr(real, name)

        real: Any = sqlite.sqlite3
        sqlite.sqlite3 = Module()  # type: ignore[assignment]

    def recover(self) -> None:
        from tsgdn.streaming.stores.record import unpack

        store = self.store
        store.open(model=MODEL, layout=LAYOUT, owner="worker")
        held = {}
        for item, data in store.records():
            record = unpack(data, item_id=item)
            self.states[item], held[item] = struct.unpack_from("<II", record.leaves), record.seq
            assert record.count == self.states[item][0]
        if store.lost:
            raise AssertionError(f"set aside: {dict(store.lost)}")
        offset = int(store.offsets().get("feed", b"0"))
        if offset != store.committed:
            raise AssertionError(f"offset {offset}, committed {store.committed}")
        if self.plant == "numbers ignored":
            held = {}
        last = store.committed
        for seq, tick in store.journal():
            if seq != last + 1:
                raise AssertionError(f"tick {seq} follows {last}")
            last = seq
            for series, *value in json.loads(tick):
                if seq > held.get(f"s{series}", 0):
                    self.take(f"s{series}", value)
        if last != store.seq or self.states != truth(last):
            raise AssertionError(f"tick {last} of {store.seq}: {self.states}, must be {truth(last)}")
        say(f"R {last}")

    def take(self, item: str, value: list[int]) -> None:
        if value:
            self.states[item] = applied(self.states.get(item, (0, 0)), value[0])
            self.dirty.add(item)
            self.deleted.discard(item)
        elif self.states.pop(item, None) is not None:
            self.dirty.discard(item)
            self.deleted.add(item)

    def tick(self, *, take: bool = True) -> None:
        """One to three ticks in one row of the journal."""
        first = self.store.seq + 1
        ticks = [tick_of(seq) for seq in range(first, first + self.rng.randrange(1, 4))]
        if self.plant == "acknowledged early":
            say(f"A {first}")
            die()
        self.store.append([json.dumps(tick).encode() for tick in ticks], seq=first)
        say(f"A {self.store.seq}")
        for events in ticks if take else ():
            for series, *value in events:
                self.take(f"s{series}", value)

    def checkpoint(self) -> None:
        from tsgdn.streaming.stores.record import Record, pack

        store, seq = self.store, self.store.seq
        waiting = []

        def record(item: str) -> bytes:
            state = self.states[item]
            leaves = struct.pack("<II", *state) + random.Random(state[1]).randbytes(state[1] % 40_000)
            return pack(Record(item, MODEL, LAYOUT, store.epoch, seq, 0, seq, state[0], "h", "", leaves))

        def between() -> None:
            if self.plant == "numbers ignored":
                die()
            begin = store.seq
            self.tick(take=False)
            waiting.extend(range(begin + 1, store.seq + 1))

        records = {item: record(item) for item in sorted(self.dirty)}
        offsets = {"feed": b"%d" % seq}
        if self.plant == "offset first":
            store.commit(seq=seq, offsets=offsets)
            die()
        store.commit(records, seq=seq, offsets=offsets, deleted=self.deleted, between=between)
        self.dirty, self.deleted = set(), set()
        for number in waiting:  # what came while the slices were written
            for series, *value in tick_of(number):
                self.take(f"s{series}", value)

    def run(self) -> None:
        self.recover()
        for _ in range(self.order.get("rounds", 1_000_000)):
            for _ in range(self.rng.randrange(1, 5)):
                self.tick()
            self.checkpoint()
            if self.rng.random() < self.order.get("close", 0.1):
                self.store.close()
                self.states, self.dirty, self.deleted = {}, set(), set()
                self.recover()
        self.store.close()
        say("C")


def say(text: str) -> None:
    os.write(1, f"{text}\n".encode())


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def nursery() -> None:
    """Forks a worker per line of orders."""
    import redis  # noqa: F401

    import tsgdn.streaming.stores.sqlite  # noqa: F401

    for line in sys.stdin:
        child = os.fork()
        if not child:
            try:
                Worker(json.loads(line)).run()
            except BaseException as error:
                say(f"E {type(error).__name__}: {error}".replace("\n", " "))
            finally:
                os._exit(0)
        say(f"P {child}")
        os.waitpid(child, 0)
        say("END")


# ---- the tests ------------------------------------------------------------------------------------------------------


class Nursery:
    """Starts workers, kills them, and keeps account of what they have acknowledged."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.acknowledged: dict[str, int] = {}

    def run(self, url: str, *, after: float | None = None, **order: Any) -> str:
        """One worker's life; returns how it ended: "killed", or "closed"."""
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps({"url": url, "seed": 0, **order}), file=self.process.stdin, flush=True)
        known, said = self.acknowledged.get(url, 0), "killed"
        timer = None
        for line in self.process.stdout:
            kind, _, text = line.strip().partition(" ")
            if kind == "P" and after is not None:
                timer = threading.Timer(after, os.kill, (int(text), signal.SIGKILL))
                timer.start()
            elif kind == "R":
                assert int(text) >= known, f"tick {known} was acknowledged, {text} is what is there"
                known = int(text)
            elif kind == "A":
                known = int(text)
            elif kind == "C":
                said = "closed"
            elif kind == "E":
                raise AssertionError(self.drain(text))
            elif kind == "END":
                break
        if timer is not None:
            timer.cancel()
        self.acknowledged[url] = known
        return said

    def drain(self, text: str) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line == "END\n":
                break
        return text


@pytest.fixture
def workers() -> Iterator[Nursery]:
    nursery = Nursery()
    with nursery.process:
        yield nursery
        nursery.process.kill()


@pytest.fixture
def server() -> Iterator[str]:
    """The address of an imitation of a Redis server."""
    from fakeredis import TcpFakeServer

    server = TcpFakeServer(("127.0.0.1", 0))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"redis://127.0.0.1:{server.server_address[1]}/0"
    server.shutdown()
    server.server_close()
    thread.join()


def kill_loop(workers: Nursery, url: str, kills: int, *, longest: float) -> None:
    rng = random.Random(kills)
    for number in range(kills):
        order = {
            "seed": number, "slice": rng.choice((1, 30_000, 1 << 20)), "durability": rng.choice(("normal", "full")),
            "close": rng.choice((0.0, 0.1, 0.7)),
        }  # fmt: skip
        if "://" in url:
            order["durability"] = "normal"
        assert workers.run(url, after=rng.uniform(0, longest), **order) == "killed"
    assert workers.run(url, rounds=3) == "closed"
    assert workers.acknowledged[url] > kills  # there was something to lose


def test_a_store_of_files_survives_kills_at_any_moment(workers, tmp_path):
    kill_loop(workers, str(tmp_path), 40, longest=0.06)


def test_a_store_in_redis_survives_kills_at_any_moment(workers, server):
    kill_loop(workers, server, 10, longest=0.3)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_store_of_files_survives_hundreds_of_kills(workers, tmp_path):
    kill_loop(workers, str(tmp_path), 600, longest=0.15)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_store_in_redis_survives_hundreds_of_kills(workers, server):
    kill_loop(workers, server, 200, longest=0.5)


def kill_at_statements(workers: Nursery, folder: Path, *, step: int, **order: Any) -> int:
    """A kill before every `step`-th statement, each of a copy of the same store; the number of statements."""
    base = folder / "base"
    if order.pop("begun", True):
        assert workers.run(str(base), rounds=2) == "closed"
        assert workers.run(str(base), statement=60, rounds=9) == "killed"  # its log and journal are there
    else:
        base.mkdir()
    number = 1
    while True:
        copy = folder / str(number)
        shutil.copytree(base, copy)
        workers.acknowledged[str(copy)] = workers.acknowledged.get(str(base), 0)
        ended = workers.run(str(copy), statement=number, **order)
        assert workers.run(str(copy), rounds=0) == "closed"
        if ended == "closed":
            return number
        number += step


@pytest.mark.parametrize("begun", [True, False])
def test_a_store_of_files_survives_a_kill_before_its_statements(workers, tmp_path, begun):
    """Making it, opening it, recovery, journal, slices, deletion, moving the log, closing it."""
    count = kill_at_statements(workers, tmp_path, step=11, seed=7, rounds=1, slice=20_000, close=0.0, begun=begun)
    assert count > 100


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_store_of_files_survives_a_kill_before_each_of_its_statements(workers, tmp_path):
    assert kill_at_statements(workers, tmp_path, step=1, seed=11, rounds=2, slice=1, close=1.0) > 300


@pytest.mark.parametrize("plant", ["offset first", "numbers ignored", "acknowledged early"])
def test_the_kill_loop_finds_a_planted_bug(workers, tmp_path, plant):
    """The harness is worth what it finds."""
    assert workers.run(str(tmp_path), plant=plant, slice=1, rounds=9, close=0.0) == "killed"
    with pytest.raises(AssertionError, match=r"must be|was acknowledged"):
        workers.run(str(tmp_path), plant="numbers ignored" if plant == "numbers ignored" else None, rounds=1)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    nursery()
