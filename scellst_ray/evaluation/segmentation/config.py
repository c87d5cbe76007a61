"""Settings of `scellst-ray evaluate segmentation`."""

import re
from dataclasses import dataclass

from scellst_ray.core.numbers import check_numbers


@dataclass(frozen=True, kw_only=True)
class EvaluateSegmentationConfig:
    """Score nuclei against annotations: F1, PQ and AJI of masks, F1 of points and their types."""

    truth: str | None = None
    """Annotated nuclei: a label map (.png, .tif, .npy, .npz) or points (.csv, .tsv with x, y,
    type). Positions are px of the slide unless `--truth-mpp` or `--region` say otherwise."""
    predicted: str | None = None
    """Predicted nuclei: CELLS (.parquet), a label map or points."""
    run: str | None = None
    """Run folder whose CELLS are evaluated instead of `--predicted`."""
    slide: str | None = None
    """slide_id, within the run, of the slide that `--truth` annotates."""
    manifest: str | None = None
    """CSV of many images, instead of `--truth`: slide_id, truth and, where needed, predicted, mpp,
    truth_mpp, region, truth_types, predicted_types. Its values override the flags."""
    mpp: float | None = None
    """um per px of the slide. A run knows its own."""
    truth_mpp: float | None = None
    """um per px of the annotation. By default that of the slide."""
    region: str | None = None
    """Annotated region in px of the slide: X0,Y0 or X0,Y0,W0,H0. The annotation begins at X0,Y0.
    Nuclei predicted outside do not count. By default the whole slide."""
    radius_um: float = 3.0
    """Distance in um within which two centroids may be one nucleus."""
    types: list[str] | None = None
    """Comma-separated type names that mean the same: annotated=predicted,... With nothing after
    the =, nuclei of that type count for detection only."""
    truth_types: str | None = None
    """Table of the types of an annotated label map: columns label and type."""
    predicted_types: str | None = None
    """Table of the types of a predicted label map: columns label and type."""
    out: str | None = None
    """File to write the scores to: .json or .csv. By default nothing is written."""

    def __post_init__(self) -> None:
        """Refuse settings that do not name an annotation and a prediction."""
        check_numbers(self, positive=("mpp", "truth_mpp", "radius_um"))
        message = ""
        if (self.truth is None) == (self.manifest is None):
            message = "give either truth (one image) or manifest (many)"
        elif self.run is not None and self.predicted is not None:
            message = "give either predicted or run, not both"
        elif self.truth is not None and self.run is None and self.predicted is None:
            message = "nothing to score: give predicted, or run and slide"
        elif (self.slide is not None) != (self.run is not None and self.truth is not None):
            message = "truth of a run needs slide, and slide needs both; give all three"
        elif self.out is not None and not self.out.endswith((".json", ".csv")):
            message = f"out is {self.out}; it must end in .json or .csv"
        if message:
            raise ValueError(message)
        self.same_types()
        parse_region(self.region)

    def same_types(self) -> list[tuple[str, str]]:
        """Return the pairs (annotated, predicted) of type names that mean the same.

        Raises:
            ValueError: an entry of `types` is no pair.
        """
        pairs = [entry.partition("=") for entry in self.types or []]
        for true, equals, _ in pairs:
            if not equals or not true.strip():
                message = (
                    f"types has {true + equals!r}; expected annotated=predicted, such as "
                    "epithelial=Neoplastic"
                )
                raise ValueError(message)
        return [(true.strip(), predicted.strip()) for true, _, predicted in pairs]


def parse_region(text: str | None) -> list[float] | None:
    """Return the two or four numbers of a region; None if it is not given.

    Raises:
        ValueError: the text is no region.
    """
    if text is None:
        return None
    words = re.split(r"[\s,;]+", text.strip())
    if len(words) not in (2, 4) or not all(re.fullmatch(r"-?\d+(\.\d*)?", word) for word in words):
        message = f"region is {text!r}; expected X0,Y0 or X0,Y0,W0,H0 in px of the slide"
        raise ValueError(message)
    return [float(word) for word in words]
