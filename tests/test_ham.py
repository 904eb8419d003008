"""HAM against its equations, its reductions, and a store that is kept token by token."""

import heapq
import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from tsgdn import checks
from tsgdn.kernels import unit_length
from tsgdn.mixers import build
from tsgdn.mixers.associative_cache import Store, look_up, visible
from tsgdn.streamable import state_bytes

WIDTH, ROWS, TOKENS = 12, 3, 29
H, HV, DK, DV = 2, 4, 8, 5
TIGHT = {"rtol": 1e-12, "atol": 1e-12}


def small(dtype=torch.float64, **args):
    sizes = {"heads": H, "key_dim": DK, "value_dim": DV, "value_heads": HV, "slots": 4}
    return build("ham", WIDTH, {**sizes, **args}).to(dtype)


def branch(mixer):
    """The Gated DeltaNet within, as a mixer of its own."""
    args = {"heads": H, "key_dim": DK, "value_dim": DV, "value_heads": HV, "output_gate": "sigmoid"}
    gdn = build("gated_deltanet", WIDTH, args).double()
    own = gdn.state_dict().keys()
    gdn.load_state_dict({key: value for key, value in mixer.state_dict().items() if key in own})
    return gdn


def tokens(n=TOKENS, rows=ROWS, dtype=torch.float64):
    return torch.randn(rows, n, WIDTH, dtype=dtype)


def holes(n=TOKENS):
    """Skipped writes and gaps at random places, the first token written."""
    write = (torch.rand(ROWS, n) < 0.8).double()
    write[:, 0] = 1
    return write, torch.where(torch.rand(ROWS, n) < 0.15, 5 * torch.rand(ROWS, n), 0.0).double()


# ---- reductions


def test_without_slots_it_is_gated_deltanet_and_starts_the_same():
    torch.manual_seed(5)
    ham = small(slots=0)
    torch.manual_seed(5)
    gdn = build("gated_deltanet", WIDTH, {"heads": H, "key_dim": DK, "value_dim": DV, "value_heads": HV,
                                          "output_gate": "sigmoid"}).double()  # fmt: skip
    assert ham.state_dict().keys() == gdn.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(ham.parameters(), gdn.parameters(), strict=True))
    x, (write, gap) = tokens(), holes()
    y, state = ham(x, write=write, gap=gap)
    want, end = gdn(x, write=write, gap=gap)
    assert torch.equal(y, want)
    assert torch.equal(state.memory, end.memory)
    assert torch.equal(state.conv, end.conv)
    assert torch.equal(state.position, torch.full((ROWS,), TOKENS))


def test_with_slots_its_branch_starts_as_without():
    torch.manual_seed(5)
    without = small(slots=0).state_dict()
    torch.manual_seed(5)
    ham = small(router="learned")
    assert all(torch.equal(ham.state_dict()[key], value) for key, value in without.items())


