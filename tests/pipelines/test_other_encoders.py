"""Encoders that are no ResNet-50: a file of another length all the way, and one-hot types."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from scellst_ray.commands.train import train
from scellst_ray.commands.training_configs import TrainConfig
from scellst_ray.models.encoder.encoder import load_encoder, save_encoder
from scellst_ray.models.mil.head import load_head
from scellst_ray.pipelines.extract import extract
from scellst_ray.pipelines.predict import predict
from scellst_ray.runs.identity import NetworkIdentity
from scellst_ray.runs.reading import open_run
from scellst_ray.slides.synthetic.slide import SyntheticConfig, write_synthetic_slide
from scellst_ray.stages.checked_networks import check_networks
from scellst_ray.stages.config import ExtractConfig, PredictConfig
from scellst_ray.stages.find import FindNuclei
from scellst_ray.stages.networks import Embed
from scellst_ray.stages.plan_slide import plan_slide
from scellst_ray.stages.read import Read
from tests.support import cellvit_weights

MEAN, STD = (0.7, 0.5, 0.6), (0.2, 0.25, 0.2)


@pytest.fixture(scope="module")
def spotted(tmp_path_factory):
    """Return the manifest of a slide with a few dozen spots."""
    folder = tmp_path_factory.mktemp("spotted")
    config = SyntheticConfig(
        seed=2,
        width_um=420.0,
        height_um=340.0,
        cells_per_mm2=3000,
        num_genes=12,
        capture_efficiency=1.0,
        spot_diameter_um=44.0,
        spot_pitch_um=50.0,
    )
    files = write_synthetic_slide(folder / "s", config)
    path = folder / "manifest.csv"
    path.write_text(f"slide_id,uri,spots\ns,{files.slide},{files.space_ranger}\n")
    return path


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_an_encoder_of_512_goes_from_pixels_to_expression(tmp_path, spotted):
    network = load_encoder("random:1:resnet18").network
    weights = tmp_path / "own.safetensors"
    save_encoder(weights, network, MEAN, STD, arch="resnet18", provenance={"slides": ["s"]})
    common = {"manifest": str(spotted), "gpus": False, "precision": "float32", "memory_gb": 0.5}
    cells = ExtractConfig(out=str(tmp_path / "cells"), encoder=str(weights), **common)
    assert {r["status"] for r in extract(cells).values()} == {"done"}
    run = open_run(cells.out)
    assert run.embedding_dim == 512
    embedding_ND = run.embeddings("s")
    assert embedding_ND.shape == (len(run.cells("s", ["x0"])), 512)
    assert embedding_ND.astype(float).std(axis=0).max() > 0.01
    head = TrainConfig(
        manifest=cells.manifest,
        cells=cells.out,
        out=str(tmp_path / "head"),
        genes="variable:2",
        max_epochs=2,
        batch_spots=8,
        cpus_per_worker=1,
        gpus=False,
    )
    info = train(head, lambda _: None)
    assert info["embedding_dim"] == 512
    assert info["encoder_digest"] == load_encoder(str(weights)).digest
    expression = PredictConfig(out=str(tmp_path / "expression"), head=head.out, **common)
    assert {r["status"] for r in predict(expression).values()} == {"done"}
    predicted_NG = open_run(expression.out).expression_numpy(None, "s")
    module, _ = load_head(str(tmp_path / "head" / "head.safetensors"))
    assert predicted_NG.shape == (len(embedding_ND), 2)
    assert predicted_NG.std(axis=0).min() > 0
    assert len(module.mean_D) == 512
    # Another network of the same length is not the one the head was trained with.
    with pytest.raises(ValueError, match="and encoder 'random:1:resnet18' is random:1:resnet18"):
        predict(replace(expression, encoder="random:1:resnet18", out=str(tmp_path / "other")))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return cellvit_weights.write_checkpoint(tmp_path_factory.mktemp("weights") / "cellvit.pth")


def test_types_as_one_hot(synthetic_slide, cells_spec, helpers):
    spec = replace(cells_spec, encoder="types", type_names=("Background", "B", "C"))
    rows = Read(spec)(plan_slide(helpers.slide_row(synthetic_slide.slide), spec)[5:6])
    (row,) = FindNuclei(spec)(rows)
    assert not {"crops", "boxes", "tokens"} & set(row)
    types = np.array(["C", "Background", "B"])[np.arange(len(row["cells"])) % 3]
    column = row["cells"].schema.get_field_index("nucleus_type")
    row["cells"] = row["cells"].set_column(column, "nucleus_type", pa.array(types.tolist()))
    (row,) = Embed(spec, "cpu")([row])
    assert row.get("error") is None
    embedding_ND = np.stack(row["cells"]["embedding"].to_pylist()).astype(float)
    assert len(types) > 3
    expected = [[name == kind for kind in spec.type_names] for name in types]
    np.testing.assert_array_equal(embedding_ND, np.array(expected, float))


def test_a_type_without_a_column_fails_its_tile(synthetic_slide, cells_spec, helpers):
    spec = replace(cells_spec, encoder="types", type_names=("A", "B"))
    rows = Read(spec)(plan_slide(helpers.slide_row(synthetic_slide.slide), spec)[5:6])
    (row,) = Embed(spec, "cpu")(FindNuclei(spec)(rows))
    assert row["stage"] == "embed"
    assert "are none of the segmenter's: A, B" in row["error"]


def test_what_types_are_is_part_of_the_run(checkpoint):
    config = ExtractConfig(
        manifest="m.csv",
        out="o",
        segmenter="cellvit",
        segmenter_weights=str(checkpoint),
        encoder="types",
        core_px=192,
    )
    found = check_networks(config)
    assert found.identity.embedding_dim == len(cellvit_weights.PANNUKE)
    assert found.identity.encoder == "types:" + ",".join(cellvit_weights.PANNUKE)
    assert found.type_names == tuple(cellvit_weights.PANNUKE)


@pytest.mark.parametrize(
    ("segmenter", "reason"),
    [("hematoxylin", "gives none; use segmenter cellvit"), ("imported", "not known then; use")],
)
def test_types_need_a_segmenter_that_knows_its_types(segmenter, reason):
    with pytest.raises(ValueError, match=f"encoder 'types' needs .*{reason}"):
        ExtractConfig(manifest="m.csv", out="o", segmenter=segmenter, encoder="types")


def test_the_length_is_known_before_ray_starts(tmp_path):
    named = ExtractConfig(manifest="m.csv", out="o", encoder="random:2:resnet34")
    assert check_networks(named).identity == NetworkIdentity(
        encoder="random:2:resnet34", embedding_dim=512
    )
    network = load_encoder("random:1:resnet18").network
    path = tmp_path / "e.safetensors"
    save_encoder(path, network, MEAN, STD, arch="resnet18")
    path.write_bytes(path.read_bytes().replace(b'"crop_um":"12.0"', b'"crop_um":"18.0"'))
    with pytest.raises(ValueError, match=r"e\.safetensors: it was trained on crops of 18 um"):
        check_networks(replace(named, encoder=str(path)))
