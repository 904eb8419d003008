"""Renders results.csv files into the tables of the READMEs and of docs/.

    python experiments/render.py            rewrites every table
    python experiments/render.py --check    writes nothing; exit 1 where a README differs from its rows

A table stands between two comments in a README; the first says what it shows:

    <!-- results accuracy/results.csv rows=task,model columns=metric where=split:test digits=4 -->
    <!-- end of results -->

The file is relative to the README. `rows` and `columns` name columns of the file; `where=column:a|b,column:c` keeps
matching lines; cells show the mean of `value` over seeds (or over what else differs), with the standard deviation and
the number where there are several. Of lines that repeat a measurement (same keys, seed and config), the last counts.
Options: `digits` (4), `show=value`, `order=name|name` (of the first key), `best=min|max` (bold, among
rows that share all keys but the last).
"""

import argparse
import csv
import re
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"(<!-- results (?P<spec>[^>]*?) -->\n)(?P<table>.*?)(<!-- end of results -->)", re.DOTALL)
PLACE = {"commit", "dirty", "date", "hardware", "torch", "triton", "value", "p20", "p80", "n", "unit"}
OPTIONS = {"rows", "columns", "where", "digits", "show", "order", "best"}


def parse(spec: str) -> tuple[str, dict[str, str]]:
    """The file and the options of a marker."""
    file, *words = spec.split()
    options = dict(word.split("=", 1) for word in words if "=" in word)
    odd = [word for word in words if word.split("=", 1)[0] not in OPTIONS or "=" not in word]
    if odd or "rows" not in options:
        raise ValueError(f"marker '{spec}': rows= is needed, {odd} not understood; options are {sorted(OPTIONS)}")
    return file, options


def matching(lines: Iterable[dict[str, str]], where: str) -> list[dict[str, str]]:
    """Lines that meet every condition `column:a|b`."""
    odd = [c for c in where.split(",") if c and ":" not in c]
    if odd:
        raise ValueError(f"where={where}: {odd} is no condition; write column:value|value")
    conditions = [(c.split(":", 1)[0], set(c.split(":", 1)[1].split("|"))) for c in where.split(",") if c]
    return [line for line in lines if all(line[column] in allowed for column, allowed in conditions)]


def latest(lines: list[dict[str, str]]) -> list[dict[str, str]]:
    """The last line of each measurement; a file is only ever added to."""
    kept: dict[tuple[str, ...], dict[str, str]] = {}
    for line in lines:
        kept[tuple(value for column, value in line.items() if column not in PLACE)] = line
    return list(kept.values())


def number(text: str) -> float | None:
    """The value, or None for a word such as OOM."""
    try:
        return float(text)
    except ValueError:
        return None


def cell(texts: list[str], digits: int) -> str:
    """Mean, spread and count of a cell's values; words are shown as they are."""
    numbers = [x for x in map(number, texts) if x is not None]
    if not numbers:
        return texts[0] if texts else ""
    if len(numbers) == 1:
        return f"{numbers[0]:.{digits}f}"
    return f"{statistics.fmean(numbers):.{digits}f} ± {statistics.stdev(numbers):.{digits}f} ({len(numbers)})"


