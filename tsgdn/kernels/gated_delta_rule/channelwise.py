"""The gated delta rule in Triton where decay, erase or write differ between channels: KDA and Gated DeltaNet-2.

Equations and names follow docs/gated_delta_rule.md, with Y = A (e^G . E) and Qt = e^G . Q - P Y. Four kernels:

prepare     a program per chunk: all that does not depend on the values, into scratch memory.
forward     a program holds one value tile of one head's state in registers and walks through the chunks:
                R = A Z - Y S0;   O = (e^G . Q) S0 + P R;   S_C = e^{G_C} . S0 + (e^{G_C - G} . K)^T R
sweep       the same from the last chunk to the first for the state's gradient, which it writes at every chunk's end:
                dS0 = e^{G_C} . dS + Qt^T dO - Y^T ((e^{G_C - G} . K) dS + dRho)
gradients   a program per chunk: everything else, from the state at the chunk's start and dS at its end.

In both walks the value channels do not meet, so value tiles are programs of their own. Tiles of the state are kept
transposed, [value channels, key channels]: as left operands they stay in registers.

**The decay between two tokens** r > s of a chunk is split by levels B = 1, 2, ... C / 2. At the level where r lies in
the upper and s in the lower half of one aligned block of 2B tokens, exp(G_r - G_s) is the decay from the upper half's
start to r times that from after s to the lower half's end: a token has one factor per level, with an exponent <= 0. A
level is one matrix product, of which that level's pairs are kept. Every exponent is the sum of the log decays it spans
and of no others, taken as a product with a matrix of zeros and ones: no difference of two sums, so a jump of -50 costs
no digits. log_decay's gradient goes back through the same matrices, transposed. It is a sum over what its own decay has
scaled, so under strong decay it is as exact, relative to itself, as the other gradients.
"""

from typing import Any, NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from tsgdn.kernels.gated_delta_rule.tiles import EPS, unit_inverse
from tsgdn.kernels.layout import power_of_two
from tsgdn.kernels.pointwise import LOG2E

CHUNK = 16
"""Tokens per chunk, the same for every size: saved states lie this far apart. 32 works as well."""

OFF, TIED, HEAD, CHANNEL = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
# 2^-256 is 0 in float32, so a stronger decay in one step (even -inf) means the same and keeps the sums finite.
FLOOR = tl.constexpr(-256.0)


# What the linter would shorten in kernels is compile-time choice, which Triton wants spelt out.
# ruff: noqa: SIM300


class Launch(NamedTuple):
    """How one kernel is launched."""

    tile: int  # value channels per tile; 0 where there are none
    warps: int
    stages: int = 1
    registers: int | None = None  # bound per thread; None is the compiler's choice


class Configuration(NamedTuple):
    """The launches of the four kernels for one size of head."""

    prepare: Launch
    forward: Launch
    sweep: Launch
    gradients: Launch


def _configuration(prepare: int, walk: tuple[int, int], gradients: tuple[int, int]) -> Configuration:
    return Configuration(Launch(0, prepare), Launch(*walk), Launch(*walk), Launch(*gradients))


# Pinned per padded (Dk, Dv): warps of `prepare`, (tile, warps) of both walks and of `gradients`. At most two warps, or
# tiles of 16 or 32 rows, so that products are mma.sync.
CONFIGS = {
    (16, 16): _configuration(1, (16, 1), (16, 1)),
    (16, 32): _configuration(1, (32, 1), (32, 1)),
    (16, 64): _configuration(1, (64, 1), (64, 1)),
    (16, 128): _configuration(1, (64, 1), (64, 1)),
    (32, 16): _configuration(1, (16, 1), (16, 2)),
    (32, 32): _configuration(1, (32, 1), (32, 2)),
    (32, 64): _configuration(1, (64, 1), (64, 2)),
    (32, 128): _configuration(1, (64, 1), (64, 2)),
    (64, 16): _configuration(2, (16, 1), (16, 4)),
    (64, 32): _configuration(2, (32, 1), (32, 4)),
    (64, 64): _configuration(2, (32, 1), (64, 4)),
    (64, 128): _configuration(2, (32, 1), (64, 4)),
    (128, 16): _configuration(4, (16, 1), (16, 4)),
    (128, 32): _configuration(4, (32, 2), (32, 4)),
    (128, 64): _configuration(4, (32, 2), (32, 4)),
    (128, 128): _configuration(4, (32, 2), (32, 4)),
}


def _exact(config: Configuration) -> Configuration:
    """The same for float32 inputs, whose products are multiply-adds: smaller tiles, more threads."""
    return Configuration(Launch(0, 4), Launch(16, 4), Launch(16, 4), Launch(min(config.gradients.tile, 32), 4))


# ---------------------------------------------------------------- pieces of a chunk


