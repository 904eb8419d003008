"""What is done with whole series: naming, watching, evicting, rewinding, saving them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from tsgdn.data.clock import Clock, show
from tsgdn.model.forecaster import Forecaster
from tsgdn.streaming import live, snapshot
from tsgdn.streaming.adapt import Learning
from tsgdn.streaming.advance import Engine
from tsgdn.streaming.live import Alarm, Health, SeriesState
from tsgdn.streaming.residence import Residents, names
from tsgdn.streaming.rows import printable
from tsgdn.streaming.verdicts import Judge, ObserveReport, plain
from tsgdn.streaming.watch import Watch
from tsgdn.streaming.worth import Summary


class Keeper:
    """The part of `StatefulPredictor` that never looks at a row; its constructor sets what is declared here."""

    model: Forecaster
    clock: Clock
    variates: tuple[str, ...]
    targets: tuple[str, ...]
    calendar: bool
    late_window: int
    max_gap: int | None
    min_values: int
    block: int
    exact: bool
    fingerprint: str
    learning: Learning | None
    last_report: ObserveReport
    _judge: Judge
    _new_watch: Callable[[], Watch] | None
    _alarms: tuple[Alarm, ...]
    _calls: int

    def _empty_twin(self) -> Any:
        """The same predictor without series, and without a store."""
        raise NotImplementedError

    def _clear(self) -> None:
        self._set(
            Residents(
                self.model,
                self.clock,
                variates=len(self.variates),
                calendar=self.calendar,
                late_window=self.late_window,
                watch=self._new_watch,
                resets=self.max_gap is not None,
            )
        )

    def _set(self, series: Residents) -> None:
        """Takes these series in the place of all others. The names are those that stores and tests look at."""
        self._series = series
        self._engine = Engine(
            self.model,
            series,
            targets=len(self.targets),
            block=self.block,
            exact=self.exact,
            max_gap=self.max_gap,
        )
        self._slots, self._pool, self._ledger = series.slots, series.pool, series.ledger
        self._features, self._anchors, self._held = series.features, series.anchors, series.held
        self._registered = series.registered

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, item_id: object) -> bool:
        return item_id in self._slots

    @property
    def item_ids(self) -> tuple[str, ...]:
        """The series, in the order in which they came."""
        return tuple(self._slots)

    @property
    def freq(self) -> str:
        """Pandas alias of the step."""
        return self.clock.freq

    @property
    def nbytes_per_series(self) -> int:
        """Bytes that a series takes, whatever the length of its history."""
        return self._series.nbytes

    def head(self, item_id: str) -> int:
        """Steps seen of a series, valued or not: the index of the next one."""
        return int(self._ledger.head[self._series.find([item_id])[0]])

    def held(self) -> dict[tuple[str, str], list[float | None]]:
        """The rows that wait for others to agree with them, values by item and time; they are saved with the states."""
        return {(item, show(row.stamp)): plain(row.values) for item, rows in self._held.items() for row in rows}

    def register(
        self, item_ids: Iterable[str], *, static: Mapping[str, Sequence[int]] | None = None, pinned: bool = False
    ) -> None:
        """Names series that may come where unknown ones are rejected.

        Args:
            item_ids: which series.
            static: categories of those that have not come yet, for their first row.
            pinned: whether they stay when others are evicted to make room; `evict` by name takes them all the same.

        Raises:
            ValueError: a wrong number of categories, or of a series that is there already; nothing has been registered.
        """
        items, size = names(item_ids), len(self.model.config["static_cardinalities"])
        for item, categories in (static or {}).items():
            if len(categories) != size or item in self._slots:
                there = "is there already" if item in self._slots else f"has {len(categories)} categories"
                raise ValueError(f"series {printable(item)!r} {there}: expected {size} before its first row")
        self._registered.update(items)
        self._series.static |= {item: tuple(map(int, categories)) for item, categories in (static or {}).items()}
        (self._series.pinned.update if pinned else self._series.pinned.difference_update)(items)

    def _create(self, starts: Mapping[str, np.datetime64]) -> np.ndarray:
        """Slots for new series."""
        return self._series.create(starts)

    def _slots_of(self, items: Sequence[str]) -> np.ndarray:
        return self._series.find(items)

    @property
    def _device(self) -> torch.device:
        return self._series.device

    # ---- watching ---------------------------------------------------------------------------------------------------

    def signals(self) -> tuple[Alarm, ...]:
        """What was odd about the rows of the last `observe`, `observe_at` or `step`; empty without `signals=`.

        An anomaly is told as its value comes; a drift when the patch of the value that tipped the scales is finished. A
        value that comes late is scored as if it had come in order, and what it changes about the past is not told.
        """
        return self._alarms

    def summary(self, item_ids: Sequence[str] | str | None = None) -> Summary:
        """How the forecasts of series have done, up to their last finished patches: live coverage, CRPS, widths.

        Raises:
            ValueError: the predictor watches nothing.
            KeyError: a series is not known.
        """
        if self._series.watch is None:
            raise ValueError("the predictor watches nothing: make it with calibrate=True, or signals=True")
        return self._series.watch.summary(self._series.find(self.item_ids if item_ids is None else names(item_ids)))

    @live.if_learning
    def adapt(self, item_ids: Sequence[str] | str | None = None) -> Int64[np.ndarray, " B"]:
        """Learns corrections from forecasts whose targets have been seen since the last call.

        Targets count when their patch is finished. Weights of the model stay. A predictor made without `learning` has
        no such verb.

        Args:
            item_ids: which series; all if not given.

        Returns:
            How many residuals each series gave.

        Raises:
            KeyError: a series is not known.
        """
        slots = self._series.find(self.item_ids if item_ids is None else tuple(dict.fromkeys(names(item_ids))))
        watch: Any = self._series.watch
        return watch.adapt(slots)

    def state(self, item_id: str) -> SeriesState:
        """What is held of a series, as copies.

        Raises:
            KeyError: the series is not known.
        """
        return live.state_of(self._series, item_id, self.min_values)

    def health(self) -> Health:
        """What a monitor asks: how many series there are, and what they take."""
        return live.health_of(self._series, self._calls, self._judge.max_series, self.last_report)

    # ---- whole states -----------------------------------------------------------------------------------------------

    def reset(self, item_ids: Iterable[str] | str) -> None:
        """Makes series as if never seen; their next row starts them anew."""
        items = names(item_ids)
        self.delete(items)
        self._registered.update(items)

    def evict(self, item_ids: Iterable[str] | str | None = None, *, keep: int | None = None) -> int:
        """Frees slots: of the series that are named, or of those that were not observed for longest.

        Without a store the states are gone, and the next row of such a series starts it anew.

        Args:
            item_ids: which series may go; all if not given.
            keep: how many shall remain; the latest observed do, forecasts do not count. Only then may `item_ids` be
                left out.

        Returns:
            How many were evicted.

        Raises:
            KeyError: a series is not known.
            ValueError: neither argument is given, or `keep` is negative.
        """
        if keep is None and item_ids is None:
            raise ValueError("evict needs item_ids, or keep= for how many series shall remain")
        if keep is not None and keep < 0:
            raise ValueError(f"keep is {keep}, expected at least 0 series")
        items = self.item_ids if item_ids is None else tuple(dict.fromkeys(names(item_ids)))
        slots = self._series.find(items)
        if keep is not None:
            order = np.argsort(self._ledger.used[slots], kind="stable")[: max(0, len(self) - keep)]
            items = tuple(items[i] for i in order.tolist())
        if items:
            self._spill(items)
            self.delete(items)
        return len(items)

    def delete(self, item_ids: Iterable[str] | str) -> int:
        """Forgets series for good and frees their slots; gives back how many.

        Raises:
            KeyError: a series is not known; nothing has been deleted.
        """
        items = tuple(dict.fromkeys(names(item_ids)))
        self._series.delete(items)
        return len(items)

    def compact(self) -> int:
        """Moves series from the highest slots into holes and frees the memory behind; no bit of a state changes.

        Handles of the series that move are stale afterwards.

        Returns:
            Bytes that were freed.
        """
        return self._series.compact()

    def _spill(self, items: Sequence[str]) -> None:
        """Called before series are evicted; where there is a store, it takes them."""

    def _reload(self, items: Sequence[str]) -> None:
        """Called before rows of unknown series are judged; where there is a store, it brings back those it has."""

    def _admit(self, items: Sequence[str]) -> None:
        """Brings back those of the series that are in a store, as many as there may be."""
        if all(map(self._slots.__contains__, items)):
            return
        named = set(items)
        unknown = named.difference(self._slots)
        chosen, limit = [item for item in dict.fromkeys(items) if item in unknown], self._judge.max_series
        if limit is not None:
            stay = (named | self._series.pinned) & self._slots.keys() if self._judge.evict else self._slots
            staying = len(stay)
            chosen = chosen[: max(0, limit - staying)]
        self._reload(chosen)
        if self._judge.evict:
            self._make_room(0, named)

    def _make_room(self, count: int, staying: set[str]) -> None:
        """Evicts as many series as it takes for `count` new ones, none of those that stay."""
        limit = self._judge.max_series
        if limit is None or len(self) + count <= limit:
            return
        if not self._judge.evict or len(staying & self._slots.keys()) + count > limit:
            raise ValueError(f"{len(self) + count} series, max_series is {limit}: evict some first")
        going = [item for item in self._slots if item not in staying and item not in self._series.pinned]
        if len(going) < len(self) + count - limit:
            raise ValueError(f"{len(self) + count} series, max_series is {limit}, and the others are pinned")
        self.evict(going, keep=limit - count)

    def fork(self, item_ids: Sequence[str] | None = None) -> Any:
        """A predictor with the same weights and copied states: what happens to one does not reach the other."""
        items = self.item_ids if item_ids is None else tuple(dict.fromkeys(names(item_ids)))
        other = self._empty_twin()
        other._restore(*self._contents(items))
        return other

    def rewind(self, item_ids: Iterable[str] | str, to: Any) -> None:
        """Makes series as if nothing after `to` had been observed; on a fork, if the present is to stay.

        Scores, widths and signals of a series go back with its state. The late window fills again from there: until
        then it reaches to the earliest state that was held.

        Args:
            item_ids: which series.
            to: time of the last step that remains; between two steps, the earlier one.

        Raises:
            KeyError: a series is not known.
            ValueError: `to` lies after the head, or before the earliest state that is held (see `late_window`), which
                is named; nothing has been changed.
        """
        items = tuple(dict.fromkeys(names(item_ids)))
        slots, series, ledger = self._series.find(items), self._series, self._ledger
        if not len(slots):
            return
        head = series.step_of(slots, to) + 1
        ahead = head > ledger.head[slots]
        earliest = np.maximum(np.minimum(series.oldest(slots), ledger.head[slots]), 1)
        if ahead.any():
            item, slot = items[int(ahead.argmax())], int(slots[ahead][0])
            last = series.time_of(slot, int(ledger.head[slot]) - 1)
            raise ValueError(f"cannot rewind {printable(item)!r} to {to}: its last step is {last}")
        if (head < earliest).any():
            row = int((head < earliest).argmax())
            first = series.time_of(int(slots[row]), int(earliest[row]) - 1)
            raise ValueError(
                f"cannot rewind {printable(items[row])!r} to {to}: the earliest time that is held is {first}; "
                "a larger late_window reaches further"
            )
        ledger.forget_after(slots, head)
        back = head < ledger.applied[slots]
        self._engine.replay(slots[back], head[back])
        self._engine.heard.clear()
        for item in items:
            self._held.pop(item, None)

    def save(self, path: str | Path, *, offset: Any = None, item_ids: Iterable[str] | str | None = None) -> None:
        """Writes states into a folder, at one cut; a crash leaves the snapshot before.

        Args:
            path: a folder, made if absent.
            item_ids: which series; all if not given.
            offset: place in the source after what was observed, plain JSON, for `load` to give back.
        """
        items = self.item_ids if item_ids is None else tuple(dict.fromkeys(names(item_ids)))
        tensors, header = self._contents(items)
        snapshot.write(path, tensors, {**header, "offset": offset}, model=self.fingerprint)

    def load(self, path: str | Path, *, merge: Literal["replace", "newer", "refuse"] = "replace") -> Any:
        """Takes states from a folder, bit for bit, and gives back the offset stored with them.

        Args:
            path: written by `save`.
            merge: "replace" puts the folder's series in the place of all that there are. The others add them to those:
                of a series on both sides "newer" takes the one whose head is later (ours, if it is the same), "refuse"
                takes none.

        Raises:
            FileNotFoundError: nothing was saved there.
            SnapshotRefused: of another model, frequency, late window or variates, watched in another way, of a newer
                format, damaged, or with series that are here already (see `merge`); nothing changed. States that nobody
                watched are taken by a predictor that watches: their scores begin.
            ValueError: there would be more than `max_series`; nothing changed.
        """
        if merge not in ("replace", "newer", "refuse"):
            raise ValueError(f"merge is {merge!r}, expected 'replace', 'newer' or 'refuse'")
        tensors, header = snapshot.read(path, model=self.fingerprint)
        header.setdefault("late_window", 0)
        header.setdefault("max_gap", None)
        for name, mine in (
            ("freq", self.freq),
            ("variates", list(self.variates)),
            ("calendar", self.calendar),
            ("late_window", self.late_window),
            ("max_gap", self.max_gap),
        ):
            if header.get(name) != mine:
                raise snapshot.SnapshotRefused(
                    f"the states in {path} have {name} {header.get(name)!r}, expected {mine!r}"
                )
        live.check_watched(path, header.get("watch"), self._series.watch)
        fresh = self._empty_twin()
        try:
            fresh._restore(tensors, header)
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise snapshot.SnapshotRefused(f"the states in {path} do not fit this model: {error}") from None
        if merge == "replace":
            self._adopt(fresh)
        else:
            self._merge(fresh, path, newer=merge == "newer")
        return header.get("offset")

    def _adopt(self, other: "Keeper") -> None:
        if self._judge.max_series is not None and len(other) > self._judge.max_series:
            raise ValueError(f"{len(other)} series, max_series is {self._judge.max_series}: raise it")
        self._set(other._series)

    def _merge(self, other: "Keeper", path: str | Path, *, newer: bool) -> None:
        both = tuple(item for item in other.item_ids if item in self._slots)
        if both and not newer:
            raise snapshot.SnapshotRefused(
                f"series {printable(both[0])!r} of {path} is here already ({len(both)} are): load with merge='newer'"
            )
        behind = self._series.next_times(both) < other._series.next_times(both)
        stale = {item for item, is_behind in zip(both, behind.tolist(), strict=True) if is_behind}
        wanted = [item for item in other.item_ids if item in stale or item not in self._slots]
        self._make_room(len(wanted) - len(stale), {*wanted, *both})
        self.delete(stale)
        self._restore(*other._contents(wanted))

    def state_tensors(self, item_ids: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Everything that is held of series, as named tensors: what `save` writes. Copies."""
        return self._contents(self.item_ids if item_ids is None else names(item_ids))[0]

    def _contents(self, items: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What `_restore` takes: stores keep it too."""
        tensors, header = snapshot.contents(self._series, items)
        header |= {
            "freq": self.freq,
            "variates": list(self.variates),
            "calendar": self.calendar,
            "late_window": self.late_window,
            "max_gap": self.max_gap,
            "watch": live.settings(self._series.watch),
        }
        return tensors, header

    def _restore(self, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
        """Adds series, none of which may be there."""
        snapshot.restore(self._series, tensors, header)
