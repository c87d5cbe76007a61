"""`predict` before any pixel is read: head and encoder must belong together."""

import logging

import pytest
import torch

from scellst_ray import storage
from scellst_ray.models.mil.head import MilHead, load_head, save_head
from scellst_ray.pipelines import predict as module
from scellst_ray.pipelines.predict import predict
from scellst_ray.runs.folder import RunFolder
from scellst_ray.stages.config import PredictConfig


@pytest.fixture
def head(tmp_path):
    """Return a folder as `train` leaves it."""
    torch.manual_seed(0)
    info = {
        "genes": ["A", "B"],
        "scaling": {},
        "embedding_dim": 8,
        "encoder_digest": "random:3",
        "encoder": "random:3",
        "training_slides": ["s"],
        "metrics": {},
        "cells": {"segmenter": "hematoxylin", "read_mpp": 0.25},
    }
    save_head(str(tmp_path / "head" / "head.safetensors"), MilHead(8, 2), info)
    return tmp_path / "head"


@pytest.fixture
def started(monkeypatch):
    """Return the list of runs that were started; none is."""
    calls = []

    def record(job, config, slides, networks, _, prepare):
        calls.append((job, config, networks.identity, networks.head_uri))
        prepare(RunFolder(storage.absolute(config.out), "d1g"))
        return {slide.slide_id: {} for slide in slides}

    monkeypatch.setattr(module, "run_cells", record)
    return calls


def config_of(folder, head, **changes):
    (folder / "manifest.csv").write_text("slide_id,uri\ns,s.tiff\n")
    settings = {"manifest": str(folder / "manifest.csv"), "out": str(folder / "run")}
    return PredictConfig(**settings | {"head": str(head), "read_mpp": 0.25} | changes)


def test_another_encoder_than_the_head_was_trained_with_is_refused(tmp_path, head, started):
    with pytest.raises(ValueError, match=r"embeddings of random:3, and encoder 'random:4' is"):
        predict(config_of(tmp_path, head, encoder="random:4"))
    assert started == []
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["nothing", "nothing.safetensors"])
def test_missing_head(tmp_path, started, name):
    with pytest.raises(ValueError, match=rf"{name}.*no such head; give the folder or file"):
        predict(config_of(tmp_path, tmp_path / name))
    assert started == []


def test_cut_head(tmp_path, head, started):
    file = head / "head.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        predict(config_of(tmp_path, head))
    assert started == []


def test_a_head_that_is_not_that_of_the_note_beside_it(tmp_path, head, started):
    (head / "head.json").write_text('{"sha256": "0123456789abcdef"}')
    with pytest.raises(
        ValueError, match=r"head\.safetensors: its SHA-256 is .*replaced or damaged"
    ):
        predict(config_of(tmp_path, head))
    assert started == []


@pytest.mark.usefixtures("head")
@pytest.mark.parametrize("given", ["head", "head/head.safetensors"])
def test_the_run_takes_the_heads_encoder_and_a_copy_of_the_head(
    tmp_path, started, caplog, monkeypatch, given
):
    monkeypatch.chdir(tmp_path)
    with caplog.at_level(logging.WARNING):
        records = predict(config_of(tmp_path, given, out="run"))
    assert list(records) == ["s"]
    [(job, config, identity, head_uri)] = started
    assert (job, config.encoder, identity.encoder) == ("predict", "random:3", "random:3")
    assert len(identity.head) == 64
    # What workers are given means the same in any folder.
    assert head_uri == str(tmp_path / "run" / "head.safetensors")
    assert load_head(head_uri)[1]["genes"] == ["A", "B"]
    assert caplog.records == []


def test_cells_cut_out_otherwise_than_in_training_are_warned_of(tmp_path, head, started, caplog):
    with caplog.at_level(logging.WARNING):
        predict(config_of(tmp_path, head, read_mpp=0.5))
    assert caplog.messages == ["read_mpp is 0.5, but the head was trained with 0.25"]
    assert len(started) == 1


def test_a_head_that_does_not_say_how_cells_were_cut_out_is_not_warned_of(tmp_path, head, started):
    file = str(head / "head.safetensors")
    network, info = load_head(file)
    save_head(file, network, info | {"cells": {}})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.logger, "warning", pytest.fail)
        predict(config_of(tmp_path, head))
    assert len(started) == 1
