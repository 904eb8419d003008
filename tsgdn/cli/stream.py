"""`tsgdn stream`: observations in, line by line, quantile forecasts out as JSON lines.

A filter: data on stdin or in a file, forecasts on stdout, everything else on stderr. A wrong option, file or schema
stops it before anything is applied; a wrong row is counted, named and set aside, and the stream goes on.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from tsgdn.cli.lines import Line, Parser, Row, read_lines

UNREADABLE_LIMIT = 100
LOG_LINES_PER_SECOND = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `tsgdn stream`."""
    parser.add_argument("--model", required=True, metavar="DIR", help="folder of a fitted model")
    parser.add_argument("--source", default="-", metavar="-|FILE|replay:NAME", help="where observations come from (-)")
    parser.add_argument("--format", choices=("auto", "jsonl", "csv"), default="auto", help="of the source (auto)")
    parser.add_argument("--horizon", type=int, metavar="N", help="steps per forecast (the model's own)")
    parser.add_argument("--quantiles", default=".1,.5,.9", metavar="LEVELS", help="comma-separated (.1,.5,.9)")
    parser.add_argument(
        "--emit",
        choices=("touched", "patch", "none"),
        default="touched",
        help="forecast after each tick the series that rows came for, those that filled a patch, or none (touched)",
    )
    parser.add_argument(
        "--tick",
        default="auto",
        metavar="N|Nms|auto",
        help="rows or milliseconds that are taken in together; auto: until a series comes again, or input pauses",
    )
    parser.add_argument(
        "--state",
        metavar="DIR|redis://",
        help="states and the place in the source are kept here: what was taken in survives a kill",
    )
    parser.add_argument(
        "--durability",
        choices=("normal", "full", "memory"),
        default="normal",
        help="what is taken in survives a killed process, a power cut too, or neither between checkpoints (normal)",
    )
    parser.add_argument("--checkpoint-every", type=float, default=60.0, metavar="S", help="seconds, at least (60)")
    parser.add_argument("--takeover", action="store_true", help="take a store whose owner has not shown up in time")
    parser.add_argument("--from-start", action="store_true", help="read the source anew, whatever the states have seen")
    parser.add_argument("--follow", action="store_true", help="wait for more at the end of a file")
    parser.add_argument("--freq", help="step of the series, such as h or D (the model's own)")
    parser.add_argument("--max-series", type=int, metavar="N", help="rows of further series are set aside")
    parser.add_argument("--on-unknown", choices=("create", "reject"), default="create", help="series not seen before")
    parser.add_argument("--dead-letter", metavar="FILE", help="rows set aside are added here, as JSON lines")
    parser.add_argument("--strict", action="store_true", help="exit 2 if any row was set aside")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto (auto)")


def run(args: argparse.Namespace) -> int:
    """Streams until the source ends or a signal asks to stop; returns the exit code."""
    with contextlib.ExitStack() as stack:
        return Stream(args, *_check(args, stack)).run()


