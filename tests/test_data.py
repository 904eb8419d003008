"""Clock, dialects, missing values, catalogue, tasks: what comes in is what the model and the evaluator see."""

import argparse
import dataclasses
import hashlib
import io
import json
import os
import socket
import subprocess
import sys
import threading
from datetime import datetime, timedelta, timezone
from pathlib import Path

import narwhals as nw
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest

from tsgdn.cli import data as cli
from tsgdn.cli.main import Misuse
from tsgdn.data import catalog, frames, regimes, sources
from tsgdn.data.clock import Clock, parse
from tsgdn.data.gluonts import evaluation_data, from_gluonts, period_freq, to_gluonts
from tsgdn.data.series import Series
from tsgdn.types import ForecastBatch

REPOSITORY = Path(__file__).parents[1]

FREQS = [
    "s", "30s", "min", "5min", "10min", "15min", "30min", "h", "2h", "6h", "D", "2D", "7D", "B", "2B", "W", "W-TUE",
    "W-SAT", "2W", "MS", "2MS", "ME", "QS", "QS-OCT", "QE", "QE-NOV", "YS", "YS-APR", "YE", "YE-JUN",
]  # fmt: skip
STARTS = (
    "1969-12-31 23:59:30", "1999-12-31", "2000-02-28", "2000-02-29 12:15", "2004-02-27", "2019-12-30 06:30",
    "2020-01-31", "2020-03-29 01:00", "2021-06-05", "2021-06-06", "2022-10-30 02:00", "2023-02-28",
    "2024-02-29", "2100-02-28",
)  # fmt: skip


@pytest.fixture
def data_root() -> Path:
    """The folder of real data."""
    root = os.environ.get("TSGDN_DATA")
    if not root or not Path(root).is_dir():
        pytest.skip("real data: TSGDN_DATA names no folder")
    return Path(root)


# Clock


@pytest.mark.parametrize("freq", FREQS)
def test_clock_agrees_with_pandas_in_both_directions(freq):
    clock = Clock(freq)
    for start in STARTS:
        stamps = pd.date_range(start, periods=70, freq=freq).to_numpy().astype("M8[ns]")
        np.testing.assert_array_equal(clock.timestamp(stamps[0], np.arange(70)), stamps)
        np.testing.assert_array_equal(clock.timestamp(stamps[40], np.arange(-40, 30)), stamps)
        steps, on_grid = clock.steps(stamps[40], stamps)
        np.testing.assert_array_equal(steps, np.arange(-40, 30))
        assert on_grid.all()


@pytest.mark.parametrize("freq", FREQS)
def test_clock_rounds_stamps_off_the_grid_down_and_says_so(freq):
    clock = Clock(freq)
    stamps = pd.date_range("2024-01-30", periods=50, freq=freq).to_numpy().astype("M8[ns]")
    for shifted in (stamps[:-1] + np.timedelta64(1, "ms"), stamps[1:] - np.timedelta64(1, "ms")):
        steps, on_grid = clock.steps(stamps[0], shifted)
        np.testing.assert_array_equal(steps, np.arange(49))
        assert not on_grid.any()


@pytest.mark.parametrize("freq", FREQS)
def test_a_single_stamp_is_as_good_as_many(freq):
    clock = Clock(freq)
    stamps = pd.date_range("2024-01-30", periods=9, freq=freq).to_numpy().astype("M8[ns]")
    assert clock.timestamp(stamps[0], 8) == stamps[8]
    step, on_grid = clock.steps(stamps[0], stamps[8])
    assert (int(step), bool(on_grid)) == (8, True)


@pytest.mark.parametrize("freq", ["YS", "QE", "MS", "B", "W", "D", "h", "s"])
def test_a_step_that_no_timestamp_can_tell_is_refused_and_does_not_wrap_around(freq):
    start = pd.date_range("2024-01-01", periods=1, freq=freq)[0].to_datetime64()
    for far in (10**12, -(10**12), np.array([0, 1, 10**12])):
        with pytest.raises(ValueError, match="outside the years 1679 to 2261"):
            Clock(freq).timestamp(start, far)
    assert Clock("YS").timestamp(np.datetime64("2024-01-01"), 200) == np.datetime64("2224-01-01")


def test_period_aliases_count_from_the_first_day_as_periods_do():
    for alias, canonical, start in (
        ("M", "MS", "2023-11"),
        ("Q", "QS", "2023Q4"),
        ("Y", "YS", "2019"),
        ("A", "YS", "2019"),
    ):
        clock = Clock(alias)
        periods = pd.period_range(start, periods=9, freq="Y" if alias == "A" else alias)
        assert clock.freq == canonical
        stamps = periods.to_timestamp().to_numpy()
        np.testing.assert_array_equal(clock.timestamp(stamps[0], np.arange(9)), stamps)


def test_old_aliases_and_multiples_have_one_canonical_name():
    names = {
        "H": "h",
        "15T": "15min",
        "S": "s",
        "60min": "h",
        "24h": "D",
        "W": "W-SUN",
        "3600s": "h",
        " 5MIN".lower(): "5min",
    }
    for alias, canonical in names.items():
        assert Clock(alias).freq == canonical
        assert Clock(canonical).freq == canonical


@pytest.mark.parametrize("freq", ["", "fortnight", "0h", "h-MON", "MS-JAN", "W-JAN", "-1h", "1.5h", "C"])
def test_unknown_frequencies_are_refused_by_name(freq):
    with pytest.raises(ValueError, match="is not known; use one of"):
        Clock(freq)


