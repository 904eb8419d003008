"""Copies that train as one are the models that they would be alone; on a GPU they replay as graphs."""

import io
import math

import pytest
import torch
from sizes import small_model_args
from torch import Tensor, nn
from torch.testing import assert_close

from tsgdn import checks
from tsgdn.kernels import Readout, causal_conv, gated_delta_rule, prologue, readout
from tsgdn.mixers import MIXERS
from tsgdn.mixers.layers import draws, linear
from tsgdn.model.backbone import BACKBONES, Backbone, cycle
from tsgdn.streamable import map_state, same_sizes
from tsgdn.training.replicas import Replicas, decayed

FEATURES, WIDTH, ROWS, TOKENS = 3, 8, 2, 9
NAMES = sorted([*MIXERS, *BACKBONES])
SEEDS, RATES = (3, 4, 3), (1e-2, 3e-3, 3e-2)


class Model(nn.Module):
    def __init__(self, mixer: str, dtype: torch.dtype = torch.float64, width: int = WIDTH) -> None:
        super().__init__()
        generator = draws()
        self.embed = linear(FEATURES, width, generator, width=FEATURES)
        self.read = linear(width, 1, generator, width=width)
        self.backbone = Backbone(width, len(cycle(mixer)), mixer, small_model_args(mixer), variate_every=0)
        self.to(dtype)

    def forward(self, x, gap=None, write=None, state=None):
        mixed, state = self.backbone(self.embed(x)[:, None], state, gap=gap, write=write)
        return self.read(mixed[:, 0]), state


def loss(y, batch):
    return (batch["weight"] * (y - batch["target"]).square()).sum()


def make_batch(copies: int, dtype: torch.dtype = torch.float64, *, tokens: int = TOKENS, silent: bool = True):
    shape = (copies, ROWS, tokens)
    batch = {
        "x": torch.randn(*shape, FEATURES, dtype=dtype),
        "target": torch.randn(*shape, 1, dtype=dtype),
        "weight": torch.rand(*shape, 1, dtype=dtype) / tokens,
    }
    if silent:
        batch["gap"] = torch.where(torch.rand(shape) < 0.2, 2.0, 0.0).to(dtype)
        batch["write"] = (torch.rand(shape) < 0.8).to(dtype)
    return batch


def make(mixer: str = "gated_deltanet", steps: int = 20, dtype: torch.dtype = torch.float64, **more) -> Replicas:
    given = {"seeds": SEEDS, "learning_rates": RATES, "loss": loss, "steps": steps, **more}
    return Replicas(lambda: Model(mixer, dtype), **given)


def only(batch, *copies):
    return {name: leaf[list(copies)] for name, leaf in batch.items()}


def weights(replicas: Replicas, copy: int):
    return {name: p.detach() for name, p in replicas.replica(copy).named_parameters()}


def train_alone(module: nn.Module, batches, rate: float, steps: int):
    """Torch's own AdamW and clipping, a step per batch."""
    groups = [
        {"params": [p for n, p in module.named_parameters() if decayed(module, n) == chosen], "weight_decay": share}
        for chosen, share in ((True, 0.01), (False, 0.0))
    ]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), eps=1e-8)
    losses = []
    for n, batch in enumerate(batches):
        rising = round(0.1 * steps)
        factor = (n + 1) / rising if n < rising else 0.5 * (1 + math.cos(math.pi * (n - rising) / (steps - rising)))
        for group in optimizer.param_groups:
            group["lr"] = rate * factor
        optimizer.zero_grad()
        value = loss(module(batch["x"], batch["gap"], batch["write"])[0], batch)
        value.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        losses.append(value.detach())
    return torch.stack(losses)


