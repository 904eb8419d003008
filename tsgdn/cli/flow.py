"""The loop of `tsgdn stream`: lines into ticks, ticks into an engine, forecasts into a sink, each row once.

A source is read on when the tick before has been taken in and its forecasts are out. A checkpoint comes after the
forecasts of a tick: a kill between the two would lose them.
"""

import contextlib
import io
import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

from tsgdn.cli.engine import Engine, Held
from tsgdn.cli.lines import Line, Parser, Row
from tsgdn.cli.log import Log
from tsgdn.cli.main import Misuse
from tsgdn.cli.sinks import Forecast, Sink
from tsgdn.cli.sources import Control, Source, without_password

UNREADABLE_LIMIT = 100
LOG_LINES_PER_SECOND = 10
RENEW_EVERY = 10.0  # seconds; the lease of a store runs for 30
RECEIVED_APART = 1_000_000_000  # nanoseconds; rows of a tick count as received together


class TickSize(NamedTuple):
    """How many rows are taken in together; `apart`: no series twice."""

    rows: int
    seconds: float
    apart: bool


class Feed:
    """A source and what is known of it.

    Args:
        text: as it was given.
        source: resumed.
        parser: of its lines.
        marks: per shard how far the states hold it, where they differ; None: nothing of it is held twice.
    """

    def __init__(self, text: str, source: Source, parser: Parser, marks: Sequence[bytes | None] | None = None) -> None:
        self.text, self.source, self.parser, self.marks = without_password(text), source, parser, marks
        self.latest: Line | None = None  # taken into the batch, or set aside, and not yet in a tick
        self.offset = b""  # behind the last tick
        self.unreadable = 0


class Settings(NamedTuple):
    """Of a run.

    Attributes:
        tick: how many rows are taken in together.
        checkpoint_every: seconds, at least.
        strict: whether a row that was set aside is a failure.
        memory: whether nothing but checkpoints outlives a kill.
        kept: whether there is a store.
        state: as it was given, for messages.
        shard: which of how many this process is for, None: all.
        emit: whether forecasts are wanted.
        until_idle: seconds without a row after which the run ends; None: never.
    """

    tick: TickSize
    checkpoint_every: float = 60.0
    strict: bool = False
    memory: bool = False
    kept: bool = False
    state: str = ""
    shard: tuple[int, int] | None = None
    emit: bool = True
    until_idle: float | None = None


