"""From cells to the lines of a results.csv: scores of each cell, means over seeds, paired differences, verdicts."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tsgdn.bench.record import COLUMNS
from tsgdn.data.retention import SUITE_VERSION
from tsgdn.evaluation.retention import (
    Difference,
    aurc,
    failed,
    half_life,
    holm_bounds,
    mean_interval,
    paired_difference,
    recalled_bits,
    retention,
    verdict,
)

OWN_COLUMNS = (
    *("suite", "preset", "cell_id", "phase", "task", "mixer", "state_kib", "state_bytes", "params", "init", "lr"),
    *("gap", "load", "low", "high"),
)
HEADER = (*COLUMNS, *OWN_COLUMNS)
NOISE, RECALLS = 0.2, ("T3", "T4", "T5")
UNKNOWABLE, SHOWN = 0.05, 0.9
"""Bounds of the controls: rare Ret without exposure or with another cue; with the values shown at the end."""
LEARNED = 0.5
"""Ret at the shortest gap from which a training counts as having learned the task, for the control of shown values."""
SECONDARY = {"T5": "revised"}
"""A further part of a task that is a claim of its own."""
PRIMARY_TASKS = ("T2", "T3", "T5")


class Line(NamedTuple):
    """What a line says beside its place: all else comes from the cell."""

    metric: str
    value: float | int | str
    unit: str = ""
    n: int | str = ""
    gap: int | str = ""
    low: float | str = ""
    high: float | str = ""


def rows(cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """All lines: of each cell, of each unit over its seeds, of each contrast."""
    out = [line for cell in cells for line in of_cell(cell)]
    report = [cell for cell in cells if cell["cell"]["phase"] == "report"]
    for group in _grouped(report, ("seed",)).values():
        out += of_unit(group)
    out += contrasts(report)
    return out


def of_references(checks: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines of the closed-form references, with the bounds that are known for them."""
    empty = dict.fromkeys(HEADER, "")
    return [
        empty
        | check["origin"]
        | {key: check[key] for key in ("suite", "preset", "task", "gap", "metric")}
        | {"dtype": "float64", "phase": "reference", "mixer": check["name"], "value": _told(check["value"])}
        | {"low": _told(check["low"]), "high": _told(check["high"])}
        for check in checks
    ]


