"""Pictures of slides lie where the slide lies, and are of the file in which cells were found."""

import numpy as np

from scellst_ray.export.anndata import to_anndata
from scellst_ray.export.pictures import slide_picture
from scellst_ray.runs.documents import publish_document
from scellst_ray.runs.reading import open_run
from scellst_ray.runs.thumbnails import Thumbnail, publish_thumbnail
from scellst_ray.storage import node_cache
from tests.support import exported_runs
from tests.support.exported_runs import HEIGHT0, WIDTH0

predicted = exported_runs.predicted  # a fixture


def test_pictures_lie_where_the_slide_lies(predicted):
    thumbnail = slide_picture(predicted, "a", longest_px=150)
    assert thumbnail.image.shape == (100, 150, 3)
    assert thumbnail.ratio == 4
    assert thumbnail.image[50, 70].tolist() == [200, 120, 180]
    assert thumbnail.image[50, 80].tolist() == [90, 60, 140]
    assert slide_picture(predicted, "a", 5000).image.shape == (HEIGHT0, WIDTH0, 3)
    given = {"a": thumbnail, "b": Thumbnail(np.zeros((80, 120, 3), np.uint8), 5.0)}
    spatial = to_anndata(predicted, thumbnails=given).uns["spatial"]
    assert spatial["a"]["scalefactors"]["tissue_hires_scalef"] == 0.25
    assert spatial["b"]["images"]["hires"].shape == (80, 120, 3)


def test_the_picture_is_that_of_the_file_in_which_the_cells_were_found(predicted, tmp_path, caplog):
    source = f"{node_cache.fingerprint(str(tmp_path / 'a.png'))}-rest0000"
    record = predicted.records["a"] | {"source": source}
    publish_document(predicted.folder.record_uri("a"), record)
    assert slide_picture(open_run(predicted.uri), "a") is not None
    (tmp_path / "a.png").write_bytes((tmp_path / "b.png").read_bytes() + b"x")
    assert slide_picture(open_run(predicted.uri), "a") is None
    assert "a.png is another file now; it is exported with a blank picture" in caplog.text


def keep_thumbnail(run, side):
    """Keep a grey thumbnail of slide a, `side` px wide."""
    image = np.full((side * HEIGHT0 // WIDTH0, side, 3), 99, np.uint8)
    origin = {"slide_id": "a", "source": None, "ratio": WIDTH0 / side}
    publish_thumbnail(run.folder.thumbnail_uri("a"), image, origin)


def test_a_thumbnail_of_enough_px_is_taken_and_the_slide_not_read(predicted):
    keep_thumbnail(predicted, 300)
    for side in (300, 150, 75):
        picture = slide_picture(predicted, "a", side)
        assert picture.image.shape == (side * HEIGHT0 // WIDTH0, side, 3)
        assert picture.ratio == WIDTH0 / side
        assert (abs(picture.image.astype(int) - 99) < 3).all()
    assert slide_picture(predicted, "a", 600).image.shape == (HEIGHT0, WIDTH0, 3)


def test_a_small_thumbnail_stands_for_a_slide_that_is_gone(predicted, tmp_path, caplog):
    (tmp_path / "a.png").unlink()
    assert slide_picture(predicted, "a", 600) is None
    assert "a.png is gone; it is exported with a blank picture" in caplog.text
    keep_thumbnail(predicted, 60)
    assert slide_picture(predicted, "a", 600).image.shape == (60 * HEIGHT0 // WIDTH0, 60, 3)


def test_a_slide_that_cannot_be_read_costs_its_picture_alone(predicted, tmp_path, caplog):
    (tmp_path / "a.png").write_bytes(b"no picture")
    assert slide_picture(predicted, "a") is None
    assert "a.png: neither OpenSlide nor Pillow can read it" in caplog.text
    assert "it is exported with a blank picture" in caplog.text
    keep_thumbnail(predicted, 300)
    path = tmp_path / "run" / "thumbnails" / "a.jpg"
    path.write_bytes(path.read_bytes()[:-9])
    assert slide_picture(predicted, "a", 150) is None
    assert "a.jpg" in caplog.text
