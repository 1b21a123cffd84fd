"""What the loss asks of a backend: the terms of the objective as calls on flat rows."""

from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from .factors import Role
from .reference import scale_gradient

Kind = Literal["linear", "prototype", "identity", "sigmoid", "tanh"]


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

    @property
    def guided(self) -> Tensor:
        """`x`, whose gradient is multiplied by `guidance`."""
        return self.x if self.guidance is None else scale_gradient(self.x, self.guidance)


@dataclass
class HeadResult:
    """What a head returns of the local rows; sums are divided by the count of all ranks.

    Attributes:
        loss: 0-d, differentiable in `x` and, but for prototypes, in `bank` and `offset`.
        metric: 0-d detached: accuracy, or the mean squared error.
        gradient: [N, D] detached ∂loss/∂x without the guidance, where it was asked for.
    """

    loss: Tensor
    metric: Tensor
    gradient: Tensor | None = None


class Backend(Protocol):
    """The terms of the objective; each equals its namesake in `reference`."""

    def contrastive(self, rows: Tensor, logit_scale: Tensor, views: int, two_tower: bool) -> Tensor:
        """The local rows' share of the contrastive loss: their sum over the rows of all ranks.

        The gradient that `rows` receives is that of the whole batch's loss, other ranks' shares
        included. 0-d.
        """

    def heads(self, calls: list[HeadCall], want_gradient: bool) -> list[HeadResult]:
        """All heads of the step."""

    def orthogonal(self, z: Tensor, metadata: Tensor, role: Role) -> Tensor:
        """R_f over the rows of all ranks (`reference.orthogonal`). 0-d.

        The gradient that `z` receives is W times that of R_f, W the number of ranks.
        """
