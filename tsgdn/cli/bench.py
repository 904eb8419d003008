"""`tsgdn bench QUESTION`: gluonts (accuracy), mixers (all side by side), kernels, latency, memory,
online (accuracy along a stream), retention.

All are resumable and append rows to a CSV.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tsgdn.cli.main import Misuse

HEADLINE = "etth1,us_births,m4_hourly,exchange_rate_nips"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `tsgdn bench`, by question."""
    questions = parser.add_subparsers(
        dest="question", required=True, metavar="gluonts|mixers|kernels|latency|online|memory|retention"
    )
    gluonts = questions.add_parser("gluonts", help="accuracy of every mixer on published windows")
    gluonts.add_argument("--tasks", default=HEADLINE, help=f"evaluation cells with a preset (default {HEADLINE})")
    gluonts.add_argument("--mixers", default="gated_deltanet,mamba2", help="names, comma-separated")
    gluonts.add_argument("--seeds", default="0,1,2", help="numbers, comma-separated")
    gluonts.add_argument(
        "--results", type=Path, default=Path("experiments/accuracy/results.csv"), help="CSV to append to"
    )
    gluonts.add_argument("--root", type=Path, default=Path("runs/accuracy"), help="folder of the fits")
    gluonts.add_argument("--workers", type=int, default=1, help="fits at a time, one thread each")
    gluonts.add_argument("--set", action="append", default=[], metavar="OPTION=VALUE", help="handed on to tsgdn fit")

    mixers = questions.add_parser("mixers", help="cost and validation accuracy of all mixers and hybrids")
    mixers.add_argument("--mixers", help="names, comma-separated (all)")
    mixers.add_argument("--only", choices=["cost", "accuracy"], help="one of the two halves")
    mixers.add_argument("--tasks", default="etth1,m4_hourly", help="evaluation cells with a preset")
    mixers.add_argument("--seeds", default="0,1,2", help="numbers, comma-separated")
    mixers.add_argument("--depth", type=int, default=4, help="blocks; a hybrid needs one round of its mixers")
    mixers.add_argument("--width", type=int, default=64, help="of the tokens")
    mixers.add_argument("--state-bytes", type=int, help="per row and layer (those of the presets)")
    mixers.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where cost is measured")
    mixers.add_argument("--results", type=Path, default=Path("experiments/mixers/results.csv"), help="CSV to append to")
    mixers.add_argument("--root", type=Path, default=Path("runs/mixers"), help="folder of the fits")
    mixers.add_argument("--workers", type=int, default=1, help="fits at a time, one thread each")
    mixers.add_argument("--set", action="append", default=[], metavar="OPTION=VALUE", help="handed on to tsgdn fit")
    mixers.add_argument("--report", action="store_true", help="measure nothing: draw the pictures")

    kernels = questions.add_parser("kernels", help="time and memory of the kernels beside what else is installed")
    kernels.add_argument("--shapes", help="names, comma-separated, or what they begin with: S1,S8,D_64x64 (all)")
    kernels.add_argument("--contestants", help="names, comma-separated (all that are installed)")
    kernels.add_argument("--directions", help="of fwd,fwd+bwd,step,layer,layer+bwd (all)")
    kernels.add_argument("--norms", help="of none,qk: q and k divided by their length inside (both)")
    kernels.add_argument(
        "--results", type=Path, default=Path("experiments/kernels/results.csv"), help="CSV to append to"
    )
    kernels.add_argument("--resume", action="store_true", help="leave out what has rows of this commit and hardware")
    kernels.add_argument("--report", action="store_true", help="measure nothing: print the ratios, draw the pictures")
    kernels.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: small sizes, to see it run")
    kernels.add_argument("--seed", type=int, default=0, help="of the inputs")

    latency = questions.add_parser("latency", help="cost of an observation and a forecast, beside what else there is")
    latency.add_argument("--streams", default="1,64,1000,10000", help="numbers of series, comma-separated")
    latency.add_argument("--contestants", help="names, comma-separated (all that are installed)")
    latency.add_argument("--only", choices=["ours", "theirs"], help="one of the two halves")
    latency.add_argument("--horizon", type=int, default=24, help="steps of a forecast")
    latency.add_argument("--histories", default="1000,1000000", help="steps seen before: usual, and long for --flat")
    latency.add_argument("--flat", default="1", help="numbers of series for which the two are compared")
    latency.add_argument("--seconds", type=float, default=3.0, help="given to each kind of call")
    latency.add_argument("--compiled", action="store_true", help="single streams compiled too; wants a C++ compiler")

    online = questions.add_parser("online", help="accuracy along a stream, without a leak, beside persistence")
    online.add_argument("--tasks", help="names, comma-separated (all)")
    online.add_argument("--horizons", default="1,24,48", help="those of the protocol")
    online.add_argument("--mixers", default="gated_deltanet,mamba2", help="names, comma-separated")
    online.add_argument("--seeds", default="0,1,2", help="numbers, comma-separated")
    online.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where models are fitted and streamed")
    online.add_argument("--workers", type=int, default=1, help="fits at a time, one thread each")
    online.add_argument("--set", action="append", default=[], metavar="OPTION=VALUE", help="over the task's recipe")
    online.add_argument(
        "--results", type=Path, default=Path("experiments/streaming/online_results.csv"), help="CSV to append to"
    )
    online.add_argument("--root", type=Path, default=Path("runs/online"), help="folder of the fits")
    online.add_argument("--report", action="store_true", help="measure nothing: draw the pictures")

    memory = questions.add_parser("memory", help="bytes per series, and whether they grow over many observations")
    memory.add_argument("--streams", default="1000,10000,50000", help="growing numbers of series, comma-separated")
    memory.add_argument("--soak", type=int, default=1_000_000, help="observations of the soak; 0 = none")
    memory.add_argument("--soak-streams", type=int, default=1000, help="series of the soak")

    _retention_arguments(questions.add_parser("retention", help="what a state keeps of a rarely seen regime"))

    for each in (latency, memory):
        each.add_argument("--mixers", default="gated_deltanet", help="names, comma-separated")
        each.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where states live")
        each.add_argument("--threads", type=int, help="of torch (all cores)")
        each.add_argument("--seed", type=int, default=0, help="of weights and values")
        each.add_argument(
            "--results", type=Path, default=Path("experiments/streaming/results.csv"), help="CSV to append to"
        )
        each.add_argument(
            "--resume", action="store_true", help="leave out what has rows of this commit, hardware and options"
        )


