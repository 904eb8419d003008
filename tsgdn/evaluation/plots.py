"""Pictures of forecasts. matplotlib is loaded when the first one is drawn, and never opens a window."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from tsgdn.evaluation.metrics import level_index

# Okabe and Ito's palette: told apart with any colour vision, and in grey by lightness.
_INK, _TRUTH, _FORECAST, _CUT = "#3c3c3c", "#111111", "#0072b2", "#8a8a8a"
_BANDS = ((0.98, 0.16), (0.8, 0.28), (0.5, 0.42))
_EXTRA = ("#d55e00", "#009e73", "#cc79a7")


class Fan(NamedTuple):
    """One panel: what was seen, what was forecast, what came.

    Attributes:
        times: of the context's and then the truth's steps; numbers or numpy timestamps.
        truth: what came over the horizon; NaN or shorter where unknown.
        others: point forecasts to compare with, by name.
    """

    title: str
    times: np.ndarray
    context: Float[np.ndarray, " T"]
    quantiles: Float[np.ndarray, "H Q"]
    levels: Sequence[float]
    truth: Float[np.ndarray, " H"] | None = None
    others: dict[str, np.ndarray] = {}  # noqa: RUF012  never changed


def _draw(axes: Any, fan: Fan) -> None:
    T, H = len(fan.context), len(fan.quantiles)
    past, ahead = fan.times[:T], fan.times[T : T + H]
    # Bands and median start at the last observed value, so that the fan opens where the context ends.
    seen = np.flatnonzero(np.isfinite(fan.context))
    joint = fan.context[seen[-1]] if seen.size else np.nan
    x = np.concatenate([past[-1:], ahead])

    def opened(line: np.ndarray) -> np.ndarray:
        return np.concatenate([np.array([joint]), line])

    drawn = set()
    for share, alpha in _BANDS:
        try:
            low, high = (fan.quantiles[:, level_index(fan.levels, q)] for q in (0.5 - share / 2, 0.5 + share / 2))
        except ValueError:  # the forecast lacks this band
            continue
        axes.fill_between(
            x, opened(low), opened(high), color=_FORECAST, alpha=alpha, linewidth=0, label=f"{share:.0%} band"
        )
        drawn.add(share)
    axes.plot(past, fan.context, color=_INK, linewidth=1.1, label="observed")
    if fan.truth is not None and len(fan.truth):
        came = fan.times[T : T + len(fan.truth)]
        axes.plot(
            np.concatenate([past[-1:], came]), opened(fan.truth), color=_TRUTH, linewidth=1.3, linestyle=(0, (4, 1.6)),
            label="what came",
        )  # fmt: skip
    for (name, line), colour in zip(fan.others.items(), _EXTRA, strict=False):
        axes.plot(ahead, line, color=colour, linewidth=1.1, linestyle=":", label=name)
    axes.plot(x, opened(fan.quantiles[:, level_index(fan.levels, 0.5)]), color=_FORECAST, linewidth=1.8, label="median")
    axes.axvline(past[-1], color=_CUT, linewidth=0.8, linestyle=(0, (2, 2)), zorder=0)
    axes.set_title(fan.title, loc="left", fontsize=10, color=_INK)


def fan_charts(
    fans: Sequence[Fan], path: str | Path, *, title: str = "", unit: str = "", columns: int = 2, dpi: int = 130
) -> Path:
    """Draws a grid of forecasts with their 50, 80 and 98 % bands.

    Args:
        fans: the panels, row by row.
        path: PNG to write; its folder is made.
        title: above all panels.
        unit: of the vertical axis.
        columns: panels side by side.
        dpi: pixels per inch; a panel is 5.6 x 2.7 inches.

    Raises:
        ValueError: there is nothing to draw.
        ModuleNotFoundError: matplotlib is not installed.
    """
    if not fans:
        raise ValueError("fan_charts was given no panels; pass at least one Fan")
    figure, grid = _figure(len(fans), columns, dpi)
    import matplotlib.dates as dates

    for axes, fan in zip(grid, fans, strict=False):
        _draw(axes, fan)
        if np.issubdtype(np.asarray(fan.times).dtype, np.datetime64):
            locator = dates.AutoDateLocator(minticks=3, maxticks=7)
            axes.xaxis.set_major_locator(locator)
            axes.xaxis.set_major_formatter(dates.ConciseDateFormatter(locator))
        axes.margins(x=0.01)
        axes.set_ylabel(unit, fontsize=9, color=_INK)
    handles: dict[str, Any] = {}
    for axes in grid[: len(fans)]:
        handles |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    return _save(figure, handles, path, title)


def lead_chart(rows: dict[str, Sequence[dict[str, Any]]], path: str | Path, *, title: str = "") -> Path:
    """Draws scores by steps ahead, from tables of `backtest.by_lead`; one line per forecaster, ours first.

    Args:
        rows: by name of the forecaster.
        path: PNG to write.
        title: above all panels.
    """
    panels = {"wql": "WQL", "mase": "MASE", "coverage80": "share within the 80% band"}
    figure, grid = _figure(len(panels), len(panels), 130)
    handles: dict[str, Any] = {}
    for axes, (key, label) in zip(grid, panels.items(), strict=True):
        for (name, table), colour in zip(rows.items(), (_FORECAST, *_EXTRA), strict=False):
            values = [row[key] for row in table]
            if key == "coverage80" and all(row["coverage50"] == row["coverage98"] for row in table):
                continue  # a point forecast has no band
            (handles[name],) = axes.plot([row["lead"] for row in table], values, color=colour, linewidth=1.7)
        if key == "coverage80":
            axes.axhline(0.8, color=_CUT, linewidth=0.9, linestyle=(0, (2, 2)))
            axes.set_ylim(0, 1)
        else:
            axes.set_ylim(bottom=0)
        axes.set_title(label, loc="left", fontsize=10, color=_INK)
        axes.set_xlabel("steps ahead", fontsize=9, color=_INK)
    return _save(figure, handles, path, title)


def _figure(panels: int, columns: int, dpi: int) -> tuple[Any, list[Any]]:
    """A figure without a window, and its panels in reading order; those beyond `panels` are blank."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(columns, panels)
    rows = -(-panels // columns)
    figure = Figure(figsize=(5.6 * columns, 2.7 * rows + 0.9), dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    grid = [axes for row in figure.subplots(rows, columns, squeeze=False) for axes in row]
    for axes in grid:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(_CUT)
        axes.tick_params(labelsize=8, colors=_INK)
        axes.grid(axis="y", color="#e6e6e6", linewidth=0.7)
        axes.set_axisbelow(True)
    for axes in grid[panels:]:
        axes.set_axis_off()
    return figure, grid


def _save(figure: Any, handles: dict[str, Any], path: str | Path, title: str) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=7, frameon=False, fontsize=9)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, color=_TRUTH)
    figure.savefig(path)
    return path
