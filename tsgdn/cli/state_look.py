"""`tsgdn state ls | show | diff`: what is in a store. They take no lease and work beside a running stream."""

import argparse
import sys
import time
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np

from tsgdn.cli.main import Misuse, say
from tsgdn.cli.stores import CHUNK, FIRST, Progress, Shard, out, plain, reached, read, readable, shown, size_of, viewing
from tsgdn.data.clock import show as show_time
from tsgdn.streaming.stores.record import Record


def ls(args: argparse.Namespace) -> int:
    """Series with how far they are."""
    if args.limit is not None and args.limit < 1:
        raise Misuse(f"--limit is {args.limit}, expected at least 1")
    left = sys.maxsize if args.limit is None else args.limit
    with viewing(args.store, args) as shards:
        total = min(left, sum(len(shard.store) for shard in shards))
        with Progress("ls", total, beside=True) as progress:
            if not args.json:
                print(f"{'head':>12}  {'time':<19}  {'values':>12}  {'bytes':>10}  {'tick':>10}  item_id", flush=True)
            for shard in shards:
                told = {item: code for item, code in shard.store.lost.items() if item.startswith(args.prefix)}
                names = (item for item in shard.store.item_ids() if item.startswith(args.prefix) and item not in told)
                for chunk in _before(list(told.items()), read(shard, islice(names, max(0, left - len(told))))):
                    records = [record for _, record in chunk if isinstance(record, Record)]
                    times = iter(reached(records))
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
            out({"item_id": item, "lost": record, "shard": shard.number})
        else:
            print(f"{'-':>12}  {'lost: ' + record:<19}  {'-':>12}  {'-':>10}  {'-':>10}  {plain(item)}")
        return
    when = "-" if last is None or np.isnat(last) else show_time(last)
    if as_json:
        row = {"item_id": item, "head": record.head, "time": None if when == "-" else when, "values": record.count}
        out({**row, "bytes": size_of(record), "tick": record.seq, "shard": shard.number})
    else:
        numbers = f"{record.count:>12}  {size_of(record):>10}  {record.seq:>10}"
        print(f"{record.head:>12}  {when:<19}  {numbers}  {plain(item)}")


def show(args: argparse.Namespace) -> int:
    """A store, or one series in it."""
    if args.model is not None and args.item is None:
        raise Misuse("--model names the leaves of one series: give ITEM too")
    with viewing(args.store, args) as shards:
        if args.item is not None:
            return _show_item(args, shards)
        found = [_described(shard) for shard in shards]
    if args.json:
        out({"store": shown(args.store), "shards": found})
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
    told["until"] = show_time(np.datetime64(round(told["until"]), "s")) if told["until"] > 0 else None
    return {
        **told,
        "offsets": {source: readable(offset) for source, offset in store.offsets().items()},
        "lost": dict(store.lost),
        "tombstones": store.tombstones(),
        "dead_letters": [
            {"tick": one.seq, "code": one.code, "item_id": one.item_id, "raw": readable(one.raw, 200)}
            for one in store.dead_letters()
        ],
    }


def _lines_of(name: str, value: Any) -> Iterator[str]:
    if isinstance(value, dict | list):
        entries = [f"{plain(str(k))}: {v}" for k, v in value.items()] if isinstance(value, dict) else [
            f"tick {one['tick']}, {one['code']}, {plain(one['item_id']) or 'no series'}: {one['raw']}" for one in value
        ]  # fmt: skip
        yield f"{name:<12}  {len(entries)}"
        yield from (f"{'':<12}    {entry}" for entry in entries[:FIRST])
        if len(entries) > FIRST:
            yield f"{'':<12}    and {len(entries) - FIRST} more; --json tells all"
    else:
        yield f"{name:<12}  {'-' if value in (None, '') else value}"


def _show_item(args: argparse.Namespace, shards: list[Shard]) -> int:
    for shard in shards:
        found = [entry for chunk in read(shard, [args.item]) for entry in chunk]
        code = found[0][1] if found else shard.store.lost.get(args.item, "")
        if isinstance(code, Record):
            told = _told(args, shard, code)
            if args.json:
                out(told)
                return 0
            for name, value in told.items():
                if name == "leaves":
                    print(f"{name:<12}  {len(value)}")
                    for leaf in value:
                        print(_leaf_line(leaf))
                else:
                    print(f"{name:<12}  {'-' if value in (None, '') else plain(str(value))}")
            return 0
        if code:
            say("state show", f"{plain(args.item)!r} is lost ({code}): import it from a copy, or let it begin anew")
            return 1
        if args.item in shard.store.tombstones():
            tick = shard.store.tombstones()[args.item]
            raise Misuse(f"{plain(args.item)!r} was deleted at tick {tick}")
    raise Misuse(f"there is no series {plain(args.item)!r} in {shown(args.store)}; tsgdn state ls names them")


def _told(args: argparse.Namespace, shard: Shard, record: Record) -> dict[str, Any]:
    from tsgdn.streaming.state_records import aside  # it imports torch

    first, last = np.datetime64(record.start, "ns"), reached([record])[0]
    beside = aside(record)
    told = {
        "item_id": record.item_id, "shard": shard.number, "start": show_time(first),
        "last": None if np.isnat(last) else show_time(last), "head": record.head, "count": record.count,
        "freq": record.freq, "tz": record.tz or "UTC", "tick": record.seq, "epoch": record.epoch,
        "model": record.model.hex(), "layout": record.layout.hex(), "bytes": size_of(record),
        "offset": readable(record.offset),
        "held": [
            {"step": step, "time": show_time(np.datetime64(stamp, "ns")), "values": values}
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
    from tsgdn.streaming.predictor import StatefulPredictor
    from tsgdn.streaming.state_records import layout, split

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


def diff(args: argparse.Namespace) -> int:
    """What differs between two stores; 1 if anything does."""
    with viewing(args.store, args) as one, viewing(args.other, args) as two:
        for name in ("model", "layout"):
            a, b = (getattr(side[0].store.info(), name).hex() for side in (one, two))
            if a != b:
                if args.json:
                    out({"differs": [name], "a": a, "b": b})
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
        out |= {item: record for part in read(shards[number], items) for item, record in part}
    return out


def _differences(mine: Record, theirs: Record, seq: bool) -> list[str]:
    names = ["start", "head", "count", "freq", "tz", "leaves", "extra", *(["seq"] if seq else [])]
    return [name for name in names if getattr(mine, name) != getattr(theirs, name)]


def _tell(args: argparse.Namespace, item: str, fields: dict[str, Any], text: str) -> None:
    if args.json:
        out({"item_id": item, **fields})
    else:
        print(f"{plain(item)}: {text}")
