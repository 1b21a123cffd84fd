"""What torchrun starts twice: the command line, then the averaging of batch statistics."""

import os
import sys

import torch
import torch.distributed as dist

from fino_fast.cli import main
from fino_fast.train.learner import average_buffers


def check_averaging(store: str) -> None:
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    norm = torch.nn.BatchNorm1d(3)
    norm.running_mean.fill_(float(rank))
    norm.num_batches_tracked.fill_(7)
    average_buffers(norm)
    assert norm.running_mean.tolist() == [0.5] * 3
    assert norm.num_batches_tracked == 7
    dist.destroy_process_group()


if __name__ == "__main__":
    store, *command = sys.argv[1:]
    code = main(command)
    check_averaging(store)
    sys.exit(code)
