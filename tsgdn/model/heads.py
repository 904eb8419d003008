"""A token becomes quantiles of the rest of its own patch and of the next K patches.

A forecast is anchored: its centre is a convex combination of the running mean and of what persistence over each season
forecasts, its spread a geometric mean of the sizes that the errors of these anchors have in the series (a random walk's
error grows with the square root of the periods ahead). Weights start from these sizes, as forecasts are combined by the
inverse of their past errors (Bates and Granger 1969), and are learned from there. So before the first training step a
random walk is forecast by its last value and a seasonal series by its last season, each with a spread of its own.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float64
from torch import Tensor, nn

from tsgdn.model.scaling import Scales
from tsgdn.types import Quantiles

SHARPNESS = 4.0  # 2 weighs anchors by the inverse of their mean square error; more favours the best


class QuantileHead(nn.Module):
    """Monotone quantiles: the median, then softplus steps outwards.

    Args:
        width: of a token.
        patch_size: P.
        patches_ahead: K.
        seasons: of the anchors, 1 first.
        quantile_levels: increasing, in (0, 1), the median among them.
        hidden: width inside.
    """

    def __init__(
        self,
        width: int,
        patch_size: int,
        patches_ahead: int,
        seasons: Sequence[int],
        quantile_levels: Sequence[float],
        hidden: int,
    ):
        super().__init__()
        levels = tuple(quantile_levels)
        if 0.5 not in levels or sorted(set(levels)) != list(levels) or not 0 < levels[0] <= levels[-1] < 1:
            raise ValueError(
                f"quantile_levels are {levels}; expected increasing levels between 0 and 1 with 0.5 among them"
            )
        self.patch_size, self.ahead = patch_size, patches_ahead + 1
        self.span = self.ahead * patch_size
        self.levels, self.middle = levels, levels.index(0.5)
        self.anchors = 1 + len(seasons)
        self.main = min(1, len(seasons) - 1)
        self.sharpness = nn.Parameter(torch.full((), SHARPNESS))
        self.hidden = nn.Linear(width, hidden)
        self.quantiles = nn.Linear(hidden, self.span * len(levels))
        self.mix = nn.Linear(hidden, self.span * self.anchors)
        self.units = nn.Linear(hidden, self.ahead * self.anchors)
        lead = (torch.arange(self.span) - patch_size + 1).clamp(min=1)
        periods = torch.stack([torch.ceil(lead / m) for m in seasons], -1).sqrt()
        # the running mean errs by the scale at every lead
        self.register_buffer("growth", torch.cat([torch.ones(self.span, 1), periods], -1).log(), persistent=False)
        self.register_buffer("patch", torch.arange(self.span) // patch_size, persistent=False)
        self.growth: Tensor
        self.patch: Tensor
        self._initialise()

    def _initialise(self) -> None:
        """Before training: the anchors by their past errors, with the spread of a normal distribution."""
        for layer in (self.quantiles, self.mix, self.units):
            nn.init.normal_(layer.weight, std=0.1 / math.sqrt(layer.in_features))
            nn.init.zeros_(layer.bias)
        normal = torch.special.ndtri(torch.tensor(self.levels, dtype=torch.float64)) * 0.8
        # softplus of the bias is the distance to the next level; the median itself starts at 0
        steps = normal.diff().expm1().log()
        bias = torch.cat([steps[: self.middle], torch.zeros(1), steps[self.middle :]])
        with torch.no_grad():
            self.quantiles.bias.copy_(bias.to(self.quantiles.bias.dtype).repeat(self.span))

    def forward(
        self,
        token: Float[Tensor, "B V N D"],
        scales: Scales,
        anchors: Float64[Tensor, "B V N S L"],
        has_anchor: Bool[Tensor, "B V N S L"],
        valid: Bool[Tensor, "B N"],
        steps: slice | None = None,
    ) -> Quantiles:
        """Reads forecasts off tokens; where no anchor has been seen, the next shorter season or the mean stands in.

        Args:
            token: outputs of the backbone.
            scales: of the tokens.
            anchors: what persistence over each season forecasts.
            has_anchor: where a value of that phase had been seen.
            valid: handed through.
            steps: which of the S steps are forecast; None = all.
        """
        h = F.silu(self.hidden(token))
        wide = torch.promote_types(token.dtype, torch.float32)
        raw, mix = _part(self.quantiles, h, steps, self.span), _part(self.mix, h, steps, self.span)
        growth, patch = self.growth, self.patch
        if steps is not None:
            growth, patch = growth[steps], patch[steps]
            anchors, has_anchor = anchors[..., steps, :], has_anchor[..., steps, :]
        raw = raw.to(wide).unflatten(-1, (-1, len(self.levels)))
        sizes = [self.middle, 1, len(self.levels) - self.middle - 1]
        _, median, _ = raw.split(sizes, -1)
        below, _, above = F.softplus(raw).split(sizes, -1)
        z = torch.cat(
            [median - below.flip(-1).cumsum(-1).flip(-1), median, median + above.cumsum(-1)],
            -1,
        )
        # log of the size of each anchor's error at each step, in units of the scale; the running mean errs by the scale
        size = F.pad((scales.lag_scale / scales.scale[..., None]).log(), (1, 0))
        size = size.to(wide)[..., None, :] + growth.to(wide)
        prior = -self.sharpness * size
        centre = self._centre(mix.to(wide), prior, scales, anchors, has_anchor)
        share = self.units(h).to(wide).unflatten(-1, (self.ahead, self.anchors)).index_select(-2, patch)
        unit = ((share + prior).softmax(-1) * size).sum(-1).exp()
        values = torch.addcmul(centre[..., None], unit[..., None], z)
        main = scales.lag_scale[..., self.main] / scales.scale
        return Quantiles(values, scales.loc, scales.scale, main, valid)

    def _centre(
        self, logits: Tensor, prior: Tensor, scales: Scales, anchors: Tensor, has_anchor: Tensor
    ) -> Float[Tensor, "B V N S"]:
        place = ((anchors - scales.loc[..., None, None]) / scales.scale[..., None, None]).to(logits.dtype)
        _, *weights = (logits.unflatten(-1, (-1, self.anchors)) + prior).softmax(-1).unbind(-1)
        candidate, centre = 0.0, None  # the mean
        for weight, there, value in zip(weights, has_anchor.unbind(-1), place.unbind(-1), strict=True):
            candidate = torch.where(there, value, candidate)
            centre = weight * candidate if centre is None else torch.addcmul(centre, weight, candidate)
        assert centre is not None
        return centre


def _part(layer: nn.Linear, h: Tensor, steps: slice | None, span: int) -> Tensor:
    """The outputs of a layer that belong to some of the steps."""
    if steps is None:
        return layer(h)
    each = layer.out_features // span
    rows = slice(steps.start * each, steps.stop * each)
    return F.linear(h, layer.weight[rows], layer.bias[rows])
