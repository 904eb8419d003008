"""`tsgdn stream`: good input, every kind of bad input, states, signals. Nothing is lost, nothing is silent."""

import contextlib
import gzip
import io
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from tsgdn.cli import engine, lines
from tsgdn.cli.main import main
from tsgdn.data.clock import Clock
from tsgdn.model import artefact
from tsgdn.model.forecaster import Forecaster
from tsgdn.streaming.durable import DurablePredictor
from tsgdn.streaming.predictor import StatefulPredictor
from tsgdn.streaming.stores import open_store

START = np.datetime64("2024-01-01T00:00:00", "ns")


def spoilt(folder, **change):
    """A copy of a model's config.json with something changed."""
    config = json.loads((folder / "config.json").read_text())
    for name, value in change.items():
        config[name] = {**config[name], **value} if isinstance(value, dict) else value
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"series": "h"}, "'series' is a str"),
        ({"series": {"horizon": "5"}}, "series.horizon is '5', expected int"),
        ({"series": {"variates": "target"}}, "series.variates is 'target', expected list"),
        ({"series": {"variates": [1]}}, "series.variates are [1], expected texts"),
        ({"series": {"freq": 3}}, "series.freq is 3, expected str"),
        ({"model": {"width": "wide"}}, "describes no model"),
        ({"model": {"seasons": 5}}, "describes no model"),
        ({"model": {"width": 32}}, "do not fit each other"),
        ({"extra": 1}, "unknown section 'extra'"),
        ({"sha256": "0"}, "is not the file that config.json was written with"),
    ],
)
def test_a_folder_that_is_no_model_gets_one_line_and_exit_2(tsgdn, tmp_path, change, text):
    folder = save_model(tmp_path)
    spoilt(tmp_path, **change)
    code, records, err = tsgdn(json_rows(range(3)), "--model", folder)
    assert (code, records) == (2, [])
    assert text in err
    assert err.count("\n") == 1


def test_a_configuration_nested_too_deeply_is_refused(tsgdn, tmp_path):
    folder = save_model(tmp_path)
    (tmp_path / "config.json").write_text("[" * 100_000)
    code, _, err = tsgdn("", "--model", folder)
    assert (code, "is not JSON" in err) == (2, True)


def test_weights_of_another_type_are_refused(tmp_path):
    model = Forecaster(patch_size=4, width=16, depth=1).double()
    artefact.save(model, tmp_path)
    with pytest.raises(artefact.ArtefactError, match=r"float64, expected .* float32"):
        artefact.load(tmp_path)


