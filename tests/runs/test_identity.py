"""Digests and keys are those of the first release: an old folder stays the run it was."""

from dataclasses import FrozenInstanceError, asdict, replace

import pytest

from scellst_ray import storage
from scellst_ray.runs import identity
from scellst_ray.runs.folder import begin_run
from scellst_ray.runs.identity import NetworkIdentity, RunIdentity
from scellst_ray.training.moco_loop import PretrainIdentity, Recipe

COMMON = {"core_px": 960, "halo_px": 32, "precision": "float32", "scellst_ray": "0.1.0"}
NONE = RunIdentity(
    networks=NetworkIdentity(encoder="none", embedding_dim=None),
    segmenter="hematoxylin",
    segmenter_version=2,
    read_mpp=None,
    core_px=960,
    halo_px=32,
    store_embeddings=False,
    precision="float32",
)
TOKENS = NetworkIdentity(
    encoder="tokens:sha256:ab", embedding_dim=384, segmenter_weights="sha256:ab"
)
CELLVIT = replace(
    NONE,
    networks=TOKENS,
    segmenter="cellvit",
    segmenter_version=1,
    read_mpp=0.25,
    store_embeddings=True,
)
PREDICT = replace(
    CELLVIT,
    networks=NetworkIdentity(
        encoder="random:3",
        embedding_dim=None,
        segmenter_weights="sha256:ab",
        segmenter_window_px=300,
        head="cd" * 32,
    ),
    read_mpp=0.2,
    store_embeddings=False,
    colours="of each slide",
)
PRETRAIN = PretrainIdentity(Recipe(), "ef" * 32, "random")
# What the first release wrote for the same settings.
STORED = {
    "none": {
        "job": "extract",
        "encoder": "none",
        "embedding_dim": None,
        "read_mpp": None,
        "segmenter": "hematoxylin",
        "segmenter_version": 2,
        "store_embeddings": False,
        **COMMON,
    },
    "cellvit": {
        "job": "extract",
        "encoder": "tokens:sha256:ab",
        "embedding_dim": 384,
        "read_mpp": 0.25,
        "segmenter": "cellvit",
        "segmenter_version": 1,
        "segmenter_weights": "sha256:ab",
        "segmenter_window_px": None,
        "store_embeddings": True,
        **COMMON,
    },
    "predict": {
        "job": "predict",
        "colours": "of each slide",
        "encoder": "random:3",
        "embedding_dim": None,
        "head": "cd" * 32,
        "read_mpp": 0.2,
        "segmenter": "cellvit",
        "segmenter_version": 1,
        "segmenter_weights": "sha256:ab",
        "segmenter_window_px": 300,
        "store_embeddings": False,
        **COMMON,
    },
}


@pytest.fixture(autouse=True)
def first_release(monkeypatch):
    monkeypatch.setattr(identity, "__version__", "0.1.0")


@pytest.mark.parametrize(
    ("job", "settings", "digest", "stored"),
    [
        ("extract", NONE, "ab54fc3b0ec72906", STORED["none"]),
        ("extract", CELLVIT, "9a1f5f7a2e2e5a61", STORED["cellvit"]),
        ("predict", PREDICT, "ada55327d8afd7ac", STORED["predict"]),
        ("pretrain", PRETRAIN, "e9c8f40577a1d79d", None),
    ],
    ids=["none", "cellvit", "predict", "pretrain"],
)
def test_run_json_is_that_of_the_first_release(tmp_path, job, settings, digest, stored):
    run = begin_run(str(tmp_path / "run"), job, settings)
    info = storage.read_json(f"{run.uri}/run.json")
    assert run.digest == info["digest"] == digest
    assert sorted(info) == ["checksum", "created", "digest", "format_version", "identity"]
    if stored is not None:
        assert info["identity"] == stored
    assert info["format_version"] == 1


@pytest.mark.parametrize("settings", [NONE, PREDICT])
def test_the_stored_fields_stand_for_the_settings(tmp_path, settings):
    run = begin_run(str(tmp_path / "run"), "predict", settings)
    assert begin_run(run.uri, "predict", settings.as_json()) == run
    with pytest.raises(ValueError, match="core_px: 960 in the folder, 5 now"):
        begin_run(run.uri, "predict", settings.as_json() | {"core_px": 5})


def test_every_field_decides():
    changes = {
        "segmenter": "imported",
        "segmenter_version": 9,
        "read_mpp": 0.3,
        "core_px": 480,
        "halo_px": 64,
        "store_embeddings": False,
        "precision": "bfloat16",
        "colours": "of each slide",
    }
    networks = {
        "encoder": "none",
        "embedding_dim": 7,
        "segmenter_weights": "sha256:cd",
        "segmenter_window_px": 100,
        "head": "h",
    }
    assert {*changes, "networks"} == set(asdict(CELLVIT))
    assert set(networks) == set(asdict(TOKENS))
    others = [replace(CELLVIT, **{name: value}) for name, value in changes.items()]
    others += [
        replace(CELLVIT, networks=replace(TOKENS, **{name: value}))
        for name, value in networks.items()
    ]
    digests = {identity.stored_identity("extract", other)[1] for other in [CELLVIT, *others]}
    assert len(digests) == 1 + len(others)


def test_an_identity_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        NONE.core_px = 480
