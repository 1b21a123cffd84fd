"""Compilation ahead of time, for GPUs that are not there."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import triton
from fino_fast.kernels.aot import SHARED_LIMIT, Compiled
from fino_fast.kernels.check import HEADS, WIDTHS, Checked, faults, launches
from fino_fast.kernels.launch import Launch
from fino_fast.kernels.tiles import TILES, tiles_of
from kernel_case import described
from packaging.version import Version

SWEEPS = {"banks", "rows", "sweep"}
NAMES = {"combine", "operands"} | SWEEPS


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    # Another process: under the interpreter there is nothing to compile.
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True
    )


def cells(table: str) -> dict[tuple[str, ...], list[str]]:
    """Rows by kernel, dtype, chip and what they hold."""
    lines = [line for line in table.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    return {tuple(row[:4]): row[4:] for row in rows}


def test_every_kernel_compiles_for_an_h100_within_its_limits_as_the_page_says() -> None:
    """The usual width; `make gpu-check` takes minutes for all of them, and writes the page."""
    page = (Path(__file__).parents[2] / "docs" / "gpu.md").read_text(encoding="utf-8")
    table = page.partition("gpu-check: start -->\n")[2].partition("<!--")[0]
    written_with = table.splitlines()[0].removeprefix("Triton ")
    if Version(triton.__version__) < Version(written_with):
        pytest.skip(f"the page is of Triton {written_with}, this is {triton.__version__}")
    result = run(
        "-m", "fino_fast.kernels.check",
        "--dtypes", "bfloat16", "--capabilities", "90", "--widths", "768",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    found, known = cells(result.stdout), cells(table)
    rows = list(found)[2:]  # behind the names of the columns
    assert {row[0] for row in rows} == NAMES
    assert {(row[0], row[3]) for row in rows} >= {(name, "768") for name in SWEEPS}
    for row in rows:
        registers, spilled, shared, tensor_core = found[row]
        assert row[1:3] == ("bfloat16", "sm_90")
        assert spilled == known[row][1] == "0"
        # The page has the largest of all widths.
        assert int(registers) <= int(known[row][0])
        assert float(shared) <= float(known[row][2])
        assert tensor_core == known[row][3] == ("wgmma.mma_async" if row[0] in SWEEPS else "—")


def test_code_that_depends_on_the_number_of_rows_is_named() -> None:
    """As that of a kernel would whose scalars Triton specialises, which is its default."""
    result = run(
        "-c",
        "from fino_fast.kernels.check import compiled_again\n"
        "from fino_fast.kernels.sweep import sweep_kernel\n"
        "assert compiled_again() == []\n"
        "for parameter in sweep_kernel.params: parameter.do_not_specialize = False\n"
        "print(*compiled_again())",
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("sweep_kernel is compiled again for another number of rows")


@pytest.mark.parametrize("capability", SHARED_LIMIT)
def test_there_are_tiles_for_every_dtype(capability: int) -> None:
    for dtype in (torch.float16, torch.float32, torch.float64):
        for widths in WIDTHS:
            tiles = tiles_of(capability // 10, SHARED_LIMIT[capability], dtype)
            found = launches(dtype, tiles, widths)
            assert {launch.kernel.__name__.removesuffix("_kernel") for launch in found} == NAMES


def test_no_sweep_sees_rows_that_do_not_begin_at_16_bytes() -> None:
    (_, odd) = WIDTHS
    forward, *_ = launches(torch.bfloat16, TILES[9, torch.bfloat16], odd)
    for name in ("x_stride", "bank_stride", "depth"):
        strides = described(forward, HEADS + 2, name)
        assert strides
        assert all(stride % 16 == 0 for stride in strides)


def test_faults_are_named() -> None:
    sound = Compiled("sweep_kernel", 90, 200, 0, 1024, ("wgmma.mma_async",), False)
    launch = launches(torch.float16, TILES[9, torch.bfloat16], WIDTHS[0])[1]
    assert isinstance(launch, Launch)
    assert "COLUMNS" in launch.constants
    assert faults(Checked("float16", launch.constants, sound)) == []
    reducing = {name: value for name, value in launch.constants.items() if name != "COLUMNS"}
    assert faults(Checked("float16", reducing, replace(sound, tensor_core=()))) == []
    spoilt = replace(sound, spilled=8, shared=2 * SHARED_LIMIT[90], tensor_core=(), atomics=True)
    words = faults(Checked("float16", launch.constants, spoilt))
    assert len(words) == 4
    assert all(text.startswith("sweep_kernel, float16, sm_90: ") for text in words)
    assert "spills 8 bytes" in words[0]