def written_out(mixer, x, write, gap):
    """Memory and store, token by token, from the text of the module."""
    inputs, gate = mixer.project(x).split([mixer.channels, HV * DV], -1)
    opened = [torch.sigmoid(z).unflatten(-1, (HV, DV)) for z in (gate, mixer.store_gate(x))]
    tail = x.new_zeros(ROWS, 3, mixer.channels)
    memory, outputs = x.new_zeros(ROWS, HV, DK, DV), []
    entries = [[] for _ in range(ROWS)]  # of each row: (score, position, key, value)
    gamma = mixer.discount
    for n in range(x.shape[1]):
        tail = torch.where((gap[:, n] > 0)[:, None, None], 0.0, tail)
        window = torch.cat([tail, inputs[:, n : n + 1]], 1)
        tail = window[:, 1:]
        q, k, v = F.silu((window * mixer.conv_weight.T).sum(1)).split([H * DK, H * DK, HV * DV], -1)
        raw_q, k = (z.unflatten(-1, (H, DK)).repeat_interleave(HV // H, 1) for z in (q, k))
        q, k = unit_length(raw_q), unit_length(k)
        v, raw = v.unflatten(-1, (HV, DV)), mixer.gates(x[:, n])
        beta = torch.sigmoid(raw[:, :HV]) * write[:, n, None]
        decay = -mixer.A_log.exp() * F.softplus(raw[:, HV:] + mixer.dt_bias) + gap[:, n, None] * mixer.rate
        memory = memory * decay.exp()[..., None, None]
        rho = beta[..., None] * (v - torch.einsum("rhkv,rhk->rhv", memory, k))
        memory = memory + torch.einsum("rhk,rhv->rhkv", k, rho)
        recurrent = torch.einsum("rhkv,rhk->rhv", memory, q) / DK**0.5
        score = (rho.norm(dim=-1) / (v.norm(dim=-1) + 1e-6)).mean(-1)
        if mixer.learned:
            score = torch.sigmoid(mixer.router(x[:, n]) + mixer.router_bias)[:, 0]
        found = []
        for row in range(ROWS):
            fade = gamma ** (1 + gap[row, n])
            entries[row] = [(c * fade, s, key, value) for c, s, key, value in entries[row]]
            if write[row, n] > 0:
                entries[row].append((score[row], n, k[row], v[row]))
            if len(entries[row]) > mixer.slots:
                lowest = min(range(len(entries[row])), key=lambda i, kept=entries[row]: kept[i][0].item())
                entries[row].pop(lowest)  # of equals the first, which is the oldest
            if not entries[row]:
                found.append(torch.zeros_like(v[row]))
                continue
            asked = mixer.query_norm(raw_q[row])
            logits = torch.stack([(asked * key).sum(-1) for _, _, key, _ in entries[row]])
            if mixer.learned:
                logits = logits + torch.stack([c.log() for c, *_ in entries[row]])[:, None]
            weights = torch.softmax(logits, 0)
            found.append(sum(w[:, None] * value for w, (*_, value) in zip(weights, entries[row], strict=True)))
        both = mixer.norm(recurrent) * opened[0][:, n] + mixer.store_norm(torch.stack(found)) * opened[1][:, n]
        outputs.append(mixer.output(both.flatten(1)))
    return torch.stack(outputs, 1), memory, entries


@pytest.mark.parametrize(
    "args",
    [{}, {"discount": 0.9}, {"router": "learned", "slots": 3}, {"router": "learned", "discount": 0.8}, {"slots": 99}],
    ids=str,
)
def test_it_is_its_equations_written_out(args):
    mixer, x, (write, gap) = small(**args), tokens(), holes()
    for norm in (mixer.query_norm, mixer.store_norm):
        torch.nn.init.uniform_(norm.weight, 0.5, 2.0)
    write[1, :3] = 0  # the store is empty at first
    y, state = mixer(x, write=write, gap=gap)
    want, memory, entries = written_out(mixer, x, write, gap)
    assert_close(y, want, rtol=1e-11, atol=1e-12)
    assert_close(state.memory, memory, **TIGHT)
    for row in range(ROWS):
        n = len(entries[row])
        assert [s + 1 for _, s, *_ in entries[row]] == state.slot_position[row, :n].tolist()
        assert_close(state.score[row, :n], torch.stack([c.log() for c, *_ in entries[row]]), rtol=1e-11, atol=1e-12)
        assert not state.slot_position[row, n:].any()
        assert not state.keys[row, n:].any()


def test_with_slots_for_all_tokens_it_is_full_attention_beside_gated_deltanet():
    mixer, x = small(slots=TOKENS), tokens()
    gdn = branch(mixer)
    done = gdn._pass(x, None, None, write=None, gap=None, lengths=None)
    q, k = (
        z.repeat_interleave(HV // H, 2).transpose(1, 2) for z in (mixer.query_norm(done.query), unit_length(done.key))
    )
    read = F.scaled_dot_product_attention(q, k, done.value.transpose(1, 2), is_causal=True, scale=1.0).transpose(1, 2)
    gate = torch.sigmoid(mixer.store_gate(x)).unflatten(-1, (HV, DV))
    y, state = mixer(x)
    assert_close(y, gdn(x)[0] + mixer.output((mixer.store_norm(read) * gate).flatten(-2)), **TIGHT)
    assert torch.equal(state.slot_position[0], torch.arange(1, TOKENS + 1))


# ---- the store


@pytest.mark.parametrize("gamma", [1.0, 0.97])
@pytest.mark.parametrize("slots", [1, 5, 40])
def test_the_mask_is_that_of_a_heap_also_where_scores_are_equal(gamma, slots):
    scores = torch.randint(1, 12, (4, 60)).double() if gamma == 1 else torch.rand(4, 60).double()
    inserted = torch.rand(4, 60) < 0.85
    rank = scores.log() - torch.arange(60) * math.log(gamma)
    seen = visible(rank, inserted, 60, slots)
    for row in range(4):
        heap = []
        for t in range(60):
            if inserted[row, t]:
                heapq.heappush(heap, (float(rank[row, t]), t))
            if len(heap) > slots:
                heapq.heappop(heap)
            assert seen[row, t].nonzero().flatten().tolist() == sorted(s for _, s in heap)


@pytest.mark.parametrize("weighed", [False, True])
def test_the_length_of_the_blocks_changes_nothing(weighed):
    N = 45
    q, k, v = (torch.randn(2, N, heads, d, dtype=torch.float64) for heads, d in ((2, 3), (2, 3), (4, 6)))
    empty = Store(k.new_zeros(2, 4, 2, 3), v.new_zeros(2, 4, 4, 6), k.new_zeros(2, 4), torch.zeros(2, 4).long())
    score, elapsed = torch.randn(2, N).double(), 1 + torch.rand(2, N).round().double()
    rest = {"stored": torch.rand(2, N) < 0.9, "elapsed": elapsed, "position": torch.arange(N).expand(2, N)}
    rest |= {"log_discount": -0.05, "weighed": weighed}
    want, end = look_up(q, k, v, score, empty, **rest, block=N)
    for block in (1, 2, 7, 44):
        got, store = look_up(q, k, v, score, empty, **rest, block=block)
        assert_close(got, want, **TIGHT)
        checks.assert_states_close(store, end, **TIGHT)


@pytest.mark.parametrize("args", [{}, {"discount": 0.95}, {"router": "learned"}], ids=str)
def test_what_was_dropped_never_returns(args):
    mixer, x, state, held = small(**args), tokens(60), None, [set() for _ in range(ROWS)]
    for n in range(60):
        _, state = mixer(x[:, n : n + 1], state)
        for row in range(ROWS):
            now = set(state.slot_position[row].tolist()) - {0}
            assert now <= held[row] | {n + 1}, "an entry returned"
            assert len(now) == min(n + 1, mixer.slots)
            held[row] = now
    assert max(min(entries) for entries in held) > 1, "nothing was dropped at all"


def test_scores_are_aged_by_tokens_and_by_silence_which_takes_nothing_out():
    mixer, x = small(discount=0.5), tokens(6)
    _, before = mixer(x)
    gap, none = torch.tensor([[2.5], [0.0], [1e6]], dtype=torch.float64), torch.zeros(ROWS, 1)
    _, after = mixer(tokens(1), before, gap=gap, write=none)
    assert_close(after.score, before.score + (1 + gap) * math.log(0.5), **TIGHT)
    for leaf in ("keys", "values", "slot_position"):
        assert torch.equal(getattr(after, leaf), getattr(before, leaf)), leaf
    ageless = small()
    _, before = ageless(x)
    _, after = ageless(tokens(1), before, gap=gap, write=none)
    assert torch.equal(after.score, before.score)


def test_an_unwritten_token_reads_the_store_and_never_enters_it():
    mixer, x = small(slots=30), tokens()
    write, _ = holes()
    y, state = mixer(x, write=write)
    for row in range(ROWS):
        places = state.slot_position[row]
        assert places[places > 0].tolist() == (write[row].nonzero().flatten() + 1).tolist()
    torch.nn.init.zeros_(mixer.store_norm.weight)
    silent, _ = mixer(x, write=write)
    assert ((y - silent).abs().amax(-1) > 1e-6).all(), "every token reads"


def test_a_token_that_is_predicted_scores_low():
    """The same pair again and again: the first one stays, the repetitions find it known."""
    mixer = small(slots=1, conv=1, horizon=(1e6, 1e6))
    x = tokens(1).expand(-1, 6, -1)
    _, state = mixer(x)
    assert torch.equal(state.slot_position, torch.ones(ROWS, 1, dtype=torch.int64))


@pytest.mark.parametrize("args", [{"discount": 0.9}, {"router": "learned", "discount": 0.95}, {"slots": 1}], ids=str)
def test_cutting_the_stream_changes_nothing_under_its_options(args):
    mixer, x, (write, gap) = small(**args), tokens(90), holes(90)
    checks.check_streaming(mixer, x, cuts=((1,), (7,), (40, 0, 3)), **TIGHT)
    whole, end = mixer(x, write=write, gap=gap)
    outputs, state = [], None
    for piece, w, g in zip(x.split(11, 1), write.split(11, 1), gap.split(11, 1), strict=True):
        y, state = mixer(piece, state, write=w, gap=g)
        outputs.append(y)
    assert_close(torch.cat(outputs, 1), whole, **TIGHT)
    checks.assert_states_close(state, end, **TIGHT)


def test_in_float32_a_cut_changes_nothing_where_no_decision_is_near_a_tie():
    rows, slots = 12, 4
    mixer = small(torch.float32, slots=slots)
    x = tokens(40, rows, torch.float32)
    everything = small(slots=40)
    everything.load_state_dict(mixer.state_dict())
    scores = everything(x.double())[1].score  # all tokens are kept: their scores in order
    clear = torch.ones(rows, dtype=torch.bool)
    for t in range(slots, 40):
        best = scores[:, : t + 1].sort(1, descending=True).values
        clear &= best[:, slots - 1] - best[:, slots] > 1e-4
    assert clear.sum() > rows // 2
    whole, end = mixer(x)
    outputs, state = [], None
    for piece in x.split(3, 1):
        y, state = mixer(piece, state)
        outputs.append(y)
    assert_close(torch.cat(outputs, 1)[clear], whole[clear], rtol=1e-5, atol=1e-5)
    assert torch.equal(state.slot_position[clear], end.slot_position[clear])


# ---- learning


def test_the_choice_carries_no_gradient_and_the_learned_score_does():
    x = tokens().requires_grad_()
    assert not small()(x)[1].score.requires_grad
    mixer = small(router="learned")
    y, state = mixer(x)
    assert state.score.requires_grad
    y.square().sum().backward()
    assert mixer.router.weight.grad.abs().max() > 0


def test_gradients_of_a_cut_stream_equal_those_of_the_whole_with_a_learned_router():
    checks.check_gradients_streaming(small(router="learned", discount=0.9), tokens(), cut=4, rtol=1e-9, atol=1e-10)


def test_the_budget_loss_brings_the_mean_score_to_the_share():
    mixer, x = small(router="learned", share=0.2), tokens(50)
    assert_close(torch.sigmoid(mixer.router_bias), torch.tensor([0.2], dtype=torch.float64), rtol=1e-6, atol=0)
    torch.nn.init.zeros_(mixer.router_bias)
    optimiser = torch.optim.Adam([mixer.router.weight, mixer.router_bias], lr=0.05)
    losses = []
    for _ in range(40):
        optimiser.zero_grad()
        loss = mixer.budget_loss(x)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[:8] == sorted(losses[:8], reverse=True)
    assert losses[-1] < losses[0] / 10


def test_the_budget_loss_is_a_function_of_the_tokens_within_their_lengths():
    mixer, x = small(router="learned", share=0.25), tokens(9)
    lengths = torch.tensor([0, 4, 9])
    c = torch.sigmoid(mixer.router(x) + mixer.router_bias)[..., 0]
    mean = (c[1, :4].sum() + c[2].sum()) / 13
    assert_close(mixer.budget_loss(x, lengths=lengths), (mean - 0.25) ** 2, **TIGHT)
    assert_close(mixer.budget_loss(x), (c.mean() - 0.25) ** 2, **TIGHT)


# ---- sizes and errors


@pytest.mark.parametrize(
    "args", [{"slots": 0}, {"slots": 7}, {"slots": 7, "value_heads": 2, "router": "learned"}], ids=str
)
def test_the_byte_formula_holds(args):
    mixer = small(torch.float32, **args)
    assert state_bytes(mixer(tokens(dtype=torch.float32))[1]) == mixer.state_bytes()


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ({"slots": -1}, "slots is -1; expected 0"),
        ({"router": "errors"}, "router is 'errors'; expected error or learned"),
        ({"share": 1}, "share is 1; expected a share"),
        ({"discount": 0.0}, "discount is 0.0; expected above 0"),
        ({"discount": 1.5}, "discount is 1.5; expected above 0"),
        ({"output_gate": "silu"}, "no argument 'output_gate'"),
    ],
)
def test_a_wrong_argument_is_refused_in_one_line(args, text):
    with pytest.raises(ValueError, match=text) as error:
        small(**args)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("args", [{}, {"router": "learned", "slots": 0}])
def test_there_is_no_budget_without_a_learned_router(args):
    with pytest.raises(ValueError, match="no learned router"):
        small(**args).budget_loss(tokens())
