"""The launches around the memory of a Gated DeltaNet layer: fused prologue and readout against their torch paths."""

import os
from collections.abc import Callable
from importlib import import_module
from typing import Any

import jaxtyping
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tsgdn.checks import (
    check_causal,
    check_gradients_streaming,
    check_rows_independent,
    check_state_is_a_value,
    check_streaming,
)
from tsgdn.kernels.prologue import prologue
from tsgdn.kernels.readout import readout
from tsgdn.mixers.gated_deltanet import GatedDeltaNet

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported
triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from tsgdn.kernels.prologue_fused import prologue_backward_op, prologue_op  # noqa: E402
from tsgdn.kernels.readout_fused import (  # noqa: E402
    readout_backward_op,
    readout_gradient_tile,
    readout_op,
    readout_tile,
)

# Where the kernels let exp2 become infinity on purpose, numpy, which interprets them, warns.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning")

BLOCK = 32
NAMES = ("inputs", "raw", "conv_weight", "conv_bias", "A_log", "dt_bias", "rate", "tail")
OUTPUTS = ("mixed", "beta", "log_decay", "tail")


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Switches these two ops alone between Triton (as at first) and torch; the memory between them stays on torch."""

    def choose(on: bool) -> None:
        for name in ("prologue", "readout"):
            module = import_module(f"tsgdn.kernels.{name}")
            monkeypatch.setattr(module, "kernel_for", lambda *_: "triton" if on else "torch")

    choose(True)
    return choose


def make(
    rows: int,
    tokens: int,
    *,
    taps: int = 4,
    channels: int = 5,
    heads: int = 3,
    without: tuple[str, ...] = (),
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Arguments of the prologue; what stands in `without` is left out ("decay" too)."""
    decay = "decay" not in without
    args: dict[str, Any] = {
        "inputs": torch.randn(rows, tokens, channels),
        "raw": 3 * torch.randn(rows, tokens, (1 + decay) * heads),
        "conv_weight": torch.randn(channels, taps),
        "conv_bias": torch.randn(channels),
        "tail": torch.randn(rows, taps - 1, channels),
        "write": torch.rand(rows, tokens),
        # In float64, as times are; some silences long enough to meet the bound of -40.
        "gap": torch.where(torch.rand(rows, tokens) < 0.3, 100 * torch.rand(rows, tokens), 0.0).double(),
        "lengths": torch.arange(rows) * tokens // max(rows - 1, 1),
        "beta_max": 2,
        "decay": decay,
    }
    if decay:
        args |= {"A_log": torch.randn(heads), "dt_bias": torch.randn(heads) - 6, "rate": -torch.rand(heads)}
    args = {name: None if name in without and name != "decay" else x for name, x in args.items()}
    args = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in args.items()}
    args["inputs"] = args["inputs"].to(dtype)
    return args


def double(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def run(
    op: Any, args: dict[str, Any], names: tuple[str, ...], parts: tuple[int, ...] | None = None
) -> dict[str, Tensor]:
    """Outputs and, of a random functional of the outputs `parts`, the gradients for what `names` says and is there."""
    args = dict(args)
    leaves = {name: args[name].detach().clone().requires_grad_() for name in names if args.get(name) is not None}
    out = op(**{**args, **leaves})
    out = (out,) if isinstance(out, Tensor) else out
    draw = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=draw, dtype=torch.float64).to(x.device) for x in out]
    some = range(len(out)) if parts is None else parts
    total = sum((out[i].double() * weights[i]).sum() for i in some)
    grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    found = {f"output {i}": x.detach() for i, x in enumerate(out)}
    for (name, x), grad in zip(leaves.items(), grads, strict=True):
        assert grad is None or (grad.dtype, grad.shape) == (x.dtype, x.shape), name
        found[name] = torch.zeros_like(x) if grad is None else grad
    return found


def assert_near(got: dict[str, Tensor], want: dict[str, Tensor], bound: float | dict[str, float]) -> None:
    """Relative RMS error of each tensor; where the truth is zero, so is the result."""
    assert got.keys() == want.keys()
    for name, truth in want.items():
        truth = truth.double()
        error = (got[name].double() - truth).norm()
        limit = bound if isinstance(bound, float) else bound.get(name, bound["other"])
        assert error <= limit * truth.norm(), f"{name}: {float(error / truth.norm().clamp_min(1e-30)):.1e} > {limit}"


def compare(choose: Callable[[bool], None], args: dict[str, Any], parts: tuple[int, ...] | None = None) -> None:
    """The kernels against the torch path in float64 and in float32."""
    got = run(prologue, args, NAMES, parts)
    choose(False)
    assert_near(got, run(prologue, {name: double(x) for name, x in args.items()}, NAMES, parts), 2e-6)
    assert_near(got, run(prologue, args, NAMES, parts), 1e-5)


