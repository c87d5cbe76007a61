"""Pictures of slides lie where the slide lies, and are of the file in which cells were found."""

import numpy as np

from scellst_ray.export.anndata import to_anndata
from scellst_ray.export.pictures import Thumbnail, read_thumbnail
from scellst_ray.runs.documents import publish_document
from scellst_ray.runs.reading import open_run
from scellst_ray.storage import node_cache
from tests.support import exported_runs
from tests.support.exported_runs import HEIGHT0, WIDTH0

predicted = exported_runs.predicted  # a fixture


def test_pictures_lie_where_the_slide_lies(predicted):
    thumbnail = read_thumbnail(predicted, "a", longest_px=150)
    assert thumbnail.image.shape == (100, 150, 3)
    assert thumbnail.ratio == 4
    assert thumbnail.image[50, 70].tolist() == [200, 120, 180]
    assert thumbnail.image[50, 80].tolist() == [90, 60, 140]
    assert read_thumbnail(predicted, "a", 5000).image.shape == (HEIGHT0, WIDTH0, 3)
    given = {"a": thumbnail, "b": Thumbnail(np.zeros((80, 120, 3), np.uint8), 5.0)}
    spatial = to_anndata(predicted, thumbnails=given).uns["spatial"]
    assert spatial["a"]["scalefactors"]["tissue_hires_scalef"] == 0.25
    assert spatial["b"]["images"]["hires"].shape == (80, 120, 3)


def test_the_picture_is_that_of_the_file_in_which_the_cells_were_found(predicted, tmp_path, caplog):
    source = f"{node_cache.fingerprint(str(tmp_path / 'a.png'))}-rest0000"
    record = predicted.records["a"] | {"source": source}
    publish_document(predicted.folder.record_uri("a"), record)
    assert read_thumbnail(open_run(predicted.uri), "a") is not None
    (tmp_path / "a.png").write_bytes((tmp_path / "b.png").read_bytes() + b"x")
    assert read_thumbnail(open_run(predicted.uri), "a") is None
    assert "a.png is another file now; it is exported with a blank picture" in caplog.text
