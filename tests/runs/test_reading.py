"""Runs of the real writers (compaction, save_head) are read and compared with torch."""

import hashlib
import subprocess
import sys
import tracemalloc
from pathlib import Path

import fsspec
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shapely
import torch

import scellst_ray
from scellst_ray import storage
from scellst_ray.core import schemas
from scellst_ray.models.mil import stored_head
from scellst_ray.models.mil.head import MilHead, formula_of, head_to_bytes, save_head
from scellst_ray.runs import compaction
from scellst_ray.runs.documents import publish_document
from scellst_ray.runs.folder import begin_run
from scellst_ray.runs.reading import open_run
from tests.support.mil_heads import spread_from_hidden
from tests.support.run_folders import Settings

GENES = ["EPCAM", "CD3E", "ERBB2", "COL1A1", "KRT8"]
TILE = 1 << 20


def vectors(values):
    flat = pa.array(values.reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, values.shape[1])


def shard_table(slide_id, tile_ids, cells_per_tile, rng, *, embedding, hidden):
    ids = np.concatenate([t * TILE + np.arange(cells_per_tile) for t in tile_ids])
    xy = rng.uniform(0, 1000, (len(ids), 2)).astype(np.float32)
    columns = {
        "slide_id": pa.repeat(slide_id, len(ids)),
        "cell_id": pa.array(ids),
        "x0": xy[:, 0],
        "y0": xy[:, 1],
        "area_um2": rng.uniform(20, 90, len(ids)).astype(np.float32),
        "nucleus_type": rng.choice(["epithelial", "immune"], len(ids)).tolist(),
        "type_prob": pa.nulls(len(ids), pa.float32()),
        "polygon": shapely.to_wkb(shapely.box(*xy.T, *(xy.T + 5))).tolist(),
        "seam": np.zeros(len(ids), np.uint8),
    }
    if embedding:
        columns["embedding"] = vectors(rng.normal(size=(len(ids), 2048)).astype(np.float16))
    if hidden:
        factor = rng.uniform(0, 3, (len(ids), 256 * hidden)).astype(np.float16)
        columns["hidden"] = vectors(factor)
    return pa.table(columns)


def receipts(slide_id, tiles):
    rows = [
        {"slide_id": slide_id, "num_tiles": max(0, len(tiles)), "num_cells": 0, "mpp": 0.5}
        | {"read_mpp": 0.5, "width0": 1000, "height0": 800, "seconds_read": 0.25}
        | tile
        for tile in tiles
    ]
    columns = {f.name: pa.array([r.get(f.name) for r in rows], f.type) for f in schemas.RECEIPTS}
    return pa.table(columns, schema=schemas.RECEIPTS)


def add_slide(folder, slide_id, num_tiles=6, cells_per_tile=5, bad=(), **vectors_kept):
    """Write a slide's shards, two tiles each, and finish it; return its whole table."""
    rng = np.random.default_rng(len(slide_id))
    failure = {"stage": "read", "error_type": "OpenSlideError", "error": "cut off"}
    tiles = [{"tile_id": t} | failure for t in bad]
    parts = []
    good = [t for t in range(num_tiles) if t not in bad]
    for start in range(0, len(good), 2):
        ids = good[start : start + 2]
        table = shard_table(slide_id, ids, cells_per_tile, rng, **vectors_kept)
        storage.publish_table(folder.shard_uri(f"{slide_id}-{start}.parquet"), table)
        for row, tile in enumerate(ids):
            place = {"shard": f"{slide_id}-{start}.parquet", "shard_row": row * cells_per_tile}
            tiles.append({"tile_id": tile, "num_cells": cells_per_tile} | place)
        parts.append(table)
    compaction.finish_slide(folder, slide_id, receipts(slide_id, tiles))
    return pa.concat_tables(parts) if parts else None


