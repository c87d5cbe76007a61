"""The `pretrain` job: crops of cells in, an encoder out (MoCo v3).

On top of both worlds: `extract --crops` (pipelines/crops.py) made the crops, training/pretrain.py
trains on them.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

from rich.console import Console

from scellst_ray import storage
from scellst_ray.core.version import __version__
from scellst_ray.models.device import device_name, uses_cluster_gpus, uses_own_gpu
from scellst_ray.models.encoder.backbones import new_backbone
from scellst_ray.models.encoder.encoder import (
    best_precision,
    encoder_digest,
    load_encoder,
    save_encoder,
)
from scellst_ray.models.moco.augment import AugmentConfig
from scellst_ray.models.moco.network import MocoConfig
from scellst_ray.pipelines.ask_nodes import asked_for, check_before_run
from scellst_ray.pipelines.session import Cluster, ray_session
from scellst_ray.runs.crop_store import CropStore, open_store
from scellst_ray.runs.folder import RunFolder, begin_run
from scellst_ray.runs.lease import hold_lease
from scellst_ray.training.moco_loop import PretrainIdentity, Recipe, crop_order
from scellst_ray.training.pretrain import Keeping, PretrainWorkers, encoder_state, pretrain

ENCODER_FILE, INIT_FILE = "encoder.safetensors", "init.safetensors"


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Crops of cells to an encoder that tells them apart (MoCo v3)."""

    crops: list[str]
    """Run folders of `extract --crops N` (a,b)."""
    out: str
    """Folder for the encoder, its checkpoints and its log; the same command on it goes on."""
    arch: str = "resnet50"
    """Backbone: resnet18, resnet34, resnet50 or timm:NAME."""
    init: str = "random"
    """Weights to begin with: random, imagenet (downloaded by torchvision) or an encoder file."""
    epochs: int = 150
    """Passes over the crops."""
    warmup_epochs: int = 10
    """Of them, with the learning rate rising."""
    batch: int = 4096
    """Crops of a step, over all workers."""
    base_lr: float = 0.6
    """Learning rate for 256 crops; it grows with the batch."""
    optimiser: Literal["lars", "adamw"] = "lars"
    """For residual networks lars; adamw wants a base_lr of about 1e-4 to 1e-3."""
    weight_decay: float = 1e-6
    """Of the optimiser."""
    temperature: float = 1.0
    """Of the contrastive loss."""
    momentum: float = 0.99
    """Share of itself that the momentum encoder keeps at each step."""
    momentum_cosine: bool = False
    """Let the momentum rise to 1 along a cosine."""
    projector_dim: int = 4096
    """Hidden numbers of projector and predictor."""
    out_dim: int = 256
    """Numbers that crops are compared by."""
    flips: bool = False
    """Also flip views; a rotation and a flip is what a turned slide cannot show."""
    stain_jitter: float = 0.0
    """Also vary the stains: hematoxylin and eosin scaled by 1 -+ this and shifted by -+ this."""
    hue: float = 0.2
    """Turn of the hue, -+ this in whole turns."""
    min_crop_scale: float = 0.6
    """Least area of a random crop, as a share of the whole."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the networks; auto takes bfloat16 where the driver's device has it, or gpus is true."""
    recompute: bool = False
    """Recompute activations in the backward pass: less memory, a third more time (resnets)."""
    seed: int = 0
    """Fixes weights, order and augmentation."""
    workers: int = 1
    """Training processes, at most; the result does not depend on it but for rounding."""
    min_workers: int | None = None
    """Go on with as few when nodes are lost, and grow again; by default all are waited for."""
    crops_at_once: int | None = None
    """Crops a worker's device holds; a larger share of the batch is done in parts."""
    cpus_per_worker: int | None = None
    """CPUs of each; by default all there are, shared out, but at most 8."""
    gpus: bool | None = None
    """One GPU per worker; by default if the cluster has enough."""
    checkpoint_steps: int = 500
    """Steps between checkpoints; there is one after each epoch in any case."""
    keep_best: int = 2
    """Epochs of the lowest training loss whose checkpoints are kept, beside the latest."""
    max_failures: int = 8
    """Times workers may die before the run fails; it goes on from the latest checkpoint."""

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        least = {"epochs": 1, "warmup_epochs": 0, "batch": 2, "workers": 1, "min_workers": 1}
        least |= {"crops_at_once": 2, "cpus_per_worker": 1, "checkpoint_steps": 1, "keep_best": 1}
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and value < low:
                message = f"{name} is {value}; it must be at least {low}"
                raise ValueError(message)
        if self.base_lr <= 0 or self.weight_decay < 0 or self.warmup_epochs >= self.epochs:
            message = (
                f"base_lr is {self.base_lr}, weight_decay {self.weight_decay}, warmup_epochs "
                f"{self.warmup_epochs} of {self.epochs}; give a positive rate, a decay of 0 or "
                "more, and fewer epochs of warm-up than epochs"
            )
            raise ValueError(message)
        if self.min_workers is not None and self.min_workers > self.workers:
            message = f"min_workers is {self.min_workers}; workers is {self.workers}"
            raise ValueError(message)
        self.recipe("float32")

    def recipe(self, precision: str) -> Recipe:
        """Return what decides the result."""
        moco = MocoConfig(
            self.projector_dim, self.out_dim, self.temperature, self.momentum, self.momentum_cosine
        )
        augment = AugmentConfig(
            flips=self.flips,
            stain_jitter=self.stain_jitter,
            hue=self.hue,
            crop_scale=(self.min_crop_scale, 1.0),
        )
        return Recipe(
            arch=self.arch,
            moco=moco,
            augment=augment,
            batch=self.batch,
            epochs=self.epochs,
            warmup_epochs=self.warmup_epochs,
            base_lr=self.base_lr,
            optimiser=self.optimiser,
            weight_decay=self.weight_decay,
            precision=precision,
            recompute=self.recompute,
            seed=self.seed,
        )


