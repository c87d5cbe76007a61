"""Ray Train workers reach the head that one plain process reaches."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from scellst_ray import schemas, storage
from scellst_ray.models.bags import split_spots
from scellst_ray.models.mil_fit import FitConfig, fit_head, new_head
from scellst_ray.pipelines.networks import vectors
from scellst_ray.session import ray_session
from scellst_ray.training.fit_mil import Workers, fit, load_bags

DIM, GENES = 16, 5
# 32 training spots in batches of 9: the last has 5, which two workers cannot share evenly.
CONFIG = FitConfig(lr=2e-3, batch_spots=9, max_epochs=6, patience=2, seed=3)


@pytest.fixture(scope="module")
def local_ray():
    with ray_session(num_cpus=2) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def bags(tmp_path_factory):
    """Return the addresses of two BAGS files of 24 and 16 spots, and what is in them."""
    folder, rng = tmp_path_factory.mktemp("bags"), np.random.default_rng(0)
    uris, slide_ids, sizes, parts, targets = [], [], [], [], []
    for slide_id, num_spots in (("s1", 24), ("s0", 16)):
        num_cells = rng.integers(1, 7, num_spots)
        offsets = np.concatenate([[0], np.cumsum(num_cells)])
        x_LD = rng.normal(size=(offsets[-1], DIM)).astype(np.float16)
        mean_SD = np.add.reduceat(x_LD.astype(float), offsets[:-1]) / num_cells[:, None]
        y_SG = np.exp(mean_SD[:, :GENES]).astype(np.float32)
        columns = {
            "slide_id": pa.repeat(slide_id, num_spots),
            "spot_id": [f"spot{i}" for i in range(num_spots)],
            "x0": np.zeros(num_spots),
            "y0": np.zeros(num_spots),
            "cell_id": pa.array([[7] * n for n in num_cells], pa.list_(pa.int64())),
            "embedding": pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), vectors(x_LD)),
            "target": pa.array(list(y_SG), pa.list_(pa.float32())),
        }
        uris.append(str(folder / f"{slide_id}.parquet"))
        table = schemas.conform(pa.table(columns), schemas.bags_schema(DIM), "BAGS")
        storage.publish_table(uris[-1], table)
        slide_ids += [slide_id] * num_spots
        sizes.append(num_cells)
        parts.append(x_LD)
        targets.append(y_SG)
    return uris, slide_ids, *(np.concatenate(each) for each in (sizes, parts, targets))


def test_load_bags_gives_back_what_was_written(bags):
    uris, slide_ids, sizes, x_LD, y_SG = bags
    found, found_ids = load_bags(uris)
    assert found_ids == slide_ids
    assert found.embeddings_LD.dtype == torch.float16
    np.testing.assert_array_equal(found.offsets.diff(), sizes)
    np.testing.assert_array_equal(found.embeddings_LD, x_LD)
    np.testing.assert_array_equal(found.targets_SG, y_SG)
    # Of the second file alone, offsets begin at 0 again.
    second, _ = load_bags(uris[1:])
    np.testing.assert_array_equal(second.offsets, np.concatenate([[0], np.cumsum(sizes[24:])]))
    np.testing.assert_array_equal(second.embeddings_LD, x_LD[sizes[:24].sum() :])


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("num_workers", [2, 1])
def test_workers_reach_the_head_of_one_process(bags, tmp_path, num_workers):
    whole, slide_ids = load_bags(bags[0])
    train, val = (
        whole.take(spots) for spots in split_spots(slide_ids, CONFIG.val_share, CONFIG.seed)
    )
    expected = new_head(train, CONFIG.seed)
    start = expected.last.weight.detach().clone()
    plain = fit_head(expected, train, val, CONFIG)
    workers = Workers(num_workers, cpus_per_worker=1, use_gpu=False)
    head, result = fit(bags[0], CONFIG, workers, str(tmp_path))
    assert not head.training
    assert result.best_epoch == plain.best_epoch > 0
    np.testing.assert_allclose(result.history, plain.history, rtol=1e-5)
    assert result.best_loss == pytest.approx(plain.best_loss, rel=1e-5)
    found, wanted = head.state_dict(), expected.state_dict()
    assert list(found) == list(wanted)
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-5, atol=1e-5)
    # The fit has moved the weights by far more than that.
    assert (head.last.weight - start).abs().max() > 1e-3
    # Nothing of Ray Train's is left for a later fit to take up.
    assert list(tmp_path.iterdir()) == []
