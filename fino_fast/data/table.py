"""Read the table of a data set and turn its cells into checked raw values.

Everything here looks at the whole table before it complains, so that a person sees all faults of
one kind at once, each with its row.
"""

import contextlib
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from fino_fast.errors import ConfigError, DataError, TooManyRejectsError

from .declaration import (
    CategoricalDeclaration,
    ContinuousDeclaration,
    CyclicDeclaration,
    Declaration,
    FactorDeclaration,
    MultiDeclaration,
)

NUMBER = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"
_SHOWN = 10


@dataclass
class Rows:
    """The table's content that ingestion keeps; all arrays have one entry a row."""

    ids: pa.Array
    paths: pa.Array
    splits: pa.Array
    raw: dict[str, pa.Array]
    """Raw values by factor: strings, lists of strings, float64, or fixed-size lists of float64."""
    unknown: dict[str, dict[str, int]] = field(default_factory=dict)
    """Values outside a declared vocabulary that were taken as missing, by factor, with counts."""

    def __len__(self) -> int:
        return len(self.ids)

    def taken(self, places: pa.Array) -> "Rows":
        """The rows at `places`, in that order."""
        raw = {name: values.take(places) for name, values in self.raw.items()}
        return Rows(
            self.ids.take(places),
            self.paths.take(places),
            self.splits.take(places),
            raw,
            self.unknown,
        )


@dataclass
class _Fault:
    row: int
    column: str
    what: str


def read_table(path: Path, columns: list[str], delimiter: str = ",") -> pa.Table:
    """The named columns of a CSV (all as strings: "007" stays "007") or Parquet file.

    Raises:
        DataError: the file cannot be read or is not what its name says.
        ConfigError: a column is not there, or stands there twice.
    """
    _check_columns(path, column_names(path, delimiter), columns)
    with _reading(path):
        if is_parquet(path):
            return pq.read_table(path, columns=columns).combine_chunks()
        convert = pyarrow.csv.ConvertOptions(
            column_types=dict.fromkeys(columns, pa.string()),
            include_columns=columns,
            strings_can_be_null=False,
        )
        table = pyarrow.csv.read_csv(path, parse_options=_csv(delimiter), convert_options=convert)
        return table.combine_chunks()


def column_names(path: Path, delimiter: str = ",") -> list[str]:
    """The table's column names, without reading its rows.

    Raises:
        DataError: the file cannot be read or is not what its name says.
    """
    with _reading(path):
        if is_parquet(path):
            return list(pq.read_schema(path).names)
        with pyarrow.csv.open_csv(path, parse_options=_csv(delimiter)) as reader:
            return list(reader.schema.names)


def is_parquet(path: Path) -> bool:
    return path.suffix.lower() in (".parquet", ".pq")


def _csv(delimiter: str) -> pyarrow.csv.ParseOptions:
    return pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn what Arrow raises on bad files into errors that name the file."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    except pa.ArrowException as error:
        hint = "" if is_parquet(path) else "; is table.delimiter in the schema right?"
        raise DataError(f"{path}: cannot be read as a table: {error}{hint}") from error


def _check_columns(path: Path, present: list[str], wanted: list[str]) -> None:
    absent = sorted({name for name in wanted if name not in present})
    if absent:
        hint = ""
        if len(present) == 1 and any(sign in present[0] for sign in ";\t|"):
            hint = "; its header has one column: set table.delimiter in the schema"
        raise ConfigError(f"{path}: no column {_listed(absent)}; it has {_listed(present)}{hint}")
    twice = sorted({name for name in wanted if present.count(name) > 1})
    if twice:
        raise ConfigError(f"{path}: column {_listed(twice)} stands there more than once")


def _listed(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:30])
    return shown + (f" and {len(names) - 30} more" if len(names) > 30 else "")


def parse_rows(table: pa.Table, declaration: Declaration, id_column: str, path_column: str) -> Rows:
    """Checked raw values of every row.

    Raises:
        TooManyRejectsError: an id or path is missing, a number cannot be read or is infinite or
            out of its declared bounds, or a value is outside its vocabulary; the message lists
            rows (1 = first row below the header).
        DataError: ids occur twice, also when they differ only by case or Unicode form.
    """
    faults: list[_Fault] = []
    ids = _required(table, id_column, faults)
    paths = _required(table, path_column, faults)
    if declaration.split:
        splits = _required(table, declaration.split.column, faults)
    else:
        splits = pa.array([declaration.adaptation_split] * len(table), type=pa.string())
    rows = Rows(ids, paths, splits, {})
    for name, factor in declaration.factors.items():
        columns = declaration.columns_of(name)
        markers = [*declaration.table.missing, *factor.missing]
        rows.raw[name] = _parse_factor(
            table, columns, factor, markers, declaration.table.decimal, faults
        )
        if isinstance(factor, CategoricalDeclaration | MultiDeclaration):
            rows.raw[name], unknown = _apply_vocabulary(rows.raw[name], factor, columns[0], faults)
            if unknown:
                rows.unknown[name] = unknown
    if faults:
        raise TooManyRejectsError(_report(faults, ids))
    _check_duplicates(ids)
    return rows


