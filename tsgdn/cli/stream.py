"""`tsgdn stream`: observations in, line by line, quantile forecasts out as JSON lines.

A filter and a service: data from stdin, files, a data set, Redis Streams or Kafka; forecasts to stdout, a file or
Redis Streams; everything else to stderr. A wrong option, file or schema stops it before anything is applied; a wrong
row is counted, named and set aside, and the stream goes on.
"""

import argparse
import contextlib
import re
import sys
from pathlib import Path
from typing import Any, BinaryIO

from tsgdn.cli.engine import Engine, Forecasting, Local
from tsgdn.cli.flow import Feed, Flow, Settings, TickSize
from tsgdn.cli.lines import Parser
from tsgdn.cli.log import Log, Progress
from tsgdn.cli.main import Misuse
from tsgdn.cli.options import add_predictor_arguments, open_predictor, predictor_options, state_place
from tsgdn.cli.sinks import Append, open_sink
from tsgdn.cli.sources import Control, File, open_source, without_password


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `tsgdn stream`."""
    parser.add_argument("--model", required=True, metavar="DIR", help="folder of a fitted model")
    parser.add_argument(
        "--source",
        action="append",
        metavar="-|FILE|replay:NAME|redis://|kafka://",
        help="where observations come from (-): redis://HOST/DB?stream=NAME&group=G&consumer=C, "
        "kafka://HOST:PORT/TOPIC?group=G; may be given several times",
    )
    parser.add_argument(
        "--sink",
        default="-",
        metavar="-|FILE|redis://|null",
        help="where forecasts go (-): redis://HOST/DB?stream=NAME",
    )
    parser.add_argument("--signals", metavar="FILE|-", help="watch for anomalies and drift; alarms go here")
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
        help="states and the places in the sources are kept here: what was taken in survives a kill",
    )
    parser.add_argument("--state-key", type=Path, metavar="FILE", help="key that seals states, as hexadecimal digits")
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
    parser.add_argument("--shards", type=int, metavar="N", help="spread series over so many stores, by their names")
    parser.add_argument("--shard", type=int, metavar="I", help="only rows of this shard, from 0; others are skipped")
    parser.add_argument(
        "--workers", type=int, metavar="N", help="processes that share the shards; this one routes rows"
    )
    add_predictor_arguments(parser)
    parser.add_argument("--dead-letter", metavar="FILE", help="rows set aside are added here, as JSON lines")
    parser.add_argument("--strict", action="store_true", help="exit 2 if any row was set aside")
    parser.add_argument("--log", choices=("text", "json"), default="text", help="lines on stderr (text)")


def run(args: argparse.Namespace, *, name: str = "stream", until_idle: float | None = None) -> int:
    """Streams until the sources end or a signal asks to stop; returns the exit code.

    Args:
        args: as parsed.
        name: of the command, for messages.
        until_idle: seconds without a row after which a broker counts as read to its end.
    """
    log = Log(args.log, name)
    try:
        with contextlib.ExitStack() as stack:
            return _prepared(args, log, stack, until_idle).run()
    except (Misuse, OSError) as error:
        if args.log == "text" or isinstance(error, BrokenPipeError):
            raise
        log(" ".join(str(error).split()), level="error")
        return 2 if isinstance(error, (Misuse, *_MISUSE)) else 1


_MISUSE = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)  # as in main


def _prepared(args: argparse.Namespace, log: Log, stack: contextlib.ExitStack, until_idle: float | None) -> Flow:
    """All that can be wrong with the options, before anything is read; `stack` closes what this opens."""
    control = Control(log)
    texts = args.source or ["-"]
    tick = _tick(args.tick, args.emit)
    forecasting = Forecasting(_levels(args.quantiles), args.emit, True if args.calibrate else None)
    if args.horizon is not None and not 1 <= args.horizon <= 100_000:
        raise Misuse(f"--horizon is {args.horizon}, expected 1 to 100000 steps")
    if not args.checkpoint_every > 0:
        raise Misuse(f"--checkpoint-every is {args.checkpoint_every}, expected a positive number of seconds")
    if any("://" in text for text in texts) and args.format == "csv":
        raise Misuse("--format is csv, expected jsonl or auto: a broker holds records, and no header")
    if args.signals == args.sink == "-":
        raise Misuse("--signals - and --sink - are one stream: give one of them a file")
    options = predictor_options(args)
    shards = _shards(args)
    if args.state_key is not None and args.state is None:
        raise Misuse("--state-key seals the states of --state: give that too")
    predictor = open_predictor(args, options)
    sources = [open_source(text, predictor, control, follow=args.follow, takeover=args.takeover) for text in texts]
    for source in sources:
        stack.callback(source.close)
    if len({source.name for source in sources}) < len(sources):
        raise Misuse("--source: one of them is given twice")
    sink = open_sink(args.sink, control)
    stack.callback(sink.close)
    for source, text in zip(sources, texts, strict=True):
        if isinstance(source, File) and isinstance(sink, Append) and source.path.samefile(sink.path):
            raise Misuse(f"--sink {args.sink}: is the source: give another file")
        if "://" in args.sink and "://" in text and getattr(source, "place", source) == getattr(sink, "place", sink):
            raise Misuse(f"{getattr(sink, 'shown', '--sink')}: is the source: give another stream")
    signals = None if args.signals is None else _signals(args, stack)
    if args.workers is not None:
        from tsgdn.cli.workers import Workers

        engine: Engine = Workers(args, options, forecasting, predictor, shards, control.log)
        stack.callback(engine.abandon)
    else:
        durable = None
        if args.state is not None:
            durable = _durable(args, predictor, sources[0].name, control, stack)
        engine = Local(predictor, durable, forecasting, signals=signals is not None)
    dead = None
    if args.dead_letter is not None:
        try:
            dead = stack.enter_context(Path(args.dead_letter).expanduser().open("ab"))
        except OSError as error:
            raise Misuse(f"--dead-letter {args.dead_letter}: {error.strerror}") from None
    feeds = []
    for source, text in zip(sources, texts, strict=True):
        places = [None] * engine.shards if args.from_start else engine.places(source.name)
        anew = args.from_start or (getattr(args, "begin", False) and not any(places))
        source.resume(source.first(places) if len(places) > 1 else places[0], anew=anew)
        parser = Parser(args.format if source.format is None else source.format, engine.variates, broker=source.broker)
        feeds.append(Feed(text, source, parser, places if len(set(places)) > 1 else None))
    settings = Settings(
        tick,
        args.checkpoint_every,
        args.strict,
        args.durability == "memory",
        args.state is not None,
        without_password(args.state or ""),
        None if args.shard is None else (args.shard, shards),
        args.emit != "none",
        until_idle,
    )
    return Flow(settings, log, control, engine, feeds, sink, signals, dead)


def _shards(args: argparse.Namespace) -> int:
    """How many shards there are."""
    from tsgdn.streaming.stores import StoreError
    from tsgdn.streaming.stores.shards import MOST_SHARDS, shards_at

    if args.shards is None and args.shard is None and args.workers is None:
        return 1
    if args.shard is not None and args.workers is not None:
        raise Misuse("--shard is one shard in one process, --workers share all of them: leave one out")
    if args.shards is not None and args.shard is None and args.workers is None:
        raise Misuse("--shards needs --shard, which of them this is, or --workers for all of them")
    if args.shards is None and args.shard is not None:
        raise Misuse("--shard needs --shards: which of how many?")
    if args.workers is not None:
        if args.workers < 1:
            raise Misuse(f"--workers is {args.workers}, expected at least 1")
        if args.state is None or args.durability == "memory":
            raise Misuse(
                "--workers needs --state with a journal: a worker that dies takes its states from there"
                + (", and --durability memory has none" if args.state is not None else "")
            )
    from tsgdn.streaming import snapshot

    if args.state is not None and "://" not in args.state and snapshot.exists(Path(args.state).expanduser()):
        raise Misuse(
            f"--state {args.state}: is a snapshot, which one process takes over: leave --shards and --workers out"
        )
    try:
        there = None if args.state is None else shards_at(args.state)
    except StoreError as error:
        raise Misuse(f"--state {args.state}: {error}") from None
    shards: int = args.shards if args.shards is not None else there or args.workers or 1
    if not 1 <= shards <= MOST_SHARDS:
        raise Misuse(f"--shards is {shards}, expected 1 to {MOST_SHARDS}")
    if args.workers is not None and there is not None and there != shards:
        raise Misuse(
            f"--shards is {shards}, --state {args.state} has {there}: give that number, or tsgdn state reshard"
        )
    if args.workers is not None and args.workers > shards:
        raise Misuse(f"--workers is {args.workers} for {shards} shards: expected at most that many")
    if args.shard is not None and not 0 <= args.shard < shards:
        raise Misuse(f"--shard is {args.shard} of {shards}, expected 0 to {shards - 1}")
    return shards


def _signals(args: argparse.Namespace, stack: contextlib.ExitStack) -> BinaryIO:
    if args.signals == "-":
        return getattr(sys.stdout, "buffer", sys.stdout)  # pyright: ignore[reportReturnType]
    try:
        return stack.enter_context(Path(args.signals).expanduser().open("ab"))
    except OSError as error:
        raise Misuse(f"--signals {args.signals}: {error.strerror}") from None


def _durable(
    args: argparse.Namespace, predictor: Any, source: str, control: Control, stack: contextlib.ExitStack
) -> Any:
    """The store of --state, its states in the predictor; `stack` lets go of it."""
    from tsgdn.cli.stores import read_key
    from tsgdn.streaming import snapshot
    from tsgdn.streaming.durable import DurablePredictor
    from tsgdn.streaming.stores import StoreError, open_store

    key = None if args.state_key is None else read_key(args.state_key)
    place = state_place(args.state)
    try:
        durable = DurablePredictor(
            predictor,
            open_store(
                place, durability=args.durability, key=key, shard=args.shard or 0,
                shards=args.shards if args.shard is not None else 1,
            ),
            owner="tsgdn stream",
            source=source,
            key=key,
            checkpoint_every=float("inf"),  # not between a tick and its forecasts: see Flow._chores
            takeover=args.takeover,
            progress=Progress("ticks replayed", control.log),
        )  # fmt: skip
        stack.callback(durable.store.close)
        if isinstance(place, Path) and snapshot.exists(place) and not len(predictor):
            durable.adopt(place)
            control.log(f"{len(predictor)} series were taken over from the snapshot in {place}")
    except (StoreError, ValueError, OSError) as error:
        raise Misuse(f"--state {without_password(args.state)}: {error}") from None
    found = durable.recovery
    if found.series or found.ticks:
        control.log(f"{len(durable)} series were restored, {found.ticks} ticks of the journal among them")
    for item, code in found.lost.items():
        text = f"{code}: the state of item {item} is damaged; its rows are set aside"
        control.log(text, level="warning", code=code, item_id=item)
    return durable


def _levels(text: str) -> tuple[float, ...]:
    try:
        levels = sorted({float(part) for part in text.split(",")})
    except ValueError:
        levels = []
    if not levels or not all(0 < level < 1 for level in levels):
        raise Misuse(f"--quantiles is {text!r}, expected numbers between 0 and 1 such as .1,.5,.9")
    return tuple(levels)


def _tick(text: str, emit: str) -> TickSize:
    if text == "auto":
        return TickSize(16_384, 0.05, emit != "none")
    match = re.fullmatch(r"(\d{1,9})(ms)?", text, re.ASCII)
    if match is None or int(match[1]) < 1:
        raise Misuse(f"--tick is {text!r}, expected rows such as 512, milliseconds such as 50ms, or auto")
    if match[2]:
        return TickSize(65_536, int(match[1]) / 1000, False)
    return TickSize(int(match[1]), float("inf"), False)
