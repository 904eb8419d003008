"""What several predictors, or several calls of one, have said, as if one had said it."""

from collections.abc import Sequence

import numpy as np

from tsgdn.streaming.verdicts import ObserveReport, joined
from tsgdn.types import ForecastBatch

SHARED = ("freq", "quantile_levels", "variates", "model", "seq")
"""Fields of a forecast that are not one per series."""


def forecasts(parts: Sequence[ForecastBatch], item_ids: Sequence[str]) -> ForecastBatch:
    """Forecasts of different series together, in this order."""
    first = parts[0]
    names = [item for part in parts for item in part.item_ids]
    place = {item: i for i, item in enumerate(names)}
    order = [place[item] for item in item_ids]
    told = {}
    for name in first._fields:
        found = [getattr(part, name) for part in parts]
        if name in SHARED or found[0] is None:
            continue
        if isinstance(found[0], np.ndarray):
            told[name] = np.concatenate(found)[order]
        else:
            flat = [one for part in found for one in part]
            told[name] = tuple(flat[i] for i in order) if flat else found[0]
    return first._replace(**told)


def reports(parts: Sequence[ObserveReport]) -> ObserveReport:
    """What became of the rows of one call that was made in parts; `set_aside` in the order of its rows."""
    if len(parts) == 1:
        return parts[0]
    report = ObserveReport()
    for part in parts:
        report = joined(report, part)
    aside = sorted(report.set_aside, key=lambda bad: -1 if bad.row is None else bad.row)
    return report._replace(set_aside=tuple(aside))
