"""Contrastive term, backward: the gradient of the whole batch's loss at the local rows."""

import triton
import triton.language as tl
from torch import Tensor

from .contrastive_forward import batch_arguments, pair_masks
from .launch import launch, sweep_constants
from .operands import Operand, Request, operands
from .row_sum import row_sum
from .tile import (
    CLAMPED,
    FINISH,
    accumulate,
    coefficient_gain,
    coefficients,
    inner_products,
    load_tile,
)
from .tiles import WORKERS, tiles_for


@triton.jit
def rows_backward(
    row, row_stride, column, column_stride, norms, logit_scale, unit, unit_stride, grad, lse_rows,
    lse_columns, grad_rows, grad_scale, tile, work, scratch, n, m, depth, width, local, images,
    first, positives, TWO_TOWER: tl.constexpr, SUM: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """∂L/∂s_ij + ∂L/∂s_ji = (p_ij + p_ji − 2·[j positive of i]/(V − 1)) / M, p the softmax by row.

    s is symmetric: the second term is what the other row's loss, of any rank, sends to this row.
    """
    TYPE: tl.constexpr = row.dtype.element_ty
    here = tl.arange(0, ROWS)
    rows = tile.to(tl.int64) * ROWS + here
    row_ok = rows < n
    scale = tl.load(logit_scale).to(SUM)
    own = (rows // local) * images + first + rows % local
    norm = tl.load(norms + own, mask=row_ok, other=0.0)
    row_lse = tl.load(lse_rows + rows, mask=row_ok, other=0.0)
    share = tl.full([], 1.0, SUM) / positives
    gain = coefficient_gain(True, TYPE)
    along = tl.zeros([ROWS], dtype=SUM)  # Σ_j g_ij s_ij
    scale_part = tl.zeros([ROWS], dtype=SUM)  # Σ_j ∂(M·loss_i)/∂s_ij · s_ij
    started = 0
    for chunk in range(0, m, CHUNK):
        last = tl.minimum(chunk + CHUNK, m)
        for start in range(chunk, last, COLUMNS):
            step = tl.arange(0, COLUMNS)
            columns = start + step.to(tl.int64)
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
            s = tl.where(compared, s, 0.0)
            g = tl.where(compared, tl.exp(s - row_lse[:, None]), 0.0)
            g -= tl.where(positive, share, 0.0)
            scale_part += tl.sum(g * s, axis=1)
            g += tl.where(compared, tl.exp(s - column_lse[None, :]), 0.0)
            g -= tl.where(positive, share, 0.0)
            along += tl.sum(g * s, axis=1)
            at = work + here[:, None] * CHUNK + (start - chunk + step)[None, :]
            tl.store(at, coefficients(g, gain, TYPE))
        accumulate(
            work, last - chunk, unit, unit_stride, chunk, work, scratch, depth, started,
            TYPE, SUM, ROWS, CHUNK, DEPTH, WIDTH, PRECISION, WIDEN, False,
        )  # fmt: skip
        started = 1
    factor = tl.load(grad).to(SUM) / m
    # ∂x̂/∂x takes off what is along x̂, but where ‖x‖ < 1e-12.
    along = tl.where(norm < CLAMPED, along, 0.0)
    stride = tl.cdiv(depth, WIDTH) * WIDTH
    for width_0 in range(0, depth, FINISH):
        total = load_tile(scratch, stride, here, row_ok, width_0, depth, FINISH) * (scale / gain)
        x = load_tile(row, row_stride, rows, row_ok, width_0, depth, FINISH).to(SUM)
        total = (total - x * (norm * along)[:, None]) * (norm * factor)[:, None]
        k = width_0 + tl.arange(0, FINISH)
        tl.store(
            grad_rows + rows[:, None] * width + k[None, :],
            total.to(TYPE),
            mask=row_ok[:, None] & (k < width)[None, :],
        )
    tl.store(grad_scale + rows, scale_part * (factor * m / scale), mask=row_ok)


@triton.jit
def contrastive_backward_kernel(
    row, row_stride, column, column_stride, norms, logit_scale, unit, unit_stride, grad, lse_rows,
    lse_columns, grad_rows, grad_scale, work, scratch, tiles, workers, n, m, depth, width, local,
    images, first, positives, TWO_TOWER: tl.constexpr, SUM: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    worker = tl.program_id(0)
    work += worker.to(tl.int64) * ROWS * CHUNK
    scratch += worker.to(tl.int64) * ROWS * (tl.cdiv(depth, WIDTH) * WIDTH)
    for turn in range(tl.cdiv(tiles - worker, workers)):
        rows_backward(
            row, row_stride, column, column_stride, norms, logit_scale, unit, unit_stride, grad,
            lse_rows, lse_columns, grad_rows, grad_scale, worker + turn * workers, work, scratch,
            n, m, depth, width, local, images, first, positives,
            TWO_TOWER, SUM, ROWS, COLUMNS, DEPTH, WIDTH, CHUNK, PRECISION, WIDEN,
        )  # fmt: skip


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
    tiles = tiles_for(rows)
    # Products of the rows as they are, then of the coefficients with the unit columns.
    unit, every, mine = operands(
        [Request(columns, unit=True), Request(columns), Request(rows)], rows.dtype
    )
    every = Operand(every.matrix, unit.inverse_norms)
    grad_rows = rows.new_empty(rows.shape)
    scale_parts = unit.inverse_norms.new_empty(rows.shape[0])
    row_tiles = triton.cdiv(rows.shape[0], tiles.rows)
    workers = min(row_tiles, WORKERS)
    launch(
        contrastive_backward_kernel,
        workers,
        rows,
        tiles.compiler,
        sweep_constants(rows, tiles, gradient=True) | {"TWO_TOWER": two_tower},
        **batch_arguments(mine, every, logit_scale, views, first),
        unit=unit.matrix,
        unit_stride=unit.matrix.stride(0),
        grad=grad,
        lse_rows=lse_rows,
        lse_columns=lse_columns,
        grad_rows=grad_rows,
        grad_scale=scale_parts,
        work=mine.matrix.new_empty(workers, tiles.rows, tiles.chunk),
        scratch=scale_parts.new_empty(
            workers, tiles.rows, triton.cdiv(mine.matrix.shape[1], tiles.width) * tiles.width
        ),
        tiles=row_tiles,
        workers=workers,
        width=rows.shape[1],
    )
    return grad_rows, row_sum(scale_parts, columns.shape[0]).to(logit_scale.dtype)
