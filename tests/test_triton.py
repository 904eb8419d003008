"""The Triton op against the recurrence: on a GPU every pinned configuration, elsewhere interpreted at tiny sizes."""

import os
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from tsgdn import checks
from tsgdn.kernels import Readout, gated_delta_rule, readout, unit_length
from tsgdn.kernels.gated_delta_rule.reference import reference
from tsgdn.mixers import build

triton = pytest.importorskip("triton")

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
C = 16  # the kernels' chunk; what is kept for the backward lies every 32 tokens
LENGTHS = (1, 2, C - 1, C, C + 1, 3 * C + 5)
NAMES = ("o", "end", "rho", "dq", "dk", "dv", "dlog_decay", "dbeta", "derase", "dstate")
# decay, beta and erase per head or per channel; None ties erase to beta; "off" is delta=False
FORMS = {
    "gated delta": ("head", "head", None),
    "decoupled": ("head", "head", "head"),
    "linear": ("head", "head", "off"),
    "write per channel": ("head", "channel", "head"),
    "kda": ("channel", "head", None),
    "gdn2": ("channel", "channel", "channel"),
}
pytestmark = pytest.mark.filterwarnings(
    "ignore:overflow encountered:RuntimeWarning"
)  # numpy, where exp2 gives infinity


@pytest.fixture(autouse=True)
def _triton(monkeypatch: pytest.MonkeyPatch) -> None:
    if not GPU and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("neither a GPU nor TRITON_INTERPRET=1")
    monkeypatch.setenv("TSGDN_KERNEL", "triton")


def make(
    form: str,
    rows: int,
    tokens: int,
    heads: int,
    key: int,
    value: int,
    *,
    key_heads: int | None = None,
    kind: str = "plain",
    beta_max: float = 1.0,
    state: bool = True,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Arguments of the op on the device; `kind`: plain, strong (some steps forget everything) or same (equal keys)."""
    decay, beta, erase = FORMS[form]
    lead = (rows, tokens, heads)

    def gate(per: str, size: int) -> Tensor:
        return torch.rand(*lead, *((size,) if per == "channel" else ()))

    q, k = torch.randn(2, rows, tokens, key_heads or heads, key)
    log_decay = -gate(decay, key)
    if kind == "strong":
        log_decay = torch.where(torch.rand_like(log_decay) < 0.2, -50.0, 0.01 * log_decay)
    if kind == "same":
        k, log_decay = k[:, :1].expand_as(k).clone(), 0.01 * log_decay
    arguments: dict[str, Any] = {
        "q": q.to(dtype),
        "k": k.to(dtype),
        "v": torch.randn(*lead, value).to(dtype),
        "log_decay": log_decay,
        "beta": beta_max * gate(beta, value),
        "erase": beta_max * gate(erase, key) if erase in ("head", "channel") else None,
        "state": torch.randn(rows, heads, key, value) if state else None,
    }
    moved = {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in arguments.items()}
    return {**moved, "delta": erase != "off", "scale": key**-0.5, "norm": True}


def by_definition(a: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """The recurrence in float64."""
    wide = {name: x.double() if isinstance(x, Tensor) else x for name, x in a.items()}
    q, k = unit_length(wide["q"]) if wide["norm"] else wide["q"], unit_length(wide["k"]) if wide["norm"] else wide["k"]
    each = wide["v"].shape[2] // k.shape[2]
    q, k = (x.repeat_interleave(each, 2) for x in (q * wide["scale"], k))
    given = {name: wide[name] for name in ("log_decay", "beta", "erase", "state", "delta")}
    return reference(q, k, wide["v"], **given)


def by_op(a: dict[str, Any]) -> tuple[Tensor, ...]:
    return gated_delta_rule(**a, residual=True)


def everything(run: Any, a: dict[str, Any], weights: list[Tensor]) -> dict[str, Tensor]:
    """Outputs and all gradients by name, of a functional with fixed random weights."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in a.items() if isinstance(x, Tensor)}
    out = run({**a, **leaves})
    total = sum((x.double() * w).sum() for x, w in zip(out, weights, strict=True))
    grads = torch.autograd.grad(total, list(leaves.values()))  # pyright: ignore
    return {**dict(zip(NAMES, out, strict=False)), **{f"d{n}": g for n, g in zip(leaves, grads, strict=True)}}


def error(got: Tensor, want: Tensor) -> float:
    """Relative RMS error, where what is expected is not next to nothing."""
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm().clamp_min(1e-6))


