"""What a predictor tells of itself: the worth of values, what is odd about them, how series stand, its own health."""

from collections.abc import Callable, Sequence
from functools import update_wrapper
from pathlib import Path
from types import MethodType
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64, Int64
from torch import Tensor

from tsgdn.model.forecaster import Forecaster
from tsgdn.streamable import fork, state_leaves
from tsgdn.streaming.adapt import Learning
from tsgdn.streaming.conformal import COVERAGES, Rules
from tsgdn.streaming.residence import Residents
from tsgdn.streaming.signals import KINDS
from tsgdn.streaming.snapshot import SnapshotRefused
from tsgdn.streaming.tuning import Tuning
from tsgdn.streaming.verdicts import ObserveReport
from tsgdn.streaming.watch import Watch
from tsgdn.streaming.worth import Heard


class Alarm(NamedTuple):
    """One thing that was odd.

    Attributes:
        item_id: of the series.
        variate: its name.
        kind: "anomaly", a value far out; "level" or "spread", a drift of the series against its forecasts.
        score: the normal score of the value; of a drift the cumulative sum, negative downwards.
        timestamp: of the value that spoke, UTC.
        since: when the drift is thought to have begun; of an anomaly its own time.
    """

    item_id: str
    variate: str
    kind: str
    score: float
    timestamp: np.datetime64
    since: np.datetime64


class SeriesState(NamedTuple):
    """How a series stands.

    Attributes:
        item_id: its name.
        start: time of its first step, UTC.
        head: steps seen, valued or not.
        applied: those of them that the memory has taken in; the others wait for their patch to be finished.
        count: values seen, over all variates.
        nbytes: bytes that it takes.
        flags: that a forecast would carry: "cold", "gap_reset", "held".
        tensors: the state of the model by name, copies.
    """

    item_id: str
    start: np.datetime64
    head: int
    applied: int
    count: int
    nbytes: int
    flags: frozenset[str]
    tensors: dict[str, Tensor]


class Health(NamedTuple):
    """What a monitor asks.

    Attributes:
        series: held.
        max_series: how many there may be; None = any number.
        slots: room that has been made.
        nbytes: that the room takes.
        nbytes_per_series: likewise, each.
        held: rows that wait for others to agree with them.
        calls: that observed, since this predictor was made.
        values: seen of the series that are held.
        last: what became of the rows of the last call, in numbers.
    """

    series: int
    max_series: int | None
    slots: int
    nbytes: int
    nbytes_per_series: int
    held: int
    calls: int
    values: int
    last: ObserveReport


class if_learning:
    """A verb that a predictor has only if it learns, so that callers may ask whether it is there."""

    def __init__(self, verb: Callable[..., Any]) -> None:
        self._verb = verb
        update_wrapper(self, verb)  # pyright: ignore[reportArgumentType]

    def __get__(self, owner: Any, kind: type | None = None) -> Any:
        """The verb of `owner`; AttributeError where it does not learn."""
        if owner is None:
            return self._verb
        if owner.learning is None:
            raise AttributeError("this predictor keeps no residuals to adapt from: make it with learning=Learning()")
        return MethodType(self._verb, owner)


def kinds_of(signals: bool | Sequence[str]) -> tuple[str, ...]:
    """The kinds of signals that are asked for.

    Raises:
        ValueError: one is not known.
    """
    kinds = (
        (KINDS if signals else ()) if isinstance(signals, bool) else (signals,) if isinstance(signals, str) else signals
    )
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise ValueError(f"signal {unknown[0]!r} is not known; expected {', '.join(KINDS)}")
    return tuple(kind for kind in KINDS if kind in kinds)


def watch_maker(
    model: Forecaster,
    variates: int,
    *,
    calibrate: bool | Sequence[float],
    watches: bool,
    learning: Learning | None,
    tuning: Tuning | None,
) -> Callable[[], Watch] | None:
    """Makes empty watches; None if nothing is asked for.

    Raises:
        ValueError: the model lacks the levels of a coverage, or `learning` wants features of it.
    """
    if isinstance(calibrate, bool) and not calibrate and not watches and learning is None:
        return None
    if learning is not None and learning.features:
        raise ValueError(f"learning takes {learning.features} features, a predictor gives it none: leave them at 0")
    levels = np.asarray(model.quantile_levels)
    if isinstance(calibrate, bool):
        coverages = tuple(
            c for c in COVERAGES if all(np.abs(levels - end).min() < 1e-9 for end in ((1 - c) / 2, (1 + c) / 2))
        )
        if not coverages:
            pair = min(levels[0], 1 - levels[-1])
            raise ValueError(
                f"the levels of the model hold none of the intervals {COVERAGES}; outermost level {pair:g}"
            )
    else:
        coverages = tuple(calibrate)
    options: dict[str, Any] = {"rules": Rules(coverages=coverages), "learning": learning}

    def make() -> Watch:
        return Watch(
            variates=variates,
            patch_size=model.patch_size,
            ahead=model.patches_ahead,
            levels=model.quantile_levels,
            **options,
        )

    first = make()
    if tuning is not None:
        options["thresholds"] = tuning.thresholds
        options["start"] = tuning.start_of(coverages, first.ranges.last.tolist())
    return make


