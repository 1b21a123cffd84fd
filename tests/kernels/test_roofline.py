"""The formulas of the page against what the kernels do: counted in the interpreter."""

import importlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from fino_fast.kernels.backward import Upstream, backward
from fino_fast.kernels.bank import Bank
from fino_fast.kernels.epilogues import OVERLAP
from fino_fast.kernels.forward import forward
from fino_fast.kernels.launch import Launch, intercepted, run
from fino_fast.kernels.operands import Operands, Request
from fino_fast.kernels.page import write_between
from fino_fast.kernels.roofline import (
    Cost,
    combined,
    copied,
    gradient_sweep,
    rows_read,
    swept,
    table,
    values_read,
)
from fino_fast.kernels.tiles import INTERPRETER_TILES as TILES
from kernel_case import head_call, random, run_heads
from test_head_banks import heads_of_every_kind

from fino_fast.terms import ContrastiveCall, Kind, Step
from fino_fast.triton import Triton

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="counts the interpreter's own operations"
)
N, M, DEPTH = 64, 96, 96
SWEEP, ROWS, BANKS = TILES.sweeps[0], TILES.rows[0], TILES.banks[0]


@dataclass
class Counted:
    """Work of every launch, by kernel."""

    flops: dict[str, int] = field(default_factory=dict)
    moved: dict[str, int] = field(default_factory=dict)  # bytes loaded and stored
    watched: list[torch.Tensor] = field(default_factory=list)
    read: dict[str, list[int]] = field(default_factory=dict)  # bytes loaded from those
    kernel: str = ""

    def check(self, kernel: str, expected: Cost) -> None:
        assert self.flops.get(kernel, 0) == expected.flops
        # Vectors (norms, labels, log-sum-exps) are not in the formula.
        assert expected.moved / 1.15 <= self.moved[kernel] <= 1.15 * expected.moved


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counted]:
    builder = importlib.import_module("triton.runtime.interpreter").InterpreterBuilder
    counts = Counted()
    dot, load, store = (
        getattr(builder, name)
        for name in ("create_dot", "create_masked_load", "create_masked_store")
    )

    def add(to: dict[str, int], amount: Any) -> None:
        to[counts.kernel] = to.get(counts.kernel, 0) + int(amount)

    def count_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        add(counts.flops, 2 * a.data.shape[0] * a.data.shape[1] * b.data.shape[1])
        return dot(self, a, b, *rest)

    def count_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        size = pointers.get_element_ty().primitive_bitwidth // 8
        add(counts.moved, mask.data.sum() * size)
        read = counts.read.setdefault(counts.kernel, [0] * len(counts.watched))
        for i, tensor in enumerate(counts.watched):
            offset = pointers.data.astype("int64") - tensor.data_ptr()
            read[i] += int((mask.data & (offset >= 0) & (offset < tensor.nbytes)).sum()) * size
        return load(self, pointers, mask, *rest)

    def count_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        add(counts.moved, mask.data.sum() * pointers.get_element_ty().primitive_bitwidth // 8)
        return store(self, pointers, value, mask, *rest)

    monkeypatch.setattr(builder, "create_dot", count_dot)
    monkeypatch.setattr(builder, "create_masked_load", count_load)
    monkeypatch.setattr(builder, "create_masked_store", count_store)

    def runner(launch: Launch) -> None:
        counts.kernel = launch.kernel.__name__
        run(launch)

    with intercepted(runner):
        yield counts


def test_contrastive(counted: Counted, device: torch.device) -> None:
    p = random(N, DEPTH, dtype=torch.float32, seed=0).to(device).requires_grad_()
    one = torch.ones((), device=device)
    loss = Triton().step(Step(ContrastiveCall(p, one, 2))).contrastive
    assert loss is not None
    counted.check("operands_kernel", rows_read(N * DEPTH, 4) + copied(N * DEPTH, (4, 4)))
    loss.backward()
    counted.check("sweep_kernel", swept(N, N, DEPTH, 4, SWEEP))
    counted.check("rows_kernel", gradient_sweep(N, N, DEPTH, 4, ROWS, written=4))
    counted.check("combine_kernel", combined(N * DEPTH, 1, 4, 4))


@pytest.mark.parametrize("kind", ["linear", "prototype"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_heads(kind: Kind, dtype: torch.dtype, counted: Counted, device: torch.device) -> None:
    call = head_call(kind, N, DEPTH, M, dtype)
    run_heads([call], device)
    size, parts = dtype.itemsize, N // BANKS.inner
    if kind == "prototype":
        conversion = copied(M * DEPTH, (4, size)) + rows_read(2 * N * DEPTH, size)
        counted.check("operands_kernel", conversion)
    elif dtype != torch.float32:
        # In both passes; an fp32 bank is read as it is by fp32 rows.
        counted.check("operands_kernel", copied(2 * M * DEPTH, (4, size)))
    counted.check("sweep_kernel", swept(N, M, DEPTH, size, SWEEP))
    counted.check("rows_kernel", gradient_sweep(N, M, DEPTH, size, ROWS, written=4))
    combine = combined(N * DEPTH, 1, 4, size)
    if kind == "linear":
        back = gradient_sweep(M, N, DEPTH, size, BANKS, written=4, parts=parts)
        counted.check("banks_kernel", back)
        combine += combined(M * DEPTH, parts, 4, 4)
    counted.check("combine_kernel", combine)


@pytest.mark.parametrize("width", [SWEEP.holds, SWEEP.holds + 16])
def test_rows_are_read_once_for_all_banks_on_them(
    width: int, counted: Counted, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """In a sweep once for every share of the banks; once for every tile of a bank where there are
    rows too wide to be held in the step.
    """
    calls = heads_of_every_kind(N, width, M, torch.float32)
    alone = head_call("linear", N, 32, M, torch.float32, seed=50)
    x = calls[0].x
    tiles, tiles_alone = (
        sum(triton.cdiv(len(call.bank), SWEEP.inner) for call in of) for of in (calls, [alone])
    )
    calls.insert(2, alone)  # the banks on the same rows are not neighbours
    counted.watched = [x, alone.x]
    for shares in (1, 3):
        monkeypatch.setattr(
            "fino_fast.kernels.forward.WANTED_PROGRAMS", shares * triton.cdiv(N, SWEEP.outer)
        )
        counted.read.clear()
        run_heads(calls, device)
        held = width <= SWEEP.holds
        expected = [
            (shares if held else tiles) * x.nbytes,
            (shares if held else tiles_alone) * alone.x.nbytes,
        ]
        assert counted.read["sweep_kernel"] == expected
        # Besides what is along the rows, which unit rows of prototypes take off.
        along = int((calls[1].target >= 0).sum()) * width * x.itemsize
        expected = [
            (1 if held else tiles) * x.nbytes + along,
            (1 if held else tiles_alone) * alone.x.nbytes,
        ]
        assert counted.read["rows_kernel"] == expected
        # Balanced, all in the forward pass; heads are programs of their own where rows are few.
        counted.read.clear()
        run_heads(calls, device, balanced=True)
        walks = 1 if shares == 1 else len(calls) - 1
        expected[0] = (walks if held else tiles) * x.nbytes + along
        assert counted.read["rows_kernel"] == expected


@pytest.mark.parametrize("width", [BANKS.holds, BANKS.holds + 16])
def test_a_trained_bank_is_read_once_for_all_rows(
    width: int, counted: Counted, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """In the pass for its gradient, once for every part of the rows; wider ones for every tile."""
    monkeypatch.setattr("fino_fast.kernels.backward.MAX_SPLITS", 2)
    row_tiles = 5
    call = head_call("linear", row_tiles * BANKS.inner, width, M, torch.float32)
    counted.watched = [call.bank]
    run_heads([call], device)
    times = 2 if width <= BANKS.holds else row_tiles
    assert counted.read["banks_kernel"] == [times * call.bank.nbytes]


def test_overlap(counted: Counted, device: torch.device) -> None:
    u, m = (random(k, DEPTH, dtype=torch.float32, seed=k).to(device) for k in (N, M))
    one, none = torch.ones((), device=device), torch.empty(0, dtype=torch.int64, device=device)
    zeros = torch.zeros(M, device=device)
    bank = Bank(OVERLAP.value, 0, u, m, one, zeros, one / N, none, 0.0, 1.0, one)
    lse = forward([bank]).lse[0]
    backward([bank], [Upstream(one, lse, lse, True)], [u], [], False)
    parts = N // BANKS.inner
    counted.check("operands_kernel", copied(2 * N * DEPTH, (4, 4)))
    zeros_read = values_read(N * M, 4)
    at_rows = gradient_sweep(N, M, DEPTH, 4, ROWS, written=4)
    at_bank = gradient_sweep(M, N, DEPTH, 4, BANKS, written=4, parts=parts)
    counted.check("sweep_kernel", swept(N, M, DEPTH, 4, SWEEP) + zeros_read)
    counted.check("rows_kernel", at_rows + zeros_read)
    counted.check("banks_kernel", at_bank + zeros_read)
    counted.check("combine_kernel", combined(N * DEPTH, 1, 4, 4) + combined(M * DEPTH, parts, 4, 4))


def test_conversion(counted: Counted, device: torch.device) -> None:
    matrix = random(M, DEPTH, dtype=torch.float32, seed=0).to(device)
    Operands([Request(matrix)], matrix.new_empty(0, dtype=torch.float16)).launch([])
    counted.check("operands_kernel", copied(M * DEPTH, (4, 2)))


def test_the_page_has_the_table() -> None:
    page = Path(__file__).parents[2] / "docs" / "gpu.md"
    assert table() in page.read_text(encoding="utf-8")


def test_a_page_without_marks_is_left_alone(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("nothing here")
    with pytest.raises(ValueError, match="marks"):
        write_between(page, "roofline", "text")
    assert page.read_text() == "nothing here"
