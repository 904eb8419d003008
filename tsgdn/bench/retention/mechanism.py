"""Why a trained model kept or lost the rare value: its own keys, gates and writes, read off a run and attributed."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from jaxtyping import Float
from torch import nn

import tsgdn.mixers  # noqa: F401  # the modules that are looked up by name below
from tsgdn.data.retention import RARE_PROBE, block, tokens
from tsgdn.evaluation.retention import attribute, combine_heads, write_coefficients

LINEAR = ("gated_deltanet", "gated_linear", "deltanet", "kda", "gated_deltanet2", "mamba2", "mamba2_heads")
"""Mixers whose state is linear in its writes, by the recurrence that `evaluation.retention.mechanism` names."""
TASKS = ("T1", "T2", "T3", "T5")
_CALLERS = ("tsgdn.mixers.gated_deltanet", "tsgdn.mixers.kda", "tsgdn.kernels.ssd")


class Memory(NamedTuple):
    """What one layer's memory was given along B streams of T tokens, in float64.

    Attributes:
        k: keys that are written at.
        e: vectors along which the memory is read and corrected; zero without the delta rule.
        z: what is written.
        alpha: what is kept, per head (last axis 1) or per key channel.
        q: queries, scaled.
        strength: of the write, mean over value channels.
    """

    k: Float[np.ndarray, "B H T Dk"]
    e: Float[np.ndarray, "B H T Dk"]
    z: Float[np.ndarray, "B H T Dv"]
    alpha: Float[np.ndarray, "B H T Da"]
    q: Float[np.ndarray, "B H T Dk"]
    strength: Float[np.ndarray, "B H T"]


@contextmanager
def recorded() -> Iterator[list[Memory]]:
    """Keeps what every memory is given while models run: one entry per call, in the order of the layers."""
    calls: list[Memory] = []
    with ExitStack() as stack:
        for where in _CALLERS:
            stack.enter_context(patch.object(sys.modules[where], "gated_delta_rule", _keeping(calls, where)))
        yield calls


def _keeping(calls: list[Memory], where: str) -> Any:
    call = sys.modules[where].gated_delta_rule

    def keep(q: Any, k: Any, v: Any, **more: Any) -> Any:
        calls.append(_memory(q, k, v, **more))
        return call(q, k, v, **more)

    return keep


def _memory(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    log_decay: torch.Tensor,
    beta: torch.Tensor,
    erase: torch.Tensor | None = None,
    delta: bool = True,
    norm: bool = False,
    scale: float = 1.0,
    **_: Any,
) -> Memory:
    q, k, v, log_decay, beta = (x.detach().double() for x in (q, k, v, log_decay, beta))
    if norm:
        q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    each = v.shape[2] // k.shape[2]
    q, k = (x.repeat_interleave(each, 2) for x in (q * scale, k))
    beta = beta if beta.dim() == 4 else beta[..., None]
    by = beta if erase is None else erase.detach().double().reshape(*erase.shape[:3], -1)
    e = by * k if delta else torch.zeros_like(k)
    alpha = log_decay.exp() if log_decay.dim() == 4 else log_decay.exp()[..., None]
    found = (k, e, beta * v, alpha, q, beta.mean(-1, keepdim=True))
    arrays = [x.transpose(1, 2).cpu().numpy() for x in found]
    arrays[-1] = arrays[-1][..., 0]
    return Memory._make(arrays)


def probe(
    model: nn.Module, task: str, axes: dict[str, Any], *, gap: int = 512, sequences: int = 4, seed: int = 0
) -> dict[str, float]:
    """What became of the rare value's writes, on a few test streams of one gap.

    Returns:
        By layer: `survived` (of what the first rare probe's query would have read right after the exposure; heads
        weighted by the norm of their reads), its parts `decay_loss` and `erase_overlap` in natural logs, `kept` (the
        decay's product over the gap, mean over heads and channels), `key_cosine` (of rare keys with common ones, mean
        absolute value) and `write_strength` at the exposure. Without a layer: those of the layer that kept most.
    """
    batch = block(task, index=0, seed=seed, split="test", batch=sequences, gap=gap, **axes)
    with recorded() as calls, torch.no_grad():
        model(torch.from_numpy(tokens(batch).inputs))
    out: dict[str, float] = {}
    layers = [_of_layer(memory, batch) for memory in calls]
    for number, layer in enumerate(layers, 1):
        out |= {f"{name}_{number}": value for name, value in layer.items()}
    best = max(layers, key=lambda layer: layer["survived"])
    return out | {name: best[name] for name in ("survived", "decay_loss", "erase_overlap")}


def _of_layer(memory: Memory, batch: Any) -> dict[str, float]:
    opening, common = batch.meta["preamble"], batch.meta["common"]
    found: dict[str, list[float]] = {}
    for b in range(len(batch.values)):
        end = int(np.flatnonzero(batch.kind[b] == RARE_PROBE)[0])  # the token before the probe asks for it
        rare = batch.regime[b, end]
        exposure = np.zeros(end, bool)
        exposure[:opening] = batch.regime[b, :opening] == rare
        k, e, z, alpha, q, strength = (x[b, :, :end] for x in memory)
        parts = attribute(k, e, z, alpha, q[:, -1], exposure)
        read = np.einsum("ht,htv->hv", write_coefficients(k, e, alpha, q[:, -1]), z)
        weight = np.linalg.norm(read, axis=-1) + 1e-12
        told = {
            "survived": float(combine_heads(parts.survived, weight)),
            "decay_loss": float(combine_heads(parts.decay_loss, weight)),
            "erase_overlap": float(combine_heads(parts.erase_overlap, weight)),
            "kept": float(np.exp(np.log(np.maximum(alpha[:, opening:], 1e-300)).sum(1)).mean()),
            "write_strength": float(strength[:, exposure].mean()),
        }
        others = ~exposure[:opening] & (batch.regime[b, :opening] < common) if common else np.zeros(opening, bool)
        if others.any():
            unit = k[:, :opening] / np.maximum(np.linalg.norm(k[:, :opening], axis=-1, keepdims=True), 1e-12)
            cosine = np.einsum("htk,hsk->hts", unit[:, exposure[:opening]], unit[:, others])
            told["key_cosine"] = float(np.abs(cosine).mean())
        for name, value in told.items():
            found.setdefault(name, []).append(value)
    return {name: float(np.mean(values)) for name, values in found.items()}
