"""Hold and check the spots of one slide: positions and counts. S: spots; G: genes; B: barcodes."""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy import sparse

from scellst_ray.spots.files import reason_of, shown
from scellst_ray.spots.resolution import StatedMpp

logger = logging.getLogger(__name__)

# Of S spots at least so many places differ; sections joined over each other halve them.
MIN_SHARE_OF_PLACES = 0.9
MAX_SHARE_OUTSIDE = 0.05


@dataclass(frozen=True)
class Spots:
    """S spots of one slide with the counts of G genes.

    Attributes:
        spot_id: Unique name of each spot: a barcode, or "AxB" on ST arrays, str [S].
        xy0: Spot centres (x, y) in level-0 px, float64 [S, 2].
        radius0: Radius of every spot in level-0 px.
        counts: Raw counts, never negative, scipy CSR float32 [S, G]. float32 holds whole numbers
            exactly up to 16,777,216.
        genes: G unique gene names, in the order of the columns of counts.
        stated_mpp: Resolutions of the slide that follow from the spots, such as from the pitch of
            their lattice; empty if none does for sure.
    """

    spot_id: NDArray[np.str_]
    xy0: NDArray[np.float64]
    radius0: float
    counts: sparse.csr_matrix
    genes: list[str]
    stated_mpp: tuple[StatedMpp, ...] = ()

    def __len__(self) -> int:
        """Return the number of spots."""
        return len(self.spot_id)

    def select(self, mask: NDArray[np.bool_] | NDArray[np.integer]) -> "Spots":
        """Return some of the spots.

        Args:
            mask: bool [S], or indices in the wanted order.
        """
        rows = np.flatnonzero(mask) if np.asarray(mask).dtype == bool else np.asarray(mask)
        return replace(
            self, spot_id=self.spot_id[rows], xy0=self.xy0[rows], counts=self.counts[rows]
        )


def unique_gene_names(names: Sequence[str]) -> list[str]:
    """Make repeated gene names unique, as AnnData and scanpy do: TBCE, TBCE-1, TBCE-2.

    Several Ensembl ids may share a symbol. By convention they stay separate genes, and the first
    keeps the plain symbol. A sum would mix loci that the alignment of reads had separated.
    """
    taken = set(names)
    repeats: dict[str, int] = {}
    unique: list[str] = []
    for name in names:
        if name not in repeats:
            repeats[name] = 0
            unique.append(name)
            continue
        candidate = name
        while candidate in taken:
            repeats[name] += 1
            candidate = f"{name}-{repeats[name]}"
        taken.add(candidate)
        unique.append(candidate)
    return unique


def join_spots(
    counts: sparse.csr_matrix,
    count_ids: Sequence[str],
    genes: Sequence[str],
    positions: pl.DataFrame,
    radius0: float,
    source: str,
    stated_mpp: tuple[StatedMpp, ...] = (),
) -> Spots:
    """Join counts and positions by spot id, in the order of the counts.

    Positions without counts and counts without a position are dropped and logged. ST arrays list
    spots that did not pass sequencing, and raw matrices list spots off the tissue.

    Args:
        counts: Raw counts [B, G].
        count_ids: B spot ids, in the order of the rows of counts.
        genes: G gene names; repeated names get a suffix (see unique_gene_names).
        positions: Columns spot_id (str), x0 and y0 (float, level-0 px).
        radius0: Spot radius in level-0 px.
        source: The file or folder to name in errors.
        stated_mpp: Resolutions that follow from the spots.

    Raises:
        ValueError: No spot has both, or the result is not sound (see check_spots).
    """
    position_ids = positions["spot_id"].to_list()
    count_rows, position_rows = _match(list(count_ids), position_ids, source)
    spots = Spots(
        spot_id=np.array([count_ids[row] for row in count_rows], dtype=np.str_),
        xy0=positions.select("x0", "y0").to_numpy().astype(np.float64)[position_rows],
        radius0=radius0,
        counts=sparse.csr_matrix(counts, dtype=np.float32)[count_rows],
        genes=unique_gene_names(genes),
        stated_mpp=stated_mpp,
    )
    check_spots(spots, source)
    return spots


