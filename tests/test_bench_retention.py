"""The retention bench: tokens on the device, matched sizes, forks, plans, kill and resume, a report from rows alone."""

import csv
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tsgdn.bench.matching import REGIME_SIZES, UNMATCHED_STATES, regime_sizes
from tsgdn.bench.retention import (
    blocks,
    card,
    cells,
    figures,
    mechanism,
    real,
    references,
    report,
    rows,
    run,
    scoring,
    training,
)
from tsgdn.bench.retention.blocks import Feed, Request, make
from tsgdn.bench.retention.model import RegimeModel, assemble, loss
from tsgdn.bench.retention.rows import HEADER
from tsgdn.cli.main import main
from tsgdn.data.retention import TASKS, block, tokens
from tsgdn.data.retention.dynamics import IMPULSE
from tsgdn.data.series import Series
from tsgdn.evaluation import retention as scores
from tsgdn.kernels import gated_delta_rule
from tsgdn.model.artefact import save
from tsgdn.model.forecaster import Forecaster

TINY = replace(cells.SMOKE, steps=4, batch=2, train_gaps=(4, 6), test_gaps=(16, 24), groups=2)
TINY = replace(TINY, sequences=(8, 8), choice_sequences=(2, 2))


def asked(task, **more):
    given = {"task": task, "axes": (), "seeds": (3, 4), "index": 1, "split": "test", "gap": 8, "batch": 3} | more
    return Request(**given)


# ---- data


@pytest.mark.parametrize("task", list(TASKS))
def test_tokens_put_together_on_the_device_are_those_of_the_data(task):
    gap = 0 if task == "T4" else 8
    made = make(asked(task, gap=gap))
    found = assemble({name: torch.from_numpy(array) for name, array in made.fields.items()})
    for place, seed in enumerate((3, 4)):
        want = tokens(block(task, index=1, seed=seed, split="test", batch=3, gap=gap))
        np.testing.assert_array_equal(found["x"][place], want.inputs)
        np.testing.assert_array_equal(found["targets"][place], want.targets)
        weight = found["weight"][place].expand(found["targets"][place].shape)
        np.testing.assert_array_equal(weight, want.weight)
        forecast = torch.from_numpy(want.targets) + 2
        one = {name: leaf[place] for name, leaf in found.items()}
        assert loss(forecast, one).item() == pytest.approx(4 * want.weight.sum(), rel=1e-4)


def test_the_gap_of_a_step_is_one_for_all_seeds_and_takes_every_value():
    drawn = [blocks.gap_of_step("T3", step, (16, 32, 64)) for step in range(60)]
    assert set(drawn) == {16, 32, 64}
    assert drawn == [blocks.gap_of_step("T3", step, (16, 32, 64)) for step in range(60)]


def test_blocks_made_by_another_process_are_the_same_and_leave_nothing_behind():
    wanted = [asked("T5", questions=True, index=i) for i in range(3)]
    feed = Feed(1)
    try:
        for request, made in zip(wanted, feed(wanted), strict=True):
            for got, want in zip(made, make(request), strict=True):
                assert got.keys() == want.keys()
                for name in got:
                    np.testing.assert_array_equal(got[name], want[name])
        early = feed(wanted)
        next(early)
        early.close()
        folder = feed._folder
        assert folder is None or not list(blocks.Path(folder).iterdir())
    finally:
        feed.close()
    assert folder is None or not blocks.Path(folder).exists()


# ---- sizes


@pytest.mark.parametrize("kib", [1, 2, 4, 16, 64])
def test_state_bytes_agree_within_two_percent_and_parameters_within_three(kib):
    ours = regime_sizes("gated_deltanet", state_kib=kib)
    floats = {1: 544, 2: 800, 4: 1600, 16: 5248, 64: 18688}[kib]
    assert ours.state_bytes == 4 * 2 * floats
    for name in [*(n for n in REGIME_SIZES if kib in REGIME_SIZES[n]), *UNMATCHED_STATES]:
        found = regime_sizes(name, state_kib=kib)
        assert abs(found.parameters / ours.parameters - 1) < 0.03, name
        if name not in UNMATCHED_STATES:
            assert abs(found.state_bytes / ours.state_bytes - 1) < 0.02, name


