"""The gated delta rule with state: one op for every linear mixer; the equations are in docs/gated_delta_rule.md."""

from functools import partial
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tsgdn.kernels.choice import kernel_for, without_autocast
from tsgdn.kernels.gated_delta_rule.chunkwise import chunkwise
from tsgdn.kernels.gated_delta_rule.step import step
from tsgdn.kernels.readout import readout as gated_norm
from tsgdn.kernels.replicas import rowwise
from tsgdn.kernels.unit_length import unit_length

__all__ = ["Readout", "gated_delta_rule"]


class Readout(NamedTuple):
    """The gated RMSNorm that a layer applies to what it reads; arguments as `kernels.readout`."""

    gate: Float[Tensor, "R N H Dv"]
    weight: Float[Tensor, " Dv"]
    eps: float = 1e-5
    activation: Literal["silu", "sigmoid"] = "silu"
    norm_first: bool = True


def gated_delta_rule(
    q: Float[Tensor, "R N HK Dk"],
    k: Float[Tensor, "R N HK Dk"],
    v: Float[Tensor, "R N H Dv"],
    *,
    log_decay: Float[Tensor, "R N H"] | Float[Tensor, "R N H Dk"],
    beta: Float[Tensor, "R N H"] | Float[Tensor, "R N H Dv"],
    erase: Float[Tensor, "R N H"] | Float[Tensor, "R N H Dk"] | None = None,
    delta: bool = True,
    state: Float[Tensor, "S H Dk Dv"] | None = None,
    norm: bool = False,
    scale: int | float = 1.0,
    cu_seqlens: Int[Tensor, " S1"] | None = None,
    readout: Readout | None = None,
    end_state: bool = True,
    residual: bool = False,
    chunk: int | None = None,
    segments: int | None = None,
) -> tuple[Any, ...]:
    """Continues the memory S by N tokens, in the order decay, predict, write, read.

        Sbar_n = Diag(exp(log_decay_n)) S_{n-1}
        rho_n = beta_n v_n - Sbar_n^T (erase_n k_n)
        S_n = Sbar_n + k_n rho_n^T;   o_n = S_n^T q_n

    Without decay this is DeltaNet; with `delta=False` (nothing is predicted, nothing erased) gated linear attention,
    which is Mamba-2's scan when k = B, q = C, v = x, beta = dt. Cutting the tokens anywhere and handing on the state
    changes neither outputs nor end state beyond rounding. A token with log_decay 0 and beta 0 (right padding) leaves
    the state as it is. Gradients flow to every input, the state included; there is no second derivative for N > 1.

    On a GPU one Triton launch does all of it for N > 1 and another for N = 1 (`fused.py`, `decode.py`), else torch.

    Args:
        q: queries. Value head h uses query and key head h // (H // HK).
        k: keys. With the delta rule they should have length one: longer ones can make the memory explode.
        v: values.
        log_decay: natural logarithm of what is kept, <= 0 and finite, per head or per key channel.
        beta: write strength in [0, 2], per head or per value channel.
        erase: strength of the correction, per head or per key channel; None ties it to `beta`.
        delta: False leaves the correction out.
        state: S before the first token, never changed; None is zeros.
        norm: divide queries and keys by their length, sqrt(sum of squares + 1e-6), first.
        scale: then multiply the queries.
        cu_seqlens: packed sequences: R is 1, and sequence s is tokens cu_seqlens[s] to cu_seqlens[s + 1] - 1, from 0 to
            N without a hole; states are one per sequence. The torch path reads the lengths on the host.
        readout: return the gated RMSNorm of the outputs instead of them.
        end_state: False: nobody needs S after the last token, and None is returned for it.
        residual: also return rho, what the memory could not predict.
        chunk: tokens per chunk on the torch path; None is the constant for Dk. It changes rounding and speed only.
        segments: cut each row into at most this many pieces that run at the same time, on a GPU for rows x heads far
            below its number of multiprocessors; None is 1. It changes rounding and speed only, and only where Triton
            runs with N > 64 and every gate per head. Not with `cu_seqlens`.

    Returns:
        Outputs (R, N, H, Dv) in `v`'s number format, S after the last token in float32 or wider, and rho like the
        outputs if asked.

    Raises:
        ValueError: shapes that do not fit.
        RuntimeError: `TSGDN_KERNEL=triton` without Triton; `cu_seqlens` under `torch.vmap`.
    """
    check_inputs(q, k, v, log_decay, beta, erase, delta, state, chunk, cu_seqlens, segments)
    wide = torch.promote_types(v.dtype, torch.float32)
    if state is not None:
        wide = torch.promote_types(wide, state.dtype)
        state = state.to(wide)
    with without_autocast(v.device.type):
        given, foldable = (q, k, v, log_decay, beta, erase, state), cu_seqlens is None
        how = {"delta": delta, "norm": norm, "cu_seqlens": cu_seqlens}
        if v.numel() and kernel_for(v.device, wide) == "triton":
            from tsgdn.kernels.gated_delta_rule.fused import run

            gate, weight, *after = readout or (None, None)
            wanted = {"want_end": end_state, "want_rho": residual, "segments": segments}
            fn = partial(run, **how, **wanted, scale=float(scale), readout=after)
            o, end, rho = rowwise(fn, (*given, gate), (weight,), foldable=foldable)
        else:
            fn = partial(_rows_in_torch, **how, scale=scale, wide=wide, chunk=chunk)
            o, end, rho = rowwise(fn, given, foldable=foldable)
            if readout is not None:
                gate, weight, eps, activation, norm_first = readout
                o = gated_norm(o, gate, weight, eps=eps, activation=activation, norm_first=norm_first)
    end = end if end_state else None
    return (o, end, rho) if residual else (o, end)


