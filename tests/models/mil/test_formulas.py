"""The kinds of head: ours and the published one, losses on counts, ensembles; stored and read."""

import json

import numpy as np
import pytest
import safetensors.torch
import torch

from scellst_ray.models.mil.head import (
    OURS,
    PUBLISHED,
    GroupedLinear,
    MilHead,
    formula_of,
    load_head,
    loss_sum,
    save_head,
    stored_hidden,
)
from scellst_ray.models.mil.likelihood import nb_log_prob, nb_total_log_prob
from scellst_ray.models.mil.stored_head import (
    HEAD_FORMAT,
    Formula,
    expression_from_hidden,
    read_last_layer,
)


@pytest.fixture
def head() -> MilHead:
    torch.manual_seed(0)
    return MilHead(embedding_dim=20, num_genes=3)


def info_of(**changes) -> dict:
    info = {
        "genes": ["EPCAM", "CD3E", "ERBB2"],
        "scaling": {"C2": [1.0, 2.5, 0.1], "C3": [1.0, 1.0, 1.0]},
        "embedding_dim": 20,
        "encoder_digest": "abc",
        "training_slides": ["C2", "C3"],
        "metrics": {"val_loss": 0.25},
    }
    return info | changes


def test_the_published_predictor(head):
    torch.manual_seed(0)
    published = MilHead(20, 3, formula=PUBLISHED)
    published.load_state_dict(head.state_dict())
    x_ND = torch.randn(50, 20)
    hidden = x_ND
    for number in (0, 2, 4):
        z = hidden @ head.layers[number].weight.T + head.layers[number].bias
        hidden = torch.where(z < 0, 0.01 * z, z)
    published.eval()
    torch.testing.assert_close(published.hidden(x_ND), hidden)
    z = hidden @ head.last.weight.T + head.last.bias
    torch.testing.assert_close(published(x_ND), torch.log1p(torch.exp(20 * z)) / 20)
    # In training a tenth of each hidden layer is dropped, and what is left is scaled up.
    published.train()
    share = (published.hidden(torch.randn(2000, 20)) == 0).float().mean().item()
    assert share == pytest.approx(0.1, abs=0.01)
    assert Formula(negative_slope=0.01, dropout=0.1, beta=20) == PUBLISHED
    assert formula_of("ours", "nb", 3) == Formula(loss="nb", ensemble=3)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"beta": 0.0}, "beta is 0.0, expected a positive"),
        ({"loss": "zinb"}, "loss is zinb, expected one of mse, nb, nb_total"),
        ({"ensemble": 0}, "ensemble is 0, expected at least 1"),
        ({"dropout": 1.0}, "dropout is 1.0"),
    ],
)
def test_formulas_that_cannot_be_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        Formula(**changes)
    with pytest.raises(ValueError, match="predictor is 'theirs', expected one of ours, published"):
        formula_of("theirs")


