"""Frames in, frames out: pandas, polars and arrow by narwhals, in three dialects.

In:  `item_id, timestamp, target` (AutoGluon, and ours), `unique_id, ds, y` (Nixtla), a list of GluonTS dicts.
Wide frames carry one column per variate. Out: the same names.
"""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC
from typing import TYPE_CHECKING, Any

import numpy as np

from tsgdn.data.clock import Clock, clock, parse, show
from tsgdn.data.series import Series

if TYPE_CHECKING:
    from tsgdn.types import ForecastBatch

MAX_FILL = 10_000_000
"""Steps that one series may span: one wrong year must not fill the memory with missing values."""

_DIALECTS = (("item_id", "timestamp", "target"), ("unique_id", "ds", "y"))


def to_series(
    data: Any,
    *,
    freq: str,
    variates: Sequence[str] = ("target",),
    known_columns: Sequence[str] = (),
    tz: str | None = None,
) -> list[Series]:
    """Reads series from any frame, or from GluonTS dicts.

    Rows may come in any order; missing steps become NaN. Without an id column the frame is one series, "series".
    Categories of GluonTS dicts move up by one, since 0 is "unknown" here.
    Rows after the last one that has a value are future rows if there are `known_columns`, else missing values.

    Args:
        data: a pandas, polars or arrow frame, a mapping of columns, or GluonTS dicts (`start`, `target`, ...).
        freq: the step; never guessed.
        variates: the columns of the variates; `("target",)` is `y` in the Nixtla dialect.
        known_columns: columns of known-future features.
        tz: the zone of naive timestamps; default UTC.

    Returns:
        The series in order of first appearance.

    Raises:
        ValueError: a column is missing or of the wrong type, or a series has duplicate, off-grid or missing timestamps,
            infinite values or another frequency; names the item and the timestamp.
    """
    grid = clock(freq)
    if isinstance(data, Series):
        data = [data]
    if isinstance(data, Iterable) and not isinstance(data, Mapping) and not hasattr(data, "columns"):
        entries = list(data)
        if all(isinstance(entry, Series) for entry in entries):
            return [_same_freq(series, grid) for series in entries]
        if all(isinstance(entry, Mapping) and "start" in entry for entry in entries):
            return [_from_dict(entry, i, grid, tuple(variates)) for i, entry in enumerate(entries)]
        if not all(isinstance(entry, Mapping) for entry in entries):
            raise ValueError(f"data of type {type(data).__name__} is no frame: give pandas, polars, arrow or dicts")
        names = list(dict.fromkeys(name for row in entries for name in row))
        data = {name: [row.get(name) for row in entries] for name in names}
    columns = _columns(data)
    id_name, time_name, value_names = _dialect(list(columns), tuple(variates))
    wanted = [*value_names, *known_columns]
    absent = [name for name in wanted if name not in columns]
    if absent:
        raise ValueError(f"column {absent[0]!r} is missing; the frame has {', '.join(columns)}")
    rows = len(columns[time_name])
    for name in [id_name, *wanted]:
        if name is not None and len(columns[name]) != rows:
            raise ValueError(f"column {name!r} has {len(columns[name])} rows, {time_name!r} has {rows}")
    ids = _ids(columns[id_name]) if id_name else None
    stamps = _stamps(columns[time_name], time_name, grid, tz)
    values = np.stack([_numbers(columns[name], name) for name in wanted]) if len(stamps) else np.empty((len(wanted), 0))
    names, codes = _codes(ids, len(stamps))
    order = np.lexsort((stamps, codes))
    bounds = np.searchsorted(codes[order], np.arange(len(names) + 1))
    out = []
    for i, name in enumerate(names):
        rows = order[bounds[i] : bounds[i + 1]]
        out.append(_grid(name, stamps[rows], values[:, rows], grid, tuple(variates), len(known_columns)))
    return out


