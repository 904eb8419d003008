"""Blocks of the retention tasks as the trainer and the scorer want them, made ahead of the GPU by worker processes.

NumPy only: the workers import nothing else. What travels is compact (values, cues, actions as drawn); tokens, which
say most of it twice, are put together on the device by `model.assemble`.
"""

import mmap
import multiprocessing
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tsgdn.data.retention import (
    COMMON_PROBE,
    RARE_PROBE,
    RegimeBatch,
    Streams,
    block,
    loss_weight,
    reentries,
    tokens,
    training_gap,
)
from tsgdn.data.retention import TASKS as GENERATORS
from tsgdn.evaluation.retention import probes, switching_errors

MEMORY, ROOM = Path("/dev/shm"), 8 << 30
PROBED: dict[str, dict[str, Any]] = {"T7": {"do": "none"}, "T8": {"impulse": 0}}
"""Streams that are forked when they are scored are drawn with this branch; the others differ in one step."""


class Request(NamedTuple):
    """What one worker makes at a time: the block of one number for each of some data seeds.

    Attributes:
        task: its name.
        axes: arguments of the generator, as sorted pairs.
        seeds: of the data.
        index: number of the block.
        split: train, validation or test.
        gap: of all seeds alike, hence one length.
        batch: sequences per seed.
        questions: whether the probes are wanted too, as in scoring.
    """

    task: str
    axes: tuple[tuple[str, Any], ...]
    seeds: tuple[int, ...]
    index: int
    split: str
    gap: int | None
    batch: int
    questions: bool = False


class Made(NamedTuple):
    """What comes back: fields (S, B, T, .), and what is asked of them (S, B, P, ...)."""

    fields: dict[str, np.ndarray]
    questions: dict[str, np.ndarray]


def gap_of_step(task: str, step: int, gaps: Iterable[int]) -> int:
    """The gap of a training step: one for all seeds and mixers, so that replicas share a length."""
    return training_gap(Streams(task=GENERATORS[task][0], seed=0, split="train", block=step), tuple(gaps))


def make(request: Request) -> Made:
    """Draws the blocks of a request and stacks them along a leading axis of seeds."""
    axes = dict(request.axes)
    if request.questions:
        axes |= PROBED.get(request.task, {})
    drawn = [
        block(
            request.task,
            index=request.index,
            seed=seed,
            split=request.split,
            gap=request.gap,
            batch=request.batch,
            **axes,
        )
        for seed in request.seeds
    ]
    asked = _stack([_questions(batch) for batch in drawn]) if request.questions else {}
    return Made(_stack([fields(batch) for batch in drawn]), asked)


def fields(batch: RegimeBatch) -> dict[str, np.ndarray]:
    """The arrays of a batch that its tokens, targets and weights are made of; time is axis 1."""
    weight = loss_weight(batch)
    found = {
        "values": batch.values,
        "observed": batch.observed[..., :1].astype(np.uint8),  # all tasks hide all channels of a step or none
        "cue": batch.cue,
        "action": batch.action,
        "weight": weight if batch.kind.ndim == 3 else weight[..., :1],  # with one kind per step, channels weigh alike
    }
    if batch.meta.get("events"):
        found["elapsed"] = batch.elapsed[..., None]
    return found


class Shape(NamedTuple):
    """Numbers of a token and of a forecast, and of what must be kept."""

    inputs: int
    outputs: int
    load: int


@lru_cache
def shape_of(task: str, axes: tuple[tuple[str, Any], ...]) -> Shape:
    """Told by the smallest block."""
    least = 2 if task != "T4" else 0
    batch = block(task, index=0, batch=1, gap=least, **dict(axes))
    return Shape(tokens(batch).inputs.shape[-1], batch.values.shape[-1], int(batch.meta["load"]))


