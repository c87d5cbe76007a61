"""Colours of discs against loops over pixels, and the ridge on them against a known rule."""

import cv2
import numpy as np
import pytest
from scipy import sparse

from scellst_ray.evaluation.expression.colour_baseline import (
    fit_colour_ridge,
    slide_colours,
    slide_mpp,
)
from scellst_ray.slides.manifest import SlideRow
from scellst_ray.spots.table import Spots


def spots_at(xy0, radius0):
    ids = np.array([f"s{i}" for i in range(len(xy0))])
    counts = sparse.csr_matrix(np.ones((len(xy0), 1), np.float32))
    return Spots(ids, np.asarray(xy0, float).reshape(-1, 2), radius0, counts, ["A"])


@pytest.fixture
def slide(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (200, 240, 3), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / "s.png"), image[..., ::-1])
    return SlideRow("s", str(tmp_path / "s.png"), 1.0, None, {}), image


def test_statistics_equal_a_loop_over_pixels(slide):
    row, image = slide
    centres = [(60.0, 70.5), (120.3, 90.8)]
    found = slide_colours(row, spots_at(centres, 14.0))
    for place, (x0, y0) in enumerate(centres):
        inside = [
            image[y, x]
            for y in range(200)
            for x in range(240)
            if (x + 0.5 - x0) ** 2 + (y + 0.5 - y0) ** 2 <= 14**2
        ]
        pixels = np.array(inside, float)
        mean, deviation = pixels.mean(0), pixels.std(0)
        # The square that is read may cut the disc by half a pixel.
        np.testing.assert_allclose(found[place, :3], mean, rtol=0.02)
        np.testing.assert_allclose(found[place, 3:6], deviation, rtol=0.02)
        quantiles = [np.quantile(pixels[:, c], q) for q in (0.1, 0.25, 0.75, 0.9) for c in range(3)]
        np.testing.assert_allclose(found[place, 6:], quantiles, rtol=0.05, atol=3)
    assert slide_colours(row, spots_at([], 14.0)).shape == (0, 18)
    assert slide_mpp(row) == 1.0


def test_ridge_learns_what_is_linear_in_colours():
    rng = np.random.default_rng(0)
    colours = rng.normal(size=(300, 18)) * rng.uniform(1, 50, 18) + 100
    weights = rng.normal(size=(18, 3)) / colours.std(0)[:, None]
    targets = colours @ weights + 0.1 * rng.normal(size=(300, 3))
    fitted = fit_colour_ridge(colours[:200], targets[:200])
    found = fitted.predict(colours[200:])
    assert found.shape == (100, 3)
    assert np.abs(found - targets[200:]).mean() < 0.15
    # It works for one gene, too, and constant colours predict the mean.
    noise = rng.normal(size=(200, 1))
    flat = fit_colour_ridge(colours[:200], noise).predict(colours[200:])
    assert flat.shape == (100, 1)
    assert flat.std() < 0.3 * noise.std()