def test_a_crash_while_a_model_is_saved_leaves_one_model_or_none(tmp_path, monkeypatch):
    folder = save_model(tmp_path)
    before = artefact.fingerprint(artefact.load(folder))
    real = os.replace
    for stops in range(3):
        calls = []

        def crash(source, target, calls=calls, stops=stops):
            if len(calls) == stops:
                raise OSError("the machine stops here")
            calls.append(target)
            real(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(artefact.os, "replace", crash)
            with pytest.raises(OSError, match="stops here"):
                save_model(tmp_path, seed=1)
        if stops == 0:
            assert artefact.fingerprint(artefact.load(folder)) == before
        elif stops == 1:  # new weights, old configuration
            with pytest.raises(artefact.ArtefactError, match="written with"):
                artefact.load(folder)
    assert artefact.fingerprint(artefact.load(folder)) != before


def save_model(folder, seed=0, variates=("target",), freq="h"):
    torch.manual_seed(seed)
    size = Clock(freq).calendar_size
    model = Forecaster(patch_size=4, patches_ahead=2, seasons=(1, 24), known_features=size, width=16, depth=1)
    info = {"freq": freq, "calendar": True, "variates": list(variates), "horizon": 3}
    artefact.save(model, folder, series=info)
    return str(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


class Pipe(io.TextIOWrapper):
    """A text stream over bytes, as sys.stdin and sys.stdout are."""


@pytest.fixture
def tsgdn(monkeypatch, capsys):
    """Runs `tsgdn stream` in this process: exit code, records on stdout, text on stderr."""

    def run(data, *options):
        data = data.encode() if isinstance(data, str) else data
        out = io.BytesIO()
        monkeypatch.setattr(sys, "stdin", Pipe(io.BytesIO(data)))
        stdout = Pipe(out, write_through=True)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stdout)
            code = main(["stream", "--device", "cpu", *options])
        records = [json.loads(line) for line in out.getvalue().splitlines()]
        return code, records, capsys.readouterr().err

    return run


def iso(step):
    return str(START + np.timedelta64(step, "h"))[:19]


def json_row(step, value="1.5", item="a"):
    return f'{{"item_id": "{item}", "timestamp": "{iso(step)}", "target": {value}}}'


def json_rows(steps, items=("a",)):
    return "\n".join(json_row(step, f"{np.sin(step):.3f}", item) for step in steps for item in items) + "\n"


def csv_rows(steps, header="item_id,timestamp,target"):
    return header + "\n" + "".join(f"a,{iso(step)},{np.sin(step):.3f}\n" for step in steps)


def dead(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_row_gives_the_forecast_that_the_predictor_makes(tsgdn, model):
    code, records, err = tsgdn(json_rows(range(6), ("a", "b")), "--model", model, "--quantiles", ".5,.1")
    assert code == 0
    assert len(records) == 12
    predictor = StatefulPredictor.from_pretrained(model, device="cpu")
    predictor.observe([(item, iso(step), round(np.sin(step), 3)) for step in range(6) for item in "ab"])
    want = predictor.forecast(["b"], quantile_levels=(0.1, 0.5))
    last = records[-1]
    assert (last["item_id"], last["origin"], last["start"], last["freq"]) == ("b", iso(5), iso(6), "h")
    assert list(last["quantiles"]) == ["0.1", "0.5"]
    np.testing.assert_allclose(last["quantiles"]["0.5"], want.quantile(0.5)[0, 0], rtol=1e-5)
    assert [record["seq"] for record in records] == [1 + i // 2 for i in range(12)], "the number of the tick"
    assert len({record["id"] for record in records}) == 12
    assert last["id"] == engine.forecast_id("b", iso(5), 0, predictor.fingerprint)
    assert "12 rows" in err


def test_csv_and_json_lines_of_any_dialect_give_the_same(tsgdn, model):
    options = ["--model", model, "--emit", "patch"]
    _, want, _ = tsgdn(json_rows(range(9)), *options)
    for data in (
        csv_rows(range(9)),
        csv_rows(range(9), "unique_id,ds,y"),
        "\ufeff" + csv_rows(range(9)).replace("\n", "\r\n"),
        csv_rows(range(9)).rstrip("\n"),
        json_rows(range(9)).replace('"target"', '"y"').replace('"timestamp"', '"ds"'),
        "\n" + json_rows(range(9)).replace("\n", "\r\n\r\n"),
    ):
        code, records, _ = tsgdn(data, *options)
        assert code == 0
        assert records == want


def test_a_source_may_be_a_file_and_ticks_do_not_change_the_states(tsgdn, model, tmp_path):
    source = tmp_path / "x.csv"
    source.write_text(csv_rows(range(10)))
    _, want, _ = tsgdn(json_rows(range(10)), "--model", model)
    for tick in ("1", "4", "auto", "1000ms"):
        code, records, _ = tsgdn("", "--model", model, "--source", str(source), "--tick", tick)
        assert code == 0
        assert records[-1]["id"] == want[-1]["id"]
        np.testing.assert_allclose(records[-1]["quantiles"]["0.9"], want[-1]["quantiles"]["0.9"], rtol=1e-5)


def test_emit_chooses_when_forecasts_are_made(tsgdn, model):
    rows = json_rows(range(9))
    assert len(tsgdn(rows, "--model", model, "--emit", "patch")[1]) == 2
    assert tsgdn(rows, "--model", model, "--emit", "none")[1] == []
    assert len(tsgdn(rows + json_row(8, f"{np.sin(8):.3f}"), "--model", model)[1]) == 9  # a duplicate moves nothing


BAD_LINES = {
    "json.syntax": b'{"item_id": "a", "timestamp": "2024-01-01T09:00", "target": NaN}',
    "json.syntax ": b'{"item_id": "a", "timestamp": "2024-01-01T09:00", "target": Infinity}',
    "json.syntax  ": b'{"item_id": "a"',
    "json.type": b"[1, 2]",
    "json.duplicate": b'{"item_id": "a", "timestamp": "2024-01-01T09:00", "target": 1, "target": 2}',
    "json.duplicate ": b'{"item_id": "a", "timestamp": "2024-01-01T09:00", "target": 1, "t\\u0061rget": 2}',
    "value.type": b'{"item_id": "a", "timestamp": "2024-01-01T09:00", "target": "1.5"}',
    "value.type ": b'{"item_id": "a", "timestamp": "2024-01-01T09:00", "target": true}',
    "value.type  ": b'{"item_id": "a", "timestamp": "2024-01-01T09:00", "target": [1]}',
    "value.range": b'{"item_id": "a", "timestamp": "2024-01-01T09:00", "target": 1.1e100}',
    "row.column": b'{"item_id": "a", "timestamp": "2024-01-01T09:00", "target": 1, "colour": "red"}',
    "row.column ": b'{"item_id": "a", "target": 1}',
    "line.utf8": b'{"item_id": "\xff", "timestamp": "2024-01-01T09:00", "target": 1}',
    "line.too_long": b'{"item_id": "' + b"a" * 300_000 + b'"}',
    "item.id": b'{"item_id": "a\\u0000b", "timestamp": "2024-01-01T09:00", "target": 1}',
    "item.id ": b'{"item_id": null, "timestamp": "2024-01-01T09:00", "target": 1}',
    "ts.type": b'{"item_id": "a", "timestamp": 1704067200, "target": 1}',
    "ts.syntax": b'{"item_id": "a", "timestamp": "yesterday", "target": 1}',
    "ts.grid": b'{"item_id": "a", "timestamp": "2024-01-01T09:30", "target": 1}',
    "ts.late": b'{"item_id": "a", "timestamp": "2023-12-01T09:00", "target": 1}',
    "ts.conflict": b'{"item_id": "a", "timestamp": "2024-01-01T08:00", "target": 77}',
    "ts.range": b'{"item_id": "a", "timestamp": "9999-01-01T08:00", "target": 77}',
}


unspoiled = []  # what comes of the good rows alone


@pytest.mark.parametrize("code", BAD_LINES)
def test_a_bad_line_is_named_set_aside_and_leaves_no_trace(tsgdn, model, tmp_path, code):
    good = json_rows(range(9)).encode()
    more = json_rows(range(9, 12)).encode()
    letter = tmp_path / "dead.jsonl"
    data = good + BAD_LINES[code] + b"\n" + more
    options = ["--model", model, "--emit", "patch"]
    exit_code, records, err = tsgdn(data, *options, "--dead-letter", str(letter), "--strict")
    assert exit_code == 2
    if not unspoiled:
        unspoiled.append(tsgdn(good + more, *options, "--strict"))
        assert unspoiled[0][0] == 0
        assert len(unspoiled[0][1]) == 3
    assert unnumbered(records) == unnumbered(unspoiled[0][1])
    (bad,) = dead(letter)
    assert bad["code"] == code.strip()
    assert bad["line"] == 10
    if code != "line.too_long":
        assert bad["raw"] == BAD_LINES[code].decode("utf-8", "backslashreplace")
    assert f"line 10: {code.strip()}: " in err


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("a,2024-01-01T09:00:00,1,2", "row.columns"),
        ("a,2024-01-01T09:00:00", "row.columns"),
        ('a,"2024-01-01T09:00:00,1', "csv.syntax"),
        ("a,2024-01-01T09:00:00,inf", "value.nonfinite"),
        ("a,2024-01-01T09:00:00,1e400", "value.nonfinite"),
        ("a,2024-01-01T09:00:00,1_000", "value.type"),
        ("a,2024-01-01T09:00:00, 1 ", "value.type"),
        ("a,2024-01-01T09:00:00,١٢", "value.type"),
        ("a,2024-01-01T09:00:00,True", "value.type"),
        ("a\0,2024-01-01T09:00:00,1", "line.nul"),
    ],
)
def test_a_bad_csv_line_is_named_and_set_aside(tsgdn, model, tmp_path, line, code):
    letter = tmp_path / "dead.jsonl"
    data = csv_rows(range(9)) + line + "\n" + "".join(csv_rows(range(9, 12)).splitlines(True)[1:])
    options = ["--model", model, "--emit", "patch"]
    exit_code, records, _ = tsgdn(data, *options, "--dead-letter", str(letter))
    assert (exit_code, len(records)) == (0, 3)
    assert [(bad["code"], bad["raw"]) for bad in dead(letter)] == [(code, line)]


def test_missing_values_move_the_clock_in_both_formats(tsgdn, model):
    data = csv_rows(range(3))
    _, a, err = tsgdn(data + f"a,{iso(3)},\na,{iso(4)},NaN\n", "--model", model)
    _, b, _ = tsgdn(json_rows(range(3)) + json_row(3, "null") + "\n" + json_row(4, "null"), "--model", model)
    assert a == b
    assert a[-1]["start"] == iso(5)
    assert "2 missing" in err


def test_a_last_line_that_breaks_off_is_set_aside(tsgdn, model, tmp_path):
    letter = tmp_path / "dead.jsonl"
    code, records, _ = tsgdn(json_rows(range(3)) + json_row(3)[:-9], "--model", model, "--dead-letter", str(letter))
    assert (code, len(records)) == (0, 3)
    assert dead(letter)[0]["code"] == "line.truncated"


def test_empty_input_is_no_error(tsgdn, model, tmp_path):
    for data in ("", "\n\n", "item_id,timestamp,target\n"):
        code, records, _ = tsgdn(data, "--model", model)
        assert (code, records) == (0, [])


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ('{"item_id": "a", "timestamp": "2024-01-01", "target": 1, "colour": 2}', "unknown column 'colour'"),
        ('{"item_id": "a", "timestamp": "2024-01-01"}', "column target or y is missing"),
        ('{"timestamp": "2024-01-01", "target": 1}', "column item_id or unique_id is missing"),
        ("item_id,timestamp\na,2024-01-01\n", "column target or y is missing"),
        ("item_id,timestamp,target,colour\na,2024-01-01,1,2\n", "unknown column 'colour'"),
        ("item_id,timestamp,target,target\n", "twice"),
        ("item_id,unique_id,timestamp,target\n", "say the same"),
        ("nonsense\n" * 200, "item_id"),
    ],
)
def test_a_wrong_schema_stops_before_anything_is_applied(tsgdn, model, tmp_path, data, text):
    code, records, err = tsgdn(data, "--model", model, "--state", str(tmp_path))
    assert (code, records) == (2, [])
    assert text in err
    assert err.count("\n") == 1
    assert not (tmp_path / "header.json").exists()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--model", "no/such/folder"], "no/such/folder"),
        (["--source", "no/such/file"], "no such file"),
        (["--source", "."], "is a folder"),
        (["--source", "https://x/y.csv"], "address"),
        (["--source", "replay:no_such_set"], "no_such_set"),
        (["--horizon", "0"], "--horizon"),
        (["--horizon", "many"], "--horizon"),
        (["--quantiles", "0.5,1"], "--quantiles"),
        (["--quantiles", "half"], "--quantiles"),
        (["--quantiles", "nan"], "--quantiles"),
        (["--tick", "0"], "--tick"),
        (["--tick", "5s"], "--tick"),
        (["--tick", "9" * 400 + "ms"], "--tick"),
        (["--device", "abacus"], "device 'abacus' is not available"),
        *([] if torch.cuda.is_available() else [(["--device", "cuda"], "device 'cuda' is not available")]),
        (["--freq", "D"], "fitted on 'h'"),
        (["--freq", "fortnight"], "fortnight"),
        (["--max-series", "0"], "--max-series"),
        (["--checkpoint-every", "nan"], "--checkpoint-every"),
        (["--dead-letter", "no/such/folder/x"], "--dead-letter"),
        (["--state", "/dev/null/x"], "--state"),
        (["--state", "ftp://x"], "ftp:// is no kind of store"),
        (["--follow"], "only a file can be followed"),
        (["--emit", "sometimes"], "--emit"),
        (["--colour", "red"], "--colour"),
    ],
)
def test_a_wrong_option_gets_one_line_and_exit_2(tsgdn, model, options, text):
    if "--model" not in options:
        options = ["--model", model, *options]
    code, records, err = tsgdn(json_rows(range(3)), *options)
    assert (code, records) == (2, [])
    assert text in err
    assert err.count("\n") == 1
    assert "Traceback" not in err


