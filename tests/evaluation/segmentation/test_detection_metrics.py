"""Matching of points, against a dense solver; scores of types, against loops over the pairs."""

import math
from itertools import product

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_bipartite_matching
from scipy.spatial import cKDTree
from scipy.spatial.distance import cdist

from scellst_ray.evaluation.segmentation.detection_metrics import (
    UNKNOWN,
    DetectionCounts,
    TypeCounts,
    common_types,
    match_points,
    type_counts,
)


def dense_twin(true, predicted, radius):
    """Return the number of pairs and their summed distance, over the full matrix."""
    if not len(true) or not len(predicted):
        return 0, 0.0
    distance = cdist(true, predicted)
    allowed = distance <= radius
    # A forbidden pair costs more than all allowed ones together.
    cost = np.where(allowed, distance, (min(distance.shape) + 1) * (radius + 1))
    rows, columns = linear_sum_assignment(cost)
    kept = allowed[rows, columns]
    return int(kept.sum()), float(distance[rows, columns][kept].sum())


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("radius", [0.5, 3.0, 12.0])
def test_matching_equals_the_dense_solver(seed, radius):
    rng = np.random.default_rng(seed)
    true = rng.uniform(0, 40, (rng.integers(1, 60), 2))
    predicted = np.concatenate(
        [true[::2] + rng.normal(size=true[::2].shape), rng.uniform(0, 40, (rng.integers(0, 40), 2))]
    )
    if seed % 3 == 0:  # a grid has many equal distances, zero among them
        true, predicted = np.rint(true / 2) * 2, np.rint(predicted / 2) * 2
    found = match_points(true, predicted, radius)
    number, total = dense_twin(true, predicted, radius)
    assert found.counts == DetectionCounts(len(true), len(predicted), number)
    assert found.distance.sum() == pytest.approx(total)
    # Pairs are one to one and within the radius, and the distances belong to the pairs.
    assert len(set(found.true_index)) == len(set(found.predicted_index)) == number
    assert (np.diff(found.true_index) > 0).all()
    between = np.linalg.norm(true[found.true_index] - predicted[found.predicted_index], axis=1)
    np.testing.assert_allclose(found.distance, between)
    assert (between <= radius).all()


def test_many_points_reach_the_largest_matching_there_is():
    rng = np.random.default_rng(0)
    true = rng.uniform(0, 900, (8000, 2))
    predicted = np.concatenate([true[:6000] + rng.normal(0, 2, (6000, 2)), true[:1000] + 0.5])
    found = match_points(true, predicted, 3.0)
    near = cKDTree(true).sparse_distance_matrix(cKDTree(predicted), 3.0, output_type="coo_matrix")
    allowed = csr_array((np.ones(near.nnz), (near.row, near.col)), near.shape)
    assert found.counts.num_matched == (maximum_bipartite_matching(allowed) >= 0).sum()


def test_two_pairs_at_the_radius_go_before_one_at_zero():
    true, predicted = np.array([[0.0, 0], [3, 0]]), np.array([[3.0, 0], [6, 0]])
    found = match_points(true, predicted, 3.0)
    assert found.true_index.tolist() == [0, 1]
    assert found.predicted_index.tolist() == [0, 1]
    assert found.distance.tolist() == [3, 3]  # the radius is inclusive
    assert match_points(true, predicted, 2.999).distance.tolist() == [0]


def test_order_place_and_side_do_not_matter():
    rng = np.random.default_rng(1)
    true, predicted = rng.uniform(0, 60, (70, 2)), rng.uniform(0, 60, (90, 2))
    found = match_points(true, predicted, 4.0)
    order, other = rng.permutation(70), rng.permutation(90)
    shuffled = match_points(true[order], predicted[other], 4.0)
    pairs = set(zip(found.true_index, found.predicted_index, strict=True))
    assert pairs == set(
        zip(order[shuffled.true_index], other[shuffled.predicted_index], strict=True)
    )
    moved = match_points(true[:, ::-1] + 1000, predicted[:, ::-1] + 1000, 4.0)
    np.testing.assert_array_equal(moved.predicted_index, found.predicted_index)
    swapped = match_points(predicted, true, 4.0)
    assert pairs == set(zip(swapped.predicted_index, swapped.true_index, strict=True))
    assert swapped.counts.precision == found.counts.recall
    assert swapped.counts.f1 == found.counts.f1


def test_counts():
    counts = DetectionCounts(10, 20, 5) + DetectionCounts(0, 5, 0)
    assert counts == DetectionCounts(10, 25, 5)
    assert (counts.precision, counts.recall, counts.f1) == (0.2, 0.5, 10 / 35)
    points = np.random.default_rng(0).uniform(0, 9, (7, 2))
    perfect = match_points(points, points, 1e-9).counts
    assert (perfect.precision, perfect.recall, perfect.f1) == (1, 1, 1)


def test_nothing_annotated_or_predicted():
    some, none = np.array([[1.0, 2.0]]), np.zeros((0, 2))
    missed = match_points(some, none, 3.0).counts
    assert (missed.f1, missed.recall) == (0, 0)
    assert math.isnan(missed.precision)
    invented = match_points([], some, 3.0).counts
    assert (invented.f1, invented.precision) == (0, 0)
    assert math.isnan(match_points(none, none, 3.0).counts.f1)


