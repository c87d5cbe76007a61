import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scellst_ray.core.geometry import Box, Frame
from scellst_ray.slides.reader import _on_grid
from scellst_ray.slides.tiling import default_read_mpp, network_read_mpp, plan_tiles

sizes = st.tuples(st.integers(1, 3000), st.integers(1, 3000))
ratios = st.one_of(
    st.floats(0.2, 5),
    st.sampled_from([0.687 / 0.25, 0.5 / 0.687, 0.5 / 0.499, 1 / 3, 2 / 3, 1.0, 4.0]),
)
cores = st.integers(200, 1200)


def everywhere(size0):
    """Return a mask of one pixel that is tissue, and its frame."""
    return np.ones((1, 1), bool), Frame(0, 0, *size0)


@settings(max_examples=150, deadline=None)
@given(sizes, ratios, cores, st.data())
def test_every_point_lies_in_exactly_one_core(size0, ratio, core_px, data):
    tiles = plan_tiles(size0, ratio, *everywhere(size0), core_px)
    assert sum(tile.core.w0 * tile.core.h0 for tile in tiles) == size0[0] * size0[1]
    edges_x = sorted({tile.core.x0 for tile in tiles})
    edges_y = sorted({tile.core.y0 for tile in tiles})
    below = st.floats(0, 1, exclude_max=True)
    points = [
        (data.draw(below) * size0[0], data.draw(below) * size0[1]),
        (data.draw(st.sampled_from(edges_x)), data.draw(st.sampled_from(edges_y))),
        (size0[0] - 1e-6, size0[1] - 1e-6),
        (0.0, 0.0),
    ]
    owners = sum(tile.core.contains(np.array(points)).astype(int) for tile in tiles)
    np.testing.assert_array_equal(owners, 1)


@settings(max_examples=100, deadline=None)
@given(sizes, ratios, cores, st.integers(0, 100))
def test_cores_and_halos_have_the_size_asked_for(size0, ratio, core_px, halo_px):
    tiles = plan_tiles(size0, ratio, *everywhere(size0), core_px, halo_px)
    assert [tile.tile_id for tile in tiles] == list(range(len(tiles)))
    # The core's edge is rounded (0.5), the read inwards (1), the box grown by a whole number (2).
    rounding = 3.5
    for tile in tiles:
        # The halo, up to rounding, on every side.
        near, far = tile.read, tile.core.grow(math.ceil(halo_px * ratio) + 1)
        assert 0 <= near.x0 - far.x0 <= rounding
        assert 0 <= near.y0 - far.y0 <= rounding
        assert 0 <= (far.x0 + far.w0) - (near.x0 + near.w0) <= rounding
        assert 0 <= (far.y0 + far.h0) - (near.y0 + near.h0) <= rounding
        assert 0 < tile.core.w0 <= core_px * ratio + 1
        assert 0 < tile.core.h0 <= core_px * ratio + 1
        if tile.core.x0 + tile.core.w0 < size0[0]:
            assert abs(tile.core.w0 - core_px * ratio) <= 1
        # The true step, not a rounded one: no drift towards the far end.
        column = round(tile.core.x0 / (core_px * ratio))
        assert abs(tile.core.x0 - column * core_px * ratio) <= 0.5


@settings(max_examples=200, deadline=None)
@given(sizes, st.floats(0.26, 5), st.integers(16, 240), st.integers(1, 20))
def test_a_tile_is_read_in_one_size_whatever_the_resolution(size0, ratio, cores, halos):
    """A network takes tiles of one size; the grid of pixels must not add any."""
    core_px, halo_px = 4 * cores, 4 * halos
    tiles = plan_tiles(size0, ratio, *everywhere(size0), core_px, halo_px)
    for axis in range(2):
        # Tiles of one column share their span along x, those of one row along y.
        spans = {(*tile.read[axis::2], *tile.core[axis::2]) for tile in tiles}
        for read_start, read_size, core_start, core_size in spans:
            first, size = _on_grid(read_start, read_size, ratio)
            index = round(core_start / (core_px * ratio))
            assert first == index * core_px - halo_px
            assert size <= core_px + 2 * halo_px
            if core_start + core_size < size0[axis] - halo_px * ratio - 8:
                assert size == core_px + 2 * halo_px


@pytest.mark.parametrize(
    ("mpp", "read"),
    [(0.12, 0.25), (0.2, 0.2), (0.2431, 0.2431), (0.3, 0.3), (0.31, 0.25), (0.75, 0.25)],
)
def test_cellvit_sees_about_a_quarter_um_per_px(mpp, read):
    assert network_read_mpp(mpp, "slide.svs") == read


def test_cellvit_refuses_coarse_slides():
    with pytest.raises(ValueError, match=r"slide\.svs: 0\.9 um/px is coarser than 0\.75"):
        network_read_mpp(0.9, "slide.svs")


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.5, 3))
def test_ids_and_boxes_do_not_depend_on_the_mask(seed, ratio):
    size0, frame = (2967, 2219), Frame(0, 0, 2967 / 37, 2219 / 28)
    mask = np.random.default_rng(seed).random((28, 37)) < 0.02
    all_tiles = {t.tile_id: t for t in plan_tiles(size0, ratio, np.ones_like(mask), frame, 300)}
    some = plan_tiles(size0, ratio, mask, frame, 300)
    assert all(all_tiles[tile.tile_id] == tile for tile in some)
    # Slow twin: a core is planned if and only if it touches a pixel of tissue.
    wanted = set()
    for row, column in zip(*np.nonzero(mask), strict=True):
        left, top = column * frame.ratio_x, row * frame.ratio_y
        right, bottom = left + frame.ratio_x, top + frame.ratio_y
        for tile in all_tiles.values():
            x0, y0, w0, h0 = tile.core
            overlap_x = min(x0 + w0, right) - max(x0, left)
            overlap_y = min(y0 + h0, bottom) - max(y0, top)
            if overlap_x > 1e-6 and overlap_y > 1e-6:
                wanted.add(tile.tile_id)
    assert wanted == {tile.tile_id for tile in some}


def test_no_tissue_no_tile():
    assert plan_tiles((500, 400), 1.0, np.zeros((5, 5), bool), Frame(0, 0, 100, 80)) == []


def test_axes_are_not_swapped():
    mask = np.zeros((2, 4), bool)
    mask[1, 3] = True  # the far right of the lower half
    (tile,) = plan_tiles((400, 200), 1.0, mask, Frame(0, 0, 100, 100), core_px=100, halo_px=7)
    assert tile.tile_id == 7
    assert tile.core == Box(300, 100, 100, 100)
    assert tile.read == Box(293, 93, 114, 114)


def test_a_slide_smaller_than_a_core_is_one_tile():
    (tile,) = plan_tiles((50, 30), 2.0, *everywhere((50, 30)))
    assert tile.core == Box(0, 0, 50, 30)


@pytest.mark.parametrize(
    ("mpp", "read"), [(0.12, 0.25), (0.25, 0.25), (0.3, 0.3), (0.5, 0.5), (0.687, 0.5), (1.0, 0.5)]
)
def test_default_read_mpp(mpp, read):
    assert default_read_mpp(mpp) == read