def unnumbered(records):
    """The forecasts without the numbers of their ticks, of which rows set aside make some."""
    return [{key: value for key, value in record.items() if key != "seq"} for record in records]


def stored(model, state):
    """A predictor with the states that a stream left."""
    predictor = StatefulPredictor.from_pretrained(model, device="cpu")
    DurablePredictor(predictor, open_store(state)).store.close()
    return predictor


def test_a_hundred_unreadable_lines_in_a_row_are_refused_and_the_rows_before_are_kept(tsgdn, model, tmp_path):
    state, letter = tmp_path / "state", tmp_path / "dead.jsonl"
    garbage = b"\x80garbage\n" * 100
    data = json_rows(range(5)).encode() + garbage[:-9] + json_rows(range(5, 6)).encode() + garbage
    code, records, err = tsgdn(data, "--model", model, "--state", str(state), "--dead-letter", str(letter))
    assert code == 2
    assert len(records) == 6
    assert "100 unreadable lines in a row" in err
    assert len(dead(letter)) == 199
    named = [line for line in err.splitlines() if "line.utf8" in line and line.startswith("tsgdn stream: line ")]
    assert len(named) <= 30  # ten a second
    predictor = stored(model, state)
    assert predictor.head("a") == 6
    code, _, err = tsgdn(gzip.compress(os.urandom(200_000)), "--model", model)
    assert code == 2 or "unreadable" in err


