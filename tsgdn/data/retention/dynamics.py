"""Tasks T7 and T8: what must be kept is the effect of an action, or which channel drives which."""

import numpy as np
from scipy.signal import lfilter

from tsgdn.data.retention.batch import (
    COMMON_PROBE,
    OTHER,
    RARE_PROBE,
    REENTRY,
    WITHIN,
    RegimeBatch,
    Streams,
    another,
    draw_codes,
    noisy,
    segments,
)

DRIFT = 0.02
"""T7: standard deviation of the drift of common effects per step."""
IMPULSE = 3.0
"""T8: size of the probe's impulse."""
_VALUES, _CODES, _ORDER, _SEGMENTS, _CHOICES, _PROBES, _NOISE, _CUE_NOISE, _DRIFT, _START = range(10)


def action_effects(
    streams: Streams,
    *,
    batch: int,
    gap: int,
    channels: int = 4,
    actions: int = 6,
    lag: int = 4,
    do: str | int = "random",
    code_width: int = 8,
    similarity: int | float = 0,
    noise: int | float = 0.3,
) -> RegimeBatch:
    """T7: y_t = 0.5 y_{t-1} + b_{u(t - lag)} + noise; the effect of an action used four times, long ago, is asked for.

    Common actions occur with odds 1/4 per step, uniformly, and their effects drift:
    b <- sqrt(1 - 0.02^2) b + 0.02 N(0, I). The rare action (the last index) is used at 4 random steps of the first 64
    and never after, its effect is fixed. After the gap comes the branch: at step 64 + gap (visible) one action or none,
    then `lag` hidden steps without action, the last of which is the probe. The branches of one stream differ in nothing
    else: draw the block again with another `do`. The effect of a step's action is that of the step it was taken at.

    Kinds: the probe of do(rare) is 2, that of any other branch 3; hidden steps before it are 4. `regime` is the action
    (-1 none), `action` its code.

    Args:
        streams: the randomness.
        batch: B.
        gap: steps between the preamble of 64 steps and the branch.
        channels: C.
        actions: A, at least 2.
        lag: steps from an action to its effect.
        do: `rare`, `none`, `random` (one of the two, per row: training), or the index of an action.
        code_width: du.
        similarity: kap, mean cosine between the actions' codes.
        noise: sv.

    Returns:
        The batch; truth: codes (B, A, du), effects (B, A, C) as they are at the branch, at_use (B, T, C): the effect of
        the action of each step (0 without), branch (B,): the action that was done, -1 none.

    Raises:
        ValueError: a count is out of range, or `do` names no branch.
    """
    parameters = {k: v for k, v in locals().items() if k not in ("streams", "batch")}
    if batch < 1 or gap < 0 or lag < 1 or channels < 1 or actions < 2:
        raise ValueError(
            f"batch {batch}, gap {gap}, lag {lag}, channels {channels}, actions {actions}: at least 1, 0, 1, 1 and 2"
        )
    rare = actions - 1
    if not (do in ("rare", "none", "random") or (isinstance(do, int) and 0 <= do < actions)):
        raise ValueError(f"do is {do!r}; use 'rare', 'none', 'random' or an action below {actions}")
    B, C, opening = batch, channels, 64
    at = opening + gap
    T = at + lag + 1
    codes = draw_codes(streams(_CODES), batch=B, count=actions, width=code_width, similarity=similarity)
    rng = streams(_CHOICES)
    which = np.where(rng.random((B, T)) < 0.25, rng.integers(0, rare, (B, T)), -1)
    row = np.arange(B)
    which[row[:, None], np.argsort(streams(_ORDER).random((B, opening)), 1)[:, :4]] = rare
    which[:, at:] = -1
    if do == "random":
        which[:, at] = np.where(streams(_PROBES).random(B) < 0.5, rare, -1)
    elif do != "none":
        which[:, at] = rare if do == "rare" else do

    effects = streams(_VALUES).standard_normal((B, 1, actions, C), np.float32)
    steps = streams(_DRIFT).standard_normal((B, T - 1, rare, C), np.float32) * np.float32(DRIFT)
    keep = np.sqrt(1 - DRIFT**2)
    drifting = _recursive(np.concatenate([effects[:, :, :rare], steps], 1), keep)
    path = np.concatenate([drifting, np.repeat(effects[:, :, rare:], T, 1)], 2)
    used = np.take_along_axis(path, np.maximum(which, 0)[:, :, None, None], 2)[:, :, 0]
    used = np.where((which >= 0)[..., None], used, 0.0)

    push = np.zeros((B, T, C))
    push[:, lag:] = used[:, :-lag]
    shock = noise * streams(_NOISE).standard_normal((B, T, C))
    values = _recursive(push + shock, 0.5)
    observed = np.arange(T) <= at
    mean = values - shock
    for t in range(at + 1, T):  # hidden: the best forecast knows the values up to the branch only
        mean[:, t] = 0.5 * (values[:, at] if t == at + 1 else mean[:, t - 1]) + push[:, t]
    kind = np.zeros((B, T), np.int8)
    kind[:, 0] = kind[:, at + 1 :] = OTHER
    kind[:, -1] = np.where(which[:, at] == rare, RARE_PROBE, COMMON_PROBE)
    return RegimeBatch(
        values=values.astype(np.float32),
        observed=np.tile(observed[None, :, None], (B, 1, C)),
        cue=np.zeros((B, T, 0), np.float32),
        action=np.where((which >= 0)[..., None], codes[row[:, None], which], 0.0).astype(np.float32),
        mean=mean.astype(np.float32),
        regime=which.astype(np.int16),
        version=np.zeros((B, T), np.int8),
        kind=kind,
        elapsed=np.ones((B, T), np.float32),
        truth={
            "codes": codes.astype(np.float32),
            "effects": path[:, at].astype(np.float32),
            "at_use": used.astype(np.float32),
            "branch": which[:, at],
        },
        meta=parameters
        | {"task": "T7", "load": actions, "common": rare, "rare": 1, "preamble": opening, "branch_step": at},
    )


