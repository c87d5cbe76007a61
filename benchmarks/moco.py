"""Time a pretraining step: ours against lightly's MoCo parts with a standard DataLoader.

    pip install --no-deps --target lightly_here lightly==1.5.22 aenum
    PYTHONPATH=lightly_here python benchmarks/moco.py [--arch resnet18] [--batch 128]
        [--steps 4] [--rounds 3] [--threads 2] [--json moco.json]

A step consists of two views of every crop, both encoders, backward, LARS and the momentum update.
Both have the same backbone, heads, batch, precision (float32) and parameters of views. lightly's
views come from torchvision and PIL, crop by crop, in a DataLoader of 0, 1 or 2 processes. Ours are
made in batches. Rows between the two add the differences one by one. Each measurement runs in its
own process, and all ways alternate, so that a busy machine slows all ways equally. Figures are
crops per second of wall time, and of CPU time of all processes, which other programs disturb less.
"""

import argparse
import copy
import importlib
import importlib.metadata
import importlib.util
import json
import multiprocessing
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from augment import compose_published, random_crops
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from scellst_ray.models.encoder.backbones import new_backbone
from scellst_ray.models.encoder.header import IMAGENET_MEAN, IMAGENET_STD
from scellst_ray.models.moco.augment import AugmentConfig, augment
from scellst_ray.models.moco.lars import new_moco_optimiser
from scellst_ray.models.moco.network import Moco, MocoConfig
from scellst_ray.models.moco.quick_conv import quicken
from scellst_ray.models.moco.step import moco_step

AIM = 1.5  # required ratio to lightly's crops per second
LR, MOMENTUM = 0.3, 0.99
HOW = "pip install --no-deps --target lightly_here lightly==1.5.22 aenum, and PYTHONPATH"

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Way:
    """One row of the table.

    Attributes:
        name: Name in the table.
        parts: 'lightly' or 'ours'.
        workers: Processes of the DataLoader with torchvision and PIL; None: batched views.
        channels_last: Whether network and views are channels last in memory.
        quick: Whether convolutions are those of `quick_conv`.
    """

    name: str
    parts: str
    workers: int | None
    channels_last: bool
    quick: bool


WAYS = (
    Way("lightly, DataLoader in the process", "lightly", 0, channels_last=False, quick=False),
    Way("lightly, DataLoader of 1 process", "lightly", 1, channels_last=False, quick=False),
    Way("lightly, DataLoader of 2 processes", "lightly", 2, channels_last=False, quick=False),
    Way("lightly, channels last, 1 process", "lightly", 1, channels_last=True, quick=False),
    Way("our step, DataLoader of 1 process", "ours", 1, channels_last=True, quick=False),
    Way("and batched views", "ours", None, channels_last=True, quick=False),
    Way("ours: and quick convolutions", "ours", None, channels_last=True, quick=True),
)


class TwoViews(Dataset[Pair]):
    """A data set of crops in memory; an item is two views of one crop."""

    def __init__(self, crops: NDArray[np.uint8]) -> None:
        """Make the data set of crops [N, H, W, 3]."""
        self.crops, self.view = crops, compose_published(AugmentConfig())

    def __len__(self) -> int:
        """Return the number of crops."""
        return len(self.crops)

    def __getitem__(self, row: int) -> Pair:
        """Return two views of a crop."""
        image = Image.fromarray(self.crops[row])
        return self.view(image), self.view(image)


def lightly_step(backbone: nn.Module, dim: int) -> Callable[[Pair], None]:
    """Return a step of lightly's parts, as in its own MoCo example, with the heads of version 3."""
    # Imported by name: it is no dependency and has no types.
    heads: Any = importlib.import_module("lightly.models.modules.heads")
    utils: Any = importlib.import_module("lightly.models.utils")
    lars: Any = importlib.import_module("lightly.utils.lars")
    losses: Any = importlib.import_module("lightly.loss")
    projector = heads.MoCoProjectionHead(dim, 4096, 256, num_layers=2, batch_norm=True)
    predictor = heads.BYOLPredictionHead(256, 4096, 256)
    key_backbone, key_projector = copy.deepcopy(backbone), copy.deepcopy(projector)
    utils.deactivate_requires_grad(key_backbone)
    utils.deactivate_requires_grad(key_projector)
    params = [p for part in (backbone, projector, predictor) for p in part.parameters()]
    optimiser = lars.LARS(params, lr=LR, momentum=0.9, weight_decay=1e-6)
    criterion = losses.NTXentLoss(temperature=1.0, memory_bank_size=0)

    def step(views: Pair) -> None:
        utils.update_momentum(backbone, key_backbone, m=MOMENTUM)
        utils.update_momentum(projector, key_projector, m=MOMENTUM)
        queries = [predictor(projector(backbone(x).flatten(start_dim=1))) for x in views]
        with torch.no_grad():
            keys = [key_projector(key_backbone(x).flatten(start_dim=1)) for x in views]
        loss = criterion(queries[0], keys[1]) + criterion(queries[1], keys[0])
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()

    return step


