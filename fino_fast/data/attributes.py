"""Attributes of DICOM files as columns of the table, where a schema asks for them by keyword.

In the place of a column, `dicom:KVP` is the attribute of that keyword (DICOM PS3.6) in the header
of each row's image, and `dicom:PixelSpacing[0]` the first of several values. From there on it is a
cell like others: checked, counted, frozen into vocabularies and statistics. Of a header nothing
enters a set but what is listed so.
"""

import difflib
import re
from collections.abc import MutableSequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from fino_fast.errors import ConfigError, DataError

from .declaration import ContinuousDeclaration, CyclicDeclaration, Declaration
from .dicom import import_pydicom, parser_fault, refuse_deflated_bomb
from .files import Location
from .sources import Finding, Root, open_root
from .stored import ImageRejected

PREFIX = "dicom:"
LOOKED = PREFIX
"""Column with the `Finding` of each file whose header was read, for the survey that comes after."""

_COLUMN = re.compile(r"dicom:(\w+)(?:\[(\d+)\])?")
_CONNECTIONS = 16
# Value representations without a text or a number (PS3.5, 6.2): sequences, and bytes.
_NO_CELLS = {"SQ", "OB", "OD", "OF", "OL", "OV", "OW", "UN"}
_LOOKED_TYPE = pa.struct(
    [
        ("size", pa.int64()),
        ("mtime_ns", pa.int64()),
        ("code", pa.string()),
        ("detail", pa.string()),
    ]
)

Cells = list[str | None]


class _Attribute(NamedTuple):
    """What a column asks for."""

    column: str
    keyword: str
    place: int | None
    """Which of several values; None for all of them."""


class Attributes:
    """Adds the columns that a declaration reads from image files.

    Args:
        declaration: its columns `dicom:…` are added, others are the table's own.
        images: the folder that the table's paths start from.
        path_column: name of the column with these paths.

    Raises:
        ConfigError: a column names no DICOM attribute, or one that fits no cell.
        MissingExtraError: there is such a column, and pydicom is not installed.
    """

    def __init__(self, declaration: Declaration, images: Location, path_column: str) -> None:
        wanted: dict[str, _Attribute] = {}
        numbers: set[str] = set()
        for name, factor in declaration.factors.items():
            columns = [c for c in declaration.columns_of(name) if c.startswith(PREFIX)]
            wanted |= {column: _attribute(name, column) for column in columns}
            if isinstance(factor, ContinuousDeclaration | CyclicDeclaration):
                numbers |= set(columns)
        self._wanted = list(wanted.values())
        self._numbers = numbers
        self._decimal = declaration.table.decimal
        self._path_column = path_column
        self._images = images
        self._root = open_root(images)
        self._first_fault = ""
        self._found_one = False

    def check_table(self, columns: list[str]) -> None:
        """Refuse a table that has a column of the same name.

        Raises:
            ConfigError: it has.
        """
        for attribute in self._wanted:
            if attribute.column in columns:
                raise ConfigError(
                    f"the table has a column {attribute.column!r}, which in a schema means an "
                    "attribute of the image files; rename the column"
                )

    def added_to(self, table: pa.Table) -> pa.Table:
        """Some rows of the table with the declared attributes, and with `LOOKED`, behind.

        A file that is no DICOM has no attributes: its cells are missing.

        Raises:
            DataError: a file cannot be read to the end of its header, or a store does not answer.
        """
        if not self._wanted:
            return table
        paths = table[self._path_column].cast(pa.string()).to_pylist()
        # Its warnings would print what a header holds, of patients too, into logs.
        with import_pydicom().config.disable_value_validation():
            if isinstance(self._root, Root):
                read = [self._read(path) for path in paths]
            else:
                with ThreadPoolExecutor(_CONNECTIONS, thread_name_prefix="fino-header") as pool:
                    read = list(pool.map(self._read, paths))
        self._note(paths, [finding for finding, _ in read])
        for i, attribute in enumerate(self._wanted):
            cells = pa.array([row[i] for _, row in read], pa.string())
            if attribute.column in self._numbers:
                # DICOM writes a decimal point, whatever the table does.
                cells = pc.replace_substring(cells, ".", self._decimal)
            table = table.append_column(attribute.column, cells)
        looked = [finding._asdict() for finding, _ in read]
        return table.append_column(LOOKED, pa.array(looked, _LOOKED_TYPE))

    def check_found(self) -> None:
        """Refuse a table of which no file could be looked into: all would be missing.

        Raises:
            DataError: there is none; the message names the first and what is wrong with it.
        """
        if self._wanted and not self._found_one:
            raise DataError(
                f"{self._images}: no image's header can be read for {self._wanted[0].column!r}; "
                f"{self._first_fault}"
            )

    def _note(self, paths: list[str | None], findings: list[Finding]) -> None:
        for path, finding in zip(paths, findings, strict=True):
            if finding.code is None:
                self._found_one = True
                return
            self._first_fault = (
                self._first_fault or f"the first, {path!r}: {finding.code}: {finding.detail}"
            )

    def _read(self, path: str | None) -> tuple[Finding, Cells]:
        """How a file was found before its header was read, and the cells."""
        nothing: Cells = [None] * len(self._wanted)
        pydicom = import_pydicom()
        try:
            if not path:  # refused with the cell's row
                raise ImageRejected("missing_file", "no path")
            source = self._root.find(path)
            with self._root.open(path) as file:
                refuse_deflated_bomb(file)
                dataset = pydicom.dcmread(
                    file,
                    stop_before_pixels=True,
                    specific_tags=[attribute.keyword for attribute in self._wanted],
                )
                cells = [_cell(dataset, attribute) for attribute in self._wanted]
        except ImageRejected as rejection:
            return Finding(0, 0, rejection.code, rejection.detail), nothing
        except pydicom.errors.InvalidDicomError:
            return Finding(source.size, source.mtime_ns), nothing
        except OSError as error:
            raise DataError(f"{path}: its header cannot be read: {error.strerror}") from error
        except Exception as error:
            # On damaged files pydicom raises whatever its parsing ran into.
            return Finding(0, 0, "header_damaged", parser_fault(error, "header")), nothing
        return Finding(source.size, source.mtime_ns), cells


