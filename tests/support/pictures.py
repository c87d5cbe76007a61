"""Small pictures of stained tissue, and TIFFs of them as other software writes them."""

import numpy as np
import tifffile

MPP = 0.5
TILED = {"tile": (128, 128)}
STRIPS = {"rowsperstrip": 50}
REDUCED = {"subfiletype": 1}


def tissue(width=640, height=480):
    """Return white glass with a round piece of pink tissue and purple nuclei, RGB [H, W, 3]."""
    y, x = np.mgrid[0:height, 0:width]
    image = np.full((height, width, 3), 244, np.float32)
    far, reach = np.hypot(x - width / 2, y - height / 2), 0.42 * min(width, height)
    image[far < reach] = (232, 178, 205)
    near = np.hypot((x + 25) % 50 - 25, (y + 25) % 50 - 25) < 7
    image[near & (far < reach - 50)] = (96, 62, 140)
    image += np.random.default_rng(0).normal(0, 2.5, image.shape)
    return np.clip(image, 0, 255).astype(np.uint8)


def paper_label(width, height):
    """Return the photo of a paper label with some writing, RGB [H, W, 3]."""
    image = np.full((height, width, 3), 250, np.uint8)
    image[height // 6 : height // 2, width // 8 : width // 2] = (20, 60, 120)
    return image


def write_tiff(path, *pages, **options):
    """Write pages, each an array or (array, options), at 0.5 um/px; return the path."""
    with tifffile.TiffWriter(path) as tiff:
        for page in pages:
            array, more = page if isinstance(page, tuple) else (page, {})
            tags = {
                "photometric": "rgb" if array.ndim == 3 else "minisblack",
                "resolution": (1e4 / MPP, 1e4 / MPP),
                "resolutionunit": "CENTIMETER",
                "metadata": None,
            }
            tiff.write(array, **(tags | options | more))
    return path
