"""Encoded metadata in records of fixed size: what `Factor.encode` gives, for any rows."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from fino_fast.data import Loader, ShardSet, Views, metadata
from fino_fast.data.index import records_start
from fino_fast.data.metadata import MetadataFile, pack, record_type
from fino_fast.data.plan import FACTOR
from fino_fast.errors import DataError

from .labs import Lab


def test_records_are_what_the_table_encodes_to(sealed: ShardSet) -> None:
    rows = np.random.default_rng(0).permutation(len(sealed))[:17]
    factors = sealed.schema.factors
    chosen = sealed.metadata.of(rows, factors)
    for name, factor in factors.items():
        expected = factor.encode(sealed.raw_column(name))
        assert sealed.encoded(name).dtype == expected.dtype
        np.testing.assert_array_equal(sealed.encoded(name), expected)
        np.testing.assert_array_equal(chosen[name], expected[rows])
    # Nothing of this is trivial: every kind has missing and observed entries.
    assert (sealed.encoded("camera") == -1).any()
    assert all(np.isnan(sealed.encoded(name)).any() for name in ("exposure", "defects"))


def test_pieces_make_no_difference(sealed: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = pa.table({FACTOR + name: sealed.raw_column(name) for name in sealed.schema.factors})
    whole = pack(sealed.schema, raw)
    monkeypatch.setattr(metadata, "_CELLS", 14)  # 7 rows of the widest factor, which has 2 columns
    assert pack(sealed.schema, raw).tobytes() == whole.tobytes()


def test_more_values_than_fit_into_one_byte(lab: Lab) -> None:
    for i, row in enumerate(lab.rows):
        row["defects"] = "" if i % 6 == 1 else ";".join(f"d{(i * k) % 11}" for k in range(1, 4))
    lab.ingest()
    shards = lab.open()
    factor = shards.schema.factors["defects"]
    assert factor.width == 11
    np.testing.assert_array_equal(
        shards.encoded("defects"), factor.encode(shards.raw_column("defects"))
    )


def test_a_code_outside_the_vocabulary_is_refused(sealed: ShardSet, tmp_path: Path) -> None:
    """A file whose hash was made to fit: an index out of range must not reach the loss."""
    source = sealed.folder / sealed.manifest.metadata.name
    dtype = record_type(sealed.schema)
    start = records_start(source, dtype, len(sealed))
    data = bytearray(source.read_bytes())
    records = np.frombuffer(data, dtype, offset=start)
    place = list(sealed.schema.factors).index("camera")
    records[f"f{place}"][5] = 4
    changed = tmp_path / "metadata.npy"
    changed.write_bytes(data)
    metadata = MetadataFile(changed, sealed.schema, len(sealed))
    metadata.of(np.array([4, 6]), ["camera"])
    with pytest.raises(DataError, match=r"metadata\.npy: is damaged: factor 'camera': codes"):
        metadata.of(np.array([4, 5]), ["camera"])


def test_a_file_that_shrinks_in_use_is_an_error(lab: Lab) -> None:
    lab.ingest()
    shards = lab.open()
    batches = Loader(shards, Views(size=8), 4, backend="torch").epoch(0)
    next(batches)
    (lab.out / shards.manifest.metadata.name).write_bytes(b"")
    with pytest.raises(DataError, match="was cut while it was in use"):
        list(batches)
