"""DICOM attributes as metadata: what the schema lists, as pydicom reads it, and nothing else."""

import json
import shutil
import struct
import sys
import tarfile
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pydicom
import pytest

from fino_fast.data import ShardSet, ingest
from fino_fast.data.files import location
from fino_fast.data.plan import make_plan
from fino_fast.errors import ConfigError, DataError, MissingExtraError, TooManyRejectsError

from .labs import Lab, dicom, pixels, png

SCANNERS = ["Ingenia", "Aera", "", "Ingenia", "Skyra ", "Aera"]
FACTORS: dict[str, Any] = {
    "scanner": {"kind": "categorical", "role": "suppress", "column": "dicom:ManufacturerModelName"},
    "kvp": {"kind": "continuous", "role": "suppress", "columns": ["dicom:KVP"]},
    "mm": {
        "kind": "continuous",
        "role": "preserve",
        "columns": ["dicom:PixelSpacing[0]"],
        "per_pixel_scale": True,
    },
    "type": {
        "kind": "multi",
        "role": "ignore",
        "column": "dicom:ImageType",
        "separator": "\\",
    },
    "ward": {"kind": "categorical", "role": "ignore"},
}


def write_slice(path: Path, i: int, **attributes: Any) -> None:
    """A slice of Jane Doe, from one of three scanners or an unnamed one."""
    told = {
        "ManufacturerModelName": SCANNERS[i % 6],
        "KVP": f"{100 + i}.5",
        "PixelSpacing": [f"0.{i + 1}", "0.7"],
        "ImageType": ["DERIVED", "SECONDARY", f"PASS{i % 2}"],
        "PatientID": "MRN-4711",
        "PatientSex": "F",
        "InstitutionName": "St. Mary",
    }
    image = pixels(i).astype(np.uint16)
    path.write_bytes(dicom(image, **(told | attributes)))


@pytest.fixture
def clinic(tmp_path: Path) -> Lab:
    """Six slices; the table knows their ward and nothing else."""
    lab = Lab(tmp_path / "clinic", {"factors": dict(FACTORS)})
    lab.images.mkdir(parents=True)
    for i in range(6):
        add_slice(lab, i)
    return lab


def add_slice(lab: Lab, i: int, **attributes: Any) -> None:
    write_slice(lab.images / f"{i}.dcm", i, **attributes)
    lab.rows.append({"id": f"s{i}", "file": f"{i}.dcm", "ward": "A"})


def told(shards: ShardSet, name: str) -> dict[str, Any]:
    """One factor's raw values by id."""
    return dict(zip(shards.ids, list(shards.raw(name)), strict=True))


def everything(folder: Path) -> str:
    """Whatever can be read in a set: every byte of its tars and JSON, every cell of its Parquet."""
    text = []
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".parquet":
            text.append(str(pq.read_table(path).to_pylist()))
        elif path.is_file():
            text.append(path.read_bytes().decode("latin-1"))
    return "\n".join(text)


def test_listed_attributes_are_metadata_as_pydicom_reads_them(clinic: Lab) -> None:
    clinic.ingest()
    shards = clinic.open()
    for i in range(6):
        source = pydicom.dcmread(clinic.images / f"{i}.dcm")
        assert told(shards, "scanner")[f"s{i}"] == (source.ManufacturerModelName.strip() or None)
        assert told(shards, "kvp")[f"s{i}"] == float(source.KVP)
        assert told(shards, "mm")[f"s{i}"] == float(source.PixelSpacing[0])
        assert told(shards, "type")[f"s{i}"] == list(source.ImageType)
    assert set(shards.schema.factors["scanner"].vocabulary) == {"Ingenia", "Aera", "Skyra"}
    assert (shards.encoded("scanner") == -1).sum() == 1
    with tarfile.open(next(clinic.out.glob("*.tar"))) as tar:
        (member,) = [m for m in tar if m.name.endswith(".json")][:1]
        sample = json.load(tar.extractfile(member))  # type: ignore[arg-type]
    assert sample["metadata"]["type"] == told(shards, "type")[sample["id"]]


def test_what_is_not_listed_is_nowhere_in_the_set(clinic: Lab) -> None:
    clinic.ingest()
    found = everything(clinic.out)
    assert "Ingenia" in found
    for secret in ("Doe", "Jane", "MRN-4711", "St. Mary", "PatientSex"):
        assert secret not in found


def test_no_warning_prints_what_a_header_holds(
    clinic: Lab, recwarn: pytest.WarningsRecorder, caplog: pytest.LogCaptureFixture
) -> None:
    """pydicom warns of values that break its rules, and quotes them."""
    path = clinic.images / "2.dcm"
    syntax = b"1.2.840.10008.1.2.1\0"
    path.write_bytes(path.read_bytes().replace(syntax, b"Jane Doe".ljust(len(syntax), b"\0")))
    recwarn.clear()
    clinic.ingest(max_reject=ingest.Allowance(count=1))
    assert not [warning for warning in recwarn if "Jane" in str(warning.message)]
    assert "Jane" not in caplog.text


