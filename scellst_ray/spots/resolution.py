"""Compare the resolution of a slide with what its spots say about it."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

from scellst_ray.core.resolution import CONFIRMED, MAX_DIFFERENCE
from scellst_ray.spots.lattice import Lattice

logger = logging.getLogger(__name__)

VISIUM_PITCH_UM = 100.0
SPOT_DIAMETERS_UM, FIDUCIAL_RATIO = (65.0, 55.0), 105 / 65
# ST arrays of 1,007 spots; the later ones of 1,934 spots are denser.
ST_PITCHES_UM = (200.0, 150.0)
# `spot_diameter_fullres` in pitches: Space Ranger gives 65 um, HEST the true 55 um.
VISIUM_DIAMETERS = (0.5, 0.72)
# Words in `st_technology` of instruments whose counts are pooled over squares.
POOLED = ("xenium", "visium hd", "visiumhd", "cosmx", "merfish", "merscope", "stereo-seq", "stereo")
DISC_OF_SQUARE = 2 / math.sqrt(math.pi)


@dataclass(frozen=True)
class StatedMpp:
    """A resolution that follows from the spots.

    Attributes:
        mpp: um per level-0 px.
        source: Where it comes from, for messages.
    """

    mpp: float
    source: str


def check_stated_mpp(
    stated: Sequence[StatedMpp], mpp: float, source: str, *, is_confirmed: bool = False
) -> None:
    """Check that the resolution in use agrees with what the spots say, to 10 %.

    Args:
        stated: Resolutions that follow from the spots. One that agrees is enough for statements of
            the same source.
        mpp: um per level-0 px in use.
        source: Name of the slide in errors.
        is_confirmed: Whether the user confirmed the resolution; a contradiction is then logged.

    Raises:
        ValueError: A statement contradicts the resolution.
    """
    for name in dict.fromkeys(statement.source for statement in stated):
        values = [statement.mpp for statement in stated if statement.source == name]
        if any(agrees(value, mpp) for value in values):
            continue
        text = (
            f"{source}: {mpp:.4g} um/px in use, but {values[0]:.4g} um/px by {name}. Give the true "
            "value in the manifest's mpp column and extract the slide again, or give the positions "
            f"of this image; 'yes' in the column {CONFIRMED} says that the value in use is right"
        )
        if not is_confirmed:
            raise ValueError(text)
        logger.warning("%s, as it does", text)


def agrees(one: float, other: float) -> bool:
    """Return whether two resolutions, or two lengths, differ by at most 10 %."""
    return abs(one - other) <= (MAX_DIFFERENCE + 1e-9) * min(one, other)


def visium_statement(
    pitch0: float | None, diameter0: float | None, mpp: float, source: str
) -> list[StatedMpp]:
    """Return the resolution by the pitch of Visium's spots, if they are surely Visium's.

    Args:
        pitch0: Pitch of the hexagons, level-0 px; None if the spots do not lie so.
        diameter0: `spot_diameter_fullres`; None if the file does not state it.
        mpp: Resolution in use, um per level-0 px. A diameter that fits it but not the pitch, or
            neither, is told as a warning.
        source: Name of the file in messages.
    """
    if pitch0 is None:
        return []
    by_pitch = VISIUM_PITCH_UM / pitch0
    low, high = VISIUM_DIAMETERS
    if diameter0 is None or low <= diameter0 / pitch0 <= high:
        return [StatedMpp(by_pitch, f"the pitch of Visium's spots ({pitch0:.1f} px are 100 um)")]
    by_diameter = [um / diameter0 for um in SPOT_DIAMETERS_UM]
    if not agrees(by_pitch, mpp) or not any(agrees(value, mpp) for value in by_diameter):
        text = (
            "%s: %.4g um per px is used; neighbouring spots are %.1f px apart (%.4g um per px if "
            "they are Visium's), and spot_diameter_fullres is %.1f px (%.4g um per px). They do "
            "not fit together: check `mpp` and the files of the spots"
        )
        logger.warning(text, source, mpp, pitch0, by_pitch, diameter0, by_diameter[0])
    return []


def diameter_statements(diameter0: float | None, fiducial0: float | None) -> list[StatedMpp]:
    """Return the resolutions by `spot_diameter_fullres`, if Space Ranger surely wrote it.

    Space Ranger's spots and fiducial spots have 65 and 105 um; other software keeps this ratio and
    may give the true 55 um.

    Args:
        diameter0: `spot_diameter_fullres`, level-0 px; None if the file does not state it.
        fiducial0: `fiducial_diameter_fullres`, likewise.
    """
    if diameter0 is None or fiducial0 is None:
        return []
    if abs(fiducial0 / diameter0 / FIDUCIAL_RATIO - 1) > 0.01:
        return []
    source = f"spot_diameter_fullres ({diameter0:.1f} px are 65 um)"
    return [StatedMpp(um / diameter0, source) for um in SPOT_DIAMETERS_UM]


def st_statements(pitch0: float | None) -> list[StatedMpp]:
    """Return the resolutions by the pitch of an ST array, level-0 px; none if it is unknown."""
    if pitch0 is None:
        return []
    source = f"the pitch of the ST array ({pitch0:.1f} px are 200 um)"
    return [StatedMpp(um / pitch0, source) for um in ST_PITCHES_UM]


def has_pooled_counts(technology: object) -> bool:
    """Return whether a technology's counts are pooled over squares to make spots."""
    text = str(technology or "").lower().replace("_", " ")
    return any(word in text for word in POOLED)


def diameter_of_squares(
    diameter_um: float,
    lattice: Lattice | None,
    mpp: float,
    source: str,
    *,
    is_pooled: bool,
    is_given: bool,
) -> float:
    """Return a diameter whose disc covers the squares over which counts were pooled.

    Args:
        diameter_um: Diameter that the file or the user gives, um.
        lattice: Lattice of the spots.
        mpp: um per level-0 px.
        source: Name of the file in messages.
        is_pooled: Whether the technology says that counts are pooled over squares.
        is_given: Whether the user gave the diameter, which is then kept.

    Returns:
        The diameter of the disc with the area of a square, if the spots are surely squares: their
        technology says so, or the discs would touch. Else the given one; a warning says so if it
        may be wrong.
    """
    if lattice is None or lattice.kind != "squares":
        return diameter_um
    pitch_um = lattice.pitch0 * mpp
    whole_um = pitch_um * DISC_OF_SQUARE
    share = (diameter_um / whole_um) ** 2
    if 0.9 <= share <= 1.1:
        return diameter_um
    if not is_given and (is_pooled or 0.9 <= diameter_um / pitch_um <= 1.05):
        text = "%s: spots are squares of %.4g um side by side: used discs of their area, %.4g um"
        logger.warning(text, source, pitch_um, whole_um)
        return whole_um
    is_st = any(abs(pitch_um / um - 1) <= MAX_DIFFERENCE for um in ST_PITCHES_UM)
    if is_pooled or not (is_st and 90 <= diameter_um <= 115):
        text = (
            "%s: spots form squares of %.4g um, and spot_diameter_um is %.4g, which covers %.0f %% "
            "of them. If counts were pooled over these squares (Xenium, Visium HD, CosMx), set "
            "spot_diameter_um to %.4g"
        )
        logger.warning(text, source, pitch_um, diameter_um, 100 * share, whole_um)
    return diameter_um
