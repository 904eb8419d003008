"""One layer's new tokens over a pool of states, in place, in one Triton launch: all of Gated DeltaNet but its products.

    [q, k, v] = SiLU(conv(inputs));   q <- L2(q) / sqrt(Dk);   k <- L2(k)
    beta = beta_max sigmoid(raw_beta) write;   log_decay = -exp(A_log) softplus(raw_dt + dt_bias) + gap · rate
    o, S <- the gated delta rule;   y = RMSNorm(o) · act(gate)   or   RMSNorm(o · act(gate))

Source: Gated Delta Networks, arXiv 2412.06464, as `tsgdn.mixers.gated_deltanet` computes it.

The tails of the convolution are shared: all value heads of a group read the channels of one key head. So one program
owns a (row, key head) with everything that hangs on it, its value heads one after the other, and nobody else touches
those channels. Inside the program all threads pass a barrier between the last read of a tail and its overwriting.
"""

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int64, Real, Shaped
from torch import Tensor

from tsgdn.kernels.gated_delta_rule.decode import (
    advance,
    check_can_run,
    check_float,
    launch_options,
    load_tile,
    store_tile,
)
from tsgdn.kernels.layout import dense_last, power_of_two
from tsgdn.kernels.pointwise import sigmoid, silu, softplus

# Warps by (key, value) sizes padded to powers of two. The norm of the output needs a head's whole state in one program;
# a thread holds up to 128 numbers of it. With more warps than key channels / 32 the compiler repeats the convolution in
# every thread instead of handing its result over, and runs out of registers.
WARPS = {
    (16, 16): 1,
    (32, 32): 1,
    (32, 64): 1,
    (64, 64): 1,
    (64, 128): 2,
    (128, 64): 2,
    (128, 128): 4,
}
LARGEST = 128


def warps_for(key_dim: int, value_dim: int) -> int:
    """The pinned number of warps of a head size; sizes without their own take that of the nearest that holds them.

    Raises:
        ValueError: a head that is too large for one program.
    """
    keys, values = power_of_two(key_dim), power_of_two(value_dim)
    fitting = [size for size in WARPS if size[0] >= keys and size[1] >= values]
    if not fitting:
        raise ValueError(
            f"the head is {key_dim} x {value_dim}; decode_pool takes up to {LARGEST} x {LARGEST}, use decode"
        )
    return WARPS[min(fitting, key=lambda size: size[0] * size[1])]


