"""Stored matrices are checked in full. All matrices here are harmless: SciPy never gets them."""

import logging

import numpy as np
import pytest
from scipy import sparse

from scellst_ray.spots.matrices import checked_csr, first_not_count, refuse_too_large

MATRIX = sparse.csr_matrix(np.array([[1, 0, 2], [0, 5, 0]], np.int32))
PARTS = {"data": MATRIX.data, "indices": MATRIX.indices, "indptr": MATRIX.indptr}


def test_a_sound_matrix_is_returned():
    found = checked_csr(**PARTS, shape=(2, 3), source="m")
    np.testing.assert_array_equal(found.toarray(), MATRIX.toarray())
    wide = {name: values.astype(np.int64) for name, values in PARTS.items()}
    np.testing.assert_array_equal(
        checked_csr(**wide, shape=(2, 3), source="m").toarray(), MATRIX.toarray()
    )


@pytest.mark.parametrize("kind", [np.float16, np.bool_, np.uint8])
def test_values_of_every_number_type_are_taken(kind):
    found = checked_csr(**PARTS | {"data": PARTS["data"].astype(kind)}, shape=(2, 3), source="m")
    np.testing.assert_array_equal(found.toarray(), MATRIX.toarray().astype(kind))


@pytest.mark.parametrize(
    ("part", "values", "words"),
    [
        ("indices", [0, 3, 1], "1 indices lie outside, such as 3 of 3"),
        ("indices", [0, -1, 1], "such as -1 of 3"),
        ("indices", [0, 2], "3 values, but 2 indices"),
        ("indices", [0.0, 2.0, 1.0], "indices holds float64, expected whole numbers"),
        ("indptr", [0, 2], "indptr has 2 entries for 2 rows, expected 3"),
        ("indptr", [1, 2, 3], "indptr goes from 1 to 3"),
        ("indptr", [0, 2, 4], "indptr goes from 0 to 4, expected 0 to 3 values"),
        ("indptr", [0, 5, 3], "indptr falls from 5 to 3 at row 1"),
        ("indptr", [[0, 2, 3]], r"indptr has shape \(1, 3\)"),
        ("data", ["1", "2", "5"], "data holds <U1, expected numbers"),
        ("data", [1j, 2, 5], "data holds complex128"),
    ],
)
def test_arrays_that_are_no_matrix_are_refused(part, values, words):
    with pytest.raises(ValueError, match=f"m: not a sound sparse matrix: .*{words}"):
        checked_csr(**PARTS | {part: np.array(values)}, shape=(2, 3), source="m")


def test_values_of_one_place_are_added_and_told(caplog):
    caplog.set_level(logging.WARNING)
    parts = PARTS | {"indices": np.array([2, 2, 1])}
    found = checked_csr(**parts, shape=(2, 3), source="m")
    assert found.toarray().tolist() == [[0, 0, 3], [0, 5, 0]]
    assert "m: 1 values lie in a row and column that has a value" in caplog.text


@pytest.mark.parametrize(
    ("values", "first"),
    [
        ([0.0, 3.0], None),
        ([1.0, 0.5, -1.0], 0.5),
        ([1, -2], -2.0),
        ([1.0, np.inf], np.inf),
        ([2.0**25], 2.0**25),
        ([], None),
    ],
)
def test_the_first_value_that_is_no_count(values, first):
    assert first_not_count(np.array(values)) == first


def test_counts_that_float32_cannot_hold_are_refused():
    refuse_too_large(np.array([2**24]), "m")
    with pytest.raises(ValueError, match=r"m: a count is 1.*e\+12"):
        refuse_too_large(np.array([10**12]), "m")
