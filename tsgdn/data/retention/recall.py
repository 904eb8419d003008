"""Tasks T1 to T5: a value is shown under a cue, other things follow, the cue comes back and the value is asked for."""

from typing import Any

import numpy as np

from tsgdn.data.retention.batch import (
    COMMON_PROBE,
    OTHER,
    RARE_PROBE,
    REENTRY,
    SUITE_VERSION,
    WITHIN,
    RegimeBatch,
    Streams,
    another,
    draw_codes,
    noisy,
    segments,
    unit,
)

CONTROLS = ("no_exposure", "new_cue", "shown", "fixed")
SEGMENT = 16
"""Mean length of a segment in the gap."""
_VALUES, _CODES, _ORDER, _SEGMENTS, _CHOICES, _PROBES, _NOISE, _CUE_NOISE, _TIMES, _DROPPED, _NEW_CUE = range(11)


def revisited_regimes(
    streams: Streams,
    *,
    batch: int,
    gap: int,
    task: str = "T3",
    channels: int = 16,
    common: int = 8,
    rare: int = 4,
    exposures: int = 1,
    visit: int = 4,
    cue_width: int = 16,
    similarity: int | float = 0,
    cue_noise: int | float = 0.05,
    noise: int | float = 0.2,
    revisions: int = 0,
    events: bool = False,
    control: str | None = None,
) -> RegimeBatch:
    """The frame of T2 (one channel), T2e (events), T3 (many channels) and T5 (`revisions` at least 1).

    Preamble: each common regime once, each rare one `exposures` times, `visit` steps each, in random order. Gap: just
    `gap` steps of common segments, regime by Zipf's law among the others, lengths geometric with mean 16. Probe
    block: hidden steps, each rare regime once and min(common, 4) distinct common ones, in random order.

    Revisions: when a segment of a common regime starts at gap time t and floor((revisions + 1) t / gap) exceeds the
    regime's version, it moves on one version with a fresh value. Common probes are then taken from the revised regimes
    first, from the others where too few were revised (`version` tells them apart).

    Events: the gap has gap/2 events whose spacings are 1 + Exp(1), given that they add up to `gap` (the law of
    exponential spacings given their sum is that of uniform spacings), so that a batch has one length and the gap is
    exact in time. The cue is there at the first step of a segment, at probes, and at half of the other steps.

    Args:
        streams: the randomness.
        batch: B.
        gap: steps between preamble and probes; time units for events, even then.
        task: its name, for `meta`.
        channels: C.
        common: M, none or at least 2.
        rare: R.
        exposures: E, visits of a rare regime.
        visit: L, steps per visit in the preamble.
        cue_width: dc.
        similarity: kap, mean cosine between codes.
        cue_noise: sc; each entry of a cue has standard deviation sc / sqrt(dc).
        noise: sv, standard deviation of the values about their mean.
        revisions: u.
        events: irregular time.
        control: `no_exposure` hides the rare visits; `new_cue` asks rare probes with cues never seen; `shown` lets each
            rare regime be seen again for `visit` steps right before the probes; `fixed` draws values and codes once
            for all sequences of all splits.

    Returns:
        The batch; truth: codes (B, M+R, dc), theta (B, M+R, revisions+1, C).

    Raises:
        ValueError: a count is out of range, or the control is unknown.
    """
    parameters = {k: v for k, v in locals().items() if k not in ("streams", "batch")}
    _check(batch, gap, common, rare, exposures, visit, channels, cue_width, revisions)
    if control is not None and control not in CONTROLS:
        raise ValueError(f"control {control!r} is not known; use one of {', '.join(CONTROLS)}")
    if events and gap % 2:
        raise ValueError(f"gap is {gap}, expected an even number: events are two time units apart on average")
    B, M, regimes = batch, common, common + rare
    source = Streams(task=0, split="train") if control == "fixed" else streams
    drawn = 1 if control == "fixed" else B
    codes = draw_codes(source(_CODES), batch=drawn, count=regimes, width=cue_width, similarity=similarity)
    theta = source(_VALUES).standard_normal((drawn, regimes, revisions + 1, channels))
    codes, theta = (np.broadcast_to(x, (B, *x.shape[1:])).astype(np.float32) for x in (codes, theta))

    visits = np.concatenate([np.arange(M), np.repeat(np.arange(M, regimes), exposures)])
    order = visits[np.argsort(streams(_ORDER).random((B, len(visits))), 1)]
    first = ~((order[:, :, None] == order[:, None, :]) & np.tri(len(visits), k=-1, dtype=bool)).any(-1)
    last = np.where(order[:, -1] < M, order[:, -1], -1)
    steps = gap // 2 if events else gap
    between, version_between, latest = _gap(streams, B, steps, M, revisions, last)

    asked = rare + min(M, 4)
    rng = streams(_PROBES)
    favour = rng.random((B, M)) + (latest == 0) * (revisions > 0)
    probed = np.concatenate([np.argsort(favour, 1)[:, : asked - rare], np.tile(np.arange(M, regimes), (B, 1))], 1)
    probed = np.take_along_axis(probed, np.argsort(rng.random((B, asked)), 1), 1)
    shown = np.tile(np.arange(M, regimes), (B, 1)) if control == "shown" else np.zeros((B, 0), np.int64)

    before = [np.repeat(order, visit, 1), between, np.repeat(shown, visit, 1)]
    regime = np.concatenate([*before, probed], 1)
    T = regime.shape[1]
    padded = np.concatenate([latest, np.zeros((B, rare), np.int64)], 1)
    version = np.zeros((B, T), np.int64)
    opening = order.shape[1] * visit
    version[:, opening : opening + steps] = version_between
    version[:, -asked:] = np.take_along_axis(padded, probed, 1)

    change = np.ones((B, T), bool)
    change[:, 1:] = (regime[:, 1:] != regime[:, :-1]) | (version[:, 1:] != version[:, :-1])
    fresh = np.zeros((B, T), bool)
    fresh[:, :opening] = np.repeat(first, visit, 1)
    was = np.zeros((B, T), np.int64)
    was[:, opening + 1 : opening + steps] = _version_before(regime, version, opening, steps, M)
    fresh[:, opening : opening + steps] = (version > was)[:, opening : opening + steps]
    kind = np.where(change, np.where(fresh, OTHER, REENTRY), WITHIN)
    observed = np.ones((B, T), bool)
    observed[:, -asked:] = False
    if control == "no_exposure":
        observed[:, :opening] = regime[:, :opening] < M
        kind[:, :opening][~observed[:, :opening]] = OTHER
    kind[:, -asked:] = np.where(probed < M, COMMON_PROBE, RARE_PROBE)

    row = np.arange(B)[:, None]
    place = row * regimes + regime  # flat places: several times faster than an index per axis
    mean = theta.reshape(-1, channels).take(place * (revisions + 1) + version, axis=0)
    clean = codes.reshape(-1, cue_width).take(place, axis=0)
    if control == "new_cue":
        new = draw_codes(streams(_NEW_CUE), batch=B, count=rare, width=cue_width, similarity=similarity)
        swap = np.concatenate([codes[:, :M], new.astype(np.float32)], 1)
        clean[:, -asked:] = swap[row, probed]
    cue = noisy(streams(_CUE_NOISE), clean, cue_noise / cue_width**0.5)
    elapsed = np.ones((B, T), np.float32)
    if events:
        rng = streams(_TIMES)
        elapsed += rng.standard_exponential((B, T), np.float32)
        inside = slice(opening, opening + steps)
        spacing = rng.dirichlet(np.ones(steps), B) * (gap - steps) if steps else np.zeros((B, 0))
        elapsed[:, inside] = 1 + spacing
        kept = change | ~observed | (streams(_DROPPED).random((B, T)) < 0.5)
        cue *= kept[..., None]
    return RegimeBatch(
        values=noisy(streams(_NOISE), mean, noise),
        observed=np.repeat(observed[..., None], channels, -1),
        cue=cue,
        action=np.zeros((B, T, 0), np.float32),
        mean=mean,
        regime=regime.astype(np.int16),
        version=version.astype(np.int8),
        kind=kind.astype(np.int8),
        elapsed=elapsed,
        truth={"codes": codes, "theta": theta},
        meta=parameters | {"load": regimes, "preamble": opening},
    )


