"""Fixtures: a lab to ingest, and a sealed set to read."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from moto.moto_server.threaded_moto_server import ThreadedMotoServer

from fino_fast.data import ShardSet

from .labs import Lab, make_lab
from .stores import s3_server


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


@pytest.fixture(scope="session")
def s3() -> Iterator[ThreadedMotoServer]:
    """A local S3 server, to which the environment leads."""
    with s3_server() as server:
        yield server


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of remote sets for each test."""
    monkeypatch.setenv("FINO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"
