"""Random views of crops for self-supervised training: whole batches, parameters for each sample.

A view is a randomly changed copy of a crop. The operations are those of the published list
(scellst `cell_SSL/main_moco.py`, version 1): colour jitter, rotation with nearest pixels and centre
crop, bilinear random resized crop, Gaussian blur, erasing, normalisation.

`draw` draws all parameters on the CPU. `apply` uses them on any device. Therefore a seed gives the
same views on every device, and a view does not depend on how the batch is cut.

Two operations are approximated:
- Pixels stay float32 between operations; PIL rounds to 8 bits after each.
- Contrast takes a crop's mean grey from every fifth pixel (`mean_index`). On crops of real slides
  the error is 0.24 levels of 255 (root mean square); that of PIL's rounding is 0.29.
Two changes have no effect on the result:
- Colour jitter comes after rotation, which drops half of the pixels. It uses no neighbours.
- Resizing, flips and blur are linear and separable. Each sample has one matrix per axis for them.

torchvision's transforms draw one set of parameters for a whole batch. kornia's draw one set for
each sample, but one order of the colour operations for all samples. On one core kornia is about
1.5 times as fast as torchvision and PIL crop by crop, this module 7 to 9 times
(`benchmarks/augment.py`).

Shape letters: N samples, C channels (RGB), H W pixels of a view, P pixels in no order, A attempts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from scellst_ray.models.moco.augment_colour import jitter, jitter_stains
from scellst_ray.models.moco.augment_geometry import (
    blur_matrix,
    erase,
    mean_index,
    resize_matrix,
    rotation_index,
)

# Draws of a box, as in torchvision. If none fits, a crop is the whole view and nothing is erased.
NUM_ATTEMPTS = 10
# Number of samples per pass. On the CPU they fit into the cache, and they are enough for torch's
# overhead of about a microsecond per call not to matter.
CPU_CHUNK, DEVICE_CHUNK = 128, 4096


@dataclass(frozen=True)
class AugmentConfig:
    """Ranges of the random operations on a crop; defaults are the published values.

    Attributes:
        jitter_prob: Probability that a view's colours are changed, 0 to 1.
        brightness: The brightness factor is drawn from 1 - b to 1 + b; this is b, 0 to 1.
        contrast: The contrast factor is drawn from 1 - c to 1 + c; this is c, 0 to 1.
        saturation: The saturation factor is drawn from 1 - s to 1 + s; this is s, 0 to 1.
        hue: The turn of the hue is drawn from -h to h; this is h in whole turns, 0 to 0.5.
        degrees: The rotation is drawn from -d to d; this is d in degrees, 0 to 360.
        crop_scale: Least and greatest area of the random crop, as shares of the centre crop.
        crop_ratio: Least and greatest ratio of width to height of the random crop.
        blur_prob: Probability that a view is blurred, 0 to 1.
        blur_radius_px: Least and greatest standard deviation of the blur, in px of the view.
        erase_prob: Probability that a rectangle of a view is erased (set to black), 0 to 1.
        erase_scale: Least and greatest area of the rectangle, as shares of the view.
        erase_ratio: Least and greatest ratio of height to width of the rectangle.
        flips: Whether to mirror views left-right and top-bottom, each with probability 1/2.
        stain_jitter: Concentrations of hematoxylin and eosin are scaled by a factor from 1 - s to
            1 + s and shifted by -s to s (natural optical density); this is s, 0 to 1. 0: never.
        out_px: Side of a view in px.
    """

    jitter_prob: float = 0.8
    brightness: float = 0.6
    contrast: float = 0.7
    saturation: float = 0.5
    hue: float = 0.2
    degrees: float = 360.0
    crop_scale: tuple[float, float] = (0.6, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    blur_prob: float = 0.1
    blur_radius_px: tuple[float, float] = (0.1, 2.0)
    erase_prob: float = 0.3
    erase_scale: tuple[float, float] = (0.05, 0.15)
    erase_ratio: tuple[float, float] = (0.8, 1.2)
    flips: bool = False
    stain_jitter: float = 0.0
    out_px: int = 48

    def __post_init__(self) -> None:
        """Refuse values outside of their range.

        Raises:
            ValueError: A value is out of its range, or the first number of a range is the greater.
        """
        if self.out_px < 1:
            message = f"out_px: got {self.out_px}, expected at least 1"
            raise ValueError(message)
        tops = {"jitter_prob": 1.0, "blur_prob": 1.0, "erase_prob": 1.0, "hue": 0.5}
        tops |= {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "stain_jitter": 1.0}
        for name, top in (tops | {"degrees": 360.0}).items():
            value = getattr(self, name)
            if not 0 <= value <= top:
                message = f"{name}: got {value}, expected a number from 0 to {top:g}"
                raise ValueError(message)
        ranges = {"crop_scale": 1.0, "erase_scale": 1.0, "blur_radius_px": self.out_px / 4}
        for name, top in (ranges | {"crop_ratio": math.inf, "erase_ratio": math.inf}).items():
            low, high = getattr(self, name)
            if not 0 < low <= high <= top or math.isinf(high):
                expected = "two numbers above 0" + (f" and up to {top:g}" if top < math.inf else "")
                message = f"{name}: got ({low}, {high}), expected {expected}, the lesser first"
                raise ValueError(message)


@dataclass(frozen=True)
class Parameters:
    """Parameters of the operations on each sample of a batch; tensors on the CPU.

    Attributes:
        jitter_order: Colour operations in order (see `augment_colour`), -1 for none, [N, 4].
        jitter_factors: Strengths of brightness, contrast, saturation and hue, [N, 4].
        angle_deg: Rotation in degrees, counter-clockwise, [N].
        crop_px: Top, left, height and width of the crop, in px of the centre crop, [N, 4].
        flipped: Whether the view is mirrored top-bottom and left-right, [N, 2].
        blur_px: Standard deviation of the blur in px of the view, 0 for no blur, [N].
        erase_px: Top, left, height and width of the erased rectangle, in px of the view; height 0
            for none, [N, 4].
        stain_scale: Factors of hematoxylin and eosin, [N, 2].
        stain_shift: Shifts of hematoxylin and eosin in natural optical density, [N, 2].
    """

    jitter_order: Tensor
    jitter_factors: Tensor
    angle_deg: Tensor
    crop_px: Tensor
    flipped: Tensor
    blur_px: Tensor
    erase_px: Tensor
    stain_scale: Tensor
    stain_shift: Tensor

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.angle_deg)

    def __getitem__(self, rows: slice | Tensor) -> "Parameters":
        """Return the parameters of the samples at these rows."""
        return Parameters(*(getattr(self, field.name)[rows] for field in fields(self)))


def draw(num: int, config: AugmentConfig, generator: torch.Generator) -> Parameters:
    """Draw the parameters of a batch, in the distributions of torchvision's classes.

    Every configuration uses the same number of random numbers. Therefore an option changes nothing
    but its own operation.

    Args:
        num: Number of samples in the (global) batch.
        config: Ranges to draw from.
        generator: Generator on the CPU, so that a seed gives the same views on every device.

    Raises:
        ValueError: The generator is not on the CPU.
    """
    if generator.device.type != "cpu":
        message = f"augmentation draws on the CPU; got a generator on {generator.device}"
        raise ValueError(message)

    def uniform(*shape: int) -> Tensor:
        return torch.rand((num, *shape), generator=generator, dtype=torch.float64)

    is_jittered = uniform(1) < config.jitter_prob
    order = torch.where(is_jittered, uniform(4).argsort(1), -1)
    spread = torch.tensor([config.brightness, config.contrast, config.saturation, config.hue])
    factors = torch.tensor([1.0, 1, 1, 0]) + spread * (2 * uniform(4) - 1)
    angle_deg = config.degrees * (2 * uniform() - 1)
    crop_px = _draw_crop(uniform(2 * NUM_ATTEMPTS + 2), config)
    flipped = (uniform(2) < 0.5) & config.flips
    low, high = config.blur_radius_px
    blur_px = torch.where(uniform() < config.blur_prob, low + (high - low) * uniform(), 0)
    is_erased = uniform() < config.erase_prob
    erase_px = _draw_erasure(uniform(2 * NUM_ATTEMPTS + 2), config) * is_erased[:, None]
    scale = 1 + config.stain_jitter * (2 * uniform(2) - 1)
    shift = config.stain_jitter * (2 * uniform(2) - 1)
    return Parameters(
        order, factors.float(), angle_deg, crop_px, flipped, blur_px, erase_px,
        scale.float(), shift.float(),
    )  # fmt: skip


def _draw_boxes(
    uniform: Tensor, scale: tuple[float, float], ratio: tuple[float, float], side: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return sqrt(area * ratio) and sqrt(area / ratio) [N, A], and numbers for a place [N, 2]."""
    area_NA = side**2 * (scale[0] + (scale[1] - scale[0]) * uniform[:, :NUM_ATTEMPTS])
    low, high = math.log(ratio[0]), math.log(ratio[1])
    ratio_NA = (low + (high - low) * uniform[:, NUM_ATTEMPTS : 2 * NUM_ATTEMPTS]).exp()
    return (area_NA * ratio_NA).sqrt().round(), (area_NA / ratio_NA).sqrt().round(), uniform[:, -2:]


