"""Ingestion: what a set holds, that reruns converge, that nothing is lost or changed silently."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from nvidia.dali import fn, pipeline_def

from fino_fast.data import ShardSet
from fino_fast.data.engines import LocalEngine
from fino_fast.data.ingest import Allowance, ingest
from fino_fast.data.sources import Root
from fino_fast.data.stored import ImageRejected
from fino_fast.data.verify import verify
from fino_fast.errors import ConfigError, DataError, FinoError, TooManyRejectsError

from .labs import Lab, Serial, make_lab, pixels, png


def content(out: Path) -> dict[str, bytes]:
    """Everything in a set's folder."""
    return {
        str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()
    }


def test_every_sample_comes_back_by_id_with_its_bytes_and_metadata(lab: Lab) -> None:
    report = lab.ingest()
    assert report.manifest.samples == 24
    assert len(report.manifest.shards) > 1
    shards = lab.open()
    table = {row["id"]: row for row in lab.rows}
    assert sorted(shards.ids) == sorted(table)
    cameras, exposures = shards.raw("camera"), shards.raw("exposure")
    codes, vocabulary = shards.encoded("camera"), shards.schema.factors["camera"].vocabulary
    for row, sample_id in enumerate(shards.ids):
        source = table[sample_id]
        assert shards.read(row) == (lab.images / source["file"]).read_bytes()
        assert shards.splits[row] == source["split"]
        assert cameras[row] == (source["camera"] or None)
        assert codes[row] == (vocabulary.index(source["camera"]) if source["camera"] else -1)
        if source["exposure"] == "NA":
            assert np.isnan(exposures[row])
        else:
            assert exposures[row] == float(source["exposure"])
    assert verify(lab.out) == []


def adaptation_exposures(lab: Lab) -> np.ndarray:
    cells = [row["exposure"] for row in lab.rows if row["split"] == "adapt"]
    return np.array([float(cell) for cell in cells if cell != "NA"])


def test_statistics_equal_numpy_on_the_adaptation_rows(lab: Lab) -> None:
    lab.ingest()
    factor = lab.open().schema.factors["exposure"]
    values = adaptation_exposures(lab)
    assert factor.mean == [pytest.approx(values.mean(), rel=1e-14)]
    assert factor.std == [pytest.approx(values.std(), rel=1e-14)]
    assert (factor.low, factor.high) == ([0.0], [2.0])
    assert (factor.observed, factor.missing) == (len(values), 19 - len(values))


def test_shards_are_plain_tars_with_metadata_beside_each_image(lab: Lab) -> None:
    lab.ingest()
    rows = set()
    for path in sorted(lab.out.glob("*.tar")):
        with tarfile.open(path, "r:") as tar:
            members = tar.getmembers()
            assert all((m.mtime, m.uid, m.gid, m.uname) == (0, 0, 0, "") for m in members)
            for image, metadata in zip(members[::2], members[1::2], strict=True):
                assert metadata.name == image.name[:12] + ".json"
                file = tar.extractfile(metadata)
                assert file is not None
                sample = json.load(file)
                assert sample["row"] == int(image.name[:12])
                source = next(row for row in lab.rows if row["id"] == sample["id"])
                assert sample["path"] == source["file"]
                assert sample["metadata"]["camera"] == (source["camera"] or None)
                rows.add(sample["row"])
    assert rows == set(range(24))


def test_shards_are_read_by_tar_webdataset_and_dali(lab: Lab) -> None:
    """Other programs find the same images, and the same description beside each."""
    lab.ingest()
    tars = [str(path) for path in sorted(lab.out.glob("*.tar"))]
    files = {row["id"]: (lab.images / row["file"]).read_bytes() for row in lab.rows}
    listed = [
        name
        for tar in tars
        for name in subprocess.check_output(["tar", "tf", tar], text=True).split()
    ]
    assert len(listed) == 2 * len(files)
    samples = list(webdataset.WebDataset(tars, shardshuffle=False, empty_check=False))
    found = {json.loads(s["json"])["id"]: s.get("png") or s.get("jpg") for s in samples}
    assert found == files

    @pipeline_def(batch_size=24, num_threads=1, device_id=None)
    def graph() -> Any:
        return tuple(fn.readers.webdataset(paths=tars, ext=["png;jpg", "json"]))

    pipe = graph()
    pipe.build()
    images, texts = pipe.run()
    told = [json.loads(bytes(np.array(texts[i]))) for i in range(24)]
    assert {each["id"]: bytes(np.array(images[i])) for i, each in enumerate(told)} == files


