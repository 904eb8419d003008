"""One series' state as bytes: what a store keeps, a service sends and another machine reads.

All numbers are little-endian. A record of format 1:

    bytes    0  4       magic "TSGS"
             4  u16     format
             6  u16     flags; bit 0: the seal is keyed, bits 8 to 15 belong to the caller
             8  16      fingerprint of the model
            24  16      layout: which leaves lie where
            40  u64 x2  epoch of the writer, seq of the last tick that the state holds
            56  i64 x3  start (timestamp of step 0), head (steps seen), count (values seen)
            80  u16 x3  lengths of item_id, freq, tz; then two bytes of zero
            88  u32 x2  lengths of offset and extra
            96  u64     length of leaves
           104          leaves, item_id, freq, tz, offset, extra
           end          seal of all before it: crc32 (4), or keyed blake2b (16)

The name of the item is inside: a record that was put under another name is found out. A checksum finds accidents; only
the keyed seal finds a forger, who can compute a checksum too.
"""

import hashlib
import hmac
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

FORMAT = 1
MAGIC = b"TSGS"
KEYED = 1  # the flag of a keyed seal
LONGEST = 1 << 16  # bytes of a name, exclusive

_HEAD = struct.Struct("<4sHH16s16sQQqqqHHH2xIIQ")
_HEADS = np.dtype(
    [("magic", "S4"), ("format", "<u2"), ("flags", "<u2"), ("model", "V16"), ("layout", "V16"), ("epoch", "<u8"),
     ("seq", "<u8"), ("start", "<i8"), ("head", "<i8"), ("count", "<i8"), ("item", "<u2"), ("freq", "<u2"),
     ("tz", "<u2"), ("zero", "<u2"), ("offset", "<u4"), ("extra", "<u4"), ("leaves", "<u8")]
)  # fmt: skip

Key = bytes | None


class RecordDamaged(ValueError):
    """Bytes that are not the record they should be.

    Attributes:
        code: "state.truncated", "state.magic", "state.format", "state.checksum", "state.key" or "state.item".
    """

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code


class Record(NamedTuple):
    """A series' state and what must be known to use it.

    Attributes:
        item_id: of the series.
        model: fingerprint of the model that made the state, 16 bytes.
        layout: digest of the names, shapes and types of the leaves, 16 bytes (see `layout_digest`).
        epoch: of the store's owner who wrote it.
        seq: last tick that the state holds; a replay skips the series up to here.
        start: timestamp of step 0, nanoseconds UTC or as the clock counts.
        head: steps seen, valued or not.
        count: values seen.
        freq: of the clock.
        tz: of the clock, empty for UTC.
        leaves: all tensors of the state in the order of the layout.
        offset: place in the source after the last row that the state holds; opaque.
        extra: what has no fixed size (held rows, known features); opaque.
        flags: bit 0 says that the seal is keyed and is set by `pack`; bits 8 to 15 are the caller's.
    """

    item_id: str
    model: bytes
    layout: bytes
    epoch: int
    seq: int
    start: int
    head: int
    count: int
    freq: str
    tz: str
    leaves: bytes
    offset: bytes = b""
    extra: bytes = b""
    flags: int = 0


class Stamp(NamedTuple):
    """The part of a record that a store looks at; see `Record`."""

    model: bytes
    layout: bytes
    epoch: int
    seq: int
    keyed: bool
    item: bytes


def name_bytes(item_id: str) -> bytes:
    """The name as bytes; any text has some, lone surrogates included, and no two have the same.

    Raises:
        ValueError: 64 KiB or more.
    """
    name = item_id.encode("utf-8", "surrogatepass")
    if len(name) >= LONGEST:
        raise ValueError(f"the item_id has {len(name)} bytes, expected fewer than {LONGEST}: shorten it")
    return name


def name_text(name: bytes) -> str:
    """The name that `name_bytes` wrote."""
    return bytes(name).decode("utf-8", "surrogatepass")


def layout_digest(leaves: Iterable[tuple[str, Sequence[int], str]]) -> bytes:
    """16 bytes that name the leaves (name, shape, type) in their order; another order is another layout."""
    digest = hashlib.blake2b(digest_size=16)
    for name, shape, dtype in leaves:
        digest.update(f"{name}\0{'x'.join(map(str, shape))}\0{dtype}\n".encode())
    return digest.digest()


def pack(record: Record, *, key: Key = None) -> bytes:
    """A record as bytes, sealed.

    Args:
        record: its flag KEYED is set as `key` says.
        key: up to 64 bytes; None is a checksum.

    Raises:
        ValueError: a field does not fit.
    """
    item, freq, tz = name_bytes(record.item_id), record.freq.encode(), record.tz.encode()
    flags = _flags(record.flags, key)
    _check_digests(record.model, record.layout)
    try:
        head = _HEAD.pack(
            MAGIC, FORMAT, flags, record.model, record.layout, record.epoch, record.seq, record.start, record.head,
            record.count, len(item), len(freq), len(tz), len(record.offset), len(record.extra), len(record.leaves),
        )  # fmt: skip
    except struct.error as error:
        raise ValueError(f"the record of {record.item_id[:80]!r} does not fit its header: {error}") from None
    return _sealed(key, head, record.leaves, item, freq, tz, record.offset, record.extra)


