"""What becomes of each row: taken in, repeated, late, contradicting, held back, wrong.

All is decided before anything is changed, so that a call can be all or nothing.
"""

from collections.abc import Callable, Mapping, Set
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64

from tsgdn.data.clock import Clock, show
from tsgdn.streaming.pool import Ledger
from tsgdn.streaming.rows import Rejection, Rows, read_stamp

CENTURIES = np.timedelta64(290 * 365, "D")  # int64 nanoseconds reach 292 years


class ObserveReport(NamedTuple):
    """What became of the rows of a call.

    `accepted`, `missing`, `duplicate`, `late`, `rejected`, `held` and `revised` add up to their number.

    Attributes:
        accepted: rows with a value that the state has taken in, or will when their patch is full.
        missing: rows that say "no value"; the clock moves.
        duplicate: rows that repeat what is known; ignored.
        late: older than what can still be filled in; set aside.
        rejected: set aside for another reason, rows held by an earlier call included.
        gap: steps between rows that nobody spoke of.
        held: rows far ahead of their series' clock that wait for two more to agree with them.
        first: per code the item, timestamp and text of the first row set aside.
        set_aside: all of them.
        revised: late or corrected rows within the late window; the state is as if they had come in order.
        pit: where forecasts are watched, the probability that the forecast issued before the patch of each value gave
            to smaller ones: uniform if forecasts are right. NaN where a row was set aside, repeated what is known, or
            was not forecast.
    """

    accepted: int = 0
    duplicate: int = 0
    late: int = 0
    gap: int = 0
    missing: int = 0
    rejected: int = 0
    first: dict[str, tuple[str, str, str]] = {}  # noqa: RUF012  # never written to
    held: int = 0
    set_aside: tuple[Rejection, ...] = ()
    revised: int = 0
    pit: Float64[np.ndarray, "rows V"] | None = None


class Held(NamedTuple):
    """A row far ahead of its series' clock; `row` is its place in the call that brought it."""

    step: int
    stamp: np.datetime64
    values: np.ndarray
    row: int | None


class Books(NamedTuple):
    """What is known before a call.

    Attributes:
        slots: of the series.
        ledger: their clocks and last cells.
        capacity: slots there are.
        held: rows that wait for others to agree with them.
        registered: series that may come though unknown.
        window: the first step of a slot whose cell may still be revised; none if not given.
        pinned: series that do not make room for others.
    """

    slots: Mapping[str, int]
    ledger: Ledger
    capacity: int
    held: Mapping[str, list[Held]]
    registered: Set[str]
    window: Callable[[int], int] | None = None
    pinned: frozenset[str] | set[str] = frozenset()


class Plan:
    """What a call will do, decided before anything is changed.

    Series are named by key: their slot, or, for new ones, the pool's capacity plus their place in `created`.
    """

    def __init__(self, bad: list[Rejection]) -> None:
        self.bad = bad
        self.created: dict[str, np.datetime64] = {}
        self.tick: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None  # keys, steps, values (B, V)
        self.runs: list[tuple[int, np.ndarray, np.ndarray]] = []  # key, steps (n,), values (n, V)
        self.fills: list[tuple[int, int, np.ndarray]] = []  # key, step, values (V,), NaN where nothing changes
        self.held: dict[str, list[Held]] = {}  # replaces what is held of these items
        self.evicted = 0  # how many series make room for those created
        self.accepted = self.duplicate = self.missing = self.gap = self.holding = self.revised = 0
        self.known = np.zeros(0, np.int64)  # slots of series that rows came for
        self.taken: list[tuple[np.ndarray, ...]] = []  # places, keys, steps, rows within `Rows` of rows taken in

    def placed(self) -> tuple[np.ndarray, ...]:
        """Places in the call, keys, steps and places within `Rows` of the rows of this call that are taken in."""
        if not self.taken:
            return tuple(np.zeros(0, np.int64) for _ in range(4))
        return tuple(np.concatenate(parts) for parts in zip(*self.taken, strict=True))

    def report(self, pit: np.ndarray | None = None) -> ObserveReport:
        """What became of the rows."""
        if not self.bad:
            return ObserveReport(
                self.accepted, self.duplicate, 0, self.gap, self.missing, 0, {}, self.holding, (), self.revised, pit
            )
        self.bad.sort(key=lambda bad: -1 if bad.row is None else bad.row)
        first: dict[str, tuple[str, str, str]] = {}
        for bad in self.bad:
            first.setdefault(bad.code, (bad.item_id, bad.timestamp, bad.text))
        late = sum(bad.code == "ts.late" for bad in self.bad)
        return ObserveReport(
            self.accepted, self.duplicate, late, self.gap, self.missing, len(self.bad) - late, first, self.holding,
            tuple(self.bad), self.revised, pit,
        )  # fmt: skip


