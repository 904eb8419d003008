"""Many series spread over shards by their names: each shard has its own block of tensors, and a store of its own.

    predictor = ShardedPredictor(folder, shards=8, store="states")
    predictor.observe(frame)
    predictor.forecast(horizon=24)

A shard is what moves: another process, or another machine, opens its store and goes on. The results do not depend on
the number of shards: bit by bit with `exact`, else within rounding.
"""

import contextlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tsgdn.data.series import Series
from tsgdn.streaming import gather
from tsgdn.streaming.durable import DurablePredictor
from tsgdn.streaming.predictor import StatefulPredictor
from tsgdn.streaming.rows import read_rows
from tsgdn.streaming.stores import Durability, StoreError, open_store
from tsgdn.streaming.stores.record import Key
from tsgdn.streaming.stores.reshard import Resharded, reshard
from tsgdn.streaming.stores.shards import MOST_SHARDS, shard_of
from tsgdn.streaming.ticks import chosen
from tsgdn.streaming.verdicts import ObserveReport
from tsgdn.types import ForecastBatch


class ShardHealth(NamedTuple):
    """How a shard is.

    Attributes:
        shard: its number.
        epoch: of its owner, 0 without a store.
        series: it holds.
        lag: ticks that its states in the store lack; they are in its journal.
        rows: taken in per second since it was opened.
        checkpoint: seconds since the last one.
        lost: series whose state is damaged.
    """

    shard: int
    epoch: int
    series: int
    lag: int
    rows: float
    checkpoint: float
    lost: int


