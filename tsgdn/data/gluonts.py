"""GluonTS data sets <-> Series; GluonTS and pandas are imported on use."""

import re
import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tsgdn.data.catalog import Task
from tsgdn.data.clock import Clock, clock
from tsgdn.data.frames import to_series
from tsgdn.data.series import Series

if TYPE_CHECKING:
    from gluonts.dataset.split import TestData


def period_freq(freq: str) -> str:
    """The period alias of a frequency, which GluonTS wants: `MS`, `ME` -> `M`, `QS-OCT` -> `Q-DEC`, `h` -> `h`.

    A quarter (or year) step is anchored by the month of its first stamp, so the alias is plain `Q` (`Y`).
    """
    name = clock(freq).freq
    match = re.fullmatch(r"(\d*)(MS|ME|QS|QE|YS|YE)(-[A-Z]{3})?", name)
    return f"{match[1]}{match[2][0]}" if match else name


def to_gluonts(series: Sequence[Series], freq: str | None = None, *, one_dim: bool = True) -> list[dict[str, Any]]:
    """Series as a GluonTS data set.

    Args:
        series: all of one frequency.
        freq: expected frequency; default that of the series.
        one_dim: 1-d targets, which want one variate each; False: 2-d targets (V, T).

    Returns:
        A ListDataset with `start`, `target`, `item_id`, and `feat_dynamic_real`, `feat_static_cat` where there are any.

    Raises:
        ValueError: mixed frequencies, or several variates with `one_dim`.
    """
    from gluonts.dataset.common import ListDataset

    if not series:
        raise ValueError("there are no series")
    freq = clock(freq or series[0].freq).freq
    for one in series:
        if one.freq != freq:
            raise ValueError(
                f"item {one.item_id!r} has freq {one.freq!r}, expected {freq!r}: one frequency per data set"
            )
        if one_dim and len(one.variates) > 1:
            raise ValueError(
                f"item {one.item_id!r} has {len(one.variates)} variates; pass one_dim=False, or series.univariate()"
            )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # pandas warns of business-day periods, which GluonTS uses
        return ListDataset(
            [_entry(one, freq, one_dim) for one in series], freq=period_freq(freq), one_dim_target=one_dim
        )


def _entry(series: Series, freq: str, one_dim: bool) -> dict[str, Any]:
    import pandas as pd

    out: dict[str, Any] = {
        "item_id": series.item_id,
        "start": pd.Period(pd.Timestamp(series.start), freq=period_freq(freq)),
        "target": series.values[0] if one_dim else series.values,
    }
    if series.known is not None:
        out["feat_dynamic_real"] = series.known
    if series.static:
        out["feat_static_cat"] = np.asarray(series.static)
    return out


def from_gluonts(dataset: Iterable[dict[str, Any]], *, freq: str | None = None) -> list[Series]:
    """Series of a GluonTS data set; the frequency is that of the entries' periods unless given.

    A month, quarter or year counts from its first day (`MS`, `QS`, `YS`), a week from the last day of its period.

    Raises:
        ValueError: an entry has no frequency, or another one than the first.
    """
    entries = list(dataset)
    if not entries:
        return []
    found: set[str] = {entry["start"].freqstr for entry in entries if hasattr(entry["start"], "freqstr")}
    if freq is None:
        if len(found) != 1:
            raise ValueError(f"the entries have frequencies {sorted(found) or 'none'}; pass freq=, one per data set")
        freq = _from_period(found.pop())
    return to_series(entries, freq=freq)


def _from_period(freq: str) -> str:
    """A period alias as a clock's: `M` -> `MS`, `Q-DEC` -> `QS`, `Y-DEC`, `A-DEC` -> `YS`."""
    match = re.fullmatch(r"(\d*)([MQYA])E?(-[A-Z]{3})?", freq)
    if match:
        freq = match[1] + {"M": "MS", "Q": "QS", "Y": "YS", "A": "YS"}[match[2]]
    return Clock(freq).freq


def evaluation_data(task: Task, *, multivariate: bool = False) -> "TestData":
    """A task as GluonTS test data: the windows of `Task.split()`, for `evaluate_model` and `evaluate_forecasts`.

    Raises:
        DataNotFound: the data is not here.
    """
    from gluonts.dataset.split import split

    dataset = to_gluonts(task.series(multivariate=multivariate), one_dim=not multivariate)
    _, template = split(dataset, offset=task.first_origin)
    return template.generate_instances(task.horizon, windows=task.windows, distance=task.stride)
