"""Numbers from outside first: closed forms, R, scikit-survival's data sets against lifelines; then edges."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from lifelines import CoxPHFitter, KaplanMeierFitter
from lifelines.datasets import load_lung
from lifelines.statistics import multivariate_logrank_test
from lifelines.utils import concordance_index
from sksurv.datasets import load_gbsg2, load_veterans_lung_cancer, load_whas500
from sksurv.metrics import brier_score

from morphome import survival
from morphome.errors import MorphomeError
from morphome.evaluation.risk_groups import rmst, stratified_cox

#: lifelines' own.
pytestmark = pytest.mark.filterwarnings("ignore:Starting with pandas version 4")


def _load(name: str) -> dict:
    if name == "veteran":
        x, y = load_veterans_lung_cancer()
        return {"time": y["Survival_in_days"], "event": y["Status"], "x": x["Karnofsky_score"].to_numpy(), "sign": -1}
    if name == "gbsg2":
        x, y = load_gbsg2()
        return {"time": y["time"], "event": y["cens"], "x": x["pnodes"].to_numpy(), "sign": 1}
    x, y = load_whas500()
    return {"time": y["lenfol"], "event": y["fstat"], "x": x["age"].to_numpy(), "sign": 1}


@pytest.fixture(scope="module", params=["veteran", "gbsg2", "whas500"])
def known(request) -> dict:
    """A public data set with one covariate, and its referee values."""
    data = _load(request.param)
    data["x"] = np.asarray(data["x"], dtype=np.float64)
    return data | REFEREE[request.param]


#: scikit-survival = lifelines = torchsurv where they offer the metric; two versions of scikit-survival agree.
REFEREE = {
    "veteran": {
        "harrell": (0.7092798728, 5674, 1989, 1141, 7),
        "uno_no_tau": 0.6992529166,
        "tau": 240.0,
        "uno": 0.7028899469,
        "times": [60, 120, 180, 240],
        "auc": [0.8186232, 0.7311017, 0.7123386, 0.6919862],
        "mean_auc": 0.7746437,
        "km": [0.538229, 0.3457772, 0.2224114, 0.1710857],
        "brier": [0.2486026, 0.2262922, 0.1729764, 0.1418474],
        "ibs": 0.1981645,
        "beta": {"breslow": -0.0332429, "efron": -0.0334237},
        "loglik": (-505.4491, -484.4335),
        "ibs_cox": 0.1684375,
        "n_high": 52,
        "chi2": 28.22337,
        "rmst": (56.0577, 127.2141),
    },
    "gbsg2": {
        "harrell": (0.6452446796, 78870, 40214, 13988, 42),
        "uno_no_tau": 0.6459231655,
        "tau": 1825.0,
        "uno": 0.6298304981,
        "times": [365, 730, 1095, 1460, 1825],
        "auc": [0.7166981, 0.6759585, 0.6967825, 0.6625772, 0.6535374],
        "mean_auc": 0.6818008,
        "km": [0.9155581, 0.7462306, 0.6426204, 0.5588483, 0.4916449],
        "brier": [0.0773172, 0.1893852, 0.2296972, 0.2465838, 0.2499984],
        "ibs": 0.2073310,
        "beta": {"breslow": 0.0585960, "efron": 0.0586029},
        "loglik": (-1788.1047, -1763.0869),  # ℓ(0) of lifelines and scikit-survival alike
        "ibs_cox": 0.1916312,
        "n_high": 310,
        "chi2": 67.90605,
        "rmst": (1102.6304, 1494.5019),
    },
    "whas500": {
        "harrell": (0.7312339486, 54226, 19472, 1451, 14),
        "uno_no_tau": 0.7733262117,
        "tau": 1460.0,
        "uno": 0.7321423307,
        "times": [365, 730, 1095, 1460],
        "auc": [0.7659540, 0.7684302, 0.7715754, 0.7775494],
        "mean_auc": 0.7681740,
        "km": [0.724, 0.6415797, 0.6143941, 0.5611538],
        "brier": [0.199824, 0.2299768, 0.2369338, 0.2463163],
        "ibs": 0.2299936,
        "beta": {"breslow": 0.0662470, "efron": 0.0663390},
        "loglik": (-1227.3206, -1156.2492),
        "ibs_cox": 0.1829904,
        "n_high": 243,
        "chi2": 114.29232,
        "rmst": (705.5797, 1252.7555),  # lifelines agrees to 1e-10
    },
}


def _brier(*data) -> tuple[np.ndarray, str]:
    """BS(t) and why there is none."""
    shares, reason = survival.brier_contributions(*data)
    return shares.mean(axis=0), reason


def _ibs(*data) -> float:
    """BS(t) over the range of the times, which come last."""
    return float(survival.integrate(survival.brier_contributions(*data)[0], data[-1]).mean())


# ------------------------------------------------------------------------------------ three public data sets


def test_concordance_of_public_data(known):
    time, event, risk = known["time"], known["event"], known["sign"] * known["x"]
    found = survival.harrell(time, event, risk)
    c, *counts = known["harrell"]
    assert found.c == pytest.approx(c, abs=6e-11)
    assert [found.concordant, found.discordant, found.tied_risk, found.tied_time] == counts
    assert found.comparable == sum(counts[:3])
    assert found.c == pytest.approx(concordance_index(time, -risk, event), abs=1e-12)
    for tau, value in ((np.inf, known["uno_no_tau"]), (known["tau"], known["uno"])):
        assert survival.uno(time, event, time, event, risk, tau).value == pytest.approx(value, abs=6e-11)


def test_auc_of_public_data(known):
    time, event, risk = known["time"], known["event"], known["sign"] * known["x"]
    found = np.array([survival.auc_at(time, event, time, event, risk, t).value for t in known["times"]])
    assert found == pytest.approx(known["auc"], abs=6e-8)
    # The library's mean weighs by the drop of the Kaplan-Meier curve.
    curve = survival.step(*survival.kaplan_meier(time, event), known["times"], before=1.0)
    drop = -np.diff(np.concatenate([[1.0], curve]))
    assert (found * drop).sum() / drop.sum() == pytest.approx(known["mean_auc"], abs=6e-8)


def test_marginal_curve_and_its_brier_score(known):
    time, event, times = known["time"], known["event"], np.array(known["times"], float)
    curve = survival.step(*survival.kaplan_meier(time, event), times, before=1.0)
    assert curve == pytest.approx(known["km"], abs=6e-8)
    lifelines = KaplanMeierFitter().fit(time, event).survival_function_at_times(times).to_numpy()
    assert curve == pytest.approx(lifelines, abs=1e-12)
    data = (time, event, time, event, np.tile(curve, (len(time), 1)), times)
    score, reason = _brier(*data)
    assert reason == ""
    assert score == pytest.approx(known["brier"], abs=6e-8)
    assert _ibs(*data) == pytest.approx(known["ibs"], abs=6e-8)


@pytest.mark.parametrize("ties", ["breslow", "efron"])
def test_one_covariate_cox_of_public_data(known, ties):
    time, event, x = known["time"], known["event"], known["x"]
    fit = survival.fit_cox_ridge(x[:, None], time, event, 0.0, ties)
    assert fit.converged
    assert fit.coef[0] == pytest.approx(known["beta"][ties], abs=6e-8)
    own = stratified_cox(x, time, event, ties=ties)
    assert own.coef == pytest.approx(fit.coef[0], abs=1e-8)
    if ties == "efron":
        assert (own.loglik_null, own.loglik) == pytest.approx(known["loglik"], abs=6e-5)
        times = np.array(known["times"], float)
        ibs = _ibs(time, event, time, event, fit.survival(x[:, None], times), times)
        assert ibs == pytest.approx(known["ibs_cox"], abs=6e-8)


def test_median_split_of_public_data(known):
    time, event, risk = known["time"], known["event"], known["sign"] * known["x"]
    high = risk > np.median(risk)
    assert high.sum() == known["n_high"]
    chi2, p, reason = survival.logrank(time, event, high)
    assert chi2 == pytest.approx(known["chi2"], abs=6e-6)
    assert p == pytest.approx(multivariate_logrank_test(time, high, event).p_value, rel=1e-8)
    assert reason == ""
    areas = rmst(time[high], event[high], known["tau"]), rmst(time[~high], event[~high], known["tau"])
    assert areas == pytest.approx(known["rmst"], abs=6e-5)


# -------------------------------------------------------------------------------------- closed forms, R packages


def test_closed_form_cox():
    """Therneau and Grambsch's data 1: Breslow log((3+√33)/2), Efron the log of a root of 30 + 23r − r³."""
    time, event, x = [9, 1, 1, 6, 6, 8], [1, 1, 0, 1, 1, 0], np.array([[0], [1], [1], [1], [0], [0]])
    breslow, efron = (survival.fit_cox_ridge(x, time, event, 0.0, ties).coef[0] for ties in ("breslow", "efron"))
    assert breslow == pytest.approx(math.log((3 + math.sqrt(33)) / 2), abs=1e-8)
    assert efron == pytest.approx(1.676857486, abs=1e-8)
    own = stratified_cox(x[:, 0], time, event, ties="efron")
    assert (own.loglik_null, own.loglik) == pytest.approx((-4.276666119, -3.358974840), abs=1e-9)
    own = stratified_cox(x[:, 0], time, event, ties="breslow")
    assert (own.loglik_null, own.loglik) == pytest.approx((-4.564348191, -3.824749505), abs=1e-9)


