"""The gated delta rule for a few new tokens in one Triton launch; the state stays in registers between them.

One token costs one read and one write of S and little else, so the launch is made of memory traffic: a program owns one
(row, head, tile of value channels), asks for its tile of S first, and forms prediction and output from the same
registers. Everything is float32 on the ordinary units: no product goes through the tensor cores, whose rounding would
add up over the tokens of a stream. Equations: docs/gated_delta_rule.md, "One token".
"""

from typing import Any, NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from tsgdn.kernels.gated_delta_rule import check_inputs
from tsgdn.kernels.gated_delta_rule.tiles import EPS
from tsgdn.kernels.layout import dense_last, power_of_two


class Tile(NamedTuple):
    """How the state of one head is spread: value channels per program, warps per program."""

    values: int
    warps: int


# By (key, value) sizes padded to powers of two, chosen so that one warp has the tile, where it can: sums over keys then
# cross no warps. A thread holds at most 64 numbers of S, half of its registers: half of all registers can be state that
# is on its way from memory.
TILES = {
    (16, 16): Tile(16, 1),
    (32, 32): Tile(32, 1),
    (32, 64): Tile(32, 1),
    (64, 64): Tile(32, 1),
    (64, 128): Tile(32, 1),
    (128, 64): Tile(16, 1),
    (128, 128): Tile(16, 1),
    (128, 256): Tile(16, 1),
    (256, 256): Tile(16, 2),
}
LARGEST_KEY = 256


def tile_for(key_dim: int, value_dim: int) -> Tile:
    """The pinned tile of a head size; sizes without their own take that of the nearest that holds their keys.

    Raises:
        ValueError: a key size that no tile holds.
    """
    keys, values = power_of_two(key_dim), power_of_two(value_dim)
    if keys > LARGEST_KEY:
        raise ValueError(f"key_dim is {key_dim}; the one-token kernels take up to {LARGEST_KEY}, use the torch path")
    found = TILES.get((keys, values))
    if found is None:
        found = TILES[min((size for size in TILES if size[0] >= keys), key=lambda s: (s[0], abs(s[1] - values)))]
    return Tile(min(found.values, values), found.warps)


def check_can_run(kernel: object, device: torch.device) -> None:
    """Raises RuntimeError where a compiled kernel meets tensors that are not on a CUDA device."""
    if device.type != "cuda" and isinstance(kernel, triton.JITFunction):
        raise RuntimeError(f"the one-token kernels need a CUDA device, the tensors are on {device}; use the torch path")


def launch_options(warps: int) -> dict[str, int]:
    """What the number of warps decides; there is nothing to pipeline, all loads are asked for at the start."""
    return {"JOINT": warps > 1, "num_warps": warps, "num_stages": 1}


@triton.jit
@no_type_check
def column(x, PER_CHANNEL: tl.constexpr):
    """A scalar as it is, a vector over keys as a column."""
    if PER_CHANNEL:
        return x[:, None]
    else:
        return x


@triton.jit
@no_type_check
def _add2(a0, a1, b0, b1):
    return a0 + b0, a1 + b1


@triton.jit
@no_type_check
def _add3(a0, a1, a2, b0, b1, b2):
    return a0 + b0, a1 + b1, a2 + b2


@triton.jit
@no_type_check
def products(q, k, JOINT: tl.constexpr):
    """q.q, k.k and q.k; JOINT takes the sums in one go, which pays where they cross warps."""
    if JOINT:
        return tl.reduce((q * q, k * k, q * k), 0, _add3)
    else:
        return tl.sum(q * q, 0), tl.sum(k * k, 0), tl.sum(q * k, 0)


@triton.jit
@no_type_check
def looked_up(S, e, q, JOINT: tl.constexpr):
    """S^T e and S^T q."""
    if JOINT:
        return tl.reduce((S * e[:, None], S * q[:, None]), 0, _add2)
    else:
        return tl.sum(S * e[:, None], 0), tl.sum(S * q[:, None], 0)


