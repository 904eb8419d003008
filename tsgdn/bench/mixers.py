"""Every mixer and hybrid in one table: cost of its backbone, and the validation WQL of a model fitted with it.

All have the parameters and, where that can be, the state bytes of gated_deltanet (`matching`). Scores are those of the
end of the training part: the published test windows stay untouched by a choice among so many.
"""

import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tsgdn.adapters.predictor import ModelPredictor
from tsgdn.bench import fits
from tsgdn.bench.matching import matched
from tsgdn.bench.record import append, provenance, row
from tsgdn.data.module import ForecastDataModule, find_task
from tsgdn.data.series import Series
from tsgdn.evaluation.backtest import Scores, evaluate
from tsgdn.mixers import MIXERS
from tsgdn.model.backbone import BACKBONES, Backbone

ROWS, TOKENS = 32, 64  # of a training batch of the presets
STREAMS = (1, 1024)
HISTORY = 1024  # tokens after which the bytes of a state are told
REPEATS = 7
PER_MEASUREMENT = 0.3  # seconds


def systems() -> tuple[str, ...]:
    """Names of all that can be compared."""
    return (*MIXERS, *BACKBONES)


# ---- accuracy


class Validation:
    """The validation part of an evaluation cell, as windows: what a fit of the preset holds out.

    Args:
        name: of an evaluation cell.
    """

    def __init__(self, name: str) -> None:
        task = find_task(name)
        self.name, self.horizon, self.seasonality = name, task.horizon, task.seasonality
        module = ForecastDataModule(name)
        module.setup()
        self._training, self._instances = module.training, list(self._windows(module))

    def _windows(self, module: ForecastDataModule) -> Iterator[tuple[Series, np.ndarray]]:
        for whole, training in zip(module.whole, module.training, strict=True):
            for begin in range(len(training), len(whole), self.horizon):
                yield whole.slice(0, begin), np.array(whole.values[:, begin : begin + self.horizon])

    def split(self) -> tuple[list[Series], Sequence[tuple[Series, np.ndarray]]]:
        """Training series, then (context, label (V, H)) per window."""
        return self._training, self._instances


def accuracy(
    tasks: Sequence[str],
    names: Sequence[str],
    seeds: Sequence[int],
    *,
    sizes: fits.Sizes,
    results: Path,
    root: Path,
    workers: int = 1,
    options: Sequence[str] = (),
) -> int:
    """Fits what has no rows yet and scores it on the validation part; returns how many cells failed."""
    parts: dict[str, Validation] = {}

    def score(predictor: ModelPredictor, name: str) -> Scores:
        return evaluate(predictor, parts[name], keep=False)

    for name in tasks:
        parts[name] = Validation(name)
    wanted = list(fits.cells(tasks, names, seeds))
    return fits.run(
        wanted,
        score,
        results=results,
        root=root,
        origin=provenance("cuda" if torch.cuda.is_available() else "cpu"),  # where Lightning fits
        sizes=sizes,
        workers=workers,
        options=options,
    )


# ---- cost


def cost(
    names: Sequence[str], *, sizes: fits.Sizes, results: Path, device: str = "cpu", seed: int = 0, resume: bool = True
) -> int:
    """Measures the backbones that have no rows of this hardware yet; returns how many failed."""
    origin = provenance(device)
    known = _measured(results, origin["hardware"]) if resume else set()
    failed = 0
    for number, name in enumerate(names, 1):
        if (name, sizes.describe()) in known:
            continue
        try:
            found = measure(name, sizes, device, seed)
        except (RuntimeError, ValueError) as error:
            failed += 1
            print(f"[{number}/{len(names)}] {name}: {error}", file=sys.stderr, flush=True)
            continue
        given = {"seed": seed, "config": sizes.describe(), "device": device, "origin": origin}
        keys = {"task": f"backbone_{device}", "model": name}
        append(results, *(_row(metric, unit, values, **given, **keys) for metric, unit, values in found))
        told = ", ".join(f"{metric} {statistics.median(values):,.0f}" for metric, _, values in found)
        print(f"[{number}/{len(names)}] {name}: {told}", file=sys.stderr, flush=True)
    return failed