def _check(args: argparse.Namespace, stack: contextlib.ExitStack) -> tuple[Any, ...]:
    """All that can be wrong with the options, before anything is read; `stack` closes what this opens."""
    from tsgdn.cli.main import Misuse

    levels = _levels(args.quantiles)
    tick = _tick(args.tick, args.emit)
    if args.horizon is not None and not 1 <= args.horizon <= 100_000:
        raise Misuse(f"--horizon is {args.horizon}, expected 1 to 100000 steps")
    if not args.checkpoint_every > 0:
        raise Misuse(f"--checkpoint-every is {args.checkpoint_every}, expected a positive number of seconds")
    if args.max_series is not None and args.max_series < 1:
        raise Misuse(f"--max-series is {args.max_series}, expected at least 1")
    for name, value in (("--model", args.model), ("--source", args.source)):
        if value and "://" in value:
            raise Misuse(f"{name} {value!r} is an address, expected a local path")
    if args.source != "-" and not args.source.startswith("replay:"):
        path = Path(args.source).expanduser()
        if not path.exists() or path.is_dir():
            raise Misuse(
                f"--source {args.source}: {'is a folder' if path.is_dir() else 'no such file'}, expected a file"
            )
        if not os.access(path, os.R_OK):
            raise Misuse(f"--source {args.source}: may not be read")
    if args.follow and (args.source == "-" or args.source.startswith("replay:")):
        raise Misuse(f"--follow with --source {args.source}: only a file can be followed; a pipe is read to its end")
    from tsgdn.streaming.predictor import StatefulPredictor

    more = {name: getattr(args, name) for name in ("freq", "horizon", "max_series") if getattr(args, name) is not None}
    try:
        predictor = StatefulPredictor.from_pretrained(
            Path(args.model).expanduser(), device=args.device, on_unknown=args.on_unknown, **more
        )
    except (ValueError, OSError, RuntimeError) as error:
        raise Misuse(f"--model {args.model}: {error}") from None
    if args.freq is not None:
        from tsgdn.data.clock import Clock
        from tsgdn.model.artefact import read_series_info

        own = read_series_info(Path(args.model).expanduser()).get("freq")
        if own is not None and Clock(own) != Clock(args.freq):
            raise Misuse(f"--freq is {args.freq!r}, the model was fitted on {own!r}: leave the option out")
    durable = None if args.state is None else _durable(args, predictor, stack)
    dead = None
    if args.dead_letter is not None:
        try:
            dead = stack.enter_context(Path(args.dead_letter).expanduser().open("ab"))
        except OSError as error:
            raise Misuse(f"--dead-letter {args.dead_letter}: {error.strerror}") from None
    source: Iterator[list[Line] | None]
    if args.source.startswith("replay:"):
        source = _replayed(args.source.removeprefix("replay:"), predictor)
    elif args.source == "-":
        if sys.stdin is None:
            raise Misuse("--source -: standard input is closed")
        source = read_lines(getattr(sys.stdin, "buffer", sys.stdin))
    else:
        opened = stack.enter_context(Path(args.source).expanduser().open("rb", buffering=0))
        source = read_lines(opened, follow=args.follow)
    return predictor, durable, source, levels, tick, dead


def _durable(args: argparse.Namespace, predictor: Any, stack: contextlib.ExitStack) -> Any:
    """The store of --state, its states in the predictor; `stack` lets go of it."""
    from tsgdn.cli.main import Misuse
    from tsgdn.streaming import snapshot
    from tsgdn.streaming.durable import DurablePredictor
    from tsgdn.streaming.stores import StoreError, open_store

    place = args.state if "://" in args.state else Path(args.state).expanduser()
    try:
        durable = DurablePredictor(
            predictor,
            open_store(place, durability=args.durability),
            owner="tsgdn stream",
            source=args.source,
            checkpoint_every=args.checkpoint_every,
            takeover=args.takeover,
            progress=_Progress("ticks replayed"),
        )
        stack.callback(durable.store.close)
        if isinstance(place, Path) and snapshot.exists(place) and not len(predictor):
            durable.adopt(place)
            _log(f"{len(predictor)} series were taken over from the snapshot in {place}")
    except (StoreError, ValueError, OSError) as error:
        raise Misuse(f"--state {args.state}: {error}") from None
    found = durable.recovery
    if found.series or found.ticks:
        _log(f"{len(predictor)} series were restored, {found.ticks} ticks of the journal among them")
    for item, code in found.lost.items():
        _log(f"{code}: the state of item {item} is damaged; its rows are set aside")
    return durable


class _Progress:
    """Tells of a long recovery, now and then."""

    def __init__(self, what: str) -> None:
        self.what, self.told = what, time.monotonic()

    def __call__(self, number: int) -> None:
        now = time.monotonic()
        if now - self.told > 2:
            self.told = now
            _log(f"{number} {self.what}")