def with_value(data: bytes, keyword: str, kind: bytes, value: bytes) -> bytes:
    """The file with other bytes in the place of an attribute's value, of another kind (VR)."""
    tag = pydicom.datadict.tag_for_keyword(keyword)
    assert tag is not None
    place = data.index(struct.pack("<HH", tag >> 16, tag & 0xFFFF))
    (length,) = struct.unpack("<H", data[place + 6 : place + 8])
    element = data[place : place + 4] + kind + struct.pack("<H", len(value)) + value
    return data[:place] + element + data[place + 8 + length :]


def grey_of(path: Path) -> Any:
    """As pydicom is used where nobody minds its messages."""
    dataset = pydicom.dcmread(path)
    return dataset.pixel_array * float(dataset.RescaleSlope)


@pytest.mark.filterwarnings("ignore:.*value length:UserWarning")
@pytest.mark.parametrize(
    ("keyword", "kind", "listed"),
    [
        ("NumberOfFrames", b"IS", False),
        ("RescaleSlope", b"DS", False),
        ("PhotometricInterpretation", b"CS", False),
        ("BitsStored", b"US", False),
        ("TransferSyntaxUID", b"US", True),
    ],
)
def test_no_rejection_quotes_what_a_header_holds(
    clinic: Lab, keyword: str, kind: bytes, listed: bool
) -> None:
    """A name in the place of a number: pydicom's own message tells it, the reject does not; where
    attributes are listed, the header is read once more, before all else."""
    path = clinic.images / "2.dcm"
    whole = dicom(pixels(2), NumberOfFrames="1", RescaleSlope="1", RescaleIntercept="0")
    path.write_bytes(with_value(whole, keyword, kind, b"Doe^Jane Mary"))
    with pytest.raises(Exception, match=r"Doe\^Jane Mary"):
        grey_of(path)
    if not listed:
        clinic.schema["factors"] = {"ward": FACTORS["ward"]}
    clinic.ingest(max_reject=ingest.Allowance(count=1))
    (reject,) = pq.read_table(clinic.out / "rejects.parquet").to_pylist()
    assert reject["path"] == "2.dcm"
    assert reject["code"] in ("header_damaged", "decode_failed")
    for secret in ("Doe", "Jane", "Mary"):
        assert secret not in everything(clinic.out)


def test_patient_attributes_enter_when_they_are_listed(clinic: Lab) -> None:
    clinic.schema["factors"] = {
        "sex": {"kind": "categorical", "role": "suppress", "column": "dicom:PatientSex"}
    }
    clinic.ingest()
    assert set(told(clinic.open(), "sex").values()) == {"F"}
    assert "MRN-4711" not in everything(clinic.out)


@pytest.mark.parametrize("characters", ["ISO_IR 100", "ISO_IR 192"])
def test_names_of_every_character_set(clinic: Lab, characters: str) -> None:
    names = {"SpecificCharacterSet": characters, "ManufacturerModelName": "Gerät Ü 5"}
    write_slice(clinic.images / "0.dcm", 0, **names)
    clinic.ingest()
    assert told(clinic.open(), "scanner")["s0"] == "Gerät Ü 5"


def test_files_without_the_attribute_are_missing(clinic: Lab) -> None:
    (clinic.images / "photo.png").write_bytes(png(pixels(9)))
    clinic.rows.append({"id": "photo", "file": "photo.png", "ward": "A"})
    write_slice(clinic.images / "1.dcm", 1, KVP=None, PixelSpacing=[])
    clinic.ingest()
    shards = clinic.open()
    assert told(shards, "scanner")["photo"] is None
    assert told(shards, "type")["photo"] is None
    for name, sample in (("kvp", "photo"), ("kvp", "s1"), ("mm", "s1")):
        assert np.isnan(told(shards, name)[sample])
    assert told(shards, "scanner")["s1"] == "Aera"


@pytest.mark.parametrize(
    ("column", "fault"),
    [
        ("dicom:ManufacturerModelNam", "did you mean ManufacturerModelName"),
        ("dicom:", "expected dicom:Keyword"),
        ("dicom:0018,0060", "expected dicom:Keyword"),
        ("dicom:RequestAttributesSequence", "a sequence"),
        ("dicom:PixelData", "bytes"),
    ],
)
def test_columns_that_are_no_attribute(clinic: Lab, column: str, fault: str) -> None:
    clinic.schema["factors"]["scanner"] = FACTORS["scanner"] | {"column": column}
    with pytest.raises(ConfigError, match=fault) as caught:
        clinic.ingest()
    assert "factors.scanner" in str(caught.value)


