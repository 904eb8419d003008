"""Steps to patches: (B, V, T) -> (B, V, N, P), on one grid that is anchored at the first step of the stream.

The state holds the unfinished patch. Series of one call may stand at different places of their patches and may bring
different numbers of steps; a gather aligns them, so that no caller has to group series by phase.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from tsgdn.types import Batch


class PatchingState(NamedTuple):
    """The unfinished patch.

    Attributes:
        steps: steps seen since the stream began; modulo P the cells of the unfinished patch.
        values: its cells, 0 where not seen.
        observed: likewise, False.
        known: known features from the first step of the unfinished patch on.
    """

    steps: Int64[Tensor, " B"]
    values: Float64[Tensor, "B V P"]
    observed: Bool[Tensor, "B V P"]
    known: Float[Tensor, "B F K_plus_2_P"]


class Patches(NamedTuple):
    """The patches that were completed.

    Attributes:
        values: 0 where not observed.
        observed: False also in patches that are not valid.
        known: features of the token's own patch and of the next K.
        valid: series have different numbers of patches in a call; theirs come first.
        start: step at which the first patch begins.
    """

    values: Float64[Tensor, "B V N P"]
    observed: Bool[Tensor, "B V N P"]
    known: Float[Tensor, "B F N S"]
    valid: Bool[Tensor, "B N"]
    start: Int64[Tensor, " B"]


class Patcher:
    """Cuts streams into patches of `patch_size` steps; a token sees known features `span` steps ahead."""

    def __init__(self, patch_size: int, patches_ahead: int, known_features: int):
        self.patch_size = patch_size
        self.span = (patches_ahead + 1) * patch_size
        self.known_features = known_features

    def initial_state(self, series: int, variates: int, device: torch.device | str | None = None) -> PatchingState:
        """Nothing seen yet."""
        P = self.patch_size
        return PatchingState(
            torch.zeros(series, dtype=torch.int64, device=device),
            torch.zeros(series, variates, P, dtype=torch.float64, device=device),
            torch.zeros(series, variates, P, dtype=torch.bool, device=device),
            torch.zeros(series, self.known_features, self.span + P, device=device),
        )

    def __call__(self, batch: Batch, state: PatchingState | None) -> tuple[Patches, PatchingState]:
        """Completes as many patches as the steps allow.

        Raises:
            ValueError: the shapes of the batch disagree with each other or with the state.
        """
        B, V, T = batch.values.shape
        P, S = self.patch_size, self.span
        device = batch.values.device
        known = self._known_of(batch)
        values = torch.where(batch.observed, batch.values.double(), 0.0)
        observed = batch.observed
        begins = state is None
        if state is None:
            state = self.initial_state(B, V, device)
        elif state.values.shape[:2] != (B, V):
            raise ValueError(
                f"the batch has {B} series of {V} variates, the state {tuple(state.values.shape[:2])}: "
                "a state continues the same series, in the same order"
            )
        lengths = torch.full_like(state.steps, T) if batch.lengths is None else batch.lengths
        phase = state.steps % P
        total = phase + lengths
        patches = total // P
        # at the start of a stream no look at the device: training never waits for it
        N = T // P if begins or not B else int(patches.max())

        def stream(
            before: Tensor, after: Tensor, begin: Int64[Tensor, " B"], length: int, end: Int64[Tensor, " B"]
        ) -> Tensor:
            """`length` entries from `begin` of what a row holds (first `phase`), then brings; zeros from `end` on."""
            index = begin[:, None] + torch.arange(length, device=device)
            source = torch.where(index < phase[:, None], index, index - phase[:, None] + before.shape[-1])
            joined = torch.cat([before, after.to(before.dtype)], -1)
            inside = (index < end[:, None])[:, None]
            source = source.clamp(max=joined.shape[-1] - 1)[:, None].expand(-1, joined.shape[1], -1)
            return torch.where(inside, joined.gather(-1, source), torch.zeros((), dtype=joined.dtype, device=device))

        zero = torch.zeros_like(phase)
        whole = patches * P
        done = Patches(
            stream(state.values, values, zero, N * P, whole).unflatten(-1, (N, P)),
            stream(state.observed, observed, zero, N * P, whole).unflatten(-1, (N, P)),
            self._windows(stream(state.known, known, zero, max(N - 1, 0) * P + S, total + S), N),
            torch.arange(N, device=device) < patches[:, None],
            state.steps - phase,
        )
        rest = PatchingState(
            state.steps + lengths,
            stream(state.values, values, whole, P, total),
            stream(state.observed, observed, whole, P, total),
            stream(state.known, known, whole, S + P, total + S),
        )
        return done, rest

    def _known_of(self, batch: Batch) -> Float[Tensor, "B F T_and_S"]:
        B, _, T = batch.values.shape
        expected = (B, self.known_features, T + self.span)
        if batch.observed.shape != batch.values.shape:
            raise ValueError(f"values {tuple(batch.values.shape)} and observed {tuple(batch.observed.shape)} differ")
        if batch.known is None:
            fill = float("nan") if self.known_features else 0.0
            return torch.full(expected, fill, device=batch.values.device)
        if tuple(batch.known.shape) != expected:
            raise ValueError(
                f"known is {tuple(batch.known.shape)}, expected {expected}: the {self.known_features} features of the "
                f"{T} steps and of the {self.span} steps after them"
            )
        return batch.known

    def _windows(self, known: Float[Tensor, "B F steps"], N: int) -> Float[Tensor, "B F N S"]:
        if N == 0:
            return known.new_zeros(*known.shape[:2], 0, self.span)
        return known.unfold(-1, self.span, self.patch_size)
