"""One process or several: what `torchrun` tells, and the process group made from it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from fino_fast.distributed import rank, world_size
from fino_fast.errors import ConfigError


@dataclass(frozen=True)
class World:
    """This process among those of the run."""

    rank: int
    size: int
    device: torch.device

    @property
    def gpus(self) -> list[torch.device]:
        """The GPU in use, if any."""
        return [self.device] if self.device.type == "cuda" else []

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.size > 1:
            dist.barrier()

    def largest(self, value: int) -> int:
        """The largest of the ranks' values, on every rank."""
        if self.size == 1:
            return value
        shared = torch.tensor(value, device=self.device)
        dist.all_reduce(shared, dist.ReduceOp.MAX)
        return int(shared)

    def total(self, value: int) -> int:
        """The sum of the ranks' values, on every rank."""
        if self.size == 1:
            return value
        shared = torch.tensor(value, device=self.device)
        dist.all_reduce(shared)
        return int(shared)


@contextmanager
def join_world(device: str) -> Iterator[World]:
    """Join the processes that torchrun started, if it did, and leave them at the end.

    A process group that the caller has initialised is used and left alone.

    Raises:
        ConfigError: no such device.
    """
    place = find_device(device)
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
    own = launched and not dist.is_initialized()
    if own:
        dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
    try:
        yield World(rank(), world_size(), place)
    finally:
        if own:
            dist.destroy_process_group()


def find_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device {name!r}: {str(error).splitlines()[0]}") from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(f"device {name!r}: this machine, or this PyTorch, has no CUDA")
        if ":" not in name:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        if device.index >= torch.cuda.device_count():
            raise ConfigError(f"device {name!r}: there are {torch.cuda.device_count()} GPUs")
        torch.cuda.set_device(device)
    return device
