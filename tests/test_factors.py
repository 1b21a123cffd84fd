"""The descriptions of the terms: defaults, errors, scaling of targets, the schedule of λ."""

import math
from dataclasses import FrozenInstanceError, asdict

import numpy as np
import oracle
import pytest
import torch

from fino_fast import Categorical, Continuous, InfoNCE, LambdaSchedule
from fino_fast.reference import scaled_target


def test_defaults_are_those_of_the_paper() -> None:
    assert asdict(Categorical("plate", 3)) == {
        "name": "plate",
        "num_classes": 3,
        "role": "preserve",
        "head": "prototype",
        "weight": 0.03,
        "orthogonal": 0.0,
        "label_smoothing": 0.0,
        "hidden": (),
        "dropout": 0.0,
        "temperature": 0.023,
        "momentum": 0.99,
        "concentration": "fixed",
    }
    assert asdict(Continuous("exposure")) == {
        "name": "exposure",
        "dim": 1,
        "role": "preserve",
        "weight": 0.03,
        "orthogonal": 0.0,
        "mean": 0.0,
        "std": 1.0,
        "low": None,
        "high": None,
        "activation": "identity",
        "hidden": (),
        "dropout": 0.0,
    }
    assert asdict(InfoNCE()) == {"temperature": 0.1, "learnable": False, "two_tower": False}
    assert asdict(LambdaSchedule()) == {"kind": "sigmoid", "warmup": 0.0}


def test_descriptions_do_not_change() -> None:
    with pytest.raises(FrozenInstanceError):
        Categorical("plate", 3).weight = 2.0  # type: ignore[misc]
    assert Categorical("a", 3, head="linear", hidden=[4, 5]).hidden == (4, 5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        ({"num_classes": 0}, "num_classes"),
        ({"num_classes": 2.0}, "num_classes"),
        ({"num_classes": True}, "num_classes"),
        ({"role": "protect"}, "role"),
        ({"head": "cosine"}, "head"),
        ({"concentration": "adaptive"}, "concentration"),
        ({"weight": -0.1}, "weight"),
        ({"weight": math.nan}, "weight"),
        ({"weight": "1"}, "weight"),
        ({"orthogonal": -1}, "orthogonal"),
        ({"orthogonal": math.inf}, "orthogonal"),
        ({"temperature": 0}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"momentum": 1.1}, "momentum"),
        ({"momentum": -0.1}, "momentum"),
        ({"head": "linear", "label_smoothing": 1.5}, "label_smoothing"),
        ({"head": "linear", "label_smoothing": -0.5}, "label_smoothing"),
        ({"head": "linear", "hidden": (0,)}, "hidden"),
        ({"head": "linear", "hidden": (4,), "dropout": 1.0}, "dropout"),
        ({"head": "linear", "hidden": (4,), "dropout": -0.1}, "dropout"),
        ({"head": "linear", "dropout": 0.5}, "dropout"),
        ({"hidden": (4,)}, "hidden"),
        ({"label_smoothing": 0.1}, "label_smoothing"),
    ],
)
def test_a_senseless_categorical_is_an_error(arguments: dict[str, object], fault: str) -> None:
    with pytest.raises(ValueError, match=rf"'cell_line'.*{fault}"):
        Categorical(**({"name": "cell_line", "num_classes": 3} | arguments))


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        ({"dim": 0}, "dim"),
        ({"role": "protect"}, "role"),
        ({"activation": "relu"}, "activation"),
        ({"weight": -1}, "weight"),
        ({"orthogonal": -1}, "orthogonal"),
        ({"std": 0}, "std"),
        ({"std": -1}, "std"),
        ({"mean": math.nan}, "mean"),
        ({"mean": (1.0, 2.0)}, "mean"),
        ({"dim": 2, "std": (1.0, 0.0)}, "std"),
        ({"low": 0.0, "activation": "sigmoid"}, "high"),
        ({"high": 0.0, "activation": "sigmoid"}, "low"),
        ({"low": 0.0, "high": 1.0}, "identity"),
        ({"low": 1.0, "high": 1.0, "activation": "tanh"}, "high"),
        ({"low": 2.0, "high": 1.0, "activation": "tanh"}, "high"),
        ({"low": 0.0, "high": math.inf, "activation": "tanh"}, "high"),
        ({"hidden": (4, -1)}, "hidden"),
        ({"dropout": 0.5}, "dropout"),
        ({"role": "suppress"}, "identity.*sigmoid.*tanh"),
        ({"role": "suppress", "activation": "identity"}, "unbounded"),
    ],
)
def test_a_senseless_continuous_is_an_error(arguments: dict[str, object], fault: str) -> None:
    with pytest.raises(ValueError, match=rf"'exposure'.*{fault}"):
        Continuous(**({"name": "exposure"} | arguments))


