"""Backbones of torchvision and timm."""

import sys

import pytest
import torch

from scellst_ray.models.encoder.backbones import new_backbone


@pytest.mark.parametrize(
    ("arch", "dim"), [("resnet18", 512), ("resnet34", 512), ("resnet50", 2048)]
)
def test_residual_networks_of_torchvision(arch, dim):
    with torch.device("meta"):
        network, found = new_backbone(arch, 0)
        assert network(torch.zeros(2, 3, 48, 48)).shape == (2, dim)
    assert found == dim
    assert network.training


def test_weights_follow_the_seed_and_leave_the_global_state():
    before = torch.random.get_rng_state()
    states = [new_backbone("resnet18", seed)[0].state_dict() for seed in (3, 3, 4)]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["conv1.weight"], states[2]["conv1.weight"])
    lasts = [v for name, v in states[0].items() if name.endswith("bn2.weight")]
    assert len(lasts) == 8
    assert not any(v.any() for v in lasts)


@pytest.mark.parametrize(
    ("arch", "dim"), [("timm:resnet10t", 512), ("timm:vit_tiny_patch16_224", 192)]
)
def test_backbones_of_timm(arch, dim):
    pytest.importorskip("timm")
    network, found = new_backbone(arch, 0)
    assert found == dim
    assert network.training
    assert network(torch.zeros(2, 3, 48, 48)).shape == (2, dim)


def test_names_that_cannot_be_had_are_reported(monkeypatch):
    with pytest.raises(ValueError, match="expected one of resnet18"):
        new_backbone("resnet99", 0)
    pytest.importorskip("timm")
    with pytest.raises(ValueError, match="timm has no model 'nothing'"):
        new_backbone("timm:nothing", 0)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match="pip install timm"):
        new_backbone("timm:resnet10t", 0)