AML = {
    "maintained": ([9, 13, 13, 18, 23, 28, 31, 34, 45, 48, 161], [1, 1, 0, 1, 1, 0, 1, 1, 0, 1, 0]),
    "not": ([5, 5, 8, 8, 12, 16, 23, 27, 30, 33, 43, 45], [1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1]),
}


def test_r_aml():
    time, event = AML["maintained"]
    found = survival.harrell(time, event, -np.array([1, 6, 2, 7, 3, 7, 3, 8, 4, 4, 5]))
    assert (found.concordant, found.discordant, found.tied_risk, found.c) == (24, 14, 2, 0.625)
    both = [a + b for a, b in zip(AML["maintained"], AML["not"], strict=True)]
    chi2, p, _ = survival.logrank(*both, [1] * 11 + [0] * 12)
    assert (chi2, p) == pytest.approx((3.396389, 0.0653), abs=5e-5)


def test_r_lung():
    lung = load_lung()
    known = lung.dropna(subset=["ph.ecog"])
    found = survival.harrell(known["time"], known["status"], known["ph.ecog"])
    assert (found.concordant, found.discordant, found.tied_risk) == (8392, 4258, 7137)
    assert found.c == pytest.approx(0.6044625, abs=5e-8)
    fit = survival.fit_cox_ridge(lung[["age", "sex"]], lung["time"], lung["status"], 0.0)
    assert fit.coef == pytest.approx([0.0170453, -0.5132185], abs=6e-8)


