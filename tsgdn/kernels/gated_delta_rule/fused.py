"""The Triton kernels as ops of torch: launches, pinned configurations, fake kernels, gradients.

Forward and backward are two ops joined by autograd: they trace under `torch.compile`, replay in CUDA graphs and
recompute under `torch.utils.checkpoint`. Nothing is tuned at run time and nothing waits for the device.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from tsgdn.kernels.gated_delta_rule.backward import gradient_kernel, reverse_kernel
from tsgdn.kernels.gated_delta_rule.channelwise import channelwise_backward, channelwise_forward
from tsgdn.kernels.gated_delta_rule.decode import decode_op
from tsgdn.kernels.gated_delta_rule.forward import forward_kernel
from tsgdn.kernels.gated_delta_rule.step import step
from tsgdn.kernels.layout import power_of_two
from tsgdn.kernels.readout_fused import fused_readout, readout_backward_op
from tsgdn.kernels.unit_length import unit_length


class Launch(NamedTuple):
    """How one kernel runs: tokens per chunk, warps, value channels per program (0: all), cap on registers (0: none)."""

    chunk: int
    warps: int
    values: int = 0
    registers: int = 0


class Config(NamedTuple):
    """The launches of one head size.

    `gradient.chunk` is also how often states are kept; `forward` and `reverse` share their chunk, which divides it.
    """

    forward: Launch
    reverse: Launch
    gradient: Launch


# By (key, value) sizes padded to powers of two; the fastest of those measured on an H200, see experiments/kernels.
CONFIGS = {
    (16, 16): Config(Launch(16, 1), Launch(16, 1), Launch(32, 1)),
    (16, 32): Config(Launch(16, 1), Launch(16, 1), Launch(32, 1)),
    (16, 64): Config(Launch(16, 1), Launch(16, 1), Launch(32, 2)),
    (32, 16): Config(Launch(16, 1), Launch(16, 1), Launch(32, 1)),
    (32, 32): Config(Launch(16, 1, 0, 168), Launch(16, 1, 0, 168), Launch(32, 1)),
    (32, 64): Config(Launch(16, 1), Launch(16, 1), Launch(32, 2, 0, 168)),
    (32, 128): Config(Launch(16, 2), Launch(16, 2), Launch(32, 2, 64)),
    (64, 16): Config(Launch(16, 1), Launch(16, 1), Launch(32, 2)),
    (64, 32): Config(Launch(16, 1), Launch(16, 1), Launch(32, 2)),
    (64, 64): Config(Launch(16, 2, 0, 224), Launch(16, 2), Launch(32, 2)),
    (64, 128): Config(Launch(16, 2), Launch(16, 2), Launch(32, 4)),
    (64, 256): Config(Launch(16, 2, 64), Launch(16, 2, 64), Launch(32, 4, 64)),
    (128, 32): Config(Launch(16, 2), Launch(16, 2), Launch(32, 4)),
    (128, 64): Config(Launch(16, 2, 32), Launch(16, 2, 32), Launch(32, 4)),
    (128, 128): Config(Launch(16, 2, 32), Launch(16, 2, 32), Launch(32, 4)),
    (128, 256): Config(Launch(16, 2, 32), Launch(16, 2, 32), Launch(32, 4, 64)),
}
# Exact products run without tensor cores; small tiles of values keep them in registers.
EXACT = Config(Launch(16, 4, 32), Launch(16, 4, 32), Launch(16, 4, 32))
LARGEST = max(keys for keys, _ in CONFIGS), max(values for _, values in CONFIGS)


def pinned(key_dim: int, value_dim: int, dtype: torch.dtype) -> tuple[int, int, Config]:
    """Padded sizes and the configuration for them.

    Raises:
        ValueError: sizes that no configuration serves.
    """
    keys, values = power_of_two(key_dim), power_of_two(value_dim)
    if keys > LARGEST[0] or values > LARGEST[1]:
        raise ValueError(
            f"heads of {key_dim} x {value_dim} are too large for the Triton kernels, which take up to "
            f"{LARGEST[0]} x {LARGEST[1]}; set TSGDN_KERNEL=torch"
        )
    if dtype == torch.float32:
        return keys, values, EXACT
    found = CONFIGS.get((keys, values))
    if found is None:  # a size beside those measured runs like the next larger one
        found = CONFIGS[min(size for size in CONFIGS if size[0] >= keys and size[1] >= values)]
    return keys, values, found


def _heads_together(x: Tensor) -> Tensor:
    """`x` itself if its heads lie side by side in each token, so that a slice of a projection needs no copy."""
    return x if x.stride(3) == 1 and x.stride(2) == x.shape[3] else x.contiguous()


def _plain(*tensors: Tensor | None) -> list[Any]:
    return [None if x is None else x.contiguous() for x in tensors]


def _rows(k: Tensor, cu_seqlens: Tensor | None) -> int:
    return k.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _slots(rows: int, tokens: int, packed: bool, every: int) -> int:
    """Places for one entry per `every` tokens of each row; packed rows may waste one place each."""
    return tokens // every + rows if packed else rows * -(-tokens // every)


def piece_length(tokens: int, segments: int) -> int:
    """Tokens per piece where a row is cut into at most `segments`: a multiple of 64; the last may be shorter."""
    return -(-tokens // (64 * segments)) * 64


def _options(launch: Launch) -> dict[str, int]:
    options = {"num_warps": launch.warps, "num_stages": 1}
    return {**options, "maxnreg": launch.registers} if launch.registers else options


def _tiles(launch: Launch, padded: int) -> tuple[int, int]:
    width = min(launch.values or padded, padded)
    return width, padded // width


@torch.library.custom_op("tsgdn::gated_delta_rule", mutates_args=())
def forward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    erase: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    scale: float,
    eps: float,
    sigmoid: bool,
    norm_first: bool,
    delta: bool,
    norm: bool,
    want_end: bool,
    want_rho: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """o, end state, rho, states and solves kept for the backward, and the readout; what is not wanted is empty.

    `weight` is one gain (Dv,), or sets (P, Dv) that R / P rows share each.
    """
    (tokens, heads, value_dim), key_dim, rows = v.shape[1:], k.shape[3], _rows(k, cu_seqlens)
    keys, values, config = pinned(key_dim, value_dim, v.dtype)
    q, k, v = _heads_together(q), _heads_together(k), _heads_together(v)
    log_decay, beta, erase, state, cu_seqlens = _plain(log_decay, beta, erase, state, cu_seqlens)
    sets = 1
    if gate is not None and weight is not None:
        gate, weight, sets = _heads_together(gate), weight.contiguous(), weight.numel() // value_dim
    out = _outputs(k, v, cu_seqlens, gate is not None, want_end, want_rho, keep, delta)
    o, end, rho, kept, solve, y = out
    launch = config.forward
    width, tiles = _tiles(launch, values)
    if rows * heads and tokens:
        forward_kernel[(rows * heads * tiles,)](  # pyright: ignore
            q, k, v, log_decay, beta, erase, o, rho, state, end, kept, solve, cu_seqlens, gate, weight, y,
            scale, 1.0, eps, tokens, heads, heads // k.shape[2], rows // sets,
            q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
            0 if gate is None else gate.stride(0), 0 if gate is None else gate.stride(1),
            DK=key_dim, DV=value_dim, BK=keys, BV=width, TILES=tiles, C=launch.chunk, SAVE=config.gradient.chunk,
            KEEP=keep, DELTA=delta, TIED=erase is None, NORM=norm, PACKED=cu_seqlens is not None,
            HAS_STATE=state is not None, WANT_STATE=want_end, WANT_RHO=want_rho or (keep and delta),
            WANT_O=gate is None or keep, READOUT=gate is not None, SIGMOID=sigmoid, NORM_FIRST=norm_first,
            OP=tl.float32 if v.dtype == torch.float32 else tl.float16, PREC="ieee", **_options(launch),
        )  # fmt: skip
    elif end.numel():
        end.zero_() if state is None else end.copy_(state)
    return out


def _outputs(
    k: Tensor, v: Tensor, cu_seqlens: Tensor | None, readout: bool, end: bool, rho: bool, keep: bool, delta: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    (tokens, heads, value_dim), key_dim, rows = v.shape[1:], k.shape[3], _rows(k, cu_seqlens)
    config, packed = pinned(key_dim, value_dim, v.dtype)[2], cu_seqlens is not None
    chunk = config.forward.chunk
    places = _slots(rows, tokens, packed, config.gradient.chunk) if keep else 0
    solves = tokens * (1 if packed else rows) // chunk + rows if keep and delta else 0

    def empty(*shape: int, wanted: bool = True, dtype: torch.dtype = v.dtype) -> Tensor:
        return torch.empty(shape if wanted else (0,), dtype=dtype, device=v.device)

    return (
        empty(*v.shape, wanted=not readout or keep),
        empty(rows, heads, key_dim, value_dim, wanted=end, dtype=torch.float32),
        empty(*v.shape, wanted=rho or (keep and delta)),
        empty(places, heads, value_dim, key_dim),
        empty(solves, heads, chunk, chunk),
        empty(*v.shape, wanted=readout),
    )


@forward_op.register_fake
def _(
    q, k, v, log_decay, beta, erase, state, cu_seqlens, gate, weight, scale, eps, sigmoid, norm_first, delta, norm,
    want_end, want_rho, keep,
):  # fmt: skip
    return _outputs(k, v, cu_seqlens, gate is not None, want_end, want_rho, keep, delta)


@torch.library.custom_op("tsgdn::gated_delta_rule_backward", mutates_args=())
def backward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    erase: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    kept: Tensor,
    solve: Tensor,
    rho: Tensor,
    do: Tensor,
    dend: Tensor | None,
    drho: Tensor | None,
    scale: float,
    delta: bool,
    norm: bool,
    want_start: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Dq and dk per value head, dv, dlog_decay, dbeta, derase and dstate; what is not wanted is empty."""
    (tokens, heads, value_dim), key_dim, rows = v.shape[1:], k.shape[3], _rows(k, cu_seqlens)
    keys, values, config = pinned(key_dim, value_dim, v.dtype)
    q, k, v, do = _heads_together(q), _heads_together(k), _heads_together(v), do.contiguous()
    log_decay, beta, erase, state, cu_seqlens, dend, drho = _plain(
        log_decay, beta, erase, state, cu_seqlens, dend, drho
    )
    out = _gradients(k, v, erase, rows, want_start)
    dq, dk, dv, dg, db, de, start = out
    if not (rows * heads and tokens):
        if want_start:
            start.zero_() if dend is None else start.copy_(dend)
        return out
    packed, every = cu_seqlens is not None, config.gradient.chunk
    places = _slots(rows, tokens, packed, every)
    ends = torch.empty_like(kept)
    group = heads // k.shape[2]
    shared = {
        "DK": key_dim, "DV": value_dim, "BK": keys, "DELTA": delta, "TIED": erase is None, "NORM": norm,
        "PACKED": packed, "HAS_END": dend is not None, "PREC": "ieee",
    }  # fmt: skip
    width, tiles = _tiles(config.reverse, values)
    reverse_kernel[(rows * heads * tiles,)](  # pyright: ignore
        q, k, log_decay, beta, erase, do, drho, dend, start, dv, ends, solve, cu_seqlens,
        scale, 1.0, tokens, heads, group,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1),
        BV=width, TILES=tiles, C=config.reverse.chunk, SAVE=every, WANT_START=want_start, HAS_RHO=drho is not None,
        **shared, **_options(config.reverse),
    )  # fmt: skip
    row_of = None
    if cu_seqlens is not None:
        firsts = cu_seqlens[:-1] // every + torch.arange(rows, device=v.device)
        row_of = torch.searchsorted(firsts, torch.arange(places, device=v.device), right=True) - 1
    width, tiles = _tiles(config.gradient, values)
    gradient_kernel[(places * heads,)](  # pyright: ignore
        q, k, v, log_decay, beta, erase, do, rho, state, dend, kept, ends, cu_seqlens, row_of,
        dq, dk, dv, dg, db, de, scale, 1.0, tokens, heads, group,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        BV=width, TILES=tiles, C=every, DIRECT=every >= 64, HAS_STATE=state is not None, **shared,
        **_options(config.gradient),
    )  # fmt: skip
    return out


