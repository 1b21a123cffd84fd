"""Compile launches for a GPU that is not there, and read what the compiler says of them.

`record` collects the launches of a call without running them; `compile_launch` takes the steps of
Triton's own launcher up to the binary, for a named architecture.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from .launch import Launch, intercepted

WARP = 32
# Shared memory that one block may ask for: CUDA C++ Programming Guide, technical specifications.
SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
ATOMIC = re.compile(r"\b(atom|red)\.(global|shared|relaxed|gpu|acq|add)")
TENSOR_CORE = re.compile(r"\b(wgmma\.mma_async|tcgen05\.mma|mma\.sync)\b")


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of one launch.

    Attributes:
        kernel: its name.
        capability: 10·major + minor.
        registers: of a thread.
        spilled: bytes of a thread that did not fit into registers, stores and loads together.
        shared: bytes of shared memory of a block.
        tensor_core: the tensor-core instructions in its PTX.
        atomics: whether its PTX has atomic operations.
    """

    kernel: str
    capability: int
    registers: int
    spilled: int
    shared: int
    tensor_core: tuple[str, ...]
    atomics: bool


@contextmanager
def record() -> Iterator[list[Launch]]:
    """Inside, launches are collected and not run."""
    launches: list[Launch] = []
    with intercepted(launches.append):
        yield launches


def compile_launch(launch: Launch, capability: int) -> Compiled:
    """Compile one launch with its own specialisation and tiles.

    Raises:
        Whatever Triton or ptxas raise where it does not compile.
    """
    options, *specialization = specialised(launch, capability)
    source = ASTSource(launch.kernel, *specialization)
    target = GPUTarget("cuda", capability, WARP)
    compiled = triton.compile(source, target=target, options=options.__dict__)
    registers, spilled = _ptxas(compiled.asm["ptx"], capability)
    return Compiled(
        launch.kernel.__name__,
        capability,
        registers,
        spilled,
        compiled.metadata.shared,
        tuple(sorted(set(TENSOR_CORE.findall(compiled.asm["ptx"])))),
        ATOMIC.search(compiled.asm["ptx"]) is not None,
    )


def specialised(launch: Launch, capability: int) -> tuple[Any, ...]:
    """(options, signature, constants, attributes): what Triton compiles of a launch, and once only.

    As in JITFunction.run.
    """
    backend = make_backend(GPUTarget("cuda", capability, WARP))
    kernel = launch.kernel
    settings = {"num_warps": launch.compiler.warps, "num_stages": launch.compiler.stages}
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, _ = binder(**launch.arguments, **launch.constants, **settings)
    return tuple(kernel._pack_args(backend, settings, bound, specialization, None))


@cache  # launches of other sizes often give the same code
def _ptxas(ptx: str, capability: int) -> tuple[int, int]:
    """(registers, bytes spilled) that the assembler reports."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        report = subprocess.run(
            [
                get_ptxas(capability).path,
                "-v",
                "--regAllocOptLevel=2",  # as Triton calls it
                f"--gpu-name={sm_arch_from_capability(capability)}",
                str(source),
                "-o",
                str(Path(folder) / "kernel.cubin"),
            ],
            check=True,
            capture_output=True,
            text=True,
        ).stderr
    registers = re.search(r"Used (\d+) registers", report)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", report)
    if registers is None or not spills:
        raise RuntimeError(f"ptxas reported neither registers nor spills:\n{report}")
    return int(registers[1]), sum(map(int, spills))
