"""A small run that uses every part of the trainer, and ways to look at what it left."""

import json
import shutil
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file
from torch import Tensor

from fino_fast.data import ShardSet
from fino_fast.data.index import place_of
from fino_fast.train import TrainConfig

IMAGES, BATCH, EPOCHS = 28, 8, 2
STEPS = EPOCHS * (IMAGES // BATCH)
TIMES = ("images_per_second", "data_wait")


def run_config(shards: Path, output: Path, **changes: Any) -> TrainConfig:
    """The configuration, with what a test changes of it."""
    content: dict[str, Any] = {
        "data": shards,
        "output": output,
        "backbone": {
            "name": "test_resnet",
            "options": {"drop_rate": 0.1, "drop_path_rate": 0.1},
            "freeze": 0.34,
        },
        "views": {"size": 32},
        "projector": {"hidden": [32], "width": 16},
        "contrastive": {"learnable": True},
        "factors": {
            "camera": {"orthogonal": 0.1, "concentration": "ema"},
            "module": {"head": "linear", "hidden": [16], "dropout": 0.5},
            "exposure": {"orthogonal": 0.1},
        },
        "balance": True,
        "optimizer": {"lr": 1e-3, "warmup": 0.3},
        "teacher": {"momentum": 0.9},
        "epochs": EPOCHS,
        "batch_size": BATCH,
        "device": "cpu",
        "log_every": 1,
        "checkpoint_every": 2,
    }
    return TrainConfig.checked(content | changes, "test")


def damaged_copy(shards: Path, target: Path, count: int) -> Path:
    """A copy of the shards in which every `count`-th image to adapt on has a flipped byte."""
    shutil.copytree(shards, target)
    opened = ShardSet.open(target)
    for row in opened.rows_of("adapt")[::count].tolist():
        shard, offset, size = place_of(opened.index[row])
        name = opened.manifest.shards[shard].name
        place = offset + size // 2
        with (target / f"{name}.tar").open("r+b") as tar:
            tar.seek(place)
            byte = tar.read(1)[0]
            tar.seek(place)
            tar.write(bytes([byte ^ 0xFF]))
    return target


def skipped(run: Path) -> list[dict[str, Any]]:
    """What all ranks of a run skipped, by step and place."""
    found = [
        json.loads(line)
        for path in run.glob("skipped-rank-*.jsonl")
        for line in path.read_text().splitlines()
    ]
    return sorted(found, key=lambda skip: (skip["step"], skip["place"]))


def write_yaml(config: TrainConfig, path: Path) -> Path:
    path.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True)))
    return path


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def untimed(run: Path) -> list[dict[str, Any]]:
    """The rows of metrics without what differs from run to run."""
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows(run)]


def tensors(checkpoint: Path) -> dict[str, Tensor]:
    return load_file(checkpoint / "model.safetensors") | load_file(
        checkpoint / "optimizer.safetensors"
    )


def differing(found: Path, expected: Path) -> list[str]:
    """Names of the tensors that are not the same bits in two checkpoints."""
    left, right = tensors(found), tensors(expected)
    assert left.keys() == right.keys()
    return [name for name in left if left[name].numpy().tobytes() != right[name].numpy().tobytes()]
