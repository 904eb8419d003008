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
TINY = 1e-300  # a divisor where nothing was counted


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
    ) -> tuple[Scales, tuple[Float64[Tensor, "B V N"], Float64[Tensor, "B V N"]], ScalingState]:
        """Statistics of each token, location and scale of the token before (0 where there is none), and the state.

        Args:
            values: 0 where not observed.
            observed: only these count.
            predecessors: latest observed value before, at the same phase of each season.
            has_predecessor: where there is one.
            state: statistics before the first patch.
        """
        weight = observed.double()
        keep = None
        if self.retention < 1:
            # how often the weight of a value was halved by the values after it in the same patch
            after = weight.flip(-1).cumsum(-1).flip(-1) - weight
            keep = self.retention ** weight.sum(-1)
            weight = weight * self.retention**after

        count = weight.sum(-1)
        mean = (weight * values).sum(-1) / count.clamp(min=TINY)
        m2 = (weight * (values - mean[..., None]).square()).sum(-1)

        lag_weight = weight[..., None] * has_predecessor
        lag_count = lag_weight.sum(-2)
        square = (lag_weight * (values[..., None] - predecessors).square()).sum(-2) / lag_count.clamp(min=TINY)

        count, mean, m2 = _scan(keep, (state.count, state.mean, state.m2), (count, mean, m2))
        lag_count, square = _scan(
            None if keep is None else keep[..., None], (state.lag_count, state.lag_square), (lag_count, square)
        )
        end = ScalingState(*(x[:, :, -1] for x in (count, mean, m2, lag_count, square)))
        scale = _scale_of(count, mean, m2)
        # scale 0 says that nothing had been seen by then
        before = mean[:, :, :-1], torch.where(count[:, :, :-1] > 0, scale[:, :, :-1], 0.0)
        scale = scale[:, :, 1:]
        lag_scale = _lag_scale_of(scale, lag_count[:, :, 1:], square[:, :, 1:])
        return Scales(count[:, :, 1:], mean[:, :, 1:], scale, lag_scale), before, end


def scales_of(count: Tensor, mean: Tensor, m2: Tensor, lag_count: Tensor, lag_square: Tensor) -> Scales:
    """Moments to location and scale, floored so that a constant series stays finite.

    After one value its size is all that is known of the scale; f(a·x + b) = a·f(x) + b holds from two values on.
    """
    scale = _scale_of(count, mean, m2)
    return Scales(count, mean, scale, _lag_scale_of(scale, lag_count, lag_square))


def _scale_of(count: Tensor, mean: Tensor, m2: Tensor) -> Tensor:
    size = mean.abs()
    scale = (m2 / count.clamp(min=TINY)).clamp(min=0).sqrt()
    scale = torch.maximum(scale, torch.where(count > 1.5, FLOOR * size, size))
    return torch.where(scale > 0, scale, 1.0)


def _lag_scale_of(scale: Tensor, lag_count: Tensor, lag_square: Tensor) -> Tensor:
    scale = scale[..., None]
    lag_scale = torch.where(lag_count > 0, lag_square.clamp(min=0).sqrt(), scale)
    return torch.maximum(lag_scale, LAG_FLOOR * scale)


def _scan(keep: Tensor | None, first: tuple[Tensor, ...], parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Merges all patches up to each: the state comes first, so the result has N + 1 entries along dimension 2.

    Hillis and Steele's scan: log2(N) elementwise passes, an entry depends on no later one.

    Args:
        keep: by how much a patch shrinks the weights before it; None = not at all.
        first: count, mean and perhaps m2 before the first patch.
        parts: those of each patch alone.
    """
    entries = tuple(torch.cat([a[:, :, None], b], 2) for a, b in zip(first, parts, strict=True))
    if keep is not None:
        keep = torch.cat([torch.ones_like(keep[:, :, :1]), keep], 2)
    shift = 1
    while shift < entries[0].shape[2]:
        early = tuple(x[:, :, :-shift] for x in entries)
        late = tuple(x[:, :, shift:] for x in entries)
        kept = None if keep is None else keep[:, :, shift:]
        merged = _merged(kept, early, late)
        entries = tuple(torch.cat([x[:, :, :shift], y], 2) for x, y in zip(entries, merged, strict=True))
        if keep is not None and kept is not None:
            keep = torch.cat([keep[:, :, :shift], keep[:, :, :-shift] * kept], 2)
        shift *= 2
    return entries


def _merged(keep: Tensor | None, early: tuple[Tensor, ...], late: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Count, mean and perhaps m2 of two stretches together; `keep` is what the later one leaves of the earlier."""
    old = early[0] if keep is None else early[0] * keep
    count = old + late[0]
    share = late[0] / count.clamp(min=TINY)
    delta = late[1] - early[1]
    mean = torch.addcmul(early[1], delta, share)
    if len(early) == 2:
        return count, mean
    m2 = early[2] if keep is None else early[2] * keep
    return count, mean, torch.addcmul(m2 + late[2], delta.square() * old, share)