def check_alone(mixer: str, taken: int, copies) -> None:
    steps = 20
    replicas, batches = make(mixer, steps), [make_batch(len(SEEDS)) for _ in range(taken)]
    together = torch.stack([replicas.step(batch) for batch in batches])
    for copy in copies:
        torch.manual_seed(SEEDS[copy])
        module = Model(mixer)
        alone = [{name: leaf[copy] for name, leaf in batch.items()} for batch in batches]
        assert_close(together[:, copy], train_alone(module, alone, RATES[copy], steps), rtol=1e-10, atol=1e-10)
        for name, got in weights(replicas, copy).items():
            assert_close(got, module.get_parameter(name).detach(), rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("mixer", NAMES)
def test_copies_begin_together_as_they_would_alone(mixer):
    check_alone(mixer, 3, [1])


def test_copies_trained_together_are_those_trained_alone():
    check_alone("gated_deltanet", 20, [1, 2])


@pytest.mark.slow
@pytest.mark.parametrize("mixer", NAMES)
def test_copies_of_any_mixer_trained_together_are_those_trained_alone(mixer):
    check_alone(mixer, 20, [0, 1, 2])


@pytest.mark.parametrize("mixer", ["gated_deltanet", "gated_attention", "oryx"])
def test_copies_read_a_stream_in_pieces_as_each_does_alone(mixer):
    replicas, batch = make(mixer), make_batch(len(SEEDS))
    replicas.step(batch)
    inputs = {name: batch[name] for name in ("x", "gap", "write")}
    whole, _ = replicas(inputs)
    first, state = replicas({name: leaf[:, :, :4] for name, leaf in inputs.items()})
    last, state = replicas({name: leaf[:, :, 4:] for name, leaf in inputs.items()}, state)
    assert_close(torch.cat([first, last], 2), whole, rtol=1e-12, atol=1e-12)
    assert not whole.requires_grad
    for copy in range(len(SEEDS)):
        said, alone = replicas.replica(copy)(**{name: leaf[copy] for name, leaf in inputs.items()})
        assert_close(whole[copy], said, rtol=1e-12, atol=1e-12)
        # A state that grows has room for the fullest row of all copies.
        mine, alone = same_sizes(map_state(lambda leaf, copy=copy: leaf[copy], state), alone)
        checks.assert_states_close(mine, alone, rtol=1e-12, atol=1e-12)


def test_a_resumed_training_repeats_the_uninterrupted_one_bitwise():
    batches = [make_batch(3, torch.float32) for _ in range(6)]
    whole, begun, resumed = (make(steps=6, dtype=torch.float32) for _ in range(3))
    for batch in batches:
        whole.step(batch)
    for batch in batches[:4]:
        begun.step(batch)
    file = io.BytesIO()
    torch.save(begun.state_dict(), file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.steps_done == 4
    for batch in batches[4:]:
        resumed.step(batch)
    assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)


def test_a_saved_state_does_not_move_with_the_training():
    replicas, batch = make(), make_batch(3)
    saved = replicas.state_dict()
    replicas.step(batch)
    assert_close(saved["weights"], make().state_dict()["weights"], rtol=0, atol=0)


def test_a_copy_with_bad_data_is_frozen_and_disturbs_no_other():
    clean, spoilt = make(), make()
    for n in range(4):
        batch = make_batch(3)
        clean.step(batch)
        if n == 2:
            before = weights(spoilt, 1)
            batch = {name: leaf.clone() for name, leaf in batch.items()}
            batch["x"][1, 0, 5] = torch.nan
        losses = spoilt.step(batch)
        assert losses.isnan().tolist() == [False, n >= 2, False]
    assert spoilt.failed.tolist() == [False, True, False]
    assert_close(weights(spoilt, 1), before, rtol=0, atol=0)
    for copy in (0, 2):
        assert_close(weights(spoilt, copy), weights(clean, copy), rtol=0, atol=0)


def test_a_gradient_that_is_not_finite_freezes_its_copy_alone():
    replicas = make()
    batch = make_batch(3)
    batch["weight"][0] = 1e308
    batch["target"][0] = 1.0
    before = weights(replicas, 0)
    replicas.step(batch)
    assert replicas.failed.tolist() == [True, False, False]
    assert_close(weights(replicas, 0), before, rtol=0, atol=0)


def test_each_copy_has_its_own_learning_rate():
    # One seed, one batch: the first step of Adam moves every undecayed weight in proportion to the rate.
    replicas = make(seeds=(0, 0, 0), learning_rates=(1e-3, 2e-3, 1e-3))
    start = weights(replicas, 0)
    replicas.step({name: leaf[:1].expand(3, *leaf.shape[1:]) for name, leaf in make_batch(1).items()})
    moved = [weights(replicas, copy) for copy in range(3)]
    assert_close(moved[0], moved[2], rtol=0, atol=0)
    gain = "backbone.norm.weight"
    steps = [moved[copy][gain] - start[gain] for copy in range(2)]
    assert steps[0].abs().min() > 1e-5
    assert_close(steps[1], 2 * steps[0], rtol=1e-9, atol=0)


def test_weight_decay_acts_on_matrices_alone():
    module = Model("mamba2")
    chosen = {name for name, _ in module.named_parameters() if decayed(module, name)}
    assert {"embed.weight", "backbone.blocks.0.mixer.project.weight", "backbone.blocks.0.mlp.up.weight"} <= chosen
    spared = ("norm", "A_log", "dt_bias", "rate_log", "conv_bias", ".D")
    assert not any(word in name for name in chosen for word in spared)


def test_buffers_that_differ_stay_with_their_copies():
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))
            self.register_buffer("shift", torch.randn(2))
            self.register_buffer("same", torch.ones(2))

        def forward(self, x, state=None):
            return self.weight * x + self.shift + self.same, x

    replicas = Replicas(Shifted, seeds=(0, 1), learning_rates=(0.1, 0.1), loss=lambda y, _: y.mean(), steps=2)
    y, _ = replicas({"x": torch.zeros(2, 4, 2)})
    for copy in range(2):
        torch.manual_seed(copy)
        assert_close(y[copy], Shifted()(torch.zeros(4, 2))[0].detach(), rtol=0, atol=0)


