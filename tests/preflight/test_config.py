"""Settings of `plan`: a job and a cluster."""

import pytest

from scellst_ray.preflight.config import PlanConfig
from scellst_ray.preflight.costs import PlannedCluster
from scellst_ray.stages.config import ExtractConfig, PredictConfig

plan_config = PlanConfig.from_flags


def test_a_head_makes_it_predict():
    config = plan_config(manifest="m", out="o", core_px=128, encoder=None, store_embeddings=None)
    assert config.job == ExtractConfig(manifest="m", out="o", core_px=128)
    config = plan_config(manifest="m", head="h", gpus=2, tile_timeout_s=None)
    assert config.job == PredictConfig(
        manifest="m", out="", head="h", gpus=True, tile_timeout_s=None
    )
    assert config.num_gpus == 2
    assert plan_config(manifest="m", gpus=False).job.gpus is False


def test_the_cluster():
    assert plan_config(manifest="m", workers=6).cluster() == PlannedCluster(6, 0, 6)
    assert plan_config(manifest="m", workers=6, cpus=8).cluster() == PlannedCluster(8, 0, 6)
    assert plan_config(manifest="m", gpus=2, cpus=64).cluster() == PlannedCluster(64, 2, 64)
    assert plan_config(manifest="m", gpus=False, workers=1).cluster().gpus == 0


@pytest.mark.parametrize(
    ("wrong", "part"),
    [
        ({"calibrate": 0}, "calibrate is 0"),
        ({"cpu_price": -1.0}, "cpu_price is -1.0"),
        ({"gpus": -1}, "gpus is -1"),
        ({"core_px": 8}, "core_px is 8"),
    ],
)
def test_refuses(wrong, part):
    with pytest.raises(ValueError, match=part):
        plan_config(manifest="m", **wrong)
