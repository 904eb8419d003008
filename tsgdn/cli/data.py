"""`tsgdn data`: list, describe and fetch the catalogued sets; simulate one."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the sub-commands of `tsgdn data`."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="{list,describe,get,simulate}")
    one = actions.add_parser("list", help="every catalogued set: name, freq, series, horizon, where it was found")
    one.add_argument("--json", action="store_true", help="one JSON array on stdout")
    one = actions.add_parser("describe", help="all about one set: source, licence, splits, evaluation tasks")
    one.add_argument("name", metavar="NAME")
    one.add_argument("--json", action="store_true", help="one JSON object on stdout")
    one = actions.add_parser("get", help="fetch a set from its public source into the user cache, and verify it")
    one.add_argument("name", metavar="NAME")
    one.add_argument("--force", action="store_true", help="fetch although it is here")
    one.add_argument("--json", action="store_true", help="one JSON object on stdout")
    one = actions.add_parser("simulate", help="seasonal series with regime changes, from a seed")
    one.add_argument("kind", metavar="KIND", help="seasonal")
    one.add_argument(
        "--out", metavar="FILE", default="-", help=".csv, .jsonl or .parquet; - is CSV on stdout (default)"
    )
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--series", type=int, default=8)
    one.add_argument("--variates", type=int, default=2)
    one.add_argument("--steps", type=int, default=2000)
    one.add_argument("--freq", default="h", help="step of the series (default h)")
    one.add_argument("--json", action="store_true", help="one JSON object on stdout; not with --out -")


def run(args: argparse.Namespace) -> int:
    """Runs one sub-command.

    Returns:
        0, or 1 where data could not be fetched.

    Raises:
        Misuse: a name, kind or file that does not exist.
    """
    return {"list": _list, "describe": _describe, "get": _get, "simulate": _simulate}[args.action](args)


def _where(name: str) -> str | None:
    from tsgdn.data import catalog

    try:
        return str(catalog.find(name).parent)
    except catalog.DataNotFound:
        return None


def _entry(name: str) -> Any:
    from tsgdn.cli.main import Misuse
    from tsgdn.data import catalog

    try:
        return catalog.entry(name)
    except KeyError as error:
        raise Misuse(error.args[0]) from error


def _list(args: argparse.Namespace) -> int:
    from tsgdn.data import catalog

    rows = []
    for entry in map(catalog.entry, catalog.names()):
        found = "built in" if entry.layout == "simulated" else _where(entry.name)
        rows.append(
            {"name": entry.name, "freq": entry.freq, "series": entry.n_series, "horizon": entry.horizon, "found": found}
        )
    if args.json:
        print(json.dumps(rows))
        return 0
    _table(
        [("name", "freq", "series", "horizon", "found")]
        + [(*list(r.values())[:4], r["found"] or "not here") for r in rows]
    )
    return 0


def _table(rows: Sequence[tuple[object, ...]]) -> None:
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(str(cell).ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _describe(args: argparse.Namespace) -> int:
    from tsgdn.data import catalog

    entry = _entry(args.name)
    found = "built in" if entry.layout == "simulated" else _where(entry.name)
    tasks = [task for task in catalog.cells() if task.dataset == entry.name]
    if args.json:
        print(json.dumps({**asdict(entry), "found": found, "tasks": [asdict(task) for task in tasks]}))
        return 0
    length = entry.length if isinstance(entry.length, int) else f"{entry.length[0]} to {entry.length[1]}"
    rows: list[tuple[object, ...]] = [
        ("name", entry.name), ("title", entry.title), ("found", found or f"not here; `tsgdn data get {entry.name}`"),
        ("layout", entry.layout), ("freq", entry.freq), ("series", entry.n_series), ("length", length),
        ("horizon", entry.horizon), ("windows", entry.windows),
        ("seasonality", f"{entry.seasonality} (natural {entry.season})"),
        ("timestamps", entry.timestamps), ("calendar", "yes" if entry.calendar else "no: timestamps carry no meaning"),
        ("licence", entry.licence), ("", entry.licence_basis),
        ("source", entry.source.get("url", entry.source.get("reason", ""))),
        ("sha256", entry.source.get("sha256", "-")),
        ("get", entry.source.get("loader") or f"no: {entry.source['reason']}"),
    ]  # fmt: skip
    if entry.partial:
        rows.append(("cut", entry.partial))
    for name, part in entry.split.items():
        rows.append(("split", f"{name}: {json.dumps(part)}"))
    for task in tasks:
        naive = task.seasonal_naive
        text = (
            f"{task.name}: horizon {task.horizon}, windows {task.windows}, stride {task.stride}, m {task.seasonality}"
        )
        text += f", {task.resample[1]} per {task.resample[0]}" if task.resample else ""
        text += f"; seasonal naive WQL {naive['wql']}, MASE {naive['mase']}" if naive else ""
        rows.append(("task", text))
    _table(rows)
    return 0


def _get(args: argparse.Namespace) -> int:
    from tsgdn.data import catalog

    _entry(args.name)
    try:
        path = catalog.get(args.name, force=args.force)
    except catalog.DataNotFound as error:
        print(f"tsgdn data get: {error}", file=sys.stderr)
        return 1
    print(json.dumps({"name": args.name, "path": str(path)}) if args.json else path)
    return 0


def _simulate(args: argparse.Namespace) -> int:
    from tsgdn.cli.main import Misuse
    from tsgdn.data import regimes

    suffix = Path(args.out).suffix.lower()
    if args.out != "-" and suffix not in (".csv", ".jsonl", ".parquet"):
        raise Misuse(f"--out {args.out}: the name must end in .csv, .jsonl or .parquet")
    if args.out == "-" and args.json:
        raise Misuse("--json needs --out FILE: stdout carries the data")
    try:
        series = regimes.simulate(
            args.kind, series=args.series, variates=args.variates, steps=args.steps, freq=args.freq, seed=args.seed
        )
    except ValueError as error:
        raise Misuse(str(error)) from error
    if args.out == "-":
        sys.stdout.writelines(_lines(series, ".csv"))
        return 0
    try:
        _write(series, Path(args.out), suffix)
    except OSError as error:
        raise Misuse(f"--out {args.out}: {error.strerror or error}") from error
    rows = args.series * args.steps
    if args.json:
        print(json.dumps({"path": args.out, "series": args.series, "variates": args.variates, "rows": rows}))
    else:
        print(f"{args.out}: {args.series} series, {rows} rows", file=sys.stderr)
    return 0


def _write(series: list[Any], path: Path, suffix: str) -> None:
    if suffix == ".parquet":
        from tsgdn.data import frames, sources

        sources.write_parquet(frames.to_columns(series), path)
        return
    with path.open("w", encoding="utf-8", newline="") as file:
        file.writelines(_lines(series, suffix))


def _lines(series: list[Any], suffix: str) -> Any:
    """Rows `item_id, timestamp, <variates>`; a missing value is empty (CSV) or null (JSON)."""
    import numpy as np

    if suffix == ".csv":
        yield ",".join(["item_id", "timestamp", *series[0].variates]) + "\n"
    for one in series:
        stamps = one.timestamps
        stamps = np.datetime_as_string(stamps, unit="s" if (stamps == stamps.astype("M8[s]")).all() else "ms")
        for stamp, row in zip(stamps, one.values.T.tolist(), strict=True):
            if suffix == ".csv":
                yield ",".join([one.item_id, f"{stamp}Z", *("" if x != x else repr(x) for x in row)]) + "\n"
            else:
                cells = {name: None if x != x else x for name, x in zip(one.variates, row, strict=True)}
                yield json.dumps({"item_id": one.item_id, "timestamp": f"{stamp}Z", **cells}) + "\n"
