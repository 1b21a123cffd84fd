"""`fino-fast ingest --infer`: a first schema from the table, for a person to read and correct."""

import csv
import io
import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fino_fast.errors import ConfigError, DataError

from .declaration import MISSING
from .files import committed
from .schema import shorten
from .table import (
    NUMBER,
    column_names,
    is_parquet,
    no_cells,
    reading,
    strings,
    table_chunks,
)

_DELIMITERS = ",;\t|"
_MOST_CATEGORIES = 0.5
"""A text column with more different values than this share of its rows names no groups."""
_COUNTED = 100_000
"""Different values of a column that are counted; more are told from the rows up to there."""
_SEPARATORS = ";|"
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
    odd = no_cells(table)
    names = [name for name in column_names(table, delimiter) if name not in odd]
    columns = {name: _Column(name) for name in names if name not in (id_column, path_column)}
    rows = 0
    for chunk in table_chunks(
        table, list(dict.fromkeys([id_column, path_column, *names])), delimiter
    ):
        rows += len(chunk)
        for name, column in columns.items():
            column.add(chunk[name])
    if rows == 0:
        raise DataError(f"{table}: has no rows")
    if not columns:
        raise DataError(f"{table}: has no column besides id and path: there is no metadata")
    text = io.StringIO()
    text.writelines(f"{line}\n" for line in _document(table, delimiter, columns))
    text.writelines(
        f"  # {quoted(name)}: left out, as it holds {what}\n" for name, what in odd.items()
    )
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
    """What can be said of one column without knowing what it means; its cells come in pieces."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.rows = self.seen = 0
        self.counts: Counter[str] = Counter()
        """How often each value occurs, until there are too many of them."""
        self._counted = 0
        self._many = False
        self._point = self._comma = True
        self._low, self._high = math.inf, -math.inf

    def add(self, values: pa.ChunkedArray) -> None:
        """Take in the cells of some rows."""
        cells = strings(values)
        text = pc.utf8_trim_whitespace(cells)
        missing = pc.is_in(pc.fill_null(text, ""), value_set=pa.array(MISSING, pa.string()))
        cells, text = (each.filter(pc.invert(missing)) for each in (cells, text))
        self.rows += len(missing)
        self.seen += len(cells)
        if not len(cells):
            return
        self._point = self._point and _are_numbers(text)
        points = pc.replace_substring(text, ",", ".")
        self._comma = self._comma and _are_numbers(points)
        if self._comma:
            numbers = np.asarray(points.cast(pa.float64()))
            self._low = min(self._low, float(numbers.min()))
            self._high = max(self._high, float(numbers.max()))
        if not self._many:
            for entry in pc.value_counts(cells):
                self.counts[entry["values"].as_py()] += entry["counts"].as_py()
            self._counted = self.seen
            self._many = len(self.counts) > _COUNTED

    @property
    def point(self) -> bool:
        """Whether all cells are numbers with a decimal point, or whole ones."""
        return self.seen > 0 and self._point

    @property
    def comma(self) -> bool:
        """Whether they are numbers, some with a decimal comma."""
        return self.seen > 0 and self._comma and not self._point

    @property
    def separator(self) -> str | None:
        """What stands between several values in a cell, if anything does."""
        for sign in _SEPARATORS:
            if any(sign in value for value in self.counts):
                parts = {part.strip() for value in self.counts for part in value.split(sign)}
                # Combinations of a few names, and not names that hold the sign.
                if len(parts - {""}) <= len(self.counts):
                    return sign
        return None

    @property
    def kind(self) -> str | None:
        """A guess, or None where the column is no factor."""
        if not self.seen:
            return None
        if self.name.lower() in _CIRCLES and (self.point or self.comma):
            return "cyclic"
        whole = all(value.strip().lstrip("+-").isdigit() for value in list(self.counts)[:1000])
        if (self.point or self.comma) and not (whole and len(self.counts) <= 20):
            return "continuous"
        if self.separator is not None and not self._many:
            return "multi"
        if len(self.counts) > _MOST_CATEGORIES * self._counted and len(self.counts) > 20:
            return None
        return "categorical"

    def options(self) -> str:
        """What the schema says of the column besides kind and role."""
        if self.kind == "cyclic":
            return f", period: {_CIRCLES[self.name.lower()]}"
        return f", separator: {quoted(self.separator)}" if self.separator == "|" else ""

    def comment(self) -> str:
        share = f"{100 * (self.rows - self.seen) / self.rows:.3g} % missing"
        if self.kind in ("continuous", "cyclic"):
            return f"{share}, {self._low:g} to {self._high:g}"
        # JSON keeps line breaks and other signs that would end the comment out of it.
        listed = json.dumps(shorten(self.counts), ensure_ascii=False)[1:-1].replace('\\"', '"')
        many = f"more than {_COUNTED}" if self._many else f"{len(self.counts)}"
        what = "combinations" if self.kind == "multi" else "values"
        return f"{share}, {many} {what}: {listed}"


def _are_numbers(cells: pa.Array) -> bool:
    return bool(pc.all(pc.match_substring_regex(cells, NUMBER)).as_py())


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
            why = "has no value" if not column.seen else "names almost every row on its own"
            yield f"  # {quoted(name)}: left out, as it {why}"
            continue
        yield f"  {quoted(name)}: {{kind: {column.kind}, role: ignore{column.options()}}}"


def quoted(text: str) -> str:
    """A YAML scalar that is this string and nothing else; JSON strings are YAML."""
    return json.dumps(text, ensure_ascii=False)
