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
from .tiles import WANTED_PROGRAMS, WORKERS, Gradient, Sizes, Tiles, choose, tiles_for

REDUCE_BLOCK = 1024
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
    depths = {descriptor.depth for descriptor in table}
    sizes = choose(tiles.sweeps, max(depths), n * MAX_SPLITS)
    programs = _share_out(table, triton.cdiv(n, sizes.outer), sizes)
    row = spaces[0].new_empty(0, dtype=banks[0].sums)
    parts = [descriptor.splits for descriptor in table]
    partial = row.new_empty(4, n * sum(parts))
    best = row.new_empty(n * sum(parts), dtype=torch.int32)
    one = row.new_ones(())
    kept: dict[int, Tensor] = {}
    for index, (bank, descriptor) in enumerate(zip(banks, table, strict=True)):
        begin = n * starts(parts)[index]
        descriptor.lse, descriptor.best = partial[0, begin:], best[begin:]
        descriptor.weight = 1.0 if balanced else bank.weight
        descriptor.upstream, descriptor.guidance = one, one if balanced else bank.guidance
        if groups[index] >= 0:
            shape = n, padded(bank.x.shape[1])
            descriptor.grad_x = kept.setdefault(groups[index], row.new_empty(shape))
    # Those that share rows, and among them those that share a gradient, are neighbours.
    order = sorted(range(len(banks)), key=lambda e: (banks[e].space, groups[e]))
    table = [table[e] for e in order]
    walks = number_walks(table, tiles, n)
    address = operands.launch(words(table))
    launch(
        sweep_kernel,
        programs,
        row,
        sizes.compiler,
        sweep_constants(spaces[0], sizes, sizes.outer, sizes.inner, depths),
        table=address,
        entries=len(banks),
        planes=partial.shape[1],
        n=n,
    )
    losses, metrics, weighted = (row.new_empty(len(banks)) for _ in range(3))
    lse = row.new_empty(len(banks), n)
    result = Losses(losses, metrics, weighted, lse, [kept[group] for group in sorted(kept)])
    launch_rows(address, table, spaces, tiles, walks, len(banks), partial.shape[1], result)
    return result


def number_walks(table: list[Descriptor], tiles: Tiles, n: int) -> int:
    """Describe on which walk over a tile of rows every gradient at rows is taken; how many walks.

    One walk takes all gradients at the rows of a space, so that the tile is read once. Where there
    are too few tiles to fill a GPU, every gradient has one of its own.
    """
    sizes = choose(tiles.rows, max(_widths(table), default=0), n)
    together = triton.cdiv(n, sizes.outer) >= WANTED_PROGRAMS
    walks: dict[int, int] = {}
    begun: set[int] = set()
    for descriptor in table:
        if descriptor.grad_x is None:
            continue
        gradient = id(descriptor.grad_x)
        walk = descriptor.space if together else gradient
        descriptor.walk = walks.setdefault(walk, len(walks))
        descriptor.is_begun = int(gradient in begun)
        begun.add(gradient)
    return len(walks)


def _widths(table: list[Descriptor]) -> set[int]:
    """Columns of the rows at which gradients are taken."""
    return {descriptor.depth for descriptor in table if descriptor.grad_x is not None}


def launch_rows(
    address: Tensor, table: list[Descriptor], spaces: list[Tensor], tiles: Tiles, walks: int,
    reduced: int, planes: int, result: Losses,
) -> None:  # fmt: skip
    """Launch `rows_kernel`: `reduced` banks, and the gradients of all walks of the table."""
    n = spaces[0].shape[0]
    depths = _widths(table)
    sizes = choose(tiles.rows, max(depths, default=0), n)
    row_tiles = triton.cdiv(n, sizes.outer)
    items = row_tiles * walks
    launch(
        rows_kernel,
        reduced + min(items, WORKERS),
        result.lse,
        sizes.compiler,
        sweep_constants(spaces[0], sizes, sizes.outer, sizes.inner, depths)
        | {"BLOCK": REDUCE_BLOCK},
        table=address,
        entries=len(table),
        planes=planes,
        reduced=reduced,
        losses=result.losses,
        metrics=result.metrics,
        weighted=result.weighted,
        lse_out=result.lse,
        row_tiles=row_tiles,
        **room(spaces, result.lse, items, sizes),
        n=n,
    )


def room(spaces: list[Tensor], sums: Tensor, items: int, sizes: Gradient) -> dict[str, Any]:
    """Memory of the programs among which `items` tiles are shared out."""
    workers = min(items, WORKERS)
    depth = max(padded(x.shape[1]) for x in spaces)
    size = sizes.outer * triton.cdiv(depth, sizes.width) * sizes.width
    return {
        "items": items,
        "workers": workers,
        "work": spaces[0].new_empty(workers, sizes.outer, sizes.chunk),
        "scratch": sums.new_empty(workers, size),
        "scratch_size": size,
    }


def share_of(tiles: int, row_tiles: int) -> int:
    """Of the tiles of all banks of a space, how many one program takes: few rows fill a GPU too."""
    wanted = max(1, min(MAX_SPLITS, tiles, WANTED_PROGRAMS // row_tiles))
    share: int = triton.cdiv(tiles, wanted)
    return share


def _share_out(table: list[Descriptor], row_tiles: int, sizes: Sizes) -> int:
    """Describe which program sweeps what, and count the programs.

    The tiles of all banks of a space are one sequence, of which every program takes a share of
    equal length; where there are rows enough, the share is all of it.
    """
    programs = 0
    for space in sorted({descriptor.space for descriptor in table}):
        members = [descriptor for descriptor in table if descriptor.space == space]
        tiles = [triton.cdiv(descriptor.classes, sizes.inner) for descriptor in members]
        share = share_of(sum(tiles), row_tiles)
        shares = triton.cdiv(sum(tiles), share)
        for descriptor, before, count in zip(members, starts(tiles), tiles, strict=True):
            descriptor.first_program, descriptor.shares = programs, shares
            descriptor.share_tiles, descriptor.tiles_before = share, before
            descriptor.splits = (before + count - 1) // share - before // share + 1
        programs += row_tiles * shares
    return programs
