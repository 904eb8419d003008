"""Triton pieces that forward and backward share: decays inside a chunk, lengths of keys, the unit inverse."""

from typing import no_type_check

import triton
import triton.language as tl

EPS = tl.constexpr(1e-6)


@triton.jit
@no_type_check
def _merge(X, A, r, c, B: tl.constexpr, PREC: tl.constexpr):
    # X holds the inverses of the diagonal B-blocks of I + A; returned are those of the 2B-blocks, X - X A X off the old
    # diagonal. X is block diagonal, so the wanted block of X A X is right without a mask on A.
    Xo = X.to(A.dtype)
    Z = tl.dot(tl.dot(Xo, A, input_precision=PREC).to(A.dtype), Xo, input_precision=PREC)
    new = ((r // (2 * B)) == (c // (2 * B))) & ((r // B) != (c // B))
    return tl.where(new, -Z, X)


@triton.jit
@no_type_check
def unit_inverse(A, C: tl.constexpr, OP: tl.constexpr, PREC: tl.constexpr):
    """(I + A)^-1 of a strictly triangular A [C, C] in float32, upper or lower, by doubling blocks from 2 to C.

    No power of A is formed: with equal keys their entries grow like binomials. With keys of length one and tied erase
    in [0, 2] no entry of the result exceeds 2, so products in float16 are safe and finer than in bfloat16.
    """
    r = tl.arange(0, C)[:, None]
    c = tl.arange(0, C)[None, :]
    X = tl.where(r == c, 1.0, tl.where((r // 2) == (c // 2), -A, 0.0))
    Ao = A.to(OP)
    if C > 2:
        X = _merge(X, Ao, r, c, 2, PREC)
    if C > 4:
        X = _merge(X, Ao, r, c, 4, PREC)
    if C > 8:
        X = _merge(X, Ao, r, c, 8, PREC)
    if C > 16:
        X = _merge(X, Ao, r, c, 16, PREC)
    if C > 32:
        X = _merge(X, Ao, r, c, 32, PREC)
    return X


@triton.jit
@no_type_check
def running(g, EXACT: tl.constexpr):
    """Running sum of a chunk's log decays (base 2) as a coarse and a fine part, and both parts of the total.

    Differences of the parts keep their digits.
    The coarse parts are multiples of 1/64, so their sums are exact: after a jump of -50 mild decays are still right.
    Without EXACT (16-bit inputs, whose own rounding is far coarser) the fine part is zero.
    """
    if EXACT:
        coarse = tl.floor(g * 64.0 + 0.5) * 0.015625
        fine = g - coarse
        return tl.cumsum(coarse, 0), tl.cumsum(fine, 0), tl.sum(coarse, 0), tl.sum(fine, 0)
    else:
        return tl.cumsum(g, 0), tl.zeros_like(g), tl.sum(g, 0), 0.0


@triton.jit
@no_type_check
def within(a, b, A, B, FULL_A: tl.constexpr, FULL_B: tl.constexpr):
    """The mask of a tile, index a < A and b < B; a side that is known to be full is not compared."""
    if FULL_A:
        return tl.broadcast_to((b < B)[None, :], [a.shape[0], b.shape[0]])
    elif FULL_B:
        return tl.broadcast_to((a < A)[:, None], [a.shape[0], b.shape[0]])
    else:
        return (a < A)[:, None] & (b < B)[None, :]


@triton.jit
@no_type_check
def unit_scale(x, one, NORM: tl.constexpr):
    """1 / length of the rows of a tile, or one.

    `one` is an argument of the kernel, so that the product stays: a tile that was multiplied is 20 % faster in the
    products that follow than one that came straight from memory.
    """
    if NORM:
        return tl.rsqrt(tl.sum(x * x, 1) + EPS)
    else:
        return tl.full([x.shape[0]], 1.0, tl.float32) * one


@triton.jit
@no_type_check
def sequence(cu_ptr, row, N, PACKED: tl.constexpr):
    """First token (int64) and length of a row; packed rows lie one after the other."""
    if PACKED:
        start = tl.cast(tl.load(cu_ptr + row), tl.int64)
        return start, tl.cast(tl.load(cu_ptr + row + 1) - start, tl.int32)
    else:
        return row * N, N
