"""The training run, from configuration to adapted backbone."""

import logging
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from fino_fast.data import Batch, Loader, ShardSet
from fino_fast.data.files import write_json
from fino_fast.errors import ConfigError

from . import checkpoint as checkpoints
from .backbone import WeightsReport
from .build import build_loader, build_start, build_student, settle_normalisation, split_of
from .claim import LOCK, claimed
from .config import TrainConfig, check_same
from .factors import build_factors
from .interrupt import StopRequest, TrainingInterrupted
from .learner import Learner
from .metrics import Record
from .scale import metadata_in_views, statistics_in_views
from .schedule import Schedule
from .skips import SkipList
from .world import join_world

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """Where a finished run left its results.

    Attributes:
        checkpoint: folder of the last checkpoint, for `checkpoint.load_backbone`.
        metrics: metrics.jsonl, one JSON object a row.
        steps: steps of the whole run.
    """

    checkpoint: Path
    metrics: Path
    steps: int


def train(config: TrainConfig, *, resume: bool = False) -> TrainResult:
    """Adapt a backbone as configured; under torchrun, on all ranks together.

    Args:
        config: everything that the result depends on.
        resume: continue the run in `config.output` from its newest checkpoint. On a CPU the result
            equals that of an uninterrupted run bit for bit.

    Raises:
        ConfigError: the configuration cannot be used, the output folder is taken, or a resumed run
            is configured differently.
        DataError: shards or checkpoint are damaged, or are not those of the run; or another
            training is writing to its folder.
        DivergedError: loss or gradient is not finite.
        TrainingInterrupted: Ctrl-C or SIGTERM; a checkpoint was written first.
    """
    with ExitStack() as stack:
        world = stack.enter_context(join_world(config.device))
        stack.enter_context(torch.random.fork_rng(world.gpus))
        if resume:
            checkpoints.latest(config.output)  # or there is nothing to claim
        stack.enter_context(claimed(config.output, world))
        newest = checkpoints.latest(config.output) if resume else None
        if newest is None:
            check_free(config.output)
        shards = ShardSet.open(config.data)
        config = settle_normalisation(config, shards)
        seen = statistics_in_views(shards, split_of(config, shards), config.views, config.seed)
        factors = build_factors(shards.schema, config.factors, seen)
        per_pixel = [factor.name for factor in factors if factor.name in seen]
        loader = build_loader(config, shards, [factor.name for factor in factors], world)
        schedule = Schedule.of_shares(
            config.epochs * loader.steps_per_epoch,
            warmup=config.optimizer.warmup,
            frozen=config.backbone.freeze,
        )
        torch.manual_seed(config.seed)
        backbone, report = build_start(config, loader.channels, load=newest is None)
        student = build_student(config, backbone, factors, loader.channels, world)
        learner = Learner(config, schedule, world, student)
        start = restore(newest, learner, loader) if newest else 0
        world.barrier()  # every rank has looked at the output folder before one writes to it
        if newest is None and world.rank == 0:
            begin_run(config, report)

        skips = SkipList(config.output, start, world) if config.on_error == "skip" else None
        with StopRequest() as stop, Record(config, schedule.total, start, world.rank) as record:
            for step, batch in record.waiting(batches(loader, start, schedule.total)):
                metadata = metadata_in_views(batch, config.views, per_pixel)
                terms = learner.step(step, views_of(batch), metadata)
                done = step + 1
                if skips is not None:
                    terms["skipped"] = skips.note(done, batch.skipped)
                record.step(done, terms, images=config.batch_size)
                signum = world.largest(stop.signum)
                if signum or done == schedule.total or done % config.checkpoint_every == 0:
                    write_checkpoint(done, learner, loader, shards)
                if signum and done < schedule.total:
                    raise TrainingInterrupted(
                        checkpoints.path_of(config.output, done), done, signum
                    )
    return TrainResult(
        checkpoints.path_of(config.output, schedule.total), record.path, schedule.total
    )


def batches(loader: Loader, start: int, total: int) -> Iterator[tuple[int, Batch]]:
    """(step, batch) for the steps start … total − 1, epoch after epoch."""
    step = start
    while step < total:
        epoch, offset = divmod(step, loader.steps_per_epoch)
        for batch in loader.epoch(epoch, start_step=offset):
            yield step, batch
            step += 1


def views_of(batch: Batch) -> list[torch.Tensor]:
    """A batch's views, one tensor for each image size."""
    return [batch.views] if batch.local_views is None else [batch.views, batch.local_views]


def check_free(output: Path) -> None:
    """A new run gets a folder of its own.

    Raises:
        ConfigError: there is something in it already.
    """
    if checkpoints.checkpoints(output):
        raise ConfigError(
            f"output {output}: holds a run; continue it with --resume (resume=True), or choose "
            "another output"
        )
    if any(path.name != LOCK for path in output.iterdir()):
        raise ConfigError(
            f"output {output}: is not empty and has no checkpoint to resume from; remove it or "
            "choose another output"
        )


def begin_run(config: TrainConfig, report: WeightsReport | None) -> None:
    """Write down what a run starts from.

    Raises:
        ConfigError: its folder cannot be written to.
    """
    try:
        write_json(config.output / "config.json", config.model_dump(mode="json"))
    except OSError as error:
        raise ConfigError(
            f"output {config.output}: cannot be written to: {error.strerror}"
        ) from error
    if report is None:
        log.info("the backbone starts from random weights")
    else:
        write_json(config.output / "weights.json", report.as_dict())
        log.log(logging.WARNING if report.missing else logging.INFO, "%s", report)


def restore(checkpoint: Path, learner: Learner, loader: Loader) -> int:
    """Put a run back to where a checkpoint was written; return the number of steps done.

    Raises:
        ConfigError: the run was configured differently.
        DataError: the checkpoint is damaged, or the data are not the same.
    """
    state = checkpoints.read_state(checkpoint)
    check_same(state.config, learner.config)
    loader.check_state(state.loader)
    checkpoints.restore(checkpoint, learner.models, learner.optimizer)
    return state.step


def write_checkpoint(done: int, learner: Learner, loader: Loader, shards: ShardSet) -> None:
    """Write the checkpoint after `done` steps, by rank 0 while the others wait."""
    config = learner.config
    state = checkpoints.State(
        step=done,
        config=config.model_dump(mode="json"),
        loader=loader.state(*divmod(done, loader.steps_per_epoch)),
        channels=loader.channels,
        data_schema=shards.schema.content(),
        data_schema_hash=shards.schema_hash,
        manifest_hash=shards.manifest_hash,
        packages={name: version(name) for name in ("fino-fast", "torch", "timm")},
    )
    if learner.world.rank == 0:
        keep = config.keep_checkpoints
        checkpoints.save(config.output, learner.models, learner.optimizer, state, keep=keep)
    learner.world.barrier()
