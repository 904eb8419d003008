"""The one-token kernels against the recurrence and against the mixer whose layer they do: interpreted, or on a GPU."""

import os
from typing import Any

import jaxtyping
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.testing import assert_close

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported
pytest.importorskip("triton")

from tsgdn.kernels.gated_delta_rule import decode as functional  # noqa: E402
from tsgdn.kernels.gated_delta_rule import decode_layer  # noqa: E402
from tsgdn.kernels.gated_delta_rule.decode import TILES, Tile, decode, decode_op, tile_for  # noqa: E402
from tsgdn.kernels.gated_delta_rule.decode_layer import WARPS, decode_pool, decode_pool_op, warps_for  # noqa: E402
from tsgdn.kernels.gated_delta_rule.reference import reference  # noqa: E402
from tsgdn.mixers.gated_deltanet import GatedDeltaNet  # noqa: E402
from tsgdn.mixers.memory import MemoryState  # noqa: E402

DEVICE = "cuda" if CUDA else "cpu"
CLOSE: dict[str, float] = {"rtol": 1e-5, "atol": 1e-5}
# decay, beta and erase per head or per channel; None ties erase to beta; "off" is delta=False.
FORMS = {
    "gated delta": ("head", "head", None),
    "decoupled": ("head", "channel", "head"),
    "vector erase": ("head", "head", "channel"),
    "kda": ("channel", "head", None),
    "gdn2": ("channel", "channel", "channel"),
    "linear": ("head", "head", "off"),
    "channel linear": ("channel", "channel", "off"),
}
Inputs = dict[str, Any]


@pytest.fixture(autouse=True)
def _products_of_the_mixer_run_on_the_gpu() -> None:
    if CUDA:  # torch's deterministic mode refuses them there
        torch.use_deterministic_algorithms(False)


def make(
    form: str = "gated delta",
    rows: int = 2,
    tokens: int = 1,
    heads: int = 2,
    key_heads: int | None = None,
    key: int = 5,
    value: int = 7,
    dtype: torch.dtype = torch.float32,
) -> Inputs:
    """The arguments of `decode`, by name."""
    decay, beta, erase = FORMS[form]
    head = (rows, tokens, heads)
    narrow = (rows, tokens, key_heads or heads, key)
    x: Inputs = {
        "q": torch.randn(narrow).to(dtype),
        "k": normalize(torch.randn(narrow), dim=-1).to(dtype),
        "v": torch.randn(*head, value).to(dtype),
        "log_decay": -torch.rand(*head, *((key,) if decay == "channel" else ())),
        "beta": torch.rand(*head, *((value,) if beta == "channel" else ())),
        "erase": None,
        "delta": erase != "off",
        "state": torch.randn(rows, heads, key, value),
    }
    if erase in ("head", "channel"):
        x["erase"] = torch.rand(*head, *((key,) if erase == "channel" else ()))
    return {name: t.to(DEVICE) if isinstance(t, Tensor) else t for name, t in x.items()}


