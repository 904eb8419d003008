"""Shards and processes: rows find their shard, a worker that dies loses nothing, the numbers stay the same."""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tsgdn.cli.main import main
from tsgdn.data.clock import Clock
from tsgdn.model import artefact
from tsgdn.model.forecaster import Forecaster
from tsgdn.streaming.stores import open_store
from tsgdn.streaming.stores.shards import shard_of

START = np.datetime64("2024-01-01T00:00:00", "ns")
ITEMS = ("a", "b", "c", "d", "e")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    features = Clock("h").calendar_size
    model = Forecaster(patch_size=4, patches_ahead=2, seasons=(1, 24), known_features=features, width=16, depth=1)
    folder = tmp_path_factory.mktemp("model")
    artefact.save(model, folder, series={"freq": "h", "calendar": True, "variates": ["target"], "horizon": 3})
    return str(folder)


def json_rows(steps, items=ITEMS):
    out = []
    for step in steps:
        for item in items:
            stamp = str(START + np.timedelta64(step, "h"))[:19]
            out.append({"item_id": item, "timestamp": stamp, "target": round(float(np.sin(step + ord(item))), 3)})
    return "".join(json.dumps(one) + "\n" for one in out)


@pytest.fixture
def tsgdn(model, monkeypatch, capsys):
    """Runs a command in this process: exit code, records on stdout, stderr."""

    def run(*options, data="", command="stream"):
        out = io.BytesIO()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data.encode())))
        argv = [*command.split(), "--device", "cpu", "--model", model, *options]
        stdout = io.TextIOWrapper(out, write_through=True)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stdout)
            code = main(argv)
        return code, [json.loads(line) for line in out.getvalue().splitlines()], capsys.readouterr().err

    return run


def told(records):
    """What forecasts say, by id, without the numbers of their ticks."""
    return {one["id"]: {name: value for name, value in one.items() if name != "seq"} for one in records}


@contextlib.contextmanager
def started(model, *options):
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


