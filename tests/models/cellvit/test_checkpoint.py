"""Checkpoints: every published form is read; the refusal of another file names these."""

import hashlib
import os
import pickle
import re

import numpy as np
import pytest
import torch
from torchvision.models import resnet18

from scellst_ray.models.cellvit.checkpoint import LEGACY_START, cellvit_digest, load_cellvit
from tests.support.cellvit_weights import (
    PANNUKE,
    hollow_state,
    make_checkpoint,
    make_config,
    make_state,
    write_checkpoint,
)


def hollow(variant="256", type_names=PANNUKE, **options):
    """Return a checkpoint whose tensors have the right shapes and take no memory."""
    state = hollow_state(variant, len(type_names))
    return make_checkpoint(variant, type_names, state=state, **options)


@pytest.fixture
def load(tmp_path):
    """Return a function that saves a checkpoint and loads it."""

    def save_and_load(checkpoint):
        torch.save(checkpoint, tmp_path / "c.pth")
        return load_cellvit(tmp_path / "c.pth")

    return save_and_load


def check_whole(model, path):
    expected = make_state()
    found = model.network.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert not model.network.training
    assert not any(parameter.requires_grad for parameter in model.network.parameters())
    assert model.arch.variant == "256"
    assert model.type_names == PANNUKE
    assert model.mean == model.std == (0.5, 0.5, 0.5)
    assert model.mixed_precision
    assert model.digest == cellvit_digest(path)


def test_the_release_form_is_loaded(tmp_path):
    path = write_checkpoint(tmp_path / "c.pth")
    check_whole(load_cellvit(str(path)), path)
    assert cellvit_digest(path) == f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"


def test_the_training_form_of_a_wrapped_network_is_loaded(tmp_path):
    path = write_checkpoint(tmp_path / "c.pth", training=True, prefix="module.")
    assert len(torch.load(path, weights_only=False, mmap=True)) == 12
    check_whole(load_cellvit(path), path)


def test_the_older_file_format_is_loaded(tmp_path):
    checkpoint = hollow(training=True)
    torch.save(checkpoint, tmp_path / "c.pth", _use_new_zipfile_serialization=False)
    assert (tmp_path / "c.pth").read_bytes().startswith(LEGACY_START)
    model = load_cellvit(tmp_path / "c.pth")
    assert torch.equal(
        model.network.state_dict()["encoder.norm.weight"],
        checkpoint["model_state_dict"]["encoder.norm.weight"],
    )


@pytest.mark.parametrize("variant", ["256", "SAM-B", "SAM-L", "SAM-H"])
def test_every_variant_is_recognised(load, variant):
    model = load(hollow(variant))
    assert model.arch.variant == variant
    assert model.network.arch == model.arch


@pytest.mark.parametrize("name", ["DataParallel", "DistributedDataParallel"])
def test_a_wrapper_in_the_name_of_the_network_is_seen_through(load, name):
    assert load(hollow("SAM-B", prefix="module.") | {"arch": name}).arch.variant == "SAM-B"


@pytest.mark.parametrize(
    "scalar", [np.float32(0.5), np.float64(0.5), np.int64(3), float("nan"), None]
)
def test_plain_numbers_of_training_do_not_matter(load, scalar):
    assert load(hollow(training=True) | {"best_metric": scalar}).type_names == PANNUKE


def test_scalars_that_an_older_numpy_wrote_are_read(tmp_path):
    torch.save(hollow(training=True), tmp_path / "new.pth", _use_new_zipfile_serialization=False)
    content = (tmp_path / "new.pth").read_bytes()
    renamed = content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert renamed != content
    (tmp_path / "old.pth").write_bytes(renamed)
    assert load_cellvit(tmp_path / "old.pth").mixed_precision


def test_the_configuration_may_be_text_nested_or_silent(load):
    checkpoint = hollow(type_names=("background", "b", "c"))
    config = {
        "data": {"num_nuclei_classes": "3", "num_tissue_classes": "19"},
        "model": {"backbone": "vit256"},
        "training": {"mixed_precision": "False"},
        "transformations": {"normalize": {"mean": "[0.1, 0.2, 0.3]", "std": (1, 2, 3)}},
        "dataset_config": {"nuclei_types": {"c": "2", "b": "1", "background": "0"}},
    }
    model = load(checkpoint | {"config": config})
    assert model.type_names == ("background", "b", "c")
    assert model.mean == (0.1, 0.2, 0.3)
    assert model.std == (1.0, 2.0, 3.0)
    assert not model.mixed_precision
    silent = load(hollow() | {"config": {}})
    assert (silent.type_names, silent.mean, silent.std) == (PANNUKE, (0.5,) * 3, (0.5,) * 3)
    assert not silent.mixed_precision


