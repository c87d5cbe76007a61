"""Settings of `extract` and `predict`: checked, and decided once for all processes."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from scellst_ray import storage
from scellst_ray.core.geometry import MAX_MPP, MIN_MPP
from scellst_ray.core.numbers import MAX_INT, check_numbers
from scellst_ray.models.device import device_name, uses_own_gpu
from scellst_ray.models.mil.stored_head import HEAD_FILE
from scellst_ray.models.weights.catalogue import is_catalogued
from scellst_ray.runs.known_slides import check_moved
from scellst_ray.stages.segmenter_settings import WITHOUT_FILE, segmenter_problems

# Lowest number of tiles in a task with GPUs: the batch of a segmenting network. Tiles are quick
# there. Ray's driver costs time per task, and so keeps four times as many GPUs busy as with 2.
GPU_TILES = 8
CPUS_PER_PLANNER = 8
# Longest side of a tile in px: its pixels take 0.8 GB, and the maps of it several times as much.
MAX_TILE_PX = 2**14


@dataclass(frozen=True, kw_only=True)
class ExtractConfig:
    """Write CELLS of slides: every nucleus with its outline and embedding."""

    manifest: str
    """Manifest of slides: CSV or Parquet with slide_id, uri and, where the slide lacks it, mpp."""
    out: str
    """Run folder to write. The same command on it does only the missing work."""
    slides: list[str] | None = None
    """Comma-separated slide_ids to process. By default all of the manifest."""
    moved: list[str] | None = None
    """OLD=NEW: a file or folder of slides that was moved since the run was begun, so that finished
    slides are known under their new names. May be given several times."""
    segmenter: Literal["hematoxylin", "cellvit", "imported"] = "hematoxylin"
    """Method that finds nuclei: `hematoxylin` needs no weights, `cellvit` is a network, `imported`
    reads files that the manifest names."""
    segmenter_weights: str | None = None
    """CellViT checkpoint: a file, or a name that `scellst-ray models` lists. The segmenter
    `cellvit` needs it."""
    segmenter_window_px: int | None = None
    """Side in px of the square around each pixel in which CellViT's edges are scaled. By default
    the whole tile."""
    read_mpp: float | None = None
    """Resolution in um per px at which tiles are read. By default the slide's own, limited to
    0.25-0.5 (CellViT: 0.2-0.3)."""
    core_px: int = 960
    """Side in px of a tile's core, the square whose nuclei the tile owns."""
    halo_px: int = 32
    """Width in px of the halo, the margin read around the core. Raise it for larger nuclei."""
    encoder: str = "imagenet"
    """Weights of the network that embeds cells: a file, `imagenet` (downloaded by torchvision),
    `timm:NAME` (by timm) or `random:SEED`. Or `tokens` (CellViT's own), `types` (types as
    one-hot) or `none` (no embeddings)."""
    colours_from: str | None = None
    """Run folder with crops of these slides. Each slide's own mean and deviation of RGB then
    normalise its crops, in place of the encoder's. Use it for slides of another scanner or stain
    (sCellST's `self`)."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the networks. `auto` takes bfloat16 where the driver's device has it, or where
    `--gpus` is given. Otherwise it takes float16 on a GPU and float32 on a CPU."""
    store_embeddings: bool = True
    """Store the embedding of each cell (4 kB). Training needs it."""
    crops: int | None = None
    """Number of cells, over all slides, whose crops are stored for pretraining (3 kB each). By
    default none."""
    crops_per_slide: int | None = None
    """Highest number of crops from one slide. By default no limit."""
    crops_per_type: int | None = None
    """Highest number of crops of one nucleus type from one slide. By default no limit."""
    crops_seed: int = 0
    """Seed of the choice of cells whose crops are stored."""
    workers: int | None = None
    """Number of worker actors. By default as CPUs and memory allow, plus one per GPU."""
    gpus: bool | None = None
    """Run networks on GPUs. By default on if the cluster has any."""
    memory_gb: float | None = None
    """Memory in GB that a worker declares to Ray. By default 2, or the need of CellViT on CPUs.
    Raise it if workers are killed for lack of memory."""
    tiles_per_task: int = 2
    """Number of tiles that a worker takes at a time; with GPUs at least 8. If the worker dies,
    they are repeated."""
    max_attempts: int = 3
    """Number of worker processes that a tile, or opening a slide, may end before it counts as
    failed."""
    tile_timeout_s: float | None = 1800.0
    """Seconds that a tile may take. Then its worker is ended, which counts as an attempt. `null`
    sets no limit."""
    plan_timeout_s: float | None = 1800.0
    """Seconds that opening a slide and finding its tissue may take. Then its process is ended,
    which counts as an attempt. `null` sets no limit."""

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        low = {"core_px": 64, "tiles_per_task": 1, "memory_gb": 0.1, "workers": 1}
        low |= {"max_attempts": 1, "tile_timeout_s": 1, "plan_timeout_s": 1}
        low |= {"crops": 1, "crops_per_slide": 1, "crops_per_type": 1, "crops_seed": -MAX_INT}
        check_numbers(self, low)
        if self.core_px + 2 * self.halo_px > MAX_TILE_PX:
            message = (
                f"core_px is {self.core_px} and halo_px {self.halo_px}; a tile, core_px + 2 x "
                f"halo_px, must have at most {MAX_TILE_PX} px"
            )
            raise ValueError(message)
        if self.read_mpp is not None and not MIN_MPP <= self.read_mpp <= MAX_MPP:
            message = f"read_mpp is {self.read_mpp}; it must lie in {MIN_MPP}-{MAX_MPP} um/px"
            raise ValueError(message)
        check_moved(self.moved or ())
        problems = segmenter_problems(self)
        if self.crops is None and (self.crops_per_slide or self.crops_per_type):
            problems.append(
                "crops_per_slide and crops_per_type need crops; give the number of all crops"
            )
        if self.colours_from is not None and self.encoder in WITHOUT_FILE:
            problems.append(f"colours_from is for encoders of crops; this is {self.encoder}")
        if problems:
            raise ValueError("; ".join(problems))