@triton.jit
@no_type_check
def advance(
    S, q, k, decay, target, erase, scale, NORM: tl.constexpr, DELTA: tl.constexpr, DECAY_CHANNELS: tl.constexpr,
    ERASE_CHANNELS: tl.constexpr, JOINT: tl.constexpr,
):  # fmt: skip
    """Output, state and residual after one token; `target` is beta v, decay and erase are numbers or vectors over keys.

    With Sbar = decay S: a = Sbar^T (erase k), c = Sbar^T q, rho = target - a, o = c + (k.q) rho, S' = Sbar + k rho^T.
    The lengths of q and k and `scale` are factors of the sums, so no sum waits for another.
    """
    qq, kk, qk = products(q, k, JOINT)  # pyright: ignore
    of_q = scale
    of_k = 1.0
    if NORM:
        of_q = scale * tl.rsqrt(qq + EPS)
        of_k = tl.rsqrt(kk + EPS)
    S = S * column(decay, DECAY_CHANNELS)
    if DELTA:
        if ERASE_CHANNELS:
            seen, read = looked_up(S, erase * k, q, JOINT)
            rho = target - of_k * seen
        else:
            seen, read = looked_up(S, k, q, JOINT)
            rho = target - (erase * of_k) * seen
    else:
        read = tl.sum(S * q[:, None], 0)
        rho = target
    o = of_q * (read + (of_k * qk) * rho)
    S = S + k[:, None] * (of_k * rho)[None, :]
    return o, S, rho


@triton.jit
@no_type_check
def load_tile(pointers, inside, WHOLE: tl.constexpr):
    """A tile of the state; without a mask where every place of it exists."""
    if WHOLE:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
@no_type_check
def store_tile(pointers, S, inside, WHOLE: tl.constexpr):
    """The counterpart of `load_tile`."""
    if WHOLE:
        tl.store(pointers, S)
    else:
        tl.store(pointers, S, mask=inside)