def test_a_row_far_ahead_is_not_lost(tsgdn, model, tmp_path):
    letter = tmp_path / "dead.jsonl"
    far = json_row(400_000)
    options = ["--model", model, "--dead-letter", str(letter)]
    tsgdn(json_rows(range(5)) + far + "\n" + json_rows(range(5, 8)), *options)
    assert [(bad["code"], bad["raw"], bad["line"]) for bad in dead(letter)] == [("ts.jump", far, 6)]
    letter.unlink()
    tsgdn(json_rows(range(5)) + far + "\n", *options)
    assert [(bad["code"], bad["raw"]) for bad in dead(letter)] == [("ts.jump", far)]


def test_a_row_far_ahead_is_counted_and_what_it_said_is_kept_over_a_restart(tsgdn, model, tmp_path):
    letter, state = tmp_path / "dead.jsonl", tmp_path / "state"
    options = ["--model", model, "--dead-letter", str(letter), "--state", str(state)]
    _, _, err = tsgdn(json_rows(range(5)) + json_row(400_000, "12.25"), *options)
    assert "1 held" in err
    assert dead(letter) == []
    _, _, err = tsgdn(json_rows(range(5, 8)), *options)
    assert "held" not in err
    (bad,) = dead(letter)
    assert bad["code"] == "ts.jump"
    assert json.loads(bad["raw"]) == ["a", iso(400_000)[:16].replace("T", " "), [12.25]]


