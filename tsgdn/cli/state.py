"""`tsgdn state`: what a store of states holds, and what its operator does with it.

`ls`, `show`, `export` and `diff` only read: they take no lease and work beside a running stream. `import` and `prune`
become the owner for as long as they take, so they want the stream to be stopped; so does `reshard`, which writes new
stores and leaves the old ones as they are.
"""

import argparse
import contextlib
import csv
import fcntl
import hashlib
import json
import os
import re
import shutil
import struct
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from tsgdn.cli.main import Misuse, say
from tsgdn.data.clock import clock, show
from tsgdn.streaming.stores import (
    SLICE,
    DeadLetter,
    StateStore,
    StoreBusy,
    StoreDamaged,
    StoreError,
    StoreInfo,
    StoreRefused,
    open_store,
)
from tsgdn.streaming.stores.record import Key, Record, RecordDamaged, check, name_bytes, name_text, pack, unpack

CHUNK = 64  # records at hand at a time; one may have many KiB
PAUSE = 0.5  # seconds between two words of progress
MOST_SHARDS = 100  # each new store has four files open
MANIFEST = "shards.json"
HASH = "blake2b, key tsgdn.shard.1"

_FILE = struct.Struct("<8sIQ")  # magic, format, number of records
_SIZE = struct.Struct("<Q")
FILE_MAGIC, FILE_FORMAT = b"TSGSFILE", 1
"""A file of records: magic, format (u32), their number (u64), then each as its length (u64) and its sealed bytes."""

_DURATION = re.compile(r"(\d+)\s*(s|min|h|d|w)", re.IGNORECASE)
_SECONDS = {"s": 1, "min": 60, "h": 3_600, "d": 86_400, "w": 604_800}
_FIRST = 10  # entries of a list that the text shows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the sub-commands of `tsgdn state`."""
    names = ("ls", "show", "export", "import", "diff", "prune", "reshard")
    actions = parser.add_subparsers(dest="action", required=True, metavar=f"{{{','.join(names)}}}")
    store = "a folder, or redis://HOST:PORT/DB"

    def action(name: str, text: str) -> argparse.ArgumentParser:
        one = actions.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        one.add_argument("--state-key", type=Path, metavar="FILE", help="key of the seals, as hexadecimal digits")
        one.add_argument(
            "--unchecked",
            action="store_true",
            help="take a place or settings that cannot be proven sound, and a store without its log",
        )
        return one

    one = action("ls", "series with steps seen, last time, values, bytes and tick; lost ones are marked")
    one.add_argument("store", metavar="STORE", help=store)
    one.add_argument("--limit", type=int, metavar="N", help="the first so many")
    one.add_argument("--prefix", default="", metavar="TEXT", help="those whose name begins so")
    one.add_argument("--json", action="store_true", help="a JSON object per line")

    one = action("show", "a store, or one series in it")
    one.add_argument("store", metavar="STORE", help=store)
    one.add_argument("item", metavar="ITEM", nargs="?", help="a series")
    one.add_argument("--model", type=Path, metavar="DIR", help="the model's folder: names the leaves of the state")
    one.add_argument("--late-window", type=int, default=0, metavar="N", help="as the stream had it, with --model")
    one.add_argument("--json", action="store_true", help="one JSON object")

    one = action("export", "a copy as of one moment, or some records in a file; a stream may run meanwhile")
    one.add_argument("store", metavar="STORE", help=store)
    one.add_argument("target", type=Path, metavar="FOLDER|FILE.tsgs", help="must not exist yet")
    one.add_argument("--items", metavar="A,B", help='series for the file (default: all); "a,b" is one name')
    one.add_argument("--json", action="store_true", help="one JSON object")

    one = action("import", "records into a store of the same model and layout; a newer record is kept")
    one.add_argument("store", metavar="STORE", help=store)
    one.add_argument("source", type=Path, metavar="FILE.tsgs|FOLDER", help="from export, or a store of files")
    one.add_argument("--replace", action="store_true", help="replace newer records and bring deleted series back too")
    one.add_argument("--json", action="store_true", help="one JSON object")

    one = action("diff", "series that are in one store only, or whose states differ; exit 1 if there are any")
    one.add_argument("store", metavar="STORE_A", help=store)
    one.add_argument("other", metavar="STORE_B", help=store)
    one.add_argument("--seq", action="store_true", help="compare the numbers of the ticks too; each store has its own")
    one.add_argument("--json", action="store_true", help="a JSON object per line")

    one = action("prune", "forget silent series, deletions or dead letters")
    one.add_argument("store", metavar="STORE", help=store)
    one.add_argument(
        "--older-than",
        metavar="DURATION",
        help="series whose last step lies so long (90d, 12h, 30min) before the newest one of the store",
    )
    one.add_argument("--tombstones-before", type=int, metavar="TICK", help="deletions of ticks below it")
    one.add_argument("--dead-before", type=int, metavar="TICK", help="dead letters of ticks below it")
    one.add_argument("--dry-run", action="store_true", help="only say what would go")
    one.add_argument("--json", action="store_true", help="one JSON object")

    one = action("reshard", "spread series over another number of stores; the old ones stay as they are")
    one.add_argument("stores", metavar="STORE", nargs="+", help=store + "; all shards of it")
    one.add_argument("--into", type=Path, required=True, metavar="FOLDER", help="must not exist yet")
    one.add_argument("--shards", type=int, required=True, metavar="N")
    one.add_argument("--json", action="store_true", help="one JSON object")


