"""A stateful predictor inside an estimator of another library, which copies and pickles its estimators."""

import tempfile
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from tsgdn.data.clock import Clock
from tsgdn.model.forecaster import Forecaster
from tsgdn.streaming.predictor import StatefulPredictor


class PortablePredictor:
    """A `StatefulPredictor` that can be copied and pickled.

    Copies share the weights, which never change. A pickle holds weights and states: it needs no folder to be read.

    Args:
        model: a model folder, or a `Forecaster`, which is in evaluation mode from now on.
        features: names of the known features besides the calendar, in the order in which the model was fitted.
        options: arguments of `StatefulPredictor`; None is as if not given.

    Raises:
        ValueError: the folder is no model, `features` are not as many as the model takes, or an option is out of range.
    """

    def __init__(
        self, model: str | Path | Forecaster, *, features: Sequence[Hashable] | None = None, **options: Any
    ) -> None:
        given = {name: value for name, value in options.items() if value is not None}
        if isinstance(model, Forecaster):
            if "freq" not in given:
                raise ValueError("a Forecaster does not say what frequency it is for: give freq=, such as 'h'")
            self.predictor = StatefulPredictor(model, **given)
        elif isinstance(model, str | Path):
            self.predictor = StatefulPredictor.from_pretrained(model, **given)
        else:
            raise ValueError(f"model is a {type(model).__name__}, expected a model folder or a Forecaster")
        if isinstance(features, str):
            raise ValueError(f"features is the text {features!r}, expected a list of names: [{features!r}]")
        self.features = tuple(features or ())
        calendar = Clock(self.predictor.freq).calendar_size if self.predictor.calendar else 0
        wanted = self.predictor.model.known_features - calendar
        if len(self.features) != wanted:
            raise ValueError(
                f"features are {self.features}, the model takes {wanted} known features besides the calendar: give "
                "that many names, in the order of the fit"
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> "PortablePredictor":
        copy = object.__new__(PortablePredictor)
        copy.predictor, copy.features = self.predictor.fork(), self.features
        return copy

    def __getstate__(self) -> dict[str, Any]:
        predictor = self.predictor
        with tempfile.TemporaryDirectory() as folder:
            predictor.save(folder)
            files = {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}
        options = {
            "freq": predictor.freq,
            "calendar": predictor.calendar,
            "variates": predictor.variates,
            "targets": len(predictor.targets),
            "horizon": predictor.horizon,
            "min_values": predictor.min_values,
        }
        return {"model": predictor.model, "options": options, "features": self.features, "files": files}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.predictor, self.features = StatefulPredictor(state["model"], **state["options"]), state["features"]
        with tempfile.TemporaryDirectory() as folder:
            for name, data in state["files"].items():
                (Path(folder) / name).write_bytes(data)
            self.predictor.load(folder)

    def block(self, columns: Mapping[int, Mapping[Any, Any]]) -> Float32[np.ndarray, "F n"] | None:
        """Known features as `observe` and `forecast` take them.

        Args:
            columns: values by name, by steps from the series' next one on. Further names are ignored, those without a
                number are absent.

        Returns:
            (F, 1 + the last step); None where the model takes no features or none is given.

        Raises:
            ValueError: a value is no number.
        """
        ahead = {step: column for step, column in columns.items() if step >= 0}
        if not self.features or not ahead:
            return None
        block = np.full((len(self.features), 1 + max(ahead)), np.nan, np.float32)
        for step, column in ahead.items():
            for row, name in enumerate(self.features):
                block[row, step] = number(column.get(name), f"feature {name!r}")
        return block


def number(value: Any, what: str) -> float:
    """A value as a float; None is missing, NaN.

    Raises:
        ValueError: it is none; `what` names it.
    """
    try:
        return float("nan") if value is None else float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{what} is {value!r:.80}, expected a number, or None where it is missing") from None
