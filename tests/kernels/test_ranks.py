"""All ranks as one batch, through the Triton kernels: each rank interprets them on the CPU.

Case, batches and comparison are those of tests/test_distributed.py; the orthogonal terms, whose
kernels take no fp64, have a case of their own.
"""

import ctypes
import multiprocessing
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from cuda_case import built_for_the_host, by_reference, call, categories, rows
from cuda_case import values as continuous
from interpreter import quick_interpreter
from test_distributed import CASES, WORLDS, Model, assert_one_batch, run
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from fino_fast import backends, cuda, ops, overlap
from fino_fast.factors import Role
from fino_fast.terms import Step

pytestmark = [
    pytest.mark.skipif(ops.LOAD_ERROR is not None, reason=str(ops.LOAD_ERROR)),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the ranks are processes on a CPU"),
]
NAME = "three views, learnable"
ROWS, WIDTH = 24, 5


def designs() -> list[tuple[Tensor, Role, int]]:
    """(design, role, classes) of the whole batch; one rank in four lacks the first."""
    missing = categories(ROWS, 3)
    missing[: ROWS // 4] = -1
    # More classes than a sweep is worth, and values of which some are missing.
    return [
        (missing, "preserve", 3),
        (categories(ROWS, 3, seed=5), "suppress", 3),
        (categories(ROWS, 20, seed=6), "preserve", 20),
        (continuous(ROWS, 2), "preserve", 0),
    ]


def orthogonal_terms(rank: int, world: int) -> dict[str, Tensor]:
    """R of all of them, and this rank's gradient of Σ (f + 1) · R_f."""
    from fino_fast.triton import Triton

    mine = slice(rank * ROWS // world, (rank + 1) * ROWS // world)
    z = rows(ROWS, WIDTH)[mine].requires_grad_()
    calls = [call(z, design[mine], role, classes) for design, role, classes in designs()]
    for f, of in enumerate(calls):
        of.weight = f + 1.0
    result = Triton().step(Step(orthogonal=calls))
    assert result.orthogonal is not None
    (gradient,) = torch.autograd.grad(result.orthogonal, z)
    return {"terms": torch.stack(result.overlaps), "gradient": gradient}


def worker(rank: int, folder: str) -> None:
    """Rank of a group of four, then of a group of two, which only the first two enter."""
    from fino_fast.triton import Triton

    torch.set_num_threads(1)
    backends._FUSED["native"] = Triton()
    library = ctypes.CDLL(f"{folder}/on_host.so")
    cuda._library = lambda: library
    cuda.serves_rows = lambda z: z.dtype in cuda.TYPES
    with quick_interpreter():
        for world in WORLDS:
            if rank < world:
                join(rank, world, folder)


def join(rank: int, world: int, folder: str) -> None:
    """One group, and what this rank sees in it."""
    rendezvous = f"file://{folder}/rendezvous{world}"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world)
    model = DistributedDataParallel(Model(CASES[NAME], "native").double())
    results = {NAME: run(model, CASES[NAME], spread=True)}
    torch.save(results, Path(folder) / f"world{world}rank{rank}.pt")
    orthogonal = orthogonal_terms(rank, world)
    torch.save(orthogonal, Path(folder) / f"orthogonal{world}rank{rank}.pt")
    # Before its group: the one that outlives it waits for ever in PyTorch 2.11 for a lock it holds.
    del model
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all ranks of all groups saved what they saw."""
    folder = tmp_path_factory.mktemp("ranks")
    built_for_the_host(folder)
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


def test_the_case_has_every_form() -> None:
    z = rows(ROWS, WIDTH)
    forms = {
        overlap._form(call(z, design, role, k), ROWS, min(k, ROWS) or 2, WIDTH)
        for design, role, k in designs()
    }
    assert forms == {overlap.SWEEP, overlap.SQUARES, overlap.SUPPRESS}


@pytest.mark.parametrize("world", WORLDS)
def test_orthogonal_terms_of_ranks_equal_those_of_the_whole_batch(world: int, folder: Path) -> None:
    ranks = [
        torch.load(folder / f"orthogonal{world}rank{rank}.pt", weights_only=True)
        for rank in range(world)
    ]
    whole = rows(ROWS, WIDTH).double()
    exact = [by_reference(whole, design, role) for design, role, _ in designs()]
    expected = torch.stack([term for term, _ in exact])
    # DDP averages what the ranks send.
    gradient = world * sum((f + 1) * at_z for f, (_, at_z) in enumerate(exact))
    for rank in ranks:
        torch.testing.assert_close(rank["terms"].double(), expected, rtol=1e-6, atol=1e-7)
    found = torch.cat([rank["gradient"] for rank in ranks]).double()
    assert float((found - gradient).abs().max()) <= 1e-6 * float(gradient.abs().max())
