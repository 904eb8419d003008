"""Windows: the past equals a stream's, nothing later enters, padding is on the right, batch i depends on i alone."""

import numpy as np
import pytest
import torch

from tsgdn.data.series import Series
from tsgdn.data.windows import ContiguousSegments, Cut, Cutter, SeriesStatistics, WindowSampler, held_out_cuts
from tsgdn.model.forecaster import Forecaster
from tsgdn.streamable import state_leaves
from tsgdn.types import Batch, Past

SEASONS = (1, 5, 12)


def make_series(length: int = 90, variates: int = 2, seed: int = 0, item_id: str = "a", missing: float = 0.2) -> Series:
    rng = np.random.default_rng(seed)
    values = 1e3 + np.cumsum(rng.normal(size=(variates, length)), 1)
    values[rng.random(values.shape) < missing] = np.nan
    start = np.datetime64("2024-01-01T05", "ns")
    return Series(item_id, start, "h", values, variates=tuple("xyz"[:variates]))


def slow_past(values: np.ndarray, start: int, seasons: tuple[int, ...], half_life: float | None) -> list[np.ndarray]:
    """The same statistics for one variate, by their definitions."""
    seen = [t for t in range(start) if np.isfinite(values[t])]
    weight = {t: 1.0 if half_life is None else 2 ** (-(len(seen) - 1 - i) / half_life) for i, t in enumerate(seen)}
    w, x = np.array([weight[t] for t in seen]), values[seen]
    count = w.sum()
    mean = (w * x).sum() / count if seen else 0.0
    lag_count, lag_square, cells, held = [], [], [], []
    for m in seasons:
        pairs = [(t, [s for s in seen if s < t and (t - s) % m == 0]) for t in seen]
        pairs = [(t, before[-1]) for t, before in pairs if before]
        total = sum(weight[t] for t, _ in pairs)
        lag_count.append(total)
        lag_square.append(sum(weight[t] * (values[t] - values[s]) ** 2 for t, s in pairs) / total if total else 0.0)
        for i in range(m):
            same = [s for s in seen if (s - start - i) % m == 0]
            cells.append(values[same[-1]] if same else 0.0)
            held.append(bool(same))
    m2 = (w * (x - mean) ** 2).sum() if seen else 0.0
    return [np.array(part) for part in (count, mean, m2, lag_count, lag_square, cells, held)]


@pytest.mark.parametrize("half_life", [None, 7.0])
@pytest.mark.parametrize("start", [0, 1, 4, 13, 57, 90])
def test_past_is_what_the_definitions_say(start: int, half_life: float | None) -> None:
    series = make_series()
    past = SeriesStatistics(series.values, SEASONS, half_life).past(start)
    for v, row in enumerate(series.values):
        want = slow_past(row, start, SEASONS, half_life)
        for name, got, expected in zip(Past._fields, past, want, strict=True):
            np.testing.assert_allclose(got[v], expected, rtol=1e-9, atol=1e-9, err_msg=name)


def test_moments_far_from_the_median_keep_their_digits() -> None:
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(size=50) * 1e-3, 1e4 + rng.normal(size=500)])[None]
    past = SeriesStatistics(values, (1,)).past(50)
    np.testing.assert_allclose(past.m2[0], values[0, :50].var() * 50, rtol=1e-5)


@pytest.mark.parametrize("half_life", [None, 20.0])
def test_a_primed_state_holds_what_streaming_the_prefix_leaves(half_life: float | None) -> None:
    series = make_series(96)
    P, start = 4, 60  # a multiple of every season and of P: the phases of the tables agree
    model = Forecaster(
        patch_size=P, patches_ahead=1, seasons=SEASONS, width=8, depth=1, mixer="gru", half_life=half_life
    ).double()
    values = torch.from_numpy(series.values[None, :, :start])
    with torch.no_grad():
        _, streamed = model(Batch(values.nan_to_num(), values.isfinite()))
    cutter = Cutter([series], span=model.span, seasons=SEASONS, half_life=half_life)
    past = cutter.batch([Cut(0, start, 80)]).past
    assert past is not None
    primed = model.prime(past)
    for part in ("scaling", "seasonal"):
        want = dict(state_leaves(getattr(streamed, part)))
        for name, leaf in state_leaves(getattr(primed, part)):
            torch.testing.assert_close(leaf, want[name], rtol=1e-9, atol=1e-9, msg=f"{part}.{name}")


def test_nothing_after_the_end_of_a_series_or_before_its_range_enters() -> None:
    series = make_series(60, 1, missing=0.0)
    changed = Series("a", series.start, "h", np.where(np.arange(60) >= 40, np.nan, series.values), variates=("x",))
    options = {"span": 8, "seasons": (1, 5), "calendar": True}
    one, other = (
        Cutter([s.slice(0, 40)], **options).batch([Cut(0, 10, 34), Cut(0, 20, 40)]) for s in (series, changed)
    )
    for name in ("values", "observed", "known", "lengths", "target"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=0, atol=0, equal_nan=True)


def test_padding_is_on_the_right_and_is_unobserved() -> None:
    cutter = Cutter([make_series(30, 1, missing=0.0), make_series(9, 1, 1, missing=0.0)], span=8, seasons=(1,))
    batch = cutter.batch([Cut(0, 6, 30), Cut(1, 0, 9)])
    assert batch.lengths is not None
    assert batch.lengths.tolist() == [24, 9]
    assert batch.observed[0].all()
    assert batch.observed[1, :, :9].all()
    assert not batch.observed[1, :, 9:].any()
    assert batch.target is not None
    assert batch.target[1, :, 9:].isnan().all()
    assert batch.values.isfinite().all()


