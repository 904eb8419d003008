"""Laws, reductions and options of the mixers along time and of the one among variates."""

import pytest
import torch
import torch.nn.functional as F
from sizes import small_args
from torch.testing import assert_close

from tsgdn import checks
from tsgdn.kernels import gated_delta_rule, ssd, unit_length
from tsgdn.mixers import MIXERS, GatedDeltaNet, Mamba2, VariateMixer, build
from tsgdn.mixers.layers import RMSNorm, SwiGLU
from tsgdn.mixers.registry import arguments
from tsgdn.streamable import fork, map_state, same_sizes, state_bytes, state_leaves

WIDTH, ROWS, TOKENS = 12, 3, 37
NAMES = tuple(MIXERS)
WITH_MEMORY = tuple(n for n in NAMES if hasattr(build(n, WIDTH, small_args(n)).initial_state(1), "memory"))
NEVER_FADES = ("deltanet", "gated_attention")
"""Silence takes nothing from these, by definition."""


@pytest.fixture(autouse=True)
def one_thread_and_seed():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def small(name, dtype=torch.float64, **args):
    return build(name, WIDTH, small_args(name, **args)).to(dtype)


def tokens(dtype=torch.float64, n=TOKENS, rows=ROWS):
    return torch.randn(rows, n, WIDTH, dtype=dtype)


# ---- the laws


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, {"rtol": 1e-12, "atol": 1e-12}), (torch.float32, {"rtol": 1e-5, "atol": 1e-5})],
)
def test_cutting_the_stream_changes_nothing(name, dtype, tolerance):
    mixer = small(name, dtype)
    checks.check_streaming(mixer, tokens(dtype, n=41), **tolerance)
    checks.check_step(mixer, tokens(dtype, n=5), **tolerance)


