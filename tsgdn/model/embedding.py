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
        lags, long = len(seasons), sum(m > 1 for m in seasons)
        ahead = span // patch_size
        self.long = [i for i, m in enumerate(seasons) if m > 1]
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
        gap: Int64[Tensor, "B N"],
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
            gap: patches of silence that were skipped before the token.
            static: categories, 0 = unknown.
        """
        # differences are taken in float64 and leave it at once: what is left is of the order of 1
        dtype = self.first.weight.dtype
        loc, scale = scales.loc[..., None], scales.scale[..., None]
        zero = torch.zeros((), dtype=dtype, device=values.device)
        level = torch.where(observed, ((values - loc) / scale).to(dtype).asinh(), zero)
        usable = observed[..., None] & views.has_predecessor
        change = (values[..., None] - views.predecessors) / scales.lag_scale[..., None, :]
        change = torch.where(usable, change.to(dtype).asinh(), zero)
        last = ((views.anchors[..., 0, :] - loc) / scale).to(dtype).asinh()
        last = torch.where(views.has_anchor[..., 0, :], last, zero)
        ahead = ((views.anchors[..., self.long] - loc[..., None]) / scale[..., None]).to(dtype).asinh()
        ahead = torch.where(views.has_anchor[..., self.long], ahead, zero)
        growth = scales.scale.log() - torch.where(previous[1] > 0, previous[1], scales.scale).log()
        drift = torch.where(previous[1] > 0, (scales.loc - previous[0]) / scales.scale, 0.0)
        ratios = (scales.lag_scale / scale).log() / 3
        V = values.shape[1]
        given = ~known.isnan()
        given_share = given.unflatten(-1, (-1, values.shape[-1])).to(dtype).mean(-1)
        future = torch.cat([torch.where(given, known, 0.0).to(dtype), given_share], -1)  # B F N (S + K + 1)
        future = future.transpose(1, 2).flatten(2)[:, None].expand(-1, V, -1, -1)
        silence = torch.log1p(gap.to(dtype))[:, None, :, None].expand(-1, V, -1, -1) / 5
        seen = observed.to(dtype)
        numbers = [growth[..., None], drift[..., None].asinh(), torch.log1p(scales.count)[..., None] / 10, ratios]
        x = torch.cat(
            [
                level,
                seen,
                change.flatten(3),
                last,
                ahead.flatten(3),
                *(x.to(dtype) for x in numbers),
                seen.mean(-1, keepdim=True),
                silence,
                future,
            ],
            -1,
        )
        # float32 also under autocast: the residual stream starts here
        token = (self.direct(x) + self.second(nn.functional.silu(self.first(x)))).to(dtype)
        for i, table in enumerate(self.static):
            category = static[:, i]
            category = torch.where((category > 0) & (category <= self.categories[i]), category, 0)
            token = token + table(category)[:, None, None]
        return token
