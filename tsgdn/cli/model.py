"""`tsgdn export`: a checkpoint becomes a folder that streams. `tsgdn verify`: its stream equals its batch."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tsgdn.cli.main import Misuse
from tsgdn.data import catalog
from tsgdn.data.clock import clock
from tsgdn.data.module import find_task
from tsgdn.data.series import Series
from tsgdn.model.artefact import ArtefactError, read_series_info, save
from tsgdn.model.forecaster import Forecaster
from tsgdn.streaming.predictor import StatefulPredictor


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `tsgdn export`."""
    parser.add_argument("checkpoint", type=Path, help="a .ckpt that `tsgdn fit` wrote")
    parser.add_argument("--output", type=Path, required=True, help="folder to write; created where missing")
    parser.add_argument("--json", action="store_true", help="print what was written as JSON")


def run_export(args: argparse.Namespace) -> int:
    """Writes the averaged weights of a checkpoint and what rebuilds the model."""
    model, series = from_checkpoint(args.checkpoint)
    folder = save(model, args.output, series=series)
    parameters = sum(p.numel() for p in model.parameters())
    found = {"folder": str(folder), "parameters": parameters, "model": model.config, "series": series}
    print(json.dumps(found) if args.json else f"{folder}: {parameters:,} parameters, mixer {model.config['mixer']}")
    return 0


def from_checkpoint(path: Path) -> tuple[Forecaster, dict[str, Any]]:
    """The forecaster of a checkpoint, with its averaged weights, and what it says of the series.

    Raises:
        Misuse: the file is no checkpoint of ours.
    """
    checkpoint = read_checkpoint(path)
    plain = checkpoint["tsgdn"]
    try:
        model = Forecaster(**plain["model"])
        model.load_state_dict({k.removeprefix("model."): v for k, v in checkpoint["state_dict"].items()})
        return model.eval(), dict(plain["series"])
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        text = str(error).split("\n")[0]
        raise Misuse(f"{path} does not hold the model that it describes: {text}") from error


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What `tsgdn fit` wrote: weights, the state of the run, and under "tsgdn" what rebuilds the model.

    Raises:
        Misuse: the file is no checkpoint of ours.
    """
    if not path.is_file():
        raise Misuse(f"there is no checkpoint {path}; `tsgdn fit` writes one and prints its path")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)  # tensors and plain values, never code
    except Exception as error:  # torch raises many kinds, with advice that nobody should follow
        raise Misuse(f"{path} cannot be read as a checkpoint of tensors and plain values") from error
    plain = checkpoint.get("tsgdn") if isinstance(checkpoint, dict) else None
    if not isinstance(plain, dict) or plain.get("format") != 1 or not isinstance(plain.get("model"), dict):
        raise Misuse(f"{path} is not a checkpoint that this version of `tsgdn fit` wrote")
    return checkpoint


def add_verify_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `tsgdn verify`."""
    parser.add_argument("--model", type=Path, required=True, help="a folder that `tsgdn fit` or `tsgdn export` wrote")
    parser.add_argument("--dataset", help="catalogued series to stream (default: a simulated one of the model's kind)")
    parser.add_argument("--series", type=int, default=2, help="how many (default 2)")
    parser.add_argument("--steps", type=int, default=300, help="the last so many of each (default 300)")
    parser.add_argument("--origins", type=int, default=8, help="forecasts that are compared, per series (default 8)")
    parser.add_argument("--rtol", type=float, default=1e-5, help="bound, in units of the series' scale (default 1e-5)")
    parser.add_argument("--seed", type=int, default=0, help="of the simulated series")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run_verify(args: argparse.Namespace) -> int:
    """Streams series step by step and compares the forecasts with the batch's; 1 when they differ."""
    if min(args.series, args.steps, args.origins) < 1:
        raise Misuse("--series, --steps and --origins must be at least 1")
    if not args.rtol > 0:
        raise Misuse(f"--rtol is {args.rtol}, expected a positive number such as 1e-5")
    try:
        predictor = StatefulPredictor.from_pretrained(args.model, device=args.device)
        info = read_series_info(args.model)
    except (ArtefactError, ValueError) as error:
        raise Misuse(str(error)) from error
    series = (
        catalogued(args.dataset, args.series, args.steps, len(predictor.variates))
        if args.dataset
        else simulated(info, predictor.model, args.series, args.steps, args.seed)
    )
    try:
        report = predictor.verify(series, origins=args.origins, rtol=args.rtol)
    except ValueError as error:
        raise Misuse(str(error)) from error
    item, origin = report.worst
    verdict = "agree" if report.ok else "DIFFER"
    if args.json:
        print(json.dumps({"ok": report.ok, **report._asdict()}))
    else:
        print(f"stream and batch {verdict}: {report.forecasts} forecasts, largest difference {report.error:.2e} scales")
    if not report.forecasts:
        raise Misuse("no series has a step from which forecasts could be compared; give another --dataset or --steps")
    if not report.ok:
        print(
            f"tsgdn verify: the worst is {item!r} after {origin} steps; the bound is {report.rtol:g}", file=sys.stderr
        )
    return 0 if report.ok else 1


def catalogued(name: str, count: int, steps: int, variates: int) -> list[Series]:
    """The ends of the first series of a data set."""
    try:
        whole = find_task(name).series(multivariate=variates > 1)
    except KeyError as error:
        raise Misuse(str(error.args[0])) from error
    except (catalog.DataNotFound, ValueError) as error:
        raise Misuse(str(error)) from error
    return [one.slice(max(0, len(one) - steps)) for one in whole[:count]]


def simulated(info: dict[str, Any], model: Forecaster, count: int, steps: int, seed: int) -> list[Series]:
    """Random walks with a season and gaps, on the clock and with the variates of the model."""
    rng = np.random.default_rng(seed)
    rule = clock(info["freq"])
    variates = tuple(info.get("variates") or ("target",))
    user = model.known_features - (rule.calendar_size if info.get("calendar") else 0)
    days = (
        np.datetime64(day, "ns") for day in ("2023-01-02", "2023-01-01", "2022-12-31")
    )  # any, month start, month end
    start = next(day for day in days if rule.on_grid(day))
    out = []
    for i in range(count):
        season = np.sin(2 * np.pi * np.arange(steps) / max(model.seasons[-1], 2))
        values = 100 + 5 * season + np.cumsum(rng.normal(size=(len(variates), steps)), axis=1)
        values[rng.random(values.shape) < 0.05] = np.nan
        known = rng.normal(size=(user, steps + model.span)) if user > 0 else None
        out.append(Series(f"simulated-{i}", start, rule.freq, values, known=known, variates=variates))
    return out
