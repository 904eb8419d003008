"""Rows cut into pieces that run at the same time give what the recurrence gives."""

import os
from typing import Any

import pytest
import torch
from test_triton import DEVICE, GPU, by_definition, error, everything, make
from torch import Tensor

from tsgdn.kernels import Readout, gated_delta_rule

triton = pytest.importorskip("triton")

pytestmark = pytest.mark.filterwarnings(
    "ignore:overflow encountered:RuntimeWarning"
)  # numpy, where exp2 gives infinity


@pytest.fixture(autouse=True)
def _triton(monkeypatch: pytest.MonkeyPatch) -> None:
    if not GPU and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("neither a GPU nor TRITON_INTERPRET=1")
    monkeypatch.setenv("TSGDN_KERNEL", "triton")


def cut(a: dict[str, Any], segments: int | None, wanted: tuple[int, ...] = (0, 1, 2)) -> tuple[Tensor, ...]:
    """The `wanted` ones of outputs, end state and residuals."""
    out = gated_delta_rule(**a, segments=segments, end_state=1 in wanted, residual=True)
    return tuple(out[i] for i in wanted)  # pyright: ignore


def errors(a: dict[str, Any], segments: int, wanted: tuple[int, ...] = (0, 1, 2)) -> dict[str, float]:
    """Relative RMS errors against float64 of what is wanted, and of the gradients that come through it."""
    want = by_definition(a)
    weights = [torch.randn_like(want[i]) for i in wanted]
    truth = everything(lambda x: [by_definition(x)[i] for i in wanted], a, weights)
    got = everything(lambda x: cut(x, segments, wanted), a, weights)
    assert set(truth) == set(got)
    return {name: error(got[name], truth[name]) for name in truth}


@pytest.mark.parametrize("form", ["gated delta", "decoupled", "linear"])
@pytest.mark.parametrize(("tokens", "segments"), [(150, 2), (200, 3), (150, 7)])  # 7 would leave empty pieces
def test_pieces_give_the_values_and_gradients_of_the_recurrence(form: str, tokens: int, segments: int) -> None:
    a = make(form, 1, tokens, 2 if form == "decoupled" else 1, 12, 9)
    a["log_decay"] = 0.03 * a["log_decay"]  # so that a row's start still matters at its end
    found = errors(a, segments)
    assert max(found.values()) < 1e-5, found


@pytest.mark.parametrize("form", ["gated delta", "linear"])
@pytest.mark.parametrize("kind", ["strong", "same"])
def test_pieces_of_hard_inputs_stay_right(form: str, kind: str) -> None:
    found = errors(make(form, 1, 150, 1, 16, 8, kind=kind), 3)
    assert max(found.values()) < 2e-5, found


@pytest.mark.parametrize(
    ("form", "wanted"),
    [("gated delta", (0,)), ("gated delta", (1,)), ("gated delta", (2,)), ("linear", (1,)), ("linear", (0, 2))],
)
def test_pieces_without_a_start_state_and_with_some_gradients_only(form: str, wanted: tuple[int, ...]) -> None:
    a = make(form, 2, 130, 1, 8, 16, state=False)
    a["log_decay"] = 0.03 * a["log_decay"]
    want = by_definition(a)
    weights = [torch.randn_like(want[i]) for i in wanted]

    def gradients(run: Any) -> list[Tensor | None]:
        leaves = [a[n].detach().clone().requires_grad_() for n in ("k", "v", "log_decay", "beta")]
        out = run({**a, **dict(zip(("k", "v", "log_decay", "beta"), leaves, strict=True))})
        total = sum((out[i].double() * w).sum() for i, w in enumerate(weights))
        return list(torch.autograd.grad(total, leaves))  # pyright: ignore

    truth = gradients(lambda x: [by_definition(x)[i] for i in wanted])
    got = gradients(lambda x: cut(x, 3, wanted))
    for x, y in zip(got, truth, strict=True):
        assert error(x, y) < 1e-5  # pyright: ignore