def test_building_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    want = torch.randn(3)
    torch.manual_seed(5)
    replicas = make()
    replicas.replica(0)
    assert_close(torch.randn(3), want, rtol=0, atol=0)


def test_what_does_not_fit_is_said_in_one_line():
    replicas, batch = make(steps=1), make_batch(3)
    cases = [
        (lambda: make(learning_rates=(1e-3,)), "3 seeds, 1 learning rates"),
        (lambda: make(steps=0), "steps 0"),
        (lambda: make(graphs=True), "CUDA graphs need a GPU"),
        (lambda: replicas.step(only(batch, 0, 1)), r"x is \(2, 2, 9, 3\); of 3 copies it must be \(3, B, ...\)"),
        (lambda: replicas.step({"target": batch["target"]}), "also needs 'x'"),
        (lambda: replicas({"x": batch["x"], "y": batch["x"]}), "inputs has 'y'"),
        (lambda: make(loss=lambda y, _: y).step(batch), r"loss gave \(2, 9, 1\) for a copy; expected a scalar"),
        (lambda: replicas.load_state_dict(make(steps=2).state_dict()), "the state has steps 2, these replicas 1"),
        (lambda: replicas.load_state_dict(make("gru", steps=1).state_dict()), "other names or shapes"),
    ]
    for call, said in cases:
        with pytest.raises(ValueError, match=said) as caught:
            call()
        assert "\n" not in str(caught.value)
    replicas.step(batch)
    with pytest.raises(ValueError, match="all 1 steps are done"):
        replicas.step(batch)
    with pytest.raises(IndexError):
        replicas.replica(3)


# ---- the ops under vmap


def loop(fn, copies: int, args: dict[str, Tensor]):
    """`fn` copy by copy."""
    parts = [fn(**{name: x[copy] for name, x in args.items()}) for copy in range(copies)]
    return tuple(torch.stack(leaves) for leaves in zip(*parts, strict=True))


def check_copies(fn, args: dict[str, Tensor], data: dict[str, Tensor], tolerance: float) -> None:
    """Outputs and gradients under vmap against those of one call per copy."""
    copies = next(iter(args.values())).shape[0]
    got = []
    for form in (torch.vmap(lambda given: fn(**given)), lambda given: loop(fn, copies, given)):
        leaves = {name: x.clone().requires_grad_() for name, x in args.items()}
        out = form({**leaves, **data})
        total = sum((y * torch.linspace(0.5, 1, y.numel()).view(y.shape)).sum() for y in out)
        got.append((*out, *torch.autograd.grad(total, list(leaves.values()))))
    for a, b in zip(*got, strict=True):
        assert_close(a, b, rtol=tolerance, atol=tolerance)


