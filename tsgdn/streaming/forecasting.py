"""Forecasts: read off copies of the states, corrected and calibrated where the predictor watches itself."""

from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from tsgdn.model.scaling import scales_of
from tsgdn.streamable import map_state, take_rows
from tsgdn.streaming.advance import Engine
from tsgdn.streaming.residence import Residents
from tsgdn.streaming.rows import printable

LARGEST_BLOCK = 20_000_000
"""Quantiles of one pass at most: a forecast may not fill memory with numbers that nobody asked for."""


def quantiles(
    engine: Engine,
    slots: np.ndarray,
    head: np.ndarray,
    horizon: int,
    levels: tuple[float, ...],
    lent: Mapping[int, np.ndarray],
    *,
    calibrated: bool,
) -> Float64[np.ndarray, "B V horizon Q"]:
    """Quantiles of the steps from `head` (B,) on, at any levels; changes nothing.

    Args:
        engine: of the predictor.
        slots: of the series.
        head: first step of each that is forecast.
        horizon: steps.
        levels: increasing.
        lent: known features of the user for this forecast alone, by slot.
        calibrated: whether widths are calibrated.
    """
    model, watch, V = engine.model, engine.series.watch, engine.targets
    fitted = tuple(model.quantile_levels)
    mixing = None if levels == fitted else level_weights(fitted, levels)
    leads = np.arange(1, horizon + 1)
    corrects = watch is not None and watch.correction is not None
    block = max(1, min(engine.block, LARGEST_BLOCK // (horizon * len(fitted) * engine.series.variates)))
    values = np.empty((len(slots), V, horizon, len(levels)))
    for begin in range(0, len(slots), block):
        part = slots[begin : begin + block]
        found, state = _forecast_block(engine, part, head[begin : begin + block], horizon, lent)
        raw = found[:, :V].cpu().numpy()
        if watch is not None and corrects:
            scale = scales_of(*(leaf[:, :, None] for leaf in state.scaling)).scale[:, :V, 0].cpu().numpy()
            raw = watch.correct(part, raw, leads, scale)
        if watch is not None and calibrated:
            raw = watch.calibrate(part, raw, fitted, leads)
        if mixing is not None:
            raw = np.maximum.accumulate(raw @ mixing, axis=-1)
        values[begin : begin + block] = raw
    return values


def flags(
    engine: Engine,
    items: Sequence[str],
    slots: np.ndarray,
    head: np.ndarray,
    horizon: int,
    levels: tuple[float, ...],
    *,
    min_values: int,
    calibrated: bool | None,
) -> tuple[frozenset[str], ...]:
    """What to know about each forecast; `calibrated` is None where the predictor does not calibrate."""
    series, model = engine.series, engine.model
    ledger, P, fitted = series.ledger, model.patch_size, model.quantile_levels
    phase = head % P
    direct = np.where(phase > 0, model.span - phase, model.direct_steps)
    cold = ledger.values[slots] < min_values
    marks = {
        "tail": np.full(len(slots), levels[0] < fitted[0] - 1e-12 or levels[-1] > fitted[-1] + 1e-12),
        "cold": cold,
        "rollout": horizon > direct,
        "gap_reset": cold & (ledger.reset[slots] > 0),
    }
    if series.held:
        marks["held"] = np.array([item in series.held for item in items], bool)
    if calibrated is not None and series.watch is not None:
        marks["uncalibrated"] = ~series.watch.calibrated(slots) if calibrated else np.ones(len(slots), bool)
    number = np.zeros(len(slots), np.int64)
    for place, mark in enumerate(marks.values()):
        number |= np.asarray(mark, np.int64) << place
    sets = {
        n: frozenset(name for place, name in enumerate(marks) if n >> place & 1) for n in np.unique(number).tolist()
    }
    return tuple(map(sets.__getitem__, number.tolist()))


def heads_at(series: Residents, items: Sequence[str], slots: np.ndarray, as_of: Any) -> np.ndarray:
    """Where the heads (B,) would be if nothing came until `as_of`."""
    head = series.step_of(slots, as_of) + 1
    before = head < series.ledger.head[slots]
    if before.any():
        row = int(before.argmax())
        last = series.time_of(int(slots[row]), int(series.ledger.head[slots[row]]) - 1)
        raise ValueError(f"as_of is {as_of}, but {printable(items[row])!r} has seen {last}: rewind a fork to look back")
    return head


@torch.no_grad()
def _forecast_block(
    engine: Engine, slots: np.ndarray, head: np.ndarray, horizon: int, features: Mapping[int, np.ndarray]
) -> tuple[Float64[Tensor, "B V horizon Q"], Any]:
    """The forecasts, and the states that they were read off."""
    model, known = engine.model, engine.series.features
    lent = {slot: features[slot] for slot in slots.tolist() if slot in features} if features else {}
    with known.lent(lent):
        state = engine.waited(slots, refresh=bool(lent))
        heads = engine.series.ledger.head[slots]
        silence = head - heads
        if silence.any():
            for steps in np.unique(silence[silence > 0]).tolist():
                rows = np.flatnonzero(silence == steps)
                index = torch.from_numpy(rows).to(engine.series.device)
                later = engine.silent(slots[rows], steps, at=heads[rows], state=take_rows(state, index))
                state = map_state(lambda leaf, new, index=index: leaf.index_copy(0, index, new), state, later)
        columns = horizon + model.span + 2 * model.patch_size
        rows = engine.bucket(len(slots))
        future = known.columns(slots[rows], head[rows], columns)
        return model.forecast(engine.states(slots, state), horizon, known=future)[: len(slots)], state


def check_horizon(horizon: Any) -> int:
    """The horizon as a number of steps.

    Raises:
        ValueError: it is none, or out of range.
    """
    if isinstance(horizon, bool) or not isinstance(horizon, int | np.integer) or not 1 <= horizon <= 1_000_000:
        raise ValueError(f"horizon is {horizon!r}, expected a whole number of steps from 1 to 1,000,000")
    return int(horizon)


def check_levels(levels: Sequence[float]) -> tuple[float, ...]:
    """Quantile levels, increasing and within (0, 1).

    Raises:
        ValueError: none, or one is out of range or out of order.
    """
    levels = tuple(float(level) for level in levels)
    if not levels or not all(0 < level < 1 for level in levels) or any(np.diff(levels) <= 0):
        raise ValueError(f"quantile levels are {levels}, expected increasing numbers between 0 and 1")
    return levels


def level_weights(fitted: Sequence[float], wanted: Sequence[float]) -> Float64[np.ndarray, "Q wanted"]:
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
