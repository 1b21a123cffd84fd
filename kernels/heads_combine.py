"""Metadata heads: the gradients in the dtypes of what they belong to, all in one launch.

At the rows, what the forward pass kept is scaled by the upstream gradient, the sign and λ, and
added to what the backward pass swept, so that rows on which many heads stand get one gradient. At
the banks, the parts of the rows are summed in order.
"""

import triton
import triton.language as tl

from .tile import pick


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
            for f in range(len(kept)):
                if (pick(is_kept, f) > 0) & (pick(space, f) == owner):
                    factor = tl.load(grad + f) * tl.load(pick(guidance, f)).to(SUM)
                    total += factor * tl.load(pick(kept, f) + at, mask=ok, other=0.0)
            tl.store(
                pick(grad_rows, owner) + rows[:, None] * out_stride + k[None, :],
                total.to(grad_rows[0].dtype.element_ty),
                mask=ok,
            )
    # Unrolled and not picked from a table: the banks may differ in dtype.
    for i in tl.static_range(len(grad_bank)):
        tile = program - row_work - first_bank[i]
        if (tile >= 0) & (tile < tl.cdiv(classes[i], ROWS)):
            rows = tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)
            row_ok = rows < classes[i]
            for first in range(0, bank_depth_out[i], DEPTH):
                k = first + tl.arange(0, DEPTH)
                ok = row_ok[:, None] & (k < bank_depth_out[i])[None, :]
                total = tl.zeros([ROWS, DEPTH], dtype=SUM)
                for part in range(parts[i]):
                    row = part * classes[i].to(tl.int64) + rows
                    total += tl.load(
                        bank_part[i] + row[:, None] * bank_depth[i] + k[None, :], mask=ok, other=0.0
                    )
                tl.store(
                    grad_bank[i] + rows[:, None] * bank_depth_out[i] + k[None, :],
                    total.to(grad_bank[i].dtype.element_ty),
                    mask=ok,
                )
            offset = tl.zeros([ROWS], dtype=SUM)
            for part in range(parts[i]):
                row = part * classes[i].to(tl.int64) + rows
                offset += tl.load(offset_part[i] + row, mask=row_ok, other=0.0)
            tl.store(grad_offset[i] + rows, offset.to(grad_offset[i].dtype.element_ty), mask=row_ok)
