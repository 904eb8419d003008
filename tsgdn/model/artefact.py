"""A model on disk: config.json, model.safetensors, README.md. Reading one executes nothing.

config.json holds the arguments of `Forecaster` and what the series are (frequency, calendar, variates); the weights are
safetensors. Both are read as data: no pickle, no class path, no address.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tsgdn.model.forecaster import Forecaster

FORMAT = 1
CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
CONFIG_LIMIT = 1 << 20


class ArtefactError(ValueError):
    """The folder is not a model that can be read; the message says what is wrong with it."""


def save(model: Forecaster, folder: str | Path, *, series: dict[str, Any] | None = None) -> Path:
    """Writes the model.

    Args:
        model: its weights are stored as they are.
        folder: created where missing.
        series: what the model forecasts: "freq", "calendar", "variates", "horizon", "dataset" and plain notes.

    Returns:
        The folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {"format": FORMAT, "model": model.config, "series": dict(series or {})}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
    (folder / CARD).write_text(_card(model, config["series"]))
    return folder


def load(folder: str | Path, *, device: torch.device | str = "cpu") -> Forecaster:
    """Reads a model that `save` wrote, in evaluation mode.

    Raises:
        ArtefactError: files are missing or broken, of a newer format, do not fit each other, or hold NaN.
    """
    folder = Path(folder)
    config = _read_config(folder)
    try:
        model = Forecaster(**config["model"])
    except (TypeError, ValueError) as error:
        raise ArtefactError(f"{folder / CONFIG}: {error}") from error
    try:
        tensors = load_file(folder / WEIGHTS, device=str(device))
    except (OSError, SafetensorError) as error:
        raise ArtefactError(f"{folder / WEIGHTS} cannot be read as safetensors: {error}") from error
    wanted = model.state_dict()
    differing = sorted(
        name
        for name in wanted.keys() | tensors.keys()
        if name not in wanted or name not in tensors or wanted[name].shape != tensors[name].shape
    )
    if differing:
        raise ArtefactError(f"{folder}: weights and config.json do not fit each other at {', '.join(differing[:3])}")
    bad = [name for name, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if bad:
        raise ArtefactError(f"{folder}: {bad[0]} holds NaN or infinity; fit the model again")
    model.load_state_dict(tensors)
    return model.to(device).eval()


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
        config = json.loads(path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ArtefactError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("model"), dict):
        raise ArtefactError(f"{path} has no section 'model'; was it written by `tsgdn fit`?")
    if config.get("format") != FORMAT:
        raise ArtefactError(f"{path} has format {config.get('format')!r}, this version reads {FORMAT}; update tsgdn")
    config.setdefault("series", {})
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
