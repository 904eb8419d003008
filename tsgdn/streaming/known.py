"""Known-future features by series and step: the calendar, computed once per time grid, and what users give."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tsgdn.data.clock import Clock
from tsgdn.streaming.pool import Ledger
from tsgdn.streaming.verdicts import CENTURIES

TABLE_LIMIT = 200_000  # columns of calendar features that are kept
GRIDS = 256  # time grids that share a calendar table; a series beyond them computes its own


class KnownFeatures:
    """The columns that go into a model beside the values.

    Args:
        clock: of all series.
        ledger: starts, grids and offsets by slot.
        features: that the model takes.
        calendar: whether the first of them are the calendar's.
        device: of the columns.
        keep: steps before `applied` whose features are kept, since they may be streamed again.

    Raises:
        ValueError: the model takes fewer features than the calendar has.
    """

    def __init__(
        self, clock: Clock, ledger: Ledger, *, features: int, calendar: bool, device: torch.device, keep: int = 0
    ) -> None:
        self.clock, self.calendar, self.features, self.device = clock, calendar, features, device
        self.keep = keep
        self.user_features = features - (clock.calendar_size if calendar else 0)
        if self.user_features < 0:
            raise ValueError(
                f"the model takes {features} known features, the calendar of {clock.freq!r} has "
                f"{clock.calendar_size}: give calendar=False or the model's own freq"
            )
        self._ledger = ledger
        self._given: dict[int, tuple[int, np.ndarray]] = {}  # slot: first step, the user's features from it on
        self._grids: list[np.datetime64] = []
        self._tables: dict[int, tuple[int, np.ndarray]] = {}

    def give(self, slot: int, first: int, block: Float[np.ndarray, "F n"]) -> None:
        """Writes the user's features of a series from step `first` on over those that it holds."""
        self.trim(np.array([slot]))
        held = self._given.get(slot)
        if held is not None and first - held[0] - held[1].shape[1] > TABLE_LIMIT:
            held = None  # silence that long is skipped, and what was known of its beginning with it
        self._given[slot] = _overlaid(held, first, block)

    def given(self, slot: int) -> tuple[int, np.ndarray] | None:
        """What `give` set and is still ahead."""
        return self._given.get(slot)

    def forget(self, slot: int) -> None:
        """Drops what was given for a series."""
        self._given.pop(slot, None)

    def move(self, source: np.ndarray, target: np.ndarray) -> None:
        """Follows series to other slots."""
        for a, b in zip(source.tolist(), target.tolist(), strict=True):
            if a in self._given:
                self._given[b] = self._given.pop(a)

    @contextmanager
    def lent(self, blocks: Mapping[int, np.ndarray]) -> Iterator[None]:
        """Features from the head on, for the time of a `with` block, before those that the series holds."""
        before = dict(self._given)
        try:
            for slot, block in blocks.items():
                self._given[slot] = _overlaid(self._given.get(slot), int(self._ledger.head[slot]), block)
            yield
        finally:
            self._given = before

    def grid_of(self, start: np.datetime64) -> tuple[int, int]:
        """The grid that a start lies on, and how many steps after the grid's origin."""
        if self._grids:
            origins = np.array(self._grids)
            near = np.abs(origins.astype("M8[D]") - start.astype("M8[D]")) <= CENTURIES
            steps, on_grid = self.clock.steps(origins[near], start)
            if on_grid.any():
                which = int(on_grid.argmax())
                return int(np.flatnonzero(near)[which]), int(steps[which])
        if len(self._grids) == GRIDS:
            return -1, 0
        self._grids.append(start)
        return len(self._grids) - 1, 0

    def columns(self, slots: np.ndarray, first: np.ndarray, columns: int) -> Float[Tensor, "B F columns"] | None:
        """Known features of the steps from `first` (B,) on: the calendar, then what was given; NaN = absent."""
        if not self.features:
            return None
        parts = []
        if self.calendar:
            parts.append(self._calendar(slots, first, columns))
        if self.user_features:
            given = np.full((len(slots), self.user_features, columns), np.nan, np.float32)
            for row, (slot, begin) in enumerate(zip(slots.tolist(), first.tolist(), strict=True)):
                if slot in self._given:
                    origin, block = self._given[slot]
                    a, b = max(begin, origin), min(begin + columns, origin + block.shape[1])
                    if a < b:
                        given[row, :, a - begin : b - begin] = block[:, a - origin : b - origin]
            parts.append(torch.from_numpy(given))
        return torch.cat(parts, 1).to(self.device) if len(parts) > 1 else parts[0].to(self.device)

    def _calendar(self, slots: np.ndarray, first: np.ndarray, columns: int) -> Float[Tensor, "B F columns"]:
        """Calendar features; series on one grid share a table of them."""
        ledger, size = self._ledger, self.clock.calendar_size
        grids, at = ledger.grid[slots], ledger.offset[slots] + first
        if len(slots) and (grids == grids[0]).all() and (at == at[0]).all() and grids[0] >= 0:
            table, low = self._table(int(grids[0]), int(at[0]), int(at[0]) + columns)
            block = table[:, int(at[0]) - low : int(at[0]) - low + columns]
            return torch.from_numpy(np.ascontiguousarray(block))[None].expand(len(slots), -1, -1)
        out = np.empty((len(slots), size, columns), np.float32)
        for grid in np.unique(grids).tolist():
            rows = np.flatnonzero(grids == grid)
            low, high = int(at[rows].min()), int(at[rows].max()) + columns
            if grid < 0 or high - low > max(TABLE_LIMIT, 2 * columns):
                for row in rows.tolist():
                    begin = int(first[row])
                    start: Any = ledger.start[slots[row]]
                    out[row] = self.clock.calendar(start, begin, begin + columns)
                continue
            table, origin = self._table(grid, low, high)
            out[rows] = table[:, (at[rows] - origin)[:, None] + np.arange(columns)].transpose(1, 0, 2)
        return torch.from_numpy(out)

    def _table(self, grid: int, low: int, high: int) -> tuple[np.ndarray, int]:
        """Calendar features of a grid that cover [low, high), and the step of the first column."""
        if grid in self._tables:
            origin, table = self._tables[grid]
            end = origin + table.shape[1]
            if origin <= low and high <= end:
                return table, origin
            if max(high, end) - min(low, origin) <= TABLE_LIMIT:
                low, high = min(low, origin), max(high, end)
        table = self._calendar_from(self._grids[grid], low, high)
        self._tables[grid] = (low, table)
        return table, low

    def _calendar_from(self, start: np.datetime64, low: int, high: int) -> np.ndarray:
        """Calendar features of [low, high) and some steps more, as far as the clock reaches."""
        for ahead in (1024, 32):
            try:
                return self.clock.calendar(start, low, high + ahead)
            except ValueError:
                continue
        return self.clock.calendar(start, low, high)

    def checked(self, item: str, block: Any) -> Float[np.ndarray, "F n"]:
        """The user's features as an array of our own; raises ValueError for a wrong shape, text or infinity."""
        try:
            with np.errstate(over="ignore"):
                block = np.array(block, np.float32)
        except (TypeError, ValueError) as error:
            raise ValueError(f"known features of {item!r} are no array of numbers: {error}") from None
        if block.ndim != 2 or len(block) != self.user_features:
            raise ValueError(
                f"known features of {item!r} have shape {block.shape}, expected ({self.user_features}, steps): "
                "the calendar is added here"
            )
        if np.isinf(block).any():
            raise ValueError(f"known features of {item!r} are beyond float32: rescale them, and leave NaN where absent")
        return block

    def trim(self, slots: np.ndarray) -> None:
        """Forgets what was given of steps that the model has taken in and will not be given again."""
        if not self._given:
            return
        for slot in slots.tolist():
            if slot in self._given:
                origin, block = self._given[slot]
                used = int(self._ledger.applied[slot]) - self.keep - origin
                if used >= block.shape[1]:
                    del self._given[slot]
                elif used > 0:
                    self._given[slot] = (origin + used, block[:, used:].copy())


def _overlaid(held: tuple[int, np.ndarray] | None, first: int, given: np.ndarray) -> tuple[int, np.ndarray]:
    """Known features with those `given` from step `first` on written over what is held."""
    if held is None:
        return first, given
    origin, block = held
    low, high = min(origin, first), max(origin + block.shape[1], first + given.shape[1])
    joined = np.full((len(given), high - low), np.nan, np.float32)
    joined[:, origin - low : origin - low + block.shape[1]] = block
    joined[:, first - low : first - low + given.shape[1]] = given
    return low, joined
