"""The prologue of a layer in one Triton launch each way, as ops of torch; equations: `tsgdn.kernels.prologue`.

Forward: a program makes a tile of tokens and channels, as W loads shifted by one token, of which the cache serves all
but the first. Backward: a program walks over the tokens of its channels with the last W - 1 inputs, their unfinished
gradients and the sums for the weights in registers, so that everything is read once and no sum is shared. Other
programs of the same launch make the gates. All arithmetic is float32.
"""
# What is known at compile time stands in an `if` of its own, and tuples grow by addition: so Triton wants it.
# ruff: noqa: RUF005

from typing import Any, NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from tsgdn.kernels.layout import dense_last, power_of_two
from tsgdn.kernels.pointwise import sigmoid, silu, softplus
from tsgdn.kernels.replicas import shares

STEPS = 4
"""Tokens that a backward program loads before it works on them."""


@triton.jit
@no_type_check
def _length(len_ptr, row, N):
    if len_ptr is not None:
        return tl.minimum(tl.load(len_ptr + row).to(tl.int32), N)
    else:
        return N


@triton.jit
@no_type_check
def _restart(gap_ptr, row, n, N, length):
    # Whether a gap lies before token n; outside [0, length) none counts.
    return tl.load(gap_ptr + row * N + n, mask=(n >= 0) & (n < length), other=0) > 0


@triton.jit
@no_type_check
def _conv(
    x_ptr, w_ptr, bias_ptr, tail_ptr, gap_ptr, len_ptr, y_ptr, end_ptr, pid, N, blocks, x_row, x_token,
    C: tl.constexpr, W: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, CB: tl.constexpr,
):  # fmt: skip
    c = pid % CB * BC + tl.arange(0, BC)
    block = pid // CB % blocks
    row = tl.cast(pid // CB // blocks, tl.int64)
    in_c = c < C
    t = tl.arange(0, BN)
    n = block * BN + t
    length = _length(len_ptr, row, N)
    x_base = x_ptr + row * x_row
    here = x_base + tl.cast(block * BN, tl.int64) * x_token
    acc = tl.zeros([BN, BC], tl.float32)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + c, mask=in_c, other=0.0).to(tl.float32)[None, :]
    alive = n < N
    for s in tl.static_range(W):
        if s > 0:
            if gap_ptr is not None:
                alive = alive & (_restart(gap_ptr, row, n - (s - 1), N, length) == 0)
        w = tl.load(w_ptr + c * W + (W - 1 - s), mask=in_c, other=0.0).to(tl.float32)
        seen = (alive & (n >= s))[:, None] & in_c[None, :]
        x = tl.load(here + (t - s)[:, None] * x_token + c[None, :], mask=seen, other=0.0)
        acc += x.to(tl.float32) * w[None, :]
    if tail_ptr is not None:
        if block == 0:
            # After the inputs, newest first: a cut stream sums in the order of the whole one.
            alive = n < N
            for s in tl.static_range(1, W):
                if gap_ptr is not None:
                    alive = alive & (_restart(gap_ptr, row, n - (s - 1), N, length) == 0)
                w = tl.load(w_ptr + c * W + (W - 1 - s), mask=in_c, other=0.0).to(tl.float32)
                seen = (alive & (n < s))[:, None] & in_c[None, :]
                at = (row * (W - 1) + (W - 1 - s) + n[:, None]) * C + c[None, :]
                acc += tl.load(tail_ptr + at, mask=seen, other=0.0) * w[None, :]
    inside = (n < N)[:, None] & in_c[None, :]
    y_base = y_ptr + (row * N + block * BN) * C
    tl.store(y_base + t[:, None] * C + c[None, :], silu(acc).to(y_ptr.dtype.element_ty), mask=inside)

    if W > 1:
        if block == tl.maximum(length - 1, 0) // BN:
            kept = row >= 0
            for i in tl.static_range(W - 1):
                p = length - 1 - i
                far = tl.cast(p, tl.int64)
                value = tl.load(x_base + far * x_token + c, mask=in_c & kept & (p >= 0), other=0.0).to(tl.float32)
                if tail_ptr is not None:
                    at = (row * (W - 1) + (W - 1) + far) * C + c
                    old = tl.load(tail_ptr + at, mask=in_c & kept & (p < 0), other=0.0)
                    value = tl.where(p < 0, old, value)
                tl.store(end_ptr + (row * (W - 1) + (W - 2 - i)) * C + c, value, mask=in_c)
                if gap_ptr is not None:
                    kept = kept & (_restart(gap_ptr, row, p, N, length) == 0)


