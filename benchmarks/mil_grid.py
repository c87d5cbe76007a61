"""Measure the time of a grid of trials beyond its fits.

    python benchmarks/mil_grid.py [--slides 5] [--seeds 20] [--epochs 25] [--json grid.json]

Slides are simulated in memory. Each is left out once per seed, which makes 100 trials by default.
Overhead is (seconds of the grid x trials at a time) / (sum of the fits) - 1. It consists of the
choice of genes, joining of bags, baselines, scores and Ray. The start of Ray is reported
separately. The time of a fit runs from the first epoch to the last. 25 epochs are few, since the
default patience alone is 20. `twin` is the same trials one after another in this process.
"""

import argparse
import json
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from measuring import peak_memory
from scipy import sparse

from scellst_ray import storage
from scellst_ray.evaluation.crossvalidation.folds import make_folds
from scellst_ray.evaluation.crossvalidation.trial import SlideData, TrialSettings, run_trial
from scellst_ray.models.mil.fit import FitConfig
from scellst_ray.pipelines.session import ray_session
from scellst_ray.spots.links import Links
from scellst_ray.spots.table import Spots
from scellst_ray.stages.supervision import Rules
from scellst_ray.training.grid import Trial, TrialResources, prepare_inputs, run_trials, trial_uri


def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--slides", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--spots", type=int, default=300, help="of each slide")
    parser.add_argument("--cells", type=int, default=10, help="of each spot")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--genes", type=int, default=250)
    parser.add_argument("--measured", type=int, default=2000, help="genes measured")
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--cpus", type=int, default=2)
    parser.add_argument("--twin", type=int, default=0, help="trials in this process, too")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    trials = make_trials(options)
    with tempfile.TemporaryDirectory() as folder:
        found = run_grid(options, trials, folder)
    if options.twin:
        found["twin"] = run_twin(options, trials[: options.twin])
    text = json.dumps(found | {"settings": {k: str(v) for k, v in vars(options).items()}}, indent=2)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")


def make_trials(options: argparse.Namespace) -> list[Trial]:
    """Return the trials: every slide is left out once per seed."""
    folds = make_folds("leave-one-slide-out", {f"s{i}": None for i in range(options.slides)})
    trials = []
    for seed in range(options.seeds):
        for fold in folds:
            # With a patience as long as the fit, all trials run the same number of epochs.
            fit = FitConfig(max_epochs=options.epochs, patience=options.epochs, seed=seed)
            rule = f"variable:{options.genes}"
            settings = TrialSettings(fold.train, fold.test, rule, fit, Rules(), num_draws=200)
            trials.append(Trial(f"{fold.name}-{seed}", settings, (*fold.train, *fold.test)))
    return trials


def make_slide(options: argparse.Namespace, name: str) -> tuple[dict[str, int], SlideData]:
    """Return a slide whose counts follow from its cells' embeddings, with 18 random colours."""
    rng = np.random.default_rng([7, int(name[1:])])
    num_spots, per_spot = options.spots, options.cells
    embeddings_ND = rng.standard_normal((num_spots * per_spot, options.dim)).astype(np.float16)
    offsets = np.arange(num_spots + 1, dtype=np.int64) * per_spot
    weights = np.random.default_rng(3).standard_normal((options.dim, options.measured))
    means_SD = np.add.reduceat(embeddings_ND.astype(np.float32), offsets[:-1], axis=0) / per_spot
    counts = rng.poisson(2 * np.exp(means_SD @ weights / np.sqrt(options.dim)))
    spots = Spots(
        np.array([f"spot{i}" for i in range(num_spots)]),
        rng.uniform(0, 1000, (num_spots, 2)),
        10.0,
        sparse.csr_matrix(counts.astype(np.float32)),
        [f"GENE{i}" for i in range(options.measured)],
    )
    links = Links(offsets, np.arange(len(embeddings_ND)))
    colours = rng.standard_normal((num_spots, 18))
    data = SlideData(name, spots, np.arange(num_spots), links, embeddings_ND, colours)
    return {"num_spots": num_spots}, data


def run_grid(options: argparse.Namespace, trials: list[Trial], folder: str) -> dict[str, Any]:
    """Run all trials on Ray."""
    started = time.monotonic()
    with ray_session(num_cpus=options.cpus), peak_memory([]) as peak:
        ready = time.monotonic()
        names = sorted({name for trial in trials for name in trial.inputs})
        prepared = prepare_inputs(partial(make_slide, options), names, TrialResources())
        ended = dict(run_trials(run_trial, trials, prepared.refs, folder, TrialResources()))
        seconds = time.monotonic() - ready
        memory = peak()
    assert set(ended.values()) == {None}, ended
    results = [storage.read_json(trial_uri(folder, trial.name)) for trial in trials]
    fits = sum(result["fit"]["seconds"] for result in results)
    whole = sum(result["seconds"] for result in results)
    return {
        "num_trials": len(trials),
        "seconds_to_start_ray": ready - started,
        "seconds": seconds,
        "sum_of_fits": fits,
        "sum_of_trials": whole,
        "overhead": seconds * options.cpus / fits - 1,
        "overhead_in_trials": whole / fits - 1,
        "peak_memory_gib": memory / 2**30,
        "pcc": float(np.mean([_pcc(result) for result in results])),
    }


def _pcc(result: dict[str, Any]) -> float:
    return float(np.mean([score["models"]["ours"]["pcc"] for score in result["scores"].values()]))


def run_twin(options: argparse.Namespace, trials: list[Trial]) -> dict[str, Any]:
    """Run some trials one after another in this process."""
    slides = {name: make_slide(options, name)[1] for name in {n for t in trials for n in t.inputs}}
    started = time.monotonic()
    results = [run_trial(trial.settings, slides) for trial in trials]
    seconds = time.monotonic() - started
    fits = sum(result["fit"]["seconds"] for result in results)
    return {"num_trials": len(trials), "seconds": seconds, "overhead": seconds / fits - 1}


if __name__ == "__main__":
    main()
