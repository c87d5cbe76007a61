"""Spots of a plan, and scores of genes."""

import numpy as np
import pytest

from scellst_ray.evaluation.simulation.cells import Parts
from scellst_ray.evaluation.simulation.conditions import SpotPlan, score_genes


def test_spots_of_a_part_have_only_its_cells():
    parts = Parts(np.arange(0, 10), np.arange(10, 14), np.arange(14, 30))
    plan = SpotPlan(num_spots=20, cells_per_spot=3, val_share=0.2, seed=0)
    spots = plan.draw(parts)
    assert {name: cells.shape for name, cells in spots.items()} == {
        "fit": (16, 3),
        "val": (4, 3),
        "test": (20, 3),
    }
    for name, cells_SK in spots.items():
        assert np.isin(cells_SK, getattr(parts, name)).all()
    for name, cells_SK in plan.draw(parts).items():
        np.testing.assert_array_equal(cells_SK, spots[name])


def test_a_constant_prediction_counts_nought_and_a_constant_gene_not_at_all():
    true_NP = np.array([[1.0, 1.0, 0.0], [2.0, 2.0, 0.0], [4.0, 3.0, 0.0]], np.float32)
    predicted_NP = np.array([[2.0, 5.0, 1.0], [4.0, 5.0, 2.0], [8.0, 5.0, 3.0]], np.float32)
    found = score_genes(predicted_NP, true_NP)
    assert found[0] == pytest.approx(1.0)
    assert found[1] == 0.0
    assert np.isnan(found[2])
