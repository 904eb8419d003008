"""What an observation and a forecast cost, by number of streams and length of history, beside what others offer.

A cell is (system, streams). Its calls are timed one by one, data made beforehand and the garbage collector off:

- `inside`: each call brings one value of every series, all of them inside a patch; no model runs.
- `closes`: each call finishes the patch of every series; the dearest there is.
- `mixed`: the series began at different steps, so that each call finishes the patch of every P-th, as in a service. Its
  cost per observation is that of P calls, divided.
- `end`: forecasts at the end of a patch; `inside` of a patch a copy of the state takes the unfinished patch.
- `every`: of systems without patches.

Flatness: one predictor with a short history and one with a long one take turns; `history_ratio` divides the medians.
"""

import csv
import gc
import inspect
import os
import pickle
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from tsgdn.bench.matching import matched
from tsgdn.bench.record import append, provenance, row
from tsgdn.data.clock import Clock
from tsgdn.data.series import Series
from tsgdn.model.forecaster import Forecaster
from tsgdn.streaming.predictor import StatefulPredictor

FREQ, SEASON = "h", 24
START = np.datetime64("1990-01-01T00", "ns")
WIDTH, DEPTH = 64, 3  # of the presets
STREAMS = (1, 64, 1000, 10_000)
HISTORIES = (1000, 1_000_000)
FLAT = (1,)
LEAST = 3  # cycles or calls that are timed at least
MOST = 2000  # and at most
STEPS_UP_TO = 1000  # streams for which observing and forecasting in one call is timed too
EXACT_UP_TO = 64
LEARNT = 2_000_000  # values that a cell's series have seen together, so that many series have seen less each


class Found(NamedTuple):
    """Measurements of one metric; `history` where it is not the cell's."""

    call: str
    phase: str
    metric: str
    unit: str
    values: list[int | float]
    history: int | None = None


class Options(NamedTuple):
    """Of a run; `seconds` is what each kind of call is given, at least. `compiled`: a single stream's calls, too."""

    horizon: int = 24
    histories: tuple[int, int] = HISTORIES
    flat: tuple[int, ...] = FLAT
    seconds: int | float = 3.0
    threads: int = 1
    device: str = "cpu"
    seed: int = 0
    compiled: bool = False

    def describe(self) -> str:
        """For the column `config`."""
        return f"{WIDTH}x{DEPTH} horizon {self.horizon} threads {self.threads}"


class Live(NamedTuple):
    """A system that has seen `history` steps of every stream.

    Attributes:
        observe: per way of giving values, what makes the call for a step.
        forecast: of all streams.
        period: steps of a patch; 1 where there are none.
        next: the step that comes next.
        history: steps that the system reads or remembers.
    """

    observe: dict[str, Callable[[int], Callable[[], Any]]]
    forecast: Callable[[], Any]
    period: int
    next: int
    history: int