def tiles_of_task(tiles_per_task: int, *, gpus: bool) -> int:
    """Return the number of tiles in a task, given the number that was asked for."""
    return max(tiles_per_task, GPU_TILES) if gpus else tiles_per_task


def num_planners(num_cpus: int, num_nodes: int = 1) -> int:
    """Return how many processes plan slides at a time: one for 8 CPUs, at least one a node.

    Args:
        num_cpus: CPUs of the cluster.
        num_nodes: Nodes of the cluster; a plan of a run, which does not know them, counts one.
    """
    return max(1, num_nodes, num_cpus // CPUS_PER_PLANNER)


def resolve_config(config: ExtractConfig) -> ExtractConfig:
    """Return the configuration with everything decided that must be equal in all processes.

    Files of weights get absolute names, and precision `auto` becomes that of the driver's device.
    """
    if config.encoder not in WITHOUT_FILE and not is_catalogued(config.encoder):
        from scellst_ray.models.encoder.encoder import is_named  # noqa: PLC0415 - as in check_networks

        if not is_named(config.encoder):
            config = replace(config, encoder=storage.absolute(config.encoder))
    weights = config.segmenter_weights
    if weights is not None and not is_catalogued(weights):
        config = replace(config, segmenter_weights=storage.absolute(weights))
    # `retry` reads the name from the run folder, and may start in another working folder.
    config = replace(config, manifest=storage.absolute(config.manifest))
    if config.encoder == "none":
        config = replace(config, store_embeddings=False)
    if config.precision != "auto":
        return config
    from scellst_ray.models.encoder.encoder import best_precision  # noqa: PLC0415

    device = device_name(on_gpu=uses_own_gpu(config.gpus))
    return replace(config, precision=best_precision(device))


@dataclass(frozen=True, kw_only=True)
class PredictConfig(ExtractConfig):
    """Write CELLS and EXPRESSION of slides in one pass, without transcriptomics."""

    head: str
    """Head that `scellst-ray train` wrote: its folder or its file."""
    encoder: str = "head"
    """Weights of the network that embeds cells, as for `extract`. `head` takes those that the head
    was trained with, under the name they had then."""
    store_embeddings: bool = False
    """Store the embedding of each cell too (4 kB)."""


def encoder_of_head(info: Mapping[str, Any], source: str) -> str:
    """Return the weights with which a head was trained, under the name they had then.

    Raises:
        ValueError: the head does not name them.
    """
    if "encoder" not in info:
        message = f"{source}: the head does not name its encoder: give it with --encoder"
        raise ValueError(message)
    return str(info["encoder"])


def head_file(head: str) -> str:
    """Return the head's file, given its folder or the file itself."""
    return head if head.endswith(".safetensors") else storage.join(head, HEAD_FILE)
