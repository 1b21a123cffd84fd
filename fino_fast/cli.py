"""The `fino-fast` command. Knows every room; no room knows it.

One pydantic model per command: its docstring is the command's help, its fields are the options,
and its ``run()`` does the work and returns the exit code. A command's module is imported only
when that command is called, so `fino-fast ingest` needs neither torch nor timm.
"""

import importlib
import io
import os
import select
import signal
import sys
from typing import Protocol, cast

from .errors import FinoError, MissingExtraError

# command → (module, model, one line for the overview)
COMMANDS: dict[str, tuple[str, str, str]] = {
    "ingest": ("fino_fast.data.commands", "Ingest", "table + images → sealed shards"),
    "verify": ("fino_fast.data.commands", "Verify", "check every count, size and hash of shards"),
    "inspect": ("fino_fast.data.commands", "Inspect", "a contact sheet and every factor's values"),
    "audit": (
        "fino_fast.evaluate.audit_command",
        "Audit",
        "what the metadata can teach, before training",
    ),
    "train": ("fino_fast.train.commands", "Train", "adapt a backbone on shards"),
    "embed": ("fino_fast.evaluate.commands", "Embed", "embeddings of shards by a backbone"),
    "evaluate": ("fino_fast.evaluate.commands", "Evaluate", "probes and leakage on embeddings"),
    "export": ("fino_fast.train.export", "Export", "the adapted backbone as timm reads it"),
    "demo": ("fino_fast.evaluate.demo", "Demo", "the main job on real images, in minutes"),
}


class Command(Protocol):
    """What a command's model offers."""

    def run(self) -> int:
        """Do the work; return the exit code."""


def overview() -> str:
    lines = [f"  {name:<10}{line}" for name, (_, _, line) in COMMANDS.items()]
    return "\n".join(
        ["usage: fino-fast COMMAND [options]", "", *lines, "", "fino-fast COMMAND --help for one."]
    )


def main(argv: list[str] | None = None) -> int:
    """Run one command; return its exit code. Errors meant for people become one line."""
    args = sys.argv[1:] if argv is None else argv
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A name or a bar that a terminal's encoding has no sign for must not end a command.
        sys.stdout.reconfigure(errors="backslashreplace")
    name = args[0] if args else ""
    try:
        code = _run(args)
        sys.stdout.flush()  # while it can still be noticed that nobody reads it any more
        return code
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        # What is still buffered would fail once more at the end of the process.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except FinoError as error:
        print(f"fino-fast {name}: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"\nfino-fast {name}: interrupted", file=sys.stderr)
        return 130


def _run(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help"):
        print(overview())
        return 0 if args else 1
    name, rest = args[0], args[1:]
    if name not in COMMANDS:
        print(f"fino-fast: error: unknown command {name!r}\n\n{overview()}", file=sys.stderr)
        return 1
    try:
        return parse(name, rest).run()
    except SystemExit as stop:  # argparse: --help, or a usage that it explained
        # Its 2 would be read as "too many rejects"; see TooManyRejectsError.
        return 1 if stop.code else 0


def _reader_is_gone() -> bool:
    """Whether it is our output's pipe that broke (`| head` has seen enough), and not a connection
    to somewhere else."""
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in output.poll(0))


def parse(name: str, args: list[str]) -> Command:
    """The command's model, filled from its command line.

    Raises:
        ConfigError: an option's value is not what the command expects.
    """
    try:
        from pydantic import ValidationError
        from pydantic_settings import CliApp
    except ImportError as error:
        raise MissingExtraError("pydantic-settings", "cli") from error
    from .config import explain

    module, model, _ = COMMANDS[name]
    sys.argv[0] = f"fino-fast {name}"  # what argparse prints as the program's name
    try:
        return cast(Command, CliApp.run(getattr(importlib.import_module(module), model), args))
    except ValidationError as error:
        raise explain(error, "the command line", options=True) from error


if __name__ == "__main__":
    sys.exit(main())