def _gradients(
    k: Tensor, v: Tensor, erase: Tensor | None, rows: int, want_start: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    heads, value_dim, key_dim = v.shape[2], v.shape[3], k.shape[3]
    dq = torch.empty((*v.shape[:3], key_dim), dtype=v.dtype, device=v.device)
    gate = torch.empty(v.shape[:3], dtype=torch.float32, device=v.device)
    return (
        dq,
        torch.empty_like(dq),
        torch.empty(v.shape, dtype=v.dtype, device=v.device),
        gate,
        torch.empty_like(gate),
        torch.empty_like(gate) if erase is not None else gate.new_empty(0),
        gate.new_empty((rows, heads, key_dim, value_dim) if want_start else (0,)),
    )


@backward_op.register_fake
def _(
    q, k, v, log_decay, beta, erase, state, cu_seqlens, kept, solve, rho, do, dend, drho, scale, delta, norm, want_start
):  # fmt: skip
    return _gradients(k, v, erase, _rows(k, cu_seqlens), want_start)


def _keep_for_backward(ctx: Any, inputs: Any, output: Any) -> None:
    (*tensors, ctx.scale, ctx.eps, ctx.sigmoid, ctx.norm_first, ctx.delta, ctx.norm, _, _, _) = inputs
    o, _, rho, kept, solve, _ = output
    ctx.save_for_backward(*tensors, kept, solve, rho, o)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, do: Any, dend: Any, drho: Any, _kept: Any, _solve: Any, dy: Any) -> Any:
    q, k, v, log_decay, beta, erase, state, cu_seqlens, gate, weight, kept, solve, rho, o = ctx.saved_tensors
    d_gate = d_weight = None
    if dy is not None:
        through, d_gate, d_weight = readout_backward_op(dy, o, gate, weight, ctx.eps, ctx.sigmoid, ctx.norm_first)
        do = through if do is None else do + through
    if do is None:
        do = torch.zeros_like(v)
    want_start = state is not None and ctx.needs_input_grad[6]
    dq, dk, dv, dg, db, de, start = backward_op(
        q, k, v, log_decay, beta, erase, state, cu_seqlens, kept, solve, rho, do, dend, drho,
        ctx.scale, ctx.delta, ctx.norm, want_start,
    )  # fmt: skip
    if dq.shape != q.shape:  # value heads that share a key
        dq, dk = (x.unflatten(2, (q.shape[2], -1)).sum(3) for x in (dq, dk))
    gates = (dg, db, None if erase is None else de)
    return dq, dk, dv, *gates, start if want_start else None, None, d_gate, d_weight, *[None] * 9


