"""Paths near the folder that is meant: the message names what to give."""

import fsspec
import pytest

from scellst_ray.spots.near_paths import check_outs_path, is_outs

LOCAL = fsspec.filesystem("file")


@pytest.fixture
def root(tmp_path):
    """Write empty files: Visium, Visium HD, two samples, Xenium, .h5ad files and a Zarr store."""
    files = [
        "visium/outs/filtered_feature_bc_matrix.h5",
        "visium/outs/filtered_feature_bc_matrix/matrix.mtx.gz",
        "visium/outs/filtered_feature_bc_matrix/barcodes.tsv.gz",
        "visium/outs/spatial/tissue_positions.csv",
        "visium/outs/spatial/scalefactors_json.json",
        "two/A/outs/raw_feature_bc_matrix/matrix.mtx",
        "two/A/outs/spatial/tissue_positions_list.csv",
        "two/B/outs/S_raw_feature_bc_matrix.h5",
        "two/B/outs/spatial/tissue_positions_list.csv",
        "hd/spatial/tissue_hires_image.png",
        "hd/feature_slice.h5",
        "xenium/experiment.xenium",
        "h5ads/a.h5ad",
        "store/zarr.json",
        "old.zarr/.zgroup",
        "empty/readme.txt",
    ]
    for side in ("002", "008", "016"):
        files.append(f"hd/binned_outputs/square_{side}um/filtered_feature_bc_matrix.h5")
        files.append(f"hd/binned_outputs/square_{side}um/spatial/tissue_positions.parquet")
    for name in files:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("visium", ["visium/outs"]),
        ("visium/outs/spatial", ["visium/outs"]),
        ("visium/outs/spatial/tissue_positions.csv", ["visium/outs"]),
        ("visium/outs/spatial/scalefactors_json.json", ["visium/outs"]),
        ("visium/outs/filtered_feature_bc_matrix.h5", ["visium/outs"]),
        ("visium/outs/filtered_feature_bc_matrix", ["visium/outs"]),
        ("visium/outs/filtered_feature_bc_matrix/matrix.mtx.gz", ["visium/outs"]),
        ("visium/out", ["visium/outs"]),
        ("two", ["two/A/outs", "two/B/outs"]),
        ("hd", [f"hd/binned_outputs/square_{side}um" for side in ("008", "002", "016")]),
        ("hd/binned_outputs", ["hd/binned_outputs/square_008um"]),
        ("hd/binned_outputs/square_016um/spatial", ["hd/binned_outputs/square_016um"]),
        ("h5ads", ["h5ads/a.h5ad"]),
    ],
)
def test_the_message_names_what_to_give(root, given, wanted):
    with pytest.raises(ValueError, match=r"Give (that folder|this|one of these)") as caught:
        check_outs_path(LOCAL, f"{root}/{given}/")
    said = str(caught.value).partition("as `spots`: ")[2]
    places = [said.index(f"{root}/{path}") for path in wanted]
    assert places == sorted(places)


def test_the_diameter_of_bins_is_named(root):
    with pytest.raises(ValueError, match=r"square_008um \(and spot_diameter_um 8\), "):
        check_outs_path(LOCAL, str(root / "hd"))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("xenium", "Name it in the manifest's column `xenium`"),
        ("store", "is a Zarr store"),
        ("old.zarr", r"anndata\.read_zarr"),
    ],
)
def test_outputs_of_other_software_are_named(root, given, words):
    with pytest.raises(ValueError, match=words):
        check_outs_path(LOCAL, str(root / given))


def test_nothing_is_said_where_nothing_lies_near(root):
    check_outs_path(LOCAL, str(root / "empty"))
    check_outs_path(LOCAL, str(root / "nowhere/at/all"))
    check_outs_path(LOCAL, str(root / "visium/outs"))
    assert is_outs(LOCAL, str(root / "two/B/outs"))
    assert not is_outs(LOCAL, str(root / "two/B"))


def test_object_storage(root):
    memory = fsspec.filesystem("memory")
    memory.put(str(root / "visium"), "/near/visium", recursive=True)
    try:
        with pytest.raises(ValueError, match="memory:///near/visium/outs"):
            check_outs_path(memory, "/near/visium")
    finally:
        memory.rm("/near", recursive=True)


def test_a_file_that_is_none_of_them_is_named(root):
    path = root / "alone/filtered_feature_bc_matrix.h5"
    path.parent.mkdir()
    path.touch()
    words = (
        r"is a file that is not read by itself\. .*/alone holds \['filtered_feature_bc_matrix\.h5"
    )
    with pytest.raises(ValueError, match=words):
        check_outs_path(LOCAL, str(path))
