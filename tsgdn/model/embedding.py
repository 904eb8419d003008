"""A patch becomes a token.

Every input is free of the unit of the series: values and seasonal anchors relative to the token's location and scale,
differences relative to the size that such differences have in this series, and logarithms of ratios of scales. With the
heads, which speak in the same units, this gives f(a·x + b) = a·f(x) + b for a > 0.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor, nn

from tsgdn.model.scaling import Scales
from tsgdn.model.seasonal import SeasonalViews


class Embedding(nn.Module):
    """Values, observed mask, differences, anchors, known features, scale features and categories to `width` numbers."""

    def __init__(
        self,
        patch_size: int,
        span: int,
        seasons: Sequence[int],
        known_features: int,
        static_cardinalities: Sequence[int],
        width: int,
    ):
        super().__init__()
        lags, long = len(seasons), len(seasons) - 1  # season 1 is short
        ahead = span // patch_size
        features = patch_size * (2 + lags) + lags + span * long + known_features * (span + ahead) + lags + 5
        self.first = nn.Linear(features, 2 * width)
        self.second = nn.Linear(2 * width, width)
        self.direct = nn.Linear(features, width, bias=False)
        self.categories = tuple(static_cardinalities)
        # one row more than categories: 0 is "unknown", as is any category not seen in training
        self.static = nn.ModuleList(nn.Embedding(size + 1, width) for size in static_cardinalities)
        for table in self.static:
            nn.init.zeros_(table.weight)  # pyright: ignore[reportArgumentType]

    def forward(
        self,
        values: Float64[Tensor, "B V N P"],
        observed: Bool[Tensor, "B V N P"],
        views: SeasonalViews,
        scales: Scales,
        previous: tuple[Float64[Tensor, "B V N"], Float64[Tensor, "B V N"]],
        known: Float[Tensor, "B F N S"],
        gap: Int64[Tensor, "B N"] | None,
        static: Int64[Tensor, "B n_static"],
    ) -> Float[Tensor, "B V N D"]:
        """Embeds patches.

        Args:
            values: 0 where not observed.
            observed: which are seen.
            views: predecessors and anchors.
            scales: of each token.
            previous: location and scale of the token before, scale 0 where there is none.
            known: NaN where absent.
            gap: patches of silence that were skipped before the token; None = none.
            static: categories, 0 = unknown.
        """
        # differences are taken in float64 and leave it at once: what is left is of the order of 1
        dtype = self.first.weight.dtype
        B, V, N, P = values.shape
        loc, scale = scales.loc[..., None], scales.scale[..., None]
        begun = previous[1] > 0
        places = torch.cat([values, views.anchors[..., 0, :], views.anchors[..., 1:].flatten(3)], -1)
        changes = (values[..., None] - views.predecessors) / scales.lag_scale[..., None, :]
        drift = (scales.loc - previous[0]) / scales.scale
        there = [
            observed,
            views.has_anchor[..., 0, :],
            views.has_anchor[..., 1:].flatten(3),
            (observed[..., None] & views.has_predecessor).flatten(3),
            begun[..., None],
        ]
        sizes = [P, places.shape[-1] - P, changes.shape[-2] * changes.shape[-1], 1]
        numbers = torch.cat([(places - loc) / scale, changes.flatten(3), drift[..., None]], -1)
        level, ahead, change, drift = torch.where(torch.cat(there, -1), numbers.to(dtype).asinh(), 0.0).split(sizes, -1)
        growth = scales.scale / torch.where(begun, previous[1], scales.scale)
        ratios = torch.cat([growth[..., None], scales.count[..., None] + 1, scales.lag_scale / scale], -1)
        logs = ratios.log().to(dtype)
        seen = observed.to(dtype)
        silence = seen.new_zeros(B, V, N, 1)
        if gap is not None:
            silence = torch.log1p(gap.to(dtype))[:, None, :, None].expand(-1, V, -1, -1) / 5
        counted, ratios = logs[..., 1:2] / 10, logs[..., 2:] / 3
        share = seen.mean(-1, keepdim=True)
        parts = [level, seen, change, ahead, logs[..., :1], drift, counted, ratios, share, silence]
        if known.shape[1]:
            given = ~known.isnan()
            share = given.unflatten(-1, (-1, P)).to(dtype).mean(-1)
            future = torch.cat([torch.where(given, known, 0.0).to(dtype), share], -1)  # B F N (S + K + 1)
            parts.append(future.transpose(1, 2).flatten(2)[:, None].expand(-1, V, -1, -1))
        x = torch.cat(parts, -1)
        # float32 also under autocast: the residual stream starts here
        token = (self.direct(x) + self.second(nn.functional.silu(self.first(x)))).to(dtype)
        for i, table in enumerate(self.static):
            category = static[:, i]
            category = torch.where((category > 0) & (category <= self.categories[i]), category, 0)
            token = token + table(category)[:, None, None]
        return token
