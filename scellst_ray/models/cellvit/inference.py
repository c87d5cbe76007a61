"""CellViT over tiles: images in, four bytes per pixel out.

The network's maps are shrunk on its device to one 32-bit number per pixel (see MAP_LEVEL in
`core/schemas.py`). That number holds the edge energy of the horizontal-vertical map (HoVer-Net,
arXiv:1812.06499, section 3.2) and the argmax of the two class maps. The edge energy repeats
OpenCV's arithmetic: Sobel in float64, min-max scaling in float32 with one rounding. Therefore
thresholds act as in the published post-processing.

Shape letters: B tiles, H W pixels, R T rows and columns of tokens, D channels of a token, Y nucleus
types, N nuclei.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from scellst_ray.core.schemas import MAP_LEVEL, MAP_NUCLEUS, MAP_TYPE_SHIFT
from scellst_ray.models.cellvit.checkpoint import CellVit
from scellst_ray.models.cellvit.encoders import TOKEN_PX
from scellst_ray.models.cellvit.network import Maps

SOBEL_SIDE = 21
# On a CPU the filter works on bands of rows that fit into the cache: it takes a third of the time.
BAND_ROWS = 128
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Most numbers in memory at once, per pixel, at the last full-size block of a decoder: skips
# (64 + 128 / 4 + 256 / 16 + 8), upsampled map (64), both joined (128), a convolution's output and
# its normalised copy (64 + 64). A quarter is added for the workspaces of convolutions.
NUMBERS_PER_PIXEL = 1.25 * (120 + 64 + 128 + 64 + 64)
FREE_SHARE = 0.8  # share of the free device memory that a batch may use


def pack_maps(
    binary_B2HW: Tensor, hv_B2HW: Tensor, types_BYHW: Tensor, window_px: int | None = None
) -> Tensor:
    """Shrink the maps of a batch to one 32-bit number per pixel.

    Args:
        binary_B2HW: Logits of background and nucleus.
        hv_B2HW: Offsets from the nucleus's centre, horizontal first.
        types_BYHW: Logits of at most 64 types, background first.
        window_px: Side of a square centred on each pixel. The pixel's gradient is scaled by the
            least and the greatest gradient in that square. None, as published: by those of the
            whole tile.

    Returns:
        int32 [B, H, W] on the maps' device, to be read as uint32 (see MAP_LEVEL in
        `core/schemas.py`).
    """
    energy_BHW = edge_energy(hv_B2HW, window_px)
    level_BHW = ((1 - energy_BHW) * MAP_LEVEL).round().to(torch.int32).clamp(0, MAP_LEVEL)
    # As published, argmax takes probabilities. Where they round to a tie, the first class wins.
    nucleus_BHW = binary_B2HW.float().softmax(dim=1).argmax(dim=1).to(torch.int32)
    type_BHW = types_BYHW.float().softmax(dim=1).argmax(dim=1).to(torch.int32)
    return level_BHW + nucleus_BHW * MAP_NUCLEUS + (type_BHW << MAP_TYPE_SHIFT)


def edge_energy(hv_B2HW: Tensor, window_px: int | None = None) -> Tensor:
    """Return how much each pixel looks like an edge between nuclei, float32 [B, H, W] in 0-1.

    The horizontal offset falls steeply from a nucleus to its right neighbour. The vertical offset
    falls steeply from a nucleus to the one below. Each gradient is scaled to 0-1 and subtracted
    from 1. The energy is the larger of the two results.
    """
    energies = []
    for channel in range(2):
        offset_BHW = hv_B2HW[:, channel].float()
        if window_px is None:  # as published; it changes at most the rounding
            offset_BHW = _scale(offset_BHW, *_extremes(offset_BHW))
        gradient_BHW = _sobel(offset_BHW, horizontal=channel == 0)
        if window_px is None:
            low, high = _extremes(gradient_BHW)
        else:
            low, high = -_window_max(-gradient_BHW, window_px), _window_max(gradient_BHW, window_px)
        energies.append(1 - _scale(gradient_BHW, low, high))
    return torch.maximum(*energies)


def _extremes(x_BHW: Tensor) -> tuple[Tensor, Tensor]:
    return x_BHW.amin(dim=(1, 2), keepdim=True), x_BHW.amax(dim=(1, 2), keepdim=True)


def _scale(x_BHW: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Map `low` to 0 and `high` to 1 in float32, as cv2.normalize does; a flat map gives 0."""
    low, spread = low.double(), high.double() - low.double()
    flat = spread <= torch.finfo(torch.float64).eps
    factor = torch.where(flat, 0.0, 1 / spread).float().double()
    shift = (-(low * factor)).float().double()
    return torch.addcmul(shift, x_BHW.double(), factor).float()