def repeat_haystack(
    streams: Streams,
    *,
    batch: int,
    gap: int,
    channels: int = 1,
    visit: int = 8,
    period: int = 16,
    cue_width: int = 16,
    cue_noise: int | float = 0.05,
    noise: int | float = 0.2,
) -> RegimeBatch:
    """T1: one value for `visit` steps, then a background that is the same in every sequence, then one hidden question.

    The background repeats `period` fixed values of unit power and zero mean under one fixed cue, so that nothing of it
    needs to be written. Regime 0 is the rare one, regime 1 the background.

    Args:
        streams: the randomness.
        batch: B.
        gap: steps of background.
        channels: C; every channel has a background of its own.
        visit: L, steps of exposure.
        period: of the background.
        cue_width: dc.
        cue_noise: sc.
        noise: sv, on the background too.

    Returns:
        The batch; truth: codes (B, 2, dc), theta (B, 2, 1, C), where the background counts as zero.
    """
    parameters = {k: v for k, v in locals().items() if k not in ("streams", "batch")}
    _check(batch, gap, 0, 1, 1, visit, channels, cue_width, 0)
    B, T = batch, visit + gap + 1
    fixed = np.random.Generator(np.random.Philox(np.random.SeedSequence([SUITE_VERSION, 1])))
    ground = fixed.standard_normal((period, channels))
    ground = ground - ground.mean(0) if period > 1 else ground
    ground = (ground / np.sqrt(np.mean(ground**2, 0))).astype(np.float32)
    ground_cue = unit(fixed.standard_normal(cue_width))

    code = unit(streams(_CODES).standard_normal((B, cue_width)))
    codes = np.stack([code, np.broadcast_to(ground_cue, code.shape)], 1).astype(np.float32)
    theta = np.zeros((B, 2, 1, channels), np.float32)
    theta[:, 0, 0] = streams(_VALUES).standard_normal((B, channels))
    time = np.arange(T)
    regime = np.where((time < visit) | (time == T - 1), 0, 1)
    mean = np.where((regime == 0)[:, None], theta[:, :1, 0], ground[time % period][None])
    kind = np.full(T, WITHIN, np.int8)
    kind[[0, visit]] = OTHER
    kind[-1] = RARE_PROBE
    cue = noisy(streams(_CUE_NOISE), codes[:, regime], cue_noise / cue_width**0.5)
    observed = np.ones((B, T, channels), bool)
    observed[:, -1] = False
    return RegimeBatch(
        values=noisy(streams(_NOISE), mean, noise),
        observed=observed,
        cue=cue,
        action=np.zeros((B, T, 0), np.float32),
        mean=mean,
        regime=np.tile(regime.astype(np.int16), (B, 1)),
        version=np.zeros((B, T), np.int8),
        kind=np.tile(kind, (B, 1)),
        elapsed=np.ones((B, T), np.float32),
        truth={"codes": codes, "theta": theta},
        meta=parameters | {"task": "T1", "load": 1, "common": 0, "rare": 1, "preamble": visit},
    )


