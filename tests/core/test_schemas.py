import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from scellst_ray.core import schemas

FAILURE = {
    "slide_id": ["a"],
    "tile_id": [3],
    "stage": ["read"],
    "error_type": ["E"],
    "error": ["x"],
}


def test_conform_orders_casts_drops_and_signs():
    table = pa.table({"extra": [1], **{k: FAILURE[k] for k in reversed(FAILURE)}})
    table = table.set_column(1 + 3, "tile_id", pa.array([3], pa.int16()))
    out = schemas.conform(table, schemas.FAILURES, "FAILURES", "d1g")
    assert out.schema.equals(schemas.FAILURES)
    assert out.to_pydict() == FAILURE
    assert out.schema.metadata == {
        b"scellst_ray.table": b"FAILURES",
        b"scellst_ray.version": b"1",
        b"scellst_ray.run_digest": b"d1g",
    }


def test_conform_names_the_missing_column():
    with pytest.raises(ValueError, match=r"FAILURES.*tile_id.*missing.*slide_id"):
        schemas.conform(pa.table({"slide_id": ["a"]}), schemas.FAILURES, "FAILURES")


@pytest.mark.parametrize("value", ["7.5", "far"])
def test_conform_refuses_a_lossy_cast(value):
    table = pa.table(FAILURE | {"tile_id": [value]})
    with pytest.raises(ValueError, match=value):
        schemas.conform(table, schemas.FAILURES, "FAILURES")


def test_conform_refuses_nulls_in_a_needed_column():
    table = pa.table(FAILURE | {"tile_id": pa.array([None], pa.int64())})
    with pytest.raises(ValueError, match="tile_id"):
        schemas.conform(table, schemas.FAILURES, "FAILURES")


def test_check_after_a_parquet_round_trip(tmp_path):
    table = schemas.conform(pa.table(FAILURE), schemas.FAILURES, "FAILURES")
    pq.write_table(table, tmp_path / "f.parquet")
    schema = pq.read_schema(tmp_path / "f.parquet")
    schemas.check(schema, "FAILURES", "f.parquet")
    with pytest.raises(ValueError, match=r"f.parquet: expected a scellst_ray CELLS .* FAILURES"):
        schemas.check(schema, "CELLS", "f.parquet")
    with pytest.raises(ValueError, match="no signature"):
        schemas.check(pa.schema([pa.field("a", pa.int8())]), "CELLS", "f.parquet")


def test_check_refuses_a_newer_version():
    schema = schemas.sign_schema(schemas.FAILURES, "FAILURES")
    newer = schema.with_metadata(schema.metadata | {b"scellst_ray.version": b"99"})
    with pytest.raises(ValueError, match=r"version 99.*up to 1.*Upgrade"):
        schemas.check(newer, "FAILURES", "f")


def test_shards_hold_what_tables_do_not():
    assert [f.name for f in schemas.SHARD_FIELDS if f not in schemas.CELL_FIELDS] == ["seam"]
    assert "seam" not in schemas.cells_schema(384).names


def test_vectors_are_plain_arrow_float16():
    assert "embedding" not in schemas.cells_schema(None).names
    embedding = schemas.cells_schema(2048).field("embedding")
    assert embedding.type == pa.list_(pa.field("item", pa.float16()), 2048)
    assert not embedding.nullable
    assert schemas.expression_schema().names == ["slide_id", "cell_id", "hidden"]
    assert schemas.expression_schema().field("hidden").type.list_size == 256
    with_distance = schemas.expression_schema(512, with_distance=True)
    assert with_distance.names == ["slide_id", "cell_id", "hidden", "distance"]
    assert with_distance.field("distance").type == pa.float16()
    assert schemas.bags_schema(8).field("embedding").type.value_type.list_size == 8


def test_every_stage_has_its_seconds():
    assert [n for n in schemas.RECEIPTS.names if n.startswith("seconds_")] == [
        f"seconds_{stage}" for stage in schemas.STAGES
    ]
    assert set(schemas.FAILURES.names) <= set(schemas.RECEIPTS.names) & set(schemas.TILES.names)
