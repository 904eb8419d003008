"""Cells into states: what waits in the ledger reaches the model when its patch is finished, all series in one batch.

`Engine.advance` is the only place where values enter a state, and where forecasts are seen to come true: the watch of a
series stands where its state stands, so that whatever puts a state back or moves it on does the same with its scores.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float64

from tsgdn.model.forecaster import Forecaster
from tsgdn.streamable import map_state, take_rows
from tsgdn.streaming.residence import Residents
from tsgdn.streaming.verdicts import told
from tsgdn.streaming.worth import Heard
from tsgdn.types import Batch, Quantiles

WATCHED = 512  # steps whose forecasts are kept at once while histories are watched


SHORT = 2  # patches: runs of many series that are no longer are taken in step by step
MANY = 16  # series


class Piece(NamedTuple):
    """`gap` silent steps, then consecutive cells (V, n) and whether someone spoke for them."""

    gap: int
    values: np.ndarray
    told: np.ndarray


class Engine:
    """Moves the states of series on.

    Args:
        model: in evaluation mode.
        series: whose states they are.
        targets: leading variates that are forecast.
        block: series per call of the model at most; with `exact` the number of all calls.
        exact: calls of one size, patch by patch.
        max_gap: steps of silence after which the next value finds an empty memory; None = never.

    Attributes:
        heard: what the watch heard since somebody emptied this list.
    """

    def __init__(
        self, model: Forecaster, series: Residents, *, targets: int, block: int, exact: bool, max_gap: int | None
    ) -> None:
        self.model, self.series, self.targets = model, series, targets
        self.block, self.exact, self.max_gap = block, exact, max_gap
        self.long_gap = 32 * model.patch_size  # beyond it silence is skipped in closed form
        self.heard: list[Heard] = []
        self._device = series.device

    # ---- rows -------------------------------------------------------------------------------------------------------

    def tick(
        self,
        slots: np.ndarray,
        steps: np.ndarray,
        values: Float64[np.ndarray, "B V"],
        spoken: Bool[np.ndarray, "B V"] | None = None,
    ) -> None:
        """Takes in the next step of each series; `spoken` tells for which cells somebody spoke, if not by values."""
        ledger, P = self.series.ledger, self.model.patch_size
        given = ~np.isnan(values)
        if spoken is None:
            spoken = given if given.all() else told(values)
        ledger.write(slots, steps, values, spoken)
        ledger.head[slots] = heads = steps + 1
        ledger.values[slots] += given.sum(axis=1)
        due = heads // P * P > ledger.applied[slots]  # else no patch can be finished
        if due.any():
            self.close(slots if due.all() else slots[due])

    def runs(self, slots: np.ndarray, runs: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
        """Takes in several steps (n,) and values (n, V) of each series, from its head on."""
        heads = self.series.ledger.head[slots]
        spans = np.array([int(steps[-1]) for steps, _ in runs], np.int64) + 1 - heads
        short = spans <= SHORT * self.model.patch_size
        if short.sum() < MANY:
            short[:] = False
        else:
            some = [runs[i] for i in np.flatnonzero(short).tolist()]
            self._short_runs(slots[short], heads[short], spans[short], some)
        rest = np.flatnonzero(~short)
        if len(rest):
            pieces = [self._pieces(int(heads[i]), *runs[i]) for i in rest.tolist()]
            self.extend(slots[rest], pieces, by_patch=self.exact)

    def _short_runs(
        self, slots: np.ndarray, heads: np.ndarray, spans: np.ndarray, runs: Sequence[tuple[np.ndarray, np.ndarray]]
    ) -> None:
        """Steps of many series in turn: Python works per step, not per series."""
        V, T = self.series.variates, int(spans.max())
        row = np.repeat(np.arange(len(slots)), [len(steps) for steps, _ in runs])
        place = np.concatenate([steps for steps, _ in runs]) - heads[row]
        cells, spoken = np.full((T, len(slots), V), np.nan), np.zeros((T, len(slots), V), bool)
        values = np.concatenate([values for _, values in runs])
        cells[place, row], spoken[place, row] = values, told(values)
        for t in range(T):
            live = np.flatnonzero(spans > t)
            self.tick(slots[live], heads[live] + t, cells[t, live], spoken[t, live])

    def fill(self, fills: Sequence[tuple[int, int, np.ndarray]]) -> None:
        """Writes cells (slot, step, values) of the past; streams again what the model had taken in without them."""
        if not fills:
            return
        ledger = self.series.ledger
        slots, steps = (np.array([fill[i] for fill in fills], np.int64) for i in (0, 1))
        values = np.stack([fill[2] for fill in fills])
        places = steps % ledger.ring
        given = ~np.isnan(values)
        before, spoken = ledger.recent[slots, :, places], ledger.told[slots, :, places]
        np.add.at(ledger.values, slots, (given & np.isnan(before)).sum(axis=1))
        ledger.recent[slots, :, places] = np.where(given, values, before)
        ledger.told[slots, :, places] = spoken | given
        order = np.lexsort((steps, slots))
        some, where = np.unique(slots[order], return_index=True)
        first = steps[order][where]
        past = first < ledger.applied[some]
        self.close(some[~past])
        self.replay(some[past], first[past])

    def replay(self, slots: np.ndarray, first: np.ndarray) -> None:
        """Streams the ring's cells again, from the last anchors at or before `first` (B,) on."""
        if not len(slots):
            return
        ledger, before = self.series.ledger, self.series.ledger.applied[slots]
        self.series.restore_anchors(slots, first)
        begin = ledger.applied[slots]
        quiet, before = before, np.where(before <= ledger.head[slots], before, begin)
        end = np.maximum(self.finished(slots, before), begin)
        due = end > begin
        if due.any():
            slots, begin, lengths = slots[due], begin[due], (end - begin)[due]
            cells = ledger.cells(slots, begin, int(lengths.max()))
            self.advance(slots, cells, lengths, self.exact, quiet=quiet[due])

    def close(self, slots: np.ndarray) -> None:
        """Gives the model the patches that wait in the ring, of those series whose patch is finished."""
        ledger = self.series.ledger
        applied = ledger.applied[slots]
        end = self.finished(slots, applied)
        lengths = end - applied
        due = lengths > 0
        if due.all() and len(slots):
            self.advance(slots, ledger.cells(slots, applied, int(lengths.max())), lengths, self.exact)
        elif due.any():
            cells = ledger.cells(slots[due], applied[due], int(lengths.max()))
            self.advance(slots[due], cells, lengths[due], self.exact)

    def finished(self, slots: np.ndarray, begin: np.ndarray) -> np.ndarray:
        """Where the last finished patch of each series ends; `begin`, which lies behind the head, if there is none.

        A patch is finished when a row beyond it has come, or all of its cells from `begin` on are told: until then
        those that are missing may still be filled.
        """
        ledger, P = self.series.ledger, self.model.patch_size
        heads = ledger.head[slots]
        end = heads // P * P
        at = np.flatnonzero((end == heads) & (end > begin))
        if len(at):
            places = (end[at, None] + np.arange(-P, 0)) % ledger.ring
            spoken = np.take_along_axis(ledger.told[slots[at]], places[:, None], axis=2).all(axis=1)
            spoken |= end[at, None] + np.arange(-P, 0) < begin[at, None]
            end[at] -= np.where(spoken.all(axis=1), 0, P)
        return np.maximum(end, begin)

    def _pieces(self, head: int, steps: np.ndarray, values: Float64[np.ndarray, "n V"]) -> list[Piece]:
        """Rows as dense cells, cut where silence is long enough to be skipped."""
        P = self.model.patch_size
        gaps = np.diff(steps, prepend=head - 1) - 1
        cuts = np.flatnonzero(gaps > self.long_gap)
        pieces = []
        for a, b in zip([0, *cuts.tolist()], [*cuts.tolist(), len(steps)], strict=True):
            if a == b:
                continue
            begin = int(steps[a - 1]) + 1 if a else head
            # silence is skipped up to the patch of the next row: its other cells may still come
            gap = int(steps[a]) // P * P - begin if gaps[a] > self.long_gap else 0
            begin += gap
            cells = np.full((values.shape[1], int(steps[b - 1]) + 1 - begin), np.nan)
            spoken = np.zeros(cells.shape, bool)
            cells[:, steps[a:b] - begin] = values[a:b].T
            spoken[:, steps[a:b] - begin] = told(values[a:b]).T
            pieces.append(Piece(gap, cells, spoken))
        return pieces

    def extend(self, slots: np.ndarray, pieces: list[list[Piece]], *, chunk: int = 4096, by_patch: bool) -> None:
        """Takes in runs of cells, one list of pieces per series, and hands whole patches to the model."""
        ledger, V = self.series.ledger, self.series.variates
        todo: list[list[Piece]] = []
        for slot, run in zip(slots.tolist(), pieces, strict=True):
            applied, head = int(ledger.applied[slot]), int(ledger.head[slot])
            waiting = ledger.cells(np.array([slot]), np.array([applied]), head - applied)[0]
            for piece in run:
                silence = np.full((V, min(piece.gap, ledger.ring)), np.nan)
                ledger.write_run(slot, head + piece.gap - silence.shape[1], silence, np.zeros(silence.shape, bool))
                ledger.write_run(slot, head + piece.gap, piece.values, piece.told)
                ledger.values[slot] += int((~np.isnan(piece.values)).sum())
                head += piece.gap + piece.values.shape[1]
            ledger.head[slot] = head
            if run[0].gap:
                run = [Piece(0, waiting, waiting), *run]
            else:
                run = [run[0]._replace(values=np.concatenate([waiting, run[0].values], 1)), *run[1:]]
            last = run[-1]
            begin = np.array([head - last.values.shape[1]])
            whole = int((self.finished(np.array([slot]), begin) - begin)[0])  # the rest waits for its patch to fill
            todo.append([*run[:-1], last._replace(values=last.values[:, :whole])])
        for number in range(max(map(len, todo), default=0)):
            active = [i for i, run in enumerate(todo) if len(run) > number]
            gaps = np.array([todo[i][number].gap for i in active], np.int64)
            for gap in np.unique(gaps[gaps > 0]).tolist():
                self._elapse(slots[[i for i, g in zip(active, gaps.tolist(), strict=True) if g == gap]], gap, by_patch)
            active = [i for i in active if todo[i][number].values.shape[1]]
            active.sort(key=lambda i: -todo[i][number].values.shape[1])
            for a, b in _blocks([todo[i][number].values.shape[1] for i in active], self.block, chunk):
                block = active[a:b]
                lengths = np.array([todo[i][number].values.shape[1] for i in block])
                for begin in range(0, int(lengths[0]), chunk):
                    rest = np.clip(lengths - begin, 0, chunk)
                    rest = rest[rest > 0]
                    cells = np.full((len(rest), V, int(rest[0])), np.nan)
                    for row, (i, length) in enumerate(zip(block, rest.tolist(), strict=False)):
                        cells[row, :, :length] = todo[i][number].values[:, begin : begin + length]
                    self.advance(slots[block[: len(rest)]], cells, rest, by_patch)

    # ---- states -----------------------------------------------------------------------------------------------------

    def advance(
        self,
        slots: np.ndarray,
        cells: Float64[np.ndarray, "B V T"],
        lengths: np.ndarray,
        by_patch: bool,
        *,
        quiet: np.ndarray | None = None,
    ) -> None:
        """Gives cells to the model, with stops where anchors lie, or at the end of each patch.

        Args:
            slots: each once.
            cells: from `applied` on; NaN = missing.
            lengths: how many of them each series takes.
            by_patch: stop at the end of each patch.
            quiet: steps (B,) before which signals were spoken of already.
        """
        series, P = self.series, self.model.patch_size
        ledger, anchors = series.ledger, series.anchors
        begin = ledger.applied[slots]
        end = begin + lengths
        at = begin
        while True:
            live = np.flatnonzero(at < end)
            if not len(live):
                break
            stop = end if anchors is None else anchors.next_stop(at, end)
            if by_patch:
                stop = np.minimum(stop, (at // P + 1) * P)
            if series.watch is not None:
                stop = np.minimum(stop, (at // P + max(1, WATCHED // P)) * P)
            if self.max_gap is not None:
                stop = self._reset_silent(slots, cells, begin, stop, end)
                live = np.flatnonzero(at < stop)
            some, todo = slots[live], (stop - at)[live]
            part = _shifted(cells, live, (at - begin)[live], P if by_patch else int(todo.max(initial=0)))
            for a in range(0, len(live), self.block):
                block = slice(a, a + self.block)
                now, steps = some[block], todo[block]
                state, quantiles = self.moved(
                    now, part[block], steps, at=ledger.applied[now], read=series.watch is not None
                )
                series.pool.put(now, state)
                if series.watch is not None:
                    self._watch(now, part[block], steps, quantiles, None if quiet is None else quiet[live][block])
                ledger.applied[now] += steps
            series.note_anchors(some)
            at = ledger.applied[slots]
        series.features.trim(slots)

    def _watch(
        self, slots: np.ndarray, cells: np.ndarray, lengths: np.ndarray, quantiles: Quantiles, quiet: np.ndarray | None
    ) -> None:
        """Scores the cells that a state has just taken in, and keeps the forecasts of its new tokens."""
        watch, V, P = self.series.watch, self.targets, self.model.patch_size
        if watch is None:
            return
        count = int(lengths.max())
        heard = watch.advance(
            slots,
            self.series.ledger.applied[slots],
            cells[:, :V, :count],
            lengths,
            quantiles.unscaled()[:, :V, :, P:].cpu().numpy(),
            quantiles.scale[:, :V].cpu().numpy(),
            quantiles.valid.cpu().numpy(),
        )
        self.heard.append(heard if quiet is None else heard.after(quiet))

    def _reset_silent(
        self, slots: np.ndarray, cells: np.ndarray, begin: np.ndarray, stop: np.ndarray, end: np.ndarray
    ) -> np.ndarray:
        """Stops (B,) before the patches whose values come after more than `max_gap` steps of empty patches.

        Series that stand at such a patch already have their memories emptied here.
        """
        ledger, P = self.series.ledger, self.model.patch_size
        limit: Any = self.max_gap
        at = ledger.applied[slots]
        state = self.series.pool.take(slots)
        silent, seen = state.silent.cpu().numpy(), (state.scaling.count > 0).any(1).cpu().numpy()
        places = np.arange(cells.shape[2])
        steps = begin[:, None] + places
        spoken = ~np.isnan(cells).all(axis=1) & (steps < stop[:, None]) & (steps >= at[:, None])
        rows, columns = np.nonzero(spoken)
        patch = np.full(spoken.shape, -1)
        patch[rows, columns] = steps[rows, columns] // P
        # the patch of the latest value before each cell; those before this call lie `silent` patches back
        before = np.maximum.accumulate(np.concatenate([(at // P - 1 - silent)[:, None], patch], 1), axis=1)[:, :-1]
        late = spoken & ((patch - before - 1) * P > limit)
        # a series that had no value at all has nothing to forget
        first_value = spoken.argmax(axis=1)
        late[np.arange(len(late)), first_value] &= seen
        due = late.any(axis=1)
        where = steps[np.arange(len(steps)), late.argmax(axis=1)] // P * P
        now = due & (where <= at)
        if now.any():
            some = slots[now]
            self.series.reset_memory(some)
            ledger.reset[some] = at[now] + 1
            left = ~np.isnan(cells) & (steps >= at[:, None])[:, None] & (steps < end[:, None])[:, None]
            rest = ledger.cells(some, end[now], self.model.patch_size)
            there = (end[now, None] + np.arange(P)) < ledger.head[some][:, None]
            ledger.values[some] = left[now].sum((1, 2)) + (~np.isnan(rest) & there[:, None]).sum((1, 2))
            return self._reset_silent(slots, cells, begin, stop, end)
        return np.where(due, np.maximum(where, at), stop)

    @torch.no_grad()
    def moved(
        self,
        slots: np.ndarray,
        cells: Float64[np.ndarray, "B V T"],
        lengths: np.ndarray,
        *,
        at: np.ndarray,
        state: Any = None,
        read: bool = False,
    ) -> tuple[Any, Quantiles]:
        """States, the pool's if none are given, at the steps `at` (B,) after `lengths` more cells.

        The pool is not changed. With `read` the forecasts of all tokens are computed too.
        """
        count = len(slots)
        if self.exact:
            rows = self.bucket(count)
            cells, lengths, asked, at = cells[rows], lengths[rows], slots[rows], at[rows]
        else:
            asked = slots
        T = cells.shape[2]
        values = torch.from_numpy(np.ascontiguousarray(cells))
        device = self._device
        even = not self.exact and bool((lengths == T).all())
        there = ~values.isnan()
        if not even:
            there &= (torch.arange(T) < torch.from_numpy(lengths)[:, None])[:, None]
        batch = Batch(
            values.nan_to_num(nan=0.0).to(device),
            there.to(device),
            self.series.features.columns(asked, at, T + self.model.span),
            lengths=None if even else torch.from_numpy(lengths).to(device),
        )
        tokens = None if read else torch.zeros(0, dtype=torch.int64, device=device)
        quantiles, after = self.model(batch, self.states(slots, state), read=tokens)
        if len(asked) > count:
            after = map_state(lambda leaf: leaf[:count], after)
            quantiles = Quantiles(*(leaf[:count] for leaf in quantiles))
        return after, quantiles

    def bucket(self, count: int) -> np.ndarray:
        """Which rows go into a call of the model: all, or with `exact` as many as a bucket has, the first repeated."""
        rows = np.arange(count)
        return (
            np.append(rows, np.zeros(self.block - count, np.int64)) if 0 < count < self.block and self.exact else rows
        )

    def states(self, slots: np.ndarray, state: Any = None) -> Any:
        """The states that a call of the model reads, those of the pool if none are given."""
        if not self.exact:
            return self.series.pool.take(slots) if state is None else state
        rows = self.bucket(len(slots))
        if state is None:
            # bits may depend on where in memory a tensor begins
            return map_state(torch.clone, self.series.pool.take(slots[rows]))
        return take_rows(state, torch.from_numpy(rows).to(self._device))

    def _elapse(self, slots: np.ndarray, gap: int, by_patch: bool) -> None:
        """Silence, in closed form, with stops where anchors lie; patch by patch for as long as it makes tokens."""
        series = self.series
        ledger, anchors = series.ledger, series.anchors
        if by_patch or series.watch is not None:
            first = min(gap, (self.model.gap_tokens + 2) * self.model.patch_size)
            nothing = np.full((len(slots), series.variates, first), np.nan)
            self.advance(slots, nothing, np.full(len(slots), first), by_patch)
            gap -= first
        end = ledger.applied[slots] + gap
        while True:
            at = ledger.applied[slots]
            stop = end if anchors is None else anchors.next_stop(at, end)
            rest = stop - at
            if not rest.any():
                break
            for silence in np.unique(rest[rest > 0]).tolist():
                some = slots[rest == silence]
                for begin in range(0, len(some), self.block):
                    part = some[begin : begin + self.block]
                    series.pool.put(part, self.silent(part, silence, at=ledger.applied[part]))
                    ledger.applied[part] += silence
                if series.watch is not None:
                    series.watch.turn(some, ledger.applied[some] - 1)
                series.note_anchors(some)
        series.features.trim(slots)

    @torch.no_grad()
    def silent(self, slots: np.ndarray, steps: int, *, at: np.ndarray, state: Any = None) -> Any:
        """States, the pool's if none are given, at the steps `at` (B,) after so many more without a value.

        The pool is not changed.
        """
        rows = self.bucket(len(slots))

        def known(a: int, b: int) -> Any:
            return self.series.features.columns(slots[rows], at[rows] + a, b - a)

        after = self.model.elapse(self.states(slots, state), steps, known=known if self.model.known_features else None)
        return map_state(lambda leaf: leaf[: len(slots)], after)

    def waited(self, slots: np.ndarray, *, refresh: bool) -> Any:
        """Copies of the states that have taken in the waiting cells; `refresh` also where none waits."""
        ledger = self.series.ledger
        at = ledger.applied[slots]
        lengths = ledger.head[slots] - at
        if not self.exact:
            if not (lengths.any() or refresh):
                return self.series.pool.take(slots)
            return self.moved(slots, ledger.cells(slots, at, int(lengths.max())), lengths, at=at)[0]
        if not (lengths.any() or refresh or self.series.features.user_features):
            return map_state(torch.clone, self.series.pool.take(slots))
        P, state = self.model.patch_size, None
        while state is None or lengths.any():  # a whole patch may wait for cells that nobody has told
            step = np.minimum(lengths, P - at % P)
            state = self.moved(slots, ledger.cells(slots, at, P), step, at=at, state=state)[0]
            at, lengths = at + step, lengths - step
        return state


def features_by_slot(series: Residents, known: Mapping[str, Any] | None) -> dict[int, np.ndarray]:
    """The user's known features, checked, by slot."""
    blocks = {item: series.features.checked(item, block) for item, block in (known or {}).items()}
    return dict(zip(series.find(blocks).tolist(), blocks.values(), strict=True))


def _shifted(cells: Float64[np.ndarray, "B V T"], rows: np.ndarray, shift: np.ndarray, steps: int) -> np.ndarray:
    """So many cells of some rows, from a column of each row's own on; NaN beyond the last."""
    if not shift.any() and len(rows) == len(cells) and steps <= cells.shape[2]:
        return cells[:, :, :steps]
    columns = shift[:, None] + np.arange(steps)
    part = np.take_along_axis(cells[rows], np.minimum(columns, cells.shape[2] - 1)[:, None], axis=2)
    return np.where((columns < cells.shape[2])[:, None], part, np.nan)


def _blocks(lengths: Sequence[int], rows: int, chunk: int) -> list[tuple[int, int]]:
    """Cuts runs, longest first, into batches of bounded size without much padding."""
    blocks, begin = [], 0
    budget = 64 * max(chunk, 1024)  # cells
    for i, length in enumerate(lengths):
        longest = lengths[begin]
        full = i - begin >= rows or (i - begin + 1) * min(longest, chunk) > max(budget, min(longest, chunk))
        if i > begin and (full or length < longest // 2):
            blocks.append((begin, i))
            begin = i
    return [*blocks, (begin, len(lengths))] if lengths else []
