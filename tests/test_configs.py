"""Every shipped configuration parses, builds with either mixer and trains a step; misuse is told in one line."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from tsgdn.cli.main import Misuse
from tsgdn.cli.main import main as tsgdn
from tsgdn.cli.train import main, presets
from tsgdn.data import catalog
from tsgdn.data.module import find_task, resolve
from tsgdn.model.artefact import load, read_series_info
from tsgdn.model.forecaster import Forecaster

NAMES = ("default", "demo", "etth1", "exchange_rate_nips", "m4_hourly", "us_births")
TINY = (
    *("--data.batch_size", "2", "--data.window_patches", "8", "--data.steps_per_epoch", "2"),
    *("--model.model.width", "16", "--model.model.depth", "1", "--trainer.accelerator", "cpu"),
    *("--trainer.enable_progress_bar", "false"),
)


def run(command: str, *options: str) -> int:
    return main([command, *TINY, *options])


def parsed(capsys: pytest.CaptureFixture[str], *options: str) -> dict:
    with pytest.raises(SystemExit) as stopped:
        main(["fit", *options, "--print_config"])
    assert stopped.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


def resolved(dataset: str) -> dict:
    shape = resolve(dataset)
    return {key: shape[key] for key in ("patch_size", "patches_ahead", "seasons", "known_features")}


def test_these_presets_are_shipped() -> None:
    assert tuple(presets()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_sets_what_it_says_and_the_data_set_the_rest(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = yaml.safe_load(presets()[name].read_text())
    config = parsed(capsys, "--config", name)
    assert config["data"]["dataset"] == given["data"]["dataset"]
    assert config["trainer"]["default_root_dir"] == f"runs/{name}"
    for key, value in given["model"]["model"].items():
        assert config["model"]["model"][key] == value
    sizes = []
    for mixer in ("gated_deltanet", "mamba2"):
        model = Forecaster(**(config["model"]["model"] | resolved(config["data"]["dataset"]) | {"mixer": mixer}))
        sizes.append(sum(p.numel() for p in model.parameters()))
    assert abs(sizes[0] / sizes[1] - 1) < 0.05  # matched, so that the two can be compared
    assert {"AveragedWeights", "EarlyStopping", "ModelCheckpoint"} == {
        c["class_path"].rsplit(".", 1)[1] for c in config["trainer"]["callbacks"]
    }


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_trains_on_its_own_data_set_where_that_is_here(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        catalog.load(find_task(name if name in catalog.names() else "simulated").dataset)
        dataset = () if name in catalog.names() else ("--data.dataset", "simulated")
    except catalog.DataNotFound:
        dataset = ("--data.dataset", "simulated")
    assert run("fit", "--config", name, *dataset, "--trainer.fast_dev_run", "true") == 0
    folder = Path("runs") / name / "export"
    model, info = load(folder), read_series_info(folder)
    shape = resolve(info["dataset"])
    assert info["dataset"] == (dataset[1] if dataset else name)
    assert model.config["patch_size"] == shape["patch_size"]
    assert list(model.seasons) == shape["seasons"]
    assert model.known_features == shape["known_features"]
    assert model.direct_steps >= shape["horizon"] == info["horizon"]


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("etth1", (8, 3, [1, 24, 168])),
        ("us_births", (8, 4, [1, 7, 364])),
        ("m4_hourly", (8, 6, [1, 24, 168])),
        ("exchange_rate_nips", (8, 4, [1, 5])),
    ],
)
def test_sizes_follow_from_frequency_and_horizon(name: str, want: tuple) -> None:
    found = resolve(name)
    assert (found["patch_size"], found["patches_ahead"], found["seasons"]) == want
    assert resolve(name, horizon=1000)["patches_ahead"] * found["patch_size"] == 64
    assert resolve(name, patch_size=2, patches_ahead=5, seasons=[1])["patches_ahead"] == 5


def test_a_run_leaves_a_log_checkpoints_and_a_model_and_keeps_stdout_for_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("fit", "--config", "demo", "--trainer.max_epochs", "1", "--data.seasons", "[1, 24]") == 0
    said = capsys.readouterr()
    assert said.out == ""
    assert "runs/demo/export" in said.err
    version = Path("runs/demo/version_0")
    assert "val_loss" in (version / "metrics.csv").read_text()
    checkpoint = version / "checkpoints" / "last.ckpt"
    exported = load("runs/demo/export").state_dict()
    saved = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert all(torch.equal(value, saved[f"model.{name}"]) for name, value in exported.items())

    # the configuration lies beside the checkpoint and is found there
    for command in ("validate", "test"):
        assert main([command, "--ckpt_path", str(checkpoint), "--trainer.enable_progress_bar", "false"]) == 0
    capsys.readouterr()
    assert main(["predict", "--ckpt_path", str(checkpoint), "--trainer.limit_predict_batches", "1"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 2
    quantiles = lines[0]["quantiles"]
    assert len(quantiles["0.5"]) == 24
    assert all(low <= high for low, high in zip(quantiles["0.1"], quantiles["0.9"], strict=True))

    assert tsgdn(["export", str(checkpoint), "--output", "again"]) == 0
    assert all(torch.equal(value, exported[name]) for name, value in load("again").state_dict().items())
    assert tsgdn(["verify", "--model", "again", "--steps", "40", "--series", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["ok"]

    config, written = str(version / "config.yaml"), sorted(tmp_path.rglob("*"))
    for command in ("fit", "test"):
        with pytest.raises(Misuse, match="differs from the configured one in width"):
            main([command, "--config", config, "--ckpt_path", str(checkpoint), "--model.model.width", "8"])
    for command, path in (("predict", config), ("fit", config), ("test", "y.ckpt")):
        with pytest.raises(Misuse, match=f"{path}"):
            main([command, "--config", config, "--ckpt_path", path])
    assert sorted(tmp_path.rglob("*")) == written


@pytest.mark.parametrize("options", [(), ("--ckpt_path", "best")])
@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_a_model_that_nobody_fitted_is_not_scored(
    command: str, options: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Misuse, match=f"`tsgdn {command}` needs --ckpt_path FILE"):
        run(command, *options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--config", "ettth1"], "presets are default"),
        (["--data.dataset", "etth2"], "did you mean etth1"),
        (["--model.model.widht", "8"], "did you mean --model.model.width"),
        (["--model.model.width", "wide"], "model.model.width"),
        (["--model.model.mixer", "gated_deltanets"], "gated_deltanet"),
        (["--trainer.accelerator", "mps"], "MPSAccelerator"),
        (["--trainer.max_epochs", "-1"], "give --trainer.max_epochs"),
        (["--data.targets", "2"], "targets is 2"),
        (["--data.horizon", "0"], "horizon is 0, expected at least 1"),
        (["--data.batch_size", "0"], "batch_size is 0, expected at least 1"),
        (["--model.loss_tokens", "0"], "loss_tokens is 0"),
        (["--data.validation_windows", "0"], "EarlyStopping and ModelCheckpoint watch val_loss"),
    ],
)
def test_misuse_is_one_line_and_nothing_is_written(
    options: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Misuse) as raised:
        main(["fit", *options])
    assert told in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_missing_data_says_where_it_was_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TSGDN_DATA", str(tmp_path))
    with pytest.raises(Misuse, match="tsgdn data get us_births"):
        main(["fit", "--config", "us_births"])
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    path.write_text("hello")
    assert tsgdn(["export", str(path), "--output", str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()