def test_same_bytes_from_1_2_and_7_workers(lab: Lab) -> None:
    """With more shards than workers, which end in any order."""
    lab.rows.append(lab.rows[0] | {"id": "gone", "file": "gone.png"})
    lab.save()
    outputs = []
    for workers in (1, 2, 7):
        out = lab.root / f"out{workers}"
        allowed = Allowance(count=1)
        ingest(lab.request(out=out, max_reject=allowed, shard_bytes=8000), LocalEngine(workers))
        outputs.append(content(out))
    assert sum(name.endswith(".tar") for name in outputs[0]) > 7
    assert outputs[0] == outputs[1] == outputs[2]


def test_parts_make_the_same_set_and_the_last_seals(lab: Lab) -> None:
    lab.ingest()
    whole = lab.root / "parts"
    for part in (2, 0):
        report = ingest(lab.request(out=whole, part=(part, 3)), Serial())
        assert (report.manifest, report.shards_missing > 0) == (None, True)
    report = ingest(lab.request(out=whole, part=(1, 3)), Serial())
    assert report.manifest is not None
    assert content(whole) == content(lab.out)


def test_rerun_of_a_finished_ingest_does_nothing(lab: Lab) -> None:
    first = lab.ingest()
    before = {path: path.stat().st_mtime_ns for path in lab.out.glob("*.tar")}
    again = lab.ingest()
    assert again.shards_written == 0
    assert again.manifest == first.manifest
    assert before == {path: path.stat().st_mtime_ns for path in lab.out.glob("*.tar")}


@pytest.mark.parametrize(
    "lost", ["receipt", "sidecar", "tar", "cut tar", "garbled receipt", "flipped sidecar"]
)
def test_rerun_restores_what_was_lost(lab: Lab, lost: str) -> None:
    lab.ingest()
    whole = content(lab.out)
    shard = sorted(lab.out.glob("*.tar"))[1]
    match lost:
        case "receipt":
            shard.with_suffix(".json").unlink()
        case "sidecar":
            shard.with_suffix(".parquet").unlink()
        case "tar":
            shard.unlink()
        case "flipped sidecar":
            sidecar = shard.with_suffix(".parquet")
            data = sidecar.read_bytes()
            sidecar.write_bytes(data[:99] + bytes([data[99] ^ 1]) + data[100:])
        case "cut tar":
            os.truncate(shard, 1000)
        case _:
            shard.with_suffix(".json").write_bytes(b'{"format": 1}')
    report = lab.ingest()
    assert report.shards_written == 1
    assert content(lab.out) == whole


def test_appended_rows_are_added_and_indices_never_move(lab: Lab) -> None:
    later = lab.rows[16:]
    later[0]["camera"] = "a new camera"
    lab.rows = lab.rows[:16]
    lab.ingest()
    before, kept = lab.open(), content(lab.out)
    vocabulary = before.schema.factors["camera"].vocabulary
    lab.rows += later
    report = lab.ingest()
    after = lab.open()
    assert report.manifest.samples == 24
    assert after.schema.factors["camera"].vocabulary == [*vocabulary, "a new camera"]
    assert list(after.ids)[:16] == list(before.ids)
    assert after.schema_hash != before.schema_hash
    assert all(content(lab.out)[name] == kept[name] for name in kept if name.endswith(".tar"))
    values = adaptation_exposures(lab)
    assert after.schema.factors["exposure"].std == [pytest.approx(np.std(values), rel=1e-12)]
    assert verify(lab.out) == []


@pytest.mark.parametrize("name", ["rows.parquet", "schema.json"])
def test_a_changed_plan_is_refused(lab: Lab, name: str) -> None:
    """One cell of the planned rows, one count of the schema: both sound files of other content."""
    lab.ingest()
    path = lab.out / "plan-0000" / name
    if name == "rows.parquet":
        rows = pq.read_table(path)
        hour = pa.array([value + 1 for value in rows["factor:hour"].to_pylist()])
        place = rows.column_names.index("factor:hour")
        pq.write_table(rows.set_column(place, "factor:hour", hour), path)
        sorted(lab.out.glob("*.tar"))[1].unlink()
    else:
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace('"observed": ', '"observed": 1', 1), encoding="utf-8")
    with pytest.raises(DataError, match=rf"plan-0000/{name}: is not the file that was planned"):
        lab.ingest()
    lab.rows.append(lab.rows[0] | {"id": "later"})
    with pytest.raises(DataError, match=rf"plan-0000/{name}: is not the file that was planned"):
        lab.ingest()


