import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scellst_ray.runs.crop_files import ROW_GROUP
from scellst_ray.runs.crop_store import CropFile, CropStore, open_store
from scellst_ray.training import crop_order
from scellst_ray.training.crop_order import CropOrder, prefetch
from tests.support.crop_runs import numbers_of, write_crop_run

COUNTS = {"s0": 900, "s1": 130, "s2": 3, "s3": 777, "s4": 1200}
BATCH, LANES = 64, 16


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return open_store([write_crop_run(tmp_path_factory.mktemp("crops"), COUNTS)])


@pytest.fixture(scope="module")
def order(store):
    return CropOrder(store, BATCH, seed=3, num_lanes=LANES, window=2)


def batches_of(order, epoch, first_step=0, lanes=None):
    lanes = range(order.num_lanes) if lanes is None else lanes
    return [numbers_of(b) for b in order.batches(epoch, first_step, lanes)]


@pytest.fixture(scope="module")
def epoch0(order):
    return batches_of(order, 0)


def test_an_epoch_has_every_crop_once_but_for_less_than_a_batch(store, order, epoch0):
    assert order.steps_per_epoch == len(epoch0) == store.num_crops // BATCH
    assert {len(batch) for batch in epoch0} == {BATCH}
    seen = np.concatenate(epoch0)
    assert len(np.unique(seen)) == len(seen) > store.num_crops - BATCH - LANES


@pytest.mark.parametrize("num_workers", [2, 3, 4, 7])
def test_workers_together_see_what_one_does(order, epoch0, num_workers):
    shares = [range(rank, LANES, num_workers) for rank in range(num_workers)]
    parts = [batches_of(order, 0, lanes=lanes) for lanes in shares]
    for step, expected in enumerate(epoch0):
        joined = np.empty((LANES, BATCH // LANES), np.int64)
        for lanes, part in zip(shares, parts, strict=True):
            joined[list(lanes)] = part[step].reshape(len(lanes), -1)
        assert joined.ravel().tolist() == expected.tolist()


@pytest.mark.parametrize("first_step", [1, 2, 17, 40, 46, 47, 50])
def test_resuming_at_a_step_goes_on_as_if_nothing_had_happened(order, epoch0, first_step):
    lanes = [1, 5, 14]
    whole = [batch.reshape(LANES, -1)[lanes].ravel().tolist() for batch in epoch0]
    found = [batch.tolist() for batch in batches_of(order, 0, first_step, lanes)]
    assert found == whole[first_step:]


def test_resuming_reads_only_what_is_still_needed(store, monkeypatch):
    order, read = CropOrder(store, BATCH, seed=3, num_lanes=2, window=2), []
    original = crop_order.CropFiles.read

    def noted(self, file, groups, columns):
        read.append((file.slide_id, *groups))
        return original(self, file, groups, columns)

    monkeypatch.setattr(crop_order.CropFiles, "read", noted)
    batches_of(order, 0, lanes=[1])
    everything = len(read)
    read.clear()
    batches_of(order, 0, order.steps_per_epoch - 1, lanes=[1])
    assert len(read) <= order.window < everything


def test_epochs_and_seeds_differ_and_repeat(store, order, epoch0):
    again = CropOrder(store, BATCH, seed=3, num_lanes=LANES, window=2, threads=1)
    assert np.array_equal(np.concatenate(batches_of(again, 0)), np.concatenate(epoch0))
    others = [batches_of(order, 1), batches_of(CropOrder(store, BATCH, 4, LANES, 2), 0)]
    for other in others:
        # By chance, 64 * 64 / 3010 crops of a batch stay in place.
        same = [len(np.intersect1d(a, b)) for a, b in zip(other, epoch0, strict=True)]
        assert np.mean(same) < 4


def test_batches_mix_slides_and_neighbours(epoch0):
    limits = np.cumsum(list(COUNTS.values()))
    whole = np.array([np.bincount(np.searchsorted(limits, b, "right"), None, 5) for b in epoch0])
    expected = np.array(list(COUNTS.values())) / limits[-1]
    spread = (whole / BATCH).std(axis=0)
    # Independent draws would spread by sqrt(p (1 - p) / 64); whole groups of 128 do not fit that.
    assert (spread < 3.5 * np.sqrt(expected * (1 - expected) / BATCH) + 1e-9).all()
    # Crops next to each other in a file do not stay together.
    steps = np.abs(np.diff(np.concatenate(epoch0)))
    assert (steps == 1).mean() < 0.02


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=12),
    st.integers(1, 9),
    st.integers(1, 5),
    st.integers(1, 5),
    st.integers(1, 7),
    st.integers(0, 3),
)
def test_lanes_partition_any_store(counts, num_lanes, lane_crops, window, row_group, seed):
    """A store with fewer row groups than lanes is no special case."""
    files = tuple(CropFile(f"s{i}", "", num, row_group) for i, num in enumerate(counts))
    total = sum(counts)
    store = CropStore((), total, (), (), 18.0, 72, "", {}, {}, files)
    if total // num_lanes < lane_crops:
        with pytest.raises(ValueError, match="give a smaller batch"):
            CropOrder(store, num_lanes * lane_crops, seed, num_lanes, window)
        return
    order = CropOrder(store, num_lanes * lane_crops, seed, num_lanes, window)
    permuted = crop_order.permutation(len(order._groups), seed, 0)
    seen = []
    for lane in range(num_lanes):
        blocks = order._blocks(permuted, lane)
        assert all(0 < len(block) <= window for block in blocks)
        rows = [
            (piece.number, piece.file.slide_id, piece.group, row)
            for block in blocks
            for piece in block
            for row in range(piece.start, piece.stop)
        ]
        assert len(rows) == total // num_lanes
        seen += rows
    rows_of = {(file.slide_id, group): [] for file, group in order._groups}
    for _, slide_id, group, row in seen:
        rows_of[slide_id, group].append(row)
    left = {f.slide_id: f.num_crops for f in files}
    for (slide_id, _), rows in rows_of.items():
        size = min(row_group, left[slide_id])
        left[slide_id] -= size
        assert len(set(rows)) == len(rows)
        assert set(rows) <= set(range(size))