def alone(head, member):
    """Return one member of an ensemble as a head of its own."""
    count = head.formula.ensemble
    single = MilHead(len(head.mean_D), len(head.last.bias) // count, formula=OURS)
    state = {
        name: value if name in ("mean_D", "std_D") else value.chunk(count)[member]
        for name, value in head.state_dict().items()
    }
    single.load_state_dict(state)
    return single


def test_members_of_an_ensemble_share_nothing_but_their_inputs():
    torch.manual_seed(0)
    head = MilHead(20, 4, formula=Formula(ensemble=3))
    head.standardise(2 + 3 * torch.randn(99, 20))
    x_ND = torch.randn(7, 20)
    singles = [alone(head, member) for member in range(3)]
    torch.testing.assert_close(
        head.hidden(x_ND), torch.cat([single.hidden(x_ND) for single in singles], 1)
    )
    each_KNG = torch.stack([single(x_ND) for single in singles])
    torch.testing.assert_close(head(x_ND), torch.cat(list(each_KNG), 1))
    hidden = head.hidden(x_ND)
    torch.testing.assert_close(head.from_hidden(hidden), each_KNG.mean(0))
    torch.testing.assert_close(
        head.spread_from_hidden(hidden), each_KNG.std(0, correction=0), rtol=1e-4, atol=1e-6
    )
    assert (each_KNG[0] - each_KNG[1]).abs().max() > 0.01
    # Its loss is the sum of theirs, so its gradients are theirs.
    target = torch.randn(7, 4)
    loss_sum(head, head(x_ND), target).backward()
    for member, single in enumerate(singles):
        loss_sum(single, single(x_ND), target).backward()
        for found, expected in zip(head.parameters(), single.parameters(), strict=True):
            torch.testing.assert_close(
                found.grad.chunk(3)[member], expected.grad, rtol=1e-4, atol=1e-5
            )


def test_grouped_layers_of_no_rows():
    layer = GroupedLinear(4, 5, 3)
    assert layer(torch.zeros(0, 12)).shape == (0, 15)
    layer(torch.zeros(0, 12)).sum().backward()
    assert not layer.weight.grad.any()


@pytest.mark.parametrize("ensemble", [1, 2])
def test_counts_are_likely_at_size_factor_times_the_mean_of_cells(ensemble):
    torch.manual_seed(0)
    target, factor = torch.poisson(torch.full((5, 3), 4.0)), torch.tensor([0.5, 1, 2, 1, 3])
    prediction = torch.rand(5, ensemble * 3) + 0.1
    for loss, form in (("nb", nb_log_prob), ("nb_total", nb_total_log_prob)):
        head = MilHead(20, 3, formula=Formula(loss=loss, ensemble=ensemble))
        torch.nn.init.normal_(head.log_dispersion)
        total = 0.0
        for spot in range(5):
            for column in range(ensemble * 3):
                g = head.log_dispersion[column].double()
                size = prediction[spot, column].double() * factor[spot]
                second = g.exp() if loss == "nb" else size
                first = size if loss == "nb" else None
                y = target[spot, column % 3]
                total -= form(y, first, second) if loss == "nb" else form(y, second, g)
        found = loss_sum(head, prediction, target, factor)
        torch.testing.assert_close(found, total)
        found.backward()
        assert head.log_dispersion.grad.abs().min() > 0
        empty = loss_sum(head, prediction[:0], target[:0], factor[:0])
        assert empty == 0
        with pytest.raises(ValueError, match=f"loss '{loss}' needs the size factor"):
            loss_sum(head, prediction, target)


@pytest.mark.parametrize("loss", ["mse", "nb", "nb_total"])
@pytest.mark.parametrize("predictor", ["ours", "published"])
@pytest.mark.parametrize("ensemble", [1, 3])
def test_stored_heads_of_every_kind_read_alike_without_torch(tmp_path, loss, predictor, ensemble):
    torch.manual_seed(1)
    head = MilHead(20, 3, formula=formula_of(predictor, loss, ensemble))
    if loss != "mse":
        torch.nn.init.normal_(head.log_dispersion)
        head.gene_scale_G.copy_(torch.tensor([0.1, 20.0, 3.0]))
    uri = str(tmp_path / "head.safetensors")
    save_head(uri, head, info_of())
    loaded, _ = load_head(uri)
    assert loaded.formula == head.formula
    layer = read_last_layer(uri)
    with torch.no_grad():
        stored = stored_hidden(loaded.hidden(3 * torch.randn(40, 20)))
        expected, spread = loaded.from_hidden(stored), loaded.spread_from_hidden(stored)
        single = loaded(torch.zeros(1, 20)).shape
    assert single == (1, ensemble * 3)
    np.testing.assert_allclose(layer.expression(stored.numpy()), expected, rtol=1e-5, atol=1e-30)
    part = layer.select(np.array([2, 0]))
    assert part.genes == ["ERBB2", "EPCAM"]
    np.testing.assert_array_equal(
        part.expression(stored.numpy()), layer.expression(stored.numpy())[:, [2, 0]]
    )
    if ensemble == 1:
        with pytest.raises(ValueError, match="this head is one network"):
            layer.expression(stored.numpy(), "sd")
    else:
        found = layer.expression(stored.numpy(), "sd")
        np.testing.assert_allclose(found, spread, rtol=1e-3, atol=1e-6)
    with pytest.raises(
        ValueError, match=f"has 300 values per cell, but this head has {ensemble} x 256"
    ):
        layer.expression(np.zeros((2, 300), np.float16))


def test_total_counts_have_their_mean_as_expression():
    head = MilHead(20, 2, formula=Formula(loss="nb_total"))
    with torch.no_grad():
        head.log_dispersion.copy_(torch.tensor([-1.0, 2.0]))
        x_ND = torch.randn(4, 20)
        expression = head.from_hidden(head.hidden(x_ND))
        distribution = torch.distributions.NegativeBinomial(head(x_ND), logits=head.log_dispersion)
    torch.testing.assert_close(expression, distribution.mean)


def test_heads_of_version_1_are_read_by_its_formula(head, tmp_path):
    path = tmp_path / "head.safetensors"
    metadata = {"format": HEAD_FORMAT, "format_version": "1", "info": json.dumps(info_of())}
    path.write_bytes(safetensors.torch.save(head.state_dict(), metadata=metadata))
    old, info = load_head(str(path))
    assert old.formula == OURS
    assert info == info_of()
    x_ND = torch.randn(6, 20)
    torch.testing.assert_close(old(x_ND), head(x_ND), rtol=0, atol=0)
    hidden = stored_hidden(head.hidden(x_ND)).detach().numpy()
    weight, bias = head.last.weight.detach().numpy(), head.last.bias.detach().numpy()
    np.testing.assert_array_equal(
        read_last_layer(str(path)).expression(hidden), expression_from_hidden(hidden, weight, bias)
    )
