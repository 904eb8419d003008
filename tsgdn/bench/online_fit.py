"""Fits for the online protocol: squared error of the mean beside the pinball loss, over all horizons at once.

The protocol scores the mean of the next 1, 24 and 48 steps by squared error on z-scores, so a fit minimises

    sum over horizons H of  MSE_H / B_H  +  share * sum over H of  pinball_H / sqrt(B_H),

B_H the smaller error of persistence and the seasonal naive in the training rows: every horizon counts alike, the first
step not as one of 48. The mean is the quantile function integrated over its levels, so one head serves both. Rows from
the end of the training part on are never drawn from; the validation rows choose the averaged weights that are kept.
"""

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from tsgdn.data.series import Series
from tsgdn.data.windows import Cut, Cutter, WindowSampler
from tsgdn.evaluation.metrics import level_weights
from tsgdn.model.forecaster import Forecaster
from tsgdn.model.losses import gather_targets
from tsgdn.training.module import ForecastModule, rising_average
from tsgdn.types import Batch, Quantiles

CONTEXT = 1024  # steps before the validation rows that a validation reads, after the statistics of all before them


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is fitted, and how; the same for every mixer but for the sizes that `matching` changes.

    Attributes:
        seasons: of the seasonal memory, 1 first. A token sees its values over the forecast's steps one season earlier,
            so lengths that follow one another at the longest horizon make a window of lags.
        patch_size: P; 1 reads each value as it comes.
        multivariate: the variates of a set are one series and mixed, instead of a series each with a category.
        calendar: whether tokens are told the time.
        half_life: of the scaling, in steps.
        width: of the tokens.
        depth: blocks.
        dropout: in training.
        lr: peak of the learning rate.
        weight_decay: of matrices.
        steps: of the optimiser.
        batch: windows per step.
        window: steps per window.
        loss_tokens: of a window that are scored, the head being what costs.
        pinball: share of the pinball loss.
        validations: how often the validation part is scored.
    """

    seasons: tuple[int, ...]
    patch_size: int = 1
    multivariate: bool = False
    calendar: bool = False
    half_life: int | None = None
    width: int = 64
    depth: int = 2
    dropout: float = 0.2
    lr: float = 2e-3
    weight_decay: float = 0.1
    steps: int = 400
    batch: int = 16
    window: int = 192
    loss_tokens: int = 48
    pinball: float = 0.5
    validations: int = 5


@dataclass(frozen=True)
class Fit:
    """A fitted model.

    Attributes:
        model: in evaluation mode, with the averaged weights of the best validation.
        seconds: of training and validation.
        curve: (step, relative squared error of the validation rows, their mean squared error per horizon).
        best: of the curve.
    """

    model: Forecaster
    seconds: float
    curve: tuple[tuple[int, float, tuple[float, ...]], ...]

    @property
    def best(self) -> tuple[int, float, tuple[float, ...]]:
        """The validation whose weights were kept."""
        return min(self.curve, key=lambda found: found[1])


def base_errors(
    values: Float64[np.ndarray, "V T"], horizons: Sequence[int], seasonality: int
) -> Float64[np.ndarray, " horizons"]:
    """Per horizon the smaller mean squared error of persistence and the seasonal naive, over all windows."""
    found = []
    for H in horizons:
        errors = []
        for m in (1, seasonality):
            total, count = 0.0, 0
            for lead in range(1, H + 1):
                back = m * -(-lead // m)
                # windows that fit: origins from m to T - H
                d = values[:, m + lead - 1 : values.shape[1] - H + lead]
                past = values[:, m + lead - 1 - back : values.shape[1] - H + lead - back]
                square = (d[:, -past.shape[1] :] - past) ** 2
                total, count = total + np.nansum(square), count + int(np.isfinite(square).sum())
            errors.append(total / max(count, 1))
        found.append(min(errors))
    return np.array(found)


def lead_weights(horizons: Sequence[int], base: Sequence[float] | np.ndarray, span: int) -> Float64[np.ndarray, " S"]:
    """Weight of each lead in the mean over horizons of MSE_H / B_H, for 1 to `span` steps ahead."""
    leads = np.arange(1, span + 1)
    return sum((leads <= H) / (H * b) for H, b in zip(horizons, base, strict=True)) / len(horizons)  # pyright: ignore


def mean_of(quantiles: Float[Tensor, "*shape Q"], levels: Sequence[float]) -> Float[Tensor, "*shape"]:
    """The mean of a quantile function that is constant around each level."""
    return quantiles @ torch.as_tensor(level_weights(levels), dtype=quantiles.dtype, device=quantiles.device)


def loss_of(
    quantiles: Quantiles,
    target: Float64[Tensor, "B V N S"],
    levels: Sequence[float],
    patch_size: int,
    weights: tuple[Float64[np.ndarray, " leads"], Float64[np.ndarray, " leads"]],
    pinball: float,
) -> Tensor:
    """Weighted squared error of the mean, and `pinball` times the pinball loss.

    Args:
        quantiles: of the tokens read.
        target: of their steps, own patch first; NaN = no loss.
        levels: of the quantiles.
        patch_size: P.
        weights: per lead, of squared error and of the pinball loss.
        pinball: share.
    """
    S = len(weights[0])
    values = quantiles.values[..., patch_size : patch_size + S, :]
    truth = target[..., patch_size : patch_size + S]
    scored = truth.isfinite() & quantiles.valid[:, None, :, None]
    scale = quantiles.scale[..., None].to(values.dtype)
    truth = ((truth - quantiles.loc[..., None]) / quantiles.scale[..., None]).to(values.dtype)
    truth = torch.where(scored, truth, torch.zeros((), dtype=values.dtype, device=values.device))
    square = ((truth - mean_of(values, levels)) * scale) ** 2
    found = _weighted(square, scored, weights[0])
    if pinball:
        level = torch.tensor(levels, dtype=values.dtype, device=values.device)
        error = (truth[..., None] - values) * scale[..., None]
        # uneven levels count by the share of (0, 1) around them
        loss = mean_of(2 * torch.maximum(level * error, (level - 1) * error), levels)
        found = found + pinball * _weighted(loss, scored, weights[1])
    return found


def _weighted(loss: Tensor, scored: Tensor, weights: np.ndarray) -> Tensor:
    """Mean over tokens of the sum over leads; a lead's mean is over the tokens that have a target there."""
    weight = torch.as_tensor(weights, dtype=loss.dtype, device=loss.device)
    rows = scored.flatten(0, 2)
    each = torch.where(rows, loss.flatten(0, 2), torch.zeros((), dtype=loss.dtype, device=loss.device)).sum(0)
    return (each / rows.sum(0).clamp(min=1) * weight).sum()


