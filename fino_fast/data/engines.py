"""How tasks are run: one method, `run`, behind which processes of this machine or Ray work.

A task is a pure function, so a lost worker costs time and nothing else: its task is run again, and
a task that keeps killing its workers is named.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Protocol, TypeVar

from fino_fast.errors import DataError


class Named(Protocol):
    """A task, whose name goes into messages."""

    @property
    def name(self) -> str: ...


TaskT = TypeVar("TaskT", bound=Named)
ResultT = TypeVar("ResultT")

ATTEMPTS = 3
"""How often a task is tried when its worker dies."""


class Engine(Protocol):
    """Runs tasks somewhere."""

    def run(
        self, function: Callable[[TaskT], ResultT], tasks: Sequence[TaskT]
    ) -> Iterator[ResultT]:
        """Yield the results in the order in which they are ready.

        Raises:
            DataError: a task's workers died `ATTEMPTS` times; the message names it.
            Exception: what the function itself raised.
        """


class LocalEngine:
    """Processes on this machine.

    `ProcessPoolExecutor` notices a killed worker, where `multiprocessing.Pool` waits for ever.
    Workers are spawned, not forked: a fork copies locks that other threads hold.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers

    def run(
        self, function: Callable[[TaskT], ResultT], tasks: Sequence[TaskT]
    ) -> Iterator[ResultT]:
        attempts: dict[int, int] = dict.fromkeys(range(len(tasks)), 0)
        while attempts:
            yield from self._run_once(function, tasks, attempts)
            exhausted = [tasks[i].name for i, tried in attempts.items() if tried >= ATTEMPTS]
            if exhausted:
                raise DataError(
                    f"workers died {ATTEMPTS} times while writing {', '.join(exhausted)} (out of "
                    "memory?); the other shards are intact: run the same command again, with "
                    "fewer --workers"
                )

    def _run_once(
        self,
        function: Callable[[TaskT], ResultT],
        tasks: Sequence[TaskT],
        attempts: dict[int, int],
    ) -> Iterator[ResultT]:
        """One pool's life; what is left in `attempts` afterwards has to be run again."""
        waiting = list(attempts)
        running: dict[Future[ResultT], int] = {}
        pool = ProcessPoolExecutor(
            self.workers, get_context("spawn"), initializer=_prepare_worker, initargs=(os.getpid(),)
        )
        try:
            while waiting or running:
                # Only as many as there are workers: when a pool breaks, these and no others are
                # suspected, and Ctrl-C leaves no queue behind.
                while waiting and len(running) < self.workers:
                    i = waiting.pop(0)
                    running[pool.submit(function, tasks[i])] = i
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    result = future.result()
                    del attempts[running.pop(future)]
                    yield result
        except BrokenProcessPool:
            for i in running.values():
                attempts[i] += 1
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _prepare_worker(parent: int) -> None:
    """In a worker: end when the driver is gone, so that a killed driver leaves no orphans.

    Ctrl-C goes to the driver alone, which lets the shards in work finish.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
