"""Metadata heads: the log-sum-exp and the target's logit of all rows in all banks, in one launch.

The bank is split among programs, whose partial sums the next launch joins: few rows fill a GPU too.
"""

import triton
import triton.language as tl

from .tile import LOWEST, find, inner_products, pick


@triton.jit
def activation(s, kind):
    """act(s) of a continuous head, by its number in `fino_fast.ops.KINDS`."""
    # tanh s = 2 sigmoid(2 s) − 1; the exponent is never positive, so nothing overflows.
    t = tl.where(kind == 4, 2.0 * s, s)
    e = tl.exp(-tl.abs(t))
    sigmoid = tl.where(t >= 0, 1.0, e) / (1.0 + e)
    return tl.where(kind == 2, s, tl.where(kind == 3, sigmoid, 2.0 * sigmoid - 1.0))


@triton.jit
def slope(y, kind):
    """act′ as a function of y = act(s)."""
    return tl.where(kind == 2, 1.0, tl.where(kind == 3, y * (1.0 - y), 1.0 - y * y))


@triton.jit
def squared_errors(s, values, rows, row_ok, columns, column_ok, classes, kind):
    """([R, C] squared errors, [R, C] their derivative at s, [R, C] observed entries).

    Args:
        values: [N, classes], from the first row of the tile on.
        rows, columns: within the tile and within the head; together they need no 64 bits.
    """
    exists = row_ok[:, None] & column_ok[None, :]
    target = tl.load(
        values + rows[:, None] * classes + columns[None, :], mask=exists, other=float("nan")
    )
    observed = target == target  # NaN is missing
    y = activation(s, kind)
    error = tl.where(observed, y - target, 0.0)
    return error * error, tl.where(observed, 2.0 * error * slope(y, kind), 0.0), observed


@triton.jit
def is_label(label, first, step):
    """[R, C], whether column `first` + `step` is the row's label, in 32 bits."""
    return (label - first).to(tl.int32)[:, None] == step[None, :]


@triton.jit
def logits(s, norm, offset, is_prototype):
    """Logits from products: s + bias, or s/‖x‖ of a bank that holds ĉ/φ. Rows first.

    Args:
        s: [R, C].
        norm: [R, 1] (or [1, R] where the tile is transposed), 1/‖x‖ or 1.
        offset: [1, C] (or [C, 1]).
    """
    return s * norm + tl.where(is_prototype, 0.0, offset)


@triton.jit
def heads_sweep_kernel(
    x, x_stride, depth, bank, bank_stride, classes, offset, target, values, counts,
    kind, smoothing, row_norms, splits, first_program, first_partial, partial, best_out, planes, n,
    SUM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    f = find(first_program, tl.program_id(0))
    program = tl.program_id(0) - pick(first_program, f)
    split = program % pick(splits, f)
    x, x_stride, depth = pick(x, f), pick(x_stride, f), pick(depth, f)
    bank, bank_stride, classes = pick(bank, f), pick(bank_stride, f), pick(classes, f)
    offset, counts, kind = pick(offset, f), pick(counts, f), pick(kind, f)
    values, epsilon = pick(values, f), pick(smoothing, f).to(SUM)
    is_prototype, is_error = kind == 1, kind >= 2
    TYPE: tl.constexpr = x.dtype.element_ty

    first_row = (program // pick(splits, f)).to(tl.int64) * ROWS
    step = tl.arange(0, COLUMNS)
    rows = first_row + tl.arange(0, ROWS)
    row_ok = rows < n
    label = tl.load(pick(target, f) + rows, mask=row_ok & (kind < 2), other=-1)
    norm = tl.load(pick(row_norms, f) + rows, mask=row_ok & is_prototype, other=1.0)

    tiles = tl.cdiv(classes, COLUMNS)
    share = tl.cdiv(tiles, pick(splits, f))
    first_tile = split * share
    last_tile = tl.minimum(first_tile + share, tiles)

    peak = tl.full([ROWS], LOWEST, dtype=SUM)
    total = tl.zeros([ROWS], dtype=SUM)  # Σ_k exp(s_k − peak)
    best = tl.full([ROWS], -1, dtype=tl.int32)  # class of the peak
    at_target = tl.zeros([ROWS], dtype=SUM)  # s of the target; of a continuous head, its errors
    all_logits = tl.zeros([ROWS], dtype=SUM)  # Σ_k s_k
    for tile in range(first_tile, last_tile):
        columns = tile * COLUMNS + step.to(tl.int64)
        column_ok = columns < classes
        s = inner_products(
            x, x_stride, rows, row_ok, bank, bank_stride, columns, column_ok, depth,
            TYPE, SUM, ROWS, COLUMNS, DEPTH, PRECISION, WIDEN,
        )  # fmt: skip
        offset_k = tl.load(offset + columns, mask=column_ok, other=0.0)
        s = logits(s, norm[:, None], offset_k[None, :], is_prototype)
        if is_error:
            error, _, _ = squared_errors(
                s, values + first_row * classes, tl.arange(0, ROWS), row_ok,
                tile * COLUMNS + step, column_ok, classes, kind,
            )  # fmt: skip
            at_target += tl.sum(error, axis=1)
        else:
            # A class that was never seen is not in the softmax.
            seen = tl.load(counts + columns, mask=column_ok & is_prototype, other=1)
            column_ok = column_ok & (seen > 0)
            at_target += tl.sum(tl.where(is_label(label, tile * COLUMNS, step), s, 0.0), axis=1)
            if epsilon > 0:
                all_logits += tl.sum(tl.where(column_ok[None, :], s, 0.0), axis=1)
            s = tl.where(column_ok[None, :], s, LOWEST)
            tile_peak, tile_best = tl.max(s, axis=1, return_indices=True)
            best = tl.where(tile_peak > peak, tile * COLUMNS + tile_best, best)
            new_peak = tl.maximum(peak, tile_peak)
            p = tl.where(column_ok[None, :], tl.exp(s - new_peak[:, None]), 0.0)
            total = total * tl.exp(peak - new_peak) + tl.sum(p, axis=1)
            peak = new_peak

    out = pick(first_partial, f) + split * n + rows
    lse = tl.where(total > 0, peak + tl.log(tl.where(total > 0, total, 1.0)), LOWEST)
    tl.store(partial + out, lse, mask=row_ok)
    tl.store(partial + planes + out, peak, mask=row_ok)
    tl.store(partial + 2 * planes + out, at_target, mask=row_ok)
    tl.store(partial + 3 * planes + out, all_logits, mask=row_ok)
    tl.store(best_out + out, best, mask=row_ok)
