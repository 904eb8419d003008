"""Live forecasting of many series: observations go into states of fixed size, forecasts come out at any moment.

    predictor = StatefulPredictor.from_pretrained(folder)
    predictor.observe(frame)                     # each row counts once, in whatever order rows come
    predictor.forecast(horizon=24)               # changes nothing

The cells of an unfinished patch wait in the ledger. When all of them are told, or a row beyond them comes, the model
takes the patch in, all series of a call in one batch. A forecast gives the waiting cells to a copy of the state. By the
law of this package neither can be told from streaming step by step, or from one pass over the whole history.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from tsgdn.data.clock import Clock, show
from tsgdn.data.series import Series
from tsgdn.model import artefact
from tsgdn.model.forecaster import Forecaster
from tsgdn.streamable import map_state, state_leaves
from tsgdn.streaming import parity, snapshot
from tsgdn.streaming.known import KnownFeatures
from tsgdn.streaming.parity import ParityReport
from tsgdn.streaming.pool import Ledger, StatePool
from tsgdn.streaming.rows import LARGEST, Rows, item_id_problem, printable, read_rows, sizable
from tsgdn.streaming.verdicts import Books, Held, Judge, ObserveReport, Plan, joined, told
from tsgdn.types import Batch, ForecastBatch


class Piece(NamedTuple):
    """`gap` silent steps, then consecutive cells (V, n) and whether someone spoke for them."""

    gap: int
    values: np.ndarray
    told: np.ndarray


class StatefulPredictor:
    """Forecasts of many series from states that `observe` moves on; see `from_pretrained`.

    Args:
        model: in evaluation mode from now on; its weights do not change.
        freq: pandas alias of the step of all series.
        calendar: whether the first known features of the model are the calendar's.
        variates: names of the V variates; targets first.
        targets: leading variates that are forecast, the others are past covariates; None = all.
        device: where states live and the model runs; "auto" is where the model is.
        on_unknown: what a row of an unknown series does: create it, or be rejected (see `register`).
        max_series: how many series there may be; rows of further ones are rejected.
        max_jump: a row that would leave more steps than this unspoken waits until three rows agree; the default is the
            larger of 10,000 and four of the longest seasons.
        horizon: of a forecast that names none; the default is what one pass covers.
        min_values: below so many observed values a forecast carries the flag "cold"; the default is two patches.
        block: series that go through the model together at most; the default is 1,024 on a CPU, whose caches they
            should fit, and 16,384 elsewhere.

    Raises:
        ValueError: the model takes fewer known features than the calendar has, its state grows with the stream
            (`gated_attention`), or an argument is out of range.
    """

    def __init__(
        self,
        model: Forecaster,
        *,
        freq: str,
        calendar: bool = True,
        variates: Sequence[str] = ("target",),
        targets: int | None = None,
        device: torch.device | str = "auto",
        on_unknown: Literal["create", "reject"] = "create",
        max_series: int | None = None,
        max_jump: int | None = None,
        horizon: int | None = None,
        min_values: int | None = None,
        block: int | None = None,
    ) -> None:
        if not model.backbone.bounded:
            raise ValueError(
                f"the state of mixer {model.config['mixer']} grows with the stream, which no pool can hold; "
                "stream a model whose state is bounded, such as h1 in the place of hybrid_3to1"
            )
        self.clock = Clock(freq)
        self.model = (model if device == "auto" else model.to(device)).eval()
        self.calendar, self.variates = calendar, tuple(variates)
        if not self.variates or len(set(self.variates)) != len(self.variates):
            raise ValueError(f"variates are {self.variates}, expected at least one name, each once")
        self.targets = self.variates[: len(self.variates) if targets is None else targets]
        if targets is not None and not 1 <= targets <= len(self.variates):
            raise ValueError(f"targets is {targets}, expected 1 to {len(self.variates)}, the number of variates")
        if on_unknown not in ("create", "reject"):
            raise ValueError(f"on_unknown is {on_unknown!r}, expected 'create' or 'reject'")
        self.horizon = model.direct_steps if horizon is None else horizon
        max_jump = max(10_000, 4 * max(self.clock.seasons)) if max_jump is None else max_jump
        self.min_values = 2 * model.patch_size if min_values is None else min_values
        for name, number in (
            ("max_series", max_series),
            ("max_jump", max_jump),
            ("horizon", self.horizon),
            ("block", block),
        ):
            if number is not None and number < 1:
                raise ValueError(f"{name} is {number}, expected at least 1")
        self.block = block or (1024 if self._device.type == "cpu" else 16_384)
        self._judge = Judge(
            self.clock, self.variates, max_jump=max_jump, max_series=max_series, create=on_unknown == "create"
        )
        self.fingerprint = artefact.fingerprint(model)
        self.last_report = ObserveReport()
        self._long_gap = 32 * model.patch_size  # beyond it silence is skipped in closed form
        self._registered: set[str] = set()
        self._clear()

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, device: torch.device | str = "auto", **options: Any
    ) -> "StatefulPredictor":
        """A predictor for the model in a folder; reads config.json and model.safetensors only.

        Args:
            folder: written by `Forecaster.save_pretrained` or `tsgdn fit`.
            device: "auto" is the GPU if there is one.
            options: arguments of `StatefulPredictor`; those left out come from the folder.

        Raises:
            ValueError: the folder is no model, or it does not say what frequency it is for and none is given.
        """
        info = artefact.read_series_info(folder)
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        model = artefact.load(folder, device=device)
        options.setdefault("freq", info.get("freq"))
        if options["freq"] is None:
            raise ValueError(f"{folder} does not say what frequency it is for: give freq=")
        for name in ("calendar", "variates", "targets", "horizon"):
            if info.get(name) is not None:
                options.setdefault(name, info[name])
        return cls(model, **options)

    def _clear(self) -> None:
        self._slots: dict[str, int] = {}
        model, variates = self.model, len(self.variates)
        self._pool = StatePool(lambda count: model.initial_state(count, variates))
        self._ledger = Ledger(len(self.variates), 2 * self.model.patch_size)
        self._held: dict[str, list[Held]] = {}
        self._features = KnownFeatures(
            self.clock,
            self._ledger,
            features=self.model.known_features,
            calendar=self.calendar,
            device=self._device,
        )

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, item_id: object) -> bool:
        return item_id in self._slots

    @property
    def item_ids(self) -> tuple[str, ...]:
        """The series, in the order in which they came."""
        return tuple(self._slots)

    @property
    def freq(self) -> str:
        """Pandas alias of the step."""
        return self.clock.freq

    @property
    def nbytes_per_series(self) -> int:
        """Bytes that a series takes, whatever the length of its history."""
        return self._pool.bytes_per_slot + self._ledger.bytes_per_slot

    def head(self, item_id: str) -> int:
        """Steps seen of a series, valued or not: the index of the next one."""
        return int(self._ledger.head[self._slots_of([item_id])[0]])

    def held(self) -> dict[tuple[str, str], list[float | None]]:
        """The rows that wait for others to agree with them, values by item and time; they are saved with the states."""
        return {(item, show(row.stamp)): _plain(row.values) for item, rows in self._held.items() for row in rows}

    # ---- observe ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def observe(
        self,
        data: Any,
        *,
        timestamp: Any = None,
        known: Mapping[str, np.ndarray] | None = None,
        errors: Literal["report", "raise"] = "report",
    ) -> ObserveReport:
        """Takes in rows of any subset of series, in any order, in one batched call.

        A row counts once: what was seen before is ignored as a duplicate, what contradicts it is set aside.

        Args:
            data: a frame with item_id, timestamp and the variates (or unique_id, ds, y); `{item_id: value}` with one
                `timestamp`; three arrays (item_ids, timestamps, values); or rows (item_id, timestamp, value). Values
                are in the unit of the series; NaN, None and absent steps are missing.
            timestamp: of all rows, where the data has none. Without an offset times are UTC.
            known: known-future features without the calendar, (F, n) per item from its next step on; NaN = absent.
                They are written over what was given before.
            errors: "report" sets single bad rows aside; "raise" applies all rows or none.

        Returns:
            Counts, and every row set aside.

        Raises:
            ValueError: wrong columns, types, variates or known features, or a bad row with errors="raise"; nothing has
                been applied.
        """
        if errors not in ("report", "raise"):
            raise ValueError(f"errors is {errors!r}, expected 'report' or 'raise'")
        rows = read_rows(data, timestamp=timestamp, variates=self.variates)
        if rows.values.shape[1] != len(self.variates):
            raise ValueError(f"rows have {rows.values.shape[1]} values, expected {len(self.variates)}")
        plan = self._judge(rows, Books(self._slots, self._ledger, self._pool.capacity, self._held, self._registered))
        if errors == "raise" and plan.bad:
            worst = plan.bad[0]
            raise ValueError(
                f"{worst.code}: item {worst.item_id} at {worst.timestamp}: {worst.text} "
                f"({len(plan.bad)} bad rows, nothing was applied)"
            )
        features = {item: self._features.checked(item, block) for item, block in (known or {}).items()}
        stray = [item for item in features if item not in self._slots]
        if stray and not set(stray) <= {*plan.touched, *(bad.item_id for bad in rows.bad)}:
            raise ValueError(f"known features of {printable(stray[0])!r}: the series is not known and has no row here")
        return self._apply(plan, features)

    def step(
        self,
        data: Any,
        *,
        timestamp: Any = None,
        horizon: int | None = None,
        quantile_levels: Sequence[float] | None = None,
    ) -> ForecastBatch:
        """Observes, then forecasts the series that rows came for; `last_report` tells what became of the rows."""
        rows = read_rows(data, timestamp=timestamp, variates=self.variates)
        self.observe(rows)
        touched = [item for item in dict.fromkeys(rows.item_ids) if item in self._slots]
        return self.forecast(touched, horizon=horizon, quantile_levels=quantile_levels)

    @torch.no_grad()
    def warm_up(self, data: Any, *, chunk: int = 4096) -> ObserveReport:
        """Takes in histories in one parallel pass: the same states as observing them row by row.

        Args:
            data: `Series`, several of them, or anything `observe` takes.
            chunk: steps that go through the model at once.

        Raises:
            ValueError: a series of another frequency, with other variates, features or categories, with a name or value
                that cannot be taken; nothing has been applied.
        """
        if chunk < 1:
            raise ValueError(f"chunk is {chunk}, expected at least 1 step")
        items = [data] if isinstance(data, Series) else data
        if not isinstance(items, list | tuple) or not all(isinstance(item, Series) for item in items):
            return self.observe(data)
        for series in items:
            self.check_history(series)
        if len({series.item_id for series in items}) < len(items):
            raise ValueError("warm_up got two histories of one item: join them first")
        new = [series for series in items if series.item_id not in self._slots and len(series)]
        if self._judge.max_series is not None and len(self) + len(new) > self._judge.max_series:
            raise ValueError(f"{len(self) + len(new)} series, max_series is {self._judge.max_series}: evict some first")
        self._create({series.item_id: series.start for series in new})
        self._set_static(new)
        report = ObserveReport()
        slots: list[int] = []
        pieces: list[list[Piece]] = []
        for series in items:
            if not len(series):
                continue
            self._registered.add(series.item_id)
            slot = self._slots[series.item_id]
            (step,), (on_grid,) = self.clock.steps(self._ledger.start[[slot]], series.start)
            gap = int(step) - int(self._ledger.head[slot])
            if series.known is not None and on_grid:
                begin = max(int(step), int(self._ledger.applied[slot]))
                block = self._features.checked(series.item_id, series.known[:, begin - int(step) :])
                self._features.give(slot, begin, block)
            if gap < 0 or not on_grid:  # it overlaps with what is known: row by row
                stamps = self.clock.timestamp(series.start, np.arange(len(series)))
                places = np.arange(len(series))
                one = self.observe(Rows([series.item_id] * len(series), stamps, sizable(series.values.T), places, []))
            else:
                slots.append(slot)
                pieces.append([Piece(gap, sizable(series.values), np.ones(series.values.shape, bool))])
                absent = int(np.isnan(series.values).all(0).sum())
                one = ObserveReport(accepted=len(series) - absent, missing=absent, gap=gap)
            report = joined(report, one)
        self._extend(np.asarray(slots, np.int64), pieces, chunk=chunk)
        self.last_report = report
        return report

    def check_history(self, series: Series) -> None:
        """Raises ValueError for a series that `warm_up` cannot take."""
        name = f"series {printable(series.item_id)!r}"
        problem = item_id_problem(series.item_id) if isinstance(series.item_id, str) else "the item_id is no text"
        if problem:
            raise ValueError(f"{name}: {problem}")
        if series.clock != self.clock:
            raise ValueError(f"{name} has freq {series.freq!r}, the predictor {self.freq!r}")
        if not self.clock.on_grid(series.start):
            raise ValueError(f"{name} starts at {show(series.start)}, which is not on the grid of {self.freq!r}")
        if len(series.values) != len(self.variates):
            raise ValueError(f"{name} has {len(series.values)} variates, expected {', '.join(self.variates)}")
        if (np.abs(series.values) > LARGEST).any():
            raise ValueError(f"{name} has a value beyond {LARGEST:g}: rescale the series")
        if series.known is not None:
            self._features.checked(series.item_id, series.known)
        categories = len(self.model.config["static_cardinalities"])
        if series.static and categories and len(series.static) != categories:
            raise ValueError(f"{name} has {len(series.static)} categories, expected {categories}")

    def register(self, item_ids: Iterable[str]) -> None:
        """Names series that may come where unknown ones are rejected."""
        self._registered.update(_names(item_ids))

    # ---- changing the states ----------------------------------------------------------------------------------------

    def _apply(self, plan: Plan, features: Mapping[str, np.ndarray]) -> ObserveReport:
        capacity = self._pool.capacity
        created = self._create(plan.created)

        def slot_of(key: int) -> int:
            return key if key < capacity else int(created[key - capacity])

        for item, block in features.items():
            if item in self._slots:
                slot = self._slots[item]
                self._features.give(slot, int(self._ledger.head[slot]), block)
        ledger = self._ledger
        for key, step, values in plan.fills:
            place = step % ledger.ring
            given = ~np.isnan(values)
            ledger.recent[key, given, place] = values[given]
            ledger.told[key, given, place] = True
            ledger.values[key] += int(given.sum())
        if plan.fills:
            self._close(np.unique([key for key, _, _ in plan.fills]))
        if plan.tick is not None and len(plan.tick[0]):
            keys, steps, values = plan.tick
            fresh = keys >= capacity
            slots = keys.copy()
            slots[fresh] = created[keys[fresh] - capacity]
            ledger.write(slots, steps, values, told(values))
            ledger.head[slots] = steps + 1
            ledger.values[slots] += (~np.isnan(values)).sum(axis=1)
            self._close(slots)
        if plan.runs:
            slots = np.fromiter((slot_of(key) for key, _, _ in plan.runs), np.int64, len(plan.runs))
            pieces = [
                self._pieces(int(ledger.head[slot]), steps, values)
                for slot, (_, steps, values) in zip(slots.tolist(), plan.runs, strict=True)
            ]
            self._extend(slots, pieces)
        for item, held in plan.held.items():
            if held:
                self._held[item] = [other._replace(row=None) for other in held]
            else:
                self._held.pop(item, None)
        plan.bad.sort(key=lambda bad: -1 if bad.row is None else bad.row)
        first: dict[str, tuple[str, str, str]] = {}
        for bad in plan.bad:
            first.setdefault(bad.code, (bad.item_id, bad.timestamp, bad.text))
        late = sum(bad.code == "ts.late" for bad in plan.bad)
        self.last_report = ObserveReport(
            plan.accepted, plan.duplicate, late, plan.gap, plan.missing, len(plan.bad) - late, first, plan.holding,
            tuple(plan.bad),
        )  # fmt: skip
        return self.last_report

    def _create(self, starts: Mapping[str, np.datetime64]) -> np.ndarray:
        """Slots for new series."""
        slots = self._pool.allocate(len(starts))
        if not len(slots):
            return slots
        ledger = self._ledger
        ledger.grow(self._pool.capacity)
        ledger.clear(slots)
        ledger.recent[slots] = np.nan
        ledger.start[slots] = list(starts.values())
        self._slots.update(zip(starts, slots.tolist(), strict=True))
        found, inverse = np.unique(ledger.start[slots], return_inverse=True)
        grids, offsets = np.empty(len(found), np.int64), np.zeros(len(found), np.int64)
        for i, start in enumerate(found):
            grids[i], offsets[i] = self._features.grid_of(start)
        ledger.grid[slots], ledger.offset[slots] = grids[inverse], offsets[inverse]
        return slots

    def _set_static(self, items: Sequence[Series]) -> None:
        """Writes the categories of new series into their states."""
        size = len(self.model.config["static_cardinalities"])
        chosen = [series for series in items if series.static and size]
        if chosen:
            slots = self._slots_of([series.item_id for series in chosen])
            state = self._pool.take(slots)
            static = torch.tensor([series.static for series in chosen], device=state.static.device)
            self._pool.put(slots, state._replace(static=static))

    def _pieces(self, head: int, steps: np.ndarray, values: Float64[np.ndarray, "n V"]) -> list[Piece]:
        """Rows as dense cells, cut where silence is long enough to be skipped."""
        P = self.model.patch_size
        gaps = np.diff(steps, prepend=head - 1) - 1
        cuts = np.flatnonzero(gaps > self._long_gap)
        pieces = []
        for a, b in zip([0, *cuts.tolist()], [*cuts.tolist(), len(steps)], strict=True):
            if a == b:
                continue
            begin = int(steps[a - 1]) + 1 if a else head
            # silence is skipped up to the patch of the next row: its other cells may still come
            gap = int(steps[a]) // P * P - begin if gaps[a] > self._long_gap else 0
            begin += gap
            cells = np.full((values.shape[1], int(steps[b - 1]) + 1 - begin), np.nan)
            spoken = np.zeros(cells.shape, bool)
            cells[:, steps[a:b] - begin] = values[a:b].T
            spoken[:, steps[a:b] - begin] = told(values[a:b]).T
            pieces.append(Piece(gap, cells, spoken))
        return pieces

    def _close(self, slots: np.ndarray) -> None:
        """Gives the model the patches that wait in the ring, of those series whose patch is finished."""
        end = self._finished(slots, self._ledger.applied[slots])
        due = end > self._ledger.applied[slots]
        if due.any():
            slots, lengths = slots[due], (end - self._ledger.applied[slots])[due]
            cells = self._ledger.cells(slots, self._ledger.applied[slots], int(lengths.max()))
            self._advance(slots, cells, lengths)

    def _finished(self, slots: np.ndarray, begin: np.ndarray) -> np.ndarray:
        """Where the last finished patch of each series ends; `begin`, which lies behind the head, if there is none.

        A patch is finished when a row beyond it has come, or all of its cells from `begin` on are told: until then
        those that are missing may still be filled.
        """
        ledger, P = self._ledger, self.model.patch_size
        end = ledger.head[slots] // P * P
        at = np.flatnonzero((end == ledger.head[slots]) & (end > begin))
        steps = end[at, None] + np.arange(-P, 0)
        told = np.take_along_axis(ledger.told[slots[at]].all(axis=1), steps % ledger.ring, axis=1)
        end[at] -= np.where((told | (steps < begin[at, None])).all(axis=1), 0, P)
        return np.maximum(end, begin)

    def _extend(self, slots: np.ndarray, pieces: list[list[Piece]], *, chunk: int = 4096) -> None:
        """Takes in runs of cells, one list of pieces per series, and hands whole patches to the model."""
        ledger = self._ledger
        todo: list[list[Piece]] = []
        for slot, run in zip(slots.tolist(), pieces, strict=True):
            applied, head = int(ledger.applied[slot]), int(ledger.head[slot])
            waiting = ledger.cells(np.array([slot]), np.array([applied]), head - applied)[0]
            for piece in run:
                silence = np.full((len(self.variates), min(piece.gap, ledger.ring)), np.nan)
                ledger.write_run(slot, head + piece.gap - silence.shape[1], silence, np.zeros(silence.shape, bool))
                ledger.write_run(slot, head + piece.gap, piece.values, piece.told)
                ledger.values[slot] += int((~np.isnan(piece.values)).sum())
                head += piece.gap + piece.values.shape[1]
            ledger.head[slot] = head
            if run[0].gap:
                run = [Piece(0, waiting, waiting), *run]
            else:
                run = [run[0]._replace(values=np.concatenate([waiting, run[0].values], 1)), *run[1:]]
            last = run[-1]
            begin = np.array([head - last.values.shape[1]])
            whole = int((self._finished(np.array([slot]), begin) - begin)[0])  # the rest waits for its patch to fill
            todo.append([*run[:-1], last._replace(values=last.values[:, :whole])])
        for number in range(max(map(len, todo), default=0)):
            active = [i for i, run in enumerate(todo) if len(run) > number]
            gaps = np.array([todo[i][number].gap for i in active], np.int64)
            for gap in np.unique(gaps[gaps > 0]).tolist():
                self._elapse(slots[[i for i, g in zip(active, gaps.tolist(), strict=True) if g == gap]], gap)
            active = [i for i in active if todo[i][number].values.shape[1]]
            active.sort(key=lambda i: -todo[i][number].values.shape[1])
            for a, b in _blocks([todo[i][number].values.shape[1] for i in active], self.block, chunk):
                block = active[a:b]
                lengths = np.array([todo[i][number].values.shape[1] for i in block])
                for begin in range(0, int(lengths[0]), chunk):
                    rest = np.clip(lengths - begin, 0, chunk)
                    rest = rest[rest > 0]
                    cells = np.full((len(rest), len(self.variates), int(rest[0])), np.nan)
                    for row, (i, length) in enumerate(zip(block, rest.tolist(), strict=False)):
                        cells[row, :, :length] = todo[i][number].values[:, begin : begin + length]
                    self._advance(slots[block[: len(rest)]], cells, rest)

    def _advance(self, slots: np.ndarray, cells: Float64[np.ndarray, "B V T"], lengths: np.ndarray) -> None:
        """One batched call of the model; the only place where observed values enter a state."""
        for begin in range(0, len(slots), self.block):
            part = slice(begin, begin + self.block)
            state = self._moved(slots[part], cells[part], lengths[part])
            self._pool.put(slots[part], state)
            self._ledger.applied[slots[part]] += lengths[part]
        self._features.trim(slots)

    def _moved(self, slots: np.ndarray, cells: Float64[np.ndarray, "B V T"], lengths: np.ndarray) -> Any:
        """The states of these series after `lengths` more cells; the pool is not changed."""
        T = cells.shape[2]
        values = torch.from_numpy(np.ascontiguousarray(cells))
        device = self._device
        batch = Batch(
            values.nan_to_num(nan=0.0).to(device),
            (~values.isnan() & (torch.arange(T) < torch.from_numpy(lengths)[:, None])[:, None]).to(device),
            self._features.columns(slots, self._ledger.applied[slots], T + self.model.span),
            lengths=None if bool((lengths == T).all()) else torch.from_numpy(lengths).to(device),
        )
        return self.model(batch, self._pool.take(slots), read=torch.zeros(0, dtype=torch.int64, device=device))[1]

    def _elapse(self, slots: np.ndarray, gap: int) -> None:
        """Silence, in closed form."""
        for begin in range(0, len(slots), self.block):
            part = slots[begin : begin + self.block]
            at = self._ledger.applied[part]

            def known(a: int, b: int, part: np.ndarray = part, at: np.ndarray = at) -> Any:
                return self._features.columns(part, at + a, b - a)

            state = self._pool.take(part)
            self._pool.put(part, self.model.elapse(state, gap, known=known if self.model.known_features else None))
            self._ledger.applied[part] += gap
        self._features.trim(slots)

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    # ---- forecast ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def forecast(
        self,
        item_ids: Sequence[str] | str | None = None,
        *,
        horizon: int | None = None,
        quantile_levels: Sequence[float] | None = None,
        known: Mapping[str, np.ndarray] | None = None,
    ) -> ForecastBatch:
        """Forecasts the next `horizon` steps from what has been observed so far; changes nothing.

        Args:
            item_ids: which series; all if not given.
            horizon: steps from the first unobserved one.
            quantile_levels: any in (0, 1), increasing; between the model's levels they are interpolated on the normal
                scale, outside them extended by its tails (flag "tail").
            known: known-future features without the calendar, (F, n) per item from its next step on, for this forecast
                alone. They are read where a copy steps on: in an unfinished patch and in roll-out. At the end of a
                patch its token has read what was known then.

        Returns:
            Quantiles in the unit of the series. Flags: "cold" where few values were observed (NaN where none was),
            "rollout" beyond the steps that one pass covers, "tail".

        Raises:
            KeyError: a series is not known.
            ValueError: horizon or levels out of range.
        """
        items = self.item_ids if item_ids is None else _names(item_ids)
        slots = self._slots_of(items)
        horizon = self.horizon if horizon is None else horizon
        if isinstance(horizon, bool) or not isinstance(horizon, int | np.integer) or not 1 <= horizon <= 1_000_000:
            raise ValueError(f"horizon is {horizon!r}, expected a whole number of steps from 1 to 1,000,000")
        fitted = tuple(self.model.quantile_levels)
        levels = fitted if quantile_levels is None else check_levels(quantile_levels)
        lent = {item: self._features.checked(item, block) for item, block in (known or {}).items()}
        features = dict(zip(self._slots_of(lent).tolist(), lent.values(), strict=True))
        mixing = _level_weights(fitted, levels)
        # a forecast may not fill memory with quantiles that nobody asked for
        block = max(1, min(self.block, 20_000_000 // (int(horizon) * len(fitted) * len(self.variates))))
        values = np.empty((len(slots), len(self.targets), int(horizon), len(levels)))
        for begin in range(0, len(slots), block):
            part = slots[begin : begin + block]
            raw = self._forecast_block(part, int(horizon), features)[:, : len(self.targets)].cpu().numpy()
            if levels != fitted:
                raw = np.maximum.accumulate(raw @ mixing, axis=-1)
            values[begin : begin + block] = raw
        ledger, P = self._ledger, self.model.patch_size
        phase = ledger.head[slots] % P
        direct = np.where(phase > 0, self.model.span - phase, self.model.direct_steps)
        tail = frozenset({"tail"} if levels[0] < fitted[0] - 1e-12 or levels[-1] > fitted[-1] + 1e-12 else ())
        flags = tuple(
            tail | ({"cold"} if cold else set()) | ({"rollout"} if far else set())
            for cold, far in zip(ledger.values[slots] < self.min_values, horizon > direct, strict=True)
        )
        start = self.clock.timestamp(ledger.start[slots], ledger.head[slots])
        return ForecastBatch(items, start, self.freq, levels, values, self.targets, flags)

    def _forecast_block(
        self, slots: np.ndarray, horizon: int, features: dict[int, np.ndarray]
    ) -> Float64[Tensor, "B V horizon Q"]:
        ledger = self._ledger
        lengths = ledger.head[slots] - ledger.applied[slots]
        lent = {slot: features[slot] for slot in slots.tolist() if slot in features}
        with self._features.lent(lent):
            if lengths.any() or lent:
                cells = ledger.cells(slots, ledger.applied[slots], int(lengths.max()))
                state = self._moved(slots, cells, lengths)
            else:
                state = self._pool.take(slots)
            columns = horizon + self.model.span + 2 * self.model.patch_size
            known = self._features.columns(slots, ledger.head[slots], columns)
            return self.model.forecast(state, horizon, known=known)

    def _slots_of(self, items: Collection[str]) -> np.ndarray:
        try:
            return np.fromiter((self._slots[item] for item in items), np.int64, len(items))
        except KeyError as error:
            name = printable(error.args[0])
            raise KeyError(f"series {name!r} is not known: observe it first ({len(self)} series are)") from None

    # ---- whole states -----------------------------------------------------------------------------------------------

    def reset(self, item_ids: Iterable[str]) -> None:
        """Makes series as if never seen; their next row starts them anew."""
        items = _names(item_ids)
        self.evict(items)
        self._registered.update(items)

    def evict(self, item_ids: Iterable[str]) -> int:
        """Forgets series and frees their slots."""
        items = tuple(dict.fromkeys(_names(item_ids)))
        slots = self._slots_of(items)
        self._pool.release(slots)
        self._ledger.clear(slots)
        for item, slot in zip(items, slots.tolist(), strict=True):
            del self._slots[item]
            self._features.forget(slot)
            self._held.pop(item, None)
            self._registered.discard(item)
        return len(items)

    def fork(self, item_ids: Sequence[str] | None = None) -> "StatefulPredictor":
        """A predictor with the same weights and copied states: what happens to one does not reach the other."""
        items = self.item_ids if item_ids is None else tuple(dict.fromkeys(_names(item_ids)))
        other = self._empty_twin()
        other._registered = set(self._registered)
        other._restore(*self._contents(items))
        return other

    def save(self, path: str | Path, *, offset: Any = None) -> None:
        """Writes all states into a folder, at one cut; a crash leaves the snapshot before.

        Args:
            path: a folder, made if absent.
            offset: place in the source after what was observed, plain JSON, for `load` to give back.
        """
        tensors, header = self._contents(self.item_ids)
        snapshot.write(path, tensors, {**header, "offset": offset}, model=self.fingerprint)

    def load(self, path: str | Path) -> Any:
        """Replaces all states by those of a folder, bit for bit, and gives back the offset stored with them.

        Raises:
            FileNotFoundError: nothing was saved there.
            SnapshotRefused: of another model, frequency or variates, of a newer format, or damaged; nothing changed.
        """
        tensors, header = snapshot.read(path, model=self.fingerprint)
        for name, mine in (("freq", self.freq), ("variates", list(self.variates)), ("calendar", self.calendar)):
            if header.get(name) != mine:
                raise snapshot.SnapshotRefused(
                    f"the states in {path} have {name} {header.get(name)!r}, expected {mine!r}"
                )
        fresh = self._empty_twin()
        try:
            fresh._restore(tensors, header)
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise snapshot.SnapshotRefused(f"the states in {path} do not fit this model: {error}") from None
        for name in ("_slots", "_pool", "_ledger", "_held", "_features", "_registered"):
            setattr(self, name, getattr(fresh, name))
        return header.get("offset")

    def state_tensors(self, item_ids: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Everything that is held of series, as named tensors: what `save` writes. Copies."""
        return self._contents(self.item_ids if item_ids is None else _names(item_ids))[0]

    def _empty_twin(self) -> "StatefulPredictor":
        twin = object.__new__(StatefulPredictor)
        twin.__dict__.update(self.__dict__)
        twin._registered = set()
        twin._clear()
        return twin

    def _contents(self, items: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        slots = self._slots_of(items)
        tensors: dict[str, Tensor] = {}
        if len(slots):
            state = map_state(torch.clone, self._pool.take(slots))
            tensors |= {f"state.{name}": leaf for name, leaf in state_leaves(state)}
        for name, array in self._ledger.rows(slots).items():
            if name not in ("grid", "offset"):  # they follow from `start`
                plain = array.view(np.int64) if array.dtype.kind == "M" else array
                tensors[f"ledger.{name}"] = torch.from_numpy(np.ascontiguousarray(plain))
        future = {}
        for place, slot in enumerate(slots.tolist()):
            given = self._features.given(slot)
            if given is not None:
                future[str(place)] = given[0]
                tensors[f"known.{place}"] = torch.from_numpy(given[1].copy())
        held = {
            item: [[h.step, int(h.stamp.astype(np.int64)), _plain(h.values)] for h in rows]
            for item, rows in self._held.items()
            if item in set(items)
        }
        header = {
            "items": list(items),
            "freq": self.freq,
            "variates": list(self.variates),
            "calendar": self.calendar,
            "known_from": future,
            "held": held,
            "registered": sorted(self._registered),
        }
        return tensors, header

    def _restore(self, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
        """Fills an empty predictor."""
        items = list(header["items"])
        ledger = {name: tensors[f"ledger.{name}"].numpy() for name in Ledger.FIELDS if name not in ("grid", "offset")}
        starts = ledger["start"].view("datetime64[ns]")
        if len(set(items)) != len(starts):
            raise ValueError(f"{len(set(items))} names for {len(starts)} series")
        slots = self._create(dict(zip(items, starts, strict=True)))
        notes = {**self._ledger.rows(slots), **ledger, "start": starts}
        for name in Ledger.FIELDS:
            wanted = getattr(self._ledger, name).shape[1:]
            if notes[name].shape[1:] != wanted:
                raise ValueError(f"{name} has shape {notes[name].shape[1:]}, expected {wanted}")
        self._ledger.put(slots, notes)
        if items:
            own = self._pool.take(slots)
            leaves = iter([tensors[f"state.{name}"] for name, _ in state_leaves(own)])
            wrong = [name for name, leaf in state_leaves(own) if tensors[f"state.{name}"].shape != leaf.shape]
            if wrong:
                raise ValueError(f"state leaf {wrong[0]} has another shape")
            self._pool.put(slots, map_state(lambda leaf: next(leaves).to(leaf.device), own))
        for place, origin in header["known_from"].items():
            self._features.give(int(slots[int(place)]), int(origin), tensors[f"known.{place}"].numpy())
        for item, rows in header["held"].items():
            self._held[item] = [
                Held(step, np.datetime64(stamp, "ns"), np.array(values, np.float64), None)
                for step, stamp, values in rows
            ]
        self._registered |= set(header["registered"])

    def verify(
        self, data: Series | Sequence[Series], *, horizon: int | None = None, origins: int = 8, rtol: float = 1e-5
    ) -> ParityReport:
        """Streams histories step by step and compares the forecasts with those of one parallel pass per origin.

        The states of this predictor are not touched.

        Args:
            data: histories, at least one step each.
            horizon: at most the steps that one pass covers.
            origins: per series, spread evenly; those inside a patch are compared with the closed patch.
            rtol: bound of the error, in units of the series' scale.
        """
        return parity.verify(self, data, horizon=horizon, origins=origins, rtol=rtol)


def _names(item_ids: Iterable[str]) -> tuple[str, ...]:
    """Item ids; a text is one of them, not its letters."""
    return (item_ids,) if isinstance(item_ids, str) else tuple(item_ids)


def _plain(values: np.ndarray) -> list[float | None]:
    """Values as JSON knows them."""
    return [None if np.isnan(x) else float(x) for x in values]


def check_levels(levels: Sequence[float]) -> tuple[float, ...]:
    """Quantile levels, increasing and within (0, 1).

    Raises:
        ValueError: none, or one is out of range or out of order.
    """
    levels = tuple(float(level) for level in levels)
    if not levels or not all(0 < level < 1 for level in levels) or any(np.diff(levels) <= 0):
        raise ValueError(f"quantile levels are {levels}, expected increasing numbers between 0 and 1")
    return levels


def _level_weights(fitted: Sequence[float], wanted: Sequence[float]) -> Float64[np.ndarray, "Q wanted"]:
    """Weights that make wanted quantiles of the fitted: linear in the normal score, which also extends the tails."""
    normal = NormalDist()
    x = np.array([normal.inv_cdf(level) for level in fitted])
    weights = np.zeros((len(fitted), len(wanted)))
    for column, level in enumerate(wanted):
        nearest = int(np.abs(np.asarray(fitted) - level).argmin())
        if abs(fitted[nearest] - level) < 1e-9 or len(fitted) == 1:
            weights[nearest, column] = 1
            continue
        z = normal.inv_cdf(level)
        right = int(np.clip(np.searchsorted(x, z), 1, len(x) - 1))
        share = (z - x[right - 1]) / (x[right] - x[right - 1])
        weights[right - 1, column], weights[right, column] = 1 - share, share
    return weights


def _blocks(lengths: Sequence[int], rows: int, chunk: int) -> list[tuple[int, int]]:
    """Cuts runs, longest first, into batches of bounded size without much padding."""
    blocks, begin = [], 0
    budget = 64 * max(chunk, 1024)  # cells
    for i, length in enumerate(lengths):
        longest = lengths[begin]
        full = i - begin >= rows or (i - begin + 1) * min(longest, chunk) > max(budget, min(longest, chunk))
        if i > begin and (full or length < longest // 2):
            blocks.append((begin, i))
            begin = i
    return [*blocks, (begin, len(lengths))] if lengths else []