class ShardedPredictor:
    """The verbs of a predictor, over shards in this process.

    A call goes to the shards it concerns; each makes its part durable by itself. So where a store fails in the middle
    of a call some shards may hold it: give it again after opening them anew, a row counts once.

    Args:
        folder: of a model.
        shards: how many; a store tells it for ever, `reshard` makes another one.
        engine: "local": all in this process. For several processes there is `tsgdn stream --workers`.
        store: a folder, or the address of a Redis server; None: states live in memory.
        durability: see `open_store`.
        key: of the seals.
        only: which shards are for this process; None: all.
        source: name of the source whose offsets come with the rows.
        checkpoint_every: seconds between checkpoints of a shard, at least.
        takeover: replace owners whose lease has run out.
        log: is called with a line of text when something happens.
        options: arguments of `StatefulPredictor.from_pretrained`; `max_series` is of each shard.

    Attributes:
        parts: by number the shards that are here.

    Raises:
        ValueError: an argument is out of range, or the folder is no model.
        StoreError: a store is in use, damaged, or of another model or number of shards.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        shards: int = 64,
        engine: str = "local",
        store: str | Path | None = None,
        durability: Durability = "normal",
        key: Key = None,
        only: Iterable[int] | None = None,
        source: str = "rows",
        checkpoint_every: int | float = 60.0,
        takeover: bool = False,
        log: Callable[[str], object] | None = None,
        **options: Any,
    ) -> None:
        if engine != "local":
            raise ValueError(f"engine is {engine!r}, expected 'local'; for processes there is tsgdn stream --workers")
        if not 1 <= shards <= MOST_SHARDS:
            raise ValueError(f"shards is {shards}, expected 1 to {MOST_SHARDS}")
        mine = range(shards) if only is None else sorted(set(only))
        if not mine or not all(0 <= shard < shards for shard in mine):
            raise ValueError(f"only is {list(mine)}, expected shards from 0 to {shards - 1}")
        self.shards, self._place, self._key = shards, store, key
        self._log: Callable[[str], object] = log or (lambda text: None)
        self._settings: dict[str, Any] = {
            "source": source, "key": key, "checkpoint_every": checkpoint_every, "takeover": takeover,
        }  # fmt: skip
        self._durability: Durability = durability
        self._shape = StatefulPredictor.from_pretrained(folder, **options)
        self.parts: dict[int, StatefulPredictor | DurablePredictor] = {}
        self._open(mine)

    def _open(self, mine: Iterable[int]) -> None:
        self.parts, self._opened = {}, time.monotonic()
        self._rows = dict.fromkeys(mine, 0)
        self._written = dict.fromkeys(mine, self._opened)
        try:
            for shard in mine:
                part = self._shape._empty_twin()
                if self._place is None:
                    self.parts[shard] = part
                    continue
                store = open_store(
                    self._place, durability=self._durability, key=self._key, shard=shard, shards=self.shards
                )
                durable = self.parts[shard] = DurablePredictor(part, store, owner="tsgdn shards", **self._settings)
                if durable.recovery.ticks:
                    self._log(f"shard {shard}: {durable.recovery.ticks} ticks of the journal were replayed")
        except BaseException:
            self._let_go()
            raise

    def _let_go(self) -> None:
        for part in self.parts.values():
            if isinstance(part, DurablePredictor):
                part.store.close()

    # ---- what there is ----------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return sum(map(len, self.parts.values()))

    def __contains__(self, item_id: object) -> bool:
        return isinstance(item_id, str) and item_id in self._owner(item_id)

    @property
    def item_ids(self) -> tuple[str, ...]:
        """All series, shard by shard."""
        return tuple(item for part in self.parts.values() for item in part.item_ids)

    def shard(self, item_id: str) -> int:
        """The number of the shard that a series belongs to."""
        return shard_of(item_id, self.shards)

    def head(self, item_id: str) -> int:
        """Steps seen of a series; see `StatefulPredictor.head`."""
        return self._owner(item_id).head(item_id)

    def health(self) -> list[ShardHealth]:
        """How the shards are."""
        now, told = time.monotonic(), []
        for shard, part in self.parts.items():
            rate = self._rows[shard] / max(now - self._opened, 1e-9)
            since = now - self._written[shard]
            if isinstance(part, DurablePredictor):
                store = part.store
                lag = store.seq - store.committed
                told.append(ShardHealth(shard, store.epoch, len(part), lag, rate, since, len(store.lost)))
            else:
                told.append(ShardHealth(shard, 0, len(part), 0, rate, since, 0))
        return told

    def _owner(self, item_id: str) -> StatefulPredictor | DurablePredictor:
        number = self.shard(item_id)
        if number not in self.parts:
            raise KeyError(f"series {item_id!r} belongs to shard {number}, here are {', '.join(map(str, self.parts))}")
        return self.parts[number]

    def _split(self, item_ids: Iterable[str] | str) -> dict[int, list[str]]:
        names = (item_ids,) if isinstance(item_ids, str) else tuple(item_ids)
        found: dict[int, list[str]] = {}
        for item in names:
            self._owner(item)
            found.setdefault(self.shard(item), []).append(item)
        return found

    # ---- verbs ------------------------------------------------------------------------------------------------------

    def observe(
        self,
        data: Any,
        *,
        timestamp: Any = None,
        known: Mapping[str, np.ndarray] | None = None,
        offset: bytes = b"",
    ) -> ObserveReport:
        """As `StatefulPredictor.observe`; durable when it returns, if there is a store.

        Args:
            data: see there.
            timestamp: see there.
            known: see there.
            offset: place in the source after these rows; every shard keeps it.

        Raises:
            KeyError: a row of a shard that is not here; nothing has been applied.
            ValueError: wrong columns or types.
            StoreError: a shard could not make its part durable.
        """
        rows = read_rows(data, timestamp=timestamp, variates=self._shape.variates)
        places: dict[str, int] = {item: self.shard(item) for item in {*rows.item_ids, *(known or {})}}
        for item in places:
            self._owner(item)
        where = np.array([places[item] for item in rows.item_ids], np.int64)
        found = []
        for number, part in self.parts.items():
            mine = chosen(rows, where == number)
            features = {item: block for item, block in (known or {}).items() if places[item] == number}
            if mine.item_ids or features:
                mine = mine._replace(bad=rows.bad if not found else [])
                self._rows[number] += len(mine.item_ids)
                if isinstance(part, DurablePredictor):
                    found.append(part.observe(mine, known=features, offset=offset))
                    self._note(number, part)
                else:
                    found.append(part.observe(mine, known=features))
            elif offset and isinstance(part, DurablePredictor):
                part.mark(offset)
                if part.due():
                    self._checkpoint(number, part)
        if not found:  # only rows that could not be read
            return next(iter(self.parts.values())).observe(rows)
        return gather.reports(found)

    def forecast(self, item_ids: Sequence[str] | str | None = None, **options: Any) -> ForecastBatch:
        """As `StatefulPredictor.forecast`.

        Raises:
            KeyError: a series is not known, or its shard is not here.
        """
        names = self.item_ids if item_ids is None else (item_ids,) if isinstance(item_ids, str) else tuple(item_ids)
        groups = self._split(names)
        if not groups:
            return next(iter(self.parts.values())).forecast([], **options)
        return gather.forecasts([self.parts[n].forecast(items, **options) for n, items in groups.items()], names)

    def step(self, data: Any, *, timestamp: Any = None, offset: bytes = b"", **options: Any) -> ForecastBatch:
        """Observes, then forecasts the series that rows came for; `options` are those of `forecast`."""
        rows = read_rows(data, timestamp=timestamp, variates=self._shape.variates)
        self.observe(rows, offset=offset)
        return self.forecast([item for item in dict.fromkeys(rows.item_ids) if item in self], **options)

    def warm_up(self, data: Any, *, chunk: int = 4096) -> ObserveReport:
        """As `StatefulPredictor.warm_up`, shard by shard."""
        items = [data] if isinstance(data, Series) else data
        if not (isinstance(items, list | tuple) and all(isinstance(item, Series) for item in items)):
            return self.observe(data)
        for series in items:
            self._shape.check_history(series)
        groups = self._split([series.item_id for series in items])
        found = []
        for number in groups:
            mine = [series for series in items if self.shard(series.item_id) == number]
            found.append(self.parts[number].warm_up(mine, chunk=chunk))
        return gather.reports(found) if found else ObserveReport()

    def register(self, item_ids: Iterable[str]) -> None:
        """Names series that may come where unknown ones are rejected."""
        for number, items in self._split(item_ids).items():
            self.parts[number].register(items)

    def evict(self, item_ids: Iterable[str] | str) -> int:
        """As `StatefulPredictor.evict`; into the store, if there is one."""
        return sum(self.parts[number].evict(items) for number, items in self._split(item_ids).items())

    def delete(self, item_ids: Iterable[str] | str) -> int:
        """Forgets series for good; returns how many."""
        return sum(self.parts[number].delete(items) for number, items in self._split(item_ids).items())

    def reset(self, item_ids: Iterable[str] | str) -> None:
        """Makes series as if never seen."""
        for number, items in self._split(item_ids).items():
            self.parts[number].reset(items)

    def rewind(self, item_ids: Iterable[str] | str, to: Any) -> None:
        """As `StatefulPredictor.rewind`."""
        for number, items in self._split(item_ids).items():
            self.parts[number].rewind(items, to)

    # ---- stores -----------------------------------------------------------------------------------------------------

    def checkpoint(self) -> int:
        """Writes what has moved; returns the number of series."""
        return sum(
            self._checkpoint(number, part) for number, part in self.parts.items() if isinstance(part, DurablePredictor)
        )

    def _checkpoint(self, number: int, part: DurablePredictor) -> int:
        count = part.checkpoint()
        self._written[number] = time.monotonic()
        return count

    def _note(self, number: int, part: DurablePredictor) -> None:
        if part.store.committed == part.store.seq:
            self._written[number] = time.monotonic()

    def close(self) -> None:
        """A last checkpoint of every shard, and lets go of the stores."""
        failure: StoreError | None = None
        for part in self.parts.values():
            if isinstance(part, DurablePredictor):
                try:
                    part.close()
                except StoreError as error:  # the others are closed all the same
                    failure = failure or error
        if failure is not None:
            raise failure

    def reshard(self, shards: int, into: str | Path) -> Resharded:
        """Spreads the series over another number of shards and goes on with those; no state changes.

        Args:
            shards: how many there shall be.
            into: a folder that is not there yet; the old stores stay as they are.

        Raises:
            ValueError: states live in memory, or not all shards are here.
            StoreError: it could not be done; the old shards are open again.
        """
        if self._place is None:
            raise ValueError("reshard works on stores, and these states live in memory: give store=")
        if len(self.parts) < self.shards:
            raise ValueError(f"reshard needs all {self.shards} shards, here are {len(self.parts)}")
        self.close()
        try:
            with contextlib.ExitStack() as stack:
                views = [
                    open_store(self._place, key=self._key, shard=number, shards=self.shards).view()
                    for number in range(self.shards)
                ]
                for view in views:
                    stack.callback(view.close)
                told = reshard(views, into, shards, key=self._key)
        except BaseException:
            self._open(range(self.shards))
            raise
        self._place, self.shards = into, shards
        self._open(range(shards))
        self._log(f"{told.series} series are in {shards} shards in {into}")
        return told
