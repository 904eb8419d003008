"""A store of another kind, written as a store of files."""

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tsgdn.streaming.stores import StateStore, StoreBusy, StoreRefused, slices
from tsgdn.streaming.stores.disk import sync
from tsgdn.streaming.stores.record import Key, glance, name_bytes, pack_ticks, seal_of
from tsgdn.streaming.stores.sqlite import SqliteStore


def copy_of(
    source: StateStore, folder: str | Path, *, key: Key, shard: int, shards: int, moment: Callable[[], Any]
) -> None:
    """Writes another kind of store as a store of files.

    Args:
        source: is open, for reading at least.
        folder: has no such store yet.
        key: of its seals.
        shard: which of them.
        shards: how many there are.
        moment: changes whenever something is written to the source; the copy is made again if it did.

    Raises:
        StoreRefused: there is a store in the folder.
        StoreBusy: the source was written to during each of five copies.
    """
    target = Path(folder).expanduser()
    if (target / f"{shard:02d}.sqlite").exists():
        raise StoreRefused(f"{target / f'{shard:02d}.sqlite'} exists: give another folder")
    info = source.info()
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target, prefix="copy-") as partial:
        for attempt in range(5):
            before = moment()
            place = Path(partial) / str(attempt)
            store = SqliteStore(place, key=key, shard=shard, shards=shards, unchecked=True)
            store.open(model=info.model, layout=info.layout, owner="copy")
            store._epoch = info.epoch  # records are of this owner's epoch and those before it
            with store._transaction(check=False) as db:
                store._put_lease(b"copy", time.time())
                for chunk in slices(source.records()):
                    store._write(db, chunk, {item: glance(data) for item, data in chunk})
                for name, offset in source.offsets().items():
                    store._put_position(name_bytes(name), offset, info.committed)
                for item, seq in source.tombstones().items():
                    name = name_bytes(item)
                    db.execute("INSERT INTO tombstone VALUES(?,?,?)", (name, seq, seal_of(key, "tombstone", name, seq)))
                for item, code in source.lost.items():
                    name, reason = name_bytes(item), name_bytes(code)
                    seal = seal_of(key, "quarantine", name, reason, b"")
                    db.execute("INSERT INTO quarantine VALUES(?,?,?,?)", (name, reason, seal, b""))
                for number, payload in source.outbox():
                    seal = seal_of(key, "outbox", number, payload)
                    db.execute("INSERT INTO outbox(id, seal, payload) VALUES(?,?,?)", (number, seal, payload))
                for letter in source.dead_letters():
                    store._put_dead(db, letter)
                fresh = source.info()
                store._put_position(b"", b"", fresh.committed)
                last = fresh.committed
                for seq, tick in source.journal(fresh.committed) if fresh.journal else ():
                    # a buried tick leaves a hole: it is written as one
                    ticks = [b""] * (seq - last - 1) + [tick]
                    batch = pack_ticks(ticks)
                    seal = seal_of(key, "journal", seq, len(ticks), batch)
                    db.execute("INSERT INTO journal VALUES(?,?,?,?)", (seq, len(ticks), seal, batch))
                    last = seq
                if last < fresh.seq:
                    batch = pack_ticks([b""] * (fresh.seq - last))
                    seal = seal_of(key, "journal", fresh.seq, fresh.seq - last, batch)
                    db.execute("INSERT INTO journal VALUES(?,?,?,?)", (fresh.seq, fresh.seq - last, seal, batch))
            store.close()
            if moment() == before:
                os.replace(place / f"{shard:02d}.sqlite", target / f"{shard:02d}.sqlite")
                sync(target)
                return
    raise StoreBusy(f"{source.info().place} was written to during each of five copies: pause the writer")
