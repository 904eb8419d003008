"""Mamba-2's scan with an initial state: the gated delta rule without the delta (arXiv 2405.21060)."""

import torch
from jaxtyping import Float
from torch import Tensor

from tsgdn.kernels.gated_delta_rule import gated_delta_rule


def ssd_reference(
    x: Float[Tensor, "R N H Pv"],
    dt: Float[Tensor, "R N H"],
    A: Float[Tensor, " H"],
    B: Float[Tensor, "R N G Ns"],
    C: Float[Tensor, "R N G Ns"],
    *,
    state: Float[Tensor, "R H Ns Pv"] | None = None,
    log_decay_extra: Float[Tensor, "R N H"] | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition: S_n = exp(dt A + extra) S_{n-1} + dt B x^T;  y_n = S_n^T C."""
    rows, tokens, heads, width = x.shape
    each = heads // B.shape[2]
    memory = x.new_zeros(rows, heads, B.shape[-1], width) if state is None else state
    outputs = []
    for n in range(tokens):
        log_decay = dt[:, n] * A
        if log_decay_extra is not None:
            log_decay = log_decay + log_decay_extra[:, n]
        keys, queries = (g[:, n].repeat_interleave(each, 1) for g in (B, C))
        write = (dt[:, n, :, None] * x[:, n])[:, :, None, :]
        memory = log_decay.exp()[..., None, None] * memory + keys[..., None] * write
        outputs.append((memory * queries[..., None]).sum(2))
    return torch.stack(outputs, 1) if outputs else torch.zeros_like(x), memory


def ssd(
    x: Float[Tensor, "R N H Pv"],
    dt: Float[Tensor, "R N H"],
    A: Float[Tensor, " H"],
    B: Float[Tensor, "R N G Ns"],
    C: Float[Tensor, "R N G Ns"],
    *,
    state: Float[Tensor, "R H Ns Pv"] | None = None,
    log_decay_extra: Float[Tensor, "R N H"] | None = None,
    chunk: int | None = None,
) -> tuple[Float[Tensor, "R N H Pv"], Float[Tensor, "R H Ns Pv"]]:
    """Continues the scan by N tokens; the skip D x is the caller's.

    Args:
        x: inputs per head.
        dt: step sizes >= 0; they scale decay and write.
        A: rates per head, < 0.
        B: write vectors, shared by H / G heads each.
        C: read vectors, likewise.
        state: the memory before the first token, never changed; None is zeros.
        log_decay_extra: added to dt A, <= 0: time that passed without a token. It scales no write.
        chunk: as in `gated_delta_rule`.

    Returns:
        Outputs in `x`'s number format and the memory after the last token in float32 or wider.

    Raises:
        ValueError: G does not divide H, or shapes that do not fit.
    """
    heads, groups = x.shape[2], B.shape[2]
    if groups == 0 or heads % groups:
        raise ValueError(f"{heads} heads cannot share {groups} groups of B and C; H must be a multiple of G")
    log_decay = dt * A
    if log_decay_extra is not None:
        log_decay = log_decay + log_decay_extra
    y, end = gated_delta_rule(C, B, x, log_decay=log_decay, beta=dt, delta=False, state=state, chunk=chunk)  # pyright: ignore
    return y, end