def of_real(measured: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines of the measured series: error at a return over the usual error, by days away (`gap`; -1: never there)."""
    empty = dict.fromkeys(HEADER, "")
    return [
        empty
        | one["origin"]
        | {"suite": SUITE_VERSION, "preset": "real", "phase": "real", "task": one["set"], "mixer": one["mixer"]}
        | {"seed": one["seed"], "dtype": "float32", "config": json.dumps({"epochs": one["epochs"]})}
        | {"metric": "return_error", "gap": low, "value": _told(ratio), "n": count}
        for one in measured
        for low, ratio, count in one["bins"]
    ]


def out_of_bounds(lines: Iterable[Mapping[str, str]]) -> int:
    """How many references are not where they are known to be."""
    return sum(
        not float(line["low"]) <= float(line["value"]) <= float(line["high"])
        for line in lines
        if line["phase"] == "reference"
    )


def errors(cell: dict[str, Any], part: str, what: str = "error") -> np.ndarray:
    """(G, N): sums of a part over groups of sequences, gaps rising.

    A training that diverged counts as the memoryless forecast, as the pre-registration says.
    """
    if what == "error" and cell.get("diverged"):
        what = "base"
    gaps = sorted(cell["scores"]["gaps"], key=int)
    return np.array([cell["scores"]["gaps"][gap][part][what] for gap in gaps])


def parts(cell: dict[str, Any]) -> list[str]:
    """The kinds of probes that the cell was asked."""
    first = next(iter(cell["scores"]["gaps"].values()))
    return [name for name in first if "error" in first[name]]


def curve(cell: dict[str, Any], part: str) -> tuple[list[int], np.ndarray]:
    """Gaps and Ret at each."""
    gaps = sorted(map(int, cell["scores"]["gaps"]))
    return gaps, retention(errors(cell, part), errors(cell, part, "base"))


def of_cell(cell: dict[str, Any]) -> list[dict[str, Any]]:
    """Scores and costs of one training."""
    lines: list[Line] = []
    for part in parts(cell):
        gaps, ret = curve(cell, part)
        n = errors(cell, part).shape[1]
        lines += [Line(f"ret_{part}", _told(value), n=n, gap=gap) for gap, value in zip(gaps, ret, strict=True)]
        lines.append(Line(f"aurc_{part}", _told(aurc(ret)), n=len(gaps)))
        lines.append(Line(f"nmse_{part}", _told(np.mean(1 - ret)), n=len(gaps)))
        if part == "rare":
            lines.append(Line("failed", int(failed(ret[None])[0]), n=1))
            if len(gaps) > 1:
                crossing = half_life(np.array(gaps), ret)
                sign = {"below": "<", "above": ">"}.get(crossing.censored or "", "")
                lines.append(Line("g50", f"{sign}{crossing.at:.6g}", "steps"))
    for gap, scores in cell["scores"]["gaps"].items():
        for name, value in scores.get("plain", {}).items():
            lines.append(Line(name, _told(value), gap=int(gap)))
    lines.append(Line("not_finite", cell["scores"]["not_finite"]))
    lines.append(Line("diverged", int(cell["diverged"])))
    lines.append(Line("train_seconds", _told(cell["cost"]["train_seconds"]), "s", n=cell["cost"]["replicas"]))
    for name, value in cell.get("latency", {}).items():
        lines.append(Line(name, _told(value), "us"))
    for name, value in cell.get("probes", {}).items():
        lines.append(Line(name, _told(value)))
    channels, noise = cell["size"].get("channels"), cell["cell"]["axes"].get("noise", NOISE)
    if cell["cell"]["task"] in RECALLS and channels:
        visible = 1 if cell["cell"]["task"] == "T4" else 4 * cell["cell"]["axes"].get("exposures", 1)
        ceiling = 1 - noise**2 / (visible + noise**2)
        for gap, value in zip(*curve(cell, "rare"), strict=True):
            bits = recalled_bits(float(value), channels=channels, filter_ret=ceiling)
            lines.append(Line("recalled_bits", _told(bits), "bits", gap=gap))
    return [_row(cell, line) for line in lines]


def of_unit(group: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over the seeds of one unit, with intervals where there are several; and its controls."""
    first, lines = group[0], []
    held = [_row(first, line, seed="", phase="control") for line in _controls(group)]
    if len(group) < 2:
        return held
    for part in parts(first):
        gaps = sorted(map(int, first["scores"]["gaps"]))
        error, base = (np.stack([errors(cell, part, what) for cell in group]) for what in ("error", "base"))
        for g, gap in enumerate(gaps):
            value, low, high = mean_interval(error[:, g], base[:, g], draws=2000)
            lines.append(Line(f"mean_ret_{part}", _told(value), "", len(group), gap, _told(low), _told(high)))
        scores = aurc(retention(error, base))
        lines.append(Line(f"mean_aurc_{part}", _told(scores.mean()), n=len(group)))
    share = failed(np.stack([curve(cell, "rare")[1] for cell in group]))
    lines.append(Line("failure_rate", _told(share.mean()), n=len(group)))
    return held + [_row(first, line, seed="") for line in lines]


def _controls(group: Sequence[dict[str, Any]]) -> list[Line]:
    """The worst seed of each control, and the bound it must keep: low where nothing can be known, high where shown.

    The last one counts for trainings that learned the task only.
    """
    out = []
    for name in group[0].get("controls", {}):
        learned = [cell for cell in group if curve(cell, "rare")[1][0] >= LEARNED]
        if name != "shown":
            values = [cell["controls"][name] for cell in group]
            out.append(Line(f"control_{name}", _told(max(values)), n=len(values), high=_told(UNKNOWABLE)))
        elif learned:
            values = [cell["controls"][name] for cell in learned]
            out.append(Line(f"control_{name}", _told(min(values)), n=len(values), low=_told(SHOWN)))
    return out


def contrasts(report: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Paired differences of gated_deltanet with every other mixer of the same task, size and axes; verdicts by family.

    The primary family is that of the pre-registration: gated_linear, and of mamba2 and mamba2_heads the one that was
    better on the validation split; T2, T3 and T5(b); 4 and 16 KiB. Verdicts need two or more of the three tasks.
    """
    out: list[dict[str, Any]] = []
    found: dict[tuple[int, str, str], dict[str, tuple[Difference, dict[str, Any]]]] = {}
    for group in _grouped(report, ("seed", "mixer", "lr")).values():
        by_mixer = _grouped(group, ("seed", "lr", *(k for k in group[0]["cell"] if k != "mixer")))
        ours = next((v for v in by_mixer.values() if v[0]["cell"]["mixer"] == "gated_deltanet"), None)
        if ours is None:
            continue
        for theirs in by_mixer.values():
            other = theirs[0]["cell"]["mixer"]
            if other == "gated_deltanet":
                continue
            for part in ("rare", *filter(None, [SECONDARY.get(ours[0]["cell"]["task"])])):
                difference = _difference(ours, theirs, part)
                if difference is None:
                    continue
                low, high = difference.interval()
                name = f"gated_deltanet-{other}"
                line = Line(
                    f"difference_aurc_{part}",
                    _told(difference.estimate),
                    n=_pairs(ours, theirs),
                    low=_told(low),
                    high=_told(high),
                )
                out.append(_row(ours[0], line, seed="", mixer=name))
                if part == "rare":
                    out.append(_row(ours[0], Line("nmse_ratio", _told(difference.nmse_ratio)), seed="", mixer=name))
                spec = ours[0]["cell"]
                plain = not spec["axes"] and spec["init"] == "horizon" and spec["depth"] == 2
                if plain and spec["task"] in PRIMARY_TASKS and spec["preset"] == "paper":
                    key = (spec["state_kib"], other, part)
                    found.setdefault(key, {})[spec["task"]] = (difference, ours[0])
    out += _verdicts(found, _better_mamba(report))
    return out


def _verdicts(
    found: dict[tuple[int, str, str], dict[str, tuple[Difference, dict[str, Any]]]], mamba: dict[Any, str]
) -> list[dict[str, Any]]:
    out = []
    family = {
        (size, other, part, task): difference
        for (size, other, part), by_task in found.items()
        for task, (difference, _) in by_task.items()
        if part == "rare" and size in (4, 16) and other in _primary_rivals(mamba, size, task)
    }
    bounds = holm_bounds({json.dumps(key): value for key, value in family.items()}) if family else {}
    for size in (4, 16):
        for label, rivals in (("gated_linear", ("gated_linear",)), ("mamba2", ("mamba2", "mamba2_heads"))):
            members = [key for key in family if key[0] == size and key[1] in rivals]
            if not members:
                continue
            for key in members:
                bound = bounds[json.dumps(key)]
                difference, cell = found[key[:3]][key[3]]
                line = Line(
                    "primary_difference", _told(difference.estimate), "", "", "", _told(bound.low), _told(bound.high)
                )
                out.append(_row(cell, line, seed="", mixer=f"gated_deltanet-{key[1]}"))
            cell = found[members[0][:3]][members[0][3]][1]
            if len(members) >= 2:
                word = verdict([family[key] for key in members], [bounds[json.dumps(key)] for key in members])
            else:
                word = "inconclusive"
            line = Line("verdict", word, n=len(members))
            tasks = "+".join(key[3] for key in members)
            out.append(_row(cell, line, seed="", task=tasks, mixer=f"gated_deltanet-{label}"))
    return out


def _primary_rivals(mamba: dict[Any, str], size: int, task: str) -> tuple[str, ...]:
    return ("gated_linear", mamba.get((size, task), "mamba2_heads"))


def _better_mamba(report: Sequence[dict[str, Any]]) -> dict[Any, str]:
    """By (size, task): of the two forms of Mamba-2 the one whose chosen rate scored better on the validation split."""
    scores: dict[Any, dict[str, float]] = {}
    for cell in report:
        spec = cell["cell"]
        if spec["mixer"] in ("mamba2", "mamba2_heads") and cell.get("choice") is not None:
            scores.setdefault((spec["state_kib"], spec["task"]), {})[spec["mixer"]] = cell["choice"]
    return {key: max(found, key=lambda name: found[name]) for key, found in scores.items()}


def _difference(ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]], part: str) -> Difference | None:
    """On the seeds that both have; None where there are fewer than two."""
    left, right = ({cell["cell"]["seed"]: cell for cell in side} for side in (ours, theirs))
    seeds = sorted(set(left) & set(right))
    if len(seeds) < 2 or part not in parts(left[seeds[0]]):
        return None

    def stack(side: dict[int, dict[str, Any]], which: str, what: str = "error") -> np.ndarray:
        return np.stack([errors(side[seed], which, what) for seed in seeds])

    base = stack(left, part, "base")
    if not (base > 0).all():  # a few sequences in which nothing of this kind was asked
        return None
    served = "common" in parts(left[seeds[0]])
    return paired_difference(
        stack(left, part),
        stack(right, part),
        base,
        common=(stack(left, "common"), stack(right, "common")) if served else None,
    )


def _pairs(ours: Iterable[dict[str, Any]], theirs: Iterable[dict[str, Any]]) -> int:
    left, right = ({cell["cell"]["seed"] for cell in side} for side in (ours, theirs))
    return len(left & right)


def _grouped(cells: Iterable[dict[str, Any]], without: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Cells that agree in all but some of their keys."""
    out: dict[str, list[dict[str, Any]]] = {}
    for cell in cells:
        key = json.dumps({k: v for k, v in cell["cell"].items() if k not in without}, sort_keys=True)
        out.setdefault(key, []).append(cell)
    return out


def _config(cell: dict[str, Any]) -> str:
    spec = cell["cell"]
    left_out = ("suite", "preset", "task", "mixer", "state_kib", "init", "lr", "seed", "phase")
    return json.dumps({k: v for k, v in spec.items() if k not in left_out}, sort_keys=True, separators=(",", ":"))


def _row(cell: dict[str, Any], line: Line, **other: Any) -> dict[str, Any]:
    spec, origin, size = cell["cell"], cell["origin"], cell["size"]
    found = {
        **origin,
        "dtype": "float32",
        "seed": spec["seed"],
        "config": _config(cell),
        "metric": line.metric,
        "unit": line.unit,
        "value": line.value,
        "p20": "",
        "p80": "",
        "n": line.n,
        "suite": spec["suite"],
        "preset": spec["preset"],
        "cell_id": cell["id"] if "seed" not in other else "",
        "phase": spec["phase"],
        "task": spec["task"],
        "mixer": spec["mixer"],
        "state_kib": spec["state_kib"],
        "state_bytes": size["state_bytes"],
        "params": size["parameters"],
        "init": spec["init"],
        "lr": f"{spec['lr']:g}" if "mixer" not in other else "",
        "gap": line.gap,
        "load": size["load"],
        "low": line.low,
        "high": line.high,
        **other,
    }
    return {column: found[column] for column in HEADER}


def _told(value: Any) -> str:
    return f"{float(value):.6g}"
