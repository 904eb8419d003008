"""Opening stores for the commands that look into them or change them, and telling what they hold."""

import argparse
import contextlib
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from tsgdn.cli.main import Misuse, say
from tsgdn.data.clock import clock
from tsgdn.streaming.stores import StateStore, open_store
from tsgdn.streaming.stores.record import Key, Record, name_bytes, unpack
from tsgdn.streaming.stores.reshard import check_drained

CHUNK = 64  # records at hand at a time; one may have many KiB
PAUSE = 0.5  # seconds between two words of progress
FIRST = 10  # entries of a list that the text shows


def read_key(path: Path) -> bytes:
    """The key in a file of hexadecimal digits, as `openssl rand -hex 32` prints them.

    Raises:
        Misuse: there is no such file, or it holds something else than 16 to 64 bytes.
    """
    try:
        key = bytes.fromhex(path.read_text("ascii"))
    except OSError as error:
        raise Misuse(f"--state-key {path}: {error.strerror}") from None
    except ValueError:
        raise Misuse(f"--state-key {path}: expected hexadecimal digits, as openssl rand -hex 32 prints them") from None
    if not 16 <= len(key) <= 64:
        raise Misuse(f"--state-key {path}: the key has {len(key)} bytes, expected 16 to 64")
    return key


class Shard(NamedTuple):
    """One store of those at a place."""

    place: str
    number: int
    of: int
    key: Key
    unchecked: bool
    store: StateStore

    def fresh(self) -> StateStore:
        """The same, not opened."""
        return open_store(
            self.place, key=self.key, shard=self.number, shards=max(self.of, self.number + 1), unchecked=self.unchecked
        )


def key_of(args: argparse.Namespace) -> Key:
    """The key of --state-key, None without."""
    return None if args.state_key is None else read_key(args.state_key)


def remote(place: str) -> bool:
    """Whether a place is an address."""
    return "://" in place


def shown(place: str) -> str:
    """A place for messages."""
    return re.sub(r"//[^/]*@", "//", place)  # no password


@contextlib.contextmanager
def viewing(place: str, args: argparse.Namespace) -> Iterator[list[Shard]]:
    """All shards at a place, for reading; one that is missing is told."""
    key = key_of(args)
    if remote(place):
        numbers = [0]
    else:
        folder = Path(place).expanduser()
        if folder.is_file():
            raise Misuse(f"{folder} is a file, expected the folder of a store")
        numbers = sorted(int(path.stem) for path in folder.glob("*.sqlite") if path.stem.isdecimal())
        if not numbers:
            raise Misuse(f"there is no store in {folder}: expected files such as 00.sqlite")
    with contextlib.ExitStack() as stack:

        def view(number: int, of: int) -> Shard:
            store = open_store(place, key=key, shard=number, shards=max(of, number + 1), unchecked=args.unchecked)
            store.view()
            stack.callback(store.close)
            return Shard(place, number, store.info().shards, key, args.unchecked, store)

        shards = [view(numbers[0], 1)]
        of = shards[0].of
        shards += [view(number, of) for number in (range(1, of) if remote(place) else numbers[1:])]
        missing = sorted(set(range(of)) - {shard.number for shard in shards})
        if missing:
            say(f"state {args.action}", f"{shown(place)} is not whole: of its {of} shards {some(missing)} are missing")
        yield shards


@contextlib.contextmanager
def owning(place: str, args: argparse.Namespace, *, drained: bool) -> Iterator[list[Shard]]:
    """All shards at a place, for writing; `drained` wants their journals to be empty."""
    with viewing(place, args) as views:
        infos = [shard.store.info() for shard in views]
    if {info.shard for info in infos} != set(range(infos[0].shards)):
        raise Misuse(f"{shown(place)} is not whole: put all its shards in one place")
    if drained:
        check_drained(infos)
    with contextlib.ExitStack() as stack:
        shards = []
        for view, info in zip(views, infos, strict=True):
            store = view.fresh()
            store.open(model=info.model, layout=info.layout, owner=f"tsgdn state {args.action}")
            stack.callback(store.close)
            shards.append(view._replace(store=store))
        if drained:  # a stream may have come and gone since
            check_drained([shard.store.info() for shard in shards])
        yield shards


