"""Stores: where states, journal and offsets outlive the process.

A store holds bytes and knows no model. One owner writes, others may read beside it. The promises, which the tests of
`StateStore` pin for every kind:

- what `append` or `commit` returned from is there after the failures that the durability names;
- a commit's states and offsets are there together or not at all; one that is larger than a slice is there as a prefix
  of its slices, and then its offsets, its deletions and the trim of the journal are not;
- an owner who was replaced changes nothing any more;
- a byte that is not what was written is noticed; the series it belongs to is set aside and named, the others are
  served, and no store is made anew in the place of one that was lost.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, Protocol, get_args, runtime_checkable

from tsgdn.streaming.stores.record import Key, RecordDamaged, Stamp, glance, name_bytes

Durability = Literal["normal", "full", "memory"]
SLICE = 8 << 20  # bytes of records per transaction; a larger one would keep the journal waiting
NONE: Mapping[Any, Any] = MappingProxyType({})


class StoreError(RuntimeError):
    """Something about a store, in one line that says how to mend it."""


class StoreRefused(StoreError):
    """The store is sound but not for this use: another model, layout, key, format, place; or used out of turn."""


class StoreBusy(StoreError):
    """Somebody else writes to it."""


class StoreFenced(StoreError):
    """Somebody else has taken it over: this owner writes nothing any more."""


class StoreDamaged(StoreError):
    """It is not what was written, or a part of it is missing."""


class StoreFull(StoreError):
    """There is no room, or no right, to write. What was committed before can be read; writing may be tried again."""


class StoreFailed(StoreError):
    """The disk or the server failed. What became of the last write is not known: a store of files must be opened anew;
    of one in Redis `seq` and `committed` tell after the next `renew` that gets through.
    """


class DeadLetter(NamedTuple):
    """What could not be used, for a person to look at.

    Attributes:
        code: why.
        item_id: whose it was, empty if unknown.
        raw: as it came.
        seq: tick it came with; `commit` fills in its own for 0.
    """

    code: str
    item_id: str
    raw: bytes
    seq: int = 0


class StoreInfo(NamedTuple):
    """What `tsgdn state show` tells of a store.

    Attributes:
        kind: "sqlite" or "redis".
        place: its file or address.
        version: of the library or the server.
        durability: what it was opened with.
        format: of the store.
        model: fingerprint of the model, 16 bytes.
        layout: digest of the leaves, 16 bytes.
        shard: this one.
        shards: how many there are.
        epoch: of its last owner.
        owner: its name; empty when the store was closed.
        host: where the owner runs.
        pid: of the owner.
        until: end of the owner's lease, seconds since 1970.
        committed: last tick that the states hold for certain.
        seq: last tick that is durable.
        items: series with a state.
        nbytes: of files, or of memory as far as the server tells.
        journal: ticks behind the states.
        outbox: messages not yet sent.
        dead: dead letters.
        tombstones: deleted series.
        lost: series whose record was set aside.
    """

    kind: str
    place: str
    version: str
    durability: str
    format: int
    model: bytes
    layout: bytes
    shard: int
    shards: int
    epoch: int
    owner: str
    host: str
    pid: int
    until: float
    committed: int
    seq: int
    items: int
    nbytes: int
    journal: int
    outbox: int
    dead: int
    tombstones: int
    lost: int


@runtime_checkable
class StateStore(Protocol):
    """States by series, a journal of ticks, and the place in each source, changed together.

    A tick is the caller's bytes for one call of `observe`; ticks are numbered from 1 without gaps. Methods raise
    `StoreError` and its kinds, and ValueError for arguments that can never be right.
    """

    def open(self, *, model: bytes, layout: bytes, owner: str, takeover: bool = False) -> int:
        """Becomes the one writer; makes the store if there is none.

        Args:
            model: fingerprint, 16 bytes.
            layout: digest of the leaves, 16 bytes.
            owner: a name to show to others.
            takeover: whether an owner that holds the store but whose lease has run out is replaced.

        Returns:
            The epoch, larger than that of any owner before.
        """
        ...

    def view(self) -> "StateStore":
        """Opens for reading only, whatever model the states are of, beside the writer or without one."""
        ...

    def close(self) -> None:
        """Lets go. Closing twice is harmless."""
        ...

    @property
    def epoch(self) -> int:
        """What `open` returned."""
        ...

    @property
    def durability(self) -> Durability:
        """What `append` promises; with "memory" nothing: only `commit` is there after a kill."""
        ...

    @property
    def seq(self) -> int:
        """The last tick that is durable, in the journal or in the states."""
        ...

    @property
    def committed(self) -> int:
        """The last tick that all states hold: a replay starts behind it."""
        ...

    @property
    def lost(self) -> Mapping[str, str]:
        """Series whose record was set aside, and why. They are never taken for new ones until `release`."""
        ...

    # ---- writing

    def append(self, ticks: Sequence[bytes], *, seq: int) -> None:
        """Adds ticks to the journal in one write; they are durable when it returns (not with durability "memory").

        Args:
            ticks: in their order.
            seq: number of the first one: `self.seq + 1`.
        """
        ...

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
        """Writes states and what belongs to them together.

        Args:
            records: by item, from `record.pack`. Beyond 8 MiB they go in slices, and all else goes with the last one.
            seq: the last tick that all states of the store now hold; ticks up to it leave the journal. None: no change.
            offsets: per source the place after what the states hold.
            deleted: series that go, leaving a tombstone with the number of the last tick: a replay of older ticks must
                not bring them back. Pass `seq` too, or what the journal holds of them stays until the next commit.
            outbox: messages by id, kept until `sent`.
            dead: letters.
            between: is called between slices, to let the journal go on. It may append.
        """
        ...

    def quarantine(self, item_id: str, code: str) -> None:
        """Sets a series' record aside, where `release` ends; it is in `lost` from now on."""
        ...

    def release(self, item_ids: Collection[str]) -> None:
        """Forgets that these were lost, and what was kept of them."""
        ...

    def bury(self, seq: int, code: str) -> None:
        """Makes one tick of the journal a dead letter: a replay passes over it."""
        ...

    def sent(self, ids: Collection[bytes]) -> None:
        """Removes messages from the outbox."""
        ...

    def prune(self, *, tombstones: int | None = None, dead: int | None = None) -> int:
        """Forgets tombstones and dead letters of ticks up to a number; returns how many."""
        ...

    def renew(self) -> None:
        """Prolongs the lease; every write does it too."""
        ...

    # ---- reading

    def read(self, item_ids: Collection[str]) -> dict[str, bytes]:
        """The records of those that have a sound one. The others are new, or in `lost` after this call."""
        ...

    def records(self) -> Iterator[tuple[str, bytes]]:
        """All sound records. What is committed meanwhile may or may not be among them; see `copy`."""
        ...

    def item_ids(self) -> Iterator[str]:
        """All series with a record."""
        ...

    def __len__(self) -> int:
        """How many series have a record."""
        ...

    def journal(self, since: int | None = None) -> Iterator[tuple[int, bytes]]:
        """Ticks behind a number, in order; behind `committed` if none is given. A buried one is left out."""
        ...

    def offsets(self) -> dict[str, bytes]:
        """Per source the place after what the states hold."""
        ...

    def tombstones(self) -> dict[str, int]:
        """Deleted series and the last tick before that."""
        ...

    def outbox(self) -> Iterator[tuple[bytes, bytes]]:
        """Messages by id that were not sent, oldest first."""
        ...

    def dead_letters(self) -> Iterator[DeadLetter]:
        """Oldest first."""
        ...

    def info(self) -> StoreInfo:
        """What there is."""
        ...

    def copy(self, folder: str | Path) -> None:
        """Writes all of it, as of one moment, as a store of files in a folder that has none yet."""
        ...


