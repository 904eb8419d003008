"""A fitted model as an evaluation `Predictor`: contexts in, quantiles out; or every origin of a series in one pass."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from tsgdn.data.series import Series
from tsgdn.data.windows import Cut, Cutter
from tsgdn.model import artefact
from tsgdn.model.forecaster import Forecaster, ForecasterState
from tsgdn.streamable import join_rows, take_rows


def picked_levels(
    values: Float[np.ndarray, "*shape Q"], *, levels: Sequence[float], wanted: Sequence[float]
) -> Float[np.ndarray, "*shape W"]:
    """The quantiles at other levels, linear between neighbours.

    Raises:
        ValueError: a level lies outside the fitted ones; a tail cannot be guessed.
    """
    grid, asked = np.asarray(levels, float), np.asarray(wanted, float)
    outside = asked[(asked < grid[0] - 1e-9) | (asked > grid[-1] + 1e-9)]
    if outside.size:
        raise ValueError(
            f"levels {outside.tolist()} lie outside the fitted ones, {grid[0]} to {grid[-1]}; fit with them"
        )
    place = np.interp(asked, grid, np.arange(len(grid)))
    near = np.abs(grid[np.rint(place).astype(int)] - asked) < 1e-9
    place = np.where(near, np.rint(place), place)
    below = np.floor(place).astype(int)
    above, share = np.minimum(below + 1, len(grid) - 1), place - below
    return values[..., below] * (1 - share) + values[..., above] * share


@dataclass
class _Stream:
    """Contexts that are prefixes of one series, shortest first: one pass serves them all."""

    series: Series
    requests: list[tuple[int, int]] = field(default_factory=list)  # (steps, index among the contexts)


@dataclass
class ModelPredictor:
    """Forecasts contexts with a `Forecaster`.

    A forecast never depends on which other contexts are asked for. Contexts that are prefixes of one another (the
    windows of one series) are read once, since the state after a prefix is the state of the shorter context.

    Attributes:
        model: in evaluation mode.
        calendar: whether its known features begin with the calendar's.
        cells: values read at once, padding included; bounds the memory.
    """

    model: Forecaster
    calendar: bool = False
    cells: int = 1 << 18

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, device: torch.device | str = "cpu") -> "ModelPredictor":
        """The predictor of a folder that `artefact.save` wrote."""
        info = artefact.read_series_info(folder)
        return cls(artefact.load(folder, device=device), calendar=bool(info.get("calendar", False)))

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return next(self.model.parameters()).device

    def predict(
        self, contexts: Sequence[Series], horizon: int, quantile_levels: Sequence[float]
    ) -> list[Float[np.ndarray, "V horizon Q"]]:
        """One array per context, in order; a variate of which nothing was observed is forecast as 0.

        Raises:
            ValueError: features that the model was not fitted with, or levels outside the fitted ones.
        """
        found: list[Any] = [None] * len(contexts)
        for streams in self._batches(contexts):
            for index, values in self._run(streams, horizon):
                picked = picked_levels(values, levels=self.model.quantile_levels, wanted=quantile_levels)
                found[index] = np.nan_to_num(picked, nan=0.0)
        return found

    @torch.no_grad()
    def forecast_origins(
        self, series: Series, horizon: int, quantile_levels: Sequence[float], *, first: int = 0
    ) -> tuple[Int64[np.ndarray, " n"], Float[np.ndarray, "n V horizon Q"]]:
        """Forecasts at every patch end from step `first` on, in one parallel pass over the series.

        Origins within a silence that made no token are left out, and so are those before the first value. A horizon
        beyond `direct_steps` is rolled out from copies of the state at each origin, which walks the patches one by one.
        """
        series = self._fitting(series)
        P = self.model.patch_size
        if len(series) < P:
            empty = np.empty((0, series.values.shape[0], horizon, len(quantile_levels)))
            return np.empty(0, np.int64), empty
        cutter = self._cutter([series])
        seen = np.isfinite(series.values).cumsum(-1)
        parts, origins = [], []
        state: ForecasterState | None = None
        direct = horizon <= self.model.direct_steps
        # A head reads S x Q numbers from a token: its outputs bound the piece.
        wide = series.values.shape[0] * self.model.span * len(self.model.quantile_levels)
        piece = P * max(1, self.cells * 8 // wide) if direct else P
        held: list[tuple[int, ForecasterState]] = []
        for begin in range(0, len(series) // P * P, piece):
            end = min(begin + piece, len(series) // P * P)
            ends = np.arange(begin + P, end + 1, P)
            wanted = ends >= max(first, 1)
            read = torch.from_numpy(np.flatnonzero(wanted)) if direct else torch.zeros(0, dtype=torch.long)
            batch = cutter.batch([Cut(0, begin, end)], past=False).to(self.device)
            quantiles, after = self.model(batch, state, read=read)
            state = after
            if direct and len(read):
                valid = quantiles.valid[0].cpu().numpy()
                values = quantiles.unscaled()[0, :, :, P : P + horizon].transpose(0, 1).cpu().numpy()
                parts.append(values[valid])
                origins.append(ends[wanted][valid])
            elif not direct and wanted.any():
                held.append((end, after))
                if len(held) * wide >= self.cells * 8:
                    parts.append(self._roll_out(cutter, held, horizon))
                    origins.append(np.array([step for step, _ in held]))
                    held = []
        if held:
            parts.append(self._roll_out(cutter, held, horizon))
            origins.append(np.array([step for step, _ in held]))
        if not parts:
            return np.empty(0, np.int64), np.empty((0, series.values.shape[0], horizon, len(quantile_levels)))
        at, values = np.concatenate(origins).astype(np.int64), np.concatenate(parts)
        begun = (seen[:, at - 1] > 0).all(0)
        picked = picked_levels(values[begun], levels=self.model.quantile_levels, wanted=quantile_levels)
        return at[begun], picked

    def _roll_out(
        self, cutter: Cutter, held: list[tuple[int, ForecasterState]], horizon: int
    ) -> Float[np.ndarray, "n V horizon Q"]:
        state = join_rows([state for _, state in held])
        known = self._ahead(cutter, [(0, step) for step, _ in held], horizon)
        return self.model.forecast(state, horizon, known=known).cpu().numpy()

    def _fitting(self, series: Series) -> Series:
        """The series with the features that the model was fitted with, and no others."""
        model = self.model
        user = model.known_features - (series.clock.calendar_size if self.calendar else 0)
        known, given = series.known, 0 if series.known is None else len(series.known)
        if user < 0 or (user and given not in (0, user)):
            raise ValueError(
                f"{series.item_id}: the model was fitted with {model.known_features} known features, the series at "
                f"freq {series.freq} has {given}, the calendar {series.clock.calendar_size if self.calendar else 0}; "
                "give it series like those it was fitted on"
            )
        if user == 0:
            known = None
        elif given == 0:
            known = np.full((user, len(series)), np.nan)
        count = len(model.config["static_cardinalities"])
        static = (*series.static, *(0,) * count)[:count]
        return replace(series, known=known, static=static)

    def _cutter(self, series: Sequence[Series]) -> Cutter:
        return Cutter(
            series, span=self.model.span, seasons=self.model.seasons, calendar=self.calendar,
            half_life=self.model.config["half_life"],
        )  # fmt: skip

    def _batches(self, contexts: Sequence[Series]) -> Iterator[list[_Stream]]:
        """Streams to be read side by side: alike in shape, of similar length."""
        kinds: dict[Any, list[_Stream]] = {}
        for stream in _streams(contexts):
            stream.series = self._fitting(stream.series)
            kinds.setdefault((stream.series.values.shape[0], stream.series.freq), []).append(stream)
        for streams in kinds.values():
            streams.sort(key=lambda s: len(s.series))
            yield from _side_by_side(streams, self.cells)

    @torch.no_grad()
    def _run(self, streams: list[_Stream], horizon: int) -> Iterator[tuple[int, Float[np.ndarray, "V horizon Q"]]]:
        """Reads the streams from request to request, and forecasts at each."""
        cutter = self._cutter([stream.series for stream in streams])
        B, V = len(streams), streams[0].series.values.shape[0]
        piece = max(self.model.patch_size, self.cells // (B * V))
        state = self.model.initial_state(B, V, device=self.device)
        done, due = np.zeros(B, int), [list(stream.requests) for stream in streams]
        none = torch.zeros(0, dtype=torch.long)
        waiting: list[tuple[int, int, int]] = []  # (context, stream, steps)
        states: list[ForecasterState] = []
        while any(due):
            goal = np.array([requests[0][0] if requests else at for requests, at in zip(due, done, strict=True)])
            while (done < goal).any():
                cuts = [Cut(b, int(a), int(min(z, a + piece))) for b, (a, z) in enumerate(zip(done, goal, strict=True))]
                _, state = self.model(cutter.batch(cuts, past=False).to(self.device), state, read=none)
                done = np.array([cut.stop for cut in cuts])
            rows = [b for b in range(B) if due[b] and due[b][0][0] == done[b]]
            states.append(take_rows(state, torch.tensor(rows, device=self.device)))
            for b in rows:
                steps, index = due[b].pop(0)
                waiting.append((index, b, steps))
            if not any(due) or len(waiting) * V >= 256:
                state_of_all = join_rows(states)
                known = self._ahead(cutter, [(b, steps) for _, b, steps in waiting], horizon)
                values = self.model.forecast(state_of_all, horizon, known=known).cpu().numpy()
                yield from zip((index for index, _, _ in waiting), values, strict=True)
                waiting, states = [], []

    def _ahead(
        self, cutter: Cutter, places: Sequence[tuple[int, int]], horizon: int
    ) -> Float[Tensor, "B F columns"] | None:
        """Known features from each origin on, as far as a roll-out looks."""
        known = cutter.ahead(places, horizon + self.model.span + self.model.patch_size)
        return None if known is None else known.to(self.device)


def _streams(contexts: Sequence[Series]) -> list[_Stream]:
    """Contexts gathered by the series that they are prefixes of.

    Series with known features of their own stay apart: where one context's features end, another's may go on.
    """
    longest: dict[Any, _Stream] = {}
    alone: list[_Stream] = []
    for index in sorted(range(len(contexts)), key=lambda i: -len(contexts[i])):
        context = contexts[index]
        key = (context.item_id, context.start, context.freq, context.static, context.values.shape[0])
        stream = longest.get(key)
        request = (len(context), index)
        if context.known is None and stream is None:
            longest[key] = _Stream(context, [request])
        elif (
            context.known is None
            and stream is not None
            and np.array_equal(stream.series.values[:, : len(context)], context.values, equal_nan=True)
        ):
            stream.requests.insert(0, request)
        else:
            alone.append(_Stream(context, [request]))
    return [*longest.values(), *alone]


def _side_by_side(streams: list[_Stream], cells: int) -> Iterator[list[_Stream]]:
    """Runs of streams, sorted by length, that together hold at most `cells` values (64 series if these are long)."""
    run: list[_Stream] = []
    for stream in streams:
        if run and len(run) >= 64 and (len(run) + 1) * stream.series.values.size > cells:
            yield run
            run = []
        run.append(stream)
    if run:
        yield run
