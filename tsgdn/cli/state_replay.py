"""`tsgdn state replay`: states of a new model, warmed up from the source.

A model cannot take over the states of another one. So the rows that are still in the source are streamed through it,
without forecasts, into a store of its own, while the stream of the old model goes on. Then the new one goes on from
where the replay has ended, and the old one is stopped.
"""

import argparse
from pathlib import Path

from tsgdn.cli import stream
from tsgdn.cli.main import Misuse
from tsgdn.cli.options import add_predictor_arguments
from tsgdn.cli.sources import without_password

IDLE = 5.0  # seconds without a row after which a broker counts as read to its end


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `tsgdn state replay`; those that it shares with `tsgdn stream` mean the same."""
    parser.add_argument("--model", required=True, metavar="DIR", help="folder of the new model")
    parser.add_argument("--state", required=True, metavar="DIR|redis://", help="a store for it; the old one stays")
    parser.add_argument(
        "--source",
        action="append",
        required=True,
        metavar="FILE|replay:NAME|redis://|kafka://",
        help="what is still there to be read; of a broker with a group= of its own",
    )
    parser.add_argument("--state-key", type=Path, metavar="FILE", help="key that seals the states")
    parser.add_argument("--format", choices=("auto", "jsonl", "csv"), default="auto", help="of the source (auto)")
    parser.add_argument("--shards", type=int, metavar="N", help="as for tsgdn stream")
    parser.add_argument("--shard", type=int, metavar="I", help="as for tsgdn stream")
    parser.add_argument("--workers", type=int, metavar="N", help="as for tsgdn stream")
    parser.add_argument("--checkpoint-every", type=float, default=60.0, metavar="S", help="seconds, at least (60)")
    parser.add_argument("--horizon", type=int, help=argparse.SUPPRESS)
    add_predictor_arguments(parser)
    parser.add_argument("--dead-letter", metavar="FILE", help="rows set aside are added here, as JSON lines")
    parser.add_argument("--strict", action="store_true", help="exit 2 if any row was set aside")
    parser.add_argument("--log", choices=("text", "json"), default="text", help="lines on stderr (text)")


def run(args: argparse.Namespace) -> int:
    """Reads the sources to their end; again after a kill, and it goes on from the last checkpoint.

    Raises:
        Misuse: a wrong argument; nothing has been read.
    """
    for text in args.source:
        if text == "-":
            raise Misuse("--source -: what comes through a pipe is gone: give the file, or tsgdn stream --emit none")
        if "://" in text and "group=" not in text:
            raise Misuse(
                f"--source {without_password(text)}: give it group=NAME of its own, or rows of the running stream "
                "would come here"
            )
    parser = argparse.ArgumentParser()
    stream.add_arguments(parser)
    whole = parser.parse_args(["--model", args.model])
    told = {name: value for name, value in vars(args).items() if name in vars(whole)}
    vars(whole).update(told)
    whole.emit, whole.sink, whole.tick, whole.begin = "none", "null", "16384", True
    # without a journal it is faster; what a kill takes back is read again
    whole.durability = "normal" if args.workers else "memory"
    return stream.run(whole, name="state replay", until_idle=IDLE)
