"""Ray Train workers reach the head that one plain process reaches, also when one is killed."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import ray.train
import torch

from scellst_ray import storage
from scellst_ray.core import schemas
from scellst_ray.models.mil.bags import split_spots
from scellst_ray.models.mil.fit import FitConfig, fit_head, new_head
from scellst_ray.stages.networks import vectors
from scellst_ray.training.bag_files import load_bags, load_split
from scellst_ray.training.fit_mil import StateFile, Workers, fit

DIM, GENES = 16, 5
# 32 training spots in batches of 9: the last has 5, which two workers cannot share evenly.
CONFIG = FitConfig(lr=2e-3, batch_spots=9, max_epochs=6, patience=2, seed=3)


@pytest.fixture(scope="module")
def bags(tmp_path_factory):
    """Return the addresses of two BAGS files of 24 and 16 spots, and what is in them."""
    folder, rng = tmp_path_factory.mktemp("bags"), np.random.default_rng(0)
    uris, slide_ids, sizes, parts, targets, counts = [], [], [], [], [], []
    for slide_id, num_spots in (("s1", 24), ("s0", 16)):
        num_cells = rng.integers(1, 7, num_spots)
        offsets = np.concatenate([[0], np.cumsum(num_cells)])
        x_LD = rng.normal(size=(offsets[-1], DIM)).astype(np.float16)
        mean_SD = np.add.reduceat(x_LD.astype(float), offsets[:-1]) / num_cells[:, None]
        y_SG = np.exp(mean_SD[:, :GENES]).astype(np.float32)
        factor_S = rng.uniform(0.5, 2, num_spots).astype(np.float32)
        count_SG = rng.poisson(3 * y_SG * factor_S[:, None]).astype(np.float32)
        columns = {
            "slide_id": pa.repeat(slide_id, num_spots),
            "spot_id": [f"spot{i}" for i in range(num_spots)],
            "x0": np.zeros(num_spots),
            "y0": np.zeros(num_spots),
            "cell_id": pa.array([[7] * n for n in num_cells], pa.list_(pa.int64())),
            "embedding": pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), vectors(x_LD)),
            "target": pa.array(list(y_SG), pa.list_(pa.float32())),
            "counts": pa.array(list(count_SG), pa.list_(pa.float32())),
            "size_factor": pa.array(factor_S),
        }
        uris.append(str(folder / f"{slide_id}.parquet"))
        schema = schemas.bags_schema(DIM, with_counts=True)
        table = schemas.conform(pa.table(columns), schema, "BAGS")
        storage.publish_table(uris[-1], table)
        slide_ids += [slide_id] * num_spots
        sizes.append(num_cells)
        parts.append(x_LD)
        targets.append(y_SG)
        counts.append(np.column_stack([factor_S, count_SG]))
    return uris, slide_ids, *(np.concatenate(each) for each in (sizes, parts, targets, counts))


def plain_fit(bags, config):
    """Fit in this process; return the head, its last layer as it began, and what happened."""
    whole, slide_ids = load_bags(bags[0], counts=config.formula().counts)
    train, val = (
        whole.take(spots) for spots in split_spots(slide_ids, config.val_share, config.seed)
    )
    head = new_head(train, config.seed, config.formula())
    start = head.last.weight.detach().clone()
    return head, start, fit_head(head, train, val, config)


def assert_same_fit(found, expected):
    """Compare two pairs of a head and what happened."""
    (head, result), (plain_head, plain) = found, expected
    assert not head.training
    assert result.best_epoch == plain.best_epoch > 0
    np.testing.assert_allclose(result.history, plain.history, rtol=1e-5)
    assert result.best_loss == pytest.approx(plain.best_loss, rel=1e-5)
    tensors, wanted = head.state_dict(), plain_head.state_dict()
    assert list(tensors) == list(wanted)
    for name, value in tensors.items():
        # AdamW enlarges what rounding leaves where a gradient is near zero.
        torch.testing.assert_close(value, wanted[name], rtol=1e-5, atol=1e-4)


def test_load_bags_gives_back_what_was_written(bags):
    uris, slide_ids, sizes, x_LD, y_SG, counts = bags
    found, found_ids = load_bags(uris)
    assert found_ids == slide_ids
    assert found.embeddings_LD.dtype == torch.float16
    np.testing.assert_array_equal(found.offsets.diff(), sizes)
    np.testing.assert_array_equal(found.embeddings_LD, x_LD)
    np.testing.assert_array_equal(found.targets_SG, y_SG)
    counted, _ = load_bags(uris, counts=True)
    np.testing.assert_array_equal(counted.size_factors_S, counts[:, 0].astype(np.float32))
    np.testing.assert_array_equal(counted.targets_SG, counts[:, 1:])
    # Of the second file alone, offsets begin at 0 again.
    second, _ = load_bags(uris[1:])
    np.testing.assert_array_equal(second.offsets, np.concatenate([[0], np.cumsum(sizes[24:])]))
    np.testing.assert_array_equal(second.embeddings_LD, x_LD[sizes[:24].sum() :])


def test_bags_of_an_earlier_release_have_no_counts(bags, tmp_path):
    table = storage.read_table(bags[0][0]).drop_columns(["counts"])
    uri = str(tmp_path / "old.parquet")
    storage.publish_table(uri, table)
    assert len(load_bags([uri])[0]) == 24
    with pytest.raises(ValueError, match=r"no counts, since an earlier release.*or use loss mse"):
        load_bags([bags[0][1], uri], counts=True)


@pytest.mark.parametrize("loss", ["mse", "nb"])
@pytest.mark.parametrize("memory_bytes", [0, 1e9])
def test_bags_are_split_file_by_file_in_memory_or_not(
    bags, tmp_path, monkeypatch, loss, memory_bytes
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    config = replace(CONFIG, loss=loss, seed=3)
    whole, slide_ids = load_bags(bags[0], counts=loss == "nb")
    wanted = [whole.take(part) for part in split_spots(slide_ids, config.val_share, config.seed)]
    found = load_split(bags[0], config, memory_bytes)
    maps = Path("/proc/self/maps").read_text() if Path("/proc/self/maps").exists() else ""
    assert ("scellst_ray_bags_" in maps) == (memory_bytes == 0 and maps != "")
    assert list(tmp_path.iterdir()) == []
    for mine, theirs in zip(found, wanted, strict=True):
        assert torch.equal(mine.embeddings_LD, theirs.embeddings_LD)
        assert torch.equal(mine.offsets, theirs.offsets)
        assert torch.equal(mine.targets_SG, theirs.targets_SG)
        if loss == "nb":
            assert torch.equal(mine.size_factors_S, theirs.size_factors_S)
    del mine, found


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize(
    ("num_workers", "changes"),
    [(2, {}), (1, {"loss": "nb", "predictor": "published", "ensemble": 2})],
)
def test_workers_one_of_them_killed_reach_the_head_of_one_process(
    bags, tmp_path, num_workers, changes
):
    config = replace(CONFIG, **changes)
    epochs, stored = tmp_path / "epochs", tmp_path / "storage"

    def kill_once(progress):
        """Note the epochs of the first worker, which is killed after its third."""
        if ray.train.get_context().get_world_rank() == 0:
            first = not (epochs.exists() and "killed" in epochs.read_text())
            with epochs.open("a") as file:
                file.write(f"{len(progress.history)} ")
                if first and len(progress.history) == 3:
                    file.write("killed ")
            if first and len(progress.history) == 3:
                os.kill(os.getpid(), signal.SIGKILL)

    workers = Workers(num_workers, 1, use_gpu=False, max_failures=1, memory_gb=0.0)
    head, result = fit(bags[0], config, workers, str(stored), kill_once)
    plain_head, start, plain = plain_fit(bags, config)
    assert head.formula == config.formula()
    assert_same_fit((head, result), (plain_head, plain))
    # The fit has moved the weights by far more than that.
    assert (head.last.weight - start).abs().max() > 1e-3
    before, after = epochs.read_text().split("killed")
    assert before.split() == ["1", "2", "3"]
    again = [int(word) for word in after.split()]
    assert 1 < again[0] <= 4  # not from the beginning
    assert again == list(range(again[0], len(plain.history) + 1))
    # Nothing is left for a later fit to take up.
    assert list(stored.iterdir()) == []


def test_the_state_is_stored_now_and_then(bags, tmp_path):
    state_file = StateFile(str(tmp_path / "state.pt"))
    assert state_file.load() is None
    whole, slide_ids = load_bags(bags[0])
    train, val = (whole.take(spots) for spots in split_spots(slide_ids, 0.2, 0))
    at, states = [], []

    def each_epoch(progress):
        state_file.store_if_due(progress)
        state_file.seconds = 0.0 if len(progress.history) < 3 else 1e6
        at.append(len(state_file.load()["history"]))
        states.append(state_file.load())

    config = replace(CONFIG, max_epochs=5, patience=5)
    head = new_head(train, 0)
    expected = fit_head(head, train, val, config, each_epoch=each_epoch)
    assert at == [1, 2, 3, 3, 3]
    for state in states[:3]:
        again = new_head(train, 1)
        assert fit_head(again, train, val, config, state=state) == expected
        for name, value in again.state_dict().items():
            assert torch.equal(value, head.state_dict()[name])
    state_file.remove()
    state_file.remove()
    assert state_file.load() is None
