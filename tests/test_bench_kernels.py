"""The kernel benchmark: floors, inputs, what is right, what is written, and what it says on the command line."""

import csv
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from tsgdn.bench import kernels, record
from tsgdn.cli.main import main

KEYS = ("shape", "contestant", "direction", "norm")


def rows(path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def bench(path, *options) -> int:
    return main(["bench", "kernels", "--device", "cpu", "--results", str(path), *options])


class Broken(kernels.OursTorch):
    """Runs the rule with one thing wrong."""

    name = "broken"

    def __init__(self, spoil):
        self.spoil = spoil

    def prepare(self, case, direction):
        task = super().prepare(case, direction)
        return replace(task, call=lambda i: self.spoil(task.call(i)))


@pytest.mark.parametrize(
    ("name", "forward", "both"),
    [
        ("S1", 96, 256),
        ("S2", 95, 262),
        ("S3", 63, 175),
        ("S4", 189, 611),
        ("S5", 127, 349),
        ("S6", 503, 1876),
        ("S7", 63, 235),
        ("S7_256", 100, 404),
        ("S8_131k_128", 252, 938),
    ],
)
def test_floors_are_those_of_bytes_and_operations_counted_by_hand(name, forward, both):
    shape = kernels.SHAPES[name]
    assert kernels.floor_us(shape, "fwd") == pytest.approx(forward, rel=0.01)
    assert kernels.floor_us(shape, "fwd+bwd") == pytest.approx(both, rel=0.01)


@pytest.mark.parametrize(
    ("name", "us"), [("D_64x64_B64", 4), ("D_64x64_B1024", 62), ("D_64x64_B16384", 1000), ("D_128x128_B4096", 1000)]
)
def test_the_floor_of_a_step_is_its_state_read_and_written(name, us):
    assert kernels.floor_us(kernels.SHAPES[name], "step") == pytest.approx(us, rel=0.04)


def test_a_layer_has_a_higher_floor_than_its_op_and_a_slower_memory_a_higher_one_still():
    shape = kernels.SHAPES["S3"]
    assert kernels.floor_us(shape, "layer") == pytest.approx(512 * 128 * 8 * 648 / 4.3e12 * 1e6)
    assert kernels.floor_us(shape, "layer+bwd") > kernels.floor_us(shape, "fwd+bwd")
    assert kernels.floor_us(shape, "fwd", bandwidth=2.15e12) == pytest.approx(2 * kernels.floor_us(shape, "fwd"))


def test_a_name_is_a_shape_or_the_group_it_begins():
    assert [shape.name for shape in kernels.named("S7")] == ["S7", "S7_256"]
    assert [shape.name for shape in kernels.named("S1")] == ["S1"]
    assert {shape.tokens for shape in kernels.named("S8")} == {16384, 131072, 262144}
    assert len(kernels.named("D")) == 15
    assert kernels.named("S") == []
    assert kernels.SHAPES["S10"].rows * kernels.SHAPES["S10"].heads > 65535


def test_packed_rows_are_as_long_as_they_are_said_to_be():
    shape = kernels.SHAPES["S9"]._replace(rows=50, heads=2, key_dim=4, value_dim=4)
    case = kernels.draw(shape, "fwd", "none", "cpu", torch.float32, 0)
    assert case.ends is not None
    lengths = case.ends.diff()
    assert len(lengths) == 50
    assert int(lengths.min()) >= 24
    assert int(lengths.max()) <= 336
    assert case.x["q"].shape == (1, int(lengths.sum()), 2, 4)
    assert kernels.token_heads(shape) == 2 * int(lengths.sum())


def test_inputs_are_the_same_for_a_seed_and_keys_have_length_one_where_no_norm_is_inside():
    shape = kernels.SHAPES["S3"].small()
    one, again, other = (kernels.draw(shape, "fwd", "none", "cpu", torch.float32, seed) for seed in (0, 0, 1))
    assert torch.equal(one.x["k"], again.x["k"])
    assert not torch.equal(one.x["k"], other.x["k"])
    assert torch.allclose(one.x["k"].square().sum(-1), torch.ones(()))
    raw = kernels.draw(shape, "fwd", "qk", "cpu", torch.float32, 0)
    assert not torch.allclose(raw.x["k"].square().sum(-1), torch.ones(()), atol=0.1)


def test_steps_have_one_token_and_layers_are_not_asked_of_streams_and_packed_rows():
    asked = {
        (n, d) for n, shape in kernels.SHAPES.items() for d in kernels.DIRECTIONS if kernels.applies(shape, d, "qk")
    }
    assert {d for n, d in asked if n.startswith("D")} == {"step"}
    assert {d for n, d in asked if n.startswith(("S8", "S9", "S10"))} == {"fwd", "fwd+bwd"}
    assert ("S3", "layer+bwd") in asked
    assert not kernels.applies(kernels.SHAPES["S3"], "layer", "none")


def test_contestants_say_what_they_can_do():
    can = {
        name: {n for n, shape in kernels.SHAPES.items() if c.supports(shape, "fwd", "none", "cuda")}
        for name, c in kernels.CONTESTANTS.items()
    }
    assert can["flash_qla"] == {"S6", "S7", "S8_16k_128", "S8_131k_128", "S8_262k_128"}
    assert "S9" in can["fla"] & can["mamba2"] & can["tsgdn"]
    assert "S9" not in can["sdpa"] | can["torch"]
    assert {"S7", "S8_16k_64"} <= can["tsgdn_segments"]
    assert "S3" not in can["tsgdn_segments"]
    assert not can["tsgdn_pool"]
    step = kernels.SHAPES["D_64x64_B1"]
    assert {n for n, c in kernels.CONTESTANTS.items() if c.supports(step, "step", "qk", "cuda")} == {
        "tsgdn", "tsgdn_pool", "fla",
    }  # fmt: skip
    shape = kernels.SHAPES["S3"]
    assert {n for n, c in kernels.CONTESTANTS.items() if c.supports(shape, "fwd", "qk", "cpu")} == {"tsgdn", "torch"}


def test_a_small_run_writes_a_row_for_everything_it_measured(tmp_path, capsys):
    path = tmp_path / "results.csv"
    assert bench(path, "--shapes", "S3", "--contestants", "tsgdn,torch", "--directions", "fwd,fwd+bwd") == 0
    written = rows(path)
    assert tuple(written[0]) == (*record.COLUMNS, *KEYS)
    for contestant in ("tsgdn", "torch"):
        for direction in ("fwd", "fwd+bwd"):
            for norm in ("none", "qk"):
                cell = [line for line in written if [line[k] for k in KEYS] == ["S3", contestant, direction, norm]]
                assert [line["metric"] for line in cell] == ["error", "first_call_s", "us"]
                assert float(cell[0]["value"]) < 1e-5
                assert float(cell[2]["p20"]) <= float(cell[2]["value"]) <= float(cell[2]["p80"])
                assert cell[2]["config"] == "B2 T20 H2 8/8"
    assert len(written) == 3 * 8
    said = capsys.readouterr()
    assert said.out == ""
    assert "S3 torch fwd+bwd qk: right" in said.err

    assert bench(path, "--shapes", "S3", "--contestants", "tsgdn,torch", "--norms", "qk", "--resume") == 0
    assert {line["direction"] for line in rows(path)[24:]} == {"layer", "layer+bwd"}

    assert main(["bench", "kernels", "--report", "--results", str(path)]) == 0
    said = capsys.readouterr()
    assert said.out.splitlines()[0].split()[:4] == ["shape", "direction", "norm", "ours"]
    assert len(said.out.splitlines()) == 5
    pictures = [tmp_path / f"speedup_{d}_{n}.png" for d in ("fwd", "fwd_bwd") for n in kernels.NORMS]
    assert all(picture.stat().st_size > 1000 and str(picture) in said.err for picture in pictures)


def test_what_is_not_installed_is_said_and_left_out(tmp_path, capsys, monkeypatch):
    found = kernels.find_spec
    monkeypatch.setattr(kernels, "find_spec", lambda name: None if name in ("fla", "mamba_ssm") else found(name))
    path = tmp_path / "results.csv"
    options = ("--shapes", "S0", "--contestants", "fla,torch,mamba2", "--directions", "fwd", "--norms", "none")
    assert bench(path, *options) == 0
    assert {line["contestant"] for line in rows(path)} == {"torch"}
    assert "not installed: fla, mamba2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (lambda y: 1.05 * y, "wrong"),
        (lambda y: torch.where(y > 0, torch.nan, y), "wrong"),
        (lambda y: y.no_such_thing, "failed"),
    ],
)
def test_a_result_that_is_wrong_or_missing_gets_a_word_and_no_time(tmp_path, monkeypatch, spoil, word):
    monkeypatch.setitem(kernels.CONTESTANTS, "broken", Broken(spoil))
    path = tmp_path / "results.csv"
    for direction in ("fwd", "fwd+bwd"):
        options = ("--directions", direction, "--norms", "none", "--contestants", "broken,torch")
        assert bench(path, "--shapes", "S3", *options) == 1
    values = {(line["contestant"], line["direction"]): line["value"] for line in rows(path) if line["metric"] == "us"}
    assert values["broken", "fwd"] == values["broken", "fwd+bwd"] == word
    assert float(values["torch", "fwd"]) > 0
    before = len(rows(path))
    assert bench(path, "--shapes", "S3", *options, "--resume") == 0
    assert len(rows(path)) == before