# ---- prologue


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, BLOCK + 3])
def test_the_prologue_equals_the_torch_path(fused: Any, tokens: int) -> None:
    compare(fused, make(2, tokens))


@pytest.mark.parametrize("taps", [1, 2, 3, 8])
def test_any_number_of_taps(fused: Any, taps: int) -> None:
    for tokens in (taps - 1, taps + 1):
        if tokens:
            compare(fused, make(2, tokens, taps=taps))


@pytest.mark.parametrize(
    "without",
    [
        ("conv_bias",),
        ("write",),
        ("gap",),
        ("lengths",),
        ("tail",),
        ("decay",),
        ("gap", "lengths"),
        ("conv_bias", "write", "gap", "lengths", "tail"),
        ("decay", "gap", "lengths", "tail"),
    ],
    ids="-".join,
)
def test_what_is_left_out_changes_nothing_else(fused: Any, without: tuple[str, ...]) -> None:
    compare(fused, make(2, 6, without=without))


def test_every_length_of_a_row(fused: Any) -> None:
    args = make(8, 7, channels=3, heads=1, without=("gap",))
    compare(fused, {**args, "lengths": torch.arange(8)})
    fused(True)
    compare(fused, {**make(8, 7, channels=3, heads=1), "lengths": torch.arange(8)})


def test_a_gap_before_any_token_cuts_the_convolution_there(fused: Any) -> None:
    tokens = 6
    args = make(tokens + 1, tokens, channels=3, heads=1, without=("lengths",))
    args["gap"] = torch.eye(tokens + 1, tokens) * 5  # the last row has none
    compare(fused, args)


@pytest.mark.parametrize("part", range(4), ids=OUTPUTS)
def test_each_output_alone_has_its_gradients(fused: Any, part: int) -> None:
    compare(fused, make(2, 6), (part,))


def test_more_channels_than_one_program_takes_and_several_spans_per_row(fused: Any) -> None:
    compare(fused, make(1, BLOCK + 9, channels=130, heads=1, without=("gap", "lengths")))


def test_writes_as_booleans_and_gaps_as_integers(fused: Any) -> None:
    args = make(2, 5)
    args["write"], args["gap"] = args["write"] > 0.5, args["gap"].long()
    compare(fused, args)


def test_inputs_may_be_a_slice_of_a_projection(fused: Any) -> None:
    args = make(2, 5)
    whole = torch.cat([args["inputs"], torch.full((2, 5, 4), float("nan"))], -1)
    got = prologue(**{**args, "inputs": whole[..., :5]})
    for a, b in zip(got, prologue(**args), strict=True):
        assert torch.equal(a, b)


