"""A predictor whose states outlive the process.

    tick -> the predictor takes it in -> the journal holds it -> `observe` returns -> forecasts may be sent
    checkpoint: states of all series that moved, the number of the last tick and the place in each source, together

What `observe` returned from is there after a kill: the states of the last checkpoint, and behind them the journal,
which is replayed tick by tick. Each record carries the number of the last tick that it holds, so a tick counts once per
series wherever a checkpoint was cut off. A replay calls the predictor with the ticks as they were, so the states after
it are those of an uninterrupted run bit by bit; after a checkpoint that was cut off in the middle a tick may meet fewer
series than before, and then that takes a predictor whose results do not depend on neighbours (`exact`).

Where there is room for `max_series` only (`on_full="evict"`), the others lie in the store. What is evicted is packed at
once with the number of the last tick it holds, and written before that tick leaves the journal; a later row or forecast
brings it back bit by bit.
"""

import contextlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tsgdn.data.clock import show
from tsgdn.data.series import Series
from tsgdn.streaming import gather
from tsgdn.streaming.predictor import StatefulPredictor
from tsgdn.streaming.resident import settle
from tsgdn.streaming.rows import Rejection, Rows, read_rows
from tsgdn.streaming.state_records import layout, records_of, restore
from tsgdn.streaming.stores import SLICE, StateStore, StoreDamaged, StoreError, StoreRefused
from tsgdn.streaming.stores.record import Key, Record, glance, unpack
from tsgdn.streaming.stores.shards import REGISTERED
from tsgdn.streaming.ticks import Tick, by_series, packed, unpacked, without
from tsgdn.streaming.verdicts import ObserveReport
from tsgdn.types import ForecastBatch

PER_COMMIT = 4096  # series whose records are made at once, fewer where they are large
MADE_AT_ONCE = 64 << 20  # bytes


class Recovery(NamedTuple):
    """What was found on opening.

    Attributes:
        series: restored from records; those for which there is no room stay in the store.
        ticks: replayed from the journal.
        lost: series whose record is damaged, and why; they are not served until released.
        last: the series of the last tick: its forecasts may not have been sent.
        offset: place to go on from in the source that was named; None = from its start.
        offsets: the same of every source.
        place: (source, offset) of the last tick that was replayed, which `last` belongs to; None without one.
        report: what became of its rows.
    """

    series: int
    ticks: int
    lost: dict[str, str]
    last: tuple[str, ...]
    offset: bytes | None
    offsets: dict[str, bytes]
    place: tuple[str, bytes] | None = None
    report: ObserveReport | None = None


class _Lost(Exception):
    pass  # a series that was to be brought back has no sound record