def test_ratios_divide_the_last_times_of_each_cell_by_ours():
    def line(contestant, value, metric="us", shape="S3", hardware="GPU"):
        cell = {"shape": shape, "direction": "fwd", "norm": "qk", "hardware": hardware}
        return {**cell, "contestant": contestant, "metric": metric, "value": value}

    lines = [
        line("tsgdn", "400"), line("fla", "900"), line("tsgdn", "100"), line("floor", "50", "floor_us"),
        line("mamba2", "wrong"), line("fla", "7", "first_call_s"), line("fla", "1", shape="S4"),
        line("tsgdn", "1", hardware="CPU"),
    ]  # fmt: skip
    found = {r["contestant"]: (r["us"], r["ours_us"], r["ratio"]) for r in kernels.ratios(lines)}
    assert found == {"fla": (900.0, 100.0, 9.0), "floor": (50.0, 100.0, 0.5), "mamba2": ("wrong", 100.0, None)}
    assert kernels.ratios(lines, "tsgdn_ssd") == []


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--shapes", "S3,S77"], "--shapes S77: expected some of S0, S1"),
        (["--contestants", "fls"], "--contestants fls: expected some of tsgdn"),
        (["--directions", "bwd"], "--directions bwd: expected some of fwd, fwd+bwd"),
        (["--norms", "l2"], "--norms l2: expected some of none, qk"),
        (["--report"], "no times of tsgdn and another contestant"),
        (["--tasks", "etth1"], "--tasks"),
    ],
)
def test_unknown_names_are_misuse_told_in_one_line(tmp_path, capsys, options, text):
    assert bench(tmp_path / "none.csv", *options) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert text in said.err
    assert not (tmp_path / "none.csv").exists()


