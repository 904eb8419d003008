"""Figures of a run, from its rows alone; what has no rows gets no figure."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Line = Mapping[str, str]
Lines = Sequence[Line]
MARK = "smoke: not evidence"
EQUIVALENT = 0.05
MEMORIES = ("gated_deltanet", "gated_linear", "mamba2", "mamba2_heads", "deltanet", "kda", "gated_deltanet2")
"""First in colours and legends; others follow by name."""


def draw(lines: Lines, folder: Path) -> list[Path]:
    """Draws every figure that has rows, as PNG and SVG; returns the PNGs. Without matplotlib none."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        return []
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    written = []
    for name, figure in FIGURES.items():
        drawn = figure(lines, plt)
        if drawn is None:
            continue
        folder.mkdir(parents=True, exist_ok=True)
        if any(line["preset"] == "smoke" for line in lines):
            drawn.suptitle(MARK, x=0.99, ha="right", color="tab:red", fontsize=8)
        for ending in ("png", "svg"):
            drawn.savefig(folder / f"{name}.{ending}", dpi=120)
        written.append(folder / f"{name}.png")
        plt.close(drawn)
    return written


# ---- what the figures are made of


def _default(line: Line) -> bool:
    """Whether a line is of the default axes (the smoke test has its own), at the initialisation of the claims."""
    return line["preset"] == "smoke" or (line["init"] == "horizon" and _axes(line) == {})


def _axes(line: Line) -> dict[str, Any]:
    return json.loads(line["config"]).get("axes", {}) if line["config"] else {}


def _report(lines: Lines, *metrics: str, tasks: Iterable[str] | None = None, default: bool = True) -> list[Line]:
    """Lines of single report cells."""
    wanted = None if tasks is None else set(tasks)
    return [
        line
        for line in lines
        if line["phase"] == "report"
        and line["cell_id"]
        and line["metric"] in metrics
        and (wanted is None or line["task"] in wanted)
        and (not default or _default(line))
    ]


def _means(lines: Iterable[Line], *by: str) -> dict[tuple[str, ...], float]:
    """Mean over seeds, by columns."""
    found: dict[tuple[str, ...], list[float]] = {}
    for line in lines:
        value = _number(line["value"])
        if np.isfinite(value):
            found.setdefault(tuple(line[column] for column in by), []).append(value)
    return {key: float(np.mean(values)) for key, values in found.items()}


def _number(text: str) -> float:
    try:
        return float(text.lstrip("<>"))
    except ValueError:
        return float("nan")


def _order(names: Iterable[str]) -> list[str]:
    return sorted(set(names), key=lambda name: (MEMORIES.index(name) if name in MEMORIES else len(MEMORIES), name))


def _colours(lines: Lines) -> dict[str, Any]:
    names = _order(line["mixer"] for line in lines if line["phase"] == "report" and line["cell_id"])
    return {name: f"C{i % 10}" for i, name in enumerate(names)}


def _grid(plt: Any, rows: int, columns: int) -> tuple[Any, Any]:
    return plt.subplots(rows, columns, figsize=(4.4 * columns, 3.3 * rows), squeeze=False, layout="constrained")


def _legend(figure: Any, columns: int) -> None:
    handles: dict[str, Any] = {}
    for ax in figure.axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=columns, fontsize=8)


def _over_gaps(
    ax: Any, curves: Mapping[str, Mapping[int, float]], colours: Mapping[str, Any], style: str = "o-"
) -> None:
    for name in _order(curves):
        gaps = sorted(curves[name])
        ax.plot(gaps, [curves[name][gap] for gap in gaps], "o-", ms=3, color=colours.get(name), label=name)
    ax.set_xscale("log", base=2)
    ax.set_xlabel("gap in steps")
    ax.grid(alpha=0.3)


def _curves(lines: Lines, metric: str, task: str) -> dict[str, dict[int, float]]:
    out: dict[str, dict[int, float]] = {}
    for (mixer, gap), value in _means(_report(lines, metric, tasks=[task]), "mixer", "gap").items():
        out.setdefault(mixer, {})[int(gap)] = value
    return out