def bound_topologies(
    streams: Streams,
    *,
    batch: int,
    gap: int,
    channels: int = 8,
    common: int = 4,
    shared_edges: int | float = 0,
    impulse: int | None = None,
    cue_width: int = 16,
    similarity: int | float = 0,
    cue_noise: int | float = 0.05,
) -> RegimeBatch:
    """T8: y_t = 0.9 P_r y_{t-1} + N(0, I), P_r a random cycle through all channels; which one is bound to which cue?

    All topologies share marginals and spectra. The rare one (the last index) rules the first 64 steps, then each common
    one 32; in the gap segments are geometric with mean 32, the next topology uniform among the other common ones. Then
    the cue turns to rare: at one visible step y = 3 e_i is put in, and the hidden step after it is the probe.

    Args:
        streams: the randomness.
        batch: B.
        gap: steps between the preamble and the impulse.
        channels: C, at least 3.
        common: number of common topologies, at least 2.
        shared_edges: share of the C edges that all topologies of a sequence have in common, below 1.
        impulse: the channel i; None draws one per row (training). The forks of one stream differ in nothing else.
        cue_width: dc.
        similarity: kap.
        cue_noise: sc.

    Returns:
        The batch; truth: codes (B, M+1, dc), topology (B, M+1, C, C) with P[j, i] = 1 where i drives j, impulse (B,).

    Raises:
        ValueError: a count or a share is out of range.
    """
    parameters = {k: v for k, v in locals().items() if k not in ("streams", "batch")}
    if batch < 1 or gap < 0 or channels < 3 or common < 2:
        raise ValueError(f"batch {batch}, gap {gap}, channels {channels}, common {common}: at least 1, 0, 3 and 2")
    if not 0 <= shared_edges < 1:
        raise ValueError(f"shared_edges is {shared_edges}, expected a share of at least 0 and below 1")
    if impulse is not None and not 0 <= impulse < channels:
        raise ValueError(f"impulse is {impulse}, expected a channel below {channels}")
    B, C, M, opening = batch, channels, common, 64 + 32 * common
    codes = draw_codes(streams(_CODES), batch=B, count=M + 1, width=cue_width, similarity=similarity).astype(np.float32)
    driver = _cycles(streams(_VALUES), B, M + 1, C, int(shared_edges * C))

    starts, which = segments(streams(_SEGMENTS), batch=B, steps=gap, mean=32)
    draw, weights = streams(_CHOICES).random(starts.shape), np.ones(M)
    chosen, previous = np.zeros(starts.shape, np.int64), np.full(B, M - 1)
    for s in range(starts.shape[1]):
        previous = chosen[:, s] = another(draw[:, s], previous, weights)
    order = np.concatenate([np.full(64, M), np.repeat(np.arange(M), 32)])
    regime = np.concatenate([np.tile(order, (B, 1)), np.take_along_axis(chosen, which, 1), np.full((B, 2), M)], 1)
    T = opening + gap + 2

    struck = streams(_PROBES).integers(0, C, B) if impulse is None else np.full(B, impulse)
    shock = streams(_NOISE).standard_normal((T, B, C), np.float32)
    values, mean = np.empty((T, B, C), np.float32), np.empty((T, B, C), np.float32)
    row = np.arange(B)
    source = driver[row[:, None], regime].swapaxes(0, 1)
    y = streams(_START).standard_normal((B, C), np.float32) / np.float32(np.sqrt(1 - 0.81))
    for t in range(T):
        mean[t] = np.float32(0.9) * np.take_along_axis(y, source[t], 1)
        y = mean[t] + shock[t]
        if t == T - 2:
            y = np.zeros((B, C), np.float32)
            y[row, struck] = IMPULSE
        values[t] = y
    mean[-2] = values[-2]
    kind = np.zeros((B, T), np.int8)
    change = regime[:, 1:] != regime[:, :-1]
    kind[:, 1:][change] = REENTRY
    kind[:, : opening + 1 : 32] = np.where(kind[:, : opening + 1 : 32] == REENTRY, OTHER, WITHIN)
    kind[:, opening : opening + gap][change[:, opening - 1 : opening - 1 + gap]] = REENTRY
    kind[:, 0] = kind[:, -2] = OTHER
    kind[:, -1] = RARE_PROBE
    observed = np.ones((B, T, C), bool)
    observed[:, -1] = False
    topology = (driver[..., None] == np.arange(C)).astype(np.float32)
    return RegimeBatch(
        values=np.ascontiguousarray(values.swapaxes(0, 1)),
        observed=observed,
        cue=noisy(streams(_CUE_NOISE), codes[row[:, None], regime], cue_noise / cue_width**0.5),
        action=np.zeros((B, T, 0), np.float32),
        mean=np.ascontiguousarray(mean.swapaxes(0, 1)),
        regime=regime.astype(np.int16),
        version=np.zeros((B, T), np.int8),
        kind=kind,
        elapsed=np.ones((B, T), np.float32),
        truth={"codes": codes, "topology": topology, "impulse": struck},
        meta=parameters | {"task": "T8", "load": M + 1, "rare": 1, "preamble": opening},
    )


