"""Scores any forecaster on a task: at the task's windows (`evaluate`), or at every origin it offers (`every_origin`).

What a predictor is handed cannot contain a label: contexts are fresh copies that end where the forecast begins.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from functools import partial
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int64

from tsgdn.data.series import Series
from tsgdn.evaluation import metrics

REPORT_LEVELS: tuple[float, ...] = (0.01, 0.05, 0.1, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.9, 0.95, 0.99)
"""What is asked of a predictor unless said otherwise: the nine of WQL and the ends of the 50, 80, 90 and 98 % bands."""


@runtime_checkable
class Predictor(Protocol):
    """Whatever forecasts from contexts."""

    def predict(
        self, contexts: Sequence[Series], horizon: int, quantile_levels: Sequence[float]
    ) -> list[Float[np.ndarray, "V horizon Q"]]:
        """One array per context, in order; step 0 follows the context's last."""
        ...


@runtime_checkable
class OriginForecaster(Protocol):
    """Whatever forecasts along a series in one pass."""

    def forecast_origins(
        self, series: Series, horizon: int, quantile_levels: Sequence[float]
    ) -> tuple[Int64[np.ndarray, " n"], Float[np.ndarray, "n V horizon Q"]]:
        """Origins (steps seen, so forecast step 0 is step `origin`) and the forecasts made there."""
        ...


@runtime_checkable
class Task(Protocol):
    """What `tsgdn.data.catalog.Task` offers to be scored."""

    @property
    def name(self) -> str:
        """Short name of the cell."""
        ...

    @property
    def horizon(self) -> int:
        """Steps per forecast."""
        ...

    @property
    def seasonality(self) -> int:
        """The protocol's m, of MASE and of the seasonal naive."""
        ...

    def split(self) -> tuple[list[Series], Sequence[tuple[Series, np.ndarray]]]:
        """Training series, then (context, label (V, H)) per window."""
        ...


@dataclasses.dataclass(frozen=True)
class Windows:
    """Forecasts beside what came: one row per variate of each window.

    Attributes:
        item_ids: of each row; with its variate where there are several.
        origins: steps seen when the forecast was made.
        past_error: seasonal error of each context, see `metrics.seasonal_error`.
    """

    item_ids: tuple[str, ...]
    origins: Int64[np.ndarray, " n"]
    target: Float[np.ndarray, "n H"]
    quantiles: Float[np.ndarray, "n H Q"]
    levels: tuple[float, ...]
    past_error: Float[np.ndarray, " n"]

    def pick(self, rows: Any) -> "Windows":
        """Some of the rows."""
        rows = np.arange(len(self.item_ids))[rows]
        return Windows(
            tuple(self.item_ids[i] for i in rows),
            self.origins[rows],
            self.target[rows],
            self.quantiles[rows],
            self.levels,
            self.past_error[rows],
        )

    def by_item(self) -> dict[str, "Windows"]:
        """The windows of each item, in order of appearance."""
        ids = np.asarray(self.item_ids, dtype=object)
        return {name: self.pick(ids == name) for name in dict.fromkeys(self.item_ids)}


