"""The `train` job: CELLS and spots in, an expression head out.

On top of both worlds: pipelines/bags.py prepares the supervision, training/fit_mil.py fits.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import fsspec
import yaml

from scellst_ray import __version__, storage
from scellst_ray.cohort import read_manifest
from scellst_ray.expression import HEAD_FILE
from scellst_ray.models.mil import save_head
from scellst_ray.models.mil_fit import FitConfig, FitResult
from scellst_ray.pipelines.bags import build_bags, choose_panel, training_slides
from scellst_ray.runs import RunFolder
from scellst_ray.session import Cluster, ray_session
from scellst_ray.training.fit_mil import Workers, fit


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """CELLS and spots to a head that predicts expression (multiple-instance learning)."""

    manifest: str
    """Slides with spots: slide_id, uri, spots (Space Ranger outs folder, or the counts TSV of an
    ST array with its spot_positions), optional spot_diameter_um."""
    cells: str
    """Run folder of `extract` that holds the CELLS of these slides."""
    out: str
    """Folder for the head, its bags and its report."""
    slides: list[str] | None = None
    """slide_ids to train on (a,b); by default every row with spots."""
    genes: str = "variable:250"
    """Panel: variable:N (chosen on the training slides), a comma-separated list, or a file."""
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
    """Training processes; the result does not depend on it."""
    cpus_per_worker: int | None = None
    """CPUs of each; by default all there are, shared out, but at most 4."""
    gpus: bool | None = None
    """One GPU per worker; by default if the cluster has enough."""

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        self.fit_config()
        if self.workers < 1:
            message = f"workers is {self.workers}; it must be at least 1"
            raise ValueError(message)

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
        )


def train(config: TrainConfig, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Train a head and publish it below `config.out`; return its info.

    Raises:
        ValueError: slides, spots, panel or the output folder cannot be used.
    """
    # Absolute, so that they mean the same in every process.
    cells, out = storage.absolute(config.cells), storage.absolute(config.out)
    run_uri = storage.join(cells, "run.json")
    if not storage.exists(run_uri):
        message = f"{cells}: no run of scellst_ray there; run `scellst-ray extract` first"
        raise ValueError(message)
    run_json = storage.read_json(run_uri)
    if not run_json["identity"].get("store_embeddings"):
        message = f"{cells}: its cells have no embeddings; extract with store_embeddings"
        raise ValueError(message)
    head_uri = storage.join(out, HEAD_FILE)
    if storage.exists(head_uri):
        message = f"{head_uri}: there is a head already; give another --out"
        raise ValueError(message)
    run = RunFolder(cells, run_json["digest"])
    slides = training_slides(read_manifest(config.manifest, ("spots",)), run, config.slides)
    panel = choose_panel(slides, config.genes)
    say(f"panel of {len(panel)} genes: {', '.join(panel[:6])}{' ...' if len(panel) > 6 else ''}")
    with ray_session(dashboard=True) as cluster:
        bags = build_bags(slides, panel, run, out, cluster.num_cpus)
        for slide_id, row in bags.items():
            say(
                f"{slide_id}: {row['num_spots']} spots with {row['num_links']} cells "
                f"({row['share_spots_with_cells']:.0%} of its spots have cells)"
            )
        names = [storage.join(out, "bags", f"{s.row.slide_id}.parquet") for s in slides]
        head, result = fit(names, config.fit_config(), _workers(config, cluster), out)
    settings = yaml.safe_load(_run_config(run))
    info = {
        "genes": panel,
        "scaling": {slide_id: row["scale"] for slide_id, row in bags.items()},
        "embedding_dim": len(head.mean_D),
        "encoder_digest": run_json["identity"]["encoder"],
        "encoder": settings["encoder"],
        "cells": run_json["identity"],
        "training_slides": sorted(bags),
        "num_spots": sum(row["num_spots"] for row in bags.values()),
        "metrics": _metrics(result),
        "config": asdict(config),
        "scellst_ray": __version__,
    }
    save_head(head_uri, head, info)
    storage.publish_json(storage.join(out, "head.json"), info)
    say(f"head after epoch {result.best_epoch + 1}: validation loss {result.best_loss:.4f}")
    return info


def _run_config(run: RunFolder) -> str:
    with fsspec.open(storage.join(run.uri, "config.yaml"), "r", encoding="utf-8") as handle:
        return str(handle.read())


def _workers(config: TrainConfig, cluster: Cluster) -> Workers:
    gpus = cluster.num_gpus >= config.workers if config.gpus is None else config.gpus
    # A worker's CPUs must all be on one node.
    share = max(1, min(cluster.num_cpus // config.workers, cluster.num_cpus_of_largest_node))
    return Workers(config.workers, config.cpus_per_worker or min(4, share), gpus)


def _metrics(result: FitResult) -> dict[str, Any]:
    return {
        "best_epoch": result.best_epoch,
        "validation_loss": result.best_loss,
        "train_losses": [pair[0] for pair in result.history],
        "validation_losses": [pair[1] for pair in result.history],
    }
