"""Native build of fino-fast. Everything that is not the build is in pyproject.toml.

Switches (environment variables):

    FINO_BUILD = auto (default) | 0 | 1
    │   auto: build the native code where a C++ compiler is found, else install without it
    │         (the package then runs its `eager` backend, and says so)
    │   0:    never build          1: a missing compiler is an error
    └── CXX                        the C++ compiler (default: the one Python was built with)
        MAX_JOBS                   parallel compilations (default: one per 3 GB of free memory)

The kernels in csrc/cpu are free of torch and compiled once per instruction-set level into one
binary; the level is chosen at run time (csrc/cpu/capability.cpp), so a wheel built here runs on
every processor of the architecture.
"""

import os
import platform
import shutil
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
SWITCH = os.environ.get("FINO_BUILD", "auto")

# Level name → compiler flags. Each level is a separate object with its own C++ namespace.
X86_LEVELS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": [
        "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c",
        "-mprefer-vector-width=512",
    ],
}  # fmt: skip
LEVELS = X86_LEVELS if platform.machine() in ("x86_64", "AMD64") else {"baseline": []}
KERNEL_FLAGS = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fopenmp-simd",
    "-Wall",
]


def free_memory_gb() -> float:
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    except (ValueError, OSError):
        return 4.0


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

        def build_extensions(self) -> None:
            for ext in self.extensions:
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
        ["csrc/ops.cpp", "csrc/module.cpp", "csrc/cpu/capability.cpp", "csrc/cpu/sweep.cpp"],
        define_macros=[(f"FINO_HAVE_{level.upper()}", "1") for level in LEVELS],
        extra_compile_args={"cxx": ["-O2", "-Wall"]},
        depends=[str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.h")],
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildLevels}}


setup(**native_build())
