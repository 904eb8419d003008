"""A retention card for a fitted model: what its states keep of a law that ruled long ago, zero-shot and without cues.

A fitted forecaster cannot read the tasks' cues, so it is asked a T9 without them: five laws of motion
y_t = 0.9 Q y_{t-1} + noise in four variates recur, one of them rarely, and can be told from the values alone. Each
stream has a twin that differs in one thing: the rare law's earlier visits were ruled by a common one, so nothing of it
could be kept. What a model is better on the stream than on its twin, when the rare law rules again, is what it kept.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from tsgdn.adapters.predictor import ModelPredictor
from tsgdn.data.retention import RegimeBatch, block, reentries
from tsgdn.data.series import Series
from tsgdn.evaluation.retention import mean_interval

CARD = "retention_card.md"
STEPS = 2048
SCORED = 32
"""Steps after the return that are scored."""


@runtime_checkable
class Reads(Protocol):
    """What a card needs of a predictor: `ModelPredictor` offers it."""

    model: Any

    def forecast_origins(self, series: Series, horizon: int, levels: Sequence[float], /, *, first: int = 0) -> Any:
        """Origins, and the forecasts made there."""
        ...


class Asked(NamedTuple):
    """One stream, its twin, and the return of the rare law: first step and steps since it was left."""

    stream: Float[np.ndarray, "T C"]
    twin: Float[np.ndarray, "T C"]
    at: int
    away: int


def streams(count: int, *, seed: int = 0, steps: int = STEPS) -> list[Asked]:
    """The first `count` streams in which the rare law returns, each up to a little after its last return.

    The twin has the same noise; before that return its rare visits follow the first common law.
    """
    found: list[Asked] = []
    index = 0
    while len(found) < count:
        batch = block("T9", index=index, seed=seed, split="test", batch=32, gap=steps, cue="none")
        index += 1
        rows, starts, gaps = reentries(batch)
        for row in np.unique(rows).tolist():
            own = np.flatnonzero(rows == row)[-1]
            at, away = int(starts[own]), int(gaps[own])
            if at + SCORED <= steps and len(found) < count:
                end = at + SCORED
                found.append(Asked(batch.values[row, :end].astype(np.float64), _twin(batch, row, at)[:end], at, away))
    return found


def _twin(batch: RegimeBatch, row: int, at: int) -> Float[np.ndarray, "T C"]:
    rare = int(batch.meta["common"])
    regime = batch.regime[row].astype(int).copy()
    regime[:at][regime[:at] == rare] = 0
    law = 0.9 * batch.truth["rotation"][row].astype(np.float64)
    values = batch.values[row].astype(np.float64).copy()
    shock = values - batch.mean[row].astype(np.float64)
    for t in range(1, len(values)):
        values[t] = law[regime[t]] @ values[t - 1] + shock[t]
    return values


def measure(predictor: Reads, *, count: int = 64, seed: int = 0) -> dict[str, Any]:
    """Squared errors of the medians after the return, on streams and on their twins.

    Variates go in one by one. Errors are those of the forecasts made at the end of the last patch before each step,
    over those of the forecast 0.

    Returns:
        error and twin (each a mean with its interval), kept (their difference likewise), and by_away with the ends of
        each third of the times away, what was kept, and the number of streams.
    """
    asked = streams(count, seed=seed)
    pairs = np.array([[_error(predictor, x, one.at) for x in (one.stream, one.twin)] for one in asked])  # (N, 2, 2)
    away = np.array([one.away for one in asked])
    own, twin = pairs[:, 0], pairs[:, 1]

    def told(error: np.ndarray, zero: np.ndarray) -> list[float]:
        value, low, high = mean_interval(error[None], zero[None], draws=2000)
        return [round(1 - value, 4), round(1 - high, 4), round(1 - low, 4)]

    kept = (twin[:, 0] / twin[:, 1].mean()) - (own[:, 0] / own[:, 1].mean())
    rng = np.random.default_rng(seed)
    draws = kept[rng.integers(0, len(kept), (2000, len(kept)))].mean(1)
    edges = np.quantile(away, [0, 1 / 3, 2 / 3, 1])
    third = np.clip(np.searchsorted(edges[1:-1], away, side="right"), 0, 2)
    return {
        "count": count,
        "steps": STEPS,
        "scored": SCORED,
        "error": told(own[:, 0], own[:, 1]),
        "twin": told(twin[:, 0], twin[:, 1]),
        "kept": [round(float(kept.mean()), 4), *(round(float(x), 4) for x in np.quantile(draws, [0.025, 0.975]))],
        "by_away": [
            [int(edges[k]), int(edges[k + 1]), round(float(kept[third == k].mean()), 4), int((third == k).sum())]
            for k in range(3)
            if (third == k).any()
        ],
    }


def _error(predictor: Reads, values: Float[np.ndarray, "T C"], at: int) -> tuple[float, float]:
    """(squared error of the median, squared value) after the return, means over steps and variates."""
    model = predictor.model
    P, start = model.patch_size, np.datetime64("2000-01-01")
    known = model.config.get("known_features", 0)
    ahead = len(values) + (model.config.get("patches_ahead", 1) + 2) * P
    features = np.full((known, ahead), np.nan) if known else None
    total, power, seen = 0.0, 0.0, 0
    for channel in range(values.shape[1]):
        series = Series(f"channel {channel}", start, "h", values[:, channel : channel + 1].T, known=features)
        origins, forecasts = predictor.forecast_origins(series, P, [0.5], first=max(P, at - P))
        for origin, forecast in zip(origins, forecasts[:, 0, :, 0], strict=True):
            for j in range(P):
                if at <= origin + j < len(values):
                    truth = values[origin + j, channel]
                    total, power, seen = total + (truth - forecast[j]) ** 2, power + truth**2, seen + 1
    return total / max(seen, 1), power / max(seen, 1)


def write(folder: Path, out: Path, *, count: int = 64, seed: int = 0) -> Path:
    """Measures the model in `folder` and writes `retention_card.md` and its numbers into `out`.

    Raises:
        ArtefactError: there is no model in the folder.
    """
    predictor = ModelPredictor.from_pretrained(folder)
    found = measure(ModelPredictor(predictor.model, calendar=False), count=count, seed=seed)
    out.mkdir(parents=True, exist_ok=True)
    (out / "retention_card.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    path = out / CARD
    path.write_text(render(found), encoding="utf-8")
    return path


def render(found: dict[str, Any]) -> str:
    """The card in Markdown."""

    def interval(numbers: list[float]) -> str:
        return f"{numbers[0]:.3f} [{numbers[1]:.3f}, {numbers[2]:.3f}]"

    rows = [f"| {a} to {b} | {kept:.3f} | {n} |" for a, b, kept, n in found["by_away"]]
    low, high = found["kept"][1:]
    word = "keeps something of it" if low > 0 else "does worse for having seen it" if high < 0 else "shows no retention"
    return "\n".join(
        [
            "# Retention card",
            "",
            f"Zero-shot on {found['count']} streams of T9 without cues, up to {found['steps']} steps: laws of motion",
            "recur, one of them rarely. Scored: the first "
            f"{found['scored']} steps after the rare law rules again. A twin of each",
            "stream never showed that law before. Errors: squared, of the median, over those of the forecast 0.",
            "",
            "| | value [95 % interval] |",
            "| --- | ---: |",
            f"| error | {interval(found['error'])} |",
            f"| error on the twins | {interval(found['twin'])} |",
            f"| kept (twin minus own) | {interval(found['kept'])} |",
            "",
            f"The model {word}.",
            "",
            "| steps since the law was left | kept | streams |",
            "| --- | ---: | ---: |",
            *rows,
            "",
        ]
    )
