"""The report of `plan`: lines for people, and a JSON document."""

import math
from dataclasses import asdict
from typing import Any

from rich.console import Console

from scellst_ray import storage
from scellst_ray.commands.reports import line_printer, plain_table
from scellst_ray.core.version import __version__
from scellst_ray.preflight.config import PlanConfig
from scellst_ray.preflight.costs import Cost
from scellst_ray.preflight.plan import Plan, make_plan
from scellst_ray.preflight.slide_plans import SlidePlan

# Number of opened slides between two lines of progress.
SAY_EVERY = 500
HEAD = ("slide", "tiles", "tissue mm2", "cells", "read", "written", "CPU h", "GPU h")


def run_plan(config: PlanConfig) -> int:
    """Plan a run, print and write the plan; return 0 only if every slide could be planned."""
    say = line_printer()
    progress = Console(stderr=True)

    def report(num: int) -> None:
        if num % SAY_EVERY == 0:
            progress.print(f"{num} slides planned", highlight=False)

    plan = make_plan(config, report)
    for line in lines(plan):
        say(line)
    if config.json is not None:
        storage.publish_json(config.json, as_json(plan))
    return int(any(slide.error for slide in plan.slides))


def lines(plan: Plan) -> list[str]:
    """Return the lines to print: one for each slide, their total, and the cluster."""
    rows = [
        _row(slide.slide_id, slide.tissue_mm2, work)
        for slide, work in zip(plan.slides, plan.works, strict=True)
        if slide.error is None
    ]
    tissue = [slide.tissue_mm2 for slide in plan.slides if slide.tissue_mm2 is not None]
    rows.append(_row("all", sum(tissue) if tissue else None, plan.total))
    unplanned = [slide for slide in plan.slides if slide.error is not None]
    return [
        *plain_table(HEAD, rows),
        *(f"cannot be planned: {slide.slide_id}: {slide.error}" for slide in unplanned),
        *_totals(plan, len(unplanned)),
        *(f"note: {note}" for note in plan.notes),
    ]


def _row(name: str, tissue_mm2: float | None, work: Cost) -> tuple[str, ...]:
    return (
        name,
        f"{work.tiles:,}",
        "" if tissue_mm2 is None else f"{tissue_mm2:,.1f}",
        f"{work.cells:,.0f}",
        _size(work.bytes_read),
        _size(work.bytes_written),
        f"{work.all_cpu_s / 3600:,.2f}",
        f"{work.all_gpu_s / 3600:,.2f}",
    )


def _totals(plan: Plan, num_unplanned: int) -> list[str]:
    work, cluster = plan.total, plan.cluster
    gpus = f" and {cluster.gpus} GPUs" if cluster.gpus else ""
    stages = sum_stages(work)
    parts = ", ".join(f"{name} {seconds:,.0f}" for name, seconds in stages.items() if seconds)
    price = "" if plan.price is None else f"; price {plan.price:,.2f}"
    slides = (
        f"{plan.job} of {len(plan.slides)} slides, {num_unplanned} of which cannot be planned: "
        f"{work.tiles:,} tiles, about {work.cells:,.0f} cells, {_size(work.bytes_kept)} kept"
    )
    machines = f"{cluster.cpus} CPUs ({cluster.workers} workers){gpus}"
    wall = f"on {machines}: about {_duration(plan.wall_s)}{price}"
    return [slides, f"seconds of workers: {parts}", wall, *_sources(plan)]


def sum_stages(work: Cost) -> dict[str, float]:
    """Return seconds by stage; stages on GPUs have (GPU) after their name."""
    return work.cpu_s | {f"{name} (GPU)": seconds for name, seconds in work.gpu_s.items()}


def _sources(plan: Plan) -> list[str]:
    names: dict[str, list[str]] = {}
    for name, source in plan.rates.sources.items():
        names.setdefault(source, []).append(name)
    return [f"{', '.join(v)}: {k}" for k, v in names.items() if k != "default"]


def as_json(plan: Plan) -> dict[str, Any]:
    """Return a plan as a JSON document; unknown values are null."""
    slides = [
        _slide(slide) | {"work": _work(work)}
        for slide, work in zip(plan.slides, plan.works, strict=True)
    ]
    rates = {
        name: {"value": None if math.isnan(value) else value, "source": plan.rates.sources[name]}
        for name, value in plan.rates.values.items()
    }
    return {
        "job": plan.job,
        "scellst_ray": __version__,
        "slides": slides,
        "total": _work(plan.total),
        "cluster": asdict(plan.cluster),
        "wall_s": round(plan.wall_s, 1),
        "price": plan.price,
        "rates": rates,
        "notes": plan.notes,
    }


def _slide(slide: SlidePlan) -> dict[str, Any]:
    return {name: value for name, value in vars(slide).items() if name != "sample"}


def _work(work: Cost) -> dict[str, Any]:
    hours = {"cpu_hours": work.all_cpu_s / 3600, "gpu_hours": work.all_gpu_s / 3600}
    return asdict(work) | {"cells": round(work.cells)} | hours


def _size(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.3g} TB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"
