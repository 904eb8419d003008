"""The commonest call, one value of one known series at its next step, without building arrays around it.

Whatever is not exactly that goes the way of all rows; `tests/test_predictor.py` holds the two against each other.
"""

from datetime import datetime
from typing import Any

import numpy as np

from tsgdn.streaming.advance import Engine
from tsgdn.streaming.rows import LARGEST, SMALLEST, parse_stamp

_NANOSECONDS = np.dtype("M8[ns]")


def the_row(data: Any, timestamp: Any) -> tuple[Any, Any, Any] | None:
    """Item, time and value of data that are one row; None if they may be anything else."""
    if len(data) != 1:
        return None
    if type(data) is dict and timestamp is not None:
        ((item, value),) = data.items()
        return item, timestamp, value
    row = data[0] if type(data) is list else None
    return row if timestamp is None and type(row) is tuple and len(row) == 3 else None


def take_one(engine: Engine, item: Any, stamp: Any, value: Any) -> int | None:
    """Takes in the row and gives its slot, if the series is known, univariate, and the row is plainly its next step."""
    series = engine.series
    if type(item) is not str or (type(value) is not float and type(value) is not int):
        return None
    slot = series.slots.get(item)
    step_size: int = series.clock._step  # 0 where steps are of different lengths
    if slot is None or not step_size or series.variates > 1 or series.held:
        return None
    size = abs(value)
    if not (size <= LARGEST and (size >= SMALLEST or not value)):  # NaN among them
        return None
    if type(stamp) is np.datetime64 and stamp.dtype == _NANOSECONDS:
        time: Any = stamp.view(np.int64).item()
    elif type(stamp) is str or type(stamp) is datetime:
        time = parse_stamp(stamp)
        if type(time) is not int:
            return None
    else:
        return None
    ledger = series.ledger
    head = ledger.head.item(slot)
    if time != ledger.start.view(np.int64).item(slot) + head * step_size:
        return None
    place = head % ledger.ring
    ledger.recent[slot, 0, place] = value or 0.0  # there is one zero
    ledger.told[slot, 0, place] = True
    ledger.head[slot] = head + 1
    ledger.values[slot] += 1
    P = engine.model.patch_size
    if (head + 1) // P * P > ledger.applied.item(slot):
        engine.close(np.array([slot]))
    return slot
