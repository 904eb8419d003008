"""The streaming benchmarks: what is timed is what is said, rows are written once, and memory stays flat."""

import csv
import gc
import sys
import tracemalloc
import types
from typing import Any

import numpy as np
import pytest
import torch

from tsgdn.bench import latency, memory, record
from tsgdn.cli.main import main

KEYS = ("system", "processor", "call", "streams", "phase", "history")
PATCH = 8


def rows(path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def results(tmp_path):
    return tmp_path / "results.csv"


@pytest.fixture
def quickly(monkeypatch):
    """Models of the smallest size, one cycle of each kind."""
    monkeypatch.setattr(latency, "WIDTH", 16)  # narrower ones are refused by exact=True
    monkeypatch.setattr(latency, "DEPTH", 1)
    monkeypatch.setattr(latency, "LEAST", 1)


def bench(path, *options) -> int:
    given = ("--threads", "1", "--seconds", "0", "--results", str(path))
    return main(["bench", "latency", *given, *options])


def test_values_of_a_step_are_a_column_of_the_run_and_differ_between_streams_and_seeds():
    source = latency.Source(5)
    run = source.run(90, 130)
    assert run.shape == (5, 40)
    np.testing.assert_array_equal(source.at(101), run[:, 11])
    assert len(np.unique(run)) == run.size
    assert not np.isclose(latency.Source(5, seed=1).run(90, 130), run).any()
    assert latency.stamps(25) == np.datetime64("1990-01-02T01")


def test_many_series_have_seen_less_each_and_always_whole_patches():
    assert latency.seen(1000, 1, PATCH) == 1000
    assert latency.seen(1001, 64, PATCH) == 1008
    assert latency.seen(1000, 10_000, PATCH) == 200
    assert latency.seen(1000, 1_000_000, PATCH) == 4 * PATCH


@pytest.mark.parametrize("steps", [32, 96])
def test_taught_streams_stand_where_they_should_whether_told_step_by_step_or_at_once(quickly, monkeypatch, steps):
    monkeypatch.setattr(latency, "LEARNT", 11 * 40)  # in passes of 40 steps
    for staggered in (False, True):
        live, source = latency.predictor("gated_deltanet"), latency.Source(11)
        ids = np.array([f"series-{i}" for i in range(11)])
        latency.teach(live, source, ids, steps, staggered=staggered)
        begins = [i % PATCH if staggered else 0 for i in range(11)]
        assert [live.head(item) for item in ids.tolist()] == [steps - begin for begin in begins]
        report = live.observe((ids, np.full(11, latency.stamps(steps)), source.at(steps)))
        assert (report.accepted, report.gap) == (11, 0)
        again = live.observe((ids, np.full(11, latency.stamps(steps - 1)), source.at(steps - 1)))
        assert again.duplicate == 11


def test_calls_of_a_patch_are_told_apart_and_a_staggered_crowd_closes_some_at_every_call(quickly):
    options = latency.Options(seconds=0)
    source = latency.Source(16)
    for staggered in (False, True):
        live = latency.ours("gated_deltanet", source, 4 * PATCH, options, staggered=staggered)
        taken = []
        original = torch.nn.Module.__call__

        def spy(module, batch, *args, original=original, taken=taken, **more):
            if isinstance(module, latency.Forecaster):
                taken.append(len(batch.values))
            return original(module, batch, *args, **more)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.nn.Module, "__call__", spy)
            for prepare in list(live.observe.values())[:1]:
                for step in range(live.next, live.next + PATCH):
                    taken.append("call")
                    prepare(step)()
        closing = ["call", 2] * PATCH if staggered else ["call"] * PATCH + [16]
        assert taken == closing


