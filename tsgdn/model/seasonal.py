"""Seasonal memory: per season a table of the latest observed value at each phase.

Season 1 is a table of one cell, the last value; season m holds one season. An unobserved cell does not overwrite, so
silence costs nothing and a seasonal-naive forecast survives gaps and its own roll-out. The tables give each token the
values that (seasonal) persistence would forecast for the steps of its patch and of the next K, and each value the one
that it is compared with.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor


class SeasonalState(NamedTuple):
    """The tables of all seasons, one after the other; the cell of step t is t modulo the season."""

    table: Float64[Tensor, "B V M"]
    seen: Bool[Tensor, "B V M"]


class SeasonalViews(NamedTuple):
    """What the tables said at each value and at each token.

    Attributes:
        predecessors: the latest value before each, at its phase.
        has_predecessor: where there is one.
        anchors: what persistence over each season forecasts for the token's own patch and the next K.
        has_anchor: where a value of that phase had been seen.
    """

    predecessors: Float64[Tensor, "B V N P L"]
    has_predecessor: Bool[Tensor, "B V N P L"]
    anchors: Float64[Tensor, "B V N S L"]
    has_anchor: Bool[Tensor, "B V N S L"]


class SeasonalMemory:
    """Tables for the given seasons, for forecasts of `span` steps from the start of a token's patch."""

    def __init__(self, seasons: Sequence[int], patch_size: int, span: int):
        if not seasons or seasons[0] != 1 or any(m < 1 for m in seasons) or len(set(seasons)) != len(seasons):
            raise ValueError(f"seasons are {tuple(seasons)}; expected different lengths in steps, 1 first: [1, 24]")
        self.seasons = tuple(seasons)
        self.patch_size = patch_size
        self.span = span
        self._index: dict[tuple[int, torch.device], _Index] = {}

    def initial_state(self, series: int, variates: int, device: torch.device | str | None = None) -> SeasonalState:
        """Nothing seen yet."""
        shape = (series, variates, sum(self.seasons))
        return SeasonalState(
            torch.zeros(shape, dtype=torch.float64, device=device), torch.zeros(shape, dtype=torch.bool, device=device)
        )

    def __call__(
        self,
        values: Float64[Tensor, "B V N P"],
        observed: Bool[Tensor, "B V N P"],
        start: Int64[Tensor, " B"],
        state: SeasonalState,
    ) -> tuple[SeasonalViews, SeasonalState]:
        """Reads the tables at every token and writes the observed values; `start` is the step of the first cell."""
        N, P = values.shape[2:]
        index = self._index_of(N, start.device)
        # NaN stands for what was not seen: one tensor is moved in the place of two
        table = torch.where(state.seen, state.table, torch.nan)
        values = torch.where(observed, values, torch.nan).flatten(2)
        # relative to the first cell, all seasons side by side
        turned = (start[:, None] + index.phase).remainder(index.season)
        turned = (turned + index.offset)[:, None].expand(table.shape)
        filled = [_filled(first, values) for first in table.gather(-1, turned).split(self.seasons, -1)]
        # what each phase holds after the last cell, turned back
        back = (index.phase - start[:, None]).remainder(index.season)
        back = (back + index.offset)[:, None].expand(table.shape)
        ends = [grid[..., -m:] for grid, m in zip(filled, self.seasons, strict=True)]
        table = torch.cat(ends, -1).gather(-1, back)
        seen = ~table.isnan()

        read = torch.cat(filled, -1).index_select(-1, index.reads)
        known = ~read.isnan()
        read = torch.where(known, read, 0.0)
        cells, L = N * P * len(self.seasons), len(self.seasons)
        views = SeasonalViews(
            read[..., :cells].unflatten(-1, (N, P, L)),
            known[..., :cells].unflatten(-1, (N, P, L)),
            read[..., cells:].unflatten(-1, (N, self.span, L)),
            known[..., cells:].unflatten(-1, (N, self.span, L)),
        )
        return views, SeasonalState(torch.where(seen, table, 0.0), seen)

    def anchors_at(
        self, steps: Int64[Tensor, " B"], state: SeasonalState
    ) -> tuple[Float64[Tensor, "B V S L"], Bool[Tensor, "B V S L"]]:
        """What the tables forecast for a token whose patch ended just before step `steps`."""
        index = self._index_of(1, steps.device)
        cell = (steps[:, None] + index.ahead).remainder(index.ahead_season) + index.ahead_offset
        cell = cell[:, None].expand(-1, state.table.shape[1], -1)
        shape = (self.span, len(self.seasons))
        return state.table.gather(-1, cell).unflatten(-1, shape), state.seen.gather(-1, cell).unflatten(-1, shape)

    def _index_of(self, N: int, device: torch.device) -> "_Index":
        """What does not depend on values, made once per number of patches."""
        found = self._index.get((N, device))
        if found is None:
            if len(self._index) > 32:
                self._index.clear()
            found = self._index[N, device] = self._make_index(N, device)
        return found

    def _make_index(self, N: int, device: torch.device) -> "_Index":
        P, S = self.patch_size, self.span
        begin = torch.arange(N)[:, None] * P
        target = begin + torch.arange(S)
        beyond = target - (begin + P) + 1
        before, at, offset = [], [], 0
        for m in self.seasons:
            # in `_filled`, place m + t holds the value of t's phase at or before t, place t the one before t
            before.append(offset + torch.arange(N * P))
            # the step whose phase value forecasts `target`: the last of that phase before the patch ends
            at.append(offset + m + target - m * ((beyond + m - 1) // m).clamp(min=0))
            offset += m * (1 - (-N * P // m))
        phase = torch.cat([torch.arange(m) for m in self.seasons])
        sizes = torch.tensor(self.seasons)
        season = sizes.repeat_interleave(sizes)
        offsets = sizes.cumsum(0) - sizes
        ahead = (torch.arange(S) - P)[:, None].expand(-1, len(sizes)).flatten()
        reads = torch.cat([torch.stack(before, -1).flatten(), torch.stack(at, -1).flatten()])
        parts = (phase, season, offsets.repeat_interleave(sizes), reads, ahead, sizes.repeat(S), offsets.repeat(S))
        return _Index(*(part.to(device) for part in parts))


class _Index(NamedTuple):
    """Of the cells of all tables: phase, season and where its table begins; places to read; and cells of a forecast."""

    phase: Tensor
    season: Tensor
    offset: Tensor
    reads: Tensor
    ahead: Tensor
    ahead_season: Tensor
    ahead_offset: Tensor


def _filled(first: Tensor, values: Tensor) -> Tensor:
    """The latest value of each phase: m cells of the table, then T steps, filled forward by phase up to whole seasons.

    NaN stands for what was not seen.
    """
    m, T = first.shape[-1], values.shape[-1]
    periods = -(-T // m)
    pad = periods * m - T
    if periods == 1:
        held = first[..., :T]
        parts = [first, torch.where(values.isnan(), held, values)]
        return torch.cat([*parts, first[..., T:]] if pad else parts, -1)
    rest = torch.nn.functional.pad(values, (0, pad), value=torch.nan) if pad else values
    grid = torch.cat([first, rest], -1).unflatten(-1, (periods + 1, m))
    place = torch.arange(periods + 1, device=first.device)[:, None]
    # the first row has the place 0 in any case: where nothing was seen it holds NaN
    source = torch.where(grid.isnan(), 0, place).cummax(-2).values
    return grid.gather(-2, source).flatten(-2)
