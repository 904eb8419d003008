"""Pictures of streams: the error along them, and of those that begin anew."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tsgdn.evaluation.prequential import rolling_mean

LOOKS = {
    "frozen": ("frozen", "#0072b2", "-"),
    "adapted": ("adapted", "#d55e00", "-"),
    "persistence": ("persistence", "#8a8a8a", "--"),
    "seasonal_naive": ("seasonal naive", "#009e73", ":"),
}


def plot(root: Path, tasks: Sequence[str], folder: Path, horizons: Sequence[int]) -> list[Path]:
    """Error along the stream and of cold streams, a picture each per task: the first mixer and seed in `root`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FormatStrFormatter, LogLocator

    written = []
    for task in tasks:
        files = sorted((root / task).glob("*/*/stream.npz"))
        if not files:
            continue
        mixer, seed = files[0].parts[-3:-1]
        with np.load(files[0]) as held:
            found = {name: held[name] for name in held.files}
        if len(found["frozen"]) != len(horizons):
            continue
        steps = found["first"] + np.arange(found["frozen"].shape[1])
        window = max(1, len(steps) // 20)
        figure, panels = plt.subplots(1, len(horizons), figsize=(5 * len(horizons), 3.4), layout="constrained")
        for axes, horizon, i in zip(np.atleast_1d(panels), horizons, range(len(horizons)), strict=True):
            for name, (label, colour, dash) in LOOKS.items():
                line = rolling_mean(found[name][i].astype(float), window)
                line[: window - 1] = np.nan
                axes.plot(steps, line, dash, color=colour, label=label, lw=1.4)
            axes.set_title(f"{horizon} step{'s' * (horizon > 1)} ahead", loc="left", fontsize=10)
            axes.set_xlabel("row")
            axes.set_yscale("log")
            axes.grid(alpha=0.3)
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
            axes.minorticks_off()
        np.atleast_1d(panels)[0].set_ylabel(f"MSE of the last {window} windows")
        np.atleast_1d(panels)[0].legend(fontsize=8)
        figure.suptitle(f"{task}: {mixer}, seed {seed}", x=0.01, ha="left")
        written.append(folder / f"online_{task}.png")
        figure.savefig(written[-1], dpi=110)
        plt.close(figure)

        figure, panels = plt.subplots(1, len(horizons), figsize=(5 * len(horizons), 3.4), layout="constrained")
        for axes, horizon, i in zip(np.atleast_1d(panels), horizons, range(len(horizons)), strict=True):
            axes.plot(found["seen"], found["cold_cold"][i], "o-", color="#0072b2", label="begun anew", ms=3.5)
            axes.plot(found["seen"], found["cold_frozen"][i], "-", color="#3c3c3c", label="begun with row 0", lw=1.2)
            axes.plot(found["seen"], found["cold_persistence"][i], "--", color="#8a8a8a", label="persistence")
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_title(f"{horizon} step{'s' * (horizon > 1)} ahead", loc="left", fontsize=10)
            axes.set_xlabel("observations seen")
            axes.grid(alpha=0.3)
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
            axes.minorticks_off()
        np.atleast_1d(panels)[0].set_ylabel("MSE, mean over streams")
        np.atleast_1d(panels)[0].legend(fontsize=8)
        figure.suptitle(f"{task}: {mixer}, seed {seed}", x=0.01, ha="left")
        written.append(folder / f"online_cold_{task}.png")
        figure.savefig(written[-1], dpi=110)
        plt.close(figure)
    return written