def make_run(uri, head=None, *, embedding=False):
    identity = {"store_embeddings": embedding}
    folder = begin_run(uri, "predict" if head else "extract", Settings(identity), {})
    if head is not None:
        info = {"genes": GENES, "scaling": {}, "embedding_dim": 8, "encoder_digest": "e"}
        save_head(f"{uri}/head.safetensors", head, info | {"training_slides": [], "metrics": {}})
    return folder


@pytest.fixture
def head():
    torch.manual_seed(0)
    return MilHead(8, len(GENES))


@pytest.fixture(params=["{tmp}/run", "memory://reading/run"])
def predicted(request, tmp_path, monkeypatch, head):
    """A run with several row groups a slide, local and on a remote filesystem."""
    monkeypatch.setattr(compaction, "ROW_GROUP", 7)
    uri = request.param.format(tmp=tmp_path)
    folder = make_run(uri, head)
    table = add_slide(folder, "a", embedding=False, hidden=True)
    yield uri, table
    fs, path = fsspec.core.url_to_fs(uri)
    fs.rm(path, recursive=True)


def torch_expression(head, table, genes):
    hidden = np.stack(table["hidden"].to_numpy())
    with torch.no_grad():
        values = head.from_hidden(torch.from_numpy(hidden)).numpy()
    return values[:, [GENES.index(gene) for gene in genes]]


def test_expression_equals_torch_for_any_genes_and_cells(predicted, head):
    uri, table = predicted
    run = open_run(uri)
    assert run.genes == GENES
    whole = torch_expression(head, table, GENES)
    np.testing.assert_allclose(run.expression_numpy(None, "a"), whole, rtol=1e-5)
    genes = ["KRT8", "EPCAM"]
    ids = table["cell_id"].to_numpy()
    some = np.random.default_rng(1).permutation(len(ids))[:11]
    some = np.append(some, some[3])  # one is repeated, in random order
    found = run.expression(genes, "a", ids[some])
    assert found.columns == ["slide_id", "cell_id", *genes]
    assert set(found.schema.values()) == {pl.String, pl.Int64, pl.Float32}
    assert found["cell_id"].to_list() == ids[some].tolist()
    expected = torch_expression(head, table, genes)[some]
    np.testing.assert_allclose(found.select(genes).to_numpy(), expected, rtol=1e-5)
    one = run.expression_numpy("KRT8", "a", ids[some])
    np.testing.assert_allclose(one, expected[:, :1], rtol=1e-5)
    assert run.expression(genes, "a", []).shape == (0, 4)