@triton.jit
@no_type_check
def convolved(
    x_base, tail_base, w_ptr, bias_ptr, channel, inside, kept, CHANNELS: tl.constexpr, W: tl.constexpr,
    BIAS: tl.constexpr,
):  # fmt: skip
    """SiLU of one token's causal convolution, and its inputs; from channel `kept` on, the tail counts as zeros."""
    x = tl.load(x_base + channel, mask=inside, other=0.0).to(tl.float32)
    total = x * tl.load(w_ptr + channel * W + W - 1, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        total += tl.load(bias_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    inputs = ()
    for j in tl.static_range(W - 1):  # pyright: ignore
        old = tl.load(tail_base + j * CHANNELS + channel, mask=inside & (channel < kept), other=0.0)
        total += old * tl.load(w_ptr + channel * W + j, mask=inside, other=0.0).to(tl.float32)
        inputs = inputs + (old,)  # noqa: RUF005  # a Triton tuple
    return silu(total), inputs + (x,)  # noqa: RUF005


@triton.jit
@no_type_check
def store_tail(tail_base, inputs, channel, inside, CHANNELS: tl.constexpr, W: tl.constexpr):
    """The last W - 1 inputs become the tail. A barrier must lie between the reading of the old one and this."""
    for j in tl.static_range(W - 1):  # pyright: ignore
        tl.store(tail_base + j * CHANNELS + channel, inputs[j + 1], mask=inside)


@triton.jit(do_not_specialize=["eps", "beta_max", "N", "slots"])
@no_type_check
def pool_kernel(
    x_ptr,
    gate_ptr,
    raw_ptr,
    memory_ptr,
    tail_ptr,
    index_ptr,
    conv_w_ptr,
    conv_b_ptr,
    a_ptr,
    dt_ptr,
    rate_ptr,
    norm_ptr,
    write_ptr,
    gap_ptr,
    y_ptr,
    eps,
    beta_max,
    N,
    slots,
    x_row,
    x_token,
    gate_row,
    gate_token,
    raw_row,
    raw_token,
    H: tl.constexpr,
    HK: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    W: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    SCALE: tl.constexpr,
    DELTA: tl.constexpr,
    DECAY: tl.constexpr,
    BIAS: tl.constexpr,
    WRITE: tl.constexpr,
    GAP: tl.constexpr,
    SIGMOID: tl.constexpr,
    NORM_FIRST: tl.constexpr,
    JOINT: tl.constexpr,
):
    """The outputs y (B, N, H, DV) and, in place, the memory and the tail of the slots that `index` names."""
    WHOLE: tl.constexpr = (DK == BK) and (DV == BV)
    CHANNELS: tl.constexpr = 2 * HK * DK + H * DV
    GROUP: tl.constexpr = H // HK
    pid = tl.program_id(0)
    group = pid % HK
    row = tl.cast(pid // HK, tl.int64)
    slot = tl.cast(tl.load(index_ptr + row), tl.int64)
    dk = tl.arange(0, BK)
    dv = tl.arange(0, BV)
    in_k = dk < DK
    in_v = dv < DV
    y_base = y_ptr + (row * N * H + group * GROUP) * DV
    if (slot >= 0) & (slot < slots):
        tail_base = tail_ptr + slot * ((W - 1) * CHANNELS)
        inside = in_k[:, None] & in_v[None, :]
        place = memory_ptr + (slot * H + group * GROUP) * (DK * DV) + dk[:, None] * DV + dv[None, :]
        S = tl.zeros([BK, BV], tl.float32)
        if GROUP == 1:
            S = load_tile(place, inside, WHOLE)  # asked for before anything is computed
        weight = tl.load(norm_ptr + dv, mask=in_v, other=0.0).to(tl.float32)
        q_channel = group * DK + dk
        k_channel = (HK + group) * DK + dk
        for n in range(N):
            # All loads come before the first barrier, past which the compiler moves none.
            n64 = tl.cast(n, tl.int64)
            x_base = x_ptr + row * x_row + n64 * x_token
            kept = CHANNELS
            if GAP:
                gap = tl.load(gap_ptr + row * N + n64).to(tl.float32)
                kept = tl.where(gap > 0, 0, CHANNELS)
            q, q_inputs = convolved(x_base, tail_base, conv_w_ptr, conv_b_ptr, q_channel, in_k, kept, CHANNELS, W, BIAS)
            k, k_inputs = convolved(x_base, tail_base, conv_w_ptr, conv_b_ptr, k_channel, in_k, kept, CHANNELS, W, BIAS)
            for member in range(GROUP):
                head = group * GROUP + member
                if GROUP > 1:  # more heads than registers hold: each comes and goes with every token
                    S = load_tile(place + member * (DK * DV), inside, WHOLE)
                v_channel = 2 * HK * DK + head * DV + dv
                v, v_inputs = convolved(
                    x_base, tail_base, conv_w_ptr, conv_b_ptr, v_channel, in_v, kept, CHANNELS, W, BIAS
                )
                gate_base = gate_ptr + row * gate_row + n64 * gate_token + head * DV
                gate = tl.load(gate_base + dv, mask=in_v, other=0.0).to(tl.float32)
                raw = raw_ptr + row * raw_row + n64 * raw_token + head
                beta = sigmoid(tl.load(raw).to(tl.float32)) * beta_max
                if WRITE:
                    beta *= tl.load(write_ptr + row * N + n64).to(tl.float32)
                decay = 1.0
                if DECAY:
                    dt = softplus(tl.load(raw + H).to(tl.float32) + tl.load(dt_ptr + head).to(tl.float32))
                    log_decay = -tl.exp(tl.load(a_ptr + head).to(tl.float32)) * dt
                    if GAP:
                        log_decay += tl.maximum(-gap * tl.exp(tl.load(rate_ptr + head).to(tl.float32)), -40.0)
                    decay = tl.exp(log_decay)
                if W > 1:
                    tl.debug_barrier()
                    store_tail(tail_base, v_inputs, v_channel, in_v, CHANNELS, W)
                    if GROUP == 1:
                        store_tail(tail_base, q_inputs, q_channel, in_k, CHANNELS, W)
                        store_tail(tail_base, k_inputs, k_channel, in_k, CHANNELS, W)
                o, S, _ = advance(  # pyright: ignore
                    S, q, k, decay, beta * v, beta, SCALE, True, DELTA, False, False, JOINT
                )
                if GROUP > 1:
                    store_tile(place + member * (DK * DV), S, inside, WHOLE)
                opened = sigmoid(gate)
                if not SIGMOID:
                    opened *= gate
                if not NORM_FIRST:
                    o *= opened
                y = o * tl.rsqrt(tl.sum(o * o, 0) / DV + eps) * weight
                if NORM_FIRST:
                    y *= opened
                tl.store(y_base + (n64 * H + member) * DV + dv, y.to(y_ptr.dtype.element_ty), mask=in_v)
            if W > 1 and GROUP > 1:  # past a barrier
                store_tail(tail_base, q_inputs, q_channel, in_k, CHANNELS, W)
                store_tail(tail_base, k_inputs, k_channel, in_k, CHANNELS, W)
            if W > 1 or GROUP > 1:  # what the next token reads is written
                tl.debug_barrier()
        if GROUP == 1:
            store_tile(place, S, inside, WHOLE)
    else:
        nothing = tl.where(slot < 0, 0.0, float("nan")) + tl.zeros([BV], tl.float32)
        for n in range(N):
            for member in range(GROUP):
                at = (tl.cast(n, tl.int64) * H + member) * DV + dv
                tl.store(y_base + at, nothing.to(y_ptr.dtype.element_ty), mask=in_v)


def _key_heads(inputs: Tensor, memory: Tensor) -> int:
    heads, key_dim, value_dim = memory.shape[1:]
    return (inputs.shape[2] - heads * value_dim) // (2 * key_dim)


@torch.library.custom_op("tsgdn::decode_pool", mutates_args=("memory", "conv"))
def decode_pool_op(
    inputs: Tensor,
    gate: Tensor,
    raw: Tensor,
    memory: Tensor,
    conv: Tensor,
    index: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    rate_log: Tensor | None,
    norm_weight: Tensor,
    write: Tensor | None,
    gap: Tensor | None,
    eps: float,
    beta_max: float,
    delta: bool,
    sigmoid_gate: bool,
    norm_before_gate: bool,
) -> Tensor:
    """The op behind `decode_pool`."""
    y = torch.empty(gate.shape, dtype=inputs.dtype, device=inputs.device)
    if not y.numel():
        return y
    check_can_run(pool_kernel, inputs.device)
    rows, tokens, _ = inputs.shape
    slots, heads, key_dim, value_dim = memory.shape
    taps, key_heads = conv_weight.shape[1], _key_heads(inputs, memory)
    inputs, gate, raw = (dense_last(x) for x in (inputs, gate, raw))
    sizes: dict[str, Any] = {
        "H": heads, "HK": key_heads, "DK": key_dim, "DV": value_dim, "W": taps, "BK": power_of_two(key_dim),
        "BV": power_of_two(value_dim), "SCALE": key_dim**-0.5, "DELTA": delta,
        "DECAY": A_log is not None, "BIAS": conv_bias is not None, "WRITE": write is not None, "GAP": gap is not None,
        "SIGMOID": sigmoid_gate, "NORM_FIRST": norm_before_gate, **launch_options(warps_for(key_dim, value_dim)),
    }  # fmt: skip
    pool_kernel[(rows * key_heads,)](  # pyright: ignore
        inputs, gate, raw, memory, conv, index.contiguous(), conv_weight.contiguous(), conv_bias, A_log, dt_bias,
        rate_log, norm_weight, None if write is None else write.contiguous(),
        None if gap is None else gap.contiguous(), y, eps, beta_max, tokens, slots,
        *inputs.stride()[:2], *gate.stride()[:2], *raw.stride()[:2], **sizes,  # pyright: ignore
    )  # fmt: skip
    return y


@decode_pool_op.register_fake
def _(
    inputs, gate, raw, memory, conv, index, conv_weight, conv_bias, A_log, dt_bias, rate_log, norm_weight, write, gap,
    eps, beta_max, delta, sigmoid_gate, norm_before_gate,
):  # fmt: skip
    return torch.empty(gate.shape, dtype=inputs.dtype, device=inputs.device)


def decode_pool(
    inputs: Float[Tensor, "B N C"],
    gate: Float[Tensor, "B N HDv"],
    raw: Float[Tensor, "B N G"],
    memory: Float[Tensor, "slots H Dk Dv"],
    conv: Float[Tensor, "slots W_1 C"],
    index: Int64[Tensor, " B"],
    *,
    conv_weight: Float[Tensor, "C W"],
    norm_weight: Float[Tensor, " Dv"],
    conv_bias: Float[Tensor, " C"] | None = None,
    A_log: Float[Tensor, " H"] | None = None,
    dt_bias: Float[Tensor, " H"] | None = None,
    rate_log: Float[Tensor, " H"] | None = None,
    eps: int | float = 1e-5,
    activation: str = "silu",
    norm_before_gate: bool = True,
    beta_max: int | float = 1,
    delta: bool = True,
    write: Shaped[Tensor, "B N"] | None = None,
    gap: Real[Tensor, "B N"] | None = None,
) -> Float[Tensor, "B N HDv"]:
    """A Gated DeltaNet layer between its projections, for N new tokens of B streams; memory and tails change in place.

    One launch, nothing waits for the device: it may be captured in a CUDA graph. Everything inside is float32. There
    are no gradients. It costs one read and one write of the named memories and little else.

    Args:
        inputs: projections of the new tokens before the convolution: q and k channels of HK heads, v channels of H
            heads, C = 2·HK·Dk + H·Dv. Value head h reads key head h // (H // HK).
        gate: of the output, before its activation.
        raw: logits of beta (H), then those of the time step (H); beta's alone where nothing decays.
        memory: S of every slot, float32, contiguous; changed in place.
        conv: the last W - 1 inputs of every slot, oldest first, float32, contiguous; changed in place.
        index: slot of each row, on the same device. -1 skips the row: its y is 0 and nothing is written. No slot may
            be named twice: the rows would overwrite each other. A number beyond the pool writes nothing either, and
            its y is NaN.
        conv_weight: taps, the last one for the current token.
        norm_weight: gain of the RMSNorm over a head's output.
        conv_bias: added to every output of the convolution.
        A_log: logarithm of the decay's factor; None = nothing decays.
        dt_bias: added to the logits of the time step.
        rate_log: logarithm of minus the log decay per patch of silence; needed with `gap` where the memory decays.
        eps: of the RMSNorm.
        activation: of the gate, "silu" or "sigmoid".
        norm_before_gate: norm, then gate; False = the other order.
        beta_max: 1, or 2 to allow negative eigenvalues.
        delta: False adds beta v without looking what is stored.
        write: in [0, 1], multiplies beta.
        gap: patches of silence before the token, >= 0; a gap above 0 clears the tail of the convolution.

    Returns:
        What the output projection takes, in the number format of `inputs`.

    Raises:
        ValueError: shapes, number formats or layouts that do not fit.
        RuntimeError: the tensors are not on a CUDA device.
    """
    if activation not in ("silu", "sigmoid"):
        raise ValueError(f"activation is {activation!r}; expected silu or sigmoid")
    _check(
        inputs,
        gate,
        raw,
        memory,
        conv,
        index,
        conv_weight,
        conv_bias,
        A_log,
        dt_bias,
        rate_log,
        norm_weight,
        write,
        gap,
    )
    return decode_pool_op(
        inputs, gate, raw, memory, conv, index, conv_weight, conv_bias, A_log, dt_bias, rate_log, norm_weight, write,
        gap, float(eps), float(beta_max), delta, activation == "sigmoid", norm_before_gate,
    )  # fmt: skip


def _check(
    inputs: Tensor,
    gate: Tensor,
    raw: Tensor,
    memory: Tensor,
    conv: Tensor,
    index: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    rate_log: Tensor | None,
    norm_weight: Tensor,
    write: Tensor | None,
    gap: Tensor | None,
) -> None:
    for name, x in {"inputs": inputs, "gate": gate, "raw": raw}.items():
        check_float(name, x)
    for name, x in {"memory": memory, "conv": conv}.items():
        if x.dtype != torch.float32 or not x.is_contiguous():
            raise ValueError(f"{name} is {x.dtype} with strides {x.stride()}; it changes in place: contiguous float32")
    slots, heads, key_dim, value_dim = memory.shape
    rows, tokens, channels = inputs.shape
    key_heads = _key_heads(inputs, memory)
    fits = key_heads > 0 and channels == 2 * key_heads * key_dim + heads * value_dim
    if not fits or heads % key_heads:
        raise ValueError(
            f"inputs has {channels} channels; with memory {tuple(memory.shape)} it must have "
            f"2·HK·{key_dim} + {heads * value_dim}, HK a divisor of {heads}"
        )
    if (A_log is None) != (dt_bias is None):
        raise ValueError("one of A_log and dt_bias is missing; a memory that decays needs both, others neither")
    if A_log is not None and gap is not None and rate_log is None:
        raise ValueError("gap came without rate_log; a memory that decays needs its rate of silence")
    expected = {
        "gate": (gate, (rows, tokens, heads * value_dim)),
        "raw": (raw, (rows, tokens, heads * (1 if A_log is None else 2))),
        "conv": (conv, (slots, conv_weight.shape[1] - 1, channels)),
        "index": (index, (rows,)),
        "conv_weight": (conv_weight, (channels, conv_weight.shape[1])),
        "norm_weight": (norm_weight, (value_dim,)),
    }
    for name, x in {"A_log": A_log, "dt_bias": dt_bias, "rate_log": rate_log}.items():
        if x is not None:
            expected[name] = (x, (heads,))
    if conv_bias is not None:
        expected["conv_bias"] = (conv_bias, (channels,))
    for name, x in {"write": write, "gap": gap}.items():
        if x is not None:
            expected[name] = (x, (rows, tokens))
    for name, (x, shape) in expected.items():
        if x.shape != shape:
            raise ValueError(f"{name} is {tuple(x.shape)}; it must be {shape}")
    if index.dtype != torch.int64:
        raise ValueError(f"index is {index.dtype}; it must be torch.int64")