def test_a_small_run_writes_what_it_measured_and_resumes(results, quickly, capsys):
    options = ("--streams", "1,3", "--only", "ours", "--histories", "32,64")
    assert bench(results, *options) == 0
    written = rows(results)
    assert tuple(written[0]) == (*record.COLUMNS, *KEYS)
    plain = [line for line in written if line["system"] == "gated_deltanet"]
    ways = {line["call"] for line in plain if line["call"].startswith("observe")} - {"observe_forecast"}
    assert ways >= {"observe_arrays", "observe_dict"}
    for streams in ("1", "3"):
        cells = {
            (line["call"], line["phase"]) for line in plain if line["streams"] == streams and int(line["history"]) < 64
        }
        assert cells == {
            *((way, phase) for way in ways for phase in ("inside", "closes", "mixed")),
            *(("observe_forecast", phase) for phase in ("inside", "closes")),
            *(("forecast", phase) for phase in ("end", "inside", *(["mixed"] if streams == "3" else []))),
        }
    for line in written:
        assert float(line["value"]) > 0
        assert line["config"].startswith("16x1 horizon 24 threads 1")
    find = {tuple(line[k] for k in (*KEYS, "metric")): line for line in plain}
    inside = find["gated_deltanet", "cpu", "observe_arrays", "3", "inside", "32", "us"]
    call = find["gated_deltanet", "cpu", "observe_arrays", "3", "inside", "32", "p50_us"]
    speed = find["gated_deltanet", "cpu", "observe_arrays", "3", "inside", "32", "per_s"]
    assert float(call["value"]) == pytest.approx(3 * float(inside["value"]), rel=1e-4)
    assert float(speed["value"]) == pytest.approx(
        1e6 / float(inside["value"]), rel=0.5
    )  # a mean of two may lie between
    assert inside["n"] == str(PATCH - 1)
    assert float(call["p20"]) <= float(call["value"]) <= float(call["p80"])
    ratios = {(line["call"], line["phase"]) for line in plain if line["metric"] == "history_ratio"}
    assert ratios == {("forecast", "end"), *((way, phase) for way in ways for phase in ("inside", "closes"))}
    assert {line["streams"] for line in plain if line["history"] == "64"} == {"1"}
    assert capsys.readouterr().out == ""

    assert bench(results, *options, "--resume") == 0
    assert rows(results) == written
    assert bench(results, *options, "--streams", "3,5", "--resume") == 0
    assert {line["streams"] for line in rows(results)[len(written) :]} == {"5"}


def test_percentiles_and_the_cost_per_observation_are_those_of_the_calls():
    ten = [1e-6 * x for x in range(1, 101)]
    found = {one.metric: one for one in latency._calls("observe", "inside", ten, 10)}
    origin = record.provenance()
    told = {metric: latency.written(one, "ours", 10, 32, origin=origin) for metric, one in found.items()}
    assert float(told["p50_us"]["value"]) == pytest.approx(50.5)
    assert float(told["p99_us"]["value"]) == pytest.approx(99.01)
    assert float(told["us"]["value"]) == pytest.approx(5.05)
    assert float(told["p50_us"]["p20"]) == pytest.approx(20.8)
    assert told["per_s"]["unit"] == "1/s"
    mixed = {one.metric: one for one in latency._mixed("observe", [[1e-6, 9e-6], [1e-6, 11e-6]], 2)}
    assert mixed["us"].values == pytest.approx([2.5, 3.0])
    assert sorted(mixed["p99_us"].values) == pytest.approx([1, 1, 9, 11])


def test_a_longer_history_that_costs_more_is_seen():
    clock = [0.0]

    def live(cost, history):
        def prepare(step):
            def call():
                clock[0] += cost * (5 if step % 2 else 1)

            return call

        return latency.Live({"observe": prepare}, lambda: prepare(0)(), 2, 0, history)

    class Watch(latency.Stopwatch):
        def __call__(self, call):
            begin = clock[0]
            call()
            return clock[0] - begin

    found = latency.flatness(live(1.0, 4), live(1.5, 40), 1, Watch("cpu", 0))
    ratios = {(one.call, one.phase): one for one in found if one.metric == "history_ratio"}
    assert {key: one.values for key, one in ratios.items()} == {
        key: [pytest.approx(1.5)] for key in (("observe", "inside"), ("observe", "closes"), ("forecast", "end"))
    }
    assert all(one.history == 40 for one in found)
    costs = {one.phase: one.values[0] for one in found if one.metric == "long_p50_us" and one.call == "observe"}
    assert costs == {"inside": pytest.approx(1.5e6), "closes": pytest.approx(7.5e6)}


