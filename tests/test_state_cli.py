"""What an operator does with a store: reading never disturbs a stream, writing never loses or doubles anything."""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import fakeredis
import numpy as np
import pytest
import torch

from tsgdn.cli import state_move
from tsgdn.cli import stores as cli_stores
from tsgdn.cli.main import main
from tsgdn.model.forecaster import Forecaster
from tsgdn.streaming.durable import DurablePredictor
from tsgdn.streaming.predictor import StatefulPredictor
from tsgdn.streaming.state_records import layout
from tsgdn.streaming.stores import DeadLetter, open_store, record, shards
from tsgdn.streaming.stores.redis import RedisStore
from tsgdn.streaming.stores.shards import REGISTERED
from tsgdn.streaming.stores.sqlite import SqliteStore

START, HOUR = np.datetime64("2026-03-01T00", "ns"), np.timedelta64(1, "h")
ITEMS = ("a", "b,c", "d\xa0", "e")
KEY = bytes(range(32))


def make_model(seed: int = 0) -> Forecaster:
    torch.manual_seed(seed)
    return Forecaster(4, 2, (1, 6), width=8, depth=1, mixer_args={"heads": 1, "key_dim": 4}, variate_every=0).eval()


def make_predictor(seed: int = 0) -> StatefulPredictor:
    return StatefulPredictor(make_model(seed), freq="h", calendar=False, device="cpu")


def rows_of(step: int, items: tuple[str, ...] = ITEMS) -> list[tuple[str, np.datetime64, float]]:
    return [(item, START + step * HOUR, float(10 * place + step)) for place, item in enumerate(items)]


def durable(folder: Path, *, seed: int = 0, key: bytes | None = None) -> DurablePredictor:
    return DurablePredictor(make_predictor(seed), open_store(folder, key=key), key=key, checkpoint_every=1e9)


def fill(stream: DurablePredictor, steps: int = 6) -> None:
    """`ITEMS`; "a" ends two steps earlier."""
    for step in range(steps):
        stream.observe(rows_of(step, ITEMS if step < steps - 2 else ITEMS[1:]), offset=b"%d" % step)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "store"
    stream = durable(folder)
    fill(stream)
    stream.close()
    return folder


@pytest.fixture
def store(made, tmp_path) -> Path:
    return shutil.copytree(made, tmp_path / "store")


def run(capsys, *argv: Any) -> tuple[int, str, str]:
    code = main(["state", *map(str, argv)])
    return code, *capsys.readouterr()


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def refused(capsys, *argv: Any) -> str:
    """The one line of a refusal."""
    code, out, err = run(capsys, *argv)
    assert (code, out) == (2, "")
    assert err.startswith("tsgdn state: ") and err.count("\n") == 1
    return err


