"""The certificate of parity finds what breaks the law, says where, and lies beside the weights."""

import json

import numpy as np
import pytest
import torch

from tsgdn.cli.main import main
from tsgdn.model import artefact
from tsgdn.model.forecaster import Forecaster
from tsgdn.streaming import certificate
from tsgdn.streaming.certificate import certify
from tsgdn.streaming.predictor import StatefulPredictor

KIND = {"freq": "h", "calendar": False}


def make_model(**settings) -> Forecaster:
    torch.manual_seed(0)
    model = Forecaster(4, 2, (1, 6), width=16, depth=2, mixer_args={"heads": 2, "key_dim": 4}, **settings).eval()
    with torch.no_grad():  # the head starts near persistence; make every path matter
        for parameter in model.head.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({}, KIND),
        ({"static_cardinalities": (3,), "known_features": 2}, {**KIND, "variates": ("a", "b", "c"), "targets": 1}),
        ({"mixer": "mamba2", "mixer_args": {}, "variate_every": 0}, {"freq": "ME", "calendar": False}),
    ],
)
def test_a_sound_model_is_certified(settings, kind):
    told = []
    model = make_model(**settings) if "mixer" not in settings else Forecaster(4, 2, (1, 6), 0, (), 16, 2, **settings)
    found = certify(model.eval(), progress=told.append, **kind)
    assert found.ok, [check for check in found.checks if not check.ok]
    assert {(check.part, check.dtype) for check in found.checks} == {
        *((part, dtype) for part in ("cuts", "silence", "predictor", "warm-up") for dtype in ("float64", "float32")),
        ("copies", "float32"),
    }
    assert len(told) == len(found.checks) + 1
    assert all(check.worst for check in found.checks)
    assert found.fingerprint == artefact.fingerprint(model)
    again = json.loads(found.to_json())
    assert again["ok"]
    assert again["checks"][0]["bound"] == 1e-12


def test_a_model_whose_state_forgets_breaks_its_certificate(monkeypatch):
    model = make_model()
    advance = Forecaster._advance

    def forgetful(self, batch, state, *args, **more):
        quantiles, state = advance(self, batch, state, *args, **more)
        return quantiles, state._replace(
            seasonal=type(state.seasonal)(*(torch.zeros_like(leaf) for leaf in state.seasonal))
        )

    monkeypatch.setattr(Forecaster, "_advance", forgetful)
    found = certify(model, **KIND)
    assert not found.ok
    (broken, *_) = (check for check in found.checks if not check.ok)
    assert broken.part == "cuts"
    assert "cut by" in broken.worst


def test_numbers_that_are_none_are_a_breach(monkeypatch):
    model = make_model()
    forecast = Forecaster.forecast
    monkeypatch.setattr(Forecaster, "forecast", lambda *args, **more: forecast(*args, **more) * np.nan)
    found = certify(model, **KIND)
    assert {check.part for check in found.checks if not check.ok} >= {"predictor"}


def test_the_command_tries_a_folder_and_writes_the_certificate(tmp_path, capsys):
    series = {"freq": "h", "calendar": False, "variates": ["target"], "horizon": 8}
    artefact.save(make_model(), tmp_path / "m", series=series)
    assert main(["verify", "--model", str(tmp_path / "m"), "--device", "cpu", "--write"]) == 0
    said = capsys.readouterr()
    assert said.out.count(" ok\n") == 9
    assert json.loads((tmp_path / "m" / certificate.FILE).read_text())["ok"]
    assert main(["verify", "--model", str(tmp_path / "m"), "--device", "cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bucket"] == {"cpu": 16}
    assert main(["verify", "--model", str(tmp_path / "nothing")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_command_exits_with_1_and_names_what_is_broken(tmp_path, capsys, monkeypatch):
    series = {"freq": "h", "calendar": False, "variates": ["target"], "horizon": 8}
    artefact.save(make_model(), tmp_path / "m", series=series)
    monkeypatch.setitem(certificate.BOUNDS, "float64", 1e-30)
    assert main(["verify", "--model", str(tmp_path / "m"), "--device", "cpu"]) == 1
    said = capsys.readouterr()
    assert "BROKEN" in said.out
    assert "cuts, float64 on cpu" in said.err
    assert "the worst is" in said.err


def test_a_certificate_is_read_with_its_model(tmp_path):
    series = {"freq": "h", "calendar": False, "variates": ["target"], "horizon": 8}
    model = make_model()
    folder = artefact.save(model, tmp_path / "m", series=series)
    found = certify(model, **KIND)
    path = certificate.write(found, folder)
    assert StatefulPredictor.from_pretrained(folder, device="cpu").horizon == 8
    with pytest.warns(UserWarning, match="says nothing of meta"):
        certificate.check(folder, model, "meta")
    broken = found._replace(checks=(found.checks[0]._replace(error=1.0), *found.checks[1:]))
    certificate.write(broken, folder)
    with pytest.warns(UserWarning, match="differ from one pass on cpu"):
        StatefulPredictor.from_pretrained(folder, device="cpu")
    certificate.write(found._replace(fingerprint="0" * 32), folder)
    with pytest.raises(ValueError, match="another model; run `tsgdn verify"):
        StatefulPredictor.from_pretrained(folder, device="cpu")
    path.write_text("[]")
    with pytest.raises(ValueError, match="no certificate"):
        StatefulPredictor.from_pretrained(folder, device="cpu")
    assert main(["verify", "--model", str(folder), "--device", "cpu", "--write"]) == 0  # the remedy that was named
    assert StatefulPredictor.from_pretrained(folder, device="cpu").horizon == 8


def test_a_folder_that_says_no_frequency_is_told_so(tmp_path, capsys):
    folder = artefact.save(make_model(), tmp_path / "m")
    assert main(["verify", "--model", str(folder), "--device", "cpu"]) == 2
    assert "what frequency" in capsys.readouterr().err
