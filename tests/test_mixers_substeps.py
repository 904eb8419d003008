"""Gated DeltaProduct and RWKV-7: the mixers that take several steps of the memory per token."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from tsgdn import checks
from tsgdn.kernels import gated_delta_rule, unit_length
from tsgdn.kernels.gated_delta_rule.reference import reference
from tsgdn.mixers import RWKV7, GatedDeltaNet, GatedDeltaProduct, build
from tsgdn.mixers.substeps import last, place, weave

WIDTH, ROWS, TOKENS = 12, 3, 23
H, Dk, Dv = 2, 8, 5
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def product(dtype=torch.float64, **args):
    return GatedDeltaProduct(WIDTH, **{"heads": H, "key_dim": Dk, "value_dim": Dv, **args}).to(dtype)


def rwkv(dtype=torch.float64, **args):
    """With every parameter away from the ones and zeros it starts from."""
    mixer = RWKV7(WIDTH, **{"heads": H, "key_dim": Dk, "value_dim": Dv, **args}).to(dtype)
    with torch.no_grad():
        for parameter in (mixer.k_k, mixer.k_a, mixer.r_k, mixer.lora_a.bias, mixer.norm.weight, mixer.norm.bias):
            parameter.add_(0.5 * torch.randn_like(parameter))
    return mixer


def tokens(n=TOKENS, dtype=torch.float64):
    return torch.randn(ROWS, n, WIDTH, dtype=dtype)


def some(n=TOKENS):
    """Write strengths, some of them 0 and 1, and gaps before a few tokens."""
    write = (1.4 * torch.rand(ROWS, n, dtype=torch.float64) - 0.2).clamp(0, 1)
    gap = torch.where(torch.rand(ROWS, n) < 0.3, 3 * torch.rand(ROWS, n), 0.0).double()
    return write, gap


# ---- sub-steps as such


def test_substeps_are_interleaved_and_the_last_is_kept():
    a, b = torch.tensor([[1.0, 2.0]]), torch.tensor([[-1.0, -2.0]])
    assert weave([a, b]).tolist() == [[1, -1, 2, -2]]
    assert place(a, 3, 0).tolist() == [[1, 0, 0, 2, 0, 0]]
    assert place(a, 3, 2).tolist() == [[0, 0, 1, 0, 0, 2]]
    assert last(weave([a, b]), 2).tolist() == b.tolist()
    x = torch.randn(2, 4, 3, 5)
    assert torch.equal(last(place(x, 2, 1), 2), x)
    assert place(x[:, :0], 2, 1).shape == (2, 0, 3, 5)


# ---- gated_deltaproduct


def parts_of(mixer, x, gap):
    """q, keys and values per sub-step, betas, log decay and gate, from the definition and with shifts cut at gaps."""
    n, Hv, taps = mixer.substeps, mixer.value_heads, mixer.conv_weight.shape[1]
    inputs, gate = mixer.project(x).split([mixer.channels, Hv * Dv], -1)
    mixed = torch.zeros_like(inputs)
    for row in range(ROWS):
        for t in range(x.shape[1]):
            for back in range(taps):
                if t - back < 0:
                    break
                mixed[row, t] += mixer.conv_weight[:, taps - 1 - back] * inputs[row, t - back]
                if gap[row, t - back] > 0:
                    break
    mixed = F.silu(mixed)
    q, *rest = mixed.split([H * Dk] * (n + 1) + [Hv * Dv] * n, -1)
    q = unit_length(q.unflatten(-1, (H, Dk))).repeat_interleave(Hv // H, 2) * Dk**-0.5
    ks = [unit_length(k.unflatten(-1, (H, Dk))).repeat_interleave(Hv // H, 2) for k in rest[:n]]
    vs = [v.unflatten(-1, (Hv, Dv)) for v in rest[n:]]
    raw = mixer.gates(x)
    betas = [mixer.beta_max * torch.sigmoid(raw[..., j * Hv : (j + 1) * Hv]) for j in range(n)]
    decay = -mixer.A_log.exp() * F.softplus(raw[..., n * Hv :] + mixer.dt_bias) + gap[..., None] * mixer.rate
    return q, ks, vs, betas, decay, gate.unflatten(-1, (Hv, Dv))


@pytest.mark.parametrize(
    "args", [{"substeps": 3, "value_heads": 4}, {"delta": False, "output_gate": "sigmoid"}], ids=str
)
def test_gated_deltaproduct_is_its_equations_written_out(args):
    mixer, x = product(**args), tokens(9)
    write, gap = some(9)
    q, ks, vs, betas, decay, gate = parts_of(mixer, x, gap)
    memory, reads = x.new_zeros(ROWS, mixer.value_heads, Dk, Dv), []
    for t in range(9):
        memory = memory * decay[:, t].exp()[..., None, None]
        for k, v, beta in zip(ks, vs, betas, strict=True):
            known = torch.einsum("rhkv,rhk->rhv", memory, k[:, t]) if mixer.delta else 0
            error = (beta[:, t] * write[:, t, None])[..., None] * (v[:, t] - known)
            memory = memory + torch.einsum("rhk,rhv->rhkv", k[:, t], error)
        reads.append(torch.einsum("rhkv,rhk->rhv", memory, q[:, t]))
    opened = torch.sigmoid(gate) if "output_gate" in args else F.silu(gate)
    y, state = mixer(x, write=write, gap=gap)
    assert_close(y, mixer.output((mixer.norm(torch.stack(reads, 1)) * opened).flatten(-2)), **EXACT)
    assert_close(state.memory, memory, **EXACT)


@pytest.mark.parametrize("args", [{}, {"decay": "none"}, {"delta": False, "value_heads": 4, "beta_max": 1}], ids=str)
def test_one_substep_is_gated_deltanet(args):
    args = {"heads": H, "key_dim": Dk, "value_dim": Dv, "beta_max": 2, **args}
    torch.manual_seed(4)
    plain = GatedDeltaNet(WIDTH, **args).double()
    torch.manual_seed(4)
    mixer = product(substeps=1, **args)
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, mixer.get_parameter(name)), f"one seed gives another {name}"
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    mixer.load_state_dict(plain.state_dict())
    write, gap = some()
    given = {"write": write, "gap": gap, "lengths": torch.tensor([0, 9, TOKENS])}
    x, before = tokens(), plain(tokens())[1]
    want, end = plain(x, before, **given)
    got, state = mixer(x, before, **given)
    assert_close(got[1, :9], want[1, :9], rtol=1e-13, atol=1e-13)
    assert_close(got[2], want[2], rtol=1e-13, atol=1e-13)
    checks.assert_states_close(state, end, rtol=1e-13, atol=1e-13)
    assert mixer.state_bytes() == plain.state_bytes()


def test_two_substeps_are_twice_the_tokens_of_which_the_first_decays_and_the_second_is_read():
    mixer, x = product(), tokens()
    gap = torch.zeros(ROWS, TOKENS, dtype=torch.float64)
    q, (k1, k2), (v1, v2), (b1, b2), decay, gate = parts_of(mixer, x, gap)
    q, k, v = (torch.stack(pair, 2).flatten(1, 2) for pair in ((q, q), (k1, k2), (v1, v2)))
    beta, decay = (torch.stack(pair, 2).flatten(1, 2) for pair in ((b1, b2), (decay, torch.zeros_like(decay))))
    read, memory, _ = reference(q, k, v, log_decay=decay, beta=beta)
    y, state = mixer(x)
    assert_close(y, mixer.output((mixer.norm(read[:, 1::2]) * F.silu(gate)).flatten(-2)), **EXACT)
    assert_close(state.memory, memory, **EXACT)
    assert state.conv.shape == (ROWS, 3, H * Dk + 2 * H * Dk + 2 * H * Dv)


@pytest.mark.parametrize(
    "args",
    [
        {"substeps": 1},
        {"substeps": 3, "value_heads": 4},
        {"beta_max": 1.0, "output_gate": "sigmoid", "conv": 1},
        {"norm_before_gate": False, "conv": 2, "decay": "none"},
        {"delta": False, "decay_init": "paper", "value_dim": None},
    ],
    ids=str,
)
def test_cutting_changes_nothing_under_the_options_of_gated_deltaproduct(args):
    checks.check_streaming(product(**args), tokens(), **EXACT)


@pytest.mark.parametrize("init", ["paper", "shared", "horizon", "horizon_a"])
def test_gated_deltaproduct_starts_with_the_decays_of_gated_deltanet(init):
    torch.manual_seed(3)
    plain = build("gated_deltanet", WIDTH, {"heads": 4, "decay_init": init})
    torch.manual_seed(3)
    mixer = build("gated_deltaproduct", WIDTH, {"heads": 4, "decay_init": init})
    for name in ("A_log", "dt_bias", "rate_log"):
        assert torch.equal(mixer.get_parameter(name), plain.get_parameter(name)), name


# ---- rwkv7


def parts_of_rwkv(mixer, x, gap):
    """r, w, kap, p, k~, v and the output gate, from the definition."""
    before = F.pad(x, (0, 0, 1, 0))[:, :-1] * (gap == 0)[..., None]
    s = dict(zip("rwkvag", (x + mix * (before - x) for mix in mixer.mix), strict=True))
    r, k = (
        F.linear(s[n], layer.weight).view(*x.shape[:2], H, Dk)
        for n, layer in (("r", mixer.receptance), ("k", mixer.key))
    )
    v = F.linear(s["v"], mixer.value.weight).view(*x.shape[:2], H, Dv)
    low_w = torch.tanh(s["w"] @ mixer.lora_w.down.weight.T) @ mixer.lora_w.up.weight.T + mixer.lora_w.bias
    low_a = s["a"] @ mixer.lora_a.down.weight.T @ mixer.lora_a.up.weight.T + mixer.lora_a.bias
    w = torch.exp(-math.exp(-0.5) * torch.sigmoid(low_w)).view_as(k)
    a = torch.sigmoid(low_a).view_as(k)
    kap = k * mixer.k_k / ((k * mixer.k_k).square().sum(-1, keepdim=True) + 1e-6).sqrt()
    gate = torch.sigmoid(s["g"] @ mixer.lora_g.down.weight.T) @ mixer.lora_g.up.weight.T
    return r, w, kap, kap * a, k * (1 + (a - 1) * mixer.k_a), v, gate


def finished(mixer, read, r, written, v, gate):
    """Output of what was read: norm per head, bonus, gate, projection."""
    centred = read - read.mean(-1, keepdim=True)
    normed = (
        centred / (centred.square().mean(-1, keepdim=True) + 1e-5 * Dv).sqrt() * mixer.norm.weight + mixer.norm.bias
    )
    bonus = (r * written * mixer.r_k).sum(-1, keepdim=True) * v
    return mixer.output((normed + bonus).flatten(-2) * gate)


def test_rwkv7_is_its_equations_written_out():
    mixer, x = rwkv(), tokens(11)
    write, gap = some(11)
    r, w, kap, p, written, v, gate = parts_of_rwkv(mixer, x, gap)
    memory, reads = x.new_zeros(ROWS, H, Dk, Dv), []
    for t in range(11):
        old = memory * torch.exp(gap[:, t, None, None] * mixer.rate)[..., None]
        removed = torch.einsum("rhk,rhv->rhkv", p[:, t], torch.einsum("rhkv,rhk->rhv", old, kap[:, t]))
        added = torch.einsum("rhk,rhv->rhkv", written[:, t], v[:, t])
        memory = w[:, t, ..., None] * old + write[:, t, None, None, None] * (added - removed)
        reads.append(torch.einsum("rhkv,rhk->rhv", memory, r[:, t]))
    y, state = mixer(x, write=write, gap=gap)
    assert_close(y, finished(mixer, torch.stack(reads, 1), r, written, v, gate), **EXACT)
    assert_close(state.memory, memory, **EXACT)


def test_rwkv7_that_removes_nothing_is_gated_linear_attention():
    mixer, x = rwkv(), tokens()
    with torch.no_grad():
        mixer.lora_a.bias.fill_(-1e4)
    r, w, _, p, written, v, gate = parts_of_rwkv(mixer, x, torch.zeros(ROWS, TOKENS, dtype=torch.float64))
    assert not p.any()
    ones = x.new_ones(ROWS, TOKENS, H)
    read, memory = gated_delta_rule(r, written, v, log_decay=w.log(), beta=ones, delta=False)
    y, state = mixer(x)
    assert_close(y, finished(mixer, read, r, written, v, gate), **EXACT)
    assert_close(state.memory, memory, **EXACT)


@pytest.mark.parametrize("bias", [-1e4, -100.0, -34.5, -12.0, 0.0, 40.0])
def test_gradients_of_rwkv7_stay_exact_however_little_is_removed(bias):
    wide = rwkv()
    with torch.no_grad():
        wide.lora_a.bias.copy_(bias + torch.linspace(-2, 2, H * Dk))
    narrow = RWKV7(WIDTH, heads=H, key_dim=Dk, value_dim=Dv)
    narrow.load_state_dict(wide.state_dict())
    wide.load_state_dict(narrow.state_dict())  # the same numbers, rounded once
    x, weight = tokens(dtype=torch.float32), tokens(dtype=torch.float32)
    for mixer in (wide, narrow):
        dtype = mixer.mix.dtype
        (mixer(x.to(dtype))[0] * weight.to(dtype)).sum().backward()
    for name, parameter in narrow.named_parameters():
        if name == "rate_log":
            continue  # no gap, no gradient
        want = wide.get_parameter(name).grad
        # What only a moves may have next to no gradient; no more noise is wanted there than beside it.
        scale = (wide.lora_w.bias if name.startswith(("lora_a", "k_a")) else wide.get_parameter(name)).grad.abs().max()
        assert (parameter.grad - want).abs().max() <= 1e-4 * scale, name


def test_the_shift_is_each_rows_own_last_token_and_a_gap_parts_the_tokens():
    mixer, x = rwkv(), tokens()
    lengths = torch.tensor([0, 4, TOKENS])
    before = mixer(tokens())[1]
    _, state = mixer(x, before, lengths=lengths)
    assert torch.equal(state.shift, torch.stack([before.shift[0], x[1, 3], x[2, -1]]))
    _, skipped = mixer(x, before, write=torch.zeros(ROWS, TOKENS))
    assert torch.equal(skipped.shift, x[:, -1]), "a skipped write moves the shift on"
    tail_alone = before._replace(memory=torch.zeros_like(before.memory))
    gap = torch.zeros(ROWS, TOKENS)
    assert not torch.allclose(mixer(x, tail_alone, gap=gap)[0][:, 0], mixer(x)[0][:, 0])
    gap[:, 0] = 0.25
    assert_close(mixer(x, tail_alone, gap=gap)[0], mixer(x)[0], **EXACT)


@pytest.mark.parametrize(
    "args", [{"lora_rank": 3}, {"heads": 1, "value_dim": None}, {"decay_init": "paper"}, {"horizon": (1, 1)}], ids=str
)
def test_cutting_changes_nothing_under_the_options_of_rwkv7(args):
    checks.check_streaming(rwkv(**args), tokens(), **EXACT)


def kept_of_nothing(mixer):
    """What a token of zeros leaves of the memory: its decay is what the biases say."""
    zeros = torch.zeros(1, 1, WIDTH, dtype=mixer.mix.dtype)
    start = mixer.initial_state(1)
    return mixer(zeros, start._replace(memory=torch.ones_like(start.memory)))[1].memory[0, ..., 0]


@pytest.mark.parametrize("init", ["horizon", "horizon_a"])
def test_horizons_of_rwkv7_are_drawn_within_their_range_and_over_all_of_it(init):
    mixer = RWKV7(WIDTH, heads=8, key_dim=64, value_dim=1, decay_init=init).double()
    tau = -1 / kept_of_nothing(mixer).log()
    assert_close(tau, -1 / mixer.rate, rtol=1e-4, atol=0)
    assert 3.99 < tau.min() < 5
    assert 800 < tau.max() < 1025
    assert abs(tau.log2().mean() - 6) < 0.4


def test_rwkv7_forgets_no_faster_than_it_can():
    fastest = RWKV7(WIDTH, heads=2, key_dim=4, horizon=(0.5, 0.5)).double()
    tau = -1 / kept_of_nothing(fastest).log()
    assert_close(tau, torch.full_like(tau, math.exp(0.5) / 0.95), rtol=1e-5, atol=0)


@pytest.mark.parametrize("init", ["paper", "shared"])
def test_the_published_spread_of_rwkv7_runs_from_slow_to_fast_channels(init):
    mixer = RWKV7(WIDTH, heads=2, key_dim=16, decay_init=init).double()
    tau = (-1 / kept_of_nothing(mixer).log()).flatten()
    assert (tau.diff() < 0).all()
    assert_close(tau[[0, -1]], math.exp(0.5) * (1 + torch.tensor([6.5, 1.5]).double().exp()), rtol=1e-5, atol=0)
    assert_close(tau, -1 / mixer.rate.flatten(), rtol=1e-5, atol=0)


def test_the_rank_of_rwkv7_follows_the_width():
    assert RWKV7(128, key_dim=4).lora_w.down.weight.shape == (16, 128)
    assert RWKV7(129, key_dim=4).lora_g.down.weight.shape == (32, 129)
    assert RWKV7(129, key_dim=4, lora_rank=5).lora_a.up.weight.shape == (8, 5)


def test_all_vectors_of_rwkv7_are_spared_from_weight_decay():
    free = {name for name, p in rwkv().named_parameters() if getattr(p, "no_weight_decay", False)}
    vectors = {"mix", "k_k", "k_a", "r_k", "rate_log", "lora_w.bias", "lora_a.bias", "norm.weight", "norm.bias"}
    assert free == vectors


# ---- both


@pytest.mark.parametrize("make", [product, rwkv])
def test_triton_gives_what_torch_gives(make, monkeypatch):
    mixer, x = make(torch.float32), tokens(5, torch.float32)
    write, gap = (part.float() for part in some(5))
    given = {"write": write, "gap": gap, "lengths": torch.tensor([1, 5, 4])}
    before = mixer(tokens(3, torch.float32))[1]
    monkeypatch.setenv("TSGDN_KERNEL", "torch")
    want, end = mixer(x, before, **given)
    monkeypatch.setenv("TSGDN_KERNEL", "triton")
    got, state = mixer(x, before, **given)
    for row, n in enumerate(given["lengths"]):
        assert_close(got[row, :n], want[row, :n], rtol=1e-4, atol=1e-5)
    checks.assert_states_close(state, end, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "args", "text"),
    [
        ("gated_deltaproduct", {"substeps": 0}, "substeps is 0; expected at least 1"),
        ("gated_deltaproduct", {"value_heads": 3}, "value_heads 3 is not a multiple of heads 2"),
        ("gated_deltaproduct", {"beta_max": 3}, "beta_max is 3; expected 1, or 2"),
        ("gated_deltaproduct", {"decay": "channel"}, "decay 'channel'"),
        ("gated_deltaproduct", {"output_gate": "relu"}, "output_gate 'relu'"),
        ("gated_deltaproduct", {"substep": 2}, "did you mean 'substeps'"),
        ("rwkv7", {"lora_rank": 0}, "lora_rank 0; expected all at least 1"),
        ("rwkv7", {"heads": 0}, "heads 0,"),
        ("rwkv7", {"decay_init": "long"}, "decay_init is 'long'"),
        ("rwkv7", {"horizon": (9, 3)}, "horizon is"),
        ("rwkv7", {"conv": 4}, "no argument 'conv'"),
    ],
)
def test_a_wrong_argument_is_refused_in_one_line(name, args, text):
    with pytest.raises(ValueError, match=text) as error:
        build(name, WIDTH, args)
    assert "\n" not in str(error.value)
