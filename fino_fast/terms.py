"""What the loss asks of a backend: the terms of one step as calls on flat rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from .factors import Role
from .reference import scale_gradient

Kind = Literal["linear", "prototype", "identity", "sigmoid", "tanh"]


def numbered(tensors: Sequence[Tensor | None]) -> list[int]:
    """Of each its number among the different ones, in order of appearance.

    Found by `is`: PyTorch 2.11 and before do not compile `id` of an intermediate.
    """
    different: list[Tensor | None] = []
    numbers = []
    for tensor in tensors:
        known = [i for i, other in enumerate(different) if other is tensor]
        numbers.append(known[0] if known else len(different))
        if not known:
            different.append(tensor)
    return numbers


@dataclass
class ContrastiveCall:
    """The contrastive term over the local rows.

    Attributes:
        rows: [V·B, P], view-major.
        logit_scale: 0-d, 1/τ.
        views: V.
        two_tower: CLIP's form; V = 2.
    """

    rows: Tensor
    logit_scale: Tensor
    views: int
    two_tower: bool = False


@dataclass
class HeadCall:
    """One metadata head over the local rows.

    Attributes:
        kind: `linear` or `prototype` (cross entropy), or a continuous head's activation.
        x: [N, D], the rows.
        bank: [K, D], class weights, centroids, or output vectors.
        offset: [K], bias; for `prototype` φ.
        target: [N] int64 (−1 takes no part), or [N, K] scaled values (NaN takes no part).
        inv_count: 0-d, 1 / number of valid rows or entries on all ranks.
        label_smoothing: ε.
        counts: [K] int64, rows seen of every class; for `prototype`.
        guidance: 0-d, sign·λ, by which the gradient that reaches `x` is multiplied; None is 1.
        weight: weight_f of the guide in the sum of all guides.
    """

    kind: Kind
    x: Tensor
    bank: Tensor
    offset: Tensor
    target: Tensor
    inv_count: Tensor
    label_smoothing: float = 0.0
    counts: Tensor | None = None
    guidance: Tensor | None = None
    weight: float = 1.0

    @property
    def guided(self) -> Tensor:
        """`x`, whose gradient is multiplied by `guidance`."""
        return self.x if self.guidance is None else scale_gradient(self.x, self.guidance)


@dataclass
class HeadResult:
    """What a head returns of the local rows; sums are divided by the count of all ranks.

    Attributes:
        loss: 0-d L_f, unweighted. Differentiable where the step is balanced.
        metric: 0-d detached: accuracy, or the mean squared error.
        gradient: [N, D] detached ∂loss/∂x without the guidance, where the step is balanced.
    """

    loss: Tensor
    metric: Tensor
    gradient: Tensor | None = None


@dataclass
class OrthogonalCall:
    """The orthogonal suppression term of one factor over the local rows.

    Attributes:
        z: [N, D].
        design: [N] int64 (−1 takes no part), or [N, d] scaled values (rows with a NaN take none).
        role: of the factor.
        guidance: 0-d, λ, by which the gradient that reaches `z` is multiplied; None is 1.
        weight: orthogonal_f in the sum of these terms.
        classes: number of categories of the factor; 0 for values.
    """

    z: Tensor
    design: Tensor
    role: Role
    guidance: Tensor | None = None
    weight: float = 1.0
    classes: int = 0

    @property
    def guided(self) -> Tensor:
        """`z`, whose gradient is multiplied by `guidance`."""
        return self.z if self.guidance is None else scale_gradient(self.z, self.guidance)


@dataclass
class Step:
    """All terms of one step.

    Attributes:
        contrastive: None where there is no such term.
        heads: one entry a guide.
        orthogonal: one entry a factor that has such a term.
        balanced: every head's loss is wanted by itself, differentiable and with its gradient, in
            place of their sum.
        deterministic: the same bits from any number of CPU threads.
    """

    contrastive: ContrastiveCall | None = None
    heads: Sequence[HeadCall] = ()
    orthogonal: Sequence[OrthogonalCall] = ()
    balanced: bool = False
    deterministic: bool = False


@dataclass
class StepResult:
    """What a backend returns of a step; all tensors are 0-d.

    Attributes:
        contrastive: the local rows' share of the contrastive loss: their sum over the rows of all
            ranks. The gradient that the rows receive is that of the whole batch's loss, other
            ranks' shares included. None where there is no such term.
        guides: the local rows' share of Σ_f weight_f · L_f. None where there is no head, or where
            the step is balanced.
        heads: one entry a head.
        orthogonal: Σ_f weight_f · R_f over the rows of all ranks; the gradient that z receives is W
            times that, W the number of ranks. None where there is no such term.
        overlaps: R_f, detached.
    """

    contrastive: Tensor | None
    guides: Tensor | None
    heads: list[HeadResult]
    orthogonal: Tensor | None
    overlaps: list[Tensor]


class Backend(Protocol):
    """Computes the terms of the objective; each equals its namesake in `reference`."""

    def step(self, step: Step) -> StepResult:
        """All terms of the step, value and gradient."""
