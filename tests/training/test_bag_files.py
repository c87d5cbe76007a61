"""BAGS files are read back, and split into training and validation bags."""

from pathlib import Path

import numpy as np
import pytest
import torch

from scellst_ray import storage
from scellst_ray.models.mil.bags import split_spots
from scellst_ray.models.mil.fit import FitConfig
from scellst_ray.training.bag_files import load_bags, load_split
from tests.support.bag_files import write_bag_files


@pytest.fixture(scope="module")
def bags(tmp_path_factory):
    """Return the addresses of two BAGS files of 24 and 16 spots, and their content."""
    return write_bag_files(tmp_path_factory.mktemp("bags"))


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
    # Offsets of the second file alone begin at 0 again.
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
    config = FitConfig(loss=loss, seed=3)
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
