"""One patch at a time: whatever is left out where nothing calls for it must change no bit."""

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_streaming import EXACT, SINGLE, SYSTEMS, K, P, cut, make, make_batch
from torch.testing import assert_close

from tsgdn.kernels import causal_conv
from tsgdn.model.compiled import CompiledSteps
from tsgdn.model.forecaster import Forecaster, ForecasterState
from tsgdn.model.patching import Patcher
from tsgdn.model.scaling import CausalScaler
from tsgdn.model.seasonal import SeasonalMemory
from tsgdn.streamable import map_state, state_leaves, take_rows
from tsgdn.types import Batch

NOTHING = torch.zeros(0, dtype=torch.int64)


def assert_same_bits(got, want, what: str) -> None:
    for (name, a), (_, b) in zip(state_leaves(got), state_leaves(want), strict=True):
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)), f"{what}: {name}"


def by_patch(model: Forecaster, batch: Batch) -> tuple[ForecasterState, list[torch.Tensor]]:
    """Patch after patch, with lengths given as the exact mode does, and the forecasts on the way."""
    state, forecasts = model.initial_state(*batch.values.shape[:2]), []
    lengths = torch.full((batch.values.shape[0],), P)
    for at in range(0, batch.values.shape[-1], P):
        _, state = model(cut(batch, at, at + P)._replace(lengths=lengths), state, read=NOTHING)
        forecasts.append(model.forecast(state, K * P))
    return state, forecasts


@pytest.mark.parametrize("mixer", SYSTEMS)
def test_a_neighbour_that_is_silent_or_lacks_values_changes_no_bit(mixer: str) -> None:
    model, rows = make(mixer, torch.float32, gap_tokens=1), 16
    whole = make_batch(7 * P, series=rows, missing=0.0)
    static = torch.ones(rows, 1, dtype=torch.int64)
    whole = whole._replace(static=static, known=whole.known.nan_to_num())
    observed = whole.observed.clone()
    observed[-1, :, 2 * P : 5 * P] = False  # long enough to be skipped
    observed[-2, :, 3] = False
    observed[-3, :, P : 2 * P] = False
    others = slice(0, rows - 3)
    state, forecasts = by_patch(model, whole)
    beside, again = by_patch(model, whole._replace(observed=observed))
    keep = torch.arange(rows)[others]
    assert_same_bits(take_rows(beside, keep), take_rows(state, keep), "state")
    for a, b in zip(again, forecasts, strict=True):
        assert torch.equal(a[others], b[others])


@pytest.mark.parametrize("at", [0, 3])
@pytest.mark.parametrize("steps", [0, 2, P, 2 * P + 1])
def test_rows_that_stand_together_are_cut_as_those_that_do_not(at: int, steps: int) -> None:
    """Slices where all rows stand at one place of their patch, gathers where another row stands elsewhere."""
    patcher, span = Patcher(P, K, 2), (K + 1) * P
    values, known = torch.randn(3, 2, 20, dtype=torch.float64), torch.randn(3, 2, 20 + span)
    observed = torch.rand(3, 2, 20) > 0.3

    def streamed(rows: list[int], lengths: list[int], after: list[int] | None):
        def part(begin: int, end: int, given: list[int] | None) -> Batch:
            of = None if given is None else torch.tensor(given)
            columns = known[rows, :, begin : end + span]
            return Batch(values[rows, :, begin:end], observed[rows, :, begin:end], columns, lengths=of)

        _, state = patcher(part(0, 5, lengths), None)
        return patcher(part(5, 5 + steps, after), state)

    together, end = streamed([0, 1], [at, at], None)
    padded, padded_end = streamed([0, 1], [at, at], [steps, steps])
    beside, beside_end = streamed([0, 1, 2], [at, at, 1], None)
    N = together.values.shape[2]
    assert together.full and not beside.full and bool(together.valid.all())
    for got, want in zip(together[:5], padded[:5], strict=True):
        assert torch.equal(got, want)
    for got, want in zip(together[:4], beside[:4], strict=True):
        want = want[:2, :N] if want.dim() == 2 else want[:2, :, :N]
        assert torch.equal(got, want)
    assert_same_bits(end, padded_end, "padded")
    assert_same_bits(end, map_state(lambda leaf: leaf[:2], beside_end), "beside another")


