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
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

from tsgdn.data.clock import Clock, show
from tsgdn.data.series import Series
from tsgdn.model import artefact
from tsgdn.model.forecaster import Forecaster
from tsgdn.streamable import map_state, state_leaves, take_rows
from tsgdn.streaming import parity, snapshot
from tsgdn.streaming.exact import rows_are_independent
from tsgdn.streaming.known import KnownFeatures
from tsgdn.streaming.late import Anchors
from tsgdn.streaming.parity import ParityReport
from tsgdn.streaming.pool import Ledger, StatePool
from tsgdn.streaming.rows import (
    LARGEST,
    Rows,
    from_objects,
    item_id_problem,
    printable,
    read_rows,
    read_stamp,
    sizable,
)
from tsgdn.streaming.verdicts import CENTURIES, Books, Held, Judge, ObserveReport, Plan, joined, told
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
        max_series: how many series there may be; see `on_full`.
        max_jump: a row that would leave more steps than this unspoken waits until three rows agree; the default is the
            larger of 10,000 and four of the longest seasons.
        horizon: of a forecast that names none; the default is what one pass covers.
        min_values: below so many observed values a forecast carries the flag "cold"; the default is two patches.
        block: series that go through the model together at most; the default is 1,024 on a CPU, whose caches they
            should fit, and 16,384 elsewhere.
        late_window: patches before the head within which a late value, or one that takes the place of another, changes
            the state as if it had come in order. Two earlier states per series are kept for it.
        on_conflict: what another value for a cell that has one does: it is rejected, or takes its place if the cell
            lies in the late window.
        exact: whether a series' states and forecasts shall be the same bits whatever its neighbours are and however its
            rows are cut into calls. Each call of the model then has one number of rows, 16 on a CPU and 64 elsewhere,
            and `observe` goes patch by patch; `warm_up` does not.
        on_full: what a row of a further series does when there are `max_series`: it is rejected, or the series that
            were not observed for longest are evicted.

    Raises:
        ValueError: the model takes fewer known features than the calendar has, its state grows with the stream
            (`gated_attention`), an argument is out of range, or `exact` cannot be kept on this device.
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
        late_window: int = 0,
        on_conflict: Literal["reject", "replace"] = "reject",
        exact: bool = False,
        on_full: Literal["reject", "evict"] = "reject",
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
        if on_conflict not in ("reject", "replace"):
            raise ValueError(f"on_conflict is {on_conflict!r}, expected 'reject' or 'replace'")
        if isinstance(late_window, bool) or not 0 <= late_window <= 10_000:
            raise ValueError(f"late_window is {late_window!r}, expected 0 to 10,000 patches")
        if on_conflict == "replace" and not late_window:
            raise ValueError("on_conflict='replace' needs the states before: give late_window, in patches")
        if on_full not in ("reject", "evict"):
            raise ValueError(f"on_full is {on_full!r}, expected 'reject' or 'evict'")
        self.late_window = late_window
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
        if exact and block is not None:
            raise ValueError(f"block is {block}, but exact=True has a number of rows of its own: leave block out")
        on_cpu = self._device.type == "cpu"
        self.exact = exact
        self.block = (16 if on_cpu else 64) if exact else block or (1024 if on_cpu else 16_384)
        self._judge = Judge(
            self.clock,
            self.variates,
            max_jump=max_jump,
            max_series=max_series,
            create=on_unknown == "create",
            replace=on_conflict == "replace",
            evict=on_full == "evict",
        )
        self.fingerprint = artefact.fingerprint(model)
        self.last_report = ObserveReport()
        self._long_gap = 32 * model.patch_size  # beyond it silence is skipped in closed form
        self._registered: set[str] = set()
        self._calls = self._born = 0  # calls that observed, series ever created
        self._promised: list[str] = []  # series with a handle that came before them,
        self._kept = np.zeros(0, np.int64)  # and their own handles, once they are there
        self._clear()
        if exact and not rows_are_independent(self.model, self.block, len(self.variates)):
            raise ValueError(
                f"exact=True: on {self._device} the bits of this model's rows depend on their place in a call of "
                f"{self.block}; a width of 16 or more that 8 divides mends it, else leave exact out"
            )

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

        def empty(count: int) -> Any:
            return model.initial_state(count, variates)

        P, L = model.patch_size, self.late_window
        self._pool = StatePool(empty)
        self._anchors = Anchors(empty, stride=L * P) if L else None
        self._ledger = Ledger(variates, (2 * L + 2) * P)  # the older anchor may lie 2 L patches back
        self._names = np.zeros(0, object)  # by slot
        self._held: dict[str, list[Held]] = {}
        self._features = KnownFeatures(
            self.clock,
            self._ledger,
            features=model.known_features,
            calendar=self.calendar,
            device=self._device,
            keep=2 * L * P,
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
        anchors = 0 if self._anchors is None else self._anchors.bytes_per_slot
        return self._pool.bytes_per_slot + self._ledger.bytes_per_slot + anchors

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

        A row counts once: what was seen before is ignored as a duplicate, what contradicts it is set aside. Within the
        late window (`late_window`) late values count as if they had come in order.

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
        self._admit(rows.item_ids)
        plan = self._judge(rows, self._books())
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

    def handles(self, item_ids: Sequence[str], *, create: bool = False) -> Int64[np.ndarray, " B"]:
        """Numbers that stand for series in `observe_at`: look them up once, use them at every tick.

        A handle is good until its series is evicted, reset, loaded anew or moved by `compact`; then it is refused.

        Args:
            item_ids: which series.
            create: whether unknown series get one too; they are created by their first row, as in `observe`.

        Raises:
            KeyError: a series is not known, and `create` is not set.
            ValueError: a name that cannot be taken.
        """
        if not create:
            slots = self._slots_of(item_ids)
            return self._ledger.serial[slots] << 32 | slots
        for item in item_ids:
            problem = None if item in self._slots else item_id_problem(item)
            if problem:
                raise ValueError(f"series {printable(item)!r}: {problem}")
        found = [self._slots.get(item) for item in item_ids]
        out = np.empty(len(found), np.int64)
        for i, (item, slot) in enumerate(zip(item_ids, found, strict=True)):
            if slot is None:
                out[i] = -1 - len(self._promised)
                self._promised.append(item)
            else:
                out[i] = self._ledger.serial[slot] << 32 | slot
        self._kept = np.append(self._kept, np.zeros(len(self._promised) - len(self._kept), np.int64))
        return out

    @torch.no_grad()
    def observe_at(
        self,
        handles: Int64[np.ndarray, " B"],
        values: np.ndarray,
        timestamp: Any,
        observed: Bool[np.ndarray, "..."] | None = None,
    ) -> ObserveReport:
        """One step of many series, without names: `observe` for 10^5 rows and more, by the same rules.

        Where each row is the next step of its series nothing loops over them; else the rows go the way of `observe`.

        Args:
            handles: see `handles`.
            values: (B,) or (B, V) in the unit of each series; NaN = missing.
            timestamp: of all rows.
            observed: of the same shape as the values; False = missing.

        Raises:
            ValueError: a stale handle, a wrong shape or a time that cannot be read; nothing has been applied.
        """
        stamp, V = read_stamp(timestamp), len(self.variates)
        matrix = np.asarray(values, np.float64)
        if matrix.shape not in ((len(handles), V), (len(handles),)) or (matrix.ndim == 1 and V > 1):
            raise ValueError(f"values have shape {matrix.shape}, expected ({len(handles)}, {V}): one row per handle")
        if observed is not None and observed.shape != matrix.shape:
            raise ValueError(f"observed has shape {observed.shape}, the values {matrix.shape}: expected the same")
        if observed is not None:
            matrix = np.where(observed, matrix, np.nan)
        matrix = matrix.reshape(-1, V)
        slots, names = self._owners(handles)
        order = None if bool((np.diff(slots) > 0).all()) else np.argsort(slots, kind="stable")
        if order is not None:
            slots, matrix = slots[order], matrix[order]
        if len(slots) == 0 or not self._is_plain(slots, stamp, matrix):
            places = range(len(slots)) if order is None else order.tolist()
            items = [
                self._names[slot] if slot >= 0 else names[place]
                for slot, place in zip(slots.tolist(), places, strict=True)
            ]
            rows = matrix[:, 0].tolist() if V == 1 else matrix.tolist()
            return self.observe(from_objects(items, [stamp] * len(slots), rows, self.variates, places=places))
        self._calls += 1
        self._ledger.used[slots] = self._calls
        self._tick(slots, self._ledger.head[slots], sizable(matrix))
        missing = int(np.isnan(matrix).all(axis=1).sum())
        self.last_report = ObserveReport(accepted=len(slots) - missing, missing=missing)
        return self.last_report

    def _owners(self, handles: np.ndarray) -> tuple[np.ndarray, dict[int, str]]:
        """The slots of handles, and by place the names of those whose series are not created yet (slot -1)."""
        handles, names = np.asarray(handles, np.int64), {}
        later = np.flatnonzero(handles < 0)
        if len(later):
            number = -1 - handles[later]
            if (number >= len(self._promised)).any():
                raise ValueError(f"handle {handles[later].min()} is not one of this predictor's: call handles again")
            for i in np.flatnonzero(self._kept[number] == 0).tolist():
                item = self._promised[number[i]]
                if item in self._slots:
                    self._kept[number[i]] = self.handles([item])[0]
                else:
                    names[int(later[i])] = item
            handles = handles.copy()
            handles[later] = self._kept[number]
        slots = handles & 0xFFFFFFFF
        unborn = handles == 0
        there = slots < self._pool.capacity
        good = there & (self._ledger.serial[np.where(there, slots, 0)] == handles >> 32) if there.any() else there
        if not (good | unborn).all():
            place = int((~(good | unborn)).argmax())
            raise ValueError(f"handle {place} is stale, its series was evicted or moved: call handles again")
        return np.where(unborn, -1, slots), names

    def _is_plain(self, slots: np.ndarray, stamp: np.datetime64, values: np.ndarray) -> bool:
        """Whether each row, sorted by slot, is simply the next of its own series."""
        if slots[0] < 0 or self._held or bool((np.diff(slots) == 0).any()) or (np.abs(values) > LARGEST).any():
            return False
        starts = self._ledger.start[slots]
        if (np.abs(stamp.astype("M8[D]") - starts.astype("M8[D]")) > CENTURIES).any():
            return False
        steps, on_grid = self.clock.steps(starts, stamp)
        return bool(on_grid.all()) and bool((steps == self._ledger.head[slots]).all())

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
        self._admit([series.item_id for series in items])
        new = [series for series in items if series.item_id not in self._slots and len(series)]
        self._make_room(len(new), {series.item_id for series in items})
        self._create({series.item_id: series.start for series in new})
        self._set_static(new)
        self._calls += 1
        self._ledger.used[self._slots_of([series.item_id for series in items if len(series)])] = self._calls
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
        self._extend(np.asarray(slots, np.int64), pieces, chunk=chunk, by_patch=False)
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
        if plan.evicted:
            self._make_room(len(plan.created), set(plan.touched))
        capacity = self._pool.capacity
        created = self._create(plan.created)
        self._calls += 1
        self._ledger.used[plan.known] = self._ledger.used[created] = self._calls

        def slot_of(key: int) -> int:
            return key if key < capacity else int(created[key - capacity])

        for item, block in features.items():
            if item in self._slots:
                slot = self._slots[item]
                self._features.give(slot, int(self._ledger.head[slot]), block)
        ledger = self._ledger
        self._patch(plan.fills)
        if plan.tick is not None and len(plan.tick[0]):
            keys, steps, values = plan.tick
            fresh = keys >= capacity
            slots = keys.copy()
            slots[fresh] = created[keys[fresh] - capacity]
            self._tick(slots, steps, values)
        if plan.runs:
            slots = np.fromiter((slot_of(key) for key, _, _ in plan.runs), np.int64, len(plan.runs))
            pieces = [
                self._pieces(int(ledger.head[slot]), steps, values)
                for slot, (_, steps, values) in zip(slots.tolist(), plan.runs, strict=True)
            ]
            self._extend(slots, pieces, by_patch=self.exact)
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
            tuple(plan.bad), plan.revised,
        )  # fmt: skip
        return self.last_report

    def _tick(self, slots: np.ndarray, steps: np.ndarray, values: Float64[np.ndarray, "B V"]) -> None:
        """Takes in the next step of each series."""
        ledger = self._ledger
        ledger.write(slots, steps, values, told(values))
        ledger.head[slots] = steps + 1
        ledger.values[slots] += (~np.isnan(values)).sum(axis=1)
        self._close(slots)

    def _books(self) -> Books:
        """What the judge must know."""
        ledger, anchors = self._ledger, self._anchors
        P, L = self.model.patch_size, self.late_window

        def window(slot: int) -> int:
            oldest = 0 if anchors is None else int(anchors.oldest(np.array([slot]))[0])
            return max(oldest, (int(ledger.head[slot]) // P - L) * P)

        return Books(self._slots, ledger, self._pool.capacity, self._held, self._registered, window if L else None)

    def _patch(self, fills: Sequence[tuple[int, int, np.ndarray]]) -> None:
        """Writes cells of the past and streams again what the model had taken in without them."""
        ledger = self._ledger
        firsts: dict[int, int] = {}
        for key, step, values in fills:
            place = step % ledger.ring
            given = ~np.isnan(values)
            ledger.values[key] += int(np.isnan(ledger.recent[key, given, place]).sum())
            ledger.recent[key, given, place] = values[given]
            ledger.told[key, given, place] = True
            firsts[key] = min(step, firsts.get(key, step))
        slots, first = np.fromiter(firsts, np.int64, len(firsts)), np.fromiter(firsts.values(), np.int64, len(firsts))
        past = first < ledger.applied[slots]
        self._close(slots[~past])
        self._replay(slots[past], first[past])

    def _replay(self, slots: np.ndarray, first: np.ndarray) -> None:
        """Streams the ring's cells again, from the last anchors at or before `first` (B,) on."""
        if not len(slots):
            return
        ledger, before = self._ledger, self._ledger.applied[slots]
        self._restore_anchors(slots, first)
        begin = ledger.applied[slots]
        before = np.where(before <= ledger.head[slots], before, begin)
        end = np.maximum(self._finished(slots, before), begin)
        due = end > begin
        if due.any():
            slots, begin, lengths = slots[due], begin[due], (end - begin)[due]
            self._advance(slots, ledger.cells(slots, begin, int(lengths.max())), lengths, self.exact)

    def _restore_anchors(self, slots: np.ndarray, first: np.ndarray) -> None:
        if self._anchors is None:
            raise RuntimeError("there is no late window to go back in")
        state, steps = self._anchors.restore(slots, first)
        static = self._pool.take(slots).static.clone()
        self._pool.put(slots, state._replace(static=static))
        self._ledger.applied[slots] = steps

    def _create(self, starts: Mapping[str, np.datetime64]) -> np.ndarray:
        """Slots for new series."""
        slots = self._pool.allocate(len(starts))
        if not len(slots):
            return slots
        ledger = self._ledger
        ledger.grow(self._pool.capacity)
        ledger.clear(slots)
        ledger.serial[slots] = self._born + 1 + np.arange(len(slots))
        self._born += len(slots)
        self._names = np.concatenate([self._names, np.full(self._pool.capacity - len(self._names), None, object)])
        self._names[slots] = list(starts)
        if self._anchors is not None:
            self._anchors.grow(self._pool.capacity)
            self._anchors.clear(slots)
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
            self._advance(slots, cells, lengths, self.exact)

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

    def _extend(self, slots: np.ndarray, pieces: list[list[Piece]], *, chunk: int = 4096, by_patch: bool) -> None:
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
                self._elapse(slots[[i for i, g in zip(active, gaps.tolist(), strict=True) if g == gap]], gap, by_patch)
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
                    self._advance(slots[block[: len(rest)]], cells, rest, by_patch)

    def _advance(
        self, slots: np.ndarray, cells: Float64[np.ndarray, "B V T"], lengths: np.ndarray, by_patch: bool
    ) -> None:
        """Gives cells to the model, with stops where anchors lie, or at the end of each patch.

        The only place where values enter a state.
        """
        ledger, anchors, P = self._ledger, self._anchors, self.model.patch_size
        begin = ledger.applied[slots]
        end = begin + lengths
        while True:
            at = ledger.applied[slots]
            live = np.flatnonzero(at < end)
            if not len(live):
                break
            stop = end if anchors is None else anchors.next_stop(at, end)
            if by_patch:
                stop = np.minimum(stop, (at // P + 1) * P)
            some, todo = slots[live], (stop - at)[live]
            part = _shifted(cells, live, (at - begin)[live], P if by_patch else int(todo.max()))
            for a in range(0, len(live), self.block):
                block = slice(a, a + self.block)
                now = some[block]
                self._pool.put(now, self._moved(now, part[block], todo[block], at=ledger.applied[now]))
                ledger.applied[now] += todo[block]
            self._note_anchors(some)
        self._features.trim(slots)

    def _note_anchors(self, slots: np.ndarray) -> None:
        """Keeps the states of series that stand where an anchor lies."""
        if self._anchors is None:
            return
        at = self._ledger.applied[slots]
        here = (at % self._anchors.stride == 0) & (at > self._anchors.steps[slots, 1])
        if here.any():
            self._anchors.note(slots[here], at[here], self._pool.take(slots[here]))

    def _moved(
        self,
        slots: np.ndarray,
        cells: Float64[np.ndarray, "B V T"],
        lengths: np.ndarray,
        *,
        at: np.ndarray,
        state: Any = None,
    ) -> Any:
        """States, the pool's if none are given, at the steps `at` (B,) after `lengths` more cells.

        The pool is not changed.
        """
        rows = self._bucket(len(slots))
        cells, lengths = cells[rows], lengths[rows]
        T = cells.shape[2]
        values = torch.from_numpy(np.ascontiguousarray(cells))
        device = self._device
        batch = Batch(
            values.nan_to_num(nan=0.0).to(device),
            (~values.isnan() & (torch.arange(T) < torch.from_numpy(lengths)[:, None])[:, None]).to(device),
            self._features.columns(slots[rows], at[rows], T + self.model.span),
            lengths=None if not self.exact and bool((lengths == T).all()) else torch.from_numpy(lengths).to(device),
        )
        before = self._states(slots, state)
        after = self.model(batch, before, read=torch.zeros(0, dtype=torch.int64, device=device))[1]
        return map_state(lambda leaf: leaf[: len(slots)], after)

    def _bucket(self, count: int) -> np.ndarray:
        """Which rows go into a call of the model: all, or with `exact` as many as a bucket has, the first repeated."""
        rows = np.arange(count)
        return (
            np.append(rows, np.zeros(self.block - count, np.int64)) if 0 < count < self.block and self.exact else rows
        )

    def _states(self, slots: np.ndarray, state: Any = None) -> Any:
        """The states that a call of the model reads, those of the pool if none are given."""
        rows = self._bucket(len(slots))
        if state is None:
            state = self._pool.take(slots[rows])
            # bits may depend on where in memory a tensor begins
            return map_state(torch.clone, state) if self.exact else state
        return take_rows(state, torch.from_numpy(rows).to(self._device)) if self.exact else state

    def _elapse(self, slots: np.ndarray, gap: int, by_patch: bool) -> None:
        """Silence, in closed form, with stops where anchors lie; `by_patch` for as long as it makes tokens."""
        ledger = self._ledger
        if by_patch:
            first = min(gap, (self.model.gap_tokens + 2) * self.model.patch_size)
            nothing = np.full((len(slots), len(self.variates), first), np.nan)
            self._advance(slots, nothing, np.full(len(slots), first), by_patch)
            gap -= first
        end = ledger.applied[slots] + gap
        while True:
            at = ledger.applied[slots]
            stop = end if self._anchors is None else self._anchors.next_stop(at, end)
            rest = stop - at
            if not rest.any():
                break
            for silence in np.unique(rest[rest > 0]).tolist():
                some = slots[rest == silence]
                for begin in range(0, len(some), self.block):
                    part = some[begin : begin + self.block]
                    self._pool.put(part, self._silent(part, silence, at=ledger.applied[part]))
                    ledger.applied[part] += silence
                self._note_anchors(some)
        self._features.trim(slots)

    def _silent(self, slots: np.ndarray, steps: int, *, at: np.ndarray, state: Any = None) -> Any:
        """States, the pool's if none are given, at the steps `at` (B,) after so many more without a value.

        The pool is not changed.
        """
        rows = self._bucket(len(slots))

        def known(a: int, b: int) -> Any:
            return self._features.columns(slots[rows], at[rows] + a, b - a)

        after = self.model.elapse(self._states(slots, state), steps, known=known if self.model.known_features else None)
        return map_state(lambda leaf: leaf[: len(slots)], after)

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
        as_of: Any = None,
    ) -> ForecastBatch:
        """Forecasts the next `horizon` steps from what has been observed so far; changes nothing.

        Args:
            item_ids: which series; all if not given.
            horizon: steps from the first unobserved one.
            as_of: time of the last step that counts as past, between two steps the earlier one: until then nothing was
                observed after the head. The default is each series' own last step.
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
            ValueError: horizon or levels out of range, or `as_of` lies before the head of a series.
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
        head = self._ledger.head[slots] if as_of is None else self._heads_at(items, slots, as_of)
        # a forecast may not fill memory with quantiles that nobody asked for
        block = max(1, min(self.block, 20_000_000 // (int(horizon) * len(fitted) * len(self.variates))))
        values = np.empty((len(slots), len(self.targets), int(horizon), len(levels)))
        for begin in range(0, len(slots), block):
            part = slots[begin : begin + block]
            raw = self._forecast_block(part, head[begin : begin + block], int(horizon), features)
            raw = raw[:, : len(self.targets)].cpu().numpy()
            if levels != fitted:
                raw = np.maximum.accumulate(raw @ mixing, axis=-1)
            values[begin : begin + block] = raw
        ledger, P = self._ledger, self.model.patch_size
        phase = head % P
        direct = np.where(phase > 0, self.model.span - phase, self.model.direct_steps)
        tail = frozenset({"tail"} if levels[0] < fitted[0] - 1e-12 or levels[-1] > fitted[-1] + 1e-12 else ())
        flags = tuple(
            tail | ({"cold"} if cold else set()) | ({"rollout"} if far else set())
            for cold, far in zip(ledger.values[slots] < self.min_values, horizon > direct, strict=True)
        )
        start = self.clock.timestamp(ledger.start[slots], head)
        return ForecastBatch(items, start, self.freq, levels, values, self.targets, flags)

    def _heads_at(self, items: Sequence[str], slots: np.ndarray, as_of: Any) -> np.ndarray:
        """Where the heads (B,) would be if nothing came until `as_of`."""
        head = self._step_of(slots, as_of) + 1
        before = head < self._ledger.head[slots]
        if before.any():
            row = int(before.argmax())
            last = self._time_of(int(slots[row]), int(self._ledger.head[slots[row]]) - 1)
            raise ValueError(
                f"as_of is {as_of}, but {printable(items[row])!r} has seen {last}: rewind a fork to look back"
            )
        return head

    def _forecast_block(
        self, slots: np.ndarray, head: np.ndarray, horizon: int, features: dict[int, np.ndarray]
    ) -> Float64[Tensor, "B V horizon Q"]:
        lent = {slot: features[slot] for slot in slots.tolist() if slot in features}
        with self._features.lent(lent):
            state = self._waited(slots, refresh=bool(lent))
            silence = head - self._ledger.head[slots]
            for steps in np.unique(silence[silence > 0]).tolist():
                rows = np.flatnonzero(silence == steps)
                index = torch.from_numpy(rows).to(self._device)
                at = self._ledger.head[slots[rows]]
                later = self._silent(slots[rows], steps, at=at, state=take_rows(state, index))
                state = map_state(lambda leaf, new, index=index: leaf.index_copy(0, index, new), state, later)
            columns = horizon + self.model.span + 2 * self.model.patch_size
            rows = self._bucket(len(slots))
            known = self._features.columns(slots[rows], head[rows], columns)
            return self.model.forecast(self._states(slots, state), horizon, known=known)[: len(slots)]

    def _waited(self, slots: np.ndarray, *, refresh: bool) -> Any:
        """Copies of the states that have taken in the waiting cells; `refresh` also where none waits."""
        ledger = self._ledger
        at, lengths = ledger.applied[slots], ledger.head[slots] - ledger.applied[slots]
        if not self.exact:
            if not (lengths.any() or refresh):
                return self._pool.take(slots)
            return self._moved(slots, ledger.cells(slots, at, int(lengths.max())), lengths, at=at)
        P, state = self.model.patch_size, None
        while state is None or lengths.any():  # a whole patch may wait for cells that nobody has told
            step = np.minimum(lengths, P - at % P)
            state = self._moved(slots, ledger.cells(slots, at, P), step, at=at, state=state)
            at, lengths = at + step, lengths - step
        return state

    def _slots_of(self, items: Collection[str]) -> np.ndarray:
        try:
            return np.fromiter((self._slots[item] for item in items), np.int64, len(items))
        except KeyError as error:
            name = printable(error.args[0])
            raise KeyError(f"series {name!r} is not known: observe it first ({len(self)} series are)") from None

    # ---- whole states -----------------------------------------------------------------------------------------------

    def reset(self, item_ids: Iterable[str] | str) -> None:
        """Makes series as if never seen; their next row starts them anew."""
        items = _names(item_ids)
        self.delete(items)
        self._registered.update(items)

    def evict(self, item_ids: Iterable[str] | str | None = None, *, keep: int | None = None) -> int:
        """Frees slots: of the series that are named, or of those that were not observed for longest.

        Without a store the states are gone, and the next row of such a series starts it anew.

        Args:
            item_ids: which series may go; all if not given.
            keep: how many shall remain; the latest observed do, forecasts do not count. Only then may `item_ids` be
                left out.

        Returns:
            How many were evicted.

        Raises:
            KeyError: a series is not known.
            ValueError: neither argument is given, or `keep` is negative.
        """
        if keep is None and item_ids is None:
            raise ValueError("evict needs item_ids, or keep= for how many series shall remain")
        if keep is not None and keep < 0:
            raise ValueError(f"keep is {keep}, expected at least 0 series")
        items = self.item_ids if item_ids is None else tuple(dict.fromkeys(_names(item_ids)))
        slots = self._slots_of(items)
        if keep is not None:
            order = np.argsort(self._ledger.used[slots], kind="stable")[: max(0, len(self) - keep)]
            items = tuple(items[i] for i in order.tolist())
        if items:
            self._spill(items)
            self.delete(items)
        return len(items)

    def delete(self, item_ids: Iterable[str] | str) -> int:
        """Forgets series for good and frees their slots; gives back how many.

        Raises:
            KeyError: a series is not known; nothing has been deleted.
        """
        items = tuple(dict.fromkeys(_names(item_ids)))
        slots = self._slots_of(items)
        self._pool.release(slots)
        self._ledger.clear(slots)
        self._names[slots] = None
        if self._anchors is not None:
            self._anchors.clear(slots)
        for item, slot in zip(items, slots.tolist(), strict=True):
            del self._slots[item]
            self._features.forget(slot)
            self._held.pop(item, None)
            self._registered.discard(item)
        return len(items)

    def compact(self) -> int:
        """Moves series from the highest slots into holes and frees the memory behind; no bit of a state changes.

        Handles of the series that move are stale afterwards.

        Returns:
            Bytes that were freed.
        """
        before = self._pool.capacity
        source, target = self._pool.moves()
        self._pool.move(source, target)
        self._ledger.put(target, self._ledger.rows(source))
        self._ledger.clear(source)
        self._features.move(source, target)
        self._names[target], self._names[source] = self._names[source], None
        self._slots.update(zip(self._names[target].tolist(), target.tolist(), strict=True))
        if self._anchors is not None:
            self._anchors.move(source, target)
        self._pool.shrink(len(self))
        for part in (self._ledger, self._anchors):
            if part is not None:
                part.shrink(self._pool.capacity)
        self._names = self._names[: self._pool.capacity].copy()
        return (before - self._pool.capacity) * self.nbytes_per_series

    def _spill(self, items: Sequence[str]) -> None:
        """Called before series are evicted; where there is a store, it takes them."""

    def _reload(self, items: Sequence[str]) -> None:
        """Called before rows of unknown series are judged; where there is a store, it brings back those it has."""

    def _admit(self, items: Iterable[str]) -> None:
        """Brings back those of the series that are in a store, as many as there may be."""
        named = set(items)
        unknown = named.difference(self._slots)
        if not unknown:
            return
        chosen, limit = [item for item in dict.fromkeys(items) if item in unknown], self._judge.max_series
        if limit is not None:
            staying = len(named) - len(unknown) if self._judge.evict else len(self)
            chosen = chosen[: max(0, limit - staying)]
        self._reload(chosen)
        if self._judge.evict:
            self._make_room(0, named)

    def _make_room(self, count: int, staying: set[str]) -> None:
        """Evicts as many series as it takes for `count` new ones, none of those that stay."""
        limit = self._judge.max_series
        if limit is None or len(self) + count <= limit:
            return
        if not self._judge.evict or len(staying & self._slots.keys()) + count > limit:
            raise ValueError(f"{len(self) + count} series, max_series is {limit}: evict some first")
        self.evict([item for item in self._slots if item not in staying], keep=limit - count)

    def fork(self, item_ids: Sequence[str] | None = None) -> "StatefulPredictor":
        """A predictor with the same weights and copied states: what happens to one does not reach the other."""
        items = self.item_ids if item_ids is None else tuple(dict.fromkeys(_names(item_ids)))
        other = self._empty_twin()
        other._registered = set(self._registered)
        other._restore(*self._contents(items))
        return other

    @torch.no_grad()
    def rewind(self, item_ids: Iterable[str] | str, to: Any) -> None:
        """Makes series as if nothing after `to` had been observed; on a fork, if the present is to stay.

        The late window fills again from there: until then it reaches to the earliest state that was held.

        Args:
            item_ids: which series.
            to: time of the last step that remains; between two steps, the earlier one.

        Raises:
            KeyError: a series is not known.
            ValueError: `to` lies after the head, or before the earliest state that is held (see `late_window`), which
                is named; nothing has been changed.
        """
        items = tuple(dict.fromkeys(_names(item_ids)))
        slots = self._slots_of(items)
        if not len(slots):
            return
        ledger = self._ledger
        head = self._step_of(slots, to) + 1
        ahead = head > ledger.head[slots]
        oldest = ledger.applied[slots] if self._anchors is None else self._anchors.oldest(slots)
        earliest = np.maximum(np.minimum(oldest, ledger.head[slots]), 1)
        if ahead.any():
            item, slot = items[int(ahead.argmax())], int(slots[ahead][0])
            last = self._time_of(slot, int(ledger.head[slot]) - 1)
            raise ValueError(f"cannot rewind {printable(item)!r} to {to}: its last step is {last}")
        if (head < earliest).any():
            row = int((head < earliest).argmax())
            first = self._time_of(int(slots[row]), int(earliest[row]) - 1)
            raise ValueError(
                f"cannot rewind {printable(items[row])!r} to {to}: the earliest time that is held is {first}; "
                "a larger late_window reaches further"
            )
        for slot, new, old in zip(slots.tolist(), head.tolist(), ledger.head[slots].tolist(), strict=True):
            gone = np.arange(max(new, old - ledger.ring), old) % ledger.ring
            ledger.values[slot] -= int((~np.isnan(ledger.recent[slot][:, gone])).sum())
            ledger.recent[slot][:, gone], ledger.told[slot][:, gone] = np.nan, False
        ledger.head[slots] = head
        back = head < ledger.applied[slots]
        self._replay(slots[back], head[back])
        for item in items:
            self._held.pop(item, None)

    def _next_times(self, items: Sequence[str]) -> np.ndarray:
        slots = self._slots_of(items)
        return self.clock.timestamp(self._ledger.start[slots], self._ledger.head[slots])

    def _time_of(self, slot: int, step: int) -> str:
        return show(self.clock.timestamp(self._ledger.start[[slot]], step)[0])

    def _step_of(self, slots: np.ndarray, time: Any) -> np.ndarray:
        """The step (B,) of each series that a time falls into."""
        stamp = read_stamp(time)
        return self.clock.steps(self._ledger.start[slots], stamp)[0]

    def save(self, path: str | Path, *, offset: Any = None, item_ids: Iterable[str] | str | None = None) -> None:
        """Writes states into a folder, at one cut; a crash leaves the snapshot before.

        Args:
            path: a folder, made if absent.
            item_ids: which series; all if not given.
            offset: place in the source after what was observed, plain JSON, for `load` to give back.
        """
        items = self.item_ids if item_ids is None else tuple(dict.fromkeys(_names(item_ids)))
        tensors, header = self._contents(items)
        snapshot.write(path, tensors, {**header, "offset": offset}, model=self.fingerprint)

    def load(self, path: str | Path, *, merge: Literal["replace", "newer", "refuse"] = "replace") -> Any:
        """Takes states from a folder, bit for bit, and gives back the offset stored with them.

        Args:
            path: written by `save`.
            merge: "replace" puts the folder's series in the place of all that there are. The others add them to those:
                of a series on both sides "newer" takes the one whose head is later (ours, if it is the same), "refuse"
                takes none.

        Raises:
            FileNotFoundError: nothing was saved there.
            SnapshotRefused: of another model, frequency, late window or variates, of a newer format, damaged, or with
                series that are here already (see `merge`); nothing changed.
            ValueError: there would be more than `max_series`; nothing changed.
        """
        if merge not in ("replace", "newer", "refuse"):
            raise ValueError(f"merge is {merge!r}, expected 'replace', 'newer' or 'refuse'")
        tensors, header = snapshot.read(path, model=self.fingerprint)
        header.setdefault("late_window", 0)
        for name, mine in (
            ("freq", self.freq),
            ("variates", list(self.variates)),
            ("calendar", self.calendar),
            ("late_window", self.late_window),
        ):
            if header.get(name) != mine:
                raise snapshot.SnapshotRefused(
                    f"the states in {path} have {name} {header.get(name)!r}, expected {mine!r}"
                )
        fresh = self._empty_twin()
        try:
            fresh._restore(tensors, header)
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise snapshot.SnapshotRefused(f"the states in {path} do not fit this model: {error}") from None
        if merge == "replace":
            self._adopt(fresh)
        else:
            self._merge(fresh, path, newer=merge == "newer")
        return header.get("offset")

    def _adopt(self, other: "StatefulPredictor") -> None:
        if self._judge.max_series is not None and len(other) > self._judge.max_series:
            raise ValueError(f"{len(other)} series, max_series is {self._judge.max_series}: raise it")
        for name in ("_slots", "_names", "_pool", "_anchors", "_ledger", "_held", "_features", "_registered", "_born"):
            setattr(self, name, getattr(other, name))

    def _merge(self, other: "StatefulPredictor", path: str | Path, *, newer: bool) -> None:
        both = tuple(item for item in other.item_ids if item in self._slots)
        if both and not newer:
            raise snapshot.SnapshotRefused(
                f"series {printable(both[0])!r} of {path} is here already ({len(both)} are): load with merge='newer'"
            )
        behind = self._next_times(both) < other._next_times(both)
        stale = {item for item, is_behind in zip(both, behind.tolist(), strict=True) if is_behind}
        wanted = [item for item in other.item_ids if item in stale or item not in self._slots]
        self._make_room(len(wanted) - len(stale), {*wanted, *both})
        self.delete(stale)
        self._restore(*other._contents(wanted))

    def state_tensors(self, item_ids: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Everything that is held of series, as named tensors: what `save` writes. Copies."""
        return self._contents(self.item_ids if item_ids is None else _names(item_ids))[0]

    def _empty_twin(self) -> "StatefulPredictor":
        twin = object.__new__(StatefulPredictor)
        twin.__dict__.update(self.__dict__)
        twin._registered = set()
        twin._promised, twin._kept = [], np.zeros(0, np.int64)
        twin._clear()
        return twin

    def _contents(self, items: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        slots = self._slots_of(items)
        tensors: dict[str, Tensor] = {}
        if len(slots):
            state = map_state(torch.clone, self._pool.take(slots))
            tensors |= {f"state.{name}": leaf for name, leaf in state_leaves(state)}
        for name, array in self._ledger.rows(slots).items():
            if name in Ledger.SAVED:
                plain = array.view(np.int64) if array.dtype.kind == "M" else array
                tensors[f"ledger.{name}"] = torch.from_numpy(np.ascontiguousarray(plain))
        if len(slots) and self._anchors is not None:
            *both, steps = self._anchors.rows(slots)
            tensors["anchor.steps"] = torch.from_numpy(steps)
            for age, anchor in zip(("older", "younger"), both, strict=True):
                tensors |= {f"anchor.{age}.{name}": leaf for name, leaf in state_leaves(anchor)}
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
            "late_window": self.late_window,
            "known_from": future,
            "held": held,
            "used": np.argsort(np.argsort(self._ledger.used[slots], kind="stable")).tolist(),
            "registered": sorted(self._registered),
        }
        return tensors, header

    def _restore(self, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
        """Fills an empty predictor."""
        items = list(header["items"])
        ledger = {name: tensors[f"ledger.{name}"].numpy() for name in Ledger.SAVED}
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
            self._pool.put(slots, _state_from(tensors, "state", own))
            if self._anchors is not None:
                older, younger = (_state_from(tensors, f"anchor.{age}", own) for age in ("older", "younger"))
                self._anchors.put(slots, older, younger, tensors["anchor.steps"].numpy())
        for place, origin in header["known_from"].items():
            self._features.give(int(slots[int(place)]), int(origin), tensors[f"known.{place}"].numpy())
        for item, rows in header["held"].items():
            self._held[item] = [
                Held(step, np.datetime64(stamp, "ns"), np.array(values, np.float64), None)
                for step, stamp, values in rows
            ]
        self._registered |= set(header["registered"])
        if header.get("used"):  # in what order series were observed; before all that are here already
            self._ledger.used[slots] = np.asarray(header["used"], np.int64) - len(items)

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


def _state_from(tensors: Mapping[str, Tensor], prefix: str, like: Any) -> Any:
    """A state of the structure of another out of named leaves."""
    wrong = [name for name, leaf in state_leaves(like) if tensors[f"{prefix}.{name}"].shape != leaf.shape]
    if wrong:
        raise ValueError(f"{prefix} leaf {wrong[0]} has another shape")
    leaves = iter([tensors[f"{prefix}.{name}"] for name, _ in state_leaves(like)])
    return map_state(lambda leaf: next(leaves).to(leaf.device), like)


def _shifted(cells: Float64[np.ndarray, "B V T"], rows: np.ndarray, shift: np.ndarray, steps: int) -> np.ndarray:
    """So many cells of some rows, from a column of each row's own on; NaN beyond the last."""
    if not shift.any() and len(rows) == len(cells) and steps <= cells.shape[2]:
        return cells[:, :, :steps]
    columns = shift[:, None] + np.arange(steps)
    part = np.take_along_axis(cells[rows], np.minimum(columns, cells.shape[2] - 1)[:, None], axis=2)
    return np.where((columns < cells.shape[2])[:, None], part, np.nan)


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
