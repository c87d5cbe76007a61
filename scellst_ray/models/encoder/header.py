"""What an encoder file says about itself: architecture, normalisation, crops, where it is from.

Encoders are safetensors whose metadata are strings: `format`, `version`, `arch`, `dim`, `mean`,
`std`, `crop_um`, `crop_px` and `provenance` (JSON). Version 1 had no `dim`, no crop size and no
provenance, and was always a ResNet-50. Safetensors of others say nothing of all this and are read
as a ResNet-50 with ImageNet's normalisation.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open

from scellst_ray.core.schemas import CROP_PX, CROP_UM

FORMAT = "scellst_ray.encoder"
VERSION = 2
RESNET_DIMS = {"resnet18": 512, "resnet34": 512, "resnet50": 2048}
TIMM = "timm:"
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Header:
    """The metadata of an encoder file.

    Attributes:
        arch: 'resnet18', 'resnet34', 'resnet50' or 'timm:NAME'.
        dim: Length of an embedding.
        mean: RGB mean (of values in 0-1) subtracted before the network.
        std: RGB standard deviation divided by.
        crop_um: Side on the slide of the crops it was trained for.
        crop_px: Side of these crops in px.
        provenance: Slides, number of cells, epochs, configuration and release that made it.
    """

    arch: str = "resnet50"
    dim: int = RESNET_DIMS["resnet50"]
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    crop_um: float = CROP_UM
    crop_px: int = CROP_PX
    provenance: dict[str, Any] = field(default_factory=dict)

    def metadata(self) -> dict[str, str]:
        """Return what safetensors store."""
        values = {"dim": self.dim, "mean": self.mean, "std": self.std, "crop_um": self.crop_um}
        values |= {"crop_px": self.crop_px, "provenance": self.provenance}
        text = {"format": FORMAT, "version": str(VERSION), "arch": self.arch}
        return text | {key: json.dumps(value) for key, value in values.items()}


def read_header(path: Path) -> Header:
    """Return the header of a file of weights, without reading the weights.

    Files that are no safetensors are torch checkpoints of a ResNet-50.

    Raises:
        SafetensorError, OSError: it cannot be read.
        ValueError: damaged, something else of this project, or of a newer release.
    """
    if path.suffix != ".safetensors":
        return Header()
    with safe_open(path, framework="pt") as handle:
        stored = dict(handle.metadata() or {})
    message, kind = "", stored.get("format", FORMAT)
    if kind != FORMAT and kind.startswith("scellst_ray."):
        message = f"it is a {kind}, expected a {FORMAT}"
    elif "version" in stored and kind == FORMAT and int(stored["version"]) > VERSION:
        message = (
            f"written in format version {stored['version']}; this release reads up to {VERSION}: "
            "upgrade scellst_ray"
        )
    if message:
        raise ValueError(message)
    return _header(stored)


def _header(stored: Mapping[str, str]) -> Header:
    """Return the header that these metadata say, with the defaults of version 1.

    Raises:
        ValueError: not what a header holds.
    """
    names = ("dim", "mean", "std", "crop_um", "crop_px", "provenance")
    try:
        found = {name: json.loads(stored[name]) for name in names if name in stored}
        for name in ("mean", "std"):
            if name in found:
                found[name] = tuple(float(value) for value in found[name])
        header = Header(arch=stored.get("arch", "resnet50"), **found)
        whole = len(header.mean) == len(header.std) == 3 and min(header.std) > 0
        whole &= header.dim > 0 and isinstance(header.provenance, dict)
    except TypeError as error:
        message = f"its header is damaged ({error})"
        raise ValueError(message) from error
    if not whole:
        message = f"its header is damaged: {header}"
        raise ValueError(message)
    return header


def check_crops(header: Header, source: str) -> None:
    """Refuse an encoder of crops of another size than those `extract` cuts.

    Raises:
        ValueError: another size.
    """
    if (header.crop_um, header.crop_px) != (CROP_UM, CROP_PX):
        message = (
            f"encoder {source}: was trained for crops of {header.crop_um:g} um and "
            f"{header.crop_px} px, and this release cuts {CROP_UM:g} um and {CROP_PX} px; "
            "pretrain one for those"
        )
        raise ValueError(message)
