"""Steps to patches: (B, V, T) -> (B, V, N, P), on one grid that is anchored at the first step of the stream.

The state holds the unfinished patch. Series of one call may stand at different places of their patches and may bring
different numbers of steps; a gather aligns them, so that no caller has to group series by phase. Where all stand at one
place and bring as many steps, slices do the same.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
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
        full: known without a look at the device: every series has all N patches.
    """

    values: Float64[Tensor, "B V N P"]
    observed: Bool[Tensor, "B V N P"]
    known: Float[Tensor, "B F N S"]
    valid: Bool[Tensor, "B N"]
    start: Int64[Tensor, " B"]
    full: bool


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
        together = None
        if not begins:
            together = _together(state.steps, batch.lengths, T, P)
        elif batch.lengths is None:  # at the start of a stream no look at the device: training never waits for it
            together = 0, T
        if together is not None:
            return self._together(values, observed, known, state, *together)

        phase = state.steps % P
        lengths = torch.full_like(state.steps, T) if batch.lengths is None else batch.lengths
        total = phase + lengths
        patches = total // P
        N = T // P if begins else int(patches.max())

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
            False,
        )
        rest = PatchingState(
            state.steps + lengths,
            stream(state.values, values, whole, P, total),
            stream(state.observed, observed, whole, P, total),
            stream(state.known, known, whole, S + P, total + S),
        )
        return done, rest

    def _together(
        self, values: Tensor, observed: Tensor, known: Tensor, state: PatchingState, at: int, steps: int
    ) -> tuple[Patches, PatchingState]:
        """All series stand `at` one place of their patch and bring as many steps: slices in the place of gathers."""
        P, S = self.patch_size, self.span
        N = (at + steps) // P

        def joined(before: Tensor, after: Tensor, length: int) -> Tensor:
            after = after[..., :length].to(before.dtype)
            return torch.cat([before[..., :at], after], -1) if at else after

        def rest(cells: Tensor, length: int) -> Tensor:
            left = cells[..., N * P :]
            return F.pad(left, (0, length - left.shape[-1]))

        values, observed = joined(state.values, values, steps), joined(state.observed, observed, steps)
        known = joined(state.known, known, steps + S)
        done = Patches(
            values[..., : N * P].unflatten(-1, (N, P)),
            observed[..., : N * P].unflatten(-1, (N, P)),
            self._windows(known[..., : max(N - 1, 0) * P + S], N),
            torch.ones(values.shape[0], N, dtype=torch.bool, device=values.device),
            state.steps - at if at else state.steps,
            True,
        )
        after = PatchingState(state.steps + steps, rest(values, P), rest(observed, P), rest(known, S + P))
        return done, after

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


def _together(
    steps: Int64[Tensor, " B"], lengths: Int64[Tensor, " B"] | None, brought: int, P: int
) -> tuple[int, int] | None:
    """The phase of all series and the steps that each of them brings, if these are the same for all."""
    if not len(steps):
        return 0, brought
    # on the host, where a comparison is cheaper than a launch
    places = (steps if lengths is None else torch.stack([steps, lengths])).numpy(force=True)
    phase, given = (places, None) if lengths is None else places
    phase = phase % P
    if (phase != phase[0]).any() or (given is not None and (given != given[0]).any()):
        return None
    return int(phase[0]), brought if given is None else int(given[0])
