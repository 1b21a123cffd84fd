"""All ranks as one batch: value, gradients and banks against one process on the whole batch.

The processes are started once and run all cases; the tests compare what they saved.
"""

import multiprocessing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from loss_case import CPU_BACKENDS, NAN, embeddings, labels, values
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from fino_fast import Categorical, Continuous, FinoLoss, InfoNCE, LambdaSchedule

WORLDS = (4, 2)
IMAGES, WIDTH, DIM, STEPS = 8, 5, 6, 3  # IMAGES of the whole batch
CLOSE = {"rtol": 1e-6, "atol": 1e-9}


@dataclass(frozen=True)
class Case:
    views: int = 2
    contrastive: InfoNCE | None = field(default_factory=lambda: InfoNCE(0.2))
    balance: bool = False
    concentration: str = "fixed"
    teacher: bool = False


CASES = {
    "nt-xent": Case(),
    "three views, learnable": Case(views=3, contrastive=InfoNCE(0.2, learnable=True)),
    "two towers": Case(contrastive=InfoNCE(0.2, two_tower=True), concentration="ema"),
    "guides only, balanced": Case(views=1, contrastive=None, balance=True, teacher=True),
    "two learnable towers, balanced": Case(
        contrastive=InfoNCE(0.2, learnable=True, two_tower=True), balance=True, teacher=True
    ),
}
COMPILED = "two learnable towers, balanced"


