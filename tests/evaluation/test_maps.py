"""A gene map is a picture with the cells where they are on the slide."""

import numpy as np
import pytest
from PIL import Image

from scellst_ray.evaluation.maps import gene_map

SIZE0, MPP = (4000, 3000), 0.5


def cells(num, seed=0):
    rng = np.random.default_rng(seed)
    return rng.uniform((0, 0), SIZE0, (num, 2)), rng.gamma(2.0, 1.0, num)


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"), int)


@pytest.mark.parametrize("background", [False, True])
def test_picture(tmp_path, background):
    image = np.full((75, 100, 3), 230, np.uint8) if background else None
    panels = [("GENE1", *cells(500)), ("GENE2 true", *cells(300, 1))]
    gene_map(tmp_path / "map.png", panels, SIZE0, MPP, image)
    assert [path.name for path in tmp_path.iterdir()] == ["map.png"]
    picture = pixels(tmp_path / "map.png")
    num_panels = 2 + background
    assert picture.shape[1] == pytest.approx(4.6 * num_panels * 150, abs=2)
    assert picture.shape[0] == pytest.approx((4.2 * 3 / 4 + 0.6) * 150, abs=2)
    # Cells are coloured: viridis reaches from violet to yellow, in every panel.
    coloured = picture.max(axis=2) - picture.min(axis=2) > 60
    thirds = np.array_split(coloured, num_panels, axis=1)
    assert [bool(third.sum() > 500) for third in thirds[-2:]] == [True, True]


def test_y_points_down_as_on_the_slide(tmp_path):
    # All cells lie in the upper left quarter of the slide.
    xy0, values = cells(800)
    gene_map(tmp_path / "map.png", [("g", xy0 / 2, values)], SIZE0, MPP)
    picture = pixels(tmp_path / "map.png")
    # The colour bar on the right is cut off.
    coloured = (picture.max(axis=2) - picture.min(axis=2) > 60)[:, : int(picture.shape[1] * 0.78)]
    rows, columns = np.nonzero(coloured)
    assert rows.mean() < 0.42 * picture.shape[0]
    assert columns.mean() < 0.42 * picture.shape[1]


def test_no_cells_and_equal_values(tmp_path):
    none = ("none", np.zeros((0, 2)), np.zeros(0))
    equal = ("equal", cells(20)[0], np.ones(20))
    gene_map(tmp_path / "map.png", [none, equal], SIZE0, MPP)
    assert pixels(tmp_path / "map.png").shape[1] > 1000


def test_an_older_picture_is_replaced_only_by_a_whole_one(tmp_path):
    (tmp_path / "map.png").write_bytes(b"old")
    with pytest.raises(ValueError, match="size"):
        gene_map(tmp_path / "map.png", [("g", cells(50)[0], np.ones(40))], SIZE0, MPP)
    assert (tmp_path / "map.png").read_bytes() == b"old"
