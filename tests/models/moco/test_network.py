import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from scellst_ray.models.encoder.backbones import new_backbone
from scellst_ray.models.moco.network import (
    Moco,
    MocoConfig,
    contrastive_loss,
    learning_rate_at,
    momentum_at,
)
from tests.support.workers import tiny_backbone, tiny_moco, tiny_views


def unit(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=1)


def slow_ctr(q, k, temperature):
    """Return Algorithm 1's ctr(q, k), number by number: labels on the diagonal, times 2 tau."""
    losses = []
    for i, query in enumerate(q.tolist()):
        logits = [sum(a * b for a, b in zip(query, key, strict=True)) / temperature for key in k]
        losses.append(math.log(sum(math.exp(logit) for logit in logits)) - logits[i])
    return 2 * temperature * sum(losses) / len(losses)


@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_loss_equals_the_papers_formula_slowly(temperature):
    q, k = unit(9, 6), unit(9, 6, seed=1)
    found = contrastive_loss(q, k, 0, temperature, 9)
    assert found.item() == pytest.approx(slow_ctr(q, k.tolist(), temperature), rel=1e-12)
    labels = torch.arange(9)
    torch_loss = 2 * temperature * F.cross_entropy(q @ k.T / temperature, labels)
    torch.testing.assert_close(found, torch_loss)


@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_loss_is_log_m_where_all_keys_coincide(temperature):
    k = unit(1, 6).expand(16, 6)
    found = contrastive_loss(unit(16, 6, seed=2), k, 0, temperature, 16)
    assert found.item() == pytest.approx(2 * temperature * math.log(16), rel=1e-12)


def test_shares_of_chunks_and_their_gradients_add_up():
    q, k = unit(10, 4).requires_grad_(), unit(10, 4, seed=1)
    whole = contrastive_loss(q, k, 0, 0.5, 10)
    (expected,) = torch.autograd.grad(whole, q)
    parts = [contrastive_loss(q[a:b], k, a, 0.5, 10) for a, b in ((0, 3), (3, 3), (3, 10))]
    torch.testing.assert_close(sum(parts), whole)
    torch.testing.assert_close(torch.autograd.grad(sum(parts), q)[0], expected)


def test_queries_without_a_key_are_refused():
    for first in (-1, 3):
        with pytest.raises(ValueError, match=f"3 queries begin at row {first}, expected"):
            contrastive_loss(unit(3, 4), unit(5, 4), first, 1.0, 5)


def test_sizes_are_those_of_the_published_network():
    with torch.device("meta"):
        model = Moco(*new_backbone("resnet50", 0), MocoConfig())
    sizes = {
        name: sum(p.numel() for p in part.parameters()) / 1e6
        for name, part in (("online", model.online), ("predictor", model.predictor))
    }
    assert round(sizes["online"], 2) == 32.95
    assert round(sizes["predictor"], 1) == 2.1
    assert [type(layer) for layer in model.online.projector] == [
        nn.Linear,
        nn.BatchNorm1d,
        nn.ReLU,
        nn.Linear,
        nn.BatchNorm1d,
    ]
    assert not model.online.projector[4].affine
    assert isinstance(model.predictor[-1], nn.Linear)


def test_queries_and_keys_are_unit_vectors_and_only_queries_learn():
    model = tiny_moco()
    x, _ = tiny_views(6)
    q, k = model.queries(x), model.keys(x)
    for y in (q, k):
        assert y.shape == (6, 8)
        torch.testing.assert_close(y.norm(dim=1), torch.ones(6, dtype=torch.float64))
    assert q.requires_grad
    assert not k.requires_grad
    assert not any(p.requires_grad for p in model.momentum.parameters())
    embedding, key = model.embed_keys(x)
    torch.testing.assert_close(embedding, model.momentum.backbone(x))
    torch.testing.assert_close(key, k)


def test_the_momentum_encoder_begins_as_a_copy():
    model = Moco(tiny_backbone(), 16, MocoConfig(projector_dim=12, out_dim=8))
    for a, b in zip(model.online.parameters(), model.momentum.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.data_ptr() != b.data_ptr()


@pytest.mark.parametrize("m", [0.0, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_momentum_update_is_exact(m, dtype):
    model = tiny_moco(dtype=dtype)
    model.keys(tiny_views(4, dtype=dtype)[0])
    online = [p.detach().clone() for p in model.online.parameters()]
    before = [p.clone() for p in model.momentum.parameters()]
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    model.update_momentum(m)
    for old, new, q in zip(before, model.momentum.parameters(), online, strict=True):
        exact = m * old.double() + (1 - m) * q.double()
        torch.testing.assert_close(new.double(), exact, rtol=0, atol=2 * torch.finfo(dtype).eps * 3)
        if m in (0.0, 1.0):
            assert torch.equal(new, q if m == 0 else old)
    for name, value in model.named_buffers():
        assert torch.equal(value, buffers[name])
    assert all(torch.equal(a, b) for a, b in zip(online, model.online.parameters(), strict=True))


def test_a_momentum_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"momentum is 1\.1"):
        tiny_moco().update_momentum(1.1)


@pytest.mark.parametrize(
    "setting",
    [
        {"projector_dim": 0},
        {"out_dim": 1},
        {"temperature": 0},
        {"temperature": math.inf},
        {"momentum": 1.5},
        {"momentum": math.nan},
    ],
)
def test_settings_out_of_range_are_refused(setting):
    with pytest.raises(ValueError, match=f"{next(iter(setting))} is .*, expected"):
        MocoConfig(**setting)


def test_momentum_is_constant_or_rises_along_a_cosine():
    assert [momentum_at(step, 10, MocoConfig()) for step in (0, 5, 10)] == [0.99] * 3
    rising = MocoConfig(momentum=0.9, momentum_cosine=True)
    found = [momentum_at(step, 10, rising) for step in range(11)]
    assert found[0] == pytest.approx(0.9)
    assert found[5] == pytest.approx(0.95)
    assert found[10] == 1.0
    assert found == sorted(found)


def test_learning_rate_warms_up_and_falls_along_a_cosine():
    # The published run has the peak 0.6 x 4096 / 256 = 9.6, and 10 of 150 epochs warm up.
    rates = [learning_rate_at(step, 7, 150, 10, 0.6, 4096) for step in range(7 * 150 + 1)]
    assert rates[0] == 0
    assert rates[35] == pytest.approx(4.8)
    assert rates[70] == max(rates) == pytest.approx(9.6)
    assert rates[70 + 7 * 70] == pytest.approx(4.8)
    assert rates[-1] == pytest.approx(0, abs=1e-12)
    rise, fall = rates[:71], rates[70:]
    assert rise == sorted(rise)
    assert fall == sorted(fall, reverse=True)
    assert learning_rate_at(0, 7, 3, 0, 0.3, 256) == pytest.approx(0.3)
    assert learning_rate_at(14, 7, 2, 2, 0.3, 256) == pytest.approx(0.3)
