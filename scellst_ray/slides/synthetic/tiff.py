"""Write a synthetic slide as a pyramidal tiled TIFF that OpenSlide opens."""

from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import tifffile
from numpy.typing import NDArray

from scellst_ray.core.geometry import Box
from scellst_ray.slides.synthetic.layout import TissueLayout
from scellst_ray.slides.synthetic.render import BLOCK_PX, SlidePainter

_TILE_PX = 256
_FACTOR = 4
_SMALLEST_PX = 256  # no further level once the longer side is at most this
_DEFLATE_LEVEL = 2


def level_sizes(width0: int, height0: int) -> list[tuple[int, int]]:
    """Return (width, height) of every level, largest first; sides shrink by a factor of 4."""
    sizes = [(width0, height0)]
    while max(sizes[-1]) > _SMALLEST_PX and min(sizes[-1]) >= _FACTOR:
        width, height = sizes[-1]
        sizes.append((width // _FACTOR, height // _FACTOR))
    return sizes


def write_slide(path: str | Path, layout: TissueLayout) -> Path:
    """Paint the slide and write it, under a temporary name until it is complete.

    Deflate keeps the pixels of `SlidePainter.region` exactly, and tifffile needs no further codec.
    Memory holds one strip of level 0 and the smaller levels.

    Args:
        path: Path of the file; its folder is created if absent.
        layout: Tissue and nuclei to paint.

    Returns:
        The path.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    config = layout.config
    sizes = level_sizes(config.width0, config.height0)
    second = np.zeros((config.height0 // _FACTOR, config.width0 // _FACTOR, 3), np.uint8)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with tifffile.TiffWriter(temporary, bigtiff=config.width0 * config.height0 > 2**30) as tiff:
            strips = _strips(SlidePainter(layout), config.width0, config.height0, second)
            _write_level(tiff, _tiles(strips), sizes[0], config.mpp, reduced=False)
            image = second
            for size in sizes[1:]:
                if image.shape[1::-1] != size:
                    image = _shrink(image, size)
                _write_level(
                    tiff, _tiles([image]), size, config.mpp * config.width0 / size[0], reduced=True
                )
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _write_level(
    tiff: tifffile.TiffWriter,
    tiles: Iterator[NDArray[np.uint8]],
    size: tuple[int, int],
    mpp: float,
    *,
    reduced: bool,
) -> None:
    """Write one level; `reduced` marks it as a smaller copy of the first."""
    tiff.write(
        tiles,
        shape=(size[1], size[0], 3),
        dtype=np.uint8,
        tile=(_TILE_PX, _TILE_PX),
        photometric="rgb",
        compression="adobe_deflate",
        compressionargs={"level": _DEFLATE_LEVEL},
        predictor=True,
        maxworkers=1,
        subfiletype=int(reduced),
        resolution=(1e4 / mpp, 1e4 / mpp),
        resolutionunit="CENTIMETER",
        software="scellst_ray synthetic",
        metadata=None,
    )


def _strips(
    painter: SlidePainter, width0: int, height0: int, second: NDArray[np.uint8]
) -> Iterator[NDArray[np.uint8]]:
    """Yield level 0 in strips of whole tiles, and fill `second`, the second level, from them."""
    for y0 in range(0, height0, BLOCK_PX):
        strip = painter.region(Box(0, y0, width0, min(BLOCK_PX, height0 - y0)))
        rows = second[y0 // _FACTOR : (y0 + strip.shape[0]) // _FACTOR]
        if rows.size:
            rows[:] = _shrink(strip, (rows.shape[1], rows.shape[0]))
        yield strip


def _shrink(image: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Return the mean over squares of _FACTOR px; a remainder at the far edges is dropped."""
    width, height = size
    whole = image[: height * _FACTOR, : width * _FACTOR]
    return np.asarray(cv2.resize(whole, (width, height), interpolation=cv2.INTER_AREA))


def _tiles(
    strips: Iterator[NDArray[np.uint8]] | list[NDArray[np.uint8]],
) -> Iterator[NDArray[np.uint8]]:
    """Yield the tiles of strips row by row; incomplete tiles are padded with their edge pixels."""
    for strip in strips:
        for y in range(0, strip.shape[0], _TILE_PX):
            for x in range(0, strip.shape[1], _TILE_PX):
                tile = strip[y : y + _TILE_PX, x : x + _TILE_PX]
                missing_px = (_TILE_PX - tile.shape[0], _TILE_PX - tile.shape[1])
                pad = ((0, missing_px[0]), (0, missing_px[1]), (0, 0))
                yield np.pad(tile, pad, mode="edge") if any(missing_px) else tile
