"""Encoders: embeddings, files of this and other projects, and refused files."""

import os
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models import resnet18, resnet50

from scellst_ray.models.encoder.backbones import new_backbone
from scellst_ray.models.encoder.encoder import (
    Encoder,
    best_precision,
    embed_crops,
    encoder_digest,
    encoder_dim,
    encoder_header,
    load_encoder,
    save_encoder,
)
from scellst_ray.models.encoder.header import IMAGENET_MEAN, IMAGENET_STD
from tests.support.encoders import embed


def test_random_is_deterministic_and_leaves_torch_alone(crops, embedding):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    again = load_encoder("random:7")
    assert torch.rand(1) == expected
    assert again.digest == "random:7"
    np.testing.assert_array_equal(embed(again, crops), embedding)
    other = load_encoder("random:8")
    assert not np.allclose(embed(other, crops[:2]), embedding[:2])


def test_embeddings_tell_crops_apart_and_fit_float16(embedding):
    assert embedding.shape == (10, 2048)
    assert embedding.dtype == np.float16
    assert np.isfinite(embedding).all()
    assert embedding.astype(float).std(axis=0).max() > 0.01
    assert np.abs(embedding).max() < 1000


def test_equals_torchvision_on_normalised_images(crops, embedding):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        network = resnet50()
    for name, parameter in network.named_parameters():
        if name.endswith("bn3.weight"):
            nn.init.constant_(parameter, 0.2)
    network.fc = nn.Identity()
    scaled = (crops / 255 - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD)
    x_NCHW = torch.from_numpy(scaled.transpose(0, 3, 1, 2).astype(np.float32))
    with torch.no_grad():
        expected = network.eval()(x_NCHW).numpy()
    np.testing.assert_allclose(embedding, expected, rtol=2e-3, atol=2e-3)


def test_an_embedding_does_not_depend_on_what_follows(encoder, crops, embedding):
    for count in (4, 8):
        np.testing.assert_array_equal(embed(encoder, crops[:count]), embedding[:count])
    assert embed(encoder, crops[:0]).shape == (0, 2048)


def test_read_only_crops(encoder, crops, embedding):
    frozen = np.frombuffer(crops.tobytes(), np.uint8).reshape(crops.shape)
    np.testing.assert_array_equal(embed(encoder, frozen[:4]), embedding[:4])


def test_bfloat16_is_close_to_float32(encoder, crops, embedding):
    half = embed_crops(encoder, crops[:4], "cpu", "bfloat16", batch_size=4).astype(float)
    exact = embedding[:4].astype(float)
    assert np.abs(half - exact).mean() < 0.05 * np.abs(exact).mean()


@pytest.mark.parametrize(
    ("flags", "limit", "precision"),
    [
        ({"avx2": True}, "", "float32"),
        ({"avx512_bf16": True}, "", "bfloat16"),
        ({"amx_bf16": True}, "avx512_core_amx", "bfloat16"),
        ({"avx512_bf16": True, "amx_bf16": True}, "avx2", "float32"),
    ],
)
def test_the_precision_of_a_cpu_is_what_it_computes_natively(monkeypatch, flags, limit, precision):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert best_precision("cpu") == precision


def test_outputs_too_large_for_float16_are_refused(crops):
    class Huge(nn.Module):
        def forward(self, x_NCHW):
            return torch.full((len(x_NCHW), 2048), 1e6)

    huge = Encoder(Huge(), IMAGENET_MEAN, IMAGENET_STD, "huge", 2048)
    with pytest.raises(ValueError, match="not finite"):
        embed(huge, crops[:1])