def test_ids_are_the_tables_own(clinic: Lab) -> None:
    with pytest.raises(ConfigError, match="no column 'dicom:SOPInstanceUID'"):
        clinic.ingest(id_column="dicom:SOPInstanceUID")


def test_a_table_with_a_column_of_that_name_is_refused(clinic: Lab) -> None:
    for row in clinic.rows:
        row["dicom:KVP"] = "1"
    with pytest.raises(ConfigError, match=r"column 'dicom:KVP'.*rename"):
        clinic.ingest()


def test_a_number_that_is_none_is_listed_with_its_row(clinic: Lab) -> None:
    path = clinic.images / "4.dcm"
    path.write_bytes(path.read_bytes().replace(b"104.5 ", b"n/a kV"))
    with pytest.raises(TooManyRejectsError, match=r"row 5 \(id 's4'\), 'dicom:KVP': 'n/a kV'"):
        clinic.ingest()


def test_several_values_are_no_number(clinic: Lab) -> None:
    clinic.schema["factors"]["mm"] = FACTORS["mm"] | {"columns": ["dicom:PixelSpacing"]}
    with pytest.raises(TooManyRejectsError, match=r"'0.1\\\\0.7' is not a number"):
        clinic.ingest()


def test_decimal_commas_are_the_tables_own(clinic: Lab) -> None:
    clinic.schema["table"] = {"decimal": ","}
    clinic.ingest()
    assert told(clinic.open(), "kvp")["s2"] == 102.5


def test_damaged_headers_are_rejected(clinic: Lab) -> None:
    whole = (clinic.images / "2.dcm").read_bytes()
    (clinic.images / "2.dcm").write_bytes(whole[: whole.index(b"Doe^Jane") + 3])
    with pytest.raises(TooManyRejectsError, match="id 's2'"):
        clinic.ingest()


def test_where_no_header_can_be_read_it_says_why(clinic: Lab) -> None:
    with pytest.raises(
        DataError, match=r"dicom:ManufacturerModelName'; the first, '0\.dcm': missing"
    ):
        clinic.ingest(images=clinic.root)


def test_a_file_outside_the_root_is_not_looked_into(clinic: Lab, tmp_path: Path) -> None:
    write_slice(tmp_path / "outside.dcm", 0, ManufacturerModelName="Elsewhere")
    (clinic.images / "link.dcm").symlink_to(tmp_path / "outside.dcm")
    clinic.rows.append({"id": "link", "file": "link.dcm", "ward": "A"})
    clinic.rows.append({"id": "up", "file": "../../outside.dcm", "ward": "A"})
    report = clinic.ingest(max_reject=ingest.Allowance(count=2))
    assert report.rejects == {"path_escape": 2}
    assert "Elsewhere" not in everything(clinic.out)


def test_a_file_changed_behind_its_header_is_rejected(
    clinic: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    def changing_plan(**arguments: Any) -> Any:
        write_slice(clinic.images / "3.dcm", 3, ManufacturerModelName="Another scanner")
        return make_plan(**arguments)

    monkeypatch.setattr(ingest, "make_plan", changing_plan)
    report = clinic.ingest(max_reject=ingest.Allowance(count=1))
    assert report.rejects == {"source_changed": 1}
    assert "s3" not in list(clinic.open().ids)


def test_later_slices_append_to_the_vocabulary(clinic: Lab) -> None:
    clinic.ingest()
    former = clinic.open().schema.factors["scanner"].vocabulary
    add_slice(clinic, 6, ManufacturerModelName="Vida")
    clinic.ingest()
    grown = clinic.open()
    assert list(grown.schema.factors["scanner"].vocabulary) == [*former, "Vida"]
    assert told(grown, "scanner")["s6"] == "Vida"
    assert told(grown, "kvp")["s0"] == 100.5


def test_a_header_that_contradicts_the_set_is_refused(clinic: Lab) -> None:
    clinic.ingest()
    write_slice(clinic.images / "0.dcm", 0, KVP="80")
    add_slice(clinic, 6)
    with pytest.raises(DataError, match=r"id 's0': kvp was 100\.5, now 80\.0"):
        clinic.ingest()


def test_headers_in_an_object_store(clinic: Lab) -> None:
    clinic.ingest()
    expected = {name: told(clinic.open(), name) for name in ("scanner", "kvp", "type")}
    store = location("memory://clinic/images")
    for path in clinic.images.iterdir():
        (store / path.name).write_bytes(path.read_bytes())  # type: ignore[operator]
    shutil.rmtree(clinic.out)
    clinic.ingest(images=store)
    assert {name: told(clinic.open(), name) for name in expected} == expected
    fsspec.filesystem("memory").rm("/clinic", recursive=True)


def test_without_pydicom_the_extra_is_named(clinic: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(MissingExtraError, match=r"fino-fast\[dicom\]"):
        clinic.ingest()
