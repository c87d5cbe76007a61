"""Thumbnails say what they are of, and damage is noticed."""

import numpy as np
import pytest

from scellst_ray import storage
from scellst_ray.runs.folder import RunFolder
from scellst_ray.runs.thumbnails import LONGEST_PX, publish_thumbnail, read_thumbnail

SOURCE = "0123456789abcdef-11111111-22222222"


def picture(height, width):
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows % 256, columns % 256, (rows + columns) % 256], axis=-1).astype(np.uint8)


@pytest.fixture(params=["{tmp}/run", "memory://thumbnails/run"])
def run(request, tmp_path):
    return RunFolder(request.param.format(tmp=tmp_path), "0123")


def keep(run, image, slide_id="S", source=SOURCE):
    origin = {"slide_id": slide_id, "source": source, "ratio": 16.0}
    publish_thumbnail(run.thumbnail_uri("S"), image, origin)


def record(slide_id="S", source=SOURCE):
    return {"slide_id": slide_id, "source": source}


@pytest.mark.parametrize("shape", [(120, 90), (2500, 400), (1, 1), (1001, 1000)])
def test_a_picture_comes_back_and_is_small(run, shape):
    keep(run, picture(*shape))
    found = read_thumbnail(run, record())
    height, width = found.image.shape[:2]
    assert max(height, width) == min(max(shape), LONGEST_PX)
    assert width * found.ratio == pytest.approx(16.0 * shape[1])
    assert height * found.ratio == pytest.approx(16.0 * shape[0], rel=0.02)
    if shape == (120, 90):
        assert np.abs(found.image.astype(int) - picture(*shape)).mean() < 12


def test_the_same_picture_gives_the_same_bytes(run):
    keep(run, picture(300, 200))
    first = storage.read_bytes(run.thumbnail_uri("S"))
    keep(run, picture(300, 200))
    assert storage.read_bytes(run.thumbnail_uri("S")) == first


def test_earlier_runs_have_none(run):
    assert read_thumbnail(run, record("T")) is None


def test_a_changed_byte_is_noticed(run):
    """Each byte of the comment, and some of the picture."""
    keep(run, picture(60, 40))
    whole = storage.read_bytes(run.thumbnail_uri("S"))
    for place in [*range(200), 600, len(whole) - 1]:
        content = bytearray(whole)
        content[place] ^= 8
        storage.publish_bytes(run.thumbnail_uri("S"), bytes(content))
        with pytest.raises(storage.DamagedFileError, match=r"S\.jpg"):
            read_thumbnail(run, record())


@pytest.mark.parametrize("length", [0, 1, 5, 100, 4000])
def test_a_cut_file_is_noticed(run, length):
    keep(run, picture(300, 200))
    content = storage.read_bytes(run.thumbnail_uri("S"))
    storage.publish_bytes(run.thumbnail_uri("S"), content[:length])
    with pytest.raises(storage.DamagedFileError, match="is damaged"):
        read_thumbnail(run, record())


def test_the_picture_of_another_slide_is_refused(run):
    keep(run, picture(30, 20), slide_id="T")
    with pytest.raises(storage.DamagedFileError, match="another slide"):
        read_thumbnail(run, record())
    keep(run, picture(30, 20), source="f" * 16 + "-11111111-22222222")
    with pytest.raises(storage.DamagedFileError, match="another slide"):
        read_thumbnail(run, record())


def test_a_copy_of_the_slide_and_an_unknown_source_are_the_same(run):
    keep(run, picture(30, 20), source="0123456789abcdef-99999999-22222222")
    assert read_thumbnail(run, record()) is not None
    keep(run, picture(30, 20), source=None)
    assert read_thumbnail(run, record()) is not None
    assert read_thumbnail(run, record(source=None)) is not None
