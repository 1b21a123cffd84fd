"""The torch-free kernels under the sanitizers for addresses, undefined behaviour and threads."""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import cache
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
LEVEL_FLAGS["avx512_bf16"] = [*LEVEL_FLAGS["avx512"], "-mavx512bf16"]
FLAGS = [
    "-std=c++17", "-O1", "-g", "-fopenmp-simd", "-pthread", f"-I{CSRC}",
    "-fno-sanitize-recover=all",
]  # fmt: skip
# Threads are the same at every level, so one is enough for them.
CASES = [("address,undefined", level) for level in extension.capabilities()]
CASES.append(("thread", extension.capabilities()[0]))


@cache
def program(sanitizers: str, levels: tuple[str, ...], folder: Path) -> Path:
    """sweep_check.cpp with the kernels of `levels`, built under `sanitizers`."""
    compiler = os.environ.get("CXX", "c++")
    assert shutil.which(compiler), "the native build needs it too"
    flags = [compiler, *FLAGS, f"-fsanitize={sanitizers}"]
    have = [f"-DFINO_HAVE_{level.upper()}" for level in levels]
    kernels = (
        "bf16_product", "capability", "contrastive", "heads", "orthogonal", "scratch", "views",
        "wide_head",
    )  # fmt: skip
    sources = [HERE / "sweep_check.cpp", *(CSRC / "cpu" / f"{name}.cpp" for name in kernels)]
    # Object → what makes it.
    commands = {folder / f"{source.stem}.o": [*have, "-c", source] for source in sources}
    for level in levels:
        source = CSRC / "cpu" / "epilogues.cpp"
        options = [*LEVEL_FLAGS[level], f"-DFINO_LEVEL={level}", "-c", source]
        commands[folder / f"{level}.o"] = options
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        built = [
            pool.submit(subprocess.run, [*flags, *options, "-o", target], check=True)
            for target, options in commands.items()
        ]
    for command in built:
        command.result()
    program = folder / "sweep_check"
    subprocess.run([*flags, *commands, "-o", program], check=True)
    return program


@pytest.mark.parametrize(("sanitizers", "level"), CASES)
def test_kernels_are_clean_and_right(
    sanitizers: str, level: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    levels = tuple(of for kind, of in CASES if kind == sanitizers)
    folder = tmp_path_factory.getbasetemp() / sanitizers.replace(",", "-")
    folder.mkdir(exist_ok=True)
    done = subprocess.run(
        [program(sanitizers, levels, folder)],
        env=os.environ | {"FINO_CPU_CAPABILITY": level},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith(f"{level}: largest error")
