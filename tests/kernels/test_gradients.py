"""Gradients of rows and banks: which are taken when, in how many parts, by how many programs."""

from dataclasses import replace

import pytest
import torch
from fino_fast.kernels.tiles import INTERPRETER_TILES, TILES, forced
from kernel_case import (
    check_heads,
    close,
    described,
    expected_head,
    head_call,
    launched,
    names,
    run_heads,
)
from test_head_banks import heads_of_every_kind
from torch import Tensor

from fino_fast.terms import Step
from fino_fast.triton import Triton


@pytest.mark.parametrize("programs", [1, 1000])
def test_gradients_at_the_rows_with_the_loss(
    programs: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that fill the GPU are walked once for all heads, fewer once for each."""
    monkeypatch.setattr("fino_fast.kernels.forward.WANTED_PROGRAMS", programs)
    calls = heads_of_every_kind(37, 40, 35, torch.float64)
    check_heads(calls, device, balanced=True)
    with launched() as seen:
        run_heads(calls, device, balanced=True)
    walks = [0] * len(calls) if programs == 1 else list(range(len(calls)))
    assert described(seen[0], len(calls), "walk") == walks
    assert described(seen[0], len(calls), "is_begun") == [0] * len(calls)


def test_heads_on_shared_and_on_own_rows(device: torch.device) -> None:
    shared = heads_of_every_kind(37, 20, 70, torch.float64)
    alone = head_call("linear", 37, 33, 7, torch.float64, seed=50)
    check_heads([shared[0], alone, *shared[1:]], device)


def test_prototype_heads_on_the_same_rows_have_one_gradient(device: torch.device) -> None:
    calls = [head_call("prototype", 9, 20, 40, torch.float64, seed=f) for f in range(5)]
    calls = [replace(call, x=calls[0].x if f < 3 else calls[3].x) for f, call in enumerate(calls)]
    check_heads(calls, device)
    with launched() as seen:
        run_heads(calls, device)
    assert names(seen) == ["operands", "sweep", "operands", "rows", "combine"]
    assert described(seen[2], len(calls), "walk") == [0, 0, 0, 1, 1]
    assert described(seen[2], len(calls), "is_begun") == [0, 1, 1, 0, 1]


@pytest.mark.usefixtures("small_tiles")
def test_rows_in_several_parts(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows than a chunk of coefficients, more tiles than parts."""
    monkeypatch.setattr("fino_fast.kernels.backward.MAX_SPLITS", 2)
    n = 5 * INTERPRETER_TILES.banks[0].inner + 5
    calls = [
        head_call("linear", n, 7, 3, torch.float64, seed=1),
        head_call("tanh", n, 7, 1, torch.float64, seed=2),
    ]
    with launched() as seen:
        check_heads(calls, device)
    _, backward = [x for x in seen if x.kernel.__name__ == "operands_kernel"]
    assert described(backward, 2, "parts") == [2, 2]
    assert described(backward, 2, "share")[0] > INTERPRETER_TILES.banks[0].chunk


@pytest.mark.usefixtures("small_tiles")
def test_a_bank_of_several_chunks(device: torch.device) -> None:
    classes = 2 * INTERPRETER_TILES.rows[0].chunk + 9
    check_heads(
        [
            head_call(kind, 35, 40, classes, torch.float64, seed=f)
            for f, kind in enumerate(("linear", "prototype", "sigmoid"))
        ],
        device,
    )


@pytest.mark.usefixtures("small_tiles")
def test_more_tiles_than_workers(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fino_fast.kernels.forward.WORKERS", 3)
    monkeypatch.setattr("fino_fast.kernels.backward.WORKERS", 3)
    with launched() as seen:
        check_heads(heads_of_every_kind(130, 20, 130, torch.float64), device)
    assert [x.arguments["workers"] for x in seen if "workers" in x.arguments] == [3, 3]


def test_gradients_of_the_parameters_alone(device: torch.device) -> None:
    """As where the embedding is frozen: nothing is swept for the rows."""
    call = head_call("linear", 37, 20, 35, torch.float64)
    bank, offset = (tensor.to(device).requires_grad_() for tensor in (call.bank, call.offset))
    moved = replace(
        call, x=call.x.to(device), bank=bank, offset=offset, target=call.target.to(device),
        inv_count=call.inv_count.to(device),
    )  # fmt: skip
    guides = Triton().step(Step(heads=[moved])).guides
    assert guides is not None
    with launched() as seen:
        found = torch.autograd.grad(guides, [bank, offset])
    _, _, _, *expected = expected_head(call)
    for gradient, wanted in zip(found, expected, strict=True):
        assert wanted is not None
        close(gradient.cpu(), wanted, torch.float64)
    assert names(seen) == ["operands", "banks", "combine"]


def test_what_was_kept_is_only_combined(device: torch.device) -> None:
    with launched() as seen:
        calls = [head_call("prototype", 5, 4, 40, torch.float32, seed=f) for f in range(3)]
        run_heads(calls, device, balanced=True)
    assert names(seen)[3:] == ["operands", "combine"]


def test_results_are_the_same_to_the_bit(device: torch.device) -> None:
    def gradients() -> list[Tensor | None]:
        found = run_heads(heads_of_every_kind(35, 20, 35, torch.float32), device)
        return [found.losses, *found.rows, *found.bank, *found.offset]

    for found, again in zip(gradients(), gradients(), strict=True):
        assert (found is None and again is None) or torch.equal(found, again)


def test_tiles_of_a_gpu(device: torch.device) -> None:
    tiles = TILES[9, torch.bfloat16]
    rows, banks = (
        tuple(replace(sizes, chunk=128) for sizes in every) for every in (tiles.rows, tiles.banks)
    )
    with forced(replace(tiles, rows=rows, banks=banks)):
        check_heads(heads_of_every_kind(140, 20, 260, torch.float16), device)
