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

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, final

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor, nn

from tsgdn.model.backbone import Backbone
from tsgdn.model.embedding import Embedding
from tsgdn.model.heads import QuantileHead
from tsgdn.model.patching import Patcher, PatchingState
from tsgdn.model.scaling import CausalScaler, ScalingState, scales_of
from tsgdn.model.seasonal import SeasonalMemory, SeasonalState
from tsgdn.streamable import map_state
from tsgdn.types import QUANTILE_LEVELS, Batch, Past, Quantiles


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
        return self._advance(batch, state, read, as_tokens=False)

    def _advance(
        self, batch: Batch, state: ForecasterState | None, read: Tensor | None, *, as_tokens: bool
    ) -> tuple[Quantiles, ForecasterState]:
        """`forward`; `as_tokens` lets empty patches enter however long the silence: a forecast's own tokens."""
        B, V, _ = batch.values.shape
        device = batch.values.device
        begins = state is None
        if state is None:
            state = self.initial_state(B, V, device=device) if batch.past is None else self.prime(batch.past)
        static = state.static if batch.static is None else batch.static
        patches, patching = self.patcher(batch, None if begins else state.patching)
        N = patches.values.shape[2]
        if N == 0:
            empty = self._no_tokens(B, V, batch.values)
            return empty, state._replace(patching=patching, static=static)

        views, seasonal = self.memory(patches.values, patches.observed, patches.start, state.seasonal)
        scales, scaling = self.scaler(
            patches.values, patches.observed, views.predecessors, views.has_predecessor, state.scaling
        )
        before = scales_of(*state.scaling)
        # scale 0 says that nothing had been seen by then
        seen_scale = [torch.where(part.count > 0, part.scale, 0.0) for part in (before, scales)]
        previous = (
            torch.cat([before.loc[..., None], scales.loc[..., :-1]], -1),
            torch.cat([seen_scale[0][..., None], seen_scale[1][..., :-1]], -1),
        )
        enters, gap, silent, skipped = self._silence(patches.observed, patches.valid, state, as_tokens)
        tokens = self.embedding(patches.values, patches.observed, views, scales, previous, patches.known, gap, static)
        writes = patches.observed.any(-1).to(tokens.dtype)
        mixed, backbone, readout = self._mix(tokens, writes, enters, gap, state)

        read = torch.arange(N, device=device) if read is None else read.to(device)
        valid = enters[:, read]
        if read.numel():
            at = type(scales)(*(leaf[:, :, read] for leaf in scales))
            quantiles = self.head(mixed[:, :, read], at, views.anchors[:, :, read], views.has_anchor[:, :, read], valid)
        else:
            quantiles = self._no_tokens(B, V, batch.values)
        return quantiles, ForecasterState(patching, seasonal, scaling, backbone, readout, static, silent, skipped)

    def _silence(
        self, observed: Bool[Tensor, "B V N P"], valid: Bool[Tensor, "B N"], state: ForecasterState, as_tokens: bool
    ) -> tuple[Bool[Tensor, "B N"], Int64[Tensor, "B N"], Int64[Tensor, " B"], Int64[Tensor, " B"]]:
        """Which patches enter as tokens, the silence that was skipped before each, and the two counters after."""
        place = torch.arange(1, valid.shape[1] + 1, device=valid.device)
        seen = observed.any(-1).any(1)
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
        writes: Float[Tensor, "B V N"],
        enters: Bool[Tensor, "B N"],
        gap: Int64[Tensor, "B N"],
        state: ForecasterState,
    ) -> tuple[Float[Tensor, "B V N D"], tuple[Any, ...], Float[Tensor, "B V D"]]:
        """Runs the backbone over the tokens that enter, moved to the front, and puts its outputs back in place."""
        V, D = tokens.shape[1], tokens.shape[3]
        order = torch.argsort(~enters, dim=1, stable=True)
        lengths = enters.sum(1)

        def per_row(x: Tensor) -> Tensor:
            return x[:, None].expand(-1, V, *x.shape[1:]).flatten(0, 1)

        def rearrange(x: Tensor, to: Tensor) -> Tensor:
            index = to[:, None].expand(-1, V, -1)
            return x.gather(2, index if x.dim() == 3 else index[..., None].expand(-1, -1, -1, D))

        mixed, rows = self.backbone(
            rearrange(tokens, order),
            map_state(lambda leaf: leaf.flatten(0, 1), state.backbone),
            write=rearrange(writes, order).flatten(0, 1),
            gap=per_row(gap.gather(1, order).to(tokens.dtype)),
            lengths=per_row(lengths),
        )
        last = (lengths - 1).clamp(min=0)[:, None, None, None].expand(-1, V, 1, D)
        readout = torch.where(lengths[:, None, None] > 0, mixed.gather(2, last)[:, :, 0], state.readout)
        backbone = map_state(lambda leaf: leaf.unflatten(0, (-1, V)), rows)
        return rearrange(mixed, torch.argsort(order, dim=1)), backbone, readout

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
        phase = state.steps % P
        rollout = max(0, -(-(horizon - self.direct_steps) // P))
        future = self._future_known(state, known, (rollout + 1) * P + S)

        # a series at a patch end needs its last token only, unless silence has kept newer patches out
        pending = (phase > 0) | (state.skipped > 0) | (state.steps == 0)
        end = state
        if bool(pending.any()):
            lengths = torch.where(pending, P - phase, 0)
            closing = self._unobserved(state, P, future[..., : P + S], lengths)
            closed, end = self._advance(closing, state, None, as_tokens=True)
            window = closed.unscaled()[:, :, 0]
            if not bool(pending.all()):
                window = torch.where(pending[:, None, None, None], window, self._read(state))
        else:
            window = self._read(state)
        begin = torch.where(pending, phase, P)

        # `future` starts at the first forecast step, the copy now stands at `ahead` steps after it
        ahead = torch.where(pending, P - phase, 0)
        parts = [window]
        for i in range(rollout):
            index = (ahead + i * P)[:, None] + torch.arange(P + S, device=phase.device)
            columns = future.gather(-1, index.clamp(max=future.shape[-1] - 1)[:, None].expand(-1, future.shape[1], -1))
            step = self._unobserved(state, P, columns)
            quantiles, end = self._advance(step, end, None, as_tokens=True)
            parts.append(quantiles.unscaled()[:, :, 0, -P:])
        steps = torch.cat(parts, 2)
        index = (begin[:, None] + torch.arange(horizon, device=phase.device))[:, None, :, None]
        steps = steps.gather(2, index.expand(-1, steps.shape[1], -1, steps.shape[-1]))
        known_at_all = state.scaling.count + state.patching.observed.sum(-1)
        return torch.where((known_at_all > 0)[..., None, None], steps, torch.nan)

    def _read(self, state: ForecasterState) -> Float64[Tensor, "B V S Q"]:
        """The forecast of the last token, read off the state."""
        anchors, has_anchor = self.memory.anchors_at(state.steps, state.seasonal)
        scales = scales_of(*(leaf[:, :, None] for leaf in state.scaling))
        valid = torch.ones_like(state.steps[:, None], dtype=torch.bool)
        quantiles = self.head(state.readout[:, :, None], scales, anchors[:, :, None], has_anchor[:, :, None], valid)
        return quantiles.unscaled()[:, :, 0]

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
