"""Files of earlier releases: every later one reads them, and goes on with their runs.

Each folder v* next to this file holds what one format version wrote, and `expected.json`: what its
own release read from these files.
"""

import json
import shutil
from dataclasses import fields
from pathlib import Path

import anndata as ad
import numpy as np
import pytest

from scellst_ray import open_run, storage
from scellst_ray.core import schemas
from scellst_ray.export.anndata_file import write_anndata
from scellst_ray.models.mil.stored_head import read_last_layer
from scellst_ray.pipelines.resume import read_logged_work
from scellst_ray.runs import identity
from scellst_ray.runs.folder import begin_run, read_config
from scellst_ray.runs.identity import NetworkIdentity, RunIdentity
from scellst_ray.runs.known_slides import accept_slides
from scellst_ray.runs.sources import sources_of
from scellst_ray.runs.state import read_state
from scellst_ray.runs.summary import write_summary
from scellst_ray.slides.manifest import SlideRow
from scellst_ray.slides.reader import Slide
from scellst_ray.stages.config import ExtractConfig
from scellst_ray.stages.tiles import CellsSpec

VERSIONS = sorted(Path(__file__).parent.glob("v*"), key=lambda folder: int(folder.name[1:]))
SLIDE = "unseen"


@pytest.fixture(params=VERSIONS, ids=lambda folder: folder.name)
def archive(request):
    return request.param


@pytest.fixture
def expected(archive):
    return json.loads((archive / "expected.json").read_text())


@pytest.fixture
def run(archive):
    return open_run(archive / "run")


def identity_in(run):
    """Return the identity of a run as this release builds it."""
    stored = run.info["identity"]
    networks = {f.name: stored[f.name] for f in fields(NetworkIdentity) if f.name in stored}
    others = {f.name: stored[f.name] for f in fields(RunIdentity) if f.name in stored}
    return RunIdentity(networks=NetworkIdentity(**networks), **others)


def test_every_format_version_has_an_archive():
    assert [folder.name for folder in VERSIONS] == [
        f"v{number}" for number in range(1, schemas.FORMAT_VERSION + 1)
    ]


def test_records_and_cells(run, expected):
    assert run.info["digest"] == expected["digest"]
    assert {s: record["status"] for s, record in run.records.items()} == expected["status"]
    assert run.slides["scellst_ray"].unique().to_list() == [expected["written_by"]]
    cells = run.cells(SLIDE)
    assert cells["cell_id"].to_pylist() == expected["cell_id"]
    assert len(cells) == expected["num_cells"] == run.records[SLIDE]["num_cells"]
    for name, values in expected["first_cells"].items():
        np.testing.assert_allclose(cells[name].to_numpy()[:3], values, atol=1e-5)
    assert cells["polygon"][0].as_py().hex() == expected["first_polygon_hex"]
    assert len(run.cells("blank")) == 0
    with pytest.raises(ValueError, match="'missing' failed at plan with FileNotFoundError"):
        run.cells("missing")
    assert run.failures()["slide_id"].to_list() == ["missing"]


def test_embeddings_and_expression(run, expected):
    np.testing.assert_allclose(run.embeddings(SLIDE)[:2, :8], expected["embedding"], atol=1e-5)
    assert run.genes == expected["genes"]
    values = run.expression_numpy(None, SLIDE)
    assert values.shape == (expected["num_cells"], len(expected["genes"]))
    np.testing.assert_allclose(values[:3], expected["expression"], rtol=1e-5, atol=1e-6)


def test_the_head(archive, run, expected):
    import torch

    from scellst_ray.models.mil.head import load_head

    uri = str(archive / "run" / "head.safetensors")
    head, info = load_head(uri)
    assert info["genes"] == read_last_layer(uri).genes == expected["genes"]
    assert info == json.loads((archive / "head.json").read_text())
    x_ND = torch.from_numpy(run.embeddings(SLIDE)[:2].astype(np.float32))
    with torch.inference_mode():
        y_NG = head(x_ND).numpy()
    np.testing.assert_allclose(y_NG, expected["head_output"], rtol=1e-5, atol=1e-5)


def test_the_encoder(archive, expected):
    pytest.importorskip("timm")
    from scellst_ray.models.encoder.encoder import embed_crops, load_encoder

    encoder = load_encoder(str(archive / "encoder.safetensors"))
    assert encoder.dim == expected["encoder"]["dim"]
    assert encoder.digest == expected["encoder"]["digest"]
    crops = (np.arange(2 * 48 * 48 * 3) % 251).astype(np.uint8).reshape(2, 48, 48, 3)
    found = embed_crops(encoder, crops, "cpu", "float32")[:, :8]
    np.testing.assert_allclose(found, expected["encoder"]["of_two_crops"], atol=1e-4)