def test_pieces_of_heads_that_share_keys_and_of_keys_that_are_not_normed() -> None:
    a = make("decoupled", 1, 130, 4, 8, 16, key_heads=2)
    found = errors(a, 2)
    assert max(found.values()) < 1e-5, found
    a = make("decoupled", 2, 130, 1, 8, 16)
    unit = {n: torch.nn.functional.normalize(a[n], dim=-1) for n in "qk"}
    found = errors({**a, **unit, "norm": False}, 2)
    assert max(found.values()) < 1e-5, found


def test_pieces_of_wide_heads_need_several_tiles() -> None:
    found = errors(make("gated delta", 1, 130, 1, 40, 70), 2)
    assert max(found.values()) < 1e-5, found


@pytest.mark.parametrize(("tokens", "segments"), [(100, 1), (60, 4), (1, 4)])
def test_one_piece_is_bitwise_the_uncut_row(tokens: int, segments: int) -> None:
    a = make("gated delta", 1, tokens, 2, 8, 8)
    assert all(torch.equal(x, y) for x, y in zip(cut(a, segments), cut(a, None), strict=True))


def test_gates_per_channel_are_not_cut() -> None:
    a = make("kda", 1, 70, 1, 8, 8)
    assert all(torch.equal(x, y) for x, y in zip(cut(a, 2), cut(a, None), strict=True))


def test_the_torch_path_takes_pieces_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TSGDN_KERNEL", "torch")
    a = make("gated delta", 1, 150, 1, 8, 8)
    assert all(torch.equal(x, y) for x, y in zip(cut(a, 2), cut(a, None), strict=True))


def test_pieces_of_slices_of_a_projection_give_the_same() -> None:
    a = make("gated delta", 2, 70, 1, 8, 16)
    q, k, v = torch.cat([a[n].flatten(2) for n in "qkv"], 2).split([8, 8, 16], 2)
    sliced = {**a, "q": q.unflatten(2, (1, 8)), "k": k.unflatten(2, (1, 8)), "v": v.unflatten(2, (1, 16))}
    assert all(torch.equal(x, y) for x, y in zip(cut(sliced, 2), cut(a, 2), strict=True))


def test_pieces_without_gradients_give_what_they_give_with_them_and_change_no_state() -> None:
    a = make("gated delta", 1, 150, 1, 8, 8)
    before = a["state"].clone()
    want = [x.detach() for x in cut({**a, "v": a["v"].clone().requires_grad_()}, 3)]
    assert all(torch.equal(x, y) for x, y in zip(cut(a, 3), want, strict=True))
    assert torch.equal(a["state"], before)


def test_the_readout_of_pieces_is_that_of_the_row() -> None:
    a = make("gated delta", 1, 100, 1, 8, 16)
    readout = Readout(torch.randn(1, 100, 1, 16, device=DEVICE), torch.randn(16, device=DEVICE))
    got, want = (gated_delta_rule(**a, readout=readout, segments=s)[0] for s in (2, None))
    assert error(got, want) < 1e-5
    assert gated_delta_rule(**a, segments=2, end_state=False)[1] is None


def test_pieces_of_packed_sequences_and_fewer_than_one_are_refused() -> None:
    a = make("gated delta", 1, 10, 1, 8, 8)
    cu = torch.tensor([0, 10], device=DEVICE)
    with pytest.raises(ValueError, match=r"segments=2 came with cu_seqlens.*leave one of them out"):
        gated_delta_rule(**a, cu_seqlens=cu, segments=2)
    with pytest.raises(ValueError, match="segments is 0; it must be at least 1"):
        gated_delta_rule(**a, segments=0)


