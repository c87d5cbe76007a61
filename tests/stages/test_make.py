from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import shapely
import torch
from scipy.spatial import cKDTree

from scellst_ray import storage
from scellst_ray.core import schemas
from scellst_ray.models.encoder.weights_file import local_weights
from scellst_ray.models.mil.head import MilHead, save_head, stored_hidden
from scellst_ray.runs.compaction import finish_slide
from scellst_ray.runs.folder import RunFolder
from scellst_ray.slides.reader import Slide
from scellst_ray.stages.networks import Embed, vectors
from scellst_ray.stages.plan_slide import plan_slide
from scellst_ray.stages.tiles import guarded
from scellst_ray.stages.write import WriteShards

MPP = 0.5


@pytest.fixture(scope="module")
def finished(tmp_path_factory, segmented_rows, embed_stage):
    """Return run, receipts and record of the plain loop over the stages."""
    run = RunFolder(str(tmp_path_factory.mktemp("run")), "d1g")
    receipts = WriteShards(run)(embed_stage(segmented_rows()))
    return run, receipts, finish_slide(run, "s", receipts)


@pytest.fixture(scope="module")
def cells(finished):
    return storage.read_table(finished[0].cells_uri("s"))


def points(table):
    return np.stack([table["x0"].to_numpy(), table["y0"].to_numpy()], axis=1)


def test_the_loop_gives_one_receipt_per_tile(segmented_rows, finished, cells):
    _, receipts, record = finished
    assert receipts.schema.equals(schemas.RECEIPTS)
    assert record["status"] == "done"
    assert record["num_tiles"] == len(receipts) == len(segmented_rows()) > 4
    # Tiles offer what lies a little outside their core; each nucleus is kept once.
    offered = sum(len(row["cells"]) for row in segmented_rows())
    assert 0.8 * offered < record["num_cells"] == len(cells) < offered
    assert record["mpp"] == pytest.approx(MPP)
    assert record["read_mpp"] == pytest.approx(MPP)
    assert (record["width0"], record["height0"]) == (720, 520)
    assert all(record["seconds"][stage] > 0 for stage in schemas.STAGES if stage != "network")
    assert set(record["seconds"]) == set(schemas.STAGES)


def test_cells_lie_where_the_truth_has_nuclei(synthetic_slide, cells):
    truth = pq.read_table(synthetic_slide.truth)
    distance, _ = cKDTree(points(cells)).query(points(truth))
    assert (distance * MPP < 2.0).mean() > 0.7
    distance, _ = cKDTree(points(truth)).query(points(cells))
    assert (distance * MPP < 2.0).mean() > 0.7
    assert np.median(distance) * MPP < 0.6


def test_polygons_areas_and_centroids_agree(cells):
    polygons = shapely.from_wkb(cells["polygon"].to_pylist())
    assert shapely.is_valid(polygons).all()
    areas = shapely.area(polygons) * MPP**2
    # The outline of n pixels encloses n - 1/2 of them; holes are filled.
    np.testing.assert_allclose(areas, cells["area_um2"].to_numpy(), rtol=0.1, atol=0.5)
    centres = np.stack([shapely.get_x(c := shapely.centroid(polygons)), shapely.get_y(c)], axis=1)
    assert np.abs(centres - points(cells)).max() < 1.5


def test_ids_are_unique_ordered_and_name_their_tile(cells, finished):
    _, receipts, _ = finished
    ids = cells["cell_id"].to_numpy()
    assert (np.diff(ids) > 0).all()
    offered = {r["tile_id"]: r["num_cells"] for r in receipts.to_pylist() if r["num_cells"]}
    assert set((ids >> 20).tolist()) == set(offered)
    assert all(index < offered[tile] for tile, index in zip(ids >> 20, ids % 2**20, strict=True))


def test_no_nucleus_is_found_twice(cells):
    at = points(cells)
    assert len(cKDTree(at).query_pairs(1.5 / MPP)) == 0
    polygons = shapely.from_wkb(cells["polygon"].to_pylist())
    left, right = shapely.STRtree(polygons).query(polygons, predicate="intersects")
    left, right = left[left < right], right[left < right]
    shared = shapely.area(shapely.intersection(polygons[left], polygons[right]))
    least = np.minimum(shapely.area(polygons[left]), shapely.area(polygons[right]))
    assert (shared > 0.3 * least).sum() <= 0.01 * len(cells)


