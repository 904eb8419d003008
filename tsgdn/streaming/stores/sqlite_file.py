"""States in a folder: one SQLite file per shard, from the standard library.

Who may write is settled three times over. The operating system's lock keeps a second process out; the epoch in the
lease keeps an owner out that slept while another took over, since every transaction asks for it before it changes
anything; and only the one writing connection moves the write-ahead log into the file, because SQLite before 3.51.3 can
lose a page when two connections do so at once.

Blobs keep what SQLite itself does not check: records carry a seal, rows of the other tables have one beside them.
"""

import contextlib
import ctypes
import hmac
import os
import platform
import sqlite3
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from tsgdn.streaming.stores import (
    Durability,
    StoreBusy,
    StoreDamaged,
    StoreError,
    StoreFailed,
    StoreFenced,
    StoreFull,
    StoreRefused,
)
from tsgdn.streaming.stores.disk import REMOTE, filesystem, locked, sync
from tsgdn.streaming.stores.record import Key, RecordDamaged, name_text, seal_of, unpack_ticks

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

_FULL, _FAILED, _BUSY = (3, 8, 13, 14), (10,), (5, 6)  # PERM READONLY FULL CANTOPEN; IOERR; BUSY LOCKED

Own = TypeVar("Own", bound="SqliteFile")


class SqliteFile:
    """The file of a store: opening it, the right to write it, transactions, seals; see `open_store` for the arguments.

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
        self._durability: Durability = durability
        self._key, self._lease, self._unchecked = key, float(lease), unchecked
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

    def view(self: Own) -> Own:
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
            handle = locked(path)
            if handle is None:
                text = path.read_text(errors="replace").strip().split("\n")
                owner, host, pid = (*text, "?", "?", "?")[:3]
                who = f"{self.place} is in use by process {pid} on {host} ({owner})"
                if not takeover:
                    raise StoreBusy(f"{who}: stop it, or give another folder")
                until = self._lease_end()
                if until > time.time():
                    raise StoreBusy(f"{who}, whose lease runs for {until - time.time():.0f} s more: try again then")
                handle = locked(path, fresh=True)
                if handle is None:
                    raise StoreBusy(f"{self.place} is being taken over by another process: leave it to that one")
            self._lock = handle
            if not self._unchecked and locked(path) is not None:
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
        sync(partial)
        os.replace(partial, self.place)
        sync(self._folder)

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

    def tombstones(self) -> dict[str, int]:
        """Deleted series and the last tick before that."""
        return {name_text(item): seq for item, seq in self._rows("tombstone", "item_id, seq", "item_id")}

    def _rows(self, table: str, columns: str, order: str) -> list[tuple[Any, ...]]:
        with self._guard, self._explained():
            rows = self._use().execute(f"SELECT {columns}, seal FROM {table} ORDER BY {order}").fetchall()
        if not all(self._sound(table, *row[:-1], seal=row[-1]) for row in rows):
            raise StoreDamaged(self._how_to_repair(f"a row of {table} is not what was written"))
        return [row[:-1] for row in rows]


_OPEN: "weakref.WeakSet[SqliteFile]" = weakref.WeakSet()


def _leave_to_the_parent() -> None:
    """In a forked child: gives up the lock, which is the parent's. The connection is never closed there."""
    for store in _OPEN:
        if store._lock >= 0:
            os.close(store._lock)
            store._lock = -1


os.register_at_fork(after_in_child=_leave_to_the_parent)
