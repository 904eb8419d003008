"""sLSTM: its equations token by token, the unstabilised form, the rule of zeros, and what silence does."""

import pytest
import torch
import torch.nn.functional as F
from sizes import small_args
from torch.testing import assert_close

from tsgdn import checks
from tsgdn.mixers import build

WIDTH, ROWS, HIDDEN, HEADS = 6, 3, 10, 2
EACH = HIDDEN // HEADS
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def small(**args):
    mixer = build("slstm", WIDTH, small_args("slstm", **args)).double()
    with torch.no_grad():
        mixer.weight_ih *= 3
        mixer.weight_hh *= 3
    return mixer


def tokens(n=9, rows=ROWS):
    return torch.randn(rows, n, WIDTH, dtype=torch.float64)


def gates(mixer, x, hidden):
    """Logits i, f, z, o (R, HIDDEN) of one token, the recurrence written as one dense matrix with blocks."""
    recurrent = torch.zeros(HIDDEN, 4, HIDDEN, dtype=x.dtype)
    for head in range(HEADS):
        units = slice(head * EACH, (head + 1) * EACH)
        recurrent[units, :, units] = mixer.weight_hh[head].unflatten(-1, (4, EACH))
    raw = (x @ mixer.weight_ih.T + mixer.bias).unflatten(-1, (HEADS, 4, EACH)).transpose(1, 2).flatten(-2)
    return (raw + torch.einsum("rh,hgu->rgu", hidden, recurrent)).unbind(1)


@pytest.mark.parametrize("start", [False, True])
def test_slstm_is_its_equations_written_out(start):
    mixer, x = small(), tokens()
    gap = torch.zeros(ROWS, 9, dtype=torch.float64)
    gap[:, 3], gap[0, 5] = 2.5, 7.0
    state = mixer(tokens())[1] if start else None
    hidden, cell, norm, top = state or mixer.initial_state(ROWS)
    reads = []
    for n in range(9):
        patches = gap[:, n, None] * mixer.rate
        hidden, top = hidden * patches.exp(), top + patches
        i, f, z, o = gates(mixer, x[:, n], hidden)
        kept = top + F.logsigmoid(f)
        top = torch.where(norm == 0, i, torch.maximum(i, kept))
        cell = torch.exp(kept - top) * cell + torch.exp(i - top) * torch.tanh(z)
        norm = torch.exp(kept - top) * norm + torch.exp(i - top)
        hidden = torch.sigmoid(o) * cell / norm
        reads.append(hidden)
    y, end = mixer(x, state, gap=gap)
    assert_close(y, mixer.output(torch.stack(reads, 1)), **EXACT)
    for got, want in zip(end, (hidden, cell, norm, top), strict=True):
        assert_close(got, want, **EXACT)


def test_the_stabilised_form_is_the_unstabilised_one():
    mixer, x = small(), tokens()
    gap = torch.zeros(ROWS, 9, dtype=torch.float64)
    gap[:, 4] = 3.0
    hidden, cell, norm = torch.zeros(3, ROWS, HIDDEN, dtype=torch.float64)
    reads = []
    for n in range(9):
        hidden, cell, norm = (leaf * torch.exp(gap[:, n, None] * mixer.rate) for leaf in (hidden, cell, norm))
        i, f, z, o = gates(mixer, x[:, n], hidden)
        cell = torch.sigmoid(f) * cell + i.exp() * torch.tanh(z)
        norm = torch.sigmoid(f) * norm + i.exp()
        hidden = torch.sigmoid(o) * cell / norm
        reads.append(hidden)
    y, end = mixer(x, gap=gap)
    assert_close(y, mixer.output(torch.stack(reads, 1)), **EXACT)
    assert_close(end.cell * end.stabiliser.exp(), cell, rtol=1e-11, atol=1e-12)
    assert_close(end.normaliser * end.stabiliser.exp(), norm, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("logit", [-800.0, 800.0])
def test_the_first_token_is_taken_whole_however_its_input_gate_stands(logit):
    mixer, x = small(), tokens(1)
    want, _ = mixer(x)
    with torch.no_grad():
        mixer.bias.view(HEADS, 4, EACH)[:, 0] += logit
    y, state = mixer(x)
    assert_close(y, want, **EXACT)
    assert torch.equal(state.normaliser, torch.ones_like(state.normaliser))
    y, state = mixer(tokens(5), state)
    assert y.isfinite().all()


def test_long_streams_of_large_values_stay_finite_and_the_normaliser_never_falls_below_one():
    mixer, state = build("slstm", WIDTH, small_args("slstm")), None
    with torch.no_grad():
        for _ in range(4):
            y, state = mixer(100 * torch.randn(2, 1000, WIDTH), state)
            assert y.isfinite().all()
            assert all(leaf.isfinite().all() for leaf in state)
            assert state.normaliser.min() >= 1
            assert state.hidden.abs().max() <= 1


def test_heads_do_not_hear_each_other():
    mixer, x = small(), tokens(5)
    _, before = mixer(tokens())
    other = before.hidden.clone()
    other[:, :EACH] += 0.5
    _, want = mixer(x, before)
    _, got = mixer(x, before._replace(hidden=other))
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a[:, EACH:], b[:, EACH:])
    assert (got.hidden - want.hidden)[:, :EACH].abs().max() > 1e-6