def test_forecasts_that_find_no_room_end_the_stream_but_lose_no_row(tsgdn, model, tmp_path, monkeypatch, capsys):
    class Full(io.BytesIO):
        def write(self, data):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys, "stdin", Pipe(io.BytesIO(json_rows(range(5)).encode())))
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Pipe(Full()))
        assert main(["stream", "--model", model, "--state", str(tmp_path), "--tick", "2"]) == 1
    assert "No space left" in capsys.readouterr().err
    predictor = stored(model, tmp_path)
    assert predictor.head("a") == 2


def test_states_that_a_bug_left_half_changed_are_not_saved(tsgdn, model, tmp_path, monkeypatch):
    tsgdn(json_rows(range(3)), "--model", model, "--state", str(tmp_path))
    real = StatefulPredictor.observe

    def broken(self, rows, **more):
        if rows.values[0, 0] == 0.5:
            self._ledger.head += 1
            raise RuntimeError("a bug")
        return real(self, rows, **more)

    with monkeypatch.context() as patch:
        patch.setattr(StatefulPredictor, "observe", broken)
        with pytest.raises(RuntimeError, match="a bug"):
            tsgdn(json_rows(range(3, 5)) + json_row(5, "0.5"), "--model", model, "--state", str(tmp_path))
    assert stored(model, tmp_path).head("a") == 5, "the ticks before it were taken in"


