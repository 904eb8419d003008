"""Numbers that stand for series, for ticks of 10^5 rows and more: look them up once, use them at every tick."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64, Int64

from tsgdn.streaming.residence import Residents
from tsgdn.streaming.rows import LARGEST, item_id_problem, printable
from tsgdn.streaming.verdicts import CENTURIES


class Handles:
    """Handles that were given out.

    A handle is the number of a series among all that were ever created, and its slot. Series that have not come yet
    have negative handles: places in a list of promises.
    """

    def __init__(self) -> None:
        self._promised: list[str] = []
        self._kept = np.zeros(0, np.int64)  # the handles of the promised, once they are there

    def of(self, series: Residents, item_ids: Sequence[str], *, create: bool) -> Int64[np.ndarray, " B"]:
        """See `StatefulPredictor.handles`."""
        if not create:
            slots = series.find(item_ids)
            return series.ledger.serial[slots] << 32 | slots
        for item in item_ids:
            problem = None if item in series.slots else item_id_problem(item)
            if problem:
                raise ValueError(f"series {printable(item)!r}: {problem}")
        out = np.empty(len(item_ids), np.int64)
        for i, item in enumerate(item_ids):
            slot = series.slots.get(item)
            if slot is None:
                out[i] = -1 - len(self._promised)
                self._promised.append(item)
            else:
                out[i] = series.ledger.serial[slot] << 32 | slot
        self._kept = np.append(self._kept, np.zeros(len(self._promised) - len(self._kept), np.int64))
        return out

    def owners(self, series: Residents, handles: np.ndarray) -> tuple[np.ndarray, dict[int, str]]:
        """The slots of handles, and by place the names of those whose series are not created yet (slot -1).

        Raises:
            ValueError: a handle is stale, or none of ours.
        """
        handles, names = np.asarray(handles, np.int64), {}
        if len(handles) and int(handles.min()) > 0:
            slots = handles & 0xFFFFFFFF
            if int(slots.max()) < series.pool.capacity and (series.ledger.serial[slots] == handles >> 32).all():
                return slots, names
        later = np.flatnonzero(handles < 0)
        if len(later):
            number = -1 - handles[later]
            if (number >= len(self._promised)).any():
                raise ValueError(f"handle {handles[later].min()} is not one of this predictor's: call handles again")
            for i in np.flatnonzero(self._kept[number] == 0).tolist():
                item = self._promised[number[i]]
                if item in series.slots:
                    self._kept[number[i]] = self.of(series, [item], create=False)[0]
                else:
                    names[int(later[i])] = item
            handles = handles.copy()
            handles[later] = self._kept[number]
        slots = handles & 0xFFFFFFFF
        unborn = handles == 0
        there = slots < series.pool.capacity
        good = there & (series.ledger.serial[np.where(there, slots, 0)] == handles >> 32) if there.any() else there
        if not (good | unborn).all():
            place = int((~(good | unborn)).argmax())
            raise ValueError(f"handle {place} is stale, its series was evicted or moved: call handles again")
        return np.where(unborn, -1, slots), names


def is_plain(
    series: Residents, slots: np.ndarray, stamp: np.datetime64, values: Float64[np.ndarray, "B V"]
) -> np.ndarray | None:
    """The steps (B,) if each row, sorted by slot, is simply the next of its own series, else None."""
    if slots[0] < 0 or series.held or bool((slots[1:] == slots[:-1]).any()):
        return None
    largest, smallest = values.max(), values.min()
    if not -LARGEST <= smallest <= largest <= LARGEST and (np.abs(values) > LARGEST).any():
        return None
    starts, heads = series.ledger.start[slots], series.ledger.head[slots]
    for start in (starts.min(), starts.max()):
        if abs(stamp.astype("M8[D]") - start.astype("M8[D]")) > CENTURIES:
            return None
    if starts[0] == starts[-1] and bool((starts == starts[0]).all()):
        step, on_grid = series.clock.steps(starts[0], stamp)
        return heads if bool(on_grid) and bool((heads == step).all()) else None
    steps, on_grid = series.clock.steps(starts, stamp)
    return heads if bool(on_grid.all()) and bool((steps == heads).all()) else None