def _place(height: Tensor, width: Tensor, place_N2: Tensor, side: int) -> Tensor:
    """Return boxes (top, left, height, width) at random places in a square, [N, 4]."""
    size_N2 = torch.stack([height, width], 1)
    corner_N2 = ((side - size_N2 + 1) * place_N2).floor()
    return torch.cat([corner_N2, size_N2], 1).long()


def _draw_crop(uniform: Tensor, config: AugmentConfig) -> Tensor:
    """Return RandomResizedCrop's boxes: the first attempt that fits, else the largest, centred."""
    side, (low, high) = config.out_px, config.crop_ratio
    width_NA, height_NA, place_N2 = _draw_boxes(uniform, config.crop_scale, config.crop_ratio, side)
    fits_NA = (width_NA > 0) & (width_NA <= side) & (height_NA > 0) & (height_NA <= side)
    first_N1 = fits_NA.byte().argmax(1, keepdim=True)
    boxes = _place(
        height_NA.gather(1, first_N1)[:, 0], width_NA.gather(1, first_N1)[:, 0], place_N2, side
    )
    width, height = round(side * min(high, 1)), round(side / max(low, 1))
    whole = torch.tensor([(side - height) // 2, (side - width) // 2, height, width])
    return torch.where(fits_NA.any(1, keepdim=True), boxes, whole)


def _draw_erasure(uniform: Tensor, config: AugmentConfig) -> Tensor:
    """Return RandomErasing's boxes: the first attempt that fits, else an empty box."""
    side = config.out_px
    height_NA, width_NA, place_N2 = _draw_boxes(
        uniform, config.erase_scale, config.erase_ratio, side
    )
    fits_NA = (width_NA < side) & (height_NA < side)
    first_N1 = fits_NA.byte().argmax(1, keepdim=True)
    boxes = _place(
        height_NA.gather(1, first_N1)[:, 0], width_NA.gather(1, first_N1)[:, 0], place_N2, side
    )
    return boxes * fits_NA.any(1, keepdim=True)


def augment(
    crops_NHWC: Tensor,
    config: AugmentConfig,
    mean: Sequence[float],
    std: Sequence[float],
    generator: torch.Generator,
) -> Tensor:
    """Return one random view of every crop; see `draw` and `apply`."""
    return apply(crops_NHWC, draw(len(crops_NHWC), config, generator), config, mean, std)


def apply(
    crops_NHWC: Tensor,
    parameters: Parameters,
    config: AugmentConfig,
    mean: Sequence[float],
    std: Sequence[float],
) -> Tensor:
    """Make one view of every crop.

    Args:
        crops_NHWC: uint8 RGB crops on any device. They are square, with a side at least sqrt(2)
            times that of a view.
        parameters: Parameters of the N crops, from `draw`.
        config: Ranges that the parameters were drawn from.
        mean: RGB mean that is subtracted at the end; pixel values lie in 0-1.
        std: RGB standard deviation that pixel values are divided by.

    Returns:
        [N, 3, out_px, out_px], float32, channels last, on the crops' device.

    Raises:
        ValueError: Crops have another type or shape, the number of parameters differs from that of
            crops, or mean and std are not three numbers each.
    """
    _check_crops(crops_NHWC, parameters, config)
    _check_normalisation(mean, std)
    device, num, side = crops_NHWC.device, len(crops_NHWC), config.out_px
    views_NCHW = torch.empty((num, 3, side, side), device=device, memory_format=torch.channels_last)
    scale, shift = [1 / s for s in std], [-m / s for m, s in zip(mean, std, strict=True)]
    chunk = CPU_CHUNK if device.type == "cpu" else DEVICE_CHUNK
    for start in range(0, num, chunk):
        rows = slice(start, start + chunk)
        # Under autocast the matrix products would run in half precision.
        with torch.autocast(device.type, enabled=False):
            pixels_CNHW = _make_views(crops_NHWC[rows], parameters[rows], config)
        for channel, pixels_NHW in enumerate(pixels_CNHW):
            torch.add(
                torch.tensor(shift[channel], device=device), pixels_NHW, alpha=scale[channel],
                out=views_NCHW[rows, channel],
            )  # fmt: skip
    return views_NCHW


def _check_crops(crops_NHWC: Tensor, parameters: Parameters, config: AugmentConfig) -> None:
    shape = tuple(crops_NHWC.shape)
    if crops_NHWC.dtype != torch.uint8 or len(shape) != 4 or shape[3] != 3 or shape[1] != shape[2]:
        message = f"crops: got {crops_NHWC.dtype} {shape}, expected uint8 [N, side, side, 3]"
        raise ValueError(message)
    least = math.ceil(config.out_px * math.sqrt(2)) if config.degrees else config.out_px
    if shape[1] < least:
        message = (
            f"crops are {shape[1]} px wide; a rotated view of {config.out_px} px needs {least}: "
            "extract larger crops or lower out_px"
        )
        raise ValueError(message)
    if len(parameters) != shape[0]:
        message = (
            f"got {shape[0]} crops and parameters of {len(parameters)}; expected parameters for "
            "every crop"
        )
        raise ValueError(message)


def _check_normalisation(mean: Sequence[float], std: Sequence[float]) -> None:
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        message = f"mean {mean}, std {std}: expected three numbers each; std must be above 0"
        raise ValueError(message)


def _make_views(crops_NHWC: Tensor, parameters: Parameters, config: AugmentConfig) -> Tensor:
    """Return views before normalisation, in 0-1, [C, N, H, W]."""
    device, side = crops_NHWC.device, config.out_px
    pixels_CNP = _rotate_crops(crops_NHWC, parameters.angle_deg.to(device), side)
    if config.stain_jitter:
        scale_N2, shift_N2 = parameters.stain_scale.to(device), parameters.stain_shift.to(device)
        jitter_stains(pixels_CNP, scale_N2, shift_N2)
    jitter(pixels_CNP, parameters.jitter_order, parameters.jitter_factors, first=side**2)
    boxes, flipped = parameters.crop_px.to(device), parameters.flipped.to(device)
    rows_NOH = resize_matrix(boxes[:, 0], boxes[:, 2], flipped[:, 0], side)
    columns_NOW = resize_matrix(boxes[:, 1], boxes[:, 3], flipped[:, 1], side)
    blurred = torch.nonzero(parameters.blur_px)[:, 0]
    if len(blurred):
        blur_KOO = blur_matrix(parameters.blur_px[blurred].to(device), side)
        blurred = blurred.to(device)
        for matrix in (rows_NOH, columns_NOW):
            matrix.index_copy_(0, blurred, blur_KOO @ matrix.index_select(0, blurred))
    columns_NWO = columns_NOW.transpose(1, 2)
    views_CNHW = torch.empty((3, len(parameters), side, side), device=device)
    for channel, plane_NP in enumerate(pixels_CNP[..., : side**2]):
        halfway = torch.bmm(rows_NOH, plane_NP.unflatten(1, (side, side)))
        torch.bmm(halfway, columns_NWO, out=views_CNHW[channel])
    erase(views_CNHW, parameters.erase_px)
    return views_CNHW


def _rotate_crops(crops_NHWC: Tensor, angle_deg: Tensor, side: int) -> Tensor:
    """Return pixels in 0-1 of the rotated centre crops, then those for the mean grey, [C, N, P]."""
    num, crop_px, device = len(crops_NHWC), crops_NHWC.shape[1], crops_NHWC.device
    mean_NP = mean_index(crop_px).to(device).expand(num, -1)
    index_NP = torch.cat([rotation_index(angle_deg, crop_px, side), mean_NP], 1)
    index_NP += torch.arange(num, device=device, dtype=torch.int32)[:, None] * crop_px**2
    pixels = crops_NHWC.reshape(-1, 3).index_select(0, index_NP.reshape(-1))
    planes = torch.empty((3, len(pixels)), device=device).copy_(pixels.T)
    return planes.mul_(1 / 255).reshape(3, num, -1)
