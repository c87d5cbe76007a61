"""`extract` with a CellViT checkpoint: the distributed pass, and settings that are refused."""

import pickle
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from scellst_ray import storage
from scellst_ray.pipelines import extract as extract_module
from scellst_ray.pipelines.extract import extract
from scellst_ray.runs.compaction import finish_slide
from scellst_ray.runs.folder import RunFolder
from scellst_ray.runs.reading import open_run
from scellst_ray.slides.manifest import read_manifest
from scellst_ray.slides.synthetic.slide import SyntheticConfig, write_synthetic_slide
from scellst_ray.stages.config import ExtractConfig
from scellst_ray.stages.find import FindNuclei
from scellst_ray.stages.networks import Embed, Network
from scellst_ray.stages.plan_slide import plan_slide
from scellst_ray.stages.read import Read
from scellst_ray.stages.write import WriteShards
from tests.support import cellvit_weights

SETTINGS = {"segmenter": "cellvit", "encoder": "tokens", "core_px": 192, "memory_gb": 1.0}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return cellvit_weights.write_checkpoint(tmp_path_factory.mktemp("weights") / "cellvit.pth")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    """Return the manifest of one slide of four tiles of 256 px, and one too coarse."""
    folder = tmp_path_factory.mktemp("slides")
    config = SyntheticConfig(
        seed=1, width_um=100, height_um=100, mpp=0.262, cells_per_mm2=3000, num_genes=4
    )
    slide = write_synthetic_slide(folder / "s", config).slide
    path = folder / "manifest.csv"
    path.write_text(f"slide_id,uri,mpp,mpp_confirmed\nfine,{slide},,\ncoarse,{slide},0.8,yes\n")
    return path


def plain_loop(manifest, weights, folder, cells_spec, helpers):
    """Return the CELLS of the first slide from a plain loop over tiles."""
    spec = replace(
        cells_spec,
        segmenter="cellvit",
        core_px=192,
        encoder="tokens",
        type_names=cellvit_weights.PANNUKE,
        weights=str(weights),
    )
    run, slide = RunFolder(str(folder), "plain"), read_manifest(str(manifest))[0]
    stages = Read(spec), Network(spec, "cpu"), FindNuclei(spec), Embed(spec, "cpu")
    receipts = []
    for tile in plan_slide(helpers.slide_row(slide.uri, slide_id="fine"), spec):
        rows = [tile]
        for stage in stages:
            rows = stage(rows)
        receipts.append(WriteShards(run)(rows))
    finish_slide(run, "fine", pa.concat_tables(receipts))
    return storage.read_table(run.cells_uri("fine"))


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_pipeline_equals_plain_loop_whether_fused_or_spread(
    tmp_path, manifest, weights, cells_spec, helpers
):
    expected = plain_loop(manifest, weights, tmp_path / "plain", cells_spec, helpers)
    assert len(expected) > 5
    for gpus in (False, True):
        out = tmp_path / f"gpus-{gpus}"
        config = ExtractConfig(
            manifest=str(manifest),
            out=str(out),
            segmenter_weights=str(weights),
            gpus=gpus,
            precision="float32",
            **SETTINGS,
        )
        records = extract(config)
        assert {k: r["status"] for k, r in records.items()} == {"fine": "done", "coarse": "failed"}
        assert "0.8 um/px is coarser than 0.75" in records["coarse"]["error"]
        assert records["fine"]["seconds"]["network"] > 0
        assert pq.read_table(out / "cells" / "fine.parquet").equals(expected)
    run = open_run(str(out))
    assert run.embedding_dim == 384
    assert run.embeddings("fine").shape == (len(expected), 384)
    assert run.info["identity"]["encoder"].startswith("tokens:sha256:")
    # Other weights are another run.
    other = cellvit_weights.write_checkpoint(tmp_path / "other.pth", prefix="module.")
    with pytest.raises(ValueError, match=r"holds another run .*segmenter_weights"):
        extract(ExtractConfig(**{**vars(config), "segmenter_weights": str(other)}))


class Danger:
    """Something whose unpickling leaves a trace."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return (open, (str(self.trace), "w"))


def write_bad(kind, folder, good):
    """Write a checkpoint that must not be taken; return its path."""
    path = folder / "bad.pth"
    if kind == "cut":
        path.write_bytes(good.read_bytes()[:50_000_000])
    elif kind == "other network":
        torch.save({"conv1.weight": torch.zeros(64, 3, 7, 7)}, path)
    elif kind == "wrong classes":
        checkpoint = cellvit_weights.make_checkpoint()
        checkpoint["config"] = cellvit_weights.make_config(type_names=("Background", "Tumour"))
        torch.save(checkpoint, path)
    elif kind == "code in torch's format":
        torch.save({"arch": Danger(folder / "trace")}, path)
    else:
        path.write_bytes(pickle.dumps(Danger(folder / "trace")))
    return path


@pytest.mark.parametrize(
    "kind", ["cut", "other network", "wrong classes", "code in torch's format", "plain pickle"]
)
def test_a_bad_checkpoint_is_refused_before_ray_starts(
    tmp_path, manifest, weights, monkeypatch, kind
):
    monkeypatch.setattr(extract_module, "ray_session", None)
    bad = write_bad(kind, tmp_path, weights)
    config = ExtractConfig(
        manifest=str(manifest),
        out=str(tmp_path / "run"),
        segmenter_weights=str(bad),
        **SETTINGS,
    )
    with pytest.raises(ValueError, match=r"bad\.pth"):
        extract(config)
    assert not (tmp_path / "trace").exists()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"segmenter": "cellvit"}, "needs segmenter_weights"),
        ({"segmenter_weights": "w.pth"}, "segmenter_weights is only for segmenter cellvit"),
        ({"segmenter_window_px": 128}, "segmenter_window_px is only for segmenter cellvit"),
        ({"encoder": "tokens"}, "'tokens' is only for segmenter cellvit"),
        (
            {"segmenter": "cellvit", "segmenter_weights": "w.pth", "read_mpp": 0.5},
            "CellViT was trained at 0.25",
        ),
        (
            {"segmenter": "cellvit", "segmenter_weights": "w.pth", "core_px": 250},
            "multiple of 16",
        ),
        (
            {"segmenter": "cellvit", "segmenter_weights": "w.pth", "segmenter_window_px": 5},
            "at least 64",
        ),
    ],
)
def test_settings_that_do_not_fit_the_segmenter(settings, reason):
    with pytest.raises(ValueError, match=reason):
        ExtractConfig(manifest="m.csv", out="o", **settings)


def test_tiles_larger_than_sam_takes_are_refused_before_ray_starts(tmp_path, manifest):
    state = cellvit_weights.hollow_state("SAM-B")
    path = tmp_path / "sam.pth"
    torch.save(cellvit_weights.make_checkpoint("SAM-B", state=state), path)
    settings = SETTINGS | {"segmenter_weights": str(path), "core_px": 1024}
    config = ExtractConfig(manifest=str(manifest), out=str(tmp_path / "run"), **settings)
    with pytest.raises(ValueError, match="make 1088 px; CellViT-SAM-B takes at most 1024"):
        extract(config)
    assert not (tmp_path / "run").exists()
