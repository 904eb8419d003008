"""Regime retention: seeded tasks that ask what a memory keeps of a regime that comes back rarely."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tsgdn.data.retention.batch import (
    COMMON_PROBE,
    OTHER,
    RARE_PROBE,
    REENTRY,
    SPLITS,
    SUITE_VERSION,
    TEST_GAPS,
    TRAIN_GAPS,
    WITHIN,
    RegimeBatch,
    Streams,
    Tokens,
    arrays,
    digest,
    draw_codes,
    loss_weight,
    tokens,
)
from tsgdn.data.retention.channels import crossed_channels, split_channels
from tsgdn.data.retention.dynamics import action_effects, bound_topologies
from tsgdn.data.retention.recall import CONTROLS, numeric_recall, repeat_haystack, revisited_regimes
from tsgdn.data.retention.switching import hidden_phase, reentries, switching_var

__all__ = [
    "TASKS",
    "block",
    "training_gap",
    "write_blocks",
    "RegimeBatch",
    "Tokens",
    "tokens",
    "loss_weight",
    "arrays",
    "digest",
    "draw_codes",
    "split_channels",
    "reentries",
    "Streams",
    "CONTROLS",
    "SPLITS",
    "SUITE_VERSION",
    "TRAIN_GAPS",
    "TEST_GAPS",
    "WITHIN",
    "REENTRY",
    "RARE_PROBE",
    "COMMON_PROBE",
    "OTHER",
]

TASKS: dict[str, tuple[int, Callable[..., RegimeBatch], dict[str, Any]]] = {
    "T1": (1, repeat_haystack, {}),
    "T2": (2, revisited_regimes, {"task": "T2", "channels": 1}),
    "T2e": (10, revisited_regimes, {"task": "T2e", "channels": 1, "events": True}),
    "T3": (3, revisited_regimes, {"task": "T3"}),
    "T4": (4, numeric_recall, {}),
    "T5": (5, revisited_regimes, {"task": "T5", "revisions": 1}),
    "T6": (6, crossed_channels, {}),
    "T7": (7, action_effects, {}),
    "T8": (8, bound_topologies, {}),
    "T9": (9, switching_var, {}),
    "T9b": (11, hidden_phase, {}),
}
"""Name: its number in the seed, the generator, and what the task sets of the generator's arguments."""
_UNGAPPED = {"T4": 0, "T9": 8192}
_GAP = 1000


def block(
    task: str, *, index: int, seed: int = 0, split: str = "train", batch: int = 64, gap: int | None = None, **axes: Any
) -> RegimeBatch:
    """One block of a task, from its seed alone: training step, or part of a validation or test set.

    Args:
        task: one of `TASKS`.
        index: number of the block; in training the step.
        seed: of the data; paired mixers share it.
        split: `train`, `validation` or `test`: never the same random numbers.
        batch: sequences.
        gap: steps; None draws one of `TRAIN_GAPS` for the block (T4: none; T9: a length of 8192).
        **axes: arguments of the generator.

    Raises:
        ValueError: the task is unknown, or an argument is out of range.
    """
    number, generator, defaults = _task(task)
    streams = Streams(task=number, seed=seed, split=split, block=index)
    if gap is None:
        gap = _UNGAPPED[task] if task in _UNGAPPED else training_gap(streams)
    return generator(streams, batch=batch, gap=gap, **(defaults | axes))


def training_gap(streams: Streams, gaps: Sequence[int] = TRAIN_GAPS) -> int:
    """The gap that all sequences of a training block share: each of `gaps` as likely."""
    return int(streams(_GAP).choice(np.asarray(gaps)))


def write_blocks(
    out: str | Path,
    *,
    task: str,
    blocks: int,
    seed: int = 0,
    split: str = "test",
    gap: int | None = None,
    batch: int = 64,
    **axes: Any,
) -> Path:
    """Writes blocks as block-00000.npz, ... and meta.json: parameters, versions of suite and NumPy, SHA-256 per block.

    The digest is that of the arrays, not of the file, whose bytes depend on the compressor.

    Returns:
        The path of meta.json.

    Raises:
        ValueError: fewer than one block, or as in `block`.
    """
    if blocks < 1:
        raise ValueError(f"blocks is {blocks}, expected at least 1")
    _task(task)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    hashes, meta = {}, {}
    for index in range(blocks):
        drawn = block(task, index=index, seed=seed, split=split, gap=gap, batch=batch, **axes)
        name = f"block-{index:05d}.npz"
        np.savez_compressed(folder / name, allow_pickle=False, **arrays(drawn))
        hashes[name] = {"sha256": digest(drawn), "gap": drawn.meta["gap"]}
        meta = dict(drawn.meta)
    if gap is None and task not in _UNGAPPED:
        meta["gap"] = None
    content = {
        "suite": SUITE_VERSION,
        "numpy": np.__version__,
        "task": task,
        "seed": seed,
        "split": split,
        "batch": batch,
        "parameters": meta,
        "blocks": hashes,
    }
    path = folder / "meta.json"
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return path


def _task(name: str) -> tuple[int, Callable[..., RegimeBatch], dict[str, Any]]:
    if name not in TASKS:
        raise ValueError(f"task {name!r} is not known; use one of {', '.join(TASKS)}")
    return TASKS[name]
