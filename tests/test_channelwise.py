"""Channel-wise decay, erase and write in Triton against the recurrence in float64: interpreted, or on a GPU."""

import os
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tsgdn.kernels.gated_delta_rule.channelwise import (  # noqa: E402
    CHUNK,
    CONFIGS,
    channelwise_backward,
    channelwise_forward,
    padded,
)
from tsgdn.kernels.gated_delta_rule.reference import reference  # noqa: E402

DEVICE = "cuda" if CUDA else "cpu"
C = CHUNK
LENGTHS = (1, 2, C - 1, C, C + 1, 3 * C + 5)
# decay, beta and erase per head or per channel; None ties erase to beta; "off" is delta=False.
FORMS = {
    "kda": ("channel", "head", None),
    "gdn2": ("channel", "channel", "channel"),
    "vector erase": ("head", "head", "channel"),
    "decoupled": ("channel", "channel", "head"),
    "channel linear": ("channel", "channel", "off"),
}
NAMES = ("q", "k", "v", "log_decay", "beta", "erase", "state")
Inputs = dict[str, Any]


def make(
    form: str,
    tokens: int,
    *,
    rows: int = 1,
    heads: int = 2,
    key_heads: int | None = None,
    key: int = 8,
    value: int = 5,
    dtype: torch.dtype = torch.float32,
) -> Inputs:
    """Inputs of one form by name; erase None is tied, and `delta` False says off."""
    decay, beta, erase = FORMS[form]
    head, keys = (rows, tokens, heads), (rows, tokens, key_heads or heads, key)
    made = {
        "q": torch.randn(*keys),
        "k": torch.randn(*keys),
        "v": torch.randn(*head, value),
        "log_decay": -torch.rand(*head, *((key,) if decay == "channel" else ())),
        "beta": torch.rand(*head, *((value,) if beta == "channel" else ())),
        "erase": torch.rand(*head, *((key,) if erase == "channel" else ())) if erase in ("head", "channel") else None,
        "state": torch.randn(rows, heads, key, value),
    }
    for name in ("q", "k", "v"):
        made[name] = made[name].to(dtype)
    made = {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in made.items()}
    return {**made, "delta": erase != "off"}


def incoming(given: Inputs, parts: str) -> tuple[Tensor | None, ...]:
    """Gradients of outputs, end state and residuals, those that `parts` names."""
    v, state = given["v"], given["state"]
    rows, _, heads, value = v.shape
    end = state.shape if state is not None else (rows, heads, given["k"].shape[-1], value)
    drawn = (torch.randn(v.shape), torch.randn(end), torch.randn(v.shape))
    dtypes = (v.dtype, torch.float32, v.dtype)
    return tuple(
        x.to(v.device, dtype) if name in parts.split() else None
        for name, x, dtype in zip(("o", "end", "rho"), drawn, dtypes, strict=True)
    )


def kernels(
    given: Inputs, grads: tuple[Tensor | None, ...], *, norm: bool = True, scale: int | float = 0.3, **more: Any
) -> dict:
    """Outputs and gradients of the kernels, by name."""
    more |= {"norm": norm, "scale": scale}
    o, end, rho, saved = channelwise_forward(**given, **more, save=True, want_rho=True)
    assert saved is not None
    incoming = dict(zip(("do", "dend", "drho"), grads, strict=True))
    got = channelwise_backward(**given, **more, saved_states=saved, **incoming)
    return {"o": o, "end": end, "rho": rho, **{f"d{name}": x for name, x in zip(NAMES, got, strict=True)}}


def recurrence(given: Inputs, grads: tuple[Tensor | None, ...], *, norm: bool = True, scale: int | float = 0.3) -> dict:
    """The same by the reference in float64 and autograd."""
    leaves = {
        name: x.detach().double().requires_grad_()
        for name, x in given.items()
        if isinstance(x, Tensor) and name in NAMES
    }
    x: dict[str, Any] = {**given, **leaves}
    q, k = x["q"], x["k"]
    if norm:
        q, k = (y * torch.rsqrt((y * y).sum(-1, keepdim=True) + 1e-6) for y in (q, k))
    share = x["v"].shape[2] // k.shape[2]
    q, k = ((q * scale).repeat_interleave(share, 2), k.repeat_interleave(share, 2))
    gates = {name: x[name] for name in ("log_decay", "beta", "erase", "delta", "state")}
    o, end, rho = reference(q, k, x["v"], **gates)
    total = sum(((y * g.double()).sum() for y, g in zip((o, end, rho), grads, strict=True) if g is not None))
    assert isinstance(total, Tensor)
    got = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    wanted: dict[str, Tensor | None] = {"o": o.detach(), "end": end.detach(), "rho": rho.detach()}
    for name in NAMES:
        wanted[f"d{name}"] = None
    for (name, leaf), grad in zip(leaves.items(), got, strict=True):
        wanted[f"d{name}"] = torch.zeros_like(leaf) if grad is None else grad
    return wanted


