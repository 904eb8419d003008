"""The model as GluonTS knows models: an Estimator that trains, a Predictor that predicts, is saved and is read back.

Importing this module imports GluonTS, which takes seconds: import it where it is used.
"""

import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np
import pandas as pd
import torch
from gluonts.core.component import validated
from gluonts.model.forecast import QuantileForecast
from gluonts.model.predictor import Predictor
from gluonts.torch.model.estimator import PyTorchLightningEstimator, TrainOutput
from gluonts.transform import Identity
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint

from tsgdn.adapters.predictor import ModelPredictor
from tsgdn.data.clock import clock
from tsgdn.data.gluonts import entry_series, first_day_freq, period, series_entry
from tsgdn.data.module import ForecastDataModule
from tsgdn.data.series import Series
from tsgdn.evaluation.metrics import level_weights
from tsgdn.model import artefact
from tsgdn.model.forecaster import Forecaster
from tsgdn.training.module import AveragedWeights, ForecastModule
from tsgdn.types import QUANTILE_LEVELS

Entry = dict[str, Any]  # of a GluonTS data set: `start`, `target`, ...
BUFFER = 1 << 24  # target values gathered before a forecast: windows of one series are then read once


@dataclass(frozen=True)
class Instances:
    """(context, label) pairs as GluonTS test data: `input` and `label` are all that its evaluation reads."""

    input: list[dict[str, Any]]
    label: list[dict[str, Any]]

    @classmethod
    def of(cls, instances: Sequence[tuple[Series, np.ndarray]]) -> "Instances":
        """The windows of `Task.split`."""
        labels = []
        for context, label in instances:
            start: np.datetime64 = context.clock.timestamp(context.start, len(context))[()]  # pyright: ignore
            target = label[0] if len(label) == 1 else label
            labels.append({"item_id": context.item_id, "start": period(start, context.freq), "target": target})
        return cls([series_entry(context) for context, _ in instances], labels)


class GDNPredictor(Predictor):
    """Quantile forecasts of GluonTS data sets.

    Contexts of any length, with gaps; 2-D targets give forecasts of (Q, H, V). The `mean` is that of the quantiles.
    """

    def __init__(self, model: Forecaster, prediction_length: int, series: dict[str, Any] | None = None) -> None:
        """Takes a fitted model.

        Args:
            model: any `Forecaster`.
            prediction_length: horizon; beyond `model.direct_steps` it is rolled out.
            series: what the model forecasts ("freq", "calendar", ...), as in its folder.
        """
        super().__init__(prediction_length=prediction_length)
        self.model, self.series = model.eval(), dict(series or {})
        self._predictor = ModelPredictor(model, calendar=bool(self.series.get("calendar", False)))
        self._keys = ["mean", *map(str, model.quantile_levels)]

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, prediction_length: int | None = None, device: torch.device | str = "cpu"
    ) -> "GDNPredictor":
        """The predictor of a model folder; the horizon it was fitted for unless said otherwise."""
        series, model = artefact.read_series_info(folder), artefact.load(folder, device=device)
        return cls(model, prediction_length or int(series.get("horizon") or model.direct_steps), series)

    def predict(
        self, dataset: Iterable[Entry], num_samples: int | None = None, **kwargs: Any
    ) -> Iterator[QuantileForecast]:
        """Forecasts each entry, in order.

        Args:
            dataset: entries with `start`, `target` and what the model was fitted with.
            num_samples: has no meaning here; there are no samples.
            **kwargs: of other predictors, ignored.

        Raises:
            ValueError: a frequency, or features, that the model was not fitted with.
        """
        for entries in _buffered(dataset):
            series = [self._read(entry) for entry in entries]
            found = self._predictor.predict(series, self.prediction_length, self.model.quantile_levels)
            for entry, values in zip(entries, found, strict=True):
                yield self._forecast(entry, values)

    def _read(self, entry: Entry) -> Series:
        series, fitted = entry_series(entry), self.series.get("freq")
        if fitted and clock(fitted).seasons != series.clock.seasons:
            raise ValueError(
                f"item {series.item_id}: freq is {series.freq!r}, the model was fitted on {fitted!r}; resample, or "
                "fit anew"
            )
        return series

    def _forecast(self, entry: Entry, values: np.ndarray) -> QuantileForecast:
        """(V, H, Q) -> keys first, variates last; univariate targets have no axis for them."""
        arrays = np.concatenate([(values @ level_weights(self.model.quantile_levels))[..., None], values], -1)
        arrays = arrays[0].T if np.ndim(entry["target"]) == 1 else arrays.transpose(2, 1, 0)
        return QuantileForecast(
            forecast_arrays=arrays,
            start_date=_later(entry["start"], np.shape(entry["target"])[-1]),
            forecast_keys=self._keys,
            item_id=entry.get("item_id"),
            info=entry.get("info"),
        )

    def serialize(self, path: Path) -> None:
        """Writes a model folder (see `tsgdn.model.artefact`) that names this class to GluonTS."""
        Path(path).mkdir(parents=True, exist_ok=True)
        super().serialize(Path(path))
        artefact.save(self.model, path, series={**self.series, "horizon": self.prediction_length})

    @classmethod
    def deserialize(cls, path: Path, device: torch.device | str = "auto", **kwargs: Any) -> "GDNPredictor":
        """Reads what `serialize` wrote; executes nothing from the folder.

        Args:
            path: the folder.
            device: "auto" = the GPU if there is one.
            **kwargs: of other predictors, ignored.
        """
        where = ("cuda" if torch.cuda.is_available() else "cpu") if str(device) == "auto" else device
        return cls.from_pretrained(path, device=where)


