r"""Means and standard deviations over seeds, and tests against the best method."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import stats

#: A p-value above it is little evidence of a difference (caption of the paper's Table 4).
LEVEL = 0.01

#: What a table says of a method; "untested" has no p-value.
Mark = Literal["best", "no difference", "different", "untested"]


def compare_methods(scores: Mapping[str, Sequence[float]], level: float = LEVEL) -> pd.DataFrame:
    r"""Compares every method with the best of them, as in the paper's Table 4.

    The best method has the highest mean over its seeds. Every other one is compared with it by
    the two-sided t-test of Student, which takes the variances for equal,

    .. math::
        t = \frac{\bar y_{best} - \bar y}{s \sqrt{1/n_{best} + 1/n}}, \qquad
        s^2 = \frac{(n_{best} - 1) s_{best}^2 + (n - 1) s_y^2}{n_{best} + n - 2},

    with :math:`n_{best} + n - 2` degrees of freedom; and by Welch's, which does not. Both are
    given as they are, and corrected by :func:`holm` for the number of tests in the column. The
    mark follows the paper: Student's p, uncorrected, against the level.

    The best is chosen on the scores that are tested, so that p-values are too small, the more so
    the more methods there are; Holm's correction makes up for most of that.

    Arguments:
        scores: The scores of each method, one a seed, in nats.
        level: A p-value above it is marked "no difference".

    Returns:
        A row a method, in the order given, with ``seeds``; ``mean``; ``sd`` (of a seed; not a
        number for one); ``mark`` (see :data:`Mark`); ``p``, ``p_holm``, ``p_welch``,
        ``p_welch_holm`` (not numbers where there is no test); and ``note``, why there is none.

    Raises:
        ValueError: If there is no method, a method has no score, or a score is not finite.

    Example:
        >>> table = compare_methods({"VAE": [1.0, 2.0, 3.0], "GPVAE": [5.0, 6.0, 7.0]})
        >>> table.loc["VAE", "mark"], f'{table.loc["VAE", "p"]:.4f}'
        ('different', '0.0080')
    """
    if not scores:
        raise ValueError("there are no scores to compare")
    values = {name: np.asarray(list(column), dtype=float) for name, column in scores.items()}
    for name, column in values.items():
        if len(column) == 0 or not np.isfinite(column).all():
            raise ValueError(
                f"the scores of {name!r} must be finite numbers, got {column.tolist()}"
            )
    best = max(values, key=lambda name: float(values[name].mean()))
    rows: dict[str, dict[str, float | str]] = {}
    for name, column in values.items():
        row = {
            "seeds": len(column),
            "mean": float(column.mean()),
            "sd": float(column.std(ddof=1)) if len(column) > 1 else math.nan,
            "mark": "best" if name == best else "untested",
            "p": math.nan,
            "p_welch": math.nan,
            "note": "1 seed" if len(column) == 1 else "",
        }
        if name != best and len(column) > 1:
            if len(values[best]) == 1:
                row["note"] = "the best has 1 seed"
            elif np.ptp(column) == 0 and np.ptp(values[best]) == 0:
                row["note"] = "no spread over seeds"  # t would be infinite, or 0/0
            else:
                p = float(stats.ttest_ind(values[best], column).pvalue)
                welch = stats.ttest_ind(values[best], column, equal_var=False)
                row |= {"p": p, "p_welch": float(welch.pvalue)}
                row["mark"] = "no difference" if p > level else "different"
        rows[name] = row
    table = pd.DataFrame.from_dict(rows, orient="index")
    table.insert(5, "p_holm", holm(table["p"]))
    table.insert(7, "p_welch_holm", holm(table["p_welch"]))
    return table


def holm(p_values: ArrayLike) -> NDArray[np.float64]:
    r"""Returns Holm's corrected p-values, which hold for all tests of a family together.

    .. math:: \tilde p_{(i)} = \max_{j \le i} \min\{1, (m - j + 1)\, p_{(j)}\}

    for the m tests in increasing order. What is not a number is no test: it is not counted, and
    stays what it is.

    References:
        Holm, *A simple sequentially rejective multiple test procedure*, 1979.

    Raises:
        ValueError: If a p-value is not between 0 and 1.

    Example:
        >>> holm([0.01, 0.04, 0.03]).round(2).tolist()
        [0.03, 0.06, 0.06]
    """
    p = np.array(p_values, dtype=float)
    tested = np.flatnonzero(~np.isnan(p))
    if ((p[tested] < 0) | (p[tested] > 1)).any():
        raise ValueError(f"p-values must be between 0 and 1, got {p[tested].tolist()}")
    order = tested[np.argsort(p[tested], kind="stable")]
    factors = len(order) - np.arange(len(order))
    p[order] = np.maximum.accumulate(np.minimum(1.0, factors * p[order]))
    return p
