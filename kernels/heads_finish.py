"""Metadata heads: the losses and metrics from the rows' sums, and the gradients of the banks.

One launch for both: neither needs the other. The first F programs each reduce one head in a fixed
order; every other program owns a tile of a bank and a slice of the width and sweeps all rows.
"""

import triton
import triton.language as tl

from .heads_sweep import squared_errors
from .tile import (
    LOWEST,
    coefficient_gain,
    coefficients,
    find,
    inner_products,
    load_tile,
    pick,
    product,
)


@triton.jit
def reduce_head(
    partial, best_in, planes, first_partial, splits, target, inv_count, kind, epsilon, classes,
    loss_out, metric_out, n, SUM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Loss and metric of one head from the rows' sums over the splits of the bank."""
    loss = tl.zeros([BLOCK], dtype=SUM)
    metric = tl.zeros([BLOCK], dtype=SUM)
    for first in range(0, n, BLOCK):
        rows = first + tl.arange(0, BLOCK).to(tl.int64)
        row_ok = rows < n
        label = tl.load(target + rows, mask=row_ok & (kind < 2), other=-1)
        top = tl.full([BLOCK], LOWEST, dtype=SUM)  # largest log-sum-exp of a split
        peak = tl.full([BLOCK], LOWEST, dtype=SUM)
        total = tl.zeros([BLOCK], dtype=SUM)
        at_target = tl.zeros([BLOCK], dtype=SUM)
        all_logits = tl.zeros([BLOCK], dtype=SUM)
        best = tl.full([BLOCK], -1, dtype=tl.int32)
        for split in range(splits):
            at = partial + first_partial + split * n + rows
            part = tl.load(at, mask=row_ok, other=LOWEST)
            new_top = tl.maximum(top, part)
            total = total * tl.exp(top - new_top) + tl.exp(part - new_top)
            top = new_top
            part_peak = tl.load(at + planes, mask=row_ok, other=LOWEST)
            part_best = tl.load(best_in + first_partial + split * n + rows, mask=row_ok, other=-1)
            best = tl.where(part_peak > peak, part_best, best)
            peak = tl.maximum(peak, part_peak)
            at_target += tl.load(at + 2 * planes, mask=row_ok, other=0.0)
            all_logits += tl.load(at + 3 * planes, mask=row_ok, other=0.0)
        lse = top + tl.log(total)
        entropy = lse - (1.0 - epsilon) * at_target - epsilon / classes * all_logits
        row_loss = tl.where(kind >= 2, at_target, tl.where(label >= 0, entropy, 0.0))
        row_metric = tl.where(kind >= 2, at_target, ((label >= 0) & (best == label)).to(SUM))
        loss += tl.where(row_ok, row_loss, 0.0)
        metric += tl.where(row_ok, row_metric, 0.0)
    mean = tl.load(inv_count).to(SUM)
    tl.store(loss_out, tl.sum(loss, axis=0) * mean)
    tl.store(metric_out, tl.sum(metric, axis=0) * mean)


@triton.jit
def heads_finish_kernel(
    x, x_stride, depth, bank, bank_stride, classes, offset, target, values, inv_count,
    kind, smoothing, grad_bank, grad_offset, first_program, first_partial, splits,
    partial, best, losses, metrics, slot, planes, n, heads,
    BLOCK: tl.constexpr, SUM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    if tl.program_id(0) < heads:
        f = tl.program_id(0)
        reduce_head(
            partial, best, planes, pick(first_partial, f), pick(splits, f), pick(target, f),
            pick(inv_count, f), pick(kind, f), pick(smoothing, f).to(SUM), pick(classes, f),
            losses + pick(slot, f), metrics + pick(slot, f), n, SUM, BLOCK,
        )  # fmt: skip
    else:
        f = find(first_program, tl.program_id(0) - heads)
        bank_gradient(
            tl.program_id(0) - heads - pick(first_program, f),
            pick(x, f), pick(x_stride, f), pick(depth, f),
            pick(bank, f), pick(bank_stride, f), pick(classes, f), pick(offset, f),
            pick(target, f), pick(values, f), pick(inv_count, f), pick(kind, f),
            pick(smoothing, f).to(SUM), partial + pick(first_partial, f),
            pick(grad_bank, f), pick(grad_offset, f), n,
            SUM, ROWS, COLUMNS, DEPTH, WIDTH, PRECISION, WIDEN,
        )  # fmt: skip


@triton.jit
def bank_gradient(
    program, x, x_stride, depth, bank, bank_stride, classes, offset, target, values, inv_count,
    kind, epsilon, lse, grad_bank, grad_offset, n,
    SUM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    WIDTH: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """A tile of ∂loss/∂bank and ∂loss/∂offset of a linear or continuous head."""
    TYPE: tl.constexpr = x.dtype.element_ty
    parts = tl.cdiv(depth, WIDTH)
    part = program % parts
    columns = (program // parts).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    column_ok = columns < classes
    offset_k = tl.load(offset + columns, mask=column_ok, other=0.0).to(SUM)
    gain = coefficient_gain(kind < 2, TYPE)
    gradient = tl.zeros([COLUMNS, WIDTH], dtype=SUM)
    offset_gradient = tl.zeros([COLUMNS], dtype=SUM)
    for first in range(0, n, ROWS):
        rows = first + tl.arange(0, ROWS).to(tl.int64)
        row_ok = rows < n
        s = inner_products(
            x, x_stride, rows, row_ok, bank, bank_stride, columns, column_ok, depth,
            TYPE, SUM, ROWS, COLUMNS, DEPTH, PRECISION, WIDEN,
        )  # fmt: skip
        s += offset_k[None, :]
        if kind >= 2:
            _, g, observed = squared_errors(
                s, values, rows, row_ok, columns, column_ok, classes, kind
            )
            takes_part = tl.max(observed.to(tl.int32), axis=1) > 0
        else:
            label = tl.load(target + rows, mask=row_ok, other=-1)
            takes_part = label >= 0
            row_lse = tl.load(lse + rows, mask=row_ok, other=0.0)
            g = tl.exp(s - row_lse[:, None]) - epsilon / classes
            g -= tl.where(columns[None, :] == label[:, None], 1.0 - epsilon, 0.0)
            g = tl.where(takes_part[:, None] & column_ok[None, :], g, 0.0)
        offset_gradient += tl.sum(g, axis=0)
        # A row that takes no part may hold anything, NaN too.
        row = load_tile(x, x_stride, rows, takes_part, part * WIDTH, depth, WIDTH)
        gradient = product(tl.trans(coefficients(g, gain, TYPE)), row, gradient, PRECISION, WIDEN)
    mean = tl.load(inv_count).to(SUM)
    width = part * WIDTH + tl.arange(0, WIDTH)
    tl.store(
        grad_bank + columns[:, None] * depth + width[None, :],
        gradient * (mean / gain),
        mask=column_ok[:, None] & (width < depth)[None, :],
    )
    if part == 0:
        tl.store(grad_offset + columns, offset_gradient * mean, mask=column_ok)
