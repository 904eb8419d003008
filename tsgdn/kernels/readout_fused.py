"""The gated RMSNorm in one Triton launch each way, as ops of torch, and its body for kernels that end in it."""

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from tsgdn.kernels.layout import power_of_two
from tsgdn.kernels.pointwise import sigmoid
from tsgdn.kernels.replicas import shares

PROGRAMS = 1024
"""At most so many programs share the backward: each writes one row of sums for the weight."""


@triton.jit
@no_type_check
def _across(weight, AXIS: tl.constexpr):
    if AXIS == 0:
        return weight[:, None]
    else:
        return weight[None, :]


@triton.jit
@no_type_check
def _along(scale, AXIS: tl.constexpr):
    if AXIS == 0:
        return scale[None, :]
    else:
        return scale[:, None]


@triton.jit
@no_type_check
def readout_tile(
    o, gate, weight, eps, DV: tl.constexpr, SIGMOID: tl.constexpr, NORM_FIRST: tl.constexpr, AXIS: tl.constexpr
):
    """The readout of a float32 tile whose value channels lie along AXIS; channels beyond DV must be zero in `o`.

    `weight` is float32, one number per channel. Returns float32.
    """
    act = sigmoid(gate)
    if not SIGMOID:
        act = gate * act
    x = o
    if not NORM_FIRST:
        x = x * act
    y = x * _along(tl.rsqrt(tl.sum(x * x, AXIS) / DV + eps), AXIS) * _across(weight, AXIS)
    if NORM_FIRST:
        y = y * act
    return y


@triton.jit
@no_type_check
def readout_gradient_tile(
    dy, o, gate, weight, eps, DV: tl.constexpr, SIGMOID: tl.constexpr, NORM_FIRST: tl.constexpr, AXIS: tl.constexpr
):
    """Gradients of `o` and `gate`, and the terms whose sum over the tokens is that of `weight`; see `readout_tile`."""
    sig = sigmoid(gate)
    if SIGMOID:
        act = sig
        slope = sig * (1.0 - sig)
    else:
        act = gate * sig
        slope = sig * (1.0 + gate * (1.0 - sig))
    x = o
    if not NORM_FIRST:
        x = x * act
    scale = _along(tl.rsqrt(tl.sum(x * x, AXIS) / DV + eps), AXIS)
    x = x * scale
    w = _across(weight, AXIS)
    terms = dy * x
    g = dy * w
    if NORM_FIRST:
        terms = terms * act
        dgate = g * x * slope
        g = g * act
    dx = scale * (g - x * _along(tl.sum(g * x, AXIS) / DV, AXIS))
    if NORM_FIRST:
        return dx, dgate, terms
    else:
        return dx * act, dx * o * slope, terms