def exact(x: Inputs, norm: bool = False, scale: float = 1.0) -> tuple[Tensor, ...]:
    """The recurrence in float64, keys and queries repeated for the value heads of their group."""
    wide = {name: t.double() if isinstance(t, Tensor) else t for name, t in x.items()}
    group = x["v"].shape[2] // x["k"].shape[2]
    q, k = (wide.pop(name).repeat_interleave(group, dim=2) for name in ("q", "k"))
    if norm:
        q, k = (t * (t.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for t in (q, k))
    return reference(scale * q, k, wide.pop("v"), **wide)


def agree(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert_close(a.double(), b.double(), **CLOSE)


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_agrees_with_the_recurrence(form: str, tokens: int) -> None:
    x = make(form, tokens=tokens)
    agree(decode(**x), exact(x))


@pytest.mark.parametrize(("key", "value"), [(16, 8), (1, 1), (3, 40), (20, 33)])
def test_any_head_size_agrees_with_the_recurrence(key: int, value: int) -> None:
    x = make(rows=1, key=key, value=value)
    agree(decode(**x), exact(x))


def test_lengths_and_scale_are_taken_inside() -> None:
    x = make(tokens=2, key=6)
    x["q"], x["k"] = 3 * x["q"], 0.2 * x["k"]
    agree(decode(**x, norm=True, scale=0.25), exact(x, norm=True, scale=0.25))


@pytest.mark.parametrize("form", ["gated delta", "gdn2"])
def test_value_heads_share_the_keys_of_their_group(form: str) -> None:
    x = make(form, rows=1, heads=4, key_heads=2, tokens=2)
    agree(decode(**x, norm=True), exact(x, norm=True))


def test_no_state_is_a_state_of_zeros_bitwise() -> None:
    x = make(tokens=2)
    x["state"] = torch.zeros_like(x["state"])
    whole = decode(**x)
    x["state"] = None
    for a, b in zip(decode(**x), whole, strict=True):
        assert torch.equal(a, b)


def test_tokens_in_one_launch_equal_launches_of_one_token_bitwise() -> None:
    x = make("gdn2", tokens=3)
    o, end, rho = decode(**x)
    state, parts = x["state"], []
    for n in range(3):
        now = {name: t[:, n : n + 1] if isinstance(t, Tensor) else t for name, t in x.items() if name != "state"}
        out, state, residual = decode(**now, state=state)
        parts.append((out, residual))
    assert torch.equal(torch.cat([part[0] for part in parts], 1), o)
    assert torch.equal(torch.cat([part[1] for part in parts], 1), rho)
    assert torch.equal(state, end)


def test_the_given_state_stays_as_it_was() -> None:
    x = make()
    before = x["state"].clone()
    decode(**x)
    assert torch.equal(x["state"], before)


@pytest.mark.parametrize(("log_decay", "beta"), [(-50.0, 0.5), (0.0, 2.0), (-0.1, 0.0)])
def test_extreme_gates_agree_with_the_recurrence(log_decay: float, beta: float) -> None:
    x = make(tokens=3)
    x["log_decay"].fill_(log_decay)
    x["beta"].fill_(beta)
    agree(decode(**x), exact(x))


def test_a_padding_token_leaves_the_state_bitwise() -> None:
    x = make()
    x["log_decay"].zero_()
    x["beta"].zero_()
    assert torch.equal(decode(**x)[1], x["state"])


def test_slices_of_a_projection_need_no_copy() -> None:
    x = make(tokens=2, key=4, value=4)
    packed = torch.cat([x["q"], x["k"], x["v"]], 2)
    q, k, v = packed.split(2, dim=2)
    assert not q.is_contiguous()
    for a, b in zip(decode(**{**x, "q": q, "k": k, "v": v}), decode(**x), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("tokens", [1, 2])
def test_sums_that_cross_warps_agree_with_the_recurrence(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    monkeypatch.setitem(functional.TILES, (16, 16), Tile(16, 2))
    x = make("vector erase", rows=1, tokens=tokens)
    agree(decode(**x), exact(x))


def test_no_rows_and_no_tokens_give_the_state_back() -> None:
    x = make(tokens=0)
    o, end, rho = decode(**x)
    assert o.shape == rho.shape == (2, 0, 2, 7)
    assert torch.equal(end, x["state"])
    assert decode(**make(rows=0))[1].shape == (0, 2, 5, 7)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"q": torch.zeros(2, 1, 2, 4)}, "both must be"),
        ({"v": torch.zeros(2, 1, 3, 7)}, "its heads a multiple"),
        ({"log_decay": torch.zeros(2, 1, 2, 7)}, "log_decay is"),
        ({"beta": torch.zeros(2, 1, 2, 5)}, "beta is"),
        ({"beta": torch.zeros(2, 1, 2, 7)}, "cannot be tied"),
        ({"erase": torch.zeros(2, 1, 2, 7)}, "erase is"),
        ({"erase": torch.zeros(2, 1, 2), "delta": False}, "leave one of them out"),
        ({"state": torch.zeros(2, 2, 7, 5)}, "state is"),
        ({"state": torch.zeros(2, 2, 5, 7, dtype=torch.float64)}, "float32"),
        ({"v": torch.zeros(2, 1, 2, 7, dtype=torch.float64)}, "use the torch path"),
    ],
)
def test_arguments_that_do_not_fit_are_named(changes: Inputs, said: str) -> None:
    x = {name: t.cpu() if isinstance(t, Tensor) else t for name, t in make().items()}
    with pytest.raises(ValueError, match=said):
        functional._check(**{**x, **changes})


