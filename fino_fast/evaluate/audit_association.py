"""How strongly two metadata factors go together, on the rows in which both are observed.

Every measure is 0 for independent factors and 1 where one factor determines the other, and those
that chance alone lifts above 0 (many groups, few rows) are corrected for it:

* names with names: Cramér's V, bias-corrected (Bergsma, J. Korean Stat. Soc. 42, 2013);
* names with numbers: the correlation ratio η², corrected as ε² (Kelley, PNAS 21, 1935);
* numbers with numbers: |Spearman's ρ|, and the first canonical correlation of the same ranks where
  a factor has several columns. A cyclic factor enters by (sin, cos): with a single number this is
  the linear-circular correlation (Mardia, Biometrika 63, 1976), taken on ranks.

Counts stay sparse: the cost grows with the rows, not with the product of two vocabularies.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fino_fast.errors import MissingExtraError

from .audit_factors import Names, Numbers

try:
    from scipy.linalg import orth
    from scipy.stats import rankdata
except ImportError as error:
    raise MissingExtraError("scipy", "evaluate") from error

V, ETA, RHO = "Cramér's V", "η²", "|ρ|"
# Rounding: of the sine of a whole period, or of a bias-corrected number of classes that is 1.
TINY = 1e-12


@dataclass(frozen=True)
class Association:
    """How two factors go together.

    Attributes:
        measure: `V`, `ETA` or `RHO`.
        value: the bias-corrected measure in [0, 1]; None where the rows cannot tell: fewer than
            two, a constant factor, or hardly two rows that share a value.
        uncorrected: the same measure as textbooks have it.
        rows: rows in which both are observed.
        lambda_first: of names, Goodman and Kruskal's λ: the share of the errors in guessing the
            first factor that knowing the second one avoids, 1 where the second determines the
            first. None where there are fewer than two rows for each of the second's values, which
            then determine anything.
        lambda_second: the other way round.
    """

    first: str
    second: str
    measure: str
    value: float | None
    uncorrected: float | None
    rows: int
    lambda_first: float | None = None
    lambda_second: float | None = None

    @property
    def strength(self) -> float | None:
        """The value on the scale of a correlation, √ of a share of variance."""
        if self.value is None or self.measure != ETA:
            return self.value
        return float(np.sqrt(self.value))


def associate(first: Names | Numbers, second: Names | Numbers) -> Association:
    """The association of two factors of the same set."""
    both = first.observed & second.observed
    rows = int(both.sum())
    names = first.name, second.name
    if isinstance(first, Names) and isinstance(second, Names):
        table = Contingency.of(first.codes[both], second.codes[both])
        return Association(
            *names,
            V,
            *cramers_v(table),
            rows,
            table.goodman_kruskal(table.second, table.first),
            table.goodman_kruskal(table.first, table.second),
        )
    if isinstance(first, Names):
        assert isinstance(second, Numbers)
        return Association(
            *names, ETA, *correlation_ratio(first.codes[both], second.metric(both)), rows
        )
    if isinstance(second, Names):
        return Association(
            *names, ETA, *correlation_ratio(second.codes[both], first.metric(both)), rows
        )
    rho = rank_correlation(ranks(first, both), ranks(second, both))
    return Association(*names, RHO, rho, rho, rows)


@dataclass(frozen=True)
class Contingency:
    """The cells of a contingency table that are not empty: row, column and count of each."""

    first: NDArray[np.int64]
    second: NDArray[np.int64]
    counts: NDArray[np.int64]

    @classmethod
    def of(cls, first: NDArray[np.int64], second: NDArray[np.int64]) -> "Contingency":
        """Count pairs of codes, int64 [n] ≥ 0 each."""
        width = int(second.max(initial=0)) + 1
        cells, counts = np.unique(first * width + second, return_counts=True)
        return cls(cells // width, cells % width, counts)

    def goodman_kruskal(self, known: NDArray[np.int64], wanted: NDArray[np.int64]) -> float | None:
        """λ of `wanted` given `known`, the table's two sides (J. Am. Stat. Assoc. 49, 1954)."""
        n = int(self.counts.sum())
        guessed = int(np.bincount(wanted, weights=self.counts).max(initial=0))
        if guessed == n or n < 2 * len(np.unique(known)):
            return None
        best = np.zeros(int(known.max()) + 1, dtype=np.int64)
        np.maximum.at(best, known, self.counts)
        return float((best.sum() - guessed) / (n - guessed))


