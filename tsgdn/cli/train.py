"""`tsgdn fit | validate | test | predict`: Lightning's command line over the forecaster and the data module.

`configs/default.yaml` lies under every call; `--config NAME` adds one of the shipped presets, `--config FILE` one's
own, options on the command line win. What the data set decides (patch size, seasons, known features) reaches the model
while the command line is parsed.
"""

import contextlib
import difflib
import logging
import math
import re
import sys
import warnings
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import torch
from jsonargparse import ActionConfigFile  # pyright: ignore[reportPrivateImportUsage]
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger

from tsgdn.cli.main import Misuse
from tsgdn.cli.model import read_checkpoint, save_certified
from tsgdn.data import catalog
from tsgdn.data.module import ForecastDataModule, resolve
from tsgdn.streaming import tuning
from tsgdn.streaming.predictor import StatefulPredictor
from tsgdn.training.module import ForecastModule

# Advice of the libraries that a user can do nothing about; the last two: jsonargparse 5 drops what Lightning 2.6 calls.
ADVICE = (
    "does not have many workers",
    "treespec, LeafSpec",
    "number of training batches",
    "The dirpath has changed",
    "JsonargparseDeprecationWarning",
    "deprecated in v4",
)


WATCHED_SERIES, WATCHED_STEPS = 32, 1000
"""At most so many validation series and steps of each are streamed for watch.json."""
OF_THE_RUN = ("best", "last", "hpc", "registry")
"""Checkpoints that Lightning finds by itself; only a fit has them."""