def rule_args(
    copies: int, rows: int, tokens: int, dtype: torch.dtype, *, heads: int = 2, channels: bool = False
) -> dict[str, Tensor]:
    each = (copies, rows, tokens, heads)
    gate = (*each, 4) if channels else each
    return {
        "q": torch.randn(*each, 4, dtype=dtype),
        "k": torch.randn(*each, 4, dtype=dtype),
        "v": torch.randn(*each, 3, dtype=dtype),
        "log_decay": -torch.rand(gate, dtype=dtype),
        "beta": torch.rand(each, dtype=dtype),
        "state": torch.randn(copies, rows, heads, 4, 3, dtype=dtype),
        "gate": torch.randn(*each, 3, dtype=dtype),
        "weight": 1 + torch.randn(copies, 3, dtype=dtype) / 9,
    }


def rule(gate, weight, **given):
    return gated_delta_rule(**given, norm=True, scale=0.5, readout=Readout(gate, weight), residual=True)


def prologue_args(copies: int, rows: int, tokens: int, dtype: torch.dtype):
    args = {
        "inputs": torch.randn(copies, rows, tokens, 5, dtype=dtype),
        "raw": torch.randn(copies, rows, tokens, 4, dtype=dtype),
        "conv_weight": torch.randn(copies, 5, 3, dtype=dtype),
        "conv_bias": torch.randn(copies, 5, dtype=dtype),
        "A_log": torch.randn(copies, 2, dtype=dtype),
        "dt_bias": torch.randn(copies, 2, dtype=dtype),
        "rate": -torch.rand(copies, 2, dtype=dtype),
        "tail": torch.randn(copies, rows, 2, 5, dtype=dtype),
    }
    data = {
        "write": torch.rand(copies, rows, tokens, dtype=dtype),
        "gap": torch.where(torch.rand(copies, rows, tokens) < 0.4, 2.0, 0.0).to(dtype),
        "lengths": torch.randint(0, tokens + 1, (copies, rows)),
    }
    return args, data


@pytest.mark.parametrize("tokens", [1, 5])
def test_the_rule_takes_copies_as_rows(tokens):
    check_copies(rule, rule_args(2, 3, tokens, torch.float64), {}, 1e-12)


def test_the_prologue_takes_copies_as_rows():
    check_copies(prologue, *prologue_args(2, 3, 5, torch.float64), 1e-12)


def test_a_convolution_may_share_its_taps_among_copies():
    weight = torch.randn(4, 3, dtype=torch.float64)
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    together, ends = torch.vmap(lambda x: causal_conv(x, weight))(x)
    for copy in range(2):
        y, end = causal_conv(x[copy], weight)
        assert_close(together[copy], y, rtol=0, atol=0)
        assert_close(ends[copy], end, rtol=0, atol=0)


def test_copies_of_copies_are_rows_too():
    x, weight = torch.randn(2, 3, 1, 5, 4, dtype=torch.float64), torch.randn(2, 4, 3, dtype=torch.float64)
    inner = torch.vmap(causal_conv, in_dims=(0, None))
    y, _ = torch.vmap(inner)(x, weight)
    for a in range(2):
        for b in range(3):
            assert_close(y[a, b], causal_conv(x[a, b], weight[a])[0], rtol=1e-12, atol=1e-12)