torch.library.register_autograd("tsgdn::gated_delta_rule", _backward, setup_context=_keep_for_backward)


@torch.library.custom_op("tsgdn::channelwise", mutates_args=())
def channelwise_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    erase: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    delta: bool,
    norm: bool,
    want_rho: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """o, end state, rho and kept states where some gate is per channel; what is not wanted is empty."""
    given = _plain(q, k, v, log_decay, beta, erase)
    o, end, rho, kept = channelwise_forward(
        *given, delta, *_plain(state), norm=norm, scale=scale, save=keep, want_rho=want_rho,  # pyright: ignore
        cu_seqlens=cu_seqlens,
    )  # fmt: skip
    return o, end, o.new_empty(0) if rho is None else rho, o.new_empty(0) if kept is None else kept


@channelwise_op.register_fake
def _(q, k, v, log_decay, beta, erase, state, cu_seqlens, scale, delta, norm, want_rho, keep):
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    rows, heads = _rows(k, cu_seqlens), v.shape[2]
    end = o.new_empty((rows, heads, k.shape[3], v.shape[3]), dtype=torch.float32)
    places = _slots(rows, v.shape[1], cu_seqlens is not None, 16)
    kept = o.new_empty((places, heads, v.shape[3], k.shape[3]) if keep else (0,))
    return o, end, torch.empty_like(o) if want_rho else o.new_empty(0), kept