def measure(name: str, sizes: fits.Sizes, device: str, seed: int) -> list[tuple[str, str, list[int | float]]]:
    """(metric, unit, measurements) of a backbone, on a training batch and on single tokens."""
    torch.manual_seed(seed)
    found = matched(name, width=sizes.width, depth=sizes.depth, state_bytes=sizes.state_bytes)
    backbone = Backbone(sizes.width, sizes.depth, name, found.mixer_args, found.mlp_ratio, variate_every=0).to(device)
    x = torch.randn(ROWS, 1, TOKENS, sizes.width, device=device)
    out: list[tuple[str, str, list[int | float]]] = [
        ("parameters", "", [found.parameters]),
        ("state_bytes", "B", [backbone.state_bytes(0)]),
        (f"state_bytes_{HISTORY}", "B", [backbone.state_bytes(HISTORY)]),
    ]

    def train() -> None:
        backbone.zero_grad(set_to_none=True)
        backbone(x)[0].square().mean().backward()

    out.append(("train_tokens_per_s", "1/s", [ROWS * TOKENS / t for t in _times(train, device)]))
    backbone.eval()
    with torch.no_grad():
        for streams in STREAMS:
            history = torch.randn(streams, 1, TOKENS, sizes.width, device=device)
            _, state = backbone(history)
            step = partial(backbone, history[:, :, :1], state)
            out.append((f"step_us_{streams}", "us", [1e6 * t for t in _times(step, device)]))
    return out


def _row(metric: str, unit: str, values: Sequence[int | float], **given: Any) -> dict[str, Any]:
    """The median with its 20th and 80th percentile; of a count the number itself."""
    if len(values) == 1:
        return row(metric=metric, unit=unit, value=int(values[0]), **given)
    low, high = np.percentile(values, [20, 80])
    spread = {"value": f"{statistics.median(values):.6g}", "p20": f"{low:.6g}", "p80": f"{high:.6g}"}
    return row(metric=metric, unit=unit, n=len(values), **spread, **given)


def _times(fn: Callable[[], Any], device: str) -> list[float]:
    """Seconds per call: the mean over a stretch of calls, some stretches."""

    def stretch(calls: int) -> float:
        begin = time.perf_counter()
        for _ in range(calls):
            fn()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        return (time.perf_counter() - begin) / calls

    stretch(2)
    calls = max(1, math.ceil(PER_MEASUREMENT / max(stretch(1), 1e-6)))
    return [stretch(calls) for _ in range(REPEATS)]


def _measured(results: Path, hardware: str) -> set[tuple[str, str]]:
    return {
        (line["model"], line["config"])
        for line in fits.lines(results)
        if line["task"].startswith("backbone") and line["hardware"] == hardware
    }


# ---- pictures


def plot(results: Path) -> list[Path]:
    """Validation WQL beside the cost of training and of a step, one picture per task; drawn beside the rows."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = fits.lines(results)
    cost_of = {
        metric: {
            line["model"]: float(line["value"])
            for line in lines
            if line["metric"] == metric and line["task"] == "backbone_cpu"
        }
        for metric in ("train_tokens_per_s", "step_us_1")
    }
    written = []
    for task in dict.fromkeys(line["task"] for line in lines if line["metric"] == "wql"):
        scores: dict[str, list[float]] = {}
        for line in lines:
            if line["task"] == task and line["metric"] == "wql":
                scores.setdefault(line["model"], []).append(float(line["value"]))
        order = sorted(scores, key=lambda name: -statistics.mean(scores[name]))
        figure, (left, right) = plt.subplots(1, 2, figsize=(11, 0.27 * len(order) + 1.4), layout="constrained")
        for y, name in enumerate(order):
            left.plot(scores[name], [y] * len(scores[name]), "o", color="tab:blue", alpha=0.45, ms=4)
            left.plot(statistics.mean(scores[name]), y, "|", color="black", ms=11, mew=2)
        left.set_yticks(range(len(order)), order)
        left.set_xlabel("validation WQL (each seed, and the mean)")
        left.set_title(task)
        left.grid(axis="x", alpha=0.3)
        speeds = cost_of["train_tokens_per_s"]
        right.barh(range(len(order)), [speeds.get(name, math.nan) / 1e3 for name in order], color="tab:gray")
        right.set_yticks(range(len(order)), [""] * len(order))
        right.set_xlabel("thousand training tokens per second, CPU")
        right.grid(axis="x", alpha=0.3)
        for axes in (left, right):
            axes.set_ylim(-0.6, len(order) - 0.4)
        path = results.parent / f"wql_{task}.png"
        figure.savefig(path, dpi=110)
        plt.close(figure)
        written.append(path)
    return written
