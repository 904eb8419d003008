"""The whole path once, on a small scale: fit, evaluate, stream, compare, draw."""

import json

import pytest

from tsgdn.cli.main import main


def test_the_demo_runs_without_data_and_its_stream_equals_its_batch(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("TSGDN_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--epochs", "1", "--json", "--out", "out"]) == 0
    said = capsys.readouterr()
    summary = json.loads(said.out)
    assert summary["scores"]["model"]["wql"] < summary["scores"]["seasonal_naive"]["wql"]
    assert 0 < summary["stream"]["parity_error"] < summary["stream"]["parity_bound"]
    assert summary["stream"]["forecasts"] == summary["stream"]["observations"] > 1000
    assert 0.5 < summary["stream"]["coverage"] <= 1
    for path in summary["wrote"]:
        assert (tmp_path / path).exists(), path
    picture = next(tmp_path / path for path in summary["wrote"] if path.endswith(".png"))
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 30_000


@pytest.mark.parametrize("option", [["--dataset", "etth9"], ["--epochs", "0"], ["--epochs", "many"]], ids=str)
def test_a_wrong_option_is_one_line_and_exit_code_2(option, capsys):
    assert main(["demo", *option]) == 2
    said = capsys.readouterr()
    assert said.out == "" and len(said.err.strip().splitlines()) == 1
