"""Triton's interpreter, made quicker."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import triton


@contextmanager
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
