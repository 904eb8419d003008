"""States in a Redis server: one hash tag per shard, so that a shard's keys lie on one node and change together.

    tsgdn:{07}:meta       what the store is; `now`: epoch, committed, last and a count of writes, sealed
    tsgdn:{07}:state      item -> record           tsgdn:{07}:item       the names, to notice a lost record
    tsgdn:{07}:journal    a stream, id = tick      tsgdn:{07}:position   source -> offset
    tsgdn:{07}:tombstone  item -> tick             tsgdn:{07}:lost       item -> why it was set aside
    tsgdn:{07}:kept       item -> its record       tsgdn:{07}:outbox, tsgdn:{07}:dead

Every write watches `meta`, asks whether `now` is what this owner wrote last, and changes it in the same transaction. So
another owner is noticed, so is a server that has lost writes, and after a broken connection `now` tells whether the
transaction was carried out.
"""

import contextlib
import hmac
import os
import platform
import struct
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from tsgdn.streaming.stores import (
    NONE,
    DeadLetter,
    Durability,
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
    check,
    name_bytes,
    name_text,
    pack_ticks,
    seal_of,
    unpack_ticks,
)

FORMAT = 1
ATTEMPTS = 4  # of a write whose connection broke, 0.1 s apart and longer each time
_NOW = struct.Struct("<QQQQ")  # epoch, committed, last, writes
_FIXED = ("format", "model", "layout", "shard", "shards")


