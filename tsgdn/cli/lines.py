"""Lines of text into rows: JSON lines or CSV, bounded in memory, strict about what is no number."""

import csv
import json
import os
import re
import select
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

LINE_LIMIT = 64 * 1024
MISSING = ("", "nan", "NaN", "NA", "null")
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?", re.ASCII)
_INFINITE = re.compile(r"[+-]?inf(?:inity)?", re.ASCII | re.IGNORECASE)


class BadLine(NamedTuple):
    """A line that was set aside, and why."""

    code: str
    text: str


class Line(NamedTuple):
    """A line of a file, or what a broker holds in its place; `raw` is cut where it is too long."""

    number: int
    raw: bytes
    problem: BadLine | None = None
    whole: bool = True  # ended by a newline
    at: str = ""  # how a broker calls it
    seen: bool = False  # the states hold it: it is read for the format and the columns alone
    fields: dict[str, str] | None = None  # where the columns come apart
    row: "Row | None" = None  # where there is nothing to read
    received: int | None = None  # when a broker got it, nanoseconds since 1970

    @property
    def where(self) -> str:
        """For a person who wants to find it."""
        return f"entry {self.at}" if self.at else f"line {self.number}"


class Row(NamedTuple):
    """A line that could be read."""

    line: Line
    item_id: Any
    timestamp: Any
    values: Any


class Parser:
    """Lines into rows; decides on the format and the columns by what comes first.

    Raises `Misuse` when the header, or the first record, has columns that nobody asked for or lacks one; what a broker
    holds is set aside instead, or one record would stop every start.
    """

    def __init__(self, format: str, variates: tuple[str, ...], *, broker: bool = False) -> None:
        self.format, self.variates, self.broker = format, variates, broker
        self.roles: list[str] | None = None
        self.order: list[int] = []
        self.width = 0

    def __call__(self, line: Line) -> Row | BadLine | None:
        """The row of a line, what is wrong with it, or None if there is nothing to read."""
        if line.row is not None:
            return line.row
        if line.fields is not None and line.problem is None:
            return self._fields(line, line.fields)
        raw = line.raw
        if line.number == 1 and raw.startswith(b"\xef\xbb\xbf"):
            raw = raw[3:]
        raw = raw.rstrip(b"\r\n")
        if line.problem is not None:
            return line.problem
        if not raw.strip():
            return None
        if self.format == "auto":
            self.format = "jsonl" if raw.lstrip().startswith((b"{", b"[")) else "csv"
            if self.format == "csv" and _binary(raw):
                self.format = "auto"
                return BadLine("line.utf8", "the line is not text: uncompressed JSON lines or CSV are read")
        return self._json(line, raw) if self.format == "jsonl" else self._csv(line, raw)

    def recognise(self, line: Line) -> None:
        """Learns format and columns from a line whose row is not wanted."""
        if self.format != "rows" and self.roles is None:
            self(line)

    def _json(self, line: Line, raw: bytes) -> Row | BadLine:
        import orjson

        try:
            record = orjson.loads(raw)
        except orjson.JSONDecodeError as error:
            if _binary(raw):
                return BadLine("line.utf8", "the line is not valid UTF-8")
            if not line.whole:
                return BadLine("line.truncated", "the last line ends before its JSON does")
            if "recursion" in str(error):
                return BadLine("json.depth", "the JSON is nested too deeply")
            return BadLine("json.syntax", str(error).split("\n")[0])
        if not isinstance(record, dict):
            return BadLine("json.type", f"expected an object, got {type(record).__name__}")
        text_values = sum(isinstance(value, str) for value in record.values())
        if (b"\\" in raw or raw.count(b'"') != 2 * (len(record) + text_values)) and _repeats(raw):
            return BadLine("json.duplicate", "a key comes twice")
        return self._record(line, record)

    def _fields(self, line: Line, fields: dict[str, str]) -> Row | BadLine:
        row = self._record(line, fields)
        if isinstance(row, BadLine):
            return row
        values = row.values if isinstance(row.values, list) else [row.values]
        cells = [None if value is None else _cell(value) for value in values]
        return row._replace(values=cells if isinstance(row.values, list) else cells[0])

    def _record(self, line: Line, record: dict[str, Any]) -> Row | BadLine:
        from tsgdn.cli.main import Misuse

        if self.roles is None:
            given = list(record)
            if any(name in record for name in self.variates):  # the others may come in rows of their own
                given += [name for name in self.variates if name not in record]
            try:
                self.roles = self._columns(given, line.where)
            except Misuse as error:
                if not self.broker:
                    raise
                return BadLine("row.column", str(error).removeprefix(f"{line.where}: "))
        item, stamp, *targets = self.roles
        if len(record) > len(self.roles) or any(name not in self.roles for name in record):
            extra = sorted(set(record) - set(self.roles))
            return BadLine("row.column", f"unknown column {extra[0]!r:.60}; expected {', '.join(self.roles)}")
        if item not in record or stamp not in record or not any(name in record for name in targets):
            lacking = [name for name in self.roles if name not in record]
            return BadLine("row.column", f"column {lacking[0]!r} is missing")
        values = record[targets[0]] if len(targets) == 1 else [record.get(name) for name in targets]
        if len(targets) == 1 and isinstance(values, list | dict):
            return BadLine("value.type", f"expected a number in {targets[0]!r}, got {type(values).__name__}")
        return Row(line, record[item], record[stamp], values)

    def _csv(self, line: Line, raw: bytes) -> Row | BadLine | None:
        try:
            text = raw.decode()
        except UnicodeDecodeError:
            return BadLine("line.utf8", "the line is not valid UTF-8")
        if "\0" in text:
            return BadLine("line.nul", "the line contains a NUL byte")
        try:
            cells = next(csv.reader([text], strict=True))
        except (csv.Error, StopIteration) as error:
            return BadLine("csv.syntax", f"{error}: a quoted field must end in its own line")
        if self.roles is None:
            self.roles = self._columns(cells, "the header")
            self.order, self.width = [cells.index(name) for name in self.roles], len(cells)
            return None
        if len(cells) != self.width:
            code = "row.columns" if line.whole else "line.truncated"
            return BadLine(code, f"{len(cells)} fields, the header has {self.width}")
        item, stamp, *numbers = (cells[i] for i in self.order)
        values = [_cell(number) for number in numbers]
        return Row(line, item, stamp, values[0] if len(values) == 1 else values)

    def _columns(self, columns: list[str], where: str) -> list[str]:
        from tsgdn.cli.main import Misuse
        from tsgdn.streaming.rows import column_roles

        if len(set(columns)) < len(columns):
            raise Misuse(f"{where}: a column comes twice in {', '.join(columns)}")
        try:
            return column_roles(columns, self.variates)
        except ValueError as error:
            raise Misuse(f"{where}: {error}") from None


