"""The Triton kernels run on a GPU where there is one, otherwise in Triton's interpreter."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton comes with torch's CUDA builds only")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        for item in items:
            if item.path.parent == Path(__file__).parent:
                item.add_marker(pytest.mark.gpu)
    elif not triton.knobs.runtime.interpret:
        raise pytest.UsageError("tests/kernels needs TRITON_INTERPRET=1 before triton is imported")


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True, scope="session")
def quick_interpreter() -> Iterator[None]:
    """Leave out what the interpreter does twice: it patches `triton.language` for the whole launch,
    and again in every call of a device function, which is half of its time.
    """
    if not triton.knobs.runtime.interpret:
        yield
        return
    interpreter = importlib.import_module("triton.runtime.interpreter")
    patch, patched = interpreter._patch_lang, set()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Triton's own device functions reach the language by other modules: patched once.
        if self.fn.__module__.startswith("triton") and self.fn.__module__ not in patched:
            patched.add(self.fn.__module__)
            patch(self.fn)
        return self.rewrite()(*args, **kwargs)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", call)
        yield


@pytest.fixture(autouse=True, scope="session")
def rounding_interpreter() -> Iterator[None]:
    """fp32 to bf16 by rounding to nearest, ties to even, as a GPU and PyTorch do.

    The interpreter cuts the bits off, which doubles the error of every such conversion.
    """
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
