"""Where the states of many series live: one row per series in contiguous tensors, and the host's notes beside them.

The only file that writes in place. Slots are handed out lowest first, so a young pool is dense and a tick over all of
its series reads memory in order.
"""

import heapq
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tsgdn.streamable import map_state, state_bytes

Slots = np.ndarray  # int64, one per series


class StatePool:
    """Rows of state by slot.

    Grows by whole slabs, each half of what is there, so nothing is copied and no peak appears. A new row is zero, which
    means "nothing seen yet".

    Args:
        empty: makes the zero state of so many series.
        first: slots of the first slab.
    """

    def __init__(self, empty: Callable[[int], Any], *, first: int = 64) -> None:
        self._empty = empty
        self._first = first
        self._slabs: list[Any] = []
        self._edges = np.zeros(1, np.int64)  # slab i holds the slots [edges[i], edges[i + 1])
        self._free: list[int] = []

    @property
    def capacity(self) -> int:
        """Slots there are, used or not."""
        return int(self._edges[-1])

    @property
    def bytes_per_slot(self) -> int:
        """Bytes of state per series; constant, whatever the length of its history."""
        return state_bytes(self._slabs[0] if self._slabs else self._empty(1))

    def allocate(self, count: int) -> Slots:
        """Slots for new series, lowest first, all zeros."""
        while len(self._free) < count:
            size = max(self._first, self.capacity // 2, count - len(self._free))
            for slot in range(self.capacity, self.capacity + size):
                heapq.heappush(self._free, slot)
            self.grow(self.capacity + size)
        return np.fromiter((heapq.heappop(self._free) for _ in range(count)), np.int64, count)

    def grow(self, capacity: int) -> None:
        """Makes room for so many slots and hands out none: for a pool that follows the slots of another."""
        if capacity > self.capacity:
            self._slabs.append(self._empty(capacity - self.capacity))
            self._edges = np.append(self._edges, capacity)

    def shrink(self, capacity: int) -> None:
        """Gives back the slabs that lie wholly at or beyond `capacity`; nobody may own their slots."""
        while self._slabs and self._edges[-2] >= capacity:
            self._slabs.pop()
            self._edges = self._edges[:-1]
        self._free = [slot for slot in self._free if slot < self.capacity]
        heapq.heapify(self._free)

    def moves(self) -> tuple[Slots, Slots]:
        """Which slots would move where if the highest used ones filled the holes below them."""
        free = np.zeros(self.capacity, bool)
        free[self._free] = True
        used = int((~free).sum())
        return np.flatnonzero(~free[used:]) + used, np.flatnonzero(free[:used])

    def move(self, source: Slots, target: Slots) -> None:
        """Moves rows to free slots; those they leave are free and empty afterwards."""
        if len(source):
            self.put(target, map_state(torch.clone, self.take(source)))
            self.clear(source)
        taken = set(target.tolist())
        self._free = [slot for slot in self._free if slot not in taken] + source.tolist()
        heapq.heapify(self._free)

    def release(self, slots: Slots) -> None:
        """Takes slots back and forgets what was in them."""
        self.clear(slots)
        for slot in slots.tolist():
            heapq.heappush(self._free, slot)

    def clear(self, slots: Slots) -> None:
        """Sets rows to "nothing seen yet"."""
        for slab, _, rows in self._parts(slots):
            index = _Index(rows)
            map_state(lambda leaf, index=index: leaf.index_fill_(0, index.on(leaf), 0), slab)

    def take(self, slots: Slots) -> Any:
        """The states of these slots, in this order. May share memory with the pool: read it, do not write to it."""
        parts = self._parts(slots)
        if len(parts) == 1:
            slab, _, rows = parts[0]
            if _adjoin(rows):
                begin, count = int(rows[0]), len(rows)
                return map_state(lambda leaf: leaf.narrow(0, begin, count), slab)
            index = _Index(rows)
            return map_state(lambda leaf: leaf.index_select(0, index.on(leaf)), slab)
        whole = self._empty(len(slots))
        for slab, places, rows in parts:
            to, index = _Index(places), _Index(rows)
            map_state(
                lambda out, leaf, to=to, index=index: out.index_copy_(
                    0, to.on(out), leaf.index_select(0, index.on(leaf))
                ),
                whole,
                slab,
            )
        return whole

    def put(self, slots: Slots, state: Any) -> None:
        """Writes the states of these slots, each named once."""
        for slab, places, rows in self._parts(slots):
            some = _Index(places) if len(places) < len(slots) else None
            index, begin = _Index(rows), int(rows[0]) if _adjoin(rows) else None

            def write(
                leaf: Tensor, new: Tensor, some: Any = some, index: _Index = index, begin: int | None = begin
            ) -> Tensor:
                if some is not None:
                    new = new.index_select(0, some.on(new))
                elif new.untyped_storage().data_ptr() == leaf.untyped_storage().data_ptr():
                    new = new.clone()  # a leaf that the model handed through is still a view of the pool
                if begin is not None:
                    return leaf.narrow(0, begin, len(new)).copy_(new)
                return leaf.index_copy_(0, index.on(leaf), new.to(leaf.dtype))

            map_state(write, slab, state)

    def _parts(self, slots: Slots) -> list[tuple[Any, np.ndarray, np.ndarray]]:
        """Per slab that is touched: the slab, the places within `slots`, the rows within the slab."""
        if len(slots) == 0:
            return []
        owner = np.searchsorted(self._edges, slots, side="right") - 1
        first = int(owner[0])
        if bool((owner == first).all()):
            return [(self._slabs[first], np.arange(len(slots)), slots - self._edges[first])]
        return [
            (self._slabs[i], np.flatnonzero(owner == i), slots[owner == i] - self._edges[i])
            for i in np.unique(owner).tolist()
        ]


class _Index:
    """Rows as an index on whatever devices leaves lie, sent to each once."""

    def __init__(self, rows: np.ndarray) -> None:
        self._rows = torch.from_numpy(rows)
        self._there: dict[torch.device, Tensor] = {self._rows.device: self._rows}

    def on(self, leaf: Tensor) -> Tensor:
        found = self._there.get(leaf.device)
        if found is None:
            found = self._there[leaf.device] = self._rows.to(leaf.device)
        return found


def _adjoin(rows: np.ndarray) -> bool:
    """Whether rows follow one another."""
    count = len(rows)
    return count > 0 and bool(rows[-1] - rows[0] == count - 1) and bool((rows[1:] - rows[:-1] == 1).all())


class Ledger:
    """What the host knows of each series without asking the model: its clock and its last cells.

    `recent` is a ring: the cell of step s lies at s modulo its length of at least two patches. The steps from `applied`
    to `head` are in the ring only; they reach the model when their patch is finished, so that a row inside a patch
    costs no model call.

    Attributes:
        start: timestamp of step 0, UTC.
        grid: number of the time grid that `start` lies on.
        offset: steps from the grid's origin to `start`.
        head: steps seen, valued or not = the next step.
        applied: steps that the model's state has taken in.
        values: how many values were observed, over all variates.
        recent: (slots, V, ring) values, NaN where missing.
        told: (slots, V, ring) whether someone spoke for the cell, if only to say that it is missing.
        used: number of the latest call that observed the series.
        serial: number of the series among all that were ever created: a slot may have had other owners.
        reset: step at which silence last emptied the memory, plus one; 0 = never.
        saved: the fields that make the series; the others follow from them or belong to one process.

    Args:
        variates: V.
        ring: steps whose cells are held.
        resets: whether silence may empty a memory.
    """

    FIELDS = ("start", "grid", "offset", "head", "applied", "values", "recent", "told", "used", "serial", "reset")

    def __init__(self, variates: int, ring: int, *, resets: bool = False) -> None:
        self.ring = ring
        self.saved = ("start", "head", "applied", "values", "recent", "told", *(("reset",) if resets else ()))
        self.start = np.zeros(0, "datetime64[ns]")
        self.grid = np.zeros(0, np.int64)
        self.offset = np.zeros(0, np.int64)
        self.head = np.zeros(0, np.int64)
        self.applied = np.zeros(0, np.int64)
        self.values = np.zeros(0, np.int64)
        self.recent = np.zeros((0, variates, ring), np.float64)
        self.told = np.zeros((0, variates, ring), bool)
        self.used = np.zeros(0, np.int64)
        self.serial = np.zeros(0, np.int64)
        self.reset = np.zeros(0, np.int64)

    @property
    def bytes_per_slot(self) -> int:
        """Bytes of notes per series."""
        variates = self.recent.shape[1]
        return 9 * 8 + variates * self.ring * 9

    def grow(self, capacity: int) -> None:
        """Makes room for so many slots."""
        for name in self.FIELDS:
            old = getattr(self, name)
            if len(old) < capacity:
                new = np.zeros((capacity, *old.shape[1:]), old.dtype)
                new[: len(old)] = old
                setattr(self, name, new)

    def shrink(self, capacity: int) -> None:
        """Gives back the room beyond so many slots."""
        for name in self.FIELDS:
            setattr(self, name, getattr(self, name)[:capacity].copy())

    def clear(self, slots: Slots) -> None:
        """Forgets the series at these slots."""
        for name in self.FIELDS:
            array = getattr(self, name)
            array[slots] = np.zeros((), array.dtype)

    def rows(self, slots: Slots) -> dict[str, np.ndarray]:
        """The notes on these slots."""
        return {name: getattr(self, name)[slots] for name in self.FIELDS}

    def put(self, slots: Slots, rows: dict[str, np.ndarray]) -> None:
        """Writes the notes on these slots."""
        for name in self.FIELDS:
            getattr(self, name)[slots] = rows[name]

    def cells(self, slots: Slots, first: np.ndarray, steps: int) -> np.ndarray:
        """The ring's values (B, V, steps) of the steps from `first` (B,) on; at most the ring's length."""
        places = (first[:, None] + np.arange(steps)) % self.ring
        return np.take_along_axis(self.recent[slots], places[:, None, :], axis=2)

    def write(self, slots: Slots, steps: np.ndarray, values: np.ndarray, told: np.ndarray) -> None:
        """Writes one cell column (B, V) per series at its step (B,)."""
        places = steps % self.ring
        self.recent[slots, :, places] = values
        self.told[slots, :, places] = told

    def forget_after(self, slots: Slots, heads: np.ndarray) -> None:
        """Puts heads (B,) back, and forgets the cells that lie behind them."""
        for slot, new, old in zip(slots.tolist(), heads.tolist(), self.head[slots].tolist(), strict=True):
            gone = np.arange(max(new, old - self.ring), old) % self.ring
            self.values[slot] -= int((~np.isnan(self.recent[slot][:, gone])).sum())
            self.recent[slot][:, gone], self.told[slot][:, gone] = np.nan, False
        self.head[slots] = heads

    def write_run(self, slot: int, first: int, values: np.ndarray, told: np.ndarray) -> None:
        """Writes consecutive cells (V, n) of one series from step `first` on; what the ring holds remains."""
        skip = max(0, values.shape[1] - self.ring)
        places = np.arange(first + skip, first + values.shape[1]) % self.ring
        self.recent[slot][:, places] = values[:, skip:]
        self.told[slot][:, places] = told[:, skip:]
