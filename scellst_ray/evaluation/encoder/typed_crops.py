"""Cells of known type: their points, crops as `extract` cuts them, and colour statistics.

Shape letters: N cells, H W C crop.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scellst_ray import storage
from scellst_ray.core.geometry import Box
from scellst_ray.core.schemas import CROP_PX, CROP_UM
from scellst_ray.evaluation.segmentation.annotations import read_nuclei
from scellst_ray.nuclei.crops import crop_nuclei
from scellst_ray.runs.reading import open_run
from scellst_ray.slides.manifest import absolute, read_manifest
from scellst_ray.slides.reader import Slide
from scellst_ray.slides.source import open_slide
from scellst_ray.slides.tiling import default_read_mpp

TILE_UM = 480.0
QUANTILES = (0.05, 0.25, 0.75, 0.95)


@dataclass(frozen=True)
class TypedPoints:
    """Points and types of the cells of one slide.

    Attributes:
        slide_id: Name of the slide.
        uri: Image file of the slide.
        mpp: um per level-0 px; None: as the file says.
        x0y0_N2: Centroids in level-0 px.
        types_N: Type name of each cell.
        source: Source in the slide's record, if the cells are those of a run and its record says.
    """

    slide_id: str
    uri: str
    mpp: float | None
    x0y0_N2: NDArray[np.float64]
    types_N: NDArray[np.str_]
    source: str | None = None

    def take(self, kept_N: NDArray[np.bool_]) -> "TypedPoints":
        """Return some of the cells."""
        kept = self.x0y0_N2[kept_N], self.types_N[kept_N]
        return TypedPoints(self.slide_id, self.uri, self.mpp, *kept, self.source)


@dataclass(frozen=True)
class TypedCrops:
    """N cells of several slides with their crops.

    Attributes:
        crops_NHWC: uint8; a side is 12 um and 48 px.
        types_N: Type name of each cell.
        groups_N: slide_id of each cell.
    """

    crops_NHWC: NDArray[np.uint8]
    types_N: NDArray[np.str_]
    groups_N: NDArray[np.str_]


def points_of_manifest(manifest: str) -> list[TypedPoints]:
    """Read the annotated cells that a manifest lists: slide_id, uri, points and optionally mpp.

    Raises:
        ValueError: manifest or annotations cannot be used.
        FileNotFoundError: a file does not exist.
    """
    base = storage.resolve(manifest)[1] if storage.is_local(manifest) else manifest
    found = []
    for row in read_manifest(manifest, ("points",)):
        if row.mpp_error is not None or "points" not in row.columns:
            message = row.mpp_error or (
                f"{manifest}: slide {row.slide_id!r} has no points; name a file with them"
            )
            raise ValueError(message)
        nuclei = read_nuclei(absolute(str(row.columns["points"]), base.rsplit("/", 1)[0]))
        place = row.slide_id, row.uri, row.mpp
        found.append(TypedPoints(*place, nuclei.centroid_N2, nuclei.types_N))
    return found


def points_of_run(uri: str, slides: Sequence[str] | None = None) -> list[TypedPoints]:
    """Read the points of the cells of a run, and the types that the segmenter gave them.

    Raises:
        ValueError: it is no run, lacks a slide, or does not name the image of a slide.
    """
    run, found = open_run(uri), []
    for slide_id in run.choose(slides):
        if slide_id not in run.sources:
            message = (
                f"{run.uri}: its slides.json does not name the image of slide {slide_id!r}; give "
                "a manifest with points instead of the run"
            )
            raise ValueError(message)
        source, cells = run.sources[slide_id], run.cells(slide_id, ["x0", "y0", "nucleus_type"])
        x0y0_N2 = np.stack([cells[name].to_numpy() for name in ("x0", "y0")], axis=1)
        types_N = np.array(cells["nucleus_type"].to_pylist(), np.str_)
        place = slide_id, source["uri"], source["mpp"]
        recorded = run.records[slide_id].get("source")
        found.append(TypedPoints(*place, x0y0_N2.astype(np.float64), types_N, recorded))
    return found


def crops_of(listed: Sequence[TypedPoints]) -> TypedCrops:
    """Return the crops of the cells of several slides, slide by slide.

    Raises:
        ValueError: an image cannot be read, is not the one in which a run found its cells, or
            points lie outside it.
    """
    crops = [np.empty((0, CROP_PX, CROP_PX, 3), np.uint8)]
    for points in listed:
        with open_slide(points.uri, points.mpp, recorded=points.source) as opened:
            slide = opened.slide
            inside = (points.x0y0_N2 >= 0) & (points.x0y0_N2 <= (slide.width0, slide.height0))
            outside = int((~inside.all(axis=1)).sum())
            if outside:
                message = (
                    f"slide {points.slide_id!r}: {outside} of {len(inside)} points lie outside "
                    f"its {slide.width0} x {slide.height0} px; give them in px of that image"
                )
                raise ValueError(message)
            crops.append(crops_at(slide, points.x0y0_N2))
            opened.check()
    return TypedCrops(
        np.concatenate(crops),
        np.concatenate([np.empty(0, np.str_), *(points.types_N for points in listed)]),
        np.repeat([p.slide_id for p in listed], [len(p.types_N) for p in listed]).astype(np.str_),
    )


def crops_at(slide: Slide, x0y0_N2: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Return the crops around points of a slide, read at the resolution `extract` reads at.

    Args:
        slide: An open slide.
        x0y0_N2: Centres in level-0 px.

    Returns:
        uint8 [N, 48, 48, 3]; a side is 12 um.
    """
    read_mpp = default_read_mpp(slide.mpp)
    side0, margin0 = round(TILE_UM / slide.mpp), int(np.ceil(CROP_UM / slide.mpp))
    crops_NHWC = np.empty((len(x0y0_N2), CROP_PX, CROP_PX, 3), np.uint8)
    tile_N2 = np.floor(x0y0_N2 / side0).astype(np.int64)
    for tile in np.unique(tile_N2, axis=0):
        inside = (tile_N2 == tile).all(axis=1)
        box = Box(int(tile[0]) * side0, int(tile[1]) * side0, side0, side0).grow(margin0)
        image, frame = slide.read(box, read_mpp)
        px_per_um = (1 / (frame.ratio_x * slide.mpp), 1 / (frame.ratio_y * slide.mpp))
        crops_NHWC[inside] = crop_nuclei(image, frame.from_level0(x0y0_N2[inside]), px_per_um)
    return crops_NHWC


def colours(crops_NHWC: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return 18 statistics of each crop: mean, deviation and four quantiles of each colour.

    A probe can learn stain and density from them, but no shape. So they are the baseline of every
    encoder. benchmarks/spot_correlation.py uses the same kind of statistics.

    Returns:
        float32 [N, 18].
    """
    pixels = crops_NHWC.reshape(len(crops_NHWC), -1, 3)
    stats = [pixels.mean(axis=1), pixels.std(axis=1), *np.quantile(pixels, QUANTILES, axis=1)]
    return np.concatenate(stats, axis=1).astype(np.float32)