@triton.jit
@no_type_check
def _gates(
    raw_ptr, a_ptr, dt_ptr, rate_ptr, write_ptr, gap_ptr, len_ptr, beta_ptr, g_ptr, beta_max, pid, N, tokens,
    H: tl.constexpr, BT: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    DECAY: tl.constexpr = a_ptr is not None
    G: tl.constexpr = 2 * H if DECAY else H
    t = pid * BT + tl.arange(0, BT)
    h = tl.arange(0, BH)
    in_t = t < tokens
    inside = in_t[:, None] & (h < H)[None, :]
    far = tl.cast(t, tl.int64)[:, None]
    beta = beta_max * sigmoid(tl.load(raw_ptr + far * G + h[None, :], mask=inside, other=0.0).to(tl.float32))
    if write_ptr is not None:
        beta = beta * tl.load(write_ptr + t, mask=in_t, other=0).to(tl.float32)[:, None]
    g = tl.zeros([BT, BH], tl.float32)
    if DECAY:
        dt = tl.load(dt_ptr + h, mask=h < H, other=0.0).to(tl.float32)
        a = tl.exp(tl.load(a_ptr + h, mask=h < H, other=0.0).to(tl.float32))
        raw = tl.load(raw_ptr + far * G + (H + h)[None, :], mask=inside, other=0.0).to(tl.float32)
        g = -a[None, :] * softplus(raw + dt[None, :])
        if gap_ptr is not None:
            rate = tl.load(rate_ptr + h, mask=h < H, other=0.0).to(tl.float32)
            gap = tl.load(gap_ptr + t, mask=in_t, other=0).to(tl.float32)
            g += tl.maximum(gap[:, None] * rate[None, :], -40.0)
    if len_ptr is not None:
        valid = (t % N < tl.load(len_ptr + t // N, mask=in_t, other=0))[:, None]
        beta = tl.where(valid, beta, 0.0)
        g = tl.where(valid, g, 0.0)
    at = far * H + h[None, :]
    tl.store(beta_ptr + at, beta, mask=inside)
    tl.store(g_ptr + at, g, mask=inside)


@triton.jit(do_not_specialize=["beta_max", "N", "blocks", "tiles", "tokens"])
@no_type_check
def prologue_kernel(
    x_ptr, raw_ptr, w_ptr, bias_ptr, a_ptr, dt_ptr, rate_ptr, tail_ptr, write_ptr, gap_ptr, len_ptr,
    y_ptr, beta_ptr, g_ptr, end_ptr, beta_max, N, blocks, tiles, tokens, x_row, x_token,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, CB: tl.constexpr,
    BT: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """The first `tiles` programs make the convolution and its end, the others the gates of BT tokens each."""
    pid = tl.program_id(0)
    if pid < tiles:
        _conv(
            x_ptr, w_ptr, bias_ptr, tail_ptr, gap_ptr, len_ptr, y_ptr, end_ptr, pid, N, blocks, x_row, x_token,
            C, W, BN, BC, CB,
        )  # fmt: skip
    else:
        _gates(
            raw_ptr, a_ptr, dt_ptr, rate_ptr, write_ptr, gap_ptr, len_ptr, beta_ptr, g_ptr, beta_max, pid - tiles, N,
            tokens, H, BT, BH,
        )  # fmt: skip


@triton.jit
@no_type_check
def _conv_gradient(
    x_ptr, w_ptr, bias_ptr, tail_ptr, gap_ptr, len_ptr, dy_ptr, dend_ptr, dx_ptr, dtail_ptr, sums_ptr, pid,
    N, units, per, spans, span, x_row, x_token, total,
    C: tl.constexpr, W: tl.constexpr, BC: tl.constexpr, CB: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    c = pid % CB * BC + tl.arange(0, BC)
    part = pid // CB
    in_c = c < C
    w = ()
    dw = ()
    for s in tl.static_range(W):
        w = w + (tl.load(w_ptr + c * W + (W - 1 - s), mask=in_c, other=0.0).to(tl.float32),)
        dw = dw + (tl.zeros([BC], tl.float32),)
    bias = tl.zeros([BC], tl.float32)
    dbias = tl.zeros([BC], tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + c, mask=in_c, other=0.0).to(tl.float32)
    for unit in tl.range(part * per, tl.minimum((part + 1) * per, units), num_stages=1):
        row = tl.cast(unit // spans, tl.int64)
        first = unit % spans * span
        last = tl.minimum(first + span, N)
        length = _length(len_ptr, row, N)
        x_base = x_ptr + row * x_row
        y_base = row * N * C + c
        # The last W - 1 inputs, newest first, and their gradients as far as they are known.
        x = ()
        d = ()
        alive = row >= 0
        for s in tl.static_range(1, W):
            p = first - s
            far = tl.cast(p, tl.int64)
            value = tl.load(x_base + far * x_token + c, mask=in_c & alive & (p >= 0), other=0.0).to(tl.float32)
            if tail_ptr is not None:
                at = (row * (W - 1) + (W - 1) + far) * C + c
                old = tl.load(tail_ptr + at, mask=in_c & alive & (p < 0), other=0.0)
                value = tl.where(p < 0, old, value)
            x = x + (value,)
            d = d + (tl.zeros([BC], tl.float32),)
            if gap_ptr is not None:
                alive = alive & (_restart(gap_ptr, row, p, N, length) == 0)
        kept_from = length - W + 1
        if dend_ptr is not None:
            if gap_ptr is not None:
                for i in tl.static_range(W - 1):
                    p = length - 1 - i
                    kept_from = tl.where(_restart(gap_ptr, row, p, N, length), tl.maximum(kept_from, p), kept_from)
        since = first - 2 * W  # the last restart
        for start in tl.range(first, last + W - 1, U, num_stages=1):
            new = ()
            dys = ()
            for i in tl.static_range(U):
                far = tl.cast(start + i, tl.int64)
                inside = in_c & (start + i < N)
                new = new + (tl.load(x_base + far * x_token + c, mask=inside, other=0.0),)
                dys = dys + (tl.load(dy_ptr + y_base + far * C, mask=inside, other=0.0),)
            for i in tl.static_range(U):
                n = start + i
                now = new[i].to(tl.float32)
                if gap_ptr is not None:
                    cut = _restart(gap_ptr, row, n, N, length)
                    since = tl.where(cut, n, since)
                    kept = ()
                    for s in tl.static_range(W - 1):
                        kept = kept + (tl.where(cut, 0.0, x[s]),)
                    x = kept
                acc = bias + now * w[0]
                for s in tl.static_range(1, W):
                    acc += x[s - 1] * w[s]
                sig = sigmoid(acc)
                dy = dys[i].to(tl.float32) * sig * (1.0 + acc * (1.0 - sig))
                own = tl.where(n < last, dy, 0.0)
                grown = (dw[0] + own * now,)
                for s in tl.static_range(1, W):
                    grown = grown + (dw[s] + own * x[s - 1],)
                dw = grown
                if bias_ptr is not None:
                    dbias += own
                moved = (dy * w[0],)
                older = (now,)
                for s in tl.static_range(1, W):
                    share = dy * w[s]
                    if gap_ptr is not None:
                        share = tl.where(n - s >= since, share, 0.0)
                    moved = moved + (d[s - 1] + share,)
                    older = older + (x[s - 1],)
                x = older[: W - 1]
                d = moved[: W - 1]
                done = moved[W - 1]
                m = n - (W - 1)
                if dend_ptr is not None:
                    if (m >= kept_from) & (m < length):
                        at = (row * (W - 1) + (m - length + W - 1)) * C + c
                        done += tl.load(dend_ptr + at, mask=in_c, other=0.0)
                if dtail_ptr is not None:
                    if m < 0:
                        tl.store(dtail_ptr + (row * (W - 1) + (W - 1) + m) * C + c, done, mask=in_c)
                owned = in_c & (m >= first) & (m < last)
                far = tl.cast(m, tl.int64)
                tl.store(dx_ptr + y_base + far * C, done.to(dx_ptr.dtype.element_ty), mask=owned)
    sums = sums_ptr + tl.cast(part, tl.int64) * total
    for s in tl.static_range(W):
        tl.store(sums + c * W + (W - 1 - s), dw[s], mask=in_c)
    if bias_ptr is not None:
        tl.store(sums + C * W + c, dbias, mask=in_c)


@triton.jit
@no_type_check
def _gates_gradient(
    raw_ptr, a_ptr, dt_ptr, rate_ptr, write_ptr, gap_ptr, len_ptr, dbeta_ptr, dg_ptr, draw_ptr, sums_ptr, beta_max,
    part, N, tokens, share, total, first_sum,
    H: tl.constexpr, BT: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    DECAY: tl.constexpr = a_ptr is not None
    G: tl.constexpr = 2 * H if DECAY else H
    h = tl.arange(0, BH)
    in_h = h < H
    da = tl.zeros([BT, BH], tl.float32)
    ddt = tl.zeros([BT, BH], tl.float32)
    drate = tl.zeros([BT, BH], tl.float32)
    if DECAY:
        dt = tl.load(dt_ptr + h, mask=in_h, other=0.0).to(tl.float32)
        a = tl.exp(tl.load(a_ptr + h, mask=in_h, other=0.0).to(tl.float32))
        if gap_ptr is not None:
            rate = tl.load(rate_ptr + h, mask=in_h, other=0.0).to(tl.float32)
    end = tl.minimum((part + 1) * share, tokens)
    for start in tl.range(part * share, end, BT, num_stages=1):
        t = start + tl.arange(0, BT)
        in_t = t < end
        inside = in_t[:, None] & in_h[None, :]
        live = inside
        if len_ptr is not None:
            live = inside & (t % N < tl.load(len_ptr + t // N, mask=in_t, other=0))[:, None]
        far = tl.cast(t, tl.int64)[:, None]
        at = far * H + h[None, :]
        sig = sigmoid(tl.load(raw_ptr + far * G + h[None, :], mask=inside, other=0.0).to(tl.float32))
        db = tl.zeros([BT, BH], tl.float32)
        if dbeta_ptr is not None:
            db = tl.load(dbeta_ptr + at, mask=live, other=0.0) * beta_max * sig * (1.0 - sig)
            if write_ptr is not None:
                db = db * tl.load(write_ptr + t, mask=in_t, other=0).to(tl.float32)[:, None]
        tl.store(draw_ptr + far * G + h[None, :], db.to(draw_ptr.dtype.element_ty), mask=inside)
        if DECAY:
            dd = tl.zeros([BT, BH], tl.float32)
            if dg_ptr is not None:
                dg = tl.load(dg_ptr + at, mask=live, other=0.0)
                z = tl.load(raw_ptr + far * G + (H + h)[None, :], mask=inside, other=0.0).to(tl.float32) + dt[None, :]
                dd = -dg * a[None, :] * sigmoid(z)
                da -= dg * a[None, :] * softplus(z)
                ddt += dd
                if gap_ptr is not None:
                    gap = tl.load(gap_ptr + t, mask=in_t, other=0).to(tl.float32)[:, None]
                    drate += tl.where(gap * rate[None, :] >= -40.0, dg * gap, 0.0)
            tl.store(draw_ptr + far * G + (H + h)[None, :], dd.to(draw_ptr.dtype.element_ty), mask=inside)
    if DECAY:
        sums = sums_ptr + tl.cast(part, tl.int64) * total + first_sum + h
        tl.store(sums, tl.sum(da, 0), mask=in_h)
        tl.store(sums + H, tl.sum(ddt, 0), mask=in_h)
        tl.store(sums + 2 * H, tl.sum(drate, 0), mask=in_h)


@triton.jit(
    do_not_specialize=[
        "beta_max", "N", "units", "per", "spans", "span", "walks", "tokens", "share", "total", "first_sum"
    ]
)  # fmt: skip
@no_type_check
def prologue_backward_kernel(
    x_ptr, raw_ptr, w_ptr, bias_ptr, a_ptr, dt_ptr, rate_ptr, tail_ptr, write_ptr, gap_ptr, len_ptr,
    dy_ptr, dbeta_ptr, dg_ptr, dend_ptr, dx_ptr, draw_ptr, dtail_ptr, sums_ptr,
    beta_max, N, units, per, spans, span, walks, tokens, share, total, first_sum, x_row, x_token,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, BC: tl.constexpr, CB: tl.constexpr, U: tl.constexpr,
    BT: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """The first `walks` programs walk over `per` spans of tokens each; the others make gates. One row of sums per part.

    A span needs W - 1 tokens more: the gradient of an input is complete when the token W - 1 later is done.
    """
    pid = tl.program_id(0)
    if pid < walks:
        _conv_gradient(
            x_ptr, w_ptr, bias_ptr, tail_ptr, gap_ptr, len_ptr, dy_ptr, dend_ptr, dx_ptr, dtail_ptr, sums_ptr, pid,
            N, units, per, spans, span, x_row, x_token, total, C, W, BC, CB, U,
        )  # fmt: skip
    else:
        _gates_gradient(
            raw_ptr, a_ptr, dt_ptr, rate_ptr, write_ptr, gap_ptr, len_ptr, dbeta_ptr, dg_ptr, draw_ptr, sums_ptr,
            beta_max, pid - walks, N, tokens, share, total, first_sum, H, BT, BH,
        )  # fmt: skip


class _Plan(NamedTuple):
    """How the backward cuts its work: channels per program, their blocks, tokens per span, spans per row and part."""

    width: int
    blocks: int
    span: int
    spans: int
    per: int
    parts: int


def _plan(rows: int, tokens: int, channels: int, taps: int, wide: bool) -> _Plan:
    # One warp per program, 16 bytes per thread and access; more taps need more registers per channel.
    width = min(128 if wide or taps > 4 else 256, power_of_two(channels, 32))
    blocks = -(-channels // width)
    # Long walks waste little on the overlap and on the sums; short ones fill the device. Fixed by the shape alone, so
    # the sums are the same on every run.
    work = 128
    while work > 16 and rows * tokens * blocks < 2048 * work:
        work //= 2
    span = -(-tokens // -(-tokens // work))
    spans = -(-tokens // span)
    per = max(1, work // span)
    return _Plan(width, blocks, span, spans, per, -(-rows * spans // per))


def _plain(x: Tensor | None) -> Tensor | None:
    if x is None:
        return None
    return x.contiguous().view(torch.uint8) if x.dtype == torch.bool else x.contiguous()


def _sizes(conv_weight: Tensor, conv_bias: Tensor | None, A_log: Tensor | None, heads: Any) -> tuple[Any, Any, Any]:
    """Sums over tokens: of the taps, of the bias, of the gates; symbols while torch traces, else whole numbers."""
    channels, taps = conv_weight.shape[-2:]
    return channels * taps, 0 if conv_bias is None else channels, 0 if A_log is None else 3 * heads


@torch.library.custom_op("tsgdn::prologue", mutates_args=())
def prologue_op(
    inputs: Tensor,
    raw: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    rate: Tensor | None,
    tail: Tensor | None,
    write: Tensor | None,
    gap: Tensor | None,
    lengths: Tensor | None,
    heads: int,
    beta_max: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The mixed inputs (R, N, C), beta and log_decay (R, N, H) and the end tail (R, W - 1, C), these float32.

    Parameters are one set for all rows, or all of them sets (P, ...) that R / P rows share each: one launch per set,
    since a set's rows fill a GPU and its sums stay apart.
    """
    mixed, beta, log_decay, end = _outputs(inputs, conv_weight, heads)
    rows, tokens, channels = inputs.shape
    if not inputs.numel():
        if tail is not None:
            end.copy_(tail)
        return mixed, beta, log_decay, end if tail is not None else end.zero_()
    inputs, taps = dense_last(inputs), conv_weight.shape[-1]
    # A single token per row leaves nothing to share between tokens.
    block = 1 if tokens == 1 else 32
    width = min(1024 if tokens == 1 else 128, power_of_two(channels, 1))
    blocks, across = -(-tokens // block), -(-channels // width)
    rows //= _sets(conv_weight)
    tiles, gates = rows * blocks * across, max(1, 1024 // power_of_two(heads, 1))
    streams = (*map(_plain, (raw, tail, write, gap, lengths)), mixed, beta, log_decay, end)
    parameters = list(map(_plain, (conv_weight, conv_bias, A_log, dt_bias, rate)))
    for (x, *given), of_set in shares((inputs, *streams), parameters, 2):
        raw_here, *data, mixed_here, beta_here, decay_here, end_here = given
        launch: Any = prologue_kernel[(tiles + -(-rows * tokens // gates),)]
        launch(
            x, raw_here, *of_set, *data, mixed_here, beta_here, decay_here, end_here,
            beta_max, tokens, blocks, tiles, rows * tokens, inputs.stride(0), inputs.stride(1),
            C=channels, H=heads, W=taps, BN=block, BC=width, CB=across, BT=gates, BH=power_of_two(heads, 1),
            num_warps=4, num_stages=1,
        )  # fmt: skip
    return mixed, beta, log_decay, end


def _sets(conv_weight: Tensor) -> Any:
    return conv_weight.shape[0] if conv_weight.dim() == 3 else 1


def _outputs(inputs: Tensor, conv_weight: Tensor, heads: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, tokens, channels = inputs.shape
    beta = inputs.new_empty((rows, tokens, heads), dtype=torch.float32)
    return (
        inputs.new_empty((rows, tokens, channels)),
        beta,
        torch.empty_like(beta),
        beta.new_empty((rows, conv_weight.shape[-1] - 1, channels)),
    )


@prologue_op.register_fake
def _(inputs, raw, conv_weight, conv_bias, A_log, dt_bias, rate, tail, write, gap, lengths, heads, beta_max):
    return _outputs(inputs, conv_weight, heads)


@torch.library.custom_op("tsgdn::prologue_backward", mutates_args=())
def prologue_backward_op(
    inputs: Tensor,
    raw: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    rate: Tensor | None,
    tail: Tensor | None,
    write: Tensor | None,
    gap: Tensor | None,
    lengths: Tensor | None,
    dmixed: Tensor,
    dbeta: Tensor | None,
    dlog_decay: Tensor | None,
    dend: Tensor | None,
    heads: int,
    beta_max: float,
    want_tail: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of inputs, raw and tail (empty unless wanted), and the float32 sums of the parameters side by side.

    The sums are those of conv_weight (C, W), conv_bias, A_log, dt_bias and rate, in this order; one row per set.
    """
    of_taps, of_bias, of_gates = _sizes(conv_weight, conv_bias, A_log, heads)
    dx, draw, dtail, sums = _gradients(inputs, raw, conv_weight, of_taps + of_bias + of_gates, want_tail)
    rows, tokens, channels = inputs.shape
    if not inputs.numel():
        return dx, draw, dtail.zero_() if dend is None or not want_tail else dend.clone(), sums.zero_()
    inputs, (sets, total), taps = dense_last(inputs), sums.shape, conv_weight.shape[-1]
    rows //= sets
    plan = _plan(rows, tokens, channels, taps, inputs.element_size() > 2)
    partial = sums.new_empty((sets, plan.parts, total))
    walks = plan.parts * plan.blocks
    streams = (
        *map(_plain, (raw, tail, write, gap, lengths, dmixed, dbeta, dlog_decay, dend if taps > 1 else None)),
        dx, draw, dtail if want_tail and taps > 1 else None,
    )  # fmt: skip
    parameters = list(map(_plain, (conv_weight, conv_bias, A_log, dt_bias, rate)))
    parts = shares((inputs, *streams), parameters, 2)
    for of_part, ((x, raw_here, *given), of_set) in zip(partial, parts, strict=True):
        launch: Any = prologue_backward_kernel[(walks + plan.parts,)]
        launch(
            x, raw_here, *of_set, *given, of_part,
            beta_max, tokens, rows * plan.spans, plan.per, plan.spans, plan.span, walks, rows * tokens,
            -(-rows * tokens // plan.parts), total, of_taps + of_bias, inputs.stride(0), inputs.stride(1),
            C=channels, H=heads, W=taps, BC=plan.width, CB=plan.blocks, U=STEPS,
            BT=max(1, 256 // power_of_two(heads, 1)), BH=power_of_two(heads, 1),
            num_warps=1, num_stages=1,
        )  # fmt: skip
    return dx, draw, dtail, partial.sum(1)


def _gradients(
    inputs: Tensor, raw: Tensor, conv_weight: Tensor, total: Any, want_tail: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, tokens, channels = inputs.shape
    tail = (rows, conv_weight.shape[-1] - 1, channels) if want_tail else (0,)
    return (
        inputs.new_empty((rows, tokens, channels)),
        raw.new_empty(raw.shape),
        inputs.new_empty(tail, dtype=torch.float32),
        inputs.new_empty((_sets(conv_weight), total), dtype=torch.float32),
    )


@prologue_backward_op.register_fake
def _(
    inputs, raw, conv_weight, conv_bias, A_log, dt_bias, rate, tail, write, gap, lengths, dmixed, dbeta, dlog_decay,
    dend, heads, beta_max, want_tail,
):  # fmt: skip
    return _gradients(inputs, raw, conv_weight, sum(_sizes(conv_weight, conv_bias, A_log, heads)), want_tail)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.heads, ctx.beta_max = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dmixed: Any, dbeta: Any, dlog_decay: Any, dend: Any) -> Any:
    saved = ctx.saved_tensors
    inputs, _, conv_weight, conv_bias, A_log, dt_bias, rate = saved[:7]
    want_tail = saved[7] is not None and ctx.needs_input_grad[7]
    if dmixed is None:
        dmixed = torch.zeros_like(inputs)
    dx, draw, dtail, sums = prologue_backward_op(
        *saved, dmixed, dbeta, dlog_decay, dend, ctx.heads, ctx.beta_max, want_tail
    )
    of_taps, of_bias, of_gates = _sizes(conv_weight, conv_bias, A_log, ctx.heads)
    dw, dbias, gates = sums.split([of_taps, of_bias, of_gates], 1)
    da, ddt, drate = gates.unflatten(1, (3, -1)).unbind(1)
    return (
        dx,
        draw,
        dw.reshape(conv_weight.shape).to(conv_weight.dtype),
        None if conv_bias is None else dbias.reshape(conv_bias.shape).to(conv_bias.dtype),
        None if A_log is None else da.reshape(A_log.shape).to(A_log.dtype),
        None if dt_bias is None else ddt.reshape(dt_bias.shape).to(dt_bias.dtype),
        None if rate is None else drate.reshape(rate.shape).to(rate.dtype),
        dtail if want_tail else None,
        *[None] * 5,
    )


torch.library.register_autograd("tsgdn::prologue", _backward, setup_context=_setup)


def fused_prologue(
    inputs: Tensor,
    raw: Tensor,
    tail: Tensor | None,
    write: Tensor | None,
    gap: Tensor | None,
    lengths: Tensor | None,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    rate: Tensor | None,
    heads: int,
    beta_max: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `tsgdn.kernels.prologue`, whose arguments these are; without decay A_log, dt_bias and rate are None.

    Raises:
        ValueError: float64, or taps that no kernel serves.
    """
    if torch.float64 in (inputs.dtype, None if tail is None else tail.dtype):
        raise ValueError("inputs or tail is float64; the Triton kernels compute in float32, use TSGDN_KERNEL=torch")
    if not 1 <= conv_weight.shape[-1] <= 8:
        raise ValueError(f"conv_weight has {conv_weight.shape[-1]} taps; Triton takes 1 to 8, use TSGDN_KERNEL=torch")
    if gap is None:
        rate = None
    return prologue_op(
        inputs, raw, conv_weight, conv_bias, A_log, dt_bias, rate, None if tail is None else tail.float(),
        write, gap, lengths, heads, beta_max,
    )  # fmt: skip
