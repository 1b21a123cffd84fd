"""Inverse norms of the rows of several matrices in one launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .tile import load_tile
from .tiles import Tiles

EPS = 1e-12  # x̂ = x / max(‖x‖, EPS)
ROWS, DEPTH = 16, 128


@triton.jit
def inverse_norms_kernel(
    matrix, stride, rows, depth, first_program, first_row, out,
    SUM: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    # Unrolled and not picked from a table: the matrices may differ in dtype.
    for i in tl.static_range(len(matrix)):
        tile = program - first_program[i]
        if (tile >= 0) & (tile < tl.cdiv(rows[i], ROWS)):
            row = tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)
            row_ok = row < rows[i]
            squares = tl.zeros([ROWS], dtype=SUM)
            for first in range(0, depth[i], DEPTH):
                x = load_tile(matrix[i], stride[i], row, row_ok, first, depth[i], DEPTH).to(SUM)
                squares += tl.sum(x * x, axis=1)
            norm = tl.maximum(tl.sqrt(squares), tl.full([ROWS], EPS, SUM))
            tl.store(out + first_row[i] + row, 1.0 / norm, mask=row_ok)


def inverse_norms(matrices: list[Tensor]) -> list[Tensor]:
    """1 / max(‖x‖, 1e-12) of every row x of every matrix.

    Args:
        matrices: [N_i, D_i] each, of any floating-point dtype, unit stride along the rows.

    Returns:
        [N_i] each, fp32 (fp64 where the first matrix is fp64); slices of one tensor.
    """
    sizes = [matrix.shape[0] for matrix in matrices]
    wide = matrices[0].dtype == torch.float64
    out = matrices[0].new_empty(sum(sizes), dtype=torch.float64 if wide else torch.float32)
    programs = [triton.cdiv(size, ROWS) for size in sizes]
    launch(
        inverse_norms_kernel,
        sum(programs),
        out,
        Tiles(ROWS, 0, DEPTH, 0, warps=4, stages=2),
        {"SUM": tl.float64 if wide else tl.float32, "ROWS": ROWS, "DEPTH": DEPTH, "EPS": EPS},
        matrix=tuple(matrices),
        stride=tuple(matrix.stride(0) for matrix in matrices),
        rows=tuple(sizes),
        depth=tuple(matrix.shape[1] for matrix in matrices),
        first_program=starts(programs),
        first_row=starts(sizes),
        out=out,
    )
    return list(out.split(sizes))


def starts(sizes: list[int]) -> tuple[int, ...]:
    """Where each of consecutive pieces begins."""
    return tuple(sum(sizes[:i]) for i in range(len(sizes)))