@pytest.mark.parametrize(("form", "state"), [("gated delta", True), ("decoupled", False), ("linear", True)])
def test_the_ops_of_pieces_follow_the_rules_of_torch(form: str, state: bool) -> None:
    from tsgdn.kernels.gated_delta_rule.segments import segmented_backward_op, segmented_op

    a = make(form, 1, 70, 2, 8, 4, key_heads=1, state=state)
    names = ("q", "k", "v", "log_decay", "beta", "erase", "state")
    tensors = [x if x is None else x.requires_grad_() for x in (a[n] for n in names)]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    rest = (64, 0.3, a["delta"], True)
    torch.library.opcheck(segmented_op, (*tensors, *rest, True, True, True), test_utils=checks)
    with torch.no_grad():
        plain = [x if x is None else x.detach() for x in tensors]
        torch.library.opcheck(segmented_op, (*plain, *rest, False, False, False), test_utils=checks)
        o, end, rho, *kept = segmented_op(*plain, *rest, True, False, True)
        given = (*plain[:6], *kept, rho, torch.randn_like(o), torch.randn_like(end), None, *rest, state)
        torch.library.opcheck(segmented_backward_op, given, test_utils=checks)


# On a GPU ------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("size", [(64, 64), (128, 128), (32, 64), (64, 128)])
@pytest.mark.parametrize("form", ["gated delta", "decoupled", "linear"])
@pytest.mark.parametrize("state", [True, False])
def test_pieces_in_bfloat16_are_as_near_as_rounding(size: tuple[int, int], form: str, state: bool) -> None:
    a = make(form, 1, 4096, 8, *size, state=state, dtype=torch.bfloat16)
    a["log_decay"] = 0.02 * a["log_decay"]
    weights = [torch.randn_like(x) for x in cut(a, None)]
    want = everything(lambda x: cut(x, None), a, weights)
    for segments in (3, 8, 30):
        got = everything(lambda x, segments=segments: cut(x, segments), a, weights)
        found = {name: error(got[name], want[name]) for name in want}
        over = {n: e for n, e in found.items() if not e < (5e-3 if n in ("o", "end", "rho") else 1e-2)}
        assert not over, (segments, over)
        again = everything(lambda x, segments=segments: cut(x, segments), a, weights)
        assert all(torch.equal(got[name], again[name]) for name in got)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [(64, 64), (128, 128), (40, 70)])
def test_pieces_in_float32_on_the_gpu_are_exact(size: tuple[int, int]) -> None:
    for form in ("gated delta", "linear"):
        a = make(form, 2, 500, 3, *size)
        a["log_decay"] = 0.02 * a["log_decay"]
        found = errors(a, 4)
        assert max(found.values()) < 1e-5, (form, found)


@pytest.mark.gpu
def test_compiled_and_captured_pieces_give_the_same() -> None:
    import jaxtyping

    names = ("q", "k", "v", "log_decay", "beta", "state")
    a = make("gated delta", 2, 300, 2, 64, 64, dtype=torch.bfloat16)
    fixed = {n: x for n, x in a.items() if n not in names}
    leaves = [a[n].detach().requires_grad_() for n in names]

    def run(*given: Tensor) -> tuple[Tensor, ...]:
        out = gated_delta_rule(**dict(zip(names, given, strict=True)), **fixed, segments=3)
        return tuple(x.float().sin() for x in out)  # pyright: ignore

    def gradients(f: Any) -> list[Tensor]:
        out = f(*leaves)
        return [*out, *torch.autograd.grad(sum(x.sum() for x in out), leaves)]  # pyright: ignore

    want = gradients(run)
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        compiled = gradients(torch.compile(run, fullgraph=True))
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
    for x, y in zip(want, compiled, strict=True):
        torch.testing.assert_close(y, x, rtol=1e-2, atol=1e-2)
    leaves = [a[n].clone().requires_grad_() for n in names]  # a capture may not touch nodes of another stream
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        gradients(run)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients(run)
    graph.replay()
    assert all(torch.equal(x, y) for x, y in zip(captured, want, strict=True))
