"""The file of 'imagenet' is found, verified or downloaded; nothing in it is ever run."""

import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torchvision.models import resnet50

from scellst_ray.models.encoder.encoder import encoder_digest, load_encoder
from scellst_ray.models.weights import imagenet
from scellst_ray.models.weights.digests import digests_of, file_digest
from scellst_ray.models.weights.fetch import Patience
from scellst_ray.models.weights.imagenet import find_imagenet, imagenet_path, torch_checkpoints
from tests.support.weights_server import serving


class Marker:
    """An object whose loading makes a file, if loading runs code."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Return the places of the file, in empty caches: of this project, and of torch."""
    monkeypatch.setenv("SCELLST_RAY_CACHE_DIR", str(tmp_path / "ours"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    both = (imagenet.ENTRY.path, torch_checkpoints() / imagenet.ENTRY.file_name)
    for path in both:
        path.parent.mkdir(parents=True)
    return both


@pytest.fixture
def published(tmp_path, monkeypatch):
    """Let a small file be the published one; return it."""
    path = tmp_path / "published.pth"
    torch.save({"a": torch.ones(3)}, path)
    digests = digests_of(path)
    entry = replace(imagenet.ENTRY, sha256=digests.sha256, size=digests.size)
    monkeypatch.setattr(imagenet, "ENTRY", entry)
    return path


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("content", ["other weights", "code", "legacy code", "cut off"])
def test_another_file_is_refused_and_nothing_in_it_is_run(places, tmp_path, which, content):
    path, marker = places[which], tmp_path / "marker"
    if content == "other weights":
        torch.save(resnet50().state_dict(), path)
    elif content == "code":
        torch.save({"conv1.weight": Marker(marker)}, path)
    elif content == "legacy code":
        path.write_bytes(pickle.dumps({"state_dict": Marker(marker)}))
    else:
        path.write_bytes(b"")
    for use in (load_encoder, encoder_digest):
        with pytest.raises(ValueError, match=r"not torchvision's published file.*Remove it") as e:
            use("imagenet")
        assert str(path) in str(e.value)
    assert not marker.exists()


def test_the_published_file_is_taken_from_either_cache(places, published):
    assert find_imagenet() is None
    for path in reversed(places):
        path.write_bytes(published.read_bytes())
        assert find_imagenet() == imagenet_path() == path
    assert encoder_digest("imagenet") == "imagenet:IMAGENET1K_V2"
    # One bit flips later: the file is read again.
    damaged = bytearray(published.read_bytes())
    damaged[100] ^= 1
    places[0].write_bytes(damaged)
    with pytest.raises(ValueError, match="is not torchvision's published file"):
        find_imagenet()


def test_a_missing_file_is_downloaded_and_verified(places, published, monkeypatch):
    content = published.read_bytes()
    with serving(content) as (url, _):
        entry = replace(imagenet.ENTRY, url=f"{url}/w.pth")
        monkeypatch.setattr(imagenet, "ENTRY", entry)
        assert imagenet_path() == entry.path == places[0].with_name("w.pth")
        assert file_digest(entry.path) == f"sha256:{entry.sha256}"
    entry.path.unlink()
    with serving(content[:-1] + b"x") as (url, _):
        monkeypatch.setattr(imagenet, "ENTRY", replace(entry, url=f"{url}/w.pth"))
        with pytest.raises(ValueError, match="the received file is not the expected one"):
            imagenet_path()
    assert not entry.path.exists()
    monkeypatch.setattr(imagenet, "ENTRY", replace(entry, url="http://127.0.0.1:9/w.pth"))
    with pytest.raises(ConnectionError) as caught:
        imagenet_path(Patience(tries=1, backoff_s=0))
    assert f"copy it to {entry.path}" in " ".join(caught.value.__notes__)


def test_the_folder_of_torch_is_where_torch_has_it(monkeypatch, tmp_path):
    for name in ("TORCH_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name in (None, "XDG_CACHE_HOME", "TORCH_HOME"):
        if name:
            monkeypatch.setenv(name, str(tmp_path / name))
        assert torch_checkpoints() == Path(torch.hub.get_dir()) / "checkpoints"