def test_a_grid_cannot_start_off_its_anchor():
    with pytest.raises(ValueError, match="2024-01-06: business days"):
        Clock("B").timestamp(np.datetime64("2024-01-06"), 1)
    with pytest.raises(ValueError, match="2024-01-31: months start on day 1; for month ends use 'ME'"):
        Clock("M").steps(np.datetime64("2024-01-31"), np.datetime64("2024-02-29"))


@pytest.mark.parametrize("freq", [f for f in FREQS if not f.startswith(("2W", "7D", "2B", "2D", "YE", "YS"))])
def test_seasonality_is_that_of_gluonts(freq):
    from gluonts.time_feature import get_seasonality

    assert Clock(freq).seasonality == get_seasonality(freq)


def test_seasons_and_patch_sizes_follow_the_frequency():
    want = {
        "h": ((1, 24, 168), 8), "D": ((1, 7, 364), 8), "B": ((1, 5), 8), "W": ((1, 52), 4), "7D": ((1, 52), 4),
        "MS": ((1, 12), 4), "QS": ((1, 4), 1), "YS": ((1,), 1), "30min": ((1, 48, 336), 16),
        "15min": ((1, 96, 672), 16), "10min": ((1, 144, 1008), 16), "5min": ((1, 288, 2016), 16),
        "min": ((1, 60, 1440), 16), "s": ((1, 60), 16),
        "2h": ((1, 12, 84), 8),
    }  # fmt: skip
    assert {freq: (Clock(freq).seasons, Clock(freq).patch_size) for freq in want} == want


@pytest.mark.parametrize("freq", FREQS)
def test_calendar_features_repeat_with_their_cycle_and_do_not_depend_on_the_cut(freq):
    clock = Clock(freq)
    start = pd.date_range("2023-12-27", periods=1, freq=freq)[0].to_datetime64()
    whole = clock.calendar(start, 0, 60)
    assert whole.shape == (clock.calendar_size, 60)
    assert whole.dtype == np.float32
    assert (np.abs(whole) <= 1).all()
    np.testing.assert_array_equal(np.concatenate([clock.calendar(start, 0, 7), clock.calendar(start, 7, 60)], 1), whole)
    later = clock.timestamp(start, 7)[()]
    np.testing.assert_array_equal(clock.calendar(later, 0, 53), whole[:, 7:])


def test_calendar_phase_is_that_of_the_date():
    sine, cosine = Clock("D").calendar(np.datetime64("2024-01-01"), 0, 8)[:2]  # a Monday
    np.testing.assert_allclose([sine[0], cosine[0], sine[7], cosine[7]], [0, 1, 0, 1], atol=1e-6)
    year = Clock("MS").calendar(np.datetime64("2024-01-01"), 0, 12)
    np.testing.assert_allclose(year, Clock("ME").calendar(np.datetime64("2024-01-31"), 0, 12), atol=0)
    np.testing.assert_allclose(year[0], np.sin(2 * np.pi * np.arange(12) / 12), atol=1e-6)


def test_local_times_become_utc_and_those_without_one_meaning_are_refused():
    local = pd.date_range("2024-03-30", "2024-04-02", freq="h").to_numpy()
    local = local[local != np.datetime64("2024-03-31T02:00")]
    want = pd.DatetimeIndex(local).tz_localize("Europe/Berlin").tz_convert("UTC").tz_localize(None).to_numpy()
    np.testing.assert_array_equal(Clock("h").to_utc(local, "Europe/Berlin"), want)
    with pytest.raises(ValueError, match="2024-03-31 02:30 does not exist in Europe/Berlin"):
        Clock("h").to_utc([np.datetime64("2024-03-31T02:30")], "Europe/Berlin")
    with pytest.raises(ValueError, match="2024-10-27 02:30 occurs twice in Europe/Berlin"):
        Clock("h").to_utc([np.datetime64("2024-10-27T02:30")], "Europe/Berlin")
    with pytest.raises(ValueError, match="Mars/Olympus"):
        Clock("h").to_utc(local, "Mars/Olympus")


def test_iso_timestamps_with_an_offset_are_moved_to_utc():
    assert parse("2024-01-31T14:00:00+02:00") == parse("2024-01-31 12:00") == parse("2024-01-31T12:00:00Z")


def test_clock_and_series_load_no_pandas():
    code = "import sys, tsgdn.data.frames, tsgdn.data.catalog; print({'pandas', 'torch', 'pyarrow'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert done.stdout.strip() == "set()"


# Series


def test_a_slice_starts_where_the_clock_says_and_keeps_the_known_future():
    series = Series("a", np.datetime64("2024-01-31"), "ME", np.arange(6.0)[None], known=np.arange(9.0)[None])
    part = series.slice(1, 4)
    assert part.start == np.datetime64("2024-02-29")
    np.testing.assert_array_equal(part.values, [[1, 2, 3]])
    np.testing.assert_array_equal(part.known, [np.arange(1, 9)])
    assert len(series.slice(6)) == 0


def test_series_refuse_wrong_shapes_and_infinite_values():
    start = np.datetime64("2024-01-01")
    with pytest.raises(ValueError, match=r"shape \(3,\), expected \(variates, steps\)"):
        Series("a", start, "D", np.zeros(3))
    with pytest.raises(ValueError, match="'a': 2 rows of values, 1 variates"):
        Series("a", start, "D", np.zeros((2, 3)))
    with pytest.raises(ValueError, match="infinite value at step 1"):
        Series("a", start, "D", np.array([[0, np.inf, 1]]))
    with pytest.raises(ValueError, match="at least 3 steps"):
        Series("a", start, "D", np.zeros((1, 3)), known=np.zeros((1, 2)))
    with pytest.raises(ValueError, match="'a': infinite known feature at step 3"):
        Series("a", start, "D", np.zeros((1, 3)), known=np.array([[0, 1, np.nan, -np.inf]]))


