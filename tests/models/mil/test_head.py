"""The head: its layers, losses on expression and counts, ensembles, and its file."""

import fsspec
import numpy as np
import pytest
import torch

from scellst_ray.models.mil.head import (
    OURS,
    PUBLISHED,
    GroupedLinear,
    MilHead,
    formula_of,
    head_to_bytes,
    instance_statistics,
    load_head,
    loss_sum,
    save_head,
    stored_hidden,
)
from scellst_ray.models.mil.head_file import Formula
from scellst_ray.models.mil.likelihood import nb_log_prob, nb_total_log_prob
from tests.support.mil_heads import info_of, spread_from_hidden


def test_layers_are_those_of_the_paper(head):
    x_ND = torch.randn(5, 20)
    hidden = x_ND
    shapes = []
    for layer in (head.layers[0], head.layers[2], head.layers[4]):
        hidden = (hidden @ layer.weight.T + layer.bias).clamp(min=0)
        shapes.append(tuple(layer.weight.shape))
    assert shapes == [(256, 20), (256, 256), (256, 256)]
    torch.testing.assert_close(head.hidden(x_ND), hidden)
    expected = torch.log1p(torch.exp(hidden @ head.last.weight.T + head.last.bias))
    torch.testing.assert_close(head(x_ND), expected)
    assert (head(x_ND) > 0).all()


def test_standardised_inputs_equal_standardising_before(head):
    x_ND = 1000 + 30 * torch.randn(500, 20)
    plain = head((x_ND - x_ND.mean(0)) / x_ND.std(0, unbiased=False))
    head.standardise(x_ND)
    torch.testing.assert_close(head(x_ND), plain, rtol=1e-4, atol=1e-5)
    assert not [name for name, _ in head.named_parameters() if name in ("mean_D", "std_D")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_statistics_in_blocks_equal_numpy(dtype):
    x_ND = (torch.randn(101, 7) * 3 + 5).to(dtype)
    x_ND[:, 2] = 4.0
    mean_D, std_D = instance_statistics(x_ND, block=10)
    values = x_ND.double().numpy()
    np.testing.assert_allclose(mean_D, values.mean(0), rtol=1e-6)
    expected = values.std(0)
    expected[2] = 1.0  # a feature that never varies is not divided by zero
    np.testing.assert_allclose(std_D, expected, rtol=1e-6)


def test_statistics_refuse_nothing_and_nan():
    with pytest.raises(ValueError, match="no instances"):
        instance_statistics(torch.zeros(0, 4))
    with pytest.raises(ValueError, match="NaN"):
        instance_statistics(torch.full((3, 4), torch.nan))


def test_squared_errors_sum_over_spots(head):
    prediction, target = torch.randn(7, 3), torch.randn(7, 3)
    whole = loss_sum(head, prediction, target)
    torch.testing.assert_close(whole, torch.nn.functional.mse_loss(prediction, target) * 21)
    parts = [loss_sum(head, prediction[part::3], target[part::3]) for part in range(3)]
    torch.testing.assert_close(sum(parts), whole)
    assert loss_sum(head, prediction[:0], target[:0]) == 0


def test_hidden_that_float16_cannot_hold_is_refused():
    with pytest.raises(ValueError, match=r"70000\.0 do not fit into float16"):
        stored_hidden(torch.tensor([[1.0, 70000.0]]))


@pytest.mark.parametrize("address", ["{tmp}/runs/a/head.safetensors", "memory://runs/head"])
def test_head_survives_a_file(head, tmp_path, address):
    path = address.format(tmp=tmp_path)
    head.standardise(torch.randn(50, 20))
    info = info_of(sampled_from="C2")
    save_head(path, head, info_of(metrics={}))
    save_head(path, head, info)  # replaces the older file
    loaded, found = load_head(path)
    assert found == info
    assert not loaded.training
    x_ND = torch.randn(6, 20)
    torch.testing.assert_close(loaded(x_ND), head(x_ND), rtol=0, atol=0)
    fs, target = fsspec.core.url_to_fs(path)
    assert len(fs.ls(target.rsplit("/", 1)[0])) == 1  # no temporary file remains
    fs.rm(target)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"genes": ["A", "B"]}, "names 2 genes .* but the tensors hold 3 genes"),
        ({"embedding_dim": 2048}, "embedding_dim 2048, but the tensors hold .* 20 features"),
        ({"scaling": {"C2": [1.0]}}, r"scaling of slides \['C2'\]"),
    ],
)
def test_info_that_does_not_describe_the_head_is_refused(head, changes, words):
    with pytest.raises(ValueError, match=words):
        head_to_bytes(head, info_of(**changes))
    without = {key: value for key, value in info_of().items() if key != "encoder_digest"}
    with pytest.raises(ValueError, match=r"lacks \['encoder_digest'\]"):
        head_to_bytes(head, without)


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
    # In training a tenth of each hidden layer is dropped, and the rest is scaled up.
    published.train()
    share = (published.hidden(torch.randn(2000, 20)) == 0).float().mean().item()
    assert share == pytest.approx(0.1, abs=0.01)
    assert Formula(negative_slope=0.01, dropout=0.1, beta=20) == PUBLISHED
    assert formula_of("ours", "nb", 3) == Formula(loss="nb", ensemble=3)


def alone(head, member):
    """Return one member of an ensemble as a single head."""
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
        spread_from_hidden(head, hidden), each_KNG.std(0, correction=0), rtol=1e-4, atol=1e-6
    )
    assert (each_KNG[0] - each_KNG[1]).abs().max() > 0.01
    # The ensemble's loss is the sum of its members' losses, so gradients are equal.
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


def test_total_counts_have_their_mean_as_expression():
    head = MilHead(20, 2, formula=Formula(loss="nb_total"))
    with torch.no_grad():
        head.log_dispersion.copy_(torch.tensor([-1.0, 2.0]))
        x_ND = torch.randn(4, 20)
        expression = head.from_hidden(head.hidden(x_ND))
        distribution = torch.distributions.NegativeBinomial(head(x_ND), logits=head.log_dispersion)
    torch.testing.assert_close(expression, distribution.mean)
