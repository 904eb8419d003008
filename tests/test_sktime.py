"""The adapter for sktime: the numbers of the stateful predictor, panels, and sktime's own checks."""

import copy
import pickle

import numpy as np
import pandas as pd
import pytest
import torch

from tsgdn.data.clock import Clock
from tsgdn.data.series import Series
from tsgdn.model import artefact
from tsgdn.model.forecaster import Forecaster
from tsgdn.streaming.predictor import StatefulPredictor

pytest.importorskip("sktime", reason="needs sktime: pip install 'tsgdn[sktime]'")

from tsgdn.adapters.sktime import GDNForecaster

START = np.datetime64("2024-02-27T05:00", "ns")
FH = [1, 2, 5, 30]
LEVELS = [0.5, 0.05, 0.995, 0.33]


def small_model(user_features=0, freq="h", calendar=True) -> Forecaster:
    """Random weights; laws hold for any."""
    torch.manual_seed(3)
    known = user_features + (Clock(freq).calendar_size if calendar else 0)
    sizes = {"patch_size": 4, "patches_ahead": 2, "seasons": (1, 24), "width": 8, "depth": 1}
    model = Forecaster(known_features=known, **sizes).eval()
    with torch.no_grad():  # the head starts at zero: make every part count
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def walk(steps, seed=0, variates=1):
    return np.random.default_rng(seed).normal(size=(variates, steps)).cumsum(1) + 10


def hours(steps, first=0):
    return pd.date_range(START + np.timedelta64(first, "h"), periods=steps, freq="h")


def rows(item, series):
    values = series.to_numpy()
    return [(item, t, v) for t, v in zip(series.index.to_numpy("M8[ns]"), values.tolist(), strict=True)]


def warmed(model, *series, **options):
    plain = StatefulPredictor(model, freq="h", **options)
    plain.warm_up(list(series))
    return plain


@pytest.mark.parametrize("known", [False, True])
def test_fit_update_and_predict_are_warm_up_observe_and_forecast(known):
    model = small_model(user_features=2 * known)
    y = pd.Series(walk(60)[0], hours(60), name="load")
    y.iloc[[7, 41, 42]] = np.nan
    features = np.random.default_rng(1).normal(size=(2, 90)).astype(np.float32)
    X = pd.DataFrame({"sun": features[1], "other": 0.0, "wind": features[0]}, hours(90)) if known else None

    def part(a, b):
        return None if X is None else X.iloc[a:b]

    ours = GDNForecaster(model, features=["wind", "sun"] if known else None)
    assert ours.get_tag("capability:exogenous") is known
    ours.fit(y.iloc[:33], X=part(0, 40))
    history = Series(
        "y", START, "h", y.to_numpy()[None, :33], known=features[:, :40] if known else None, variates=("load",)
    )
    plain = warmed(model, history, variates=("load",))
    for a, b in ((33, 34), (34, 41), (41, 60)):
        ours.update(y.iloc[a:b], X=part(a, b + 2), update_params=False)
        given = {"y": features[:, a : b + 2]} if known else None
        plain.observe(rows("y", y.iloc[a:b]), known=given)
        lent = {"y": features[:, b:90]} if known else None
        want = plain.forecast(horizon=30, known=lent)
        got = ours.predict(FH, X=part(b, 90))
        assert got.name == "load"
        np.testing.assert_array_equal(got.to_numpy(), want.median[0, 0, np.array(FH) - 1])
        np.testing.assert_array_equal(got.index, hours(90, b)[np.array(FH) - 1])
        assert ours.cutoff[0] == y.index[b - 1]
        quantiles = ours.predict_quantiles(FH, X=part(b, 90), alpha=LEVELS)
        want = plain.forecast(horizon=30, known=lent, quantile_levels=sorted(LEVELS))
        for level in LEVELS:
            np.testing.assert_array_equal(quantiles["load"][level], want.quantile(level)[0, 0, np.array(FH) - 1])
        band = ours.predict_interval(FH, X=part(b, 90), coverage=0.9)["load"][0.9]
        want = plain.forecast(horizon=30, known=lent, quantile_levels=[0.05, 0.95]).values[0, 0, np.array(FH) - 1]
        np.testing.assert_allclose(band[["lower", "upper"]].to_numpy(), want, rtol=1e-12)
    assert (band["lower"] < band["upper"]).all()
    if known:
        assert (ours.predict(FH).to_numpy() != ours.predict(FH, X=part(60, 90)).to_numpy()).any()


