"""Metadata heads: the gradients in the dtypes of what they belong to, all in one launch.

At the rows, what the forward pass kept is scaled by the upstream gradient, the sign and λ, and
added to what the backward pass swept, so that rows on which many heads stand get one gradient. At
the banks, the parts of the rows are summed in order.
"""

import triton
import triton.language as tl

from .tile import find, pick


@triton.jit
def heads_combine_kernel(
    grad, guidance, kept, is_kept, space, swept, is_swept, depth, depth_out, grad_rows, row_tiles,
    row_work, bank_part, offset_part, parts, classes, bank_depth, bank_depth_out, first_bank,
    grad_bank, grad_offset, n, SUM: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if program < row_work:
        owner = program // row_tiles
        rows = (program % row_tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        row_ok = rows < n
        stride, out_stride = pick(depth, owner), pick(depth_out, owner)
        for first in range(0, out_stride, DEPTH):
            k = first + tl.arange(0, DEPTH)
            ok = row_ok[:, None] & (k < out_stride)[None, :]
            at = rows[:, None] * stride + k[None, :]
            total = tl.load(
                pick(swept, owner) + at, mask=ok & (pick(is_swept, owner) > 0), other=0.0
            )
            for f in tl.static_range(len(kept)):
                if (is_kept[f] > 0) & (space[f] == owner):
                    factor = tl.load(grad + f) * tl.load(guidance[f]).to(SUM)
                    total += factor * tl.load(kept[f] + at, mask=ok, other=0.0)
            tl.store(
                pick(grad_rows, owner) + rows[:, None] * out_stride + k[None, :],
                total.to(grad_rows[0].dtype.element_ty),
                mask=ok,
            )
    elif len(grad_bank) > 0:
        f = find(first_bank, program - row_work)
        size, count = pick(classes, f), pick(parts, f)
        bank_stride, bank_width = pick(bank_depth, f), pick(bank_depth_out, f)
        members = (program - row_work - pick(first_bank, f)).to(tl.int64) * ROWS + tl.arange(
            0, ROWS
        )
        member_ok = members < size
        for begin in range(0, bank_width, DEPTH):
            entry = begin + tl.arange(0, DEPTH)
            exists = member_ok[:, None] & (entry < bank_width)[None, :]
            sums = tl.zeros([ROWS, DEPTH], dtype=SUM)
            for part in range(count):
                where = (part * size.to(tl.int64) + members)[:, None] * bank_stride + entry[None, :]
                sums += tl.load(pick(bank_part, f) + where, mask=exists, other=0.0)
            # Not picked from a table: the banks may differ in dtype.
            for i in tl.static_range(len(grad_bank)):
                if f == i:
                    tl.store(
                        grad_bank[i] + members[:, None] * bank_width + entry[None, :],
                        sums.to(grad_bank[i].dtype.element_ty),
                        mask=exists,
                    )
        offset = tl.zeros([ROWS], dtype=SUM)
        for part in range(count):
            where = part * size.to(tl.int64) + members
            offset += tl.load(pick(offset_part, f) + where, mask=member_ok, other=0.0)
        for i in tl.static_range(len(grad_offset)):
            if f == i:
                tl.store(
                    grad_offset[i] + members,
                    offset.to(grad_offset[i].dtype.element_ty),
                    mask=member_ok,
                )
