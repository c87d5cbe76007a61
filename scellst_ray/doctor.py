"""`scellst-ray doctor`: everything a run needs, checked before it starts, all problems at once."""

import importlib.metadata
import platform
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import openslide
import torch
from rich.console import Console
from rich.markup import escape

from scellst_ray import __version__, storage
from scellst_ray.cohort import SlideRow, read_manifest
from scellst_ray.models.cellvit_weights import load_cellvit
from scellst_ray.models.encoder import best_precision, encoder_digest
from scellst_ray.models.mil import load_head
from scellst_ray.node_cache import hold
from scellst_ray.pipelines.expression import head_file
from scellst_ray.pipelines.networks import local_weights
from scellst_ray.session import ray_session
from scellst_ray.slides.reader import Slide


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """Check this machine, and what is given below, before a run."""

    manifest: str | None = None
    """Slides to open, each in turn."""
    out: str | None = None
    """Folder that must be writable."""
    encoder: str | None = None
    """Encoder weights that must be there."""
    segmenter_weights: str | None = None
    """CellViT checkpoint that must be whole: a file or a name of `models`."""
    head: str | None = None
    """Head that must be readable, its folder or its file."""
    ray: bool = True
    """Connect to Ray (or start it) and count its CPUs and GPUs."""


def doctor(config: DoctorConfig) -> int:
    """Run all checks; print one line each; return 0 if all passed, else 1."""
    console = Console()
    checks: list[tuple[str, Callable[[], str]]] = [("versions", _versions), ("device", _device)]
    if config.manifest:
        manifest = config.manifest
        checks.append(("manifest", lambda: f"{len(read_manifest(manifest))} slides"))
    if config.encoder:
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
    if config.ray:
        checks.append(("ray", _ray))
    bad = [name for name, check in checks if _check(console, name, check)]
    problems = len(bad)
    if config.manifest and "manifest" not in bad:
        problems += _slides(console, config.manifest)
    console.print(f"{problems} problem(s)" if problems else "all well", highlight=False)
    return 1 if problems else 0


def _check(console: Console, name: str, check: Callable[[], str]) -> int:
    """Print a check's finding; return 1 if it found a problem."""
    try:
        found = check()
    except (ValueError, OSError, RuntimeError) as error:
        text = f"[red]bad[/] {name}: {escape(str(error))}"
        console.print(text, highlight=False, soft_wrap=True)
        return 1
    console.print(f"[green]ok[/]  {name}: {escape(found)}", highlight=False, soft_wrap=True)
    return 0


def _versions() -> str:
    names = ("ray", "torch", "torchvision", "pyarrow", "anndata")
    versions = [f"{name} {importlib.metadata.version(name)}" for name in names]
    ours = f"scellst-ray {__version__}, python {platform.python_version()}"
    return ", ".join([ours, *versions, f"openslide {openslide.__library_version__}"])


def _device() -> str:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{', '.join(gpus) or 'no GPU'}; encoder precision {best_precision(device)}"


def _cellvit(weights: str) -> str:
    model = load_cellvit(local_weights(weights))
    return f"CellViT-{model.arch.variant}, {', '.join(model.type_names[1:])}; {model.digest}"


def _writable(out: str) -> str:
    probe = storage.join(out, f"probe-{uuid.uuid4().hex[:8]}.txt")
    storage.publish_text(probe, "scellst-ray doctor\n")
    storage.remove_tree(probe)
    return f"{out} can be written"


def _ray() -> str:
    with ray_session() as cluster:
        return f"{cluster.num_cpus} CPUs, {cluster.num_gpus} GPUs"


def _slides(console: Console, manifest: str) -> int:
    """Open every slide of a manifest; return how many have a problem."""
    rows = read_manifest(manifest)
    return sum(_check(console, f"slide {row.slide_id}", partial(_opened, row)) for row in rows)


def _opened(row: SlideRow) -> str:
    if row.mpp_error:
        raise ValueError(row.mpp_error)
    with hold(row.uri) as held, Slide(held.path, held.name, row.mpp) as slide:
        return f"{slide.width0} x {slide.height0} px, {slide.mpp:g} um/px"
