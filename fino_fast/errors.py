"""Errors that the commands report to a person instead of a traceback.

Wrong arguments to the loss are plain ``ValueError``s, as PyTorch users expect; these are for the
commands, where the exit code matters too.
"""


class FinoError(Exception):
    """Base of all errors that `fino-fast` reports in one line. `exit_code` is the command's."""

    exit_code = 1


class ConfigError(FinoError):
    """A configuration, schema or command line that cannot be used."""


class DataError(FinoError):
    """A table, image, shard or manifest that is not what it should be."""


class TooManyRejectsError(DataError):
    """More images were rejected than `--max-reject` allows."""

    exit_code = 2


class DiskFullError(DataError):
    """The output ran out of space; what is committed is intact and a rerun completes it."""

    exit_code = 3


class MissingExtraError(FinoError):
    """A package of an optional extra is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        self.package, self.extra = package, extra
        super().__init__(
            f"{package} is not installed; it comes with `pip install 'fino-fast[{extra}]'`"
        )

    def __reduce__(self) -> tuple[type["MissingExtraError"], tuple[str, str]]:
        """Built again from its arguments: it may come from a worker process."""
        return type(self), (self.package, self.extra)
