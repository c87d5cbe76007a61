"""Fixtures and small words for tests of the node's cache."""

import os
from collections import namedtuple

import fsspec
import pytest

from scellst_ray.storage import cache_space, node_cache, retries
from scellst_ray.storage.node_cache import hold


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Return the cache's folder: a fresh one, without a bound, and quick to try again."""
    monkeypatch.setenv("SCELLST_RAY_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("SCELLST_RAY_CACHE_GB", "1")
    monkeypatch.setattr(retries, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(node_cache, "_PINNED", {})
    return tmp_path / "cache" / f"scellst_ray_cache_{os.getuid()}"


@pytest.fixture
def put(tmp_path):
    """Return a function that puts an object into memory and returns its URI."""

    def put_one(name, content):
        uri = f"memory://{tmp_path.name}/{name}"
        with fsspec.open(uri, "wb") as handle:
            handle.write(content)
        return uri

    return put_one


def copies(cache):
    """Return what lies in the cache, by name."""
    return sorted(path.name for path in (cache / "files").glob("*/*"))


def every(cache):
    """Return the content of all copies."""
    return [path.read_bytes() for path in (cache / "files").glob("*/*")]


def use(uri):
    """Read an object once and let it go."""
    with hold(uri) as held:
        return held.path.read_bytes()


def limit(monkeypatch, num_bytes):
    monkeypatch.setenv("SCELLST_RAY_CACHE_GB", str(num_bytes / 1e9))


def limit_disk(monkeypatch, free):
    """Pretend that the disk has `free()` bytes left."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(cache_space.shutil, "disk_usage", lambda _: usage(0, 0, free()))
