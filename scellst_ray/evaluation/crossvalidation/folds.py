"""The folds of cross-validation: slides that train, and slides that are scored."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from sklearn.model_selection import LeaveOneGroupOut

Protocol = Literal["leave-one-slide-out", "leave-one-patient-out", "single-slide"]


@dataclass(frozen=True)
class Fold:
    """Slides to train on and slides to score; no slide is in both.

    Attributes:
        name: Name of the slide or patient that is left out. With protocol single-slide, the slide
            that is trained on.
        train: slide_ids to train on.
        test: slide_ids to score.
    """

    name: str
    train: tuple[str, ...]
    test: tuple[str, ...]


def make_folds(protocol: Protocol, patients: Mapping[str, str | None]) -> list[Fold]:
    """Return the folds of a protocol, in the order in which slides or patients first appear.

    Args:
        protocol: Protocol of the cross-validation.
        patients: patient_id by slide_id (None: unknown), in the order of the slides.

    Raises:
        ValueError: there are too few slides or patients, or the patient of a slide is unknown.
    """
    slides = list(patients)
    if len(slides) < 2:
        message = f"{len(slides)} slides with spots: cross-validation needs at least 2."
        raise ValueError(message)
    groups = slides
    if protocol == "leave-one-patient-out":
        groups = _patient_of_each(patients)
    names = list(dict.fromkeys(groups))
    # LeaveOneGroupOut goes through the groups in the order of these numbers.
    numbers = [names.index(group) for group in groups]
    folds = []
    for name, split in zip(names, LeaveOneGroupOut().split(slides, groups=numbers), strict=True):
        others, members = (tuple(slides[row] for row in rows) for rows in split)
        pair = (members, others) if protocol == "single-slide" else (others, members)
        folds.append(Fold(name, *pair))
    return folds


def _patient_of_each(patients: Mapping[str, str | None]) -> list[str]:
    """Return the patient_id of each slide.

    Raises:
        ValueError: a slide has no patient_id, or there is only one patient.
    """
    unknown_slides = [slide_id for slide_id, patient in patients.items() if not patient]
    groups = [str(patient) for patient in patients.values()]
    if unknown_slides or len(set(groups)) < 2:
        reason = f"all slides are of {groups[0]}"
        if unknown_slides:
            reason = f"slides {unknown_slides} have none"
        message = (
            f"leave-one-patient-out needs a patient_id for every slide and two patients; {reason}. "
            "Add the column to the manifest, or use leave-one-slide-out."
        )
        raise ValueError(message)
    return groups