# Frames


def _rows(n=5):
    stamps = pd.date_range("2024-02-27", periods=n, freq="D")
    return pd.DataFrame(
        {"item_id": ["b"] * n + ["a"] * n, "timestamp": [*stamps, *stamps], "target": np.arange(2.0 * n)}
    )


def _weekly():
    stamps = pd.date_range("2024-01-01", periods=4, freq="7D")
    return pd.DataFrame({"item_id": "w", "timestamp": stamps, "target": 1.0})


def _assert_same(got, want):
    assert [s.item_id for s in got] == [s.item_id for s in want]
    for x, y in zip(got, want, strict=True):
        assert (x.start, x.freq, x.variates) == (y.start, y.freq, y.variates)
        np.testing.assert_array_equal(x.values, y.values)
        assert (x.known is None) == (y.known is None)
        if x.known is not None:
            np.testing.assert_array_equal(x.known, y.known)


def test_every_frame_and_dialect_gives_the_same_series():
    rows = _rows()
    want = frames.to_series(rows, freq="D")
    assert [s.item_id for s in want] == ["b", "a"]
    np.testing.assert_array_equal(want[1].values, [[5, 6, 7, 8, 9]])
    nixtla = rows.rename(columns={"item_id": "unique_id", "timestamp": "ds", "target": "y"})
    texts = rows.assign(timestamp=rows.timestamp.astype(str))
    dicts = [
        {"item_id": name, "start": pd.Period("2024-02-27", "D"), "target": part.target.to_numpy()}
        for name, part in rows.groupby("item_id", sort=False)
    ]
    for data in (
        nixtla, texts, dicts, pl.from_pandas(rows), pl.from_pandas(rows).lazy(), pa.Table.from_pandas(rows),
        rows.sample(frac=1, random_state=1).sort_values("item_id", ascending=False, kind="stable"),
        rows.set_index(["item_id", "timestamp"]), rows.to_dict("list"), rows.to_dict("records"),
        rows.assign(timestamp=rows.timestamp.dt.tz_localize("UTC").dt.tz_convert("Asia/Tokyo")),
        pl.from_pandas(rows).with_columns(pl.col("timestamp").cast(pl.Date)),
        rows.astype({"target": "Float64"}), rows.astype({"target": "int32"}), want,
    ):  # fmt: skip
        _assert_same(frames.to_series(data, freq="D"), want)


def test_stamps_with_an_offset_keep_their_moment_whatever_zone_the_others_are_in():
    west = timezone(timedelta(hours=-5))
    rows = [{"timestamp": datetime(2024, 1, 1, h, tzinfo=west), "target": 1.0} for h in (19, 20)]
    texts = [{**row, "timestamp": row["timestamp"].isoformat()} for row in rows]
    naive = [{**row, "timestamp": row["timestamp"].replace(tzinfo=None)} for row in rows]
    for tz in (None, "Asia/Tokyo"):
        assert frames.to_series(rows, freq="h", tz=tz)[0].start == np.datetime64("2024-01-02T00")
        assert frames.to_series(texts, freq="h", tz=tz)[0].start == np.datetime64("2024-01-02T00")
    assert frames.to_series(naive, freq="h", tz="Asia/Tokyo")[0].start == np.datetime64("2024-01-01T10")
    with pytest.raises(ValueError, match="mixes timestamps with and without a UTC offset"):
        frames.to_series([rows[0], naive[1]], freq="h")


def test_categories_of_gluonts_move_up_by_one_since_zero_is_unknown():
    entry = {"start": pd.Period("2024-01-01", "D"), "target": [1.0, 2.0], "feat_static_cat": [0, 3]}
    (series,) = frames.to_series([entry], freq="D")
    assert series.static == (1, 4)
    np.testing.assert_array_equal(to_gluonts([series])[0]["feat_static_cat"], [0, 3])


def test_wide_frames_have_a_column_per_variate_and_known_columns_reach_beyond_the_target():
    stamps = pd.date_range("2024-01-01", periods=6, freq="h")
    rows = pd.DataFrame(
        {
            "timestamp": stamps,
            "x": [1, 2, 3, np.nan, np.nan, np.nan],
            "y": [4, np.nan, 6, 7, np.nan, np.nan],
            "k": range(6),
        }
    )
    (series,) = frames.to_series(rows, freq="h", variates=("x", "y"), known_columns=("k",))
    assert series.variates == ("x", "y")
    np.testing.assert_array_equal(series.values, [[1, 2, 3, np.nan], [4, np.nan, 6, 7]])
    np.testing.assert_array_equal(series.known, [np.arange(6)])