def test_a_reader_that_goes_away_before_a_refusal_leaves_the_rows(model, tmp_path, monkeypatch, capsys):
    class Gone(io.BytesIO):
        def write(self, data):
            raise BrokenPipeError(32, "Broken pipe")

    data = json_rows(range(5)).encode() + b"\x80garbage\n" * 100
    monkeypatch.setattr(sys, "stdin", Pipe(io.BytesIO(data)))
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Pipe(Gone()))
        assert main(["stream", "--model", model, "--state", str(tmp_path), "--tick", "1000"]) == 2
    assert "100 unreadable lines" in capsys.readouterr().err
    predictor = stored(model, tmp_path)
    assert predictor.head("a") == 5


def test_a_closed_standard_input_is_named(model, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", None)
    assert main(["stream", "--model", model]) == 2
    assert "standard input is closed" in capsys.readouterr().err


def test_a_closed_standard_output_is_no_reason_for_a_traceback(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["doctor"]) == 0


def test_states_saved_and_taken_up_again_continue_as_if_uninterrupted(tsgdn, model, tmp_path):
    _, want, _ = tsgdn(json_rows(range(20), ("a", "b")), "--model", model)
    state = ["--model", model, "--state", str(tmp_path / "state")]
    _, first, _ = tsgdn(json_rows(range(7), ("a", "b")), *state)
    code, second, err = tsgdn(json_rows(range(5, 20), ("a", "b")), *state)  # two steps come again
    assert code == 0
    assert "4 duplicate" in err
    both = first + second
    assert [record["id"] for record in both] == [record["id"] for record in want]
    for got, wanted in zip(both, want, strict=True):
        assert got["quantiles"] == wanted["quantiles"]


def test_states_of_another_model_or_in_use_are_refused(tsgdn, model, tmp_path):
    state = tmp_path / "state"
    tsgdn(json_rows(range(7)), "--model", model, "--state", str(state))
    other = save_model(tmp_path / "other", seed=1)
    code, _, err = tsgdn(json_rows(range(7, 9)), "--model", other, "--state", str(state))
    assert (code, err.count("\n")) == (2, 1)
    assert "model" in err
    durable = DurablePredictor(StatefulPredictor.from_pretrained(model, device="cpu"), open_store(state))
    code, _, err = tsgdn(json_rows(range(7, 9)), "--model", model, "--state", str(state))
    assert (code, err.count("\n")) == (2, 1)
    assert str(os.getpid()) in err
    durable.close()
    assert tsgdn(json_rows(range(7, 9)), "--model", model, "--state", str(state))[0] == 0


def test_a_snapshot_is_taken_over_into_the_store(tsgdn, model, tmp_path):
    predictor = StatefulPredictor.from_pretrained(model, device="cpu")
    predictor.observe([("a", iso(step), float(step)) for step in range(5)])
    predictor.save(tmp_path)
    code, _, err = tsgdn(json_rows(range(5, 7)), "--model", model, "--state", str(tmp_path))
    assert code == 0
    assert "1 series were taken over" in err
    assert stored(model, tmp_path).head("a") == 7


def test_a_file_is_read_on_from_where_the_states_stand(tsgdn, model, tmp_path):
    source, state = tmp_path / "rows.jsonl", ["--model", model, "--state", str(tmp_path / "state")]
    source.write_text(json_rows(range(20), ("a", "b")))
    _, want, _ = tsgdn("", "--model", model, "--source", str(source), "--tick", "2")
    source.write_text(json_rows(range(9), ("a", "b")))
    _, first, _ = tsgdn("", *state, "--source", str(source), "--tick", "2")
    source.write_text(json_rows(range(20), ("a", "b")))
    code, second, err = tsgdn("", *state, "--source", str(source), "--tick", "2")
    assert code == 0
    assert "0 duplicate, 0 late" in err
    got = first + second
    assert [(r["id"], r["quantiles"], r["seq"]) for r in got] == [(r["id"], r["quantiles"], r["seq"]) for r in want]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("9 lines fewer", "the states hold its first 10 lines and it has fewer"),
        ("another", "line 10 is not the one that the states ended with"),
    ],
)
def test_another_file_is_not_taken_for_the_one_that_was_streamed(tsgdn, model, tmp_path, text, complaint):
    source, state = tmp_path / "rows.jsonl", ["--model", model, "--state", str(tmp_path / "state")]
    source.write_text(json_rows(range(10)))
    tsgdn("", *state, "--source", str(source))
    source.write_text(json_rows(range(1)) if text != "another" else json_rows(range(3, 20)))
    code, records, err = tsgdn("", *state, "--source", str(source))
    assert (code, records) == (2, [])
    assert complaint in err
    assert stored(model, tmp_path / "state").head("a") == 10
    code, _, err = tsgdn("", *state, "--source", str(source), "--from-start")
    assert code == 0
    assert "duplicate" in err


