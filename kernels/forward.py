"""The losses of all banks of a step, in three launches.

The gradient of a prototype head at its rows is taken with the loss, because the bank moves before
the backward pass; and so are those of all heads where the balance needs their norms.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from .bank import Bank, prepare
from .epilogues import PROTOTYPE, TANH
from .launch import launch, sweep_constants
from .operands import padded, starts
from .rows import rows_kernel
from .sweep import sweep_kernel
from .table import Descriptor, words
from .tiles import WORKERS, Tiles, tiles_for

REDUCE_BLOCK = 1024
# Programs that a sweep is split into at least, so that few rows or a small bank fill a GPU.
WANTED_PROGRAMS = 512
MAX_SPLITS = 16  # partial sums of a row; bounds their memory at 20·MAX_SPLITS bytes a row and bank


@dataclass
class Losses:
    """What the forward pass returns, in the dtype of the sums.

    Attributes:
        losses, metrics: [E], of every bank.
        weighted: [E], losses times weights.
        lse: [E, N], log-sum-exp of every row.
        kept: gradients at the rows, [N, W], W the next multiple of 16 from D on; see `kept_groups`.
    """

    losses: Tensor
    metrics: Tensor
    weighted: Tensor
    lse: Tensor
    kept: list[Tensor]


def kept_groups(kind: list[int], space: list[int], balanced: bool, want_x: bool) -> list[int]:
    """Of every bank the gradient, among those kept, to which it adds; −1 where it adds to none.

    Balanced, every head has its own, without weight and guidance. Otherwise the prototype heads on
    the same rows share one, and both are inside.
    """
    if balanced:
        heads = [k <= TANH.value for k in kind]
        return [sum(heads[:e]) if is_head else -1 for e, is_head in enumerate(heads)]
    groups: dict[int, int] = {}
    return [
        groups.setdefault(s, len(groups)) if want_x and k == PROTOTYPE.value else -1
        for k, s in zip(kind, space, strict=True)
    ]


def forward(banks: list[Bank], groups: list[int], balanced: bool) -> Losses:
    """Losses and metrics of all banks. Three launches.

    Args:
        banks: at least one.
        groups: from `kept_groups`.
        balanced: as there.
    """
    spaces, n = [bank.x for bank in banks], banks[0].x.shape[0]
    tiles = tiles_for(spaces[0])
    operands, table = prepare(banks, spaces[0])
    splits = [_splits(n, bank.vectors.shape[0], tiles) for bank in banks]
    programs = [triton.cdiv(n, tiles.sweep_rows) * count for count in splits]
    row = spaces[0].new_empty(0, dtype=banks[0].sums)
    partial = row.new_empty(4, n * sum(splits))
    best = row.new_empty(n * sum(splits), dtype=torch.int32)
    one = row.new_ones(())
    kept: dict[int, Tensor] = {}
    for index, (bank, descriptor) in enumerate(zip(banks, table, strict=True)):
        begin = n * starts(splits)[index]
        descriptor.lse, descriptor.best = partial[0, begin:], best[begin:]
        descriptor.splits, descriptor.first_program = splits[index], starts(programs)[index]
        descriptor.weight = 1.0 if balanced else bank.weight
        descriptor.upstream, descriptor.guidance = one, one if balanced else bank.guidance
        descriptor.group = groups[index]
        if groups[index] >= 0:
            shape = n, padded(bank.x.shape[1])
            descriptor.grad_x = kept.setdefault(groups[index], row.new_empty(shape))
    address = operands.launch(words(table))
    launch(
        sweep_kernel,
        sum(programs),
        row,
        tiles.compiler,
        sweep_constants(spaces[0], tiles),
        table=address,
        entries=len(banks),
        planes=partial.shape[1],
        n=n,
    )
    losses, metrics, weighted = (row.new_empty(len(banks)) for _ in range(3))
    lse = row.new_empty(len(banks), n)
    result = Losses(losses, metrics, weighted, lse, [kept[group] for group in sorted(kept)])
    launch_rows(address, table, spaces, tiles, len(kept), len(banks), partial.shape[1], result)
    return result


def launch_rows(
    address: Tensor, table: list[Descriptor], spaces: list[Tensor], tiles: Tiles, groups: int,
    reduced: int, planes: int, result: Losses,
) -> None:  # fmt: skip
    """Launch `rows_kernel`: `reduced` banks, and the gradients of all groups of the table."""
    n = spaces[0].shape[0]
    row_tiles = triton.cdiv(n, tiles.rows)
    items = row_tiles * groups
    launch(
        rows_kernel,
        reduced + min(items, WORKERS),
        result.lse,
        tiles.compiler,
        sweep_constants(spaces[0], tiles, gradient=True) | {"BLOCK": REDUCE_BLOCK},
        table=address,
        entries=len(table),
        planes=planes,
        reduced=reduced,
        losses=result.losses,
        metrics=result.metrics,
        weighted=result.weighted,
        lse_out=result.lse,
        row_tiles=row_tiles,
        **room(spaces, result.lse, items, tiles.rows, tiles),
        n=n,
    )


def room(
    spaces: list[Tensor], sums: Tensor, items: int, outer: int, tiles: Tiles
) -> dict[str, Any]:
    """Memory of the programs among which `items` tiles of `outer` vectors are shared out."""
    workers = min(items, WORKERS)
    depth = max(padded(x.shape[1]) for x in spaces)
    size = outer * triton.cdiv(depth, tiles.width) * tiles.width
    return {
        "items": items,
        "workers": workers,
        "work": spaces[0].new_empty(workers, outer, tiles.chunk),
        "scratch": sums.new_empty(workers, size),
        "scratch_size": size,
    }


def _splits(n: int, classes: int, tiles: Tiles) -> int:
    """Into how many programs the sweep of one tile of rows over a bank is split."""
    row_tiles, columns = triton.cdiv(n, tiles.sweep_rows), triton.cdiv(classes, tiles.columns)
    splits: int = min(MAX_SPLITS, columns, WANTED_PROGRAMS // row_tiles)
    return max(1, splits)
