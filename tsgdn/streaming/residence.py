"""The series that a predictor holds: where each of them lies, and everything that is kept of it.

Slots belong to the pool; the ledger, the anchors, the known features and the watch follow them. A series comes by
`create`, moves by `compact` and is gone after `delete`; nothing else moves rows about.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from tsgdn.data.clock import Clock, show
from tsgdn.model.forecaster import Forecaster
from tsgdn.streamable import map_state
from tsgdn.streaming.known import KnownFeatures
from tsgdn.streaming.late import Anchors
from tsgdn.streaming.pool import Ledger, StatePool
from tsgdn.streaming.rows import printable, read_stamp
from tsgdn.streaming.verdicts import Held
from tsgdn.streaming.watch import Watch


class Residents:
    """All that is kept of the series of a predictor.

    Args:
        model: whose states they are.
        clock: of all series.
        variates: how many there are.
        calendar: whether the first known features are the calendar's.
        late_window: L, patches; 0 keeps no anchors.
        watch: makes an empty watch; None where forecasts are not watched.
        resets: whether silence may empty a memory.

    Attributes:
        slots: of the series, in the order in which they came.
        names: of the series by slot, None where a slot is free.
        pool: states of the model.
        ledger: clocks and last cells.
        anchors: earlier states; None without a late window.
        features: known-future features.
        watch: scores, widths and signals; None where forecasts are not watched.
        held: rows that wait for others to agree with them.
        registered: series that may come though unknown.
        pinned: those of them that are not evicted to make room.
        static: categories of registered series that have not come yet.
        born: series ever created.
    """

    def __init__(
        self,
        model: Forecaster,
        clock: Clock,
        *,
        variates: int,
        calendar: bool,
        late_window: int,
        watch: Callable[[], Watch] | None,
        resets: bool,
    ) -> None:
        self.model, self.clock, self.variates = model, clock, variates
        P, L = model.patch_size, late_window
        self.slots: dict[str, int] = {}
        self.names = np.zeros(0, object)
        self.pool = StatePool(self._empty)
        self.watch = None if watch is None else watch()
        # the older anchor may lie 2 L patches back
        self.ledger = Ledger(variates, (2 * L + 2) * P, resets=resets)
        self.anchors = Anchors(self._empty, stride=L * P, watch=watch) if L else None
        self.features = KnownFeatures(
            clock,
            self.ledger,
            features=model.known_features,
            calendar=calendar,
            device=self.device,
            keep=2 * L * P,
        )
        self.held: dict[str, list[Held]] = {}
        self.registered: set[str] = set()
        self.pinned: set[str] = set()
        self.static: dict[str, tuple[int, ...]] = {}
        self.born = 0

    def __len__(self) -> int:
        return len(self.slots)

    def _empty(self, count: int) -> Any:
        return self.model.initial_state(count, self.variates)

    @property
    def device(self) -> torch.device:
        """Where the states live."""
        return next(self.model.parameters()).device

    @property
    def nbytes(self) -> int:
        """Bytes per series."""
        anchors = 0 if self.anchors is None else self.anchors.bytes_per_slot
        watch = 0 if self.watch is None else self.watch.bytes_per_slot
        return self.pool.bytes_per_slot + self.ledger.bytes_per_slot + anchors + watch

    # ---- looking up -------------------------------------------------------------------------------------------------

    def find(self, items: Collection[str]) -> np.ndarray:
        """The slots of series; KeyError names one that is not known."""
        try:
            return np.fromiter((self.slots[item] for item in items), np.int64, len(items))
        except KeyError as error:
            name = printable(error.args[0])
            raise KeyError(f"series {name!r} is not known: observe it first ({len(self)} series are)") from None

    def time_of(self, slot: int, step: int) -> str:
        """A step of a series as people write it."""
        return show(self.clock.timestamp(self.ledger.start[[slot]], step)[0])

    def step_of(self, slots: np.ndarray, time: Any) -> np.ndarray:
        """The step (B,) of each series that a time falls into."""
        return self.clock.steps(self.ledger.start[slots], read_stamp(time))[0]

    def next_times(self, items: Sequence[str]) -> np.ndarray:
        """The time (B,) of the first step that each series has not seen."""
        slots = self.find(items)
        return self.clock.timestamp(self.ledger.start[slots], self.ledger.head[slots])

    # ---- coming and going -------------------------------------------------------------------------------------------

    def create(self, starts: Mapping[str, np.datetime64]) -> np.ndarray:
        """Slots for new series."""
        slots = self.pool.allocate(len(starts))
        if not len(slots):
            return slots
        ledger, capacity = self.ledger, self.pool.capacity
        for part in (ledger, self.anchors, self.watch):
            if part is not None:
                part.grow(capacity)
                part.clear(slots)
        ledger.serial[slots] = self.born + 1 + np.arange(len(slots))
        self.born += len(slots)
        self.names = np.concatenate([self.names, np.full(capacity - len(self.names), None, object)])
        self.names[slots] = list(starts)
        ledger.recent[slots] = np.nan
        ledger.start[slots] = list(starts.values())
        self.slots.update(zip(starts, slots.tolist(), strict=True))
        found, inverse = np.unique(ledger.start[slots], return_inverse=True)
        grids, offsets = np.empty(len(found), np.int64), np.zeros(len(found), np.int64)
        for i, start in enumerate(found):
            grids[i], offsets[i] = self.features.grid_of(start)
        ledger.grid[slots], ledger.offset[slots] = grids[inverse], offsets[inverse]
        if self.static:
            self.set_static({item: self.static.pop(item) for item in starts if item in self.static})
        return slots

    def set_static(self, categories: Mapping[str, Sequence[int]]) -> None:
        """Writes the categories of series that have just come into their states."""
        size = len(self.model.config["static_cardinalities"])
        chosen = {item: static for item, static in categories.items() if len(static) and size}
        if chosen:
            slots = self.find(chosen)
            state = self.pool.take(slots)
            static = torch.tensor(list(chosen.values()), dtype=state.static.dtype, device=state.static.device)
            self.pool.put(slots, state._replace(static=static))

    def delete(self, items: Sequence[str]) -> None:
        """Forgets series, each named once, and frees their slots; KeyError changes nothing."""
        slots = self.find(items)
        self.pool.release(slots)
        for part in (self.ledger, self.anchors, self.watch):
            if part is not None:
                part.clear(slots)
        self.names[slots] = None
        for item, slot in zip(items, slots.tolist(), strict=True):
            del self.slots[item]
            self.features.forget(slot)
            self.held.pop(item, None)
            self.registered.discard(item)

    def compact(self) -> int:
        """Moves series from the highest slots into holes; gives back the bytes that were freed."""
        before = self.pool.capacity
        source, target = self.pool.moves()
        self.pool.move(source, target)
        for part in (self.ledger, self.watch):
            if part is not None:
                part.put(target, part.rows(source))
                part.clear(source)
        self.features.move(source, target)
        self.names[target], self.names[source] = self.names[source], None
        self.slots.update(zip(self.names[target].tolist(), target.tolist(), strict=True))
        if self.anchors is not None:
            self.anchors.move(source, target)
        self.pool.shrink(len(self))
        for part in (self.ledger, self.anchors, self.watch):
            if part is not None:
                part.shrink(self.pool.capacity)
        self.names = self.names[: self.pool.capacity].copy()
        return (before - self.pool.capacity) * self.nbytes

    def reset_memory(self, slots: np.ndarray) -> None:
        """Sets the memories of series to "nothing seen yet"; clocks, categories and known features stay."""
        state = self.pool.take(slots)
        static, patching = state.static.clone(), map_state(torch.clone, state.patching)
        self.pool.clear(slots)
        self.pool.put(slots, self.pool.take(slots)._replace(static=static, patching=patching))

    # ---- anchors ----------------------------------------------------------------------------------------------------

    def note_anchors(self, slots: np.ndarray) -> None:
        """Keeps the states of series that stand where an anchor lies."""
        if self.anchors is None:
            return
        at = self.ledger.applied[slots]
        here = (at % self.anchors.stride == 0) & (at > self.anchors.steps[slots, 1])
        if here.any():
            some = slots[here]
            watched = None if self.watch is None else self.watch.rows(some)
            self.anchors.note(some, at[here], self.pool.take(some), watched)

    def restore_anchors(self, slots: np.ndarray, first: np.ndarray) -> None:
        """Puts series back to their last anchors at or before the steps `first` (B,)."""
        if self.anchors is None:
            raise RuntimeError("there is no late window to go back in")
        state, watched, steps = self.anchors.restore(slots, first)
        static = self.pool.take(slots).static.clone()
        self.pool.put(slots, state._replace(static=static))
        if self.watch is not None:
            self.watch.put(slots, watched)
        self.ledger.applied[slots] = steps

    def oldest(self, slots: np.ndarray) -> np.ndarray:
        """The earliest steps (B,) that series can be put back to."""
        return self.ledger.applied[slots] if self.anchors is None else self.anchors.oldest(slots)


def names(item_ids: Iterable[str]) -> tuple[str, ...]:
    """Item ids; a text is one of them, not its letters."""
    return (item_ids,) if isinstance(item_ids, str) else tuple(item_ids)