def errors(a: dict[str, Any]) -> dict[str, float]:
    """Relative RMS errors of outputs and gradients against float64."""
    want = by_definition(a)
    weights = [torch.randn_like(x) for x in want]
    truth, got = everything(by_definition, a, weights), everything(by_op, a, weights)
    assert set(truth) == set(got)
    return {name: error(got[name], truth[name]) for name in truth}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tokens", LENGTHS)
def test_values_and_gradients_are_those_of_the_recurrence(form: str, tokens: int) -> None:
    found = errors(make(form, 1, tokens, 2, 16, 8))
    assert max(found.values()) < 1e-5, found


@pytest.mark.parametrize("form", ["gated delta", "decoupled", "linear"])
@pytest.mark.parametrize("kind", ["plain", "strong", "same"])
@pytest.mark.parametrize("beta_max", [0.0, 1.0, 2.0])
def test_hard_inputs_stay_right(form: str, kind: str, beta_max: float) -> None:
    a = make(form, 1, 2 * C + 7, 1, 12, 20, kind=kind, beta_max=beta_max)
    if kind == "same" and beta_max == 2:
        a["beta"] = torch.full_like(a["beta"], 1.99)
    found = errors(a)
    assert max(found.values()) < 2e-5, found


def test_heads_that_share_keys_no_state_and_no_norm() -> None:
    found = errors(make("gated delta", 2, 2 * C + 3, 4, 5, 7, key_heads=2, state=False))
    assert max(found.values()) < 1e-5, found
    a = make("gated delta", 1, C + 3, 2, 16, 16)
    found = errors({**a, "norm": False, "k": unit_length(a["k"])})
    assert max(found.values()) < 1e-5, found


@pytest.mark.parametrize("form", ["gated delta", "linear", "kda"])
def test_cutting_anywhere_changes_nothing(form: str) -> None:
    a = make(form, 1, 2 * C + 3, 1, 8, 8)
    o, end, _ = by_op(a)
    for at in (1, C - 1, C, C + 1, 2 * C + 2):

        def part(cut: slice) -> dict[str, Any]:
            return {n: x[:, cut] if isinstance(x, Tensor) and n != "state" else x for n, x in a.items()}

        first, middle, _ = by_op(part(slice(0, at)))
        second, last, _ = by_op({**part(slice(at, None)), "state": middle})
        torch.testing.assert_close(torch.cat([first, second], 1), o, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(last, end, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["gated_deltanet", "mamba2"])
def test_a_mixer_on_these_kernels_obeys_the_law(name: str) -> None:
    mixer = build(name, 16, {"heads": 2, "key_dim": 8, "value_dim": 8}).to(DEVICE)
    x, bounds = torch.randn(2, C + 5, 16, device=DEVICE), {"rtol": 1e-5, "atol": 1e-5}
    cuts = checks.CUTS if DEVICE == "cuda" else ((11,), (9, 0, 1))  # interpreted, each call takes its time
    checks.check_streaming(mixer, x, cuts=cuts, **bounds)
    checks.check_step(mixer, x[:, :4], **bounds)
    checks.check_causal(mixer, x)
    checks.check_state_is_a_value(mixer, x)
    checks.check_rows_independent(mixer, x, **bounds)
    checks.check_reset(mixer, x)
    checks.check_snapshot(mixer, x)
    checks.check_gradients_streaming(mixer, x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["gated delta", "kda"])
def test_packed_sequences_equal_separate_ones(form: str) -> None:
    ends = [0, 33, 34, 70, 86]
    cu = torch.tensor(ends, device=DEVICE, dtype=torch.int32)
    a = make(form, 1, ends[-1], 2, 8, 8)
    a["state"] = torch.randn(len(ends) - 1, 2, 8, 8, device=DEVICE)
    weights = [torch.randn_like(a["v"]), torch.randn_like(a["state"]), torch.randn_like(a["v"])]
    got = everything(lambda x: gated_delta_rule(**x, cu_seqlens=cu, residual=True), a, weights)

    def separately(x: dict[str, Any]) -> tuple[Tensor, ...]:
        parts = []
        for s, (start, stop) in enumerate(pairwise(ends)):
            one = {n: y[:, start:stop] if isinstance(y, Tensor) and n != "state" else y for n, y in x.items()}
            parts.append(by_definition({**one, "state": x["state"][s : s + 1]}))
        return (
            torch.cat([p[0] for p in parts], 1),
            torch.cat([p[1] for p in parts]),
            torch.cat([p[2] for p in parts], 1),
        )

    truth = everything(separately, a, weights)
    for name in truth:
        torch.testing.assert_close(got[name].double(), truth[name].double(), rtol=1e-4, atol=1e-5, msg=name)


def test_no_state_is_zeros_bitwise_and_the_given_one_is_not_changed() -> None:
    a = make("gated delta", 2, C + 5, 2, 8, 8, state=False)
    zeros = torch.zeros(2, 2, 8, 8, device=DEVICE)
    for x, y in zip(by_op(a), by_op({**a, "state": zeros}), strict=True):
        assert torch.equal(x, y)
    assert not zeros.any()


def test_the_end_state_can_be_left_out() -> None:
    a = make("gated delta", 1, C + 5, 1, 8, 8)
    assert gated_delta_rule(**a, end_state=False)[1] is None
    assert torch.equal(gated_delta_rule(**a, end_state=False)[0], gated_delta_rule(**a)[0])


def test_slices_of_a_projection_need_no_copy_and_give_the_same() -> None:
    a = make("gated delta", 2, C + 5, 2, 8, 16)
    together = torch.cat([a[n].flatten(2) for n in "qkv"], 2)
    q, k, v = together.split([16, 16, 32], 2)
    sliced = {**a, "q": q.unflatten(2, (2, 8)), "k": k.unflatten(2, (2, 8)), "v": v.unflatten(2, (2, 16))}
    assert all(torch.equal(x, y) for x, y in zip(by_op(sliced), by_op(a), strict=True))


@pytest.mark.parametrize("activation", ["silu", "sigmoid"])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize(("tokens", "value"), [(1, 16), (C + 5, 16), (C + 5, 40)])  # 40: more than one tile of values
def test_the_readout_in_the_store_is_the_readout(activation: Any, norm_first: bool, tokens: int, value: int) -> None:
    a = make("gated delta", 1, tokens, 2, 8, value)
    leaves = {name: x.requires_grad_() for name, x in a.items() if isinstance(x, Tensor)}
    gate = torch.randn(1, tokens, 2, value, device=DEVICE, requires_grad=True)
    weight = torch.randn(value, device=DEVICE, requires_grad=True)
    y, end = gated_delta_rule(**a, readout=Readout(gate, weight, 1e-5, activation, norm_first))
    o, plain_end = gated_delta_rule(**a)
    want = readout(o, gate, weight, activation=activation, norm_first=norm_first)
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)
    assert torch.equal(end, plain_end)
    w = torch.randn_like(y)
    got = torch.autograd.grad((y * w).sum(), [*leaves.values(), gate, weight])
    wanted = torch.autograd.grad((want * w).sum(), [*leaves.values(), gate, weight])
    for x, z in zip(got, wanted, strict=True):
        torch.testing.assert_close(x, z, rtol=1e-4, atol=1e-5)


