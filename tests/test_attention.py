"""Attention along time: its equations written out, what is in reach, and what is carried."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from tsgdn import checks
from tsgdn.mixers import GatedAttention, SlidingWindowAttention, build
from tsgdn.mixers import attention as module
from tsgdn.mixers.attention import AttentionState, attend, empty_state, read, remember, rotate
from tsgdn.streamable import state_bytes

WIDTH, R, H, HKV, D, DV = 12, 3, 4, 2, 8, 5
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def tensors(n, dtype=torch.float64, dim=D, values=DV):
    shapes = ((H, dim), (HKV, dim), (HKV, values))
    return tuple(torch.randn(R, n, *shape, dtype=dtype) for shape in shapes)


def odd_times(n):
    """Gaps of tenths, which no binary number holds, and some unwritten tokens."""
    gap = torch.where(torch.rand(R, n) < 0.4, torch.randint(0, 30, (R, n)).double() / 10, 0.0)
    return {"gap": gap, "write": torch.where(torch.rand(R, n) < 0.2, 0.0, torch.rand(R, n) + 0.01)}


def by_hand(q, k, v, *, window=None, gap=None, write=None, rope=0.0, base=10000.0):
    """Token by token, pair by pair; channels i and i + half as one complex number that turns with the time between."""
    n = q.shape[1]
    gap = torch.zeros(R, n) if gap is None else (gap.double() * 2**20).round() / 2**20
    time = (1 + gap.double()).cumsum(1)
    half = int(rope * q.shape[-1] / 2)
    speed = torch.tensor([base ** (-i / half) for i in range(half)], dtype=torch.float64)
    out = torch.zeros(R, n, H, v.shape[-1], dtype=torch.float64)
    for r in range(R):
        for t in range(n):
            seen = [
                s
                for s in range(t + 1)
                if (write is None or write[r, s] > 0) and (window is None or time[r, t] - time[r, s] < window)
            ]
            for h in range(H):
                scores = []
                for s in seen:
                    a, b = q[r, t, h].double(), k[r, s, h // (H // HKV)].double()
                    turned = torch.complex(a[:half], a[half : 2 * half]) * torch.complex(b[:half], -b[half : 2 * half])
                    turned = turned * torch.exp(1j * speed * (time[r, t] - time[r, s]))
                    scores.append((turned.real.sum() + a[2 * half :] @ b[2 * half :]) / math.sqrt(q.shape[-1]))
                if seen:
                    out[r, t, h] = torch.softmax(torch.stack(scores), 0) @ v[r, seen, h // (H // HKV)].double()
    return out


def cut(q, k, v, size, *, window, gap=None, write=None, **options):
    outputs, state = [], None
    for at in range(0, q.shape[1], size):
        part = slice(at, at + size)
        o, state = attend(
            q[:, part],
            k[:, part],
            v[:, part],
            state,
            window=window,
            gap=None if gap is None else gap[:, part],
            write=None if write is None else write[:, part],
            **options,
        )
        outputs.append(o)
    return torch.cat(outputs, 1), state


# ---- equations


@pytest.mark.parametrize("rope", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("window", [None, 1, 5])
def test_attention_is_its_equations_written_out(window, rope):
    q, k, v = tensors(13)
    times = odd_times(13)
    o, _ = attend(q, k, v, window=window, rope=rope, **times)
    assert_close(o, by_hand(q, k, v, window=window, rope=rope, **times), **CLOSE)


@pytest.mark.parametrize("rope", [0.0, 1.0])
def test_a_window_as_long_as_the_stream_is_full_causal_attention(rope):
    q, k, v = tensors(12)
    wide, _ = attend(q, k, v, window=12, rope=rope)
    assert_close(wide, attend(q, k, v, window=None, rope=rope)[0], **CLOSE)
    assert_close(wide, by_hand(q, k, v, rope=rope), **CLOSE)
    assert not torch.allclose(attend(q, k, v, window=11, rope=rope)[0][:, -1], wide[:, -1])


def test_full_attention_agrees_with_torchs():
    q, k, v = tensors(33, torch.float32)
    heads = (part.transpose(1, 2).repeat_interleave(H // part.shape[2], 1) for part in (q, k, v))
    want = F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2)
    assert_close(attend(q, k, v, window=None)[0], want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("window", [3, 64, 70])
def test_long_inputs_are_read_in_blocks_that_leave_no_trace(window, monkeypatch):
    q, k, v = tensors(203)
    times = odd_times(203)
    whole, end = attend(q, k, v, window=window, rope=1.0, **times)
    got, state = cut(q, k, v, 29, window=window, rope=1.0, **times)
    assert_close(got, whole, **CLOSE)
    checks.assert_states_close(state, end, **CLOSE)
    monkeypatch.setattr(module, "_BLOCK", 1000)
    assert_close(attend(q, k, v, window=window, rope=1.0, **times)[0], whole, **CLOSE)


@pytest.mark.parametrize("rope", [0.0, 1.0])
def test_without_a_window_blocks_leave_no_trace_either(rope, monkeypatch):
    q, k, v = tensors(41)
    times = odd_times(41)
    whole, _ = attend(q, k, v, window=None, rope=rope, **times)
    monkeypatch.setattr(module, "_FULL_BLOCK", 8)
    assert_close(attend(q, k, v, window=None, rope=rope, **times)[0], whole, **CLOSE)


def test_a_query_is_offered_no_more_than_a_block_and_a_window(monkeypatch):
    offered = []

    def spy(q, k, v, visible, **options):
        offered.append(visible.shape)
        return read(q, k, v, visible, **options)

    monkeypatch.setattr(module, "read", spy)
    attend(*tensors(1000), window=10)
    assert offered == [(R * 16, 64, 73)], "the work does not grow with the square of the length"
    offered.clear()
    attend(*tensors(1000, dim=2, values=2), window=None)
    assert [shape[1:] for shape in offered] == [(512, 512), (488, 1000)]


def test_batches_beyond_what_one_launch_takes_are_split(monkeypatch):
    q, k, v = tensors(100)
    want, _ = attend(q, k, v, window=5)
    monkeypatch.setattr(module, "_LAUNCH", 4)
    assert_close(attend(q, k, v, window=5)[0], want, **CLOSE)


# ---- time


@pytest.mark.parametrize("window", [None, 4])
def test_no_cut_moves_an_entry_over_the_edge_of_the_window(window):
    """Tenths sum to the window in every order: rounded sums would put an entry now inside, now outside."""
    q, k, v = tensors(60)
    gap = torch.randint(0, 8, (R, 60)).double() / 10
    whole, end = attend(q, k, v, window=window, gap=gap)
    for size in (1, 2, 7):
        got, state = cut(q, k, v, size, window=window, gap=gap)
        assert_close(got, whole, **CLOSE)
        assert torch.equal(state.age, end.age)


def test_ages_tell_the_distance_to_the_next_token():
    _, k, v = tensors(4)
    gap = torch.tensor([0.0, 0.0, 2.5, 0.0]).expand(R, 4)
    state = remember(k, v, window=None, gap=gap)
    assert torch.equal(state.age[0], torch.tensor([6.5, 5.5, 2.0, 1.0], dtype=torch.float64))
    assert torch.equal(state.keys, k)
    assert torch.equal(state.values, v)


def test_silence_puts_out_of_reach_exactly_what_is_too_old():
    q, k, v = tensors(6)
    _, before = attend(q[:, :5], k[:, :5], v[:, :5], window=6)
    for silence, left in ((0.0, 5), (0.9, 5), (1.0, 4), (3.5, 2), (4.9, 1), (5.0, 0), (1e9, 0)):
        o, after = attend(q[:, 5:], k[:, 5:], v[:, 5:], before, window=6, gap=torch.full((R, 1), silence))
        want, _ = attend(q[:, 5 - left :], k[:, 5 - left :], v[:, 5 - left :], window=None)
        assert_close(o[:, 0], want[:, -1], **CLOSE)
        # An entry at the very edge is read for the last time: the next token cannot reach it.
        assert (after.age > 0).sum(1).tolist() == [1 + sum(age + silence + 1 < 6 for age in range(1, 6))] * R


@pytest.mark.parametrize("window", [None, 8])
def test_a_shifted_origin_changes_nothing(window):
    q, k, v = tensors(15, torch.float32)
    want, end = attend(q, k, v, window=window, rope=1.0)
    gap = torch.zeros(R, 15)
    gap[:, 0] = 1e6
    got, state = attend(q, k, v, window=window, rope=1.0, gap=gap)
    assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert torch.equal(state.age, end.age)
    exact = attend(*(x.double() for x in (q, k, v)), window=window, rope=1.0, gap=gap)[0]
    # A window cuts a silence short before it costs digits; without one the angles are those of a million patches.
    assert_close(exact, by_hand(q, k, v, window=window, rope=1.0), rtol=0, atol=1e-8 if window is None else 1e-12)


def test_a_stream_of_a_million_patches_still_knows_its_positions():
    """The first entries lie a million patches back; differences among the new tokens are as exact as at the start."""
    q, k, v = tensors(12, torch.float32)
    old = remember(*tensors(3, torch.float32)[1:], window=None)
    far = old._replace(age=old.age + 1e6)
    o, state = attend(q, k, v, far, window=None, rope=1.0)
    joined = [torch.cat(pair, 1) for pair in ((torch.zeros(R, 3, H, D), q), (old.keys, k), (old.values, v))]
    gap = torch.zeros(R, 15)
    gap[:, 3] = 1e6
    assert_close(o.double(), by_hand(*joined, gap=gap, rope=1.0)[:, 3:], rtol=1e-5, atol=1e-5)
    assert torch.equal(state.age[:, :3], far.age + 12)


def test_gaps_may_be_of_any_number_format():
    q, k, v = tensors(6)
    gap = torch.randint(0, 4, (R, 6))
    want, _ = attend(q, k, v, window=5, rope=1.0, gap=gap)
    for dtype in (torch.float16, torch.float32, torch.float64, torch.int32):
        assert torch.equal(attend(q, k, v, window=5, rope=1.0, gap=gap.to(dtype))[0], want)


# ---- unwritten tokens, padding


@pytest.mark.parametrize("window", [None, 4])
def test_an_unwritten_token_reads_takes_time_and_is_never_read(window):
    q, k, v = tensors(9)
    write = torch.ones(R, 9)
    write[:, 5] = 0
    o, state = attend(q, k, v, window=window, write=write)
    other_k, other_v = k.clone(), v.clone()
    other_k[:, 5], other_v[:, 5] = 7.0, 7.0
    same, same_state = attend(q, other_k, other_v, window=window, write=write)
    assert torch.equal(o, same)
    checks.assert_states_close(state, same_state, rtol=0, atol=0)
    without = [torch.cat([x[:, :5], x[:, 6:]], 1) for x in (q, k, v)]
    gap = torch.zeros(R, 8)
    gap[:, 5] = 1.0
    rest, end = attend(*without, window=window, gap=gap)
    assert_close(torch.cat([o[:, :5], o[:, 6:]], 1), rest, **CLOSE)
    checks.assert_states_close(state, end, **CLOSE)


@pytest.mark.parametrize("window", [None, 4])
def test_where_nothing_is_in_reach_the_answer_is_zero_and_gradients_are_finite(window):
    q, k, v = (x.requires_grad_() for x in tensors(6))
    write = torch.ones(R, 6)
    write[:, :3] = 0
    o, state = attend(q, k, v, window=window, write=write)
    assert torch.equal(o[:, :3], torch.zeros_like(o[:, :3]))
    assert o[:, 3:].abs().min() > 0
    nothing = attend(q, k, v, window=window, write=torch.zeros(R, 6))[1]
    assert not any(leaf.any() for leaf in nothing)
    (o.sum() + state.keys.sum()).backward()
    for part in (q, k, v):
        assert part.grad.isfinite().all()
    assert not q.grad[:, :3].any()
    assert not v.grad[:, :3].any()


@pytest.mark.parametrize("window", [None, 4])
def test_empty_entries_come_last_and_are_zero(window):
    q, k, v = tensors(5)
    lengths = torch.tensor([0, 2, 5])
    _, state = attend(q, k, v, window=window, lengths=lengths)
    filled = lengths if window is None else lengths.clamp_max(window - 1)
    assert state.age.shape == (R, int(filled.max()))
    for r, n in enumerate(filled.tolist()):
        assert torch.equal(state.age[r, :n], torch.arange(n, 0, -1, dtype=torch.float64))
        assert not any(leaf[r, n:].any() for leaf in state)


def test_without_a_window_the_state_is_as_long_as_its_fullest_row_and_spare_room_does_not_show():
    q, k, v = tensors(7)
    lengths = torch.tensor([7, 2, 3])
    _, state = attend(q, k, v, window=None, lengths=lengths)
    reset = AttentionState(*(leaf.index_fill(0, torch.tensor([0]), 0) for leaf in state))
    tight = AttentionState(*(leaf[:, :3] for leaf in reset))
    o, end = attend(q, k, v, reset, window=None)
    same, same_end = attend(q, k, v, tight, window=None)
    assert torch.equal(o, same)
    assert end.age.shape == same_end.age.shape == (R, 10)
    assert torch.equal(end.keys, same_end.keys)


@pytest.mark.parametrize("window", [None, 4])
def test_remembering_without_reading_leaves_the_same_state(window):
    q, k, v = tensors(6)
    _, before = attend(*tensors(5), window=window)
    options = {**odd_times(6), "lengths": torch.tensor([6, 0, 3])}
    got = remember(k, v, before, window=window, **options)
    checks.assert_states_close(got, attend(q, k, v, before, window=window, **options)[1], rtol=0, atol=0)


def test_no_rows_and_no_tokens_are_fine():
    q, k, v = tensors(5)
    for window in (None, 1, 4):
        o, state = attend(q[:0], k[:0], v[:0], window=window)
        assert o.shape == (0, 5, H, DV)
        o, same = attend(q[:0, :0], k[:0, :0], v[:0, :0], state, window=window)
        assert o.shape == (0, 0, H, DV)
        assert same.age.shape == state.age.shape


def test_gradients_are_those_of_finite_differences():
    q, k, v = (x[:1].requires_grad_() for x in tensors(3, dim=2, values=1))
    before = AttentionState(*(leaf[:1] for leaf in remember(*tensors(3, dim=2, values=1)[1:], window=3)))
    leaves = (before.keys.requires_grad_(), before.values.requires_grad_())
    times = {"gap": torch.tensor([[0.5, 0.0, 0.0]]), "write": torch.tensor([[1.0, 0.0, 1.0]])}

    def run(q, k, v, keys, values):
        o, state = attend(q, k, v, AttentionState(keys, values, before.age), window=3, rope=1.0, **times)
        return o, state.keys, state.values

    assert torch.autograd.gradcheck(run, (q, k, v, *leaves))


# ---- read, rotate


def test_reading_takes_any_mask_and_a_bias_per_candidate():
    q, k, v = tensors(3)
    k, v = torch.cat([k, k.flip(1)], 1), torch.cat([v, v.flip(0)], 1)
    visible, bias = torch.rand(R, 3, 6) < 0.6, torch.randn(R, 6, dtype=torch.float64, requires_grad=True)
    visible[1, 2] = False
    got = read(q, k, v, visible, scale=0.3, bias=bias)
    keys, values = k.repeat_interleave(H // HKV, 2), v.repeat_interleave(H // HKV, 2)
    weights = torch.einsum("blhd,bshd->bhls", q, keys).mul(0.3).add(bias[:, None, None]).exp() * visible[:, None]
    weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-300)
    assert_close(got, torch.einsum("bhls,bshe->blhe", weights, values), **CLOSE)
    assert not got[1, 2].any()
    (gradient,) = torch.autograd.grad(got.square().sum(), bias)
    assert gradient.isfinite().all()
    assert gradient.abs().max() > 0


def test_products_of_rotated_vectors_depend_on_the_difference_of_their_times():
    q, k = torch.randn(2, 1, 1, 1, D, dtype=torch.float64)
    times = torch.tensor([[0.0, 3.25, 100.5, -7.0]], dtype=torch.float64)
    q4, k4 = q.expand(1, 4, 1, D), k.expand(1, 4, 1, D)
    products = (rotate(q4, times + 2.5) * rotate(k4, times)).sum(-1)
    assert_close(products, products[:, :1].expand_as(products), **CLOSE)
    assert not torch.allclose(products[0, 0], (q * k).sum(-1).squeeze())
    assert_close(rotate(q4, times).norm(dim=-1), q4.norm(dim=-1), **CLOSE)
    part = rotate(q4, times, fraction=0.25)
    assert torch.equal(part[..., 2:], q4[..., 2:])
    assert not torch.allclose(part[..., :2], q4[..., :2])
    assert torch.equal(rotate(q4, times, fraction=0.1), q4), "less than two channels: none"


# ---- the mixers


def rms(x, eps, gain):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * gain


def randomised(mixer):
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return mixer.double()


SIZES = {"heads": H, "kv_heads": HKV, "key_dim": D, "value_dim": DV}


def test_sliding_window_attention_is_its_equations_written_out():
    mixer, x = randomised(SlidingWindowAttention(WIDTH, window=4, **SIZES)), torch.randn(R, 11, WIDTH).double()
    q, k, v = mixer.project(x).split([H * D, HKV * D, HKV * DV], -1)
    q = rms(q.unflatten(-1, (H, D)), 1e-5, mixer.q_norm.weight)
    k = rms(k.unflatten(-1, (HKV, D)), 1e-5, mixer.k_norm.weight)
    times = odd_times(11)
    want = by_hand(q, k, v.unflatten(-1, (HKV, DV)), window=4, rope=1.0, **times)
    assert_close(mixer(x, **times)[0], mixer.output(want.flatten(-2)), **CLOSE)


@pytest.mark.parametrize("rope", [0.0, 0.25])
@pytest.mark.parametrize("style", ["qwen", "olmo"])
def test_gated_attention_is_its_equations_written_out(style, rope):
    mixer = randomised(GatedAttention(WIDTH, style=style, rope=rope, **SIZES))
    x = torch.randn(R, 11, WIDTH).double()
    q, k, v, gate = mixer.project(x).split([H * D, HKV * D, HKV * DV, H * DV if style == "qwen" else 0], -1)
    if style == "qwen":
        q = rms(q.unflatten(-1, (H, D)), 1e-6, 1 + mixer.q_norm.weight)
        k = rms(k.unflatten(-1, (HKV, D)), 1e-6, 1 + mixer.k_norm.weight)
    else:
        q = rms(q, 1e-5, mixer.q_norm.weight).unflatten(-1, (H, D))
        k = rms(k, 1e-5, mixer.k_norm.weight).unflatten(-1, (HKV, D))
    times = odd_times(11)
    want = by_hand(q, k, v.unflatten(-1, (HKV, DV)), rope=rope, **times).flatten(-2)
    if style == "qwen":
        want = want * torch.sigmoid(gate)
    assert_close(mixer(x, **times)[0], mixer.output(want), **CLOSE)


def test_a_gate_that_is_wide_open_gives_plain_attention():
    gated, plain = GatedAttention(WIDTH, **SIZES).double(), SlidingWindowAttention(WIDTH, window=9, rope=0, **SIZES)
    plain = plain.double()
    x = torch.randn(R, 9, WIDTH).double()
    x[..., 0] = 1.0
    with torch.no_grad():
        attention, gate = gated.project.weight.split([plain.project.weight.shape[0], H * DV])
        plain.project.weight.copy_(attention)
        plain.output.weight.copy_(gated.output.weight)
        gate.zero_()
        gate[:, 0] = 1e3
    for norm in (gated.q_norm, gated.k_norm):
        norm.eps = 1e-5
    assert_close(gated(x)[0], plain(x)[0], **CLOSE)
    with torch.no_grad():
        gate[:, 0] = -1e3
    assert not gated(x)[0].any()


@pytest.mark.parametrize("cls", [SlidingWindowAttention, GatedAttention])
def test_heads_that_share_keys_are_heads_with_equal_keys(cls):
    shared = randomised(cls(WIDTH, **SIZES))
    own = cls(WIDTH, **{**SIZES, "kv_heads": None}).double()
    weights = shared.state_dict()
    q, k, v, *gate = weights["project.weight"].split([size for size in shared.sizes if size])
    k, v = (x.unflatten(0, (HKV, -1)).repeat_interleave(H // HKV, 0).flatten(0, 1) for x in (k, v))
    own.load_state_dict({**weights, "project.weight": torch.cat([q, k, v, *gate])})
    x = torch.randn(R, 8, WIDTH).double()
    assert_close(own(x)[0], shared(x)[0], **CLOSE)
    assert own.state_bytes(8) > shared.state_bytes(8)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("sliding_window_attention", {"window": 1}),
        ("sliding_window_attention", {"window": 40, "rope": 0.5}),
        ("gated_attention", {"rope": 0.25}),
        ("gated_attention", {"style": "olmo"}),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_cutting_the_stream_changes_nothing_under_the_options(name, args, dtype):
    mixer = build(name, WIDTH, {**SIZES, **args}).to(dtype)
    x = torch.randn(R, 83, WIDTH, dtype=dtype)
    close = CLOSE if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    checks.check_streaming(mixer, x, cuts=((13,), (66, 0, 1)), **close)
    checks.check_causal(mixer, x)
    checks.check_reset(mixer, x)


def test_the_state_of_a_window_is_bounded_and_that_of_full_attention_counts_its_tokens():
    x = torch.randn(R, 50, WIDTH)
    entry = 4 * HKV * (D + DV) + 8
    for n in (0, 1, 50):
        window, full = SlidingWindowAttention(WIDTH, window=7, **SIZES), GatedAttention(WIDTH, **SIZES)
        assert state_bytes(window(x[:, :n])[1]) == window.state_bytes(n) == 6 * entry
        assert state_bytes(full(x[:, :n])[1]) == full.state_bytes(n) == n * entry


def test_zero_centred_gains_are_open_to_weight_decay_and_plain_ones_are_not():
    def free(mixer):
        return {key for key, p in mixer.named_parameters() if getattr(p, "no_weight_decay", False)}

    norms = {"q_norm.weight", "k_norm.weight"}
    assert free(GatedAttention(WIDTH)) == set()
    assert free(GatedAttention(WIDTH, style="olmo")) == free(SlidingWindowAttention(WIDTH)) == norms


# ---- errors


@pytest.mark.parametrize(
    ("name", "args", "text"),
    [
        ("sliding_window_attention", {"heads": 3, "kv_heads": 2}, "heads 3 is not a multiple of kv_heads 2"),
        ("sliding_window_attention", {"window": 0}, "window is 0; expected at least 1"),
        ("gated_attention", {"rope": 1.5}, "rope 1.5"),
        ("gated_attention", {"rope_base": 0}, "rope_base 0"),
        ("gated_attention", {"style": "llama"}, "expected qwen or olmo"),
        ("gated_attention", {"window": 3}, "no argument 'window'"),
        ("sliding_window_attention", {"decay_init": "paper"}, "no argument 'decay_init'"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(name, args, text):
    with pytest.raises(ValueError, match=text) as error:
        build(name, WIDTH, args)
    assert "\n" not in str(error.value)


def test_sizes_that_do_not_fit_are_refused():
    q, k, v = tensors(4)
    with pytest.raises(ValueError, match="window is 0"):
        attend(q, k, v, window=0)
    with pytest.raises(ValueError, match="3 heads of queries over 2 of keys"):
        attend(q[:, :, :3], k, v, window=4)
    for wrong, window in ((empty_state(R, HKV, D, DV, window=5), 4), (empty_state(2, HKV, D, DV, window=4), 4)):
        with pytest.raises(ValueError, match="the state's keys, values and age are"):
            attend(q, k, v, wrong, window=window)
    with pytest.raises(ValueError, match="window None"):
        remember(k, v, empty_state(R, H, D, DV, window=None), window=None)
