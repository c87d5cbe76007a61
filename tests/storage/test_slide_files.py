"""Slides of several objects come from a store as they lie on a disk."""

import zipfile

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

from scellst_ray.preflight.checks import size_of
from scellst_ray.slides.reader import Slide
from scellst_ray.storage import node_cache, slide_files
from scellst_ray.storage.node_cache import hold
from scellst_ray.storage.slide_files import names_in, series_in
from tests.support import cached
from tests.support.cached import copies, limit, use
from tests.support.dicom import dicom_level
from tests.support.object_server import serving
from tests.support.pictures import tissue

cache, put = cached.cache, cached.put  # fixtures
pytestmark = pytest.mark.usefixtures("cache")
IMAGE = tissue(400, 300)
LEVELS = {
    "a.dcm": dicom_level(IMAGE[::2, ::2], 1.0, 2),
    "b.dcm": dicom_level(IMAGE, 0.5, 1),
    "other.dcm": dicom_level(IMAGE, 0.5, 1, "1.2.826.0.1.7.2"),
}
WHOLE = (400, 300, 0.5, [1.0, 2.0])


@pytest.fixture
def store(put):
    """Put two levels of a slide and a file of another slide into one folder; return its URI."""
    for name, content in LEVELS.items():
        uri = put(f"flat/{name}", content)
    return uri.rsplit("/", 1)[0]


def facts(uri):
    with hold(uri) as held, Slide(held.path, held.name) as slide:
        return slide.width0, slide.height0, slide.mpp, slide._pixels.downsamples


@pytest.mark.parametrize("name", ["a.dcm", "b.dcm"])
def test_a_dicom_file_brings_its_series_and_no_more(store, name, cache):
    assert facts(f"{store}/{name}") == WHOLE
    assert copies(cache) == ["a.dcm", "b.dcm"]


def test_a_dicom_folder_is_a_slide(put, cache):
    for name in ("a.dcm", "b.dcm"):
        uri = put(f"slide/{name}", LEVELS[name])
    folder = uri.rsplit("/", 1)[0]
    assert facts(folder) == facts(f"{folder}/") == WHOLE
    assert "slide" in copies(cache)
    assert size_of(folder) == 0


def test_a_zip_archive_is_a_store(tmp_path):
    with zipfile.ZipFile(tmp_path / "store.zip", "w") as archive:
        for name in ("a.dcm", "b.dcm"):
            archive.writestr(f"slide/{name}", LEVELS[name])
    for name in ("a.dcm", "b.dcm"):
        assert facts(f"zip://slide/{name}::{tmp_path}/store.zip") == WHOLE


def test_a_level_that_changed_makes_another_slide(store, put):
    before = node_cache.fingerprint(f"{store}/b.dcm")
    assert node_cache.fingerprint(f"{store}/b.dcm") == before
    put("flat/a.dcm", dicom_level(IMAGE[::4, ::4], 2.0, 2))
    assert node_cache.fingerprint(f"{store}/b.dcm") != before
    assert facts(f"{store}/b.dcm") == (400, 300, 0.5, [1.0, 4.0])


def test_the_series_counts_and_goes_with_its_slide(store, put, cache, monkeypatch):
    num_bytes = len(LEVELS["a.dcm"]) + len(LEVELS["b.dcm"])
    limit(monkeypatch, num_bytes + 100)
    assert facts(f"{store}/a.dcm") == WHOLE
    use(put("x", b"x" * 200))
    assert copies(cache) == ["x"]


def test_headers_are_read_once(store, monkeypatch):
    heads = []
    read = MemoryFileSystem.cat_file

    def counted(self, path, **kwargs):
        heads.append(path)
        return read(self, path, **kwargs)

    monkeypatch.setattr(slide_files, "_KNOWN", {})
    monkeypatch.setattr(MemoryFileSystem, "cat_file", counted)
    for _ in range(3):
        assert facts(f"{store}/a.dcm") == WHOLE
    assert len(heads) == 3


def test_a_store_without_lists_is_told_of():
    with (
        serving({"a.dcm": LEVELS["a.dcm"]}) as (address, _),
        pytest.raises(OSError, match=r"a.dcm: this slide is several files, and its store does not"),
    ):
        hold(f"{address}/a.dcm")


def test_a_folder_of_very_many_files_is_refused(store, monkeypatch):
    monkeypatch.setattr(slide_files, "MOST_DICOM_FILES", 2)
    with pytest.raises(OSError, match=r"a.dcm: 3 DICOM files in its folder; put the files of each"):
        hold(f"{store}/a.dcm")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("s.zarr/.zattrs", "an OME-Zarr folder.*raw2ometiff --rgb"),
        ("s.zarr/b.png", "a folder; give"),
    ],
)
def test_other_folders_are_refused(put, name, reason):
    uri = put(name, b"{}").rsplit("/", 1)[0]
    with pytest.raises(IsADirectoryError, match=f"memory://.*s.zarr: {reason}"):
        hold(uri)


@pytest.mark.parametrize("suffix", ["vms", "vmu"])
def test_files_that_a_list_names_come_with_it(put, cache, suffix):
    lines = "[Specimen]\nImageFile=s_image.jpg\nMapFile=s_map.jpg\nOptimisationFile=gone\n"
    for name in ("s_image.jpg", "s_map.jpg", "unnamed.jpg"):
        put(name, b"jpeg")
    with hold(put(f"s.{suffix}", lines.encode())) as held:
        assert held.path.read_text() == lines
    assert copies(cache) == [f"s.{suffix}", "s_image.jpg", "s_map.jpg"]


def test_a_vms_slide_from_a_store(put, tmp_path):
    image = Image.fromarray(IMAGE)
    named = {"ImageFile": "i.jpg", "MapFile": "m.jpg", "MacroImage": "o.jpg"}
    for name in named.values():
        image.save(tmp_path / name, quality=90, restart_marker_rows=1)
        put(name, (tmp_path / name).read_bytes())
    values = {"NoLayers": 1, "NoJpegColumns": 1, "NoJpegRows": 1, **named}
    values |= {"PhysicalWidth": 200_000, "PhysicalHeight": 150_000, "SourceLens": 20}
    text = "\n".join(
        ["[Virtual Microscope Specimen]", *(f"{k}={v}" for k, v in values.items()), ""]
    )
    (tmp_path / "s.vms").write_text(text)
    with Slide(tmp_path / "s.vms") as slide:
        local = slide.width0, slide.height0, slide.mpp, slide._pixels.downsamples
    assert local[:3] == (400, 300, 0.5)
    assert facts(put("s.vms", text.encode())) == local


def test_series_and_lists_are_read_from_their_bytes():
    assert series_in(LEVELS["a.dcm"]) == b"1.2.826.0.1.7.1"
    assert series_in(b"DICM") is None
    assert names_in(b"[a]\nImageFile=x.jpg\nb=../y\nc=\n") == ["x.jpg"]
