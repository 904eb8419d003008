"""`tsgdn demo`: the whole path once. Fit, evaluate on the test windows with pictures, stream the test part, compare."""

import argparse
import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Any

from tsgdn.cli.main import Misuse

STREAMED_SERIES = 8
STREAMED_STEPS = 336


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `tsgdn demo`."""
    parser.add_argument("--dataset", default="simulated", help="a data set of `tsgdn data list` (default: simulated)")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for everything that it writes")
    parser.add_argument("--seed", type=int, default=0, help="of the fit")
    parser.add_argument("--epochs", type=int, default=None, help="fewer or more than the preset's")
    parser.add_argument("--json", action="store_true", help="the summary as JSON")


def run(args: argparse.Namespace) -> int:
    """Exit 1 where the stream and the parallel pass disagree."""
    begin = time.perf_counter()
    if args.epochs is not None and args.epochs < 1:
        raise Misuse(f"--epochs {args.epochs}: expected at least 1")
    if args.out.exists() and not args.out.is_dir():
        raise Misuse(f"--out {args.out} is a file; give a folder")
    task = _task(args.dataset)
    _say("1/3", f"fitting a Gated DeltaNet forecaster on {task.name} ({task.horizon} steps of {task.freq} ahead)")
    folder = _fit(args)
    _say("2/3", "evaluating through GluonTS, beside seasonal naive and persistence")
    scores, files = _evaluate(folder, task, args.out / "evaluation")
    _say("3/3", "streaming the test part, observation by observation, and comparing with the parallel pass")
    live = _stream(folder, task)
    summary = {
        "dataset": task.name,
        "horizon": task.horizon,
        "scores": scores,
        "stream": live,
        "seconds": round(time.perf_counter() - begin, 1),
        "wrote": [str(folder), *files, str(args.out / "summary.json")],
    }
    (args.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(json.dumps(summary) if args.json else _text(summary))
    return 0 if live["parity_error"] <= live["parity_bound"] else 1


def _task(name: str) -> Any:
    from tsgdn.data.catalog import DataNotFound
    from tsgdn.data.module import find_task

    try:
        task = find_task(name)
        task.series()
    except KeyError as error:
        raise Misuse(f"--dataset {name}: {error.args[0]}") from error
    except DataNotFound as error:
        raise Misuse(f"{error} (without --dataset the demo simulates its own data)") from error
    return task


def _fit(args: argparse.Namespace) -> Path:
    from tsgdn.cli import train

    folder = args.out / "model"
    options = ["--data.dataset", args.dataset, "--seed_everything", str(args.seed), "--export", str(folder)]
    options += ["--trainer.default_root_dir", str(args.out / "fit")]
    if args.epochs is not None:
        options += ["--trainer.max_epochs", str(args.epochs)]
    code = train.main(["fit", "--config", "demo", *options])
    if code:
        raise SystemExit(code)
    return folder


def _evaluate(folder: Path, task: Any, out: Path) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """`tsgdn evaluate`: the scores by forecaster, the model's as GluonTS computes them, and the files it wrote."""
    from tsgdn.cli import evaluate

    parser = argparse.ArgumentParser()
    evaluate.add_arguments(parser)
    options = parser.parse_args(["--model", str(folder), "--dataset", task.name, "--out", str(out)])
    with contextlib.redirect_stdout(sys.stderr):
        code = evaluate.run(options)
    if code:  # it has said why
        raise SystemExit(code)
    found = json.loads((out / "scores.json").read_text())
    return {row["forecaster"]: {**row, **row.pop("gluonts", {})} for row in found["rows"]}, found["files"]


