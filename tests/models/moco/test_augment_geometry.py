"""Geometric operations against those of PIL and torchvision."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torchvision.transforms import functional as tv

from scellst_ray.models.moco.augment import AugmentConfig, draw
from scellst_ray.models.moco.augment_geometry import (
    blur_matrix,
    mean_index,
    resize_matrix,
    rotation_index,
)
from tests.support.moco_crops import seeded, tissue


def test_a_fifth_of_the_pixels_gives_the_mean_grey():
    crops = tissue(24)
    index = mean_index(72).long()
    assert len(index) == pytest.approx(72 * 72 / 5, abs=1)
    for axis in (index // 72, index % 72):
        assert set(axis.bincount(minlength=72).tolist()) <= {14, 15}
    grey = (crops.double() @ torch.tensor([0.2989, 0.587, 0.114]).double()).flatten(1)
    off = (grey[:, index].mean(1) - grey.mean(1)).abs()
    assert off.max() < 1.2  # levels of 255; contrast uses at most 0.7 of the error
    assert off.square().mean().sqrt() < 0.5


def test_rotation_takes_pil_s_pixels():
    angles = torch.linspace(-360, 360, 97, dtype=torch.float64)
    got = rotation_index(angles, 72, 48).reshape(-1, 48, 48)
    index = Image.fromarray(np.arange(72 * 72, dtype=np.int32).reshape(72, 72))
    assert index.mode == "I"
    expected = []
    for angle in angles.tolist():
        turned = tv.rotate(index, angle, fill=-1)
        expected.append(np.asarray(tv.center_crop(turned, 48)))
    expected = np.stack(expected)
    assert expected.min() >= 0  # 72 / sqrt(2) > 48: no corner of the view leaves the crop
    differs = got.numpy() != expected
    assert differs.mean() < 1e-3
    row, column = np.divmod(got.numpy(), 72)
    row_pil, column_pil = np.divmod(expected, 72)
    assert max(np.abs(row - row_pil).max(), np.abs(column - column_pil).max()) <= 1


def test_crop_and_resize_equal_torchvision_s():
    images = torch.rand(40, 3, 48, 48, generator=seeded(1))
    parameters = draw(40, AugmentConfig(), seeded(7))
    boxes, flipped = parameters.crop_px, torch.rand(40, 2, generator=seeded(2)) < 0.5
    rows = resize_matrix(boxes[:, 0], boxes[:, 2], flipped[:, 0], 48)
    columns = resize_matrix(boxes[:, 1], boxes[:, 3], flipped[:, 1], 48)
    torch.testing.assert_close(rows.sum(2), torch.ones(40, 48))
    for row in range(40):
        got = rows[row] @ images[row] @ columns[row].T
        expected = tv.resized_crop(images[row], *boxes[row].tolist(), [48, 48], antialias=True)
        expected = tv.vflip(expected) if flipped[row, 0] else expected
        expected = tv.hflip(expected) if flipped[row, 1] else expected
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("sigma", [0.1, 0.3, 0.5, 0.8, 1.0, 1.3, 1.7, 2.0])
def test_blur_equals_pil_s(sigma):
    image = tissue(1, side=48, seed=8)[0]
    matrix = blur_matrix(torch.tensor([sigma]), 48)[0]
    got = matrix @ image.permute(2, 0, 1).float() @ matrix.T
    blurred = Image.fromarray(image.numpy()).filter(ImageFilter.GaussianBlur(sigma))
    expected = torch.from_numpy(np.array(blurred)).permute(2, 0, 1).float()
    assert (got - expected).abs().max() < 4  # PIL rounds after each of six passes
    assert (got - expected).abs().mean() < 1
    place = torch.arange(48) - 24.0
    assert (matrix[24] * place**2).sum().sqrt() == pytest.approx(sigma, abs=1e-3)
    torch.testing.assert_close(matrix.sum(1), torch.ones(48))
