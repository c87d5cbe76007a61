"""Matching with a known truth against a slow loop and closed forms."""

import numpy as np
import pytest
import shapely

from scellst_ray.evaluation.synthetic_truth import balanced_accuracy, cell_correlation, match_nuclei
from scellst_ray.spots.panel import log_normalise


def star(rng, centre, radius):
    """Return a polygon whose corners lie around `centre`, some nearer than others."""
    angles = np.sort(rng.uniform(0, 2 * np.pi, 9))
    corners = radius * rng.uniform(0.7, 1.3, 9)[:, None]
    return shapely.convex_hull(
        shapely.MultiPoint(centre + corners * np.column_stack([np.cos(angles), np.sin(angles)]))
    )


def iou(a, b):
    return a.intersection(b).area / a.union(b).area


def slow_match(found, true):
    """Return pairs above an IoU of 0.5, best first, no nucleus twice."""
    scored = [(iou(f, t), i, j) for i, f in enumerate(found) for j, t in enumerate(true)]
    pairs = []
    for score, i, j in sorted(scored, key=lambda item: (-item[0], item[1], item[2])):
        if score > 0.5 and all(i != a and j != b for a, b in pairs):
            pairs.append((i, j))
    return sorted(pairs)


def wkb(polygons):
    return [polygon.wkb for polygon in polygons]


@pytest.mark.parametrize("spread", [0.0, 4.0])
@pytest.mark.parametrize("seed", range(4))
def test_equals_a_slow_loop(seed, spread):
    # With a spread of 0, found nuclei overlap each other and compete for the same true one.
    rng = np.random.default_rng(seed)
    centres = spread * 10 * np.stack(np.meshgrid(range(5), range(5)), -1).reshape(-1, 2)
    true = [star(rng, centre + rng.uniform(0, 12, 2), 10) for centre in centres]
    found = [shapely.affinity.translate(t, *rng.normal(0, 3, 2)) for t in true[3:]]
    found += [star(rng, rng.uniform(0, 200, 2), 10) for _ in range(5)] + [true[0], true[0]]
    matching = match_nuclei(wkb(found), wkb(true))
    expected = slow_match(found, true)
    assert list(zip(matching.found.tolist(), matching.true.tolist(), strict=True)) == expected
    assert len(expected) > 3
    assert len(set(matching.found)) == len(set(matching.true)) == len(expected)
    assert matching.precision == len(expected) / len(found)
    assert matching.recall == len(expected) / len(true)


@pytest.mark.parametrize(("shift", "num_matched"), [(3.32, 1), (3.35, 0)])
def test_shifted_square_at_the_limit(shift, num_matched):
    # Squares of side 10, shifted by d: IoU (10 - d) / (10 + d), one half at d = 10 / 3.
    matching = match_nuclei(
        wkb([shapely.box(shift, 0, 10 + shift, 10)]), wkb([shapely.box(0, 0, 10, 10)])
    )
    assert len(matching.found) == num_matched
    assert matching.precision == matching.recall == num_matched


def test_half_exactly_is_no_match():
    matching = match_nuclei(wkb([shapely.box(0, 0, 2, 1)]), wkb([shapely.box(0, 0, 1, 1)]))
    assert len(matching.found) == 0


def test_nothing_found():
    matching = match_nuclei([], wkb([shapely.box(0, 0, 1, 1)]))
    assert (matching.precision, matching.recall) == (0.0, 0.0)
    assert matching.found.dtype == np.int64


def test_correlation_of_the_truth_is_one_and_of_a_shuffled_truth_about_zero():
    rng = np.random.default_rng(0)
    expected_NG = rng.gamma(2.0, 3.0, (4000, 7))
    panel = [5, 0, 3]
    predicted_NP = 0.3 * log_normalise(expected_NG)[:, panel] + 2
    np.testing.assert_allclose(cell_correlation(predicted_NP, expected_NG, panel), 1.0, rtol=1e-5)
    shuffled = cell_correlation(predicted_NP, expected_NG, panel, seed=1)
    # The standard deviation of r by chance is 1 / sqrt(4000) = 0.016.
    assert np.abs(shuffled).max() < 0.06
    assert (shuffled != 0).all()
    again = cell_correlation(predicted_NP, expected_NG, panel, seed=1)
    np.testing.assert_array_equal(shuffled, again)
    by_hand = np.log1p(expected_NG / expected_NG.sum(axis=1, keepdims=True) * 1e4)
    noisy_NP = predicted_NP + rng.normal(size=predicted_NP.shape)
    for column, gene in enumerate(panel):
        r = np.corrcoef(noisy_NP[:, column], by_hand[:, gene])[0, 1]
        assert cell_correlation(noisy_NP, expected_NG, panel)[column] == pytest.approx(r, rel=1e-4)


def test_balanced_accuracy_counts_every_type_alike():
    true = ["a"] * 8 + ["b"] * 2
    assert balanced_accuracy(["a"] * 10, true) == 0.5
    assert balanced_accuracy([*["a"] * 6, "b", None, "b", "b"], true) == (6 / 8 + 1) / 2
    assert balanced_accuracy(true, true) == 1
