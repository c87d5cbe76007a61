"""Time an epoch of the MIL head, and the scores of its predictions, against slower ways.

    python benchmarks/mil.py [--spots 2000] [--cells 16000] [--genes 1000] [--json mil.json]

Ours is one matrix of embeddings with offsets. The twin has the same network and the same batches.
As in the published code, it reads every cell separately from an HDF5 file (chunks of 64 x 128,
which h5py chooses for 16,000 x 2,048 float32), joins bags from a list and averages them by indices.
An epoch trains on all spots. In the epoch with validation 80 % train and 20 % validate, as in
`train`. The second part scores 3,500 spots: Pearson and Spearman of every gene, against scipy gene
by gene. On a shared machine use the CPU seconds (with OMP_WAIT_POLICY=passive).
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats

from scellst_ray.evaluation.expression.metrics import pearson_by_column, spearman_by_column
from scellst_ray.models.mil.bags import BagSet, epoch_batches, split_spots
from scellst_ray.models.mil.epoch import train_epoch, validation_loss
from scellst_ray.models.mil.fit import FitConfig, new_head, new_optimiser
from scellst_ray.models.mil.head import MilHead

DIM, CHUNK = 2048, (64, 128)
Loss = Literal["mse", "nb"]
LOSSES: tuple[Loss, ...] = ("mse", "nb")


def main() -> None:
    """Print times as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--spots", type=int, default=2000)
    parser.add_argument("--cells", type=int, default=16000)
    parser.add_argument("--genes", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--epochs",
        type=int,
        default=5,
        help="number of repeats",
    )
    parser.add_argument("--metric-spots", type=int, default=3500)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found: dict[str, Any] = {"threads": options.threads, "settings": str(vars(options))}
    for loss in LOSSES:
        bags = make_bags(options.spots, options.cells, options.genes, loss)
        found[f"epoch_{loss}"] = time_epoch(bags, loss, options.epochs)
        found[f"epoch_{loss}_with_validation"] = time_with_validation(bags, loss, options.epochs)
    found["epoch_reading_cells_from_hdf5"] = time_hdf5_twin(
        make_bags(options.spots, options.cells, options.genes, "mse")
    )
    found |= time_scores(options.metric_spots, options.genes)
    text = json.dumps(found, indent=2)
    print(text)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(text + "\n")


def make_bags(num_spots: int, num_cells: int, num_genes: int, loss: Loss) -> BagSet:
    """Return random bags of at least one cell each, with float16 embeddings as stored."""
    generator = np.random.default_rng(0)
    cuts = np.sort(generator.choice(np.arange(1, num_cells), num_spots - 1, replace=False))
    x_LD = torch.from_numpy(generator.normal(size=(num_cells, DIM)).astype(np.float16))
    offsets = torch.from_numpy(np.concatenate([[0], cuts, [num_cells]]).astype(np.int64))
    counts = generator.poisson(generator.uniform(0, 3, (num_spots, num_genes)))
    targets = torch.from_numpy(counts.astype(np.float32))
    return BagSet(x_LD, offsets, targets, None if loss == "mse" else torch.ones(num_spots))


def timed(function: Callable[[int], object], repeats: int) -> dict[str, float]:
    """Return wall and CPU seconds (of all threads) of several calls after one warm-up."""
    function(0)
    seconds, cpu = [], []
    for repeat in range(1, repeats + 1):
        start, start_cpu = time.perf_counter(), time.process_time()
        function(repeat)
        seconds.append(time.perf_counter() - start)
        cpu.append(time.process_time() - start_cpu)
    return {
        "least_s": round(min(seconds), 3),
        "median_s": round(float(np.median(seconds)), 3),
        "least_cpu_s": round(min(cpu), 3),
    }


def time_epoch(bags: BagSet, loss: Loss, repeats: int) -> dict[str, float]:
    """Time epochs over all spots."""
    config = FitConfig(loss=loss)
    head = new_head(bags, 0, config.formula())
    optimiser = new_optimiser(head, config)

    def epoch(number: int) -> None:
        batches = epoch_batches(len(bags), config.batch_spots, 0, number)
        train_epoch(head, optimiser, bags, batches)

    return timed(epoch, repeats)


