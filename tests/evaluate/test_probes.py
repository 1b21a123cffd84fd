"""Probes and leakage on features whose answer is known by construction."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from fino_fast.errors import DataError
from fino_fast.evaluate.leakage import read_names, read_numbers
from fino_fast.evaluate.probes import INVERSE_PENALTIES, fit_classifier, fit_regressor

WIDTH = 24


def named(rng: np.random.Generator, rows: int, classes: int, distance: float):
    """Gaussian classes whose means are `distance` apart, in columns of very unequal scale."""
    labels = np.arange(rows) % classes
    features = rng.standard_normal((rows, WIDTH))
    features[np.arange(rows), labels] += distance
    return features * np.logspace(-3, 3, WIDTH), np.array([f"class {k}" for k in labels])


def test_separable_classes_are_read_and_scale_does_not_matter(rng: np.random.Generator) -> None:
    features, labels = named(rng, 300, 3, distance=8.0)
    probe = fit_classifier(features, labels)
    fresh, truth = named(rng, 300, 3, distance=8.0)
    assert probe.balanced_accuracy(fresh, truth) > 0.99
    assert probe.classes == ["class 0", "class 1", "class 2"]


def test_noise_is_read_at_chance(rng: np.random.Generator) -> None:
    features, labels = named(rng, 600, 3, distance=0.0)
    fresh, truth = named(rng, 3000, 3, distance=0.0)
    assert fit_classifier(features, labels).balanced_accuracy(fresh, truth) == pytest.approx(
        1 / 3, abs=0.05
    )


def test_a_rare_class_counts_as_much_as_a_common_one(rng: np.random.Generator) -> None:
    """Always answering the common class would have an accuracy of 0.95."""
    labels = np.array(["common"] * 950 + ["rare"] * 50)
    features = rng.standard_normal((1000, 2)) + np.where(labels == "rare", 2.0, 0.0)[:, None]
    probe = fit_classifier(features, labels)
    predicted = probe.predict(features)
    recalls = [np.mean(predicted[labels == name] == name) for name in probe.classes]
    assert min(recalls) > 0.85
    assert probe.balanced_accuracy(features, labels) == pytest.approx(np.mean(recalls))


def test_the_penalty_is_the_best_in_cross_validation(rng: np.random.Generator) -> None:
    """Against scikit-learn's plain cross-validation, one penalty after another."""
    labels = np.where(rng.random(150) < 0.5, "a", "b")
    features = rng.standard_normal((150, 60)) + np.where(labels == "a", 0.1, -0.1)[:, None]
    folds = StratifiedKFold(3, shuffle=True, random_state=5)
    scores = {}
    for c in INVERSE_PENALTIES:
        model = LogisticRegression(C=c, class_weight="balanced", max_iter=2000)
        model = make_pipeline(StandardScaler(), model)
        found = cross_val_score(model, features, labels, cv=folds, scoring="balanced_accuracy")
        scores[c] = found.mean()
    assert max(scores.values()) - min(scores.values()) > 0.005  # the choice matters here
    chosen = fit_classifier(features, labels, seed=5).inverse_penalty
    assert scores[chosen] == pytest.approx(max(scores.values()), abs=1e-9)


def test_numbers_are_read_linearly(rng: np.random.Generator) -> None:
    features = rng.standard_normal((500, WIDTH))
    values = features[:, 0] - 2 * features[:, 1] + 7
    probe = fit_regressor(features[:300], values[:300])
    assert probe.r2(features[300:], values[300:]) > 0.999
    noise = rng.standard_normal(500)
    assert fit_regressor(features[:300], noise[:300]).r2(features[300:], noise[300:]) < 0.05


