"""What passes between the parts: batches in, quantiles out.

Dimensions: B series, V variates, T steps, P steps per patch, N tokens, K patches ahead, S = (K + 1)·P steps that a
token forecasts (the rest of its own patch, then K patches), Q quantile levels, F known-future features, M cells of the
seasonal tables (the sum of the seasons), L seasons.
"""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

QUANTILE_LEVELS: tuple[float, ...] = (0.01, *(round(0.05 * i, 2) for i in range(1, 20)), 0.99)
"""The 21 default levels; they contain the 9-level and the 19-level grids of the published protocols."""


class Past(NamedTuple):
    """What came before a training window, as the statistics that a stream would hold there.

    `seasonal` concatenates one table per season m: cell i is the latest observed value at a step that is congruent to
    i modulo m, steps counted from the window's first (so they lie before it).
    """

    count: Float64[Tensor, "B V"]
    mean: Float64[Tensor, "B V"]
    m2: Float64[Tensor, "B V"]
    lag_count: Float64[Tensor, "B V L"]
    lag_square: Float64[Tensor, "B V L"]
    seasonal: Float64[Tensor, "B V M"]
    seasonal_seen: Bool[Tensor, "B V M"]


class Batch(NamedTuple):
    """Consecutive steps of B series.

    Attributes:
        values: in the unit of the series; ignored where not observed (NaN is allowed there only).
        observed: False where a value is missing, hidden or padding.
        known: known-future features from the first step to S steps beyond the last; NaN = absent.
        static: categories, 0 = unknown. Needed when a stream starts; afterwards the state holds them.
        lengths: steps per series where they differ; the rest, on the right, is padding and touches no state.
        target: what the loss compares with, hidden cells included; NaN = no loss. Training only.
        past: statistics of what came before the first step. Training only; see `Forecaster.prime`.
    """

    values: Float64[Tensor, "B V T"]
    observed: Bool[Tensor, "B V T"]
    known: Float[Tensor, "B F T_and_S"] | None = None
    static: Int64[Tensor, "B n_static"] | None = None
    lengths: Int64[Tensor, " B"] | None = None
    target: Float64[Tensor, "B V T"] | None = None
    past: Past | None = None

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device."""

        def move(x: object) -> object:
            if isinstance(x, Tensor):
                return x.to(device, non_blocking=True)
            return Past(*(move(leaf) for leaf in x)) if isinstance(x, Past) else x  # pyright: ignore[reportArgumentType]

        return Batch(*(move(x) for x in self))  # pyright: ignore[reportArgumentType]


class Quantiles(NamedTuple):
    """Forecasts of tokens, scaled: a value in the unit of the series is `loc + scale * values`.

    Attributes:
        values: step 0 is the first step of the token's own patch; increasing along Q.
        loc: of the token, from everything up to the end of its patch.
        scale: likewise, positive.
        unit: spread that the series shows at its main season, in units of `scale`; the loss is measured in it.
        valid: False where a series has no token at this place (padding, or skipped silence).
    """

    values: Float[Tensor, "B V N S Q"]
    loc: Float64[Tensor, "B V N"]
    scale: Float64[Tensor, "B V N"]
    unit: Float64[Tensor, "B V N"]
    valid: Bool[Tensor, "B N"]

    def unscaled(self) -> Float64[Tensor, "B V N S Q"]:
        """The quantiles in the unit of the series."""
        return self.loc[..., None, None] + self.scale[..., None, None] * self.values.double()


class ForecastBatch(NamedTuple):
    """Quantiles in the unit of the series; step 0 is the first unobserved one.

    Attributes:
        item_ids: one per series.
        start: timestamp of step 0 of each series.
        freq: pandas alias of the step.
        quantile_levels: increasing.
        values: increasing along Q.
        variates: names along V.
        flags: per series, any of "cold" (too few observations), "rollout" (beyond the direct steps), "tail" (a level
            outside the fitted ones).
    """

    item_ids: tuple[str, ...]
    start: np.ndarray
    freq: str
    quantile_levels: tuple[float, ...]
    values: Float64[np.ndarray, "B V horizon Q"]
    variates: tuple[str, ...] = ("target",)
    flags: tuple[frozenset[str], ...] = ()

    def quantile(self, level: float) -> Float64[np.ndarray, "B V horizon"]:
        """The forecast at one of `quantile_levels`."""
        distance = np.abs(np.asarray(self.quantile_levels) - level)
        if distance.min() > 1e-9:
            raise ValueError(
                f"level {level} is not among {self.quantile_levels}; ask for it with forecast(quantile_levels=...)"
            )
        return self.values[..., int(distance.argmin())]

    @property
    def median(self) -> Float64[np.ndarray, "B V horizon"]:
        """The forecast at level 0.5."""
        return self.quantile(0.5)
