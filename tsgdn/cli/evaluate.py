"""`tsgdn evaluate`: scores on published windows. `tsgdn backtest`: scores at every origin, in one pass."""

import argparse
import csv
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SHOWN = ("wql", "mase", "nd", "coverage50", "coverage80", "coverage98")
NAIVE = ("seasonal_naive", "persistence")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `tsgdn evaluate`."""
    _add_common(parser)
    parser.add_argument(
        "--dataset",
        nargs="+",
        metavar="NAME",
        help="sets or cells to score on, `all` = every cell here of the model's frequency; default: the model's",
    )
    parser.add_argument(
        "--baselines", nargs="*", metavar="NAME", default=list(NAIVE),
        help="to score beside it: seasonal_naive, persistence (default), drift, random_walk",
    )  # fmt: skip
    parser.add_argument(
        "--gluonts", action=argparse.BooleanOptionalAction, default=True,
        help="also score the model through GluonTS's evaluate_model; exit 1 where the two differ (default)",
    )  # fmt: skip


def add_backtest_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `tsgdn backtest`."""
    _add_common(parser)
    parser.add_argument("--dataset", metavar="NAME", help="set or cell to score on; default: the model's")
    parser.add_argument("--horizon", type=int, metavar="N", help="steps ahead; default: those of the cell")
    parser.add_argument("--first", type=int, metavar="STEP", help="first origin; default: where the test part begins")


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="DIR", help="folder that `tsgdn fit` or `tsgdn export` wrote")
    parser.add_argument("--out", metavar="DIR", default="evaluation", help="folder for tables and charts (evaluation)")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout instead of a table")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")


def run(args: argparse.Namespace) -> int:
    """Scores a model on the windows of one or more cells.

    Returns:
        0, or 1 where GluonTS's scores and ours differ.

    Raises:
        Misuse: a folder, set, baseline or device that does not exist, or a model that does not fit the data.
    """
    from tsgdn.cli.main import Misuse
    from tsgdn.evaluation import backtest

    predictor, info = _predictor(args)
    tasks = _tasks(args.dataset, info)
    contenders = {"model": predictor}
    for name in args.baselines:
        if name not in ("seasonal_naive", "persistence", "drift", "random_walk"):
            raise Misuse(f"no baseline {name!r}; there are seasonal_naive, persistence, drift and random_walk")
        contenders[name] = None
    rows, items, charts, agrees = [], [], [], True
    for task in tasks:
        _, instances = _split(task, info)
        kept = {}
        for name, contender in contenders.items():
            _say(f"{task.name}: {name}, {len(instances)} windows")
            try:
                windows = backtest.forecast_windows(
                    contender or _baseline(name, task), instances, seasonality=task.seasonality
                )
            except ValueError as error:
                raise Misuse(f"{task.name}: {error}") from error
            kept[name] = scores = backtest.score(windows, seasonality=task.seasonality, keep=True)
            rows.append({"task": task.name, "forecaster": name, **scores.numbers()})
            items += [{"task": task.name, "forecaster": name, **row} for row in scores.table()]
        if args.gluonts:
            _say(f"{task.name}: model, through GluonTS")
            rows[-len(contenders)]["gluonts"] = theirs = _through_gluonts(predictor, info, task, instances)
            agrees &= _agree(task.name, theirs, rows[-len(contenders)])
        charts += _chart(Path(args.out), task, instances, kept)
    return _finish(args, rows, {"scores": rows, "items": items}, charts, failed=not agrees)


