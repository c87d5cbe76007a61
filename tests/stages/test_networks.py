"""The stages that run a segmenting network: batches, faults of single tiles, tokens."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from scellst_ray import storage
from scellst_ray.core import schemas
from scellst_ray.models.encoder.encoder import load_encoder
from scellst_ray.models.mil.head import MilHead, save_head
from scellst_ray.pipelines.packing import pack, unpack
from scellst_ray.runs.compaction import finish_slide
from scellst_ray.runs.folder import RunFolder
from scellst_ray.stages import networks
from scellst_ray.stages.find import FindNuclei
from scellst_ray.stages.make import stage_groups
from scellst_ray.stages.networks import Embed, Network
from scellst_ray.stages.plan_slide import plan_slide
from scellst_ray.stages.read import Read
from scellst_ray.stages.write import WriteShards
from tests.support import cellvit_weights

SIDE = 64


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Return a CellViT-256 with deterministic weights: it finds noise, but always the same."""
    return cellvit_weights.write_checkpoint(tmp_path_factory.mktemp("weights") / "cellvit.pth")


@pytest.fixture(scope="module")
def network_spec(cells_spec, checkpoint):
    """Return what to compute: tiles of 64 px at 0.5 um/px are enough for a network of noise."""
    return replace(
        cells_spec,
        segmenter="cellvit",
        read_mpp=0.25,
        core_px=SIDE - 16,
        halo_px=8,
        encoder="tokens",
        type_names=cellvit_weights.PANNUKE,
        weights=str(checkpoint),
    )


@pytest.fixture(scope="module")
def network(network_spec):
    """Return the stage, made once."""
    return Network(network_spec, "cpu")


@pytest.fixture(scope="module")
def read_rows(network_spec, synthetic_slide, helpers):
    """Return a function that gives fresh rows of a few tiles with their pixels."""
    rows = plan_slide(helpers.slide_row(synthetic_slide.slide), network_spec)[40:43]
    rows = Read(network_spec)(rows)
    assert all(max(row["image"].shape[:2]) <= SIDE for row in rows)
    return lambda: [dict(row) for row in rows]


def test_maps_and_tokens_come_in_one_size(network, read_rows):
    rows = network(read_rows())
    for row in rows:
        assert (row["maps"].dtype, row["maps"].shape) == (np.uint32, (SIDE, SIDE))
        assert (row["tokens"].dtype, row["tokens"].shape) == (np.float16, (4, 4, 384))
        assert row["seconds_network"] > 0
    # Alone each gives the same.
    for row, again in zip(rows, read_rows(), strict=True):
        (alone,) = network([again])
        np.testing.assert_array_equal(alone["maps"], row["maps"])
        np.testing.assert_array_equal(alone["tokens"], row["tokens"])


def test_a_tile_the_network_fails_on_costs_no_other(network, read_rows, monkeypatch):
    real, bad = networks.segment_tiles, read_rows()[1]["image"]

    def fails_on_one(model, images, *args, **kwargs):
        if any(image is bad or np.array_equal(image, bad) for image in images):
            message = "not finite"
            raise ValueError(message)
        return real(model, images, *args, **kwargs)

    monkeypatch.setattr(networks, "segment_tiles", fails_on_one)
    rows = network(read_rows())
    assert [row.get("error") for row in rows] == [None, "not finite", None]
    assert rows[1]["stage"] == "network"
    assert "maps" not in rows[1]
    assert all(row["seconds_network"] > 0 for row in rows)