def run(args: argparse.Namespace) -> int:
    """Runs one sub-command.

    Returns:
        0; 1 where stores differ, are damaged, or a series is lost.

    Raises:
        Misuse: a wrong argument, or a store that is in use, of another model, or not there.
    """
    try:
        return {
            "ls": _ls, "show": _show, "export": _export, "import": _import, "diff": _diff, "prune": _prune,
            "reshard": _reshard,
        }[args.action](args)  # fmt: skip
    except (StoreRefused, StoreBusy) as error:
        raise Misuse(str(error)) from error
    except StoreError as error:
        say(f"state {args.action}", error)
        return 1


def shard_of(item_id: str, shards: int) -> int:
    """The shard that a series belongs to: the keyed blake2b of its name, 8 bytes little-endian, modulo the number."""
    digest = hashlib.blake2b(name_bytes(item_id), digest_size=8, key=b"tsgdn.shard.1").digest()
    return int.from_bytes(digest, "little") % shards


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


# ---- opening --------------------------------------------------------------------------------------------------------


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


def _key(args: argparse.Namespace) -> Key:
    return None if args.state_key is None else read_key(args.state_key)


def _remote(place: str) -> bool:
    return "://" in place


def _shown(place: str) -> str:
    return re.sub(r"//[^/]*@", "//", place)  # no password


@contextlib.contextmanager
def _views(place: str, args: argparse.Namespace) -> Iterator[list[Shard]]:
    """All shards at a place, for reading; one that is missing is told."""
    key = _key(args)
    if _remote(place):
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
        shards += [view(number, of) for number in (range(1, of) if _remote(place) else numbers[1:])]
        missing = sorted(set(range(of)) - {shard.number for shard in shards})
        if missing:
            say(
                f"state {args.action}", f"{_shown(place)} is not whole: of its {of} shards {_some(missing)} are missing"
            )
        yield shards


@contextlib.contextmanager
def _owned(place: str, args: argparse.Namespace, *, drained: bool) -> Iterator[list[Shard]]:
    """All shards at a place, for writing; `drained` wants their journals to be empty."""
    with _views(place, args) as views:
        infos = [shard.store.info() for shard in views]
    if {info.shard for info in infos} != set(range(infos[0].shards)):
        raise Misuse(f"{_shown(place)} is not whole: put all its shards in one place")
    if drained:
        _check_drained(infos)
    with contextlib.ExitStack() as stack:
        shards = []
        for view, info in zip(views, infos, strict=True):
            store = view.fresh()
            store.open(model=info.model, layout=info.layout, owner=f"tsgdn state {args.action}")
            stack.callback(store.close)
            shards.append(view._replace(store=store))
        if drained:  # a stream may have come and gone since
            _check_drained([shard.store.info() for shard in shards])
        yield shards


def _check_drained(infos: Iterable[StoreInfo]) -> None:
    for info in infos:
        if info.journal:
            raise Misuse(
                f"the journal of {info.place} holds {info.journal} ticks that the states lack: run tsgdn stream with "
                "it and let it end, which writes a checkpoint"
            )


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


def _read(shard: Shard, items: Iterable[str]) -> Iterator[list[tuple[str, Record | str]]]:
    """Records of these series in chunks; of a lost one the reason. Those that are gone meanwhile are left out."""
    left = iter(items)
    while chunk := list(islice(left, CHUNK)):
        found = shard.store.read(chunk)
        out: list[tuple[str, Record | str]] = []
        for item in chunk:
            if item in found:
                out.append((item, unpack(found[item], key=shard.key, item_id=item)))
            elif item in shard.store.lost and (code := _certain(shard, item)):
                out.append((item, code))
        yield out


