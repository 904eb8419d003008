"""What a watch tells: the worth of values, alarms, how series have done."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float64, Int64

from tsgdn.streaming.scores import Scores
from tsgdn.streaming.signals import Signals


class Scored(NamedTuple):
    """What values were worth, in the order of the call.

    Attributes:
        scores: against the forecast issued at the end of the patch before; NaN where there was none.
        signals: anomalies and drifts.
    """

    scores: Scores
    signals: Signals


class Alarms(NamedTuple):
    """What spoke, one entry each.

    Attributes:
        row: place of the series in the call.
        variate: place along V.
        kind: place in `signals.KINDS`.
        step: at which it spoke.
        score: see `Signals`.
        since: see `Signals`.
    """

    row: Int64[np.ndarray, " n"]
    variate: Int64[np.ndarray, " n"]
    kind: Int64[np.ndarray, " n"]
    step: Int64[np.ndarray, " n"]
    score: Float64[np.ndarray, " n"]
    since: Int64[np.ndarray, " n"]


class Heard(NamedTuple):
    """What came of a stretch of cells.

    Attributes:
        slots: of the series.
        first: steps of their first cells.
        lengths: how many cells each series had.
        pit: see `Scores`.
        z: see `Scores`.
        alarms: rows are places along B.
    """

    slots: Int64[np.ndarray, " B"]
    first: Int64[np.ndarray, " B"]
    lengths: Int64[np.ndarray, " B"]
    pit: Float64[np.ndarray, "B V T"]
    z: Float64[np.ndarray, "B V T"]
    alarms: Alarms

    def after(self, steps: Int64[np.ndarray, " B"]) -> "Heard":
        """The same without alarms of earlier steps."""
        new = self.alarms.step >= steps[self.alarms.row]
        return self._replace(alarms=Alarms(*(part[new] for part in self.alarms)))


class Summary(NamedTuple):
    """How the forecasts of series have done; decayed, NaN where nothing was scored. N ranges of leads, C coverages.

    Attributes:
        count: values scored.
        means: log score, CRPS, absolute error of the median.
        histogram: shares of PITs in 20 equal bins.
        raw: coverage of the model's own intervals.
        calibrated: coverage of the intervals as they were issued.
        theta: logarithm of the factor between their widths.
        standings: mean absolute error of the frozen forecast, the corrected one and persistence, in units of the scale.
        alarms: of each of `signals.KINDS`, since the beginning.
    """

    count: Int64[np.ndarray, "B V"]
    means: Float64[np.ndarray, "B V 3"]
    histogram: Float[np.ndarray, "B V bins"]
    raw: Float64[np.ndarray, "B V N C"]
    calibrated: Float64[np.ndarray, "B V N C"]
    theta: Float64[np.ndarray, "B V N C"]
    standings: Float64[np.ndarray, "B V N 3"]
    alarms: Int64[np.ndarray, "B V 3"]
