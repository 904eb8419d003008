"""Mamba-3: its equations token by token, the mask form, the reduction to Mamba-2's scan, and the turning of keys."""

import math

import pytest
import torch
import torch.nn.functional as F
from sizes import small_args
from torch.testing import assert_close

from tsgdn import checks
from tsgdn.kernels import ssd
from tsgdn.mixers import build
from tsgdn.streamable import state_bytes

WIDTH, ROWS, H, Dk, Dv, PAIRS = 6, 2, 2, 8, 5, 2
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def small(**args):
    """A mixer whose gates and turns are strong enough to be seen, norms and biases unlike one."""
    mixer = build("mamba3", WIDTH, small_args("mamba3", **args)).double()
    with torch.no_grad():
        for name, parameter in mixer.named_parameters():
            if name.endswith("norm.weight") or name in ("D", "key_bias", "query_bias"):
                parameter.copy_(0.5 + torch.rand_like(parameter))
        mixer.dt_bias += 4.0
        mixer.A_bias.uniform_(-3.0, 0.0)
    return mixer


def tokens(n=9, rows=ROWS):
    return torch.randn(rows, n, WIDTH, dtype=torch.float64)


def pieces(mixer, x):
    """What is known of each token before any memory: z, v, normed B and C with bias, dt, A, lam, theta."""
    gate, value, key, query = mixer.project(x).split([H * Dv, H * Dv, Dk, Dk], -1)
    key, query = (
        (z / (z.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight)[:, :, None] + bias
        for z, norm, bias in (
            (key, mixer.key_norm, mixer.key_bias),
            (query, mixer.query_norm, mixer.query_bias),
        )
    )
    dt, a, lam, turn = mixer.gates(x).split([H, H, H, mixer.pairs], -1)
    dt, a = F.softplus(dt + mixer.dt_bias), -F.softplus(a + mixer.A_bias)
    heads = (z.unflatten(-1, (H, Dv)) for z in (gate, value))
    return *heads, key, query, dt, a, torch.sigmoid(lam), math.pi * torch.tanh(turn)


def turned(x, angle):
    """The first pairs of x (R, H, Dk) as complex numbers, multiplied by e^(i angle)."""
    z = torch.complex(x[..., :PAIRS], x[..., PAIRS : 2 * PAIRS]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([z.real, z.imag, x[..., 2 * PAIRS :]], -1)


@pytest.mark.parametrize("start", [False, True])
def test_mamba3_is_its_equations_written_out(start):
    mixer, x, n = small(), tokens(), 9
    write = torch.tensor([1.0, 0.3, 0.0, 1.0, 0.0, 0.0, 0.7, 1.0, 1.0]).double().repeat(ROWS, 1)
    gap = torch.tensor([0, 0, 0, 2.5, 0, 0.0, 0, 4, 0]).double().repeat(ROWS, 1)
    state = mixer(tokens())[1] if start else None
    gate, value, key, query, dt, a, lam, theta = pieces(mixer, x)
    memory, last_key, last_value, angle = state or mixer.initial_state(ROWS)
    reads = []
    for t in range(n):
        angle = angle + theta[:, t, None] * dt[:, t, :, None]
        alpha, k, q = torch.exp(a[:, t] * dt[:, t]), turned(key[:, t], angle), turned(query[:, t], angle)
        if gap[0, t] > 0:
            memory = memory * torch.exp(gap[0, t] * mixer.rate)[:, None, None]
            last_key, last_value = torch.zeros_like(last_key), torch.zeros_like(last_value)
        old = torch.einsum("rh,rhk,rhv->rhkv", (1 - lam[:, t]) * dt[:, t] * alpha, last_key, last_value)
        new = torch.einsum("rh,rhk,rhv->rhkv", lam[:, t] * dt[:, t] * write[:, t, None], k, value[:, t])
        memory = alpha[..., None, None] * memory + old + new
        last_key, last_value = k, value[:, t] * write[:, t, None, None]
        reads.append(torch.einsum("rhkv,rhk->rhv", memory, q) + mixer.D[:, None] * value[:, t])
    y, end = mixer(x, state, write=write, gap=gap)
    assert_close(y, mixer.output((torch.stack(reads, 1) * F.silu(gate)).flatten(-2)), **EXACT)
    assert_close(end.memory, memory, **EXACT)
    assert_close(end.last_key, last_key, **EXACT)
    assert_close(end.last_value, last_value, **EXACT)
    assert_close(torch.polar(torch.ones_like(angle), end.angle), torch.polar(torch.ones_like(angle), angle), **EXACT)


def test_mamba3_is_its_mask_form():
    """Token t reads token s with L_ts (lam_s dt_s + [s < t] (1 - lam_{s+1}) dt_{s+1})."""
    mixer, x, n = small(), tokens(), 9
    gate, value, key, query, dt, a, lam, theta = pieces(mixer, x)
    angle = (theta[:, :, None] * dt[..., None]).cumsum(1)
    key, query = (torch.stack([turned(z[:, t], angle[:, t]) for t in range(n)], 1) for z in (key, query))
    sums = (a * dt).cumsum(1)
    coef = torch.zeros(ROWS, n, n, H, dtype=torch.float64)
    for t in range(n):
        for s in range(t + 1):
            share = lam[:, s] * dt[:, s]
            if s < t:
                share = share + (1 - lam[:, s + 1]) * dt[:, s + 1]
            coef[:, t, s] = torch.exp(sums[:, t] - sums[:, s]) * share
    scores = coef * torch.einsum("rthk,rshk->rtsh", query, key)
    read = torch.einsum("rtsh,rshv->rthv", scores, value) + mixer.D[:, None] * value
    assert_close(mixer(x)[0], mixer.output((read * F.silu(gate)).flatten(-2)), **EXACT)


@pytest.mark.parametrize("fraction", [0, 0.5])
def test_without_the_last_token_and_without_turns_mamba3_is_mamba2s_scan(fraction):
    mixer, x = small(rope_fraction=fraction), tokens()
    x[..., 0] = 1.0
    with torch.no_grad():
        mixer.gates.weight[H : 2 * H] = 0.0  # A is constant
        mixer.gates.weight[2 * H :] = 0.0  # no turns,
        mixer.gates.weight[2 * H : 3 * H, 0] = 60.0  # and lam = 1
    gate, value, key, query, dt, *_ = pieces(mixer, x)
    start = torch.randn(ROWS, H, Dk, Dv, dtype=torch.float64)
    read, memory = ssd(value, dt, -F.softplus(mixer.A_bias), key, query, state=start)
    y, end = mixer(x, mixer.initial_state(ROWS)._replace(memory=start))
    assert_close(y, mixer.output(((read + mixer.D[:, None] * value) * F.silu(gate)).flatten(-2)), **EXACT)
    assert_close(end.memory, memory, **EXACT)
    assert not end.angle.any()


# ---- the angle


def shifted(state, angle):
    """The same stream, had it begun at another angle."""
    return state._replace(
        memory=turned(state.memory.transpose(-1, -2), angle[:, :, None].expand(-1, -1, Dv, -1)).transpose(-1, -2),
        last_key=turned(state.last_key, angle),
        angle=state.angle + angle,
    )


def test_where_a_stream_begins_on_the_circle_does_not_matter():
    mixer, x = small(), tokens()
    _, state = mixer(tokens())
    other = shifted(state, torch.tensor([2.0, -3.0]).double().expand(ROWS, H, PAIRS))
    want, end = mixer(x, state)
    got, _ = mixer(x, other)
    assert (mixer(x, state._replace(angle=other.angle))[0] - want).abs().max() > 1e-3
    assert_close(got, want, **EXACT)
    assert_close(mixer(x, shifted(mixer.initial_state(ROWS), other.angle))[0], mixer(x)[0], **EXACT)
    assert end.angle.abs().max() <= math.pi


def test_the_angle_of_a_long_stream_does_not_drift():
    mixer, n = build("mamba3", WIDTH, {"heads": 1, "key_dim": 4, "value_dim": 2}), 20_000
    with torch.no_grad():
        mixer.dt_bias += 4.0
        mixer.A_bias.fill_(-4.0)
    x = torch.randn(1, n, WIDTH) + 0.5
    origin = torch.full((1, 1, 1), 3.0, dtype=torch.float64)
    state, other = None, mixer.initial_state(1)._replace(angle=origin)
    with torch.no_grad():
        dt, _, _, turn = mixer.gates(x).split(1, -1)
        turns = (math.pi * torch.tanh(turn)).double() * F.softplus(dt + mixer.dt_bias).double()
        assert abs(float(turns.sum())) > 200, "the angle wraps many times"
        for piece in x.split(1000, 1):
            y, state = mixer(piece, state)
            z, other = mixer(piece, other)
    assert state.angle.dtype == torch.float64
    assert state.angle.abs().max() <= math.pi
    assert (z - y).abs().max() < 1e-5 * y.abs().max()
    assert abs(math.remainder(float(other.angle - state.angle) - 3.0, math.tau)) < 1e-9
    # Exact but for the rounding of single turns in float32, which may differ between products of different lengths.
    assert abs(math.remainder(float(state.angle) - math.fsum(turns.flatten().tolist()), math.tau)) < 1e-5


def test_cutting_changes_nothing_where_the_angle_wraps():
    mixer, x = small(), tokens(60)
    with torch.no_grad():
        mixer.gates.weight[-PAIRS:] *= 10
    dt, theta = pieces(mixer, x)[4], pieces(mixer, x)[7]
    assert (theta[:, :, None] * dt[..., None]).cumsum(1).abs().max() > 3 * math.pi
    checks.check_streaming(mixer, x, **EXACT)


# ---- skipped writes, silence


def test_a_token_that_is_not_written_enters_neither_now_nor_as_the_last_token():
    mixer, x = small(), tokens()
    write = torch.ones(ROWS, 9)
    write[:, 3] = 0.0
    with torch.no_grad():  # the first channel reaches the values only
        mixer.gates.weight[:, 0] = 0.0
        mixer.project.weight[H * Dv * 2 :, 0] = 0.0
    other = x.clone()
    other[:, 3, 0] += 10.0
    _, want = mixer(x, write=write)
    _, got = mixer(other, write=write)
    assert torch.equal(got.memory, want.memory)
    assert not torch.allclose(mixer(other)[1].memory, mixer(x)[1].memory)
    _, none = mixer(x, write=torch.zeros(ROWS, 9))
    assert not none.memory.any()
    assert not none.last_value.any()


def test_silence_fades_the_memory_clears_the_last_token_and_leaves_the_angle():
    mixer, x = small(), tokens(1)
    _, before = mixer(tokens())
    y, after = mixer(x, before, gap=torch.full((ROWS, 1), 2.5))
    zeros = mixer.initial_state(ROWS)
    faded = before.memory * torch.exp(2.5 * mixer.rate)[:, None, None]
    want, end = mixer(x, zeros._replace(memory=faded, angle=before.angle))
    assert_close(y, want, **EXACT)
    checks.assert_states_close(after, end, **EXACT)
    assert torch.equal(after.angle, mixer(x, before)[1].angle)


def test_a_gap_never_enters_the_write():
    mixer, x = small(), tokens(1)
    assert torch.equal(mixer(x, gap=torch.full((ROWS, 1), 50.0))[1].memory, mixer(x)[1].memory)


def test_the_last_token_of_a_padded_row_is_its_own():
    mixer, x = small(), tokens()
    _, before = mixer(tokens())
    _, end = mixer(x, before, lengths=torch.tensor([4, 0]))
    _, alone = mixer(x[:1, :4], type(before)(*(leaf[:1] for leaf in before)))
    for got, want, start in zip(end, alone, before, strict=True):
        assert_close(got[:1], want, **EXACT)
        assert torch.equal(got[1], start[1])


# ---- gradients


def test_gradients_reach_every_leaf_of_the_state():
    mixer, x = small(key_dim=4, value_dim=2), tokens(2, rows=1)
    leaves = tuple(leaf.detach().requires_grad_() for leaf in mixer(tokens(rows=1))[1])

    def run(*leaves):
        y, state = mixer(x, type(mixer.initial_state(1))(*leaves))
        return y, *state

    assert torch.autograd.gradcheck(run, leaves)


# ---- initial values, options


def test_the_decay_begins_at_the_drawn_horizon_and_the_write_stays_strong():
    mixer = build("mamba3", WIDTH, {"heads": 256, "key_dim": 2, "horizon": (4, 1024)})
    dt = F.softplus(mixer.dt_bias)
    log_decay = -F.softplus(mixer.A_bias) * dt
    assert_close(log_decay, mixer.rate, rtol=1e-4, atol=0)
    tau = -1 / log_decay.detach()
    assert 3.9 < tau.min() < 6
    assert 700 < tau.max() < 1030
    assert dt.min() > 0.9e-3
    assert dt[tau > 200].max() > 5e-2
    memory, none = torch.ones(1, 256, 2, 2), torch.zeros(1, 3)
    _, state = mixer(torch.zeros(1, 3, WIDTH), mixer.initial_state(1)._replace(memory=memory), write=none)
    want = torch.exp(3 * mixer.rate)[None, :, None, None].expand_as(memory)
    assert_close(state.memory, want, rtol=1e-3, atol=0)  # all logits are zero: only the biases speak


def test_the_decay_depends_on_the_input_and_is_never_slower_than_its_bound():
    mixer, x = small(), tokens()
    memory = torch.ones_like(mixer.initial_state(ROWS).memory)
    none, start = torch.zeros(ROWS, 9), mixer.initial_state(ROWS)._replace(memory=memory)
    _, _, _, _, dt, a, *_ = pieces(mixer, x)
    kept = mixer(x, start, write=none)[1].memory
    assert_close(kept, (a * dt).sum(1).exp()[..., None, None].expand_as(kept), **EXACT)
    assert a.std() > 0
    with torch.no_grad():
        mixer.A_bias.fill_(-100.0)
    kept = mixer(x, start, write=none)[1].memory
    assert_close(kept, (-1e-4 * dt).sum(1).exp()[..., None, None].expand_as(kept), **EXACT)


@pytest.mark.parametrize(
    "args", [{"groups": None}, {"output_norm": True}, {"rope_fraction": 1}, {"key_dim": 3}], ids=str
)
def test_cutting_changes_nothing_under_the_options(args):
    mixer, x = small(**args), tokens()
    checks.check_streaming(mixer, x, **EXACT)
    assert state_bytes(mixer.float().initial_state(ROWS)) == mixer.state_bytes()


def test_the_output_norm_makes_the_size_of_the_memory_irrelevant():
    mixer, x = small(output_norm=True), tokens(1)
    state = mixer.initial_state(ROWS)
    big = torch.randn_like(state.memory) * 1e9
    got = mixer(x, state._replace(memory=10 * big))[0]
    assert_close(got, mixer(x, state._replace(memory=big))[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ({"groups": 3}, "heads 2 is not a multiple of groups 3"),
        ({"rope_fraction": 1.5}, "rope_fraction is 1.5"),
        ({"decay_init": "long"}, "expected one of paper, shared, horizon"),
        ({"delta": True}, "no argument 'delta'"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(args, text):
    with pytest.raises(ValueError, match=text) as error:
        build("mamba3", WIDTH, args)
    assert "\n" not in str(error.value)
