"""Training: a batch can be learned by heart, a resumed run repeats the uninterrupted one, states are carried."""

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from tsgdn.adapters.predictor import ModelPredictor
from tsgdn.data.module import ForecastDataModule, resolve
from tsgdn.data.series import Series
from tsgdn.data.windows import Segments
from tsgdn.mixers import MIXERS
from tsgdn.model.forecaster import Forecaster
from tsgdn.streamable import state_leaves
from tsgdn.training.augment import close_patches, mask_patches
from tsgdn.training.module import AveragedWeights, ForecastModule, budget_losses
from tsgdn.types import Batch

P = 4


def make_series(count: int = 3, length: int = 150) -> list[Series]:
    rng = np.random.default_rng(0)
    t = np.arange(length)
    return [
        Series(
            f"s{i}",
            np.datetime64("2024-01-01", "ns"),
            "h",
            (50 + 10 * np.sin(2 * np.pi * (t + i) / 12) + rng.normal(size=length))[None],
        )
        for i in range(count)
    ]


def make_data(**options: Any) -> ForecastDataModule:
    settings: dict[str, Any] = {"horizon": 8, "patch_size": P, "seasons": [1, 12], "batch_size": 4}
    settings |= {"window_patches": 8, "steps_per_epoch": 3, "series": make_series()}
    return ForecastDataModule(**(settings | options))


def make_module(
    dropout: float = 0.2, mixer: str = "gated_deltanet", mixer_args: dict[str, Any] | None = None, **options: Any
) -> ForecastModule:
    seed_everything(0, verbose=False)
    sizes = {"patch_size": P, "patches_ahead": 2, "seasons": (1, 12), "width": 16, "depth": 2, "variate_every": 0}
    model = Forecaster(mixer=mixer, mixer_args=mixer_args, dropout=dropout, **sizes)
    return ForecastModule(model, **({"loss_tokens": 3, "mask_windows": 0.2} | options))


def make_trainer(root: Path, **options: Any) -> Trainer:
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "gradient_clip_val": 1.0,
        "max_epochs": 3,
        "default_root_dir": root,
    }
    return Trainer(**(settings | options))


class Stop(Exception):
    pass


class KillAfter(Callback):
    """Ends the process's part of a run without any of the tidying up."""

    def __init__(self, step: int):
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            raise Stop


