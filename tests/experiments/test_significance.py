"""Means, tests and corrections against numbers that were worked out by hand."""

import math

import numpy as np
import pytest
from _significance import compare_methods, holm
from scipy import integrate
from scipy.special import gammaln


def two_sided(t, df):
    """P(|T| > |t|) by integrating Student's density: no use of scipy.stats."""
    constant = math.exp(gammaln((df + 1) / 2) - gammaln(df / 2)) / math.sqrt(df * math.pi)
    tail, _ = integrate.quad(
        lambda u: constant * (1 + u * u / df) ** (-(df + 1) / 2), abs(t), math.inf
    )
    return 2 * tail


SCORES = {
    "VAE": [10.0, 12.0, 11.0, 13.0],
    "SA": [13.0, 15.0, 14.5],
    "GP": [15.0, 16.0, 14.0, 17.0, 15.5],
}


def test_means_deviations_and_p_values_by_hand():
    table = compare_methods(SCORES)
    assert list(table.index) == list(SCORES)
    assert table.loc["GP", "mark"] == "best"
    assert math.isnan(table.loc["GP", "p"])
    best = np.array(SCORES["GP"])
    for name in ("VAE", "SA"):
        y = np.array(SCORES[name])
        n, m = len(best), len(y)
        assert table.loc[name, "seeds"] == m
        assert table.loc[name, "mean"] == y.sum() / m
        var_best = ((best - best.mean()) ** 2).sum() / (n - 1)
        var = ((y - y.mean()) ** 2).sum() / (m - 1)
        assert table.loc[name, "sd"] == pytest.approx(math.sqrt(var))
        pooled = ((n - 1) * var_best + (m - 1) * var) / (n + m - 2)
        t = (best.mean() - y.mean()) / math.sqrt(pooled * (1 / n + 1 / m))
        assert table.loc[name, "p"] == pytest.approx(two_sided(t, n + m - 2), rel=1e-6)
        a, b = var_best / n, var / m
        df = (a + b) ** 2 / (a**2 / (n - 1) + b**2 / (m - 1))
        welch = two_sided((best.mean() - y.mean()) / math.sqrt(a + b), df)
        assert table.loc[name, "p_welch"] == pytest.approx(welch, rel=1e-6)
    assert table.loc["VAE", "mark"] == "different"
    assert table.loc["SA", "mark"] == "no difference"
    # Holm: the smaller of two is doubled, the larger one stays
    small, large = sorted(table["p"].dropna())
    assert sorted(table["p_holm"].dropna()) == pytest.approx([2 * small, max(2 * small, large)])


def test_the_mark_is_student_uncorrected():
    """p = 0.008 is different, though Holm's 0.016 is not: the paper corrects nothing."""
    table = compare_methods({"A": [1.0, 2.0, 3.0], "B": [2.5, 3.5, 4.0], "C": [5.0, 6.0, 7.0]})
    assert table.loc["A", "p"] < 0.01 < table.loc["A", "p_holm"]
    assert table.loc["A", "mark"] == "different"


def test_one_seed_is_never_tested():
    table = compare_methods({"VAE": [1.0, 2.0], "SA": [1.5], "GP": [3.0, 4.0]})
    assert table.loc["SA", "note"] == "1 seed"
    assert table.loc["SA", "mark"] == "untested"
    assert table.loc["SA", ["sd", "p", "p_holm", "p_welch", "p_welch_holm"]].isna().all()
    assert table.loc["VAE", "p_holm"] == table.loc["VAE", "p"], "one test, nothing to correct"
    table = compare_methods({"VAE": [1.0, 2.0], "GP": [3.0]})
    assert table.loc["GP", "mark"] == "best"
    assert table.loc["GP", "note"] == "1 seed"
    assert table.loc["VAE", "note"] == "the best has 1 seed"
    assert math.isnan(table.loc["VAE", "p"])
    assert table.loc["VAE", "mark"] == "untested"


def test_holm_by_hand():
    # 4 tests: 4 × 0.01, max(0.04, 3 × 0.012), 2 × 0.03, 1 × 0.04 raised to 0.06
    assert holm([0.03, 0.01, math.nan, 0.04, 0.012]) == pytest.approx(
        [0.06, 0.04, math.nan, 0.06, 0.04], nan_ok=True
    )
    assert holm([0.9, 0.8]).tolist() == [1.0, 1.0]
    assert holm([]).tolist() == []
    with pytest.raises(ValueError, match="between 0 and 1"):
        holm([1.5])


def test_holm_keeps_the_family_wise_error():
    """2000 families of 8 true hypotheses; 5 % ± 4 standard errors: fails once in 15,000."""
    p = np.random.default_rng(0).uniform(size=(2000, 8))
    wrong = np.mean([(holm(family) <= 0.05).any() for family in p])
    assert abs(wrong - 0.05) < 4 * math.sqrt(0.05 * 0.95 / 2000)