def _retention_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", choices=["smoke", "paper"], default="smoke", help="smoke: minutes, not evidence")
    parser.add_argument("--tasks", help="of T1 to T9, T2e, T9b, comma-separated (those of the preset)")
    parser.add_argument("--mixers", help="names, comma-separated (those of the preset)")
    parser.add_argument("--state-bytes", metavar="KIB", help="KiB of state per layer: 1, 4, 16, 64 (the preset's)")
    parser.add_argument("--seeds", type=int, metavar="N", help="report seeds 0 to N-1 (the preset's)")
    parser.add_argument("--steps", type=int, metavar="N", help="training steps, for all mixers alike (the preset's)")
    parser.add_argument("--out", type=Path, help="folder that holds all, to go on from (runs/retention-PRESET)")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="stop in time; the same command goes on")
    parser.add_argument("--plan", action="store_true", help="time some steps, print cells and pieces, train nothing")
    parser.add_argument("--shard", default="1/1", metavar="I/N", help="the I-th of N parts of the plan")
    parser.add_argument("--replicas", type=int, default=16, metavar="N", help="most trainings side by side")
    parser.add_argument("--workers", type=int, metavar="N", help="processes that make data (GPU: all cores; CPU: none)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where models are trained")
    parser.add_argument("--real", action="store_true", help="measured series instead: errors when a regime returns")
    parser.add_argument("--sets", help="of --real: vic_elec, metro_traffic, pedestrian_melbourne, nab (all)")
    parser.add_argument("--epochs", type=int, default=12, help="of --real: at most, 50 steps each")
    parser.add_argument("--model", type=Path, metavar="DIR", help="a fitted model instead: writes its retention card")
    parser.add_argument("--json", action="store_true", help="print counts and paths as JSON")


def run(args: argparse.Namespace) -> int:
    """Measures what has no rows yet; exit 1 if a cell failed."""
    questions = {"kernels": _kernels, "mixers": _mixers, "gluonts": _gluonts, "latency": _latency, "memory": _memory}
    questions["online"] = _online
    questions["retention"] = _retention
    return questions[args.question](args)