class Source:
    """Seasonal values with noise of any stream at any step, made without keeping them.

    Args:
        streams: how many.
        seed: of phases and noise.
    """

    def __init__(self, streams: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.streams = streams
        self._phase = rng.uniform(0, 2 * np.pi, streams)
        self._noise = rng.normal(size=65_537)

    def run(self, begin: int, end: int) -> np.ndarray:
        """Values (streams, end - begin)."""
        steps = np.arange(begin, end)
        wave = np.sin(2 * np.pi * (steps % SEASON) / SEASON + self._phase[:, None])
        places = (31 * np.arange(self.streams)[:, None] + 17 * steps) % len(self._noise)
        return 10 + 3 * wave + 0.3 * self._noise[places]

    def at(self, step: int) -> np.ndarray:
        """Values (streams,) of one step."""
        return self.run(step, step + 1)[:, 0]


def stamps(steps: Any) -> Any:
    """Times of steps."""
    return START + np.asarray(steps) * np.timedelta64(1, FREQ)


# ---- ours


def exact_is_offered() -> bool:
    """Whether the predictor has a mode in which neighbours do not touch a result's bits."""
    return "exact" in inspect.signature(StatefulPredictor).parameters


def predictor(mixer: str, device: str = "cpu", seed: int = 0) -> StatefulPredictor:
    """A predictor with the presets' sizes and random weights; other mixers have the state bytes of gated_deltanet.

    Args:
        mixer: a mixer or hybrid; with `_compiled` at its end one patch of one series is compiled, with `_exact` (after
            it) the mode is exact.
        device: where it runs.
        seed: of the weights.
    """
    name = mixer.removesuffix("_exact").removesuffix("_compiled")
    found = matched(name, width=WIDTH, depth=DEPTH)
    torch.manual_seed(seed)
    model = Forecaster(
        known_features=Clock(FREQ).calendar_size,
        seasons=(1, SEASON),
        width=WIDTH,
        depth=DEPTH,
        mixer=name,
        mixer_args=found.mixer_args,
        mlp_ratio=found.mlp_ratio,
    )
    options: dict[str, Any] = {"exact": mixer.endswith("_exact"), "compiled": "_compiled" in mixer}
    return StatefulPredictor(model, freq=FREQ, device=device, **options)


def seen(steps: int, streams: int, patch: int) -> int:
    """Steps that each of so many streams has seen before a measurement: whole patches, fewer for many streams."""
    wanted = max(4 * patch, min(steps, LEARNT // streams))
    return -(-wanted // patch) * patch


def teach(live: StatefulPredictor, source: Source, ids: np.ndarray, steps: int, *, staggered: bool) -> None:
    """Lets a predictor see `steps` steps, in passes of a few million values.

    Args:
        live: empty.
        source: of the values.
        ids: of the streams.
        steps: whole patches.
        staggered: stream i begins at step i modulo the patch size.
    """
    patch = live.model.patch_size
    begins = np.arange(source.streams) % patch if staggered else np.zeros(source.streams, np.int64)
    if steps < 64:
        handles = live.handles(ids.tolist(), create=True)
        for step in range(steps):
            on = np.flatnonzero(begins <= step)
            live.observe_at(handles[on], source.at(step)[on], stamps(step))
        return
    chunk = max(patch, min(65_536, LEARNT // source.streams) // patch * patch)
    for begin in range(0, steps, chunk):
        values = source.run(begin, min(begin + chunk, steps))
        first = np.maximum(begins - begin, 0)
        live.warm_up(
            [
                Series(item, stamps(begin + skip), FREQ, values[i : i + 1, skip:])
                for i, (item, skip) in enumerate(zip(ids.tolist(), first.tolist(), strict=True))
            ]
        )


def ours(mixer: str, source: Source, steps: int, options: Options, *, staggered: bool = False) -> Live:
    """Our predictor after `steps` steps."""
    live = predictor(mixer, options.device, options.seed)
    ids = np.array([f"series-{i}" for i in range(source.streams)])
    names = ids.tolist()
    teach(live, source, ids, steps, staggered=staggered)

    def arrays(step: int) -> Callable[[], Any]:
        data = (ids, np.full(len(ids), stamps(step)), source.at(step))
        return lambda: live.observe(data)

    def mapping(step: int) -> Callable[[], Any]:
        data, when = dict(zip(names, source.at(step).tolist(), strict=True)), stamps(step)
        return lambda: live.observe(data, timestamp=when)

    ways = {"observe_arrays": arrays, "observe_dict": mapping}
    told: Any = live
    if hasattr(told, "observe_at") and hasattr(told, "handles"):
        handles = told.handles(names)

        def at(step: int) -> Callable[[], Any]:
            values, when = source.at(step), stamps(step)
            return lambda: told.observe_at(handles, values, when)

        ways["observe_at"] = at
    return Live(ways, lambda: live.forecast(horizon=options.horizon), live.model.patch_size, steps, steps)


# ---- theirs; each imports what it needs, and who lacks it is left out


class Context:
    """The last values of every stream, for those who read them again each time."""

    def __init__(self, source: Source, steps: int) -> None:
        self._source, self._steps, self._end = source, steps, steps
        self._values = np.zeros((source.streams, 2 * steps))
        self._values[:, :steps] = source.run(0, steps)

    def last(self) -> np.ndarray:
        """(streams, steps)."""
        return self._values[:, self._end - self._steps : self._end]

    def append(self, step: int) -> Callable[[], Any]:
        """The call that adds the values of a step."""
        values = self._source.at(step)

        def call() -> None:
            if self._end == self._values.shape[1]:
                self._values[:, : self._steps] = self.last()
                self._end = self._steps
            self._values[:, self._end] = values
            self._end += 1

        return call


def river_snarimax(source: Source, steps: int, options: Options) -> Live:
    """River's SNARIMAX with one seasonal lag: a regression of its own for every stream."""
    from river.time_series import SNARIMAX  # pyright: ignore[reportMissingImports]

    return _river(lambda: SNARIMAX(p=1, d=0, q=1, m=SEASON, sp=1, sd=0, sq=1), source, steps, options)


def river_holtwinters(source: Source, steps: int, options: Options) -> Live:
    """River's additive Holt-Winters."""
    from river.time_series import HoltWinters  # pyright: ignore[reportMissingImports]

    return _river(lambda: HoltWinters(0.3, 0.1, 0.2, seasonality=SEASON), source, steps, options)


def _river(make: Callable[[], Any], source: Source, steps: int, options: Options) -> Live:
    taught = []
    for values in Source(min(8, source.streams), options.seed).run(0, steps).tolist():
        model = make()
        for value in values:
            model.learn_one(value)
        taught.append(pickle.dumps(model))
    models = [pickle.loads(taught[i % len(taught)]) for i in range(source.streams)]

    def learn(step: int) -> Callable[[], Any]:
        values = source.at(step).tolist()
        return lambda: [model.learn_one(value) for model, value in zip(models, values, strict=True)]

    return Live({"learn_one": learn}, lambda: [model.forecast(options.horizon) for model in models], 1, steps, steps)


def statsforecast_autoets(source: Source, steps: int, options: Options) -> Live:
    """AutoETS chosen and fitted once; `forward` filters the context of a stream with the parameters found."""
    from statsforecast.models import AutoETS  # pyright: ignore[reportMissingImports]

    context = Context(source, steps)
    model = AutoETS(season_length=SEASON).fit(np.ascontiguousarray(context.last()[0]))

    def forecast() -> list[Any]:
        return [model.forward(np.ascontiguousarray(y), h=options.horizon) for y in context.last()]

    return Live({"append": context.append}, forecast, 1, steps, steps)


def gluonts_patchtst(source: Source, steps: int, options: Options) -> Live:
    """PatchTST with GluonTS' sizes and random weights over a context of 512."""
    from gluonts.torch import PatchTSTEstimator

    estimator = PatchTSTEstimator(prediction_length=options.horizon, context_length=512, patch_len=16, batch_size=128)
    return _gluonts(estimator, source, options)


def gluonts_deepar(source: Source, steps: int, options: Options) -> Live:
    """DeepAR with GluonTS' sizes, its lags and random weights over a context of a week; 100 sample paths."""
    from gluonts.torch import DeepAREstimator

    estimator = DeepAREstimator(freq=FREQ, prediction_length=options.horizon, context_length=168, batch_size=128)
    return _gluonts(estimator, source, options)


def _gluonts(estimator: Any, source: Source, options: Options) -> Live:
    import pandas as pd

    torch.manual_seed(options.seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = estimator.create_lightning_module()
        made = estimator.create_predictor(estimator.create_transformation(), module)
    length = estimator.context_length + max(getattr(module.model, "lags_seq", (0,)))
    context = Context(source, length)
    start = pd.Period("1990-01-01", FREQ)

    def forecast() -> list[Any]:
        rows = [
            {"start": start, "target": y.astype(np.float32), "item_id": str(i)} for i, y in enumerate(context.last())
        ]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return list(made.predict(rows))

    return Live({"append": context.append}, forecast, 1, length, length)


class Contestant(NamedTuple):
    """Another system, the streams that it is asked for at most, and whether it can use a GPU."""

    make: Callable[[Source, int, Options], Live]
    most: int = 10_000
    gpu: bool = False


CONTESTANTS: dict[str, Contestant] = {
    "river_snarimax": Contestant(river_snarimax),
    "river_holtwinters": Contestant(river_holtwinters),
    "statsforecast_autoets": Contestant(statsforecast_autoets),
    "gluonts_patchtst": Contestant(gluonts_patchtst, gpu=True),
    "gluonts_deepar": Contestant(gluonts_deepar, most=1000, gpu=True),  # 100 paths: minutes for all 10,000
}


# ---- measuring


class Stopwatch:
    """Times calls one by one.

    Args:
        device: whose queue is empty before the clock stops.
        seconds: a loop goes on for, its preparations included.
    """

    def __init__(self, device: str, seconds: int | float) -> None:
        self._cuda, self._seconds = device.startswith("cuda"), seconds

    def __call__(self, call: Callable[[], Any]) -> float:
        """Seconds of a call."""
        begin = time.perf_counter()
        call()
        if self._cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    def turns(self) -> Iterator[int]:
        """Counts until the time is over, at least `LEAST` and at most `MOST` times."""
        begin = time.perf_counter()
        for turn in range(MOST):
            if turn >= LEAST and time.perf_counter() - begin > self._seconds:
                return
            yield turn


@contextmanager
def quiet(threads: int) -> Iterator[None]:
    """No garbage collection, and so many threads."""
    before, collecting = torch.get_num_threads(), gc.isenabled()
    torch.set_num_threads(threads)
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        torch.set_num_threads(before)
        if collecting:
            gc.enable()


def _cycle(live: Live, prepare: Callable[[int], Callable[[], Any]], watch: Stopwatch, step: int) -> list[float]:
    """Times of the calls of one patch, the last of which finishes it."""
    return [watch(prepare(at)) for at in range(step, step + live.period)]


def _calls(call: str, phase: str, times: Sequence[float], streams: int) -> list[Found]:
    """p50 and p99 of a call, cost per observation or series, and how many a second."""
    each = [t / streams for t in times]
    return [
        Found(call, phase, "p50_us", "us", [1e6 * t for t in times]),
        Found(call, phase, "p99_us", "us", [1e6 * t for t in times]),
        Found(call, phase, "us", "us", [1e6 * t for t in each]),
        Found(call, phase, "per_s", "1/s", [1 / t for t in each]),
    ]


def _mixed(call: str, cycles: Sequence[Sequence[float]], streams: int) -> list[Found]:
    """Percentiles over single calls, cost per observation over whole cycles."""
    means = [statistics.fmean(cycle) for cycle in cycles]
    return [*_calls(call, "mixed", [t for cycle in cycles for t in cycle], streams)[:2],
            *_calls(call, "mixed", means, streams)[2:]]  # fmt: skip


def measure(live: Live, streams: int, watch: Stopwatch, *, staggered: bool = False) -> list[Found]:
    """Times all calls of a system."""
    out: list[Found] = []
    step, period = live.next, live.period

    def forecasts(phase: str) -> None:
        live.forecast()
        out.extend(_calls("forecast", phase, [watch(live.forecast) for _ in watch.turns()], streams))

    for way, prepare in live.observe.items():
        cycles = []
        for turn in watch.turns():
            if turn == 0:  # the first is for warming up
                _cycle(live, prepare, watch, step)
                step += period
            cycles.append(_cycle(live, prepare, watch, step))
            step += period
        if period == 1:
            out += _calls(way, "every", [cycle[0] for cycle in cycles], streams)
        elif staggered:
            out += _mixed(way, cycles, streams)
        else:
            out += _calls(way, "inside", [t for cycle in cycles for t in cycle[:-1]], streams)
            out += _calls(way, "closes", [cycle[-1] for cycle in cycles], streams)
            if streams == 1:
                out += _mixed(way, cycles, streams)
    way, prepare = next(iter(live.observe.items()))
    if staggered:
        forecasts("mixed")
        return out
    forecasts("every" if period == 1 else "end")
    if period > 1:
        for at in range(step, step + period // 2):
            prepare(at)()
        forecasts("inside")
        for at in range(step + period // 2, step + period):
            prepare(at)()
        step += period
    if streams <= STEPS_UP_TO:

        def both(at: int) -> Callable[[], Any]:
            observe = prepare(at)
            return lambda: (observe(), live.forecast())

        cycles = []
        for _ in watch.turns():
            cycles.append(_cycle(live, both, watch, step))
            step += period
        if period == 1:
            out += _calls("observe_forecast", "every", [cycle[0] for cycle in cycles], streams)
        else:
            out += _calls("observe_forecast", "inside", [t for cycle in cycles for t in cycle[:-1]], streams)
            out += _calls("observe_forecast", "closes", [cycle[-1] for cycle in cycles], streams)
    return out


def flatness(short: Live, long: Live, streams: int, watch: Stopwatch) -> list[Found]:
    """Two lengths of history in turns: what the long one costs, and by how much more than the short one."""
    out: list[Found] = []
    pair = (short, long)
    steps = [short.next, long.next]

    def compared(call: str, phase: str, times: Sequence[Sequence[float]]) -> None:
        for found in _calls(call, phase, times[1], streams)[:2]:  # by another name, lest tables mix the two histories
            out.append(found._replace(metric=f"long_{found.metric}", history=long.history))
        ratio = statistics.median(times[1]) / statistics.median(times[0])
        out.append(Found(call, phase, "history_ratio", "", [ratio], long.history))

    for way in short.observe:
        inside: tuple[list[float], list[float]] = ([], [])
        closes: tuple[list[float], list[float]] = ([], [])
        for turn in watch.turns():
            for i in (0, 1) if turn % 2 else (1, 0):  # neither always comes after the other
                for warming in (True, False) if turn == 0 else (False,):
                    cycle = _cycle(pair[i], pair[i].observe[way], watch, steps[i])
                    steps[i] += pair[i].period
                    if not warming:
                        inside[i].extend(cycle[:-1])
                        closes[i].append(cycle[-1])
        compared(way, "inside", inside)
        compared(way, "closes", closes)
    forecasts: tuple[list[float], list[float]] = ([], [])
    for turn in watch.turns():
        for i in (0, 1) if turn % 2 else (1, 0):
            forecasts[i].append(watch(pair[i].forecast))
    compared("forecast", "end", forecasts)
    return out


# ---- the run


def run(
    mixers: Sequence[str],
    contestants: Sequence[str],
    streams: Sequence[int],
    *,
    results: Path,
    options: Options,
    resume: bool = False,
) -> int:
    """Measures every cell and appends its rows together; returns how many failed.

    Args:
        mixers: of our predictor.
        contestants: keys of `CONTESTANTS`; those that are not installed are named and left out.
        streams: how many series, one cell each.
        results: CSV to append to.
        options: of all cells.
        resume: leave out what has rows of this commit, hardware and options.
    """
    origin = provenance(options.device)
    done = _done(results, origin, options) if resume else set()
    systems = list(mixers)
    if exact_is_offered():
        systems += [f"{mixer}_exact" for mixer in mixers]
    if options.compiled:  # takes minutes
        systems += [f"{mixer}_compiled{mode}" for mixer in mixers for mode in ("", "_exact")]
    cells = [cell for count in streams for cell in _cells(systems, contestants, count, options)]
    failed, absent = 0, set()
    for number, (name, count, part) in enumerate(cells, 1):
        if (name, str(count), part) in done or name in absent:
            continue
        label = f"[{number}/{len(cells)}] {name} {count:,} {'calls' if part == 'calls' else 'histories'}"
        try:
            with quiet(options.threads):
                found, history = _cell(name, count, part, options)
        except ModuleNotFoundError as error:
            if name not in CONTESTANTS:
                raise
            absent.add(name)
            say(f"{name} is left out: {error.name} is not installed")
            continue
        except Exception as error:
            if name not in CONTESTANTS and not isinstance(error, RuntimeError | ValueError | MemoryError):
                raise
            failed += 1  # what others raise is theirs to choose
            say(f"{label}: {type(error).__name__}: {error}")
            continue
        given = {"seed": options.seed, "config": options.describe(), "device": options.device, "origin": origin}
        append(results, *(written(one, name, count, history, **given) for one in found))
        say(f"{label}: {_summary(found)}")
    return failed


def _cells(
    systems: Sequence[str], contestants: Sequence[str], streams: int, options: Options
) -> Iterator[tuple[str, int, str]]:
    """(system, streams, part) that make sense."""
    for name in systems:
        exact, compiled = name.endswith("_exact"), "_compiled" in name
        if (not exact or streams <= EXACT_UP_TO) and (not compiled or streams == 1):
            yield name, streams, "calls"
        if streams in options.flat and not exact and not compiled:
            yield name, streams, "history"
    for name in contestants:
        if streams <= CONTESTANTS[name].most and (options.device == "cpu" or CONTESTANTS[name].gpu):
            yield name, streams, "calls"


def _cell(name: str, streams: int, part: str, options: Options) -> tuple[list[Found], int]:
    source = Source(streams, options.seed)
    watch = Stopwatch(options.device, options.seconds)
    if name in CONTESTANTS:
        steps = min(options.histories[0], max(4 * SEASON, LEARNT // streams))
        live = CONTESTANTS[name].make(source, steps, options)
        return measure(live, streams, watch), live.history
    patch = _patch_size()
    short = ours(name, source, seen(options.histories[0], streams, patch), options)
    if part == "history":
        long = ours(name, source, -(-options.histories[1] // patch) * patch, options)
        return flatness(short, long, streams, watch), long.history
    found = measure(short, streams, watch)
    history = short.history
    if streams > 1:
        del short  # two pools of the largest size need not fit
        found += measure(ours(name, source, history, options, staggered=True), streams, watch, staggered=True)
    return found, history


def _patch_size() -> int:
    return int(inspect.signature(Forecaster).parameters["patch_size"].default)


def written(found: Found, system: str, streams: int, history: int, **given: Any) -> dict[str, Any]:
    """A row: median, 20th and 80th percentile; of `p99` the 99th percentile alone."""
    values = found.values
    spread: dict[str, Any] = {"value": f"{statistics.median(values):.6g}", "n": len(values)}
    if "p99" in found.metric:
        spread["value"] = f"{np.percentile(values, 99):.6g}"
    elif len(values) > 1:
        low, high = np.percentile(values, [20, 80])
        spread |= {"p20": f"{low:.6g}", "p80": f"{high:.6g}"}
    return row(
        metric=found.metric, unit=found.unit, **spread, **given, system=system,
        processor="gpu" if given.get("device", "cpu").startswith("cuda") else "cpu", call=found.call, streams=streams,
        phase=found.phase, history=history if found.history is None else found.history,
    )  # fmt: skip


def _summary(found: Sequence[Found]) -> str:
    shown = [one for one in found if one.metric in ("us", "history_ratio")]
    return ", ".join(
        f"{one.call} {one.phase} {statistics.median(one.values):,.3g}{'x' if not one.unit else ''}" for one in shown
    )


def _done(results: Path, origin: dict[str, Any], options: Options) -> set[tuple[str, str, str]]:
    """(system, streams, part) that have rows of this commit, hardware and options."""
    if not results.is_file():
        return set()
    with results.open(encoding="utf-8", newline="") as file:
        return {
            (line["system"], line["streams"], "history" if line["metric"] == "history_ratio" else "calls")
            for line in csv.DictReader(file)
            if line["metric"] in ("history_ratio", "per_s") and line["config"] == options.describe()
            and all(line[key] == str(origin[key]) for key in ("commit", "hardware"))
        }  # fmt: skip


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)
