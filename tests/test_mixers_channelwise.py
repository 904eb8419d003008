"""Kimi Delta Attention and Gated DeltaNet-2: equations, reductions, horizons, growth of the memory, options, errors."""

import math

import pytest
import torch
import torch.nn.functional as F
from sizes import small_args
from torch.testing import assert_close

from tsgdn import checks
from tsgdn.kernels import gated_delta_rule, unit_length
from tsgdn.mixers import build
from tsgdn.mixers.layers import draws
from tsgdn.mixers.memory import draw_channel_decay, draw_decay

WIDTH, ROWS, TOKENS = 12, 3, 37
NAMES = ("kda", "gated_deltanet2")
EXACT = {"rtol": 1e-12, "atol": 1e-12}
OPTIONS = (
    {"value_heads": 4},
    {"beta_max": 2.0, "output_gate": "silu"},
    {"output_gate": "sigmoid", "conv": 2},
    {"norm_before_gate": False, "value_dim": None},
    {"decay_init": "paper", "conv": 1},
)


def small(name, dtype=torch.float64, **args):
    return build(name, WIDTH, small_args(name, **args)).to(dtype)


def tokens(n=TOKENS, dtype=torch.float64):
    return torch.randn(ROWS, n, WIDTH, dtype=dtype)


def events(n=TOKENS):
    """Partial writes and silences."""
    write = torch.rand(ROWS, n, dtype=torch.float64).round(decimals=1)
    return {"write": write, "gap": torch.where(torch.rand(ROWS, n) < 0.2, 7 * torch.rand(ROWS, n), 0.0).double()}


def loosen(mixer):
    """Moves every parameter a little, so that none is left out of a comparison by being zero or one."""
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return mixer


# ---- the equations


def written_out(mixer, x, *, write, gap):
    """Outputs and memory, token by token and head by head, from the definition."""
    H, Hv, Dk, Dv = mixer.heads, mixer.value_heads, mixer.key_dim, mixer.value_dim
    W = mixer.conv_weight
    projected, raw = x @ mixer.project.weight.T, x @ mixer.gates.weight.T
    inputs, gate = projected[..., : mixer.channels], projected[..., mixer.channels :]
    low = raw[..., -Dv:] @ mixer.decay_up.weight.T
    if hasattr(mixer, "gate_up"):
        gate = gate @ mixer.gate_up.weight.T + mixer.gate_bias
    opened = torch.sigmoid(gate) if mixer.activation == "sigmoid" else gate * torch.sigmoid(gate)
    outputs, memories = [], []
    for row in range(x.shape[0]):
        seen, memory, lines = [], torch.zeros(Hv, Dk, Dv, dtype=x.dtype), []
        for n in range(x.shape[1]):
            silent, strength = gap[row, n], torch.sigmoid(raw[row, n]) * write[row, n]
            seen = [inputs[row, n]] if silent > 0 else [*seen, inputs[row, n]]
            mixed = sum(W[:, -1 - j] * seen[-1 - j] for j in range(min(W.shape[1], len(seen))))
            q, k, v = (mixed * torch.sigmoid(mixed)).split([H * Dk, H * Dk, Hv * Dv])
            line = []
            for h in range(Hv):
                group, keys, values = h * H // Hv, slice(h * Dk, (h + 1) * Dk), slice(h * Dv, (h + 1) * Dv)
                query, key = (unit_length(z.view(H, Dk)[group]) for z in (q, k))
                dt = torch.log1p(torch.exp(low[row, n, keys] + mixer.dt_bias[h]))
                log_decay = -mixer.A_log[h].exp() * dt - silent * mixer.rate_log[h].exp()
                if hasattr(mixer, "gate_up"):
                    erase = wrote = mixer.beta_max * strength[h]
                else:
                    erase, wrote = mixer.beta_max * strength[: Hv * Dk][keys], strength[Hv * Dk : -Dv][values]
                faded = log_decay.exp()[:, None] * memory[h]
                memory = memory.clone()
                memory[h] = faded + torch.outer(key, wrote * v[values] - faded.T @ (erase * key))
                read = memory[h].T @ query / math.sqrt(Dk)
                if not mixer.norm_before_gate:
                    read = read * opened[row, n, values]
                read = read / torch.sqrt(read.square().mean() + 1e-5) * mixer.norm.weight
                line.append(read * opened[row, n, values] if mixer.norm_before_gate else read)
            lines.append(mixer.output.weight @ torch.cat(line))
        outputs.append(torch.stack(lines))
        memories.append(memory)
    return torch.stack(outputs), torch.stack(memories)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("args", [{}, *OPTIONS], ids=str)