def forecast_frame(forecast: "ForecastBatch", style: str = "autogluon") -> dict[str, Any]:
    """A forecast as a dict of columns, for `pandas.DataFrame(...)` or `narwhals.from_dict(...)`.

    `autogluon`: `item_id, timestamp`, a column per level. `nixtla`: `unique_id, ds, tsgdn, tsgdn-lo-80, tsgdn-hi-80,
    ...`. Both are long, with a column `variate` where there are several. `gluonts`: a row per series with the arguments
    of `QuantileForecast`: arrays (Q, horizon), or (Q, horizon, V).

    Raises:
        ValueError: the style is not one of the three.
    """
    values = np.asarray(forecast.values)
    series, n_variates, horizon, _ = values.shape
    levels = forecast.quantile_levels
    start = np.asarray(forecast.start, "M8[ns]").reshape(series)
    if style == "gluonts":
        arrays = np.moveaxis(values, 1, -1).swapaxes(1, 2)  # (B, Q, horizon, V)
        return {
            "item_id": list(forecast.item_ids),
            "start_date": list(start),
            "forecast_keys": [[f"{level:g}" for level in levels]] * series,
            "forecast_arrays": [a[..., 0] if n_variates == 1 else a for a in arrays],
        }
    if style not in ("autogluon", "nixtla"):
        raise ValueError(f"style {style!r} is not known; use autogluon, nixtla or gluonts")
    stamps = clock(forecast.freq).timestamp(start[:, None], np.arange(horizon)) if series else np.empty((0, horizon))
    id_name, time_name, _ = _DIALECTS[style == "nixtla"]
    out: dict[str, Any] = {
        id_name: np.repeat(np.asarray(forecast.item_ids, object), n_variates * horizon),
        time_name: np.repeat(np.asarray(stamps, "M8[ns]")[:, None], n_variates, 1).ravel(),
    }
    if n_variates > 1:
        out["variate"] = np.tile(np.repeat(np.asarray(forecast.variates, object), horizon), series)
    for q, level in enumerate(levels):
        out[f"{level:g}" if style == "autogluon" else _nixtla_name(level)] = values[..., q].ravel()
    return out


def to_columns(series: Sequence[Series]) -> dict[str, np.ndarray]:
    """Series as long columns `item_id, timestamp`, one per variate, and `known_0, ...`; all of equal variates."""
    if len({one.variates for one in series}) > 1:
        raise ValueError("the series have different variates; write them separately")
    out: dict[str, np.ndarray] = {
        "item_id": np.concatenate([np.full(len(one), one.item_id, object) for one in series]),
        "timestamp": np.concatenate([one.timestamps for one in series]),
    }
    for v, name in enumerate(series[0].variates):
        out[name] = np.concatenate([one.values[v] for one in series])
    for f in range(0 if series[0].known is None else len(series[0].known)):
        out[f"known_{f}"] = np.concatenate([one.known[f, : len(one)] for one in series if one.known is not None])
    return out


def _nixtla_name(level: float) -> str:
    if abs(level - 0.5) < 1e-9:
        return "tsgdn"
    return f"tsgdn-{'lo' if level < 0.5 else 'hi'}-{round(100 * abs(2 * level - 1), 6):g}"


def _columns(data: Any) -> dict[str, Any]:
    """The frame's columns as narwhals series, or as arrays and lists of a mapping."""
    if isinstance(data, Mapping):
        return {str(name): column for name, column in data.items()}
    import narwhals as nw

    try:
        frame = nw.from_native(data, allow_series=False)
    except TypeError as error:
        raise ValueError(
            f"data of type {type(data).__name__} is no frame: give pandas, polars, arrow or dicts"
        ) from error
    frame = frame.collect() if isinstance(frame, nw.LazyFrame) else frame
    if "timestamp" not in frame.columns and "ds" not in frame.columns:
        native = frame.to_native()
        index = getattr(native, "index", None)  # AutoGluon's own frame has (item_id, timestamp) as its index
        if index is not None and {"timestamp", "ds"} & set(index.names):
            frame = nw.from_native(native.reset_index(), eager_only=True)
    return {name: frame[name] for name in frame.columns}


def _dialect(columns: list[str], variates: tuple[str, ...]) -> tuple[str | None, str, tuple[str, ...]]:
    """The names of the id, time and value columns."""
    for id_name, time_name, value_name in _DIALECTS:
        if time_name in columns:
            names = (value_name,) if variates == ("target",) and value_name in columns else variates
            return (id_name if id_name in columns else None), time_name, names
    raise ValueError(
        f"no time column among {', '.join(columns) or 'no columns'}; name it timestamp (with item_id, target) "
        "or ds (with unique_id, y)"
    )


