"""Fixtures: a lab to ingest, and a sealed set to read."""

from pathlib import Path

import pytest

from fino_fast.data import ShardSet

from .labs import Lab, make_lab


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    """24 images of 3 kinds of size, 4 cameras, two splits; the table is not yet saved."""
    return make_lab(tmp_path / "lab", 24)


@pytest.fixture(scope="session")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """60 sealed grey images; for tests that only read."""
    lab = make_lab(tmp_path_factory.mktemp("sealed") / "lab", 60)
    lab.ingest()
    return lab.open()