def numeric_recall(
    streams: Streams,
    *,
    batch: int,
    gap: int = 0,
    pairs: int = 8,
    channels: int = 16,
    power: int | float = 0.01,
    filler: bool = False,
    cue_width: int = 16,
    similarity: int | float = 0,
    cue_noise: int | float = 0.05,
    noise: int | float = 0.2,
) -> RegimeBatch:
    """T4, numeric multi-query recall: pairs (cue, value), one visible step each, then all are asked for.

    The query area has 4 * `pairs` slots; pair i takes one drawn without replacement with odds slot^(power - 1) (the
    power law of Zoology's MQAR). The other slots are blank: zero cue, hidden zero value, regime -1. All queries are of
    kind 2: no pair is seen twice. `gap` blank steps, none by default, lie between pairs and slots.

    Args:
        streams: the randomness.
        batch: B.
        gap: blank steps before the slots.
        pairs: M.
        channels: C.
        power: a.
        filler: the other slots carry a fresh cue and a visible value N(0, I) instead.
        cue_width: dc.
        similarity: kap.
        cue_noise: sc.
        noise: sv.

    Returns:
        The batch; truth: codes (B, M, dc), theta (B, M, 1, C), slot (B, M) counted from 0.
    """
    parameters = {k: v for k, v in locals().items() if k not in ("streams", "batch")}
    _check(batch, gap, 0, pairs, 1, 1, channels, cue_width, 0)
    B, M, slots = batch, pairs, 4 * pairs
    T, opening = M + gap + slots, M + gap
    codes = draw_codes(streams(_CODES), batch=B, count=M, width=cue_width, similarity=similarity).astype(np.float32)
    theta = streams(_VALUES).standard_normal((B, M, 1, channels), np.float32)
    order = np.argsort(streams(_ORDER).random((B, M)), 1)
    # Gumbel's trick: the largest of log odds + Gumbel noise, in order, are draws without replacement.
    odds = (power - 1) * np.log(np.arange(1, slots + 1)) + streams(_PROBES).gumbel(size=(B, slots))
    slot = np.argsort(-odds, 1)[:, :M]
    row = np.arange(B)[:, None]
    regime = np.full((B, T), -1)
    regime[:, :M] = order
    regime[row, opening + slot] = np.arange(M)
    asked = (regime >= 0) & (np.arange(T) >= opening)
    known = (regime >= 0)[..., None]
    mean = np.where(known, theta[row, regime, 0], np.float32(0))
    cue = np.where(known, noisy(streams(_CUE_NOISE), codes[row, regime], cue_noise / cue_width**0.5), np.float32(0))
    values = np.where(known, noisy(streams(_NOISE), mean, noise), np.float32(0))
    observed = np.tile(np.arange(T) < M, (B, 1))
    if filler:
        blank = ~known[..., 0] & (np.arange(T) >= opening)
        rng = streams(_DROPPED)
        cue[blank] = unit(rng.standard_normal((int(blank.sum()), cue_width)))
        values[blank] = rng.standard_normal((int(blank.sum()), channels))
        observed |= blank
    return RegimeBatch(
        values=values,
        observed=np.repeat(observed[..., None], channels, -1),
        cue=cue,
        action=np.zeros((B, T, 0), np.float32),
        mean=mean,
        regime=regime.astype(np.int16),
        version=np.zeros((B, T), np.int8),
        kind=np.where(asked, RARE_PROBE, OTHER).astype(np.int8),
        elapsed=np.ones((B, T), np.float32),
        truth={"codes": codes, "theta": theta, "slot": slot},
        meta=parameters | {"task": "T4", "load": M, "common": 0, "rare": M, "preamble": M},
    )


