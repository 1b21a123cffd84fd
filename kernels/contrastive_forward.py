"""Contrastive term, forward: the log-sum-exp and the loss of every row in one sweep."""

import triton
import triton.language as tl
from torch import Tensor

from .launch import launch, sweep_constants
from .operands import Operand, Request, operands
from .row_sum import row_sum
from .tile import LOWEST, inner_products
from .tiles import tiles_for


@triton.jit
def pair_masks(rows, columns, local, images, first, row_ok, column_ok, TWO_TOWER: tl.constexpr):
    """([R, C] pairs that are in the softmax, [R, C] positive pairs) of view-major batches."""
    row_view, column_view = rows // local, columns // images
    same_view = row_view[:, None] == column_view[None, :]
    same_image = (rows % local + first)[:, None] == (columns % images)[None, :]
    exists = row_ok[:, None] & column_ok[None, :]
    compared = exists & ~same_view if TWO_TOWER else exists & ~(same_view & same_image)
    return compared, exists & same_image & ~same_view


@triton.jit
def contrastive_forward_kernel(
    row, row_stride, column, column_stride, norms, logit_scale, lse_out, loss_out,
    n, m, depth, local, images, first, positives,
    TWO_TOWER: tl.constexpr, SUM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    TYPE: tl.constexpr = row.dtype.element_ty
    scale = tl.load(logit_scale).to(SUM)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_ok = rows < n
    # The rows are among the columns: their norms are there.
    own = (rows // local) * images + first + rows % local
    row_scale = tl.load(norms + own, mask=row_ok, other=0.0) * scale
    peak = tl.full([ROWS], LOWEST, dtype=SUM)
    total = tl.zeros([ROWS], dtype=SUM)
    positive_sum = tl.zeros([ROWS], dtype=SUM)
    for start in range(0, m, COLUMNS):
        columns = start + tl.arange(0, COLUMNS).to(tl.int64)
        column_ok = columns < m
        s = inner_products(
            row, row_stride, rows, row_ok, column, column_stride, columns, column_ok, depth,
            TYPE, SUM, ROWS, COLUMNS, DEPTH, PRECISION, WIDEN,
        )  # fmt: skip
        column_norm = tl.load(norms + columns, mask=column_ok, other=0.0)
        s = s * row_scale[:, None] * column_norm[None, :]
        compared, positive = pair_masks(
            rows, columns, local, images, first, row_ok, column_ok, TWO_TOWER
        )
        positive_sum += tl.sum(tl.where(positive, s, 0.0), axis=1)
        s = tl.where(compared, s, LOWEST)
        new_peak = tl.maximum(peak, tl.max(s, axis=1))
        terms = tl.where(compared, tl.exp(s - new_peak[:, None]), 0.0)
        total = total * tl.exp(peak - new_peak) + tl.sum(terms, axis=1)
        peak = new_peak
    lse = peak + tl.log(tl.where(row_ok, total, 1.0))
    tl.store(lse_out + rows, lse, mask=row_ok)
    tl.store(loss_out + rows, lse - positive_sum / positives, mask=row_ok)


def contrastive_forward(
    rows: Tensor, columns: Tensor, logit_scale: Tensor, views: int, first: int, two_tower: bool
) -> tuple[Tensor, Tensor]:
    """The operator `fino::contrastive_forward` on a GPU; arguments as in `fino_fast.ops`.

    Three launches.

    Returns:
        (0-d Σ_i loss_i / M, [N] log-sum-exp of every row).
    """
    tiles = tiles_for(rows)
    every, mine = operands([Request(columns, norms=True), Request(rows)], rows.dtype)
    lse, loss = (every.inverse_norms.new_empty(rows.shape[0]) for _ in range(2))
    launch(
        contrastive_forward_kernel,
        triton.cdiv(rows.shape[0], tiles.sweep_rows),
        rows,
        tiles.compiler,
        sweep_constants(rows, tiles) | {"TWO_TOWER": two_tower},
        **batch_arguments(mine, every, logit_scale, views, first),
        lse_out=lse,
        loss_out=loss,
    )
    return row_sum(loss, columns.shape[0]), lse


def batch_arguments(
    rows: Operand, columns: Operand, logit_scale: Tensor, views: int, first: int
) -> dict[str, Tensor | int]:
    """What both contrastive sweeps are told of the batch."""
    n, m = rows.matrix.shape[0], columns.matrix.shape[0]
    return {
        "row": rows.matrix,
        "row_stride": rows.matrix.stride(0),
        "column": columns.matrix,
        "column_stride": columns.matrix.stride(0),
        "norms": columns.inverse_norms,
        "logit_scale": logit_scale,
        "n": n,
        "m": m,
        "depth": rows.matrix.shape[1],
        "local": n // views,
        "images": m // views,
        "first": first,
        "positives": views - 1,
    }