def _certain(shard: Shard, item: str) -> str:
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


def _reached(records: Sequence[Record], *, ahead: int = -1) -> list[np.datetime64]:
    """The time of the last step of each, NaT where there is none; with `ahead` 0 that of the next one."""
    out = np.full(len(records), np.datetime64("NaT"), "M8[ns]")
    for freq in {record.freq for record in records}:
        places = [i for i, record in enumerate(records) if record.freq == freq and record.head + ahead >= 0]
        start = np.array([records[i].start for i in places], np.int64).view("M8[ns]")
        with contextlib.suppress(ValueError):  # a frequency that this version does not know
            out[places] = clock(freq).timestamp(start, np.array([records[i].head + ahead for i in places], np.int64))
    return list(out)


def _size(record: Record) -> int:
    return sum(map(len, (record.leaves, record.extra, record.offset, name_bytes(record.item_id))))


def _plain(item: str) -> str:
    """A name that a terminal shows as it is."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in item)


def _readable(data: bytes, limit: int | None = None) -> str:
    """Bytes as text where they are text, else in hexadecimal digits."""
    part = data if limit is None else data[:limit]
    try:
        text = part.decode()
    except UnicodeDecodeError:
        text = ""
    text = text if text.isprintable() and (text or not part) else f"0x{part.hex()}"
    return text + ("..." if len(part) < len(data) else "")


def _some(things: Iterable[object]) -> str:
    """The first ones, in one line."""
    texts = [_plain(str(thing)) for thing in things]
    return ", ".join(texts[:_FIRST]) + (f" and {len(texts) - _FIRST} more" if len(texts) > _FIRST else "")


def _out(value: object) -> None:
    print(json.dumps(value))  # ASCII: a name may hold what UTF-8 cannot


# ---- ls, show -------------------------------------------------------------------------------------------------------


def _ls(args: argparse.Namespace) -> int:
    if args.limit is not None and args.limit < 1:
        raise Misuse(f"--limit is {args.limit}, expected at least 1")
    left = sys.maxsize if args.limit is None else args.limit
    with _views(args.store, args) as shards:
        total = min(left, sum(len(shard.store) for shard in shards))
        with Progress("ls", total, beside=True) as progress:
            if not args.json:
                print(f"{'head':>12}  {'time':<19}  {'values':>12}  {'bytes':>10}  {'tick':>10}  item_id", flush=True)
            for shard in shards:
                told = {item: code for item, code in shard.store.lost.items() if item.startswith(args.prefix)}
                names = (item for item in shard.store.item_ids() if item.startswith(args.prefix) and item not in told)
                for chunk in _before(list(told.items()), _read(shard, islice(names, max(0, left - len(told))))):
                    records = [record for _, record in chunk if isinstance(record, Record)]
                    times = iter(_reached(records))
                    for item, record in chunk[:left]:
                        _row(item, record, next(times) if isinstance(record, Record) else None, shard, args.json)
                    left -= len(chunk[:left])
                    progress.add(len(chunk))
                    sys.stdout.flush()
                    if not left:
                        return 0
    return 0


def _before(first: list[Any], chunks: Iterator[list[Any]]) -> Iterator[list[Any]]:
    if first:
        yield first
    yield from chunks


def _row(item: str, record: Record | str, last: np.datetime64 | None, shard: Shard, as_json: bool) -> None:
    if isinstance(record, str):
        if as_json:
            _out({"item_id": item, "lost": record, "shard": shard.number})
        else:
            print(f"{'-':>12}  {'lost: ' + record:<19}  {'-':>12}  {'-':>10}  {'-':>10}  {_plain(item)}")
        return
    when = "-" if last is None or np.isnat(last) else show(last)
    if as_json:
        row = {"item_id": item, "head": record.head, "time": None if when == "-" else when, "values": record.count}
        _out({**row, "bytes": _size(record), "tick": record.seq, "shard": shard.number})
    else:
        numbers = f"{record.count:>12}  {_size(record):>10}  {record.seq:>10}"
        print(f"{record.head:>12}  {when:<19}  {numbers}  {_plain(item)}")


def _show(args: argparse.Namespace) -> int:
    if args.model is not None and args.item is None:
        raise Misuse("--model names the leaves of one series: give ITEM too")
    with _views(args.store, args) as shards:
        if args.item is not None:
            return _show_item(args, shards)
        found = [_described(shard) for shard in shards]
    if args.json:
        _out({"store": _shown(args.store), "shards": found})
        return 0
    for one in found:
        for name, value in one.items():
            for line in _lines_of(name, value):
                print(line)
        if len(found) > 1:
            print()
    return 0


def _described(shard: Shard) -> dict[str, Any]:
    store = shard.store
    told = store.info()._asdict()
    del told["durability"]  # that is how we opened it, not how its owner did
    told["model"], told["layout"] = told["model"].hex(), told["layout"].hex()
    told["running"] = bool(told["owner"]) and told["until"] > time.time()
    told["until"] = show(np.datetime64(round(told["until"]), "s")) if told["until"] > 0 else None
    return {
        **told,
        "offsets": {source: _readable(offset) for source, offset in store.offsets().items()},
        "lost": dict(store.lost),
        "tombstones": store.tombstones(),
        "dead_letters": [
            {"tick": one.seq, "code": one.code, "item_id": one.item_id, "raw": _readable(one.raw, 200)}
            for one in store.dead_letters()
        ],
    }


def _lines_of(name: str, value: Any) -> Iterator[str]:
    if isinstance(value, dict | list):
        entries = [f"{_plain(str(k))}: {v}" for k, v in value.items()] if isinstance(value, dict) else [
            f"tick {one['tick']}, {one['code']}, {_plain(one['item_id']) or 'no series'}: {one['raw']}" for one in value
        ]  # fmt: skip
        yield f"{name:<12}  {len(entries)}"
        yield from (f"{'':<12}    {entry}" for entry in entries[:_FIRST])
        if len(entries) > _FIRST:
            yield f"{'':<12}    and {len(entries) - _FIRST} more; --json tells all"
    else:
        yield f"{name:<12}  {'-' if value in (None, '') else value}"


def _show_item(args: argparse.Namespace, shards: list[Shard]) -> int:
    for shard in shards:
        found = [entry for chunk in _read(shard, [args.item]) for entry in chunk]
        code = found[0][1] if found else shard.store.lost.get(args.item, "")
        if isinstance(code, Record):
            told = _told(args, shard, code)
            if args.json:
                _out(told)
                return 0
            for name, value in told.items():
                if name == "leaves":
                    print(f"{name:<12}  {len(value)}")
                    for leaf in value:
                        print(_leaf_line(leaf))
                else:
                    print(f"{name:<12}  {'-' if value in (None, '') else _plain(str(value))}")
            return 0
        if code:
            say("state show", f"{_plain(args.item)!r} is lost ({code}): import it from a copy, or let it begin anew")
            return 1
        if args.item in shard.store.tombstones():
            tick = shard.store.tombstones()[args.item]
            raise Misuse(f"{_plain(args.item)!r} was deleted at tick {tick}")
    raise Misuse(f"there is no series {_plain(args.item)!r} in {_shown(args.store)}; tsgdn state ls names them")


def _told(args: argparse.Namespace, shard: Shard, record: Record) -> dict[str, Any]:
    from tsgdn.streaming.durable import aside  # it imports torch

    first, last = np.datetime64(record.start, "ns"), _reached([record])[0]
    beside = aside(record)
    told = {
        "item_id": record.item_id, "shard": shard.number, "start": show(first),
        "last": None if np.isnat(last) else show(last), "head": record.head, "count": record.count,
        "freq": record.freq, "tz": record.tz or "UTC", "tick": record.seq, "epoch": record.epoch,
        "model": record.model.hex(), "layout": record.layout.hex(), "bytes": _size(record),
        "offset": _readable(record.offset),
        "held": [
            {"step": step, "time": show(np.datetime64(stamp, "ns")), "values": values}
            for step, stamp, values in beside.held
        ],
        "known": None if beside.known is None else {"from": beside.begin, "shape": list(beside.known.shape)},
    }  # fmt: skip
    if args.model is not None:
        told["leaves"] = _leaves(args, record)
    return told


def _leaves(args: argparse.Namespace, record: Record) -> list[dict[str, Any]]:
    import torch

    from tsgdn.model.artefact import ArtefactError
    from tsgdn.streaming.durable import layout, split
    from tsgdn.streaming.predictor import StatefulPredictor

    try:
        predictor = StatefulPredictor.from_pretrained(args.model, device="cpu", late_window=args.late_window)
    except (ArtefactError, ValueError) as error:
        raise Misuse(f"--model {args.model}: {error}") from error
    leaves, digest = layout(predictor)
    if bytes.fromhex(predictor.fingerprint) != record.model:
        raise Misuse(
            f"--model {args.model} is model {predictor.fingerprint}, the state is of {record.model.hex()}: give that"
        )
    if digest != record.layout:
        raise Misuse(
            f"--model {args.model} has layout {digest.hex()}, the state {record.layout.hex()}: give the options and "
            "the version of the stream that wrote it, such as --late-window"
        )
    out = []
    for name, leaf in split(record, leaves).items():
        told: dict[str, Any] = {"name": name, "shape": list(leaf.shape), "dtype": str(leaf.dtype).split(".")[-1]}
        numbers = leaf.double().flatten()
        finite = numbers[torch.isfinite(numbers)]
        told["nonfinite"] = numbers.numel() - finite.numel()
        for statistic in ("min", "mean", "max"):
            told[statistic] = float(getattr(finite, statistic)()) if finite.numel() else None
        out.append(told)
    return out


def _leaf_line(leaf: dict[str, Any]) -> str:
    shape = "x".join(map(str, leaf["shape"])) or "1"
    text = f"    {leaf['name']:<40} {shape:<14} {leaf['dtype']:<8}"
    if leaf["min"] is not None:
        text += f" min {leaf['min']:.4g}, mean {leaf['mean']:.4g}, max {leaf['max']:.4g}"
    return text + (f", {leaf['nonfinite']} not finite" if leaf["nonfinite"] else "")


# ---- export, import -------------------------------------------------------------------------------------------------


def _export(args: argparse.Namespace) -> int:
    if args.target.suffix.lower() == ".tsgs":
        return _export_file(args)
    if args.items is not None:
        raise Misuse(f"--items go into a file: give a name that ends in .tsgs instead of {args.target}")
    with _views(args.store, args) as shards:
        target = args.target.expanduser()
        if target.is_file() or any(target.glob("*.sqlite")):
            raise Misuse(f"{target} exists: give another folder")
        with Progress("export", sum(len(shard.store) for shard in shards)) as progress:
            for shard in shards:
                shard.store.copy(target)
                progress.add(len(shard.store))
        if len(shards) > 1:
            say("state export", f"each of the {len(shards)} shards was copied as of a moment of its own")
    with _views(str(target), args) as copies:
        infos = [shard.store.info() for shard in copies]
    told = {"folder": str(target), "series": sum(i.items for i in infos), "journal": sum(i.journal for i in infos)}
    if args.json:
        _out(told)
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
    with _views(args.store, args) as shards:
        lost: dict[str, str] = {}
        left = dict.fromkeys(wanted or ())
        total = sum(len(shard.store) for shard in shards) if wanted is None else len(left)
        with Progress("export", total) as progress, _whole(target) as file:
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
                    f"{_plain(item)!r} is lost ({lost[item]}): leave it out" if item in lost
                    else f"there is no series {_plain(item)!r} in {_shown(args.store)}; tsgdn state ls names them"
                )  # fmt: skip
            file.seek(0)
            file.write(_FILE.pack(FILE_MAGIC, FILE_FORMAT, count))
        if wanted is None and lost:
            say("state export", f"{len(lost)} series are lost and not in the file: {_some(lost)}")
    if args.json:
        _out({"file": str(target), "series": count})
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


@contextlib.contextmanager
def _whole(target: Path) -> Iterator[IO[bytes]]:
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


def _import(args: argparse.Namespace) -> int:
    source = args.source.expanduser()
    if not source.exists():
        raise Misuse(f"there is no {source}: give a file of tsgdn state export, or the folder of a store")
    told: dict[str, int] = {name: 0 for name in ("imported", "kept", "deleted", "restored", "lost")}
    with contextlib.ExitStack() as stack:
        views = stack.enter_context(_views(str(source), args)) if source.is_dir() else []
        with _views(args.store, args) as targets:
            goal = targets[0].store.info()
        total = _check_source(source, views, goal, _key(args))
        owned = stack.enter_context(_owned(args.store, args, drained=True))
        for info in (view.store.info() for view in views):
            if info.journal:
                say("state import", f"{info.place} holds {info.journal} ticks of journal, which are not imported")
        progress = stack.enter_context(Progress("import", total))
        landing = [_Landing(shard, args.replace, told) for shard in owned]
        for data in _all_of(source, views):
            item = name_text(check(data, key=_key(args)).item)
            landing[shard_of(item, len(landing))].add(item, data)
            progress.add()
        for one in landing:
            one.flush()
        lost = [item for view in views for item in view.store.lost]
        told["lost"] = len(lost)
        if lost:
            say("state import", f"{len(lost)} series of {source} are lost and were not imported: {_some(lost)}")
    if args.json:
        _out(told)
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
        what = f"{_plain(name_text(stamp.item))!r} in {source}"
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
    mine, theirs = _reached([there, record], ahead=0)
    return bool((mine, there.count) >= (theirs, record.count))


# ---- diff -----------------------------------------------------------------------------------------------------------


def _diff(args: argparse.Namespace) -> int:
    with _views(args.store, args) as one, _views(args.other, args) as two:
        for name in ("model", "layout"):
            a, b = (getattr(side[0].store.info(), name).hex() for side in (one, two))
            if a != b:
                if args.json:
                    _out({"differs": [name], "a": a, "b": b})
                else:
                    print(f"{name}: {a} in A, {b} in B; states of two are not comparable")
                return 1
        for info in (shard.store.info() for shard in (*one, *two)):
            if info.journal:
                say("state diff", f"{info.place} holds {info.journal} ticks of journal, which are not compared")
        counts = _compare(args, one, two)
    differ = sum(counts[name] for name in ("a", "b", "differs", "lost"))
    say(
        "state diff",
        f"{counts['same']} series are the same, {counts['differs']} differ, {counts['lost']} are lost in one, "
        f"{counts['a']} are only in A, {counts['b']} only in B",
    )
    return 1 if differ else 0


def _compare(args: argparse.Namespace, one: list[Shard], two: list[Shard]) -> dict[str, int]:
    counts: dict[str, int] = {name: 0 for name in ("same", "differs", "lost", "a", "b")}
    places = [
        {item: shard for shard in side for item in (*shard.store.item_ids(), *shard.store.lost)} for side in (one, two)
    ]
    items = iter(dict.fromkeys((*places[0], *places[1])))
    with Progress("diff", len(places[0].keys() | places[1].keys()), beside=True) as progress:
        while chunk := list(islice(items, CHUNK)):
            a, b = (_found(place, chunk) for place in places)
            for item in chunk:
                mine, theirs = a.get(item), b.get(item)
                if mine is None and theirs is None:
                    continue  # deleted meanwhile
                if mine is None or theirs is None:
                    side = "b" if mine is None else "a"
                    counts[side] += 1
                    _tell(args, item, {"only_in": side}, f"only in {side.upper()}")
                elif isinstance(mine, str) or isinstance(theirs, str):
                    if isinstance(mine, str) and isinstance(theirs, str):
                        counts["same"] += 1
                        continue
                    side, code = ("a", mine) if isinstance(mine, str) else ("b", theirs)
                    counts["lost"] += 1
                    _tell(args, item, {"lost_in": side, "code": code}, f"lost in {side.upper()} ({code})")
                elif names := _differences(mine, theirs, args.seq):
                    counts["differs"] += 1
                    sides = [{"head": r.head, "values": r.count, "tick": r.seq} for r in (mine, theirs)]
                    _tell(
                        args, item, {"differs": names, "a": sides[0], "b": sides[1]},
                        f"differs in {', '.join(names)} (head {mine.head} and {theirs.head}, tick {mine.seq} and "
                        f"{theirs.seq})",
                    )  # fmt: skip
                else:
                    counts["same"] += 1
            progress.add(len(chunk))
    return counts


def _found(places: dict[str, Shard], chunk: list[str]) -> dict[str, Record | str]:
    out: dict[str, Record | str] = {}
    groups: dict[int, list[str]] = {}
    shards = {}
    for item in chunk:
        if item in places:
            groups.setdefault(places[item].number, []).append(item)
            shards[places[item].number] = places[item]
    for number, items in groups.items():
        out |= {item: record for part in _read(shards[number], items) for item, record in part}
    return out


def _differences(mine: Record, theirs: Record, seq: bool) -> list[str]:
    names = ["start", "head", "count", "freq", "tz", "leaves", "extra", *(["seq"] if seq else [])]
    return [name for name in names if getattr(mine, name) != getattr(theirs, name)]


def _tell(args: argparse.Namespace, item: str, fields: dict[str, Any], text: str) -> None:
    if args.json:
        _out({"item_id": item, **fields})
    else:
        print(f"{_plain(item)}: {text}")


# ---- prune ----------------------------------------------------------------------------------------------------------


def _prune(args: argparse.Namespace) -> int:
    age = None if args.older_than is None else _duration(args.older_than)
    tombstones, dead = args.tombstones_before, args.dead_before
    if age is None and tombstones is None and dead is None:
        raise Misuse("say what to prune: --older-than, --tombstones-before or --dead-before")
    for name, tick in (("--tombstones-before", tombstones), ("--dead-before", dead)):
        if tick is not None and tick < 1:
            raise Misuse(f"{name} is {tick}, expected a tick of 1 or more")
    opened = _views(args.store, args) if args.dry_run else _owned(args.store, args, drained=age is not None)
    with opened as shards:
        if args.dry_run and age is not None:
            _check_drained(shard.store.info() for shard in shards)
        old = [[] for _ in shards] if age is None else _silent(shards, age)
        gone: dict[str, list[Any]] = {"series": [], "tombstones": [], "dead_letters": []}
        for shard, items in zip(shards, old, strict=True):
            gone["series"] += [{"item_id": item, "last": show(last)} for item, last in items]
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
        _out({"dry_run": args.dry_run, **gone})
        return 0
    for name, entries in gone.items():
        for entry in entries:
            print(f"{name}: " + ", ".join(f"{k} {_plain(str(v))}" for k, v in entry.items()))
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
            for chunk in _read(shard, shard.store.item_ids()):
                records = [record for _, record in chunk if isinstance(record, Record)]
                own |= dict(zip((r.item_id for r in records), _reached(records), strict=True))
                progress.add(len(chunk))
            ends.append({item: last for item, last in own.items() if not np.isnat(last)})
    newest = max((last for own in ends for last in own.values()), default=None)
    return [[(item, last) for item, last in own.items() if newest is not None and newest - last > age] for own in ends]


# ---- reshard --------------------------------------------------------------------------------------------------------


def _reshard(args: argparse.Namespace) -> int:
    if not 1 <= args.shards <= MOST_SHARDS:
        raise Misuse(f"--shards is {args.shards}, expected 1 to {MOST_SHARDS}")
    into = args.into.expanduser().absolute()
    if into.exists():
        raise Misuse(f"{into} exists: give another folder")
    if not into.parent.is_dir():
        raise Misuse(f"there is no folder {into.parent}")
    left = sorted(into.parent.glob(f"{into.name}.partial-*"))
    if left:
        say("state reshard", f"{left[0]} was left by a run that was killed, or another one runs: remove it if not")
    with contextlib.ExitStack() as stack:
        shards = [shard for place in args.stores for shard in stack.enter_context(_views(place, args))]
        _check_whole([shard.store.info() for shard in shards])
        for shard in shards:
            _hold(shard, stack)
        infos = [shard.store.info() for shard in shards]
        _check_drained(infos)
        offsets, dropped = _agreed(shards)
        partial = Path(tempfile.mkdtemp(dir=into.parent, prefix=f"{into.name}.partial-"))
        try:
            told = _spread(args, shards, infos, partial, offsets)
            if [_mark(shard) for shard in shards] != [(i.epoch, i.committed, i.seq) for i in infos]:
                raise StoreBusy("a store was written to meanwhile: stop its stream and try again")
            os.chmod(partial, 0o755)
            manifest = {
                "format": 1, "kind": "tsgdn.shards", "hash": HASH, "shards": args.shards,
                "model": infos[0].model.hex(), "layout": infos[0].layout.hex(),
            }  # fmt: skip
            with _whole(partial / MANIFEST) as file:
                file.write(json.dumps(manifest, indent=1).encode())
            _sync(partial)
            os.rename(partial, into)  # from here on it is there, as a whole
            _sync(into.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    if dropped:
        say("state reshard", f"the stores differ in the offset of {_some(dropped)}: tell the stream where to begin")
    if args.json:
        _out({"folder": str(into), "shards": args.shards, **told, "offsets": sorted(offsets), "dropped": dropped})
    else:
        print(f"{into}: {told['series']} series in {args.shards} shards, {told['lost']} lost ones are marked")
    return 0


def _mark(shard: Shard) -> tuple[int, int, int]:
    info = shard.store.info()
    return info.epoch, info.committed, info.seq


def _hold(shard: Shard, stack: contextlib.ExitStack) -> None:
    """Keeps writers out without becoming one: the store's bytes stay as they are."""
    info = shard.store.info()
    if info.kind != "sqlite":
        if info.owner and info.until > time.time():
            raise StoreBusy(f"{info.place} is in use by process {info.pid} on {info.host} ({info.owner}): stop it")
        return
    path = Path(info.place).with_suffix(".lock")
    file = stack.enter_context(path.open("a+"))
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise StoreBusy(
            f"{info.place} is in use by process {info.pid} on {info.host} ({info.owner}): stop it"
        ) from None


