"""The distributed pass equals a plain loop over its functions, resumes, and survives bad slides."""

import functools
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from scellst_ray import open_run, storage
from scellst_ray.models.encoder.encoder import best_precision
from scellst_ray.pipelines.extract import extract
from scellst_ray.runs.compaction import finish_slide
from scellst_ray.runs.folder import RunFolder
from scellst_ray.runs.shards import publish_shard
from scellst_ray.slides.manifest import read_manifest
from scellst_ray.stages.config import ExtractConfig
from scellst_ray.stages.networks import Embed
from scellst_ray.stages.plan_slide import plan_slide
from scellst_ray.stages.tiles import CellsSpec
from scellst_ray.stages.write import WriteShards

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]
TILES = {
    "core_px": 96,
    "halo_px": 32,
    "encoder": "random:0:resnet18",
    "memory_gb": 0.5,
    "precision": "float32",
}


def spec_of(config):
    assert config.precision != "auto"
    return CellsSpec(
        segmenter=config.segmenter,
        read_mpp=None,
        core_px=config.core_px,
        halo_px=config.halo_px,
        encoder=config.encoder,
        precision=config.precision,
        head_uri=None,
        store_embeddings=True,
    )


def plain_loop(config, folder, helpers):
    """Return the CELLS of each slide from a plain loop over tiles, one at a time."""
    spec, run = spec_of(config), RunFolder(str(folder), "plain")
    segment, embed, write = helpers.find_stage(spec), Embed(spec, "cpu"), WriteShards(run)
    for slide in read_manifest(config.manifest):
        tiles = plan_slide(helpers.slide_row(slide.uri, slide_id=slide.slide_id), spec)
        receipts = [write(embed(segment([tile]))) for tile in tiles]
        finish_slide(run, slide.slide_id, pa.concat_tables(receipts))
    return {name: pq.read_table(run.cells_uri(name)) for name in ("s0", "s1")}


@pytest.fixture(scope="module")
def plain_with(small_cohort, tmp_path_factory, helpers):
    """Return a function from an encoder to the CELLS of each slide by a plain loop in float32."""

    @functools.cache
    def run_loop(encoder):
        settings = TILES | {"encoder": encoder}
        config = ExtractConfig(manifest=str(small_cohort), out="unused", **settings)
        return plain_loop(config, tmp_path_factory.mktemp("plain"), helpers)

    return run_loop


@pytest.fixture(scope="module")
def plain(plain_with):
    return plain_with(TILES["encoder"])


def cells_of(out, slide_id):
    return pq.read_table(RunFolder(str(out), "").cells_uri(slide_id))


def assert_same(found, expected):
    assert found.schema.equals(expected.schema)
    assert found.equals(expected)
    assert len(found) > 20


@pytest.mark.parametrize(
    "resources",
    [
        pytest.param(
            {"tiles_per_task": 1000, "workers": 1, "encoder": "random:0"}, id="one block, ResNet-50"
        ),
        pytest.param({"tiles_per_task": 1, "workers": 2}, id="a block per tile"),
        pytest.param({"tiles_per_task": 3, "gpus": True}, id="split over cpu and gpu actors"),
    ],
)
def test_pipeline_equals_plain_loop(small_cohort, plain_with, tmp_path, resources):
    settings = TILES | {"gpus": False} | resources
    config = ExtractConfig(manifest=str(small_cohort), out=str(tmp_path), **settings)
    records = extract(config)
    assert {record["status"] for record in records.values()} == {"done"}
    for slide_id, expected in plain_with(config.encoder).items():
        assert_same(cells_of(tmp_path, slide_id), expected)
        assert records[slide_id]["num_cells"] == len(expected)
        # In a queue at least once; for two slides of a dozen tiles, for no hour.
        assert 0 < records[slide_id]["waited_s"] < 3600 * records[slide_id]["num_tiles"]
    assert storage.list_files(str(tmp_path / "shards")) == []


@pytest.mark.skipif(best_precision("cpu") != "bfloat16", reason="no native bfloat16")
def test_pipeline_equals_plain_loop_in_bfloat16(small_cohort, plain, tmp_path, helpers):
    settings = TILES | {"precision": "bfloat16", "gpus": False}
    config = ExtractConfig(manifest=str(small_cohort), out=str(tmp_path / "run"), **settings)
    expected = plain_loop(config, tmp_path / "plain", helpers)
    assert {record["status"] for record in extract(config).values()} == {"done"}
    for slide_id, cells in expected.items():
        assert_same(cells_of(config.out, slide_id), cells)
        assert not cells.equals(plain[slide_id])


