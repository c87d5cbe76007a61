"""The plain loop of pretraining: the result of a step depends only on the recipe."""

import copy
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest

from scellst_ray.models.moco.lars import new_moco_optimiser
from scellst_ray.models.moco.model import new_moco
from scellst_ray.models.moco.network import MocoConfig
from scellst_ray.models.moco.step import Collective
from scellst_ray.models.moco.sync_norm import convert
from scellst_ray.runs.crop_store import open_store
from scellst_ray.training.moco_loop import Recipe, crop_order, run_steps
from tests.support.crop_runs import write_crop_run
from tests.support.workers import meet

RECIPE = Recipe(
    arch="timm:test_resnet",
    moco=MocoConfig(projector_dim=16, out_dim=8, temperature=0.2),
    batch=16,
    epochs=3,
    warmup_epochs=1,
    base_lr=0.1,
)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    rng = np.random.default_rng(0)
    images = {s: rng.integers(0, 256, (n, 72, 72, 3), np.uint8) for s, n in (("a", 40), ("b", 15))}
    counts = {slide_id: len(crops) for slide_id, crops in images.items()}
    return open_store([write_crop_run(tmp_path_factory.mktemp("crops"), counts, images)])


def begin():
    model = new_moco(RECIPE.arch, RECIPE.seed, RECIPE.moco)
    return model, new_moco_optimiser("lars", model, weight_decay=RECIPE.weight_decay)


def losses(model, optimiser, store, recipe=RECIPE, collective=None, **how):
    steps = run_steps(
        model, optimiser, crop_order(store, recipe), recipe, collective or Collective(), **how
    )
    return [step.result.loss for step in steps]


def first_loss(model, optimiser, store, recipe=RECIPE, **how):
    steps = run_steps(model, optimiser, crop_order(store, recipe), recipe, Collective(), **how)
    with closing(steps):
        return next(steps).result.loss


def test_a_run_goes_on_from_any_step_as_if_it_had_not_stopped(store):
    order = crop_order(store, RECIPE)
    assert order.steps_per_epoch == 3
    model, optimiser = begin()
    whole, states = [], []
    for step in run_steps(model, optimiser, order, RECIPE, Collective()):
        whole.append((step.epoch, step.number, step.lr, step.result))
        states.append(copy.deepcopy((model.state_dict(), optimiser.state_dict())))
    assert [(epoch, number) for epoch, number, _, _ in whole] == [
        (epoch, number) for epoch in range(3) for number in range(3)
    ]
    assert len({result.loss for *_, result in whole}) == 9
    for taken in (1, 3, 5):
        model, optimiser = begin()
        for part, state in zip((model, optimiser), states[taken - 1], strict=True):
            part.load_state_dict(state)
        steps = run_steps(model, optimiser, order, RECIPE, Collective(), first_step=taken)
        again = [(step.epoch, step.number, step.lr, step.result) for step in steps]
        assert again == whole[taken:]


def test_workers_take_the_steps_of_one(store):
    alone = losses(*begin(), store)
    # Three workers have 6, 5 and 5 of 16 lanes.
    for num_workers in (2, 3):
        # Made before the threads start, since they share torch's random state.
        models = [begin()[0] for _ in range(num_workers)]

        def work(collective, models=models):
            model = models[collective.rank]
            convert(model, collective.all_reduce, collective.world_size)
            optimiser = new_moco_optimiser("lars", model, weight_decay=RECIPE.weight_decay)
            return losses(model, optimiser, store, collective=collective)

        found = meet(num_workers, work)
        assert all(each == found[0] for each in found)
        np.testing.assert_allclose(found[0], alone, rtol=2e-3)
        np.testing.assert_allclose(found[0][:3], alone[:3], rtol=1e-4)


def test_a_share_done_in_parts_has_all_keys_as_negatives(store):
    whole, parts = first_loss(*begin(), store), first_loss(*begin(), store, crops_at_once=6)
    # 16 crops in 3 parts: but for the statistics of norms, the loss is that of 16 crops. With the
    # negatives of a part alone it would be lower by log(16 / 5).
    assert parts != whole
    assert abs(parts - whole) < 0.3 * 4 * 0.2 * np.log(16 / 5)


def test_the_seed_decides_views_and_order(store):
    model, optimiser = begin()
    state = copy.deepcopy(model.state_dict())
    first = first_loss(model, optimiser, store)
    other = replace(RECIPE, seed=1)
    model, optimiser = begin()
    model.load_state_dict(state)
    assert first_loss(model, optimiser, store, other) != first


def test_more_workers_than_lanes_are_refused(store):
    crowd = Collective(0, 17, lambda tensor: tensor, lambda tensor: [tensor])
    with pytest.raises(ValueError, match="17 workers, and a batch of 16 serves at most 16"):
        losses(*begin(), store, collective=crowd)
