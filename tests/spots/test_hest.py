"""A folder in the HEST layout: rows of a manifest, and conflicts of its files."""

import json

import anndata
import fsspec
import numpy as np
import pytest
import tifffile
from scipy import sparse

from scellst_ray.commands.configs import ManifestHestConfig
from scellst_ray.commands.manifest_hest import write_hest_manifest
from scellst_ray.commands.table import COMMANDS
from scellst_ray.slides.manifest import SlideRow, read_manifest
from scellst_ray.spots.hest import read_hest
from scellst_ray.spots.read import read_spots

MPP, WIDTH0, HEIGHT0 = 0.5, 400, 300
METADATA = {
    "pixel_size_um_estimated": MPP,
    "pixel_size_um_embedded": MPP * 1.005,
    "fullres_px_width": WIDTH0,
    "fullres_px_height": HEIGHT0,
    "inter_spot_dist": 20.0,
    "spot_diameter": 11.0,
    "patient": "Patient 1",
    "organ": "Prostate",
    "species": "Homo sapiens",
    "st_technology": "Visium",
}


def write_sample(root, sample="T1", metadata=None, tiff_mpp=MPP, parts=("st", "wsis", "metadata")):
    for folder in ("st", "wsis", "metadata", "cellvit_seg"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    y, x = np.meshgrid(np.arange(6), np.arange(5), indexing="ij")
    adata = anndata.AnnData(sparse.csr_matrix(rng.poisson(3.0, (30, 4)).astype(np.float32)))
    adata.obsm["spatial"] = np.column_stack([x.ravel(), y.ravel()]) * 40.0 + 50
    adata.uns["spatial"] = {"ST": {"scalefactors": {"spot_diameter_fullres": 22.0}}}
    if "st" in parts:
        adata.write_h5ad(root / f"st/{sample}.h5ad")
    if "wsis" in parts:
        per_cm = 1e4 / (tiff_mpp or 1)
        tags = {"resolution": (per_cm, per_cm), "resolutionunit": "CENTIMETER"} if tiff_mpp else {}
        image = np.full((HEIGHT0, WIDTH0, 3), 230, np.uint8)
        tifffile.imwrite(root / f"wsis/{sample}.tif", image, **tags)
    if "metadata" in parts:
        (root / f"metadata/{sample}.json").write_text(json.dumps(METADATA | (metadata or {})))


def test_a_sound_sample(tmp_path):
    write_sample(tmp_path)
    (tmp_path / "cellvit_seg/T1_cellvit_seg.parquet").write_bytes(b"")
    (sample,), left_out = read_hest(f"{tmp_path}/")
    assert left_out == []
    assert sample.conflicts == []
    assert sample.row == {
        "slide_id": "T1",
        "uri": f"{tmp_path}/wsis/T1.tif",
        "mpp": MPP,
        "mpp_confirmed": "yes",
        "patient_id": "Patient 1",
        "spots": f"{tmp_path}/st/T1.h5ad",
        "spot_diameter_um": 11.0,
        "segmentation": f"{tmp_path}/cellvit_seg/T1_cellvit_seg.parquet",
        "organ": "Prostate",
        "species": "Homo sapiens",
        "st_technology": "Visium",
        "disease_state": None,
        "oncotree_code": None,
        "dataset_title": None,
    }
    spots = read_spots(sample.row)
    assert (len(spots), spots.radius0) == (30, 11.0)


@pytest.mark.parametrize(
    ("metadata", "tiff_mpp", "conflict"),
    [
        ({"pixel_size_um_embedded": 0.25}, MPP, r"0\.5 um/px estimated, but 0\.25 by pixel_size"),
        ({}, 0.3639, r"0\.5 um/px estimated, but 0\.3639 by the TIFF"),
        ({"inter_spot_dist": 100.0}, MPP, r"0\.5 um/px estimated, but 2\.5 by the pitch"),
        ({"fullres_px_width": 800}, MPP, r"the TIFF is 400 x 300 px, the metadata say 800 x 300"),
        ({"pixel_size_um_estimated": None}, MPP, "resolution .* is unknown"),
        ({"pixel_size_um_estimated": 4.0}, MPP, r"mpp 4 is outside 0\.1-1\.2"),
    ],
)
def test_conflicts_are_reported(tmp_path, metadata, tiff_mpp, conflict):
    write_sample(tmp_path, metadata=metadata, tiff_mpp=tiff_mpp)
    (sample,), _ = read_hest(str(tmp_path))
    text = "; ".join(sample.conflicts)
    assert text
    with pytest.raises(ValueError, match=conflict):
        raise ValueError(text)


@pytest.mark.parametrize("metadata", [{"inter_spot_dist": None}, {"spot_diameter": "NaN"}])
def test_what_is_not_known_is_no_conflict(tmp_path, metadata):
    write_sample(tmp_path, metadata=metadata, tiff_mpp=None)
    (sample,), _ = read_hest(str(tmp_path))
    assert sample.conflicts == []


def test_segmentation_and_what_is_left_out(tmp_path):
    write_sample(tmp_path, "B2")
    write_sample(tmp_path, "A1")
    write_sample(tmp_path, "C3", parts=("st",))
    (tmp_path / "cellvit_seg/A1_cellvit_seg.geojson").write_text("[]")
    (tmp_path / "cellvit_seg/B2_cellvit_seg.geojson.zip").write_bytes(b"")
    samples, left_out = read_hest(str(tmp_path))
    assert [sample.row["slide_id"] for sample in samples] == ["A1", "B2"]
    assert samples[0].row["segmentation"].endswith("/A1_cellvit_seg.geojson")
    assert samples[1].row["segmentation"] is None
    assert samples[1].conflicts == ["B2_cellvit_seg is still zipped: unzip it to import its nuclei"]
    assert left_out == ["C3: no wsis/C3.tif, metadata/C3.json"]


def test_folders_and_files_that_are_none(tmp_path):
    with pytest.raises(ValueError, match=r"no sample is complete \(0 in st/, 0 in wsis/"):
        read_hest(str(tmp_path))
    write_sample(tmp_path)
    (tmp_path / "wsis/T1.tif").write_bytes(b"II")
    with pytest.raises(ValueError, match=r"wsis/T1\.tif: not a whole TIFF"):
        read_hest(str(tmp_path))
    (tmp_path / "metadata/T1.json").write_text("{")
    with pytest.raises(ValueError, match=r"metadata/T1\.json: not a JSON object"):
        read_hest(str(tmp_path))


def test_object_storage(tmp_path):
    write_sample(tmp_path)
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path), "/hest/x", recursive=True)
    try:
        (sample,), _ = read_hest("memory://hest/x")
        assert sample.row["uri"] == "memory:///hest/x/wsis/T1.tif"
        assert sample.conflicts == []
        assert len(read_spots(sample.row)) == 30
    finally:
        memory.rm("/hest", recursive=True)


