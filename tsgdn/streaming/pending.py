"""Forecasts whose targets have not come, O(1) per series: a ring of patches for each range of leads."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float64, Int, Int64

from tsgdn.streaming.scores import Grid

Slots = np.ndarray  # int64, one per series


class Due(NamedTuple):
    """What had been issued for a cell of each series; N ranges of leads, C coverages. Zeros where not `seen`.

    Attributes:
        seen: where a value has come for the first time and a forecast was there.
        deviation: value less the issued median.
        below: distances from the median to the lower quantiles of the intervals.
        above: to the upper ones.
        theta: in force when it was issued.
        scale: of the issuing token.
        shift: correction that the issued forecast contains, in units of the scale.
        persisted: value less the last one before the issue, in units of the scale; NaN where there was none.
        features: of the moment of issue, the constant first.
        quantiles: of the next patch, all levels.
        median: likewise.
    """

    seen: Bool[np.ndarray, "B V N"]
    deviation: Float64[np.ndarray, "B V N"]
    below: Float64[np.ndarray, "B V N C"]
    above: Float64[np.ndarray, "B V N C"]
    theta: Float[np.ndarray, "B V N C"]
    scale: Float64[np.ndarray, "B V N"]
    shift: Float64[np.ndarray, "B V N"]
    persisted: Float64[np.ndarray, "B V N"]
    features: Float64[np.ndarray, "B V N D"]
    quantiles: Float64[np.ndarray, "B V Q"]
    median: Float64[np.ndarray, "B V"]


class Ranges:
    """Ranges of leads: the next patch, the one after it, the next two, four, ... patches.

    Of each range one patch is scored, its last, so that a step is scored once per range and pending forecasts take less
    than two of them per patch ahead.

    Args:
        patch_size: P.
        ahead: K patches that are forecast at once.
    """

    def __init__(self, patch_size: int, ahead: int) -> None:
        if patch_size < 1 or ahead < 1:
            raise ValueError(f"patch_size {patch_size}, patches ahead {ahead}: expected at least 1 of each")
        last = [0]
        while last[-1] < ahead - 1:
            last.append(min(2 * last[-1] + 1, ahead - 1))
        self.patch_size = patch_size
        self.last = np.array(last)  # patches between the issue and the patch that is scored
        self.first_entry = np.concatenate([[0], np.cumsum(self.last + 1)[:-1]])
        self.entries = int((self.last + 1).sum())

    def __len__(self) -> int:
        return len(self.last)

    def of(self, leads: Int[np.ndarray, "*shape"]) -> Int64[np.ndarray, "*shape"]:
        """The range of each lead, 1 being the first step after the head; leads beyond the last range count to it."""
        found = np.searchsorted(self.last, (leads - 1) // self.patch_size)
        return np.minimum(found, len(self) - 1).astype(np.int64)

    def entry(self, patch: Int64[np.ndarray, " B"]) -> Int64[np.ndarray, "B N"]:
        """Where the forecasts of a patch lie, per range: a ring for each."""
        return self.first_entry + patch[:, None] % (self.last + 1)


class Pending:
    """Forecasts whose targets have not come, in half precision relative to their median.

    Distances are in units of the widest of their entry, so half precision costs 2^-11 of the distance to the median,
    whatever the level of the series.

    Attributes:
        patch: (slots, E) patch that an entry forecasts, plus one; 0 = nothing.
        scale: (slots, V, E) of the issuing token; 0 = not issued.
        unit: (slots, V, E) widest distance from the median.
        shift: (slots, V, E) correction within.
        last: (slots, V, E) last value at the time of issue.
        has_last: (slots, V, E) whether there was one.
        median: (slots, V, E, P).
        bands: (slots, V, E, P, 2C) distances to the quantiles below, then above, of each coverage.
        theta: (slots, V, E, C) in force at the time of issue.
        features: (slots, V, E, D - 1) of the time of issue.
        quantiles: (slots, V, P, Q) distances of all quantiles of the next patch.
        current: (slots,) latest patch of a value or an origin, plus one.
        cells: (slots, V, P) which of its cells have come.
        latest: (slots, V) latest value.
        latest_step: (slots, V) its step, plus one.
    """

    FIELDS = (
        "patch", "scale", "unit", "shift", "last", "has_last", "median", "bands", "theta", "features", "quantiles",
        "current", "cells", "latest", "latest_step",
    )  # fmt: skip

    def __init__(self, variates: int, ranges: Ranges, grid: Grid, coverages: Sequence[float], features: int) -> None:
        self.ranges, self.grid = ranges, grid
        V, E, P, C, Q = variates, ranges.entries, ranges.patch_size, len(coverages), len(grid.levels)
        self.middle = _level(grid, 0.5)
        c = np.asarray(coverages)
        self.ends = np.array([_level(grid, x) for x in np.concatenate([(1 - c) / 2, (1 + c) / 2])])
        self.patch = np.zeros((0, E), np.int64)
        self.scale = np.zeros((0, V, E))
        self.unit = np.zeros((0, V, E))
        self.shift = np.zeros((0, V, E))
        self.last = np.zeros((0, V, E))
        self.has_last = np.zeros((0, V, E), bool)
        self.median = np.zeros((0, V, E, P))
        self.bands = np.zeros((0, V, E, P, 2 * C), np.float16)
        self.theta = np.zeros((0, V, E, C), np.float32)
        self.features = np.zeros((0, V, E, features), np.float32)
        self.quantiles = np.zeros((0, V, P, Q), np.float16)
        self.current = np.zeros(0, np.int64)
        self.cells = np.zeros((0, V, P), bool)
        self.latest = np.zeros((0, V))
        self.latest_step = np.zeros((0, V), np.int64)

    def grow(self, capacity: int) -> None:
        """Makes room for so many slots."""
        for name in self.FIELDS:
            setattr(self, name, longer(getattr(self, name), capacity))

    def shrink(self, capacity: int) -> None:
        """Gives back the room beyond so many slots."""
        for name in self.FIELDS:
            setattr(self, name, getattr(self, name)[:capacity].copy())

    def issue(
        self,
        slots: Slots,
        origins: Int64[np.ndarray, " B"],
        quantiles: Float64[np.ndarray, "B V H Q"],
        scale: Float64[np.ndarray, "B V"],
        shift: Float64[np.ndarray, "B V N"],
        theta: Float64[np.ndarray, "B V N C"],
        features: Float[np.ndarray, "B V F"],
    ) -> None:
        """Keeps forecasts of the steps from `origins` on; a variate with a NaN or without scale is not issued."""
        P = self.ranges.patch_size
        patch = origins // P
        good = np.isfinite(quantiles).all((2, 3)) & (scale > 0) & np.isfinite(scale)
        q = np.where(good[..., None, None], quantiles, 0.0)
        scale = np.where(good, scale, 0.0)
        middle = q[..., self.middle]
        has_last = self.latest_step[slots] > 0
        self.turn(slots, patch)
        for n, ahead in enumerate(self.ranges.last.tolist()):
            at = (slots, self.ranges.entry(patch + ahead)[:, n])
            part = slice(ahead * P, (ahead + 1) * P)
            distance = q[:, :, part] - middle[:, :, part, None]
            unit = np.abs(distance).max((2, 3))
            near = distance / np.where(unit > 0, unit, 1.0)[..., None, None]
            self.patch[at] = patch + ahead + 1
            self.scale[at[0], :, at[1]] = scale
            self.unit[at[0], :, at[1]] = unit
            self.shift[at[0], :, at[1]] = shift[..., n]
            self.last[at[0], :, at[1]] = self.latest[slots]
            self.has_last[at[0], :, at[1]] = has_last
            self.median[at[0], :, at[1]] = middle[:, :, part]
            self.bands[at[0], :, at[1]] = np.abs(near[..., self.ends])
            self.theta[at[0], :, at[1]] = theta[:, :, n]
            self.features[at[0], :, at[1]] = features
            if not ahead:
                self.quantiles[slots] = near

    def due(
        self,
        slots: Slots,
        steps: Int64[np.ndarray, " B"],
        values: Float64[np.ndarray, "B V"],
        *,
        every: int | None = None,
    ) -> Due:
        """What had been issued for these cells, which are marked as come.

        Args:
            slots: each once; with `every` so many of them, and then the same again for the next cell of their patch.
            steps: of the cells.
            values: in the unit of the series; NaN = missing.
            every: see `slots`.
        """
        P, C = self.ranges.patch_size, len(self.ends) // 2
        patch, phase = steps // P, steps % P
        self.turn(slots, patch)
        older = patch + 1 < self.current[slots]
        fresh = np.isfinite(values) & ~self.cells[slots, :, phase] & ~older[:, None]
        self.cells[slots, :, phase] |= fresh
        y = np.where(fresh, values, 0.0)

        entry = self.ranges.entry(patch)
        place = (slots[:, None], slice(None), entry)  # gives (B, N, V, ...)
        tag = self.patch[slots[:, None], entry] == patch[:, None] + 1
        scale = self.scale[place].swapaxes(1, 2)
        seen = fresh[..., None] & tag[:, None] & (scale > 0)
        unit = np.where(seen, self.unit[place].swapaxes(1, 2), 0.0)
        median = self.median[slots[:, None], :, entry, phase[:, None]].swapaxes(1, 2)
        bands = self.bands[slots[:, None], :, entry, phase[:, None]].swapaxes(1, 2) * unit[..., None]
        deviation = np.where(seen, y[..., None] - median, 0.0)
        size = np.where(seen, scale, 1.0)
        persisted = np.where(
            seen & self.has_last[place].swapaxes(1, 2), (y[..., None] - self.last[place].swapaxes(1, 2)) / size, np.nan
        )
        kept = self.features[place].swapaxes(1, 2)
        features = np.concatenate([np.ones((*kept.shape[:-1], 1)), kept], -1)
        nearest = median[..., 0]
        quantiles = nearest[..., None] + unit[..., :1] * self.quantiles[slots, :, phase]
        due = Due(
            seen,
            deviation,
            bands[..., :C],
            bands[..., C:],
            self.theta[place].swapaxes(1, 2),
            scale,
            np.where(seen, self.shift[place].swapaxes(1, 2), 0.0),
            persisted,
            features,
            quantiles,
            nearest,
        )
        for part in [slice(None)] if every is None else [slice(i, i + every) for i in range(0, len(slots), every)]:
            some, end = slots[part], steps[part, None] + 1
            later = fresh[part] & (end > self.latest_step[some])
            self.latest[some] = np.where(later, y[part], self.latest[some])
            self.latest_step[some] = np.where(later, end, self.latest_step[some])
        return due

    def nearest(
        self, slots: Slots, steps: Int64[np.ndarray, " B"]
    ) -> tuple[Float64[np.ndarray, "B V Q"], Float64[np.ndarray, "B V"], Float64[np.ndarray, "B V"]]:
        """Quantiles, median and scale that the patch before these cells gave them; the scale is 0 where none did."""
        patch, phase = steps // self.ranges.patch_size, steps % self.ranges.patch_size
        entry = self.ranges.entry(patch)[:, 0]
        scale = np.where((self.patch[slots, entry] == patch + 1)[:, None], self.scale[slots, :, entry], 0.0)
        median = self.median[slots, :, entry, phase]
        unit = np.where(scale > 0, self.unit[slots, :, entry], 0.0)
        return median[..., None] + unit[..., None] * self.quantiles[slots, :, phase], median, scale

    def turn(self, slots: Slots, patch: np.ndarray) -> None:
        """Patches before these are overtaken: their cells are late."""
        newer = patch + 1 > self.current[slots]
        self.cells[slots[newer]] = False
        self.current[slots[newer]] = patch[newer] + 1


def longer(old: np.ndarray, capacity: int) -> np.ndarray:
    """An array with as many rows of zeros behind it as it lacks."""
    new = np.zeros((capacity, *old.shape[1:]), old.dtype)
    new[: len(old)] = old
    return new


def _level(grid: Grid, level: float) -> int:
    distance = np.abs(grid.levels - level)
    if distance.min() > 1e-9:
        raise ValueError(f"the quantile levels have no {level:g}: leave the coverage out, or forecast it too")
    return int(distance.argmin())


def turns(slots: Slots) -> Iterator[np.ndarray]:
    """Places of the first occurrence of each slot, then of the second, and so on."""
    order = np.argsort(slots, kind="stable")
    ordered = slots[order]
    fresh = np.ones(len(slots), bool)
    fresh[1:] = ordered[1:] != ordered[:-1]
    if fresh.all():
        if len(slots):
            yield np.arange(len(slots))
        return
    begin = np.flatnonzero(fresh)
    number = np.arange(len(slots)) - np.repeat(begin, np.diff(np.append(begin, len(slots))))
    by_number = np.argsort(number, kind="stable")
    for part in np.split(by_number, np.cumsum(np.bincount(number))[:-1]):
        yield np.sort(order[part])
