"""The `pretrain` job: what it refuses before Ray starts, and what it leaves behind."""

from dataclasses import replace

import numpy as np
import pytest
import ray
import torch

from scellst_ray import storage
from scellst_ray.commands.pretrain import ENCODER_FILE, pretrain_encoder
from scellst_ray.commands.training_configs import PretrainConfig
from scellst_ray.models.encoder.backbones import new_backbone
from scellst_ray.models.encoder.encoder import (
    embed_crops,
    encoder_header,
    load_encoder,
    save_encoder,
)
from scellst_ray.models.weights.digests import file_digest
from scellst_ray.runs.crop_store import open_store
from scellst_ray.runs.folder import begin_run
from tests.support.crop_runs import write_crop_run
from tests.support.run_folders import Settings

ARCH = "timm:test_resnet"


@pytest.fixture(scope="module")
def crops(tmp_path_factory):
    rng = np.random.default_rng(0)
    images = {s: rng.integers(0, 256, (n, 72, 72, 3), np.uint8) for s, n in (("a", 40), ("b", 15))}
    counts = {slide_id: len(crops) for slide_id, crops in images.items()}
    return write_crop_run(tmp_path_factory.mktemp("crops"), counts, images)


@pytest.fixture
def config(crops, tmp_path):
    return PretrainConfig(
        crops=[crops],
        out=str(tmp_path / "out"),
        arch=ARCH,
        batch=16,
        epochs=2,
        warmup_epochs=1,
        base_lr=0.1,
        projector_dim=16,
        out_dim=8,
        cpus_per_worker=1,
        precision="float32",
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs is 0; it must be at least 1"),
        ({"warmup_epochs": 2}, "fewer warm-up epochs than epochs"),
        ({"base_lr": 0.0}, "base_lr is 0.0"),
        ({"min_workers": 2}, "min_workers is 2; give at most workers, 1"),
        ({"temperature": 0.0}, "temperature is 0.0; it must be greater than 0"),
        ({"min_crop_scale": 0.0}, "min_crop_scale is 0.0; it must be greater than 0"),
        ({"crops_at_once": 1}, "crops_at_once is 1; it must be at least 2"),
    ],
)
def test_settings_that_cannot_work_are_refused(config, changes, message):
    with pytest.raises(ValueError, match=message):
        replace(config, **changes)


def test_what_cannot_be_trained_on_is_refused_before_ray_starts(config, tmp_path):
    cases = [
        (replace(config, crops=[str(tmp_path)]), "has no crops; run `scellst-ray extract`"),
        (replace(config, batch=64), "has 55 crops; give a smaller batch"),
        (replace(config, arch="resnet19"), "backbone is 'resnet19', expected one of resnet18"),
        (replace(config, init="nowhere.pt"), "nowhere.pt': no such file"),
    ]
    for wrong, message in cases:
        with pytest.raises(ValueError, match=message):
            pretrain_encoder(wrong)
    begin_run(config.out, "pretrain", Settings({"recipe": {"arch": "another"}}), {})
    with pytest.raises(ValueError, match="holds another run"):
        pretrain_encoder(config)
    other, _ = new_backbone("resnet18", 0)
    path = tmp_path / "other.safetensors"
    save_encoder(path, other, (0.5,) * 3, (0.2,) * 3, "resnet18")
    with pytest.raises(ValueError, match=r"weights are not those of arch timm:test_resnet"):
        pretrain_encoder(replace(config, out=str(tmp_path / "new"), init=str(path)))
    assert not ray.is_initialized()


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_pretraining_leaves_an_encoder_that_extract_can_read(config, tmp_path):
    begun, dim = new_backbone(ARCH, 7)
    init = tmp_path / "init.safetensors"
    save_encoder(init, begun, (0.5,) * 3, (0.2,) * 3, ARCH)
    config = replace(config, init=str(init))
    said = []
    info = pretrain_encoder(config, said.append)
    store = open_store(config.crops)
    path = f"{config.out}/{ENCODER_FILE}"
    header = encoder_header(path)
    assert (header.arch, header.dim, header.crop_um, header.crop_px) == (ARCH, dim, 12.0, 48)
    assert (header.mean, header.std) == (store.mean, store.std)
    assert header.provenance["slides"] == {"a": 40, "b": 15}
    assert header.provenance["crops_digest"] == store.digest
    assert header.provenance["recipe"]["batch"] == 16
    note = storage.read_json(f"{config.out}/encoder.json")
    sha256 = file_digest(storage.local_copy(path)).removeprefix("sha256:")
    assert note == {**header.provenance, "sha256": sha256}
    assert info["epoch"] in {1, 2}
    encoder = load_encoder(path)
    found = embed_crops(encoder, np.zeros((2, 48, 48, 3), np.uint8), "cpu", "float32")
    assert found.shape == (2, dim)
    # It has moved from the weights given.
    name = next(name for name, value in begun.state_dict().items() if value.ndim == 4)
    first, last = begun.state_dict()[name], encoder.network.state_dict()[name]
    assert not torch.equal(first, last)
    assert "55 crops of 2 slides; 3 steps of 16 an epoch" in said[0]
    again = []
    assert pretrain_encoder(config, again.append) == header.provenance
    assert "is finished; there is nothing to do" in again[0]
