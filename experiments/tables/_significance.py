"""Tests of the differences between methods, over seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import stats

#: A method with fewer seeds is not tested.
LEAST_SEEDS = 3


def compare_methods(scores: Mapping[str, Sequence[float]], level: float = 0.01) -> pd.DataFrame:
    r"""Compares every method with the best of them, as in the paper's Table 4.

    The best method has the highest mean over its seeds. Every other one is compared with it by
    Student's two-sided t-test, which assumes equal variances, and by Welch's, which does not, with
    :func:`holm`'s correction for the tests of the column. As in the paper, the mark is that of
    Student's p, uncorrected. The best is chosen on the tested scores, so that p-values are too
    small. Without three seeds of both methods there is no test: p is NaN and the mark "untested",
    also of the best.

    Raises:
        ValueError: If a score is not finite.

    Example:
        >>> table = compare_methods({"VAE": [1.0, 2.0, 3.0], "GPVAE": [5.0, 6.0, 7.0]})
        >>> table.loc["VAE", "mark"], f'{table.loc["VAE", "p"]:.4f}'
        ('different', '0.0080')
    """
    values = {name: np.asarray(list(column), dtype=float) for name, column in scores.items()}
    for name, column in values.items():
        if len(column) == 0 or not np.isfinite(column).all():
            raise ValueError(f"the scores of {name!r} must be finite, got {column.tolist()}")
    best = max(values, key=lambda name: float(values[name].mean()))
    rows = []
    for name, column in values.items():
        p, welch, mark = math.nan, math.nan, "untested"
        if min(len(column), len(values[best])) >= LEAST_SEEDS:
            mark = "best"
            if name != best:
                p = float(stats.ttest_ind(values[best], column).pvalue)
                welch = float(stats.ttest_ind(values[best], column, equal_var=False).pvalue)
                mark = "no difference" if p > level else "different"
        sd = float(column.std(ddof=1)) if len(column) > 1 else math.nan
        rows.append((len(column), float(column.mean()), sd, mark, p, p, welch, welch))
    names = ["seeds", "mean", "sd", "mark", "p", "p_holm", "p_welch", "p_welch_holm"]
    table = pd.DataFrame(rows, index=list(values), columns=names)
    for name in ("p", "p_welch"):
        table[f"{name}_holm"] = holm(table[name])
    return table


def holm(p_values: ArrayLike) -> NDArray[np.float64]:
    r"""Returns Holm's corrected p-values, :math:`\max_{j \le i} \min\{1, (m - j + 1) p_{(j)}\}`.

    NaN is no test, and not counted. Reference: Holm, *A simple sequentially rejective multiple test
    procedure*, 1979.

    Example:
        >>> holm([0.01, 0.04, 0.03]).round(2).tolist()
        [0.03, 0.06, 0.06]
    """
    p = np.array(p_values, dtype=float)
    order = np.argsort(p, kind="stable")[: np.count_nonzero(~np.isnan(p))]
    factors = len(order) - np.arange(len(order))
    p[order] = np.maximum.accumulate(np.minimum(1.0, factors * p[order]))
    return p