@torch.library.custom_op("tsgdn::channelwise_backward", mutates_args=())
def channelwise_backward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    erase: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    kept: Tensor,
    do: Tensor | None,
    dend: Tensor | None,
    drho: Tensor | None,
    scale: float,
    delta: bool,
    norm: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, log_decay, beta, erase and state; what is not there is empty."""
    given = _plain(q, k, v, log_decay, beta, erase)
    grads = channelwise_backward(
        *given, delta, *_plain(state), kept, *_plain(do, dend, drho), norm=norm, scale=scale,  # pyright: ignore
        cu_seqlens=cu_seqlens,
    )  # fmt: skip
    return tuple(kept.new_empty(0) if x is None else x for x in grads)  # pyright: ignore


@channelwise_backward_op.register_fake
def _(q, k, v, log_decay, beta, erase, state, cu_seqlens, kept, do, dend, drho, scale, delta, norm):
    like = (q, k, v, log_decay, beta, erase, state)
    return tuple(v.new_empty(0) if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in like)


def _channelwise_keep(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.scale, ctx.delta, ctx.norm, _, _ = inputs
    ctx.save_for_backward(*tensors, output[3])
    ctx.set_materialize_grads(False)


def _channelwise_backward(ctx: Any, do: Any, dend: Any, drho: Any, _kept: Any) -> Any:
    *given, kept = ctx.saved_tensors
    grads = channelwise_backward_op(*given, kept, do, dend, drho, ctx.scale, ctx.delta, ctx.norm)
    found = [None if x is None else grad for x, grad in zip(given[:7], grads, strict=True)]
    return *found, *[None] * 6


torch.library.register_autograd("tsgdn::channelwise", _channelwise_backward, setup_context=_channelwise_keep)


def _decode_keep(ctx: Any, inputs: Any, output: Any) -> None:
    q, k, v, log_decay, beta, erase, ctx.delta, state, ctx.norm, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, log_decay, beta, erase, state)


def _decode_backward(ctx: Any, do: Any, dend: Any, drho: Any) -> Any:
    # One token: its few products are computed again in torch.
    with torch.enable_grad():
        given: list[Any] = [None if x is None else x.detach().requires_grad_() for x in ctx.saved_tensors]
        q, k, v, log_decay, beta, erase, state = given
        start = state
        if start is None:
            start = v.new_zeros((v.shape[0], v.shape[2], k.shape[3], v.shape[3]), dtype=torch.float32)
        if ctx.norm:
            q, k = unit_length(q), unit_length(k)
        each = v.shape[2] // k.shape[2]
        q, k = (x.repeat_interleave(each, 2) for x in (q * ctx.scale, k))
        out = step(q, k, v, log_decay, beta, erase, ctx.delta, start)
        leaves = [x for x in given if x is not None]
        grads = iter(torch.autograd.grad(out, leaves, (do, dend, drho), allow_unused=True))
    dq, dk, dv, dg, db, de, ds = (None if x is None else next(grads) for x in given)
    return dq, dk, dv, dg, db, de, None, ds, None, None


torch.library.register_autograd("tsgdn::decode", _decode_backward, setup_context=_decode_keep)


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    erase: Tensor | None,
    state: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    *,
    delta: bool,
    norm: bool,
    scale: float,
    cu_seqlens: Tensor | None,
    want_end: bool,
    want_rho: bool,
    readout: Sequence[Any],
    segments: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs (or their readout), end state and residuals (empty unless wanted); arguments as `gated_delta_rule`.

    `readout` holds what a `Readout` has besides `gate` and `weight`, where these are given.
    """
    after = None
    if gate is not None and weight is not None:
        eps, activation, norm_first = readout
        after = gate, weight, eps, activation == "sigmoid", norm_first
    gates = (log_decay.float(), beta.float(), None if erase is None else erase.float())
    leaves = (q, k, v, log_decay, beta, erase, state, gate, weight)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in leaves)
    if v.shape[1] == 1 and cu_seqlens is None:
        o, end, rho = decode_op(q, k, v, *gates, delta, state, norm, scale)
    elif any(x is not None and x.dim() == 4 for x in gates):
        log_decay, beta, erase = gates
        if log_decay.dim() == 3 and (erase is None or erase.dim() == 3) and delta:
            # Only the write is per channel: it goes into the values, and the key's side stays one number per head.
            wide = (v.float() * beta).to(v.dtype)
            one = torch.ones_like(log_decay)
            o, end, rho, *_ = forward_op(
                q, k, wide, log_decay, one, erase, state, cu_seqlens, None, None,
                scale, 0.0, False, True, delta, norm, want_end, want_rho, keep,
            )  # fmt: skip
        else:
            o, end, rho, _ = channelwise_op(
                q, k, v, log_decay, beta, erase, state, cu_seqlens, scale, delta, norm, want_rho, keep
            )
    elif segments is not None and (length := piece_length(v.shape[1], segments)) < v.shape[1]:
        from tsgdn.kernels.gated_delta_rule.segments import segmented_op  # it imports this module

        o, end, rho, *_ = segmented_op(
            q, k, v, *gates, state, length, scale, delta, norm, want_end, want_rho, keep
        )  # fmt: skip
    else:
        _, values, config = pinned(k.shape[3], v.shape[3], v.dtype)
        fused = after is not None and _tiles(config.forward, values)[1] == 1
        gate, weight, eps, *how = after if after is not None and fused else (None, None, 0.0, False, True)
        o, end, rho, _, _, y = forward_op(
            q, k, v, *gates, state, cu_seqlens, gate, weight, scale, eps, *how, delta, norm, want_end, want_rho, keep
        )
        if fused:
            return y, end, rho
    if after is not None:
        o = fused_readout(o, *after)
    return o, end, rho
