"""Runs the plan: learning rates first, then what counts; within a budget, cell by cell, any number of times."""

import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tsgdn.bench.record import provenance
from tsgdn.bench.retention import cells, figures, mechanism, real, references, report, rows, scoring, training
from tsgdn.bench.retention.blocks import Feed, shape_of
from tsgdn.bench.retention.cells import Cell, Entry, Group, Preset
from tsgdn.bench.retention.training import FIXED_GAPS, Clock, Trained, say
from tsgdn.evaluation.retention import aurc, retention

LEAST_SECONDS = 15.0
REFERENCE_SECONDS = 30.0
"""Of a budget: with less left, no group is begun."""
PIECE_SECONDS = 540.0
PLAN_STEPS = 20
STREAMS, LATENCY_CALLS = (1, 1024), 5
PROBED = 3
"""Cells of a group whose memories are looked into: this runs on the CPU while the GPU waits."""


@dataclass(frozen=True)
class Options:
    """What the command line says.

    Attributes:
        preset: with its steps already set.
        entries: the plan.
        out: folder that holds everything.
        device: cpu or cuda.
        budget: seconds; None = all the time there is.
        workers: processes that make data.
        replicas: most of them that train side by side.
    """

    preset: Preset
    entries: Sequence[Entry]
    out: Path
    device: str = "cpu"
    budget: float | None = None
    workers: int = 0
    replicas: int = 16


class Store:
    """Cells on disk, one JSON file each, written beside and then put in place."""

    def __init__(self, out: Path) -> None:
        self.out, self.folder = out, out / "cells"
        self.folder.mkdir(parents=True, exist_ok=True)
        for whole in sorted((out / "pending").glob("*.json")):  # a run was killed between the files of a group
            self._split(whole)
        self.cells = {path.stem: json.loads(path.read_text("utf-8")) for path in sorted(self.folder.glob("*.json"))}

    def __contains__(self, cell: Cell) -> bool:
        return cell.id in self.cells

    def add(self, name: str, found: Sequence[dict[str, Any]]) -> None:
        """All cells of a group, or none."""
        pending = self.out / "pending" / f"{name}.json"
        pending.parent.mkdir(exist_ok=True)
        _write(pending, list(found))
        self._split(pending)
        self.cells |= {cell["id"]: cell for cell in found}

    def _split(self, whole: Path) -> None:
        for cell in json.loads(whole.read_text("utf-8")):
            _write(self.folder / f"{cell['id']}.json", cell)
        whole.unlink()


def run(options: Options) -> dict[str, Any]:
    """Does what is left of the plan, as far as the budget goes, and renders rows, figures and report.

    Returns:
        done and cells (counts), failed groups, references out of their bounds, out, and the path of the report.
    """
    clock, store = Clock(options.budget), Store(options.out)
    origin = provenance(options.device)
    _write(options.out / "env.json", origin | {"python": sys.version.split()[0], "numpy": np.__version__})
    feed = Feed(options.workers)
    failed: set[str] = set()
    slowest, worked = 30.0 if options.device.startswith("cuda") else 2.0, False
    least = LEAST_SECONDS if options.budget is None else min(LEAST_SECONDS, options.budget / 4)
    try:
        for group in _todo(options, store, failed):
            if clock.left() < least:
                break
            told, total = _counts(options, store)
            say(f"[{told}/{total}] {group.describe()}")
            trained: Trained | None = None
            try:
                trained = training.train(
                    group, feed=feed, device=options.device, folder=options.out / "checkpoints", clock=clock
                )
                if trained is None:
                    break
                worked = worked or trained.steps > 0
                if worked and clock.left() < slowest:  # scores are for the next piece, which begins with them
                    break
                begin = time.monotonic()
                store.add(group.id, _finish(group, trained, options, feed, origin, store))
                slowest, worked = max(slowest, time.monotonic() - begin), True
            except (RuntimeError, ValueError, FloatingPointError) as error:
                failed.add(group.id)
                say(f"  failed: {error}")
                continue
            finally:
                trained = None  # its memory is wanted for the next group
            (options.out / "checkpoints" / f"{group.id}.pt").unlink(missing_ok=True)
    finally:
        feed.close()
    checks = options.out / "references.json"
    if not checks.is_file() and clock.left() > REFERENCE_SECONDS:
        say("references")
        _write(checks, references.stamped(references.measure(), origin, options.preset.name))
    done, total = _counts(options, store)
    say(f"{done} of {total} cells done" + (f", {len(failed)} groups failed" if failed else ""))
    path = render(options.out, list(store.cells.values()))
    return {
        "done": done,
        "cells": total,
        "failed": len(failed),
        "checks_failed": 0 if path is None else rows.out_of_bounds(report.read(options.out / "results.csv")),
        "out": str(options.out),
        "report": None if path is None else str(path),
    }


