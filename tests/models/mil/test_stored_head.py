"""Head files, and expression without torch against that with it."""

import json

import numpy as np
import pytest
import safetensors.torch
import torch

from scellst_ray.models.mil.head import (
    OURS,
    MilHead,
    formula_of,
    head_to_bytes,
    load_head,
    save_head,
    stored_hidden,
)
from scellst_ray.models.mil.head_file import HEAD_FORMAT, Formula
from scellst_ray.models.mil.stored_head import (
    expression_from_hidden,
    read_last_layer,
)
from tests.support.mil_heads import info_of, spread_from_hidden


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


@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_numpy_expression_from_stored_factor_equals_torch(head, scale):
    with torch.no_grad():
        head.last.weight *= scale
        stored = stored_hidden(head.hidden(3 * torch.randn(400, 20)))
        expected = head.from_hidden(stored).numpy()
    weight, bias = head.last.weight.detach().numpy(), head.last.bias.detach().numpy()
    found = expression_from_hidden(stored.numpy(), weight, bias)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    # A part of the genes and cells has the same numbers.
    part = expression_from_hidden(stored.numpy()[5:9], weight[[2, 0]], bias[[2, 0]])
    np.testing.assert_allclose(part, expected[5:9][:, [2, 0]], rtol=1e-5)


def test_numpy_softplus_at_its_extremes():
    hidden = np.array([[1.0]], np.float16)
    for z in (-80.0, -1e-4, 0.0, 15.0, 25.0, 3e4):
        found = expression_from_hidden(hidden, np.array([[z]], np.float32), np.zeros(1))
        expected = torch.nn.functional.softplus(torch.tensor(z, dtype=torch.float64))
        np.testing.assert_allclose(found, [[expected.item()]], rtol=1e-6)


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
        expected, spread = loaded.from_hidden(stored), spread_from_hidden(loaded, stored)
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


def test_wrong_and_cut_files_are_refused(head, tmp_path):
    path = tmp_path / "head"
    whole = head_to_bytes(head, info_of())
    for size in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=f"its {size} bytes are not a whole safetensors"):
            load_head(str(path))
    path.write_bytes(b"PK" + whole)
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_head(str(path))
    path.write_bytes(safetensors.torch.save({"conv1.weight": torch.zeros(3)}))
    with pytest.raises(ValueError, match=f"format None version None, expected '{HEAD_FORMAT}'"):
        load_head(str(path))
    with pytest.raises(ValueError, match="no such head"):
        load_head(str(tmp_path / "none"))


def test_other_version_and_other_tensors_are_refused(head, tmp_path):
    path = tmp_path / "head"
    metadata = {"format": HEAD_FORMAT, "format_version": "9", "info": json.dumps(info_of())}
    path.write_bytes(safetensors.torch.save(head.state_dict(), metadata=metadata))
    with pytest.raises(ValueError, match="version '9', expected"):
        load_head(str(path))
    state = head.state_dict() | {"layers.2.weight": torch.zeros(4, 4)}
    path.write_bytes(safetensors.torch.save(state, metadata=metadata | {"format_version": "1"}))
    with pytest.raises(ValueError, match=r"(?s)do not fit a MIL head.*layers\.2\.weight") as caught:
        load_head(str(path))
    assert str(path) in str(caught.value)
