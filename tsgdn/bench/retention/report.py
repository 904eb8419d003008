"""The results.csv of a run, and the report that is rendered from it alone."""

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tsgdn.bench.retention.rows import HEADER

Lines = Sequence[Mapping[str, str]]


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes all rows; the file is the same however many pieces the run had."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part")
    with beside.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, HEADER, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(beside, path)


def read(path: Path) -> list[dict[str, str]]:
    """The rows, as text."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def render(lines: Lines) -> str:
    """The report in Markdown."""
    out = ["# Regime retention", ""]
    if any(line["preset"] == "smoke" for line in lines):
        out += ["**smoke: not evidence.** A small run that shows that everything works.", ""]
    for title, table in (
        ("Retention of rare regimes, mean over seeds [95 % interval]", _retention(lines)),
        ("Table 1. Primary endpoint", _primary(lines)),
        ("Paired differences in AURC", _differences(lines)),
        ("Table 2. Learning rates and failures", _rates(lines)),
        ("Table 3. Parameters and state bytes", _sizes(lines)),
        ("Table 4. References", _references(lines)),
        ("Table 5. Controls", _controls(lines)),
        ("Measured series: error at a return over the usual error, by days away", _real(lines)),
    ):
        if table:
            out += [f"## {title}", "", *table, ""]
    return "\n".join(out) + _origin(lines)


def _retention(lines: Lines) -> list[str]:
    found: dict[tuple[str, ...], dict[int, str]] = {}
    gaps: set[int] = set()
    for line in lines:
        if line["phase"] != "report" or not line["gap"]:
            continue
        mean = line["metric"] == "mean_ret_rare"
        if mean or line["metric"] == "ret_rare":
            key = (line["task"], line["state_kib"], line["mixer"], line["init"], line["config"])
            gap = int(line["gap"])
            gaps.add(gap)
            text = _number(line["value"])
            if mean:
                found.setdefault(key, {})[gap] = f"{text} [{_number(line['low'])}, {_number(line['high'])}]"
            else:
                found.setdefault(key, {}).setdefault(gap, text)
    order = sorted(gaps)
    body = [[*key[:3], _axes(key[4]), *(cell.get(gap, "") for gap in order)] for key, cell in sorted(found.items())]
    return _table(["task", "KiB", "mixer", "axes", *(f"G {gap}" for gap in order)], body, 4)


def _primary(lines: Lines) -> list[str]:
    body = []
    for line in lines:
        if line["metric"] == "primary_difference":
            interval = f"[{_number(line['low'])}, {_number(line['high'])}]"
            body.append([line["state_kib"], line["mixer"], line["task"], _number(line["value"]), interval, ""])
        elif line["metric"] == "verdict":
            body.append([line["state_kib"], line["mixer"], line["task"], "", "", f"**{line['value']}**"])
    return _table(["KiB", "contrast", "task", "difference in AURC", "interval (Holm)", "verdict"], body, 3)


def _differences(lines: Lines) -> list[str]:
    body = [
        [
            *(line[column] for column in ("task", "state_kib", "mixer")),
            _axes(line["config"]),
            line["metric"].removeprefix("difference_aurc_"),
            f"{_number(line['value'])} [{_number(line['low'])}, {_number(line['high'])}]",
            line["n"],
        ]
        for line in lines
        if line["metric"].startswith("difference_aurc_")
    ]
    return _table(["task", "KiB", "contrast", "axes", "probes", "difference [95 % interval]", "seeds"], body, 5)


def _rates(lines: Lines) -> list[str]:
    found: dict[tuple[str, ...], tuple[set[str], list[float]]] = {}
    for line in lines:
        if line["phase"] == "report" and line["metric"] == "failed":
            key = (line["task"], line["state_kib"], line["mixer"], line["init"], line["config"])
            rates, failures = found.setdefault(key, (set(), []))
            rates.add(line["lr"])
            failures.append(float(line["value"]))
    body = [
        [*key[:4], _axes(key[4]), ", ".join(sorted(rates)), f"{sum(failures):.0f} of {len(failures)}"]
        for key, (rates, failures) in sorted(found.items())
    ]
    return _table(["task", "KiB", "mixer", "init", "axes", "learning rate", "failed"], body, 5)


def _sizes(lines: Lines) -> list[str]:
    found = {(line["state_kib"], line["mixer"], line["state_bytes"]) for line in lines if line["metric"] == "failed"}
    params: dict[tuple[str, ...], set[int]] = {}
    for line in lines:
        key = (line["state_kib"], line["mixer"], line["state_bytes"])
        if key in found:
            params.setdefault(key, set()).add(int(line["params"]))
    body = []
    for key, counts in sorted(params.items(), key=lambda pair: (int(pair[0][0]), pair[0][1])):
        ends = f"{min(counts):,}" if len(counts) == 1 else f"{min(counts):,} to {max(counts):,}"
        body.append([key[0], key[1], f"{int(key[2]):,}", ends])
    return _table(["KiB", "mixer", "state bytes, all layers", "parameters"], body, 2)


def _references(lines: Lines) -> list[str]:
    body = [
        [line["task"], line["mixer"], line["gap"], line["metric"], _number(line["value"]), line["low"], line["high"]]
        for line in lines
        if line["phase"] == "reference"
    ]
    return _table(["task", "reference", "gap", "metric", "measured", "from", "to"], body, 4)


def _controls(lines: Lines) -> list[str]:
    body = [
        [line["task"], line["mixer"], line["gap"], line["metric"], _number(line["value"]), line["low"], line["high"]]
        for line in lines
        if line["phase"] == "control"
    ]
    return _table(["task", "who", "gap", "control", "measured", "from", "to"], body, 4)


def _real(lines: Lines) -> list[str]:
    found: dict[tuple[str, str], dict[int, list[float]]] = {}
    for line in lines:
        if line["phase"] == "real":
            bins = found.setdefault((line["task"], line["mixer"]), {})
            bins.setdefault(int(line["gap"]), []).append(float(line["value"]))
    order = sorted({low for bins in found.values() for low in bins})
    heads = ["never before" if low < 0 else f"{low} days or more" for low in order]
    body = [
        [*key, *(f"{sum(bins[low]) / len(bins[low]):.3f}" if low in bins else "" for low in order)]
        for key, bins in found.items()
    ]
    return _table(["set", "mixer", *heads], body, 2)


def _table(head: Sequence[str], body: Sequence[Sequence[str]], left: int) -> list[str]:
    if not body:
        return []
    rule = "|" + " --- |" * left + " ---: |" * (len(head) - left)
    return ["| " + " | ".join(head) + " |", rule, *("| " + " | ".join(cells) + " |" for cells in body)]


def _axes(config: str) -> str:
    import json

    axes = json.loads(config).get("axes", {}) if config else {}
    return " ".join(f"{key}={value}" for key, value in axes.items()) or "default"


def _number(text: str) -> str:
    try:
        return f"{float(text):.3f}"
    except ValueError:
        return text


def _origin(lines: Lines) -> str:
    commits = ", ".join(dict.fromkeys(line["commit"] + ("+" if line["dirty"] == "1" else "") for line in lines))
    machines = "; ".join(dict.fromkeys(line["hardware"] for line in lines))
    days = sorted({line["date"][:10] for line in lines})
    when = days[0] if days[0] == days[-1] else f"{days[0]} to {days[-1]}"
    return f"\nCommit {commits}, {when}, {machines}.\n"
