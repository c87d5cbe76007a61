"""`scellst-ray doctor`: check all that a run needs before it starts, and list all problems.

It repeats the checks with which a run starts (preflight/checks.py, preflight/nodes.py). It also
opens weights, heads, and every slide that lies on a disk.
"""

import importlib.metadata
import os
import platform
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import openslide
import torch
from rich.console import Console
from rich.markup import escape

from scellst_ray import storage
from scellst_ray.commands.configs import DoctorConfig
from scellst_ray.commands.flags import TRUTHS, flags_of
from scellst_ray.commands.slide_files import Checked, check_slide_files, files_to_check
from scellst_ray.commands.table import COMMANDS
from scellst_ray.commands.yaml_file import read_settings
from scellst_ray.core.isolated import ProcessDeath, map_isolated
from scellst_ray.core.version import __version__
from scellst_ray.models.cellvit.checkpoint import load_cellvit
from scellst_ray.models.device import device_name, has_gpu
from scellst_ray.models.encoder.encoder import best_precision, encoder_digest, is_named
from scellst_ray.models.encoder.weights_file import local_weights
from scellst_ray.models.mil.head import load_head
from scellst_ray.models.weights.digests import file_digest
from scellst_ray.pipelines.ask_nodes import node_problems, working_nodes
from scellst_ray.pipelines.session import ray_session
from scellst_ray.preflight.checks import FoundSlides, Problem, find_slides
from scellst_ray.preflight.nodes import NodeRequirements, write_probe
from scellst_ray.preflight.slide_plans import Header, header_of
from scellst_ray.slides.manifest import PATH_COLUMNS, SlideRow, read_manifest
from scellst_ray.stages.config import head_file
from scellst_ray.stages.rows import Outcome, slide_row
from scellst_ray.stages.segmenter_settings import WITHOUT_FILE
from scellst_ray.stages.tiles import guarded

# Highest number of slides that are listed one by one if they have no problem.
MAX_LISTED = 100
OPEN_S = 600.0
# Jobs whose files of settings `--job` takes.
JOBS = ("extract", "predict", "pretrain", "train", "crossvalidate")


def doctor(config: DoctorConfig) -> int:
    """Run all checks and print one line for each; return 0 if all passed, else 1."""
    console = Console()
    config = _with_job(config)
    failed_checks = [name for name, check in _checks(config) if _check(console, name, check)]
    problems = len(failed_checks)
    slides: list[SlideRow] = []
    if config.manifest and "manifest" not in failed_checks:
        slides = read_manifest(config.manifest)
    search = find_slides(slides)
    # First the slides: once a job has left Ray, Ray removes the job's working folder.
    problems += _slides(console, slides, search)
    if config.ray:
        problems += _nodes(console, config, search)
    console.print(f"{problems} problem(s)" if problems else "all well", highlight=False)
    return 1 if problems else 0


def _with_job(config: DoctorConfig) -> DoctorConfig:
    """Return the configuration, with values of the job's file for flags that are not given.

    Raises:
        ValueError: the file holds no keys and values.
    """
    if config.job is None:
        return config
    settings = _read_job(config.job)
    names = [field.name for field in fields(config) if field.name not in ("job", "ray")]
    given = {
        name: settings[name] for name in names if name in settings and getattr(config, name) is None
    }
    if given.get("encoder") == "head":
        del given["encoder"]
    return replace(config, **given)


def _read_job(file: str) -> dict[str, Any]:
    """Return the keys and values of a job's file.

    Raises:
        ValueError: the file cannot be read, or has a key that no job knows.
    """
    with TemporaryDirectory() as folder:
        local = storage.resolve(file)[1]
        if not storage.is_local(file):
            local = str(Path(folder, Path(file).name))
            Path(local).write_bytes(storage.read_bytes(file))
        flags = {n: f for job in JOBS for n, f in flags_of(COMMANDS[job].load_settings()).items()}
        settings = read_settings(local, flags)
    if "gpus" in settings:
        settings["gpus"] = TRUTHS.get(str(settings["gpus"]))
    return settings


def _checks(config: DoctorConfig) -> list[tuple[str, Callable[[], str]]]:
    """Return the checks of this machine by name: functions that return a text or raise."""
    checks: list[tuple[str, Callable[[], str]]] = [("versions", _versions), ("device", _device)]
    if config.manifest:
        manifest = config.manifest
        checks.append(("manifest", lambda: f"{len(read_manifest(manifest))} slides"))
    if config.encoder and config.encoder not in WITHOUT_FILE:
        encoder = config.encoder
        checks.append(("encoder", lambda: encoder_digest(local_weights(encoder))))
    if config.segmenter_weights:
        weights = config.segmenter_weights
        checks.append(("segmenter", lambda: _cellvit(weights)))
    if config.head:
        head = head_file(config.head)
        checks.append(("head", lambda: f"{len(load_head(head)[1]['genes'])} genes"))
    if config.out:
        out = config.out
        checks.append(("output", lambda: _writable(out)))
    return checks


def _check(console: Console, name: str, check: Callable[[], str]) -> int:
    """Run a check and print its result; return 1 if it found a problem."""
    try:
        result = check()
    except (ValueError, OSError, RuntimeError) as error:
        _print(console, str(error), name)
        return 1
    console.print(f"[green]ok[/]  {name}: {escape(result)}", highlight=False, soft_wrap=True)
    return 0


