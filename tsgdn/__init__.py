"""Forecasting with gated delta networks whose state streams.

    predictor = tsgdn.StatefulPredictor.from_pretrained(folder)
    predictor.observe(frame)
    predictor.forecast(horizon=24)

The ten names below are all that is public here; each is imported when it is first used, so that `tsgdn --help` loads
no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tsgdn.adapters.gluonts import GDNEstimator, GDNPredictor
    from tsgdn.data.catalog import load
    from tsgdn.data.series import Series
    from tsgdn.model.forecaster import Forecaster
    from tsgdn.streaming.predictor import StatefulPredictor
    from tsgdn.types import QUANTILE_LEVELS, Batch, ForecastBatch, Quantiles

__version__ = "0.1.0"

_HOME = {
    "Forecaster": "tsgdn.model.forecaster",
    "StatefulPredictor": "tsgdn.streaming.predictor",
    "GDNEstimator": "tsgdn.adapters.gluonts",
    "GDNPredictor": "tsgdn.adapters.gluonts",
    "Series": "tsgdn.data.series",
    "load": "tsgdn.data.catalog",
    "Batch": "tsgdn.types",
    "Quantiles": "tsgdn.types",
    "ForecastBatch": "tsgdn.types",
    "QUANTILE_LEVELS": "tsgdn.types",
}

__all__ = [
    "Forecaster",
    "StatefulPredictor",
    "GDNEstimator",
    "GDNPredictor",
    "Series",
    "load",
    "Batch",
    "Quantiles",
    "ForecastBatch",
    "QUANTILE_LEVELS",
]


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'tsgdn' has no attribute {name!r}; public are {', '.join(_HOME)}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