def test_missing_steps_become_nan_also_nulls():
    rows = _rows().drop(index=[1, 2, 7])
    b, a = frames.to_series(rows, freq="D")
    np.testing.assert_array_equal(b.values, [[0, np.nan, np.nan, 3, 4]])
    np.testing.assert_array_equal(a.values, [[5, 6, np.nan, 8, 9]])
    nulls = pl.from_pandas(_rows()).with_columns(
        pl.when(pl.col("target") == 3).then(None).otherwise(pl.col("target")).alias("target")
    )
    for data in (nulls, nulls.to_arrow(), nulls.to_pandas().astype({"target": "Float64"}), nulls.to_dicts()):
        np.testing.assert_array_equal(frames.to_series(data, freq="D")[0].values, [[0, 1, 2, np.nan, 4]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: pd.concat([r, r[3:4]]), "item 'b': 2024-03-01 occurs twice"),
        (lambda r: r.assign(timestamp=r.timestamp.where(r.index != 8, r.timestamp + pd.Timedelta("6h"))),
         "item 'a': 2024-03-01 06:00 is not on the 'D' grid that starts at 2024-02-27"),
        (lambda r: pd.concat([r, _weekly()]), "item 'w': every row is 7 steps of 'D'"),
        (lambda r: r.assign(timestamp=r.timestamp.where(r.index != 2)), "row 2 has no timestamp"),
        (lambda r: r.assign(item_id=r.item_id.where(r.index != 2)), "row 2 has no item id"),
        (lambda r: r.assign(target=r.target.replace(7, np.inf)), "item 'a': infinite value at 2024-02-29"),
        (lambda r: r.assign(target="x"), "column 'target' holds String, expected numbers"),
        (lambda r: r.assign(target=True), "column 'target' holds Boolean, expected numbers"),
        (lambda r: r.assign(timestamp=1), "column 'timestamp' holds int64, expected timestamps"),
        (lambda r: r.assign(timestamp="soon"), "'soon' is no ISO 8601 timestamp"),
        (lambda r: r.drop(columns="target"), "column 'target' is missing; the frame has item_id, timestamp"),
        (lambda r: r.drop(columns="timestamp"), "no time column among item_id, target"),
        (lambda r: r.assign(item_id=pd.array(["b", None, *"bbbaaaaa"], "string")), "row 1 has no item id"),
        (lambda r: {"timestamp": list(r.timestamp), "target": [1.0]}, "'target' has 1 rows, 'timestamp' has 10"),
        (lambda r: 5, "data of type int is no frame"),
    ],
)  # fmt: skip
def test_bad_frames_are_refused_with_one_line_that_names_the_place(change, message):
    with pytest.raises(ValueError) as error:
        frames.to_series(change(_rows()), freq="D")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_wrong_year_does_not_fill_the_memory():
    rows = pd.DataFrame({"timestamp": ["2024-01-01", "2024-01-02", "2210-01-01"], "target": 1.0})
    with pytest.raises(ValueError, match="is it a wrong date"):
        frames.to_series(rows, freq="s")


def _forecast(variates=("x", "y")):
    values = np.sort(np.random.default_rng(0).normal(size=(2, len(variates), 3, 5)), axis=-1)
    start = np.array(["2024-02-28", "2024-03-01"], "M8[ns]")
    return ForecastBatch(("a", "b"), start, "D", (0.05, 0.1, 0.5, 0.9, 0.95), values, variates)


def test_forecasts_come_out_in_each_style():
    forecast = _forecast()
    columns = frames.forecast_frame(forecast)
    for backend in ("pandas", "polars", "pyarrow"):
        assert nw.from_dict(columns, backend=backend).shape == (12, 3 + 5)
    rows = pd.DataFrame(columns).set_index(["item_id", "variate", "timestamp"])
    assert rows.loc[("b", "y", "2024-03-03"), "0.9"] == forecast.values[1, 1, 2, 3]
    nixtla = pd.DataFrame(frames.forecast_frame(_forecast(("target",)), "nixtla"))
    assert list(nixtla) == ["unique_id", "ds", "tsgdn-lo-90", "tsgdn-lo-80", "tsgdn", "tsgdn-hi-80", "tsgdn-hi-90"]
    with pytest.raises(ValueError, match="style 'excel'"):
        frames.forecast_frame(forecast, "excel")


def test_the_gluonts_style_makes_quantile_forecasts():
    from gluonts.model.forecast import QuantileForecast

    forecast = _forecast(("target",))
    columns = frames.forecast_frame(forecast, "gluonts")
    made = QuantileForecast(
        columns["forecast_arrays"][1], pd.Period(columns["start_date"][1], "D"), columns["forecast_keys"][1], "b"
    )
    np.testing.assert_array_equal(made.quantile(0.9), forecast.values[1, 0, :, 3])
    assert frames.forecast_frame(_forecast(), "gluonts")["forecast_arrays"][0].shape == (5, 3, 2)


# Simulation


def test_simulation_depends_on_the_seed_alone_and_shorter_is_a_prefix():
    whole = regimes.simulate(series=3, steps=800, seed=5)
    again = regimes.simulate(series=3, steps=800, seed=5)
    other = regimes.simulate(series=3, steps=800, seed=6)
    short = regimes.simulate(series=2, steps=300, seed=5)
    for x, y, z in zip(whole, again, other, strict=True):
        np.testing.assert_array_equal(x.values, y.values)
        assert not np.array_equal(x.values, z.values, equal_nan=True)
    for x, y in zip(whole, short, strict=False):
        np.testing.assert_array_equal(x.values[:, :300], y.values)


def test_simulated_series_are_seasonal_coupled_and_have_gaps_and_regimes():
    series = regimes.simulate(steps=4000)
    values = np.stack([s.values for s in series])
    assert 0.01 < np.isnan(values).mean() < 0.04
    daily = np.nanmean(np.abs(values[..., 24:] - values[..., :-24]))
    half = np.nanmean(np.abs(values[..., 12:] - values[..., :-12]))
    assert daily < 0.6 * half
    weeks = np.nanmean(values[..., : 168 * 23].reshape(8, 2, 23, 168), -1)
    assert (np.ptp(weeks, axis=-1) > 1).mean() > 0.7  # the level moves between regimes
    for kwargs, message in (({"kind": "x"}, "kind 'x'"), ({"steps": 0}, "steps is 0"), ({"seed": -1}, "seed is -1")):
        with pytest.raises(ValueError, match=message):
            regimes.simulate(**kwargs)