def open_store(
    url: str | Path,
    *,
    durability: Durability = "normal",
    key: Key = None,
    shard: int = 0,
    shards: int = 1,
    lease: int | float = 30.0,
    unchecked: bool = False,
) -> StateStore:
    """The store at an address; `open` or `view` it before use.

    Args:
        url: a folder, or redis://, rediss:// or unix:// of a Redis server.
        durability: "normal" outlives a killed process, "full" a power cut; "memory" keeps no journal.
        key: seals records so that nobody without it can change one unnoticed; up to 64 bytes.
        shard: which of them.
        shards: how many the series are spread over.
        lease: seconds without a write or `renew` after which the owner may be replaced.
        unchecked: opens in a place whose locks or whose settings could not be proven sound, and accepts a store whose
            write-ahead log is missing.

    Raises:
        StoreRefused: an address of another kind, or the package for it is not installed.
        ValueError: an argument is out of range.
    """
    text = str(url)
    if durability not in get_args(Durability):
        raise ValueError(f"durability is {durability!r}, expected one of {', '.join(get_args(Durability))}")
    if key is not None and not 16 <= len(key) <= 64:
        raise ValueError(f"the key has {len(key)} bytes, expected 16 to 64")
    if not 0 <= shard < shards:
        raise ValueError(f"shard is {shard} of {shards}, expected 0 to {shards - 1}")
    more: dict[str, Any] = {
        "durability": durability, "key": key, "shard": shard, "shards": shards, "lease": lease,
        "unchecked": unchecked,
    }  # fmt: skip
    if text.startswith(("redis://", "rediss://", "unix://")):
        try:
            from tsgdn.streaming.stores.redis import RedisStore
        except ModuleNotFoundError as error:
            if error.name != "redis":
                raise
            raise StoreRefused("a store in Redis needs the package redis: pip install 'tsgdn[redis]'") from None
        return RedisStore(text, **more)
    if "://" in text:
        kind = text.split("://")[0]
        raise StoreRefused(f"{kind}:// is no kind of store: expected a folder, redis://, rediss:// or unix://")
    from tsgdn.streaming.stores.sqlite import SqliteStore

    return SqliteStore(text, **more)


