"""Which shard a series belongs to, and how many there are at a place.

A shard is a store of its own with its own block of tensors, its own journal and its own owner. The hash is part of the
format: it never changes, and the manifest beside the files names it.
"""

import hashlib
import json
from pathlib import Path

from tsgdn.streaming.stores import StoreRefused
from tsgdn.streaming.stores.record import name_bytes

MANIFEST = "shards.json"
HASH = "blake2b, key tsgdn.shard.1"
MOST_SHARDS = 100  # each store of files has four of them open
REGISTERED = "tsgdn/registered"
"""Under this source a store holds the names that may come where unknown series are rejected."""


def shard_of(item_id: str, shards: int) -> int:
    """The shard that a series belongs to: the keyed blake2b of its name, 8 bytes little-endian, modulo the number."""
    digest = hashlib.blake2b(name_bytes(item_id), digest_size=8, key=b"tsgdn.shard.1").digest()
    return int.from_bytes(digest, "little") % shards


def shards_at(place: str | Path) -> int | None:
    """How many shards a folder holds, by its manifest or by its files; None: there are none yet, or it is no folder.

    Raises:
        StoreRefused: the manifest cannot be read, or names another hash.
    """
    if "://" in str(place):
        return None
    folder = Path(place).expanduser()
    try:
        told = json.loads((folder / MANIFEST).read_text())
        if told["hash"] != HASH or told["kind"] != "tsgdn.shards":
            raise StoreRefused(f"{folder / MANIFEST} names the hash {told['hash']!r}, expected {HASH!r}: upgrade tsgdn")
        return int(told["shards"])
    except (FileNotFoundError, NotADirectoryError):
        numbers = [int(path.stem) for path in folder.glob("*.sqlite") if path.stem.isdecimal()]
        return max(numbers) + 1 if numbers else None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise StoreRefused(f"{folder / MANIFEST} cannot be read ({error}): put a copy in its place") from None
