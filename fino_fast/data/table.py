"""Read the table of a data set, in pieces, and turn its cells into checked raw values.

Everything here looks at the whole table before it complains, so that a person sees all faults of
one kind at once, each with its row.
"""

import codecs
import contextlib
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
from numpy.typing import NDArray

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
_CHUNK_ROWS = 1 << 18
_CHUNK_BYTES = 32 << 20


@dataclass
class Rows:
    """The table's content that ingestion keeps; all arrays have one entry a row."""

    ids: pa.Array
    paths: pa.Array
    splits: pa.Array
    raw: dict[str, pa.Array]
    """Raw values by factor: strings, lists of strings, float64, or fixed-size lists of float64."""

    def __len__(self) -> int:
        return len(self.ids)


@dataclass
class _Fault:
    row: int
    column: str
    what: str


def table_chunks(path: Path, columns: list[str], delimiter: str = ",") -> Iterator[pa.Table]:
    """The named columns of a CSV (all as strings: "007" stays "007") or Parquet file, in pieces.

    Raises:
        DataError: the file cannot be read or is not what its name says.
        ConfigError: a column is not there, stands there twice, or holds what is no cell.
    """
    _check_columns(path, column_names(path, delimiter), columns)
    odd = [f"{name!r} holds {what}" for name, what in no_cells(path).items() if name in columns]
    if odd:
        raise ConfigError(
            f"{path}: column {', '.join(odd)}; expected text, numbers, dates or truth values (of "
            "several names make one text with a separator)"
        )
    with reading(path), contextlib.ExitStack() as stack:
        if is_parquet(path):
            file = stack.enter_context(pq.ParquetFile(path))
            batches = file.iter_batches(_CHUNK_ROWS, columns=columns)
        else:
            convert = pyarrow.csv.ConvertOptions(
                column_types=dict.fromkeys(columns, pa.string()),
                include_columns=columns,
                strings_can_be_null=False,
            )
            batches = stack.enter_context(
                pyarrow.csv.open_csv(
                    path,
                    read_options=pyarrow.csv.ReadOptions(block_size=_CHUNK_BYTES),
                    parse_options=_csv(delimiter),
                    convert_options=convert,
                )
            )
        for batch in batches:
            if len(batch):
                yield pa.Table.from_batches([batch])


def column_names(path: Path, delimiter: str = ",") -> list[str]:
    """The table's column names, without reading its rows.

    Raises:
        DataError: the file cannot be read or is not what its name says.
    """
    with reading(path):
        if is_parquet(path):
            return list(pq.read_schema(path).names)
        _check_encoding(path)
        with pyarrow.csv.open_csv(path, parse_options=_csv(delimiter)) as reader:
            return list(reader.schema.names)


def no_cells(path: Path) -> dict[str, str]:
    """Columns of a Parquet file that hold lists, structures or bytes, with their types.

    Raises:
        DataError: the file cannot be read or is not what its name says.
    """
    if not is_parquet(path):
        return {}
    with reading(path):
        fields = list(pq.read_schema(path))
    is_bytes = (
        pa.types.is_binary,
        pa.types.is_large_binary,
        pa.types.is_fixed_size_binary,
        pa.types.is_binary_view,
    )
    return {
        field.name: str(field.type)
        for field in fields
        if any(check(field.type) for check in (pa.types.is_nested, *is_bytes))
    }


def is_parquet(path: Path) -> bool:
    return path.suffix.lower() in (".parquet", ".pq")


def _csv(delimiter: str) -> pyarrow.csv.ParseOptions:
    return pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what is raised on bad files into errors that name the file."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (pa.ArrowException, UnicodeDecodeError) as error:
        if isinstance(error, UnicodeDecodeError) or "invalid UTF8" in str(error):
            raise _not_utf8(path, str(error)) from error
        if "Empty CSV" in str(error):
            raise DataError(f"{path}: has no rows") from error
        hint = "" if is_parquet(path) else "; is table.delimiter in the schema right?"
        raise DataError(f"{path}: cannot be read as a table: {error}{hint}") from error


def _check_encoding(path: Path) -> None:
    """Refuse UTF-16, in which spreadsheets save "Unicode text": its rows may look like UTF-8's.

    Raises:
        DataError: the file begins with its byte order mark.
    """
    with path.open("rb") as file:
        if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise _not_utf8(path, "its byte order mark is that of UTF-16")


def _not_utf8(path: Path, why: str) -> DataError:
    return DataError(f"{path}: is not UTF-8 ({why}); save it as UTF-8, from Excel as “CSV UTF-8”")


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