def test_head_sizes_beyond_the_tables_are_refused() -> None:
    with pytest.raises(ValueError, match="key_dim is 257"):
        tile_for(257, 16)
    with pytest.raises(ValueError, match="the head is 64 x 129"):
        warps_for(64, 129)


def test_head_sizes_between_the_tables_take_the_next() -> None:
    assert tile_for(60, 100) == TILES[64, 128]
    assert tile_for(64, 8) == Tile(16, TILES[64, 64].warps)
    assert warps_for(60, 100) == WARPS[64, 128]
    assert warps_for(128, 16) == WARPS[128, 64]


# The pool -------------------------------------------------------------------------------------------------------------

SLOTS = 5
VARIANTS: dict[str, Inputs] = {
    "plain": {},
    "grouped": {"heads": 1, "value_heads": 2},
    "gate first": {"norm_before_gate": False},
    "sigmoid": {"output_gate": "sigmoid"},
    "no decay": {"decay": "none"},
    "no delta": {"delta": False, "beta_max": 2},
    "beta 2, short taps": {"beta_max": 2, "conv": 2, "value_heads": 4},
    "no taps": {"conv": 1},
}


def layer(**options: Any) -> GatedDeltaNet:
    """A small mixer whose parameters are all away from their start."""
    mixer = GatedDeltaNet(10, **{"heads": 2, "key_dim": 5, "value_dim": 7, **options}).to(DEVICE)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        mixer.project.weight.mul_(3)
    return mixer.requires_grad_(False)


def pool_of(mixer: GatedDeltaNet, slots: int = SLOTS) -> MemoryState:
    """As if tokens had been seen before."""
    return MemoryState(*(torch.randn_like(x) for x in mixer.initial_state(slots, DEVICE)))


def arguments(mixer: GatedDeltaNet, x: Tensor, options: Inputs) -> tuple[tuple[Tensor, Tensor, Tensor], Inputs]:
    """What `decode_pool` takes for the mixer and its tokens: projections, and the keyword arguments."""
    width = mixer.value_heads * mixer.value_dim
    inputs, gate = mixer.project(x).split([mixer.channels, width], dim=-1)
    decays = options.get("decay") != "none"
    return (inputs, gate, mixer.gates(x)), {
        "conv_weight": mixer.conv_weight,
        "norm_weight": mixer.norm.weight,
        "A_log": mixer.A_log if decays else None,
        "dt_bias": mixer.dt_bias if decays else None,
        "rate_log": mixer.rate_log if decays else None,
        "eps": mixer.norm.eps,
        "activation": options.get("output_gate", "silu"),
        "norm_before_gate": options.get("norm_before_gate", True),
        "beta_max": options.get("beta_max", 1),
        "delta": options.get("delta", True),
    }


