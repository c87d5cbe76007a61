"""Colour operations against those of torchvision and scikit-image."""

import itertools

import numpy as np
import pytest
import torch
from skimage.color import hed2rgb, rgb2hed

from scellst_ray.models.moco.augment import AugmentConfig, draw
from scellst_ray.models.moco.augment_colour import STAINS, jitter, jitter_stains
from tests.support.moco_crops import jitter_tv, seeded, tissue


def test_jitter_equals_torchvision_in_every_order():
    orders = torch.tensor(list(itertools.permutations(range(4))))
    pixels = tissue(24, side=40).permute(3, 0, 1, 2).float() / 255
    pixels[:, :, :3, :3] = pixels[:1, :, :3, :3]  # grey pixels have no hue
    pixels[:, :, 4, 4], pixels[:, :, 5, 5] = 0, 1
    factors = draw(24, AugmentConfig(), seeded(1)).jitter_factors
    got = pixels.flatten(2).clone()
    jitter(got, orders, factors)
    for row in range(24):
        expected = jitter_tv(pixels[:, row], orders[row], factors[row])
        torch.testing.assert_close(got[:, row], expected.flatten(1), atol=2e-5, rtol=0)


@pytest.mark.parametrize("operation", range(4))
def test_single_operations_equal_torchvision_on_random_colours(operation):
    pixels = torch.rand(3, 30, 400, generator=seeded(2))
    pixels[:, :5] = (pixels[:, :5] * 4).round() / 4  # ties between channels
    order = torch.tensor([[operation, -1, -1, -1]]).expand(30, -1)
    low, high = (-0.5, 0.5) if operation == 3 else (0.0, 2.0)
    factors = torch.linspace(low, high, 30)[:, None].expand(-1, 4)
    got = pixels.clone()
    jitter(got, order, factors)
    for row in range(30):
        image = pixels[:, row].reshape(3, 20, 20)
        expected = jitter_tv(image, order[row], factors[row]).flatten(1)
        torch.testing.assert_close(got[:, row], expected, atol=5e-6, rtol=0)


def test_unjittered_samples_pass_through_exactly():
    pixels = torch.rand(3, 4, 50, generator=seeded(0))
    got = pixels.clone()
    jitter(got, torch.full((4, 4), -1), torch.full((4, 4), 0.3))
    torch.testing.assert_close(got, pixels, atol=0, rtol=0)


def test_stain_jitter_equals_skimage_s_unmixing():
    pixels = tissue(6, side=20).clamp(2, 250).permute(3, 0, 1, 2).flatten(2).float() / 255
    scale = torch.tensor([[1, 1], [0.8, 1.1], [1.2, 0.9], [1, 1], [1.05, 0.95], [0.7, 1.3]])
    shift = torch.tensor([[0, 0], [0, 0], [0, 0], [0.1, -0.05], [-0.1, 0.1], [0.05, 0.0]])
    got = pixels.clone()
    jitter_stains(got, scale, shift)
    torch.testing.assert_close(got[:, 0], pixels[:, 0], atol=1e-6, rtol=0)
    # skimage's stain vectors do not have unit length, and its unit of density is ln(1e6).
    unit = np.log(1e6) * np.linalg.norm(np.array(STAINS[:2]), axis=1)
    for row in range(6):
        hed = rgb2hed(pixels[:, row].T.double().numpy())
        # skimage would cut a residual below 0 when it converts back. This code does not.
        hed = np.linalg.solve(np.array(STAINS).T, -np.log(pixels[:, row].double().numpy())).T
        hed /= np.log(1e6)
        hed[:, :2] = hed[:, :2] * scale[row].numpy() + shift[row].numpy() / unit
        expected = torch.from_numpy(hed2rgb(hed)).T.float()
        torch.testing.assert_close(got[:, row], expected, atol=1e-5, rtol=0)