def test_uno_of_r_surv_auc():
    time = np.array([1, 5, 6, 10, 11, 34, 45, 46, 50, 56.0])
    event = np.array([0, 1, 1, 0, 1, 0, 1, 0, 0, 1])
    risk = np.array([5, 8, 11, 19, 34, 12, 3, 9, 12, 20.0])
    assert survival.uno(time, event, time, event, risk, np.inf).value == pytest.approx(0.347890360332615, abs=1e-14)
    risk[3] = 11
    assert survival.uno(time, event, time, event, risk, np.inf).value == pytest.approx(0.36562981, abs=5e-9)
    risk[6] = 11
    assert survival.uno(time, event, time, event, risk, np.inf).value == pytest.approx(0.38786572, abs=5e-9)


def test_uno_with_another_training_set():
    train = ([2, 4, 6, 8, 10, 11, 15, 19], [0, 1, 0, 1, 0, 0, 0, 0])
    test = ([1, 3, 5, 8, 12, 13], [1, 0, 0, 1, 1, 1], [5, 8, 13, 11, 9, 4])
    assert survival.uno(*train, *test, 19).value == pytest.approx(0.7543736528, abs=5e-11)


def _gbsg2_covariates() -> tuple[pd.DataFrame, np.ndarray, np.ndarray]:
    x, y = load_gbsg2()
    grade = x["tgrade"].map({"I": 1, "II": 2, "III": 3}).astype(float)
    return x.assign(grade=grade), y["time"].astype(float), y["cens"]