def test_several_columns_are_variates():
    model, values = small_model(), walk(30, variates=3)
    y = pd.DataFrame(values.T, hours(30), ["a", "b", "c"])
    ours = GDNForecaster(model).fit(y.iloc[:20]).update(y.iloc[20:], update_params=False)
    plain = warmed(model, Series("y", START, "h", values[:, :20], variates=("a", "b", "c")), variates=("a", "b", "c"))
    plain.observe(rows("y", y.iloc[20:]))
    got = ours.predict(FH)
    assert list(got.columns) == ["a", "b", "c"]
    np.testing.assert_array_equal(got.to_numpy().T, plain.forecast(horizon=30).median[0][:, np.array(FH) - 1])
    quantiles = ours.predict_quantiles(FH, alpha=[0.9, 0.1])
    want = plain.forecast(horizon=30, quantile_levels=[0.1, 0.9])
    np.testing.assert_array_equal(quantiles["b"][0.9], want.quantile(0.9)[0, 1, np.array(FH) - 1])


def panel(*parts):
    return pd.concat({key: pd.DataFrame({"y": one}) for key, one in parts}, names=["shop", "time"])


def test_a_panel_is_many_items_each_forecast_from_its_own_end():
    model = small_model()
    a, b, c = (pd.Series(walk(40, seed)[0], hours(40)) for seed in (1, 2, 3))
    ours = GDNForecaster(model, freq="h").fit(panel(("a", a[:20]), (7, b[:26])))
    plain = warmed(
        model, *(Series(n, START, "h", s.to_numpy()[None], variates=("y",)) for n, s in (("a", a[:20]), ("7", b[:26]))),
        variates=("y",),
    )  # fmt: skip
    ours.update(panel(("a", a[20:25]), (7, b[26:40]), ("new", c[30:33])), update_params=False)
    plain.observe([*rows("a", a[20:25]), *rows("7", b[26:40]), *rows("new", c[30:33])])
    assert ours.predictor.item_ids == ("a", "7", "new")
    got, want = ours.predict(FH), plain.forecast(["a", "7", "new"], horizon=30).median[:, 0]
    assert got.index.names == ["shop", "time"]
    for row, (key, end) in enumerate((("a", 25), (7, 40), ("new", 33))):
        one = got.loc[key]["y"]
        np.testing.assert_array_equal(one.to_numpy(), want[row, np.array(FH) - 1])
        np.testing.assert_array_equal(one.index, hours(30, end)[np.array(FH) - 1])
    at = ours.predict(hours(3, 41))  # times, not steps: the same for all
    for row, (key, end) in enumerate((("a", 25), (7, 40), ("new", 33))):
        np.testing.assert_array_equal(at.loc[key]["y"].to_numpy(), want[row, 41 - end : 44 - end])
    quantiles = ours.predict_quantiles(FH, alpha=[0.2])
    assert quantiles.index.equals(got.index)


def test_two_instances_of_one_name_are_refused():
    y = pd.Series(walk(9)[0], hours(9))
    with pytest.raises(ValueError, match="two instances of y are named '7'"):
        GDNForecaster(small_model(), freq="h").fit(panel(("7", y), (7, y)))


@pytest.mark.parametrize("freq", ["M", "D", "W-WED", "h"])
def test_periods_are_steps_of_the_grid_by_their_first_day_or_their_last(freq):
    index = pd.period_range("2021-02-03", periods=30, freq=freq)
    y = pd.Series(walk(30)[0], index)
    model = small_model(freq=freq)
    got = GDNForecaster(model).fit(y).predict([1, 2, 9])
    assert got.index.equals(pd.period_range(index[-1] + 1, periods=9, freq=freq)[[0, 1, 8]])
    plain = StatefulPredictor(model, freq=freq)
    start = index[0].start_time.to_datetime64()
    plain.warm_up(Series("y", start, freq, y.to_numpy()[None]))
    np.testing.assert_array_equal(got.to_numpy(), plain.forecast(horizon=9).median[0, 0, [0, 1, 8]])
    if freq == "M":
        ends = GDNForecaster(small_model(freq="ME"), freq="ME").fit(y)
        assert ends.predictor.forecast(horizon=1).start[0] == np.datetime64("2023-08-31")