def test_an_ensemble_has_a_mean_and_a_deviation_for_every_cell(tmp_path):
    torch.manual_seed(0)
    head = MilHead(8, len(GENES), formula=formula_of("published", "nb", ensemble=3))
    folder = make_run(str(tmp_path / "run"), head)
    table = add_slide(folder, "a", embedding=False, hidden=3)
    run = open_run(folder.uri)
    hidden = torch.from_numpy(np.stack(table["hidden"].to_numpy()))
    assert hidden.shape[1] == 768
    with torch.no_grad():
        spread = spread_from_hidden(head, hidden).numpy()
    whole = torch_expression(head, table, GENES)
    np.testing.assert_allclose(run.expression_numpy(None, "a"), whole, rtol=1e-5)
    ids = table["cell_id"].to_numpy()[[7, 2]]
    found = run.expression_numpy(["KRT8", "EPCAM"], "a", ids, "sd")
    np.testing.assert_allclose(found, spread[[7, 2]][:, [4, 0]], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("change", ["another head", "a flipped bit", "cut off"])
def test_a_head_that_is_not_the_runs_is_refused(tmp_path, head, change):
    info = {"genes": GENES, "scaling": {}, "embedding_dim": 8, "encoder_digest": "e"}
    right = head_to_bytes(head, info | {"training_slides": [], "metrics": {}})
    uri = str(tmp_path / "run")
    folder = begin_run(uri, "predict", Settings(head=hashlib.sha256(right).hexdigest()), {})
    path = tmp_path / "run/head.safetensors"
    path.write_bytes(right)
    add_slide(folder, "a", embedding=False, hidden=True)
    assert open_run(uri).expression_numpy(None, "a").shape == (30, len(GENES))
    other = head_to_bytes(MilHead(8, len(GENES)), info | {"training_slides": [], "metrics": {}})
    flipped = bytearray(right)
    flipped[-1] ^= 0x40
    path.write_bytes(
        {"another head": other, "a flipped bit": bytes(flipped), "cut off": right[:-4]}[change]
    )
    run = open_run(uri)
    for ask in (
        lambda: run.genes,
        lambda: run.expression(GENES[:1], "a"),
        lambda: list(run.iter_expression(None, "a")),
    ):
        with pytest.raises(ValueError, match=r"head\.safetensors: it is not the head of this run"):
            ask()
    path.unlink()
    assert run.has_expression
    with pytest.raises(ValueError, match=r"head\.safetensors: the run's head is missing: put it"):
        run.choose_genes()
    path.write_bytes(right)
    assert run.genes == GENES


def test_one_network_has_no_deviation(predicted):
    with pytest.raises(ValueError, match="this head is one network: for a deviation train"):
        open_run(predicted[0]).expression_numpy(None, "a", None, "sd")


def test_expression_in_blocks(predicted, head, monkeypatch):
    uri, table = predicted
    monkeypatch.setattr(stored_head, "BLOCK_VALUES", 3 * len(GENES))
    blocks = list(open_run(uri).iter_expression(None, "a"))
    sizes = [len(values) for _, values in blocks]
    assert sizes == [3, 3, 1] * 4 + [2]  # 30 cells in row groups of 7
    ids = pa.concat_tables([ids for ids, _ in blocks])
    assert ids.equals(table.select(["slide_id", "cell_id"]).cast(ids.schema))
    values = np.concatenate([values for _, values in blocks])
    np.testing.assert_allclose(values, torch_expression(head, table, GENES), rtol=1e-5)


def test_only_the_row_groups_needed_are_read(predicted, monkeypatch):
    uri, table = predicted
    read, original = [], pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile,
        "read_row_group",
        lambda self, group, **kwargs: read.append(group) or original(self, group, **kwargs),
    )
    ids = table["cell_id"].to_numpy()
    open_run(uri).expression_numpy(None, "a", ids[[0, 1, 22]])
    assert read == [0, 3]


def test_memory_is_bounded_by_a_block(tmp_path, head, monkeypatch):
    monkeypatch.setattr(compaction, "ROW_GROUP", 500)
    monkeypatch.setattr(stored_head, "BLOCK_VALUES", 500 * len(GENES))
    folder = make_run(str(tmp_path / "run"), head)
    add_slide(folder, "a", num_tiles=20, cells_per_tile=800, embedding=False, hidden=True)
    run = open_run(folder.uri)
    whole = 16_000 * 256 * 2
    next(run.iter_expression(None, "a"))  # imports and caches
    start = pa.total_allocated_bytes()
    tracemalloc.start()
    peak = 0
    for _, values in run.iter_expression(None, "a"):
        peak = max(peak, pa.total_allocated_bytes() - start)
        assert values.shape == (500, len(GENES))
    _, numpy_peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak + numpy_peak < whole / 4


def test_unknown_names_are_refused_with_hints(predicted):
    run = open_run(predicted[0])
    with pytest.raises(ValueError, match=r"1 of 2 not found, such as 'EPCAN'; .* 'EPCAM'\?"):
        run.expression(["EPCAN", "CD3E"], "a")
    with pytest.raises(ValueError, match=r"\['CD3E'\] named more than once"):
        run.expression(["CD3E", "CD3E"], "a")
    with pytest.raises(ValueError, match=r"slides with a record: .*'slide_a'"):
        run.cells("slide_a")
    with pytest.raises(ValueError, match=r"'area_um'; did you mean 'area_um2'"):
        run.cells("a", ["area_um"])
    with pytest.raises(ValueError, match=r"has no cell_id \[7, 8, 9, 10, 11\] \(6 unknown\)"):
        run.expression(None, "a", [0, *range(7, 13)])


