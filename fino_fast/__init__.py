"""FINO losses for PyTorch: adapt a vision backbone with the metadata you already have."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .factors import Categorical, Continuous, InfoNCE, LambdaSchedule
    from .loss import FinoLoss

__all__ = ["Categorical", "Continuous", "FinoLoss", "InfoNCE", "LambdaSchedule"]
__version__ = "0.1.0"

# Imported at first use: the workers of an ingestion import this package too, and need no torch.
_HOME = {"FinoLoss": "loss", "reference": "reference"} | dict.fromkeys(
    ("Categorical", "Continuous", "InfoNCE", "LambdaSchedule"), "factors"
)


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"{__name__}.{_HOME[name]}")
    return module if name == "reference" else getattr(module, name)
