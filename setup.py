"""Native build of fino-fast. Everything that is not the build is in pyproject.toml.

Switches (environment variables):

    FINO_BUILD = auto (default) | 0 | 1
    │   auto: build the native code where a C++ compiler is found, else install without it
    │         (the package then runs its `eager` backend, and says so)
    │   0:    never build          1: a missing compiler is an error
    └── CXX                        the C++ compiler (default: the one Python was built with)
        MAX_JOBS                   parallel compilations (default: one per 3 GB of free memory)

    FINO_CPU_ONLY = 0 (default) | 1
    │   1: leave the CUDA kernels out
    └── FORCE_CUDA = 0 (default) | 1
        │   0: build them where nvcc and a torch of the same CUDA are found, GPU or not
        │   1: it is an error where they cannot be built
        └── TORCH_CUDA_ARCH_LIST   chips, as in PyTorch (default: "8.0;9.0;10.0+PTX")

The kernels in csrc/cpu are free of torch and compiled once per instruction-set level into one
binary; the level is chosen at run time (csrc/cpu/capability.cpp), so a wheel built here runs on
every processor of the architecture. Those in csrc/cuda are free of torch too: nvcc makes a library
of its own of them, which fino_fast/cuda.py loads where there is a GPU.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).parent
SWITCH = os.environ.get("FINO_BUILD", "auto")
CHIPS = "8.0;9.0;10.0+PTX"  # PTX: chips that come later run too

# Level name → compiler flags. Each level is a separate object with its own C++ namespace.
X86_LEVELS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": [
        "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c",
        "-mprefer-vector-width=512",
    ],
    "avx512_bf16": [
        "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512bf16", "-mfma", "-mf16c",
        "-mprefer-vector-width=512",
    ],
}  # fmt: skip
LEVELS = X86_LEVELS if platform.machine() in ("x86_64", "AMD64") else {"baseline": []}
# The flags that Python was built with often ask for debug information: 16 MB of 17.
PLAIN = ["-g0"]
OPENMP = ["-fopenmp"] if sys.platform == "linux" else []
KERNEL_FLAGS = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fopenmp-simd",
    "-Wall",
    *PLAIN,
]


def free_memory_gb() -> float:
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    except (ValueError, OSError):
        return 4.0


def flag(name: str) -> bool:
    value = os.environ.get(name, "0")
    if value not in ("0", "1"):
        sys.exit(f"setup.py: {name} must be 0 or 1, found {value!r}")
    return value == "1"


def wants_cuda() -> bool:
    """Whether to build csrc/cuda; ends the build where FORCE_CUDA=1 cannot be done."""
    import torch

    if flag("FINO_CPU_ONLY"):
        return False
    theirs, ours = torch.version.cuda, nvcc_release()
    missing = []
    if ours is None:
        missing.append("nvcc is not on the PATH")
    if theirs is None:
        missing.append("this torch is a CPU build")
    if ours and theirs and ours.split(".")[0] != theirs.split(".")[0]:
        # The library is loaded beside torch's own runtime, which has the same major number or none.
        missing.append(f"nvcc is of CUDA {ours}, this torch of CUDA {theirs}")
    if missing and flag("FORCE_CUDA"):
        sys.exit(f"setup.py: FORCE_CUDA=1, but {' and '.join(missing)}")
    if missing:
        print(f"setup.py: {' and '.join(missing)}; installing without the CUDA C++ kernels")
    return not missing


def nvcc_release() -> str | None:
    """Of the nvcc on the PATH, like "13.0"; None where there is none."""
    if shutil.which("nvcc") is None:
        return None
    told = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release (\d+\.\d+)", told)
    if release is None:
        sys.exit(f"setup.py: expected `nvcc --version` to name its release, found {told!r}")
    return release[1]


def cuda_chips() -> list[str]:
    """nvcc's options for the chips of TORCH_CUDA_ARCH_LIST; +PTX adds code for later chips."""
    options = []
    for chip in os.environ.get("TORCH_CUDA_ARCH_LIST", CHIPS).replace(" ", ";").split(";"):
        number = chip.removesuffix("+PTX").replace(".", "")
        if not number[:-1].isdigit():
            sys.exit(f"setup.py: TORCH_CUDA_ARCH_LIST: expected chips like 9.0, found {chip!r}")
        options.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if chip.endswith("+PTX"):
            options.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return options


