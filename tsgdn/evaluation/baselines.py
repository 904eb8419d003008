"""Forecasts that any model has to beat: persistence, seasonal naive, drift and the bootstrap random walk.

Each is a callable `(context (V, T), horizon, levels) -> (V, horizon, Q)` and, over many series, an evaluation
`Predictor`. Missing values take the last value before them, leading ones the first after them, as in GluonTS; a variate
without any value is forecast as 0.
"""

import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float


def filled(context: Float[np.ndarray, "V T"]) -> Float[np.ndarray, "V T"]:
    """The context without gaps: last value carried forward, the first one backward, 0 where there is none."""
    values = np.array(context, float)
    seen = np.isfinite(values)
    if seen.all():
        return values
    T = values.shape[-1]
    last = np.maximum.accumulate(np.where(seen, np.arange(T), -1), axis=-1)
    first = np.argmax(seen, axis=-1)[:, None]
    values = np.take_along_axis(values, np.where(last < 0, first, last), axis=-1)
    return np.where(np.isfinite(values), values, 0.0)


class Baseline(ABC):
    """A forecast from the context alone."""

    @abstractmethod
    def __call__(
        self, context: Float[np.ndarray, "V T"], horizon: int, levels: Sequence[float]
    ) -> Float[np.ndarray, "V horizon Q"]:
        """Forecasts one series; T >= 1."""

    def predict(
        self, contexts: Sequence[Any], horizon: int, quantile_levels: Sequence[float]
    ) -> list[Float[np.ndarray, "V horizon Q"]]:
        """Forecasts many `Series`: the evaluation Predictor protocol."""
        return [self(context.values, horizon, quantile_levels) for context in contexts]


def _point(forecast: Float[np.ndarray, "... H"], levels: Sequence[float]) -> Float[np.ndarray, "... H Q"]:
    """The same number at every level."""
    return np.repeat(forecast[..., None], len(levels), axis=-1)


@dataclass(frozen=True)
class SeasonalNaive(Baseline):
    """The last season, repeated; the mean where the context is shorter than a season."""

    season: int

    def __call__(
        self, context: Float[np.ndarray, "V T"], horizon: int, levels: Sequence[float]
    ) -> Float[np.ndarray, "V horizon Q"]:
        """See `Baseline`."""
        values = filled(context)
        if values.shape[-1] < self.season:
            return _point(np.repeat(values.mean(-1, keepdims=True), horizon, axis=-1), levels)
        steps = values.shape[-1] - self.season + np.arange(horizon) % self.season
        return _point(values[:, steps], levels)

    def at_origins(
        self, series: Float[np.ndarray, "V T"], *, origins: np.ndarray, horizon: int, levels: Sequence[float]
    ) -> Float[np.ndarray, "n V horizon Q"]:
        """The same from each of many origins (steps seen, at least one), in one pass over the series.

        Unlike in `__call__`, a gap at the head of the series is filled with the first value even before it came.
        """
        values = filled(series)
        ahead = np.arange(horizon) % self.season
        steps = np.asarray(origins)[:, None] - self.season + ahead
        points = values[:, np.maximum(steps, 0)].transpose(1, 0, 2)
        short = np.asarray(origins) < self.season
        if short.any():
            means = np.cumsum(values, -1)[:, np.asarray(origins)[short] - 1] / np.asarray(origins)[short]
            points[short] = means.T[:, :, None]
        return _point(points, levels)


class Persistence(SeasonalNaive):
    """The last observed value, for ever."""

    def __init__(self) -> None:
        super().__init__(season=1)


@dataclass(frozen=True)
class Drift(Baseline):
    """The straight line through the first and the last value of the context."""

    def __call__(
        self, context: Float[np.ndarray, "V T"], horizon: int, levels: Sequence[float]
    ) -> Float[np.ndarray, "V horizon Q"]:
        """See `Baseline`."""
        values = filled(context)
        slope = (values[:, -1:] - values[:, :1]) / max(values.shape[-1] - 1, 1)
        return _point(values[:, -1:] + slope * np.arange(1, horizon + 1), levels)


@dataclass(frozen=True)
class BootstrapRandomWalk(Baseline):
    """The last value plus increments drawn from the context's own: the floor of exchange rates.

    All paths advance together, one step at a time, so memory is that of `paths` numbers per variate. The draw of a
    context depends on its own values and on the seed only, never on what else is forecast.
    """

    paths: int = 100_000
    seed: int = 0

    def __call__(
        self, context: Float[np.ndarray, "V T"], horizon: int, levels: Sequence[float]
    ) -> Float[np.ndarray, "V horizon Q"]:
        """See `Baseline`."""
        context = np.asarray(context, float)
        out = np.empty((len(context), horizon, len(levels)))
        for variate, values in enumerate(context):
            seen = values[np.isfinite(values)]
            increments = np.diff(seen)
            increments = increments if increments.size else np.zeros(1)
            rng = np.random.default_rng([self.seed, variate, len(values), zlib.crc32(seen.tobytes())])
            walk = np.full(self.paths, seen[-1] if seen.size else 0.0)
            for step in range(horizon):
                walk += increments[rng.integers(increments.size, size=self.paths, dtype=np.int32)]
                out[variate, step] = np.quantile(walk, levels)
        return out


persistence = Persistence()
drift = Drift()
