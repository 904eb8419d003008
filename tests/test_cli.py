"""The command line: quick, one line per complaint, data alone on stdout."""

import argparse
import json
import os
import subprocess
import sys
import types

import pytest

from tsgdn import __version__
from tsgdn.cli import main as cli

HEAVY = ("torch", "pandas", "lightning", "gluonts", "numpy", "jsonargparse", "pyarrow", "yaml")


def run(*argv: str, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "tsgdn", *argv], capture_output=True, text=True, timeout=200, **kwargs)


@pytest.fixture
def command(monkeypatch):
    """Puts a command of the test's own into the table: `command(run, add_arguments)`."""

    def put(run, add_arguments=lambda parser: None):
        module = types.ModuleType("made_up_command")
        module.run, module.add_arguments = run, add_arguments
        monkeypatch.setitem(sys.modules, "made_up_command", module)
        monkeypatch.setitem(cli.COMMANDS, "made-up", cli.Command("Test", "made_up_command", "a command of the test"))

    return put


@pytest.mark.parametrize("argv", [["--help"], ["--version"], ["help"], []])
def test_help_imports_no_heavy_package(argv):
    code = (
        "import sys\nfrom tsgdn.cli.main import main\n"
        f"main({argv!r})\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stderr.splitlines()[-1] == "[]"


def test_help_names_every_command_and_aligns_them(capsys):
    assert cli.main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    entries = [line for line in lines if line.startswith("  ")]
    assert [line.split()[0] for line in entries] == [*cli.COMMANDS, "--help", "--version"]
    starts = {len(line) - len(line[2:].split(None, 1)[1]) for line in entries}
    assert len(starts) == 1
    assert max(map(len, lines)) <= 80


def test_version_is_that_of_the_package(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"tsgdn {__version__}\n"


def test_no_command_is_misuse_and_leaves_stdout_clean(capsys):
    assert cli.main([]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "usage: tsgdn" in err


@pytest.mark.parametrize(
    ("word", "text"),
    [("strem", "did you mean 'stream'?"), ("evalute", "did you mean 'evaluate'?"), ("xyz", "see tsgdn --help")],
)
def test_an_unknown_command_suggests_the_nearest(word, text, capsys):
    assert cli.main([word]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert text in err


def test_an_unknown_option_is_told_in_one_line(capsys):
    assert cli.main(["doctor", "--jsn-x"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("tsgdn doctor: ")
    assert err.count("\n") == 1
    assert "--jsn-x" in err


def test_options_of_a_subcommand_are_told_the_same_way(command, capsys):
    def add_arguments(parser):
        inner = parser.add_subparsers(required=True).add_parser("inner")
        inner.add_argument("--count", type=int)

    command(lambda args: 0, add_arguments)
    assert cli.main(["made-up", "inner", "--count", "many"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("tsgdn made-up: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (cli.Misuse("column 'y' is missing;\n add it"), 2, "tsgdn made-up: column 'y' is missing; add it"),
        (FileNotFoundError(2, "No such file", "a.csv"), 2, "tsgdn made-up: [Errno 2] No such file: 'a.csv'"),
        (OSError("disk full"), 1, "tsgdn made-up: disk full"),
        (KeyboardInterrupt(), 130, "tsgdn made-up: interrupted"),
        (
            ModuleNotFoundError("no", name="matplotlib"),
            1,
            "tsgdn made-up: matplotlib is not installed; pip install 'tsgdn[plot]'",
        ),
    ],
)
def test_an_error_is_one_line_and_an_exit_code(command, capsys, error, code, text):
    def fail(args):
        raise error

    command(fail)
    assert cli.main(["made-up"]) == code
    assert capsys.readouterr() == ("", text + "\n")


def test_a_bug_keeps_its_traceback(command):
    command(lambda args: {}["gone"])
    with pytest.raises(KeyError):
        cli.main(["made-up"])


@pytest.mark.parametrize(("returned", "code"), [(0, 0), (1, 1), (2, 2), (None, 0)])
def test_the_exit_code_is_what_the_command_returns(command, returned, code):
    command(lambda args: returned)
    assert cli.main(["made-up"]) == code


def test_a_raw_command_gets_its_own_name_first(monkeypatch):
    got = []
    module = types.ModuleType("made_up_raw")
    module.main = lambda argv: got.append(argv) or 0
    monkeypatch.setitem(sys.modules, "made_up_raw", module)
    monkeypatch.setitem(cli.COMMANDS, "fit", cli.Command("Test", "made_up_raw", "raw", None, "main"))
    assert cli.main(["fit", "--config", "default"]) == 0
    assert got == [["fit", "--config", "default"]]


def test_a_reader_that_leaves_early_is_no_error():
    code = (
        "import sys, types\nfrom tsgdn.cli import main as cli\n"
        "module = types.ModuleType('made_up_writer')\n"
        "def write(args):\n    for i in range(100000):\n        print(i)\n"
        "module.run, module.add_arguments = write, lambda parser: None\n"
        "sys.modules['made_up_writer'] = module\n"
        "cli.COMMANDS['w'] = cli.Command('Test', 'made_up_writer', 'writes')\n"
        "sys.exit(cli.main(['w']))"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == b"0\n"
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


# the other three are the same parser as fit's, and each takes seconds to import
ALIKE = {"validate", "test", "predict"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in ALIKE)) for n in cli.COMMANDS])
def test_every_command_has_a_help_of_its_own(name):
    done = run(name, "--help")
    assert done.returncode == 0, done.stderr
    assert name in done.stdout
    assert "usage" in done.stdout.lower()


def test_help_for_a_command_is_its_help(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["help", "doctor"])
    assert stop.value.code == 0
    assert "tsgdn doctor" in capsys.readouterr().out


def test_doctor_reports_json_alone_on_stdout(tmp_path):
    done = run("doctor", "--json", env={**os.environ, "TSGDN_DATA": str(tmp_path)})
    report = json.loads(done.stdout)
    assert done.returncode == (0 if report["ok"] else 1)
    assert report["tsgdn"] == __version__
    assert report["data"][0] == {"from": "TSGDN_DATA", "path": str(tmp_path), "exists": True}
    assert {"torch", "gluonts", "lightning"} <= {package["name"] for package in report["packages"]}


def test_doctor_fails_and_names_the_package_outside_its_range(monkeypatch, capsys):
    from tsgdn.cli import doctor

    real = doctor.metadata.version
    monkeypatch.setattr(doctor.metadata, "version", lambda name: "3.1.0" if name == "pandas" else real(name))
    assert doctor.run(argparse.Namespace(json=False)) == 1
    out = capsys.readouterr().out
    assert "does not fit: pandas;" in out


@pytest.mark.parametrize(
    ("demand", "path", "why"),
    [
        ("auto", "torch", "the Triton kernels are for GPUs"),
        ("torch", "torch", "TSGDN_KERNEL=torch"),
        ("cuda", None, "expected torch, triton or auto"),
    ],
)
def test_doctor_says_what_runs_on_the_cpu_and_why(monkeypatch, capsys, demand, path, why):
    from tsgdn.cli import doctor

    monkeypatch.setenv("TSGDN_KERNEL", demand)
    cpu = doctor.examine()["kernels"][0]
    assert (cpu["device"], cpu["path"]) == ("cpu", path)
    assert why in cpu["why"]
    assert doctor.run(argparse.Namespace(json=False)) == 0
    assert f"  cpu: {path or 'none'} (" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("triton", "capability", "path", "why"),
    [
        (True, (9, 0), "triton", "tested on compute capability 9.0"),
        (True, (8, 0), "torch", "not tested on compute capability 8.0"),
        (False, (9, 0), "torch", "triton is not installed"),
    ],
    ids=["tested", "another generation", "without triton"],
)
def test_doctor_says_what_runs_on_a_gpu_and_why(monkeypatch, triton, capability, path, why):
    import torch

    from tsgdn.cli import doctor
    from tsgdn.kernels import choice

    monkeypatch.delenv("TSGDN_KERNEL", raising=False)
    for name, value in {
        "is_available": True,
        "device_count": 1,
        "get_device_name": "a GPU",
        "get_device_capability": capability,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(choice, "HAS_TRITON", triton)
    *_, gpu = doctor.examine()["kernels"]
    assert (gpu["device"], gpu["path"]) == ("cuda:0", path)
    assert why in gpu["why"]
