"""The `pretrain` job: from crops of cells to an encoder, by MoCo v3.

`extract --crops` (pipelines/crops.py) makes the crops, training/pretrain.py trains on them.
"""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from scellst_ray import storage
from scellst_ray.commands.reports import line_printer
from scellst_ray.commands.training_configs import PretrainConfig
from scellst_ray.core.version import __version__
from scellst_ray.models.device import device_name, uses_cluster_gpus, uses_own_gpu
from scellst_ray.models.encoder.backbones import new_backbone
from scellst_ray.models.encoder.encoder import (
    best_precision,
    encoder_digest,
    load_encoder,
    save_encoder,
)
from scellst_ray.models.encoder.weights_file import local_weights
from scellst_ray.models.weights.beside import publish_with_note
from scellst_ray.pipelines.ask_nodes import asked_for, check_before_run
from scellst_ray.pipelines.session import Cluster, ray_session
from scellst_ray.runs.crop_store import CropStore, open_store
from scellst_ray.runs.folder import RunFolder
from scellst_ray.runs.start import hold_run
from scellst_ray.stages.libraries import pixel_libraries
from scellst_ray.training.moco_loop import PretrainIdentity, Recipe, crop_order
from scellst_ray.training.pretrain import Keeping, PretrainWorkers, encoder_state, pretrain

ENCODER_FILE, INIT_FILE, INFO_FILE = "encoder.safetensors", "init.safetensors", "encoder.json"


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
    with hold_run(config.out, "pretrain", identity, pixel_libraries()) as (run, lease):
        run.write_config(asdict(config))
        if storage.exists(storage.join(run.uri, ENCODER_FILE)):
            local_weights(storage.join(run.uri, ENCODER_FILE))  # refuses another encoder
            provenance: dict[str, Any] = storage.read_json(storage.join(run.uri, INFO_FILE))
            provenance.pop("sha256", None)
            say(f"{run.uri}/{ENCODER_FILE} is finished; there is nothing to do")
            return provenance
        say(
            f"{store.num_crops:,} crops of {len(store.slides)} slides; {steps} steps of "
            f"{config.batch} an epoch; {config.arch}, embeddings of length {dim}"
        )
        with ray_session(dashboard=True) as cluster:
            check_before_run(asked_for(run.uri, gpus=bool(config.gpus)), cluster)
            workers = _workers(config, cluster)
            keep = Keeping(run.uri, config.checkpoint_steps, config.keep_best)
            init = _publish_init(config, run, store)
            checkpoint, metrics = pretrain(store.uris, recipe, init, workers, keep)
        lease.check()
        info = _provenance(config, store, recipe, metrics)
        _publish_encoder(config, run, store, encoder_state(checkpoint), info)
    say(f"encoder after epoch {int(metrics['epoch']) + 1}: training loss {metrics['loss']:.4f}")
    return info


def _publish_encoder(
    config: PretrainConfig,
    run: RunFolder,
    store: CropStore,
    state: dict[str, torch.Tensor],
    info: dict[str, Any],
) -> None:
    """Publish the encoder with these weights, after its provenance and digest."""
    network, _ = new_backbone(config.arch, config.seed)
    network.load_state_dict(state)
    publish_with_note(
        storage.join(run.uri, ENCODER_FILE),
        info,
        lambda path: save_encoder(path, network, store.mean, store.std, config.arch, info),
    )


def _precision(config: PretrainConfig) -> str:
    if config.precision != "auto":
        return config.precision
    best = best_precision(device_name(on_gpu=uses_own_gpu(config.gpus)))
    return "float32" if best == "float16" else best  # float16 would lose small gradients


def _init_digest(config: PretrainConfig) -> str:
    return config.init if config.init == "random" else encoder_digest(config.init)


def _publish_init(config: PretrainConfig, run: RunFolder, store: CropStore) -> str | None:
    """Copy the initial weights to where every worker can read them; return their address.

    Raises:
        ValueError: the weights are of another architecture.
    """
    if config.init == "random":
        return None
    network, _ = new_backbone(config.arch, config.seed)
    weights = load_encoder(config.init).network.state_dict()
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        message = (
            f"init {config.init}: its weights are not those of arch {config.arch}; give the arch "
            "they were trained with"
        )
        raise ValueError(message) from error
    uri = storage.join(run.uri, INIT_FILE)
    publish_with_note(
        uri, {}, lambda path: save_encoder(path, network, store.mean, store.std, config.arch)
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
    """Return the data and the settings that the encoder was trained with."""
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
    """Run `pretrain`; return 0."""
    say = line_printer()
    pretrain_encoder(config, say)
    say(f"encoder: {config.out}/{ENCODER_FILE}")
    return 0
