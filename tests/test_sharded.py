"""Series spread over shards: the numbers are those of one predictor, and the shards can be spread anew."""

import numpy as np
import pytest
import torch

from tsgdn.data.series import Series
from tsgdn.model import artefact
from tsgdn.model.forecaster import Forecaster
from tsgdn.streaming.predictor import StatefulPredictor
from tsgdn.streaming.sharded import ShardedPredictor
from tsgdn.streaming.stores import StoreBusy, StoreRefused

START, HOUR = np.datetime64("2026-03-01T00", "ns"), np.timedelta64(1, "h")
ITEMS = [f"s{i}" for i in range(7)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    model = Forecaster(4, 2, (1, 6), width=16, depth=1, mixer_args={"heads": 1, "key_dim": 4}, variate_every=0)
    place = tmp_path_factory.mktemp("model")
    artefact.save(model, place, series={"freq": "h", "calendar": False, "variates": ["target"], "horizon": 3})
    return place


def rows_of(step, items=ITEMS):
    return [(item, START + step * HOUR, float(i + np.sin(step))) for i, item in enumerate(items)]


def made(folder, store=None, **options):
    options = {"shards": 3, "checkpoint_every": 1e9, **options}
    return ShardedPredictor(folder, store=store, device="cpu", exact=True, **options)


def single(folder):
    return StatefulPredictor.from_pretrained(folder, device="cpu", exact=True)


def assert_same(mine, theirs):
    assert mine.item_ids == theirs.item_ids
    assert np.array_equal(mine.values, theirs.values)
    assert np.array_equal(mine.start, theirs.start)
    assert mine.flags == theirs.flags


def test_shards_say_what_one_predictor_says_bit_by_bit(folder):
    shards, one = made(folder), single(folder)
    for step in range(6):
        bad = [("s1", START + (step + 1) * HOUR, "text")]
        assert shards.observe(rows_of(step) + bad)._replace(first={}) == one.observe(rows_of(step) + bad)._replace(
            first={}
        )
    order = ["s3", "s0", "s6"]
    assert_same(shards.forecast(order, horizon=2), one.forecast(order, horizon=2))
    assert_same(shards.step(rows_of(6, ITEMS[:2])), one.step(rows_of(6, ITEMS[:2])))
    assert set(shards.item_ids) == set(ITEMS) and len(shards) == 7
    assert "s0" in shards and "t" not in shards
    assert {shards.shard(item) for item in ITEMS} <= {0, 1, 2}
    history = Series("long", START, "h", np.random.default_rng(0).normal(size=(1, 20)))
    shards.warm_up([history])
    one.warm_up([history])
    assert_same(shards.forecast(["long"]), one.forecast(["long"]))
    assert shards.delete(["s0", "s1"]) == 2
    assert shards.evict("s2") == 1
    shards.reset("s3")
    assert set(shards.item_ids) == {"long", "s4", "s5", "s6"}
    assert shards.forecast([]).item_ids == ()


def test_a_kill_loses_nothing_and_shards_are_spread_anew(folder, tmp_path):
    one, said = single(folder), []
    shards = made(folder, tmp_path / "three")
    for step in range(5):
        shards.observe(rows_of(step), offset=b"%d" % step)
        one.observe(rows_of(step))
    with pytest.raises(StoreBusy):
        made(folder, tmp_path / "three", only=[1])
    shards._let_go()  # as a kill leaves it
    shards = made(folder, tmp_path / "three", log=said.append)
    assert said and all("ticks of the journal" in text for text in said)
    assert_same(shards.forecast(ITEMS), one.forecast(ITEMS))
    lags = [health.lag for health in shards.health()]
    assert lags == [5 if health.series else 0 for health in shards.health()]
    told = shards.reshard(2, tmp_path / "two")
    assert (told.series, told.dropped, shards.shards) == (7, [], 2)
    assert [health.lag for health in shards.health()] == [0, 0]
    shards.observe(rows_of(5), offset=b"5")
    one.observe(rows_of(5))
    assert_same(shards.forecast(ITEMS), one.forecast(ITEMS))
    shards.close()
    again = made(folder, tmp_path / "two", shards=2, only=[0])
    assert again.parts[0].recovery.offset == b"5"
    here = list(again.item_ids)
    assert_same(again.forecast(here), one.forecast(here))
    with pytest.raises(KeyError, match="belongs to shard 1"):
        again.observe(rows_of(6))
    with pytest.raises(ValueError, match="needs all 2 shards"):
        again.reshard(1, tmp_path / "one")
    again.close()
    with pytest.raises(StoreRefused, match="shards"):
        made(folder, tmp_path / "two", shards=3)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"shards": 0}, "expected 1 to 100"),
        ({"only": [3]}, "expected shards from 0 to 2"),
        ({"engine": "ray"}, "tsgdn stream --workers"),
    ],
)
def test_wrong_arguments_are_named(folder, options, text):
    with pytest.raises(ValueError, match=text):
        made(folder, **options)
    with pytest.raises(ValueError, match="live in memory"):
        made(folder).reshard(2, "anywhere")
