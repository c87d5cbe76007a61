import numpy as np
import polars as pl
import pytest
from PIL import Image

from scellst_ray import storage
from scellst_ray.evaluation.encoder.typed_crops import (
    TypedPoints,
    colours,
    crops_at,
    crops_of,
    points_of_manifest,
    points_of_run,
)
from scellst_ray.slides.reader import Slide
from scellst_ray.slides.source import ChangedFileError
from scellst_ray.storage import node_cache
from tests.support.small_run import write_small_run


def test_crops_are_those_that_extract_cuts(synthetic_slide, segmented_rows):
    """Compare tile by tile: both read other boxes, and centroids are stored as float32."""
    with Slide(synthetic_slide.slide) as slide:
        for row in segmented_rows():
            cells = row["cells"]
            if not len(cells):
                continue
            x0y0 = np.stack([cells["x0"].to_numpy(), cells["y0"].to_numpy()], axis=1)
            ours = crops_at(slide, x0y0.astype(np.float64))
            difference = np.abs(ours.astype(int) - row["crops"].astype(int))
            assert difference.max() <= 8
            assert difference.mean() < 0.05


def test_a_slide_larger_than_a_tile(tmp_path):
    """Every point lies on the only pixel of its colour, in any tile."""
    rng = np.random.default_rng(0)
    image = np.full((2300, 1500, 3), 255, np.uint8)
    points = rng.integers(40, (1460, 2260), size=(60, 2))
    for number, (x, y) in enumerate(points):
        image[y - 5 : y + 5, x - 5 : x + 5] = (number, 200, 2 * number)
    Image.fromarray(image).save(tmp_path / "s.png")
    with Slide(tmp_path / "s.png", mpp=0.4) as slide:
        crops = crops_at(slide, points.astype(np.float64))
    later = {tuple(points[n]): n for n in range(60)}  # squares drawn later lie above
    for (x, y), crop in zip(points, crops, strict=True):
        near = [n for (u, v), n in later.items() if max(abs(u - x), abs(v - y)) < 6]
        assert crop[23:25, 23:25, 0].max() == max(near)


def test_colours_one_by_one():
    crops = np.random.default_rng(0).integers(0, 256, (5, 48, 48, 3)).astype(np.uint8)
    found = colours(crops)
    assert (found.shape, found.dtype) == ((5, 18), np.float32)
    for crop, row in zip(crops, found, strict=True):
        for channel in range(3):
            values = crop[..., channel].ravel().astype(float)
            expected = [values.mean(), values.std()]
            expected += [np.percentile(values, q) for q in (5, 25, 75, 95)]
            np.testing.assert_allclose(row[channel::3], expected, rtol=1e-5)


@pytest.fixture
def annotated(tmp_path):
    """Return a manifest of two images with typed points, by relative paths."""
    rng = np.random.default_rng(1)
    for name in "st":
        image = rng.integers(0, 256, (100, 120, 3)).astype(np.uint8)
        Image.fromarray(image).save(tmp_path / f"{name}.png")
        rows = {"x": [10.5, 60.0, 119.0], "y": [50.0, 20.0, 99.0], "type": ["a", "b", None]}
        pl.DataFrame(rows).write_csv(tmp_path / f"{name}.csv")
    lines = ["slide_id,uri,points,mpp", "s,s.png,s.csv,0.5", "t,t.png,t.csv,0.25"]
    (tmp_path / "m.csv").write_text("\n".join(lines) + "\n")
    return tmp_path / "m.csv"


def test_points_and_crops_of_a_manifest(annotated, monkeypatch):
    for uri in (str(annotated), "m.csv"):
        monkeypatch.chdir(annotated.parent)
        listed = points_of_manifest(uri)
        assert [(p.slide_id, p.mpp, p.types_N.tolist()) for p in listed] == [
            ("s", 0.5, ["a", "b", ""]),
            ("t", 0.25, ["a", "b", ""]),
        ]
        np.testing.assert_array_equal(listed[0].x0y0_N2, [[10.5, 50], [60, 20], [119, 99]])
    cells = crops_of([listed[0], listed[1].take(np.array([False, True, True]))])
    assert cells.groups_N.tolist() == ["s", "s", "s", "t", "t"]
    assert cells.types_N.tolist() == ["a", "b", "", "b", ""]
    # At 0.25 um/px a crop has the pixels of the image; beyond the image it is white.
    image = np.asarray(Image.open(annotated.parent / "t.png"))
    np.testing.assert_array_equal(cells.crops_NHWC[3][4:], image[:44, 36:84])
    assert (cells.crops_NHWC[3][:4] == 255).all()


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("s,s.png,,0.5", "slide 's' has no points"),
        ("s,s.png,s.csv,9", "mpp 9 is outside"),
        ("s,s.png,no.csv,0.5", "no.csv: no such file"),
    ],
)
def test_manifests_that_cannot_be_used(annotated, line, reason):
    annotated.write_text(f"slide_id,uri,points,mpp\n{line}\n")
    with pytest.raises((ValueError, FileNotFoundError), match=reason):
        points_of_manifest(str(annotated))


def test_points_of_another_image_are_refused(annotated):
    listed = points_of_manifest(str(annotated))[0]
    elsewhere = TypedPoints("s", listed.uri, 0.5, listed.x0y0_N2 * 1.01, listed.types_N)
    with pytest.raises(ValueError, match=r"slide 's': 1 of 3 points lie outside its 120 x 100 px"):
        crops_of([elsewhere])


def test_cells_of_a_run(tmp_path):
    small = write_small_run(tmp_path)
    with pytest.raises(ValueError, match=r"slides\.json does not name the image of slide 's0'"):
        points_of_run(small.run.uri)
    sources = {name: {"uri": f"{name}.tiff", "mpp": 0.5} for name in ("s0", "s1")}
    storage.publish_json(f"{small.run.uri}/slides.json", sources)
    listed = points_of_run(small.run.uri, ["s1"])
    cells = storage.read_table(small.run.cells_uri("s1"))
    assert [(p.slide_id, p.uri, p.mpp) for p in listed] == [("s1", "s1.tiff", 0.5)]
    np.testing.assert_array_equal(listed[0].x0y0_N2[:, 0], cells["x0"].to_numpy())
    np.testing.assert_array_equal(listed[0].x0y0_N2[:, 1], cells["y0"].to_numpy())
    assert listed[0].types_N.tolist() == cells["nucleus_type"].to_pylist()
    assert len(points_of_run(small.run.uri)) == 2
    record = storage.read_json(small.run.record_uri("s1"))
    storage.publish_json(small.run.record_uri("s1"), record | {"source": "a-b-c"})
    assert [p.source for p in points_of_run(small.run.uri)] == [None, "a-b-c"]


def test_crops_of_a_run_are_cut_from_the_file_that_it_read(synthetic_slide):
    slide = str(synthetic_slide.slide)
    fingerprint = node_cache.fingerprint(slide)
    place = ("s", slide, 0.5, np.array([[90.0, 90.0]]), np.array(["a"]))
    assert len(crops_of([TypedPoints(*place, f"{fingerprint}-rest0000")]).types_N) == 1
    other = TypedPoints(*place, f"{'0' * 16}-00000000-rest0000")
    with pytest.raises(ChangedFileError, match="another one than that in which the run found"):
        crops_of([other])
