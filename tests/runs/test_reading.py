"""Runs of the real writers (compaction, save_head) are read and compared with torch."""

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import scellst_ray
from scellst_ray import storage
from scellst_ray.core import schemas
from scellst_ray.runs import compaction
from scellst_ray.runs.documents import publish_document
from scellst_ray.runs.folder import begin_run
from scellst_ray.runs.reading import open_run
from tests.support import written_runs
from tests.support.run_folders import Settings
from tests.support.written_runs import (
    GENES,
    add_slide,
    make_run,
    receipts,
)

head, predicted = written_runs.head, written_runs.predicted  # fixtures


@pytest.mark.parametrize("change", ["another head", "a flipped bit", "cut off"])
def test_a_head_that_is_not_the_runs_is_refused(tmp_path, head, change):
    from scellst_ray.models.mil.head import MilHead, head_to_bytes

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
        assert cells.column_names[-1] == "bbox"
        kept = cells.column_names[:-1]
        assert cells.select(kept).to_pydict() == table.select(kept).to_pydict()
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
    other = schemas.conform(cells, schemas.cells_schema(None, with_bbox=False), "CELLS", "another")
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
