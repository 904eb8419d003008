"""Series spread over another number of stores: nothing is replayed, no state changes, the old stores stay."""

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from tsgdn.streaming import stores as kinds
from tsgdn.streaming.stores import (
    SLICE,
    DeadLetter,
    StateStore,
    StoreBusy,
    StoreDamaged,
    StoreInfo,
    StoreRefused,
)
from tsgdn.streaming.stores.disk import sync
from tsgdn.streaming.stores.record import Key, pack, unpack
from tsgdn.streaming.stores.shards import HASH, MANIFEST, MOST_SHARDS, REGISTERED, shard_of


class Resharded(NamedTuple):
    """What became of it.

    Attributes:
        series: written.
        lost: marked as lost in the new stores too.
        tick: that the new stores begin with.
        offsets: sources whose place was kept.
        dropped: sources in whose place the stores differ.
    """

    series: int
    lost: int
    tick: int
    offsets: list[str]
    dropped: list[str]


def reshard(
    stores: Sequence[StateStore],
    into: str | Path,
    shards: int,
    *,
    key: Key = None,
    unchecked: bool = False,
    progress: Callable[[], object] = lambda: None,
) -> Resharded:
    """Writes the series of all these stores into new stores in a folder, which appears when it is whole.

    Args:
        stores: all shards, each open for reading; nobody may write to them meanwhile.
        into: must not exist yet.
        shards: how many stores there shall be.
        key: of the seals, old and new.
        unchecked: as in `open_store`.
        progress: is called after each series.

    Raises:
        StoreRefused: they are not all shards of one set, hold ticks that their states lack or messages that were not
            sent, or the folder is there already.
        StoreBusy: somebody writes to one of them.
        ValueError: a number of shards that cannot be.
    """
    if not 1 <= shards <= MOST_SHARDS:
        raise ValueError(f"shards is {shards}, expected 1 to {MOST_SHARDS}")
    into = Path(into).expanduser().absolute()
    if into.exists():
        raise StoreRefused(f"{into} exists: give another folder")
    if not into.parent.is_dir():
        raise StoreRefused(f"there is no folder {into.parent}")
    with contextlib.ExitStack() as stack:
        _check_whole([store.info() for store in stores])
        for store in stores:
            _hold(store, stack)
        infos = [store.info() for store in stores]
        check_drained(infos)
        offsets, dropped = _agreed(stores)
        partial = Path(tempfile.mkdtemp(dir=into.parent, prefix=f"{into.name}.partial-"))
        try:
            series, lost, tick = _spread(stores, infos, partial, shards, offsets, key, unchecked, progress)
            if [_mark(store) for store in stores] != [(i.epoch, i.committed, i.seq) for i in infos]:
                raise StoreBusy("a store was written to meanwhile: stop its stream and try again")
            os.chmod(partial, 0o755)
            manifest = {
                "format": 1, "kind": "tsgdn.shards", "hash": HASH, "shards": shards,
                "model": infos[0].model.hex(), "layout": infos[0].layout.hex(),
            }  # fmt: skip
            (partial / MANIFEST).write_text(json.dumps(manifest, indent=1))
            sync(partial / MANIFEST)
            sync(partial)
            os.rename(partial, into)  # from here on it is there, as a whole
            sync(into.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return Resharded(series, lost, tick, sorted(offsets), dropped)


def check_drained(infos: Iterable[StoreInfo]) -> None:
    """Raises StoreRefused for a store whose journal holds what its states lack."""
    for info in infos:
        if info.journal:
            raise StoreRefused(
                f"the journal of {info.place} holds {info.journal} ticks that the states lack: run tsgdn stream with "
                "it and let it end, which writes a checkpoint"
            )


def _mark(store: StateStore) -> tuple[int, int, int]:
    info = store.info()
    return info.epoch, info.committed, info.seq


def _hold(store: StateStore, stack: contextlib.ExitStack) -> None:
    """Keeps writers out without becoming one: the store's bytes stay as they are."""
    info = store.info()
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
                raise StoreRefused(
                    f"{info.place} is of {name} {theirs}, {infos[0].place} of {mine}: they cannot be joined"
                )
    places = [info.place for info in infos]
    if len(set(places)) < len(places):
        raise StoreRefused("a store is given twice")
    for of in sorted({info.shards for info in infos} - {1}):
        numbers = sorted(info.shard for info in infos if info.shards == of)
        if numbers != list(range(of)):
            raise StoreRefused(f"of {of} shards there are {', '.join(map(str, numbers))}: give all of them, each once")
    for info in infos:
        if info.outbox:
            raise StoreRefused(
                f"the outbox of {info.place} holds {info.outbox} messages: run its stream until they are sent"
            )


def _agreed(stores: Sequence[StateStore]) -> tuple[dict[str, bytes], list[str]]:
    """Offsets on which all stores agree that have seen anything, and the sources of the others."""
    tables = [store.offsets() for store in stores if store.seq]
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
    stores: Sequence[StateStore],
    infos: list[StoreInfo],
    folder: Path,
    N: int,
    offsets: dict[str, bytes],
    key: Key,
    unchecked: bool,
    progress: Callable[[], object],
) -> tuple[int, int, int]:
    """Writes what the stores hold into new ones; returns how many series, how many lost ones, and the tick."""
    tick = max(info.seq for info in infos)
    with contextlib.ExitStack() as stack:
        new: list[StateStore] = []
        for number in range(N):
            store = kinds.open_store(folder, key=key, shard=number, shards=N, durability="full", unchecked=unchecked)
            store.open(model=infos[0].model, layout=infos[0].layout, owner="tsgdn state reshard")
            stack.callback(store.close)
            new.append(store)
        _carry_notes(stores, new, tick)
        seen: set[str] = set()
        waiting: list[dict[str, bytes]] = [{} for _ in new]
        filled = [0] * N
        for old in stores:
            for item, data in old.records():
                if item in seen:
                    raise StoreRefused(f"{item!r} is in two stores: delete it in one of them")
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
                progress()
        lost = {item: code for old in stores for item, code in old.lost.items()}
        for item, code in lost.items():
            if item not in seen:
                new[shard_of(item, N)].quarantine(item, code)
        for place, store in enumerate(new):
            store.commit(waiting[place], offsets=offsets)
        written = sum(len(store) for store in new)
        if written != len(seen):
            raise StoreDamaged(f"{written} of {len(seen)} series were written: check the disk")
    return len(seen), len(lost), tick


def _carry_notes(stores: Sequence[StateStore], new: list[StateStore], tick: int) -> None:
    """Deletions and dead letters; ticks go on behind the highest number, which no record exceeds."""
    N = len(new)
    live = {item for store in stores for item in (*store.item_ids(), *store.lost)}
    deleted: list[list[str]] = [[] for _ in new]
    dead: list[list[DeadLetter]] = [[] for _ in new]
    for store in stores:
        for item in store.tombstones():
            if item not in live:
                deleted[shard_of(item, N)].append(item)
        for letter in store.dead_letters():
            dead[shard_of(letter.item_id, N) if letter.item_id else 0].append(letter)
    for store, items, letters in zip(new, deleted, dead, strict=True):
        store.commit(seq=tick, deleted=items)
        if letters:
            store.commit(dead=letters)