@pytest.mark.parametrize(
    "args",
    [
        {"value_heads": 4},
        {"beta_max": 2.0, "output_gate": "sigmoid"},
        {"norm_before_gate": False, "conv": 2},
        {"decay_init": "paper"},
    ],
    ids=str,
)
def test_cutting_the_stream_changes_nothing_under_the_options_of_gated_deltanet(args):
    checks.check_streaming(small("gated_deltanet", **args), tokens(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_cutting_changes_nothing_with_gaps_and_skipped_writes(name):
    mixer = small(name)
    x, write = tokens(), torch.rand(ROWS, TOKENS, dtype=torch.float64).round(decimals=1)
    gap = torch.where(torch.rand(ROWS, TOKENS) < 0.2, 7 * torch.rand(ROWS, TOKENS), 0.0).double()
    whole, end = mixer(x, write=write, gap=gap)
    for size in (1, 2, 5):
        outputs, state = [], None
        for piece, w, g in zip(x.split(size, 1), write.split(size, 1), gap.split(size, 1), strict=True):
            y, state = mixer(piece, state, write=w, gap=g)
            outputs.append(y)
        assert_close(torch.cat(outputs, 1), whole, rtol=1e-12, atol=1e-12)
        checks.assert_states_close(state, end, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_the_other_laws_hold(name):
    mixer, x = small(name), tokens()
    checks.check_causal(mixer, x)
    checks.check_causal(small(name, torch.float32), x.float())
    checks.check_state_is_a_value(mixer, x)
    checks.check_rows_independent(mixer, x, rtol=1e-12, atol=1e-12)
    checks.check_reset(mixer, x)
    checks.check_snapshot(mixer, x)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_flow_through_the_state(name):
    checks.check_gradients_streaming(small(name), tokens(n=20), cut=3, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_parameter_gradients_of_a_cut_stream_equal_those_of_the_whole(name):
    mixer, x = small(name), tokens(n=20)
    gap = torch.zeros(ROWS, 20, dtype=torch.float64)
    gap[:, 11] = 2.5
    weight = torch.randn_like(x)
    (mixer(x, gap=gap)[0] * weight).sum().backward()
    want = {key: p.grad.clone() for key, p in mixer.named_parameters()}
    mixer.zero_grad()
    head, state = mixer(x[:, :9], gap=gap[:, :9])
    tail, _ = mixer(x[:, 9:], state, gap=gap[:, 9:])
    (torch.cat([head, tail], 1) * weight).sum().backward()
    for key, parameter in mixer.named_parameters():
        assert want[key].abs().max() > 0, f"{key} is not learned"
        assert_close(parameter.grad, want[key], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", NAMES)
def test_zeros_are_the_same_as_nothing_and_no_tokens_change_nothing(name):
    mixer, x = small(name), tokens()
    zeros = mixer.initial_state(ROWS)
    assert torch.equal(mixer(x, zeros)[0], mixer(x)[0])
    _, state = mixer(x)
    y, same = mixer(x[:, :0], state)
    assert y.shape == (ROWS, 0, WIDTH)
    for (leaf, a), (_, b) in zip(state_leaves(same), state_leaves(state), strict=True):
        assert torch.equal(a, b), leaf
    y, nothing = mixer(x[:, :0])
    for (leaf, a), (_, b) in zip(state_leaves(nothing), state_leaves(zeros), strict=True):
        assert a.shape == b.shape, leaf
        assert a.dtype == b.dtype, leaf
        assert torch.equal(a, b), leaf


@pytest.mark.parametrize("name", NAMES)
def test_ten_thousand_random_steps_stay_finite(name):
    init = {"decay_init": "paper"} if "decay_init" in arguments(name) else {}
    mixer = build(name, WIDTH, small_args(name, **init))
    state, x = None, torch.randn(1, 2000, WIDTH)
    with torch.no_grad():
        for _ in range(5):
            y, state = mixer(x.roll(1, 1), state)
    for leaf, values in state_leaves(state):
        assert values.isfinite().all(), leaf
        assert values.abs().max() <= 1e4, leaf
    assert y.isfinite().all()


# ---- padding, skipped writes, silence


@pytest.mark.parametrize("name", NAMES)
def test_padding_touches_no_leaf_of_the_state(name):
    mixer, x = small(name), tokens()
    _, before = mixer(tokens())
    lengths = torch.tensor([0, 5, TOKENS])
    gap = torch.zeros(ROWS, TOKENS, dtype=torch.float64)
    gap[:, 5:] = 3.0
    write = torch.ones_like(gap)
    other = x.clone()
    other[0], other[1, 5:] = torch.randn(TOKENS, WIDTH), torch.randn(TOKENS - 5, WIDTH)
    y, state = mixer(x, before, lengths=lengths, gap=gap, write=write)
    z, again = mixer(other, before, lengths=lengths, gap=2 * gap, write=write)
    before, state = same_sizes(before, state)
    for (leaf, a), (_, b), (_, start) in zip(*map(state_leaves, (state, again, before)), strict=True):
        assert torch.equal(a[:2], b[:2]), f"{leaf} depends on padding"
        assert torch.equal(a[0], start[0]), f"{leaf} of a row without tokens changed"
    assert torch.equal(y[1, :5], z[1, :5])


@pytest.mark.parametrize("name", NAMES)
def test_padded_rows_equal_unpadded_ones(name):
    mixer, x = small(name), tokens()
    _, before = mixer(tokens(n=6))
    gap = torch.zeros(ROWS, TOKENS, dtype=torch.float64)
    gap[:, 2] = 4.0
    lengths = torch.tensor([2, 3, 20])
    y, state = mixer(x, before, lengths=lengths, gap=gap)
    for row, n in enumerate(lengths.tolist()):
        start = map_state(lambda leaf, row=row: leaf[row : row + 1], before)
        alone, end = mixer(x[row : row + 1, :n], start, gap=gap[row : row + 1, :n])
        assert_close(y[row : row + 1, :n], alone, rtol=1e-12, atol=1e-12)
        checks.assert_states_close(
            map_state(lambda leaf, row=row: leaf[row : row + 1], state), end, rtol=1e-12, atol=1e-12
        )


def with_memory(mixer, memory):
    """The state that holds this memory and has seen nothing else."""
    return mixer.initial_state(ROWS)._replace(memory=memory)


@pytest.mark.parametrize("name", WITH_MEMORY)
def test_a_skipped_write_leaves_the_decayed_memory(name):
    """What is kept of each entry does not depend on the entries; and it is less than all of it."""
    mixer, x = small(name), tokens(n=8)
    none, memory = torch.zeros(ROWS, 8), torch.randn_like(mixer.initial_state(ROWS).memory)

    def after(memory):
        return mixer(x, with_memory(mixer, memory), write=none)[1].memory

    kept = after(torch.ones_like(memory))
    assert_close(after(memory), memory * kept, rtol=1e-11, atol=1e-13)
    assert kept.min() > 0
    assert kept.max() <= 1 if name == "deltanet" else kept.max() < 1
    if isinstance(mixer, GatedDeltaNet | Mamba2):
        assert_close(kept, decay_of(mixer, x).sum(1).exp()[..., None, None].expand_as(kept), rtol=1e-11, atol=0)


@pytest.mark.parametrize("name", [name for name in WITH_MEMORY if "conv" in small(name).initial_state(1)._fields])
def test_the_tails_move_on_when_a_write_is_skipped(name):
    mixer, x = small(name), tokens(n=8)
    _, before = mixer(tokens())
    assert torch.equal(mixer(x, before, write=torch.zeros(ROWS, 8))[1].conv, mixer(x, before)[1].conv)


def decay_of(mixer, x):
    """Log decay per token and head, from the definition."""
    if isinstance(mixer, GatedDeltaNet):
        if mixer.decay == "none":
            return x.new_zeros(*x.shape[:2], mixer.value_heads)
        raw = mixer.gates(x)[..., mixer.value_heads :]
    else:
        raw = mixer.gates(x)
    return -mixer.A_log.exp() * F.softplus(raw + mixer.dt_bias)


@pytest.mark.parametrize("name", WITH_MEMORY)
def test_silences_add_up(name):
    """The memory after gap a + b is that after gap b, had it already faded by a."""
    mixer, x = small(name), tokens(n=1)
    _, before = mixer(tokens())

    def after(memory, gap, **skip):
        start = before._replace(memory=memory)
        return mixer(x, start, gap=torch.full((ROWS, 1), gap, dtype=torch.float64), **skip)[1].memory

    def faded(gap):
        none, ones = {"write": torch.zeros(ROWS, 1)}, torch.ones_like(before.memory)
        zeros = torch.zeros_like(ones)  # what a tail may still bring in
        whole = after(ones, 1e-12, **none) - after(zeros, 1e-12, **none)
        return (after(ones, gap, **none) - after(zeros, gap, **none)) / whole

    assert_close(faded(2.5) * faded(3.5), faded(6.0), rtol=1e-9, atol=0)
    assert (faded(2.5) == 1).all() if name in NEVER_FADES else (faded(2.5) < 1).all()
    assert_close(after(before.memory, 6.0), after(before.memory * faded(2.5), 3.5), rtol=1e-8, atol=1e-12)


def test_silences_of_the_gru_add_up():
    mixer, x = small("gru"), tokens(n=1)
    _, before = mixer(tokens())

    def after(state, gap):
        return mixer(x, state, gap=torch.full((ROWS, 1), gap, dtype=torch.float64))[1]

    faded = before._replace(hidden=before.hidden * torch.exp(2.5 * mixer.rate))
    checks.assert_states_close(after(before, 6.0), after(faded, 3.5), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", NAMES)
def test_no_silence_changes_nothing(name):
    mixer, x = small(name), tokens(n=5)
    _, before = mixer(tokens())
    assert torch.equal(mixer(x, before, gap=torch.zeros(ROWS, 5))[0], mixer(x, before)[0])


@pytest.mark.parametrize("name", [name for name in NAMES if name not in (*NEVER_FADES, "ham", "oryx")])
def test_an_endless_silence_begins_the_stream_anew(name):
    """Tails are cleared and memories have faded. The cache of HAM and the plan of Oryx outlast any silence.

    The angle of Mamba-3 stands still: what it stores is the same in turned coordinates.
    """
    mixer, x = small(name), tokens(n=5)
    _, before = mixer(tokens())
    broken = torch.zeros(ROWS, 5)
    broken[:, 3] = 1e9
    y, state = mixer(x, before, gap=broken)
    want, end = mixer(x[:, 3:])
    assert_close(y[:, 3:], want, rtol=1e-12, atol=1e-12)
    if name != "mamba3":
        checks.assert_states_close(state, end, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in WITH_MEMORY if "conv" in small(name).initial_state(1)._fields])
def test_silence_clears_the_tails(name):
    mixer, x = small(name), tokens(n=5)
    _, before = mixer(tokens())
    broken = torch.zeros(ROWS, 5)
    broken[:, 3] = 0.5
    _, state = mixer(x, before, gap=broken)
    assert torch.equal(state.conv[:, 0], torch.zeros_like(state.conv[:, 0]))
    assert state.conv[:, 1:].abs().min() > 0


def test_a_gap_never_enters_the_write_of_mamba2():
    mixer, x = small("mamba2"), tokens(n=1)
    _, near = mixer(x)
    _, far = mixer(x, gap=torch.full((ROWS, 1), 100.0))
    assert_close(far.memory, near.memory, rtol=0, atol=0)


# ---- sizes


@pytest.mark.parametrize("name", NAMES)
def test_the_byte_formula_is_what_the_state_measures(name):
    mixer = small(name, torch.float32)
    _, state = mixer(tokens(torch.float32))
    assert state_bytes(state) == mixer.state_bytes(TOKENS)
    assert state_bytes(mixer.initial_state(1)) == mixer.state_bytes() == mixer.state_bytes(0)
    assert not any(leaf.dtype in (torch.bfloat16, torch.float16) for _, leaf in state_leaves(state))


def test_only_full_attention_grows_with_the_stream():
    assert [name for name in NAMES if small(name).state_bytes(10**6) != small(name).state_bytes(0)] == [
        "gated_attention"
    ]


def test_the_controls_are_matched():
    def parameters(name):
        return sum(p.numel() for p in small(name).parameters())

    assert parameters("gated_linear") == parameters("gated_deltanet")
    assert small("gated_linear").state_bytes() == small("gated_deltanet").state_bytes()
    assert small("mamba2_heads").state_bytes() == small("gated_deltanet").state_bytes()


# ---- reductions


def test_deltanet_is_gated_deltanet_without_forgetting():
    plain, gated = small("deltanet"), small("gated_deltanet")
    weights = gated.state_dict()
    weights.update({key: value for key, value in plain.state_dict().items() if key != "gates.weight"})
    weights["gates.weight"] = torch.cat([plain.gates.weight, torch.randn_like(plain.gates.weight)])
    weights["A_log"] = torch.full_like(gated.A_log, -800.0)
    gated.load_state_dict(weights)
    x = tokens()
    y, state = plain(x)
    z, same = gated(x)
    assert_close(z, y, rtol=1e-13, atol=1e-13)
    checks.assert_states_close(same, state, rtol=1e-13, atol=1e-13)


def test_gated_linear_and_gated_deltanet_differ_by_the_correction_alone():
    torch.manual_seed(1)
    delta = small("gated_deltanet")
    torch.manual_seed(1)
    linear = small("gated_linear")
    x = tokens(n=2)
    assert_close(linear(x[:, :1])[0], delta(x[:, :1])[0], rtol=0, atol=0)  # nothing stored yet: nothing to correct
    assert not torch.allclose(linear(x)[0], delta(x)[0])


def test_without_the_delta_rule_the_kernel_is_mamba2s_scan():
    H, N, Dk, Dv = 3, 21, 4, 5
    x, B, C = (torch.randn(ROWS, N, H, d, dtype=torch.float64) for d in (Dv, Dk, Dk))
    dt, A = torch.rand(ROWS, N, H, dtype=torch.float64), -torch.rand(H, dtype=torch.float64)
    start = torch.randn(ROWS, H, Dk, Dv, dtype=torch.float64)
    y, state = ssd(x, dt, A, B, C, state=start)
    z, same = gated_delta_rule(C, B, x, log_decay=A * dt, beta=dt, delta=False, state=start)
    assert_close(z, y, rtol=1e-12, atol=1e-12)
    assert_close(same, state, rtol=1e-12, atol=1e-12)


def test_gated_deltanet_is_its_equations_written_out():
    mixer, x = small("gated_deltanet", value_heads=4), tokens(n=7)
    H, Hv, Dk, Dv = 2, 4, 8, 5
    inputs, gate = mixer.project(x).split([mixer.channels, Hv * Dv], -1)
    padded = F.pad(inputs.transpose(1, 2), (3, 0))
    mixed = F.silu(F.conv1d(padded, mixer.conv_weight[:, None], groups=mixer.channels)).transpose(1, 2)
    q, k, v = mixed.split([H * Dk, H * Dk, Hv * Dv], -1)
    q, k = (unit_length(z.unflatten(-1, (H, Dk))).repeat_interleave(2, 2) for z in (q, k))
    v, beta, decay = v.unflatten(-1, (Hv, Dv)), torch.sigmoid(mixer.gates(x)[..., :Hv]), decay_of(mixer, x).exp()
    memory, reads = torch.zeros(ROWS, Hv, Dk, Dv, dtype=x.dtype), []
    for n in range(7):
        memory = memory * decay[:, n, :, None, None]
        error = v[:, n] - torch.einsum("rhkv,rhk->rhv", memory, k[:, n])
        memory = memory + torch.einsum("rhk,rhv->rhkv", k[:, n], beta[:, n, :, None] * error)
        reads.append(torch.einsum("rhkv,rhk->rhv", memory, q[:, n]) * Dk**-0.5)
    read = mixer.norm(torch.stack(reads, 1)) * F.silu(gate).unflatten(-1, (Hv, Dv))
    y, state = mixer(x)
    assert_close(y, mixer.output(read.flatten(-2)), rtol=1e-12, atol=1e-12)
    assert_close(state.memory, memory, rtol=1e-12, atol=1e-12)


def test_mamba2_is_its_equations_written_out():
    mixer, x = small("mamba2"), tokens(n=7)
    H, Dk, Dv = 2, 8, 5
    inputs, gate = mixer.project(x).split([mixer.channels, H * Dv], -1)
    padded = F.pad(inputs.transpose(1, 2), (3, 0))
    mixed = F.conv1d(padded, mixer.conv_weight[:, None], mixer.conv_bias, groups=mixer.channels).transpose(1, 2)
    values, key, query = F.silu(mixed).split([H * Dv, Dk, Dk], -1)
    values = values.unflatten(-1, (H, Dv))
    dt = F.softplus(mixer.gates(x) + mixer.dt_bias)
    memory, reads = torch.zeros(ROWS, H, Dk, Dv, dtype=x.dtype), []
    for n in range(7):
        write = torch.einsum("rk,rhv->rhkv", key[:, n], dt[:, n, :, None] * values[:, n])
        memory = memory * torch.exp(-dt[:, n] * mixer.A_log.exp())[..., None, None] + write
        reads.append(torch.einsum("rhkv,rk->rhv", memory, query[:, n]) + mixer.D[:, None] * values[:, n])
    read = torch.stack(reads, 1).flatten(-2) * F.silu(gate)
    read = read / (read.square().mean(-1, keepdim=True) + 1e-5).sqrt() * mixer.norm.weight
    y, state = mixer(x)
    assert_close(y, mixer.output(read), rtol=1e-12, atol=1e-12)
    assert_close(state.memory, memory, rtol=1e-12, atol=1e-12)


def test_gru_is_torchs():
    mixer, x = small("gru"), tokens()
    theirs = torch.nn.GRU(WIDTH, 10, batch_first=True, dtype=torch.float64)
    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        getattr(theirs, f"{name}_l0").data.copy_(getattr(mixer, name))
    hidden, last = theirs(x)
    y, state = mixer(x)
    assert_close(y, mixer.output(hidden), rtol=1e-12, atol=1e-12)
    assert_close(state.hidden, last[0], rtol=1e-12, atol=1e-12)


# ---- initial values


def test_every_mixer_takes_one_number_from_the_global_generator():
    after = {}
    for name in NAMES:
        torch.manual_seed(3)
        small(name)
        after[name] = float(torch.rand(()))
    assert len(set(after.values())) == 1, f"the next layer would draw differently: {after}"


PER_HEAD = tuple(
    name
    for name in NAMES
    if hasattr(small(name), "rate_log") and small(name).rate_log.shape == (small_args(name).get("heads"),)
)


@pytest.mark.parametrize("init", ["paper", "shared", "horizon", "horizon_a"])
def test_one_seed_gives_every_mixer_the_same_decay(init):
    rates = {}
    for name in PER_HEAD:
        torch.manual_seed(3)
        rates[name] = build(name, WIDTH, small_args(name, heads=4, decay_init=init)).rate
    assert len(rates) > 4
    for name, rate in rates.items():
        if init != "paper" or "mamba" not in name:  # the paper of Mamba-2 draws A from 1 on
            assert_close(
                rate, rates["gated_deltanet"], rtol=1e-6, atol=0, msg=lambda text, name=name: f"{name}: {text}"
            )


@pytest.mark.parametrize("init", ["horizon", "horizon_a"])
@pytest.mark.parametrize("name", ["gated_deltanet", "gated_linear", "mamba2", "mamba2_heads"])
def test_horizons_are_drawn_within_their_range_and_over_all_of_it(name, init):
    mixer = build(name, WIDTH, {"heads": 256, "key_dim": 2, "horizon": (4, 1024), "decay_init": init})
    log_decay = -mixer.A_log.exp() * F.softplus(mixer.dt_bias)
    tau = -1 / log_decay.detach()
    assert_close(mixer.rate, log_decay, rtol=1e-3, atol=1e-8)
    assert tau.min() > 3.9
    assert tau.max() < 1030
    assert tau.min() < 6
    assert tau.max() > 700
    assert abs(tau.log2().mean() - 6) < 0.5


def test_a_write_of_mamba2_starts_as_strong_under_a_long_horizon():
    mixer = build("mamba2", WIDTH, {"heads": 64, "key_dim": 2, "horizon": (1000, 1000)})
    dt = F.softplus(mixer.dt_bias)
    assert dt.min() > 0.9e-3
    assert dt.max() > 2e-2


def test_gates_norms_and_skips_are_marked_against_weight_decay():
    for name in NAMES:
        mixer = small(name)
        free = {key for key, p in mixer.named_parameters() if getattr(p, "no_weight_decay", False)}
        wanted = {"A_log", "dt_bias", "D", "rate_log", "norm.weight"} & dict(mixer.named_parameters()).keys()
        assert free >= wanted, name
        assert all(dict(mixer.named_parameters())[key].dim() <= 2 for key in free), name
    assert "D" in dict(small("mamba2").named_parameters())


def test_scale_output_divides_the_last_weights_by_the_root_of_twice_the_depth():
    for part in (*(small(name) for name in NAMES), VariateMixer(WIDTH)):
        before = part.output.weight.clone()
        part.scale_output(8)
        assert_close(part.output.weight, before / 4)


# ---- numbers


@pytest.mark.parametrize("name", NAMES)
def test_under_autocast_the_state_stays_wide_and_the_result_near(name):
    mixer, x = small(name, torch.float32), tokens(torch.float32)
    want, exact = mixer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, state = mixer(x)
        again, _ = mixer(x[:, 5:], mixer(x[:, :5])[1])
    assert all(a.dtype == b.dtype for (_, a), (_, b) in zip(state_leaves(state), state_leaves(exact), strict=True))
    assert (got.float() - want).norm() < 0.03 * want.norm()
    assert (again.float() - got[:, 5:].float()).norm() < 0.01 * got.float().norm()
    checks.assert_states_close(state, exact, rtol=0.1, atol=0.05)


def test_negative_eigenvalues_are_open_with_beta_max_two(monkeypatch):
    seen = {}

    def spy(*tensors, **arguments):
        seen.update(arguments)
        return gated_delta_rule(*tensors, **arguments)

    monkeypatch.setattr("tsgdn.mixers.gated_deltanet.gated_delta_rule", spy)
    small("gated_deltanet", beta_max=2.0)(tokens())
    assert 1 < seen["beta"].max() < 2


def test_rms_norm_equals_torchs_and_groups_are_normalised_apart():
    x = torch.randn(4, 12)
    assert_close(RMSNorm(12)(x), F.rms_norm(x, (12,), eps=1e-5))
    assert_close(RMSNorm(12, groups=3)(x).unflatten(-1, (3, 4)), F.rms_norm(x.unflatten(-1, (3, 4)), (4,), eps=1e-5))


def test_the_gated_mlp_drops_out_only_while_training():
    mlp, x = SwiGLU(WIDTH, 24, dropout=0.5), torch.randn(3, 4, WIDTH)
    assert not torch.equal(mlp(x), mlp(x))
    mlp.eval()
    gate, up = (x @ mlp.up.weight.T).chunk(2, -1)
    assert_close(mlp(x), (F.silu(gate) * up) @ mlp.down.weight.T)


# ---- names


@pytest.mark.parametrize(
    ("name", "args", "text"),
    [
        ("gated_deltnet", {}, "did you mean 'gated_deltanet'"),
        ("gated_deltanet", {"head": 2}, "no argument 'head', did you mean 'heads'"),
        ("gated_linear", {"delta": True}, "fixes delta=False"),
        ("gru", {"width": 3}, "no argument 'width'"),
        ("mamba2", {"decay_init": "long"}, "expected one of paper, shared, horizon"),
        ("gated_deltanet", {"horizon": (10, 2)}, "horizon is"),
        ("gated_deltanet", {"value_heads": 3}, "not a multiple"),
    ],
)
def test_a_wrong_name_or_argument_is_refused_in_one_line(name, args, text):
    with pytest.raises(ValueError, match=text) as error:
        build(name, WIDTH, args)
    assert "\n" not in str(error.value)


# ---- among variates


@pytest.mark.parametrize("full_up_to", [32, 3])
def test_permuting_the_variates_permutes_the_outputs(full_up_to):
    mixer, x = VariateMixer(WIDTH, full_up_to=full_up_to, latents=4).double(), torch.randn(2, 7, 5, WIDTH).double()
    present = torch.rand(2, 7, 5) < 0.6
    order = torch.randperm(7)
    y = mixer(x, present=present)
    assert_close(mixer(x[:, order], present=present[:, order]), y[:, order], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("full_up_to", [32, 3])
def test_a_token_sees_its_own_time_index_and_present_variates_only(full_up_to):
    mixer, x = VariateMixer(WIDTH, full_up_to=full_up_to, latents=4).double(), torch.randn(2, 7, 5, WIDTH).double()
    y = mixer(x)
    later = x.clone()
    later[:, :, 3:] = torch.randn(2, 7, 2, WIDTH)
    assert torch.equal(mixer(later)[:, :, :3], y[:, :, :3])
    present = torch.ones(2, 7, 5, dtype=torch.bool)
    present[:, 4], present[:, :, 1] = False, False
    other = x.clone()
    other[:, 4] = torch.randn(2, 5, WIDTH)
    y, z = mixer(x, present=present), mixer(other, present=present)
    keep = torch.arange(7) != 4
    assert_close(z[:, keep], y[:, keep], rtol=1e-12, atol=1e-12)
    assert torch.equal(y[:, :, 1], torch.zeros_like(y[:, :, 1])), "no variate is present: nothing to add"
    gone = mixer(x[:, keep], present=present[:, keep])
    assert_close(y[:, keep], gone, rtol=1e-12, atol=1e-12)


def test_full_attention_among_variates_is_softmax_attention():
    mixer, x = VariateMixer(WIDTH, heads=1).double(), torch.randn(2, 4, 3, WIDTH).double()
    q, k, v = (part.transpose(1, 2) for part in mixer.project(x).chunk(3, -1))
    weights = torch.softmax(q @ k.transpose(-1, -2) / WIDTH**0.5, -1)
    assert_close(mixer(x), mixer.output((weights @ v).transpose(1, 2)), rtol=1e-12, atol=1e-12)


def test_a_single_variate_is_left_alone_and_many_learn_their_latents():
    mixer = VariateMixer(WIDTH, full_up_to=3, latents=4)
    x = torch.randn(2, 1, 5, WIDTH)
    assert torch.equal(mixer(x), torch.zeros_like(x))
    mixer(torch.randn(2, 6, 5, WIDTH)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in mixer.parameters())


def test_a_state_may_be_forked_and_both_continue_alike():
    mixer: Mamba2 = small("mamba2")
    _, state = mixer(tokens())
    x = tokens(n=4)
    assert torch.equal(mixer(x, fork(state))[0], mixer(x, state)[0])