def test_brier_of_r_nottingham_groups():
    x, time, event = _gbsg2_covariates()
    index = 0.2 * x["tsize"] / 10 + 1 + x["grade"]
    group = np.digitize(index, [3.4, 5.4 + 1e-9])
    assert np.bincount(group).tolist() == [171, 512, 3]
    times = np.array([365, 730, 1095, 1460, 1825.0])
    curves = np.empty((len(time), 5))
    for g in range(3):
        curves[group == g] = survival.step(*survival.kaplan_meier(time[group == g], event[group == g]), times, 1.0)
    score, _ = _brier(time, event, time, event, curves, times)
    r = [0.0762922458520448, 0.182536421174199, 0.220017747254941, 0.234133800146671, 0.233822955042198]
    assert score == pytest.approx(r, abs=1e-13)
    ibs = _ibs(time, event, time, event, curves, times)
    assert ibs == pytest.approx(0.197936392255733, abs=1e-13)
    four = _ibs(time, event, time, event, curves[:, :4], times[:4])
    assert four == pytest.approx(0.185922397142833, abs=1e-13)


def test_brier_of_full_cox():
    x, time, event = _gbsg2_covariates()
    columns = x[["age", "estrec", "pnodes", "progrec", "tsize", "grade"]].astype(float)
    columns = columns.assign(hormone=x["horTh"] == "yes", post=x["menostat"] == "Post").to_numpy(float)
    fit = survival.fit_cox_ridge(columns, time, event, 0.0)
    score, _ = _brier(time, event, time, event, fit.survival(columns, [1825.0]), [1825.0])
    assert score[0] == pytest.approx(0.208818, rel=1e-5)


# ------------------------------------------------------------------------------------------ models and the rest


def _planted(n: int = 200, p: int = 6, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, p))
    death = rng.exponential(30 * np.exp(-x[:, 0] + 0.5 * x[:, 1]))
    censored = rng.uniform(1, 60, n)
    return x, np.round(np.minimum(death, censored), 1) + 0.1, death <= censored


def test_ridge_is_half_ridge_times_squared_norm():
    """lifelines minimises −ℓ/n + ½·penalizer·‖β·sd‖²: on columns with SD 1 its penalizer is ridge/n."""
    x, time, event = _planted()
    x = (x - x.mean(axis=0)) / x.std(axis=0, ddof=1)
    fit = survival.fit_cox_ridge(x, time, event, 7.0)
    frame = pd.DataFrame(x).assign(time=time, event=event)
    other = CoxPHFitter(penalizer=7.0 / len(x)).fit(frame, "time", "event", fit_options={"precision": 1e-12})
    assert fit.coef == pytest.approx(other.params_.to_numpy(), abs=1e-6)
    assert np.linalg.norm(fit.coef) < np.linalg.norm(survival.fit_cox_ridge(x, time, event, 0.0).coef)