def cramers_v(table: Contingency) -> tuple[float | None, float | None]:
    """Bias-corrected and plain Cramér's V of a contingency table.

    With φ² = χ²/n and k × r classes: V = √(φ² / min(k−1, r−1)), and corrected
    Ṽ = √(max(0, φ² − (k−1)(r−1)/(n−1)) / min(k̃−1, r̃−1)), k̃ = k − (k−1)²/(n−1).
    """
    n = int(table.counts.sum())
    rows = np.bincount(table.first, weights=table.counts)
    columns = np.bincount(table.second, weights=table.counts)
    k, r = np.count_nonzero(rows), np.count_nonzero(columns)
    if min(k, r) < 2:
        return None, None
    expected = rows[table.first] * columns[table.second]
    phi2 = max(0.0, float((table.counts.astype(np.float64) ** 2 / expected).sum()) - 1)
    plain = min(1.0, float(np.sqrt(phi2 / (min(k, r) - 1))))
    limit = min((c - 1) * (1 - (c - 1) / (n - 1)) for c in (k, r))
    if limit < TINY:
        return None, plain
    corrected = max(0.0, phi2 - (k - 1) * (r - 1) / (n - 1)) / limit
    return min(1.0, float(np.sqrt(corrected))), plain


def correlation_ratio(
    codes: NDArray[np.int64], values: NDArray[np.float64]
) -> tuple[float | None, float | None]:
    """ε² and η²: the share of the values' variance that lies between the groups.

    η² = Σ_g n_g ‖x̄_g − x̄‖² / Σ_i ‖x_i − x̄‖², and ε² = 1 − (1 − η²)(n − 1)/(n − groups), which
    is 0 on average for independent groups.

    Args:
        codes: int64 [n] ≥ 0, the group of each row.
        values: [n, d].
    """
    n = len(values)
    _, groups = np.unique(codes, return_inverse=True)
    k = int(groups.max(initial=-1)) + 1
    if k < 2 or not (np.ptp(values, axis=0) > TINY).any():
        return None, None
    centred = values - values.mean(axis=0)
    sizes = np.bincount(groups)
    between = sum(
        float((np.bincount(groups, weights=column) ** 2 / sizes).sum()) for column in centred.T
    )
    eta2 = min(1.0, between / float(np.square(centred).sum()))
    if k == n:
        return None, eta2
    return max(0.0, 1 - (1 - eta2) * (n - 1) / (n - k)), eta2


def ranks(factor: Numbers, rows: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Mid-ranks of each column among these rows; cyclic factors have no order and stay as they are.

    Returns:
        [n, d].
    """
    if factor.cyclic:
        return factor.metric(rows)
    ranked: NDArray[np.float64] = rankdata(factor.values[rows], axis=0)
    return ranked


def rank_correlation(first: NDArray[np.float64], second: NDArray[np.float64]) -> float | None:
    """First canonical correlation of two blocks of columns, |Pearson's r| for one column each.

    Args:
        first: [n, p].
        second: [n, q].
    """
    n, p = first.shape
    if n < p + second.shape[1] + 1:  # as many columns as rows fit anything
        return None
    # A column that does not vary spans nothing, but its rounding errors would.
    blocks = [block[:, np.ptp(block, axis=0) > TINY] for block in (first, second)]
    if min(block.shape[1] for block in blocks) == 0:
        return None
    a, b = (orth((x - x.mean(axis=0)) / x.std(axis=0)) for x in blocks)
    return min(1.0, float(np.linalg.norm(a.T @ b, ord=2)))
