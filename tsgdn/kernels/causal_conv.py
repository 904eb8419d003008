"""The short depthwise causal convolution with state: the last W - 1 inputs."""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from tsgdn.kernels.replicas import per_row, rowwise


class _ShiftedProducts(torch.autograd.Function):
    """The sum of W shifted products; its own backward, since that of W slices would fill W tensors with zeros."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, apart: list[Tensor] | None) -> Tensor:
        # One set of taps for all rows, or sets (P, D, W) of R / P rows each.
        taps, ctx.sets = weight.shape[-1], weight.shape[0] if weight.dim() == 3 else None
        weight = weight if ctx.sets is None else per_row(weight, inputs.shape[0], 2)[:, None]
        tokens = inputs.shape[1] - taps + 1
        ctx.save_for_backward(inputs, weight)
        ctx.apart, ctx.biased = apart, bias is not None
        y = inputs[:, taps - 1 :] * weight[..., -1]
        if bias is not None:
            y += bias if ctx.sets is None else per_row(bias, inputs.shape[0], 1)[:, None]
        for j in range(taps - 1):
            y.addcmul_(_masked(inputs[:, j : j + tokens], apart, j), weight[..., j])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        inputs, weight = ctx.saved_tensors
        taps, tokens = weight.shape[-1], dy.shape[1]

        def total(x: Tensor) -> Tensor:
            return x.sum((0, 1)) if ctx.sets is None else x.unflatten(0, (ctx.sets, -1)).sum((1, 2))

        d_inputs = torch.zeros_like(inputs)
        d_weight = []
        for j in range(taps):
            part = dy if j == taps - 1 else _masked(dy, ctx.apart, j)
            d_inputs[:, j : j + tokens].addcmul_(part, weight[..., j])
            d_weight.append(total(part * inputs[:, j : j + tokens]))
        return d_inputs, torch.stack(d_weight, -1), total(dy) if ctx.biased else None, None


def _masked(x: Tensor, apart: list[Tensor] | None, j: int) -> Tensor:
    return x if apart is None else x.masked_fill(apart[j][..., None], 0)


def causal_conv(
    x: Float[Tensor, "R N D"],
    weight: Float[Tensor, "D W"],
    bias: Float[Tensor, " D"] | None = None,
    *,
    state: Float[Tensor, "R W_1 D"] | None = None,
    lengths: Int[Tensor, " R"] | None = None,
    restart: Bool[Tensor, "R N"] | None = None,
) -> tuple[Float[Tensor, "R N D"], Float[Tensor, "R W_1 D"]]:
    """y_n = bias + sum_j weight[:, W-1-j] x_{n-j}, as W shifted products; any N >= 0.

    Args:
        x: inputs; what lies beyond a row's length must be finite.
        weight: taps, the last one for the current token (as in `torch.nn.functional.conv1d`).
        bias: added to every output.
        state: the W - 1 inputs before the first, oldest first, never changed; None is zeros.
        lengths: tokens per row where they differ. The end state is taken there; outputs beyond mean nothing.
        restart: True where the inputs before this token are forgotten (a gap lies between).

    Returns:
        Outputs in `x`'s number format and the last W - 1 inputs of each row, float32 or wider. A row of length 0 keeps
        its state bitwise.

    Raises:
        ValueError: shapes that do not fit.
    """
    (rows, _, width), taps = x.shape, weight.shape[1]
    if weight.shape[0] != width:
        raise ValueError(f"weight is {tuple(weight.shape)}; with x {tuple(x.shape)} it must be ({width}, W)")
    if state is None:
        state = x.new_zeros(rows, taps - 1, width, dtype=torch.promote_types(x.dtype, torch.float32))
    elif state.shape != (rows, taps - 1, width):
        raise ValueError(f"state is {tuple(state.shape)}; it must be (R, W - 1, D) = {(rows, taps - 1, width)}")
    return rowwise(_causal_conv, (x, state, lengths, restart), (weight, bias))


def _causal_conv(
    x: Tensor,
    state: Tensor,
    lengths: Tensor | None,
    restart: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    (rows, tokens, width), taps = x.shape, weight.shape[-1]
    wide = torch.promote_types(torch.promote_types(x.dtype, torch.float32), state.dtype)
    if tokens == 1 and taps > 1:
        y, end = _one_token(x.to(wide), state.to(wide), lengths, restart, weight.to(wide))
        return (y if bias is None else y + per_row(bias.to(wide), rows, 1).unsqueeze(-2)).to(x.dtype), end
    inputs = torch.cat([state.to(wide), x.to(wide)], 1)

    segment = None
    if restart is not None:
        # Inputs of one segment see each other; the state belongs to the first.
        segment = torch.nn.functional.pad(restart.long().cumsum(1), (taps - 1, 0))

    apart = None
    if segment is not None:
        apart = [segment[:, j : j + tokens] != segment[:, taps - 1 :] for j in range(taps - 1)]
    y = _ShiftedProducts.apply(inputs, weight.to(wide), None if bias is None else bias.to(wide), apart)

    if taps == 1:
        return y.to(x.dtype), state.clone()
    if lengths is None and segment is None:
        return y.to(x.dtype), inputs[:, tokens:].clone()
    if lengths is None:
        lengths = torch.full((rows,), tokens, device=x.device)
    index = lengths.long()[:, None] + torch.arange(taps - 1, device=x.device)
    end = inputs.gather(1, index[..., None].expand(-1, -1, width))
    if segment is not None:
        kept = segment.gather(1, index)
        end = end.masked_fill((kept != kept[:, -1:])[..., None], 0)
    return y.to(x.dtype), end


def _one_token(
    x: Tensor, state: Tensor, lengths: Tensor | None, restart: Tensor | None, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """A token alone sees the state whole or, after a gap, not at all."""
    before = state if restart is None else state.masked_fill(restart[..., None], 0)
    inputs = torch.cat([before, x], 1)
    y = (inputs * per_row(weight, x.shape[0], 2).mT).sum(1, keepdim=True)
    end = inputs[:, 1:]
    return y, end.clone() if lengths is None else torch.where((lengths > 0)[:, None, None], end, state)
