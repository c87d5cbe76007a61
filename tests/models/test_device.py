"""One rule each: the device of this process, of a worker, and of a cluster."""

import pytest

from scellst_ray.models import device


@pytest.mark.parametrize("has_gpu", [False, True])
def test_this_process_uses_its_gpu_by_default(monkeypatch, has_gpu):
    monkeypatch.setattr(device, "has_gpu", lambda: has_gpu)
    assert device.uses_own_gpu(None) is has_gpu
    assert device.uses_own_gpu(wanted=True)
    assert not device.uses_own_gpu(wanted=False)


def test_a_cluster_uses_its_gpus_by_default_if_it_has_enough():
    assert not device.uses_cluster_gpus(None, 0)
    assert device.uses_cluster_gpus(None, 1)
    assert not device.uses_cluster_gpus(None, 3, num_needed=4)
    assert device.uses_cluster_gpus(None, 4, num_needed=4)
    assert device.uses_cluster_gpus(wanted=True, num_gpus=0)
    assert not device.uses_cluster_gpus(wanted=False, num_gpus=8)


def test_a_gpu_that_torch_cannot_use_is_refused(monkeypatch):
    monkeypatch.setattr(device, "has_gpu", lambda: False)
    with pytest.raises(RuntimeError, match="torch sees none"):
        device.device_of_worker(on_gpu=True)
    assert device.device_of_worker(on_gpu=False) == "cpu"
    monkeypatch.setattr(device, "has_gpu", lambda: True)
    assert device.device_of_worker(on_gpu=True) == "cuda"