def test_a_unit_that_hardly_ever_fires_does_not_rule(rng: np.random.Generator) -> None:
    """Dead ReLU units have no deviation in training; one that fires in the test must not win."""
    features = rng.standard_normal((400, WIDTH))
    values = features[:, 0] + 0.1 * rng.standard_normal(400)
    features[:, 5] = 0
    features[:, 6] = 0
    features[:2, 6] = [1e-4, 2e-4]
    features[300:310, 5:7] = 3.0
    names = np.where(values > 0, "above", "below")
    assert fit_regressor(features[:300], values[:300]).r2(features[300:], values[300:]) > 0.95
    probe = fit_classifier(features[:300], names[:300])
    assert probe.balanced_accuracy(features[300:], names[300:]) > 0.9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("nan", r"1 of 60 rows hold NaN or infinity, the first is row 7"),
        ("one class", "two classes or more"),
        ("rare", r"\['class 9'\] have fewer than 3 rows"),
        ("short", r"\(59,\) for 60 rows"),
        ("flat", r"expected \[n, D\]"),
        ("empty", "two classes or more, found \\[\\]"),
    ],
)
def test_what_cannot_be_probed_is_named(
    change: str, message: str, rng: np.random.Generator
) -> None:
    features, labels = named(rng, 60, 2, distance=3.0)
    if change == "nan":
        features[7, 3] = np.nan
    elif change == "one class":
        labels[:] = "class 0"
    elif change == "rare":
        labels[:2] = "class 9"
    elif change == "short":
        labels = labels[:-1]
    elif change == "flat":
        features = features[:, 0]
    else:
        features, labels = features[:0], labels[:0]
    with pytest.raises(DataError, match=message):
        fit_classifier(features, labels)


def test_a_label_never_learned_is_named(rng: np.random.Generator) -> None:
    features, labels = named(rng, 60, 2, distance=3.0)
    probe = fit_classifier(features, labels)
    with pytest.raises(DataError, match=r"\['new'\] never occur"):
        probe.balanced_accuracy(features[:2], ["class 0", "new"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.full(20, 3.0), "values that differ"),
        (np.r_[np.nan, np.arange(19.0)], "1 are NaN or infinite, the first is row 0"),
        (np.arange(19.0), r"\(19,\) for 20 rows"),
    ],
)
def test_numbers_that_cannot_be_probed_are_named(
    values: np.ndarray, message: str, rng: np.random.Generator
) -> None:
    with pytest.raises(DataError, match=message):
        fit_regressor(rng.standard_normal((20, 4)), values)


def test_leakage_ignores_gaps_and_values_it_cannot_know(rng: np.random.Generator) -> None:
    features, labels = named(rng, 400, 4, distance=6.0)
    names = [None if i % 10 == 0 else str(label) for i, label in enumerate(labels)]
    test, truth = named(rng, 200, 4, distance=6.0)
    tests = {
        "seen": (test, [None, "class 99", *truth[2:].tolist()]),
        "three": (test[truth != "class 3"], truth[truth != "class 3"].tolist()),
        "unseen": (test[:2], ["class 98", "class 99"]),
    }
    found = read_names("plate", features, names, tests)
    assert list(found) == ["seen", "three"]
    assert (found["seen"].train_count, found["seen"].test_count) == (360, 198)
    assert (found["seen"].chance, found["three"].chance) == (1 / 4, 1 / 3)
    assert found["seen"].score > 0.97
    assert {r.metric for r in found.values()} == {"balanced accuracy"}


def test_leakage_of_a_number_ignores_gaps(rng: np.random.Generator) -> None:
    features = rng.standard_normal((300, WIDTH))
    values = features @ np.linspace(-1, 1, WIDTH)
    gaps = values.copy()
    gaps[::10] = np.nan
    tests = {
        "seen": (features[200:], gaps[200:]),
        "constant": (features[:3], np.array([1.0, np.nan, 1.0])),
    }
    found = read_numbers("dose", features[:200], gaps[:200], tests)
    assert list(found) == ["seen"]
    assert (found["seen"].train_count, found["seen"].test_count) == (180, 90)
    assert found["seen"].score > 0.99
    assert found["seen"].chance == 0


def test_an_unreadable_factor_is_named(rng: np.random.Generator) -> None:
    with pytest.raises(DataError, match="factor 'plate'"):
        read_names("plate", rng.standard_normal((9, 2)), ["a"] * 9, {})
    with pytest.raises(DataError, match="factor 'dose'"):
        read_numbers("dose", rng.standard_normal((9, 2)), np.full(9, np.nan), {})
