"""Sources and sinks of `tsgdn stream`: each row counts once and each forecast gets out, whatever breaks in between."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import redis
import torch

from tsgdn.cli import redis_streams, sinks, sources
from tsgdn.cli.main import Misuse, main
from tsgdn.data.clock import Clock
from tsgdn.model import artefact
from tsgdn.model.forecaster import Forecaster
from tsgdn.streaming.durable import DurablePredictor
from tsgdn.streaming.predictor import StatefulPredictor
from tsgdn.streaming.stores import StoreFull, open_store

START = np.datetime64("2024-01-01T00:00:00", "ns")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    features = Clock("h").calendar_size
    model = Forecaster(patch_size=4, patches_ahead=2, seasons=(1, 24), known_features=features, width=16, depth=1)
    folder = tmp_path_factory.mktemp("model")
    artefact.save(model, folder, series={"freq": "h", "calendar": True, "variates": ["target"], "horizon": 3})
    return str(folder)


@pytest.fixture
def server():
    """A client of an imitation of a Redis server, and its address."""
    from fakeredis import TcpFakeServer

    server = TcpFakeServer(("127.0.0.1", 0))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    with redis.Redis(port=server.server_address[1], protocol=2) as client:
        yield client, f"redis://127.0.0.1:{server.server_address[1]}/0"
    server.shutdown()
    server.server_close()
    thread.join()


def iso(step):
    return str(START + np.timedelta64(step, "h"))[:19]


def row(step, item="a"):
    return {"item_id": item, "timestamp": iso(step), "target": round(float(np.sin(step)), 3)}


def rows(steps, items=("a",)):
    return [row(step, item) for step in steps for item in items]


def text(records):
    return "".join(json.dumps(one) + "\n" for one in records)


def feed(client, records, key="in"):
    return [client.xadd(key, {name: str(value) for name, value in one.items()}) for one in records]


@pytest.fixture
def tsgdn(model, monkeypatch, capsys):
    """Runs `tsgdn stream` in this process until a broker has nothing more: exit code, records on stdout, stderr."""
    read = redis_streams.RedisSource.lines

    def lines(self):
        for part in read(self):
            (group,) = [one for one in self.client.xinfo_groups(self.key) if one["name"] == self.group.encode()]
            end = self.client.xinfo_stream(self.key)["last-generated-id"]
            if part is None and group["last-delivered-id"] == end and redis_streams._text(self._at).encode() == end:
                return
            yield part

    monkeypatch.setattr(redis_streams.RedisSource, "lines", lines)
    monkeypatch.setattr(redis_streams, "PATIENCE", 0.01)

    def run(*options, data=""):
        out = io.BytesIO()
        stdout = io.TextIOWrapper(out, write_through=True)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data.encode())))
        try:
            with monkeypatch.context() as patch:
                patch.setattr(sys, "stdout", stdout)
                code = main(["stream", "--device", "cpu", "--model", model, *options])
        finally:
            run.err = capsys.readouterr().err
        return code, [json.loads(line) for line in out.getvalue().splitlines()], run.err

    return run


def told(records):
    """What forecasts say, without the numbers of their ticks."""
    return [{name: value for name, value in one.items() if name != "seq"} for one in records]


def head(model, state, item="a"):
    predictor = StatefulPredictor.from_pretrained(model, device="cpu")
    DurablePredictor(predictor, open_store(state)).store.close()
    return predictor.head(item)


def unread(client, key="in", group="tsgdn"):
    """Entries that the group has not acknowledged, delivered or not."""
    (info,) = [one for one in client.xinfo_groups(key) if one["name"] == group.encode()]
    return info["pending"] + len(client.xrange(key, "(" + info["last-delivered-id"].decode(), "+"))


# ---- Redis Streams as a source --------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["fields", "json"])
def test_entries_give_the_forecasts_that_lines_give(tsgdn, server, tmp_path, form):
    client, url = server
    records = rows(range(9), "ab")
    for one in records:
        client.xadd("in", {k: str(v) for k, v in one.items()} if form == "fields" else {"json": json.dumps(one)})
    _, want, _ = tsgdn(data=text(records))
    code, got, err = tsgdn("--source", f"{url}?stream=in", "--state", str(tmp_path))
    assert (code, told(got)) == (0, told(want))
    assert "18 accepted" in err
    assert unread(client) == 0


def test_a_missing_value_and_one_that_is_no_number_mean_the_same_in_fields(tsgdn, server, tmp_path):
    client, url = server
    feed(client, rows(range(3)))
    for step, value in ((3, ""), (4, "inf"), (4, "1_0"), (4, "2.5")):
        client.xadd("in", {"item_id": "a", "timestamp": iso(step), "target": value})
    letter = tmp_path / "dead"
    _, _, err = tsgdn("--source", f"{url}?stream=in", "--dead-letter", str(letter))
    assert "4 accepted, 1 missing" in err
    assert [json.loads(line)["code"] for line in letter.read_text().splitlines()] == ["value.nonfinite", "value.type"]


def test_an_entry_that_is_no_row_is_set_aside_once_and_stops_no_start(tsgdn, server, tmp_path, model):
    client, url = server
    names = [
        client.xadd("in", {"colour": "red"}),
        client.xadd("in", {"json": "{"}),
        client.xadd("in", {"item_id": b"\xff", "timestamp": iso(0), "target": "1"}),
        client.xadd("in", {"json": "{}", "target": "1"}),
        client.xadd("in", {"item_id": "a" * 70_000, "timestamp": iso(0), "target": "1"}),
    ]
    letter = tmp_path / "dead"
    options = ("--source", f"{url}?stream=in", "--state", str(tmp_path / "state"), "--dead-letter", str(letter))
    assert tsgdn(*options)[:2] == (0, [])
    assert unread(client) == 0, "also where nothing but such entries came"
    feed(client, rows(range(2)))
    assert len(tsgdn(*options)[1]) == 2
    bad = [json.loads(line) for line in letter.read_text().splitlines()]
    codes = ["row.column", "json.syntax", "line.utf8", "row.column", "line.too_long"]
    assert [(one["entry"], one["code"]) for one in bad] == list(zip([n.decode() for n in names], codes, strict=True))


class Crash(Exception):
    pass


@pytest.mark.parametrize("durability", ["normal", "memory"])
@pytest.mark.parametrize("crash", ["read", "observed", "sent", "acknowledged"])
def test_a_crash_at_any_step_of_a_tick_loses_no_entry_and_counts_none_twice(
    tsgdn, server, tmp_path, model, monkeypatch, crash, durability
):
    client, url = server
    feed(client, rows(range(12), "ab"))
    _, want, _ = tsgdn("--tick", "2", data=text(rows(range(12), "ab")))
    owner, name = {
        "read": (redis_streams.RedisSource, "after"),
        "observed": (DurablePredictor, "observe"),
        "sent": (sinks.Append, "send"),
        "acknowledged": (redis_streams.RedisSource, "acknowledge"),
    }[crash]
    real = getattr(owner, name)
    options = ("--source", f"{url}?stream=in", "--tick", "2", "--state", str(tmp_path / "state"))
    options += ("--sink", str(tmp_path / "out"), "--durability", durability)
    for stops in (1, 4, 2):
        calls = []

        def broken(self, *args, calls=calls, stops=stops, **more):
            calls.append(1)
            if crash == "read" and len(calls) == stops:
                raise Crash
            result = real(self, *args, **more)
            if len(calls) == stops:
                raise Crash
            return result

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, broken)
            if durability == "memory":
                patch.setattr(DurablePredictor, "close", lambda self: self.store.close())  # as in a kill
            with contextlib.suppress(Crash):
                tsgdn(*options)
    code, _, err = tsgdn(*options)
    assert code == 0
    assert "0 duplicate, 0 late" in err
    got = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert list({one["id"]: one for one in got}.values()) == want
    if durability == "normal":
        assert len(got) - len(want) <= 2 * 3, "one tick again per crash"
    assert unread(client) == 0


def test_without_a_journal_entries_are_acknowledged_with_the_checkpoint(tsgdn, server, tmp_path, monkeypatch):
    client, url = server
    feed(client, rows(range(5)))
    seen = []
    real = DurablePredictor.close
    monkeypatch.setattr(DurablePredictor, "close", lambda self: (seen.append(unread(client)), real(self)))
    tsgdn("--source", f"{url}?stream=in", "--state", str(tmp_path), "--durability", "memory")
    assert seen == [5]
    assert unread(client) == 0


def test_entries_of_a_tick_that_the_store_refused_are_not_acknowledged(tsgdn, server, tmp_path, model, monkeypatch):
    client, url = server
    feed(client, rows(range(5)))
    options = ("--source", f"{url}?stream=in", "--state", str(tmp_path))
    from tsgdn.streaming.stores.sqlite import SqliteStore

    def full(self, ticks, *, seq):
        raise StoreFull("no room: free some")

    with monkeypatch.context() as patch:
        patch.setattr(SqliteStore, "append", full)
        code, records, err = tsgdn(*options)
    assert (code, records) == (1, [])
    assert err.splitlines()[-1].endswith("no room: free some")
    assert unread(client) == 5
    assert len(tsgdn(*options)[1]) == 5


@pytest.mark.parametrize("call", ["_new", "_range", "_group", "_acknowledge"])
def test_an_answer_that_was_lost_with_its_connection_is_asked_for_again(tsgdn, server, tmp_path, monkeypatch, call):
    client, url = server
    options = ("--source", f"{url}?stream=in", "--state", str(tmp_path), "--tick", "1")
    feed(client, rows(range(3)))
    tsgdn(*options)
    feed(client, rows(range(3, 9)))
    if call == "_range":
        client.xreadgroup("tsgdn", "tsgdn", {"in": ">"}, count=4)  # delivered, and its reader is gone
    real, resume, left = getattr(redis_streams.RedisSource, call), redis_streams.RedisSource.resume, [1, 1]

    def lossy(self, *args):
        answer = real(self, *args)
        if left:
            left.pop()
            raise redis.ConnectionError("the line broke")
        return answer

    def then_break(self, *args, **more):
        resume(self, *args, **more)
        monkeypatch.setattr(redis_streams.RedisSource, call, lossy)

    monkeypatch.setattr(redis_streams, "COUNT", 2)
    monkeypatch.setattr(redis_streams.RedisSource, "resume", then_break)
    code, records, err = tsgdn(*options)
    assert not left
    assert (code, [one["origin"] for one in records]) == (0, [iso(step) for step in range(3, 9)])
    assert "6 accepted, 0 missing, 0 duplicate" in err
    assert "does not answer (the line broke); trying again" in err
    assert unread(client) == 0


def test_a_new_group_reads_the_stream_from_its_start_and_without_states_goes_on_where_it_was(tsgdn, server):
    client, url = server
    feed(client, rows(range(4)))
    options = ("--source", f"{url}?stream=in&group=g&consumer=c")
    assert len(tsgdn(*options)[1]) == 4
    feed(client, rows(range(4, 6)))
    client.xreadgroup("g", "c", {"in": ">"}, count=1)  # delivered, and its reader is gone
    feed(client, rows(range(6, 7)))
    assert [one["origin"] for one in tsgdn(*options)[1]] == [iso(step) for step in (4, 5, 6)]
    assert [one["origin"] for one in tsgdn(*options, "--from-start")[1]] == [iso(step) for step in range(7)]
    assert unread(client, group="g") == 0


def test_entries_that_wait_for_another_consumer_are_refused_or_taken_over(tsgdn, server, tmp_path):
    client, url = server
    feed(client, rows(range(6)))
    client.xgroup_create("in", "tsgdn", id="0")
    client.xreadgroup("tsgdn", "gone", {"in": ">"}, count=4)
    options = ("--source", f"{url}?stream=in", "--state", str(tmp_path))
    code, records, err = tsgdn(*options)
    assert (code, records, err.count("\n")) == (2, [], 1)
    assert "has delivered 4 entries to consumer gone that it did not acknowledge" in err
    code, records, _ = tsgdn(*options, "--takeover")
    assert (code, len(records)) == (0, 6)
    assert unread(client) == 0


def test_a_group_that_is_ahead_of_the_states_or_behind_them_does_not_matter(tsgdn, server, tmp_path):
    client, url = server
    names = feed(client, rows(range(6)))
    options = ("--source", f"{url}?stream=in", "--state", str(tmp_path))
    tsgdn(*options)
    feed(client, rows(range(6, 9)))
    for entry, _ in client.xreadgroup("tsgdn", "tsgdn", {"in": ">"}, count=2)[0][1]:
        client.xack("in", "tsgdn", entry)  # acknowledged by states that were lost with a disk
    _, more, err = tsgdn(*options)
    assert [one["origin"] for one in more] == [iso(step) for step in range(6, 9)]
    client.xgroup_setid("in", "tsgdn", names[1])
    feed(client, rows(range(9, 10)))
    _, last, err = tsgdn(*options)
    assert [one["origin"] for one in last] == [iso(9)]
    assert "1 accepted, 0 missing, 0 duplicate" in err
    client.xgroup_destroy("in", "tsgdn")
    feed(client, rows(range(10, 11)))
    assert [one["origin"] for one in tsgdn(*options)[1]] == [iso(10)]
    assert unread(client) == 0


def test_entries_that_were_deleted_unread_are_named_and_the_states_are_kept(tsgdn, server, tmp_path, model):
    client, url = server
    feed(client, rows(range(6)))
    options = ("--source", f"{url}?stream=in", "--state", str(tmp_path))
    tsgdn(*options)
    client.xtrim("in", maxlen=0, approximate=False)
    feed(client, rows(range(6, 8)))
    assert len(tsgdn(*options)[1]) == 2, "nothing was lost"
    feed(client, rows(range(8, 12)))
    client.xreadgroup("tsgdn", "tsgdn", {"in": ">"}, count=2)
    client.xtrim("in", maxlen=1, approximate=False)
    code, records, err = tsgdn(*options)
    assert (code, records, err.count("\n")) == (2, [], 2)  # and what was restored
    assert "entries after" in err
    assert head(model, tmp_path) == 8
    code, records, _ = tsgdn(*options, "--from-start")
    assert (code, [one["origin"] for one in records]) == (0, [iso(11)])


@pytest.mark.parametrize("what", ["deleted", "another"])
def test_a_stream_that_ends_before_the_states_is_refused(tsgdn, server, tmp_path, what):
    client, url = server
    feed(client, rows(range(6)))
    options = ("--source", f"{url}?stream=in", "--state", str(tmp_path))
    tsgdn(*options)
    client.delete("in")
    if what == "another":
        client.xadd("in", {name: str(value) for name, value in row(0).items()}, id="5-0")
    code, records, err = tsgdn(*options)
    assert (code, records) == (2, [])
    assert "give the stream that was read, or --from-start" in err


def test_a_file_and_then_a_stream_feed_one_state_and_then_both(tsgdn, server, tmp_path, model):
    client, url = server
    file = tmp_path / "rows.jsonl"
    file.write_text(text(rows(range(4))))
    _, want, _ = tsgdn(data=text(rows(range(9))))
    state = ("--state", str(tmp_path / "state"))
    stream = ("--source", f"{url}?stream=in")
    said = tsgdn("--source", str(file), *state)[1]
    feed(client, rows(range(4, 8)))
    said += tsgdn(*stream, *state)[1]
    assert told(said) == told(want[:8])
    assert tsgdn("--source", str(file), *stream, *state)[1] == [], "each is read on from its own place"
    feed(client, rows(range(7, 8)))
    file.write_text(text([*rows(range(4)), *rows(range(8, 9))]))
    code, said, _ = tsgdn("--source", str(file), *stream, *state)
    assert (code, told(said)) == (0, told(want[8:]))
    assert head(model, tmp_path / "state") == 9
    assert unread(client) == 0


def test_shards_that_stand_apart_in_a_stream_are_read_on_from_the_first_of_them(server):
    client, url = server
    entries = [name.decode() for name in feed(client, rows(range(3)))]
    source = redis_streams.RedisSource(f"{url}?stream=in", sources.Control(lambda text, **more: None))
    places = [json.dumps({"source": source.name, "entry": entry}).encode() for entry in entries]
    assert source.first([places[2], places[0], places[1]]) == places[0]
    assert source.first([places[2], None]) is None, "what was not acknowledged"
    source.resume(places[0])
    part = next(iter(part for part in source.lines() if part))
    assert [source.behind(line, places[1]) for line in part] == [True, False]
    assert not any(source.behind(line, None) for line in part)
    assert all(line.received == int(line.at.split("-")[0]) * 1_000_000 for line in part)
    source.close()


def test_a_place_in_another_source_is_not_taken_for_one_in_this(tsgdn, server, tmp_path):
    client, url = server
    file = tmp_path / "rows"
    file.write_text(text(rows(range(3))))
    state = ("--state", str(tmp_path / "state"))
    tsgdn("--source", str(file), *state)
    feed(client, rows(range(3, 6)))
    feed(client, rows(range(6, 8)), key="other")
    assert len(tsgdn("--source", f"{url}?stream=in", *state)[1]) == 3
    assert len(tsgdn("--source", f"{url}?stream=other", *state)[1]) == 2
    assert tsgdn("--source", f"{url}?stream=in", *state)[1] == []
    file.write_text(text(rows(range(3))) + text(rows(range(8, 9))))
    assert len(tsgdn("--source", str(file), *state)[1]) == 1


# ---- sinks ----------------------------------------------------------------------------------------------------------


def test_forecasts_go_to_a_stream_with_their_ids(tsgdn, server):
    client, url = server
    _, want, _ = tsgdn(data=text(rows(range(5), "ab")))
    code, records, _ = tsgdn("--sink", f"{url}?stream=out", data=text(rows(range(5), "ab")))
    assert (code, records) == (0, [])
    entries = [fields for _, fields in client.xrange("out")]
    assert [json.loads(fields[b"json"]) for fields in entries] == want
    for name in ("id", "item_id", "origin"):
        assert [fields[name.encode()].decode() for fields in entries] == [one[name] for one in want]


def test_a_sink_that_does_not_answer_is_waited_for_and_nothing_more_is_read(tsgdn, server, monkeypatch):
    client, url = server
    feed(client, rows(range(40)))
    monkeypatch.setattr(redis_streams, "COUNT", 4)
    real, away, waiting = redis_streams.RedisSink._add, [1] * 20, []

    def add(self, part):
        if away:
            away.pop()
            waiting.append(client.xinfo_groups("in")[0]["pending"])
            raise redis.TimeoutError("no answer")
        real(self, part)

    monkeypatch.setattr(redis_streams.RedisSink, "_add", add)
    code, _, err = tsgdn("--source", f"{url}?stream=in", "--sink", f"{url}?stream=out", "--tick", "1")
    assert code == 0
    assert set(waiting) == {4}
    assert err.count("does not answer (no answer); trying again") == 1
    assert client.xlen("out") == 40


def test_a_sink_that_fails_ends_the_stream_and_the_next_run_sends_what_is_missing(
    tsgdn, server, tmp_path, model, monkeypatch
):
    client, url = server
    feed(client, rows(range(9)))
    _, want, _ = tsgdn("--tick", "2", data=text(rows(range(9))))
    options = ("--source", f"{url}?stream=in", "--sink", f"{url}?stream=out", "--tick", "2")
    options += ("--state", str(tmp_path), "--checkpoint-every", "1e-9")
    real, calls = redis_streams.RedisSink._add, []

    def refuse(self, part):
        calls.append(part)
        if len(calls) == 3:
            raise redis.OutOfMemoryError("OOM command not allowed when used memory > 'maxmemory'")
        real(self, part)

    with monkeypatch.context() as patch:
        patch.setattr(redis_streams.RedisSink, "_add", refuse)
        code, _, err = tsgdn(*options)
    assert code == 1
    assert "--sink redis://127.0.0.1" in err.splitlines()[-1]
    assert "the server refuses: OOM" in err.splitlines()[-1]
    assert head(model, tmp_path) == 6, "no tick was taken in behind the one that could not be sent"
    assert tsgdn(*options)[0] == 0
    assert [json.loads(fields[b"json"]) for _, fields in client.xrange("out")] == want


def test_a_file_gets_forecasts_at_its_end_and_what_a_kill_cut_off_goes(tsgdn, tmp_path):
    file, data = tmp_path / "out", text(rows(range(6)))
    _, want, _ = tsgdn(data=data)
    tsgdn("--sink", str(file), data=text(rows(range(3))))
    whole = file.read_bytes()
    assert [json.loads(line) for line in whole.splitlines()] == want[:3]
    for torn in (b'{"i', b'{"id":"0123", "item', b'{"id":"' + b"0" * 200_000):
        file.write_bytes(whole + torn)
        tsgdn("--sink", str(file), data=text(rows(range(1))))
        assert file.read_bytes() == whole + whole.splitlines(True)[0]
    file.write_bytes(b'{"id":"')
    assert tsgdn("--sink", str(file), data=text(rows(range(1))))[0] == 0
    assert file.read_bytes() == whole.splitlines(True)[0]


def test_a_file_that_is_not_ours_is_left_alone(tsgdn, tmp_path):
    file = tmp_path / "out"
    file.write_text("dear diary")
    code, _, err = tsgdn("--sink", str(file), data=text(rows(range(3))))
    assert (code, err.count("\n")) == (2, 1)
    assert "its last line is no forecast" in err
    assert file.read_text() == "dear diary"


def test_a_full_disk_is_told_in_one_line_and_nothing_is_taken_in_behind_it(tsgdn, tmp_path, model):
    state = tmp_path / "state"
    code, _, err = tsgdn("--sink", "/dev/full", "--state", str(state), "--tick", "2", data=text(rows(range(6))))
    assert code == 1
    assert "No space left" in err.splitlines()[-1]
    assert head(model, state) == 2


def test_null_takes_everything(tsgdn):
    code, records, err = tsgdn("--sink", "null", data=text(rows(range(3))))
    assert (code, records) == (0, [])
    assert "3 forecasts" in err


# ---- addresses and logs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--source", "URL"], "which stream?"),
        (["--source", "URL?stream=in&flavour=sweet"], "unknown option 'flavour'"),
        (["--source", "URL?stream=in&stream=out"], "comes twice"),
        (["--source", "URL?stream="], "is empty"),
        (["--source", "URL?stream=text"], "the key holds a string"),
        (["--source", "URLx?stream=in"], "the database is '0x'"),
        (["--source", "URL?stream=in", "--follow"], "a broker is always followed"),
        (["--source", "URL?stream=in", "--format", "csv"], "expected jsonl or auto"),
        (["--source", "URL?stream=in", "--sink", "URL?stream=in"], "is the source"),
        (["--source", "redis://127.0.0.1:1/0?stream=in"], "does not answer"),
        (["--source", "redis://127.0.0.1:no/0?stream=in"], "the address cannot be read"),
        (["--source", "amqp://127.0.0.1/x"], "is an address of no kind that is known"),
        (["--sink", "URL"], "which stream?"),
        (["--sink", "URL?stream=out&group=g"], "unknown option 'group'"),
        (["--sink", "kafka://127.0.0.1/x"], "expected -, a file, redis:// or null"),
        (["--sink", "no/such/folder/x"], "No such file"),
        (["--sink", "."], "is a folder"),
        (["--source", "FILE", "--sink", "FILE"], "is the source"),
        (["--log", "yaml"], "--log"),
    ],
)
def test_a_wrong_source_or_sink_gets_one_line_and_exit_2(tsgdn, server, tmp_path, options, complaint):
    client, url = server
    client.set("text", "x")
    (tmp_path / "rows").write_text("")
    options = [one.replace("URL", url).replace("FILE", str(tmp_path / "rows")) for one in options]
    code, records, err = tsgdn(*options)
    assert (code, records, err.count("\n")) == (2, [], 1), err
    assert complaint in err


@pytest.mark.parametrize("option", ["--source", "--sink", "--state"])
@pytest.mark.parametrize(
    "address",
    [
        "redis://me:hunter2@127.0.0.1:1/0?stream=in",
        "redis://:hunter2@127.0.0.1:1/0?stream=in",
        "redis://me:hunter2@127.0.0.1:1/0",
        "redis://me:hunter2@127.0.0.1:one/0?stream=in",
        "redis://me:hun/hunter2@127.0.0.1:1/0?stream=in",
        "redis://me:1/hunter2@127.0.0.1:1/0?stream=in",
        "redis://me:hun#hunter2@127.0.0.1:1/0?stream=in",
        "redis://me:hun?hunter2@127.0.0.1:1/0?stream=in",
        "redis://me:hun@hunter2@127.0.0.1:1/0?stream=in",
        "redis://127.0.0.1:1/0?stream=in&password=hunter2",
        "redis://me:hunter2",
        "redis://[me:hunter2@127.0.0.1",
        "http://me:hunter2@127.0.0.1/x",
    ],
)
def test_no_message_holds_a_password(tsgdn, option, address):
    code, records, err = tsgdn(option, address)
    assert (code, records, err.count("\n")) == (2, [], 1)
    assert "hunter" not in err


def test_a_password_is_kept_out_of_the_store(tsgdn, server, tmp_path, monkeypatch):
    client, url = server
    feed(client, rows(range(3)))
    connect = redis.Redis.from_url  # the imitation of a server knows no passwords
    monkeypatch.setattr(redis.Redis, "from_url", lambda text, **more: connect(text.replace("me:hunter2@", ""), **more))
    address = url.replace("redis://", "redis://me:hunter2@") + "?stream=in"
    assert tsgdn("--source", address, "--state", str(tmp_path))[0] == 0
    files = [file.read_bytes() for file in tmp_path.iterdir()]
    assert any(b"?stream=in" in data for data in files)
    assert not any(b"hunter2" in data for data in files)


def test_logs_may_be_json(tsgdn, tmp_path):
    code, _, err = tsgdn("--log", "json", "--state", str(tmp_path), data="{\n" + text(rows(range(3))))
    assert code == 0
    bad, summary = [json.loads(line) for line in err.splitlines()]
    assert (bad["level"], bad["code"], bad["line"]) == ("warning", "json.syntax", 1)
    assert summary["level"] == "info"
    assert summary["counts"]["accepted"] == 3
    code, _, err = tsgdn("--log", "json", "--source", "no/such\n/file")
    (failure,) = [json.loads(line) for line in err.splitlines()]
    assert (code, failure["level"]) == (2, "error")
    assert "no such file" in failure["message"]


# ---- processes ------------------------------------------------------------------------------------------------------


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


def test_a_reader_that_pauses_stops_the_reading_and_loses_nothing(model):
    data = text(rows(range(20_000))).encode()
    with started(model, "--tick", "1", "--quantiles", ".5") as process:
        pipe = process.stdin.fileno()
        written = os.write(pipe, data[: data.index(b"\n") + 1])
        first = process.stdout.readline()  # it runs
        os.set_blocking(pipe, False)
        still = time.monotonic()
        while time.monotonic() - still < 3:
            try:
                written += os.write(pipe, data[written : written + 4096])
                still = time.monotonic()
            except BlockingIOError:
                time.sleep(0.05)
        assert written < 300_000 < len(data), "two pipes, a piece that was read, and no more"
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0
    origins = [json.loads(line)["origin"] for line in (first + out).splitlines()]
    assert origins == [iso(step) for step in range(len(origins))]
    assert f"{len(origins)} accepted".encode() in err


def wait_for(condition, seconds=90):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_request_to_stop_finishes_the_tick_of_a_stream_and_acknowledges_it(model, server, tmp_path):
    client, url = server
    feed(client, rows(range(6)))
    with started(model, "--source", f"{url}?stream=in", "--sink", f"{url}?stream=out", "--state", str(tmp_path)) as one:
        wait_for(lambda: client.xlen("out") == 6 or one.poll() is not None)
        one.send_signal(signal.SIGTERM)
        assert one.wait(60) == 0
        assert b"6 accepted" in one.stderr.read()
    assert unread(client) == 0
    assert head(model, tmp_path) == 6


def killed_again_and_again(tsgdn, model, server, folder, kills, steps):
    """Kills at random moments while rows come in; then compares with a run that nobody disturbed."""
    client, url = server
    rng = np.random.default_rng(0)
    records = rows(range(steps), "abc")
    _, want, _ = tsgdn("--tick", "3", data=text(records))
    options = ("--source", f"{url}?stream=in", "--sink", f"{url}?stream=out", "--state", str(folder), "--tick", "3")
    options += ("--checkpoint-every", "0.05")
    for kill in range(kills):
        feed(client, records[len(records) * kill // kills : len(records) * (kill + 1) // kills])
        enough = client.xlen("out") + int(rng.integers(1, len(records) // kills))
        with started(model, *options) as process:
            wait_for(lambda process=process, n=enough: client.xlen("out") >= n or process.poll() is not None)
            assert process.poll() is None, process.stderr.read()
    code, _, err = tsgdn(*options)
    assert code == 0
    assert " 0 duplicate, 0 late" in err
    said = [json.loads(fields[b"json"]) for _, fields in client.xrange("out")]
    assert list({one["id"]: one for one in said}.values()) == want
    assert len(said) - len(want) <= 3 * kills, "at most the last tick comes twice after a kill"
    assert unread(client) == 0


def test_a_killed_stream_counts_every_entry_once_and_sends_every_forecast(tsgdn, model, server, tmp_path):
    killed_again_and_again(tsgdn, model, server, tmp_path, kills=2, steps=120)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_stream_that_is_killed_again_and_again_counts_every_entry_once(tsgdn, model, server, tmp_path):
    killed_again_and_again(tsgdn, model, server, tmp_path, kills=30, steps=900)


# ---- Kafka ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def broker(monkeypatch):
    """A producer and the address of librdkafka's imitation of a broker: topics of four partitions."""
    kafka = pytest.importorskip("confluent_kafka", reason="needs confluent-kafka: pip install 'tsgdn[kafka]'")
    from tsgdn.cli.kafka import KafkaSource

    producer = kafka.Producer({"bootstrap.servers": "here", "test.mock.num.brokers": 1, "log_level": 0})
    address = "{0.host}:{0.port}".format(*producer.list_topics(timeout=10).brokers.values())
    monkeypatch.setattr(KafkaSource, "lines", until_nothing_comes(KafkaSource.lines))
    yield producer, f"kafka://{address}"
    producer.flush(10)


