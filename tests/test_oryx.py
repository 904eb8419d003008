"""Oryx against its equations, its reductions, and a plan of its modes that is made chunk by chunk in plain Python."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from tsgdn import checks
from tsgdn.kernels import unit_length
from tsgdn.mixers import build
from tsgdn.mixers.oryx import POLICIES, Plan
from tsgdn.streamable import map_state, state_bytes, state_leaves

WIDTH, ROWS, TOKENS = 12, 3, 41
H, DK, DV, WINDOW, CHUNK = 2, 8, 5, 6, 4
TIGHT = {"rtol": 1e-12, "atol": 1e-12}
EAGER = {"policy": "surprise", "threshold": 0.3, "budget": 0.45}
MIXED = [EAGER, {"policy": "random", "budget": 0.5}, {"policy": "prefix_attention", "prefix": 5}]


def small(dtype=torch.float64, **args):
    sizes = {"heads": H, "key_dim": DK, "value_dim": DV, "window": WINDOW, "mode_chunk": CHUNK}
    return build("oryx", WIDTH, {**sizes, **args}).to(dtype).eval()


def tokens(n=TOKENS, rows=ROWS, dtype=torch.float64):
    return torch.randn(rows, n, WIDTH, dtype=dtype)


def holes(n=TOKENS):
    """Skipped writes, one chunk of them at least, and gaps."""
    write = (torch.rand(ROWS, n) < 0.8).double()
    write[0, 8:16] = 0
    return write, torch.where(torch.rand(ROWS, n) < 0.15, torch.randint(1, 13, (ROWS, n)) / 4, 0.0).double()


def modes(mixer, x, state=None):
    """The mode of every token: (R, N)."""
    decided, decide = [], mixer._decide
    mixer._decide = lambda *arguments: decided.append(decide(*arguments)) or decided[0]
    try:
        with torch.no_grad():
            mixer(x, state)
    finally:
        del mixer._decide
    return decided[0][0]


# ---- the equations


class PlainPlan:
    """The plan of one row: Welford's statistic of the chunk means, and a budget that is spent one by one."""

    def __init__(self, mixer, draw):
        self.mixer, self.draw = mixer, draw
        self.position = self.mode = self.spent = self.count = self.number = 0
        self.mean = self.m2 = self.total = 0.0

    def token(self, surprise, written):
        if self.position % self.mixer.mode_chunk == 0:
            surprised = self.close()
            j = self.position // self.mixer.mode_chunk
            self.mode = {
                "surprise": surprised and self.spent < math.ceil(self.mixer.budget * (j + 1) - 1e-9),
                "all_linear": False,
                "all_attention": True,
                "prefix_attention": j < self.mixer.prefix,
                "random": self.draw(j),
            }[self.mixer.policy]
            self.spent += self.mode
            self.total, self.number = 0.0, 0
        self.position += 1
        if written:
            self.total, self.number = self.total + surprise, self.number + 1
        return self.mode

    def close(self):
        if self.number == 0:
            return False
        new = self.total / self.number
        surprised = False
        if self.count >= 3:
            surprised = new > self.mean + self.mixer.threshold * math.sqrt(self.m2 / (self.count - 1))
        self.count += 1
        delta = new - self.mean
        self.mean += delta / self.count
        self.m2 += delta * (new - self.mean)
        return surprised

    def leaves(self):
        return (self.position, self.mode, self.spent, self.count, self.mean, self.m2, self.total, self.number)


def turn(x, time):
    """Rotation of channel i and channel i + D / 2 as one complex number."""
    half = x.shape[-1] // 2
    speed = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    z = torch.complex(x[..., :half], x[..., half:]) * torch.exp(1j * time * speed)
    return torch.cat([z.real, z.imag], -1)


