"""Metadata heads: the gradients at the banks that are trained.

The tiles of the banks are shared out among the programs; where they are few, the rows are split
too. A program finishes a tile's part of the rows alone; `heads_combine` adds the parts in order.
"""

import triton
import triton.language as tl

from .heads_sweep import is_label, squared_errors
from .tile import (
    FINISH,
    accumulate,
    coefficient_gain,
    coefficients,
    find,
    inner_products,
    pick,
)


@triton.jit
def bank_gradient(
    x, x_stride, depth, bank, bank_stride, classes, offset, target, values, kind, epsilon,
    lse, factor, tile, first_row, last_row, out, offset_out, work, used, scratch, n,
    SUM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    WIDTH: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """factor · ∂Σ loss/∂bank and ∂offset of some rows, for one tile of a bank that is trained."""
    TYPE: tl.constexpr = x.dtype.element_ty
    local = tl.arange(0, COLUMNS)
    columns = tile.to(tl.int64) * COLUMNS + local
    column_ok = columns < classes
    offset_k = tl.load(offset + columns, mask=column_ok, other=0.0)
    gain = coefficient_gain(kind < 2, TYPE)
    offset_gradient = tl.zeros([COLUMNS], dtype=SUM)
    begun = 0
    for chunk in range(first_row, last_row, CHUNK):
        last = tl.minimum(chunk + CHUNK, last_row)
        for start in range(chunk, last, ROWS):
            step = tl.arange(0, ROWS)
            rows = start + step.to(tl.int64)
            row_ok = rows < last_row
            s = inner_products(
                bank, bank_stride, columns, column_ok, x, x_stride, rows, row_ok, depth,
                TYPE, SUM, COLUMNS, ROWS, DEPTH, PRECISION, WIDEN,
            )  # fmt: skip
            s += offset_k[:, None]
            if kind >= 2:
                _, g, observed = squared_errors(
                    tl.trans(s), values + tl.cast(start, tl.int64) * classes, step, row_ok,
                    tile * COLUMNS + local, column_ok, classes, kind,
                )  # fmt: skip
                g = tl.trans(g)
                takes_part = tl.max(observed.to(tl.int32), axis=1) > 0
            else:
                label = tl.load(target + rows, mask=row_ok, other=-1)
                takes_part = label >= 0
                row_lse = tl.load(lse + rows, mask=row_ok, other=0.0)
                g = tl.exp(s - row_lse[None, :]) - epsilon / classes
                g -= tl.where(tl.trans(is_label(label, tile * COLUMNS, local)), 1.0 - epsilon, 0.0)
                g = tl.where(takes_part[None, :] & column_ok[:, None], g, 0.0)
            offset_gradient += tl.sum(g, axis=1)
            at = work + local[:, None] * CHUNK + (start - chunk + step)[None, :]
            tl.store(at, coefficients(g, gain, TYPE))
            tl.store(used + start - chunk + step, takes_part.to(tl.int32))
        accumulate(
            work, last - chunk, x, x_stride, chunk, used, scratch, depth, begun,
            TYPE, SUM, COLUMNS, CHUNK, DEPTH, WIDTH, PRECISION, WIDEN, True,
        )  # fmt: skip
        begun = 1
    tl.store(offset_out + columns, offset_gradient * factor, mask=column_ok)
    stride = tl.cdiv(depth, WIDTH) * WIDTH
    for width_0 in range(0, depth, FINISH):
        width = width_0 + tl.arange(0, FINISH)
        ok = column_ok[:, None] & (width < depth)[None, :]
        total = tl.load(scratch + local[:, None] * stride + width[None, :], mask=ok, other=0.0)
        at = out + columns[:, None] * depth + width[None, :]
        tl.store(at, total * (factor / gain), mask=ok)
    tl.debug_barrier()


@triton.jit
def heads_banks_kernel(
    x, x_stride, depth, bank, bank_stride, classes, offset, target, values, counts, inv_count,
    kind, smoothing, row_norms, lse, grad, slot, grad_bank, grad_offset, parts, share, first_item,
    items, work, used, scratch, scratch_size, workers, n,
    SUM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    WIDTH: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    worker = tl.program_id(0)
    work += worker.to(tl.int64) * COLUMNS * CHUNK
    used += worker.to(tl.int64) * CHUNK
    scratch += worker.to(tl.int64) * scratch_size
    for turn in range(tl.cdiv(items - worker, workers)):
        item = worker + turn * workers
        f = find(first_item, item)
        at = item - pick(first_item, f)
        part = at % pick(parts, f)
        first_row = part * pick(share, f)
        done = pick(classes, f).to(tl.int64) * part
        bank_gradient(
            pick(x, f), pick(x_stride, f), pick(depth, f),
            pick(bank, f), pick(bank_stride, f), pick(classes, f),
            pick(offset, f), pick(target, f), pick(values, f),
            pick(kind, f), pick(smoothing, f).to(SUM), lse + pick(slot, f).to(tl.int64) * n,
            tl.load(pick(inv_count, f)).to(SUM) * tl.load(grad + pick(slot, f)),
            at // pick(parts, f), first_row, tl.minimum(first_row + pick(share, f), n),
            pick(grad_bank, f) + done * pick(depth, f), pick(grad_offset, f) + done,
            work, used, scratch, n,
            SUM, ROWS, COLUMNS, DEPTH, WIDTH, CHUNK, PRECISION, WIDEN,
        )  # fmt: skip
