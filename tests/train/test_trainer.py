"""Whole runs on real shards: results, exact resuming, and every way in which they must stop."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from safetensors.torch import save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fino_fast.cli import main
from fino_fast.data import ShardSet
from fino_fast.data.files import location
from fino_fast.errors import ConfigError, DataError, FinoError
from fino_fast.train import TrainingInterrupted, train
from fino_fast.train.backbone import build_backbone
from fino_fast.train.checkpoint import checkpoints, load_backbone, path_of
from fino_fast.train.claim import claimed
from fino_fast.train.config import check_same
from fino_fast.train.learner import DivergedError, Learner
from fino_fast.train.world import World

from .runs import (
    STEPS,
    damaged_copy,
    differing,
    rows,
    run_config,
    skipped,
    tensors,
    untimed,
    write_yaml,
)


@pytest.fixture(scope="module")
def whole_run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    output = tmp_path_factory.mktemp("whole") / "run"
    result = train(run_config(shards, output))
    assert (result.steps, result.checkpoint) == (STEPS, path_of(output, STEPS))
    assert result.metrics == output / "metrics.jsonl"
    return output


@pytest.fixture
def started_run(whole_run: Path, tmp_path: Path) -> Path:
    """A copy of the run as it was after step 4."""
    output = tmp_path / "run"
    shutil.copytree(whole_run, output)
    shutil.rmtree(path_of(output, STEPS))
    assert checkpoints(output)[-1] == path_of(output, 4)
    return output


def signal_at(monkeypatch: pytest.MonkeyPatch, step: int, signum: int) -> None:
    """Send this process a signal while the given step (from 1) is running."""
    original = Learner.step

    def signalled(self: Learner, index: int, *batch: Any) -> Any:
        if index + 1 == step:
            os.kill(os.getpid(), signum)
        return original(self, index, *batch)

    monkeypatch.setattr(Learner, "step", signalled)


def test_metrics_have_every_term_of_every_step(whole_run: Path) -> None:
    found = rows(whole_run)
    assert [row["step"] for row in found] == list(range(1, STEPS + 1))
    assert found[0].keys() == {
        "step", "loss", "contrastive", "lambda", "grad_norm", "lr", "images_per_second",
        "data_wait", "camera", "camera/accuracy", "camera/orthogonal", "module", "module/accuracy",
        "exposure", "exposure/mse", "exposure/orthogonal", "hour", "hour/mse",
    }  # fmt: skip
    assert all(0 <= row["data_wait"] <= 1 and row["images_per_second"] > 0 for row in found)
    assert [row["lambda"] for row in found[:3]] == [0, 0, 0]
    assert found[-1]["lambda"] > 0.9
    board = EventAccumulator(str(whole_run / "tensorboard")).Reload()
    events = board.Scalars("loss")
    assert [event.step for event in events] == list(range(1, STEPS + 1))
    assert [event.value for event in events] == pytest.approx([row["loss"] for row in found])


def test_a_checkpoint_has_schema_vocabularies_and_configuration(
    whole_run: Path, shards: Path
) -> None:
    state = json.loads((path_of(whole_run, STEPS) / "state.json").read_text())
    schema = ShardSet.open(shards).schema
    assert state["data_schema"] == schema.content()
    cameras = state["data_schema"]["factors"]["camera"]["vocabulary"]
    assert cameras == schema.factors["camera"].vocabulary
    assert sorted(cameras) == ["cam-0", "cam-1", "cam-2", "cam-3"]
    assert state["data_schema_hash"] == schema.hash
    assert state["config"] == json.loads((whole_run / "config.json").read_text())
    assert state["step"] == STEPS
    names = tensors(path_of(whole_run, STEPS)).keys()
    assert {
        "student.backbone.conv1.0.weight",
        "student.projector.0.weight",
        "student.criterion.heads.camera.centroids",
        "student.criterion.log_temperature",
        "student.criterion.balance_norms",
        "teacher.conv1.0.weight",
        "student.backbone.conv1.0.weight#exp_avg_sq",
    } <= names
    files = [path for path in whole_run.rglob("*") if path.is_file()]
    assert {path.suffix for path in files if "tensorboard" not in path.parts} == {
        ".safetensors",
        ".json",
        ".jsonl",
        ".lock",
    }


def test_only_the_newest_checkpoints_are_kept(whole_run: Path) -> None:
    assert checkpoints(whole_run) == [path_of(whole_run, 4), path_of(whole_run, STEPS)]
    assert len(list((whole_run / "checkpoints").iterdir())) == 2


@pytest.mark.parametrize("teacher", [False, True])
def test_the_trained_backbone_comes_back(whole_run: Path, teacher: bool) -> None:
    backbone, views = load_backbone(whole_run, teacher=teacher)
    assert views.size == 32
    assert not backbone.training
    state = tensors(path_of(whole_run, STEPS))
    prefix = "teacher." if teacher else "student.backbone."
    assert torch.equal(backbone.conv1[0].weight, state[prefix + "conv1.0.weight"])
    with torch.no_grad():
        assert backbone(torch.zeros(1, 3, 32, 32)).shape == (1, 96)
    earlier, _ = load_backbone(path_of(whole_run, 4), teacher=teacher)
    assert not torch.equal(earlier.conv1[0].weight, backbone.conv1[0].weight)


@pytest.mark.parametrize("step", range(1, STEPS))
def test_a_stopped_run_goes_on_to_the_same_bits(
    shards: Path,
    tmp_path: Path,
    whole_run: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: int,
) -> None:
    config = run_config(shards, tmp_path / "run")
    with monkeypatch.context() as patch:
        signal_at(patch, step, signal.SIGTERM if step % 2 else signal.SIGINT)
        with pytest.raises(TrainingInterrupted) as stop:
            train(config)
    assert stop.value.step == step
    assert stop.value.exit_code == (143 if step % 2 else 130)
    assert stop.value.checkpoint == path_of(config.output, step)
    assert differing(path_of(config.output, step), path_of(config.output, step)) == []
    torch.manual_seed(step)  # what the process drew before must not matter
    train(config, resume=True)
    assert differing(path_of(config.output, STEPS), path_of(whole_run, STEPS)) == []
    assert untimed(config.output) == untimed(whole_run)


def test_training_moves_the_state_that_resuming_must_restore(whole_run: Path) -> None:
    """Else the comparison of bits above could not fail."""
    unchanged = set(differing(path_of(whole_run, 4), path_of(whole_run, STEPS)))
    for part in (
        "student.backbone.",
        "student.projector.",
        "teacher.",
        "student.criterion.heads.camera.",
        "student.criterion.heads.camera.temperatures",
        "student.criterion.balance_norms",
        "student.criterion.log_temperature",
    ):
        assert any(name.startswith(part) for name in unchanged), part


def test_a_finished_run_resumed_is_left_as_it_is(whole_run: Path, shards: Path) -> None:
    before = (whole_run / "metrics.jsonl").read_bytes()
    result = train(run_config(shards, whole_run), resume=True)
    assert result.checkpoint == path_of(whole_run, STEPS)
    assert (whole_run / "metrics.jsonl").read_bytes() == before


def test_the_callers_random_state_is_left_alone(shards: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    train(run_config(shards, tmp_path / "run", epochs=1))
    assert torch.equal(torch.rand(1), expected)


def test_a_killed_run_resumes_from_its_last_checkpoint(
    shards: Path, tmp_path: Path, whole_run: Path
) -> None:
    config = run_config(shards, tmp_path / "run", epochs=2, log_every=1)
    path = write_yaml(config, tmp_path / "config.yaml")
    command = [sys.executable, "-m", "fino_fast.cli", "train", str(path)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not checkpoints(config.output) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.communicate()
    (config.output / "checkpoints" / ".tmp-step-00000006").mkdir(exist_ok=True)
    train(config, resume=True)
    assert differing(path_of(config.output, STEPS), path_of(whole_run, STEPS)) == []
    assert untimed(config.output) == untimed(whole_run)
    assert not list(config.output.rglob(".tmp-*"))


def test_ctrl_c_exits_130_and_says_how_to_resume(
    shards: Path,
    tmp_path: Path,
    whole_run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write_yaml(run_config(shards, tmp_path / "run"), tmp_path / "config.yaml")
    with monkeypatch.context() as patch:
        signal_at(patch, 3, signal.SIGINT)
        assert main(["train", str(path)]) == 130
    error = capsys.readouterr().err
    assert "stopped after step 3" in error
    assert f"fino-fast train {path} --resume" in error
    assert main(["train", str(path)]) == 1
    assert "--resume" in capsys.readouterr().err
    assert main(["train", str(path), "--resume"]) == 0
    assert f"{STEPS} steps" in capsys.readouterr().out
    assert differing(path_of(tmp_path / "run", STEPS), path_of(whole_run, STEPS)) == []


@pytest.mark.parametrize(
    ("changes", "present", "absent"),
    [
        ({"precision": "bf16"}, {"contrastive"}, set()),
        ({"teacher": None, "projector": None, "loader": "torch"}, {"contrastive"}, set()),
        ({"contrastive": None, "optimizer": {"clip": None}}, {"camera"}, {"contrastive"}),
        (
            {"contrastive": {"two_tower": True}, "ramp": {"kind": "constant"}},
            {"contrastive"},
            set(),
        ),
        (
            {"views": {"size": 48, "count": 1, "local_size": 32, "local_count": 2}},
            {"contrastive"},
            set(),
        ),
        (
            {"factors": {"defect": {"role": "suppress"}, "camera": {"role": "ignore"}}},
            {"defect", "defect/accuracy"},
            {"camera", "camera/accuracy"},
        ),
    ],
)
def test_what_can_be_switched(
    shards: Path, tmp_path: Path, changes: dict[str, Any], present: set[str], absent: set[str]
) -> None:
    result = train(run_config(shards, tmp_path / "run", epochs=1, **changes))
    found = rows(tmp_path / "run")
    assert len(found) == result.steps
    assert present <= found[-1].keys()
    assert not absent & found[-1].keys()


def test_images_of_five_channels_take_weights_of_three(
    five_channel_shards: Path, tmp_path: Path
) -> None:
    save_file(build_backbone("test_vit", image_size=32).state_dict(), tmp_path / "w.safetensors")
    backbone = {"name": "test_vit", "weights": tmp_path / "w.safetensors"}
    result = train(run_config(five_channel_shards, tmp_path / "run", backbone=backbone, epochs=1))
    report = json.loads((tmp_path / "run" / "weights.json").read_text())
    assert report["adapted"] == ["patch_embed.proj.weight"]
    trained, views = load_backbone(result.checkpoint)
    assert trained.patch_embed.proj.weight.shape[1] == 5
    assert len(views.mean) == len(views.std) == 1


def test_views_are_normalised_as_the_backbone_expects(shards: Path, tmp_path: Path) -> None:
    train(run_config(shards, tmp_path / "a", backbone={"name": "test_efficientnet"}, epochs=1))
    assert load_backbone(tmp_path / "a")[1].mean == [0.485, 0.456, 0.406]
    own = {"size": 32, "mean": [0.1], "std": [0.9]}
    train(run_config(shards, tmp_path / "b", views=own, epochs=1))
    assert load_backbone(tmp_path / "b")[1].mean == [0.1]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_bar_is_for_terminals(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    for screen, name in ((Terminal(), "shown"), (io.StringIO(), "piped")):
        monkeypatch.setattr(sys, "stderr", screen)
        train(run_config(shards, tmp_path / name, epochs=1))
        last = screen.getvalue().split("\r")[-1]
        if name == "shown":
            pattern = r"3/3 \[\d\d:\d\d<\d\d:\d\d,.*step/?s.*loss .*images/s, \d+% waiting for data"
            assert re.search(pattern, last.replace("s/step", "step/s")), last
        else:
            assert last == ""


def test_weights_reach_the_model_and_the_report_is_kept(
    shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(9)
    source = build_backbone("test_resnet").state_dict()
    del source["layer1.0.conv1.weight"]
    save_file(source, tmp_path / "w.safetensors")
    backbone = {"name": "test_resnet", "weights": tmp_path / "w.safetensors", "freeze": 0.99}
    train(run_config(shards, tmp_path / "run", backbone=backbone, epochs=1, checkpoint_every=1))
    assert "1 MISSING in the file" in caplog.text
    report = json.loads((tmp_path / "run" / "weights.json").read_text())
    assert report["missing"] == ["layer1.0.conv1.weight"]
    frozen = tensors(path_of(tmp_path / "run", 2))
    for key in report["matched"]:
        assert torch.equal(frozen[f"student.backbone.{key}"], source[key]), key


def test_a_taken_output_folder_is_refused(shards: Path, tmp_path: Path, started_run: Path) -> None:
    before = sorted(started_run.rglob("*"))
    with pytest.raises(ConfigError, match=r"holds a run; continue it with --resume"):
        train(run_config(shards, started_run))
    assert sorted(started_run.rglob("*")) == before
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.tex").touch()
    with pytest.raises(ConfigError, match=r"notes: is not empty"):
        train(run_config(shards, tmp_path / "notes"))
    with pytest.raises(ConfigError, match=r"thesis\.tex: is a file"):
        train(run_config(shards, tmp_path / "notes" / "thesis.tex"))


def test_nothing_to_resume(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"run: no such folder"):
        train(run_config(shards, tmp_path / "run"), resume=True)
    (tmp_path / "run").mkdir()
    with pytest.raises(DataError, match=r"run: has no checkpoint"):
        train(run_config(shards, tmp_path / "run"), resume=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 3}, r"changed: epochs: 2 → 3\."),
        ({"seed": 1, "batch_size": 4}, r"batch_size: 8 → 4; seed: 0 → 1"),
        ({"optimizer": {"lr": 2e-3, "warmup": 0.3}}, r"optimizer\.lr: 0\.001 → 0\.002"),
        ({"factors": {}}, r"factors\.camera\.concentration: ema → absent"),
        ({"teacher": None}, r"teacher: absent → None; teacher\.momentum: 0\.9 → absent"),
    ],
)
def test_a_resumed_run_keeps_its_configuration(
    shards: Path, started_run: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        train(run_config(shards, started_run, **changes), resume=True)


def test_a_run_begun_before_a_setting_existed_has_its_default(shards: Path, tmp_path: Path) -> None:
    saved = run_config(shards, tmp_path).model_dump(mode="json")
    del saved["groups"]
    check_same(saved, run_config(shards, tmp_path))
    grouped = run_config(shards, tmp_path, groups={"factor": "camera", "size": 2})
    with pytest.raises(ConfigError, match=r"changed: groups: None → absent; groups\.f"):
        check_same(saved, grouped)


def test_harmless_changes_and_a_moved_run(
    shards: Path, started_run: Path, tmp_path: Path, whole_run: Path
) -> None:
    moved, data = tmp_path / "elsewhere", tmp_path / "moved-shards"
    started_run.rename(moved)
    shutil.copytree(shards, data)
    changes = {"log_every": 5, "checkpoint_every": 9, "keep_checkpoints": 1}
    train(run_config(data, moved, **changes), resume=True)
    assert differing(path_of(moved, STEPS), path_of(whole_run, STEPS)) == []
    assert checkpoints(moved) == [path_of(moved, STEPS)]


def test_shards_that_moved_into_a_store(
    shards: Path,
    started_run: Path,
    whole_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The configuration names a URL, in YAML too; the run ends with the same bits."""
    monkeypatch.setenv("FINO_CACHE", str(tmp_path / "cache"))
    store = fsspec.filesystem("memory")
    store.put(str(shards), "/lab/shards", recursive=True)
    config = run_config(shards, started_run).model_copy(
        update={"data": location("memory://lab/shards")}
    )
    path = write_yaml(config, tmp_path / "config.yaml")
    assert main(["train", str(path), "--resume"]) == 0
    assert differing(path_of(started_run, STEPS), path_of(whole_run, STEPS)) == []


