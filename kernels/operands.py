"""What a step needs before its sweeps, in one launch: matrices made ready, and the banks' table.

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
    matrix, stride, rows, depth, divisor, unit, first_program, norms, copy, copy_stride, words,
    table, SUM: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if program == 0:
        for i in tl.static_range(len(words)):
            tl.store(table + i, words[i])
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
            # A divisor of every row, or one factor for all of them.
            by = tl.load(divisor[i] + row, mask=row_ok & (unit[i] == 2), other=1.0)
            times = tl.load(divisor[i] + row * 0, mask=row_ok & (unit[i] == 3), other=1.0)
            factor = tl.where(unit[i] > 0, times / (norm * by), 1.0)
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
        factor: [1] in the dtype of the sums, by which the unit rows are multiplied, or None.
        norms: whether the inverse norms are wanted.
    """

    matrix: Tensor
    unit: bool = False
    divisor: Tensor | None = None
    factor: Tensor | None = None
    norms: bool = False

    @property
    def scaling(self) -> tuple[int, Tensor | None]:
        """How the kernel is told of the three."""
        if self.divisor is not None:
            return 2, self.divisor
        return (3, self.factor) if self.factor is not None else (int(self.unit), None)

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


class Operands:
    """The matrices of `requests` in the dtype of `like`; they are ready once `launch` has run.

    Attributes:
        ready: one a request; the matrix itself where the sweeps can read it as it is.
    """

    def __init__(self, requests: list[Request], like: Tensor) -> None:
        self.sums, self.like = sum_dtype(like.dtype), like
        nothing = self.like.new_empty(0, dtype=self.sums)
        self.ready: list[Operand] = []
        self._todo: list[tuple[Request, Tensor, Operand, bool]] = []
        for request in requests:
            matrix = unit_stride(request.matrix)
            copied = not request.served_by(matrix, like.dtype)
            ready = matrix
            if copied:
                ready = matrix.new_empty(matrix.shape[0], padded(matrix.shape[1]), dtype=like.dtype)
            work = copied or request.norms
            norms = matrix.new_empty(matrix.shape[0], dtype=self.sums) if work else nothing
            self.ready.append(Operand(ready, norms))
            if work:
                self._todo.append((request, matrix, self.ready[-1], copied))

    def launch(self, words: list[int]) -> Tensor:
        """Make them ready, and write `words` into a table on the device. [len(words)] uint64."""
        todo = self._todo
        programs = [triton.cdiv(matrix.shape[0], ROWS) for _, matrix, *_ in todo]
        table = self.like.new_empty(len(words), dtype=torch.uint64)
        scalings = [request.scaling for request, *_ in todo]
        launch(
            operands_kernel,
            max(1, sum(programs)),
            self.like,
            Compiler(warps=8, stages=2),
            {"SUM": sum_type(self.sums), "ROWS": ROWS, "DEPTH": DEPTH, "EPS": EPS},
            matrix=tuple(matrix for _, matrix, *_ in todo),
            stride=tuple(matrix.stride(0) for _, matrix, *_ in todo),
            rows=tuple(matrix.shape[0] for _, matrix, *_ in todo),
            depth=tuple(matrix.shape[1] for _, matrix, *_ in todo),
            divisor=tuple(
                operand.inverse_norms if by is None else by
                for (_, by), (_, _, operand, _) in zip(scalings, todo, strict=True)
            ),
            unit=tuple(how for how, _ in scalings),
            first_program=starts(programs),
            norms=tuple(operand.inverse_norms for *_, operand, _ in todo),
            copy=tuple(operand.matrix for *_, operand, _ in todo),
            # A copy that is not wanted has no columns.
            copy_stride=tuple(
                operand.matrix.stride(0) if copied else 0 for *_, operand, copied in todo
            ),
            words=tuple(words),
            table=table,
        )
        return table


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of sums over numbers of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


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
