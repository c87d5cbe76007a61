"""Slides that are a folder: DICOM. OpenSlide takes one file and finds the others next to it."""

from pathlib import Path

from scellst_ray.storage.slide_files import (
    MAGIC,
    MAGIC_AT,
    NO_SLIDE,
    NO_ZARR,
    SERIES_WITHIN,
    ZARR_MARKS,
    series_in,
)

# SOP class of whole-slide images; the files of a study may also be of others.
WHOLE_SLIDE = b"1.2.840.10008.5.1.4.1.1.77.1.6"


def picture_in(folder: Path, uri: str) -> Path:
    """Return the file by which OpenSlide opens the slide in a folder: the largest of its series.

    Args:
        folder: Local folder.
        uri: Name for messages.

    Raises:
        ValueError: the folder holds no DICOM slide, or several, or is an OME-Zarr.
    """
    files = sorted(path for path in folder.iterdir() if path.is_file())
    series: dict[bytes | None, list[Path]] = {}
    for path in files:
        with path.open("rb") as file:
            head = file.read(SERIES_WITHIN)
        if head[MAGIC_AT : MAGIC_AT + len(MAGIC)] == MAGIC and WHOLE_SLIDE in head:
            series.setdefault(series_in(head), []).append(path)
    if not series:
        names = {path.name for path in folder.iterdir()}
        message = f"{uri}: {NO_ZARR if ZARR_MARKS & names else NO_SLIDE}"
        raise ValueError(message)
    if len(series) > 1:
        example = min(paths[0].name for paths in series.values())
        message = (
            f"{uri}: a folder of {len(series)} DICOM slides (series); give a file of the one that "
            f"is meant, such as {example}"
        )
        raise ValueError(message)
    (paths,) = series.values()
    return max(paths, key=lambda path: path.stat().st_size)