def test_breslow_baseline_against_lifelines():
    x, time, event = _planted(60, 2)
    fit = survival.fit_cox_ridge(x, time, event, 0.0)
    frame = pd.DataFrame(x).assign(time=time, event=event)
    other = CoxPHFitter().fit(frame, "time", "event", fit_options={"precision": 1e-12})
    grid = np.array([5.0, 12.0, 24.0])
    curves = other.predict_survival_function(frame, times=grid).to_numpy().T
    assert fit.survival(x, grid) == pytest.approx(curves, abs=1e-6)
    assert (fit.survival(x, [0.0]) == 1.0).all()


def test_coxnet_path_shrinks_and_repeats():
    x, time, event = _planted()
    path = survival.fit_coxnet(x, time, event, l1_ratio=0.5, n_alphas=20, alpha_min_ratio=0.01)
    alphas = [a for a, _ in path]
    assert alphas == sorted(alphas, reverse=True)
    assert np.allclose(path[0][1], 0.0)
    sizes = [np.count_nonzero(c) for _, c in path]
    assert sizes[-1] > sizes[1] >= 1
    again = survival.fit_coxnet(x, time, event, l1_ratio=0.5, alphas=alphas[::-1])
    assert [a for a, _ in again] == pytest.approx(alphas[: len(again)])
    assert np.allclose([c for _, c in again], [c for _, c in path[: len(again)]], atol=1e-5)
    # Almost no L1 and the same strength: the ridge solution (penalty n·α).
    alpha, coef = survival.fit_coxnet(x, time, event, l1_ratio=1e-6, alphas=[0.05])[0]
    ridge = survival.fit_cox_ridge(x, time, event, len(x) * alpha, "breslow")
    assert coef == pytest.approx(ridge.coef, abs=1e-3)


def test_cox_says_what_is_wrong():
    x, time, event = _planted(30, 2)
    with pytest.raises(MorphomeError, match="none of 30 training patients has an event"):
        survival.fit_cox_ridge(x, time, np.zeros(30), 1.0)
    with pytest.raises(MorphomeError, match="none of 30"):
        survival.fit_coxnet(x, time, np.zeros(30), 0.5)
    x[:, 1] = 3.0
    with pytest.raises(MorphomeError, match="do not vary"):
        survival.fit_cox_ridge(x, time, event, 0.0)
    assert survival.fit_cox_ridge(x, time, event, 1.0).coef[1] == pytest.approx(0.0, abs=1e-9)


def test_brier_equals_the_library_where_it_answers():
    x, time, event = _planted(150, 3)
    train, test = slice(0, 100), slice(100, 150)
    fit = survival.fit_cox_ridge(x[train], time[train], event[train], 1.0)
    grid = np.linspace(3.0, 30.0, 40)
    curves = fit.survival(x[test], grid)
    mine, _ = _brier(time[train], event[train], time[test], event[test], curves, grid)
    both = [survival._surv(time[s], event[s]) for s in (train, test)]
    assert mine == pytest.approx(brier_score(*both, curves, grid)[1], abs=1e-14)


def test_censoring_curve_lets_events_leave_first():
    times, g = survival.censoring_km([1, 2, 2, 3], [1, 1, 0, 0])
    assert times.tolist() == [1, 2, 3]
    # At 2 the event has left: one of two is censored.
    assert g == pytest.approx([1.0, 0.5, 0.0])
    assert survival.censoring_at([1, 2, 2, 3], [1, 1, 0, 1], [0.5, 2.0, 3.0, 3.1])[:3] == pytest.approx([1, 0.5, 0.5])
    assert np.isnan(survival.censoring_at([1, 2, 2, 3], [1, 1, 0, 1], [3.1])).all()