def test_packed_sequences_are_refused_under_vmap():
    args = rule_args(2, 1, 4, torch.float64)
    del args["gate"], args["weight"], args["state"]
    with pytest.raises(RuntimeError, match="cu_seqlens"):
        torch.vmap(lambda a: gated_delta_rule(**a, cu_seqlens=torch.tensor([0, 1, 4])))(args)


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> str:
    """The Triton kernels: interpreted, or on the GPU that is there."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TSGDN_KERNEL", "triton")
    if torch.cuda.is_available():
        torch.use_deterministic_algorithms(False)  # some of CUDA's operators have no such mode
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(
    ("tokens", "channels"), [(3, False), (1, False), pytest.param(2, True, marks=pytest.mark.slow)]
)
def test_the_triton_kernels_of_the_rule_take_copies_as_rows(fused, tokens, channels):
    with torch.device(fused):
        check_copies(rule, rule_args(2, 2, tokens, torch.float32, heads=1, channels=channels), {}, 1e-5)


def test_the_triton_prologue_has_parameters_for_each_copy(fused):
    with torch.device(fused):
        check_copies(prologue, *prologue_args(2, 2, 4, torch.float32), 1e-5)


def test_the_triton_readout_has_a_gain_for_each_copy(fused):
    with torch.device(fused):
        args = rule_args(2, 2, 3, torch.float32)
        args = {"o": args["v"], "gate": args["gate"], "weight": args["weight"]}
        check_copies(lambda **given: (readout(**given),), args, {}, 1e-5)


# ---- on a GPU


def on_gpu(mixer: str, **more) -> Replicas:
    return make(mixer, steps=8, dtype=torch.float32, device="cuda", **more)


@pytest.mark.gpu
@pytest.mark.parametrize("mixer", NAMES)
def test_a_step_as_a_graph_is_the_step_itself(mixer):
    graphed, eager = on_gpu(mixer), on_gpu(mixer, graphs=False)
    for n in range(8):
        # Two shapes, so two graphs that take turns.
        batch = make_batch(3, torch.float32, tokens=(70, 40)[n % 2])
        assert_close(graphed.step(batch), eager.step(batch), rtol=1e-5, atol=1e-6)
    assert graphed.steps_done == eager.steps_done == 8
    assert not graphed.failed.any()


@pytest.mark.gpu
@pytest.mark.parametrize("mixer", [name for name in NAMES if name not in ("ham", "oryx")])
def test_copies_on_a_gpu_are_those_on_the_cpu(mixer):
    # The two with discrete choices may choose otherwise where single precision ties.
    gpu, cpu = on_gpu(mixer), make(mixer, steps=8)
    for _ in range(4):
        batch = make_batch(3, tokens=70)
        got = gpu.step({name: leaf.float() for name, leaf in batch.items()})
        assert_close(got.cpu().double(), cpu.step(batch), rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
def test_a_graph_goes_on_from_a_loaded_state():
    batches = [make_batch(3, torch.float32) for _ in range(6)]
    whole, resumed = on_gpu("gated_deltanet"), on_gpu("gated_deltanet")
    for batch in batches[:3]:
        whole.step(batch)
    resumed.step(batches[0])  # its graph is there before the state comes
    resumed.load_state_dict(whole.state_dict())
    for batch in batches[3:]:
        assert_close(resumed.step(batch), whole.step(batch), rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
def test_a_frozen_copy_on_a_gpu_disturbs_no_other():
    clean, spoilt = on_gpu("gated_deltanet"), on_gpu("gated_deltanet")
    for n in range(3):
        batch = make_batch(3, torch.float32)
        want = clean.step(batch)
        if n == 1:
            batch["x"][1, 0, 5] = torch.nan
        got = spoilt.step(batch)
        assert_close(got[[0, 2]], want[[0, 2]], rtol=1e-5, atol=1e-6)
    assert spoilt.failed.tolist() == [False, True, False]


@pytest.mark.gpu
def test_copies_on_a_gpu_read_a_stream_in_pieces():
    replicas = on_gpu("gated_deltanet")
    batch = make_batch(3, torch.float32, tokens=70)
    replicas.step(batch)
    inputs = {name: batch[name].cuda() for name in ("x", "gap", "write")}
    whole, _ = replicas(inputs)
    said, state = [], None
    for begin, end in ((0, 1), (1, 40), (40, 41), (41, 70)):
        y, state = replicas({name: leaf[:, :, begin:end] for name, leaf in inputs.items()}, state)
        said.append(y)
    assert_close(torch.cat(said, 2), whole, rtol=1e-4, atol=1e-5)
    alone, _ = replicas.replica(1)(**{name: leaf[1] for name, leaf in inputs.items()})
    assert_close(whole[1], alone.detach(), rtol=1e-4, atol=1e-5)
