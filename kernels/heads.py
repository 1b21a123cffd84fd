"""Metadata heads on a GPU: the operator `fino::heads_forward` as three launches."""

from dataclasses import dataclass
from functools import cached_property

import torch
import triton
from torch import Tensor

from .contrastive_forward import unit_stride
from .heads_finish import heads_finish_kernel
from .heads_sweep import heads_sweep_kernel
from .inverse_norms import inverse_norms, starts
from .launch import launch, sweep_constants
from .tiles import Tiles, tiles_for

LINEAR, PROTOTYPE = 0, 1  # numbers of kinds in `fino_fast.ops.KINDS`; the others are continuous
FINISH_BLOCK = 1024
# Programs that a sweep without gradient is split into at least, so that few rows fill a GPU.
WANTED_PROGRAMS = 512
MAX_SPLITS = 16  # partial sums of a row; bounds their memory at 20·MAX_SPLITS bytes a row


@dataclass
class Heads:
    """The table of one launch: entry f of every list describes head f; see `terms.HeadCall`.

    All x share a dtype, and so do all banks; the offsets are in the dtype of the sums.
    """

    x: list[Tensor]
    bank: list[Tensor]
    offset: list[Tensor]
    target: list[Tensor]
    inv_count: list[Tensor]
    counts: list[Tensor]
    kind: list[int]
    smoothing: list[float]

    @property
    def n(self) -> int:
        return self.x[0].shape[0]

    @cached_property
    def sum_dtype(self) -> torch.dtype:
        return torch.float64 if self.x[0].dtype == torch.float64 else torch.float32

    @cached_property
    def columns(self) -> dict[str, tuple[object, ...]]:
        """The table's columns that both kernels read.

        Where a head has no use for a column, another pointer of the same type stands in it.
        """
        continuous = [kind > PROTOTYPE for kind in self.kind]
        labels = next(
            (t for t, c in zip(self.target, continuous, strict=True) if not c),
            self.x[0].new_empty(0, dtype=torch.int64),
        )
        return {
            "x": tuple(self.x),
            "x_stride": tuple(x.stride(0) for x in self.x),
            "depth": tuple(x.shape[1] for x in self.x),
            "bank": tuple(self.bank),
            "bank_stride": tuple(bank.stride(0) for bank in self.bank),
            "classes": tuple(bank.shape[0] for bank in self.bank),
            "offset": tuple(self.offset),
            "target": tuple(
                labels if c else t for t, c in zip(self.target, continuous, strict=True)
            ),
            "values": tuple(
                t if c else o for t, o, c in zip(self.target, self.offset, continuous, strict=True)
            ),
            "inv_count": tuple(self.inv_count),
            "kind": tuple(self.kind),
            "smoothing": tuple(self.smoothing),
        }