def _report(faults: list[_Fault], ids: pa.Array) -> str:
    faults.sort(key=lambda fault: fault.row)
    lines = [
        f"row {fault.row + 1} (id {ids[fault.row].as_py()!r}), {fault.column!r}: {fault.what}"
        for fault in faults[:_SHOWN]
    ]
    if len(faults) > _SHOWN:
        lines.append(f"and {len(faults) - _SHOWN} more")
    return (
        f"{len(faults)} cells of the table cannot be used; correct them, or declare what stands "
        "for a missing value:\n  " + "\n  ".join(lines)
    )


def _required(table: pa.Table, column: str, faults: list[_Fault]) -> pa.Array:
    values = strings(table[column])
    empty = pc.equal(pc.fill_null(values, ""), "")
    faults += [_Fault(int(i), column, "is empty") for i in np.flatnonzero(np.asarray(empty))]
    return values


def strings(column: pa.ChunkedArray) -> pa.Array:
    """A column as one array of strings."""
    array = column.combine_chunks()
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    return array.cast(pa.string())


def _masked(values: pa.Array, markers: list[str]) -> pa.Array:
    """`values` with the missing markers (also inside spaces) replaced by null."""
    hit = pc.is_in(pc.utf8_trim_whitespace(values), value_set=pa.array(markers, type=pa.string()))
    return pc.if_else(hit, pa.scalar(None, pa.string()), values)


def _parse_factor(
    table: pa.Table,
    columns: list[str],
    factor: FactorDeclaration,
    markers: list[str],
    decimal: str,
    faults: list[_Fault],
) -> pa.Array:
    match factor:
        case CategoricalDeclaration():
            return _masked(strings(table[columns[0]]), markers)
        case MultiDeclaration(separator=separator):
            cells = _masked(strings(table[columns[0]]), markers)
            lists = [
                None if cell is None else _split_cell(cell, separator) for cell in cells.to_pylist()
            ]
            return pa.array(lists, type=pa.list_(pa.string()))
        case CyclicDeclaration():
            return _numbers(table[columns[0]], columns[0], markers, decimal, faults)
        case ContinuousDeclaration():
            parsed = [_numbers(table[name], name, markers, decimal, faults) for name in columns]
            if factor.low is not None:
                _check_bounds(columns, parsed, factor, faults)
            if len(parsed) == 1:
                return parsed[0]
            flat = pa.array(np.stack([_nan(v) for v in parsed], axis=1).ravel(), from_pandas=True)
            return pa.FixedSizeListArray.from_arrays(flat, len(parsed))


def _check_bounds(
    columns: list[str],
    parsed: list[pa.Array],
    factor: ContinuousDeclaration,
    faults: list[_Fault],
) -> None:
    bounds = zip(factor.bounds("low"), factor.bounds("high"), strict=True)
    for name, values, (low, high) in zip(columns, parsed, bounds, strict=True):
        outside = pc.fill_null(pc.or_(pc.less(values, low), pc.greater(values, high)), False)
        for i in np.flatnonzero(np.asarray(outside)):
            value = values[int(i)].as_py()
            what = f"{value!r} is outside the declared bounds [{low}, {high}]"
            faults.append(_Fault(int(i), name, what))


def _split_cell(cell: str, separator: str) -> list[str]:
    """The distinct values of one cell, in the order in which they stand there."""
    parts = (part.strip() for part in cell.split(separator))
    return list(dict.fromkeys(part for part in parts if part))


def _nan(values: pa.Array) -> np.ndarray:
    return np.asarray(pc.fill_null(values, np.nan), dtype=np.float64)


def _numbers(
    column: pa.ChunkedArray,
    name: str,
    markers: list[str],
    decimal: str,
    faults: list[_Fault],
) -> pa.Array:
    """float64 with null for missing; notes what is no finite number."""
    if pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
        values = column.cast(pa.float64(), safe=False).combine_chunks()
        values = pc.if_else(pc.is_nan(values), pa.scalar(None, pa.float64()), values)
        _note(faults, name, pc.is_inf(values), lambda _: "is infinite")
        return _held_by_float32(values, name, faults)
    cells = _masked(strings(column), markers)
    text = pc.utf8_trim_whitespace(cells)
    if decimal == ",":
        # "1.5" under a decimal comma is not a number: a point there groups thousands.
        text = pc.replace_substring(pc.replace_substring(text, ".", "?"), ",", ".")
    good = pc.match_substring_regex(text, NUMBER)

    def what(i: int) -> str:
        cell = cells[i].as_py()
        hint = ""
        if decimal == "." and "," in cell:
            hint = "; for decimal commas set table.decimal to ',' in the schema"
        return f"{cell!r} is not a number{hint}"

    _note(faults, name, pc.invert(good), what)
    text = pc.if_else(pc.fill_null(good, False), text, pa.scalar(None, pa.string()))
    values = text.cast(pa.float64())
    _note(faults, name, pc.is_inf(values), lambda i: f"{cells[i].as_py()!r} is too large")
    return _held_by_float32(values, name, faults)