class Model(nn.Module):
    """A backbone, a projector and the loss in one module, as a data-parallel wrapper wants it."""

    def __init__(self, case: Case, backend: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone, self.projector = nn.Linear(WIDTH, DIM), nn.Linear(DIM, 4)
        self.case = case
        self.criterion = FinoLoss(
            DIM,
            [
                Categorical("cell_line", 5, head="linear", weight=0.5, orthogonal=0.3, hidden=(7,)),
                Categorical("plate", 6, role="suppress", weight=0.4, orthogonal=0.2,
                            temperature=0.25, momentum=0.75, concentration=case.concentration),
                Continuous("exposure", 2, role="suppress", weight=0.6, orthogonal=0.4,
                           activation="tanh"),
                # Of every view by itself.
                Continuous("scale", weight=0.2, orthogonal=0.5, hidden=(3,)),
            ],
            contrastive=case.contrastive,
            schedule=LambdaSchedule("linear"),
            balance=case.balance,
            backend=backend,
        )  # fmt: skip

    def forward(
        self, x: Tensor, metadata: dict[str, Tensor], teacher: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        z = self.backbone(x)
        return self.criterion(
            z,
            metadata,
            projections=None if self.case.contrastive is None else self.projector(z),
            teacher=teacher,
            return_terms=True,
        )


def batch(case: Case, step: int) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
    """The whole batch. Missing entries are uneven: the first half has no plate in step 1."""
    x = embeddings(case.views, IMAGES, WIDTH, seed=step).detach()
    plate = labels(IMAGES, 6, missing=1, seed=10 + step)
    exposure = values(IMAGES, 2, missing=5, seed=20 + step)
    if step == 1:
        plate[: IMAGES // 2], exposure[IMAGES // 4 :] = -1, NAN
    cell_line = labels(IMAGES, 5, missing=3, seed=30 + step)
    if step == 2:
        cell_line[:] = -1
    scale = values(case.views * IMAGES, 1, missing=2, seed=50 + step).view(case.views, IMAGES)
    metadata = {"cell_line": cell_line, "plate": plate, "exposure": exposure, "scale": scale}
    teacher = embeddings(2, IMAGES, DIM, seed=40 + step).detach() if case.teacher else None
    return x, metadata, teacher


def local(value: Tensor, dim: int) -> Tensor:
    world, rank = dist.get_world_size(), dist.get_rank()
    return value.chunk(world, dim)[rank].contiguous()


def whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def run(model: nn.Module, case: Case, spread: bool) -> list[dict[str, Tensor]]:
    """Some optimiser steps; per step the loss, the terms, the gradients and the state after it."""
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    records = []
    for step in range(STEPS):
        x, metadata, teacher = batch(case, step)
        if spread:
            x = local(x, 1)
            metadata = {name: local(v, int(name == "scale")) for name, v in metadata.items()}
            teacher = None if teacher is None else local(teacher, 1)
        inner.criterion.set_progress((step + 1) / STEPS)
        loss, terms = model(x, metadata, teacher)
        optimizer.zero_grad()
        loss.backward()
        record = {"loss": loss.detach()} | {f"term {name}": term for name, term in terms.items()}
        for name, parameter in inner.named_parameters():
            if parameter.grad is not None:
                record[f"gradient {name}"] = whole(parameter.grad).clone()
        optimizer.step()
        for name, value in inner.state_dict().items():
            record[f"state {name}"] = whole(value).clone()
        records.append(record)
    return records


def refusal(rank: int, compiler: str | None) -> str:
    """What FinoLoss says where the first rank has an image more than the others."""
    images = 3 + (rank == 0)
    criterion = FinoLoss(DIM, contrastive=InfoNCE(0.2), backend="eager")
    call = torch.compile(criterion, fullgraph=True, backend=compiler) if compiler else criterion
    try:
        call(torch.randn(2, images, DIM), {})
    except ValueError as error:
        return str(error)
    return "accepted"


def collectives(factors: int) -> int:
    """How many a step takes, forward and backward."""
    kinds = [Categorical(f"f{f}", 3, head="linear", orthogonal=0.1) for f in range(factors)]
    criterion = FinoLoss(DIM, kinds, contrastive=InfoNCE(0.2), backend="eager")
    metadata = {f"f{f}": torch.zeros(4, dtype=torch.int64) for f in range(factors)}
    with patch.object(dist, "all_reduce", wraps=dist.all_reduce) as reduce:
        criterion(torch.randn(2, 4, DIM, requires_grad=True), metadata).backward()
    return reduce.call_count


def worker(rank: int, folder: str) -> None:
    """Rank of a group of four, then of a group of two, which only the first two enter."""
    torch.set_num_threads(1)
    for world in WORLDS:
        if rank >= world:
            continue
        rendezvous = f"file://{folder}/rendezvous{world}"
        dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world)
        results: dict[str, Any] = {}
        for backend in CPU_BACKENDS:
            for name, case in CASES.items():
                wrapped = DistributedDataParallel(
                    Model(case, backend).double(),
                    # Without a contrastive term the projector takes no part.
                    find_unused_parameters=case.contrastive is None,
                )
                results[f"ddp {backend} {name}"] = run(wrapped, case, spread=True)
        case = CASES["three views, learnable"]
        sharded, mesh = Model(case, "eager").double(), init_device_mesh("cpu", (world,))
        fully_shard(sharded.backbone, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        results["fsdp"] = run(sharded, case, spread=True)
        results["unequal"] = [refusal(rank, compiler) for compiler in (None, "aot_eager")]
        results["collectives"] = [collectives(factors) for factors in (1, 3)]
        if world == 2:
            for backend in CPU_BACKENDS:
                model = Model(CASES[COMPILED], backend).double()
                model.forward = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
                wrapped = DistributedDataParallel(model)
                results[f"compiled {backend}"] = run(wrapped, CASES[COMPILED], spread=True)
        torch.save(results, Path(folder) / f"world{world}rank{rank}.pt")
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all ranks of all groups saved what they saw."""
    folder = tmp_path_factory.mktemp("ranks")
    # One server imports PyTorch, and forks the ranks before any thread has started.
    multiprocessing.set_forkserver_preload([__name__, "torch._dynamo"])
    torch.multiprocessing.start_processes(
        worker, (str(folder),), nprocs=max(WORLDS), start_method="forkserver"
    )
    return folder


@pytest.fixture(params=WORLDS)
def ranks(request: pytest.FixtureRequest, folder: Path) -> list[Any]:
    """What every rank of a group saved."""
    return [
        torch.load(folder / f"world{request.param}rank{rank}.pt", weights_only=True)
        for rank in range(request.param)
    ]


def assert_one_batch(ranks: list[Any], key: str, case: Case, backend: str) -> None:
    alone = run(Model(case, backend).double(), case, spread=False)
    for rank, results in enumerate(ranks):
        for step, (record, expected) in enumerate(zip(results[key], alone, strict=True)):
            assert record.keys() == expected.keys()
            for name, value in expected.items():
                torch.testing.assert_close(
                    record[name],
                    value,
                    **CLOSE,
                    msg=lambda m, w=f"rank {rank}, step {step}, {name}": f"{w}: {m}",
                )


@pytest.mark.parametrize("name", CASES)
def test_ddp_equals_one_process(ranks: list[Any], backend: str, name: str) -> None:
    assert_one_batch(ranks, f"ddp {backend} {name}", CASES[name], backend)


def test_fsdp2_equals_one_process(ranks: list[Any]) -> None:
    case = CASES["three views, learnable"]
    assert_one_batch(ranks, "fsdp", case, "eager")


def test_unequal_batches_are_refused_on_every_rank(ranks: list[Any]) -> None:
    counts = [4] + [3] * (len(ranks) - 1)
    for results in ranks:
        for said in results["unequal"]:
            assert f"same number of images, found by rank {counts}" in said


def test_the_guides_of_all_factors_share_their_collectives(ranks: list[Any]) -> None:
    few, many = ranks[0]["collectives"]
    # But for the gradient of each orthogonal term.
    assert many - few == 2


@pytest.mark.parametrize("ranks", [2], indirect=True)
def test_a_compiled_model_in_ddp_equals_one_process(ranks: list[Any], backend: str) -> None:
    """As one graph, collectives included."""
    assert_one_batch(ranks, f"compiled {backend}", CASES[COMPILED], backend)


def test_the_cases_do_what_they_say() -> None:
    """The comparison above is not of zeros: the banks fill, gradients flow, a guide is empty."""
    for case in CASES.values():
        first, second, third = run(Model(case, "eager").double(), case, spread=False)
        assert first["gradient backbone.weight"].abs().max() > 1e-3
        assert second["state criterion.heads.plate.counts"].sum() > 0
        assert third["term cell_line"] == 0
        assert not torch.equal(
            second["state criterion.heads.plate.centroids"],
            third["state criterion.heads.plate.centroids"],
        )
