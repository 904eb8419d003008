"""Gradients of the gated delta rule in two Triton launches: the state's, backwards in time, then all the others.

`reverse_kernel` mirrors the forward: dS in registers, one program per (row, head, tile of value channels); it writes
Z = dX of every token and dS at chunk ends. With them, and what the forward kept (residuals, states at chunk starts, the
solves), `gradient_kernel` treats every chunk on its own: nothing is serial, no accumulator outlives a chunk.
Equations: docs/gated_delta_rule.md.
"""

from typing import no_type_check

import triton
import triton.language as tl

from tsgdn.kernels.gated_delta_rule.tiles import running, sequence, unit_scale, within
from tsgdn.kernels.pointwise import LOG2E


@triton.jit(do_not_specialize=["scale", "one", "N", "H", "GROUP"])
@no_type_check
def reverse_kernel(
    q_ptr,
    k_ptr,
    g_ptr,
    b_ptr,
    e_ptr,
    do_ptr,
    drho_ptr,
    ds1_ptr,
    ds0_ptr,
    z_ptr,
    ends_ptr,
    solve_ptr,
    cu_ptr,
    scale,
    one,
    N,
    H,
    GROUP,
    q_row,
    q_token,
    k_row,
    k_token,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    TILES: tl.constexpr,
    C: tl.constexpr,
    SAVE: tl.constexpr,
    DELTA: tl.constexpr,
    TIED: tl.constexpr,
    NORM: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_END: tl.constexpr,
    HAS_RHO: tl.constexpr,
    WANT_START: tl.constexpr,
    PREC: tl.constexpr,
):
    """Z = dX of every token, dS at the end of every SAVE tokens but the last (slots, H, DV, DK), and at the start.

    dR = P^T dO + e^{G_C - G} K dS + dRho;  Z = A^T dR;  dS0 = e^{G_C} dS + (e^G Q)^T dO - (e^G E)^T Z.
    """
    DT: tl.constexpr = do_ptr.dtype.element_ty
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
        slot = start // SAVE + row
    else:
        q_base = q_ptr + row * q_row
        k_base = k_ptr + row * k_row
        slot = row * ((N + SAVE - 1) // SAVE)
    q_base += head // GROUP * DK
    k_base += head // GROUP * DK
    g_base = start * H + head
    o_base = (start * H + head) * DV
    state = (row * H + head) * (DK * DV)
    of_state = within(dv, di, DV, DK, DV == BV * TILES, DK == BK)
    at_k = ti[:, None] * k_token + di[None, :]
    at_q = ti[:, None] * q_token + di[None, :]
    at_o = ti[None, :] * (H * DV) + dv[:, None]
    at_state = di[None, :] * DV + dv[:, None]
    dS = tl.zeros([BV, BK], tl.float32)
    if HAS_END:
        dS = tl.load(ds1_ptr + state + at_state, mask=of_state, other=0.0)
    chunks = (length + C - 1) // C
    for step in range(0, chunks):
        n = (chunks - 1 - step) * C
        left = length - n
        m = ti < left
        of_k = within(ti, di, left, DK, False, DK == BK)
        of_v = within(dv, ti, DV, left, DV == BV * TILES, False)
        n64 = tl.cast(n, tl.int64)
        k = tl.load(k_base + n64 * k_token + at_k, mask=of_k, other=0.0)
        q = tl.load(q_base + n64 * q_token + at_q, mask=of_k, other=0.0)
        token = o_base + n64 * (H * DV)
        do = tl.load(do_ptr + token + at_o, mask=of_v, other=0.0)
        gate = g_base + n64 * H
        g = tl.load(g_ptr + gate + ti * H, mask=m, other=0.0) * LOG2E
        high, low, high_end, low_end = running(g, EXACT)
        since_start = tl.exp2(high + low)
        qf = q.to(tl.float32)
        qf = qf * (unit_scale(qf, one, NORM) * scale)[:, None]
        q = qf.to(DT)
        kf = k.to(tl.float32)
        kf = kf * unit_scale(kf, one, NORM)[:, None]
        k = kf.to(DT)
        between = (high[:, None] - high[None, :]) + (low[:, None] - low[None, :])
        L = tl.exp2(tl.where(r >= c, between, -float("inf")))
        kT = tl.trans(k)
        P = (tl.dot(q, kT, input_precision=PREC) * L).to(DT)
        dU = tl.zeros([BV, C], tl.float32)
        if HAS_RHO:
            dU = tl.load(drho_ptr + token + at_o, mask=of_v, other=0.0).to(tl.float32)
        to_end = tl.exp2((high_end - high) + (low_end - low))
        dU += tl.dot(dS.to(DT), kT, input_precision=PREC) * to_end[None, :]
        Z = tl.dot(do, P, acc=dU, input_precision=PREC)
        if DELTA:
            if TIED:
                e = tl.load(b_ptr + gate + ti * H, mask=m, other=0.0)
            else:
                e = tl.load(e_ptr + gate + ti * H, mask=m, other=0.0)
            place = (((start // C + row) + n // C) * H + head) * (C * C)
            Z = tl.dot(Z.to(DT), tl.load(solve_ptr + place + r * C + c), input_precision=PREC)
        Zo = Z.to(DT)
        tl.store(z_ptr + token + at_o, Zo, mask=of_v)
        dS = dS * tl.exp2(high_end + low_end)
        dS = tl.dot(do, (qf * since_start[:, None]).to(DT), acc=dS, input_precision=PREC)
        if DELTA:
            dS = tl.dot(Zo, (kf * (-since_start * e)[:, None]).to(DT), acc=dS, input_precision=PREC)
        if n % SAVE == 0 and n > 0:
            place = ((slot + n // SAVE - 1) * H + head) * (DK * DV)
            tl.store(ends_ptr + place + di[None, :] + dv[:, None] * DK, dS.to(DT), mask=of_state)
    if WANT_START:
        tl.store(ds0_ptr + state + at_state, dS, mask=of_state)


@triton.jit
@no_type_check
def _state(kept, given_ptr, offset, at, mask, inner, GIVEN: tl.constexpr):
    # A state of the scratch, or at the sequence's own end the one that was given.
    if GIVEN:
        if inner:
            x = tl.load(kept, mask=mask, other=0.0)
        else:
            x = tl.load(given_ptr + offset + at, mask=mask, other=0.0).to(kept.dtype.element_ty)
    else:
        x = tl.load(kept, mask=mask, other=0.0)
    return x


@triton.jit(do_not_specialize=["scale", "one", "N", "H", "GROUP"])
@no_type_check
def gradient_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    g_ptr,
    b_ptr,
    e_ptr,
    do_ptr,
    u_ptr,
    s0_ptr,
    ds1_ptr,
    saved_ptr,
    ends_ptr,
    cu_ptr,
    rows_ptr,
    dq_ptr,
    dk_ptr,
    dv_ptr,
    dg_ptr,
    db_ptr,
    de_ptr,
    scale,
    one,
    N,
    H,
    GROUP,
    q_row,
    q_token,
    k_row,
    k_token,
    v_row,
    v_token,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    TILES: tl.constexpr,
    C: tl.constexpr,
    DIRECT: tl.constexpr,
    DELTA: tl.constexpr,
    TIED: tl.constexpr,
    NORM: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_STATE: tl.constexpr,
    HAS_END: tl.constexpr,
    PREC: tl.constexpr,
):
    """One program per (chunk, head): dq, dk (R, N, H, DK), dlog_decay, dbeta, derase (R, N, H); dv replaces Z.

    The residuals R come from the forward and Z from the reverse sweep, so nothing is solved here. DIRECT forms the
    transposed C x C matrices by products of their own instead of transposing accumulators, which `wgmma` cannot take.
    """
    DT: tl.constexpr = v_ptr.dtype.element_ty
    EXACT: tl.constexpr = tl.float32 == DT
    ti = tl.arange(0, C)
    di = tl.arange(0, BK)
    r = ti[:, None]
    c = ti[None, :]
    pid = tl.program_id(0)
    head = pid % H
    slot = tl.cast(pid // H, tl.int64)
    if PACKED:
        row = tl.cast(tl.load(rows_ptr + slot), tl.int64)
        start, length = sequence(cu_ptr, row, N, PACKED)
        n = tl.cast((slot - (start // C + row)) * C, tl.int32)
        q_base = q_ptr + start * q_token
        k_base = k_ptr + start * k_token
        v_base = v_ptr + start * v_token
    else:
        chunks = (N + C - 1) // C
        row = slot // chunks
        start = row * N
        length = N
        n = tl.cast((slot - row * chunks) * C, tl.int32)
        q_base = q_ptr + row * q_row
        k_base = k_ptr + row * k_row
        v_base = v_ptr + row * v_row
    if n >= length:
        return
    left = length - n
    m = ti < left
    of_k = within(ti, di, left, DK, False, DK == BK)
    # Offsets inside the chunk are 32-bit tensors, those of the chunk 64-bit scalars.
    n64 = tl.cast(n, tl.int64)
    first = start + n64
    k_base += n64 * k_token + head // GROUP * DK
    q_base += n64 * q_token + head // GROUP * DK
    v_base += n64 * v_token + head * DV
    o_base = (first * H + head) * DV
    k = tl.load(k_base + ti[:, None] * k_token + di[None, :], mask=of_k, other=0.0)
    q = tl.load(q_base + ti[:, None] * q_token + di[None, :], mask=of_k, other=0.0)
    at = first * H + head + ti * H
    g = tl.load(g_ptr + at, mask=m, other=0.0) * LOG2E
    b = tl.load(b_ptr + at, mask=m, other=0.0)
    e = b
    if DELTA:
        if not TIED:
            e = tl.load(e_ptr + at, mask=m, other=0.0)
    high, low, high_end, low_end = running(g, EXACT)
    since_start = tl.exp2(high + low)
    to_end = tl.exp2((high_end - high) + (low_end - low))
    qf = q.to(tl.float32)
    q_unit = unit_scale(qf, one, NORM) * scale
    q = (qf * q_unit[:, None]).to(DT)
    kf = k.to(tl.float32)
    k_unit = unit_scale(kf, one, NORM)
    k = (kf * k_unit[:, None]).to(DT)
    # Does the chunk begin with a state, and does the state at its end matter?
    begins = (n > 0) | HAS_STATE
    ends = (n + C < length) | HAS_END
    dQ = tl.zeros([C, BK], tl.float32)
    dK = tl.zeros([C, BK], tl.float32)
    dP = tl.zeros([C, C], tl.float32)
    M = tl.zeros([C, C], tl.float32)
    if DIRECT:
        dPT = tl.zeros([C, C], tl.float32)
        MT = tl.zeros([C, C], tl.float32)
    db = tl.zeros([C], tl.float32)
    de = tl.zeros([C], tl.float32)
    inter = tl.zeros([C], tl.float32)
    write = tl.zeros([C], tl.float32)
    through = 0.0
    given = (row * H + head) * (DK * DV)
    kept = (slot * H + head) * (DK * DV)
    for tile in tl.static_range(TILES):
        dv = tile * BV + tl.arange(0, BV)
        tl.debug_barrier()  # keeps the compiler from loading everything at once and spilling; so do those below
        of_v = within(ti, dv, left, DV, False, DV == BV * TILES)
        of_state = within(dv, di, DV, DK, DV == BV * TILES, DK == BK)
        at_v = ti[:, None] * (H * DV) + dv[None, :]
        at_kept = dv[:, None] * DK + di[None, :]
        at_given = dv[:, None] + di[None, :] * DV
        v = tl.load(v_base + ti[:, None] * v_token + dv[None, :], mask=of_v, other=0.0)
        Z = tl.load(dv_ptr + o_base + at_v, mask=of_v, other=0.0)
        Zf = Z.to(tl.float32)
        tl.store(dv_ptr + o_base + at_v, (Zf * b[:, None]).to(DT), mask=of_v)
        db += tl.sum(Zf * v.to(tl.float32), 1)
        if DELTA:
            U = tl.load(u_ptr + o_base + at_v, mask=of_v, other=0.0)
        else:
            U = (v.to(tl.float32) * b[:, None]).to(DT)
        do = tl.load(do_ptr + o_base + at_v, mask=of_v, other=0.0)
        UT = tl.trans(U)
        dP = tl.dot(do, UT, acc=dP, input_precision=PREC)
        if DIRECT:
            dPT = tl.dot(U, tl.trans(do), acc=dPT, input_precision=PREC)
        if DELTA:
            M = tl.dot(Z, UT, acc=M, input_precision=PREC)
            if DIRECT:
                MT = tl.dot(U, tl.trans(Z), acc=MT, input_precision=PREC)
        tl.debug_barrier()
        # States that are not there are masked to zero: branches would move the accumulators out of their registers.
        dS = _state(ends_ptr + kept + at_kept, ds1_ptr, given, at_given, of_state & ends, n + C < length, HAS_END)
        x = tl.dot((U.to(tl.float32) * to_end[:, None]).to(DT), dS, input_precision=PREC)
        write += tl.sum(k.to(tl.float32) * x, 1)
        dK += x
        tl.debug_barrier()
        S = _state(saved_ptr + kept + at_kept, s0_ptr, given, at_given, of_state & begins, n > 0, HAS_STATE)
        end = _state(ends_ptr + kept + at_kept, ds1_ptr, given, at_given, of_state & ends, n + C < length, HAS_END)
        through += tl.sum(tl.sum(S.to(tl.float32) * end.to(tl.float32), 1), 0)
        tl.debug_barrier()
        x = tl.dot((do.to(tl.float32) * since_start[:, None]).to(DT), S, input_precision=PREC)
        inter += tl.sum(q.to(tl.float32) * x, 1)
        dQ += x
        if DELTA:
            x = tl.dot((Zf * since_start[:, None]).to(DT), S, input_precision=PREC)
            de -= tl.sum(k.to(tl.float32) * x, 1)
            dK -= x * e[:, None]
    tl.debug_barrier()
    # Pairs inside the chunk enter as row sum minus column sum of the same numbers, which cancel exactly.
    L = tl.exp2(tl.where(r >= c, (high[:, None] - high[None, :]) + (low[:, None] - low[None, :]), -float("inf")))
    kT = tl.trans(k)
    dP = dP * L
    pairs = dP * tl.dot(q, kT, input_precision=PREC)
    along_q = inter + tl.sum(pairs, 1)
    along_k = write + tl.sum(pairs, 0)
    if DELTA:
        M = tl.where(r > c, M * L, 0.0)
        pairs = M * tl.dot(k, kT, input_precision=PREC)
        rows = tl.sum(pairs, 1)
        columns = tl.sum(pairs * e[:, None], 0)
        along_e = (de - rows) * e
        along_k -= columns
        de -= rows
    else:
        along_e = tl.zeros([C], tl.float32)
    # The gradient of the running sums is q . dq + e . de - k . dk.
    dg = tl.cumsum(along_q + along_e - along_k + write, 0, reverse=True)
    dg += tl.cumsum(write, 0) - write + through * tl.exp2(high_end + low_end)
    tl.store(dg_ptr + at, dg, mask=m)
    if DELTA:
        if TIED:
            tl.store(db_ptr + at, db + de, mask=m)
        else:
            tl.store(db_ptr + at, db, mask=m)
            tl.store(de_ptr + at, de, mask=m)
    else:
        tl.store(db_ptr + at, db, mask=m)
    if DIRECT:
        LT = tl.exp2(tl.where(r <= c, (high[None, :] - high[:, None]) + (low[None, :] - low[:, None]), -float("inf")))
        dPt = (dPT * LT).to(DT)
    else:
        dPt = tl.trans(dP).to(DT)
    dQ = tl.dot(dP.to(DT), k, acc=dQ, input_precision=PREC)
    dK = tl.dot(dPt, q, acc=dK, input_precision=PREC)
    if DELTA:
        M = -M * e[:, None]
        if DIRECT:
            M -= tl.where(r < c, MT * LT, 0.0) * e[None, :]
        else:
            M += tl.trans(M)
        dK = tl.dot(M.to(DT), k, acc=dK, input_precision=PREC)
    if NORM:
        # A gradient along the vector itself changes nothing; what lies along it is known from the sums above.
        dQ = (dQ - q.to(tl.float32) * (along_q / (scale * scale))[:, None]) * q_unit[:, None]
        dK = (dK - k.to(tl.float32) * (along_e + along_k)[:, None]) * k_unit[:, None]
    else:
        dQ = dQ * scale
    at_k = ti[:, None] * (H * DK) + di[None, :]
    k_out = (first * H + head) * DK
    tl.store(dq_ptr + k_out + at_k, dQ.to(DT), mask=of_k)
    tl.store(dk_ptr + k_out + at_k, dK.to(DT), mask=of_k)
