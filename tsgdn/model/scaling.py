"""Causal location and scale of every token, in float64.

The statistics of a token are those of all values up to the end of its patch, so a value is scaled by nothing that came
later. Welford's moments are merged by an associative rule (Chan, Golub, LeVeque 1979), hence one parallel scan gives
every token's statistics and the same scan, one patch long, continues a stream. With a half-life, a value weighs
2^(-age / half_life), its age counted in observed values.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float64
from torch import Tensor

FLOOR = 1e-9  # of |mean|: a series that is constant to float32 precision
LAG_FLOOR = 1e-5  # of scale: a series that repeats its season exactly


class ScalingState(NamedTuple):
    """Moments of the values, and mean squares of the differences to the same phase one season earlier."""

    count: Float64[Tensor, "B V"]
    mean: Float64[Tensor, "B V"]
    m2: Float64[Tensor, "B V"]
    lag_count: Float64[Tensor, "B V L"]
    lag_square: Float64[Tensor, "B V L"]


class Scales(NamedTuple):
    """Per token; `lag_scale` is the root mean square difference over each season, at most a small share below scale."""

    count: Float64[Tensor, "B V N"]
    loc: Float64[Tensor, "B V N"]
    scale: Float64[Tensor, "B V N"]
    lag_scale: Float64[Tensor, "B V N L"]


class CausalScaler:
    """Running moments with an optional half-life (in observed values)."""

    def __init__(self, seasons: int, half_life: float | None = None):
        if half_life is not None and not half_life > 0:
            raise ValueError(f"half_life is {half_life}; it counts observed values and must be above 0 (or null)")
        self.seasons = seasons
        self.retention = 1.0 if half_life is None else 2.0 ** (-1.0 / half_life)

    def initial_state(self, series: int, variates: int, device: torch.device | str | None = None) -> ScalingState:
        """Nothing seen yet."""
        shape, lags = (series, variates), (series, variates, self.seasons)
        return ScalingState(
            *(torch.zeros(s, dtype=torch.float64, device=device) for s in (shape, shape, shape, lags, lags))
        )

    def __call__(
        self,
        values: Float64[Tensor, "B V N P"],
        observed: Bool[Tensor, "B V N P"],
        predecessors: Float64[Tensor, "B V N P L"],
        has_predecessor: Bool[Tensor, "B V N P L"],
        state: ScalingState,
    ) -> tuple[Scales, ScalingState]:
        """Statistics of each token; those of the last are the state.

        Args:
            values: 0 where not observed.
            observed: only these count.
            predecessors: latest observed value before, at the same phase of each season.
            has_predecessor: where there is one.
            state: statistics before the first patch.
        """
        seen = observed.double()
        # how often the weight of a value was halved by the values after it in the same patch
        after = seen.flip(-1).cumsum(-1).flip(-1) - seen
        weight = seen * self.retention**after
        keep = self.retention ** seen.sum(-1)

        count = weight.sum(-1)
        mean = (weight * values).sum(-1) / count.clamp(min=1e-300)
        m2 = (weight * (values - mean[..., None]) ** 2).sum(-1)

        lag_weight = weight[..., None] * has_predecessor
        lag_count = lag_weight.sum(-2)
        square = (lag_weight * (values[..., None] - predecessors) ** 2).sum(-2) / lag_count.clamp(min=1e-300)

        count, mean, m2 = _scan(keep, count, mean, m2, (state.count, state.mean, state.m2))
        zeros = torch.zeros_like(square)
        lag_count, square, _ = _scan(
            keep[..., None].expand_as(square),
            lag_count,
            square,
            zeros,
            (state.lag_count, state.lag_square, torch.zeros_like(state.lag_square)),
        )
        end = ScalingState(count[:, :, -1], mean[:, :, -1], m2[:, :, -1], lag_count[:, :, -1], square[:, :, -1])
        return scales_of(count[:, :, 1:], mean[:, :, 1:], m2[:, :, 1:], lag_count[:, :, 1:], square[:, :, 1:]), end


def scales_of(count: Tensor, mean: Tensor, m2: Tensor, lag_count: Tensor, lag_square: Tensor) -> Scales:
    """Moments to location and scale, floored so that a constant series stays finite.

    After one value its size is all that is known of the scale; f(a·x + b) = a·f(x) + b holds from two values on.
    """
    scale = (m2 / count.clamp(min=1e-300)).clamp(min=0).sqrt()
    size = mean.abs()
    scale = torch.maximum(scale, torch.where(count > 1.5, FLOOR * size, size))
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    lag_scale = torch.where(lag_count > 0, lag_square.clamp(min=0).sqrt(), scale[..., None])
    return Scales(count, mean, scale, torch.maximum(lag_scale, LAG_FLOOR * scale[..., None]))


def _scan(
    keep: Tensor, count: Tensor, mean: Tensor, m2: Tensor, first: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Merges all patches up to each: the state comes first, so the result has N + 1 entries along dimension 2.

    Hillis and Steele's scan: log2(N) elementwise passes, an entry depends on no later one.
    """
    keep = torch.cat([torch.ones_like(first[0])[:, :, None], keep], 2)
    count, mean, m2 = (torch.cat([a[:, :, None], b], 2) for a, b in zip(first, (count, mean, m2), strict=True))
    shift = 1
    while shift < count.shape[2]:
        early, late = slice(None, -shift), slice(shift, None)
        old = count[:, :, early] * keep[:, :, late]
        both = old + count[:, :, late]
        share = count[:, :, late] / both.clamp(min=1e-300)
        delta = mean[:, :, late] - mean[:, :, early]
        merged = (
            keep[:, :, early] * keep[:, :, late],
            both,
            mean[:, :, early] + delta * share,
            m2[:, :, early] * keep[:, :, late] + m2[:, :, late] + delta**2 * old * share,
        )
        keep, count, mean, m2 = (
            torch.cat([a[:, :, :shift], b], 2) for a, b in zip((keep, count, mean, m2), merged, strict=True)
        )
        shift *= 2
    return count, mean, m2
