"""Few long rows: each is cut into pieces that run at the same time; the recurrence is linear in the state.

Over a piece S_end = M S_start + E, where E is the end from zeros and M (Dk x Dk) the end from the identity without
values; with delta=False M is a number. So there are three passes: `piece_kernel` finds E and M of all pieces at once,
`scan_kernel` steps from piece to piece, and the ordinary kernels run on the pieces as packed sequences that start with
the states found. Backward the same: dS_start = M^T dS_end + D, where D is what the reverse sweep gives for dS_end = 0.
"""

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from tsgdn.kernels.gated_delta_rule.backward import reverse_kernel
from tsgdn.kernels.gated_delta_rule.fused import (
    Launch,
    _gradients,
    _heads_together,
    _options,
    _outputs,
    _plain,
    _tiles,
    backward_op,
    forward_op,
    pinned,
)
from tsgdn.kernels.gated_delta_rule.tiles import running, unit_inverse, unit_scale
from tsgdn.kernels.pointwise import LOG2E


@triton.jit(do_not_specialize=["one", "N", "LENGTH", "P", "H", "GROUP"])
@no_type_check
def piece_kernel(
    k_ptr,
    v_ptr,
    g_ptr,
    b_ptr,
    e_ptr,
    ends_ptr,
    moves_ptr,
    one,
    N,
    LENGTH,
    P,
    H,
    GROUP,
    k_row,
    k_token,
    v_row,
    v_token,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    VALUE_TILES: tl.constexpr,
    TILES: tl.constexpr,
    C: tl.constexpr,
    KEEP: tl.constexpr,
    DELTA: tl.constexpr,
    TIED: tl.constexpr,
    NORM: tl.constexpr,
    OP: tl.constexpr,
    PREC: tl.constexpr,
):
    """E (R * P, H, DK, DV) and M (R * P, H, DK, DK) of every piece; with DELTA off M (R * P, H).

    One program per (piece, head, tile): the first VALUE_TILES hold columns of E, the others columns of M. Two products
    lie on the chain from chunk to chunk; layouts and rounding are those of `forward_kernel`.
    """
    DT: tl.constexpr = v_ptr.dtype.element_ty
    EXACT: tl.constexpr = tl.float32 == DT
    ti = tl.arange(0, C)
    di = tl.arange(0, BK)
    r = ti[:, None]
    c = ti[None, :]
    pid = tl.program_id(0)
    tile = pid % TILES
    head = (pid // TILES) % H
    place = tl.cast(pid // TILES // H, tl.int64)
    row = place // P
    first = (place - row * P) * LENGTH
    length = tl.cast(tl.minimum(N - first, LENGTH), tl.int32)
    moves = tile >= VALUE_TILES
    # Nobody starts where the row ends; only the gradient's scan needs the last M.
    if first + LENGTH >= N:
        if not KEEP:
            return
        if DELTA:
            if not moves:
                return
    column = (tile - tl.where(moves, VALUE_TILES, 0)) * BV + tl.arange(0, BV)
    width = tl.where(moves, DK, DV)
    k_base = k_ptr + row * k_row + first * k_token + head // GROUP * DK
    v_base = v_ptr + row * v_row + first * v_token + head * DV
    g_base = (row * N + first) * H + head
    at_k = ti[:, None] * k_token + di[None, :]
    at_v = ti[None, :] * v_token + column[:, None]
    in_k = di < DK
    in_v = (column < DV) & (tile < VALUE_TILES)
    S = tl.where((column[:, None] == di[None, :]) & moves, 1.0, 0.0)
    whole = 0.0  # the log of what the piece keeps, base 2, in a coarse and a fine part
    rest = 0.0
    for n in tl.range(0, length, C, num_stages=1):
        left = length - n
        m = ti < left
        n64 = tl.cast(n, tl.int64)
        k = tl.load(k_base + n64 * k_token + at_k, mask=m[:, None] & in_k[None, :], other=0.0)
        v = tl.load(v_base + n64 * v_token + at_v, mask=in_v[:, None] & m[None, :], other=0.0)
        g = tl.load(g_ptr + g_base + n64 * H + ti * H, mask=m, other=0.0) * LOG2E
        b = tl.load(b_ptr + g_base + n64 * H + ti * H, mask=m, other=0.0)
        high, low, high_end, low_end = running(g, EXACT)
        kf = k.to(tl.float32)
        k = (kf * unit_scale(kf, one, NORM)[:, None]).to(DT)
        U = v.to(tl.float32) * b[None, :]
        if DELTA:
            e = b
            if not TIED:
                e = tl.load(e_ptr + g_base + n64 * H + ti * H, mask=m, other=0.0)
            kT = tl.trans(k)
            # [j, i]: column j's share in row i; masked before the exponential.
            between = (high[None, :] - high[:, None]) + (low[None, :] - low[:, None])
            L = tl.exp2(tl.where(r <= c, between, -float("inf")))
            kk = tl.dot(k, kT, input_precision=PREC)
            A = (unit_inverse(tl.where(r < c, kk * e[None, :], 0.0), C, OP, PREC) * L).to(DT)
            W = U - tl.dot(S.to(DT), kT, input_precision=PREC) * (tl.exp2(high + low) * e)[None, :]
            U = tl.dot(W.to(DT), A, input_precision=PREC)
        else:
            whole += high_end
            rest += low_end
        to_end = tl.exp2((high_end - high) + (low_end - low))
        S = tl.dot((U * to_end[None, :]).to(DT), k, acc=S * tl.exp2(high_end + low_end), input_precision=PREC)
    at = di[None, :] * width + column[:, None]
    mask = (column[:, None] < width) & in_k[None, :]
    if moves:
        tl.store(moves_ptr + (place * H + head) * (DK * DK) + at, S, mask=mask)
    else:
        tl.store(ends_ptr + (place * H + head) * (DK * DV) + at, S, mask=mask)
    if not DELTA:
        if tile == 0:
            tl.store(moves_ptr + place * H + head, tl.exp2(whole + rest))


@triton.jit(do_not_specialize=["P", "H"])
@no_type_check
def scan_kernel(
    moves_ptr,
    ends_ptr,
    given_ptr,
    out_ptr,
    last_ptr,
    P,
    H,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
    DELTA: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    HAS_GIVEN: tl.constexpr,
    WANT_LAST: tl.constexpr,
    PREC: tl.constexpr,
):
    """The state every piece starts with (R * P, H, DK, DV): S of the row, then S <- M S + E from piece to piece.

    TRANSPOSED runs from the last piece to the first with M^T: the gradient of every piece's end state from that of the
    row's. WANT_LAST stores what lies beyond the last step (R, H, DK, DV). One program per (row, head, tile of columns).
    M is too large for the registers, so S passes through memory and a step takes it in blocks of rows, few enough for
    `mma.sync`.
    """
    pid = tl.program_id(0)
    tile = pid % TILES
    head = (pid // TILES) % H
    row = tl.cast(pid // TILES // H, tl.int64)
    dv = tile * BV + tl.arange(0, BV)
    in_v = (dv < DV)[None, :]
    of_row = (row * H + head) * (DK * DV)
    place = row * P * H + head
    forth = tl.cast(H, tl.int64)
    if TRANSPOSED:
        place += (P - 1) * forth
        forth = -forth
    di = tl.arange(0, BK)[:, None]
    given = tl.zeros([BK, BV], tl.float32)
    if HAS_GIVEN:
        given = tl.load(given_ptr + of_row + di * DV + dv[None, :], mask=(di < DK) & in_v, other=0.0)
    tl.store(out_ptr + place * (DK * DV) + di * DV + dv[None, :], given, mask=(di < DK) & in_v)
    steps = P - 1
    if WANT_LAST:
        steps += 1
    for step in tl.range(0, steps, num_stages=1):
        tl.debug_barrier()  # S of this step is in memory
        for first in tl.range(0, BK, BLOCK, num_stages=1):
            ri = first + tl.arange(0, BLOCK)[:, None]
            mask = (ri < DK) & in_v
            at = ri * DV + dv[None, :]
            new = tl.load(ends_ptr + place * (DK * DV) + at, mask=mask, other=0.0)
            if DELTA:
                for block in tl.static_range(BK // BLOCK):
                    ki = block * BLOCK + tl.arange(0, BLOCK)
                    if TRANSPOSED:
                        at_m = ki[None, :] * DK + ri
                    else:
                        at_m = ri * DK + ki[None, :]
                    of_m = (ri < DK) & (ki < DK)[None, :]
                    of_s = (ki < DK)[:, None] & in_v
                    M = tl.load(moves_ptr + place * (DK * DK) + at_m, mask=of_m, other=0.0)
                    S = tl.load(out_ptr + place * (DK * DV) + ki[:, None] * DV + dv[None, :], mask=of_s, other=0.0)
                    new = tl.dot(M, S, acc=new, input_precision=PREC)
            else:
                new += tl.load(moves_ptr + place) * tl.load(out_ptr + place * (DK * DV) + at, mask=mask, other=0.0)
            if WANT_LAST:
                if step == P - 1:
                    tl.store(last_ptr + of_row + at, new, mask=mask)
                else:
                    tl.store(out_ptr + (place + forth) * (DK * DV) + at, new, mask=mask)
            else:
                tl.store(out_ptr + (place + forth) * (DK * DV) + at, new, mask=mask)
        place += forth


def _launches(key_dim: int, value_dim: int, dtype: torch.dtype) -> tuple[Launch, Launch]:
    """How `piece_kernel` and `scan_kernel` run.

    `values` is the width of the tiles of columns; the scan's chunk is its block of key channels.
    """
    keys = pinned(key_dim, value_dim, dtype)[0]
    block = min(keys, 32)
    if dtype == torch.float32:
        return Launch(16, 4, 32 if keys < 128 else 16), Launch(block, 4, 32)
    scan = Launch(block, 2, 16, 240)
    if keys < 64:
        return Launch(16, 1, 32), scan
    return Launch(16, 2, 64 if keys == 64 else 32), scan


def _scan(
    moves: Tensor, ends: Tensor, given: Tensor | None, dtype: torch.dtype, rows: int, *, delta: bool, transposed: bool,
    want_last: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The start of every piece, and what lies beyond the last step (empty unless wanted); see `scan_kernel`."""
    places, heads, key_dim, value_dim = ends.shape
    keys, values, _ = pinned(key_dim, value_dim, dtype)
    launch = _launches(key_dim, value_dim, dtype)[1]
    width, tiles = _tiles(launch, values)
    out = torch.empty_like(ends)
    last = ends.new_empty((rows if want_last else 0, heads, key_dim, value_dim))
    scan_kernel[(rows * heads * tiles,)](  # pyright: ignore
        moves, ends, given, out, last, places // rows, heads,
        DK=key_dim, DV=value_dim, BK=keys, BV=width, TILES=tiles, BLOCK=launch.chunk, DELTA=delta,
        TRANSPOSED=transposed, HAS_GIVEN=given is not None, WANT_LAST=want_last,
        PREC="ieee" if dtype == torch.float32 else "tf32x3", **_options(launch),
    )  # fmt: skip
    return out, last


def _packed(*tensors: Tensor | None) -> list[Tensor | None]:
    # The rows one after the other: of slices of a projection still a view.
    return [None if x is None else x.reshape(1, -1, *x.shape[2:]) for x in tensors]


def _starts(rows: int, tokens: int, length: int, device: torch.device) -> Tensor:
    # The pieces as packed sequences (R * P + 1), built on the device: nothing waits.
    pieces = torch.arange(0, tokens, length, device=device)
    first = (torch.arange(rows, device=device)[:, None] * tokens + pieces).flatten()
    return torch.nn.functional.pad(first, (0, 1), value=rows * tokens)


@torch.library.custom_op("tsgdn::segmented", mutates_args=())
def segmented_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    erase: Tensor | None,
    state: Tensor | None,
    length: int,
    scale: float,
    delta: bool,
    norm: bool,
    want_end: bool,
    want_rho: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """O, end state, rho; and for the backward starts and M of the pieces, states and solves; unwanted ones are empty.

    `length` is the tokens per piece, a multiple of 64 below N; every gate is per head (R, N, H).
    """
    (rows, tokens, heads, value_dim), key_dim = v.shape, k.shape[3]
    pieces = -(-tokens // length)
    keys, values, _ = pinned(key_dim, value_dim, v.dtype)
    k, v = _heads_together(k), _heads_together(v)
    log_decay, beta, erase, state = _plain(log_decay, beta, erase, state)  # pyright: ignore
    launch = _launches(key_dim, value_dim, v.dtype)[0]
    width = min(launch.values, keys, values)
    of_values, of_keys = values // width, keys // width if delta else 0
    ends = torch.empty((rows * pieces, heads, key_dim, value_dim), dtype=torch.float32, device=v.device)
    moves = ends.new_empty((rows * pieces, heads, *((key_dim, key_dim) if delta else ())))
    piece_kernel[(rows * pieces * heads * (of_values + of_keys),)](  # pyright: ignore
        k, v, log_decay, beta, erase, ends, moves, 1.0, tokens, length, pieces, heads, heads // k.shape[2],
        k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        DK=key_dim, DV=value_dim, BK=keys, BV=width, VALUE_TILES=of_values, TILES=of_values + of_keys, C=launch.chunk,
        KEEP=keep, DELTA=delta, TIED=erase is None, NORM=norm,
        OP=tl.float32 if v.dtype == torch.float32 else tl.float16, PREC="ieee", **_options(launch),
    )  # fmt: skip
    starts, _ = _scan(moves, ends, state, v.dtype, rows, delta=delta, transposed=False, want_last=False)
    o, end, rho, kept, solve, _ = forward_op(
        *_packed(q, k, v, log_decay, beta, erase), starts, _starts(rows, tokens, length, v.device), None, None,
        scale, 0.0, False, True, delta, norm, want_end, want_rho, keep,
    )  # fmt: skip
    if want_end:
        end = end.unflatten(0, (rows, pieces))[:, -1].clone()  # .contiguous() may keep the others in memory
    rho = rho.view(v.shape) if rho.numel() else rho
    starts, moves = (x if keep else x.new_empty(0) for x in (starts, moves))
    return o.view(v.shape), end, rho, starts, moves, kept, solve


@segmented_op.register_fake
def _(q, k, v, log_decay, beta, erase, state, length, scale, delta, norm, want_end, want_rho, keep):
    (rows, tokens, heads, value_dim), key_dim = v.shape, k.shape[3]
    places = rows * -(-tokens // length)
    many_k, many_v = (x.new_empty((1, rows * tokens, *x.shape[2:])) for x in (k, v))
    o, _, rho, kept, solve, _ = _outputs(
        many_k, many_v, k.new_empty(places + 1), False, want_end, want_rho, keep, delta
    )  # fmt: skip
    wide = torch.empty((places, heads, key_dim, value_dim) if keep else (0,), dtype=torch.float32, device=v.device)
    move = (places, heads, key_dim, key_dim) if delta else (places, heads)
    return (
        o.new_empty(v.shape),
        wide.new_empty((rows, heads, key_dim, value_dim) if want_end else (0,)),
        rho.new_empty(v.shape) if want_rho or (keep and delta) else rho,
        wide,
        wide.new_empty(move if keep else (0,)),
        kept,
        solve,
    )


@torch.library.custom_op("tsgdn::segmented_backward", mutates_args=())
def segmented_backward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    erase: Tensor | None,
    starts: Tensor,
    moves: Tensor,
    kept: Tensor,
    solve: Tensor,
    rho: Tensor,
    do: Tensor,
    dend: Tensor | None,
    drho: Tensor | None,
    length: int,
    scale: float,
    delta: bool,
    norm: bool,
    want_start: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Dq and dk per value head, dv, dlog_decay, dbeta, derase and dstate; what is not wanted is empty."""
    (rows, tokens, heads, value_dim), key_dim = v.shape, k.shape[3]
    keys, values, config = pinned(key_dim, value_dim, v.dtype)
    q, k, v = (_heads_together(x) for x in _packed(q, k, v))  # pyright: ignore
    log_decay, beta, erase, do, drho = _plain(*_packed(log_decay, beta, erase, do, drho))  # pyright: ignore
    (dend,) = _plain(dend)
    cu = _starts(rows, tokens, length, v.device)
    launch, given = config.reverse, torch.empty_like(starts)
    width, tiles = _tiles(launch, values)
    # Z and the ends of this sweep are those of dS_end = 0: only the start is used.
    reverse_kernel[(starts.shape[0] * heads * tiles,)](  # pyright: ignore
        q, k, log_decay, beta, erase, do, drho, None, given, torch.empty_like(do), torch.empty_like(kept), solve, cu,
        scale, 1.0, rows * tokens, heads, heads // k.shape[2], q.stride(0), q.stride(1), k.stride(0), k.stride(1),
        DK=key_dim, DV=value_dim, BK=keys, BV=width, TILES=tiles, C=launch.chunk, SAVE=config.gradient.chunk,
        DELTA=delta, TIED=erase is None, NORM=norm, PACKED=True, HAS_END=False, HAS_RHO=drho is not None,
        WANT_START=True, PREC="ieee", **_options(launch),
    )  # fmt: skip
    ends, start = _scan(moves, given, dend, v.dtype, rows, delta=delta, transposed=True, want_last=want_start)
    many_rho = rho.view(v.shape) if rho.numel() else rho
    *found, _ = backward_op(
        q, k, v, log_decay, beta, erase, starts, cu, kept, solve, many_rho, do, ends, drho, scale, delta, norm, False
    )
    dq, dk, dv, dg, db, de = (x.view(rows, tokens, *x.shape[2:]) if x.numel() else x for x in found)
    return dq, dk, dv, dg, db, de, start if want_start else start.new_empty(0)


@segmented_backward_op.register_fake
def _(
    q, k, v, log_decay, beta, erase, starts, moves, kept, solve, rho, do, dend, drho, length, scale, delta, norm,
    want_start,
):  # fmt: skip
    return _gradients(k, v, erase, v.shape[0], want_start)


def _keep_for_backward(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, _state, ctx.length, ctx.scale, ctx.delta, ctx.norm, _, _, _ = inputs
    _, _, rho, starts, moves, kept, solve = output
    ctx.save_for_backward(*tensors, starts, moves, kept, solve, rho)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, do: Any, dend: Any, drho: Any, *_kept: Any) -> Any:
    given = ctx.saved_tensors
    q, v, erase = given[0], given[2], given[5]
    want_start = ctx.needs_input_grad[6]
    dq, dk, dv, dg, db, de, start = segmented_backward_op(
        *given, torch.zeros_like(v) if do is None else do, dend, drho,
        ctx.length, ctx.scale, ctx.delta, ctx.norm, want_start,
    )  # fmt: skip
    if dq.shape != q.shape:  # value heads that share a key
        dq, dk = (x.unflatten(2, (q.shape[2], -1)).sum(3) for x in (dq, dk))
    return dq, dk, dv, dg, db, None if erase is None else de, start if want_start else None, *[None] * 7


torch.library.register_autograd("tsgdn::segmented", _backward, setup_context=_keep_for_backward)