def _print(console: Console, text: str, name: str | None = None) -> None:
    """Print a problem."""
    where = "" if name is None else f"{name}: "
    console.print(f"[red]bad[/] {where}{escape(text)}", highlight=False, soft_wrap=True)


def _versions() -> str:
    names = ("ray", "torch", "torchvision", "pyarrow", "anndata")
    versions = [f"{name} {importlib.metadata.version(name)}" for name in names]
    ours = f"scellst-ray {__version__}, python {platform.python_version()}"
    return ", ".join([ours, *versions, f"openslide {openslide.__library_version__}"])


def _device() -> str:
    device = device_name(on_gpu=has_gpu())
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{', '.join(gpus) or 'no GPU'}; encoder precision {best_precision(device)}"


def _cellvit(weights: str) -> str:
    model = load_cellvit(local_weights(weights))
    return f"CellViT-{model.arch.variant}, {', '.join(model.type_names[1:])}; {model.digest}"


def _writable(out: str) -> str:
    write_probe(out, keep=False)
    return f"{out} can be written"


def _nodes(console: Console, config: DoctorConfig, search: FoundSlides) -> int:
    """Connect to Ray and check every node; return the number of problems."""
    problems: list[Problem] = []

    def ask() -> str:
        with ray_session() as cluster:
            problems.extend(node_problems(_requirements(config), cluster, search))
            num = len(working_nodes())
        return f"{num} node(s), {cluster.num_cpus} CPUs, {cluster.num_gpus} GPUs"

    num_problems = _check(console, "ray", ask)
    for problem in problems:
        _print(console, problem.text)
    return num_problems + len(problems)


def _requirements(config: DoctorConfig) -> NodeRequirements:
    """Return the requirements of nodes; weights that are missing here are reported elsewhere."""
    digests: list[tuple[str, str]] = []
    for weights in (config.encoder, config.segmenter_weights):
        if weights is None or is_named(weights) or weights in WITHOUT_FILE:
            continue
        outcome = Outcome()
        with guarded(outcome, "weights"):
            digests.append((weights, file_digest(Path(local_weights(weights)))))
    return NodeRequirements(out=config.out, weights=tuple(digests), gpus=bool(config.gpus))


def _slides(console: Console, slides: list[SlideRow], search: FoundSlides) -> int:
    """Open the slides on local disks; return the number of all slides with a problem."""
    local = set(search.local)
    rows = [slide_row(s) for s in slides if s.uri in local and s.slide_id not in search.reasons]
    processes = max(1, min(len(rows), os.cpu_count() or 1))
    opened = map_isolated(header_of, rows, processes, OPEN_S)
    headers = {row["slide_id"]: header for row, header in opened}
    files = _check_files(slides, headers)
    num_bad = 0
    for slide in slides:
        reason = search.reasons.get(slide.slide_id)
        about = _about_slide(slide.slide_id, headers, search)
        header = headers.get(slide.slide_id)
        if isinstance(header, ProcessDeath):
            reason = f"{slide.uri}: {header.reason}"
        elif header is not None and header.get("error") is not None:
            reason = header["error"]
        reasons = [*([] if reason is None else [reason]), *files[slide.slide_id]["problems"]]
        for text in reasons:
            _print(console, text, f"slide {slide.slide_id}")
        if reasons:
            num_bad += 1
            continue
        for note in header.get("notes", ()) if isinstance(header, dict) else ():
            text = f"[yellow]note[/] slide {slide.slide_id}: {escape(note)}"
            console.print(text, highlight=False, soft_wrap=True)
        if len(slides) <= MAX_LISTED:
            also = "".join(f"; {column} read" for column in files[slide.slide_id]["read"])
            text = f"[green]ok[/]  slide {slide.slide_id}: {about}{also}"
            console.print(text, highlight=False, soft_wrap=True)
    if len(slides) > MAX_LISTED:
        well = f"{len(slides) - num_bad:,} of {len(slides):,} slides, {len(rows):,} of them opened"
        console.print(f"[green]ok[/]  {well}", highlight=False)
    return num_bad


def _check_files(
    slides: list[SlideRow], headers: dict[str, Header | ProcessDeath]
) -> dict[str, Checked]:
    """Check the files that rows name besides their slides; return the results by slide_id."""
    nothing = Checked(problems=[], read=[])
    checked = {slide.slide_id: nothing for slide in slides}
    asked = []
    for slide in slides:
        header = headers.get(slide.slide_id)
        if any(name in slide.columns for name in PATH_COLUMNS):
            asked.append(files_to_check(slide, header if isinstance(header, dict) else {}))
    processes = max(1, min(len(asked), os.cpu_count() or 1))
    for item, result in map_isolated(check_slide_files, asked, processes, OPEN_S):
        slide_id = item["slide"].slide_id
        if isinstance(result, ProcessDeath):
            checked[slide_id] = Checked(problems=[f"a reader {result.reason}"], read=[])
        else:
            checked[slide_id] = result
    return checked


def _about_slide(
    slide_id: str, headers: dict[str, Header | ProcessDeath], search: FoundSlides
) -> str:
    """Return a text about a slide without a problem."""
    header = headers.get(slide_id)
    if isinstance(header, dict) and "mpp" in header:
        return f"{header['width0']} x {header['height0']} px, {header['mpp']:g} um/px"
    return f"present, {search.num_bytes.get(slide_id, 0):,} bytes; not opened"