def test_the_mixer_is_its_equations_written_out(name, args):
    mixer, x = loosen(small(name, **args)), tokens(n=7)
    given = events(7)
    with torch.no_grad():
        y, state = mixer(x, **given)
        want, memory = written_out(mixer, x, **given)
    assert_close(y, want, **EXACT)
    assert_close(state.memory, memory, **EXACT)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("args", OPTIONS, ids=str)
def test_cutting_changes_nothing_under_the_options(name, args):
    mixer, x = loosen(small(name, **args)), tokens()
    checks.check_streaming(mixer, x, cuts=((7, 0, 1),), **EXACT)
    given = events()
    whole, end = mixer(x, **given)
    head, state = mixer(x[:, :11], **{key: part[:, :11] for key, part in given.items()})
    tail, state = mixer(x[:, 11:], state, **{key: part[:, 11:] for key, part in given.items()})
    assert_close(torch.cat([head, tail], 1), whole, **EXACT)
    checks.assert_states_close(state, end, **EXACT)


# ---- reductions


def same_decay_in_every_channel(kda):
    """Makes the decay and the rate of silence of each head one number; returns the row of the way up that is left."""
    with torch.no_grad():
        each = kda.decay_up.weight[:: kda.key_dim].clone()
        kda.decay_up.weight.copy_(each.repeat_interleave(kda.key_dim, 0))
        for parameter in (kda.dt_bias, kda.rate_log):
            parameter.copy_(parameter[:, :1].clone().expand_as(parameter))
    return each


@pytest.mark.parametrize("beta_max", [1, 2])
def test_kda_with_one_decay_per_head_is_gated_deltanet(beta_max):
    kda = loosen(small("kda", value_heads=4, beta_max=beta_max))
    up = same_decay_in_every_channel(kda)
    gdn = small("gated_deltanet", value_heads=4, beta_max=beta_max, output_gate="sigmoid")
    Hv, Dv = 4, kda.value_dim
    with torch.no_grad():
        kda.gate_bias.zero_()
        to_gate = kda.gate_up.weight @ kda.project.weight[kda.channels :]
        gdn.load_state_dict(
            {
                "project.weight": torch.cat([kda.project.weight[: kda.channels], to_gate]),
                "conv_weight": kda.conv_weight,
                "output.weight": kda.output.weight,
                "norm.weight": kda.norm.weight,
                "gates.weight": torch.cat([kda.gates.weight[:Hv], up @ kda.gates.weight[-Dv:]]),
                "A_log": kda.A_log,
                "dt_bias": kda.dt_bias[:, 0],
                "rate_log": kda.rate_log[:, 0],
            }
        )
    x, given = tokens(), events()
    y, state = kda(x, **given)
    want, end = gdn(x, **given)
    assert_close(y, want, **EXACT)
    checks.assert_states_close(state, end, **EXACT)


