import hashlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shapely
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scellst_ray import storage
from scellst_ray.core import schemas
from scellst_ray.models.mil.head import MilHead, save_head
from scellst_ray.runs import compaction
from scellst_ray.runs import shards as shards_module
from scellst_ray.runs.boxes import with_boxes
from scellst_ray.runs.folder import RunFolder
from scellst_ray.runs.shards import Shards

HIDDEN = schemas.HIDDEN_DIM


def vectors(values, dim):
    flat = pa.array(np.asarray(values, np.float16).reshape(-1), pa.float16())
    return pa.FixedSizeListArray.from_arrays(flat, type=schemas.vector("v", dim).type)


def tile_cells(tile_id, count, *, hidden=True, dim=None):
    """Return the cells of one tile: a pure function of the tile, as in a run.

    They lie on few places, at most one per place: two tiles often have the same nucleus.
    """
    rng = np.random.default_rng(tile_id)
    x, y = (np.divmod(rng.permutation(60)[:count], 8) * np.array([[20.0]])).astype(np.float32)
    table = pa.table(
        {
            "slide_id": ["s"] * count,
            "cell_id": pa.array(tile_id * 2**20 + np.arange(count), pa.int64()),
            "x0": x,
            "y0": y,
            "area_um2": rng.uniform(10, 90, count).astype(np.float32),
            "nucleus_type": ["nucleus"] * count,
            "type_prob": pa.array([None] * count, pa.float32()),
            "polygon": pa.array(list(shapely.to_wkb(shapely.buffer(shapely.points(x, y), 4)))),
            "seam": rng.choice(np.array([0, 1, 2, 5], np.uint8), count),
        },
        schema=pa.schema(schemas.SHARD_FIELDS),
    )
    for name, size, wanted in (("embedding", dim, dim is not None), ("hidden", HIDDEN, hidden)):
        if wanted:
            values = vectors(rng.random((count, size)), size)
            table = table.append_column(schemas.vector(name, size), values)
    return table


def expected_cells(counts, failed=(), **columns):
    """Return the expected tables: the owned, whole, first one of the nuclei at one place."""
    tiles = [t for t in range(len(counts)) if t not in failed]
    table = pa.concat_tables([tile_cells(t, counts[t], **columns) for t in tiles])
    best = {}
    for row in table.select(["cell_id", "x0", "y0", "seam"]).to_pylist():
        if row["seam"]:
            place = (row["x0"], row["y0"])
            mine = (row["seam"] in (2, 5), row["cell_id"])
            best[place] = min(best.get(place, mine), mine)
    kept = {cell_id for _, cell_id in best.values()}
    rows = table.select(["seam", "cell_id"]).to_pylist()
    stays = [row["seam"] == 0 or row["cell_id"] in kept for row in rows]
    return with_boxes(table.filter(pa.array(stays, pa.bool_())).drop_columns("seam"))


def receipt(tile_id, num_tiles, count, shard=None, row=None, error=None):
    return {
        "slide_id": "s",
        "tile_id": tile_id,
        "num_tiles": num_tiles,
        "mpp": 0.5,
        "read_mpp": 0.5,
        "width0": 1000,
        "height0": 900,
        "num_cells": count,
        "shard": shard,
        "shard_row": row,
        "stage": error and "read",
        "error_type": error and "ValueError",
        "error": error,
        "seconds_read": 0.5,
        "waited_s": 2.0,
    }


def write_run(folder, counts, groups, failed=(), **columns):
    """Write shards, one per group of tiles, and return the run and its receipts, shuffled."""
    run = RunFolder(str(folder), "d1g")
    rows = [receipt(tile, len(counts), 0, error="lost") for tile in failed]
    for number, group in enumerate(groups):
        tables, start = [], 0
        for tile in (tile for tile in group if tile not in failed):
            name = f"{number}.parquet" if counts[tile] else None
            rows.append(receipt(tile, len(counts), counts[tile], name, start if name else None))
            tables.append(tile_cells(tile, counts[tile], **columns))
            start += counts[tile]
        if start:
            uri = run.shard_uri(f"{number}.parquet")
            storage.publish_table(uri, pa.concat_tables(tables))
    order = np.random.default_rng(len(groups)).permutation(len(rows))
    table = pa.Table.from_pylist([rows[i] for i in order], schema=schemas.RECEIPTS)
    return run, table


