from pathlib import Path

import numpy as np
import pytest

from fino_fast.evaluate.cells import Cells, load_cells

from .labs import make_shards


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("evaluation"))


@pytest.fixture(scope="session")
def cells() -> Cells:
    """The installed images; decoding them takes seconds, so all tests share them."""
    return load_cells()
