"""States in a folder: one safetensors file, one JSON header that names and signs it.

The header is replaced atomically and names the tensor file by its digest, so that a crash at any moment leaves either
the old snapshot or the new one. Loading reads tensors and plain JSON only; it refuses, by name, a snapshot of another
model, of a newer format, or one in which a bit has changed.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from tsgdn.model.artefact import write_whole
from tsgdn.streamable import map_state, state_leaves
from tsgdn.streaming.residence import Residents
from tsgdn.streaming.verdicts import Held, plain

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


def contents(series: Residents, items: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Everything that is held of series: tensors by name, a row per series, and what has no fixed size."""
    slots = series.find(items)
    ledger, anchors = series.ledger, series.anchors
    tensors: dict[str, Tensor] = {}
    if len(slots):
        state = map_state(torch.clone, series.pool.take(slots))
        tensors |= {f"state.{name}": leaf for name, leaf in state_leaves(state)}
    for name, array in ledger.rows(slots).items():
        if name in ledger.saved:
            tensors[f"ledger.{name}"] = _tensor(array)
    if len(slots) and anchors is not None:
        *both, steps = anchors.rows(slots)
        tensors["anchor.steps"] = torch.from_numpy(steps)
        for age, anchor, watched in zip(("older", "younger"), both, anchors.watched(slots), strict=True):
            tensors |= {f"anchor.{age}.{name}": leaf for name, leaf in state_leaves(anchor)}
            tensors |= {f"anchor.{age}.watch.{name}": _tensor(array) for name, array in watched.items()}
    if series.watch is not None:
        tensors |= {f"watch.{name}": _tensor(array) for name, array in series.watch.rows(slots).items()}
    future = {}
    for place, slot in enumerate(slots.tolist()):
        given = series.features.given(slot)
        if given is not None:
            future[str(place)] = given[0]
            tensors[f"known.{place}"] = torch.from_numpy(given[1].copy())
    chosen = set(items) if series.held or series.pinned else set()
    header = {
        "items": list(items),
        "known_from": future,
        "held": {
            item: [[h.step, int(h.stamp.astype(np.int64)), plain(h.values)] for h in rows]
            for item, rows in series.held.items()
            if item in chosen
        },
        "used": np.argsort(np.argsort(ledger.used[slots], kind="stable")).tolist(),
        "registered": sorted(series.registered),
        "pinned": sorted(series.pinned),
        "static": {item: list(static) for item, static in sorted(series.static.items())},
    }
    return tensors, header


def restore(series: Residents, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Adds the series of `contents`; none of them may be there yet."""
    items = list(header["items"])
    ledger = {name: tensors[f"ledger.{name}"].numpy() for name in series.ledger.saved}
    starts = ledger["start"].view("datetime64[ns]")
    if len(set(items)) != len(starts):
        raise ValueError(f"{len(set(items))} names for {len(starts)} series")
    slots = series.create(dict(zip(items, starts, strict=True)))
    notes = {**series.ledger.rows(slots), **ledger, "start": starts}
    for name in series.ledger.FIELDS:
        wanted = getattr(series.ledger, name).shape[1:]
        if notes[name].shape[1:] != wanted:
            raise ValueError(f"{name} has shape {notes[name].shape[1:]}, expected {wanted}")
    series.ledger.put(slots, notes)
    if items:
        own = series.pool.take(slots)
        series.pool.put(slots, _state_from(tensors, "state", own))
        if series.watch is not None and "watch.pending.patch" in tensors:  # else nothing has been scored yet
            series.watch.put(slots, _rows(tensors, "watch."))
        if series.anchors is not None:
            older, younger = (_state_from(tensors, f"anchor.{age}", own) for age in ("older", "younger"))
            watched = (_rows(tensors, "anchor.older.watch."), _rows(tensors, "anchor.younger.watch."))
            series.anchors.put(slots, older, younger, tensors["anchor.steps"].numpy(), watched)
    for place, origin in header["known_from"].items():
        series.features.give(int(slots[int(place)]), int(origin), tensors[f"known.{place}"].numpy())
    for item, rows in header["held"].items():
        series.held[item] = [
            Held(step, np.datetime64(stamp, "ns"), np.array(values, np.float64), None) for step, stamp, values in rows
        ]
    series.registered |= set(header["registered"])
    series.pinned |= set(header.get("pinned", ()))
    waiting = {item: tuple(static) for item, static in header.get("static", {}).items()}
    series.static |= {item: static for item, static in waiting.items() if item not in series.slots}
    if header.get("used"):  # in what order series were observed; before all that are here already
        series.ledger.used[slots] = np.asarray(header["used"], np.int64) - len(items)


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array.view(np.int64) if array.dtype.kind == "M" else array))


def _rows(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): tensor.numpy() for name, tensor in tensors.items() if name.startswith(prefix)}


def _state_from(tensors: Mapping[str, Tensor], prefix: str, like: Any) -> Any:
    """A state of the structure of another out of named leaves."""
    wrong = [name for name, leaf in state_leaves(like) if tensors[f"{prefix}.{name}"].shape != leaf.shape]
    if wrong:
        raise ValueError(f"{prefix} leaf {wrong[0]} has another shape")
    leaves = iter([tensors[f"{prefix}.{name}"] for name, _ in state_leaves(like)])
    return map_state(lambda leaf: next(leaves).to(leaf.device), like)
