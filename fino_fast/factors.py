"""Plain descriptions of the terms of the FINO objective: no tensors, no parameters.

Source of the method: FINO, *Who Needs Labels? Adapting Vision Foundation Models With the Metadata
You Already Have* (arXiv 2606.05107); defaults are the paper's.
"""

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

Role = Literal["preserve", "suppress"]
CategoricalHead = Literal["linear", "prototype"]
Concentration = Literal["fixed", "ema"]
Activation = Literal["identity", "sigmoid", "tanh"]
ScheduleKind = Literal["sigmoid", "linear", "constant"]

# Codomain of the bounded activations, onto which declared bounds are mapped.
CODOMAIN: dict[str, tuple[float, float]] = {"sigmoid": (0.0, 1.0), "tanh": (-1.0, 1.0)}


def _one_of(owner: str, argument: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{owner}: {argument} must be one of {allowed}, found {value!r}")


def _number(
    owner: str, argument: str, value: object, low: float = -math.inf, *, above: bool = False
) -> None:
    """`value` is a finite number ≥ low (> low where `above`)."""
    # numbers.Real and not float: statistics come from numpy too.
    number = value if isinstance(value, numbers.Real) else math.nan
    good = not isinstance(value, bool) and math.isfinite(number)
    if not good or number < low or (above and number == low):
        bound = "" if low == -math.inf else f" {'>' if above else '≥'} {low:g}"
        raise ValueError(f"{owner}: {argument} must be a finite number{bound}, found {value!r}")


def _count(owner: str, argument: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(f"{owner}: {argument} must be an integer ≥ 1, found {value!r}")


def _name(kind: str, name: str) -> str:
    """A usable factor name, as the prefix of messages about it."""
    if not isinstance(name, str) or not name:
        raise ValueError(f"{kind}: name must be a non-empty string, found {name!r}")
    if "." in name:
        raise ValueError(f"{kind} {name!r}: a '.' is not allowed in the name of a PyTorch module")
    return f"{kind} {name!r}"


def _hidden(owner: str, hidden: tuple[int, ...], dropout: float) -> None:
    for width in hidden:
        _count(owner, "every width in hidden", width)
    _number(owner, "dropout", dropout, 0)
    if dropout >= 1:
        raise ValueError(f"{owner}: dropout must be below 1, found {dropout!r}")
    if dropout and not hidden:
        raise ValueError(f"{owner}: dropout={dropout!r} needs hidden layers; hidden is empty")


@dataclass(frozen=True)
class Categorical:
    """A categorical metadata factor and the head that reads it from the embedding.

    Args:
        name: key of the factor in the metadata mapping.
        num_classes: number of categories K; codes are 0…K−1, and −1 means missing.
        role: `preserve` makes the embedding predictive of the factor, `suppress` reverses the
            gradient so that it is not.
        head: `linear` (logits W z + b) or `prototype` (cosine to a bank of class centroids, for
            many classes).
        weight: weight of the cross entropy in the total loss.
        orthogonal: weight of the orthogonal suppression term R_f.
        label_smoothing: ε of the cross entropy (`linear` only).
        hidden: widths of an MLP before the last linear layer (`linear` only).
        dropout: dropout after each hidden layer.
        temperature: φ of the prototype head, in units of cosine.
        momentum: m of the bank's moving average.
        concentration: `fixed` keeps φ_k = temperature; `ema` lets it follow the spread of each
            class, as the authors' released code does.

    Raises:
        ValueError: a senseless argument; the message names the factor and the argument.
    """

    name: str
    num_classes: int
    role: Role = "preserve"
    head: CategoricalHead = "prototype"
    weight: float = 0.03
    orthogonal: float = 0.0
    label_smoothing: float = 0.0
    hidden: tuple[int, ...] = ()
    dropout: float = 0.0
    temperature: float = 0.023
    momentum: float = 0.99
    concentration: Concentration = "fixed"

    def __post_init__(self) -> None:
        owner = _name("Categorical", self.name)
        object.__setattr__(self, "hidden", tuple(self.hidden))
        _count(owner, "num_classes", self.num_classes)
        _one_of(owner, "role", self.role, get_args(Role))
        _one_of(owner, "head", self.head, get_args(CategoricalHead))
        _one_of(owner, "concentration", self.concentration, get_args(Concentration))
        _number(owner, "weight", self.weight, 0)
        _number(owner, "orthogonal", self.orthogonal, 0)
        _number(owner, "label_smoothing", self.label_smoothing, 0)
        _number(owner, "temperature", self.temperature, 0, above=True)
        _number(owner, "momentum", self.momentum, 0)
        _hidden(owner, self.hidden, self.dropout)
        if self.label_smoothing > 1:
            raise ValueError(f"{owner}: label_smoothing must be ≤ 1, found {self.label_smoothing}")
        if self.momentum > 1:
            raise ValueError(f"{owner}: momentum must be ≤ 1, found {self.momentum}")
        if self.head == "prototype" and (self.hidden or self.label_smoothing):
            raise ValueError(f"{owner}: hidden and label_smoothing belong to head='linear'")


@dataclass(frozen=True)
class Continuous:
    """A continuous metadata factor and the regression head that reads it from the embedding.

    Targets are scaled by (y − mean)/std, or, where bounds are given, linearly from [low, high] onto
    the activation's codomain ([0, 1] for `sigmoid`, [−1, 1] for `tanh`).

    Args:
        name: key of the factor in the metadata mapping.
        dim: number of values d per image (2 for a cyclic factor given as (sin, cos)).
        role: `preserve` or `suppress`, as for `Categorical`.
        weight: weight of the mean squared error in the total loss.
        orthogonal: weight of the orthogonal suppression term R_f.
        mean, std: of the raw values, in their own units; one number or one per value.
        low, high: bounds of the raw values, in their own units; both or neither.
        activation: of the last layer.
        hidden, dropout: an MLP before the last linear layer.

    Raises:
        ValueError: a senseless argument; the message names the factor and the argument.
    """

    name: str
    dim: int = 1
    role: Role = "preserve"
    weight: float = 0.03
    orthogonal: float = 0.0
    mean: float | Sequence[float] = 0.0
    std: float | Sequence[float] = 1.0
    low: float | Sequence[float] | None = None
    high: float | Sequence[float] | None = None
    activation: Activation = "identity"
    hidden: tuple[int, ...] = ()
    dropout: float = 0.0

    def __post_init__(self) -> None:
        owner = _name("Continuous", self.name)
        object.__setattr__(self, "hidden", tuple(self.hidden))
        _count(owner, "dim", self.dim)
        _one_of(owner, "role", self.role, get_args(Role))
        _one_of(owner, "activation", self.activation, get_args(Activation))
        _number(owner, "weight", self.weight, 0)
        _number(owner, "orthogonal", self.orthogonal, 0)
        _hidden(owner, self.hidden, self.dropout)
        for value in self._columns(owner, "mean", self.mean):
            _number(owner, "mean", value)
        for value in self._columns(owner, "std", self.std):
            _number(owner, "std", value, 0, above=True)
        if (self.low is None) != (self.high is None):
            raise ValueError(f"{owner}: give both low and high, or neither")
        if self.low is not None and self.high is not None:
            if self.activation == "identity":
                raise ValueError(
                    f"{owner}: bounds map the targets onto the codomain of sigmoid or tanh; "
                    f"activation='identity' has none"
                )
            bounds = zip(
                self._columns(owner, "low", self.low),
                self._columns(owner, "high", self.high),
                strict=True,
            )
            for low, high in bounds:
                _number(owner, "low", low)
                _number(owner, "high", high, low, above=True)
        if self.role == "suppress" and self.activation == "identity":
            raise ValueError(
                f"{owner}: role='suppress' with activation='identity' is unbounded, because the "
                f"reversed squared error grows for ever; use 'sigmoid' or 'tanh'"
            )

    def _columns(self, owner: str, argument: str, value: float | Sequence[float]) -> list[float]:
        columns = list(value) if isinstance(value, Sequence) else [value] * self.dim
        if len(columns) != self.dim:
            raise ValueError(
                f"{owner}: {argument} has {len(columns)} values, expected 1 or dim={self.dim}"
            )
        return columns

    @property
    def affine(self) -> tuple[list[float], list[float]]:
        """(offset, scale) per column, with scaled target = (y − offset) · scale."""
        owner = f"Continuous {self.name!r}"
        if self.low is None or self.high is None:
            mean, std = (
                self._columns(owner, "mean", self.mean),
                self._columns(owner, "std", self.std),
            )
            return mean, [1 / s for s in std]
        bottom, top = CODOMAIN[self.activation]
        offsets, scales = [], []
        for low, high in zip(
            self._columns(owner, "low", self.low),
            self._columns(owner, "high", self.high),
            strict=True,
        ):
            scale = (top - bottom) / (high - low)
            offsets.append(low - bottom / scale)
            scales.append(scale)
        return offsets, scales


Factor = Categorical | Continuous


@dataclass(frozen=True)
class InfoNCE:
    """The contrastive term (InfoNCE / NT-Xent, van den Oord 2018, Chen 2020).

    Args:
        temperature: τ, in units of cosine.
        learnable: make log τ a parameter of the loss.
        two_tower: rows of view 0 against rows of view 1 only, both directions averaged (CLIP's
            loss, Radford 2021); needs exactly two views.

    Raises:
        ValueError: τ is not a finite number > 0.
    """

    temperature: float = 0.1
    learnable: bool = False
    two_tower: bool = False

    def __post_init__(self) -> None:
        _number("InfoNCE", "temperature", self.temperature, 0, above=True)


@dataclass(frozen=True)
class LambdaSchedule:
    """Strength λ ∈ [0, 1] of the guidance on the backbone as a function of training progress.

    λ = 0 for progress < warmup; then, with q = (progress − warmup)/(1 − warmup): `sigmoid`
    2/(1 + e^(−10 q)) − 1 (Ganin 2016), `linear` q, `constant` 1.

    Args:
        kind: shape of the ramp.
        warmup: share of the training without guidance, in [0, 1).

    Raises:
        ValueError: an unknown kind, or a warmup outside [0, 1).
    """

    kind: ScheduleKind = "sigmoid"
    warmup: float = 0.0

    def __post_init__(self) -> None:
        _one_of("LambdaSchedule", "kind", self.kind, get_args(ScheduleKind))
        _number("LambdaSchedule", "warmup", self.warmup, 0)
        if self.warmup >= 1:
            raise ValueError(f"LambdaSchedule: warmup must be below 1, found {self.warmup!r}")

    def __call__(self, progress: float) -> float:
        """λ at `progress` = step / total steps; beyond 1 it stays where it is at 1.

        Raises:
            ValueError: `progress` is not finite.
        """
        _number("LambdaSchedule", "progress", progress)
        if progress < self.warmup:
            return 0.0
        q = min((progress - self.warmup) / (1 - self.warmup), 1.0)
        if self.kind == "sigmoid":
            return 2 / (1 + math.exp(-10 * q)) - 1
        return q if self.kind == "linear" else 1.0