class DurablePredictor:
    """Keeps a `StatefulPredictor` and a store in step; one owner per store.

    What changes states goes through this class, or a kill takes it back.

    Args:
        predictor: empty; is filled from the store and belongs to it from now on.
        store: not yet opened.
        owner: a name to show to others.
        source: name of the source whose offsets come with the ticks that name none.
        key: of the seals, as the store was given.
        checkpoint_every: seconds between checkpoints, at least; a checkpoint also waits for ten times its own duration.
            Infinite: only the caller makes them, see `due`.
        takeover: replace an owner whose lease has run out.
        progress: is called with the ticks replayed so far.

    Attributes:
        recovery: what was found.

    Raises:
        ValueError: the predictor holds states already.
        StoreError: the store is in use, damaged, or of another model.
    """

    def __init__(
        self,
        predictor: StatefulPredictor,
        store: StateStore,
        *,
        owner: str = "tsgdn",
        source: str = "rows",
        key: Key = None,
        checkpoint_every: int | float = 60.0,
        takeover: bool = False,
        progress: Callable[[int], object] | None = None,
    ) -> None:
        if len(predictor):
            raise ValueError(f"the predictor holds {len(predictor)} series already; give an empty one")
        self.predictor, self.store = predictor, store
        self._source, self._key, self._every = source, key, float(checkpoint_every)
        self._leaves, self._layout = layout(predictor)
        self._at_once = max(16, min(PER_COMMIT, MADE_AT_ONCE // max(1, sum(leaf.nbytes for leaf in self._leaves))))
        judge = predictor._judge
        self._room: int | None = judge.max_series if judge.evict else None
        self.epoch = store.open(
            model=bytes.fromhex(predictor.fingerprint), layout=self._layout, owner=owner, takeover=takeover
        )
        self._dirty: set[str] = set()  # changed since their record was made
        self._gone: set[str] = set()
        self._offsets: dict[str, bytes] = {}
        self._at = store.committed  # the last tick that was taken in as a whole
        self._sure = store.seq  # the last tick that a kill does not take back
        self._taken: set[str] = set()  # series that the next one has moved so far
        self._spilled: dict[str, tuple[int, bytes]] = {}  # evicted: the last tick held, and the record to be written
        self._waiting = 0  # bytes of these
        self._away = False  # whether a series may be in the store alone
        self._failed: str | None = None
        self._saved, self._duration = time.monotonic(), 0.0
        settle(predictor, self)
        try:
            self.recovery = self._recover(progress)
        except BaseException:
            store.close()
            raise

    # ---- what there is ----------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.predictor) if not self._away else len(self.item_ids)

    def __contains__(self, item_id: object) -> bool:
        return isinstance(item_id, str) and (
            item_id in self.predictor or item_id in self._spilled or bool(self._away and self.store.read([item_id]))
        )

    @property
    def item_ids(self) -> tuple[str, ...]:
        """The series: those at hand, then those that were evicted into the store."""
        here = self.predictor.item_ids
        if not self._away:
            return here
        gone = self._gone
        stored = (item for item in self.store.item_ids() if item not in gone)
        return tuple(dict.fromkeys((*here, *self._spilled, *stored)))

    # ---- in and out -------------------------------------------------------------------------------------------------

    def observe(
        self,
        data: Any,
        *,
        timestamp: Any = None,
        known: Mapping[str, np.ndarray] | None = None,
        offset: bytes = b"",
        source: str | None = None,
        received: int | None = None,
    ) -> ObserveReport:
        """As `StatefulPredictor.observe`; durable when it returns.

        A call may hold more series than there is room for: it is taken in by parts then.

        Args:
            data: see there. Rows of series whose state was lost are rejected (`state.lost`), until `begin_anew`.
            timestamp: see there.
            known: see there.
            offset: place in the source after these rows, stored with them; opaque.
            source: its name, where there are several.
            received: when the source got them, nanoseconds since 1970, for `max_future_skew`.

        Raises:
            ValueError: as there; nothing has been applied.
            StoreError: the tick could not be made durable. Open the store anew: what was not acknowledged may be gone.
        """
        self._usable()
        rows = read_rows(data, timestamp=timestamp, variates=self.predictor.variates)
        rows = self._without_lost(rows)
        given, source = dict(known or {}), self._source if source is None else source
        report = self._take_in(rows, given, received)
        if len(rows.item_ids) or given or offset:
            with self._writing():
                self.store.append([packed(Tick(rows, given, offset, source, received))], seq=self.store.seq + 1)
            self._at = self.store.seq
            if self.store.durability != "memory":
                self._sure = self._at
            self._taken.clear()
            if offset:
                self._offsets[source] = offset
        self._settle()
        if self._every < float("inf") and self.due():
            self.checkpoint()
        return report

    def forecast(self, item_ids: Sequence[str] | str | None = None, **options: Any) -> ForecastBatch:
        """As `StatefulPredictor.forecast`, of all series, those that were evicted included: they are brought back.

        Args:
            item_ids: which; all if not given.
            options: see there.

        Raises:
            KeyError: a series is not known.
            StoreDamaged: its state is lost.
        """
        items = self.item_ids if item_ids is None else _names(item_ids)
        if all(item in self.predictor for item in items):
            return self.predictor.forecast(items, **options)
        size = self._room or max(1, len(items))
        different = list(dict.fromkeys(items))
        parts = []
        for begin in range(0, len(different), size):
            part = different[begin : begin + size]
            self._bring(part)
            parts.append(self.predictor.forecast(part, **options))
        self._settle()
        return gather.forecasts(parts, items)

    def step(
        self,
        data: Any,
        *,
        timestamp: Any = None,
        offset: bytes = b"",
        source: str | None = None,
        **options: Any,
    ) -> ForecastBatch:
        """Observes, then forecasts the series that rows came for; `options` are those of `forecast`."""
        rows = read_rows(data, timestamp=timestamp, variates=self.predictor.variates)
        self.observe(rows, offset=offset, source=source)
        return self.forecast([item for item in dict.fromkeys(rows.item_ids) if item in self], **options)

    def warm_up(self, data: Any, *, chunk: int = 4096) -> ObserveReport:
        """As `StatefulPredictor.warm_up`; the states are written before it returns, at once.

        Where there is no room for all of these series it goes by parts, and a kill may leave some of them warmed up.
        """
        self._usable()
        items = [data] if isinstance(data, Series) else data
        if not (isinstance(items, list | tuple) and all(isinstance(item, Series) for item in items)):
            report = self.observe(data)
            self.checkpoint()
            return report
        for series in items:
            self.predictor.check_history(series)
        found = []
        size = self._room or max(1, len(items))
        for begin in range(0, len(items), size):
            part = [series for series in items[begin : begin + size] if len(series)]
            self._bring([series.item_id for series in part], known=False)
            found.append(self.predictor.warm_up(part, chunk=chunk))
            self._dirty.update(series.item_id for series in part)
        self.checkpoint()
        return gather.reports(found)

    def adopt(self, folder: str | Path) -> None:
        """Takes over the states of a snapshot that `StatefulPredictor.save` wrote; what is held now is replaced."""
        self.predictor.load(folder)
        self._dirty.update(self.predictor.item_ids)
        self.checkpoint()

    def begin_anew(self, item_ids: Sequence[str]) -> None:
        """Lets series whose state was lost begin again with their next row."""
        self.store.release(item_ids)

    # ---- other verbs ------------------------------------------------------------------------------------------------

    def register(self, item_ids: Iterable[str], **options: Any) -> None:
        """As `StatefulPredictor.register`; durable when it returns."""
        self._usable()
        self.predictor.register(item_ids, **options)
        self.checkpoint()

    def evict(self, item_ids: Iterable[str] | str | None = None, *, keep: int | None = None) -> int:
        """As `StatefulPredictor.evict`, into the store: the next row or forecast brings a series back."""
        count = self.predictor.evict(item_ids, keep=keep)
        self._settle()
        return count

    def rewind(self, item_ids: Iterable[str] | str, to: Any) -> None:
        """As `StatefulPredictor.rewind`; durable when it returns."""
        self._usable()
        items = tuple(dict.fromkeys(_names(item_ids)))
        self._bring(items)
        self.predictor.rewind(items, to)
        self._dirty.update(items)
        self.checkpoint()

    def delete(self, item_ids: Iterable[str] | str) -> int:
        """Forgets series for good: states, journal, and a replay does not bring them back.

        Returns:
            How many.

        Raises:
            KeyError: a series is not known; nothing has been deleted.
        """
        self._usable()
        items = tuple(dict.fromkeys(_names(item_ids)))
        stray = [item for item in items if item not in self and item not in self.store.lost]
        if stray:
            raise KeyError(f"series {stray[0]!r} is not known: nothing was deleted")
        self.predictor.delete([item for item in items if item in self.predictor])
        for item in items:
            self._unspill(item)
        self._gone.update(items)
        self._dirty.difference_update(items)
        self.checkpoint()
        return len(items)

    def reset(self, item_ids: Iterable[str] | str) -> None:
        """Makes series as if never seen; their next row starts them anew."""
        items = tuple(dict.fromkeys(_names(item_ids)))
        self.delete(items)
        self.register(items)

    def fetch(self, item_ids: Sequence[str]) -> None:
        """Brings back those of these series that were evicted, if there is room for all of them."""
        if self._away and (self._room is None or len(set(item_ids)) <= self._room):
            with contextlib.suppress(StoreDamaged):  # their rows will be refused
                self._bring(item_ids, known=False)
            self._settle()

    def head(self, item_id: str) -> int:
        """As `StatefulPredictor.head`, of a series that was evicted too.

        Raises:
            KeyError: the series is not known.
        """
        if item_id in self.predictor:
            return self.predictor.head(item_id)
        data = self._spilled[item_id][1] if item_id in self._spilled else None
        if data is None and self._away:
            data = self.store.read([item_id]).get(item_id)
        if data is None:
            raise KeyError(f"series {item_id!r} is not known: observe it first")
        return unpack(data, key=self._key, item_id=item_id).head

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def due(self) -> bool:
        """Whether it is time for a checkpoint, or evicted series wait for one."""
        return self.overfull or time.monotonic() - self._saved >= max(self._every, 10 * self._duration)

    @property
    def overfull(self) -> bool:
        """Whether evicted series wait for a checkpoint; without a journal nothing else may write them."""
        return self._waiting > SLICE

    @property
    def certain(self) -> bool:
        """Whether a kill takes nothing back of what was taken in."""
        return self._sure >= self._at

    def mark(self, offset: bytes, *, source: str | None = None) -> None:
        """The place in a source after rows that were not for this store; it is written with the next checkpoint."""
        self._offsets[self._source if source is None else source] = offset

    def checkpoint(self) -> int:
        """Writes what has moved, and trims the journal; returns the number of series."""
        self._usable()
        begin = time.monotonic()
        dirty = [item for item in self.predictor.item_ids if item in self._dirty]
        spilled = {item: data for item, (_, data) in self._spilled.items()}
        parts = self._parts(dirty) or [[]]
        registered = json.dumps(sorted(self.predictor._registered)).encode()
        with self._writing():
            for part in parts[:-1]:
                self.store.commit(self._records(part))
            self.store.commit(
                {**spilled, **self._records(parts[-1])},
                seq=self.store.seq,
                offsets={**self._offsets, REGISTERED: registered},
                deleted=tuple(self._gone),
            )
        self._dirty, self._gone, self._spilled, self._waiting = set(), set(), {}, 0
        self._sure = self.store.seq
        self._saved = time.monotonic()
        self._duration = self._saved - begin
        return len(dirty) + len(spilled)

    def close(self) -> None:
        """A last checkpoint, and lets go of the store."""
        try:
            if not self._failed:
                self.checkpoint()
        finally:
            self.store.close()

    def _usable(self) -> None:
        if self._failed:
            raise StoreRefused(f"the store failed before ({self._failed}): open it anew")

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except StoreError as error:  # what became of the write is not known
            self._failed = str(error)
            raise

    def _parts(self, items: Sequence[str]) -> list[list[str]]:
        return [list(items[i : i + self._at_once]) for i in range(0, len(items), self._at_once)]

    def _records(self, items: Sequence[str]) -> dict[str, bytes]:
        seq = np.fromiter((self._at + (item in self._taken) for item in items), np.int64, len(items))
        return records_of(
            self.predictor, items, self._leaves, layout=self._layout, epoch=self.epoch, seq=seq, key=self._key
        )

    # ---- taking in --------------------------------------------------------------------------------------------------

    def _take_in(self, rows: Rows, known: Mapping[str, np.ndarray], received: int | None) -> ObserveReport:
        """Rows into states, no more series at a time than there is room for."""
        more: dict[str, Any] = {}
        if received is not None and getattr(self.predictor._judge, "skew", None) is not None:
            more["received"] = np.datetime64(received, "ns")
        found = []
        for part, features in by_series(rows, known, self._room):
            named = set(part.item_ids) | features.keys()
            try:
                self._make_room(named)
                try:
                    report = self.predictor.observe(part, known=features, **more)
                except _Lost:  # found when they were to be brought back: before anything was changed
                    report = self.predictor.observe(self._without_lost(part), known=features, **more)
            except Exception as error:
                if found:  # the parts before cannot be taken back
                    self._failed = str(error)
                raise
            here = {item for item in named if item in self.predictor}
            self._taken |= here
            self._dirty |= here
            found.append(report)
        if len(found) == 1:
            return found[0]
        self.predictor.last_report = gather.reports(found)
        return self.predictor.last_report

    def _without_lost(self, rows: Rows) -> Rows:
        lost = self.store.lost
        if not lost or lost.keys().isdisjoint(rows.item_ids):
            return rows
        refused = [
            Rejection(
                "state.lost", int(place), item, show(stamp), f"the state is lost ({lost[item]}): restore the store"
            )
            for item, stamp, place in zip(rows.item_ids, rows.stamps, rows.places, strict=True)
            if item in lost
        ]
        kept = without(rows, set(lost))
        return kept._replace(bad=[*rows.bad, *refused])

    # ---- eviction ---------------------------------------------------------------------------------------------------

    def _make_room(self, named: set[str]) -> None:
        """Evicts so many that these fit in; some more than it takes, or each call would look through all series."""
        if self._room is None:
            return
        missing = sum(item not in self.predictor for item in named)
        if not missing or len(self.predictor) + missing <= self._room:
            return
        keep = max(len(named) - missing, self._room - missing - self._room // 64)
        pinned = getattr(getattr(self.predictor, "_series", None), "pinned", ())
        going = [item for item in self.predictor.item_ids if item not in named and item not in pinned]
        self.predictor.evict(going, keep=keep)

    def spill(self, items: Sequence[str]) -> None:
        """Makes records of series that are about to be evicted; what the store holds of the others is right."""
        self._away = True
        for part in self._parts([item for item in items if item in self._dirty]):
            for item, data in self._records(part).items():
                self._spilled[item] = (self._at + (item in self._taken), data)
                self._waiting += len(data)
            self._settle()
        self._dirty.difference_update(items)

    def _settle(self) -> None:
        """Writes spilled records where there are many; those alone whose ticks a kill does not take back."""
        if self._waiting <= SLICE or self._failed:
            return
        ready = {item: data for item, (seq, data) in self._spilled.items() if seq <= self._sure}
        if ready:
            with self._writing():
                self.store.commit(ready)
            for item in ready:
                self._unspill(item)

    def _unspill(self, item: str) -> None:
        _, data = self._spilled.pop(item, (0, b""))
        self._waiting -= len(data)

    def reload(self, items: Sequence[str]) -> None:
        """Brings back those of these series that were evicted.

        Raises:
            _Lost: the record of one is not what was written.
        """
        if not self._away:
            return
        absent = [item for item in items if item not in self._gone]
        lost = False
        for part in self._parts(absent):
            stored = self.store.read([item for item in part if item not in self._spilled])
            lost = lost or any(item in self.store.lost for item in part)
            batch = []
            for item in part:
                if item in self._spilled:
                    batch.append(unpack(self._spilled[item][1], key=self._key, item_id=item))
                    self._unspill(item)
                    self._dirty.add(item)
                elif item in stored:
                    batch.append(unpack(stored[item], key=self._key, item_id=item))
            restore(self.predictor, batch, self._leaves)
        if lost:
            raise _Lost

    def _bring(self, items: Sequence[str], *, known: bool = True) -> None:
        """Sees to it that series are at hand; `known`: all of them must be."""
        named = set(items)
        if all(item in self.predictor for item in named):
            return
        lost = [item for item in items if item in self.store.lost]
        if not lost:
            self._make_room(named)
            try:
                self.reload([item for item in dict.fromkeys(items) if item not in self.predictor])
            except _Lost:
                lost = [item for item in items if item in self.store.lost]
        if lost:
            raise StoreDamaged(f"the state of {lost[0]!r} is lost ({self.store.lost[lost[0]]}): restore the store")
        stray = [item for item in items if item not in self.predictor]
        if known and stray:
            raise KeyError(f"series {stray[0]!r} is not known: observe it first ({len(self)} series are)")

    # ---- recovery ---------------------------------------------------------------------------------------------------

    def _recover(self, progress: Callable[[int], object] | None) -> Recovery:
        held: dict[str, int] = {}  # records that hold ticks of the journal
        batch: list[Record] = []
        room, highest = self._room, 0
        for item, data in self.store.records():
            seq = glance(data).seq
            highest = max(highest, seq)
            if seq > self.store.committed:
                held[item] = seq
            if room is not None and len(self.predictor) + len(batch) >= room:
                self._away = True
                continue
            batch.append(unpack(data, key=self._key, item_id=item))
            if len(batch) == self._at_once:
                restore(self.predictor, batch, self._leaves)
                batch = []
        restore(self.predictor, batch, self._leaves)
        series = len(self.predictor)
        offsets = self.store.offsets()
        self.predictor.register(json.loads(offsets.pop(REGISTERED, b"[]")))
        self._offsets = {source: offset for source, offset in offsets.items() if offset}
        last: tuple[str, ...] = ()
        place, report, ticks = None, None, 0
        for number, data in self.store.journal():
            tick = unpacked(data)
            self._at = number - 1
            rows = without(tick.rows, {item for item in tick.rows.item_ids if held.get(item, -1) >= number})
            rows = without(rows, set(self.store.lost))
            known = {item: block for item, block in tick.known.items() if held.get(item, -1) < number}
            report = self._take_in(rows, known, tick.received)
            self._at = number
            self._taken.clear()
            source = tick.source or self._source
            if tick.offset:
                self._offsets[source] = tick.offset
            place, ticks = (source, tick.offset), ticks + 1
            last = tuple(dict.fromkeys(tick.rows.item_ids))
            self._settle()
            if progress is not None:
                progress(ticks)
        self._at = self._sure = self.store.seq
        if highest > self.store.seq:  # a checkpoint without a journal was cut off: no other tick may get its number
            self.checkpoint()
            self.store.commit(seq=highest)
            self._at = self._sure = highest
        last = tuple(item for item in last if item in self)
        return Recovery(
            series, ticks, dict(self.store.lost), last, self._offsets.get(self._source), dict(self._offsets), place,
            report,
        )  # fmt: skip


def _names(item_ids: Iterable[str] | str) -> tuple[str, ...]:
    return (item_ids,) if isinstance(item_ids, str) else tuple(item_ids)
