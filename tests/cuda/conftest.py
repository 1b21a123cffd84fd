"""The CUDA kernels of csrc/cuda, compiled for the host and for GPUs that are not there."""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"


@pytest.fixture(autouse=True)
def _poisoned(poisoned: None) -> None: ...


@pytest.fixture(scope="session")
def sources() -> Path:
    return SOURCES


@pytest.fixture(scope="session")
def on_host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The launchers of csrc/cuda/launch.h; the device code is that of the GPU."""
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        pytest.skip(f"no C++ compiler ({compiler})")
    library = tmp_path_factory.mktemp("cuda") / "on_host.so"
    subprocess.run(
        [
            compiler, "-std=c++20", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared",
            "-Wno-unknown-pragmas", f"-I{SOURCES}", str(Path(__file__).parent / "host_launch.cpp"),
            "-o", str(library),
        ],
        check=True,
    )  # fmt: skip
    return ctypes.CDLL(str(library))
