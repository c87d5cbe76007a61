"""Names of elements are valid, differ in more than case, and keep a slide's id if they can."""

import itertools

import pytest
from spatialdata._core.validation import check_valid_name

from scellst_ray.export.spatial_elements import element_names


@pytest.mark.parametrize(
    ("slide_ids", "names"),
    [
        (["a+b"], [""]),
        (["P1", "P2"], ["P1_", "P2_"]),
        (["a+b", "c"], ["a_b_", "c_"]),
        (["a+b", "a_b"], ["a_b_2_", "a_b_"]),
        (["a+B", "a_b", "a_b_2", "A++b"], ["a_B_3_", "a_b_", "a_b_2_", "A__b_"]),
        (["x", "x_he", "x_cells"], ["x_", "x_he_", "x_cells_"]),
        (["007", "S.1-b"], ["007_", "S.1-b_"]),
    ],
)
def test_names(slide_ids, names):
    found = element_names(slide_ids)
    assert list(found) == slide_ids
    assert list(found.values()) == names


def test_names_are_valid_and_unique_whatever_the_slides():
    parts = ["a", "A+", "+", "_", "2", ".", "-"]
    ids = {f"s{''.join(p)}" for n in (1, 2, 3) for p in itertools.product(parts, repeat=n)}
    unlike = list({slide_id.lower(): slide_id for slide_id in sorted(ids)}.values())
    names = [f"{p}{kind}" for p in element_names(unlike).values() for kind in ("he", "cells")]
    for name in names:
        check_valid_name(name)
    assert len({name.lower() for name in [*names, "table"]}) == 2 * len(unlike) + 1