def test_the_slide(archive, run):
    record = run.records[SLIDE]
    with Slide(archive / "slide.tiff", "slide.tiff", record["mpp"]) as slide:
        assert (slide.width0, slide.height0) == (record["width0"], record["height0"])


def test_export(run, expected, tmp_path):
    out = str(tmp_path / "cells.h5ad")
    write_anndata(run, out, picture_px=0)
    adata = ad.read_h5ad(out)
    assert adata.obs["cell_id"].tolist() == expected["cell_id"]
    assert adata.var_names.tolist() == expected["genes"]
    np.testing.assert_allclose(adata.X[:3], expected["expression"], rtol=1e-5, atol=1e-6)


def test_status_and_summary(archive, expected, tmp_path):
    shutil.copytree(archive / "run", tmp_path / "run")
    counts = read_state(str(tmp_path / "run")).counts()
    assert {status: count for status, count in counts.items() if count} == {
        "done": 1,
        "empty": 1,
        "failed": 1,
    }
    before = storage.read_json(str(tmp_path / "run" / "summary.json"))
    after = write_summary(str(tmp_path / "run"))
    kept = ("run", "written", "versions", "bytes")
    assert {key: after[key] for key in before if key not in kept} == {
        key: value for key, value in before.items() if key not in kept
    }
    assert after["num_cells"] == expected["num_cells"]


@pytest.mark.parametrize("name", ["run", "interrupted"])
def test_the_same_command_is_accepted_and_another_refused(archive, tmp_path, monkeypatch, name):
    shutil.copytree(archive / name, tmp_path / "run")
    old = open_run(tmp_path / "run")
    stored = old.info["identity"]
    monkeypatch.setattr(identity, "__version__", stored["scellst_ray"])
    again = begin_run(old.uri, stored["job"], identity_in(old))
    assert again.digest == old.info["digest"]
    monkeypatch.setattr(identity, "__version__", "9.9.9")
    with pytest.raises(ValueError, match=r"holds another run \(scellst_ray: "):
        begin_run(old.uri, stored["job"], identity_in(old))


def test_an_interrupted_run_is_known(archive):
    state = read_state(str(archive / "interrupted"))
    (row,) = state.slides.to_dicts()
    assert (row["status"], row["tiles_done"], row["num_tiles"]) == ("pending", 3, 6)


def test_tiles_of_an_interrupted_run_count_without_a_source(archive, tmp_path):
    folder, slide = tmp_path / "run", archive / "slide.tiff"
    shutil.copytree(archive / "interrupted", folder)
    known = storage.read_json(str(folder / "slides.json"))
    known[SLIDE]["uri"] = str(slide)
    storage.publish_json(str(folder / "slides.json"), known)
    run, slides = open_run(folder).folder, [SlideRow(SLIDE, str(slide), None)]
    spec = CellsSpec("hematoxylin", None, 160, 32, "none", "float32", None, store_embeddings=False)
    trusted = accept_slides(run, sources_of(slides, None, imported=False), {})
    work = read_logged_work(run, slides, spec, (), trusted)
    assert [len(row["done_tiles"]) for row in work.rows] == [3]
    # Under another name the file may be another one, and nothing says that it is the same.
    shutil.copy(slide, tmp_path / "copy.tiff")
    slides = [SlideRow(SLIDE, str(tmp_path / "copy.tiff"), None)]
    trusted = accept_slides(run, sources_of(slides, None, imported=False), {})
    work = read_logged_work(run, slides, spec, (), trusted)
    assert [len(row["done_tiles"]) for row in work.rows] == [0]


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_an_interrupted_run_goes_on(archive, expected, tmp_path, monkeypatch):
    from scellst_ray.pipelines.extract import extract

    folder, slide = tmp_path / "run", archive / "slide.tiff"
    shutil.copytree(archive / "interrupted", folder)
    # The slide has moved since.
    sources = storage.read_json(str(folder / "slides.json"))
    sources[SLIDE]["uri"] = str(slide)
    storage.publish_json(str(folder / "slides.json"), sources)
    manifest = tmp_path / "manifest.csv"
    manifest.write_text(f"slide_id,uri\n{SLIDE},{slide}\n")
    written_by = open_run(folder).info["identity"]["scellst_ray"]
    monkeypatch.setattr(identity, "__version__", written_by)
    settings = read_config(str(folder)) | {"manifest": str(manifest), "out": str(folder)}
    records = extract(ExtractConfig(**settings | {"gpus": False}))
    assert records[SLIDE]["status"] == "done"
    cells = open_run(folder).cells(SLIDE)
    assert cells["cell_id"].to_pylist() == expected["interrupted"]["cell_id"]
    np.testing.assert_allclose(cells["x0"].to_numpy(), expected["interrupted"]["x0"], atol=1e-4)
