"""`fino-fast evaluate`: a factor that is in the features is found, one that is not is not."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fino_fast.cli import main
from fino_fast.data import ShardSet
from fino_fast.errors import ConfigError, DataError
from fino_fast.evaluate.embed import Embeddings, load, save
from fino_fast.evaluate.evaluation import evaluate


@pytest.fixture
def folder(shards: Path, tmp_path: Path) -> Path:
    """Embeddings that hold the defect and the camera, and nothing of the exposure."""
    sealed = ShardSet.open(shards)
    rng = np.random.default_rng(1)
    features = rng.standard_normal((100, 12))
    features[:, 0] += [12 * (label == "yes") for label in sealed.raw("defect")]
    cameras = ["none" if name is None else name for name in sealed.raw("camera")]
    features[np.arange(100), [1 + ord(name[-1]) % 5 for name in cameras]] += 6
    embeddings = Embeddings(np.arange(100), features.astype(np.float32))
    save(tmp_path / "embeddings", embeddings, sealed, source={})
    return tmp_path / "embeddings"


def test_what_is_in_the_features_is_found(folder: Path) -> None:
    result = evaluate(load(folder), targets=["defect"])
    assert result.tests == ["test-in", "test-out"]
    assert set(result.nuisances) == {"camera", "exposure"}  # the schema's suppressed factors
    defect = result.targets["defect"]
    assert defect["test-in"].score > 0.9
    assert defect["test-out"].score > 0.7  # 10 rows
    assert {readout.chance for readout in defect.values()} == {0.5}
    assert set(result.nuisances["camera"]) == {"test-in"}  # the other split has unknown cameras
    camera = result.nuisances["camera"]["test-in"]
    assert camera.score > 0.9
    assert camera.chance == pytest.approx(1 / 3)
    assert camera.test_count < 30  # rows without a camera take no part
    assert result.nuisances["exposure"]["test-in"].score < 0.3


def test_the_command_writes_a_report(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report"
    command = ["evaluate", str(folder), "--out", str(out), "--target", "defect"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert (out / "evaluation.md").read_text(encoding="utf-8") in printed
    content = json.loads((out / "evaluation.json").read_text(encoding="utf-8"))
    score = content["targets"]["defect"]["test-in"]["score"]
    assert f"balanced accuracy {score:.3f}" in printed
    with Image.open(out / "evaluation.png") as image:
        assert min(image.size) > 500
        assert len(image.convert("RGB").getcolors(1 << 24)) > 10
    assert main(command) == 1
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"targets": [], "nuisances": []}, ConfigError, "nothing to probe"),
        ({"targets": ["camera"], "nuisances": ["camera"]}, ConfigError, "'camera' is named"),
        ({"targets": ["defect"], "tests": ["adapt"]}, ConfigError, "expected other splits"),
        ({"targets": ["defect"], "tests": []}, ConfigError, "expected other splits"),
        ({"targets": ["grain"]}, DataError, "no factor 'grain'"),
        ({"targets": ["tags"]}, DataError, "factor 'tags'"),
        ({"targets": ["defect"], "tests": ["test"]}, DataError, "split 'test' has no row"),
        ({"targets": ["defect"], "train": "learn"}, DataError, "split 'learn' has no row"),
    ],
)
def test_what_cannot_be_evaluated_is_named(
    folder: Path, arguments: dict[str, list[str]], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        evaluate(load(folder), **arguments)
