"""What of the receipts log counts, when files have changed between two drivers."""

import os
from dataclasses import replace

import pyarrow as pa
import pytest

from scellst_ray import open_run, storage
from scellst_ray.core import schemas
from scellst_ray.pipelines.extract import OWN_WORK, run_cells
from scellst_ray.pipelines.receipts import WorkFunctions
from scellst_ray.pipelines.resume import pending_slide, read_logged_work
from scellst_ray.runs.compaction import finish_slide
from scellst_ray.runs.folder import RunFolder, begin_run
from scellst_ray.slides.manifest import SlideRow, read_manifest
from scellst_ray.slides.synthetic.slide import SyntheticConfig, write_synthetic_slide
from scellst_ray.stages.checked_networks import check_networks
from scellst_ray.stages.config import ExtractConfig
from scellst_ray.stages.plan_slide import plan_slide
from scellst_ray.stages.slide_source import present_source
from scellst_ray.stages.write import WriteShards
from tests.support.object_server import serving
from tests.support.run_folders import Settings


@pytest.fixture
def run(tmp_path):
    return begin_run(str(tmp_path / "run"), "extract", Settings())


def slide(tmp_path, name, content, **more):
    (tmp_path / name).write_bytes(content)
    return SlideRow(name, str(tmp_path / name), None, **more)


def log(run, slide_id, tiles, source):
    rows = [
        {"slide_id": slide_id, "tile_id": t, "num_tiles": 4, "num_cells": 0, "source": source}
        for t in tiles
    ]
    run.log_receipts(pa.Table.from_pylist(rows, schema=schemas.RECEIPTS))


def done(run, slides, spec, **more):
    settings = {"finished": (), "trusted": ()} | more
    work = read_logged_work(run, slides, spec, **settings)
    return {row["slide_id"]: sorted(row["done_tiles"]) for row in work.rows}, work


def test_receipts_of_the_file_that_is_there(run, cells_spec, tmp_path, caplog):
    slides = [slide(tmp_path, name, b"first") for name in ("same", "touched", "grown", "gone")]
    for row in slides:
        source = present_source(pending_slide(row, cells_spec, run), cells_spec)
        log(run, row.slide_id, [0, 1], source)
    os.utime(slides[1].uri, ns=(1, 1))
    slide(tmp_path, "grown", b"first and more")
    os.unlink(slides[3].uri)  # noqa: PTH108
    found, work = done(run, slides, cells_spec)
    assert found == {"same": [0, 1], "touched": [], "grown": [], "gone": []}
    assert work.rows[0]["source"] is not None
    assert [row["source"] for row in work.rows[1:]] == [None] * 3
    assert "3 slide(s) are done from the start" in caplog.text
    assert "touched, grown, gone" in caplog.text
    assert work.adopted == []
    # A manifest with another mpp, or other nuclei, is about another slide.
    other = [replace(slides[0], mpp=0.25)]
    assert done(run, other, cells_spec)[0] == {"same": []}


def test_a_log_of_two_files(run, cells_spec, tmp_path):
    row = slide(tmp_path, "a", b"first")
    first = present_source(pending_slide(row, cells_spec, run), cells_spec)
    log(run, "a", [0, 1, 2], first)
    row = slide(tmp_path, "a", b"second, which was mended once more")
    second = present_source(pending_slide(row, cells_spec, run), cells_spec)
    log(run, "a", [1], second)
    log(run, "a", [2], first)  # a late receipt of the file before hides nothing
    log(run, "a", [2], second)
    found, work = done(run, [row], cells_spec)
    assert found == {"a": [1, 2]}
    assert set(work.receipts["a"]["source"].to_pylist()) == {second}


