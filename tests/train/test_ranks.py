"""Several processes are one batch: a run under torchrun equals the run of one process."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fino_fast.data import ShardSet
from fino_fast.errors import ConfigError
from fino_fast.train import train
from fino_fast.train.build import build_loader
from fino_fast.train.checkpoint import path_of
from fino_fast.train.world import World

from .runs import STEPS, damaged_copy, rows, run_config, skipped, tensors, write_yaml

# Nothing here depends on the rank: no dropout, no statistics of a part of the batch.
ALIKE = {
    "backbone": {"name": "test_vit", "freeze": 0.34},
    "factors": {"module": {"head": "linear"}, "camera": {"orthogonal": 0.1}},
    "balance": False,
    "backend": "eager",
}


def on_two_ranks(store: Path, *command: str) -> str:
    """Run `fino-fast` on two ranks; return what it printed."""
    script = str(Path(__file__).with_name("two_ranks.py"))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    done = subprocess.run(
        [*launcher, script, str(store), *command], capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_two_ranks_equal_one_and_may_continue_each_others_runs(
    shards: Path, tmp_path: Path
) -> None:
    """Also where samples are damaged: both skip the same ones, and count and list them alike."""
    damaged = damaged_copy(shards, tmp_path / "shards", 9)
    alone = run_config(damaged, tmp_path / "alone", **ALIKE, on_error="skip")
    train(alone)
    together = run_config(damaged, tmp_path / "together", **ALIKE, on_error="skip")
    config = write_yaml(together, tmp_path / "together.yaml")
    printed = on_two_ranks(tmp_path / "store", "train", str(config))
    assert printed.count(f"{STEPS} steps done") == 1
    expected = tensors(path_of(alone.output, STEPS))
    found = tensors(path_of(together.output, STEPS))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=2e-5, msg=name)
    for row, other in zip(rows(alone.output), rows(together.output), strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
        assert row["skipped"] == other["skipped"]
    assert skipped(alone.output) == skipped(together.output)
    assert rows(together.output)[-1]["skipped"] == len(skipped(together.output)) >= 4

    shutil.rmtree(path_of(together.output, STEPS))
    train(together, resume=True)  # alone, from the two ranks' step 4
    found = tensors(path_of(together.output, STEPS))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=2e-5, msg=name)
    assert skipped(together.output) == skipped(alone.output)


def test_a_batch_that_the_ranks_cannot_share(shards: Path, tmp_path: Path) -> None:
    config = run_config(shards, tmp_path / "run")
    world = World(0, 3, torch.device("cpu"))
    with pytest.raises(ConfigError, match="batch_size 8 cannot be divided among 3 ranks"):
        build_loader(config, ShardSet.open(shards), [], world)
