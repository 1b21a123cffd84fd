"""Metadata heads: all rows against all banks in one launch, with the gradient at the rows.

With GRADIENT a program owns a tile of rows and a slice of the width: it sweeps the whole bank with
a running maximum and accumulates Σ_k softmax_k · c_k beside the log-sum-exp, as flash attention
does (Dao 2022). Without it the bank is split among programs, whose partial sums `heads_finish`
joins.
"""

import triton
import triton.language as tl

from .tile import (
    LOWEST,
    coefficient_gain,
    coefficients,
    find,
    inner_products,
    load_tile,
    pick,
    product,
    through_norm,
)


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
    """([R, C] squared errors, [R, C] their derivative at s, [R, C] observed entries)."""
    exists = row_ok[:, None] & column_ok[None, :]
    target = tl.load(
        values + rows[:, None] * classes + columns[None, :], mask=exists, other=float("nan")
    )
    observed = target == target  # NaN is missing
    y = activation(s, kind)
    error = tl.where(observed, y - target, 0.0)
    return error * error, tl.where(observed, 2.0 * error * slope(y, kind), 0.0), observed


@triton.jit
def prototype_scales(offset_k, norm_k, is_prototype):
    """(factor, summand) of the logits by column: ‖c‖⁻¹/φ and 0, or 1 and the bias."""
    factor = tl.where(is_prototype, norm_k / tl.where(is_prototype, offset_k, 1.0), 1.0)
    return factor, tl.where(is_prototype, 0.0, offset_k)