def pack_many(
    item_ids: Sequence[str],
    leaves: UInt8[np.ndarray, "B L"],
    *,
    model: bytes,
    layout: bytes,
    epoch: int,
    seq: np.ndarray | int,
    start: np.ndarray | int,
    head: np.ndarray | int,
    count: np.ndarray | int,
    freq: str,
    tz: str = "",
    offset: bytes = b"",
    extras: Sequence[bytes] | None = None,
    flags: np.ndarray | int = 0,
    key: Key = None,
) -> dict[str, bytes]:
    """Records of many series, by item: the same bytes as `pack` of each.

    Args:
        item_ids: each once.
        leaves: bytes of the state, one row per series.
        model: fingerprint of the model.
        layout: digest of the leaves.
        epoch: of the writer.
        seq: last tick held; this and the next three are one number for all or one per series.
        start: timestamp of step 0.
        head: steps seen.
        count: values seen.
        freq: of the clock.
        tz: of the clock.
        offset: place in the source.
        extras: one per series.
        flags: bits 8 to 15, for all or per series.
        key: of the seal.

    Raises:
        ValueError: a field does not fit, or the numbers of series differ.
    """
    names = [name_bytes(item) for item in item_ids]
    if len(names) != len(leaves) or (extras is not None and len(extras) != len(names)):
        raise ValueError(f"{len(names)} names for {len(leaves)} rows of leaves: expected one each")
    _check_digests(model, layout)
    clock = (freq.encode(), tz.encode())
    heads = np.zeros(len(names), _HEADS)
    flags = np.asarray(flags)
    if (flags & 0xFF & ~KEYED).any() or (flags >> 16).any():
        raise ValueError("flags: only bits 8 to 15 are the caller's")
    if max(map(len, clock)) >= LONGEST or any(np.min(number, initial=0) < 0 for number in (epoch, seq)):
        raise ValueError("freq or tz is too long, or epoch or seq below 0")
    digests = np.frombuffer(model + layout, "V16")
    fields = {
        "magic": MAGIC, "format": FORMAT, "flags": _flags(0, key) | (flags & 0xFF00), "model": digests[0],
        "layout": digests[1], "epoch": epoch, "seq": seq, "start": start, "head": head, "count": count,
        "item": [len(name) for name in names], "freq": len(clock[0]), "tz": len(clock[1]), "offset": len(offset),
        "extra": 0 if extras is None else [len(extra) for extra in extras], "leaves": leaves.shape[1],
    }  # fmt: skip
    for field, value in fields.items():
        heads[field] = value
    start_of, rows = heads.tobytes(), memoryview(np.ascontiguousarray(leaves).data)
    size, records = _HEAD.size, {}
    for i, (item, name) in enumerate(zip(item_ids, names, strict=True)):
        extra = b"" if extras is None else extras[i]
        row = rows[i : i + 1].cast("B") if leaves.shape[1] else b""
        records[item] = _sealed(key, start_of[i * size : (i + 1) * size], row, name, *clock, offset, extra)
    if len(records) != len(names):
        raise ValueError("an item_id comes twice: expected each once")
    return records


def unpack(data: bytes, *, key: Key = None, item_id: str | None = None) -> Record:
    """The record in these bytes, an older format brought up to date.

    Args:
        data: from `pack`.
        key: with which it was sealed.
        item_id: whose record it should be.

    Raises:
        RecordDamaged: truncated, no record, a newer format, not what was sealed, sealed otherwise, or another item's.
    """
    check(data, key=key, item_id=item_id)
    if int.from_bytes(data[4:6], "little") < FORMAT:
        data = migrate(data, key=key)
    *_, flags, model, layout, epoch, seq, start, head, count, n_item, n_freq, n_tz, n_offset, n_extra, n_leaves = (
        _HEAD.unpack_from(data)
    )
    parts, at = [], _HEAD.size
    for size in (n_leaves, n_item, n_freq, n_tz, n_offset, n_extra):
        parts.append(data[at : at + size])
        at += size
    leaves, item, freq, tz, offset, extra = parts
    return Record(
        name_text(item), model, layout, epoch, seq, start, head, count, freq.decode(), tz.decode(), leaves, offset,
        extra, flags,
    )  # fmt: skip