def test_command_writes_a_manifest_that_jobs_read(tmp_path, capsys):
    write_sample(tmp_path / "hest", "B2")
    write_sample(tmp_path / "hest", "A1", {"pixel_size_um_embedded": 0.25, "patient": None})
    write_sample(tmp_path / "hest", "C3", parts=("metadata",))
    command = COMMANDS["manifest hest"]
    assert (command.load_settings(), command.load_work()) == (
        ManifestHestConfig,
        write_hest_manifest,
    )
    config = ManifestHestConfig(folder=str(tmp_path / "hest"), out=str(tmp_path / "m.csv"))
    assert write_hest_manifest(config) == 0
    output = capsys.readouterr().out
    assert "A1: 0.5 um/px estimated, but 0.25 by pixel_size_um_embedded" in output
    assert "left out C3: no st/C3.h5ad, wsis/C3.tif" in output
    assert "2 slides" in output
    rows = read_manifest(str(tmp_path / "m.csv"), ("spots",))
    assert [(row.slide_id, row.mpp) for row in rows] == [("A1", MPP), ("B2", MPP)]
    assert isinstance(rows[0], SlideRow)
    assert rows[1].columns["patient_id"] == "Patient 1"
    assert "patient_id" not in rows[0].columns
    assert rows[0].columns["conflicts"].startswith("0.5 um/px")
    assert read_spots({**rows[0].columns, "slide_id": "A1"}, rows[0].mpp).radius0 == 11.0
    with pytest.raises(ValueError, match="there is a file already"):
        write_hest_manifest(config)


@pytest.mark.parametrize(
    ("metadata", "confirmed"),
    [({}, "yes"), ({"inter_spot_dist": 100.0}, None), ({"inter_spot_dist": None}, None)],
)
def test_an_estimate_that_the_spots_bear_out_is_confirmed(tmp_path, metadata, confirmed):
    write_sample(tmp_path, metadata=metadata, tiff_mpp=0.25)
    (sample,), _ = read_hest(str(tmp_path))
    assert sample.row["mpp_confirmed"] == confirmed


@pytest.mark.parametrize("technology", ["Xenium", "Visium HD", "CosMx"])
@pytest.mark.parametrize("stated", [None, 11.0, 20.0])
def test_pooled_squares_get_the_disc_of_their_area(tmp_path, technology, stated):
    write_sample(tmp_path, metadata={"st_technology": technology, "spot_diameter": stated})
    (sample,), _ = read_hest(str(tmp_path))
    assert sample.row["spot_diameter_um"] == 22.6
    assert sample.conflicts[0].startswith("its spots form squares of 20 um side by side")
    assert read_spots(sample.row).radius0 == pytest.approx(22.6)


@pytest.mark.parametrize("stated", [22.0, 22.6])
def test_a_diameter_that_covers_its_square_is_kept(tmp_path, stated):
    write_sample(tmp_path, metadata={"st_technology": "Xenium", "spot_diameter": stated})
    (sample,), _ = read_hest(str(tmp_path))
    assert (sample.row["spot_diameter_um"], sample.conflicts) == (stated, [])


@pytest.mark.parametrize("technology", ["Visium", "Spatial Transcriptomics"])
def test_discs_stay_discs(tmp_path, technology):
    write_sample(tmp_path, metadata={"st_technology": technology})
    (sample,), _ = read_hest(str(tmp_path))
    assert (sample.row["spot_diameter_um"], sample.conflicts) == (11.0, [])


def test_squares_of_an_unknown_technology_are_told(tmp_path):
    write_sample(tmp_path, metadata={"st_technology": None})
    (sample,), _ = read_hest(str(tmp_path))
    assert sample.row["spot_diameter_um"] == 11.0
    assert "set spot_diameter_um to 22.6" in sample.conflicts[0]