class Tick(NamedTuple):
    """How many rows are taken in together; `apart`: no series twice."""

    rows: int
    seconds: float
    apart: bool


class Place:
    """Where in the source a stream stands: how many lines, and a digest of the last one to know it again.

    Args:
        source: a file or data set; what comes by a pipe has no place to go back to.
        offset: that the states were stored with.
    """

    def __init__(self, source: str, offset: bytes | None) -> None:
        self.source = source
        self.number, self.digest = 0, ""
        if offset and source != "-":
            told = json.loads(offset)
            self.number, self.digest = int(told["line"]), str(told["digest"])
        self.met = self.number == 0
        self._latest = offset or b""

    def behind(self, line: Line) -> bool:
        """Whether the states hold the line already.

        Raises:
            Misuse: the line that should have been the last one is another.
        """
        from tsgdn.cli.main import Misuse

        if line.number > self.number:
            return False
        if line.number == self.number:
            self.met = _digest(line) == self.digest
            if not self.met:
                raise Misuse(
                    f"--source {self.source}: line {line.number} is not the one that the states ended with: "
                    "give the file that was streamed, or --from-start"
                )
        return True

    def reached(self) -> None:
        """Raises Misuse where the source ended before the place was met."""
        from tsgdn.cli.main import Misuse

        if not self.met:
            raise Misuse(
                f"--source {self.source}: the states hold its first {self.number} lines and it has fewer: "
                "give the file that was streamed, or --from-start"
            )

    def after(self, line: Line) -> bytes:
        """The place after a line; a last line without its end may still grow and is read again."""
        if self.source != "-" and line.whole:
            self._latest = json.dumps({"line": line.number, "digest": _digest(line)}).encode()
        return self._latest


def _digest(line: Line) -> str:
    return hashlib.blake2b(line.raw, digest_size=8).hexdigest()


