"""What could be recalled at best, and by simple means: predictors in closed form, each with the bytes it would need."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from tsgdn.data.retention import COMMON_PROBE, RARE_PROBE, RegimeBatch, reentries, split_channels

RECALL = ("oracle", "memoryless", "last", "filter", "knn", "attention", "ridge", "rls")
"""References of T1 to T6. T6 has per-channel forms too: knn_channel, ridge_channel, rls_channel, attention_channel."""
HAND_SET: dict[str, tuple[float, bool]] = {
    "delta": (1.0, True),
    "gated_delta_.999": (0.999, True),
    "gated_delta_.99": (0.99, True),
    "decay_.999": (0.999, False),
    "decay_.99": (0.99, False),
    "hebb": (1.0, False),
}
"""Memories with constant gates, keys = cues of unit length, beta 1: (alpha, delta). Also references of T1 to T5."""
FORGETTING = 0.99
NEIGHBOURS = 4


class Probes(NamedTuple):
    """The questions of a batch: P per sequence, in order of time; `kind` and `truth` per channel in T6."""

    time: Int[np.ndarray, "B P"]
    kind: Int[np.ndarray, "B P *C"]
    regime: Int[np.ndarray, "B P *C"]
    version: Int[np.ndarray, "B P *C"]
    truth: Float[np.ndarray, "B P C"]

    def at(self, forecast: Float[np.ndarray, "B T C"]) -> Float[np.ndarray, "B P C"]:
        """Picks the forecasts *for* the probes' steps out of forecasts for every step."""
        return np.take_along_axis(forecast, self.time[..., None], 1)


def probes(batch: RegimeBatch) -> Probes:
    """Where the probes are and what the noise-free answer is.

    Raises:
        ValueError: sequences have different numbers of probes, as in T9 (see `switching_errors`).
    """
    asked = (batch.kind == RARE_PROBE) | (batch.kind == COMMON_PROBE)
    asked = asked.any(-1) if asked.ndim == 3 else asked
    count = asked.sum(1)
    if np.ptp(count):
        raise ValueError(f"sequences have {count.min()} to {count.max()} probes, expected one number for all")
    time = np.nonzero(asked)[1].reshape(len(asked), -1)

    def pick(x: np.ndarray) -> np.ndarray:
        return x[np.arange(len(x))[:, None], time]

    regime, version, kind = (pick(x).astype(np.int64) for x in (batch.regime, batch.version, batch.kind))
    return Probes(time, kind, regime, version, pick(batch.mean).astype(np.float64))


def recall(batch: RegimeBatch, name: str, *, forgetting: int | float = FORGETTING) -> Float[np.ndarray, "B P C"]:
    """A reference's answers to the probes of T1 to T6.

    With c the probe's cue, S the visible steps before it, T its time, n_r the visible steps of its regime in the
    version of the probe (none: the answer is 0):

        oracle      mu
        memoryless  0
        last        y of the last visible step
        filter      sum of y over the n_r steps / (n_r + sv^2): knows the segmentation
        knn         mean y of the 4 steps of S nearest in cosine (T4: 1)
        attention   softmax over S of 400 cos(c, c_s) - 2 ln(T - s)
        ridge       W c, W = (sum y c^T)(sum c c^T + I)^-1
        rls         the same with weights lam^(T-1-s) and prior lam^T I
        delta, ...  the memories of `HAND_SET`

    In T6 the cue of all channels is one vector; NAME_channel uses each channel's own block. T1's background counts as
    visible. Where lam^T underflows the prior is floored at 1e-12.

    Args:
        batch: of one of T1 to T6.
        name: of the reference.
        forgetting: lam.

    Raises:
        ValueError: the name is unknown, or the task has no such probes.
    """
    if name.endswith("_channel"):
        rows = recall(split_channels(batch), name.removesuffix("_channel"), forgetting=forgetting)
        return rows.reshape(batch.values.shape[0], batch.values.shape[2], -1).swapaxes(1, 2)
    if batch.meta["task"] not in ("T1", "T2", "T2e", "T3", "T4", "T5", "T6"):
        raise ValueError(f"task {batch.meta['task']} has no recall probes; use effects, topology or switching_errors")
    asked = probes(batch)
    if name == "oracle":
        return asked.truth
    if name == "memoryless":
        return np.zeros_like(asked.truth)
    if name == "last":
        return _last(batch, asked)
    if name == "filter":
        return _filter(batch, asked)
    if name in HAND_SET:
        return _hand_set(batch, asked, *HAND_SET[name])
    if name not in RECALL:
        raise ValueError(f"reference {name!r} is not known; use one of {', '.join((*RECALL, *HAND_SET))}")
    seen = batch.observed[..., 0]
    values, cue = batch.values.astype(np.float64), batch.cue.astype(np.float64)
    out = np.empty_like(asked.truth)
    first = asked.time.min(1)
    same = not (seen & (np.arange(seen.shape[1]) > first[:, None])).any()  # all questions see the same steps
    for p in range(0, asked.time.shape[1], asked.time.shape[1] if same else 1):
        at = asked.time[:, p:] if same else asked.time[:, p : p + 1]
        before = seen & (np.arange(seen.shape[1]) < at[:, :1])
        length = int(np.nonzero(before.any(0))[0].max(initial=-1)) + 1
        question = np.take_along_axis(cue, at[..., None], 1)
        part = (values[:, :length], cue[:, :length], before[:, :length], question, at)
        if name in ("ridge", "rls"):
            answer = _regression(*part, 1.0 if name == "ridge" else forgetting)
        else:
            answer = _neighbours(*part, name, 1 if batch.meta["task"] == "T4" else NEIGHBOURS)
        out[:, p : p + at.shape[1]] = answer
    return out


