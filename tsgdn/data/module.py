"""Batches for a trainer: a catalogued data set, or series from Python, as windows for fit, validation and test."""

import difflib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from tsgdn.data import catalog
from tsgdn.data.clock import clock
from tsgdn.data.series import Series
from tsgdn.data.windows import (
    Contexts,
    ContiguousSegments,
    Cut,
    Cutter,
    Segments,
    WindowSampler,
    grouped,
    held_out_cuts,
)
from tsgdn.types import Batch

DIRECT_STEPS = 64  # forecast in one pass at most; a longer horizon is rolled out
VALIDATED_SERIES = 512
VALIDATION_WINDOWS = 20
VALIDATION_SHARE = 10  # of a series at most one in so many steps is held out


def resolve(
    dataset: str = "simulated",
    patch_size: int | None = None,
    patches_ahead: int | None = None,
    seasons: Sequence[int] | None = None,
    horizon: int | None = None,
    calendar: bool | None = None,
) -> dict[str, Any]:
    """What a model must know of a data set: the given values, and by rule from the catalogue those that are None.

    Args:
        dataset: name of a data set or of an evaluation cell.
        patch_size: by frequency.
        patches_ahead: enough for the horizon in one pass, at most 64 steps.
        seasons: by frequency.
        horizon: of the cell or the data set.
        calendar: off where the dates are assigned or made up.

    Returns:
        patch_size, patches_ahead, seasons, known_features, horizon, calendar, freq.

    Raises:
        KeyError: there is no such data set.
        ValueError: a size is below 1.
    """
    task = find_task(dataset)
    shape = derived(
        task.freq,
        task.horizon if horizon is None else horizon,
        patch_size=patch_size,
        patches_ahead=patches_ahead,
        seasons=seasons,
        calendar=task.calendar if calendar is None else calendar,
    )
    if task.resample is None:
        shape["known_features"] += len(catalog.entry(task.dataset).known)
    return shape


def find_task(name: str) -> catalog.Task:
    """The evaluation cell of that name, else the customary test part of the data set of that name.

    Raises:
        KeyError: there is neither; the text says what is close.
    """
    if name in catalog.tasks():
        return catalog.task(name)
    if name not in catalog.names():
        known = dict.fromkeys([*catalog.tasks(), *catalog.names()])
        near = difflib.get_close_matches(name, list(known), 3)
        hint = f"did you mean {' or '.join(near)}?" if near else "see `tsgdn data list`"
        raise KeyError(f"there is no data set or evaluation cell {name!r}; {hint}")
    entry = catalog.entry(name)
    windows = entry.windows if isinstance(entry.windows, int) else VALIDATION_WINDOWS
    return catalog.Task(
        name=name,
        dataset=name,
        freq=entry.freq,
        horizon=entry.horizon,
        windows=windows,
        stride=entry.stride or entry.horizon,
        seasonality=entry.seasonality,
        validation=entry.horizon * windows,
        calendar=entry.calendar,
        suite="customary",
    )


