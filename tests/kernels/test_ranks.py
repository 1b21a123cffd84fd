"""All ranks as one batch, through the Triton kernels: each rank interprets them on the CPU.

Case, batches and comparison are those of tests/test_distributed.py.
"""

import multiprocessing
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from test_distributed import CASES, WORLDS, Model, assert_one_batch, run
from torch.nn.parallel import DistributedDataParallel

from fino_fast import backends, ops

pytestmark = [
    pytest.mark.skipif(ops.LOAD_ERROR is not None, reason=str(ops.LOAD_ERROR)),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the ranks are processes on a CPU"),
]
NAME = "three views, learnable"


def worker(rank: int, folder: str) -> None:
    """Rank of a group of four, then of a group of two, which only the first two enter."""
    from fino_fast.triton import Triton

    torch.set_num_threads(1)
    backends._FUSED["native"] = Triton()
    for world in WORLDS:
        if rank >= world:
            continue
        rendezvous = f"file://{folder}/rendezvous{world}"
        dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world)
        model = DistributedDataParallel(Model(CASES[NAME], "native").double())
        results = {NAME: run(model, CASES[NAME], spread=True)}
        torch.save(results, Path(folder) / f"world{world}rank{rank}.pt")
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all ranks of all groups saved what they saw."""
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.set_forkserver_preload([__name__, "fino_fast.triton", "torch._dynamo"])
    torch.multiprocessing.start_processes(
        worker, (str(folder),), nprocs=max(WORLDS), start_method="forkserver"
    )
    return folder


@pytest.mark.parametrize("world", WORLDS)
def test_ranks_equal_one_process(world: int, folder: Path) -> None:
    ranks = [
        torch.load(folder / f"world{world}rank{rank}.pt", weights_only=True)
        for rank in range(world)
    ]
    assert_one_batch(ranks, NAME, CASES[NAME], "eager")