def error(got: Tensor, want: Tensor) -> float:
    """Relative RMS error; where nothing is wanted, the absolute one."""
    scale = want.double().norm()
    return float((got.double() - want.double()).norm() / (scale if scale > 0 else 1.0))


def check(given: Inputs, parts: str = "o end rho", bound: float = 2e-6, chunk: int = CHUNK, **settings: Any) -> None:
    """The kernels agree with the recurrence in every output and gradient."""
    grads = incoming(given, parts)
    want = recurrence(given, grads, **settings)
    got = kernels(given, grads, chunk=chunk, **settings)
    for name, expected in want.items():
        if expected is None:
            assert got[name] is None, name
        else:
            assert got[name].shape == expected.shape, name
            assert error(got[name], expected) <= bound, (name, error(got[name], expected))


CASES = [(form, tokens) for form in FORMS for tokens in (LENGTHS if form in ("kda", "gdn2") else (C + 1,))]


@pytest.mark.parametrize(("form", "tokens"), CASES)
def test_values_and_gradients_equal_the_recurrence(form: str, tokens: int) -> None:
    check(make(form, tokens))


@pytest.mark.parametrize("form", ["kda", "gdn2", "channel linear"])
@pytest.mark.parametrize("parts", ["o", "end", "rho"])
def test_each_output_alone_has_its_gradients(form: str, parts: str) -> None:
    check(make(form, 2 * C + 3, heads=1), parts)


@pytest.mark.parametrize("form", ["kda", "channel linear"])
def test_no_state_means_zeros(form: str) -> None:
    given = make(form, 2 * C + 3, heads=1)
    check({**given, "state": None}, "o end")
    zeros = {**given, "state": torch.zeros_like(given["state"])}
    grads = incoming(zeros, "o")
    none, zero = kernels({**given, "state": None}, grads), kernels(zeros, grads)
    for name, x in none.items():
        assert x is None or torch.equal(x, zero[name]), name


@pytest.mark.parametrize(("key", "value"), [(5, 7), (16, 3), (3, 16)])
@pytest.mark.parametrize("form", ["kda", "gdn2"])
def test_any_size_of_head(form: str, key: int, value: int) -> None:
    check(make(form, C + 2, heads=1, key=key, value=value))


@pytest.mark.parametrize("tokens", [31, 37, 70])
def test_chunks_of_32_agree_as_well(tokens: int) -> None:
    check(make("gdn2", tokens, heads=1), chunk=32)


@pytest.mark.parametrize("form", ["kda", "gdn2"])
def test_heads_share_keys(form: str) -> None:
    check(make(form, C + 3, heads=4 if form == "kda" else 2, key_heads=2 if form == "kda" else 1))


def test_q_and_k_are_used_as_they_are_without_the_norm() -> None:
    given = make("gdn2", 2 * C + 1)
    check({**given, "k": given["k"] * 0.2}, norm=False, scale=1)
    tiny = make("kda", C + 1, heads=1, key=1, value=1)
    check({**tiny, "k": tiny["k"] * 0.2}, norm=False)


def decays(kind: str, shape: torch.Size) -> Tensor:
    if kind == "jumps":  # mild ones, and now and then a token that forgets everything
        return -torch.rand(shape) - 50.0 * (torch.rand(shape) < 0.15)
    if kind == "channels":  # some channels forget at every token, others never
        return torch.tensor([0.0, -80.0]).repeat(shape[-1])[: shape[-1]].expand(shape).clone()
    return torch.full(shape, float(kind))


@pytest.mark.parametrize("form", ["kda", "gdn2"])
@pytest.mark.parametrize("kind", ["0", "-50", "-80", "jumps", "channels"])
def test_any_strength_of_decay(form: str, kind: str) -> None:
    given = make(form, 2 * C + 5, heads=1)
    given["log_decay"] = decays(kind, given["log_decay"].shape).to(DEVICE)
    check(given)


