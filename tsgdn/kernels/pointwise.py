"""Functions of one number that several Triton kernels share, so that training and streaming round alike."""

from typing import no_type_check

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
@no_type_check
def sigmoid(x):
    """1 / (1 + exp(-x))."""
    return 1.0 / (1.0 + tl.exp2(x * -LOG2E))  # half the instructions of tl.exp


@triton.jit
@no_type_check
def silu(x):
    """The SiLU, x / (1 + exp(-x))."""
    return x / (1.0 + tl.exp2(x * -LOG2E))


@triton.jit
@no_type_check
def softplus(x):
    """log(1 + exp(x)) to float32's relative precision, also where exp(x) vanishes beside 1, as in long memories."""
    # log(1 + e) = 2 artanh(e / (2 + e)) for e = exp(-|x|) <= 1: the series keeps all digits where e is small.
    e = tl.exp(-tl.abs(x))
    z = e / (2.0 + e)
    z2 = z * z
    series = z2 * (1 / 15) + 1 / 13
    series = series * z2 + 1 / 11
    series = series * z2 + 1 / 9
    series = series * z2 + 1 / 7
    series = series * z2 + 1 / 5
    series = series * z2 + 1 / 3
    return tl.maximum(x, 0.0) + 2.0 * z * (series * z2 + 1.0)
