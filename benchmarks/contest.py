"""Contenders side by side: the same work, checked first, in interleaved rounds.

A shared or throttled machine changes its speed within seconds. So every round runs all contenders
once, one after another, and what is reported is the ratio of the medians, with the matrix-product
rate measured in the same rounds beside it.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Step = Callable[[], list[Tensor]]  # one forward + backward; returns loss and gradients


def measure(
    benchmark: Any,
    steps: dict[str, Step],
    *,
    flops: float,
    exact: list[Tensor],
    rounds: int = 5,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Benchmark `steps["native"]` and put its peers beside it into `benchmark.extra_info`.

    Args:
        benchmark: pytest-benchmark's fixture.
        steps: contender → its step; `native` is ours.
        flops: of the matrix products that the work needs; the share of the machine's rate counts
            these and no others.
        exact: what `eager` returns in fp64: every contender is held against it before it is timed.
        rounds: interleaved rounds.
        dtype: of the products of the measured rate.

    Raises:
        AssertionError: a contender's result is wrong; nothing is timed.
    """
    for name, step in steps.items():
        check(name, step(), exact)
    times: dict[str, list[float]] = {name: [] for name in (*steps, "gemm")}
    square = torch.randn(2048, 2048).to(dtype)

    def peers() -> None:
        for name, step in (*steps.items(), ("gemm", lambda: square @ square)):
            if name != "native":
                times[name].append(_seconds(step))

    def ours() -> None:
        times["native"].append(_seconds(steps["native"]))

    benchmark.pedantic(ours, setup=peers, rounds=rounds, warmup_rounds=1)
    median = {name: statistics.median(values[1:]) for name, values in times.items()}
    rate = 2 * 2048**3 / median.pop("gemm")
    benchmark.extra_info.update(
        seconds=median,
        speedup={name: median[name] / median["native"] for name in median if name != "native"},
        memory_mb={name: peak_memory(step) for name, step in steps.items()},
        gemm_gflops=rate / 1e9,
        gemm_share=flops / median["native"] / rate,
    )


def check(name: str, result: list[Tensor], exact: list[Tensor]) -> None:
    """Raises AssertionError where a contender is off by more than its precision explains."""
    assert len(result) == len(exact)
    for mine, true in zip(result, exact, strict=True):
        tolerance = {torch.float32: 2e-4, torch.bfloat16: 5e-2}[mine.dtype]
        error = (mine.double() - true).norm() / true.norm()
        assert error <= tolerance, f"{name} is off by {error:.1e}; it is not timed"


def peak_memory(step: Step) -> float:
    """MB by which the resident memory peaks above where it starts, results included."""
    status = Path("/proc/self/status")
    if not status.exists():
        return float("nan")

    def high_water() -> float:
        line = next(ln for ln in status.read_text().splitlines() if ln.startswith("VmHWM"))
        return int(line.split()[1]) / 1024

    Path("/proc/self/clear_refs").write_text("5")  # the mark falls to what is resident now
    before = high_water()
    step()
    return high_water() - before


def _seconds(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def gradients(loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """[loss, gradient of every leaf]; the leaves' own `.grad` stay empty."""
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]
