"""Task T9: laws of motion that recur in a Markov chain; T9b: a phase that must be tracked while nothing is seen."""

import numpy as np

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
)

_VALUES, _CODES, _ORDER, _SEGMENTS, _CHOICES, _NOISE, _CUE_NOISE, _START = range(8)


def switching_var(
    streams: Streams,
    *,
    batch: int,
    gap: int = 8192,
    channels: int = 4,
    common: int = 4,
    cue: str = "clean",
    mixed: bool = False,
    cue_width: int = 16,
    similarity: int | float = 0,
) -> RegimeBatch:
    """T9, a recurring Markov-switching VAR: y_t = 0.9 Q_r y_{t-1} + N(0, I), Q_r Haar orthogonal per sequence.

    Dwell floor(16 (1 + Pareto(1.5))), at most 512; the next regime by weights 1 (common) and 0.04 (rare, the last
    index), no move to itself; the first one by the same weights. Gaps are what the chain makes them; `reentries` lists
    them. Kinds: 2 for the first 8 steps of a re-entry of the rare regime, 1 for the first step of that of a common one,
    4 for the first step of a first visit.

    Args:
        streams: the randomness.
        batch: B.
        gap: T here, the length of the stream.
        channels: C.
        common: number of common regimes.
        cue: `clean` (sc 0.05), `noisy` (sc 0.5) or `none` (width 0).
        mixed: transitions are gradual: around a switch at t0 the new regime weighs 1 / (1 + exp(-4 (t - t0) / 64)),
            before t0 too; of two switches the nearer counts.
        cue_width: dc.
        similarity: kap.

    Returns:
        The batch; truth: codes (B, M+1, dc), rotation (B, M+1, C, C).

    Raises:
        ValueError: a count is out of range, or the cue is unknown.
    """
    parameters = {k: v for k, v in locals().items() if k not in ("streams", "batch")}
    if batch < 1 or gap < 1 or channels < 1 or common < 2:
        raise ValueError(f"batch {batch}, gap {gap}, channels {channels}, common {common}: at least 1, 1, 1 and 2")
    scales = {"clean": 0.05, "noisy": 0.5, "none": 0.0}
    if cue not in scales:
        raise ValueError(f"cue {cue!r} is not known; use one of {', '.join(scales)}")
    B, T, C, M = batch, gap, channels, common
    codes = draw_codes(streams(_CODES), batch=B, count=M + 1, width=cue_width, similarity=similarity).astype(np.float32)
    q, r = np.linalg.qr(streams(_VALUES).standard_normal((B, M + 1, C, C)))
    rotation = q * np.sign(np.diagonal(r, axis1=-2, axis2=-1))[..., None, :]  # signs make QR's Q Haar

    dwell = np.minimum(512, np.floor(16 * (1 + streams(_SEGMENTS).pareto(1.5, (B, T // 16 + 1))))).astype(np.int64)
    starts = np.cumsum(dwell, 1) - dwell
    starts = starts[:, : int((starts < T).sum(1).max())]
    draw, weights = streams(_CHOICES).random(starts.shape), np.append(np.ones(M), 0.04)
    chosen, previous = np.zeros_like(starts), np.full(B, -1)
    for s in range(starts.shape[1]):
        previous = chosen[:, s] = another(draw[:, s], previous, weights)
    flag = np.zeros((B, T), np.int64)
    rows, number = np.nonzero(starts < T)
    flag[rows, starts[rows, number]] = 1
    which = np.cumsum(flag, 1) - 1
    regime = np.take_along_axis(chosen, which, 1)

    row = np.arange(B)
    law = (0.9 * rotation).astype(np.float32)
    time = np.arange(T)
    since = time - np.take_along_axis(starts, which, 1)
    ends = np.concatenate([starts[:, 1:], np.full((B, 1), 10 * T)], 1)
    until = np.take_along_axis(np.where(ends < T, ends, 10 * T), which, 1) - time
    before = np.take_along_axis(chosen, np.maximum(which - 1, 0), 1)
    after = np.take_along_axis(chosen, np.minimum(which + 1, chosen.shape[1] - 1), 1)
    recent = (since < until) & (which > 0)
    own = np.where(recent, since, until)
    own = (1 / (1 + np.exp(-np.minimum(own, 600) / 16))).astype(np.float32)
    other = np.where(recent, before, after)
    shock = streams(_NOISE).standard_normal((T, B, C), np.float32)
    values, mean = np.empty((T, B, C), np.float32), np.empty((T, B, C), np.float32)
    y = streams(_START).standard_normal((B, C), np.float32) / np.float32(np.sqrt(1 - 0.81))
    for t in range(T):
        now = law[row, regime[:, t]]
        if mixed:
            w = own[:, t, None, None]
            now = w * now + (1 - w) * law[row, other[:, t]]
        mean[t] = (now @ y[..., None])[..., 0]
        y = values[t] = mean[t] + shock[t]

    met = np.zeros((B, T), bool)
    for k in range(M + 1):
        seen = np.cumsum(regime == k, 1)
        met |= (regime == k) & (seen > since + 1)
    kind = np.where(since == 0, np.where(met, REENTRY, OTHER), WITHIN)
    kind = np.where(met & (regime == M) & (since < 8), RARE_PROBE, kind)
    width = 0 if cue == "none" else cue_width
    shown = noisy(streams(_CUE_NOISE), codes[row[:, None], regime], scales[cue] / cue_width**0.5)[..., :width]
    return RegimeBatch(
        values=np.ascontiguousarray(values.swapaxes(0, 1)),
        observed=np.ones((B, T, C), bool),
        cue=np.ascontiguousarray(shown),
        action=np.zeros((B, T, 0), np.float32),
        mean=np.ascontiguousarray(mean.swapaxes(0, 1)),
        regime=regime.astype(np.int16),
        version=np.zeros((B, T), np.int8),
        kind=kind.astype(np.int8),
        elapsed=np.ones((B, T), np.float32),
        truth={"codes": codes, "rotation": rotation.astype(np.float32)},
        meta=parameters | {"task": "T9", "load": M + 1, "rare": 1, "preamble": 0},
    )


def reentries(batch: RegimeBatch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Re-entries of the rare regime of a T9 batch.

    Returns:
        Row, first step, and gap (steps since the regime was left) of each.
    """
    rare = batch.regime == batch.meta["common"]
    rows, steps, gaps = [], [], []
    for row in range(len(rare)):
        edge = np.diff(rare[row].astype(np.int8), prepend=0)
        enter, leave = np.flatnonzero(edge == 1), np.flatnonzero(edge == -1)
        count = max(0, len(enter) - 1)
        rows += [row] * count
        steps += enter[1:].tolist()
        gaps += (enter[1:] - leave[:count]).tolist()
    return np.array(rows, int), np.array(steps, int), np.array(gaps, int)


def hidden_phase(
    streams: Streams,
    *,
    batch: int,
    gap: int,
    phases: int = 2,
    channels: int = 4,
    noise: int | float = 0.2,
) -> RegimeBatch:
    """T9b: n values that follow each other in a circle; the phase must be tracked through pulses while all is hidden.

    Preamble: 16 steps per phase, visible, in random order, each change told by a pulse. Gap: everything is hidden, and
    with odds 1/16 per step a pulse shifts the phase by k in 1..n-1 (uniform), modulo n. A pulse at t acts at t. The
    last step is the probe (kind 2); the hidden steps before it ask the same at shorter gaps (kind 3), without which the
    task gives one learning signal per stream. `regime` is 0, `version` the phase, `action` one-hot k (width n - 1).

    A forecaster that keeps the values but does not track reaches Ret = 1/n (their mean).

    Args:
        streams: the randomness.
        batch: B.
        gap: hidden steps, at least 1, the probe included.
        phases: n, at least 2.
        channels: C.
        noise: sv.

    Returns:
        The batch; truth: theta (B, n, C).

    Raises:
        ValueError: a count is out of range.
    """
    parameters = {k: v for k, v in locals().items() if k not in ("streams", "batch")}
    if batch < 1 or gap < 1 or phases < 2 or channels < 1:
        raise ValueError(f"batch {batch}, gap {gap}, phases {phases}, channels {channels}: at least 1, 1, 2 and 1")
    B, n, opening = batch, phases, 16 * phases
    T = opening + gap
    theta = streams(_VALUES).standard_normal((B, n, channels), np.float32)
    order = np.argsort(streams(_ORDER).random((B, n)), 1)
    rng = streams(_CHOICES)
    shift = np.zeros((B, T), np.int64)
    shift[:, opening:] = np.where(rng.random((B, gap)) < 1 / 16, rng.integers(1, n, (B, gap)), 0)
    shift[:, 16:opening:16] = np.diff(order, axis=1) % n
    phase = (order[:, :1] + np.cumsum(shift, 1)) % n
    mean = np.take_along_axis(theta, phase[..., None], 1)
    kind = np.zeros((B, T), np.int8)
    kind[:, :opening:16] = OTHER
    kind[:, opening:] = COMMON_PROBE
    kind[:, -1] = RARE_PROBE
    return RegimeBatch(
        values=noisy(streams(_NOISE), mean, noise),
        observed=np.tile((np.arange(T) < opening)[None, :, None], (B, 1, channels)),
        cue=np.zeros((B, T, 0), np.float32),
        action=(shift[..., None] == np.arange(1, n)).astype(np.float32),
        mean=mean,
        regime=np.zeros((B, T), np.int16),
        version=phase.astype(np.int8),
        kind=kind,
        elapsed=np.ones((B, T), np.float32),
        truth={"theta": theta},
        meta=parameters | {"task": "T9b", "load": n, "common": 0, "rare": n, "preamble": opening},
    )
