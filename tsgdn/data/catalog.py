"""The data sets that the project knows: where they are, what they are, and the protocols that they are scored by.

`datasets/catalog.yaml` is the one list. Data is looked for in `$TSGDN_DATA`, then in the user cache (`$TSGDN_CACHE`,
or `~/.cache/tsgdn`); `get` fetches it from its public source into the cache.
"""

import difflib
import hashlib
import http.client
import json
import os
import sys
import tempfile
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any, overload

import numpy as np

from tsgdn.data import regimes, sources
from tsgdn.data.clock import clock
from tsgdn.data.series import Series


class DataNotFound(FileNotFoundError):
    """A catalogued set is not on this machine, or could not be fetched; the text says where it was looked for."""


@dataclass(frozen=True, kw_only=True)
class CatalogEntry:
    """What the catalogue says of one set.

    Attributes:
        name: also the folder of `data.parquet`.
        layout: wide (a column per variate), long (item_id, timestamp, target), panel (item_id, timestamp, variates), or
            simulated (no file).
        horizon: customary.
        windows: customary test windows: a number, "all" (every window of the test part) or "prequential".
        stride: steps between windows; 0 = the horizon.
        seasonality: m of the protocol, for the naive forecast and for MASE.
        season: the natural season length.
        length: steps, or the shortest and the longest.
        calendar: whether timestamps can be trusted to carry calendar features.
        known: columns that are known in advance.
        extra_columns: columns that are no variates.
        split: row ranges [a, b) per protocol.
        licence: of the data.
        licence_basis: what that rests on: a text that was read, or memory.
        source: `url`, `sha256`, `bytes`, `loader`, ...; `reason` where no loader exists.
        file: `sha256`, `bytes` of our parquet file and `content`, a digest of its values.
        benchmarks: published protocols that the set reproduces.
        partial: set where this is a cut of the customary set.
    """

    name: str
    title: str
    layout: str
    freq: str
    horizon: int
    windows: int | str
    stride: int
    seasonality: int
    season: int
    n_series: int
    length: int | tuple[int, int]
    calendar: bool
    licence: str
    licence_basis: str
    timestamps: str
    dtype: str
    source: dict[str, Any]
    file: dict[str, Any]
    split: dict[str, Any]
    benchmarks: tuple[dict[str, Any], ...] = ()
    known: tuple[str, ...] = ()
    extra_columns: tuple[str, ...] = ()
    irregular: bool = False
    partial: str = ""


@dataclass(frozen=True)
class Dataset:
    """Series with their catalogue entry."""

    name: str
    series: list[Series]
    meta: CatalogEntry


@dataclass(frozen=True, kw_only=True)
class Task:
    """An evaluation cell: a data set and the windows that fix the number.

    Attributes:
        name: of the cell, such as `etth1` or `us_births/M`.
        dataset: its name in the catalogue.
        freq: of the series that are scored, after resampling.
        horizon: steps per forecast.
        windows: forecasts per series, the last of which ends with the rows.
        stride: steps between the starts of windows.
        seasonality: m of MASE and of the naive forecast.
        resample: `(freq, "sum" | "mean")`, or None as stored.
        rows: half-open range of rows that the cell uses, before resampling; None = all.
        validation: steps at the end of the training part that are meant for validation.
        calendar: whether calendar features mean something here.
        seasonal_naive: `wql`, `mase` of the seasonal naive forecast, where the protocol is locked.
        suite: where the protocol comes from.
    """

    name: str
    dataset: str
    freq: str
    horizon: int
    windows: int
    stride: int
    seasonality: int
    validation: int
    calendar: bool
    suite: str
    resample: tuple[str, str] | None = None
    rows: tuple[int, int] | None = None
    seasonal_naive: dict[str, float] | None = None

    @property
    def first_origin(self) -> int:
        """First forecast step of the earliest window, counted from the end of a series (negative)."""
        return -(self.horizon + self.stride * (self.windows - 1))

    def series(self, *, multivariate: bool = False) -> list[Series]:
        """The whole series of the cell, the test part included: cut, resampled, rounded to float32 as GluonTS does."""
        return [self._prepare(one) for one in load(self.dataset, multivariate=multivariate).series]

    def split(self, *, multivariate: bool = False) -> tuple[list[Series], "Instances"]:
        """The training part and the test windows, item by item.

        Returns:
            The series up to the earliest forecast range, and pairs (context, label): the context is a copy that ends
            before the label (V, horizon), known features go up to the label's end.

        Raises:
            DataNotFound: the data is not here.
            ValueError: a series is too short for the windows.
        """
        whole = self.series(multivariate=multivariate)
        train = []
        for one in whole:
            origin = len(one) + self.first_origin
            if origin < 1:
                raise ValueError(f"{self.name}: series {one.item_id!r} has {len(one)} steps, too few for the windows")
            train.append(_cut(one, origin, origin))
        return train, Instances(self, whole)

    def _prepare(self, series: Series) -> Series:
        if self.rows is not None:
            series = series.slice(*self.rows)
            series = replace(series, known=None if series.known is None else series.known[:, : len(series)])
        if self.resample is not None:
            series = _resample(series, *self.resample)
        return replace(series, values=series.values.astype(np.float32).astype(np.float64))