def pretrain_encoder(config: PretrainConfig, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Pretrain an encoder and publish it below `config.out`; return its provenance.

    Raises:
        ValueError: crops, architecture, weights or the output folder cannot be used.
    """
    store = open_store(config.crops)
    recipe = config.recipe(_precision(config))
    steps = crop_order(store, recipe).steps_per_epoch
    _, dim = new_backbone(config.arch, config.seed)
    identity = PretrainIdentity(recipe, store.digest, _init_digest(config))
    run = begin_run(config.out, "pretrain", identity, asdict(config))
    encoder_uri = storage.join(run.uri, ENCODER_FILE)
    if storage.exists(encoder_uri):
        found: dict[str, Any] = storage.read_json(storage.join(run.uri, "encoder.json"))
        say(f"{encoder_uri} is finished; nothing to do")
        return found
    say(
        f"{store.num_crops:,} crops of {len(store.slides)} slides; {steps} steps of {config.batch} "
        f"an epoch; {config.arch}, {dim} numbers a cell"
    )
    with hold_lease(run.uri), ray_session(dashboard=True) as cluster:
        check_before_run(asked_for(run.uri, gpus=bool(config.gpus)), cluster)
        workers = _workers(config, cluster)
        keep = Keeping(run.uri, config.checkpoint_steps, config.keep_best)
        init = _publish_init(config, run, store)
        checkpoint, metrics = pretrain(store.uris, recipe, init, workers, keep)
    info = _provenance(config, store, recipe, metrics)
    network, _ = new_backbone(config.arch, config.seed)
    network.load_state_dict(encoder_state(checkpoint))
    storage.publish_json(storage.join(run.uri, "encoder.json"), info)
    storage.publish(
        encoder_uri,
        lambda path: save_encoder(path, network, store.mean, store.std, config.arch, info),
    )
    say(f"encoder after epoch {int(metrics['epoch']) + 1}: training loss {metrics['loss']:.4f}")
    return info


def _precision(config: PretrainConfig) -> str:
    if config.precision != "auto":
        return config.precision
    best = best_precision(device_name(on_gpu=uses_own_gpu(config.gpus)))
    return "float32" if best == "float16" else best  # float16 would lose small gradients


def _init_digest(config: PretrainConfig) -> str:
    return config.init if config.init == "random" else encoder_digest(config.init)


def _publish_init(config: PretrainConfig, run: RunFolder, store: CropStore) -> str | None:
    """Put the weights to begin with where every worker can read them.

    Raises:
        ValueError: they are of another architecture.
    """
    if config.init == "random":
        return None
    network, _ = new_backbone(config.arch, config.seed)
    found = load_encoder(config.init).network.state_dict()
    try:
        network.load_state_dict(found)
    except RuntimeError as error:
        message = (
            f"init {config.init}: its weights are not those of arch {config.arch}; give the arch "
            "they were trained with"
        )
        raise ValueError(message) from error
    uri = storage.join(run.uri, INIT_FILE)
    storage.publish(
        uri, lambda path: save_encoder(path, network, store.mean, store.std, config.arch)
    )
    return uri


def _workers(config: PretrainConfig, cluster: Cluster) -> PretrainWorkers:
    gpus = uses_cluster_gpus(config.gpus, cluster.num_gpus, config.workers)
    # A worker's CPUs must all be on one node.
    share = max(1, min(cluster.num_cpus // config.workers, cluster.num_cpus_of_largest_node))
    fewest = config.min_workers or config.workers
    return PretrainWorkers(
        config.workers if fewest == config.workers else (fewest, config.workers),
        config.cpus_per_worker or min(8, share),
        gpus,
        config.max_failures,
        config.crops_at_once,
    )


def _provenance(
    config: PretrainConfig, store: CropStore, recipe: Recipe, metrics: dict[str, Any]
) -> dict[str, Any]:
    """Return what the encoder was trained on and how."""
    return {
        "slides": store.slides,
        "num_crops": store.num_crops,
        "crops_digest": store.digest,
        "mean": store.mean,
        "std": store.std,
        "recipe": asdict(recipe),
        "init": config.init,
        "epoch": int(metrics["epoch"]) + 1,
        "training_loss": metrics["loss"],
        "embedding_rank": metrics["embedding_rank"],
        "scellst_ray": __version__,
    }


def run_pretrain(config: PretrainConfig) -> int:
    """Run `pretrain`."""
    console = Console()
    say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    pretrain_encoder(config, say)
    say(f"encoder: {config.out}/{ENCODER_FILE}")
    return 0
