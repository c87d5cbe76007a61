"""Measure what it costs to know every slide by its content.

    python benchmarks/content_checks.py [--base FOLDER] [--slides 10000] [--json FILE]

Two costs count: the seconds that a driver takes at the start of a cohort of slides, fresh and
resumed when half of them are finished, and the share of CPU time that the checks take of the work
on a slide. The work is the cheapest that there is: nuclei by hematoxylin, and no embeddings.
`--base` names a checkout of another release, whose start is measured in the same way.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa

from scellst_ray import storage
from scellst_ray.core import schemas
from scellst_ray.pipelines.driver import Driver
from scellst_ray.runs.folder import RunFolder
from scellst_ray.runs.sources import sources_of
from scellst_ray.slides.manifest import read_manifest
from scellst_ray.stages.tiles import CellsSpec

SLIDE_BYTES = 20_000
# Slides in the log without a record: those that a killed run had begun, and those that are partial.
NUM_BEGUN, NUM_PARTIAL, TILES = 64, 500, 100
SPEC = CellsSpec("hematoxylin", None, 960, 32, "none", "float32", None, store_embeddings=False)


def main() -> None:
    """Measure both costs, print them and write them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--slides", type=int, default=10_000)
    parser.add_argument("--base", help="folder of another release to measure the start of, too")
    parser.add_argument("--start", help="measure one start in this folder (for internal use)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.start:
        print(json.dumps(start_of(options.start, options.slides)))
        return
    found: dict[str, Any] = {"slides": options.slides, "start_s": {}}
    for name, base in {"now": None, "base": options.base}.items():
        if name == "now" or base:
            found["start_s"][name] = measured_start(options.slides, base)
    found |= share_of_work()
    print(json.dumps(found, indent=2))
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


def measured_start(num_slides: int, base: str | None) -> dict[str, float]:
    """Return the seconds of a fresh and of a resumed start, each in a process of its own."""
    environment = os.environ | ({} if base is None else {"PYTHONPATH": base})
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        write_cohort(Path(folder), num_slides)
        command = [sys.executable, __file__, "--slides", str(num_slides), "--start", folder]
        for name in ("fresh", "half done"):
            result = subprocess.run(
                command, env=environment, stdout=subprocess.PIPE, text=True, check=True
            )
            seconds[name] = json.loads(result.stdout.splitlines()[-1])
            if name == "fresh":
                finish_half(Path(folder), num_slides)
    return seconds


def start_of(folder: str, num_slides: int) -> float:
    """Return the seconds from the manifest to the list of slides that still need work."""
    run = RunFolder(f"{folder}/run", "d1g")
    slides = read_manifest(f"{folder}/m.csv")
    began = time.perf_counter()
    sources = sources_of(slides, None, imported=False)
    finished = {s: r for s, r in run.records().items() if r["status"] in ("done", "empty")}
    try:
        from scellst_ray.runs.known_slides import accept_slides

        more: tuple[Any, ...] = (accept_slides(run, sources, finished),)
    except ImportError:
        from scellst_ray.runs import folder as runs_folder

        runs_folder.check_manifest_unchanged(run, sources)  # type: ignore[attr-defined]
        more = ()
    pending = [slide for slide in slides if slide.slide_id not in finished]
    rows = Driver(run, progress_of(num_slides), lambda _: None).resume(
        pending, SPEC, finished, *more
    )
    seconds = time.perf_counter() - began
    assert len(rows) == len(pending)
    assert sum(len(row["done_tiles"]) > 0 for row in rows) in (0, NUM_BEGUN + NUM_PARTIAL)
    return round(seconds, 2)


def progress_of(num_slides: int) -> Any:  # noqa: ANN401 - its module moved
    """Return the progress of a run that begins."""
    from scellst_ray.pipelines import driver

    return driver.Progress(num_slides)  # type: ignore[attr-defined]


def write_cohort(folder: Path, num_slides: int) -> None:
    """Write a manifest and small files that stand for slides."""
    (folder / "slides").mkdir()
    lines = ["slide_id,uri"]
    for number in range(num_slides):
        name = f"s{number:06d}"
        (folder / "slides" / f"{name}.svs").write_bytes(
            number.to_bytes(4, "big") * (SLIDE_BYTES // 4)
        )
        lines.append(f"{name},slides/{name}.svs")
    (folder / "m.csv").write_text("\n".join(lines) + "\n")


def finish_half(folder: Path, num_slides: int) -> None:
    """Write records for half of the slides, and receipts of tiles without cells for some more."""
    from scellst_ray.pipelines.resume import pending_slide
    from scellst_ray.stages.slide_source import present_source

    run = RunFolder(str(folder / "run"), "d1g")
    slides = read_manifest(str(folder / "m.csv"))
    sources = {
        slide.slide_id: present_source(pending_slide(slide, SPEC, run), SPEC)
        for slide in slides[: num_slides // 2 + NUM_BEGUN + NUM_PARTIAL]
    }
    for slide in slides[: num_slides // 2]:
        record = {"slide_id": slide.slide_id, "status": "done", "num_cells": 1, "mpp": 0.25}
        storage.publish_json(
            run.record_uri(slide.slide_id), record | {"source": sources[slide.slide_id]}
        )
    begun = slides[num_slides // 2 :][: NUM_BEGUN + NUM_PARTIAL]
    rows = [
        {
            "slide_id": slide.slide_id,
            "tile_id": tile,
            "num_tiles": TILES,
            "num_cells": 0,
            "source": sources[slide.slide_id],
        }
        for slide in begun
        for tile in range(TILES // 2)
    ]
    run.log_receipts(pa.Table.from_pylist(rows, schema=schemas.RECEIPTS))


def share_of_work() -> dict[str, float]:
    """Return CPU seconds of one slide's work and of the checks in it."""
    from scellst_ray.slides import source
    from scellst_ray.slides.synthetic.slide import (
        SyntheticConfig,
        write_synthetic_slide,
    )
    from scellst_ray.stages.find import FindNuclei
    from scellst_ray.stages.plan_slide import plan_slide
    from scellst_ray.stages.read import Read

    spent = 0.0

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:  # noqa: ANN401
            nonlocal spent
            began = time.process_time()
            result = function(*args)
            spent += time.process_time() - began
            return result

        return call

    for name in ("look", "fingerprint_of", "is_unchanged"):
        setattr(source, name, timed(getattr(source, name)))
    with tempfile.TemporaryDirectory() as folder:
        config = SyntheticConfig(width_um=2000.0, height_um=2000.0)
        slide = write_synthetic_slide(Path(folder), config).slide
        row: Any = {"slide_id": "s", "uri": str(slide), "mpp": None, "mpp_error": None}
        row |= {"done_tiles": [], "segmentation": None, "imported_uri": None, "source": None}
        began = time.process_time()
        tiles = FindNuclei(SPEC)(Read(SPEC)(plan_slide(row, SPEC)))
        total = time.process_time() - began
    assert all(tile.get("error") is None for tile in tiles)
    return {
        "tiles": len(tiles),
        "work_cpu_s": round(total, 3),
        "checks_cpu_s": round(spent, 4),
        "checks_percent": round(100 * spent / total, 3),
    }


if __name__ == "__main__":
    main()
