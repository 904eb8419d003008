"""What the forecaster promises for any weights: units, order, anchors, forecasts from any moment."""

import numpy as np
import pytest
import torch
from test_streaming import EXACT, K, P, cut, make, make_batch
from torch.testing import assert_close

from tsgdn.model.artefact import ArtefactError, fingerprint, load, read_series_info, save
from tsgdn.model.forecaster import Forecaster
from tsgdn.model.losses import gather_targets, hidden_cells, pinball_loss
from tsgdn.model.scaling import CausalScaler
from tsgdn.model.seasonal import SeasonalMemory
from tsgdn.types import Batch, Quantiles

DIRECT = K * P


@pytest.mark.parametrize("steps", range(2 * P, 3 * P + 1))
def test_a_forecast_equals_the_parallel_pass_with_the_patch_closed_as_not_observed(steps: int) -> None:
    model, batch = make(), make_batch(6 * P)
    _, state = model(cut(batch, 0, steps))
    got = model.forecast(state, DIRECT)
    end = -(-steps // P) * P
    closed = cut(batch, 0, end)
    closed = closed._replace(observed=closed.observed & (torch.arange(end) < steps))
    quantiles, _ = model(closed)
    offset = steps - (end - P)
    want = quantiles.unscaled()[:, :, -1, offset : offset + DIRECT]
    assert_close(got, want, **EXACT)


def test_asking_changes_nothing_and_a_longer_horizon_extends_a_shorter_one() -> None:
    model, batch = make(), make_batch(7 * P + 2)
    _, state = model(batch)
    assert batch.known is not None
    # the state knows the features of the next K + 1 patches
    short, long = model.forecast(state, 3), model.forecast(state, 4 * DIRECT + 1)
    assert torch.equal(short, model.forecast(state, 3))
    assert_close(long[:, :, :3], short, **EXACT)
    assert long.shape[2] == 4 * DIRECT + 1


def test_a_step_beyond_the_direct_ones_comes_from_the_first_rolled_out_token_that_reaches_it() -> None:
    model, batch = make(gap_tokens=100), make_batch(12 * P)
    _, state = model(cut(batch, 0, 5 * P))
    assert batch.known is not None
    long = model.forecast(state, DIRECT + 2 * P, known=batch.known[..., 5 * P :])
    unseen = cut(batch, 5 * P, 7 * P)
    quantiles, _ = model(unseen._replace(observed=torch.zeros_like(unseen.observed)), state)
    assert_close(long[:, :, DIRECT : DIRECT + P], quantiles.unscaled()[:, :, 0, -P:], **EXACT)
    assert_close(long[:, :, DIRECT + P :], quantiles.unscaled()[:, :, 1, -P:], **EXACT)


def test_known_features_given_with_the_forecast_fill_what_the_stream_lacked() -> None:
    model, batch = make(), make_batch(4 * P + 1)
    assert batch.known is not None
    T = 4 * P + 1
    _, before = model(cut(batch, 0, T - 1))
    last = cut(batch, T - 1, T)
    assert last.known is not None
    lacking = last.known.clone()
    lacking[..., 1:] = float("nan")
    _, full = model(last, before)
    _, part = model(last._replace(known=lacking), before)
    assert not torch.allclose(model.forecast(part, 5), model.forecast(full, 5))
    filled = model.forecast(part, 5, known=batch.known[..., T:])
    assert_close(filled, model.forecast(full, 5), **EXACT)


def test_nothing_observed_gives_nan_and_one_value_gives_numbers() -> None:
    model = make(known_features=0, static_cardinalities=())
    zeros = model.initial_state(2, 1)
    assert model.forecast(zeros, 3).isnan().all()
    one = Batch(torch.full((2, 1, 1), 5.0, dtype=torch.float64), torch.tensor([[[True]], [[False]]]))
    _, state = model(one)
    forecast = model.forecast(state, 3)
    assert forecast[0].isfinite().all() and forecast[1].isnan().all()


def test_no_series_have_no_forecasts() -> None:
    assert make().forecast(make().initial_state(0, 2), 3).shape == (0, 2, 3, 21)


@pytest.mark.parametrize("values", [0.0, 7.0, 1e140, -1e-140, 1e8])
def test_constant_series_stay_finite(values: float) -> None:
    model = make(known_features=0, static_cardinalities=())
    series = torch.full((1, 2, 6 * P), values, dtype=torch.float64)
    quantiles, state = model(Batch(series, torch.ones_like(series, dtype=torch.bool)))
    assert quantiles.unscaled().isfinite().all() and model.forecast(state, 40).isfinite().all()


def test_forecasts_follow_the_unit_of_the_series() -> None:
    model, batch = make(), make_batch(9 * P + 1)
    _, state = model(batch)
    _, moved = model(batch._replace(values=batch.values * 1e-3 - 40.0))
    assert_close(model.forecast(moved, 9), model.forecast(state, 9) * 1e-3 - 40.0, rtol=1e-7, atol=1e-9)


def test_a_large_level_does_not_cost_precision() -> None:
    model = make(dtype=torch.float32)
    batch = make_batch(12 * P)
    _, state = model(batch)
    _, moved = model(batch._replace(values=batch.values + 1e8))
    spread = model.forecast(state, 5)[..., -1] - model.forecast(state, 5)[..., 0]
    error = (model.forecast(moved, 5) - 1e8 - model.forecast(state, 5)).abs().amax(-1)
    assert (error < 1e-3 * spread).all()


def test_quantiles_are_ordered() -> None:
    model, batch = make(), make_batch(9 * P)
    quantiles, _ = model(batch)
    assert (quantiles.values.diff(dim=-1) >= 0).all()


def test_variates_are_permuted_with_their_forecasts() -> None:
    model, batch = make(), make_batch(8 * P, variates=3)
    order = torch.tensor([2, 0, 1])
    whole, _ = model(batch)
    permuted, _ = model(batch._replace(values=batch.values[:, order], observed=batch.observed[:, order]))
    assert_close(permuted.values, whole.values[:, order], **EXACT)
    # and they do read each other
    other = batch.values.clone()
    other[:, 0] *= torch.linspace(1, 3, other.shape[-1])
    assert not torch.allclose(model(batch._replace(values=other))[0].values[:, 1], whole.values[:, 1])


@pytest.mark.parametrize("season", [0, 1, 2], ids=["last value", "season 6", "season 10"])
def test_persistence_over_a_season_is_representable(season: int) -> None:
    model, batch = make(), make_batch(12 * P, missing=0.0)
    with torch.no_grad():
        for layer in (model.head.mix, model.head.quantiles):
            layer.weight.zero_()
            layer.bias.zero_()
        bias = torch.full((model.head.anchors,), -1e4, dtype=torch.float64)
        bias[1 + season] = 0
        model.head.mix.bias.copy_(bias.repeat(model.span))
    _, state = model(batch)
    median = model.forecast(state, DIRECT)[..., model.head.middle]
    m = model.seasons[season]
    steps = torch.arange(DIRECT)
    want = batch.values[..., 12 * P - m + steps % m]
    assert_close(median, want, rtol=1e-12, atol=1e-10)


def test_moments_are_those_of_all_values_so_far() -> None:
    batch = make_batch(9 * P)
    quantiles, _ = make()(batch)
    for n in range(9):
        for b in range(3):
            for v in range(2):
                seen = batch.values[b, v, : (n + 1) * P].numpy()
                seen = seen[np.isfinite(seen)]
                if len(seen) < 2:
                    continue
                assert_close(float(quantiles.loc[b, v, n]), float(seen.mean()), rtol=1e-12, atol=0)
                assert_close(float(quantiles.scale[b, v, n]), float(seen.std()), rtol=1e-10, atol=0)


def test_a_half_life_halves_weights_by_observed_values() -> None:
    half_life, scaler = 5.0, CausalScaler(1, 5.0)
    memory = SeasonalMemory((1,), P, (K + 1) * P)
    batch = make_batch(7 * P, series=1, variates=1)
    values = batch.values.nan_to_num().unflatten(-1, (-1, P))
    observed = batch.observed.unflatten(-1, (-1, P))
    start = torch.zeros(1, dtype=torch.int64)
    views, _ = memory(values, observed, start, memory.initial_state(1, 1))
    scales, _, state = scaler(values, observed, views.predecessors, views.has_predecessor, scaler.initial_state(1, 1))
    seen = batch.values[batch.observed].numpy()
    weight = 2.0 ** (-np.arange(len(seen))[::-1] / half_life)
    mean = (weight * seen).sum() / weight.sum()
    assert_close(float(scales.loc[0, 0, -1]), float(mean), rtol=1e-12, atol=0)
    variance = (weight * (seen - mean) ** 2).sum() / weight.sum()
    assert_close(float(scales.scale[0, 0, -1]), float(variance**0.5), rtol=1e-10, atol=0)
    change = (weight[1:] * np.diff(seen) ** 2).sum() / weight[1:].sum()
    assert_close(float(state.lag_square[0, 0, 0]), float(change), rtol=1e-10, atol=0)


def test_losses_are_masked_and_equal_the_definition() -> None:
    levels = (0.1, 0.5, 0.9)
    values = torch.tensor([[[[[-1.0, 0.0, 2.0], [0.0, 1.0, 3.0]]]]], dtype=torch.float64)
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    quantiles = Quantiles(values, 10 * one, 2 * one, 0.5 * one, torch.ones(1, 1, dtype=torch.bool))
    target = torch.tensor([[[[11.0, float("nan")]]]], dtype=torch.float64)
    y = (11.0 - 10.0) / 2.0
    want = np.mean([2 * max(q * (y - f), (q - 1) * (y - f)) for q, f in zip(levels, (-1.0, 0.0, 2.0), strict=True)])
    assert_close(float(pinball_loss(quantiles, target, levels, magnitude_weight=0.0)), float(want / 0.5))
    nothing = pinball_loss(quantiles, torch.full_like(target, torch.nan), levels)
    assert float(nothing) == 0.0


def test_targets_are_the_steps_from_the_start_of_a_tokens_patch() -> None:
    target = torch.arange(3.0 * P, dtype=torch.float64)[None, None]
    tokens = torch.tensor([0, 2])
    got = gather_targets(target, tokens, P, 2 * P)
    assert_close(got[0, 0, 0], torch.arange(2.0 * P, dtype=torch.float64))
    assert got[0, 0, 1, P:].isnan().all()
    observed = torch.ones(1, 1, 3 * P, dtype=torch.bool)
    observed[..., 1] = False
    mask = hidden_cells(observed, tokens, P, 2 * P)
    assert mask[0, 0, 0, :P].tolist() == [False, True, False, False] and mask[..., P:].all()


def test_a_saved_model_comes_back_and_a_broken_one_is_refused(tmp_path) -> None:
    model, batch = make(dtype=torch.float32), make_batch(5 * P)
    folder = save(model, tmp_path / "model", series={"freq": "h", "horizon": DIRECT})
    again = load(folder)
    assert torch.equal(again(batch)[0].values, model(batch)[0].values)
    assert fingerprint(again) == fingerprint(model) and read_series_info(folder)["freq"] == "h"
    with pytest.raises(ArtefactError, match="holds no model"):
        load(tmp_path)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ArtefactError, match="cannot be read"):
        load(folder)
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "config.json").write_text((folder / "config.json").read_text().replace('"width": 16', '"width": 32'))
    with pytest.raises(ArtefactError, match="do not fit"):
        load(folder)


