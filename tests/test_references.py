"""Mixers and ops beside public implementations of the same papers, on copied weights.

The packages are the extra `reference`; each test skips where its package is absent. The foreign code computes in
float32, ours here in float64, so the bound is the foreign rounding. Every foreign parameter is drawn anew first: gains
of one and biases of zero would hide a mistake.

transformers and xlstm run their torch code, fla and mamba-ssm their Triton kernels, interpreted on the CPU like ours
(see conftest.py).
"""

import importlib
import importlib.util
import os
import sys
import types

import pytest
import torch
from torch.testing import assert_close

from tsgdn.kernels import gated_delta_rule, ssd
from tsgdn.mixers import Mamba2, build

pytestmark = [
    pytest.mark.filterwarnings("ignore:Triton is not supported on current platform:UserWarning"),  # fla, on import
    pytest.mark.filterwarnings("ignore:According to Bo, you are using a potentially buggy FLA:UserWarning"),  # RWKV-7
]

WIDTH, ROWS, TOKENS = 12, 2, 21
HOW = "python -m pip install -e '.[reference]'"
ROUNDING = 1e-5


# ---- the foreign packages


def transformers(model):
    """The modelling and the configuration module of a model, with torch code only."""
    reason = f"compares with transformers 5.23 or later, which is not installed: {HOW}"
    pytest.importorskip("transformers", minversion="5.23", reason=reason)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("fla", "mamba_ssm", "causal_conv1d"):  # what it would call instead of its torch code
            patch.setitem(sys.modules, name, None)
        parts = (f"transformers.models.{model}.{part}_{model}" for part in ("modeling", "configuration"))
        return tuple(map(importlib.import_module, parts))


