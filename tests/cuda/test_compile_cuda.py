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
    for capability in CAPABILITIES:
        for kernel in ("group_means", "bank_update"):
            assert re.search(
                rf"entry function '\w*{kernel}\w*' for 'sm_{capability}'", report.stderr
            )
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", report.stderr)
    assert len(spills) == 2 * 2 * len(CAPABILITIES)
    assert set(spills) == {"0"}
