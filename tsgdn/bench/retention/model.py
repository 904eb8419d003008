"""The small model whose memory is examined: tokens, an affine map, the backbone, a linear read-out."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from tsgdn.bench.matching import Matched
from tsgdn.mixers.layers import draws, linear, uniform
from tsgdn.model.backbone import Backbone


class RegimeModel(nn.Module):
    """Forecasts step t + 1 of a retention task from token t and what the state holds.

    Args:
        inputs: numbers of a token.
        outputs: numbers of a forecast.
        width: of the tokens inside.
        depth: blocks.
        sizes: mixer, its arguments and the MLP's ratio; see `matching.regime_sizes`.
    """

    def __init__(self, inputs: int, outputs: int, *, width: int, depth: int, sizes: Matched) -> None:
        super().__init__()
        generator = draws()
        self.embed = linear(inputs, width, generator, width=inputs)
        # Without it a hidden step that has no cue would be a zero token, which reads nothing from any memory.
        self.start = uniform((width,), width**-0.5, generator)
        self.read = linear(width, outputs, generator, width=width)
        self.backbone = Backbone(width, depth, sizes.mixer, sizes.mixer_args, sizes.mlp_ratio, variate_every=0)

    def forward(
        self,
        x: Float[Tensor, "B T F"],
        gap: Shaped[Tensor, "B T"] | None = None,
        write: Shaped[Tensor, "B T"] | None = None,
        state: Any = None,
    ) -> tuple[Float[Tensor, "B T C"], Any]:
        """Continues B streams by T tokens; `gap` and `write` as the mixers take them."""
        mixed, state = self.backbone((self.embed(x) + self.start)[:, None], state, gap=gap, write=write)
        return self.read(mixed[:, 0]), state


def loss(forecast: Float[Tensor, "B T C"], batch: Mapping[str, Tensor]) -> Float[Tensor, ""]:
    """The weighted squared error of `data.retention.loss_weight`, whose weights hold every mean."""
    return (batch["weight"] * (forecast - batch["targets"]).square()).sum()


def assemble(fields: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tokens, targets and weights of blocks (..., T, .), as `data.retention.tokens` makes them, on any device.

    Time between events is a feature only: a mixer's `gap` would also clear the short convolution at every event.

    Returns:
        x (..., T-1, F), targets (..., T-1, C), weight (..., T-1, C or 1).
    """
    values, cue, action = fields["values"], fields["cue"], fields["action"]
    seen = fields["observed"].to(values.dtype)
    mask = seen.expand_as(values)
    parts = [values * mask, mask, cue, action]
    left = [part[..., :-1, :] for part in parts]
    columns = [*left[:3], cue[..., 1:, :], left[3], action[..., 1:, :]]
    out = {"targets": values[..., 1:, :]}
    if "weight" in fields:
        out["weight"] = fields["weight"][..., 1:, :]
    if "elapsed" in fields:
        columns.append(fields["elapsed"][..., :-1, :])
    return {"x": torch.cat(columns, -1), **out}