def _sobel(x_BHW: Tensor, *, horizontal: bool) -> Tensor:
    """Return the Sobel derivative, float64 [B, H, W]; borders are mirrored without the edge."""
    smooth = [float(math.comb(SOBEL_SIDE - 1, k)) for k in range(SOBEL_SIDE)]
    shorter = [math.comb(SOBEL_SIDE - 2, k) for k in range(SOBEL_SIDE - 1)]
    slope = [float(a - b) for a, b in zip([0, *shorter], [*shorter, 0], strict=True)]
    radius, height = SOBEL_SIDE // 2, x_BHW.shape[1]
    padded = F.pad(x_BHW, (radius, radius, radius, radius), mode="reflect").double()
    band = BAND_ROWS if x_BHW.device.type == "cpu" else height
    out_BHW = torch.empty(x_BHW.shape, dtype=torch.float64, device=x_BHW.device)
    for top in range(0, height, band):
        bottom = min(top + band, height)
        rows = padded[:, top : bottom + 2 * radius]
        rows = _filter(rows, slope if horizontal else smooth, dim=2)
        out_BHW[:, top:bottom] = _filter(rows, smooth if horizontal else slope, dim=1)
    return out_BHW


def _filter(x_BHW: Tensor, taps: list[float], dim: int) -> Tensor:
    """Correlate along one dimension, pairing taps from the centre outwards as OpenCV does."""
    radius = len(taps) // 2
    length = x_BHW.shape[dim] - 2 * radius
    sign = 1 if taps[0] == taps[-1] else -1
    out = x_BHW.narrow(dim, radius, length) * taps[radius]
    pair = torch.empty_like(out)
    for step in range(1, radius + 1):
        before = x_BHW.narrow(dim, radius - step, length)
        after = x_BHW.narrow(dim, radius + step, length)
        torch.add(after, before, alpha=sign, out=pair)
        out += pair.mul_(taps[radius + step])
    return out


def _window_max(x_BHW: Tensor, window_px: int) -> Tensor:
    """Return the greatest value in the square centred on each pixel; squares end at the borders.

    The sides grow by doubling: nine steps for 256 px. A sliding maximum of a smooth map has no
    jumps. Therefore a map scaled by it shows no lines at the ends of windows.
    """
    half = window_px // 2
    side = 2 * half + 1
    for dim, padding in ((2, (half, half)), (1, (0, 0, half, half))):
        length = x_BHW.shape[dim]
        x_BHW = F.pad(x_BHW, padding, value=-math.inf)
        grown = 1
        while 2 * grown <= side:
            rest = x_BHW.shape[dim] - grown
            x_BHW = torch.maximum(x_BHW.narrow(dim, 0, rest), x_BHW.narrow(dim, grown, rest))
            grown *= 2
        x_BHW = torch.maximum(x_BHW.narrow(dim, 0, length), x_BHW.narrow(dim, side - grown, length))
    return x_BHW


Pack = Callable[[Tensor, Tensor, Tensor, int | None], Tensor]


