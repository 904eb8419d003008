"""What becomes of each row: taken in, repeated, late, contradicting, held back, wrong.

All is decided before anything is changed, so that a call can be all or nothing.
"""

from collections.abc import Callable, Mapping, Set
from typing import Any, NamedTuple

import numpy as np

from tsgdn.data.clock import Clock, show
from tsgdn.streaming.pool import Ledger
from tsgdn.streaming.rows import Rejection, Rows

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
    """

    slots: Mapping[str, int]
    ledger: Ledger
    capacity: int
    held: Mapping[str, list[Held]]
    registered: Set[str]
    window: Callable[[int], int] | None = None


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
        self.touched: list[str] = []
        self.known = np.zeros(0, np.int64)  # slots of series that rows came for


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
    ) -> None:
        self.clock, self.variates = clock, variates
        self.max_jump, self.max_series, self.create = max_jump, max_series, create
        self.replace, self.evict = replace, evict

    def __call__(self, rows: Rows, books: Books) -> Plan:
        """What to do about each row; nothing is changed."""
        plan = Plan(list(rows.bad))
        ledger, capacity = books.ledger, books.capacity
        count = len(rows.item_ids)
        plan.touched = list(dict.fromkeys(rows.item_ids))
        get = books.slots.get
        keys = np.fromiter((get(item, -1) for item in rows.item_ids), np.int64, count)
        plan.known = keys[keys >= 0]
        keep = np.ones(count, bool)

        def refuse(i: int, code: str, text: str) -> None:
            keep[i] = False
            plan.bad.append(
                Rejection(code, int(rows.places[i]), rows.item_ids[i], show(np.datetime64(rows.stamps[i])), text)
            )

        unknown = np.flatnonzero(keys < 0)
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
        for begin, size in zip(begins[~single].tolist(), sizes[~single].tolist(), strict=True):
            part = slice(begin, begin + size)
            if odd[begin]:
                self._judge(rows, int(keys[begin]), index[part].tolist(), steps[part].tolist(), plan, books)
            else:
                plan.runs.append((int(keys[begin]), steps[part], rows.values[index[part]]))
        return plan

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
            staying = sum(item in books.slots for item in plan.touched)
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

        def set_aside(row: int | None, stamp: np.datetime64, code: str, text: str) -> None:
            plan.bad.append(Rejection(code, row, item, show(stamp), text))

        def drop_held() -> None:
            for other in held:
                far = f"the time is more than {self.max_jump} steps ahead and the series went on without it"
                set_aside(other.row, other.stamp, "ts.jump", far)
            held.clear()

        def take(step: int, values: np.ndarray) -> None:
            nonlocal head
            plan.gap += step - head
            head = step + 1
            run[step], spoke[step] = values.copy(), told(values)
            absent = bool(np.isnan(values).all())
            plan.missing += absent
            plan.accepted += not absent

        def look_back(step: int, values: np.ndarray, row: int, stamp: np.datetime64) -> None:
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
                look_back(step, values, row, stamp)
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
                        take(other.step, other.values)
                    held.clear()
            else:
                drop_held()
                take(step, values)
        plan.fills += [(key, step, values) for step, values in fills.items()]
        plan.held[item] = held
        plan.holding += sum(other.row is not None for other in held)
        if run:
            plan.runs.append((key, np.fromiter(run, np.int64, len(run)), np.stack(list(run.values()))))


def told(values: np.ndarray) -> np.ndarray:
    """Which variates (last axis) a row speaks for: those with a value, or all when it has none."""
    given = ~np.isnan(values)
    return given | ~given.any(axis=-1, keepdims=True)


def joined(a: ObserveReport, b: ObserveReport) -> ObserveReport:
    """The counts of two calls together."""
    return ObserveReport(
        a.accepted + b.accepted, a.duplicate + b.duplicate, a.late + b.late, a.gap + b.gap, a.missing + b.missing,
        a.rejected + b.rejected, {**b.first, **a.first}, a.held + b.held, a.set_aside + b.set_aside,
        a.revised + b.revised,
    )  # fmt: skip