def until_nothing_comes(read):
    def lines(self):
        high = {p: self._consumer.get_watermark_offsets(self._place(p), timeout=10)[1] for p in self._partitions}
        low = {p: self._next.get(p, 0) for p in self._partitions}
        for part in read(self):
            for line in part or ():
                partition, offset = map(int, line.at.split(":"))
                low[partition] = offset + 1
            yield part
            if all(low[p] >= high[p] for p in high):
                return

    return lines


def produce(producer, records, topic="rows", partition=None):
    for one in records:
        where = ord(one["item_id"][0]) % 4 if partition is None else partition
        producer.produce(topic, json.dumps(one).encode(), partition=where)
    assert producer.flush(10) == 0


def by_item(records):
    return {item: [one for one in told(records) if one["item_id"] == item] for item in "ab"}


def test_messages_give_the_forecasts_that_lines_give_and_reading_goes_on_behind_the_states(tsgdn, broker, tmp_path):
    producer, url = broker
    records = rows(range(12), "ab")
    _, want, _ = tsgdn("--tick", "1", data=text(records))
    options = ("--source", f"{url}/rows?group=g", "--state", str(tmp_path), "--tick", "1")
    got = []
    for part in (records[:8], records[8:20], [], records[20:]):
        produce(producer, part)
        code, out, err = tsgdn(*options)
        assert code == 0
        assert f"{len(part)} rows" in err
        assert "0 duplicate, 0 late" in err
        got += out
    assert by_item(got) == by_item(want)