def settings(watch: Watch | None) -> dict[str, Any] | None:
    """What the rows of a watch depend on, as plain JSON."""
    if watch is None:
        return None
    learning = None if watch.learning is None else list(watch.learning)
    return {"coverages": list(watch.rules.coverages), "variates": watch.variates, "learning": learning}


def check_watched(path: str | Path, saved: Any, watch: Watch | None) -> None:
    """Refuses states that were watched in another way; those that nobody watched begin to be."""
    if saved is None or saved == settings(watch):
        return
    mine = "is not watched" if watch is None else f"has {settings(watch)}"
    raise SnapshotRefused(
        f"the states in {path} are watched with {saved}, the predictor {mine}: give the same calibrate and learning"
    )


def worth(
    series: Residents,
    heard: Sequence[Heard],
    count: int,
    places: Int64[np.ndarray, " n"],
    slots: Int64[np.ndarray, " n"],
    steps: Int64[np.ndarray, " n"],
    values: Float64[np.ndarray, "n V"],
    variates: Sequence[str],
    kinds: Sequence[str],
) -> tuple[Float64[np.ndarray, "rows V"], tuple[Alarm, ...]]:
    """What the rows of a call were worth, and what was odd about them.

    Args:
        series: after the rows were taken in.
        heard: while they were.
        count: rows of the call, those set aside included.
        places: in the call, of the rows that were taken in.
        slots: of their series.
        steps: of their cells.
        values: of the variates that are forecast.
        variates: their names.
        kinds: to speak of.
    """
    watch: Any = series.watch
    V = len(variates)
    pit, z = np.full((len(slots), V), np.nan), np.full((len(slots), V), np.nan)
    where = np.full(series.pool.capacity, -1)
    for part in heard:
        where[part.slots] = np.arange(len(part.slots))
        row = where[slots]
        hit = np.flatnonzero(row >= 0)
        offset = steps[hit] - part.first[row[hit]]
        inside = (offset >= 0) & (offset < part.lengths[row[hit]])
        hit, offset = hit[inside], offset[inside]
        pit[hit], z[hit] = part.pit[row[hit], :, offset], part.z[row[hit], :, offset]
        where[part.slots] = -1
    waiting = np.flatnonzero(steps >= series.ledger.applied[slots])
    if len(waiting):
        pit[waiting], z[waiting] = watch.peek(slots[waiting], steps[waiting], values[waiting])
    pit, z = (np.where(np.isnan(values), np.nan, x) for x in (pit, z))
    out = np.full((count, V), np.nan)
    out[places] = pit
    if not kinds:
        return out, ()
    found: list[tuple[int, int, str, float, int, int]] = []
    if "anomaly" in kinds:
        with np.errstate(invalid="ignore"):
            row, variate = np.nonzero(np.abs(z) >= watch.thresholds.anomaly)
        for r, v in zip(row.tolist(), variate.tolist(), strict=True):
            found.append((int(slots[r]), v, "anomaly", float(z[r, v]), int(steps[r]), int(steps[r])))
    for part in heard:
        for r, v, kind, step, score, since in zip(*(x.tolist() for x in part.alarms), strict=True):
            if KINDS[kind] != "anomaly" and KINDS[kind] in kinds:
                found.append((int(part.slots[r]), v, KINDS[kind], score, step, since))
    alarms = []
    for slot, v, kind, score, step, since in found:
        at, begun = series.clock.timestamp(series.ledger.start[[slot, slot]], np.array([step, since]))
        alarms.append(Alarm(series.names[slot], variates[v], kind, score, at, begun))
    return out, tuple(alarms)


def state_of(series: Residents, item_id: str, min_values: int) -> SeriesState:
    """See `StatefulPredictor.state`."""
    slots = series.find([item_id])
    slot, ledger = int(slots[0]), series.ledger
    cold = bool(ledger.values[slot] < min_values)
    marks = {"cold": cold, "gap_reset": cold and bool(ledger.reset[slot]), "held": item_id in series.held}
    return SeriesState(
        item_id,
        ledger.start[slot],
        int(ledger.head[slot]),
        int(ledger.applied[slot]),
        int(ledger.values[slot]),
        series.nbytes,
        frozenset(name for name, there in marks.items() if there),
        {name: leaf[0] for name, leaf in state_leaves(fork(series.pool.take(slots)))},
    )


def health_of(series: Residents, calls: int, max_series: int | None, last: ObserveReport) -> Health:
    """See `StatefulPredictor.health`."""
    slots, each = series.pool.capacity, series.nbytes
    held, values = sum(map(len, series.held.values())), int(series.ledger.values.sum())
    last = last._replace(pit=None, set_aside=())
    return Health(len(series), max_series, slots, slots * each, each, held, calls, values, last)
