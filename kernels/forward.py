"""The losses of all banks of a step: two launches here, and the end of the losses in `losses`.

Where the balance needs the norms of the heads' gradients at the rows, a third launch takes them.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from .bank import Bank, is_head, prepare
from .epilogues import PROTOTYPE
from .launch import launch, sweep_constants
from .losses import Sums, reduce_sums
from .operands import padded, starts
from .rows import rows_kernel
from .sweep import sweep_kernel
from .table import Descriptor, words
from .tiles import WANTED_PROGRAMS, WORKERS, Gradient, Sizes, Tiles, choose, tiles_for

MAX_SPLITS = 16  # partial sums of a row; bounds their memory at 20·MAX_SPLITS bytes a row and bank


@dataclass
class Losses:
    """What the forward pass returns, in the dtype of the sums.

    Attributes:
        losses, metrics: [E], of every bank.
        weighted: [E], losses times weights.
        lse: [E, N], log-sum-exp of every row.
        kept: balanced, ∂loss/∂x of every head, without weight and guidance; [N, W], W the next
            multiple of 16 from D on.
        prototypes: [K, W] in the dtype of the rows, the vectors of every prototype head as the
            sweep read them. The backward pass needs them, and the bank moves before it.
    """

    losses: Tensor
    metrics: Tensor
    weighted: Tensor
    lse: Tensor
    kept: list[Tensor]
    prototypes: list[Tensor]


def forward(banks: list[Bank], balanced: bool = False) -> Losses:
    """Losses and metrics of all banks.

    Args:
        banks: at least one.
        balanced: whether the heads' gradients at their rows are wanted now, each by itself.
    """
    spaces, n = [bank.x for bank in banks], banks[0].x.shape[0]
    tiles = tiles_for(spaces[0])
    operands, table = prepare(banks, spaces[0])
    prototypes = [
        descriptor.bank
        for bank, descriptor in zip(banks, table, strict=True)
        if bank.kind == PROTOTYPE.value
    ]
    depths = {descriptor.depth for descriptor in table}
    sizes = choose(tiles.sweeps, max(depths), n * MAX_SPLITS)
    programs, splits = _share_out(table, triton.cdiv(n, sizes.outer), sizes)
    row = spaces[0].new_empty(0, dtype=banks[0].sums)
    sums = Sums(
        row.new_empty(4, n * sum(splits)),
        row.new_empty(n * sum(splits), dtype=torch.int32),
        row.new_empty(len(banks), n),
        splits,
    )
    one = row.new_ones(())
    kept: list[Tensor] = []
    for index, (bank, descriptor) in enumerate(zip(banks, table, strict=True)):
        begin = n * starts(splits)[index]
        descriptor.partial, descriptor.best = sums.partial[0, begin:], sums.best[begin:]
        descriptor.lse, descriptor.upstream, descriptor.guidance = sums.lse[index], one, one
        if balanced and is_head(bank.kind):
            descriptor.grad_x = row.new_empty(n, padded(bank.x.shape[1]))
            kept.append(descriptor.grad_x)
    # Those that share rows are neighbours, and among them those with a gradient.
    table.sort(key=lambda descriptor: (descriptor.space, descriptor.grad_x is None))
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
        planes=sums.partial.shape[1],
        n=n,
    )
    losses, metrics, weighted = reduce_sums(banks, sums)
    if walks:
        launch_rows(address, table, spaces, tiles, walks, row)
    return Losses(losses, metrics, weighted, sums.lse, kept, prototypes)


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
    sums: Tensor,
) -> None:  # fmt: skip
    """Launch `rows_kernel` for the gradients of all walks of the table.

    Args:
        sums: any tensor of the dtype of the sums.
    """
    n = spaces[0].shape[0]
    depths = _widths(table)
    sizes = choose(tiles.rows, max(depths), n)
    row_tiles = triton.cdiv(n, sizes.outer)
    items = row_tiles * walks
    launch(
        rows_kernel,
        min(items, WORKERS),
        sums,
        sizes.compiler,
        sweep_constants(spaces[0], sizes, sizes.outer, sizes.inner, depths),
        table=address,
        entries=len(table),
        row_tiles=row_tiles,
        **room(spaces, sums, items, sizes),
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


def _share_out(table: list[Descriptor], row_tiles: int, sizes: Sizes) -> tuple[int, list[int]]:
    """Describe which program sweeps what: (programs, into how many parts every bank is split).

    The tiles of all banks of a space are one sequence, of which every program takes a share of
    equal length; where there are rows enough, the share is all of it.
    """
    programs, splits = 0, [1] * len(table)
    for space in sorted({descriptor.space for descriptor in table}):
        members = [e for e, descriptor in enumerate(table) if descriptor.space == space]
        tiles = [triton.cdiv(table[e].classes, sizes.inner) for e in members]
        share = share_of(sum(tiles), row_tiles)
        shares = triton.cdiv(sum(tiles), share)
        for e, before, count in zip(members, starts(tiles), tiles, strict=True):
            table[e].first_program, table[e].shares = programs, shares
            table[e].share_tiles, table[e].tiles_before = share, before
            splits[e] = (before + count - 1) // share - before // share + 1
        programs += row_tiles * shares
    return programs, splits