def recall_bytes(batch: RegimeBatch, name: str) -> int:
    """Bytes of float32 state per sequence that the reference needs; those that keep every step grow with the stream."""
    channels, width = batch.values.shape[-1], batch.cue.shape[-1]
    if name.endswith("_channel"):
        return channels * recall_bytes(split_channels(batch), name.removesuffix("_channel"))
    per_channel = batch.kind.ndim == 3
    regimes = batch.truth["theta"].shape[-1 if per_channel else 1]
    visible = int(batch.observed[0].any(-1).sum())
    floats = {
        "oracle": 0,
        "memoryless": 0,
        "last": channels,
        "filter": regimes * (2 * channels if per_channel else channels + 1),
        "knn": visible * (width + channels),
        "attention": visible * (width + channels),
        "ridge": width * width + width * channels,
        "rls": width * width + width * channels,
    }
    floats |= {key: width * channels + (0 if delta else width * width) for key, (_, delta) in HAND_SET.items()}
    if name not in floats:
        raise ValueError(f"reference {name!r} is not known; use one of {', '.join(floats)}")
    return 4 * floats[name]


def effects(batch: RegimeBatch, name: str, *, forgetting: int | float = FORGETTING) -> Float[np.ndarray, "B A C"]:
    """What a reference holds of each action's effect at the branch of T7.

    The residual y_t - 0.5 y_{t-1} of visible steps is told apart by the action of step t - lag:
    `filter` sums an action's own residuals / (n + sv^2); `last` is the latest residual of any action, for all;
    `ridge` and `rls` regress residuals on the actions' codes; `oracle` and `memoryless` (0).

    Raises:
        ValueError: the name is unknown.
    """
    lag, at = batch.meta["lag"], batch.meta["branch_step"]
    truth = batch.truth["effects"].astype(np.float64)
    if name == "oracle":
        return truth
    if name == "memoryless":
        return np.zeros_like(truth)
    values = batch.values[:, : at + 1].astype(np.float64)
    residual = values[:, lag:] - 0.5 * values[:, lag - 1 : -1]
    which = batch.regime[:, : at + 1 - lag]
    acted = which >= 0
    if name == "filter":
        own = (which[..., None] == np.arange(truth.shape[1])).astype(np.float64)
        return own.swapaxes(1, 2) @ residual / (own.sum(1) + batch.meta["noise"] ** 2)[..., None]
    if name == "last":
        place = residual.shape[1] - 1 - np.argmax(acted[:, ::-1], 1)
        return np.repeat(residual[np.arange(len(residual)), place][:, None], truth.shape[1], 1)
    if name in ("ridge", "rls"):
        codes = batch.action[:, : at + 1 - lag].astype(np.float64)
        now = np.full((len(codes), 1), residual.shape[1])
        lam = 1.0 if name == "ridge" else forgetting
        return _regression(residual, codes, acted, batch.truth["codes"].astype(np.float64), now, lam)
    raise ValueError(f"reference {name!r} is not known; use oracle, memoryless, filter, last, ridge or rls")