@triton.jit(do_not_specialize=["scale", "N"])
@no_type_check
def decode_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    g_ptr,
    b_ptr,
    e_ptr,
    s0_ptr,
    o_ptr,
    s1_ptr,
    rho_ptr,
    scale,
    N,
    q_row,
    q_token,
    q_head,
    k_row,
    k_token,
    k_head,
    v_row,
    v_token,
    v_head,
    H: tl.constexpr,
    HK: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    PARTS: tl.constexpr,
    DELTA: tl.constexpr,
    NORM: tl.constexpr,
    HAS_STATE: tl.constexpr,
    DECAY_CHANNELS: tl.constexpr,
    BETA_CHANNELS: tl.constexpr,
    ERASE: tl.constexpr,
    JOINT: tl.constexpr,
):
    """Outputs, end state, residuals of N tokens. ERASE: 0 tied to beta or no delta, 1 per head, 2 per key channel."""
    WHOLE: tl.constexpr = (DK == BK) and (DV == BV * PARTS)
    pid = tl.program_id(0)
    part = pid % PARTS
    head = pid // PARTS % H
    row = tl.cast(pid // PARTS // H, tl.int64)
    dk = tl.arange(0, BK)
    dv = part * BV + tl.arange(0, BV)
    in_k = dk < DK
    in_v = dv < DV
    inside = in_k[:, None] & in_v[None, :]
    place = (row * H + head) * (DK * DV) + dk[:, None] * DV + dv[None, :]
    S = tl.zeros([BK, BV], tl.float32)
    if HAS_STATE:
        S = load_tile(s0_ptr + place, inside, WHOLE)
    group = head // (H // HK)
    q_base = q_ptr + row * q_row + group * q_head
    k_base = k_ptr + row * k_row + group * k_head
    v_base = v_ptr + row * v_row + head * v_head
    for n in range(N):
        n64 = tl.cast(n, tl.int64)
        at = (row * N + n64) * H + head
        k = tl.load(k_base + n64 * k_token + dk, mask=in_k, other=0.0).to(tl.float32)
        q = tl.load(q_base + n64 * q_token + dk, mask=in_k, other=0.0).to(tl.float32)
        v = tl.load(v_base + n64 * v_token + dv, mask=in_v, other=0.0).to(tl.float32)
        if DECAY_CHANNELS:
            g = tl.load(g_ptr + at * DK + dk, mask=in_k, other=0.0).to(tl.float32)
        else:
            g = tl.load(g_ptr + at).to(tl.float32)
        if BETA_CHANNELS:
            b = tl.load(b_ptr + at * DV + dv, mask=in_v, other=0.0).to(tl.float32)
        else:
            b = tl.load(b_ptr + at).to(tl.float32)
        if ERASE == 2:
            e = tl.load(e_ptr + at * DK + dk, mask=in_k, other=0.0).to(tl.float32)
        elif ERASE == 1:
            e = tl.load(e_ptr + at).to(tl.float32)
        else:
            e = b
        o, S, rho = advance(  # pyright: ignore
            S, q, k, tl.exp(g), b * v, e, scale, NORM, DELTA, DECAY_CHANNELS, ERASE == 2, JOINT
        )
        tl.store(o_ptr + at * DV + dv, o.to(o_ptr.dtype.element_ty), mask=in_v)
        tl.store(rho_ptr + at * DV + dv, rho.to(rho_ptr.dtype.element_ty), mask=in_v)
    store_tile(s1_ptr + place, S, inside, WHOLE)


@torch.library.custom_op("tsgdn::decode", mutates_args=())
def decode_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    erase: Tensor | None,
    delta: bool,
    state: Tensor | None,
    norm: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op behind `decode`: outputs, end state, residuals."""
    o, end, rho = _decode_outputs(k, v)
    rows, tokens, heads, value_dim = v.shape
    key_dim = k.shape[3]
    if not v.numel():
        return o, end.zero_() if state is None else end.copy_(state), rho
    check_can_run(decode_kernel, v.device)
    tile = tile_for(key_dim, value_dim)
    parts = -(-value_dim // tile.values)
    q, k, v = dense_last(q), dense_last(k), dense_last(v)
    kind = 0 if erase is None or not delta else erase.dim() - 2
    sizes: dict[str, Any] = {
        "H": heads, "HK": k.shape[2], "DK": key_dim, "DV": value_dim, "BK": power_of_two(key_dim), "BV": tile.values,
        "PARTS": parts, "DELTA": delta, "NORM": norm, "HAS_STATE": state is not None, "ERASE": kind,
        "DECAY_CHANNELS": log_decay.dim() == 4, "BETA_CHANNELS": beta.dim() == 4, **launch_options(tile.warps),
    }  # fmt: skip
    decode_kernel[(rows * heads * parts,)](  # pyright: ignore
        q, k, v, log_decay.contiguous(), beta.contiguous(), None if erase is None else erase.contiguous(),
        None if state is None else state.contiguous(), o, end, rho, scale, tokens,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], **sizes,  # pyright: ignore
    )  # fmt: skip
    return o, end, rho


def _decode_outputs(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows, _, heads, value_dim = v.shape
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    return o, o.new_empty((rows, heads, k.shape[3], value_dim), dtype=torch.float32), torch.empty_like(o)


@decode_op.register_fake
def _(q, k, v, log_decay, beta, erase, delta, state, norm, scale):
    return _decode_outputs(k, v)


def decode(
    q: Float[Tensor, "R N HK Dk"],
    k: Float[Tensor, "R N HK Dk"],
    v: Float[Tensor, "R N H Dv"],
    log_decay: Float[Tensor, "R N H"] | Float[Tensor, "R N H Dk"],
    beta: Float[Tensor, "R N H"] | Float[Tensor, "R N H Dv"],
    erase: Float[Tensor, "R N H"] | Float[Tensor, "R N H Dk"] | None,
    delta: bool,
    state: Float[Tensor, "R H Dk Dv"] | None,
    *,
    norm: bool = False,
    scale: int | float = 1.0,
) -> tuple[Float[Tensor, "R N H Dv"], Float[Tensor, "R H Dk Dv"], Float[Tensor, "R N H Dv"]]:
    """The memory continued by N tokens, token after token, in one launch; meant for N = 1 and a few more.

    The equations are those of `gated_delta_rule`; every number is float32 inside. There are no gradients.

    Args:
        q: queries. Value head h reads query and key head h // (H // HK).
        k: keys.
        v: values.
        log_decay: natural logarithm of what is kept, per head or per key channel.
        beta: write strength, per head or per value channel.
        erase: strength of the correction, per head or per key channel; None ties it to `beta`.
        delta: False leaves the correction out.
        state: S before the first token in float32, never changed; None is zeros.
        norm: divide queries and keys by their length, sqrt(sum of squares + 1e-6).
        scale: multiplies the queries, after the division.

    Returns:
        Outputs in `v`'s number format, S after the last token in float32, and the residuals rho like the outputs.

    Raises:
        ValueError: shapes or number formats that do not fit.
        RuntimeError: the tensors are not on a CUDA device.
    """
    _check(q, k, v, log_decay, beta, erase, delta, state)
    return decode_op(q, k, v, log_decay, beta, erase, delta, state, norm, float(scale))


def check_float(name: str, x: Tensor) -> None:
    """Raises ValueError for a number format that the kernels would have to narrow."""
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"{name} is {x.dtype}; the one-token kernels compute in float32, use the torch path")


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    erase: Tensor | None,
    delta: bool,
    state: Tensor | None,
) -> None:
    check_inputs(q, k, v, log_decay, beta, erase, delta, state, None)
    for name, x in {"q": q, "k": k, "v": v, "log_decay": log_decay, "beta": beta, "erase": erase}.items():
        if x is not None:
            check_float(name, x)
    if state is not None and state.dtype != torch.float32:
        raise ValueError(f"state is {state.dtype}; the one-token kernels keep it in float32, use the torch path")