@dataclasses.dataclass(frozen=True)
class Scores:
    """One line of a results table; NaN where the forecast lacks the levels or nothing could be scored.

    Attributes:
        n: windows, a multivariate one counted once per variate.
        cells: target values that were there to be scored.
        sql: over the nine levels of WQL.
        coverage80: share of targets within the band from .1 to .9; likewise the others.
    """

    wql: float
    nd: float
    mase: float
    sql: float
    crps: float
    coverage50: float
    coverage80: float
    coverage98: float
    n: int
    cells: int
    horizon: int
    seasonality: int
    windows: Windows | None = dataclasses.field(default=None, repr=False, compare=False)

    def numbers(self) -> dict[str, float | int]:
        """The scores by name, without the windows behind them."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "windows"}

    def table(self) -> list[dict[str, Any]]:
        """The same scores per item; empty where the windows were not kept."""
        if self.windows is None:
            return []
        rows = self.windows.by_item().items()
        return [{"item_id": name, **score(w, seasonality=self.seasonality).numbers()} for name, w in rows]


def score(windows: Windows, *, seasonality: int, keep: bool = False) -> Scores:
    """The scores of windows.

    Args:
        windows: forecasts and what came.
        seasonality: the m behind `past_error`, to be printed beside MASE.
        keep: hold on to the windows, for `Scores.table` and for charts.
    """
    given = {"target": windows.target, "quantiles": windows.quantiles, "levels": windows.levels}
    scaled = {**given, "past_error": windows.past_error}

    def has(*levels: float) -> bool:
        return all(min(abs(q - level) for q in windows.levels) < 1e-9 for level in levels)

    def when(there: bool, fn: Callable[[], float]) -> float:
        return fn() if there else float("nan")

    def band(share: float) -> float:
        ends = (0.5 - share / 2, 0.5 + share / 2)
        return when(has(*ends), lambda: metrics.interval_coverage(**given, share=share))

    return Scores(
        wql=when(has(*metrics.WQL_LEVELS), lambda: metrics.wql(**given)),
        nd=when(has(0.5), lambda: metrics.nd(**given)),
        mase=when(has(0.5), lambda: metrics.mase(**scaled)),
        sql=when(has(*metrics.WQL_LEVELS), lambda: metrics.sql(**scaled)),
        crps=metrics.crps(**given),
        coverage50=band(0.5),
        coverage80=band(0.8),
        coverage98=band(0.98),
        n=len(windows.item_ids),
        cells=int(np.isfinite(windows.target).sum()),
        horizon=windows.target.shape[-1],
        seasonality=seasonality,
        windows=windows if keep else None,
    )


def sealed(context: Series, horizon: int) -> Series:
    """A copy of a context that shares no memory with anything; known features end with the horizon."""
    steps = context.values.shape[-1] + horizon
    return dataclasses.replace(
        context,
        values=np.array(context.values),
        known=None if context.known is None else np.array(context.known[:, :steps]),
    )


def _predict(
    predictor: Predictor, horizon: int, levels: tuple[float, ...], contexts: list[Series]
) -> list[Float[np.ndarray, "V horizon Q"]]:
    return list(predictor.predict(contexts, horizon, levels))


def forecast_windows(
    predictor: Predictor,
    instances: Sequence[tuple[Series, np.ndarray]],
    *,
    seasonality: int,
    levels: Sequence[float] = REPORT_LEVELS,
    executor: Executor | None = None,
    progress: Callable[[int, int], object] | None = None,
    chunk: int = 1 << 24,
) -> Windows:
    """Forecasts windows and puts the labels beside them.

    Args:
        predictor: sees contexts only.
        instances: (context, label (V, H)) pairs; one horizon.
        seasonality: the m of the past error.
        levels: increasing.
        executor: runs chunks of contexts side by side, e.g. a process pool; the predictor must be fit to be sent there.
        progress: called with the windows done and their number.
        chunk: values of contexts handed over at once.

    Raises:
        ValueError: there is nothing to score, or the predictor returns other shapes or NaN.
    """
    if not len(instances):
        raise ValueError("a task without windows cannot be scored; check its horizon against the series' lengths")
    levels = tuple(levels)
    places: list[tuple[str, int]] = []
    labels: list[np.ndarray] = []
    errors: list[np.ndarray] = []

    def chunks() -> Iterator[list[Series]]:
        """Sealed contexts, at most `chunk` values at a time; keeps the labels here."""
        run: list[Series] = []
        held = 0
        for context, label in instances:
            if run and held + context.values.size > chunk:
                yield run
                run, held = [], 0
            held += context.values.size
            run.append(sealed(context, label.shape[-1]))
            labels.append(np.array(label, float))
            places.append((context.item_id, len(context)))
            errors.append(metrics.seasonal_error(past=context.values[: len(label)], seasonality=seasonality))
        yield run

    horizon = instances[0][1].shape[-1]
    work = partial(_predict, predictor, horizon, levels)
    forecasts: list[np.ndarray] = []
    for part in map(work, chunks()) if executor is None else executor.map(work, chunks()):
        forecasts += part
        if progress is not None:
            progress(len(forecasts), len(instances))
    if len(forecasts) != len(labels):
        raise ValueError(f"the predictor returned {len(forecasts)} forecasts for {len(labels)} contexts")
    for (item_id, steps), label, forecast in zip(places, labels, forecasts, strict=True):
        if np.shape(forecast) != (*label.shape, len(levels)):
            raise ValueError(f"{item_id}: the forecast is {np.shape(forecast)}, not {(*label.shape, len(levels))}")
        if np.isnan(forecast).any():
            raise ValueError(f"{item_id}: the forecast after {steps} steps holds NaN; it cannot be scored")
    counts = [len(label) for label in labels]
    return Windows(
        item_ids=tuple(
            f"{item_id}/{v}" if count > 1 else item_id
            for (item_id, _), count in zip(places, counts, strict=True)
            for v in range(count)
        ),
        origins=np.repeat(np.array([steps for _, steps in places], np.int64), counts),
        target=np.concatenate(labels),
        quantiles=np.concatenate([np.asarray(forecast, float) for forecast in forecasts]),
        levels=levels,
        past_error=np.concatenate(errors),
    )


def evaluate(
    predictor: Predictor,
    task: Task,
    *,
    levels: Sequence[float] = REPORT_LEVELS,
    executor: Executor | None = None,
    progress: Callable[[int, int], object] | None = None,
    keep: bool = True,
) -> Scores:
    """Scores a predictor on a task's windows; see `forecast_windows`."""
    _, instances = task.split()
    windows = forecast_windows(
        predictor, instances, seasonality=task.seasonality, levels=levels, executor=executor, progress=progress
    )
    return score(windows, seasonality=task.seasonality, keep=keep)


