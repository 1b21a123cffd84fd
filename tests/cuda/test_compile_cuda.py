"""nvcc takes the CUDA sources without a warning, and without spilling registers."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CAPABILITIES = (80, 90, 100)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on the PATH")
def test_no_warnings_and_no_spills(sources: Path, tmp_path: Path) -> None:
    report = subprocess.run(
        [
            "nvcc", "-c", str(sources / "launch.cu"), "-o", str(tmp_path / "launch.o"),
            "-std=c++17", "-O3", "-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra,-Werror",
            "-Xptxas", "-v",
            *(f"-gencode=arch=compute_{c},code=sm_{c}" for c in CAPABILITIES),
        ],
        capture_output=True, text=True,
    )  # fmt: skip
    assert report.returncode == 0, report.stderr
    kernels = [
        name
        for source in sources.glob("*.cuh")
        for name in re.findall(
            r"__global__ void (?:__launch_bounds__\(.*\) )?(\w+)\(", source.read_text()
        )
    ]
    assert len(kernels) == 5
    entries = re.findall(r"Compiling entry function '(\w+)' for 'sm_(\d+)'", report.stderr)
    for capability in CAPABILITIES:
        for kernel in kernels:
            assert any(kernel in name and chip == str(capability) for name, chip in entries), kernel
    stacks = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report.stderr
    )
    assert len(stacks) >= len(entries)
    assert set(stacks) == {("0", "0", "0")}
