"""`schema.yaml`: what a person declares about the table, before anything was read."""

import operator
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from fino_fast.config import StrictModel

Role = Literal["preserve", "suppress", "ignore"]
MISSING = ["", "NA", "N/A", "na", "n/a", "NaN", "nan", "NAN", "null", "NULL", "None", "none"]


class _Declared(StrictModel):
    role: Role
    """What adaptation does with the factor: preserve, suppress, or ignore (kept for probes)."""
    missing: list[str] = Field(default=[])
    """Cell contents that mean "missing", besides the table's own markers."""


class _Listed(_Declared):
    """A factor with named values."""

    column: str | None = None
    """Column of the table; the factor's own name when left out."""
    vocabulary: list[str] | None = None
    """The values, in the order of their indices. Left out: in order of first appearance."""
    unknown: Literal["error", "missing"] = "error"
    """With a vocabulary: whether another value is an error, or counted and taken as missing."""

    @model_validator(mode="after")
    def _no_repeats(self) -> Self:
        if self.vocabulary is not None and len(set(self.vocabulary)) != len(self.vocabulary):
            raise ValueError("a value stands twice in the vocabulary")
        return self


class CategoricalDeclaration(_Listed):
    """One of several named values."""

    kind: Literal["categorical"]


class MultiDeclaration(_Listed):
    """Any number of named values in one cell; encoded as one indicator column a value."""

    kind: Literal["multi"]
    separator: str = Field(default=";", min_length=1)
    """What stands between the values of one cell."""


class ContinuousDeclaration(_Declared):
    """One number, or several that belong together."""

    kind: Literal["continuous"]
    columns: list[str] | None = Field(default=None, min_length=1)
    """Columns of the table; one named as the factor when left out."""
    low: float | list[float] | None = Field(default=None, allow_inf_nan=False)
    """Lower bound, one for all columns or one each; a value below it is an error."""
    high: float | list[float] | None = Field(default=None, allow_inf_nan=False)
    """Upper bound, one for all columns or one each; a value above it is an error."""
    # Left out of the frozen schema where it is not set: hashes of earlier declarations hold.
    per_pixel_scale: bool = Field(default=False, exclude_if=operator.not_)
    """The number is a length per pixel (µm per pixel): training corrects it by each view's crop."""

    @model_validator(mode="after")
    def _bounds_fit(self) -> Self:
        if (self.low is None) != (self.high is None):
            raise ValueError("give both low and high, or neither")
        width = len(self.columns or [""])
        if self.per_pixel_scale and width > 1:
            raise ValueError("per_pixel_scale is for one number, the same in both directions")
        for name in ("low", "high"):
            bound = getattr(self, name)
            if isinstance(bound, list) and len(bound) != width:
                raise ValueError(f"{name} has {len(bound)} values for {width} columns")
        for low, high in zip(self.bounds("low"), self.bounds("high"), strict=True):
            if low >= high:
                raise ValueError(f"low ({low}) must be below high ({high})")
        return self

    def bounds(self, name: Literal["low", "high"]) -> list[float]:
        """The declared bound of every column; empty when none is declared."""
        bound: float | list[float] | None = getattr(self, name)
        if bound is None:
            return []
        return bound if isinstance(bound, list) else [bound] * len(self.columns or [""])


class CyclicDeclaration(_Declared):
    """A number on a circle (an angle, an hour of the day); encoded as (sin, cos)."""

    kind: Literal["cyclic"]
    column: str | None = None
    """Column of the table; the factor's own name when left out."""
    period: float = Field(gt=0, allow_inf_nan=False)
    """After how much the value comes round again (360 for degrees, 24 for hours)."""


FactorDeclaration = Annotated[
    CategoricalDeclaration | MultiDeclaration | ContinuousDeclaration | CyclicDeclaration,
    Field(discriminator="kind"),
]


class TableDeclaration(StrictModel):
    """How a CSV is written; a Parquet table needs none of it but `missing`."""

    delimiter: str = Field(default=",", pattern=r"^[\t !#-~]$")
    """What stands between two cells: one ASCII sign, a tab, or a space; not the quotation mark."""
    decimal: Literal[".", ","] = "."
    """The decimal sign of numbers."""
    missing: list[str] = MISSING
    """Cell contents that mean "missing", in every factor."""


class SplitDeclaration(StrictModel):
    """Which rows may be learned from."""

    column: str
    """Column that names each row's split."""
    adaptation: str = "adapt"
    """The split that adaptation and statistics use; the others are only evaluated on."""


class ImagesDeclaration(StrictModel):
    """What every image of the set has in common; an image that differs is rejected."""

    channels: int | None = Field(default=None, ge=1, le=6)
    """Channels of every image; left out: whatever is there."""
    bits_used: int | None = Field(default=None, ge=1, le=16)
    """Bits that the instrument fills (12 in a 16-bit file): white is 2^bits_used − 1."""
    scale: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Value of white in floating-point images; left out: 1."""
    max_pixels: int = Field(default=100_000_000, ge=1, le=178_956_970)
    """Larger images are rejected before they are decoded; PIL refuses more than 178,956,970."""

    def white(self, dtype: str) -> float:
        """The pixel value that counts as 1 in images of a type (uint8, uint16, float32)."""
        return {
            "uint8": 255.0,
            "uint16": float(2 ** (self.bits_used or 16) - 1),
            "float32": self.scale or 1.0,
        }[dtype]


class Declaration(StrictModel):
    """The whole of `schema.yaml`."""

    version: Literal[1] = 1
    """Version of this file format."""
    table: TableDeclaration = TableDeclaration()
    """How the table is written."""
    split: SplitDeclaration | None = None
    """Split column; left out: every row belongs to the split `adapt`."""
    images: ImagesDeclaration = ImagesDeclaration()
    """What all images share."""
    factors: dict[str, FactorDeclaration] = Field(min_length=1)
    """The metadata factors by name."""

    @property
    def adaptation_split(self) -> str:
        return self.split.adaptation if self.split else "adapt"

    def columns_of(self, name: str) -> list[str]:
        """The table's columns that factor `name` reads."""
        factor = self.factors[name]
        if isinstance(factor, ContinuousDeclaration):
            return factor.columns or [name]
        return [factor.column or name]