def run_backtest(args: argparse.Namespace) -> int:
    """Scores a model, and the naive forecasts, at every patch end of the series.

    Returns:
        0.

    Raises:
        Misuse: a folder, set or device that does not exist, or a model that does not fit the data.
    """
    import numpy as np

    from tsgdn.cli.main import Misuse
    from tsgdn.evaluation import backtest, baselines

    predictor, info = _predictor(args)
    (task,) = _tasks([args.dataset] if args.dataset else None, info)
    horizon = task.horizon if args.horizon is None else args.horizon
    if horizon < 1:
        raise Misuse(f"--horizon {horizon}: expected at least 1")
    if args.first is not None and args.first < 0:
        raise Misuse(f"--first {args.first}: expected at least 0")
    train, _ = _split(task, info)
    whole = task.series(multivariate=len(info.get("variates", ())) > 1)
    levels, m = backtest.REPORT_LEVELS, task.seasonality
    parts: dict[str, list[Any]] = {"model": [], **{name: [] for name in NAIVE}}
    for begun, series in zip(train, whole, strict=True):
        first = len(begun) if args.first is None else args.first
        try:
            origins, quantiles = predictor.forecast_origins(series, horizon, levels, first=first)
        except ValueError as error:
            raise Misuse(f"{task.name}: {error}") from error
        _say(f"{task.name}: {series.item_id}, {len(origins)} origins")
        given = {"levels": levels, "seasonality": m, "item_id": series.item_id}
        found = {"model": quantiles}
        for which, season in zip(NAIVE, (m, 1), strict=True):
            naive = baselines.SeasonalNaive(season)
            found[which] = naive.at_origins(series.values, origins=origins, horizon=horizon, levels=levels)
        for which, values in found.items():
            parts[which].append(backtest.every_origin((origins, values), _only_targets(series.values, info), **given))
    windows = {which: backtest.join(one) for which, one in parts.items()}
    if not len(windows["model"].origins) or not np.isfinite(windows["model"].target).any():
        raise Misuse(f"{task.name}: no origin has a value after it; choose an earlier --first")
    rows, leads, charts = [], [], []
    tables = {which: backtest.by_lead(one, seasonality=m) for which, one in windows.items()}
    for which, one in windows.items():
        scores = backtest.score(one, seasonality=m)
        rows.append({"task": task.name, "forecaster": which, **scores.numbers()})
        leads += [{"task": task.name, "forecaster": which, **row} for row in tables[which]]
    charts += _lead_chart(Path(args.out), task.name, tables)
    return _finish(args, rows, {"backtest": rows, "by_lead": leads}, charts)


