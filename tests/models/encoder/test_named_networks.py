"""Encoders by name: random networks, and networks of timm."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torchvision.models import resnet18

from scellst_ray.models.encoder.encoder import (
    Encoder,
    encoder_digest,
    encoder_dim,
    load_encoder,
)
from scellst_ray.models.encoder.header import IMAGENET_MEAN, IMAGENET_STD
from scellst_ray.models.encoder.named_networks import WEIGHTS_ONLY
from tests.support.encoders import embed


def test_a_random_resnet18_equals_torchvisions(crops):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        network = resnet18()
    for name, parameter in network.named_parameters():
        if name.endswith("bn2.weight"):
            nn.init.constant_(parameter, 0.2)
    network.fc = nn.Identity()
    twin = Encoder(network.eval(), IMAGENET_MEAN, IMAGENET_STD, "twin", 512)
    ours = load_encoder("random:5:resnet18")
    assert (ours.dim, ours.digest) == (512, "random:5:resnet18")
    np.testing.assert_array_equal(embed(ours, crops), embed(twin, crops))


def test_names_that_mean_the_same_have_one_digest():
    assert encoder_digest("random:5:resnet50") == encoder_digest("random:5") == "random:5"
    assert encoder_dim("imagenet") == encoder_dim("random:5") == 2048


def timm_from_file(monkeypatch, tmp_path, name):
    """Let timm take its weights for `name` from a file, not from the hub; return the network."""
    network = timm.create_model(name, pretrained=False)
    path = tmp_path / "weights.pth"
    torch.save(network.state_dict(), path)
    create = timm.create_model

    def from_file(model_name, **settings):
        return create(model_name, pretrained_cfg_overlay={"file": str(path)}, **settings)

    monkeypatch.setattr(timm, "create_model", from_file)
    return network


def test_timms_pretrained_network_comes_with_its_normalisation(tmp_path, monkeypatch, crops):
    network = timm_from_file(monkeypatch, tmp_path, "test_resnet.r160_in1k")
    ours = load_encoder("timm:test_resnet")
    assert ours.digest.startswith("timm:test_resnet.r160_in1k:sha256:")
    assert encoder_digest("timm:test_resnet.r160_in1k") == ours.digest
    mean, std = network.pretrained_cfg["mean"], network.pretrained_cfg["std"]
    x_NCHW = torch.from_numpy(
        ((crops / 255 - np.array(mean)) / np.array(std)).transpose(0, 3, 1, 2).astype(np.float32)
    )
    network.eval()
    with torch.no_grad():
        expected = network.forward_head(network.forward_features(x_NCHW), pre_logits=True).numpy()
    assert ours.dim == expected.shape[1]
    np.testing.assert_allclose(embed(ours, crops), expected, rtol=2e-3, atol=2e-3)


def test_a_transformer_of_a_fixed_size_takes_our_crops(tmp_path, monkeypatch, crops):
    timm_from_file(monkeypatch, tmp_path, "test_vit.r160_in1k")
    ours = load_encoder("timm:test_vit")
    assert embed(ours, crops).shape == (10, ours.dim)
    assert encoder_dim("timm:test_vit") == ours.dim


def test_other_weights_under_timms_name_have_another_digest(tmp_path, monkeypatch):
    digests = set()
    for name in ("test_resnet.r160_in1k", "test_vit.r160_in1k"):
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            with monkeypatch.context() as patch:
                timm_from_file(patch, tmp_path, name)
                digests.add(encoder_digest(f"timm:{name}"))
    assert len(digests) == 4


def test_code_in_a_file_of_timm_is_not_run(tmp_path, monkeypatch):
    class Marker:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "marker",))

    timm_from_file(monkeypatch, tmp_path, "test_resnet.r160_in1k")
    torch.save({"conv1.weight": Marker()}, tmp_path / "weights.pth")
    load = torch.load
    # As releases of timm did that asked for everything in a file.
    monkeypatch.setattr(torch, "load", lambda *a, **k: load(*a, **k | {"weights_only": False}))
    with pytest.raises(ValueError, match="encoder timm:test_resnet: timm could not load its"):
        load_encoder("timm:test_resnet")
    assert not (tmp_path / "marker").exists()
    assert WEIGHTS_ONLY not in os.environ


def test_timm_without_weights_is_never_a_random_network(monkeypatch):
    create = timm.create_model

    def unreachable(name, **settings):
        if not settings["pretrained"]:
            return create(name, **settings)
        message = "no route to the hub"
        raise OSError(message)

    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(ValueError, match=r"could not load .*no route to the hub.*HF_HOME"):
        load_encoder("timm:test_resnet")


def test_timm_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    for name in ("timm:test_resnet", "random:1:timm:test_resnet"):
        with pytest.raises(ValueError, match="it needs the package timm: pip install timm"):
            encoder_digest(name)


@pytest.mark.parametrize("name", ["", "resnet18.nosuch_tag", "resnet_18"])
def test_a_name_timm_does_not_have(name):
    with pytest.raises(ValueError, match=rf"timm [\d.]+ has no network '{name}'"):
        encoder_digest(f"timm:{name}")
