"""Do the spots lie on the tissue? If not: would they, were axes swapped, mirrored or scaled?

Tissue comes as points, whoever found it: centres of tissue pixels, or centroids of cells.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

# Spots said to be under tissue lie on it, but for pale or torn places. (All did on three her2st
# sections; mirrored left to right, 89 % of two of them still did.)
SOUND_SHARE, LEAST_SHARE = 0.95, 0.5
# What another placing must win, in spots on tissue and in agreement of the two areas.
LEAST_GAIN, LEAST_AGREEMENT_GAIN = 0.1, 0.05
# Shrunk enough, any spots lie on some tissue: scaling is only a cause where areas agree.
LEAST_AGREEMENT_SCALED = 0.5
SCALES = (0.125, 0.25, 0.5, 2.0, 4.0, 8.0)
# Spots need not reach as far as the tissue, so the factor that their extents give is a guess.
AROUND_FACTOR = (0.7, 0.77, 0.85, 0.92, 1.0, 1.1, 1.2)
MAX_POINTS = 20_000


@dataclass(frozen=True)
class Placing:
    """How well spots lie in one placing.

    Attributes:
        name: 'as given', or what was changed.
        share_on_tissue: Share of spots with tissue within reach.
        share_of_tissue: Share of tissue within one pitch of a spot.
    """

    name: str
    share_on_tissue: float
    share_of_tissue: float

    @property
    def agreement(self) -> float:
        """Harmonic mean of both shares: a heap of spots in the middle of the tissue has little."""
        total = self.share_on_tissue + self.share_of_tissue
        return 2 * self.share_on_tissue * self.share_of_tissue / total if total else 0.0


@dataclass(frozen=True)
class Alignment:
    """What was found.

    Attributes:
        given: The spots as they are.
        best: The placing with the best agreement (scaled ones only where that is no accident).
        problem: What is wrong, and the likely cause; None if nothing.
    """

    given: Placing
    best: Placing
    problem: str | None

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON can hold it."""
        return asdict(self)


def check_alignment(
    xy0: NDArray[np.floating],
    tissue_xy0: NDArray[np.floating],
    reach0: float,
    size0: tuple[int, int] | None = None,
) -> Alignment:
    """Compare spots with tissue, as they lie and as they would after common mistakes.

    Args:
        xy0: Spot centres [S, 2] (x, y), level-0 px; only those said to be under tissue.
        tissue_xy0: Points of the tissue [T, 2], spread over it, level-0 px.
        reach0: A spot is on tissue if a point of it is so near, level-0 px.
        size0: Width and height of the image; if None, mirrored about the middle of the tissue.

    Returns:
        The finding. There is a problem where fewer than half of the spots are on tissue, or where
        another placing puts 10 % more of all spots there. Where tissue fills the image, or is
        symmetric, no mistake can show; nor does a shift by less than the tissue's margin.
    """
    spots = np.asarray(xy0, np.float64)
    tissue = np.asarray(tissue_xy0, np.float64).reshape(-1, 2)
    if not len(tissue):
        nowhere = Placing("as given", 0.0, 0.0)
        return Alignment(nowhere, nowhere, "the slide has no tissue at all where spots could lie")
    tissue = tissue[:: max(1, len(tissue) // MAX_POINTS)]
    # Thinned points may lie farther apart than the reach.
    reach0 = max(reach0, _spacing(tissue))
    pitch0 = _spacing(spots)
    width0, height0 = size0 or tissue.min(axis=0) + tissue.max(axis=0)
    tree = cKDTree(tissue)
    placings = []
    for name, scale, moved in _alternatives(spots, tissue, float(width0), float(height0)):
        on_tissue = tree.query(moved, distance_upper_bound=reach0)[0] < np.inf
        near = cKDTree(moved).query(tissue, distance_upper_bound=max(pitch0 * scale, reach0))[0]
        placing = Placing(name, float(on_tissue.mean()), float((near < np.inf).mean()))
        if scale == 1.0 or placing.agreement >= LEAST_AGREEMENT_SCALED:
            placings.append(placing)
    given, best = placings[0], max(placings, key=lambda placing: placing.agreement)
    return Alignment(given, best, _problem(given, best))


def _spacing(points: NDArray[np.float64]) -> float:
    """Return the median distance to the nearest other point; 0 for a single one."""
    if len(points) < 2:
        return 0.0
    return float(np.median(cKDTree(points).query(points, k=2)[0][:, 1]))


def _alternatives(
    spots: NDArray[np.float64], tissue: NDArray[np.float64], width0: float, height0: float
) -> list[tuple[str, float, NDArray[np.float64]]]:
    """Return placings as (name, scale, positions), the given one first."""
    x, y = spots.T
    turned = [
        ("as given", x, y),
        ("x and y swapped", y, x),
        ("mirrored left to right", width0 - x, y),
        ("mirrored top to bottom", x, height0 - y),
        ("turned by 180 degrees", width0 - x, height0 - y),
        ("turned by 90 degrees clockwise", width0 - y, x),
        ("turned by 90 degrees anticlockwise", y, height0 - x),
        ("mirrored along the other diagonal", width0 - y, height0 - x),
    ]
    placings = [(name, 1.0, np.column_stack([a, b])) for name, a, b in turned]
    scales = [(f"scaled by {scale:g}", scale) for scale in SCALES]
    # Positions of a smaller image: where their extent says so, whatever the factor.
    low_spots, high_spots = np.percentile(spots, (2, 98), axis=0)
    low_tissue, high_tissue = np.percentile(tissue, (2, 98), axis=0)
    factors = (high_tissue - low_tissue) / np.maximum(high_spots - low_spots, 1e-9)
    if 0.75 < factors[0] / max(factors[1], 1e-9) < 1.33:
        factor = float(np.sqrt(factors[0] * factors[1]))
        near = [factor * part for part in AROUND_FACTOR]
        scales += [(f"scaled by about {f:.2g}", f) for f in near if abs(np.log(f)) > 0.1]
    placings += [(name, scale, spots * scale) for name, scale in scales]
    return placings


def _problem(given: Placing, best: Placing) -> str | None:
    """Say what is wrong with the spots as given, if anything is."""
    share = given.share_on_tissue
    better = (
        best.share_on_tissue >= share + LEAST_GAIN
        and best.agreement >= given.agreement + LEAST_AGREEMENT_GAIN
    )
    if share >= SOUND_SHARE or (share >= LEAST_SHARE and not better):
        return None
    text = f"{share:.0%} of the spots lie on tissue"
    if not better:
        return f"{text}, and neither swapping, mirroring nor scaling their positions mends it"
    return f"{text}; {best.name}, {best.share_on_tissue:.0%} would: the likely cause"