# ---- silence, padding, skipped writes


def test_silences_add_up_and_leave_cell_and_normaliser():
    mixer, x = small(), tokens(1)
    _, before = mixer(tokens())

    def after(state, gap):
        return mixer(x, state, gap=torch.full((ROWS, 1), gap, dtype=torch.float64))[1]

    faded = before._replace(
        hidden=before.hidden * torch.exp(2.5 * mixer.rate), stabiliser=before.stabiliser + 2.5 * mixer.rate
    )
    checks.assert_states_close(after(before, 6.0), after(faded, 3.5), **EXACT)
    assert (after(before, 6.0).hidden - after(before, 0.0).hidden).abs().max() > 1e-3


def test_silence_before_anything_was_seen_changes_nothing():
    mixer, x = small(), tokens(4)
    gap = torch.zeros(ROWS, 4)
    gap[:, 0] = 12.0
    assert torch.equal(mixer(x, gap=gap)[0], mixer(x)[0])


def test_after_a_longer_silence_the_next_token_weighs_more():
    """One unit that only averages: c / n is a weighted mean of tanh z, the old weight falls with the silence."""
    mixer = build("slstm", 1, {"heads": 1, "hidden": 1}).double()
    with torch.no_grad():
        mixer.weight_ih.copy_(torch.tensor([[0.0], [0.0], [1.0], [0.0]]))  # only z hears the token
        mixer.weight_hh.zero_()
        mixer.bias[0] = 0.0
    x, old = torch.tensor([[[0.4], [-1.0]]]).double(), torch.sigmoid(mixer.bias[1])
    for patches in (0.0, 5.0, 50.0):
        kept = old * torch.exp(patches * mixer.rate)
        want = (kept * torch.tanh(x[0, 0] + mixer.bias[2]) + torch.tanh(x[0, 1] + mixer.bias[2])) / (kept + 1)
        _, state = mixer(x, gap=torch.tensor([[0.0, patches]]))
        assert_close(state.cell / state.normaliser, want[None], **EXACT)


def test_a_row_without_tokens_has_still_seen_nothing():
    mixer, x = small(), tokens()
    _, end = mixer(x, lengths=torch.tensor([0, 4, 9]), gap=torch.ones(ROWS, 9))
    assert all(not leaf[0].any() for leaf in end)
    _, alone = mixer(x[1:2, :4], gap=torch.ones(1, 4))
    for got, want in zip(end, alone, strict=True):
        assert_close(got[1:2], want, **EXACT)


def test_write_is_ignored():
    mixer, x = small(), tokens()
    assert torch.equal(mixer(x, write=torch.zeros(ROWS, 9))[0], mixer(x)[0])


# ---- gradients


@pytest.mark.parametrize("seen", [True, False])
def test_gradients_of_the_outputs_are_those_of_the_equations(seen):
    mixer, x = small(), tokens(3, rows=1).requires_grad_()
    state = mixer(tokens(rows=1))[1] if seen else mixer.initial_state(1)
    lengths = None if seen else torch.tensor([3])
    leaves = tuple(leaf.detach().requires_grad_(seen) for leaf in state)
    gap = torch.tensor([[0.0, 1.5, 0.0]])

    def outputs(x, *leaves):
        return mixer(x, type(state)(*leaves), gap=gap, lengths=lengths)[0]

    assert torch.autograd.gradcheck(outputs, (x, *leaves))


# ---- initial values, arguments


def test_the_forget_gates_begin_at_the_drawn_horizons():
    mixer = build("slstm", WIDTH, {"hidden": 256, "horizon": (4, 1024)})
    forget = mixer.bias.view(2, 4, 128)[:, 1].flatten()
    assert_close(F.logsigmoid(forget), mixer.rate, rtol=1e-4, atol=0)
    tau = -1 / mixer.rate.detach()
    assert 3.9 < tau.min() < 6
    assert 700 < tau.max() < 1030
    assert mixer.bias.no_weight_decay


def test_hidden_is_the_width_unless_given():
    assert build("slstm", 8).initial_state(1).cell.shape == (1, 8)


def test_heads_that_do_not_divide_the_hidden_units_are_refused_in_one_line():
    with pytest.raises(ValueError, match="hidden 10 is not a multiple of heads 3") as error:
        build("slstm", WIDTH, {"hidden": 10, "heads": 3})
    assert "\n" not in str(error.value)
