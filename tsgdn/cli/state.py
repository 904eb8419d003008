"""`tsgdn state`: what a store of states holds, and what its operator does with it.

`ls`, `show`, `export` and `diff` only read: they take no lease and work beside a running stream. `import` and `prune`
become the owner for as long as they take, so they want the stream to be stopped; so does `reshard`, which writes new
stores and leaves the old ones as they are. `replay` makes the states of a new model.
"""

import argparse
import contextlib
from pathlib import Path

from tsgdn.cli import state_replay
from tsgdn.cli.main import Misuse, say
from tsgdn.streaming.stores import StoreBusy, StoreError, StoreRefused


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the sub-commands of `tsgdn state`."""
    names = ("ls", "show", "export", "import", "diff", "prune", "reshard", "replay")
    actions = parser.add_subparsers(dest="action", required=True, metavar=f"{{{','.join(names)}}}")
    store = "a folder, or redis://HOST:PORT/DB"

    def action(name: str, text: str) -> argparse.ArgumentParser:
        one = actions.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        one.add_argument("--state-key", type=Path, metavar="FILE", help="key of the seals, as hexadecimal digits")
        one.add_argument(
            "--unchecked",
            action="store_true",
            help="take a place or settings that cannot be proven sound, and a store without its log",
        )
        return one

    one = action("ls", "series with steps seen, last time, values, bytes and tick; lost ones are marked")
    one.add_argument("store", metavar="STORE", help=store)
    one.add_argument("--limit", type=int, metavar="N", help="the first so many")
    one.add_argument("--prefix", default="", metavar="TEXT", help="those whose name begins so")
    one.add_argument("--json", action="store_true", help="a JSON object per line")

    one = action("show", "a store, or one series in it")
    one.add_argument("store", metavar="STORE", help=store)
    one.add_argument("item", metavar="ITEM", nargs="?", help="a series")
    one.add_argument("--model", type=Path, metavar="DIR", help="the model's folder: names the leaves of the state")
    one.add_argument("--late-window", type=int, default=0, metavar="N", help="as the stream had it, with --model")
    one.add_argument("--json", action="store_true", help="one JSON object")

    one = action("export", "a copy as of one moment, or some records in a file; a stream may run meanwhile")
    one.add_argument("store", metavar="STORE", help=store)
    one.add_argument("target", type=Path, metavar="FOLDER|FILE.tsgs", help="must not exist yet")
    one.add_argument("--items", metavar="A,B", help='series for the file (default: all); "a,b" is one name')
    one.add_argument("--json", action="store_true", help="one JSON object")

    one = action("import", "records into a store of the same model and layout; a newer record is kept")
    one.add_argument("store", metavar="STORE", help=store)
    one.add_argument("source", type=Path, metavar="FILE.tsgs|FOLDER", help="from export, or a store of files")
    one.add_argument("--replace", action="store_true", help="replace newer records and bring deleted series back too")
    one.add_argument("--json", action="store_true", help="one JSON object")

    one = action("diff", "series that are in one store only, or whose states differ; exit 1 if there are any")
    one.add_argument("store", metavar="STORE_A", help=store)
    one.add_argument("other", metavar="STORE_B", help=store)
    one.add_argument("--seq", action="store_true", help="compare the numbers of the ticks too; each store has its own")
    one.add_argument("--json", action="store_true", help="a JSON object per line")

    one = action("prune", "forget silent series, deletions or dead letters")
    one.add_argument("store", metavar="STORE", help=store)
    one.add_argument(
        "--older-than",
        metavar="DURATION",
        help="series whose last step lies so long (90d, 12h, 30min) before the newest one of the store",
    )
    one.add_argument("--tombstones-before", type=int, metavar="TICK", help="deletions of ticks below it")
    one.add_argument("--dead-before", type=int, metavar="TICK", help="dead letters of ticks below it")
    one.add_argument("--dry-run", action="store_true", help="only say what would go")
    one.add_argument("--json", action="store_true", help="one JSON object")

    one = action("reshard", "spread series over another number of stores; the old ones stay as they are")
    one.add_argument("stores", metavar="STORE", nargs="+", help=store + "; all shards of it")
    one.add_argument("--into", type=Path, required=True, metavar="FOLDER", help="must not exist yet")
    one.add_argument("--shards", type=int, required=True, metavar="N")
    one.add_argument("--json", action="store_true", help="one JSON object")

    text = "states of a new model, warmed up from what the source still holds"
    one = actions.add_parser("replay", help=text, description=text[0].upper() + text[1:] + ".")
    state_replay.add_arguments(one)


def run(args: argparse.Namespace) -> int:
    """Runs one sub-command.

    Returns:
        0; 1 where stores differ, are damaged, or a series is lost.

    Raises:
        Misuse: a wrong argument, or a store that is in use, of another model, or not there.
    """
    from tsgdn.cli import state_look, state_move

    if args.action == "replay":
        return state_replay.run(args)
    try:
        return {
            "ls": state_look.ls,
            "show": state_look.show,
            "export": state_move.export,
            "import": state_move.import_,
            "diff": state_look.diff,
            "prune": state_move.prune,
            "reshard": _reshard,
        }[args.action](args)
    except (StoreRefused, StoreBusy) as error:
        raise Misuse(str(error)) from error
    except StoreError as error:
        say(f"state {args.action}", error)
        return 1


def _reshard(args: argparse.Namespace) -> int:
    from tsgdn.cli.stores import Progress, key_of, out, plain, some, viewing
    from tsgdn.streaming.stores.reshard import reshard
    from tsgdn.streaming.stores.shards import MOST_SHARDS

    if not 1 <= args.shards <= MOST_SHARDS:
        raise Misuse(f"--shards is {args.shards}, expected 1 to {MOST_SHARDS}")
    into = args.into.expanduser().absolute()
    left = sorted(into.parent.glob(f"{into.name}.partial-*"))
    if left:
        say("state reshard", f"{left[0]} was left by a run that was killed, or another one runs: remove it if not")
    with contextlib.ExitStack() as stack:
        stores = [shard.store for place in args.stores for shard in stack.enter_context(viewing(place, args))]
        with Progress("reshard", sum(map(len, stores))) as progress:
            told = reshard(stores, into, args.shards, key=key_of(args), unchecked=args.unchecked, progress=progress.add)
    if told.dropped:
        say("state reshard", f"the stores differ in the offset of {some(told.dropped)}: tell the stream where to begin")
    if args.json:
        out({"folder": str(into), "shards": args.shards, **told._asdict()})
    else:
        print(f"{plain(str(into))}: {told.series} series in {args.shards} shards, {told.lost} lost ones are marked")
    return 0