# ---- what both need --------------------------------------------------------------------------------------------------


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _predictor(args: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """The model and what its folder says of the series."""
    from tsgdn.adapters.predictor import ModelPredictor
    from tsgdn.cli.main import Misuse
    from tsgdn.model.artefact import ArtefactError, read_series_info

    out = Path(args.out)
    if out.exists() and not out.is_dir():
        raise Misuse(f"--out {out} is a file; give a folder")
    try:
        return ModelPredictor.from_pretrained(args.model, device=_device(args.device)), read_series_info(args.model)
    except ArtefactError as error:
        raise Misuse(str(error)) from error


def _device(name: str) -> Any:
    import torch

    from tsgdn.cli.main import Misuse

    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise Misuse(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def _tasks(given: Sequence[str] | None, info: dict[str, Any]) -> list[Any]:
    """What is to be scored; all of it is here, and of the frequency that the model was fitted on."""
    from tsgdn.cli.main import Misuse
    from tsgdn.data import catalog
    from tsgdn.data.module import find_task

    if given and "all" in given:
        unfit = {task.name: _unfit(task, info) for task in catalog.cells()}
        for why in filter(None, unfit.values()):
            _say(f"left out: {why}")
        if all(unfit.values()):
            raise Misuse("no cell is here that the model can be scored on; name one, see tsgdn data list")
        return [task for task in catalog.cells() if not unfit[task.name]]
    if not given and not info.get("dataset"):
        raise Misuse("the model's folder names no data set; give --dataset NAME (see tsgdn data list)")
    try:
        tasks = [find_task(name) for name in dict.fromkeys(given or [info["dataset"]])]
    except KeyError as error:
        raise Misuse(str(error.args[0])) from error
    for task in tasks:
        why = _unfit(task, info)
        if why:
            raise Misuse(why)
    return tasks


def _unfit(task: Any, info: dict[str, Any]) -> str:
    """Why a model cannot be scored on a task; empty where it can."""
    from tsgdn.data import catalog
    from tsgdn.data.clock import clock

    fitted = info.get("freq")
    if fitted and clock(fitted).seasons != clock(task.freq).seasons:
        return f"{task.name} has freq {task.freq!r}, the model was fitted on {fitted!r}: fit one for it"
    try:
        if catalog.entry(task.dataset).layout != "simulated":
            catalog.find(task.dataset)
    except catalog.DataNotFound as error:
        return str(error)
    return ""


def _split(task: Any, info: dict[str, Any]) -> tuple[list[Any], Sequence[Any]]:
    """The cell's split; labels of past covariates are NaN, which nothing scores."""
    from tsgdn.cli.main import Misuse

    try:
        train, instances = task.split(multivariate=len(info.get("variates", ())) > 1)
    except (FileNotFoundError, ValueError) as error:
        raise Misuse(str(error)) from error
    if _targets(info) is None:
        return train, instances
    return train, [(context, _only_targets(label, info)) for context, label in instances]


def _targets(info: dict[str, Any]) -> int | None:
    """Leading variates that the model forecasts, where others ride along."""
    targets = info.get("targets")
    return targets if targets and targets < len(info.get("variates", ())) else None


def _only_targets(values: Any, info: dict[str, Any]) -> Any:
    import numpy as np

    kept = np.array(values)
    if _targets(info) is not None:
        kept[_targets(info) :] = np.nan
    return kept


def _baseline(name: str, task: Any) -> Any:
    from tsgdn.evaluation import baselines

    return {
        "seasonal_naive": baselines.SeasonalNaive(task.seasonality),
        "persistence": baselines.persistence,
        "drift": baselines.drift,
        "random_walk": baselines.BootstrapRandomWalk(),
    }[name]


def _through_gluonts(predictor: Any, info: dict[str, Any], task: Any, instances: Sequence[Any]) -> dict[str, float]:
    """WQL, MASE, ND and the coverage of single levels as GluonTS computes them, from forecasts that it asked for."""
    import warnings

    from gluonts.ev.metrics import MASE, ND, Coverage, MeanWeightedSumQuantileLoss
    from gluonts.model.evaluation import evaluate_model

    from tsgdn.adapters.gluonts import GDNPredictor, Instances
    from tsgdn.evaluation.metrics import WQL_LEVELS

    theirs = GDNPredictor(predictor.model, task.horizon, {**info, "freq": None})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # pandas warns of business-day periods, which GluonTS uses
        table = evaluate_model(
            theirs,
            test_data=Instances.of(instances),  # pyright: ignore[reportArgumentType]
            metrics=[MeanWeightedSumQuantileLoss(WQL_LEVELS), MASE(), ND(), Coverage(0.1), Coverage(0.9)],
            axis=None,
            seasonality=task.seasonality,
        )
    return {
        name: float(table[column].iloc[0])
        for name, column in {
            "wql": "mean_weighted_sum_quantile_loss", "mase": "MASE[0.5]", "nd": "ND[0.5]",
            "coverage_of_0.1": "coverage[0.1]", "coverage_of_0.9": "coverage[0.9]",
        }.items()
    }  # fmt: skip


def _agree(name: str, theirs: dict[str, float], ours: dict[str, Any]) -> bool:
    """Whether GluonTS computed the same; float32 forecasts of other batches differ in the seventh digit."""
    agree = True
    for metric in ("wql", "mase", "nd"):
        here, there = ours[metric], theirs[metric]
        unscored = not math.isfinite(here) and not math.isfinite(there)  # all labels 0, or no past error
        if not unscored and not math.isclose(here, there, rel_tol=1e-4):
            _say(f"{name}: {metric} is {here:.6f} here, {there:.6f} through GluonTS; one is wrong")
            agree = False
    return agree


def _chart(out: Path, task: Any, instances: Sequence[Any], kept: dict[str, Any]) -> list[str]:
    """Fans of some windows, spread over items and time."""
    try:
        import numpy as np

        from tsgdn.evaluation import plots
        from tsgdn.evaluation.metrics import level_index

        count = len(instances)
        V = len(instances[0][1])
        steps = 3 * task.horizon
        fans = []
        for window in sorted({int(i) for i in np.linspace(0, count - 1, min(6, count) + 1)[1:]}):
            context, label = instances[window]
            tail = context.slice(max(0, len(context) - max(steps, 48)))
            row = window * V  # the first variate
            times = context.clock.timestamp(tail.start, np.arange(len(tail) + task.horizon))
            others = {
                name.replace("_", " "): scores.windows.quantiles[row, :, level_index(scores.windows.levels, 0.5)]
                for name, scores in kept.items()
                if name == "seasonal_naive"
            }
            mine = kept["model"].windows
            fans.append(
                plots.Fan(context.item_id, times, tail.values[0], mine.quantiles[row], mine.levels, label[0], others)
            )
        scores = kept["model"]
        title = f"{task.name}: WQL {scores.wql:.4f}, MASE {scores.mase:.3f}, {task.horizon} steps ahead"
        return [str(plots.fan_charts(fans, out / f"fan_{_plain(task.name)}.png", title=title))]
    except ModuleNotFoundError as error:
        return _no_chart(error)


def _lead_chart(out: Path, name: str, tables: dict[str, Any]) -> list[str]:
    from tsgdn.evaluation import plots

    named = {which.replace("_", " "): table for which, table in tables.items()}
    try:
        path = out / f"by_lead_{_plain(name)}.png"
        return [str(plots.lead_chart(named, path, title=f"{name}: scores by steps ahead, at every origin"))]
    except ModuleNotFoundError as error:
        return _no_chart(error)


def _no_chart(error: ModuleNotFoundError) -> list[str]:
    if (error.name or "").split(".")[0] != "matplotlib":
        raise error
    _say("no chart was drawn: matplotlib is not installed; pip install 'tsgdn[plot]'")
    return []


def _plain(name: str) -> str:
    return name.replace("/", "_")


def _finish(
    args: argparse.Namespace,
    rows: list[dict[str, Any]],
    tables: dict[str, list[dict[str, Any]]],
    charts: list[str],
    *,
    failed: bool = False,
) -> int:
    """Writes the tables, prints the first, and names the files."""
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    written = list(charts)
    for name, table in tables.items():
        path = out / f"{name}.csv"
        with path.open("w", encoding="utf-8", newline="") as file:
            columns = [c for c in dict.fromkeys(c for row in table for c in row) if c != "gluonts"]
            writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
            writer.writerows(table)
        written.append(str(path))
    found = {"model": str(args.model), "rows": rows, "files": written}
    text = json.dumps(_finite(found), indent=1)
    (out / f"{next(iter(tables))}.json").write_text(text + "\n", encoding="utf-8")
    if args.json:
        print(text)
    else:
        _table(rows)
        for path in [*written, out / f"{next(iter(tables))}.json"]:
            _say(str(path))
    return int(failed)


def _finite(value: Any) -> Any:
    """JSON has no NaN: what could not be scored is null."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _table(rows: list[dict[str, Any]]) -> None:
    columns = ["task", "forecaster", *SHOWN, "horizon", "n", "seasonality"]
    lines = [[c.replace("seasonality", "m") for c in columns]]
    for row in rows:
        lines.append([f"{row[c]:.4f}" if isinstance(row[c], float) else str(row[c]) for c in columns])
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    for line in lines:
        texts = [f"{text:{'<' if i < 2 else '>'}{widths[i]}}" for i, text in enumerate(line)]
        print("  ".join(texts).rstrip())