@pytest.mark.parametrize("freq", ["QS-DEC", "QE-FEB", "YS-SEP", "YE", "ME", "MS", "B", "W-WED", "h"])
def test_simulation_starts_on_the_grid_of_any_frequency_and_may_be_short(freq):
    long, short = (regimes.simulate(freq=freq, series=1, steps=steps)[0] for steps in (40, 3))
    assert long.clock.on_grid(long.start)
    np.testing.assert_array_equal(long.values[:, :3], short.values)


def test_a_simulation_longer_than_time_is_refused(capsys):
    with pytest.raises(Misuse, match="outside the years 1679 to 2261"):
        _run("simulate", "seasonal", "--freq", "YS", "--steps", "2000")


def test_simulated_milliseconds_are_written_as_such(capsys):
    assert _run("simulate", "seasonal", "--freq", "100ms", "--steps", "3", "--series", "1") == 0
    stamps = [line.split(",")[1] for line in capsys.readouterr().out.splitlines()[1:]]
    assert stamps == ["2020-01-06T00:00:00.000Z", "2020-01-06T00:00:00.100Z", "2020-01-06T00:00:00.200Z"]


def test_the_embedded_set_is_what_the_command_writes(tmp_path):
    path = tmp_path / "again.csv"
    assert _run("simulate", "seasonal", "--seed", "0", "--series", "4", "--steps", "1000", "--out", str(path)) == 0
    embedded = REPOSITORY / "tsgdn" / "data" / "embedded" / "seasonal.csv"
    assert path.read_bytes() == embedded.read_bytes()
    assert embedded.stat().st_size < 300_000
    _assert_same(regimes.embedded(), regimes.simulate(series=4, steps=1000))
    _assert_same(frames.to_series(pd.read_csv(path), freq="h", variates=("v0", "v1")), regimes.embedded())


# Catalogue and tasks


def test_the_readme_is_in_step_with_the_catalogue():
    text = (REPOSITORY / "datasets" / "README.md").read_text(encoding="utf-8")
    assert text.split("<!-- table -->\n")[1].split("\n<!-- end of table -->")[0] == catalog.table()


def test_entries_and_tasks_are_complete_and_fit_each_other():
    assert len(catalog.names()) == 44
    for name in catalog.names():
        entry = catalog.entry(name)
        assert Clock(entry.freq).freq == entry.freq
        if entry.layout == "simulated":
            continue
        assert entry.source["url"].startswith("https://")
        assert ("loader" in entry.source) != ("reason" in entry.source), name
        assert entry.source.get("loader", "csv") in sources.LOADERS
        for part in (entry.source, *entry.source.get("more", ())):
            assert len(part["sha256"]) == 64
            assert part["bytes"] > 0
    for task in catalog.cells():
        assert task.dataset in catalog.names()
        assert task.calendar == catalog.entry(task.dataset).calendar
        length = catalog.entry(task.dataset).length
        if task.rows is None and task.resample is None:
            assert (length if isinstance(length, int) else length[0]) + task.first_origin >= 1
    for name in ("exchange_rate", "m4_weekly", "m1_monthly", "nyc_taxi_od", "gefcom2012_load", "nn5_daily", "los_loop"):
        assert not catalog.entry(name).calendar


def test_a_licence_that_was_written_from_memory_is_marked_as_such(capsys):
    assert all(catalog.entry(name).licence_basis for name in catalog.names())
    lines = {line.split("`")[1]: line for line in catalog.table().splitlines() if line.startswith("| `")}
    assert "(recalled)" in lines["bike_sharing"]
    assert "recalled" in catalog.entry("bike_sharing").licence_basis
    assert _run("describe", "bike_sharing") == 0
    assert catalog.entry("bike_sharing").licence_basis in capsys.readouterr().out


def test_published_protocols_of_the_entries_are_the_tasks():
    cells = {(t.dataset, t.horizon, t.windows, t.seasonality): t for t in catalog.cells()}
    for name in catalog.names():
        for benchmark in catalog.entry(name).benchmarks:
            task = cells[(name, benchmark["horizon"], benchmark["windows"], benchmark["seasonality"])]
            assert task.seasonal_naive == pytest.approx(benchmark["seasonal_naive"])
            assert (task.resample is None) == (benchmark["resample"] is None)
            assert benchmark["name"] in task.suite


def test_unknown_names_are_answered_with_near_ones():
    with pytest.raises(KeyError, match="did you mean etth1"):
        catalog.entry("etth2")
    with pytest.raises(KeyError, match="task 'm4_hourli' is not in the catalogue"):
        catalog.task("m4_hourli")


