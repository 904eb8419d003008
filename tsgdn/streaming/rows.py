"""Observations as they come in, made into arrays; what is wrong with a single row is said here, by code.

Frames (pandas, polars, arrow), mappings, arrays and plain rows become one `Rows`. A wrong shape of the whole raises; a
wrong row is set aside and the others go on.
"""

import re
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from datetime import date, datetime
from typing import Any, NamedTuple

import narwhals as nw
import numpy as np
from jaxtyping import Float64

LARGEST = 1e100
"""Beyond it sums of squares come near the end of float64: such values are refused."""
SMALLEST = 1e-100
"""Nearer to zero their squares vanish in float64: such values count as 0."""
ITEM_COLUMNS = ("item_id", "unique_id")
TIME_COLUMNS = ("timestamp", "ds")
VALUE_COLUMNS = ("target", "y")

_ISO = re.compile(
    r"(\d{4})(?:-\d\d(?:-\d\d(?:[T ]\d\d(?::\d\d(?::\d\d(?:[.,]\d{1,9})?)?)?)?)?)?(Z|[+-][01]\d(?::?[0-5]\d)?)?",
    re.ASCII,
)
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


class Rejection(NamedTuple):
    """A row that was set aside: why, which, and what to do.

    Attributes:
        code: for machines, such as "ts.late" or "value.type".
        row: position in the data of the call; None where the row came with an earlier call (held back until now).
        item_id: as given.
        timestamp: as given.
        text: one line for people.
    """

    code: str
    row: int | None
    item_id: str
    timestamp: str
    text: str


class Rows(NamedTuple):
    """Rows that can be read; those that cannot are in `bad`.

    Attributes:
        item_ids: of each row.
        stamps: UTC.
        values: NaN = missing.
        places: positions in the caller's data.
        bad: rows set aside.
    """

    item_ids: list[str]
    stamps: np.ndarray
    values: Float64[np.ndarray, "rows V"]
    places: np.ndarray
    bad: list[Rejection]


def read_rows(
    data: Any, *, timestamp: Any = None, variates: Sequence[str] = ("target",), known_ids: Container[str] = ()
) -> Rows:
    """Reads whatever `StatefulPredictor.observe` takes.

    Args:
        data: a frame with columns item_id, timestamp and the variates (or unique_id, ds, y); `{item_id: value}` with
            one `timestamp`; three arrays (item_ids, timestamps, values); or an iterable of rows
            (item_id, timestamp, value). A value is a number, or V of them.
        timestamp: of every row where the data has none.
        variates: names along V.
        known_ids: names that need no check, having passed it before.

    Raises:
        ValueError: wrong columns, types or number of variates; nothing has been applied.
    """
    if isinstance(data, Rows):
        return data
    if isinstance(data, Mapping):
        if timestamp is None:
            raise ValueError("observe got {item_id: value} without a time: give timestamp=")
        ids = list(data)
        return from_objects(ids, [timestamp] * len(ids), list(data.values()), variates, known_ids=known_ids)
    if isinstance(data, tuple) and len(data) == 3 and all(isinstance(part, np.ndarray) for part in data):
        ids, stamps, values = data
        if not len(ids) == len(stamps) == len(values):
            raise ValueError(f"three arrays of one length expected, got {len(ids)}, {len(stamps)} and {len(values)}")
        return from_objects(ids.tolist(), stamps, values, variates, known_ids=known_ids)
    if isinstance(data, str | bytes):
        raise ValueError(f"cannot read observations from {type(data).__name__}: give a frame, a mapping or rows")
    if not isinstance(data, list):
        frame = nw.from_native(data, eager_only=True, pass_through=True)
        if isinstance(frame, nw.DataFrame):
            return _read_frame(frame, variates, known_ids)
        if not isinstance(data, Iterable):
            raise ValueError(f"cannot read observations from {type(data).__name__}: give a frame, a mapping or rows")
    rows = list(data)
    width = 2 if timestamp is not None else 3
    for row in rows:
        if type(row) is tuple and len(row) == width:
            continue
        if not isinstance(row, Sequence) or isinstance(row, str) or len(row) != width:
            raise ValueError(f"a row is (item_id, {'' if width == 2 else 'timestamp, '}value), got {row!r:.80}")
    stamps = [timestamp] * len(rows) if width == 2 else [row[1] for row in rows]
    ids, values = [row[0] for row in rows], [row[-1] for row in rows]
    return from_objects(ids, stamps, values, variates, known_ids=known_ids)


