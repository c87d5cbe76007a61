"""The catalogue of published weights, and the paths of their files."""

import hashlib
import json
import re
from pathlib import Path

import pytest
from torchvision.models import ResNet50_Weights

from scellst_ray.models.weights import catalogue
from scellst_ray.models.weights.catalogue import (
    CATALOGUE,
    cache_folder,
    find_published,
    is_catalogued,
    weights_path,
)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SCELLST_RAY_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


def write_sparse(path, size):
    """Make a sparse file of this size, which takes no disk space."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as handle:
        handle.truncate(size)


@pytest.mark.parametrize("name", CATALOGUE)
def test_entries_are_distinguished_from_files_and_checked(name):
    entry = CATALOGUE[name]
    assert re.fullmatch(r"[a-z0-9-]+", name)
    assert entry.url.startswith("https://")
    assert entry.source.startswith("https://")
    assert entry.file_name.endswith(".pth")
    assert re.fullmatch(r"[0-9a-f]{16,64}", entry.sha256)
    assert entry.size > 100_000_000
    assert entry.licence
    assert entry.what
    assert len({e.file_name for e in CATALOGUE.values()}) == len(CATALOGUE)


def test_the_resnet_is_the_one_of_torchvision():
    entry = CATALOGUE["resnet50-imagenet"]
    assert entry.url == ResNet50_Weights.IMAGENET1K_V2.url
    assert entry.file_name == f"resnet50-{entry.sha256[:8]}.pth"
    assert entry.size / 2**20 == pytest.approx(
        ResNet50_Weights.IMAGENET1K_V2.meta["_file_size"], abs=0.01
    )


def test_files_of_a_record_are_described_by_it():
    on_zenodo = [entry for entry in CATALOGUE.values() if "zenodo.org" in entry.url]
    assert len(on_zenodo) == 2
    for entry in on_zenodo:
        assert entry.url == f"{entry.source}/files/{entry.file_name}"
        assert entry.record == entry.source.replace("zenodo.org/", "zenodo.org/api/")


def test_the_folder_of_the_cache(monkeypatch, tmp_path):
    monkeypatch.delenv("SCELLST_RAY_CACHE_DIR", raising=False)
    monkeypatch.setattr(catalogue.Path, "home", lambda: Path("/home/someone"))
    assert cache_folder() == Path("/home/someone/.cache/scellst_ray/models")
    monkeypatch.setenv("SCELLST_RAY_CACHE_DIR", str(tmp_path / "here"))
    assert cache_folder() == tmp_path / "here" / "models"
    assert not (tmp_path / "here").exists()


@pytest.mark.parametrize("path", ["a.pth", "/data/cellvit-256-x40.pth", "s3://b/w.pth", ""])
def test_paths_stay_as_they_are(cache, path):
    assert not is_catalogued(path)
    assert weights_path(path) == path
    assert not cache.exists()


def test_names_become_the_cached_file(cache):
    name = "cellvit-256-x40"
    entry = find_published(name)
    assert is_catalogued(name)
    with pytest.raises(
        ValueError, match=f"does not exist on this node; run `scellst-ray models fetch {name}` on"
    ):
        weights_path(name)
    assert not entry.is_here
    write_sparse(entry.path, entry.size - 1)
    with pytest.raises(
        ValueError, match="has 187,226,631 bytes, expected 187,226,632; remove it and run"
    ):
        weights_path(name)
    write_sparse(entry.path, entry.size)
    assert entry.is_here
    with pytest.raises(ValueError, match=r"has the SHA-256 \w{64}, expected c58d356c92d3fd21; rem"):
        weights_path(name)
    # A file fetched by the user's own digest may have another size.
    content = b"nine byte"
    lock = {"size": 9, "sha256": hashlib.sha256(content).hexdigest()}
    entry.lock_path.write_text(json.dumps(lock))
    assert not entry.is_here
    entry.path.write_bytes(content)
    assert weights_path(name) == str(cache / "CellViT-256-x40-AMP.pth")
    entry.path.write_bytes(b"nine Byte")
    with pytest.raises(ValueError, match="has the SHA-256"):
        weights_path(name)


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("text", ["", "[]", "{}", '{"size": "x", "sha256": "0"}', "[" * 100_000])
def test_a_damaged_note_of_a_download_is_named(text):
    entry = find_published("cellvit-256-x40")
    write_sparse(entry.path, 5)
    entry.lock_path.write_text(text)
    with pytest.raises(ValueError, match=r"AMP\.pth\.json: damaged .*remove it and run"):
        weights_path("cellvit-256-x40")


def test_unknown_names():
    with pytest.raises(
        ValueError,
        match=r"weights 'cellvit-256' are unknown; expected one of .*mean 'cellvit-256-x40'",
    ):
        find_published("cellvit-256")