def test_absent_data_is_reported_with_the_places_and_the_remedy(monkeypatch, tmp_path):
    monkeypatch.setenv("TSGDN_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("TSGDN_CACHE", str(tmp_path / "cache"))
    with pytest.raises(catalog.DataNotFound) as error:
        catalog.load("etth1")
    assert str(tmp_path / "data") in str(error.value)
    assert str(tmp_path / "cache") in str(error.value)
    assert "tsgdn data get etth1" in str(error.value)


def test_the_simulated_set_needs_no_file(monkeypatch, tmp_path):
    monkeypatch.setenv("TSGDN_CACHE", str(tmp_path))
    monkeypatch.delenv("TSGDN_DATA", raising=False)
    data = catalog.load("simulated")
    assert (len(data.series), len(data.series[0])) == (data.meta.n_series, data.meta.length)
    assert len(catalog.load("simulated", multivariate=True).series) == 8
    train, windows = catalog.task("simulated").split(multivariate=True)
    assert train[0].values.shape == (2, 2000 - 240)
    assert windows[-1][1].shape == (2, 24)


def _toy_task(**changes):
    task = dataclasses.replace(catalog.task("simulated"), horizon=20, stride=7, windows=5)
    return dataclasses.replace(task, **changes)


def test_windows_are_the_last_ones_and_contexts_end_before_their_labels():
    task = _toy_task()
    whole = task.series()
    train, windows = task.split()
    assert len(windows) == len(whole) * 5 == len(list(windows))
    for i, (context, label) in enumerate(windows):
        series = whole[i // 5]
        origin = 2000 - 20 - 7 * (4 - i % 5)
        assert (context.item_id, len(context)) == (series.item_id, origin)
        np.testing.assert_array_equal(context.values, series.values[:, :origin])
        np.testing.assert_array_equal(label, series.values[:, origin : origin + 20])
        assert len(train[i // 5]) == 2000 - 20 - 28 <= len(context)
    assert len(windows[2:9]) == 7
    with pytest.raises(IndexError):
        windows[len(windows)]


def test_nothing_handed_out_leads_to_the_future(monkeypatch):
    known = np.arange(2100.0)[None]
    data = [dataclasses.replace(s, known=known) for s in catalog.load("simulated").series[:2]]
    monkeypatch.setattr(catalog, "load", lambda *a, **k: catalog.Dataset("toy", data, catalog.entry("simulated")))
    train, windows = _toy_task().split()
    for series, horizon in [*((t, 0) for t in train), *((context, 20) for context, _ in windows)]:
        for array in (series.values, series.known):
            assert array.base is None or array.base.size <= array.size
        assert series.known.shape[1] == len(series) + horizon
    before = windows[0][0].values.copy()
    windows[0][0].values[:] = 0  # what a caller writes reaches nobody else
    np.testing.assert_array_equal(windows[0][0].values, before)


def test_a_series_too_short_for_its_windows_is_refused():
    with pytest.raises(ValueError, match="too few for the windows"):
        _toy_task(windows=400).split()


def test_resampling_equals_pandas():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(2, 500))
    values[0, 40:60] = np.nan
    values[0, 0:10] = np.nan
    series = Series("a", np.datetime64("2024-01-22"), "D", values, variates=("x", "y"))
    frame = pd.DataFrame(values.T, index=series.timestamps)
    for how, want in (("mean", frame.resample("MS").mean()), ("sum", frame.resample("MS").sum(min_count=1))):
        got = catalog._resample(series, "MS", how)
        np.testing.assert_allclose(got.values, want.to_numpy().T, rtol=1e-12)
        np.testing.assert_array_equal(got.timestamps, want.index.to_numpy())


def test_every_set_loads_as_the_catalogue_says(data_root):
    for name in (
        "etth1",
        "m4_weekly",
        "hospital",
        "exchange_rate_nips",
        "vic_elec",
        "nab",
        "skab",
        "tourism_yearly",
        "weather",
    ):
        entry = catalog.entry(name)
        path = catalog.find(name)
        assert hashlib.sha256(path.read_bytes()).hexdigest() == entry.file["sha256"]
        assert sources.digest(sources.read_parquet(path)) == entry.file["content"]
        series = catalog.load(name).series
        lengths = [len(s) for s in series]
        assert (min(lengths), max(lengths)) == (
            entry.length if isinstance(entry.length, tuple) else (entry.length,) * 2
        )
        assert len(series) == entry.n_series * (8 if name == "skab" else 1)
    assert catalog.load("vic_elec", multivariate=True).series[0].known.shape == (1, 52608)
    assert catalog.load("exchange_rate_nips", multivariate=True).series[0].values.shape == (8, 6221)
    with pytest.raises(ValueError, match="separate series"):
        catalog.load("m4_weekly", multivariate=True)


def test_headline_cells_have_their_windows(data_root):
    want = {
        "etth1": (7, 120, 11520),
        "us_births": (1, 20, 6705),
        "m4_hourly": (414, 1, None),
        "exchange_rate_nips": (8, 5, 6071),
    }
    for name, (n, windows, first) in want.items():
        task = catalog.task(name)
        train, instances = task.split()
        assert (len(train), len(instances)) == (n, n * windows)
        assert first is None or {len(s) for s in train} == {first}
        context, label = instances[-1]
        assert len(context) == len(train[-1]) + task.stride * (windows - 1)
        assert label.shape == (1, task.horizon)
    assert catalog.task("etth1").series()[0].timestamps[-1] == np.datetime64("2018-02-20T23")
    assert catalog.task("etth1").validation == 2880


@pytest.mark.parametrize(
    "name", ["m4_hourly", "hospital", "us_births", "us_births/M", "saugeen/M", "ett1/H/short", "m1_monthly"]
)
def test_the_windows_of_a_task_give_the_published_seasonal_naive(data_root, name):
    task = catalog.task(name)
    m, error, total, scaled = task.seasonality, 0.0, 0.0, []
    for context, label in task.split()[1]:
        past = context.values[0]
        miss = np.abs(label[0] - past[-m:][np.arange(task.horizon) % m])
        error, total = error + miss.sum(), total + np.abs(label).sum()
        scaled.append(miss / np.abs(past[m:] - past[:-m]).mean())
    assert round(error / total, 6) == pytest.approx(task.seasonal_naive["wql"], abs=1.5e-6)
    assert round(float(np.mean(scaled)), 6) == pytest.approx(task.seasonal_naive["mase"], abs=1.5e-6)


# Fetching


TSF = """# a comment
@relation toy
@attribute series_name string
@attribute start_timestamp date
@frequency monthly
@data
T1:1990-01-31 00-00-00:1,2,?,4
T2:1991-03-01 00-00-00:5.5,6
"""


@pytest.fixture
def toy(monkeypatch, tmp_path):
    """A catalogued set whose source is a file; returns its path."""
    path = tmp_path / "toy.tsf"
    path.write_text(TSF)
    columns = {
        "item_id": np.array(["T1"] * 4 + ["T2"] * 2),
        "timestamp": np.array(["1990-01", "1990-02", "1990-03", "1990-04", "1991-03", "1991-04"], "M8[ns]"),
        "target": np.array([1, 2, np.nan, 4, 5.5, 6], np.float32),
    }
    source = {
        "url": path.as_uri(), "sha256": hashlib.sha256(TSF.encode()).hexdigest(), "bytes": len(TSF), "loader": "tsf",
    }  # fmt: skip
    entry = dataclasses.replace(
        catalog.entry("m1_monthly"), name="toy", source=source, file={"content": sources.digest(columns)}
    )
    monkeypatch.setattr(catalog, "entry", lambda name: entry)
    monkeypatch.setenv("TSGDN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TSGDN_DATA", raising=False)
    return path, entry, monkeypatch


def test_get_fetches_verifies_converts_and_is_then_found(toy):
    progress = io.StringIO()
    path = catalog.get("toy", stream=progress)
    assert path == catalog.find("toy")
    assert "toy" in progress.getvalue()
    one, two = catalog.load("toy").series
    np.testing.assert_array_equal(one.values, [[1, 2, np.nan, 4]])
    assert (two.start, two.freq) == (np.datetime64("1991-03-01"), "MS")
    toy[0].unlink()
    assert catalog.get("toy") == path  # it is here: nothing is fetched
    with pytest.raises(catalog.DataNotFound, match="could not download"):
        catalog.get("toy", force=True, stream=progress)
    assert catalog.find("toy") == path  # and a failed fetch takes nothing away


@pytest.mark.parametrize("text", [TSF.replace("5.5", "5.6"), TSF + "T3:1991-03-01 00-00-00:1\n", TSF[:-9]])
def test_get_deletes_a_file_with_a_wrong_hash_and_says_so(toy, text):
    toy[0].write_text(text)
    with pytest.raises(catalog.DataNotFound, match="it was deleted"):
        catalog.get("toy", stream=io.StringIO())
    assert not [path for path in catalog.cache_folder().rglob("*") if path.is_file()]


def test_get_takes_half_an_answer_for_a_broken_connection(toy):
    """A chunked answer that ends early is no OSError in Python."""
    _, entry, monkeypatch = toy
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer():
            connection, _ = server.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\nhalf")

        thread = threading.Thread(target=answer)
        thread.start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/toy.tsf"
        other = dataclasses.replace(entry, source={**entry.source, "url": url})
        monkeypatch.setattr(catalog, "entry", lambda name: other)
        with pytest.raises(catalog.DataNotFound, match="could not download"):
            catalog.get("toy", stream=io.StringIO())
        thread.join()
    assert not [path for path in catalog.cache_folder().rglob("*") if path.is_file()]


def test_get_refuses_values_that_differ_from_the_catalogue(toy):
    _, entry, monkeypatch = toy
    other = dataclasses.replace(entry, file={"content": "0" * 64})
    monkeypatch.setattr(catalog, "entry", lambda name: other)
    with pytest.raises(catalog.DataNotFound, match="differ from the catalogue"):
        catalog.get("toy", stream=io.StringIO())
    assert not [path for path in catalog.cache_folder().rglob("*") if path.is_file()]


def test_loaders_read_what_the_published_files_look_like(tmp_path):
    import gzip
    import tarfile
    import zipfile

    def entry(name, **changes):
        return dataclasses.replace(catalog.entry(name), **changes)

    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(
            "ETT-small/ETTh1.csv", "date,HUFL,OT\n2016-07-01 00:00:00,5.8,30.5\n2016-07-01 01:00:00,5.6,\n"
        )
    columns = sources.load_csv([tmp_path / "a.zip"], {"member": "ETTh1.csv"}, entry("etth1"))
    assert list(columns) == ["timestamp", "HUFL", "OT"]
    assert np.isnan(columns["OT"][1])
    (tmp_path / "b.gz").write_bytes(gzip.compress(b"0.1,0.2\n0.3,0.4\n"))
    columns = sources.load_matrix([tmp_path / "b.gz"], {"start": "1990-01-05"}, entry("exchange_rate"))
    np.testing.assert_array_equal(columns["timestamp"], np.array(["1990-01-05", "1990-01-08"], "M8[ns]"))
    (tmp_path / "train.csv").write_text('"V1","V2","V3","V4"\n"H1",1,2,\n"H2",3,4,5\n')
    (tmp_path / "test.csv").write_text('"V1","V2"\n"H1",7\n"H2",8\n')
    (tmp_path / "starts.tsf").write_text(TSF.replace("1990-01-31 00-00-00", "2015-07-01 12-00-00"))
    paths = [tmp_path / name for name in ("train.csv", "test.csv", "starts.tsf")]
    columns = sources.load_m4(paths, {}, entry("m4_hourly"))
    np.testing.assert_array_equal(columns["target"], [1, 2, 7, 3, 4, 5, 8])
    assert columns["timestamp"][2] == np.datetime64("2015-07-01T14")
    lines = [{"start": "1990-01-01 00:00:00", "target": [v, v + 1, v + 2][:k]} for k in (2, 3) for v in (1.0, 5.0)]
    body = "\n".join(map(json.dumps, lines)).encode()
    with tarfile.open(tmp_path / "c.tar.gz", "w:gz") as archive:
        info = tarfile.TarInfo("exchange_rate_nips/test/data.json")
        info.size = len(body)
        archive.addfile(info, io.BytesIO(body))
    columns = sources.load_gluonts_rolling([tmp_path / "c.tar.gz"], {}, entry("exchange_rate_nips", n_series=2))
    np.testing.assert_array_equal(columns["v1"], [5, 6, 7])


# GluonTS


@pytest.mark.filterwarnings("ignore:.*Period with BDay freq:FutureWarning")
def test_series_survive_the_way_to_gluonts_and_back():
    starts = {
        "h": "2024-01-01T05", "D": "2024-02-28", "B": "2024-02-29", "W-SUN": "2024-01-07", "7D": "2024-01-03",
        "MS": "2024-01-01", "QS": "2023-10-01", "YS": "2020-01-01", "15min": "2024-01-01",
    }  # fmt: skip
    for freq, start in starts.items():
        series = [Series("a", np.datetime64(start), freq, np.array([[1.0, np.nan, 3]]))]
        _assert_same(from_gluonts(to_gluonts(series)), series)
    assert (period_freq("QE-NOV"), period_freq("QS-OCT"), period_freq("2ME")) == ("Q-NOV", "Q", "2M")
    wide = [Series("a", np.datetime64("2024-01-01"), "D", np.ones((2, 5)), np.ones((3, 7)), (4,), ("x", "y"))]
    (back,) = from_gluonts(to_gluonts(wide, one_dim=False))
    assert (back.values.shape, back.known.shape, back.static) == ((2, 5), (3, 7), (4,))
    with pytest.raises(ValueError, match="one_dim=False"):
        to_gluonts(wide)
    with pytest.raises(ValueError, match="expected 'h'"):
        to_gluonts(wide, "h")


def _assert_same_windows(task, **kwargs):
    _, windows = task.split(**kwargs)
    data = evaluation_data(task, **kwargs)
    assert len(data) == len(windows)
    for (context, label), (entry, truth) in zip(windows, data, strict=True):
        assert context.item_id == entry["item_id"] == truth["item_id"]
        np.testing.assert_array_equal(np.atleast_2d(entry["target"]), context.values.astype(np.float32))
        np.testing.assert_array_equal(np.atleast_2d(truth["target"]), label.astype(np.float32))


def test_gluonts_sees_the_windows_of_the_task():
    _assert_same_windows(_toy_task())
    _assert_same_windows(_toy_task(), multivariate=True)
    _assert_same_windows(catalog.task("simulated"))


@pytest.mark.filterwarnings("ignore:.*Period with BDay freq:FutureWarning")
@pytest.mark.parametrize("name", ["exchange_rate_nips", "us_births/M", "m1_quarterly", "tourism_yearly"])
def test_gluonts_sees_the_windows_of_real_tasks(data_root, name):
    _assert_same_windows(catalog.task(name))


# Command line


def _run(*words):
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    return cli.run(parser.parse_args(words))


def test_list_and_describe_say_what_is_known_and_where_it_is(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("TSGDN_DATA", str(tmp_path))
    monkeypatch.setenv("TSGDN_CACHE", str(tmp_path))
    assert _run("list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 45
    assert next(line for line in lines if line.startswith("etth1 ")).split() == ["etth1", "h", "7", "24", "not", "here"]
    assert _run("list", "--json") == 0
    assert {"name": "simulated", "freq": "h", "series": 16, "horizon": 24, "found": "built in"} in json.loads(
        capsys.readouterr().out
    )
    assert _run("describe", "us_births") == 0
    out = capsys.readouterr().out
    assert "CC BY 4.0" in out
    assert "us_births/M: horizon 12, windows 2" in out
    for name in catalog.names():
        assert _run("describe", name, "--json") == 0
        assert json.loads(capsys.readouterr().out)["name"] == name


def test_get_without_a_network_is_one_line_and_exit_code_1(toy, capsys):
    toy[0].unlink()
    assert _run("get", "toy") == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "could not download" in captured.err


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_simulate_writes_what_frames_read(tmp_path, suffix, capsys):
    path = tmp_path / f"out{suffix}"
    words = ("--out", str(path), "--seed", "3", "--series", "2", "--steps", "200", "--variates", "3", "--json")
    assert _run("simulate", "seasonal", *words) == 0
    assert json.loads(capsys.readouterr().out) == {"path": str(path), "series": 2, "variates": 3, "rows": 400}
    read = {".csv": pl.read_csv, ".jsonl": pl.read_ndjson, ".parquet": pl.read_parquet}[suffix]
    got = frames.to_series(read(path), freq="h", variates=("v0", "v1", "v2"))
    _assert_same(got, regimes.simulate(series=2, steps=200, variates=3, seed=3))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("describe", "etth2"), "did you mean"),
        (("get", "nothing-like-it"), "not in the catalogue"),
        (("simulate", "chaos"), "kind 'chaos' is not known"),
        (("simulate", "seasonal", "--steps", "0"), "steps is 0"),
        (("simulate", "seasonal", "--freq", "x"), "freq 'x' is not known"),
        (("simulate", "seasonal", "--out", "a.xlsx"), "must end in .csv, .jsonl or .parquet"),
        (("simulate", "seasonal", "--out", "/nowhere/at/all/a.csv"), "No such file"),
        (("simulate", "seasonal", "--json"), "--json needs --out"),
    ],
)
def test_misuse_is_one_line(words, message):
    from tsgdn.cli.main import Misuse

    with pytest.raises(Misuse) as error:
        _run(*words)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
