"""One training at a time on a run's folder."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from fino_fast.data.lock import locked
from fino_fast.errors import ConfigError, DataError, FinoError

from .world import World

LOCK = "train.lock"


@contextmanager
def claimed(output: Path, world: World) -> Iterator[None]:
    """Hold the run's folder, which is made where there is none, for all ranks together.

    The system drops the lock with the process that held it: a killed run leaves none. A run that
    ends before it has written anything leaves no folder either.

    Raises:
        DataError: another training holds the folder.
        ConfigError: it cannot be made. Both on every rank.
    """
    with ExitStack() as stack:
        fault: FinoError | None = None
        if world.rank == 0:
            new = not output.exists()
            try:
                output.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(output / LOCK, "another training"))
                stack.callback(_leave, output, new)
            except FileExistsError:
                fault = ConfigError(f"output {output}: is a file; expected a folder")
            except OSError as error:
                fault = ConfigError(f"output {output}: cannot be made: {error.strerror}")
            except DataError as error:
                fault = error
        if world.largest(int(fault is not None)):
            raise fault or DataError(f"{output}: rank 0 could not take it; see its message")
        yield


def _leave(output: Path, new: bool) -> None:
    """Remove what only claiming has put there."""
    if [path.name for path in output.iterdir()] == [LOCK]:
        (output / LOCK).unlink()
        if new:
            output.rmdir()
