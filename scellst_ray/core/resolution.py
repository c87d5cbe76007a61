"""Statements of a slide's resolution that contradict each other.

A slide's um per px may be stated by the manifest, the file's tags, its OME-XML, the pitch of its
spots and more. A wrong resolution changes every result without an error, so statements that differ
by much stop the slide unless the manifest confirms the value in use.
"""

from collections.abc import Mapping

from scellst_ray.core.geometry import MAX_MPP, MIN_MPP

# Two statements that differ by more contradict each other.
MAX_DIFFERENCE = 0.10
# A smaller difference than this is that of rounding, and of pixels that are not quite square.
NOTED_DIFFERENCE = 0.02
# The manifest's column that confirms its mpp.
CONFIRMED = "mpp_confirmed"


def check_agreement(
    stated: Mapping[str, float], used: float, *, confirmed: bool, source: str
) -> list[str]:
    """Compare the resolution in use with the other statements of it.

    Statements outside 0.1-1.2 um/px are passed over: they are defaults of image software, such as
    72 dots per inch, and no microscope's resolution.

    Args:
        stated: um per level-0 px by the name of who states it, as "the file's TIFF tags".
        used: um per level-0 px in use.
        confirmed: Whether the manifest confirms the value in use, which then is never refused.
        source: Name of the slide or file, for messages.

    Returns:
        One line for each statement that differs by more than 2 %, with both values.

    Raises:
        ValueError: a statement differs by more than 10 % and `confirmed` is false. The message
            names both values and what to correct.
    """
    notes, contradictions = [], []
    for name, mpp in stated.items():
        if not MIN_MPP <= mpp <= MAX_MPP:
            continue
        difference = max(mpp / used, used / mpp) - 1
        line = f"{source}: {used:.4g} um/px in use, but {mpp:.4g} um/px by {name}"
        if difference > MAX_DIFFERENCE and not confirmed:
            contradictions.append(line)
        elif difference > NOTED_DIFFERENCE:
            notes.append(line)
    if contradictions:
        message = (
            f"{'; '.join(contradictions)}. Give the true value in the manifest's mpp column (um "
            f"per level-0 px), and 'yes' in its column {CONFIRMED} if another value is wrong"
        )
        raise ValueError(message)
    return notes