def test_a_sealed_set_is_not_written_over_where_its_plan_is_gone(lab: Lab) -> None:
    """Another table, whose plan would give its shards the same names."""
    lab.ingest()
    shutil.rmtree(lab.out / "plan-0000")
    sealed = content(lab.out)
    lab.rows = lab.rows[::-2]
    with pytest.raises(DataError, match=r"plan-0000/plan\.json: is not the file .*missing"):
        lab.ingest()
    assert content(lab.out) == sealed


def test_a_table_that_grew_while_an_ingest_was_broken_off(lab: Lab) -> None:
    """The unfinished plan is finished from what it knows, then the new rows are added."""
    later, lab.rows = lab.rows[16:], lab.rows[:16]
    lab.ingest()
    next(lab.out.glob("*.tar")).unlink()
    (lab.out / "MANIFEST.json").unlink()
    lab.rows += later
    lab.ingest()
    assert sorted(lab.open().ids) == sorted(row["id"] for row in lab.rows)
    assert verify(lab.out) == []


def test_the_former_set_stays_readable_until_the_new_one_is_sealed(lab: Lab) -> None:
    lab.ingest()
    manifest = lab.open().manifest_hash
    lab.rows.append(lab.rows[0] | {"id": "bad", "file": "absent.png"})
    with pytest.raises(TooManyRejectsError):
        lab.ingest()
    assert lab.open().manifest_hash == manifest
    assert verify(lab.out) == []


def test_a_table_that_contradicts_the_set_is_refused(lab: Lab) -> None:
    lab.ingest()
    lab.rows[3]["exposure"] = "1.75"
    lab.rows[5]["camera"] = "cam 0"
    lab.rows.append(lab.rows[0] | {"id": "new"})
    with pytest.raises(DataError) as caught:
        lab.ingest()
    assert "in 2 cells" in str(caught.value)
    assert "id 's0005': camera was 'cam 1', now 'cam 0'" in str(caught.value)


def test_another_schema_or_column_is_refused(lab: Lab) -> None:
    lab.ingest()
    with pytest.raises(ConfigError, match="--path is not what the set was made with"):
        lab.ingest(path_column="id")
    lab.schema["factors"]["exposure"] |= {"high": 3}
    with pytest.raises(ConfigError, match="the schema file is not what"):
        lab.ingest()


def damage(lab: Lab) -> dict[str, str]:
    """Spoil some images in every way; return the code that each id must get."""
    good = (lab.images / "0001.png").read_bytes()
    secret = lab.root / "secret.png"
    secret.write_bytes(good)
    (lab.images / "link.png").symlink_to(secret)
    (lab.images / "linked").symlink_to(lab.root, target_is_directory=True)
    (lab.images / "inside.png").symlink_to(lab.images / "0001.png")
    (lab.images / "broken.png").symlink_to("absent.png")
    (lab.images / "folder.png").mkdir()
    files = {
        "cut": (good[:-30], "decode_failed"),
        "flipped": (good[:60] + bytes([good[60] ^ 4]) + good[61:], "decode_failed"),
        "empty": (b"", "empty_file"),
        "html": (b"<html>not found</html>", "unknown_format"),
    }
    paths = {
        "dots": ("../secret.png", "path_escape"),
        "absolute": (str(secret), "path_escape"),
        "link": ("link.png", "path_escape"),
        "folder link": ("linked/secret.png", "path_escape"),
        "absent": ("absent.png", "missing_file"),
        "broken link": ("broken.png", "missing_file"),
        "folder": ("folder.png", "not_a_file"),
        "too long": ("x" * 300 + ".png", "missing_file"),
    }
    for name, (data, _) in files.items():
        (lab.images / f"{name}.png").write_bytes(data)
        lab.rows.append(lab.rows[0] | {"id": name, "file": f"{name}.png"})
    for name, (path, _) in paths.items():
        lab.rows.append(lab.rows[0] | {"id": name, "file": path})
    lab.rows.append(lab.rows[0] | {"id": "inner link", "file": "inside.png"})
    return {name: code for name, (_, code) in (files | paths).items()}