def test_a_crash_between_states_and_group_counts_no_message_twice(tsgdn, broker, tmp_path, monkeypatch):
    from tsgdn.cli.kafka import KafkaSource

    producer, url = broker
    produce(producer, rows(range(9), "ab"))
    options = ("--source", f"{url}/rows", "--state", str(tmp_path), "--tick", "2")
    calls = []

    def crash(self, offset):
        calls.append(offset)
        if len(calls) == 3:
            raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(KafkaSource, "acknowledge", crash)
        with pytest.raises(Crash):
            tsgdn(*options)
    code, _, err = tsgdn(*options)
    assert code == 0
    assert "12 accepted, 0 missing, 0 duplicate, 0 late" in err


def test_without_states_a_group_goes_on_where_it_was(tsgdn, broker):
    producer, url = broker
    produce(producer, rows(range(4)))
    options = ("--source", f"{url}/rows?group=h")
    assert len(tsgdn(*options)[1]) == 4
    produce(producer, rows(range(4, 6)))
    assert [one["origin"] for one in tsgdn(*options)[1]] == [iso(4), iso(5)]
    assert len(tsgdn(*options, "--from-start")[1]) == 6


def test_messages_that_are_no_rows_are_set_aside_with_their_place(tsgdn, broker, tmp_path):
    producer, url = broker
    producer.produce("rows", b"{", partition=1)
    producer.produce("rows", b"x" * 70_000, partition=1)
    producer.produce("rows", None, key=b"deleted", partition=1)
    produce(producer, rows(range(2)), partition=1)
    letter = tmp_path / "dead"
    code, records, _ = tsgdn("--source", f"{url}/rows", "--dead-letter", str(letter))
    assert (code, len(records)) == (0, 2)
    bad = [json.loads(line) for line in letter.read_text().splitlines()]
    assert [(one["entry"], one["code"]) for one in bad] == [("1:0", "json.syntax"), ("1:1", "line.too_long")]


