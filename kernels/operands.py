"""Matrices made ready for the sweeps, all in one launch: norms, one dtype, aligned rows.

The sweeps load 16 bytes at a time into the tensor cores' buffers. A matrix of another dtype, or one
whose rows do not begin at multiples of 16 entries, is copied once, with zeros up to a width that is
such a multiple: the copy is as large as the matrix, and no sweep has a slow case.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch, sum_type
from .tile import load_tile
from .tiles import Compiler

EPS = 1e-12  # x̂ = x / max(‖x‖, EPS)
ROWS, DEPTH = 16, 128
ALIGNED = 16  # entries; Triton takes wide loads where strides are multiples of 16


@triton.jit
def operands_kernel(
    matrix, stride, rows, depth, divisor, unit, first_program, norms, copy, copy_stride,
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
            tl.store(norms[i] + row, 1.0 / norm, mask=row_ok)
            by = tl.load(divisor[i] + row, mask=row_ok & (unit[i] > 1), other=1.0)
            factor = tl.where(unit[i] > 0, 1.0 / (norm * by), 1.0)
            for first in range(0, copy_stride[i], DEPTH):
                x = load_tile(matrix[i], stride[i], row, row_ok, first, depth[i], DEPTH).to(SUM)
                k = first + tl.arange(0, DEPTH)
                tl.store(
                    copy[i] + row[:, None] * copy_stride[i] + k[None, :],
                    (x * factor[:, None]).to(copy[i].dtype.element_ty),
                    mask=row_ok[:, None] & (k < copy_stride[i])[None, :],
                )


@dataclass(frozen=True)
class Request:
    """A matrix that a sweep needs.

    Attributes:
        matrix: [R, D], of any floating-point dtype.
        unit: take x̂ = x / max(‖x‖, 1e-12) in place of its rows x.
        divisor: [R] in the dtype of the sums, by which the unit rows are divided, or None.
        norms: whether the inverse norms are wanted.
    """

    matrix: Tensor
    unit: bool = False
    divisor: Tensor | None = None
    norms: bool = False

    def served_by(self, matrix: Tensor, dtype: torch.dtype) -> bool:
        """Whether the sweeps can read `matrix` itself."""
        multiples = (*matrix.shape[1:], matrix.stride(0), matrix.data_ptr())
        aligned = all(number % ALIGNED == 0 for number in multiples)
        return aligned and matrix.dtype == dtype and not self.unit


@dataclass(frozen=True)
class Operand:
    """What a sweep reads of it.

    Attributes:
        matrix: [R, W], W the next multiple of 16 from D on; zeros from column D on.
        inverse_norms: [R], 1 / max(‖x‖, 1e-12), in the dtype of the sums; where wanted.
    """

    matrix: Tensor
    inverse_norms: Tensor


def operands(requests: list[Request], dtype: torch.dtype) -> list[Operand]:
    """The matrices in `dtype`, in one launch, or in none where they can be read as they are."""
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    any_matrix = requests[0].matrix
    nothing = any_matrix.new_empty(0, dtype=sums)
    results: list[Operand] = []
    todo = []
    for request in requests:
        matrix = unit_stride(request.matrix)
        copied = not request.served_by(matrix, dtype)
        ready = matrix
        if copied:
            ready = matrix.new_empty(matrix.shape[0], padded(matrix.shape[1]), dtype=dtype)
        work = copied or request.norms
        norms = matrix.new_empty(matrix.shape[0], dtype=sums) if work else nothing
        results.append(Operand(ready, norms))
        if work:
            todo.append((request, matrix, ready, norms, copied))
    if todo:
        _launch(todo, sums)
    return results


def _launch(todo: list[tuple[Request, Tensor, Tensor, Tensor, bool]], sums: torch.dtype) -> None:
    programs = [triton.cdiv(matrix.shape[0], ROWS) for _, matrix, *_ in todo]
    launch(
        operands_kernel,
        sum(programs),
        todo[0][1],
        Compiler(warps=4, stages=2),
        {
            "SUM": sum_type(sums),
            "ROWS": ROWS,
            "DEPTH": DEPTH,
            "EPS": EPS,
        },
        matrix=tuple(matrix for _, matrix, *_ in todo),
        stride=tuple(matrix.stride(0) for _, matrix, *_ in todo),
        rows=tuple(matrix.shape[0] for _, matrix, *_ in todo),
        depth=tuple(matrix.shape[1] for _, matrix, *_ in todo),
        divisor=tuple(n if r.divisor is None else r.divisor for r, _, _, n, _ in todo),
        unit=tuple(int(r.unit) + (r.divisor is not None) for r, *_ in todo),
        first_program=starts(programs),
        norms=tuple(norms for *_, norms, _ in todo),
        copy=tuple(ready for _, _, ready, _, _ in todo),
        # A copy that is not wanted has no columns.
        copy_stride=tuple(ready.stride(0) if copied else 0 for _, _, ready, _, copied in todo),
    )


def padded(width: int) -> int:
    """The next multiple of 16."""
    return -(-width // ALIGNED) * ALIGNED


def unit_stride(matrix: Tensor) -> Tensor:
    """`matrix` with neighbouring columns side by side in memory; a copy only where they are not."""
    matrix = matrix.detach()
    return matrix if matrix.stride(-1) == 1 or matrix.shape[-1] == 1 else matrix.contiguous()


def starts(sizes: list[int]) -> tuple[int, ...]:
    """Where each of consecutive pieces begins."""
    return tuple(sum(sizes[:i]) for i in range(len(sizes)))
