"""Contenders side by side: the same work, checked first, in interleaved rounds.

A shared or throttled machine changes its speed within seconds. So ours runs before and after every
run of a peer, and a ratio is the peer's time over the mean of these two; reported is the median.
A plain matrix product stands between all runs. For the seconds, and for the share of the rate of
the products, of each contender's runs the half counts that stood between the fastest products: a
rule that looks at the machine alone, never at the contender.
"""

import ctypes
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any

import torch
from fino_fast._C import release_scratch
from torch import Tensor

Step = Callable[[], list[Tensor]]  # one forward + backward; returns loss and gradients
SIDE = 2048  # of the product whose rate is the machine's
SHORTEST = 0.02  # seconds; quicker steps are repeated within a run


def measure(
    benchmark: Any,
    steps: dict[str, Step],
    *,
    exact: list[Tensor] | Mapping[str, list[Tensor]],
    flops: float = 0.0,
    budget: float = 20.0,
) -> None:
    """Benchmark `steps["native"]` and put its peers beside it into `benchmark.extra_info`.

    Args:
        benchmark: pytest-benchmark's fixture.
        steps: contender → its step; `native` is ours.
        exact: what every contender (or, as a mapping, each) has to return, in fp64.
        flops: of the matrix products that the work needs; the share of the machine's rate counts
            these and no others. 0: there are none.
        budget: seconds that all rounds together should take; two rounds are run in any case.

    Raises:
        AssertionError: a contender's result is wrong; nothing is timed.
    """
    for name, step in steps.items():
        check(name, step(), exact[name] if isinstance(exact, Mapping) else exact)
    once: dict[str, float] = {}
    peak: dict[str, float] = {}
    saved: dict[str, float] = {}
    for name, step in steps.items():
        peak[name], saved[name] = memory(step)
        once[name] = _seconds(step)
    repeats = {name: max(1, round(SHORTEST / seconds)) for name, seconds in once.items()}
    square = torch.randn(SIDE, SIDE)

    def product() -> float:
        return _seconds(lambda: square @ square)

    product()
    peers = [name for name in steps if name != "native"]
    turns: list[str | None] = [*peers] or [None]  # what runs before each of ours but the first
    seconds = {name: once[name] * repeats[name] for name in steps}
    round_seconds = sum(
        seconds["native"] + product() + (seconds[name] + product() if name else 0.0)
        for name in turns
    )
    rounds = min(max(int(budget / round_seconds), 2), 9)
    times: dict[str, list[float]] = {name: [] for name in steps}
    products: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    next_turn = cycle(turns)
    before = product()

    def run(name: str) -> None:
        times[name].append(_seconds(steps[name], repeats[name]))

    def beside(name: str) -> None:
        nonlocal before
        after = product()
        products[name].append((before, after))
        before = after

    def peer() -> None:
        if times["native"]:
            beside("native")
            if name := next(next_turn):
                run(name)
                beside(name)

    benchmark.pedantic(
        lambda: run("native"), setup=peer, rounds=1 + rounds * len(turns), warmup_rounds=0
    )
    beside("native")

    around = [(first + second) / 2 for first, second in pairwise(times["native"])]
    ratios = {
        name: [
            theirs / ours for theirs, ours in zip(times[name], around[i :: len(peers)], strict=True)
        ]
        for i, name in enumerate(peers)
    }
    quiet = {name: _quiet_half(times[name], products[name]) for name in steps}
    median = {name: statistics.median(seconds for seconds, _ in quiet[name]) for name in steps}
    share = statistics.median(flops / seconds * beside for seconds, beside in quiet["native"])
    rate = 2 * SIDE**3 / statistics.median(beside for _, beside in quiet["native"])
    benchmark.extra_info.update(
        seconds=median,
        speedup={name: statistics.median(ratios[name]) for name in peers},
        memory_mb=peak,
        saved_mb=saved,
        rounds=rounds,
        calls_per_round=repeats["native"],
        gemm_gflops=rate / 1e9,
        gemm_share=share / (2 * SIDE**3),
    )


def _quiet_half(
    seconds: list[float], products: list[tuple[float, float]]
) -> list[tuple[float, float]]:
    """(seconds, mean seconds of the products beside it) of the half with the fastest products."""
    beside = [(before + after) / 2 for before, after in products]
    ranked = sorted(zip(seconds, beside, strict=True), key=lambda run: run[1])
    return ranked[: (len(ranked) + 1) // 2]


def check(name: str, result: list[Tensor], exact: list[Tensor]) -> None:
    """Raises AssertionError where a contender is off by more than its precision explains."""
    assert len(result) == len(exact)
    for mine, true in zip(result, exact, strict=True):
        # A loss comes in fp32 from bf16 products too.
        half = any(tensor.dtype == torch.bfloat16 for tensor in result)
        error = (mine.double() - true).norm() / true.norm()
        assert error <= (5e-2 if half else 2e-4), f"{name} is off by {error:.1e}; it is not timed"


def memory(step: Step) -> tuple[float, float]:
    """MB of one step: (resident peak above the start, what autograd keeps for the backward pass).

    The peak includes the results, what autograd keeps includes the leaves.
    """
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with (
        resident_peak() as peak,
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        step()
    return peak[0], sum(storages.values()) / 2**20


@contextmanager
def resident_peak() -> Iterator[list[float]]:
    """MB by which the resident memory peaks above where it starts; nan where it is not told."""
    peak = [float("nan")]
    status = Path("/proc/self/status")
    if not status.exists():
        yield peak
        return

    def high_water() -> float:
        line = next(ln for ln in status.read_text().splitlines() if ln.startswith("VmHWM"))
        return int(line.split()[1]) / 1024

    # What earlier steps left with the kernels or the allocator would be used again unseen.
    release_scratch()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the mark falls to what is resident now
    before = high_water()
    yield peak
    peak[0] = high_water() - before


def _seconds(step: Callable[[], object], repeats: int = 1) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    return (time.perf_counter() - start) / repeats


def gradients(loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """[loss, gradient of every leaf]; the leaves' own `.grad` stay empty."""
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]