def fit(
    series: Sequence[Series],
    *,
    train: int,
    horizons: Sequence[int],
    seasonality: int,
    recipe: Recipe,
    build: Callable[[Recipe, int], Forecaster],
    seed: int = 0,
    device: str = "cpu",
    told: Callable[[str], None] = lambda text: None,
) -> Fit:
    """Fits on the first `train` steps of z-scored series and chooses on the rest.

    Args:
        series: training and validation rows, z-scored, of equal length.
        train: steps that windows are cut from.
        horizons: increasing; the longest is forecast directly.
        seasonality: m of the naive forecast that squared errors are measured in.
        recipe: see there.
        build: the model of a recipe and a number of categories.
        seed: of weights, windows and dropout.
        device: where the model is fitted.
        told: is given a line per validation.
    """
    began = time.perf_counter()
    P, S = recipe.patch_size, horizons[-1]
    base = base_errors(np.concatenate([s.values[:, :train] for s in series]), horizons, seasonality)
    weights = lead_weights(horizons, base, S), lead_weights(horizons, np.sqrt(base), S)
    torch.manual_seed(seed)
    model = build(recipe, 0 if recipe.multivariate else len(series)).to(device)
    cutting = {"span": model.span, "seasons": model.seasons, "calendar": recipe.calendar, "half_life": recipe.half_life}
    cutter = Cutter([replace(s, values=s.values[:, :train]) for s in series], **cutting)
    windows = WindowSampler(
        cutter, patch_size=P, window_patches=recipe.window // P, batch_size=recipe.batch, seed=seed, first_share=0.1,
        fresh_share=0.05, gap_share=0.05,
    )  # fmt: skip
    held = Cutter(series, **cutting)
    begin = max(0, train - CONTEXT) // P * P
    end = begin + (len(series[0]) - begin) // P * P
    whole = held.batch([Cut(i, begin, end, scored=train) for i in range(len(series))]).to(device)

    optimiser = torch.optim.AdamW(
        ForecastModule(model, weight_decay=recipe.weight_decay).parameter_groups(), lr=recipe.lr, betas=(0.9, 0.98)
    )
    rising = max(1, round(0.05 * recipe.steps))

    def rate(step: int) -> float:
        done = (step - rising) / max(1, recipe.steps - rising)
        return (step + 1) / rising if step < rising else 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, rate)
    average = copy.deepcopy(model).eval()
    generator = torch.Generator().manual_seed(seed)
    every = max(1, recipe.steps // recipe.validations)
    curve: list[tuple[int, float, tuple[float, ...]]] = []
    kept: dict[str, Tensor] = {}
    for step in range(recipe.steps + 1):
        if step % every == 0 or step == recipe.steps:
            errors = validation(average, whole, train - begin, horizons)
            curve.append((step, float(np.mean(errors / base)), tuple(float(e) for e in errors)))
            told(f"step {step}: {curve[-1][1]:.4f}  " + " ".join(f"{e:.4f}" for e in errors))
            if curve[-1][1] <= min(found[1] for found in curve):
                kept = {name: value.clone() for name, value in average.state_dict().items()}
        if step == recipe.steps:
            break
        batch = windows[step].to(device)
        tokens = batch.values.shape[-1] // P
        read = torch.randperm(tokens, generator=generator)[: recipe.loss_tokens].sort().values.to(device)
        model.train()
        quantiles, _ = model(batch, None, read=read)
        assert batch.target is not None
        target = gather_targets(batch.target, read, P, model.span)
        loss = loss_of(quantiles, target, model.quantile_levels, P, weights, recipe.pinball)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        with torch.no_grad():
            for mean, current in zip(average.parameters(), model.parameters(), strict=True):
                mean.copy_(rising_average(mean, current, step, decay=0.998))
    average.load_state_dict(kept)
    return Fit(average, time.perf_counter() - began, tuple(curve))


@torch.no_grad()
def validation(
    model: Forecaster, whole: Batch, first: int, horizons: Sequence[int], *, piece: int = 2048
) -> Float64[np.ndarray, " horizons"]:
    """Mean squared error per horizon at every patch end from `first` on, in one pass."""
    P, S = model.patch_size, horizons[-1]
    target = whole.target
    assert target is not None
    T = target.shape[-1]
    state, square, count = None, np.zeros(len(horizons)), np.zeros(len(horizons))
    piece = piece // P * P
    for begin in range(0, T, piece):
        end = min(begin + piece, T)
        known = None if whole.known is None else whole.known[..., begin : end + model.span]
        part = Batch(
            whole.values[..., begin:end], whole.observed[..., begin:end], known,
            static=whole.static if state is None else None, past=whole.past if state is None else None,
        )  # fmt: skip
        ends = np.arange(begin + P, end + 1, P)
        read = np.flatnonzero(ends >= first)
        quantiles, state = model(part, state, read=torch.from_numpy(read))
        if not len(read):
            continue
        mean = mean_of(quantiles.values[..., P : P + S, :], model.quantile_levels)
        mean = quantiles.loc[..., None] + quantiles.scale[..., None] * mean
        error = (
            gather_targets(target, torch.from_numpy(begin // P + read).to(target.device), P, model.span)[..., P : P + S]
            - mean
        ) ** 2
        for i, H in enumerate(horizons):
            whole_windows = torch.from_numpy(ends[read] + H <= T)
            inside = error[:, :, whole_windows, :H]
            square[i] += float(inside.nan_to_num().sum())
            count[i] += int(inside.isfinite().sum())
    return square / np.maximum(count, 1)
