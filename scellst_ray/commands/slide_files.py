"""Checks of the files that a row of a manifest names besides the slide: spots, nuclei, Xenium.

Each file is looked up. One on a local disk is read by the reader of the job that will use it, if it
is not large; of a larger one only the presence is checked.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TypedDict

from scellst_ray import storage
from scellst_ray.nuclei.imported.tiles import check_within, read_segmentation
from scellst_ray.preflight.checks import missing_files
from scellst_ray.preflight.slide_plans import Header
from scellst_ray.slides.manifest import SlideRow
from scellst_ray.spots.read import read_spots
from scellst_ray.spots.table import check_inside
from scellst_ray.spots.xenium import read_xenium
from scellst_ray.stages.rows import Outcome
from scellst_ray.stages.tiles import guarded

# Larger files are not read: a reader takes up to a minute for so many bytes.
MAX_READ = 500_000_000
# Endings of the tables in a folder. Folders of Space Ranger also hold images and BAM files.
TABLES = (".h5", ".mtx", ".gz", ".csv", ".tsv", ".parquet")


class FilesToCheck(TypedDict):
    """A slide, and the parts of its header that its files are compared with.

    Attributes:
        slide: Row of the manifest.
        width0: Width of the slide in level-0 px; None if it was not opened.
        height0: Height in level-0 px.
        mpp: um per level-0 px.
    """

    slide: SlideRow
    width0: int | None
    height0: int | None
    mpp: float | None


class Checked(TypedDict):
    """Results of the checks of one slide's files.

    Attributes:
        problems: A line for each file with a problem.
        read: Names of the columns whose files were read.
    """

    problems: list[str]
    read: list[str]


def files_to_check(slide: SlideRow, header: Header) -> FilesToCheck:
    """Return a slide with the parts of its header that its files are compared with."""
    mpp = header.get("mpp", slide.mpp)
    return {
        "slide": slide,
        "width0": header.get("width0"),
        "height0": header.get("height0"),
        "mpp": mpp,
    }


def check_slide_files(asked: FilesToCheck) -> Checked:
    """Look up and read the files that a row names; it raises no error."""
    slide = asked["slide"]
    found = Checked(problems=missing_files(slide), read=[])
    missing = {problem.partition(":")[0] for problem in found["problems"]}
    for column, (check, others) in CHECKS.items():
        uri = slide.columns.get(column)
        if uri is None or missing & {column, *others} or not _is_small(str(uri)):
            continue
        outcome = Outcome()
        with guarded(outcome, "open"):
            check(asked)
        if outcome.get("error") is not None:
            text = str(outcome["error"])
            named = text if str(uri) in text else f"{uri}: {text}"
            found["problems"].append(f"{column}: {' '.join(named.split())}")
        found["read"].append(column)
    return found


def _is_small(uri: str) -> bool:
    """Return whether a file, or the files of a folder, shall be read: local, and not large."""
    if not storage.is_local(uri):
        return False
    path = Path(storage.resolve(uri)[1])
    files = [path] if path.is_file() else [f for f in path.rglob("*") if f.suffix in TABLES]
    return sum(file.stat().st_size for file in files if file.is_file()) <= MAX_READ


def _check_spots(asked: FilesToCheck) -> None:
    """Raise ValueError if the spots cannot be read, or do not lie on the slide."""
    slide = asked["slide"]
    row = {**slide.columns, "slide_id": slide.slide_id}
    # Of a slide that cannot be opened the resolution is unknown, and that is its own problem.
    spots = read_spots(row, asked["mpp"] or 0.5)
    if asked["width0"] is not None and asked["height0"] is not None:
        check_inside(spots, asked["width0"], asked["height0"], str(slide.columns["spots"]))


def _check_segmentation(asked: FilesToCheck) -> None:
    """Raise ValueError if the nuclei cannot be read, or do not lie on the slide."""
    uri = str(asked["slide"].columns["segmentation"])
    table = read_segmentation(Path(storage.resolve(uri)[1]), uri)
    if asked["width0"] is not None and asked["height0"] is not None:
        check_within(table, asked["width0"], asked["height0"], uri, asked["mpp"])


def _check_xenium(asked: FilesToCheck) -> None:
    """Raise ValueError if cells or counts cannot be read, or the alignment is none."""
    columns = asked["slide"].columns
    alignment = columns.get("xenium_alignment")
    mpp = None if alignment else asked["mpp"] or 0.5
    read_xenium(str(columns["xenium"]), mpp, None if alignment is None else str(alignment))


# Checks by column, and the columns that are read with it.
CHECKS: dict[str, tuple[Callable[[FilesToCheck], None], tuple[str, ...]]] = {
    "spots": (_check_spots, ("spot_positions",)),
    "segmentation": (_check_segmentation, ()),
    "xenium": (_check_xenium, ("xenium_alignment",)),
}
