"""`tsgdn export`: a checkpoint becomes a folder that streams. `tsgdn verify`: its streams equal one pass."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from tsgdn.cli.main import Misuse
from tsgdn.data import catalog
from tsgdn.data.module import find_task
from tsgdn.data.series import Series
from tsgdn.model.artefact import ArtefactError, load, read_series_info, save
from tsgdn.model.forecaster import Forecaster
from tsgdn.streaming import certificate
from tsgdn.streaming.certificate import Certificate, Check
from tsgdn.streaming.predictor import StatefulPredictor


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `tsgdn export`."""
    parser.add_argument("checkpoint", type=Path, help="a .ckpt that `tsgdn fit` wrote")
    parser.add_argument("--output", type=Path, required=True, help="folder to write; created where missing")
    parser.add_argument("--json", action="store_true", help="print what was written as JSON")


def run_export(args: argparse.Namespace) -> int:
    """Writes the averaged weights of a checkpoint and what rebuilds the model."""
    model, series = from_checkpoint(args.checkpoint)
    folder = save_certified(model, args.output, series)
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
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto: both where both are there")
    parser.add_argument("--long", action="store_true", help="histories of 1,000 and 4,096 steps too; takes minutes")
    parser.add_argument("--write", action="store_true", help="put the certificate beside the weights, as parity.json")
    parser.add_argument("--dataset", help="catalogued series to stream as well")
    parser.add_argument("--series", type=int, default=2, help="how many of them (default 2)")
    parser.add_argument("--steps", type=int, default=300, help="the last so many of each (default 300)")
    parser.add_argument("--origins", type=int, default=8, help="forecasts that are compared, per series (default 8)")
    parser.add_argument("--rtol", type=float, default=1e-5, help="their bound, in units of the scale (default 1e-5)")
    parser.add_argument("--seed", type=int, default=0, help="of the simulated values and the random cuts")
    parser.add_argument("--json", action="store_true", help="print the certificate as JSON")


def run_verify(args: argparse.Namespace) -> int:
    """Tries cuts, silence, the live predictor and its copies against one pass; 1 when a bound is broken."""
    if min(args.series, args.steps, args.origins) < 1:
        raise Misuse("--series, --steps and --origins must be at least 1")
    if not args.rtol > 0:
        raise Misuse(f"--rtol is {args.rtol}, expected a positive number such as 1e-5")
    devices = ("cpu", *(["cuda"] if torch.cuda.is_available() else [])) if args.device == "auto" else (args.device,)
    try:
        # not from_pretrained, which refuses the certificate that is to be made anew
        model, info = load(args.model, device=devices[-1]), read_series_info(args.model)
        kind = kind_of(info)
        series = catalogued(args.dataset, args.series, args.steps, len(kind["variates"])) if args.dataset else []
        found = certificate_of(model, kind, devices=devices, long=args.long, seed=args.seed)
        report = (
            StatefulPredictor(model, **kind).verify(series, origins=args.origins, rtol=args.rtol) if series else None
        )
    except (ArtefactError, ValueError) as error:
        raise Misuse(str(error)) from error
    if report is not None:
        if not report.forecasts:
            raise Misuse(f"no step of {args.dataset} could be compared; give another --dataset or more --steps")
        item, origin = report.worst
        where = f"{item!r} after {origin} steps"
        check = Check(f"series of {args.dataset}", "float32", devices[-1], "", report.error, report.rtol, where)
        found = found._replace(checks=(*found.checks, check))
    if args.write:
        certificate.write(found, args.model)
    if args.json:
        print(json.dumps(json.loads(found.to_json())))
    else:
        for check in found.checks:
            kernel = f", {check.kernel}" if check.kernel else ""
            verdict = "ok" if check.ok else "BROKEN"
            told = f"{check.part} ({check.dtype} on {check.device}{kernel})"
            print(f"{told:44} {check.error:9.1e}  bound {check.bound:.0e}  {verdict}")
    for check in found.checks:
        if not check.ok:
            text = f"{check.part}, {check.dtype} on {check.device}: {check.error:.1e}, bound {check.bound:.0e}"
            print(f"tsgdn verify: {text}; the worst is {check.worst}", file=sys.stderr)
    return 0 if found.ok else 1


def kind_of(info: dict[str, Any]) -> dict[str, Any]:
    """What a model's folder says of its series, as `StatefulPredictor` and `certificate.certify` take it.

    Raises:
        ArtefactError: it does not say what frequency the model is for.
    """
    if info.get("freq") is None:
        raise ArtefactError("the model does not say what frequency it is for; export it again from its checkpoint")
    variates = tuple(info.get("variates") or ("target",))
    kind = {"freq": info["freq"], "calendar": bool(info.get("calendar")), "variates": variates}
    return {**kind, "targets": info.get("targets")}


def certificate_of(
    model: Forecaster, kind: dict[str, Any], *, devices: Sequence[str] = ("cpu",), long: bool = False, seed: int = 0
) -> Certificate:
    """What `certificate.certify` finds for a model of series of that kind; tells its progress."""
    with tqdm(desc="verify", unit="part", file=sys.stderr, disable=None, leave=False) as bar:

        def progress(part: str) -> None:
            bar.set_postfix_str(part)
            bar.update()

        return certificate.certify(model, **kind, devices=devices, long=long, seed=seed, progress=progress)


def save_certified(model: Forecaster, folder: Path, info: dict[str, Any]) -> Path:
    """The model's folder with `parity.json` in it.

    A broken bound is said on stderr and stands in the file: what was fitted is not lost for it.
    """
    save(model, folder, series=info)
    if not model.backbone.bounded:  # nothing streams it
        return folder
    found = certificate_of(model, kind_of(info))
    certificate.write(found, folder)
    broken = [check for check in found.checks if not check.ok]
    if broken:
        print(
            f"tsgdn: {folder}: a stream of this model differs from one pass ({broken[0].part}, {broken[0].dtype}: "
            f"{broken[0].error:.1e}); see {folder / certificate.FILE}",
            file=sys.stderr,
        )
    return folder


def catalogued(name: str, count: int, steps: int, variates: int) -> list[Series]:
    """The ends of the first series of a data set."""
    try:
        whole = find_task(name).series(multivariate=variates > 1)
    except KeyError as error:
        raise Misuse(str(error.args[0])) from error
    except (catalog.DataNotFound, ValueError) as error:
        raise Misuse(str(error)) from error
    return [one.slice(max(0, len(one) - steps)) for one in whole[:count]]
