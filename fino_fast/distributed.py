"""All ranks as one batch: the collectives of the loss.

Convention: every rank returns the loss of the whole batch, and its gradients are W times its own
share of that loss's gradients, so that the *average* over W ranks that DDP and FSDP take is the
gradient of the whole batch. Every rank must have the same number of rows.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of ranks of the default process group; 1 where none is initialised."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's rank in the default group; 0 where none is initialised."""
    return dist.get_rank() if world_size() > 1 else 0


def check_images(images: int, device: torch.device) -> None:
    """Every rank must bring the same number of images: the gathers below rely on it.

    It is a collective, and the host waits for its answer.

    Raises:
        ValueError: they differ; on every rank, with all numbers.
    """
    if world_size() == 1:
        return
    mine = torch.tensor([images], device=device)
    counts = [torch.empty_like(mine) for _ in range(world_size())]
    dist.all_gather(counts, mine)
    found = torch.cat(counts).tolist()
    if len(set(found)) > 1:
        raise ValueError(
            f"every rank must have the same number of images, found by rank {found}; leave out the "
            "last incomplete batch (drop_last=True), or share its images out evenly"
        )


def sum_over_ranks(value: Tensor) -> Tensor:
    """Sum of a tensor over all ranks; without gradient."""
    value = value.detach()
    if world_size() > 1:
        value = value.clone()
        dist.all_reduce(value)
    return value


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        world = world_size()
        gathered = rows.new_empty(world, *rows.shape)
        dist.all_gather(list(gathered.unbind(0)), rows.contiguous())
        return gathered

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        return gradient[rank()]


def gather_views(rows: Tensor, views: int) -> Tensor:
    """The view-major rows of all ranks as one view-major batch; with gradient.

    The gradient that reaches a row is the sum of what all ranks send to it.

    Args:
        rows: [V·B, …], row r = v·B + b.
        views: V.

    Returns:
        [V·W·B, …]: image b of rank w is image w·B + b of the whole batch.
    """
    world = world_size()
    if world == 1:
        return rows
    gathered: Tensor = _Gather.apply(rows)  # [W, V·B, …]
    shape = rows.shape[1:]
    return gathered.view(world, views, -1, *shape).transpose(0, 1).reshape(-1, *shape)
