"""What there is to run: units, cells and their names, presets, and the order in which things are done."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

from tsgdn.data.retention import SUITE_VERSION, TEST_GAPS, TRAIN_GAPS

Phase = Literal["validation", "report"]
LEARNING_RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
VALIDATION_SEEDS = (1000, 1001)
"""Disjoint from the report's 0, 1, ...: data and initial weights of the choice are never those of the claim."""
EDGES = {"low": (1e-4, 3e-5), "high": (1e-1, 3e-1)}
"""Learning rates that are tried when the best one is the lowest or the highest."""
PRIMARY = ("gated_deltanet", "gated_linear", "mamba2", "mamba2_heads")
SECOND = ("deltanet", "gated_deltanet2", "kda", "h1", "ham")
STAGES = "ABCDEF"


class Unit(NamedTuple):
    """What is compared over seeds: one task and one mixer at one size."""

    task: str
    mixer: str
    state_kib: int
    init: str = "horizon"
    depth: int = 2
    axes: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Preset:
    """Numbers of a run; all of them are part of a cell's name.

    Attributes:
        name: smoke or paper.
        steps: of training.
        batch: sequences of a training step, per replica.
        train_gaps: drawn with equal odds, one per step.
        test_gaps: scored.
        long_gap: gaps from here on take fewer sequences.
        sequences: scored in the report per gap, and where the gap is long.
        choice_sequences: the same on the validation split.
        groups: of sequences whose errors are kept apart, for intervals.
        learning_rates: from which each unit chooses; one alone is taken as it is.
        axes: of every task, unless the unit says otherwise.
        evidence: False marks rows and figures as a mere check that all runs.
        rates_of: learning rates of single mixers, where none is chosen.
    """

    name: str
    steps: int = 6000
    batch: int = 64
    train_gaps: tuple[int, ...] = TRAIN_GAPS
    test_gaps: tuple[int, ...] = TEST_GAPS
    long_gap: int = 8192
    sequences: tuple[int, int] = (2048, 512)
    choice_sequences: tuple[int, int] = (256, 64)
    groups: int = 128
    learning_rates: tuple[float, ...] = LEARNING_RATES
    axes: tuple[tuple[str, Any], ...] = ()
    evidence: bool = True
    rates_of: dict[str, float] = field(default_factory=dict, compare=False)

    def numbers(self) -> dict[str, Any]:
        """What enters a cell's name."""
        return {
            "steps": self.steps,
            "batch": self.batch,
            "train_gaps": list(self.train_gaps),
            "test_gaps": list(self.test_gaps),
            "sequences": [list(self.sequences), list(self.choice_sequences)],
        }


PAPER = Preset("paper")
SMOKE = Preset(
    "smoke",
    steps=400,
    batch=32,
    train_gaps=(16, 32),
    test_gaps=(32, 128),
    sequences=(256, 256),
    choice_sequences=(64, 64),
    groups=32,
    learning_rates=(3e-3,),
    axes=(("channels", 4), ("common", 4), ("rare", 2)),
    evidence=False,
    rates_of={"mamba2": 1e-2, "mamba2_heads": 1e-2},
)
PRESETS = {"smoke": SMOKE, "paper": PAPER}


class Cell(NamedTuple):
    """One training and its scores."""

    preset: Preset
    unit: Unit
    lr: float
    seed: int
    phase: Phase

    def content(self) -> dict[str, Any]:
        """All that determines the numbers, as plain values."""
        unit = self.unit._asdict() | {"axes": dict(self.axes())}
        named = {"suite": SUITE_VERSION, "preset": self.preset.name, **self.preset.numbers(), **unit}
        return named | {"lr": self.lr, "seed": self.seed, "phase": self.phase}

    def axes(self) -> tuple[tuple[str, Any], ...]:
        """Arguments of the generator."""
        return tuple(sorted((dict(self.preset.axes) | dict(self.unit.axes)).items()))

    @property
    def id(self) -> str:
        """Sixteen hexadecimal digits; the name of its file."""
        return name_of(self.content())


