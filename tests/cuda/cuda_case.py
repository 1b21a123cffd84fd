"""The kernels of csrc/cuda on the host, and the rows they are tested with."""

import ctypes

import torch
from torch import Tensor

SHAPES = [(1, 1, 1), (1, 5, 3), (2, 33, 1), (13, 70, 4), (40, 31, 100), (300, 3, 2)]


def run_from_the_last_thread(library: ctypes.CDLL, reverse: bool) -> None:
    """The order in which the threads of a block run between two barriers."""
    library.host_order(ctypes.c_bool(reverse))


def rows(n: int, width: int, seed: int = 0) -> Tensor:
    """[N, D] normal numbers far from zero."""
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed)) + 10


def categories(n: int, classes: int, seed: int = 1) -> Tensor:
    """[N], a tenth of them missing."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (n,), generator=generator)
    return labels.masked_fill_(torch.rand(n, generator=generator) < 0.1, -1)


def values(n: int, width: int, seed: int = 2) -> Tensor:
    """[N, d], some rows missing, a constant column last where there are several."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.rand(n, width, generator=generator)
    if width > 1:
        y[:, -1] = 0.5
    y[torch.rand(n, generator=generator) < 0.2] = torch.nan
    return y


def missing(design: Tensor) -> Tensor:
    """[N], the rows that take no part."""
    return design < 0 if design.dim() == 1 else design.isnan().any(1)


def sorted_labels(designs: list[Tensor]) -> tuple[Tensor, Tensor]:
    """(order, sorted labels) [F, N] of categories and values."""
    labels = [
        design if design.dim() == 1 else torch.where(missing(design), -1, 0) for design in designs
    ]
    ordered, order = torch.sort(torch.stack(labels), stable=True)
    return order, ordered