def row_groups(uri):
    metadata = pq.ParquetFile(uri).metadata
    return [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]


@settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    st.lists(st.integers(0, 25), min_size=1, max_size=9).filter(any),
    st.randoms(use_true_random=False),
)
def test_tables_do_not_depend_on_how_tiles_were_shared_out(
    tmp_path_factory, monkeypatch, counts, random
):
    monkeypatch.setattr(compaction, "ROW_GROUP", 10)
    tiles = list(range(len(counts)))
    shuffled = random.sample(tiles, len(tiles))
    cut = random.randint(0, len(tiles))
    shared_out = [[tiles], [[t] for t in tiles], [shuffled[:cut], shuffled[cut:]]]
    expected = expected_cells(counts)
    found = []
    for groups in shared_out:
        run, receipts = write_run(tmp_path_factory.mktemp("run"), counts, groups)
        record = compaction.finish_slide(run, "s", receipts)
        assert record["tables"] == ["CELLS", "EXPRESSION"]
        cells, hidden = run.cells_uri("s"), run.expression_uri("s")
        assert storage.read_table(cells).equals(expected.drop_columns("hidden"))
        assert storage.read_table(hidden).equals(expected.select(["slide_id", "cell_id", "hidden"]))
        total = record["num_cells"]
        assert total == len(expected)
        assert row_groups(cells) == row_groups(hidden)
        assert row_groups(cells) == [10] * (total // 10) + ([total % 10] if total % 10 else [])
        found.append((storage.resolve(cells)[0].cat(cells), storage.resolve(hidden)[0].cat(hidden)))
    assert found[0] == found[1] == found[2]  # byte for byte


@pytest.mark.parametrize("dim", [None, 384, 2048])
def test_a_done_slide(tmp_path, dim):
    run, receipts = write_run(tmp_path, [3, 0, 2], [[0, 1], [2]], hidden=False, dim=dim)
    record = compaction.finish_slide(run, "s", receipts)
    assert run.records() == {"s": record}
    assert record["status"] == "done"
    assert record["tables"] == ["CELLS"]
    expected = expected_cells([3, 0, 2], hidden=False, dim=dim)
    assert (record["num_cells"], record["num_tiles"], record["num_failed_tiles"]) == (
        len(expected),
        3,
        0,
    )
    assert (record["mpp"], record["width0"], record["height0"]) == (0.5, 1000, 900)
    assert record["seconds"]["read"] == 1.5
    assert record["waited_s"] == 6.0
    assert not storage.exists(run.failures_uri("s"))
    assert not storage.exists(run.expression_uri("s"))
    cells = storage.read_table(run.cells_uri("s"))
    assert cells.equals(expected)
    assert cells.schema.equals(schemas.cells_schema(dim))
    schemas.check(cells.schema, "CELLS", "cells")


def test_each_nucleus_is_written_once(tmp_path):
    """Both tables leave out the same cells; the record counts what ownership alone would give."""
    counts = [50, 50, 50]
    run, receipts = write_run(tmp_path, counts, [[2], [0, 1]])
    record = compaction.finish_slide(run, "s", receipts)
    cells, hidden = (storage.read_table(u) for u in (run.cells_uri("s"), run.expression_uri("s")))
    assert cells["cell_id"].equals(hidden["cell_id"])
    assert record["num_cells"] == len(cells) == len(expected_cells(counts)) < sum(counts)
    offered = pa.concat_tables([tile_cells(t, n) for t, n in enumerate(counts)])
    places = {}
    for row in offered.select(["cell_id", "x0", "y0", "seam"]).to_pylist():
        if row["seam"]:
            places.setdefault((row["x0"], row["y0"]), []).append(row["seam"])
    num_owned = [sum(seam != 2 for seam in seams) for seams in places.values()]
    assert record["seams"] == {
        "doubled": sum(n - 1 for n in num_owned if n),
        "adopted": num_owned.count(0),
    }
    assert min(record["seams"].values()) > 0


@pytest.mark.parametrize(("limit", "beyond"), [(None, None), (0.1, True), (9.0, False)])
def test_the_record_says_how_far_the_cells_lie_from_the_training_slides(tmp_path, limit, beyond):
    counts = [30, 0, 40]
    run, receipts = write_run(tmp_path, counts, [[2], [0, 1]])
    distances = {}
    for uri in storage.list_files(run.shards_uri):
        shard = storage.read_table(uri)
        rng = np.random.default_rng(len(shard))
        distance_N = rng.uniform(0.5, 4, len(shard)).astype(np.float16)
        distances |= dict(zip(shard["cell_id"].to_pylist(), distance_N, strict=True))
        shard = shard.append_column(schemas.DISTANCE, pa.array(distance_N))
        storage.publish_table(uri, shard)
    info = {"genes": ["A"], "scaling": {}, "embedding_dim": 3, "encoder_digest": "e"}
    info |= {"training_slides": [], "metrics": {}, "domain": {"held_out": {}, "limit": limit}}
    save_head(f"{run.uri}/head.safetensors", MilHead(3, 1), info)
    sha256 = hashlib.sha256(storage.read_bytes(f"{run.uri}/head.safetensors")).hexdigest()
    storage.publish_json(f"{run.uri}/run.json", {"identity": {"head": "0" * 64}})
    with pytest.raises(ValueError, match="it is not the head of this run"):
        compaction.finish_slide(run, "s", receipts)
    assert run.records() == {}
    storage.publish_json(f"{run.uri}/run.json", {"identity": {"head": sha256}})
    record = compaction.finish_slide(run, "s", receipts)
    assert record["status"] == "done"
    table = storage.read_table(run.expression_uri("s"))
    # The score is that of the cells that stay: a nucleus at a seam counts once.
    kept = [distances[cell_id] for cell_id in table["cell_id"].to_pylist()]
    assert len(kept) == len(expected_cells(counts)) < sum(counts)
    assert table["distance"].to_pylist() == kept
    assert table.schema.equals(schemas.expression_schema(with_distance=True))
    score = np.sqrt(np.mean(np.square(np.array(kept, float))))
    expected = {"score": pytest.approx(score), "limit": limit, "beyond": beyond}
    assert record["domain_shift"] == expected
    assert run.records() == {"s": record}


def test_shards_of_an_earlier_release_have_no_distance(tmp_path):
    run, receipts = write_run(tmp_path, [5], [[0]])
    record = compaction.finish_slide(run, "s", receipts)
    assert "domain_shift" not in record
    assert storage.read_schema(run.expression_uri("s")).names == ["slide_id", "cell_id", "hidden"]


def test_a_candidate_of_a_tile_without_neighbours_is_a_cell(tmp_path):
    run, receipts = write_run(tmp_path, [20], [[0]], hidden=False)
    record = compaction.finish_slide(run, "s", receipts)
    assert record["num_cells"] == 20
    num_candidates = sum(seam == 2 for seam in tile_cells(0, 20)["seam"].to_pylist())
    assert record["seams"] == {"doubled": 0, "adopted": num_candidates}


def test_a_partial_slide_keeps_its_shards_and_can_be_completed(tmp_path):
    counts, groups = [3, 4, 2], [[0], [1], [2]]
    run, receipts = write_run(tmp_path, counts, groups, failed=[1])
    record = compaction.finish_slide(run, "s", receipts)
    assert record["status"] == "partial"
    expected = expected_cells(counts, failed=[1])
    assert (record["num_cells"], record["num_failed_tiles"]) == (len(expected), 1)
    assert (record["stage"], record["error_type"], record["error"]) == (
        "read",
        "ValueError",
        "lost",
    )
    assert len(storage.list_files(run.shards_uri)) == 2
    failures = storage.read_table(run.failures_uri("s"))
    schemas.check(failures.schema, "FAILURES", "failures")
    assert failures.to_pylist() == [
        {
            "slide_id": "s",
            "tile_id": 1,
            "stage": "read",
            "error_type": "ValueError",
            "error": "lost",
        }
    ]
    run, receipts = write_run(tmp_path, counts, groups)
    record = compaction.finish_slide(run, "s", receipts)
    assert record["status"] == "done"
    assert "error" not in record
    assert not storage.exists(run.failures_uri("s"))
    expected = expected_cells(counts).drop_columns("hidden")
    assert storage.read_table(run.cells_uri("s")).equals(expected)


def test_a_slide_whose_tiles_all_failed(tmp_path):
    run, receipts = write_run(tmp_path, [3, 4], [[0], [1]], failed=[0, 1])
    record = compaction.finish_slide(run, "s", receipts)
    assert (record["status"], record["num_cells"], record["num_failed_tiles"]) == ("failed", 0, 2)
    assert not {"tables", "seams"} & set(record)
    assert not storage.exists(run.cells_uri("s"))
    assert len(storage.read_table(run.failures_uri("s"))) == 2


@pytest.mark.parametrize("error", [None, "no such file"])
def test_a_slide_without_tiles(tmp_path, error):
    run = RunFolder(str(tmp_path), "d1g")
    row = {"slide_id": "s", "tile_id": -1, "num_tiles": 0, "num_cells": 0}
    row |= {"stage": error and "plan", "error": error}
    receipts = pa.Table.from_pylist([row], schema=schemas.RECEIPTS)
    record = compaction.finish_slide(run, "s", receipts)
    assert record["status"] == ("failed" if error else "empty")
    assert record["num_cells"] == record["num_tiles"] == 0
    assert record.get("error") == error
    assert not storage.exists(run.cells_uri("s"))


def test_tissue_without_cells_is_empty(tmp_path):
    run, receipts = write_run(tmp_path, [0, 0], [[0, 1]])
    record = compaction.finish_slide(run, "s", receipts)
    assert (record["status"], record["tables"]) == ("empty", [])
    # A partial slide whose good tiles hold no cells has no tables either.
    run, receipts = write_run(tmp_path, [0, 0], [[0, 1]], failed=[1])
    record = compaction.finish_slide(run, "s", receipts)
    assert (record["status"], record["tables"]) == ("partial", [])


def test_what_no_receipt_names_is_never_read(tmp_path):
    run, receipts = write_run(tmp_path, [3, 4], [[0, 1]])
    orphan = run.shard_uri("orphan.parquet")
    storage.publish_table(orphan, tile_cells(7, 5))
    assert compaction.finish_slide(run, "s", receipts)["num_cells"] == len(expected_cells([3, 4]))
    assert len(storage.read_table(run.cells_uri("s"))) == len(expected_cells([3, 4]))


def test_a_shard_of_several_small_slides_is_read_once(tmp_path, monkeypatch):
    run = RunFolder(str(tmp_path), "d1g")
    tables = {name: tile_cells(tile, 6) for tile, name in enumerate("abc")}
    column = next(iter(tables.values())).schema.get_field_index("slide_id")
    mixed = [t.set_column(column, "slide_id", pa.array([s] * 6)) for s, t in tables.items()]
    storage.publish_table(run.shard_uri("x.parquet"), pa.concat_tables(mixed))
    asked = []
    read = storage.read_small_table
    monkeypatch.setattr(storage, "read_small_table", lambda *a: asked.append(a) or read(*a))
    shards = Shards(run)
    for number, (name, table) in enumerate(tables.items()):
        row = receipt(number, 1, 6, "x.parquet", 6 * number) | {"slide_id": name}
        receipts = pa.Table.from_pylist([row], schema=schemas.RECEIPTS)
        assert compaction.finish_slide(run, name, receipts, shards)["status"] == "done"
        found = storage.read_table(run.cells_uri(name))
        assert set(found["slide_id"].to_pylist()) == {name}
        assert set(found["cell_id"].to_pylist()) <= set(table["cell_id"].to_pylist())
        assert storage.read_table(run.expression_uri(name)).num_rows == len(found) > 0
    assert asked == [(run.shard_uri("x.parquet"), compaction.ROW_GROUP)]
    # The tables in memory are bounded: the oldest one goes.
    monkeypatch.setattr(shards_module, "KEPT_BYTES", 1)
    shards.read("x.parquet", ["cell_id"], keep=True)
    storage.publish_table(run.shard_uri("y.parquet"), mixed[0])
    shards.read("y.parquet", ["cell_id"], keep=True)
    assert shards.kept == {}


def test_geoparquet_opens_in_geopandas_without_a_crs(tmp_path):
    geopandas = pytest.importorskip("geopandas")
    run, receipts = write_run(tmp_path, [3, 2], [[0, 1]])
    compaction.finish_slide(run, "s", receipts)
    frame = geopandas.read_parquet(run.cells_uri("s"))
    assert frame.crs is None
    assert frame.geometry.name == "polygon"
    assert frame.geometry.is_valid.all()
    centre = frame.geometry.centroid
    np.testing.assert_allclose(centre.x, frame["x0"], atol=1e-3)
    np.testing.assert_allclose(centre.y, frame["y0"], atol=1e-3)
    geo = storage.read_schema(run.cells_uri("s")).metadata[b"geo"]
    assert b'"crs": null' in geo
