"""`tsgdn state export | import | prune`: copies of states, and an end to those that nobody needs."""

import argparse
import contextlib
import csv
import re
import struct
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from tsgdn.cli.main import Misuse, say
from tsgdn.cli.stores import (
    CHUNK,
    Progress,
    Shard,
    key_of,
    out,
    owning,
    plain,
    reached,
    read,
    shown,
    some,
    viewing,
    whole,
)
from tsgdn.data.clock import show as show_time
from tsgdn.streaming.stores import SLICE, StoreInfo
from tsgdn.streaming.stores.record import Key, Record, RecordDamaged, check, name_text, pack, unpack
from tsgdn.streaming.stores.reshard import check_drained
from tsgdn.streaming.stores.shards import shard_of

_FILE = struct.Struct("<8sIQ")  # magic, format, number of records
_SIZE = struct.Struct("<Q")
FILE_MAGIC, FILE_FORMAT = b"TSGSFILE", 1
"""A file of records: magic, format (u32), their number (u64), then each as its length (u64) and its sealed bytes."""

_DURATION = re.compile(r"(\d+)\s*(s|min|h|d|w)", re.IGNORECASE)
_SECONDS = {"s": 1, "min": 60, "h": 3_600, "d": 86_400, "w": 604_800}


def export(args: argparse.Namespace) -> int:
    """A copy of a store, or some records in a file."""
    if args.target.suffix.lower() == ".tsgs":
        return _export_file(args)
    if args.items is not None:
        raise Misuse(f"--items go into a file: give a name that ends in .tsgs instead of {args.target}")
    with viewing(args.store, args) as shards:
        target = args.target.expanduser()
        if target.is_file() or any(target.glob("*.sqlite")):
            raise Misuse(f"{target} exists: give another folder")
        with Progress("export", sum(len(shard.store) for shard in shards)) as progress:
            for shard in shards:
                shard.store.copy(target)
                progress.add(len(shard.store))
        if len(shards) > 1:
            say("state export", f"each of the {len(shards)} shards was copied as of a moment of its own")
    with viewing(str(target), args) as copies:
        infos = [shard.store.info() for shard in copies]
    told = {"folder": str(target), "series": sum(i.items for i in infos), "journal": sum(i.journal for i in infos)}
    if args.json:
        out(told)
    else:
        print(f"{target}: {told['series']} series, {told['journal']} ticks of the journal")
    return 0


def _export_file(args: argparse.Namespace) -> int:
    target = args.target.expanduser()
    if target.exists():
        raise Misuse(f"{target} exists: give another name")
    if not target.absolute().parent.is_dir():
        raise Misuse(f"there is no folder {target.parent}")
    wanted = None if args.items is None else _names(args.items)
    count = 0
    with viewing(args.store, args) as shards:
        lost: dict[str, str] = {}
        left = dict.fromkeys(wanted or ())
        total = sum(len(shard.store) for shard in shards) if wanted is None else len(left)
        with Progress("export", total) as progress, whole(target) as file:
            file.write(_FILE.pack(FILE_MAGIC, FILE_FORMAT, 0))
            for shard in shards:
                names = iter(shard.store.item_ids() if wanted is None else list(left))
                while chunk := list(islice(names, CHUNK)):
                    for item, data in shard.store.read(chunk).items():
                        file.write(_SIZE.pack(len(data)) + data)
                        left.pop(item, None)
                        count += 1
                    progress.add(len(chunk))
                lost |= shard.store.lost
            for item in left:
                raise Misuse(
                    f"{plain(item)!r} is lost ({lost[item]}): leave it out" if item in lost
                    else f"there is no series {plain(item)!r} in {shown(args.store)}; tsgdn state ls names them"
                )  # fmt: skip
            file.seek(0)
            file.write(_FILE.pack(FILE_MAGIC, FILE_FORMAT, count))
        if wanted is None and lost:
            say("state export", f"{len(lost)} series are lost and not in the file: {some(lost)}")
    if args.json:
        out({"file": str(target), "series": count})
    else:
        print(f"{target}: {count} series")
    return 0


def _names(text: str) -> list[str]:
    try:
        names = next(csv.reader([text], strict=True), [])
    except csv.Error as error:
        raise Misuse(f"--items {text!r}: {error}") from None
    if not names:
        raise Misuse("--items is empty, expected names with commas between them")
    return names


