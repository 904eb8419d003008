"""`tsgdn bench gluonts`: accuracy of every mixer in one harness, resumable, rows in a results.csv."""

import argparse
from pathlib import Path

from tsgdn.cli.main import Misuse

HEADLINE = "etth1,us_births,m4_hourly,exchange_rate_nips"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `tsgdn bench`."""
    parser.add_argument("question", choices=["gluonts"], help="gluonts: accuracy on published windows")
    parser.add_argument("--tasks", default=HEADLINE, help=f"evaluation cells with a preset (default {HEADLINE})")
    parser.add_argument("--mixers", default="gated_deltanet,mamba2", help="names, comma-separated")
    parser.add_argument("--seeds", default="0,1,2", help="numbers, comma-separated")
    parser.add_argument(
        "--results", type=Path, default=Path("experiments/accuracy/results.csv"), help="CSV to append to"
    )
    parser.add_argument("--root", type=Path, default=Path("runs/accuracy"), help="folder of the fits")
    parser.add_argument("--workers", type=int, default=1, help="fits at a time, one thread each")
    parser.add_argument("--set", action="append", default=[], metavar="OPTION=VALUE", help="handed on to tsgdn fit")


def run(args: argparse.Namespace) -> int:
    """Runs the cells that have no rows yet; exit 1 if one failed."""
    from tsgdn.bench import gluonts
    from tsgdn.cli.train import presets
    from tsgdn.data.catalog import DataNotFound
    from tsgdn.data.catalog import tasks as evaluation_cells

    tasks, mixers = args.tasks.split(","), args.mixers.split(",")
    both = [name for name in presets() if name in evaluation_cells()]
    for name in tasks:
        if name not in both:
            raise Misuse(f"--tasks {name}: expected evaluation cells that have a preset, of {', '.join(both)}")
    for name in mixers:
        if name not in gluonts.MATCHED:
            raise Misuse(f"--mixers {name}: expected some of {', '.join(gluonts.MATCHED)}")
    try:
        seeds = [int(seed) for seed in args.seeds.split(",")]
    except ValueError:
        raise Misuse(f"--seeds {args.seeds}: expected whole numbers, as in 0,1,2") from None
    if args.workers < 1:
        raise Misuse(f"--workers {args.workers}: expected at least 1")
    options = [f"--{text.lstrip('-')}" for text in args.set]
    try:
        failed = gluonts.run(
            tasks, mixers, seeds, results=args.results, root=args.root, workers=args.workers, options=options
        )
    except DataNotFound as error:
        raise Misuse(str(error)) from error
    return 1 if failed else 0