def test_bad_images_are_rejected_with_their_code_and_their_neighbours_kept(lab: Lab) -> None:
    codes = damage(lab)
    report = lab.ingest(max_reject=Allowance(count=len(codes)))
    rejects = pq.read_table(lab.out / "rejects.parquet").to_pylist()
    assert {row["id"]: row["code"] for row in rejects} == codes
    assert all(row["detail"] and row["path"] for row in rejects)
    (broken,) = (row["detail"] for row in rejects if row["id"] == "broken link")
    assert broken == "a symbolic link to what is not there"
    shards = lab.open()
    assert set(shards.ids) == {row["id"] for row in lab.rows} - set(codes)
    assert report.manifest.planned == report.manifest.samples + len(codes)
    assert verify(lab.out) == []


_opened: list[str] | None = None


def _note_opened(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook: there for the rest of the process, and deaf but for one test."""
    if _opened is not None and event == "open" and isinstance(arguments[0], str):
        path, flags = Path(arguments[0]), arguments[2]
        followed = path.parent.resolve() / path.name if flags & os.O_NOFOLLOW else path.resolve()
        _opened.append(str(followed))


def test_nothing_outside_images_and_output_is_opened_or_changed(lab: Lab) -> None:
    """Also where a link takes the place of a planned image after it was looked at."""

    class Swapping(Serial):
        def run(self, function: Any, tasks: Any) -> Any:
            for name, target in (("0003.png", "secret.png"), ("0005.png", "elsewhere")):
                if tasks:  # the first time it runs what earlier ingests left
                    (lab.images / name).unlink()
                    (lab.images / name).symlink_to(lab.root / target)
            return super().run(function, tasks)

    global _opened
    sys.addaudithook(_note_opened)
    codes = damage(lab)
    outside = lab.root / "elsewhere"
    outside.mkdir()
    (outside / "own.txt").write_text("own")
    lab.save()
    before = {path: path.stat() for path in lab.root.rglob("*") if not path.is_symlink()}
    _opened = []
    try:
        report = ingest(lab.request(max_reject=Allowance(count=len(codes) + 2)), Swapping())
    finally:
        opened, _opened = _opened, None
    assert report.rejects == Counter([*codes.values(), "path_escape", "path_escape"])
    assert str(lab.images / "0001.png") in opened  # the hook does hear
    allowed = [str(folder.resolve()) for folder in (lab.images, lab.out)]
    strays = {path for path in opened if path.startswith(str(lab.root.resolve()))}
    strays -= {path for path in strays if path.startswith((*allowed, str(lab.table.resolve())))}
    # Made to remember the new output, so that a power cut does not take it away.
    assert strays == {str(lab.root.resolve())}
    for path, state in before.items():
        if path not in (lab.images, lab.root, lab.images / "0003.png", lab.images / "0005.png"):
            now = path.stat()
            assert (now.st_mtime_ns, now.st_size) == (state.st_mtime_ns, state.st_size)


def test_leftovers_of_a_set_are_removed_and_nothing_else(lab: Lab) -> None:
    """Also where the set's folder holds the images, and a report that was broken off."""
    out = lab.root
    lab.ingest(out=out)
    whole = content(out)
    ours = [out / ".tmp-shard-0000-000000.tar.host.1", out / "plan-0000/.tmp-plan.json.host.1"]
    others = [lab.images / ".tmp-0001.png", out / ".tmp-audit" / "audit.md"]
    others[1].parent.mkdir()
    for path in ours + others:
        path.write_bytes(b"draft")
    lab.ingest(out=out)
    kept = {str(path.relative_to(out)): b"draft" for path in others}
    assert content(out) == whole | kept


def test_more_rejects_than_allowed_leave_the_set_unsealed(lab: Lab) -> None:
    codes = damage(lab)
    with pytest.raises(TooManyRejectsError) as caught:
        lab.ingest(max_reject=Allowance(count=len(codes) - 1))
    assert "12 of 37 images were rejected" in str(caught.value)
    assert caught.value.exit_code == 2
    with pytest.raises(DataError, match="is no sealed set"):
        lab.open()


def test_rejects_can_be_tried_again_after_repair(lab: Lab) -> None:
    codes = damage(lab)
    with pytest.raises(TooManyRejectsError):
        lab.ingest()
    for row in lab.rows:
        if row["id"] in codes:
            row["file"] = "0003.png"
    (lab.images / "cut.png").write_bytes((lab.images / "0001.png").read_bytes())
    report = lab.ingest(retry_rejects=True)
    assert report.rejects == {}
    shards = lab.open()
    assert sorted(shards.ids) == sorted(row["id"] for row in lab.rows)
    values = adaptation_exposures(lab)
    assert shards.schema.factors["exposure"].mean == [pytest.approx(np.mean(values), rel=1e-12)]
    assert verify(lab.out) == []


def test_a_file_that_changes_between_plan_and_write(lab: Lab) -> None:
    """By its time of change, by its size alone, or by being gone."""

    class Meddling(Serial):
        """Changes images after the plan was made."""

        def run(self, function: Any, tasks: Any) -> Any:
            if tasks:  # the first time it runs what earlier ingests left
                for name, later in (("0002.jpg", 10**9), ("0005.png", 10**9), ("0007.png", 0)):
                    path = lab.images / name
                    before = path.stat()
                    data = png(pixels(99), "PNG" if name.endswith("png") else "JPEG")
                    path.write_bytes(data if later else path.read_bytes() + b"more")
                    os.utime(path, ns=(before.st_mtime_ns + later,) * 2)
                (lab.images / "0009.png").unlink()
            return super().run(function, tasks)

    lab.save()
    ingest(lab.request(max_reject=Allowance(count=4)), Meddling())
    rejects = pq.read_table(lab.out / "rejects.parquet").to_pylist()
    assert {row["path"]: row["code"] for row in rejects} == {
        "0002.jpg": "source_changed",
        "0005.png": "source_changed",
        "0007.png": "source_changed",
        "0009.png": "missing_file",
    }


NAMES = [
    "é µ ß ø.png",
    unicodedata.normalize("NFD", "é-nfd.png"),
    "two  spaces .png",
    "a.b.c..png",
    "line\nbreak.png",
    "IMAGE.TIFF",
    "no extension",
    "-dash.png",
    "x" * 251 + ".png",
    "sub folder/日本.png",
    '"quoted", comma.png',
]


def test_names_of_every_kind_come_back_by_id(lab: Lab) -> None:
    lab.rows = []
    (lab.images / "sub folder").mkdir()
    for i, name in enumerate(NAMES):
        (lab.images / name).write_bytes(png(pixels(i)))
        row = {"id": name, "file": name, "camera": f"c{i % 2}", "exposure": str(i / 10)}
        lab.rows.append(row | {"hour": str(i), "defects": "a", "label": "1", "split": "adapt"})
    lab.ingest()
    shards = lab.open()
    assert sorted(shards.ids) == sorted(NAMES)
    for row, name in enumerate(shards.ids):
        assert shards.read(row) == (lab.images / name).read_bytes()


def test_a_missing_file_whose_other_unicode_form_exists_is_hinted_at(lab: Lab) -> None:
    (lab.images / unicodedata.normalize("NFD", "é.png")).write_bytes(png(pixels(0)))
    lab.rows[0]["file"] = unicodedata.normalize("NFC", "é.png")
    with pytest.raises(TooManyRejectsError, match="NFD form"):
        lab.ingest()


def test_max_reject_is_a_share_or_a_number() -> None:
    assert Allowance.parse("0.1%").of(5000) == 5
    assert Allowance.parse("25").of(100) == 25
    assert Allowance.parse("0").of(10**6) == 0
    for text in ("0.5", "-1", "many", "101%", "nan%", ""):
        with pytest.raises(ConfigError, match="max-reject"):
            Allowance.parse(text)


def test_no_image_at_all_or_no_row(lab: Lab) -> None:
    lab.save()
    with pytest.raises(ConfigError, match="no folder of images"):
        lab.ingest(images=lab.root / "nowhere")
    for row in lab.rows:
        row["file"] = "absent.png"
    with pytest.raises(DataError, match="not one image"):
        lab.ingest(max_reject=Allowance(share=1.0))
    lab.table.write_text("id,file,camera,exposure,hour,defects,label,split\n", encoding="utf-8")
    with pytest.raises(DataError, match="has no rows"):
        ingest(lab.request(out=lab.root / "other"), Serial())


@pytest.mark.parametrize(("chunk", "bucket"), [(1 << 9, 7), (1 << 10, 1000), (32 << 20, 13)])
def test_pieces_of_table_and_shuffle_make_no_difference_to_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, bucket: int
) -> None:
    lab = make_lab(tmp_path / "lab", 60)
    lab.ingest()
    monkeypatch.setattr("fino_fast.data.table._CHUNK_BYTES", chunk)
    monkeypatch.setattr("fino_fast.data.spill._BUCKET_ROWS", bucket)
    lab.ingest(out=tmp_path / "again")
    whole, pieces = (
        (out / "plan-0000" / "rows.parquet").read_bytes() for out in (lab.out, tmp_path / "again")
    )
    assert whole == pieces
    # Appended rows are found among those of several pieces, and so are contradictions.
    for row in make_lab(tmp_path / "more", 90).rows[60:]:
        (lab.images / row["file"]).write_bytes(
            (tmp_path / "more/images" / row["file"]).read_bytes()
        )
        lab.rows.append(row)
    lab.ingest(out=tmp_path / "again")
    assert len(ShardSet.open(tmp_path / "again")) == 90
    lab.rows[50]["camera"], lab.rows[3]["exposure"] = "other", "1.5"
    with pytest.raises(DataError, match=r"differs .* in 2 cells.*\n(.|\n)*id 's0050': camera was"):
        lab.ingest(out=tmp_path / "again")