def _stream(folder: Path, task: Any) -> dict[str, Any]:
    """Prequential scores of a live stream, its speed, and its distance to the parallel pass."""
    import numpy as np
    from tqdm import tqdm

    from tsgdn.evaluation.prequential import RunningScores, RunningSeasonalError
    from tsgdn.streaming.predictor import StatefulPredictor
    from tsgdn.streaming.replay import replay

    series = task.series()[:STREAMED_SERIES]
    warm = {one.item_id: max(len(one) + task.first_origin, len(one) - STREAMED_STEPS, 1) for one in series}
    predictor = StatefulPredictor.from_pretrained(folder)
    scores = RunningScores(levels=predictor.model.quantile_levels, horizon=task.horizon)
    errors = {}
    for one in series:
        errors[one.item_id] = RunningSeasonalError(variates=1, seasonality=task.seasonality)
        errors[one.item_id].observe(one.values[:, : warm[one.item_id]])
    steps = max(len(one) - warm[one.item_id] for one in series)
    begin = time.perf_counter()
    moments = replay(predictor, series, task.horizon, every=1, warm_up=warm)
    for moment in tqdm(moments, total=steps, desc="stream", unit="step", file=sys.stderr, disable=None):
        for item, origin, values, truth in zip(
            moment.forecast.item_ids, moment.origin, moment.forecast.values, moment.truth, strict=True
        ):
            scores.update(origin, values, truth, past_error=errors[item].value)
            errors[item].observe(truth[:, :1])
    seconds = time.perf_counter() - begin
    observed = sum(len(one) - warm[one.item_id] for one in series)

    # the same stream without forecasts in between
    quick = predictor.fork([])
    quick.warm_up([one.slice(0, warm[one.item_id]) for one in series])
    begin = time.perf_counter()
    stamps = {one.item_id: one.timestamps for one in series}
    shared = min(len(one) - warm[one.item_id] for one in series)
    ids = np.array([one.item_id for one in series])
    for step in range(shared):
        times = np.array([stamps[one.item_id][warm[one.item_id] + step] for one in series])
        quick.observe((ids, times, np.array([one.values[0, warm[one.item_id] + step] for one in series])))
    rate = shared * len(series) / max(time.perf_counter() - begin, 1e-9)

    parity = predictor.verify([one.slice(0, min(len(one), 400)) for one in series[:2]])
    return {
        "series": len(series),
        "observations": observed,
        "forecasts": scores.n,
        **{name: round(value, 5) for name, value in scores.overall.items()},
        "seconds": round(seconds, 1),
        "observations_per_second": round(rate),
        "state_bytes_per_series": predictor.nbytes_per_series,
        "parity_error": parity.error,
        "parity_bound": parity.rtol,
    }


def _text(summary: dict[str, Any]) -> str:
    live = summary["stream"]
    lines = [
        "",
        f"{summary['dataset']}, {summary['horizon']} steps ahead, scored by GluonTS",
        f"  {'':16} {'WQL':>9} {'MASE':>9} {'ND':>9} {'80% band':>9}",
    ]
    for name, scores in summary["scores"].items():
        band = f"{scores['coverage80']:>9.1%}" if name == "model" else f"{'-':>9}"
        lines.append(
            f"  {name.replace('_', ' '):16} {scores['wql']:>9.5f} {scores['mase']:>9.4f} {scores['nd']:>9.5f} {band}"
        )
    lines += [
        "",
        f"streamed {live['observations']:,} observations of {live['series']} series, a forecast after each",
        f"  prequential       WQL {live['wql']:.5f}, MASE {live['mase']:.4f}, 80% band covers {live['coverage']:.1%}",
        f"  stream = batch    largest difference {live['parity_error']:.1e} of the scale, at most "
        f"{live['parity_bound']:.0e} allowed",
        f"  speed             {live['observations_per_second']:,} observations per second, {live['series']} at a time",
        f"  state             {live['state_bytes_per_series']:,} bytes per series, however long its history",
        "",
        f"wrote in {summary['seconds']:.0f} s",
        *(f"  {path}" for path in summary["wrote"]),
    ]
    return "\n".join(lines)


def _say(step: str, text: str) -> None:
    print(f"[{step}] {text}", file=sys.stderr, flush=True)
