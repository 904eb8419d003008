"""Bytes that a series takes: counted, measured at growing numbers of series, and flat over a million observations."""

import csv
import ctypes
import gc
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from tsgdn.bench.latency import Found, Source, predictor, quiet, say, stamps, written
from tsgdn.bench.record import append, provenance
from tsgdn.streaming.predictor import StatefulPredictor

STREAMS = (1000, 10_000, 50_000)
SOAK_STREAMS = 1000
SOAK = 1_000_000
SETTLED = 0.2  # of a soak, after which memory must not grow
FORECAST_EVERY = 16  # ticks of a soak


class Resident(NamedTuple):
    """Bytes that the process holds, and those of its tensors on the GPU."""

    host: int
    device: int


def resident(device: str = "cpu") -> Resident:
    """What is held now, after what nobody needs has been given back to the system.

    Raises:
        ValueError: the system does not say (it has no /proc).
    """
    gc.collect()
    _trim()
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError as error:
        raise ValueError(f"resident memory is read from /proc, which is not there: {error}") from None
    return Resident(
        pages * os.sysconf("SC_PAGESIZE"), torch.cuda.memory_allocated() if device.startswith("cuda") else 0
    )


def _trim() -> None:
    """Asks glibc for what was freed and kept; elsewhere there is nothing to ask."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):
        return


class Crowd:
    """A predictor whose series grow in number and move on together.

    Args:
        live: empty.
        most: series that there will be.
        seed: of the values.
    """

    def __init__(self, live: StatefulPredictor, most: int, seed: int = 0) -> None:
        self.live, self.step = live, 0
        self._ids = np.array([f"series-{i}" for i in range(most)])
        self._source = Source(most, seed)

    def tick(self, streams: int) -> None:
        """One step of the first so many series."""
        self.live.observe(
            (self._ids[:streams], np.full(streams, stamps(self.step)), self._source.at(self.step)[:streams])
        )
        self.step += 1

    def settle(self, streams: int) -> None:
        """Steps until so many series have taken in two patches, with all of their memory written to."""
        for _ in range(2 * self.live.model.patch_size):
            self.tick(streams)


def per_series(mixer: str, streams: Sequence[int], *, device: str = "cpu", seed: int = 0) -> list[tuple[int, Found]]:
    """Bytes per series, counted and measured, as (streams, found).

    Args:
        mixer: of the predictor.
        streams: growing numbers of series, all in one predictor.
        device: where the states live.
        seed: of weights and values.
    """
    crowd = Crowd(predictor(mixer, device, seed), max(streams), seed)
    first = 64  # what the first calls of a process load is not the series'
    crowd.settle(first)
    before = resident(device)
    out = []
    for count in streams:
        crowd.settle(count)
        now = resident(device)
        counted = crowd.live.nbytes_per_series
        each = max(1, count - first)
        out.append((count, Found("memory", "", "bytes_per_series", "B", [counted])))
        out.append((count, Found("memory", "", "host_bytes_per_series", "B", [(now.host - before.host) / each])))
        if device.startswith("cuda"):
            found = (now.device - before.device) / each
            out.append((count, Found("memory", "", "device_bytes_per_series", "B", [found])))
    return out


def soak(mixer: str, observations: int, streams: int, *, device: str = "cpu", seed: int = 0) -> list[Found]:
    """How much memory grows over many observations of a fixed number of series, forecasts among them.

    Args:
        mixer: of the predictor.
        observations: over all series.
        streams: how many series.
        device: where the states live.
        seed: of weights and values.

    Returns:
        Growth in bytes from the moment when a fifth was observed, and the bytes counted per series at the end.
    """
    crowd = Crowd(predictor(mixer, device, seed), streams, seed)
    ticks = max(2, -(-observations // streams))
    settled = int(SETTLED * ticks)
    before = None
    for tick in range(ticks):
        crowd.tick(streams)
        if tick % FORECAST_EVERY == 0:
            crowd.live.forecast(crowd.live.item_ids[:8])
        if tick == settled:
            before = resident(device)
    assert before is not None
    after = resident(device)
    out = [
        Found("soak", "", "host_growth", "B", [after.host - before.host]),
        Found("soak", "", "bytes_per_series", "B", [crowd.live.nbytes_per_series]),
    ]
    if device.startswith("cuda"):
        out.append(Found("soak", "", "device_growth", "B", [after.device - before.device]))
    return out


def run(
    mixers: Sequence[str],
    streams: Sequence[int],
    *,
    results: Path,
    observations: int = SOAK,
    soak_streams: int = SOAK_STREAMS,
    threads: int = 1,
    device: str = "cpu",
    seed: int = 0,
    resume: bool = False,
) -> int:
    """Measures all mixers and appends the rows; returns how many failed.

    Args:
        mixers: of the predictor.
        streams: growing numbers of series.
        results: CSV to append to.
        observations: of the soak; 0 = none.
        soak_streams: its series.
        threads: of torch.
        device: where the states live.
        seed: of weights and values.
        resume: leave out what has rows of this commit, hardware and sizes.
    """
    origin = provenance(device)
    config = f"soak {observations} streams {' '.join(map(str, streams))}"
    done = _done(results, origin, config) if resume else set()
    failed = 0
    given: dict[str, Any] = {"seed": seed, "config": config, "device": device, "origin": origin}
    for mixer in mixers:
        try:
            with quiet(threads):
                found = [] if (mixer, "memory") in done else per_series(mixer, streams, device=device, seed=seed)
                _tell(results, mixer, found, 0, given)
                wanted = observations and (mixer, "soak") not in done
                ends = soak(mixer, observations, soak_streams, device=device, seed=seed) if wanted else []
                steps = -(-observations // soak_streams)
                _tell(results, mixer, [(soak_streams, one) for one in ends], steps, given)
        except (RuntimeError, ValueError, MemoryError) as error:
            failed += 1
            say(f"{mixer}: {error}")
    return failed


def _tell(results: Path, mixer: str, found: Sequence[tuple[int, Found]], history: int, given: dict[str, Any]) -> None:
    append(results, *(written(one, mixer, count, history, **given) for count, one in found))
    if found:
        say(f"{mixer}: " + ", ".join(f"{one.call} {n:,} {one.metric} {one.values[0]:,.0f}" for n, one in found))


def _done(results: Path, origin: dict[str, Any], config: str) -> set[tuple[str, str]]:
    if not results.is_file():
        return set()
    with results.open(encoding="utf-8", newline="") as file:
        return {
            (line["system"], line["call"])
            for line in csv.DictReader(file)
            if line["config"] == config and all(line[key] == str(origin[key]) for key in ("commit", "hardware"))
        }
