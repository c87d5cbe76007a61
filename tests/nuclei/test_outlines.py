import cv2
import numpy as np
import pytest
from scipy import ndimage
from skimage.measure import find_contours

from scellst_ray.nuclei.outlines import edge_middles, pixel_chains, run_offsets
from tests.support.contours import pixel_contours


def blobs(seed, structure=None):
    """Return a label map with touching parts, of 4- or 8-connected labels."""
    rng = np.random.default_rng(seed)
    noise = ndimage.gaussian_filter(rng.random((30, 40)), rng.choice([0, 0.7, 1.5]))
    return ndimage.label(noise > np.quantile(noise, 0.6), structure)[0].astype(np.int32)


def outlines_of(labels):
    boxes = ndimage.find_objects(labels)
    chains, broken = pixel_chains(labels, boxes, np.arange(len(boxes)))
    points, lengths = edge_middles(np.concatenate(chains), np.array([len(c) for c in chains]))
    return np.split(points, run_offsets(lengths)[1:-1]), broken


@pytest.mark.parametrize("seed", range(8))
def test_outlines_are_those_of_marching_squares(seed):
    labels = blobs(seed, np.ones((3, 3)))
    outlines, broken = outlines_of(labels)
    for label, outline in enumerate(outlines, start=1):
        mask = np.pad(labels == label, 1).astype(float)
        lines = find_contours(mask, 0.5, fully_connected="high")
        assert broken[label - 1] == (len(lines) > 1)
        outer = max(lines, key=lambda line: np.ptp(line, axis=0).prod())[:-1, ::-1] - 0.5
        corner = (np.roll(outer, -1, axis=0) - outer != outer - np.roll(outer, 1, axis=0)).any(1)
        expected = outer[corner]
        assert {tuple(p) for p in outline} == {tuple(p) for p in expected}
        assert len(outline) == len(expected)


@pytest.mark.parametrize("seed", range(8))
def test_pixel_contours_follow_the_boundary_and_have_no_straight_runs(seed):
    labels = blobs(seed)
    for label, contour in enumerate(pixel_contours(labels), start=1):
        assert contour.dtype == np.int32
        mask = labels == label
        drawn = np.zeros(labels.shape, np.uint8)
        cv2.polylines(drawn, [contour], isClosed=True, color=1)
        outside = ~ndimage.binary_fill_holes(np.pad(mask, 1))
        edge = ndimage.binary_dilation(outside)[1:-1, 1:-1] & mask
        np.testing.assert_array_equal(drawn > 0, edge)
        if len(contour) > 2:
            step = np.sign(np.roll(contour, -1, axis=0) - contour)
            assert (step != np.roll(step, 1, axis=0)).any(axis=1).all()


def test_points_and_lines_have_one_and_two_points():
    labels = np.zeros((6, 8), np.int32)
    labels[0, 7] = 1
    labels[3, 1:6] = 2
    labels[5, 0] = 3
    assert [c.tolist() for c in pixel_contours(labels)] == [[[7, 0]], [[1, 3], [5, 3]], [[0, 5]]]


def test_offsets():
    assert run_offsets(np.array([3, 0, 2])).tolist() == [0, 3, 3, 5]
    assert run_offsets(np.zeros(0, np.int64)).tolist() == [0]