def test_sizes_that_no_configuration_serves_are_refused_with_a_way_out() -> None:
    with pytest.raises(ValueError, match=r"256 x 8 are too large .* TSGDN_KERNEL=torch"):
        by_op(make("gated delta", 1, 3, 1, 256, 8))


def test_second_derivatives_are_refused() -> None:
    a = make("gated delta", 1, 4, 1, 8, 8)
    v = a["v"].requires_grad_()
    (grad,) = torch.autograd.grad(by_op(a)[0].square().sum(), v, create_graph=True)
    with pytest.raises(RuntimeError, match=r"autograd formula|does not require grad|double"):
        grad.sum().backward()


def test_the_ops_follow_the_rules_of_torch() -> None:
    from tsgdn.kernels.gated_delta_rule.fused import backward_op, forward_op

    a = make("gated delta", 1, C + 3, 2, 8, 8, key_heads=1)
    tensors = [a[n].requires_grad_() for n in ("q", "k", "v", "log_decay", "beta")]
    arguments = (
        *tensors,
        None,
        a["state"].requires_grad_(),
        None,
        None,
        None,
        0.3,
        0.0,
        False,
        True,
        True,
        True,
        True,
        True,
        True,
    )
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(forward_op, arguments, test_utils=checks)
    with torch.no_grad():
        o, _, rho, kept, solve, _ = forward_op(*arguments)
        plain = [x.detach() for x in (*tensors, a["state"])]
        torch.library.opcheck(
            backward_op,
            (
                *plain[:5],
                None,
                plain[5],
                None,
                kept,
                solve,
                rho,
                torch.randn_like(o),
                None,
                None,
                0.3,
                True,
                True,
                True,
            ),
            test_utils=checks,
        )


# On a GPU ------------------------------------------------------------------------------------------------------------

