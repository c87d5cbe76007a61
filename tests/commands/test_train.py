"""The `train` job: cells and spots in, a head out; or a refusal before Ray starts."""

import dataclasses
import hashlib
import json

import pytest
import torch

from scellst_ray.commands import train as train_module
from scellst_ray.commands.train import train
from scellst_ray.commands.training_configs import TrainConfig
from scellst_ray.models.mil.head import load_head
from scellst_ray.models.mil.head_file import Formula
from scellst_ray.runs.lease import LeaseError, hold_lease
from tests.support.small_run import DIM, IDENTITY, write_small_run


@pytest.fixture
def no_ray(monkeypatch):
    def refuse(**_):
        pytest.fail("Ray was started")

    monkeypatch.setattr("scellst_ray.commands.train.ray_session", refuse)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write_small_run(tmp_path_factory.mktemp("small"))


def config_of(small, out, **changes):
    settings = {"manifest": str(small.manifest), "cells": small.run.uri, "out": str(out)}
    return TrainConfig(**settings | {"genes": "variable:3"} | changes)


def test_two_drivers_do_not_write_one_head(small, tmp_path):
    with hold_lease(str(tmp_path)), pytest.raises(LeaseError, match="has held the lease"):
        train(config_of(small, tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_cells_and_spots_to_a_head(small, monkeypatch):
    monkeypatch.chdir(small.manifest.parent)
    said = []
    config = TrainConfig(
        manifest="manifest.csv",
        cells="run/",
        out="head",
        genes="variable:4",
        max_epochs=3,
        batch_spots=8,
        cpus_per_worker=1,
        gpus=False,
    )
    info = train(config, said.append)
    out = small.manifest.parent / "head"
    names = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    assert names == ["bags/s0.parquet", "bags/s1.parquet", "head.json", "head.safetensors"]
    head, stored = load_head(str(out / "head.safetensors"))
    note = json.loads((out / "head.json").read_text())
    content = (out / "head.safetensors").read_bytes()
    assert note.pop("sha256") == hashlib.sha256(content).hexdigest()
    assert stored == info == note
    assert (len(head.mean_D), len(info["genes"])) == (DIM, 4)
    assert (info["embedding_dim"], info["encoder"], info["encoder_digest"]) == (
        DIM,
        "random:0",
        "random:0",
    )
    assert info["training_slides"] == ["s0", "s1"]
    assert info["cells"] == IDENTITY
    assert info["config"] == dataclasses.asdict(config)
    assert {slide: len(scale) for slide, scale in info["scaling"].items()} == {"s0": 4, "s1": 4}
    assert info["num_spots"] > 20
    losses = info["metrics"]["validation_losses"]
    assert len(losses) == len(info["metrics"]["train_losses"]) == 3
    assert info["metrics"]["validation_loss"] == min(losses)
    assert losses[info["metrics"]["best_epoch"]] == min(losses)
    assert info["domain"]["held_out"] == {
        "s0": pytest.approx(1.0, abs=0.1),  # made alike
        "s1": pytest.approx(1.0, abs=0.1),
    }
    assert info["domain"]["limit"] == max(info["domain"]["held_out"].values())
    assert (head(torch.randn(4, DIM)) > 0).all()
    text = "\n".join(said)
    assert "panel of 4 genes" in text
    assert "s0: " in text
    assert "validation loss" in text


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_counts_to_an_ensemble(small, tmp_path):
    changes = {"loss": "nb", "predictor": "published", "ensemble": 2, "max_epochs": 2}
    config = config_of(small, tmp_path, cpus_per_worker=1, gpus=False, **changes)
    info = train(config, lambda _: None)
    head, stored = load_head(str(tmp_path / "head.safetensors"))
    assert head.formula == Formula(0.01, 0.1, 20.0, "nb", 2)
    assert stored["formula"] == dataclasses.asdict(head.formula) == info["formula"]
    assert head.last.weight.shape == (6, 256)
    assert info["config"]["loss"] == "nb"
    assert info["supervision"]["size_factors"]
    assert len(info["metrics"]["train_losses"]) == 2


@pytest.mark.usefixtures("no_ray")
def test_an_existing_head_is_kept(small, tmp_path):
    (tmp_path / "head.safetensors").write_bytes(b"precious")
    with pytest.raises(ValueError, match=r"there is a head already; give another --out"):
        train(config_of(small, tmp_path))
    assert (tmp_path / "head.safetensors").read_bytes() == b"precious"


@pytest.mark.usefixtures("no_ray")
def test_what_cannot_train_is_refused_before_ray_starts(small, tmp_path):
    bare = write_small_run(tmp_path / "bare", IDENTITY | {"store_embeddings": False})
    with pytest.raises(ValueError, match="no embeddings; extract with store_embeddings"):
        train(config_of(bare, tmp_path / "out"))
    with pytest.raises(ValueError, match=r"holds no run of scellst_ray; run `scellst-ray extract`"):
        train(config_of(small, tmp_path / "out", cells=str(tmp_path)))
    plain = tmp_path / "plain.csv"
    plain.write_text("slide_id,uri,spotz\ns0,s0.tiff,outs\n")
    with pytest.raises(
        ValueError, match=r"needed column\(s\) spots not found.*did you mean 'spotz'"
    ):
        train(config_of(small, tmp_path / "out", manifest=str(plain)))
    with pytest.raises(ValueError, match="s7 is not in the manifest"):
        train(config_of(small, tmp_path / "out", slides=["s0", "s7"]))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("workers", 0),
        ("patience", 0),
        ("val_share", 1.0),
        ("batch_spots", 0),
        ("max_failures", -1),
        ("ensemble", 0),
        ("loss", "zinb"),
        ("predictor", "theirs"),
    ],
)
def test_config_refuses_what_cannot_work(small, field, value):
    with pytest.raises(ValueError, match=field):
        config_of(small, "out", **{field: value})


def test_run_train_names_the_head(capsys, monkeypatch):
    monkeypatch.setattr(train_module, "train", lambda _, say: say("panel [a, b] of 2"))
    config = TrainConfig(manifest="m.csv", cells="c", out="heads/[1]")
    assert train_module.run_train(config) == 0
    assert capsys.readouterr().out == "panel [a, b] of 2\nhead: heads/[1]/head.safetensors\n"
