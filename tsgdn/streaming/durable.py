"""A predictor whose states outlive the process.

    tick -> the predictor takes it in -> the journal holds it -> `observe` returns -> forecasts may be sent
    checkpoint: states of all series that moved, the number of the last tick and the place in the source, together

What `observe` returned from is there after a kill: the states of the last checkpoint, and behind them the journal,
which is replayed tick by tick. Each record carries the number of the last tick that it holds, so a tick counts once per
series wherever a checkpoint was cut off. A replay calls the predictor with the ticks as they were, so the states after
it are those of an uninterrupted run bit by bit; after a checkpoint that was cut off in the middle a tick may meet fewer
series than before, and then that takes a predictor whose results do not depend on neighbours (`exact`).
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tsgdn.data.clock import show
from tsgdn.data.series import Series
from tsgdn.streaming.predictor import StatefulPredictor
from tsgdn.streaming.rows import Rejection, Rows, read_rows
from tsgdn.streaming.stores import StateStore, StoreError, StoreRefused
from tsgdn.streaming.stores.record import Key, Record, layout_digest, pack_many, unpack
from tsgdn.streaming.verdicts import ObserveReport

PER_COMMIT = 4096  # series whose records are made at once
REGISTERED = "tsgdn/registered"
"""Under this source the store holds the names that may come where unknown series are rejected."""


class Tick(NamedTuple):
    """What the journal holds of a call.

    Attributes:
        rows: that could be read.
        known: features that came with them.
        offset: place in the source after them.
    """

    rows: Rows
    known: dict[str, np.ndarray]
    offset: bytes


class Recovery(NamedTuple):
    """What was found on opening.

    Attributes:
        series: restored from records.
        ticks: replayed from the journal.
        lost: series whose record is damaged, and why; they are not served until released.
        last: the series of the last tick: its forecasts may not have been sent.
        offset: place in the source to go on from; None = from its start.
    """

    series: int
    ticks: int
    lost: dict[str, str]
    last: tuple[str, ...]
    offset: bytes | None


class DurablePredictor:
    """Keeps a `StatefulPredictor` and a store in step; one owner per store.

    Args:
        predictor: empty; is filled from the store.
        store: not yet opened.
        owner: a name to show to others.
        source: name of the source whose offsets come with the ticks.
        key: of the seals, as the store was given.
        checkpoint_every: seconds between checkpoints, at least; a checkpoint also waits for ten times its own duration.
        takeover: replace an owner whose lease has run out.
        progress: is called with the ticks replayed so far.

    Attributes:
        recovery: what was found.

    Raises:
        ValueError: the predictor holds states already.
        StoreError: the store is in use, damaged, or of another model, frequency or set of variates.
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
        self._model = bytes.fromhex(predictor.fingerprint)
        self._leaves, self._layout = layout(predictor)
        self.epoch = store.open(model=self._model, layout=self._layout, owner=owner, takeover=takeover)
        self._dirty: set[str] = set()
        self._gone: set[str] = set()
        self._failed: str | None = None
        self._saved, self._duration = time.monotonic(), 0.0
        try:
            self.recovery = self._recover(progress)
        except BaseException:
            store.close()
            raise

    # ---- in and out -------------------------------------------------------------------------------------------------

    def observe(
        self,
        data: Any,
        *,
        timestamp: Any = None,
        known: Mapping[str, np.ndarray] | None = None,
        offset: bytes = b"",
    ) -> ObserveReport:
        """As `StatefulPredictor.observe`; durable when it returns.

        Args:
            data: see there. Rows of series whose state was lost are rejected (`state.lost`), until `begin_anew`.
            timestamp: see there.
            known: see there.
            offset: place in the source after these rows, stored with them; opaque.

        Raises:
            ValueError: as there; nothing has been applied.
            StoreError: the tick could not be made durable. Open the store anew: what was not acknowledged may be gone.
        """
        if self._failed:
            raise StoreRefused(f"the store failed before ({self._failed}): open it anew")
        rows = read_rows(data, timestamp=timestamp, variates=self.predictor.variates)
        rows = self._without_lost(rows)
        given = dict(known or {})
        report = self.predictor.observe(rows, known=given)
        if len(rows.item_ids) or given or offset:
            try:
                self.store.append([packed(Tick(rows, given, offset))], seq=self.store.seq + 1)
            except StoreError as error:
                self._failed = str(error)
                raise
            self._dirty.update(item for item in (*rows.item_ids, *given) if item in self.predictor)
            self._offset = offset or self._offset
        if self.due():
            self.checkpoint()
        return report

    def warm_up(self, data: Any, *, chunk: int = 4096) -> ObserveReport:
        """As `StatefulPredictor.warm_up`; the states are written before it returns, at once."""
        items = [data] if isinstance(data, Series) else data
        report = self.predictor.warm_up(data, chunk=chunk)
        if isinstance(items, list | tuple) and all(isinstance(item, Series) for item in items):
            self._dirty.update(item.item_id for item in items if item.item_id in self.predictor)
        else:
            self._dirty.update(self.predictor.item_ids)
        self.checkpoint()
        return report

    def adopt(self, folder: str | Path) -> None:
        """Takes over the states of a snapshot that `StatefulPredictor.save` wrote; what is held now is replaced."""
        self.predictor.load(folder)
        self._dirty.update(self.predictor.item_ids)
        self.checkpoint()

    def begin_anew(self, item_ids: Sequence[str]) -> None:
        """Lets series whose state was lost begin again with their next row."""
        self.store.release(item_ids)

    def due(self) -> bool:
        """Whether it is time for a checkpoint."""
        return time.monotonic() - self._saved >= max(self._every, 10 * self._duration)

    def delete(self, item_ids: Sequence[str]) -> None:
        """Forgets series for good: states, journal, and a replay does not bring them back."""
        self.predictor.evict(item_ids)
        self._gone.update(item_ids)
        self._dirty.difference_update(item_ids)
        self.checkpoint()

    def checkpoint(self) -> int:
        """Writes what has moved, and trims the journal; returns the number of series."""
        if self._failed:
            raise StoreRefused(f"the store failed before ({self._failed}): open it anew")
        begin = time.monotonic()
        dirty = [item for item in self.predictor.item_ids if item in self._dirty]
        parts = [dirty[i : i + PER_COMMIT] for i in range(0, len(dirty), PER_COMMIT)] or [[]]
        registered = json.dumps(sorted(self.predictor._registered)).encode()
        try:
            for part in parts[:-1]:
                self.store.commit(self._records(part))
            self.store.commit(
                self._records(parts[-1]),
                seq=self.store.seq,
                offsets={self._source: self._offset, REGISTERED: registered},
                deleted=tuple(self._gone),
            )
        except StoreError as error:
            self._failed = str(error)
            raise
        self._dirty, self._gone = set(), set()
        self._saved = time.monotonic()
        self._duration = self._saved - begin
        return len(dirty)

    def close(self) -> None:
        """A last checkpoint, and lets go of the store."""
        try:
            if not self._failed:
                self.checkpoint()
        finally:
            self.store.close()

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
        kept = _without(rows, set(lost))
        return kept._replace(bad=[*rows.bad, *refused])

    # ---- recovery ---------------------------------------------------------------------------------------------------

    def _recover(self, progress: Callable[[int], object] | None) -> Recovery:
        held: dict[str, int] = {}
        batch: list[Record] = []
        for item, data in self.store.records():
            record = unpack(data, key=self._key, item_id=item)
            held[item] = record.seq
            batch.append(record)
            if len(batch) == PER_COMMIT:
                self._restore(batch)
                batch = []
        if batch:
            self._restore(batch)
        series, offsets = len(self.predictor), self.store.offsets()
        self.predictor.register(json.loads(offsets.get(REGISTERED, b"[]")))
        offset, last, ticks = offsets.get(self._source), (), 0
        for number, data in self.store.journal():
            tick = unpacked(data)
            rows = _without(tick.rows, {item for item in tick.rows.item_ids if held.get(item, -1) >= number})
            rows = _without(rows, set(self.store.lost))
            known = {item: block for item, block in tick.known.items() if held.get(item, -1) < number}
            self.predictor.observe(rows, known=known)
            self._dirty.update(item for item in (*rows.item_ids, *known) if item in self.predictor)
            ticks, offset = ticks + 1, tick.offset
            last = tuple(item for item in dict.fromkeys(tick.rows.item_ids) if item in self.predictor)
            if progress is not None:
                progress(ticks)
        self._offset = offset or b""
        return Recovery(series, ticks, dict(self.store.lost), last, offset)

    # ---- records ----------------------------------------------------------------------------------------------------

    def _records(self, items: Sequence[str]) -> dict[str, bytes]:
        if not items:
            return {}
        tensors, header = self.predictor._contents(items)
        extras = []
        for place, item in enumerate(items):
            told: dict[str, Any] = {"held": header["held"].get(item, [])}
            features = tensors.get(f"known.{place}")
            if features is not None:
                told["known"] = [header["known_from"][str(place)], list(features.shape), str(features.numpy().dtype)]
            extras.append(_framed(told, b"" if features is None else features.numpy().tobytes()))
        return pack_many(
            items,
            np.concatenate([_bytes(tensors[leaf.name]) for leaf in self._leaves], axis=1),
            model=self._model,
            layout=self._layout,
            epoch=self.epoch,
            seq=self.store.seq,
            start=tensors["ledger.start"].numpy(),
            head=tensors["ledger.head"].numpy(),
            count=tensors["ledger.values"].numpy(),
            freq=self.predictor.freq,
            extras=extras,
            key=self._key,
        )

    def _restore(self, records: Sequence[Record]) -> None:
        whole = np.stack([np.frombuffer(record.leaves, np.uint8) for record in records])
        tensors: dict[str, Tensor] = {}
        at = 0
        for leaf in self._leaves:
            flat = whole[:, at : at + leaf.nbytes].tobytes()
            at += leaf.nbytes
            shape = (len(records), *leaf.shape)
            tensors[leaf.name] = (
                torch.frombuffer(bytearray(flat), dtype=leaf.dtype).reshape(shape)
                if flat
                else torch.empty(shape, dtype=leaf.dtype)
            )
        header: dict[str, Any] = {"items": [r.item_id for r in records], "known_from": {}, "held": {}, "registered": []}
        for place, record in enumerate(records):
            told, rest = _unframed(record.extra)
            if told["held"]:
                header["held"][record.item_id] = told["held"]
            if "known" in told:
                header["known_from"][str(place)], shape, dtype = told["known"]
                tensors[f"known.{place}"] = torch.from_numpy(np.frombuffer(rest, dtype).reshape(shape).copy())
        self.predictor._restore(tensors, header)


