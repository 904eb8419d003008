"""`tsgdn stream`: observations in, line by line, quantile forecasts out as JSON lines.

A filter and a service: data from stdin, a file, a data set, Redis Streams or Kafka; forecasts to stdout, a file or
Redis Streams; everything else to stderr. A wrong option, file or schema stops it before anything is applied; a wrong
row is counted, named and set aside, and the stream goes on.
"""

import argparse
import contextlib
import datetime
import hashlib
import io
import json
import os
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from tsgdn.cli.lines import Line, Parser, Row
from tsgdn.cli.main import Misuse
from tsgdn.cli.sinks import Append, Forecast, Sink, open_sink
from tsgdn.cli.sources import REDIS_OPTIONS, Control, File, Source, open_source, read_address, without_password

UNREADABLE_LIMIT = 100
LOG_LINES_PER_SECOND = 10
RENEW_EVERY = 10.0  # seconds; the lease of a store runs for 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `tsgdn stream`."""
    parser.add_argument("--model", required=True, metavar="DIR", help="folder of a fitted model")
    parser.add_argument(
        "--source",
        default="-",
        metavar="-|FILE|replay:NAME|redis://|kafka://",
        help="where observations come from (-): redis://HOST/DB?stream=NAME&group=G&consumer=C, "
        "kafka://HOST:PORT/TOPIC?group=G",
    )
    parser.add_argument(
        "--sink",
        default="-",
        metavar="-|FILE|redis://|null",
        help="where forecasts go (-): redis://HOST/DB?stream=NAME",
    )
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
    parser.add_argument(
        "--takeover",
        action="store_true",
        help="take a store whose owner has not shown up in time, and what other consumers of the group left unread",
    )
    parser.add_argument("--from-start", action="store_true", help="read the source anew, whatever the states have seen")
    parser.add_argument("--follow", action="store_true", help="wait for more at the end of a file")
    parser.add_argument("--freq", help="step of the series, such as h or D (the model's own)")
    parser.add_argument("--max-series", type=int, metavar="N", help="rows of further series are set aside")
    parser.add_argument("--on-unknown", choices=("create", "reject"), default="create", help="series not seen before")
    parser.add_argument("--dead-letter", metavar="FILE", help="rows set aside are added here, as JSON lines")
    parser.add_argument("--strict", action="store_true", help="exit 2 if any row was set aside")
    parser.add_argument("--log", choices=("text", "json"), default="text", help="lines on stderr (text)")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto (auto)")


def run(args: argparse.Namespace) -> int:
    """Streams until the source ends or a signal asks to stop; returns the exit code."""
    log = Log(args.log)
    try:
        with contextlib.ExitStack() as stack:
            return Stream(args, log, *_check(args, Control(log), stack)).run()
    except (Misuse, OSError) as error:
        if args.log == "text" or isinstance(error, BrokenPipeError):
            raise
        log(" ".join(str(error).split()), level="error")
        return 2 if isinstance(error, (Misuse, *_MISUSE)) else 1


_MISUSE = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)  # as in main


class Log:
    """Lines on stderr, for people or for machines.

    Args:
        form: "text", or "json": an object per line with time, level and message, and what else is known.
    """

    def __init__(self, form: str) -> None:
        self.form = form

    def __call__(self, text: str, *, level: str = "info", **more: Any) -> None:
        """Tells one thing; `more` is for machines alone."""
        if self.form == "json":
            now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
            record = {"time": now, "level": level, "message": text, **more}
            print(json.dumps(record), file=sys.stderr, flush=True)
            return
        shown = "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)
        print(f"tsgdn stream: {shown}", file=sys.stderr, flush=True)


