"""Watches forecasts come true: scores, signals, calibrated widths and, if asked for, a correction. O(1) per series.

A predictor calls it at four places; all of them take slots and write rows in place, as `Ledger` does:

(a) A patch has closed and its token has been read. `quantiles` are those of the steps after `origin`, in the unit of
    the series, without the token's own patch, NaN where a variate has no value yet; `scale` is the token's. Leave out
    series whose patch gave no token (`Quantiles.valid`). Forecasts are kept until their targets come:

        watch.issue(slots, origin, quantiles, scale)           # quantiles.unscaled()[:, targets, -1, P:], origin = n·P

(b) A cell has been seen for the first time, before the model closes the patch that it fills:

        scored = watch.observe(slots, steps, values)           # (B,), (B,), (B, V): what it was worth
        signals.events(scored.signals)                         # the alarms alone

    Each cell counts once; a cell of a patch that a later one has overtaken is not scored. A slot may occur several
    times in a call: its rows are taken in the order of the call. Histories go through `run`, which does (b) and (a) in
    turn, patch by patch: Python works per step there, not per series.

(c) A forecast is asked for, at any phase of a patch; lead 1 is its first step:

        raw = watch.correct(slots, raw, leads, scale)          # nothing, unless `learning` was given and (d) called
        raw = watch.calibrate(slots, raw, levels, leads)       # levels with 0.5; before other levels are mixed
        flags = ~watch.calibrated(slots)                       # "uncalibrated"

(d) The user calls `adapt`: `watch.adapt(slots)`. Nothing else changes a correction.

Series come, go and are kept with `grow`, `clear`, `rows` and `put`. A row of zeros is "nothing seen yet" in all arrays:
θ is kept less its common start, patches and steps plus one, an entry without scale was not issued. No NaN is ever kept.

Within a patch, signals and decayed means see values in the order in which they come. What is issued does not depend on
`observe` but through θ and, after `adapt`, the correction.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float64, Int, Int64

from tsgdn.streaming import adapt, conformal, scores, signals
from tsgdn.streaming.adapt import AdaptState, Contest, Learning
from tsgdn.streaming.conformal import ConformalState, Rules
from tsgdn.streaming.scores import Grid, Scores, ScoreState
from tsgdn.streaming.signals import Signals, SignalState, Thresholds

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
            setattr(self, name, _longer(getattr(self, name), capacity))

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
        self._turn(slots, patch)
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

    def due(self, slots: Slots, steps: Int64[np.ndarray, " B"], values: Float64[np.ndarray, "B V"]) -> Due:
        """What had been issued for these cells, which are marked as come; slots are named once."""
        P, C = self.ranges.patch_size, len(self.ends) // 2
        patch, phase = steps // P, steps % P
        self._turn(slots, patch)
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
        later = fresh & (steps[:, None] + 1 > self.latest_step[slots])
        self.latest[slots] = np.where(later, y, self.latest[slots])
        self.latest_step[slots] = np.where(later, steps[:, None] + 1, self.latest_step[slots])
        return due

    def _turn(self, slots: Slots, patch: np.ndarray) -> None:
        """Patches before these are overtaken: their cells are late."""
        newer = patch + 1 > self.current[slots]
        self.cells[slots[newer]] = False
        self.current[slots[newer]] = patch[newer] + 1


class Scored(NamedTuple):
    """What values were worth, in the order of the call.

    Attributes:
        scores: against the forecast issued at the end of the patch before; NaN where there was none.
        signals: anomalies and drifts.
    """

    scores: Scores
    signals: Signals


class Summary(NamedTuple):
    """How the forecasts of series have done; decayed, NaN where nothing was scored. N ranges of leads, C coverages.

    Attributes:
        count: values scored.
        means: log score, CRPS, absolute error of the median.
        histogram: shares of PITs in 20 equal bins.
        raw: coverage of the model's own intervals.
        calibrated: coverage of the intervals as they were issued.
        theta: logarithm of the factor between their widths.
        standings: mean absolute error of the frozen forecast, the corrected one and persistence, in units of the scale.
        alarms: of each of `signals.KINDS`, since the beginning.
    """

    count: Int64[np.ndarray, "B V"]
    means: Float64[np.ndarray, "B V 3"]
    histogram: Float[np.ndarray, "B V bins"]
    raw: Float64[np.ndarray, "B V N C"]
    calibrated: Float64[np.ndarray, "B V N C"]
    theta: Float64[np.ndarray, "B V N C"]
    standings: Float64[np.ndarray, "B V N 3"]
    alarms: Int64[np.ndarray, "B V 3"]


class Watch:
    """All of this for the series of a pool; see the top of the module for when to call what.

    Args:
        variates: V that are forecast.
        patch_size: P.
        ahead: K patches that are forecast at once.
        levels: of the quantiles, increasing, 0.5 and both ends of each coverage among them.
        rules: of the interval widths.
        start: (N, C) θ of a series that has not been scored, from the validation part (`conformal.starting_theta`).
        thresholds: of the signals, from the validation part (`signals.fit_thresholds`).
        learning: of the correction; None keeps no notes for one, and `adapt` refuses.

    Raises:
        ValueError: an argument is out of range, or a level is missing.
    """

    def __init__(
        self,
        *,
        variates: int,
        patch_size: int,
        ahead: int,
        levels: Sequence[float],
        rules: Rules | None = None,
        start: np.ndarray | None = None,
        thresholds: Thresholds | None = None,
        learning: Learning | None = None,
    ) -> None:
        if variates < 1:
            raise ValueError(f"variates is {variates}, expected at least 1")
        self.variates = variates
        self.ranges = Ranges(patch_size, ahead)
        self.grid = Grid(levels)
        self.rules = rules = conformal.check_rules(rules or Rules())
        self.thresholds = signals.check_thresholds(thresholds or Thresholds())
        self.learning = None if learning is None else adapt.check_learning(learning)
        N, C = len(self.ranges), len(rules.coverages)
        self.start = np.zeros((N, C)) if start is None else np.array(start, np.float64)
        if self.start.shape != (N, C) or not np.isfinite(self.start).all():
            raise ValueError(f"start has shape {self.start.shape}, expected {(N, C)} finite numbers")
        self.start = np.clip(self.start, rules.lowest, rules.highest)
        self.features = 0 if learning is None else learning.features
        self.pending = Pending(variates, self.ranges, self.grid, rules.coverages, self.features)
        self.scores: ScoreState = scores.empty(0, variates)
        self.conformal: ConformalState = conformal.empty(0, variates, N, C)
        self.signals: SignalState = signals.empty(0, variates)
        self.contest: Contest = adapt.empty_contest(0, variates, N)
        self.correction: AdaptState | None = (
            None if learning is None else adapt.empty(0, variates, N, self.features + 1)
        )

    # ---- rows -------------------------------------------------------------------------------------------------------

    @property
    def capacity(self) -> int:
        """Slots there are."""
        return len(self.pending.current)

    @property
    def bytes_per_slot(self) -> int:
        """Bytes per series, whatever the length of its history."""
        one = {name: np.zeros((1, *array.shape[1:]), array.dtype) for name, array in self._arrays()}
        return sum(array.nbytes for array in one.values())

    def grow(self, capacity: int) -> None:
        """Makes room for so many slots."""
        if capacity <= self.capacity:
            return

        self.pending.grow(capacity)
        for name, state in self._states():
            setattr(self, name, type(state)(*(_longer(array, capacity) for array in state)))

    def clear(self, slots: Slots) -> None:
        """Forgets the series at these slots."""
        for _, array in self._arrays():
            array[slots] = np.zeros((), array.dtype)

    def rows(self, slots: Slots) -> dict[str, np.ndarray]:
        """Copies of all that is held of these slots, by name."""
        return {name: array[slots] for name, array in self._arrays()}

    def put(self, slots: Slots, rows: dict[str, np.ndarray]) -> None:
        """Writes what `rows` gave.

        Raises:
            ValueError: a name is missing, or an array has another shape or type: nothing was written.
        """
        for name, array in self._arrays():
            if name not in rows:
                raise ValueError(f"rows of {name} are missing: they are of another kind of watch")
            wanted = (len(slots), *array.shape[1:])
            if rows[name].shape != wanted or rows[name].dtype != array.dtype:
                raise ValueError(
                    f"{name} is {rows[name].dtype} {rows[name].shape}, expected {array.dtype} {wanted}: "
                    "the rows are of a watch with other settings"
                )
        for name, array in self._arrays():
            array[slots] = rows[name]

    # ---- forecasts come true ----------------------------------------------------------------------------------------

    def issue(
        self,
        slots: Slots,
        origins: Int64[np.ndarray, " B"],
        quantiles: Float64[np.ndarray, "B V H Q"],
        scale: Float64[np.ndarray, "B V"],
        features: Float[np.ndarray, "B V F"] | None = None,
    ) -> None:
        """Keeps the frozen forecasts of new tokens, corrected, until their targets come.

        Args:
            slots: each once.
            origins: first step that is forecast; the beginning of a patch.
            quantiles: in the unit of the series, of the K·P steps from there on (more are left out).
            scale: of the token, in the unit of the series.
            features: of the token, for the correction; needed if it takes any.

        Raises:
            ValueError: an origin inside a patch, a slot twice, or too few steps, levels or features.
        """
        P, steps = self.ranges.patch_size, self._steps(quantiles.shape)
        if len(np.unique(slots)) < len(slots):
            raise ValueError("a slot was issued twice in one call: issue its tokens one after another")
        if (origins % P).any() or (origins < 0).any():
            wrong = int(origins[(origins % P > 0) | (origins < 0)][0])
            raise ValueError(f"origin {wrong} is not the beginning of a patch of {P} steps: issue when a patch closes")
        x = self._features(len(slots), features)
        leads = np.arange(1, steps + 1)
        with np.errstate(invalid="ignore"):
            corrected, shift = self._corrected(slots, quantiles[:, :, :steps], leads, scale, x)
        theta = self.start + self.conformal.theta[slots]
        self.pending.issue(slots, origins, corrected, scale, shift, theta, x)

    def observe(self, slots: Slots, steps: Int64[np.ndarray, " B"], values: Float64[np.ndarray, "B V"]) -> Scored:
        """Scores values against what was issued before them, and learns widths from it.

        Args:
            slots: a series each; one may come several times, with its rows in the order of time.
            steps: of the values.
            values: in the unit of the series; NaN = missing, changes nothing.
        """
        B, V = values.shape
        out = [np.full((B, V), np.nan) for _ in Scores._fields]
        heard = Signals(np.full((B, V, 3), np.nan), np.zeros((B, V, 3), bool), np.full((B, V, 3), -1, np.int64))
        for turn in _turns(slots):
            scored = self._observe(slots[turn], steps[turn], values[turn])
            for whole, part in zip((*out, *heard), (*scored.scores, *scored.signals), strict=True):
                whole[turn] = part
        return Scored(Scores(*out), heard)

    def run(
        self,
        slots: Slots,
        first: Int64[np.ndarray, " B"],
        values: Float64[np.ndarray, "B V T"],
        quantiles: Float64[np.ndarray, "B V N H Q"],
        scale: Float64[np.ndarray, "B V N"],
        features: Float[np.ndarray, "B V N F"] | None = None,
    ) -> Scored:
        """Histories: the values of N patches in turn, each followed by the forecast of its token.

        Args:
            slots: each once.
            first: steps at which the first patch begins.
            values: T = N·P of them.
            quantiles: of each token, as for `issue`; NaN where a series has no token.
            scale: of each token.
            features: of each token, for the correction.

        Returns:
            Scores (B, V, T) and signals (B, V, T, 3).
        """
        self._check_history(values, quantiles)
        P = self.ranges.patch_size
        found: list[Scored] = []
        for n in range(quantiles.shape[2]):
            for p in range(n * P, (n + 1) * P):
                found.append(self.observe(slots, first + p, values[:, :, p]))
            x = None if features is None else features[:, :, n]
            self.issue(slots, first + (n + 1) * P, quantiles[:, :, n], scale[:, :, n], x)
        return Scored(
            Scores._make(np.stack(x, 2) for x in zip(*(one.scores for one in found), strict=True)),
            Signals._make(np.stack(x, 2) for x in zip(*(one.signals for one in found), strict=True)),
        )

    def tune(
        self,
        values: Float64[np.ndarray, "B V T"],
        quantiles: Float64[np.ndarray, "B V N H Q"],
        scale: Float64[np.ndarray, "B V N"],
        *,
        arl: int | float = 10_000,
    ) -> tuple[np.ndarray, Thresholds]:
        """What to give as `start` and `thresholds`, from a replay of a validation part; this watch does not change.

        Args:
            values: N patches of B series.
            quantiles: of each token, as for `run`.
            scale: of each token.
            arl: values per false alarm, for each kind of signal.

        Raises:
            ValueError: too few values to measure that rate.
        """
        self._check_history(values, quantiles)
        P, C, B = self.ranges.patch_size, len(self.rules.coverages), len(values)
        pending = Pending(self.variates, self.ranges, self.grid, self.rules.coverages, 0)
        pending.grow(B)
        slots, none = np.arange(B), np.zeros((B, self.variates, 0))
        flat = (B, self.variates, len(self.ranges))
        z: list[np.ndarray] = []
        due: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        for t in range(quantiles.shape[2] * P):
            cell = pending.due(slots, np.full(B, t), values[:, :, t])
            near = cell.seen[..., 0]
            found = scores.score(values[:, :, t], cell.quantiles, cell.median, cell.scale[..., 0], self.grid, near)
            z.append(found.z)
            due.append((np.where(cell.seen, cell.deviation, np.nan), cell.below, cell.above))
            if (t + 1) % P == 0:
                n = t // P
                origins = np.full(B, t + 1)
                theta = np.zeros((*flat, C))
                pending.issue(slots, origins, quantiles[:, :, n], scale[:, :, n], np.zeros(flat), theta, none)
        deviation, below, above = (np.moveaxis(np.stack(x), 3, 0) for x in zip(*due, strict=True))
        start = conformal.starting_theta(
            deviation.reshape(len(self.ranges), -1),
            below.reshape(len(self.ranges), -1, C),
            above.reshape(len(self.ranges), -1, C),
            self.rules,
        )
        thresholds = signals.fit_thresholds(np.stack(z, 2).reshape(-1, len(z)), arl=arl)
        return start, thresholds._replace(surprise=self.thresholds.surprise, warm=self.thresholds.warm)

    def surprise(
        self, slots: Slots, steps: Int64[np.ndarray, " B"], residual: Float64[np.ndarray, "B V"]
    ) -> tuple[Float64[np.ndarray, "B V"], Bool[np.ndarray, "B V"]]:
        """Takes in the memory's relative residual of one token per slot, each named once; see `signals.surprise`."""
        state, ratio, high = signals.surprise(_take(self.signals, slots), steps, residual, self.thresholds)
        _write(self.signals, slots, state)
        return ratio, high

    # ---- forecasts are made -----------------------------------------------------------------------------------------

    def correct(
        self,
        slots: Slots,
        quantiles: Float64[np.ndarray, "B V H Q"],
        leads: Int64[np.ndarray, " H"],
        scale: Float64[np.ndarray, "B V"],
        features: Float[np.ndarray, "B V F"] | None = None,
    ) -> Float64[np.ndarray, "B V H Q"]:
        """Forecasts moved by the correction that `adapt` has learned; as they came where there is none.

        Args:
            slots: of the series.
            quantiles: in the unit of the series.
            leads: of the steps, 1 being the first after the head.
            scale: of the token that they come from.
            features: of that token; needed if the correction takes any.
        """
        return self._corrected(slots, quantiles, leads, scale, self._features(len(slots), features))[0]

    def calibrate(
        self,
        slots: Slots,
        quantiles: Float64[np.ndarray, "B V H Q"],
        levels: Sequence[float],
        leads: Int64[np.ndarray, " H"],
    ) -> Float64[np.ndarray, "B V H Q"]:
        """Forecasts with the widths that their series and leads have shown to need; the median stays.

        Args:
            slots: of the series.
            quantiles: in the unit of the series; NaN stays NaN.
            levels: increasing, 0.5 among them.
            leads: of the steps, 1 being the first after the head.
        """
        theta = self.start + self.conformal.theta[slots]
        return conformal.widen(quantiles, levels, theta, self.rules.coverages, self.ranges.of(leads))

    def calibrated(self, slots: Slots) -> Bool[np.ndarray, " B"]:
        """Whether the next patch's widths are the series' own in every variate, no longer the common start."""
        return np.all(self.conformal.scored[slots, :, 0] >= max(1, self.rules.warm), axis=1)

    def adapt(self, slots: Slots) -> Int64[np.ndarray, " B"]:
        """Learns the correction from the forecasts whose targets have been seen since the last call.

        Returns:
            How many residuals each series gave.

        Raises:
            ValueError: the watch was made without `learning`.
        """
        if self.correction is None or self.learning is None:
            raise ValueError("the watch keeps no residuals: make it with learning=Learning()")
        slots = np.unique(slots)
        state = _take(self.correction, slots)
        _write(self.correction, slots, adapt.consume(state, self.learning))
        return state.new_count.sum((1, 2))

    def summary(self, slots: Slots) -> Summary:
        """How the forecasts of these series have done."""
        state = _take(self.scores, slots)
        raw, calibrated = conformal.coverage(_take(self.conformal, slots))
        weight = np.where(state.weight > 0, state.weight, np.nan)[..., None]
        return Summary(
            state.count,
            scores.means(state),
            state.histogram / weight,
            raw,
            calibrated,
            self.start + self.conformal.theta[slots],
            adapt.standings(_take(self.contest, slots)),
            self.signals.alarms[slots],
        )

    # ---- inside -----------------------------------------------------------------------------------------------------

    def _observe(self, slots: Slots, steps: np.ndarray, values: np.ndarray) -> Scored:
        due = self.pending.due(slots, steps, values)
        near = due.seen[..., 0]
        scored = scores.score(values, due.quantiles, due.median, due.scale[..., 0], self.grid, near)
        _write(self.scores, slots, scores.update(_take(self.scores, slots), scored, decay=self.rules.decay))
        widths = conformal.update(
            _take(self.conformal, slots), due.deviation, due.below, due.above, due.theta, due.seen, self.start,
            self.rules,
        )  # fmt: skip
        _write(self.conformal, slots, widths)
        state, heard = signals.update(_take(self.signals, slots), steps, scored.z, self.thresholds)
        _write(self.signals, slots, state)
        error = due.deviation / np.where(due.seen, due.scale, 1.0)
        frozen = error + due.shift
        both = due.seen & ~np.isnan(due.persisted)
        errors = np.stack([frozen, error, due.persisted], -1)
        contest = adapt.compare(_take(self.contest, slots), errors, both, decay=self.rules.decay)
        _write(self.contest, slots, contest)
        if self.correction is not None and self.learning is not None:
            noted = adapt.collect(_take(self.correction, slots), frozen, due.features, due.seen, self.learning)
            _write(self.correction, slots, noted)
        return Scored(scored, heard)

    def _corrected(
        self, slots: Slots, quantiles: np.ndarray, leads: np.ndarray, scale: np.ndarray, features: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Quantiles with the correction, and the correction per range of leads in units of the scale."""
        if self.correction is None:
            return quantiles, np.zeros((len(slots), self.variates, len(self.ranges)))
        x = np.concatenate([np.ones((*features.shape[:-1], 1)), features], -1)
        shift = adapt.shift(_take(self.correction, slots), x)
        return quantiles + (shift * scale[..., None])[..., self.ranges.of(leads), None], shift

    def _steps(self, shape: tuple[int, ...]) -> int:
        """K·P, checked against the last two axes of quantiles."""
        wanted = (int(self.ranges.last[-1]) + 1) * self.ranges.patch_size
        if shape[-2] < wanted or shape[-1] != len(self.grid.levels):
            raise ValueError(
                f"quantiles are {shape[-2]} steps of {shape[-1]} levels, expected {wanted} of {len(self.grid.levels)}"
            )
        return wanted

    def _check_history(self, values: np.ndarray, quantiles: np.ndarray) -> None:
        P = self.ranges.patch_size
        if not quantiles.shape[2] or values.shape[2] != quantiles.shape[2] * P:
            raise ValueError(
                f"{values.shape[2]} steps for {quantiles.shape[2]} tokens, expected {P} each and one token at least"
            )
        self._steps(quantiles.shape)

    def _features(self, rows: int, features: np.ndarray | None) -> np.ndarray:
        wanted = (rows, self.variates, self.features)
        if features is None and not self.features:
            return np.zeros(wanted)
        if features is None or features.shape != wanted or not np.isfinite(features).all():
            came = "none" if features is None else f"{features.shape}"
            raise ValueError(f"features are {came}, expected {wanted} finite numbers")
        return features

    def _states(self) -> Iterator[tuple[str, Any]]:
        for name in ("scores", "conformal", "signals", "contest", "correction"):
            if getattr(self, name) is not None:
                yield name, getattr(self, name)

    def _arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        for name in Pending.FIELDS:
            yield f"pending.{name}", getattr(self.pending, name)
        for name, state in self._states():
            for field, array in zip(state._fields, state, strict=True):
                yield f"{name}.{field}", array


def _longer(old: np.ndarray, capacity: int) -> np.ndarray:
    new = np.zeros((capacity, *old.shape[1:]), old.dtype)
    new[: len(old)] = old
    return new


def _take(state: Any, slots: Slots) -> Any:
    return type(state)(*(array[slots] for array in state))


def _write(state: tuple, slots: Slots, rows: tuple) -> None:
    for array, new in zip(state, rows, strict=True):
        array[slots] = new


def _level(grid: Grid, level: float) -> int:
    distance = np.abs(grid.levels - level)
    if distance.min() > 1e-9:
        raise ValueError(f"the quantile levels have no {level:g}: leave the coverage out, or forecast it too")
    return int(distance.argmin())


def _turns(slots: Slots) -> Iterator[np.ndarray]:
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
