"""MoCo models: seeded heads, and checkpointed stages that change no result."""

from collections import OrderedDict

import pytest
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock

from scellst_ray.models.moco.model import STAGES, CheckpointedStage, checkpoint_stages, new_moco
from scellst_ray.models.moco.network import MocoConfig
from scellst_ray.models.moco.sync_norm import convert
from tests.support.workers import meet

SMALL = MocoConfig(projector_dim=8, out_dim=4)


def test_heads_follow_the_seed_too():
    before = torch.random.get_rng_state()
    one, same = new_moco("resnet18", 1, SMALL), new_moco("resnet18", 1, SMALL, checkpointing=True)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert list(one.state_dict()) == list(same.state_dict())
    assert all(
        torch.equal(a, b)
        for a, b in zip(one.state_dict().values(), same.state_dict().values(), strict=True)
    )


def run(network, collective=None):
    """Run two batches forward and backward; return outputs, gradients and buffers."""
    if collective is not None:
        convert(network, collective.all_reduce, collective.world_size)
    generator = torch.Generator().manual_seed(0)
    outputs = []
    for _ in range(2):
        x = torch.randn(4, 3, 16, 16, generator=generator)
        y = network(x if collective is None else x[2 * collective.rank : 2 * collective.rank + 2])
        y.square().sum().backward()
        outputs.append(y.detach())
    return (
        outputs,
        [p.grad for p in network.parameters()],
        {name: b.clone() for name, b in network.named_buffers()},
    )


def small_resnet():
    """Return a seeded network of four residual stages."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8))
        stages = {name: nn.Sequential(BasicBlock(8, 8), BasicBlock(8, 8)) for name in STAGES}
        return nn.Sequential(OrderedDict(stem=stem, **stages))


def test_checkpointing_changes_neither_gradients_nor_running_statistics():
    network = small_resnet()
    state = {name: value.clone() for name, value in network.state_dict().items()}
    expected = run(network)
    network = small_resnet()
    checkpoint_stages(network)
    assert list(network.state_dict()) == list(state)
    assert isinstance(network.layer3, CheckpointedStage)
    calls = []
    network.layer3[0].register_forward_hook(lambda *_: calls.append(1))
    found = run(network)
    assert len(calls) == 4  # each of two batches runs once forward and once in backward
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    with torch.no_grad():
        network(torch.zeros(2, 3, 16, 16))
    assert len(calls) == 5


def test_checkpointing_over_workers_equals_one_process():
    expected = run(small_resnet())
    networks = []
    for _ in range(2):
        networks.append(small_resnet())
        checkpoint_stages(networks[-1])
    found = meet(2, lambda collective: run(networks[collective.rank], collective))
    for batch, y in enumerate(expected[0]):
        joined = torch.cat([outputs[batch] for outputs, _, _ in found])
        torch.testing.assert_close(joined, y, rtol=1e-3, atol=1e-4)
    for outputs in found:
        torch.testing.assert_close(outputs[2], expected[2], rtol=1e-4, atol=1e-5)


def test_checkpointing_needs_residual_stages():
    with pytest.raises(ValueError, match="Flatten has no residual stage 'layer1'"):
        checkpoint_stages(nn.Flatten())