def _attribute(factor: str, column: str) -> _Attribute:
    pydicom = import_pydicom()
    where = f"factors.{factor}: column {column!r}"
    match = _COLUMN.fullmatch(column)
    if match is None:
        raise ConfigError(f"{where}: expected dicom:Keyword, or dicom:Keyword[0] for one value")
    keyword, place = match[1], match[2]
    if pydicom.datadict.tag_for_keyword(keyword) is None:
        close = difflib.get_close_matches(keyword, pydicom.datadict.keyword_dict, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ConfigError(f"{where}: DICOM has no attribute of the keyword {keyword!r}{hint}")
    kinds = set(pydicom.datadict.dictionary_VR(keyword).split(" or "))
    if kinds & _NO_CELLS:
        raise ConfigError(
            f"{where}: holds {'a sequence' if 'SQ' in kinds else 'bytes'}; expected an attribute "
            "with text or numbers"
        )
    return _Attribute(column, keyword, None if place is None else int(place))


def _cell(dataset: Any, attribute: _Attribute) -> str | None:
    """An attribute as text, several values with DICOM's backslash between; None where empty."""
    try:
        value = dataset.get(attribute.keyword)
    except (ValueError, TypeError, OverflowError):
        # Not of its value representation, "n/a" for a number: what it says is judged as a cell.
        value = dataset.get_item(attribute.keyword).value.decode("ascii", "backslashreplace")
        value = value.strip(" \0").split("\\")
    several = value if isinstance(value, MutableSequence) else [value]
    values = ["" if each is None else str(each).strip() for each in several]
    if attribute.place is not None:
        values = values[attribute.place : attribute.place + 1]
    return "\\".join(values) if any(values) else None