def _held_by_float32(values: pa.Array, name: str, faults: list[_Fault]) -> pa.Array:
    """The values without what is infinite; notes what would become so in a batch, which is fp32."""
    finite = pc.if_else(pc.is_inf(values), pa.scalar(None, pa.float64()), values)
    beyond = pc.greater(pc.abs(finite), float(np.finfo(np.float32).max))
    _note(
        faults,
        name,
        beyond,
        lambda i: f"{finite[i].as_py():g} does not fit float32 (±3.4e38); give it in another unit",
    )
    return pc.if_else(pc.fill_null(beyond, False), pa.scalar(None, pa.float64()), finite)


def _note(faults: list[_Fault], column: str, bad: pa.Array, what: Callable[[int], str]) -> None:
    """Add a fault for every true entry of `bad`."""
    for i in np.flatnonzero(np.asarray(pc.fill_null(bad, False))):
        faults.append(_Fault(int(i), column, what(int(i))))


def _apply_vocabulary(
    raw: pa.Array,
    factor: CategoricalDeclaration | MultiDeclaration,
    column: str,
    faults: list[_Fault],
) -> tuple[pa.Array, dict[str, int]]:
    """The values with those outside a declared vocabulary noted, or taken as missing and counted.

    A multi-valued cell loses only its unknown values, not the known ones beside them.
    """
    if factor.vocabulary is None:
        return raw, {}
    vocabulary = pa.array(factor.vocabulary, type=pa.string())
    multi = isinstance(factor, MultiDeclaration)
    flat = pc.list_flatten(raw) if multi else raw
    outside = pc.and_(pc.is_valid(flat), pc.invert(pc.is_in(flat, value_set=vocabulary)))
    places = np.flatnonzero(np.asarray(outside))
    if not len(places):
        return raw, {}
    if factor.unknown == "error":
        owners = np.asarray(pc.list_parent_indices(raw)) if multi else np.arange(len(raw))
        for i in places:
            what = f"{flat[int(i)].as_py()!r} is outside the declared vocabulary"
            faults.append(_Fault(int(owners[i]), column, what))
        return raw, {}
    counts = {
        entry["values"].as_py(): entry["counts"].as_py()
        for entry in pc.value_counts(flat.filter(outside))
    }
    if not multi:
        return pc.if_else(outside, pa.scalar(None, pa.string()), raw), counts
    known = set(factor.vocabulary)
    kept = [
        None if cell is None else ([v for v in cell if v in known] or None)
        for cell in raw.to_pylist()
    ]
    return pa.array(kept, type=raw.type), counts


def _check_duplicates(ids: pa.Array) -> None:
    """Refuse ids that are equal, or would be on a file system that ignores case or Unicode form."""
    ascii_only = pc.all(pc.string_is_ascii(ids)).as_py()
    folded = pc.utf8_lower(ids if ascii_only else pc.utf8_normalize(ids, form="NFC"))
    if pc.count_distinct(folded).as_py() == len(ids):
        return
    counts = pc.value_counts(folded)
    repeated = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")
    places: dict[str, list[int]] = {}
    for i in np.flatnonzero(np.asarray(pc.is_in(folded, value_set=repeated))):
        places.setdefault(folded[int(i)].as_py(), []).append(int(i))
    lines = []
    for rows in list(places.values())[:_SHOWN]:
        spellings = list(dict.fromkeys(ids[i].as_py() for i in rows))
        numbers = ", ".join(str(i + 1) for i in rows[:_SHOWN])
        lines.append(f"rows {numbers}: {' and '.join(map(_spelled, spellings))}")
    if len(places) > _SHOWN:
        lines.append(f"and {len(places) - _SHOWN} more")
    raise DataError(
        f"{len(places)} ids occur more than once (case and Unicode form do not tell ids apart):"
        "\n  " + "\n  ".join(lines)
    )


def _spelled(value: str) -> str:
    """An id for a message; its Unicode form where that cannot be seen."""
    if value.isascii():
        return repr(value)
    form = "NFC" if unicodedata.is_normalized("NFC", value) else "NFD"
    return f"{value!r} ({form})"
