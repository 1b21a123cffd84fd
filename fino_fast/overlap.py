"""The orthogonal terms on a GPU: all factors in a fixed number of launches.

The statistics, the sums and the gradient are CUDA C++ (`cuda`); the products are the library's.
"""

from typing import Any

import torch
from torch import Tensor

from . import cuda, reference
from .distributed import gather_views
from .reference import orthonormal_design, scale_gradient
from .terms import OrthogonalCall

SUPPRESS, SWEEP, SQUARES = range(3)  # how ‖S Uᵀ‖² is computed, if at all


def overlaps(calls: list[OrthogonalCall]) -> list[Tensor]:
    """R of every call over the rows of all ranks, 0-d each; see `terms.StepResult`."""
    results: dict[int, Tensor] = {}
    for z in {id(call.z): call.z for call in calls}.values():
        members = [f for f, call in enumerate(calls) if call.z is z]
        of_z = [calls[f] for f in members]
        rows, designs = gather_views(z, 1), [gather_views(call.design, 1) for call in of_z]
        if cuda.serves_rows(rows):
            shares = _by_kernels(rows, designs, of_z)
        else:
            shares = torch.stack(
                [
                    reference.orthogonal(rows, design, call.role)
                    for design, call in zip(designs, of_z, strict=True)
                ]
            )
        # λ at R is λ at z, for a number in place of a matrix.
        guidance = [shares.new_ones(()) if c.guidance is None else c.guidance for c in of_z]
        shares = scale_gradient(shares, torch.stack(guidance).to(shares.dtype))
        results |= zip(members, shares.unbind(0), strict=True)
    return [results[f] for f in range(len(calls))]


def _by_kernels(z: Tensor, designs: list[Tensor], calls: list[OrthogonalCall]) -> Tensor:
    n, width = z.shape
    labels, basis, groups, form = [], [], [], []
    for design, call in zip(designs, calls, strict=True):
        if design.dim() == 1:
            labels.append(design)
            basis.append(z.new_empty(0, dtype=torch.float64))
            groups.append(min(call.classes, n))
        else:
            missing = design.isnan().any(1)
            labels.append(torch.where(missing, -1, 0))
            basis.append(orthonormal_design(design, ~missing))
            groups.append(design.shape[1])
        form.append(SUPPRESS if call.role == "suppress" else _form(n, groups[-1], width))
    ordered, order = torch.sort(torch.stack(labels), stable=True)
    shares: Tensor = overlap_terms(z, order, ordered, basis, groups, form)[0]
    return shares


def _form(n: int, groups: int, width: int) -> int:
    # A sweep and its gradient are three products of n·groups·width; the other form two of
    # (n + groups)·width².
    return SWEEP if 3 * groups * n < 2 * (n + groups) * width else SQUARES


@torch.library.custom_op("fino::overlap_terms", mutates_args=())
def overlap_terms(
    z: Tensor,
    order: Tensor,
    labels: Tensor,
    basis: list[Tensor],
    groups: list[int],
    form: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:
    """The orthogonal terms R of all factors.

    Args:
        z, order, labels, basis, groups: of `cuda.group_statistics`.
        form: SUPPRESS, or how the numerator of `preserve` is computed: as SWEEP of the rows of U
            over M, Σ_ig sizes_g ⟨u_i, m_g⟩², or from SQUARES, tr(SᵀS · UᵀU).

    Returns:
        (R [F]; for the backward pass: M, sizes, group and mean of `cuda.group_statistics`,
        coefficients of `cuda.overlap_shares`, and of every factor U and its products: U Mᵀ
        [N, G], or SᵀS and UᵀU [2, D, D], or none.)
    """
    means, sizes, group, mean, squares, rest = cuda.group_statistics(
        z, order, labels, basis, groups, [how != SUPPRESS for how in form]
    )
    products, a, b, weights = [], [], [], []
    for f, how in enumerate(form):
        if how == SUPPRESS:
            products.append(squares.new_empty(0))
            continue
        m, u = means.split(groups)[f], rest[f]
        size = sizes.split(groups)[f]
        if how == SWEEP:
            product = u @ m.T
            a.append(product)
            b.append(product)
            weights.append(size)
        else:
            product = torch.stack([m.T @ (size[:, None] * m), u.T @ u])
            a.append(product[0])
            b.append(product[1])
            weights.append(size.new_empty(0))
        products.append(product)
    sums = iter(cuda.product_sums(a, b, weights) if a else [])
    numerators = [mean.new_empty(0) if how == SUPPRESS else next(sums) for how in form]
    shares, coefficients, _ = cuda.overlap_shares(squares, groups, numerators)
    return shares, means, sizes, group, mean, coefficients, rest, products


@overlap_terms.register_fake
def _(
    z: Tensor,
    order: Tensor,
    labels: Tensor,
    basis: list[Tensor],
    groups: list[int],
    form: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:
    means, sizes, group, mean, squares, rest = cuda.group_statistics(
        z, order, labels, basis, groups, [how != SUPPRESS for how in form]
    )
    shares, coefficients, _ = cuda.overlap_shares(squares, groups, [squares] * len(groups))
    n, width = z.shape
    shapes = [
        {SUPPRESS: (0,), SWEEP: (n, g), SQUARES: (2, width, width)}[how]
        for how, g in zip(form, groups, strict=True)
    ]
    products = [squares.new_empty(shape) for shape in shapes]
    return shares, means, sizes, group, mean, coefficients, rest, products


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    # Else autograd would make zeros as large as U and its products, for the gradients at them.
    ctx.set_materialize_grads(False)
    z, _, _, basis, ctx.groups, ctx.form = inputs
    _, *of_all, rest, products = output
    ctx.save_for_backward(z, *of_all, *basis, *rest, *products)


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad is None:
        return None, None, None, [None] * len(ctx.groups), None, None
    z, means, sizes, group, mean, coefficients, *lists = ctx.saved_tensors
    size = len(ctx.groups)
    basis, rest, products = (lists[i : i + size] for i in range(0, 3 * size, size))
    rest_side, signal_side = [], []
    for f, how in enumerate(ctx.form):
        m, u, product = means.split(ctx.groups)[f], rest[f], products[f]
        if how == SUPPRESS:
            rest_side.append(u)
            signal_side.append(u)
        elif how == SWEEP:
            rest_side.append(product @ (sizes.split(ctx.groups)[f][:, None] * m))
            signal_side.append(product.T @ u)
        else:
            rest_side.append(u @ product[0])
            signal_side.append(m @ product[1])
    gradient = cuda.overlap_gradient(
        grad, z, means, group, mean, coefficients, basis, ctx.groups, rest, rest_side, signal_side
    )
    return gradient, None, None, [None] * size, None, None


overlap_terms.register_autograd(_backward, setup_context=_context)