@triton.jit
@no_type_check
def _span(r, c, B: tl.constexpr):
    # What a token r spans at level B: in an upper half the tokens from its start to r, in a lower one those after r.
    return ((r // B) == (c // B)) & (((r // B) % 2 == 1) == (c <= r))


@triton.jit
@no_type_check
def _pairs(later, earlier, B: tl.constexpr):
    # The pairs that level B decides.
    same = (later // (2 * B)) == (earlier // (2 * B))
    return same & ((later // B) % 2 == 1) & ((earlier // B) % 2 == 0)


@triton.jit
@no_type_check
def _total(choose, x, DT: tl.constexpr, PREC: tl.constexpr):
    # Sums of the rows of x [C, D] that the rows of `choose` [C, C] name. In half precision x is cut in two summands;
    # products with 0 and 1 are exact and are added in float32.
    M = choose.to(DT)
    high = x.to(DT)
    out = tl.dot(M, high, input_precision=PREC)
    if DT != tl.float32:
        out = tl.dot(M, (x - high.to(tl.float32)).to(DT), acc=out, input_precision=PREC)
    return out


@triton.jit
@no_type_check
def _factor(g, r, c, B: tl.constexpr, DT: tl.constexpr, PREC: tl.constexpr):
    if B == 1:
        x = tl.where(r % 2 == 1, g, 0.0)
    else:
        x = _total(_span(r, c, B), g, DT, PREC)
    return tl.exp2(x)


@triton.jit
@no_type_check
def _level(T, P, q, k, e, g, r, c, B: tl.constexpr, ERASE: tl.constexpr, DT: tl.constexpr, PREC: tl.constexpr):
    F = _factor(g, r, c, B, DT, PREC)
    mine = _pairs(r, c, B)
    kF = tl.trans((k * F).to(DT))
    P = tl.where(mine, tl.dot((q * F).to(DT), kF, input_precision=PREC), P)
    if ERASE != 0:
        T = tl.where(mine, tl.dot((e * F).to(DT), kF, input_precision=PREC), T)
    return T, P


@triton.jit
@no_type_check
def _scores(q, k, e, g, r, c, C: tl.constexpr, ERASE: tl.constexpr, DT: tl.constexpr, PREC: tl.constexpr):
    # T = [E, K] strictly lower and P = [Q, K].
    T = tl.zeros([C, C], tl.float32)
    P = tl.where(r == c, tl.dot(q.to(DT), tl.trans(k.to(DT)), input_precision=PREC), 0.0)
    T, P = _level(T, P, q, k, e, g, r, c, 1, ERASE, DT, PREC)
    T, P = _level(T, P, q, k, e, g, r, c, 2, ERASE, DT, PREC)
    T, P = _level(T, P, q, k, e, g, r, c, 4, ERASE, DT, PREC)
    T, P = _level(T, P, q, k, e, g, r, c, 8, ERASE, DT, PREC)
    if C > 16:
        T, P = _level(T, P, q, k, e, g, r, c, 16, ERASE, DT, PREC)
    return T, P


@triton.jit
@no_type_check
def _level_gradient(
    dq, dk, de, dg, dP, dPt, dT, dTt, q, k, e, g, r, c,
    B: tl.constexpr, ERASE: tl.constexpr, DT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    F = _factor(g, r, c, B, DT, PREC)
    kF = (k * F).to(DT)
    qF = (q * F).to(DT)
    down = _pairs(r, c, B)
    up = _pairs(c, r, B)
    x = F * tl.dot(tl.where(down, dP, 0.0).to(DT), kF, input_precision=PREC)
    y = tl.dot(tl.where(up, dPt, 0.0).to(DT), qF, input_precision=PREC)
    dq += x
    spent = q * x
    if ERASE != 0:
        eF = (e * F).to(DT)
        z = F * tl.dot(tl.where(down, dT, 0.0).to(DT), kF, input_precision=PREC)
        y = tl.dot(tl.where(up, dTt, 0.0).to(DT), eF, acc=y, input_precision=PREC)
        de += z
        spent += e * z
    y = F * y
    dk += y
    spent += k * y
    if B == 1:
        dg += tl.where(r % 2 == 1, spent, 0.0)
    else:
        dg += _total(_span(c, r, B), spent, DT, PREC)
    return dq, dk, de, dg


@triton.jit
@no_type_check
def _where(row, N, NT, seq_ptr, C: tl.constexpr, PACKED: tl.constexpr):
    # First token, number of tokens and first slot for states of a row. Packed rows leave gaps between their slots, so
    # that no table of chunks is needed: floor(start / C) + row counts at least the chunks of all rows before.
    if PACKED:
        start = tl.load(seq_ptr + row).to(tl.int64)
        length = (tl.load(seq_ptr + row + 1) - start).to(tl.int32)
        slot = start // C + row
    else:
        start = row * N
        length = N
        slot = row * NT
    return start, length, slot


@triton.jit
@no_type_check
def _erase(
    b_ptr, e_ptr, bh, left, H: tl.constexpr, DK: tl.constexpr, KP: tl.constexpr, C: tl.constexpr, ERASE: tl.constexpr
):  # fmt: skip
    ti = tl.arange(0, C)
    di = tl.arange(0, KP)
    m = ti < left
    if ERASE == 3:
        oe = ti[:, None] * (H * DK) + di[None, :]
        erase = tl.load(e_ptr + bh * DK + oe, mask=m[:, None] & (di < DK)[None, :], other=0.0)
    elif ERASE == 2:
        erase = tl.load(e_ptr + bh + ti * H, mask=m, other=0.0)[:, None]
    elif ERASE == 1:
        erase = tl.load(b_ptr + bh + ti * H, mask=m, other=0.0)[:, None]
    else:
        erase = tl.zeros([C, 1], tl.float32)
    return erase


@triton.jit
@no_type_check
def _keys(
    q_ptr, k_ptr, g_ptr, b_ptr, e_ptr, token, head, left, scale,
    H: tl.constexpr, GROUP: tl.constexpr, DK: tl.constexpr, KP: tl.constexpr, C: tl.constexpr, NORM: tl.constexpr,
    ERASE: tl.constexpr, G_CHANNEL: tl.constexpr,
):  # fmt: skip
    # q scaled, k, e = erase k, log2 of the decay, and the factors of the norm; zeros beyond the last token.
    ti = tl.arange(0, C)
    di = tl.arange(0, KP)
    HK: tl.constexpr = H // GROUP
    m = (ti < left)[:, None] & (di < DK)[None, :]
    # Scalar parts of the addresses have 64 bits, tiles 32.
    bk = (token * HK + head // GROUP) * DK
    bh = token * H + head
    ok = ti[:, None] * (HK * DK) + di[None, :]
    oh = ti * H
    oe = ti[:, None] * (H * DK) + di[None, :]
    q = tl.load(q_ptr + bk + ok, mask=m, other=0.0).to(tl.float32)
    k = tl.load(k_ptr + bk + ok, mask=m, other=0.0).to(tl.float32)
    if G_CHANNEL:
        g = tl.load(g_ptr + bh * DK + oe, mask=m, other=0.0)
    else:
        g = tl.broadcast_to(tl.load(g_ptr + bh + oh, mask=ti < left, other=0.0)[:, None], [C, KP])
    g = tl.maximum(g * LOG2E, FLOOR)
    rq = tl.zeros([C], tl.float32) + 1.0
    rk = tl.zeros([C], tl.float32) + 1.0
    if NORM:
        rq = tl.rsqrt(tl.sum(q * q, 1) + EPS)
        rk = tl.rsqrt(tl.sum(k * k, 1) + EPS)
        q = q * (rq * scale)[:, None]
        k = k * rk[:, None]
    else:
        q = q * scale
    erase = _erase(b_ptr, e_ptr, bh, left, H, DK, KP, C, ERASE)
    return q, k, k * erase, g, rq, rk


# ---------------------------------------------------------------- kernels


@triton.jit
@no_type_check
def _find(slot, ROWS, STEPS, seq_ptr, NT, C: tl.constexpr, PACKED: tl.constexpr):
    # The row of a slot: of packed rows the last one whose first slot is not behind it.
    if PACKED:
        row = tl.cast(0, tl.int64)
        behind = tl.cast(ROWS, tl.int64)
        for _ in range(0, STEPS):
            middle = (row + behind) // 2
            reached = tl.load(seq_ptr + middle).to(tl.int64) // C + middle <= slot
            row = tl.where(reached, middle, row)
            behind = tl.where(reached, behind, middle)
    else:
        row = slot // NT
    return row


@triton.jit(do_not_specialize=["scale", "N", "NT", "ROWS", "STEPS"])
@no_type_check
def _prepare(
    q_ptr, k_ptr, g_ptr, b_ptr, e_ptr, seq_ptr, qs_ptr, ke_ptr, y_ptr, a_ptr, p_ptr, w_ptr, scale, N, NT, ROWS, STEPS,
    H: tl.constexpr, GROUP: tl.constexpr, DK: tl.constexpr, KP: tl.constexpr, DT: tl.constexpr, C: tl.constexpr,
    NORM: tl.constexpr, ERASE: tl.constexpr, G_CHANNEL: tl.constexpr, REVERSE: tl.constexpr, PACKED: tl.constexpr,
    INV: tl.constexpr, INV_PREC: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    ti = tl.arange(0, C)
    r = ti[:, None]
    c = ti[None, :]
    di = tl.arange(0, KP)
    pid = tl.program_id(0)
    head = pid % H
    slot = tl.cast(pid // H, tl.int64)
    row = _find(slot, ROWS, STEPS, seq_ptr, NT, C, PACKED)
    start, length, first = _where(row, N, NT, seq_ptr, C, PACKED)
    n = ((slot - first) * C).to(tl.int32)
    if n < length:
        q, k, e, g, _rq, _rk = _keys(
            q_ptr, k_ptr, g_ptr, b_ptr, e_ptr, start + n, head, length - n, scale,
            H, GROUP, DK, KP, C, NORM, ERASE, G_CHANNEL,
        )  # fmt: skip
        at = slot * H + head
        mk = (di < DK)[None, :] & (r >= 0)
        bk = at * (C * DK)
        bc = at * (C * C)
        ok = r * DK + di[None, :]
        oc = r * C + c
        since = tl.exp2(_total(c <= r, g, DT, PREC))
        tl.store(ke_ptr + bk + ok, (k * tl.exp2(_total(c > r, g, DT, PREC))).to(DT), mask=mk)
        tl.store(w_ptr + at * DK + di, tl.exp2(tl.sum(g, 0)), mask=di < DK)
        T, P = _scores(q, k, e, g, r, c, C, ERASE, DT, PREC)
        P = P.to(DT)
        tl.store(p_ptr + bc + oc, P)
        Q = q * since
        if ERASE != 0:
            A = unit_inverse(T, C, INV, INV_PREC).to(DT)
            tl.store(a_ptr + bc + oc, A)
            Y = tl.dot(A, (e * since).to(DT), input_precision=PREC).to(DT)
            tl.store(y_ptr + bk + ok, Y, mask=mk)
            if REVERSE:
                Q -= tl.dot(P, Y, input_precision=PREC)
        tl.store(qs_ptr + bk + ok, Q.to(DT), mask=mk)


@triton.jit(do_not_specialize=["N", "NT"])
@no_type_check
def _forward(
    qs_ptr, ke_ptr, y_ptr, a_ptr, p_ptr, w_ptr, v_ptr, b_ptr, state_ptr, seq_ptr, o_ptr, rho_ptr, end_ptr, saved_ptr,
    N, NT,
    H: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, KP: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    DELTA: tl.constexpr, B_CHANNEL: tl.constexpr, HAS_STATE: tl.constexpr, SAVE: tl.constexpr, WANT_RHO: tl.constexpr,
    PACKED: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    DT: tl.constexpr = v_ptr.dtype.element_ty
    TILES: tl.constexpr = (DV + BV - 1) // BV
    ti = tl.arange(0, C)
    r = ti[:, None]
    c = ti[None, :]
    di = tl.arange(0, KP)
    pid = tl.program_id(0)
    dv = (pid % TILES) * BV + tl.arange(0, BV)
    head = (pid // TILES) % H
    row = tl.cast(pid // (TILES * H), tl.int64)
    start, length, slot = _where(row, N, NT, seq_ptr, C, PACKED)
    ms = (dv < DV)[:, None] & (di < DK)[None, :]
    bs = (row * H + head) * (DK * DV)
    os = di[None, :] * DV + dv[:, None]
    ot = dv[:, None] * DK + di[None, :]
    ok = r * DK + di[None, :]
    ov = ti[None, :] * (H * DV) + dv[:, None]
    oc = c * C + r  # turned round
    mk = (di < DK)[None, :] & (r >= 0)
    if HAS_STATE:
        S = tl.load(state_ptr + bs + os, mask=ms, other=0.0)
    else:
        S = tl.zeros([BV, KP], tl.float32)
    for n in range(0, length, C):
        token = start + n
        left = length - n
        at = (slot + n // C) * H + head
        bk = at * (C * DK)
        bc = at * (C * C)
        bv = (token * H + head) * DV
        mv = (ti < left)[None, :] & (dv < DV)[:, None]
        Q = tl.load(qs_ptr + bk + ok, mask=mk, other=0.0)
        K = tl.load(ke_ptr + bk + ok, mask=mk, other=0.0)
        P = tl.load(p_ptr + bc + oc)
        w = tl.load(w_ptr + at * DK + di, mask=di < DK, other=0.0)
        z = tl.load(v_ptr + bv + ov, mask=mv, other=0.0).to(tl.float32)
        if B_CHANNEL:
            z *= tl.load(b_ptr + bv + ov, mask=mv, other=0.0)
        else:
            z *= tl.load(b_ptr + (token * H + head) + ti * H, mask=ti < left, other=0.0)[None, :]
        So = S.to(DT)
        if SAVE:
            if HAS_STATE or n > 0:
                tl.store(saved_ptr + at * (DK * DV) + ot, So, mask=ms)
        R = z
        if DELTA:
            Y = tl.load(y_ptr + bk + ok, mask=mk, other=0.0)
            A = tl.load(a_ptr + bc + oc)
            R = tl.dot(z.to(DT), A, input_precision=PREC) - tl.dot(So, tl.trans(Y), input_precision=PREC)
        Ro = R.to(DT)
        o = tl.dot(So, tl.trans(Q), input_precision=PREC)
        o = tl.dot(Ro, P, acc=o, input_precision=PREC)
        tl.store(o_ptr + bv + ov, o.to(DT), mask=mv)
        if WANT_RHO:
            tl.store(rho_ptr + bv + ov, Ro, mask=mv)
        S = tl.dot(Ro, K, acc=S * w[None, :], input_precision=PREC)
    tl.store(end_ptr + bs + os, S, mask=ms)


@triton.jit(do_not_specialize=["N", "NT"])
@no_type_check
def _sweep(
    qs_ptr, ke_ptr, y_ptr, w_ptr, seq_ptr, do_ptr, drho_ptr, dend_ptr, dstate_ptr, ends_ptr, N, NT,
    H: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, KP: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    DELTA: tl.constexpr, HAS_STATE: tl.constexpr, HAS_DEND: tl.constexpr, HAS_DRHO: tl.constexpr, PACKED: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    DT: tl.constexpr = do_ptr.dtype.element_ty
    TILES: tl.constexpr = (DV + BV - 1) // BV
    ti = tl.arange(0, C)
    r = ti[:, None]
    di = tl.arange(0, KP)
    pid = tl.program_id(0)
    dv = (pid % TILES) * BV + tl.arange(0, BV)
    head = (pid // TILES) % H
    row = tl.cast(pid // (TILES * H), tl.int64)
    start, length, slot = _where(row, N, NT, seq_ptr, C, PACKED)
    ms = (dv < DV)[:, None] & (di < DK)[None, :]
    bs = (row * H + head) * (DK * DV)
    os = di[None, :] * DV + dv[:, None]
    ot = dv[:, None] * DK + di[None, :]
    ok = r * DK + di[None, :]
    ov = ti[None, :] * (H * DV) + dv[:, None]
    mk = (di < DK)[None, :] & (r >= 0)
    if HAS_DEND:
        dS = tl.load(dend_ptr + bs + os, mask=ms, other=0.0)
    else:
        dS = tl.zeros([BV, KP], tl.float32)
    chunks = (length + C - 1) // C
    for back in range(0, chunks):
        n = (chunks - 1 - back) * C
        token = start + n
        at = (slot + n // C) * H + head
        bk = at * (C * DK)
        bv = (token * H + head) * DV
        mv = (ti < length - n)[None, :] & (dv < DV)[:, None]
        Q = tl.load(qs_ptr + bk + ok, mask=mk, other=0.0)
        w = tl.load(w_ptr + at * DK + di, mask=di < DK, other=0.0)
        do = tl.load(do_ptr + bv + ov, mask=mv, other=0.0)
        dSo = dS.to(DT)
        if HAS_DEND or back > 0:
            tl.store(ends_ptr + at * (DK * DV) + ot, dSo, mask=ms)
        dS = tl.dot(do, Q, acc=dS * w[None, :], input_precision=PREC)
        if DELTA:
            K = tl.load(ke_ptr + bk + ok, mask=mk, other=0.0)
            Y = tl.load(y_ptr + bk + ok, mask=mk, other=0.0)
            W = tl.dot(dSo, tl.trans(K), input_precision=PREC)
            if HAS_DRHO:
                W += tl.load(drho_ptr + bv + ov, mask=mv, other=0.0).to(tl.float32)
            dS = tl.dot((-W).to(DT), Y, acc=dS, input_precision=PREC)
    if HAS_STATE:
        tl.store(dstate_ptr + bs + os, dS, mask=ms)


@triton.jit(do_not_specialize=["scale", "N", "NT", "ROWS", "STEPS"])
@no_type_check
def _gradients(
    q_ptr, k_ptr, v_ptr, g_ptr, b_ptr, e_ptr, seq_ptr, ke_ptr, y_ptr, a_ptr, p_ptr, saved_ptr, ends_ptr,
    do_ptr, drho_ptr, dq_ptr, dk_ptr, dv_ptr, dg_ptr, db_ptr, de_ptr, scale, N, NT, ROWS, STEPS,
    H: tl.constexpr, GROUP: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, KP: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, NORM: tl.constexpr, ERASE: tl.constexpr, G_CHANNEL: tl.constexpr, B_CHANNEL: tl.constexpr,
    HAS_STATE: tl.constexpr, HAS_DEND: tl.constexpr, HAS_DRHO: tl.constexpr, PACKED: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    DT: tl.constexpr = v_ptr.dtype.element_ty
    TILES: tl.constexpr = (DV + BV - 1) // BV
    ti = tl.arange(0, C)
    r = ti[:, None]
    c = ti[None, :]
    di = tl.arange(0, KP)
    pid = tl.program_id(0)
    head = pid % H
    slot = tl.cast(pid // H, tl.int64)
    row = _find(slot, ROWS, STEPS, seq_ptr, NT, C, PACKED)
    start, length, first = _where(row, N, NT, seq_ptr, C, PACKED)
    n = ((slot - first) * C).to(tl.int32)
    token = start + n
    left = length - n
    if left > 0:
        has_start = (n > 0) | HAS_STATE
        has_end = (left > C) | HAS_DEND
        at = slot * H + head
        mc = (di < DK)[None, :] & (r >= 0)
        bc = at * (C * DK)
        oc = r * DK + di[None, :]
        bh = token * H + head
        oh = ti * H
        K = tl.load(ke_ptr + bc + oc, mask=mc, other=0.0)
        Pt = tl.load(p_ptr + at * (C * C) + (c * C + r))
        if ERASE != 0:
            Y = tl.load(y_ptr + bc + oc, mask=mc, other=0.0)
            A = tl.load(a_ptr + at * (C * C) + (r * C + c))
            At = tl.load(a_ptr + at * (C * C) + (c * C + r))
        dP = tl.zeros([C, C], tl.float32)
        dT = tl.zeros([C, C], tl.float32)
        dq = tl.zeros([C, KP], tl.float32)
        de = tl.zeros([C, KP], tl.float32)
        dk = tl.zeros([C, KP], tl.float32)
        dbeta = tl.zeros([C], tl.float32)
        kept = tl.zeros([KP], tl.float32)
        for tile in range(0, TILES):
            dv = tile * BV + tl.arange(0, BV)
            mv = (ti < left)[:, None] & (dv < DV)[None, :]
            ov = ti[:, None] * (H * DV) + dv[None, :]
            ms = (dv < DV)[:, None] & (di < DK)[None, :]
            os = dv[:, None] * DK + di[None, :]
            S = tl.load(saved_ptr + at * (DK * DV) + os, mask=ms & has_start, other=0.0)
            dS = tl.load(ends_ptr + at * (DK * DV) + os, mask=ms & has_end, other=0.0)
            do = tl.load(do_ptr + bh * DV + ov, mask=mv, other=0.0)
            v = tl.load(v_ptr + bh * DV + ov, mask=mv, other=0.0).to(tl.float32)
            if B_CHANNEL:
                b = tl.load(b_ptr + bh * DV + ov, mask=mv, other=0.0)
            else:
                b = tl.load(b_ptr + bh + oh, mask=ti < left, other=0.0)[:, None]
            R = (b * v).to(DT)
            if ERASE != 0:
                R = (tl.dot(A, R, input_precision=PREC) - tl.dot(Y, tl.trans(S), input_precision=PREC)).to(DT)
            dR = tl.dot(K, tl.trans(dS), input_precision=PREC)
            dR = tl.dot(Pt, do, acc=dR, input_precision=PREC)
            if HAS_DRHO:
                dR += tl.load(drho_ptr + bh * DV + ov, mask=mv, other=0.0).to(tl.float32)
            dz = dR
            if ERASE != 0:
                dz = tl.dot(At, dR.to(DT), input_precision=PREC)
                minus = (-dz).to(DT)
                dT = tl.dot(minus, tl.trans(R), acc=dT, input_precision=PREC)
                de = tl.dot(minus, S, acc=de, input_precision=PREC)
            tl.store(dv_ptr + bh * DV + ov, (b * dz).to(DT), mask=mv)
            if B_CHANNEL:
                tl.store(db_ptr + bh * DV + ov, dz * v, mask=mv)
            else:
                dbeta += tl.sum(dz * v, 1)
            dP = tl.dot(do, tl.trans(R), acc=dP, input_precision=PREC)
            dq = tl.dot(do, S, acc=dq, input_precision=PREC)
            dk = tl.dot(R, dS, acc=dk, input_precision=PREC)
            kept += tl.sum(S.to(tl.float32) * dS.to(tl.float32), 0)
        q, k, e, g, rq, rk = _keys(
            q_ptr, k_ptr, g_ptr, b_ptr, e_ptr, token, head, left, scale, H, GROUP, DK, KP, C, NORM, ERASE, G_CHANNEL
        )
        since = tl.exp2(_total(c <= r, g, DT, PREC))
        dq *= since
        de *= since
        dk *= tl.exp2(_total(c > r, g, DT, PREC))
        dg = _total(r <= c, q * dq + e * de, DT, PREC) + _total(c < r, k * dk, DT, PREC)
        dg += (kept * tl.exp2(tl.sum(g, 0)))[None, :]
        dP = dP.to(DT)
        dT = dT.to(DT)
        # A product with the unit matrix turns a tile round without a transposed left operand, and is exact.
        eye = (r == c).to(DT)
        dPt = tl.dot(eye, tl.trans(dP), input_precision=PREC)
        dTt = tl.dot(eye, tl.trans(dT), input_precision=PREC)
        # The diagonal: a token reads what it has just written.
        same = tl.where(r == c, dPt, 0.0).to(DT)
        dq = tl.dot(same, k.to(DT), acc=dq, input_precision=PREC)
        dk = tl.dot(same, q.to(DT), acc=dk, input_precision=PREC)
        dq, dk, de, dg = _level_gradient(dq, dk, de, dg, dP, dPt, dT, dTt, q, k, e, g, r, c, 1, ERASE, DT, PREC)
        dq, dk, de, dg = _level_gradient(dq, dk, de, dg, dP, dPt, dT, dTt, q, k, e, g, r, c, 2, ERASE, DT, PREC)
        dq, dk, de, dg = _level_gradient(dq, dk, de, dg, dP, dPt, dT, dTt, q, k, e, g, r, c, 4, ERASE, DT, PREC)
        dq, dk, de, dg = _level_gradient(dq, dk, de, dg, dP, dPt, dT, dTt, q, k, e, g, r, c, 8, ERASE, DT, PREC)
        if C > 16:
            dq, dk, de, dg = _level_gradient(dq, dk, de, dg, dP, dPt, dT, dTt, q, k, e, g, r, c, 16, ERASE, DT, PREC)

        mk = (ti < left)[:, None] & (di < DK)[None, :]
        ok = ti[:, None] * (H * DK) + di[None, :]
        if G_CHANNEL:
            tl.store(dg_ptr + bh * DK + ok, dg, mask=mk)
        else:
            tl.store(dg_ptr + bh + oh, tl.sum(tl.where((di < DK)[None, :], dg, 0.0), 1), mask=ti < left)
        if ERASE == 3:
            tl.store(de_ptr + bh * DK + ok, de * k, mask=mk)
        elif ERASE == 2:
            tl.store(de_ptr + bh + oh, tl.sum(de * k, 1), mask=ti < left)
        elif ERASE == 1:
            dbeta += tl.sum(de * k, 1)
        if not B_CHANNEL:
            tl.store(db_ptr + bh + oh, dbeta, mask=ti < left)
        if ERASE != 0:
            # Loaded again: kept, it would cost registers all the way.
            dk += _erase(b_ptr, e_ptr, bh, left, H, DK, KP, C, ERASE) * de
        if NORM:
            dk = (dk - k * tl.sum(k * dk, 1)[:, None]) * rk[:, None]
            unscaled = q / scale
            dq = (dq - unscaled * tl.sum(unscaled * dq, 1)[:, None]) * (rq * scale)[:, None]
        else:
            dq *= scale
        tl.store(dq_ptr + bh * DK + ok, dq.to(dq_ptr.dtype.element_ty), mask=mk)
        tl.store(dk_ptr + bh * DK + ok, dk.to(dk_ptr.dtype.element_ty), mask=mk)


# ---------------------------------------------------------------- launches


def padded(key_dim: int, value_dim: int) -> tuple[int, int]:
    """The key of `CONFIGS` for heads of these sizes; a value dimension beyond 128 is cut into more tiles.

    Raises:
        ValueError: a key dimension beyond 128, whose state does not fit in registers.
    """
    if not 1 <= key_dim <= 128 or value_dim < 1:
        raise ValueError(
            f"key_dim is {key_dim}, value_dim {value_dim}; expected key_dim in 1..128, or TSGDN_KERNEL=torch"
        )
    return power_of_two(key_dim), min(128, power_of_two(value_dim))


class _Plan(NamedTuple):
    """What all launches share: counts for the grids, and the kernels' constants."""

    config: Configuration
    rows: int
    slots: int  # places for chunks
    key_dim: int
    value_dim: int
    lengths: tuple[int, int]  # tokens and chunks of a row; packed rows find theirs
    find: tuple[int, int]  # rows, and steps of the search for a slot's row
    every: dict[str, Any]
    keys: dict[str, Any]

    @classmethod
    def of(
        cls,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        beta: Tensor,
        erase: Tensor | None,
        delta: bool,
        norm: bool,
        chunk: int,
        cu_seqlens: Tensor | None,
    ) -> "_Plan":
        rows, tokens, heads, value_dim = v.shape
        key_heads, key_dim = k.shape[2:]
        if heads % key_heads:
            raise ValueError(f"v has {heads} heads and k {key_heads}; expected a multiple of k's")
        if erase is None and delta and beta.dim() == 4:
            raise ValueError(f"beta is per value channel {tuple(beta.shape)}: erase cannot be tied to it; pass erase")
        if chunk not in (16, 32):
            raise ValueError(f"chunk is {chunk}; expected 16 or 32")
        chunks = -(-tokens // chunk)
        slots = rows * chunks
        if cu_seqlens is not None:
            if rows != 1:
                raise ValueError(f"packed tensors have {rows} rows; expected 1 row, all sequences one after the other")
            rows = cu_seqlens.shape[0] - 1
            slots = tokens // chunk + rows
        if not delta:
            erased = OFF
        elif erase is None:
            erased = TIED
        else:
            erased = HEAD if erase.dim() == 3 else CHANNEL
        size = padded(key_dim, value_dim)
        every = {"H": heads, "DK": key_dim, "KP": size[0], "C": chunk, "PACKED": cu_seqlens is not None, "PREC": "ieee"}
        keys = {
            "GROUP": heads // key_heads,
            "NORM": norm,
            "ERASE": erased.value,
            "G_CHANNEL": log_decay.dim() == 4,
        }
        config = _exact(CONFIGS[size]) if v.dtype == torch.float32 else CONFIGS[size]
        return cls(config, rows, slots, key_dim, value_dim, (tokens, chunks), (rows, rows.bit_length()), every, keys)

    def per_chunk(self, kernel: Any, launch: Launch, *arguments: Any, **constants: Any) -> None:
        self._launch(kernel, launch, self.slots * self.every["H"], *arguments, **self.keys, **constants)

    def per_row(self, kernel: Any, launch: Launch, *arguments: Any, **constants: Any) -> None:
        programs = self.rows * self.every["H"] * -(-self.value_dim // launch.tile)
        self._launch(kernel, launch, programs, *arguments, **constants, DV=self.value_dim, BV=launch.tile)

    def _launch(self, kernel: Any, launch: Launch, programs: int, *arguments: Any, **constants: Any) -> None:
        more = {} if launch.registers is None else {"maxnreg": launch.registers}
        if programs:
            kernel[(programs,)](
                *arguments, **self.every, **constants, num_warps=launch.warps, num_stages=launch.stages, **more
            )

    def prepare(
        self,
        q: Tensor,
        k: Tensor,
        log_decay: Tensor,
        beta: Tensor,
        erase: Tensor | None,
        cu_seqlens: Tensor | None,
        scale: int | float,
        reverse: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor, Tensor]:
        """What the chunks need of their keys and gates, whatever the values: Q or Qt, K at the end, Y, A, P, decay."""
        shape, chunk = (self.slots, self.every["H"]), self.every["C"]
        qs, ke = (k.new_empty(*shape, chunk, self.key_dim) for _ in range(2))
        p = k.new_empty(*shape, chunk, chunk)
        w = k.new_empty(*shape, self.key_dim, dtype=torch.float32)
        delta, exact = self.keys["ERASE"] != OFF.value, k.dtype == torch.float32
        y, a = (torch.empty_like(qs), torch.empty_like(p)) if delta else (None, None)
        # float16 is finer than bfloat16, but only keys of length one keep the inverse in its range.
        short = self.keys["NORM"] and not exact
        self.per_chunk(
            _prepare,
            self.config.prepare,
            *(q, k, log_decay, beta, erase, cu_seqlens, qs, ke, y, a, p, w, float(scale), *self.lengths, *self.find),
            DT={torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[k.dtype],
            REVERSE=reverse,
            INV=tl.float16 if short else tl.float32,
            INV_PREC="ieee" if short or exact else "tf32",
        )
        return qs, ke, y, a, p, w


def channelwise_forward(
    q: Float[Tensor, "R N HK Dk"],
    k: Float[Tensor, "R N HK Dk"],
    v: Float[Tensor, "R N H Dv"],
    log_decay: Float[Tensor, "R N H Dk"] | Float[Tensor, "R N H"],
    beta: Float[Tensor, "R N H"] | Float[Tensor, "R N H Dv"],
    erase: Float[Tensor, "R N H"] | Float[Tensor, "R N H Dk"] | None,
    delta: bool,
    state: Float[Tensor, "S H Dk Dv"] | None,
    *,
    norm: bool,
    scale: int | float,
    save: bool,
    want_rho: bool,
    cu_seqlens: Int[Tensor, " S1"] | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Outputs and end state of the gated delta rule (docs/gated_delta_rule.md), in two launches.

    Tensors are contiguous, q, k, v of one number format (bfloat16, float16, float32), all others float32. Value head h
    reads key head h // (H // HK).

    Args:
        q: queries, multiplied by `scale`, and before it divided by their length if `norm`.
        k: keys, divided by their length if `norm`; the length is sqrt(sum of squares + 1e-6).
        v: values.
        log_decay: natural logarithm of what is kept, <= 0, per key channel or per head.
        beta: write strength, per head or per value channel.
        erase: strength of the correction, per head or per key channel; None ties it to `beta` (then per head).
        delta: False leaves the correction out.
        state: memory before the first token; None is zeros. With `cu_seqlens` one for each of the S sequences.
        norm: q and k are divided by their length.
        scale: factor of the queries.
        save: also return the states at the chunks' starts, which `channelwise_backward` needs.
        want_rho: also return what the memory could not predict.
        cu_seqlens: packed sequences: R is 1, and sequence s is tokens cu_seqlens[s] to cu_seqlens[s + 1] - 1.
        chunk: tokens per chunk, 16 or 32; the backward needs the same.

    Returns:
        Outputs (R, N, H, Dv) in v's format; end state (S or R, H, Dk, Dv) float32; residuals like the outputs, or None;
        saved states (chunks, H, Dv, Dk) in v's format, or None. What no program fills there, none reads.

    Raises:
        ValueError: sizes that no configuration covers, heads that do not divide, a tied erase per value channel.
    """
    plan = _Plan.of(k, v, log_decay, beta, erase, delta, norm, chunk, cu_seqlens)
    o = torch.empty_like(v)
    rho = torch.empty_like(v) if want_rho else None
    end = v.new_empty(plan.rows, v.shape[2], plan.key_dim, plan.value_dim, dtype=torch.float32)
    saved = v.new_empty(plan.slots, v.shape[2], plan.value_dim, plan.key_dim) if save else None
    prepared = plan.prepare(q, k, log_decay, beta, erase, cu_seqlens, scale, reverse=False)
    plan.per_row(
        _forward,
        plan.config.forward,
        *(*prepared, v, beta, state, cu_seqlens, o, rho, end, saved, *plan.lengths),
        DELTA=delta,
        B_CHANNEL=beta.dim() == 4,
        HAS_STATE=state is not None,
        SAVE=save,
        WANT_RHO=want_rho,
    )
    return o, end, rho, saved


def channelwise_backward(
    q: Float[Tensor, "R N HK Dk"],
    k: Float[Tensor, "R N HK Dk"],
    v: Float[Tensor, "R N H Dv"],
    log_decay: Float[Tensor, "R N H Dk"] | Float[Tensor, "R N H"],
    beta: Float[Tensor, "R N H"] | Float[Tensor, "R N H Dv"],
    erase: Float[Tensor, "R N H"] | Float[Tensor, "R N H Dk"] | None,
    delta: bool,
    state: Float[Tensor, "S H Dk Dv"] | None,
    saved_states: Float[Tensor, "chunks H Dv Dk"],
    do: Float[Tensor, "R N H Dv"] | None,
    dend: Float[Tensor, "S H Dk Dv"] | None,
    drho: Float[Tensor, "R N H Dv"] | None,
    *,
    norm: bool,
    scale: int | float,
    cu_seqlens: Int[Tensor, " S1"] | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of `channelwise_forward` (docs/gated_delta_rule.md, "Backward"), in three launches.

    Args:
        q: as in the forward, like all up to `state`.
        k: keys.
        v: values.
        log_decay: logarithm of what is kept.
        beta: write strength.
        erase: strength of the correction.
        delta: whether there is a correction.
        state: memory before the first token.
        saved_states: the forward's.
        do: gradient of the outputs, in v's format; None is zeros.
        dend: gradient of the end state, float32; None is zeros.
        drho: gradient of the residuals, in v's format; None is zeros.
        norm: as in the forward, like all that follow.
        scale: factor of the queries.
        cu_seqlens: packed sequences.
        chunk: tokens per chunk.

    Returns:
        Gradients of q, k (summed over the value heads that share them), v, log_decay, beta, erase (None if there was
        none) and state (None if there was none), in the shapes and formats of their inputs.

    Raises:
        ValueError: as the forward.
    """
    plan = _Plan.of(k, v, log_decay, beta, erase, delta, norm, chunk, cu_seqlens)
    groups = v.shape[2] // k.shape[2]
    do = torch.zeros_like(v) if do is None else do
    # Heads that share a key are summed afterwards, so their parts stay in float32.
    wide = (*v.shape[:3], plan.key_dim)
    dq, dk = (torch.empty_like(x) if groups == 1 else x.new_empty(wide, dtype=torch.float32) for x in (q, k))
    dv, dlog_decay, dbeta = torch.empty_like(v), torch.empty_like(log_decay), torch.empty_like(beta)
    derase = None if erase is None else torch.empty_like(erase)
    dstate = None if state is None else torch.empty_like(state)
    ends = torch.empty_like(saved_states)
    qs, ke, y, a, p, w = plan.prepare(q, k, log_decay, beta, erase, cu_seqlens, scale, reverse=True)
    known = {"HAS_STATE": state is not None, "HAS_DEND": dend is not None, "HAS_DRHO": drho is not None}
    plan.per_row(
        _sweep,
        plan.config.sweep,
        *(qs, ke, y, w, cu_seqlens, do, drho, dend, dstate, ends, *plan.lengths),
        DELTA=delta,
        **known,
    )
    plan.per_chunk(
        _gradients,
        plan.config.gradients,
        *(q, k, v, log_decay, beta, erase, cu_seqlens, ke, y, a, p, saved_states, ends, do, drho),
        *(dq, dk, dv, dlog_decay, dbeta, derase, float(scale), *plan.lengths, *plan.find),
        DV=plan.value_dim,
        BV=plan.config.gradients.tile,
        B_CHANNEL=beta.dim() == 4,
        **known,
    )
    if groups > 1:
        dq, dk = (x.unflatten(2, (-1, groups)).sum(3).to(q.dtype) for x in (dq, dk))
    return dq, dk, dv, dlog_decay, dbeta, derase, dstate