def test_gated_deltanet2_that_erases_and_writes_every_channel_alike_is_kda():
    kda, gdn2 = loosen(small("kda", value_heads=4)), small("gated_deltanet2", value_heads=4, output_gate="sigmoid")
    Hv, Dk, Dv = 4, kda.key_dim, kda.value_dim
    with torch.no_grad():
        kda.gate_bias.zero_()
        to_gate = kda.gate_up.weight @ kda.project.weight[kda.channels :]
        beta = kda.gates.weight[:Hv]
        alike = [beta.repeat_interleave(Dk, 0), beta.repeat_interleave(Dv, 0), kda.gates.weight[Hv:]]
        shared = {key: value for key, value in kda.state_dict().items() if key in gdn2.state_dict()}
        gdn2.load_state_dict(
            {
                **shared,
                "project.weight": torch.cat([kda.project.weight[: kda.channels], to_gate]),
                "gates.weight": torch.cat(alike),
            }
        )
    x, given = tokens(), events()
    y, state = kda(x, **given)
    same, end = gdn2(x, **given)
    assert_close(same, y, **EXACT)
    checks.assert_states_close(end, state, **EXACT)


def test_beta_max_two_erases_more_and_writes_no_more_in_gated_deltanet2(monkeypatch):
    seen = {}

    def spy(*tensors, **arguments):
        seen.update(arguments)
        return gated_delta_rule(*tensors, **arguments)

    monkeypatch.setattr("tsgdn.mixers.kda.gated_delta_rule", spy)
    for name, erases, writes in (("kda", None, 2), ("gated_deltanet2", 2, 1)):
        loosen(small(name, beta_max=2))(tokens())
        assert writes - 0.7 < seen["beta"].max() < writes, name
        assert (seen["erase"] is None) if erases is None else 1 < seen["erase"].max() < erases, name


