import numpy as np
from PIL import Image

from scellst_ray.evaluation.encoder.galleries import (
    GAP_PX,
    OTHER,
    QUERY,
    RIM_PX,
    SAME,
    SCALE,
    choose_queries,
    gallery,
    mosaic,
    retrieve,
)

TYPES = np.array(["a"] * 5 + ["b"] * 2 + ["c"] * 9)
SLIDES = np.array(["s", "t"] * 8)


def made_crops(num=16, side=6):
    """Return crops of one grey level each."""
    return np.arange(num, dtype=np.uint8)[:, None, None, None] * np.ones((side, side, 3), np.uint8)


def test_queries_are_some_of_every_type():
    chosen = choose_queries(TYPES, 3, seed=1)
    assert TYPES[chosen].tolist() == ["a"] * 3 + ["b"] * 2 + ["c"] * 3
    assert len(set(chosen.tolist())) == len(chosen)
    np.testing.assert_array_equal(chosen, choose_queries(TYPES, 3, seed=1))
    assert set(choose_queries(TYPES, 100).tolist()) == set(range(16))


def test_what_is_retrieved_is_the_most_similar_of_other_slides():
    x_ND = np.random.default_rng(0).normal(3, 2, size=(16, 5))
    queries = np.array([3, 8, 15])
    near_QK = retrieve(x_ND, SLIDES, queries, 4)
    scaled = (x_ND - x_ND.mean(axis=0)) / x_ND.std(axis=0)
    scaled /= np.linalg.norm(scaled, axis=1, keepdims=True)
    for query, near in zip(queries, near_QK, strict=True):
        elsewhere = np.flatnonzero(SLIDES[query] != SLIDES)
        order = np.argsort(-(scaled[elsewhere] @ scaled[query]))
        np.testing.assert_array_equal(near, elsewhere[order[:4]])
    assert retrieve(x_ND, SLIDES, queries, 50).shape == (3, 8)


def test_a_mosaic_has_every_crop_in_its_place_with_its_rim():
    crops = made_crops()
    queries, near = np.array([0, 6]), np.array([[1, 6, 4], [5, 15, 0]])
    image = mosaic(crops, TYPES, queries, near)
    step = 6 * SCALE + GAP_PX
    assert image.shape == (2 * step + GAP_PX, 4 * step + GAP_PX, 3)
    cells = np.concatenate([queries[:, None], near], axis=1)
    rims = [[QUERY, SAME, OTHER, SAME], [QUERY, SAME, OTHER, OTHER]]
    for row in range(2):
        for column in range(4):
            top, left = row * step + GAP_PX, column * step + GAP_PX
            inside = image[top : top + 6 * SCALE, left : left + 6 * SCALE]
            assert (inside == cells[row, column]).all()
            for distance in (1, RIM_PX):
                assert tuple(image[top - distance, left]) == rims[row][column]
                assert tuple(image[top, left - distance]) == rims[row][column]
            assert tuple(image[top - RIM_PX - 1, left]) == (255, 255, 255)
    coloured = (image != 255).any(axis=2).sum()
    assert coloured == 8 * (6 * SCALE + 2 * RIM_PX) ** 2


def test_a_gallery_is_a_picture_of_them(tmp_path):
    crops = made_crops(side=48) * 10
    queries = choose_queries(TYPES, 2)
    near = retrieve(np.random.default_rng(0).normal(size=(16, 5)), SLIDES, queries, 5)
    path = tmp_path / "gallery.png"
    gallery(path, crops, TYPES, SLIDES, (queries, near), "nearest")
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    shown = {tuple(colour) for colour in np.unique(pixels.reshape(-1, 3), axis=0)}
    for cell in np.concatenate([queries, near.ravel()]):
        assert tuple(crops[cell, 0, 0]) in shown
    assert [entry.name for entry in tmp_path.iterdir()] == ["gallery.png"]
