"""From a lab's disk to the GPU: ingestion, sealed shards, loader.

Names are imported on first use, so that ingestion workers load neither torch nor DALI.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .loader import Batch, Loader
    from .sampling import Groups
    from .schema import Factor, Schema
    from .shardset import ShardSet
    from .views import Views

_HOMES = {
    "Batch": "loader",
    "Factor": "schema",
    "Groups": "sampling",
    "Loader": "loader",
    "Schema": "schema",
    "ShardSet": "shardset",
    "Views": "views",
}

__all__ = ["Batch", "Factor", "Groups", "Loader", "Schema", "ShardSet", "Views"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
