"""Gradients of rows and banks: which are taken when, in how many parts, by how many programs."""

from dataclasses import replace

import pytest
import torch
from fino_fast.kernels.heads import (
    PROTOTYPE,
    Heads,
    Upstream,
    heads_gradient,
    heads_loss,
)
from fino_fast.kernels.launch import Launch, intercepted, run
from fino_fast.kernels.tiles import INTERPRETER_TILES, TILES, forced
from kernel_case import check_heads, close, expected_head, head_call, run_heads
from test_heads_sweep import heads_of_every_kind
from torch import Tensor

from fino_fast.ops import KINDS


def test_gradients_at_the_rows_with_the_loss(device: torch.device) -> None:
    check_heads(heads_of_every_kind(37, 40, 35, torch.float64), device, kept=True)


def test_heads_on_shared_and_on_own_rows(device: torch.device) -> None:
    shared = heads_of_every_kind(37, 20, 70, torch.float64)
    alone = head_call("linear", 37, 33, 7, torch.float64, seed=50)
    check_heads([shared[0], alone, *shared[1:]], device)


def test_rows_in_several_parts(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows than a chunk of coefficients, more tiles than parts."""
    monkeypatch.setattr("fino_fast.kernels.heads.MAX_SPLITS", 2)
    n = 5 * INTERPRETER_TILES.rows + 5
    calls = [
        head_call("linear", n, 7, 3, torch.float64, seed=1),
        head_call("tanh", n, 7, 1, torch.float64, seed=2),
    ]
    seen: list[Launch] = []

    def keep(launch: Launch) -> None:
        seen.append(launch)
        run(launch)

    with intercepted(keep):
        check_heads(calls, device)
    (banks,) = [x.arguments for x in seen if x.kernel.__name__ == "heads_banks_kernel"]
    assert banks["parts"] == (2, 2)
    assert banks["share"][0] > INTERPRETER_TILES.chunk


def test_a_bank_of_several_chunks(device: torch.device) -> None:
    classes = 2 * INTERPRETER_TILES.chunk + 9
    check_heads(
        [
            head_call(kind, 35, 40, classes, torch.float64, seed=f)
            for f, kind in enumerate(("linear", "prototype", "sigmoid"))
        ],
        device,
    )


def test_more_tiles_than_workers(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fino_fast.kernels.heads.WORKERS", 3)
    seen: list[Launch] = []

    def keep(launch: Launch) -> None:
        seen.append(launch)
        run(launch)

    with intercepted(keep):
        check_heads(heads_of_every_kind(70, 20, 70, torch.float64), device)
    assert [x.arguments["workers"] for x in seen if "workers" in x.arguments] == [3, 3, 3]


def test_gradients_of_the_parameters_alone(device: torch.device) -> None:
    """As where the embedding is frozen: nothing is swept for the rows."""
    call = head_call("linear", 37, 20, 35, torch.float64)
    table = Heads(
        [call.x.to(device)], [call.bank.to(device)], [call.offset.to(device)],
        [call.target.to(device)], [call.inv_count.to(device)], [], [KINDS.index("linear")], [0.0],
    )  # fmt: skip
    _, _, lse, kept = heads_loss(table, [False])
    one = torch.ones(1, dtype=torch.float64, device=device)
    seen: list[Launch] = []

    def keep(launch: Launch) -> None:
        seen.append(launch)
        run(launch)

    with intercepted(keep):
        _, grad_bank, grad_offset = heads_gradient(
            Upstream(one, [one[0]], [0], lse, kept), table.x, table, [0], False, True
        )
    _, _, _, by_bank, by_offset = expected_head(call)
    assert by_bank is not None
    assert by_offset is not None
    close(grad_bank[0].cpu(), by_bank, torch.float64)
    close(grad_offset[0].cpu(), by_offset, torch.float64)
    assert "heads_rows_kernel" not in [launch.kernel.__name__ for launch in seen]


def test_what_was_kept_takes_one_launch(device: torch.device) -> None:
    calls = [head_call("prototype", 5, 4, 40, torch.float32, seed=f) for f in range(3)]
    seen: list[str] = []

    def keep(launch: Launch) -> None:
        seen.append(launch.kernel.__name__)
        run(launch)

    with intercepted(keep):
        run_heads(calls, device)
    assert seen[3:] == ["heads_combine_kernel"]
    assert KINDS[PROTOTYPE] == "prototype"


def test_results_are_the_same_to_the_bit(device: torch.device) -> None:
    def gradients() -> list[Tensor | None]:
        calls = heads_of_every_kind(35, 20, 35, torch.float32)
        losses, _, rows, bank, offset = run_heads(calls, device)
        return [losses, *rows, *bank, *offset]

    for found, again in zip(gradients(), gradients(), strict=True):
        assert (found is None and again is None) or torch.equal(found, again)


def test_tiles_of_a_gpu(device: torch.device) -> None:
    with forced(replace(TILES[9, 2], chunk=TILES[9, 2].rows)):
        check_heads(heads_of_every_kind(140, 20, 260, torch.float16), device)