def _online(args: argparse.Namespace) -> int:
    import torch

    from tsgdn.bench import online, online_plot
    from tsgdn.bench.mixers import systems
    from tsgdn.data.catalog import DataNotFound, online_tasks

    tasks = _chosen("--tasks", args.tasks, tuple(online_tasks()))
    horizons = sorted(set(_numbers("--horizons", args.horizons)))
    if args.report:
        found = online_plot.plot(args.root, tasks, args.results.parent, horizons)
        if not found:
            raise Misuse(f"--root {args.root}: no streams to draw; measure them first")
        for path in found:
            print(f"picture: {path}", file=sys.stderr)
        return 0
    mixers, seeds = _chosen("--mixers", args.mixers, systems()), _seeds(args.seeds)
    _workers(args.workers)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise Misuse("there is no CUDA device to fit on; leave --device out")
    given = {"results": args.results, "root": args.root, "horizons": horizons, "device": args.device}
    try:
        failed = online.run(tasks, mixers, seeds, workers=args.workers, options=args.set, **given)
    except (DataNotFound, ValueError) as error:
        raise Misuse(str(error)) from error
    return 1 if failed else 0


def _gluonts(args: argparse.Namespace) -> int:
    from tsgdn.bench import gluonts
    from tsgdn.bench.mixers import systems
    from tsgdn.data.catalog import DataNotFound

    tasks, mixers, seeds = _tasks(args.tasks), _chosen("--mixers", args.mixers, systems()), _seeds(args.seeds)
    _workers(args.workers)
    options = [f"--{text.lstrip('-')}" for text in args.set]
    try:
        failed = gluonts.run(
            tasks, mixers, seeds, results=args.results, root=args.root, workers=args.workers, options=options
        )
    except DataNotFound as error:
        raise Misuse(str(error)) from error
    return 1 if failed else 0


def _mixers(args: argparse.Namespace) -> int:
    import torch

    from tsgdn.bench import mixers
    from tsgdn.bench.fits import Sizes
    from tsgdn.bench.matching import STATE_BYTES, matched
    from tsgdn.data.catalog import DataNotFound

    if args.report:
        found = mixers.plot(args.results)
        if not found:
            raise Misuse(f"--results {args.results}: no scores to draw; measure them first")
        for path in found:
            print(f"picture: {path}", file=sys.stderr)
        return 0
    names, tasks, seeds = _chosen("--mixers", args.mixers, mixers.systems()), _tasks(args.tasks), _seeds(args.seeds)
    _workers(args.workers)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise Misuse("there is no CUDA device to measure on; leave --device out")
    sizes = Sizes(args.width, args.depth, STATE_BYTES if args.state_bytes is None else args.state_bytes)
    for name in names:
        try:
            matched(name, width=sizes.width, depth=sizes.depth, state_bytes=sizes.state_bytes)
        except ValueError as error:
            raise Misuse(f"{name} cannot have these sizes: {error}") from error
    failed = 0
    if args.only != "accuracy":
        failed += mixers.cost(names, sizes=sizes, results=args.results, device=args.device)
    if args.only != "cost":
        options = [f"--{text.lstrip('-')}" for text in args.set]
        given = {"results": args.results, "root": args.root, "workers": args.workers, "options": options}
        try:
            failed += mixers.accuracy(tasks, names, seeds, sizes=sizes, **given)
        except DataNotFound as error:
            raise Misuse(str(error)) from error
    return 1 if failed else 0


def _tasks(text: str) -> list[str]:
    from tsgdn.cli.train import presets
    from tsgdn.data.catalog import tasks as evaluation_cells

    both = [name for name in presets() if name in evaluation_cells()]
    for name in text.split(","):
        if name not in both:
            raise Misuse(f"--tasks {name}: expected evaluation cells that have a preset, of {', '.join(both)}")
    return text.split(",")


def _seeds(text: str) -> list[int]:
    try:
        return [int(seed) for seed in text.split(",")]
    except ValueError:
        raise Misuse(f"--seeds {text}: expected whole numbers, as in 0,1,2") from None


def _workers(number: int) -> None:
    if number < 1:
        raise Misuse(f"--workers {number}: expected at least 1")


