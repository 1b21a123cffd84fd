"""Leakage: how well a nuisance factor can still be read from the features.

A feature space that has forgotten the factor leaves a linear probe at chance. The probe is trained
and scored on different rows, with the protocol of `probes`: a value that only memorisation could
give does not count as leakage.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from .probes import Features, fit_classifier, fit_regressor


@dataclass(frozen=True)
class Leakage:
    """How well one factor is read.

    Attributes:
        factor: its name.
        metric: `balanced accuracy` (named values) or `R²` (numbers).
        score: of the probe, on the test rows.
        chance: of a probe that ignores the features: 1/classes, or 0 for R².
        train_count: rows that the probe was fitted on; rows without a value take no part.
        test_count: rows it was scored on.
    """

    factor: str
    metric: str
    score: float
    chance: float
    train_count: int
    test_count: int


def categorical_leakage(
    factor: str,
    train_features: Features,
    train_values: Sequence[str | None],
    test_features: Features,
    test_values: Sequence[str | None],
    *,
    seed: int = 0,
) -> Leakage:
    """Leakage of a factor with named values, None = missing.

    A test row whose value no training row has takes no part: no probe could name it.

    Raises:
        DataError: fewer than two values among the training rows, or no test row with one of them,
            and as `probes.fit_classifier`.
    """
    train = np.array([value is not None for value in train_values], dtype=bool)
    names = np.array([value for value in train_values if value is not None], dtype=str)
    known = set(names.tolist())
    test = np.array([value in known for value in test_values], dtype=bool)
    if not test.any():
        raise DataError(f"factor {factor!r}: no test row has one of the values {sorted(known)}")
    truth = np.array([value for value in test_values if value in known], dtype=str)
    probe = fit_classifier(np.asarray(train_features)[train], names, seed=seed)
    score = probe.balanced_accuracy(np.asarray(test_features)[test], truth)
    chance = 1 / len(np.unique(truth))
    return Leakage(factor, "balanced accuracy", score, chance, len(names), len(truth))


def continuous_leakage(
    factor: str,
    train_features: Features,
    train_values: NDArray[Any],
    test_features: Features,
    test_values: NDArray[Any],
) -> Leakage:
    """Leakage of a number, NaN = missing.

    Raises:
        DataError: fewer than two different values among the training or the test rows, and as
            `probes.fit_regressor`.
    """
    train, test = ~np.isnan(train_values), ~np.isnan(test_values)
    probe = fit_regressor(np.asarray(train_features)[train], train_values[train])
    score = probe.r2(np.asarray(test_features)[test], test_values[test])
    return Leakage(factor, "R²", score, 0.0, int(train.sum()), int(test.sum()))
