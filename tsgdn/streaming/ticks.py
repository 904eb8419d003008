"""Ticks as bytes: what a journal holds of a call of `observe`, and what a router sends to the process that makes it."""

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from tsgdn.streaming.rows import Rows


class Tick(NamedTuple):
    """What the journal holds of a call.

    Attributes:
        rows: that could be read.
        known: features that came with them.
        offset: place in the source after them.
        source: which source; empty: the only one.
        received: when it got the rows, nanoseconds since 1970; None: not known.
    """

    rows: Rows
    known: dict[str, np.ndarray]
    offset: bytes
    source: str = ""
    received: int | None = None


def packed(tick: Tick) -> bytes:
    """A tick as bytes: a JSON header, then the arrays."""
    rows, blocks = tick.rows, [np.ascontiguousarray(block, np.float64) for block in tick.known.values()]
    header = {
        "ids": rows.item_ids,
        "variates": int(rows.values.shape[1]),
        "known": {item: list(block.shape) for item, block in zip(tick.known, blocks, strict=True)},
        "offset": tick.offset.hex(),
    }
    if tick.source:
        header["source"] = tick.source
    if tick.received is not None:
        header["received"] = tick.received
    stamps = np.ascontiguousarray(rows.stamps.astype("datetime64[ns]").view(np.int64))
    values = np.ascontiguousarray(rows.values, np.float64)
    return framed(header, b"".join(x.tobytes() for x in (stamps, values, *blocks)))


def unpacked(data: bytes) -> Tick:
    """The tick in these bytes."""
    header, rest = unframed(data)
    count, variates = len(header["ids"]), header["variates"]
    stamps = np.frombuffer(rest, np.int64, count).view("datetime64[ns]")
    values = np.frombuffer(rest, np.float64, count * variates, offset=8 * count).reshape(count, variates)
    at, known = 8 * count * (1 + variates), {}
    for item, shape in header["known"].items():
        size = int(np.prod(shape))
        known[item] = np.frombuffer(rest, np.float64, size, offset=at).reshape(shape)
        at += 8 * size
    rows = Rows(header["ids"], stamps, values, np.arange(count), [])
    return Tick(rows, known, bytes.fromhex(header["offset"]), header.get("source", ""), header.get("received"))


def without(rows: Rows, items: set[str]) -> Rows:
    """The rows of all other series."""
    if not items or items.isdisjoint(rows.item_ids):
        return rows
    return chosen(rows, np.array([item not in items for item in rows.item_ids], bool))


def chosen(rows: Rows, keep: np.ndarray) -> Rows:
    """Some of the rows (boolean, one per row), with what was wrong with others."""
    ids = [item for item, kept in zip(rows.item_ids, keep.tolist(), strict=True) if kept]
    return Rows(ids, rows.stamps[keep], rows.values[keep], rows.places[keep], rows.bad)


def by_series(
    rows: Rows, known: Mapping[str, np.ndarray], most: int | None
) -> Iterator[tuple[Rows, dict[str, np.ndarray]]]:
    """Rows and features in parts of no more series than that; all of a series in one part."""
    names = dict.fromkeys((*rows.item_ids, *known))
    if most is None or len(names) <= most:
        yield rows, dict(known)
        return
    part_of = {item: i // most for i, item in enumerate(names)}
    where = np.array([part_of[item] for item in rows.item_ids], np.int64)
    for number in range((len(names) - 1) // most + 1):
        part = chosen(rows, where == number)
        features = {item: block for item, block in known.items() if part_of[item] == number}
        yield part if number == 0 else part._replace(bad=[]), features


def framed(header: dict[str, Any], rest: bytes) -> bytes:
    """A JSON object and bytes behind it."""
    # ASCII: an item_id may hold what UTF-8 cannot
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    return len(text).to_bytes(4, "little") + text + rest


def unframed(data: bytes) -> tuple[dict[str, Any], bytes]:
    """What `framed` put together."""
    size = int.from_bytes(data[:4], "little")
    return json.loads(data[4 : 4 + size]), data[4 + size :]