def _check(args: argparse.Namespace, control: Control, stack: contextlib.ExitStack) -> tuple[Any, ...]:
    """All that can be wrong with the options, before anything is read; `stack` closes what this opens."""
    levels = _levels(args.quantiles)
    tick = _tick(args.tick, args.emit)
    if args.horizon is not None and not 1 <= args.horizon <= 100_000:
        raise Misuse(f"--horizon is {args.horizon}, expected 1 to 100000 steps")
    if not args.checkpoint_every > 0:
        raise Misuse(f"--checkpoint-every is {args.checkpoint_every}, expected a positive number of seconds")
    if args.max_series is not None and args.max_series < 1:
        raise Misuse(f"--max-series is {args.max_series}, expected at least 1")
    if "://" in args.model:
        raise Misuse(f"--model {without_password(args.model)!r} is an address, expected a local path")
    if "://" in args.source and args.format == "csv":
        raise Misuse("--format is csv, expected jsonl or auto: a broker holds records, and no header")
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
    source = open_source(args.source, predictor, control, follow=args.follow, takeover=args.takeover)
    stack.callback(source.close)
    sink = open_sink(args.sink, control)
    stack.callback(sink.close)
    if isinstance(source, File) and isinstance(sink, Append) and source.path.samefile(sink.path):
        raise Misuse(f"--sink {args.sink}: is the source: give another file")
    if "://" in args.sink and getattr(source, "place", source) == getattr(sink, "place", sink):
        raise Misuse(f"{getattr(sink, 'shown', '--sink')}: is the source: give another stream")
    durable = None if args.state is None else _durable(args, predictor, source.name, control, stack)
    dead = None
    if args.dead_letter is not None:
        try:
            dead = stack.enter_context(Path(args.dead_letter).expanduser().open("ab"))
        except OSError as error:
            raise Misuse(f"--dead-letter {args.dead_letter}: {error.strerror}") from None
    source.resume(None if durable is None else durable.recovery.offset, anew=args.from_start)
    return control, predictor, durable, source, sink, levels, tick, dead


def _durable(
    args: argparse.Namespace, predictor: Any, source: str, control: Control, stack: contextlib.ExitStack
) -> Any:
    """The store of --state, its states in the predictor; `stack` lets go of it."""
    from tsgdn.streaming import snapshot
    from tsgdn.streaming.durable import DurablePredictor
    from tsgdn.streaming.stores import StoreError, open_store

    if args.state.startswith(("redis://", "rediss://", "unix://")):
        read_address("--state", args.state, REDIS_OPTIONS)  # or the client's words may hold a password
    place = args.state if "://" in args.state else Path(args.state).expanduser()
    try:
        durable = DurablePredictor(
            predictor,
            open_store(place, durability=args.durability),
            owner="tsgdn stream",
            source=source,
            checkpoint_every=float("inf"),  # not between a tick and its forecasts: see Stream._chores
            takeover=args.takeover,
            progress=_Progress("ticks replayed", control.log),
        )
        stack.callback(durable.store.close)
        if isinstance(place, Path) and snapshot.exists(place) and not len(predictor):
            durable.adopt(place)
            control.log(f"{len(predictor)} series were taken over from the snapshot in {place}")
    except (StoreError, ValueError, OSError) as error:
        raise Misuse(f"--state {without_password(args.state)}: {error}") from None
    found = durable.recovery
    if found.series or found.ticks:
        control.log(f"{len(predictor)} series were restored, {found.ticks} ticks of the journal among them")
    for item, code in found.lost.items():
        text = f"{code}: the state of item {item} is damaged; its rows are set aside"
        control.log(text, level="warning", code=code, item_id=item)
    return durable


class _Progress:
    """Tells of a long recovery, now and then."""

    def __init__(self, what: str, log: Callable[..., None]) -> None:
        self.what, self.log, self.told = what, log, time.monotonic()

    def __call__(self, number: int) -> None:
        now = time.monotonic()
        if now - self.told > 2:
            self.told = now
            self.log(f"{number} {self.what}")


class Tick(NamedTuple):
    """How many rows are taken in together; `apart`: no series twice."""

    rows: int
    seconds: float
    apart: bool