class Leaf(NamedTuple):
    """One tensor of a series' state, as it lies in a record."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int


def layout(predictor: StatefulPredictor) -> tuple[tuple[Leaf, ...], bytes]:
    """The leaves of a record in their order, and 16 bytes that stand for them and for what the rows mean."""
    twin = predictor._empty_twin()
    twin._create({"x": np.datetime64("2000-01-01", "ns")})
    tensors, _ = twin._contents(["x"])
    leaves = tuple(
        Leaf(name, tuple(x.shape[1:]), x.dtype, x.numel() * x.element_size()) for name, x in sorted(tensors.items())
    )
    meaning = json.dumps([predictor.freq, list(predictor.variates), predictor.calendar])
    return leaves, layout_digest([*((leaf.name, leaf.shape, str(leaf.dtype)) for leaf in leaves), (meaning, (), "")])


class Aside(NamedTuple):
    """What a record holds beside the leaves.

    Attributes:
        held: rows that wait for others: step, timestamp in nanoseconds, values.
        begin: step of the first column of `known`, None without.
        known: features of steps to come (F, n).
    """

    held: list[tuple[int, int, list[float | None]]]
    begin: int | None
    known: np.ndarray | None


def aside(record: Record) -> Aside:
    """What has no fixed size in a record."""
    told, rest = _unframed(record.extra)
    held = [(step, stamp, values) for step, stamp, values in told["held"]]
    if "known" not in told:
        return Aside(held, None, None)
    begin, shape, dtype = told["known"]
    return Aside(held, begin, np.frombuffer(rest, dtype).reshape(shape))


def split(record: Record, leaves: Sequence[Leaf]) -> dict[str, Tensor]:
    """The leaves of a record by name, from `layout`."""
    tensors, at = {}, 0
    for leaf in leaves:
        data = bytearray(record.leaves[at : at + leaf.nbytes])
        flat = torch.frombuffer(data, dtype=leaf.dtype) if data else torch.empty(0, dtype=leaf.dtype)
        tensors[leaf.name] = flat.reshape(leaf.shape)
        at += leaf.nbytes
    return tensors


def packed(tick: Tick) -> bytes:
    """A tick as bytes: a JSON header, then the arrays."""
    rows, blocks = tick.rows, [np.ascontiguousarray(block, np.float64) for block in tick.known.values()]
    header = {
        "ids": rows.item_ids,
        "variates": int(rows.values.shape[1]),
        "known": {item: list(block.shape) for item, block in zip(tick.known, blocks, strict=True)},
        "offset": tick.offset.hex(),
    }
    stamps = np.ascontiguousarray(rows.stamps.astype("datetime64[ns]").view(np.int64))
    values = np.ascontiguousarray(rows.values, np.float64)
    return _framed(header, b"".join(x.tobytes() for x in (stamps, values, *blocks)))


def unpacked(data: bytes) -> Tick:
    """The tick in these bytes."""
    header, rest = _unframed(data)
    count, variates = len(header["ids"]), header["variates"]
    stamps = np.frombuffer(rest, np.int64, count).view("datetime64[ns]")
    values = np.frombuffer(rest, np.float64, count * variates, offset=8 * count).reshape(count, variates)
    at, known = 8 * count * (1 + variates), {}
    for item, shape in header["known"].items():
        size = int(np.prod(shape))
        known[item] = np.frombuffer(rest, np.float64, size, offset=at).reshape(shape)
        at += 8 * size
    rows = Rows(header["ids"], stamps, values, np.arange(count), [])
    return Tick(rows, known, bytes.fromhex(header["offset"]))


def _framed(header: dict[str, Any], rest: bytes) -> bytes:
    # ASCII: an item_id may hold what UTF-8 cannot
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    return len(text).to_bytes(4, "little") + text + rest


def _unframed(data: bytes) -> tuple[dict[str, Any], bytes]:
    size = int.from_bytes(data[:4], "little")
    return json.loads(data[4 : 4 + size]), data[4 + size :]


def _without(rows: Rows, items: set[str]) -> Rows:
    if not items:
        return rows
    keep = np.array([item not in items for item in rows.item_ids], bool)
    ids = [item for item in rows.item_ids if item not in items]
    return Rows(ids, rows.stamps[keep], rows.values[keep], rows.places[keep], rows.bad)


def _bytes(leaf: Tensor) -> np.ndarray:
    """A leaf's bytes, a row per series."""
    plain = leaf.detach().cpu().contiguous()
    if not plain.numel():
        return np.zeros((len(plain), 0), np.uint8)
    return plain.reshape(len(plain), -1).view(torch.uint8).numpy()
