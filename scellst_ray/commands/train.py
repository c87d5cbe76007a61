"""The `train` job: CELLS and spots in, an expression head out.

On top of both worlds: pipelines/bags.py prepares the supervision, training/fit_mil.py fits.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import yaml
from rich.console import Console

from scellst_ray import storage
from scellst_ray.core.version import __version__
from scellst_ray.models.device import uses_cluster_gpus
from scellst_ray.models.mil.fit import FitConfig, FitResult
from scellst_ray.models.mil.head import save_head
from scellst_ray.models.mil.stored_head import HEAD_FILE
from scellst_ray.pipelines.ask_nodes import asked_for, check_before_run
from scellst_ray.pipelines.bags import build_bags
from scellst_ray.pipelines.session import Cluster, ray_session
from scellst_ray.runs.domain_shift import domain_of_bags
from scellst_ray.runs.folder import RunFolder
from scellst_ray.slides.manifest import read_manifest
from scellst_ray.spots.panel import CountFilter
from scellst_ray.spots.selection import parse_rule
from scellst_ray.stages.bags import choose_panel, provenance
from scellst_ray.stages.supervision import Rules, training_slides
from scellst_ray.training.fit_mil import Workers, fit


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """CELLS and spots to a head that predicts expression (multiple-instance learning)."""

    manifest: str
    """Slides with spots: slide_id, uri, spots (Space Ranger outs folder, .h5ad file, or the counts
    TSV of an ST array with its spot_positions), optional spot_diameter_um."""
    cells: str
    """Run folder of `extract` that holds the CELLS of these slides."""
    out: str
    """Folder for the head, its bags and its report."""
    slides: list[str] | None = None
    """slide_ids to train on (a,b); by default every row with spots."""
    genes: str = "variable:250"
    """Panel, chosen on the training slides: variable:N (variance of log counts), hvg:N (scanpy's
    seurat_v3) or svg:N (Moran's I); or markers:FILE, a comma-separated list, or a file."""
    min_gene_counts: int = 200
    """Counts a gene needs over a slide to pass the filters."""
    min_spot_share: float = 0.1
    """Share of a slide's spots a gene must occur in."""
    min_spot_counts: int = 20
    """Counts a spot needs over the genes that pass."""
    keep_mitochondrial: bool = False
    """Let genes whose name begins with MT- pass."""
    check_alignment: bool = True
    """Refuse slides whose spots do not lie on their tissue."""
    predictor: Literal["ours", "published"] = "ours"
    """published: LeakyReLU, dropout and softplus as in sCellST's code; ours: as in its paper."""
    loss: Literal["mse", "nb", "nb_total"] = "mse"
    """mse: squared error of scaled log-normalised expression; nb, nb_total: negative binomial
    likelihood of raw counts, by mean and dispersion or by total count and logits."""
    ensemble: int = 1
    """Networks trained side by side; above 1, cells have a standard deviation too (and 512 bytes
    are stored per network and cell)."""
    learning_rate: float = 1e-4
    """Of AdamW."""
    weight_decay: float = 0.01
    """Of AdamW."""
    batch_spots: int = 128
    """Spots per step, over all workers."""
    max_epochs: int = 400
    """At most this many epochs."""
    patience: int = 20
    """Epochs without a better validation loss before stopping."""
    val_share: float = 0.2
    """Share of each slide's spots held out for early stopping."""
    seed: int = 0
    """Fixes weights, split and order."""
    workers: int = 1
    """Training processes; the result does not depend on it, but for the dropout of published."""
    max_failures: int = 3
    """How often workers that died are started again, from the last epoch."""
    memory_gb: float = 8.0
    """Embeddings of more than so many GB are read, batch by batch, from a file in each worker's
    temporary folder, which needs the room; the result is the same."""
    cpus_per_worker: int | None = None
    """CPUs of each; by default all there are, shared out, but at most 4."""
    gpus: bool | None = None
    """One GPU per worker; by default if the cluster has enough."""

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        self.fit_config()
        parse_rule(self.genes)
        self.rules()
        for name, least in (("workers", 1), ("max_failures", 0), ("memory_gb", 0)):
            if getattr(self, name) < least:
                message = f"{name} is {getattr(self, name)}; it must be at least {least}"
                raise ValueError(message)

    def rules(self) -> Rules:
        """Return how spots become supervision."""
        limits = CountFilter(
            min_gene_counts=self.min_gene_counts,
            min_spot_share=self.min_spot_share,
            min_spot_counts=self.min_spot_counts,
            drop_prefix="" if self.keep_mitochondrial else "MT-",
        )
        counts = self.fit_config().formula().counts
        return Rules(limits, with_counts=counts, check_alignment=self.check_alignment)

    def fit_config(self) -> FitConfig:
        """Return how the head is fitted."""
        return FitConfig(
            lr=self.learning_rate,
            weight_decay=self.weight_decay,
            batch_spots=self.batch_spots,
            max_epochs=self.max_epochs,
            patience=self.patience,
            seed=self.seed,
            val_share=self.val_share,
            predictor=self.predictor,
            loss=self.loss,
            ensemble=self.ensemble,
        )


def _embedded_run(cells: str) -> dict[str, Any]:
    """Return what run.json of a run with embeddings says.

    Raises:
        ValueError: there is no run, or it kept no embeddings.
    """
    run_uri = storage.join(cells, "run.json")
    if not storage.exists(run_uri):
        message = f"{cells}: no run of scellst_ray there; run `scellst-ray extract` first"
        raise ValueError(message)
    run_json: dict[str, Any] = storage.read_json(run_uri)
    if not run_json["identity"].get("store_embeddings"):
        message = f"{cells}: its cells have no embeddings; extract with store_embeddings"
        raise ValueError(message)
    return run_json


def train(config: TrainConfig, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Train a head and publish it below `config.out`; return its info.

    Raises:
        ValueError: slides, spots, panel or the output folder cannot be used.
    """
    # Absolute, so that they mean the same in every process.
    cells, out = storage.absolute(config.cells), storage.absolute(config.out)
    run_json = _embedded_run(cells)
    head_uri = storage.join(out, HEAD_FILE)
    if storage.exists(head_uri):
        message = f"{head_uri}: there is a head already; give another --out"
        raise ValueError(message)
    run = RunFolder(cells, run_json["digest"])
    slides = training_slides(read_manifest(config.manifest, ("spots",)), run, config.slides)
    rules = config.rules()
    chosen = choose_panel(slides, config.genes, run, rules)
    panel = chosen.genes
    say(f"panel of {len(panel)} genes: {', '.join(panel[:6])}{' ...' if len(panel) > 6 else ''}")
    with ray_session(dashboard=True) as cluster:
        check_before_run(asked_for(out, gpus=bool(config.gpus)), cluster)
        bags = build_bags(slides, panel, run, out, cluster.num_cpus, rules)
        for slide_id, row in bags.items():
            say(
                f"{slide_id}: {row['num_spots']} spots with {row['num_links']} cells "
                f"({row['share_spots_with_cells']:.0%} of its spots have cells)"
            )
        ids = [slide.row.slide_id for slide in slides]
        names = {slide_id: storage.join(out, "bags", f"{slide_id}.parquet") for slide_id in ids}
        domain = domain_of_bags(names)
        head, result = fit(
            list(names.values()), config.fit_config(), _workers(config, cluster), out
        )
    settings = yaml.safe_load(_run_config(run))
    info = {
        "genes": panel,
        "scaling": {slide_id: row["scale"] for slide_id, row in bags.items()},
        "embedding_dim": len(head.mean_D),
        "formula": asdict(head.formula),
        "encoder_digest": run_json["identity"]["encoder"],
        "encoder": settings["encoder"],
        "cells": run_json["identity"],
        "training_slides": sorted(bags),
        "supervision": provenance(chosen, rules, bags),
        "num_spots": sum(row["num_spots"] for row in bags.values()),
        "metrics": _metrics(result),
        "domain": domain,
        "config": asdict(config),
        "scellst_ray": __version__,
    }
    save_head(head_uri, head, info)
    storage.publish_json(storage.join(out, "head.json"), info)
    say(f"head after epoch {result.best_epoch + 1}: validation loss {result.best_loss:.4f}")
    return info


def _run_config(run: RunFolder) -> str:
    return storage.read_text(storage.join(run.uri, "config.yaml"))


def _workers(config: TrainConfig, cluster: Cluster) -> Workers:
    gpus = uses_cluster_gpus(config.gpus, cluster.num_gpus, config.workers)
    # A worker's CPUs must all be on one node.
    share = max(1, min(cluster.num_cpus // config.workers, cluster.num_cpus_of_largest_node))
    cpus = config.cpus_per_worker or min(4, share)
    return Workers(config.workers, cpus, gpus, config.max_failures, config.memory_gb)


def _metrics(result: FitResult) -> dict[str, Any]:
    return {
        "best_epoch": result.best_epoch,
        "validation_loss": result.best_loss,
        "train_losses": [pair[0] for pair in result.history],
        "validation_losses": [pair[1] for pair in result.history],
    }


def run_train(config: TrainConfig) -> int:
    """Run `train`."""
    console = Console()
    train(config, lambda text: console.print(text, highlight=False, markup=False, soft_wrap=True))
    console.print(f"head: {config.out}/head.safetensors", markup=False, soft_wrap=True)
    return 0
