"""Expression predicted from colour alone, a baseline that every model must beat.

It is a ridge regression on 18 colour statistics of each spot's disc. A model that does not beat it
has learnt little more than stain and density. Shape letters: S spots, G genes, C statistics (18).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.linear_model import RidgeCV
from sklearn.preprocessing import StandardScaler

from scellst_ray.core.geometry import Box
from scellst_ray.slides.manifest import SlideRow
from scellst_ray.slides.reader import Slide
from scellst_ray.slides.source import open_slide
from scellst_ray.spots.table import Spots
from scellst_ray.storage.node_cache import hold

NUM_STATISTICS = 18
QUANTILES = (10, 25, 75, 90)
# um per px at which discs are read, unless the slide itself is coarser.
DISC_MPP = 1.0
PENALTIES = np.logspace(-1, 5, 13)


@dataclass(frozen=True)
class ColourRidge:
    """A fitted colour baseline.

    Attributes:
        scaler: Standardises statistics with mean and deviation of the training spots.
        ridge: The regression. Its penalty is chosen by leave-one-out on the training spots.
    """

    scaler: StandardScaler
    ridge: RidgeCV

    def predict(self, colours_SC: ArrayLike) -> NDArray[np.float64]:
        """Return expression [S, G], in the units of the training targets, from colours [S, 18]."""
        predicted = self.ridge.predict(self.scaler.transform(np.asarray(colours_SC)))
        return np.asarray(predicted, np.float64).reshape(len(np.asarray(colours_SC)), -1)


def fit_colour_ridge(colours_SC: ArrayLike, targets_SG: ArrayLike) -> ColourRidge:
    """Fit the baseline on the spots of all training slides.

    Args:
        colours_SC: Colour statistics from slide_colours [S, 18].
        targets_SG: Targets of the model: scaled log-normalised expression [S, G].
    """
    scaler = StandardScaler().fit(np.asarray(colours_SC))
    ridge = RidgeCV(alphas=PENALTIES).fit(scaler.transform(colours_SC), np.asarray(targets_SG))
    return ColourRidge(scaler, ridge)


def slide_mpp(row: SlideRow) -> float:
    """Return um per level-0 px of a slide: as the manifest says, else as the file says."""
    if row.mpp is not None:
        return row.mpp
    with hold(row.uri) as held, Slide(held.path, held.name, None) as slide:
        return slide.mpp


def slide_colours(row: SlideRow, spots: Spots, source: str | None = None) -> NDArray[np.float64]:
    """Open a slide and return the colour statistics of every spot's disc [S, 18].

    Args:
        row: The slide.
        spots: Its spots.
        source: Source in the slide's record; None: any file will do.

    Raises:
        ChangedFileError: the file is another one than that of the record.
    """
    return colours_around(row, spots.xy0, spots.radius0, source)


def colours_around(
    row: SlideRow, xy0_S2: NDArray[np.float64], radius0: float, source: str | None = None
) -> NDArray[np.float64]:
    """Open a slide and return disc_colours [S, 18] around points; both in level-0 px.

    `source` is as in `slide_colours`.
    """
    with open_slide(row.uri, row.mpp, recorded=source) as opened:
        colours = [disc_colours(opened.slide, xy0, radius0) for xy0 in xy0_S2]
        opened.check()
    return np.stack(colours) if colours else np.zeros((0, NUM_STATISTICS))


def disc_colours(slide: Slide, xy0: NDArray[np.float64], radius0: float) -> NDArray[np.float64]:
    """Return mean, deviation and the 10, 25, 75 and 90 % quantiles of red, green and blue.

    Args:
        slide: An open slide.
        xy0: Centre (x, y) of the disc, level-0 px.
        radius0: Radius of the disc, level-0 px. A pixel belongs to the disc if its centre does.

    Returns:
        float64 [18].
    """
    side = round(2 * radius0)
    box = Box(round(xy0[0] - radius0), round(xy0[1] - radius0), side, side)
    image, frame = slide.read(box, max(DISC_MPP, slide.mpp))
    y, x = np.mgrid[: image.shape[0], : image.shape[1]] + 0.5
    centres = frame.to_level0(np.column_stack([x.ravel(), y.ravel()]))
    inside = ((centres - xy0) ** 2).sum(axis=1) <= radius0**2
    pixels = image.reshape(-1, 3)[inside].astype(np.float64)
    quantiles = np.percentile(pixels, QUANTILES, axis=0)
    return np.concatenate([pixels.mean(axis=0), pixels.std(axis=0), quantiles.ravel()])
