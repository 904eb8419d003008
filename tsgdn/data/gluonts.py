"""GluonTS data sets <-> Series; GluonTS and pandas are imported on use.

GluonTS counts time in periods: a month, quarter or year is one, whatever day ends it, and a week is named by its last
day. Its categories count from 0, ours from 1, since 0 is "unknown".
"""

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tsgdn.data.catalog import Task
from tsgdn.data.clock import clock
from tsgdn.data.frames import to_series
from tsgdn.data.series import Series

if TYPE_CHECKING:
    import pandas as pd
    from gluonts.dataset.split import TestData

_LONG = re.compile(r"(\d*)(M|Q|Y)(S|E)(-[A-Z]{3})?")


def period_freq(freq: str) -> str:
    """The period alias of a frequency, which GluonTS wants: `MS`, `ME` -> `M`, `QS-OCT` -> `Q`, `QE-NOV` -> `Q-NOV`.

    A quarter (or year) that is stamped with its first day is anchored by the first stamp, so the alias is plain.
    """
    name = clock(freq).freq
    match = _LONG.fullmatch(name)
    if not match:
        return name
    return match[1] + match[2] + (match[4] or "" if match[3] == "E" else "")


def first_day_freq(freq: str) -> str:
    """The frequency that counts from the first day, as periods do: `M`, `ME` -> `MS`, `Q-DEC`, `QE` -> `QS`."""
    name = clock(freq).freq
    match = _LONG.fullmatch(name)
    return f"{match[1]}{match[2]}S" if match else name


def period(start: np.datetime64, freq: str) -> "pd.Period":
    """The pandas Period that begins (weeks, ends of months: ends) at `start`."""
    import pandas as pd

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # pandas warns of business-day periods, which GluonTS uses
        return pd.Period(pd.Timestamp(start), freq=period_freq(freq))  # pyright: ignore[reportReturnType]  (not NaT)


def series_entry(series: Series) -> dict[str, Any]:
    """A series as a GluonTS entry, the target as it is (float64); 1-d where there is one variate."""
    target = series.values[0] if len(series.values) == 1 else series.values
    entry = {"item_id": series.item_id, "start": period(series.start, series.freq), "target": target}
    if series.known is not None:
        entry["feat_dynamic_real"] = series.known
    if series.static:
        entry["feat_static_cat"] = np.array(series.static) - 1
    return entry


def entry_series(entry: Mapping[str, Any], freq: str | None = None) -> Series:
    """A GluonTS entry as a series.

    Args:
        entry: `start`, `target`, maybe `item_id`, `feat_dynamic_real`, `feat_static_cat`.
        freq: None = that of the `start` period.
    """
    (series,) = to_series([entry], freq=first_day_freq(freq or entry["start"].freqstr))
    return series


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
            [{**series_entry(one), "target": one.values[0] if one_dim else one.values} for one in series],
            freq=period_freq(freq),
            one_dim_target=one_dim,
        )


def from_gluonts(dataset: Iterable[dict[str, Any]], *, freq: str | None = None) -> list[Series]:
    """Series of a GluonTS data set; the frequency is that of the entries' periods unless given.

    A month, quarter or year counts from its first day (`MS`, `QS`, `YS`), a week from the last day of its period.
    Entries without an item id are named by their place.

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
        freq = first_day_freq(found.pop())
    return to_series(entries, freq=freq)


def evaluation_data(task: Task, *, multivariate: bool = False) -> "TestData":
    """A task as GluonTS test data: the windows of `Task.split()`, for `evaluate_model` and `evaluate_forecasts`.

    Raises:
        DataNotFound: the data is not here.
    """
    from gluonts.dataset.split import split

    dataset = to_gluonts(task.series(multivariate=multivariate), one_dim=not multivariate)
    _, template = split(dataset, offset=task.first_origin)
    return template.generate_instances(task.horizon, windows=task.windows, distance=task.stride)