def test_more_shards_than_names_count(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fino_fast.data.plan._LAST_SHARD", 9)
    with pytest.raises(ConfigError, match=r"shard-bytes: 1 makes more than 10 shards of these 24"):
        lab.ingest(shard_bytes=1)
    assert not list(lab.out.rglob("plan.json"))


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(
        ["plan-0000/plan.json", "plan-0000/schema.json", "shard-0000-000001.json"]
    ),
    noise=st.binary(min_size=1, max_size=40),
    place=st.floats(0, 1),
    cut=st.booleans(),
)
def test_random_bytes_in_a_plan_or_receipt_end_a_rerun_well(
    sealed_lab: tuple[Lab, dict[str, bytes]], name: str, noise: bytes, place: float, cut: bool
) -> None:
    """In nothing but one of our own errors; in no case is another file of the set changed."""
    lab, whole = sealed_lab
    data = whole[name]
    start = int(place * len(data))
    rest = b"" if cut else data[start + len(noise) :]
    (lab.out / name).write_bytes(data[:start] + noise + rest)
    with contextlib.suppress(FinoError):
        ingest(lab.request(), Serial())
    (lab.out / name).write_bytes(data)
    assert content(lab.out) == whole


@pytest.mark.parametrize("field", ["sha256", "sidecar_sha256", "schema_sha256", "plan_sha256"])
def test_a_receipt_with_another_hash_is_not_believed(lab: Lab, field: str) -> None:
    """The shard is written again, to the same bytes, and the set is what it was."""
    lab.ingest()
    whole = content(lab.out)
    path = lab.out / "shard-0000-000001.json"
    receipt = json.loads(path.read_bytes())
    receipt[field] = receipt[field][::-1]
    path.write_text(json.dumps(receipt), encoding="utf-8")
    assert lab.ingest().shards_written == 1
    assert content(lab.out) == whole