class Judge:
    """The rules by which rows are judged.

    Args:
        clock: of all series.
        variates: names along V.
        max_jump: steps that a series may leave out at once.
        max_series: how many there may be.
        create: whether unknown series are welcome.
        replace: whether another value for a cell within the late window takes the place of the first.
        evict: whether series that are not in the call make room for new ones.
        nearest: whether rows within a tenth of a step of the grid move onto it.
        max_future_skew: seconds by which a row may be ahead of when it was received; None = any number.
    """

    def __init__(
        self,
        clock: Clock,
        variates: tuple[str, ...],
        *,
        max_jump: int,
        max_series: int | None,
        create: bool,
        replace: bool = False,
        evict: bool = False,
        nearest: bool = False,
        max_future_skew: int | float | None = None,
    ) -> None:
        self.clock, self.variates = clock, variates
        self.max_jump, self.max_series, self.create = max_jump, max_series, create
        self.replace, self.evict, self.nearest = replace, evict, nearest
        limit: Any = None if max_future_skew is None else np.timedelta64(round(max_future_skew * 1e9), "ns")
        self.skew: Any = limit

    def __call__(self, rows: Rows, books: Books, *, received: Any = None) -> Plan:
        """What to do about each row; nothing is changed.

        Args:
            rows: that could be read.
            books: what is known before.
            received: when the source got them: one time, or one per row of the call.

        Raises:
            ValueError: `received` is no time, or not one per row.
        """
        plan = Plan(list(rows.bad))
        ledger, capacity = books.ledger, books.capacity
        count = len(rows.item_ids)
        future = None if received is None or self.skew is None else self._future(rows, received)
        try:
            keys = np.fromiter(map(books.slots.__getitem__, rows.item_ids), np.int64, count)
        except KeyError:
            keys = np.fromiter((books.slots.get(item, -1) for item in rows.item_ids), np.int64, count)
        else:
            plan.known = keys
            if future is None and not books.held and self._plain(rows, keys, ledger, plan):
                return plan
        plan.known = keys[keys >= 0]
        keep = np.ones(count, bool)

        def refuse(i: int, code: str, text: str) -> None:
            keep[i] = False
            plan.bad.append(
                Rejection(code, int(rows.places[i]), rows.item_ids[i], show(np.datetime64(rows.stamps[i])), text)
            )

        if future is not None:
            limit = np.float64(np.asarray(self.skew).astype(np.int64)) / 1e9
            for i in np.flatnonzero(future).tolist():
                text = f"the time is more than {limit:g} s after it was received"
                refuse(i, "ts.future", text)
        unknown = np.flatnonzero((keys < 0) & keep)
        if len(unknown):
            self._begin(rows, unknown, keys, plan, books, refuse)
        keep &= keys >= 0
        index = np.flatnonzero(keep)
        keys, stamps = keys[index], rows.stamps[index]
        fresh = keys >= capacity
        if fresh.any():
            new_starts = np.fromiter(plan.created.values(), "datetime64[ns]", len(plan.created))
            starts: Any = np.empty(len(keys), "datetime64[ns]")
            starts[~fresh] = ledger.start[keys[~fresh]]
            starts[fresh] = new_starts[keys[fresh] - capacity]
            heads = np.zeros(len(keys), np.int64)
            heads[~fresh] = ledger.head[keys[~fresh]]
        else:
            starts, heads = ledger.start[keys], ledger.head[keys]

        apart = np.abs(stamps.astype("M8[D]") - starts.astype("M8[D]")) > CENTURIES
        for i in np.flatnonzero(apart).tolist():
            refuse(int(index[i]), "ts.range", "the time is centuries away from the first of its series")
        steps = np.zeros(len(keys), np.int64)
        steps[~apart], on_grid = self.clock.steps(starts[~apart], stamps[~apart])
        if self.nearest and not on_grid.all():
            off = np.flatnonzero(~apart)[~on_grid]
            steps[off], on_grid[~on_grid] = self._snapped(starts[off], stamps[off], steps[off])
        for i in np.flatnonzero(~apart)[~on_grid].tolist():
            text = f"the time is not on the grid of {self.clock.freq!r} that starts at {show(starts[i])}"
            refuse(int(index[i]), "ts.grid", text)
        good = keep[index]
        index, keys, steps, heads = index[good], keys[good], steps[good], heads[good]

        order = np.lexsort((steps, keys))
        index, keys, steps, heads = index[order], keys[order], steps[order], heads[order]
        first = np.ones(len(keys), bool)
        first[1:] = keys[1:] != keys[:-1]
        previous = heads - 1
        previous[1:] = np.where(first[1:], previous[1:], steps[:-1])
        ahead = steps - previous
        odd = (ahead < 1) | (ahead > self.max_jump)
        if books.held:
            held = [books.slots[item] for item in books.held if item in books.slots]
            odd |= np.isin(keys, held)
        if odd.any():
            odd = np.isin(keys, keys[odd])
        begins = np.flatnonzero(first)
        sizes = np.diff(np.append(begins, len(keys)))
        single = (sizes == 1) & (ahead[begins] == 1) & ~odd[begins]
        at = begins[single]
        plan.tick = (keys[at], steps[at], rows.values[index[at]])
        plain = np.flatnonzero(~odd)
        absent = int(np.isnan(rows.values[index[plain]]).all(axis=1).sum())
        plan.missing += absent
        plan.accepted += len(plain) - absent
        plan.gap += int((ahead[plain] - 1).sum())
        plan.taken.append((rows.places[index[plain]], keys[plain], steps[plain], index[plain]))
        for begin, size in zip(begins[~single].tolist(), sizes[~single].tolist(), strict=True):
            part = slice(begin, begin + size)
            if odd[begin]:
                self._judge(rows, int(keys[begin]), index[part].tolist(), steps[part].tolist(), plan, books)
            else:
                plan.runs.append((int(keys[begin]), steps[part], rows.values[index[part]]))
        return plan

    def _plain(self, rows: Rows, keys: np.ndarray, ledger: Ledger, plan: Plan) -> bool:
        """Plans a call whose rows are the next steps of known series, one each; False if they are anything else."""
        count = len(keys)
        if not count:
            return False
        order = None
        if not bool((keys[1:] > keys[:-1]).all()):
            order = np.argsort(keys, kind="stable")
            keys = keys[order]
            if bool((keys[1:] == keys[:-1]).any()):
                return False
        stamps: Any = rows.stamps if order is None else rows.stamps[order]
        starts: Any = ledger.start[keys]
        low, high = starts.min().astype("M8[D]"), starts.max().astype("M8[D]")
        if stamps.max().astype("M8[D]") - low > CENTURIES or high - stamps.min().astype("M8[D]") > CENTURIES:
            return False
        steps, on_grid = self.clock.steps(starts, stamps)
        if not bool(on_grid.all()) or not bool((steps == ledger.head[keys]).all()):
            return False
        values = rows.values if order is None else rows.values[order]
        plan.missing = int(np.isnan(values).all(axis=1).sum())
        plan.accepted = count - plan.missing
        plan.tick = (keys, steps, values)
        at = np.arange(count) if order is None else order
        plan.taken.append((rows.places[at], keys, steps, at))
        return True

    def _future(self, rows: Rows, received: Any) -> np.ndarray:
        """Which rows are further ahead of their receipt than is believed."""
        if isinstance(received, list | tuple | np.ndarray):
            total = len(rows.item_ids) + len(rows.bad)
            if len(received) != total:
                raise ValueError(f"received has {len(received)} times for {total} rows: give one, or one per row")
            when = np.array([read_stamp(time) for time in received], "M8[ns]")[rows.places]
        else:
            when = read_stamp(received)
        return rows.stamps - when > self.skew

    def _snapped(self, starts: np.ndarray, stamps: np.ndarray, below: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The nearest steps of times that lie between two, and whether they are within a tenth of a step."""
        low, high = self.clock.timestamp(starts, below), self.clock.timestamp(starts, below + 1)
        up = high - stamps < stamps - low
        distance, size = np.where(up, high - stamps, stamps - low).astype(np.int64), (high - low).astype(np.int64)
        return below + up, 10 * distance <= size

    def _begin(
        self,
        rows: Rows,
        unknown: np.ndarray,
        keys: np.ndarray,
        plan: Plan,
        books: Books,
        refuse: Callable[[int, str, str], None],
    ) -> None:
        """Gives keys to the rows of series that will be created, and refuses the others."""
        staying = len(books.slots)
        if self.evict and self.max_series is not None:
            staying = sum(item in books.slots for item in books.pinned.union(rows.item_ids))
        room = None if self.max_series is None else self.max_series - staying
        possible = self.clock.on_grid(rows.stamps[unknown])
        numbers: dict[str, int] = {}
        starts: list[np.datetime64] = []
        for i, may_start in zip(unknown.tolist(), possible.tolist(), strict=True):
            item = rows.item_ids[i]
            stamp: np.datetime64 = rows.stamps[i]  # pyright: ignore[reportAssignmentType]
            if not self.create and item not in books.registered:
                refuse(i, "item.unknown", "the series is not known: warm_up or register it first")
            elif not may_start:
                refuse(i, "ts.grid", f"a series of freq {self.clock.freq!r} cannot start at {show(stamp)}")
            elif item not in numbers and room is not None and len(numbers) >= room:
                refuse(i, "series.quota", f"there are {self.max_series} series already: raise max_series or evict")
            else:
                number = numbers.setdefault(item, len(numbers))
                if number == len(starts):
                    starts.append(stamp)
                elif stamp < starts[number]:
                    starts[number] = stamp
                keys[i] = books.capacity + number
        plan.created = dict(zip(numbers, starts, strict=True))
        if self.evict and self.max_series is not None:
            plan.evicted = max(0, len(books.slots) + len(numbers) - self.max_series)

    def _judge(self, rows: Rows, key: int, index: list[int], steps: list[int], plan: Plan, books: Books) -> None:
        """The verdicts on one series' rows, sorted by step, where not all of them simply go on."""
        ledger, known = books.ledger, key < books.capacity
        item = rows.item_ids[index[0]]
        old_head = head = int(ledger.head[key]) if known else 0
        applied = int(ledger.applied[key]) if known else 0
        window = None if books.window is None else books.window(key) if known else 0
        run: dict[int, np.ndarray] = {}
        spoke: dict[int, np.ndarray] = {}
        fills: dict[int, np.ndarray] = {}
        held = list(books.held.get(item, ()))
        numbers = {int(rows.places[i]): i for i in index}

        def set_aside(row: int | None, stamp: np.datetime64, code: str, text: str) -> None:
            plan.bad.append(Rejection(code, row, item, show(stamp), text))

        def drop_held() -> None:
            for other in held:
                far = f"the time is more than {self.max_jump} steps ahead and the series went on without it"
                set_aside(other.row, other.stamp, "ts.jump", far)
            held.clear()

        def note(i: int | None, step: int) -> None:
            if i is not None:
                place = int(rows.places[i])
                plan.taken.append(tuple(np.array([x], np.int64) for x in (place, key, step, i)))

        def take(step: int, values: np.ndarray, i: int | None) -> None:
            nonlocal head
            note(i, step)
            plan.gap += step - head
            head = step + 1
            run[step], spoke[step] = values.copy(), told(values)
            absent = bool(np.isnan(values).all())
            plan.missing += absent
            plan.accepted += not absent

        def look_back(step: int, values: np.ndarray, row: int, stamp: np.datetime64, i: int) -> None:
            if step < max(0, old_head - ledger.ring):
                set_aside(row, stamp, "ts.late", f"the time is before the last {ledger.ring} steps: state untouched")
                return
            if step >= old_head:
                nothing = np.full(len(values), np.nan)
                seen, spoken = run.get(step, nothing), spoke.get(step, np.zeros(len(values), bool))
            else:
                place = step % ledger.ring
                seen, spoken = ledger.recent[key, :, place], ledger.told[key, :, place]
                if step in fills:
                    filled = ~np.isnan(fills[step])
                    seen, spoken = np.where(filled, fills[step], seen), spoken | filled
            given = ~np.isnan(values)
            differs = given & spoken & ~np.isnan(seen) & (values != seen)
            belated = given & ((spoken & np.isnan(seen)) | (~spoken & (step < applied)))
            may_revise = window is not None and step >= window
            if differs.any() and not (may_revise and self.replace):
                v = int(differs.argmax())
                text = f"{self.variates[v]} was {seen[v]:g} before and is {values[v]:g} now: the first one stays"
                set_aside(row, stamp, "ts.conflict", text)
                return
            if belated.any() and not may_revise:
                set_aside(row, stamp, "ts.late", "the step has passed as missing: state untouched")
                return
            changed = differs | belated | (given & ~spoken)
            if not changed.any():
                plan.duplicate += 1
                return
            note(i, step)
            if differs.any() or belated.any():
                plan.revised += 1
            else:
                plan.accepted += 1
            if step in run:
                run[step][changed], spoke[step][changed] = values[changed], True
            else:
                fills[step] = np.where(changed, values, fills.get(step, np.nan))

        for i, step in zip(index, steps, strict=True):
            values, stamp, row = rows.values[i], rows.stamps[i], int(rows.places[i])
            if step < head:
                look_back(step, values, row, stamp, i)
            elif step - head >= self.max_jump:
                last = held[-1] if held else None
                if last is not None and step == last.step:
                    if np.array_equal(values, last.values, equal_nan=True):
                        plan.duplicate += 1
                    else:
                        set_aside(row, stamp, "ts.conflict", "another value for this time is held already")
                    continue
                if last is not None and not 0 < step - last.step <= self.max_jump:
                    drop_held()
                held.append(Held(step, stamp, values.copy(), row))
                if len(held) == 3:
                    for other in held:
                        take(other.step, other.values, None if other.row is None else numbers[other.row])
                    held.clear()
            else:
                drop_held()
                take(step, values, i)
        plan.fills += [(key, step, values) for step, values in fills.items()]
        plan.held[item] = held
        plan.holding += sum(other.row is not None for other in held)
        if run:
            plan.runs.append((key, np.fromiter(run, np.int64, len(run)), np.stack(list(run.values()))))


def told(values: np.ndarray) -> np.ndarray:
    """Which variates (last axis) a row speaks for: those with a value, or all when it has none."""
    given = ~np.isnan(values)
    return given | ~given.any(axis=-1, keepdims=True)


def plain(values: np.ndarray) -> list[float | None]:
    """Values as JSON knows them."""
    return [None if np.isnan(x) else float(x) for x in values]


def joined(a: ObserveReport, b: ObserveReport) -> ObserveReport:
    """The counts of two calls together."""
    # PITs belong to the rows of one call
    return ObserveReport(
        a.accepted + b.accepted, a.duplicate + b.duplicate, a.late + b.late, a.gap + b.gap, a.missing + b.missing,
        a.rejected + b.rejected, {**b.first, **a.first}, a.held + b.held, a.set_aside + b.set_aside,
        a.revised + b.revised,
    )  # fmt: skip