def presets() -> dict[str, Path]:
    """The shipped configurations by name."""
    folder = Path(str(files("tsgdn") / "configs"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def main(argv: Sequence[str]) -> int:
    """Runs one of the four subcommands; `argv` begins with its name.

    Raises:
        Misuse: a wrong option, preset, data set or checkpoint; nothing was run.
    """
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    torch.set_float32_matmul_precision("high")
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        for text in ADVICE:
            warnings.filterwarnings("ignore", f"(?s).*{text}")
        cli = TrainCLI(with_presets(argv), stack)
        if cli.trainer.interrupted:
            return 130
    return 0


def with_presets(argv: Sequence[str]) -> list[str]:
    """The arguments with presets as files: first the default configuration, then those given, then the options.

    Without a configuration, that which lies beside the checkpoint is the default.
    """
    shipped = presets()
    command, *rest = argv
    configs, options, checkpoint, i = [], [], None, 0
    while i < len(rest):
        option, _, value = rest[i].partition("=")
        if option in ("-c", "--config", "--ckpt_path") and not value and i + 1 < len(rest):
            i += 1
            value = rest[i]
        if option in ("-c", "--config"):
            configs += ["--config", str(_config_file(value, shipped))]
        elif option == "--ckpt_path":
            checkpoint = value
            options += [option, value]
        else:
            options.append(rest[i])
        i += 1
    base = shipped["default"]
    if checkpoint is not None and checkpoint not in OF_THE_RUN:
        beside = Path(checkpoint).parent.parent / "config.yaml"
        if not configs and beside.is_file():
            base = beside
    return [command, "--config", str(base), *configs, *options]


def _config_file(value: str, shipped: dict[str, Path]) -> Path:
    if Path(value).is_file():
        return Path(value)
    if value in shipped:
        return shipped[value]
    raise Misuse(f"--config {value}: no such file, and no preset of this name; presets are {', '.join(shipped)}")


class _Parser(LightningArgumentParser):
    """Complains in one line."""

    def error(self, message: str, ex: Exception | None = None) -> Any:
        """Raises instead of printing the usage."""
        text = " ".join(str(message).split())
        _, linked, cause = text.partition(") failed: ")  # of a value derived from the data set: the cause alone
        text = cause.strip("\"'") if linked and "compute_fn" in text else text
        unknown = re.search(r"unrecognized arguments: --([\w.]+)", text)
        if unknown:
            near = difflib.get_close_matches(unknown[1], self._names(), 1)
            text = f"there is no option --{unknown[1]}; " + (f"did you mean --{near[0]}?" if near else "see --help")
        raise Misuse(text) from ex

    def _names(self) -> list[str]:
        names: list[str] = []
        for action in self._actions:
            choices = getattr(action, "_name_parser_map", None) or {}
            parsers = [p for p in choices.values() if hasattr(p, "_actions")]
            for each in [action, *(inner for p in parsers for inner in p._actions)]:
                names += [option.lstrip("-") for option in each.option_strings]
        return names


class TrainCLI(LightningCLI):
    """Fits on stderr, keeps stdout for data, exports what it fitted."""

    def __init__(self, args: Sequence[str], stack: contextlib.ExitStack):
        self._stack = stack
        self._stdout = sys.stdout
        self.exported: Path | None = None
        self._fitted: dict[str, Any] | None = None  # configuration of the checkpoint's model
        super().__init__(
            ForecastModule,
            ForecastDataModule,
            args=list(args),
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},
        )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """A parser whose errors are one line."""
        parser = _Parser(**kwargs)
        parser.add_argument("-c", "--config", action=ActionConfigFile, help="name of a preset, or a YAML file")
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Takes the arguments as given, without Lightning's warning about them."""
        self.config = parser.parse_args(args)

    def _parse_ckpt_path(self) -> None:
        """Reads the checkpoint before anything is built. Lightning looks for options in it, which ours do not hold."""
        command = str(self.config.subcommand)
        path = self.config[command].ckpt_path
        if path not in (None, *OF_THE_RUN):
            self._fitted = read_checkpoint(Path(path))["tsgdn"]["model"]
        elif command != "fit":  # weights that nobody fitted are not worth a score
            raise Misuse(f"`tsgdn {command}` needs --ckpt_path FILE, a checkpoint that `tsgdn fit` wrote")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Links what the data set decides to the model, and one seed to everything."""
        parser.add_argument("--export", type=str | None, default=None, help="folder of the fitted model (ROOT/export)")
        sources = ("dataset", "patch_size", "patches_ahead", "seasons", "horizon", "calendar")
        for target in ("patch_size", "patches_ahead", "seasons", "known_features"):
            parser.link_arguments(
                tuple(f"data.{s}" for s in sources), f"model.model.{target}", compute_fn=_Rule(target)
            )
        parser.link_arguments("data.half_life", "model.model.half_life")
        # univariate windows would leave the variate mixers without gradients, which distributed training refuses
        parser.link_arguments("data.multivariate", "model.model.variate_every", compute_fn=_variate_every)
        parser.link_arguments("data.truncated_bptt", "model.truncated_bptt")
        for target in ("data.seed", "model.seed"):
            parser.link_arguments("seed_everything", target, compute_fn=_seed)

    def before_instantiate_classes(self) -> None:
        """From here on stdout is for data alone."""
        self._stack.enter_context(contextlib.redirect_stdout(sys.stderr))

    def instantiate_classes(self) -> None:
        """Builds everything; what the model or the trainer refuses is a wrong option."""
        with _told():
            super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Logs to CSV unless told otherwise."""
        trainer = self._get(self.config_init, "trainer", {})
        if trainer.get("logger") is None and not trainer.get("fast_dev_run"):
            root = trainer.get("default_root_dir") or "runs"
            kwargs["logger"] = CSVLogger(save_dir=root, name="", flush_logs_every_n_steps=20)
        return super().instantiate_trainer(**kwargs)

    def before_validate(self) -> None:
        """Loads the data and compares the checkpoint, so that what cannot be is told before anything is written."""
        with _told():
            if self._fitted is not None:
                self.model.require_same_model(self._fitted)
            self.datamodule.setup(str(self.subcommand))

    before_test = before_validate
    before_predict = before_validate

    def before_fit(self) -> None:
        """Likewise; and a run must have an end, and something to watch if it is watched."""
        self.before_validate()
        if self.trainer.max_epochs == -1 and self.trainer.max_steps == -1:
            raise Misuse("the learning rate falls over the whole run, which has no end; give --trainer.max_epochs")
        callbacks: list[Any] = self.trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
        watching = [type(c).__name__ for c in callbacks if getattr(c, "monitor", None) == "val_loss"]
        if watching and not self.datamodule.val_dataloader():
            raise Misuse(
                f"nothing is left to validate on, but {' and '.join(watching)} watch val_loss; list the callbacks "
                "without them under trainer: in a file for --config, or hold out data.validation_windows"
            )

    def after_fit(self) -> None:
        """Exports the best (averaged) weights, and says where everything is."""
        if self.trainer.interrupted or not self.trainer.is_global_zero:
            return
        best = getattr(self.trainer.checkpoint_callback, "best_model_path", "")
        if best:
            weights = torch.load(best, map_location="cpu", weights_only=True)["state_dict"]
            self.model.load_state_dict(weights)
        root = Path(self.trainer.default_root_dir)
        self.exported = save_model(self.model, Path(self.config[str(self.subcommand)].export or root / "export"))
        tune_watch(self.datamodule, self.exported)
        if best:
            print(f"best checkpoint: {best}", file=sys.stderr)
        print(f"exported model:  {self.exported}", file=sys.stderr)

    def after_predict(self) -> None:
        """Writes the quantiles as JSON lines to stdout."""
        predictions = self.trainer.predict_loop.predictions
        rows = [row for batch in predictions for row in batch]  # pyright: ignore[reportGeneralTypeIssues]
        levels = [f"{level:g}" for level in self.model.model.quantile_levels]
        # a fast_dev_run predicts the first batches only
        for series, row in zip(self.datamodule.predicted, rows, strict=False):
            stamp = np.datetime_as_string(series.clock.timestamp(series.start, len(series)), unit="s")
            for variate, values in zip(series.variates, row.tolist(), strict=True):
                quantiles = {level: [step[i] for step in values] for i, level in enumerate(levels)}
                line = {"item_id": series.item_id, "timestamp": str(stamp), "variate": variate, "quantiles": quantiles}
                self._stdout.write(orjson.dumps(line).decode() + "\n")
        self._stdout.flush()


class _Rule:
    """One of the values that `resolve` derives from the data set; called while the command line is parsed."""

    def __init__(self, target: str):
        self.target = target

    def __call__(self, *given: Any) -> Any:
        return resolve(*given)[self.target]


def _variate_every(multivariate: bool) -> int:
    """Every second block mixes variates, where there are several."""
    return 2 if multivariate else 0


def _seed(value: bool | int | None) -> int:
    """`seed_everything` as a number; true and false are 0."""
    return 0 if value is None or isinstance(value, bool) else int(value)


@contextlib.contextmanager
def _told() -> Any:
    """A data set that is unknown, absent or unfit, or a trainer that cannot be, is a misuse, told in one line."""
    try:
        yield
    except KeyError as error:
        raise Misuse(str(error.args[0])) from error
    except (catalog.DataNotFound, ValueError, MisconfigurationException) as error:
        raise Misuse(str(error)) from error


def tune_watch(module: ForecastDataModule, folder: Path) -> None:
    """Writes watch.json: where calibrated widths and alarms of a stream begin, measured on the validation part."""
    held_out = [
        whole.slice(len(training), min(len(whole), len(training) + WATCHED_STEPS))
        for whole, training in zip(module.whole, module.training, strict=True)
        if len(whole) > len(training)
    ][:WATCHED_SERIES]
    try:
        predictor = StatefulPredictor.from_pretrained(folder, device="cpu", calibrate=True)
        tuning.write(folder, tuning.tune(predictor, held_out))
    except ValueError as error:  # too few values, or a state that grows; widths then begin as the model has them
        print(f"no {tuning.FILE}: {error}", file=sys.stderr)


def save_model(module: ForecastModule, folder: Path) -> Path:
    """The exported folder of a trained module, with the data set's facts."""
    info = dict(module.series_info)
    bad = [name for name, p in module.model.named_parameters() if not math.isfinite(float(p.detach().abs().sum()))]
    if bad:
        raise RuntimeError(f"{bad[0]} is not finite after training; lower model.lr")
    return save_certified(module.model, folder, info)