def table(file: Path, options: dict[str, str]) -> str:
    """The Markdown table of a marker."""
    if not file.is_file():
        raise ValueError(f"{file} is not there, but a README shows its rows; run the experiment or drop the marker")
    with file.open(encoding="utf-8", newline="") as handle:
        reader = csv.DictReader(handle)
        named = set(reader.fieldnames or ())
        rows = options["rows"].split(",")
        columns = [c for c in options.get("columns", "").split(",") if c]
        show, digits = options.get("show", "value"), int(options.get("digits", 4))
        asked = {*rows, *columns, show, *(c.split(":", 1)[0] for c in options.get("where", "").split(",") if c)}
        if asked - named:
            raise ValueError(f"{file} has no column {sorted(asked - named)}; it has {sorted(named)}")
        lines = latest(matching(reader, options.get("where", "")))
    if not lines:
        return "No rows yet.\n"
    found: dict[tuple[str, ...], dict[tuple[str, ...], list[str]]] = {}
    heads: list[tuple[str, ...]] = []
    for line in lines:
        key, head = tuple(line[r] for r in rows), tuple(line[c] for c in columns) or (show,)
        found.setdefault(key, {}).setdefault(head, []).append(line[show])
        if head not in heads:
            heads.append(head)
    order = options.get("order", "").split("|")
    keys = list(found)
    ranks = {name: place for place, name in enumerate(order)}
    first = {name: place for place, name in enumerate(dict.fromkeys(key[0] for key in keys))}
    keys.sort(key=lambda key: (ranks.get(key[0], len(order)), first[key[0]]))
    bold = bests(found, heads, options.get("best", ""))
    out = ["| " + " | ".join([*rows, *(" ".join(head) for head in heads)]) + " |"]
    out.append("|" + " --- |" * len(rows) + " ---: |" * len(heads))
    for key in keys:
        texts = [cell(found[key].get(head, []), digits) for head in heads]
        texts = [f"**{text}**" if (key, head) in bold else text for text, head in zip(texts, heads, strict=True)]
        out.append("| " + " | ".join([*key, *texts]) + " |")
    commits = ", ".join(dict.fromkeys(line["commit"] + ("+" if line["dirty"] == "1" else "") for line in lines))
    days = sorted({line["date"][:10] for line in lines})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    machines = "; ".join(dict.fromkeys(line["hardware"] for line in lines))
    return "\n".join(out) + f"\n\nCommit {commits}, {when}, {machines}.\n"


def bests(
    found: dict[tuple[str, ...], dict[tuple[str, ...], list[str]]], heads: list[tuple[str, ...]], which: str
) -> set[tuple[tuple[str, ...], tuple[str, ...]]]:
    """The best cells: per head, among rows that share all but the last row key."""
    if which not in {"min", "max"}:
        return set()
    best: dict[tuple[tuple[str, ...], tuple[str, ...]], tuple[float, tuple[str, ...]]] = {}
    for key, cells in found.items():
        for head in heads:
            numbers = [x for x in map(number, cells.get(head, [])) if x is not None]
            if numbers:
                mean = statistics.fmean(numbers) * (1 if which == "min" else -1)
                best[key[:-1], head] = min(best.get((key[:-1], head), (mean, key)), (mean, key))
    return {(key, head) for (_, head), (_, key) in best.items()}


def rendered(text: str, folder: Path) -> str:
    """A README's text with fresh tables."""

    def fill(match: re.Match[str]) -> str:
        file, options = parse(match["spec"])
        return match[1] + table(folder / file, options) + match[4]

    return BLOCK.sub(fill, text)


def readmes(root: Path) -> list[Path]:
    """The READMEs and pages that may hold tables."""
    places = ("README.md", "docs/*.md", "experiments/README.md", "experiments/*/README.md")
    return sorted(path for place in places for path in root.glob(place))


def main(argv: list[str] | None = None) -> int:
    """Renders or checks; exit 1 where `--check` finds a difference, 2 where a marker cannot be read."""
    parser = argparse.ArgumentParser(description="results.csv -> tables in READMEs")
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 on a difference")
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    stale = []
    for path in readmes(args.root):
        text = path.read_text(encoding="utf-8")
        try:
            fresh = rendered(text, path.parent)
        except ValueError as error:
            print(f"{path.relative_to(args.root)}: {error}", file=sys.stderr)
            return 2
        if fresh != text:
            stale.append(path)
            if not args.check:
                path.write_text(fresh, encoding="utf-8")
    for path in stale:
        say = "differs from its rows; run python experiments/render.py" if args.check else "rendered"
        print(f"{path.relative_to(args.root)}: {say}", file=sys.stderr)
    return int(bool(stale) and args.check)


if __name__ == "__main__":
    raise SystemExit(main())
