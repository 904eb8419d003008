"""Live forecasting of many series: observations go into states of fixed size, forecasts come out at any moment.

    predictor = StatefulPredictor.from_pretrained(folder)
    predictor.observe(frame)                     # each row counts once, in whatever order rows come
    predictor.forecast(horizon=24)               # changes nothing

The cells of an unfinished patch wait in the ledger. When all of them are told, or a row beyond them comes, the model
takes the patch in, all series of a call in one batch. A forecast gives the waiting cells to a copy of the state. By the
law of this package neither can be told from streaming step by step, or from one pass over the whole history.

Here are the verbs. `rows` reads what comes, `verdicts` judges it, `advance` moves states on, `forecasting` reads them,
`residence` keeps them, `live` watches forecasts come true; `keeping` has the verbs for whole series.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Int64

from tsgdn.data.clock import Clock, show
from tsgdn.data.series import Series
from tsgdn.model import artefact
from tsgdn.model.forecaster import Forecaster
from tsgdn.streaming import forecasting, live, parity, tuning
from tsgdn.streaming.adapt import Learning
from tsgdn.streaming.advance import Piece, features_by_slot
from tsgdn.streaming.exact import rows_are_independent
from tsgdn.streaming.handles import Handles, is_plain
from tsgdn.streaming.keeping import Keeper
from tsgdn.streaming.live import Alarm
from tsgdn.streaming.parity import ParityReport
from tsgdn.streaming.residence import names
from tsgdn.streaming.rows import LARGEST, Rows, from_objects, item_id_problem, printable, read_rows, read_stamp, sizable
from tsgdn.streaming.single import take_one, the_row
from tsgdn.streaming.tuning import Tuning
from tsgdn.streaming.verdicts import Books, Judge, ObserveReport, Plan, joined
from tsgdn.types import ForecastBatch


class StatefulPredictor(Keeper):
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
        calibrate: whether forecasts get the widths that each series has shown to need, by its own misses; or the
            coverages to calibrate, whose levels the model must have.
        signals: kinds of `signals.KINDS` to speak of, or True for all: see `signals`.
        learning: of corrections that `adapt` learns per series; None = none.
        tuning: where widths and signals of a new series begin; the default is the model's own widths.
        max_gap: steps of silence after which the next value finds an empty memory (forecasts carry the flag "gap_reset"
            until it has seen enough), in whole patches; the default is never: memories decay by themselves.
        max_future_skew: seconds by which a row may be ahead of when it was received; see `observe`.
        grid: what a row off the grid of its series does: it is rejected ("exact"), or moves to the nearest step if it
            lies within a tenth of one ("nearest").
        compiled: numbers of series per call of the model for which one patch is compiled (`Forecaster.compile_steps`),
            or True: for one, with `exact` for the one size of all calls.

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
        calibrate: bool | Sequence[float] = False,
        signals: bool | Sequence[str] = (),
        learning: Learning | None = None,
        tuning: Tuning | None = None,
        max_gap: int | None = None,
        max_future_skew: int | float | None = None,
        grid: Literal["exact", "nearest"] = "exact",
        compiled: bool | Sequence[int] = False,
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
        if grid not in ("exact", "nearest"):
            raise ValueError(f"grid is {grid!r}, expected 'exact' or 'nearest'")
        if max_gap is not None and max_gap < model.patch_size:
            raise ValueError(f"max_gap is {max_gap}, expected at least a patch of {model.patch_size} steps")
        if max_future_skew is not None and not 0 <= max_future_skew < float("inf"):
            raise ValueError(f"max_future_skew is {max_future_skew}, expected seconds")
        if learning is not None and late_window:
            raise ValueError("learning= needs late_window=0: what was learned from a value cannot be learned anew")
        self.late_window, self.max_gap = late_window, max_gap
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
        on_cpu = next(self.model.parameters()).device.type == "cpu"
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
            nearest=grid == "nearest",
            max_future_skew=max_future_skew,
        )
        self.fingerprint = artefact.fingerprint(model)
        self.last_report = ObserveReport()
        self._calls = 0  # that observed
        self._handles = Handles()
        self.calibrates, self.kinds = bool(calibrate), live.kinds_of(signals)
        self._new_watch = live.watch_maker(
            model, len(self.targets), calibrate=calibrate, watches=bool(self.kinds), learning=learning, tuning=tuning
        )
        self.learning = learning
        self._alarms: tuple[Alarm, ...] = ()
        self._clear()
        if compiled:
            sizes = ((self.block,) if exact else (1,)) if isinstance(compiled, bool) else compiled
            self.model.compile_steps(sizes, variates=len(self.variates))
        if exact and not rows_are_independent(self.model, self.block, len(self.variates)):
            raise ValueError(
                f"exact=True: on {self._device} the bits of this model's rows depend on their place in a call of "
                f"{self.block}; a width of 16 or more that 8 divides mends it, else leave exact out"
            )

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, device: torch.device | str = "auto", **options: Any
    ) -> "StatefulPredictor":
        """A predictor for the model in a folder; reads config.json, model.safetensors, parity.json and watch.json.

        It warns where parity.json does not vouch for the device; watch.json is read only to watch.

        Args:
            folder: written by `Forecaster.save_pretrained` or `tsgdn fit`.
            device: "auto" is the GPU if there is one.
            options: arguments of `StatefulPredictor`; those left out come from the folder.

        Raises:
            ValueError: the folder is no model, its certificate is another model's, or it does not say what frequency it
                is for and none is given.
        """
        info = artefact.read_series_info(folder)
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        from tsgdn.streaming import certificate  # it makes predictors itself

        model = artefact.load(folder, device=device)
        certificate.check(folder, model, device)
        options.setdefault("freq", info.get("freq"))
        if options["freq"] is None:
            raise ValueError(f"{folder} does not say what frequency it is for: give freq=")
        for name in ("calendar", "variates", "targets", "horizon"):
            if info.get(name) is not None:
                options.setdefault(name, info[name])
        if options.get("calibrate") or options.get("signals") or options.get("learning") is not None:
            options.setdefault("tuning", tuning.read(folder))
        return cls(model, **options)

    # ---- observe ----------------------------------------------------------------------------------------------------

    def observe(
        self,
        data: Any,
        *,
        timestamp: Any = None,
        known: Mapping[str, np.ndarray] | None = None,
        errors: Literal["report", "raise"] = "report",
        received: Any = None,
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
            received: when the source got the rows: one time, or one per row. Rows that are further ahead of it than
                `max_future_skew` are rejected (`ts.future`); None, and there is no such check.

        Returns:
            Counts, every row set aside, and, where forecasts are watched, what the values were worth (`pit`).

        Raises:
            ValueError: wrong columns, types, variates or known features, or a bad row with errors="raise"; nothing has
                been applied.
        """
        if errors not in ("report", "raise"):
            raise ValueError(f"errors is {errors!r}, expected 'report' or 'raise'")
        if not known and received is None and self._series.watch is None and isinstance(data, dict | list):
            row = the_row(data, timestamp)
            slot = None if row is None else take_one(self._engine, *row)
            if slot is not None:
                self._calls += 1
                self._ledger.used[slot] = self._calls
                self.last_report = ObserveReport(1)
                return self.last_report
        rows = read_rows(data, timestamp=timestamp, variates=self.variates, known_ids=self._slots)
        if rows.values.shape[1] != len(self.variates):
            raise ValueError(f"rows have {rows.values.shape[1]} values, expected {len(self.variates)}")
        self._admit(rows.item_ids)
        plan = self._judge(rows, self._books(), received=received)
        if errors == "raise" and plan.bad:
            worst = plan.bad[0]
            raise ValueError(
                f"{worst.code}: item {worst.item_id} at {worst.timestamp}: {worst.text} "
                f"({len(plan.bad)} bad rows, nothing was applied)"
            )
        features = {item: self._features.checked(item, block) for item, block in (known or {}).items()}
        stray = [item for item in features if item not in self._slots]
        if stray and not set(stray) <= {*rows.item_ids, *(bad.item_id for bad in rows.bad)}:
            raise ValueError(f"known features of {printable(stray[0])!r}: the series is not known and has no row here")
        return self._apply(plan, rows, features)

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
        return self._handles.of(self._series, item_ids, create=create)

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
        slots, promised = self._handles.owners(self._series, handles)
        order = None if bool((slots[1:] > slots[:-1]).all()) else np.argsort(slots, kind="stable")
        if order is not None:
            slots, matrix = slots[order], matrix[order]
        heads = is_plain(self._series, slots, stamp, matrix) if len(slots) else None
        if heads is None:
            places = range(len(slots)) if order is None else order.tolist()
            items = [
                self._series.names[slot] if slot >= 0 else promised[place]
                for slot, place in zip(slots.tolist(), places, strict=True)
            ]
            rows = matrix[:, 0].tolist() if V == 1 else matrix.tolist()
            return self.observe(from_objects(items, [stamp] * len(slots), rows, self.variates, places=places))
        self._calls += 1
        self._ledger.used[slots] = self._calls
        self._engine.tick(slots, heads, sizable(matrix))
        missing = int(np.isnan(matrix).all(axis=1).sum())
        pit = self._heard(len(slots), np.arange(len(slots)) if order is None else order, slots, heads, matrix)
        self.last_report = ObserveReport(accepted=len(slots) - missing, missing=missing, pit=pit)
        return self.last_report

    def step(
        self,
        data: Any,
        *,
        timestamp: Any = None,
        horizon: int | None = None,
        quantile_levels: Sequence[float] | None = None,
        known: Mapping[str, np.ndarray] | None = None,
    ) -> ForecastBatch:
        """Observes, then forecasts the series that rows came for; `last_report` tells what became of the rows."""
        rows = read_rows(data, timestamp=timestamp, variates=self.variates, known_ids=self._slots)
        self.observe(rows, known=known)
        touched = [item for item in dict.fromkeys(rows.item_ids) if item in self._slots]
        return self.forecast(touched, horizon=horizon, quantile_levels=quantile_levels)

    def warm_up(self, data: Any, *, chunk: int = 4096) -> ObserveReport:
        """Takes in histories in one parallel pass: the same states as observing them row by row.

        Where forecasts are watched, those of the history are scored as well; `signals` tells nothing of it.

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
        self._series.set_static({series.item_id: series.static for series in new if series.static})
        self._calls += 1
        self._ledger.used[self._series.find([series.item_id for series in items if len(series)])] = self._calls
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
        self._engine.extend(np.asarray(slots, np.int64), pieces, chunk=chunk, by_patch=False)
        self._engine.heard.clear()
        self.last_report, self._alarms = report, ()
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

    # ---- changing the states ----------------------------------------------------------------------------------------

    def _apply(self, plan: Plan, rows: Rows, features: Mapping[str, np.ndarray]) -> ObserveReport:
        if plan.evicted:
            self._make_room(len(plan.created), set(rows.item_ids))
        capacity = self._pool.capacity
        created = self._create(plan.created)
        self._calls += 1
        self._ledger.used[plan.known] = self._ledger.used[created] = self._calls

        def slots_of(keys: np.ndarray) -> np.ndarray:
            if not len(created):
                return keys
            return np.where(keys < capacity, keys, created[np.maximum(keys - capacity, 0) % len(created)])

        for item, block in features.items():
            if item in self._slots:
                slot = self._slots[item]
                self._features.give(slot, int(self._ledger.head[slot]), block)
        engine = self._engine
        engine.fill(plan.fills)
        if plan.tick is not None and len(plan.tick[0]):
            keys, steps, values = plan.tick
            engine.tick(slots_of(keys), steps, values)
        if plan.runs:
            keys = np.array([key for key, _, _ in plan.runs], np.int64)
            engine.runs(slots_of(keys), [(steps, values) for _, steps, values in plan.runs])
        for item, held in plan.held.items():
            if held:
                self._held[item] = [other._replace(row=None) for other in held]
            else:
                self._held.pop(item, None)
        pit = None
        if self._series.watch is not None:
            places, keys, steps, at = plan.placed()
            count = 1 + max((*rows.places.tolist(), *(bad.row for bad in plan.bad if bad.row is not None)), default=-1)
            pit = self._heard(count, places, slots_of(keys), steps, rows.values[at])
        self.last_report = plan.report(pit)
        return self.last_report

    def _heard(
        self, count: int, places: np.ndarray, slots: np.ndarray, steps: np.ndarray, values: np.ndarray
    ) -> np.ndarray | None:
        """PITs (rows, V) of a call whose rows have been taken in; what was odd about them is kept for `signals`."""
        if self._series.watch is None:
            return None
        heard = self._engine.heard
        pit, self._alarms = live.worth(
            self._series, heard, count, places, slots, steps, values[:, : len(self.targets)], self.targets, self.kinds
        )
        heard.clear()
        return pit

    def _books(self) -> Books:
        """What the judge must know."""
        series, ledger = self._series, self._ledger
        P, L = self.model.patch_size, self.late_window

        def window(slot: int) -> int:
            oldest = 0 if series.anchors is None else int(series.anchors.oldest(np.array([slot]))[0])
            return max(oldest, (int(ledger.head[slot]) // P - L) * P)

        return Books(
            self._slots, ledger, self._pool.capacity, self._held, self._registered, window if L else None, series.pinned
        )

    # ---- forecast ---------------------------------------------------------------------------------------------------

    def forecast(
        self,
        item_ids: Sequence[str] | str | None = None,
        *,
        horizon: int | None = None,
        quantile_levels: Sequence[float] | None = None,
        known: Mapping[str, np.ndarray] | None = None,
        as_of: Any = None,
        calibrated: bool = True,
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
            calibrated: whether widths are those that each series has shown to need; only where the predictor was made
                with `calibrate`. Corrections that `adapt` has learned are always in.

        Returns:
            Quantiles in the unit of the series. Flags: "cold" where few values were observed (NaN where none was),
            "gap_reset" where that is so because a long silence emptied the memory, "held" where rows far ahead wait for
            others to agree with them, "uncalibrated" where widths are not the series' own yet (of predictors that
            calibrate), "rollout" beyond the steps that one pass covers, "tail".

        Raises:
            KeyError: a series is not known.
            ValueError: horizon or levels out of range, or `as_of` lies before the head of a series.
        """
        items = self.item_ids if item_ids is None else names(item_ids)
        slots = self._series.find(items)
        steps = forecasting.check_horizon(self.horizon if horizon is None else horizon)
        fitted = tuple(self.model.quantile_levels)
        levels = fitted if quantile_levels is None else forecasting.check_levels(quantile_levels)
        lent = features_by_slot(self._series, known) if known else {}
        head = self._ledger.head[slots] if as_of is None else forecasting.heads_at(self._series, items, slots, as_of)
        values = forecasting.quantiles(
            self._engine, slots, head, steps, levels, lent, calibrated=calibrated and self.calibrates
        )
        flags = forecasting.flags(
            self._engine, items, slots, head, steps, levels, min_values=self.min_values,
            calibrated=calibrated if self.calibrates else None,
        )  # fmt: skip
        start = self.clock.timestamp(self._ledger.start[slots], head)
        return ForecastBatch(items, start, self.freq, levels, values, self.targets, flags)

    def _empty_twin(self) -> "StatefulPredictor":
        twin = object.__new__(StatefulPredictor)
        twin.__dict__.update(self.__dict__)
        twin._handles, twin._alarms = Handles(), ()
        twin._clear()
        return twin

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
