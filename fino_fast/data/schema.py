"""`schema.json`: the declaration together with what the table held, frozen.

Vocabularies give every value its index in order of first freezing; later ingests append and never
move an index. Statistics come from the adaptation split alone.
"""

import hashlib
import math
from collections.abc import Mapping
from typing import Any, Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import Field, model_validator

from fino_fast.config import StrictModel
from fino_fast.errors import ConfigError, DataError

from .declaration import (
    CategoricalDeclaration,
    ContinuousDeclaration,
    CyclicDeclaration,
    Declaration,
    FactorDeclaration,
    MultiDeclaration,
    Role,
)
from .files import Location, canonical_json, read_json
from .statistics import Moments

Encoded = NDArray[np.int64] | NDArray[np.float32]

MAX_SPLITS = 65_535
"""Splits that the index, which has 16 bits for them, tells apart."""


class Factor(StrictModel):
    """One metadata factor: its declaration, vocabulary and statistics.

    Statistics are per encoded column and in the table's units; nothing is scaled here.
    """

    declaration: FactorDeclaration
    vocabulary: list[str] = Field(default=[])
    """Value of each index; empty for numbers."""
    counts: list[int] = Field(default=[])
    """Rows of the adaptation split with each value of the vocabulary."""
    observed: int = Field(ge=0)
    """Rows of the adaptation split in which the factor is not (wholly) missing."""
    missing: int = Field(ge=0)
    """Rows of the adaptation split in which it is."""
    moments: Moments | None = None
    """Of numbers only."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        listed = isinstance(self.declaration, CategoricalDeclaration | MultiDeclaration)
        if len(self.counts) != len(self.vocabulary):
            raise ValueError("counts and vocabulary differ in length")
        if len(set(self.vocabulary)) != len(self.vocabulary):
            raise ValueError("a value stands twice in the vocabulary")
        if listed != (self.moments is None) or (self.vocabulary and not listed):
            raise ValueError("numbers have moments, listed values a vocabulary")
        if self.moments is not None and len(self.moments.count) != self.width:
            raise ValueError(f"moments of {len(self.moments.count)} columns, not {self.width}")
        return self

    @property
    def kind(self) -> Literal["categorical", "multi", "continuous", "cyclic"]:
        return self.declaration.kind

    @property
    def role(self) -> Role:
        return self.declaration.role

    @property
    def width(self) -> int:
        """Columns of the encoding: 1 for a category, 2 for (sin, cos), one a value for multi."""
        match self.declaration:
            case MultiDeclaration():
                return len(self.vocabulary)
            case ContinuousDeclaration(columns=columns):
                return len(columns or [""])
            case CyclicDeclaration():
                return 2
            case _:
                return 1

    @property
    def per_pixel_scale(self) -> bool:
        """Whether it is a length per pixel, which the crop of a view changes."""
        declaration = self.declaration
        return isinstance(declaration, ContinuousDeclaration) and declaration.per_pixel_scale

    @property
    def mean(self) -> list[float]:
        """Mean of each encoded column over the adaptation split."""
        if self.moments is not None:
            return self.moments.mean
        return [count / max(self.observed, 1) for count in self.counts]

    @property
    def std(self) -> list[float]:
        """Population standard deviation of each encoded column over the adaptation split."""
        if self.moments is not None:
            return self.moments.std
        return [math.sqrt(mean * (1 - mean)) for mean in self.mean]

    @property
    def low(self) -> list[float]:
        """Declared lower bound of each encoded column, else the least value seen."""
        return self._bound("low", 0.0)

    @property
    def high(self) -> list[float]:
        """Declared upper bound of each encoded column, else the greatest value seen."""
        return self._bound("high", 1.0)

    def _bound(self, name: Literal["low", "high"], of_indicators: float) -> list[float]:
        if self.moments is None:
            return [of_indicators] * self.width
        if isinstance(self.declaration, CyclicDeclaration):
            return [-1.0, -1.0] if name == "low" else [1.0, 1.0]
        assert isinstance(self.declaration, ContinuousDeclaration)
        seen = self.moments.minimum if name == "low" else self.moments.maximum
        return self.declaration.bounds(name) or seen

    def encode(self, raw: pa.Array, *, strict: bool = True) -> Encoded:
        """Raw values as what the loss takes.

        Args:
            raw: as stored in the shards: strings, lists of strings, or float64 (one column or a
                fixed-size list); null = missing.
            strict: whether a value outside the vocabulary is an error; otherwise it is missing
                (`unknown_values` counts them).

        Returns:
            int64 [n] indices with −1 for missing (categorical), else float32 [n, width] with NaN
            for missing.

        Raises:
            DataError: a value is outside the vocabulary.
        """
        if self.moments is not None:
            return encode_numbers(self.declaration, raw)
        if strict:
            unknown = self.unknown_values(raw)
            if unknown:
                raise DataError(f"values outside the vocabulary: {shorten(unknown)}")
        vocabulary = pa.array(self.vocabulary, type=pa.string())
        if isinstance(self.declaration, CategoricalDeclaration):
            codes = pc.fill_null(pc.index_in(raw, value_set=vocabulary), -1)
            return np.array(codes.cast(pa.int64()))
        indicators = np.zeros((len(raw), self.width), dtype=np.float32)
        codes = pc.index_in(pc.list_flatten(raw), value_set=vocabulary)
        parents = np.asarray(pc.list_parent_indices(raw))
        known = np.asarray(pc.is_valid(codes))
        indicators[parents[known], np.asarray(pc.drop_null(codes))] = 1.0
        indicators[np.asarray(pc.is_null(raw))] = np.nan
        return indicators

    def unknown_values(self, raw: pa.Array) -> dict[str, int]:
        """Values outside the vocabulary, each with how many times it occurs; {} for numbers."""
        if self.moments is not None:
            return {}
        flat = pc.list_flatten(raw) if isinstance(self.declaration, MultiDeclaration) else raw
        flat = pc.drop_null(flat)
        known = pc.is_in(flat, value_set=pa.array(self.vocabulary, type=pa.string()))
        return {
            entry["values"].as_py(): entry["counts"].as_py()
            for entry in pc.value_counts(flat.filter(pc.invert(known)))
        }


def encode_numbers(declaration: FactorDeclaration, raw: pa.Array) -> NDArray[np.float32]:
    """Raw numbers as float32 [n, width]; cyclic ones as (sin, cos) of 2π·value/period."""
    return columns_of_numbers(declaration, raw).astype(np.float32)


def columns_of_numbers(declaration: FactorDeclaration, raw: pa.Array) -> NDArray[np.float64]:
    """Raw numbers as float64 [n, width], before they are rounded to what a batch holds."""
    values = number_matrix(raw)
    if isinstance(declaration, CyclicDeclaration):
        angle = 2 * np.pi * (values[:, 0] / declaration.period)
        return np.stack([np.sin(angle), np.cos(angle)], axis=1)
    return values


def number_matrix(raw: pa.Array) -> NDArray[np.float64]:
    """float64 [n, d] of a float64 array or a fixed-size-list array; null becomes NaN."""
    if pa.types.is_fixed_size_list(raw.type):
        # Arrow hides the entries of a null list; the entries themselves are null in our columns.
        flat = pc.fill_null(raw.flatten(), math.nan) if raw.null_count == 0 else None
        if flat is None:
            raise DataError("a column of number lists holds null lists")
        return np.asarray(flat, dtype=np.float64).reshape(len(raw), raw.type.list_size)
    values = np.asarray(pc.fill_null(raw.cast(pa.float64()), math.nan), dtype=np.float64)
    return values[:, None]


class Schema(StrictModel):
    """The frozen schema of a set of shards."""

    format: Literal["fino-fast schema"] = "fino-fast schema"
    version: Literal[1] = 1
    declaration: Declaration
    splits: list[str] = Field(min_length=1, max_length=MAX_SPLITS)
    """Split names; the index is the split's code. The adaptation split comes first."""
    factors: dict[str, Factor] = Field(min_length=1)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if set(self.factors) != set(self.declaration.factors):
            raise ValueError("the factors are not those of the declaration")
        for name, factor in self.factors.items():
            if factor.declaration != self.declaration.factors[name]:
                raise ValueError(f"factor {name!r} differs from its declaration")
        if self.splits[0] != self.declaration.adaptation_split:
            raise ValueError("the adaptation split is not the first")
        return self

    @classmethod
    def read(cls, path: Location) -> Self:
        """Read `schema.json`.

        Raises:
            DataError: the file is missing or damaged.
        """
        try:
            return cls.checked(read_json(path), str(path))
        except ConfigError as error:
            raise DataError(f"{error}; the file is damaged") from error

    def content(self) -> dict[str, Any]:
        """What `schema.json` holds."""
        return self.model_dump(mode="json")

    @property
    def hash(self) -> str:
        """SHA-256 of the canonical JSON; equal to that of the file."""
        return hashlib.sha256(canonical_json(self.content())).hexdigest()


def shorten(counts: Mapping[str, int], limit: int = 5) -> str:
    """A few of the values for a message, most frequent first."""
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    parts = [f"{value!r} ({count}×)" for value, count in ranked[:limit]]
    if len(ranked) > limit:
        parts.append(f"and {len(ranked) - limit} more")
    return ", ".join(parts)