class Stream:
    """One run of the filter."""

    def __init__(
        self,
        args: argparse.Namespace,
        log: Log,
        control: Control,
        predictor: Any,
        durable: Any,
        source: Source,
        sink: Sink,
        levels: tuple[float, ...],
        tick: Tick,
        dead: BinaryIO | None,
    ) -> None:
        self.args, self.log, self.control, self.predictor, self.durable = args, log, control, predictor, durable
        self.source, self.sink, self.levels, self.tick, self.dead = source, sink, levels, tick, dead
        self.counts: Counter[str] = Counter()
        self.codes: Counter[str] = Counter()
        self.ticks = 0
        self.unreadable = 0
        # where the rows are that the predictor holds back, and what they said; earlier runs only left the latter
        self.pending: dict[tuple[str, str], Line] = {
            (item, stamp): Line(0, json.dumps([item, stamp, values], ensure_ascii=False).encode())
            for (item, stamp), values in predictor.held().items()
        }
        self.batch: list[Row] = []
        self.members: set[str] = set()  # series in it
        self.latest: Line | None = None  # taken into the batch, or set aside, and not yet in a tick
        self.offset = b""  # behind the last tick
        self.unsent = False  # whether the sink failed
        self.saved, self.renewed, self.duration = time.monotonic(), time.monotonic(), 0.0
        self.log_window, self.log_count, self.log_dropped = 0.0, 0, 0
        form = args.format if source.format is None else source.format
        self.parser = Parser(form, predictor.variates, broker=source.broker)
        control.chores = self._renew

    def run(self) -> int:
        """Reads, observes, forecasts; saves at the end, but no states that a bug has left half changed."""
        from tsgdn.streaming.stores import StoreError

        handlers = self._install_signals()
        began = time.monotonic()
        failure: Exception | None = None
        try:
            for part in (self._again, self._pump, self._flush):  # what was read before a failure counts
                if self.unsent:
                    break  # and what could not be sent is sent first, by the next run
                try:
                    part()
                except StoreError as error:
                    failure = OSError(f"--state {without_password(self.args.state)}: {error}")
                    break
                except BrokenPipeError:
                    self._silence_stdout()
                except (Misuse, OSError) as error:
                    failure = failure or error
            try:
                self._end()  # a bug goes past this line and leaves the journal as it is
            except StoreError as error:
                failure = failure or OSError(f"--state {without_password(self.args.state)}: {error}")
            if self.counts["rows"] or failure is None:
                self._summary(time.monotonic() - began)
        finally:
            self._restore_signals(handlers)
        if failure is not None:
            raise failure
        bad = self.counts["rejected"] + self.counts["late"] + self.counts["unreadable"]
        return 2 if self.args.strict and bad else 0

    def _end(self) -> None:
        """Lets go of the store, with a checkpoint; without one where the journal tells which forecasts are missing."""
        if self.durable is None:
            return
        if self.unsent and (self.args.durability != "memory" or self.source.replayable):
            self.durable.store.close()
            return
        self.durable.close()
        self._acknowledge()

    def _again(self) -> None:
        """Forecasts of the last tick before a kill may not have been sent: they are sent again, by the same ids."""
        if self.durable is not None and self.durable.recovery.ticks and self.args.emit != "none":
            self._emit(list(self.durable.recovery.last))

    def _pump(self) -> None:
        """Reads until the source ends or a signal asks to stop."""
        deadline = 0.0
        for lines in self.source.lines():
            now = time.monotonic()
            for line in lines or ():
                if line.seen:
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
                self.latest = line
                if len(self.batch) >= self.tick.rows:
                    self._flush()
            if now >= deadline or not self.batch or (lines is None and self.tick.apart):
                self._flush()
            self._chores()
            if self.control.stopping:
                break

    def _flush(self) -> None:
        """Takes in the rows of a tick, each once whatever happens meanwhile."""
        batch, self.batch, self.members = self.batch, [], set()
        latest, self.latest = self.latest, None
        if latest is not None:
            self._observe(batch, latest)

    def _chores(self) -> None:
        """Checkpoints when it is time: after the forecasts of a tick, or a kill in between would lose them."""
        if self.durable is None:
            return
        if time.monotonic() - self.saved >= max(self.args.checkpoint_every, 10 * self.duration):
            began = time.monotonic()
            self.durable.checkpoint()
            self.saved = time.monotonic()
            self.duration = self.saved - began
            self._acknowledge()
        self._renew()

    def _renew(self) -> None:
        """A stream that waits keeps its store."""
        if self.durable is not None and time.monotonic() - self.renewed >= RENEW_EVERY:
            self.renewed = time.monotonic()
            self.durable.store.renew()

    def _acknowledge(self) -> None:
        """Tells the source how far the states are for certain."""
        if self.offset and (
            self.durable is None
            or self.args.durability != "memory"
            or self.durable.store.committed == self.durable.store.seq
        ):
            self.source.acknowledge(self.offset)

    # ---- in ---------------------------------------------------------------------------------------------------------

    def _row(self, line: Line) -> Row | None:
        """The row of a line; None for blank lines, headers and lines that were set aside."""
        self.counts["lines"] += 1
        parsed = self.parser(line)
        if parsed is None or isinstance(parsed, Row):
            self.unreadable = 0 if parsed is not None else self.unreadable
            return parsed
        self.counts["unreadable"] += 1
        self._set_aside(parsed.code, parsed.text, line)
        self.latest = line
        self.unreadable += 1
        if self.unreadable >= UNREADABLE_LIMIT:
            raise Misuse(
                f"--source {without_password(self.args.source)}: {UNREADABLE_LIMIT} unreadable lines in a row, the "
                f"last is {line.where} ({parsed.code}): is this {self.parser.format}?"
            )
        return None

    def _observe(self, batch: list[Row], latest: Line) -> None:
        """Takes in a tick and forecasts; `latest` is the last line before the next tick."""
        from tsgdn.streaming.rows import from_objects

        predictor = self.predictor
        offset = self.source.after(latest)
        if not batch and (self.durable is None or not offset):
            self.offset = offset
            self._acknowledge()  # lines that were set aside, alone
            return
        ids = [row.item_id for row in batch]
        stamps = [row.timestamp for row in batch]
        rows = from_objects(ids, stamps, [row.values for row in batch], predictor.variates)
        touched = dict.fromkeys(rows.item_ids)
        heads = {item: predictor.head(item) if item in predictor else 0 for item in touched}
        self.ticks += 1
        report = predictor.observe(rows) if self.durable is None else self.durable.observe(rows, offset=offset)
        self.offset = offset
        self.counts["rows"] += len(batch)
        for name in ("accepted", "missing", "duplicate", "late", "rejected", "gap"):
            self.counts[name] += getattr(report, name)
        for bad in report.set_aside:
            if bad.row is None:  # held back by an earlier tick, until now
                line = self.pending.pop((bad.item_id, bad.timestamp), Line(0, b""))
            else:
                line = batch[bad.row].line
            self._set_aside(bad.code, f"item {bad.item_id} at {bad.timestamp}: {bad.text}", line)
        self._note_held(batch, rows)
        if self.args.emit != "none":
            self._emit(self._moved(touched, heads))
        self._acknowledge()

    def _moved(self, touched: Iterable[str], heads: dict[str, int]) -> list[str]:
        """The series that a forecast is due for."""
        predictor = self.predictor
        moved = [item for item in touched if item in predictor and predictor.head(item) > heads[item]]
        if self.args.emit == "patch":
            P = predictor.model.patch_size
            moved = [item for item in moved if predictor.head(item) // P > heads[item] // P]
        return moved

    def _note_held(self, batch: list[Row], rows: Any) -> None:
        """Keeps the raw lines of rows that the predictor holds back, so that none is lost when it drops them."""
        held = self.predictor.held()
        if not held and not self.pending:
            return
        for item, stamp, place in zip(rows.item_ids, rows.stamps, rows.places.tolist(), strict=True):
            from tsgdn.data.clock import show

            name = (item, show(stamp))
            if name in held:
                self.pending.setdefault(name, batch[place].line)
        self.pending = {name: line for name, line in self.pending.items() if name in held}

    # ---- out --------------------------------------------------------------------------------------------------------

    def _emit(self, items: list[str]) -> None:
        if not items:
            return
        import numpy as np
        import orjson

        predictor = self.predictor
        forecast = predictor.forecast(items, quantile_levels=self.levels)
        origins = predictor.clock.timestamp(forecast.start, -1)
        names = [str(level) for level in self.levels]
        forecasts = []
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
            line = orjson.dumps(record, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE)
            forecasts.append(Forecast(record["id"], item, origin, line))
        try:
            self.sink.send(forecasts)
        except OSError:
            self.unsent = True
            raise
        self.counts["forecasts"] += len(items)

    def _set_aside(self, code: str, text: str, line: Line) -> None:
        self.codes[code] += 1
        if self.dead is not None:
            shown = line.raw.decode("utf-8", "backslashreplace")
            place = {"entry": line.at} if line.at else {"line": line.number}
            record = {"code": code, "text": text, **place, "raw": shown}
            self.dead.write(json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")
            self.dead.flush()
        now = time.monotonic()
        if now - self.log_window >= 1:
            self._tell_dropped()
            self.log_window, self.log_count = now, 0
        self.log_count += 1
        if self.log_count <= LOG_LINES_PER_SECOND:
            place = {"entry": line.at} if line.at else {"line": line.number}
            self.log(f"{line.where}: {code}: {text}", level="warning", code=code, **place)
        else:
            self.log_dropped += 1

    def _tell_dropped(self) -> None:
        if self.log_dropped:
            self.log(f"{self.log_dropped} more rows were set aside and not named here", level="warning")
            self.log_dropped = 0

    def _summary(self, seconds: float) -> None:
        # rows that still wait for others to agree would be forgotten without a state folder
        if self.args.state is None:
            for (item, stamp), line in self.pending.items():
                text = f"item {item} at {stamp}: far ahead of its series, and the stream ended before others agreed"
                self.counts["rejected"] += 1
                self._set_aside("ts.jump", text, line)
            self.pending = {}
        self._tell_dropped()
        counts = self.counts
        kinds = ", ".join(f"{code} {count}" for code, count in sorted(self.codes.items()))
        counts["held"] = len(self.pending)
        names = ("accepted", "missing", "duplicate", "late", "rejected", "held", "unreadable")
        parts = [f"{counts[name]} {name}" for name in names if counts[name] or name != "held"]
        self.log(
            f"{counts['rows']} rows in {seconds:.1f} s: {', '.join(parts)}; {counts['gap']} absent steps, "
            f"{len(self.predictor)} series, {counts['forecasts']} forecasts"
            + (f"; set aside: {kinds}" if kinds else ""),
            counts={**counts, "series": len(self.predictor), "ticks": self.ticks},
            codes=dict(self.codes),
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
            if self.control.stopping:
                os._exit(130 if number == signal.SIGINT else 143)
            self.control.stopping = True

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


def _iso(stamp: Any) -> str:
    import numpy as np

    text = str(np.datetime64(stamp, "ns"))
    return re.sub(r"\.?0+$", "", text) if "." in text else text


def _levels(text: str) -> tuple[float, ...]:
    try:
        levels = sorted({float(part) for part in text.split(",")})
    except ValueError:
        levels = []
    if not levels or not all(0 < level < 1 for level in levels):
        raise Misuse(f"--quantiles is {text!r}, expected numbers between 0 and 1 such as .1,.5,.9")
    return tuple(levels)


def _tick(text: str, emit: str) -> Tick:
    if text == "auto":
        return Tick(16_384, 0.05, emit != "none")
    match = re.fullmatch(r"(\d{1,9})(ms)?", text, re.ASCII)
    if match is None or int(match[1]) < 1:
        raise Misuse(f"--tick is {text!r}, expected rows such as 512, milliseconds such as 50ms, or auto")
    if match[2]:
        return Tick(65_536, int(match[1]) / 1000, False)
    return Tick(int(match[1]), float("inf"), False)
