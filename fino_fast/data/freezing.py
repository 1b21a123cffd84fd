"""From rows, taken in piece by piece, to the frozen schema.

Vocabularies give every value its index in order of first freezing; later ingests append and never
move an index. Statistics come from the adaptation split alone.
"""

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fino_fast.errors import DataError

from .declaration import (
    CategoricalDeclaration,
    Declaration,
    FactorDeclaration,
    MultiDeclaration,
)
from .schema import MAX_SPLITS, Factor, Schema, columns_of_numbers, number_matrix
from .statistics import Moments


class SchemaBuilder:
    """The schema of all rows that it was shown, grown from that of the rows already in the set.

    Args:
        declaration: what the person wrote.
        previous: schema of the rows already in the set; its indices are kept.
    """

    def __init__(self, declaration: Declaration, previous: Schema | None) -> None:
        self._declaration = declaration
        adaptation = declaration.adaptation_split
        self._splits = dict.fromkeys(previous.splits if previous else [adaptation])
        self._found: dict[str, None] = {}
        self._factors = {
            name: _FactorBuilder(factor, previous.factors[name] if previous else None)
            for name, factor in declaration.factors.items()
        }

    def add(self, raw: Mapping[str, pa.Array], splits: pa.Array, fresh: pa.Array) -> None:
        """Take in some rows.

        Args:
            raw: raw values of every factor, one entry a row.
            splits: split name of every row.
            fresh: whether a row counts for the statistics; one that is tried again was counted
                before.
        """
        names = dict.fromkeys(pc.unique(splits).to_pylist())
        self._found |= names
        self._splits |= names
        learned = pc.and_(pc.equal(splits, self._declaration.adaptation_split), fresh)
        for name, builder in self._factors.items():
            builder.add(raw[name], raw[name].filter(learned))

    def schema(self) -> Schema:
        """The frozen schema.

        Raises:
            DataError: no row belongs to the adaptation split, there are too many splits, or a
                factor that takes part in adaptation is constant or missing throughout.
        """
        adaptation = self._declaration.adaptation_split
        factors = {name: builder.factor() for name, builder in self._factors.items()}
        faults = [
            fault
            for name, factor in factors.items()
            if (fault := _useless(name, factor, adaptation))
        ]
        if not any(factor.observed + factor.missing for factor in factors.values()):
            found = ", ".join(repr(name) for name in self._found) or "no rows"
            faults = [f"no row belongs to the adaptation split {adaptation!r}; found {found}"]
        if len(self._splits) > MAX_SPLITS:
            split = self._declaration.split
            faults.append(
                f"split.column: {split.column if split else ''!r} names {len(self._splits)} "
                f"splits, at most {MAX_SPLITS} fit; expected a few, like train and test"
            )
        if faults:
            raise DataError("; ".join(faults))
        return Schema(declaration=self._declaration, splits=list(self._splits), factors=factors)


class _FactorBuilder:
    """One factor's vocabulary and statistics."""

    def __init__(self, declaration: FactorDeclaration, previous: Factor | None) -> None:
        self._declaration = declaration
        self._multi = isinstance(declaration, MultiDeclaration)
        self._listed = self._multi or isinstance(declaration, CategoricalDeclaration)
        self._observed = previous.observed if previous else 0
        self._missing = previous.missing if previous else 0
        self._moments = previous.moments if previous else None
        self._counts: dict[str, int] = {}
        if previous:
            self._counts = dict(zip(previous.vocabulary, previous.counts, strict=True))
        elif isinstance(declaration, CategoricalDeclaration | MultiDeclaration):
            self._counts = dict.fromkeys(declaration.vocabulary or [], 0)

    def add(self, every: pa.Array, learned: pa.Array) -> None:
        """Take in the values of some rows; `learned` are those that count for the statistics."""
        missing = int(pc.sum(_all_missing(learned)).as_py() or 0)
        self._missing += missing
        self._observed += len(learned) - missing
        if not self._listed:
            moments = Moments.of(columns_of_numbers(self._declaration, learned))
            self._moments = self._moments.merged(moments) if self._moments else moments
            return
        for value in pc.drop_null(pc.unique(self._flat(every))).to_pylist():
            self._counts.setdefault(value, 0)
        for entry in pc.value_counts(pc.drop_null(self._flat(learned))).to_pylist():
            self._counts[entry["values"]] += entry["counts"]

    def factor(self) -> Factor:
        return Factor(
            declaration=self._declaration,
            vocabulary=list(self._counts),
            counts=list(self._counts.values()),
            observed=self._observed,
            missing=self._missing,
            moments=self._moments,
        )

    def _flat(self, raw: pa.Array) -> pa.Array:
        return pc.list_flatten(raw) if self._multi else raw


def _all_missing(raw: pa.Array) -> pa.Array:
    if pa.types.is_fixed_size_list(raw.type):
        return pa.array(np.isnan(number_matrix(raw)).all(axis=1))
    return pc.is_null(raw)


def _useless(name: str, factor: Factor, adaptation: str) -> str | None:
    """Why an active factor cannot take part in adaptation, or None."""
    if factor.role == "ignore":
        return None
    if factor.observed == 0:
        return (
            f"factor {name!r} ({factor.role}) is missing in every row of the split "
            f"{adaptation!r}; set its role to ignore"
        )
    if factor.moments is not None and min(factor.moments.count) == 0:
        return (
            f"factor {name!r} ({factor.role}) has a column without any value in the split "
            f"{adaptation!r}; leave the column out"
        )
    if factor.per_pixel_scale:
        # A constant one is useful: the crops make it differ.
        least = factor.moments.minimum[0] if factor.moments else 0.0
        if least > 0:
            return None
        return f"factor {name!r} is a length per pixel, so above 0; the least value is {least}"
    if factor.moments is not None:
        constant = [
            low == high
            for low, high in zip(factor.moments.minimum, factor.moments.maximum, strict=True)
        ]
        # An angle may well have one constant component; it is constant only with both.
        if all(constant) if factor.kind == "cyclic" else any(constant):
            return (
                f"factor {name!r} ({factor.role}) has a constant column in the split "
                f"{adaptation!r} (means {factor.mean}): it cannot be scaled and teaches nothing; "
                "set its role to ignore"
            )
    return None
