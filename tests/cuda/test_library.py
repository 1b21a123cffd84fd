"""The library of the CUDA kernels: whether it is built, and what is said where it does not load."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fino_fast import cuda

ROOT = Path(__file__).parents[2]


def test_a_library_that_does_not_load_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "_cuda.so"
    file.write_text("of another machine")
    monkeypatch.setattr(cuda, "_FILES", [file])
    with pytest.raises(RuntimeError, match=r"_cuda\.so.*Build fino-fast again in this environment"):
        cuda._library.__wrapped__()


@pytest.mark.skipif(torch.version.cuda is None, reason="this torch is a CPU build")
@pytest.mark.parametrize(
    ("told", "message"),
    [
        ("Cuda compilation tools, release 99.1, V99.1.5", r"nvcc is of CUDA 99\.1, this torch of"),
        ("something else", r"expected `nvcc --version` to name its release, found 'something else"),
    ],
)
def test_nvcc_of_another_cuda_than_torch_s_builds_nothing(
    told: str, message: str, tmp_path: Path
) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho '{told}'\n")
    nvcc.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    result = subprocess.run(
        [sys.executable, "setup.py", "--name"],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env=os.environ | {"PATH": path, "FORCE_CUDA": "1", "FINO_BUILD": "1"},
    )  # fmt: skip
    assert result.returncode != 0
    assert re.search(message, result.stderr), result.stderr
