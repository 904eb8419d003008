"""Trains the cells of a group side by side, within a budget of time, and goes on where it was stopped."""

import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tsgdn.bench.matching import Matched, regime_sizes, regime_width
from tsgdn.bench.retention.blocks import Feed, Request, gap_of_step, shape_of
from tsgdn.bench.retention.cells import Cell, Group
from tsgdn.bench.retention.model import RegimeModel, assemble, loss
from tsgdn.training.replicas import Replicas

CHECKPOINT_SECONDS = 60.0
TELL_SECONDS = 20.0
FIXED_GAPS = {"T4": 0, "T9": 1024}
"""Tasks whose training streams have one length: T4 has no gap, of T9 it is the length of the whole stream."""
IN_FLIGHT = 16
"""Steps after which the host waits for the device, so that it does not run ahead with memory in its hands."""


class Clock:
    """What is left of a budget of seconds; without one, time does not end."""

    def __init__(self, budget: float | int | None = None) -> None:
        self._end = None if budget is None else time.monotonic() + budget

    def left(self) -> float:
        """Seconds until the end."""
        return float("inf") if self._end is None else self._end - time.monotonic()


def say(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)


def sizes_of(cell: Cell) -> Matched:
    """The backbone of a cell."""
    unit = cell.unit
    return regime_sizes(unit.mixer, state_kib=unit.state_kib, depth=unit.depth, init=unit.init)


def replicas_of(group: Group, device: str) -> Replicas:
    """The untrained replicas of a group."""
    first = group.first
    sizes, unit = sizes_of(first), first.unit
    shape = shape_of(unit.task, first.axes())
    width = regime_width(unit.state_kib)
    return Replicas(
        lambda: RegimeModel(shape.inputs, shape.outputs, width=width, depth=unit.depth, sizes=sizes),
        seeds=[cell.seed for cell in group.cells],
        learning_rates=[cell.lr for cell in group.cells],
        loss=loss,
        steps=first.preset.steps,
        device=device,
    )


def data_seeds(group: Group) -> tuple[tuple[int, ...], list[int]]:
    """The seeds whose data is drawn, and for each replica the place of its own: learning rates share data."""
    seeds = tuple(dict.fromkeys(cell.seed for cell in group.cells))
    return seeds, [seeds.index(cell.seed) for cell in group.cells]


class Trained(NamedTuple):
    """Replicas after their last step, the seconds that all their steps took, and how many were taken just now."""

    replicas: Replicas
    seconds: float
    steps: int


def train(
    group: Group, *, feed: Feed, device: str, folder: Path, clock: Clock, reserve: float | int = 5.0
) -> Trained | None:
    """Trains a group to its last step, or as far as the time goes.

    Args:
        group: cells of one unit.
        feed: makes the blocks.
        device: where to train.
        folder: of the checkpoints.
        clock: the budget.
        reserve: seconds of it that are kept for the checkpoint.

    Returns:
        What was trained; None where the time has run out: all is on disk.
    """
    replicas, place = replicas_of(group, device), folder / f"{group.id}.pt"
    spent = 0.0
    if place.is_file():
        saved = torch.load(place, map_location="cpu", weights_only=True)
        replicas.load_state_dict(saved["replicas"])
        spent = float(saved["seconds"])
    steps = group.first.preset.steps
    if replicas.steps_done >= steps:
        return Trained(replicas, spent, 0)
    begin = stored = told = time.monotonic()
    first = replicas.steps_done
    losses: Tensor | None = None
    batches = batches_of(group, first, feed, device)
    for step, batch in enumerate(batches, first):
        losses = replicas.step(batch)
        if device.startswith("cuda") and step % IN_FLIGHT == 0:
            torch.cuda.synchronize()
        now = time.monotonic()
        out_of_time = clock.left() < reserve
        if now - told > TELL_SECONDS:
            told = now
            each = (now - begin) / (step + 1 - first)
            say(f"  step {step + 1} of {steps}, {1e3 * each:.0f} ms each, loss {_told(losses)}")
        if (out_of_time or now - stored > CHECKPOINT_SECONDS) and step + 1 < steps:
            save(place, replicas, spent + now - begin)
            stored = time.monotonic()
            if out_of_time:
                say(f"  out of time at step {step + 1} of {steps}; the next run goes on from here")
                return None
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    spent += time.monotonic() - begin
    save(place, replicas, spent)
    return Trained(replicas, spent, steps - first)


def batches_of(group: Group, first: int, feed: Feed, device: str) -> Iterator[dict[str, Tensor]]:
    """Batches of the steps from `first` on, leaves (R, B, ...)."""
    preset, unit, axes = group.first.preset, group.first.unit, group.first.axes()
    seeds, places = data_seeds(group)
    gaps = preset.train_gaps

    def requests() -> Iterator[Request]:
        for step in range(first, preset.steps):
            gap = FIXED_GAPS.get(unit.task)
            gap = gap_of_step(unit.task, step, gaps) if gap is None else gap
            yield Request(unit.task, axes, seeds, step, "train", gap, preset.batch)

    index = None if places == list(range(len(seeds))) else torch.tensor(places, device=device)
    for made in feed(requests()):
        yield _spread(assemble(on_device(made.fields, device)), index)


def batch_of(group: Group, gap: int, feed: Feed, device: str) -> dict[str, Tensor]:
    """A batch of that gap, to see how long a step takes."""
    preset, unit = group.first.preset, group.first.unit
    seeds, places = data_seeds(group)
    made = next(iter(feed([Request(unit.task, group.first.axes(), seeds[:1], 0, "train", gap, preset.batch)])))
    return _spread(assemble(on_device(made.fields, device)), torch.tensor([0] * len(places), device=device))


def _spread(batch: dict[str, Tensor], index: Tensor | None) -> dict[str, Tensor]:
    return batch if index is None else {name: leaf[index] for name, leaf in batch.items()}


def on_device(fields: Mapping[str, np.ndarray], device: str) -> dict[str, Tensor]:
    """Arrays as tensors; copies to a GPU do not wait."""
    found = {name: torch.from_numpy(array) for name, array in fields.items()}
    if device.startswith("cuda"):
        return {name: leaf.pin_memory().to(device, non_blocking=True) for name, leaf in found.items()}
    return found


def save(place: Path, replicas: Replicas, seconds: float) -> None:
    """Writes a checkpoint beside the old one, then takes its place."""
    place.parent.mkdir(parents=True, exist_ok=True)
    beside = place.with_suffix(".part")
    content: dict[str, Any] = {"replicas": replicas.state_dict(), "seconds": seconds}
    torch.save(content, beside)
    os.replace(beside, place)


def _told(losses: Tensor) -> str:
    found = losses.detach().float().cpu()
    return f"{found.min():.3g} to {found.max():.3g}"