def _kernels(args: argparse.Namespace) -> int:
    import torch

    from tsgdn.bench import kernels

    if args.report:
        table = kernels.report(args.results)
        if not table:
            raise Misuse(f"--results {args.results}: no times of tsgdn and another contestant; measure them first")
        print(table)
        for path in kernels.plot(args.results):
            print(f"picture: {path}", file=sys.stderr)
        return 0
    shapes = list(kernels.SHAPES.values())
    if args.shapes is not None:
        wanted = {text: kernels.named(text) for text in args.shapes.split(",")}
        for text, found in wanted.items():
            if not found:
                raise Misuse(f"--shapes {text}: expected some of {', '.join(kernels.SHAPES)}")
        shapes = list(dict.fromkeys(shape for found in wanted.values() for shape in found))
    contestants = _chosen("--contestants", args.contestants, tuple(kernels.CONTESTANTS))
    directions = _chosen("--directions", args.directions, kernels.DIRECTIONS)
    norms = _chosen("--norms", args.norms, kernels.NORMS)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise Misuse("there is no CUDA device to measure on; --device cpu runs small sizes, to see that it works")
    failed = kernels.run(
        shapes,
        contestants,
        directions,
        norms,
        results=args.results,
        device=args.device,
        seed=args.seed,
        resume=args.resume,
    )
    return 1 if failed else 0


def _latency(args: argparse.Namespace) -> int:
    from tsgdn.bench import latency

    mixers = _streaming_mixers(args)
    contestants = _chosen("--contestants", args.contestants, tuple(latency.CONTESTANTS))
    streams, flat = _numbers("--streams", args.streams), _numbers("--flat", args.flat)
    histories = _numbers("--histories", args.histories)
    if len(histories) != 2 or histories[0] >= histories[1]:
        raise Misuse(f"--histories {args.histories}: expected a short and a long one, as in 1000,1000000")
    _at_least_one("--horizon", args.horizon)
    if not args.seconds >= 0:
        raise Misuse(f"--seconds {args.seconds}: expected 0 or more")
    options = latency.Options(
        horizon=args.horizon,
        histories=(histories[0], histories[1]),
        flat=tuple(flat),
        seconds=args.seconds,
        threads=_threads(args),
        device=args.device,
        seed=args.seed,
        compiled=args.compiled,
    )
    failed = latency.run(
        [] if args.only == "theirs" else mixers,
        [] if args.only == "ours" else contestants,
        streams,
        results=args.results,
        options=options,
        resume=args.resume,
    )
    return 1 if failed else 0


def _memory(args: argparse.Namespace) -> int:
    from tsgdn.bench import memory

    mixers, streams = _streaming_mixers(args), _numbers("--streams", args.streams)
    if streams != sorted(set(streams)):
        raise Misuse(f"--streams {args.streams}: expected growing numbers")
    if args.soak < 0:
        raise Misuse(f"--soak {args.soak}: expected a number of observations, or 0 for none")
    _at_least_one("--soak-streams", args.soak_streams)
    failed = memory.run(
        mixers,
        streams,
        results=args.results,
        observations=args.soak,
        soak_streams=args.soak_streams,
        threads=_threads(args),
        device=args.device,
        seed=args.seed,
        resume=args.resume,
    )
    return 1 if failed else 0


def _retention_card(args: argparse.Namespace) -> int:
    import json

    from tsgdn.bench.retention import card
    from tsgdn.model.artefact import ArtefactError

    try:
        path = card.write(args.model, args.out or args.model)
    except (ArtefactError, FileNotFoundError) as error:
        raise Misuse(f"--model {args.model}: {error}") from error
    numbers = json.loads((path.parent / "retention_card.json").read_text("utf-8"))
    print(json.dumps({"card": str(path), **numbers}) if args.json else path)
    return 0


def _retention_real(args: argparse.Namespace) -> int:
    import json

    from tsgdn.bench.matching import matched
    from tsgdn.bench.retention import real, run
    from tsgdn.data.catalog import DataNotFound
    from tsgdn.mixers import MIXERS
    from tsgdn.model.backbone import BACKBONES

    sets = _chosen("--sets", args.sets, real.SETS)
    mixers = _chosen("--mixers", args.mixers or "gated_deltanet,mamba2", (*MIXERS, *BACKBONES))
    _at_least_one("--epochs", args.epochs)
    for mixer in mixers:
        try:
            matched(mixer, width=64, depth=3)
        except ValueError as error:
            raise Misuse(str(error)) from error
    out = args.out or Path("runs/retention-real")
    given = {"out": out, "device": args.device, "budget": args.budget, "epochs": args.epochs}
    try:
        done = run.run_real(sets, mixers, args.seeds or 1, **given)
    except DataNotFound as error:
        raise Misuse(str(error)) from error
    if args.json:
        print(json.dumps(done))
    elif done["report"]:
        print(done["report"])
    return 1 if done["failed"] else 0