def test_bad_arguments_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="patch_size is 0"):
        Forecaster(patch_size=0)
    with pytest.raises(ValueError, match="1 first"):
        Forecaster(seasons=(24,))
    with pytest.raises(ValueError, match="half_life is -1"):
        Forecaster(half_life=-1.0)
    with pytest.raises(ValueError, match="quantile_levels"):
        Forecaster(quantile_levels=(0.1, 0.9))
    with pytest.raises(ValueError, match="gated_deltanet"):
        Forecaster(mixer="gated_deltnet")
    model, batch = make(), make_batch(P)
    with pytest.raises(ValueError, match="known is"):
        model(batch._replace(known=batch.known[..., 1:]))
    with pytest.raises(ValueError, match="time does not run backwards"):
        model.elapse(model.initial_state(1, 1), -1)


def test_an_untrained_model_forecasts_a_random_walk_by_its_last_value_and_a_season_by_the_last_one() -> None:
    torch.manual_seed(0)
    model = Forecaster(P, K, (1, 6), width=16, depth=1).eval()
    generator = torch.Generator().manual_seed(3)
    walk = torch.randn(40 * P, generator=generator).double().cumsum(0)
    season = torch.sin(torch.arange(40 * P) / 6 * 2 * torch.pi).double() + 0.02 * walk.diff(prepend=walk[:1])
    series = torch.stack([walk, season])[:, None]
    _, state = model(Batch(series, torch.ones_like(series, dtype=torch.bool)))
    median = model.forecast(state, 6)[:, 0, :, model.head.middle]
    spread = model.forecast(state, 6)[:, 0, :, -1] - median
    assert ((median[0, :3] - walk[-1]).abs() < 0.5 * spread[0, :3]).all()
    assert (median[1] - series[1, 0, -6:]).abs().max() < 0.1
    assert spread[0, 5] > 1.8 * spread[0, 0]