def run_real(
    sets: Sequence[str],
    mixers: Sequence[str],
    seeds: int,
    *,
    out: Path,
    device: str = "cpu",
    budget: float | None = None,
    epochs: int = 12,
) -> dict[str, Any]:
    """Measures what is left of the real sets, and renders; counts and paths as of `run`.

    Args:
        sets: of `real.SETS`.
        mixers: names.
        seeds: 0 to `seeds` - 1.
        out: folder that holds everything.
        device: cpu or cuda.
        budget: seconds; a fit is not begun when the slowest so far would not fit in.
        epochs: at most, per fit.

    Raises:
        DataNotFound: a set is not here.
    """
    clock, origin = Clock(budget), provenance(device)
    wanted = [(name, mixer, seed) for seed in range(seeds) for name in sets for mixer in mixers]
    for name in sets:
        real.marked(name)
    slowest, failed = 0.0, 0
    for number, (name, mixer, seed) in enumerate(wanted, 1):
        path = out / "real" / f"{name}-{mixer}-{seed}-{epochs}.json"
        if path.is_file() or clock.left() < slowest:
            continue
        begin = time.monotonic()
        try:
            found = real.measure(name, mixer, seed, epochs=epochs, accelerator="gpu" if device == "cuda" else "cpu")
        except (RuntimeError, ValueError) as error:
            failed += 1
            say(f"[{number}/{len(wanted)}] {name} {mixer} {seed}: {error}")
            continue
        real.write(path, found, origin)
        slowest = max(slowest, time.monotonic() - begin)
        told = ", ".join(f"{low} days {ratio:.2f}" for low, ratio, _ in found["bins"])
        say(f"[{number}/{len(wanted)}] {name} {mixer} {seed}: {told}")
    done = sum((out / "real" / f"{name}-{mixer}-{seed}-{epochs}.json").is_file() for name, mixer, seed in wanted)
    say(f"{done} of {len(wanted)} fits done")
    path = render(out, list(Store(out).cells.values()))
    told = None if path is None else str(path)
    return {"done": done, "cells": len(wanted), "failed": failed, "checks_failed": 0, "out": str(out), "report": told}


def render(out: Path, found: Sequence[dict[str, Any]]) -> Path | None:
    """Writes results.csv from the cells, then figures and report.md from results.csv alone."""
    measured = [json.loads(path.read_text("utf-8")) for path in sorted((out / "real").glob("*.json"))]
    if not found and not measured:
        return None
    ordered = sorted(found, key=lambda cell: json.dumps(cell["cell"], sort_keys=True))
    checks = out / "references.json"
    known = json.loads(checks.read_text("utf-8")) if checks.is_file() else []
    report.write(out / "results.csv", rows.of_references(known) + rows.rows(ordered) + rows.of_real(measured))
    lines = report.read(out / "results.csv")
    figures.draw(lines, out / "figures")
    path = out / "report.md"
    path.write_text(report.render(lines), encoding="utf-8")
    return path


def _todo(options: Options, store: Store, failed: set[str]) -> Iterator[Group]:
    """Groups in the order of the plan, always the first that has something missing."""
    for entry in options.entries:
        while True:
            group = next_group(options.preset, entry, store)
            if group is None:
                break
            group = Group(group.cells[: options.replicas])
            if group.id in failed:
                break
            before = len(store.cells)
            yield group
            if len(store.cells) == before and group.id not in failed:
                return


def next_group(preset: Preset, entry: Entry, store: Store) -> Group | None:
    """What the unit needs next: the cells of the choice, further learning rates, the report; None = all is done."""
    lr, group = _rate(preset, entry, store)
    if lr is not None:
        group = cells.report(preset, entry.unit, lr, entry.seeds)
    missing = tuple(cell for cell in group.cells if cell not in store) if group else ()
    return Group(missing) if missing else None


