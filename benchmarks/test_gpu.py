"""Claims on a GPU: the Triton kernels beside their peers, timed by CUDA events.

Nothing here has been run so far (docs/gpu.md); without a CUDA device every test is skipped. Run by
`make bench DEVICE=cuda`, which keeps the results with the device's name and the date.
"""

import copy
import statistics
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from contest import Step, check, gradients
from torch import Tensor

from fino_fast import Categorical, Continuous, FinoLoss, InfoNCE
from fino_fast.reference import contrastive_rows
from fino_fast.terms import ContrastiveCall, HeadCall
from fino_fast.terms import Step as Terms

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is present"),
]
ROUNDS, WARM_UP = 20, 3


def measure(benchmark: Any, steps: dict[str, Step], exact: list[Tensor]) -> None:
    """Benchmark `steps["triton"]`, its peers in turn with it, into `benchmark.extra_info`.

    Args:
        benchmark: pytest-benchmark's fixture.
        steps: contender → its step, forward and backward.
        exact: what each has to return, in fp64.

    Raises:
        AssertionError: a contender's result is wrong; nothing is timed.
    """
    peak: dict[str, float] = {}
    for name, step in steps.items():
        check(name, step(), exact)
        for _ in range(WARM_UP):
            step()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        peak[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(ROUNDS):
        for name, step in steps.items():
            times[name].append(_milliseconds(step))
    medians = {name: statistics.median(values) for name, values in times.items()}
    benchmark.extra_info |= {
        "device": torch.cuda.get_device_name(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "milliseconds": medians,
        "speed-up": {name: value / medians["triton"] for name, value in medians.items()},
        "peak MB": peak,
    }

    def synchronised() -> None:
        steps["triton"]()
        torch.cuda.synchronize()

    benchmark.pedantic(synchronised, rounds=ROUNDS)


def _milliseconds(step: Step) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


@pytest.mark.parametrize("classes", [100, 10_000, 100_000])
@pytest.mark.parametrize("rows", [8192, 32768])
def test_linear_head(benchmark: Any, rows: int, classes: int) -> None:
    """bf16, D = 768, without a bias: not every peer takes one."""
    from cut_cross_entropy import linear_cross_entropy
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    from fino_fast.triton import Triton

    torch.manual_seed(0)
    make = {"device": "cuda", "dtype": torch.bfloat16}
    x = torch.randn(rows, 768, **make).requires_grad_()
    weight = (torch.randn(classes, 768, **make) * 0.02).requires_grad_()
    target = torch.randint(0, classes, (rows,), device="cuda")
    bias, inv_count = torch.zeros(classes, device="cuda"), torch.tensor(1 / rows, device="cuda")
    leaves = [x, weight]
    liger, backend = LigerFusedLinearCrossEntropyLoss(), Triton()

    def dense(x: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, weight), target)

    def triton() -> Tensor:
        call = HeadCall("linear", x, weight, bias, target, inv_count)
        return backend.step(Terms(heads=[call])).guides

    torch.compiler.reset()
    compiled = torch.compile(dense)
    losses: dict[str, Callable[[], Tensor]] = {
        "triton": triton,
        "eager": lambda: dense(x, weight),
        "torch.compile": lambda: compiled(x, weight),
        "liger": lambda: liger(weight, x, target),
        "cut_cross_entropy": lambda: linear_cross_entropy(x, weight, target),
        "chunked": lambda: F.linear_cross_entropy(x, weight, target),
    }
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact = gradients(dense(*wide), wide)
    steps = {name: lambda loss=loss: gradients(loss(), leaves) for name, loss in losses.items()}
    measure(benchmark, steps, exact)


@pytest.mark.parametrize("images", [1024, 4096, 16384])
def test_contrastive(benchmark: Any, images: int) -> None:
    """NT-Xent in bf16, V = 2, P = 256."""
    from fino_fast.triton import Triton

    torch.manual_seed(0)
    p = torch.randn(2 * images, 256, device="cuda", dtype=torch.bfloat16).requires_grad_()
    scale, backend = torch.tensor(10.0, device="cuda"), Triton()

    def dense(p: Tensor) -> Tensor:
        return contrastive_rows(p, p, scale, 2).mean()

    torch.compiler.reset()
    compiled = torch.compile(dense)
    losses: dict[str, Callable[[], Tensor]] = {
        "triton": lambda: backend.step(Terms(ContrastiveCall(p, scale, 2))).contrastive,
        "eager": lambda: dense(p),
        "torch.compile": lambda: compiled(p),
    }
    wide = p.detach().double().requires_grad_()
    exact = gradients(dense(wide), [wide])
    steps = {name: lambda loss=loss: gradients(loss(), [p]) for name, loss in losses.items()}
    measure(benchmark, steps, exact)


@pytest.mark.parametrize("images", [512, 4096])
def test_whole_loss(benchmark: Any, images: int) -> None:
    """Four factors of three kinds, orthogonal terms and all, as `FinoLoss` computes them."""
    torch.manual_seed(0)
    fused = FinoLoss(
        768,
        [
            Categorical("class", 35, head="linear", orthogonal=0.01),
            Categorical("plate", 5000, role="suppress", orthogonal=0.1),
            Categorical("site", 100, role="suppress", head="linear"),
            Continuous("exposure", role="suppress", activation="sigmoid"),
        ],
        contrastive=InfoNCE(0.1),
        backend="triton",
    ).to("cuda")
    z = torch.randn(2, images, 768, device="cuda")
    metadata = {
        "class": torch.randint(-1, 35, (images,), device="cuda"),
        "plate": torch.randint(-1, 5000, (images,), device="cuda"),
        "site": torch.randint(-1, 100, (images,), device="cuda"),
        "exposure": torch.rand(images, device="cuda"),
    }
    fused(z, metadata)  # fills the bank
    fused.eval()  # it stays as it is: every contender computes the same
    eager = copy.deepcopy(fused)
    eager.backend = "eager"
    wide = copy.deepcopy(eager).double()
    exact_z = z.double().requires_grad_()
    exact = gradients(wide(exact_z, metadata), [exact_z])
    torch.compiler.reset()
    z.requires_grad_()
    losses = {
        "triton": fused,
        "triton, compiled": torch.compile(fused),
        "eager": eager,
        "torch.compile": torch.compile(eager),
    }
    steps = {
        name: lambda loss=loss: gradients(loss(z, metadata), [z]) for name, loss in losses.items()
    }
    measure(benchmark, steps, exact)