def heads_forward(
    x: list[Tensor],
    bank: list[Tensor],
    offset: list[Tensor],
    target: list[Tensor],
    inv_count: list[Tensor],
    counts: list[Tensor],
    kind: list[int],
    smoothing: list[float],
    want_x: bool,
    want_bank: bool,
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """The operator `fino::heads_forward` on a GPU; arguments as in `fino_fast.ops.heads`.

    Three launches however many heads there are, as long as their rows are of one dtype and their
    banks too; every other pair of dtypes takes three more.

    Returns:
        (losses [F], metrics [F], ∂loss/∂x, ∂loss/∂bank, ∂loss/∂offset of every head); gradients
        in the dtype of the sums, empty where they were not asked for.
    """
    sums = torch.float64 if x[0].dtype == torch.float64 else torch.float32
    losses, metrics = (x[0].new_empty(len(x), dtype=sums) for _ in range(2))
    grad_x, grad_bank, grad_offset = ([losses] * len(x) for _ in range(3))
    for members in _by_dtypes(x, bank):
        table = Heads(
            [unit_stride(x[f]) for f in members],
            [unit_stride(bank[f]) for f in members],
            [offset[f].detach().to(sums).contiguous() for f in members],
            [
                target[f].contiguous() if kind[f] <= PROTOTYPE else target[f].to(sums).contiguous()
                for f in members
            ],
            [inv_count[f].to(sums) for f in members],
            [counts[f] for f in members],
            [kind[f] for f in members],
            [smoothing[f] for f in members],
        )
        results = _run(table, want_x, want_bank, losses, metrics, members)
        for all_of, some in zip((grad_x, grad_bank, grad_offset), results, strict=True):
            for f, gradient in zip(members, some, strict=True):
                all_of[f] = gradient
    return losses, metrics, grad_x, grad_bank, grad_offset


def _by_dtypes(x: list[Tensor], bank: list[Tensor]) -> list[list[int]]:
    """The heads by the dtypes of rows and bank, each group one table."""
    groups: dict[tuple[torch.dtype, torch.dtype], list[int]] = {}
    for f in range(len(x)):
        groups.setdefault((x[f].dtype, bank[f].dtype), []).append(f)
    return list(groups.values())


def _run(
    table: Heads,
    want_x: bool,
    want_bank: bool,
    losses: Tensor,
    metrics: Tensor,
    slot: list[int],
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Fill entry slot[f] of `losses` and `metrics`; return the gradients of every head."""
    first = table.x[0]
    tiles = tiles_for(first)
    heads, n = len(table.x), table.n
    row_tiles = triton.cdiv(n, tiles.rows)
    splits = [
        1 if want_x or want_bank else _splits(table, f, row_tiles, tiles) for f in range(heads)
    ]
    slices = [triton.cdiv(x.shape[1], tiles.width) for x in table.x]
    sizes = [n * count for count in splits]
    partial = losses.new_empty(4, sum(sizes))
    best = losses.new_empty(sum(sizes), dtype=torch.int32)
    row_norms, bank_norms = _norms(table, losses)
    parts = slices if want_x else splits
    programs = [row_tiles * count for count in parts]
    gradient = [_empty(x, losses, want_x) for x in table.x]
    shared = {
        "first_partial": starts(sizes),
        "partial": partial,
        "planes": partial.shape[1],
        "n": n,
    }
    launch(
        heads_sweep_kernel,
        sum(programs),
        first,
        tiles,
        sweep_constants(first, tiles) | {"GRADIENT": want_x},
        **table.columns,
        **shared,
        counts=tuple(table.counts),
        row_norms=tuple(row_norms),
        bank_norms=tuple(bank_norms),
        gradient=tuple(gradient),
        parts=tuple(parts),
        first_program=starts(programs),
        best_out=best,
    )
    trained = [want_bank and kind != PROTOTYPE for kind in table.kind]
    grad_bank = [_empty(b, losses, t) for b, t in zip(table.bank, trained, strict=True)]
    grad_offset = [_empty(o, losses, t) for o, t in zip(table.offset, trained, strict=True)]
    programs = [
        triton.cdiv(bank.shape[0], tiles.columns) * count if wanted else 0
        for bank, count, wanted in zip(table.bank, slices, trained, strict=True)
    ]
    launch(
        heads_finish_kernel,
        heads + sum(programs),
        first,
        tiles,
        sweep_constants(first, tiles) | {"BLOCK": FINISH_BLOCK},
        **table.columns,
        **shared,
        grad_bank=tuple(grad_bank),
        grad_offset=tuple(grad_offset),
        first_program=starts(programs),
        splits=tuple(splits),
        best=best,
        losses=losses,
        metrics=metrics,
        slot=tuple(slot),
        heads=heads,
    )
    return gradient, grad_bank, grad_offset


def _empty(like: Tensor, sums: Tensor, wanted: bool) -> Tensor:
    return sums.new_empty(like.shape if wanted else 0)


def _splits(table: Heads, f: int, row_tiles: int, tiles: Tiles) -> int:
    """Into how many programs the sweep of one tile of rows over bank `f` is split."""
    bank_tiles: int = triton.cdiv(table.bank[f].shape[0], tiles.columns)
    return max(1, min(MAX_SPLITS, bank_tiles, WANTED_PROGRAMS // row_tiles))


def _norms(table: Heads, sums: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Inverse norms of rows and bank of every prototype head; heads on one x share its norms."""
    row_norms, bank_norms = ([sums] * len(table.x) for _ in range(2))
    prototypes = [f for f, kind in enumerate(table.kind) if kind == PROTOTYPE]
    if not prototypes:
        return row_norms, bank_norms
    spaces = {_space(table.x[f]): table.x[f] for f in prototypes}
    norms = inverse_norms([*spaces.values(), *(table.bank[f] for f in prototypes)])
    of_space = dict(zip(spaces, norms, strict=False))
    for f, bank_norm in zip(prototypes, norms[len(spaces) :], strict=True):
        row_norms[f], bank_norms[f] = of_space[_space(table.x[f])], bank_norm
    return row_norms, bank_norms


def _space(x: Tensor) -> tuple[int, torch.Size, tuple[int, ...]]:
    return x.data_ptr(), x.shape, x.stride()
