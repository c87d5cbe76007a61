"""Settings of train, crossvalidate and pretrain: what they share, decide and refuse."""

from typing import get_args, get_type_hints

import pytest

from scellst_ray.commands.training_configs import (
    CrossvalidateConfig,
    HeadSettings,
    PretrainConfig,
    TrainConfig,
)
from scellst_ray.evaluation.crossvalidation.folds import Protocol

FILES = {"manifest": "m.csv", "cells": "c", "out": "o"}


def test_the_fields_of_heads_are_declared_once():
    own = HeadSettings.__annotations__
    assert len(own) == 13
    assert not set(own) & {*TrainConfig.__annotations__, *CrossvalidateConfig.__annotations__}


def test_protocols_are_those_of_the_folds():
    kind = get_type_hints(CrossvalidateConfig)["protocol"]
    assert get_args(kind) == get_args(Protocol)


def test_fits_and_rules_are_those_of_the_flags():
    changes = {"learning_rate": 0.5, "ensemble": 3, "min_gene_counts": 7}
    config = TrainConfig(**FILES, **changes, loss="nb", seed=4, keep_mitochondrial=True)
    fit = config.fit_config()
    assert (fit.lr, fit.ensemble, fit.loss, fit.seed) == (0.5, 3, "nb", 4)
    rules = config.rules()
    assert (rules.limits.min_gene_counts, rules.limits.drop_prefix) == (7, "")
    assert rules.with_counts
    grid = CrossvalidateConfig(**FILES, **changes, keep_mitochondrial=True)
    assert grid.fit_with("nb", 4) == fit
    assert grid.rules_for(fit) == rules
    assert (grid.all_panels(), grid.all_losses()) == (["variable:250"], ["mse"])


@pytest.mark.parametrize(
    ("kind", "wrong", "part"),
    [
        (TrainConfig, {"workers": 0}, "workers is 0"),
        (TrainConfig, {"genes": "variable:x"}, "variable:x"),
        (CrossvalidateConfig, {"num_seeds": 0}, "num_seeds is 0"),
        (CrossvalidateConfig, {"gpus_per_trial": -1.0}, "gpus_per_trial is -1.0"),
        (CrossvalidateConfig, {"losses": ["mse", "huber"]}, "huber"),
    ],
)
def test_refuses(kind, wrong, part):
    with pytest.raises(ValueError, match=part):
        kind(**FILES, **wrong)


@pytest.mark.parametrize(
    ("wrong", "part"),
    [
        ({"batch": 1}, "batch is 1"),
        ({"epochs": 5, "warmup_epochs": 5}, "warmup_epochs is 5 of 5"),
        ({"workers": 2, "min_workers": 3}, "min_workers is 3; give at most workers, 2"),
    ],
)
def test_pretraining_refuses(wrong, part):
    with pytest.raises(ValueError, match=part):
        PretrainConfig(crops=["c"], out="o", **wrong)