def test_whole_numbers_count_steps_where_no_calendar_is_read():
    values = walk(30)[0]
    model = small_model(calendar=False)
    got = GDNForecaster(model, calendar=False).fit(pd.Series(values, pd.RangeIndex(5, 35))).predict([1, 12])
    assert list(got.index) == [35, 46]
    plain = StatefulPredictor(model, freq="s", calendar=False)
    plain.warm_up(Series("y", START, "s", values[None]))
    np.testing.assert_array_equal(got.to_numpy(), plain.forecast(horizon=12).median[0, 0, [0, 11]])
    with pytest.raises(ValueError, match="the model reads the calendar"):
        GDNForecaster(small_model(), freq="h").fit(pd.Series(values))


def test_steps_left_out_are_silence():
    model = small_model()
    y = pd.Series(walk(40)[0], hours(40)).drop(hours(40)[[5, 6, 20, 21, 22, 23, 24, 30, 36]])
    assert y.index.freq is None
    ours = GDNForecaster(model, freq="h").fit(y.iloc[:20]).update(y.iloc[20:], update_params=False)
    plain = StatefulPredictor(model, freq="h")
    whole = y.iloc[:20].asfreq("h")
    plain.warm_up(Series("y", START, "h", whole.to_numpy()[None]))
    plain.observe(rows("y", y.iloc[20:]))
    got = ours.predict(FH)
    np.testing.assert_array_equal(got.to_numpy(), plain.forecast(horizon=30).median[0, 0, np.array(FH) - 1])
    np.testing.assert_array_equal(got.index, hours(30, 40)[np.array(FH) - 1])


def test_rows_told_again_count_once_and_rows_that_contradict_are_named():
    y = pd.Series(walk(30)[0], hours(30))
    once = GDNForecaster(small_model()).fit(y)
    again = GDNForecaster(small_model()).fit(y.iloc[:28]).update(y.iloc[20:], update_params=False)
    np.testing.assert_array_equal(again.predict(FH).to_numpy(), once.predict(FH).to_numpy())
    with pytest.warns(UserWarning, match="2 of 3 rows were set aside, the first of item y at 2024-02-28 09:00"):
        again.update(y.iloc[27:] + np.array([0, 1, 1]), update_params=False)
    np.testing.assert_array_equal(again.predict(FH).to_numpy(), once.predict(FH).to_numpy())


def test_update_params_adapts_or_says_that_it_cannot():
    y = pd.Series(walk(30)[0], hours(30))
    ours, plain = (GDNForecaster(small_model()).fit(y.iloc[:20]) for _ in range(2))
    plain.update(y.iloc[20:], update_params=False)
    called = []
    ours.predictor.adapt = lambda: called.append(ours.predictor.head("y"))
    ours.update(y.iloc[20:25])
    assert called == [25]
    ours.predictor.adapt = None
    with pytest.warns(UserWarning, match="update_params=True: this predictor cannot adapt"):
        ours.update(y.iloc[25:])
    np.testing.assert_array_equal(ours.predict(FH).to_numpy(), plain.predict(FH).to_numpy())


def test_a_model_folder_says_what_it_is_for(tmp_path):
    artefact.save(small_model(), tmp_path, series={"freq": "h", "calendar": True, "variates": ["target"]})
    y = pd.Series(walk(30)[0], hours(30))
    got = GDNForecaster(str(tmp_path)).fit(y).predict(FH)
    np.testing.assert_array_equal(got.to_numpy(), GDNForecaster(small_model()).fit(y).predict(FH).to_numpy())
    with pytest.raises(ValueError, match="y has freq 'D', the model is for 'h'"):
        GDNForecaster(tmp_path).fit(pd.Series(walk(9)[0], pd.date_range("2024-01-01", periods=9)))
    artefact.save(small_model(), tmp_path, series={"freq": "h", "variates": ["a", "b"], "targets": 1})
    with pytest.raises(ValueError, match=r"expected those of the fit, in order: \['a', 'b'\]"):
        GDNForecaster(tmp_path).fit(y)
    with pytest.raises(ValueError, match="the model does not forecast b"):
        GDNForecaster(tmp_path).fit(pd.DataFrame(walk(9, variates=2).T, hours(9), ["a", "b"]))


def test_copies_and_pickles_go_on_alone_and_weights_stay():
    model = small_model()
    before = copy.deepcopy(model.state_dict())
    y = pd.Series(walk(40)[0], hours(40))
    ours = GDNForecaster(model).fit(y.iloc[:30])
    want = ours.predict(FH).to_numpy()
    twins = [copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))]
    for twin in twins:
        np.testing.assert_array_equal(twin.predict(FH).to_numpy(), want)
        twin.update(y.iloc[30:], update_params=False)
    np.testing.assert_array_equal(ours.predict(FH).to_numpy(), want)
    ours.update(y.iloc[30:], update_params=False)
    for twin in twins:
        np.testing.assert_array_equal(twin.predict(FH).to_numpy(), ours.predict(FH).to_numpy())
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


