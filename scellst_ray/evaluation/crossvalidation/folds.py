"""Which slides train and which are scored on, protocol by protocol."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Protocol = Literal["leave-one-slide-out", "leave-one-patient-out", "single-slide"]


@dataclass(frozen=True)
class Fold:
    """Slides to train on and slides to score on, none in both.

    Attributes:
        name: Of the slide or patient that is left out, or trained on alone.
        train: slide_ids.
        test: slide_ids.
    """

    name: str
    train: tuple[str, ...]
    test: tuple[str, ...]


def make_folds(protocol: Protocol, patients: Mapping[str, str | None]) -> list[Fold]:
    """Return the folds of a protocol.

    Args:
        protocol: Which.
        patients: patient_id by slide_id (None: not known), in the order of the slides.

    Raises:
        ValueError: too few slides or patients, or a slide's patient is not known.
    """
    slides = list(patients)
    if len(slides) < 2:
        message = f"{len(slides)} slides with spots: cross-validation needs at least 2."
        raise ValueError(message)
    if protocol == "leave-one-patient-out":
        groups = _by_patient(patients)
    else:
        groups = {slide_id: [slide_id] for slide_id in slides}
    folds = []
    for name, members in groups.items():
        others = tuple(slide_id for slide_id in slides if slide_id not in members)
        pair = (tuple(members), others) if protocol == "single-slide" else (others, tuple(members))
        folds.append(Fold(name, *pair))
    return folds


def _by_patient(patients: Mapping[str, str | None]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = defaultdict(list)
    unknown = [slide_id for slide_id, patient in patients.items() if not patient]
    for slide_id, patient in patients.items():
        groups[str(patient)].append(slide_id)
    if unknown or len(groups) < 2:
        one = next(iter(groups))
        found = f"slides {unknown} have none" if unknown else f"all slides are of {one}"
        message = (
            f"leave-one-patient-out needs a patient_id for every slide and two patients; {found}. "
            "Add the column to the manifest, or use leave-one-slide-out."
        )
        raise ValueError(message)
    return dict(groups)
