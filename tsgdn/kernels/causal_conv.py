"""The short depthwise causal convolution with state: the last W - 1 inputs."""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable


class _ShiftedProducts(torch.autograd.Function):
    """The sum of W shifted products; its own backward, since that of W slices would fill W tensors with zeros."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, apart: list[Tensor] | None) -> Tensor:
        taps = weight.shape[1]
        tokens = inputs.shape[1] - taps + 1
        ctx.save_for_backward(inputs, weight)
        ctx.apart, ctx.biased = apart, bias is not None
        y = inputs[:, taps - 1 :] * weight[:, -1]
        if bias is not None:
            y += bias
        for j in range(taps - 1):
            y.addcmul_(_masked(inputs[:, j : j + tokens], apart, j), weight[:, j])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        inputs, weight = ctx.saved_tensors
        taps, tokens = weight.shape[1], dy.shape[1]
        d_inputs = torch.zeros_like(inputs)
        d_weight = []
        for j in range(taps):
            part = dy if j == taps - 1 else _masked(dy, ctx.apart, j)
            d_inputs[:, j : j + tokens].addcmul_(part, weight[:, j])
            d_weight.append((part * inputs[:, j : j + tokens]).sum((0, 1)))
        return d_inputs, torch.stack(d_weight, 1), dy.sum((0, 1)) if ctx.biased else None, None


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
    rows, tokens, width = x.shape
    taps = weight.shape[1]
    if weight.shape[0] != width:
        raise ValueError(f"weight is {tuple(weight.shape)}; with x {tuple(x.shape)} it must be ({width}, W)")
    if state is None:
        state = x.new_zeros(rows, taps - 1, width, dtype=torch.promote_types(x.dtype, torch.float32))
    elif state.shape != (rows, taps - 1, width):
        raise ValueError(f"state is {tuple(state.shape)}; it must be (R, W - 1, D) = {(rows, taps - 1, width)}")
    wide = torch.promote_types(torch.promote_types(x.dtype, torch.float32), state.dtype)
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