class Slow:
    """Stands for a model of another library."""

    def learn_one(self, value):
        self.last = value

    def forecast(self, horizon):
        return [self.last] * horizon


def test_other_systems_are_measured_on_the_same_data_and_left_out_where_they_are_not_installed(
    results, quickly, monkeypatch, capsys
):
    series: Any = types.ModuleType("river.time_series")
    series.SNARIMAX = lambda **_: Slow()
    river = types.ModuleType("river")
    monkeypatch.setitem(sys.modules, "river", river)
    monkeypatch.setitem(sys.modules, "river.time_series", series)
    monkeypatch.setitem(sys.modules, "statsforecast", None)
    options = ("--only", "theirs", "--contestants", "river_snarimax,statsforecast_autoets", "--streams", "1,9")
    assert bench(results, *options) == 0
    said = capsys.readouterr().err
    assert said.count("statsforecast_autoets is left out") == 1
    found = rows(results)
    assert {line["system"] for line in found} == {"river_snarimax"}
    assert {(line["call"], line["phase"]) for line in found} == {
        (call, "every") for call in ("learn_one", "forecast", "observe_forecast")
    }
    series.SNARIMAX = lambda **_: 1 / 0
    assert bench(results, *options, "--streams", "2") == 1
    assert "ZeroDivisionError" in capsys.readouterr().err
    assert rows(results) == found


@pytest.mark.parametrize("name", ["gluonts_patchtst", "gluonts_deepar"])
def test_models_that_read_their_context_again_forecast_all_streams(name):
    pytest.importorskip("gluonts")
    pytest.importorskip("lightning")
    source = latency.Source(2)
    live = latency.CONTESTANTS[name].make(source, 96, latency.Options(horizon=4))
    live.observe["append"](live.next)()
    found = live.forecast()
    assert [len(one.mean) for one in found] == [4, 4]


def test_a_context_keeps_the_last_values_in_order():
    source = latency.Source(3)
    context = latency.Context(source, 5)
    for step in range(5, 18):
        context.append(step)()
        np.testing.assert_array_equal(context.last(), source.run(step - 4, step + 1))


def test_bytes_per_series_are_written_once_and_the_soak_beside_them(results, quickly, capsys):
    command = ["bench", "memory", "--threads", "1", "--streams", "100,200", "--soak", "60", "--soak-streams", "3"]
    command += ["--results", str(results)]
    assert main(command) == 0
    found = rows(results)
    assert tuple(found[0]) == (*record.COLUMNS, *KEYS)
    assert [(line["call"], line["streams"], line["metric"]) for line in found] == [
        ("memory", "100", "bytes_per_series"),
        ("memory", "100", "host_bytes_per_series"),
        ("memory", "200", "bytes_per_series"),
        ("memory", "200", "host_bytes_per_series"),
        ("soak", "3", "host_growth"),
        ("soak", "3", "bytes_per_series"),
    ]
    assert found[-1]["history"] == "20"
    counted = {line["value"] for line in found if line["metric"] == "bytes_per_series"}
    assert counted == {str(latency.predictor("gated_deltanet").nbytes_per_series)}
    assert main([*command, "--resume"]) == 0
    assert rows(results) == found
    assert main([*command, "--resume", "--soak", "0"]) == 0
    assert {line["call"] for line in rows(results)[6:]} == {"memory"}
    assert capsys.readouterr().out == ""