def test_a_second_training_on_one_folder_is_refused(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the first one is in its third step: a new one, and a continuation. (That a killed run's
    folder is free again is shown by the test of killed runs.)"""
    config = run_config(shards, tmp_path / "run", checkpoint_every=1)
    original = Learner.step
    refused = []

    def interfering(self: Learner, index: int, *batch: Any) -> Any:
        if index == 2 and not refused:
            for resume in (False, True):
                refused.append(resume)
                with pytest.raises(DataError, match="run: another training is writing there"):
                    train(config, resume=resume)
        return original(self, index, *batch)

    monkeypatch.setattr(Learner, "step", interfering)
    train(config)
    assert refused == [False, True]
    assert len(rows(config.output)) == STEPS


def test_every_rank_hears_that_the_folder_is_taken(tmp_path: Path) -> None:
    """Rank 1 does not wait for a rank 0 that has given up."""

    class Told(World):
        def largest(self, value: int) -> int:
            return 1

    cpu = torch.device("cpu")
    with (
        pytest.raises(DataError, match="rank 0 could not take it"),
        claimed(tmp_path, Told(1, 2, cpu)),
    ):
        pass
    with claimed(tmp_path, World(0, 1, cpu)), pytest.raises(DataError, match="another training"):
        claimed(tmp_path, Told(0, 2, cpu)).__enter__()


def test_damaged_samples_end_a_run_or_are_skipped_and_listed(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged = damaged_copy(shards, tmp_path / "shards", 9)
    run = run_config(damaged, tmp_path / "run", groups={"factor": "camera", "size": 2})
    with pytest.raises(DataError, match=r"sample '\d+' in .*shard-0000-000000\.tar at offset"):
        train(run)
    shutil.rmtree(run.output)
    run = run.model_copy(update={"on_error": "skip"})
    train(run)
    opened = ShardSet.open(shards)
    bad = {opened.ids[row] for row in opened.rows_of("adapt")[::9].tolist()}
    listed = skipped(run.output)
    assert {skip["id"] for skip in listed} == bad
    assert all("at offset" in skip["reason"] for skip in listed)
    assert [row["skipped"] for row in rows(run.output)] == [
        sum(skip["step"] <= step for skip in listed) for step in range(1, STEPS + 1)
    ]

    again = run.model_copy(update={"output": tmp_path / "again"})
    signal_at(monkeypatch, 3, signal.SIGTERM)
    with pytest.raises(TrainingInterrupted):
        train(again)
    # A crash after the checkpoint: what it had skipped by then is done again.
    with (again.output / "skipped-rank-0.jsonl").open("a") as file:
        file.write(json.dumps(listed[-1] | {"step": 4}) + "\n")
    monkeypatch.undo()
    train(again, resume=True)
    assert skipped(again.output) == listed
    assert untimed(again.output) == untimed(run.output)
    assert differing(path_of(again.output, STEPS), path_of(run.output, STEPS)) == []


def test_other_data_are_refused(five_channel_shards: Path, tmp_path: Path, shards: Path) -> None:
    views = {"size": 32, "mean": [0.5], "std": [0.5]}
    begun = run_config(shards, tmp_path / "run", views=views, epochs=1)
    train(begun)
    other = run_config(five_channel_shards, tmp_path / "run", views=views, epochs=1)
    with pytest.raises(FinoError, match="cannot resume: manifest was"):
        train(other, resume=True)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_named(shards: Path, started_run: Path, name: str) -> None:
    path = path_of(started_run, 4) / name
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"step-00000004"):
        train(run_config(shards, started_run), resume=True)
    if name != "optimizer.safetensors":
        with pytest.raises(DataError, match=name):
            load_backbone(started_run)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": Path("nowhere")}, "nowhere"),
        ({"backbone": {"name": "test_resnot"}}, "'test_resnot'"),
        (
            {"backbone": {"name": "test_vit", "weights": Path("gone.pth")}},
            r"gone\.pth: no such file",
        ),
        ({"factors": {"lens": {"weight": 1.0}}}, r"factors\.lens: the schema has no such factor"),
        ({"split": "validation"}, "validation"),
        ({"batch_size": 1000}, "1000"),
        ({"device": "cuda:7"}, "'cuda:7'"),
        ({"device": "abacus"}, "'abacus'"),
        ({"backend": "triton"}, "backend='triton' serves cuda"),
        ({"views": {"size": 32, "count": 1}}, r"needs views\.count ≥ 2"),
        ({"views": {"size": 32, "mean": [0.1, 0.2]}}, r"views\.mean has 2 values"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_written(
    shards: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(FinoError, match=message):
        train(run_config(shards, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_an_output_folder_that_cannot_be_made(shards: Path) -> None:
    with pytest.raises(ConfigError, match="output /proc/run: cannot be made"):
        train(run_config(shards, Path("/proc/run")))


def test_an_exploding_run_names_step_and_term(shards: Path, tmp_path: Path) -> None:
    config = run_config(
        shards,
        tmp_path / "run",
        backbone={"name": "test_resnet"},
        optimizer={"lr": 1e30, "warmup": 0.0, "clip": None, "weight_decay": 0},
    )
    with pytest.raises(DivergedError, match=r"step \d: not finite: loss is .*contrastive is"):
        train(config)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: shards\nbackbon: 1\n", "unknown key 'backbon'; missing key 'output'"),
        ("- a list\n", "expected a mapping"),
        ("data: [unclosed\n", "is not valid YAML"),
        (None, "cannot be read"),
    ],
)
def test_unreadable_configurations(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None, message: str
) -> None:
    path = tmp_path / "config.yaml"
    if text is not None:
        path.write_text(text)
    assert main(["train", str(path)]) == 1
    error = capsys.readouterr().err
    assert f"fino-fast train: error: {path}" in error
    for part in message.split("; "):
        assert part in error