def time_with_validation(bags: BagSet, loss: Loss, repeats: int) -> dict[str, float]:
    """Time epochs as in `train`: 80 % of the spots train, 20 % validate."""
    config = FitConfig(loss=loss)
    train, val = (bags.take(part) for part in split_spots(["slide"] * len(bags), 0.2, 0))
    head = new_head(train, 0, config.formula())
    optimiser = new_optimiser(head, config)

    def epoch(number: int) -> None:
        batches = epoch_batches(len(train), config.batch_spots, 0, number)
        train_epoch(head, optimiser, train, batches)
        validation_loss(head, val, config.batch_spots)

    return timed(epoch, repeats)


class CellsInHdf5(torch.utils.data.Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """A data set of spots whose cells are read from an HDF5 file, one row at a time."""

    def __init__(self, file: h5py.File, bags: BagSet) -> None:
        """Make the data set on the rows of file["embedding"]."""
        self.rows, self.bags = file["embedding"], bags
        self.offsets = bags.offsets.tolist()

    def __len__(self) -> int:
        """Return the number of spots."""
        return len(self.bags)

    def __getitem__(self, spot: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a spot's embeddings and target."""
        first, end = self.offsets[spot : spot + 2]
        cells = [torch.from_numpy(self.rows[row]) for row in range(first, end)]
        return torch.stack(cells), self.bags.targets_SG[spot]


def collate(
    spots: list[tuple[torch.Tensor, torch.Tensor]],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Join spots: return instances, the bag of each instance, and targets."""
    sizes = torch.tensor([len(cells) for cells, _ in spots])
    bag_L = torch.arange(len(spots)).repeat_interleave(sizes)
    return torch.cat([c for c, _ in spots]), bag_L, torch.stack([target for _, target in spots])


def time_hdf5_twin(bags: BagSet) -> dict[str, float]:
    """Time one epoch of the twin; the file is in the system's cache."""
    head = new_head(bags, 0)
    optimiser = new_optimiser(head, FitConfig())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "embeddings.h5"
        with h5py.File(path, "w") as file:
            file.create_dataset("embedding", data=bags.embeddings_LD.float().numpy(), chunks=CHUNK)
        with h5py.File(path) as file:
            loader = torch.utils.data.DataLoader(
                CellsInHdf5(file, bags), batch_size=128, shuffle=True, collate_fn=collate
            )
            start, start_cpu = time.perf_counter(), time.process_time()
            for x_LD, bag_L, target_SG in loader:
                twin_step(head, optimiser, x_LD, bag_L, target_SG)
            seconds, cpu = time.perf_counter() - start, time.process_time() - start_cpu
            return {"once_s": round(seconds, 3), "once_cpu_s": round(cpu, 3)}


def twin_step(
    head: MilHead,
    optimiser: torch.optim.Optimizer,
    x_LD: torch.Tensor,
    bag_L: torch.Tensor,
    target_SG: torch.Tensor,
) -> None:
    """Take a step of the twin."""
    sums_SG = torch.zeros_like(target_SG).index_add(0, bag_L, head(x_LD))
    prediction_SG = sums_SG / torch.bincount(bag_L)[:, None]
    optimiser.zero_grad()
    loss = torch.nn.functional.mse_loss(prediction_SG, target_SG)
    loss.backward()  # type: ignore[no-untyped-call]
    optimiser.step()


def time_scores(num_spots: int, num_genes: int) -> dict[str, dict[str, float]]:
    """Time Pearson's and Spearman's correlation by gene, on counts with ties."""
    generator = np.random.default_rng(0)
    truth = np.log1p(generator.poisson(1.5, (num_spots, num_genes))).astype(np.float32)
    predicted = (generator.normal(size=truth.shape) + truth).astype(np.float32)

    def ours(_: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        return pearson_by_column(predicted, truth), spearman_by_column(predicted, truth)

    def scipy_by_gene(_: int) -> None:
        for gene in range(num_genes):
            stats.pearsonr(predicted[:, gene], truth[:, gene])
            stats.spearmanr(predicted[:, gene], truth[:, gene])

    start = time.perf_counter()
    scipy_by_gene(0)
    return {
        "scores": timed(ours, 3),
        "scores_scipy": {"once_s": round(time.perf_counter() - start, 3)},
    }


if __name__ == "__main__":
    main()
