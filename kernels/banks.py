"""The gradients at the banks that are trained.

The tiles of the banks are shared out among the programs; where they are few, the rows are split
too. A program reads a tile once, and finishes its part of the rows alone; `combine` adds the parts
in order.
"""

import triton
import triton.language as tl

from .epilogues import entropy_slope, is_error, squared_errors
from .table import (
    CLASSES,
    FIELDS,
    FIRST_ITEM,
    GRAD_BANK,
    GRAD_OFFSET,
    INV_COUNT,
    KIND,
    LSE,
    OFFSET,
    PARTS,
    SHARE,
    SMOOTHING,
    TARGET,
    TARGET_STRIDE,
    UPSTREAM,
    WEIGHT,
    find,
    integer,
    number,
    operands_of,
    pointer,
)
from .tile import (
    accumulate,
    coefficient_gain,
    coefficients,
    finish,
    hold,
    inner_products,
    is_held_in,
)


@triton.jit
def bank_gradient(
    held, bank, tile, part, work, used, scratch, n, TYPE: tl.constexpr,
    SUM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    STEP: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """∂loss/∂bank and ∂loss/∂offset of one part of the rows, for one tile of a bank."""
    kind, classes = integer(bank, KIND), integer(bank, CLASSES)
    x, x_stride, vectors, vectors_stride, depth = operands_of(bank, TYPE)
    first_row = part * integer(bank, SHARE)
    last_row = tl.minimum(first_row + integer(bank, SHARE), n)
    local = tl.arange(0, COLUMNS)
    columns = tile.to(tl.int64) * COLUMNS + local
    column_ok = columns < classes
    gain = coefficient_gain(~is_error(kind), TYPE)
    offset_gradient = tl.zeros([COLUMNS], dtype=SUM)
    begun = 0
    # Buffers for the stages of a pipeline do not fit beside vectors that are held.
    STAGES: tl.constexpr = 1 if len(held) > 0 else None
    for chunk in tl.range(first_row, last_row, CHUNK, disable_licm=True):
        last = tl.minimum(chunk + CHUNK, last_row)
        for start in tl.range(chunk, last, ROWS, num_stages=STAGES, disable_licm=True):
            step = tl.arange(0, ROWS)
            rows = start + step.to(tl.int64)
            row_ok = rows < last_row
            s = inner_products(
                held, vectors, vectors_stride, columns, column_ok, x, x_stride, rows, row_ok, depth,
                SUM, COLUMNS, ROWS, DEPTH, PRECISION, WIDEN,
            )  # fmt: skip
            bias = tl.load(pointer(bank, OFFSET, SUM) + columns, mask=column_ok, other=0.0)
            s += bias[:, None]
            if is_error(kind):
                stride = integer(bank, TARGET_STRIDE)
                _, g, observed = squared_errors(
                    s, pointer(bank, TARGET, SUM) + tl.cast(start, tl.int64) * stride,
                    (tile * COLUMNS + local)[:, None], (step * stride)[None, :],
                    column_ok[:, None] & row_ok[None, :], kind,
                )  # fmt: skip
                takes_part = tl.max(observed.to(tl.int32), axis=0) > 0
            else:
                label = tl.load(pointer(bank, TARGET, tl.int64) + rows, mask=row_ok, other=-1)
                label = label.to(tl.int32)
                takes_part = label >= 0
                row_lse = tl.load(pointer(bank, LSE, SUM) + rows, mask=row_ok, other=0.0)
                g = entropy_slope(
                    s, row_lse[None, :], local[:, None] == (label - tile * COLUMNS)[None, :],
                    takes_part[None, :] & column_ok[:, None], number(bank, SMOOTHING, SUM), classes,
                )  # fmt: skip
            offset_gradient += tl.sum(g, axis=1)
            at = work + local[:, None] * CHUNK + (start - chunk + step)[None, :]
            tl.store(at, coefficients(g, gain, TYPE))
            tl.store(used + start - chunk + step, takes_part.to(tl.int32))
        accumulate(
            work, last - chunk, x, x_stride, chunk, used, scratch, depth, begun,
            COLUMNS, CHUNK, STEP, WIDTH, PRECISION, WIDEN, True,
        )  # fmt: skip
        begun = 1
    factor = number(bank, WEIGHT, SUM) * tl.load(pointer(bank, INV_COUNT, SUM))
    factor *= tl.load(pointer(bank, UPSTREAM, SUM))
    done = part.to(tl.int64) * classes
    out = pointer(bank, GRAD_OFFSET, SUM) + done + columns
    tl.store(out, offset_gradient * factor, mask=column_ok)
    finish(
        scratch, tl.full([COLUMNS], 1.0, SUM) * (factor / gain), vectors, vectors_stride, column_ok,
        offset_gradient, columns, column_ok, pointer(bank, GRAD_BANK, SUM) + done * depth, depth, 0,
        SUM, COLUMNS, WIDTH, False,
    )  # fmt: skip


@triton.jit(do_not_specialize=["entries", "items", "workers", "n"])
def banks_kernel(
    table, entries, items, work, used, scratch, scratch_size, workers, n, TYPE: tl.constexpr,
    SUM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    STEP: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
    WIDEN: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    worker = tl.program_id(0)
    work += worker.to(tl.int64) * COLUMNS * CHUNK
    used += worker.to(tl.int64) * CHUNK
    scratch += worker.to(tl.int64) * scratch_size
    for item in tl.range(worker, items, workers, disable_licm=True):
        bank = table + find(table, entries, FIELDS, FIRST_ITEM, item) * FIELDS
        at = item - integer(bank, FIRST_ITEM)
        parts = integer(bank, PARTS)
        _, _, vectors, stride, depth = operands_of(bank, TYPE)
        columns = (at // parts).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
        for i in tl.static_range(len(HELD)):
            if is_held_in(HELD[i], depth, DEPTH):
                exists = columns < integer(bank, CLASSES)
                bank_gradient(
                    hold(vectors, stride, columns, exists, depth, DEPTH, HELD[i]),
                    bank, at // parts, at % parts, work, used, scratch, n,
                    TYPE, SUM, ROWS, COLUMNS, DEPTH, STEP, WIDTH, CHUNK, PRECISION, WIDEN,
                )  # fmt: skip
