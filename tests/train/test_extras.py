"""A package that is not installed is named with the extra that brings it."""

import importlib
import sys

import pytest

from fino_fast.errors import MissingExtraError


@pytest.mark.parametrize("package", ["timm", "safetensors", "tqdm", "tensorboard"])
def test_a_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    for name in list(sys.modules):
        parts = name.split(".")
        if parts[0] == package or parts[:2] == ["fino_fast", "train"] or "tensorboard" in parts:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=rf"{package}.*pip install 'fino-fast\[train\]'"):
        importlib.import_module("fino_fast.train")