def _later(start: pd.Period, steps: int) -> pd.Period:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # as in `period`
        return start + steps


def _buffered(dataset: Iterable[Entry]) -> Iterator[list[Entry]]:
    """Runs of entries that hold at most `BUFFER` values together, one entry at least."""
    run: list[Entry] = []
    held = 0
    for entry in dataset:
        size = np.size(entry["target"])
        if run and held + size > BUFFER:
            yield run
            run, held = [], 0
        run.append(entry)
        held += size
    if run:
        yield run


class _Windows(ForecastDataModule):
    """Training series as they are; validation on series given for that, or none."""

    def __init__(self, validation: list[Series] | None, **options: Any) -> None:
        super().__init__(**options, validation_windows=0)
        self._validation = validation

    def setup(self, stage: str | None = None) -> None:
        """Validates what lies beyond the training series of the same name, or else the last horizon."""
        if self._ready:
            return
        super().setup(stage)
        if self._validation is None:
            return
        trained = {(s.item_id, s.start): len(s) for s in self.training}
        begins = []
        for series in self._validation:
            T, seen = len(series), trained.get((series.item_id, series.start), 0)
            begins.append(seen if 0 < seen < T else max(T - self.horizon, 0))
        self.whole, self._validated_from = self._validation, begins


class GDNEstimator(PyTorchLightningEstimator):
    """Trains a `Forecaster` on a GluonTS data set.

    Without validation data, all of `training_data` is trained on and the averaged weights of the last step are kept;
    with it, those of the best validation loss. Nothing is written to the working directory.
    """

    @validated()
    def __init__(
        self,
        *,
        prediction_length: int,
        freq: str,
        mixer: Union[str, list[str]] = "gated_deltanet",  # noqa: UP007  GluonTS validates with pydantic 1 rules
        mixer_args: Optional[dict[str, Any]] = None,  # noqa: UP045  GluonTS validates with pydantic 1 rules
        width: int = 64,
        depth: int = 3,
        max_steps: int = 1000,
        lr: float = 2e-3,
        batch_size: int = 64,
        dropout: float = 0.1,
        calendar: bool = True,
        cardinality: Sequence[int] = (),
        num_feat_dynamic_real: int = 0,
        quantile_levels: Sequence[float] = QUANTILE_LEVELS,
        trainer_kwargs: Optional[dict[str, Any]] = None,  # noqa: UP045
        seed: int = 0,
    ) -> None:
        """Takes what to train, and how long.

        Args:
            prediction_length: horizon.
            freq: of the series, a pandas alias.
            mixer: a mixer, a hybrid, or a list of mixers; see `Forecaster`.
            mixer_args: its arguments.
            width: of a token.
            depth: number of blocks.
            max_steps: training steps.
            lr: peak learning rate.
            batch_size: windows per step.
            dropout: in training.
            calendar: use calendar features; turn it off where the dates are made up.
            cardinality: of `feat_static_cat`; empty leaves these out.
            num_feat_dynamic_real: rows of `feat_dynamic_real`, known into the future; 0 leaves these out.
            quantile_levels: increasing, the median among them.
            trainer_kwargs: of Lightning's Trainer; never changed, so that a second `train` is like the first.
            seed: of weights, windows and dropout.
        """
        super().__init__(trainer_kwargs=dict(trainer_kwargs or {}))
        self.prediction_length, self.freq = prediction_length, first_day_freq(freq)
        self.mixer, self.mixer_args, self.width, self.depth = mixer, dict(mixer_args or {}), width, depth
        self.max_steps, self.lr, self.batch_size, self.dropout = max_steps, lr, batch_size, dropout
        self.calendar, self.cardinality = calendar, tuple(cardinality)
        self.num_feat_dynamic_real, self.quantile_levels, self.seed = (
            num_feat_dynamic_real,
            tuple(quantile_levels),
            seed,
        )

    def train_model(
        self,
        training_data: Iterable[Entry],
        validation_data: Iterable[Entry] | None = None,
        from_predictor: "GDNPredictor | None" = None,  # pyright: ignore[reportIncompatibleMethodOverride]
        shuffle_buffer_length: int | None = None,
        cache_data: bool = False,
        ckpt_path: str | None = None,
        **kwargs: Any,
    ) -> TrainOutput:
        """Trains; see the class.

        Args:
            training_data: entries of one frequency and number of variates.
            validation_data: as GluonTS has it: the training entries with the steps after them.
            from_predictor: whose weights to start from.
            shuffle_buffer_length: of other estimators, ignored: windows are drawn at random anyway.
            cache_data: of other estimators, ignored: the series are in memory anyway.
            ckpt_path: checkpoint to resume from.
            **kwargs: of other estimators, ignored.

        Raises:
            ValueError: entries with other features than were asked for.
        """
        series = self._series(training_data)
        validation = None if validation_data is None else self._series(validation_data)
        data = _Windows(
            validation,
            series=series,
            horizon=self.prediction_length,
            calendar=self.calendar,
            batch_size=self.batch_size,
            steps_per_epoch=min(100, self.max_steps),
            seed=self.seed,
        )
        module = ForecastModule(self._forecaster(data.shape), lr=self.lr, seed=self.seed)
        if from_predictor is not None:
            module.model.load_state_dict(from_predictor.model.state_dict())
        with tempfile.TemporaryDirectory() as scratch:
            given = dict(self.trainer_kwargs)
            callbacks = [AveragedWeights(), *(given.pop("callbacks", None) or [])]
            # not save_weights_only: such a checkpoint has the last weights, not the averaged ones that were validated
            best = ModelCheckpoint(scratch, monitor="val_loss")
            if validation:
                callbacks.append(best)
            defaults = {
                "max_steps": self.max_steps,
                "accelerator": "auto",
                "devices": 1,
                "gradient_clip_val": 1.0,
                "logger": False,
                "enable_model_summary": False,
                "enable_checkpointing": any(isinstance(one, Checkpoint) for one in callbacks),
                **({} if validation else {"limit_val_batches": 0}),
                "default_root_dir": scratch,
            }
            trainer = Trainer(**{**defaults, **given, "callbacks": callbacks})
            trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
            if validation and best.best_model_path:
                state = torch.load(best.best_model_path, map_location="cpu", weights_only=True)["state_dict"]
                module.load_state_dict(state)
        predictor = GDNPredictor(module.model, self.prediction_length, {**data.series_info, "dataset": "gluonts"})
        return TrainOutput(Identity(), module, trainer, predictor)  # pyright: ignore[reportArgumentType]

    def train_from(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        predictor: "GDNPredictor",
        training_data: Iterable[Entry],
        validation_data: Iterable[Entry] | None = None,
        shuffle_buffer_length: int | None = None,
        cache_data: bool = False,
        ckpt_path: str | None = None,
    ) -> "GDNPredictor":
        """Trains on, from the weights of a predictor of the same shape."""
        output = self.train_model(training_data, validation_data, predictor, ckpt_path=ckpt_path)
        return output.predictor  # pyright: ignore[reportReturnType]

    def _series(self, entries: Iterable[Entry]) -> list[Series]:
        """The entries as series, those without a name named by their place: that of validation is that of training."""
        named = (e if e.get("item_id") is not None else {**e, "item_id": i} for i, e in enumerate(entries))
        return [self._fitting(entry_series(entry, self.freq)) for entry in named]

    def _fitting(self, series: Series) -> Series:
        """The series with the features that were asked for, and only these."""
        given = 0 if series.known is None else len(series.known)
        if self.num_feat_dynamic_real and given != self.num_feat_dynamic_real:
            raise ValueError(
                f"item {series.item_id}: {given} rows of feat_dynamic_real, num_feat_dynamic_real is "
                f"{self.num_feat_dynamic_real}; give that many"
            )
        if self.cardinality and len(series.static) != len(self.cardinality):
            raise ValueError(
                f"item {series.item_id}: {len(series.static)} categories in feat_static_cat, cardinality has "
                f"{len(self.cardinality)}; give as many"
            )
        for category, size in zip(series.static, self.cardinality, strict=False):
            if not 1 <= category <= size:
                raise ValueError(
                    f"item {series.item_id}: category {category - 1} in feat_static_cat, cardinality {size} has 0 to "
                    f"{size - 1}; give a larger cardinality"
                )
        known = series.known if self.num_feat_dynamic_real else None
        return replace(series, known=known, static=series.static if self.cardinality else ())

    def _forecaster(self, shape: dict[str, Any]) -> Forecaster:
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            return Forecaster(
                patch_size=shape["patch_size"],
                patches_ahead=shape["patches_ahead"],
                seasons=shape["seasons"],
                known_features=shape["known_features"],
                static_cardinalities=self.cardinality,
                width=self.width,
                depth=self.depth,
                mixer=self.mixer,
                mixer_args=self.mixer_args,
                quantile_levels=self.quantile_levels,
                dropout=self.dropout,
            )