def test_a_late_event_does_not_matter():
    """An event beyond the training follow-up, long after τ, made the library refuse the whole fold."""
    x, time, event = _planted(120, 2)
    train = time[:80], event[:80]
    test_time, test_event, risk = time[80:].copy(), event[80:].copy(), x[80:, 0]
    before = survival.auc_at(*train, test_time, test_event, risk, 24.0)
    late = int(np.flatnonzero(test_time > 24)[0])
    test_time[late], test_event[late] = 500.0, True
    assert survival.auc_at(*train, test_time, test_event, risk, 24.0) == before
    assert np.isfinite(before.value)
    assert np.isfinite(survival.uno(*train, test_time, test_event, risk, 24.0).value)
    curves, grid = np.full((40, 2), 0.7), np.array([12.0, 24.0])
    assert np.isfinite(_ibs(*train, test_time, test_event, curves, grid))


@pytest.mark.parametrize(
    ("time", "event", "risk", "reason"),
    [
        ([1, 2, 3], [0, 0, 0], [1, 2, 3], "no event"),
        ([3, 3, 3], [1, 1, 1], [1, 2, 3], "no comparable pair"),
        ([1, 2, 3], [0, 0, 1], [1, 2, 3], "no comparable pair"),
        ([1], [1], [1], "fewer than two"),
        ([1, 2, 3], [1, 1, 1], [1, np.nan, 3], "1 of 3 risks are not finite"),
    ],
)
def test_harrell_gives_a_reason(time, event, risk, reason):
    found = survival.harrell(time, event, risk)
    assert math.isnan(found.c)
    assert reason in found.reason
    assert found.comparable == 0


def test_horizon_metrics_give_reasons():
    train = ([5, 10, 15, 20, 30.0], [1, 0, 1, 0, 0])
    test = np.array([4, 8, 12, 40.0])
    risk = np.array([4, 3, 2, 1.0])
    cases = [
        (survival.auc_at(*train, test, [0, 0, 0, 1], risk, 10.0), "no case"),
        (survival.auc_at(*train, test, [1, 1, 0, 1], risk, 41.0), "no control"),
        (survival.auc_at([5, 10.0], [0, 0], test, [1, 1, 1, 1], risk, 10.0), "no event among the training"),
        (survival.auc_at([5, 6.0], [1, 1], test, [1, 1, 1, 1], risk, 10.0), "follow-up of the training fold ends at 6"),
        (
            survival.auc_at([5, 6.0], [1, 0], test, [1, 1, 1, 1], risk, 10.0),
            "censoring curve of the training fold is 0",
        ),
        (survival.uno(*train, test, [0, 0, 0, 1], risk, 10.0), "no event before 10"),
        (survival.uno(*train, test, [1, 1, 1, 1], risk, None), "no horizon"),
        (survival.uno(*train, test, [1, 1, 1, 1], risk * np.nan, 10.0), "4 of 4 risks"),
    ]
    for metric, reason in cases:
        assert math.isnan(metric.value)
        assert reason in metric.reason
    shares, reason = survival.brier_contributions(*train, test, [1, 0, 0, 0], np.full((4, 2), np.nan), [5, 10.0])
    assert np.isnan(shares).all() and "not identified" in reason


def test_logrank_strata():
    time, event = (np.array(a + b, float) for a, b in zip(AML["maintained"], AML["not"], strict=True))
    group, strata = np.array([1] * 11 + [0] * 12), np.arange(23) % 2
    parts = [survival.logrank(time[strata == s], event[strata == s], group[strata == s]) for s in (0, 1)]
    chi2, p, _ = survival.logrank(time, event, group, strata)
    assert 0 < chi2 < sum(part[0] for part in parts) + 1e-12
    # A stratum with one group adds nothing.
    extra = survival.logrank([*time, 3, 4], [*event, 1, 1], [*group, 1, 1], [*strata, 7, 7])
    assert extra[:2] == pytest.approx((chi2, p), abs=1e-14)
    assert math.isnan(survival.logrank([1, 2], [1, 0], [1, 0], [0, 1])[0])
    assert "both groups" in survival.logrank([1, 2], [1, 1], [1, 1])[2]
