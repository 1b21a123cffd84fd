"""What a sealed set holds of each metadata factor: values, gaps, classes, ranges."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from fino_fast.data import Factor, ShardSet
from fino_fast.data.declaration import CyclicDeclaration
from fino_fast.data.schema import columns_of_numbers, number_matrix
from fino_fast.data.statistics import Moments


@dataclass(frozen=True)
class Names:
    """A factor of names for every row.

    Attributes:
        codes: int64 [n], −1 for missing. Of several values a row each *combination* of values has
            one code, whatever their order in the cell.
        value_codes: int64 [m], the vocabulary's index of every value that occurs.
        value_rows: int64 [m], the row in which it does.
    """

    name: str
    codes: NDArray[np.int64]
    value_codes: NDArray[np.int64]
    value_rows: NDArray[np.int64]

    @property
    def observed(self) -> NDArray[np.bool_]:
        return self.codes >= 0


@dataclass(frozen=True)
class Numbers:
    """A factor of numbers for every row.

    Attributes:
        values: float64 [n, d] in the table's units, NaN for missing; (sin, cos) if cyclic.
        cyclic: whether they are.
    """

    name: str
    values: NDArray[np.float64]
    cyclic: bool

    @property
    def observed(self) -> NDArray[np.bool_]:
        """Rows in which no column is missing."""
        return np.logical_not(np.isnan(self.values).any(axis=1))

    def metric(self, rows: NDArray[np.bool_]) -> NDArray[np.float64]:
        """The values of these rows with columns that weigh the same: standardised, or a circle."""
        values = self.values[rows]
        if self.cyclic or not len(values):
            return values
        centred = values - values.mean(axis=0)
        std = centred.std(axis=0)
        varies = (np.ptp(values, axis=0) > 0) & (std > 0)  # 0: squares that underflowed
        return np.where(varies, centred, 0.0) / np.where(varies, std, 1.0)


@dataclass(frozen=True)
class Classes:
    """The values of a factor of names.

    Attributes:
        vocabulary: values in the frozen vocabulary.
        seen: those that occur.
        once: those that occur in one sample only.
        effective: exp of the entropy of the occurrences: as many equally frequent values would be
            as hard to guess.
        largest: the most frequent value and its samples; None where nothing is seen.
        smallest: the least frequent one that occurs.
        adapt_seen: values that occur in the adaptation split.
        adapt_once: those with one sample there.
    """

    vocabulary: int
    seen: int
    once: int
    effective: float
    largest: tuple[str, int] | None
    smallest: tuple[str, int] | None
    adapt_seen: int
    adapt_once: int


@dataclass(frozen=True)
class Range:
    """One column of a factor of numbers, in the table's units.

    Attributes:
        mean: of a cyclic factor the circular mean, None where the values cancel out.
        std: population standard deviation; None if cyclic.
        concentration: mean resultant length of a cyclic factor: 1 all the same, 0 evenly spread.
        outside: share of the values outside the range that training scales by: the declared bounds
            (ingestion lets nothing through), else those of the adaptation split. None if cyclic.
    """

    column: str
    minimum: float
    maximum: float
    mean: float | None
    std: float | None
    concentration: float | None
    outside: float | None


@dataclass(frozen=True)
class FactorAudit:
    """One factor over all samples of the set.

    Attributes:
        missing: share of the samples without the factor; of several columns: with a gap in any.
        missing_by_split: the same by split.
        constant: it is observed and never changes.
        disjoint: other splits that hold values of it, none of which the adaptation split has.
        only_split: the one split in which it is observed at all, of several; else None.
        classes: of names.
        ranges: of numbers, one for each column that has values.
    """

    name: str
    kind: str
    role: str
    missing: float
    missing_by_split: dict[str, float]
    constant: bool
    disjoint: list[str]
    only_split: str | None
    classes: Classes | None
    ranges: list[Range]


def read_factor(shards: ShardSet, name: str) -> Names | Numbers:
    """One factor's values for all samples.

    Raises:
        DataError: the set has no such factor, or its metadata are damaged.
    """
    factor = shards.schema.factors[name]
    raw = shards.raw_column(name)
    if factor.moments is not None:
        values = columns_of_numbers(factor.declaration, raw)
        return Numbers(name, values, factor.kind == "cyclic")
    if factor.kind == "multi":
        return read_combinations(name, factor, raw)
    codes = np.asarray(factor.encode(raw), dtype=np.int64)
    rows = np.flatnonzero(codes >= 0)
    return Names(name, codes, codes[rows], rows)


def read_combinations(name: str, factor: Factor, raw: pa.Array) -> Names:
    """Several values a row. Their indicators are never built: those grow with the vocabulary."""
    vocabulary = pa.array(factor.vocabulary, type=pa.string())
    flat = np.asarray(pc.index_in(pc.list_flatten(raw), value_set=vocabulary), dtype=np.int64)
    parents = np.asarray(pc.list_parent_indices(raw), dtype=np.int64)
    # Sorted by row, then value, and without repeats: {a, b} is {b, a}.
    pairs = np.unique(parents * max(len(vocabulary), 1) + flat)
    rows, values = np.divmod(pairs, max(len(vocabulary), 1))
    ends = np.searchsorted(rows, np.arange(len(raw) + 1)).astype(np.int32)
    lists = pa.ListArray.from_arrays(ends, pa.array(values).cast(pa.string()))
    keys = pc.binary_join(lists, ",").dictionary_encode()
    codes = np.asarray(keys.indices, dtype=np.int64).copy()
    codes[np.asarray(pc.is_null(raw))] = -1
    return Names(name, codes, values, rows)


def audit_factor(shards: ShardSet, values: Names | Numbers) -> FactorAudit:
    """Count one factor's gaps, classes and ranges, over all samples and by split."""
    factor = shards.schema.factors[values.name]
    split_of = np.asarray(shards.index["split"], dtype=np.int64)
    sizes = np.bincount(split_of, minlength=len(shards.schema.splits))
    seen = np.bincount(split_of[values.observed], minlength=len(sizes))
    present = [code for code in range(len(sizes)) if sizes[code]]
    holding = [shards.schema.splits[code] for code in present if seen[code]]
    if isinstance(values, Names):
        classes, disjoint = audit_names(factor, values, split_of, shards.schema.splits)
        ranges: list[Range] = []
        constant = len(np.unique(values.codes[values.observed])) == 1
    else:
        classes, disjoint = None, []
        ranges = audit_numbers(shards, values)
        constant = bool(ranges) and all(r.minimum == r.maximum for r in ranges)
    return FactorAudit(
        values.name,
        factor.kind,
        factor.role,
        float(np.mean(~values.observed)),
        {shards.schema.splits[c]: float((sizes[c] - seen[c]) / sizes[c]) for c in present},
        constant,
        disjoint,
        holding[0] if len(holding) == 1 and len(present) > 1 else None,
        classes,
        ranges,
    )


