"""States in a folder: one SQLite file per shard, from the standard library.

Who may write is settled three times over. The operating system's lock keeps a second process out; the epoch in the
lease keeps an owner out that slept while another took over, since every transaction asks for it before it changes
anything; and only the one writing connection moves the write-ahead log into the file, because SQLite before 3.51.3 can
lose a page when two connections do so at once.

Blobs keep what SQLite itself does not check: records carry a seal, rows of the other tables have one beside them.
"""

import contextlib
import ctypes
import fcntl
import hmac
import os
import platform
import re
import sqlite3
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tsgdn.streaming.stores import (
    NONE,
    DeadLetter,
    Durability,
    StateStore,
    StoreBusy,
    StoreDamaged,
    StoreError,
    StoreFailed,
    StoreFenced,
    StoreFull,
    StoreInfo,
    StoreRefused,
    checked_append,
    checked_names,
    checked_order,
    checked_records,
    slices,
)
from tsgdn.streaming.stores.record import (
    Key,
    RecordDamaged,
    Stamp,
    check,
    glance,
    name_bytes,
    name_text,
    pack_ticks,
    seal_of,
    unpack_ticks,
)

FORMAT = 1
APPLICATION = 0x54534753  # "TSGS" in the header of the file
CHECKPOINT = 4 << 20  # bytes of journal after which the write-ahead log is moved into the file
SCHEMA = (
    "CREATE TABLE meta(key BLOB PRIMARY KEY, value BLOB NOT NULL, seal BLOB NOT NULL)",
    "CREATE TABLE lease(id INTEGER PRIMARY KEY CHECK(id=1), epoch INTEGER, owner BLOB, host BLOB, pid INTEGER, "
    "until REAL, seal BLOB)",
    "CREATE TABLE item(slot INTEGER PRIMARY KEY, item_id BLOB NOT NULL UNIQUE)",
    # a rowid table with the blob last: without rowids it takes three times the room and is several times slower
    "CREATE TABLE state(slot INTEGER PRIMARY KEY, seq INTEGER, epoch INTEGER, record BLOB)",
    "CREATE TABLE position(source BLOB PRIMARY KEY, offset BLOB, seq INTEGER, seal BLOB)",
    "CREATE TABLE journal(seq INTEGER PRIMARY KEY, ticks INTEGER, seal BLOB, batch BLOB)",
    "CREATE TABLE outbox(number INTEGER PRIMARY KEY, id BLOB UNIQUE, seal BLOB, payload BLOB)",
    "CREATE TABLE dead(number INTEGER PRIMARY KEY, seq INTEGER, code BLOB, item_id BLOB, seal BLOB, raw BLOB)",
    "CREATE TABLE tombstone(item_id BLOB PRIMARY KEY, seq INTEGER, seal BLOB)",
    "CREATE TABLE quarantine(item_id BLOB PRIMARY KEY, code BLOB, seal BLOB, record BLOB)",
)
INDEXED = ("meta", "item", "position", "outbox", "tombstone", "quarantine")
REMOTE = {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "glusterfs", "lustre", "ncpfs", "fuse.sshfs"}

_UPSERT = (
    "INSERT INTO state(slot, seq, epoch, record) VALUES((SELECT slot FROM item WHERE item_id=?), ?, ?, ?) "
    "ON CONFLICT(slot) DO UPDATE SET seq=excluded.seq, epoch=excluded.epoch, record=excluded.record"
)
_FULL, _FAILED, _BUSY = (3, 8, 13, 14), (10,), (5, 6)  # PERM READONLY FULL CANTOPEN; IOERR; BUSY LOCKED


