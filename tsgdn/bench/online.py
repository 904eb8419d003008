"""Accuracy along a stream: the online protocol without its leak, beside persistence and the seasonal naive.

A stream begins with the first row of the training part, carries its state to the end, and forecasts after every row;
every window of the test part is scored, all steps averaged. Weights are frozen. A second row corrects the forecasts
per variate and lead by recursive least squares on what has come true: at time t, for lead h, nothing newer than the
forecast issued at t - h.
"""

import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64, Int64

from tsgdn.bench.fits import lines
from tsgdn.bench.matching import matched
from tsgdn.bench.online_fit import Recipe, fit
from tsgdn.bench.online_stream import Corrector, every_origin
from tsgdn.bench.record import append, provenance, row
from tsgdn.data.catalog import OnlineTask, online_task
from tsgdn.data.clock import clock
from tsgdn.data.series import Series
from tsgdn.evaluation.baselines import Persistence, SeasonalNaive
from tsgdn.evaluation.metrics import WQL_LEVELS, level_weights
from tsgdn.evaluation.prequential import StreamScores
from tsgdn.model import artefact
from tsgdn.model.forecaster import Forecaster
from tsgdn.streamable import state_bytes
from tsgdn.streaming.adapt import Learning
from tsgdn.streaming.predictor import StatefulPredictor

HORIZONS = (1, 24, 48)
UNITS = {"train_seconds": "s", "state_bytes": "B", "us_per_observation": "us"}
COLD_STARTS = 16  # streams that begin anew, evenly spaced over the test part
COLD_STEPS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True, kw_only=True)
class Published:
    """A line of a published table; errors at the horizons 1, 24 and 48, None where there is none."""

    model: str
    mse: tuple[float | None, ...]
    source: str


_DSOF = "DSOF, Tables 2 and 3 (yyalau/iclr2025_dsof: images)"
_ADAPTZ = "ADAPT-Z, authors' rebuttal, not peer-reviewed (xiannanhuang/RE-ICLR)"
PUBLISHED: dict[str, tuple[Published, ...]] = {
    "exchange_rate_dsof": (
        Published(model="DLinear + DSOF", mse=(0.009, 0.095, 0.192), source=_DSOF),
        Published(model="FITS + DSOF", mse=(0.011, 0.093, 0.176), source=_DSOF),
        Published(model="iTransformer + DSOF", mse=(0.010, 0.110, 0.218), source=_DSOF),
        Published(model="FSNet + DSOF", mse=(0.010, 0.120, 0.270), source=_DSOF),
    ),
    "ettm1_dsof": (
        Published(model="OneNet + DSOF", mse=(0.096, 0.418, 0.554), source=_DSOF),
        Published(model="DLinear + DSOF", mse=(0.105, 0.525, 0.695), source=_DSOF),
        Published(model="PatchTST + DSOF", mse=(0.108, 0.582, 0.805), source=_DSOF),
    ),
    "etth1_adaptz": (
        Published(model="TimeFilter, frozen", mse=(0.1201, 0.3159, 0.3654), source=_ADAPTZ),
        Published(model="TimeKAN, frozen", mse=(0.1277, 0.3215, 0.3652), source=_ADAPTZ),
        Published(model="SOFTS, frozen", mse=(0.1211, 0.3182, 0.3666), source=_ADAPTZ),
        Published(model="TimeFilter + PROCEED", mse=(0.1199, 0.3118, 0.3506), source=_ADAPTZ),
        Published(model="TimeFilter + SOLID", mse=(0.1192, 0.3158, 0.3606), source=_ADAPTZ),
        Published(model="TimeFilter + DSOF", mse=(0.1205, 0.3193, 0.3633), source=_ADAPTZ),
        Published(model="TimeFilter + ADAPT-Z", mse=(0.1107, 0.2942, 0.3431), source=_ADAPTZ),
    ),
}