def _match(
    count_ids: list[str], position_ids: list[str], source: str
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return rows of counts and rows of positions of the same spots, in the order of counts."""
    _check_unique(count_ids, "counts", source)
    _check_unique(position_ids, "positions", source)
    row_of = {spot_id: row for row, spot_id in enumerate(position_ids)}
    kept = [(row, row_of[spot]) for row, spot in enumerate(count_ids) if spot in row_of]
    if not kept:
        message = (
            f"{source}: no spot id occurs in both the counts ({len(count_ids)} ids, such as "
            f"{shown(count_ids[:3])}) and the positions ({len(position_ids)} ids, such as "
            f"{shown(position_ids[:3])}). Give counts and positions of the same section."
        )
        raise ValueError(message)
    num_dropped = len(count_ids) - len(kept), len(position_ids) - len(kept)
    if any(num_dropped):
        text = (
            "%s: %d spots kept; dropped %d counts without a position, %d positions without counts"
        )
        logger.info(text, source, len(kept), *num_dropped)
    count_rows, position_rows = np.array(kept, np.int64).T
    return count_rows, position_rows


def check_spots(spots: Spots, source: str) -> None:
    """Check that spots can be used in training.

    Args:
        spots: Spots as read.
        source: Name of the file or folder in errors.

    Raises:
        ValueError: A part is empty, repeats a name or differs in length from another part. Or
            counts, positions or radius are not finite, many spots lie at the place of another,
            counts are negative, or the radius is 0 or negative. The message names the source, the
            value and the remedy.
    """
    num_spots, num_genes = spots.counts.shape
    if (num_spots, num_genes) != (len(spots.spot_id), len(spots.genes)) or (
        spots.xy0.shape != (num_spots, 2)
    ):
        message = (
            f"{source}: counts are {num_spots} spots x {num_genes} genes, but there are "
            f"{len(spots.spot_id)} spot ids, {len(spots.genes)} genes and positions of shape "
            f"{spots.xy0.shape}. Every part must describe the same spots and genes."
        )
        raise ValueError(message)
    _check_unique(spots.spot_id.tolist(), "spots", source)
    _check_unique(spots.genes, "genes", source)
    _check_values(spots, source)
    if not np.isfinite(spots.xy0).all():
        row = int(np.flatnonzero(~np.isfinite(spots.xy0).all(axis=1))[0])
        message = (
            f"{source}: spot {reason_of(spots.spot_id[row])} lies at {spots.xy0[row].tolist()}, "
            "which is not "
            "a position. Remove the spot or give its position in level-0 px."
        )
        raise ValueError(message)
    _check_places(spots, source)
    if not (np.isfinite(spots.radius0) and spots.radius0 > 0):
        message = (
            f"{source}: spot radius {spots.radius0} level-0 px, expected a positive number. "
            "Check mpp and spot_diameter_um."
        )
        raise ValueError(message)


def check_whole_counts(spots: Spots, source: str, purpose: str) -> None:
    """Check that counts are whole numbers.

    Args:
        spots: Spots as read.
        source: Name of the slide in errors.
        purpose: Purpose of the counts, such as "the negative-binomial loss".

    Raises:
        ValueError: A count is not a whole number; the message names the first, its gene and spot,
            and the remedy.
    """
    values = spots.counts.data
    fractional = np.flatnonzero(values != np.rint(values))
    if len(fractional):
        first = int(fractional[0])
        row = int(np.searchsorted(spots.counts.indptr, first, side="right")) - 1
        gene = spots.genes[int(spots.counts.indices[first])]
        message = (
            f"{source}: {len(fractional)} of {len(values)} counts are not whole numbers, the first "
            f"{values[first]} for gene {reason_of(gene)} in spot "
            f"{reason_of(spots.spot_id[row])}; {purpose} needs whole "
            "numbers. Give raw counts, or use loss mse and genes variable:N."
        )
        raise ValueError(message)


def check_inside(spots: Spots, width0: int, height0: int, source: str) -> int:
    """Check that at most 5 % of the spots lie outside the image.

    A section can reach beyond the scan. Spots outside have no cells, so training ignores them.

    Args:
        spots: Spots of the slide.
        width0: Width of the image in level-0 px.
        height0: Height of the image in level-0 px.
        source: Name of the slide in errors.

    Returns:
        Number of spot centres outside the image.

    Raises:
        ValueError: More than 5 % of the centres lie outside; the message names the first.
    """
    x0, y0 = spots.xy0[:, 0], spots.xy0[:, 1]
    outside = np.flatnonzero((x0 < 0) | (y0 < 0) | (x0 >= width0) | (y0 >= height0))
    if len(outside) > MAX_SHARE_OUTSIDE * len(spots):
        first = int(outside[0])
        message = (
            f"{source}: {len(outside)} of {len(spots)} spots lie outside the image of {width0} x "
            f"{height0} px, the first {spots.spot_id[first]} at (x, y) = ({x0[first]:.0f}, "
            f"{y0[first]:.0f}). Positions must be level-0 px of this image, x to the right and y "
            "down: give the image the positions were made for, or correct the position file."
        )
        raise ValueError(message)
    return len(outside)


def radius_px(spot_diameter_um: float, mpp: float, source: str) -> float:
    """Return the spot radius in level-0 px.

    Args:
        spot_diameter_um: Spot diameter in um.
        mpp: Resolution of the slide, um per level-0 px.
        source: Name of the slide or file in errors.

    Raises:
        ValueError: A value is not a positive number.
    """
    if not (np.isfinite(mpp) and mpp > 0 and np.isfinite(spot_diameter_um)) or (
        spot_diameter_um <= 0
    ):
        message = (
            f"{source}: spot diameter {spot_diameter_um} um at {mpp} um/px gives no radius: both "
            "must be positive numbers. Set mpp and spot_diameter_um in the manifest."
        )
        raise ValueError(message)
    return spot_diameter_um / 2.0 / mpp


def _check_values(spots: Spots, source: str) -> None:
    """Raise ValueError if counts are negative or not finite, or if all are 0."""
    values = spots.counts.data
    invalid = np.flatnonzero(~(np.isfinite(values) & (values >= 0)))
    if len(invalid):
        first = int(invalid[0])
        row = int(np.searchsorted(spots.counts.indptr, first, side="right")) - 1
        gene = spots.genes[int(spots.counts.indices[first])]
        message = (
            f"{source}: {len(invalid)} counts are negative or not finite, the first "
            f"{values[first]} for gene {reason_of(gene)} in spot "
            f"{reason_of(spots.spot_id[row])}. Give raw counts, "
            "not scaled or log-transformed values."
        )
        raise ValueError(message)
    if not values.any():
        message = (
            f"{source}: no counts at all in {spots.counts.shape[0]} spots x "
            f"{spots.counts.shape[1]} genes. Expected raw counts with at least one above 0; give "
            "the count matrix of the section."
        )
        raise ValueError(message)


def _check_places(spots: Spots, source: str) -> None:
    """Raise ValueError if many spots lie exactly where another one lies."""
    num_places = len(np.unique(spots.xy0 @ np.array([1.0, 1.0j])))
    # Places that are all alike say nothing.
    if 1 < num_places < MIN_SHARE_OF_PLACES * len(spots):
        message = (
            f"{source}: {len(spots)} spots lie at only {num_places} different places, as where "
            "sections were joined. Expected one section per file, with positions on one image: "
            "split the file."
        )
        raise ValueError(message)


def _check_unique(names: Sequence[str], what: str, source: str) -> None:
    """Raise ValueError if a name occurs more than once; `what` names the kind of names."""
    if len(set(names)) == len(names):
        return
    repeated = sorted(name for name, times in Counter(names).items() if times > 1)
    message = (
        f"{source}: {len(repeated)} names occur more than once among the {what}, such as "
        f"{shown(repeated[:3])}. Each must occur once: remove the repeats (two sections in one "
        "file?)."
    )
    raise ValueError(message)
