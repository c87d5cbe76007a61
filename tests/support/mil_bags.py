"""Bags whose targets are known functions of their instances."""

from dataclasses import replace

import torch

from scellst_ray.models.mil.bags import BagSet, bag_mean


def make_bags(num_spots=23, dim=6, num_genes=4, seed=0, dtype=torch.float64) -> BagSet:
    """Bags whose targets are the mean of a known function of their instances."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 9, (num_spots,), generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
    x_LD = torch.randn(int(offsets[-1]), dim, generator=generator, dtype=dtype)
    truth = torch.nn.functional.softplus(2 * x_LD[:, :num_genes])
    return BagSet(x_LD, offsets, bag_mean(truth, offsets))


def make_counts(bags: BagSet, seed=0) -> BagSet:
    """Counts of these bags, with size factors."""
    generator = torch.Generator().manual_seed(seed)
    factors = torch.rand(len(bags), generator=generator) + 0.5
    counts = torch.poisson(3 * bags.targets_SG * factors[:, None], generator=generator)
    return replace(bags, targets_SG=counts, size_factors_S=factors.to(counts.dtype))


def single_cells(embeddings_ND, targets_NG, size_factors_N=None) -> BagSet:
    """Return bags of one cell each, with a target for every cell: full supervision."""
    offsets = torch.arange(len(embeddings_ND) + 1)
    return BagSet(embeddings_ND, offsets, targets_NG, size_factors_N)
