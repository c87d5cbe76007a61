"""Time augmentation for pretraining: in batches, and crop by crop with torchvision and PIL.

    python benchmarks/augment.py [--crops 512] [--batches 64 256 512] [--repeats 5] [--json FILE]

Each way makes two views of every crop on one thread. Times are seconds of CPU time. The repeats of
all ways alternate, so that a busy machine slows all ways equally. The best and the median of each
way are reported. kornia is timed, too, if it is installed (it is no dependency). It draws
parameters for each sample, but one order of the colour operations for a whole batch.
"""

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision import transforms

from scellst_ray.models.encoder.header import IMAGENET_MEAN, IMAGENET_STD
from scellst_ray.models.moco.augment import AugmentConfig, apply, augment, draw

CROP_PX = 72
AIM = 4.0  # required ratio to the crops per second of torchvision and PIL


def random_crops(num: int, seed: int) -> NDArray[np.uint8]:
    """Return smooth pink and purple crops with noise, uint8 [N, 72, 72, 3]."""
    rng = np.random.default_rng(seed)
    density = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11]])
    crops = np.empty((num, CROP_PX, CROP_PX, 3), np.uint8)
    for crop in crops:
        stains = rng.random((2, 9, 9)).astype(np.float32)
        size = (CROP_PX, CROP_PX)
        smooth = [np.asarray(Image.fromarray(stain).resize(size)) for stain in stains]
        light = 255 * np.exp(-np.einsum("shw,sc->hwc", np.stack(smooth), density))
        crop[:] = np.clip(light + rng.normal(0, 4, light.shape), 0, 255)
    return crops


class PilBlur:
    """PIL's Gaussian blur by a random radius, as in the published pipeline."""

    def __init__(self, radius_px: tuple[float, float]) -> None:
        """Make the blur; radii are drawn from this range, in px."""
        self.radius_px = radius_px

    def __call__(self, image: Image.Image) -> Image.Image:
        """Return the blurred image."""
        radius = float(torch.empty(1).uniform_(*self.radius_px))
        return image.filter(ImageFilter.GaussianBlur(radius))


def compose_published(config: AugmentConfig) -> Callable[[Image.Image], Tensor]:
    """Return the per-sample pipeline of torchvision and PIL with a config's parameters."""
    jitter = transforms.ColorJitter(
        config.brightness, config.contrast, config.saturation, config.hue
    )
    steps = [
        transforms.RandomApply([jitter], p=config.jitter_prob),
        transforms.RandomRotation(config.degrees),
        transforms.CenterCrop(config.out_px),
        transforms.RandomResizedCrop(config.out_px, config.crop_scale, config.crop_ratio),
        transforms.RandomApply([PilBlur(config.blur_radius_px)], p=config.blur_prob),
        transforms.ToTensor(),
        transforms.RandomErasing(config.erase_prob, config.erase_scale, config.erase_ratio),
        transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
    ]
    pipeline: Callable[[Image.Image], Tensor] = transforms.Compose(steps)
    return pipeline


def compose_kornia(config: AugmentConfig) -> Callable[[Tensor], Tensor]:
    """Return kornia's nearest equivalent, on float32 [N, 3, H, W] in 0-1."""
    kornia: Any = importlib.import_module("kornia.augmentation")
    strengths = (config.brightness, config.contrast, config.saturation, config.hue)
    size = (config.out_px, config.out_px)
    pipeline: Callable[[Tensor], Tensor] = kornia.AugmentationSequential(
        kornia.ColorJitter(*strengths, p=config.jitter_prob),
        kornia.RandomRotation(config.degrees, resample="nearest", p=1.0),
        kornia.CenterCrop(size),
        kornia.RandomResizedCrop(size, config.crop_scale, config.crop_ratio),
        kornia.RandomGaussianBlur((13, 13), config.blur_radius_px, p=config.blur_prob),
        kornia.RandomErasing(config.erase_scale, config.erase_ratio, p=config.erase_prob),
        kornia.Normalize(torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)),
        data_keys=["input"],
    )
    return pipeline