def name_of(content: Any) -> str:
    """A hash of the canonical JSON."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Group(NamedTuple):
    """Cells that differ in learning rate and seed only: they train side by side."""

    cells: tuple[Cell, ...]

    @property
    def first(self) -> Cell:
        """Any of them: what they have in common."""
        return self.cells[0]

    @property
    def id(self) -> str:
        """Of the checkpoint."""
        return name_of([cell.id for cell in self.cells])

    def describe(self) -> str:
        """For a line of progress."""
        unit, rates = self.first.unit, sorted({cell.lr for cell in self.cells})
        more = " ".join(f"{key}={value}" for key, value in unit.axes)
        what = f"{unit.task} {unit.mixer} {unit.state_kib} KiB" + (f" {more}" if more else "")
        seeds = len({cell.seed for cell in self.cells})
        told = ", ".join(f"{rate:g}" for rate in rates)
        return f"{what}, {self.first.phase}: {len(self.cells)} replicas ({seeds} seeds, lr {told})"


class Entry(NamedTuple):
    """A unit in the plan."""

    stage: str
    unit: Unit
    seeds: int


def plan(
    preset: Preset,
    *,
    tasks: Sequence[str] | None = None,
    mixers: Sequence[str] | None = None,
    sizes: Sequence[int] | None = None,
    seeds: int | None = None,
    shard: tuple[int, int] = (0, 1),
) -> list[Entry]:
    """The units in their order; asking for tasks, mixers or sizes narrows the plan, and stages without any stay out.

    What is asked for and stands in no stage is added at the end, at the default axes.

    Args:
        preset: smoke or paper.
        tasks: names; None = all of the plan.
        mixers: names; None = all of the plan.
        sizes: KiB of state per layer.
        seeds: of the report, in the place of the plan's numbers.
        shard: (i, n): the i-th of n parts, counted from 0.
    """
    whole = list(_smoke() if preset.name == "smoke" else _paper())
    kept = [
        entry
        for entry in whole
        if (tasks is None or entry.unit.task in tasks)
        and (mixers is None or entry.unit.mixer in mixers)
        and (sizes is None or entry.unit.state_kib in sizes)
    ]
    found = {(e.unit.task, e.unit.mixer, e.unit.state_kib) for e in kept}
    first = [e for e in whole if e.stage == whole[0].stage]
    asked_tasks = tasks or list(dict.fromkeys(e.unit.task for e in kept or first))
    asked_mixers = mixers or list(dict.fromkeys(e.unit.mixer for e in kept or first))
    asked_sizes = sizes or ([2] if preset.name == "smoke" else [4, 16] if (tasks and mixers) else [])
    if tasks or mixers or sizes:
        for size in asked_sizes:
            for task in asked_tasks:
                for mixer in asked_mixers:
                    if (task, mixer, size) not in found:
                        kept.append(Entry("X", Unit(task, mixer, size), 3))
    if seeds is not None:
        kept = [entry._replace(seeds=seeds) for entry in kept]
    part, parts = shard
    units = list(dict.fromkeys(_chooser(entry.unit) for entry in kept))
    return [entry for entry in kept if units.index(_chooser(entry.unit)) % parts == part]


def _chooser(unit: Unit) -> Unit:
    """The unit whose choice of the learning rate holds for this one: the rate is chosen per task, mixer and size."""
    return unit._replace(axes=())


def chooser(unit: Unit) -> Unit:
    """The unit whose choice of the learning rate holds for `unit`: that with the default axes."""
    return _chooser(unit)


def _smoke() -> Iterator[Entry]:
    for mixer in ("gated_deltanet", "gated_linear", "mamba2"):
        yield Entry("S", Unit("T2", mixer, 2), 1)


def _paper() -> Iterator[Entry]:
    for mixers, stage, seeds in ((PRIMARY, "A", 10), (SECOND, "B", 5)):
        for size in (4, 16):
            for task in ("T2", "T3", "T5"):
                yield from _all(stage, [task], mixers, size, seeds)
    delta = ("gated_deltanet", "gated_linear", "gated_deltanet2", "kda")
    for kap in (0, 0.6, 0.9):
        for load in (4, 8, 16):
            if (kap, load) != (0, 8):
                yield from _all("C", ["T5"], delta, 16, 3, common=load, similarity=kap)
    yield from _all("C", ["T6"], delta, 16, 3)
    for channels, chance in ((2, 0.25), (32, 0.25), (8, 0), (8, 1)):
        yield from _all("C", ["T6"], delta, 16, 3, channels=channels, coincidence=chance)
    wide = (*PRIMARY, "gated_deltanet2", "ham")
    for pairs in (4, 8, 16, 32, 64):
        yield from _all("D", ["T4"], wide, 16, 3, **({} if pairs == 8 else {"pairs": pairs}))
    yield from _all("D", ["T7", "T8"], wide, 16, 3)
    yield from _all("E", ["T3", "T5", "T7", "T8"], ("oryx", "sliding_window_attention", "rwkv7", "mamba3"), 16, 3)
    for depth, mixer in ((3, "h2"), (4, "hybrid_3to1"), (4, "gated_deltanet")):
        for task in ("T3", "T5"):
            yield Entry("E", Unit(task, mixer, 16, depth=depth), 3)
    yield from _all("F", ["T1", "T9b"], PRIMARY, 16, 3)
    for init in ("paper", "shared"):
        for mixer in PRIMARY:
            yield Entry("F", Unit("T3", mixer, 16, init=init), 3)
    for size in (1, 64):
        yield from _all("F", ["T3"], PRIMARY, size, 3)


def _all(
    stage: str, tasks: Sequence[str], mixers: Sequence[str], size: int, seeds: int, **axes: Any
) -> Iterator[Entry]:
    for task in tasks:
        for mixer in mixers:
            yield Entry(stage, Unit(task, mixer, size, axes=tuple(sorted(axes.items()))), seeds)


def validation(preset: Preset, unit: Unit, rates: Iterable[float]) -> Group:
    """The cells among which the unit's learning rate is chosen."""
    cells = (Cell(preset, unit, lr, seed, "validation") for lr in rates for seed in VALIDATION_SEEDS)
    return Group(tuple(cells))


def report(preset: Preset, unit: Unit, lr: float, seeds: int) -> Group:
    """The cells that count."""
    return Group(tuple(Cell(preset, unit, lr, seed, "report") for seed in range(seeds)))


def choose(scores: dict[float, float]) -> tuple[float, tuple[float, ...]]:
    """The best learning rate by its validation score; and what to try further, where the best is at an edge.

    Args:
        scores: mean over the validation seeds, by learning rate.
    """
    best = max(scores, key=lambda lr: (scores[lr], -lr))
    further: tuple[float, ...] = ()
    if len(scores) > 1 and best == min(scores):
        further = tuple(lr for lr in EDGES["low"] if lr < best)[:1]
    elif len(scores) > 1 and best == max(scores):
        further = tuple(lr for lr in EDGES["high"] if lr > best)[:1]
    return best, further


def with_steps(preset: Preset, steps: int | None) -> Preset:
    """The preset with another number of steps, for all mixers alike."""
    return preset if steps is None else replace(preset, steps=steps)
