"""Bags of instances as the fit takes them: offsets into one matrix, split and batched by seed.

Embeddings lie in one matrix, on the device that trains if they fit: a batch is one gather, without
reading cells one by one and without padding. Shape letters: L instances of all bags (a cell under
two spots counts twice), N cells, S spots, D embedding, G genes.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scellst_ray.models.mil.head import check_offsets


@dataclass(frozen=True)
class BagSet:
    """S bags of instances with a target each.

    Attributes:
        embeddings_LD: Instances of bag 0, then of bag 1, ... (any float type; kept as it is).
        offsets: int64 [S + 1], on the CPU; bag s is embeddings_LD[offsets[s]:offsets[s + 1]].
        targets_SG: float32 [S, G]: scaled expression, or counts for a likelihood of counts.
        size_factors_S: float32 [S], library sizes relative to the slide's; only beside counts.
    """

    embeddings_LD: Tensor
    offsets: Tensor
    targets_SG: Tensor
    size_factors_S: Tensor | None = None

    def __post_init__(self) -> None:
        """Refuse empty bags and parts that do not fit together.

        Raises:
            ValueError: See check_offsets; also where targets do not fit or are not finite, or
                targets with size factors are not counts.
        """
        check_offsets(self.offsets, len(self.embeddings_LD))
        if self.targets_SG.ndim != 2 or len(self.targets_SG) != len(self):
            message = (
                f"targets of shape {tuple(self.targets_SG.shape)} for {len(self)} bags, expected "
                "one row per bag and one column per gene."
            )
            raise ValueError(message)
        if not torch.isfinite(self.targets_SG).all():
            message = "targets hold NaN or infinity: check counts and scaling of the slides."
            raise ValueError(message)
        if self.size_factors_S is not None:
            _check_counts(self.targets_SG, self.size_factors_S)

    def __len__(self) -> int:
        """Return the number of bags."""
        return len(self.offsets) - 1

    def to(self, device: torch.device | str) -> "BagSet":
        """Return the bags with all but the offsets on a device."""
        factors_S = self.size_factors_S
        return replace(
            self,
            embeddings_LD=self.embeddings_LD.to(device),
            targets_SG=self.targets_SG.to(device),
            size_factors_S=None if factors_S is None else factors_S.to(device),
        )

    def take(self, spots: NDArray[np.int64]) -> "BagSet":
        """Return the bags at these indices, in that order (possibly none)."""
        index = torch.as_tensor(spots, dtype=torch.int64)
        sizes = self.offsets.diff()[index]
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
        shift = (self.offsets[:-1][index] - offsets[:-1]).repeat_interleave(sizes)
        rows = (torch.arange(int(offsets[-1])) + shift).to(self.embeddings_LD.device)
        there = index.to(self.targets_SG.device)
        factors_S = self.size_factors_S
        return BagSet(
            self.embeddings_LD.index_select(0, rows),
            offsets,
            self.targets_SG.index_select(0, there),
            None if factors_S is None else factors_S.index_select(0, there),
        )


def single_cells(
    embeddings_ND: Tensor, targets_NG: Tensor, size_factors_N: Tensor | None = None
) -> BagSet:
    """Return cells with a target each as bags of one: fitting on them is full supervision.

    Args:
        embeddings_ND: [N, D].
        targets_NG: Expression, or counts, of each cell [N, G].
        size_factors_N: Of each cell [N], beside counts.

    Raises:
        ValueError: Where they do not fit together.
    """
    offsets = torch.arange(len(embeddings_ND) + 1)
    return BagSet(embeddings_ND, offsets, targets_NG, size_factors_N)


def _check_counts(counts_SG: Tensor, size_factors_S: Tensor) -> None:
    """Refuse counts that are none, and size factors that cannot be."""
    bad_SG = (counts_SG < 0) | (counts_SG != counts_SG.round())
    if bad_SG.any():
        spot, gene = (int(i) for i in bad_SG.nonzero()[0])
        message = (
            f"a likelihood of counts needs whole numbers from 0, got {float(counts_SG[spot, gene])}"
            f" in bag {spot}, gene {gene}. Give raw counts, or train with loss mse."
        )
        raise ValueError(message)
    if (
        size_factors_S.shape != counts_SG.shape[:1]
        or not ((size_factors_S > 0) & torch.isfinite(size_factors_S)).all()
    ):
        message = (
            f"size factors of shape {tuple(size_factors_S.shape)}, expected one positive number "
            f"for each of {len(counts_SG)} bags: counts of the spot over the median spot's."
        )
        raise ValueError(message)


def split_spots(
    slide_ids: Sequence[str], val_share: float, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split spots into training and validation, within every slide.

    The split of a slide depends on its name and the seed alone, not on what else is trained on.
    Validation spots lie between training spots (as published), so their loss may stop training
    but says nothing about unseen slides.

    Args:
        slide_ids: Slide of each spot [S].
        val_share: Share of each slide's spots to hold out, rounded, at least one spot of a slide
            with two or more; a slide with one spot trains.
        seed: Fixes the choice.

    Returns:
        (training, validation): ascending indices that together are all spots.

    Raises:
        ValueError: Where no slide has two spots.
    """
    slides = np.asarray(slide_ids, dtype=np.str_)
    is_val = np.zeros(len(slides), bool)
    for slide_id in np.unique(slides):
        spots = np.flatnonzero(slides == slide_id)
        if len(spots) > 1:
            num_val = min(max(round(val_share * len(spots)), 1), len(spots) - 1)
            generator = np.random.default_rng([seed, zlib.crc32(str(slide_id).encode())])
            is_val[generator.permutation(spots)[:num_val]] = True
    if not is_val.any():
        message = f"{len(slides)} spots on {len(set(slides))} slides: too few to hold any out."
        raise ValueError(message)
    return np.flatnonzero(~is_val), np.flatnonzero(is_val)


def epoch_batches(num_spots: int, batch: int, seed: int, epoch: int) -> list[NDArray[np.int64]]:
    """Return the global batches of one epoch: a permutation fixed by (seed, epoch), cut up.

    Every spot occurs once; the last batch may be smaller.
    """
    order = np.random.default_rng([seed, epoch]).permutation(num_spots).astype(np.int64)
    return [order[start : start + batch] for start in range(0, num_spots, batch)]
