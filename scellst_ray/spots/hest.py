"""Turn a HEST folder (st/, wsis/, metadata/, cellvit_seg/) into rows of a manifest.

`read_h5ad` reads its st/*.h5ad files; `nuclei.imported` reads its cellvit_seg/*.parquet files.
"""

import math
import struct
from dataclasses import dataclass
from typing import Any

import fsspec
import numpy as np
import tifffile
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from scellst_ray.core.geometry import check_mpp
from scellst_ray.core.resolution import CONFIRMED
from scellst_ray.spots.anndata_file import read_pairs
from scellst_ray.spots.files import read_json_object
from scellst_ray.spots.hdf5 import find_part, open_hdf5
from scellst_ray.spots.lattice import find_lattice
from scellst_ray.spots.resolution import DISC_OF_SQUARE, agrees, has_pooled_counts
from scellst_ray.storage.node_cache import hold

SEGMENTATIONS = ("{}_cellvit_seg.parquet", "{}_cellvit_seg.geojson")
# Two sources of a resolution agree if they differ by at most this share.
MPP_TOLERANCE = 0.02
# Metadata kept in the manifest so that users can select slides; no job needs them.
KEPT = ("organ", "species", "st_technology", "disease_state", "oncotree_code", "dataset_title")
PITCH = "the pitch of the spots"
UM_PER_UNIT = {2: 25_400.0, 3: 10_000.0}


@dataclass(frozen=True)
class HestSample:
    """One sample of a HEST folder.

    Attributes:
        row: Row of the manifest.
        conflicts: Descriptions of the points on which the sample's files disagree.
    """

    row: dict[str, Any]
    conflicts: list[str]


def read_hest(folder: str) -> tuple[list[HestSample], list[str]]:
    """Return the samples of a HEST folder.

    `mpp` is `pixel_size_um_estimated` of the metadata, which HEST fits to the spots. It is compared
    with `pixel_size_um_embedded`, with the TIFF's resolution and with the pitch of the spots. The
    size of the TIFF is compared with the metadata. Differences become conflicts. Where the pitch
    agrees, `mpp_confirmed` is yes, so that a wrong resolution in the TIFF does not stop the slide.

    Args:
        folder: Path or any fsspec address. A sample consists of st/<id>.h5ad, wsis/<id>.tif and
            metadata/<id>.json. Its nuclei are cellvit_seg/<id>_cellvit_seg.parquet (or .geojson).

    Returns:
        (samples in the order of their ids, one line for each incomplete sample).

    Raises:
        ValueError: The folder has no complete sample, or a file is damaged.
    """
    fs, root = fsspec.core.url_to_fs(folder)
    root = root.rstrip("/")
    parts = {"st": ".h5ad", "wsis": ".tif", "metadata": ".json"}
    ids = {part: _stems(fs, f"{root}/{part}", end) for part, end in parts.items()}
    complete = sorted(set.intersection(*ids.values()))
    left_out = [
        f"{sample}: no {', '.join(f'{part}/{sample}{parts[part]}' for part in missing)}"
        for sample in sorted(set.union(*ids.values()) - set(complete))
        for missing in [[part for part in parts if sample not in ids[part]]]
    ]
    if not complete:
        counted = ", ".join(f"{len(names)} in {part}/" for part, names in ids.items())
        message = (
            f"{folder}: no sample is complete ({counted}). Expected st/<id>.h5ad, wsis/<id>.tif "
            "and metadata/<id>.json, as in HEST's download."
        )
        raise ValueError(message)
    return [_sample(fs, root, sample) for sample in complete], left_out


def _stems(fs: fsspec.AbstractFileSystem, folder: str, end: str) -> set[str]:
    """Return the names, without the ending, of a folder's files that end in `end`."""
    if not fs.isdir(folder):
        return set()
    names = (path.rsplit("/", 1)[-1] for path in fs.ls(folder, detail=False))
    return {name.removesuffix(end) for name in names if name.endswith(end)}


def _sample(fs: fsspec.AbstractFileSystem, root: str, sample: str) -> HestSample:
    """Return the manifest row and the conflicts of one complete sample."""
    metadata = read_json_object(fs, f"{root}/metadata/{sample}.json")
    conflicts: list[str] = []
    mpp = _number(metadata, "pixel_size_um_estimated")
    try:
        check_mpp(mpp, f"metadata/{sample}.json pixel_size_um_estimated")
    except ValueError as error:
        conflicts.append(str(error))
    uris = {"uri": f"{root}/wsis/{sample}.tif", "spots": f"{root}/st/{sample}.h5ad"}
    row: dict[str, Any] = {"slide_id": sample, "uri": _uri(fs, uris["uri"]), "mpp": mpp}
    row |= {"patient_id": metadata.get("patient"), "spots": _uri(fs, uris["spots"])}
    row["spot_diameter_um"], squares = _diameter_um(fs, uris["spots"], metadata, mpp)
    conflicts += squares
    nuclei = [f"{root}/cellvit_seg/{name.format(sample)}" for name in SEGMENTATIONS]
    row["segmentation"] = next((_uri(fs, uri) for uri in nuclei if fs.exists(uri)), None)
    if row["segmentation"] is None and any(fs.exists(f"{uri}.zip") for uri in nuclei):
        conflicts.append(f"{sample}_cellvit_seg is still zipped: unzip it to import its nuclei")
    row |= {key: metadata.get(key) for key in KEPT}
    found, agrees_with_spots = _mpp_conflicts(fs, uris, metadata, mpp)
    # The estimate is HEST's own correction of the TIFF: no contradiction of the two stops a slide.
    row[CONFIRMED] = "yes" if agrees_with_spots else None
    conflicts += found
    return HestSample(row, conflicts)


