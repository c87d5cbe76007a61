"""Bags of instances: their means, their split by slide and their batches.

A bag holds the cells (instances) of one spot. All embeddings lie in one matrix, on the training
device if they fit on it, and offsets say which rows belong to which bag. A batch is therefore one
gather, without padding.

Shape letters: L instances of all bags (a cell under two spots counts twice), S spots, D embedding,
G genes.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class BagSet:
    """S bags of instances; each bag has a target.

    Attributes:
        embeddings_LD: Instances of bag 0, then of bag 1, and so on. Any float type; it is kept.
        offsets: int64 [S + 1], on the CPU; bag s is embeddings_LD[offsets[s]:offsets[s + 1]].
        targets_SG: float32 [S, G]: scaled expression, or counts for a likelihood of counts.
        size_factors_S: float32 [S]: counts of each spot over those of the slide's median spot.
            Needed with counts; None with scaled expression.
    """

    embeddings_LD: Tensor
    offsets: Tensor
    targets_SG: Tensor
    size_factors_S: Tensor | None = None

    def __post_init__(self) -> None:
        """Refuse empty bags and parts that do not fit together.

        Raises:
            ValueError: See check_offsets. Also if targets do not fit or are not finite, or if
                targets with size factors are not counts.
        """
        check_offsets(self.offsets, len(self.embeddings_LD))
        if self.targets_SG.ndim != 2 or len(self.targets_SG) != len(self):
            message = (
                f"targets have shape {tuple(self.targets_SG.shape)} for {len(self)} bags, expected "
                "one row per bag and one column per gene."
            )
            raise ValueError(message)
        if not torch.isfinite(self.targets_SG).all():
            message = "targets hold NaN or infinity: check the counts and the scaling of slides."
            raise ValueError(message)
        if self.size_factors_S is not None:
            _check_counts(self.targets_SG, self.size_factors_S)

    def __len__(self) -> int:
        """Return the number of bags."""
        return len(self.offsets) - 1

    def to(self, device: torch.device | str) -> "BagSet":
        """Return the bags on a device; the offsets stay on the CPU."""
        factors_S = self.size_factors_S
        return replace(
            self,
            embeddings_LD=self.embeddings_LD.to(device),
            targets_SG=self.targets_SG.to(device),
            size_factors_S=None if factors_S is None else factors_S.to(device),
        )

    def take(self, spots: NDArray[np.int64]) -> "BagSet":
        """Return the bags at these indices, in the order of the indices; indices may be empty."""
        index = torch.as_tensor(spots, dtype=torch.int64)
        sizes = self.offsets.diff()[index]
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
        shift = (self.offsets[:-1][index] - offsets[:-1]).repeat_interleave(sizes)
        rows = (torch.arange(int(offsets[-1])) + shift).to(self.embeddings_LD.device)
        target_rows = index.to(self.targets_SG.device)
        factors_S = self.size_factors_S
        return BagSet(
            self.embeddings_LD.index_select(0, rows),
            offsets,
            self.targets_SG.index_select(0, target_rows),
            None if factors_S is None else factors_S.index_select(0, target_rows),
        )


def check_offsets(offsets: Tensor, num_instances: int) -> None:
    """Refuse offsets [S + 1] that do not cut num_instances into S bags that are not empty.

    An empty bag has no mean, and its NaN would spread to the weights.

    Raises:
        ValueError: The offsets do not fit, or a bag is empty. The message names the first one.
    """
    sizes = offsets.diff()
    if offsets.ndim != 1 or len(offsets) == 0 or offsets[0] != 0 or offsets[-1] != num_instances:
        message = (
            f"bag offsets have shape {tuple(offsets.shape)} and go from "
            f"{offsets.flatten()[:1].tolist()} to {offsets.flatten()[-1:].tolist()}, expected "
            f"one-dimensional offsets from 0 to the number of instances, {num_instances}."
        )
        raise ValueError(message)
    if len(sizes) and int(sizes.min()) <= 0:
        bag = int((sizes <= 0).nonzero()[0, 0])
        message = (
            f"bag {bag} of {len(sizes)} holds {int(sizes[bag])} instances, expected at least 1. "
            "Drop spots without cells before making bags."
        )
        raise ValueError(message)


def bag_mean(y_NG: Tensor, offsets: Tensor) -> Tensor:
    """Return the mean of each bag [S, G]; bag s is y_NG[offsets[s]:offsets[s + 1]].

    Raises:
        ValueError: The offsets do not fit, or a bag is empty.
    """
    check_offsets(offsets, len(y_NG))
    if len(offsets) == 1:
        return y_NG  # no bags: no rows, but still a part of the graph
    # embedding_bag takes half the time of segment_reduce on a CPU. Unlike index_add it gives the
    # same bits every time on a GPU.
    rows_N = torch.arange(len(y_NG), device=y_NG.device)
    return functional.embedding_bag(rows_N, y_NG, offsets[:-1].to(y_NG.device), mode="mean")


def _check_counts(counts_SG: Tensor, size_factors_S: Tensor) -> None:
    """Refuse counts that are not whole numbers from 0, and size factors that are not positive."""
    is_wrong_SG = (counts_SG < 0) | (counts_SG != counts_SG.round())
    if is_wrong_SG.any():
        spot, gene = (int(i) for i in is_wrong_SG.nonzero()[0])
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
            f"size factors have shape {tuple(size_factors_S.shape)}, expected one positive number "
            f"for each of {len(counts_SG)} bags: counts of the spot over those of the median spot."
        )
        raise ValueError(message)


def split_spots(
    slide_ids: Sequence[str], val_share: float, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split the spots of every slide into training and validation spots.

    The split of a slide depends on its name and the seed alone, not on the other slides.
    Validation spots lie between training spots, as published. Therefore their loss may stop
    training, but it says nothing about unseen slides.

    Args:
        slide_ids: Slide of each spot [S].
        val_share: Share of each slide's spots to hold out. The number is rounded; it is at least 1
            on a slide with two or more spots. The spot of a slide with one spot trains.
        seed: Number that fixes the choice.

    Returns:
        (training, validation): ascending indices; together they are all spots.

    Raises:
        ValueError: No slide has two spots.
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
        message = (
            f"{len(slides)} spots on {len(set(slides))} slides: too few to hold any out, expected "
            "a slide with at least 2 spots."
        )
        raise ValueError(message)
    return np.flatnonzero(~is_val), np.flatnonzero(is_val)


def epoch_batches(num_spots: int, batch: int, seed: int, epoch: int) -> list[NDArray[np.int64]]:
    """Return the global batches of one epoch: parts of a permutation fixed by (seed, epoch).

    Every spot occurs once. The last batch may be smaller.
    """
    order = np.random.default_rng([seed, epoch]).permutation(num_spots).astype(np.int64)
    return [order[start : start + batch] for start in range(0, num_spots, batch)]