SIZES = [
    (16, 16),
    (32, 32),
    (32, 64),
    (64, 64),
    (64, 128),
    (128, 128),
    (128, 256),
    (35, 35),
    (60, 100),
    (16, 128),
    (128, 16),
]
BOUNDS = {"o": 5e-3, "end": 5e-3, "rho": 5e-3, "dlog_decay": 1.5e-2, "dbeta": 1.5e-2, "derase": 1.5e-2}


def rounded_chunks(a: dict[str, Any]) -> dict[str, float]:
    """Errors of plain torch that rounds to bfloat16 where the kernels do: the operands of every product, once."""
    q, k, v = (a[n].double() for n in "qkv")

    def low(x: Tensor) -> Tensor:
        return x + (x.detach().bfloat16().double() - x.detach())

    q, k = low(unit_length(q)), low(unit_length(k))
    each = v.shape[2] // k.shape[2]
    q, k = (x.repeat_interleave(each, 2) for x in (q, k))
    state = a["state"]
    memory = torch.zeros(v.shape[0], v.shape[2], k.shape[3], v.shape[3], dtype=torch.float64, device=DEVICE)
    memory = memory if state is None else state.double()
    outs, rhos = [], []
    for start in range(0, v.shape[1], C):
        qc, kc, vc = (x[:, start : start + C].transpose(1, 2) for x in (q, k, v))
        g, b = (a[n].double()[:, start : start + C].transpose(1, 2) for n in ("log_decay", "beta"))
        sums = g.cumsum(-1)
        between = (sums[..., :, None] - sums[..., None, :]).tril().exp().tril()
        lower = (kc @ kc.mT * between * b[..., None]).tril(-1)
        held = low(memory)
        x = vc * b[..., None] - (kc @ held) * (sums.exp() * b)[..., None]
        eye = torch.eye(lower.shape[-1], dtype=torch.float64, device=DEVICE)
        solve = low(torch.linalg.inv(eye + lower))
        u = solve @ low(x)
        outs.append(((qc @ held) * sums.exp()[..., None] + low(qc @ kc.mT * between) @ low(u)) * a["scale"])
        rhos.append(u)
        to_end = (sums[..., -1:] - sums).exp()
        memory = memory * sums[..., -1:].exp()[..., None] + kc.mT @ low(u * to_end[..., None])
    return {"o": torch.cat(outs, 2).transpose(1, 2), "end": memory}  # pyright: ignore


@pytest.mark.gpu
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("form", ["gated delta", "decoupled", "linear"])
@pytest.mark.parametrize("kind", ["plain", "strong"])
def test_every_configuration_meets_the_bounds_in_bfloat16(size: tuple[int, int], form: str, kind: str) -> None:
    for tokens, state in ((2, True), (33, False), (70, True), (200, True), (1000, False)):
        a = make(form, 3, tokens, 5, *size, kind=kind, state=state, dtype=torch.bfloat16)
        if kind == "strong":  # a gradient of e^-50 is nothing but rounding
            a["log_decay"] = a["log_decay"].clamp_min(-5.0)
        found = errors(a)
        over = {n: e for n, e in found.items() if not e < BOUNDS.get(n, 8e-3)}
        assert not over, (tokens, state, over)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [(32, 32), (32, 64), (64, 64), (64, 128), (128, 128), (60, 100)])
def test_float32_on_the_gpu_is_exact(size: tuple[int, int]) -> None:
    for tokens, kind in ((33, "plain"), (70, "strong"), (100, "same")):
        found = errors(make("gated delta", 2, tokens, 3, *size, kind=kind))
        assert max(found.values()) < (1e-4 if kind == "same" else 1e-5), (tokens, kind, found)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [(32, 64), (64, 64), (64, 128), (128, 128)])
def test_nearly_equal_keys_are_no_worse_than_rounding_once(size: tuple[int, int]) -> None:
    a = make("gated delta", 3, 64, 5, *size, kind="same", state=False, dtype=torch.bfloat16)
    a["k"] = (a["k"].float() + 0.01 * torch.randn(a["k"].shape, device=DEVICE)).bfloat16()
    a["beta"] = torch.full_like(a["beta"], 0.999)
    want, plain, got = by_definition(a), rounded_chunks(a), by_op(a)
    for i, name in enumerate(("o", "end")):
        scale = want[i].norm()
        ours, theirs = (got[i].double() - want[i]).norm() / scale, (plain[name] - want[i]).norm() / scale
        assert ours <= 1.5 * theirs + 1e-3, (name, float(ours), float(theirs))


