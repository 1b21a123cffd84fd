"""Grouping of rows by label in arrays whose shape does not depend on the labels.

`torch.unique` gives an array as long as there are groups: on a GPU the host must wait for that
number, and a compiled graph breaks at it. Here there are always N group slots for N rows, of which
the last ones stay empty; the cost does not depend on the size of the vocabulary.
"""

import torch
from torch import Tensor


def group_slots(labels: Tensor) -> Tensor:
    """Slot in [0, N) of every row's group, the same for equal labels, by ascending label.

    Args:
        labels: [N] int64.

    Returns:
        [N] int64.
    """
    ordered, order = torch.sort(labels, stable=True)
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    return torch.empty_like(order).scatter_(0, order, first.cumsum(0) - 1)


def group_sums(rows: Tensor, slots: Tensor) -> Tensor:
    """Sum of the rows of every group slot.

    Args:
        rows: [N, D] (or [N]); rows that take no part are zero.
        slots: [N] int64, from `group_slots`.

    Returns:
        [N, D] (or [N]); empty slots are zero.
    """
    return torch.zeros_like(rows).index_add(0, slots, rows)
