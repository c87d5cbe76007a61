"""Files of encoders whose tensors cannot be are refused before anything is computed."""

import pytest
import torch
from safetensors.torch import save_file
from torchvision.models import resnet18

from scellst_ray.models.encoder.encoder import load_encoder, save_encoder
from scellst_ray.models.encoder.header import IMAGENET_MEAN, IMAGENET_STD, Header
from scellst_ray.models.encoder.read_weights import UNREADABLE, read_weights, value_problem


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(0)
    network = resnet18()
    network.fc = torch.nn.Identity()
    return network.state_dict()


def stored(path, state):
    header = Header("resnet18", 512)
    save_file({k: v.contiguous() for k, v in state.items()}, path, metadata=header.metadata())
    return str(path)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("conv1.weight", lambda v: v * torch.nan, "tensor conv1.weight holds NaN or infinity"),
        ("bn1.running_var", lambda v: v / 0, "tensor bn1.running_var holds NaN or infinity"),
        ("layer4.1.bn2.bias", lambda v: v.long(), "bn2.bias is int64, expected float32"),
        ("conv1.weight", lambda v: v[:1], "1 tensors are missing or have another shape"),
        ("conv1.weight", lambda v: v.unsqueeze(0), "1 tensors are missing or have another shape"),
    ],
)
def test_tensors_that_cannot_be_are_refused(tmp_path, state, name, change, words):
    path = stored(tmp_path / "e.safetensors", state | {name: change(state[name])})
    with pytest.raises(ValueError, match=words) as caught:
        load_encoder(path)
    assert path in str(caught.value)


def test_half_precision_becomes_float32(tmp_path, state):
    halves = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    network = load_encoder(stored(tmp_path / "e.safetensors", halves)).network
    assert {v.dtype for v in network.parameters()} == {torch.float32}


@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "module.base_encoder."])
def test_names_lose_the_prefix_of_other_projects(tmp_path, prefix):
    path = tmp_path / "c.pth"
    torch.save({"state_dict": {f"{prefix}conv1.weight": torch.zeros(2), "fc": 1}}, path)
    assert set(read_weights(path)) == {"conv1.weight"}


def test_a_checkpoint_of_two_networks_is_refused(tmp_path):
    path = tmp_path / "c.pth"
    torch.save({"conv1.weight": torch.zeros(2), "backbone.conv1.weight": torch.ones(2)}, path)
    with pytest.raises(UNREADABLE, match="several networks"):
        read_weights(path)
    with pytest.raises(ValueError, match=r"c\.pth: cannot be read as weights .it holds several"):
        load_encoder(str(path))


def test_a_declared_giant_in_torchs_old_format_is_named(tmp_path, monkeypatch):
    path = tmp_path / "c.pth"
    torch.save({"conv1.weight": torch.zeros(2)}, path)

    def out_of_memory(*_args, **_kwargs):
        raise MemoryError

    monkeypatch.setattr(torch, "load", out_of_memory)
    with pytest.raises(ValueError, match=r"c\.pth: cannot be read as weights"):
        load_encoder(str(path))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.ones(2).to_sparse(), "tensor a is sparse_coo"),
        (torch.ones(2, dtype=torch.complex64), "tensor a is complex64, expected float32"),
        (torch.ones(2, device="meta"), "tensor a is strided on meta"),
        (torch.tensor([1.0, -torch.inf]), "tensor a holds NaN or infinity"),
        (torch.ones(0), None),
        (torch.ones(2, dtype=torch.bfloat16), None),
    ],
)
def test_values_of_another_kind_are_named(value, words):
    found = value_problem({"a": value}, {"a": torch.ones(2)})
    assert found is None if words is None else found.startswith(words)


def test_a_diverged_encoder_is_not_written(tmp_path, state):
    network = resnet18()
    network.fc = torch.nn.Identity()
    network.load_state_dict(state)
    torch.nn.init.constant_(network.bn1.bias, torch.nan)
    with pytest.raises(ValueError, match=r"tensor bn1\.bias holds NaN"):
        save_encoder(tmp_path / "e.safetensors", network, IMAGENET_MEAN, IMAGENET_STD, "resnet18")
