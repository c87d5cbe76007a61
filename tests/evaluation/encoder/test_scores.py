import itertools

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import LeaveOneGroupOut, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from scellst_ray.evaluation.encoder.neighbours import purity
from scellst_ray.evaluation.encoder.scores import (
    Predictions,
    balanced_accuracy,
    bootstrap,
    difference,
    folds,
    interval,
    linear_probe,
    nearest_types,
    probe,
    scores,
)

TYPES = np.array(["a", "b", "c"])


def made(seed=0, num=180, num_slides=4, signal=1.5, shift=1.0, dim=6):
    """Return embeddings that depend on type and slide, the types and the slides."""
    rng = np.random.default_rng(seed)
    type_N = rng.choice(3, num, p=(0.6, 0.3, 0.1))
    slide_N = rng.integers(num_slides, size=num)
    x_ND = rng.normal(size=(num, dim))
    x_ND += signal * np.eye(3, dim)[type_N] + shift * rng.normal(size=(num_slides, dim))[slide_N]
    return x_ND.astype(np.float32), TYPES[type_N], np.char.add("s", slide_N.astype(str))


def test_the_probe_is_sklearns_on_slides_left_out():
    x_ND, types_N, groups_N = made()
    found = linear_probe(x_ND, types_N, groups_N, strengths=(0.1,))
    model = LogisticRegression(C=0.1, class_weight="balanced", max_iter=1000, tol=1e-3)
    expected = cross_val_predict(
        make_pipeline(StandardScaler(), model),
        x_ND,
        types_N,
        groups=groups_N,
        cv=LeaveOneGroupOut(),
    )
    np.testing.assert_array_equal(found.predicted_N, expected)
    assert found.strengths == (0.1,) * 4


def test_the_penalty_is_the_best_on_slides_held_out_of_those_of_training():
    x_ND, types_N, groups_N = made(seed=1, signal=0.7, shift=2.0, dim=30)
    strengths = (1e-3, 1e-1, 10.0)
    found = linear_probe(x_ND, types_N, groups_N, strengths=strengths)
    for (train, _), chosen in zip(folds(groups_N, 10, 0), found.strengths, strict=True):
        x, y, groups = x_ND[train], types_N[train], groups_N[train]
        reached = []
        for strength in strengths:
            named = np.empty_like(y)
            for group in np.unique(groups):
                out = groups == group
                model = LogisticRegression(C=strength, class_weight="balanced", max_iter=5000)
                model = make_pipeline(StandardScaler(), model).fit(x[~out], y[~out])
                named[out] = model.predict(x[out])
            reached.append(balanced_accuracy_score(y, named))
        # Solvers that stop at another point predict a few cells differently.
        assert reached[strengths.index(chosen)] >= max(reached) - 0.02


def test_types_are_found_and_slides_are_no_help():
    x_ND, types_N, groups_N = made(signal=12.0, shift=0.0)
    for found in (linear_probe(x_ND, types_N, groups_N), nearest_types(x_ND, types_N, groups_N)):
        assert scores(found)["balanced_accuracy"] > 0.99
    slides_ND = np.eye(4, dtype=np.float32)[np.char.lstrip(groups_N, "s").astype(int)]
    for found in (linear_probe, nearest_types):
        result = found(slides_ND, types_N, groups_N)
        assert abs(balanced_accuracy(types_N, result.predicted_N) - 1 / 3) < 0.12


def test_a_probe_never_saw_the_slide_it_is_judged_on():
    """In one slide embeddings give the type, in the other slide the opposite type."""
    types_N = np.tile(["a", "b"], 40)
    groups_N = np.repeat(["s", "t"], 40)
    sign = np.where(groups_N == "s", 1.0, -1.0) * np.where(types_N == "a", 1.0, -1.0)
    for found in (linear_probe, nearest_types):
        assert not (found(sign[:, None], types_N, groups_N).predicted_N == types_N).any()


def test_votes_of_neighbours_one_by_one():
    x_ND, types_N, groups_N = made(seed=3)
    found = nearest_types(x_ND, types_N, groups_N, k=7)
    for cell in range(0, len(x_ND), 5):
        others = np.flatnonzero(groups_N != groups_N[cell])
        mean, std = x_ND[others].mean(axis=0), x_ND[others].std(axis=0)
        query, keys = (x_ND[cell] - mean) / std, (x_ND[others] - mean) / std
        cosine = keys @ query / np.linalg.norm(keys, axis=1) / np.linalg.norm(query)
        votes = dict.fromkeys("abc", 0.0)
        for near in np.argsort(-cosine)[:7]:
            kind = types_N[others][near]
            votes[kind] += 1 / (types_N[others] == kind).sum()
        assert found.predicted_N[cell] == max(votes, key=votes.get)


def test_folds_leave_whole_slides_out():
    for num_slides, num_folds in ((3, 3), (10, 10), (23, 10)):
        groups_N = np.random.default_rng(0).permutation(np.arange(num_slides).repeat(5)).astype(str)
        parts = list(folds(groups_N, 10, seed=4))
        assert len(parts) == num_folds
        for train, test in parts:
            assert not set(groups_N[train]) & set(groups_N[test])
            assert len(train) + len(test) == len(groups_N)
        held_out = np.sort(np.concatenate([test for _, test in parts]))
        np.testing.assert_array_equal(held_out, np.arange(len(groups_N)))


