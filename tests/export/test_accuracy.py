"""Measured accuracy of genes: means over the evaluated slides, in the order of the export."""

import numpy as np
import pytest

from scellst_ray.export.accuracy import accuracy_of


def level(genes, **metrics):
    return {"models": {}, "by_gene": {"gene": genes, "ours": metrics, "mean": {"pcc": [9.0]}}}


EVALUATION = {
    "slides": {
        "a": {
            "spots": level(["X", "Y"], pcc=[0.5, None], scc=[0.1, 0.2]),
            "cells": level(["Y"], pcc=[0.25]),
        },
        "b": {"spots": level(["Y", "X"], pcc=[0.25, 0.75])},
    }
}


def test_means_over_slides():
    found = accuracy_of(EVALUATION, ["Z", "Y", "X"])
    expected = {
        "pcc_spots": [np.nan, 0.25, 0.625],
        "scc_spots": [np.nan, 0.2, 0.1],
        "pcc_cells": [np.nan, 0.25, np.nan],
        "num_slides_spots": [0, 2, 2],
        "num_slides_cells": [0, 1, 0],
    }
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values)


@pytest.mark.parametrize(
    "evaluation", [{"slides": {}}, {"slides": {"a": {"spots": {"models": {}}}}}, EVALUATION]
)
def test_an_evaluation_of_other_genes_is_refused(evaluation):
    with pytest.raises(ValueError, match=r"--evaluation: no score of .*\['Q'\]; give the file"):
        accuracy_of(evaluation, ["Q"])
