"""`fino-fast audit`."""

from pathlib import Path

from pydantic_settings import CliPositionalArg

from fino_fast.config import CommandModel
from fino_fast.data import ShardSet
from fino_fast.data.files import LocationField
from fino_fast.errors import ConfigError

from .audit import audit
from .audit_report import save_audit, summary


class Audit(CommandModel):
    """Say what the metadata of sealed shards can and cannot teach, before training.

    Gaps, classes and ranges of every factor, how strongly each pair goes together, and advice:
    preserved factors confounded with suppressed ones, constant or mostly missing factors, values
    seen once, splits that share no value. Reads no image. Writes audit.json, audit.md and
    audit.png.
    """

    shards: CliPositionalArg[LocationField]
    """Folder of sealed shards: a path or an fsspec URL."""
    out: Path
    """Folder of the report; it must not exist yet."""

    def run(self) -> int:
        if self.out.exists():
            raise ConfigError(f"{self.out}: exists already; remove it or choose another folder")
        result = audit(ShardSet.open(self.shards))
        save_audit(result, self.out)
        print("\n".join(summary(result)))
        print(f"{self.out}: audit.md, audit.json, audit.png")
        return 0
