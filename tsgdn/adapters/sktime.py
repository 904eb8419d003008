"""A fitted model as sktime knows forecasters: `fit` warms states up, `update` moves them on, `predict` reads them.

    forecaster = GDNForecaster("runs/demo/model").fit(y)
    forecaster.update(new, update_params=False)  # constant time per step, weights fixed
    forecaster.predict(fh=[1, 2, 24])

Nothing is trained here: the weights are those of the model. Importing this module imports sktime: install
`tsgdn[sktime]`.
"""

import contextlib
import warnings
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from tsgdn.adapters.portable import PortablePredictor
from tsgdn.data.clock import Clock, show
from tsgdn.data.series import Series
from tsgdn.model import artefact
from tsgdn.model.forecaster import Forecaster

try:
    from sktime.forecasting.base import BaseForecaster, ForecastingHorizon  # pyright: ignore[reportMissingImports]
except ModuleNotFoundError as error:
    if error.name not in ("sktime", "skbase"):
        raise
    text = "tsgdn.adapters.sktime needs sktime: pip install 'tsgdn[sktime]'"
    raise ModuleNotFoundError(text, name=error.name) from error

ZERO = np.datetime64("2000-01-01", "ns")  # step 0 of a series whose index counts steps
MTYPES = ["pd.DataFrame", "pd-multiindex", "pd_multiindex_hier"]


