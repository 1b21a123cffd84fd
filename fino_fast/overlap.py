"""The orthogonal terms on a GPU: all factors in a fixed number of launches.

The statistics and the gradient at the embeddings are CUDA C++ (`cuda`). The overlap of `preserve`,
‖S Uᵀ‖², is a sweep of the rows of U over the bank M, one more bank of the step; where a factor has
so many groups that tr(SᵀS · UᵀU) costs less, it is products of the library, batched over factors.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import cuda, reference
from .distributed import gather_views, rank, sum_over_ranks, whole, world_size
from .reference import orthonormal_design, scale_gradient
from .terms import OrthogonalCall, numbered

SWEEP, SQUARES, SUPPRESS = range(3)  # how ‖S Uᵀ‖² is computed, if at all


@dataclass
class Swept:
    """A bank of the sweep: this rank's share of R · shares is Σ ⟨scale · row, vector⟩² / count.

    Attributes:
        rows: [N, D], U.
        vectors: [G, D] fp32, M, normalised.
        scale: 0-d.
        inv_count: 0-d, 1 / number of rows on all ranks.
    """

    rows: Tensor
    vectors: Tensor
    scale: Tensor
    inv_count: Tensor


@dataclass
class Split:
    """The orthogonal terms on one z, split by every factor.

    Attributes:
        members: numbers of the calls in the order of what follows: those to be swept, those of
            `squares`, and all others.
        swept: the banks of the first.
        squares: [Q], what a sweep would give of the second.
        shares: [F]; by them the former are divided, and they are R of the third.
        guidance: [F], λ.
    """

    members: list[int]
    swept: list[Swept]
    squares: Tensor
    shares: Tensor
    guidance: Tensor

    def terms(self, swept: list[Tensor]) -> Tensor:
        """R over the rows of all ranks in the order of `members`, [F]; see `terms.StepResult`.

        Args:
            swept: 0-d each, this rank's share of every bank.
        """
        terms = self.shares
        numerators = torch.cat([*(loss.view(1) for loss in swept), self.squares])
        if len(numerators):
            p = len(numerators)
            terms = torch.cat([whole(numerators) / terms[:p], terms[p:]])
        # λ at R is λ at z, for a number in place of a matrix.
        return scale_gradient(terms, self.guidance)


def split(calls: list[OrthogonalCall]) -> list[Split]:
    """The terms by the z on which they stand."""
    splits = []
    spaces = numbered([call.z for call in calls])
    for space in sorted(set(spaces)):
        members = [f for f in range(len(calls)) if spaces[f] == space]
        z = calls[members[0]].z
        if cuda.serves_rows(z):
            splits.append(_by_kernels(z, calls, members))
            continue
        rows = gather_views(z, 1)
        shares = torch.stack(
            [
                reference.orthogonal(rows, gather_views(calls[f].design, 1), calls[f].role)
                for f in members
            ]
        )
        nothing = shares.new_empty(0)
        splits.append(Split(members, [], nothing, shares, _guidance(calls, members, shares)))
    return splits


def _guidance(calls: list[OrthogonalCall], members: list[int], shares: Tensor) -> Tensor:
    guidance = [calls[f].guidance for f in members]
    one = shares.new_ones(())
    return torch.stack([one if g is None else g for g in guidance]).to(shares.dtype)


def _by_kernels(z: Tensor, calls: list[OrthogonalCall], members: list[int]) -> Split:
    n, width = z.shape
    count = n * world_size()
    group_counts = {
        f: min(calls[f].classes, count) if calls[f].classes else calls[f].design.shape[1]
        for f in members
    }
    form = {f: _form(calls[f], count, group_counts[f], width) for f in members}
    members = [f for kind in (SWEEP, SQUARES, SUPPRESS) for f in members if form[f] == kind]
    first_square, first_suppressed = (
        sum(form[f] < begin for f in members) for begin in (SQUARES, SUPPRESS)
    )
    groups = [group_counts[f] for f in members]
    if first_square < first_suppressed:
        # All alike, so that they are one batch.
        most = max(groups[first_square:first_suppressed])
        groups[first_square:first_suppressed] = [most] * (first_suppressed - first_square)
    labels, basis = _designs(z, [calls[f] for f in members])
    ordered, order = torch.sort(labels, stable=True)
    preserve = [form[f] != SUPPRESS for f in members]
    shares, means, rest, factors, scales, *_ = overlap_split(
        z, gather_views(z.detach(), 1), order, ordered, basis, groups, preserve, rank() * n
    )
    vectors = (means * factors[:, None]).split(groups)
    inv_count = scales.new_full((), 1 / count)
    swept = [Swept(rest[i], vectors[i], scales[i], inv_count) for i in range(first_square)]
    squares = shares.new_empty(0)
    if first_square < first_suppressed:
        batch = slice(first_square, first_suppressed)
        # ‖S Uᵀ‖² = tr(SᵀS · UᵀU)
        u = torch.stack(rest[batch]) * scales[batch, None, None]
        m = torch.stack(vectors[batch])
        squares = (torch.bmm(m.mT, m) * torch.bmm(u.mT, u)).sum((1, 2)) * inv_count
    return Split(members, swept, squares, shares, _guidance(calls, members, shares))


def _designs(z: Tensor, calls: list[OrthogonalCall]) -> tuple[Tensor, list[Tensor]]:
    """(labels of the rows of all ranks [F, N], the orthonormal designs [N, d] of values).

    Values have the label 0. Whatever the number of factors, there are two collectives at most.
    """
    sizes = [0 if call.classes else call.design.shape[1] for call in calls]
    labels = [
        call.design if call.classes else torch.where(call.design.isnan().any(1), -1, 0)
        for call in calls
    ]
    gathered = gather_views(torch.stack(labels, 1), 1).T.contiguous()
    basis = [z.new_empty(0, dtype=torch.float64)] * len(calls)
    if any(sizes):
        values = torch.cat([call.design for call in calls if not call.classes], 1)
        widths = [size for size in sizes if size]
        parts = iter(torch.split_with_sizes(gather_views(values, 1), widths, 1))
        basis = [
            orthonormal_design(next(parts), label >= 0) if size else nothing
            for size, label, nothing in zip(sizes, gathered, basis, strict=True)
        ]
    return gathered, basis


def _form(call: OrthogonalCall, n: int, groups: int, width: int) -> int:
    if call.role == "suppress":
        return SUPPRESS
    # Values have few columns, and their design as many: M cannot be made longer for a batch.
    # A sweep, its logits again for either gradient, and the gradients are five products of
    # n·groups·width; the other form one of (n + groups)·width², and two more for the gradients.
    sweep = not call.classes or 5 * groups * n < 3 * (n + groups) * width
    return SWEEP if sweep else SQUARES


def _split_rows(
    z: Tensor,
    gathered: Tensor,
    order: Tensor,
    labels: Tensor,
    basis: list[Tensor],
    groups: list[int],
    preserve: list[bool],
    first: int,
) -> tuple[Tensor, Tensor, list[Tensor], Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What every factor explains of the rows, and what it leaves.

    Args:
        z: [N, D], this rank's rows; they get the gradient of what all ranks compute.
        gathered: the rows of all ranks, as in `cuda.group_statistics`, like order, labels, basis
            and groups.
        preserve: which factors are to be swept.
        first: number of the first row of z in `gathered`.

    Returns:
        (shares [F]; M [ΣG, D]; U [N, D] of every factor, or empty; the factors of M [ΣG] and of
        U [F] in the sweep; for the backward pass: sizes, group and mean of `cuda.group_statistics`
        and coefficients of `cuda.overlap_shares`). The gradient at U must be U times a matrix, as
        that of a sweep is.
    """
    means, sizes, group, mean, squares, rest = cuda.group_statistics(
        gathered, order, labels, basis, groups, preserve, first, z.shape[0]
    )
    shares, scales, factors, coefficients, _ = cuda.overlap_shares(
        squares, sizes, groups, preserve, gathered.shape[0]
    )
    return shares, means, rest, factors, scales, sizes, group, mean, coefficients