@pytest.mark.parametrize(
    ("max_folds", "seed", "held_out"),
    [
        (3, 0, [[1, 4, 6], [3, 8], [0, 2, 5, 7]]),
        (10, 1, [[2, 5], [3], [0, 7], [8], [1, 4], [6]]),
    ],
)
def test_folds_of_a_seed_are_those_of_earlier_releases(max_folds, seed, held_out):
    parts = list(folds(np.array(list("cabdabecf")), max_folds, seed))
    assert [test.tolist() for _, test in parts] == held_out
    assert [sorted({*range(9)} - {*test}) for test in held_out] == [t.tolist() for t, _ in parts]


def test_two_slides_and_a_fold_of_one_type():
    x_ND, types_N, groups_N = made(num_slides=2, signal=8.0, shift=0.1)
    assert scores(linear_probe(x_ND, types_N, groups_N))["balanced_accuracy"] > 0.9
    # The probe for the cells of s0 sees only type b.
    types_N = np.where(groups_N == "s0", types_N, "b")
    for found in (linear_probe, nearest_types):
        predicted_N = found(x_ND, types_N, groups_N).predicted_N
        assert set(predicted_N[groups_N == "s0"]) == {"b"}


def test_balanced_accuracy_is_sklearns():
    rng = np.random.default_rng(0)
    for _ in range(5):
        truth, named = rng.choice(TYPES, (2, 50), p=(0.7, 0.2, 0.1))
        assert np.isclose(balanced_accuracy(truth, named), balanced_accuracy_score(truth, named))


def answers(share_right, num=400, num_slides=4, seed=0):
    """Return predictions of two types; each slide has its own probability to be correct."""
    rng = np.random.default_rng(seed)
    slide_N = np.arange(num) % num_slides
    types_N = np.where(np.arange(num) // num_slides % 2, "a", "b")
    right = rng.random(num) < np.broadcast_to(share_right, num_slides)[slide_N]
    other = np.where(types_N == "a", "b", "a")
    return Predictions(types_N, np.where(right, types_N, other), slide_N.astype(str))


def test_intervals_over_cells_have_the_width_of_a_binomial():
    found = answers(0.7)
    values_B = bootstrap([found], "cells", num_samples=2000)[0]
    share = [(found.predicted_N == found.types_N)[found.types_N == t].mean() for t in "ab"]
    expected = np.sqrt(sum(p * (1 - p) / 200 for p in share)) / 2
    assert abs(values_B.std() / expected - 1) < 0.1
    assert abs(values_B.mean() - np.mean(share)) < 0.003
    low, high = interval(values_B)
    assert abs((high - low) / (2 * 1.96 * expected) - 1) < 0.12


def test_intervals_over_slides_have_the_width_of_their_differences():
    found = answers((0.5, 0.6, 0.8, 0.9))
    right = found.predicted_N == found.types_N
    means = [
        balanced_accuracy(
            found.types_N[found.groups_N == g], found.predicted_N[found.groups_N == g]
        )
        for g in "0123"
    ]
    # All slides have equally many cells of each type, so a sample is the mean of four slides.
    every = [np.mean(draw) for draw in itertools.product(means, repeat=4)]
    values_B = bootstrap([found], "slides", num_samples=4000)[0]
    assert abs(values_B.std() - np.std(every)) < 0.004
    assert abs(values_B.mean() - right.mean()) < 0.005


def test_differences_are_judged_on_the_same_samples():
    ours, theirs = answers(0.8, seed=1), answers(0.6, seed=2)
    found = difference(ours, theirs)
    assert np.isclose(
        found["balanced_accuracy"],
        balanced_accuracy(ours.types_N, ours.predicted_N)
        - balanced_accuracy(theirs.types_N, theirs.predicted_N),
    )
    for over in ("slides", "cells"):
        low, high = found[f"interval_{over}"]
        assert 0 < low < found["balanced_accuracy"] < high
        assert difference(ours, ours)[f"interval_{over}"] == [0.0, 0.0]


def test_scores_say_what_they_are_made_of():
    found = Predictions(
        np.array(["a", "a", "b", "b"]),
        np.array(["a", "b", "b", "b"]),
        np.array(["s", "t", "t", "t"]),
    )
    result = scores(found)
    assert result["balanced_accuracy"] == 0.75
    assert result["recall"] == {"a": 0.5, "b": 1.0}
    assert result["slides"] == {"s": 1.0, "t": 0.5}
    assert result == scores(found)


def test_probe_returns_scores_and_penalties():
    found = probe(*made(num=80), seed=2)
    assert len(found["strengths"]) == 4
    low, high = found["interval_cells"]
    assert low < found["balanced_accuracy"] < high


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda x, t, g: (x, np.full_like(t, "a"), g), "needs two types, and two slides"),
        (lambda x, t, g: (x, t, np.full_like(g, "s")), "needs two types, and two slides"),
        (lambda x, t, g: (x[:-1], t, g), "expected one row, one type and one slide per cell"),
        (lambda x, t, g: (x * np.nan, t, g), "NaN or infinity"),
    ],
)
@pytest.mark.parametrize("function", [linear_probe, nearest_types, purity])
def test_what_cannot_be_judged(function, change, reason):
    with pytest.raises(ValueError, match=reason):
        function(*change(*made(num=30)))