class GDNForecaster(BaseForecaster):
    """Forecasts of one series, or of all series of a panel or hierarchy from one batch of states.

    Indices are times, periods or whole numbers; whole numbers count steps, and want a model that reads no calendar.
    Missing values and steps are allowed. A series of a panel that ends before the others is forecast from its own end.

    `update` observes; `update_params=True`, sktime's default, has the predictor adapt to the series if it can, and
    warns if it cannot. Data are not kept: sktime's `remember_data` is off.

    Args:
        model: a model folder, or a `Forecaster`, which is in evaluation mode from `fit` on.
        freq: pandas alias of the step; None is that of the folder, or else that of the index.
        calendar: whether the first known features of the model are the calendar's; None is what the folder says, and
            true for a `Forecaster`.
        features: columns of `X` that are known features, in the order in which the model was fitted. `X` may reach
            beyond `y` in `fit` and `update`: features of the future are read at the end of each patch.
        device: where the model runs.

    Examples:
        >>> from tsgdn.adapters.sktime import GDNForecaster
        >>> forecaster = GDNForecaster("runs/demo/model")
    """

    _tags = {  # noqa: RUF012  # sktime's way
        "authors": ["tsgdn"],
        "maintainers": ["tsgdn"],
        "y_inner_mtype": MTYPES,
        "X_inner_mtype": MTYPES,
        "capability:multivariate": True,
        "capability:exogenous": True,
        "capability:insample": False,
        "capability:pred_int": True,
        "capability:pred_int:insample": False,
        "capability:missing_values": True,
        "capability:categorical_in_X": False,
        "capability:update": True,
        "requires-fh-in-fit": False,
        "X-y-must-have-same-index": True,
    }
    _config = {"remember_data": False}  # noqa: RUF012
    _y = _X = None  # where `remember_data` is switched on later

    def __init__(
        self,
        model: str | Path | Forecaster,
        freq: str | None = None,
        calendar: bool | None = None,
        features: Sequence[Hashable] | None = None,
        device: str = "auto",
    ) -> None:
        self.model = model
        self.freq = freq
        self.calendar = calendar
        self.features = features
        self.device = device
        super().__init__()
        if not features:
            self.set_tags(**{"capability:exogenous": False})

    @property
    def predictor(self) -> Any:
        """The `StatefulPredictor` that `fit` made; the one series of a `Series` is named "y"."""
        self.check_is_fitted()
        return self._stream.predictor

    # ---- what sktime calls ------------------------------------------------------------------------------------------

    def _fit(self, y: pd.DataFrame, X: pd.DataFrame | None, fh: Any) -> "GDNForecaster":
        longest = max((frame.index for _, frame in self._frames(y)), key=len)
        stream = self._open(y, longest)
        predictor = stream.predictor
        if predictor.calendar and pd.api.types.is_integer_dtype(longest):
            raise ValueError("the index counts steps, the model reads the calendar: give y an index of times")
        self._stream, self._clock, self._names = stream, Clock(predictor.freq), y.index.names
        self._keys, self._starts, self._ends = {}, {}, {}
        histories = []
        features = dict(self._frames(X))
        for key, frame in self._frames(y):
            item = self._name(key)
            stamps = self._stamps(frame.index)
            steps = self._steps(stamps[0], stamps)
            values = np.full((frame.shape[1], steps[-1] + 1), np.nan)
            values[:, steps] = frame.to_numpy(np.float64).T
            known = self._known(features.get(key), stamps[0], len(values[0]))
            variates = predictor.variates
            histories.append(Series(item, stamps[0], predictor.freq, values, variates=variates, known=known))
            self._keys[key], self._starts[item], self._ends[key] = item, stamps[0], frame.index[-1:]
        predictor.warm_up(histories)
        self._tell_freq()
        return self

    def _update(self, y: pd.DataFrame, X: pd.DataFrame | None = None, update_params: bool = True) -> "GDNForecaster":
        predictor, features = self._stream.predictor, dict(self._frames(X))
        rows, known, ends = [], {}, {}
        for key, frame in self._frames(y):
            item, stamps, cells = self._name(key), self._stamps(frame.index), frame.to_numpy(np.float64)
            values = cells[:, 0] if cells.shape[1] == 1 else cells.tolist()
            rows += zip([item] * len(stamps), stamps, values, strict=True)
            self._keys[key] = item
            self._starts.setdefault(item, stamps[0])
            block = self._known(features.get(key), self._next(item), 1)
            if block is not None:
                known[item] = block
            ends[key] = frame.index[-1:]
        report = predictor.observe(rows, known=known or None)
        for key, end in ends.items():
            if self._keys[key] not in predictor:  # new, and not one of its rows was fit to begin with
                del self._starts[self._keys.pop(key)]
            elif key not in self._ends or self._ends[key][0] < end[0]:
                self._ends[key] = end
        self._tell_freq()
        if report.rejected:
            code, (item, stamp, text) = next((c, f) for c, f in report.first.items() if c != "ts.late")
            warnings.warn(
                f"{report.rejected} of {len(rows)} rows were set aside, the first of item {item} at {stamp}: {code}, "
                f"{text}",
                stacklevel=3,
            )
        if update_params:
            self._adapt()
        return self

    def _predict(self, fh: Any, X: pd.DataFrame | None) -> pd.DataFrame:
        index, values = self._forecast(fh, X, [0.5])
        return pd.DataFrame(values[:, :, 0], index, self._get_columns("predict"))

    def _predict_quantiles(self, fh: Any, X: pd.DataFrame | None, alpha: list[float]) -> pd.DataFrame:
        index, values = self._forecast(fh, X, alpha)
        columns = self._get_columns("predict_quantiles", alpha=alpha)
        return pd.DataFrame(values.reshape(len(index), -1), index, columns)

    # ---- between frames and states ----------------------------------------------------------------------------------

    def _open(self, y: pd.DataFrame, index: pd.Index) -> PortablePredictor:
        """The predictor for series like these."""
        info = artefact.read_series_info(self.model) if isinstance(self.model, str | Path) else {}
        freq, own = self.freq or info.get("freq"), _index_freq(index)
        if freq is None and own is None and isinstance(index, pd.DatetimeIndex) and len(index) > 2:
            own = pd.infer_freq(index)
        if freq is None and own is None:
            raise ValueError("the index of y tells no frequency: give freq=, such as 'h'")
        counted = pd.api.types.is_integer_dtype(index)
        if not counted and freq is not None and own is not None and Clock(own).seasons != Clock(freq).seasons:
            raise ValueError(f"y has freq {own!r}, the model is for {freq!r}: resample y, or take another model")
        names, fitted = [str(name) for name in y.columns], info.get("variates") or []
        if len(set(names)) < len(names):
            raise ValueError(f"columns of y are {names}, expected names that differ")
        if len(fitted) > 1 and names != list(fitted):
            raise ValueError(f"columns of y are {names}, expected those of the fit, in order: {list(fitted)}")
        if info.get("targets") is not None and info["targets"] < len(fitted):
            text = ", ".join(fitted[info["targets"] :])
            raise ValueError(f"the model does not forecast {text}, sktime wants forecasts of every column of y")
        return PortablePredictor(
            self.model,
            features=self.features,
            freq=freq or own,
            calendar=self.calendar,
            variates=names,
            targets=len(names),
            device=self.device,
        )

    def _name(self, key: tuple[Hashable, ...]) -> str:
        """The item of an instance."""
        if key in self._keys:
            return self._keys[key]
        name = "/".join(map(str, key)) if key else "y"
        if name in self._keys.values():
            raise ValueError(f"two instances of y are named {name!r}: give their index levels other values")
        return name

    @staticmethod
    def _frames(data: pd.DataFrame | None) -> Iterator[tuple[tuple[Hashable, ...], pd.DataFrame]]:
        """Instances of a panel or hierarchy, in their order; the key of a single series is empty."""
        if data is None:
            return
        if data.index.nlevels == 1:
            yield (), data
            return
        levels = list(range(data.index.nlevels - 1))
        for key, frame in data.groupby(level=levels if len(levels) > 1 else levels[0], sort=False):
            yield key if isinstance(key, tuple) else (key,), frame.droplevel(levels)

    def _stamps(self, index: pd.Index) -> np.ndarray:
        """The times of an index, naive UTC: of a period its first or last day, as the grid wants it."""
        if pd.api.types.is_integer_dtype(index):
            return self._clock.timestamp(self._clock_zero(), index.to_numpy(np.int64))
        if isinstance(index, pd.PeriodIndex):
            stamps = index.to_timestamp(how="start").to_numpy("M8[ns]")
            if not self._clock.on_grid(stamps).all():
                stamps = index.to_timestamp(how="end").to_numpy("M8[ns]").astype("M8[D]").astype("M8[ns]")
            return stamps
        if not isinstance(index, pd.DatetimeIndex):
            raise ValueError(f"y has an index of {index.dtype}, expected times, periods or whole numbers")
        return (index if index.tz is None else index.tz_convert("UTC").tz_localize(None)).to_numpy("M8[ns]")

    def _clock_zero(self) -> np.datetime64:
        for day in range(366):  # the first day on which a grid of this frequency can start
            if self._clock.on_grid(ZERO + np.timedelta64(day, "D")):
                return ZERO + np.timedelta64(day, "D")
        return ZERO

    def _steps(self, start: np.datetime64, stamps: np.ndarray) -> np.ndarray:
        steps, on_grid = self._clock.steps(start, stamps)
        if not on_grid.all():
            off = show(stamps[int((~on_grid).argmax())])
            raise ValueError(f"the time {off} is not on the grid of {self._clock.freq!r} from {show(start)} on")
        return steps

    def _next(self, item: str) -> np.datetime64:
        """The time of the next step of a series."""
        predictor = self._stream.predictor
        head = predictor.head(item) if item in predictor else 0
        return self._clock.timestamp(self._starts[item], head)[()]  # pyright: ignore

    def _known(self, X: pd.DataFrame | None, start: np.datetime64, least: int) -> np.ndarray | None:
        """Known features (F, n) from `start` on, at least so many steps; NaN where X has none."""
        if X is None or not self._stream.features:
            return None
        missing = [name for name in self._stream.features if name not in X.columns]
        if missing:
            raise ValueError(f"X has no column {missing[0]!r}, features are {list(self._stream.features)}")
        steps = self._steps(start, self._stamps(X.index))
        ahead = steps >= 0
        block = np.full((len(self._stream.features), max(least, int(steps.max()) + 1)), np.nan)
        block[:, steps[ahead]] = X[list(self._stream.features)].to_numpy(np.float64)[ahead].T
        return block

    def _forecast(self, fh: Any, X: pd.DataFrame | None, levels: Sequence[float]) -> tuple[pd.Index, np.ndarray]:
        """Index, and quantiles (rows, V, levels) in the order asked for."""
        predictor = self._stream.predictor
        order = np.argsort(levels)
        features = dict(self._frames(X))
        known, ahead, steps = {}, {}, {}
        for key, item in self._keys.items():
            ahead[key] = self._ahead(fh, self._ends[key])
            start = self._next(item)
            steps[key] = self._steps(start, self._stamps(ahead[key]))
            if (steps[key] < 0).any():
                raise NotImplementedError(
                    f"no in-sample forecasts: {ahead[key][0]} is not after what series {item} has observed"
                )
            block = self._known(features.get(key), start, 1)
            if block is not None:
                known[item] = block
        horizon = 1 + max(int(own.max()) for own in steps.values())
        wanted = [float(levels[i]) for i in order]
        forecast = predictor.forecast(
            list(self._keys.values()), horizon=horizon, quantile_levels=wanted, known=known or None
        )
        back = np.argsort(order)
        rows = [forecast.values[i][:, steps[key]].transpose(1, 0, 2)[:, :, back] for i, key in enumerate(self._keys)]
        if list(self._keys) == [()]:
            return ahead[()], rows[0]
        tuples = [(*key, time) for key in self._keys for time in ahead[key]]
        return pd.MultiIndex.from_tuples(tuples, names=self._names), np.concatenate(rows)

    def _ahead(self, fh: Any, end: pd.Index) -> pd.Index:
        """What times a horizon means for a series that ends at `end`."""
        if not fh.is_relative:
            return fh.to_pandas()
        steps = fh.to_pandas()
        if not pd.api.types.is_integer_dtype(steps):
            raise NotImplementedError(f"fh is of {steps.dtype}, expected whole steps or times")
        if isinstance(end, pd.DatetimeIndex):  # sktime wants an index with a frequency; the clock has one
            stamps = self._clock.timestamp(self._stamps(end)[0], steps.to_numpy(np.int64))
            times = pd.DatetimeIndex(stamps, name=end.name)
            return times if end.tz is None else times.tz_localize("UTC").tz_convert(end.tz)
        return ForecastingHorizon(steps, is_relative=True).to_absolute_index(end)

    def _tell_freq(self) -> None:
        """Gives sktime's own clock a frequency where its index has none, so that it can count times as steps."""
        cutoff = self._cutoff
        if isinstance(cutoff, pd.DatetimeIndex) and cutoff.freq is None:
            with contextlib.suppress(ValueError):  # weeks of any phase are steps to us, not to pandas
                self._cutoff = pd.DatetimeIndex(cutoff, freq=self._clock.freq)

    def _adapt(self) -> None:
        adapt = getattr(self._stream.predictor, "adapt", None)
        if adapt is not None:
            adapt()
            return
        warnings.warn(
            "update_params=True: this predictor cannot adapt, the rows were observed and the weights stay as they "
            "are; give update_params=False",
            stacklevel=4,
        )

    @classmethod
    def get_test_params(cls, parameter_set: str = "default") -> list[dict[str, Any]]:
        """Arguments for sktime's own checks.

        Args:
            parameter_set: there is one set of them.
        """
        sizes = {"patch_size": 2, "patches_ahead": 1, "seasons": (1,), "width": 8, "depth": 1}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            models = [Forecaster(**sizes, mixer=mixer).eval() for mixer in ("gated_deltanet", "gru")]
        return [{"model": model, "calendar": False} for model in models]


def _index_freq(index: pd.Index) -> str | None:
    """The frequency that an index states; whole numbers count steps of any."""
    if pd.api.types.is_integer_dtype(index):
        return "s"
    return index.freqstr if isinstance(index, pd.PeriodIndex | pd.DatetimeIndex) else None