def states_of(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    stream = durable(folder)
    found = {item: stream.predictor.state_tensors([item]) for item in stream.predictor.item_ids}
    stream.store.close()
    return found


def assert_same(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(leaf.nan_to_num(7.0), theirs[name].nan_to_num(7.0)) for name, leaf in mine.items())


def spoil(folder: Path, item: str) -> None:
    """Changes a byte of a record behind the store's back."""
    with closing(sqlite3.connect(folder / "00.sqlite")) as db, db:
        where = "WHERE slot=(SELECT slot FROM item WHERE item_id=?)"
        (data,) = db.execute(f"SELECT record FROM state {where}", (item.encode(),)).fetchone()
        db.execute(
            f"UPDATE state SET record=? {where}", (data[:110] + bytes([data[110] ^ 1]) + data[111:], item.encode())
        )


def settle(folder: Path, use) -> None:
    """Something done to a store by an owner of the model."""
    predictor, owner = make_predictor(), open_store(folder)
    owner.open(model=bytes.fromhex(predictor.fingerprint), layout=layout(predictor)[1], owner="test")
    use(owner)
    owner.close()


def die_at_commit(number: int) -> None:
    """Ends this process before a commit, as a kill would."""
    real, left = SqliteStore.commit, iter(range(number))

    def commit(self, *args, **options):
        if next(left, None) is None:
            os._exit(7)
        real(self, *args, **options)

    SqliteStore.commit = commit  # type: ignore[method-assign]


# ---- ls, show


def test_help_loads_no_torch():
    code = (
        "import sys\nfrom tsgdn.cli.main import main\n"
        "for argv in ([], ['reshard']):\n    try: main(['state', *argv, '--help'])\n    except SystemExit: pass\n"
        "print([name for name in ('torch', 'pandas', 'redis') if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stderr == "[]\n"
    assert all(name in done.stdout for name in ("ls", "show", "export", "import", "diff", "prune", "--into"))


def test_ls_tells_how_far_each_series_is(store, capsys):
    code, out, err = run(capsys, "ls", store, "--json")
    assert (code, err) == (0, "")
    found = {row.pop("item_id"): row for row in lines(out)}
    assert found.keys() == set(ITEMS)
    size = found["e"].pop("bytes")
    assert size > 500
    assert found["e"] == {"head": 6, "time": "2026-03-01 05:00", "values": 6, "tick": 6, "shard": 0}
    assert (found["a"]["head"], found["a"]["time"]) == (4, "2026-03-01 03:00")
    code, out, _ = run(capsys, "ls", store)
    assert len(out.splitlines()) == 5
    assert "d\\xa0" in out
    assert lines(run(capsys, "ls", store, "--json", "--prefix", "b")[1])[0]["item_id"] == "b,c"
    assert [len(lines(run(capsys, "ls", store, "--json", "--limit", n)[1])) for n in (1, 3, 9)] == [1, 3, 4]
    assert "--limit is 0" in refused(capsys, "ls", store, "--limit", 0)


def test_a_damaged_series_is_marked_and_the_others_are_listed(store, capsys):
    spoil(store, "a")
    code, out, _ = run(capsys, "ls", store, "--json")
    rows = {row["item_id"]: row for row in lines(out)}
    assert code == 0
    assert rows["a"]["lost"] == "state.checksum"
    assert all("head" in rows[item] for item in ITEMS[1:])
    assert "lost: state.checksum" in run(capsys, "ls", store)[1]
    code, out, err = run(capsys, "show", store, "a")
    assert (code, out) == (1, "")
    assert "'a' is lost (state.checksum)" in err


def test_reading_needs_no_lease_and_leaves_a_running_stream_alone(tmp_path, capsys):
    stream = durable(tmp_path / "store")
    fill(stream)
    stream.checkpoint()
    stream.observe(rows_of(6))
    assert len(lines(run(capsys, "ls", tmp_path / "store", "--json")[1])) == 4
    code, out, _ = run(capsys, "show", tmp_path / "store", "--json")
    (told,) = json.loads(out)["shards"]
    assert code == 0
    assert (told["running"], told["pid"], told["epoch"], told["journal"]) == (True, os.getpid(), stream.epoch, 1)
    assert run(capsys, "diff", tmp_path / "store", tmp_path / "store")[0] == 0
    assert run(capsys, "export", tmp_path / "store", tmp_path / "copy")[0] == 0
    assert "in use" in refused(capsys, "prune", tmp_path / "store", "--dead-before", 3)
    assert "journal" in refused(capsys, "import", tmp_path / "store", tmp_path / "copy")
    assert "in use" in refused(capsys, "reshard", tmp_path / "store", "--into", tmp_path / "new", "--shards", 2)
    stream.observe(rows_of(7))
    stream.close()
    twin = make_predictor()
    for step in range(6):
        twin.observe(rows_of(step, ITEMS if step < 4 else ITEMS[1:]))
    twin.observe(rows_of(6))
    copied = states_of(tmp_path / "copy")  # with the tick that was in the journal alone
    for item in ITEMS:
        assert_same(copied[item], twin.state_tensors([item]))


def test_a_series_that_is_deleted_while_it_is_listed_is_not_called_lost(store, monkeypatch, capsys):
    real = SqliteStore.read

    def late(self, item_ids):
        if not hasattr(self, "_once"):
            self._once = True
            if list(item_ids) != ["a"]:
                with closing(sqlite3.connect(store / "00.sqlite")) as db, db:
                    sub = "(SELECT slot FROM item WHERE item_id=CAST('a' AS BLOB))"
                    db.execute(f"DELETE FROM state WHERE slot={sub}")
        found = real(self, item_ids)
        if list(item_ids) != ["a"]:
            with closing(sqlite3.connect(store / "00.sqlite")) as db, db:
                db.execute("DELETE FROM item WHERE item_id=CAST('a' AS BLOB)")
        return found

    monkeypatch.setattr(SqliteStore, "read", late)
    rows = lines(run(capsys, "ls", store, "--json")[1])
    assert {row["item_id"] for row in rows} == set(ITEMS[1:])
    assert not any("lost" in row for row in rows)


def test_a_reader_that_leaves_early_is_no_error(store):
    def many(owner):
        data = dict(owner.records())["a"]
        plain = record.unpack(data)._replace(epoch=owner.epoch)
        owner.commit({f"s{i}": record.pack(plain._replace(item_id=f"s{i}", leaves=b"")) for i in range(3000)})

    settle(store, many)
    argv = [sys.executable, "-m", "tsgdn", "state", "ls", str(store)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert b"item_id" in process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_progress_is_told_on_a_terminal_and_wiped_at_the_end(store, monkeypatch, capsys):
    assert run(capsys, "ls", store)[2] == ""
    monkeypatch.setattr(cli_stores, "PAUSE", 0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    err = run(capsys, "ls", store)[2]
    assert "4 of 4 series" in err
    assert err.endswith("\r\x1b[K")


def test_show_tells_offsets_deletions_dead_letters_and_what_a_series_holds(store, capsys):
    stream = durable(store)
    stream.observe([("e", START + 50_000 * HOUR, 1.0)])
    assert stream.predictor.held()
    stream.delete(["a"])
    stream.store.commit(dead=[DeadLetter("row.column", "e", b"\xff\x00bad", 3)])
    stream.close()
    (told,) = json.loads(run(capsys, "show", store, "--json")[1])["shards"]
    assert told["offsets"]["rows"] == "5"
    assert told["tombstones"] == {"a": 7}
    assert told["dead_letters"] == [{"tick": 3, "code": "row.column", "item_id": "e", "raw": "0xff00626164"}]
    assert told["model"] == make_predictor().fingerprint
    code, out, _ = run(capsys, "show", store)
    assert code == 0
    assert "dead_letters  1" in out and "row.column" in out
    told = json.loads(run(capsys, "show", store, "e", "--json")[1])
    assert (told["head"], told["count"], told["last"]) == (6, 6, "2026-03-01 05:00")
    assert [row["values"] for row in told["held"]] == [[1.0]]
    assert "deleted at tick 7" in refused(capsys, "show", store, "a")
    assert "no series 'zz'" in refused(capsys, "show", store, "zz")


def test_show_names_the_leaves_with_the_model_and_refuses_another(store, tmp_path, capsys):
    from tsgdn.model.artefact import save

    info = {"freq": "h", "calendar": False}
    mine, other = save(make_model(), tmp_path / "m", series=info), save(make_model(1), tmp_path / "o", series=info)
    told = json.loads(run(capsys, "show", store, "e", "--model", mine, "--json")[1])
    want = states_of(store)["e"]
    assert {leaf["name"] for leaf in told["leaves"]} == want.keys()
    for leaf in told["leaves"]:
        tensor = want[leaf["name"]][0].double()
        finite = tensor[tensor.isfinite()]
        assert leaf["shape"] == list(tensor.shape)
        assert leaf["nonfinite"] == tensor.numel() - finite.numel()
        assert leaf["mean"] == (float(finite.mean()) if finite.numel() else None)
    assert run(capsys, "show", store, "e", "--model", mine)[0] == 0
    assert "is model" in refused(capsys, "show", store, "e", "--model", other)
    assert "layout" in refused(capsys, "show", store, "e", "--model", mine, "--late-window", 1)
    assert "ITEM" in refused(capsys, "show", store, "--model", mine)


def test_a_sealed_store_needs_its_key(tmp_path, capsys):
    stream = durable(tmp_path / "store", key=KEY)
    fill(stream)
    stream.close()
    good, short, text = (tmp_path / name for name in ("good", "short", "text"))
    good.write_text(KEY.hex() + "\n")
    short.write_text("ab" * 8)
    text.write_text("secret")
    assert "give the key" in refused(capsys, "ls", tmp_path / "store")
    assert "8 bytes" in refused(capsys, "ls", tmp_path / "store", "--state-key", short)
    assert "hexadecimal" in refused(capsys, "ls", tmp_path / "store", "--state-key", text)
    key = ("--state-key", good)
    assert len(lines(run(capsys, "ls", tmp_path / "store", "--json", *key)[1])) == 4
    assert run(capsys, "reshard", tmp_path / "store", "--into", tmp_path / "new", "--shards", 2, *key)[0] == 0
    assert run(capsys, "diff", tmp_path / "store", tmp_path / "new", *key)[0] == 0


# ---- export, import, diff


def test_records_go_through_a_file_bit_by_bit(store, tmp_path, capsys):
    want, file = states_of(store), tmp_path / "some.tsgs"
    code, out, _ = run(capsys, "export", store, file, "--items", '"b,c",a', "--json")
    assert (code, json.loads(out)["series"]) == (0, 2)
    stream = durable(store)
    stream.delete(["b,c"])
    stream.observe(rows_of(4, ("a",)))
    stream.close()
    newer = states_of(store)["a"]
    told = json.loads(run(capsys, "import", store, file, "--json")[1])
    assert told == {"imported": 0, "kept": 1, "deleted": 1, "restored": 0, "lost": 0}
    assert_same(states_of(store)["a"], newer)
    told = json.loads(run(capsys, "import", store, file, "--replace", "--json")[1])
    assert told["imported"] == 2
    found = states_of(store)
    assert_same(found["a"], want["a"])
    assert_same(found["b,c"], want["b,c"])


def test_a_lost_series_is_restored_from_a_copy_and_streams_on(store, tmp_path, capsys):
    want = states_of(store)["a"]
    assert run(capsys, "export", store, tmp_path / "copy")[0] == 0
    spoil(store, "a")
    told = json.loads(run(capsys, "import", store, tmp_path / "copy", "--json")[1])
    assert told == {"imported": 1, "kept": 3, "deleted": 0, "restored": 1, "lost": 0}
    stream = durable(store)
    assert not stream.recovery.lost
    assert_same(stream.predictor.state_tensors(["a"]), want)
    assert stream.observe(rows_of(6)).accepted == 4
    stream.store.close()  # as if it were killed: the tick is in the journal alone
    again = durable(store)
    assert again.recovery.ticks == 1
    assert [again.predictor.head(item) for item in ITEMS] == [7] * 4
    again.close()


def test_an_import_that_is_killed_leaves_whole_records_and_no_tick_is_passed_over(store, tmp_path, monkeypatch, capsys):
    file = tmp_path / "all.tsgs"
    assert run(capsys, "export", store, file)[0] == 0
    stream = durable(store)
    stream.delete(list(ITEMS))
    stream.close()
    assert not states_of(store)
    monkeypatch.setattr(state_move, "SLICE", 1)  # a commit per record
    for last in range(7):
        place = shutil.copytree(store, tmp_path / f"try{last}")
        pid = os.fork()
        if pid == 0:  # pragma: no cover
            die_at_commit(last)
            os._exit(main(["state", "import", str(place), str(file), "--replace"]))
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert status == (7 if last < 5 else 0)
        stream = durable(place)
        there = set(stream.predictor.item_ids)
        assert len(there) == min(4, max(0, last - 1))
        stream.observe(rows_of(6, tuple(ITEMS)))
        heads = {item: stream.predictor.head(item) for item in ITEMS}
        stream.store.close()
        again = durable(place)
        assert {item: again.predictor.head(item) for item in ITEMS} == heads
        assert all(heads[item] == (7 if item in there else 1) for item in ITEMS)
        again.close()
    capsys.readouterr()


def test_records_of_another_model_and_damaged_files_are_refused_as_a_whole(store, tmp_path, capsys):
    file = tmp_path / "all.tsgs"
    assert run(capsys, "export", store, file)[0] == 0
    other = durable(tmp_path / "other", seed=1)
    fill(other)
    other.close()
    before = (tmp_path / "other/00.sqlite").read_bytes()
    assert "is of model" in refused(capsys, "import", tmp_path / "other", file)
    assert "is of model" in refused(capsys, "import", tmp_path / "other", store)
    whole = file.read_bytes()
    for name, data, text in (
        ("short", whole[:-1], "ends within record 4 of 4"),
        ("head", whole[:15], "no file of tsgdn state export"),
        ("long", whole + b"x", "goes on behind"),
        ("flipped", whole[:300] + bytes([whole[300] ^ 1]) + whole[301:], "record 1: a record is not what was written"),
        ("newer", whole[:8] + b"\x02" + whole[9:], "upgrade"),
        ("huge", whole[:20] + b"\xff" * 8 + whole[28:], "ends within record 1"),
        ("text", b"item_id,timestamp\n", "no file of"),
    ):
        wrong = tmp_path / f"{name}.tsgs"
        wrong.write_bytes(data)
        assert text in refused(capsys, "import", store, wrong, "--replace")
    assert (tmp_path / "other/00.sqlite").read_bytes() == before
    assert run(capsys, "diff", store, tmp_path / "other", "--json")[0] == 1


def test_an_export_that_fails_leaves_no_file(store, tmp_path, capsys):
    assert "no series 'zz'" in refused(capsys, "export", store, tmp_path / "x.tsgs", "--items", "a,zz")
    (tmp_path / "there.tsgs").write_text("mine")
    assert "exists" in refused(capsys, "export", store, tmp_path / "there.tsgs")
    assert "exists" in refused(capsys, "export", store, store)
    assert ".tsgs" in refused(capsys, "export", store, tmp_path / "new", "--items", "a")
    assert {path.name for path in tmp_path.iterdir()} == {"store", "there.tsgs"}
    assert (tmp_path / "there.tsgs").read_text() == "mine"


def test_diff_names_what_is_only_in_one_and_what_differs(store, tmp_path, capsys):
    copy = tmp_path / "copy"
    assert run(capsys, "export", store, copy)[0] == 0
    code, out, err = run(capsys, "diff", store, copy, "--json", "--seq")
    assert (code, out) == (0, "")
    assert "4 series are the same" in err
    stream = durable(copy)
    stream.observe([("e", START + 6 * HOUR, 1.0), ("new", START, 1.0)])
    stream.delete(["a"])
    stream.close()
    spoil(copy, "b,c")
    code, out, _ = run(capsys, "diff", store, copy, "--json")
    found = {row.pop("item_id"): row for row in lines(out)}
    assert code == 1
    assert found["a"] == {"only_in": "a"}
    assert found["new"] == {"only_in": "b"}
    assert found["b,c"] == {"lost_in": "b", "code": "state.checksum"}
    assert {"head", "count", "leaves"} <= set(found["e"]["differs"])
    assert (found["e"]["a"]["head"], found["e"]["b"]["head"]) == (6, 7)
    assert found.keys() == {"a", "new", "b,c", "e"}
    assert "only in B" in run(capsys, "diff", store, copy)[1]


# ---- prune


def test_prune_says_what_goes_and_then_lets_it_go(store, capsys):
    stream = durable(store)
    stream.delete(["b,c"])
    stream.store.commit(dead=[DeadLetter("x", "", b"1", 2), DeadLetter("y", "", b"2", 9)])
    stream.close()
    argv = ["prune", store, "--older-than", "1h", "--tombstones-before", 7, "--dead-before", 9, "--json"]
    before = (store / "00.sqlite").read_bytes()
    dry = json.loads(run(capsys, *argv, "--dry-run")[1])
    assert (store / "00.sqlite").read_bytes() == before
    assert dry == {
        "dry_run": True,
        "series": [{"item_id": "a", "last": "2026-03-01 03:00"}],
        "tombstones": [{"item_id": "b,c", "tick": 6}],
        "dead_letters": [{"tick": 2, "code": "x", "item_id": ""}],
    }
    assert json.loads(run(capsys, *argv)[1]) == {**dry, "dry_run": False}
    assert set(states_of(store)) == set(ITEMS) - {"a", "b,c"}
    view = open_store(store).view()
    assert view.tombstones() == {"a": 6}
    assert [letter.code for letter in view.dead_letters()] == ["y"]
    view.close()
    assert "0 series" in run(capsys, "prune", store, "--older-than", "2h")[1]


# ---- reshard


def digest_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.sqlite")}


def test_resharding_there_and_back_changes_no_state(store, tmp_path, capsys):
    stream = durable(store)
    stream.predictor.register(["known"])
    stream.delete(["b,c"])
    stream.store.commit(dead=[DeadLetter("x", "e", b"1", 2)])
    stream.close()
    settle(store, lambda owner: owner.quarantine("a", "state.checksum"))
    old, want = digest_of(store), states_of(shutil.copytree(store, tmp_path / "oracle"))
    assert run(capsys, "reshard", store, "--into", tmp_path / "three", "--shards", 3)[0] == 0
    assert digest_of(store) == old
    manifest = json.loads((tmp_path / "three/shards.json").read_text())
    assert (manifest["shards"], manifest["hash"]) == (3, shards.HASH)
    assert run(capsys, "diff", store, tmp_path / "three", "--seq")[:2] == (0, "")
    for row in lines(run(capsys, "ls", tmp_path / "three", "--json")[1]):
        assert row["shard"] == shards.shard_of(row["item_id"], 3)
    assert run(capsys, "reshard", tmp_path / "three", "--into", tmp_path / "one", "--shards", 1)[0] == 0
    (told,) = json.loads(run(capsys, "show", tmp_path / "one", "--json")[1])["shards"]
    assert told["offsets"] == {"rows": "5", REGISTERED: '["known"]'}
    assert (told["lost"], told["tombstones"]) == ({"a": "state.checksum"}, {"b,c": 6})
    assert [letter["tick"] for letter in told["dead_letters"]] == [2]
    stream = durable(tmp_path / "one")
    for item in want:
        assert_same(stream.predictor.state_tensors([item]), want[item])
    assert stream.observe(rows_of(6, ("e",))).accepted == 1
    stream.store.close()
    assert states_of(tmp_path / "one")["e"]["ledger.head"].tolist() == [7]
    assert {path.name for path in tmp_path.iterdir()} == {"store", "oracle", "three", "one"}


def test_reshard_refuses_what_would_lose_something(store, tmp_path, capsys):
    new = ("--into", tmp_path / "new", "--shards")
    assert run(capsys, "reshard", store, "--into", tmp_path / "two", "--shards", 2)[0] == 0
    half = tmp_path / "half"
    half.mkdir()
    shutil.copy(tmp_path / "two/01.sqlite", half)
    code, _, err = run(capsys, "reshard", half, *new, 1)
    assert code == 2
    assert "give all of them" in err
    assert "twice" in refused(capsys, "reshard", store, store, *new, 1)
    copy = tmp_path / "copy"
    assert run(capsys, "export", store, copy)[0] == 0
    assert "in two stores" in refused(capsys, "reshard", store, copy, *new, 1)
    assert "exists" in refused(capsys, "reshard", store, "--into", copy, "--shards", 1)
    assert "--shards is 0" in refused(capsys, "reshard", store, *new, 0)
    stream = durable(copy)
    stream.observe(rows_of(6))
    stream.store.close()
    assert "writes a checkpoint" in refused(capsys, "reshard", copy, *new, 1)
    settle(store, lambda owner: owner.commit(outbox={b"1": b"m"}))
    assert "outbox" in refused(capsys, "reshard", store, *new, 1)
    assert not (tmp_path / "new").exists()
    assert not list(tmp_path.glob("*partial*"))


def test_offsets_on_which_shards_do_not_agree_are_named_and_dropped(store, tmp_path, capsys):
    assert run(capsys, "reshard", store, "--into", tmp_path / "two", "--shards", 2)[0] == 0
    predictor = make_predictor()
    one = open_store(tmp_path / "two", shard=1, shards=2)
    one.open(model=bytes.fromhex(predictor.fingerprint), layout=layout(predictor)[1], owner="test")
    one.commit(offsets={"rows": b"further", "other": b"1"})
    one.close()
    code, out, err = run(capsys, "reshard", tmp_path / "two", "--into", tmp_path / "one", "--shards", 1, "--json")
    assert code == 0
    assert json.loads(out)["dropped"] == ["rows", "other"]
    assert "rows, other" in err


def test_a_reshard_that_is_killed_leaves_the_old_stores_and_no_new_one(store, tmp_path, capsys):
    old, last = digest_of(store), 0
    while True:
        pid = os.fork()
        if pid == 0:  # pragma: no cover
            die_at_commit(last)
            argv = ["reshard", str(store), "--into", str(tmp_path / "new"), "--shards", "2"]
            os._exit(main(["state", *argv]))
        if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0:
            break
        assert not (tmp_path / "new").exists()
        last += 1
    assert last == 4  # numbers and records, of each of two
    assert digest_of(store) == old
    assert run(capsys, "diff", store, tmp_path / "new", "--seq")[0] == 0


def test_the_shard_of_a_name_never_changes():
    assert [shards.shard_of(item, 64) for item in ITEMS] == [32, 63, 57, 13]
    counts = np.bincount([shards.shard_of(f"s{i}", 8) for i in range(4000)], minlength=8)
    assert counts.min() > 400


# ---- Redis, and wrong arguments


def test_a_store_in_redis_is_listed_copied_imported_and_resharded(store, tmp_path, monkeypatch, capsys):
    server, real = fakeredis.FakeServer(), open_store

    def opened(url, **options):
        if not str(url).startswith("redis://"):
            return real(url, **options)
        return RedisStore(str(url), client=fakeredis.FakeRedis(server=server), **{**options, "unchecked": True})

    monkeypatch.setattr(cli_stores, "open_store", opened)
    address = "redis://me:secret@here/0"
    message = refused(capsys, "ls", address)
    assert "there is no store" in message
    assert "secret" not in message
    stream = DurablePredictor(make_predictor(), opened(address), checkpoint_every=1e9)
    fill(stream)
    assert "in use" in refused(capsys, "prune", address, "--dead-before", 2)
    stream.close()
    assert run(capsys, "diff", store, address)[0] == 0
    assert len(lines(run(capsys, "ls", address, "--json")[1])) == 4
    assert "secret" not in run(capsys, "show", address)[1]
    assert run(capsys, "export", address, tmp_path / "copy")[0] == 0
    assert run(capsys, "diff", address, tmp_path / "copy", "--seq")[0] == 0
    assert json.loads(run(capsys, "import", address, store, "--json")[1])["kept"] == 4
    assert run(capsys, "reshard", address, "--into", tmp_path / "two", "--shards", 2)[0] == 0
    assert run(capsys, "diff", address, tmp_path / "two", "--seq")[0] == 0


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["ls", "nowhere"], "there is no store in nowhere"),
        (["ls", "ftp://x"], "ftp:// is no kind of store"),
        (["ls", "file"], "is a file"),
        (["ls", "no-store"], "damaged"),
        (["prune", "nowhere"], "say what to prune"),
        (["prune", "nowhere", "--older-than", "soon"], "--older-than is 'soon'"),
        (["prune", "nowhere", "--dead-before", "0"], "expected a tick of 1"),
        (["import", "nowhere", "nothing"], "there is no nothing"),
        (["diff", "nowhere"], "STORE_B"),
        (["frobnicate"], "invalid choice"),
    ],
)
def test_wrong_arguments_are_told_in_one_line(argv, text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("x")
    Path("no-store").mkdir()
    Path("no-store/00.sqlite").write_text("x" * 5000)
    code, out, err = run(capsys, *argv)
    assert (code, out) == (1 if argv[1:] == ["no-store"] else 2, "")
    assert text in err
    assert err.count("\n") == 1