@pytest.mark.parametrize("entries", [{}, {"model.regression_loss": "True"}])
def test_a_regression_head_is_recognised(load, entries):
    state = hollow_state(regression_loss=True)
    checkpoint = make_checkpoint(state=state)
    model = load(checkpoint | {"config": make_config() | entries})
    with torch.inference_mode():
        maps = model.network(torch.zeros(1, 3, 16, 16))
    assert maps.regression_map.shape == (1, 2, 16, 16)


def test_weights_of_another_precision_become_float32(load):
    head = "decoder0.0.block.0.bias"
    model = load(make_checkpoint(state=hollow_state() | {head: torch.ones(32).double()}))
    assert {p.dtype for p in model.network.parameters()} == {torch.float32}


def changed(state=None, config=None, **parts):
    """Return a checkpoint with tensors or configuration entries replaced; None drops an entry."""
    checkpoint = hollow() | parts
    for name, changes in (("model_state_dict", state), ("config", config)):
        whole = {**checkpoint[name], **(changes or {})}
        checkpoint[name] = {key: value for key, value in whole.items() if value is not None}
    return checkpoint


HEAD = "nuclei_type_maps_decoder.decoder0_header.2"
TYPES = "dataset_config.nuclei_types"
REFUSED = {
    "a class that is not supported": (
        changed(arch="CellViTUNI"),
        "the network is a 'CellViTUNI', which is not supported; expected CellViT-256, CellViT-SAM",
    ),
    "a classifier": (changed(arch="LinearClassifier"), "a 'LinearClassifier', which is not supp"),
    "another class of the two": (
        changed(arch="CellViTSAM"),
        "arch is 'CellViTSAM', but the tensors are those of CellViT-256",
    ),
    "another backbone": (
        changed(config={"model.backbone": "SAM-B"}),
        "model.backbone is 'SAM-B', but the tensors are those of 'ViT256'",
    ),
    "another depth": (
        changed(state={f"encoder.blocks.12.{k}": torch.zeros(384) for k in ("norm1.weight",)}),
        "an encoder of 13 blocks and width 384 is none of CellViT-256, CellViT-SAM-B",
    ),
    "no encoder": (
        changed(model_state_dict={"a": torch.zeros(2)}),
        "an encoder of 0 blocks and width 0 is none of CellViT-256",
    ),
    "another number of types than configured": (
        changed(config={"data.num_nuclei_classes": "5"}),
        "data.num_nuclei_classes is 5, but the network's last layer has 6",
    ),
    "another number of tissues than configured": (
        changed(config={"data.num_tissue_classes": 18}),
        "data.num_tissue_classes is 18, but the network's last layer has 19",
    ),
    "a number that is no number": (
        changed(config={"data.num_nuclei_classes": "six"}),
        "data.num_nuclei_classes is 'six'; expected an integer",
    ),
    "a regression head that is configured and missing": (
        changed(config={"model.regression_loss": True}),
        "model.regression_loss is True, but the binary map's last layer has 2 channels",
    ),
    "too many types": (
        changed(
            state={f"{HEAD}.weight": torch.zeros(65, 64, 1, 1), f"{HEAD}.bias": torch.zeros(65)},
            config={"data.num_nuclei_classes": 65},
        ),
        "65 nucleus types; expected 2 to 64, background included",
    ),
    "a type without a name": (
        changed(config={f"{TYPES}.Dead": None}),
        "'Connective': 3, 'Epithelial': 5}; expected a name for each of 0 to 5, with Background 0",
    ),
    "two names of a type": (changed(config={f"{TYPES}.Dying": 4}), "expected a name for each of"),
    "another background": (
        changed(config={f"{TYPES}.Background": 1, f"{TYPES}.Neoplastic": 0}),
        "expected a name for each of 0 to 5, with Background 0",
    ),
    "a tensor missing": (
        changed(
            state={"decoder3.0.block.1.bias": None, "hv_map_decoder.decoder0_header.2.bias": None}
        ),
        "tensors differ from the 439 of CellViT-256: 2 missing (decoder3.0.block.1.bias, ...)",
    ),
    "a tensor too many": (
        changed(state={"decoder9.weight": torch.zeros(1)}),
        "tensors differ from the 439 of CellViT-256: 1 unknown (decoder9.weight, ...)",
    ),
    "a tensor of another shape": (
        changed(state={"decoder0.0.block.0.bias": torch.zeros(31)}),
        "1 misshapen (decoder0.0.block.0.bias: [31], expected [32])",
    ),
    "not three numbers": (
        changed(config={"transformations.normalize.mean": [0.5, 0.5]}),
        "transformations.normalize.mean is [0.5, 0.5]; expected three numbers",
    ),
    "a standard deviation of 0": (
        changed(config={"transformations.normalize.std": [0.5, 0, 0.5]}),
        "transformations.normalize.std is (0.5, 0.0, 0.5); expected numbers above 0",
    ),
    "an incomplete checkpoint": (
        {"arch": "CellViT256", "epoch": 3},
        "expected a dict with arch, model_state_dict, config; found arch, epoch",
    ),
    "a ResNet": (
        resnet18().state_dict(),
        "expected a dict with arch, model_state_dict, config; found conv1.weight, bn1.weight",
    ),
    "an empty dict": ({}, "expected a dict with arch, model_state_dict, config; found an empty"),
    "a tensor": (
        torch.zeros(2),
        "expected a dict with arch, model_state_dict, config; found a Ten",
    ),
    "a state that is no dict": (
        hollow() | {"model_state_dict": [1]},
        "model_state_dict is a list; expected a dict of tensors",
    ),
    "a state of numbers": (
        changed(model_state_dict={"a": 1}),
        "model_state_dict is a dict; expected a dict of tensors",
    ),
    "a configuration that is no dict": (hollow() | {"config": "x"}, "config is a str; expected"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_anything_else_is_refused_with_what_was_expected(load, case):
    checkpoint, expected = REFUSED[case]
    with pytest.raises(ValueError, match=rf"CellViT checkpoint .*c.pth: .*{re.escape(expected)}"):
        load(checkpoint)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
def test_a_cut_file_is_refused(tmp_path, zipped, share):
    path = tmp_path / "c.pth"
    torch.save(hollow(), path, _use_new_zipfile_serialization=zipped)
    with path.open("rb+") as handle:
        handle.truncate(int(share * path.stat().st_size))
    expected = "is no torch file" if share == 0.0 else "is cut off"
    with pytest.raises(ValueError, match=rf"c.pth: the file {expected}"):
        load_cellvit(path)


class _Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize("how", ["zip", "legacy", "pickle"])
def test_a_file_with_code_in_it_is_refused_and_its_code_not_run(tmp_path, monkeypatch, how):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "c.pth"
    checkpoint = hollow() | {"best_metric": _Bomb()}
    if how == "pickle":
        path.write_bytes(pickle.dumps(checkpoint))
        expected = r"is no torch file"
    else:
        torch.save(checkpoint, path, _use_new_zipfile_serialization=how == "zip")
        expected = r"holds Python objects \(posix.mkdir\) whose loading would run code; not opened"
    with pytest.raises(ValueError, match=rf"c.pth: the file {expected}"):
        load_cellvit(path)
    assert not (tmp_path / "exploded").exists()
    torch.load(path, weights_only=False) if how != "pickle" else pickle.loads(path.read_bytes())
    assert (tmp_path / "exploded").exists(), "the code would have run"


def test_an_object_array_is_not_taken_for_a_number(load):
    with pytest.raises(ValueError, match=r"c.pth: the file holds Python objects \(numpy"):
        load(hollow() | {"best_metric": np.array([1, 2])})


@pytest.mark.parametrize("content", [b"", b"abc", b"PK\x03\x04" + b"\0" * 100])
def test_a_file_of_something_else_is_refused(tmp_path, content):
    (tmp_path / "c.pth").write_bytes(content)
    with pytest.raises(ValueError, match=r"c.pth: the file is (no torch file|cut off: it starts)"):
        load_cellvit(tmp_path / "c.pth")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"CellViT checkpoint .*none.pth: no such file; give"):
        load_cellvit(tmp_path / "none.pth")