def _rate(preset: Preset, entry: Entry, store: Store) -> tuple[float | None, Group | None]:
    """The unit's learning rate, or the group that must be done to know it."""
    if len(preset.learning_rates) == 1:
        return preset.rates_of.get(entry.unit.mixer, preset.learning_rates[0]), None
    rates = list(preset.learning_rates)
    while True:
        group = cells.validation(preset, cells.chooser(entry.unit), rates)
        if any(cell not in store for cell in group.cells):
            return None, group
        scores = {
            lr: float(np.mean([merit(store.cells[cell.id]) for cell in group.cells if cell.lr == lr])) for lr in rates
        }
        best, further = cells.choose(scores)
        if not further:
            return best, None
        rates += further


def merit(cell: dict[str, Any]) -> float:
    """By which learning rates are chosen: the mean of the AURC of rare and of common probes, as both enter the loss."""
    if cell["diverged"]:
        return -1.0
    kinds = [part for part in rows.parts(cell) if part in ("rare", "common")]
    return float(np.mean([aurc(rows.curve(cell, part)[1]) for part in kinds]))


def _finish(
    group: Group, trained: Trained, options: Options, feed: Feed, origin: dict[str, Any], store: Store
) -> list[dict[str, Any]]:
    """Scores the trained replicas and makes their files' content."""
    replicas = trained.replicas
    scores = scoring.score(group, replicas, feed=feed, device=options.device)
    held: list[dict[str, float]] = [{} for _ in group.cells]
    if group.first.phase == "report":
        held = scoring.controls(group, replicas, feed=feed, device=options.device)
    size = training.sizes_of(group.first)
    model, shape = replicas.replica(0), shape_of(group.first.unit.task, group.first.axes())
    about = {
        "state_bytes": size.state_bytes,
        "parameters": sum(p.numel() for p in model.parameters()),
        "backbone_parameters": size.parameters,
        "load": shape.load,
        "channels": shape.outputs,
    }
    latency = _latency(model, shape.inputs, options.device) if group.first.phase == "report" else {}
    found = []
    diverged = replicas.failed.cpu().tolist()
    for r, cell in enumerate(group.cells):
        found.append(
            {
                "id": cell.id,
                "cell": cell.content(),
                "size": about,
                "origin": origin,
                "diverged": bool(diverged[r]),
                "choice": _choice(options.preset, group, store, cell),
                "cost": {"train_seconds": round(trained.seconds, 3), "replicas": len(group.cells)},
                "scores": scores[r],
                "controls": held[r],
                "latency": latency,
                "probes": _probed(cell, replicas, r) if r < PROBED and cell.phase == "report" else {},
            }
        )
        ret = retention(rows.errors(found[-1], "rare"), rows.errors(found[-1], "rare", "base"))
        say(f"  lr {cell.lr:g} seed {cell.seed}: rare Ret " + " ".join(f"{x:.3f}" for x in ret))
    return found


@torch.no_grad()
def _latency(model: Any, inputs: int, device: str) -> dict[str, float]:
    """Microseconds of one token of 1 and of many streams, after some: the median of a few stretches, eager."""
    out = {}
    for streams in STREAMS:
        x = torch.randn(streams, 16, inputs, device=device)
        _, state = model(x)
        spent = []
        for _ in range(5):
            _wait(device)
            begin = time.perf_counter()
            for _ in range(LATENCY_CALLS):
                model(x[:, :1], state=state)
            _wait(device)
            spent.append((time.perf_counter() - begin) / LATENCY_CALLS)
        out[f"step_us_{streams}"] = float(f"{1e6 * float(np.median(spent)):.4g}")
    return out


def _probed(cell: Cell, replicas: Any, r: int) -> dict[str, float]:
    """Where the memory is linear in its writes: what became of them."""
    unit = cell.unit
    if unit.mixer not in mechanism.LINEAR or unit.task not in mechanism.TASKS:
        return {}
    gap = min(512, max(cell.preset.test_gaps))
    found = mechanism.probe(replicas.replica(r).cpu(), unit.task, dict(cell.axes()), gap=gap, seed=cell.seed)
    return {name: float(f"{value:.6g}") for name, value in found.items() if np.isfinite(value)}


