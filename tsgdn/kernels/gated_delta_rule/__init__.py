"""The gated delta rule with state: one op for every linear mixer; the equations are in docs/gated_delta_rule.md."""

from importlib import import_module

import torch
from jaxtyping import Float
from torch import Tensor

from tsgdn.kernels.choice import TRITON_MODULE, kernel_for
from tsgdn.kernels.gated_delta_rule.chunkwise import chunkwise
from tsgdn.kernels.gated_delta_rule.step import step

__all__ = ["gated_delta_rule"]


def gated_delta_rule(
    q: Float[Tensor, "R N H Dk"],
    k: Float[Tensor, "R N H Dk"],
    v: Float[Tensor, "R N H Dv"],
    *,
    log_decay: Float[Tensor, "R N H"] | Float[Tensor, "R N H Dk"],
    beta: Float[Tensor, "R N H"] | Float[Tensor, "R N H Dv"],
    erase: Float[Tensor, "R N H"] | Float[Tensor, "R N H Dk"] | None = None,
    delta: bool = True,
    state: Float[Tensor, "R H Dk Dv"] | None = None,
    residual: bool = False,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
    """Continues the memory S by N tokens, in the order decay, predict, write, read.

        Sbar_n = Diag(exp(log_decay_n)) S_{n-1}
        rho_n = beta_n v_n - Sbar_n^T (erase_n k_n)
        S_n = Sbar_n + k_n rho_n^T;   o_n = S_n^T q_n

    Without decay this is DeltaNet; with `delta=False` (nothing is predicted, nothing erased) gated linear attention,
    which is Mamba-2's scan when k = B, q = C, v = x, beta = dt. Cutting the tokens anywhere and handing on the state
    changes neither outputs nor end state beyond rounding. A token with log_decay 0 and beta 0 (right padding) leaves
    the state as it is. Gradients flow to every input, the state included; there is no second derivative for N > 1.

    Args:
        q: queries, already scaled.
        k: keys. With the delta rule they should have length one: longer ones can make the memory explode.
        v: values.
        log_decay: natural logarithm of what is kept, <= 0 and finite, per head or per key channel.
        beta: write strength in [0, 2], per head or per value channel.
        erase: strength of the correction, per head or per key channel; None ties it to `beta`.
        delta: False leaves the correction out.
        state: S before the first token, never changed; None is zeros.
        residual: also return rho, what the memory could not predict.
        chunk: tokens per chunk; None is the constant for Dk. It changes rounding and speed only.

    Returns:
        Outputs (R, N, H, Dv) in `v`'s number format, S after the last token in float32 or wider, and rho like the
        outputs if asked.

    Raises:
        ValueError: shapes that do not fit.
        RuntimeError: `TSGDN_KERNEL=triton` without Triton.
    """
    check_inputs(q, k, v, log_decay, beta, erase, delta, state, chunk)
    rows, tokens, heads, key_dim = k.shape
    wide = torch.promote_types(v.dtype, torch.float32)
    if state is None:
        state = v.new_zeros(rows, heads, key_dim, v.shape[-1], dtype=wide)
    else:
        wide = torch.promote_types(wide, state.dtype)
        state = state.to(wide)
    with torch.autocast(device_type=v.device.type, enabled=False):
        if tokens == 0 or v.numel() == 0:
            o, end, rho = torch.zeros_like(v), state.clone(), torch.zeros_like(v)
        elif tokens == 1:
            o, end, rho = step(q, k, v, log_decay, beta, erase, delta, state)
        else:
            many = chunkwise
            if kernel_for(v.device, wide) == "triton":
                many = import_module(TRITON_MODULE).chunkwise
            o, end, rho = many(q, k, v, log_decay, beta, erase, delta, state, chunk)
    return (o, end, rho) if residual else (o, end)


def check_inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    erase: Tensor | None,
    delta: bool,
    state: Tensor | None,
    chunk: int | None,
) -> None:
    """Raises ValueError, saying what came and what was expected, where the arguments of the op do not fit."""
    if k.dim() != 4 or q.shape != k.shape:
        raise ValueError(f"q is {tuple(q.shape)} and k {tuple(k.shape)}; both must be (R, N, H, Dk)")
    head, keys = k.shape[:3], k.shape
    if v.dim() != 4 or v.shape[:3] != head:
        raise ValueError(f"v is {tuple(v.shape)}; with k {tuple(k.shape)} it must be {(*head, 'Dv')}")
    if log_decay.shape not in (head, keys):
        raise ValueError(f"log_decay is {tuple(log_decay.shape)}; it must be {tuple(head)} or {tuple(keys)}")
    if beta.shape not in (head, v.shape):
        raise ValueError(f"beta is {tuple(beta.shape)}; it must be {tuple(head)} or {tuple(v.shape)}")
    if erase is not None and not delta:
        raise ValueError("erase came with delta=False, which erases nothing; leave one of them out")
    if erase is not None and erase.shape not in (head, keys):
        raise ValueError(f"erase is {tuple(erase.shape)}; it must be {tuple(head)} or {tuple(keys)}")
    if erase is None and delta and beta.dim() != 3:
        raise ValueError(f"beta is per value channel {tuple(beta.shape)}: erase cannot be tied to it; pass erase")
    if state is not None and state.shape != (k.shape[0], k.shape[2], k.shape[3], v.shape[3]):
        expected = (k.shape[0], k.shape[2], k.shape[3], v.shape[3])
        raise ValueError(f"state is {tuple(state.shape)}; it must be (R, H, Dk, Dv) = {expected}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk is {chunk}; it must be at least 1")
