"""Records for the device: the descriptors of all banks of a step, in one table in device memory.

The launch of `operands` writes it from its own arguments: nothing is copied from the host, a CUDA
graph can capture it, and the kernels that follow take one pointer, whatever the number of banks,
and are not compiled again for another number. Every field has 8 bytes: an integer, an address, or
the bits of an fp64 number.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import triton
import triton.language as tl
from torch import Tensor

Word = int | float | Tensor | None


@dataclass
class Descriptor:
    """One bank and the rows that are swept over it. Tensors stand for their addresses.

    A field that the kind of the bank or the pass has no use for stays 0.

    Attributes:
        space: of its rows.
        kind: number in `fino_fast.ops.KINDS`, or PAIRS of `epilogues`; of an overlap IDENTITY's.
        x, x_stride, depth: [N, W] rows, W the columns, in the dtype of the launch.
        norms: [N] inverse norms of the rows.
        bank, bank_stride, classes: [K, W] vectors.
        offset: [K] biases in the dtype of the sums.
        target, target_stride: [N] int64, or [N, K] values in the dtype of the sums; stride 0: one
            row for all.
        counts: [K] int64.
        smoothing: ε.
        inv_count: 0-d.
        local, images, first, two_tower: of a contrastive term, as in `ops.contrastive`; images
            in one view of rows and columns.
        column_lse: [K] of the other rows.
        partial: [splits, N] log-sum-exps of parts of the bank, a result of `sweep`; three more
            planes of sums are behind them.
        best: [splits, N] int32 predictions, a result of `sweep`.
        lse: [N] log-sum-exps.
        weight, upstream, guidance: the gradient's factors, a number and two 0-d.
        first_program, shares, share_tiles: of the sweep of the space: how many shares the tiles of
            all its banks are split into, and how many tiles are in one.
        tiles_before: of the banks of the space before this one.
        walk: of the tiles of rows on which the gradient at the rows is taken; −1 for none.
        grad_x, is_begun: [N, W] to which it is added; 1 where an earlier bank has written to it.
        along: [N] ⟨x̂, ∂loss/∂x̂⟩ of a contrastive term.
        first_item, parts, share: of the gradient at the bank, how its rows are split.
        grad_bank, grad_offset: [parts, K, W] and [parts, K].
        first_tile: of the results of the bank.
        bank_out, bank_type, width, offset_out, offset_type: [K, width] and [K] results.
    """

    space: int
    kind: int
    x: Tensor
    x_stride: int
    depth: int
    norms: Tensor
    bank: Tensor
    bank_stride: int
    classes: int
    offset: Tensor
    target: Tensor
    target_stride: int
    counts: Tensor
    smoothing: float
    inv_count: Tensor
    local: int = 0
    images: int = 0
    first: int = 0
    two_tower: int = 0
    column_lse: Word = None
    partial: Word = None
    best: Word = None
    lse: Word = None
    weight: float = 1.0
    upstream: Word = None
    guidance: Word = None
    first_program: int = 0
    shares: int = 0
    share_tiles: int = 0
    tiles_before: int = 0
    walk: int = -1
    grad_x: Word = None
    is_begun: int = 0
    along: Word = None
    first_item: int = 0
    parts: int = 0
    share: int = 0
    grad_bank: Word = None
    grad_offset: Word = None
    first_tile: int = 0
    bank_out: Word = None
    bank_type: int = 0
    width: int = 0
    offset_out: Word = None
    offset_type: int = 0


FIELDS = tl.constexpr(len(fields(Descriptor)))
(
    SPACE, KIND, X, X_STRIDE, DEPTH_OF, NORMS, BANK, BANK_STRIDE, CLASSES, OFFSET, TARGET,
    TARGET_STRIDE, COUNTS, SMOOTHING, INV_COUNT, LOCAL, IMAGES, FIRST, TWO_TOWER, COLUMN_LSE,
    PARTIAL, BEST, LSE, WEIGHT, UPSTREAM, GUIDANCE, FIRST_PROGRAM, SHARES, SHARE_TILES,
    TILES_BEFORE, WALK, GRAD_X, IS_BEGUN, ALONG, FIRST_ITEM, PARTS, SHARE, GRAD_BANK,
    GRAD_OFFSET, FIRST_TILE, BANK_OUT, BANK_TYPE, WIDTH_OF, OFFSET_OUT, OFFSET_TYPE,
) = (tl.constexpr(i) for i in range(FIELDS.value))  # fmt: skip


@dataclass
class Space:
    """Rows on which banks stand, and the gradient that they get.

    Attributes:
        swept, stride: [N, stride] what the backward pass swept, in the dtype of the sums.
        is_swept: 0 where it swept nothing.
        out, width: [N, width] the result.
    """

    swept: Word
    is_swept: int
    stride: int
    out: Tensor
    width: int


SPACE_FIELDS = tl.constexpr(len(fields(Space)))
SWEPT, IS_SWEPT, STRIDE, OUT, OUT_WIDTH = (tl.constexpr(i) for i in range(SPACE_FIELDS.value))


@dataclass
class Kept:
    """A gradient at rows that the forward pass took.

    Attributes:
        gradient: [N, stride of the space].
        space: number of the rows.
        upstream, guidance: 0-d factors.
    """

    gradient: Tensor
    space: int
    upstream: Tensor
    guidance: Tensor


KEPT_FIELDS = tl.constexpr(len(fields(Kept)))
KEPT, KEPT_SPACE, KEPT_UPSTREAM, KEPT_GUIDANCE = (tl.constexpr(i) for i in range(KEPT_FIELDS.value))


@dataclass
class Matrix:
    """What `operands` makes of one matrix.

    Attributes:
        source, source_type, stride: [rows, depth] of the numbered dtype.
        unit: 1: its rows are divided by their norms.
        by, times: [rows] divisors and one factor in the dtype of the sums, or None.
        norms: [rows] inverse norms, a result.
        copy, copy_stride: [rows, copy_stride] in the dtype of the launch, a result; or None and 0.
        first_program: of the launch.
    """

    source: Word
    source_type: int
    stride: int
    rows: int
    depth: int
    unit: int
    by: Word
    times: Word
    norms: Word
    copy: Word
    copy_stride: int
    first_program: int = 0


MATRIX_FIELDS = tl.constexpr(len(fields(Matrix)))
(
    SOURCE, SOURCE_TYPE, SOURCE_STRIDE, SOURCE_ROWS, SOURCE_DEPTH, UNIT, BY, TIMES, NORM_OUT,
    COPY, COPY_STRIDE, MATRIX_START,
) = (tl.constexpr(i) for i in range(MATRIX_FIELDS.value))  # fmt: skip

# Of memory whose dtype is known at run time only; the number of a dtype is its index.
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def dtype_number(dtype: torch.dtype) -> int:
    """As `load_as` and `store_as` take it."""
    return DTYPES.index(dtype)


def words(records: Sequence[Descriptor | Space | Kept | Matrix]) -> list[int]:
    """The fields of all records in order, in the form that `operands_kernel` takes.

    Triton compiles a kernel again for every new pattern of ones, of multiples of 16 and of numbers
    below 2³¹ among its integers. So all are made odd and greater than 2⁶³; 62 bits are left, which
    the functions below take out again.
    """
    values = [_bits(getattr(record, field.name)) for record in records for field in fields(record)]
    return [1 << 63 | (value & (1 << 62) - 1) << 1 | 1 for value in values]


def _bits(value: Word) -> int:
    if isinstance(value, Tensor):
        return value.data_ptr()
    if isinstance(value, float):
        # Not negative: the first bit is 0. The last one is lost.
        (bits,) = struct.unpack("<q", struct.pack("<d", value))
        return int(bits) >> 1
    return value or 0


@triton.jit
def as_integer(word):
    """One that needs 32 bits only."""
    return (word >> 1).to(tl.int32)


@triton.jit
def as_pointer(word, TYPE: tl.constexpr):
    return (word << 1 >> 2).to(tl.pointer_type(TYPE))


@triton.jit
def integer(record, FIELD: tl.constexpr):
    return as_integer(tl.load(record + FIELD))


@triton.jit
def number(record, FIELD: tl.constexpr, SUM: tl.constexpr):
    return (tl.load(record + FIELD) << 1 >> 2 << 1).to(tl.float64, bitcast=True).to(SUM)


@triton.jit
def pointer(record, FIELD: tl.constexpr, TYPE: tl.constexpr):
    return as_pointer(tl.load(record + FIELD), TYPE)


@triton.jit
def width(record, FIELD: tl.constexpr):
    """A stride or a number of columns, of 32 bits, a multiple of 16.

    The compiler follows the shifts; a hint it would lose.
    """
    return (tl.load(record + FIELD) >> 5 << 4).to(tl.int32)


@triton.jit
def operands_of(bank, TYPE: tl.constexpr):
    """(x, x_stride, vectors, vectors_stride, depth) of a sweep."""
    x, vectors = pointer(bank, X, TYPE), pointer(bank, BANK, TYPE)
    return x, width(bank, X_STRIDE), vectors, width(bank, BANK_STRIDE), width(bank, DEPTH_OF)


@triton.jit
def find(table, entries, FIELDS: tl.constexpr, FIELD: tl.constexpr, program):
    """Which bank `program` works on; in `FIELD`, which ascends from 0, the first one's number.

    Of banks that begin with the same program it is the last.
    """
    index = -1
    for first in range(0, entries, 128):
        entry = first + tl.arange(0, 128)
        exists = entry < entries
        begins = as_integer(tl.load(table + entry * FIELDS + FIELD, mask=exists, other=0))
        index += tl.sum((exists & (begins <= program)).to(tl.int32), axis=0)
    return index


@triton.jit
def entries_of(table, entries, FIELDS: tl.constexpr, FIELD: tl.constexpr, value):
    """(first, one past the last) of the entries with `value` in `FIELD`; they are neighbours."""
    begin, count = entries, 0
    for first in range(0, entries, 128):
        entry = first + tl.arange(0, 128)
        numbers = as_integer(tl.load(table + entry * FIELDS + FIELD, mask=entry < entries, other=0))
        found = (entry < entries) & (numbers == value)
        begin = tl.minimum(begin, tl.min(tl.where(found, entry, entries), axis=0))
        count += tl.sum(found.to(tl.int32), axis=0)
    return begin, begin + count


@triton.jit
def load_as(address, kind, offsets, mask, SUM: tl.constexpr):
    """A tile of memory at the word `address`, of dtype number `kind`, as SUM; 0 where masked."""
    if kind == 0:
        x = tl.load(as_pointer(address, tl.float32) + offsets, mask=mask, other=0.0).to(SUM)
    elif kind == 1:
        x = tl.load(as_pointer(address, tl.bfloat16) + offsets, mask=mask, other=0.0).to(SUM)
    elif kind == 2:
        x = tl.load(as_pointer(address, tl.float16) + offsets, mask=mask, other=0.0).to(SUM)
    else:
        x = tl.load(as_pointer(address, tl.float64) + offsets, mask=mask, other=0.0).to(SUM)
    return x


@triton.jit
def store_as(address, kind, offsets, value, mask):
    """Store a tile into memory at the word `address`, of dtype number `kind`."""
    if kind == 0:
        tl.store(as_pointer(address, tl.float32) + offsets, value.to(tl.float32), mask)
    elif kind == 1:
        tl.store(as_pointer(address, tl.bfloat16) + offsets, value.to(tl.bfloat16), mask)
    elif kind == 2:
        tl.store(as_pointer(address, tl.float16) + offsets, value.to(tl.float16), mask)
    else:
        tl.store(as_pointer(address, tl.float64) + offsets, value.to(tl.float64), mask)