def test_receipts_of_an_earlier_release(run, cells_spec, tmp_path):
    rows = [slide(tmp_path, name, b"x") for name in ("known", "changed")]
    for row in rows:
        log(run, row.slide_id, [0, 1], None)
    found, work = done(run, rows, cells_spec, trusted={"known"})
    assert found == {"known": [0, 1], "changed": []}
    (adopted,) = work.adopted
    assert adopted["source"].to_pylist() == [work.rows[0]["source"]] * 2
    # Once they have a source, a change of the file is noticed.
    run.log_receipts(adopted)
    rows[0] = slide(tmp_path, "known", b"y")
    assert done(run, rows, cells_spec, trusted={"known"})[0] == {"known": [], "changed": []}


def test_imported_nuclei_that_were_replaced(run, cells_spec, tmp_path):
    spec = replace(cells_spec, segmenter="imported")
    nuclei = tmp_path / "n.geojson"
    nuclei.write_text("[]")
    row = slide(tmp_path, "a", b"x", columns={"segmentation": str(nuclei)})
    pending = pending_slide(row, spec, run)
    assert pending["imported_uri"] == run.imported_uri("a")
    log(run, "a", [0], present_source(pending, spec))
    assert done(run, [row], spec)[0] == {"a": [0]}
    nuclei.write_text("{}")
    assert done(run, [row], spec)[0] == {"a": []}
    assert pending_slide(row, cells_spec, run)["segmentation"] is None


def places(cells):
    return [cells[name].to_pylist() for name in ("cell_id", "x0", "y0")]


def failing_work():
    """Return the functions of a run in which every second tile fails, except those of slide F."""

    def make(name, spec, run, *, on_gpu):
        from scellst_ray.stages.make import make_stage

        stage = make_stage(name, spec, run, on_gpu=on_gpu)
        if name != "find":
            return stage

        def find(rows):
            for row in rows:
                if row["tile_id"] % 2 and row["slide_id"] != "F":
                    row |= {"stage": "find", "error_type": "OSError", "error": "bad sector"}
            return stage(rows)

        return find

    return WorkFunctions(plan_slide, make)


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_no_table_holds_cells_of_two_files(tmp_path, synthetic_slide, cells_spec, helpers):
    config = SyntheticConfig(seed=4, width_um=360.0, height_um=260.0, mpp=0.5, num_genes=4)
    other = write_synthetic_slide(tmp_path / "other", config).slide.read_bytes()
    first = synthetic_slide.slide.read_bytes()
    size = max(len(first), len(other))  # bytes behind the end of a TIFF mean nothing
    first, other = (content + bytes(size - len(content)) for content in (first, other))
    local, finished = tmp_path / "p.tiff", tmp_path / "f.tiff"
    local.write_bytes(first)
    finished.write_bytes(first)
    with serving({"o.tiff": first}) as (address, objects):
        manifest = tmp_path / "m.csv"
        manifest.write_text(f"slide_id,uri\nP,p.tiff\nO,{address}/o.tiff\nF,f.tiff\n")

        def go(work):
            settings = {"encoder": "none", "workers": 2, "core_px": 250, "gpus": False}
            files = {"manifest": str(manifest), "out": str(tmp_path / "run")}
            config = ExtractConfig(**files, **settings, precision="float32")
            slides, networks = read_manifest(config.manifest), check_networks(config)
            found = run_cells("extract", config, slides, networks, lambda _: None, work=work)
            return {slide_id: record["status"] for slide_id, record in found.items()}

        assert go(failing_work()) == {"P": "partial", "O": "partial", "F": "done"}
        before = places(open_run(tmp_path / "run").cells("F"))
        local.write_bytes(other)
        objects.files["/o.tiff"] = other
        finished.unlink()
        assert go(OWN_WORK) == dict.fromkeys("POF", "done")
    run = open_run(tmp_path / "run")
    plain = RunFolder(str(tmp_path / "plain"), "d1g")
    rows = helpers.find_stage(cells_spec)(plan_slide(helpers.slide_row(local), cells_spec))
    finish_slide(plain, "s", WriteShards(plain)(rows))
    expected = places(storage.read_table(plain.cells_uri("s")))
    assert expected == places(run.cells("P")) == places(run.cells("O"))
    assert places(run.cells("F")) == before != expected
