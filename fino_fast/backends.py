"""Which implementation of the terms serves which tensors, by name."""

import warnings
from importlib.util import find_spec
from typing import Literal, get_args

import torch

from . import ops
from .eager import Eager
from .native import Native
from .terms import Backend

BackendName = Literal["auto", "native", "triton", "eager"]


class BackendUnavailableError(RuntimeError):
    """The backend asked for by name cannot serve these tensors."""


_SERVES = {"native": "cpu", "triton": "cuda"}  # backend → type of its devices
_EAGER = Eager()
# Backend → itself, or why it cannot be used here.
_FUSED: dict[str, Backend | str] = {
    "native": Native() if ops.LOAD_ERROR is None else ops.LOAD_ERROR,
    "triton": "there was no CUDA device when the loss was made",
}
_warned: set[str] = set()


def prepare(name: str) -> None:
    """Load what the backend `name` may need: torch.compile cannot trace an import later.

    Raises:
        ValueError: `name` is no backend.
    """
    if name not in get_args(BackendName):
        raise ValueError(f"backend must be one of {get_args(BackendName)}, found {name!r}")
    if name in ("auto", "triton") and torch.cuda.is_available():
        _FUSED["triton"] = _load_triton()


def _load_triton() -> Backend | str:
    if ops.LOAD_ERROR is not None:
        return ops.LOAD_ERROR
    if find_spec("triton") is None:
        return "triton is not installed; it comes with PyTorch's CUDA builds"
    from .triton import Triton

    return Triton()


def resolve(name: BackendName, device: torch.device) -> Backend:
    """The backend for tensors on `device`.

    `auto` takes `native` on a CPU and `triton` on a GPU, and `eager` with one warning where that
    is not available.

    Raises:
        BackendUnavailableError: a backend asked for by name cannot serve.
    """
    if name == "eager":
        return _EAGER
    if name != "auto":
        if device.type != _SERVES[name]:
            raise BackendUnavailableError(
                f"backend={name!r} serves {_SERVES[name]} tensors, these are on {device}"
            )
        backend = _FUSED[name]
        if isinstance(backend, str):
            raise BackendUnavailableError(f"backend={name!r}: {backend}")
        return backend
    for fused, device_type in _SERVES.items():
        if device.type == device_type:
            backend = _FUSED[fused]
            if not isinstance(backend, str):
                return backend
            if not torch.compiler.is_compiling() and fused not in _warned:
                _warned.add(fused)
                warnings.warn(
                    f"fino_fast runs in plain PyTorch on {device_type}: {backend}",
                    RuntimeWarning,
                    stacklevel=3,
                )
    return _EAGER
