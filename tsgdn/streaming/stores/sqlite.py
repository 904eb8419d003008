"""States in a folder: one SQLite file per shard, from the standard library.

How the file is opened, locked and changed is told in `sqlite_file`; here is what lies in its tables.
"""

import contextlib
import os
import sqlite3
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from tsgdn.streaming.stores import (
    NONE,
    DeadLetter,
    Durability,
    StoreDamaged,
    StoreInfo,
    StoreRefused,
    checked_append,
    checked_names,
    checked_order,
    checked_records,
    slices,
)
from tsgdn.streaming.stores.disk import sync
from tsgdn.streaming.stores.record import (
    RecordDamaged,
    Stamp,
    check,
    name_bytes,
    name_text,
    pack_ticks,
    seal_of,
)
from tsgdn.streaming.stores.sqlite_file import CHECKPOINT, SqliteFile

_UPSERT = (
    "INSERT INTO state(slot, seq, epoch, record) VALUES((SELECT slot FROM item WHERE item_id=?), ?, ?, ?) "
    "ON CONFLICT(slot) DO UPDATE SET seq=excluded.seq, epoch=excluded.epoch, record=excluded.record"
)


class SqliteStore(SqliteFile):
    """A `StateStore` in a folder; see `open_store` for the arguments.

    Raises:
        StoreError: by its methods.
    """

    # ---- state ------------------------------------------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        """Of this owner."""
        return self._epoch

    @property
    def durability(self) -> Durability:
        """As it was opened."""
        return self._durability

    @property
    def seq(self) -> int:
        """The last durable tick."""
        return self._seq

    @property
    def committed(self) -> int:
        """The last tick that all states hold."""
        return self._committed

    @property
    def lost(self) -> Mapping[str, str]:
        """Series set aside, and why."""
        return MappingProxyType(self._lost)

    # ---- writing ----------------------------------------------------------------------------------------------------

    def append(self, ticks: Sequence[bytes], *, seq: int) -> None:
        """Adds ticks to the journal; see `StateStore.append`."""
        last = checked_append(ticks, seq=seq, last=self._seq)
        if self._durability == "memory":
            self._use(write=True)
        else:
            batch = pack_ticks(ticks)
            row = (last, len(ticks), seal_of(self._key, "journal", last, len(ticks), batch), batch)
            with self._transaction() as db:
                db.execute("INSERT INTO journal(seq, ticks, seal, batch) VALUES(?,?,?,?)", row)
            self._unmoved += len(batch)
            if self._unmoved > CHECKPOINT:
                self._move_log()
        self._seq = last

    def commit(
        self,
        records: Mapping[str, bytes] = NONE,
        *,
        seq: int | None = None,
        offsets: Mapping[str, bytes] = NONE,
        deleted: Collection[str] = (),
        outbox: Mapping[bytes, bytes] = NONE,
        dead: Sequence[DeadLetter] = (),
        between: Callable[[], None] | None = None,
    ) -> None:
        """Writes states and what belongs to them together; see `StateStore.commit`."""
        self._use(write=True)
        checked_order(seq=seq, committed=self._committed, last=self._seq, journal=self._seq > self._committed)
        checked_names(offsets, deleted, records)
        meta = self._meta() if records else {}
        stamps = checked_records(
            records, model=meta.get("model"), layout=meta.get("layout"), epoch=self._epoch,
            keyed=self._key is not None, tombstones=self._deleted,
        )  # fmt: skip
        parts = slices(records.items())
        part = next(parts)
        for following in parts:
            with self._transaction() as db:
                self._write(db, part, stamps)
            for item, _ in part:
                self._deleted.pop(item, None)
            self._move_log()
            if between is not None:
                between()
            part = following
        with self._transaction() as db:
            self._write(db, part, stamps)
            for source, offset in offsets.items():
                self._put_position(name_bytes(source), offset, self._seq if seq is None else seq)
            last = self._seq if seq is None else max(self._seq, seq)
            for item in deleted:
                name = name_bytes(item)
                db.execute("DELETE FROM state WHERE slot=(SELECT slot FROM item WHERE item_id=?)", (name,))
                for table in ("item", "quarantine", "dead"):
                    db.execute(f"DELETE FROM {table} WHERE item_id=?", (name,))
                db.execute(
                    "INSERT OR REPLACE INTO tombstone VALUES(?,?,?)",
                    (name, last, seal_of(self._key, "tombstone", name, last)),
                )
            for number, payload in outbox.items():
                db.execute(
                    "INSERT INTO outbox(id, seal, payload) VALUES(?,?,?) "
                    "ON CONFLICT(id) DO UPDATE SET seal=excluded.seal, payload=excluded.payload",
                    (number, seal_of(self._key, "outbox", number, payload), payload),
                )
            for letter in dead:
                self._put_dead(db, letter if letter.seq else letter._replace(seq=last))
            if seq is not None:
                self._put_position(b"", b"", seq)
                db.execute("DELETE FROM journal WHERE seq<=?", (seq,))
        if seq is not None:
            self._committed, self._seq = seq, max(self._seq, seq)
        for item, _ in part:
            self._deleted.pop(item, None)
        for item in deleted:
            self._lost.pop(item, None)
            self._deleted[item] = last
        self._move_log("TRUNCATE" if deleted else "PASSIVE")

    def _write(self, db: sqlite3.Connection, part: list[tuple[str, bytes]], stamps: Mapping[str, Stamp]) -> None:
        names = [stamps[item].item for item, _ in part]
        db.executemany("INSERT OR IGNORE INTO item(item_id) VALUES(?)", ((name,) for name in names))
        rows = ((stamps[item], data) for item, data in part)
        db.executemany(_UPSERT, ((stamp.item, stamp.seq, stamp.epoch, data) for stamp, data in rows))
        if self._deleted:
            db.executemany("DELETE FROM tombstone WHERE item_id=?", ((name,) for name in names))

    def _put_dead(self, db: sqlite3.Connection, letter: DeadLetter) -> None:
        fields = (letter.seq, name_bytes(letter.code), name_bytes(letter.item_id))
        seal = seal_of(self._key, "dead", *fields, letter.raw)
        db.execute("INSERT INTO dead(seq, code, item_id, seal, raw) VALUES(?,?,?,?,?)", (*fields, seal, letter.raw))

    def quarantine(self, item_id: str, code: str) -> None:
        """Sets a record aside; see `StateStore.quarantine`."""
        name, reason = name_bytes(item_id), name_bytes(code)
        row = None
        with self._guard, contextlib.suppress(sqlite3.DatabaseError):
            # a page that cannot be read cannot be moved either; then the name alone keeps it from being used
            row = (
                self._use(write=True)
                .execute("SELECT record FROM state WHERE slot=(SELECT slot FROM item WHERE item_id=?)", (name,))
                .fetchone()
            )
            row = (b"",) if row is None else row
        record = row[0] if row is not None and isinstance(row[0], bytes) else b""
        with self._transaction() as db:
            if row is not None:
                db.execute("DELETE FROM state WHERE slot=(SELECT slot FROM item WHERE item_id=?)", (name,))
                db.execute("DELETE FROM item WHERE item_id=?", (name,))
            db.execute(
                "INSERT OR REPLACE INTO quarantine(item_id, code, seal, record) VALUES(?,?,?,?)",
                (name, reason, seal_of(self._key, "quarantine", name, reason, record), record),
            )
        self._lost[item_id] = code

    def release(self, item_ids: Collection[str]) -> None:
        """Forgets that these were lost; see `StateStore.release`."""
        with self._transaction() as db:
            db.executemany("DELETE FROM quarantine WHERE item_id=?", ((name_bytes(item),) for item in item_ids))
        for item in item_ids:
            self._lost.pop(item, None)

    def bury(self, seq: int, code: str) -> None:
        """Makes one tick a dead letter; see `StateStore.bury`."""
        with self._transaction() as db:
            row = db.execute(
                "SELECT seq, ticks, batch, seal FROM journal WHERE seq>=? ORDER BY seq LIMIT 1", (seq,)
            ).fetchone()
            ticks = [] if row is None else self._ticks_of(*row)
            raw = dict(ticks).get(seq)
            if row is None or raw is None:
                raise ValueError(f"the journal holds no tick {seq}: expected {self._committed + 1} to {self._seq}")
            batch = pack_ticks([b"" if number == seq else tick for number, tick in ticks])
            db.execute(
                "UPDATE journal SET batch=?, seal=? WHERE seq=?",
                (batch, seal_of(self._key, "journal", row[0], row[1], batch), row[0]),
            )
            self._put_dead(db, DeadLetter(code, "", raw, seq))

    def sent(self, ids: Collection[bytes]) -> None:
        """Removes messages from the outbox."""
        with self._transaction() as db:
            db.executemany("DELETE FROM outbox WHERE id=?", ((number,) for number in ids))

    def prune(self, *, tombstones: int | None = None, dead: int | None = None) -> int:
        """Forgets tombstones and dead letters of ticks up to a number; see `StateStore.prune`."""
        gone = 0
        with self._transaction() as db:
            for table, limit in (("tombstone", tombstones), ("dead", dead)):
                if limit is not None:
                    gone += db.execute(f"DELETE FROM {table} WHERE seq<=?", (limit,)).rowcount
        if tombstones is not None:
            self._deleted = {item: seq for item, seq in self._deleted.items() if seq > tombstones}
        return gone

    def renew(self) -> None:
        """Prolongs the lease."""
        with self._transaction(renew=True):
            pass

    # ---- reading ----------------------------------------------------------------------------------------------------

    def read(self, item_ids: Collection[str]) -> dict[str, bytes]:
        """The sound records of these; see `StateStore.read`."""
        found: dict[str, bytes] = {}
        with self._guard, self._explained():
            db, meta = self._use(), self._meta()
            for item in item_ids:
                row = db.execute("SELECT slot FROM item WHERE item_id=?", (name_bytes(item),)).fetchone()
                record = None if row is None else self._one(row[0], item, meta)
                if record is not None:
                    found[item] = record
        return found

    def records(self) -> Iterator[tuple[str, bytes]]:
        """All sound records; see `StateStore.records`."""
        last = -(1 << 63)
        while True:
            with self._guard, self._explained():
                db, meta = self._use(), self._meta()
                rows = db.execute(
                    "SELECT slot, item_id FROM item WHERE slot>? ORDER BY slot LIMIT 64", (last,)
                ).fetchall()
                chunk = [(name_text(name), self._one(slot, name_text(name), meta)) for slot, name in rows]
            yield from ((item, record) for item, record in chunk if record is not None)
            if not rows:
                return
            last = rows[-1][0]

    def _one(self, slot: int, item: str, meta: Mapping[str, bytes]) -> bytes | None:
        """A record if it is sound; else it is set aside."""
        code = "state.missing"
        try:
            row = self._use().execute("SELECT seq, epoch, record FROM state WHERE slot=?", (slot,)).fetchone()
            if row is not None:
                if not isinstance(row[2], bytes):
                    raise RecordDamaged("state.type", "a record is no blob")
                stamp = check(row[2], key=self._key, item_id=item)
                if (stamp.model, stamp.layout) != (meta["model"], meta["layout"]):
                    raise RecordDamaged("state.model", "a record is of another model")
                if (stamp.seq, stamp.epoch) == row[:2]:
                    return row[2]
                code = "state.seq"
        except RecordDamaged as error:
            code = error.code
        except sqlite3.DatabaseError as error:
            if not _unreadable(error):
                raise
            code = "state.unreadable"
        if self._lost.get(item) != code:
            if self._writer:
                self.quarantine(item, code)
            self._lost[item] = code
        return None

    def item_ids(self) -> Iterator[str]:
        """All series with a record."""
        last = -(1 << 63)
        while True:
            with self._guard, self._explained():
                rows = (
                    self._use()
                    .execute("SELECT slot, item_id FROM item WHERE slot>? ORDER BY slot LIMIT 4096", (last,))
                    .fetchall()
                )
            yield from (name_text(name) for _, name in rows)
            if not rows:
                return
            last = rows[-1][0]

    def __len__(self) -> int:
        return self._count("item")

    def _count(self, table: str) -> int:
        with self._guard, self._explained():
            return self._use().execute(f"SELECT count(*) FROM {table}").fetchone()[0]

    def journal(self, since: int | None = None) -> Iterator[tuple[int, bytes]]:
        """Ticks behind a number; see `StateStore.journal`.

        Raises:
            StoreDamaged: one is missing or is not what was written.
        """
        since = self._committed if since is None else since
        if since < self._committed:
            raise ValueError(f"journal since {since}, but ticks up to {self._committed} are in the states and gone")
        while True:
            with self._guard, self._explained():
                row = (
                    self._use()
                    .execute("SELECT seq, ticks, batch, seal FROM journal WHERE seq>? ORDER BY seq LIMIT 1", (since,))
                    .fetchone()
                )
                ticks = [] if row is None else self._ticks_of(*row)
            if not ticks:
                if since < self._seq and self._durability != "memory" and self._writer:
                    raise StoreDamaged(self._how_to_repair(f"the journal ends at tick {since}, not {self._seq}"))
                return
            if ticks[0][0] > since + 1 and self._writer:  # from a reader the writer may take them away meanwhile
                raise StoreDamaged(self._how_to_repair(f"tick {since + 1} of the journal is missing"))
            yield from ((seq, tick) for seq, tick in ticks if seq > since and tick)
            since = ticks[-1][0]

    def offsets(self) -> dict[str, bytes]:
        """Per source the place after what the states hold."""
        with self._guard, self._explained():
            return {name_text(source): offset for source, (offset, _) in self._positions().items() if source}

    def outbox(self) -> Iterator[tuple[bytes, bytes]]:
        """Messages that were not sent, oldest first."""
        yield from self._rows("outbox", "id, payload", "number")

    def dead_letters(self) -> Iterator[DeadLetter]:
        """Oldest first."""
        for seq, code, item, raw in self._rows("dead", "seq, code, item_id, raw", "number"):
            yield DeadLetter(name_text(code), name_text(item), raw, seq)

    def info(self) -> StoreInfo:
        """What there is."""
        with self._guard, self._explained():
            db, meta = self._use(), self._meta()
            epoch, owner, host, pid, until = db.execute("SELECT epoch, owner, host, pid, until FROM lease").fetchone()
            committed = self._positions()[b""][1]
            (last,) = db.execute("SELECT max(seq) FROM journal").fetchone()
            files = (self.place, self._log)
            return StoreInfo(
                "sqlite", str(self.place), sqlite3.sqlite_version, self._durability, int(meta["format"]), meta["model"],
                meta["layout"], int(meta["shard"]), int(meta["shards"]), epoch, owner.decode(), host.decode(), pid,
                until, committed, max(committed, last or 0), len(self),
                sum(file.stat().st_size for file in files if file.exists()), max(0, (last or 0) - committed),
                self._count("outbox"), self._count("dead"), self._count("tombstone"), self._count("quarantine"),
            )  # fmt: skip

    def copy(self, folder: str | Path) -> None:
        """Writes all of it, as of one moment, into a folder that has none yet.

        Raises:
            StoreRefused: there is one.
        """
        target = Path(folder).expanduser() / self.place.name
        if target.exists() or target.with_name(target.name + "-wal").exists():
            raise StoreRefused(f"{target} exists: give another folder")
        partial = target.with_suffix(".new")
        with self._guard, self._explained():
            target.parent.mkdir(parents=True, exist_ok=True)
            partial.unlink(missing_ok=True)
            try:
                self._use().execute("VACUUM INTO ?", (str(partial),))
                with contextlib.closing(sqlite3.connect(partial, isolation_level=None)) as db:
                    db.execute("PRAGMA synchronous=FULL")
                    other = SqliteStore(folder, key=self._key)
                    other._db, other._epoch = db, self._epoch
                    db.execute("BEGIN")
                    other._put_meta("dirty", b"0")
                    other._put_lease(b"", 0.0)
                    db.execute("COMMIT")
                    other._db = None
                sync(partial)
                os.replace(partial, target)
                sync(target.parent)
            finally:
                partial.unlink(missing_ok=True)


def _unreadable(error: sqlite3.DatabaseError) -> bool:
    return (getattr(error, "sqlite_errorcode", 0) & 0xFF) in (10, 11)