def test_tokens_become_embeddings_and_hidden_vectors(tmp_path, network, network_spec, read_rows):
    head = MilHead(embedding_dim=384, num_genes=2)
    info = {"genes": ["A", "B"], "scaling": {}, "embedding_dim": 384, "encoder_digest": "tokens:x"}
    save_head(str(tmp_path / "head"), head, info | {"training_slides": [], "metrics": {}})
    spec = replace(network_spec, head_uri=str(tmp_path / "head"))
    with pytest.raises(ValueError, match="it is not the head of this run"):
        Embed(replace(spec, head_digest="0" * 64), "cpu")
    rows = FindNuclei(spec)(network(read_rows()))
    assert sum(len(row["cells"]) for row in rows) > 0
    boxes = [row["boxes"] for row in rows]
    tokens = [row["tokens"] for row in rows]
    out = Embed(spec, "cpu")([dict(row) for row in rows])
    for row, boxes_N4, tokens_RTD in zip(out, boxes, tokens, strict=True):
        assert not {"tokens", "boxes", "image", "maps", "frame"} & set(row)
        embedding = np.array(row["cells"]["embedding"].to_pylist()).reshape(-1, 384)
        for found, (x0, y0, x1, y1) in zip(embedding, boxes_N4, strict=True):
            under = tokens_RTD[y0 // 16 : -(-y1 // 16), x0 // 16 : -(-x1 // 16)]
            expected = under.astype(float).mean(axis=(0, 1))
            np.testing.assert_allclose(found, expected, atol=2e-3, rtol=2e-3)
        assert row["cells"].schema.field("hidden").type == schemas.vector("hidden", 256).type


def test_rows_survive_the_way_between_actors(network, network_spec, read_rows):
    fused = FindNuclei(network_spec)(network(read_rows()))
    apart = read_rows()
    for stage in (network, FindNuclei(network_spec)):
        apart = stage(unpack(pack(apart)))
    for one, other in zip(fused, unpack(pack(apart)), strict=True):
        assert other["cells"].equals(one["cells"])
        np.testing.assert_array_equal(other["boxes"], one["boxes"])
        np.testing.assert_array_equal(other["tokens"], one["tokens"])
        assert not {"image", "maps", "frame"} & set(other)


def test_no_embedding_leaves_cells_without_vectors(tmp_path, cells_spec, synthetic_slide, helpers):
    spec = replace(cells_spec, encoder="none", store_embeddings=False)
    run = RunFolder(str(tmp_path), "d1g")
    rows = plan_slide(helpers.slide_row(synthetic_slide.slide), spec)
    receipts = WriteShards(run)(helpers.find_stage(spec)(rows))
    assert finish_slide(run, "s", receipts)["tables"] == ["CELLS"]
    cells = storage.read_table(run.cells_uri("s"))
    assert cells.schema.names == schemas.cells_schema(None).names
    assert len(cells) > 100


@pytest.mark.parametrize(
    ("segmenter", "encoder", "gpus", "groups"),
    [
        ("hematoxylin", "imagenet", False, ["read find embed write"]),
        ("hematoxylin", "imagenet", True, ["read find", "embed write"]),
        ("hematoxylin", "none", True, ["read find write"]),
        ("imported", "imagenet", True, ["read find", "embed write"]),
        ("cellvit", "imagenet", False, ["read network find embed write"]),
        ("cellvit", "tokens", True, ["read", "network", "find", "embed write"]),
        ("cellvit", "none", True, ["read", "network", "find write"]),
    ],
)
def test_a_run_has_the_stages_it_needs(cells_spec, segmenter, encoder, gpus, groups):
    spec = replace(cells_spec, segmenter=segmenter, encoder=encoder)
    assert [" ".join(names) for names in stage_groups(spec, gpus=gpus)] == groups


def test_a_slide_too_coarse_for_the_network_says_so(network_spec, synthetic_slide, helpers):
    row = helpers.slide_row(synthetic_slide.slide, mpp=0.9, mpp_confirmed=True)
    (planned,) = plan_slide(row, network_spec)
    assert planned["stage"] == "plan"
    assert "0.9 um/px is coarser than 0.75, the limit of CellViT" in planned["error"]


def test_tiles_that_share_a_pass_give_what_each_gives_alone(network, read_rows):
    """As on a GPU, where batches are larger than one."""
    images = [row["image"] for row in read_rows()]
    together = networks.segment_tiles(
        network.model, images, SIDE, "cpu", "float32", tokens=True, batch_size=2
    )
    for image, (maps, tokens) in zip(images, together, strict=True):
        ((alone, alone_tokens),) = networks.segment_tiles(
            network.model, [image], SIDE, "cpu", "float32", tokens=True
        )
        # Sums in another order: the last bits of an energy, and no class.
        np.testing.assert_array_equal(maps >> 25, alone >> 25)
        level = [m.astype(np.int64) & (2**25 - 1) for m in (maps, alone)]
        assert np.abs(level[0] - level[1]).max() < 2**10
        np.testing.assert_allclose(tokens, alone_tokens, rtol=2e-3, atol=2e-3)


def test_other_weights_than_the_runs_are_refused(network_spec, cells_spec):
    with pytest.raises(ValueError, match="the run was started with sha256:other"):
        Network(replace(network_spec, weights_digest="sha256:other"), "cpu")
    with pytest.raises(ValueError, match="the run was started with sha256:other"):
        Embed(replace(cells_spec, encoder_digest="sha256:other"), "cpu")


def test_crops_are_normalised_by_their_slide(cells_spec):
    colours = {"pale": ((0.8, 0.7, 0.8), (0.1, 0.2, 0.1))}
    spec = replace(cells_spec, encoder="random:0:resnet18", colours=colours)
    crops = np.random.default_rng(0).integers(0, 256, (3, 48, 48, 3), np.uint8)
    inputs = {"crops": crops, "cells": schemas.cells_schema(None, with_bbox=False).empty_table()}
    rows = [
        {"slide_id": slide_id, "tile_id": 0, "num_tiles": 1, "error": None} | inputs
        for slide_id in ("pale", "other")
    ]
    stage = Embed(spec, "cpu")
    seen = []
    stage._with_vectors = lambda _, embedding_ND: seen.append(embedding_ND)
    rows = stage(rows)
    own = load_encoder("random:0:resnet18")
    by_hand = ((crops / 255 - colours["pale"][0]) / colours["pale"][1]).astype(np.float32)
    with torch.inference_mode():
        expected = own.network(torch.from_numpy(by_hand).permute(0, 3, 1, 2)).numpy()
    assert len(seen) == 1
    np.testing.assert_allclose(seen[0], expected, rtol=2e-3, atol=2e-3)
    assert "no crops of slide 'other'" in rows[1]["error"]


@pytest.mark.parametrize("broken", [False, True])
def test_a_worker_whose_gpu_stopped_working_ends(monkeypatch, broken):
    def synchronize():
        if broken:
            message = "CUDA error: an illegal memory access was encountered"
            raise RuntimeError(message)

    ended = []
    monkeypatch.setattr(networks.torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(networks.os, "_exit", ended.append)
    row = {"slide_id": "s", "tile_id": 4, "stage": "network"}
    networks.end_process_if_broken("cuda", row)
    networks.end_process_if_broken("cpu", row | {"error": "CUDA error"})
    assert ended == []
    networks.end_process_if_broken("cuda", row | {"error": "CUDA error"})
    assert ended == [1] * broken
