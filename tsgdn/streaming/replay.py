"""Histories lived through again: forecast, see the truth, observe, one step after another, all series in step."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64

from tsgdn.data.series import Series
from tsgdn.streaming.predictor import StatefulPredictor
from tsgdn.streaming.rows import Rows
from tsgdn.types import ForecastBatch


class Origin(NamedTuple):
    """A moment of the replay.

    Attributes:
        origin: steps of its history that each series had seen.
        forecast: made before any of the truth was observed.
        truth: what came; NaN where missing or beyond the end.
    """

    origin: Int64[np.ndarray, " B"]
    forecast: ForecastBatch
    truth: Float64[np.ndarray, "B V horizon"]


def replay(
    predictor: StatefulPredictor,
    series: Sequence[Series],
    horizon: int | None = None,
    *,
    every: int = 1,
    warm_up: int | Mapping[str, int] = 0,
    quantile_levels: Sequence[float] | None = None,
    full: bool = False,
) -> Iterator[Origin]:
    """Streams histories observation by observation and yields a forecast and its truth at every `every`-th step.

    Args:
        predictor: takes in the histories; series that it knows already go on where they are.
        series: one history per item; their n-th step after the warm-up is observed in the same call.
        horizon: steps; the predictor's own if not given.
        every: steps between origins; the first origin is the end of the warm-up.
        warm_up: steps that are taken in at once before the first origin, of all or per item; at least 1 is used.
        quantile_levels: of the forecasts.
        full: only origins whose whole truth is there.

    Raises:
        ValueError: `every` is not positive, a warm-up is longer than its history, or a history does not suit the
            predictor.
    """
    if every < 1:
        raise ValueError(f"every is {every}, expected at least 1 step")
    horizon = predictor.horizon if horizon is None else horizon
    begin = np.array([max(1, warm_up if isinstance(warm_up, int) else warm_up[one.item_id]) for one in series])
    ends = np.array([len(one) for one in series])
    for one, first in zip(series, begin.tolist(), strict=True):
        predictor.check_history(one)
        if first > len(one):
            raise ValueError(f"series {one.item_id!r} has {len(one)} steps, its warm-up would take {first}")
    predictor.warm_up([one.slice(0, first) for one, first in zip(series, begin.tolist(), strict=True)])
    stamps = [one.timestamps for one in series]
    needed = horizon if full else 1
    for number in range(int((ends - begin).max(initial=0))):
        at = begin + number
        chosen = np.flatnonzero(at + needed <= ends)
        if number % every == 0 and len(chosen):
            items = [series[i].item_id for i in chosen.tolist()]
            forecast = predictor.forecast(items, horizon=horizon, quantile_levels=quantile_levels)
            V = len(predictor.targets)
            truth = np.full((len(chosen), V, horizon), np.nan)
            for row, i in enumerate(chosen.tolist()):
                seen = series[i].values[:V, at[i] : at[i] + horizon]
                truth[row, :, : seen.shape[1]] = seen
            yield Origin(at[chosen], forecast, truth)
        live = np.flatnonzero(at < ends).tolist()
        rows = Rows(
            [series[i].item_id for i in live],
            np.array([stamps[i][at[i]] for i in live], "datetime64[ns]"),
            np.stack([series[i].values[:, at[i]] for i in live]),
            np.arange(len(live)),
            [],
        )
        predictor.observe(rows, errors="raise")