class RedisStore:
    """A `StateStore` in Redis; see `open_store` for the arguments.

    Args:
        url: redis://, rediss:// or unix://.
        durability: "full" asks for a server with appendfsync always; with "normal" a server that crashes may lose about
            a second, which is noticed.
        key: as in `open_store`, like those that follow.
        client: instead of one made from the address.

    Attributes:
        also: called with the pipeline of a commit's last transaction, to acknowledge messages in it.
    """

    def __init__(
        self,
        url: str,
        *,
        durability: Durability = "normal",
        key: Key = None,
        shard: int = 0,
        shards: int = 1,
        lease: int | float = 30.0,
        unchecked: bool = False,
        client: Any = None,
    ) -> None:
        # no retry below us: a transaction sent twice would be carried out twice
        self._client: Any = client or redis.Redis.from_url(
            url, retry=Retry(NoBackoff(), 0), socket_timeout=30, socket_connect_timeout=5
        )
        address = url.split("@")[-1] if "@" in url else url.split("://")[-1]  # without a password
        self.place = f"{url.split('://')[0]}://{address.split('?')[0]} shard {shard:02d}"
        self._durability: Durability = durability
        self._key, self._lease, self._unchecked = key, float(lease), unchecked
        self._shard, self._shards = shard, shards
        self._guard = threading.RLock()
        self._pid = 0
        self._writer = False
        self._dead_end: StoreError | None = None
        self._now = self._unsure = b""
        self._epoch = self._seq = self._committed = self._writes = 0
        self._model = self._layout = b""
        self._owner = ("", "", 0)
        self._lost: dict[str, str] = {}
        self._deleted: dict[str, int] = {}
        self.also: Callable[[Any], None] | None = None

    def _at(self, name: str) -> str:
        return f"tsgdn:{{{self._shard:02d}}}:{name}"

    # ---- opening and closing ----------------------------------------------------------------------------------------

    def open(self, *, model: bytes, layout: bytes, owner: str, takeover: bool = False) -> int:
        """Becomes the one writer; see `StateStore.open`. A lease that has run out is taken over in any case.

        Raises:
            StoreBusy: another owner holds the lease.
            StoreRefused: of another model, layout, number of shards, key or format, or the server may evict keys.
            StoreDamaged: it is not what was written.
        """
        if len(model) != 16 or len(layout) != 16:
            raise ValueError(f"model and layout have {len(model)} and {len(layout)} bytes, expected 16 each")
        if self._pid:
            raise StoreRefused(f"{self.place} is open already: close it first")
        self._owner = (owner.encode("utf-8", "replace").decode(), platform.node(), os.getpid())
        with self._explained():
            self._check_settings()
            for _ in range(ATTEMPTS):
                try:
                    self._take_lease(model, layout)
                    break
                except redis.WatchError:
                    continue
            else:
                raise StoreBusy(f"{self.place} is being opened by another process: leave it to that one")
        self._pid, self._writer, self._dead_end = os.getpid(), True, None
        try:
            self._load()
        except BaseException:
            self.close()
            raise
        return self._epoch

    def _take_lease(self, model: bytes, layout: bytes) -> None:
        with self._client.pipeline(transaction=True) as pipe:
            pipe.watch(self._at("meta"))
            meta = pipe.hgetall(self._at("meta"))
            seconds, micros = pipe.time()
            clock = seconds + micros / 1e6
            if not meta:
                names = ("state", "item", "journal", "position", "tombstone", "lost", "kept", "outbox", "dead")
                left = [name for name in names if pipe.exists(self._at(name))]
                if left:
                    raise StoreDamaged(
                        f"{self.place} has lost its description but not its {left[0]}: restore the server from a copy, "
                        f"or delete {self._at('*')} to start anew"
                    )
                self._epoch = self._committed = self._seq = self._writes = 0
            else:
                self._examine(meta)
                for name, own, wish in (
                    ("model", model, "load that model, or warm this one up in another database"),
                    ("layout", layout, "use the version and settings that wrote it, or warm up in another database"),
                    ("shards", b"%d" % self._shards, "give that number, or reshard"),
                ):
                    if meta[name.encode()] != own:
                        there, mine = (
                            (x.hex() if len(x) == 16 else x.decode(errors="replace"))
                            for x in (meta[name.encode()], own)
                        )
                        raise StoreRefused(f"{self.place} holds states of {name} {there}, this is {mine}: {wish}")
                self._adopt(meta[b"now"])
                owner, host, pid = (meta[name].decode() for name in (b"owner", b"host", b"pid"))
                until = float(meta[b"until"])
                if owner and until > clock and not (host == self._owner[1] and not _alive(int(pid))):
                    raise StoreBusy(
                        f"{self.place} is in use by process {pid} on {host} ({owner}), whose lease runs for "
                        f"{until - clock:.0f} s more: stop it, or try again then"
                    )
            self._epoch += 1
            now = self._packed(self._committed, self._seq)
            fixed = {
                "format": b"%d" % FORMAT, "model": model, "layout": layout, "shard": b"%d" % self._shard,
                "shards": b"%d" % self._shards,
            }  # fmt: skip
            owner, host, pid = self._owner
            pipe.multi()
            pipe.hset(
                self._at("meta"),
                mapping={
                    **fixed, "seal": seal_of(self._key, "meta", *fixed.values()), "now": now, "owner": owner,
                    "host": host, "pid": pid, "until": repr(clock + self._lease),
                },
            )  # fmt: skip
            pipe.execute()
            self._now, self._unsure = now, b""
            self._model, self._layout = model, layout

    def view(self) -> "RedisStore":
        """Opens for reading only; see `StateStore.view`.

        Raises:
            StoreRefused: there is none, or it needs another key.
            StoreDamaged: it is not what was written.
        """
        if self._pid:
            raise StoreRefused(f"{self.place} is open already: close it first")
        with self._explained():
            meta = self._client.hgetall(self._at("meta"))
            if not meta:
                raise StoreRefused(f"there is no store at {self.place}: give the address of one")
            self._examine(meta)
            self._model, self._layout = meta[b"model"], meta[b"layout"]
            self._adopt(meta[b"now"])
            self._pid, self._writer = os.getpid(), False
        try:
            self._load()
        except BaseException:
            self.close()
            raise
        return self

    def close(self) -> None:
        """Ends the lease, if it is still ours, and lets go."""
        with self._guard:
            if self._pid != os.getpid():
                return
            if self._writer and self._dead_end is None:
                with contextlib.suppress(StoreError):
                    self._transact(lambda pipe: pipe.hset(self._at("meta"), "owner", ""))
            self._client.close()
            self._pid, self._writer = 0, False

    def _check_settings(self) -> None:
        if self._unchecked:
            return
        policy = self._setting("maxmemory-policy", "memory", "maxmemory_policy")
        if policy != "noeviction":
            raise StoreRefused(
                f"{self.place} has maxmemory-policy {policy or 'unknown'}, under which states may go: set noeviction"
            )
        if self._durability == "full":
            sync = self._setting("appendfsync", "", "") if self._setting("appendonly", "", "") == "yes" else "no file"
            if sync != "always":
                raise StoreRefused(
                    f"{self.place} has appendfsync {sync or 'unknown'}, durability 'full' needs appendonly yes and "
                    "appendfsync always: set them, or use 'normal'"
                )

    def _setting(self, name: str, section: str, field: str) -> str:
        with contextlib.suppress(redis.ResponseError):
            if section and (value := self._client.info(section).get(field)):
                return str(value)
        with contextlib.suppress(redis.ResponseError):
            found = {_text(key): _text(value) for key, value in self._client.config_get(name).items()}
            return found.get(name, "")
        return ""

    def _examine(self, meta: Mapping[bytes, bytes]) -> None:
        wanted = {*_FIXED, "seal", "now", "owner", "host", "pid", "until"}
        if {_text(name) for name in meta} != wanted:
            raise StoreDamaged(f"{self.place}: its description is not whole: restore the server from a copy")
        keyed = len(meta[b"seal"]) == 16
        if keyed != (self._key is not None):
            raise StoreRefused(
                f"{self.place} was written {'with' if keyed else 'without'} a key: give {'it' if keyed else 'none'}"
            )
        fixed = [meta[name.encode()] for name in _FIXED]
        if not self._sound("meta", *fixed, seal=meta[b"seal"]):
            what = "with another key, or is damaged: give that key" if keyed else "otherwise: restore it from a copy"
            raise (StoreRefused if keyed else StoreDamaged)(f"{self.place} was written {what}")
        version = int(meta[b"format"])
        if version > FORMAT:
            raise StoreRefused(f"{self.place} has format {version}, this version reads up to {FORMAT}: upgrade tsgdn")

    def _load(self) -> None:
        """Reads what must be known at hand, and compares what must agree."""
        with self._guard, self._explained():
            self._lost = {
                name_text(item): name_text(self._opened("lost", item, value)[0])
                for item, value in self._client.hgetall(self._at("lost")).items()
            }
            self._deleted = self.tombstones()
            self.offsets()
            last = self._client.xrevrange(self._at("journal"), count=1)
            there = int(last[0][0].split(b"-")[0]) if last else self._committed
            if there < self._seq and self._durability != "memory":
                raise StoreDamaged(
                    f"{self.place}: the journal ends at tick {there}, {self._seq} was durable: restore the server "
                    f"from a copy, or replay the source from tick {self._committed}"
                )
            records, names = self._client.hlen(self._at("state")), self._client.scard(self._at("item"))
            if records < names:
                for chunk in _chunks(sorted(self._client.smembers(self._at("item"))), 1024):
                    for name, record in zip(chunk, self._client.hmget(self._at("state"), chunk), strict=True):
                        if record is None:
                            self._set_aside(name_text(name), "state.missing")
            elif records > names:
                raise StoreDamaged(
                    f"{self.place} holds {records} records and {names} names: restore the server from a copy"
                )

    # ---- what every method stands on --------------------------------------------------------------------------------

    def _use(self, *, write: bool = False) -> Any:
        if not self._pid:
            raise StoreRefused(f"{self.place} is not open: open or view it first")
        if self._pid != os.getpid():
            raise StoreRefused(
                f"{self.place} was opened in process {self._pid} and this is {os.getpid()}, forked from it: open it "
                "after the fork"
            )
        if write and not self._writer:
            raise StoreRefused(f"{self.place} is open for reading only: use open instead of view")
        if write and self._dead_end is not None:
            raise type(self._dead_end)(str(self._dead_end))
        return self._client

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except redis.WatchError:
            raise
        except redis.AuthenticationError as error:
            raise StoreRefused(f"{self.place} lets nobody in with this name and password: {error}") from error
        except (redis.ConnectionError, redis.TimeoutError, OSError) as error:
            raise StoreFailed(f"{self.place} does not answer ({error}): see to the server and try again") from error
        except redis.RedisError as error:
            text = str(error)
            if isinstance(error, redis.OutOfMemoryError) or "OOM" in text or "MISCONF" in text:
                raise StoreFull(
                    f"{self.place} takes no more ({text}): give the server room; what was committed is intact"
                ) from error
            raise StoreFailed(f"{self.place} refuses: {text}") from error

    def _transact(
        self, fill: Callable[[Any], Any] | None, *, committed: int | None = None, last: int | None = None
    ) -> None:
        """Carries out commands together with a new `now`: all of them once, or none."""
        with self._guard:
            client = self._use(write=True)
            if self._unsure:
                with self._explained():
                    self._settle(client.hget(self._at("meta"), "now"))
            self._writes += 1
            committed = self._committed if committed is None else committed
            last = self._seq if last is None else last
            kept = self._durability != "memory"  # else ticks are no more durable than the states
            new = self._packed(committed, last if kept else committed)
            for attempt in range(ATTEMPTS):
                try:
                    with client.pipeline(transaction=True) as pipe:
                        pipe.watch(self._at("meta"))
                        there = pipe.hget(self._at("meta"), "now")
                        if there == new:  # an attempt before has got through
                            break
                        self._check_owner(there)
                        seconds, micros = pipe.time()
                        pipe.multi()
                        if fill is not None:
                            fill(pipe)
                        until = repr(seconds + micros / 1e6 + self._lease)
                        pipe.hset(self._at("meta"), mapping={"now": new, "until": until})
                        self._unsure = new
                        pipe.execute()
                        break
                except (redis.ConnectionError, redis.TimeoutError, redis.WatchError) as error:
                    if attempt + 1 == ATTEMPTS:
                        with self._explained():
                            raise redis.ConnectionError(str(error)) from error
                    time.sleep(0.1 * 2**attempt)
                except redis.RedisError:
                    self._unsure = b""  # it was refused as a whole
                    with self._explained():
                        raise
            self._adopt(new)
            self._seq = last

    def _check_owner(self, there: bytes | None) -> None:
        if there == self._now:
            return
        try:
            epoch, committed, last, _ = self._unpacked(there)
        except StoreDamaged as error:
            self._dead_end = error
            raise
        if epoch > self._epoch:
            self._dead_end = StoreFenced(
                f"{self.place} was taken over by epoch {epoch}, this owner had {self._epoch}: stop it"
            )
        else:
            self._dead_end = StoreDamaged(
                f"{self.place} has lost writes: it holds tick {max(committed, last)}, {self._seq} was durable: open it "
                "again and push the states or replay the source from there"
            )
        raise self._dead_end

    def _settle(self, there: bytes | None) -> None:
        """Finds out what became of a write whose answer did not come."""
        if there == self._unsure:
            self._adopt(self._unsure)
        else:
            self._unsure = b""
            self._check_owner(there)

    def _packed(self, committed: int, last: int) -> bytes:
        body = _NOW.pack(self._epoch, committed, last, self._writes)
        return body + seal_of(self._key, "now", body)

    def _unpacked(self, there: bytes | None) -> tuple[int, int, int, int]:
        body = b"" if there is None else there[: _NOW.size]
        if there is None or len(body) < _NOW.size or not self._sound("now", body, seal=there[_NOW.size :]):
            raise StoreDamaged(f"{self.place}: its counters are not what was written: restore the server from a copy")
        return _NOW.unpack(body)

    def _adopt(self, now: bytes) -> None:
        self._epoch, self._committed, self._seq, self._writes = self._unpacked(now)
        self._now, self._unsure = now, b""

    def _sound(self, *fields: Any, seal: bytes) -> bool:
        return hmac.compare_digest(seal_of(self._key, *fields), seal)

    def _closed(self, table: str, name: bytes, *fields: bytes) -> bytes:
        """Fields of a row in one value, sealed under its name."""
        body = pack_ticks(fields)
        return seal_of(self._key, table, name, body) + body

    def _opened(self, table: str, name: bytes, value: bytes) -> list[bytes]:
        size = 4 if self._key is None else 16
        if not self._sound(table, name, value[size:], seal=value[:size]):
            raise StoreDamaged(
                f"{self.place}: an entry of {self._at(table)} is not what was written: restore the server from a copy"
            )
        return list(unpack_ticks(value[size:]))

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
            self._seq = last
            return
        value = self._closed("journal", b"%d" % last, *ticks)
        self._transact(
            lambda pipe: pipe.xadd(self._at("journal"), {"ticks": value}, id=f"{last}-0"),
            last=last,
        )

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
        stamps = checked_records(
            records, model=self._model, layout=self._layout, epoch=self._epoch, keyed=self._key is not None,
            tombstones=self._deleted,
        )  # fmt: skip

        def write(pipe: Any, part: list[tuple[str, bytes]]) -> None:
            names = [stamps[item].item for item, _ in part]
            if names:
                pipe.hset(self._at("state"), mapping=dict(zip(names, (data for _, data in part), strict=True)))
                pipe.sadd(self._at("item"), *names)
                if self._deleted:
                    pipe.hdel(self._at("tombstone"), *names)

        parts = slices(records.items())
        part = next(parts)
        for following in parts:
            self._transact(lambda pipe, part=part: write(pipe, part))
            for item, _ in part:
                self._deleted.pop(item, None)
            if between is not None:
                between()
            part = following
        last = self._seq if seq is None else max(self._seq, seq)
        names = {name_bytes(item) for item in deleted}
        with self._explained():
            letters = self._client.lrange(self._at("dead"), 0, -1) if names else []
        theirs = [letter for letter in letters if self._opened("dead", b"", letter)[2] in names]

        def finish(pipe: Any) -> None:
            write(pipe, part)
            for source, offset in offsets.items():
                name = name_bytes(source)
                pipe.hset(self._at("position"), name, self._closed("position", name, offset))
            for name in names:
                for table in ("state", "lost", "kept"):
                    pipe.hdel(self._at(table), name)
                pipe.srem(self._at("item"), name)
                pipe.hset(self._at("tombstone"), name, self._closed("tombstone", name, b"%d" % last))
            for letter in theirs:
                pipe.lrem(self._at("dead"), 1, letter)
            for place, (number, payload) in enumerate(outbox.items()):
                order = b"%d" % (self._writes << 24 | place)
                pipe.hset(self._at("outbox"), number, self._closed("outbox", number, order, payload))
            for letter in dead:
                pipe.rpush(self._at("dead"), self._letter(letter if letter.seq else letter._replace(seq=last)))
            if seq is not None:
                pipe.xtrim(self._at("journal"), minid=f"{seq + 1}-0", approximate=False)
            if self.also is not None:
                self.also(pipe)

        self._transact(finish, committed=seq, last=last)
        for item, _ in part:
            self._deleted.pop(item, None)
        for item in deleted:
            self._lost.pop(item, None)
            self._deleted[item] = last

    def _letter(self, letter: DeadLetter) -> bytes:
        fields = (b"%d" % letter.seq, name_bytes(letter.code), name_bytes(letter.item_id), letter.raw)
        return self._closed("dead", b"", *fields)

    def quarantine(self, item_id: str, code: str) -> None:
        """Sets a record aside; see `StateStore.quarantine`."""
        name = name_bytes(item_id)
        with self._explained():
            record = self._use(write=True).hget(self._at("state"), name)

        def fill(pipe: Any) -> None:
            if record is not None:
                pipe.hset(self._at("kept"), name, record)
            pipe.hset(self._at("lost"), name, self._closed("lost", name, name_bytes(code)))
            pipe.hdel(self._at("state"), name)
            pipe.srem(self._at("item"), name)

        self._transact(fill)
        self._lost[item_id] = code

    def release(self, item_ids: Collection[str]) -> None:
        """Forgets that these were lost; see `StateStore.release`."""
        names = [name_bytes(item) for item in item_ids]
        if names:
            self._transact(lambda pipe: [pipe.hdel(self._at(table), *names) for table in ("lost", "kept")])
        for item in item_ids:
            self._lost.pop(item, None)

    def bury(self, seq: int, code: str) -> None:
        """Makes one tick a dead letter; see `StateStore.bury`."""
        with self._explained():
            rows = self._use(write=True).xrange(self._at("journal"), min=f"{seq}-0")
        kept = [(name, self._ticks_of(name, fields)) for name, fields in rows]
        raw = dict(kept[0][1]).get(seq) if kept else None
        if raw is None:
            raise ValueError(f"the journal holds no tick {seq}: expected {self._committed + 1} to {self._seq}")

        def fill(pipe: Any) -> None:
            # a stream takes no change in the middle: what follows is written again behind it, under the same numbers
            pipe.delete(self._at("journal"))
            for name, ticks in before + kept:
                body = [b"" if number == seq else tick for number, tick in ticks]
                pipe.xadd(
                    self._at("journal"),
                    {"ticks": self._closed("journal", name.split(b"-")[0], *body)},
                    id=name.decode(),
                )
            pipe.rpush(self._at("dead"), self._letter(DeadLetter(code, "", raw, seq)))

        with self._explained():
            rows = self._client.xrange(self._at("journal"), max=f"({kept[0][0].decode()}")
        before = [(name, self._ticks_of(name, fields)) for name, fields in rows]
        self._transact(fill)

    def sent(self, ids: Collection[bytes]) -> None:
        """Removes messages from the outbox."""
        if ids:
            self._transact(lambda pipe: pipe.hdel(self._at("outbox"), *ids))

    def prune(self, *, tombstones: int | None = None, dead: int | None = None) -> int:
        """Forgets tombstones and dead letters of ticks up to a number; see `StateStore.prune`."""
        old = [item for item, seq in self._deleted.items() if tombstones is not None and seq <= tombstones]
        with self._explained():
            letters = self._use(write=True).lrange(self._at("dead"), 0, -1) if dead is not None else []
        read = [letter for letter in letters if int(self._opened("dead", b"", letter)[0]) <= (dead or 0)]

        def fill(pipe: Any) -> None:
            for item in old:
                pipe.hdel(self._at("tombstone"), name_bytes(item))
            for letter in read:
                pipe.lrem(self._at("dead"), 1, letter)

        self._transact(fill)
        for item in old:
            del self._deleted[item]
        return len(old) + len(read)

    def renew(self) -> None:
        """Prolongs the lease; after `StoreFailed` it also finds out what became of the last write."""
        self._transact(None)

    # ---- reading ----------------------------------------------------------------------------------------------------

    def read(self, item_ids: Collection[str]) -> dict[str, bytes]:
        """The sound records of these; see `StateStore.read`."""
        self._use()
        found: dict[str, bytes] = {}
        for chunk in _chunks(list(item_ids), 64):
            names = [name_bytes(item) for item in chunk]
            with self._guard, self._explained():
                records = self._client.hmget(self._at("state"), names)
                missing = [name for name, record in zip(names, records, strict=True) if record is None]
                known = self._client.smismember(self._at("item"), missing) if missing else []
            gone = {name for name, is_known in zip(missing, known, strict=True) if is_known}
            for item, name, record in zip(chunk, names, records, strict=True):
                if record is not None:
                    code = self._fault(item, record)
                    if code is None:
                        found[item] = record
                    else:
                        self._set_aside(item, code)
                elif name in gone:
                    self._set_aside(item, "state.missing")
        return found

    def _fault(self, item: str, record: bytes) -> str | None:
        try:
            stamp = check(record, key=self._key, item_id=item)
        except RecordDamaged as error:
            return error.code
        return None if (stamp.model, stamp.layout) == (self._model, self._layout) else "state.model"

    def _set_aside(self, item: str, code: str) -> None:
        if self._writer:
            self.quarantine(item, code)
        self._lost[item] = code

    def records(self) -> Iterator[tuple[str, bytes]]:
        """All sound records; see `StateStore.records`."""
        for chunk in _chunks(list(self.item_ids()), 64):
            yield from self.read(chunk).items()

    def item_ids(self) -> Iterator[str]:
        """All series with a record."""
        with self._guard, self._explained():
            names = self._use().hkeys(self._at("state"))
        yield from map(name_text, names)

    def __len__(self) -> int:
        with self._guard, self._explained():
            return self._use().hlen(self._at("state"))

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
                rows = self._use().xrange(self._at("journal"), min=f"{since + 1}-0", count=16)
            if not rows and since < self._seq and self._durability != "memory" and self._writer:
                raise StoreDamaged(f"{self.place}: the journal ends at tick {since}, not {self._seq}: restore a copy")
            for name, fields in rows:
                ticks = self._ticks_of(name, fields)
                if ticks[0][0] > since + 1 and self._writer:  # from a reader the writer may take them away meanwhile
                    raise StoreDamaged(f"{self.place}: tick {since + 1} of the journal is missing: restore a copy")
                yield from ((seq, tick) for seq, tick in ticks if seq > since and tick)
                since = ticks[-1][0]
            if not rows:
                return

    def _ticks_of(self, name: bytes, fields: Mapping[bytes, bytes]) -> list[tuple[int, bytes]]:
        last = name.split(b"-")[0]
        ticks = self._opened("journal", last, fields.get(b"ticks", b""))
        return list(enumerate(ticks, int(last) - len(ticks) + 1))

    def offsets(self) -> dict[str, bytes]:
        """Per source the place after what the states hold."""
        return {item: fields[0] for item, fields in self._table("position").items()}

    def tombstones(self) -> dict[str, int]:
        """Deleted series and the last tick before that."""
        return {item: int(fields[0]) for item, fields in self._table("tombstone").items()}

    def _table(self, table: str) -> dict[str, list[bytes]]:
        with self._guard, self._explained():
            rows = self._use().hgetall(self._at(table))
        return {name_text(name): self._opened(table, name, value) for name, value in rows.items()}

    def outbox(self) -> Iterator[tuple[bytes, bytes]]:
        """Messages that were not sent, oldest first."""
        with self._guard, self._explained():
            rows = self._use().hgetall(self._at("outbox"))
        messages = [(number, *self._opened("outbox", number, value)) for number, value in rows.items()]
        for number, _, payload in sorted(messages, key=lambda message: int(message[1])):
            yield number, payload

    def dead_letters(self) -> Iterator[DeadLetter]:
        """Oldest first."""
        with self._guard, self._explained():
            letters = self._use().lrange(self._at("dead"), 0, -1)
        for letter in letters:
            seq, code, item, raw = self._opened("dead", b"", letter)
            yield DeadLetter(name_text(code), name_text(item), raw, int(seq))

    def info(self) -> StoreInfo:
        """What there is."""
        with self._guard, self._explained():
            client = self._use()
            meta = client.hgetall(self._at("meta"))
            self._examine(meta)
            epoch, committed, last, _ = self._unpacked(meta[b"now"])
            version, nbytes = "", 0
            with contextlib.suppress(redis.ResponseError):
                version = str(client.info("server").get("redis_version", ""))
                nbytes = sum(client.memory_usage(self._at(name)) or 0 for name in ("state", "journal", "item"))
            sizes = [client.hlen(self._at(name)) for name in ("state", "outbox", "tombstone", "lost")]
            return StoreInfo(
                "redis", self.place, version, self._durability, int(meta[b"format"]), meta[b"model"], meta[b"layout"],
                int(meta[b"shard"]), int(meta[b"shards"]), epoch, meta[b"owner"].decode(), meta[b"host"].decode(),
                int(meta[b"pid"]), float(meta[b"until"]), committed, last, sizes[0], nbytes, last - committed, sizes[1],
                client.llen(self._at("dead")), sizes[2], sizes[3],
            )  # fmt: skip

    def copy(self, folder: str | Path) -> None:
        """Writes all of it, as of one moment, as a store of files in a folder that has none yet.

        Raises:
            StoreRefused: there is one.
            StoreBusy: the writer never paused for long enough.
        """
        from tsgdn.streaming.stores.sqlite_copy import copy_of

        with self._explained():
            copy_of(
                self, folder, key=self._key, shard=self._shard, shards=self._shards,
                moment=lambda: self._client.hget(self._at("meta"), "now"),
            )  # fmt: skip


def _chunks(items: list[Any], size: int) -> Iterator[list[Any]]:
    for begin in range(0, len(items), size):
        yield items[begin : begin + size]


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True