def test_the_shapes_of_the_protocol_have_the_floats_that_it_names():
    floats = {("mamba2", 4): 1592, ("mamba2", 16): 5208, ("gated_deltaproduct", 4): 1624, ("mamba3", 16): 5248}
    floats |= {("rwkv7", 16): 5184, ("ham", 16): 5155, ("mamba2", 1): 552, ("ham", 64): 18628}
    for (name, kib), count in floats.items():
        assert regime_sizes(name, state_kib=kib).state_bytes == 8 * count, (name, kib)


def test_a_size_that_a_mixer_does_not_have_is_refused_by_name():
    with pytest.raises(ValueError, match="ham has no size of 1 KiB in the retention study; it has 4, 16, 64"):
        regime_sizes("ham", state_kib=1)


def test_every_mixer_that_decays_starts_with_the_same_range_of_memories():
    for name in ("gated_deltanet", "mamba2", "kda"):
        assert regime_sizes(name, state_kib=4, init="shared").mixer_args["decay_init"] == "shared"
        assert regime_sizes(name, state_kib=4).mixer_args["horizon"] == (4.0, 16384.0)
    assert {"heads": 4, "key_dim": 16, "value_dim": 16}.items() <= regime_sizes("kda", state_kib=4).mixer_args.items()


# ---- model and forks


def small(task, mixer="gated_deltanet", **axes):
    shape = blocks.shape_of(task, tuple(sorted(axes.items())))
    sizes = regime_sizes(mixer, state_kib=2)
    return RegimeModel(shape.inputs, shape.outputs, width=32, depth=2, sizes=sizes)


def test_the_model_streams():
    model = small("T3").double()
    x = torch.randn(2, 12, 64, dtype=torch.float64)
    whole, _ = model(x)
    state, pieces = None, []
    for piece in x.split([3, 1, 8], 1):
        y, state = model(piece, state=state)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), whole)


def test_a_token_without_a_cue_reads_the_memory():
    model = small("T9b")
    made = make(asked("T9b"))
    said, _ = model(assemble({k: torch.from_numpy(v[0]) for k, v in made.fields.items()})["x"])
    assert said[:, -1].abs().min() > 0


class Alone:
    """One module in the place of replicas."""

    def __init__(self, model):
        self.model = model

    @torch.no_grad()
    def __call__(self, inputs, state=None):
        said, state = self.model(inputs["x"][0], state=state)
        return said[None], state


def whole(model, task, **branch):
    drawn = block(task, index=1, seed=3, split="test", batch=3, gap=8, **branch)
    with torch.no_grad():
        return model(torch.from_numpy(tokens(drawn).inputs))[0][:, -1].numpy()


def test_forks_of_a_state_answer_as_the_branches_that_the_task_draws(monkeypatch):
    monkeypatch.setattr(scoring, "CHUNK_TOKENS", 30)  # three streams: chunks of ten steps
    model = small("T7")
    found = scoring._effects(make(asked("T7", seeds=(3,), questions=True)), Alone(model), [0], "cpu")[0]
    for action in (0, 5):
        want = whole(model, "T7", do=action) - whole(model, "T7", do="none")
        np.testing.assert_allclose(found[:, action], want, atol=1e-5)
        assert np.abs(want).max() > 1e-4
    model = small("T8")
    found = scoring._columns(make(asked("T8", seeds=(3,), questions=True)), Alone(model), [0], "cpu")[0]
    for channel in (0, 5):
        np.testing.assert_allclose(found[:, :, channel], whole(model, "T8", impulse=channel) / IMPULSE, atol=1e-5)


def test_chunks_with_the_state_carried_score_like_one_long_call(monkeypatch):
    group = cells.report(TINY, cells.Unit("T5", "mamba2", 2), 1e-3, 2)
    replicas = training.replicas_of(group, "cpu")
    want = scoring.score(group, replicas, feed=Feed(), device="cpu")
    monkeypatch.setattr(scoring, "CHUNK_TOKENS", 100)
    for ours, theirs in zip(scoring.score(group, replicas, feed=Feed(), device="cpu"), want, strict=True):
        for gap in ("16", "24"):
            for part in ("rare", "common", "revised"):
                np.testing.assert_allclose(
                    ours["gaps"][gap][part]["error"], theirs["gaps"][gap][part]["error"], rtol=1e-3
                )


