"""The exported folder: timm alone gives the same embeddings from it, for any number of channels."""

import json
import resource
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from fino_fast.cli import main
from fino_fast.data import Schema, ShardSet
from fino_fast.errors import ConfigError, DataError, DiskFullError
from fino_fast.train.backbone import build_backbone, load_weights
from fino_fast.train.checkpoint import State, save
from fino_fast.train.export import export


def run_of(
    folder: Path, schema: Schema, channels: int, name: str = "test_vit", **config: Any
) -> dict[str, nn.Module]:
    """A run folder with one checkpoint of random weights; return student and teacher."""
    torch.manual_seed(channels)
    options = {"options": {"global_pool": "avg"}} if name == "test_vit" else {}
    content: dict[str, Any] = {
        "data": "shards",
        "output": "run",
        "backbone": {"name": name} | options,
        "views": {"size": 48, "mean": [0.4], "std": [0.2], "evaluation_crop": 0.9},
        "teacher": {"momentum": 0.9},
    }
    models = nn.ModuleDict()
    for part in ("student", "teacher"):
        backbone = build_backbone(name, channels=channels, image_size=48, **options)
        for parameter in backbone.parameters():
            nn.init.normal_(parameter, std=0.2)
        models[part] = backbone if part == "teacher" else nn.ModuleDict({"backbone": backbone})
    state = State(
        step=7,
        config=content | config,
        loader={},
        channels=channels,
        data_schema=schema.content(),
        data_schema_hash=schema.hash,
        manifest_hash="",
        packages={},
    )
    save(folder, models, torch.optim.AdamW(models.parameters()), state, keep=1)
    return {"student": models["student"]["backbone"], "teacher": models["teacher"]}


@pytest.fixture(scope="module")
def schema(shards: Path) -> Schema:
    return ShardSet.open(shards).schema


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("part", ["student", "teacher"])
def test_timm_alone_gives_the_same_embeddings(
    tmp_path: Path, schema: Schema, name: str, channels: int, part: str
) -> None:
    expected = run_of(tmp_path / "run", schema, channels, name)[part].eval()
    export(tmp_path / "run", tmp_path / "out", teacher=part == "teacher")
    again = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    images = torch.randn(2, channels, 48, 48)
    with torch.no_grad():
        assert torch.equal(again(images), expected(images))
    prepared = timm.data.resolve_data_config(model=again)
    assert tuple(prepared["input_size"]) == (channels, 48, 48)
    torch.testing.assert_close(list(prepared["mean"]), [0.4] * channels)
    torch.testing.assert_close(list(prepared["std"]), [0.2] * channels)
    assert prepared["crop_pct"] == 0.9


def test_the_command_and_what_it_says_of_the_origin(
    tmp_path: Path, schema: Schema, capsys: pytest.CaptureFixture[str]
) -> None:
    models = run_of(tmp_path / "run", schema, 3)
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    assert "out: the backbone after step 7" in capsys.readouterr().out
    origin = json.loads((tmp_path / "out" / "export.json").read_bytes())
    assert (origin["step"], origin["teacher"]) == (7, False)
    assert origin["data_schema_hash"] == schema.hash
    assert origin["white"] == {"uint8": 255.0, "uint16": 65535.0, "float32": 1.0}
    # The weights go on into this program, too: `backbone.weights`, `embed --weights`.
    backbone = build_backbone("test_vit", channels=3, image_size=48, options={"global_pool": "avg"})
    report = load_weights(backbone, tmp_path / "out" / "model.safetensors")
    assert (report.missing, report.unexpected) == ([], [])
    for key, value in models["student"].state_dict().items():
        assert torch.equal(backbone.state_dict()[key], value)


def test_what_cannot_be_exported(tmp_path: Path, schema: Schema) -> None:
    run_of(tmp_path / "run", schema, 3, teacher=None)
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match="the run had no teacher"):
        export(tmp_path / "run", out, teacher=True)
    with pytest.raises(DataError, match="no such folder"):
        export(tmp_path / "nowhere", out)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(DiskFullError, match="no room left"):
            export(tmp_path / "run", out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    export(tmp_path / "run", out)
    with pytest.raises(ConfigError, match="out: exists already"):
        export(tmp_path / "run", out)