def written_out(mixer, x, write, gap):
    """Token by token, from the text of the module; and the plan of each row."""
    drawn = modes(small(policy="random", budget=mixer.budget, seed=mixer.seed, mode_chunk=1), tokens(99, 1))[0]
    inputs, gate = mixer.project(x).split([mixer.channels, H * DV], -1)
    own = mixer.attention_query(x).unflatten(-1, (H, DK))
    tail, memory, outputs = x.new_zeros(ROWS, 3, mixer.channels), x.new_zeros(ROWS, H, DK, DV), []
    rings, plans = [[] for _ in range(ROWS)], [PlainPlan(mixer, lambda j: bool(drawn[j])) for _ in range(ROWS)]
    clock = (1 + gap).cumsum(1)
    for n in range(x.shape[1]):
        tail = torch.where((gap[:, n] > 0)[:, None, None], 0.0, tail)
        window = torch.cat([tail, inputs[:, n : n + 1]], 1)
        tail = window[:, 1:]
        q, k, v = F.silu((window * mixer.conv_weight.T).sum(1)).split([H * DK, H * DK, H * DV], -1)
        q, k, v = q.unflatten(-1, (H, DK)), k.unflatten(-1, (H, DK)), v.unflatten(-1, (H, DV))
        beta, rate = (z[..., n, :] for z in mixer.gates(x).split(H, -1))
        beta = torch.sigmoid(beta)
        decay = -mixer.A_log.exp() * F.softplus(rate + mixer.dt_bias) + gap[:, n, None] * mixer.rate
        memory = memory * decay.exp()[..., None, None]
        error = v - torch.einsum("rhkv,rhk->rhv", memory, unit_length(k))
        memory = memory + torch.einsum("rhk,rhv->rhkv", unit_length(k), (beta * write[:, n, None])[..., None] * error)
        surprise = (error.norm(dim=-1) / (v.norm(dim=-1) + 1e-6)).mean(-1)
        read = torch.einsum("rhkv,rhk->rhv", memory, unit_length(q)) / DK**0.5
        for row in range(ROWS):
            now = clock[row, n]
            if write[row, n] > 0:
                rings[row].append((now, k[row], v[row]))
            reached = [entry for entry in rings[row] if now - entry[0] < mixer.window]
            if plans[row].token(surprise[row].item(), bool(write[row, n] > 0)):
                read[row] = 0
                if reached:
                    keys = torch.stack([turn(key, time - now) for time, key, _ in reached])
                    weights = torch.softmax((own[row, n] * keys).sum(-1) / DK**0.5, 0)
                    read[row] = (weights[..., None] * torch.stack([value for *_, value in reached])).sum(0)
        outputs.append(mixer.output((mixer.norm(read) * F.silu(gate[:, n]).unflatten(-1, (H, DV))).flatten(1)))
    return torch.stack(outputs, 1), memory, plans


