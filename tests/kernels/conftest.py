"""The Triton kernels run on a GPU where there is one, otherwise in Triton's interpreter."""

import ctypes
import importlib
import importlib.util
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_case import Counting, built_for_the_host

from fino_fast import cuda

HAVE_TRITON = importlib.util.find_spec("triton") is not None


class Skipped(pytest.Module):
    def collect(self) -> Any:
        pytest.skip("triton comes with torch's CUDA builds only", allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: Any) -> pytest.Module | None:
    return None if HAVE_TRITON else Skipped.from_parent(parent, path=module_path)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not HAVE_TRITON:
        return
    import triton

    if torch.cuda.is_available():
        for item in items:
            if item.path.parent == Path(__file__).parent:
                item.add_marker(pytest.mark.gpu)
    elif not triton.knobs.runtime.interpret:
        raise pytest.UsageError("tests/kernels needs TRITON_INTERPRET=1 before triton is imported")


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def on_host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return built_for_the_host(tmp_path_factory.mktemp("cuda"))


@pytest.fixture
def cuda_launches(
    device: torch.device, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Counter[str]:
    """How often the launchers of csrc/cuda were called; without a GPU they run on the host."""
    if device.type == "cuda":
        assert cuda.AVAILABLE, "the CUDA C++ kernels are not built; FORCE_CUDA=1 says why"
        library = Counting(cuda._library())
    else:
        library = Counting(request.getfixturevalue("on_host"))
        monkeypatch.setattr(cuda, "serves_rows", lambda z: z.dtype in cuda.TYPES)
        monkeypatch.setattr(cuda, "serves_sums", lambda sums: sums.dtype == torch.float32)
        monkeypatch.setattr(cuda, "serves", lambda bank, rows: bank.dtype == torch.float32)
    monkeypatch.setattr(cuda, "_library", lambda: library)
    return library.calls


@pytest.fixture
def small_tiles() -> Iterator[None]:
    """Those of the interpreter on a GPU, too: few rows have many of them."""
    from fino_fast.kernels.tiles import INTERPRETER_TILES, forced

    with forced(INTERPRETER_TILES):
        yield


@pytest.fixture(autouse=True, scope="session")
def quick() -> Iterator[None]:
    from interpreter import quick_interpreter

    with quick_interpreter():
        yield


@pytest.fixture(autouse=True, scope="session")
def rounding_interpreter() -> Iterator[None]:
    """fp32 to bf16 by rounding to nearest, ties to even, as a GPU and PyTorch do.

    The interpreter cuts the bits off, which doubles the error of every such conversion.
    """
    import triton

    if not triton.knobs.runtime.interpret:
        yield
        return
    interpreter = importlib.import_module("triton.runtime.interpreter")
    language = importlib.import_module("triton.language")
    convert = interpreter._convert_float

    def rounded(data: Any, source: Any, target: Any, mode: Any) -> Any:
        if (source, target) == (language.float32, language.bfloat16):
            values = torch.from_numpy(data.astype("float32")).bfloat16()
            return values.view(torch.int16).numpy().view("uint16")
        if (source, target) == (language.bfloat16, language.float32):
            values = torch.from_numpy(data.view("int16").copy()).view(torch.bfloat16)
            return values.float().view(torch.int32).numpy().view("uint32")
        return convert(data, source, target, mode)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(interpreter, "_convert_float", rounded)
        yield


@pytest.fixture(autouse=True)
def _poisoned(poisoned: None) -> None: ...