class Feed:
    """Blocks in the order of their requests, made by some processes a few ahead; with none, made on demand.

    Blocks pass through files in memory where the system has room for them there, else through pipes.

    Args:
        workers: processes, started once and kept.
        ahead: requests in work per process.
    """

    def __init__(self, workers: int = 0, ahead: int = 2) -> None:
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(workers, mp_context=context) if workers else None
        if workers:  # processes start at the first request; each is one of many, so that threads would only compete
            os.environ |= {name: os.environ.get(name, "1") for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
        self._depth = max(1, workers * ahead)
        self._folder = None
        if workers and MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > ROOM:
            self._folder = tempfile.mkdtemp(prefix="tsgdn-", dir=MEMORY)

    def __call__(self, requests: Iterable[Request]) -> Iterator[Made]:
        """Yields what each request asks for; leaving the loop early wastes at most what is ahead."""
        if self._pool is None:
            yield from map(make, requests)
            return
        waiting: deque[Future[Any]] = deque()
        try:
            for request in requests:
                waiting.append(self._pool.submit(_deposit, request, self._folder))
                if len(waiting) > self._depth:
                    yield _collect(waiting.popleft().result())
            while waiting:
                yield _collect(waiting.popleft().result())
        finally:
            for left in waiting:
                if not left.cancel():
                    _collect(left.result())

    def close(self) -> None:
        """Ends the processes."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


class _Left(NamedTuple):
    """A block in a file: where each array lies."""

    path: str
    layout: Any


def _deposit(request: Request, folder: str | None) -> Made | _Left:
    made = make(request)
    if folder is None:
        return made
    handle, path = tempfile.mkstemp(dir=folder)
    at = 0

    def put(arrays: dict[str, np.ndarray]) -> dict[str, tuple[int, str, tuple[int, ...]]]:
        nonlocal at
        places = {}
        for name, array in arrays.items():
            places[name] = (at, array.dtype.str, array.shape)
            file.write(np.ascontiguousarray(array).data.cast("B") if array.size else b"")
            at += array.nbytes + file.write(b"\0" * (-array.nbytes % 64))
        return places

    with os.fdopen(handle, "wb") as file:
        layout = (put(made.fields), put(made.questions))
        file.write(b"\0" * 64)  # no file is empty
    return _Left(path, layout)


def _collect(found: Made | _Left) -> Made:
    """Maps the file, whose name goes at once; its memory goes with the arrays."""
    if isinstance(found, Made):
        return found
    with open(found.path, "rb") as file:
        held = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    os.unlink(found.path)

    def get(places: dict[str, tuple[int, str, tuple[int, ...]]]) -> dict[str, np.ndarray]:
        return {
            name: np.frombuffer(held, kind, int(np.prod(shape)), at).reshape(shape)
            for name, (at, kind, shape) in places.items()
        }

    return Made(*map(get, found.layout))


def _questions(batch: RegimeBatch) -> dict[str, np.ndarray]:
    """What scoring wants to know of a block, all of it along sequences."""
    task, truth = batch.meta["task"], batch.truth
    if task == "T7":
        return {"effects": truth["effects"], "codes": truth["codes"]}
    if task == "T8":
        return {"topology": truth["topology"]}
    if task == "T9":
        return _switches(batch)
    asked = probes(batch)
    kind, version = (x if x.ndim == 3 else x[..., None] for x in (asked.kind, asked.version))
    found = {"time": asked.time, "truth": asked.truth, "rare": kind == RARE_PROBE, "common": kind == COMMON_PROBE}
    if task == "T9b":  # every hidden step asks; the last one counts
        found = {name: x[:, -1:] for name, x in found.items()}
    if batch.meta.get("revisions"):
        found["revised"] = found["common"] & (version > 0)
        row = np.arange(len(batch.values))[:, None]
        found["replaced"] = truth["theta"][row, asked.regime, np.maximum(asked.version - 1, 0)].astype(np.float64)
    if task == "T6":
        found |= {"theta": truth["theta"], "parked": truth["parked"]}
    return found


def _switches(batch: RegimeBatch) -> dict[str, np.ndarray]:
    """T9: marks of the first eight steps of each re-entry, and the references' errors there, along the streams."""
    rows, steps, gaps = reentries(batch)
    inside = steps + 8 <= batch.values.shape[1]
    rows, steps, gaps = rows[inside], steps[inside], gaps[inside]
    oracle, window = (switching_errors(batch, name)[0] for name in ("oracle", "window"))
    shape = batch.values.shape[:2]
    found = {name: np.zeros(shape, np.float32) for name in ("oracle", "window")}
    found |= {"age": np.zeros(shape, np.int16), "since": np.zeros(shape, np.int16)}
    for j in range(8):
        at = (rows, steps + j)
        found["oracle"][at], found["window"][at] = oracle[:, j], window[:, j]
        found["age"][at], found["since"][at] = j + 1, gaps
    return found


def _stack(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.stack([part[name] for part in parts]) for name in parts[0]}
