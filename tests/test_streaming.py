"""The law, for the whole model and for each of its parts: cutting the input anywhere changes nothing."""

import pytest
import torch
from sizes import small_model_args
from torch.testing import assert_close

from tsgdn.checks import CUTS, assert_states_close
from tsgdn.mixers import MIXERS, build
from tsgdn.model.backbone import BACKBONES, cycle
from tsgdn.model.forecaster import Forecaster
from tsgdn.streamable import fork, join_rows, map_state, reset, same_sizes, state_bytes, state_leaves, take_rows
from tsgdn.types import Batch

P, K, SEASONS = 4, 2, (1, 6, 10)
SYSTEMS = sorted([*MIXERS, *BACKBONES])
EXACT = {"atol": 1e-12, "rtol": 1e-12}
SINGLE = {"atol": 5e-6, "rtol": 1e-5}


def make(mixer: str = "gated_deltanet", dtype: torch.dtype = torch.float64, **settings) -> Forecaster:
    torch.manual_seed(0)
    depth = max(2, len(cycle(mixer)))
    settings = {"known_features": 2, "static_cardinalities": (3,), "depth": depth, **settings}
    args = small_model_args(mixer)
    model = Forecaster(P, K, SEASONS, width=16, mixer=mixer, mixer_args=args, **settings).to(dtype).eval()
    # the head starts near persistence; make every path matter
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def make_batch(steps: int, series: int = 3, variates: int = 2, missing: float = 0.2, silence: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(1)
    walk = torch.randn(series, variates, steps, generator=generator, dtype=torch.float64).cumsum(-1) + 20
    observed = torch.rand(series, variates, steps, generator=generator) > missing
    if silence:
        observed[:, :, 13 : 13 + silence] = False
    span = (K + 1) * P
    known = torch.randn(series, 2, steps + span, generator=generator)
    known[0, 1, 3:9] = float("nan")
    static = torch.tensor([[1], [0], [3]])[:series]
    return Batch(torch.where(observed, walk, torch.nan), observed, known, static)


def cut(batch: Batch, begin: int, end: int) -> Batch:
    assert batch.known is not None
    return batch._replace(
        values=batch.values[..., begin:end],
        observed=batch.observed[..., begin:end],
        known=batch.known[..., begin : end + (K + 1) * P],
        target=None,
    )


def stream(model: Forecaster, batch: Batch, pattern, state=None):
    pieces, at, steps = [], 0, batch.values.shape[-1]
    while at < steps:
        for length in pattern:
            length = min(length, steps - at)
            quantiles, state = model(cut(batch, at, at + length), state)
            pieces.append(quantiles)
            at += length
    joined = [torch.cat([getattr(q, name) for q in pieces], 2) for name in ("values", "loc", "scale", "unit")]
    return joined, torch.cat([q.valid for q in pieces], 1), state


def assert_same_stream(model: Forecaster, batch: Batch, pattern, tolerance) -> None:
    whole, end = model(batch)
    parts, valid, state = stream(model, batch, pattern)
    assert torch.equal(valid, whole.valid)
    for name, part in zip(("values", "loc", "scale", "unit"), parts, strict=True):
        want = getattr(whole, name)
        mask = valid[:, None].expand(want.shape[:3])
        assert_close(part[mask], want[mask], **tolerance, msg=lambda text, name=name: f"{name}, cut {pattern}: {text}")
    nan_to = map_state(lambda x: x.nan_to_num(7.0) if x.is_floating_point() else x, state)
    end = map_state(lambda x: x.nan_to_num(7.0) if x.is_floating_point() else x, end)
    assert_states_close(nan_to, end, **tolerance)


@pytest.mark.parametrize("mixer", SYSTEMS)
@pytest.mark.parametrize("pattern", [*CUTS, (P,), (2 * P + 1,)], ids=str)
def test_cutting_the_stream_changes_nothing(mixer: str, pattern) -> None:
    assert_same_stream(make(mixer), make_batch(11 * P + 3), pattern, EXACT)


@pytest.mark.parametrize("mixer", ["gated_deltanet", "mamba2", "gru"])
def test_cutting_the_stream_changes_nothing_in_single_precision(mixer: str) -> None:
    assert_same_stream(make(mixer, torch.float32), make_batch(30 * P + 1), (1, 5), SINGLE)


@pytest.mark.parametrize("mixer", SYSTEMS)
@pytest.mark.parametrize("silence", [6, 40], ids=["within gap_tokens", "skipped"])
def test_cutting_a_silent_stretch_changes_nothing(mixer: str, silence: int) -> None:
    model = make(mixer, gap_tokens=3)
    for pattern in ((1,), (7,)):
        assert_same_stream(model, make_batch(20 * P, silence=silence), pattern, EXACT)


def test_gradients_flow_through_cuts() -> None:
    model, batch = make(), make_batch(9 * P)
    weights = [p for p in model.parameters() if p.requires_grad]
    whole, _ = model(batch)
    want = torch.autograd.grad((whole.values**2).sum(), weights, allow_unused=True)
    (values, *_), _, _ = stream(model, batch, (3,))
    got = torch.autograd.grad((values**2).sum(), weights, allow_unused=True)
    assert any(g is not None and g.abs().max() > 0 for g in want)
    for a, b in zip(got, want, strict=True):
        if b is not None:
            assert_close(a, b, atol=1e-8, rtol=1e-8)


def test_the_past_does_not_depend_on_the_future() -> None:
    model, batch = make(), make_batch(8 * P)
    whole, _ = model(batch)
    at = 5 * P
    other = batch.values.clone()
    other[..., at:] = torch.randn_like(other[..., at:]) * 50
    assert batch.known is not None
    later = batch.known.clone()
    later[..., at + K * P :] = 9.0
    changed, _ = model(batch._replace(values=other, known=later, observed=batch.observed | (torch.arange(8 * P) >= at)))
    assert torch.equal(changed.values[:, :, :5], whole.values[:, :, :5])
    assert not torch.equal(changed.values[:, :, 5:], whole.values[:, :, 5:])


def test_a_state_is_a_value_and_zeros_mean_nothing_seen() -> None:
    model, batch = make(), make_batch(5 * P + 2)
    first, state = model(batch)
    before = fork(state)
    model(batch, state)
    model.forecast(state, 3 * K * P)
    for (name, a), (_, b) in zip(state_leaves(state), state_leaves(before), strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num()), name
    cleared = reset(state, torch.arange(3))
    zeros = model.initial_state(3, 2)
    for (name, a), (_, b) in zip(state_leaves(cleared), state_leaves(zeros), strict=True):
        assert torch.equal(a, b) and not b.any(), name
    again, _ = model(batch, zeros)
    assert_close(again.values, first.values, **EXACT)


def test_series_do_not_see_each_other() -> None:
    model, batch = make(), make_batch(6 * P + 1)
    whole, end = model(batch)
    rows = torch.tensor([2, 0])
    some, state = model(Batch(*(None if x is None else x[rows] for x in batch[:4])))
    assert_close(some.values, whole.values[rows], **EXACT)
    for (name, a), (_, b) in zip(state_leaves(state), state_leaves(take_rows(end, rows)), strict=True):
        assert_close(a, b, equal_nan=True, **EXACT, msg=lambda text, name=name: f"{name}: {text}")


def test_series_of_one_call_may_stand_at_different_places_and_have_different_lengths() -> None:
    model, batch = make(), make_batch(10 * P)
    lengths = torch.tensor([2, 7, 0])
    _, ragged = model(cut(batch, 0, 7)._replace(lengths=lengths))
    pieces = [cut(batch, int(n), int(n) + 25) for n in lengths]
    rest = Batch(*(torch.cat([getattr(p, f)[i : i + 1] for i, p in enumerate(pieces)]) for f in Batch._fields[:4]))
    quantiles, end = model(rest, ragged)
    for i, n in enumerate(lengths.tolist()):
        alone = Batch(*(None if x is None else x[i : i + 1] for x in batch[:4]))
        _, state = model(cut(alone, 0, n))
        want, last = model(cut(alone, n, n + 25), state)
        N = want.values.shape[2]
        assert quantiles.valid[i].sum() == N
        assert_close(quantiles.values[i, :, :N], want.values[0], **EXACT)
        for (name, a), (_, b) in zip(state_leaves(end), state_leaves(last), strict=True):
            assert_close(a[i : i + 1], b, equal_nan=True, **EXACT, msg=lambda text, name=name: f"{name}: {text}")


def test_padding_touches_no_state() -> None:
    model, batch = make(), make_batch(6 * P)
    _, state = model(cut(batch, 0, 9))
    _, same = model(cut(batch, 9, 17)._replace(lengths=torch.zeros(3, dtype=torch.int64)), state)
    for (name, a), (_, b) in zip(state_leaves(same), state_leaves(state), strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num()), name


@pytest.mark.parametrize("mixer", SYSTEMS)
@pytest.mark.parametrize("steps", [1, P, 5 * P + 1, 23 * P + 3])
def test_silence_equals_streaming_it(mixer: str, steps: int) -> None:
    model, batch = make(mixer, gap_tokens=2), make_batch(40 * P)
    head = 3 * P + 2
    _, state = model(cut(batch, 0, head))
    unseen = cut(batch, head, head + steps)
    _, want = model(unseen._replace(observed=torch.zeros_like(unseen.observed)), state)
    assert batch.known is not None
    known = batch.known
    got = model.elapse(state, steps, known=lambda a, b: known[..., head + a : head + b])
    for (name, a), (_, b) in zip(*map(state_leaves, same_sizes(got, want)), strict=True):
        assert_close(a, b, equal_nan=True, **EXACT, msg=lambda text, name=name: f"{name}: {text}")
    after = cut(batch, head + steps, head + steps + 2 * P)
    assert_close(model(after, got)[0].values, model(after, want)[0].values, **EXACT)


def test_two_silences_are_their_sum_and_a_long_one_costs_no_loop() -> None:
    model, batch = make(known_features=0), make_batch(6 * P)._replace(known=None)
    _, state = model(batch)
    once = model.elapse(state, 10**12 + 7)
    twice = model.elapse(model.elapse(state, 10**12), 7)
    assert_states_close(twice, once, atol=0, rtol=0)
    assert int(once.steps[0]) == 6 * P + 10**12 + 7
    assert torch.isfinite(model.forecast(once, 5)).all()


def test_the_bytes_of_a_state_do_not_grow() -> None:
    model = make()
    _, short = model(make_batch(3))
    _, long = model(make_batch(50 * P))
    assert state_bytes(short) == state_bytes(long) == state_bytes(model.initial_state(1, 2))


@pytest.mark.parametrize("mixer", sorted(BACKBONES))
def test_a_hybrid_takes_its_mixers_in_turn(mixer: str) -> None:
    names = cycle(mixer)
    model = make(mixer, depth=2 * len(names) - 1)
    kinds = [type(block.mixer) for block in model.backbone.blocks]
    assert kinds == [type(build(name, 16, small_model_args(name))) for name in (names + names)[:-1]]
    assert model.backbone.bounded == (mixer != "hybrid_3to1")


def test_a_list_of_mixers_is_a_hybrid_too() -> None:
    args = {name: small_model_args(name) for name in ("gru", "deltanet")}
    model = Forecaster(P, K, SEASONS, width=16, depth=3, mixer=["gru", "deltanet"], mixer_args=args)
    assert [type(block.mixer).__name__ for block in model.backbone.blocks] == ["GRU", "GatedDeltaNet", "GRU"]
    assert model.config["mixer"] == ["gru", "deltanet"]


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"mixer": "hybrid_3:1"}, "no mixer or hybrid 'hybrid_3:1', did you mean 'hybrid_3to1'"),
        ({"mixer": ["gru", "mamba"]}, "no mixer 'mamba', did you mean 'mamba"),
        ({"mixer": []}, "empty list"),
        ({"mixer": "h2", "depth": 2}, "takes at least 3 blocks"),
        ({"mixer": "h1", "mixer_args": {"heads": 2}}, "mixer_args has 'heads'; of a hybrid it takes arguments under"),
    ],
)
def test_a_wrong_hybrid_is_refused_in_one_line(settings, text: str) -> None:
    with pytest.raises(ValueError, match=text) as error:
        Forecaster(**settings)
    assert "\n" not in str(error.value)


def test_states_that_grew_by_different_lengths_are_joined() -> None:
    model, batch = make("hybrid_3to1"), make_batch(9 * P)
    ends = [model(cut(batch, 0, steps))[1] for steps in (3 * P, 9 * P)]
    both = join_rows(ends)
    rest = cut(batch, 4, 4 + 2 * P)
    twice = Batch(*(None if x is None else torch.cat([x, x]) for x in rest[:4]))
    want = torch.cat([model(rest, end)[0].values for end in ends])
    assert_close(model(twice, both)[0].values, want, **EXACT)
