"""A model on disk: config.json, model.safetensors, README.md. Reading one executes nothing.

config.json holds the arguments of `Forecaster` and what the series are (frequency, calendar, variates); the weights are
safetensors. Both are read as data: no pickle, no class path, no address.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from tsgdn.model.forecaster import Forecaster

FORMAT = 1
CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
CONFIG_LIMIT = 1 << 20


class ArtefactError(ValueError):
    """The folder is not a model that can be read; the message says what is wrong with it."""


def save(model: Forecaster, folder: str | Path, *, series: dict[str, Any] | None = None) -> Path:
    """Writes the model. Files are replaced whole; a crash between them leaves a folder that `load` refuses.

    Args:
        model: its weights are stored as they are.
        folder: created where missing.
        series: what the model forecasts: "freq", "calendar", "variates", "horizon", "dataset" and plain notes.

    Returns:
        The folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = save_tensors({name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()})
    config = {"format": FORMAT, "model": model.config, "series": dict(series or {}), "sha256": _sha256(weights)}
    text = json.dumps(config, indent=1, sort_keys=True) + "\n"  # fails, if it does, before anything is written
    write_whole(folder / WEIGHTS, weights)
    write_whole(folder / CONFIG, text.encode())
    write_whole(folder / CARD, _card(model, config["series"]).encode())
    return folder


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file so that a crash at any moment leaves the old one or the new one, never a part."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def load(folder: str | Path, *, device: torch.device | str = "cpu") -> Forecaster:
    """Reads a model that `save` wrote, in evaluation mode.

    Raises:
        ArtefactError: files are missing or broken, of a newer format, do not fit each other, or hold NaN; or there is
            no such device.
    """
    folder = Path(folder)
    config = _read_config(folder)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # a CPU build asserts
        raise ArtefactError(f"device {str(device)!r} is not available here: {error}") from None
    try:
        weights = (folder / WEIGHTS).read_bytes()
        tensors = load_tensors(weights)
    except (OSError, SafetensorError) as error:
        raise ArtefactError(f"{folder / WEIGHTS} cannot be read as safetensors: {error}") from error
    if config.get("sha256", _sha256(weights)) != _sha256(weights):
        raise ArtefactError(f"{folder}: {WEIGHTS} is not the file that {CONFIG} was written with; export it again")
    try:
        model = Forecaster(**config["model"])
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ArtefactError(f"{folder / CONFIG} describes no model: {error}") from error
    differing = _differences(model.state_dict(), tensors)
    if differing:
        raise ArtefactError(f"{folder}: weights and {CONFIG} do not fit each other: {'; '.join(differing[:3])}")
    bad = [name for name, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if bad:
        raise ArtefactError(f"{folder}: {bad[0]} holds NaN or infinity; fit the model again")
    model.load_state_dict(tensors)
    return model.to(device).eval()


def _differences(wanted: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> list[str]:
    """Where tensors do not have the names, shapes and types that a model wants."""

    def said(tensor: torch.Tensor | None) -> str:
        return "nothing" if tensor is None else f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"

    pairs = ((name, said(wanted.get(name)), said(found.get(name))) for name in sorted(wanted.keys() | found.keys()))
    return [f"{name} is {is_}, expected {should}" for name, should, is_ in pairs if is_ != should]


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def read_series_info(folder: str | Path) -> dict[str, Any]:
    """What the model forecasts, as given to `save`.

    Raises:
        ArtefactError: see `load`.
    """
    return _read_config(Path(folder))["series"]


def fingerprint(model: Forecaster) -> str:
    """32 hexadecimal digits of the configuration and all weights: states belong to one model."""
    digest = hashlib.blake2b(json.dumps(model.config, sort_keys=True).encode(), digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not folder.is_dir() or not path.is_file():
        raise ArtefactError(
            f"{folder} holds no model: expected a folder with {CONFIG} and {WEIGHTS}, as `tsgdn fit` writes"
        )
    if path.stat().st_size > CONFIG_LIMIT:
        raise ArtefactError(f"{path} has {path.stat().st_size} bytes; a configuration has at most {CONFIG_LIMIT}")
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ArtefactError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("model"), dict):
        raise ArtefactError(f"{path} has no section 'model'; was it written by `tsgdn fit`?")
    if config.get("format") != FORMAT:
        raise ArtefactError(f"{path} has format {config.get('format')!r}, this version reads {FORMAT}; update tsgdn")
    unknown = sorted(config.keys() - {"format", "model", "series", "sha256"})
    if unknown:
        raise ArtefactError(f"{path} has an unknown section {unknown[0]!r}; update tsgdn")
    config.setdefault("series", {})
    kinds = {"freq": str, "calendar": bool, "variates": list, "horizon": int}
    if not isinstance(config["series"], dict):
        raise ArtefactError(f"{path}: section 'series' is a {type(config['series']).__name__}, expected an object")
    for name, kind in kinds.items():
        value = config["series"].get(name)
        if value is not None and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):
            raise ArtefactError(f"{path}: series.{name} is {value!r:.60}, expected {kind.__name__}")
    if not all(isinstance(name, str) for name in config["series"].get("variates") or ()):
        raise ArtefactError(f"{path}: series.variates are {config['series']['variates']!r:.60}, expected texts")
    return config


def _card(model: Forecaster, series: dict[str, Any]) -> str:
    parameters = sum(p.numel() for p in model.parameters())
    levels = model.quantile_levels
    lines = [
        "# A tsgdn forecaster",
        "",
        f"{parameters:,} parameters; mixer `{model.config['mixer']}`,"
        f" {model.config['depth']} blocks of width {model.width}.",
        f"Tokens of {model.patch_size} steps; {model.direct_steps} steps are forecast in one pass, more by roll-out.",
        f"{len(levels)} quantile levels from {levels[0]} to {levels[-1]}; seasons {list(model.seasons)}.",
        "",
        *(f"- {key}: {value}" for key, value in sorted(series.items())),
        "",
        "```python",
        "from tsgdn import StatefulPredictor",
        'predictor = StatefulPredictor.from_pretrained("this folder")',
        "```",
        "",
    ]
    return "\n".join(lines)
