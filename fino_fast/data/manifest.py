"""`MANIFEST.json`: written last, names everything that belongs to a sealed set, with hashes."""

import hashlib
from typing import Literal, Self

from pydantic import Field, model_validator

from fino_fast.config import StrictModel
from fino_fast.errors import ConfigError, DataError

from .files import Location, canonical_json, read_json

MANIFEST = "MANIFEST.json"


class SealedFile(StrictModel):
    """A file of the set."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9.-]*$")
    bytes: int = Field(ge=0)
    sha256: str


class SealedShard(StrictModel):
    """A shard of the set: its tar and its sidecar. Its receipt has these fields, and more."""

    name: str = Field(pattern=r"^shard-\d{4}-\d{6}$")
    first_row: int = Field(ge=0)
    rows: int = Field(ge=1)
    samples: int = Field(ge=0)
    rejected: int = Field(ge=0)
    bytes: int = Field(ge=0)
    sha256: str
    sidecar_sha256: str

    @model_validator(mode="after")
    def _samples_add_up(self) -> Self:
        if self.samples + self.rejected != self.rows:
            raise ValueError(
                f"shard {self.name}: {self.samples} samples + {self.rejected} rejected are not "
                f"{self.rows} rows"
            )
        return self


class Manifest(StrictModel):
    """What a sealed set consists of."""

    format: Literal["fino-fast shards"] = "fino-fast shards"
    version: Literal[2] = 2
    planned: int = Field(ge=1)
    """Rows that were ever planned."""
    samples: int = Field(ge=1)
    """Rows whose images are in the shards."""
    rejected: int = Field(ge=0)
    """Planned rows without an image; a row that was tried again is planned once more."""
    plans: list[str] = Field(min_length=1)
    """SHA-256 of the `plan.json` of every generation."""
    schema_file: SealedFile
    index: SealedFile
    table: SealedFile
    """One row a sample: id, path, split and raw metadata, in the order of the index."""
    metadata: SealedFile
    """One record a sample: what the loss takes of its metadata, in the order of the index."""
    shards: list[SealedShard] = Field(min_length=1)

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        row = 0
        for shard in self.shards:
            if shard.first_row != row:
                raise ValueError(f"shard {shard.name} starts at row {shard.first_row}, not {row}")
            row += shard.rows
        if row != self.planned or self.samples + self.rejected != self.planned:
            raise ValueError("the counts do not add up")
        if sum(shard.samples for shard in self.shards) != self.samples:
            raise ValueError("the shards' samples do not add up")
        return self

    @classmethod
    def read(cls, folder: Location) -> Self:
        """Read the manifest of a sealed set.

        Raises:
            DataError: the set is not sealed, or by an earlier version, or the manifest is damaged.
        """
        path = folder / MANIFEST
        try:
            sealed = path.is_file()
        except OSError as error:
            raise DataError(f"{folder}: cannot be read: {error.strerror}") from error
        if not sealed:
            raise DataError(
                f"{folder}: is no sealed set of shards: it has no {MANIFEST}; run `fino-fast "
                "ingest` until it ends without an error"
            )
        content = read_json(path)
        if content.get("version") == 1:
            raise DataError(
                f"{folder}: was sealed by an earlier fino-fast; run the same `fino-fast ingest` "
                "again: it keeps every shard and seals them anew"
            )
        try:
            return cls.checked(content, str(path))
        except ConfigError as error:
            raise DataError(f"{error}; the file is damaged") from error

    @property
    def hash(self) -> str:
        """SHA-256 of the manifest: one name for the whole content of the set."""
        return hashlib.sha256(canonical_json(self.model_dump(mode="json"))).hexdigest()