def test_a_jump_costs_the_decays_beside_it_no_digits() -> None:
    given = make("kda", 2 * C, heads=1)
    given["log_decay"] = (torch.full(given["log_decay"].shape, -1e-3)).to(DEVICE)
    given["log_decay"][:, 3] = -50.0
    grads = incoming(given, "o end rho")
    want, got = recurrence(given, grads), kernels(given, grads)
    # The gradient of the jump's own decay is 1e-22 of the others': it is a sum of its own, not a difference of theirs.
    for token in (2, 3, 4, C):
        assert error(got["dlog_decay"][:, token], want["dlog_decay"][:, token]) < 1e-5, token


def test_infinite_decay_is_forgetting() -> None:
    given = make("gdn2", C + 3, heads=1)
    given["log_decay"][:, 5] = -1e4
    grads = incoming(given, "o end rho")
    endless = {**given, "log_decay": given["log_decay"].clone()}
    endless["log_decay"][:, 5] = -float("inf")
    never, ever = kernels(given, grads), kernels(endless, grads)
    for name, x in ever.items():
        assert torch.equal(x, never[name]), name


@pytest.mark.parametrize("strength", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("keys", ["different", "equal"])
def test_any_strength_of_writing_and_equal_keys(strength: float, keys: str) -> None:
    given = make("kda", 2 * C + 5, heads=1)
    given["beta"] = torch.full_like(given["beta"], strength)
    given["log_decay"] = given["log_decay"] * 0.01
    if keys == "equal":
        given["k"] = given["k"][:, :1].expand_as(given["k"]).contiguous()
    # Equal keys with full strength: what is left of the value is a difference of nearly equal numbers.
    check(given, bound=1e-5)


def test_a_token_without_gates_changes_nothing() -> None:
    given = make("gdn2", C + 7, heads=1)
    silent = {**given, **{name: given[name].clone() for name in ("log_decay", "beta", "erase")}}
    for name in ("log_decay", "beta", "erase"):
        silent[name][:, C + 2 :] = 0.0
    cut = {name: x[:, : C + 2] if name in NAMES[:-1] else x for name, x in silent.items()}
    cut = {name: x.contiguous() if isinstance(x, Tensor) else x for name, x in cut.items()}
    ends = [kernels(x, incoming(x, "end"))["end"] for x in (silent, cut)]
    assert torch.allclose(*ends, rtol=0, atol=1e-6)


def test_cutting_changes_nothing() -> None:
    given = make("gdn2", 2 * C + 6, heads=1)
    whole = kernels(given, incoming(given, "o"))
    state, outputs = given["state"], []
    for part in torch.arange(2 * C + 6).split([1, C + 3, 2, C]):
        piece = {name: x[:, part].contiguous() if name in NAMES[:-1] else x for name, x in given.items()}
        out = kernels({**piece, "state": state}, incoming(piece, "o"))
        state = out["end"]
        outputs.append(out["o"])
    assert error(torch.cat(outputs, 1), whole["o"]) < 1e-6
    assert error(state, whole["end"]) < 1e-6


@pytest.mark.parametrize(
    ("form", "counts", "with_state"),
    [("kda", (5, C, 1, C + 3), False), ("gdn2", (0, 3, 0, 0, C - 1, 0), True), ("kda", (2 * C, C + 1), True)],
)
def test_packed_sequences_are_sequences(form: str, counts: tuple[int, ...], with_state: bool) -> None:
    given = make(form, sum(counts), heads=1)
    bounds = torch.tensor([0, *counts], device=DEVICE).cumsum(0)
    state = torch.randn(len(counts), *given["state"].shape[1:]).to(DEVICE) if with_state else None
    end = torch.randn(len(counts), *given["state"].shape[1:]).to(DEVICE)
    do, _, drho = incoming(given, "o rho")
    assert do is not None
    assert drho is not None
    got = kernels({**given, "state": state}, (do, end, drho), cu_seqlens=bounds)
    for s, (start, stop) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)):
        if stop == start:
            assert torch.equal(got["end"][s], torch.zeros_like(end[s]) if state is None else state[s])
            assert state is None or torch.equal(got["dstate"][s], end[s])
            continue
        one = {n: x[:, start:stop].contiguous() if n in NAMES[:-1] and x is not None else x for n, x in given.items()}
        one["state"] = None if state is None else state[s : s + 1]
        alone = kernels(one, (do[:, start:stop].contiguous(), end[s : s + 1], drho[:, start:stop].contiguous()))
        for name, x in alone.items():
            if x is not None:
                place = slice(s, s + 1) if name in ("end", "dstate") else (slice(None), slice(start, stop))
                assert torch.equal(got[name][place], x), name