def test_none_is_a_tail_of_zeros_bitwise(fused: Any) -> None:
    args = make(2, 6, without=("tail", "gap"))
    zeros = {**args, "tail": torch.zeros(2, 3, 5)}
    names = tuple(name for name in NAMES if name != "tail")
    got, want = run(prologue, args, names), run(prologue, zeros, names)
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_padding_moves_no_tail_and_opens_no_gate(fused: Any) -> None:
    args = {**make(3, 7), "lengths": torch.tensor([0, 2, 7])}
    other = {**args, "inputs": args["inputs"].clone(), "gap": args["gap"].clone()}
    for row, length in enumerate((0, 2, 7)):
        other["inputs"][row, length:], other["gap"][row, length:] = 100.0, 9.0
    _, beta, log_decay, tail = prologue(**args)
    mixed, *rest = prologue(**other)
    for a, b in zip((beta, log_decay, tail), rest, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(tail[0], args["tail"][0])
    for row, length in enumerate((0, 2, 7)):
        assert torch.equal(mixed[row, :length], prologue(**args)[0][row, :length])
        assert not beta[row, length:].any()
        assert not log_decay[row, length:].any()


def streamed(taps: int) -> Callable[..., tuple[Tensor, Tensor]]:
    """The prologue as a part: inputs, logits and the silence before each token side by side."""
    heads, channels = 2, 3
    args = make(1, 1, taps=taps, channels=channels, heads=heads)
    fixed = {name: args[name] for name in ("conv_weight", "conv_bias", "A_log", "dt_bias", "rate")}

    def part(x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        inputs, raw, gap = x.split([channels, 2 * heads, 1], -1)
        gap = (gap[..., 0].detach() - 1).clamp_min(0)
        mixed, beta, log_decay, tail = prologue(inputs.contiguous(), raw.contiguous(), **fixed, tail=state, gap=gap)
        return torch.cat([mixed, beta, log_decay], -1), tail

    return part


@pytest.mark.parametrize("taps", [2, 4])
def test_cutting_anywhere_changes_nothing(fused: Any, taps: int) -> None:
    part, x = streamed(taps), torch.randn(2, 9, 8)
    check_streaming(part, x, cuts=((1,), (3,), (5, 0, 1)), rtol=0, atol=0)
    check_gradients_streaming(part, x, cut=2, rtol=1e-5, atol=1e-6)
    check_causal(part, x)
    check_state_is_a_value(part, x)
    check_rows_independent(part, x, rtol=0, atol=0)


def test_no_tokens_keep_the_tail(fused: Any) -> None:
    args = make(2, 0)
    mixed, beta, log_decay, tail = prologue(**args)
    assert (mixed.shape, beta.shape, log_decay.shape) == ((2, 0, 5), (2, 0, 3), (2, 0, 3))
    assert torch.equal(tail, args["tail"])


def test_the_softplus_keeps_its_digits_where_it_is_small(fused: Any) -> None:
    args = make(1, 60, channels=1, heads=1, taps=1, without=("conv_bias", "tail", "write", "gap", "lengths"))
    logits = torch.linspace(-80, 80, 60)
    args["raw"] = torch.stack([logits, logits], -1)[None]
    args |= {"A_log": torch.zeros(1), "dt_bias": torch.zeros(1)}
    _, beta, log_decay, _ = prologue(**args)
    assert_close(log_decay[0, :, 0].double(), -torch.nn.functional.softplus(logits.double()), rtol=1e-5, atol=0)
    assert_close(beta[0, :, 0].double(), 2 * torch.sigmoid(logits.double()), rtol=1e-5, atol=0)


# ---- readout

READOUTS = [(activation, first) for activation in ("silu", "sigmoid") for first in (True, False)]


def reads(dims: tuple[int, ...], device: str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    o, gate = (2 * torch.randn(dims, device=device) for _ in range(2))
    weight = torch.randn(dims[-1], device=device)
    return {"o": o.to(dtype), "gate": gate.to(dtype), "weight": weight}


@pytest.mark.parametrize(("activation", "norm_first"), READOUTS)
@pytest.mark.parametrize("dims", [(2, 3, 2, 5), (1, 1, 1, 3), (3, 50, 1, 16), (1, 3, 2, 300)], ids=str)
def test_the_readout_equals_the_torch_path(
    fused: Any, activation: Any, norm_first: bool, dims: tuple[int, ...]
) -> None:
    def op(**args: Any) -> Tensor:
        return readout(**args, activation=activation, norm_first=norm_first, eps=1e-3)

    args, names = reads(dims), ("o", "gate", "weight")
    got = run(op, args, names)
    fused(False)
    assert_near(got, run(op, {name: double(x) for name, x in args.items()}, names), 1e-5)
    assert_near(got, run(op, args, names), 1e-5)


def test_gates_may_be_a_slice_of_a_projection(fused: Any) -> None:
    args = reads((2, 4, 3, 5))
    whole = torch.cat([torch.full((2, 4, 7), float("nan")), args["gate"].flatten(2)], -1)
    part = whole[..., 7:].unflatten(-1, (3, 5))
    assert torch.equal(readout(**{**args, "gate": part}), readout(**args))
    turned = args["gate"].transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(readout(**{**args, "gate": turned}), readout(**args))


def test_the_readout_takes_bfloat16(fused: Any) -> None:
    args = reads((2, 3, 2, 8), dtype=torch.bfloat16)
    got = run(readout, args, ("o", "gate", "weight"))
    fused(False)
    want = run(readout, {name: double(x) for name, x in args.items()}, ("o", "gate", "weight"))
    assert got["output 0"].dtype == torch.bfloat16
    assert_near(got, want, 2**-7)  # interpreted, the last rounding cuts off


@triton.jit
def _both_ways(dy_ptr, o_ptr, gate_ptr, w_ptr, out_ptr, AXIS: tl.constexpr, SIGMOID: tl.constexpr, FIRST: tl.constexpr):
    v = tl.arange(0, 16)
    t = tl.arange(0, 2)
    at = t[:, None] * 16 + v[None, :]
    if AXIS == 0:
        at = t[None, :] * 16 + v[:, None]
    o = tl.load(o_ptr + at)
    gate = tl.load(gate_ptr + at)
    dy = tl.load(dy_ptr + at)
    weight = tl.load(w_ptr + v)
    do, dgate, terms = readout_gradient_tile(dy, o, gate, weight, 1e-5, 16, SIGMOID, FIRST, AXIS)
    tl.store(out_ptr + at, readout_tile(o, gate, weight, 1e-5, 16, SIGMOID, FIRST, AXIS))
    tl.store(out_ptr + 32 + at, do)
    tl.store(out_ptr + 64 + at, dgate)
    tl.store(out_ptr + 96 + at, terms)


@pytest.mark.skipif(torch.cuda.is_available(), reason="checks the body of the kernels as it is interpreted")
@pytest.mark.parametrize(("activation", "norm_first"), READOUTS)
def test_the_body_of_the_readout_serves_tiles_lying_either_way(activation: str, norm_first: bool) -> None:
    args, dy, out = reads((1, 2, 1, 16)), torch.randn(2, 16), torch.zeros(2, 4, 2, 16)
    for axis in (0, 1):
        _both_ways[(1,)](
            dy, args["o"], args["gate"], args["weight"], out[axis], axis, activation == "sigmoid", norm_first
        )
    assert_close(out[0], out[1], rtol=1e-6, atol=1e-7)
    want = readout(**args, activation=activation, norm_first=norm_first)  # pyright: ignore
    assert_close(out[1, 0], want[0, :, 0], rtol=1e-5, atol=1e-6)


# ---- the layer, autograd, errors


@pytest.mark.parametrize(
    "form",
    [{}, {"decay": "none"}, {"value_heads": 4, "value_dim": 3, "output_gate": "sigmoid", "norm_before_gate": False}],
    ids=["plain", "no decay", "grouped"],
)
def test_a_layer_is_the_same_with_its_launches_fused(fused: Any, form: dict[str, Any]) -> None:
    layer = GatedDeltaNet(6, key_dim=4, **form)
    x, gap, write = torch.randn(2, 5, 6), torch.tensor([[0, 0, 3.0, 0, 0]] * 2), torch.rand(2, 5)
    lengths = torch.tensor([5, 3])

    def op(x: Tensor, **parameters: Tensor) -> tuple[Tensor, ...]:
        call = {"gap": gap, "write": write, "lengths": lengths}
        y, state = torch.func.functional_call(layer, parameters, (x,), call)
        return y, *state

    args = {"x": x, **dict(layer.named_parameters())}
    got = run(op, args, tuple(args))
    fused(False)
    assert_near(got, run(op, args, tuple(args)), 1e-5)


def operands(args: dict[str, Any]) -> tuple[Any, ...]:
    return (*(args.get(name) for name in NAMES), args["write"], args["gap"], args["lengths"], 3, 2.0)


def test_the_ops_of_the_prologue_keep_the_rules_of_torch() -> None:
    for without in ((), ("conv_bias", "tail", "write", "gap", "lengths", "rate")):
        args = make(2, 3, without=without)
        for name in NAMES:
            if args[name] is not None:
                args[name].requires_grad_()
        torch.library.opcheck(prologue_op, operands(args))
    args = {name: x.detach() if isinstance(x, Tensor) else x for name, x in make(2, 3).items()}
    *tensors, heads, beta_max = operands(args)
    grads = torch.randn(2, 3, 5), torch.randn(2, 3, 3), None, torch.randn(2, 3, 5)
    torch.library.opcheck(prologue_backward_op, (*tensors, *grads, heads, beta_max, True))


def test_the_ops_of_the_readout_keep_the_rules_of_torch() -> None:
    args = reads((2, 3, 2, 5))
    tensors = tuple(x.requires_grad_() for x in args.values())
    torch.library.opcheck(readout_op, (*tensors, 1e-5, False, True))
    plain = tuple(x.detach() for x in tensors)
    torch.library.opcheck(readout_backward_op, (torch.randn(2, 3, 2, 5), *plain, 1e-5, True, False))


def test_both_ops_trace_without_a_break(fused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # torch cannot trace the checks of types
    args, more = make(2, 3), reads((2, 3, 2, 5))

    def both(x: Tensor, o: Tensor) -> tuple[Tensor, ...]:
        return *prologue(**{**args, "inputs": x}), readout(**{**more, "o": o})

    x, o = args["inputs"].requires_grad_(), more["o"].requires_grad_()
    grads = []
    for form in (both, torch.compile(both, backend="aot_eager", fullgraph=True)):
        out = form(x, o)
        grads.append((*out, *torch.autograd.grad(sum(y.square().sum() for y in out), (x, o))))
    for a, b in zip(*grads, strict=True):
        assert_close(a, b, rtol=0, atol=0)


def test_a_second_derivative_is_refused(fused: Any) -> None:
    args = make(1, 2)
    args["inputs"].requires_grad_()
    (grad,) = torch.autograd.grad(prologue(**args)[0].square().sum(), args["inputs"], create_graph=True)
    with pytest.raises(RuntimeError, match="prologue_backward"):
        grad.sum().backward()
    more = reads((1, 1, 1, 4))
    more["o"].requires_grad_()
    (grad,) = torch.autograd.grad(readout(**more).square().sum(), more["o"], create_graph=True)
    with pytest.raises(RuntimeError, match="readout_backward"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"conv_weight": torch.zeros(4, 4)}, r"conv_weight is \(4, 4\)"),
        ({"conv_weight": torch.zeros(5, 9), "tail": None}, "9 taps; Triton takes 1 to 8"),
        ({"raw": torch.zeros(2, 3, 5)}, r"raw is \(2, 3, 5\)"),
        ({"A_log": None}, "needs A_log"),
        ({"rate": None}, "and rate where gap is given"),
        ({"tail": torch.zeros(2, 2, 5)}, r"tail is \(2, 2, 5\)"),
        ({"inputs": torch.zeros(2, 3, 5, dtype=torch.float64)}, "float64"),
        ({"gap": torch.zeros(2, 3, requires_grad=True)}, "gap requires a gradient"),
    ],
)
def test_what_does_not_fit_is_named(
    fused: Any, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], text: str
) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as for users, whose types nobody checks
    with pytest.raises(ValueError, match=text):
        prologue(**{**make(2, 3), **change})


