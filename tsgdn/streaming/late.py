"""Two earlier states per series, from which a late or corrected value is streamed again.

Anchors lie at whole multiples of the window, L patches: at n patches the younger one at b = L floor(n / L), the older
one at a = b - L. So whatever order rows came in, the same anchors are there, the last L patches lie behind one of them,
and a revision replays fewer than 2L + 1 patches. Memory is thrice that of the state alone.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from tsgdn.streamable import join_rows, map_state, take_rows
from tsgdn.streaming.pool import Slots, StatePool
from tsgdn.streaming.watch import Watch

Watched = dict[str, np.ndarray]  # rows of a watch, by name


class Anchors:
    """The older and the younger anchor of each slot of a pool; a new series has one, nothing seen, at step 0.

    Args:
        empty: makes the zero state of so many series.
        stride: steps between anchors: the late window, L patches.
        watch: makes an empty watch, whose rows are kept with the states; None where forecasts are not watched.

    Attributes:
        steps: (slots, 2) step of the older and the younger anchor; -1 where there is no older one yet.
    """

    def __init__(self, empty: Callable[[int], Any], *, stride: int, watch: Callable[[], Watch] | None = None) -> None:
        self.stride = stride
        self._watches = () if watch is None else (watch(), watch())
        self._pools = (StatePool(empty), StatePool(empty))
        self.steps = np.zeros((0, 2), np.int64)
        self._young = np.zeros(0, np.int64)  # which of the pools holds the younger anchor

    @property
    def bytes_per_slot(self) -> int:
        """Bytes of anchors per series."""
        return 2 * self._pools[0].bytes_per_slot + 3 * 8 + sum(watch.bytes_per_slot for watch in self._watches)

    def grow(self, capacity: int) -> None:
        """Makes room for so many slots."""
        more = capacity - len(self.steps)
        if more > 0:
            for pool in (*self._pools, *self._watches):
                pool.grow(capacity)
            self.steps = np.concatenate([self.steps, np.tile(np.array([-1, 0]), (more, 1))])
            self._young = np.append(self._young, np.zeros(more, np.int64))

    def shrink(self, capacity: int) -> None:
        """Gives back the room beyond so many slots."""
        for pool in (*self._pools, *self._watches):
            pool.shrink(capacity)
        self.steps, self._young = self.steps[:capacity].copy(), self._young[:capacity].copy()

    def clear(self, slots: Slots) -> None:
        """Makes series as if never seen."""
        for pool in (*self._pools, *self._watches):
            pool.clear(slots)
        self.steps[slots], self._young[slots] = (-1, 0), 0

    def move(self, source: Slots, target: Slots) -> None:
        """Follows series to other slots."""
        if len(source):
            for pool in self._pools:
                pool.put(target, map_state(torch.clone, pool.take(source)))
            for watch in self._watches:
                watch.put(target, watch.rows(source))
            self.steps[target], self._young[target] = self.steps[source], self._young[source]
            self.clear(source)

    def oldest(self, slots: Slots) -> np.ndarray:
        """The earliest steps (B,) whose states are held."""
        older, younger = self.steps[slots].T
        return np.where(older < 0, younger, older)

    def next_stop(self, at: np.ndarray, end: np.ndarray) -> np.ndarray:
        """Where (B,) a series that goes from `at` to `end` must stop next, for an anchor or because it is there."""
        younger = end // self.stride * self.stride
        older = younger - self.stride
        return np.where(older > at, older, np.where(younger > at, younger, end))

    def note(self, slots: Slots, steps: np.ndarray, state: Any, watched: Watched | None = None) -> None:
        """Takes these states as the younger anchors; what was the younger one is the older one now."""
        for side, pool in enumerate(self._pools):
            rows = np.flatnonzero(self._young[slots] != side)
            if len(rows):
                pool.put(slots[rows], _rows(state, rows))
                if self._watches and watched is not None:
                    self._watches[side].put(slots[rows], {name: array[rows] for name, array in watched.items()})
        self._young[slots] = 1 - self._young[slots]
        self.steps[slots] = np.stack([self.steps[slots, 1], steps], 1)

    def restore(self, slots: Slots, first: np.ndarray) -> tuple[Any, Watched, np.ndarray]:
        """The latest anchored states at or before the steps `first` (B,), the watch's rows and their steps.

        Younger anchors are dropped.
        """
        back = self.steps[slots, 1] > first
        self._young[slots] ^= back
        self.steps[slots[back]] = np.stack([np.full(int(back.sum()), -1), self.steps[slots[back], 0]], 1)
        sides = [np.flatnonzero(self._young[slots] == side) for side in (0, 1)]
        parts = [pool.take(slots[rows]) for pool, rows in zip(self._pools, sides, strict=True) if len(rows)]
        state = _rows(join_rows(parts), np.argsort(np.concatenate(sides), kind="stable"))
        return state, self._watched(slots, self._young[slots]), self.steps[slots, 1]

    def _watched(self, slots: Slots, side: np.ndarray) -> Watched:
        """The watch's rows of the anchors on these sides (B,)."""
        if not self._watches:
            return {}
        first, second = (watch.rows(slots) for watch in self._watches)
        for name, array in first.items():
            array[side == 1] = second[name][side == 1]
        return first

    def watched(self, slots: Slots) -> tuple[Watched, Watched]:
        """Copies of the watch's rows that belong to the older and the younger anchors; empty where there is none."""
        young = self._young[slots]
        return self._watched(slots, 1 - young), self._watched(slots, young)

    def rows(self, slots: Slots) -> tuple[Any, Any, np.ndarray]:
        """Copies of the older and the younger anchors, and their steps (B, 2)."""
        young = self._young[slots]
        both = [join_rows([pool.take(slots)]) for pool in self._pools]

        def chosen(second: np.ndarray) -> Any:
            return map_state(
                lambda a, b: torch.where(_mask(second, a), b, a), *both
            )  # fmt: skip

        return chosen(young == 0), chosen(young == 1), self.steps[slots].copy()

    def put(
        self, slots: Slots, older: Any, younger: Any, steps: np.ndarray, watched: tuple[Watched, Watched] = ({}, {})
    ) -> None:
        """Writes both anchors."""
        self._pools[0].put(slots, older)
        self._pools[1].put(slots, younger)
        for watch, rows in zip(self._watches, watched, strict=False):
            watch.put(slots, rows)
        self.steps[slots], self._young[slots] = steps, 1


def _rows(state: Any, rows: np.ndarray) -> Any:
    leaf = state
    while not isinstance(leaf, torch.Tensor):
        leaf = leaf[0]
    return take_rows(state, torch.from_numpy(np.ascontiguousarray(rows)).to(leaf.device))


def _mask(rows: np.ndarray, leaf: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(rows).to(leaf.device).view(-1, *[1] * (leaf.dim() - 1))
