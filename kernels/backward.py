"""The gradients of all banks of a step, in four launches.

By now the upstream gradients are known, so the banks on the same rows become one matrix.
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from .bank import Bank, prepare
from .banks import banks_kernel
from .combine import combine_kernel
from .epilogues import OVERLAP, PAIRS
from .forward import MAX_SPLITS, launch_rows, number_walks, room
from .launch import element_type, launch, sum_type, sweep_constants
from .operands import padded, starts, sum_dtype
from .table import Descriptor, Kept, Space, dtype_number, words
from .tiles import (
    WANTED_PROGRAMS,
    WORKERS,
    Compiler,
    Gradient,
    choose,
    tiles_for,
)

COMBINE_ROWS, COMBINE_DEPTH = 8, 32
REDUCE_BLOCK = 1024
# Where the banks have fewer, the rows are split: about two programs for every multiprocessor of a
# large GPU, so that few of them wait for the last ones.
WANTED_BANK_TILES = 2 * WANTED_PROGRAMS


@dataclass
class Upstream:
    """Of one bank what the backward pass starts from.

    Attributes:
        gradient: 0-d, at its loss times its weight.
        lse: [N], from the forward pass.
        column_lse: [K], those of the rows of all ranks; of a contrastive term.
        swept: whether its gradient at the rows is still to be taken.
    """

    gradient: Tensor
    lse: Tensor
    column_lse: Tensor
    swept: bool


@dataclass
class Gradients:
    """What the backward pass returns, each in the dtype of what it belongs to.

    Attributes:
        rows: [N, D] of every space.
        vectors, offset: of every bank; None where it has none. The offset of a contrastive term is
            its 1/τ; an overlap's, a constant, has none.
    """

    rows: list[Tensor]
    vectors: list[Tensor | None]
    offset: list[Tensor | None]


def backward(
    banks: list[Bank], upstream: list[Upstream], spaces: list[Tensor], kept: list[Kept],
    want_bank: bool,
) -> Gradients:  # fmt: skip
    """The gradients. Four launches, two where there is nothing to sweep.

    Args:
        banks: those that still have gradients to be taken; prototypes as `Bank.is_ready` has them.
        upstream: one a bank.
        spaces: [N, D] all rows of the step.
        kept: gradients that the forward pass took.
        want_bank: whether the gradients at banks and offsets of heads are wanted.
    """
    n, dtype = spaces[0].shape[0], spaces[0].dtype
    row = spaces[0].new_empty(0, dtype=sum_dtype(dtype))
    tiles = tiles_for(spaces[0])
    operands, table = prepare(banks, spaces[0])
    trained = [
        # Its vectors move with the rows.
        start.swept if bank.kind == OVERLAP.value else want_bank and bank.is_trained
        for bank, start in zip(banks, upstream, strict=True)
    ]
    entries = list(zip(table, trained, strict=True))
    depths = {entry.depth for entry, is_trained in entries if is_trained}
    classes = [entry.classes if is_trained else 0 for entry, is_trained in entries]
    sizes = choose(tiles.banks, max(depths, default=0), max(classes, default=0) * MAX_SPLITS)
    bank_tiles = [triton.cdiv(count, sizes.outer) for count in classes]
    share, parts = split_rows(sum(bank_tiles), n, sizes)
    items = [count * parts for count in bank_tiles]
    tile_of = [triton.cdiv(count, COMBINE_ROWS) for count in classes]
    # Those that share a gradient are neighbours in the table.
    order = sorted(range(len(banks)), key=lambda e: (banks[e].space, upstream[e].swept))
    first_item, first_tile = (
        dict(zip(order, starts([counts[e] for e in order]), strict=True))
        for counts in (items, tile_of)
    )
    result = Gradients([x.new_empty(x.shape) for x in spaces], [], [])
    swept: dict[int, Tensor] = {}
    along = row.new_empty(n)
    scale, inv_count, at_scale, grad_scale = (row,) * 4
    for index, (bank, start, descriptor) in enumerate(zip(banks, upstream, table, strict=True)):
        descriptor.lse, descriptor.column_lse = start.lse, start.column_lse
        descriptor.weight, descriptor.upstream = bank.weight, start.gradient
        descriptor.guidance = bank.guidance
        if start.swept:
            shape = n, padded(bank.x.shape[1])
            if bank.space not in swept:
                swept[bank.space] = row.new_empty(shape)
            descriptor.grad_x = swept[bank.space]
        if bank.kind == PAIRS.value:
            descriptor.along, scale, inv_count = along, bank.offset, bank.inv_count
            at_scale, grad_scale = start.gradient, row.new_empty(())
        descriptor.first_item, descriptor.first_tile = first_item[index], first_tile[index]
        result.vectors.append(None)
        result.offset.append(grad_scale if bank.kind == PAIRS.value else None)
        if trained[index]:
            _describe_results(descriptor, bank, row, parts, share, result)
    table = [table[e] for e in order]
    walks = number_walks(table, tiles, n)
    records = [
        words(table),
        words(
            [
                Space(swept.get(i), int(i in swept), padded(x.shape[1]), result.rows[i], x.shape[1])
                for i, x in enumerate(spaces)
            ]
        ),
        words(kept),
    ]
    address = operands.launch([word for section in records for word in section])
    if walks:
        launch_rows(address, table, spaces, tiles, walks, row)
    if sum(items):
        space = room(spaces, row, sum(items), sizes)
        launch(
            banks_kernel,
            min(sum(items), WORKERS),
            row,
            sizes.compiler,
            sweep_constants(spaces[0], sizes, sizes.inner, sizes.outer, depths),
            table=address,
            entries=len(table),
            **space,
            # Not of 8 bits: Triton would lay out the operand that they mask as if it had 8 too.
            used=row.new_empty(space["workers"], sizes.chunk, dtype=torch.int32),
            n=n,
        )
    row_tiles = triton.cdiv(n, COMBINE_ROWS)
    spaces_at, kept_at = len(records[0]), len(records[0]) + len(records[1])
    launch(
        combine_kernel,
        row_tiles * len(spaces) + sum(tile_of) + (grad_scale is not row),
        row,
        Compiler(warps=4, stages=2),
        {
            "TYPE": element_type(dtype),
            "SUM": sum_type(dtype),
            "ROWS": COMBINE_ROWS,
            "DEPTH": COMBINE_DEPTH,
            "BLOCK": REDUCE_BLOCK,
        },
        table=address,
        entries=len(table),
        spaces=address[spaces_at:],
        kept=address[kept_at:],
        kept_entries=len(kept),
        row_tiles=row_tiles,
        row_work=row_tiles * len(spaces),
        bank_work=sum(tile_of),
        along=along,
        scale=scale,
        inv_count=inv_count,
        upstream=at_scale,
        grad_scale=grad_scale,
        n=n,
    )
    return result


def split_rows(bank_tiles: int, n: int, sizes: Gradient) -> tuple[int, int]:
    """Into what parts the rows are split for the gradients at banks: (rows in a part, parts).

    Args:
        bank_tiles: of all banks together. So the parts of all of them have no more vectors than
            WANTED_BANK_TILES tiles, or than the banks.
        n: rows.
        sizes: of the tiles.
    """
    row_tiles = triton.cdiv(n, sizes.inner)
    wanted = max(1, min(row_tiles, MAX_SPLITS, WANTED_BANK_TILES // max(1, bank_tiles)))
    # No part without a row.
    share = triton.cdiv(row_tiles, wanted)
    return share * sizes.inner, triton.cdiv(row_tiles, share)


def _describe_results(
    descriptor: Descriptor, bank: Bank, row: Tensor, parts: int, share: int, result: Gradients
) -> None:
    """Room for the gradients at a bank, of its parts and in the end."""
    classes, depth = bank.vectors.shape
    descriptor.parts, descriptor.share = parts, share
    descriptor.grad_bank = row.new_empty(parts, classes, padded(depth))
    descriptor.grad_offset = row.new_empty(parts, classes)
    vectors = bank.vectors.new_empty(bank.vectors.shape)
    offset = row.new_empty(classes, dtype=bank.offset_dtype)
    descriptor.bank_out, descriptor.offset_out, descriptor.width = vectors, offset, depth
    descriptor.bank_type, descriptor.offset_type = (
        dtype_number(tensor.dtype) for tensor in (vectors, offset)
    )
    result.vectors[-1] = vectors
    if bank.kind != OVERLAP.value:
        result.offset[-1] = offset
