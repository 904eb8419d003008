"""The training of a forecaster: loss, what is hidden from it, optimiser, averaged weights, carried states.

A step depends on the seed, the epoch and the batch alone (dropout included), so a resumed run repeats the uninterrupted
one. A checkpoint holds tensors and plain Python values only; `checkpoint["tsgdn"]` rebuilds the model.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor, nn

from tsgdn.data.windows import Contexts, Segments
from tsgdn.model.forecaster import Forecaster
from tsgdn.model.losses import gather_targets, hidden_cells, pinball_loss
from tsgdn.streamable import detach, map_state, state_leaves
from tsgdn.training.augment import close_patches, mask_patches
from tsgdn.types import Batch


class AveragedWeights(EMAWeightAveraging):
    """Exponential moving average of the weights, what is validated, saved and exported.

    The average of step n reaches back about n / 10 steps until `decay` takes over: a run of a few hundred steps is not
    dominated by its first weights. Buffers are copied, never averaged (some are integers or tables).
    """

    def __init__(self, decay: float = 0.999):
        super().__init__(decay=decay, use_buffers=False)
        self._kwargs["avg_fn"] = partial(rising_average, decay=decay)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restores the average in a fit; elsewhere the checkpoint's weights are the average already."""
        if self._average_model is not None:
            super().on_load_checkpoint(trainer, pl_module, checkpoint)


def rising_average(mean: Tensor, current: Tensor, count: Tensor | int, *, decay: float) -> Tensor:
    """The average after `count` earlier ones; a function of the module, since processes are sent it."""
    n = float(count)
    return mean.lerp(current, 1.0 - min(decay, (1.0 + n) / (10.0 + n)))