class Stream:
    """One run of the filter."""

    def __init__(
        self,
        args: argparse.Namespace,
        predictor: Any,
        durable: Any,
        source: Iterator[list[Line] | None],
        levels: tuple[float, ...],
        tick: Tick,
        dead: BinaryIO | None,
    ) -> None:
        self.args, self.predictor, self.source, self.levels, self.tick = args, predictor, source, levels, tick
        self.dead, self.durable = dead, durable
        self.place = Place(args.source, None if durable is None or args.from_start else durable.recovery.offset)
        self.out: Any = getattr(sys.stdout, "buffer", sys.stdout)
        self.counts: Counter[str] = Counter()
        self.codes: Counter[str] = Counter()
        self.ticks = 0
        self.stopping = False
        self.unreadable = 0
        # lines of rows that the predictor holds back; of those in the states of an earlier run what they said
        self.pending: dict[tuple[str, str], tuple[int, bytes]] = {
            (item, stamp): (0, json.dumps([item, stamp, values], ensure_ascii=False).encode())
            for (item, stamp), values in predictor.held().items()
        }
        self.batch: list[Row] = []
        self.members: set[str] = set()  # series in it
        self.log_window, self.log_count, self.log_dropped = 0.0, 0, 0
        replaying = args.source.startswith("replay:")
        self.parser = Parser("rows" if replaying else args.format, predictor.variates)

    def run(self) -> int:
        """Reads, observes, forecasts; saves at the end, but no states that a bug has left half changed."""
        from tsgdn.cli.main import Misuse

        handlers = self._install_signals()
        began = time.monotonic()
        failure = None
        try:
            for part in (self._again, self._pump, self._flush):  # what was read before a failure counts
                try:
                    part()
                except BrokenPipeError:
                    self._silence_stdout()
                except (Misuse, OSError) as error:
                    failure = failure or error
            if self.durable is not None:
                self.durable.close()  # with a checkpoint; a bug goes past this line and leaves the journal as it is
            if self.counts["rows"] or failure is None:
                self._summary(time.monotonic() - began)
        finally:
            self._restore_signals(handlers)
        if failure is not None:
            raise failure
        bad = self.counts["rejected"] + self.counts["late"] + self.counts["unreadable"]
        return 2 if self.args.strict and bad else 0

    def _again(self) -> None:
        """Forecasts of the last tick before a kill may not have been sent: they are sent again, by the same ids."""
        if self.durable is not None and self.durable.recovery.ticks and self.args.emit != "none":
            self._emit(list(self.durable.recovery.last))

    def _pump(self) -> None:
        """Reads until the source ends or a signal asks to stop."""
        deadline = 0.0
        for lines in self.source:
            now = time.monotonic()
            for line in lines or ():
                if self.place.behind(line):
                    self.parser.recognise(line)
                    continue
                row = self._row(line)
                if row is None:
                    continue
                member = str(row.item_id)
                if self.tick.apart and member in self.members:
                    self._flush()
                if not self.batch:
                    deadline = time.monotonic() + self.tick.seconds
                self.batch.append(row)
                self.members.add(member)
                if len(self.batch) >= self.tick.rows:
                    self._flush()
            if now >= deadline or (lines is None and self.tick.apart):
                self._flush()
            if self.durable is not None and self.durable.due():
                self.durable.checkpoint()
            if self.stopping:
                break
        self.place.reached()

    def _flush(self) -> None:
        """Takes in the rows of a tick, each once whatever happens meanwhile."""
        batch, self.batch, self.members = self.batch, [], set()
        self._observe(batch)

    # ---- in ---------------------------------------------------------------------------------------------------------

    def _row(self, line: Line) -> Row | None:
        """The row of a line; None for blank lines, headers and lines that were set aside."""
        from tsgdn.cli.main import Misuse

        self.counts["lines"] += 1
        parsed = self.parser(line)
        if parsed is None or isinstance(parsed, Row):
            self.unreadable = 0 if parsed is not None else self.unreadable
            return parsed
        self.counts["unreadable"] += 1
        self._set_aside(parsed.code, parsed.text, line.number, line.raw)
        self.unreadable += 1
        if self.unreadable >= UNREADABLE_LIMIT:
            raise Misuse(
                f"--source {self.args.source}: {UNREADABLE_LIMIT} unreadable lines in a row, the last is line "
                f"{line.number} ({parsed.code}): is this {self.parser.format}?"
            )
        return None

    def _observe(self, batch: list[Row]) -> None:
        """Takes in a tick and forecasts."""
        if not batch:
            return
        from tsgdn.streaming.rows import from_objects

        predictor = self.predictor
        ids = [row.item_id for row in batch]
        stamps = [row.timestamp for row in batch]
        rows = from_objects(ids, stamps, [row.values for row in batch], predictor.variates)
        touched = dict.fromkeys(rows.item_ids)
        heads = {item: predictor.head(item) if item in predictor else 0 for item in touched}
        self.ticks += 1
        if self.durable is None:
            report = predictor.observe(rows)
        else:
            report = self.durable.observe(rows, offset=self.place.after(batch[-1].line))
        self.counts["rows"] += len(batch)
        for name in ("accepted", "missing", "duplicate", "late", "rejected", "gap"):
            self.counts[name] += getattr(report, name)
        for bad in report.set_aside:
            if bad.row is None:  # held back by an earlier tick, until now
                number, raw = self.pending.pop((bad.item_id, bad.timestamp), (0, b""))
            else:
                number, raw = batch[bad.row].line.number, batch[bad.row].line.raw
            self._set_aside(bad.code, f"item {bad.item_id} at {bad.timestamp}: {bad.text}", number, raw)
        self._note_held(batch, rows)
        if self.args.emit == "none":
            return
        moved = [item for item in touched if item in predictor and predictor.head(item) > heads[item]]
        if self.args.emit == "patch":
            P = predictor.model.patch_size
            moved = [item for item in moved if predictor.head(item) // P > heads[item] // P]
        if moved:
            self._emit(moved)

    def _note_held(self, batch: list[Row], rows: Any) -> None:
        """Keeps the raw lines of rows that the predictor holds back, so that none is lost when it drops them."""
        held = self.predictor.held()
        if not held and not self.pending:
            return
        for item, stamp, place in zip(rows.item_ids, rows.stamps, rows.places.tolist(), strict=True):
            from tsgdn.data.clock import show

            name = (item, show(stamp))
            if name in held:
                self.pending.setdefault(name, (batch[place].line.number, batch[place].line.raw))
        self.pending = {name: raw for name, raw in self.pending.items() if name in held}

    # ---- out --------------------------------------------------------------------------------------------------------

    def _emit(self, items: list[str]) -> None:
        import numpy as np
        import orjson

        predictor = self.predictor
        forecast = predictor.forecast(items, quantile_levels=self.levels)
        origins = predictor.clock.timestamp(forecast.start, -1)
        names = [str(level) for level in self.levels]
        lines = []
        for b, item in enumerate(items):
            origin, start = _iso(origins[b]), _iso(forecast.start[b])
            values = forecast.values[b]
            quantiles: Any = {name: np.ascontiguousarray(values[0, :, q]) for q, name in enumerate(names)}
            if len(predictor.variates) > 1:
                quantiles = {
                    variate: {name: np.ascontiguousarray(values[v, :, q]) for q, name in enumerate(names)}
                    for v, variate in enumerate(predictor.targets)
                }
            record = {
                "id": forecast_id(item, origin, 0, predictor.fingerprint),
                "item_id": item,
                "origin": origin,
                "start": start,
                "freq": forecast.freq,
                "quantiles": quantiles,
                "flags": sorted(forecast.flags[b]),
                "seq": self.ticks if self.durable is None else self.durable.store.seq,
            }
            lines.append(orjson.dumps(record, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE))
        self.out.write(b"".join(lines))
        self.out.flush()
        self.counts["forecasts"] += len(items)

    def _set_aside(self, code: str, text: str, number: int, raw: bytes) -> None:
        self.codes[code] += 1
        if self.dead is not None:
            shown = raw.decode("utf-8", "backslashreplace")
            record = {"code": code, "text": text, "line": number, "raw": shown}
            self.dead.write(json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")
            self.dead.flush()
        now = time.monotonic()
        if now - self.log_window >= 1:
            self._tell_dropped()
            self.log_window, self.log_count = now, 0
        self.log_count += 1
        if self.log_count <= LOG_LINES_PER_SECOND:
            _log(f"line {number}: {code}: {text}")
        else:
            self.log_dropped += 1

    def _tell_dropped(self) -> None:
        if self.log_dropped:
            _log(f"{self.log_dropped} more rows were set aside and not named here")
            self.log_dropped = 0

    def _summary(self, seconds: float) -> None:
        # rows that still wait for others to agree would be forgotten without a state folder
        if self.args.state is None:
            for (item, stamp), (number, raw) in self.pending.items():
                text = f"item {item} at {stamp}: far ahead of its series, and the stream ended before others agreed"
                self.counts["rejected"] += 1
                self._set_aside("ts.jump", text, number, raw)
            self.pending = {}
        self._tell_dropped()
        counts = self.counts
        kinds = ", ".join(f"{code} {count}" for code, count in sorted(self.codes.items()))
        counts["held"] = len(self.pending)
        names = ("accepted", "missing", "duplicate", "late", "rejected", "held", "unreadable")
        parts = [f"{counts[name]} {name}" for name in names if counts[name] or name != "held"]
        _log(
            f"{counts['rows']} rows in {seconds:.1f} s: {', '.join(parts)}; {counts['gap']} absent steps, "
            f"{len(self.predictor)} series, {counts['forecasts']} forecasts"
            + (f"; set aside: {kinds}" if kinds else "")
        )

    def _silence_stdout(self) -> None:
        """The reader is gone: nothing more can be said to it, and that is no error."""
        try:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())
            os.close(nowhere)
        except (OSError, ValueError, AttributeError, io.UnsupportedOperation):
            pass

    def _install_signals(self) -> dict[int, Any]:
        def stop(number: int, frame: Any) -> None:
            if self.stopping:
                os._exit(130 if number == signal.SIGINT else 143)
            self.stopping = True

        try:
            return {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        except ValueError:  # not in the main thread: signals are somebody else's
            return {}

    def _restore_signals(self, handlers: dict[int, Any]) -> None:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def forecast_id(item_id: str, origin: str, revision: int, model: str) -> str:
    """The same for the same forecast, whoever makes it."""
    key = json.dumps([item_id, origin, revision, model], ensure_ascii=False)
    return hashlib.blake2b(key.encode(), digest_size=16).hexdigest()


def _replayed(name: str, predictor: Any) -> Iterator[list[Any]]:
    """The rows of a catalogued data set, a step of all its series at a time."""
    from tsgdn.cli.main import Misuse
    from tsgdn.data import catalog

    try:
        dataset = catalog.load(name) if len(predictor.variates) == 1 else catalog.load(name, multivariate=True)
    except (LookupError, ValueError, OSError) as error:
        text = error.args[0] if isinstance(error, KeyError) else error
        raise Misuse(f"--source replay:{name}: {text}") from None
    wrong = [
        one for one in dataset.series if one.clock != predictor.clock or len(one.variates) != len(predictor.variates)
    ]
    if wrong:
        raise Misuse(
            f"--source replay:{name}: series {wrong[0].item_id!r} has freq {wrong[0].freq!r} and "
            f"{len(wrong[0].variates)} variates, the model takes {predictor.freq!r} and {len(predictor.variates)}"
        )

    def rows() -> Iterator[list[Any]]:
        number = 0
        longest = max(map(len, dataset.series), default=0)
        for step in range(longest):
            batch = []
            for one in dataset.series:
                if step < len(one):
                    number += 1
                    values = one.values[:, step].tolist()
                    stamp = one.clock.timestamp(one.start, step)[()]
                    raw = json.dumps([one.item_id, _iso(stamp), values]).encode()
                    batch.append(Row(Line(number, raw), one.item_id, stamp, values[0] if len(values) == 1 else values))
            yield batch

    return rows()


def _iso(stamp: Any) -> str:
    import numpy as np

    text = str(np.datetime64(stamp, "ns"))
    return re.sub(r"\.?0+$", "", text) if "." in text else text


def _levels(text: str) -> tuple[float, ...]:
    from tsgdn.cli.main import Misuse

    try:
        levels = sorted({float(part) for part in text.split(",")})
    except ValueError:
        levels = []
    if not levels or not all(0 < level < 1 for level in levels):
        raise Misuse(f"--quantiles is {text!r}, expected numbers between 0 and 1 such as .1,.5,.9")
    return tuple(levels)


def _tick(text: str, emit: str) -> Tick:
    from tsgdn.cli.main import Misuse

    if text == "auto":
        return Tick(16_384, 0.05, emit != "none")
    match = re.fullmatch(r"(\d{1,9})(ms)?", text, re.ASCII)
    if match is None or int(match[1]) < 1:
        raise Misuse(f"--tick is {text!r}, expected rows such as 512, milliseconds such as 50ms, or auto")
    if match[2]:
        return Tick(65_536, int(match[1]) / 1000, False)
    return Tick(int(match[1]), float("inf"), False)


def _log(text: str) -> None:
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)
    print(f"tsgdn stream: {shown}", file=sys.stderr, flush=True)
