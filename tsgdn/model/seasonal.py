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
        values, observed = values.flatten(2), observed.flatten(2)
        views, tables = [], []
        for m, table, seen in zip(
            self.seasons, state.table.split(self.seasons, -1), state.seen.split(self.seasons, -1), strict=True
        ):
            latest, known, end = _latest(values, observed, start, table, seen, m)
            # `latest[m + t]` is the value of t's phase at or before t; `latest[t]` the one before t
            source = m + self._sources(N, m, values.device)
            views.append(
                (
                    latest[..., : N * P].unflatten(-1, (N, P)),
                    known[..., : N * P].unflatten(-1, (N, P)),
                    latest[..., source],
                    known[..., source],
                )
            )
            tables.append(end)
        stacked = (torch.stack(parts, -1) for parts in zip(*views, strict=True))
        table, seen = (torch.cat(parts, -1) for parts in zip(*tables, strict=True))
        return SeasonalViews(*stacked), SeasonalState(table, seen)

    def anchors_at(
        self, steps: Int64[Tensor, " B"], state: SeasonalState
    ) -> tuple[Float64[Tensor, "B V S L"], Bool[Tensor, "B V S L"]]:
        """What the tables forecast for a token whose patch ended just before step `steps`."""
        ahead = torch.arange(self.span, device=steps.device) - self.patch_size
        anchors, seen = [], []
        for m, table, known in zip(
            self.seasons, state.table.split(self.seasons, -1), state.seen.split(self.seasons, -1), strict=True
        ):
            cell = ((steps[:, None] + ahead) % m)[:, None].expand(-1, table.shape[1], -1)
            anchors.append(table.gather(-1, cell))
            seen.append(known.gather(-1, cell))
        return torch.stack(anchors, -1), torch.stack(seen, -1)

    def _sources(self, N: int, m: int, device: torch.device) -> Int64[Tensor, "N S"]:
        """The step whose phase value forecasts step nP + s of token n: the last of that phase before the patch ends."""
        begin = torch.arange(N, device=device)[:, None] * self.patch_size
        target = begin + torch.arange(self.span, device=device)
        beyond = target - (begin + self.patch_size) + 1
        return target - m * ((beyond + m - 1) // m).clamp(min=0)


def _latest(
    values: Tensor, observed: Tensor, start: Tensor, table: Tensor, seen: Tensor, m: int
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """The latest observed value of each phase, at each step: the table first, then T steps, forward-filled by phase."""
    T = values.shape[-1]
    shape = table.shape
    turn = (start[:, None] + torch.arange(m, device=start.device)) % m
    relative = turn[:, None].expand(shape)
    periods = -(-T // m)
    pad = periods * m - T

    def grid(first: Tensor, rest: Tensor) -> Tensor:
        padded = torch.cat([first.gather(-1, relative), rest, rest.new_zeros(*rest.shape[:-1], pad)], -1)
        return padded.unflatten(-1, (periods + 1, m))

    filled, present = grid(table, values), grid(seen, observed)
    index = torch.arange(periods + 1, device=values.device)[:, None].expand(present.shape)
    source = torch.where(present, index, -1).cummax(-2).values
    latest = filled.gather(-2, source.clamp(min=0))
    known = source >= 0
    latest = torch.where(known, latest, torch.zeros((), dtype=latest.dtype, device=latest.device))
    back = ((torch.arange(m, device=start.device) - start[:, None]) % m)[:, None].expand(shape)
    end = (latest[..., -1, :].gather(-1, back), known[..., -1, :].gather(-1, back))
    return latest.flatten(-2), known.flatten(-2), end
