"""States in a folder: one safetensors file, one JSON header that names and signs it.

The header is replaced atomically and names the tensor file by its digest, so that a crash at any moment leaves either
the old snapshot or the new one. Loading reads tensors and plain JSON only; it refuses, by name, a snapshot of another
model, of a newer format, or one in which a bit has changed.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from tsgdn.model.artefact import write_whole

FORMAT = 1
HEADER = "header.json"


class SnapshotRefused(ValueError):
    """A snapshot that must not be used; the text says why."""


def exists(folder: str | Path) -> bool:
    """Whether a snapshot was written there."""
    return (Path(folder) / HEADER).is_file()


def write(folder: str | Path, tensors: dict[str, Tensor], header: dict[str, Any], *, model: str) -> None:
    """Writes a snapshot; the one before stays current until this one is whole.

    Args:
        folder: is made if absent.
        tensors: by name.
        header: plain JSON.
        model: fingerprint of the model that made the states.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    data = save_tensors({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    digest = hashlib.blake2b(data, digest_size=16).hexdigest()
    name = f"states-{digest}.safetensors"
    signed = {**header, "format": FORMAT, "kind": "tsgdn.states", "fingerprint": model, "file": name, "digest": digest}
    signed["signature"] = _signature(signed)
    write_whole(folder / name, data)
    write_whole(folder / HEADER, json.dumps(signed, ensure_ascii=False, indent=1).encode())
    for old in folder.glob("states-*"):  # the snapshot before, and what a crash left
        if old.name != name:
            old.unlink(missing_ok=True)


def read(folder: str | Path, *, model: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the header of a snapshot.

    Raises:
        FileNotFoundError: nothing was saved there.
        SnapshotRefused: another model, a newer format, or damage.
    """
    folder = Path(folder)
    if not exists(folder):
        raise FileNotFoundError(f"no {HEADER} in {folder}: nothing was saved there")
    try:
        header = json.loads((folder / HEADER).read_bytes())
        kind, version = header["kind"], header["format"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise SnapshotRefused(f"{folder / HEADER} is damaged: it is not the header of a snapshot") from None
    if kind != "tsgdn.states":
        raise SnapshotRefused(f"{folder} holds {kind!r}, expected 'tsgdn.states'")
    if not isinstance(version, int) or version > FORMAT:
        raise SnapshotRefused(
            f"{folder} has snapshot format {version}, this version reads up to {FORMAT}: upgrade tsgdn"
        )
    if header.pop("signature", None) != _signature(header):
        raise SnapshotRefused(f"{folder / HEADER} is damaged: its content does not match its signature")
    if header.get("fingerprint") != model:
        raise SnapshotRefused(
            f"the states in {folder} belong to model {header.get('fingerprint')}, the model given is {model}: "
            "load that model, or warm this one up from the source"
        )
    name = Path(str(header.get("file"))).name
    if not (folder / name).is_file():
        raise SnapshotRefused(f"{folder / name} is missing: the snapshot was not copied whole")
    data = (folder / name).read_bytes()
    if hashlib.blake2b(data, digest_size=16).hexdigest() != header.get("digest"):
        raise SnapshotRefused(f"{folder / name} is damaged: its digest is not the one in {HEADER}")
    try:
        return load_tensors(data), header
    except SafetensorError as error:
        raise SnapshotRefused(f"{folder / name} cannot be read as safetensors: {error}") from None


def _signature(header: dict[str, Any]) -> str:
    text = json.dumps(header, sort_keys=True, ensure_ascii=False)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