class Flow:
    """One run of the filter.

    Args:
        settings: of the run.
        log: for people.
        control: that the sources and the sink share.
        engine: that takes ticks in.
        feeds: at least one.
        sink: of the forecasts.
        signals: where alarms go.
        dead: where lines go that were set aside.
    """

    def __init__(
        self,
        settings: Settings,
        log: Log,
        control: Control,
        engine: Engine,
        feeds: Sequence[Feed],
        sink: Sink,
        signals: BinaryIO | None = None,
        dead: BinaryIO | None = None,
    ) -> None:
        self.settings, self.log, self.control, self.engine = settings, log, control, engine
        self.feeds, self.sink, self.signals, self.dead = list(feeds), sink, signals, dead
        self.counts: Counter[str] = Counter()
        self.codes: Counter[str] = Counter()
        self.ticks = 0
        # where the rows are that the predictor holds back, and what they said; earlier runs only left the latter
        self.pending: dict[tuple[str, str], Line] = {
            (item, stamp): Line(0, json.dumps([item, stamp, values], ensure_ascii=False).encode())
            for (item, stamp), values in engine.held().items()
        }
        self.batch: list[Row] = []
        self.members: set[str] = set()  # series in it
        self.feed = self.feeds[0]  # whose lines it holds
        self.unsent = False  # whether the sink failed
        self.saved, self.renewed, self.duration = time.monotonic(), time.monotonic(), 0.0
        self.log_window, self.log_count, self.log_dropped = 0.0, 0, 0
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
                    failure = OSError(f"--state {self.settings.state}: {error}")
                    break
                except BrokenPipeError:
                    self._silence_stdout()
                except (Misuse, OSError) as error:
                    failure = failure or error
            try:
                self._end()  # a bug goes past this line and leaves the journal as it is
            except StoreError as error:
                failure = failure or OSError(f"--state {self.settings.state}: {error}")
            if self.counts["rows"] or failure is None:
                self._summary(time.monotonic() - began)
        finally:
            self._restore_signals(handlers)
        if failure is not None:
            raise failure
        bad = self.counts["rejected"] + self.counts["late"] + self.counts["unreadable"]
        return 2 if self.settings.strict and bad else 0

    def _places(self) -> dict[str, bytes]:
        """How far each source is in all states; nothing of one whose shards stand apart: some are further."""
        return {feed.source.name: feed.offset for feed in self.feeds if feed.offset and feed.marks is None}

    def _end(self) -> None:
        """Lets go of the store, with a checkpoint; without one where the journal tells which forecasts are missing."""
        replayable = all(feed.source.replayable for feed in self.feeds)
        if self.unsent and (not self.settings.memory or replayable):
            self.engine.close(None)
            return
        self.engine.close(self._places())
        self._acknowledge()

    def _again(self) -> None:
        """Forecasts of the last tick before a kill may not have been sent: they are sent again, by the same ids."""
        self._send(self.engine.again())

    # ---- reading ----------------------------------------------------------------------------------------------------

    def _pump(self) -> None:
        """Reads until the sources end or a signal asks to stop."""
        deadline, tick = 0.0, self.settings.tick
        heard = time.monotonic()
        for feed, lines in self._lines():
            now = time.monotonic()
            heard = now if lines else heard
            for line in lines or ():
                if line.seen:
                    feed.parser.recognise(line)
                    continue
                row = self._row(feed, line)
                if row is None:
                    continue
                member = str(row.item_id)
                if self.batch and (
                    feed is not self.feed
                    or (tick.apart and member in self.members)
                    or (line.received or 0) - (self.batch[0].line.received or 0) > RECEIVED_APART
                ):
                    self._flush()
                if not self.batch:
                    deadline = time.monotonic() + tick.seconds
                    self.feed = feed
                self.batch.append(row)
                self.members.add(member)
                feed.latest = line
                if len(self.batch) >= tick.rows:
                    self._flush()
            if now >= deadline or not self.batch or (lines is None and tick.apart):
                self._flush()
            self._chores()
            idle = self.settings.until_idle
            if self.control.stopping or (idle is not None and now - heard > idle):
                break

    def _lines(self) -> Iterator[tuple[Feed, list[Line] | None]]:
        """Of all sources, in turn."""
        open_ones = [(feed, iter(feed.source.lines())) for feed in self.feeds]
        while open_ones:
            for pair in list(open_ones):
                feed, lines = pair
                try:
                    part = next(lines)
                except StopIteration:
                    open_ones.remove(pair)
                    continue
                yield feed, part

    def _flush(self) -> None:
        """Takes in the rows of a tick, each once whatever happens meanwhile."""
        batch, self.batch, self.members = self.batch, [], set()
        for feed in self.feeds:
            latest, feed.latest = feed.latest, None
            if latest is not None:
                self._observe(feed, batch if feed is self.feed else [], latest)

    def _row(self, feed: Feed, line: Line) -> Row | None:
        """The row of a line; None for blank lines, headers and lines that are not for us or were set aside."""
        parsed = feed.parser(line)
        if isinstance(parsed, Row) and not self._ours(feed, parsed, line):
            return None
        self.counts["lines"] += 1
        if parsed is None or isinstance(parsed, Row):
            feed.unreadable = 0 if parsed is not None else feed.unreadable
            return parsed
        if feed.marks is not None and all(feed.source.behind(line, mark) for mark in feed.marks):
            return None
        self.counts["unreadable"] += 1
        self._set_aside(feed, parsed.code, parsed.text, line)
        feed.latest = line
        feed.unreadable += 1
        if feed.unreadable >= UNREADABLE_LIMIT:
            raise Misuse(
                f"--source {feed.text}: {UNREADABLE_LIMIT} unreadable lines in a row, the "
                f"last is {line.where} ({parsed.code}): is this {feed.parser.format}?"
            )
        return None

    def _ours(self, feed: Feed, row: Row, line: Line) -> bool:
        """Whether a row is for this process, and not held already by its shard."""
        if feed.marks is not None:
            held = [feed.source.behind(line, mark) for mark in feed.marks]
            if not any(held) and ":" not in line.at:  # what follows is new to all; partitions stand apart
                feed.marks = None
            return not held[shard_of_row(row, len(held))]
        if self.settings.shard is None:
            return True
        mine, of = self.settings.shard
        owner = shard_of_row(row, of)
        if owner == mine:
            return True
        self.counts["elsewhere"] += 1
        feed.latest = line
        if self.settings.strict:
            self.counts["rejected"] += 1
            self._set_aside(feed, "shard.other", f"item {row.item_id} belongs to shard {owner}, this is {mine}", line)
        return False

    def _observe(self, feed: Feed, batch: list[Row], latest: Line) -> None:
        """Takes in a tick and sends its forecasts; `latest` is the last line before the next tick."""
        from tsgdn.streaming.rows import from_objects

        offset = feed.source.after(latest)
        if not batch and (not self.settings.kept or not offset):
            feed.offset = offset
            self._acknowledge()  # lines that were set aside, alone
            return
        ids = [row.item_id for row in batch]
        stamps = [row.timestamp for row in batch]
        rows = from_objects(ids, stamps, [row.values for row in batch], self.engine.variates)
        received = [row.line.received for row in batch if row.line.received is not None]
        self.ticks += 1
        outcome = self.engine.observe(
            rows, source=feed.source.name, offset=offset, received=max(received) if received else None
        )
        feed.offset = offset
        report = outcome.report
        self.counts["rows"] += len(batch)
        for name in ("accepted", "missing", "duplicate", "late", "rejected", "gap", "revised"):
            self.counts[name] += getattr(report, name)
        for bad in report.set_aside:
            if bad.row is None:  # held back by an earlier tick, until now
                line = self.pending.pop((bad.item_id, bad.timestamp), Line(0, b""))
            else:
                line = batch[bad.row].line
            self._set_aside(feed, bad.code, f"item {bad.item_id} at {bad.timestamp}: {bad.text}", line)
        self._note_held(batch, rows, outcome.held)
        if self.signals is not None and outcome.signals:
            self.signals.write(b"".join(outcome.signals))
            self.signals.flush()
            self.counts["signals"] += len(outcome.signals)
        self._send(outcome.forecasts)
        self._acknowledge()

    def _note_held(self, batch: list[Row], rows: Any, held: Held) -> None:
        """Keeps the raw lines of rows that the predictor holds back, so that none is lost when it drops them."""
        if not held and not self.pending:
            return
        from tsgdn.data.clock import show

        for item, stamp, place in zip(rows.item_ids, rows.stamps, rows.places.tolist(), strict=True):
            name = (item, show(stamp))
            if name in held:
                self.pending.setdefault(name, batch[place].line)
        self.pending = {name: line for name, line in self.pending.items() if name in held}

    def _send(self, forecasts: list[Forecast]) -> None:
        if not forecasts:
            return
        try:
            self.sink.send(forecasts)
        except OSError:
            self.unsent = True
            raise
        self.counts["forecasts"] += len(forecasts)

    # ---- chores -----------------------------------------------------------------------------------------------------

    def _chores(self) -> None:
        """Checkpoints when it is time: after the forecasts of a tick, or a kill in between would lose them."""
        if not self.settings.kept:
            return
        passed = time.monotonic() - self.saved
        if passed >= max(self.settings.checkpoint_every, 10 * self.duration) or self.engine.due():
            began = time.monotonic()
            self.engine.checkpoint(self._places())
            self.saved = time.monotonic()
            self.duration = self.saved - began
            self._acknowledge()
        self._renew()

    def _renew(self) -> None:
        """A stream that waits keeps its store."""
        if self.settings.kept and time.monotonic() - self.renewed >= RENEW_EVERY:
            self.renewed = time.monotonic()
            self.engine.renew()

    def _acknowledge(self) -> None:
        """Tells the sources how far the states are for certain."""
        if not self.engine.certain():
            return
        for feed in self.feeds:
            if feed.offset:
                feed.source.acknowledge(feed.offset)

    # ---- telling ----------------------------------------------------------------------------------------------------

    def _set_aside(self, feed: Feed, code: str, text: str, line: Line) -> None:
        self.codes[code] += 1
        where = line.where if len(self.feeds) == 1 else f"{feed.text} {line.where}"
        if self.dead is not None:
            shown = line.raw.decode("utf-8", "backslashreplace")
            place: dict[str, Any] = {"entry": line.at} if line.at else {"line": line.number}
            if len(self.feeds) > 1:
                place["source"] = feed.source.name
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
            self.log(f"{where}: {code}: {text}", level="warning", code=code, **place)
        else:
            self.log_dropped += 1

    def _tell_dropped(self) -> None:
        if self.log_dropped:
            self.log(f"{self.log_dropped} more rows were set aside and not named here", level="warning")
            self.log_dropped = 0

    def _summary(self, seconds: float) -> None:
        # rows that still wait for others to agree would be forgotten without a state folder
        if not self.settings.kept:
            for (item, stamp), line in self.pending.items():
                text = f"item {item} at {stamp}: far ahead of its series, and the stream ended before others agreed"
                self.counts["rejected"] += 1
                self._set_aside(self.feed, "ts.jump", text, line)
            self.pending = {}
        self._tell_dropped()
        counts = self.counts
        kinds = ", ".join(f"{code} {count}" for code, count in sorted(self.codes.items()))
        counts["held"] = len(self.pending)
        always = ("accepted", "missing", "duplicate", "late", "rejected")
        names = (*always, "revised", "held", "unreadable", "elsewhere")
        parts = [f"{counts[name]} {name}" for name in names if counts[name] or name in (*always, "unreadable")]
        series = self.engine.series()
        self.log(
            f"{counts['rows']} rows in {seconds:.1f} s: {', '.join(parts)}; {counts['gap']} absent steps, "
            f"{series} series, {counts['forecasts']} forecasts" + (f"; set aside: {kinds}" if kinds else ""),
            counts={**counts, "series": series, "ticks": self.ticks},
            codes=dict(self.codes),
        )

    def _silence_stdout(self) -> None:
        """The reader is gone: nothing more can be said to it, and that is no error."""
        with contextlib.suppress(OSError, ValueError, AttributeError, io.UnsupportedOperation):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())
            os.close(nowhere)

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


def shard_of_row(row: Row, shards: int) -> int:
    """The shard of a row; that of a name which cannot be one is 0, where it will be refused."""
    from tsgdn.streaming.stores.shards import shard_of

    if isinstance(row.item_id, bool) or not isinstance(row.item_id, str | int):
        return 0
    try:
        return shard_of(str(row.item_id), shards)
    except ValueError:
        return 0