# ---- figures


def _retention_over_gap(lines: Lines, plt: Any, tasks: Sequence[str] | None = None) -> Any:
    """F1: Ret of rare regimes against the gap, a panel per task and size; bands are 95 % intervals."""
    panels: dict[tuple[str, int], dict[str, dict[int, tuple[float, float, float]]]] = {}
    for whole in (False, True):  # means over seeds with their intervals take the place of single seeds
        for line in lines:
            if line["phase"] != "report" or line["metric"] != ("mean_ret_rare" if whole else "ret_rare"):
                continue
            if not _default(line) or line["task"] not in (tasks or ("T1", "T2", "T3", "T5")):
                continue
            value = _number(line["value"])
            low, high = (_number(line[end]) if line[end] else value for end in ("low", "high"))
            panel = panels.setdefault((line["task"], int(line["state_kib"])), {})
            panel.setdefault(line["mixer"], {})[int(line["gap"])] = (value, low, high)
    panels = {key: panel for key, panel in panels.items() if any(len(curve) > 1 for curve in panel.values())}
    if not panels:
        return None
    names, sizes = sorted({task for task, _ in panels}), sorted({size for _, size in panels})
    figure, axes = _grid(plt, len(sizes), len(names))
    colours = _colours(lines)
    for row, size in enumerate(sizes):
        for column, task in enumerate(names):
            ax = axes[row][column]
            if (task, size) not in panels:
                ax.set_axis_off()
                continue
            panel = panels[(task, size)]
            _over_gaps(ax, {name: {g: v[0] for g, v in curve.items()} for name, curve in panel.items()}, colours)
            for name, curve in panel.items():
                gaps = sorted(curve)
                ends = [[curve[gap][end] for gap in gaps] for end in (1, 2)]
                ax.fill_between(gaps, *ends, color=colours.get(name), alpha=0.18)
            levels = {"memoryless": (0.0, ":"), "filter": (_reference(lines, task, "filter"), "--")}
            for name, (level, style) in levels.items():
                if level is not None:
                    ax.axhline(level, ls=style, lw=1, color="black", label=f"{name} (reference)")
            ax.set_ylim(-0.3, 1.05)
            ax.set_title(f"{task}, {size} KiB per layer", fontsize=10)
            ax.set_ylabel("retention of rare regimes")
    _legend(figure, 2 * len(names))
    return figure


def _events(lines: Lines, plt: Any) -> Any:
    """F11: irregular events and hidden phases."""
    return _retention_over_gap(lines, plt, ("T2e", "T9b"))


def _trade_off(lines: Lines, plt: Any) -> Any:
    """F2: rare retention against the error on common probes; the upper left corner is best."""
    rare = _means(_report(lines, "aurc_rare"), "task", "state_kib", "mixer")
    common = _means(_report(lines, "nmse_common"), "task", "state_kib", "mixer")
    found = {key: (common[key], value) for key, value in rare.items() if key in common}
    if not found:
        return None
    tasks = sorted({key[0] for key in found})
    figure, axes = _grid(plt, 1, len(tasks))
    colours = _colours(lines)
    marks: dict[str, str] = {"1": "v", "2": "p", "4": "o", "16": "s", "64": "^"}
    for ax, task in zip(axes[0], tasks, strict=True):
        for (of, size, name), (x, y) in sorted(found.items()):
            if of == task:
                ax.plot(x, y, marks.get(size, "x"), color=colours.get(name), label=f"{name}, {size} KiB")
        ax.set_title(task, fontsize=10)
        ax.set_xlabel("error on common probes (NMSE)")
        ax.set_ylabel("AURC of rare probes")
        ax.grid(alpha=0.3)
    _legend(figure, 2 * len(tasks))
    return figure


