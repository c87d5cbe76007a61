"""Crops of H&E-like colours, and torchvision's colour operations one by one."""

import itertools

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import functional as tv

from scellst_ray.models.moco.augment_colour import STAINS


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def tissue(num, side=72, seed=0):
    """Return crops of H&E-like colours, structured at the scale of nuclei: uint8 [N, H, W, 3]."""
    rng = np.random.default_rng(seed)
    concentrations = np.zeros((num, 2, side, side))
    for index, (coarse, strength) in itertools.product(range(num), ((5, 0.9), (17, 0.6))):
        for stain in range(2):
            noise = Image.fromarray(rng.random((coarse, coarse)).astype(np.float32))
            smooth = np.asarray(noise.resize((side, side), Image.Resampling.BICUBIC))
            concentrations[index, stain] += strength * smooth**2
    density = np.einsum("nshw,sc->nhwc", concentrations, np.array(STAINS[:2]))
    noisy = 255 * np.exp(-density) + rng.normal(0, 4, density.shape)
    return torch.from_numpy(np.clip(noisy, 0, 255).astype(np.uint8))


def jitter_tv(image, order, factors):
    """Apply torchvision's functions to one image (tensor or PIL) in this order."""
    brightness, contrast, saturation, hue = (float(factor) for factor in factors)
    for operation in order.tolist():
        if operation == 0:
            image = tv.adjust_brightness(image, brightness)
        elif operation == 1:
            image = tv.adjust_contrast(image, contrast)
        elif operation == 2:
            image = tv.adjust_saturation(image, saturation)
        elif operation == 3:
            image = tv.adjust_hue(image, hue)
    return image
