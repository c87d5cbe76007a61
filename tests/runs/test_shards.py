import pyarrow as pa
import pytest
import shapely

from scellst_ray import storage
from scellst_ray.core import schemas
from scellst_ray.runs.compaction import finish_slide
from scellst_ray.runs.folder import RunFolder
from scellst_ray.runs.shards import (
    IDS,
    DamagedShardsError,
    Shards,
    SlideCells,
    _stretches,
    publish_shard,
)

OUTLINE = shapely.to_wkb(shapely.Point(0, 0).buffer(4))


def cells_of(slide_id, tile_id, count, x0=0.0):
    table = pa.table(
        {
            "slide_id": [slide_id] * count,
            "cell_id": [(tile_id << 20) + i for i in range(count)],
            "x0": [x0 + i for i in range(count)],
            "y0": [0.0] * count,
            "area_um2": [30.0] * count,
            "nucleus_type": ["nucleus"] * count,
            "type_prob": pa.nulls(count, pa.float32()),
            "polygon": [OUTLINE] * count,
            "seam": [0] * count,
        }
    )
    return table.cast(pa.schema(schemas.SHARD_FIELDS))


def receipt(slide_id, tile_id, num_tiles, count, shard, row=0):
    ids = {"slide_id": slide_id, "tile_id": tile_id, "num_tiles": num_tiles, "num_cells": count}
    return ids | {"shard": shard, "shard_row": row, "mpp": 0.5, "read_mpp": 0.5}


def receipts_of(*rows):
    return pa.Table.from_pylist(list(rows), schema=schemas.RECEIPTS)


@pytest.fixture
def run(tmp_path):
    """A run with the tiles 0 and 1 of slide S in two shards."""
    run = RunFolder(str(tmp_path), "d1g")
    for tile, name in enumerate(("a.parquet", "b.parquet")):
        publish_shard(run, name, cells_of("S", tile, 4, x0=10.0 * tile))
    return run


RECEIPTS = receipts_of(receipt("S", 0, 2, 4, "a.parquet"), receipt("S", 1, 2, 4, "b.parquet"))


def damage(run, name, change):
    uri = run.shard_uri(name)
    storage.publish_bytes(uri, change(storage.read_bytes(uri)))


def swap(run):
    a, b = (storage.read_bytes(run.shard_uri(name)) for name in ("a.parquet", "b.parquet"))
    storage.publish_bytes(run.shard_uri("a.parquet"), b)
    storage.publish_bytes(run.shard_uri("b.parquet"), a)


def replace_by(run, table, *, digest="d1g", name="a.parquet", signed=True):
    if signed:
        publish_shard(RunFolder(run.uri, digest), name, table)
        if name != "a.parquet":
            content = storage.read_bytes(run.shard_uri(name))
            storage.publish_bytes(run.shard_uri("a.parquet"), content)
    else:
        storage.publish_table(run.shard_uri("a.parquet"), table)


WRONG = {
    "cut": lambda run: damage(run, "a.parquet", lambda c: c[: len(c) // 2]),
    "empty": lambda run: damage(run, "a.parquet", lambda c: c[:0]),
    "flipped": lambda run: damage(run, "a.parquet", lambda c: c[:9] + bytes([c[9] ^ 1]) + c[10:]),
    "absent": lambda run: storage.remove_tree(run.shard_uri("a.parquet")),
    "swapped": swap,
    "of another run": lambda run: replace_by(run, cells_of("S", 0, 4), digest="other"),
    "of another slide": lambda run: replace_by(run, cells_of("T", 0, 4)),
    "of another tile": lambda run: replace_by(run, cells_of("S", 5, 4), signed=False),
    "another attempt": lambda run: replace_by(run, cells_of("S", 0, 4), name="c.parquet"),
    "too short": lambda run: replace_by(run, cells_of("S", 0, 3), signed=False),
    "another table": lambda run: storage.publish_table(
        run.shard_uri("a.parquet"), pa.table({"slide_id": ["S"] * 4})
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_shard_is_named_before_anything_is_written(run, kind):
    WRONG[kind](run)
    with pytest.raises(DamagedShardsError, match=r"shards/a\.parquet: ") as found:
        finish_slide(run, "S", RECEIPTS)
    wrong = {"a.parquet", "b.parquet"} if kind == "swapped" else {"a.parquet"}
    assert set(found.value.problems) == wrong
    assert not storage.exists(run.record_uri("S"))
    assert not storage.exists(run.cells_uri("S"))


def test_pages_that_no_id_lies_in_are_checked_too(run):
    """The ids are whole: the damage is found while the tables are written, in all shards."""
    flip = lambda c: c[: (at := c.rindex(OUTLINE[64:128])) + 8] + b"\1" + c[at + 9 :]  # noqa: E731
    for name in ("a.parquet", "b.parquet"):
        table = cells_of("S", "ab".index(name[0]), 4)
        publish_uncompressed(run, name, table)
        damage(run, name, flip)
    with pytest.raises(DamagedShardsError) as found:
        finish_slide(run, "S", RECEIPTS)
    assert set(found.value.problems) == {"a.parquet", "b.parquet"}


def publish_uncompressed(run, name, table):
    storage.publish_stamped(
        run.shard_uri(name), table.schema, lambda w: w.write_table(table), compression="none"
    )


def test_a_whole_shard_of_an_earlier_release_is_read(run):
    storage.publish_table(run.shard_uri("a.parquet"), cells_of("S", 0, 4))
    record = finish_slide(run, "S", RECEIPTS)
    assert (record["status"], record["num_cells"]) == ("done", 8)


def test_shards_of_a_large_slide_are_checked_without_keeping_them(run, monkeypatch):
    monkeypatch.setattr("scellst_ray.runs.shards.FEW_CELLS", 3)
    shards = Shards(run)
    SlideCells(shards, "S", RECEIPTS).check(thoroughly=True)
    assert shards.kept == {}
    assert shards.read("a.parquet", IDS, keep=False).num_rows == 4


def test_stretches_join_tiles_that_follow_each_other():
    places = [("a", 0, 3), ("a", 3, 2), ("b", 0, 1), ("b", 5, 2)]
    assert list(_stretches(places)) == [("a", 0, 5), ("b", 0, 1), ("b", 5, 2)]
