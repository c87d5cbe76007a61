import cv2
import numpy as np
import pytest
from scipy.ndimage import map_coordinates

from scellst_ray.nuclei.crops import crop_nuclei

SIZE = 48


def textured(height, width, seed=0, sigma=1.5):
    noise = np.random.default_rng(seed).uniform(0, 255, (height, width, 3))
    smooth = cv2.GaussianBlur(noise, (0, 0), sigma)
    low, high = smooth.min(), smooth.max()
    return np.rint((smooth - low) / (high - low) * 255).astype(np.uint8)


def by_scipy(image, x, y, mpp_x, mpp_y):
    """Return a crop sampled at each pixel centre in turn."""
    offsets = ((np.arange(SIZE) + 0.5) / SIZE - 0.5) * 12.0  # um
    rows, columns = y + offsets / mpp_y - 0.5, x + offsets / mpp_x - 0.5
    at = np.meshgrid(rows, columns, indexing="ij")
    planes = [
        map_coordinates(image[..., c].astype(float), at, order=1, mode="grid-constant", cval=255)
        for c in range(3)
    ]
    return np.stack(planes, axis=-1)


@pytest.mark.parametrize("mpp", [0.25, 0.3, 0.499, 0.5, 0.687, 1.0])
def test_equals_linear_interpolation_at_0_25_and_coarser(mpp):
    image = textured(130, 170)
    centres = np.array([(80.0, 60.0), (81.37, 64.81), (0.0, 0.0), (169.2, 129.9), (3.5, 120.5)])
    crops = crop_nuclei(image, centres, (1 / mpp, 1 / mpp))
    assert crops.shape == (5, SIZE, SIZE, 3)
    assert crops.dtype == np.uint8
    for crop, (x, y) in zip(crops, centres, strict=True):
        difference = np.abs(crop - by_scipy(image, x, y, mpp, mpp))
        # OpenCV places samples to 1/32 px.
        assert difference.max() <= 5
        assert difference.mean() < 0.8


def test_x_and_y_may_have_their_own_resolution():
    image = textured(100, 200)
    (crop,) = crop_nuclei(image, np.array([(120.4, 40.2)]), (1 / 0.5, 1 / 0.4))
    assert np.abs(crop - by_scipy(image, 120.4, 40.2, 0.5, 0.4)).max() <= 5


@pytest.mark.parametrize(
    ("factor", "x", "y", "sigma"),
    # A centre on the grid of the shrunk image, then one off it with a coarser texture.
    [
        (3, 210, 150, 0.8),
        (4, 208, 152, 0.8),
        (2.5, 210, 150, 0.8),
        (4, 210, 150, 5),
        (3, 211, 149, 4),
    ],
)
def test_a_finer_image_is_averaged_not_sampled(factor, x, y, sigma):
    fine = textured(300, 420, sigma=sigma)
    mpp = 0.25 / factor
    (crop,) = crop_nuclei(fine, np.array([(float(x), float(y))]), (1 / mpp, 1 / mpp))
    # Area averages over each crop pixel, from the picture enlarged by a whole factor.
    side = 10
    span = round(SIZE * factor / 2)
    window = fine[y - span : y + span, x - span : x + span]
    large = window.repeat(side, axis=0).repeat(side, axis=1).astype(float)
    step = large.shape[0] // SIZE
    means = large.reshape(SIZE, step, SIZE, step, 3).mean(axis=(1, 3))
    assert np.abs(crop - means).mean() < 2.5
    if sigma < 1:
        sampled = by_scipy(fine, x, y, mpp, mpp)
        assert np.abs(crop - means).mean() < 0.5 * np.abs(sampled - means).mean()


@pytest.mark.parametrize("mpp", [0.1, 0.2272, 0.25, 0.5, 1.0])
def test_white_beyond_the_image(mpp):
    image = np.zeros((200, 260, 3), np.uint8)
    reach = 6.0 / mpp
    (corner, outside, inside) = crop_nuclei(
        image, np.array([(0.0, 0.0), (-3 * reach, 50.0), (130.0, 100.0)]), (1 / mpp, 1 / mpp)
    )
    assert (outside == 255).all()
    blend = 2 + int(0.25 / mpp)  # px of the transition from black to white
    assert (corner[: 24 - blend] == 255).all()
    assert (corner[:, : 24 - blend] == 255).all()
    if reach < 100:
        assert (corner[24 + blend :, 24 + blend :] == 0).all()
        assert (inside == 0).all()


@pytest.mark.parametrize("mpp", [0.1, 0.17, 0.25, 0.33, 0.5, 1.0])
@pytest.mark.parametrize(("x", "y"), [(150.5, 120.5), (151.0, 119.25), (149.81, 121.37)])
def test_a_symmetric_dot_is_centred(mpp, x, y):
    height, width = 241, 307
    rows, columns = np.arange(height) + 0.5, np.arange(width) + 0.5
    sigma = 1.5 / mpp  # um
    dot = np.exp(-((columns[None] - x) ** 2 + (rows[:, None] - y) ** 2) / (2 * sigma**2))
    image = np.rint(255 - 200 * dot)[..., None].repeat(3, axis=2).astype(np.uint8)
    (crop,) = crop_nuclei(image, np.array([(x, y)]), (1 / mpp, 1 / mpp))
    weight = 255.0 - crop[..., 0]
    v, u = np.mgrid[:SIZE, :SIZE] + 0.5
    centre = np.array([(u * weight).sum(), (v * weight).sum()]) / weight.sum()
    np.testing.assert_allclose(centre, SIZE / 2, atol=0.1)


def test_no_nuclei_no_crops():
    assert crop_nuclei(textured(20, 30), np.zeros((0, 2)), (2.0, 2.0)).shape == (0, SIZE, SIZE, 3)
    assert crop_nuclei(textured(20, 30), np.zeros((0, 2)), (9.0, 9.0)).shape == (0, SIZE, SIZE, 3)


def test_other_sizes_and_reach():
    image = textured(100, 120)
    crops = crop_nuclei(image, np.array([(60.0, 50.0)]), (2.0, 2.0), crop_um=10, crop_px=20)
    np.testing.assert_array_equal(crops[0], image[40:60, 50:70])