def read_file(path: Path) -> Iterator[bytes]:
    """The records of a file that `tsgdn state export` wrote, their seals unseen.

    Raises:
        Misuse: it is no such file, of a newer format, or not whole.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(_FILE.size)
        if head[:8] != FILE_MAGIC or len(head) < _FILE.size:
            raise Misuse(f"{path} is no file of tsgdn state export: it begins with {head[:8]!r}")
        _, version, count = _FILE.unpack(head)
        if version != FILE_FORMAT:
            raise Misuse(f"{path} has format {version}, this version reads {FILE_FORMAT}: upgrade tsgdn")
        for number in range(1, count + 1):
            begin = file.read(_SIZE.size)
            length = _SIZE.unpack(begin)[0] if len(begin) == _SIZE.size else size
            if length > size - file.tell():
                raise Misuse(f"{path} ends within record {number} of {count}: it was not copied whole")
            yield file.read(length)
        if file.read(1):
            raise Misuse(f"{path} goes on behind its {count} records: it is damaged")


def import_(args: argparse.Namespace) -> int:
    """Records into a store."""
    source = args.source.expanduser()
    if not source.exists():
        raise Misuse(f"there is no {source}: give a file of tsgdn state export, or the folder of a store")
    told: dict[str, int] = {name: 0 for name in ("imported", "kept", "deleted", "restored", "lost")}
    with contextlib.ExitStack() as stack:
        views = stack.enter_context(viewing(str(source), args)) if source.is_dir() else []
        with viewing(args.store, args) as targets:
            goal = targets[0].store.info()
        total = _check_source(source, views, goal, key_of(args))
        owned = stack.enter_context(owning(args.store, args, drained=True))
        for info in (view.store.info() for view in views):
            if info.journal:
                say("state import", f"{info.place} holds {info.journal} ticks of journal, which are not imported")
        progress = stack.enter_context(Progress("import", total))
        landing = [_Landing(shard, args.replace, told) for shard in owned]
        for data in _all_of(source, views):
            item = name_text(check(data, key=key_of(args)).item)
            landing[shard_of(item, len(landing))].add(item, data)
            progress.add()
        for one in landing:
            one.flush()
        lost = [item for view in views for item in view.store.lost]
        told["lost"] = len(lost)
        if lost:
            say("state import", f"{len(lost)} series of {source} are lost and were not imported: {some(lost)}")
    if args.json:
        out(told)
    else:
        print(
            f"{told['imported']} imported ({told['restored']} of them were lost), {told['kept']} kept as they are as "
            f"new, {told['deleted']} left deleted"
        )
    return 0


def _all_of(source: Path, views: list[Shard]) -> Iterator[bytes]:
    if not views:
        yield from read_file(source)
    for view in views:
        yield from (data for _, data in view.store.records())


def _check_source(source: Path, views: list[Shard], goal: StoreInfo, key: Key) -> int:
    """How many records there are; refuses all of them if one is not for this store."""

    def refuse(what: str, name: str, theirs: bytes, mine: bytes) -> None:
        if theirs != mine:
            raise Misuse(f"{what} is of {name} {theirs.hex()}, the store of {mine.hex()}: give one of the same {name}")

    for info in (view.store.info() for view in views):
        refuse(info.place, "model", info.model, goal.model)
        refuse(info.place, "layout", info.layout, goal.layout)
    if views:
        return sum(len(view.store) for view in views)
    seen: set[bytes] = set()
    for data in read_file(source):
        try:
            stamp = check(data, key=key)
        except RecordDamaged as error:
            raise Misuse(f"{source}, record {len(seen) + 1}: {error}") from None
        what = f"{plain(name_text(stamp.item))!r} in {source}"
        refuse(what, "model", stamp.model, goal.model)
        refuse(what, "layout", stamp.layout, goal.layout)
        if stamp.item in seen:
            raise Misuse(f"{what} comes twice")
        seen.add(stamp.item)
    return len(seen)


class _Landing:
    """Writes records that come from elsewhere into a store, in runs."""

    def __init__(self, shard: Shard, replace: bool, told: dict[str, int]) -> None:
        self._shard, self._store, self._replace, self._told = shard, shard.store, replace, told
        self._deleted = shard.store.tombstones()
        self._waiting: dict[str, bytes] = {}
        self._filled, self._tick = 0, 0

    def add(self, item: str, data: bytes) -> None:
        self._waiting[item] = data
        self._filled += len(data)
        if self._filled >= SLICE or len(self._waiting) >= 16 * CHUNK:
            self.flush()

    def flush(self) -> None:
        key, there = self._shard.key, self._store.read(self._waiting)
        taken: dict[str, Record] = {}
        for item, data in self._waiting.items():
            record = unpack(data, key=key, item_id=item)
            if item in self._deleted and not self._replace:
                self._told["deleted"] += 1
            elif item in there and not self._replace and _as_new(unpack(there[item], key=key), record):
                self._told["kept"] += 1
            else:
                taken[item] = record
        # a record that is there although its series is lost came with an import that was killed before the release
        lost = [item for item in self._waiting if item in self._store.lost and (item in taken or item in there)]
        self._waiting, self._filled = {}, 0
        if taken:
            self._write(taken)
        if lost:
            self._store.release(lost)
        self._told["imported"] += len(taken)
        self._told["restored"] += len(lost)

    def _write(self, taken: dict[str, Record]) -> None:
        key = self._shard.key
        if not self._tick:
            # The import is a tick of its own. It is counted before its records come, so that whatever a kill leaves of
            # them no later tick has their number: a replay would take it for one that they hold.
            self._tick = self._store.seq + 1
            self._store.commit(seq=self._tick)
        epoch = self._store.epoch
        self._store.commit(
            {
                item: pack(record._replace(epoch=epoch, seq=self._tick, flags=record.flags & 0xFF00), key=key)
                for item, record in taken.items()
            }
        )


def _as_new(there: Record, record: Record) -> bool:
    """Whether a record has seen as much as another: as late a time, then as many values."""
    mine, theirs = reached([there, record], ahead=0)
    return bool((mine, there.count) >= (theirs, record.count))


def prune(args: argparse.Namespace) -> int:
    """Forgets silent series, deletions or dead letters."""
    age = None if args.older_than is None else _duration(args.older_than)
    tombstones, dead = args.tombstones_before, args.dead_before
    if age is None and tombstones is None and dead is None:
        raise Misuse("say what to prune: --older-than, --tombstones-before or --dead-before")
    for name, tick in (("--tombstones-before", tombstones), ("--dead-before", dead)):
        if tick is not None and tick < 1:
            raise Misuse(f"{name} is {tick}, expected a tick of 1 or more")
    opened = viewing(args.store, args) if args.dry_run else owning(args.store, args, drained=age is not None)
    with opened as shards:
        if args.dry_run and age is not None:
            check_drained(shard.store.info() for shard in shards)
        old = [[] for _ in shards] if age is None else _silent(shards, age)
        gone: dict[str, list[Any]] = {"series": [], "tombstones": [], "dead_letters": []}
        for shard, items in zip(shards, old, strict=True):
            gone["series"] += [{"item_id": item, "last": show_time(last)} for item, last in items]
            if tombstones is not None:
                found = shard.store.tombstones().items()
                gone["tombstones"] += [{"item_id": item, "tick": tick} for item, tick in found if tick < tombstones]
            if dead is not None:
                letters = [letter for letter in shard.store.dead_letters() if letter.seq < dead]
                gone["dead_letters"] += [{"tick": x.seq, "code": x.code, "item_id": x.item_id} for x in letters]
            if not args.dry_run:
                shard.store.prune(
                    tombstones=None if tombstones is None else tombstones - 1, dead=None if dead is None else dead - 1
                )
                if items:
                    shard.store.commit(deleted=[item for item, _ in items], seq=shard.store.seq)
    if args.json:
        out({"dry_run": args.dry_run, **gone})
        return 0
    for name, entries in gone.items():
        for entry in entries:
            print(f"{name}: " + ", ".join(f"{k} {plain(str(v))}" for k, v in entry.items()))
    verb = "would be removed" if args.dry_run else "removed"
    print(", ".join(f"{len(entries)} {name.replace('_', ' ')}" for name, entries in gone.items()), verb)
    return 0


def _duration(text: str) -> np.timedelta64:
    match = _DURATION.fullmatch(text.strip())
    seconds = int(match[1]) * _SECONDS[match[2].lower()] if match else 0
    if not 0 < seconds < 9_000_000_000:
        raise Misuse(f"--older-than is {text!r}, expected a number and s, min, h, d or w, such as 90d")
    return np.timedelta64(seconds, "s").astype("m8[ns]")


def _silent(shards: list[Shard], age: np.timedelta64) -> list[list[tuple[str, np.datetime64]]]:
    """By shard the series, with their last time, that ended so long before the newest one."""
    ends: list[dict[str, np.datetime64]] = []
    with Progress("prune", sum(len(shard.store) for shard in shards)) as progress:
        for shard in shards:
            own: dict[str, np.datetime64] = {}
            for chunk in read(shard, shard.store.item_ids()):
                records = [record for _, record in chunk if isinstance(record, Record)]
                own |= dict(zip((r.item_id for r in records), reached(records), strict=True))
                progress.add(len(chunk))
            ends.append({item: last for item, last in own.items() if not np.isnat(last)})
    newest = max((last for own in ends for last in own.values()), default=None)
    return [[(item, last) for item, last in own.items() if newest is not None and newest - last > age] for own in ends]