def test_safetensors_round_trip_keeps_weights_and_normalisation(
    tmp_path, encoder, crops, embedding
):
    path = tmp_path / "e.safetensors"
    save_encoder(path, encoder.network, encoder.mean, encoder.std)
    loaded = load_encoder(str(path))
    np.testing.assert_array_equal(embed(loaded, crops[:4]), embedding[:4])
    assert loaded.digest.startswith("sha256:")
    assert loaded.digest == encoder_digest(str(path))

    save_encoder(path, encoder.network, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    other = load_encoder(str(path))
    assert (other.mean, other.std) == ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    assert other.digest != loaded.digest
    assert not np.array_equal(embed(other, crops[:4]), embedding[:4])


@pytest.mark.parametrize(
    ("prefix", "nested"),
    [
        ("", False),
        ("module.base_encoder.", True),
        ("module.", False),
        ("backbone.", True),
    ],
)
def test_checkpoints_of_others(tmp_path, encoder, crops, embedding, prefix, nested):
    state = {f"{prefix}{key}": value for key, value in encoder.network.state_dict().items()}
    if not prefix:  # as before torch 0.4.1
        state = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    if prefix == "module.base_encoder.":
        # MoCo v3 has a projector in place of the classifier, and the momentum encoder.
        state["module.base_encoder.fc.0.weight"] = torch.zeros(8, 2048)
        state |= {
            key.replace("base_encoder", "momentum_encoder"): torch.zeros_like(value)
            for key, value in state.items()
        }
    else:
        # A network for other classes.
        state[f"{prefix}fc.weight"], state[f"{prefix}fc.bias"] = torch.zeros(7, 2048), torch.ones(7)
    torch.save({"state_dict": state, "epoch": 3} if nested else state, tmp_path / "c.pth")
    loaded = load_encoder(str(tmp_path / "c.pth"))
    np.testing.assert_array_equal(embed(loaded, crops[:4]), embedding[:4])
    assert (loaded.mean, loaded.std) == (IMAGENET_MEAN, IMAGENET_STD)


def test_a_cut_file_of_torchs_old_format_is_refused_wherever_it_is_cut(tmp_path):
    state = {"conv1.weight": torch.zeros(4, 3, 7, 7), "bn1.weight": torch.ones(4)}
    path = tmp_path / "old.pth"
    torch.save(state, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    for end in range(0, len(content) - 1, 37):
        path.write_bytes(content[:end])
        with pytest.raises(ValueError, match=r"old\.pth: (cannot be read|not a ResNet-50)"):
            load_encoder(str(path))


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
def test_a_cut_file_is_refused(tmp_path, encoder, suffix, share):
    path = tmp_path / f"e.{suffix}"
    if suffix == "pth":
        torch.save(encoder.network.state_dict(), path)
    else:
        save_encoder(path, encoder.network, IMAGENET_MEAN, IMAGENET_STD)
    with path.open("rb+") as handle:
        handle.truncate(int(share * path.stat().st_size))
    with pytest.raises(ValueError, match=rf"e.{suffix}: cannot be read as weights.*cut off"):
        load_encoder(str(path))


class _Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_a_pickled_object_is_refused_and_never_run(tmp_path, monkeypatch, how):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "c.pth"
    if how == "torch":
        torch.save({"state_dict": _Bomb()}, path)
    else:
        path.write_bytes(pickle.dumps({"state_dict": _Bomb()}))
    with pytest.raises(ValueError, match=r"c.pth: cannot be read as weights"):
        load_encoder(str(path))
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    "content", [[1, 2], torch.zeros(3), {"state_dict": 5}, {"epoch": 3}, {1: torch.zeros(2)}]
)
def test_a_file_of_something_else_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "c.pth")
    with pytest.raises(ValueError, match=r"c.pth: (cannot be read|not a ResNet-50)"):
        load_encoder(str(tmp_path / "c.pth"))


def test_another_network_is_refused(tmp_path):
    torch.save(resnet18().state_dict(), tmp_path / "c.pth")
    with pytest.raises(ValueError, match=r"c.pth: not a ResNet-50.*tensors are missing.*conv"):
        load_encoder(str(tmp_path / "c.pth"))


def test_digests(tmp_path):
    assert encoder_digest("random:5") == "random:5"
    assert encoder_digest("imagenet") == "imagenet:IMAGENET1K_V2"
    (tmp_path / "w").write_bytes(b"abc")
    # The SHA-256 of "abc", from FIPS 180-2, appendix B.1.
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert encoder_digest(str(tmp_path / "w")) == f"sha256:{expected}"


@pytest.mark.parametrize(
    "name",
    [
        "resnet",
        "random:",
        "random:x",
        "random:-1",
        f"random:{2**63}",
        "random:٣",
        "no/such.pth",
        "",
    ],
)
def test_unknown_weights_name_what_there_is(name):
    with pytest.raises(ValueError, match=r"no such file; give a file, 'imagenet' or 'random:SEED'"):
        encoder_digest(name)


@pytest.mark.parametrize("arch", ["resnet18", "timm:test_resnet", "timm:test_vit"])
def test_other_architectures_are_saved_and_loaded(tmp_path, crops, arch):
    one = load_encoder(f"random:3:{arch}")
    provenance = {"slides": ["a", "b"], "num_cells": 7, "config": {"lr": 0.1}}
    path = tmp_path / "e.safetensors"
    mean, std = (0.5, 0.4, 0.3), (0.1, 0.2, 0.3)
    save_encoder(path, one.network, mean, std, arch=arch, provenance=provenance)
    header = encoder_header(str(path))
    assert (header.arch, header.provenance) == (arch, provenance)
    assert (header.mean, header.std, header.crop_um, header.crop_px) == (mean, std, 12.0, 48)
    loaded = load_encoder(str(path))
    embedding = embed(loaded, crops)
    assert embedding.shape == (10, loaded.dim) == (10, header.dim)
    assert loaded.dim == encoder_dim(str(path)) == encoder_dim(f"random:3:{arch}")
    np.testing.assert_array_equal(embedding, embed(replace(one, mean=mean, std=std), crops))
    assert embedding.astype(float).std(axis=0).max() > 0.01


def test_what_is_not_the_architecture_is_not_saved(tmp_path):
    path = tmp_path / "e.safetensors"
    network, _ = new_backbone("resnet18", 0)
    with pytest.raises(ValueError, match="not a ResNet-50"):
        save_encoder(path, network, IMAGENET_MEAN, IMAGENET_STD)
    with pytest.raises(ValueError, match="no architecture 'resnet'"):
        save_encoder(path, network, IMAGENET_MEAN, IMAGENET_STD, arch="resnet")
    assert not path.exists()