def _check_whole(infos: list[StoreInfo]) -> None:
    for name in ("model", "layout"):
        for info in infos[1:]:
            mine, theirs = getattr(infos[0], name).hex(), getattr(info, name).hex()
            if mine != theirs:
                raise Misuse(f"{info.place} is of {name} {theirs}, {infos[0].place} of {mine}: they cannot be joined")
    places = [info.place for info in infos]
    if len(set(places)) < len(places):
        raise Misuse("a store is given twice")
    for of in sorted({info.shards for info in infos} - {1}):
        numbers = sorted(info.shard for info in infos if info.shards == of)
        if numbers != list(range(of)):
            raise Misuse(f"of {of} shards there are {_some(numbers)}: give all of them, each once")
    for info in infos:
        if info.outbox:
            raise Misuse(f"the outbox of {info.place} holds {info.outbox} messages: run its stream until they are sent")


def _agreed(shards: list[Shard]) -> tuple[dict[str, bytes], list[str]]:
    """Offsets on which all stores agree that have seen anything, and the sources of the others."""
    from tsgdn.streaming.durable import REGISTERED

    tables = [shard.store.offsets() for shard in shards if shard.store.seq]
    agreed: dict[str, bytes] = {}
    dropped: list[str] = []
    for source in dict.fromkeys(source for table in tables for source in table):
        found = [table.get(source) for table in tables]
        if source == REGISTERED:  # not a place: names that may come
            names = {name for text in found if text is not None for name in json.loads(text)}
            agreed[source] = json.dumps(sorted(names)).encode()
        elif found[0] is not None and all(offset == found[0] for offset in found):
            agreed[source] = found[0]
        else:
            dropped.append(source)
    return agreed, dropped