def read_lines(
    stream: Any, *, limit: int = LINE_LIMIT, pause: float = 0.05, follow: bool = False
) -> Iterator[list[Line] | None]:
    """Lines in bounded memory, as they come; None when input pauses.

    A line beyond `limit` bytes is skipped to its end and given as a problem. `follow` waits for more at the end of a
    file.
    """
    try:
        descriptor = stream.fileno()
    except (AttributeError, OSError, ValueError):
        descriptor = None
    rest, number = b"", 0
    skipped = b""  # begin of a line that is too long, while its end has not come
    too_long = BadLine("line.too_long", f"the line has more than {limit} bytes")
    while True:
        if descriptor is not None:
            try:
                ready, _, _ = select.select([descriptor], [], [], pause)
            except OSError:
                ready = [descriptor]  # a kind of file that cannot be waited for
            if not ready:
                yield None
                continue
            data = os.read(descriptor, 1 << 16)
        else:
            data = stream.read(1 << 16)
        if not data and follow:
            time.sleep(pause)
            yield None
            continue
        if not data:
            break
        lines = []
        *ended, rest = (rest + data).split(b"\n")
        for raw in ended:
            number += 1
            if skipped:
                lines.append(Line(number, skipped, too_long))
                skipped = b""
            elif len(raw) > limit:
                lines.append(Line(number, raw[:80], too_long))
            else:
                lines.append(Line(number, raw))
        if skipped or len(rest) > limit:
            skipped, rest = skipped or rest[:80], b""
        yield lines
    if skipped:
        yield [Line(number + 1, skipped, too_long, False)]
    elif rest:
        yield [Line(number + 1, rest, None, False)]


def _repeats(raw: bytes) -> bool:
    """Whether a key comes twice in the outermost object."""

    class Twice(Exception):
        pass

    def check(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) < len(pairs):
            raise Twice
        return dict(pairs)

    try:
        json.loads(raw, object_pairs_hook=check)
    except Twice:
        return True
    except (ValueError, RecursionError):
        return False
    return False


def _cell(text: str) -> Any:
    """A CSV field as a number; what is none stays text and is refused with its row."""
    if text in MISSING:
        return None
    if _NUMBER.fullmatch(text) or _INFINITE.fullmatch(text):
        return float(text)
    return text


def _binary(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return True
    return b"\0" in raw