@pytest.mark.skipif(CUDA, reason="the interpreter's own half precision")
@pytest.mark.parametrize("form", ["kda", "gdn2"])
def test_half_precision_keeps_its_digits(form: str) -> None:
    given = make(form, 2 * C + 5, heads=1, dtype=torch.float16)
    given["log_decay"] = decays("jumps", given["log_decay"].shape)
    check(given, bound=2e-3)


def test_what_does_not_fit_is_refused() -> None:
    given = {**make("kda", 3), "norm": True, "scale": 1.0, "save": False, "want_rho": False}
    with pytest.raises(ValueError, match="expected key_dim in 1"):
        padded(129, 4)
    with pytest.raises(ValueError, match="expected a multiple"):
        three = make("kda", 3, heads=3)
        channelwise_forward(**{**given, **three, "q": given["q"], "k": given["k"]})
    with pytest.raises(ValueError, match="expected 16 or 32"):
        channelwise_forward(**given, chunk=8)
    with pytest.raises(ValueError, match="cannot be tied"):
        channelwise_forward(**{**given, "beta": given["v"].abs()})
    with pytest.raises(ValueError, match="expected 1 row"):
        channelwise_forward(**{**given, **make("kda", 3, rows=2)}, cu_seqlens=torch.tensor([0, 3, 6]))


# ---------------------------------------------------------------- compiled

# Bounds of relative RMS error with bfloat16 inputs: values, gradients of tensors, gradients of gates.
BOUNDS = {"o": 5e-3, "end": 5e-3, "rho": 5e-3, "dlog_decay": 1.5e-2, "dbeta": 1.5e-2, "derase": 1.5e-2}


def poisoned(given: Inputs, grads: tuple[Tensor | None, ...], **settings: Any) -> dict:
    """`kernels` into memory that reads as NaN where nobody has written."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # pyright: ignore
    try:
        return kernels(given, grads, **settings)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@pytest.mark.parametrize("size", CONFIGS)
@pytest.mark.parametrize("form", ["kda", "gdn2"])
@pytest.mark.parametrize("kind", ["mild", "jumps"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_configuration_is_right_on_the_gpu(
    size: tuple[int, int], form: str, kind: str, dtype: torch.dtype
) -> None:
    for tokens in (1, C, 5 * C + 3):
        given = make(form, tokens, rows=2, heads=3, key=size[0], value=size[1], dtype=dtype)
        if kind == "jumps":
            given["log_decay"] = decays("jumps", given["log_decay"].shape).to(DEVICE)
        grads = incoming(given, "o end rho")
        want, got = recurrence(given, grads), poisoned(given, grads)
        for name, expected in want.items():
            if expected is not None:
                bound = 2e-5 if dtype == torch.float32 else BOUNDS.get(name, 8e-3)
                assert error(got[name], expected) <= bound, (tokens, name, error(got[name], expected))


@pytest.mark.gpu
@pytest.mark.parametrize("size", CONFIGS)
@pytest.mark.parametrize("form", ["kda", "gdn2"])
def test_repeats_are_bitwise_equal_on_the_gpu(size: tuple[int, int], form: str) -> None:
    given = make(form, 70, rows=32, heads=8, key=size[0], value=size[1], dtype=torch.bfloat16)
    grads = incoming(given, "o end")
    first = kernels(given, grads)
    for _ in range(100):
        for name, x in kernels(given, grads).items():
            assert x is None or torch.equal(x, first[name]), name


@pytest.mark.gpu
def test_more_heads_than_a_grid_axis_holds_on_the_gpu() -> None:
    given = make("kda", 3, rows=9000, heads=8, key=16, value=16)
    grads = incoming(given, "o end rho")
    want, got = recurrence(given, grads), kernels(given, grads)
    for name, expected in want.items():
        assert expected is None or error(got[name], expected) <= 2e-5, name
