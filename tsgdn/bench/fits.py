"""Many fits of one harness: cells of (task, mixer, seed), each in a process of its own, resumable.

A cell is fitted by `tsgdn fit --config TASK` with the sizes of `matching`, and scored by whoever asks. Its rows are
appended to a results.csv, and a cell that has rows is not run again. The column `config` names the preset and whatever
options were handed on to the fit: with others, a cell is another measurement.
"""

import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

from tsgdn.adapters.predictor import ModelPredictor
from tsgdn.bench.matching import STATE_BYTES, matched
from tsgdn.bench.record import append, row
from tsgdn.evaluation.backtest import Scores
from tsgdn.model import artefact
from tsgdn.streamable import state_bytes

SCORES = ("wql", "mase", "nd", "sql", "coverage80", "coverage98")
UNITS = {"train_seconds": "s", "mixer_state_bytes": "B", "state_bytes": "B"}


class Cell(NamedTuple):
    """One fit; of a baseline the seed is empty."""

    task: str
    mixer: str
    seed: int | str


class Sizes(NamedTuple):
    """Of the models that are compared; see `matching.matched`."""

    width: int = 64
    depth: int = 3
    state_bytes: int = STATE_BYTES

    def options(self, mixer: str) -> list[str]:
        """What `tsgdn fit` is told."""
        found = matched(mixer, width=self.width, depth=self.depth, state_bytes=self.state_bytes)
        told = {
            "width": self.width,
            "depth": self.depth,
            "mixer": found.mixer,
            "mixer_args": json.dumps(found.mixer_args),
            "mlp_ratio": found.mlp_ratio,
        }
        return [text for key, value in told.items() for text in (f"--model.model.{key}", str(value))]

    def describe(self) -> str:
        """For the column `config`: what differs from the default."""
        return " ".join(
            f"{key}={value}" for key, value in self._asdict().items() if value != Sizes._field_defaults[key]
        )


def cells(tasks: Sequence[str], mixers: Sequence[str], seeds: Sequence[int]) -> Iterator[Cell]:
    """Seed by seed, so that what has been done at any moment compares all mixers."""
    for seed in seeds:
        for task in tasks:
            for mixer in mixers:
                yield Cell(task, mixer, seed)


def lines(results: Path) -> list[dict[str, str]]:
    """What a results.csv holds; nothing where there is none."""
    if not results.is_file():
        return []
    with results.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def done(results: Path) -> set[tuple[str, str, str, str]]:
    """(task, model, seed, config) of the cells that have scores."""
    found = (line for line in lines(results) if line["metric"] == "wql")
    return {(line["task"], line["model"], line["seed"], line["config"]) for line in found}


def run(
    wanted: Sequence[Cell],
    score: Callable[[ModelPredictor, str], Scores],
    *,
    results: Path,
    root: Path,
    origin: dict[str, Any],
    sizes: Sizes | None = None,
    workers: int = 1,
    options: Sequence[str] = (),
) -> int:
    """Runs the cells that have no rows yet; returns how many failed.

    Args:
        wanted: cells; each task has a preset of the same name.
        score: of a fitted model on a task.
        results: CSV to append to.
        root: folder of the fits.
        origin: `record.provenance()`.
        sizes: of the models; None = the default ones.
        workers: fits at a time, one thread each.
        options: handed on to `tsgdn fit`.
    """
    sizes = sizes or Sizes()
    known = done(results)
    configs = {cell.task: " ".join(filter(None, [cell.task, sizes.describe(), *options])) for cell in wanted}
    todo = [cell for cell in wanted if (cell.task, cell.mixer, str(cell.seed), configs[cell.task]) not in known]
    failed = 0
    with ThreadPoolExecutor(workers) as pool:
        fits = {pool.submit(_fit, cell, root, sizes, tuple(options), score): cell for cell in todo}
        for number, future in enumerate(as_completed(fits), 1):
            cell = fits[future]
            try:
                scores, cost = future.result()
            except (RuntimeError, ValueError, OSError) as error:
                failed += 1
                print(f"[{number}/{len(todo)}] {' '.join(map(str, cell))}: {error}", file=sys.stderr, flush=True)
                continue
            append(results, *rows(cell, configs[cell.task], scores, origin, cost))
            text = f"WQL {scores.wql:.5f}  MASE {scores.mase:.4f}  {cost['train_seconds']:.0f} s"
            print(f"[{number}/{len(todo)}] {' '.join(map(str, cell))}: {text}", file=sys.stderr, flush=True)
    return failed


def _fit(
    cell: Cell, root: Path, sizes: Sizes, options: tuple[str, ...], score: Callable[[ModelPredictor, str], Scores]
) -> tuple[Scores, dict[str, float]]:
    folder = root / cell.task / cell.mixer / str(cell.seed)
    folder.mkdir(parents=True, exist_ok=True)
    command = [
        *(sys.executable, "-m", "tsgdn", "fit", "--config", cell.task, "--seed_everything", str(cell.seed)),
        *sizes.options(cell.mixer),
        *("--trainer.default_root_dir", str(folder), "--trainer.enable_progress_bar", "false", *options),
    ]
    begin = time.perf_counter()
    with (folder / "fit.log").open("w") as log:
        fit = subprocess.run(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
    if fit.returncode:
        last = (folder / "fit.log").read_text().strip().splitlines()[-1:]
        raise RuntimeError(f"fit ended with {fit.returncode}: {' '.join(last)}")
    seconds = time.perf_counter() - begin
    info = artefact.read_series_info(folder / "export")
    predictor = ModelPredictor(artefact.load(folder / "export"), calendar=bool(info["calendar"]))
    scores = score(predictor, cell.task)
    return scores, {
        "train_seconds": seconds,
        "parameters": sum(p.numel() for p in predictor.model.parameters()),
        "mixer_state_bytes": state_bytes(predictor.model.initial_state(1, 1).backbone),
        "state_bytes": state_bytes(predictor.model.initial_state(1, 1)),
    }


def rows(
    cell: Cell, config: str, scores: Scores, origin: dict[str, Any], cost: dict[str, float]
) -> list[dict[str, Any]]:
    """The rows of a cell."""
    numbers = {**{name: getattr(scores, name) for name in SCORES}, **cost}
    return [
        row(
            metric=metric,
            value=f"{value:.6g}" if isinstance(value, float) else value,
            unit=UNITS.get(metric, ""),
            n=scores.n,
            seed=cell.seed,
            config=config,
            origin=origin,
            task=cell.task,
            model=cell.mixer,
        )
        for metric, value in numbers.items()
    ]
