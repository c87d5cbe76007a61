"""One trial against a plain fit, and its scores against the measured spots."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from scellst_ray import storage
from scellst_ray.evaluation.crossvalidation.trial import (
    learn,
    make_section,
    prepare_slide,
    run_trial,
    score,
)
from scellst_ray.evaluation.expression.metrics import partial_pearson_by_column, pearson_by_column
from scellst_ray.models.mil.bags import split_spots
from scellst_ray.models.mil.fit import fit_head, new_head
from scellst_ray.slides.manifest import read_manifest
from scellst_ray.stages.bags import choose_panel, make_bags
from scellst_ray.stages.networks import vectors
from scellst_ray.stages.supervision import training_slides
from scellst_ray.training.bag_files import load_bags
from tests.support import crossvalidation
from tests.support.crossvalidation import trial_of
from tests.support.small_run import DIM, write_small_run

small, make_config, slides = (
    crossvalidation.small,
    crossvalidation.make_config,
    crossvalidation.slides,
)  # fixtures


@pytest.mark.parametrize("loss", ["mse", "nb"])
def test_a_trial_is_what_train_would_do(slides, small, make_config, tmp_path, loss):
    config = make_config(losses=[loss])
    settings = trial_of(config, 1).settings
    data, found = slides
    assert settings.train_slides == ("s0",)
    learnt = learn(settings, [data["s0"]])
    rules = settings.rules
    panel = choose_panel(found[:1], "variable:5", small.run, rules).genes
    assert learnt.panel == panel
    make_bags(found[0], panel, small.run, str(tmp_path), rules)
    bags, slide_ids = load_bags([str(tmp_path / "bags" / "s0.parquet")], counts=loss == "nb")
    train_spots, val_spots = split_spots(slide_ids, config.val_share, 0)
    train, val = bags.take(train_spots), bags.take(val_spots)
    head = new_head(train, 0, settings.fit.formula())
    result = fit_head(head, train, val, settings.fit)
    assert learnt.info["validation_loss"] == pytest.approx(result.best_loss, rel=1e-6)
    assert learnt.info["num_epochs"] == len(result.history)
    for one, other in zip(learnt.head.parameters(), head.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_scores_are_those_of_the_measured_spots(slides, make_config):
    settings = trial_of(make_config(), 1).settings
    data = slides[0]
    learnt = learn(settings, [data["s0"]])
    found = score(settings, learnt, data["s1"])
    test = data["s1"]
    columns = [test.spots.genes.index(gene) for gene in found["genes"]]
    counts = test.spots.counts[test.kept].toarray()
    # All genes of the slide pass the filters of this test, so the library is the sum.
    assert len(make_section(test, settings.rules).spots.genes) == counts.shape[1]
    logged = np.log1p(counts[:, columns] * 1e4 / counts.sum(axis=1, keepdims=True))
    predicted = np.empty_like(logged)
    for spot in range(len(test.kept)):
        cells = test.links.cell_index[test.links.offsets[spot] : test.links.offsets[spot + 1]]
        x_ND = torch.from_numpy(test.embeddings_ND[cells])
        predicted[spot] = learnt.head(x_ND).detach().numpy().mean(axis=0)
    values = found["models"]["ours"]
    expected = pearson_by_column(predicted, logged)
    np.testing.assert_allclose(values["by_gene"]["pcc"], expected, atol=2e-5)
    assert values["pcc"] == pytest.approx(np.nanmean(expected), abs=2e-5)
    depth = np.log1p(counts.sum(axis=1))
    partial_r = partial_pearson_by_column(predicted, logged, depth)
    np.testing.assert_allclose(values["by_gene"]["pcc_given_depth"], partial_r, atol=2e-5)
    assert values["pcc_low"] <= values["pcc"] <= values["pcc_high"]
    assert found["models"]["mean"]["pcc"] is None
    assert set(found["models"]) == {"ours", "mean", "ours_shuffled"}


def test_the_test_slide_has_no_say(slides, make_config):
    settings = trial_of(make_config(), 1).settings
    data = slides[0]
    one = run_trial(settings, data)
    changed = data["s1"].spots.counts.copy()
    changed.data[:] = 1.0
    other = data | {"s1": _with_counts(data["s1"], changed)}
    two = run_trial(settings, other)
    assert one["genes"] == two["genes"]
    assert one["fit"]["validation_loss"] == two["fit"]["validation_loss"]
    assert one["scores"] != two["scores"]


def _with_counts(data, counts):
    return replace(data, spots=replace(data.spots, counts=counts))


def test_genes_that_a_slide_lacks_are_left_out(slides, make_config):
    settings = trial_of(make_config(), 1).settings
    data = slides[0]["s1"]
    learnt = learn(settings, [slides[0]["s0"]])
    names = [f"x{gene}" if gene == learnt.panel[0] else gene for gene in data.spots.genes]
    lacking = replace(data, spots=replace(data.spots, genes=names))
    assert score(settings, learnt, lacking)["genes"] == learnt.panel[1:]
    none = replace(data, spots=replace(data.spots, genes=[f"x{g}" for g in data.spots.genes]))
    with pytest.raises(ValueError, match="slide s1: spots share no gene with the head"):
        score(settings, learnt, none)


def test_embeddings_that_are_not_finite_are_refused(make_config, tmp_path):
    made = write_small_run(tmp_path)
    uri = made.run.cells_uri("s0")
    table = storage.read_table(uri)
    bad = np.full((len(table), DIM), np.nan, np.float16)
    place = table.column_names.index("embedding")
    storage.publish_table(uri, table.set_column(place, table.schema.field(place), vectors(bad)))
    config = make_config()
    (slide,) = training_slides(read_manifest(str(made.manifest)), made.run, ["s0"])
    with pytest.raises(ValueError, match="slide s0: embeddings hold NaN"):
        prepare_slide(slide, made.run, config.rules_for(config.fit_with("mse", 0)), colour=False)