def compare(options: Inputs, x: Tensor, index: Tensor, **more: Tensor) -> None:
    """Outputs, named slots and, bitwise, all other slots after the launch against the mixer on the named states."""
    mixer = layer(**options)
    pool = pool_of(mixer)
    before = MemoryState(*(part.clone() for part in pool))
    tensors, kw = arguments(mixer, x, options)
    y = decode_pool(*tensors, *pool, index, **kw, **more)
    wanted, end = mixer(x, MemoryState(*(part[index] for part in before)), **more)
    assert_close(mixer.output(y), wanted, **CLOSE)
    for part, new, old in zip(pool, end, before, strict=True):
        assert_close(part[index], new, **CLOSE)
        others = [slot for slot in range(SLOTS) if slot not in index.tolist()]
        assert torch.equal(part[others], old[others])


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_pool_agrees_with_the_mixer(variant: str, tokens: int) -> None:
    compare(VARIANTS[variant], torch.randn(2, tokens, 10, device=DEVICE), torch.tensor([3, 0], device=DEVICE))


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("variant", ["plain", "grouped", "no decay"])
def test_gaps_and_skipped_writes_agree_with_the_mixer(variant: str, tokens: int) -> None:
    gap = torch.tensor([[0.0, 2.0, 0.0], [1.5, 0.0, 0.25]], device=DEVICE)[:, :tokens]
    write = torch.tensor([[1.0, 0.0, 0.5], [0.3, 1.0, 0.0]], device=DEVICE)[:, :tokens]
    x, index = torch.randn(2, tokens, 10, device=DEVICE), torch.tensor([1, 4], device=DEVICE)
    compare(VARIANTS[variant], x, index, gap=gap, write=write)


def test_gaps_and_writes_may_be_whole_numbers_and_booleans() -> None:
    gap = torch.tensor([[3], [0]], device=DEVICE)
    write = torch.tensor([[True], [False]], device=DEVICE)
    compare({}, torch.randn(2, 1, 10, device=DEVICE), torch.tensor([1, 4], device=DEVICE), gap=gap, write=write)


def test_an_endless_gap_forgets_without_nan() -> None:
    mixer = layer()
    pool = pool_of(mixer)
    tensors, kw = arguments(mixer, torch.randn(1, 1, 10, device=DEVICE), {})
    gap = torch.full((1, 1), 1e30, device=DEVICE)
    y = decode_pool(*tensors, *pool, torch.tensor([2], device=DEVICE), **kw, gap=gap)
    empty = MemoryState(*(torch.zeros_like(part) for part in pool))
    assert_close(y, decode_pool(*tensors, *empty, torch.tensor([2], device=DEVICE), **kw), **CLOSE)


def test_a_bias_is_added_to_the_convolution() -> None:
    mixer = layer()
    tensors, kw = arguments(mixer, torch.randn(1, 1, 10, device=DEVICE), {})
    index = torch.tensor([1], device=DEVICE)
    bias = torch.randn(mixer.channels, device=DEVICE)
    # A tap that sees a constant input is a bias: one more tap, whose inputs are ones, says what is expected.
    weight = torch.cat([bias[:, None], mixer.conv_weight], 1)
    pool = pool_of(mixer)
    longer = MemoryState(pool.memory.clone(), torch.cat([torch.ones_like(pool.conv[:, :1]), pool.conv], 1))
    y = decode_pool(*tensors, *pool, index, **kw, conv_bias=bias)
    assert_close(y, decode_pool(*tensors, *longer, index, **{**kw, "conv_weight": weight}), **CLOSE)
    assert_close(pool.memory, longer.memory, **CLOSE)


def test_skipped_rows_read_zero_and_write_nothing() -> None:
    mixer = layer()
    pool = pool_of(mixer)
    before = MemoryState(*(part.clone() for part in pool))
    x = torch.randn(4, 2, 10, device=DEVICE)
    tensors, kw = arguments(mixer, x, {})
    y = decode_pool(*tensors, *pool, torch.tensor([-1, 2, SLOTS, -1], device=DEVICE), **kw)
    wanted, _ = mixer(x[1:2], MemoryState(*(part[2:3] for part in before)))
    assert_close(mixer.output(y[1:2]), wanted, **CLOSE)
    assert not y[[0, 3]].any()
    assert y[2].isnan().all()  # a slot that the pool does not have
    for part, old in zip(pool, before, strict=True):
        others = [0, 1, 3, 4]
        assert torch.equal(part[others], old[others])
        assert not torch.equal(part[2], old[2])