def our_step(backbone: nn.Module, dim: int, *, channels_last: bool) -> Callable[[Pair], None]:
    """Return our step."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = Moco(backbone, dim, MocoConfig()).to(memory_format=layout)
    optimiser = new_moco_optimiser("lars", model)

    def step(views: Pair) -> None:
        moco_step(model, optimiser, [views], lr=LR, momentum=MOMENTUM)

    return step


def all_views(way: Way, crops: NDArray[np.uint8], batch: int) -> Iterator[Pair]:
    """Yield the views of each batch of crops, in the memory layout of the way."""
    layout = torch.channels_last if way.channels_last else torch.contiguous_format
    if way.workers is not None:
        loader = DataLoader(TwoViews(crops), batch, num_workers=way.workers, drop_last=True)
        for first, second in loader:
            yield first.contiguous(memory_format=layout), second.contiguous(memory_format=layout)
        return
    generator, config = torch.Generator().manual_seed(0), AugmentConfig()
    for start in range(0, len(crops), batch):
        part = torch.from_numpy(crops[start : start + batch])
        first, second = (
            augment(part, config, IMAGENET_MEAN, IMAGENET_STD, generator) for _ in range(2)
        )
        yield first, second


def cpu_seconds() -> float:
    """Return CPU seconds of this process and of its ended child processes."""
    used = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def measure(way: Way, arch: str, batch: int, steps: int, num_threads: int) -> dict[str, float]:
    """Time some steps after one warm-up; return crops per second and the time of waiting."""
    torch.set_num_threads(num_threads)
    torch.manual_seed(0)
    backbone, dim = new_backbone(arch, 0)
    if way.channels_last:
        backbone = backbone.to(memory_format=torch.channels_last)
    if way.quick:
        quicken(backbone)
    if way.parts == "lightly":
        step = lightly_step(backbone, dim)
    else:
        step = our_step(backbone, dim, channels_last=way.channels_last)
    crops = random_crops(batch * steps, seed=0)
    step(next(all_views(way, crops[:batch], batch)))
    # The start of a DataLoader's processes is included, as in every epoch; fork makes it quick.
    wall, cpu, waited = time.perf_counter(), cpu_seconds(), 0.0
    views = all_views(way, crops, batch)
    for _ in range(steps):
        start = time.perf_counter()
        pair = next(views)
        waited += time.perf_counter() - start
        step(pair)
    wall = time.perf_counter() - wall
    for _ in views:  # the processes end, so that their CPU time is known
        pass
    cpu = cpu_seconds() - cpu
    found = {"cells_per_second": len(crops) / wall, "cells_per_cpu_second": len(crops) / cpu}
    return found | {"share_waiting": waited / wall}


def run_all(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure all ways in several rounds; return one row per way."""
    found: dict[Way, list[dict[str, float]]] = {way: [] for way in WAYS}
    context = multiprocessing.get_context("spawn")
    settings = (options.arch, options.batch, options.steps, options.threads)
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        for number in range(options.rounds):
            for way in WAYS:
                run = pool.submit(measure, way, *settings).result()
                found[way].append(run)
                rates = f"{run['cells_per_second']:.1f} and {run['cells_per_cpu_second']:.1f}"
                print(f"round {number + 1}, {way.name}: {rates} cells/s", flush=True)
    rows = []
    for way, runs in found.items():
        middle = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        best = {f"{key}_best": max(run[key] for run in runs) for key in runs[0] if "cells" in key}
        rows.append(asdict(way) | middle | best)
    return rows


def ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return the ratio of ours to the best of lightly's DataLoaders, by wall and by CPU time."""
    plain = [row for row in rows if row["parts"] == "lightly" and not row["channels_last"]]
    keys = [key for key in rows[0] if key.startswith("cells_per")]
    return {key: rows[-1][key] / max(row[key] for row in plain) for key in keys}


def main() -> None:
    """Measure each way, print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=4, help="number of timed steps")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/moco.json"))
    options = parser.parse_args()
    if importlib.util.find_spec("lightly") is None:
        sys.exit(f"lightly is not installed; it is no dependency of this project: {HOW}.")
    rows = run_all(options)
    print(f"{'':<38}{'cells/s':>9}{'best':>8}{'/cpu s':>9}{'best':>8}{'waiting':>9}")
    for row in rows:
        wall, cpu, share = (
            row["cells_per_second"],
            row["cells_per_cpu_second"],
            row["share_waiting"],
        )
        best, best_cpu = row["cells_per_second_best"], row["cells_per_cpu_second_best"]
        print(f"{row['name']:<38}{wall:9.1f}{best:8.1f}{cpu:9.1f}{best_cpu:8.1f}{share:9.1%}")
    ratio = ratios(rows)
    print(f"ours over lightly (at least {AIM}): " + ", ".join(f"{v:.2f}" for v in ratio.values()))
    names = ("aenum", "lightly", "numpy", "pillow", "torch", "torchvision")
    report = {
        "arch": options.arch,
        "batch": options.batch,
        "steps": options.steps,
        "rounds": options.rounds,
        "threads": options.threads,
        "aim": AIM,
        "ours_over_lightly": ratio,
        "ways": rows,
        "processor": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in names},
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {options.json}")


if __name__ == "__main__":
    main()
