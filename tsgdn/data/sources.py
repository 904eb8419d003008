"""Public source files -> the columns of `data.parquet`; one function per kind of file.

A loader gets the fetched files (their hashes are right), the catalogue's `source` and the entry. `catalog.get` compares
a digest of what it returns with the catalogue, so a loader that misreads a file is found out.
"""

import csv
import gzip
import hashlib
import io
import json
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tsgdn.data.clock import clock, parse

if TYPE_CHECKING:
    from tsgdn.data.catalog import CatalogEntry

Columns = dict[str, np.ndarray]


def read_parquet(path: Path) -> Columns:
    """A parquet file as arrays by column; text becomes str."""
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    out = {}
    for name in table.column_names:
        array = table[name].combine_chunks().to_numpy(zero_copy_only=False)
        if array.dtype.kind == "f":  # R writes NA as a signalling NaN, which warns when cast
            array = np.where(np.isnan(array), array.dtype.type(np.nan), array)
        out[name] = array.astype(str) if array.dtype == object else array
    return out


def write_parquet(columns: Mapping[str, np.ndarray], path: Path) -> None:
    """Columns as a parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    arrays = {n: pa.array(c.tolist() if c.dtype.kind in "OU" else c) for n, c in columns.items()}
    pq.write_table(pa.table(arrays), path, compression="zstd")


def digest(columns: Mapping[str, np.ndarray]) -> str:
    """sha256 of names and values, whatever wrote the file: int64 nanoseconds, text, float64 with one kind of NaN."""
    out = hashlib.sha256()
    for name, column in columns.items():
        out.update(name.encode() + b"\0")
        if column.dtype.kind == "M":
            out.update(column.astype("M8[ns]").astype("<i8").tobytes())
        elif column.dtype.kind in "OU":
            out.update("\0".join(map(str, column)).encode())
        else:
            values = column.astype("<f8") + 0.0  # no negative zeros
            out.update(np.where(np.isnan(values), np.nan, values).tobytes())
    return out.hexdigest()


def _text(path: Path, member: str | None) -> str:
    """The text of a file, of a member of a zip archive, or of a gzip file."""
    raw = path.read_bytes()
    if raw[:2] == b"PK":
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            found = [n for n in archive.namelist() if n == member or n.endswith(f"/{member}")]
            if not found:
                raise ValueError(f"the archive has no {member}")
            raw = archive.read(found[0])
    elif raw[:2] == b"\x1f\x8b":
        raw = gzip.decompress(raw)
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def _number(cell: str) -> float:
    return float(cell) if cell.strip() not in ("", "?", "NA", "NaN", "nan") else np.nan


def load_csv(paths: list[Path], source: Mapping[str, Any], entry: "CatalogEntry") -> Columns:
    """A table with a header whose first column is the time."""
    rows = list(csv.reader(io.StringIO(_text(paths[0], source.get("member")))))
    header, rows = rows[0], [row for row in rows[1:] if row]
    out: Columns = {"timestamp": np.array([parse(row[0]) for row in rows], "M8[ns]")}
    for i, name in enumerate(header[1:], 1):
        out[name] = np.array([_number(row[i]) for row in rows]).astype(entry.dtype)
    return out


def load_matrix(paths: list[Path], source: Mapping[str, Any], entry: "CatalogEntry") -> Columns:
    """A table without times, rows on an assigned grid; `header` says whether names come first, else v0, v1, ..."""
    rows = [row for row in csv.reader(io.StringIO(_text(paths[0], source.get("member")))) if row]
    names = rows.pop(0) if source.get("header") else [f"v{i}" for i in range(len(rows[0]))]
    values = np.array([[_number(cell) for cell in row] for row in rows]).astype(entry.dtype)
    stamps = clock(entry.freq).timestamp(parse(source["start"]), np.arange(len(values)))
    return {"timestamp": stamps, **{str(name): values[:, i] for i, name in enumerate(names)}}


def read_tsf(text: str) -> list[tuple[dict[str, str], np.ndarray]]:
    """The series of a Monash .tsf file: attributes and values; `?` is NaN."""
    attributes, series, in_data = [], [], False
    for line in text.splitlines():
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        if line.startswith("@"):
            words = line.split()
            in_data = words[0].lower() == "@data"
            if words[0].lower() == "@attribute":
                attributes.append(words[1])
        elif in_data:
            fields = line.split(":")
            if len(fields) != len(attributes) + 1:
                raise ValueError(f"a line with {len(fields) - 1} attributes, the header names {len(attributes)}")
            values = np.array([_number(cell) for cell in fields[-1].split(",")])
            series.append((dict(zip(attributes, fields[:-1], strict=True)), values))
    if not series:
        raise ValueError("no @data in the file")
    return series


def _period_start(text: str, freq: str) -> np.datetime64:
    """A .tsf start, `1975-10-01 00-00-00`, on the first of its month, quarter or year where that is the step."""
    date, _, time = text.partition(" ")
    stamp = parse(f"{date}T{time.replace('-', ':')}" if time else date)
    if freq.startswith("MS"):
        return stamp.astype("M8[M]").astype("M8[ns]")
    if freq.startswith("QS"):
        month = stamp.astype("M8[M]").astype(np.int64)
        return np.datetime64(int(month - month % 3), "M").astype("M8[ns]")
    return stamp.astype("M8[Y]").astype("M8[ns]") if freq.startswith("YS") else stamp


def load_tsf(paths: list[Path], source: Mapping[str, Any], entry: "CatalogEntry") -> Columns:
    """A Monash .tsf file, wide where the entry is (all series on one grid), else long."""
    series = read_tsf(_text(paths[0], source.get("member")))
    grid = clock(entry.freq)
    starts = [_period_start(fields["start_timestamp"], entry.freq) for fields, _ in series]
    if entry.layout == "wide":
        if len({(str(s), len(v)) for s, (_, v) in zip(starts, series, strict=True)}) > 1:
            raise ValueError("the series differ in start or length, the catalogue says they do not")
        stamps = grid.timestamp(starts[0], np.arange(len(series[0][1])))
        return {"timestamp": stamps, **{f["series_name"]: v.astype(entry.dtype) for f, v in series}}
    return _long([(f["series_name"], s, v) for s, (f, v) in zip(starts, series, strict=True)], entry)


def _long(series: list[tuple[str, np.datetime64, np.ndarray]], entry: "CatalogEntry") -> Columns:
    grid = clock(entry.freq)
    return {
        "item_id": np.concatenate([np.full(len(v), name, object) for name, _, v in series]),
        "timestamp": np.concatenate([grid.timestamp(start, np.arange(len(v))) for _, start, v in series]),
        "target": np.concatenate([v for _, _, v in series]).astype(entry.dtype),
    }


def load_m4(paths: list[Path], source: Mapping[str, Any], entry: "CatalogEntry") -> Columns:
    """M4: the training csv, the test csv, and the Monash .tsf that carries the start times."""
    parts: dict[str, list[str]] = {}
    for path in paths[:2]:
        for row in list(csv.reader(io.StringIO(_text(path, None))))[1:]:
            parts.setdefault(row[0], []).extend(cell for cell in row[1:] if cell.strip())
    starts = [_period_start(f["start_timestamp"], entry.freq) for f, _ in read_tsf(_text(paths[2], None))]
    if len(starts) != len(parts):
        raise ValueError(f"{len(parts)} series, but {len(starts)} start times")
    rows = zip(parts.items(), starts, strict=True)
    return _long([(name, start, np.array(cells, np.float64)) for (name, cells), start in rows], entry)


def load_gluonts_rolling(paths: list[Path], source: Mapping[str, Any], entry: "CatalogEntry") -> Columns:
    """A GluonTS archive with rolling test entries: the longest entry of each variate holds all rows."""
    with tarfile.open(paths[0]) as archive:
        found = sorted(
            m.name
            for m in archive.getmembers()
            if "/test/" in f"/{m.name}"
            and m.name.endswith((".json", ".json.gz"))
            and not Path(m.name).name.startswith(".")
        )
        if not found:
            raise ValueError("the archive has no test/*.json")
        file = archive.extractfile(found[0])
        raw = file.read() if file else b""
    lines = (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode().splitlines()
    entries = [json.loads(line) for line in lines if line.strip()][-entry.n_series :]
    values = np.array([one["target"] for one in entries]).astype(entry.dtype)
    stamps = clock(entry.freq).timestamp(parse(str(entries[0]["start"])[:10]), np.arange(values.shape[1]))
    return {"timestamp": stamps, **{f"v{i}": row for i, row in enumerate(values)}}


LOADERS: dict[str, Callable[[list[Path], Mapping[str, Any], "CatalogEntry"], Columns]] = {
    "csv": load_csv,
    "matrix": load_matrix,
    "tsf": load_tsf,
    "m4": load_m4,
    "gluonts_rolling": load_gluonts_rolling,
}
