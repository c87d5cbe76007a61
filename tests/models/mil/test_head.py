import json

import fsspec
import numpy as np
import pytest
import safetensors.torch
import torch

from scellst_ray.models.mil.bags import bag_mean
from scellst_ray.models.mil.head import (
    MilHead,
    head_to_bytes,
    instance_statistics,
    load_head,
    loss_sum,
    save_head,
    stored_hidden,
)
from scellst_ray.models.mil.stored_head import HEAD_FORMAT, expression_from_hidden


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


def loop_means(y_NG, offsets):
    rows = []
    for start, stop in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        total = torch.zeros(y_NG.shape[1], dtype=y_NG.dtype)
        for instance in range(start, stop):
            total = total + y_NG[instance]
        rows.append(total / (stop - start))
    return torch.stack(rows)


def test_bag_mean_and_its_gradient_equal_a_slow_loop():
    offsets = torch.tensor([0, 1, 4, 6, 13])
    y_NG = torch.randn(13, 5, dtype=torch.float64, requires_grad=True)
    twin = y_NG.detach().clone().requires_grad_()
    weight = torch.randn(4, 5, dtype=torch.float64)
    found, expected = bag_mean(y_NG, offsets), loop_means(twin, offsets)
    torch.testing.assert_close(found, expected)
    (found * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(y_NG.grad, twin.grad)


def test_bag_mean_does_not_depend_on_the_order_of_bags_or_instances():
    y_NG = torch.randn(9, 2)
    plain = bag_mean(y_NG, torch.tensor([0, 2, 9]))
    moved = bag_mean(torch.cat([y_NG[2:].flip(0), y_NG[:2].flip(0)]), torch.tensor([0, 7, 9]))
    torch.testing.assert_close(moved.flip(0), plain)


@pytest.mark.parametrize(
    ("offsets", "words"),
    [
        ([0, 2, 2, 4], r"bag 1 of 3 holds 0 instances"),
        ([0, 3, 2, 4], r"bag 1 of 3 holds -1"),
        ([0, 2, 3], r"go from \[0\] to \[3\], expected one-dimensional offsets from 0 to .* 4"),
        ([1, 4], r"go from \[1\]"),
    ],
)
def test_empty_bags_and_misfits_are_refused(offsets, words):
    with pytest.raises(ValueError, match=words):
        bag_mean(torch.ones(4, 2), torch.tensor(offsets))


def test_no_bags_give_no_rows_with_a_gradient():
    y_NG = torch.zeros(0, 3, requires_grad=True)
    means = bag_mean(y_NG * 2, torch.tensor([0]))
    assert means.shape == (0, 3)
    means.sum().backward()
    assert y_NG.grad is not None


def test_squared_errors_sum_over_spots(head):
    prediction, target = torch.randn(7, 3), torch.randn(7, 3)
    whole = loss_sum(head, prediction, target)
    torch.testing.assert_close(whole, torch.nn.functional.mse_loss(prediction, target) * 21)
    parts = [loss_sum(head, prediction[part::3], target[part::3]) for part in range(3)]
    torch.testing.assert_close(sum(parts), whole)
    assert loss_sum(head, prediction[:0], target[:0]) == 0


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
    # Any genes for any cells are the same numbers.
    part = expression_from_hidden(stored.numpy()[5:9], weight[[2, 0]], bias[[2, 0]])
    np.testing.assert_allclose(part, expected[5:9][:, [2, 0]], rtol=1e-5)


def test_numpy_softplus_at_its_extremes():
    hidden = np.array([[1.0]], np.float16)
    for z in (-80.0, -1e-4, 0.0, 15.0, 25.0, 3e4):
        found = expression_from_hidden(hidden, np.array([[z]], np.float32), np.zeros(1))
        expected = torch.nn.functional.softplus(torch.tensor(z, dtype=torch.float64))
        np.testing.assert_allclose(found, [[expected.item()]], rtol=1e-6)


def test_hidden_that_float16_cannot_hold_is_refused():
    with pytest.raises(ValueError, match=r"70000\.0 do not fit into float16"):
        stored_hidden(torch.tensor([[1.0, 70000.0]]))


@pytest.mark.parametrize("address", ["{tmp}/runs/a/head.safetensors", "memory://runs/head"])
def test_head_survives_a_file(head, tmp_path, address):
    path = address.format(tmp=tmp_path)
    head.standardise(torch.randn(50, 20))
    info = info_of(sampled_from="C2")
    save_head(path, head, info_of(metrics={}))
    save_head(path, head, info)  # over an older one
    loaded, found = load_head(path)
    assert found == info
    assert not loaded.training
    x_ND = torch.randn(6, 20)
    torch.testing.assert_close(loaded(x_ND), head(x_ND), rtol=0, atol=0)
    fs, target = fsspec.core.url_to_fs(path)
    assert len(fs.ls(target.rsplit("/", 1)[0])) == 1  # nothing partial is left
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
