"""The Estimator trains, the Predictor predicts what the stream would, is saved without pickle and read back."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from tsgdn.adapters.gluonts import GDNEstimator, GDNPredictor, Instances, entry_series, period, series_entry
from tsgdn.adapters.predictor import ModelPredictor, picked_levels
from tsgdn.data.clock import clock
from tsgdn.data.series import Series
from tsgdn.evaluation import backtest
from tsgdn.model.forecaster import Forecaster
from tsgdn.types import Batch

H = 20


def small_model(known_features=0, **options) -> Forecaster:
    """Random weights; laws hold for any."""
    torch.manual_seed(3)
    sizes = {"patch_size": 4, "patches_ahead": 3, "seasons": (1, 24, 168), "width": 16, "depth": 2}
    model = Forecaster(known_features=known_features, **{**sizes, **options}).double().eval()
    with torch.no_grad():  # the head starts at zero: make every part count
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def make_series(length, item_id="a", V=1, seed=0, **fields) -> Series:
    rng = np.random.default_rng([seed, length, V])
    values = rng.normal(size=(V, length)).cumsum(-1) + 10
    names = ("target",) if V == 1 else tuple(f"v{i}" for i in range(V))
    return Series(item_id, np.datetime64("2021-03-01"), "h", values, variates=names, **fields)


def forecast_alone(model, series, horizon, calendar=False):
    """The plain way: the whole context at once, then the forecast."""
    known = future = None
    if calendar:
        grid = clock(series.freq)
        known = torch.from_numpy(grid.calendar(series.start, 0, len(series) + model.span)).double()[None]
        future = torch.from_numpy(grid.calendar(series.start, len(series), len(series) + 200)).double()[None]
    values = torch.from_numpy(series.values)[None]
    batch = Batch(values.nan_to_num(), values.isfinite(), known)
    with torch.no_grad():
        _, state = model(batch)
        return model.forecast(state, horizon, known=future)[0].numpy()


@pytest.mark.parametrize("horizon", [5, 12, H])
@pytest.mark.parametrize("calendar", [False, True])
def test_contexts_of_any_length_together_get_what_each_gets_alone(calendar, horizon):
    model = small_model(clock("h").calendar_size if calendar else 0)
    whole = make_series(300)
    whole.values[0, 50:80] = np.nan
    contexts = [whole.slice(0, n) for n in (7, 299, 100, 101, 8, 100)] + [make_series(n, f"b{n}") for n in (1, 33)]
    contexts.append(replace(whole.slice(0, 60), values=whole.values[:, :60] + 1.0))  # same name, other values
    predictor = ModelPredictor(model, calendar=calendar, cells=64)
    got = predictor.predict(contexts, horizon, model.quantile_levels)
    for context, values in zip(contexts, got, strict=True):
        np.testing.assert_allclose(values, forecast_alone(model, context, horizon, calendar), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("horizon", [5, 12, H])
def test_every_origin_in_one_pass_equals_a_forecast_from_each(horizon):
    model = small_model(clock("h").calendar_size)
    series = make_series(103, V=2)
    series.values[1, 30:33] = np.nan
    predictor = ModelPredictor(model, calendar=True)
    origins, values = predictor.forecast_origins(series, horizon, (0.1, 0.5, 0.9), first=10)
    np.testing.assert_array_equal(origins, np.arange(12, 104, 4))
    each = predictor.predict([series.slice(0, int(o)) for o in origins], horizon, (0.1, 0.5, 0.9))
    np.testing.assert_allclose(values, np.stack(each), rtol=1e-9, atol=1e-9)


def test_values_after_an_origin_do_not_change_its_forecast():
    model = small_model()
    series = make_series(80)
    origins, values = ModelPredictor(model).forecast_origins(series, 12, (0.5,))
    other = replace(series, values=np.where(np.arange(80) >= 40, -series.values, series.values))
    _, changed = ModelPredictor(model).forecast_origins(other, 12, (0.5,))
    before = origins <= 40
    np.testing.assert_array_equal(values[before], changed[before])
    assert (values[~before] != changed[~before]).all()


def test_known_features_beyond_a_context_are_used_as_far_as_they_go():
    model = small_model(known_features=1)
    series = make_series(60, known=np.random.default_rng(0).normal(size=(1, 100)))
    predictor = ModelPredictor(model)
    full, short = predictor.predict([series, replace(series, known=series.known[:, :60])], 12, (0.5,))
    assert (full != short).any()
    prefix = series.slice(0, 40)
    together = predictor.predict([prefix, series], 12, (0.5,))
    np.testing.assert_allclose(together[0], predictor.predict([prefix], 12, (0.5,))[0], rtol=1e-12)
    with pytest.raises(ValueError, match="fitted with 1 known features"):
        predictor.predict([replace(series, known=np.zeros((2, 60)))], 12, (0.5,))


def test_a_series_without_any_value_is_forecast_as_zero():
    empty = make_series(30)
    empty.values[:] = np.nan
    (values,) = ModelPredictor(small_model()).predict([empty], 12, (0.1, 0.9))
    assert not values.any()


def test_levels_between_the_fitted_ones_are_interpolated_and_tails_refused():
    values = np.array([0.0, 10.0, 30.0])
    got = picked_levels(values, levels=(0.1, 0.5, 0.9), wanted=(0.1, 0.3, 0.5, 0.8))
    np.testing.assert_allclose(got, [0, 5, 10, 25])
    with pytest.raises(ValueError, match="fit with them"):
        picked_levels(values, levels=(0.1, 0.5, 0.9), wanted=(0.95,))


@pytest.mark.filterwarnings("ignore:Period with BDay freq:FutureWarning")
@pytest.mark.parametrize("freq", ["h", "D", "B", "7D", "W-SUN", "W-WED", "MS", "ME", "QS", "YS", "15min", "10min"])
def test_a_series_goes_to_gluonts_and_comes_back(freq):
    start = clock(freq).timestamp(np.datetime64("2021-01-31" if freq == "ME" else "2021-01-01"), 0)[()]
    if freq.startswith("W"):
        start = np.datetime64("2021-01-03" if freq == "W-SUN" else "2021-01-06")
    series = Series("a", start, freq, np.array([[1.0, np.nan, 3.0]]), static=(2,))
    entry = series_entry(series)
    back = entry_series(entry, freq)
    first = np.datetime64("2021-01-01") if freq == "ME" else series.start  # GluonTS has months, not ends of months
    assert (back.item_id, back.start, back.static) == ("a", first, (2,))
    np.testing.assert_array_equal(back.values, series.values)
    later = period(series.timestamps[2], freq)
    assert later == entry["start"] + 2
    assert entry_series(entry).clock.seasons == series.clock.seasons


def entries_of(*lengths):
    return [series_entry(make_series(n, f"i{n}")) for n in lengths]


def test_a_predictor_forecasts_quantiles_and_comes_back_from_disk(tmp_path):
    from gluonts.model.predictor import Predictor

    series = {"freq": "h", "calendar": True, "variates": ["target"]}
    predictor = GDNPredictor(small_model(clock("h").calendar_size).float(), H, series)
    entries = entries_of(100, 30, 55)
    forecasts = list(predictor.predict(entries, num_samples=100))
    assert [f.item_id for f in forecasts] == ["i100", "i30", "i55"]
    assert all(f.start_date == e["start"] + len(e["target"]) for f, e in zip(forecasts, entries, strict=True))
    one = forecasts[0]
    assert one.quantile(0.5).shape == one.mean.shape == (H,)
    assert (one.quantile(0.01) < one.mean).all()
    assert (one.mean < one.quantile(0.99)).all()

    predictor.serialize(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"gluonts-config.json", "config.json", "model.safetensors", "README.md"}
    again = Predictor.deserialize(tmp_path)
    assert isinstance(again, GDNPredictor)
    assert again.prediction_length == H
    for before, after in zip(forecasts, again.predict(entries), strict=True):
        np.testing.assert_array_equal(before.forecast_array, after.forecast_array)
    assert json.loads((tmp_path / "config.json").read_text())["series"]["horizon"] == H


def test_multivariate_forecasts_have_variates_last(tmp_path):
    from gluonts.ev.metrics import MASE, MeanWeightedSumQuantileLoss
    from gluonts.model.evaluation import evaluate_model

    predictor = GDNPredictor(small_model(), 6, {"freq": "h"})
    whole = make_series(90, V=3)
    instances = [(whole.slice(0, n), whole.values[:, n : n + 6]) for n in (60, 70, 84)]
    (one, *_) = predictor.predict([series_entry(context) for context, _ in instances])
    assert one.quantile(0.5).shape == (6, 3)
    table = evaluate_model(
        predictor,
        test_data=Instances.of(instances),
        metrics=[MeanWeightedSumQuantileLoss(list(np.round(np.arange(0.1, 1, 0.1), 1))), MASE()],
        axis=None,
        seasonality=24,
    )
    windows = backtest.forecast_windows(ModelPredictor(predictor.model), instances, seasonality=24)
    scores = backtest.score(windows, seasonality=24)
    np.testing.assert_allclose(table.iloc[0].astype(float), [scores.wql, scores.mase], rtol=1e-9)


def test_another_frequency_is_refused():
    predictor = GDNPredictor(small_model(), H, {"freq": "h"})
    entry = {"start": pd.Period("2020-01-01", freq="D"), "target": np.ones(20)}
    with pytest.raises(ValueError, match="freq is 'D', the model was fitted on 'h'"):
        list(predictor.predict([entry]))


def daily_wave(length, item_id, seed=0):
    rng = np.random.default_rng(seed)
    t = np.arange(length)
    target = 20 + 5 * np.sin(2 * np.pi * t / 24) + rng.normal(size=length)
    return {"item_id": item_id, "start": pd.Period("2021-01-01", freq="h"), "target": target.astype(np.float32)}


def small_estimator(**options) -> GDNEstimator:
    given = {"prediction_length": 12, "freq": "h", "width": 16, "depth": 1, "max_steps": 8, "batch_size": 8}
    quiet = {"accelerator": "cpu", "enable_progress_bar": False}
    return GDNEstimator(**{**given, "trainer_kwargs": quiet, **options})


def test_an_estimator_trains_a_predictor_and_leaves_its_arguments_alone(tmp_path, monkeypatch):
    from lightning.pytorch.callbacks import Callback

    class Counter(Callback):
        steps = 0

        def on_train_batch_end(self, *_):
            Counter.steps += 1

    monkeypatch.chdir(tmp_path)
    data = [daily_wave(300, f"i{i}", i) for i in range(3)]
    kwargs = {"accelerator": "cpu", "enable_progress_bar": False, "callbacks": [Counter()]}
    estimator = small_estimator(trainer_kwargs=kwargs)
    first = estimator.train(data)
    assert list(kwargs) == ["accelerator", "enable_progress_bar", "callbacks"]
    assert Counter.steps == 8
    second = estimator.train(data)
    assert Counter.steps == 16  # the callbacks are still there
    for a, b in zip(first.predict(data), second.predict(data), strict=True):
        np.testing.assert_array_equal(a.forecast_array, b.forecast_array)  # and the seed is kept
    assert not list(tmp_path.iterdir())  # nothing is written to the working directory
    assert first.series["freq"] == "h"


def test_the_weights_that_are_kept_are_the_averaged_ones_that_were_validated():
    from lightning.pytorch.callbacks import Callback

    class Validated(Callback):
        def __init__(self):
            self.seen = []

        def on_validation_epoch_start(self, trainer, pl_module):
            self.seen.append({name: value.clone() for name, value in pl_module.model.state_dict().items()})

    data = [daily_wave(300, f"i{i}", i) for i in range(3)]
    train = [{**entry, "target": entry["target"][:-36]} for entry in data]
    watcher = Validated()
    quiet = {"accelerator": "cpu", "enable_progress_bar": False, "num_sanity_val_steps": 0, "callbacks": [watcher]}
    kept = small_estimator(max_steps=6, trainer_kwargs=quiet).train_model(train, data).predictor.model.state_dict()
    (validated,) = watcher.seen
    for name, value in validated.items():
        assert torch.equal(kept[name], value), name


def test_callbacks_may_be_none_or_keep_checkpoints_without_validation_data(tmp_path):
    from lightning.pytorch.callbacks import ModelCheckpoint

    quiet = {"accelerator": "cpu", "enable_progress_bar": False}
    data = [daily_wave(200, "a")]
    small_estimator(max_steps=1, trainer_kwargs={**quiet, "callbacks": None}).train(data)
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=1, filename="mine")
    small_estimator(max_steps=1, trainer_kwargs={**quiet, "callbacks": [saver]}).train(data)
    assert (tmp_path / "mine.ckpt").is_file()


def test_entries_without_a_name_are_validated_beyond_their_own_training_part():
    data = [{**daily_wave(n, None), "item_id": None} for n in (300, 200)]
    train = [{**entry, "target": entry["target"][:-n]} for entry, n in zip(data, (36, 24), strict=True)]
    trainer = small_estimator(max_steps=1).train_model(train, data).trainer
    assert trainer.datamodule._validated_from == [264, 176]


def test_a_category_beyond_the_cardinality_is_refused_by_name():
    entry = {**daily_wave(200, "a"), "feat_static_cat": np.array([3])}
    with pytest.raises(ValueError, match="item a: category 3 in feat_static_cat, cardinality 3 has 0 to 2"):
        small_estimator(cardinality=[3]).train([entry])


def test_the_largest_category_counts_as_in_a_stream():
    model = small_model(static_cardinalities=(3,))
    series = [make_series(60, static=(c,)) for c in (0, 3, 4)]
    unknown, largest, beyond = ModelPredictor(model).predict(series, 12, (0.5,))
    assert (np.abs(largest - unknown) > 1e-6).all()
    np.testing.assert_allclose(beyond, unknown, rtol=1e-12)


def test_validation_data_chooses_the_weights_and_training_can_go_on():
    data = [daily_wave(300, f"i{i}", i) for i in range(3)]
    train = [{**entry, "target": entry["target"][:-36]} for entry in data]
    estimator = small_estimator(max_steps=4)
    output = estimator.train_model(train, data)
    assert "val_loss" in output.trainer.callback_metrics
    more = estimator.train_from(output.predictor, train)
    before, after = output.predictor.model.state_dict(), more.model.state_dict()
    assert any((before[name] != after[name]).any() for name in before)


def test_categories_and_known_features_reach_the_model():
    rng = np.random.default_rng(0)
    data = []
    for i in range(3):
        known = rng.normal(size=(2, 212)).astype(np.float32)
        entry = daily_wave(200, f"i{i}", i)
        data.append({**entry, "feat_static_cat": np.array([i]), "feat_dynamic_real": known})
    estimator = small_estimator(cardinality=[3], num_feat_dynamic_real=2, max_steps=3)
    predictor = estimator.train(data)
    assert predictor.model.config["static_cardinalities"] == [3]
    assert predictor.model.known_features == clock("h").calendar_size + 2
    (plain,) = predictor.predict(data[:1])
    (other,) = predictor.predict([{**data[0], "feat_dynamic_real": -data[0]["feat_dynamic_real"]}])
    (elsewhere,) = predictor.predict([{**data[0], "feat_static_cat": np.array([2])}])
    assert (plain.forecast_array != other.forecast_array).any()
    assert (plain.forecast_array != elsewhere.forecast_array).any()
    with pytest.raises(ValueError, match="num_feat_dynamic_real is 2"):
        estimator.train([{**data[0], "feat_dynamic_real": data[0]["feat_dynamic_real"][:1]}])


def test_an_estimator_is_described_by_its_arguments():
    from gluonts.core.serde import decode, encode

    estimator = small_estimator(mixer="gru")
    again = decode(encode(estimator))
    assert isinstance(again, GDNEstimator)
    assert (again.mixer, again.prediction_length) == ("gru", 12)


def test_no_pickle_is_written(tmp_path: Path):
    GDNPredictor(small_model().float(), H).serialize(tmp_path)
    for path in tmp_path.iterdir():
        assert b"\x80\x04" not in path.read_bytes()[:8]
