"""Leakage: how well a factor can still be read from the features.

For a nuisance that adaptation was told to suppress, the answer should be: no better than chance.
For a factor to preserve, and for the label of a downstream task, the same question is asked with
the opposite hope. A probe is fitted on some rows and scored on others (see `probes`), so what only
memorisation could give does not count.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fino_fast.errors import DataError

from .probes import Features, fit_classifier, fit_regressor

BALANCED_ACCURACY, R2 = "balanced accuracy", "R²"


@dataclass(frozen=True)
class Readout:
    """How well one factor is read on one set of rows.

    Attributes:
        factor: its name.
        split: name of the test rows.
        metric: `balanced accuracy` for named values, `R²` for numbers.
        score: of the probe.
        chance: of a probe that ignores the features: 1/(classes among the test rows), or 0 for R².
        train_count: rows that the probe was fitted on; rows without a value take no part.
        test_count: rows it was scored on.
    """

    factor: str
    split: str
    metric: str
    score: float
    chance: float
    train_count: int
    test_count: int


def read_names(
    factor: str,
    features: Features,
    values: Sequence[str | None],
    tests: Mapping[str, tuple[Features, Sequence[str | None]]],
    *,
    seed: int = 0,
) -> dict[str, Readout]:
    """Read a factor with named values; None = missing.

    Args:
        factor: its name, for messages.
        features: [n, D] training rows.
        values: n names.
        tests: split → test rows and their names. Rows with a name that no training row has take no
            part; a split without any other is left out of the answer.
        seed: of the probe's cross-validation.

    Raises:
        DataError: fewer than two values among the training rows, and as `probes.fit_classifier`;
            the message names the factor.
    """
    rows = [i for i, value in enumerate(values) if value is not None]
    names = [value for value in values if value is not None]
    try:
        probe = fit_classifier(np.asarray(features)[rows], names, seed=seed)
        readouts = {}
        for split, (test_features, test_values) in tests.items():
            known = [i for i, value in enumerate(test_values) if value in probe.classes]
            if not known:
                continue
            truth = np.array([test_values[i] for i in known], dtype=str)
            score = probe.balanced_accuracy(np.asarray(test_features)[known], truth)
            chance = 1 / len(np.unique(truth))
            readouts[split] = Readout(
                factor, split, BALANCED_ACCURACY, score, chance, len(names), len(known)
            )
    except DataError as error:
        raise DataError(f"factor {factor!r}: {error}") from error
    return readouts


def read_numbers(
    factor: str,
    features: Features,
    values: NDArray[Any],
    tests: Mapping[str, tuple[Features, NDArray[Any]]],
) -> dict[str, Readout]:
    """Read a factor that is a number; NaN = missing.

    Args:
        factor: its name, for messages.
        features: [n, D] training rows.
        values: [n].
        tests: split → test rows and their values; a split with fewer than two different values is
            left out of the answer, as R² is not defined there.

    Raises:
        DataError: fewer than two different values among the training rows, and as
            `probes.fit_regressor`; the message names the factor.
    """
    observed = ~np.isnan(values)
    try:
        probe = fit_regressor(np.asarray(features)[observed], values[observed])
        readouts = {}
        for split, (test_features, test_values) in tests.items():
            known = ~np.isnan(test_values)
            if len(np.unique(test_values[known])) < 2:
                continue
            score = probe.r2(np.asarray(test_features)[known], test_values[known])
            readouts[split] = Readout(
                factor, split, R2, score, 0.0, int(observed.sum()), int(known.sum())
            )
    except DataError as error:
        raise DataError(f"factor {factor!r}: {error}") from error
    return readouts
