from scellst_ray.runs.sources import sources_of
from scellst_ray.slides.manifest import SlideRow

COLOURS = ((0.5, 0.4, 0.6), (0.1, 0.1, 0.2))


def test_the_image_and_its_size(tmp_path):
    slide = tmp_path / "a.tif"
    slide.write_bytes(b"12345")
    rows = [SlideRow("a", str(slide), 0.5), SlideRow("b", "s3://bucket/b.svs", None)]
    assert sources_of(rows, None, imported=False) == {
        "a": {"uri": str(slide), "mpp": 0.5, "bytes": 5},
        "b": {"uri": "s3://bucket/b.svs", "mpp": None, "bytes": None},
    }


def test_imported_nuclei_count_only_if_they_are_used(tmp_path):
    nuclei = tmp_path / "a.geojson"
    nuclei.write_bytes(b"[]")
    row = SlideRow("a", "/gone.tif", 0.5, columns={"segmentation": str(nuclei)})
    image = {"uri": "/gone.tif", "mpp": 0.5, "bytes": None}
    assert sources_of([row], None, imported=False) == {"a": image}
    expected = image | {"segmentation": str(nuclei), "segmentation_bytes": 2}
    assert sources_of([row], None, imported=True) == {"a": expected}
    without = SlideRow("a", "/gone.tif", 0.5)
    assert sources_of([without], None, imported=True) == {"a": image}


def test_colours_are_what_json_gives_back():
    rows = [SlideRow("a", "/a.tif", None), SlideRow("b", "/b.tif", None)]
    sources = sources_of(rows, {"a": COLOURS}, imported=False)
    assert sources["a"]["colours"] == [list(part) for part in COLOURS]
    assert sources["b"]["colours"] is None
