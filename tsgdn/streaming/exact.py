"""Whether calls of one size give a row the same bits wherever it stands.

Matrix products of libraries split rows among kernels by shape: with narrow or odd layers the sums of a row may be
taken in another order at another place. So the promise of `exact=True` is tried on the device before it is made.
"""

import torch

from tsgdn.model.forecaster import Forecaster
from tsgdn.streamable import state_leaves, take_rows
from tsgdn.types import Batch


@torch.no_grad()
def rows_are_independent(model: Forecaster, rows: int, variates: int) -> bool:
    """Streams patches of noise and forecasts, with the rows in several orders, and compares bit by bit.

    Args:
        model: in evaluation mode.
        rows: series per call.
        variates: of each series.
    """
    P, S, F = model.patch_size, model.span, model.known_features
    device = model.head.hidden.weight.device
    noise = torch.Generator().manual_seed(0)
    values = torch.randn(3, rows, variates, P, generator=noise, dtype=torch.float64).to(device)
    known = torch.randn(3, rows, F, P + S, generator=noise).to(device)
    lengths = torch.full((rows,), P, device=device)

    def run(order: torch.Tensor) -> list[torch.Tensor]:
        state = model.initial_state(rows, variates, device=device)
        for patch, columns in zip(values, known, strict=True):
            there = torch.ones_like(patch, dtype=torch.bool)
            batch = Batch(patch[order], there, columns[order], lengths=lengths)
            _, state = model(batch, state, read=lengths[:0])
        forecast = model.forecast(state, model.direct_steps + P)
        back = torch.argsort(order)
        return [forecast[back], *(leaf for _, leaf in state_leaves(take_rows(state, back)))]

    straight = torch.arange(rows, device=device)
    orders = (straight.flip(0), straight.roll(1), torch.randperm(rows, generator=noise).to(device))
    first = run(straight)
    return all(torch.equal(a, b) for order in orders for a, b in zip(first, run(order), strict=True))
