"""The losses and metrics of all banks from their rows' sums, and the gradients at the rows.

One launch for all: the first programs reduce one bank each in a fixed order; the others share out
the tiles of rows. A program reads a tile once and walks the banks that send it a gradient. It
finishes the tile alone, so every sum has a fixed order.
"""

import triton
import triton.language as tl

from .epilogues import (
    PAIRS,
    entropy_slope,
    is_cosine,
    is_error,
    logits,
    pair_masks,
    squared_errors,
)
from .table import (
    ALONG,
    BEST,
    CLASSES,
    COLUMN_LSE,
    COUNTS,
    FIELDS,
    FIRST,
    GRAD_X,
    GUIDANCE,
    IMAGES,
    INV_COUNT,
    IS_BEGUN,
    KIND,
    LOCAL,
    LSE,
    NORMS,
    NUMBER,
    OFFSET,
    SMOOTHING,
    SPLITS,
    TARGET,
    TARGET_STRIDE,
    TWO_TOWER,
    UPSTREAM,
    WALK,
    WEIGHT,
    entries_of,
    integer,
    number,
    operands_of,
    pointer,
)
from .tile import (
    CLAMPED,
    LOWEST,
    accumulate,
    coefficient_gain,
    coefficients,
    finish,
    hold,
    is_held_in,
)


@triton.jit
def joined(lse, splits, n, rows, row_ok):
    """Log-sum-exp of every row over the splits of a bank. [R]"""
    top = tl.load(lse + rows, mask=row_ok, other=0.0)
    for split in range(1, splits):
        part = tl.load(lse + split * n + rows, mask=row_ok, other=0.0)
        high, low = tl.maximum(top, part), tl.minimum(top, part)
        top = high + tl.log(1.0 + tl.exp(low - high))
    return top


