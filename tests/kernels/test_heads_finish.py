"""Gradients of the banks alone, as where the embedding is frozen."""

import torch
from fino_fast.kernels.heads_finish import heads_finish_kernel
from fino_fast.kernels.launch import Launch, intercepted, run
from kernel_case import close, expected_head, head_call, run_heads
from test_heads_sweep import heads_of_every_kind


def test_gradients_of_banks_without_those_of_rows(device: torch.device) -> None:
    calls = heads_of_every_kind(37, 40, 35, torch.float64)
    losses, _, grad_x, grad_bank, grad_offset = run_heads(calls, False, True, device)
    for f, call in enumerate(calls):
        loss, _, _, by_bank, by_offset = expected_head(call)
        close(losses[f].cpu(), loss, torch.float64, size=1.0)
        assert grad_x[f].numel() == 0
        if call.kind == "prototype":
            assert grad_bank[f].numel() == grad_offset[f].numel() == 0
        else:
            close(grad_bank[f].cpu(), by_bank, torch.float64)
            close(grad_offset[f].cpu(), by_offset, torch.float64)


def test_a_prototype_bank_takes_no_programs(device: torch.device) -> None:
    seen: list[Launch] = []

    def count(launch: Launch) -> None:
        seen.append(launch)
        run(launch)

    with intercepted(count):
        run_heads([head_call("prototype", 5, 4, 40, torch.float32)], True, True, device)
    assert [x.programs for x in seen if x.kernel is heads_finish_kernel] == [1]
