"""Mergeable fp64 statistics of a factor's columns."""

import math
from typing import Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from fino_fast.config import StrictModel

_Finite = list[float]


class Moments(StrictModel):
    """Count, mean, sum of squared deviations, minimum and maximum of each of d columns.

    Two of them merge exactly as if all values had been seen at once (Chan, Golub, LeVeque 1979).
    A column without a value has mean, m2, minimum and maximum 0.
    """

    count: list[int] = Field(min_length=1)
    mean: _Finite
    m2: _Finite
    minimum: _Finite
    maximum: _Finite

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        columns = (self.mean, self.m2, self.minimum, self.maximum)
        if any(len(column) != len(self.count) for column in columns):
            raise ValueError("the lists differ in length")
        if not all(math.isfinite(value) for column in columns for value in column):
            raise ValueError("a value is not finite")
        if min(self.count) < 0 or min(self.m2) < 0:
            raise ValueError("a count or a sum of squares is negative")
        return self

    @classmethod
    def of(cls, values: NDArray[np.float64]) -> Self:
        """Statistics of the columns of [n, d] values; NaN entries take no part."""
        rows: list[tuple[int, float, float, float, float]] = []
        for column in values.T:
            seen = column[~np.isnan(column)]
            if len(seen) == 0:
                rows.append((0, 0.0, 0.0, 0.0, 0.0))
                continue
            mean = float(seen.mean())
            m2 = float(np.square(seen - mean).sum())
            rows.append((len(seen), mean, m2, float(seen.min()), float(seen.max())))
        count, mean_, m2_, low, high = (list(part) for part in zip(*rows, strict=True))
        return cls.model_validate(
            {"count": count, "mean": mean_, "m2": m2_, "minimum": low, "maximum": high}
        )

    def merged(self, other: "Moments") -> "Moments":
        """The statistics of both sets of values together."""
        rows = []
        for i, (n, k) in enumerate(zip(self.count, other.count, strict=True)):
            if n == 0 or k == 0:
                source = self if k == 0 else other
                rows.append(
                    (n + k, source.mean[i], source.m2[i], source.minimum[i], source.maximum[i])
                )
                continue
            delta = other.mean[i] - self.mean[i]
            rows.append(
                (
                    n + k,
                    self.mean[i] + delta * k / (n + k),
                    self.m2[i] + other.m2[i] + delta * delta * n * k / (n + k),
                    min(self.minimum[i], other.minimum[i]),
                    max(self.maximum[i], other.maximum[i]),
                )
            )
        count, mean, m2, low, high = (list(part) for part in zip(*rows, strict=True))
        return Moments.model_validate(
            {"count": count, "mean": mean, "m2": m2, "minimum": low, "maximum": high}
        )

    @property
    def std(self) -> list[float]:
        """Population standard deviation of each column."""
        return [math.sqrt(m2 / n) if n else 0.0 for n, m2 in zip(self.count, self.m2, strict=True)]