def workers_of(pid):
    """The processes that a stream has started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[1]) == pid and fields[0] != "Z":
                found.append(int(path.parent.name))
    return sorted(found)


# ---- one shard in one process


def test_a_shard_takes_its_own_rows_and_counts_the_others(tsgdn, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json_rows(range(6)))
    source = ("--source", str(tmp_path / "rows.jsonl"), "--exact", "--state", str(tmp_path / "state"))
    want = told(tsgdn(*source[:3])[1])
    said = {}
    for shard in range(2):
        code, records, err = tsgdn(*source, "--shards", "2", "--shard", str(shard))
        assert code == 0
        assert {shard_of(one["item_id"], 2) for one in records} == {shard}
        ours = sum(shard_of(item, 2) == shard for item in ITEMS)
        assert f"{6 * ours} accepted" in err and f"{6 * (5 - ours)} elsewhere" in err
        said |= told(records)
    assert said == want, "bit by bit"
    assert {path.name for path in (tmp_path / "state").glob("*.sqlite")} == {"00.sqlite", "01.sqlite"}
    code, records, err = tsgdn(*source, "--shards", "2", "--shard", "1")
    assert (code, records) == (0, []), "the whole file is held, the last rows of another shard included"
    assert " elsewhere" not in err


def test_rows_of_another_shard_are_a_failure_where_that_is_asked_for(tsgdn, tmp_path):
    dead = tmp_path / "dead.jsonl"
    options = ("--shards", "2", "--shard", "0", "--strict", "--dead-letter", str(dead))
    code, _, err = tsgdn(*options, data=json_rows(range(1)))
    other = [item for item in ITEMS if shard_of(item, 2) == 1]
    assert code == 2
    assert f"shard.other {len(other)}" in err
    assert {json.loads(json.loads(line)["raw"])["item_id"] for line in dead.read_text().splitlines()} == set(other)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--shards", "2"], "--shards needs --shard"),
        (["--shard", "0"], "--shard needs --shards"),
        (["--shards", "2", "--shard", "2"], "expected 0 to 1"),
        (["--shards", "0", "--shard", "0"], "expected 1 to 100"),
        (["--workers", "2"], "--workers needs --state"),
        (["--workers", "2", "--state", "STATE", "--durability", "memory"], "--durability memory has none"),
        (["--workers", "0", "--state", "STATE"], "--workers is 0"),
        (["--workers", "3", "--shards", "2", "--state", "STATE"], "at most that many"),
        (["--workers", "2", "--shards", "2", "--shard", "0"], "leave one out"),
        (["--state-key", "KEY"], "give that too"),
        (["--state-key", "KEY", "--state", "STATE"], "hexadecimal"),
        (["--on-full", "evict", "--state", "STATE"], "needs --max-series"),
        (["--on-full", "evict", "--max-series", "3"], "begin anew"),
        (["--on-conflict", "replace"], "--late-window"),
        (["--late-window", "-1"], "expected 0 to 10000"),
        (["--max-future-skew", "nan"], "expected seconds"),
        (["--signals", "-"], "are one stream"),
        (["--source", "-", "--source", "-"], "given twice"),
    ],
)
def test_a_wrong_option_gets_one_line_and_exit_2(tsgdn, tmp_path, options, text):
    (tmp_path / "key").write_text("no key")
    names = {"STATE": str(tmp_path / "state"), "KEY": str(tmp_path / "key")}
    code, records, err = tsgdn(*[names.get(one, one) for one in options])
    assert (code, records) == (2, [])
    assert text in err
    assert err.count("\n") == 1
    assert not (tmp_path / "state").exists()


def test_sealed_states_need_their_key(tsgdn, tmp_path):
    key, state = tmp_path / "key", str(tmp_path / "state")
    key.write_text(bytes(range(32)).hex())
    assert tsgdn("--state", state, "--state-key", str(key), data=json_rows(range(3)))[0] == 0
    code, _, err = tsgdn("--state", state, data="")
    assert code == 2
    assert "with a key" in err
    code, records, _ = tsgdn("--state", state, "--state-key", str(key), data=json_rows([3], "a"))
    assert (code, len(records)) == (0, 1)


# ---- several sources


def test_several_sources_feed_one_state_and_each_is_read_on(tsgdn, tmp_path):
    one, two = tmp_path / "one.jsonl", tmp_path / "two.csv"
    one.write_text(json_rows(range(4), "ab"))
    lines = [json.loads(line) for line in json_rows(range(4), "cd").splitlines()]
    two.write_text("item_id,timestamp,target\n" + "".join(",".join(map(str, line.values())) + "\n" for line in lines))
    options = ("--state", str(tmp_path / "state"), "--source", str(one), "--source", str(two), "--exact")
    code, records, err = tsgdn(*options)
    assert code == 0
    assert "16 accepted" in err and "4 series" in err
    assert told(records) == told(tsgdn("--exact", data=json_rows(range(4), "abcd"))[1])
    with one.open("a") as file:
        file.write(json_rows([4], "ab") + "no row\n")
    dead = tmp_path / "dead.jsonl"
    code, records, err = tsgdn(*options, "--dead-letter", str(dead))
    assert [one["item_id"] for one in records] == ["a", "b"], "both are read on behind what the states hold"
    assert json.loads(dead.read_text())["source"] == str(one)
    code, records, err = tsgdn("--state", str(tmp_path / "state"), "--exact", data=json_rows([5], "ab"))
    assert (code, len(records)) == (0, 2), "then something else"
    assert tsgdn(*options)[1] == []


def test_more_series_than_room_give_the_same_forecasts(tsgdn, tmp_path):
    want = told(tsgdn("--exact", data=json_rows(range(6)))[1])
    options = ("--exact", "--max-series", "2", "--on-full", "evict", "--state", str(tmp_path / "state"))
    code, records, err = tsgdn(*options, data=json_rows(range(3)))
    assert code == 0 and "5 series" in err
    said = told(records)
    code, records, err = tsgdn(*options, data=json_rows(range(3, 6)))
    assert code == 0 and "5 series" in err
    assert said | told(records) == want


def test_late_rows_count_within_the_window_that_is_asked_for(tsgdn):
    rows = json_rows(range(4), "a") + json_rows(range(5, 9), "a")
    code, records, err = tsgdn("--exact", "--late-window", "2", data=rows + json_rows([4], "a") + json_rows([9], "a"))
    assert code == 0 and "1 revised" in err
    last = records[-1]["quantiles"]
    assert last == tsgdn("--exact", "--late-window", "2", data=json_rows(range(10), "a"))[1][-1]["quantiles"]


# ---- several processes


@pytest.mark.slow
def test_workers_say_what_one_process_says_and_leave_shards_that_can_be_spread_anew(model, tsgdn, tmp_path, capsys):
    want = told(tsgdn("--exact", data=json_rows(range(6)))[1])
    state, rows = tmp_path / "state", tmp_path / "rows.jsonl"
    rows.write_text(json_rows(range(4)) + "nonsense\n")
    options = ("--exact", "--state", str(state), "--shards", "3", "--workers", "2")
    code, records, err = tsgdn(*options, "--source", str(rows), "--dead-letter", str(tmp_path / "dead"))
    assert code == 0
    assert "20 accepted" in err and "1 unreadable" in err and "5 series" in err
    said = told(records)
    assert main(["state", "reshard", str(state), "--into", str(tmp_path / "two"), "--shards", "2"]) == 0
    out = capsys.readouterr()
    assert "differ" not in out.err, "all shards agree on the place in the source"
    with rows.open("a") as file:
        file.write(json_rows(range(4, 6)))
    code, records, err = tsgdn("--exact", "--state", str(tmp_path / "two"), "--workers", "2", "--source", str(rows))
    assert code == 0
    assert len(records) == 10
    assert said | told(records) == want, "bit by bit"
    code, _, err = tsgdn("--state", str(state), "--workers", "2", "--shards", "2", "--exact")
    assert code == 2
    assert "has 3" in err


def test_a_worker_that_is_killed_is_started_anew_and_nothing_is_lost(model, tsgdn, tmp_path):
    want = told(tsgdn("--exact", "--tick", "5", data=json_rows(range(12)))[1])
    options = ("--exact", "--state", str(tmp_path / "state"), "--shards", "4", "--workers", "2", "--tick", "5")
    records = []
    with started(model, *options, "--checkpoint-every", "0.2") as process:
        for step in range(12):
            if step in (3, 8):
                mine = workers_of(process.pid)
                assert len(mine) == 2
                os.kill(mine[step == 8], signal.SIGKILL)
            process.stdin.write(json_rows([step]).encode())
            process.stdin.flush()
            records += [json.loads(process.stdout.readline()) for _ in ITEMS]
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        err = process.stderr.read().decode()
    assert err.count("it is started anew") == 2
    assert "Traceback" not in err
    assert "60 accepted" in err
    assert told(records) == want
    heads = {}
    for shard in range(4):
        store = open_store(tmp_path / "state", shard=shard, shards=4).view()
        heads |= dict.fromkeys(store.item_ids(), store.info().journal)
        store.close()
    assert heads == dict.fromkeys(ITEMS, 0), "a graceful end leaves no journal"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_stream_of_workers_that_is_killed_as_a_whole_goes_on_where_each_shard_stood(model, tsgdn, tmp_path):
    rows, rng = tmp_path / "rows.jsonl", np.random.default_rng(1)
    rows.write_text(json_rows(range(30)))
    want = told(tsgdn("--exact", "--source", str(rows))[1])
    options = ("--exact", "--state", str(tmp_path / "state"), "--shards", "4", "--workers", "2")
    said = {}
    for number in range(4):
        with started(model, *options, "--source", str(rows), "--checkpoint-every", "0.1") as process:
            for _ in range(int(rng.integers(1, 60)) if number < 3 else 10_000):
                if not (line := process.stdout.readline()).endswith(b"\n"):
                    break
                said |= told([json.loads(line)])
            for pid in [*workers_of(process.pid)][: int(rng.integers(0, 3))]:
                os.kill(pid, signal.SIGKILL)
            process.kill()
            said |= told(json.loads(line) for line in process.stdout.read().split(b"\n")[:-1])
    assert said == want


def test_a_store_that_a_worker_cannot_open_is_told_in_one_line(model, tsgdn, tmp_path, monkeypatch):
    assert (
        tsgdn("--state", str(tmp_path / "state"), "--workers", "1", "--shards", "2", data=json_rows(range(2)))[0] == 0
    )
    shutil.move(tmp_path / "state/01.sqlite", tmp_path / "state/00.sqlite")
    code, records, err = tsgdn("--state", str(tmp_path / "state"), "--workers", "1", "--shards", "2")
    assert (code, records) == (2, [])
    assert err.count("\n") == 1


def test_a_tick_that_a_worker_took_in_before_it_died_is_answered_and_not_taken_in_again(model, tmp_path):
    from tsgdn.cli.worker import Group, with_number
    from tsgdn.streaming.rows import from_objects
    from tsgdn.streaming.ticks import Tick, packed

    order = {
        "model": model, "options": {"device": "cpu", "exact": True}, "state": str(tmp_path / "state"), "shards": 2,
        "durability": "normal", "key": None, "mine": [0, 1], "levels": [0.5], "emit": "touched", "calibrated": None,
        "run": "this", "takeover": False, "owner": "test", "source": "-",
    }  # fmt: skip

    def tick(number, shard, items):
        stamps = [str(START + np.timedelta64(number, "h"))] * len(items)
        rows = from_objects([*items, "a"], [*stamps, "never"], [1.0] * (len(items) + 1), ("target",))
        data = packed(Tick(rows, {}, with_number(b"", "-", "this", number), "-"))
        return {"do": "tick", "tick": number, "parts": [shard], "sizes": [len(data)]}, data

    items = {shard: [item for item in ITEMS if shard_of(item, 2) == shard] for shard in (0, 1)}
    first = Group(order)
    for number in (1, 2):
        want = first.tick(*tick(number, 0, items[0]))
    first.close(None)  # as a kill leaves it
    second = Group(order)
    header, _ = second.ready()
    assert header["shards"][0]["ticks"] == 2
    assert second.tick(*tick(2, 0, items[0])) == want, "the same verdicts and forecasts"
    assert [second.parts[0].store.head(item) for item in items[0]] == [2] * len(items[0])
    header, _ = second.tick(*tick(2, 1, items[1]))
    assert header["reports"][1]["accepted"] == len(items[1]), "the other shard had not seen it"
    second.close({"-": with_number(b"", "-", "this", 2).hex()})
    third = Group({**order, "run": "another"})
    assert third.tick(*tick(1, 0, items[0]))[0]["reports"][0]["duplicate"] == len(items[0])
    third.close(None)


# ---- a new model


def test_a_new_model_is_warmed_up_from_the_source_and_streams_on(model, tsgdn, tmp_path, capsys):
    rows, state = tmp_path / "rows.jsonl", str(tmp_path / "new")
    rows.write_text(json_rows(range(8)))
    want = tsgdn("--exact", "--source", str(rows))[1][-5:]
    code, records, err = tsgdn("--state", state, "--exact", "--source", str(rows), command="state replay")
    assert (code, records) == (0, [])
    assert "40 accepted" in err and "5 series, 0 forecasts" in err
    with rows.open("a") as file:
        file.write(json_rows([8]))
    code, records, err = tsgdn("--exact", "--state", state, "--source", str(rows))
    assert code == 0
    assert told(records) == told(tsgdn("--exact", "--source", str(rows))[1][-5:])
    assert told(records).keys().isdisjoint(told(want))


@pytest.mark.parametrize(
    ("options", "text"),
    [(["--source", "-"], "gone"), (["--source", "redis://here/0?stream=in"], "group=NAME"), ([], "--source")],
)
def test_a_replay_that_would_take_rows_away_is_refused(tsgdn, tmp_path, options, text):
    code, records, err = tsgdn("--state", str(tmp_path / "new"), *options, command="state replay")
    assert (code, records) == (2, [])
    assert text in err and err.count("\n") == 1


# ---- calibration and signals


def odd_rows(steps=60, shock=50):
    out = []
    for step in range(steps):
        value = round(float(np.sin(step) + 0.1 * np.cos(7 * step)), 3) + (1e4 if step == shock else 0)
        out.append({"item_id": "a", "timestamp": str(START + np.timedelta64(step, "h"))[:19], "target": value})
    return "".join(json.dumps(one) + "\n" for one in out)


def test_alarms_go_to_a_stream_of_their_own_and_forecasts_may_be_calibrated(tsgdn, tmp_path):
    alarms, state = tmp_path / "alarms.jsonl", str(tmp_path / "state")
    options = ("--signals", str(alarms), "--calibrate", "--quantiles", ".1,.5,.9", "--state", state)
    code, records, err = tsgdn(*options, data=odd_rows())
    assert code == 0, err
    told = [json.loads(line) for line in alarms.read_text().splitlines()]
    at = str(START + np.timedelta64(50, "h"))[:19]
    assert any((one["item_id"], one["kind"], one["timestamp"]) == ("a", "anomaly", at) for one in told)
    assert "uncalibrated" in records[0]["flags"]
    assert all(np.isfinite(one["quantiles"]["0.5"]).all() for one in records)
    code, _, err = tsgdn("--state", state, data="")
    assert code == 2, "without them the states are others"
    assert err.count("\n") == 1
    code, again, _ = tsgdn(*options, data=odd_rows(62))
    assert (code, len(again)) == (0, 2), "what repeats moves nothing"