def topology(batch: RegimeBatch, name: str, *, window: int = 32) -> Float[np.ndarray, "B C C"]:
    """What a reference takes for 0.9 P of the rare topology of T8.

    `filter` is ridge 1 on the regime's own transitions, `var` on all, `window` on the last ones; `oracle`; `memoryless`
    is W0 = 0.9 (1 - I) / (C - 1). The impulse itself belongs to the probe and is used by none.

    Raises:
        ValueError: the name is unknown.
    """
    C, last = batch.values.shape[-1], batch.values.shape[1] - 2
    rare = batch.meta["common"]
    if name == "oracle":
        return 0.9 * batch.truth["topology"][:, rare].astype(np.float64)
    if name == "memoryless":
        return np.tile(0.9 * (1 - np.eye(C)) / (C - 1), (len(batch.values), 1, 1))
    values = batch.values[:, :last].astype(np.float64)
    now, before = values[:, 1:], values[:, :-1]
    use = {
        "filter": batch.regime[:, 1:last] == rare,
        "var": np.ones(now.shape[:2], bool),
        "window": np.tile(np.arange(now.shape[1]) >= now.shape[1] - window, (len(now), 1)),
    }
    if name not in use:
        raise ValueError(f"reference {name!r} is not known; use oracle, memoryless, {', '.join(use)}")
    basis = np.tile(np.eye(C), (len(now), 1, 1))
    # Column i of W is the answer to e_i.
    return _regression(now, before, use[name], basis, np.full((len(now), 1), last), 1.0).swapaxes(1, 2)


def switching_errors(batch: RegimeBatch, name: str) -> tuple[Float[np.ndarray, "K 8"], Int[np.ndarray, " K"]]:
    """Squared one-step errors per channel in the first 8 steps after each re-entry of T9's rare regime, and its gap.

    `oracle` knows Q; `filter` is ridge 1 on the regime's own transitions so far; `window` (the memoryless one) ridge 1
    on the steps since the re-entry; `zero`. Re-entries closer than 8 steps to the end are left out.

    Raises:
        ValueError: the name is unknown.
    """
    if name not in ("oracle", "filter", "window", "zero"):
        raise ValueError(f"reference {name!r} is not known; use oracle, filter, window or zero")
    rows, steps, gaps = reentries(batch)
    inside = steps + 8 <= batch.values.shape[1]
    rows, steps, gaps = rows[inside], steps[inside], gaps[inside]
    rare, C = batch.meta["common"], batch.values.shape[-1]
    out = np.empty((len(rows), 8))
    for i, (row, step) in enumerate(zip(rows, steps, strict=True)):
        y = batch.values[row].astype(np.float64)
        now, before = y[step : step + 8], y[step - 1 : step + 7]
        if name == "oracle":
            forecast = batch.mean[row, step : step + 8].astype(np.float64)
        elif name == "zero":
            forecast = np.zeros((8, C))
        else:
            own = np.flatnonzero(batch.regime[row, 1:step] == rare) + 1 if name == "filter" else np.zeros(0, int)
            gram, cross = np.eye(C) + y[own - 1].T @ y[own - 1], y[own].T @ y[own - 1]
            forecast = np.empty((8, C))
            for j in range(8):
                forecast[j] = cross @ np.linalg.solve(gram, before[j])
                gram += np.outer(before[j], before[j])
                cross += np.outer(now[j], before[j])
        out[i] = ((forecast - now) ** 2).mean(-1)
    return out, gaps


def phase(batch: RegimeBatch, name: str) -> Float[np.ndarray, "B P C"]:
    """References of T9b: `oracle`, `memoryless` (0), `last` (visible y), `untracked` (mean of the values: Ret 1/n),
    `filter` (tracks; mean of the phase's visible steps, shrunk).

    Raises:
        ValueError: the name is unknown.
    """
    asked = probes(batch)
    if name == "oracle":
        return asked.truth
    if name == "memoryless":
        return np.zeros_like(asked.truth)
    if name == "last":
        return _last(batch, asked)
    if name == "untracked":
        mean = batch.truth["theta"].astype(np.float64).mean(1, keepdims=True)
        return np.broadcast_to(mean, asked.truth.shape).copy()
    if name == "filter":
        return _filter(batch, asked)
    raise ValueError(f"reference {name!r} is not known; use oracle, memoryless, last, untracked or filter")