def test_rerun_does_nothing_and_resume_does_only_what_is_missing(
    small_cohort, plain, tmp_path, helpers
):
    config = ExtractConfig(
        manifest=str(small_cohort), out=str(tmp_path), gpus=False, tiles_per_task=2, **TILES
    )
    extract(config)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.parquet")}
    extract(config)
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.parquet")}
    assert before == after
    # As if the driver had died before s1 was finished and its last receipts were logged.
    run = open_run(tmp_path).folder
    how = {"spec": spec_of(config), "manifest": small_cohort, "helpers": helpers}
    kept = replay_receipts(run, "s1", share=0.5, **how)
    extract(config)
    for slide_id, expected in plain.items():
        assert_same(cells_of(tmp_path, slide_id), expected)
    tiles = run.receipts().to_pylist()
    assert len({tile["tile_id"] for tile in tiles if tile["slide_id"] == "s1"}) > len(kept)
    still_named = {tile["shard"] for tile in tiles if tile["tile_id"] in kept}
    assert kept
    assert any(name and name.startswith("kept-") for name in still_named)
    # As if all tiles were logged, and a disk had damaged their shard since.
    replay_receipts(run, "s1", share=1.0, **how)
    (shard,) = (tmp_path / "shards").glob("kept-*")
    shard.write_bytes(shard.read_bytes()[:-100])
    assert extract(config)["s1"]["status"] == "done"
    assert_same(cells_of(tmp_path, "s1"), plain["s1"])
    # A driver that died after the last record left no summary.
    (tmp_path / "summary.json").unlink()
    extract(config)
    assert json.loads((tmp_path / "summary.json").read_text())["slides"]["done"] == 2


def replay_receipts(run, slide_id, share, spec, manifest, helpers):
    """Undo the finishing of a slide: keep the shards and receipts of some of its tiles."""
    storage.remove_tree(run.record_uri(slide_id))
    storage.remove_tree(run.cells_uri(slide_id))
    storage.remove_tree(storage.join(run.uri, "receipts"))
    slide = next(s for s in read_manifest(str(manifest)) if s.slide_id == slide_id)
    tiles = plan_slide(helpers.slide_row(slide.uri, slide_id=slide_id), spec)
    tiles = tiles[: int(len(tiles) * share)]
    receipts = WriteShards(run)(Embed(spec, "cpu")(helpers.find_stage(spec)(tiles)))
    names = {name: f"kept-{name}" for name in receipts["shard"].unique().to_pylist() if name}
    for old, new in names.items():
        publish_shard(run, new, storage.read_table(run.shard_uri(old)))
        storage.remove_tree(run.shard_uri(old))
    shards = pa.array([names.get(name) for name in receipts["shard"].to_pylist()], pa.string())
    index = receipts.schema.get_field_index("shard")
    run.log_receipts(receipts.set_column(index, receipts.schema.field("shard"), shards))
    return set(receipts["tile_id"].to_pylist())


def test_cohort_of_five(small_cohort, plain, tmp_path):
    good = small_cohort.parent / "s0" / "slide.tiff"
    content = good.read_bytes()
    (tmp_path / "cut.tiff").write_bytes(content[: len(content) // 3])
    Image.fromarray(np.full((300, 200, 3), 90, np.uint8)).save(tmp_path / "no_mpp.png")
    Image.fromarray(np.full((300, 400, 3), 244, np.uint8)).save(tmp_path / "blank.png")
    manifest = tmp_path / "manifest.csv"
    manifest.write_text(
        f"slide_id,uri,mpp\ngood0,{good},\ncut,cut.tiff,\nno_mpp,no_mpp.png,\n"
        f"blank,blank.png,0.5\ngood1,{good.parents[1]}/s1/slide.tiff,\n"
    )
    config = ExtractConfig(manifest=str(manifest), out=str(tmp_path / "run"), gpus=False, **TILES)
    records = extract(config)
    statuses = {name: record["status"] for name, record in records.items()}
    assert statuses == {
        "good0": "done",
        "cut": "failed",
        "no_mpp": "failed",
        "blank": "empty",
        "good1": "done",
    }
    for number in range(2):
        found = cells_of(tmp_path / "run", f"good{number}").drop_columns("slide_id")
        assert found.equals(plain[f"s{number}"].drop_columns("slide_id"))
    assert "resolution (mpp) is unknown" in records["no_mpp"]["error"]
    assert "cut.tiff" in records["cut"]["error"]
    failures = pq.read_table(tmp_path / "run" / "failures" / "no_mpp.parquet").to_pylist()
    assert failures[0]["stage"] == "plan"
    # The same command does the failed slide after its file is fixed, and touches nothing else.
    manifest.write_text(manifest.read_text().replace("no_mpp.png,", "no_mpp.png,0.5"))
    stamp = (tmp_path / "run" / "cells" / "good0.parquet").stat().st_mtime_ns
    assert extract(config)["no_mpp"]["status"] in {"done", "empty"}
    assert (tmp_path / "run" / "cells" / "good0.parquet").stat().st_mtime_ns == stamp


def test_another_run_in_the_folder_is_refused(small_cohort, tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"digest": "other", "identity": {"job": "x"}}))
    config = ExtractConfig(manifest=str(small_cohort), out=str(tmp_path), **TILES)
    with pytest.raises(ValueError, match="holds another run"):
        extract(config)


@pytest.mark.parametrize(
    ("field", "value"), [("core_px", 10), ("tiles_per_task", 0), ("read_mpp", 0.0)]
)
def test_config_refuses_what_cannot_work(field, value):
    with pytest.raises(ValueError, match=field):
        ExtractConfig(manifest="m.csv", out="o", **{field: value})
