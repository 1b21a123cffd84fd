"""Stopping between two steps instead of in the middle of one."""

import signal
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self


class TrainingInterrupted(KeyboardInterrupt):
    """A run was asked to stop and wrote a checkpoint first.

    Attributes:
        checkpoint: folder of that checkpoint.
        step: number of steps done.
        exit_code: the shell's code for the signal, 130 for Ctrl-C.
    """

    def __init__(self, checkpoint: Path, step: int, signum: int) -> None:
        super().__init__(f"stopped after step {step}; checkpoint {checkpoint}")
        self.checkpoint = checkpoint
        self.step = step
        self.exit_code = 128 + signum


class StopRequest:
    """Keeps the first SIGINT or SIGTERM as a request to be read between steps.

    A second SIGINT interrupts at once. Outside the main thread, where Python allows no handlers,
    signals keep their usual effect.
    """

    def __init__(self) -> None:
        self.signum = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._previous[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.signum and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.signum = signum