overlap_split = torch.library.custom_op("fino::overlap_split", _split_rows, mutates_args=())
overlap_split.register_fake(_split_rows)  # its parts have fakes of their own


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    # Else autograd would make zeros as large as U, for the gradients of what is not swept.
    ctx.set_materialize_grads(False)
    z, _, _, _, basis, ctx.groups, ctx.preserve, ctx.first = inputs
    _, means, _, _, _, *of_all = output
    ctx.save_for_backward(z, means, *of_all, *basis)


def _backward(
    ctx: Any, at_shares: Tensor | None, at_means: Tensor | None, at_rest: list[Any], *_: Any
) -> tuple[Any, ...]:
    z, means, sizes, group, mean, coefficients, *basis = ctx.saved_tensors
    mine = slice(ctx.first, ctx.first + z.shape[0])
    nothing = z.new_empty(0)
    gradient = cuda.overlap_gradient(
        # DDP averages over the ranks.
        sizes.new_zeros(len(ctx.groups)) if at_shares is None else at_shares * world_size(),
        z,
        means,
        sizes,
        group[:, mine],
        mean,
        coefficients,
        [q[mine] for q in basis],
        ctx.groups,
        [nothing if gradient is None else gradient for gradient in at_rest],
        # Every rank has swept its own rows.
        torch.zeros_like(means) if at_means is None else sum_over_ranks(at_means),
    )
    return gradient, None, None, None, [None] * len(basis), None, None, None


overlap_split.register_autograd(_backward, setup_context=_context)