def _recursive(x: np.ndarray, keep: int | float) -> np.ndarray:
    """y_t = keep y_{t-1} + x_t along axis 1, from zero."""
    return np.asarray(lfilter([1.0], [1.0, -keep], x, axis=1))


def _cycles(rng: np.random.Generator, B: int, count: int, C: int, shared: int) -> np.ndarray:
    """Driver of each channel (B, count, C) in random cycles that have `shared` edges in common.

    The shared edges tie channels to chains; a cycle is then a random ring of the chains.
    """
    place = np.argsort(rng.random((B, C)), 1)  # names of the channels; chains are runs of consecutive places
    tied = np.zeros((B, C), bool)  # place p + 1 follows place p in every cycle
    tied[:, : C - 1] = np.argsort(np.argsort(rng.random((B, C - 1)), 1), 1) < shared
    chain = np.concatenate([np.zeros((B, 1), np.int64), np.cumsum(~tied[:, :-1], 1)], 1)
    key = rng.random((B, count, C))
    key = np.take_along_axis(key, np.broadcast_to(chain[:, None], (B, count, C)), 2) + np.arange(C) * 1e-12
    ring = np.take_along_axis(np.broadcast_to(place[:, None], (B, count, C)), np.argsort(key, -1), 2)
    driver = np.empty((B, count, C), np.int64)
    np.put_along_axis(driver, ring, np.roll(ring, 1, -1), 2)
    return driver