@triton.jit
def reduce_bank(
    bank, planes, loss_out, metric_out, weighted_out, lse_out, n,
    SUM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Loss and metric of one bank, and its rows' log-sum-exps, over the splits of the bank."""
    kind, classes, splits = integer(bank, KIND), integer(bank, CLASSES), integer(bank, SPLITS)
    partial, predicted = pointer(bank, LSE, SUM), pointer(bank, BEST, tl.int32)
    target, epsilon = pointer(bank, TARGET, tl.int64), number(bank, SMOOTHING, SUM)
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
            at = tl.cast(split, tl.int64) * n + rows
            part_peak = tl.load(partial + planes + at, mask=row_ok, other=LOWEST)
            part_best = tl.load(predicted + at, mask=row_ok, other=-1)
            best = tl.where(part_peak > peak, part_best, best)
            peak = tl.maximum(peak, part_peak)
            at_target += tl.load(partial + planes + planes + at, mask=row_ok, other=0.0)
            all_logits += tl.load(partial + planes + planes + planes + at, mask=row_ok, other=0.0)
        lse = joined(partial, splits, n, rows, row_ok)
        tl.store(lse_out + rows, lse, mask=row_ok)
        entropy = lse - (1.0 - epsilon) * at_target - epsilon / classes * all_logits
        takes_part = (label >= 0) | (kind == PAIRS)
        row_loss = tl.where(is_error(kind), at_target, tl.where(takes_part, entropy, 0.0))
        hit = ((label >= 0) & (best == label)).to(SUM)
        loss += tl.where(row_ok, row_loss, 0.0)
        metric += tl.where(row_ok, tl.where(is_error(kind), at_target, hit), 0.0)
    mean = tl.load(pointer(bank, INV_COUNT, SUM))
    total = tl.sum(loss, axis=0) * mean
    tl.store(loss_out, total)
    tl.store(metric_out, tl.sum(metric, axis=0) * mean)
    tl.store(weighted_out, total * number(bank, WEIGHT, SUM))


@triton.jit
def rows_gradient(
    held, bank, tile, work, scratch, n, TYPE: tl.constexpr,
    SUM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    STEP: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """Adds one bank's part of ∂L/∂x for one tile of rows, or writes it, the first.

    Of a contrastive term ∂Σ loss/∂s_ij + ∂Σ loss/∂s_ji is taken: s is symmetric, and the second is
    what the other row's loss, of any rank, sends to this row.
    """
    kind, classes = integer(bank, KIND), integer(bank, CLASSES)
    x, x_stride, vectors, vectors_stride, depth = operands_of(bank, TYPE)
    # Here, and in this form, it costs the fewest registers.
    stride = tl.where(integer(bank, TARGET_STRIDE) > 0, classes, 0)
    local_rows = tl.arange(0, ROWS)
    rows = tile.to(tl.int64) * ROWS + local_rows
    row_ok = rows < n
    # Loaded again where it is used: registers are short here.
    label = tl.load(pointer(bank, TARGET, tl.int64) + rows, mask=row_ok & (kind < 2), other=-1)
    label = label.to(tl.int32)
    projected = row_ok & is_cosine(kind) & ((label >= 0) | (kind == PAIRS))
    norm = tl.load(pointer(bank, NORMS, SUM) + rows, mask=projected, other=1.0)
    row_lse = joined(pointer(bank, LSE, SUM), integer(bank, SPLITS), n, rows, row_ok)
    gain = coefficient_gain(~is_error(kind), TYPE)
    along = tl.zeros([ROWS], dtype=SUM)  # ⟨x̂, ∂loss/∂x̂⟩
    begun = 0
    # Buffers for the stages of a pipeline do not fit beside rows that are held.
    STAGES: tl.constexpr = 1 if len(held) > 0 else None
    for chunk in tl.range(0, classes, CHUNK, disable_licm=True):
        last = tl.minimum(chunk + CHUNK, classes)
        for start in tl.range(chunk, last, COLUMNS, num_stages=STAGES, disable_licm=True):
            step = tl.arange(0, COLUMNS)
            columns = start + step.to(tl.int64)
            column_ok = columns < classes
            s = logits(
                held, x, x_stride, rows, row_ok, norm, vectors, vectors_stride, columns, column_ok,
                pointer(bank, OFFSET, SUM), kind, depth,
                SUM, ROWS, COLUMNS, DEPTH, PRECISION, WIDEN,
            )  # fmt: skip
            if kind < 2:
                counted = column_ok & is_cosine(kind)
                seen = tl.load(pointer(bank, COUNTS, tl.int64) + columns, mask=counted, other=1)
                target = pointer(bank, TARGET, tl.int64)
                label = tl.load(target + rows, mask=row_ok, other=-1).to(tl.int32)
                present = (label >= 0)[:, None] & (column_ok & (seen > 0))[None, :]
                g = entropy_slope(
                    s, row_lse[:, None], (label - start)[:, None] == step[None, :], present,
                    number(bank, SMOOTHING, SUM), classes,
                )  # fmt: skip
                s = tl.where(present, s, 0.0)
                along += tl.sum(g * s, axis=1)
            else:
                if kind == PAIRS:
                    local = integer(bank, LOCAL)
                    compared, positive = pair_masks(
                        rows, columns, column_ok, local, integer(bank, IMAGES),
                        integer(bank, FIRST), integer(bank, TWO_TOWER),
                    )  # fmt: skip
                    mean = tl.full([], 2.0, SUM) / (n // local - 1)
                    other = pointer(bank, COLUMN_LSE, SUM)
                    column_lse = tl.load(other + columns, mask=column_ok, other=0.0)
                    s = tl.where(compared, s, 0.0)
                    g = tl.exp(s - row_lse[:, None]) + tl.exp(s - column_lse[None, :])
                    g = tl.where(compared, g, 0.0) - tl.where(positive, mean, 0.0)
                    along += tl.sum(g * s, axis=1)
                else:
                    _, g, _ = squared_errors(
                        s, pointer(bank, TARGET, SUM) + tile.to(tl.int64) * ROWS * stride,
                        local_rows[:, None] * stride, (start + step)[None, :],
                        row_ok[:, None] & column_ok[None, :], kind,
                    )  # fmt: skip
            at = work + local_rows[:, None] * CHUNK + (start - chunk + step)[None, :]
            tl.store(at, coefficients(g, gain, TYPE))
        accumulate(
            work, last - chunk, vectors, vectors_stride, chunk, work, scratch, depth, begun,
            ROWS, CHUNK, STEP, WIDTH, PRECISION, WIDEN, False,
        )  # fmt: skip
        begun = 1
    if kind == PAIRS:
        tl.store(pointer(bank, ALONG, SUM) + rows, along, mask=row_ok)
    # ∂x̂/∂x takes off what is along x̂, but where ‖x‖ < 1e-12.
    projected = projected & (norm < CLAMPED)
    # Here, and not before the loops: a register.
    factor = number(bank, WEIGHT, SUM) * tl.load(pointer(bank, INV_COUNT, SUM))
    factor *= tl.load(pointer(bank, UPSTREAM, SUM)) * tl.load(pointer(bank, GUIDANCE, SUM))
    finish(
        scratch, norm * (factor / gain), x, x_stride, projected, norm * norm * along * factor,
        rows, row_ok, pointer(bank, GRAD_X, SUM), depth, integer(bank, IS_BEGUN), SUM, ROWS, WIDTH,
        True,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=["entries", "planes", "reduced", "row_tiles", "items", "workers", "n"]
)
def rows_kernel(
    table, entries, planes, reduced, losses, metrics, weighted, lse_out, row_tiles, items, work,
    scratch, scratch_size, workers, n, TYPE: tl.constexpr, BLOCK: tl.constexpr,
    SUM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    STEP: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
    WIDEN: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    if tl.program_id(0) < reduced:
        bank = table + tl.program_id(0) * FIELDS
        f = integer(bank, NUMBER)
        reduce_bank(
            bank, planes, losses + f, metrics + f, weighted + f, lse_out + f.to(tl.int64) * n, n,
            SUM, BLOCK,
        )  # fmt: skip
    else:
        worker = tl.program_id(0) - reduced
        for item in tl.range(worker, items, workers, disable_licm=True):
            tile = item % row_tiles
            first, last = entries_of(table, entries, FIELDS, WALK, item // row_tiles)
            x, x_stride, _, _, depth = operands_of(table + first * FIELDS, TYPE)
            rows = tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)
            for i in tl.static_range(len(HELD)):
                if is_held_in(HELD[i], depth, DEPTH):
                    held = hold(x, x_stride, rows, rows < n, depth, DEPTH, HELD[i])
                    for f in tl.range(first, last, disable_licm=True):
                        # Pointers are made where they are used: registers are short.
                        rows_gradient(
                            held, table + f * FIELDS, tile,
                            work + worker.to(tl.int64) * ROWS * CHUNK,
                            scratch + worker.to(tl.int64) * scratch_size, n,
                            TYPE, SUM, ROWS, COLUMNS, DEPTH, STEP, WIDTH, CHUNK, PRECISION, WIDEN,
                        )  # fmt: skip