def derived(
    freq: str,
    horizon: int,
    *,
    patch_size: int | None = None,
    patches_ahead: int | None = None,
    seasons: Sequence[int] | None = None,
    calendar: bool = False,
) -> dict[str, Any]:
    """As `resolve`, for a frequency and a horizon."""
    at_least(1, horizon=horizon, patch_size=patch_size, patches_ahead=patches_ahead)
    rule = clock(freq)
    P = patch_size or rule.patch_size
    K = patches_ahead or min(-(-horizon // P), max(1, DIRECT_STEPS // P))
    return {
        "patch_size": P,
        "patches_ahead": K,
        "seasons": list(rule.seasons if seasons is None else seasons),
        "known_features": rule.calendar_size if calendar else 0,
        "horizon": horizon,
        "calendar": calendar,
        "freq": rule.freq,
    }


def at_least(least: int, **sizes: int | None) -> None:
    """Refuses a size below `least` by its name; None stands for a rule."""
    for name, size in sizes.items():
        if size is not None and size < least:
            raise ValueError(f"{name} is {size}, expected at least {least}")


class ForecastDataModule(LightningDataModule):
    """Windows of one data set. Validation is the end of the training part; nothing later enters a fit.

    Args:
        dataset: name of a data set or of an evaluation cell, see `tsgdn data list`.
        patch_size: null = by frequency.
        patches_ahead: null = enough for the horizon, at most 64 steps.
        seasons: lengths of the seasonal memory, 1 first; null = by frequency.
        horizon: null = that of the data set.
        calendar: calendar features; null = where the dates are real.
        half_life: of the scaling, in observed values; null = all values weigh alike.
        batch_size: windows per batch.
        window_patches: tokens per window.
        steps_per_epoch: batches between validations.
        validation_windows: horizons held out at the end of the training part of each series, at most a tenth of it;
            null = as many as there are test windows or the cell sets aside, at most 20.
        multivariate: one series of all variates instead of one per variate.
        targets: leading variates that are forecast, the rest ride along as past covariates; null = all.
        truncated_bptt: consecutive segments instead of random windows, for a state that is carried along.
        num_workers: processes that cut windows; the batches do not depend on it.
        seed: of the windows.
        series: from Python only: the training series themselves (with `horizon`), instead of `dataset`.

    Raises:
        ValueError: a size that nothing can be cut with.
    """

    def __init__(
        self,
        dataset: str = "simulated",
        patch_size: int | None = None,
        patches_ahead: int | None = None,
        seasons: list[int] | None = None,
        horizon: int | None = None,
        calendar: bool | None = None,
        half_life: float | None = None,
        batch_size: int = 64,
        window_patches: int = 64,
        steps_per_epoch: int = 100,
        validation_windows: int | None = None,
        multivariate: bool = False,
        targets: int | None = None,
        truncated_bptt: bool = False,
        num_workers: int = 0,
        seed: int = 0,
        series: Any = None,
    ):
        super().__init__()
        at_least(1, batch_size=batch_size, steps_per_epoch=steps_per_epoch)
        at_least(2, window_patches=window_patches)  # a token, and one that it forecasts
        at_least(0, validation_windows=validation_windows, num_workers=num_workers, seed=seed)
        self.dataset, self.given, self.multivariate = dataset, series, multivariate
        self.batch_size, self.window_patches, self.steps_per_epoch = batch_size, window_patches, steps_per_epoch
        self.validation_windows, self.truncated_bptt = validation_windows, truncated_bptt
        self.num_workers, self.seed, self.half_life = num_workers, seed, half_life
        self._options = {"patch_size": patch_size, "patches_ahead": patches_ahead, "seasons": seasons}
        self._horizon, self._calendar, self._targets = horizon, calendar, targets
        self._ready = False

    @property
    def shape(self) -> dict[str, Any]:
        """What the model must know; see `resolve`."""
        if self.given is None:
            return resolve(self.dataset, horizon=self._horizon, calendar=self._calendar, **self._options)
        if not self._horizon or not self.given:
            raise ValueError("series= needs at least one series, and horizon= beside it")
        found = derived(self.given[0].freq, self._horizon, calendar=bool(self._calendar), **self._options)
        user = self.given[0].known
        return {**found, "known_features": found["known_features"] + (0 if user is None else len(user))}

    def setup(self, stage: str | None = None) -> None:
        """Loads and splits, once."""
        if self._ready:
            return
        shape = self.shape
        self.patch_size, self.horizon = shape["patch_size"], shape["horizon"]
        self.span = (shape["patches_ahead"] + 1) * self.patch_size
        self._cutting = {
            "span": self.span,
            "seasons": shape["seasons"],
            "calendar": shape["calendar"],
            "half_life": self.half_life,
            "targets": self._targets,
        }
        self.instances: Sequence[tuple[Series, np.ndarray]] = []
        if self.given is None:
            task = find_task(self.dataset)
            whole, self.instances = task.split(multivariate=self.multivariate)
            windows, seasonality, name = (
                max(task.windows, task.validation // self.horizon),
                task.seasonality,
                self.dataset,
            )
        else:
            whole, windows = list(self.given), VALIDATION_WINDOWS
            seasonality, name = clock(shape["freq"]).seasonality, "series"
        self.training, self._validated_from = self._hold_out(whole, self.validation_windows, windows)
        self._cutter = Cutter([s for s in self.training if len(s)], **self._cutting)
        self.whole = whole
        self.series_info = {
            "dataset": name,
            "freq": shape["freq"],
            "calendar": shape["calendar"],
            "horizon": self.horizon,
            "seasonality": int(seasonality),
            "variates": list(whole[0].variates),
            "targets": self._targets or len(whole[0].variates),
            "known": shape["known_features"],
        }
        self._ready = True

    def _hold_out(self, whole: list[Series], asked: int | None, windows: int) -> tuple[list[Series], list[int]]:
        """The training part without validation, and where the validation of each series begins (its end: nowhere)."""
        H = self.horizon
        limit = min(windows, VALIDATION_WINDOWS) if asked is None else asked
        training, begins = [], []
        for series in whole:
            T = len(series)
            begin = T - H * min(limit, max(1, T // (VALIDATION_SHARE * H)))
            if begin < max(H, 2 * self.patch_size):  # too short to give anything away
                begin = T
            training.append(series.slice(0, begin))
            begins.append(begin)
        if limit and all(begin == len(series) for begin, series in zip(begins, whole, strict=True)):
            raise ValueError(
                f"none of the series has the {H + max(H, 2 * self.patch_size)} steps that a validation of horizon {H} "
                f"takes (the longest has {max(map(len, whole))}); "
                "give longer series, a shorter horizon, or validation_windows: 0 and no early stopping"
            )
        return training, begins

    def train_dataloader(self) -> "RunLoader":
        """Random windows, or contiguous segments; endless in kind, `steps_per_epoch` at a time."""
        kind = ContiguousSegments if self.truncated_bptt else WindowSampler
        rank, ranks = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        # the ranks draw from different seeds: a carried row then stays on its rank
        source = kind(
            self._cutter,
            patch_size=self.patch_size,
            window_patches=self.window_patches,
            batch_size=self.batch_size,
            seed=self.seed * ranks + rank,
        )
        return RunLoader(source, self.steps_per_epoch, self.num_workers, self)

    def val_dataloader(self) -> DataLoader | list[Any]:
        """The end of the training part of each series, one cut each."""
        cuts = held_out_cuts(
            [len(s) for s in self.whole],
            self._validated_from.__getitem__,
            context=self.window_patches * self.patch_size,
            most=VALIDATED_SERIES,
        )
        return self._loader(self.whole, cuts) if cuts else []

    def test_dataloader(self) -> DataLoader:
        """All test windows of a series in one cut, their own steps scored."""
        whole: dict[str, tuple[Series, int]] = {}
        for context, label in self._instances():
            held, first = whole.get(context.item_id, (None, len(context)))
            if held is None or len(held) < len(context) + label.shape[1]:
                held = replace(context, values=np.concatenate([context.values, label], 1))
            whole[context.item_id] = (held, min(first, len(context)))
        series, firsts = [s for s, _ in whole.values()], [first for _, first in whole.values()]
        context = self.window_patches * self.patch_size
        return self._loader(series, held_out_cuts([len(s) for s in series], firsts.__getitem__, context=context))

    def predict_dataloader(self) -> DataLoader:
        """The whole past of each test window; `predicted` names the rows in their order."""
        contexts = [context for context, _ in self._instances()]
        cuts = [Cut(i, 0, len(s)) for i, s in enumerate(contexts)]
        groups = grouped(cuts, self.batch_size)
        self.predicted = [contexts[cut.series] for group in groups for cut in group]
        cutter = Cutter(contexts, **self._cutting)
        columns = self.horizon + self.span + self.patch_size

        def contexts_of(group: Sequence[Cut]) -> Contexts:
            ahead = cutter.ahead([(cut.series, cut.stop) for cut in group], columns)
            return Contexts(cutter.batch(group, past=False), ahead)

        return DataLoader(_Batches(groups, contexts_of), batch_size=None)

    def _instances(self) -> Sequence[tuple[Series, np.ndarray]]:
        if not self.instances:
            raise ValueError("series given from Python have no test part; score them with tsgdn.evaluation")
        return self.instances

    def _loader(self, series: Sequence[Series], cuts: Sequence[Cut]) -> DataLoader:
        batches = _Batches(grouped(cuts, self.batch_size), Cutter(series, **self._cutting).batch)
        return DataLoader(batches, batch_size=None)


class _Batches(Dataset):
    """Batches that are cut when they are asked for."""

    def __init__(self, groups: list[list[Cut]], cut: Callable[[Sequence[Cut]], Batch | Contexts]):
        self.groups, self.cut = groups, cut

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> Batch | Contexts:
        return self.cut(self.groups[index])


class RunLoader:
    """The batches of a run, an epoch at a time: epoch e has the batches e·n to (e + 1)·n - 1.

    Where an epoch begins is read off the trainer, so that a run resumed within an epoch goes on with the next batch. (A
    loader's own state would not do: Lightning restores it only where nothing asked for the length of the run before.)
    """

    def __init__(
        self, source: WindowSampler | ContiguousSegments, steps: int, num_workers: int, module: LightningDataModule
    ):
        self.source, self.steps, self.num_workers, self._module = source, steps, num_workers, module

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Batch | Segments]:
        # the body runs when the first batch is asked for: the trainer's counters are restored by then
        trainer = self._module.trainer
        epoch, done = (trainer.current_epoch, trainer.fit_loop.epoch_loop.batch_idx + 1) if trainer else (0, 0)
        yield from DataLoader(
            self.source,  # pyright: ignore[reportArgumentType]
            batch_size=None,
            sampler=range(epoch * self.steps + done, (epoch + 1) * self.steps),
            num_workers=self.num_workers,
            generator=torch.Generator(),  # the loader's own draw of a base seed must not touch the global one
        )

    def state_dict(self) -> dict[str, Any]:
        """Nothing; tells Lightning that this loader can be resumed."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""