def _retention(args: argparse.Namespace) -> int:
    import json
    import os

    import torch

    from tsgdn.bench.matching import regime_sizes
    from tsgdn.bench.retention import cells, run
    from tsgdn.data.retention import TASKS
    from tsgdn.mixers import MIXERS
    from tsgdn.model.backbone import BACKBONES

    tasks = None if args.tasks is None else _chosen("--tasks", args.tasks, tuple(TASKS))
    mixers = None if args.mixers is None else _chosen("--mixers", args.mixers, (*MIXERS, *BACKBONES))
    sizes = None if args.state_bytes is None else _numbers("--state-bytes", args.state_bytes)
    for option, number in (("--seeds", args.seeds), ("--steps", args.steps), ("--replicas", args.replicas)):
        if number is not None:
            _at_least_one(option, number)
    if args.budget is not None and not args.budget > 0:
        raise Misuse(f"--budget {args.budget:g}: expected seconds above 0")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise Misuse("there is no CUDA device to train on; leave --device out")
    if args.model is not None:
        return _retention_card(args)
    if args.real:
        return _retention_real(args)
    preset = cells.with_steps(cells.PRESETS[args.preset], args.steps)
    entries = cells.plan(preset, tasks=tasks, mixers=mixers, sizes=sizes, seeds=args.seeds, shard=_shard(args.shard))
    for unit in dict.fromkeys(entry.unit for entry in entries):
        try:
            regime_sizes(unit.mixer, state_kib=unit.state_kib, depth=unit.depth, init=unit.init)
        except ValueError as error:
            raise Misuse(str(error)) from error
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = args.workers if args.workers is not None else cores if args.device == "cuda" else 0
    out = args.out or Path("runs") / f"retention-{args.preset}"
    options = run.Options(preset, entries, out, args.device, args.budget, workers, args.replicas)
    if args.plan:
        found = run.estimate(options)
        print(json.dumps(found) if args.json else run.table(found))
        return 0
    done = run.run(options)
    if args.json:
        print(json.dumps(done))
    elif done["report"]:
        print(done["report"])
    return 1 if done["failed"] or done["checks_failed"] else 0


def _shard(text: str) -> tuple[int, int]:
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
        raise Misuse(f"--shard {text}: expected I/N with I from 1 to N, as in 2/4")
    return int(part) - 1, int(parts)


def _streaming_mixers(args: argparse.Namespace) -> list[str]:
    import torch

    from tsgdn.bench.latency import predictor
    from tsgdn.mixers import MIXERS
    from tsgdn.model.backbone import BACKBONES

    mixers = _chosen("--mixers", args.mixers, (*MIXERS, *BACKBONES))
    if args.device == "cuda" and not torch.cuda.is_available():
        raise Misuse("there is no CUDA device to measure on; leave --device out")
    for name in mixers:
        try:
            predictor(name)
        except ValueError as error:
            raise Misuse(f"--mixers {name}: {error}") from error
    return mixers


def _threads(args: argparse.Namespace) -> int:
    from tsgdn.bench.latency import cores

    if args.threads is None:
        return cores()
    _at_least_one("--threads", args.threads)
    return args.threads


def _numbers(option: str, text: str) -> list[int]:
    numbers = [int(part) for part in text.split(",") if part.isdecimal()]
    if len(numbers) != len(text.split(",")) or not all(numbers):
        raise Misuse(f"{option} {text}: expected whole numbers from 1, as in 1,64,1000")
    return numbers


def _at_least_one(option: str, number: int) -> None:
    if number < 1:
        raise Misuse(f"{option} {number}: expected at least 1")


def _chosen(option: str, text: str | None, known: Sequence[str]) -> list[str]:
    names = list(known) if text is None else text.split(",")
    for name in names:
        if name not in known:
            raise Misuse(f"{option} {name}: expected some of {', '.join(known)}")
    return names
