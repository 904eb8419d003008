"""A fitted model as river knows forecasters: `learn_one` observes the next step, `forecast` looks ahead.

    model = GDNForecaster("runs/demo/model", start="2024-03-01")
    for x, y in stream:
        model.learn_one(y, x)                    # constant time, weights fixed
        model.forecast(24)                       # medians; changes nothing

Importing this module imports river: install `tsgdn[river]`.
"""

from collections.abc import Hashable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float64

from tsgdn.adapters.portable import PortablePredictor, number
from tsgdn.data.clock import Clock, show
from tsgdn.model.forecaster import Forecaster

try:
    from river.time_series.base import Forecaster as RiverForecaster  # pyright: ignore[reportMissingImports]
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("tsgdn.adapters.river needs river: pip install 'tsgdn[river]'", name="river") from error

ITEM = "y"  # river's forecasters know one series, without a name


class GDNForecaster(RiverForecaster):
    """One series, streamed through a fitted model.

    A call of `learn_one` is the next step of `freq`, from `start` on; or, with `time`, the step at the time that `x`
    tells, so that steps may be left out. None and NaN are missing values.

    river's own `evaluate` forecasts before it has told the latest value, and compares with what comes after it: its
    "+1" is the first forecast against the second truth. With `time` the times in `xs` say what to forecast, and the
    comparison is right, of forecasts one step further ahead than it says.

    Args:
        model: a model folder, or a `Forecaster`.
        start: time of the first step: anything that pandas reads as a timestamp; without an offset it is UTC.
        time: the key of `x` under which the time of a step stands, instead of `start`.
        freq: pandas alias of the step; None is that of the folder.
        calendar: whether the first known features of the model are the calendar's; None is what the folder says, and
            true for a `Forecaster`.
        features: keys of `x` that are known features, in the order in which the model was fitted; others are ignored.
        device: where the model runs.

    Raises:
        ValueError: neither or both of `start` and `time`, a model of several variates, or an argument that does not fit
            the model.
    """

    def __init__(
        self,
        model: str | Path | Forecaster,
        start: Any = None,
        *,
        time: str | None = None,
        freq: str | None = None,
        calendar: bool | None = None,
        features: Sequence[Hashable] | None = None,
        device: str = "auto",
    ) -> None:
        self.model, self.start, self.time, self.freq = model, start, time, freq
        self.calendar, self.device = calendar, device
        self.features = features or None  # river cannot clone an empty tuple
        if (start is None) == (time is None):
            raise ValueError("give either start=, the time of the first step, or time=, the key of x that holds times")
        self._stream = PortablePredictor(model, features=features, freq=freq, calendar=calendar, device=device)
        predictor = self._stream.predictor
        if len(predictor.variates) != 1:
            raise ValueError(f"the model has variates {predictor.variates}, a forecaster of river has one")
        self._clock = Clock(predictor.freq)
        self._first = None if start is None else self._grid_start(_stamp(start))

    @property
    def predictor(self) -> Any:
        """The `StatefulPredictor` behind it, whose one series is named "y"."""
        return self._stream.predictor

    def learn_one(self, y: Any, x: dict | None = None) -> None:
        """Observes the next step.

        Args:
            y: the value; None or NaN where it is missing.
            x: known features of this step by name, and its time where `time` is given; is not changed.

        Raises:
            ValueError: a value that is infinite or no number, a time that is missing, off the grid, or too old;
                nothing has been learnt.
        """
        value = number(y, "y")
        stamp = self._next() if self.time is None else self._told(x)
        ahead = 0
        if self._first is not None:
            ahead = int(self._steps(np.array([stamp]))[0]) - self._head()
        elif self.time is not None:
            self._grid_start(stamp)
        # Far jumps wait for rows that agree with them: no features for these.
        near = ahead if x is not None and 0 <= ahead <= 10_000 else -1
        block = self._stream.block({near: x or {}})
        self.predictor.observe([(ITEM, stamp, value)], known=None if block is None else {ITEM: block}, errors="raise")
        if self._first is None:
            self._first = stamp

    def forecast(self, horizon: int | np.integer, xs: Iterable[dict] | None = None) -> list[float]:
        """Medians of the next `horizon` steps; changes nothing.

        Args:
            horizon: steps, beyond what the model forecasts at once too.
            xs: known features of these steps by name, one dict per step; are not changed. Where `time` is given and
                they tell times, these are forecast.

        Returns:
            `horizon` numbers; NaN as long as no value has been learnt.

        Raises:
            ValueError: horizon out of range, not `horizon` dicts, or times that are past or off the grid.
        """
        return self._quantiles(horizon, (0.5,), xs)[:, 0].tolist()

    def forecast_quantiles(
        self, horizon: int | np.integer, levels: Sequence[float] = (0.1, 0.5, 0.9), xs: Iterable[dict] | None = None
    ) -> list[dict[float, float]]:
        """Quantiles of the next `horizon` steps by level; see `forecast`.

        Args:
            horizon: steps.
            levels: increasing, in (0, 1).
            xs: known features of these steps.

        Raises:
            ValueError: as `forecast`, or levels out of range or order.
        """
        levels = tuple(levels)
        return [dict(zip(levels, row, strict=True)) for row in self._quantiles(horizon, levels, xs).tolist()]

    def _quantiles(
        self, horizon: int | np.integer, levels: Sequence[float], xs: Iterable[dict] | None
    ) -> Float64[np.ndarray, "horizon Q"]:
        if isinstance(horizon, bool) or not isinstance(horizon, int | np.integer) or horizon < 1:
            raise ValueError(f"horizon is {horizon!r}, expected a whole number of steps, at least 1")
        future = None if xs is None else list(xs)
        if future is not None and len(future) != horizon:
            raise ValueError(f"xs holds {len(future)} dicts, expected {horizon}, one per step of the horizon")
        if ITEM not in self.predictor:
            return np.full((int(horizon), len(levels)), np.nan)
        wanted = np.arange(horizon)
        if future is not None and self.time is not None and any(self.time in x for x in future):
            wanted = self._steps(np.array([self._told(x) for x in future])) - self._head()
            if (wanted < 0).any():
                past = future[int((wanted < 0).argmax())][self.time]
                raise ValueError(f"xs tells the time {past}, which is not after what has been learnt")
        block = self._stream.block(dict(zip(wanted.tolist(), future or [], strict=False)))
        forecast = self.predictor.forecast(
            ITEM,
            horizon=int(wanted.max()) + 1,
            quantile_levels=levels,
            known=None if block is None else {ITEM: block},
        )
        return forecast.values[0, 0, wanted]

    def _head(self) -> int:
        return self.predictor.head(ITEM) if ITEM in self.predictor else 0

    def _next(self) -> np.datetime64:
        return self._clock.timestamp(self._first, self._head())[()]  # pyright: ignore

    def _told(self, x: dict | None) -> np.datetime64:
        if x is None or x.get(self.time) is None:
            raise ValueError(f"x has no {self.time!r}, where the time of the step is expected")
        return _stamp(x[self.time])

    def _steps(self, stamps: np.ndarray) -> np.ndarray:
        steps, on_grid = self._clock.steps(self._first, stamps)  # pyright: ignore
        if not on_grid.all():
            off = show(stamps[int((~on_grid).argmax())])
            raise ValueError(f"the time {off} is not on the grid of {self._clock.freq!r} from {show(self._first)} on")  # pyright: ignore
        return steps

    def _grid_start(self, stamp: np.datetime64) -> np.datetime64:
        self._clock.timestamp(stamp, 0)  # raises where no grid can start
        return stamp

    @classmethod
    def _unit_test_params(cls) -> Iterator[dict[str, Any]]:
        """For river's own checks."""
        tiny = Forecaster(patch_size=2, patches_ahead=1, seasons=(1,), known_features=1, width=8, depth=1)
        given = {"model": tiny, "freq": "D", "calendar": False, "features": ("time",)}
        yield {**given, "start": "2024-01-01"}


def _stamp(time: Any) -> np.datetime64:
    """A time as naive UTC."""
    try:
        stamp = pd.Timestamp(time)
        naive = stamp if stamp.tz is None else stamp.tz_convert("UTC").tz_localize(None)
        stamp = naive.to_datetime64().astype("M8[ns]")
    except (TypeError, ValueError, AttributeError):
        stamp = np.datetime64("NaT", "ns")
    if isinstance(time, int | float) or np.isnat(stamp):
        raise ValueError(f"time is {time!r:.80}, expected a timestamp, such as 2024-03-01 or a datetime")
    return stamp