@triton.jit
def heads_sweep_kernel(
    x, x_stride, depth, bank, bank_stride, classes, offset, target, values, counts, inv_count,
    kind, smoothing, row_norms, bank_norms, gradient, parts, first_program, first_partial,
    partial, best_out, planes, n,
    GRADIENT: tl.constexpr, SUM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    f = find(first_program, tl.program_id(0))
    program = tl.program_id(0) - pick(first_program, f)
    part = program % pick(parts, f)
    x, x_stride, depth = pick(x, f), pick(x_stride, f), pick(depth, f)
    bank, bank_stride, classes = pick(bank, f), pick(bank_stride, f), pick(classes, f)
    offset, counts, kind = pick(offset, f), pick(counts, f), pick(kind, f)
    values, epsilon = pick(values, f), pick(smoothing, f).to(SUM)
    bank_norms = pick(bank_norms, f)
    is_prototype, is_error = kind == 1, kind >= 2
    TYPE: tl.constexpr = x.dtype.element_ty

    rows = (program // pick(parts, f)).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_ok = rows < n
    label = tl.load(pick(target, f) + rows, mask=row_ok & (kind < 2), other=-1)
    norm = tl.load(pick(row_norms, f) + rows, mask=row_ok & is_prototype, other=1.0)

    tiles = tl.cdiv(classes, COLUMNS)
    first_tile, last_tile = 0, tiles
    if not GRADIENT:
        share = tl.cdiv(tiles, pick(parts, f))
        first_tile = part * share
        last_tile = tl.minimum(first_tile + share, tiles)

    peak = tl.full([ROWS], LOWEST, dtype=SUM)
    total = tl.zeros([ROWS], dtype=SUM)  # Σ_k exp(s_k − peak)
    best = tl.full([ROWS], -1, dtype=tl.int32)  # class of the peak
    at_target = tl.zeros([ROWS], dtype=SUM)  # s of the target; of a continuous head, its errors
    all_logits = tl.zeros([ROWS], dtype=SUM)  # Σ_k s_k
    expected = tl.zeros([ROWS], dtype=SUM)  # Σ_k exp(s_k − peak) s_k
    gain = coefficient_gain(kind < 2, TYPE)
    pulled = tl.zeros([ROWS, WIDTH], dtype=SUM)  # gain · Σ_k exp(s_k − peak) c_k
    bank_sum = tl.zeros([WIDTH], dtype=SUM)  # Σ_k c_k
    for tile in range(first_tile, last_tile):
        columns = tile * COLUMNS + tl.arange(0, COLUMNS).to(tl.int64)
        column_ok = columns < classes
        s = inner_products(
            x, x_stride, rows, row_ok, bank, bank_stride, columns, column_ok, depth,
            TYPE, SUM, ROWS, COLUMNS, DEPTH, PRECISION, WIDEN,
        )  # fmt: skip
        offset_k = tl.load(offset + columns, mask=column_ok, other=1.0).to(SUM)
        norm_k = tl.load(bank_norms + columns, mask=column_ok & is_prototype, other=1.0)
        factor, summand = prototype_scales(offset_k, norm_k, is_prototype)
        s = s * norm[:, None] * factor[None, :] + summand[None, :]
        decay = tl.full([ROWS], 1.0, dtype=SUM)
        if is_error:
            error, p, _ = squared_errors(s, values, rows, row_ok, columns, column_ok, classes, kind)
            at_target += tl.sum(error, axis=1)
        else:
            # A class that was never seen is not in the softmax.
            seen = tl.load(counts + columns, mask=column_ok & is_prototype, other=1)
            column_ok = column_ok & (seen > 0)
            at_target += tl.sum(tl.where(columns[None, :] == label[:, None], s, 0.0), axis=1)
            if epsilon > 0:
                all_logits += tl.sum(tl.where(column_ok[None, :], s, 0.0), axis=1)
            s = tl.where(column_ok[None, :], s, LOWEST)
            tile_peak, tile_best = tl.max(s, axis=1, return_indices=True)
            best = tl.where(tile_peak > peak, tile * COLUMNS + tile_best, best)
            new_peak = tl.maximum(peak, tile_peak)
            p = tl.where(column_ok[None, :], tl.exp(s - new_peak[:, None]), 0.0)
            decay = tl.exp(peak - new_peak)
            total = total * decay + tl.sum(p, axis=1)
            if is_prototype:
                expected = expected * decay + tl.sum(p * s, axis=1)
            peak = new_peak
        if GRADIENT:
            c = load_tile(bank, bank_stride, columns, column_ok, part * WIDTH, depth, WIDTH)
            c = c.to(SUM) * factor[:, None]
            if epsilon > 0:
                bank_sum += tl.sum(c, axis=0)
            pulled = product(
                coefficients(p, gain, TYPE), c.to(TYPE), pulled * decay[:, None], PRECISION, WIDEN
            )

    if GRADIENT:
        valid = label >= 0
        width = part * WIDTH + tl.arange(0, WIDTH)
        mean = 1.0 / tl.where(total > 0, total, 1.0)
        pulled = pulled / gain
        if not is_error:
            # softmax − (1 − ε)·onehot − ε/K
            own = label.to(tl.int64)
            norm_t = tl.load(bank_norms + own, mask=valid & is_prototype, other=1.0)
            offset_t = tl.load(offset + own, mask=valid, other=1.0).to(SUM)
            factor_t, _ = prototype_scales(offset_t, norm_t, is_prototype)
            c_t = load_tile(bank, bank_stride, own, valid, part * WIDTH, depth, WIDTH).to(SUM)
            pulled = pulled * mean[:, None] - (1.0 - epsilon) * c_t * factor_t[:, None]
            if epsilon > 0:
                pulled -= epsilon / classes * bank_sum[None, :]
            if is_prototype:
                row = load_tile(x, x_stride, rows, row_ok, part * WIDTH, depth, WIDTH).to(SUM)
                pulled = through_norm(pulled, row, norm, expected * mean - at_target)
            pulled = tl.where(valid[:, None], pulled, 0.0)
        tl.store(
            pick(gradient, f) + rows[:, None] * depth + width[None, :],
            pulled * tl.load(pick(inv_count, f)).to(SUM),
            mask=row_ok[:, None] & (width < depth)[None, :],
        )
    # With GRADIENT the parts are slices of the width, of which the first reports.
    if (part == 0) | (not GRADIENT):
        slot = 0 if GRADIENT else part
        out = pick(first_partial, f) + slot * n + rows
        lse = tl.where(total > 0, peak + tl.log(tl.where(total > 0, total, 1.0)), LOWEST)
        tl.store(partial + out, lse, mask=row_ok)
        tl.store(partial + planes + out, peak, mask=row_ok)
        tl.store(partial + 2 * planes + out, at_target, mask=row_ok)
        tl.store(partial + 3 * planes + out, all_logits, mask=row_ok)
        tl.store(best_out + out, best, mask=row_ok)
