import pytest
import torch
from fino_fast.kernels.row_sum import row_sum
from kernel_case import close, random


@pytest.mark.parametrize("n", [1, 1024, 1031, 3000])
def test_sum(n: int, device: torch.device) -> None:
    x = random(n, dtype=torch.float32, seed=n)
    close(row_sum(x.to(device), 7).cpu(), x.double().sum() / 7, torch.float32, size=n**0.5)