def segment_tiles(  # noqa: PLR0913 - no two of these arguments belong together
    model: CellVit,
    images: Sequence[NDArray[np.uint8]],
    side: int,
    device: str,
    precision: str,
    *,
    tokens: bool = False,
    window_px: int | None = None,
    batch_size: int | None = None,
    pack: Pack = pack_maps,
) -> list[tuple[NDArray[np.uint32], NDArray[np.float16] | None]]:
    """Run the network over tiles and shrink its maps.

    Args:
        model: Model from `load_cellvit`; it is moved to `device` if necessary.
        images: uint8 RGB [h, w, 3]; no side is longer than `side`. White is added to the right
            and below.
        side: Side of the square that the network sees, in px: a multiple of 16.
        device: 'cpu' or 'cuda'.
        precision: Precision of matrix products and convolutions: 'float32', 'bfloat16' or
            'float16'. In float32 a GPU may still round a convolution's factors to TF32, which is
            torch's default.
        tokens: Whether to return the encoder's last tokens, too.
        window_px: See `pack_maps`.
        batch_size: Number of tiles per pass. None: as many as the free memory of a GPU allows; 1
            on a CPU, where more gain nothing. There, a result then never depends on the other
            tiles of a pass.
        pack: Function that shrinks the maps: `pack_maps`, or an equal one that is quicker on a
            CPU.

    Returns:
        For each image: packed maps uint32 [side, side], and tokens float16
        [side / 16, side / 16, D] or None.

    Raises:
        ValueError: An image does not fit, the network does not take the side, maps are not
            finite, or the device has no memory for one tile.
    """
    _check_images(images, side, precision)
    model.network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    size = batch_size or _batch_size(side, device, precision, len(images))
    results: list[tuple[NDArray[np.uint32], NDArray[np.float16] | None]] = []
    while len(results) < len(images):
        batch = images[len(results) : len(results) + size]
        try:
            maps = _compute_maps(model, batch, side, device, precision, want_tokens=tokens)
            results += _shrink_maps(maps, window_px, precision, pack)
        except torch.OutOfMemoryError as error:
            if len(batch) == 1:
                message = (
                    f"{device}: one tile of {side} px does not fit in memory with CellViT-"
                    f"{model.arch.variant} in {precision}; use smaller tiles, a half precision or "
                    "a smaller variant, or free the device"
                )
                raise ValueError(message) from error
            size = len(batch) // 2
    return results


@torch.inference_mode()
def _compute_maps(
    model: CellVit,
    images: Sequence[NDArray[np.uint8]],
    side: int,
    device: str,
    precision: str,
    *,
    want_tokens: bool,
) -> Maps:
    """Return the network's maps of images, which are padded with white to squares."""
    batch = np.full((len(images), side, side, 3), 255, np.uint8)
    for image_HWC, row in zip(images, batch, strict=True):
        row[: image_HWC.shape[0], : image_HWC.shape[1]] = image_HWC
    x_BHW3 = torch.from_numpy(batch).to(device).float() / 255
    mean, std = (torch.tensor(values, device=device) for values in (model.mean, model.std))
    # After this permutation channels are last in memory, the fastest layout for convolutions.
    x_B3HW = ((x_BHW3 - mean) / std).permute(0, 3, 1, 2)
    with torch.autocast(device, DTYPES[precision], enabled=precision != "float32"):
        maps: Maps = model.network(x_B3HW, want_tokens=want_tokens)
    return maps


def _check_images(images: Sequence[NDArray[np.uint8]], side: int, precision: str) -> None:
    if precision not in DTYPES:
        message = f"precision {precision!r}: expected one of {', '.join(DTYPES)}"
        raise ValueError(message)
    for image_HWC in images:
        shape, dtype = image_HWC.shape, image_HWC.dtype
        if dtype != np.uint8 or len(shape) != 3 or shape[2] != 3 or max(shape[:2]) > side:
            message = (
                f"tile of shape {shape} and type {dtype}: expected uint8 RGB of at most "
                f"{side} x {side} px"
            )
            raise ValueError(message)


