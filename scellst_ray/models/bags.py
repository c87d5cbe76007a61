"""Bags of instances as the fit takes them: offsets into one matrix, split and batched by seed.

Shape letters: L instances of all bags (a cell under two spots counts twice), S spots, D, G.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scellst_ray.models.mil import check_offsets


@dataclass(frozen=True)
class BagSet:
    """S bags of instances with a target each.

    Attributes:
        embeddings_LD: Instances of bag 0, then of bag 1, ... (any float type; kept as it is).
        offsets: int64 [S + 1], on the CPU; bag s is embeddings_LD[offsets[s]:offsets[s + 1]].
        targets_SG: float32 [S, G], scaled expression.
    """

    embeddings_LD: Tensor
    offsets: Tensor
    targets_SG: Tensor

    def __post_init__(self) -> None:
        """Refuse empty bags and parts that do not fit together.

        Raises:
            ValueError: See check_offsets; also where targets do not fit or are not finite.
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

    def __len__(self) -> int:
        """Return the number of bags."""
        return len(self.offsets) - 1

    def take(self, spots: NDArray[np.int64]) -> "BagSet":
        """Return the bags at these indices, in that order (possibly none)."""
        index = torch.as_tensor(spots, dtype=torch.int64)
        sizes = self.offsets.diff()[index]
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
        shift = (self.offsets[:-1][index] - offsets[:-1]).repeat_interleave(sizes)
        rows = (torch.arange(int(offsets[-1])) + shift).to(self.embeddings_LD.device)
        targets_SG = self.targets_SG[index.to(self.targets_SG.device)]
        return BagSet(self.embeddings_LD[rows], offsets, targets_SG)


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