def _mpp_conflicts(
    fs: fsspec.AbstractFileSystem,
    uris: dict[str, str],
    metadata: dict[str, Any],
    mpp: float | None,
) -> tuple[list[str], bool]:
    """Return what contradicts the metadata's resolution and size, and whether the spots agree."""
    conflicts = []
    tiff_mpp, size0 = _tiff(fs, uris["uri"])
    stated0 = tuple(_number(metadata, f"fullres_px_{side}") for side in ("width", "height"))
    if None not in stated0 and stated0 != size0:
        conflicts.append(
            f"the TIFF is {size0[0]} x {size0[1]} px, the metadata say "
            f"{stated0[0]:g} x {stated0[1]:g}"
        )
    others = {
        "pixel_size_um_embedded": _number(metadata, "pixel_size_um_embedded"),
        "the TIFF": tiff_mpp,
        PITCH: _pitch_mpp(_uri(fs, uris["spots"]), _number(metadata, "inter_spot_dist")),
    }
    for name, other in others.items():
        if mpp and other and abs(other / mpp - 1) > MPP_TOLERANCE:
            conflicts.append(f"{mpp:g} um/px estimated, but {other:.4g} by {name}")
    pitch = others[PITCH]
    return conflicts, bool(mpp and pitch and abs(pitch / mpp - 1) <= MPP_TOLERANCE)


def _tiff(fs: fsspec.AbstractFileSystem, path: str) -> tuple[float | None, tuple[int, int]]:
    """Return (um per px, size) of a TIFF's first page: None if not stated, (width, height)."""
    try:
        with fs.open(path, "rb") as handle, tifffile.TiffFile(handle) as tiff:
            page = tiff.pages.first
            tags = page.tags
            size0 = (int(page.imagewidth), int(page.imagelength))
            unit = int(tags.valueof("ResolutionUnit", 1))
            resolution = tags.valueof("XResolution")
    except (ValueError, IndexError, struct.error) as error:  # errors of tifffile on damaged files
        message = f"{path}: not a whole TIFF ({error}). Copy it again."
        raise ValueError(message) from error
    if unit not in UM_PER_UNIT or not resolution or not resolution[0]:
        return None, size0
    mpp = UM_PER_UNIT[unit] * resolution[1] / resolution[0]
    # Defaults of image software, such as 72 dots per inch, are no microscope's resolution.
    return (mpp if mpp < 20 else None), size0


def _diameter_um(
    fs: fsspec.AbstractFileSystem, path: str, metadata: dict[str, Any], mpp: float | None
) -> tuple[float | None, list[str]]:
    """Return the spot diameter in um, and a conflict if it is not that of the metadata.

    HEST pools the counts of Xenium and Visium HD over squares that lie side by side. Bags are
    discs, so such a sample gets the diameter of the disc with the area of a square.
    """
    stated_um = _number(metadata, "spot_diameter")
    lattice = find_lattice(_positions(_uri(fs, path)))
    if lattice is None or lattice.kind != "squares":
        return stated_um, []
    by_metadata = _number(metadata, "inter_spot_dist")
    pitch_um = lattice.pitch0 * mpp if mpp else by_metadata
    technology = metadata.get("st_technology")
    if pitch_um is None:
        return stated_um, []
    whole_um = round(pitch_um * DISC_OF_SQUARE, 1)
    are_squares = f"its spots form squares of {pitch_um:.4g} um side by side"
    if has_pooled_counts(technology) and stated_um and agrees(stated_um, whole_um):
        return stated_um, []
    if has_pooled_counts(technology):
        text = (
            f"{are_squares} over which {technology} was pooled, but spot_diameter is "
            f"{stated_um or 'empty'}: spot_diameter_um is {whole_um:g}, the disc of their area"
        )
        return whole_um, [text]
    is_known = technology or (stated_um and abs(pitch_um / 200 - 1) < 0.1)
    if is_known:
        return stated_um, []
    text = (
        f"{are_squares}, and st_technology is empty: if counts were pooled over them, set "
        f"spot_diameter_um to {whole_um:g}"
    )
    return stated_um, [text]


def _positions(uri: str) -> NDArray[np.float64]:
    """Return the spot centres (x, y) of an .h5ad file, level-0 px [S, 2]; empty if it has none."""
    with hold(uri) as held, open_hdf5(str(held.path), uri) as file:
        part = find_part(file, "obsm/spatial", uri)
        xy0 = np.zeros((0, 2)) if part is None else read_pairs(part, f"{uri}: obsm['spatial']")
    return xy0 if xy0.ndim == 2 and xy0.shape[1] == 2 else np.zeros((0, 2))


def _pitch_mpp(path: str, pitch_um: float | None) -> float | None:
    """Return um per px as the spots' pitch in um over that in px; None if either is unknown."""
    if not pitch_um:
        return None
    xy0 = _positions(path)
    xy0 = xy0[np.isfinite(xy0).all(axis=1)]
    if len(xy0) < 2:
        return None
    pitch0 = float(np.median(cKDTree(xy0).query(xy0, k=2)[0][:, 1]))
    return pitch_um / pitch0 if pitch0 > 0 else None


def _number(metadata: dict[str, Any], name: str) -> float | None:
    """Return a number of the metadata; None if it is absent or not a finite number."""
    try:
        value = float(metadata[name])
    except (KeyError, TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def _uri(fs: fsspec.AbstractFileSystem, path: str) -> str:
    """Return a path with its protocol, or unchanged if it is local."""
    return path if "file" in fs.protocol else str(fs.unstrip_protocol(path))
