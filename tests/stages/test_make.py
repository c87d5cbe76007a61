from dataclasses import replace

import numpy as np
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
from scellst_ray.stages.networks import Embed, vectors
from scellst_ray.stages.plan_slide import plan_slide
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
        "write": "write.publish_shard",
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
