"""Contrastive term, backward: the gradient of the whole batch's loss at the local rows."""

import triton
import triton.language as tl
from torch import Tensor

from .contrastive_forward import batch_arguments, pair_masks, unit_stride
from .inverse_norms import inverse_norms
from .launch import launch, sweep_constants
from .row_sum import row_sum
from .tile import coefficient_gain, coefficients, inner_products, load_tile, product, through_norm
from .tiles import pair_tiles, tiles_for


@triton.jit
def contrastive_backward_kernel(
    row, row_stride, column, column_stride, norms, logit_scale, grad, lse_rows, lse_columns,
    grad_rows, grad_scale, n, m, depth, local, images, first, positives,
    TWO_TOWER: tl.constexpr, SUM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """∂L/∂s_ij + ∂L/∂s_ji = (p_ij + p_ji − 2·[j positive of i]/(V − 1)) / M, p the softmax by row.

    s is symmetric: the second term is what the other row's loss, of any rank, sends to this row.
    """
    TYPE: tl.constexpr = row.dtype.element_ty
    parts = tl.cdiv(depth, WIDTH)
    part = tl.program_id(0) % parts
    rows = (tl.program_id(0) // parts).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_ok = rows < n
    scale = tl.load(logit_scale).to(SUM)
    own = (rows // local) * images + first + rows % local
    norm = tl.load(norms + own, mask=row_ok, other=0.0)
    row_lse = tl.load(lse_rows + rows, mask=row_ok, other=0.0)
    share = tl.full([], 1.0, SUM) / positives
    gain = coefficient_gain(True, TYPE)
    gradient = tl.zeros([ROWS, WIDTH], dtype=SUM)
    along = tl.zeros([ROWS], dtype=SUM)  # Σ_j g_ij s_ij
    scale_part = tl.zeros([ROWS], dtype=SUM)  # Σ_j ∂(M·loss_i)/∂s_ij · s_ij
    for start in range(0, m, COLUMNS):
        columns = start + tl.arange(0, COLUMNS).to(tl.int64)
        column_ok = columns < m
        s = inner_products(
            row, row_stride, rows, row_ok, column, column_stride, columns, column_ok, depth,
            TYPE, SUM, ROWS, COLUMNS, DEPTH, PRECISION, WIDEN,
        )  # fmt: skip
        column_norm = tl.load(norms + columns, mask=column_ok, other=0.0)
        s = s * (norm * scale)[:, None] * column_norm[None, :]
        column_lse = tl.load(lse_columns + columns, mask=column_ok, other=0.0)
        compared, positive = pair_masks(
            rows, columns, local, images, first, row_ok, column_ok, TWO_TOWER
        )
        own_part = tl.where(compared, tl.exp(s - row_lse[:, None]), 0.0)
        own_part -= tl.where(positive, share, 0.0)
        other_part = tl.where(compared, tl.exp(s - column_lse[None, :]), 0.0)
        other_part -= tl.where(positive, share, 0.0)
        s = tl.where(compared, s, 0.0)
        g = own_part + other_part
        along += tl.sum(g * s, axis=1)
        scale_part += tl.sum(own_part * s, axis=1)
        unit = load_tile(
            column, column_stride, columns, column_ok, part * WIDTH, depth, WIDTH
        ).to(SUM) * column_norm[:, None]  # fmt: skip
        gradient = product(coefficients(g, gain, TYPE), unit.to(TYPE), gradient, PRECISION, WIDEN)
    factor = tl.load(grad).to(SUM) / m
    x = load_tile(row, row_stride, rows, row_ok, part * WIDTH, depth, WIDTH).to(SUM)
    gradient = through_norm(gradient * (scale / gain), x, norm, along) * factor
    width = part * WIDTH + tl.arange(0, WIDTH)
    tl.store(
        grad_rows + rows[:, None] * depth + width[None, :],
        gradient.to(TYPE),
        mask=row_ok[:, None] & (width < depth)[None, :],
    )
    if part == 0:
        tl.store(grad_scale + rows, scale_part * (factor * m / scale), mask=row_ok)


def contrastive_backward(
    grad: Tensor,
    rows: Tensor,
    columns: Tensor,
    logit_scale: Tensor,
    lse_rows: Tensor,
    lse_columns: Tensor,
    views: int,
    first: int,
    two_tower: bool,
) -> tuple[Tensor, Tensor]:
    """The operator `fino::contrastive_backward` on a GPU; arguments as in `fino_fast.ops`.

    Three launches.

    Returns:
        ([N, P] gradient at the rows of the loss of all ranks, 0-d local rows' part of the gradient
        at `logit_scale`).
    """
    rows, columns = unit_stride(rows), unit_stride(columns)
    tiles = pair_tiles(tiles_for(rows), rows.element_size())
    (norms,) = inverse_norms([columns])
    grad_rows = rows.new_empty(rows.shape)
    scale_parts = norms.new_empty(rows.shape[0])
    launch(
        contrastive_backward_kernel,
        triton.cdiv(rows.shape[0], tiles.rows) * triton.cdiv(rows.shape[1], tiles.width),
        rows,
        tiles,
        sweep_constants(rows, tiles) | {"TWO_TOWER": two_tower},
        **batch_arguments(rows, columns, logit_scale, norms, views, first),
        grad=grad,
        lse_rows=lse_rows,
        lse_columns=lse_columns,
        grad_rows=grad_rows,
        grad_scale=scale_parts,
    )
    return grad_rows, row_sum(scale_parts, columns.shape[0]).to(logit_scale.dtype)
