"""Measure time and memory of CellViT for one tile: shared skips, memory layouts, precisions.

    python benchmarks/cellvit_network.py [--side 1024] [--threads 1] [--json cellvit_network.json]

Each row runs once in its own process, on random weights and a random tile. These take the same
time as trained weights and tissue. 'separate' computes the skip decoders for each of the three
branches, as the published code does. 'shared' computes them once, as scellst_ray does. Times are
CPU seconds, memory is the peak of the process.
"""

import argparse
import json
import multiprocessing
import platform
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from scellst_ray.models.cellvit.inference import DTYPES, pack_maps
from scellst_ray.models.cellvit.network import CellViT, arch_of


@dataclass(frozen=True)
class Case:
    """One row of the table; `share` is the tile's side over that of `--side`."""

    share: float
    variant: str
    skips: str
    layout: str
    precision: str


# A CPU without native bfloat16 needs minutes for a tile that takes seconds in float32. Therefore
# that pair of rows uses a sixteenth of a tile.
CASES = (
    Case(1, "256", "separate", "contiguous", "float32"),
    Case(1, "256", "shared", "contiguous", "float32"),
    Case(1, "256", "separate", "channels_last", "float32"),
    Case(1, "256", "shared", "channels_last", "float32"),
    Case(0.25, "256", "shared", "channels_last", "float32"),
    Case(0.25, "256", "shared", "channels_last", "bfloat16"),
    Case(1, "SAM-B", "shared", "channels_last", "float32"),
)


def decode_separately(network: CellViT, x_BCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the three maps; the skip decoders run again for every branch."""
    _, (first, second, third, last) = network.encoder(x_BCHW)
    maps: list[Tensor] = []
    for branch in (
        network.nuclei_binary_map_decoder,
        network.hv_map_decoder,
        network.nuclei_type_maps_decoder,
    ):
        skips = (
            network.decoder0(x_BCHW),
            network.decoder1(first),
            network.decoder2(second),
            network.decoder3(third),
        )
        maps.append(branch(last, skips))
    binary, hv_map, types = maps
    return binary, hv_map, types


def measure(case: Case, side: int, num_threads: int) -> dict[str, float]:
    """Return CPU and wall seconds of one tile, CPU seconds of packing its maps, and peak memory."""
    torch.set_num_threads(num_threads)
    torch.manual_seed(0)
    last = case.layout == "channels_last"
    layout = torch.channels_last if last else torch.contiguous_format
    network = CellViT(arch_of(case.variant), 6, 19).eval().to(memory_format=layout)
    side = round(case.share * side)
    tile = torch.randn(1, 3, side, side).contiguous(memory_format=layout)
    dtype = DTYPES[case.precision]
    with torch.inference_mode(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        network(tile[..., :64, :64])  # the first call loads libraries
        cpu, wall = time.process_time(), time.perf_counter()
        if case.skips == "separate":
            binary, hv_map, types = decode_separately(network, tile)
        else:
            maps = network(tile)
            binary, hv_map, types = maps.nuclei_binary_map, maps.hv_map, maps.nuclei_type_map
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        shrink = time.process_time()
        pack_maps(binary, hv_map, types)
        shrink = time.process_time() - shrink
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"cpu_s": cpu, "wall_s": wall, "shrink_cpu_s": shrink, "peak_gib": peak}


def main() -> None:
    """Run every case, print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--side", type=int, default=1024, help="side of the tile in px")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, default=Path("cellvit_network.json"))
    options = parser.parse_args()
    rows = []
    print("side  variant  skips     layout         precision    cpu s   wall s  shrink s  peak GiB")
    # One process per case: peak memory is that of a process, and cases cannot affect each other.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        for case in CASES:
            found = pool.submit(measure, case, options.side, options.threads).result()
            rows.append(asdict(case) | found)
            side = round(case.share * options.side)
            names = f"{side:4}  {case.variant:8} {case.skips:9} {case.layout:14} {case.precision:9}"
            numbers = f"{found['cpu_s']:9.2f}{found['wall_s']:9.2f}{found['shrink_cpu_s']:10.2f}"
            print(f"{names}{numbers}{found['peak_gib']:10.2f}", flush=True)
    report = {
        "side_px": options.side,
        "threads": options.threads,
        "rows": rows,
        "native_bfloat16": bool(torch.cpu.get_capabilities().get("avx512_bf16")),
        "processor": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {options.json}")


if __name__ == "__main__":
    main()