def test_slots_that_nobody_names_may_hold_anything() -> None:
    mixer = layer()
    pool = pool_of(mixer)
    tensors, kw = arguments(mixer, torch.randn(2, 2, 10, device=DEVICE), {})
    index = torch.tensor([4, 1], device=DEVICE)
    poisoned = MemoryState(*(part.clone() for part in pool))
    for part in poisoned:
        part[[0, 2, 3]] = float("nan")
    assert torch.equal(decode_pool(*tensors, *poisoned, index, **kw), decode_pool(*tensors, *pool, index, **kw))
    for part, clean in zip(poisoned, pool, strict=True):
        assert torch.equal(part[index], clean[index])
        assert part[[0, 2, 3]].isnan().all()


def test_a_gap_reads_nothing_of_the_tail_before_it() -> None:
    mixer = layer()
    pool = pool_of(mixer)
    pool.conv.fill_(float("nan"))
    tensors, kw = arguments(mixer, torch.randn(1, 1, 10, device=DEVICE), {})
    index, gap = torch.tensor([0], device=DEVICE), torch.ones(1, 1, device=DEVICE)
    assert decode_pool(*tensors, *pool, index, **kw, gap=gap).isfinite().all()
    assert pool.conv[0].isfinite().all()


def test_tiny_time_steps_keep_their_digits() -> None:
    # softplus(-18) = 1.5e-8: 1 + exp(-18) is 1 in float32, and a memory of 10^7 tokens would never fade.
    mixer = layer(decay_init="paper")
    with torch.no_grad():
        mixer.gates.weight.zero_()
        mixer.dt_bias.copy_(torch.tensor([-18.0, -9.0]))
        mixer.A_log.copy_(torch.tensor([13.0, 5.0]))
        mixer.project.weight.zero_()
    pool = pool_of(mixer)
    pool.conv.zero_()
    before = pool.memory.clone().double()
    tensors, kw = arguments(mixer, torch.randn(1, 1, 10, device=DEVICE), {})
    decode_pool(*tensors, *pool, torch.tensor([0], device=DEVICE), **kw)
    step = torch.nn.functional.softplus(mixer.dt_bias.double()) * mixer.A_log.double().exp()
    assert_close(pool.memory[0].double(), (-step).exp()[:, None, None] * before[0], rtol=1e-6, atol=0.0)


def test_pool_sums_that_cross_warps_agree_with_the_mixer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(decode_layer.WARPS, (16, 16), 2)
    compare({"heads": 1}, torch.randn(1, 1, 10, device=DEVICE), torch.tensor([3], device=DEVICE))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"memory": torch.zeros(SLOTS, 2, 5, 7, dtype=torch.float64)}, "memory is"),
        ({"memory": torch.zeros(SLOTS, 2, 7, 5).mT}, "changes in place"),
        ({"conv": torch.zeros(SLOTS, 4, 34)}, "conv is"),
        ({"inputs": torch.zeros(2, 1, 33)}, "33 channels"),
        ({"inputs": torch.zeros(2, 1, 34, dtype=torch.float64)}, "use the torch path"),
        ({"gate": torch.zeros(2, 1, 7)}, "gate is"),
        ({"raw": torch.zeros(2, 1, 2)}, "raw is"),
        ({"index": torch.zeros(3, dtype=torch.int64)}, "index is"),
        ({"index": torch.zeros(2, dtype=torch.int32)}, "torch.int64"),
        ({"norm_weight": torch.zeros(5)}, "norm_weight is"),
        ({"dt_bias": None}, "one of A_log and dt_bias"),
        ({"rate_log": None, "gap": torch.zeros(2, 1)}, "needs its rate"),
        ({"write": torch.zeros(2, 2)}, "write is"),
        ({"conv_bias": torch.zeros(3)}, "conv_bias is"),
    ],
)
def test_pool_arguments_that_do_not_fit_are_named(changes: Inputs, said: str) -> None:
    good: Inputs = {
        "inputs": torch.zeros(2, 1, 34),
        "gate": torch.zeros(2, 1, 14),
        "raw": torch.zeros(2, 1, 4),
        "memory": torch.zeros(SLOTS, 2, 5, 7),
        "conv": torch.zeros(SLOTS, 3, 34),
        "index": torch.tensor([0, 1]),
        "conv_weight": torch.zeros(34, 4),
        "conv_bias": None,
        "norm_weight": torch.zeros(7),
        "A_log": torch.zeros(2),
        "dt_bias": torch.zeros(2),
        "rate_log": torch.zeros(2),
        "write": None,
        "gap": None,
    }
    decode_layer._check(**good)
    with pytest.raises(ValueError, match=said):
        decode_layer._check(**{**good, **changes})


