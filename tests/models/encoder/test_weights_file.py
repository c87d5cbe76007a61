"""Local paths of weights, by name, by name of the catalogue, and by URI."""

import hashlib
import json
from pathlib import Path

import fsspec
import pytest

from scellst_ray.models.encoder.weights_file import local_weights
from scellst_ray.models.weights.catalogue import CATALOGUE


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SCELLST_RAY_CACHE_DIR", str(tmp_path / "cache"))


@pytest.mark.parametrize("name", ["imagenet", "random:3", "random:3:resnet18", "timm:resnet10t"])
def test_names_of_encoders_stay_as_they_are(name):
    assert local_weights(name) == name


def test_names_of_the_catalogue_become_the_fetched_file():
    entry = CATALOGUE["resnet50-imagenet"]
    with pytest.raises(ValueError, match="run `scellst-ray models fetch resnet50-imagenet`"):
        local_weights(entry.name)
    entry.path.parent.mkdir(parents=True)
    entry.path.write_bytes(b"abc")  # fetched by the user's own digest
    lock = {"size": 3, "sha256": hashlib.sha256(b"abc").hexdigest()}
    entry.lock_path.write_text(json.dumps(lock))
    assert local_weights(entry.name) == str(entry.path)


def test_files_of_any_storage_become_local_paths(tmp_path):
    (tmp_path / "e.pth").write_bytes(b"local")
    assert local_weights(str(tmp_path / "e.pth")) == str(tmp_path / "e.pth")
    uri = f"memory://{tmp_path.name}/e.pth"
    with fsspec.open(uri, "wb") as handle:
        handle.write(b"remote")
    assert Path(local_weights(uri)).read_bytes() == b"remote"