def redrawn(module):
    """The module with parameters near what training gives, and without a gradient of its own."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.normal_(0.0, 0.5)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1.0)
            elif name.endswith("dt_bias"):
                parameter.sub_(2.0)  # a memory of several tokens
    return module.eval().requires_grad_(False)


def mixer(name, width=WIDTH, **args):
    """One of ours, in float64; `copied` fills it."""
    return build(name, width, args).double().requires_grad_(False)


def copied(ours, **values):
    """Fills every parameter of ours; dotted names with __. A parameter of silence has no counterpart."""
    given = {key.replace("__", "."): value for key, value in values.items()}
    silent = {name for name, _ in ours.named_parameters() if name.startswith("rate_log")}
    assert set(given) == {name for name, _ in ours.named_parameters()} - silent
    for name, value in given.items():
        target = ours.get_parameter(name)
        assert target.shape == value.shape, name
        target.copy_(value)
    return ours


def weights(*layers):
    return torch.cat([layer.weight for layer in layers])


def stream(width=WIDTH, n=TOKENS):
    return torch.randn(ROWS, n, width)


def assert_same(mine, other, what="outputs"):
    """Up to the rounding of float32, which is relative to the largest number among those that were summed."""
    assert mine.dtype == torch.float64
    assert_close(
        mine,
        other.double(),
        rtol=ROUNDING,
        atol=ROUNDING * other.abs().max().item(),
        msg=lambda text: f"{what}: {text}",
    )


def same_outputs_and_gradients(ours, theirs, x):
    """Both maps of the same tokens, and what a random loss gives back to the tokens."""
    weight = torch.randn_like(x)
    a, b = x.double().requires_grad_(), x.clone().requires_grad_()
    mine, other = ours(a)[0], theirs(b)
    assert_same(mine, other)
    (mine * weight).sum().backward()
    (other * weight).sum().backward()
    assert_same(a.grad, b.grad, "gradients")


def same_op(ours, theirs, inputs):
    """Outputs, end states and the gradients of all inputs; ours in float64."""
    a = [x.double().requires_grad_() for x in inputs]
    b = [x.clone().requires_grad_() for x in inputs]
    mine, other = ours(*a), theirs(*b)
    for what, x, y in zip(("outputs", "end state"), mine, other, strict=True):
        assert_same(x, y, what)
    toward = [torch.randn_like(x) for x in other]
    back = torch.autograd.grad(mine, a, [x.double() for x in toward])
    for i, (x, y) in enumerate(zip(back, torch.autograd.grad(other, b, toward), strict=True)):
        assert_same(x, y, f"gradient of input {i}")


# ---- transformers


@pytest.mark.parametrize("value_heads", [2, 4])
def test_gated_deltanet_is_that_of_qwen3_next(value_heads):
    modeling, configuration = transformers("qwen3_next")
    H, Hv, Dk, Dv = 2, value_heads, 6, 5
    theirs = redrawn(
        modeling.Qwen3NextGatedDeltaNet(
            configuration.Qwen3NextConfig(
                hidden_size=WIDTH,
                num_hidden_layers=1,
                layer_types=["linear_attention"],
                linear_num_key_heads=H,
                linear_num_value_heads=Hv,
                linear_key_head_dim=Dk,
                linear_value_head_dim=Dv,
                rms_norm_eps=1e-5,
            ),
            0,
        )
    )
    # Their projections are laid out by key head: q, k, then the values and gates of its group; b, then a.
    group = Hv // H * Dv
    q, k, v, z = theirs.in_proj_qkvz.weight.unflatten(0, (H, -1)).split([Dk, Dk, group, group], 1)
    b, a = theirs.in_proj_ba.weight.unflatten(0, (H, -1)).chunk(2, 1)
    ours = copied(
        mixer("gated_deltanet", heads=H, value_heads=Hv, key_dim=Dk, value_dim=Dv),
        project__weight=torch.cat([part.flatten(0, 1) for part in (q, k, v, z)]),
        gates__weight=torch.cat([part.flatten(0, 1) for part in (b, a)]),
        conv_weight=theirs.conv1d.weight[:, 0],
        A_log=theirs.A_log,
        dt_bias=theirs.dt_bias,
        norm__weight=theirs.norm.weight,
        output__weight=theirs.out_proj.weight,
    )
    same_outputs_and_gradients(ours, theirs, stream())


def test_gated_deltanet_with_beta_up_to_two_is_that_of_olmo_hybrid():
    modeling, configuration = transformers("olmo_hybrid")
    H, Dk, Dv = 2, 6, 5
    theirs = redrawn(
        modeling.OlmoHybridGatedDeltaNet(
            configuration.OlmoHybridConfig(
                hidden_size=WIDTH,
                num_hidden_layers=2,
                layer_types=["linear_attention", "full_attention"],
                num_attention_heads=2,
                linear_num_key_heads=H,
                linear_num_value_heads=H,
                linear_key_head_dim=Dk,
                linear_value_head_dim=Dv,
                linear_allow_neg_eigval=True,
            ),
            0,
        )
    )
    ours = copied(
        mixer("gated_deltanet", heads=H, key_dim=Dk, value_dim=Dv, beta_max=2),
        project__weight=weights(theirs.q_proj, theirs.k_proj, theirs.v_proj, theirs.g_proj),
        gates__weight=weights(theirs.b_proj, theirs.a_proj),
        conv_weight=theirs.conv1d.weight[:, 0],
        A_log=theirs.A_log,
        dt_bias=theirs.dt_bias,
        norm__weight=theirs.o_norm.weight,
        output__weight=theirs.o_proj.weight,
    )
    same_outputs_and_gradients(ours, theirs, stream())


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_mamba2_is_that_of_transformers(groups):
    modeling, configuration = transformers("mamba2")
    H, N, P = 4, 6, 5
    width = H * P // 2
    config = configuration.Mamba2Config(
        hidden_size=width,
        num_hidden_layers=1,
        num_heads=H,
        head_dim=P,
        state_size=N,
        n_groups=groups,
        expand=2,
        chunk_size=8,
        layer_norm_epsilon=1e-5,
    )
    theirs = redrawn(modeling.Mamba2Mixer(config, 0))
    gate, inputs, dt = theirs.in_proj.weight.split([H * P, H * P + 2 * groups * N, H])
    ours = copied(
        Mamba2(width, heads=H, key_dim=N, value_dim=P, groups=groups).double().requires_grad_(False),
        project__weight=torch.cat([inputs, gate]),
        gates__weight=dt,
        conv_weight=theirs.conv1d.weight[:, 0],
        conv_bias=theirs.conv1d.bias,
        A_log=theirs.A_log,
        dt_bias=theirs.dt_bias,
        D=theirs.D,
        norm__weight=theirs.norm.weight,
        output__weight=theirs.out_proj.weight,
    )
    same_outputs_and_gradients(ours, theirs, stream(width))


def test_the_scan_of_mamba2_with_a_state_is_that_of_transformers():
    scan = transformers("mamba2")[0].mamba2_chunk_scan
    H, G, N, P = 4, 2, 6, 5
    inputs = [
        torch.randn(ROWS, TOKENS, H, P),
        torch.rand(ROWS, TOKENS, H),
        -torch.rand(H),
        torch.randn(ROWS, TOKENS, G, N),
        torch.randn(ROWS, TOKENS, G, N),
        torch.randn(ROWS, H, N, P),
    ]

    def theirs(x, dt, A, B, C, state):
        y, end = scan(x, dt, A, B, C, 8, initial_states=state.mT, return_final_states=True)
        return y, end.mT

    same_op(lambda x, dt, A, B, C, state: ssd(x, dt, A, B, C, state=state), theirs, inputs)


def test_kda_is_that_of_kimi_linear():
    modeling, configuration = transformers("kimi_linear")
    H, D = 2, 6
    config = configuration.KimiLinearConfig(
        hidden_size=WIDTH,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
        linear_num_heads=H,
        linear_head_dim=D,
        rms_norm_eps=1e-5,
    )
    theirs = redrawn(modeling.KimiLinearDeltaAttention(config, 0))
    forget = theirs.forget_gate
    ours = copied(
        mixer("kda", heads=H, key_dim=D),
        project__weight=weights(theirs.q_proj, theirs.k_proj, theirs.v_proj, theirs.g_a_proj),
        gates__weight=weights(theirs.b_proj, forget.f_a_proj),
        decay_up__weight=forget.f_b_proj.weight,
        gate_up__weight=theirs.g_b_proj.weight,
        gate_bias=torch.zeros(H * D),  # theirs has none, as against fla's below
        conv_weight=theirs.conv1d.weight[:, 0],
        A_log=forget.A_log.flatten(),
        dt_bias=forget.dt_bias.view(H, D),
        norm__weight=theirs.o_norm.weight,
        output__weight=theirs.o_proj.weight,
    )
    same_outputs_and_gradients(ours, theirs, stream())


def test_gated_attention_is_that_of_qwen3_next():
    modeling, configuration = transformers("qwen3_next")
    H, kv, D = 4, 2, 16
    config = configuration.Qwen3NextConfig(
        hidden_size=WIDTH,
        num_hidden_layers=1,
        layer_types=["full_attention"],
        num_attention_heads=H,
        num_key_value_heads=kv,
        head_dim=D,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 50.0, "partial_rotary_factor": 0.25},
    )
    theirs = redrawn(modeling.Qwen3NextAttention(config, 0))
    q, gate = theirs.q_proj.weight.unflatten(0, (H, 2, D)).unbind(1)
    ours = copied(
        mixer("gated_attention", heads=H, kv_heads=kv, key_dim=D, rope=0.25, rope_base=50.0),
        project__weight=torch.cat(
            [q.flatten(0, 1), theirs.k_proj.weight, theirs.v_proj.weight, gate.flatten(0, 1)],
        ),
        q_norm__weight=theirs.q_norm.weight,
        k_norm__weight=theirs.k_norm.weight,
        output__weight=theirs.o_proj.weight,
    )
    x = stream()
    with_positions = attending(theirs, config, "create_causal_mask", modeling.Qwen3NextRotaryEmbedding(config))
    same_outputs_and_gradients(ours, with_positions, x)


@pytest.mark.parametrize("positions", [False, True])
def test_gated_attention_in_the_other_style_is_that_of_olmo_hybrid(positions):
    modeling, configuration = transformers("olmo_hybrid")
    H, kv, D = 4, 2, 6
    config = configuration.OlmoHybridConfig(
        hidden_size=H * D,
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
        num_attention_heads=H,
        num_key_value_heads=kv,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 50.0},
    )
    theirs = redrawn(modeling.OlmoHybridAttention(config, 1))
    rope = {"rope": 1.0, "rope_base": 50.0} if positions else {"rope": 0.0}
    ours = copied(
        mixer("gated_attention", H * D, style="olmo", heads=H, kv_heads=kv, key_dim=D, **rope),
        project__weight=weights(theirs.q_proj, theirs.k_proj, theirs.v_proj),
        q_norm__weight=theirs.q_norm.weight,
        k_norm__weight=theirs.k_norm.weight,
        output__weight=theirs.o_proj.weight,
    )
    turn = modeling.OlmoHybridRotaryEmbedding(config) if positions else None
    same_outputs_and_gradients(ours, attending(theirs, config, "create_causal_mask", turn), stream(H * D))


@pytest.mark.parametrize("window", [2, 5, TOKENS])
def test_sliding_window_attention_is_that_of_qwen3(window):
    modeling, configuration = transformers("qwen3")
    H, kv, D = 4, 2, 6
    config = configuration.Qwen3Config(
        hidden_size=WIDTH,
        num_hidden_layers=1,
        layer_types=["sliding_attention"],
        use_sliding_window=True,
        sliding_window=window,
        num_attention_heads=H,
        num_key_value_heads=kv,
        head_dim=D,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 50.0},
    )
    theirs = redrawn(modeling.Qwen3Attention(config, 0))
    ours = copied(
        mixer("sliding_window_attention", heads=H, kv_heads=kv, key_dim=D, window=window, rope_base=50.0),
        project__weight=weights(theirs.q_proj, theirs.k_proj, theirs.v_proj),
        q_norm__weight=theirs.q_norm.weight,
        k_norm__weight=theirs.k_norm.weight,
        output__weight=theirs.o_proj.weight,
    )
    turn = modeling.Qwen3RotaryEmbedding(config)
    same_outputs_and_gradients(ours, attending(theirs, config, "create_sliding_window_causal_mask", turn), stream())


def attending(theirs, config, mask, turn):
    """An attention layer of transformers as a map of tokens, with their mask and their positions."""
    masks = importlib.import_module("transformers.masking_utils")
    config._attn_implementation = "eager"

    def run(x):
        positions = None if turn is None else turn(x, torch.arange(x.shape[1])[None])
        masked = getattr(masks, mask)(config=config, inputs_embeds=x, attention_mask=None, past_key_values=None)
        return theirs(x, positions, masked)[0]

    return run


# ---- xlstm


def test_slstm_is_that_of_xlstm():
    pytest.importorskip("xlstm", reason=f"compares with xlstm, which is not installed: {HOW}")
    vanilla = importlib.import_module("xlstm.blocks.slstm.src.vanilla")
    H, each = 2, 5
    ours = mixer("slstm", heads=H, hidden=H * each)
    x = stream().double()
    # Theirs takes the tokens' share W x: gate by gate, in each gate head by head; ours is head by head.
    weight = torch.randn(4, H, each, WIDTH, dtype=torch.float64)
    bias = torch.randn(4, H, each, dtype=torch.float64)
    recurrent = torch.randn(H, 4 * each, each, dtype=torch.float64)
    read = torch.randn(WIDTH, H * each, dtype=torch.float64)
    copied(
        ours,
        weight_ih=weight.transpose(0, 1).flatten(0, 2),
        weight_hh=recurrent.transpose(1, 2),
        bias=bias.transpose(0, 1).flatten(),
        output__weight=read,
    )
    states, end, _ = vanilla.slstm_forward(
        (x @ weight.flatten(0, 2).T).transpose(0, 1),
        torch.zeros(4, ROWS, H * each, dtype=torch.float64),
        recurrent,
        bias.flatten(),
        vanilla.slstm_pointwise_function_registry["slstm"],
    )
    y, state = ours(x)
    assert_close(y, states[0, 1:].transpose(0, 1) @ read.T, rtol=1e-12, atol=1e-12)
    for mine, other in zip(state, end, strict=True):
        assert_close(mine, other, rtol=1e-12, atol=1e-12)


# ---- fla, its definitions of the ops


def fla(module):
    """A module of fla."""
    pytest.importorskip("triton", reason="fla needs triton, which is not installed")
    reason = f"compares with flash-linear-attention 0.6 or later, which is not installed: {HOW}"
    pytest.importorskip("fla", minversion="0.6", reason=reason)
    return importlib.import_module(f"fla.{module}")


def op_inputs(*sizes, H=2, Dk=6, Dv=5):
    """Random tensors by name: queries and keys, values, decays and strengths, and a memory to begin with."""
    shapes = {
        "q": (ROWS, TOKENS, H, Dk),
        "k": (ROWS, TOKENS, H, Dk),
        "v": (ROWS, TOKENS, H, Dv),
        "decay": (ROWS, TOKENS, H),
        "decays": (ROWS, TOKENS, H, Dk),
        "beta": (ROWS, TOKENS, H),
        "erase": (ROWS, TOKENS, H, Dk),
        "write": (ROWS, TOKENS, H, Dv),
        "state": (ROWS, H, Dk, Dv),
    }
    made = []
    for name in sizes:
        x = torch.randn(shapes[name])
        if name == "k":
            x = x / x.norm(dim=-1, keepdim=True)
        elif name.startswith("decay"):
            x = -x.exp() / 4
        elif name in ("beta", "erase", "write"):
            x = x.sigmoid()
        made.append(x)
    return made


def test_the_gated_delta_rule_is_that_of_fla():
    naive = fla("ops.gated_delta_rule.naive").naive_recurrent_gated_delta_rule
    same_op(
        lambda q, k, v, g, b, s: gated_delta_rule(q, k, v, log_decay=g, beta=b, state=s, scale=0.5),
        lambda q, k, v, g, b, s: naive(q, k, v, b, g, 0.5, s, True),
        op_inputs("q", "k", "v", "decay", "beta", "state"),
    )


def test_the_delta_rule_without_decay_is_that_of_fla():
    naive = fla("ops.delta_rule.naive").delta_rule_recurrence

    def theirs(q, k, v, b, s):
        o, end = naive(*(x.transpose(1, 2) for x in (q, k, v, b)), s)
        return o.transpose(1, 2), end

    same_op(
        lambda q, k, v, b, s: gated_delta_rule(
            q, k, v, log_decay=torch.zeros_like(b), beta=b, state=s, scale=q.shape[-1] ** -0.5
        ),
        theirs,
        op_inputs("q", "k", "v", "beta", "state"),
    )


def test_the_rule_without_delta_is_gated_linear_attention_of_fla():
    naive = fla("ops.simple_gla.naive").naive_recurrent_simple_gla
    same_op(
        lambda q, k, v, g, s: gated_delta_rule(
            q, k, v, log_decay=g, beta=torch.ones_like(g), delta=False, state=s, scale=0.5
        ),
        lambda q, k, v, g, s: naive(q, k, v, g, 0.5, s),
        op_inputs("q", "k", "v", "decay", "state"),
    )


def test_the_rule_with_a_decay_per_channel_is_that_of_fla():
    naive = fla("ops.kda.naive").naive_recurrent_kda
    q, k = op_inputs("q", "k")
    v, g, b, s = op_inputs("v", "decays", "beta", "state", H=4)  # two value heads per key head
    same_op(
        lambda q, k, v, g, b, s: gated_delta_rule(q, k, v, log_decay=g, beta=b, state=s, scale=0.5),
        lambda q, k, v, g, b, s: naive(q, k, v, g, b, 0.5, s, True),
        [q, k, v, g, b, s],
    )


def test_the_rule_with_erase_and_write_per_channel_is_that_of_fla():
    naive = fla("ops.gdn2.naive").naive_recurrent_gdn2
    same_op(
        lambda q, k, v, g, b, w, s: gated_delta_rule(q, k, v, log_decay=g, erase=b, beta=w, state=s, scale=0.5),
        lambda q, k, v, g, b, w, s: naive(q, k, v, g, b, w, 0.5, s, True),
        op_inputs("q", "k", "v", "decays", "erase", "write", "state"),
    )


# ---- fla, its layers


@pytest.fixture
def fla_layers(monkeypatch):
    """Layers of fla whose Triton kernels are interpreted."""
    if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("compares with kernels of fla that are interpreted, and here they would be compiled")
    layers = fla("layers")
    from triton.runtime.autotuner import Autotuner

    run = Autotuner.run

    def run_the_first(self, *args, **kwargs):  # there is no device to time the others on
        configs, self.configs = self.configs, self.configs[:1]
        try:
            return run(self, *args, **kwargs)
        finally:
            self.configs = configs

    monkeypatch.setattr(Autotuner, "run", run_the_first)
    return layers


def same_outputs(ours, theirs, x):
    """Few tokens suffice: their kernels are interpreted slowly."""
    with torch.no_grad():
        assert_same(ours(x.double())[0], theirs(x)[0])


def test_gated_deltanet_is_that_of_fla(fla_layers):
    theirs = redrawn(fla_layers.GatedDeltaNet(WIDTH, head_dim=6, num_heads=2, num_v_heads=4, expand_v=0.5))
    ours = copied(
        mixer("gated_deltanet", heads=2, value_heads=4, key_dim=6, value_dim=3),
        project__weight=weights(theirs.q_proj, theirs.k_proj, theirs.v_proj, theirs.g_proj),
        gates__weight=weights(theirs.b_proj, theirs.a_proj),
        conv_weight=weights(theirs.q_conv1d, theirs.k_conv1d, theirs.v_conv1d)[:, 0],
        A_log=theirs.A_log,
        dt_bias=theirs.dt_bias,
        norm__weight=theirs.o_norm.weight,
        output__weight=theirs.o_proj.weight,
    )
    same_outputs(ours, theirs, stream(n=9))


def test_deltanet_is_that_of_fla(fla_layers):
    theirs = redrawn(fla_layers.DeltaNet(hidden_size=WIDTH, num_heads=2, expand_v=0.5, use_gate=True))
    ours = copied(
        mixer("deltanet", heads=2, key_dim=6, value_dim=3),
        project__weight=weights(theirs.q_proj, theirs.k_proj, theirs.v_proj, theirs.g_proj),
        gates__weight=weights(theirs.b_proj),
        conv_weight=weights(theirs.q_conv1d, theirs.k_conv1d, theirs.v_conv1d)[:, 0],
        norm__weight=theirs.o_norm.weight,
        output__weight=theirs.o_proj.weight,
    )
    same_outputs(ours, theirs, stream(n=9))


@pytest.mark.parametrize("beta_max", [1, 2])
def test_kda_is_that_of_fla(fla_layers, beta_max):
    theirs = redrawn(
        fla_layers.KimiDeltaAttention(
            WIDTH, head_dim=6, num_heads=2, num_v_heads=4, expand_v=0.5, allow_neg_eigval=beta_max == 2
        )
    )
    ours = copied(
        mixer("kda", heads=2, value_heads=4, key_dim=6, value_dim=3, beta_max=beta_max),
        project__weight=weights(theirs.q_proj, theirs.k_proj, theirs.v_proj, theirs.g_proj[0]),
        gates__weight=weights(theirs.b_proj, theirs.f_proj[0]),
        decay_up__weight=theirs.f_proj[1].weight,
        gate_up__weight=theirs.g_proj[1].weight,
        gate_bias=theirs.g_proj[1].bias,
        conv_weight=weights(theirs.q_conv1d, theirs.k_conv1d, theirs.v_conv1d)[:, 0],
        A_log=theirs.A_log,
        dt_bias=theirs.dt_bias.view(4, 6),
        norm__weight=theirs.o_norm.weight,
        output__weight=theirs.o_proj.weight,
    )
    same_outputs(ours, theirs, stream(n=9))


@pytest.mark.parametrize("beta_max", [1, 2])
def test_gated_deltanet2_is_that_of_fla_but_for_its_output_gate(fla_layers, beta_max):
    """Theirs is sigmoid of a low-rank map with a bias, ours SiLU of a full one: a full map can stand for theirs."""
    theirs = redrawn(
        fla_layers.GatedDeltaNet2(WIDTH, head_dim=6, num_heads=2, expand_v=0.5, allow_neg_eigval=beta_max == 2)
    )
    theirs.g_proj[1].bias.zero_()
    ours = copied(
        mixer("gated_deltanet2", heads=2, key_dim=6, value_dim=3, beta_max=beta_max, output_gate="sigmoid"),
        project__weight=torch.cat(
            [weights(theirs.q_proj, theirs.k_proj, theirs.v_proj), theirs.g_proj[1].weight @ theirs.g_proj[0].weight]
        ),
        gates__weight=weights(theirs.b_proj, theirs.w_proj, theirs.f_proj[0]),
        decay_up__weight=theirs.f_proj[1].weight,
        conv_weight=weights(theirs.q_conv1d, theirs.k_conv1d, theirs.v_conv1d)[:, 0],
        A_log=theirs.A_log,
        dt_bias=theirs.dt_bias.view(2, 6),
        norm__weight=theirs.o_norm.weight,
        output__weight=theirs.o_proj.weight,
    )
    same_outputs(ours, theirs, stream(n=9))


@pytest.mark.parametrize("substeps", [1, 3])
def test_gated_deltaproduct_is_that_of_fla(fla_layers, substeps):
    theirs = redrawn(
        fla_layers.GatedDeltaProduct(
            WIDTH, head_dim=6, num_heads=2, num_v_heads=4, expand_v=0.5, num_householder=substeps
        )
    )
    ours = copied(
        mixer("gated_deltaproduct", substeps=substeps, heads=2, value_heads=4, key_dim=6, value_dim=3),
        project__weight=weights(theirs.q_proj, theirs.k_proj, theirs.v_proj, theirs.g_proj),
        gates__weight=weights(theirs.b_proj, theirs.a_proj),
        conv_weight=weights(theirs.q_conv1d, theirs.k_conv1d, theirs.v_conv1d)[:, 0],
        A_log=theirs.A_log,
        dt_bias=theirs.dt_bias,
        norm__weight=theirs.o_norm.weight,
        output__weight=theirs.o_proj.weight,
    )
    same_outputs(ours, theirs, stream(n=9))


def test_rwkv7_is_that_of_fla(fla_layers):
    H, D, rank = 2, 6, 4
    theirs = redrawn(
        fla_layers.RWKV7Attention(
            hidden_size=H * D,
            head_dim=D,
            decay_low_rank_dim=rank,
            a_low_rank_dim=rank,
            gate_low_rank_dim=rank,
            layer_idx=0,  # the first layer's values are mixed with nothing
            num_hidden_layers=2,
        )
    )
    w, a, g = theirs.w_lora.lora, theirs.a_lora.lora, theirs.g_lora.lora
    ours = copied(
        mixer("rwkv7", H * D, heads=H, key_dim=D, lora_rank=rank),
        mix=torch.cat([theirs.x_r, theirs.x_w, theirs.x_k, theirs.x_v, theirs.x_a, theirs.x_g])[:, 0],
        receptance__weight=theirs.r_proj.weight,
        key__weight=theirs.k_proj.weight,
        value__weight=theirs.v_proj.weight,
        output__weight=theirs.o_proj.weight,
        lora_w__down__weight=w[0].weight,
        lora_w__up__weight=w[2].weight,
        lora_w__bias=w[2].bias,
        lora_a__down__weight=a[0].weight,
        lora_a__up__weight=a[2].weight,
        lora_a__bias=a[2].bias,
        lora_g__down__weight=g[0].weight,
        lora_g__up__weight=g[2].weight,
        k_k=theirs.k_k.view(H, D),
        k_a=theirs.k_a.view(H, D),
        r_k=theirs.r_k,
        norm__weight=theirs.g_norm.weight.view(H, D),
        norm__bias=theirs.g_norm.bias.view(H, D),
    )
    same_outputs(ours, theirs, stream(H * D, n=9))


# ---- mamba-ssm


def mamba_ssm(module):
    """A module of mamba_ssm without what its package imports first, which is compiled for CUDA."""
    found = importlib.util.find_spec("mamba_ssm")
    if found is None or found.submodule_search_locations is None:
        pytest.skip(
            "compares with mamba-ssm, which is not installed: MAMBA_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE "
            "python -m pip install --no-deps --no-build-isolation mamba-ssm"
        )
    pytest.importorskip("triton", reason="mamba_ssm needs triton, which is not installed")
    pytest.importorskip("einops", reason=f"mamba_ssm needs einops, which is not installed: {HOW}")
    package = types.ModuleType("mamba_ssm")
    package.__path__ = list(found.submodule_search_locations)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "mamba_ssm", package)
        try:
            return importlib.import_module(f"mamba_ssm.{module}")
        except ModuleNotFoundError as missing:
            pytest.skip(f"this version of mamba-ssm has no {module}, or wants more: {missing}")


def test_the_scan_of_mamba2_is_the_listing_in_its_paper():
    minimal = mamba_ssm("modules.ssd_minimal").ssd_minimal_discrete
    H, N, P = 2, 6, 5
    x, dt = torch.randn(ROWS, 20, H, P).double(), torch.rand(ROWS, 20, H).double()
    A, B, C = -torch.rand(H).double(), *torch.randn(2, ROWS, 20, H, N).double()
    state = torch.randn(ROWS, H, N, P).double()
    y, end = ssd(x, dt, A, B, C, state=state)
    want, want_end = minimal(x * dt[..., None], dt * A, B, C, 5, initial_states=state.mT[:, None])
    assert_close(y, want, rtol=1e-12, atol=1e-12)
    assert_close(end, want_end.mT, rtol=1e-12, atol=1e-12)


def test_mamba3_is_the_layer_of_fla_around_the_kernels_of_mamba_ssm(fla_layers, monkeypatch):
    """Neither package has it in torch; the layer alone runs on CUDA only, so what it would call is called here."""
    scan, turns = mamba_ssm("ops.triton.mamba3.mamba3_siso_fwd"), mamba_ssm("ops.triton.mamba3.angle_dt")
    from triton import language as tl

    # These are PTX, which cannot be interpreted.
    monkeypatch.setattr(scan, "cos_approx", lambda x: tl.cos(x))
    monkeypatch.setattr(scan, "sin_approx", lambda x: tl.sin(x))
    monkeypatch.setattr(turns, "tanh_approx", lambda x: 2 * tl.sigmoid(2 * x) - 1)

    def combined(*, Angles, DT, chunk_size, Input_States, return_final_states, cu_seqlens, **given):
        """Their two kernels in a row as they call them, only not in bfloat16."""
        assert (Input_States, return_final_states, cu_seqlens) == (None, False, None)
        angles = turns.angle_dt_fwd(Angles, DT, chunk_size=chunk_size)
        return scan.mamba3_siso_fwd(**given, Angles=angles, DT=DT, chunk_size=chunk_size)[0]

    monkeypatch.setattr(fla("layers.mamba3"), "mamba3_siso_combined", combined)

    width, H, Dk, Dv = 16, 2, 16, 16
    theirs = redrawn(fla_layers.Mamba3(width, state_size=Dk, expand=2, head_dim=Dv, chunk_size=16))
    z, x, B, C, dt, a, trap, angles = theirs.in_proj.weight.split([H * Dv, H * Dv, Dk, Dk, H, H, H, Dk // 4])
    # They turn channel 2i with 2i + 1, we channel i with i + pairs.
    turned = torch.arange(Dk // 2).view(-1, 2).T.flatten()
    order = torch.cat([turned, torch.arange(Dk // 2, Dk)])
    ours = copied(
        mixer("mamba3", width, heads=H, key_dim=Dk, value_dim=Dv),
        project__weight=torch.cat([z, x, B[order], C[order]]),
        gates__weight=torch.cat([dt, a, trap, angles]),
        key_norm__weight=theirs.B_norm.weight[order],
        query_norm__weight=theirs.C_norm.weight[order],
        key_bias=theirs.B_bias[:, 0, order],
        query_bias=theirs.C_bias[:, 0, order],
        A_bias=torch.zeros(H),  # theirs has none
        dt_bias=theirs.dt_bias,
        D=theirs.D,
        output__weight=theirs.out_proj.weight,
    )
    same_outputs(ours, theirs.cuda_kernels_forward, stream(width))
