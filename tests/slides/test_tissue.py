import numpy as np
import pytest
from skimage.draw import disk

from scellst_ray.slides.reader import Slide
from scellst_ray.slides.tissue import MIN_TISSUE_UM2, tissue_mask

MPP = 8.0
PINK, PURPLE = np.array([205, 140, 190]), np.array([120, 70, 160])


def blank(height=200, width=300, level=242, noise=2, seed=0):
    rng = np.random.default_rng(seed)
    values = rng.normal(level, noise, (height, width, 3))
    return np.clip(values, 0, 255).astype(np.uint8)


def with_disc(image, centre_yx, radius_px, colour):
    image = image.copy()
    rows, columns = disk(centre_yx, radius_px, shape=image.shape[:2])
    image[rows, columns] = colour
    return image


@pytest.mark.parametrize("noise", [0, 1, 3])
@pytest.mark.parametrize("level", [255, 242, 200])
def test_blank_glass_has_no_tissue(level, noise):
    assert not tissue_mask(blank(level=level, noise=noise), MPP).any()


@pytest.mark.parametrize("level", [0, 128, 255])
def test_uniform_grey_has_no_tissue(level):
    assert not tissue_mask(np.full((50, 70, 3), level, np.uint8), MPP).any()


@pytest.mark.parametrize("colour", [PINK, PURPLE])
def test_one_colour_all_over_is_tissue(colour):
    image = np.broadcast_to(colour, (60, 80, 3)).astype(np.uint8)
    assert tissue_mask(image, MPP).all()


def test_a_slide_full_of_tissue_keeps_its_pale_half():
    image = np.empty((60, 80, 3), np.uint8)
    image[:, :40], image[:, 40:] = PINK, PURPLE
    assert tissue_mask(image, MPP).all()


def test_a_disc_of_tissue_is_found_to_a_pixel():
    image = with_disc(blank(), (90, 140), 40, PINK)
    mask = tissue_mask(image, MPP)
    truth = with_disc(np.zeros((200, 300), np.uint8), (90, 140), 40, 1).astype(bool)
    y, x = np.nonzero(mask ^ truth)
    assert np.abs(np.hypot(y - 90, x - 140) - 40).max(initial=0) < 2.5
    assert mask.shape == (200, 300)


def test_small_specks_are_removed_and_larger_pieces_stay():
    least_px = np.sqrt(MIN_TISSUE_UM2 / np.pi) / MPP  # radius of the least object
    image = with_disc(blank(), (50, 50), least_px * 0.6, PINK)
    assert not tissue_mask(image, MPP).any()
    image = with_disc(image, (120, 200), least_px * 2, PINK)
    mask = tissue_mask(image, MPP)
    assert mask[120, 200]
    assert not mask[:90, :90].any()


def test_a_small_image_may_be_all_tissue():
    # 250 x 250 um at 8 um/px: a third of the least object of a whole slide.
    image = with_disc(blank(32, 32), (16, 16), 6, PURPLE)
    assert tissue_mask(image, MPP)[16, 16]
    assert tissue_mask(np.broadcast_to(PURPLE, (1, 1, 3)).astype(np.uint8), MPP).all()


@pytest.mark.parametrize(
    ("name", "low", "high"),
    # Expected by eye: a strip of skin, and a core in the middle of glass.
    [("cmu-1-small-region.svs", 0.3, 0.98), ("instanseg_tma.tiff", 0.1, 1.0)],
)
def test_real_slides(data_dir, name, low, high):
    with Slide(data_dir / "slides" / name) as slide:
        image, _ = slide.overview(MPP)
    assert low < tissue_mask(image, MPP).mean() < high
