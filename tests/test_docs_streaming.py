"""The operators' pages: their commands run, and their table of codes is that of the code."""

import io
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import tsgdn
from tsgdn.cli.main import COMMANDS, main
from tsgdn.cli.state import add_arguments as state_arguments
from tsgdn.cli.stream import add_arguments
from tsgdn.data.clock import Clock
from tsgdn.model import artefact
from tsgdn.model.forecaster import Forecaster

DOCS = Path(__file__).parents[1] / "docs"
PAGES = ("streaming.md", "operations.md")
CODE = re.compile(r'"((?:line|json|csv|row|item|series|value|ts|shard|state|journal)\.[a-z_0-9]+)"')


def blocks(page, kind):
    return re.findall(rf"^```{kind}\n(.*?)^```", (DOCS / page).read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where somebody sits who reads these pages."""
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("reader")
    model = Forecaster(4, 2, (1, 24), known_features=Clock("h").calendar_size, width=16, depth=1)
    (place / "model").mkdir()
    info = {"freq": "h", "calendar": True, "variates": ["target"], "horizon": 3}
    artefact.save(model, place / "model", series=info)
    for name, items in (("rows", "abc"), ("more", "de")):
        rows = [
            {"item_id": item, "timestamp": str(np.datetime64("2024-01-01T00") + step) + ":00:00", "target": step % 3}
            for step in range(9)
            for item in items
        ]
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


def run(command):
    """One line of a shell, as far as the pages use it; commands of ours run in this process."""
    words = shlex.split(command)
    if words[0] != "tsgdn":
        return subprocess.run(command, shell=True, check=False).returncode
    ends = {}
    for sign in ("<", ">"):
        if sign in words:
            at = words.index(sign)
            ends[sign] = words[at + 1]
            del words[at : at + 2]
    with pytest.MonkeyPatch.context() as patch:
        stdin = io.BytesIO(Path(ends["<"]).read_bytes() if "<" in ends else b"")
        out = io.BytesIO()
        stdout = io.TextIOWrapper(out, write_through=True)
        patch.setattr(sys, "stdin", io.TextIOWrapper(stdin))
        patch.setattr(sys, "stdout", stdout)
        code = main(words[1:])
    if ">" in ends:
        Path(ends[">"]).write_bytes(out.getvalue())
    return code


@pytest.mark.slow  # it starts workers
def test_the_commands_of_the_pages_run_one_after_the_other(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    commands = [line for page in PAGES for block in blocks(page, "sh run") for line in block.splitlines()]
    assert len(commands) > 15
    for command in commands:
        code = run(command)
        assert code == 0, (command, capsys.readouterr().err)
    assert (folder / "nothing-new.jsonl").read_bytes() == b""
    assert (folder / "dead.jsonl").read_bytes() == b""
    assert (folder / "forecasts.jsonl").exists()


def test_the_python_of_the_pages_runs(folder, monkeypatch):
    monkeypatch.chdir(folder)
    pieces = [block for page in PAGES for block in blocks(page, "python")]
    assert pieces
    for piece in pieces:
        exec(compile(piece, "docs", "exec"), {})


def test_every_code_has_a_row_in_the_table_and_every_row_a_code():
    source = Path(tsgdn.__file__).parent
    said = {
        code
        for part in ("streaming", "cli")
        for path in (source / part).rglob("*.py")
        for code in CODE.findall(path.read_text())
    }
    table = re.findall(
        r"^\| `([a-z]+\.[a-z_0-9]+)` \| .+ \| .+ \|$", (DOCS / "operations.md").read_text(), re.MULTILINE
    )
    assert sorted(table) == sorted(set(table)), "each once"
    assert set(table) == said


def test_every_option_that_the_pages_name_is_there():
    import argparse

    stream, state = argparse.ArgumentParser(), argparse.ArgumentParser()
    add_arguments(stream)
    state_arguments(state)
    subs = next(action for action in state._actions if isinstance(action, argparse._SubParsersAction))
    known = {option for one in (stream, *subs.choices.values()) for option in one._option_string_actions} | {"--config"}
    for page in PAGES:
        named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", (DOCS / page).read_text()))
        assert named <= known, (page, named - known)
    assert {"stream", "state"} <= COMMANDS.keys()
