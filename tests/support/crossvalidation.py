"""Fixtures, configurations, slides and trials of a cross-validation of the small run."""

import pytest

from scellst_ray.commands.crossvalidate import make_trials
from scellst_ray.commands.training_configs import CrossvalidateConfig
from scellst_ray.evaluation.crossvalidation.folds import make_folds
from scellst_ray.evaluation.crossvalidation.trial import prepare_slide
from scellst_ray.slides.manifest import read_manifest
from scellst_ray.stages.supervision import training_slides
from tests.support.small_run import write_small_run

LOOSE = {
    "min_gene_counts": 5,
    "min_spot_share": 0.0,
    "min_spot_counts": 1,
    "learning_rate": 3e-3,
    "max_epochs": 4,
    "batch_spots": 16,
    "colour": False,
    "bootstraps": 20,
}


def small_config(small, out, **changes):
    """Return the configuration of a cross-validation of a small run."""
    settings = {"manifest": str(small.manifest), "cells": small.run.uri, "out": str(out)}
    return CrossvalidateConfig(**(settings | LOOSE | {"panels": ["variable:5"]} | changes))


def prepared_slides(small, config):
    """Return both slides as the trials get them, and as `train` gets them."""
    training = training_slides(read_manifest(str(small.manifest)), small.run, None)
    rules = config.rules_for(config.fit_with("nb", 0))
    data = {s.row.slide_id: prepare_slide(s, small.run, rules, colour=False)[1] for s in training}
    return data, training


def trial_of(config, number=0):
    """Return one trial of the grid over both slides."""
    folds = make_folds("leave-one-slide-out", {"s0": None, "s1": None})
    return make_trials(config, folds, "digest")[0][number]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write_small_run(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def make_config(small, tmp_path_factory):
    """Return a function that makes a configuration with its own output folder."""

    def make(**changes):
        return small_config(small, tmp_path_factory.mktemp("out"), **changes)

    return make


@pytest.fixture(scope="module")
def slides(small, make_config):
    return prepared_slides(small, make_config())