# ---- what is streamed ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """The rows of a task, and what z-scores are made with.

    Attributes:
        whole: all variates, in the unit of the set, up to the end of the test part.
        mean: of the training rows, per variate.
        sd: likewise, ddof 0.
    """

    task: OnlineTask
    whole: Series
    mean: Float64[np.ndarray, " V"]
    sd: Float64[np.ndarray, " V"]

    @classmethod
    def of(cls, task: OnlineTask) -> "Rows":
        """Loads a task.

        Raises:
            DataNotFound: its set is not here.
        """
        whole = task.series()
        train = whole.values[:, slice(*task.train)]
        return cls(task, whole, train.mean(1), train.std(1))

    def series(self, end: int, *, recipe: Recipe, scored: bool = False) -> list[Series]:
        """What a model is given of the steps before `end`: a series of all variates, or one each with its category."""
        values = self.whole.values[:, :end]
        if scored:
            values = (values - self.mean[:, None]) / self.sd[:, None]
        if recipe.multivariate:
            return [replace(self.whole, values=values, known=None)]
        return [
            Series(name, self.whole.start, self.whole.freq, values[v : v + 1], static=(v + 1,))
            for v, name in enumerate(self.whole.variates)
        ]


def build(freq: str, mixer: str, horizon: int = HORIZONS[-1]) -> Callable[[Recipe, int], Forecaster]:
    """What makes the model of a recipe, for a number of categories."""

    def made(recipe: Recipe, categories: int) -> Forecaster:
        sizes = matched(mixer, width=recipe.width, depth=recipe.depth)
        return Forecaster(
            patch_size=recipe.patch_size,
            patches_ahead=-(-horizon // recipe.patch_size),
            seasons=recipe.seasons,
            known_features=clock(freq).calendar_size if recipe.calendar else 0,
            static_cardinalities=[categories] if categories else [],
            width=recipe.width,
            depth=recipe.depth,
            mixer=sizes.mixer,
            mixer_args=sizes.mixer_args,
            mlp_ratio=sizes.mlp_ratio,
            variate_every=2 if recipe.multivariate else 0,
            half_life=recipe.half_life,
            dropout=recipe.dropout,
        )

    return made


# ---- a cell: one fit, one stream ------------------------------------------------------------------------------------


HOURLY = (1, 24, 48, 72, 96, 168)
RECIPES: dict[str, Recipe] = {
    "etth1_dsof": Recipe(seasons=HOURLY, steps=250),
    "etth1_adaptz": Recipe(seasons=HOURLY),
    "ettm1_dsof": Recipe(seasons=(1, 48, 96, 144, 192, 288, 384)),
    "wth_dsof": Recipe(seasons=HOURLY, steps=250),
    "exchange_rate_dsof": Recipe(seasons=(1,), dropout=0.3, lr=2e-4, steps=100),
}
"""What is fitted, chosen on the validation rows; `experiments/LOG.md` says what else was tried."""

LEARNING = (
    None,
    Learning(forget=0.9998, prior=10.0),
    Learning(forget=0.9998, prior=100.0),
    Learning(forget=0.9998, prior=1000.0),
)
"""Corrections, none being one: that with the smallest relative error on the validation rows goes into the test part."""


@dataclass(frozen=True)
class Cell:
    """One fit."""

    task: str
    mixer: str
    seed: int
    recipe: Recipe
    config: str
    device: str = "cpu"
    horizons: tuple[int, ...] = HORIZONS


def recipe_of(task: str, options: Sequence[str]) -> Recipe:
    """The recipe of a task with `name=value` options over it.

    Raises:
        ValueError: an option that a recipe does not have, or a value of another kind.
    """
    fields = {field.name: field for field in dataclasses.fields(Recipe)}
    given = {}
    for text in options:
        name, equals, value = text.partition("=")
        if not equals or name not in fields:
            raise ValueError(f"{text}: expected OPTION=VALUE, the option being one of {', '.join(fields)}")
        try:
            given[name] = json.loads(value)
        except json.JSONDecodeError:
            raise ValueError(f"{text}: the value is no number, true, false, null or list") from None
    if "seasons" in given:
        given["seasons"] = tuple(given["seasons"])
    return replace(RECIPES[task], **given)


def train(cell: Cell, folder: Path, told: Callable[[str], None] = lambda text: None) -> tuple[Forecaster, float]:
    """The fitted model and the seconds that it took; read from the folder where it lies there already."""
    note = folder / "fit.json"
    wanted = json.loads(json.dumps({"recipe": dataclasses.asdict(cell.recipe), "horizons": cell.horizons}))
    if note.is_file() and (found := json.loads(note.read_text()))["cell"] == wanted:
        return artefact.load(folder / "export", device=cell.device), found["seconds"]
    task = online_task(cell.task)
    rows = Rows.of(task)
    series = rows.series(task.validation[1], recipe=cell.recipe, scored=True)
    found = fit(
        series,
        train=task.train[1],
        horizons=cell.horizons,
        seasonality=task.seasonality,
        recipe=cell.recipe,
        build=build(rows.whole.freq, cell.mixer, cell.horizons[-1]),
        seed=cell.seed,
        device=cell.device,
        told=told,
    )
    info = {
        "dataset": task.dataset,
        "freq": rows.whole.freq,
        "calendar": cell.recipe.calendar,
        "horizon": cell.horizons[-1],
        "variates": list(series[0].variates),
        "targets": len(series[0].variates),
    }
    artefact.save(found.model, folder / "export", series=info)
    note.write_text(json.dumps({"cell": wanted, "seconds": found.seconds, "curve": found.curve}))
    return found.model, found.seconds


@dataclass(frozen=True)
class Streamed:
    """What came of a stream.

    Attributes:
        scores: by (model or baseline, kind): kind is frozen, adapted, or empty.
        validation: mean squared error per horizon of the validation rows, by correction (as text).
        learning: the correction that the validation rows chose; None = none.
        stretch: origins and mean forecasts of the last of them, to compare a predictor with.
    """

    scores: dict[str, StreamScores]
    validation: dict[str, tuple[float, ...]]
    learning: Learning | None
    stretch: tuple[np.ndarray, np.ndarray]


def stream(model: Forecaster, rows: Rows, recipe: Recipe, horizons: Sequence[int] = HORIZONS) -> Streamed:
    """One pass over all rows: what is forecast after each of them, scored from the first test row on.

    Corrections begin in the middle of the training rows and are chosen by the validation rows.
    """
    task, V = rows.task, len(rows.mean)
    (begin, chosen_at), end, H = task.validation, task.test[1], horizons[-1]
    levels = model.quantile_levels
    truth = rows.whole.values
    given = {"scale": rows.sd, "levels": levels, "horizons": horizons}
    naive = {"persistence": Persistence(), "seasonal_naive": SeasonalNaive(task.seasonality)}
    scores = {name: StreamScores(truth, **given, first=chosen_at) for name in ("frozen", "adapted")} | {
        name: StreamScores(truth, **{**given, "levels": WQL_LEVELS}, first=chosen_at) for name in naive
    }
    centred = {"scale": rows.sd, "centre": rows.mean, "horizon": H, "seasonality": task.seasonality, "every": 4}
    correctors = {key: None if key is None else Corrector(**centred, learning=key) for key in LEARNING}
    trial = {key: StreamScores(truth[:, :chosen_at], **given, first=begin) for key in LEARNING}
    weights = level_weights(levels)
    validation: dict[str, tuple[float, ...]] = {}
    stretch: tuple[np.ndarray, np.ndarray] = (np.empty(0, np.int64), np.empty((0, V, H)))
    series = rows.series(end, recipe=recipe)
    for at, quantiles in every_origin(
        model, series, H, at=np.arange(max(1, begin // 2), end), calendar=recipe.calendar
    ):
        mean = quantiles @ weights
        for part in (at < chosen_at, at >= chosen_at):
            origins = at[part]
            if not len(origins):
                continue
            if origins[0] >= chosen_at and len(correctors) > 1:
                errors = {key: [line["mse"] for line in one.table] for key, one in trial.items()}
                validation = {str(key): tuple(found) for key, found in errors.items()}
                best = min(LEARNING, key=lambda one: float(np.mean(np.divide(errors[one], errors[None]))))
                correctors = {best: correctors[best]}
            shifts = {key: _shifts(one, origins, truth, mean[part]) for key, one in correctors.items()}
            if origins[0] < chosen_at:
                for key, shift in shifts.items():
                    trial[key].update(origins, quantiles[part] + shift[..., None], mean[part] + shift)
                continue
            (shift,) = shifts.values()
            scores["frozen"].update(origins, quantiles[part], mean[part])
            scores["adapted"].update(origins, quantiles[part] + shift[..., None], mean[part] + shift)
            for name, baseline in naive.items():
                point = baseline.at_origins(truth, origins=origins, horizon=H, levels=WQL_LEVELS)
                scores[name].update(origins, point)
            stretch = (origins, mean[part])
    return Streamed(scores, validation, next(iter(correctors)), stretch)


def _shifts(corrector: Corrector | None, origins: np.ndarray, truth: np.ndarray, mean: np.ndarray) -> np.ndarray:
    if corrector is None:
        return np.zeros_like(mean)
    return np.stack([corrector.correct(int(o), truth[:, o - 1], m) for o, m in zip(origins, mean, strict=True)])


def cold_start(
    model: Forecaster, rows: Rows, recipe: Recipe, horizons: Sequence[int] = HORIZONS
) -> dict[str, Float64[np.ndarray, "horizons seen"]]:
    """Mean squared error after so many observations of streams that begin anew within the test part.

    Returns:
        Of the cold streams and of persistence at the same steps; along `COLD_STEPS`.
    """
    at, H, starts = np.array(COLD_STEPS), horizons[-1], _cold_starts(rows.task, horizons)
    series = []
    for start in starts:
        for one in rows.series(int(start + at[-1]), recipe=recipe):
            series.append(one.slice(int(start)))
    V, weights = len(rows.mean), level_weights(model.quantile_levels)
    found = {name: np.zeros((len(horizons), len(at))) for name in ("cold", "persistence")}
    for origins, quantiles in every_origin(model, series, H, at=at, calendar=recipe.calendar):
        mean = (quantiles @ weights).reshape(len(origins), len(starts), V, H)
        for n, steps in enumerate(origins):
            column = int(np.searchsorted(at, steps))
            for s, start in enumerate(starts):
                origin = start + steps
                truth = rows.whole.values[:, origin : origin + H]
                last = rows.whole.values[:, origin - 1 : origin]
                for name, forecast in (("cold", mean[n, s]), ("persistence", last)):
                    square = ((truth - forecast) / rows.sd[:, None]) ** 2
                    for i, horizon in enumerate(horizons):
                        found[name][i, column] += square[:, :horizon].mean() / len(starts)
    return found


def replayed(
    model: Forecaster, rows: Rows, recipe: Recipe, stretch: tuple[np.ndarray, np.ndarray], most: int = 64
) -> tuple[float, float]:
    """A predictor that takes the same rows one by one, against the one pass.

    Returns:
        The largest difference of the means in standard deviations of the training rows, and the median microseconds of
        an observation with its forecast, per variate.
    """
    origins, wanted = stretch[0][-most:], stretch[1][-most:]
    first = int(origins[0])
    series = rows.series(first, recipe=recipe)
    live = StatefulPredictor(
        model, freq=rows.whole.freq, calendar=recipe.calendar, variates=series[0].variates, horizon=stretch[1].shape[-1]
    )
    live.warm_up(series)
    items = [one.item_id for one in series]
    ids, weights = np.array(items), level_weights(model.quantile_levels)
    worst, took = 0.0, []
    for n, origin in enumerate(origins):
        begin = time.perf_counter()
        if n:
            stamp = rows.whole.clock.timestamp(rows.whole.start, int(origin) - 1)
            values = rows.whole.values[:, origin - 1].reshape(len(items), -1)
            live.observe((ids, np.full(len(ids), stamp), values[:, 0] if values.shape[1] == 1 else values))
        found = live.forecast(items).values @ weights
        if n:
            took.append(time.perf_counter() - begin)
        difference = np.abs(found.reshape(wanted[n].shape) - wanted[n]) / rows.sd[:, None]
        worst = max(worst, float(difference.max()))
    return worst, 1e6 * statistics.median(took) / len(rows.mean)


# ---- rows ------------------------------------------------------------------------------------------------------------


KEYS = {"task": "", "model": "", "kind": "", "horizon": "", "seen": "", "source": ""}
"""The columns of the question; kind is frozen, adapted, baseline, cold, cost or published; seen is of a cold stream."""


def done(results: Path) -> set[tuple[str, str, str, str]]:
    """(task, model, seed, config) of what has scores."""
    found = (line for line in lines(results) if line["metric"] == "mse")
    return {(line["task"], line["model"], line["seed"], line["config"]) for line in found}


def run(
    tasks: Sequence[str],
    mixers: Sequence[str],
    seeds: Sequence[int],
    *,
    results: Path,
    root: Path,
    horizons: Sequence[int] = HORIZONS,
    device: str = "cpu",
    workers: int = 1,
    options: Sequence[str] = (),
) -> int:
    """Fits and streams what has no rows yet; returns how many cells failed.

    Args:
        tasks: online tasks.
        mixers: mixers and hybrids whose state is bounded.
        seeds: of fits.
        results: CSV to append to.
        root: folder of the fits, and of what the pictures are drawn from.
        horizons: increasing.
        device: where models are fitted and streamed.
        workers: cells at a time, one thread each.
        options: `name=value` of the recipe.

    Raises:
        DataNotFound: a set is not here.
        ValueError: an option that a recipe does not have.
    """
    known, origin = done(results), provenance(device)
    for task in tasks:
        for one in PUBLISHED.get(task, ()):
            if (task, one.model, "", "published") not in known:
                append(results, *_published(task, one, origin))
        Rows.of(online_task(task))
    other = [] if tuple(horizons) == HORIZONS else ["horizons=" + ",".join(map(str, horizons))]
    cells = [
        Cell(task, mixer, seed, recipe_of(task, options), " ".join([task, *other, *options]), device, tuple(horizons))
        for seed in seeds
        for task in tasks
        for mixer in mixers
    ]
    todo = [cell for cell in cells if (cell.task, cell.mixer, str(cell.seed), cell.config) not in known]
    failed = 0
    # a fresh interpreter each: a fork would share torch's threads
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_one_thread) as pool:
        fits = {pool.submit(measured, cell, root / cell.task / cell.mixer / str(cell.seed)): cell for cell in todo}
        for number, future in enumerate(as_completed(fits), 1):
            cell = fits[future]
            name = f"[{number}/{len(todo)}] {cell.task} {cell.mixer} {cell.seed}"
            try:
                found = future.result()
            except (RuntimeError, ValueError, OSError) as error:
                failed += 1
                print(f"{name}: {error}", file=sys.stderr, flush=True)
                continue
            there = done(results)
            fresh = [r for r in found if r["kind"] != "baseline" or (r["task"], r["model"], "", "") not in there]
            append(results, *({**r, **origin} for r in fresh))
            for kind in ("frozen", "adapted"):
                errors = [r["value"] for r in found if r["metric"] == "mse" and r["kind"] == kind]
                print(f"{name}: {kind} MSE {' / '.join(errors)}", file=sys.stderr, flush=True)
    return failed


def _one_thread() -> None:
    torch.set_num_threads(1)


def measured(cell: Cell, folder: Path) -> list[dict[str, Any]]:
    """The rows of a cell; leaves the model, and what the pictures need, in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "fit.log").open("a") as log:

        def told(text: str) -> None:
            log.write(text + "\n")
            log.flush()

        model, seconds = train(cell, folder, told)
        rows = Rows.of(online_task(cell.task))
        began = time.perf_counter()
        streamed = stream(model, rows, cell.recipe, cell.horizons)
        told(f"streamed in {time.perf_counter() - began:.0f} s; {streamed.validation}; {streamed.learning}")
        cold = cold_start(model, rows, cell.recipe, cell.horizons)
        difference, microseconds = replayed(model, rows, cell.recipe, streamed.stretch)
        told(f"predictor differs by {difference:.2e} standard deviations")
    first = rows.task.test[0]
    warm = _warm(streamed.scores["frozen"].by_origin, _cold_starts(rows.task, cell.horizons))
    drawn: dict[str, Any] = {"first": first, "seen": np.array(COLD_STEPS), "cold_frozen": warm}
    drawn |= {name: one.by_origin[:, first:].astype(np.float32) for name, one in streamed.scores.items()}
    drawn |= {f"cold_{name}": errors for name, errors in cold.items()}
    np.savez_compressed(folder / "stream.npz", **drawn)
    given = {"task": cell.task, "model": cell.mixer, "seed": cell.seed, "config": cell.config, "device": cell.device}
    out: list[dict[str, Any]] = []
    for name, one in streamed.scores.items():
        ours = name in ("frozen", "adapted")
        keys = {**given, "kind": name} if ours else {"task": cell.task, "model": name, "kind": "baseline"}
        for line in one.table:
            for metric in ("mse", "mae", "wql", "coverage80"):
                if metric == "coverage80" and not ours:
                    continue  # points have no interval
                out.append(_row(metric, line[metric], n=line["windows"], horizon=line["horizon"], **keys))
    for i, horizon in enumerate(cell.horizons):
        for kind, key in (("frozen", None), ("adapted", streamed.learning)):
            errors = streamed.validation[str(key)]
            out.append(_row("validation_mse", errors[i], horizon=horizon, kind=kind, **given))
        for j, seen in enumerate(COLD_STEPS):
            for kind, errors in cold.items():
                out.append(_row("mse", errors[i, j], n=COLD_STARTS, horizon=horizon, seen=seen, **given,
                                kind="cold" if kind == "cold" else f"cold_{kind}"))  # fmt: skip
    cost = {
        "train_seconds": seconds,
        "parameters": sum(p.numel() for p in model.parameters()),
        "state_bytes": _bytes_per_variate(model, rows, cell.recipe),
        "us_per_observation": microseconds,
        "difference_to_predictor": difference,
    }
    return out + [_row(metric, value, kind="cost", **given) for metric, value in cost.items()]


