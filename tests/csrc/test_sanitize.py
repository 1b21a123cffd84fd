"""The torch-free kernels under AddressSanitizer and UndefinedBehaviorSanitizer, at every level."""

import os
import shutil
import subprocess
from pathlib import Path

import fino_fast._C as extension
import pytest

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"
LEVEL_FLAGS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"],
}
FLAGS = [
    "-std=c++17", "-O1", "-g", "-fopenmp-simd", "-pthread", f"-I{CSRC}",
    "-fsanitize=address,undefined", "-fno-sanitize-recover=all",
]  # fmt: skip


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """sweep_check.cpp with the kernels of all levels that this processor runs."""
    compiler = os.environ.get("CXX", "c++")
    assert shutil.which(compiler), "the native build needs it too"
    folder = tmp_path_factory.mktemp("sanitize")
    levels = [level for level in extension.capabilities() if level in LEVEL_FLAGS]
    have = [f"-DFINO_HAVE_{level.upper()}" for level in levels]
    objects = []
    for level in levels:
        objects.append(str(folder / f"{level}.o"))
        source = str(CSRC / "cpu" / "epilogues.cpp")
        command = [compiler, *FLAGS, *LEVEL_FLAGS[level], f"-DFINO_LEVEL={level}", "-c", source]
        subprocess.run([*command, "-o", objects[-1]], check=True)
    sources = [
        HERE / "sweep_check.cpp",
        CSRC / "cpu" / "sweep.cpp",
        CSRC / "cpu" / "orthogonal.cpp",
        CSRC / "cpu" / "capability.cpp",
    ]
    program = folder / "sweep_check"
    subprocess.run(
        [compiler, *FLAGS, *have, *map(str, sources), *objects, "-o", program], check=True
    )
    return program


@pytest.mark.parametrize("level", extension.capabilities())
def test_kernels_are_clean_and_right(program: Path, level: str) -> None:
    done = subprocess.run(
        [program],
        env=os.environ | {"FINO_CPU_CAPABILITY": level},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith(f"{level}: largest error")