@triton.jit(do_not_specialize=["eps", "total"])
@no_type_check
def readout_kernel(
    o_ptr, gate_ptr, w_ptr, y_ptr, eps, total, gate_token,
    H: tl.constexpr, DV: tl.constexpr, BM: tl.constexpr, BV: tl.constexpr,
    SIGMOID: tl.constexpr, NORM_FIRST: tl.constexpr,
):  # fmt: skip
    """The readout of BM vectors of o; vector m belongs to head m % H of token m // H."""
    m = tl.cast(tl.program_id(0), tl.int64) * BM + tl.arange(0, BM)
    v = tl.arange(0, BV)
    inside = (m < total)[:, None] & (v < DV)[None, :]
    at = m[:, None] * DV + v[None, :]
    at_gate = (m // H * gate_token + m % H * DV)[:, None] + v[None, :]
    o = tl.load(o_ptr + at, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + at_gate, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(w_ptr + v, mask=v < DV, other=0.0).to(tl.float32)
    y = readout_tile(o, gate, weight, eps, DV, SIGMOID, NORM_FIRST, 1)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["eps", "total", "share"])
@no_type_check
def readout_backward_kernel(
    dy_ptr, o_ptr, gate_ptr, w_ptr, do_ptr, dgate_ptr, sums_ptr, eps, total, share, gate_token,
    H: tl.constexpr, DV: tl.constexpr, BM: tl.constexpr, BV: tl.constexpr,
    SIGMOID: tl.constexpr, NORM_FIRST: tl.constexpr,
):  # fmt: skip
    """Gradients for `share` tiles of BM vectors, and their sum for the weight."""
    pid = tl.cast(tl.program_id(0), tl.int64)
    v = tl.arange(0, BV)
    weight = tl.load(w_ptr + v, mask=v < DV, other=0.0).to(tl.float32)
    sums = tl.zeros([BM, BV], tl.float32)
    for i in tl.range(0, share, num_stages=1):
        m = (pid * share + i) * BM + tl.arange(0, BM)
        inside = (m < total)[:, None] & (v < DV)[None, :]
        at = m[:, None] * DV + v[None, :]
        at_gate = (m // H * gate_token + m % H * DV)[:, None] + v[None, :]
        dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
        o = tl.load(o_ptr + at, mask=inside, other=0.0).to(tl.float32)
        gate = tl.load(gate_ptr + at_gate, mask=inside, other=0.0).to(tl.float32)
        do, dgate, terms = readout_gradient_tile(dy, o, gate, weight, eps, DV, SIGMOID, NORM_FIRST, 1)
        sums += terms
        tl.store(do_ptr + at, do.to(do_ptr.dtype.element_ty), mask=inside)
        tl.store(dgate_ptr + at, dgate.to(dgate_ptr.dtype.element_ty), mask=inside)
    tl.store(sums_ptr + pid * DV + v, tl.sum(sums, 0), mask=v < DV)


def _strided(gate: Tensor) -> Tensor:
    """`gate` itself if its tokens follow each other at one distance, so that a slice of a projection needs no copy."""
    _, tokens, _, value_dim = gate.shape
    row, token, head, value = gate.stride()
    return gate if (value, head) == (1, value_dim) and row == tokens * token else gate.contiguous()


def _tile(value_dim: int) -> tuple[int, int]:
    """Vectors and padded channels of a tile of about 2048 numbers."""
    padded = power_of_two(value_dim)
    return max(1, 2048 // padded), padded


@torch.library.custom_op("tsgdn::readout", mutates_args=())
def readout_op(o: Tensor, gate: Tensor, weight: Tensor, eps: float, sigmoid: bool, norm_first: bool) -> Tensor:
    """The readout (R, N, H, Dv) in the number format of `o`; `weight` is (Dv,), or sets (P, Dv) of R / P rows each."""
    y = torch.empty(o.shape, dtype=o.dtype, device=o.device)
    if not o.numel():
        return y
    o, gate = o.contiguous(), _strided(gate)
    heads, value_dim = o.shape[2:]
    many, padded = _tile(value_dim)
    total = o.numel() // value_dim // (weight.numel() // value_dim)
    for rows, (w,) in shares((o, gate, y), (weight.contiguous(),), 1):
        o_here, gate_here, y_here = rows
        readout_kernel[(-(-total // many),)](  # pyright: ignore
            o_here, gate_here, w, y_here, eps, total, gate.stride(1), H=heads, DV=value_dim, BM=many, BV=padded,
            SIGMOID=sigmoid, NORM_FIRST=norm_first,
            num_warps=4, num_stages=1,  # pyright: ignore
        )  # fmt: skip
    return y


@readout_op.register_fake
def _(o, gate, weight, eps, sigmoid, norm_first):
    return torch.empty(o.shape, dtype=o.dtype, device=o.device)


@torch.library.custom_op("tsgdn::readout_backward", mutates_args=())
def readout_backward_op(
    dy: Tensor, o: Tensor, gate: Tensor, weight: Tensor, eps: float, sigmoid: bool, norm_first: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of o, gate and weight, each in its number format."""
    do, dgate, dweight = _gradients(o, gate, weight)
    if not o.numel():
        return do, dgate, dweight.zero_()
    dy, o, gate = dy.contiguous(), o.contiguous(), _strided(gate)
    heads, value_dim = o.shape[2:]
    many, padded = _tile(value_dim)
    sets = weight.numel() // value_dim
    total = o.numel() // value_dim // sets
    tiles = -(-total // many)
    share = -(-tiles // PROGRAMS)
    programs = -(-tiles // share)
    partial = o.new_empty((sets, programs, value_dim), dtype=torch.float32)
    parts = shares((dy, o, gate, do, dgate), (weight.contiguous(),), 1)
    for sums, (rows, (w,)) in zip(partial, parts, strict=True):
        dy_here, o_here, gate_here, do_here, dgate_here = rows
        readout_backward_kernel[(programs,)](  # pyright: ignore
            dy_here, o_here, gate_here, w, do_here, dgate_here, sums, eps, total, share, gate.stride(1),
            H=heads, DV=value_dim, BM=many, BV=padded, SIGMOID=sigmoid, NORM_FIRST=norm_first,
            num_warps=4, num_stages=1,  # pyright: ignore
        )  # fmt: skip
    return do, dgate, partial.sum(1).view(weight.shape).to(weight.dtype)


def _gradients(o: Tensor, gate: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty(o.shape, dtype=o.dtype, device=o.device),
        torch.empty(gate.shape, dtype=gate.dtype, device=o.device),
        torch.empty(weight.shape, dtype=weight.dtype, device=o.device),
    )


@readout_backward_op.register_fake
def _(dy, o, gate, weight, eps, sigmoid, norm_first):
    return _gradients(o, gate, weight)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.eps, ctx.sigmoid, ctx.norm_first = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dy: Any) -> Any:
    grads = readout_backward_op(dy, *ctx.saved_tensors, ctx.eps, ctx.sigmoid, ctx.norm_first)
    return *grads, None, None, None


torch.library.register_autograd("tsgdn::readout", _backward, setup_context=_setup)


def fused_readout(o: Tensor, gate: Tensor, weight: Tensor, eps: float, sigmoid: bool, norm_first: bool) -> Tensor:
    """As `tsgdn.kernels.readout`.

    Raises:
        ValueError: float64, or more than 512 value channels.
    """
    if o.dtype == torch.float64:
        raise ValueError("o is float64; the Triton kernels compute in float32, use TSGDN_KERNEL=torch")
    if o.shape[3] > 512:
        raise ValueError(f"o has {o.shape[3]} value channels; Triton takes up to 512, use TSGDN_KERNEL=torch")
    return readout_op(o, gate, weight, eps, sigmoid, norm_first)