def test_one_batch_can_be_learned_by_heart() -> None:
    data = make_data()
    data.setup()
    batch = data.train_dataloader().source[0]
    assert isinstance(batch, Batch)
    module = make_module(dropout=0.0)
    optimizer = torch.optim.AdamW(module.parameter_groups(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss, _ = module.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("stop_at", [4, 6], ids=["within an epoch", "at the end of an epoch"])
@pytest.mark.parametrize("truncated_bptt", [False, True], ids=["windows", "segments"])
def test_a_resumed_run_repeats_the_uninterrupted_one_bit_by_bit(
    tmp_path: Path, stop_at: int, truncated_bptt: bool
) -> None:
    def run(folder: str, *, kill: bool, ckpt: Path | None = None) -> tuple[ForecastModule, Path]:
        saver = ModelCheckpoint(tmp_path / folder, filename="{step}", every_n_train_steps=2, save_top_k=-1)
        callbacks: list[Callback] = [AveragedWeights(0.9), saver, *([KillAfter(stop_at)] if kill else [])]
        trainer = make_trainer(tmp_path, callbacks=callbacks)
        module = make_module(truncated_bptt=truncated_bptt)
        trainer.fit(module, make_data(truncated_bptt=truncated_bptt), ckpt_path=ckpt, weights_only=True)
        return module, tmp_path / folder

    whole, folder = run("whole", kill=False)
    with pytest.raises(Stop):
        run("killed", kill=True)
    resumed, again = run("killed", kill=False, ckpt=tmp_path / "killed" / f"step={stop_at}.ckpt")
    for (name, a), (_, b) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(a, b), name  # the averages
    one, other = (torch.load(f / "step=8.ckpt", weights_only=True) for f in (folder, again))
    for name, value in one["current_model_state"].items():
        assert torch.equal(value, other["current_model_state"][name]), name
    for name, value in one.get("tsgdn_carried", {}).items():
        assert torch.equal(value, other["tsgdn_carried"][name]), name
    assert ("tsgdn_carried" in one) == truncated_bptt


def test_a_checkpoint_holds_the_average_and_rebuilds_the_model_from_plain_values(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, filename="last", every_n_train_steps=6, save_top_k=-1)
    make_trainer(tmp_path, max_epochs=2, callbacks=[AveragedWeights(0.999), saver]).fit(make_module(), make_data())
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    model = Forecaster(**checkpoint["tsgdn"]["model"])
    model.load_state_dict({k.removeprefix("model."): v for k, v in checkpoint["state_dict"].items()})
    current = checkpoint["current_model_state"]
    assert any(not torch.equal(v, current[k]) for k, v in checkpoint["state_dict"].items())
    assert checkpoint["tsgdn"]["series"]["freq"] == "h"
    assert checkpoint["tsgdn"]["series"]["horizon"] == 8


def test_the_average_forgets_the_first_weights_within_a_short_run() -> None:
    average = AveragedWeights(0.999)._kwargs["avg_fn"]
    mean = torch.zeros(1)
    for n in range(1, 100):
        mean = average(mean, torch.ones(1), torch.tensor(n))
    assert mean > 0.99


def test_a_checkpoint_of_another_model_is_refused_by_name(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, filename="last", every_n_train_steps=1, save_top_k=-1)
    make_trainer(tmp_path, max_epochs=1, callbacks=[saver], limit_train_batches=1).fit(make_module(), make_data())
    with pytest.raises(ValueError, match="differs from the configured one in mixer"):
        make_trainer(tmp_path).fit(make_module(mixer="gru"), make_data(), ckpt_path=tmp_path / "last.ckpt")


def test_carried_segments_give_the_loss_and_the_state_of_the_whole_stretch() -> None:
    data = make_data(series=make_series(1, 400), truncated_bptt=True, batch_size=2, validation_windows=1)
    data.setup()
    segments = data.train_dataloader().source
    module = make_module(dropout=0.0, truncated_bptt=True, loss_tokens=None, close_share=0.0, mask_windows=0.0).eval()
    module.log = lambda *_, **__: None  # pyright: ignore[reportAttributeAccessIssue]
    pieces = [segments[i] for i in range(4)]
    index = next(i for i in range(1, 4) if not pieces[i].restart.any())
    first, second = pieces[index - 1], pieces[index]
    assert isinstance(first, Segments)
    module.training_step(first._replace(restart=torch.ones(2, dtype=torch.bool)), 0)
    module.training_step(second, 1)

    a, b = first.batch, second.batch
    whole = Batch(torch.cat([a.values, b.values], -1), torch.cat([a.observed, b.observed], -1), past=a.past)
    with torch.no_grad():
        quantiles, end = module.model(whole, module.model.prime(a.past))
        _, middle = module.model(a, module.model.prime(a.past))
        continued, _ = module.model(b, middle)
    n = continued.values.shape[2]
    torch.testing.assert_close(continued.values, quantiles.values[:, :, -n:], rtol=1e-4, atol=1e-5)
    for (name, got), (_, want) in zip(state_leaves(module._carried), state_leaves(end), strict=True):
        assert not got.requires_grad
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5, msg=name)


def test_a_row_that_restarts_forgets_the_carried_state_and_the_others_keep_it() -> None:
    data = make_data(truncated_bptt=True)
    data.setup()
    segments = data.train_dataloader().source[0]
    module = make_module(truncated_bptt=True)
    with torch.no_grad():
        _, module._carried = module.model(segments.batch, module.model.prime(segments.batch.past))
    restart = torch.tensor([True, False, False, True])
    state = module._continue(segments.batch, restart)
    assert state.steps.tolist() == [0, *module._carried.steps[1:3].tolist(), 0]
    assert (module._carried.steps > 0).all()
    for (name, got), (_, kept) in zip(state_leaves(state), state_leaves(module._carried), strict=True):
        assert torch.equal(got[1:3], kept[1:3]), name


def test_mixed_precision_trains_and_keeps_the_states_wide(tmp_path: Path) -> None:
    module = make_module(truncated_bptt=True)
    trainer = make_trainer(tmp_path, precision="bf16-mixed", max_steps=2, callbacks=[AveragedWeights()])
    trainer.fit(module, make_data(truncated_bptt=True))
    assert all(p.isfinite().all() for p in module.parameters())
    for name, leaf in state_leaves(module._carried):
        assert leaf.dtype in (torch.float32, torch.float64, torch.int64, torch.bool), name


def test_a_learned_router_is_held_to_its_budget_by_the_training() -> None:
    module = make_module(mixer="ham", mixer_args={"slots": 4, "router": "learned", "share": 0.3}, dropout=0.0)
    data = make_data()
    data.setup()
    batch = data.train_dataloader().source[0]
    with budget_losses(module.model) as owed:
        module.loss(batch)
    mixers = [block.mixer for block in module.model.backbone.blocks]
    assert len(owed) == len(mixers)
    assert all(loss > 0 for loss in owed)
    sum(owed).backward()
    assert all(mixer.router.weight.grad.abs().max() > 0 for mixer in mixers)
    with budget_losses(make_module(mixer="ham").model) as owed:
        pass
    assert owed == []
    module.loss(batch)
    assert len(owed) == 0, "outside the context nothing listens"


def test_gates_norms_biases_and_embeddings_are_not_decayed() -> None:
    for mixer in MIXERS:
        module = make_module(mixer=mixer)
        decayed, others = module.parameter_groups()
        names = {id(p): n for n, p in module.named_parameters()}
        assert len(decayed["params"]) + len(others["params"]) == len(names)
        assert others["weight_decay"] == 0.0
        kept = [names[id(p)] for p in decayed["params"]]
        assert kept
        assert not [n for n in kept if n.endswith(("_log", "bias", ".D")) or "norm" in n], mixer


def test_closing_hides_the_ends_of_patches_and_leaves_half_of_the_windows_alone() -> None:
    values = torch.randn(400, 2, 40, dtype=torch.float64)
    batch = Batch(values, torch.ones_like(values, dtype=torch.bool), target=values)
    closed = close_patches(batch, P, torch.Generator().manual_seed(0))
    again = close_patches(batch, P, torch.Generator().manual_seed(0))
    assert torch.equal(closed.observed, again.observed)
    assert closed.target is values
    patches = closed.observed[:, 0].unflatten(-1, (-1, P))
    assert torch.equal(closed.observed[:, 0], closed.observed[:, 1])
    assert (patches[..., 1:].long() <= patches[..., :-1].long()).all()
    touched = ~patches.all(-1)
    assert 0.12 < touched.float().mean() < 0.18
    assert 0.45 < touched.any(-1).float().mean() < 0.52


def test_masking_hides_one_run_of_whole_patches() -> None:
    values = torch.randn(300, 1, 40, dtype=torch.float64)
    batch = Batch(values, torch.ones_like(values, dtype=torch.bool), target=values)
    masked = mask_patches(batch, P, torch.Generator().manual_seed(0), windows=0.5, longest=5)
    patches = masked.observed[:, 0].unflatten(-1, (-1, P))
    assert torch.equal(patches.any(-1), patches.all(-1))
    hidden = ~patches.all(-1)
    assert hidden.sum(-1).max() == 5
    assert (hidden.long().diff(dim=-1) == 1).sum(-1).max() == 1
    assert not hidden[:, 0].any()
    assert 0.4 < hidden.any(-1).float().mean() < 0.6


def test_cells_seen_by_their_own_token_are_not_scored_and_hidden_ones_are() -> None:
    module = make_module(dropout=0.0).eval()
    values = torch.randn(1, 1, 8, dtype=torch.float64)
    own_only = values.clone()
    own_only[..., P:] = torch.nan
    seen = Batch(values, torch.ones_like(values, dtype=torch.bool), target=own_only)
    assert float(module.loss(seen, read=torch.tensor([0]))[0].detach()) == 0.0
    hidden = seen._replace(observed=seen.observed.index_fill(-1, torch.tensor([P - 1]), False))
    assert float(module.loss(hidden, read=torch.tensor([0]))[0].detach()) > 0.0


def test_validation_scores_the_end_of_the_training_part_and_training_never_sees_it() -> None:
    data = make_data()
    data.setup()
    for trained, whole in zip(data.training, data.whole, strict=True):
        assert len(trained) < len(whole)
    batches = list(data.val_dataloader())
    scored = sum(int(batch.target.isfinite().sum()) for batch in batches)
    assert scored == sum(len(w) - len(t) for w, t in zip(data.whole, data.training, strict=True))


def test_series_too_short_for_a_validation_are_told() -> None:
    with pytest.raises(ValueError, match="validation_windows: 0"):
        make_data(series=make_series(1, 12)).setup()
    # a horizon of 2 leaves two patches of 4 before it
    with pytest.raises(ValueError, match=r"the 10 steps that a validation of horizon 2 takes \(the longest has 9\)"):
        make_data(series=make_series(2, 9), horizon=2).setup()
    make_data(series=make_series(2, 10), horizon=2).setup()


@pytest.mark.parametrize(
    "option",
    [
        {"batch_size": 0},
        {"window_patches": 1},
        {"steps_per_epoch": 0},
        {"validation_windows": -1},
        {"num_workers": -1},
        {"seed": -1},
    ],
)
def test_sizes_that_nothing_can_be_cut_with_are_refused_by_name(option: dict[str, int]) -> None:
    ((name, value),) = option.items()
    with pytest.raises(ValueError, match=f"{name} is {value}, expected at least"):
        make_data(**option)


@pytest.mark.parametrize("option", [{"horizon": 0}, {"patch_size": 0}, {"patches_ahead": -1}])
def test_zero_is_not_taken_for_nothing_said(option: dict[str, int]) -> None:
    ((name, value),) = option.items()
    with pytest.raises(ValueError, match=f"{name} is {value}, expected at least 1"):
        resolve("simulated", **option)


@pytest.mark.parametrize("option", [{"lr": -1.0}, {"loss_tokens": 0}, {"close_share": 0.8}, {"warmup": 2.0}])
def test_numbers_of_a_training_outside_their_range_are_refused_by_name(option: dict[str, float]) -> None:
    ((name, value),) = option.items()
    with pytest.raises(ValueError, match=f"{name} is {value}, expected a number from"):
        make_module(**option)


def test_predictions_beyond_the_direct_steps_are_those_of_the_evaluation() -> None:
    options: dict[str, Any] = {"patches_ahead": 1, "seasons": [1, 24]}
    data = ForecastDataModule("simulated", batch_size=3, **options)
    data.setup()
    shape = resolve("simulated", **options)
    assert shape["patch_size"] < shape["horizon"]  # so a forecast is rolled out, on known features
    torch.manual_seed(0)
    sizes = {name: shape[name] for name in ("patch_size", "patches_ahead", "seasons", "known_features")}
    module = ForecastModule(Forecaster(**sizes, width=16, depth=1, variate_every=0).eval())
    module.series_info = data.series_info
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        got = module.predict_step(next(iter(data.predict_dataloader())), 0).numpy()
    want = ModelPredictor(module.model, calendar=True).predict(data.predicted[:3], 24, module.model.quantile_levels)
    np.testing.assert_allclose(got, np.stack(want), rtol=1e-4, atol=1e-4)


def test_two_processes_train_on_different_windows_and_agree_on_the_weights(tmp_path: Path) -> None:
    script = tmp_path / "ddp.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import sys
            sys.path.insert(0, {str(Path(__file__).parent)!r})
            import torch
            torch.set_num_threads(1)
            from lightning.pytorch import Callback
            from test_training import AveragedWeights, make_data, make_module, make_trainer

            class Compare(Callback):
                def on_train_batch_start(self, trainer, module, batch, batch_idx):
                    first = module.all_gather(batch.batch.values[:, 0, :8].contiguous())
                    assert not torch.equal(first[0], first[1]), "both processes drew the same windows"

                def on_train_end(self, trainer, module):
                    for name, parameter in module.named_parameters():
                        both = module.all_gather(parameter.detach())
                        assert torch.equal(both[0], both[1]), name
                    carried = module.all_gather(module._carried.scaling.mean)
                    assert not torch.equal(carried[0], carried[1]), "carried states were mixed up"
                    print("agreed", flush=True)

            if __name__ == "__main__":
                callbacks = [AveragedWeights(), Compare()]
                options = {{"strategy": "ddp_fork", "devices": 2, "max_epochs": 1, "callbacks": callbacks}}
                trainer = make_trainer({str(tmp_path)!r}, **options)
                trainer.fit(make_module(truncated_bptt=True), make_data(truncated_bptt=True))
            """
        )
    )
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=240, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("agreed") == 2