def test_cells_and_embeddings(tmp_path):
    folder = make_run(str(tmp_path / "run"), embedding=True)
    tables = {s: add_slide(folder, s, embedding=True, hidden=False) for s in ("b", "aa")}
    # A file that a crash left without a record is no slide.
    storage.publish_table(folder.cells_uri("stray"), tables["b"])
    run = scellst_ray.open_run(tmp_path / "run")
    assert run.slides["slide_id"].to_list() == ["aa", "b"]
    row = run.slides.row(0, named=True)
    assert (row["status"], row["num_cells"], row["num_tiles"]) == ("done", 30, 6)
    assert (row["mpp"], row["width0"], row["height0"]) == (0.5, 1000, 800)
    assert (row["seconds_read"], row["seconds_embed"], row["error"]) == (1.5, 0, None)
    for slide_id, table in tables.items():
        cells = run.cells(slide_id)
        assert cells.to_pydict() == table.select(cells.column_names).to_pydict()
        expected = np.stack(table["embedding"].to_numpy())
        np.testing.assert_array_equal(run.embeddings(slide_id), expected)
        assert run.embeddings(slide_id).dtype == np.float16
    assert run.cells("b", ["y0", "cell_id"]).column_names == ["y0", "cell_id"]
    frame = run.cells_frame()
    assert "embedding" not in frame.columns
    assert frame["slide_id"].to_list() == ["aa"] * 30 + ["b"] * 30
    assert run.cells_frame(["b"], ["x0"])["x0"].to_list() == tables["b"]["x0"].to_pylist()
    with pytest.raises(ValueError, match="this run has no expression: run predict"):
        run.expression(["EPCAM"], "b")
    with pytest.raises(ValueError, match="'stray'"):
        run.cells("stray")


def test_empty_partial_and_failed_slides(tmp_path, head):
    folder = make_run(str(tmp_path / "run"), head)
    compaction.finish_slide(folder, "blank", receipts("blank", [{"tile_id": -1, "num_tiles": 0}]))
    add_slide(folder, "part", bad=(1, 4), embedding=False, hidden=True)
    problem = {"stage": "plan", "error_type": "ValueError", "error": "no mpp"}
    gone = receipts("gone", [{"tile_id": -1, "num_tiles": 0} | problem])
    compaction.finish_slide(folder, "gone", gone)
    run = open_run(folder.uri)
    found = dict(run.slides.select("slide_id", "status").iter_rows())
    assert found == {"blank": "empty", "gone": "failed", "part": "partial"}
    assert run.slides.filter(slide_id="gone")["error"].to_list() == ["no mpp"]
    assert run.failures().select("slide_id", "tile_id", "stage").rows() == [
        ("gone", -1, "plan"),
        ("part", 1, "read"),
        ("part", 4, "read"),
    ]
    assert run.cells("blank").schema.equals(schemas.cells_schema(None))
    assert run.expression(["CD3E"], "blank").shape == (0, 3)
    assert run.expression(["CD3E"], "part").shape == (20, 3)
    assert run.cells_frame()["slide_id"].unique().to_list() == ["part"]
    for read in (run.cells, lambda slide: run.cells_frame([slide]), run.embeddings):
        with pytest.raises(
            ValueError, match=r"'gone' failed at plan with ValueError: no mpp|store"
        ):
            read("gone")
    with pytest.raises(ValueError, match="stores no embeddings"):
        run.embeddings("part")


