"""Bags: means, splits and batches against slow loops."""

import numpy as np
import pytest
import torch

from scellst_ray.models.mil.bags import BagSet, bag_mean, epoch_batches, split_spots
from tests.support.mil_bags import make_bags, single_cells


def loop_means(y_NG, offsets):
    rows = []
    for start, stop in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        total = torch.zeros(y_NG.shape[1], dtype=y_NG.dtype)
        for instance in range(start, stop):
            total = total + y_NG[instance]
        rows.append(total / (stop - start))
    return torch.stack(rows)


def test_bag_mean_and_its_gradient_equal_a_slow_loop():
    offsets = torch.tensor([0, 1, 4, 6, 13])
    y_NG = torch.randn(13, 5, dtype=torch.float64, requires_grad=True)
    twin = y_NG.detach().clone().requires_grad_()
    weight = torch.randn(4, 5, dtype=torch.float64)
    found, expected = bag_mean(y_NG, offsets), loop_means(twin, offsets)
    torch.testing.assert_close(found, expected)
    (found * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(y_NG.grad, twin.grad)


def test_bag_mean_does_not_depend_on_the_order_of_bags_or_instances():
    y_NG = torch.randn(9, 2)
    plain = bag_mean(y_NG, torch.tensor([0, 2, 9]))
    moved = bag_mean(torch.cat([y_NG[2:].flip(0), y_NG[:2].flip(0)]), torch.tensor([0, 7, 9]))
    torch.testing.assert_close(moved.flip(0), plain)


@pytest.mark.parametrize(
    ("offsets", "words"),
    [
        ([0, 2, 2, 4], r"bag 1 of 3 holds 0 instances"),
        ([0, 3, 2, 4], r"bag 1 of 3 holds -1"),
        ([0, 2, 3], r"go from \[0\] to \[3\], expected one-dimensional offsets from 0 to .* 4"),
        ([1, 4], r"go from \[1\]"),
    ],
)
def test_empty_bags_and_misfits_are_refused(offsets, words):
    with pytest.raises(ValueError, match=words):
        bag_mean(torch.ones(4, 2), torch.tensor(offsets))


def test_no_bags_give_no_rows_with_a_gradient():
    y_NG = torch.zeros(0, 3, requires_grad=True)
    means = bag_mean(y_NG * 2, torch.tensor([0]))
    assert means.shape == (0, 3)
    means.sum().backward()
    assert y_NG.grad is not None


def test_taking_bags_equals_a_slow_loop():
    bags = make_bags()
    order = np.array([5, 0, 5, 22])
    part = bags.take(order)
    spans = list(zip(bags.offsets[:-1].tolist(), bags.offsets[1:].tolist(), strict=True))
    expected = torch.cat([bags.embeddings_LD[slice(*spans[spot])] for spot in order])
    torch.testing.assert_close(part.embeddings_LD, expected)
    assert part.offsets.diff().tolist() == [spans[s][1] - spans[s][0] for s in order]
    torch.testing.assert_close(part.targets_SG, bags.targets_SG[order])
    assert len(bags.take(order[:0])) == 0


@pytest.mark.parametrize(
    ("offsets", "targets", "words"),
    [
        ([0, 3, 3], torch.ones(2, 1), "bag 1 of 2 holds 0 instances"),
        ([0, 2], torch.ones(1, 1), "expected one-dimensional"),
        ([0, 1, 3], torch.ones(3, 1), "one row per bag"),
        ([0, 1, 3], torch.full((2, 1), torch.nan), "NaN"),
    ],
)
def test_unsound_bags_are_refused_at_construction(offsets, targets, words):
    with pytest.raises(ValueError, match=words):
        BagSet(torch.ones(3, 2), torch.tensor(offsets), targets)


@pytest.mark.parametrize(
    ("targets", "factors", "words"),
    [
        ([[1.0], [2.5]], [1.0, 1.0], "whole numbers from 0, got 2.5 in bag 1, gene 0"),
        ([[-1.0], [2.0]], [1.0, 1.0], "got -1.0 in bag 0"),
        ([[1.0], [2.0]], [1.0, 0.0], "one positive number for each of 2 bags"),
        ([[1.0], [2.0]], [1.0], r"size factors have shape \(1,\)"),
    ],
)
def test_counts_that_are_none_are_refused(targets, factors, words):
    with pytest.raises(ValueError, match=words):
        single_cells(torch.ones(2, 3), torch.tensor(targets), torch.tensor(factors))


def test_batches_hold_every_spot_once_and_are_fixed_by_seed_and_epoch():
    batches = epoch_batches(300, 128, seed=1, epoch=4)
    assert [len(batch) for batch in batches] == [128, 128, 44]
    assert sorted(np.concatenate(batches)) == list(range(300))
    again = epoch_batches(300, 128, seed=1, epoch=4)
    assert all((a == b).all() for a, b in zip(batches, again, strict=True))
    for seed, epoch in [(1, 5), (4, 1), (2, 4)]:
        assert (epoch_batches(300, 128, seed, epoch)[0] != batches[0]).any()


def test_split_is_per_slide_and_does_not_depend_on_other_slides():
    slides = ["A"] * 50 + ["B"] * 20 + ["C"] * 2 + ["D"]
    train, val = split_spots(slides, 0.2, seed=0)
    assert sorted([*train, *val]) == list(range(73))
    assert [sum(slides[i] == name for i in val) for name in "ABCD"] == [10, 4, 1, 0]
    _, only_b = split_spots(["B"] * 20, 0.2, seed=0)
    assert [i - 50 for i in val if slides[i] == "B"] == only_b.tolist()
    assert split_spots(["B"] * 20, 0.2, seed=1)[1].tolist() != only_b.tolist()
    with pytest.raises(ValueError, match="too few"):
        split_spots(["A", "B"], 0.2, seed=0)