def from_objects(
    item_ids: list[Any],
    stamps: list[Any] | np.ndarray,
    values: list[Any] | np.ndarray,
    variates: Sequence[str],
    *,
    places: Sequence[int] | None = None,
    bad: list[Rejection] | None = None,
    known_ids: Container[str] = (),
) -> Rows:
    """Rows out of Python objects, each checked; the checks run in bulk where the types allow it.

    Args:
        item_ids: text, or integers.
        stamps: ISO 8601 text, datetimes or datetime64; without an offset they are UTC.
        values: numbers or None; V of them where V > 1.
        variates: names along V.
        places: positions in the caller's data; 0, 1, ... if not given.
        bad: rows that were set aside before, to be handed on.
        known_ids: names that need no check, having passed it before.
    """
    at = np.arange(len(item_ids)) if places is None else np.asarray(places, np.int64)
    bad = [] if bad is None else bad
    keep = np.ones(len(item_ids), bool)

    def refuse(i: int, code: str, text: str) -> None:
        if keep[i]:
            keep[i] = False
            bad.append(Rejection(code, int(at[i]), printable(item_ids[i]), printable(stamps[i]), text))

    if set(map(type, item_ids)) <= {str}:
        names = item_ids
    else:
        names = [str(x) if isinstance(x, str | int | np.integer) and not isinstance(x, bool) else "" for x in item_ids]
    if not (known_ids and all(map(known_ids.__contains__, names))):
        fresh = (name for name in set(names) if name not in known_ids)
        problems = {name: problem for name in fresh if (problem := item_id_problem(name))}
        if problems:
            for i, name in enumerate(names):
                if name in problems:
                    refuse(i, "item.id", problems[name])

    nanoseconds = _read_stamps(stamps, refuse)
    matrix = _bulk(values, len(variates))
    if matrix is None:
        matrix = np.full((len(names), len(variates)), np.nan)
        for i, value in enumerate(values.tolist() if isinstance(values, np.ndarray) else values):
            cells = [value] if len(variates) == 1 and not isinstance(value, list | tuple | np.ndarray) else value
            if not isinstance(cells, list | tuple | np.ndarray) or len(cells) != len(variates):
                refuse(i, "value.count", f"expected {len(variates)} values ({', '.join(variates)}), got {value!r:.60}")
                continue
            for v, cell in enumerate(cells):
                problem = _value_problem(cell)
                if problem:
                    refuse(i, *problem)
                elif cell is not None:
                    matrix[i, v] = float(cell)
    size = np.abs(matrix)
    if (size > LARGEST).any():
        _refuse_values(matrix, refuse)
    if (size < SMALLEST).any():
        matrix = sizable(matrix)
    if keep.all():
        return Rows(names, nanoseconds.view("datetime64[ns]"), matrix, at, bad)
    kept = np.flatnonzero(keep)
    return Rows(
        [names[i] for i in kept.tolist()],
        nanoseconds[kept].view("datetime64[ns]"),
        matrix[kept],
        at[kept],
        bad,
    )