@pytest.mark.parametrize("half_life", [None, 3.0])
def test_moments_and_tables_of_a_patch_alone_are_those_of_many(half_life: float | None) -> None:
    seasons, N = (1, 3, 7, 12), 6
    scaler, memory = CausalScaler(len(seasons), half_life), SeasonalMemory(seasons, P, (K + 1) * P)
    values, observed = torch.randn(2, 2, N, P, dtype=torch.float64), torch.rand(2, 2, N, P) > 0.4
    values, start = values * observed, torch.tensor([0, 5])

    def run(begin: int, end: int, table, moments):
        cells, there = values[:, :, begin:end], observed[:, :, begin:end]
        views, table = memory(cells, there, start + begin * P, table)
        scales, before, moments = scaler(cells, there, views.predecessors, views.has_predecessor, moments)
        return [*views, *scales, *before], table, moments

    whole, *want = run(0, N, memory.initial_state(2, 2), scaler.initial_state(2, 2))
    table, moments = memory.initial_state(2, 2), scaler.initial_state(2, 2)
    parts = []
    for n in range(N):
        part, table, moments = run(n, n + 1, table, moments)
        parts.append(part)
    for i, leaf in enumerate(whole):
        assert_close(torch.cat([part[i] for part in parts], 2), leaf, **EXACT)
    for (name, a), (_, b) in zip(state_leaves((table, moments)), state_leaves(tuple(want)), strict=True):
        assert_close(a, b, **EXACT, msg=lambda text, name=name: f"{name}: {text}")


def test_the_convolution_of_a_token_alone_is_that_of_a_row_of_many() -> None:
    x, weight, bias = torch.randn(4, 5, 6).double(), torch.randn(6, 3).double(), torch.randn(6).double()
    state = torch.randn(4, 2, 6).double()
    restart, lengths = torch.tensor([False, True, False, True])[:, None], torch.tensor([1, 1, 0, 0])
    padding = torch.zeros(4, 4, dtype=torch.bool)
    restart = restart & (lengths > 0)[:, None]
    y, end = causal_conv(x[:, :1], weight, bias, state=state, lengths=lengths, restart=restart)
    many, last = causal_conv(x, weight, bias, state=state, lengths=lengths, restart=torch.cat([restart, padding], 1))
    assert_close(y[:2], many[:2, :1], **EXACT)
    assert torch.equal(end, last) and torch.equal(end[2:], state[2:])
    y, end = causal_conv(x[:, :1], weight, state=state)
    many, _ = causal_conv(x, weight, state=state)
    assert_close(y, many[:, :1], **EXACT)
    assert torch.equal(end, torch.cat([state[:, 1:], x[:, :1]], 1))


def test_without_a_compiler_the_model_streams_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = make(dtype=torch.float32), make_batch(3 * P)
    with torch.no_grad():
        _, state = model(batch)

    def fails(*_, **__):
        raise RuntimeError("no C++ compiler found\nand more lines")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: fails)
    with pytest.warns(UserWarning, match="uncompiled, since compiling failed: no C\\+\\+ compiler found$"):
        assert not model.compile_steps((3,), variates=2)
    assert torch.equal(model.forecast(state, 3), model.forecast(state, 3))
    with pytest.raises(ValueError, match="expected positive numbers"):
        model.compile_steps((0,))


def check_compiled_steps() -> None:
    """Streams step by step, with forecasts on the way, compiled, uncompiled and as one pass."""
    model, batch = make(dtype=torch.float32, depth=1, gap_tokens=1), make_batch(12 * P, silence=5 * P)

    def streamed() -> tuple[ForecasterState, list[torch.Tensor]]:
        state, forecasts = model.initial_state(3, 2), []
        with torch.no_grad():
            for step in range(12 * P):  # inside of patches too: a copy of the state closes them
                _, state = model(cut(batch, step, step + 1), state, read=NOTHING)
                forecasts.append(model.forecast(state, 5 * P))
        return state, forecasts

    whole, end = model(batch)
    assert not whole.valid.all(1).any()  # silence is skipped on the way
    _, uncompiled = streamed()
    if not model.compile_steps((3,), variates=2):
        raise SystemExit(77)
    CompiledSteps.MISS = "fail_on_recompile"
    state, forecasts = streamed()
    for a, b in zip(forecasts, uncompiled, strict=True):
        assert_close(a, b, **SINGLE, equal_nan=True)
    for (name, a), (_, b) in zip(state_leaves(state), state_leaves(end), strict=True):
        assert_close(a.nan_to_num(7.0), b.nan_to_num(7.0), **SINGLE, msg=lambda text, name=name: f"{name}: {text}")


def test_a_copy_of_a_compiled_model_does_not_run_on_the_weights_of_the_first() -> None:
    model = make(dtype=torch.float32)
    model._compiled = CompiledSteps(model._take_in, model._window_of, model._read_of)
    assert copy.deepcopy(model)._compiled is None and pickle.loads(pickle.dumps(model))._compiled is None


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_compiled_steps_keep_the_law_and_fit_whatever_a_row_holds() -> None:
    """In a process of its own: the checks of types that the tests add cannot be compiled."""
    here = Path(__file__).parent
    program = "import test_one_token; test_one_token.check_compiled_steps()"
    paths = os.pathsep.join([str(here), str(here.parent)])
    run = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(run, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip("there is no C++ compiler")
    assert done.returncode == 0, done.stderr[-2000:]
