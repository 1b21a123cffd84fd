"""Claims on a GPU: the Triton kernels beside their peers, timed by CUDA events.

Nothing here has been run so far (docs/gpu.md); without a CUDA device every test is skipped. Run by
`make bench DEVICE=cuda`, which keeps the results with the device's name and the date.
"""

import statistics
import warnings
from datetime import UTC, datetime
from typing import Any

import pytest
import torch
from contest import Step, check

gpu_contenders = pytest.importorskip(
    "gpu_contenders", reason="triton comes with torch's CUDA builds only"
)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is present"),
]
BF16 = {"device": "cuda", "dtype": torch.bfloat16}
ROUNDS, WARM_UP = 20, 3


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch.manual_seed(0)
    torch.compiler.reset()


def measure(benchmark: Any, contest: Any) -> None:
    """Benchmark ours, its peers in turn with it, into `benchmark.extra_info`.

    A peer that is not installed, fails, runs out of memory or returns something wrong is not
    timed; `left out` and a warning say why.

    Args:
        benchmark: pytest-benchmark's fixture.
        contest: a `gpu_contenders.Contest`.

    Raises:
        AssertionError: our result is wrong; nothing is timed.
    """
    exact = contest.exact()
    left_out: dict[str, str] = {}
    peak: dict[str, float] = {}
    for name, step in contest.steps.items():
        try:
            check(name, step(), exact)
            peak[name] = _peak(step)
        except Exception as error:
            if name == "triton":
                raise
            left_out[name] = f"{type(error).__name__}: {error}"[:500]
            warnings.warn(f"{name} is not measured: {left_out[name]}", stacklevel=2)
    steps = {name: contest.steps[name] for name in peak}
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
        "left out": left_out,
    }

    def synchronised() -> None:
        steps["triton"]()
        torch.cuda.synchronize()

    benchmark.pedantic(synchronised, rounds=ROUNDS)


def _peak(step: Step) -> float:
    """MB that a step takes at most, after a few others."""
    for _ in range(WARM_UP):
        step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


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
    measure(benchmark, gpu_contenders.linear_head(rows, classes, 768, BF16))


@pytest.mark.parametrize("images", [1024, 4096, 16384])
def test_contrastive(benchmark: Any, images: int) -> None:
    measure(benchmark, gpu_contenders.contrastive(images, 256, BF16))


@pytest.mark.parametrize("images", [512, 4096])
def test_whole_loss(benchmark: Any, images: int) -> None:
    measure(benchmark, gpu_contenders.whole_loss(images, 768, "cuda"))
