"""Measure how pretraining scales over workers on a CPU, and compute a model of a GPU cluster.

    python benchmarks/moco_scaling.py [--workers 1 2 4] [--json results/scaling.json]

The measurement: processes that communicate by gloo take the same steps of a small network, with one
thread each. The batch is either constant per worker or constant in total. With more workers than
cores, cells/s cannot grow further. Then the figure to read is the share of time that a worker
spends in collective calls, including the wait for other workers.

The model counts exactly what a step sends, from the network itself, and divides by the speeds in
`Machine`. Nothing in it was measured on GPUs.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

from scellst_ray.models.moco.augment import AugmentConfig, augment
from scellst_ray.models.moco.lars import new_moco_optimiser
from scellst_ray.models.moco.model import new_moco
from scellst_ray.models.moco.network import MocoConfig
from scellst_ray.models.moco.step import Collective, moco_step, process_group
from scellst_ray.models.moco.sync_norm import convert

SMALL = MocoConfig(projector_dim=256, out_dim=64)
PAPER_BATCH = 4096


@dataclass(frozen=True)
class Machine:
    """The assumed speeds of a GPU and its network.

    Attributes:
        flops: Sustained floating-point operations per second in these convolutions (a third of
            an A100's dense bfloat16).
        bytes_per_s: Bus bandwidth of a GPU in ring collectives over nodes (a 200 Gbit/s link).
        latency_s: Seconds of one small all-reduce over all GPUs.
    """

    flops: float = 1e14
    bytes_per_s: float = 2e10
    latency_s: float = 6e-5


def main() -> None:
    """Print both tables and write them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--batch", type=int, default=64, help="number of crops per worker")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/moco_scaling.json"))
    options = parser.parse_args()
    measured = []
    for grows in (True, False):
        for num in options.workers:
            batch = options.batch * num if grows else options.batch * max(options.workers)
            row = measure(num, batch // num, options.steps)
            measured.append({"workers": num, "batch": batch, "batch_grows": grows} | row)
            print(json.dumps(measured[-1]))
    counted = traffic()
    model = [paper_model(num, counted) for num in (1, 8, 32, 64, 128, 256)]
    model += [paper_model(256, counted, batch=256 * 256)]
    print(json.dumps(counted))
    for line in model:
        print(json.dumps(line))
    options.json.parent.mkdir(parents=True, exist_ok=True)
    found = {"measured": measured, "traffic": counted, "machine": asdict(Machine()), "model": model}
    options.json.write_text(json.dumps(found, indent=2) + "\n")


def measure(num_workers: int, crops: int, steps: int) -> dict[str, float]:
    """Return the cells/s of all workers, and the share of time in collective calls."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(_worker, (num_workers, crops, steps, folder), num_workers)  # type: ignore[no-untyped-call]
        rows = [json.loads(path.read_text()) for path in Path(folder).glob("*.json")]
    seconds = max(row["seconds"] for row in rows)
    return {
        "cells_per_s": num_workers * crops * steps / seconds,
        "communication_share": sum(row["talking"] for row in rows) / len(rows) / seconds,
    }


def _worker(rank: int, num_workers: int, crops: int, steps: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=num_workers
    )
    talking = Talking(process_group())
    model = new_moco("resnet18", 0, SMALL).to(memory_format=torch.channels_last)
    convert(model, talking.collective.all_reduce, num_workers)
    optimiser = new_moco_optimiser("lars", model)
    generator = torch.Generator().manual_seed(rank)
    images = torch.randint(0, 256, (crops, 72, 72, 3), dtype=torch.uint8, generator=generator)
    for step in range(steps + 1):
        if step == 1:  # the first step is a warm-up
            torch.distributed.barrier()
            started, talking.seconds = time.perf_counter(), 0.0
        views = [
            augment(images, AugmentConfig(), (0.7,) * 3, (0.2,) * 3, generator) for _ in range(2)
        ]
        moco_step(
            model, optimiser, [(views[0], views[1])], lr=0.01, momentum=0.99,
            collective=talking.collective,
        )  # fmt: skip
    row = {"seconds": time.perf_counter() - started, "talking": talking.seconds}
    (Path(folder) / f"{rank}.json").write_text(json.dumps(row))
    torch.distributed.destroy_process_group()


class Talking:
    """A collective that counts the seconds in its calls, and the numbers that it sends."""

    def __init__(self, inner: Collective) -> None:
        """Wrap another collective."""
        self.inner, self.seconds = inner, 0.0
        self.reduced: list[int] = []
        self.gathered: list[int] = []
        self.collective = replace(inner, all_reduce=self._reduce, all_gather=self._gather)

    def _reduce(self, tensor: Tensor) -> Tensor:
        self.reduced.append(tensor.nbytes)
        started = time.perf_counter()
        found = self.inner.all_reduce(tensor)
        self.seconds += time.perf_counter() - started
        return found

    def _gather(self, tensor: Tensor) -> Sequence[Tensor]:
        self.gathered.append(tensor.nbytes)
        started = time.perf_counter()
        found = self.inner.all_gather(tensor)
        self.seconds += time.perf_counter() - started
        return found


def traffic() -> dict[str, Any]:
    """Count the bytes that a worker sends in a step of the published network, by taking one step.

    Two workers are simulated by sums and copies of one worker's tensors. Sizes do not depend on
    values. Except for the keys, they do not depend on the number of crops either.
    """
    pretended = Collective(0, 2, lambda tensor: tensor.mul_(2), lambda tensor: [tensor, tensor])
    talking = Talking(pretended)
    model = new_moco("resnet50", 0, MocoConfig())
    flops = _flops(model.online.backbone)
    convert(model, talking.collective.all_reduce, 2)
    views = torch.randn(2, 2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    moco_step(
        model, new_moco_optimiser("lars", model), [(views[0], views[1])], lr=0.0, momentum=0.99,
        collective=talking.collective,
    )  # fmt: skip
    gradient = max(talking.reduced)
    small = [size for size in talking.reduced if size < gradient]
    return {
        "gradient_bytes": gradient,
        "norm_calls": len(small),
        "norm_bytes": sum(small),
        "key_bytes_a_crop": sum(talking.gathered) / 2,
        # Four forward passes of the backbone; two have a backward pass at twice the cost.
        "flops_a_crop": 8 * flops,
    }


def _flops(backbone: nn.Module) -> float:
    """Return the floating-point operations of convolutions for one crop of 48 px."""
    found = 0.0

    def count(layer: nn.Module, _: object, output: Tensor) -> None:
        assert isinstance(layer, nn.Conv2d)
        num = output.numel() * layer.in_channels // layer.groups
        nonlocal found
        found += 2.0 * num * layer.kernel_size[0] * layer.kernel_size[1]

    hooks = [
        layer.register_forward_hook(count)
        for layer in backbone.modules()
        if isinstance(layer, nn.Conv2d)
    ]
    with torch.no_grad():
        backbone.eval()(torch.zeros(1, 3, 48, 48))
    backbone.train()
    for hook in hooks:
        hook.remove()
    return found


def paper_model(
    num_gpus: int, counted: dict[str, Any], batch: int = PAPER_BATCH, machine: Machine | None = None
) -> dict[str, float]:
    """Return the parts of a step's time on `num_gpus` GPUs, if no parts overlap."""
    machine = Machine() if machine is None else machine
    crops = batch / num_gpus
    compute = crops * counted["flops_a_crop"] / machine.flops
    ring = 2 * (num_gpus - 1) / num_gpus / machine.bytes_per_s
    gradient = counted["gradient_bytes"] * ring
    calls = counted["norm_calls"] * machine.latency_s if num_gpus > 1 else 0.0
    norms = calls + counted["norm_bytes"] * ring
    keys = counted["key_bytes_a_crop"] * crops * (num_gpus - 1) / machine.bytes_per_s
    step = compute + gradient + norms + keys
    return {
        "gpus": num_gpus,
        "batch": batch,
        "compute_ms": compute * 1e3,
        "gradient_ms": gradient * 1e3,
        "norms_ms": norms * 1e3,
        "keys_ms": keys * 1e3,
        "cells_per_s": batch / step,
        "communication_share": 1 - compute / step,
    }


if __name__ == "__main__":
    main()
