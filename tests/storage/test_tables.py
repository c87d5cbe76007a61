import hashlib

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from scellst_ray import storage
from scellst_ray.storage import tables

TABLE = pa.table(
    {
        "slide_id": ["S"] * 300,
        "x0": np.random.default_rng(0).random(300).astype(np.float32),
        "type_prob": pa.array([None, 0.5, 0.25] * 100, pa.float32()),
        "polygon": [bytes([i % 256]) * (i % 7) for i in range(300)],
    }
)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "t.parquet"
    storage.publish_stamped(
        str(path), TABLE.schema, lambda w: w.write_table(TABLE, row_group_size=128)
    )
    return path


def test_a_file_says_that_its_pages_have_checksums_and_its_footer_one(path):
    content = path.read_bytes()
    footer = content[-8 - int.from_bytes(content[-8:-4], "little") :]
    seal = content[-len(footer) - tables.SEAL_BYTES : -len(footer)]
    assert seal == tables.SEAL + hashlib.sha256(footer).digest()
    assert storage.read_footer(str(path))[1]


def test_other_readers_open_it(path):
    assert pq.read_table(path).equals(TABLE)
    assert pl.read_parquet(path).shape == TABLE.shape


def flips(content, every):
    """Yield the content with one bit flipped, each `every`-th bit in turn."""
    for bit in range(0, 8 * len(content), every):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        yield bytes(changed)


@pytest.mark.parametrize("columns", [None, ["x0"], ["type_prob", "slide_id"], ["polygon"]])
def test_no_flipped_bit_gives_other_content(path, columns):
    right = TABLE if columns is None else TABLE.select(columns)
    counts = {"refused": 0, "equal": 0}
    for content in flips(path.read_bytes(), 29):
        path.write_bytes(content)
        try:
            read = storage.read_table(str(path), columns)
        except storage.DamagedFileError:
            counts["refused"] += 1
        else:
            assert read.equals(right)
            counts["equal"] += 1
    assert counts["refused"] > counts["equal"] or columns is not None


def damaged(content):
    """Return what a damaged file may hold, by kind of damage."""
    return {
        "empty": b"",
        "only the magic": b"PAR1",
        "cut in half": content[: len(content) // 2],
        "a byte short": content[:-1],
        "a byte long": content + b"\0",
        "zeros": b"\0" * len(content),
        "some zeros": content[:40] + b"\0" * 64 + content[104:],
        "another file": b"<html>404</html>",
        "a footer too long": content[:-6] + b"\xff\xff" + content[-4:],
    }


@pytest.mark.parametrize("kind", damaged(b""))
def test_a_damaged_file_is_named(path, kind):
    path.write_bytes(damaged(path.read_bytes())[kind])
    for read in (storage.read_table, storage.read_all):
        with pytest.raises(storage.DamagedFileError, match=r"t\.parquet: is damaged"):
            read(str(path))


def test_a_file_without_checksums_is_read(tmp_path):
    pq.write_table(TABLE, tmp_path / "old.parquet")
    assert storage.read_table(str(tmp_path / "old.parquet")).equals(TABLE)
    assert not storage.read_footer(str(tmp_path / "old.parquet"))[1]


def test_a_stamp_tells_one_whole_file_from_another(path, tmp_path):
    stamp = storage.stamp_of(path)
    assert stamp.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert storage.digest_of(str(path)) == stamp.sha256
    assert (stamp.bytes, stamp.rows) == (path.stat().st_size, 300)
    assert storage.read_table(str(path), None, stamp).equals(TABLE)
    other = TABLE.set_column(1, "x0", pa.array(TABLE["x0"].to_numpy() + 1))
    storage.publish_table(str(tmp_path / "other.parquet"), other)
    with pytest.raises(storage.DamagedFileError, match="is not the file that was written"):
        storage.read_table(str(tmp_path / "other.parquet"), None, stamp)


def test_a_file_of_the_same_size_is_another_one(path):
    stamp = storage.stamp_of(path)
    same = storage.TableStamp(stamp.sha256, "0" * 64, stamp.bytes, stamp.rows)
    with pytest.raises(storage.DamagedFileError, match="another file of the same size"):
        storage.read_table(str(path), ["x0"], same)


def test_an_absent_file_stays_an_absent_file(tmp_path):
    for read in (storage.read_table, storage.read_schema, storage.digest_of, storage.read_footer):
        with pytest.raises(FileNotFoundError):
            read(str(tmp_path / "no.parquet"))


def test_a_missing_column_is_no_damage(path):
    with pytest.raises(ValueError, match="columns \\['y0'\\] are missing") as found:
        storage.read_table(str(path), ["y0"])
    assert not isinstance(found.value, storage.DamagedFileError)


def test_a_long_footer_on_an_object_store():
    wide = pa.table({f"column_{i:04d}": [1.0] for i in range(2000)})
    storage.publish_table("memory://tables/wide.parquet", wide)
    assert storage.read_table("memory://tables/wide.parquet").equals(wide)
    assert storage.read_footer("memory://tables/wide.parquet")[1]
    stamp = storage.publish_stamped(
        "memory://tables/t.parquet", TABLE.schema, lambda w: w.write_table(TABLE)
    )
    assert storage.read_table("memory://tables/t.parquet", ["x0"], stamp).num_rows == 300
    assert storage.digest_of("memory://tables/t.parquet") == stamp.sha256
