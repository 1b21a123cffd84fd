"""The log-sum-exps, targets' logits and errors of all rows in all banks, in one launch.

A program reads its tile of rows once and walks the banks on them. Where rows are few, it walks a
share of the banks' tiles; `losses` joins the sums of the shares.
"""

import triton
import triton.language as tl

from .epilogues import (
    PAIRS,
    is_cosine,
    is_error,
    logits,
    pair_masks,
    squared_errors,
)
from .table import (
    BANK,
    BANK_STRIDE,
    BEST,
    CLASSES,
    COUNTS,
    DEPTH_OF,
    FIELDS,
    FIRST,
    FIRST_PROGRAM,
    IMAGES,
    KIND,
    LOCAL,
    NORMS,
    OFFSET,
    PARTIAL,
    SHARE_TILES,
    SHARES,
    SMOOTHING,
    SPACE,
    TARGET,
    TARGET_STRIDE,
    TILES_BEFORE,
    TWO_TOWER,
    X_STRIDE,
    X,
    entries_of,
    find,
    integer,
    number,
    pointer,
    width,
)
from .tile import LOWEST, hold, is_held_in


@triton.jit
def sweep_bank(
    held, bank, share, begin, first_row, x, x_stride, depth, planes, n,
    TYPE: tl.constexpr, SUM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """The sums of one tile of rows over what lies in tiles begin … begin + share of a bank."""
    kind, classes = integer(bank, KIND), integer(bank, CLASSES)
    vectors, vectors_stride = pointer(bank, BANK, TYPE), width(bank, BANK_STRIDE)
    offset, epsilon = pointer(bank, OFFSET, SUM), number(bank, SMOOTHING, SUM)
    step = tl.arange(0, COLUMNS)
    rows = first_row + tl.arange(0, ROWS)
    row_ok = rows < n
    label = tl.load(pointer(bank, TARGET, tl.int64) + rows, mask=row_ok & (kind < 2), other=-1)
    label = label.to(tl.int32)
    norm = tl.load(pointer(bank, NORMS, SUM) + rows, mask=row_ok & is_cosine(kind), other=1.0)
    # Tiles of the bank follow those of the banks before it in the same space.
    before = integer(bank, TILES_BEFORE)
    first_tile = tl.maximum(begin - before, 0)
    last_tile = tl.minimum(begin + share - before, tl.cdiv(classes, COLUMNS))

    peak = tl.full([ROWS], LOWEST, dtype=SUM)
    total = tl.zeros([ROWS], dtype=SUM)  # Σ_k exp(s_k − peak)
    best = tl.full([ROWS], -1, dtype=tl.int32)  # class of the peak
    at_target = tl.zeros([ROWS], dtype=SUM)  # s of the target (mean over positives), or errors
    all_logits = tl.zeros([ROWS], dtype=SUM)  # Σ_k s_k
    for tile in tl.range(first_tile, last_tile, disable_licm=True):
        columns = tile * COLUMNS + step.to(tl.int64)
        column_ok = columns < classes
        s = logits(
            held, x, x_stride, rows, row_ok, norm, vectors, vectors_stride, columns, column_ok,
            offset, kind, depth, SUM, ROWS, COLUMNS, DEPTH, PRECISION, WIDEN,
        )  # fmt: skip
        if is_error(kind):
            stride = integer(bank, TARGET_STRIDE)
            error, _, _ = squared_errors(
                s, pointer(bank, TARGET, SUM) + first_row * stride,
                tl.arange(0, ROWS)[:, None] * stride, (tile * COLUMNS + step)[None, :],
                row_ok[:, None] & column_ok[None, :], kind,
            )  # fmt: skip
            at_target += tl.sum(error, axis=1)
        else:
            # What is not in the softmax becomes LOWEST. A NaN stays.
            if kind == PAIRS:
                local = integer(bank, LOCAL)
                compared, positive = pair_masks(
                    rows, columns, column_ok, local, integer(bank, IMAGES),
                    integer(bank, FIRST), integer(bank, TWO_TOWER),
                )  # fmt: skip
                mean = tl.full([], 1.0, SUM) / (n // local - 1)
                at_target += tl.sum(tl.where(positive, s, 0.0), axis=1) * mean
                s = tl.where(compared, s, LOWEST)
                tile_peak = tl.max(s, axis=1)
            else:
                # A class that was never seen is not in the softmax.
                counted = column_ok & is_cosine(kind)
                seen = tl.load(pointer(bank, COUNTS, tl.int64) + columns, mask=counted, other=1)
                column_ok = column_ok & (seen > 0)
                is_target = (label - tile * COLUMNS)[:, None] == step[None, :]
                at_target += tl.sum(tl.where(is_target, s, 0.0), axis=1)
                if epsilon > 0:
                    all_logits += tl.sum(tl.where(column_ok[None, :], s, 0.0), axis=1)
                s = tl.where(column_ok[None, :], s, LOWEST)
                tile_peak, tile_best = tl.max(s, axis=1, return_indices=True)
                best = tl.where(tile_peak > peak, tile * COLUMNS + tile_best, best)
            new_peak = tl.maximum(peak, tile_peak)
            p = tl.where(s <= LOWEST, 0.0, tl.exp(s - new_peak[:, None]))
            total = total * tl.exp(peak - new_peak) + tl.sum(p, axis=1)
            peak = new_peak

    part = begin // share - before // share
    out = pointer(bank, PARTIAL, SUM) + part.to(tl.int64) * n + rows
    row_ok = row_ok & (first_tile < last_tile)
    lse = tl.where(total == 0, LOWEST, peak + tl.log(tl.where(total == 0, 1.0, total)))
    tl.store(out, lse, mask=row_ok)
    tl.store(out + planes, peak, mask=row_ok)
    tl.store(out + planes + planes, at_target, mask=row_ok)
    tl.store(out + planes + planes + planes, all_logits, mask=row_ok)
    best_out = pointer(bank, BEST, tl.int32) + part.to(tl.int64) * n + rows
    tl.store(best_out, best, mask=row_ok)


@triton.jit(do_not_specialize=["entries", "planes", "n"])
def sweep_kernel(
    table, entries, planes, n, TYPE: tl.constexpr, SUM: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    HELD: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    lead = table + find(table, entries, FIELDS, FIRST_PROGRAM, program) * FIELDS
    program -= integer(lead, FIRST_PROGRAM)
    shares, share = integer(lead, SHARES), integer(lead, SHARE_TILES)
    first_row, begin = (program // shares).to(tl.int64) * ROWS, program % shares * share
    rows = first_row + tl.arange(0, ROWS)
    x, x_stride, depth = pointer(lead, X, TYPE), width(lead, X_STRIDE), width(lead, DEPTH_OF)
    first, last = entries_of(table, entries, FIELDS, SPACE, integer(lead, SPACE))
    for i in tl.static_range(len(HELD)):
        if is_held_in(HELD[i], depth, DEPTH):
            held = hold(x, x_stride, rows, rows < n, depth, DEPTH, HELD[i])
            for f in tl.range(first, last, disable_licm=True):
                sweep_bank(
                    held, table + f * FIELDS, share, begin, first_row, x, x_stride, depth, planes,
                    n, TYPE, SUM, ROWS, COLUMNS, DEPTH, PRECISION, WIDEN,
                )  # fmt: skip