# ---- reading --------------------------------------------------------------------------------------------------------


class Progress:
    """Says on a terminal how far a long command is; `beside` = lines on stdout tell it too."""

    def __init__(self, action: str, total: int, *, beside: bool = False) -> None:
        self._what, self._total, self._done = action, total, 0
        self._shown = sys.stderr.isatty() and not (beside and sys.stdout.isatty())
        self._next, self._any = time.monotonic() + PAUSE, False

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._any:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def add(self, count: int = 1) -> None:
        """So many more are done."""
        self._done += count
        if self._shown and time.monotonic() >= self._next:
            text = f"tsgdn state {self._what}: {self._done:,} of {self._total:,} series"
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
            self._next, self._any = time.monotonic() + PAUSE, True


def read(shard: Shard, items: Iterable[str]) -> Iterator[list[tuple[str, Record | str]]]:
    """Records of these series in chunks; of a lost one the reason. Those that are gone meanwhile are left out."""
    left = iter(items)
    while chunk := list(islice(left, CHUNK)):
        found = shard.store.read(chunk)
        out: list[tuple[str, Record | str]] = []
        for item in chunk:
            if item in found:
                out.append((item, unpack(found[item], key=shard.key, item_id=item)))
            elif item in shard.store.lost and (code := certain(shard, item)):
                out.append((item, code))
        yield out


def certain(shard: Shard, item: str) -> str:
    """Why a series is lost; empty if it was only deleted while its name was being read."""
    code = shard.store.lost[item]
    if code != "state.missing":
        return code
    again = shard.fresh().view()
    try:
        again.read([item])
        return again.lost.get(item, "")
    finally:
        again.close()


def reached(records: Sequence[Record], *, ahead: int = -1) -> list[np.datetime64]:
    """The time of the last step of each, NaT where there is none; with `ahead` 0 that of the next one."""
    out = np.full(len(records), np.datetime64("NaT"), "M8[ns]")
    for freq in {record.freq for record in records}:
        places = [i for i, record in enumerate(records) if record.freq == freq and record.head + ahead >= 0]
        start = np.array([records[i].start for i in places], np.int64).view("M8[ns]")
        with contextlib.suppress(ValueError):  # a frequency that this version does not know
            out[places] = clock(freq).timestamp(start, np.array([records[i].head + ahead for i in places], np.int64))
    return list(out)


def size_of(record: Record) -> int:
    """Bytes of a record."""
    return sum(map(len, (record.leaves, record.extra, record.offset, name_bytes(record.item_id))))


def plain(item: str) -> str:
    """A name that a terminal shows as it is."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in item)


def readable(data: bytes, limit: int | None = None) -> str:
    """Bytes as text where they are text, else in hexadecimal digits."""
    part = data if limit is None else data[:limit]
    try:
        text = part.decode()
    except UnicodeDecodeError:
        text = ""
    text = text if text.isprintable() and (text or not part) else f"0x{part.hex()}"
    return text + ("..." if len(part) < len(data) else "")


def some(things: Iterable[object]) -> str:
    """The first ones, in one line."""
    texts = [plain(str(thing)) for thing in things]
    return ", ".join(texts[:FIRST]) + (f" and {len(texts) - FIRST} more" if len(texts) > FIRST else "")


def out(value: object) -> None:
    """A JSON object on stdout."""
    print(json.dumps(value))  # ASCII: a name may hold what UTF-8 cannot


@contextlib.contextmanager
def whole(target: Path) -> Iterator[IO[bytes]]:
    """A file that gets its name when it is whole and on the disk."""
    handle, name = tempfile.mkstemp(dir=target.absolute().parent, prefix=f".{target.name}.")
    try:
        with open(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
