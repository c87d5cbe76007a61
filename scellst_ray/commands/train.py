"""The `train` job: from CELLS and spots to a head, the network that predicts expression.

pipelines/bags.py prepares the bags (the cells of each spot), training/fit_mil.py fits the head.
"""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from scellst_ray import storage
from scellst_ray.commands.reports import line_printer
from scellst_ray.commands.training_configs import TrainConfig
from scellst_ray.core.version import __version__
from scellst_ray.models.device import uses_cluster_gpus
from scellst_ray.models.mil.fit import FitResult
from scellst_ray.models.mil.head import head_to_bytes
from scellst_ray.models.mil.stored_head import HEAD_FILE
from scellst_ray.models.weights.beside import publish_with_note
from scellst_ray.pipelines.ask_nodes import asked_for, check_before_run
from scellst_ray.pipelines.bags import build_bags
from scellst_ray.pipelines.session import Cluster, ray_session
from scellst_ray.runs.domain_shift import domain_of_bags
from scellst_ray.runs.folder import RunFolder, open_embedded_run
from scellst_ray.runs.lease import hold_lease
from scellst_ray.slides.manifest import read_manifest
from scellst_ray.spots.gene_ids import gene_ids
from scellst_ray.stages.bags import choose_panel, provenance
from scellst_ray.stages.supervision import training_slides
from scellst_ray.training.fit_mil import Workers, fit


def train(config: TrainConfig, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Train a head and publish it below `config.out`; return its info.

    Raises:
        ValueError: slides, spots, panel or the output folder cannot be used, or another driver
            works on that folder.
    """
    # Absolute, so that they mean the same in every process.
    cells, out = storage.absolute(config.cells), storage.absolute(config.out)
    run, run_json = open_embedded_run(cells)
    _check_no_head(out)
    slides = training_slides(read_manifest(config.manifest, ("spots",)), run, config.slides)
    rules = config.rules()
    chosen = choose_panel(slides, config.genes, run, rules)
    panel = chosen.genes
    ensembl_ids = gene_ids(panel, [str(slide.row.columns["spots"]) for slide in slides])
    say(f"panel of {len(panel)} genes: {', '.join(panel[:6])}{' ...' if len(panel) > 6 else ''}")
    with hold_lease(out) as lease:
        _check_no_head(out)  # again, now that no other driver can write one
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
        info = {
            "genes": panel,
            "gene_ids": ensembl_ids,
            "scaling": {slide_id: row["scale"] for slide_id, row in bags.items()},
            "embedding_dim": len(head.mean_D),
            "formula": asdict(head.formula),
            "encoder_digest": run_json["identity"]["encoder"],
            "encoder": yaml.safe_load(_run_config(run))["encoder"],
            "cells": run_json["identity"],
            "training_slides": sorted(bags),
            "supervision": provenance(chosen, rules, bags),
            "num_spots": sum(row["num_spots"] for row in bags.values()),
            "metrics": _metrics(result),
            "domain": domain,
            "config": asdict(config),
            "scellst_ray": __version__,
        }
        lease.check()
        content = head_to_bytes(head, info)
        publish_with_note(storage.join(out, HEAD_FILE), info, lambda p: _write(p, content))
    say(f"head after epoch {result.best_epoch + 1}: validation loss {result.best_loss:.4f}")
    return info


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def _check_no_head(out: str) -> None:
    uri = storage.join(out, HEAD_FILE)
    if storage.exists(uri):
        message = f"{uri}: there is a head already; give another --out"
        raise ValueError(message)


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
    """Run `train`; return 0."""
    say = line_printer()
    train(config, say)
    say(f"head: {config.out}/head.safetensors")
    return 0
