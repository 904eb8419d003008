"""States of a predictor as records of a store, and back: bit by bit, many series at a time."""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tsgdn.streaming.predictor import StatefulPredictor
from tsgdn.streaming.stores.record import Key, Record, layout_digest, pack_many
from tsgdn.streaming.ticks import framed, unframed


class Leaf(NamedTuple):
    """One tensor of a series' state, as it lies in a record."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int


def layout(predictor: StatefulPredictor) -> tuple[tuple[Leaf, ...], bytes]:
    """The leaves of a record in their order, and 16 bytes that stand for them and for what the rows mean."""
    twin = predictor._empty_twin()
    twin._create({"x": np.datetime64("2000-01-01", "ns")})
    tensors, _ = twin._contents(["x"])
    leaves = tuple(
        Leaf(name, tuple(x.shape[1:]), x.dtype, x.numel() * x.element_size()) for name, x in sorted(tensors.items())
    )
    meaning = json.dumps([predictor.freq, list(predictor.variates), predictor.calendar])
    return leaves, layout_digest([*((leaf.name, leaf.shape, str(leaf.dtype)) for leaf in leaves), (meaning, (), "")])


class Aside(NamedTuple):
    """What a record holds beside the leaves.

    Attributes:
        held: rows that wait for others: step, timestamp in nanoseconds, values.
        begin: step of the first column of `known`, None without.
        known: features of steps to come (F, n).
    """

    held: list[tuple[int, int, list[float | None]]]
    begin: int | None
    known: np.ndarray | None


def aside(record: Record) -> Aside:
    """What has no fixed size in a record."""
    told, rest = unframed(record.extra)
    held = [(step, stamp, values) for step, stamp, values in told["held"]]
    if "known" not in told:
        return Aside(held, None, None)
    begin, shape, dtype = told["known"]
    return Aside(held, begin, np.frombuffer(rest, dtype).reshape(shape))


def split(record: Record, leaves: Sequence[Leaf]) -> dict[str, Tensor]:
    """The leaves of a record by name, from `layout`."""
    tensors, at = {}, 0
    for leaf in leaves:
        data = bytearray(record.leaves[at : at + leaf.nbytes])
        flat = torch.frombuffer(data, dtype=leaf.dtype) if data else torch.empty(0, dtype=leaf.dtype)
        tensors[leaf.name] = flat.reshape(leaf.shape)
        at += leaf.nbytes
    return tensors


def records_of(
    predictor: StatefulPredictor,
    items: Sequence[str],
    leaves: Sequence[Leaf],
    *,
    layout: bytes,
    epoch: int,
    seq: np.ndarray | int,
    key: Key,
) -> dict[str, bytes]:
    """Records of these series, by item.

    Args:
        predictor: that holds them.
        items: each once.
        leaves: from `layout`, like `layout` itself.
        layout: digest of the leaves.
        epoch: of the store's owner.
        seq: last tick that the states hold, of all or of each.
        key: of the seals.
    """
    if not items:
        return {}
    tensors, header = predictor._contents(items)
    extras = []
    for place, item in enumerate(items):
        told: dict[str, Any] = {"held": header["held"].get(item, [])}
        features = tensors.get(f"known.{place}")
        if features is not None:
            told["known"] = [header["known_from"][str(place)], list(features.shape), str(features.numpy().dtype)]
        extras.append(framed(told, b"" if features is None else features.numpy().tobytes()))
    return pack_many(
        items,
        np.concatenate([_bytes(tensors[leaf.name]) for leaf in leaves], axis=1),
        model=bytes.fromhex(predictor.fingerprint),
        layout=layout,
        epoch=epoch,
        seq=seq,
        start=tensors["ledger.start"].numpy(),
        head=tensors["ledger.head"].numpy(),
        count=tensors["ledger.values"].numpy(),
        freq=predictor.freq,
        extras=extras,
        key=key,
    )


def restore(predictor: StatefulPredictor, records: Sequence[Record], leaves: Sequence[Leaf]) -> None:
    """Puts the states of series that are not there into a predictor."""
    if not records:
        return
    whole = np.stack([np.frombuffer(record.leaves, np.uint8) for record in records])
    tensors: dict[str, Tensor] = {}
    at = 0
    for leaf in leaves:
        flat = whole[:, at : at + leaf.nbytes].tobytes()
        at += leaf.nbytes
        shape = (len(records), *leaf.shape)
        tensors[leaf.name] = (
            torch.frombuffer(bytearray(flat), dtype=leaf.dtype).reshape(shape)
            if flat
            else torch.empty(shape, dtype=leaf.dtype)
        )
    header: dict[str, Any] = {"items": [r.item_id for r in records], "known_from": {}, "held": {}, "registered": []}
    for place, record in enumerate(records):
        told, rest = unframed(record.extra)
        if told["held"]:
            header["held"][record.item_id] = told["held"]
        if "known" in told:
            header["known_from"][str(place)], shape, dtype = told["known"]
            tensors[f"known.{place}"] = torch.from_numpy(np.frombuffer(rest, dtype).reshape(shape).copy())
    predictor._restore(tensors, header)


def _bytes(leaf: Tensor) -> np.ndarray:
    """A leaf's bytes, a row per series."""
    plain = leaf.detach().cpu().contiguous()
    if not plain.numel():
        return np.zeros((len(plain), 0), np.uint8)
    return plain.reshape(len(plain), -1).view(torch.uint8).numpy()
