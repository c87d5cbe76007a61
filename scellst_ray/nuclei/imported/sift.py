"""Leave out objects that cannot be nuclei, and nuclei that are there twice.

Files hold more than nuclei: a region drawn around a tumour, specks of a mask. Nuclei are there
twice where tiles overlapped, or where a file was imported or joined twice. Every object that is
left out is counted by its reason. Arrays: N nuclei, C candidates, Q pairs.
"""

import numpy as np
import pyarrow as pa
import shapely
from numpy.typing import NDArray

# A nucleus of a megakaryocyte or a giant tumour cell has about 1,000 um2; lymphocytes have 15.
LARGEST_UM2, SMALLEST_UM2 = 2000.0, 1.0
SMALLEST_PX2 = 1.0
# A smaller object is a region, too, if it is so many times the median and holds so many nuclei.
REGION_MEDIANS, REGION_NUCLEI = 4.0, 3
# Two outlines are the same nucleus if their common part is at least this share of their union.
SAME_SHARE = 0.65
# The centroids of such a pair differ by less than this share of the side, or by a px or so.
SHIFT_SHARE, SHIFT_PX = 0.3, 1.5
# Pairs per nucleus beyond which a file is heaps of outlines rather than nuclei.
MOST_PAIRS = 20
BATCH = 65_536


def find_impossible(table: pa.Table, mpp: float | None) -> dict[str, NDArray[np.bool_]]:
    """Return which objects cannot be nuclei, by reason: bool [N] each, without overlap.

    - `too_large`: larger than LARGEST_UM2, or a region around REGION_NUCLEI other centroids.
    - `too_small`: smaller than a pixel or SMALLEST_UM2.

    Args:
        table: SEGMENTATION table.
        mpp: Resolution of the slide, um per level-0 px; None: sizes in um2 are not known.
    """
    area0 = table["area0"].to_numpy()
    median = np.median(area0) if len(area0) else 0.0
    least = SMALLEST_PX2 if mpp is None else max(SMALLEST_PX2, SMALLEST_UM2 / mpp**2)
    too_large = np.zeros(len(area0), np.bool_) if mpp is None else area0 > LARGEST_UM2 / mpp**2
    candidates = np.flatnonzero(~too_large & (area0 > REGION_MEDIANS * median))
    if len(candidates):
        points = shapely.points(table["x0"].to_numpy(), table["y0"].to_numpy())
        outlines = shapely.from_wkb(table["polygon"].take(pa.array(candidates)).to_pylist())
        tree = shapely.STRtree(outlines)
        _, held = tree.query(points, predicate="within")
        # A candidate mostly holds its own centroid: one more than the others.
        num_held = np.bincount(held, minlength=len(candidates))
        too_large[candidates] = num_held > REGION_NUCLEI
    return {"too_large": too_large, "too_small": ~too_large & (area0 < least)}


def find_doubled(table: pa.Table, source: str) -> NDArray[np.bool_]:
    """Return which nuclei are the same as an earlier one in the file, bool [N].

    Args:
        table: SEGMENTATION table.
        source: Name of the file in errors.

    Raises:
        ValueError: The file is heaps of outlines that lie on each other.
    """
    doubled = _repeated(table)
    rows = np.flatnonzero(~doubled)
    first, second = _near_pairs(table, rows, source)
    is_same = np.zeros(len(first), np.bool_)
    for start in range(0, len(first), BATCH):
        part = slice(start, start + BATCH)
        is_same[part] = _are_same(table, first[part], second[part])
    # By the later nucleus of a pair: whether the earlier one stays is then known.
    pairs = np.column_stack([second[is_same], first[is_same]])
    for later, earlier in sorted(pairs.tolist()):
        doubled[later] |= not doubled[earlier]
    return doubled


def _repeated(table: pa.Table) -> NDArray[np.bool_]:
    """Return which outlines are equal to an earlier one, byte by byte, bool [N]."""
    # Equal outlines have equal centroids and areas, so only the few that share these are compared.
    keys = np.column_stack([table[name].to_numpy() for name in ("x0", "y0", "area0")])
    order = np.lexsort(keys.T)
    is_equal = (keys[order[1:]] == keys[order[:-1]]).all(axis=1)
    group = np.concatenate([[0], np.cumsum(~is_equal)]) if len(keys) else np.zeros(0, np.int64)
    shared = np.bincount(group)[group] > 1 if len(keys) else np.zeros(0, np.bool_)
    doubled = np.zeros(len(keys), np.bool_)
    rows = np.sort(order[shared])
    seen: set[bytes] = set()
    for start in range(0, len(rows), BATCH):
        part = rows[start : start + BATCH]
        outlines = table["polygon"].take(pa.array(part)).to_pylist()
        for row, outline in zip(part, outlines, strict=True):
            doubled[row] = outline in seen
            seen.add(outline)
    return doubled


def _near_pairs(
    table: pa.Table, rows: NDArray[np.int64], source: str
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return pairs of rows with like areas and near centroids, each the earlier one first, [Q]."""
    # Every planner loads this module, and few of them import nuclei.
    from scipy.spatial import cKDTree  # noqa: PLC0415

    area0 = table["area0"].to_numpy()[rows]
    xy0 = np.column_stack([table["x0"].to_numpy(), table["y0"].to_numpy()])[rows]
    found = [np.zeros((0, 2), np.int64)]
    size = np.floor(np.log2(area0)).astype(np.int64)
    for octave in np.unique(size).tolist():
        # The smaller one of a pair is in this octave, and the larger one in this or the next.
        members = np.flatnonzero((size >= octave) & (area0 <= 2.0 ** (octave + 1) / SAME_SHARE))
        tree = cKDTree(xy0[members])
        reach = SHIFT_PX + SHIFT_SHARE * 2.0 ** ((octave + 1) / 2)
        if tree.count_neighbors(tree, reach) > (2 * MOST_PAIRS + 1) * len(members):
            message = (
                f"{source}: its outlines lie on each other, each on {MOST_PAIRS} others and more; "
                "give a file with every nucleus once"
            )
            raise ValueError(message)
        pairs = members[tree.query_pairs(reach, output_type="ndarray")]
        in_octave = size[pairs].min(axis=1) == octave
        found.append(np.sort(pairs[in_octave], axis=1))
    pairs = np.concatenate(found)
    smaller, larger = np.sort(area0[pairs], axis=1).T
    distance = np.linalg.norm(xy0[pairs[:, 0]] - xy0[pairs[:, 1]], axis=1)
    near = distance <= SHIFT_PX + SHIFT_SHARE * np.sqrt(smaller)
    pairs = rows[pairs[near & (smaller >= SAME_SHARE * larger)]]
    return pairs[:, 0], pairs[:, 1]


def _are_same(
    table: pa.Table, first: NDArray[np.int64], second: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Return which pairs of rows share SAME_SHARE of the union of their outlines, bool [Q]."""
    one, other = (
        shapely.from_wkb(table["polygon"].take(pa.array(rows)).to_pylist())
        for rows in (first, second)
    )
    common = shapely.area(shapely.intersection(one, other))
    union = shapely.area(one) + shapely.area(other) - common
    return np.asarray(common >= SAME_SHARE * union)
