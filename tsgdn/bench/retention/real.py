"""The same question on measured series: the error when a rare regime returns, by the time since it was last there.

Regimes are public holidays (a known feature of vic_elec and metro_traffic; dates for pedestrian_melbourne, which the
model is not told) and the labelled windows of nab. Models are fitted on the first part of the series and read the whole
of it without calendar inputs; only returns after that part count.
"""

import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from tsgdn.bench.fits import Sizes
from tsgdn.bench.matching import matched
from tsgdn.data import catalog, sources
from tsgdn.data.clock import clock
from tsgdn.data.series import Series

SETS = ("vic_elec", "metro_traffic", "pedestrian_melbourne", "nab")
FITTED = 0.6
"""Share of each series that the model is fitted on."""
AWAY = (0, 7, 30, 90)
"""Lower ends of the bins of time away, in days (of nab in days of 288 steps)."""
NEVER = -1
MELBOURNE = """
    2015-01-01 2015-01-26 2015-03-09 2015-04-03 2015-04-04 2015-04-05 2015-04-06 2015-04-25 2015-06-08 2015-10-02
    2015-11-03 2015-12-25 2015-12-26 2015-12-28 2016-01-01 2016-01-26 2016-03-14 2016-03-25 2016-03-26 2016-03-27
    2016-03-28 2016-04-25 2016-06-13 2016-09-30 2016-11-01 2016-12-25 2016-12-26 2016-12-27
"""
"""Public holidays in Melbourne in the years of the pedestrian counts."""


class Marked(NamedTuple):
    """A series and where the rare regime rules."""

    series: Series
    active: Bool[np.ndarray, " T"]
    day: int


class Return(NamedTuple):
    """One return of the regime: first step, steps of it that are scored, steps since the regime was left (or -1)."""

    start: int
    length: int
    away: int


def marked(name: str) -> list[Marked]:
    """The series of a set with their regimes.

    Raises:
        DataNotFound: the data is not here.
        ValueError: another set.
    """
    if name not in SETS:
        raise ValueError(f"set {name!r} has no regimes here; use one of {', '.join(SETS)}")
    series = catalog.load(name).series
    day = catalog.entry(name).seasonality
    if name in ("vic_elec", "metro_traffic"):
        first = series[0]
        if first.known is None:
            raise ValueError(f"{name} has no known feature `holiday`; fetch the set again")
        return [Marked(first, first.known[0, : len(first)] > 0, day)]
    if name == "pedestrian_melbourne":
        days = np.array(MELBOURNE.split(), "M8[D]")
        return [Marked(one, np.isin(_local_days(one, "Australia/Melbourne"), days), day) for one in series]
    path = catalog.find(name)
    labels = json.loads((path.parent / "labels.json").read_text("utf-8"))
    columns = sources.read_parquet(path)
    ids, stamps = columns["item_id"], columns["timestamp"].astype("M8[ns]")
    found = []
    for one in series:
        windows = labels[one.item_id]["windows"]
        if windows and one.freq == clock("5min").freq:
            at = stamps[ids == one.item_id]  # the true times: rows of an irregular stream count as steps
            inside = [(at >= np.datetime64(a[:19])) & (at <= np.datetime64(b[:19])) for a, b in windows]
            found.append(Marked(one, np.any(inside, 0), day))
    return found


def returns(active: Bool[np.ndarray, " T"], *, most: int) -> list[Return]:
    """The runs of a regime: at most `most` steps of each are scored."""
    edge = np.diff(active.astype(np.int8), prepend=0, append=0)
    starts, ends = np.flatnonzero(edge == 1), np.flatnonzero(edge == -1)
    away = [NEVER, *(starts[1:] - ends[:-1]).tolist()][: len(starts)]
    return [Return(int(a), int(min(b - a, most)), int(gap)) for a, b, gap in zip(starts, ends, away, strict=True)]


def bin_of(away: int, day: int) -> int:
    """The lower end of the bin in days; -1 for a regime that was never seen before."""
    return NEVER if away < 0 else max(low for low in AWAY if low * day <= away or low == 0)


def by_time_away(
    error: Float[np.ndarray, " T"], active: Bool[np.ndarray, " T"], *, first: int, day: int
) -> dict[int, tuple[float, int]]:
    """Mean error of a return's first day, by bin, over its mean on other steps; returns before `first` do not count.

    Args:
        error: absolute error of the forecast of each step, NaN where there is none.
        active: where the regime rules.
        first: step from which returns count.
        day: steps of a day.

    Returns:
        Bin (days, -1 never seen): (mean ratio, number of returns).
    """
    usual = np.nanmean(error[first:][~active[first:]])
    found: dict[int, list[float]] = {}
    for one in returns(active, most=day):
        part = error[one.start : one.start + one.length]
        if one.start >= first and np.isfinite(part).any():
            found.setdefault(bin_of(one.away, day), []).append(float(np.nanmean(part) / usual))
    return {low: (float(np.mean(values)), len(values)) for low, values in sorted(found.items())}