@pytest.mark.gpu
@pytest.mark.parametrize("size", [(32, 32), (32, 64), (64, 64), (64, 128), (128, 128)])
def test_a_hundred_runs_are_bitwise_equal(size: tuple[int, int]) -> None:
    a = make("gated delta", 64, 70, 8, *size, dtype=torch.bfloat16)
    leaves = {name: x.requires_grad_() for name, x in a.items() if isinstance(x, Tensor)}
    w = torch.randn_like(a["v"])

    def once() -> list[Tensor]:
        o, end = gated_delta_rule(**a)
        return [o, end, *torch.autograd.grad((o * w).sum() + end.sum(), list(leaves.values()))]

    first = once()
    for _ in range(100):
        assert all(torch.equal(x, y) for x, y in zip(once(), first, strict=True))


@pytest.mark.gpu
def test_more_rows_times_heads_than_a_grid_axis_and_more_elements_than_an_int() -> None:
    a = make("gated delta", 9000, 40, 8, 16, 16, dtype=torch.bfloat16, state=False)
    o = gated_delta_rule(**a)[0]
    last = {n: x[-2:] if isinstance(x, Tensor) else x for n, x in a.items()}
    torch.testing.assert_close(o[-2:].double(), by_definition(last)[0], rtol=0.05, atol=0.02)
    rows, tokens, heads = 4400, 128, 64
    shape = (rows, tokens, heads)
    q, k, v = (torch.randn(*shape, 64, device=DEVICE, dtype=torch.bfloat16) for _ in range(3))
    assert q.numel() > 2**31
    g, b = -torch.rand(shape, device=DEVICE), torch.rand(shape, device=DEVICE)
    o = gated_delta_rule(q, k, v, log_decay=g, beta=b, norm=True, scale=0.125, end_state=False)[0]
    tail = {"q": q[-1:], "k": k[-1:], "v": v[-1:], "log_decay": g[-1:], "beta": b[-1:]}
    tail = {n: x[:, :, -2:] for n, x in tail.items()}
    want = by_definition({**tail, "erase": None, "state": None, "delta": True, "norm": True, "scale": 0.125})[0]
    torch.testing.assert_close(o[-1:, :, -2:].double(), want, rtol=0.05, atol=0.02)


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["gated delta", "kda"])
def test_compiled_captured_and_checkpointed_calls_give_the_same(form: str) -> None:
    import jaxtyping

    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        _compiled_captured_checkpointed(form)
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def _compiled_captured_checkpointed(form: str) -> None:
    names = ("q", "k", "v", "log_decay", "beta", "state")
    a = make(form, 4, 50, 2, 32, 32, dtype=torch.bfloat16)
    fixed = {n: x for n, x in a.items() if n not in names}

    def run(*leaves: Tensor) -> tuple[Tensor, ...]:
        o, end = gated_delta_rule(**dict(zip(names, leaves, strict=True)), **fixed)
        return o.float().sin(), end.sin()

    def gradients(f: Any) -> list[Tensor]:
        leaves = [a[n].detach().requires_grad_() for n in names]
        out = f(*leaves)
        return [*out, *torch.autograd.grad(sum(x.sum() for x in out), leaves)]

    want = gradients(run)
    compiled = gradients(torch.compile(run, fullgraph=True))
    checkpointed = gradients(lambda *x: torch.utils.checkpoint.checkpoint(run, *x, use_reentrant=False))
    for x, y, z in zip(want, compiled, checkpointed, strict=True):
        torch.testing.assert_close(y, x, rtol=1e-2, atol=1e-2)
        assert torch.equal(z, x)

    leaves = [a[n].clone().requires_grad_() for n in names]

    def step() -> list[Tensor]:
        out = run(*leaves)
        return [*out, *torch.autograd.grad(sum(x.sum() for x in out), leaves)]

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    fresh = make(form, 4, 50, 2, 32, 32, dtype=torch.bfloat16)
    with torch.no_grad():
        for x, n in zip(leaves, names, strict=True):
            x.copy_(fresh[n])
    graph.replay()
    for x, y in zip(captured, step(), strict=True):
        assert torch.equal(x, y)


@pytest.mark.gpu
def test_another_length_compiles_nothing_new() -> None:
    from tsgdn.kernels.gated_delta_rule.forward import forward_kernel

    for tokens in (40, 41, 64):
        gated_delta_rule(**make("gated delta", 2, tokens, 2, 32, 32, dtype=torch.bfloat16))
    before = sum(len(cache[0]) for cache in forward_kernel.device_caches.values())
    for rows, tokens in ((2, 77), (3, 128), (5, 1000)):
        gated_delta_rule(**make("gated delta", rows, tokens, 2, 32, 32, dtype=torch.bfloat16))
    assert sum(len(cache[0]) for cache in forward_kernel.device_caches.values()) == before
