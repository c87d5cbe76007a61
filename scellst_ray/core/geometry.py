"""Frames and units: level-0 px, px of the image in hand, um.

Coordinates are continuous: pixel i of an axis covers [i, i + 1), so its centre is i + 0.5. A frame
changes to another one by multiplication and addition alone. Points are (x, y); sizes are (width,
height). The end of a name says its frame: `_x0/_y0/_w0/_h0` level-0 px, `_px` px of the image in
hand (the one being processed), `_um` micrometres.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

# Range of plausible resolutions of a slide, um per level-0 px.
MIN_MPP, MAX_MPP = 0.1, 1.2


class Box(NamedTuple):
    """An axis-aligned half-open box [x0, x0 + w0) x [y0, y0 + h0) in level-0 px."""

    x0: int
    y0: int
    w0: int
    h0: int

    def contains(self, points_x0y0: NDArray[np.floating]) -> NDArray[np.bool_]:
        """Return which points [N, 2] (x, y, level-0 px) lie in the box, bool [N].

        The box is half-open, so boxes that partition the plane own each point exactly once.
        """
        x, y = points_x0y0[:, 0], points_x0y0[:, 1]
        inside_x = (x >= self.x0) & (x < self.x0 + self.w0)
        return np.asarray(inside_x & (y >= self.y0) & (y < self.y0 + self.h0))

    def grow(self, margin: int) -> "Box":
        """Return the box with `margin` level-0 px added on each side."""
        return Box(self.x0 - margin, self.y0 - margin, self.w0 + 2 * margin, self.h0 + 2 * margin)


@dataclass(frozen=True)
class Frame:
    """Place of the image in hand on its slide.

    Attributes:
        origin_x0: Level-0 x of the image's left edge.
        origin_y0: Level-0 y of the image's top edge.
        ratio_x: Level-0 px per px in hand along x: the true ratio after rounding to whole pixels.
        ratio_y: Level-0 px per px in hand along y.
    """

    origin_x0: float
    origin_y0: float
    ratio_x: float
    ratio_y: float

    def to_level0(self, points_px: NDArray[np.floating]) -> NDArray[np.float64]:
        """Map points [N, 2] (x, y) from px in hand to level-0 px."""
        scale = np.array([self.ratio_x, self.ratio_y])
        origin = np.array([self.origin_x0, self.origin_y0])
        return np.asarray(np.asarray(points_px, np.float64) * scale + origin)

    def from_level0(self, points_x0y0: NDArray[np.floating]) -> NDArray[np.float64]:
        """Map points [N, 2] (x, y) from level-0 px to px in hand."""
        origin = np.array([self.origin_x0, self.origin_y0])
        scale = np.array([self.ratio_x, self.ratio_y])
        return np.asarray((np.asarray(points_x0y0, np.float64) - origin) / scale)

    @property
    def area_ratio(self) -> float:
        """Return the level-0 px2 per px2 in hand."""
        return self.ratio_x * self.ratio_y


def check_mpp(mpp: float | None, source: str) -> float:
    """Return `mpp` if it is a plausible resolution of a slide.

    Args:
        mpp: um per level-0 px, or None if unknown.
        source: Name of the slide or file, for the message.

    Raises:
        ValueError: `mpp` is unknown, not a number, or outside 0.1-1.2 um/px.
    """
    remedy = "give the true value in the manifest's mpp column (um per level-0 px)"
    if mpp is None or math.isnan(mpp):
        message = f"{source}: the resolution (mpp) is unknown; {remedy}"
        raise ValueError(message)
    if not MIN_MPP <= mpp <= MAX_MPP:
        message = f"{source}: mpp {mpp:g} is outside {MIN_MPP}-{MAX_MPP} um/px; {remedy}"
        raise ValueError(message)
    return mpp
