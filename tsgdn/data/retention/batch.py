"""What a retention task hands out: a batch of streams, the tokens made of it, and where its randomness comes from."""

import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32, Int8, Int16

SUITE_VERSION = 1
"""Part of every seed: a change of any generator's output raises it."""
TRAIN_GAPS = (16, 32, 64, 128, 256, 512, 1024)
TEST_GAPS = (32, 128, 512, 2048, 8192)
SPLITS = ("train", "validation", "test")
WITHIN, REENTRY, RARE_PROBE, COMMON_PROBE, OTHER = range(5)
"""The values of `RegimeBatch.kind`."""


class RegimeBatch(NamedTuple):
    """B streams of one task, of one length T and one gap.

    Attributes:
        values: y_t; on hidden steps the target, which no token contains.
        observed: False where a value is hidden.
        cue: c_t, a noisy code of the regime; width 0 where a task has none.
        action: u_t; width 0 where a task has none.
        mean: mu_t, what the best forecaster would say that knows the regime's parameters and the visible past.
        regime: the regime that is active, common ones first; per channel in T6, hence (B, T, C) there.
        version: how often the regime's value has been revised (T5; the phase in T9b); shaped like `regime`.
        kind: 0 within a segment, 1 re-entry (first visible step of a segment whose value was seen before), 2 probe of a
            rare regime, 3 probe of a common one, 4 other (a first meeting, a blank); shaped like `regime`.
        elapsed: time since the step before; 1 except for events (T2e).
        truth: what generated the stream, by name (codes, theta, effects, topology, ...), for oracles and scores only.
        meta: task, gap, load (number of regimes that must be kept), common, rare, and every parameter of the draw.
    """

    values: Float32[np.ndarray, "B T C"]
    observed: Bool[np.ndarray, "B T C"]
    cue: Float32[np.ndarray, "B T dc"]
    action: Float32[np.ndarray, "B T du"]
    mean: Float32[np.ndarray, "B T C"]
    regime: Int16[np.ndarray, "B T *C"]
    version: Int8[np.ndarray, "B T *C"]
    kind: Int8[np.ndarray, "B T *C"]
    elapsed: Float32[np.ndarray, "B T"]
    truth: Mapping[str, np.ndarray]
    meta: Mapping[str, Any]


class Tokens(NamedTuple):
    """Inputs and targets of training; token t forecasts step t + 1, so N = T - 1.

    Attributes:
        inputs: [y_t m_t; m_t; c_t; c_{t+1}; u_t; u_{t+1}], for events also elapsed_t.
        targets: y_{t+1}, hidden or not.
        weight: the loss is sum(weight * (forecast - target)^2) over the batch; it contains every mean and factor.
        gap: silence before the token, elapsed_t - 1 (zero except for events), as mixers take it.
    """

    inputs: Float32[np.ndarray, "B N F"]
    targets: Float32[np.ndarray, "B N C"]
    weight: Float32[np.ndarray, "B N C"]
    gap: Float32[np.ndarray, "B N"]


class Streams:
    """The random streams of one block, one per purpose, so that twins which differ in one thing share all others.

    Philox counts; SeedSequence([suite version, seed, task, split, block]) with the purpose as its spawn key. A block
    depends on nothing else: neither on workers nor on the blocks before it.
    """

    def __init__(self, *, task: int, seed: int = 0, split: str = "train", block: int = 0) -> None:
        if split not in SPLITS:
            raise ValueError(f"split {split!r} is not known; use one of {', '.join(SPLITS)}")
        if min(task, seed, block) < 0:
            raise ValueError(f"task {task}, seed {seed} and block {block} must be at least 0")
        self.entropy = (SUITE_VERSION, seed, task, SPLITS.index(split), block)

    def __call__(self, purpose: int) -> np.random.Generator:
        """A fresh generator: the same purpose gives the same numbers again."""
        return np.random.Generator(np.random.Philox(np.random.SeedSequence(self.entropy, spawn_key=(purpose,))))


def tokens(batch: RegimeBatch) -> Tokens:
    """Tokens, targets and loss weights of a batch; a hidden value reaches the targets only."""
    shown = np.where(batch.observed, batch.values, np.float32(0))
    columns = [
        shown[:, :-1],
        batch.observed[:, :-1].astype(np.float32),
        batch.cue[:, :-1],
        batch.cue[:, 1:],
        batch.action[:, :-1],
        batch.action[:, 1:],
    ]
    if batch.meta.get("events"):
        columns.append(batch.elapsed[:, :-1, None])
    gap = batch.elapsed[:, :-1] - np.float32(1)
    return Tokens(np.concatenate(columns, -1), batch.values[:, 1:], loss_weight(batch)[:, 1:], gap)