def test_tiles_equal_the_whole_slide_up_to_their_seams(synthetic_slide, cells, cells_spec, helpers):
    spec = replace(cells_spec, core_px=2000)
    (row,) = helpers.find_stage(spec)(plan_slide(helpers.slide_row(synthetic_slide.slide), spec))
    whole, tiled = points(row["cells"]), points(cells)
    near_whole, _ = cKDTree(whole).query(tiled)
    near_tiled, _ = cKDTree(tiled).query(whole)
    lost, extra = int((near_tiled * MPP > 2).sum()), int((near_whole * MPP > 2).sum())
    print(f"{len(whole)} whole, {len(tiled)} tiled, {lost} lost, {extra} extra")
    # The threshold of a tile and of the slide differ a little too.
    assert lost + extra <= 0.04 * len(whole)
    assert np.median(near_whole) * MPP < 0.2


def test_crops_show_the_nucleus_in_their_middle(segmented_rows):
    crops = np.concatenate([row["crops"] for row in segmented_rows()])
    assert crops.shape[1:] == (48, 48, 3)
    darkness = 255 - crops.astype(float).mean(axis=(0, 3))
    assert darkness[20:28, 20:28].mean() > 1.15 * darkness[:8].mean()
    assert darkness[20:28, 20:28].mean() > 1.15 * darkness[:, :8].mean()


def test_embeddings_are_those_of_the_tiles_crops(few_rows, embed_stage):
    row = min((r for r in few_rows() if len(r["crops"])), key=lambda r: len(r["crops"]))
    x_NCHW = torch.from_numpy(row["crops"]).permute(0, 3, 1, 2) / 255
    encoder = embed_stage.encoder
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (encoder.mean, encoder.std))
    with torch.no_grad():
        expected = encoder.network((x_NCHW - mean) / std).numpy()
    (out,) = embed_stage([row])
    assert "crops" not in out
    found = np.array(out["cells"]["embedding"].to_pylist())
    np.testing.assert_allclose(found, expected, rtol=5e-3, atol=5e-3)


def test_a_head_adds_its_hidden_layer(tmp_path, few_rows, cells_spec, embed_stage):
    torch.manual_seed(0)
    head = MilHead(embedding_dim=2048, num_genes=2)
    info = {
        "genes": ["A", "B"],
        "scaling": {},
        "embedding_dim": 2048,
        "encoder_digest": "random:0",
        "training_slides": [],
        "metrics": {},
    }
    save_head(str(tmp_path / "head"), head, info)
    spec = replace(cells_spec, head_uri=str(tmp_path / "head"), store_embeddings=False)
    some = [row for row in few_rows() if len(row["crops"])][:2]
    out = Embed(spec, "cpu")([dict(row) for row in some])
    with_embedding = embed_stage([dict(row) for row in some])
    for row, other in zip(out, with_embedding, strict=True):
        assert "embedding" not in row["cells"].column_names
        embedding = np.array(other["cells"]["embedding"].to_pylist(), np.float16)
        with torch.no_grad():
            expected = stored_hidden(head.hidden(torch.from_numpy(embedding))).numpy()
        np.testing.assert_array_equal(row["cells"]["hidden"].to_pylist(), expected)
        # The head standardises by nothing yet.
        distance = np.sqrt((embedding.astype(float) ** 2).mean(axis=1))
        np.testing.assert_allclose(row["cells"]["distance"].to_numpy(), distance, rtol=1e-3)
        assert row["cells"].schema.field("distance").equals(schemas.DISTANCE)


def test_a_tile_that_cannot_be_read_costs_no_other(
    tmp_path, synthetic_slide, cells_spec, segmented_rows, embed_stage, monkeypatch, helpers
):
    rows = plan_slide(helpers.slide_row(synthetic_slide.slide), cells_spec)
    bad = rows[1]
    real = Slide.read

    def read(self, box, mpp):
        if (box.x0, box.y0) == (bad["read_x0"], bad["read_y0"]):
            error = OSError("bad sector")
            error.add_note("in test")
            raise error
        return real(self, box, mpp)

    monkeypatch.setattr(Slide, "read", read)
    run = RunFolder(str(tmp_path), "d1g")
    segmented = helpers.find_stage(cells_spec)(rows)
    assert segmented[1]["error_type"] == "OSError"
    # The others went on with a slide opened anew, and found what they find without the failure.
    for row, expected in zip(segmented, segmented_rows(), strict=True):
        if row is not segmented[1]:
            assert row["cells"].equals(expected["cells"])
    for row in segmented[:3:2]:
        row |= {"cells": row["cells"].slice(0, 6), "crops": row["crops"][:6]}
    receipts = WriteShards(run)(embed_stage(segmented[:3])).to_pylist()
    assert [r["error"] for r in receipts] == [None, "bad sector in test", None]
    assert (receipts[1]["stage"], receipts[1]["error_type"]) == ("read", "OSError")
    assert (receipts[1]["num_cells"], receipts[1]["shard"]) == (0, None)
    assert receipts[0]["num_cells"] == len(segmented[0]["cells"])


