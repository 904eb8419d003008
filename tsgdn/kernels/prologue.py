"""What a Gated DeltaNet layer does between its projections and its memory: short convolution, SiLU, gates."""

from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Real, Shaped
from torch import Tensor

from tsgdn.kernels.causal_conv import causal_conv
from tsgdn.kernels.choice import kernel_for
from tsgdn.kernels.replicas import rowwise


def within(lengths: Int[Tensor, " R"], tokens: int) -> Bool[Tensor, "R N"]:
    """True where a token lies inside its row's length."""
    return torch.arange(tokens, device=lengths.device) < lengths[:, None]


def silence(gap: Real[Tensor, "R N"], rate: Float[Tensor, " H"]) -> Float[Tensor, "R N H"]:
    """Log decay of the old memory over `gap` patches of silence, at least -40.

    exp(-40) is below the resolution of float64; a larger number would only cost the digits of the decays it is summed
    with inside a chunk.
    """
    return (gap.to(rate.dtype)[..., None] * rate).clamp_min(-40.0)


def prologue(
    inputs: Float[Tensor, "R N C"],
    raw: Float[Tensor, "R N G"],
    *,
    conv_weight: Float[Tensor, "C W"],
    conv_bias: Float[Tensor, " C"] | None = None,
    A_log: Float[Tensor, " H"] | None = None,
    dt_bias: Float[Tensor, " H"] | None = None,
    rate: Float[Tensor, " H"] | None = None,
    beta_max: int | float = 1,
    decay: bool = True,
    tail: Float[Tensor, "R W_1 C"] | None = None,
    write: Shaped[Tensor, "R N"] | None = None,
    gap: Real[Tensor, "R N"] | None = None,
    lengths: Int[Tensor, " R"] | None = None,
) -> tuple[Float[Tensor, "R N C"], Float[Tensor, "R N H"], Float[Tensor, "R N H"], Float[Tensor, "R W_1 C"]]:
    """Convolution, activation and gates of N >= 0 tokens, continued from `tail`.

        mixed_n = SiLU(bias + sum_j weight[:, W-1-j] x_{n-j})
        beta_n = beta_max sigmoid(raw_beta) write_n
        log_decay_n = -exp(A_log) softplus(raw_dt + dt_bias) + max(gap_n rate, -40)

    Source: Gated Delta Networks, arXiv 2412.06464; gaps and skipped writes are ours, the bound is that of `silence`.
    Gradients flow to everything but `write`, `gap` and `lengths`; the Triton kernels have no second derivative.

    Args:
        inputs: projections; what lies beyond a row's length must be finite.
        raw: logits of beta, then of dt; (R, N, 2H) with decay, (R, N, H) without.
        conv_weight: taps, the last one for the current token.
        conv_bias: added to every output of the convolution.
        A_log: logarithm of the decay per unit of dt; needed with decay.
        dt_bias: added to the logits of dt; needed with decay.
        rate: log decay per patch of silence, <= 0; needed with decay and `gap`.
        beta_max: largest write strength.
        decay: False: the memory never forgets, log_decay is zero and silence does not fade it.
        tail: the last W - 1 inputs before the first, oldest first, never changed; None is zeros.
        write: in [0, 1], multiplies beta.
        gap: patches of silence before the token, >= 0; above 0, the inputs before it are forgotten.
        lengths: tokens per row; beyond them beta and log_decay are zero, no gap counts, `mixed` means nothing.

    Returns:
        mixed in `inputs`' number format; beta and log_decay, float32 or wider; the tail at the end of each row, float32
        or wider. A row of length 0 keeps its tail bitwise.

    Raises:
        ValueError: shapes that do not fit, parameters that are missing, `write` or `gap` that wants a gradient.
        RuntimeError: `TSGDN_KERNEL=triton` without Triton.
    """
    heads = raw.shape[2] // 2 if decay else raw.shape[2]
    _check(inputs, raw, conv_weight, A_log, dt_bias, rate, decay, tail, write, gap)
    wide = torch.promote_types(inputs.dtype, torch.float32)
    if tail is not None:
        wide = torch.promote_types(wide, tail.dtype)
    if inputs.numel() and kernel_for(inputs.device, wide) == "triton":
        from tsgdn.kernels.prologue_fused import fused_prologue

        if not decay:
            A_log = dt_bias = rate = None

        return rowwise(
            partial(fused_prologue, heads=heads, beta_max=float(beta_max)),
            (inputs, raw, tail, write, gap, lengths),
            (conv_weight, conv_bias, A_log, dt_bias, rate),
        )

    beta = torch.sigmoid(raw[..., :heads])
    if beta_max != 1:
        beta = beta * beta_max
    if not decay or A_log is None or dt_bias is None:
        log_decay = torch.zeros_like(beta)
    else:
        log_decay = -A_log.exp() * F.softplus(raw[..., heads:] + dt_bias)
        if gap is not None and rate is not None:
            log_decay = log_decay + silence(gap, rate)
    restart = None if gap is None else gap > 0
    if write is not None:
        beta = beta * write.to(beta.dtype)[..., None]
    if lengths is not None:
        valid = within(lengths, inputs.shape[1])
        beta, log_decay = beta * valid[..., None], torch.where(valid[..., None], log_decay, 0.0)
        restart = None if restart is None else restart & valid
    mixed, tail = causal_conv(inputs, conv_weight, conv_bias, state=tail, lengths=lengths, restart=restart)
    return F.silu(mixed), beta, log_decay, tail


def _check(
    inputs: Tensor,
    raw: Tensor,
    conv_weight: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    rate: Tensor | None,
    decay: bool,
    tail: Tensor | None,
    write: Tensor | None,
    gap: Tensor | None,
) -> None:
    rows, tokens, channels = inputs.shape
    if conv_weight.dim() != 2 or conv_weight.shape[0] != channels:
        raise ValueError(
            f"conv_weight is {tuple(conv_weight.shape)}; with {channels} inputs it must be ({channels}, W)"
        )
    if raw.shape[:2] != inputs.shape[:2] or (decay and raw.shape[2] % 2):
        wanted = (rows, tokens, "2H" if decay else "H")
        raise ValueError(f"raw is {tuple(raw.shape)}; with inputs {tuple(inputs.shape)} it must be {wanted}")
    if decay and (A_log is None or dt_bias is None or (rate is None and gap is not None)):
        raise ValueError("decay=True needs A_log and dt_bias, and rate where gap is given; pass them or decay=False")
    if tail is not None and tail.shape != (rows, conv_weight.shape[1] - 1, channels):
        wanted = (rows, conv_weight.shape[1] - 1, channels)
        raise ValueError(f"tail is {tuple(tail.shape)}; it must be (R, W - 1, C) = {wanted}")
    for name, data in (("write", write), ("gap", gap)):
        if data is not None and data.requires_grad:
            raise ValueError(f"{name} requires a gradient, but it is data and gets none; pass {name}.detach()")
