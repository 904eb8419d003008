"""Task T6: many channels write into one memory at once, each under cues of its own that may resemble the others'."""

import numpy as np

from tsgdn.data.retention.batch import (
    COMMON_PROBE,
    OTHER,
    RARE_PROBE,
    REENTRY,
    WITHIN,
    RegimeBatch,
    Streams,
    noisy,
    unit,
)

COMMON, VISIT, SWITCH = 4, 4, 1 / 8
"""Common regimes per channel (and one rare), steps per visit of the preamble, odds of a switch per step of the gap."""
_VALUES, _CODES, _ORDER, _SWITCHES, _NOISE, _CUE_NOISE = range(6)


def crossed_channels(
    streams: Streams,
    *,
    batch: int,
    gap: int,
    channels: int = 8,
    similarity: int | float = 0.3,
    coincidence: int | float = 0.25,
    cue_width: int = 8,
    cue_noise: int | float = 0.05,
    noise: int | float = 0.2,
) -> RegimeBatch:
    """T6: every channel has four common regimes and a rare one, and its own block of the cue.

    Codes unit(sqrt(kx) base_r + sqrt(1 - kx) n_ir): the same unit vector base_r in all channels i, n_ir its own one.
    Preamble: all channels visit their five regimes at once, four steps each, in an order of their own, the rare one not
    last. Gap: the first min(4, C/2) channels, the targets, stay parked where they ended; in each step with odds 1/8 a
    switch moves one other channel to another of its common regimes, or, with odds `coincidence`, min(4, their number)
    of them at once. Probe: one hidden step where all targets jump to their rare regime (kind 2) and the others stay
    where they are (kind 3).

    `regime`, `version` and `kind` are (B, T, C). Regime 4 is the rare one.

    Args:
        streams: the randomness.
        batch: B.
        gap: steps between preamble and probe.
        channels: C, at least 2.
        similarity: kx, between channels.
        coincidence: p.
        cue_width: dc of one channel; the cue has C blocks of it.
        cue_noise: sc, per block.
        noise: sv.

    Returns:
        The batch; truth: codes (B, C, 5, dc), theta (B, C, 5), parked (B, C): each channel's regime before the probe.

    Raises:
        ValueError: fewer than two channels, or a share outside [0, 1].
    """
    parameters = {k: v for k, v in locals().items() if k not in ("streams", "batch")}
    if channels < 2 or batch < 1 or gap < 0:
        raise ValueError(f"batch {batch}, gap {gap}, channels {channels}: expected at least 1, 0 and 2")
    for name, share in (("similarity", similarity), ("coincidence", coincidence)):
        if not 0 <= share <= 1:
            raise ValueError(f"{name} is {share}, expected a share in [0, 1]")
    B, C, regimes = batch, channels, COMMON + 1
    targets = min(4, C // 2)
    rest = C - targets
    rng = streams(_CODES)
    base, own = (unit(rng.standard_normal((B, n, regimes, cue_width))) for n in (1, C))
    codes = unit(np.sqrt(similarity) * base + np.sqrt(1 - similarity) * own).astype(np.float32)
    theta = streams(_VALUES).standard_normal((B, C, regimes), np.float32)

    key = streams(_ORDER).random((B, C, regimes))
    key[..., COMMON] *= key[..., :COMMON].max(-1)  # before the last of the common ones, at a random place
    order = np.argsort(key, -1)
    opening = regimes * VISIT
    T = opening + gap + 1

    rng = streams(_SWITCHES)
    happens = rng.random((B, gap)) < SWITCH
    several = rng.random((B, gap)) < coincidence
    rank = np.argsort(np.argsort(rng.random((int(happens.sum()), rest)), -1), -1)
    hit = np.zeros((B, gap, rest), bool)
    hit[happens] = rank < np.where(several[happens], min(4, rest), 1)[:, None]
    # To another regime, each as likely: one to three places ahead, modulo four.
    ahead = np.zeros(hit.shape, np.int64)
    ahead[hit] = rng.integers(1, COMMON, int(hit.sum()))
    path = np.tile(order[:, None, :, -1], (1, gap, 1))
    path[..., targets:] = (path[..., targets:] + np.cumsum(ahead, 1)) % COMMON
    parked = path[:, -1] if gap else order[..., -1]
    probe = parked.copy()
    probe[:, :targets] = COMMON
    regime = np.concatenate([np.repeat(order.swapaxes(1, 2), VISIT, 1), path, probe[:, None]], 1)

    kind = np.full((B, T, C), WITHIN, np.int8)
    kind[:, :opening:VISIT] = OTHER
    kind[:, opening : opening + gap, targets:][hit] = REENTRY
    kind[:, -1, :targets] = RARE_PROBE
    kind[:, -1, targets:] = COMMON_PROBE
    observed = np.ones((B, T, C), bool)
    observed[:, -1] = False
    place = (np.arange(B)[:, None, None] * C + np.arange(C)) * regimes + regime
    mean = theta.take(place)
    cue = codes.reshape(-1, cue_width).take(place, axis=0).reshape(B, T, C * cue_width)
    return RegimeBatch(
        values=noisy(streams(_NOISE), mean, noise),
        observed=observed,
        cue=noisy(streams(_CUE_NOISE), cue, cue_noise / cue_width**0.5),
        action=np.zeros((B, T, 0), np.float32),
        mean=mean,
        regime=regime.astype(np.int16),
        version=np.zeros((B, T, C), np.int8),
        kind=kind,
        elapsed=np.ones((B, T), np.float32),
        truth={"codes": codes, "theta": theta, "parked": parked},
        meta=parameters
        | {"task": "T6", "load": C * regimes, "common": COMMON, "rare": 1, "targets": targets, "preamble": opening},
    )


def split_channels(batch: RegimeBatch) -> RegimeBatch:
    """The channel-independent twin of a T6 batch: C rows of one channel for each, in the order row * C + channel."""
    B, T, C = batch.values.shape

    def rows(x: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(np.moveaxis(x.reshape(B, T, C, -1), 2, 1).reshape(B * C, T, -1))

    return batch._replace(
        **{name: rows(getattr(batch, name)) for name in ("values", "observed", "mean", "regime", "version", "kind")},
        cue=rows(batch.cue),
        action=np.zeros((B * C, T, 0), np.float32),
        elapsed=np.repeat(batch.elapsed, C, 0),
        truth={name: x.reshape(B * C, 1, *x.shape[2:]) for name, x in batch.truth.items()},
        meta=dict(batch.meta) | {"channels": 1, "load": COMMON + 1, "rows_per_sequence": C},
    )