def test_a_run_that_has_done_nothing_yet(tmp_path):
    make_run(str(tmp_path / "run"))
    run = open_run(tmp_path / "run")
    assert run.slides.is_empty()
    assert run.failures().is_empty()
    assert run.cells_frame().is_empty()
    assert run.sources == {}


def test_other_folders_versions_and_mixed_files_are_refused(tmp_path, head):
    with pytest.raises(FileNotFoundError, match=r"no run of scellst_ray \(it has no run\.json\)"):
        open_run(tmp_path)
    folder = make_run(str(tmp_path / "run"), head)
    table = add_slide(folder, "a", embedding=False, hidden=True)
    run = open_run(folder.uri)
    cells = pq.read_table(folder.cells_uri("a"))
    other = schemas.conform(cells, schemas.cells_schema(None), "CELLS", "another")
    storage.publish_table(folder.cells_uri("a"), other)
    with pytest.raises(ValueError, match="belongs to run another"):
        run.cells("a")
    storage.publish_table(folder.cells_uri("a"), table)
    with pytest.raises(ValueError, match="expected a scellst_ray CELLS table, found no signature"):
        run.cells("a")
    info = storage.read_json(f"{folder.uri}/run.json")
    publish_document(f"{folder.uri}/run.json", info | {"format_version": 99})
    with pytest.raises(ValueError, match=r"format version 99; .* Upgrade"):
        open_run(folder.uri)


def test_slides_say_how_far_they_are_from_the_training_slides(tmp_path, head):
    """Runs of an earlier release have no distances, and are read as before."""
    folder = make_run(str(tmp_path / "run"), head)
    for slide_id in ("old", "newer"):
        add_slide(folder, slide_id, embedding=False, hidden=True)
    expression = pq.read_table(folder.expression_uri("newer"))
    distance_N = np.full(len(expression), 2, np.float16)
    expression = expression.append_column(schemas.DISTANCE, pa.array(distance_N))
    storage.publish_table(folder.expression_uri("newer"), expression)
    record = storage.read_json(folder.record_uri("newer"))
    del record["checksum"], record["files"]  # the record of an earlier release
    shift = {"score": 2.0, "limit": 1.5, "beyond": True}
    storage.publish_json(folder.record_uri("newer"), record | {"domain_shift": shift})
    run = open_run(folder.uri)
    names = ["slide_id", "domain_shift_score", "domain_shift_beyond"]
    assert run.slides.select(names).rows() == [("newer", 2.0, True), ("old", None, None)]
    for slide_id in ("old", "newer"):
        assert run.expression(None, slide_id).shape == (30, len(GENES) + 2)


def test_reading_needs_neither_ray_nor_torch():
    code = (
        "import sys, scellst_ray; scellst_ray.open_run; "
        "sys.exit(bool({'ray', 'torch', 'anndata', 'cv2'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_cells_open_as_geoparquet(tmp_path):
    geopandas = pytest.importorskip("geopandas")
    folder = make_run(str(tmp_path / "run"), embedding=True)
    table = add_slide(folder, "a", embedding=True, hidden=False)
    frame = geopandas.read_parquet(folder.cells_uri("a"))
    assert frame.crs is None
    assert frame.geometry.name == "polygon"
    assert set(frame.geom_type) == {"Polygon"}
    np.testing.assert_allclose(frame.bounds["minx"], table["x0"].to_numpy())
    assert frame["embedding"].iloc[0].dtype == np.float16


def test_format_md_describes_every_stored_column():
    text = (Path(scellst_ray.__file__).parent / "FORMAT.md").read_text(encoding="utf-8")
    stored = [schemas.RECEIPTS, schemas.FAILURES, schemas.cells_schema(2048)]
    stored += [schemas.expression_schema(with_distance=True), schemas.bags_schema(2048)]
    names = {name for schema in stored for name in schema.names if "seconds_" not in name}
    assert {name for name in names if f"`{name}`" not in text} == set()