# ---- decay


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_strong_decay_stays_finite_and_leaves_the_other_channels_alone(name, dtype):
    mixer, x = small(name, dtype), tokens(dtype=dtype)
    with torch.no_grad():
        mixer.dt_bias[:, ::2] = 50.0  # A is 1: at every token these keep exp(-50)
        mixer.dt_bias[:, 1::2] = -50.0
    y, state = mixer(x)
    y.square().sum().backward()
    assert y.isfinite().all()
    for key, parameter in mixer.named_parameters():
        if parameter.grad is not None:
            assert parameter.grad.isfinite().all(), key
    with torch.no_grad():
        _, after = mixer(x[:, :1], state, write=torch.zeros(ROWS, 1))
    assert after.memory[:, :, ::2].abs().max() < 1e-15
    assert_close(after.memory[:, :, 1::2], state.memory[:, :, 1::2].detach())
    checks.check_streaming(mixer, x, cuts=((7, 0, 1),), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_silence_fades_each_channel_at_its_own_rate(name):
    mixer, x = small(name), tokens(n=1)
    _, before = mixer(tokens())
    nothing = torch.zeros(ROWS, 1)
    _, near = mixer(x, before, write=nothing)
    _, far = mixer(x, before, write=nothing, gap=torch.full((ROWS, 1), 2.5))
    assert mixer.rate.unique().numel() == mixer.value_heads * mixer.key_dim
    assert_close(far.memory, near.memory * torch.exp(2.5 * mixer.rate)[..., None], **EXACT)


@pytest.mark.parametrize("init", ["horizon", "horizon_a"])
@pytest.mark.parametrize("name", NAMES)
def test_the_horizons_of_one_head_cover_their_range(name, init):
    mixer = build(name, WIDTH, {"heads": 8, "key_dim": 64, "horizon": (4, 1024), "decay_init": init})
    log_decay = (-mixer.A_log.exp()[:, None] * F.softplus(mixer.dt_bias)).detach()
    tau = -1 / log_decay
    assert_close(mixer.rate, log_decay, rtol=1e-3, atol=1e-8)
    assert tau.min() > 3.99
    assert tau.max() < 1025
    octaves = tau.log2().sort(-1).values  # 8 octaves, 64 channels
    assert_close(octaves.diff(dim=-1), torch.full((8, 63), 1 / 8), rtol=0, atol=1e-3)
    if init == "horizon":
        assert mixer.A_log.min() > 0, "a long horizon could not be cut short by the input"


@pytest.mark.parametrize("init", ["paper", "shared", "horizon", "horizon_a"])
def test_channel_zero_decays_as_the_same_head_of_the_other_mixers(init):
    one, other = (torch.Generator().manual_seed(5) for _ in range(2))
    a_log, dt_bias, rate_log = draw_channel_decay(6, 9, one, init, (4, 1024))
    head = draw_decay(6, other, init, (4, 1024))
    assert_close(rate_log[:, 0], head[2], rtol=1e-6, atol=1e-6)
    assert_close(a_log, head[0])
    assert_close(dt_bias[:, 0], head[1], rtol=1e-6, atol=1e-6)
    dt = F.softplus(dt_bias.double())
    assert_close(a_log.double()[:, None] + dt.log(), rate_log.double(), rtol=1e-4, atol=1e-4)
    if init in ("paper", "shared"):
        assert dt.min() > 0.99e-3
        assert dt.max() < 1.01e-1
    assert torch.equal(torch.rand(3, generator=one), torch.rand(3, generator=other)), "the weights would differ"


def test_a_mixer_draws_its_decay_first():
    torch.manual_seed(4)
    want = draw_channel_decay(2, 8, draws(), "horizon", (4.0, 1024.0))
    for name in NAMES:
        torch.manual_seed(4)
        mixer = small(name, torch.float32)
        assert all(torch.equal(a, b) for a, b in zip((mixer.A_log, mixer.dt_bias, mixer.rate_log), want, strict=True))


# ---- growth of the memory


def growth(mixer, blocks=10, block=1000):
    """Log of the size of the memory after each block of random tokens."""
    state, sizes = None, []
    with torch.no_grad():
        for _ in range(blocks):
            _, state = mixer(torch.randn(1, block, WIDTH), state)
            sizes.append(float(state.memory.norm().log()))
    return sizes


@pytest.mark.parametrize("sharpness", [1, 8])
@pytest.mark.parametrize("name", NAMES)
def test_the_memory_of_a_long_random_stream_that_hardly_forgets_does_not_grow(name, sharpness, record_property):
    mixer = build(name, WIDTH, {"heads": 2, "key_dim": 8, "horizon": (1e6, 1e6)})
    with torch.no_grad():
        mixer.gates.weight[: -mixer.value_dim] *= sharpness  # 8: most strengths are near 0 or 1
    sizes = growth(mixer)
    record_property("log of the memory per 1000 tokens", sizes)
    assert all(map(math.isfinite, sizes))
    assert max(sizes[1:]) < sizes[0] + 1, sizes
    assert max(sizes) < 4, sizes


def alternating(erase, n=200):
    """Log of the growth per token of a memory under two keys that take turns and write nothing."""
    small_part, large = (1 / 6) ** 0.5, (5 / 6) ** 0.5
    keys = torch.tensor([[small_part, large], [large, small_part]], dtype=torch.float64)
    k = keys.repeat(n // 2, 1)[None, :, None]
    nothing = torch.zeros(1, n, 1, 1, dtype=torch.float64)
    _, end = gated_delta_rule(
        k,
        k,
        nothing,
        log_decay=torch.zeros(1, n, 1, 2, dtype=torch.float64),
        beta=nothing,
        erase=erase.repeat(n // 2, 1)[None, :, None],
        state=torch.tensor([[[[1.0], [-1.0]]]], dtype=torch.float64),
    )
    return float(end.norm().log()) / n


def test_keys_that_erase_by_one_channel_alone_can_make_the_memory_grow_and_those_that_erase_by_all_cannot():
    by_the_small_channel = torch.eye(2, dtype=torch.float64)
    assert abs(alternating(by_the_small_channel) - math.log(5**0.5 / 2)) < 0.01
    assert alternating(torch.full((2, 2), 0.5, dtype=torch.float64)) < 0


# ---- sizes, numbers, errors


@pytest.mark.parametrize("name", NAMES)
def test_the_state_is_as_large_as_that_of_gated_deltanet(name):
    assert small(name, value_heads=4).state_bytes() == small("gated_deltanet", value_heads=4).state_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_under_autocast_the_memory_sees_gates_in_float32(name, monkeypatch):
    seen = {}

    def spy(*tensors, **arguments):
        seen.update(arguments)
        return gated_delta_rule(*tensors, **arguments)

    monkeypatch.setattr("tsgdn.mixers.kda.gated_delta_rule", spy)
    mixer, x = small(name, torch.float32), tokens(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, _ = mixer(x, gap=torch.ones(ROWS, TOKENS))
    assert y.dtype == torch.bfloat16
    assert seen["readout"].gate.dtype == torch.bfloat16
    assert {seen[key].dtype for key in ("log_decay", "beta")} == {torch.float32}


def kernels_apart(mixer, monkeypatch, *, rows, n, cut, device="cpu"):
    """Relative errors of the Triton kernels against the torch path: outputs, end state, gradients of parameters."""
    pytest.importorskip("triton")
    x, write = torch.randn(rows, n, WIDTH, device=device), torch.rand(rows, n, device=device)
    gap = torch.zeros(rows, n, device=device)
    gap[:, 1] = 2.5
    lengths = torch.full((rows,), n - cut, device=device)
    got = {}
    for kernel in ("torch", "triton"):
        monkeypatch.setenv("TSGDN_KERNEL", kernel)
        mixer.zero_grad()
        first, state = mixer(x[:, :cut], write=write[:, :cut], gap=gap[:, :cut])
        last, end = mixer(x[:, cut:], state, write=write[:, cut:], gap=gap[:, cut:], lengths=lengths)
        (first.square().sum() + last.square().sum() + end.memory.square().sum()).backward()
        got[kernel] = {"y": torch.cat([first, last], 1), "memory": end.memory, "conv": end.conv}
        got[kernel] |= {key: parameter.grad for key, parameter in mixer.named_parameters()}
    return {key: float(((got["triton"][key] - x).norm() / x.norm()).detach()) for key, x in got["torch"].items()}


@pytest.mark.skipif(torch.cuda.is_available(), reason="the test below compiles them")
@pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning")  # on purpose; numpy interprets it
@pytest.mark.parametrize("name", NAMES)
def test_the_kernels_of_triton_and_of_torch_agree(name, monkeypatch):
    errors = kernels_apart(small(name, torch.float32, heads=1), monkeypatch, rows=1, n=3, cut=2)
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_the_kernels_of_triton_and_of_torch_agree_on_the_gpu(name, monkeypatch):
    for cut in (40, 69):  # the rest is a chunk, or one token
        mixer = small(name, torch.float32, value_heads=4).cuda()
        errors = kernels_apart(mixer, monkeypatch, rows=3, n=70, cut=cut, device="cuda")
        assert max(errors.values()) < 1e-4, errors


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ({"value_heads": 3}, "value_heads 3 is not a multiple of heads 2"),
        ({"output_gate": "tanh"}, "output_gate is 'tanh'; expected silu or sigmoid"),
        ({"beta_max": 3}, "beta_max is 3; expected 1, or 2"),
        ({"decay_init": "long"}, "decay_init is 'long'; expected one of paper, shared, horizon"),
        ({"horizon": (10, 2)}, r"horizon is \(10, 2\); expected"),
        ({"delta": False}, "no argument 'delta'"),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", NAMES)
def test_what_a_mixer_cannot_be_is_refused_in_one_line(name, args, text):
    with pytest.raises(ValueError, match=text) as error:
        build(name, WIDTH, args)
    assert "\n" not in str(error.value)