@pytest.mark.parametrize("args", [*MIXED, {"policy": "all_attention"}, {"policy": "all_linear"}], ids=str)
def test_it_is_its_equations_written_out(args):
    mixer, x, (write, gap) = small(seed=3, **args), tokens(), holes()
    with torch.no_grad():
        y, state = mixer(x, write=write, gap=gap)
        want, memory, plans = written_out(mixer, x, write, gap)
    assert_close(y, want, rtol=1e-11, atol=1e-12)
    assert_close(state.memory, memory, **TIGHT)
    got = torch.stack([state[state._fields.index(name)].double() for name in Plan._fields], 1)
    assert_close(got, torch.tensor([plan.leaves() for plan in plans], dtype=torch.float64), rtol=1e-9, atol=1e-12)
    if args in MIXED:
        spent = state.budget
        assert ((spent > 0) & (spent < TOKENS // CHUNK)).all(), "both modes are seen"


@pytest.mark.parametrize("already", [0, 30])
@pytest.mark.parametrize(("budget", "threshold", "chunk"), [(0.1, 1.5, 5), (0.4, 0.0, 1), (1, 1.2, 3), (0.25, -0.2, 2)])
def test_the_plan_of_many_chunks_at_once_is_that_of_one_after_the_other(budget, threshold, chunk, already):
    rows, mixer = 40, small(budget=budget, threshold=threshold, mode_chunk=chunk)
    surprise, written = torch.rand(rows, 300, dtype=torch.float64).exp(), torch.rand(rows, 300) < 0.7
    plan = Plan(*mixer.initial_state(rows)[5:])._replace(budget=torch.full((rows,), already, dtype=torch.float64))
    on, after = mixer._decide(surprise, written, torch.ones_like(written), plan)
    want = []
    for row in range(rows):
        plain = PlainPlan(mixer, bool)
        plain.spent = already
        told = [plain.token(*token) for token in zip(surprise[row].tolist(), written[row].tolist(), strict=True)]
        assert on[row].tolist() == [bool(mode) for mode in told]
        want.append(plain.leaves())
    got = torch.stack([leaf.double() for leaf in after], 1)
    assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-10, atol=1e-12)


def test_always_linear_it_is_gated_deltanet_and_starts_the_same():
    torch.manual_seed(5)
    oryx = small(policy="all_linear")
    torch.manual_seed(5)
    gdn = build("gated_deltanet", WIDTH, {"heads": H, "key_dim": DK, "value_dim": DV}).double()
    own = dict(oryx.named_parameters())
    assert all(torch.equal(own[key], value) for key, value in gdn.named_parameters())
    x, (write, gap) = tokens(), holes()
    y, state = oryx(x, write=write, gap=gap)
    want, end = gdn(x, write=write, gap=gap)
    assert torch.equal(y, want)
    assert torch.equal(state.memory, end.memory)
    assert torch.equal(state.conv, end.conv)


def test_always_attending_it_is_softmax_attention_over_a_window_of_the_shared_keys_and_values():
    mixer, x = small(policy="all_attention", rope=0.0), tokens()
    done = mixer._pass(x, None, None, write=None, gap=None, lengths=None, gated=False)
    q, k, v = mixer.attention_query(x).unflatten(-1, (H, DK)), done.key, done.value
    place = torch.arange(TOKENS)
    near = (place[:, None] >= place) & (place[:, None] - place < WINDOW)
    read = F.scaled_dot_product_attention(*(z.transpose(1, 2) for z in (q, k, v)), attn_mask=near).transpose(1, 2)
    want = mixer.output((mixer.norm(read) * F.silu(done.gate)).flatten(-2))
    assert_close(mixer(x)[0], want, **TIGHT)


# ---- the state


def test_modes_never_change_memory_window_or_statistics():
    x, (write, gap), ends = tokens(), holes(), {}
    mixer = small(**EAGER)
    for policy in POLICIES:
        mixer.policy = policy
        _, ends[policy] = mixer(x, write=write, gap=gap)
    for policy, end in ends.items():
        for (leaf, a), (_, b) in zip(state_leaves(end), state_leaves(ends["surprise"]), strict=True):
            assert leaf in ("mode", "budget") or torch.equal(a, b), f"{leaf} under {policy}"
    assert len({tuple(end.budget.tolist()) for end in ends.values()}) == 5


def test_a_policy_may_change_in_the_middle_of_a_stream_and_the_chunk_begun_keeps_its_mode():
    mixer, x = small(policy="random", budget=1), tokens()
    _, state = mixer(x[:, :6])
    mixer.policy, mixer.budget = "surprise", 0
    assert modes(mixer, x[:, 6:], state)[:, :4].tolist() == [[True, True, False, False]] * ROWS
    overspent = state._replace(budget=state.budget + 5)
    mixer.budget, mixer.threshold = 0.5, -100
    on = modes(mixer, x[:, 6:], overspent)[:, 2:]
    assert not on[:, :8].any(), "what was spent under another policy counts"


@pytest.mark.parametrize("args", MIXED, ids=str)
def test_cutting_the_stream_changes_nothing_under_its_policies(args):
    mixer, x, (write, gap) = small(**args), tokens(), holes()
    checks.check_streaming(mixer, x, cuts=((1,), (5, 0, 2)), **TIGHT)
    checks.check_causal(mixer, x)
    checks.check_gradients_streaming(mixer, x[:, :24], cut=5, rtol=1e-9, atol=1e-10)
    whole, end = mixer(x, write=write, gap=gap)
    outputs, state = [], None
    for piece, w, g in zip(x.split(3, 1), write.split(3, 1), gap.split(3, 1), strict=True):
        y, state = mixer(piece, state, write=w, gap=g)
        outputs.append(y)
    assert_close(torch.cat(outputs, 1), whole, **TIGHT)
    checks.assert_states_close(state, end, **TIGHT)


@pytest.mark.parametrize("args", MIXED, ids=str)
def test_rows_stand_at_different_places_of_their_chunks_and_padding_moves_none(args):
    mixer, first, x = small(**args), tokens(), tokens()
    _, before = mixer(first, lengths=torch.tensor([22, 0, 29]))
    lengths = torch.tensor([19, 41, 0])
    y, after = mixer(x, before, lengths=lengths)
    for row, (a, b) in enumerate(((22, 19), (0, 41), (29, 0))):
        alone = torch.cat([first[row, :a], x[row, :b]])[None]
        want, end = mixer(alone)
        assert_close(y[row, :b], want[0, a:], **TIGHT)
        checks.assert_states_close(map_state(lambda leaf, row=row: leaf[row : row + 1], after), end, **TIGHT)
    for (leaf, a), (_, b) in zip(state_leaves(after), state_leaves(before), strict=True):
        assert torch.equal(a[2], b[2]), leaf


def test_silence_is_no_part_of_a_chunk_and_an_unwritten_chunk_is_no_evidence():
    mixer, x = small(**EAGER), tokens(4)
    _, before = mixer(tokens(24))
    names = ("surprise_count", "surprise_mean", "surprise_m2")
    _, silent = mixer(x[:, :1], before, gap=torch.full((ROWS, 1), 1e6))
    assert torch.equal(silent.position, before.position + 1)
    assert not silent.age[:, 1:].any(), "the window saw only the token after the silence"
    _, unwritten = mixer(x, before, write=torch.zeros(ROWS, 4))
    assert torch.equal(unwritten.position, before.position + 4)
    assert not unwritten.chunk_count.any()
    _, later = mixer(x, unwritten)
    assert not later.mode.any()
    for name in names:
        assert torch.equal(getattr(later, name), getattr(unwritten, name)), name


# ---- the policies


def regimes(n, change):
    """Three tokens in turn, and from `change` on three others: a memory soon knows what follows from which."""
    torch.manual_seed(1)
    old, new = tokens(3), tokens(3)
    turns = torch.arange(n) % 3
    return torch.where((torch.arange(n) < change)[:, None], old[:, turns], new[:, turns])


def test_attention_is_turned_on_after_a_change_of_the_keys_and_not_before():
    mixer = small(conv=1, horizon=(1e3, 1e3))  # the default threshold and budget
    on = modes(mixer, regimes(160, 96))[:, ::CHUNK]
    assert not on[:, :25].any(), "nothing new in 24 chunks, and chunk 24 is the first of the new regime"
    assert on[:, 25].all(), "its surprise is spent on the next chunk"
    assert on[:, 25:].sum(1).max() <= 4, "the budget of 40 chunks"
    assert not on[:, 30:].any(), "the new regime is known too"
    assert not modes(mixer, regimes(160, 160)).any(), "no change, no attention"


def test_a_mode_depends_on_what_came_before_its_chunk_only():
    mixer, x = small(**EAGER), tokens(60)
    want, differed = modes(mixer, x), 0
    for start in range(0, 60, CHUNK):
        other = torch.cat([x[:, :start], 3 * tokens(60 - start)], 1)
        got = modes(mixer, other)
        assert torch.equal(got[:, : start + CHUNK], want[:, : start + CHUNK])
        differed += int((got != want).any())
    assert differed > 5
    assert torch.equal(want, want[:, ::CHUNK].repeat_interleave(CHUNK, 1)), "one mode per chunk"
    state = None
    for n in range(9):
        _, state = mixer(x[:, n : n + 1], state)
        assert torch.equal(state.mode > 0, want[:, n]), "the state tells the mode of the last token"


@pytest.mark.parametrize("budget", [0, 0.07, 0.3, 1])  # 0.07 * 100 is more than 7 in float64
def test_the_budget_is_respected_and_all_of_it_may_be_used(budget):
    mixer = small(threshold=-100, budget=budget, mode_chunk=1)  # every chunk is a surprise once there is a deviation
    x = tokens(110)
    spent = modes(mixer, x).cumsum(1)
    most = torch.tensor([math.ceil(round(budget * n, 6)) for n in range(1, 111)])
    assert (spent <= most).all()
    assert budget == 1 or (spent[:, 40:] == most[40:]).all()
    assert torch.equal(mixer(x)[1].budget, spent[:, -1].double())


def test_what_was_not_spent_may_be_spent_later():
    mixer, x = small(budget=0.25, mode_chunk=1), tokens(60)
    mixer.threshold = 1e9
    _, quiet = mixer(x[:, :40])
    assert not quiet.budget.any()
    mixer.threshold = -100
    assert modes(mixer, x[:, 40:], quiet)[:, :10].all()


def test_random_modes_follow_the_number_of_the_chunk_and_the_seed():
    x = tokens(1200, rows=1)
    drawn = {}
    for seed in (0, 1, 2**31 - 1):
        mixer = small(policy="random", budget=0.3, seed=seed, mode_chunk=1)
        drawn[seed] = modes(mixer, x)[0].double()
        assert abs(drawn[seed].mean() - 0.3) < 0.04
        assert abs(torch.corrcoef(torch.stack([drawn[seed][1:], drawn[seed][:-1]]))[0, 1]) < 0.1
    seeds = torch.corrcoef(torch.stack(list(drawn.values())))
    assert (seeds - torch.eye(3, dtype=torch.float64)).abs().max() < 0.1
    again = small(policy="random", budget=0.3, seed=1, mode_chunk=3)
    on = modes(again, tokens(30))
    assert torch.equal(on[:, ::3], drawn[1][:10].bool().expand(ROWS, 10)), "the same for all rows and tokens"


def test_the_first_chunks_attend_under_a_prefix():
    on = modes(small(policy="prefix_attention", prefix=2), tokens(20))
    assert torch.equal(on, (torch.arange(20) < 2 * CHUNK).expand(ROWS, 20))


def test_in_float32_a_cut_changes_nothing_where_no_chunk_lies_on_the_threshold():
    rows = 10
    mixer = small(torch.float32, **EAGER)
    x = tokens(48, rows, torch.float32)
    exact = small(**EAGER)
    exact.load_state_dict(mixer.state_dict())
    state, clear = None, torch.ones(rows, dtype=torch.bool)
    for piece in x.double().split(CHUNK, 1):
        _, state = exact(piece, state)
        deviation = (state.surprise_m2 / (state.surprise_count - 1).clamp_min(1)).sqrt()
        edge = state.surprise_mean + EAGER["threshold"] * deviation
        clear &= (state.chunk_sum / CHUNK - edge).abs() > 1e-4
    assert clear.sum() > rows // 2
    whole, end = mixer(x)
    outputs, state = [], None
    for piece in x.split(3, 1):
        y, state = mixer(piece, state)
        outputs.append(y)
    assert_close(torch.cat(outputs, 1)[clear], whole[clear], rtol=1e-5, atol=1e-5)
    assert torch.equal(state.budget[clear], end.budget[clear])
    assert end.budget.min() > 0


# ---- learning, sizes, errors


def test_every_parameter_learns_where_both_modes_occur():
    mixer, x = small(policy="random", budget=0.5), tokens()
    gap = torch.zeros(ROWS, TOKENS)
    gap[:, 11] = 2.5
    mixer(x, gap=gap)[0].square().sum().backward()
    for name, parameter in mixer.named_parameters():
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("args", [{}, {"window": 1, "mode_chunk": 1}], ids=str)
def test_the_byte_formula_holds(args):
    mixer = small(torch.float32, **args)
    assert state_bytes(mixer(tokens(dtype=torch.float32))[1]) == mixer.state_bytes()


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ({"policy": "surprised"}, "policy is 'surprised'; expected one of surprise, all_linear"),
        ({"mode_chunk": 0}, "mode_chunk 0 and window 6; expected at least 1"),
        ({"window": 0}, "mode_chunk 4 and window 0; expected at least 1"),
        ({"budget": 1.5}, "budget is 1.5; expected a share"),
        ({"prefix": -1}, "prefix -1 and seed 0; expected at least 0"),
        ({"seed": 2**31}, "the seed below"),
        ({"rope": 2}, "rope 2 and rope_base"),
        ({"value_heads": 4}, "no argument 'value_heads'"),
    ],
)
def test_a_wrong_argument_is_refused_in_one_line(args, text):
    with pytest.raises(ValueError, match=text) as error:
        small(**args)
    assert "\n" not in str(error.value)


def test_while_training_surprise_gives_way_to_chance_so_that_both_ways_of_reading_learn():
    mixer, x = small(budget=0.0, train_share=0.5), tokens(8 * CHUNK)
    assert not modes(mixer, x).any()
    mixer.train()
    chunks = modes(mixer, x)[:, ::CHUNK]
    assert 0 < chunks.double().mean() < 1
    mixer(x)[0].square().sum().backward()
    assert all(parameter.grad.abs().max() > 0 for name, parameter in mixer.named_parameters() if name != "rate_log")
    fixed = small(policy="all_attention").train()
    assert modes(fixed, x).all(), "a schedule that was asked for stays"