def test_a_shard_written_again_after_the_seal_stands_without_a_seal(lab: Lab) -> None:
    """A run that ended between the two: its receipt and the former manifest differ, rightly."""
    report = lab.ingest()
    former = (lab.out / "MANIFEST.json").read_bytes()
    (lab.images / lab.rows[3]["file"]).unlink()
    for tar in lab.out.glob("*.tar"):
        tar.unlink()
    lab.ingest(max_reject=Allowance(count=1))
    (lab.out / "MANIFEST.json").write_bytes(former)
    again = lab.ingest(max_reject=Allowance(count=1))
    assert again.shards_written == 0
    assert report.manifest is not None
    assert again.manifest is not None
    assert again.manifest.samples == report.manifest.samples - 1


@pytest.fixture(scope="module")
def sealed_lab(tmp_path_factory: pytest.TempPathFactory) -> tuple[Lab, dict[str, bytes]]:
    lab = make_lab(tmp_path_factory.mktemp("sealed-lab") / "lab", 24)
    lab.ingest()
    return lab, content(lab.out)


def test_a_pipe_put_in_the_place_of_a_planned_file_is_rejected_at_once(lab: Lab) -> None:
    root, path = Root(lab.images), lab.rows[0]["file"]
    planned = root.find(path)
    (lab.images / path).unlink()
    os.mkfifo(lab.images / path)
    with pytest.raises(ImageRejected, match="not_a_file"):
        root.read(path, planned.size, planned.mtime_ns)
