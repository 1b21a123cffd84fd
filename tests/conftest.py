"""Shared by the tests of the loss: the backends that can serve here."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Read when triton is first imported, by whichever test that is.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from fino_fast.backends import BackendUnavailableError, resolve


def _serves(name: str) -> bool:
    try:
        resolve(name, torch.device("cpu"))
    except BackendUnavailableError:
        return False
    return True


CPU_BACKENDS = [name for name in ("eager", "native") if _serves(name)]


@pytest.fixture(params=CPU_BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend that serves CPU tensors in this build."""
    return request.param
