"""Forecasts after every step of a stream in one pass, and their correction by what has come true."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64

from tsgdn.data.series import Series
from tsgdn.data.windows import Cut, Cutter
from tsgdn.model.forecaster import Forecaster
from tsgdn.streamable import join_rows, take_rows
from tsgdn.streaming import adapt
from tsgdn.streaming.adapt import Learning


def every_origin(
    model: Forecaster,
    series: Sequence[Series],
    horizon: int,
    *,
    at: Sequence[int] | np.ndarray | None = None,
    calendar: bool = False,
    piece: int = 2048,
) -> Iterator[tuple[Int64[np.ndarray, " n"], Float64[np.ndarray, "n V horizon Q"]]]:
    """Forecasts after every step of series that move together, or after some of them, in one pass.

    Where P is 1 and no value is missing, every origin is the end of a token, and the parallel path gives them all.
    Elsewhere the stream is walked token by token; the P - 1 origins inside a patch are copies that take its first
    cells, and copies of many tokens are forecast together.

    Args:
        model: in evaluation mode.
        series: of one length; their variates stand one after the other in what is returned.
        horizon: at most what one pass covers, where P is 1.
        at: origins, as steps seen, at least 1 and increasing; None = all.
        calendar: whether the known features begin with the calendar.
        piece: values taken in at once, at least.

    Yields:
        Origins (steps seen, so forecast step 0 is the step `origin`) and quantiles in the unit of the series.
    """
    device, P = next(model.parameters()).device, model.patch_size
    wanted = np.arange(1, len(series[0]) + 1) if at is None else np.asarray(at)
    last = int(wanted[-1])
    half_life = model.config["half_life"]
    cutter = Cutter(series, span=model.span, seasons=model.seasons, calendar=calendar, half_life=half_life)
    B = len(series)
    parallel = P == 1 and horizon <= model.direct_steps and all(np.isfinite(s.values[:, :last]).all() for s in series)
    state: Any = None
    if parallel:
        rows = B * len(series[0].values)
        for begin in range(0, last, length := max(1, piece // rows)):
            end = min(begin + length, last)
            origins = np.arange(begin + 1, end + 1)
            read = np.flatnonzero(np.isin(origins, wanted))
            batch = _next(cutter, B, begin, end, state).to(device)
            with torch.no_grad():  # not around a yield: whoever asked may be training
                found, state = model(batch, state, read=torch.from_numpy(read))
            if len(read):
                values = found.unscaled()[:, :, :, P : P + horizon].permute(2, 0, 1, 3, 4).flatten(1, 2)
                yield origins[read], values.cpu().numpy()
        return
    held: list[Any] = []
    steps: list[int] = []

    @torch.no_grad()
    def forecasts() -> tuple[np.ndarray, np.ndarray]:
        places = [(b, step) for step in steps for b in range(B)]
        known = cutter.ahead(places, horizon + model.span + P)
        values = model.forecast(join_rows(held), horizon, known=None if known is None else known.to(device))
        return np.array(steps), values.unflatten(0, (len(steps), B)).flatten(1, 2).cpu().numpy()

    for begin in range(0, last + 1, P):
        inside = np.flatnonzero(np.isin(np.arange(begin, begin + P), wanted))
        if len(inside) and inside[0] == 0:
            held.append(state)
        if len(cells := inside[inside > 0]):  # the first cells of the patch, on copies side by side
            copies = None if state is None else take_rows(state, torch.arange(B, device=device).repeat(len(cells)))
            batch = cutter.batch([Cut(b, begin, begin + int(p)) for p in cells for b in range(B)], past=False)
            batch = batch if state is None else batch._replace(static=None)
            held.append(_after(model, batch.to(device), copies))
        steps += (begin + inside).tolist()
        if len(steps) * B >= piece:
            yield forecasts()
            held, steps = [], []
        if begin + P <= last:
            state = _after(model, _next(cutter, B, begin, begin + P, state).to(device), state)
    if steps:
        yield forecasts()


@torch.no_grad()
def _after(model: Forecaster, batch: Any, state: Any) -> Any:
    """The state after a batch."""
    return model(batch, state, read=torch.zeros(0, dtype=torch.long))[1]


def _next(cutter: Cutter, rows: int, begin: int, end: int, state: Any) -> Any:
    """The steps [begin, end) of all series; categories only when the stream starts."""
    batch = cutter.batch([Cut(b, begin, end) for b in range(rows)], past=False)
    return batch if state is None else batch._replace(static=None)


# ---- corrections -----------------------------------------------------------------------------------------------------


class Corrector:
    """Corrects the mean of each variate and lead from the forecasts that have come true, and only if that has helped.

    The residual of a forecast is regressed (`tsgdn.streaming.adapt`) on what was known when it was issued: a constant,
    its own height, where the last value, the last two seasons and the mean of a season lay beside it, the newest
    residual of its lead, that of its lead one season earlier, the newest of lead 1, and how far the last value has
    moved from some before it. Windows of lead h overlap in h - 1 steps, so a residual counts 1/h. The correction is
    applied where, over the residuals seen so far, it has a smaller decayed squared error than no correction.

    Args:
        scale: per variate; residuals are in units of it.
        centre: per variate, of the height.
        horizon: leads.
        seasonality: m.
        learning: forgetting, prior and limit; `features` is set here.
        every: origins between two solutions.
    """

    FEATURES = 12
    LAGS = (1, 2, 4)

    def __init__(
        self,
        *,
        scale: Float[np.ndarray, " V"],
        centre: Float[np.ndarray, " V"],
        horizon: int,
        seasonality: int,
        learning: Learning | None = None,
        every: int = 1,
    ) -> None:
        given = Learning() if learning is None else learning
        self.learning = adapt.check_learning(given._replace(features=self.FEATURES - 1))
        self.scale, self.centre, self.horizon = np.asarray(scale, float), np.asarray(centre, float), horizon
        self.seasonality, self.every = seasonality, every
        V, H, D = len(self.scale), horizon, self.FEATURES
        self.state = adapt.empty(1, V, H, D)
        self.contest = adapt.empty_contest(1, V, H)
        # What was issued at the last origins: means, corrections and features, by origin modulo the ring.
        self._ring = (
            max(H, seasonality * (-(-H // seasonality) + 1), max(self.LAGS)) + 2
        )  # the oldest that is looked at, two seasons ago
        self._issued = np.full((self._ring, V, H), np.nan)
        self._shift = np.zeros((self._ring, V, H))
        self._features = np.zeros((self._ring, V, H, D))
        self._residual = np.full((self._ring, V, H), np.nan)  # of the targets at a step, by step modulo the ring
        self._values = np.full((self._ring, V), np.nan)
        self._begun: int | None = None
        self._leads = np.arange(1, H + 1)
        self._share = 1 / np.sqrt(self._leads)

    def correct(
        self, origin: int, newest: Float[np.ndarray, " V"], mean: Float[np.ndarray, "V H"]
    ) -> Float64[np.ndarray, "V H"]:
        """Takes in the value of the step before `origin`, and says what to add to the forecast made there.

        Args:
            origin: steps seen; each call has the next one.
            newest: value of step `origin - 1`, in the unit of the series; NaN = missing.
            mean: frozen forecast of the steps from `origin` on.
        """
        here = (np.asarray(newest, float) - self.centre) / self.scale
        frozen = (np.asarray(mean, float) - self.centre[:, None]) / self.scale[:, None]
        self._observe(origin - 1, here)
        x = self._describe(origin, frozen)
        shift = (self.state.weights[0] * x).sum(-1)
        frozen_error, adapted_error = np.moveaxis(adapt.standings(self.contest)[0], -1, 0)[:2]
        with np.errstate(invalid="ignore"):
            used = np.where(adapted_error < frozen_error, shift, 0.0)
        slot = origin % self._ring
        self._issued[slot], self._shift[slot], self._features[slot] = frozen, shift, x
        return used * self.scale[:, None]

    def _observe(self, step: int, value: np.ndarray) -> None:
        """What `step` was: the forecasts issued 1, 2, ... origins before are scored, and learned from."""
        leads = self._leads
        if self._begun is None:
            self._begun = step + 1
        issued = step - leads + 1  # origin of the forecast whose lead h is this step
        there = issued >= self._begun
        slots = issued % self._ring
        index = leads - 1
        residual = np.where(there, value[:, None] - self._issued[slots, :, index].T, np.nan)
        self._residual[step % self._ring] = residual
        self._values[step % self._ring] = value
        seen = np.isfinite(residual)
        if not seen.any():
            return
        clean = np.where(seen, residual, 0.0)
        shifted = clean - self._shift[slots, :, index].T
        errors = np.stack([clean**2, shifted**2, np.zeros_like(clean)], -1)
        self.contest = adapt.compare(self.contest, errors[None], seen[None], decay=self.learning.forget)
        features = self._features[slots, :, index].transpose(1, 0, 2)
        weighed = clean * self._share, features * self._share[:, None]
        self.state = adapt.collect(self.state, weighed[0][None], weighed[1][None], seen[None], self.learning)
        if step % self.every == 0:
            self.state = adapt.consume(self.state, self.learning)

    def _describe(self, origin: int, frozen: np.ndarray) -> np.ndarray:
        """The features (V, H, D) of the forecasts issued at `origin`."""
        m, leads = self.seasonality, self._leads
        newest = origin - 1
        season = origin + leads - 1 - m * -(-leads // m)  # same phase, at most a season before the origin
        slots = season % self._ring
        last = self._values[newest % self._ring]
        last_season = self._values[slots].T
        before = self._values[(season - m) % self._ring].T
        level = self._values[(newest - np.arange(m)) % self._ring].mean(0)[:, None]
        # the residual at that step, of the forecast with the same lead
        same_phase = self._residual[slots, :, leads - 1].T
        recent = self._residual[newest % self._ring]
        found = np.stack(
            [
                np.ones_like(frozen),
                last[:, None] - frozen,
                last_season - frozen,
                before - frozen,
                level - frozen,
                frozen,
                recent,
                same_phase,
                np.broadcast_to(recent[:, :1], frozen.shape),
                *(
                    np.broadcast_to((self._values[(newest - k) % self._ring] - last)[:, None], frozen.shape)
                    for k in self.LAGS
                ),
            ],
            -1,
        )
        return np.where(np.isfinite(found), found, 0.0)