class TableParser:
    """Turns a table, piece by piece, into checked raw values, and collects what is wrong with it.

    Memory is 8 bytes a row, by which ids that occur twice are found.

    Args:
        declaration: what the cells mean.
        id_column, path_column: names of these columns.
    """

    def __init__(self, declaration: Declaration, id_column: str, path_column: str) -> None:
        self._declaration = declaration
        self._id_column = id_column
        self._path_column = path_column
        self._faults: list[str] = []
        self._fault_count = 0
        self._hashes: list[NDArray[np.int64]] = []
        self.rows = 0
        """Rows parsed so far."""
        self.unknown: dict[str, dict[str, int]] = {}
        """Values outside a declared vocabulary, taken as missing, by factor, with counts."""

    def parse(self, table: pa.Table) -> Rows:
        """Raw values of the table's next rows; where a cell cannot be used they mean nothing."""
        declaration, faults = self._declaration, list[_Fault]()
        ids = _required(table, self._id_column, faults)
        paths = _required(table, self._path_column, faults)
        if declaration.split:
            splits = _required(table, declaration.split.column, faults)
        else:
            splits = pa.repeat(pa.scalar(declaration.adaptation_split, pa.string()), len(table))
        raw = {}
        for name, factor in declaration.factors.items():
            columns = declaration.columns_of(name)
            markers = [*declaration.table.missing, *factor.missing]
            raw[name] = _parse_factor(
                table, columns, factor, markers, declaration.table.decimal, faults
            )
            if isinstance(factor, CategoricalDeclaration | MultiDeclaration):
                raw[name], unknown = _apply_vocabulary(raw[name], factor, columns[0], faults)
                counts = self.unknown.setdefault(name, {}) if unknown else {}
                for value, count in unknown.items():
                    counts[value] = counts.get(value, 0) + count
        self._note(faults, ids)
        self._hashes.append(hashes(_folded(ids)))
        self.rows += len(table)
        return Rows(ids, paths, splits, raw)

    def check(self, ids: Callable[[], Iterable[pa.Array]]) -> None:
        """Raise what was found in all rows together.

        Args:
            ids: gives the ids of all rows again, in the same order.

        Raises:
            TooManyRejectsError: an id or path is missing, a number cannot be read or is infinite
                or out of its declared bounds, or a value is outside its vocabulary; the message
                lists rows (1 = first row below the header).
            DataError: ids occur twice, also when they differ only by case or Unicode form.
        """
        if self._fault_count:
            lines = list(self._faults)
            if self._fault_count > _SHOWN:
                lines.append(f"and {self._fault_count - _SHOWN} more")
            raise TooManyRejectsError(
                f"{self._fault_count} cells of the table cannot be used; correct them, or declare "
                "what stands for a missing value:\n  " + "\n  ".join(lines)
            )
        keys = np.concatenate(self._hashes)
        keys.sort()
        repeated = np.unique(keys[1:][keys[1:] == keys[:-1]])
        if len(repeated):
            _refuse_duplicates(ids(), repeated)

    def _note(self, faults: list[_Fault], ids: pa.Array) -> None:
        """Count the faults of some rows, and keep a line each on the first of all."""
        faults.sort(key=lambda fault: fault.row)
        self._faults += [
            f"row {self.rows + fault.row + 1} (id {ids[fault.row].as_py()!r}), "
            f"{fault.column!r}: {fault.what}"
            for fault in faults[: _SHOWN - len(self._faults)]
        ]
        self._fault_count += len(faults)


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


def whole(column: pa.ChunkedArray) -> pa.Array:
    """A column as one array, of any length: offsets of 32 bits end at 2 GiB of text."""
    wide = column.type
    if pa.types.is_string(wide):
        wide = pa.large_string()
    elif pa.types.is_list(wide):
        wide = pa.large_list(pa.large_string())
    return column.cast(wide).combine_chunks()


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


def _folded(ids: pa.Array) -> pa.Array:
    """The ids as a file system sees them that ignores case and Unicode form."""
    ascii_only = pc.all(pc.string_is_ascii(ids)).as_py()
    return pc.utf8_lower(ids if ascii_only else pc.utf8_normalize(ids, form="NFC"))


def hashes(values: pa.Array) -> NDArray[np.int64]:
    """64 bits of every string; equal ones may be of different strings."""
    return np.fromiter(map(hash, values.to_pylist()), np.int64, len(values))


def _refuse_duplicates(ids: Iterable[pa.Array], repeated: NDArray[np.int64]) -> None:
    """Look at the ids whose hashes occur more than once, and refuse those that are equal.

    Raises:
        DataError: ids are equal, or would be on a file system that ignores case or Unicode form.
    """
    places: dict[str, list[tuple[int, str]]] = {}
    start = 0
    for part in ids:
        folded = _folded(part)
        for i in np.flatnonzero(np.isin(hashes(folded), repeated)).tolist():
            places.setdefault(folded[i].as_py(), []).append((start + i + 1, part[i].as_py()))
        start += len(part)
    equal = [found for found in places.values() if len(found) > 1]
    if not equal:
        return
    lines = []
    for found in equal[:_SHOWN]:
        spellings = list(dict.fromkeys(spelling for _, spelling in found))
        numbers = ", ".join(str(row) for row, _ in found[:_SHOWN])
        lines.append(f"rows {numbers}: {' and '.join(map(_spelled, spellings))}")
    if len(equal) > _SHOWN:
        lines.append(f"and {len(equal) - _SHOWN} more")
    raise DataError(
        f"{len(equal)} ids occur more than once (case and Unicode form do not tell ids apart):"
        "\n  " + "\n  ".join(lines)
    )


def _spelled(value: str) -> str:
    """An id for a message; its Unicode form where that cannot be seen."""
    if value.isascii():
        return repr(value)
    form = "NFC" if unicodedata.is_normalized("NFC", value) else "NFD"
    return f"{value!r} ({form})"
