"""The gated delta rule in one Triton launch: solve in a chunk, carry the state, read; docs/gated_delta_rule.md.

One program runs over the tokens of one (row, head, tile of value channels) with its part of the state in registers;
only the outputs are written. Everything is computed transposed, (S^T, W^T, R^T, O^T): each accumulator is the left
operand of the next product and stays in registers, only C x C matrices pass through shared memory. With at most two
warps, or fewer than 64 rows, Triton uses `mma.sync`, which the compiler bugs of kernels.md do not touch.
"""

from typing import no_type_check

import triton
import triton.language as tl

from tsgdn.kernels.gated_delta_rule.tiles import running, sequence, unit_inverse, unit_scale, within
from tsgdn.kernels.pointwise import LOG2E
from tsgdn.kernels.readout_fused import readout_tile


@triton.jit(do_not_specialize=["scale", "one", "N", "H", "GROUP", "eps", "PER"])
@no_type_check
def forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    g_ptr,
    b_ptr,
    e_ptr,
    o_ptr,
    rho_ptr,
    s0_ptr,
    s1_ptr,
    saved_ptr,
    solve_ptr,
    cu_ptr,
    gate_ptr,
    w_ptr,
    y_ptr,
    scale,
    one,
    eps,
    N,
    H,
    GROUP,
    PER,
    q_row,
    q_token,
    k_row,
    k_token,
    v_row,
    v_token,
    gate_row,
    gate_token,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    TILES: tl.constexpr,
    C: tl.constexpr,
    SAVE: tl.constexpr,
    KEEP: tl.constexpr,
    DELTA: tl.constexpr,
    TIED: tl.constexpr,
    NORM: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_STATE: tl.constexpr,
    WANT_STATE: tl.constexpr,
    WANT_RHO: tl.constexpr,
    WANT_O: tl.constexpr,
    READOUT: tl.constexpr,
    SIGMOID: tl.constexpr,
    NORM_FIRST: tl.constexpr,
    OP: tl.constexpr,
    PREC: tl.constexpr,
):
    """Outputs (R, N, H, DV), optionally the end state, rho, and the readout y.

    KEEP also writes what the backward would compute again: the state at every SAVE tokens and the solve of each chunk.

    READOUT puts the gated RMSNorm into the store; it needs all value channels in one
    program. PER rows share one gain.
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
    row = tl.cast(pid // TILES // H, tl.int64)
    dv = tile * BV + tl.arange(0, BV)
    start, length = sequence(cu_ptr, row, N, PACKED)
    if PACKED:
        q_base = q_ptr + start * q_token
        k_base = k_ptr + start * k_token
        v_base = v_ptr + start * v_token
        slot = start // SAVE + row
    else:
        q_base = q_ptr + row * q_row
        k_base = k_ptr + row * k_row
        v_base = v_ptr + row * v_row
        slot = row * ((N + SAVE - 1) // SAVE)
    q_base += head // GROUP * DK
    k_base += head // GROUP * DK
    v_base += head * DV
    g_base = start * H + head
    o_base = (start * H + head) * DV
    state = (row * H + head) * (DK * DV)
    of_state = within(dv, di, DV, DK, DV == BV * TILES, DK == BK)
    S = tl.zeros([BV, BK], tl.float32)
    # Offsets inside a chunk are 32-bit tensors, those of the chunk 64-bit scalars.
    at_k = ti[:, None] * k_token + di[None, :]
    at_q = ti[:, None] * q_token + di[None, :]
    at_v = ti[None, :] * v_token + dv[:, None]
    at_o = ti[None, :] * (H * DV) + dv[:, None]
    at_state = di[None, :] * DV + dv[:, None]
    if HAS_STATE:
        S = tl.load(s0_ptr + state + at_state, mask=of_state, other=0.0)
    for n in tl.range(0, length, C, num_stages=1):
        left = length - n
        m = ti < left
        of_k = within(ti, di, left, DK, False, DK == BK)
        of_v = within(dv, ti, DV, left, DV == BV * TILES, False)
        n64 = tl.cast(n, tl.int64)
        k = tl.load(k_base + n64 * k_token + at_k, mask=of_k, other=0.0)
        q = tl.load(q_base + n64 * q_token + at_q, mask=of_k, other=0.0)
        v = tl.load(v_base + n64 * v_token + at_v, mask=of_v, other=0.0)
        g = tl.load(g_ptr + g_base + n64 * H + ti * H, mask=m, other=0.0) * LOG2E
        b = tl.load(b_ptr + g_base + n64 * H + ti * H, mask=m, other=0.0)
        high, low, high_end, low_end = running(g, EXACT)
        since_start = tl.exp2(high + low)
        kf = k.to(tl.float32)
        k = (kf * unit_scale(kf, one, NORM)[:, None]).to(DT)
        qf = q.to(tl.float32)
        q = (qf * unit_scale(qf, one, NORM)[:, None]).to(DT)
        # [j, i]: column j's share in row i; masked before the exponential.
        between = (high[None, :] - high[:, None]) + (low[None, :] - low[:, None])
        L = tl.exp2(tl.where(r <= c, between, -float("inf")))
        P = tl.dot(k, tl.trans(q), input_precision=PREC) * L
        kT = tl.trans(k)
        So = S.to(DT)
        o = tl.dot(So, tl.trans(q), input_precision=PREC) * since_start[None, :]
        if DELTA:
            e = b
            if not TIED:
                e = tl.load(e_ptr + g_base + n64 * H + ti * H, mask=m, other=0.0)
            kk = tl.dot(k, kT, input_precision=PREC)
            A = unit_inverse(tl.where(r < c, kk * e[None, :], 0.0), C, OP, PREC)
            W = v.to(tl.float32) * b[None, :] - tl.dot(So, kT, input_precision=PREC) * (since_start * e)[None, :]
            A = (A * L).to(DT)
            if KEEP:
                place = (((start // C + row) + n // C) * H + head) * (C * C)
                tl.store(solve_ptr + place + r + c * C, A)
            U = tl.dot(W.to(DT), A, input_precision=PREC)
        else:
            U = v.to(tl.float32) * b[None, :]
        o = tl.dot(U.to(DT), P.to(DT), acc=o, input_precision=PREC) * scale
        token = o_base + n64 * (H * DV)
        if WANT_O:
            tl.store(o_ptr + token + at_o, o.to(DT), mask=of_v)
        if WANT_RHO:  # also for the backward, which then solves nothing
            tl.store(rho_ptr + token + at_o, U.to(DT), mask=of_v)
        if READOUT:
            if PACKED:
                gate_base = gate_ptr + start * gate_token
            else:
                gate_base = gate_ptr + row * gate_row
            gate = tl.load(
                gate_base + head * DV + n64 * gate_token + ti[None, :] * gate_token + dv[:, None], mask=of_v, other=0.0
            ).to(tl.float32)
            weight = tl.load(w_ptr + row // PER * DV + dv, mask=dv < DV, other=0.0).to(tl.float32)
            y = readout_tile(o.to(DT).to(tl.float32), gate, weight, eps, DV, SIGMOID, NORM_FIRST, 0)
            tl.store(y_ptr + token + at_o, y.to(DT), mask=of_v)
        # Also after the last chunk: a branch here would move S out of its registers and back.
        to_end = tl.exp2((high_end - high) + (low_end - low))
        S = tl.dot((U * to_end[None, :]).to(DT), k, acc=S * tl.exp2(high_end + low_end), input_precision=PREC)
        if KEEP:
            if (n + C) % SAVE == 0 and n + C < length:
                place = ((slot + (n + C) // SAVE) * H + head) * (DK * DV)
                tl.store(saved_ptr + place + di[None, :] + dv[:, None] * DK, S.to(DT), mask=of_state)
    if WANT_STATE:
        tl.store(s1_ptr + state + at_state, S, mask=of_state)