def _bytes_per_variate(model: Forecaster, rows: Rows, recipe: Recipe) -> int:
    V = len(rows.mean) if recipe.multivariate else 1
    return state_bytes(model.initial_state(1, V)) // V


def _cold_starts(task: OnlineTask, horizons: Sequence[int]) -> Int64[np.ndarray, " starts"]:
    first, last = task.test[0], task.test[1] - COLD_STEPS[-1] - horizons[-1]
    return np.linspace(first, last, COLD_STARTS).astype(np.int64)


def _warm(by_origin: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """The error of the stream that began with the training rows, where the cold streams are."""
    return np.stack([by_origin[:, starts + seen].mean(-1) for seen in COLD_STEPS], -1)


def _row(metric: str, value: float, **given: Any) -> dict[str, Any]:
    """A row without its provenance, which `run` adds."""
    nowhere: dict[str, Any] = dict.fromkeys(("commit", "dirty", "date", "hardware", "torch", "triton"), "")
    return row(metric=metric, value=f"{value:.6g}", unit=UNITS.get(metric, ""), origin=nowhere, **{**KEYS, **given})


def _published(task: str, one: Published, origin: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        row(metric="mse", value=mse, config="published", origin=origin, dtype="",
            **{**KEYS, "task": task, "model": one.model, "kind": "published", "horizon": horizon, "source": one.source})
        for horizon, mse in zip(HORIZONS, one.mse, strict=True) if mse is not None
    ]  # fmt: skip