class Oracle:
    """Answers with the noise-free values."""

    def __init__(self, task):
        self.mean = block(task, index=0, seed=0, split="test", batch=8, gap=8, **dict(TINY.axes)).mean
        self.at = 0

    def __call__(self, inputs, state=None):
        n = inputs["x"].shape[2]
        return torch.from_numpy(self.mean[None, :, 1 : 1 + n]), None


@pytest.mark.parametrize("task", ["T2", "T5"])
def test_who_knows_everything_has_no_error(task):
    group = cells.report(TINY, cells.Unit(task, "mamba2", 2), 1e-3, 1)
    ((parts, odd),) = scoring.of_gap(group, Oracle(task), 8, 8, Feed(), "cpu")
    assert odd == 0
    for part in ("rare", "common"):
        assert sum(parts[part]["error"]) == pytest.approx(0, abs=1e-9)
        assert min(parts[part]["base"]) > 0
    if task == "T5":
        assert parts["plain"]["coefficient_current"] == pytest.approx(1, abs=1e-6)
        assert parts["plain"]["coefficient_stale"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("task", ["T1", "T2e", "T4", "T6", "T9", "T9b"])
def test_every_task_trains_and_is_scored(task, tmp_path, monkeypatch):
    monkeypatch.setitem(training.FIXED_GAPS, "T9", 64)
    preset = replace(TINY, steps=1, axes=(), sequences=(2, 2))
    group = cells.report(preset, cells.Unit(task, "gated_linear", 2), 1e-3, 1)
    trained = training.train(group, feed=Feed(), device="cpu", folder=tmp_path, clock=training.Clock())
    assert trained is not None
    (scores,) = scoring.score(group, trained.replicas, feed=Feed(), device="cpu")
    assert scores["not_finite"] == 0
    for parts in scores["gaps"].values():
        assert np.isfinite(parts["rare"]["error"]).all()


# ---- cells and plans


def test_a_cell_is_named_by_all_that_determines_its_numbers_and_nothing_else():
    unit = cells.Unit("T2", "mamba2", 4)
    one = cells.report(cells.PAPER, unit, 1e-3, 2).cells
    assert one[0].id != one[1].id
    assert one[0].id == cells.report(cells.PAPER, unit, 1e-3, 5).cells[0].id
    assert one[0].id != cells.report(cells.with_steps(cells.PAPER, 3000), unit, 1e-3, 1).cells[0].id
    assert one[0].id != cells.report(cells.PAPER, unit._replace(axes=(("common", 16),)), 1e-3, 1).cells[0].id
    assert one[0].content()["steps"] == 6000
    assert not {c.seed for c in one} & set(cells.VALIDATION_SEEDS)


def test_the_primary_family_has_its_480_cells_and_shards_share_the_plan():
    whole = cells.plan(cells.PAPER)
    first = [entry for entry in whole if entry.stage == "A"]
    assert sum(entry.seeds + 10 for entry in first) == 480
    parts = [cells.plan(cells.PAPER, shard=(i, 3)) for i in range(3)]
    assert sorted(map(str, whole)) == sorted(str(entry) for part in parts for entry in part)
    for part in parts:  # who chooses a learning rate uses it
        there = {entry.unit for entry in part}
        assert all(cells.chooser(unit) in there for unit in there)


@pytest.mark.slow
def test_every_unit_of_the_paper_can_be_built():
    for entry in cells.plan(cells.PAPER):
        unit = entry.unit
        regime_sizes(unit.mixer, state_kib=unit.state_kib, depth=unit.depth, init=unit.init)
        blocks.shape_of(unit.task, unit.axes)


def test_a_learning_rate_at_the_edge_asks_for_further_ones():
    assert cells.choose({3e-4: 0.1, 1e-3: 0.5, 3e-3: 0.2}) == (1e-3, ())
    assert cells.choose({3e-4: 0.6, 1e-3: 0.5, 3e-3: 0.2}) == (3e-4, (1e-4,))
    assert cells.choose({1e-2: 0.1, 3e-2: 0.5}) == (3e-2, (1e-1,))
    assert cells.choose({1e-4: 0.7, 3e-4: 0.6, 1e-3: 0.5}) == (1e-4, (3e-5,))
    assert cells.choose({3e-3: 0.1}) == (3e-3, ())


# ---- runs


def options(out, preset=TINY, **more):
    given = {"tasks": ["T5"], "mixers": ["gated_deltanet", "gated_linear"], "seeds": 2} | more
    return run.Options(preset, cells.plan(preset, **given), out)


def plain(path):
    """Rows without what differs from run to run."""
    varying = ("date", "commit", "dirty", "value")
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    return [
        {k: v for k, v in line.items() if k not in varying or (k == "value" and line["unit"] not in ("s", "us"))}
        for line in lines
    ]


CHOOSING = replace(TINY, learning_rates=(1e-3, 3e-3, 1e-2))


def test_a_killed_and_resumed_run_gives_the_same_rows(tmp_path, monkeypatch):
    few = {"tasks": ["T2"], "mixers": ["gated_deltanet"]}
    monkeypatch.setattr(run.figures, "draw", lambda *_: [])
    monkeypatch.setattr(references, "measure", list)
    quiet, whole = tmp_path / "whole", run.run(options(tmp_path / "whole", CHOOSING, **few))
    assert whole["done"] == whole["cells"] == 8
    assert whole["failed"] == 0

    # Budgets end after a step, again and again; then a kill between the files of a group.
    class Impatient(training.Clock):
        def __init__(self, budget=None):
            super().__init__(budget)
            self.asked = 0

        def left(self):
            self.asked += 1
            return 1e9 if self.asked < 4 else 0.0

    patient = run.Clock
    monkeypatch.setattr(run, "Clock", Impatient)
    pieces = tmp_path / "pieces"
    assert run.run(options(pieces, CHOOSING, **few))["done"] < 8
    assert len(list((pieces / "checkpoints").glob("*.pt"))) == 1
    count = 1
    while run.run(options(pieces, CHOOSING, **few))["done"] < 8:
        count += 1
    assert 2 < count < 20
    monkeypatch.setattr(run, "Clock", patient)
    files = sorted((pieces / "cells").glob("*.json"))
    held = [json.loads(path.read_text()) for path in files[:3]]
    (pieces / "pending").mkdir(exist_ok=True)
    (pieces / "pending" / "group.json").write_text(json.dumps(held))
    for path in files[:3]:
        path.unlink()
    done = run.run(options(pieces, CHOOSING, **few))
    assert done["done"] == 8
    assert not list((pieces / "pending").iterdir())
    assert not list((pieces / "checkpoints").glob("*.pt"))
    assert plain(pieces / "results.csv") == plain(quiet / "results.csv")


def test_the_report_is_rendered_from_the_rows_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(references, "measure", list)
    found = run.run(options(tmp_path / "run"))
    lines = report.read(tmp_path / "run" / "results.csv")
    assert list(lines[0]) == list(HEADER)
    text = (tmp_path / "run" / "report.md").read_text()
    assert report.render(lines) == text
    assert "smoke: not evidence" in text
    assert "gated_deltanet-gated_linear" in text
    assert found["report"].endswith("report.md")
    assert (tmp_path / "run" / "figures" / "f01_retention_over_gap.png").stat().st_size > 5000
    metrics = {line["metric"] for line in lines}
    assert {
        "ret_rare",
        "aurc_rare",
        "aurc_revised",
        "nmse_common",
        "failed",
        "mean_ret_rare",
        "train_seconds",
    } <= metrics
    assert {line["lr"] for line in lines if line["phase"] == "report" and line["cell_id"]} == {"0.003"}


def test_a_unit_that_cannot_be_trained_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    train = training.train

    def sometimes(group, **more):
        if group.first.unit.mixer == "gated_deltanet":
            raise RuntimeError("out of memory")
        return train(group, **more)

    monkeypatch.setattr(training, "train", sometimes)
    monkeypatch.setattr(references, "measure", list)
    done = run.run(options(tmp_path))
    assert (done["done"], done["failed"]) == (2, 1)
    assert "failed: out of memory" in capsys.readouterr().err


def test_the_plan_tells_cells_and_pieces_and_trains_nothing(tmp_path, capsys):
    command = ["bench", "retention", "--plan", "--out", str(tmp_path / "x"), "--mixers", "mamba2", "--steps", "2000"]
    assert main([*command, "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["task"], found["mixer"], found["cells"]) == ("T2", "mamba2", 1)
    assert found["seconds"] > 0
    assert not (tmp_path / "x").exists()
    assert run.table([found, found | {"stage": "T"}]).count("\n") == 3


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (["--tasks", "T0"], "--tasks T0: expected some of T1"),
        (["--mixers", "mamba"], "--mixers mamba: expected some of "),
        (["--state-bytes", "many"], "--state-bytes many: expected whole numbers"),
        (["--state-bytes", "5"], "has no size of 5 KiB"),
        (["--seeds", "0"], "--seeds 0: expected at least 1"),
        (["--budget", "0"], "--budget 0: expected seconds above 0"),
        (["--shard", "3/2"], "--shard 3/2: expected I/N"),
        (["--preset", "huge"], "invalid choice: 'huge'"),
        (["--model", "nowhere"], "--model nowhere: "),
        (["--real", "--sets", "etth1"], "--sets etth1: expected some of vic_elec"),
        (["--real", "--mixers", "h2,hybrid_3to1"], "takes at least 4 blocks"),
    ],
)
def test_misuse_is_one_line_and_nothing_is_written(tmp_path, capsys, given, text):
    assert main(["bench", "retention", "--out", str(tmp_path / "x"), *given]) == 2
    said = capsys.readouterr().err
    assert text in said
    assert said.count("\n") == 1
    assert not (tmp_path / "x").exists()


# ---- mechanism, references, controls


@pytest.mark.parametrize("mixer", mechanism.LINEAR)
def test_recorded_writes_explain_the_read_and_their_share_is_what_their_absence_takes_away(mixer):
    model = small("T3", mixer).double()
    x = torch.randn(1, 20, 64, dtype=torch.float64)
    with mechanism.recorded() as calls, torch.no_grad():
        model(x)
    assert len(calls) == 2
    for k, e, z, alpha, q, _ in calls:
        read = scores.run_memory(k, e, z, alpha, q[:, :, -1])
        exposure = np.zeros(20, bool)
        exposure[2:6] = True
        without = scores.run_memory(k, e, np.where(exposure[:, None], 0.0, z), alpha, q[:, :, -1])
        share = scores.contribution(k, e, z, alpha, q[:, :, -1], exposure)
        np.testing.assert_allclose(share, read - without, atol=1e-10)
        whole = np.einsum("bht,bhtv->bhv", scores.write_coefficients(k, e, alpha, q[:, :, -1]), z)
        np.testing.assert_allclose(whole, read, atol=1e-10)
        assert np.abs(read).max() > 1e-6


def test_recorded_memories_read_what_the_kernel_reads():
    q, k, v = (torch.randn(1, 9, 2, 4, dtype=torch.float64) for _ in range(3))
    log_decay, beta = -torch.rand(1, 9, 2, dtype=torch.float64), torch.rand(1, 9, 2, dtype=torch.float64)
    memory = mechanism._memory(q, k, v, log_decay=log_decay, beta=beta, norm=True, scale=0.5)
    want, _ = gated_delta_rule(q, k, v, log_decay=log_decay, beta=beta, norm=True, scale=0.5)
    got = scores.run_memory(memory.k, memory.e, memory.z, memory.alpha, memory.q[:, :, -1])
    np.testing.assert_allclose(got, want[:, -1].numpy(), atol=1e-10)


def test_a_probe_tells_losses_that_add_up_to_what_survived():
    told = mechanism.probe(small("T3"), "T3", {}, gap=16, sequences=1)
    assert {"survived", "kept_1", "key_cosine_2", "write_strength_1", "decay_loss", "erase_overlap_2"} <= set(told)
    assert told["decay_loss_1"] < 0
    told = mechanism.probe(small("T3", "gated_linear"), "T3", {}, gap=16, sequences=1)
    assert told["erase_overlap"] == pytest.approx(0, abs=1e-9)
    assert 0 < told["kept_1"] < 1
    told = mechanism.probe(small("T3", "deltanet"), "T3", {}, gap=16, sequences=1)
    assert told["decay_loss"] == pytest.approx(0, abs=1e-9)


def test_a_training_that_diverged_counts_as_the_memoryless_forecast():
    part = {"error": [1.0, 2.0], "base": [4.0, 8.0]}
    cell = {"diverged": False, "scores": {"gaps": {"16": {"rare": part}, "8": {"rare": part}}}}
    assert rows.curve(cell, "rare")[1] == pytest.approx([0.75, 0.75])
    assert rows.curve({**cell, "diverged": True}, "rare")[1] == pytest.approx([0, 0])


def test_references_that_leave_their_bounds_are_counted(tmp_path):
    checks = [references.Check("T2", "filter", 256, "ret_rare", value, 0.9, 1.0) for value in (0.95, 0.5)]
    origin = {key: "" for key in ("commit", "dirty", "date", "hardware", "torch", "triton")}
    lines = rows.of_references(references.stamped(checks, origin, "smoke"))
    report.write(tmp_path / "results.csv", lines)
    back = report.read(tmp_path / "results.csv")
    assert rows.out_of_bounds(back) == 1
    assert "| T2 | filter | 256 | ret_rare | 0.500 | 0.9 | 1 |" in report.render(back)


def test_controls_are_told_with_the_worst_seed_and_their_bound():
    parts = {"rare": {"error": [0.1], "base": [1.0]}}
    group = [{"scores": {"gaps": {"32": parts}}, "controls": {"new_cue": x, "shown": 1 - x}} for x in (0.01, 0.2)]
    low, shown = rows._controls(group)
    assert (low.metric, low.value, low.high) == ("control_new_cue", "0.2", "0.05")
    assert (shown.metric, shown.value, shown.low) == ("control_shown", "0.8", "0.9")


# ---- verdicts and figures, of cells that nobody trained

PLANNED = {"gated_deltanet": 0.9, "gated_linear": 0.5, "mamba2": 0.3, "mamba2_heads": 0.45}


def invented(rng, task, mixer, seed, ret, *, gaps=(32, 128, 512), phase="report", preset=cells.PAPER, **axes):
    """A cell whose Ret is about that number at all gaps, on rare, common and revised probes."""
    unit = cells.Unit(task, mixer, 16 if axes else 4, axes=tuple(sorted(axes.items())))
    cell = cells.Cell(preset, unit, 3e-3, seed, phase)
    base = np.random.default_rng(seed).chisquare(16, 40)
    scores_ = {"error": (base * (1 - ret + 0.02 * rng.standard_normal(40))).tolist(), "base": base.tolist()}
    parts = {"rare": scores_, "common": {"error": (0.1 * base).tolist(), "base": base.tolist()}}
    plain = {
        "T5": {"coefficient_current": 0.8, "coefficient_stale": 0.1},
        "T6": {"cross_talk": 0.1, "cross_talk_own": 0.8, "cross_talk_parked": 0.1, "cross_talk_other": 0.05},
        "T7": {"control_regret": 0.2},
        "T8": {"driver_accuracy": 0.8, "swap_rate": 0.1},
        "T9": {f"error_step_{i}": 1 + 1 / i for i in range(1, 9)}
        | {f"error_gap_decile_{i}": 1.5 for i in range(1, 11)},
    }.get(task)
    if task == "T5":
        parts["revised"] = scores_
    if task in ("T4", "T7", "T8", "T9"):
        del parts["common"]
    if plain:
        parts["plain"] = plain
    origin = {"commit": "0", "dirty": 0, "date": "2026-01-01T00:00:00Z", "hardware": "none", "torch": "", "triton": ""}
    return {
        "id": cell.id,
        "cell": cell.content(),
        "size": {"state_bytes": 12800, "parameters": 1000, "load": axes.get("pairs", 12), "channels": 16},
        "origin": origin,
        "diverged": False,
        "choice": ret,
        "cost": {"train_seconds": 1.0, "replicas": 3},
        "scores": {"gaps": {str(gap): parts for gap in gaps}, "not_finite": 0},
        "controls": {"new_cue": 0.01},
        "latency": {"step_us_1": 100.0},
        "probes": {"survived": ret, "decay_loss": -0.5, "erase_overlap": -0.1},
    }


def family(rng, planned, tasks=("T2", "T3", "T5"), seeds=3):
    return [invented(rng, t, m, s, planned[m]) for t in tasks for m in planned for s in range(seeds)]


def verdicts(lines):
    return {line["mixer"]: (line["value"], line["task"]) for line in lines if line["metric"] == "verdict"}


def test_verdicts_follow_the_rule_and_name_the_better_mamba():
    rng = np.random.default_rng(0)
    lines = rows.rows(family(rng, PLANNED))
    assert verdicts(lines) == {
        "gated_deltanet-gated_linear": ("better", "T2+T3+T5"),
        "gated_deltanet-mamba2": ("better", "T2+T3+T5"),
    }
    primary = {line["mixer"] for line in lines if line["metric"] == "primary_difference"}
    assert primary == {"gated_deltanet-gated_linear", "gated_deltanet-mamba2_heads"}
    alike = rows.rows(family(rng, dict.fromkeys(PLANNED, 0.7)))
    assert {word for word, _ in verdicts(alike).values()} == {"equivalent"}
    other = rows.rows(family(rng, PLANNED | {"gated_deltanet": 0.2}))
    assert verdicts(other)["gated_deltanet-gated_linear"][0] == "worse"
    assert verdicts(rows.rows(family(rng, PLANNED, tasks=("T2",))))["gated_deltanet-mamba2"][0] == "inconclusive"


def test_a_smoke_run_gives_no_verdict():
    rng = np.random.default_rng(0)
    found = [invented(rng, t, m, s, 0.5, preset=TINY) for t in ("T2", "T3") for m in PLANNED for s in range(2)]
    assert verdicts(rows.rows(found)) == {}


@pytest.mark.slow
def test_every_figure_is_drawn_where_it_has_rows_and_none_is_where_it_has_not(tmp_path):
    rng = np.random.default_rng(0)
    found = family(rng, PLANNED, tasks=("T2", "T5", "T2e"), seeds=2)
    for mixer in ("gated_deltanet", "gated_linear", "gated_deltanet2"):
        for seed in range(2):
            given = (rng, "T5", mixer, seed, 0.5)
            found += [invented(*given, similarity=kap, common=load) for kap in (0.6, 0.9) for load in (4, 16)]
            found += [invented(rng, "T4", mixer, seed, 0.5, gaps=(0,), pairs=pairs) for pairs in (4, 16)]
            found += [invented(rng, "T6", mixer, seed, 0.5, channels=channels) for channels in (2, 32)]
            found += [invented(rng, task, mixer, seed, 0.5) for task in ("T6", "T7", "T8", "T9")]
            found[-1]["scores"]["gaps"] = {"8192": found[-1]["scores"]["gaps"]["512"]}
    found += [
        invented(rng, "T2", m, s, 0.5) | {"size": {"state_bytes": 51200, "parameters": 9, "load": 12}}
        for m in PLANNED
        for s in range(2)
    ]
    lines = [{k: str(v) for k, v in line.items()} for line in rows.rows(found)]
    drawn = {path.stem for path in figures.draw(lines, tmp_path)}
    assert drawn == set(figures.FIGURES)
    assert all((tmp_path / f"{name}.{ending}").stat().st_size > 5000 for name in drawn for ending in ("png", "svg"))
    few = [line for line in lines if line["task"] == "T7"]
    assert [path.stem for path in figures.draw(few, tmp_path / "few")] == [
        "f08_effects",
        "f10_mechanism",
        "f12_latency",
    ]
    assert figures.draw([], tmp_path / "none") == []
    assert not (tmp_path / "none").exists()
    text = report.render(lines)
    assert "Table 1. Primary endpoint" in text
    assert "similarity=0.6" in text


# ---- measured series, and the card of a fitted model


def test_returns_are_told_by_how_long_the_regime_was_away():
    active = np.zeros(60, bool)
    active[[2, 3, 4, 10, 11, 40]] = True
    assert real.returns(active, most=2) == [(2, 2, -1), (10, 2, 5), (40, 1, 28)]
    assert real.returns(np.zeros(5, bool), most=2) == []
    assert [real.bin_of(away, 24) for away in (-1, 1, 7 * 24 - 1, 7 * 24, 100 * 24)] == [-1, 0, 0, 7, 90]
    error = np.ones(60)
    error[10:12], error[40], error[0] = 3.0, 2.0, np.nan
    assert real.by_time_away(error, active, first=5, day=4) == {0: (3.0, 1), 7: (2.0, 1)}


def test_a_holiday_is_a_local_day():
    days = real._local_days(
        Series("a", np.datetime64("2014-12-31T13:00"), "h", np.zeros((1, 25))), "Australia/Melbourne"
    )
    assert days[0] == np.datetime64("2015-01-01")
    assert days[24] == np.datetime64("2015-01-02")
    assert len(np.unique(np.array(real.MELBOURNE.split(), "M8[D]"))) == 28


@pytest.mark.data
def test_the_measured_sets_have_regimes_that_return_after_the_fitted_part(data_root):
    for name in real.SETS:
        found = real.marked(name)
        late = [r for one in found for r in real.returns(one.active, most=one.day) if r.start > 0.6 * len(one.series)]
        assert len(late) >= 5
        assert all(0 < one.active.mean() < 0.5 for one in found)


@pytest.mark.slow
def test_measured_series_are_fitted_and_reported(tmp_path, monkeypatch):
    t = np.arange(720)
    values = 10 + np.sin(2 * np.pi * t / 24) + 0.1 * np.random.default_rng(0).standard_normal(720)
    active = (t // 24) % 7 == 3
    series = Series("a", np.datetime64("2020-01-01"), "h", np.where(active, values + 3, values)[None])
    monkeypatch.setattr(real, "marked", lambda name: [real.Marked(series, active, 24)])
    monkeypatch.setattr(real, "SETS", ("made_up",))
    command = ["bench", "retention", "--real", "--mixers", "gated_deltanet", "--epochs", "1", "--out", str(tmp_path)]
    assert main(command) == 0
    lines = report.read(tmp_path / "results.csv")
    assert [(line["task"], line["metric"], line["gap"], line["n"]) for line in lines] == [
        ("made_up", "return_error", "0", "1")
    ]
    assert float(lines[0]["value"]) > 0
    text = (tmp_path / "report.md").read_text()
    assert "| made_up | gated_deltanet |" in text
    assert report.render(lines) == text
    assert main([*command, "--budget", "1"]) == 0  # nothing is left to do


def test_a_twin_differs_in_the_rare_visits_alone():
    asked = card.streams(3, steps=512)
    assert len(asked) == 3
    for one in asked:
        assert len(one.stream) == len(one.twin) == one.at + card.SCORED
        apart = np.abs(one.stream - one.twin).max(1)
        assert apart[0] < 1e-5
        assert apart.max() > 0.1  # the rare law ruled before
        assert one.away > 0
        # Until its first rare visit the twin is the stream, and the noise is the same: they meet again.
        assert apart[one.at - 1] < apart.max()


class Knowing:
    """Forecasts the streams' own continuation, and nothing for twins."""

    calls = 0

    def __init__(self):
        self.model = SimpleNamespace(patch_size=8, config={"known_features": 2, "patches_ahead": 1})

    def forecast_origins(self, series, horizon, levels, *, first):
        origins = np.arange(8, len(series) + 1, 8)
        origins = origins[(origins >= first) & (origins < len(series))]
        whole = np.pad(series.values[0], (0, 8))
        twin = Knowing.calls // 4 % 2
        Knowing.calls += 1
        return origins, np.stack([whole[o : o + 8][None, :, None] * (1 - twin) for o in origins])


def test_a_card_tells_what_was_kept(monkeypatch):
    monkeypatch.setattr(card, "STEPS", 512)
    drawn = card.streams
    monkeypatch.setattr(card, "streams", lambda count, seed: drawn(count, seed=seed, steps=512))
    found = card.measure(Knowing(), count=4)
    assert found["error"] == [0, 0, 0]
    assert found["twin"] == [1, 1, 1]
    assert found["kept"][0] == pytest.approx(1)
    assert sum(n for *_, n in found["by_away"]) == 4
    text = card.render(found)
    assert "keeps something of it" in text
    assert "| kept (twin minus own) | 1.000" in text


def test_a_fitted_model_gets_its_card_at_the_command_line(tmp_path, monkeypatch, capsys):
    model = Forecaster(patch_size=8, patches_ahead=1, seasons=[1], width=16, depth=1, mixer_args={"key_dim": 8})
    save(model, tmp_path / "model", series={"freq": "h", "horizon": 8})
    drawn = card.streams
    monkeypatch.setattr(card, "streams", lambda count, seed: drawn(2, seed=seed, steps=512))
    assert main(["bench", "retention", "--model", str(tmp_path / "model"), "--out", str(tmp_path / "out")]) == 0
    path = tmp_path / "out" / "retention_card.md"
    assert capsys.readouterr().out.strip() == str(path)
    assert path.read_text().startswith("# Retention card")