def list_ways(crops: NDArray[np.uint8], batches: list[int]) -> dict[str, Callable[[], None]]:
    """Return the timed functions by name; each makes two views of every crop."""
    config = AugmentConfig()
    options = AugmentConfig(flips=True, stain_jitter=0.05)
    pipeline, generator = compose_published(config), torch.Generator().manual_seed(0)
    crops_NHWC = torch.from_numpy(crops)

    def by_crop() -> None:
        for crop in crops:
            image = Image.fromarray(crop)
            pipeline(image)
            pipeline(image)

    def batched(config: AugmentConfig, size: int) -> None:
        for part in crops_NHWC.split(size):  # type: ignore[no-untyped-call]
            for _ in range(2):
                augment(part, config, IMAGENET_MEAN, IMAGENET_STD, generator)

    found: dict[str, Callable[[], None]] = {"torchvision and PIL": by_crop}
    for size in batches:
        found[f"batches of {size}"] = lambda size=size: batched(config, size)  # type: ignore[misc]
    found[f"batches of {batches[-1]}, flips and stains"] = lambda: batched(options, batches[-1])
    if importlib.util.find_spec("kornia"):
        kornia = compose_kornia(config)

        def by_kornia() -> None:
            for part in crops_NHWC.split(batches[-1]):  # type: ignore[no-untyped-call]
                images_NCHW = part.permute(0, 3, 1, 2).float().div_(255)
                kornia(images_NCHW)
                kornia(images_NCHW)

        found[f"kornia, batches of {batches[-1]}"] = by_kornia
    return found


def measure(found: dict[str, Callable[[], None]], num: int, repeats: int) -> list[dict[str, Any]]:
    """Return crops per second of each way, and the ratio to the first way; ways alternate."""
    seconds: dict[str, list[float]] = {name: [] for name in found}
    for function in found.values():
        function()
    for _ in range(repeats):
        for name, function in found.items():
            start = time.process_time()
            function()
            seconds[name].append(time.process_time() - start)
    first = next(iter(seconds.values()))
    return [
        {
            "way": name,
            "cells_per_second_best": num / min(taken),
            "cells_per_second_median": num / statistics.median(taken),
            "ratio_best": min(first) / min(taken),
            "ratio_median": statistics.median(first) / statistics.median(taken),
        }
        for name, taken in seconds.items()
    ]


def measure_gpu(crops: NDArray[np.uint8], repeats: int) -> dict[str, Any] | None:
    """Return crops per second on the GPU without the drawing of parameters; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    config, crops_NHWC = AugmentConfig(), torch.from_numpy(crops).cuda()
    drawn = [draw(len(crops), config, torch.Generator().manual_seed(seed)) for seed in range(2)]
    taken = []
    for _ in range(repeats + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for parameters in drawn:
            apply(crops_NHWC, parameters, config, IMAGENET_MEAN, IMAGENET_STD)
        torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    best = len(crops) / min(taken[1:])
    return {"device": torch.cuda.get_device_name(), "cells_per_second_best": best}


def main() -> None:
    """Measure each way, print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--crops", type=int, default=512)
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 256, 512])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, default=Path("augment.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    crops = random_crops(options.crops, seed=0)
    rows = measure(list_ways(crops, options.batches), options.crops, options.repeats)
    print(f"{'two views, one core':<40}{'cells/s':>10}{'median':>10}{'times':>8}{'median':>8}")
    for row in rows:
        way, *values = row.values()
        print(f"{way:<40}{values[0]:10.0f}{values[1]:10.0f}{values[2]:8.2f}{values[3]:8.2f}")
    names = ("numpy", "pillow", "torch", "torchvision")
    report = {
        "crops": options.crops,
        "crop_px": CROP_PX,
        "aim": AIM,
        "ways": rows,
        "gpu": measure_gpu(crops, options.repeats),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in names},
    }
    options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {options.json}")


if __name__ == "__main__":
    main()