def _gap(
    streams: Streams, B: int, steps: int, M: int, revisions: int, previous: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Regime (B, steps) and version (B, steps) of the gap, and the version of each common regime at its end (B, M)."""
    latest = np.zeros((B, M), np.int64)
    starts, which = segments(streams(_SEGMENTS), batch=B, steps=steps, mean=SEGMENT)
    if M == 0 and steps:
        raise ValueError(f"a gap of {steps} steps without common regimes has nothing to show; expected common >= 2")
    draw = streams(_CHOICES).random(starts.shape)
    regime, version = np.zeros(starts.shape, np.int64), np.zeros(starts.shape, np.int64)
    weights, row = 1 / np.arange(1, M + 1), np.arange(B)
    for s in range(starts.shape[1]):
        previous = another(draw[:, s], previous, weights)
        regime[:, s] = previous
        if revisions:
            due = np.minimum((revisions + 1) * starts[:, s] // steps, revisions)
            moves = (starts[:, s] < steps) & (due > latest[row, previous])
            latest[row, previous] += moves
            version[:, s] = latest[row, previous]
    return np.take_along_axis(regime, which, 1), np.take_along_axis(version, which, 1), latest


def _version_before(regime: np.ndarray, version: np.ndarray, opening: int, steps: int, M: int) -> np.ndarray:
    """For each step of the gap but the first, the highest version its regime had reached before: (B, steps - 1)."""
    inside = slice(opening, opening + steps)
    regime, version = regime[:, inside], version[:, inside]
    out = np.zeros((regime.shape[0], max(0, steps - 1)), np.int64)
    if version.any():
        for r in range(M):
            reached = np.maximum.accumulate(np.where(regime == r, version, 0), 1)
            out += (regime[:, 1:] == r) * reached[:, :-1]
    return out


def _check(
    batch: int, gap: int, common: int, rare: int, exposures: int, visit: int, channels: int, width: int, revisions: int
) -> None:
    counts: dict[str, Any] = {"batch": batch, "exposures": exposures, "visit": visit, "channels": channels}
    counts |= {"cue_width": width, "common + rare": common + rare}
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} is {count}, expected at least 1")
    for name, count in {"gap": gap, "rare": rare, "revisions": revisions}.items():
        if count < 0:
            raise ValueError(f"{name} is {count}, expected at least 0")
    if common == 1 or common < 0:
        raise ValueError(f"common is {common}, expected 0 or at least 2: a regime is followed by another one")
