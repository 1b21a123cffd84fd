"""The gradients at the rows.

The programs share out the tiles of rows. A program reads a tile once and walks the banks that send
it a gradient. It finishes the tile alone, so every sum has a fixed order.
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
    OFFSET,
    SMOOTHING,
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
    accumulate,
    coefficient_gain,
    coefficients,
    finish,
    hold,
    is_held_in,
)


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
    gain = coefficient_gain(~is_error(kind), TYPE)
    along = tl.zeros([ROWS], dtype=SUM)  # ⟨x̂, ∂loss/∂x̂⟩
    begun = 0
    # Buffers for the stages of a pipeline do not fit beside rows that are held.
    STAGES: tl.constexpr = 1 if len(held) > 0 else None
    for chunk in tl.range(0, classes, CHUNK, disable_licm=True):
        last = tl.minimum(chunk + CHUNK, classes)
        # Here, and not before the loop: registers.
        row_lse = tl.load(pointer(bank, LSE, SUM) + rows, mask=row_ok, other=0.0)
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


@triton.jit(do_not_specialize=["entries", "row_tiles", "items", "workers", "n"])
def rows_kernel(
    table, entries, row_tiles, items, work, scratch, scratch_size, workers, n,
    TYPE: tl.constexpr, SUM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr, STEP: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    worker = tl.program_id(0)
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
