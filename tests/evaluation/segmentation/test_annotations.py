"""Every readable file of nuclei is read, and other files are refused."""

import cv2
import numpy as np
import pyarrow as pa
import pytest
import shapely
import tifffile

from scellst_ray import storage
from scellst_ray.core import schemas
from scellst_ray.evaluation.segmentation.annotations import read_nuclei

LABELS = np.zeros((12, 20), np.uint16)
LABELS[1:4, 2:6] = 700  # centroid (4, 2.5)
LABELS[6:10, 10:12] = 3  # centroid (11, 8)
CENTROIDS = [[11, 8], [4, 2.5]]


def write_map(path, labels=LABELS):
    """Write a label map in the format that the name says."""
    suffix = path.suffix.lower()
    if suffix == ".png":
        assert cv2.imwrite(str(path), labels)
    elif suffix in (".tif", ".tiff"):
        tifffile.imwrite(path, labels)
    elif suffix == ".npy":
        np.save(path, labels)
    else:
        np.savez(path, labels)
    return path


@pytest.mark.parametrize("suffix", [".png", ".tif", ".TIFF", ".npy", ".npz"])
def test_label_maps(tmp_path, suffix):
    found = read_nuclei(str(write_map(tmp_path / f"map{suffix}")))
    assert found.centroid_N2.tolist() == CENTROIDS
    # Nuclei are numbered 1 to N in the order of the labels.
    np.testing.assert_array_equal(found.labels_HW, 1 * (LABELS == 3) + 2 * (LABELS == 700))
    assert found.types_N.tolist() == ["", ""]
    assert found.polygons_N is None


def test_types_of_a_label_map(tmp_path):
    path = str(write_map(tmp_path / "map.npy", LABELS.astype(np.int64)))
    (tmp_path / "types.csv").write_text("label,type\n700,long name \n3,\n9,unused\n")
    found = read_nuclei(path, str(tmp_path / "types.csv"))
    assert found.types_N.tolist() == ["", "long name"]
    (tmp_path / "types.csv").write_text("label,type\n3,a\n")
    with pytest.raises(ValueError, match=r"no row for 1 labels of .*map\.npy, such as 700"):
        read_nuclei(path, str(tmp_path / "types.csv"))


def test_npz_with_several_arrays(tmp_path):
    np.savez(tmp_path / "a.npz", inst_map=LABELS, other=np.zeros(3))
    assert len(read_nuclei(str(tmp_path / "a.npz")).types_N) == 2
    np.savez(tmp_path / "b.npz", one=LABELS, other=np.zeros(3))
    with pytest.raises(
        ValueError, match="holds arrays one, other; expected one array, or one named labels"
    ):
        read_nuclei(str(tmp_path / "b.npz"))
    np.savez(tmp_path / "c.npz", labels=np.array([{"a": 1}], object))
    with pytest.raises(ValueError, match=r"cannot be read as .npz .*Object arrays"):
        read_nuclei(str(tmp_path / "c.npz"))


def test_an_empty_map(tmp_path):
    found = read_nuclei(str(write_map(tmp_path / "map.png", np.zeros((5, 6), np.uint8))))
    assert found.centroid_N2.shape == (0, 2)
    assert found.labels_HW.shape == (5, 6)


@pytest.mark.parametrize(
    ("name", "text", "types"),
    [
        ("a.csv", "x,y,type\n1.5,2,tumour\n\n-3, 4 ,\n", ["tumour", ""]),
        ("a.tsv", "type\ty\tx\nT cell\t2\t1.5\n007\t4\t-3\n", ["T cell", "007"]),
        ("a.csv", "id,x,y\n1,1.5,2\n2,-3,4\n", ["", ""]),
    ],
)
def test_points(tmp_path, name, text, types):
    (tmp_path / name).write_text(text)
    found = read_nuclei(str(tmp_path / name))
    assert found.centroid_N2.tolist() == [[1.5, 2], [-3, 4]]
    assert found.types_N.tolist() == types
    assert not found.has_masks


def test_cells(tmp_path):
    polygons = [shapely.box(0, 0, 2, 2), shapely.box(5, 5, 7, 8)]
    cells = {
        "slide_id": ["s", "s"],
        "cell_id": [0, 1],
        "x0": [1.0, 6.0],
        "y0": [1.0, 6.5],
        "area_um2": [1.0, 1.0],
        "nucleus_type": ["a", "bb"],
        "type_prob": [None, 0.5],
        "polygon": [shapely.to_wkb(p) for p in polygons],
    }
    schema = schemas.cells_schema(None, with_bbox=False)
    table = schemas.conform(pa.table(cells, schema=schema), schema, "CELLS")
    uri = str(tmp_path / "cells.parquet")
    storage.publish_table(uri, table)
    found = read_nuclei(uri)
    assert found.centroid_N2.tolist() == [[1, 1], [6, 6.5]]
    assert found.types_N.tolist() == ["a", "bb"]
    assert shapely.equals(found.polygons_N, polygons).all()
    storage.publish_table(uri, table.slice(0, 0))
    assert len(read_nuclei(uri).types_N) == 0
    storage.publish_table(uri, pa.table({"x": [1]}))
    with pytest.raises(ValueError, match="expected a scellst_ray CELLS table, found no signature"):
        read_nuclei(uri)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jpg", b"", r"unknown suffix; expected one of .png"),
        ("a.png", b"\x89PNG cut", "cannot be read as an image; is the file cut off"),
        ("a.tif", b"II*", "cannot be read as .tif"),
        ("a.npy", b"\x93NUMPY\x01", "cannot be read as .npy"),
        ("a.npz", b"PK\x03\x04", "cannot be read as .npz"),
        ("a.csv", b"x;y\n1;2\n", "column x not found; it has x;y"),
        ("a.csv", b"X,y\n1,2\n", r"column x not found; it has X, y"),
        ("a.csv", b"x,y\n1,2\n3,\n", "row 2 has y None; expected a number"),
        ("a.csv", b"x,y\n1,inf\n", "row 1 has y 'inf'; expected a number"),
        ("a.csv", b"", "cannot be read as a table"),
    ],
)
def test_what_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as refused:
        read_nuclei(str(tmp_path / name))
    assert str(tmp_path / name) in str(refused.value)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros((4, 4, 3), np.uint8), r"holds uint8 \(4, 4, 3\); expected a label map"),
        (np.zeros((4, 4)), r"holds float64 \(4, 4\)"),
        (np.full((4, 4), -2), "holds the label -2"),
        (
            255 * (LABELS > 0),
            "all 2 connected parts have the number 255; .* Label the",
        ),
    ],
)
def test_maps_that_are_none(tmp_path, labels, message):
    with pytest.raises(ValueError, match=message):
        read_nuclei(str(write_map(tmp_path / "map.npy", labels)))


def test_missing_files_and_types_that_belong_nowhere(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.png: no such file"):
        read_nuclei(str(tmp_path / "gone.png"))
    (tmp_path / "a.csv").write_text("x,y\n1,2\n")
    with pytest.raises(ValueError, match="give a table of types for label maps only"):
        read_nuclei(str(tmp_path / "a.csv"), "types.csv")
    path = str(write_map(tmp_path / "map.png"))
    with pytest.raises(FileNotFoundError, match=r"types\.csv: no such file"):
        read_nuclei(path, str(tmp_path / "types.csv"))