def _spread(
    args: argparse.Namespace, shards: list[Shard], infos: list[StoreInfo], folder: Path, offsets: dict[str, bytes]
) -> dict[str, int]:
    """Writes what the stores hold into new ones; returns how much."""
    key, N = _key(args), args.shards
    tick = max(info.seq for info in infos)
    with contextlib.ExitStack() as stack:
        new: list[StateStore] = []
        for number in range(N):
            store = open_store(folder, key=key, shard=number, shards=N, durability="full", unchecked=args.unchecked)
            store.open(model=infos[0].model, layout=infos[0].layout, owner="tsgdn state reshard")
            stack.callback(store.close)
            new.append(store)
        _carry_notes(shards, new, tick)
        seen: set[str] = set()
        waiting: list[dict[str, bytes]] = [{} for _ in new]
        filled = [0] * N
        with Progress("reshard", sum(info.items for info in infos)) as progress:
            for shard in shards:
                for item, data in shard.store.records():
                    if item in seen:
                        raise Misuse(f"{_plain(item)!r} is in two stores: delete it in one of them")
                    seen.add(item)
                    place = shard_of(item, N)
                    record = unpack(data, key=key, item_id=item)
                    waiting[place][item] = pack(
                        record._replace(epoch=new[place].epoch, flags=record.flags & 0xFF00), key=key
                    )
                    filled[place] += len(data)
                    if filled[place] >= max(SLICE // N, 1 << 16):
                        new[place].commit(waiting[place])
                        waiting[place], filled[place] = {}, 0
                    progress.add()
        lost = {item: code for shard in shards for item, code in shard.store.lost.items()}
        for item, code in lost.items():
            if item not in seen:
                new[shard_of(item, N)].quarantine(item, code)
        for place, store in enumerate(new):
            store.commit(waiting[place], offsets=offsets)
        written = sum(len(store) for store in new)
        if written != len(seen):
            raise StoreDamaged(f"{written} of {len(seen)} series were written: check the disk")
    return {"series": len(seen), "lost": len(lost), "tick": tick}


def _carry_notes(shards: list[Shard], new: list[StateStore], tick: int) -> None:
    """Deletions and dead letters; ticks go on behind the highest number, which no record exceeds."""
    N = len(new)
    live = {item for shard in shards for item in (*shard.store.item_ids(), *shard.store.lost)}
    deleted: list[list[str]] = [[] for _ in new]
    dead: list[list[DeadLetter]] = [[] for _ in new]
    for shard in shards:
        for item in shard.store.tombstones():
            if item not in live:
                deleted[shard_of(item, N)].append(item)
        for letter in shard.store.dead_letters():
            dead[shard_of(letter.item_id, N) if letter.item_id else 0].append(letter)
    for store, items, letters in zip(new, deleted, dead, strict=True):
        store.commit(seq=tick, deleted=items)
        if letters:
            store.commit(dead=letters)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