def past_errors(
    values: Float[np.ndarray, "V T"], *, origins: Int64[np.ndarray, " n"], seasonality: int
) -> Float[np.ndarray, "n V"]:
    """`metrics.seasonal_error` of the values before each origin, in one pass."""

    def means(m: int) -> np.ndarray:
        steps = np.zeros(values.shape)
        steps[:, m:] = np.abs(values[:, m:] - values[:, :-m]) if m < values.shape[-1] else 0.0
        seen = np.isfinite(steps)
        seen[:, :m] = False
        zero = np.zeros((len(values), 1))
        total = np.concatenate([zero, np.cumsum(np.where(seen, steps, 0.0), -1)], -1)
        count = np.concatenate([zero, np.cumsum(seen, -1)], -1)
        return (total[:, origins] / np.maximum(count[:, origins], 1)).T

    return np.where((np.asarray(origins) >= seasonality)[:, None], means(seasonality), means(1))


def every_origin(
    predictions: tuple[Int64[np.ndarray, " n"], Float[np.ndarray, "n V H Q"]],
    truth: Float[np.ndarray, "V T"],
    *,
    levels: Sequence[float],
    seasonality: int,
    item_id: str = "",
    first: int = 0,
) -> Windows:
    """Forecasts made along a series, beside what came; steps after its end are not scored.

    Args:
        predictions: from `OriginForecaster.forecast_origins`.
        truth: the whole series.
        levels: along Q.
        seasonality: of MASE, whose scale is the past's before each origin.
        item_id: names the rows.
        first: origins before it are left out (the training part, or a stream that has only begun).
    """
    origins, quantiles = predictions
    truth = np.asarray(truth, float)
    V, T = truth.shape
    kept = (origins >= max(first, 1)) & (origins < T)
    origins, quantiles = np.asarray(origins)[kept], quantiles[kept]
    horizon = quantiles.shape[2]
    padded = np.concatenate([truth, np.full((V, horizon), np.nan)], -1)
    steps = origins[:, None] + np.arange(horizon)
    target = padded[:, steps].transpose(1, 0, 2)
    return Windows(
        item_ids=(item_id,) * (len(origins) * V),
        origins=np.repeat(origins, V),
        target=target.reshape(-1, horizon),
        quantiles=np.asarray(quantiles, float).reshape(-1, horizon, quantiles.shape[-1]),
        levels=tuple(levels),
        past_error=past_errors(truth, origins=origins, seasonality=seasonality).reshape(-1),
    )


def join(parts: Sequence[Windows]) -> Windows:
    """Windows of several series, scored as one set."""
    return Windows(
        item_ids=tuple(name for part in parts for name in part.item_ids),
        origins=np.concatenate([part.origins for part in parts]),
        target=np.concatenate([part.target for part in parts]),
        quantiles=np.concatenate([part.quantiles for part in parts]),
        levels=parts[0].levels,
        past_error=np.concatenate([part.past_error for part in parts]),
    )


def by_lead(windows: Windows, *, seasonality: int) -> list[dict[str, Any]]:
    """The scores of each step ahead: a row per lead, 1 first."""
    rows = []
    for step in range(windows.target.shape[-1]):
        lead = slice(step, step + 1)
        part = dataclasses.replace(windows, target=windows.target[:, lead], quantiles=windows.quantiles[:, lead])
        numbers = score(part, seasonality=seasonality).numbers()
        del numbers["horizon"]
        rows.append({"lead": step + 1, **numbers})
    return rows
