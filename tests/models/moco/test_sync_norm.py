import copy

import pytest
import torch
from torch import nn

from scellst_ray.models.moco.sync_norm import SyncNorm, convert
from tests.support.workers import meet, tiny_backbone

SHAPES = {"1d": (nn.BatchNorm1d, ()), "2d": (nn.BatchNorm2d, (3, 4))}


def make_norm(kind, dtype=torch.float64, **options):
    """Return a batch norm of 5 channels whose weights are not 1 and biases not 0."""
    norm = SHAPES[kind][0](5, **options).to(dtype)
    if norm.affine:
        with torch.no_grad():
            norm.weight.copy_(torch.linspace(-1, 2, 5))
            norm.bias.copy_(torch.linspace(3, 1, 5))
    return norm


def run(norm, batches):
    """Run batches forward and backward, with slopes as loss; return y, dx and gradients."""
    found = []
    for values, slope in batches:
        x = values.clone().requires_grad_()
        y = norm(x)
        (y.sin() * slope).sum().backward()
        found.append((y.detach(), x.grad))
    return found, [p.grad for p in norm.parameters()], dict(norm.named_buffers())


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"momentum": None}, {"momentum": 0.5}])
@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("counts", [(4, 4), (1, 6), (0, 5, 3), (2, 1, 1)])
def test_workers_equal_batch_norm_on_the_joined_batch(counts, kind, options):
    generator = torch.Generator().manual_seed(0)
    shape = (sum(counts), 5, *SHAPES[kind][1])
    joined = [
        tuple(torch.randn(shape, generator=generator, dtype=torch.float64) + 2 for _ in range(2))
        for _ in range(3)
    ]
    norm = make_norm(kind, **options)
    copies = [copy.deepcopy(norm) for _ in counts]
    expected, gradients, buffers = run(norm, joined)
    split = [[t.split(counts) for t in pair] for pair in joined]

    def work(collective):
        rank = collective.rank
        mine = convert(copies[rank], collective.all_reduce, collective.world_size)
        assert isinstance(mine, SyncNorm)
        return run(mine, [(x[rank], slope[rank]) for x, slope in split])

    found = meet(len(counts), work)
    for step, (y, dx) in enumerate(expected):
        torch.testing.assert_close(torch.cat([f[0][step][0] for f in found]), y)
        torch.testing.assert_close(torch.cat([f[0][step][1] for f in found]), dx)
    for number, gradient in enumerate(gradients):
        torch.testing.assert_close(sum(f[1][number] for f in found), gradient)
    for _, _, own in found:
        torch.testing.assert_close(own, buffers)


def test_gradient_is_that_of_finite_differences():
    norm = convert(nn.Sequential(make_norm("2d")), lambda total: total, 2)
    x = torch.randn(3, 5, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(norm, x)


def test_a_far_mean_costs_no_digits_and_channels_last_stays():
    x = (torch.randn(32, 5, 4, 4) + 1e3).contiguous(memory_format=torch.channels_last)
    exact = make_norm("2d")(x.double())
    norm = convert(make_norm("2d", torch.float32), lambda total: total, 2)
    y = norm(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=2e-3)
    # Rounding of the input alone gives 6e-5, over a deviation of 1.
    assert (y.double() - exact).abs().mean() < 3e-4


def test_bfloat16_activations_with_float32_statistics():
    x = torch.randn(64, 5, 4, 4).bfloat16().requires_grad_()
    wide = x.detach().float().requires_grad_()
    slope = torch.randn_like(wide)
    norm = convert(make_norm("2d", torch.float32), lambda total: total, 2)
    plain = make_norm("2d", torch.float32)
    y, exact = norm(x), plain(wide)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), exact, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(norm.running_var, plain.running_var)
    (y * slope.bfloat16()).sum().backward()
    (exact * slope).sum().backward()
    assert x.grad.dtype == torch.bfloat16
    torch.testing.assert_close(x.grad.float(), wide.grad, rtol=3e-2, atol=3e-2)
    torch.testing.assert_close(norm.weight.grad, plain.weight.grad, rtol=2e-2, atol=0.5)


@pytest.mark.parametrize("track", [True, False])
def test_evaluation_is_that_of_the_norm_it_replaces(track):
    norm = make_norm("1d", track_running_stats=track)
    norm(torch.randn(8, 5, dtype=torch.float64))
    norm.eval()
    replaced = convert(copy.deepcopy(norm), lambda total: total, 2)
    x = torch.randn(4, 5, dtype=torch.float64)
    torch.testing.assert_close(replaced(x), norm(x))
    assert (replaced.running_mean is None) == (not track)


def test_convert_replaces_all_norms_and_keeps_the_state_dict():
    plain = tiny_backbone()
    state = {name: value.clone() for name, value in plain.state_dict().items()}
    parameters = list(plain.parameters())
    converted = convert(plain, lambda total: total, 2)
    assert converted is plain
    kinds = [type(module) for module in converted.modules()]
    assert nn.BatchNorm2d not in kinds
    assert kinds.count(SyncNorm) == 6
    assert all(a is b for a, b in zip(converted.parameters(), parameters, strict=True))
    assert list(converted.state_dict()) == list(state)
    other = tiny_backbone()
    other.load_state_dict(converted.state_dict())
    for name, value in other.state_dict().items():
        assert torch.equal(value, state[name])


def test_one_worker_keeps_plain_norms():
    plain = tiny_backbone()
    modules = list(plain.modules())
    assert list(convert(plain, None, 1).modules()) == modules
    assert type(plain[1]) is nn.BatchNorm2d


def test_mistakes_are_reported():
    with pytest.raises(ValueError, match="pass all_reduce"):
        convert(tiny_backbone(), None, 2)
    norm = convert(make_norm("1d"), lambda total: total, 2)
    with pytest.raises(ValueError, match="got 1 values per channel"):
        norm(torch.randn(1, 5, dtype=torch.float64))