def _capacity(lines: Lines, plt: Any) -> Any:
    """F3: T4, recalled bits per value against the load, as a share of the key's width."""
    found: dict[str, dict[float, list[float]]] = {}
    for line in _report(lines, "recalled_bits", tasks=["T4"], default=False):
        key_dim = {1: 8, 2: 16, 4: 16, 16: 32, 64: 64}[int(line["state_kib"])]
        load = int(line["load"]) / key_dim
        found.setdefault(line["mixer"], {}).setdefault(load, []).append(_number(line["value"]))
    if max((len(loads) for loads in found.values()), default=0) < 2:
        return None
    figure, axes = _grid(plt, 1, 1)
    for name in _order(found):
        loads = sorted(found[name])
        means = [float(np.mean(found[name][load])) for load in loads]
        axes[0][0].plot(loads, means, "o-", ms=3, color=_colours(lines)[name], label=name)
    axes[0][0].set_xscale("log", base=2)
    axes[0][0].set_xlabel("pairs / key width of a head")
    axes[0][0].set_ylabel("recalled bits per value")
    axes[0][0].grid(alpha=0.3)
    _legend(figure, 2)
    return figure


def _over_bytes(lines: Lines, plt: Any) -> Any:
    """F4: AURC against the bytes of the state."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    for (task, name, size), value in _means(_report(lines, "aurc_rare"), "task", "mixer", "state_bytes").items():
        found.setdefault(task, {}).setdefault(name, {})[int(size)] = value
    tasks = [task for task in sorted(found) if any(len(curve) > 1 for curve in found[task].values())]
    if not tasks:
        return None
    figure, axes = _grid(plt, 1, len(tasks))
    for ax, task in zip(axes[0], tasks, strict=True):
        for name in _order(found[task]):
            sizes = sorted(found[task][name])
            values = [found[task][name][size] for size in sizes]
            ax.plot([size / 1024 for size in sizes], values, "o-", ms=3, color=_colours(lines)[name], label=name)
        ax.set_xscale("log", base=2)
        ax.set_title(task, fontsize=10)
        ax.set_xlabel("state of all layers, KiB")
        ax.set_ylabel("AURC of rare probes")
        ax.grid(alpha=0.3)
    _legend(figure, 2 * len(tasks))
    return figure


def _maps(lines: Lines, plt: Any) -> Any:
    """F5: T5 over similarity and load: what the delta rule adds, and what decoupled gates add; hatched = equivalent."""
    wanted = {
        "gated_deltanet-gated_linear": ("gated_deltanet - gated_linear", 1),
        "gated_deltanet-gated_deltanet2": ("gated_deltanet2 - gated_deltanet", -1),
    }
    found: dict[str, dict[tuple[float, int], tuple[float, bool]]] = {}
    for line in lines:
        if line["metric"] == "difference_aurc_rare" and line["task"] == "T5" and line["mixer"] in wanted:
            if line["state_kib"] != "16":
                continue
            axes = _axes(line)
            value, low, high = (_number(line[key]) for key in ("value", "low", "high"))
            same = low > -EQUIVALENT and high < EQUIVALENT
            place = (float(axes.get("similarity", 0)), int(axes.get("common", 8)))
            title, sign = wanted[line["mixer"]]
            found.setdefault(title, {})[place] = (sign * value, same)
    found = {title: cells for title, cells in found.items() if len(cells) > 1}
    if not found:
        return None
    figure, axes = _grid(plt, 1, len(found))
    for ax, (title, cells) in zip(axes[0], found.items(), strict=True):
        rows, columns = sorted({kap for kap, _ in cells}), sorted({load for _, load in cells})
        for (kap, load), (value, same) in cells.items():
            x, y = columns.index(load), rows.index(kap)
            ax.add_patch(
                plt.Rectangle(
                    (x, y), 1, 1, fc=plt.get_cmap("RdBu")(0.5 + value), hatch="//" if same else None, ec="gray"
                )
            )
            ax.text(x + 0.5, y + 0.5, f"{value:+.2f}", ha="center", va="center", fontsize=9)
        ax.set_xlim(0, len(columns))
        ax.set_ylim(0, len(rows))
        ax.set_xticks(np.arange(len(columns)) + 0.5, [str(load) for load in columns])
        ax.set_yticks(np.arange(len(rows)) + 0.5, [f"{kap:g}" for kap in rows])
        ax.set_xlabel("common regimes")
        ax.set_ylabel("similarity of codes")
        ax.set_title(title, fontsize=10)
    return figure


def _stale(lines: Lines, plt: Any) -> Any:
    """F6: T5, what forecasts of revised regimes are made of."""
    curves = [_curves(lines, f"coefficient_{name}", "T5") for name in ("current", "stale")]
    if not curves[0]:
        return None
    figure, axes = _grid(plt, 1, 2)
    for ax, found, name in zip(axes[0], curves, ("current", "replaced"), strict=True):
        _over_gaps(ax, found, _colours(lines))
        ax.set_ylabel(f"coefficient of the {name} value")
        ax.set_title("T5, revised regimes", fontsize=10)
    _legend(figure, 4)
    return figure


def _cross_talk(lines: Lines, plt: Any) -> Any:
    """F7: T6, what the forecast of a parked channel is made of; retention against channels and coincidence."""
    parts = {"own": "own rare value", "parked": "own value before", "other": "other channels (r.m.s.)"}
    bars = {part: _means(_report(lines, f"cross_talk_{part}", tasks=["T6"]), "mixer") for part in parts}
    if not bars["own"]:
        return None
    figure, axes = _grid(plt, 1, 3)
    names = _order(name for (name,) in bars["own"])
    for i, (part, text) in enumerate(parts.items()):
        heights = [bars[part].get((name,), np.nan) for name in names]
        axes[0][0].bar(np.arange(len(names)) + 0.27 * i, heights, 0.25, label=text)
    axes[0][0].set_xticks(np.arange(len(names)) + 0.27, names, rotation=30, ha="right", fontsize=8)
    axes[0][0].set_ylabel("coefficient in the forecast")
    axes[0][0].legend(fontsize=8)
    for ax, axis, usual in ((axes[0][1], "channels", 8), (axes[0][2], "coincidence", 0.25)):
        found: dict[str, dict[float, list[float]]] = {}
        for line in _report(lines, "aurc_rare", tasks=["T6"], default=False):
            given = _axes(line)
            if set(given) <= {axis}:
                place = float(given.get(axis, usual))
                found.setdefault(line["mixer"], {}).setdefault(place, []).append(_number(line["value"]))
        for name in _order(found):
            places = sorted(found[name])
            values = [float(np.mean(found[name][x])) for x in places]
            ax.plot(places, values, "o-", ms=3, color=_colours(lines)[name], label=name)
        ax.set_xlabel(axis)
        ax.set_ylabel("AURC of rare probes")
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    return figure


def _two_metrics(task: str, first: tuple[str, str], second: tuple[str, str]) -> Callable[[Lines, Any], Any]:
    """A figure of two metrics of one task against the gap."""

    def figure(lines: Lines, plt: Any) -> Any:
        curves = [_curves(lines, metric, task) for metric, _ in (first, second)]
        if not any(curves):
            return None
        drawn, axes = _grid(plt, 1, 2)
        for ax, found, (_, text) in zip(axes[0], curves, (first, second), strict=True):
            _over_gaps(ax, found, _colours(lines))
            ax.set_ylabel(text)
            ax.set_title(task, fontsize=10)
        _legend(drawn, 4)
        return drawn

    return figure


def _mechanism(lines: Lines, plt: Any) -> Any:
    """F10: what the gates say survives against what was measured; decay and erasing as parts of the loss."""
    survived = {line["cell_id"]: line for line in _report(lines, "survived", default=False)}
    measured: dict[str, float] = {}
    for line in _report(lines, "ret_rare", default=False):
        if line["cell_id"] in survived and (line["preset"] == "smoke" or line["gap"] == "512"):
            measured[line["cell_id"]] = _number(line["value"])
    if not measured:
        return None
    figure, axes = _grid(plt, 1, 2)
    colours = _colours(lines)
    for cell, value in measured.items():
        name = survived[cell]["mixer"]
        axes[0][0].plot(_number(survived[cell]["value"]), value, "o", ms=4, color=colours[name], label=name)
    axes[0][0].set_xlabel("share of the write that survives, from the gates")
    axes[0][0].set_ylabel("measured retention")
    axes[0][0].grid(alpha=0.3)
    losses = {part: _means(_report(lines, part, default=False), "mixer") for part in ("decay_loss", "erase_overlap")}
    names = _order(name for (name,) in losses["decay_loss"])
    bottom = np.zeros(len(names))
    for part, found in losses.items():
        heights = np.array([-found.get((name,), 0.0) for name in names])
        axes[0][1].bar(names, heights, bottom=bottom, label=part.replace("_", " "))
        bottom += heights
    axes[0][1].set_ylabel("loss in natural log units")
    axes[0][1].tick_params(axis="x", rotation=30, labelsize=8)
    axes[0][1].legend(fontsize=8)
    _legend(figure, 4)
    return figure


def _latency(lines: Lines, plt: Any) -> Any:
    """F12: retention against the cost of a streamed token, at equal bytes."""
    keys = ("task", "state_kib", "mixer")
    cost = _means(_report(lines, "step_us_1"), *keys)
    found = {key: (cost[key], y) for key, y in _means(_report(lines, "aurc_rare"), *keys).items() if key in cost}
    if not found:
        return None
    tasks = sorted({key[0] for key in found})
    figure, axes = _grid(plt, 1, len(tasks))
    for ax, task in zip(axes[0], tasks, strict=True):
        for (of, size, name), (x, y) in sorted(found.items()):
            if of == task:
                ax.plot(x, y, "o", color=_colours(lines)[name], label=name)
                ax.annotate(f"{size} KiB", (x, y), fontsize=7, xytext=(3, 3), textcoords="offset points")
        ax.set_title(task, fontsize=10)
        ax.set_xlabel("µs per token of one stream, eager")
        ax.set_ylabel("AURC of rare probes")
        ax.grid(alpha=0.3)
    _legend(figure, 2 * len(tasks))
    return figure


def _reentry(lines: Lines, plt: Any) -> Any:
    """F14: T9, the error by step after the rare regime came back, and by how long it was away."""
    figures = []
    for prefix, text in (("error_step_", "step after re-entry"), ("error_gap_decile_", "decile of the gap")):
        found: dict[str, dict[int, list[float]]] = {}
        for line in _report(lines, *(f"{prefix}{i}" for i in range(1, 11)), tasks=["T9"]):
            place = int(line["metric"].removeprefix(prefix))
            found.setdefault(line["mixer"], {}).setdefault(place, []).append(_number(line["value"]))
        figures.append((found, text))
    if not figures[0][0]:
        return None
    figure, axes = _grid(plt, 1, 2)
    for ax, (found, text) in zip(axes[0], figures, strict=True):
        for name in _order(found):
            places = sorted(found[name])
            means = [float(np.mean(found[name][x])) for x in places]
            ax.plot(places, means, "o-", ms=3, color=_colours(lines)[name], label=name)
        ax.axhline(1.0, ls="--", lw=1, color="black", label="oracle")
        ax.set_xlabel(text)
        ax.set_ylabel("squared one-step error")
        ax.grid(alpha=0.3)
    _legend(figure, 4)
    return figure


def _reference(lines: Lines, task: str, name: str) -> float | None:
    found = [
        _number(line["value"])
        for line in lines
        if line["phase"] == "reference" and (line["task"], line["mixer"], line["metric"]) == (task, name, "ret_rare")
    ]
    return found[0] if found else None


FIGURES: dict[str, Callable[[Lines, Any], Any]] = {
    "f01_retention_over_gap": _retention_over_gap,
    "f02_trade_off": _trade_off,
    "f03_capacity": _capacity,
    "f04_over_bytes": _over_bytes,
    "f05_similarity_and_load": _maps,
    "f06_stale_values": _stale,
    "f07_cross_talk": _cross_talk,
    "f08_effects": _two_metrics("T7", ("ret_rare", "effect retention"), ("control_regret", "control regret")),
    "f09_binding": _two_metrics("T8", ("driver_accuracy", "driver accuracy"), ("swap_rate", "swap rate")),
    "f10_mechanism": _mechanism,
    "f11_events_and_phases": _events,
    "f12_latency": _latency,
    "f14_re_entry": _reentry,
}