def _read_stamps(stamps: list[Any] | np.ndarray, refuse: Callable[[int, str, str], None]) -> np.ndarray:
    """Nanoseconds since 1970 UTC; 0 where there is no such time, which is refused."""
    if isinstance(stamps, np.ndarray):
        if stamps.dtype.kind == "M" and len(stamps) and np.datetime_data(stamps.dtype)[0] != "generic":
            years = stamps.astype("M8[Y]").astype(np.int64) + 1970  # NaT is far below
            if years.min() >= 1678 and years.max() <= 2261:
                return stamps.astype("M8[ns]").view(np.int64)
        stamps = list(stamps)
    nanoseconds = np.zeros(len(stamps), np.int64)
    if not len(stamps):
        return nanoseconds
    same = isinstance(stamps[0], str | datetime | np.datetime64) and stamps.count(stamps[0])
    if same == len(stamps):  # one for all, by identity first
        parsed = parse_stamp(stamps[0])
        if not isinstance(parsed, tuple):
            nanoseconds[:] = parsed
            return nanoseconds
    seen: dict[Any, int | tuple[str, str]] = {}
    for i, stamp in enumerate(stamps):
        try:
            parsed = seen.get(stamp)
        except TypeError:
            stamp, parsed = repr(stamp), ("ts.type", f"{type(stamp).__name__} is no time: give ISO 8601 text")
        if parsed is None:
            parsed = seen[stamp] = parse_stamp(stamp)
        if isinstance(parsed, tuple):
            refuse(i, *parsed)
        else:
            nanoseconds[i] = parsed
    return nanoseconds


def item_id_problem(item_id: str) -> str | None:
    """What is wrong with an item's name: it must be 1 to 256 bytes of UTF-8 without control characters."""
    try:
        size = len(item_id.encode())
    except UnicodeEncodeError:
        return "the item_id is not valid Unicode (a lone surrogate)"
    if not 1 <= size <= 256:
        return f"the item_id has {size} bytes or is neither text nor integer, expected text of 1 to 256 bytes"
    return "the item_id contains a control character" if _CONTROL.search(item_id) else None


def sizable(values: np.ndarray) -> np.ndarray:
    """The values, 0 for those nearer to it than `SMALLEST`."""
    return np.where(np.abs(values) < SMALLEST, 0.0, values)


def printable(value: Any, limit: int = 80) -> str:
    """A value as one short line that a terminal shows as it is."""
    text = str(value)
    text = text if len(text) <= limit else text[: limit - 3] + "..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def _read_frame(frame: nw.DataFrame[Any], variates: Sequence[str], known_ids: Container[str]) -> Rows:
    columns = frame.columns
    wanted = column_roles(columns, variates)
    item, time, *targets = wanted
    for name in targets:
        dtype = frame[name].dtype
        if not dtype.is_numeric() and dtype != nw.Unknown:
            raise ValueError(f"column {name!r} is {dtype}, expected numbers: convert it first")
    names = frame[item].to_list()
    if isinstance(frame[time].dtype, nw.Datetime):
        column = frame[time]
        if column.dtype.time_zone is not None:  # pyright: ignore[reportAttributeAccessIssue]
            column = column.dt.convert_time_zone("UTC").dt.replace_time_zone(None)
        stamps: Any = np.asarray(column.to_numpy())  # in their own unit: nanoseconds may not reach that far
    else:
        stamps = frame[time].to_list()
    values = np.stack([np.asarray(frame[name].cast(nw.Float64).to_numpy(), np.float64) for name in targets], axis=1)
    return from_objects(names, stamps, values, variates, known_ids=known_ids)


def column_roles(columns: Sequence[str], variates: Sequence[str]) -> list[str]:
    """The columns that hold the item, the time and the variates, in this order, whichever dialect they speak.

    Raises:
        ValueError: one is missing, or there is one that nobody asked for.
    """
    roles: list[str] = []
    for names in (ITEM_COLUMNS, TIME_COLUMNS):
        found = [name for name in names if name in columns]
        if len(found) != 1:
            problem = f"columns {found} say the same" if found else "is missing"
            raise ValueError(f"column {' or '.join(names)} {problem}; got {', '.join(map(str, columns))}")
        roles += found
    for variate in variates:
        names = (variate, *VALUE_COLUMNS) if len(variates) == 1 else (variate,)
        found = [name for name in dict.fromkeys(names) if name in columns]
        if len(found) != 1:
            problem = f"columns {found} say the same" if found else "is missing"
            wanted = " or ".join(dict.fromkeys(names))
            raise ValueError(f"column {wanted} {problem}; got {', '.join(map(str, columns))}")
        roles += found
    unknown = [name for name in columns if name not in roles]
    if unknown:
        raise ValueError(f"unknown column {', '.join(map(repr, unknown))}; expected {', '.join(roles)}: drop it")
    return roles


