"""Training windows, cuts and padding: the only place where a series is cut and where anything is padded.

A window starts anywhere; its patch grid is anchored at its first step, and it starts from the statistics of what came
before (`Past`), so training sees what a long-running stream sees. Batch `i` of a run is a function of the seed and of
`i` alone: it depends on no worker, on no earlier batch and on no global generator.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Float64, Int64
from scipy.signal import lfilter

from tsgdn.data.clock import Clock
from tsgdn.data.series import Series
from tsgdn.types import Batch, Past

LENGTH_CAP = 4096  # steps beyond which a longer series is not drawn more often


class SeriesStatistics:
    """What a stream over a series holds at any step, from O(T) precomputed prefix sums.

    Equal to the state of `Forecaster` after the same prefix: moments by Welford's increments (all of one sign, so that
    nothing cancels), differences to the latest value of the same phase, and the seasonal tables.

    Args:
        values: NaN where missing.
        seasons: lengths in steps.
        half_life: observed values after which one weighs half; None keeps all weights equal.
    """

    def __init__(
        self, values: Float64[np.ndarray, "V T"], seasons: Sequence[int] = (1,), half_life: float | None = None
    ):
        self.values = np.asarray(values, dtype=np.float64)
        self.seasons = tuple(int(m) for m in seasons)
        observed = np.isfinite(self.values)
        retention = 1.0 if half_life is None else 2.0 ** (-1.0 / half_life)
        V, T = self.values.shape
        self._before = np.zeros((V, T + 1), dtype=np.int64)  # observed values before each step
        np.cumsum(observed, axis=1, out=self._before[:, 1:])
        self._last = [_latest_of_phase(observed, m) for m in self.seasons]
        self._moments = [self._row(v, observed[v], retention) for v in range(V)]

    def _row(self, row: int, observed: Bool[np.ndarray, " T"], retention: float) -> Float64[np.ndarray, "n parts"]:
        """Count, mean, m2, then per season count and mean square, after 0, 1, ... observed values."""
        at = np.flatnonzero(observed)
        x = self.values[row, at]
        table = np.zeros((len(at) + 1, 3 + 2 * len(self.seasons)))
        if not len(at):
            return table
        shift = float(np.median(x))  # keeps the sums small against the spread
        count = _decayed_sum(np.ones_like(x), retention)
        mean = _decayed_sum(x - shift, retention) / count
        mean[0] = x[0] - shift
        before = np.concatenate([mean[:1], mean[:-1]])
        table[1:, 0] = count
        table[1:, 1] = mean + shift
        table[1:, 2] = _decayed_sum((x - shift - before) * (x - shift - mean), retention)
        for i, (m, last) in enumerate(zip(self.seasons, self._last, strict=True)):
            source = np.where(at >= m, last[row, np.maximum(at - m, 0)], -1)
            found = source >= 0
            square = np.where(found, (x - self.values[row, np.maximum(source, 0)]) ** 2, 0.0)
            lags = _decayed_sum(found.astype(np.float64), retention)
            table[1:, 3 + 2 * i] = lags
            table[1:, 4 + 2 * i] = _decayed_sum(square, retention) / np.where(lags > 0, lags, 1.0)
        return table

    def past(self, start: int) -> Past:
        """The statistics of all steps before `start`, as numpy leaves with the leading dimension V."""
        V = len(self.values)
        rows = np.stack([table[self._before[v, start]] for v, table in enumerate(self._moments)])
        cells, seen = [], []
        for m, last in zip(self.seasons, self._last, strict=True):
            source = np.full((V, m), -1, dtype=np.int64)
            held = min(m, start)
            source[:, m - held :] = last[:, start - held : start]
            seen.append(source >= 0)
            cells.append(np.where(source >= 0, np.take_along_axis(self.values, np.maximum(source, 0), 1), 0.0))
        count, mean, m2 = rows.T[:3]
        return Past(count, mean, m2, rows[:, 3::2], rows[:, 4::2], np.concatenate(cells, 1), np.concatenate(seen, 1))  # pyright: ignore[reportArgumentType]

    def empty(self) -> Past:
        """The statistics of nothing."""
        V, L, M = len(self.values), len(self.seasons), sum(self.seasons)
        z = np.zeros
        return Past(z(V), z(V), z(V), z((V, L)), z((V, L)), z((V, M)), z((V, M), dtype=bool))  # pyright: ignore[reportArgumentType]


def _decayed_sum(x: Float64[np.ndarray, " n"], retention: float) -> Float64[np.ndarray, " n"]:
    """y_n = retention · y_{n-1} + x_n."""
    return np.cumsum(x) if retention == 1.0 else lfilter([1.0], [1.0, -retention], x)  # pyright: ignore[reportReturnType]


def _latest_of_phase(observed: Bool[np.ndarray, "V T"], season: int) -> Int64[np.ndarray, "V T"]:
    """At each step the latest observed step of its phase, itself included; -1 where there is none."""
    V, T = observed.shape
    periods = -(-T // season)
    at = np.full((V, periods * season), -1, dtype=np.int64)
    at[:, :T] = np.where(observed, np.arange(T), -1)
    return np.maximum.accumulate(at.reshape(V, periods, season), axis=1).reshape(V, -1)[:, :T]


class Cut(NamedTuple):
    """A stretch of a series, and how it enters a batch.

    Attributes:
        series: index.
        start: first step.
        stop: step after the last.
        fresh: the stream starts here, whatever came before.
        gap: steps [gap[0], gap[1]) are hidden, relative to `start`; the target keeps them.
        scored: only targets at steps from here on (absolute) count.
    """

    series: int
    start: int
    stop: int
    fresh: bool = False
    gap: tuple[int, int] = (0, 0)
    scored: int = 0


class Cutter:
    """Turns cuts into batches: pads on the right, adds known features, `past` and targets.

    Args:
        series: nothing beyond their last step can enter a batch (known features excepted).
        span: columns of `known` beyond the last step, (K + 1)·P.
        seasons: of the seasonal memory.
        calendar: calendar features come first in `known`.
        half_life: of the scaling.
        targets: leading variates that are forecast; the others are seen but never scored (past covariates). None = all.

    Raises:
        ValueError: no series, series that do not fit together, or more targets than variates.
    """

    def __init__(
        self,
        series: Sequence[Series],
        *,
        span: int,
        seasons: Sequence[int],
        calendar: bool = False,
        half_life: float | None = None,
        targets: int | None = None,
    ):
        if not series:
            raise ValueError("there is no series to cut windows from; give at least one")
        shapes = {(s.values.shape[0], s.freq, 0 if s.known is None else len(s.known), len(s.static)) for s in series}
        if len(shapes) > 1:
            raise ValueError(
                "series of one data set share variates, frequency, known and static features; "
                f"these differ: (variates, freq, known, static) = {sorted(shapes)}"
            )
        self.series = list(series)
        self.span, self.seasons, self.half_life = span, tuple(seasons), half_life
        ((self.variates, freq, user_known, self.n_static),) = shapes
        if targets is not None and not 1 <= targets <= self.variates:
            raise ValueError(
                f"targets is {targets}; the series have {self.variates} variates, of which at least 1 is one"
            )
        self.targets = targets
        self.clock = Clock(freq) if calendar else None
        self.known_features = (self.clock.calendar_size if self.clock else 0) + user_known
        self._statistics: dict[int, SeriesStatistics] = {}
        self._known: dict[int, Float32[np.ndarray, "F steps"]] = {}

    def statistics(self, index: int) -> SeriesStatistics:
        """Of one series, computed at first use."""
        if index not in self._statistics:
            self._statistics[index] = SeriesStatistics(self.series[index].values, self.seasons, self.half_life)
        return self._statistics[index]

    def known(self, index: int) -> Float32[np.ndarray, "F steps"]:
        """Known features from the first step to `span` steps beyond the last, NaN where the user gave none."""
        if index not in self._known:
            self._known[index] = self._features(index, 0, len(self.series[index]) + self.span)
        return self._known[index]

    def ahead(self, places: Sequence[tuple[int, int]], columns: int) -> Float[torch.Tensor, "B F columns"] | None:
        """Known features of `columns` steps from each (series, step) on, for `Forecaster.forecast`."""
        if not self.known_features:
            return None
        return torch.from_numpy(np.stack([self._features(index, step, step + columns) for index, step in places]))

    def _features(self, index: int, first: int, last: int) -> Float32[np.ndarray, "F steps"]:
        """Known features of the steps [first, last), which may lie beyond the series."""
        series = self.series[index]
        found = np.full((self.known_features, last - first), np.nan, dtype=np.float32)
        if self.clock is not None:
            found[: self.clock.calendar_size] = self.clock.calendar(series.start, first, last)
        if series.known is not None:
            held = series.known[:, first:last]
            found[self.known_features - len(held) :, : held.shape[1]] = held
        return found

    def batch(self, cuts: Sequence[Cut], *, steps: int | None = None, past: bool = True) -> Batch:
        """The cuts, side by side.

        Args:
            cuts: one per row.
            steps: width; None is that of the longest.
            past: whether the statistics of what came before go along.
        """
        lengths = np.array([cut.stop - cut.start for cut in cuts])
        T = int(lengths.max()) if steps is None else steps
        B, V = len(cuts), self.variates
        target = np.full((B, V, T), np.nan)
        observed = np.zeros((B, V, T), dtype=bool)
        known = np.full((B, self.known_features, T + self.span), np.nan, dtype=np.float32)
        for b, cut in enumerate(cuts):
            n = lengths[b]
            target[b, :, :n] = self.series[cut.series].values[:, cut.start : cut.stop]
            observed[b] = np.isfinite(target[b])
            observed[b, :, cut.gap[0] : cut.gap[1]] = False
            if self.known_features and n:
                known[b, :, : n + self.span] = self.known(cut.series)[:, cut.start : cut.stop + self.span]
        values = np.where(np.isfinite(target), target, 0.0)
        for b, cut in enumerate(cuts):
            target[b, :, : max(0, cut.scored - cut.start)] = np.nan
        if self.targets is not None:
            target[:, self.targets :] = np.nan
        history = None
        if past:
            pasts = [
                self.statistics(c.series).empty() if c.fresh else self.statistics(c.series).past(c.start) for c in cuts
            ]
            history = Past(*(torch.from_numpy(np.stack(leaves)) for leaves in zip(*pasts, strict=True)))
        static = np.array([self.series[c.series].static for c in cuts], dtype=np.int64)
        return Batch(
            values=torch.from_numpy(values),
            observed=torch.from_numpy(observed),
            known=torch.from_numpy(known) if self.known_features else None,
            static=torch.from_numpy(static) if self.n_static else None,
            lengths=torch.from_numpy(lengths) if (lengths != T).any() else None,
            target=torch.from_numpy(target),
            past=history,
        )


class Contexts(NamedTuple):
    """A batch to forecast from, and the known features after it.

    Attributes:
        batch: whole contexts.
        ahead: from each row's first forecast step on, as far as a roll-out looks.
    """

    batch: Batch
    ahead: Float[torch.Tensor, "B F columns"] | None

    def to(self, device: torch.device | str) -> "Contexts":
        """The same on another device."""
        return Contexts(self.batch.to(device), None if self.ahead is None else self.ahead.to(device))


class WindowSampler:
    """Random training windows: batch `i` is `sampler[i]`.

    A quarter of the windows starts at the first step of its series, a tenth starts anywhere with its history forgotten
    (both teach the cold start), the rest starts anywhere with its past. A tenth has a gap of log-uniform length.

    Args:
        cutter: holds the series.
        patch_size: the shortest window worth drawing has two patches.
        window_patches: the longest.
        batch_size: windows per batch.
        seed: of all draws.
        first_share: of windows that start at a series' first step.
        fresh_share: of windows that start anywhere, with an empty past.
        gap_share: of windows with an unobserved stretch.
    """

    def __init__(
        self,
        cutter: Cutter,
        *,
        patch_size: int,
        window_patches: int = 64,
        batch_size: int = 64,
        seed: int = 0,
        first_share: float = 0.25,
        fresh_share: float = 0.1,
        gap_share: float = 0.1,
    ):
        self.cutter, self.batch_size, self.seed = cutter, batch_size, seed
        self.window = patch_size * window_patches
        self.least = max(2 * patch_size, min(cutter.span + patch_size, self.window // 2))
        self.first_share, self.fresh_share, self.gap_share = first_share, fresh_share, gap_share
        self.odds = series_odds(cutter.series)
        self._cumulative = np.cumsum(self.odds)

    def __getitem__(self, index: int) -> Batch:
        rng = np.random.default_rng((self.seed, index))
        return self.cutter.batch([self._draw(rng) for _ in range(self.batch_size)])

    def _draw(self, rng: np.random.Generator) -> Cut:
        series = min(int(np.searchsorted(self._cumulative, rng.random(), side="right")), len(self.odds) - 1)
        T = self.cutter.series[series].values.shape[1]
        kind, start = rng.random(), 0
        if kind >= self.first_share:
            start = int(rng.integers(0, max(0, T - min(self.least, T)) + 1))
        stop = min(T, start + self.window)
        gap = (0, 0)
        if rng.random() < self.gap_share and stop - start > 2:
            length = int(np.exp(rng.uniform(0.0, np.log((stop - start) / 2))))
            first = int(rng.integers(1, stop - start - length + 1))
            gap = (first, first + length)
        return Cut(series, start, stop, fresh=kind < self.first_share + self.fresh_share, gap=gap)


class Segments(NamedTuple):
    """A batch whose rows go on where those of the batch before ended, except where `restart`."""

    batch: Batch
    restart: Bool[torch.Tensor, " B"]

    def to(self, device: torch.device | str) -> "Segments":
        """The same on another device."""
        return Segments(self.batch.to(device), self.restart.to(device))


class ContiguousSegments:
    """Segments that follow one another, for truncated back-propagation: batch `i` is `segments[i]`.

    Each row walks through runs of consecutive segments. A row's program is drawn anew every `episode` batches, at
    times that differ between the rows, so that it can be computed for any `i` without the batches before.

    See `WindowSampler`; `episode` is the most segments that a state is carried over.
    """

    def __init__(
        self,
        cutter: Cutter,
        *,
        patch_size: int,
        window_patches: int = 64,
        batch_size: int = 64,
        seed: int = 0,
        episode: int = 8,
        first_share: float = 0.25,
    ):
        self.cutter, self.batch_size, self.seed, self.episode = cutter, batch_size, seed, episode
        self.segment = patch_size * window_patches
        self.first_share = first_share
        self.odds = series_odds(cutter.series)

    def _program(self, row: int, episode: int) -> list[tuple[Cut, bool]]:
        """The segments of one row in one episode, and whether a run starts there."""
        rng = np.random.default_rng((self.seed, row, episode))
        cuts: list[tuple[Cut, bool]] = []
        while len(cuts) < self.episode:
            series = int(rng.choice(len(self.odds), p=self.odds))
            T = self.cutter.series[series].values.shape[1]
            run = min(T, (self.episode - len(cuts)) * self.segment)
            start = 0 if rng.random() < self.first_share else int(rng.integers(0, T - run + 1))
            for at in range(start, start + run, self.segment):
                cuts.append((Cut(series, at, min(at + self.segment, start + run)), at == start))
        return cuts

    def __getitem__(self, index: int) -> Segments:
        rows = []
        for row in range(self.batch_size):
            # a row's first episode is cut short: the rows then restart at different batches
            at = index + row * self.episode // self.batch_size
            rows.append(self._program(row, at // self.episode)[at % self.episode])
        batch = self.cutter.batch([cut for cut, _ in rows], steps=self.segment)
        return Segments(batch, torch.tensor([index == 0 or first for _, first in rows]))


def series_odds(series: Sequence[Series]) -> Float64[np.ndarray, " n"]:
    """Odds of drawing each series: its length, capped, so that one long series does not drown many short ones."""
    lengths = np.minimum([s.values.shape[1] for s in series], LENGTH_CAP).astype(np.float64)
    if not lengths.sum():
        raise ValueError("all series are empty; there is nothing to draw windows from")
    return lengths / lengths.sum()


def held_out_cuts(
    lengths: Sequence[int], scored_from: Callable[[int], int], *, context: int, most: int | None = None
) -> list[Cut]:
    """One cut per series that ends with it and scores its last part only.

    Args:
        lengths: steps of each series.
        scored_from: index of a series to its first scored step; a series scored from its end on is left out.
        context: steps before the first scored one, where there are as many.
        most: evenly spaced series are kept where there are more.
    """
    cuts = []
    for index, length in enumerate(lengths):
        first = scored_from(index)
        if 0 < first < length:
            cuts.append(Cut(index, max(0, first - context), length, scored=first))
    if most is not None and len(cuts) > most:
        cuts = [cuts[int(i)] for i in np.linspace(0, len(cuts) - 1, most)]
    return cuts


def grouped(cuts: Sequence[Cut], batch_size: int) -> list[list[Cut]]:
    """Cuts in batches, of similar length within each."""
    order = sorted(cuts, key=lambda cut: cut.stop - cut.start)
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