def _last(batch: RegimeBatch, asked: Probes) -> np.ndarray:
    """The latest visible value before each probe."""
    time = np.arange(batch.values.shape[1])
    latest = np.maximum.accumulate(np.where(batch.observed[..., 0], time, -1), 1)
    place = np.take_along_axis(latest, asked.time - 1, 1)
    out = batch.values[np.arange(len(place))[:, None], place].astype(np.float64)
    return np.where((place >= 0)[..., None], out, 0.0)


def _filter(batch: RegimeBatch, asked: Probes) -> np.ndarray:
    """Shrunk means of the steps of the probe's regime and version; per channel where regimes are."""
    shape = batch.values.shape
    regime, version = (
        np.broadcast_to(x if x.ndim == 3 else x[..., None], shape) for x in (batch.regime, batch.version)
    )
    out = np.empty_like(asked.truth)
    values = batch.values.astype(np.float64)
    time = np.arange(shape[1])[:, None]
    for p in range(asked.time.shape[1]):
        r, v = (x[:, p, None] if x.ndim == 3 else x[:, p, None, None] for x in (asked.regime, asked.version))
        own = (regime == r) & (version == v) & batch.observed & (time < asked.time[:, p, None, None])
        out[:, p] = (values * own).sum(1) / (own.sum(1) + batch.meta["noise"] ** 2 + 1e-300)
    return out


def _regression(
    values: np.ndarray,
    cue: np.ndarray,
    use: np.ndarray,
    question: np.ndarray,
    at: np.ndarray,
    lam: int | float,
) -> np.ndarray:
    """Ridge of values on cues with weights lam^(T-1-s) and prior lam^T I, asked with `question` (B, P, d)."""
    now = at[:, :1].astype(np.float64)
    weight = use * lam ** np.maximum(now - 1 - np.arange(values.shape[1]), 0)
    weighted = cue * weight[..., None]
    gram = cue.swapaxes(1, 2) @ weighted
    gram += np.maximum(lam**now, 1e-12)[..., None] * np.eye(cue.shape[-1])
    cross = weighted.swapaxes(1, 2) @ values
    return question @ np.linalg.solve(gram, cross)


def _neighbours(
    values: np.ndarray,
    cue: np.ndarray,
    use: np.ndarray,
    question: np.ndarray,
    at: np.ndarray,
    name: str,
    nearest: int,
) -> np.ndarray:
    def direction(x: np.ndarray) -> np.ndarray:
        return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)

    score = np.einsum("bpd,btd->bpt", direction(question), direction(cue))
    if name == "attention":
        age = np.maximum(at[..., None] - np.arange(values.shape[1]), 1)
        score = np.where(use[:, None], 400 * score - 2 * np.log(age), -np.inf)
        weight = np.exp(score - score.max(-1, keepdims=True))
        return (weight / weight.sum(-1, keepdims=True)) @ values
    score = np.where(use[:, None], score, -np.inf)
    place = np.argpartition(-score, nearest - 1, axis=-1)[..., :nearest]
    return values[np.arange(len(values))[:, None, None], place].mean(2)


def _hand_set(batch: RegimeBatch, asked: Probes, alpha: int | float, delta: bool) -> np.ndarray:
    """Answers of a memory S <- alpha S + k (v - [delta] alpha S^T k)^T with the unit cues as keys; hidden: no write.

    Without the delta rule the read is divided by q^T (sum alpha^age k k^T) q: the weight of the question's own writes
    where keys are orthonormal, and never near zero where they are not.
    """
    B, T, _ = batch.values.shape
    cue = batch.cue.astype(np.float64)
    keys = cue / np.maximum(np.linalg.norm(cue, axis=-1, keepdims=True), 1e-12)
    values, seen = batch.values.astype(np.float64), batch.observed[..., 0]
    S = np.zeros((B, cue.shape[-1], values.shape[-1]))
    gram = np.zeros((B, cue.shape[-1], cue.shape[-1]))
    out = np.zeros((B, T, values.shape[-1]))
    questions = np.zeros(T, bool)
    questions[asked.time] = True
    for t in range(T):
        S *= alpha
        q = keys[:, t, None]
        if questions[t]:
            out[:, t] = (q @ S)[:, 0]
            if not delta:
                out[:, t] /= np.maximum((q @ gram @ q.swapaxes(1, 2))[:, 0], 1e-12)
        k = q * seen[:, t, None, None]
        if not delta:
            gram = alpha * gram + k * k.swapaxes(1, 2)
        error = values[:, t, None] - (k @ S if delta else 0.0)
        S += k.swapaxes(1, 2) * error
    return asked.at(out)