def test_the_evaluation_of_sktime_is_a_stream_of_updates():
    from sktime.split import SlidingWindowSplitter

    y = pd.Series(walk(40)[0], hours(40))
    ours = GDNForecaster(small_model()).fit(y.iloc[:24])
    windows = SlidingWindowSplitter(fh=[1, 2], window_length=4, step_length=4)
    table = ours.update_predict(y.iloc[24:], windows, update_params=False)
    assert ours.cutoff[0] == y.index[23]
    for end in (28, 32, 36):
        anew = GDNForecaster(small_model()).fit(y.iloc[:24]).update(y.iloc[24:end], update_params=False)
        np.testing.assert_allclose(table[y.index[end - 1]].dropna().to_numpy().ravel(), anew.predict([1, 2]), rtol=1e-5)


def test_wrong_input_is_refused_in_one_line():
    y = pd.Series(walk(30)[0], hours(30))
    late = [*y.index[:-1], y.index[-1] + pd.Timedelta("5min")]
    cases = [
        (GDNForecaster(small_model(user_features=1)), {"y": y}, "takes 1 known features besides the calendar"),
        (GDNForecaster(small_model(user_features=1), features="w"), {"y": y}, "expected a list of names"),
        (
            GDNForecaster(small_model(user_features=1), features=["w"]),
            {"y": y, "X": pd.DataFrame({"v": 1.0}, y.index)},
            "X has no column 'w'",
        ),
        (GDNForecaster(small_model()), {"y": y.iloc[[0, 3, 4, 9]]}, "the index of y tells no frequency"),
        (GDNForecaster(small_model(), freq="h"), {"y": y.set_axis(late)}, "not on the grid"),
        (GDNForecaster(small_model()), {"y": y.where(y.index != y.index[4], np.inf)}, "infinite value at step 4"),
    ]  # fmt: skip
    for forecaster, data, text in cases:
        with pytest.raises(ValueError, match=text) as raised:
            forecaster.fit(**data)
        assert "\n" not in str(raised.value)
    ours = GDNForecaster(small_model()).fit(y)
    with pytest.raises(NotImplementedError, match="in-sample"):
        ours.predict([-1])
    with pytest.raises(NotImplementedError, match="in-sample"):
        ours.predict(y.index[-2:])
    with pytest.raises(ValueError, match="alpha must lie"):
        ours.predict_quantiles([1], alpha=[1.0])


EXCLUDED = {
    # joblib's hash of any torch module differs from that of its copy; that weights stay is tested above.
    "test_fit_does_not_overwrite_hyper_params",
    # The type checks of these tests wrap __init__ in one that takes any arguments; it passes without them.
    "test_constructor",
}
FAST = [
    "test_clone",
    "test_cutoff",
    "test_fh_attribute",
    "test_hierarchical_with_exogenous",
    "test_pred_int_tag",
    "test_unequal_length_hierarchical_fit_predict",
    "test_update_tag",
    "test_update_with_exogenous_variables",
    "test_valid_object_tags",
]
MATRICES = {  # hundreds of combinations of indices and horizons
    "test_predict_time_index",
    "test_predict_time_index_with_X",
    "test_predict_time_index_in_sample_full",
    "test_update_predict_predicted_index",
    "test_methods_have_no_side_effects",
    "test_non_state_changing_method_contract",
    "test_fit_idempotent",
    "test_persistence_via_pickle",
    "test_save_estimators_to_file",
    "test_multiprocessing_idempotent",
    "test_predict_interval",
    "test_predict_quantiles",
    "test_predict_proba",
    "test_deepcopy_fitted_predict",
}


def assert_sktime_finds_nothing(**choice):
    from sktime.utils.estimator_checks import check_estimator

    found = check_estimator(GDNForecaster, verbose=False, **choice)
    assert found
    wrong = {name: str(result)[:300] for name, result in found.items() if result != "PASSED"}
    assert not wrong


@pytest.mark.filterwarnings("ignore")
def test_sktime_finds_nothing_wrong():
    assert_sktime_finds_nothing(tests_to_run=FAST)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_sktime_finds_nothing_wrong_in_its_other_checks():
    assert_sktime_finds_nothing(tests_to_exclude=[*EXCLUDED, *MATRICES, *FAST])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(MATRICES))
def test_sktime_finds_nothing_wrong_in_many_combinations(name):
    assert_sktime_finds_nothing(tests_to_run=[name])
