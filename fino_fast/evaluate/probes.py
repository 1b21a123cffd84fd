"""Linear probes: what a linear model can read from frozen features.

The protocol is the usual one of representation learning: the backbone stays as it is, the features
are standardised by the training rows' mean and deviation, and a linear model with an L2 penalty is
fitted. Standardised values are clipped to ±`CLIP`: a unit that hardly ever fired among the training
rows has next to no deviation, and one test image in which it does would otherwise outweigh all
other units together. The penalty is chosen by cross-validation inside the training rows; no test
row is seen before the score. Classes weigh the same whatever their size, and the score is the
balanced accuracy, the mean of the classes' recalls: a rare class counts, and chance is 1/classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fino_fast.errors import DataError, MissingExtraError

try:
    from sklearn.linear_model import LogisticRegression, RidgeCV
    from sklearn.metrics import balanced_accuracy_score, r2_score
    from sklearn.model_selection import GridSearchCV, StratifiedKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import FunctionTransformer, StandardScaler
except ImportError as error:
    raise MissingExtraError("scikit-learn", "evaluate") from error

Features = NDArray[Any]
Labels = NDArray[Any]

INVERSE_PENALTIES = (1e-4, 1e-3, 1e-2)  # scikit-learn's C
RIDGE_PENALTIES = tuple(10.0**k for k in range(-1, 7))
CLIP = 5.0  # standard deviations
FOLDS = 3
MAX_ITERATIONS = 2000


@dataclass(frozen=True)
class Classifier:
    """A fitted linear classifier on standardised features.

    Attributes:
        classes: the labels that it tells apart, sorted.
        inverse_penalty: the C that cross-validation chose.
        train_count: rows it was fitted on.
    """

    classes: list[str]
    inverse_penalty: float
    train_count: int
    _pipeline: Any

    def predict(self, features: Features) -> Labels:
        """The predicted label of every row of `features` [n, D]."""
        return np.asarray(self._pipeline.predict(check_features(features, "test features")))

    def balanced_accuracy(self, features: Features, labels: Sequence[str] | Labels) -> float:
        """Mean over the classes present in `labels` of the share of their rows that is recognised.

        Raises:
            DataError: no rows, another number of labels than of features, features that are not
                finite, or a label that the probe was never shown.
        """
        truth = check_labels(features, labels, "test labels")
        unknown = sorted(set(truth.tolist()) - set(self.classes))
        if unknown:
            raise DataError(
                f"test labels: {unknown} never occur among the training labels {self.classes}"
            )
        return float(balanced_accuracy_score(truth, self.predict(features)))


def fit_classifier(
    features: Features, labels: Sequence[str] | Labels, *, seed: int = 0
) -> Classifier:
    """Fit a logistic regression with a cross-validated L2 penalty.

    Args:
        features: [n, D], finite.
        labels: n class names.
        seed: of the assignment of rows to folds.

    Raises:
        DataError: features that are not finite, lengths that differ, fewer than two classes, or a
            class with fewer rows than there are folds.
    """
    names = check_labels(features, labels, "training labels")
    classes, counts = np.unique(names, return_counts=True)
    if len(classes) < 2:
        raise DataError(f"training labels: expected two classes or more, found {classes.tolist()}")
    if counts.min() < FOLDS:
        rare = classes[counts < FOLDS].tolist()
        raise DataError(f"training labels: {rare} have fewer than {FOLDS} rows; merge or drop them")
    search = GridSearchCV(
        standardised(LogisticRegression(class_weight="balanced", max_iter=MAX_ITERATIONS)),
        {"logisticregression__C": INVERSE_PENALTIES},
        scoring="balanced_accuracy",
        cv=StratifiedKFold(FOLDS, shuffle=True, random_state=seed),
    )
    search.fit(check_features(features, "training features"), names)
    chosen = float(search.best_params_["logisticregression__C"])
    return Classifier(classes.tolist(), chosen, len(names), search.best_estimator_)


@dataclass(frozen=True)
class Regressor:
    """A fitted linear regression on standardised features.

    Attributes:
        penalty: the ridge penalty that leave-one-out cross-validation chose.
        train_count: rows it was fitted on.
    """

    penalty: float
    train_count: int
    _pipeline: Any

    def r2(self, features: Features, values: NDArray[Any]) -> float:
        """Share of the variance of `values` that is explained; 0 for their mean, below 0 if worse.

        Raises:
            DataError: fewer than two rows, values that are constant or not finite, lengths that
                differ, or features that are not finite.
        """
        truth = check_values(features, values, "test values")
        rows = check_features(features, "test features")
        return float(r2_score(truth, self._pipeline.predict(rows)))


def fit_regressor(features: Features, values: NDArray[Any]) -> Regressor:
    """Fit a ridge regression whose penalty is chosen by leave-one-out cross-validation.

    Args:
        features: [n, D], finite.
        values: [n], finite, not constant.

    Raises:
        DataError: as for `Regressor.r2`.
    """
    truth = check_values(features, values, "training values")
    pipeline = standardised(RidgeCV(alphas=RIDGE_PENALTIES))
    pipeline.fit(check_features(features, "training features"), truth)
    return Regressor(float(pipeline[-1].alpha_), len(truth), pipeline)


def standardised(model: Any) -> Any:
    """`model` behind the standardisation of its features."""
    clip = FunctionTransformer(np.clip, kw_args={"a_min": -CLIP, "a_max": CLIP})
    return make_pipeline(StandardScaler(), clip, model)


def check_features(features: Features, what: str) -> Features:
    """`features` as [n, D] of at least single precision.

    Raises:
        DataError: another shape, no rows, or a value that is not finite.
    """
    rows = np.asarray(features)
    if rows.ndim != 2 or 0 in rows.shape:
        raise DataError(f"{what}: expected [n, D] with n, D ≥ 1, found the shape {rows.shape}")
    wrong = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if wrong.size:
        raise DataError(
            f"{what}: {wrong.size} of {len(rows)} rows hold NaN or infinity, the first is row "
            f"{wrong[0]}; the backbone that made them has diverged"
        )
    return rows.astype(np.float32, copy=False) if rows.dtype.itemsize < 4 else rows


def check_labels(features: Features, labels: Sequence[str] | Labels, what: str) -> Labels:
    names = np.asarray(labels)
    if names.ndim != 1 or len(names) != len(features):
        raise DataError(f"{what}: {names.shape} for {len(features)} rows of features")
    return names.astype(str)


def check_values(features: Features, values: NDArray[Any], what: str) -> NDArray[np.float64]:
    truth = np.asarray(values, dtype=np.float64)
    if truth.ndim != 1 or len(truth) != len(features):
        raise DataError(f"{what}: {truth.shape} for {len(features)} rows of features")
    wrong = np.flatnonzero(~np.isfinite(truth))
    if wrong.size:
        raise DataError(f"{what}: {wrong.size} are NaN or infinite, the first is row {wrong[0]}")
    if len(truth) < 2 or truth.min() == truth.max():
        raise DataError(f"{what}: expected values that differ, found {np.unique(truth).tolist()}")
    return truth