class Instances(Sequence[tuple[Series, np.ndarray]]):
    """The test windows of a task; each access copies one context, so none can lead to its future."""

    def __init__(self, task: Task, whole: list[Series]):
        self._task = task
        self._whole = whole

    def __len__(self) -> int:
        return len(self._whole) * self._task.windows

    @overload
    def __getitem__(self, index: int) -> tuple[Series, np.ndarray]: ...
    @overload
    def __getitem__(self, index: slice) -> list[tuple[Series, np.ndarray]]: ...
    def __getitem__(self, index):
        """One pair (context, label), or a list of them."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        item, window = divmod(index % len(self), self._task.windows)
        series = self._whole[item]
        origin = len(series) + self._task.first_origin + self._task.stride * window
        end = origin + self._task.horizon
        return _cut(series, origin, end), series.values[:, origin:end].copy()

    def __iter__(self) -> Iterator[tuple[Series, np.ndarray]]:
        return (self[i] for i in range(len(self)))


def _cut(series: Series, end: int, known_end: int) -> Series:
    """A copy of the steps before `end`, known features before `known_end`; nothing of it refers to the rest."""
    known = None if series.known is None else series.known[:, :known_end].copy()
    return replace(series, values=series.values[:, :end].copy(), known=known)


def _resample(series: Series, freq: str, how: str) -> Series:
    """Sums or means over the steps of a coarser clock (calendar months, hours); NaN where nothing was observed."""
    stamps = series.timestamps
    bins = stamps.astype({"MS": "M8[M]", "h": "M8[h]", "D": "M8[D]"}[freq])
    starts = np.flatnonzero(np.concatenate([[True], bins[1:] != bins[:-1]]))
    seen = ~np.isnan(series.values)
    total = np.add.reduceat(np.where(seen, series.values, 0.0), starts, axis=1)
    count = np.add.reduceat(seen.astype(np.int64), starts, axis=1)
    values = np.where(count > 0, total / np.maximum(count, 1) if how == "mean" else total, np.nan)
    return replace(series, start=bins[0].astype("M8[ns]"), freq=freq, values=values, known=None)


@cache
def _catalog() -> dict[str, Any]:
    import yaml

    packed = files("tsgdn").joinpath("data", "catalog.yaml")
    if packed.is_file():
        text = packed.read_text(encoding="utf-8")
    else:  # an editable install, or the repository itself
        text = Path(__file__).parents[2].joinpath("datasets", "catalog.yaml").read_text(encoding="utf-8")
    return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def names() -> tuple[str, ...]:
    """Names of all sets."""
    return tuple(_catalog()["sets"])


def entry(name: str) -> CatalogEntry:
    """The catalogue entry of a set.

    Raises:
        KeyError: there is no such set.
    """
    return _entries().get(name) or _unknown(name, names(), "data set")


@cache
def _entries() -> dict[str, CatalogEntry]:
    out = {}
    for name, found in _catalog()["sets"].items():
        fields: dict[str, Any] = {
            k: tuple(v) if k in ("known", "extra_columns", "benchmarks") else v for k, v in found.items()
        }
        fields["length"] = tuple(fields["length"]) if isinstance(fields["length"], list) else fields["length"]
        out[name] = CatalogEntry(name=name, **fields)
    return out


@cache
def tasks() -> dict[str, Task]:
    """The evaluation cells by name."""
    out = {}
    for name, found in _catalog()["tasks"].items():
        fields: dict[str, Any] = {k: tuple(v) if k in ("rows", "resample") else v for k, v in found.items()}
        calendar = entry(fields["dataset"]).calendar
        out[name] = Task(name=name, calendar=calendar, **fields)
    return out


def cells() -> tuple[Task, ...]:
    """The evaluation cells in catalogue order."""
    return tuple(tasks().values())


def task(name: str) -> Task:
    """One evaluation cell.

    Raises:
        KeyError: there is no such cell.
    """
    return tasks().get(name) or _unknown(name, tuple(tasks()), "task")


@dataclass(frozen=True, kw_only=True)
class OnlineTask:
    """A set that is streamed: every window of its test rows at stride 1, scored on z-scores.

    The first target row of each horizon is the first test row, and the last window ends with the last one; what a model
    may look back on is everything before, without limit.

    Attributes:
        name: of the set and of the protocol.
        dataset: its name in the catalogue.
        train: rows that weights, mean and standard deviation (ddof 0) come from.
        validation: rows after them that choices are made by.
        test: rows after those.
        seasonality: m of the seasonal naive.
        protocol: whose split it is.
    """

    name: str
    dataset: str
    train: tuple[int, int]
    validation: tuple[int, int]
    test: tuple[int, int]
    seasonality: int
    protocol: str

    def series(self) -> Series:
        """All rows up to the end of the test part, as one series of all variates, in the unit of the set.

        Raises:
            DataNotFound: the data is not here.
        """
        (whole,) = load(self.dataset, multivariate=True).series
        return _cut(whole, self.test[1], self.test[1])


_DSOF = "DSOF (ICLR 2025), the split of FSNet and OneNet"
_ONLINE = {
    # ETT: 4 and 1 months, then 15; others: 20, 5 and 75 % of the rows
    "etth1_dsof": ("etth1", 2880, 3600, 14400, 24, _DSOF),
    "ettm1_dsof": ("ettm1", 11520, 14400, 57600, 96, _DSOF),
    "wth_dsof": ("wth", 7012, 8766, 35064, 24, _DSOF),
    "exchange_rate_dsof": ("exchange_rate", 1517, 1897, 7588, 5, _DSOF),
    # 60, 10 and 30 % of all rows
    "etth1_adaptz": ("etth1", 10452, 12194, 17420, 24, "ADAPT-Z"),
}


@cache
def online_tasks() -> dict[str, OnlineTask]:
    """The sets that are streamed, by name."""
    return {
        name: OnlineTask(
            name=name,
            dataset=dataset,
            train=(0, train),
            validation=(train, begin),
            test=(begin, end),
            seasonality=m,
            protocol=protocol,
        )
        for name, (dataset, train, begin, end, m, protocol) in _ONLINE.items()
    }


def online_task(name: str) -> OnlineTask:
    """One set that is streamed.

    Raises:
        KeyError: there is no such task.
    """
    return online_tasks().get(name) or _unknown(name, tuple(online_tasks()), "online task")


def _unknown(name: str, known: Sequence[str], what: str) -> Any:
    near = difflib.get_close_matches(name, known, 3)
    hint = f"did you mean {' or '.join(near)}?" if near else "`tsgdn data list` shows all sets, `describe` their tasks"
    raise KeyError(f"{what} {name!r} is not in the catalogue; {hint}")


def cache_folder() -> Path:
    """Where fetched data goes: `$TSGDN_CACHE`, or `~/.cache/tsgdn`."""
    override = os.environ.get("TSGDN_CACHE")
    return Path(override) if override else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tsgdn"


def _folders() -> list[Path]:
    given = os.environ.get("TSGDN_DATA")
    return [*([Path(given)] if given else []), cache_folder()]


def find(name: str) -> Path:
    """The set's `data.parquet`, in `$TSGDN_DATA` or in the cache.

    Raises:
        DataNotFound: it is in neither.
        KeyError: there is no such set.
    """
    entry(name)
    for folder in _folders():
        path = folder / name / "data.parquet"
        if path.is_file():
            return path
    looked = ", ".join(str(folder) for folder in _folders())
    where = "" if os.environ.get("TSGDN_DATA") else " ($TSGDN_DATA is not set)"
    raise DataNotFound(f"{name} is not here: looked in {looked}{where}; fetch it with `tsgdn data get {name}`")


def load(name: str, *, multivariate: bool = False) -> Dataset:
    """A set as series, univariate unless asked otherwise; rows are taken as consecutive steps.

    Args:
        name: in the catalogue; `simulated` needs no file.
        multivariate: one V-variate series instead of a series per column.

    Raises:
        DataNotFound: the data is not here.
        KeyError: there is no such set.
        ValueError: `multivariate` for a set of separate series.
    """
    meta = entry(name)
    if meta.layout == "simulated":
        series = regimes.simulate("seasonal")
        return Dataset(name, series if multivariate else [part for one in series for part in one.univariate()], meta)
    path = find(name)
    columns = sources.read_parquet(path)
    if meta.layout == "long" and multivariate:
        raise ValueError(f"{name} holds separate series, not variates of one: load it without multivariate=True")
    stamps = columns.pop("timestamp").astype("M8[ns]")
    ids = columns.pop("item_id", None)
    known = [columns[c] for c in meta.known]
    values = {c: v.astype(np.float64) for c, v in columns.items() if c not in meta.extra_columns}
    variates = ("target",) if meta.layout == "long" else tuple(values)
    bounds = [0, len(stamps)] if ids is None else [0, *np.flatnonzero(ids[1:] != ids[:-1]) + 1, len(stamps)]
    series = []
    for a, b in pairwise(bounds):
        one = Series(
            item_id=name if ids is None else str(ids[a]),
            start=stamps[a],
            freq=_typical_freq(stamps[a:b], meta.freq) if meta.irregular else meta.freq,
            values=np.stack([v[a:b] for v in values.values()]),
            known=np.stack([k[a:b] for k in known]).astype(np.float64) if known else None,
            variates=variates,
        )
        series += [one] if multivariate or meta.layout == "long" else _columns_of(one, named=ids is not None)
    return Dataset(name, series, meta)


def _columns_of(series: Series, *, named: bool) -> list[Series]:
    """A series per variate; of a wide set they are named by the variate alone."""
    parts = [
        replace(series, item_id=variate, values=series.values[v : v + 1], variates=("target",))
        for v, variate in enumerate(series.variates)
    ]
    return [replace(p, item_id=f"{series.item_id}/{p.item_id}") for p in parts] if named else parts


def _typical_freq(stamps: np.ndarray, default: str) -> str:
    """The median step of an irregular stream as a frequency; its rows then count as steps."""
    if len(stamps) < 2:
        return default
    seconds = int(np.median(np.diff(stamps).astype(np.int64)) // 1_000_000_000)
    return clock(f"{seconds}s").freq if seconds > 0 else default


def get(name: str, *, force: bool = False, stream: Any = None) -> Path:
    """Fetches a set from its public source into the cache, verifies it, and writes `data.parquet`.

    Nothing is left behind when a hash is wrong or the connection breaks.

    Args:
        name: in the catalogue.
        force: fetch although it is here.
        stream: where progress goes; default stderr.

    Returns:
        The path of the parquet file.

    Raises:
        DataNotFound: no network, no automatic source, or the source is not what the catalogue expects.
        KeyError: there is no such set.
    """
    meta = entry(name)
    if meta.layout == "simulated":
        raise DataNotFound(f"{name} needs no file: it is simulated when loaded")
    if not force:
        try:
            return find(name)
        except DataNotFound:
            pass
    source = meta.source
    if "loader" not in source:
        raise DataNotFound(
            f"{name} cannot be fetched automatically ({source['reason']}); its source is {source['url']}; "
            "put a data.parquet made from it under $TSGDN_DATA"
        )
    folder = cache_folder() / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}-") as partial:
        fetched = [
            _fetch(name, part, Path(partial) / f"source{i}", stream or sys.stderr)
            for i, part in enumerate([source, *source.get("more", ())])
        ]
        try:
            columns = sources.LOADERS[source["loader"]](fetched, source, meta)
            digest = sources.digest(columns)
        except (ValueError, KeyError, OSError, IndexError) as error:
            raise DataNotFound(f"{name}: the file from {source['url']} could not be read: {error}") from error
        if digest != meta.file["content"]:
            raise DataNotFound(
                f"{name}: the values read from {source['url']} differ from the catalogue's (digest {digest[:12]}, "
                f"expected {meta.file['content'][:12]}); nothing was kept"
            )
        made = Path(partial) / "data.parquet"
        sources.write_parquet(columns, made)
        (Path(partial) / "source.json").write_text(json.dumps({"name": name, **source}, indent=1))
        folder.mkdir(exist_ok=True)
        os.replace(Path(partial) / "source.json", folder / "source.json")
        os.replace(made, folder / "data.parquet")
    return folder / "data.parquet"


def _fetch(name: str, part: dict[str, Any], target: Path, stream: Any) -> Path:
    """Downloads one file and checks its hash; the partial file goes when anything is wrong."""
    digest, size, limit = hashlib.sha256(), 0, int(part["bytes"])
    try:
        with urllib.request.urlopen(part["url"], timeout=30) as answer, target.open("wb") as file:
            while block := answer.read(1 << 18):
                size += len(block)
                if size > limit:
                    break
                digest.update(block)
                file.write(block)
                print(f"\r{name}: {size / 1e6:.1f} of {limit / 1e6:.1f} MB", end="", file=stream, flush=True)
    except (OSError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors, half an answer is not
        target.unlink(missing_ok=True)
        reason = getattr(error, "reason", None) or error
        raise DataNotFound(
            f"{name}: could not download {part['url']}: {reason}; is there a network? Without one, put the file "
            f"{name}/data.parquet under $TSGDN_DATA"
        ) from error
    finally:
        if size:
            print(file=stream)
    if digest.hexdigest() != part["sha256"] or size != limit:
        target.unlink(missing_ok=True)
        found = f"more than {limit} bytes" if size > limit else f"{size} bytes, sha256 {digest.hexdigest()[:12]}..."
        raise DataNotFound(
            f"{name}: {part['url']} has {found}, where the catalogue expects {limit} bytes, sha256 "
            f"{part['sha256'][:12]}...; it was deleted: the source changed, or something altered it on the way"
        )
    return target


def table() -> str:
    """The catalogue as the markdown tables of `datasets/README.md`."""
    out = [
        "| set | series | length | freq | horizon | windows | m | calendar | `get` | source | licence |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for e in (entry(name) for name in names()):
        length = e.length if isinstance(e.length, int) else f"{e.length[0]} to {e.length[1]}"
        if e.windows == "all":
            windows = f"all, stride {e.stride}"
        else:
            windows = f"{e.windows}" + (f", stride {e.stride}" if e.stride else "")
        url = e.source.get("url", "")
        link = f"[{e.source.get('label', 'source')}]({url})" if url else e.source.get("reason", "")
        fetch = "-" if e.layout == "simulated" else "yes" if "loader" in e.source else "no"
        licence = e.licence + (" (recalled)" if "recalled" in e.licence_basis else "")
        out.append(
            f"| `{e.name}`{' (cut)' if e.partial else ''} | {e.n_series} | {length} | {e.freq} | {e.horizon} "
            f"| {windows} | {e.seasonality} | {'yes' if e.calendar else 'no'} | {fetch} | {link} | {licence} |"
        )
    out += [
        "",
        "| task | set | freq | horizon | windows | stride | m | resample | suite | naive WQL | naive MASE |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for t in cells():
        score = t.seasonal_naive or {}
        out.append(
            f"| `{t.name}` | `{t.dataset}` | {t.freq} | {t.horizon} | {t.windows} | {t.stride} | {t.seasonality} "
            f"| {' '.join(reversed(t.resample)) if t.resample else ''} | {t.suite} "
            f"| {score.get('wql', '')} | {score.get('mase', '')} |"
        )
    return "\n".join(out)
