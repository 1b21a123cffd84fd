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


_checked: set[int] = set()  # losses whose ranks were found alike


@torch.library.custom_op("fino::check_images", mutates_args=())
def _check_operator(zero: Tensor, images: int, loss: int, always: bool) -> Tensor:
    # An operator without result would be left out of a compiled graph.
    if always or loss not in _checked:
        check_images(images, zero.device)
        _checked.add(loss)
    return zero.clone()


@_check_operator.register_fake
def _(zero: Tensor, images: int, loss: int, always: bool) -> Tensor:
    return torch.empty_like(zero)


def same_images(images: int, device: torch.device, loss: int, always: bool) -> Tensor | None:
    """`check_images`, in a graph of torch.compile too.

    Args:
        images: of this rank.
        device: of the rows.
        loss: number of the loss that asks; it gets its answer once.
        always: ask in every step.

    Returns:
        What `after` takes: the compiler may reorder what does not depend on each other.

    Raises:
        ValueError: as `check_images`.
    """
    if world_size() == 1:
        return None
    zero = _check_operator(torch.zeros((), device=device), images, loss, always)
    return zero if torch.compiler.is_compiling() else None


def after(checked: Tensor | None, tensor: Tensor) -> Tensor:
    """`tensor`, to be gathered after the check only."""
    return tensor if checked is None else tensor + checked.to(tensor.dtype)


# The collectives are operators: torch.compile meets them in backward passes too, where it cannot
# trace the calls themselves.
@torch.library.custom_op("fino::all_reduce", mutates_args=())
def _all_reduce(value: Tensor) -> Tensor:
    value = value.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(value)
    return value


@_all_reduce.register_fake
def _(value: Tensor) -> Tensor:
    return torch.empty_like(value, memory_format=torch.contiguous_format)


@torch.library.custom_op("fino::all_gather", mutates_args=())
def _all_gather(rows: Tensor) -> Tensor:
    gathered = rows.new_empty(world_size(), *rows.shape)
    dist.all_gather(list(gathered.unbind(0)), rows.contiguous())
    return gathered


@_all_gather.register_fake
def _(rows: Tensor) -> Tensor:
    return rows.new_empty(world_size(), *rows.shape)


def _all_gather_backward(ctx: Any, gradient: Tensor) -> Tensor:
    return sum_over_ranks(gradient)[rank()]


_all_gather.register_autograd(_all_gather_backward)


def sum_over_ranks(value: Tensor) -> Tensor:
    """Sum of a tensor over all ranks; without gradient."""
    value = value.detach()
    return value if world_size() == 1 else _all_reduce(value)


def whole(share: Tensor) -> Tensor:
    """This rank's shares of terms as the whole batch's terms.

    The value is the sum over ranks; the gradient is the share's times the number of ranks, because
    DDP averages over them.
    """
    world = world_size()
    if world == 1:
        return share
    return sum_over_ranks(share) + world * (share - share.detach())


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
    gathered: Tensor = _all_gather(rows)  # [W, V·B, …]
    shape = rows.shape[1:]
    return gathered.view(world, views, -1, *shape).transpose(0, 1).reshape(-1, *shape)