def test_an_unknown_activation_is_refused() -> None:
    mixer = layer()
    tensors, kw = arguments(mixer, torch.randn(1, 1, 10, device=DEVICE), {})
    with pytest.raises(ValueError, match="expected silu or sigmoid"):
        decode_pool(*tensors, *pool_of(mixer), torch.tensor([0], device=DEVICE), **{**kw, "activation": "tanh"})


# torch.library --------------------------------------------------------------------------------------------------------


def op_arguments(mixer: GatedDeltaNet, tokens: int = 1) -> tuple[Any, ...]:
    tensors, kw = arguments(mixer, torch.randn(2, tokens, 10, device=DEVICE), {})
    index = torch.tensor([3, 0], device=DEVICE)
    parameters = (kw["conv_weight"], None, kw["A_log"], kw["dt_bias"], kw["rate_log"], kw["norm_weight"])
    gap = torch.rand(2, tokens, device=DEVICE)
    return (*tensors, *pool_of(mixer), index, *parameters, None, gap, 1e-5, 1.0, True, False, True)


def test_the_ops_keep_the_promises_of_torch_library() -> None:
    x = make("vector erase", rows=1, heads=1)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(decode_op, (*x.values(), True, 0.5), test_utils=tests)
    torch.library.opcheck(decode_pool_op, op_arguments(layer(heads=1)), test_utils=tests)


@pytest.mark.skipif(CUDA, reason="needs tensors that the compiled kernels cannot take")
def test_compiled_kernels_refuse_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    monkeypatch.setattr(functional, "decode_kernel", triton.JITFunction.__new__(triton.JITFunction))
    with pytest.raises(RuntimeError, match="need a CUDA device"):
        decode(**make())


# On the machine -------------------------------------------------------------------------------------------------------


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["gated delta", "gdn2", "linear"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [*TILES, (60, 100)])
def test_every_tile_agrees_with_the_recurrence_on_the_gpu(size: tuple[int, int], dtype: torch.dtype, form: str) -> None:
    x = make(form, rows=3, tokens=2, heads=4, key_heads=2, key=size[0], value=size[1], dtype=dtype)
    bound = 5e-3 if dtype == torch.bfloat16 else 1e-5
    scale = size[0] ** -0.5
    for a, b in zip(decode(**x, norm=True, scale=scale), exact(x, norm=True, scale=scale), strict=True):
        assert error(a, b) < bound


@pytest.mark.gpu
@pytest.mark.parametrize("value_heads", [2, 4])
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [*WARPS, (60, 100)])
def test_every_pool_configuration_agrees_with_the_mixer_on_the_gpu(
    size: tuple[int, int], dtype: torch.dtype, tokens: int, value_heads: int
) -> None:
    options = {"heads": 2, "value_heads": value_heads, "key_dim": size[0], "value_dim": size[1]}
    mixer = layer(**options)
    pool = pool_of(mixer)
    index = torch.tensor([4, 1, 2], device=DEVICE)
    (inputs, gate, raw), kw = arguments(mixer, torch.randn(3, tokens, 10, device=DEVICE), {})
    inputs, gate = inputs.to(dtype), gate.to(dtype)
    # The truth: the same mixer in float64, whose projections are replaced by the rounded ones.
    wide = GatedDeltaNet(10, **options).to(DEVICE).double()
    wide.load_state_dict(mixer.state_dict())
    wide.requires_grad_(False)
    wide.project = Given(torch.cat([inputs, gate], -1).double())
    wide.gates = Given(raw.double())
    wide.output = torch.nn.Identity()
    start = MemoryState(*(part[index].double() for part in pool))
    gap = torch.tensor([[0.0, 2.0, 0.0]] * 3, device=DEVICE)[:, :tokens]
    wanted, end = wide(torch.zeros(3, tokens, 10, device=DEVICE, dtype=torch.float64), start, gap=gap)
    y = decode_pool(inputs, gate, raw, *pool, index, **kw, gap=gap)
    assert error(y, wanted) < (5e-3 if dtype == torch.bfloat16 else 1e-5)
    assert error(pool.memory[index], end.memory) < 1e-5
    assert torch.equal(pool.conv[index], end.conv.float())