@pytest.mark.parametrize(
    ("true", "radius", "message"),
    [
        (np.zeros((3, 3)), 3.0, r"true_N2 is float64 \(3, 3\); expected finite points"),
        (np.array([[0, np.nan]]), 3.0, "true_N2 is"),
        (np.zeros((1, 2)), 0.0, "radius is 0.0"),
        (np.zeros((1, 2)), math.nan, "radius is nan"),
    ],
)
def test_wrong_points_are_refused(true, radius, message):
    with pytest.raises(ValueError, match=message):
        match_points(true, np.zeros((1, 2)), radius)


def loop_twin(pairs, true_types, predicted_types, name):
    """Return F1, precision and recall of a type as the published evaluations count."""
    paired_true = {t for t, _ in pairs}
    paired_predicted = {p for _, p in pairs}
    tp = fp = fn = 0
    for t, p in pairs:
        if true_types[t] == UNKNOWN or name not in (true_types[t], predicted_types[p]):
            continue
        tp += true_types[t] == predicted_types[p]
        fp += true_types[t] != name
        fn += predicted_types[p] != name
    fp_d = sum(k == name and i not in paired_predicted for i, k in enumerate(predicted_types))
    fn_d = sum(k == name and i not in paired_true for i, k in enumerate(true_types))

    def over(a, b):
        return a / b if b else math.nan

    return (
        over(2 * tp, 2 * tp + 2 * fp + 2 * fn + fp_d + fn_d),
        over(tp, tp + 2 * fp + fp_d),
        over(tp, tp + 2 * fn + fn_d),
    )


@pytest.mark.parametrize("seed", range(10))
def test_types_equal_the_loops(seed):
    rng = np.random.default_rng(seed)
    true = rng.uniform(0, 50, (60, 2))
    predicted = np.concatenate([true[:40] + rng.normal(size=(40, 2)), rng.uniform(0, 50, (15, 2))])
    true_types = rng.choice(["a", "b", "c", UNKNOWN], 60).tolist()
    predicted_types = rng.choice(["a", "b", "d"], 55).tolist()
    found = match_points(true, predicted, 3.0)
    counts = type_counts(found, true_types, predicted_types)
    pairs = list(zip(found.true_index.tolist(), found.predicted_index.tolist(), strict=True))
    assert sorted(counts) == ["a", "b", "c", "d"]
    for name, value in counts.items():
        expected = loop_twin(pairs, true_types, predicted_types, name)
        assert (value.f1, value.precision, value.recall) == pytest.approx(expected, nan_ok=True)
        assert value.num_true == true_types.count(name)
        assert value.num_predicted == predicted_types.count(name)
        assert value.num_detected == value.both + value.only_true
        assert value.num_true == value.num_detected + value.unmatched_true
    assert counts["c"].num_predicted == 0
    assert counts["c"].f1 == 0
    assert 0 < counts["c"].detected < 1
    assert math.isnan(counts["d"].detected)
    assert math.isnan(counts["d"].recall)


def test_types_in_closed_form_and_their_sum():
    # With type a: one correct pair, one pair of two types, one unmatched nucleus on each side.
    true = np.array([[0.0, 0], [10, 0], [20, 0]])
    predicted = np.array([[0.0, 0], [10, 0], [40, 0]])
    counts = type_counts(match_points(true, predicted, 1.0), ["a", "b", "a"], ["a", "a", "a"])
    assert counts["a"] == TypeCounts(2, 3, 1, 1, 1, 0, 1, 1)
    assert counts["a"].f1 == 2 / (2 + 2 * 1 + 1 + 1)
    assert counts["b"] == TypeCounts(1, 0, 1, 0, 0, 1, 0, 0)
    double = counts["a"] + counts["a"]
    assert (double.num_true, double.f1) == (4, counts["a"].f1)


def test_a_perfect_prediction_of_types_is_one():
    points = np.random.default_rng(0).uniform(0, 99, (30, 2))
    names = np.random.default_rng(1).choice(["a", "b"], 30).tolist()
    counts = type_counts(match_points(points, points, 1.0), names, names)
    assert [value.f1 for value in counts.values()] == [1, 1]
    # With exchanged names, every pair has two types.
    wrong = ["ab"[name == "a"] for name in names]
    counts = type_counts(match_points(points, points, 1.0), names, wrong)
    assert [value.f1 for value in counts.values()] == [0, 0]


def test_nuclei_without_a_known_type_decide_nothing():
    points = np.array([[0.0, 0], [10, 0]])
    counts = type_counts(match_points(points, points, 1.0), [UNKNOWN, "a"], ["a", "a"])
    assert counts == {"a": TypeCounts(1, 2, 1, 1, 0, 0, 0, 0)}
    assert counts["a"].f1 == 1


@pytest.mark.parametrize(
    ("same", "true", "predicted"),
    [
        ([], {}, {}),
        ([("a", "A")], {"a": "a", "A": "a"}, {"A": "a", "a": "a"}),
        # One name for two of the other side, on either side.
        ([("e", "E"), ("e", "N")], {"e": "e"}, {"E": "e", "N": "e"}),
        ([("f", "C"), ("o", "C")], {"f": "f+o", "o": "f+o"}, {"C": "f+o"}),
        # Chains join: e-N, b-N, b-B.
        ([("e", "N"), ("b", "B"), ("b", "N")], {"e": "b+e", "b": "b+e"}, {"N": "b+e", "B": "b+e"}),
        ([("unlabelled", "")], {"unlabelled": UNKNOWN}, {}),
    ],
)
def test_names_in_common(same, true, predicted):
    found_true, found_predicted = common_types(same)
    assert true.items() <= found_true.items()
    assert predicted.items() <= found_predicted.items()
    for order in product(*[same] * len(same)) if len(same) == 2 else []:
        if set(order) == set(same):
            assert common_types(list(order)) == (found_true, found_predicted)