@contextmanager
def budget_losses(model: nn.Module) -> Iterator[list[Tensor]]:
    """What the mixers with a learned router owe to their budgets, for each call of theirs within the context."""
    owed: list[Tensor] = []

    def ask(mixer: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        owed.append(mixer.budget_loss(args[0], lengths=named.get("lengths")))

    routed = [part for part in model.modules() if hasattr(part, "budget_loss") and part.learned]
    hooks = [part.register_forward_pre_hook(ask, with_kwargs=True) for part in routed]
    try:
        yield owed
    finally:
        for hook in hooks:
            hook.remove()


class ForecastModule(LightningModule):
    """Trains a `Forecaster` on windows, or on contiguous segments with the state carried along.

    Args:
        model: trained in place.
        lr: peak learning rate.
        weight_decay: of matrices; gates, norms, biases and embeddings have none.
        warmup: share of the run over which the rate rises.
        final_lr: share of the peak that the cosine ends at.
        betas: of AdamW.
        magnitude_weight: 0 trains for MASE (every series alike), 1 for WQL (by magnitude).
        loss_tokens: random tokens per window whose forecasts are scored; null scores all. The head is what costs.
        close_share: share of patches whose last cells are hidden.
        mask_windows: share of windows in which a run of patches is hidden.
        truncated_bptt: batches are consecutive segments; the state goes along, the gradient does not.
        seed: of what is hidden, scored and dropped.

    Raises:
        ValueError: a number outside its range.
    """

    def __init__(
        self,
        model: Forecaster,
        lr: float = 2e-3,
        weight_decay: float = 0.05,
        warmup: float = 0.05,
        final_lr: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.98),
        magnitude_weight: float = 0.5,
        loss_tokens: int | None = 16,
        close_share: float = 0.15,
        mask_windows: float = 0.0,
        truncated_bptt: bool = False,
        seed: int = 0,
    ):
        super().__init__()
        for name, value, least, most in (
            ("lr", lr, 0, math.inf),
            ("weight_decay", weight_decay, 0, math.inf),
            ("warmup", warmup, 0, 1),
            ("final_lr", final_lr, 0, 1),
            ("magnitude_weight", magnitude_weight, -math.inf, math.inf),
            ("loss_tokens", loss_tokens, 1, math.inf),
            ("close_share", close_share, 0, 0.5),  # half of the windows stay untouched
            ("mask_windows", mask_windows, 0, 1),
        ):
            if value is not None and not least <= value <= most:
                raise ValueError(f"{name} is {value}, expected a number from {least:g} to {most:g}")
        self.model = model
        self.lr, self.weight_decay, self.warmup, self.final_lr, self.betas = lr, weight_decay, warmup, final_lr, betas
        self.magnitude_weight, self.loss_tokens = magnitude_weight, loss_tokens
        self.close_share, self.mask_windows = close_share, mask_windows
        self.truncated_bptt, self.seed = truncated_bptt, seed
        self.series_info: dict[str, Any] = {}
        self._carried: Any = None

    def loss(self, batch: Batch, state: Any = None, read: Tensor | None = None) -> tuple[Tensor, Any]:
        """The loss over the tokens `read` (all by default), and the end state."""
        if state is None and batch.past is not None:
            state = self.model.prime(batch.past)
        if batch.target is None:
            raise ValueError("the batch has no target to compare with; windows.Cutter gives one")
        P, span = self.model.patch_size, self.model.span
        if read is None:
            read = torch.arange(batch.values.shape[-1] // P, device=batch.values.device)
        quantiles, state = self.model(batch, state, read=read)
        loss = pinball_loss(
            quantiles,
            gather_targets(batch.target, read, P, span),
            self.model.quantile_levels,
            mask=hidden_cells(batch.observed, read, P, span),
            magnitude_weight=self.magnitude_weight,
        )
        return loss, state

    def training_step(self, batch: Batch | Segments, batch_idx: int) -> Tensor:
        """One step; everything random in it follows from (seed, epoch, batch, rank)."""
        generator = torch.Generator().manual_seed(self._mixed_seed(batch_idx))
        torch.manual_seed(int(torch.randint(2**62, (1,), generator=generator)))  # dropout
        state = None
        if isinstance(batch, Segments):
            batch, restart = batch
            state = self._continue(batch, restart)
        P = self.model.patch_size
        batch = close_patches(batch, P, generator, share=self.close_share)
        batch = mask_patches(batch, P, generator, windows=self.mask_windows)
        tokens = batch.values.shape[-1] // P
        read = torch.arange(tokens)
        if self.loss_tokens is not None and self.loss_tokens < tokens:
            read = torch.randperm(tokens, generator=generator)[: self.loss_tokens].sort().values
        with budget_losses(self.model) as budgets:
            loss, state = self.loss(batch, state, read.to(batch.values.device))
        loss = loss + sum(budgets)
        if self.truncated_bptt:
            self._carried = detach(state)
        self.log("train_loss", loss.detach(), prog_bar=True, on_step=True, on_epoch=False)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Logs `val_loss`: the mean over the tokens that forecast a scored cell."""
        self._score("val_loss", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Logs `test_loss`, likewise."""
        self._score("test_loss", batch)

    def predict_step(self, batch: Contexts, batch_idx: int) -> Tensor:
        """Quantiles (B, V, horizon, Q) of the steps after the contexts, in the unit of the series."""
        contexts, ahead = batch
        nothing = torch.zeros(0, dtype=torch.long, device=contexts.values.device)
        _, state = self.model(contexts, read=nothing)
        return self.model.forecast(state, int(self.series_info.get("horizon") or self.model.direct_steps), known=ahead)

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW with a linear warm-up and a cosine; no decay on gates, norms, biases and embeddings."""
        optimizer = torch.optim.AdamW(self.parameter_groups(), lr=self.lr, betas=self.betas)
        steps = self.trainer.estimated_stepping_batches
        if math.isinf(steps):
            raise ValueError("the learning rate falls over the whole run, and this one has no end; give max_epochs")
        total = max(1, int(steps))
        rising = max(1, round(self.warmup * total))

        def rate(step: int) -> float:
            if step < rising:
                return (step + 1) / rising
            done = min(1.0, (step - rising) / max(1, total - rising))
            return self.final_lr + (1 - self.final_lr) * 0.5 * (1 + math.cos(math.pi * done))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The decayed parameters, then the others."""
        embeddings = {id(p) for m in self.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
        decayed, others = [], []
        for parameter in self.parameters():
            plain = parameter.ndim < 2 or getattr(parameter, "no_weight_decay", False) or id(parameter) in embeddings
            (others if plain else decayed).append(parameter)
        return [{"params": decayed, "weight_decay": self.weight_decay}, {"params": others, "weight_decay": 0.0}]

    def on_fit_start(self) -> None:
        """Takes along what the data module knows of the series."""
        self._read_series_info()
        if self.truncated_bptt and not getattr(self.trainer.datamodule, "truncated_bptt", True):  # pyright: ignore[reportAttributeAccessIssue]
            raise ValueError("model.truncated_bptt needs consecutive segments; set data.truncated_bptt: true as well")

    def on_predict_start(self) -> None:
        """As in a fit."""
        self._read_series_info()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what rebuilds the model, and the carried states of all ranks."""
        checkpoint["tsgdn"] = {"format": 1, "model": self.model.config, "series": self.series_info}
        if self._carried is not None:
            leaves = {name: leaf.contiguous() for name, leaf in state_leaves(self._carried)}
            ranks = self._world()[1]
            checkpoint["tsgdn_carried"] = {
                name: self.all_gather(leaf).cpu() if ranks > 1 else leaf.cpu()[None]  # pyright: ignore[reportAttributeAccessIssue]
                for name, leaf in leaves.items()
            }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores the carried states of this rank."""
        plain = checkpoint.get("tsgdn", {})
        if plain:
            self.require_same_model(plain["model"])
        self.series_info = dict(plain.get("series", {})) or self.series_info
        leaves = checkpoint.get("tsgdn_carried")
        if leaves and self.truncated_bptt:
            rank, ranks = self._world()
            first = next(iter(leaves.values()))
            if first.shape[0] != ranks:
                raise ValueError(
                    f"states were carried on {first.shape[0]} processes, now there are {ranks}; resume alike"
                )
            mine = iter([leaf[rank] for leaf in leaves.values()])
            empty = self.model.initial_state(first.shape[1], self._variates(leaves))
            self._carried = map_state(lambda _: next(mine), empty)

    def require_same_model(self, config: dict[str, Any]) -> None:
        """Refuses a checkpoint whose model was built otherwise, and says in what."""
        differing = [k for k in {**self.model.config, **config} if self.model.config.get(k) != config.get(k)]
        if differing:
            raise ValueError(
                f"the checkpoint's model differs from the configured one in {', '.join(differing)}; "
                "give the --config and options that it was fitted with"
            )

    def _score(self, name: str, batch: Batch) -> None:
        read = _scored_tokens(batch, self.model.patch_size, self.model.span)
        loss, _ = self.loss(batch, None, read)
        rows = batch.values.shape[0]
        self.log(name, loss, prog_bar=True, on_step=False, on_epoch=True, batch_size=rows, sync_dist=True)

    def _continue(self, batch: Batch, restart: Tensor) -> Any:
        """The carried state; the rows that restart begin from their past."""
        fresh = (
            self.model.initial_state(*batch.values.shape[:2], device=batch.values.device)
            if batch.past is None
            else self.model.prime(batch.past)
        )
        if self._carried is None:
            return fresh

        def choose(new: Tensor, old: Tensor) -> Tensor:
            return torch.where(restart.view(-1, *[1] * (new.ndim - 1)), new, old.to(new.device))

        return map_state(choose, fresh, self._carried)

    def _mixed_seed(self, batch_idx: int) -> int:
        """One number of (seed, epoch, batch, rank); Fibonacci hashing keeps neighbours apart."""
        mixed = self.seed
        for part in (self.current_epoch, batch_idx, self._world()[0]):
            mixed = ((mixed ^ part) * 0x9E3779B97F4A7C15 + 1) % 2**63
        return mixed

    def _world(self) -> tuple[int, int]:
        """Rank and number of processes."""
        trainer = self._trainer
        return (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)

    def _variates(self, leaves: dict[str, Tensor]) -> int:
        return leaves["scaling.count"].shape[2]  # ranks, series, variates

    def _read_series_info(self) -> None:
        info = getattr(self.trainer.datamodule, "series_info", None)  # pyright: ignore[reportAttributeAccessIssue]
        if info:
            self.series_info = dict(info)


def _scored_tokens(batch: Batch, patch_size: int, span: int) -> Tensor:
    """Tokens that forecast a cell with a target in any row."""
    target = batch.target
    if target is None:
        raise ValueError("the batch has no target to compare with; windows.Cutter gives one")
    steps = target.isfinite().any(0).any(0)
    before = torch.nn.functional.pad(steps.long().cumsum(0), (1, 0))
    tokens = torch.arange(steps.shape[0] // patch_size, device=steps.device)
    begin = tokens * patch_size
    return tokens[before[(begin + span).clamp(max=len(steps))] > before[begin]]
