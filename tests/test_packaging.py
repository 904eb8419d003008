"""What is installed: ten names, no more than declared, and everything a wheel must carry."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import tsgdn
from tsgdn.model.artefact import save

ROOT = Path(__file__).parents[1]


def test_ten_names_are_public_and_each_is_found():
    assert len(tsgdn.__all__) == 10
    for name in tsgdn.__all__:
        assert getattr(tsgdn, name) is not None
        assert name in dir(tsgdn)


def test_an_unknown_name_says_what_there_is():
    with pytest.raises(AttributeError, match="public are Forecaster"):
        _ = tsgdn.Forecastr  # pyright: ignore


def test_importing_the_package_imports_nothing_else():
    code = "import sys, tsgdn; print(sorted(n for n in sys.modules if n.split('.')[0] in ('torch', 'numpy', 'pandas')))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_model_and_stream_load_without_lightning_gluonts_pandas_or_triton():
    blocked = ("lightning", "gluonts", "pandas", "sklearn", "triton", "matplotlib", "polars")
    code = (
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {blocked!r}:\n"
        "            raise ModuleNotFoundError(name, name=name)\n"
        "sys.meta_path.insert(0, Block())\n"
        "import tsgdn\n"
        "tsgdn.Forecaster, tsgdn.StatefulPredictor, tsgdn.Batch\n"
        "print('loaded')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "loaded\n", done.stderr


def test_every_pin_is_exact_and_within_what_the_project_declares():
    import tomllib

    from packaging.requirements import Requirement

    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            assert re.fullmatch(r"[a-z0-9._-]+==[0-9][0-9a-z.]*", line), line
            name, version = line.split("==")
            pins[re.sub(r"[-_.]+", "-", name)] = version
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [r for group in project["optional-dependencies"].values() for r in group if not r.startswith("tsgdn")]
    for text in project["dependencies"] + extras:
        requirement = Requirement(text)
        assert requirement.specifier.contains(pins[requirement.name.lower()]), requirement
    assert pins["torch"] == "2.13.0"
    assert pins["triton"] == "3.7.1"


def test_a_wheel_carries_the_catalogue_the_presets_and_the_embedded_set(tmp_path):
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert "tsgdn/data/catalog.yaml" in names
    assert "tsgdn/configs/default.yaml" in names
    assert any(re.match(r"tsgdn/data/embedded/.+\.csv", name) for name in names)
    assert "tsgdn/py.typed" in names
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "tsgdn").rglob("*.py")}
    assert sources <= names
    outside = {name.split("/")[0] for name in names} - {"tsgdn"}
    assert all(name.endswith(".dist-info") for name in outside), outside


def test_the_code_in_the_readme_runs(tmp_path, monkeypatch, capsys):
    """It streams through a model folder that `tsgdn demo` would have written; here an untrained one stands there."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks, "README.md shows no Python"
    monkeypatch.chdir(tmp_path)
    model = tsgdn.Forecaster(patches_ahead=3, seasons=(1, 24), width=16, depth=1)
    save(model, tmp_path / "runs/demo/model", series={"freq": "h", "calendar": False, "horizon": 24})
    for block in blocks:
        assert len(block.splitlines()) <= 13, "the first screen promises a dozen lines"
        exec(compile(block, "README.md", "exec"), {})
    assert (tmp_path / "states").is_dir()
    assert len(capsys.readouterr().out.split()) > 24


def test_no_text_of_the_project_speaks_of_a_place_on_one_machine():
    pattern = re.compile(r"/(?:home|root|Users|work)/[A-Za-z0-9_.-]+")
    for folder, kinds in (("tsgdn", ("*.py", "*.yaml")), ("docs", ("*.md",)), (".", ("*.md", "Makefile", "*.toml"))):
        for kind in kinds:
            files = (ROOT / folder).glob(kind) if folder == "." else (ROOT / folder).rglob(kind)
            for path in files:
                assert not pattern.search(path.read_text()), path