def _ids(column: Any) -> np.ndarray:
    ids = np.asarray(column.to_list() if hasattr(column, "to_list") else list(column), object)
    bad = [i for i, one in enumerate(ids) if _absent(one)]
    if bad:
        raise ValueError(f"row {bad[0]} has no item id; every row needs one")
    return ids.astype(str)


def _absent(one: Any) -> bool:
    """None, NaN, NaT, or the NA of pandas, which refuses to be compared."""
    try:
        return one is None or bool(one != one)
    except TypeError:
        return True


def _codes(ids: np.ndarray | None, rows: int) -> tuple[list[str], np.ndarray]:
    """Names in order of first appearance, and the place of each row's name among them."""
    if ids is None:
        return (["series"] if rows else []), np.zeros(rows, np.int64)
    names, first, codes = np.unique(ids, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty(len(names), np.int64)
    rank[order] = np.arange(len(names))
    return [str(name) for name in names[order]], rank[codes]


def _stamps(column: Any, name: str, grid: Clock, tz: str | None) -> np.ndarray:
    """A time column as naive UTC nanoseconds."""
    aware = False
    if hasattr(column, "dtype") and hasattr(column, "to_native"):
        import narwhals as nw

        if column.dtype == nw.Datetime and column.dtype.time_zone is not None:
            column, aware = column.dt.convert_time_zone("UTC").dt.replace_time_zone(None), True
        column = column.to_list() if column.dtype in (nw.String, nw.Object) else column.to_numpy()
    column = np.asarray(column)
    if column.dtype.kind in "OUS":
        texts = [isinstance(one, str) for one in column]
        if any(texts) and not all(texts):
            row = texts.index(False)
            raise ValueError(f"row {row}: {name} is {column[row]!r}, expected a timestamp")
        offsets = [_has_offset(one) for one in column if not _absent(one)]
        aware = any(offsets)
        if aware and not all(offsets):
            raise ValueError(f"column {name!r} mixes timestamps with and without a UTC offset; write all alike")
        column = np.asarray([_stamp_of(one) for one in column], "M8[ns]")
    if column.dtype.kind != "M":
        if column.size:
            raise ValueError(f"column {name!r} holds {column.dtype}, expected timestamps")
        column = column.astype("M8[ns]")
    stamps = column.astype("M8[ns]")
    if np.isnat(stamps).any():
        raise ValueError(f"row {int(np.isnat(stamps).argmax())} has no {name}; every row needs one")
    return grid.to_utc(stamps, tz) if tz is not None and not aware else stamps


def _has_offset(stamp: Any) -> bool:
    """Whether a text, or a datetime of Python or pandas, says how far it is from UTC."""
    if not isinstance(stamp, str):
        return getattr(stamp, "tzinfo", None) is not None
    tail = stamp.strip()[10:]
    return tail.endswith(("Z", "z")) or "+" in tail or "-" in tail


def _stamp_of(value: Any) -> np.datetime64:
    """A start or timestamp of any kind as naive UTC: a period counts as its first moment."""
    if isinstance(value, str):
        return parse(str(value))  # NumPy's own str would show in a message
    if hasattr(value, "to_timestamp"):  # a pandas Period
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # pandas warns of business-day periods, which GluonTS uses
            # A weekly period is stamped with its last day, as pandas offsets are: W-SUN falls on Sundays.
            week = value.freqstr.lstrip("0123456789").startswith("W")
            value = value.to_timestamp(how="end").normalize() if week else value.to_timestamp(how="start")
    if getattr(value, "tzinfo", None) is not None:
        value = value.astimezone(UTC).replace(tzinfo=None)
    try:
        return np.datetime64(value.to_datetime64() if hasattr(value, "to_datetime64") else value, "ns")
    except (TypeError, ValueError) as error:
        raise ValueError(f"{value!r} is no timestamp") from error


def _numbers(column: Any, name: str) -> np.ndarray:
    """A column of numbers as float64; null becomes NaN."""
    if hasattr(column, "dtype") and hasattr(column, "to_native"):
        import narwhals as nw

        if not column.dtype.is_numeric():
            if len(column) == column.null_count():
                return np.full(len(column), np.nan)
            raise ValueError(f"column {name!r} holds {column.dtype}, expected numbers")
        return np.asarray(column.cast(nw.Float64).to_numpy(), np.float64)
    out = np.empty(len(column))
    for i, one in enumerate(column):
        if one is None:
            out[i] = np.nan
        elif isinstance(one, int | float | np.integer | np.floating) and not isinstance(one, bool):
            out[i] = one
        else:
            raise ValueError(f"row {i}: column {name!r} holds {one!r}, expected a number")
    return out


def _grid(
    name: str, stamps: np.ndarray, values: np.ndarray, grid: Clock, variates: tuple[str, ...], n_known: int
) -> Series:
    """Sorted rows of one item, put on the grid of its first row."""
    try:
        steps, fits = grid.steps(stamps[0], stamps)
    except ValueError as error:
        raise ValueError(f"item {name!r}: {error}") from error
    if not fits.all():
        bad = stamps[int((~fits).argmax())]
        raise ValueError(
            f"item {name!r}: {show(bad)} is not on the {grid.freq!r} grid that starts at {show(stamps[0])}; "
            "give the right freq, or align the timestamps"
        )
    moves = np.diff(steps)
    if (moves == 0).any():
        again = stamps[1:][moves == 0][0]
        raise ValueError(f"item {name!r}: {show(again)} occurs twice; keep one row per item and timestamp")
    if len(moves) > 1 and moves[0] > 1 and (moves == moves[0]).all():
        raise ValueError(
            f"item {name!r}: every row is {moves[0]} steps of {grid.freq!r} after the one before, from "
            f"{show(stamps[0])} on: another frequency; read it separately with its own freq"
        )
    if steps[-1] >= MAX_FILL:
        raise ValueError(
            f"item {name!r}: {show(stamps[-1])} is {steps[-1]} steps of {grid.freq!r} after {show(stamps[0])}, "
            f"more than {MAX_FILL}; is it a wrong date?"
        )
    bad_cell = np.isinf(values).any(0)
    if bad_cell.any():
        raise ValueError(
            f"item {name!r}: infinite value at {show(stamps[int(bad_cell.argmax())])}; write NaN if missing"
        )
    full = np.full((len(values), int(steps[-1]) + 1), np.nan)
    full[:, steps] = values
    n_variates = len(variates)
    length, known = full.shape[1], None
    if n_known:
        known = full[n_variates:]
        seen = np.flatnonzero(~np.isnan(full[:n_variates]).all(0))
        length = int(seen[-1]) + 1 if len(seen) else length
    return Series(name, stamps[0], grid.freq, full[:n_variates, :length], known, (), variates)


def _from_dict(entry: Mapping[str, Any], place: int, grid: Clock, variates: tuple[str, ...]) -> Series:
    """One GluonTS entry."""
    name = str(entry.get("item_id", place))
    if "target" not in entry:
        raise ValueError(f"entry {name!r} has no target; it has {', '.join(entry)}")
    try:
        values = np.atleast_2d(np.asarray(entry["target"], np.float64))
    except (TypeError, ValueError) as error:
        raise ValueError(f"entry {name!r}: the target is no array of numbers") from error
    if len(variates) != len(values):
        variates = ("target",) if len(values) == 1 else tuple(f"target_{v}" for v in range(len(values)))
    known = entry.get("feat_dynamic_real")
    start = _stamp_of(entry["start"])
    if not grid.on_grid(start):
        raise ValueError(f"entry {name!r}: a grid of freq {grid.freq!r} cannot start at {show(start)}")
    static = tuple(int(one) + 1 for one in np.ravel(entry.get("feat_static_cat", ())))
    known = None if known is None else np.atleast_2d(np.asarray(known, np.float64))
    return Series(name, start, grid.freq, values, known, static, variates)


def _same_freq(series: Series, grid: Clock) -> Series:
    if series.freq != grid.freq:
        raise ValueError(f"item {series.item_id!r} has freq {series.freq!r}, expected {grid.freq!r}")
    return series