def checked_order(*, seq: int | None, committed: int, last: int, journal: bool) -> None:
    """Refuses a commit that would turn back, or that leaves out ticks of the journal.

    Raises:
        ValueError: `seq` is below what is committed, or beyond the last tick while the journal holds some.
    """
    if seq is None:
        return
    if seq < committed:
        raise ValueError(f"commit of tick {seq}, but the states hold {committed} already: numbers only grow")
    if journal and seq > last:
        raise ValueError(f"commit of tick {seq}, but the journal ends at {last}: append it first")


def checked_append(ticks: Sequence[bytes], *, seq: int, last: int) -> int:
    """The number of the last tick.

    Raises:
        ValueError: there is none, or the first is not the one after the last durable one.
    """
    if not ticks:
        raise ValueError("append got no tick: expected at least one")
    if not all(ticks):
        raise ValueError("append got an empty tick: expected bytes")
    if seq != last + 1:
        raise ValueError(f"append of tick {seq}, but the last one is {last}: expected {last + 1}")
    return seq + len(ticks) - 1


def checked_records(
    records: Mapping[str, bytes],
    *,
    model: bytes | None,
    layout: bytes | None,
    epoch: int,
    keyed: bool,
    tombstones: Mapping[str, int],
) -> dict[str, Stamp]:
    """The stamps of records that may be written.

    Raises:
        StoreRefused: one is of another model, layout or owner, is sealed otherwise, is another item's, or is older than
            the deletion of its series.
    """
    stamps: dict[str, Stamp] = {}
    for item, data in records.items():
        try:
            stamp = stamps[item] = glance(data)
        except RecordDamaged as error:
            raise StoreRefused(f"the record of {item[:80]!r} cannot be stored: {error}") from None
        wrong = (
            "another model" if stamp.model != model
            else "another layout" if stamp.layout != layout
            else f"epoch {stamp.epoch}, this owner has {epoch}" if stamp.epoch != epoch
            else "another kind of seal: give pack the key of the store" if stamp.keyed != keyed
            else "another item" if stamp.item != name_bytes(item)
            else f"tick {stamp.seq}, and the series was deleted at {tombstones[item]}"
            if stamp.seq <= tombstones.get(item, -1)
            else None
        )  # fmt: skip
        if wrong:
            raise StoreRefused(f"the record of {item[:80]!r} cannot be stored: it is of {wrong}")
    return stamps


def checked_names(offsets: Mapping[str, bytes], deleted: Collection[str], records: Mapping[str, bytes]) -> None:
    """Refuses names that a commit cannot mean.

    Raises:
        ValueError: a source without a name, or a series that is both written and deleted.
    """
    if "" in offsets:
        raise ValueError("an offset has a source without a name: give it one")
    both = [item for item in deleted if item in records]
    if both:
        raise ValueError(f"{both[0][:80]!r} is both written and deleted: choose one")


def slices(records: Iterable[tuple[str, bytes]], size: int = SLICE) -> Iterator[list[tuple[str, bytes]]]:
    """Records in runs of at most `size` bytes; a larger one goes alone."""
    run: list[tuple[str, bytes]] = []
    filled = 0
    for item, data in records:
        if run and filled + len(data) > size:
            yield run
            run, filled = [], 0
        run.append((item, data))
        filled += len(data)
    yield run
