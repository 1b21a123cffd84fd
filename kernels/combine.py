"""The gradients in the dtypes of what they belong to, all in one launch.

At the rows, what the forward pass kept is scaled by the upstream gradient, and added to what the
backward pass swept, so that rows on which many banks stand get one gradient. At the banks, the
parts of the rows are summed in order. One program sums the gradient of the temperature.
"""

import triton
import triton.language as tl

from .table import (
    BANK_OUT,
    BANK_TYPE,
    CLASSES,
    DEPTH_OF,
    FIELDS,
    FIRST_TILE,
    GRAD_BANK,
    GRAD_OFFSET,
    IS_SWEPT,
    KEPT,
    KEPT_FIELDS,
    KEPT_GUIDANCE,
    KEPT_SPACE,
    KEPT_UPSTREAM,
    OFFSET_OUT,
    OFFSET_TYPE,
    OUT,
    OUT_WIDTH,
    PARTS,
    SPACE_FIELDS,
    STRIDE,
    SWEPT,
    WIDTH_OF,
    find,
    integer,
    pointer,
    store_as,
    width,
)


@triton.jit
def combine_rows(
    space, owner, kept, kept_entries, tile, n, TYPE: tl.constexpr, SUM: tl.constexpr,
    ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """The gradient at one tile of the rows of a space."""
    rows = tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_ok = rows < n
    stride, out_width = width(space, STRIDE), integer(space, OUT_WIDTH)
    is_swept = integer(space, IS_SWEPT) > 0
    for first in range(0, out_width, DEPTH):
        k = first + tl.arange(0, DEPTH)
        ok = row_ok[:, None] & (k < out_width)[None, :]
        at = rows[:, None] * stride + k[None, :]
        total = tl.load(pointer(space, SWEPT, SUM) + at, mask=ok & is_swept, other=0.0)
        for i in range(kept_entries):
            entry = kept + i * KEPT_FIELDS
            if integer(entry, KEPT_SPACE) == owner:
                factor = tl.load(pointer(entry, KEPT_UPSTREAM, SUM))
                factor *= tl.load(pointer(entry, KEPT_GUIDANCE, SUM))
                total += factor * tl.load(pointer(entry, KEPT, SUM) + at, mask=ok, other=0.0)
        tl.store(
            pointer(space, OUT, TYPE) + rows[:, None] * out_width + k[None, :],
            total.to(TYPE),
            mask=ok,
        )


@triton.jit
def combine_bank(bank, tile, SUM: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr):
    """The gradients at one tile of a bank and its offsets."""
    size, parts = integer(bank, CLASSES).to(tl.int64), integer(bank, PARTS)
    stride, out_width = width(bank, DEPTH_OF), integer(bank, WIDTH_OF)
    members = tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    member_ok = members < size
    for first in range(0, out_width, DEPTH):
        k = first + tl.arange(0, DEPTH)
        ok = member_ok[:, None] & (k < out_width)[None, :]
        total = tl.zeros([ROWS, DEPTH], dtype=SUM)
        for part in range(parts):
            at = (part * size + members)[:, None] * stride + k[None, :]
            total += tl.load(pointer(bank, GRAD_BANK, SUM) + at, mask=ok, other=0.0)
        at = members[:, None] * out_width + k[None, :]
        store_as(tl.load(bank + BANK_OUT), integer(bank, BANK_TYPE), at, total, ok)
    offset = tl.zeros([ROWS], dtype=SUM)
    for part in range(parts):
        at = part * size + members
        offset += tl.load(pointer(bank, GRAD_OFFSET, SUM) + at, mask=member_ok, other=0.0)
    store_as(tl.load(bank + OFFSET_OUT), integer(bank, OFFSET_TYPE), members, offset, member_ok)


@triton.jit
def temperature_gradient(
    along, scale, inv_count, upstream, out, n, SUM: tl.constexpr, BLOCK: tl.constexpr
):
    """∂L/∂(1/τ) = ½ Σ_i ⟨x̂_i, ∂L/∂x̂_i⟩ · τ: every pair's logit is in the sum from both sides."""
    total = tl.zeros([BLOCK], dtype=SUM)
    for first in range(0, n, BLOCK):
        rows = first + tl.arange(0, BLOCK)
        total += tl.load(along + rows, mask=rows < n, other=0.0)
    factor = tl.load(upstream) * tl.load(inv_count) / (2.0 * tl.load(scale))
    tl.store(out, tl.sum(total, axis=0) * factor)


@triton.jit(
    do_not_specialize=[
        "entries", "spaces", "kept", "kept_entries", "row_tiles", "row_work", "bank_work", "scale",
        "inv_count", "upstream", "n",
    ]
)  # fmt: skip
def combine_kernel(
    table, entries, spaces, kept, kept_entries, row_tiles, row_work, bank_work,
    along, scale, inv_count, upstream, grad_scale, n, TYPE: tl.constexpr, SUM: tl.constexpr,
    ROWS: tl.constexpr, DEPTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if program < row_work:
        owner = program // row_tiles
        combine_rows(
            spaces + owner * SPACE_FIELDS, owner, kept, kept_entries, program % row_tiles, n,
            TYPE, SUM, ROWS, DEPTH,
        )  # fmt: skip
    elif program < row_work + bank_work:
        program -= row_work
        bank = table + find(table, entries, FIELDS, FIRST_TILE, program) * FIELDS
        combine_bank(bank, program - integer(bank, FIRST_TILE), SUM, ROWS, DEPTH)
    else:
        temperature_gradient(along, scale, inv_count, upstream, grad_scale, n, SUM, BLOCK)
