"""Accuracy of every mixer in one harness: same encoder, head, budget, seeds, parameters and state bytes.

Each cell is scored on the task's published windows, beside the naive forecasts.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from tsgdn.adapters.predictor import ModelPredictor
from tsgdn.bench import fits
from tsgdn.bench.record import append, provenance
from tsgdn.data.catalog import Task
from tsgdn.data.module import find_task
from tsgdn.evaluation.backtest import Predictor, Scores, evaluate
from tsgdn.evaluation.baselines import BootstrapRandomWalk, Persistence, SeasonalNaive


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
        mixers: mixers and hybrids.
        seeds: of fits.
        results: CSV to append to.
        root: folder of the fits.
        workers: fits at a time, one thread each.
        options: handed on to `tsgdn fit`.
        paths: of the bootstrap random walk.
    """
    known = fits.done(results)
    origin = provenance()
    for name in tasks:
        task = find_task(name)
        for model, baseline in baselines(task, paths).items():
            if (name, model, "", "") not in known:
                scores = evaluate(baseline, task, keep=False)
                append(results, *fits.rows(fits.Cell(name, model, ""), "", scores, origin, {}))
                print(f"{name}: {model} scored", file=sys.stderr, flush=True)
    wanted = list(fits.cells(tasks, mixers, seeds))
    return fits.run(wanted, _test, results=results, root=root, origin=origin, workers=workers, options=options)


def _test(predictor: ModelPredictor, task: str) -> Scores:
    return evaluate(predictor, find_task(task), keep=False)


def baselines(task: Task, paths: int) -> dict[str, Predictor]:
    """The forecasts that stand beside every table."""
    found: dict[str, Predictor] = {"seasonal_naive": SeasonalNaive(task.seasonality), "persistence": Persistence()}
    if task.name.startswith("exchange_rate"):
        found["random_walk"] = BootstrapRandomWalk(paths)
    return found