def loss_weight(batch: RegimeBatch) -> Float32[np.ndarray, "B T C"]:
    """Weights of the squared errors: mean over rare probes + mean over common probes + mean over re-entries + 0.1 times
    the mean over visible steps, each mean over the batch and its channels; a term without members is left out.

    The first step weighs nothing, since no token forecasts it.
    """
    per_channel = batch.kind.ndim == 3
    kind = batch.kind if per_channel else batch.kind[..., None]
    forecast = np.arange(kind.shape[1])[:, None] > 0
    weight = np.zeros(batch.values.shape, np.float32)
    spread = 1 if per_channel else batch.values.shape[-1]
    for member in (RARE_PROBE, COMMON_PROBE, REENTRY):
        where = (kind == member) & forecast
        weight += where * np.float32(1 / max(1, int(where.sum()) * spread))
    where = batch.observed & forecast
    return weight + where * np.float32(0.1 / max(1, int(where.sum())))


def digest(batch: RegimeBatch) -> str:
    """SHA-256 of the arrays of a batch, names and shapes included."""
    total = hashlib.sha256()
    for name, array in arrays(batch).items():
        total.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        total.update(np.ascontiguousarray(array).tobytes())
    return total.hexdigest()


def arrays(batch: RegimeBatch) -> dict[str, np.ndarray]:
    """The arrays by name, those of `truth` as truth_NAME: what is written to disk."""
    plain = {name: getattr(batch, name) for name in batch._fields if name not in ("truth", "meta")}
    return plain | {f"truth_{name}": array for name, array in batch.truth.items()}


def unit(x: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """Vectors of length one, along the last axis."""
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def draw_codes(
    rng: np.random.Generator, *, batch: int, count: int, width: int, similarity: int | float
) -> Float[np.ndarray, "B count width"]:
    """Codes unit(sqrt(kap) unit(n_0) + sqrt(1 - kap) unit(n_r)), n ~ N(0, I): mean pairwise cosine kap = `similarity`.

    Raises:
        ValueError: the similarity is outside [0, 1].
    """
    if not 0 <= similarity <= 1:
        raise ValueError(f"similarity is {similarity}, expected a mean cosine in [0, 1]")
    shared = unit(rng.standard_normal((batch, 1, width)))
    own = unit(rng.standard_normal((batch, count, width)))
    return unit(np.sqrt(similarity) * shared + np.sqrt(1 - similarity) * own)


def noisy(rng: np.random.Generator, mean: Float32[np.ndarray, "*shape"], scale: int | float) -> np.ndarray:
    """`mean` plus normal noise of that standard deviation, in float32."""
    if scale == 0:
        return mean.copy()
    noise = rng.standard_normal(mean.shape, dtype=np.float32)
    noise *= np.float32(scale)
    noise += mean
    return noise


def segments(rng: np.random.Generator, *, batch: int, steps: int, mean: int | float) -> tuple[np.ndarray, np.ndarray]:
    """Cuts `steps` into segments of geometric length, the last one cut short at the end.

    Returns:
        Start of each segment (B, S), `steps` or more where a row has no more of them; and for each step (B, steps) the
        number of the segment it lies in.
    """
    if steps == 0:
        return np.zeros((batch, 0), np.int64), np.zeros((batch, 0), np.int64)
    expected = steps / mean
    lengths = rng.geometric(1 / mean, (batch, int(expected + 6 * expected**0.5 + 8)))
    while lengths.sum(1).min() < steps:
        lengths = np.concatenate([lengths, rng.geometric(1 / mean, lengths.shape)], 1)
    starts = np.cumsum(lengths, 1) - lengths
    starts = starts[:, : int((starts < steps).sum(1).max())]
    rows, which = np.nonzero(starts < steps)
    flag = np.zeros((batch, steps), np.int64)
    flag[rows, starts[rows, which]] = 1
    return starts, np.cumsum(flag, 1) - 1


def another(u: np.ndarray, previous: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """A choice by `weights` among all but `previous` (-1: among all), from uniform draws `u`; vectorised over rows."""
    cumulative = np.cumsum(weights) / np.sum(weights)
    share = np.append(weights / np.sum(weights), 0.0)[previous]
    below = np.append(cumulative, 1.0)[previous] - share
    place = u * (1 - share)
    place = np.where(place >= below, place + share, place)
    return np.minimum(np.searchsorted(cumulative, place, side="right"), len(weights) - 1)