@pytest.mark.parametrize("stage", ["segment", "crop", "embed", "write"])
def test_a_failure_at_any_later_stage(
    tmp_path, synthetic_slide, cells_spec, embed_stage, monkeypatch, helpers, stage
):
    def fail(*_, **__):
        message = "broken"
        raise RuntimeError(message)

    broken = {
        "segment": "find.hematoxylin.segment",
        "crop": "find.crop_nuclei",
        "embed": "networks.embed_crops",
        "write": "write.storage.publish_table",
    }
    rows = plan_slide(helpers.slide_row(synthetic_slide.slide), cells_spec)[:2]
    run = RunFolder(str(tmp_path), "d1g")
    segment, write = helpers.find_stage(cells_spec), WriteShards(run)
    monkeypatch.setattr(f"scellst_ray.stages.{broken[stage]}", fail)
    receipts = write(embed_stage(segment(rows)))
    assert receipts["stage"].to_pylist() == [stage] * 2
    assert receipts["error"].to_pylist() == ["broken"] * 2
    assert receipts["num_cells"].to_pylist() == [0, 0]
    assert receipts["shard"].null_count == 2
    monkeypatch.undo()
    assert finish_slide(run, "s", receipts)["status"] == "failed"


def test_a_shard_that_could_not_be_written_spoils_no_other(
    tmp_path, few_rows, embed_stage, monkeypatch
):
    run = RunFolder(str(tmp_path), "d1g")
    rows = [row for row in embed_stage(few_rows()[3:7]) if len(row["cells"])]
    with monkeypatch.context() as patch:
        patch.setattr("scellst_ray.storage.publish_table", lambda *_: 1 / 0)
        first = WriteShards(run)(rows[:1])
    receipts = pa.concat_tables([first, WriteShards(run)(rows[1:])])
    record = finish_slide(run, "s", receipts)
    assert (record["status"], record["error_type"]) == ("partial", "ZeroDivisionError")
    assert record["num_cells"] == storage.read_table(run.cells_uri("s")).num_rows > 0


def test_write_makes_one_shard_of_a_task(tmp_path, few_rows, embed_stage):
    run = RunFolder(str(tmp_path), "d1g")
    rows = [row for row in embed_stage(few_rows()[:5]) if len(row["cells"])]
    for row in rows[::2]:
        row["slide_id"] = "other"
    receipts = WriteShards(run)(rows)
    assert len(storage.list_files(run.shards_uri)) == 1
    for row, receipt in zip(rows, receipts.to_pylist(), strict=True):
        shard = storage.read_table(run.shard_uri(receipt["shard"]))
        assert shard.slice(receipt["shard_row"], receipt["num_cells"]).equals(row["cells"])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"mpp_error": "slide 's' in the manifest: mpp 9"}, ("ValueError", "mpp 9")),
        ({"mpp": 7.0}, ("ValueError", "mpp 7 is outside")),
        ({"uri": "/no/such.tif"}, ("FileNotFoundError", "/no/such.tif: no such file")),
    ],
)
def test_a_slide_that_cannot_be_planned_is_one_row(
    tmp_path, synthetic_slide, cells_spec, embed_stage, helpers, changes, reason
):
    rows = plan_slide(helpers.slide_row(synthetic_slide.slide, **changes), cells_spec)
    run = RunFolder(str(tmp_path), "d1g")
    receipts = WriteShards(run)(embed_stage(helpers.find_stage(cells_spec)(rows)))
    (receipt,) = receipts.to_pylist()
    assert (receipt["tile_id"], receipt["num_tiles"], receipt["num_cells"]) == (-1, 0, 0)
    assert (receipt["stage"], receipt["error_type"]) == ("plan", reason[0])
    assert reason[1] in receipt["error"]
    assert receipt["seconds_plan"] >= 0
    record = finish_slide(run, "s", receipts)
    assert (record["status"], record["error"]) == ("failed", receipt["error"])