def _bulk(values: list[Any] | np.ndarray, variates: int) -> np.ndarray | None:
    if isinstance(values, np.ndarray):
        wanted = (len(values), variates)
        plain = values.dtype.kind in "fiu" and (values.shape == wanted or (variates == 1 and values.ndim == 1))
        return values.astype(np.float64).reshape(wanted) if plain else None
    if variates == 1:
        if not set(map(type, values)) <= {float, int, np.float64, type(None)}:
            return None
    elif not all(
        isinstance(row, list | tuple) and len(row) == variates and {*map(type, row)} <= {float, int, type(None)}
        for row in values
    ):
        return None
    try:
        return np.array(values, np.float64).reshape(len(values), variates)
    except OverflowError:  # an integer beyond float64: named row by row
        return None


def _refuse_values(matrix: np.ndarray, refuse: Any) -> None:
    for i in np.flatnonzero((np.abs(matrix) > LARGEST).any(axis=1)).tolist():
        if np.isinf(matrix[i]).any():
            refuse(i, "value.nonfinite", "the value is infinite: leave it empty if it is missing")
        else:
            refuse(i, "value.range", f"the value is beyond {LARGEST:g}: rescale the series")


def _value_problem(cell: Any) -> tuple[str, str] | None:
    if cell is None:
        return None
    if isinstance(cell, bool | np.bool_) or not isinstance(cell, int | float | np.integer | np.floating):
        return "value.type", f"expected a number, got {type(cell).__name__} {printable(repr(cell), 40)}"
    try:
        float(cell)
    except OverflowError:
        return "value.range", f"the integer is beyond {LARGEST:g}"
    return None


def read_stamp(time: Any) -> np.datetime64:
    """One time, as UTC.

    Raises:
        ValueError: it is no time, or one that nanoseconds do not reach.
    """
    parsed = parse_stamp(time)
    if isinstance(parsed, tuple):
        raise ValueError(parsed[1])
    return np.datetime64(parsed, "ns")


def parse_stamp(stamp: Any) -> int | tuple[str, str]:
    """Nanoseconds since 1970 UTC, or the code and text of what is wrong."""
    if hasattr(stamp, "to_datetime64") and getattr(stamp, "tzinfo", None) is None:
        stamp = stamp.to_datetime64()  # a pandas Timestamp or NaT
    if isinstance(stamp, np.datetime64):
        if np.isnat(stamp):
            return "ts.syntax", "the time is missing"
        text = str(stamp)
    elif isinstance(stamp, datetime | date):
        text = stamp.isoformat()
    elif isinstance(stamp, str):
        text = stamp
    else:
        return "ts.type", f"expected ISO 8601 text or a datetime, got {type(stamp).__name__} {printable(stamp, 40)}"
    match = _ISO.fullmatch(text)
    if match is None:
        return "ts.syntax", f"{printable(text, 40)!r} is not ISO 8601 such as 2024-01-31T12:00:00Z"
    if not 1678 <= int(match[1]) <= 2261:
        return "ts.range", f"the year {match[1]} is outside 1678..2261"
    zone = match[2] or ""
    if zone and "T" not in text and " " not in text:
        return "ts.syntax", f"{printable(text, 40)!r}: an offset needs a time of day"
    try:
        nanoseconds = int(np.datetime64(text[: len(text) - len(zone)].replace(",", "."), "ns").astype(np.int64))
    except ValueError:
        return "ts.syntax", f"{printable(text, 40)!r} is no date"
    if len(zone) > 1:
        digits = zone[1:].replace(":", "").ljust(4, "0")
        shift = (int(digits[:2]) * 60 + int(digits[2:])) * 60_000_000_000
        nanoseconds += shift if zone[0] == "-" else -shift
    return nanoseconds
