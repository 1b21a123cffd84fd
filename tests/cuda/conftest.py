"""The CUDA kernels of csrc/cuda, compiled for the host and for GPUs that are not there."""

import ctypes
from pathlib import Path

import pytest
from cuda_case import SOURCES, built_for_the_host


@pytest.fixture(autouse=True)
def _poisoned(poisoned: None) -> None: ...


@pytest.fixture(scope="session")
def sources() -> Path:
    return SOURCES


@pytest.fixture(scope="session")
def on_host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return built_for_the_host(tmp_path_factory.mktemp("cuda"))
