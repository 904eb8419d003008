"""Accuracy of every mixer in one harness: same encoder, head, budget, seeds, parameters and state bytes.

A cell is (task, model, seed). Each is fitted by `tsgdn fit --config TASK` in its own process and scored on the task's
published windows; its rows are appended to a results.csv, and a cell that has rows is not run again. The column
`config` names the preset and whatever options were handed on to the fit: with others, a cell is another measurement.
"""

import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

from tsgdn.adapters.predictor import ModelPredictor
from tsgdn.bench.record import append, provenance, row
from tsgdn.data.catalog import Task
from tsgdn.data.module import find_task
from tsgdn.evaluation.backtest import Predictor, Scores, evaluate
from tsgdn.evaluation.baselines import BootstrapRandomWalk, Persistence, SeasonalNaive
from tsgdn.model import artefact
from tsgdn.streamable import state_bytes

MATCHED: dict[str, dict[str, Any]] = {
    "gated_deltanet": {"heads": 2, "key_dim": 32, "value_dim": 32},
    "gated_linear": {"heads": 2, "key_dim": 32, "value_dim": 32},
    "deltanet": {"heads": 2, "key_dim": 32, "value_dim": 32},
    # its convolution runs over one shared B and C, so a slightly larger value size gives the same bytes
    "mamba2": {"heads": 2, "key_dim": 32, "value_dim": 35},
    "mamba2_heads": {"heads": 2, "key_dim": 32, "value_dim": 32},
}
"""Mixer sizes with equal state bytes within 1 %."""

SCORES = ("wql", "mase", "nd", "sql", "coverage80", "coverage98")


class Cell(NamedTuple):
    """One fit; of a baseline the seed is empty."""

    task: str
    mixer: str
    seed: int | str


def cells(tasks: Sequence[str], mixers: Sequence[str], seeds: Sequence[int]) -> Iterator[Cell]:
    """Seed by seed, so that what has been done at any moment compares all mixers."""
    for seed in seeds:
        for task in tasks:
            for mixer in mixers:
                yield Cell(task, mixer, seed)


def done(results: Path) -> set[tuple[str, str, str, str]]:
    """(task, model, seed, config) of the cells that have rows."""
    if not results.is_file():
        return set()
    with results.open(encoding="utf-8", newline="") as file:
        return {(line["task"], line["model"], line["seed"], line["config"]) for line in csv.DictReader(file)}


def run(
    tasks: Sequence[str],
    mixers: Sequence[str],
    seeds: Sequence[int],
    *,
    results: Path,
    root: Path,
    workers: int = 1,
    options: Sequence[str] = (),
    paths: int = 100_000,
) -> int:
    """Runs what is missing; returns how many cells failed.

    Args:
        tasks: evaluation cells that have a preset of the same name.
        mixers: keys of `MATCHED`.
        seeds: of fits.
        results: CSV to append to.
        root: folder of the fits.
        workers: fits at a time, one thread each.
        options: handed on to `tsgdn fit`.
        paths: of the bootstrap random walk.
    """
    known = done(results)
    origin = provenance()
    for name in tasks:
        task = find_task(name)
        for model, baseline in baselines(task, paths).items():
            if (name, model, "", "") not in known:
                append(results, *_rows(Cell(name, model, ""), "", evaluate(baseline, task, keep=False), origin, {}))
                print(f"{name}: {model} scored", file=sys.stderr, flush=True)
    configs = {name: " ".join([name, *options]) for name in tasks}
    wanted = list(cells(tasks, mixers, seeds))
    todo = [cell for cell in wanted if (cell.task, cell.mixer, str(cell.seed), configs[cell.task]) not in known]
    failed = 0
    with ThreadPoolExecutor(workers) as pool:
        fits = {pool.submit(_fit, cell, root, tuple(options)): cell for cell in todo}
        for number, future in enumerate(as_completed(fits), 1):
            cell = fits[future]
            try:
                scores, cost = future.result()
            except (RuntimeError, ValueError, OSError) as error:
                failed += 1
                print(f"[{number}/{len(todo)}] {' '.join(map(str, cell))}: {error}", file=sys.stderr, flush=True)
                continue
            append(results, *_rows(cell, configs[cell.task], scores, origin, cost))
            text = f"WQL {scores.wql:.5f}  MASE {scores.mase:.4f}  {cost['train_seconds']:.0f} s"
            print(f"[{number}/{len(todo)}] {' '.join(map(str, cell))}: {text}", file=sys.stderr, flush=True)
    return failed


def baselines(task: Task, paths: int) -> dict[str, Predictor]:
    """The forecasts that stand beside every table."""
    found: dict[str, Predictor] = {"seasonal_naive": SeasonalNaive(task.seasonality), "persistence": Persistence()}
    if task.name.startswith("exchange_rate"):
        found["random_walk"] = BootstrapRandomWalk(paths)
    return found


def _fit(cell: Cell, root: Path, options: tuple[str, ...]) -> tuple[Scores, dict[str, float]]:
    folder = root / cell.task / cell.mixer / str(cell.seed)
    folder.mkdir(parents=True, exist_ok=True)
    command = [
        *(sys.executable, "-m", "tsgdn", "fit", "--config", cell.task, "--seed_everything", str(cell.seed)),
        *("--model.model.mixer", cell.mixer, "--model.model.mixer_args", json.dumps(MATCHED[cell.mixer])),
        *("--trainer.default_root_dir", str(folder), "--trainer.enable_progress_bar", "false", *options),
    ]
    begin = time.perf_counter()
    with (folder / "fit.log").open("w") as log:
        fit = subprocess.run(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
    if fit.returncode:
        last = (folder / "fit.log").read_text().strip().splitlines()[-1:]
        raise RuntimeError(f"fit ended with {fit.returncode}: {' '.join(last)}")
    seconds = time.perf_counter() - begin
    predictor = ModelPredictor(
        artefact.load(folder / "export"), calendar=bool(artefact.read_series_info(folder / "export")["calendar"])
    )
    scores = evaluate(predictor, find_task(cell.task), keep=False)
    return scores, {
        "train_seconds": seconds,
        "parameters": sum(p.numel() for p in predictor.model.parameters()),
        "mixer_state_bytes": state_bytes(predictor.model.initial_state(1, 1).backbone),
        "state_bytes": state_bytes(predictor.model.initial_state(1, 1)),
    }


UNITS = {"train_seconds": "s", "mixer_state_bytes": "B", "state_bytes": "B"}


def _rows(
    cell: Cell, config: str, scores: Scores, origin: dict[str, Any], cost: dict[str, float]
) -> list[dict[str, Any]]:
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
