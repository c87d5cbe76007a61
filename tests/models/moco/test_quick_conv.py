import copy

import pytest
import torch
from torch import nn

from scellst_ray.models.encoder.backbones import new_backbone
from scellst_ray.models.moco.quick_conv import MAX_POSITIONS, QuickConv2d, quicken
from tests.support.workers import tiny_backbone

# Side of the map, kernel, stride, padding: cases of both rules, of one rule and of no rule.
CASES = [
    (2, 3, 1, 1),
    (3, 3, 1, 1),
    (3, 3, 2, 1),
    (4, 3, 2, 1),
    (2, 1, 1, 0),
    (5, 1, 2, 0),
    (5, 1, 1, 1),
    (6, 3, 1, 0),
    (9, 3, 1, 1),
    (9, 7, 2, 3),
    (1, 3, 1, 1),
]


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("channels", [(3, 8), (5, 4)])
@pytest.mark.parametrize(("side", "kernel", "stride", "padding"), CASES)
def test_results_and_gradients_are_those_of_torch(side, kernel, stride, padding, channels, layout):
    plain = nn.Sequential(nn.Conv2d(*channels, kernel, stride, padding, bias=False)).double()
    quick = quicken(copy.deepcopy(plain))
    assert isinstance(quick[0], QuickConv2d)
    generator = torch.Generator().manual_seed(side)
    values = torch.randn(6, channels[0], side, side, generator=generator, dtype=torch.float64)
    found = []
    for network in (plain, quick):
        x = values.clone(memory_format=layout).requires_grad_()
        y = network(x)
        (y.sin() * torch.arange(y.numel()).view(y.shape)).sum().backward()
        found.append((y.detach(), x.grad, network[0].weight.grad))
        with torch.no_grad():
            torch.testing.assert_close(network(x), y.detach())
    torch.testing.assert_close(found[1], found[0])


def test_both_rules_are_tried_above():
    positions = [((s + 2 * p - k) // t + 1) ** 2 for s, k, t, p in CASES]
    assert any(n > MAX_POSITIONS for n in positions)
    assert any(1 < n <= MAX_POSITIONS for n in positions)


@pytest.mark.parametrize("side", [2, 3])
def test_gradients_equal_finite_differences(side):
    quick = quicken(nn.Sequential(nn.Conv2d(4, 3, 3, padding=1, bias=False))).double()
    x = torch.randn(2, 4, side, side, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(quick, x)
    weight = quick[0].weight
    assert torch.autograd.gradcheck(
        lambda w: torch.func.functional_call(quick, {"0.weight": w}, (x.detach(),)), weight
    )


def test_only_gradients_that_are_asked_for():
    quick = quicken(nn.Sequential(nn.Conv2d(4, 3, 3, padding=1, bias=False)))
    for side in (2, 3, 6):
        quick.requires_grad_(requires_grad=False)
        x = torch.randn(2, 4, side, side, requires_grad=True)
        quick(x).sum().backward()
        assert quick[0].weight.grad is None
        assert x.grad is not None
        quick.requires_grad_()
        quick(x.detach()).sum().backward()
        assert quick[0].weight.grad is not None
        quick.zero_grad()


def test_a_residual_network_learns_the_same_and_keeps_its_names():
    # torch computes maps of 4 x 4 px, products compute maps of 2 x 2 px.
    plain = tiny_backbone()
    quick = quicken(copy.deepcopy(plain))
    assert list(quick.state_dict()) == list(plain.state_dict())
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    for network in (plain, quick):
        network.double()(x).square().mean().backward()
    for a, b in zip(plain.parameters(), quick.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-6, atol=1e-9)


def test_all_convolutions_of_a_resnet_are_quick():
    with torch.device("meta"):
        network = quicken(new_backbone("resnet50", 0)[0])
    kinds = [type(module) for module in network.modules()]
    assert kinds.count(QuickConv2d) == 53
    assert nn.Conv2d not in kinds


def test_other_convolutions_stay_and_other_precisions_are_torchs():
    odd = nn.Sequential(
        nn.Conv2d(4, 4, 3),
        nn.Conv2d(4, 4, 3, groups=2, bias=False),
        nn.Conv2d(4, 4, 3, dilation=2, bias=False),
        nn.Conv2d(4, 4, (3, 1), bias=False),
        nn.Conv2d(4, 4, 3, padding="same", bias=False),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect", bias=False),
    )
    assert [type(layer) for layer in quicken(odd)] == [nn.Conv2d] * 6
    plain = tiny_backbone()
    quick = quicken(copy.deepcopy(plain))
    x = torch.randn(4, 3, 12, 12)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quick(x), plain(x))