class SqliteStore:
    """A `StateStore` in a folder; see `open_store` for the arguments.

    Raises:
        StoreError: by its methods.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        durability: Durability = "normal",
        key: Key = None,
        shard: int = 0,
        shards: int = 1,
        lease: int | float = 30.0,
        unchecked: bool = False,
    ) -> None:
        self._folder = Path(folder).expanduser()
        self.place = self._folder / f"{shard:02d}.sqlite"
        self._durability, self._key, self._lease, self._unchecked = durability, key, float(lease), unchecked
        self._shard, self._shards = shard, shards
        self._guard = threading.RLock()
        self._db: sqlite3.Connection | None = None
        self._lock = -1
        self._pid = 0
        self._writer = False
        self._dead_end: StoreError | None = None  # why nothing can be written any more
        self._epoch = self._seq = self._committed = 0
        self._owner = ("", "", 0)
        self._until = 0.0
        self._unmoved = 0
        self._lost: dict[str, str] = {}
        self._deleted: dict[str, int] = {}

    # ---- opening and closing ----------------------------------------------------------------------------------------

    def open(self, *, model: bytes, layout: bytes, owner: str, takeover: bool = False) -> int:
        """Becomes the one writer; see `StateStore.open`.

        Raises:
            StoreBusy: another process has it open.
            StoreRefused: of another model, layout, number of shards, key or format, or in a place without locks.
            StoreDamaged: it is not what was written.
        """
        if len(model) != 16 or len(layout) != 16:
            raise ValueError(f"model and layout have {len(model)} and {len(layout)} bytes, expected 16 each")
        if self._db is not None:
            raise StoreRefused(f"{self.place} is open already: close it first")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreRefused(f"{self._folder} cannot be made: {error.strerror}") from None
        name = owner.encode("utf-8", "replace").decode()
        self._owner = (name, platform.node(), os.getpid())
        self._take_lock(takeover)
        try:
            with self._explained():
                if not self.place.exists() or not self.place.stat().st_size:
                    self._make(model, layout)
                self._begin(model, layout)
        except BaseException:
            self._let_go()
            raise
        _OPEN.add(self)
        return self._epoch

    def view(self) -> "SqliteStore":
        """Opens for reading only; see `StateStore.view`.

        Raises:
            StoreRefused: there is none, or it needs another key.
            StoreDamaged: it is not what was written.
        """
        if self._db is not None:
            raise StoreRefused(f"{self.place} is open already: close it first")
        if not self.place.exists():
            raise StoreRefused(f"there is no store at {self.place}: give the folder of one")
        try:
            with self._explained():
                self._look_for_the_log()
                self._connect("ro")
                self._examine()
                self._load()
        except BaseException:
            self._let_go()
            raise
        _OPEN.add(self)
        return self

    def close(self) -> None:
        """Moves the log into the file and lets go; after a failure or a takeover it only lets go."""
        with self._guard:
            if self._db is None or self._pid != os.getpid():
                return
            try:
                if self._writer and self._dead_end is None:
                    with self._transaction():
                        self._put_meta("dirty", b"0")
                        self._put_lease(b"", 0.0)
                    self._move_log("TRUNCATE")
                    ctypes.pythonapi.Py_DecRef(ctypes.py_object(self._db))
                    self._db.close()
            except StoreError:
                pass  # the next owner finds what was committed, as after a kill
            finally:
                self._let_go()

    def _let_go(self) -> None:
        if self._db is not None and not self._writer:
            self._db.close()
        self._db = None
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1
        self._writer = False
        _OPEN.discard(self)

    def _take_lock(self, takeover: bool) -> None:
        if not self._unchecked:
            kind = filesystem(self._folder)
            if kind in REMOTE:
                raise StoreRefused(
                    f"{self._folder} lies on {kind}, where SQLite can lose data: use a local disk or redis://"
                )
        path = self.place.with_suffix(".lock")
        try:
            handle = _locked(path)
            if handle is None:
                text = path.read_text(errors="replace").strip().split("\n")
                owner, host, pid = (*text, "?", "?", "?")[:3]
                who = f"{self.place} is in use by process {pid} on {host} ({owner})"
                if not takeover:
                    raise StoreBusy(f"{who}: stop it, or give another folder")
                until = self._lease_end()
                if until > time.time():
                    raise StoreBusy(f"{who}, whose lease runs for {until - time.time():.0f} s more: try again then")
                handle = _locked(path, fresh=True)
                if handle is None:
                    raise StoreBusy(f"{self.place} is being taken over by another process: leave it to that one")
            self._lock = handle
            if not self._unchecked and _locked(path) is not None:
                raise StoreRefused(
                    f"{self._folder} lies on a file system whose locks keep nobody out: use a local disk or redis://"
                )
            os.ftruncate(handle, 0)
            os.pwrite(handle, "\n".join(map(str, self._owner)).encode(), 0)
        except OSError as error:
            self._let_go()
            raise StoreRefused(f"{path} cannot be locked: {error.strerror}") from None
        except StoreError:
            self._let_go()
            raise

    def _lease_end(self) -> float:
        with contextlib.closing(sqlite3.connect(f"{self.place.absolute().as_uri()}?mode=ro", uri=True)) as db:
            try:
                row = db.execute("SELECT until FROM lease").fetchone()
            except sqlite3.Error as error:
                raise self._translated(error) from None
        return float(row[0]) if row and isinstance(row[0], float) else 0.0

    def _make(self, model: bytes, layout: bytes) -> None:
        """A new store, whole before it gets its name."""
        if self.place.exists() or self._log.exists():
            raise StoreDamaged(
                f"{self.place} is {'empty' if self.place.exists() else 'gone, its log is still there'}: put it back "
                "from a copy, or remove it and its log to start anew"
            )
        partial = self.place.with_suffix(".new")
        partial.unlink(missing_ok=True)
        with contextlib.closing(sqlite3.connect(partial, isolation_level=None)) as db:
            self._db = db
            db.execute("PRAGMA synchronous=FULL")
            db.execute(f"PRAGMA application_id={APPLICATION}")
            db.execute("BEGIN")
            for statement in SCHEMA:
                db.execute(statement)
            for name, value in (
                ("format", b"%d" % FORMAT),
                ("model", model),
                ("layout", layout),
                ("shard", b"%d" % self._shard),
                ("shards", b"%d" % self._shards),
                ("dirty", b"0"),
            ):
                self._put_meta(name, value)
            self._put_lease(b"", 0.0)
            self._put_position(b"", b"", 0)
            db.execute("COMMIT")
            self._db = None
        _sync(partial)
        os.replace(partial, self.place)
        _sync(self._folder)

    def _connect(self, mode: str) -> None:
        self._db = sqlite3.connect(
            f"{self.place.absolute().as_uri()}?mode={mode}",
            uri=True, isolation_level=None, timeout=5.0, check_same_thread=False,
        )  # fmt: skip
        self._pid = os.getpid()

    def _begin(self, model: bytes, layout: bytes) -> None:
        self._look_for_the_log()
        self._connect("ro")  # a store that is refused is left as it is: this connection cannot move the log
        self._examine()
        meta = self._meta()
        for name, own, wish in (
            ("model", model.hex(), "load that model, or warm this one up into another folder"),
            ("layout", layout.hex(), "use the version and settings that wrote it, or warm up into another folder"),
            ("shards", str(self._shards), "give that number, or reshard"),
            ("shard", str(self._shard), "the file was renamed: give it its name back"),
        ):
            there = meta[name].hex() if name in ("model", "layout") else meta[name].decode()
            if there != own:
                raise StoreRefused(f"{self.place} holds states of {name} {there}, this is {own}: {wish}")
        self._load()
        self._use().close()
        self._connect("rw")
        db = self._use()
        # From here on only `close` closes it. Whenever else it ends, the files stay as after a kill: SQLite would move
        # the log into the file and remove it in passing, and its absence would then be taken for a loss.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(db))
        self._writer, self._dead_end = True, None
        for pragma in (
            "wal_autocheckpoint=0",
            "journal_mode=WAL",
            f"synchronous={'FULL' if self._durability == 'full' else 'NORMAL'}",
            "mmap_size=0",
            "journal_size_limit=67108864",
            "secure_delete=ON",  # what was deleted is gone from the file
        ):
            db.execute(f"PRAGMA {pragma}")
        with self._transaction():
            self._epoch += 1
            self._put_meta("dirty", b"1")
            self._put_lease(self._owner[0].encode(), time.time() + self._lease)
        self._move_log("TRUNCATE")  # "dirty" reaches the file itself: without its log it would be an older state

    def _look_for_the_log(self) -> None:
        """Refuses a file whose owner did not close it and whose log is not there."""
        if self._unchecked or self._log.exists():
            return
        # immutable: to look in the usual way would put an empty log there
        place = f"{self.place.absolute().as_uri()}?mode=ro&immutable=1"
        with contextlib.closing(sqlite3.connect(place, uri=True)) as db:
            try:
                row = db.execute("SELECT value FROM meta WHERE key=?", (b"dirty",)).fetchone()
            except (sqlite3.DatabaseError, UnicodeDecodeError):
                return  # what is wrong will be said
        if row == (b"1",) and not self._log.exists():
            raise StoreDamaged(
                f"{self._log} is missing, and the states in it with it: copy it beside {self.place.name}, "
                "or accept an older state with unchecked"
            )

    def _examine(self) -> None:
        """Refuses a file that is no store, is damaged, or that this version cannot read."""
        db = self._use()
        (application,) = db.execute("PRAGMA application_id").fetchone()
        if application != APPLICATION:
            raise StoreRefused(f"{self.place} is no store of tsgdn: give another folder")
        writer = self._lock >= 0
        checks = ["PRAGMA quick_check(1)", *(f"PRAGMA integrity_check({name})" for name in INDEXED)] if writer else []
        for sql in checks:
            found = db.execute(sql).fetchall()
            if found != [("ok",)]:
                raise StoreDamaged(self._how_to_repair(str(found[0][0]).split("\n")[-1]))
        meta = self._meta()
        if not meta["format"].isdigit() or int(meta["format"]) > FORMAT:
            raise StoreRefused(
                f"{self.place} has format {meta['format'].decode()}, this version reads up to {FORMAT}: upgrade tsgdn"
            )
        schema = [sql for (sql,) in db.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL ORDER BY rowid")]
        if schema != list(SCHEMA):
            raise StoreDamaged(self._how_to_repair("its tables are not those of a store"))

    def _meta(self) -> dict[str, bytes]:
        rows = self._use().execute("SELECT key, value, seal FROM meta").fetchall()
        names = {key for key, _, _ in rows}
        if b"model" in names and not all(self._sound("meta", key, value, seal=seal) for key, value, seal in rows):
            keyed = [len(seal) == 16 for _, _, seal in rows if isinstance(seal, bytes)]
            if all(keyed) != (self._key is not None) and len(set(keyed)) == 1:
                wish = "give the key" if all(keyed) else "give none"
                raise StoreRefused(f"{self.place} was written {'with' if all(keyed) else 'without'} a key: {wish}")
            if self._key is not None and not any(
                self._sound("meta", key, value, seal=seal) for key, value, seal in rows
            ):
                raise StoreRefused(f"{self.place} was written with another key: give that one")
            raise StoreDamaged(self._how_to_repair("its description is not what was written"))
        if names != {b"format", b"model", b"layout", b"shard", b"shards", b"dirty"}:
            raise StoreDamaged(self._how_to_repair("its description is not whole"))
        return {key.decode(): value for key, value, _ in rows}

    def _load(self) -> None:
        db = self._use()
        row = db.execute("SELECT epoch, owner, host, pid, seal FROM lease").fetchone()
        if row is None or not self._sound("lease", *row[:-1], seal=row[-1]):
            raise StoreDamaged(self._how_to_repair("its lease is not what was written"))
        self._epoch = row[0]
        self._committed = self._positions()[b""][1]
        self._seq = self._committed
        last = db.execute("SELECT seq, ticks, batch, seal FROM journal ORDER BY seq DESC LIMIT 1").fetchone()
        if last is not None:
            self._ticks_of(*last)
            self._seq = max(self._seq, last[0])
        self._deleted = self.tombstones()
        self._lost = {}
        for item, code, record, seal in db.execute("SELECT item_id, code, record, seal FROM quarantine"):
            if not self._sound("quarantine", item, code, record, seal=seal):
                raise StoreDamaged(self._how_to_repair("what was set aside is not what was written"))
            self._lost[name_text(item)] = code.decode()

    # ---- what every method stands on --------------------------------------------------------------------------------

    @property
    def _log(self) -> Path:
        return self.place.with_name(self.place.name + "-wal")

    def _use(self, *, write: bool = False) -> sqlite3.Connection:
        if self._db is None:
            raise StoreRefused(f"{self.place} is not open: open or view it first")
        if self._pid not in (0, os.getpid()):
            raise StoreRefused(
                f"{self.place} was opened in process {self._pid} and this is {os.getpid()}, forked from it: open it "
                "after the fork"
            )
        if write and not self._writer:
            raise StoreRefused(f"{self.place} is open for reading only: use open instead of view")
        if write and self._dead_end is not None:
            raise type(self._dead_end)(str(self._dead_end))
        return self._db

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise self._translated(error) from error
        except UnicodeDecodeError as error:  # a message of SQLite about damaged text
            raise StoreDamaged(self._how_to_repair("its description is not text")) from error
        except OSError as error:
            raise StoreFull(f"{self.place} cannot be written: {error.strerror}") from error

    def _translated(self, error: sqlite3.Error) -> StoreError:
        whole = getattr(error, "sqlite_errorcode", None)
        code = (whole or 0) & 0xFF
        if isinstance(error, sqlite3.ProgrammingError | sqlite3.InterfaceError) or code in (18, 25):  # TOOBIG RANGE
            return StoreRefused(f"{self.place}: {error}: SQLite takes no such value")
        if code in _FULL:
            return StoreFull(
                f"{self.place} cannot be written ({error}): make room or give the right; what was committed is intact"
            )
        if code in _FAILED:
            # after a failed sync the kernel forgets what it could not write: trying again would only seem to work
            self._dead_end = StoreFailed(f"{self.place}: {error}: check the disk and start again; nothing is retried")
            return self._dead_end
        if code in _BUSY:
            return StoreBusy(f"{self.place} is locked by another program: close what has it open")
        if code in (11, 26) or whole is None:  # CORRUPT NOTADB, or text that is none
            return StoreDamaged(self._how_to_repair(str(error)))
        return StoreError(f"{self.place}: {error}")

    def _how_to_repair(self, what: str) -> str:
        return (
            f"{self.place} is damaged ({what}): put a copy in its place, or save what can be read with "
            f"sqlite3 {self.place.name} .recover"
        )

    @contextlib.contextmanager
    def _transaction(self, *, renew: bool = False, check: bool = True) -> Iterator[sqlite3.Connection]:
        """All or nothing, and nothing if another owner has come."""
        with self._guard:
            db = self._use(write=True)
            try:
                db.execute("BEGIN IMMEDIATE")
                # a read suffices under the write lock; the row itself is written when the lease grows old
                row = db.execute("SELECT epoch FROM lease WHERE id=1").fetchone()
                if check and (row is None or row[0] != self._epoch):
                    self._dead_end = StoreFenced(
                        f"{self.place} was taken over by epoch {row and row[0]}, this owner had {self._epoch}: stop it"
                    )
                    raise self._dead_end
                until, now = self._until, time.time()
                if renew or until - now < 0.75 * self._lease or until - now > self._lease:
                    until = now + self._lease
                    db.execute("UPDATE lease SET until=? WHERE id=1", (until,))
                yield db
                db.execute("COMMIT")
                self._until = until
            except BaseException as error:
                if db.in_transaction:
                    with contextlib.suppress(sqlite3.Error):
                        db.execute("ROLLBACK")
                if isinstance(error, sqlite3.Error):
                    raise self._translated(error) from error
                raise

    def _move_log(self, how: str = "PASSIVE") -> None:
        self._unmoved = 0
        try:
            self._use(write=True).execute(f"PRAGMA wal_checkpoint({how})").fetchall()
        except sqlite3.Error as error:
            translated = self._translated(error)
            if not isinstance(translated, StoreFull | StoreBusy):  # then the log simply stays longer
                raise translated from error

    def _sound(self, table: str, *fields: Any, seal: Any) -> bool:
        if not all(isinstance(field, bytes | int) for field in fields) or not isinstance(seal, bytes):
            return False
        return hmac.compare_digest(seal_of(self._key, table, *fields), seal)

    def _put_meta(self, name: str, value: bytes) -> None:
        key = name.encode()
        assert self._db is not None
        self._db.execute(
            "INSERT OR REPLACE INTO meta VALUES(?,?,?)", (key, value, seal_of(self._key, "meta", key, value))
        )

    def _put_lease(self, owner: bytes, until: float) -> None:
        host, pid = (self._owner[1].encode(), self._owner[2]) if owner else (b"", 0)
        assert self._db is not None
        self._db.execute(
            "INSERT OR REPLACE INTO lease VALUES(1,?,?,?,?,?,?)",
            (self._epoch, owner, host, pid, until, seal_of(self._key, "lease", self._epoch, owner, host, pid)),
        )

    def _put_position(self, source: bytes, offset: bytes, seq: int) -> None:
        assert self._db is not None
        self._db.execute(
            "INSERT OR REPLACE INTO position VALUES(?,?,?,?)",
            (source, offset, seq, seal_of(self._key, "position", source, offset, seq)),
        )

    def _positions(self) -> dict[bytes, tuple[bytes, int]]:
        rows = self._use().execute("SELECT source, offset, seq, seal FROM position").fetchall()
        if not all(self._sound("position", *row[:-1], seal=row[-1]) for row in rows) or b"" not in {r[0] for r in rows}:
            raise StoreDamaged(self._how_to_repair("its offsets are not what was written"))
        return {source: (offset, seq) for source, offset, seq, _ in rows}

    def _ticks_of(self, seq: Any, ticks: Any, batch: Any, seal: Any) -> list[tuple[int, bytes]]:
        """The ticks of a row of the journal; an empty one was buried."""
        try:
            if not self._sound("journal", seq, ticks, batch, seal=seal):
                raise RecordDamaged("journal.checksum", "it is not what was written")
            parts = list(unpack_ticks(batch))
            if len(parts) != ticks:
                raise RecordDamaged("journal.truncated", "it holds another number of ticks")
        except RecordDamaged as error:
            raise StoreDamaged(
                f"{self.place}: the journal is damaged at tick {seq} ({error}): put a copy in its place, or replay the "
                f"source from tick {self._committed}"
            ) from None
        return list(enumerate(parts, seq - ticks + 1))

    # ---- state ------------------------------------------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        """Of this owner."""
        return self._epoch

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

    def tombstones(self) -> dict[str, int]:
        """Deleted series and the last tick before that."""
        return {name_text(item): seq for item, seq in self._rows("tombstone", "item_id, seq", "item_id")}

    def outbox(self) -> Iterator[tuple[bytes, bytes]]:
        """Messages that were not sent, oldest first."""
        yield from self._rows("outbox", "id, payload", "number")

    def dead_letters(self) -> Iterator[DeadLetter]:
        """Oldest first."""
        for seq, code, item, raw in self._rows("dead", "seq, code, item_id, raw", "number"):
            yield DeadLetter(name_text(code), name_text(item), raw, seq)

    def _rows(self, table: str, columns: str, order: str) -> list[tuple[Any, ...]]:
        with self._guard, self._explained():
            rows = self._use().execute(f"SELECT {columns}, seal FROM {table} ORDER BY {order}").fetchall()
        if not all(self._sound(table, *row[:-1], seal=row[-1]) for row in rows):
            raise StoreDamaged(self._how_to_repair(f"a row of {table} is not what was written"))
        return [row[:-1] for row in rows]

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
                _sync(partial)
                os.replace(partial, target)
                _sync(target.parent)
            finally:
                partial.unlink(missing_ok=True)


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
                _sync(target)
                return
    raise StoreBusy(f"{source.info().place} was written to during each of five copies: pause the writer")


def filesystem(folder: Path, mounts: Path = Path("/proc/self/mountinfo")) -> str:
    """The kind of file system that a folder lies on, empty where the system does not tell."""
    try:
        lines = mounts.read_text().splitlines()
    except OSError:
        return ""
    place, best, kind = folder.resolve(), -1, ""
    for line in lines:
        left, _, right = line.partition(" - ")
        fields = left.split()
        if len(fields) < 5 or not right:
            continue
        point = Path(re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), fields[4]))
        if place.is_relative_to(point) and len(point.parts) >= best:  # of two on one point the later one shows
            best, kind = len(point.parts), right.split()[0]
    return kind


def _locked(path: Path, *, fresh: bool = False) -> int | None:
    """A handle that holds the lock file, None if another does; `fresh` puts a new file in the place of that one's."""
    name = path.with_name(f"{path.name}.{os.getpid()}") if fresh else path
    handle = os.open(name, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if fresh:
            os.replace(name, path)
        same = os.path.samestat(os.fstat(handle), os.stat(path))
    except (BlockingIOError, FileNotFoundError):
        same = False
    except OSError:
        os.close(handle)
        raise
    if same:
        return handle
    os.close(handle)
    return None


def _unreadable(error: sqlite3.DatabaseError) -> bool:
    return (getattr(error, "sqlite_errorcode", 0) & 0xFF) in (10, 11)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


_OPEN: "weakref.WeakSet[SqliteStore]" = weakref.WeakSet()


def _leave_to_the_parent() -> None:
    """In a forked child: gives up the lock, which is the parent's. The connection is never closed there."""
    for store in _OPEN:
        if store._lock >= 0:
            os.close(store._lock)
            store._lock = -1


os.register_at_fork(after_in_child=_leave_to_the_parent)