def test_readouts_that_do_not_fit_are_named(fused: Any) -> None:
    with pytest.raises(ValueError, match="513 value channels"):
        readout(**reads((1, 1, 1, 513)))
    with pytest.raises(ValueError, match="o is float64"):
        readout(**{name: double(x) for name, x in reads((1, 1, 1, 4)).items()})


# ---- on the device


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 6e-3)], ids=str)
@pytest.mark.parametrize("dims", [(3, 1), (5, 7), (70, 130), (2, 2100)], ids=str)
@pytest.mark.parametrize("taps", [1, 4, 8])
@pytest.mark.parametrize("without", [(), ("conv_bias", "write", "gap", "lengths", "tail"), ("decay",)], ids=str)
def test_on_the_device_the_prologue_equals_float64(
    fused: Any, dtype: torch.dtype, bound: float, dims: tuple[int, int], taps: int, without: tuple[str, ...]
) -> None:
    for channels in (40, 384):
        args = make(*dims, taps=taps, channels=channels, heads=3, without=without, device="cuda", dtype=dtype)
        fused(True)
        got, again = run(prologue, args, NAMES), run(prologue, args, NAMES)
        assert all(torch.equal(got[name], again[name]) for name in got), "two runs differ"
        fused(False)
        want = run(prologue, {name: double(x) for name, x in args.items()}, NAMES)
        exact = dict.fromkeys(("output 1", "output 2", "output 3", "raw", "A_log", "dt_bias", "rate"), 1e-5)
        assert_near(got, want, {"other": bound, **exact})


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-3)], ids=str)
@pytest.mark.parametrize(("activation", "norm_first"), READOUTS)
@pytest.mark.parametrize("dims", [(3, 5, 2, 20), (40, 100, 8, 64), (7, 33, 3, 128), (2, 9, 1, 500)], ids=str)
def test_on_the_device_the_readout_equals_float64(
    fused: Any, dtype: torch.dtype, bound: float, activation: Any, norm_first: bool, dims: tuple[int, ...]
) -> None:
    def op(**args: Any) -> Tensor:
        return readout(**args, activation=activation, norm_first=norm_first)

    args, names = reads(dims, "cuda", dtype), ("o", "gate", "weight")
    got, again = run(op, args, names), run(op, args, names)
    assert all(torch.equal(got[name], again[name]) for name in got), "two runs differ"
    fused(False)
    assert_near(got, run(op, {name: double(x) for name, x in args.items()}, names), bound)


@pytest.mark.gpu
def test_on_the_device_a_graph_replays_both_ops(fused: Any) -> None:
    args, more = make(16, 40, channels=48, device="cuda"), reads((16, 40, 2, 32), "cuda")
    leaves = [args["inputs"].requires_grad_(), more["o"].requires_grad_()]

    def step() -> list[Tensor]:
        out = [*prologue(**args), readout(**more)]
        return [*out, *torch.autograd.grad(sum(x.square().sum() for x in out), leaves)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = step()
    with torch.no_grad():
        for leaf in leaves:
            leaf.copy_(torch.randn_like(leaf))
    graph.replay()
    for a, b in zip(kept, step(), strict=True):
        assert torch.equal(a, b)