def test_a_csv_file_is_read_on_with_its_header(tsgdn, model, tmp_path):
    source, state = tmp_path / "rows.csv", ["--model", model, "--state", str(tmp_path / "state")]
    lines = ["item_id,timestamp,target", *(f"a,{iso(step)},{step}" for step in range(8))]
    source.write_text("\n".join(lines[:5]) + "\n")
    tsgdn("", *state, "--source", str(source))
    source.write_text("\n".join(lines) + "\n")
    code, records, err = tsgdn("", *state, "--source", str(source), "--tick", "1")
    assert (code, len(records)) == (0, 4)
    assert "4 accepted" in err


def test_several_variates_come_as_columns(tsgdn, tmp_path):
    folder = save_model(tmp_path, variates=("x", "y"))
    rows = "\n".join(
        json.dumps({"item_id": "a", "timestamp": iso(step), "x": step, "y": None if step == 2 else -step})
        for step in range(6)
    )
    code, records, _ = tsgdn(rows, "--model", folder)
    assert code == 0
    assert set(records[-1]["quantiles"]) == {"x", "y"}
    assert len(records[-1]["quantiles"]["y"]["0.9"]) == 3
    same, again, _ = tsgdn("y,timestamp,x,item_id\n" + "".join(
        f"{'' if step == 2 else -step},{iso(step)},{step},a\n" for step in range(6)
    ), "--model", folder)  # fmt: skip
    assert (same, again) == (0, records)