def test_a_store_of_one_small_file_serves_many_lanes(tmp_path):
    assert ROW_GROUP > 70
    store = open_store([write_crop_run(tmp_path, {"s": 70})])
    order = CropOrder(store, 64, seed=0)
    (first,), (second,) = batches_of(order, 0), batches_of(order, 1)
    assert len(np.unique(first)) == len(np.unique(second)) == 64
    assert (first == second).mean() < 0.2
    seen = {number for epoch in range(9) for number in batches_of(order, epoch)[0]}
    assert len(seen) == 70


def test_what_does_not_go_together_is_refused(store):
    with pytest.raises(ValueError, match="batch is 100, num_lanes 64"):
        CropOrder(store, 100, 0)
    with pytest.raises(ValueError, match=r"batch is 4096, and .* has 3010 crops"):
        CropOrder(store, 4096, 0)


def alive():
    return {t.name for t in threading.enumerate() if t.name.startswith(("crops", "prefetch"))}


def test_reading_ahead_changes_nothing_and_leaves_no_threads(order, epoch0):
    with prefetch(order.batches(0, 0, range(LANES)), depth=3) as batches:
        found = [numbers_of(batch) for batch in batches]
        assert list(batches) == []
    assert batches.waited_s > 0
    assert np.array_equal(np.concatenate(found), np.concatenate(epoch0))
    with prefetch(order.batches(0, 0, [0]), depth=3) as batches:
        next(batches)
        assert alive()
    batches.close()
    assert alive() == set()


def test_an_error_while_reading_ahead_reaches_the_consumer_in_its_place():
    def items():
        yield 1
        yield 2
        message = "rotten"
        raise ValueError(message)

    with prefetch(items(), depth=5) as coming:
        assert [next(coming), next(coming)] == [1, 2]
        with pytest.raises(ValueError, match="rotten"):
            next(coming)
        assert list(coming) == []
    assert alive() == set()


def test_waiting_is_counted_and_no_more_is_made_than_asked_for():
    made = []

    def items():
        for number in range(100):
            made.append(number)
            time.sleep(0.01)
            yield number

    with prefetch(items(), depth=2) as coming:
        next(coming)
    assert coming.waited_s >= 0.009
    assert len(made) <= 4