def test_without_a_gpu_it_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "kernels", "--results", str(tmp_path / "r.csv")]) == 2
    assert capsys.readouterr().err.startswith("tsgdn bench: there is no CUDA device to measure on; --device cpu")


def test_it_runs_with_torch_and_jaxtyping_alone(tmp_path):
    blocked = ("gluonts", "lightning", "jsonargparse", "orjson", "polars", "pandas", "beartype", "narwhals", "yaml")
    code = (
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {blocked!r}:\n"
        "            raise ModuleNotFoundError(name, name=name)\n"
        "sys.meta_path.insert(0, Block())\n"
        "from tsgdn.cli.main import main\n"
        f"sys.exit(main(['bench', 'kernels', '--device', 'cpu', '--shapes', 'S3', '--contestants', 'torch',"
        f" '--directions', 'fwd', '--norms', 'none', '--results', {str(tmp_path / 'r.csv')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert [line["metric"] for line in rows(tmp_path / "r.csv")] == ["error", "first_call_s", "us"]


@pytest.mark.parametrize(
    ("told", "commit", "dirty"),
    [("0123456789abcdef", "0123456789ab", 0), ("0123456+", "0123456", 1), ("", "unknown", "unknown")],
)
def test_without_a_repository_the_environment_names_the_commit(monkeypatch, told, commit, dirty):
    monkeypatch.setattr(record, "_git", lambda *_: None)
    monkeypatch.setenv("TSGDN_COMMIT", told)
    found = record.provenance()
    assert (found["commit"], found["dirty"]) == (commit, dirty)


def test_the_environment_counts_more_than_a_repository_that_the_code_may_merely_lie_in(monkeypatch):
    monkeypatch.setattr(record, "_git", lambda *arguments: "f" * 40 if arguments[0] == "rev-parse" else "")
    monkeypatch.setenv("TSGDN_COMMIT", "0123456+")
    found = record.provenance()
    assert (found["commit"], found["dirty"]) == ("0123456", 1)
    monkeypatch.delenv("TSGDN_COMMIT")
    found = record.provenance()
    assert (found["commit"], found["dirty"]) == ("f" * 12, 0)