def test_variates_may_come_in_lines_of_their_own(tsgdn, tmp_path):
    folder = save_model(tmp_path, variates=("x", "y"))
    apart = [{"x": step, "y": -step} for step in range(9)]
    lines = [
        json.dumps({"item_id": "a", "timestamp": iso(step), name: row[name]})
        for step, row in enumerate(apart)
        for name in row
    ]
    whole = [json.dumps({"item_id": "a", "timestamp": iso(step), **row}) for step, row in enumerate(apart)]
    code, _, err = tsgdn("\n".join(lines), "--model", folder, "--strict")
    assert code == 0
    assert "18 accepted" in err
    _, want, _ = tsgdn("\n".join(whole), "--model", folder, "--tick", "9")
    last, wanted = tsgdn("\n".join(lines), "--model", folder, "--tick", "18")[1][-1], want[-1]
    for name in "xy":
        np.testing.assert_allclose(last["quantiles"][name]["0.5"], wanted["quantiles"][name]["0.5"], rtol=1e-5)
    _, _, err = tsgdn(lines[0] + f'\n{{"item_id": "a", "timestamp": "{iso(1)}"}}', "--model", folder)
    assert "row.column" in err


def test_quantiles_that_look_alike_are_all_there(tsgdn, model):
    _, records, _ = tsgdn(json_rows(range(3)), "--model", model, "--quantiles", "0.5,0.50000001")
    assert list(records[-1]["quantiles"]) == ["0.5", "0.50000001"]


def test_lines_are_read_in_bounded_memory():
    class Source:
        """Endless text without a newline, in which nobody keeps more than a piece."""

        def __init__(self):
            self.pieces = 400

        def read(self, size):
            self.pieces -= 1
            return b"x" * size if self.pieces > 0 else b"\nlast" if self.pieces == 0 else b""

    read = [line for some in lines.read_lines(Source()) for line in some]
    assert [(line.number, line.problem and line.problem.code) for line in read] == [(1, "line.too_long"), (2, None)]
    assert len(read[0].raw) <= 80


@contextlib.contextmanager
def started(model, *options):
    """The command as a process of its own."""
    command = [sys.executable, "-m", "tsgdn", "stream", "--device", "cpu", "--model", model, *options]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen(command, **pipes, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


def test_a_request_to_stop_finishes_the_tick_saves_and_exits_0(model, tmp_path):
    with started(model, "--state", str(tmp_path)) as process:
        process.stdin.write(json_rows(range(6)).encode())
        process.stdin.flush()
        for _ in range(6):
            assert json.loads(process.stdout.readline())["item_id"] == "a"
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert b"6 accepted" in process.stderr.read()
    predictor = stored(model, tmp_path)
    assert predictor.head("a") == 6


@pytest.mark.slow
def test_a_stream_that_is_killed_again_and_again_says_what_an_uninterrupted_one_says(tsgdn, model, tmp_path):
    source, rng = tmp_path / "rows.jsonl", np.random.default_rng(0)
    source.write_text(json_rows(range(300), ("a", "b", "c")))
    _, want, _ = tsgdn("", "--model", model, "--source", str(source), "--tick", "3")
    said = []
    for _ in range(30):
        options = ("--source", str(source), "--state", str(tmp_path / "state"), "--tick", "3")
        with started(model, *options, "--checkpoint-every", "0.05") as process:
            for _ in range(int(rng.integers(1, 300))):
                if not (line := process.stdout.readline()).endswith(b"\n"):
                    break
                said.append(json.loads(line))
            process.kill()
            rest = process.stdout.read().split(b"\n")[:-1]
            said += [json.loads(line) for line in rest]
        if said[-1]["seq"] == want[-1]["seq"]:
            break
    unique = {record["id"]: record for record in said}
    assert list(unique.values()) == want
    again = len(said) - len(unique)
    assert again <= 3 * 30, "at most the last tick comes twice after a kill"


def test_a_reader_that_goes_away_ends_the_stream_quietly(model, tmp_path):
    with started(model, "--state", str(tmp_path)) as process:
        process.stdin.write(json_rows(range(2)).encode())
        process.stdin.flush()
        process.stdout.readline()
        process.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            for step in range(2, 500):
                process.stdin.write(json_rows([step]).encode())
                process.stdin.flush()
                if process.poll() is not None:
                    break
                time.sleep(0.05)
        assert process.wait(60) == 0
        assert b"Traceback" not in process.stderr.read()
    assert stored(model, tmp_path).head("a") >= 2