@pytest.mark.parametrize("name", ["", 3, None, "a.b"])
@pytest.mark.parametrize("kind", [lambda name: Categorical(name, 2), Continuous])
def test_a_name_is_one_word_of_a_module_path(kind: type, name: object) -> None:
    with pytest.raises(ValueError, match="name"):
        kind(name)


@pytest.mark.parametrize("tau", [0, -0.1, math.nan, math.inf, "0.1"])
def test_tau_is_above_zero(tau: object) -> None:
    with pytest.raises(ValueError, match="temperature"):
        InfoNCE(temperature=tau)  # type: ignore[arg-type]


def test_numbers_may_come_from_numpy() -> None:
    factor = Continuous("y", np.int64(1), mean=np.float32(2.5), std=np.float64(0.5))
    assert scaled_target(factor, torch.tensor([3.0]), torch.float32).tolist() == [[1.0]]
    assert Categorical("a", np.int64(4)).num_classes == 4


# --- scaling of continuous targets


def test_targets_are_standardised() -> None:
    factor = Continuous("y", 2, mean=(1.0, -2.0), std=(2.0, 0.5))
    y = torch.tensor([[1.0, -2.0], [3.0, -1.5], [math.nan, 0.0]])
    expected = torch.tensor([[0.0, 0.0], [1.0, 1.0], [math.nan, 4.0]])
    torch.testing.assert_close(scaled_target(factor, y, torch.float32), expected, equal_nan=True)


@pytest.mark.parametrize(("activation", "bottom"), [("sigmoid", 0.0), ("tanh", -1.0)])
@pytest.mark.parametrize("given_mean", [{}, {"mean": 4.0, "std": 3.0}])
def test_bounds_map_onto_the_codomain(
    activation: str, bottom: float, given_mean: dict[str, float]
) -> None:
    factor = Continuous("y", 1, low=-2.0, high=6.0, activation=activation, **given_mean)
    y = torch.tensor([-2.0, 2.0, 6.0, math.nan], dtype=torch.float64)
    scaled = scaled_target(factor, y, torch.float64)[:, 0]
    expected = torch.tensor([bottom, (bottom + 1) / 2, 1.0, math.nan], dtype=torch.float64)
    torch.testing.assert_close(scaled, expected, equal_nan=True)


def test_one_bound_a_column() -> None:
    factor = Continuous("y", 2, low=(0.0, 10.0), high=(1.0, 30.0), activation="sigmoid")
    scaled = scaled_target(factor, torch.tensor([[0.25, 25.0]]), torch.float32)
    torch.testing.assert_close(scaled, torch.tensor([[0.25, 0.75]]))


def test_without_bounds_a_bounded_activation_is_standardised() -> None:
    factor = Continuous("y", mean=2.0, std=4.0, activation="tanh")
    assert scaled_target(factor, torch.tensor([4.0]), torch.float32).tolist() == [[0.5]]


def test_time_stamps_survive_fp32() -> None:
    """Seconds since 1970 in fp64: a difference of one second is below the fp32 resolution."""
    factor = Continuous("time", mean=1.7e9, std=1.0)
    y = torch.tensor([1.7e9, 1.7e9 + 1], dtype=torch.float64)
    assert scaled_target(factor, y, torch.float32).tolist() == [[0.0], [1.0]]


# --- λ


@pytest.mark.parametrize("warmup", [0.0, 0.25])
@pytest.mark.parametrize("kind", ["sigmoid", "linear", "constant"])
def test_schedule(kind: str, warmup: float) -> None:
    schedule = LambdaSchedule(kind, warmup)
    for progress in (0.0, 0.1, 0.2499999, 0.25, 0.3, 0.5, 0.999, 1.0):
        expected = oracle.schedule(kind, warmup, progress)
        assert schedule(progress) == pytest.approx(expected, abs=1e-12)
    assert schedule(1.5) == schedule(1.0)  # a run that goes on beyond its planned end


def test_schedule_by_hand() -> None:
    assert LambdaSchedule()(0.0) == 0
    assert LambdaSchedule()(0.1) == pytest.approx(2 / (1 + math.exp(-1)) - 1)
    assert LambdaSchedule()(1.0) == pytest.approx(0.9999092, abs=1e-7)
    assert LambdaSchedule("linear", warmup=0.5)(0.75) == pytest.approx(0.5)
    assert LambdaSchedule("constant", warmup=0.5)(0.5) == 1
    assert LambdaSchedule("constant", warmup=0.5)(0.49) == 0


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        ({"kind": "cosine"}, "kind"),
        ({"warmup": 1.0}, "warmup"),
        ({"warmup": -0.1}, "warmup"),
        ({"warmup": math.nan}, "warmup"),
    ],
)
def test_a_senseless_schedule_is_an_error(arguments: dict[str, object], fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        LambdaSchedule(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("progress", [math.nan, math.inf, "half"])
def test_progress_is_a_finite_number(progress: object) -> None:
    with pytest.raises(ValueError, match="progress"):
        LambdaSchedule()(progress)  # type: ignore[arg-type]