class Given(torch.nn.Module):
    """A projection whose results are known."""

    def __init__(self, result: Tensor) -> None:
        super().__init__()
        self.result = result
        self.weight = result  # its number format is asked for

    def forward(self, _: Tensor) -> Tensor:
        return self.result


@pytest.mark.gpu
@pytest.mark.parametrize("size", WARPS)
def test_a_replayed_graph_equals_the_eager_call_on_new_data(size: tuple[int, int]) -> None:
    mixer = layer(key_dim=size[0], value_dim=size[1])
    x = torch.randn(3, 1, 10, device=DEVICE)
    pool, index = pool_of(mixer), torch.tensor([4, 1, -1], device=DEVICE)
    tensors, kw = arguments(mixer, x, {})
    decode_pool(*tensors, *pool, index, **kw)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = decode_pool(*tensors, *pool, index, **kw)
    fresh, _ = arguments(mixer, torch.randn_like(x), {})
    for static, new in zip(tensors, fresh, strict=True):
        static.copy_(new)
    index.copy_(torch.tensor([0, -1, 3], device=DEVICE))
    start = MemoryState(*(part.clone() for part in pool))
    graph.replay()
    again = MemoryState(*(part.clone() for part in start))
    assert torch.equal(y, decode_pool(*fresh, *again, index, **kw))
    for part, other in zip(pool, again, strict=True):
        assert torch.equal(part, other)


@pytest.mark.gpu
@pytest.mark.parametrize("size", WARPS)
def test_a_hundred_repeats_are_bitwise_equal(size: tuple[int, int]) -> None:
    mixer = layer(key_dim=size[0], value_dim=size[1], value_heads=4)
    index = torch.randperm(300, device=DEVICE)[:200]
    start = pool_of(mixer, 300)
    tensors, kw = arguments(mixer, torch.randn(200, 2, 10, device=DEVICE), {})
    x = make(rows=200, heads=4, key_heads=2, key=size[0], value=size[1], dtype=torch.bfloat16)
    first = None
    for _ in range(100):
        pool = MemoryState(*(part.clone() for part in start))
        found = (decode_pool(*tensors, *pool, index, **kw), *pool, *decode(**x))
        first = first or found
        for a, b in zip(found, first, strict=True):
            assert torch.equal(a, b)


def compiled_equals_eager(backend: str) -> None:
    mixer = layer()
    tensors, kw = arguments(mixer, torch.randn(2, 1, 10, device=DEVICE), {})
    index, x = torch.tensor([3, 0], device=DEVICE), make()
    pool = pool_of(mixer)
    other = MemoryState(*(part.clone() for part in pool))

    def run(memory: Tensor, conv: Tensor) -> tuple[Tensor, ...]:
        return decode_pool(*tensors, memory, conv, index, **kw), *decode(**x)

    for a, b in zip(torch.compile(run, backend=backend, fullgraph=True)(*pool), run(*other), strict=True):
        assert_close(a, b, **CLOSE)
    for a, b in zip(pool, other, strict=True):
        assert_close(a, b, **CLOSE)


def test_both_ops_trace_without_a_graph_break(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # torch cannot trace the checks of types
    compiled_equals_eager("aot_eager")


@pytest.mark.gpu
def test_both_ops_compile_without_a_graph_break(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    compiled_equals_eager("inductor")
