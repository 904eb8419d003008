"""What a watch starts from, measured on the validation part and kept beside the model: widths and thresholds.

The file `watch.json` in the folder of a model is read by `StatefulPredictor.from_pretrained`.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tsgdn.data.series import Series
from tsgdn.model.artefact import write_whole
from tsgdn.streaming.signals import Thresholds, check_thresholds

FILE = "watch.json"
LIMIT = 1 << 20  # bytes
FORMAT = 1


class Tuning(NamedTuple):
    """Where widths and signals of a new series begin.

    Attributes:
        coverages: increasing; C of them.
        ranges: last patch of each of N ranges of leads (`Ranges.last`).
        start: θ per range and coverage (N, C): nested tuples.
        thresholds: of the signals.
    """

    coverages: tuple[float, ...]
    ranges: tuple[int, ...]
    start: tuple[tuple[float, ...], ...]
    thresholds: Thresholds

    def as_json(self) -> dict[str, Any]:
        """Plain JSON, read by `of_json`."""
        return {"format": FORMAT, **self._asdict(), "thresholds": self.thresholds._asdict()}

    @classmethod
    def of_json(cls, told: Any) -> "Tuning":
        """The tuning that `as_json` told of.

        Raises:
            ValueError: it is none.
        """
        try:
            if told["format"] != FORMAT:
                raise ValueError(f"format {told['format']!r}, this version reads {FORMAT}: update tsgdn")
            coverages = tuple(float(c) for c in told["coverages"])
            ranges = tuple(int(last) for last in told["ranges"])
            start = tuple(tuple(float(x) for x in row) for row in told["start"])
            thresholds = check_thresholds(Thresholds(**told["thresholds"]))
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"this is no tuning of a watch: {error!r}") from None
        array = np.array(start) if {len(row) for row in start} == {len(coverages)} else np.zeros(0)
        if array.shape != (len(ranges), len(coverages)) or not np.isfinite(array).all():
            raise ValueError(f"start is no table of {len(ranges)} ranges and {len(coverages)} coverages")
        return cls(coverages, ranges, start, thresholds)

    def start_of(self, coverages: Sequence[float], ranges: Sequence[int]) -> np.ndarray | None:
        """θ (N, C) of these coverages, between those tuned by interpolation; None for other ranges of leads."""
        if tuple(ranges) != self.ranges:
            return None
        return np.stack([np.interp(coverages, self.coverages, row) for row in self.start])


def write(folder: str | Path, tuning: Tuning) -> Path:
    """Writes a tuning beside a model; gives the file."""
    path = Path(folder) / FILE
    write_whole(path, (json.dumps(tuning.as_json(), indent=1) + "\n").encode())
    return path


def read(folder: str | Path) -> Tuning | None:
    """The tuning beside a model; None where there is no such file.

    Raises:
        ValueError: the file is no tuning.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        return None
    if path.stat().st_size > LIMIT:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, a tuning has at most {LIMIT}")
    try:
        return Tuning.of_json(json.loads(path.read_bytes()))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from None


def tune(predictor: Any, histories: Sequence[Series], *, arl: int | float = 10_000) -> Tuning:
    """Measures widths and thresholds of a predictor's model on histories that it was not trained on.

    The predictor has a watch and is not changed. Forecasts of all tokens are held at once, so give some hundred
    thousand steps, not millions.

    Args:
        predictor: made with `calibrate` or `signals`.
        histories: of its frequency and variates.
        arl: values per false alarm, for each kind of signal.

    Raises:
        ValueError: the predictor watches nothing, a history does not suit it, or there are too few values.
    """
    for one in histories:
        predictor.check_history(one)
    watch = predictor._series.watch
    if watch is None:
        raise ValueError("the predictor watches nothing: make it with calibrate=True")
    P, V = predictor.model.patch_size, len(predictor.targets)
    parts = []
    for one in histories:
        whole = len(one) // P * P
        twin = predictor._empty_twin()
        slot = twin._create({one.item_id: one.start})
        if one.known is not None:
            twin._features.give(int(slot[0]), 0, twin._features.checked(one.item_id, one.known))
        twin._series.set_static({one.item_id: one.static or ()})
        if whole:
            _, found = twin._engine.moved(
                slot, one.values[None, :, :whole], np.array([whole]), at=np.zeros(1, np.int64), read=True
            )
            values = one.values[None, :V, :whole]
            # before its first value a variate has no forecast that means something
            there = np.maximum.accumulate((~np.isnan(values)).reshape(1, V, -1, P).any(-1), axis=2)
            there &= found.valid.cpu().numpy()[:, None]
            quantiles = found.unscaled()[:, :V, :, P:].cpu().numpy()
            quantiles = np.where(there[..., None, None], quantiles, np.nan)
            parts.append((values, quantiles, found.scale[:, :V].cpu().numpy()))
    if not parts:
        raise ValueError("there is no whole patch in these histories: too few values to tune on")
    tokens = max(part[1].shape[2] for part in parts)

    def joined(i: int, steps: int, blank: float) -> np.ndarray:
        padded = []
        for part in parts:
            array = part[i]
            wide = np.full((*array.shape[:2], steps, *array.shape[3:]), blank)
            wide[:, :, : array.shape[2]] = array
            padded.append(wide)
        return np.concatenate(padded)

    start, thresholds = watch.tune(
        joined(0, tokens * P, np.nan), joined(1, tokens, np.nan), joined(2, tokens, 1.0), arl=arl
    )
    ranges = tuple(watch.ranges.last.tolist())
    return Tuning(tuple(watch.rules.coverages), ranges, tuple(map(tuple, start.tolist())), thresholds)
