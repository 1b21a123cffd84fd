"""`fino-fast ingest --infer`: a first schema from the table, for a person to read and correct."""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fino_fast.errors import ConfigError, DataError

from .declaration import MISSING
from .files import committed
from .schema import shorten
from .table import NUMBER, column_names, is_parquet, read_table, reading, strings

_DELIMITERS = ",;\t|"
_MOST_CATEGORIES = 0.5
"""A text column with more different values than this share of its rows names no groups."""
_SPLITS = ("split", "subset", "fold", "partition")
_CIRCLES = {"angle": 360, "orientation": 360, "direction": 360, "hour": 24, "month": 12}


def infer_schema(table: Path, id_column: str, path_column: str, target: Path) -> None:
    """Write a first `schema.yaml`; every factor gets the role `ignore`, which a person changes.

    Raises:
        ConfigError: the target exists, or the id or path column does not.
        DataError: the table cannot be read, or has no rows or no further column.
    """
    if target.exists():
        raise ConfigError(f"{target}: exists already; --infer writes a new schema only")
    delimiter = _delimiter(table)
    names = column_names(table, delimiter)
    rows = read_table(table, list(dict.fromkeys([id_column, path_column, *names])), delimiter)
    if len(rows) == 0:
        raise DataError(f"{table}: has no rows")
    others = [name for name in names if name not in (id_column, path_column)]
    if not others:
        raise DataError(f"{table}: has no column besides id and path: there is no metadata")
    text = io.StringIO()
    columns = {name: _Column(name, rows[name]) for name in others}
    text.writelines(f"{line}\n" for line in _document(table, delimiter, columns))
    with committed(target) as file:
        file.write(text.getvalue().encode("utf-8"))


def _delimiter(table: Path) -> str:
    """The sign that parts the header into most columns; of equal ones the first."""
    if is_parquet(table):
        return _DELIMITERS[0]
    with reading(table), table.open(encoding="utf-8-sig", newline="") as file:
        header = file.readline()
    return max(_DELIMITERS, key=lambda sign: len(next(csv.reader([header], delimiter=sign), [])))


class _Column:
    """What can be said of one column without knowing what it means."""

    def __init__(self, name: str, values: pa.ChunkedArray) -> None:
        cells = strings(values)
        text = pc.utf8_trim_whitespace(cells)
        missing = pc.is_in(pc.fill_null(text, ""), value_set=pa.array(MISSING, pa.string()))
        self.name = name
        self.rows = len(cells)
        self.seen = cells.filter(pc.invert(missing))
        self.missing = self.rows - len(self.seen)
        stripped = pc.utf8_trim_whitespace(self.seen)
        self.point = self._all_match(stripped)
        self.comma = not self.point and self._all_match(pc.replace_substring(stripped, ",", "."))
        self.counts = {
            entry["values"].as_py(): entry["counts"].as_py() for entry in pc.value_counts(self.seen)
        }

    @staticmethod
    def _all_match(cells: pa.Array) -> bool:
        matches = pc.all(pc.match_substring_regex(cells, NUMBER)).as_py()
        return bool(matches) and len(cells) > 0

    @property
    def kind(self) -> str | None:
        """A guess, or None where the column is no factor."""
        if not self.counts:
            return None
        if self.name.lower() in _CIRCLES and (self.point or self.comma):
            return "cyclic"
        whole = all(value.lstrip("+-").isdigit() for value in list(self.counts)[:1000])
        if (self.point or self.comma) and not (whole and len(self.counts) <= 20):
            return "continuous"
        if len(self.counts) > _MOST_CATEGORIES * len(self.seen) and len(self.counts) > 20:
            return None
        return "categorical"

    def comment(self) -> str:
        share = f"{100 * self.missing / self.rows:.3g} % missing"
        if self.kind in ("continuous", "cyclic"):
            points = pc.replace_substring(self.seen, ",", ".") if self.comma else self.seen
            numbers = np.asarray(pc.utf8_trim_whitespace(points).cast(pa.float64()))
            return f"{share}, {numbers.min():g} to {numbers.max():g}"
        # JSON keeps line breaks and other signs that would end the comment out of it.
        listed = json.dumps(shorten(self.counts), ensure_ascii=False)[1:-1].replace('\\"', '"')
        return f"{share}, {len(self.counts)} values: {listed}"


def _document(table: Path, delimiter: str, columns: dict[str, _Column]) -> Iterator[str]:
    yield f"# Inferred from {table.name}. Read every line, then set the roles:"
    yield "#   preserve   the embedding shall keep it (cell line, stain)"
    yield "#   suppress   the embedding shall forget it (camera, plate, exposure)"
    yield "#   ignore     kept beside the images, for probes and reports"
    yield "version: 1"
    decimal = "," if any(column.comma for column in columns.values()) else "."
    yield f"table: {{delimiter: {quoted(delimiter)}, decimal: {quoted(decimal)}}}"
    split = next((name for name in columns if name.lower() in _SPLITS), None)
    if split is not None:
        counts = columns[split].counts
        guess = next((name for name in ("adapt", "train") if name in counts), next(iter(counts)))
        yield f"# {columns[split].comment()}"
        yield f"split: {{column: {quoted(split)}, adaptation: {quoted(guess)}}}"
    yield "factors:"
    for name, column in columns.items():
        if name == split:
            continue
        yield f"  # {column.comment()}"
        if column.kind is None:
            why = "has no value" if not column.counts else "names almost every row on its own"
            yield f"  # {quoted(name)}: left out, as it {why}"
            continue
        extra = f", period: {_CIRCLES[name.lower()]}" if column.kind == "cyclic" else ""
        yield f"  {quoted(name)}: {{kind: {column.kind}, role: ignore{extra}}}"


def quoted(text: str) -> str:
    """A YAML scalar that is this string and nothing else; JSON strings are YAML."""
    return json.dumps(text, ensure_ascii=False)
