"""The ladder recurrence = chunkwise = step: values, gradients, states; and what the other ops promise."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv1d, normalize
from torch.testing import assert_close

from tsgdn.checks import check_gradients_streaming, check_rows_independent, check_state_is_a_value, check_streaming
from tsgdn.kernels import causal_conv, gated_delta_rule, kernel_for, ssd
from tsgdn.kernels.gated_delta_rule import check_inputs
from tsgdn.kernels.gated_delta_rule.chunkwise import chunkwise, unit_lower_inverse
from tsgdn.kernels.gated_delta_rule.reference import reference
from tsgdn.kernels.ssd import ssd_reference

C = 8
LENGTHS = (0, 1, 2, C - 1, C, C + 1, 3 * C + 5)
EXACT: dict[str, float] = {"rtol": 1e-12, "atol": 1e-12}
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


@pytest.fixture(autouse=True)
def _one_thread_and_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def make(
    form: str, rows: int, tokens: int, heads: int, key: int, value: int, dtype: torch.dtype = torch.float64
) -> Any:
    """Inputs of one form: the three tensors, and the keyword arguments with an initial state."""
    decay, beta, erase = FORMS[form]
    head = (rows, tokens, heads)
    q, k = torch.randn(*head, key), normalize(torch.randn(*head, key).to(dtype), dim=-1)
    kw: dict[str, Any] = {
        "log_decay": -torch.rand(*head, *((key,) if decay == "channel" else ())),
        "beta": torch.rand(*head, *((value,) if beta == "channel" else ())),
        "state": torch.randn(rows, heads, key, value),
    }
    if erase in ("head", "channel"):
        kw["erase"] = torch.rand(*head, *((key,) if erase == "channel" else ()))
    kw = {name: x.to(dtype) for name, x in kw.items()}
    if erase == "off":
        kw["delta"] = False
    return (q.to(dtype), k.to(dtype), torch.randn(*head, value).to(dtype)), kw


def op(tensors: Any, kw: dict[str, Any], **more: Any) -> tuple[Tensor, ...]:
    return gated_delta_rule(*tensors, **{"chunk": C, "residual": True, **kw, **more})


def by_steps(tensors: Any, kw: dict[str, Any], **_: Any) -> tuple[Tensor, ...]:
    """The same by one-token calls."""
    state, out = kw["state"], []
    for n in range(tensors[0].shape[1]):
        now = {name: x[:, n : n + 1] if isinstance(x, Tensor) else x for name, x in kw.items()}
        o, state, rho = op([x[:, n : n + 1] for x in tensors], {**now, "state": state})
        out.append((o, rho))
    return torch.cat([o for o, _ in out], 1), state, torch.cat([rho for _, rho in out], 1)


def gradients(run: Any, tensors: Any, kw: dict[str, Any], parts: tuple[int, ...] = (0, 1, 2)) -> list[Tensor]:
    """Gradients of a random functional of the outputs `parts` for every input, the state last."""
    tensors = [x.detach().clone().requires_grad_() for x in tensors]
    kw = {name: x.detach().clone().requires_grad_() if isinstance(x, Tensor) else x for name, x in kw.items()}
    out = run(tensors, kw)
    weights = torch.Generator().manual_seed(1)
    total = sum(
        (out[i].double() * torch.randn(out[i].shape, generator=weights, dtype=torch.float64)).sum() for i in parts
    )
    leaves = [*tensors, *(x for x in kw.values() if isinstance(x, Tensor))]
    grads = torch.autograd.grad(total, leaves, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True)]


def by_definition(tensors: Any, kw: dict[str, Any]) -> tuple[Tensor, ...]:
    return reference(*tensors, **kw)


def error(got: Tensor, want: Tensor) -> float:
    """Relative RMS error in float64."""
    want = want.double()
    return float((got.double() - want).norm() / want.norm().clamp_min(1e-30))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tokens", LENGTHS)
def test_chunks_and_steps_equal_the_recurrence_in_values_and_gradients(form: str, tokens: int) -> None:
    tensors, kw = make(form, 2, tokens, 3, 5, 7)
    want, wanted = by_definition(tensors, kw), gradients(by_definition, tensors, kw)
    for run in (op, by_steps) if tokens else (op,):
        for a, b in zip(run(tensors, kw), want, strict=True):
            assert_close(a, b, **EXACT)
        for a, b in zip(gradients(run, tensors, kw), wanted, strict=True):
            assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("form", ["gated delta", "gdn2"])
@pytest.mark.parametrize("parts", [(0,), (1,), (2,)])
def test_each_output_alone_has_its_gradients(form: str, parts: tuple[int, ...]) -> None:
    tensors, kw = make(form, 1, 2 * C + 3, 1, 4, 3)
    pairs = zip(gradients(op, tensors, kw, parts), gradients(by_definition, tensors, kw, parts), strict=True)
    for a, b in pairs:
        assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("form", ["gated delta", "kda", "gdn2", "linear"])
@pytest.mark.parametrize("chunk", [1, 3, 16, 64, None])
def test_the_chunk_length_changes_nothing(form: str, chunk: int | None) -> None:
    tensors, kw = make(form, 2, 45, 1, 6, 4)
    for a, b in zip(op(tensors, kw, chunk=chunk), by_definition(tensors, kw), strict=True):
        assert_close(a, b, **EXACT)


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form: str) -> None:
    tensors, kw = make(form, 1, 5, 1, 2, 3)
    names = [name for name, x in kw.items() if isinstance(x, Tensor)]
    fixed = {name: x for name, x in kw.items() if not isinstance(x, Tensor)}

    def run(*leaves: Tensor) -> tuple[Tensor, ...]:
        return op(leaves[:3], {**fixed, **dict(zip(names, leaves[3:], strict=True))}, chunk=3)

    leaves = [x.clone().requires_grad_() for x in (*tensors, *(kw[name] for name in names))]
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


def streamed(form: str, heads: int, key: int, value: int) -> Any:
    """The op as a part with one input: its tensors side by side in the last dimension."""
    sizes = {"q": key, "k": key, "v": value, "g": 1 if FORMS[form][0] == "head" else key, "b": 1, "e": 1}

    def part(x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = x.unflatten(-1, (heads, sum(sizes.values())))
        q, k, v, g, b, e = x.split(list(sizes.values()), -1)
        g = -torch.nn.functional.softplus(g)
        o, end = gated_delta_rule(  # pyright: ignore
            q,
            normalize(k, dim=-1),
            v,
            log_decay=g[..., 0] if sizes["g"] == 1 else g,
            beta=b[..., 0].sigmoid(),
            erase=2 * e[..., 0].sigmoid(),
            state=state,
            chunk=C,
        )
        return o.flatten(2), end

    return part, heads * sum(sizes.values())


@pytest.mark.parametrize("form", ["gated delta", "kda"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_cutting_anywhere_changes_nothing(form: str, dtype: torch.dtype, tolerance: float) -> None:
    part, width = streamed(form, 2, 6, 5)
    x = torch.randn(3, 2 * C + 3, width, dtype=dtype)
    check_streaming(part, x, rtol=tolerance, atol=tolerance)
    for at in range(2 * C + 4):
        check_streaming(part, x, cuts=((at, x.shape[1]),), rtol=tolerance, atol=tolerance)
    check_gradients_streaming(part, x, rtol=10 * tolerance, atol=10 * tolerance)
    check_rows_independent(part, x, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("tokens", [0, 1, 2 * C + 1])
def test_the_state_is_a_value_and_none_is_zeros(tokens: int) -> None:
    part, width = streamed("gated delta", 2, 4, 4)
    check_state_is_a_value(part, torch.randn(2, max(tokens, 1), width))
    x = torch.randn(2, tokens, width)
    assert torch.equal(part(x)[1], part(x, torch.zeros(2, 2, 4, 4))[1])
    state = torch.randn(2, 2, 4, 4)
    end = part(x, state)[1]
    assert end.data_ptr() != state.data_ptr()


@pytest.mark.parametrize("form", ["gated delta", "kda"])
@pytest.mark.parametrize("case", ["no decay", "strong", "mixed", "beta 0", "beta 2", "equal keys", "nearly equal keys"])
def test_float32_chunks_are_as_good_as_the_float32_recurrence(form: str, case: str) -> None:
    tensors, kw = make(form, 2, 70, 2, 16, 12)
    q, k, v = tensors
    if case in ("no decay", "nearly equal keys", "equal keys"):
        kw["log_decay"] = torch.zeros_like(kw["log_decay"])
    if case == "strong":
        kw["log_decay"] = torch.full_like(kw["log_decay"], -50.0)
    if case == "mixed":  # a jump of -50 now and then, mild decays between: the sums are large, the differences small
        kw["log_decay"] = torch.where(torch.rand_like(kw["log_decay"]) < 0.2, -50.0, 0.01 * kw["log_decay"])
    if case == "beta 0":
        kw["beta"] = torch.zeros_like(kw["beta"])
    if case == "beta 2":
        kw["beta"] = torch.full_like(kw["beta"], 2.0)
    if "equal keys" in case:
        k = k[:, :1].expand_as(k)
        k = normalize(k + (1e-3 * torch.randn_like(k) if case.startswith("nearly") else 0), dim=-1)
    tensors = [x.float() for x in (q, k, v)]
    kw = {name: x.float() for name, x in kw.items()}
    wide = [x.double() for x in tensors], {name: x.double() for name, x in kw.items()}
    truth = [*by_definition(*wide), *gradients(by_definition, *wide)]
    plain = [*by_definition(tensors, kw), *gradients(by_definition, tensors, kw)]
    ours = [*op(tensors, kw, chunk=32), *gradients(lambda t, w: op(t, w, chunk=32), tensors, kw)]
    for i, (a, b, want) in enumerate(zip(ours, plain, truth, strict=True)):
        assert torch.isfinite(a).all(), i
        if i == 6 and case == "strong":  # the decay's gradient is e^-50: nothing but rounding of terms of size one
            assert (a.double() - want).abs().max() < 1e-4
            continue
        assert error(a, want) <= 1.5 * error(b, want) + 1e-6, (i, error(a, want), error(b, want))


@pytest.mark.parametrize("form", ["gated delta", "gdn2"])
def test_decays_of_minus_50_to_minus_80_stay_exact(form: str) -> None:
    tensors, kw = make(form, 1, 21, 1, 5, 5)
    for strength in (50.0, 80.0):
        kw["log_decay"] = torch.where(torch.rand_like(kw["log_decay"]) < 0.5, -strength, 0.0)
        for a, b in zip(op(tensors, kw, chunk=32), by_definition(tensors, kw), strict=True):
            assert_close(a, b, **EXACT)
        pairs = zip(gradients(op, tensors, kw), gradients(by_definition, tensors, kw), strict=True)
        for a, b in pairs:
            assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("size", [1, 3, 8, 32, 64])
def test_the_inverse_keeps_its_digits_for_equal_keys(size: int) -> None:
    ones = torch.ones(2, size, size)  # what lies on and above the diagonal must not count
    inverse = unit_lower_inverse(ones).double()
    want = torch.eye(size).double() - torch.diag(torch.ones(max(size - 1, 0)).double(), -1)
    assert_close(inverse, want.expand_as(inverse), rtol=0, atol=0)


def test_bfloat16_inputs_are_computed_in_float32() -> None:
    tensors, kw = make("gated delta", 2, 40, 2, 16, 16, torch.float32)
    tensors = [x.bfloat16() for x in tensors]
    o, end, rho = op(tensors, kw)
    want = by_definition([x.float() for x in tensors], kw)
    assert (o.dtype, end.dtype, rho.dtype) == (torch.bfloat16, torch.float32, torch.bfloat16)
    assert_close(end, want[1], rtol=1e-5, atol=1e-5)
    assert_close(o.float(), want[0], rtol=2**-8, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(op(tensors, kw)[1], end, rtol=0, atol=0)
    got = gradients(op, tensors, kw)
    want = gradients(by_definition, [x.float() for x in tensors], kw)
    assert [g.dtype for g in got[:3]] == [torch.bfloat16] * 3
    assert all(error(a, b) < 0.01 for a, b in zip(got, want, strict=True))


def test_padding_with_beta_0_and_log_decay_0_keeps_the_state() -> None:
    for tokens in (1, C, 2 * C + 3):
        tensors, kw = make("gated delta", 2, tokens, 2, 4, 6)
        kw = {**kw, "log_decay": torch.zeros_like(kw["log_decay"]), "beta": torch.zeros_like(kw["beta"])}
        assert torch.equal(op(tensors, kw)[1], kw["state"])


def test_no_decay_is_deltanet_and_perfect_recall() -> None:
    k = torch.eye(8, dtype=torch.float64)[None, :, None, :]
    v = torch.randn(1, 8, 1, 5, dtype=torch.float64)
    ones, zeros = torch.ones(1, 8, 1, dtype=torch.float64), torch.zeros(1, 8, 1, dtype=torch.float64)
    twice = {"log_decay": torch.cat([zeros, zeros], 1), "beta": torch.cat([ones, ones], 1)}
    second = torch.randn_like(v)
    _, end = gated_delta_rule(k.repeat(1, 2, 1, 1), k.repeat(1, 2, 1, 1), torch.cat([v, second], 1), **twice)
    assert_close(end[0, 0], second[0, :, 0], **EXACT)  # the last write of each key, and nothing of the first


def test_beta_0_is_pure_decay() -> None:
    tensors, kw = make("kda", 2, 13, 2, 4, 3)
    kw["beta"] = torch.zeros_like(kw["beta"])
    assert_close(op(tensors, kw)[1], kw["log_decay"].sum(1).exp()[..., None] * kw["state"], **EXACT)


def test_a_constant_channel_decay_is_the_scalar_one() -> None:
    tensors, kw = make("gated delta", 2, 21, 2, 5, 4)
    channel = {**kw, "log_decay": kw["log_decay"][..., None].expand(-1, -1, -1, 5)}
    for a, b in zip(op(tensors, channel), op(tensors, kw), strict=True):
        assert_close(a, b, **EXACT)


def test_erase_equal_to_beta_is_the_tied_rule() -> None:
    tensors, kw = make("gated delta", 2, 21, 2, 5, 4)
    for a, b in zip(op(tensors, {**kw, "erase": kw["beta"]}), op(tensors, kw), strict=True):
        assert_close(a, b, **EXACT)


def test_the_residual_is_what_the_memory_could_not_predict() -> None:
    tensors, kw = make("gated delta", 1, 12, 1, 4, 4)
    kw = {**kw, "log_decay": torch.zeros_like(kw["log_decay"]), "beta": torch.ones_like(kw["beta"])}
    q, k, v = tensors
    k, v = k[:, :1].expand_as(k), v[:, :1].expand_as(v)
    rho = op((q, k, v), kw)[2]
    assert rho[:, 0].abs().max() > 0.1
    assert_close(rho[:, 1:], torch.zeros_like(rho[:, 1:]), **EXACT)  # seen once, it is known


@pytest.mark.parametrize("form", ["gated delta", "gdn2", "linear"])
def test_a_call_keeps_its_inputs_and_one_state_per_chunk(form: str) -> None:
    rows, tokens, heads, key, value, chunk = 2, 64, 2, 16, 16, 16
    tensors, kw = make(form, rows, tokens, heads, key, value, torch.float32)
    leaves = [*tensors, *(x for x in kw.values() if isinstance(x, Tensor))]
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes() // x.element_size()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        op([x.requires_grad_() for x in tensors], kw, chunk=chunk)
    states = tokens // chunk * rows * heads * key * value
    inputs = sum(x.numel() for x in leaves[:-1])
    assert sum(kept.values()) <= states + inputs + leaves[-1].numel()


def test_second_derivatives_are_refused() -> None:
    tensors, kw = make("gated delta", 1, 4, 1, 2, 2)
    v = tensors[2].requires_grad_()
    (grad,) = torch.autograd.grad(op((tensors[0], tensors[1], v), kw)[0].square().sum(), v, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_non_contiguous_inputs_and_no_rows() -> None:
    tensors, kw = make("gated delta", 2, 11, 3, 4, 4)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
    for a, b in zip(op(turned, kw), op(tensors, kw), strict=True):
        assert torch.equal(a, b)
    none = {name: x[:0] for name, x in kw.items()}
    o, end, _ = op([x[:0] for x in tensors], none)
    assert (o.shape, end.shape) == ((0, 11, 3, 4), (0, 3, 4, 4))


def test_repeats_are_bitwise_equal() -> None:
    tensors, kw = make("kda", 3, 40, 2, 8, 8, torch.float32)
    first = [*op(tensors, kw), *gradients(op, tensors, kw)]
    again = [*op(tensors, kw), *gradients(op, tensors, kw)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"beta": torch.ones(1, 4, 1, 9)}, "beta is"),
        ({"log_decay": torch.ones(1, 4)}, "log_decay is"),
        ({"erase": torch.ones(1, 4, 1), "delta": False}, "delta=False"),
        ({"beta": torch.ones(1, 4, 1, 3)}, "tied"),
        ({"state": torch.ones(1, 1, 3, 2)}, "state is"),
        ({"chunk": 0}, "chunk is 0"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change: dict[str, Any], text: str) -> None:
    tensors, kw = make("gated delta", 1, 4, 1, 2, 3, torch.float32)
    with pytest.raises(ValueError, match=text):
        check_inputs(*tensors, **{"erase": None, "delta": True, "chunk": None, **kw, **change})


def test_demanding_triton_where_it_is_not_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setenv("TSGDN_KERNEL", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="on cpu; move them to a GPU, use torch or auto"):
        kernel_for(cpu, torch.float32)
    assert kernel_for(cpu, torch.float64) == "torch"
    monkeypatch.setattr("tsgdn.kernels.choice.HAS_TRITON", False)
    with pytest.raises(RuntimeError, match="use torch or auto"):
        kernel_for(cpu, torch.float32)
    assert kernel_for(torch.device("cuda"), torch.float64) == "torch"
    monkeypatch.setenv("TSGDN_KERNEL", "fast")
    with pytest.raises(ValueError, match="fast"):
        kernel_for(cpu, torch.float32)
    monkeypatch.setenv("TSGDN_KERNEL", "auto")
    assert kernel_for(cpu, torch.float32) == "torch"


def test_a_gpu_generation_that_was_not_tested_runs_torch_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    monkeypatch.setenv("TSGDN_KERNEL", "auto")
    monkeypatch.setattr("tsgdn.kernels.choice.HAS_TRITON", True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 6))
    with pytest.warns(UserWarning, match=r"this GPU has 8\.6: running the slower torch path"):
        assert kernel_for(gpu, torch.float32) == "torch"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    assert kernel_for(gpu, torch.float32) == "triton"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 6))
    monkeypatch.setenv("TSGDN_KERNEL", "triton")  # an informed wish: no warning, which would be an error
    assert kernel_for(gpu, torch.float32) == "triton"


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("tokens", [0, 1, 3 * C + 5])
def test_ssd_equals_its_recurrence(groups: int, tokens: int) -> None:
    head = (2, tokens, 4)
    x, dt = torch.randn(*head, 3).double(), torch.rand(head).double()
    A, extra = -torch.rand(4).double(), -torch.rand(head).double()
    B, Cs = (torch.randn(2, tokens, groups, 5).double() for _ in range(2))
    state = torch.randn(2, 4, 5, 3).double()

    def ours(t: Any, kw: Any) -> Any:
        return ssd(t[0], t[1], t[2], t[3], t[4], chunk=C, **kw)

    def plain(t: Any, kw: Any) -> Any:
        return ssd_reference(t[0], t[1], t[2], t[3], t[4], **kw)

    inputs, kw = [x, dt, A, B, Cs], {"log_decay_extra": extra, "state": state}
    for a, b in zip(ours(inputs, kw), plain(inputs, kw), strict=True):
        assert_close(a, b, **EXACT)
    for a, b in zip(gradients(ours, inputs, kw, (0, 1)), gradients(plain, inputs, kw, (0, 1)), strict=True):
        assert_close(a, b, rtol=1e-11, atol=1e-11)
    first, between = ssd(x[:, :2], dt[:, :2], A, B[:, :2], Cs[:, :2], state=state, log_decay_extra=extra[:, :2])
    rest = [y[:, 2:] for y in (x, dt, B, Cs, extra)]
    second, end = ssd(rest[0], rest[1], A, rest[2], rest[3], state=between, log_decay_extra=rest[4])
    assert_close(torch.cat([first, second], 1), ours(inputs, kw)[0], **EXACT)
    assert_close(end, ours(inputs, kw)[1], **EXACT)


def test_ssd_refuses_groups_that_do_not_divide_the_heads() -> None:
    with pytest.raises(ValueError, match="multiple of G"):
        ssd(torch.ones(1, 2, 4, 3), torch.ones(1, 2, 4), -torch.ones(4), torch.ones(1, 2, 3, 5), torch.ones(1, 2, 3, 5))


@pytest.mark.parametrize("taps", [1, 2, 4])
@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 4, 11])
def test_the_convolution_equals_torchs(taps: int, tokens: int) -> None:
    x, weight, bias = torch.randn(2, tokens, 3).double(), torch.randn(3, taps).double(), torch.randn(3).double()
    state = torch.randn(2, taps - 1, 3).double()
    y, end = causal_conv(x, weight, bias, state=state)
    joined = torch.cat([state, x], 1)
    if tokens:
        assert_close(y, conv1d(joined.mT, weight[:, None], bias, groups=3).mT, **EXACT)
    assert y.shape == x.shape
    assert torch.equal(end, joined[:, tokens:])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_the_convolution_is_cut_anywhere(dtype: torch.dtype, tolerance: float) -> None:
    weight = torch.randn(3, 4, dtype=dtype)
    x = torch.randn(2, 12, 3, dtype=dtype)

    def part(y: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return causal_conv(y, weight, state=state)

    check_streaming(part, x, rtol=tolerance, atol=tolerance)
    check_streaming(part, x, cuts=((2,), (1, 0)), rtol=tolerance, atol=tolerance)
    check_gradients_streaming(part, x, cut=2, rtol=tolerance, atol=tolerance)
    check_state_is_a_value(part, x)


def test_a_restart_forgets_what_came_before() -> None:
    x, weight = torch.randn(2, 9, 3).double(), torch.randn(3, 4).double()
    state = torch.randn(2, 3, 3).double()
    restart = torch.zeros(2, 9, dtype=torch.bool)
    restart[0, 7] = restart[0, 2] = restart[1, 0] = True
    y, end = causal_conv(x, weight, state=state, restart=restart)
    for row, cuts in ((0, (0, 2, 7, 9)), (1, (0, 9))):
        tail = None if restart[row, 0] else state[row : row + 1]
        for a, b in pairwise(cuts):
            want, last = causal_conv(x[row : row + 1, a:b], weight, state=tail)
            assert_close(y[row : row + 1, a:b], want, **EXACT)
            tail = None
        assert torch.equal(end[row : row + 1], last)
    for cut in (1, 2, 7, 8):
        first, between = causal_conv(x[:, :cut], weight, state=state, restart=restart[:, :cut])
        second, after = causal_conv(x[:, cut:], weight, state=between, restart=restart[:, cut:])
        assert_close(torch.cat([first, second], 1), y, **EXACT)
        assert torch.equal(after, end)


def test_the_end_state_is_taken_at_each_rows_length() -> None:
    x, weight = torch.randn(6, 5, 3), torch.randn(3, 4)
    state, lengths = torch.randn(6, 3, 3), torch.arange(6)
    restart = torch.rand(6, 5) < 0.3
    for again in (None, restart):
        _, end = causal_conv(x, weight, state=state, lengths=lengths, restart=again)
        assert torch.equal(end[0], state[0])
        for row in range(6):
            here = slice(row, row + 1)
            cut = None if again is None else again[here, :row]
            _, want = causal_conv(x[here, :row], weight, state=state[here], restart=cut)
            assert torch.equal(end[here], want)


def test_the_convolution_in_bfloat16_keeps_a_float32_tail() -> None:
    x, weight = torch.randn(1, 6, 2).bfloat16(), torch.randn(2, 4)
    y, end = causal_conv(x, weight)
    assert (y.dtype, end.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(end, x[:, 3:].float())


def test_the_chunkwise_algorithm_takes_a_single_token_too() -> None:
    tensors, kw = make("gated delta", 2, 1, 2, 4, 3)
    got = chunkwise(*tensors, kw["log_decay"], kw["beta"], None, True, kw["state"])
    for a, b in zip(got, by_definition(tensors, kw), strict=True):
        assert_close(a, b, **EXACT)
