"""Shared by the tests of the loss."""

import os
from collections.abc import Iterator

import pytest
import torch

if torch.cuda.is_available():
    # Read by the first product; PyTorch 2.9 wants it where algorithms are deterministic.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
else:
    # Read when triton is first imported, by whichever test that is.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from loss_case import CPU_BACKENDS


@pytest.fixture(params=CPU_BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend that serves CPU tensors."""
    return request.param


@pytest.fixture
def poisoned() -> Iterator[None]:
    """`torch.empty` gives NaN (integers: their maximum): an entry that is not written shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)
