"""Metadata heads: losses and metrics from the rows' sums, and the gradients at the rows.

One launch for all: the first programs reduce one head each in a fixed order; the others share out
the tiles of rows, in which the heads on the same rows are summed. A program finishes a tile alone,
so every sum has a fixed order.
"""

import triton
import triton.language as tl

from .heads_sweep import is_label, logits, squared_errors
from .tile import (
    CLAMPED,
    FINISH,
    LOWEST,
    accumulate,
    coefficient_gain,
    coefficients,
    inner_products,
    load_tile,
    pick,
)


@triton.jit
def joined(partial, splits, n, rows, row_ok):
    """Log-sum-exp of every row over the splits of a bank. [R]"""
    top = tl.load(partial + rows, mask=row_ok, other=0.0)
    for split in range(1, splits):
        part = tl.load(partial + split * n + rows, mask=row_ok, other=0.0)
        high, low = tl.maximum(top, part), tl.minimum(top, part)
        top = high + tl.log(1.0 + tl.exp(low - high))
    return top


@triton.jit
def reduce_head(
    partial, best_in, planes, first_partial, splits, target, inv_count, kind, epsilon, classes,
    loss_out, metric_out, lse_out, n, SUM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Loss and metric of one head, and its rows' log-sum-exps, over the splits of the bank."""
    loss = tl.zeros([BLOCK], dtype=SUM)
    metric = tl.zeros([BLOCK], dtype=SUM)
    for first in range(0, n, BLOCK):
        rows = first + tl.arange(0, BLOCK).to(tl.int64)
        row_ok = rows < n
        label = tl.load(target + rows, mask=row_ok & (kind < 2), other=-1)
        peak = tl.full([BLOCK], LOWEST, dtype=SUM)
        at_target = tl.zeros([BLOCK], dtype=SUM)
        all_logits = tl.zeros([BLOCK], dtype=SUM)
        best = tl.full([BLOCK], -1, dtype=tl.int32)
        for split in range(splits):
            at = partial + first_partial + split * n + rows
            part_peak = tl.load(at + planes, mask=row_ok, other=LOWEST)
            part_best = tl.load(best_in + first_partial + split * n + rows, mask=row_ok, other=-1)
            best = tl.where(part_peak > peak, part_best, best)
            peak = tl.maximum(peak, part_peak)
            at_target += tl.load(at + 2 * planes, mask=row_ok, other=0.0)
            all_logits += tl.load(at + 3 * planes, mask=row_ok, other=0.0)
        lse = joined(partial + first_partial, splits, n, rows, row_ok)
        tl.store(lse_out + rows, lse, mask=row_ok)
        entropy = lse - (1.0 - epsilon) * at_target - epsilon / classes * all_logits
        row_loss = tl.where(kind >= 2, at_target, tl.where(label >= 0, entropy, 0.0))
        row_metric = tl.where(kind >= 2, at_target, ((label >= 0) & (best == label)).to(SUM))
        loss += tl.where(row_ok, row_loss, 0.0)
        metric += tl.where(row_ok, row_metric, 0.0)
    mean = tl.load(inv_count).to(SUM)
    tl.store(loss_out, tl.sum(loss, axis=0) * mean)
    tl.store(metric_out, tl.sum(metric, axis=0) * mean)


@triton.jit
def rows_gradient(
    x, x_stride, depth, bank, bank_stride, classes, offset, target, values, counts, kind, epsilon,
    row_norms, lse, splits, factor, tile, out, started, work, scratch, n,
    SUM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    WIDTH: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """out (+)= factor · ∂Σ loss/∂x of one head for one tile of rows."""
    TYPE: tl.constexpr = x.dtype.element_ty
    is_prototype, is_error = kind == 1, kind >= 2
    local = tl.arange(0, ROWS)
    rows = tile.to(tl.int64) * ROWS + local
    row_ok = rows < n
    label = tl.load(target + rows, mask=row_ok & (kind < 2), other=-1)
    valid = label >= 0
    norm = tl.load(row_norms + rows, mask=valid & is_prototype, other=1.0)
    row_lse = joined(lse, splits, n, rows, row_ok)
    gain = coefficient_gain(kind < 2, TYPE)
    along = tl.zeros([ROWS], dtype=SUM)  # ⟨x̂, ∂loss/∂x̂⟩
    begun = 0
    for chunk in range(0, classes, CHUNK):
        last = tl.minimum(chunk + CHUNK, classes)
        for start in range(chunk, last, COLUMNS):
            step = tl.arange(0, COLUMNS)
            columns = start + step.to(tl.int64)
            column_ok = columns < classes
            s = inner_products(
                x, x_stride, rows, row_ok, bank, bank_stride, columns, column_ok, depth,
                TYPE, SUM, ROWS, COLUMNS, DEPTH, PRECISION, WIDEN,
            )  # fmt: skip
            offset_k = tl.load(offset + columns, mask=column_ok, other=0.0)
            s = logits(s, norm[:, None], offset_k[None, :], is_prototype)
            if is_error:
                _, g, _ = squared_errors(
                    s, values + tile.to(tl.int64) * ROWS * classes, local, row_ok, start + step,
                    column_ok, classes, kind,
                )  # fmt: skip
            else:
                seen = tl.load(counts + columns, mask=column_ok & is_prototype, other=1)
                present = valid[:, None] & (column_ok & (seen > 0))[None, :]
                g = tl.exp(s - row_lse[:, None]) - epsilon / classes
                g -= tl.where(is_label(label, start, step), 1.0 - epsilon, 0.0)
                g = tl.where(present, g, 0.0)
                along += tl.sum(g * tl.where(present, s, 0.0), axis=1)
            at = work + local[:, None] * CHUNK + (start - chunk + step)[None, :]
            tl.store(at, coefficients(g, gain, TYPE))
        accumulate(
            work, last - chunk, bank, bank_stride, chunk, work, scratch, depth, begun,
            TYPE, SUM, ROWS, CHUNK, DEPTH, WIDTH, PRECISION, WIDEN, False,
        )  # fmt: skip
        begun = 1
    # ∂x̂/∂x takes off what is along x̂, but where ‖x‖ < 1e-12.
    along = tl.where(valid & is_prototype & (norm < CLAMPED), norm * along, 0.0)
    stride = tl.cdiv(depth, WIDTH) * WIDTH
    for width_0 in range(0, depth, FINISH):
        width = width_0 + tl.arange(0, FINISH)
        ok = row_ok[:, None] & (width < depth)[None, :]
        total = tl.load(scratch + local[:, None] * stride + width[None, :], mask=ok, other=0.0)
        row = load_tile(x, x_stride, rows, valid & is_prototype, width_0, depth, FINISH).to(SUM)
        total = (total / gain - row * along[:, None]) * (norm * factor)[:, None]
        at = out + rows[:, None] * depth + width[None, :]
        tl.store(at, total + tl.load(at, mask=ok & (started > 0), other=0.0), mask=ok)
    tl.debug_barrier()


@triton.jit
def heads_rows_kernel(
    x, x_stride, depth, bank, bank_stride, classes, offset, target, values, counts, inv_count,
    kind, smoothing, row_norms, partial, best, first_partial, planes, splits,
    reduced, losses, metrics, lse_out, grad, slot, guidance, group, grad_x, row_tiles, items,
    work, scratch, scratch_size, workers, n,
    UPSTREAM: tl.constexpr, BLOCK: tl.constexpr, SUM: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    if tl.program_id(0) < reduced:
        f = tl.program_id(0)
        reduce_head(
            partial, best, planes, pick(first_partial, f), pick(splits, f), pick(target, f),
            pick(inv_count, f), pick(kind, f), pick(smoothing, f).to(SUM), pick(classes, f),
            losses + f, metrics + f, lse_out + f.to(tl.int64) * n, n, SUM, BLOCK,
        )  # fmt: skip
    else:
        worker = tl.program_id(0) - reduced
        work += worker.to(tl.int64) * ROWS * CHUNK
        scratch += worker.to(tl.int64) * scratch_size
        for turn in range(tl.cdiv(items - worker, workers)):
            item = worker + turn * workers
            owner = item // row_tiles
            started = 0
            for f in range(len(x)):
                if pick(group, f) == owner:
                    factor = tl.load(pick(inv_count, f)).to(SUM)
                    if UPSTREAM:
                        factor *= tl.load(grad + pick(slot, f))
                        factor *= tl.load(pick(guidance, f)).to(SUM)
                    rows_gradient(
                        pick(x, f), pick(x_stride, f), pick(depth, f),
                        pick(bank, f), pick(bank_stride, f), pick(classes, f),
                        pick(offset, f), pick(target, f), pick(values, f), pick(counts, f),
                        pick(kind, f), pick(smoothing, f).to(SUM), pick(row_norms, f),
                        partial + pick(first_partial, f), pick(splits, f), factor,
                        item % row_tiles, pick(grad_x, owner), started, work, scratch, n,
                        SUM, ROWS, COLUMNS, DEPTH, WIDTH, CHUNK, PRECISION, WIDEN,
                    )  # fmt: skip
                    started = 1