def _batch_size(side: int, device: str, precision: str, num_images: int) -> int:
    if device == "cpu":
        return 1
    free, _ = torch.cuda.mem_get_info(device)
    # This process can also use the memory that it has reserved and not yet allocated.
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return max(1, min(num_images, int(FREE_SHARE * free / tile_bytes(side, precision))))


def tile_bytes(side: int, precision: str) -> int:
    """Return about how many bytes of memory the network needs for a tile of `side` px.

    The decoders at full size need the most memory. They are equally wide in every variant.
    """
    return int(NUMBERS_PER_PIXEL * side**2 * DTYPES[precision].itemsize)


@torch.inference_mode()
def _shrink_maps(
    maps: Maps, window_px: int | None, precision: str, pack: Pack
) -> list[tuple[NDArray[np.uint32], NDArray[np.float16] | None]]:
    """Return the packed maps and tokens of each tile of a batch, in the host's memory."""
    hv = maps.hv_map
    packed_BHW = pack(maps.nuclei_binary_map, hv, maps.nuclei_type_map, window_px)
    tokens_BRTD = None
    if maps.tokens is not None:
        tokens_BRTD = maps.tokens.permute(0, 2, 3, 1).to(torch.float16)
    parts = [hv, maps.nuclei_binary_map, maps.nuclei_type_map]
    parts += [] if tokens_BRTD is None else [tokens_BRTD]
    if not torch.stack([part.isfinite().all() for part in parts]).all():
        message = f"the network's output is not finite in {precision}; use float32 or bfloat16"
        raise ValueError(message)
    packed = packed_BHW.cpu().numpy().view(np.uint32)
    if tokens_BRTD is None:
        return [(image, None) for image in packed]
    return list(zip(packed, tokens_BRTD.cpu().numpy(), strict=True))


def tokens_of(
    tokens_RTD: NDArray[np.float16], boxes_N4: NDArray[np.integer]
) -> NDArray[np.float16]:
    """Return the mean of the tokens under each nucleus's bounding box.

    Args:
        tokens_RTD: Tokens of one tile, from `segment_tiles`.
        boxes_N4: x0, y0, x1, y1 in px of the tile, ends exclusive.

    Returns:
        float16 [N, D].

    Raises:
        ValueError: A box is empty or reaches out of the tile.
    """
    rows, columns, dim = tokens_RTD.shape
    boxes = np.asarray(boxes_N4).reshape(-1, 4)
    left, top = boxes[:, 0] // TOKEN_PX, boxes[:, 1] // TOKEN_PX
    right, bottom = -(-boxes[:, 2] // TOKEN_PX), -(-boxes[:, 3] // TOKEN_PX)
    wrong = (boxes[:, :2] < 0).any(1) | (boxes[:, 2:] <= boxes[:, :2]).any(1)
    wrong |= (right > columns) | (bottom > rows)
    if wrong.any():
        message = (
            f"box {boxes[wrong][0].tolist()} (x0, y0, x1, y1): expected a box that is not empty "
            f"and lies in a tile of {columns * TOKEN_PX} x {rows * TOKEN_PX} px"
        )
        raise ValueError(message)
    sums = np.zeros((rows + 1, columns + 1, dim))  # sums[r, c] is the sum of tokens[:r, :c]
    np.cumsum(tokens_RTD, axis=0, dtype=np.float64, out=sums[1:, 1:])
    np.cumsum(sums[1:, 1:], axis=1, out=sums[1:, 1:])
    total = sums[bottom, right] - sums[top, right] - sums[bottom, left] + sums[top, left]
    mean_ND: NDArray[np.float64] = total / ((bottom - top) * (right - left))[:, None]
    return mean_ND.astype(np.float16)