def test_a_topic_that_ends_before_the_states_is_refused(tsgdn, broker, tmp_path):
    from tsgdn.cli.kafka import KafkaSource

    producer, url = broker
    produce(producer, rows(range(3)), partition=0)
    source = KafkaSource(f"{url}/rows", sources.Control(lambda *a, **k: None))
    for place, complaint in (({"0": 9}, "end before offset 9"), ({"7": 0}, "hold partition 7")):
        with pytest.raises(Misuse, match=complaint):
            source.resume(json.dumps({"source": source.name, "next": place}).encode())
    source.close()


@pytest.mark.parametrize(
    ("path", "complaint"),
    [
        ("", "which topic?"),
        ("/none", "Unknown topic"),
        ("/rows?flavour=sweet", "unknown option 'flavour'"),
    ],
)
def test_a_wrong_topic_gets_one_line_and_exit_2(tsgdn, broker, path, complaint):
    producer, url = broker
    produce(producer, rows(range(1)))
    code, records, err = tsgdn("--source", url + path)
    assert (code, records, err.count("\n")) == (2, [], 1)
    assert complaint in err


def test_a_killed_process_reads_a_topic_on_from_its_states(tsgdn, model, broker, tmp_path):
    producer, url = broker
    records = rows(range(60), "ab")
    produce(producer, records)
    _, want, _ = tsgdn("--tick", "1", data=text(records))
    out = tmp_path / "out"
    options = ("--source", f"{url}/rows", "--state", str(tmp_path / "state"), "--sink", str(out), "--tick", "1")
    with started(model, *options) as process:
        wait_for(lambda: process.poll() is not None or (out.exists() and out.read_bytes().count(b"\n") >= 20))
        assert process.poll() is None, process.stderr.read()
    code, _, err = tsgdn(*options)
    assert code == 0
    assert "0 duplicate, 0 late" in err
    said = {one["id"]: one for one in map(json.loads, out.read_text().splitlines())}
    assert by_item(said.values()) == by_item(want)