def test_a_series_takes_the_bytes_that_are_counted_and_not_much_more():
    found = {one.metric: one.values[0] for _, one in memory.per_series("gated_deltanet", [400])}
    counted = found["bytes_per_series"]
    assert 10_496 * latency.DEPTH < counted < 40_000
    assert 0.9 * counted < found["host_bytes_per_series"] < 1.5 * counted + 5000


def held() -> tuple[int, int]:
    """Bytes of all numpy arrays, and of all tensors."""
    gc.collect()
    arrays = tracemalloc.take_snapshot().filter_traces(
        [tracemalloc.DomainFilter(True, np.lib.tracemalloc_domain)],
    )
    storages = [x.untyped_storage() for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter)]
    return (
        sum(trace.size for trace in arrays.traces),
        sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values()),
    )


def test_nothing_that_is_held_grows_with_observations(quickly):
    readings = []
    tracemalloc.start()
    try:
        crowd = memory.Crowd(latency.predictor("gated_deltanet"), 10)
        for tick in range(12 * PATCH):
            crowd.tick(10)
            if tick % 20 == 0:
                crowd.live.forecast(horizon=24)
            if tick in (4 * PATCH - 1, 12 * PATCH - 1):
                readings.append((*held(), crowd.live.nbytes_per_series))
    finally:
        tracemalloc.stop()
    (arrays, tensors, each), after = readings
    assert tensors > 64 * (each - crowd.live.model.patch_size * 18 - 48) > 0  # a slab of the pool is among them
    assert after == (pytest.approx(arrays, abs=640), tensors, each)  # 640 observations later


def test_a_soak_sees_memory_that_is_not_given_back(quickly, monkeypatch):
    kept = []
    tick = memory.Crowd.tick

    def leaking(crowd, streams):
        kept.append(np.ones(1 << 18))
        tick(crowd, streams)

    monkeypatch.setattr(memory.Crowd, "tick", leaking)
    found = {one.metric: one.values[0] for one in memory.soak("gated_deltanet", 200, 10)}
    assert found["bytes_per_series"] == latency.predictor("gated_deltanet").nbytes_per_series
    assert found["host_growth"] > 14 * (2 << 20)  # of 20 ticks 15 come after the first reading


@pytest.mark.parametrize(
    ("question", "options", "text"),
    [
        ("latency", ["--mixers", "gated"], "--mixers gated: expected some of "),
        (
            "latency",
            ["--mixers", "gated_attention"],
            "--mixers gated_attention: the state of mixer gated_attention grows",
        ),
        ("latency", ["--contestants", "prophet"], "--contestants prophet: expected some of river_snarimax"),
        ("latency", ["--streams", "1,many"], "--streams 1,many: expected whole numbers from 1"),
        ("latency", ["--streams", "0"], "--streams 0: expected whole numbers from 1"),
        ("latency", ["--histories", "1000"], "--histories 1000: expected a short and a long one"),
        ("latency", ["--histories", "1000,100"], "--histories 1000,100: expected a short and a long one"),
        ("latency", ["--horizon", "0"], "--horizon 0: expected at least 1"),
        ("latency", ["--seconds", "-1"], "--seconds -1.0: expected 0 or more"),
        ("latency", ["--threads", "0"], "--threads 0: expected at least 1"),
        ("memory", ["--streams", "10,10"], "--streams 10,10: expected growing numbers"),
        ("memory", ["--soak", "-1"], "--soak -1: expected a number of observations"),
        ("memory", ["--soak-streams", "0"], "--soak-streams 0: expected at least 1"),
        ("memory", ["--mixers", "h"], "--mixers h: expected some of "),
    ],
)
def test_misuse_is_one_line_and_nothing_is_written(results, capsys, question, options, text):
    assert main(["bench", question, "--results", str(results), *options]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert text in said.err
    assert not results.exists()


def test_without_a_gpu_it_says_so(results, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for question in ("latency", "memory"):
        assert main(["bench", question, "--device", "cuda", "--results", str(results)]) == 2
        assert "there is no CUDA device to measure on; leave --device out" in capsys.readouterr().err