def test_a_blank_slide_is_empty_and_no_error(tmp_path, cells_spec, embed_stage, helpers):
    blank = np.full((400, 500, 3), 245, np.uint8)
    path = helpers.write_pyramid(tmp_path / "blank.tif", [blank], MPP)
    rows = plan_slide(helpers.slide_row(path), cells_spec)
    run = RunFolder(str(tmp_path / "run"), "d1g")
    receipts = WriteShards(run)(embed_stage(helpers.find_stage(cells_spec)(rows)))
    (receipt,) = receipts.to_pylist()
    assert (receipt["error"], receipt["num_tiles"], receipt["width0"]) == (None, 0, 500)
    assert finish_slide(run, "s", receipts)["status"] == "empty"


def test_tissue_without_nuclei_gives_tiles_without_cells(
    tmp_path, cells_spec, embed_stage, helpers
):
    pink = np.full((400, 500, 3), (225, 160, 205), np.uint8)
    path = helpers.write_pyramid(tmp_path / "pink.tif", [pink], MPP)
    rows = helpers.find_stage(cells_spec)(plan_slide(helpers.slide_row(path), cells_spec))
    assert [len(row["cells"]) for row in rows] == [0] * 4
    run = RunFolder(str(tmp_path / "run"), "d1g")
    receipts = WriteShards(run)(embed_stage(rows))
    assert receipts["error"].null_count == 4
    assert receipts["shard"].null_count == 4
    assert finish_slide(run, "s", receipts)["status"] == "empty"


def test_tiles_already_done_are_not_planned_again(synthetic_slide, cells_spec, helpers):
    every = plan_slide(helpers.slide_row(synthetic_slide.slide), cells_spec)
    done = [row["tile_id"] for row in every[::2]]
    row = helpers.slide_row(synthetic_slide.slide, done_tiles=done)
    rest = plan_slide(row, cells_spec)
    boxes = [name for name in schemas.TILES.names if name != "seconds_plan"]
    assert [{k: r.get(k) for k in boxes} for r in rest] == [
        {k: r.get(k) for k in boxes} for r in every[1::2]
    ]


@pytest.mark.parametrize("read_mpp", [0.25, 0.687])
def test_coordinates_do_not_depend_on_the_resolution_read(
    synthetic_slide, cells_spec, helpers, read_mpp
):
    spec = replace(cells_spec, read_mpp=read_mpp, core_px=round(125 / read_mpp))
    rows = helpers.find_stage(spec)(plan_slide(helpers.slide_row(synthetic_slide.slide), spec))
    found = np.concatenate([points(row["cells"]) for row in rows])
    truth = points(pq.read_table(synthetic_slide.truth))
    distance, nearest = cKDTree(truth).query(found)
    close = distance * MPP < 2
    assert close.mean() > 0.6
    # No shift on the average, over all of the slide.
    shift = (found - truth[nearest])[close] * MPP
    assert np.abs(shift.mean(axis=0)).max() < 0.15


def test_vectors_do_not_copy_and_may_be_empty():
    values = np.arange(12, dtype=np.float16).reshape(3, 4)
    column = vectors(values)
    assert column.type == schemas.vector("v", 4).type
    assert column.to_pylist() == values.tolist()
    assert column.values.buffers()[1].address == values.ctypes.data
    assert len(vectors(np.zeros((0, 4), np.float16))) == 0


def test_local_weights(tmp_path):
    (tmp_path / "w.pth").write_bytes(b"x")
    assert local_weights("imagenet") == "imagenet"
    assert local_weights("random:3") == "random:3"
    assert local_weights(f"file://{tmp_path}/w.pth") == str(tmp_path / "w.pth")
    with pytest.raises(FileNotFoundError, match="no such file"):
        local_weights(str(tmp_path / "gone.pth"))


def test_receipts_add_up(finished):
    _, receipts, record = finished
    assert pc.sum(receipts["num_cells"]).as_py() >= record["num_cells"]
    assert pc.count_distinct(receipts["tile_id"]).as_py() == len(receipts)


@pytest.mark.parametrize("kind", [MemoryError, np._core._exceptions._ArrayMemoryError])
def test_lack_of_memory_is_one_kind_of_error_and_says_what_to_do(kind):
    row = {"slide_id": "s", "tile_id": 3}
    with guarded(row, "read"):
        raise kind if kind is MemoryError else kind((9,), np.dtype("u1"))
    assert (row["stage"], row["error_type"]) == ("read", "MemoryError")
    assert "memory_gb" in row["error"]
