"""Loading of BAGS files (the cells of each spot and its target) for the fit of a head.

Embeddings lie in one matrix, in memory or in a memory-mapped file, with the cells of a bag in
consecutive rows. From a mapped file, the system reads the rows that a batch needs and caches what
fits into memory. The fit is the same to the last digit.

Shape letters: L instances (cells), S spots, D embedding, G genes.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch import Tensor

from scellst_ray import storage
from scellst_ray.models.mil.bags import BagSet, split_spots
from scellst_ray.models.mil.fit import FitConfig


def load_bags(uris: Sequence[str], *, counts: bool = False) -> tuple[BagSet, list[str]]:
    """Read BAGS files, in order, into one set; return it with the slide_id of each spot.

    Args:
        uris: BAGS files.
        counts: Whether targets are counts with size factors, for a loss on counts.

    Raises:
        ValueError: an earlier release wrote the files, without counts.
    """
    wanted = ("counts", "size_factor") if counts else ("target",)
    tables = []
    for uri in uris:
        missing = set(wanted) - set(storage.read_schema(uri).names)
        if missing:
            message = (
                f"{uri}: these bags have no {', '.join(sorted(missing))}, since an earlier release "
                "made them. Run `scellst-ray train` again into another folder, or use loss mse."
            )
            raise ValueError(message)
        tables.append(storage.read_table(uri, ["slide_id", "embedding", *wanted]))
    table = pa.concat_tables(tables).combine_chunks()
    bags = table["embedding"].combine_chunks()
    flat = bags.flatten()
    embeddings_LD = np.asarray(flat.flatten()).reshape(len(flat), -1)
    offsets = np.asarray(bags.offsets).astype(np.int64)
    factors = np.asarray(table["size_factor"], np.float32) if counts else None
    bag_set = BagSet(
        torch.from_numpy(embeddings_LD.copy()),
        torch.from_numpy(offsets - offsets[0]),
        torch.from_numpy(_matrix(table[wanted[0]])),
        None if factors is None else torch.from_numpy(factors.copy()),
    )
    return bag_set, table["slide_id"].to_pylist()


def _matrix(column: pa.ChunkedArray) -> NDArray[np.float32]:
    """Return a column of lists of equal length as a new float32 matrix."""
    lists = column.combine_chunks()
    return np.array(lists.flatten(), np.float32).reshape(len(lists), -1)


def load_split(
    uris: Sequence[str], config: FitConfig, memory_bytes: float
) -> tuple[BagSet, BagSet]:
    """Read BAGS files into training and validation bags, file by file.

    Args:
        uris: BAGS files.
        config: Settings of the fit. seed and val_share split the spots; the loss decides the
            targets.
        memory_bytes: Embeddings that take more bytes lie in a file in the temporary folder. The
            file is unlinked at once, so its space is freed when the process ends, however it ends.

    Returns:
        (training bags, validation bags), equal to load_bags, split_spots and BagSet.take in turn.
        Embeddings are never held twice.

    Raises:
        ValueError: as load_bags and split_spots.
    """
    counts = config.formula().counts
    slide_ids, sizes_S, dim = _outline(uris)
    parts = split_spots(slide_ids, config.val_share, config.seed)
    in_memory = int(sizes_S.sum()) * dim * 2 <= memory_bytes
    matrices = [_new_matrix(int(sizes_S[part].sum()), dim, in_memory=in_memory) for part in parts]
    pieces: tuple[list[BagSet], list[BagSet]] = ([], [])
    first, rows = 0, [0, 0]
    for uri in uris:
        bags, _ = load_bags([uri], counts=counts)
        for number, part in enumerate(parts):
            spots_of_file = part[(part >= first) & (part < first + len(bags))] - first
            taken, row = bags.take(spots_of_file), rows[number]
            rows[number] = row + len(taken.embeddings_LD)
            matrices[number][row : rows[number]] = taken.embeddings_LD
            pieces[number].append(taken)
        first += len(bags)
    train, val = (_join_bags(*each) for each in zip(matrices, pieces, strict=True))
    return train, val


def _outline(uris: Sequence[str]) -> tuple[list[str], NDArray[np.int64], int]:
    """Return the slide_id and the number of cells of each spot, and the length of embeddings."""
    slide_ids: list[str] = []
    sizes, dim = [], 0
    for uri in uris:
        table = storage.read_table(uri, ["slide_id", "cell_id"])
        slide_ids += table["slide_id"].to_pylist()
        sizes.append(pc.list_value_length(table["cell_id"]).to_numpy())
        dim = storage.read_schema(uri).field("embedding").type.value_type.list_size
    return slide_ids, np.concatenate(sizes).astype(np.int64), dim


def _new_matrix(num_rows: int, dim: int, *, in_memory: bool) -> Tensor:
    """Return an empty float16 matrix, in memory or in an unlinked file."""
    if in_memory:
        return torch.empty((num_rows, dim), dtype=torch.float16)
    with tempfile.TemporaryDirectory(prefix="scellst_ray_bags_") as folder:
        path = str(Path(folder) / "embeddings")
        flat = torch.from_file(path, shared=True, size=num_rows * dim, dtype=torch.float16)
    return flat.view(num_rows, dim)


def _join_bags(embeddings_LD: Tensor, pieces: Sequence[BagSet]) -> BagSet:
    """Return several bag sets as one; their embeddings are the rows of `embeddings_LD`."""
    sizes = torch.cat([piece.offsets.diff() for piece in pieces])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
    factors = [p.size_factors_S for p in pieces if p.size_factors_S is not None]
    targets_SG = torch.cat([piece.targets_SG for piece in pieces])
    return BagSet(embeddings_LD, offsets, targets_SG, torch.cat(factors) if factors else None)
