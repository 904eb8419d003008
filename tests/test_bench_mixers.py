"""The comparison of all mixers: like with like, resumable, and blind to the test part."""

import csv

import numpy as np
import pytest

from tsgdn.bench import fits, mixers
from tsgdn.bench.matching import STATE_BYTES, matched, sizes
from tsgdn.bench.record import append, row
from tsgdn.cli.main import main
from tsgdn.data.module import find_task
from tsgdn.mixers import build
from tsgdn.model.backbone import cycle

SYSTEMS = mixers.systems()
VECTORS = ("gru", "slstm")
"""Their whole state is a vector: bytes like a memory's would take millions of parameters."""


@pytest.mark.parametrize("name", SYSTEMS)
def test_what_is_compared_has_the_parameters_and_the_state_bytes_of_gated_deltanet(name):
    depth = 4
    ours, found = (matched(which, width=64, depth=depth) for which in ("gated_deltanet", name))
    assert abs(found.parameters - ours.parameters) < 0.01 * ours.parameters
    if name in VECTORS:
        assert found.state_bytes < ours.state_bytes
        return
    bounded = [part for part in cycle(name) if part != "gated_attention"]
    for part in bounded:
        args = found.mixer_args if cycle(name) == (name,) else found.mixer_args[part]
        assert abs(build(part, 64, args).state_bytes() - STATE_BYTES) < 0.04 * STATE_BYTES, part


@pytest.mark.parametrize("state_bytes", [4096, 16384])
@pytest.mark.parametrize("name", ["gated_deltanet", "mamba2", "gated_deltanet2", "ham"])
def test_other_state_sizes_can_be_asked_for(name, state_bytes):
    found = build(name, 64, sizes(name, 64, state_bytes)).state_bytes()
    assert abs(found - state_bytes) < 0.05 * state_bytes


def test_what_cannot_be_matched_is_refused_in_one_line():
    with pytest.raises(ValueError, match="takes more already"):
        sizes("gated_deltanet", 64, 100)
    with pytest.raises(ValueError, match="parameters more than gated_deltanet"):
        matched("gru", width=64, depth=2, state_bytes=1200, mlp_ratio=0.05)


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_cost_of_a_backbone_is_measured_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(mixers, "PER_MEASUREMENT", 0.0)
    monkeypatch.setattr(mixers, "STREAMS", (1, 3))
    monkeypatch.setattr(mixers, "ROWS", 2)
    results = tmp_path / "results.csv"
    command = ["bench", "mixers", "--only", "cost", "--mixers", "gru,h1", "--depth", "2", "--results", str(results)]
    assert main(command) == 0
    first = rows(results)
    assert {(line["model"], line["metric"]) for line in first} == {
        (model, metric)
        for model in ("gru", "h1")
        for metric in (
            *("parameters", "state_bytes", "state_bytes_1024", "train_tokens_per_s", "step_us_1", "step_us_3"),
        )
    }
    assert all(float(line["value"]) > 0 for line in first)
    assert main(command) == 0
    assert rows(results) == first
    assert "h1: parameters" in capsys.readouterr().err


def test_a_cost_that_cannot_be_measured_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    def measure(name, *_):
        if name == "gru":
            raise RuntimeError("out of memory")
        return [("parameters", "", [7.0])]

    monkeypatch.setattr(mixers, "measure", measure)
    results = tmp_path / "results.csv"
    assert mixers.cost(["gru", "mamba2"], sizes=fits.Sizes(), results=results) == 1
    assert [(line["model"], line["value"]) for line in rows(results)] == [("mamba2", "7")]
    assert "gru: out of memory" in capsys.readouterr().err


def test_validation_windows_are_what_a_fit_holds_out_and_end_before_the_test_part():
    part, task = mixers.Validation("simulated"), find_task("simulated")
    training, windows = part.split()
    (whole, instances), held = task.split(), {}
    assert all(label.shape[1] == task.horizon for _, label in windows)
    for context, label in windows:
        held.setdefault(context.item_id, [context, []])[1].append(label)
    for series, fitted in zip(whole, training, strict=True):
        first, labels = held[series.item_id]
        np.testing.assert_array_equal(first.values, fitted.values)
        np.testing.assert_array_equal(np.concatenate([fitted.values, *labels], 1), series.values)
        tests = [len(context) for context, _ in instances if context.item_id == series.item_id]
        assert len(series) <= min(tests)


def test_the_report_draws_what_was_measured(tmp_path, capsys):
    results = tmp_path / "results.csv"
    command = ["bench", "mixers", "--report", "--results", str(results)]
    assert main(command) == 2
    assert "no scores to draw" in capsys.readouterr().err
    origin = {key: "" for key in ("commit", "dirty", "date", "hardware", "torch", "triton")}
    for name, value in (("gru", 0.3), ("mamba2", 0.2)):
        line = row(metric="wql", value=value, task="etth1", model=name, config="", seed=0, origin=origin)
        append(results, line)
    assert main(command) == 0
    assert (tmp_path / "wql_etth1.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--mixers", "gated"], "--mixers gated: expected some of "),
        (["--tasks", "demo"], "--tasks demo: expected evaluation cells"),
        (["--seeds", "one"], "--seeds one: expected whole numbers"),
        (["--workers", "0"], "--workers 0: expected at least 1"),
        (["--depth", "1", "--mixers", "h2"], "h2 cannot have these sizes: depth is 1"),
        (["--state-bytes", "64", "--mixers", "mamba2"], "mamba2 cannot have these sizes"),
    ],
)
def test_misuse_is_one_line_and_nothing_is_written(tmp_path, capsys, options, text):
    results = tmp_path / "results.csv"
    assert main(["bench", "mixers", "--results", str(results), *options]) == 2
    said = capsys.readouterr().err
    assert text in said
    assert said.count("\n") == 1
    assert not results.exists()
