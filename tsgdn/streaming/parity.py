"""Streamed forecasts beside those of one parallel pass."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from tsgdn.data.series import Series
from tsgdn.streaming.rows import Rows
from tsgdn.streaming.verdicts import Judge
from tsgdn.types import Batch


class ParityReport(NamedTuple):
    """How far streamed forecasts are from those of one parallel pass.

    Attributes:
        error: largest difference, in units of the series' scale.
        forecasts: how many were compared.
        worst: item and origin of the largest difference.
        rtol: the bound.
    """

    error: float
    forecasts: int
    worst: tuple[str, int]
    rtol: float

    @property
    def ok(self) -> bool:
        """Whether forecasts were compared and the error is within the bound."""
        return self.forecasts > 0 and self.error <= self.rtol


@torch.no_grad()
def verify(
    predictor: Any, data: Series | Sequence[Series], *, horizon: int | None, origins: int, rtol: float
) -> ParityReport:
    """See `StatefulPredictor.verify`."""
    items = [data] if isinstance(data, Series) else list(data)
    if not rtol > 0:
        raise ValueError(f"rtol is {rtol}, expected a positive number")
    P, S = predictor.model.patch_size, predictor.model.span
    horizon = min(predictor.model.direct_steps, horizon or predictor.model.direct_steps)
    worst, error, count = ("", 0), 0.0, 0
    for series in items:
        predictor.check_history(series)
        twin = predictor._empty_twin()
        twin._judge = Judge(twin.clock, twin.variates, max_jump=len(series) + 1, max_series=None, create=True)
        T = len(series)
        if not T:
            continue
        stamps = series.timestamps
        chosen = sorted({max(1, round(x)) for x in np.linspace(min(P, T), T, max(1, origins))} | {max(1, T - 1)})
        twin.warm_up(series.slice(0, 1))  # sets the start, the categories and the known features
        for step in range(T):
            if step:
                twin.observe(
                    Rows(
                        [series.item_id],
                        stamps[step : step + 1],
                        series.values[:, step : step + 1].T,
                        np.zeros(1, np.int64),
                        [],
                    )
                )
            origin = step + 1
            if origin not in chosen:
                continue
            streamed = twin.forecast([series.item_id], horizon=horizon).values[0]
            token, phase = -(-origin // P), origin % P
            length = token * P
            values = torch.full((1, len(predictor.variates), length), torch.nan, dtype=torch.float64)
            values[0, :, :origin] = torch.from_numpy(series.values[:, :origin].copy())
            whole = predictor._empty_twin()
            slot = whole._create({series.item_id: series.start})
            if series.known is not None:
                whole._features.give(int(slot[0]), 0, series.known)
            whole._series.set_static({series.item_id: series.static or ()})
            static = whole._pool.take(slot).static
            batch = Batch(
                values.nan_to_num(nan=0.0).to(predictor._device),
                (~values.isnan()).to(predictor._device),
                whole._features.columns(slot, np.zeros(1, np.int64), length + S),
                static=static if static.shape[1] else None,
            )
            last = torch.tensor([token - 1], device=predictor._device)
            quantiles, _ = predictor.model(batch, None, read=last)
            if not bool(quantiles.valid[0, 0]):
                continue  # long silence: no token was read here
            begin = phase or P
            V = len(predictor.targets)
            parallel = quantiles.unscaled()[0, :V, 0, begin : begin + horizon].cpu().numpy()
            seen = np.asarray((~np.isnan(series.values[:V, :origin])).any(axis=1))
            loc, scale = (x[0, :V, 0].cpu().numpy()[:, None, None] for x in (quantiles.loc, quantiles.scale))
            # single precision keeps digits, not decimals: far from the centre an error counts for as much less
            apart = np.abs(streamed - parallel) / np.maximum(scale, np.abs(parallel - loc))
            apart = np.where(np.isnan(apart), np.inf, apart)
            difference = float(np.where(seen[:, None, None], apart, 0.0).max(initial=0.0))
            count += 1
            if difference > error:
                error, worst = difference, (series.item_id, origin)
    return ParityReport(error, count, worst, rtol)