def check(data: bytes, *, key: Key = None, item_id: str | None = None) -> Stamp:
    """What a store needs to know of a record that is whole.

    Raises:
        RecordDamaged: as `unpack`.
    """
    if len(data) < 8:
        raise RecordDamaged("state.truncated", f"a record has {len(data)} bytes, expected at least {_HEAD.size}")
    magic, version, flags = struct.unpack_from("<4sHH", data)
    if magic != MAGIC:
        raise RecordDamaged("state.magic", f"a record begins with {magic!r}, expected {MAGIC!r}")
    size = 16 if key is not None else 4
    if bool(flags & KEYED) != (key is not None):
        said = "is sealed with a key and none was given" if key is None else "has no keyed seal and a key was given"
        # a flipped flag is damage, not a question of keys: its checksum would not fit either
        raise RecordDamaged("state.key", f"a record {said}: it is damaged, forged, or of another store")
    if not hmac.compare_digest(_seal(key, data[:-size]), bytes(data[-size:])):
        raise RecordDamaged("state.checksum", "a record is not what was written: its checksum differs")
    if version > FORMAT or version < 1:
        raise RecordDamaged(
            "state.format", f"a record has format {version}, this version reads 1 to {FORMAT}: upgrade tsgdn"
        )
    if version < FORMAT:
        data = migrate(data, key=key)
    stamp = glance(data)
    if item_id is not None and stamp.item != name_bytes(item_id):
        raise RecordDamaged("state.item", f"the record under {item_id[:80]!r} is another item's")
    return stamp


def glance(data: bytes) -> Stamp:
    """The stamp of a record of the present format, its seal unseen.

    Raises:
        RecordDamaged: too short, no record, of another format, or of another length than its header says.
    """
    if len(data) < _HEAD.size:
        raise RecordDamaged("state.truncated", f"a record has {len(data)} bytes, its header alone {_HEAD.size}")
    magic, version, flags, model, layout, epoch, seq, _, _, _, *sizes = _HEAD.unpack_from(data)
    if magic != MAGIC or version != FORMAT:
        raise RecordDamaged(
            "state.format", f"a record is {magic!r} of format {version}, expected {MAGIC!r} of {FORMAT}"
        )
    if _HEAD.size + sum(sizes) + (16 if flags & KEYED else 4) != len(data):
        raise RecordDamaged("state.truncated", f"a record has {len(data)} bytes, its header says another number")
    at = _HEAD.size + sizes[-1]
    return Stamp(model, layout, epoch, seq, bool(flags & KEYED), data[at : at + sizes[0]])


# From format n to n + 1: takes a whole record of format n without its seal and gives the next one without its seal.
MIGRATIONS: dict[int, Callable[[bytes], bytes]] = {}


def migrate(
    data: bytes, *, key: Key = None, to: int | None = None, steps: Mapping[int, Callable[[bytes], bytes]] | None = None
) -> bytes:
    """A record in format `to`, sealed anew; the bytes given are not changed.

    Args:
        data: a record that `check` has passed.
        key: of the seal.
        to: format that is wanted; the present one if not given.
        steps: from format n to n + 1, without seals; the project's own if not given.

    Raises:
        RecordDamaged: no step leads on from its format.
    """
    steps, to = MIGRATIONS if steps is None else steps, FORMAT if to is None else to
    body = data[: -16 if key is not None else -4]
    version = int.from_bytes(body[4:6], "little")
    while version < to:
        if version not in steps:
            raise RecordDamaged("state.format", f"a record has format {version} and nothing leads on from there")
        body = steps[version](body)
        version += 1
        if int.from_bytes(body[4:6], "little") != version:
            raise RecordDamaged("state.format", f"the step to format {version} wrote another one")
    return _sealed(key, body)


def seal_of(key: Key, *fields: bytes | str | int) -> bytes:
    """A checksum, or with a key a keyed digest, of several fields; it depends on where one ends and the next begins."""
    parts = []
    for field in fields:
        data = b"%d" % field if isinstance(field, int) else name_bytes(field) if isinstance(field, str) else field
        parts += [len(data).to_bytes(8, "little"), data]
    return _seal(key, *parts)


def pack_ticks(ticks: Sequence[bytes]) -> bytes:
    """Several ticks as one run of bytes."""
    return b"".join(part for tick in ticks for part in (len(tick).to_bytes(4, "little"), tick))


def unpack_ticks(batch: bytes) -> Iterator[bytes]:
    """The ticks that `pack_ticks` joined.

    Raises:
        RecordDamaged: the bytes do not end where a tick does.
    """
    at = 0
    while at < len(batch):
        size = int.from_bytes(batch[at : at + 4], "little")
        at += 4 + size
        if at > len(batch):
            raise RecordDamaged("journal.truncated", "a journal row ends within a tick")
        yield batch[at - size : at]


def _check_digests(model: bytes, layout: bytes) -> None:
    if len(model) != 16 or len(layout) != 16:
        raise ValueError(f"fingerprint and layout have {len(model)} and {len(layout)} bytes, expected 16 each")


def _flags(flags: int, key: Key) -> int:
    if flags & 0xFF & ~KEYED or flags >> 16:
        raise ValueError(f"flags are {flags:#x}: only bits 8 to 15 are the caller's")
    return flags & ~KEYED | (KEYED if key is not None else 0)


def _seal(key: Key, *parts: bytes | memoryview) -> bytes:
    if key is not None:
        digest = hashlib.blake2b(key=key, digest_size=16)
        for part in parts:
            digest.update(part)
        return digest.digest()
    total = 0
    for part in parts:
        total = zlib.crc32(part, total)
    return total.to_bytes(4, "little")


def _sealed(key: Key, *parts: bytes | memoryview) -> bytes:
    return b"".join((*parts, _seal(key, *parts)))