def audit_names(
    factor: Factor, values: Names, split_of: NDArray[np.int64], splits: list[str]
) -> tuple[Classes, list[str]]:
    """The classes of a factor of names, and the splits that share none with the adaptation split.

    Args:
        split_of: int64 [n], every row's split; 0 is the adaptation split.
    """
    width = max(len(factor.vocabulary), 1)
    cells, cell_counts = np.unique(
        split_of[values.value_rows] * width + values.value_codes, return_counts=True
    )
    cell_split, cell_value = np.divmod(cells, width)
    adapt = cell_split == 0
    known = np.isin(cell_value, cell_value[adapt])
    others = np.unique(cell_split[~adapt])
    sharing = np.unique(cell_split[known & ~adapt])
    disjoint = [splits[i] for i in np.setdiff1d(others, sharing)] if adapt.any() else []

    counts = np.bincount(values.value_codes, minlength=width)
    found = np.flatnonzero(counts)
    share = counts[found] / max(counts.sum(), 1)
    ranked = found[np.argsort(-counts[found], kind="stable")]
    ends = [(factor.vocabulary[i], int(counts[i])) for i in ranked[[0, -1]]] if len(found) else None
    classes = Classes(
        len(factor.vocabulary),
        len(found),
        int((counts == 1).sum()),
        float(np.exp(-(share * np.log(share)).sum())) if len(found) else 0.0,
        ends[0] if ends else None,
        ends[1] if ends else None,
        int(adapt.sum()),
        int((cell_counts[adapt] == 1).sum()),
    )
    return classes, disjoint


def audit_numbers(shards: ShardSet, values: Numbers) -> list[Range]:
    """The range of every column of a factor of numbers that has values."""
    factor = shards.schema.factors[values.name]
    raw = number_matrix(shards.raw_column(values.name))
    titles = shards.schema.declaration.columns_of(values.name)
    moments = Moments.of(raw)
    ranges = []
    for i, title in enumerate(titles):
        if moments.count[i] == 0:
            continue
        ends = moments.minimum[i], moments.maximum[i]
        if isinstance(factor.declaration, CyclicDeclaration):
            mean, length = circular_mean(values.values, factor.declaration.period)
            ranges.append(Range(title, *ends, mean, None, length, None))
        else:
            spread = moments.mean[i], moments.std[i]
            ranges.append(Range(title, *ends, *spread, None, outside(factor, raw[:, i], i)))
    return ranges


def outside(factor: Factor, values: NDArray[np.float64], column: int) -> float | None:
    """Share of a column's values outside the range that training scales by, if there is one."""
    assert factor.moments is not None
    if factor.moments.count[column] == 0:
        return None
    seen = values[~np.isnan(values)]
    return float(((seen < factor.low[column]) | (seen > factor.high[column])).mean())


def circular_mean(circle: NDArray[np.float64], period: float) -> tuple[float | None, float]:
    """Circular mean in [0, period) and mean resultant length of (sin, cos) [n, 2]."""
    sine, cosine = np.nanmean(circle, axis=0)
    length = float(np.hypot(sine, cosine))
    if length < 1e-9:  # evenly spread: the direction is a rounding error
        return None, length
    return float(np.arctan2(sine, cosine) / (2 * np.pi) * period % period), min(1.0, length)
