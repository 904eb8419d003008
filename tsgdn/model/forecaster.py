"""The forecaster: a stream of values in, quantiles of the next steps out. Read this file first.

    series -> patches -> seasonal memory, causal scaling -> tokens -> backbone -> quantiles

`forward` obeys the law of this package: `quantiles, state = forecaster(batch, state)`, and cutting the input anywhere
changes neither. Training is one long call, a warm start a long call and then short ones, a stream calls of single
steps; there is no other code. Everything carried is in the state, in this order:

1. `patching`: an unfinished patch waits until its P cells are known, seen or missing.
2. `seasonal`: the latest value at each phase of each season, so persistence over a season is always at hand.
3. `scaling`: running moments; a token is scaled by what was seen up to the end of its patch.
4. `backbone`: one memory per layer, of fixed size; a token without values reads it and does not write.
5. `readout`: the last token, from which the head reads the forecast whenever it is asked.

A forecast changes nothing. Between patch ends a copy of the state takes the unfinished patch closed as "not observed",
and the head covers the rest of that patch as well as the next K; beyond them the copy steps on through unobserved
patches. Long silence costs nothing: after `gap_tokens` empty patches no more tokens enter, and the next one that does
is told how long it was (`gap`), so that the memories decay by that time.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, final

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor, nn

from tsgdn.model.backbone import Backbone
from tsgdn.model.compiled import CompiledSteps
from tsgdn.model.embedding import Embedding
from tsgdn.model.heads import QuantileHead
from tsgdn.model.patching import Patcher, Patches, PatchingState
from tsgdn.model.scaling import CausalScaler, Scales, ScalingState, scales_of
from tsgdn.model.seasonal import SeasonalMemory, SeasonalState
from tsgdn.streamable import map_state
from tsgdn.types import QUANTILE_LEVELS, Batch, Past, Quantiles


class Tokens(NamedTuple):
    """What the head reads: outputs of the backbone, scales and anchors of tokens, and which of them there are."""

    mixed: Float[Tensor, "B V N D"]
    scales: Scales
    anchors: Float64[Tensor, "B V N S L"]
    has_anchor: Bool[Tensor, "B V N S L"]
    enters: Bool[Tensor, "B N"]

    def at(self, places: Int64[Tensor, " reads"]) -> "Tokens":
        """Some of them."""
        scales = Scales(*(leaf[:, :, places] for leaf in self.scales))
        mixed, anchors, has_anchor = (x[:, :, places] for x in (self.mixed, self.anchors, self.has_anchor))
        return Tokens(mixed, scales, anchors, has_anchor, self.enters[:, places])


class ForecasterState(NamedTuple):
    """All that is carried, one row per series; zeros mean nothing seen yet.

    Attributes:
        patching: the unfinished patch; `patching.steps` counts the steps seen.
        seasonal: the latest value at each phase.
        scaling: running moments.
        backbone: per layer what its mixer holds, leaves (B, V, ...).
        readout: the backbone's output at the last token.
        static: categories of the series.
        silent: patches without any value since the last one with a value.
        skipped: those of them that made no token.
    """

    patching: PatchingState
    seasonal: SeasonalState
    scaling: ScalingState
    backbone: tuple[Any, ...]
    readout: Float[Tensor, "B V D"]
    static: Int64[Tensor, "B n_static"]
    silent: Int64[Tensor, " B"]
    skipped: Int64[Tensor, " B"]

    @property
    def steps(self) -> Int64[Tensor, " B"]:
        """Steps seen since the stream began."""
        return self.patching.steps


@final
class Forecaster(nn.Module):
    """Quantile forecasts of multivariate series from a state of fixed size.

    Args:
        patch_size: P, steps per token.
        patches_ahead: K; a token forecasts the rest of its own patch and K more.
        seasons: lengths in steps of the seasonal memory, 1 (the last value) first.
        known_features: F, known-future features per step, calendar first.
        static_cardinalities: sizes of the static categories.
        width: D, of a token.
        depth: number of blocks.
        mixer: a key of `tsgdn.mixers.MIXERS`, a hybrid of `tsgdn.model.backbone.BACKBONES`, or a list of mixers that
            the blocks take in turn.
        mixer_args: its arguments; of a hybrid or a list under the names of its mixers.
        mlp_ratio: hidden width of the MLPs, in widths.
        variate_every: every so many blocks the variates of a series are mixed; 0 = never.
        gap_tokens: empty patches in a row that still make tokens.
        half_life: of the running moments, in observed values; None = all values weigh the same.
        quantile_levels: increasing, the median among them.
        dropout: in training.

    Raises:
        ValueError: a size is not positive, or an unknown mixer, argument, season or level.
    """

    def __init__(
        self,
        patch_size: int = 8,
        patches_ahead: int = 3,
        seasons: Sequence[int] = (1, 24),
        known_features: int = 0,
        static_cardinalities: Sequence[int] = (),
        width: int = 64,
        depth: int = 3,
        mixer: str | list[str] = "gated_deltanet",
        mixer_args: dict[str, Any] | None = None,
        mlp_ratio: float = 2.0,
        variate_every: int = 2,
        gap_tokens: int = 4,
        half_life: float | None = None,
        quantile_levels: Sequence[float] = QUANTILE_LEVELS,
        dropout: float = 0.0,
    ):
        super().__init__()
        for name, size in (
            ("patch_size", patch_size),
            ("patches_ahead", patches_ahead),
            ("width", width),
            ("depth", depth),
        ):
            if size < 1:
                raise ValueError(f"{name} is {size}; it must be at least 1")
        if gap_tokens < 0:
            raise ValueError(f"gap_tokens is {gap_tokens}; it must be at least 0")
        self.config: dict[str, Any] = {
            "patch_size": patch_size,
            "patches_ahead": patches_ahead,
            "seasons": list(seasons),
            "known_features": known_features,
            "static_cardinalities": list(static_cardinalities),
            "width": width,
            "depth": depth,
            "mixer": mixer if isinstance(mixer, str) else list(mixer),
            "mixer_args": dict(mixer_args or {}),
            "mlp_ratio": mlp_ratio,
            "variate_every": variate_every,
            "gap_tokens": gap_tokens,
            "half_life": half_life,
            "quantile_levels": list(quantile_levels),
            "dropout": dropout,
        }
        self.patch_size, self.patches_ahead = patch_size, patches_ahead
        self.span = (patches_ahead + 1) * patch_size
        self.seasons, self.quantile_levels = tuple(seasons), tuple(quantile_levels)
        self.known_features, self.gap_tokens, self.width = known_features, gap_tokens, width
        self.patcher = Patcher(patch_size, patches_ahead, known_features)
        self.memory = SeasonalMemory(seasons, patch_size, self.span)
        self.scaler = CausalScaler(len(self.seasons), half_life)
        self.embedding = Embedding(patch_size, self.span, seasons, known_features, static_cardinalities, width)
        self.backbone = Backbone(width, depth, mixer, dict(mixer_args or {}), mlp_ratio, variate_every, dropout)
        self.head = QuantileHead(width, patch_size, patches_ahead, seasons, quantile_levels, 2 * width)
        self._compiled: CompiledSteps | None = None

    @property
    def direct_steps(self) -> int:
        """Steps that a forecast covers without roll-out, wherever in its patch the series stands."""
        return self.patches_ahead * self.patch_size

    # ---- the law ----------------------------------------------------------------------------------------------------

    def forward(
        self, batch: Batch, state: ForecasterState | None = None, *, read: Int64[Tensor, " reads"] | None = None
    ) -> tuple[Quantiles, ForecasterState]:
        """Takes in T steps and forecasts from every patch that they complete.

        Args:
            batch: the next T >= 0 steps of each series; series may stand anywhere in their patches.
            state: what came before; None = the streams start here (or after `batch.past`).
            read: which of the completed tokens to forecast from; None = all. The state is the same.

        Returns:
            Quantiles of the tokens, and the state after the last step.

        Raises:
            ValueError: shapes that disagree.
        """
        B, V, _ = batch.values.shape
        tokens, state = self._advance(batch, state, as_tokens=False)
        if tokens is None or (read is not None and not read.numel()):
            return self._no_tokens(B, V, batch.values), state
        return self.head(*(tokens if read is None else tokens.at(read.to(batch.values.device)))), state

    def _advance(
        self, batch: Batch, state: ForecasterState | None, *, as_tokens: bool
    ) -> tuple[Tokens | None, ForecasterState]:
        """Takes in steps; `as_tokens` lets empty patches enter however long the silence: a forecast's own tokens."""
        B, V, _ = batch.values.shape
        begins = state is None
        if state is None:
            state = (
                self.initial_state(B, V, device=batch.values.device) if batch.past is None else self.prime(batch.past)
            )
        static = state.static if batch.static is None else batch.static
        patches, patching = self.patcher(batch, None if begins else state.patching)
        if patches.values.shape[2] == 0:
            return None, state._replace(patching=patching, static=static)
        compiled = self._compiled_for(B, V) if patches.values.shape[2] == 1 else None
        if compiled is None:
            tokens, rest = self._take_in(patches, state, static, as_tokens, begins)
        else:
            tokens, rest = compiled.take_in(patches, state, static, as_tokens)
        return tokens, ForecasterState(patching, *rest)

    def _take_in(
        self, patches: Patches, state: ForecasterState, static: Tensor, as_tokens: bool | Tensor, begins: bool
    ) -> tuple[Tokens, tuple[Any, ...]]:
        """Whole patches: what their tokens forecast from, and all leaves of the state but the unfinished patch."""
        views, seasonal = self.memory(patches.values, patches.observed, patches.start, state.seasonal)
        scales, previous, scaling = self.scaler(
            patches.values, patches.observed, views.predecessors, views.has_predecessor, state.scaling
        )
        enters, gap, silent, skipped = self._silence(patches.observed, patches.valid, state, as_tokens)
        told = patches.observed.any(-1)
        some_wait = some_skip = some_silent = True
        if patches.full and not begins and not torch.is_grad_enabled():
            # What comes of silence is left out where there is none: it would change no bit. With gradients it stays, so
            # that every parameter is in the graph of every loss; so it does at the start, with no look at the device.
            every_enters, every_told, some_skip = torch.stack([enters.all(), told.all(), gap.any()]).tolist()
            some_wait, some_silent = not every_enters, not every_told
        gaps = gap if some_skip else None
        tokens = self.embedding(patches.values, patches.observed, views, scales, previous, patches.known, gaps, static)
        writes = told.to(tokens.dtype) if some_silent else None
        mixed, backbone, readout = self._mix(tokens, writes, enters if some_wait else None, gaps, state)
        found = Tokens(mixed, scales, views.anchors, views.has_anchor, enters)
        return found, (seasonal, scaling, backbone, readout, static, silent, skipped)

    def _silence(
        self,
        observed: Bool[Tensor, "B V N P"],
        valid: Bool[Tensor, "B N"],
        state: ForecasterState,
        as_tokens: bool | Tensor,
    ) -> tuple[Bool[Tensor, "B N"], Int64[Tensor, "B N"], Int64[Tensor, " B"], Int64[Tensor, " B"]]:
        """Which patches enter as tokens, the silence that was skipped before each, and the two counters after."""
        seen = observed.any(-1).any(1)
        if valid.shape[1] == 1:  # the rule itself, for one patch
            seen, valid = seen[:, 0], valid[:, 0]
            empty = torch.where(seen, 0, state.silent + 1)
            enters = valid & ((empty <= self.gap_tokens) | as_tokens)
            gap = torch.where(enters, state.skipped, 0)
            skipped = torch.where(valid & ~enters, state.skipped + 1, state.skipped - gap)
            return enters[:, None], gap[:, None], torch.where(valid, empty, state.silent), skipped
        place = torch.arange(1, valid.shape[1] + 1, device=valid.device)
        # the place of the latest patch with a value; those before this call lie at -silent
        latest = torch.where(seen, place, -state.silent[:, None]).cummax(1).values
        empty = place - latest
        enters = valid & ((empty <= self.gap_tokens) | as_tokens)
        skips = (valid & ~enters).cumsum(1)
        # skips that had been told when a token entered; what accrued before this call is told by the first
        told = torch.where(enters, skips, -state.skipped[:, None]).cummax(1).values
        before = torch.cat([-state.skipped[:, None], told[:, :-1]], 1)
        gap = torch.where(enters, skips - before, 0)
        count = valid.sum(1, keepdim=True)
        last = (count - 1).clamp(min=0)
        silent = torch.where(count > 0, empty.gather(1, last), state.silent[:, None])[:, 0]
        return enters, gap, silent, skips[:, -1] - told[:, -1]

    def _mix(
        self,
        tokens: Float[Tensor, "B V N D"],
        writes: Float[Tensor, "B V N"] | None,
        enters: Bool[Tensor, "B N"] | None,
        gap: Int64[Tensor, "B N"] | None,
        state: ForecasterState,
    ) -> tuple[Float[Tensor, "B V N D"], tuple[Any, ...], Float[Tensor, "B V D"]]:
        """Runs the backbone over the tokens that enter, moved to the front, and puts its outputs back in place.

        None: all tokens write, all enter, no silence was skipped.
        """
        V, D = tokens.shape[1], tokens.shape[3]

        def per_row(x: Tensor) -> Tensor:
            return x[:, None].expand(-1, V, *x.shape[1:]).flatten(0, 1)

        def rearrange(x: Tensor, to: Tensor) -> Tensor:
            index = to[:, None].expand(-1, V, -1)
            return x.gather(2, index if x.dim() == 3 else index[..., None].expand(-1, -1, -1, D))

        order = lengths = None
        if enters is not None:
            lengths = enters.sum(1)
        if enters is not None and enters.shape[1] > 1:
            order = torch.argsort(~enters, dim=1, stable=True)
            tokens = rearrange(tokens, order)
            writes = None if writes is None else rearrange(writes, order)
            gap = None if gap is None else gap.gather(1, order)
        mixed, rows = self.backbone(
            tokens,
            map_state(lambda leaf: leaf.flatten(0, 1), state.backbone),
            write=None if writes is None else writes.flatten(0, 1),
            gap=None if gap is None else per_row(gap.to(tokens.dtype)),
            lengths=None if lengths is None else per_row(lengths),
        )
        backbone = map_state(lambda leaf: leaf.unflatten(0, (-1, V)), rows)
        if lengths is None:
            readout = mixed[:, :, -1]
            return mixed, backbone, readout if mixed.shape[2] == 1 else readout.clone()
        last = mixed[:, :, :1]
        if order is not None:
            last = mixed.gather(2, (lengths - 1).clamp(min=0)[:, None, None, None].expand(-1, V, 1, D))
            mixed = rearrange(mixed, torch.argsort(order, dim=1))
        return mixed, backbone, torch.where(lengths[:, None, None] > 0, last[:, :, 0], state.readout)

    # ---- one token, compiled ----------------------------------------------------------------------------------------

    def compile_steps(self, series: Sequence[int] = (1,), *, variates: int = 1) -> bool:
        """Compiles what a stream calls most, taking in one patch and reading a forecast, for calls of given sizes.

        It takes the C++ compiler that torch finds, and up to a minute per size where nothing is cached yet. Calls of
        other sizes, with gradients or in training go on as before; results agree up to rounding. Weights may change in
        place afterwards.

        Args:
            series: numbers of series per call.
            variates: of each series.

        Returns:
            Whether it is compiled; if not, a warning says why and nothing has changed.

        Raises:
            ValueError: the model is not on a CPU, or a size is not positive.
        """
        if self.head.hidden.weight.device.type != "cpu":
            raise ValueError(
                f"compile_steps is for CPUs, the model is on {self.head.hidden.weight.device}: leave it out"
            )
        if not series or min(*series, variates) < 1:
            raise ValueError(f"series is {tuple(series)} and variates {variates}; expected positive numbers")
        training = self.training
        self.eval()
        self._compiled = CompiledSteps(self._take_in, self._window_of, self._read_of)
        try:
            with torch.no_grad():
                for count in dict.fromkeys(series):
                    patches, state = self._example(count, variates)
                    self._take_in(patches, state, state.static, False, False)  # what is made once is there then
                    self._compiled.compile(count, variates, (patches, state))
        except Exception as error:  # whatever a compiler or its absence brings: streaming can do without
            self._compiled = None
            reason = str(error).strip().splitlines() or [type(error).__name__]
            warnings.warn(f"the model streams uncompiled, since compiling failed: {reason[0]}", stacklevel=2)
        finally:
            self.train(training)
        return self._compiled is not None

    def _example(self, series: int, variates: int) -> tuple[Patches, ForecasterState]:
        """A patch and a state such as a stream has them."""
        state = self.initial_state(series, variates)
        batch = self._unobserved(state, self.patch_size, None)
        patches, _ = self.patcher(batch, state.patching)
        return patches, state

    def _compiled_for(self, series: int, variates: int) -> CompiledSteps | None:
        compiled = self._compiled
        if compiled is None or (series, variates) not in compiled.sizes or self.training or torch.is_grad_enabled():
            return None
        return compiled

    # ---- states -----------------------------------------------------------------------------------------------------

    def initial_state(self, series: int, variates: int, *, device: torch.device | str | None = None) -> ForecasterState:
        """Nothing seen yet: what `state=None` stands for. All leaves are zeros."""
        device = device or self.head.hidden.weight.device
        dtype = self.head.hidden.weight.dtype
        rows = self.backbone.initial_state(series * variates, device)
        counter = torch.zeros(series, dtype=torch.int64, device=device)
        return ForecasterState(
            self.patcher.initial_state(series, variates, device),
            self.memory.initial_state(series, variates, device),
            self.scaler.initial_state(series, variates, device),
            map_state(lambda leaf: leaf.unflatten(0, (series, variates)), rows),
            torch.zeros(series, variates, self.width, dtype=dtype, device=device),
            torch.zeros(series, len(self.config["static_cardinalities"]), dtype=torch.int64, device=device),
            counter,
            counter.clone(),
        )

    def prime(self, past: Past) -> ForecasterState:
        """The state that a window inside a series starts from: the statistics that a stream holds there."""
        fresh = self.initial_state(*past.count.shape, device=past.count.device)
        return fresh._replace(
            seasonal=SeasonalState(past.seasonal, past.seasonal_seen),
            scaling=ScalingState(past.count, past.mean, past.m2, past.lag_count, past.lag_square),
        )

    def elapse(
        self,
        state: ForecasterState,
        steps: int,
        *,
        known: Callable[[int, int], Float[Tensor, "B F columns"]] | None = None,
    ) -> ForecasterState:
        """Silence: the state after `steps` steps without a value, in O(1), equal to streaming them.

        Args:
            state: of any series.
            steps: at least 0.
            known: gives the known features of the steps [a, b) after the last one seen.
        """
        if steps < 0:
            raise ValueError(f"steps is {steps}; time does not run backwards")
        P = self.patch_size
        # afterwards every series has been silent for more than `gap_tokens` patches: nothing enters any more
        first = min(steps, (self.gap_tokens + 2) * P)
        state = self._silence_by_steps(state, 0, first, known)
        whole = (steps - first) // P
        if whole:
            patching = state.patching._replace(steps=state.steps + whole * P)
            state = state._replace(patching=patching, silent=state.silent + whole, skipped=state.skipped + whole)
            if known is not None:
                state = self._refresh_known(state, first + whole * P, known)
        return self._silence_by_steps(state, first + whole * P, steps - first - whole * P, known)

    def _silence_by_steps(
        self, state: ForecasterState, at: int, steps: int, known: Callable[[int, int], Tensor] | None
    ) -> ForecasterState:
        if steps == 0:
            return state
        columns = None if known is None else known(at, at + steps + self.span)
        _, state = self.forward(self._unobserved(state, steps, columns), state, read=state.steps[:0])
        return state

    def _refresh_known(self, state: ForecasterState, at: int, known: Callable[[int, int], Tensor]) -> ForecasterState:
        """The known features of the unfinished patch and beyond, after a jump of whole patches."""
        held = state.patching.known
        ahead = known(at - self.patch_size + 1, at + self.span)  # the unfinished patch began at most P - 1 steps ago
        index = (
            torch.arange(held.shape[-1], device=held.device)
            + (self.patch_size - 1)
            - (state.steps % self.patch_size)[:, None]
        )
        found = ahead.gather(-1, index.clamp(max=ahead.shape[-1] - 1)[:, None].expand_as(held))
        inside = (index < ahead.shape[-1])[:, None]
        found = torch.where(inside, found.to(held.dtype), torch.zeros((), dtype=held.dtype, device=held.device))
        return state._replace(patching=state.patching._replace(known=found))

    def _unobserved(
        self, state: ForecasterState, steps: int, known: Tensor | None, lengths: Tensor | None = None
    ) -> Batch:
        shape = (*state.patching.values.shape[:2], steps)
        device = state.steps.device
        return Batch(
            torch.zeros(shape, dtype=torch.float64, device=device),
            torch.zeros(shape, dtype=torch.bool, device=device),
            known,
            lengths=lengths,
        )

    # ---- forecasts --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def forecast(
        self, state: ForecasterState, horizon: int, *, known: Float[Tensor, "B F columns"] | None = None
    ) -> Float64[Tensor, "B V horizon Q"]:
        """Quantiles of the next `horizon` steps, in the unit of the series. The state is not changed.

        Up to `direct_steps` in one pass; beyond, a copy of the state steps on through unobserved patches, and a step is
        taken from the first of its tokens that reaches it.

        Args:
            state: of any series, each anywhere in its patch.
            horizon: at least 1.
            known: known features from the first forecast step on; they fill what the state does not hold.

        Returns:
            Increasing along Q; NaN for a variate of which nothing has been observed.
        """
        if horizon < 1:
            raise ValueError(f"horizon is {horizon}; it must be at least 1")
        P, S = self.patch_size, self.span
        # a series at a patch end needs its last token only, unless silence has kept newer patches out;
        # on the host, where a comparison is cheaper than a launch
        taken, skipped = torch.stack([state.steps, state.skipped]).numpy(force=True)
        waits = (taken % P > 0) | (skipped > 0) | (taken == 0)
        begins = np.where(waits, taken % P, P)
        least, most = (int(begins.min()), int(begins.max())) if len(begins) else (P, P)
        some, every = bool(waits.any()), bool(waits.all())
        pending, begin = (torch.from_numpy(x).to(state.steps.device) for x in (waits, begins))
        rollout = max(0, -(-(most + horizon - S) // P))
        # which steps of a token are computed depends on no other series: nor do the bits of a row
        asked = min(S, P + horizon)

        end, future = state, None
        if some or rollout:
            future = self._future_known(state, known, (rollout + 1) * P + S)
        if some and future is not None:
            lengths = torch.where(pending, P - begin, 0)
            closing = self._unobserved(state, P, future[..., : P + S], lengths)
            closed, end = self._advance(closing, state, as_tokens=True)
            window, first = self._window(closed, slice(0, asked)), 0
            if not every:
                late = torch.where(pending[:, None, None, None], window[:, :, P:], self._read(state, slice(P, asked)))
                window = torch.cat([window[:, :, :P], late], 2)
        else:
            window, first = self._read(state, slice(P, asked)), P

        parts = [window]
        if rollout and future is not None:
            # `future` starts at the first forecast step, the copy now stands at `ahead` steps after it
            ahead = torch.where(pending, P - begin, 0)
            for i in range(rollout):
                index = (ahead + i * P)[:, None] + torch.arange(P + S, device=begin.device)
                index = index.clamp(max=future.shape[-1] - 1)[:, None].expand(-1, future.shape[1], -1)
                step = self._unobserved(state, P, future.gather(-1, index))
                token, end = self._advance(step, end, as_tokens=True)
                parts.append(self._window(token, slice(S - P, S)))
        steps = torch.cat(parts, 2) if rollout else window
        if least < most:
            index = (begin - first)[:, None] + torch.arange(horizon, device=begin.device)
            steps = steps.gather(2, index[:, None, :, None].expand(-1, steps.shape[1], -1, steps.shape[-1]))
        else:
            steps = steps[:, :, least - first : least - first + horizon]
        known_at_all = (state.scaling.count + state.patching.observed.sum(-1)) > 0
        return steps if bool(known_at_all.all()) else torch.where(known_at_all[..., None, None], steps, torch.nan)

    def _window(self, token: Tokens | None, steps: slice) -> Float64[Tensor, "B V asked Q"]:
        """Some steps of the forecast of each series' only token."""
        assert token is not None  # a whole patch was taken in
        compiled = self._compiled_for(*token.mixed.shape[:2])
        if compiled is not None:
            return compiled.window(token)[:, :, steps]
        return self._window_of(token, steps)

    def _window_of(self, token: Tokens, steps: slice | None = None) -> Float64[Tensor, "B V asked Q"]:
        values, loc, scale, _, _ = self.head(*token, steps)
        return torch.addcmul(loc[:, :, 0, None, None], scale[:, :, 0, None, None], values[:, :, 0].double())

    def _read(self, state: ForecasterState, steps: slice) -> Float64[Tensor, "B V asked Q"]:
        """The forecast of the last token, read off the state."""
        compiled = self._compiled_for(*state.readout.shape[:2])
        if compiled is not None:
            return compiled.read(state)[:, :, steps]
        return self._read_of(state, steps)

    def _read_of(self, state: ForecasterState, steps: slice | None = None) -> Float64[Tensor, "B V asked Q"]:
        anchors, has_anchor = self.memory.anchors_at(state.steps, state.seasonal)
        scales = scales_of(*(leaf[:, :, None] for leaf in state.scaling))
        valid = torch.ones_like(state.steps[:, None], dtype=torch.bool)
        token = Tokens(state.readout[:, :, None], scales, anchors[:, :, None], has_anchor[:, :, None], valid)
        return self._window_of(token, steps)

    def _future_known(self, state: ForecasterState, known: Tensor | None, columns: int) -> Float[Tensor, "B F columns"]:
        """Known features from the first forecast step on: what the state holds, then what is given, else NaN."""
        held = state.patching.known
        B, F = held.shape[:2]
        P, S = self.patch_size, self.span
        future = torch.full((B, F, columns), torch.nan if F else 0.0, dtype=held.dtype, device=held.device)
        index = (state.steps % P)[:, None] + torch.arange(S, device=held.device)
        # before the first step the state holds no features yet
        started = (state.steps > 0)[:, None, None]
        future[..., :S] = torch.where(started, held.gather(-1, index[:, None].expand(-1, F, -1)), future[..., :S])
        if known is not None:
            if known.shape[:2] != (B, F):
                raise ValueError(f"known is {tuple(known.shape)}; expected {B} series of {F} features")
            width = min(columns, known.shape[-1])
            lacking = future[..., :width].isnan()
            future[..., :width] = torch.where(lacking, known[..., :width].to(held.dtype), future[..., :width])
        return future

    def _no_tokens(self, B: int, V: int, like: Tensor) -> Quantiles:
        device, dtype = like.device, self.head.hidden.weight.dtype
        none = torch.zeros(B, V, 0, dtype=torch.float64, device=device)
        values = torch.zeros(B, V, 0, self.span, len(self.quantile_levels), dtype=dtype, device=device)
        return Quantiles(values, none, none, none, torch.zeros(B, 0, dtype=torch.bool, device=device))
