"""The header of an encoder file: architecture, normalisation, size of crops, provenance.

An encoder is a safetensors file. Its metadata are strings: `format`, `version`, `arch`, `dim`,
`mean`, `std`, `crop_um`, `crop_px` and `provenance` (JSON). Version 1 had no `dim`, no size of
crops and no provenance, and was always a ResNet-50. Safetensors files of other projects have none
of these metadata. They are read as a ResNet-50 with ImageNet's normalisation.
"""

import json
import math
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
        mean: RGB mean that is subtracted before the network; pixel values lie in 0-1.
        std: RGB standard deviation that pixel values are divided by.
        crop_um: Side of the training crops on the slide, in micrometres.
        crop_px: Side of the training crops, in px.
        provenance: Slides, number of cells, epochs, configuration and release of the training.
    """

    arch: str = "resnet50"
    dim: int = RESNET_DIMS["resnet50"]
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    crop_um: float = CROP_UM
    crop_px: int = CROP_PX
    provenance: dict[str, Any] = field(default_factory=dict)

    def metadata(self) -> dict[str, str]:
        """Return the metadata as safetensors store them."""
        values = {"dim": self.dim, "mean": self.mean, "std": self.std, "crop_um": self.crop_um}
        values |= {"crop_px": self.crop_px, "provenance": self.provenance}
        text = {"format": FORMAT, "version": str(VERSION), "arch": self.arch}
        return text | {key: json.dumps(value) for key, value in values.items()}


def read_header(path: Path) -> Header:
    """Return the header of a file of weights, without reading the weights.

    A file without the suffix `.safetensors` is taken for a torch checkpoint of a ResNet-50.

    Raises:
        SafetensorError, OSError: The file cannot be read.
        ValueError: The header is damaged, belongs to another kind of file of this project, or was
            written by a newer release.
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
    return _parse_header(stored)


def _parse_header(stored: Mapping[str, str]) -> Header:
    """Return the header of these metadata; a missing value is that of version 1.

    Raises:
        ValueError: A value is not what a header holds.
    """
    names = ("dim", "mean", "std", "crop_um", "crop_px", "provenance")
    try:
        values = {name: json.loads(stored[name]) for name in names if name in stored}
        for name in ("mean", "std"):
            if name in values:
                values[name] = tuple(float(value) for value in values[name])
        header = Header(arch=stored.get("arch", "resnet50"), **values)
        is_sound = len(header.mean) == len(header.std) == 3 and min(header.std) > 0
        is_sound &= all(math.isfinite(value) for value in (*header.mean, *header.std))
        is_sound &= type(header.dim) is int and type(header.crop_px) is int
        is_sound &= type(header.crop_um) in (int, float) and math.isfinite(header.crop_um)
        is_sound &= header.dim > 0 and isinstance(header.provenance, dict)
    except TypeError as error:
        message = f"its header is damaged ({error}); write or copy the encoder again"
        raise ValueError(message) from error
    if not is_sound:
        message = f"its header is damaged: {header}; write or copy the encoder again"
        raise ValueError(message)
    return header


def check_crops(header: Header, source: str) -> None:
    """Refuse an encoder for crops of another size than those that `extract` cuts.

    Raises:
        ValueError: The size differs.
    """
    if (header.crop_um, header.crop_px) != (CROP_UM, CROP_PX):
        message = (
            f"encoder {source}: it was trained on crops of {header.crop_um:g} um and "
            f"{header.crop_px} px, and this release cuts {CROP_UM:g} um and {CROP_PX} px; "
            "pretrain an encoder on such crops"
        )
        raise ValueError(message)
