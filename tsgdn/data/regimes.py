"""Synthetic streams whose rules change: seasonal series with regime switches, from a seed alone.

The tasks of the retention study, which ask for a regime again after a gap, are in `tsgdn.data.retention`.
"""

from importlib.resources import files

import numpy as np

from tsgdn.data.clock import clock
from tsgdn.data.series import Series

KINDS = ("seasonal",)
START = np.datetime64("2020-01-06", "ns")
"""A Monday, so that weekly profiles start with the week; on the grid of months it is moved to the first."""


def simulate(
    kind: str = "seasonal",
    *,
    series: int = 8,
    variates: int = 2,
    steps: int = 2000,
    freq: str = "h",
    seed: int = 0,
) -> list[Series]:
    """Simulates series with regime changes.

    `seasonal`: each series moves between three regimes by a Markov chain (mean stay: ten main seasons, at least 120
    steps). A regime has its own seasonal profile, level, amplitude and noise, which all its visits share. Variate v
    follows the one before it with a delay of one step, and gusts of missing values hide about 2 %.

    Every series, and every random quantity in it, has its own Philox stream: asking for fewer series or steps gives a
    prefix of the larger set. Values have three decimals, so that a CSV holds them exactly.

    Args:
        kind: one of `KINDS`.
        series: number of series, named S0, S1, ...
        variates: variates per series.
        steps: length of each.
        freq: the step; its clock gives the seasons.
        seed: any non-negative integer.

    Returns:
        The series.

    Raises:
        ValueError: the kind or the frequency is unknown, a count is below 1, or the seed is negative.
    """
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} is not known; use one of {', '.join(KINDS)}")
    for name, count in (("series", series), ("variates", variates), ("steps", steps)):
        if count < 1:
            raise ValueError(f"{name} is {count}, expected at least 1")
    if seed < 0:
        raise ValueError(f"seed is {seed}, expected at least 0")
    grid = clock(freq)
    first, last = np.datetime64("2020-01-01", "ns"), np.datetime64("2020-01-31", "ns")
    start = next(day for day in (START, first, last) if grid.on_grid(day))
    grid.timestamp(start, steps - 1)  # refuses what no timestamp can tell
    names = ("target",) if variates == 1 else tuple(f"v{v}" for v in range(variates))
    seasons = [m for m in grid.seasons if m > 1] or [4]
    return [
        Series(f"S{i}", start, grid.freq, _seasonal((seed, i), variates, steps, seasons), variates=names)
        for i in range(series)
    ]


def embedded() -> list[Series]:
    """The small set in the package: `simulate("seasonal", series=4, variates=2, steps=1000, freq="h", seed=0)`."""
    text = files("tsgdn.data").joinpath("embedded", "seasonal.csv").read_text(encoding="utf-8").splitlines()
    names = tuple(text[0].split(",")[2:])
    rows = [line.split(",") for line in text[1:]]
    out = []
    for item_id in dict.fromkeys(row[0] for row in rows):
        own = [row for row in rows if row[0] == item_id]
        values = np.array([[float(cell) if cell else np.nan for cell in row[2:]] for row in own]).T
        out.append(Series(item_id, np.datetime64(own[0][1].rstrip("Z"), "ns"), "h", values, variates=names))
    return out


def _stream(key: tuple[int, int], purpose: int) -> np.random.Generator:
    """The random stream of one quantity of one series; Philox counts, so streams are independent."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([*key, purpose])))


def _seasonal(key: tuple[int, int], variates: int, steps: int, seasons: list[int]) -> np.ndarray:
    """Values (variates, steps) of one series."""
    states, main = 3, seasons[0]
    stay = max(120, 10 * main)

    # Regimes: a change where a uniform draw is below 1/stay, to one of the other two states.
    draw = _stream(key, 0).random((steps, 2))
    jump = np.where(draw[:, 0] < 1 / stay, 1 + (draw[:, 1] * (states - 1)).astype(np.int64), 0)
    jump[0] = int(draw[0, 1] * states)
    regime = np.cumsum(jump) % states

    rng = _stream(key, 1)
    level = 20 + 10 * rng.random((variates, 1)) + rng.normal(0, 2.5, (variates, states))
    amplitude = rng.uniform(2, 7, (variates, states))
    noise = rng.uniform(0.2, 0.9, (variates, states))
    coupling = rng.uniform(0.3, 0.7, variates)
    time = np.arange(steps)
    season = np.zeros((variates, steps))
    for m, share in zip(seasons[:2], (1.0, 0.4), strict=False):
        for harmonic in (1, 2, 3):
            size = share * rng.uniform(0.3, 1, (variates, states, 1)) / harmonic
            phase = rng.uniform(0, 2 * np.pi, (variates, states, 1))
            wave = size[:, regime, 0] * np.sin(2 * np.pi * harmonic * time / m + phase[:, regime, 0])
            season += wave
    shock = _stream(key, 2).standard_normal((steps, variates)).T * noise[:, regime]
    own = level[:, regime] + amplitude[:, regime] * season
    values = own + _persistent(shock, 0.6)
    for v in range(1, variates):  # what the variate before did beyond its expectation, one step later
        lead = np.concatenate([[0.0], (values - own)[v - 1, :-1]])
        values[v] += coupling[v] * lead * amplitude[v, regime] / amplitude[v - 1, regime]

    holes = _stream(key, 3).random((steps, variates, 2))
    starts = (holes[..., 0] < 0.005).T
    lengths = 1 + (holes[..., 1] * 7).astype(np.int64).T
    missing = np.zeros_like(starts)
    for back in range(min(7, steps)):
        missing[:, back:] |= (starts & (lengths > back))[:, : steps - back]
    return np.where(missing, np.nan, np.round(values, 3))


def _persistent(shock: np.ndarray, memory: float, taps: int = 24) -> np.ndarray:
    """An autoregression of order one, cut after `taps` steps (0.6^24 is 5e-6): vectorised along time."""
    out = np.zeros_like(shock)
    for lag in range(min(taps, shock.shape[1])):
        out[:, lag:] += memory**lag * shock[:, : shock.shape[1] - lag]
    return out
