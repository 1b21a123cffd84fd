"""`fino-fast train`."""

import logging
import os
import sys
from pathlib import Path
from typing import TextIO

from pydantic_settings import CliPositionalArg

from fino_fast.config import CommandModel

from .config import TrainConfig
from .interrupt import TrainingInterrupted
from .trainer import train


class Train(CommandModel):
    """Adapt a backbone on sealed shards, as a YAML file says.

    Under torchrun (`torchrun --nproc-per-node 8 -m fino_fast.cli train config.yaml`) all processes
    form one batch. Ctrl-C writes a checkpoint and ends with exit code 130.
    """

    config: CliPositionalArg[Path]
    """The run's configuration, a YAML file of the keys of fino_fast.train.TrainConfig."""
    resume: bool = False
    """Continue the run from its newest checkpoint."""

    def run(self) -> int:
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        config = TrainConfig.from_yaml(self.config)
        try:
            result = train(config, resume=self.resume)
        except TrainingInterrupted as stop:
            say(
                f"\nstopped after step {stop.step}, checkpoint {stop.checkpoint}\n"
                f"resume with: fino-fast train {self.config} --resume",
                sys.stderr,
            )
            return stop.exit_code
        say(
            f"{result.steps} steps done\ncheckpoint {result.checkpoint}\nmetrics {result.metrics}",
            sys.stdout,
        )
        return 0


def say(text: str, stream: TextIO) -> None:
    """Print, on one of the ranks that torchrun started."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=stream)