def measure(name: str, mixer: str, seed: int, *, epochs: int = 12, accelerator: str = "cpu") -> dict[str, Any]:
    """Fits one model on the first part of a set's series and tells its errors at returns.

    Args:
        name: of the set.
        mixer: of the model, at the sizes of `fits.Sizes`.
        seed: of weights and windows.
        epochs: at most, of 50 steps; validation may end it.
        accelerator: cpu or gpu.

    Returns:
        set, mixer, seed, epochs, train_seconds and bins: [[days, ratio, returns], ...].
    """
    whole = marked(name)
    begin = time.perf_counter()
    predictor = _fit(
        [one.series.slice(0, int(FITTED * len(one.series))) for one in whole], mixer, seed, epochs, accelerator
    )
    seconds = time.perf_counter() - begin
    found: dict[int, list[tuple[float, int]]] = {}
    for one in whole:
        error = _errors(predictor, one.series)
        parts = by_time_away(error, one.active, first=int(FITTED * len(one.series)), day=one.day)
        for low, part in parts.items():
            found.setdefault(low, []).append(part)
    bins = []
    for low, group in sorted(found.items()):
        count = sum(n for _, n in group)
        bins.append([low, float(f"{sum(ratio * n for ratio, n in group) / count:.6g}"), count])
    return {
        "set": name,
        "mixer": mixer,
        "seed": seed,
        "epochs": epochs,
        "train_seconds": round(seconds, 2),
        "bins": bins,
    }


def _fit(training: Sequence[Series], mixer: str, seed: int, epochs: int, accelerator: str) -> Any:
    import lightning.pytorch as pl
    import torch
    from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

    from tsgdn.adapters.predictor import ModelPredictor
    from tsgdn.data.module import ForecastDataModule
    from tsgdn.model.forecaster import Forecaster
    from tsgdn.training.module import ForecastModule

    pl.seed_everything(seed, verbose=False)
    data = ForecastDataModule(
        series=list(training), horizon=clock(training[0].freq).seasonality, calendar=False, batch_size=32,
        steps_per_epoch=50, seed=seed,
    )  # fmt: skip
    shape, size = data.shape, Sizes()
    sizes = matched(mixer, width=size.width, depth=size.depth, state_bytes=size.state_bytes)
    model = Forecaster(
        patch_size=shape["patch_size"],
        patches_ahead=shape["patches_ahead"],
        seasons=shape["seasons"],
        known_features=shape["known_features"],
        width=size.width,
        depth=size.depth,
        mixer=mixer,
        mixer_args=sizes.mixer_args,
        mlp_ratio=sizes.mlp_ratio,
        dropout=0.1,
    )
    module = ForecastModule(model, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        best = ModelCheckpoint(folder, monitor="val_loss", mode="min", save_weights_only=True)
        trainer = pl.Trainer(
            max_epochs=epochs, accelerator=accelerator, devices=1, logger=False, enable_progress_bar=False,
            enable_model_summary=False, gradient_clip_val=1.0, num_sanity_val_steps=0, default_root_dir=folder,
            callbacks=[best, EarlyStopping("val_loss", patience=4)],
        )  # fmt: skip
        trainer.fit(module, datamodule=data)
        module.load_state_dict(torch.load(best.best_model_path, map_location="cpu", weights_only=True)["state_dict"])
    return ModelPredictor(model.cpu().eval(), calendar=False)


def _errors(predictor: Any, series: Series) -> Float[np.ndarray, " T"]:
    """Absolute error of each step's median, forecast at the end of the last patch before it."""
    P = predictor.model.patch_size
    origins, quantiles = predictor.forecast_origins(series, P, [0.5])
    error = np.full(len(series), np.nan)
    for origin, forecast in zip(origins, quantiles[:, 0, :, 0], strict=True):
        part = series.values[0, origin : origin + P]
        error[origin : origin + len(part)] = np.abs(part - forecast[: len(part)])
    return error


def _local_days(series: Series, zone: str) -> np.ndarray:
    import pandas as pd

    stamps = pd.date_range(pd.Timestamp(series.start), periods=len(series), freq=series.freq, tz="UTC")
    return stamps.tz_convert(zone).tz_localize(None).to_numpy().astype("M8[D]")


def write(path: Path, found: dict[str, Any], origin: dict[str, Any]) -> None:
    """One measurement as JSON, in place at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(found | {"origin": origin}) + "\n", encoding="utf-8")
    beside.replace(path)