def test_a_gap_is_hidden_from_the_model_but_not_from_the_loss() -> None:
    batch = Cutter([make_series(30, 1, missing=0.0)], span=8, seasons=(1,)).batch([Cut(0, 0, 24, gap=(5, 9))])
    assert batch.target is not None
    assert not batch.observed[..., 5:9].any()
    assert batch.observed.sum() == 20
    assert batch.target.isfinite().all()


def test_known_features_reach_beyond_the_window_and_are_nan_where_nobody_gave_them() -> None:
    series = make_series(30, 1)
    series = Series("a", series.start, "h", series.values, known=np.arange(33.0)[None], variates=("x",))
    cutter = Cutter([series], span=8, seasons=(1,), calendar=True)
    batch = cutter.batch([Cut(0, 10, 26), Cut(0, 20, 30)])
    assert batch.known is not None
    assert batch.known.shape == (2, cutter.known_features, 16 + 8)
    assert batch.known[0, -1, :23].tolist() == list(range(10, 33))
    assert batch.known[0, -1, 23:].isnan().all()
    assert batch.known[1, :-1, : 10 + 8].isfinite().all()
    assert batch.known[1, :, 18:].isnan().all()
    calendar = series.clock.calendar(series.start, 10, 34)
    np.testing.assert_array_equal(batch.known[0, :-1].numpy(), calendar)


def test_past_covariates_are_seen_and_not_scored() -> None:
    series = make_series(variates=3, missing=0.0)
    batch = Cutter([series], span=8, seasons=SEASONS, targets=1).batch([Cut(0, 10, 50)])
    assert batch.target is not None
    assert batch.target[:, 0].isfinite().all() and batch.target[:, 1:].isnan().all()
    assert batch.observed.all()
    np.testing.assert_array_equal(batch.values[0].numpy(), series.values[:, 10:50])
    with pytest.raises(ValueError, match="targets is 4"):
        Cutter([series], span=8, seasons=SEASONS, targets=4)


def test_series_that_do_not_fit_together_are_refused() -> None:
    with pytest.raises(ValueError, match="share variates"):
        Cutter([make_series(30, 1), make_series(30, 2)], span=8, seasons=(1,))


def sampler(seed: int = 0, **options: object) -> WindowSampler:
    series = [make_series(n, 1, n) for n in (300, 120, 20)]
    cutter = Cutter(series, span=12, seasons=(1, 5))
    return WindowSampler(cutter, patch_size=4, window_patches=8, batch_size=32, seed=seed, **options)  # pyright: ignore


def leaves(batch: Batch) -> list[torch.Tensor]:
    flat = [*batch[:6], *(batch.past or ())]
    return [x for x in flat if x is not None]


def test_batch_i_is_a_function_of_seed_and_i_alone() -> None:
    first, second = sampler(), sampler()
    second[0], np.random.rand(3)  # noqa: NPY002 - other draws must not matter
    for a, b in zip(leaves(first[7]), leaves(second[7]), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    assert not torch.equal(first[7].values, first[8].values)
    assert not torch.equal(first[7].values, sampler(seed=1)[7].values)


def test_windows_start_where_they_should_and_with_the_past_they_should_have() -> None:
    drawn = sampler()
    rng = np.random.default_rng(0)
    cuts = [drawn._draw(rng) for _ in range(4000)]
    at_first = np.mean([cut.start == 0 and cut.series == 0 for cut in cuts]) / drawn.odds[0]
    assert 0.22 < at_first < 0.29
    assert 0.08 < np.mean([cut.gap[1] > cut.gap[0] for cut in cuts]) < 0.12
    fresh = [cut for cut in cuts if cut.fresh and cut.start > 0]
    assert 0.05 < len(fresh) / len(cuts) < 0.12
    assert len({cut.start % 4 for cut in cuts}) == 4
    past = drawn.cutter.batch([fresh[0]]).past
    assert past is not None
    assert not any(leaf.any() for leaf in past)
    for cut in cuts:
        assert 0 <= cut.start < cut.stop <= len(drawn.cutter.series[cut.series])
        assert 0 <= cut.gap[0] <= cut.gap[1] <= cut.stop - cut.start <= drawn.window


def test_segments_go_on_where_the_last_ended_unless_they_restart() -> None:
    series = [make_series(n, 1, n, str(n), missing=0.0) for n in (200, 50)]
    cutter = Cutter(series, span=8, seasons=(1,))
    segments = ContiguousSegments(cutter, patch_size=4, window_patches=4, batch_size=6, seed=3, episode=5)
    whole = {round(float(v), 9): (i, t) for i, s in enumerate(series) for t, v in enumerate(s.values[0])}
    ends: list[tuple[int, int] | None] = [None] * 6
    carried = 0
    for index in range(12):
        batch, restart = segments[index]
        lengths = [16] * 6 if batch.lengths is None else batch.lengths.tolist()
        for row in range(6):
            begin = whole[round(float(batch.values[row, 0, 0]), 9)]
            if not restart[row]:
                assert begin == ends[row]
                carried += 1
            ends[row] = (begin[0], begin[1] + lengths[row])
    assert carried > 20
    assert segments[0].restart.all()


def test_held_out_cuts_score_the_end_of_each_series_only() -> None:
    cutter = Cutter([make_series(40, 1, missing=0.0), make_series(50, 1, missing=0.0)], span=8, seasons=(1,))
    cuts = held_out_cuts([40, 50], lambda i: (30, 50)[i], context=16)
    assert [(cut.series, cut.start, cut.stop) for cut in cuts] == [(0, 14, 40)]
    target = cutter.batch(cuts).target
    assert target is not None
    assert target[..., :16].isnan().all()
    assert target[..., 16:].isfinite().all()