def _choice(preset: Preset, group: Group, store: Store, cell: Cell) -> float | None:
    """The validation score of the learning rate that the report uses."""
    if cell.phase == "validation" or len(preset.learning_rates) == 1:
        return None
    unit = cells.chooser(cell.unit)
    chosen = [c for c in cells.validation(preset, unit, [cell.lr]).cells if c in store]
    return float(f"{np.mean([merit(store.cells[c.id]) for c in chosen]):.6g}")


def _counts(options: Options, store: Store) -> tuple[int, int]:
    """Cells that are done and cells of the plan; learning rates beyond the edges are not foreseen."""
    wanted: set[str] = set()
    for entry in options.entries:
        if len(options.preset.learning_rates) > 1:
            choice = cells.validation(options.preset, cells.chooser(entry.unit), options.preset.learning_rates)
            wanted |= {cell.id for cell in choice.cells}
    done = len(wanted & set(store.cells))
    total = len(wanted)
    for entry in options.entries:
        lr, _ = _rate(options.preset, entry, store)
        total += entry.seeds
        if lr is not None:
            done += sum(cell in store for cell in cells.report(options.preset, entry.unit, lr, entry.seeds).cells)
    return done, total


def estimate(options: Options) -> list[dict[str, Any]]:
    """Times some training steps of every unit of the plan: seconds per step over the training gaps, cells, hours."""
    feed = Feed(0)
    out = []
    timed: dict[Any, float] = {}
    for entry in options.entries:
        count = min(options.replicas, max(entry.seeds, 1))
        unit = entry.unit
        shape = shape_of(unit.task, Cell(options.preset, unit, 0.0, 0, "report").axes())
        key = (shape.inputs, shape.outputs, unit.mixer, unit.state_kib, unit.depth, count, unit.task in FIXED_GAPS)
        if key not in timed:
            timed[key] = _seconds_per_step(options, entry, count, feed)
            say(f"{unit.task} {unit.mixer} {unit.state_kib} KiB: {1e3 * timed[key]:.1f} ms a step of {count} replicas")
        own = len(options.preset.learning_rates) > 1 and cells.chooser(unit) == unit
        groups = -(-entry.seeds // options.replicas) + (1 if own else 0)
        total = entry.seeds + (len(options.preset.learning_rates) * len(cells.VALIDATION_SEEDS) if own else 0)
        seconds = timed[key] * options.preset.steps * groups
        out.append({"stage": entry.stage, **unit._asdict(), "cells": total, "seconds": round(seconds, 1)})
    return out


def table(found: Sequence[dict[str, Any]]) -> str:
    """The plan as lines of text: a stage's cells, hours and pieces of 540 s."""
    out = ["stage  cells  hours  pieces"]
    for stage in dict.fromkeys(entry["stage"] for entry in found):
        own = [entry for entry in found if entry["stage"] == stage]
        count, seconds = sum(e["cells"] for e in own), sum(e["seconds"] for e in own)
        out.append(f"{stage:<5}  {count:>5}  {seconds / 3600:>5.2f}  {math.ceil(seconds / PIECE_SECONDS):>6}")
    total = sum(entry["seconds"] for entry in found)
    count = sum(entry["cells"] for entry in found)
    out.append(f"all    {count:>5}  {total / 3600:>5.2f}  {math.ceil(total / PIECE_SECONDS):>6}")
    return "\n".join(out)


def _seconds_per_step(options: Options, entry: Entry, count: int, feed: Feed) -> float:
    preset = cells.with_steps(options.preset, max(PLAN_STEPS, options.preset.steps))
    group = cells.report(preset, entry.unit, 1e-3, count)
    replicas = training.replicas_of(group, options.device)
    fixed, gaps = FIXED_GAPS.get(entry.unit.task), sorted(options.preset.train_gaps)
    timed = (fixed,) if fixed is not None else (gaps[0], gaps[-1])
    spent = []
    for gap in timed:
        batch = training.batch_of(group, gap, feed, options.device)
        each = []
        for _ in range(PLAN_STEPS // len(timed)):
            _wait(options.device)
            begin = time.perf_counter()
            replicas.step(batch)
            _wait(options.device)
            each.append(time.perf_counter() - begin)
        spent.append(float(np.median(each)))
    if len(spent) == 1:
        return spent[0]
    return float(np.mean(np.interp(gaps, timed, spent)))  # a step costs a constant and so much per token


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(content, separators=(",", ":")) + "\n", encoding="utf-8")
    os.replace(beside, path)
