"""Watches forecasts come true: scores, signals, calibrated widths and, if asked for, a correction. O(1) per series.

A predictor calls `advance` where it moves states on, with the cells that a state takes in and the forecasts of the
tokens that they complete; so scores stand where the state stands, whatever order rows came in. In between `peek` says
what values of an open patch are worth. `advance` does (b) and (a) of what follows in the order of time; who has no
predictor may do so himself. All take slots and write rows in place, as `Ledger` does:

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
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float64, Int64

from tsgdn.streaming import adapt, conformal, scores, signals
from tsgdn.streaming.adapt import AdaptState, Contest, Learning
from tsgdn.streaming.conformal import ConformalState, Rules
from tsgdn.streaming.pending import Due, Pending, Ranges, Slots, longer, turns
from tsgdn.streaming.scores import Grid, Scores, ScoreState
from tsgdn.streaming.signals import Signals, SignalState, Thresholds
from tsgdn.streaming.worth import Alarms, Heard, Scored, Summary


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
            setattr(self, name, type(state)(*(longer(array, capacity) for array in state)))

    def shrink(self, capacity: int) -> None:
        """Gives back the room beyond so many slots."""
        self.pending.shrink(capacity)
        for name, state in self._states():
            setattr(self, name, type(state)(*(array[:capacity].copy() for array in state)))

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
        for turn in turns(slots):
            scored = self._observe(slots[turn], steps[turn], values[turn])
            for whole, part in zip((*out, *heard), (*scored.scores, *scored.signals), strict=True):
                whole[turn] = part
        return Scored(Scores(*out), heard)

    def advance(
        self,
        slots: Slots,
        first: Int64[np.ndarray, " B"],
        values: Float64[np.ndarray, "B V T"],
        lengths: Int64[np.ndarray, " B"],
        quantiles: Float64[np.ndarray, "B V N H Q"],
        scale: Float64[np.ndarray, "B V N"],
        valid: Bool[np.ndarray, "B N"],
    ) -> Heard:
        """Cells in the order of time, from anywhere in a patch, with the forecasts of the tokens that they complete.

        Args:
            slots: each once.
            first: steps of the first cells.
            values: in the unit of the series.
            lengths: how many of them count.
            quantiles: of the patches that end here, in turn, as for `issue`.
            scale: of each token.
            valid: which of them are there: a patch in long silence gives no token.
        """
        B, V, T = values.shape
        P, shape = self.ranges.patch_size, (B, V, T)
        pit, z = np.full(shape, np.nan), np.full(shape, np.nan)
        found: list[Alarms] = []
        if T % P == 0 and (lengths == T).all() and not (first % P).any():
            every = np.arange(B)
            for t in range(0, T, P):
                cells = slice(t, t + P)
                pit[:, :, cells], z[:, :, cells], heard = self._observe_patch(slots, first + t, values[:, :, cells])
                for steps, spoken in heard:
                    _note(found, every, steps, spoken)
                self._issue_tokens(slots, first, first + t + P, every, quantiles, scale, valid)
        else:
            for t in range(T):
                live = np.flatnonzero(lengths > t)
                some, steps = slots[live], first[live] + t
                scored = self._observe(some, steps, values[live, :, t])
                pit[live, :, t], z[live, :, t] = scored.scores.pit, scored.scores.z
                _note(found, live, steps, scored.signals)
                rows = live[(steps + 1) % P == 0]
                if len(rows):
                    self._issue_tokens(slots, first, first + t + 1, rows, quantiles, scale, valid)
        none = [np.zeros(0, kind) for kind in (np.int64, np.int64, np.int64, np.int64, np.float64, np.int64)]
        alarms = Alarms(*(map(np.concatenate, zip(*found, strict=True)) if found else none))
        return Heard(slots, first, lengths, pit, z, alarms)

    def _issue_tokens(
        self,
        slots: Slots,
        first: np.ndarray,
        origins: np.ndarray,
        rows: np.ndarray,
        quantiles: np.ndarray,
        scale: np.ndarray,
        valid: np.ndarray,
    ) -> None:
        """Keeps the forecasts of the tokens that end at `origins` (B,), of some rows."""
        P = self.ranges.patch_size
        token = origins[rows] // P - 1 - first[rows] // P
        there = valid[rows, token]
        rows, token = rows[there], token[there]
        if len(rows):
            # before its first value a variate has no forecast that means something
            seen = self.pending.latest_step[slots[rows]] > 0
            issued = quantiles[rows, :, token]
            if not seen.all():
                issued = np.where(seen[..., None, None], issued, np.nan)
            self.issue(slots[rows], origins[rows], issued, scale[rows, :, token])

    def peek(
        self, slots: Slots, steps: Int64[np.ndarray, " B"], values: Float64[np.ndarray, "B V"]
    ) -> tuple[Float64[np.ndarray, "B V"], Float64[np.ndarray, "B V"]]:
        """PIT and z of values whose patch is still open; nothing changes. A slot may come several times."""
        quantiles, median, scale = self.pending.nearest(slots, steps)
        found = scores.score(values, quantiles, median, scale, self.grid, np.isfinite(values) & (scale > 0))
        return found.pit, found.z

    def turn(self, slots: Slots, steps: Int64[np.ndarray, " B"]) -> None:
        """Silence up to these steps."""
        self.pending.turn(slots, steps // self.ranges.patch_size)

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
        found = scores.score(values, due.quantiles, due.median, due.scale[..., 0], self.grid, due.seen[..., 0])
        states = {name: _take(state, slots) for name, state in self._states()}
        heard = self._learn(states, due, found, steps)
        for name, state in self._states():
            _write(state, slots, states[name])
        return Scored(found, heard)

    def _observe_patch(
        self, slots: Slots, first: np.ndarray, values: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, list[tuple[np.ndarray, Signals]]]:
        """`_observe` of the P cells (B, V, P) of a patch in turn: PITs, z, and steps and signals of each cell."""
        B, V, P = values.shape
        steps = first + np.arange(P)[:, None]
        rows = values.transpose(2, 0, 1).reshape(P * B, V)
        due = self.pending.due(np.tile(slots, P), steps.ravel(), rows, every=B)
        found = scores.score(rows, due.quantiles, due.median, due.scale[..., 0], self.grid, due.seen[..., 0])
        states = {name: _take(state, slots) for name, state in self._states()}
        heard = []
        for p in range(P):
            part = slice(p * B, (p + 1) * B)
            cell, scored = Due(*(x[part] for x in due)), Scores(*(x[part] for x in found))
            heard.append((steps[p], self._learn(states, cell, scored, steps[p])))
        for name, state in self._states():
            _write(state, slots, states[name])
        pit, z = (x.reshape(P, B, V).transpose(1, 2, 0) for x in (found.pit, found.z))
        return pit, z, heard

    def _learn(self, states: dict[str, Any], due: Due, scored: Scores, steps: np.ndarray) -> Signals:
        """Moves rows of the states on by one cell each."""
        rules = self.rules
        states["scores"] = scores.update(states["scores"], scored, decay=rules.decay)
        states["conformal"] = conformal.update(
            states["conformal"], due.deviation, due.below, due.above, due.theta, due.seen, self.start, rules
        )
        states["signals"], heard = signals.update(states["signals"], steps, scored.z, self.thresholds)
        error = due.deviation / np.where(due.seen, due.scale, 1.0)
        frozen = error + due.shift
        both = due.seen & ~np.isnan(due.persisted)
        errors = np.stack([frozen, error, due.persisted], -1)
        states["contest"] = adapt.compare(states["contest"], errors, both, decay=rules.decay)
        if self.learning is not None:
            states["correction"] = adapt.collect(states["correction"], frozen, due.features, due.seen, self.learning)
        return heard

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


def _take(state: Any, slots: Slots) -> Any:
    return type(state)(*(array[slots] for array in state))


def _write(state: tuple, slots: Slots, rows: tuple) -> None:
    for array, new in zip(state, rows, strict=True):
        array[slots] = new


def _note(found: list[Alarms], rows: np.ndarray, steps: np.ndarray, spoken: Signals) -> None:
    """Adds the alarms of these rows at these steps."""
    if spoken.alarm.any():
        row, variate, kind, score, since = signals.events(spoken)
        found.append(Alarms(rows[row], variate, kind, steps[row], score, since))
