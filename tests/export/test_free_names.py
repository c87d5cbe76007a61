"""Names of columns and layers differ, with and without regard to case."""

import pytest

from scellst_ray.export.free_names import free_names


@pytest.mark.parametrize(
    ("names", "taken", "is_cased", "expected"),
    [
        (["A", "B"], [], True, ["A", "B"]),
        (["CD3E", "Cd3e"], [], True, ["CD3E", "Cd3e"]),
        (["CD3E", "Cd3e"], [], False, ["CD3E", "Cd3e_2"]),
        (["FID", "x"], ["fid"], False, ["FID_2", "x"]),
        (["FID", "x"], ["fid"], True, ["FID", "x"]),
        (["distance"], ["distance"], True, ["distance_2"]),
        (["a", "A", "a_2"], [], False, ["a", "A_3", "a_2"]),
        ([], ["a"], False, []),
    ],
)
def test_names_differ(names, taken, is_cased, expected):
    assert free_names(names, taken, is_cased=is_cased) == expected
