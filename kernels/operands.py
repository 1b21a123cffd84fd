"""What a step needs before its sweeps: matrices made ready, and the banks' table.

The sweeps load 16 bytes at a time into the tensor cores' buffers. A matrix of another dtype, or one
whose rows do not begin at multiples of 16 entries, is copied once, with zeros up to a width that is
such a multiple: the copy is as large as the matrix, and no sweep has a slow case.

Both come as arguments of the launch, because nothing else reaches the device without a copy from
the host. CUDA takes 32,764 bytes of them (12.1 and later); what is more takes another launch.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import element_type, launch, sum_type
from .table import (
    BY,
    COPY,
    COPY_STRIDE,
    MATRIX_FIELDS,
    MATRIX_START,
    NORM_OUT,
    SOURCE,
    SOURCE_DEPTH,
    SOURCE_ROWS,
    SOURCE_STRIDE,
    SOURCE_TYPE,
    TIMES,
    UNIT,
    Matrix,
    as_integer,
    as_pointer,
    dtype_number,
    load_as,
    words,
)
from .tiles import Compiler

EPS = 1e-12  # x̂ = x / max(‖x‖, EPS)
ROWS, DEPTH = 16, 64
ALIGNED = 16  # entries; Triton takes wide loads where strides are multiples of 16
# What one launch carries: together less than 32,764 bytes.
MOST_WORDS, MOST_MATRICES = 3072, 64


@triton.jit
def operands_kernel(
    matrices, words, table, TYPE: tl.constexpr, SUM: tl.constexpr, ROWS: tl.constexpr,
    DEPTH: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if program == 0:
        for i in tl.static_range(len(words)):
            tl.store(table + i, words[i])
    # The matrix of this program, one of the arguments: they cannot be indexed at run time.
    source, source_type, stride = matrices[SOURCE], matrices[SOURCE_TYPE], matrices[SOURCE_STRIDE]
    rows, depth, unit = matrices[SOURCE_ROWS], matrices[SOURCE_DEPTH], matrices[UNIT]
    by, times, norms = matrices[BY], matrices[TIMES], matrices[NORM_OUT]
    copy, copy_stride, start = matrices[COPY], matrices[COPY_STRIDE], matrices[MATRIX_START]
    for i in tl.static_range(MATRIX_FIELDS, len(matrices), MATRIX_FIELDS):
        later = program >= as_integer(matrices[i + MATRIX_START])
        source = tl.where(later, matrices[i + SOURCE], source)
        source_type = tl.where(later, matrices[i + SOURCE_TYPE], source_type)
        stride = tl.where(later, matrices[i + SOURCE_STRIDE], stride)
        rows = tl.where(later, matrices[i + SOURCE_ROWS], rows)
        depth = tl.where(later, matrices[i + SOURCE_DEPTH], depth)
        unit = tl.where(later, matrices[i + UNIT], unit)
        by = tl.where(later, matrices[i + BY], by)
        times = tl.where(later, matrices[i + TIMES], times)
        norms = tl.where(later, matrices[i + NORM_OUT], norms)
        copy = tl.where(later, matrices[i + COPY], copy)
        copy_stride = tl.where(later, matrices[i + COPY_STRIDE], copy_stride)
        start = tl.where(later, matrices[i + MATRIX_START], start)

    tile = program - as_integer(start)  # negative where there is nothing to do
    row = tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_ok = (tile >= 0) & (row < as_integer(rows))
    width, copied = as_integer(depth), as_integer(copy_stride)
    at = row[:, None] * as_integer(stride)
    squares = tl.zeros([ROWS], dtype=SUM)
    for first in range(0, width, DEPTH):
        k = first + tl.arange(0, DEPTH)
        ok = row_ok[:, None] & (k < width)[None, :]
        x = load_as(source, as_integer(source_type), at + k[None, :], ok, SUM)
        squares += tl.sum(x * x, axis=1)
    inverse = 1.0 / tl.maximum(tl.sqrt(squares), tl.full([ROWS], EPS, SUM))
    tl.store(as_pointer(norms, SUM) + row, inverse, mask=row_ok)
    factor = tl.where(as_integer(unit) > 0, inverse, 1.0)
    by, times = as_pointer(by, SUM), as_pointer(times, SUM)
    divided, multiplied = by.to(tl.int64) != 0, times.to(tl.int64) != 0
    factor = factor / tl.load(by + row, mask=row_ok & divided, other=1.0)
    factor = factor * tl.load(times + row * 0, mask=row_ok & multiplied, other=1.0)
    for first in range(0, copied, DEPTH):
        k = first + tl.arange(0, DEPTH)
        ok = row_ok[:, None] & (k < width)[None, :]
        x = load_as(source, as_integer(source_type), at + k[None, :], ok, SUM) * factor[:, None]
        to = as_pointer(copy, TYPE) + row[:, None] * copied + k[None, :]
        tl.store(to, x.to(TYPE), mask=row_ok[:, None] & (k < copied)[None, :])


@dataclass(frozen=True)
class Request:
    """A matrix that a sweep needs.

    Attributes:
        matrix: [R, D], of any floating-point dtype.
        unit: take x̂ = x / max(‖x‖, 1e-12) in place of its rows x.
        divisor: [R] in the dtype of the sums, by which the rows are divided, or None.
        factor: 0-d or [1] in the dtype of the sums, by which all rows are multiplied, or None.
        norms: whether the inverse norms are wanted.
    """

    matrix: Tensor
    unit: bool = False
    divisor: Tensor | None = None
    factor: Tensor | None = None
    norms: bool = False

    def served_by(self, matrix: Tensor, dtype: torch.dtype) -> bool:
        """Whether the sweeps can read `matrix` itself."""
        multiples = (*matrix.shape[1:], matrix.stride(0), matrix.data_ptr())
        aligned = all(number % ALIGNED == 0 for number in multiples)
        changed = self.unit or self.divisor is not None or self.factor is not None
        return aligned and matrix.dtype == dtype and not changed


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
        self._todo: list[Matrix] = []
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
                self._todo.append(
                    Matrix(
                        source=matrix,
                        source_type=dtype_number(matrix.dtype),
                        stride=matrix.stride(0),
                        rows=matrix.shape[0],
                        depth=matrix.shape[1],
                        unit=int(request.unit),
                        by=request.divisor,
                        times=request.factor,
                        norms=norms,
                        # A copy that is not wanted has no columns.
                        copy=ready if copied else None,
                        copy_stride=ready.stride(0) if copied else 0,
                    )
                )

    def launch(self, described: list[int]) -> Tensor:
        """Make them ready, and write the words `described` into a table on the device.

        One launch, or several of as much as one can carry.

        Returns:
            [> len(described)] uint64.
        """
        table = self.like.new_empty(len(described) + MOST_WORDS, dtype=torch.uint64)
        todo = self._todo
        for turn in range(max(1, -(-len(described) // MOST_WORDS), -(-len(todo) // MOST_MATRICES))):
            first = turn * MOST_WORDS
            self._launch(
                todo[turn * MOST_MATRICES : (turn + 1) * MOST_MATRICES],
                described[first : first + MOST_WORDS],
                table[min(first, len(described)) :],
            )
        return table

    def _launch(self, todo: list[Matrix], described: list[int], table: Tensor) -> None:
        programs = [triton.cdiv(matrix.rows, ROWS) for matrix in todo]
        for matrix, start in zip(todo, starts(programs), strict=True):
            matrix.first_program = start
        # Filled up to powers of two: the kernel is compiled for few numbers of arguments.
        nothing = Matrix(None, 0, 0, 0, 0, 0, None, None, None, None, 0, first_program=2**31 - 1)
        todo = todo + [nothing] * (bucket(len(todo), MOST_MATRICES) - len(todo))
        fill = bucket(len(described), MOST_WORDS) - len(described)
        launch(
            operands_kernel,
            max(1, sum(programs)),
            self.like,
            Compiler(warps=4, stages=2),
            {
                "TYPE": element_type(self.like.dtype),
                "SUM": sum_type(self.like.dtype),
                "ROWS": ROWS,
                "DEPTH": DEPTH,
                "EPS": EPS,
            },
            matrices=tuple(words(todo)),
            words=tuple(described + [words([nothing])[0]] * fill),
            table=table,
        )


def bucket(count: int, most: int) -> int:
    """The next power of two, but not more than `most`."""
    return min(most, 1 << max(0, count - 1).bit_length())


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of sums over numbers of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def padded(width: int) -> int:
    """The next multiple of 16."""
    return -(-width // ALIGNED) * ALIGNED


def unit_stride(matrix: Tensor) -> Tensor:
    """`matrix` with neighbouring columns side by side in memory; a copy only where they are not.

    Or where its rows are 2³¹ entries apart: the kernels take strides of 32 bits.
    """
    matrix = matrix.detach()
    beside = matrix.stride(-1) == 1 or matrix.shape[-1] == 1
    return matrix if beside and matrix.stride(0) < 2**31 else matrix.contiguous()


def starts(sizes: list[int]) -> tuple[int, ...]:
    """Where each of consecutive pieces begins."""
    return tuple(sum(sizes[:i]) for i in range(len(sizes)))