def native_build() -> dict[str, object]:
    """The `ext_modules` and `cmdclass` of the native build, or nothing where it is not wanted."""
    if SWITCH not in ("auto", "0", "1"):
        sys.exit(f"setup.py: FINO_BUILD must be auto, 0 or 1, found {SWITCH!r}")
    compiler = os.environ.get("CXX", "c++").split()[0]
    if SWITCH == "0":
        return {}
    if SWITCH == "auto" and shutil.which(compiler) is None:
        print(f"setup.py: no C++ compiler ({compiler}); installing without native code")
        return {}

    from torch.utils.cpp_extension import BuildExtension, CppExtension

    os.environ.setdefault(
        "MAX_JOBS", str(max(1, min(os.cpu_count() or 1, int(free_memory_gb() // 3))))
    )

    class BuildLevels(BuildExtension):  # type: ignore[misc]
        """Compiles csrc/cpu/epilogues.cpp once per level, then builds the extension around it."""

        def build_extension(self, ext: Extension) -> None:
            if ext is not cuda_library:
                super().build_extension(ext)
                return
            target = Path(self.get_ext_fullpath(ext.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            self.spawn(
                [
                    "nvcc", "-shared", "-std=c++17", "-O3", "-Werror", "all-warnings",
                    "-Xcompiler", "-fPIC,-Wall", *cuda_chips(),
                    "-cudart=shared",  # torch's own copy, and with it the current device
                    "csrc/cuda/launch.cu", "-o", str(target),
                ]
            )  # fmt: skip

        def build_extensions(self) -> None:
            for ext in [extension]:
                for level, flags in LEVELS.items():
                    objects = self.compiler.compile(
                        ["csrc/cpu/epilogues.cpp"],
                        output_dir=str(Path(self.build_temp) / level),
                        macros=[("FINO_LEVEL", level)],
                        extra_postargs=[*KERNEL_FLAGS, *flags],
                    )
                    ext.extra_objects = [*ext.extra_objects, *objects]
            super().build_extensions()

    extension = CppExtension(
        "fino_fast._C",
        [
            "csrc/ops/bf16.cpp",
            "csrc/ops/contrastive.cpp",
            "csrc/ops/heads.cpp",
            "csrc/ops/orthogonal.cpp",
            "csrc/ops/views.cpp",
            "csrc/ops/wide_head.cpp",
            "csrc/module.cpp",
            "csrc/cpu/bf16_product.cpp",
            "csrc/cpu/capability.cpp",
            "csrc/cpu/contrastive.cpp",
            "csrc/cpu/heads.cpp",
            "csrc/cpu/wide_head.cpp",
            "csrc/cpu/orthogonal.cpp",
            "csrc/cpu/scratch.cpp",
            "csrc/cpu/views.cpp",
        ],
        define_macros=[(f"FINO_HAVE_{level.upper()}", "1") for level in LEVELS],
        # Compiled without OpenMP, at::parallel_for is a plain loop. Not linked with it: the library
        # is the one that torch brings, so that there is one pool of threads.
        extra_compile_args={"cxx": ["-O2", "-Wall", *OPENMP, *PLAIN]},
        depends=[str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.h")],
    )
    # Not compiled by torch's rules, which would take CUDA_HOME and ATen. Optional: where nvcc
    # fails, setuptools warns and goes on.
    cuda_library = Extension(
        "fino_fast._cuda",
        [],
        depends=[str(p.relative_to(ROOT)) for p in (ROOT / "csrc" / "cuda").iterdir()],
        optional=not flag("FORCE_CUDA"),
    )
    extensions = [extension, cuda_library] if wants_cuda() else [extension]
    return {"ext_modules": extensions, "cmdclass": {"build_ext": BuildLevels}}


setup(**native_build())
