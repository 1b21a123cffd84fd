"""How tasks are run: one method, `run`, behind which processes of this machine or Ray work.

A task is a pure function, so a lost worker costs time and nothing else: its task is run again, and
a task that keeps killing its workers is named.
"""

import contextlib
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, resource_tracker
from typing import Any, Protocol, TypeVar

from fino_fast.errors import DataError, MissingExtraError


class Named(Protocol):
    """A task, whose name goes into messages."""

    @property
    def name(self) -> str: ...


TaskT = TypeVar("TaskT", bound=Named)
ResultT = TypeVar("ResultT")

ATTEMPTS = 3
"""How often a task is tried when its worker dies."""
_ANSWER_SECONDS = 10.0


def processors() -> int:
    """Processors that this process may use; all of the machine where the system cannot say."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


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
                    f"workers died {ATTEMPTS} times while writing {', '.join(exhausted)}: out of "
                    "memory (use fewer workers), or started by a script without an `if __name__ == "
                    "'__main__'` guard; the other shards are intact: run the same again"
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
                    with _interrupts_held():
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


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Keep Ctrl-C, which a terminal sends to the whole group, from workers that are started here.

    They inherit that it is blocked: until `_prepare_worker` it would end them in an import, with a
    traceback each. The driver has it delivered at the end of the block.
    """
    # Started once, and by itself takes the block off.
    resource_tracker.ensure_running()
    former = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


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


class RayEngine:
    """Ray core tasks, on a cluster or on a local Ray that lives as long as the run.

    Core tasks and not Ray Data, which drops a whole block with one bad row. All nodes must see
    images and output under the same paths.
    """

    def __init__(self, workers: int | None = None, address: str | None = None) -> None:
        self.workers = workers
        self.address = address

    def run(
        self, function: Callable[[TaskT], ResultT], tasks: Sequence[TaskT]
    ) -> Iterator[ResultT]:
        if not tasks:
            return
        ray = import_ray()
        own = not ray.is_initialized()
        if own:
            self._connect(ray)
        try:
            remote = ray.remote(num_cpus=1, max_retries=ATTEMPTS - 1)(lambda task: function(task))
            waiting = list(tasks)[::-1]
            running: dict[Any, TaskT] = {}
            # A few tasks more than processors: enough to keep them busy, few to hold in memory.
            window = 2 * max(int(ray.cluster_resources().get("CPU", 1)), 1)
            while waiting or running:
                while waiting and len(running) < window:
                    task = waiting.pop()
                    running[remote.remote(task)] = task
                (ready,), _ = ray.wait(list(running), num_returns=1)
                yield _ray_result(ray, ready, running.pop(ready))
        finally:
            if own:
                ray.shutdown()

    def _connect(self, ray: Any) -> None:
        """Join the cluster, or start a Ray of this run's own.

        Raises:
            DataError: there is no Ray at the address, or none can be started here.
        """
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if self.address is None:
            # "local": without it Ray would join whatever cluster this machine is part of.
            options |= {"num_cpus": self.workers, "include_dashboard": False}
        else:
            _check_answers(self.address)
        try:
            ray.init(address=self.address or "local", **options)
        except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
            where = f"at {self.address} cannot be joined" if self.address else "does not start here"
            raise DataError(f"Ray {where}: {error}") from error


def _check_answers(address: str) -> None:
    """Refuse an address where nobody listens, which Ray would go on asking for minutes.

    Raises:
        DataError: the connection is refused, or not answered within seconds.
    """
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not port.isdecimal():  # "auto": Ray looks by itself, and does not wait
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_SECONDS).close()
    except OSError as error:
        raise DataError(f"ray-address: {address} does not answer: {error}") from error


def import_ray() -> Any:
    """ray, or the error that says which extra brings it."""
    try:
        import ray
    except ImportError as error:
        raise MissingExtraError("ray", "ray") from error
    return ray


def _ray_result(ray: Any, ready: Any, task: Named) -> Any:
    """A finished task's result; its errors as the local engine would raise them."""
    try:
        return ray.get(ready)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayError as error:
        raise DataError(
            f"Ray gave up writing {task.name} after {ATTEMPTS} attempts "
            f"({type(error).__name__}); the other shards are intact: run the same command again"
        ) from error