def _rows_in_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    erase: Tensor | None,
    state: Tensor | None,
    *,
    delta: bool,
    norm: bool,
    scale: int | float,
    cu_seqlens: Tensor | None,
    wide: torch.dtype,
    chunk: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    if norm and q.shape[1] == 1:  # for so little work one launch is dearer than a copy
        q, k = unit_length(torch.stack([q, k])).to(v.dtype).unbind(0)
    elif norm:
        q, k = unit_length(q).to(v.dtype), unit_length(k).to(v.dtype)
    if scale != 1:
        q = q * scale
    if k.shape[2] != v.shape[2]:
        q, k = (x.repeat_interleave(v.shape[2] // k.shape[2], 2) for x in (q, k))
    given = (q, k, v, log_decay, beta, erase)
    if cu_seqlens is None:
        return _in_torch(*given, delta, state, wide, chunk)
    parts = [
        _in_torch(
            *(x if x is None else x[:, a:b] for x in given),  # pyright: ignore
            delta=delta,
            state=None if state is None else state[s : s + 1],
            wide=wide,
            chunk=chunk,
        )
        for s, (a, b) in enumerate(pairwise(cu_seqlens.tolist()))
    ]
    o, rho = (torch.cat([part[i] for part in parts], 1) for i in (0, 2))
    return o, torch.cat([part[1] for part in parts]), rho


def _in_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    erase: Tensor | None,
    delta: bool,
    state: Tensor | None,
    wide: torch.dtype,
    chunk: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    if state is None:
        state = v.new_zeros(k.shape[0], k.shape[2], k.shape[3], v.shape[-1], dtype=wide)
    if v.numel() == 0:
        return torch.zeros_like(v), state.clone(), torch.zeros_like(v)
    if v.shape[1] == 1:
        return step(q, k, v, log_decay, beta, erase, delta, state)
    return chunkwise(q, k, v, log_decay, beta, erase, delta, state, chunk)


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
    cu_seqlens: Tensor | None = None,
    segments: int | None = None,
) -> None:
    """Raises ValueError, saying what came and what was expected, where the arguments of the op do not fit."""
    if k.dim() != 4 or q.shape != k.shape:
        raise ValueError(f"q is {tuple(q.shape)} and k {tuple(k.shape)}; both must be (R, N, H, Dk)")
    if v.dim() != 4 or v.shape[:2] != k.shape[:2] or (v.shape[2] % k.shape[2] if k.shape[2] else v.shape[2]):
        raise ValueError(
            f"v is {tuple(v.shape)}; with k {tuple(k.shape)} it must be {(*k.shape[:3], 'Dv')}, or its heads a multiple"
        )
    head, keys = v.shape[:3], (*v.shape[:3], k.shape[3])
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
    rows = k.shape[0]
    if cu_seqlens is not None:
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2 or rows != 1:
            raise ValueError(
                f"cu_seqlens is {tuple(cu_seqlens.shape)} with {rows} rows; packed sequences need (S + 1,) and one row"
            )
        rows = cu_seqlens.shape[0] - 1
    if state is not None and state.shape != (rows, v.shape[2], k.shape[3], v.shape[3]):
        expected = (rows, v.shape[2], k.shape[3], v.shape[3])
        raise ValueError(f"state is {tuple(state.shape)}; it must be (R, H, Dk, Dv) = {expected}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk is {chunk}; it must be at least 1")
    if segments is not None and segments < 1:
        raise ValueError(f"segments is {segments}; it must be at least 1")
    if segments is not None and cu_seqlens is not None:
        raise ValueError(
            f"segments={segments} came with cu_seqlens; packed sequences are not cut further: leave one of them out"
        )
