from pathlib import Path

import numpy as np
import pytest

from scellst_ray import storage
from scellst_ray.runs.crop_files import ROW_GROUP, index_uri
from scellst_ray.runs.crop_store import colours_by_slide, open_store
from tests.support.crop_runs import numbers_of, read_crops, write_crop_run

COUNTS = {"s1": 300, "s0": 7, "s2": ROW_GROUP}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_crop_run(tmp_path_factory.mktemp("crops"), COUNTS)


def test_a_store_says_what_it_has(run):
    store = open_store([run])
    assert store.num_crops == sum(COUNTS.values())
    assert store.slides == COUNTS
    assert list(store.slides) == ["s0", "s1", "s2"]
    assert (store.crop_um, store.crop_px) == (18.0, 72)


def test_the_statistics_are_those_of_all_centres(tmp_path):
    rng = np.random.default_rng(1)
    flat = [np.full((n, 72, 72, 3), rng.integers(0, 256, 3), np.uint8) for n in (30, 5)]
    noisy = rng.integers(0, 256, (9, 72, 72, 3), np.uint8)
    uris = [
        write_crop_run(tmp_path / "a", {"x": 30, "y": 5}, dict(zip("xy", flat, strict=True))),
        write_crop_run(tmp_path / "b", {"z": 9}, {"z": noisy}),
    ]
    store = open_store(uris)
    centres = np.concatenate([*flat, noisy])[:, 12:60, 12:60].reshape(-1, 3) / 255
    np.testing.assert_allclose(store.mean, centres.mean(axis=0))
    np.testing.assert_allclose(store.std, centres.std(axis=0))
    turned = open_store(uris[::-1])
    assert turned.digest == store.digest
    assert turned.files == store.files


def test_each_slide_has_its_own_colours(tmp_path):
    rng = np.random.default_rng(4)
    images = {
        "a": rng.integers(0, 256, (5, 72, 72, 3), np.uint8),
        "b": rng.integers(90, 110, (3, 72, 72, 3), np.uint8),
    }
    write_crop_run(tmp_path, {name: len(crops) for name, crops in images.items()}, images)
    found = colours_by_slide(str(tmp_path))
    assert set(found) == {"a", "b"}
    with pytest.raises(ValueError, match="has no crops"):
        colours_by_slide(str(tmp_path / "elsewhere"))
    for slide_id, (mean, std) in found.items():
        centres = images[slide_id][:, 12:60, 12:60].reshape(-1, 3) / 255
        np.testing.assert_allclose(mean, centres.mean(0), rtol=1e-12)
        np.testing.assert_allclose(std, centres.std(0), rtol=1e-9)


def test_the_digest_is_that_of_the_content(run, tmp_path):
    same = write_crop_run(tmp_path / "same", COUNTS)
    other = write_crop_run(tmp_path / "other", COUNTS | {"s0": 8})
    digest = open_store([run]).digest
    assert open_store([same]).digest == digest
    assert open_store([other]).digest != digest


def test_reading_some_crops(run):
    store = open_store([run])
    crops = read_crops(store)
    assert numbers_of(crops.images_NHWC).tolist() == crops.cell_id.tolist()
    assert sorted(crops.cell_id) == list(range(store.num_crops))
    assert set(crops.nucleus_type) == {"a", "b"}
    few = read_crops(store, ["s2", "s0"], per_slide=9)
    assert few.slide_id.tolist() == ["s2"] * 9 + ["s0"] * 7
    assert few.cell_id.tolist() == [*range(307, 316), *range(300, 307)]
    assert numbers_of(few.images_NHWC).tolist() == few.cell_id.tolist()
    assert read_crops(store, []).images_NHWC.shape == (0, 72, 72, 3)
    with pytest.raises(ValueError, match=r"slides \['s9'\]; choose from those of the store"):
        read_crops(store, ["s9"])


def test_what_is_no_store_is_refused(run, tmp_path):
    with pytest.raises(ValueError, match=r"has no crops; run `scellst-ray extract` with --crops"):
        open_store([run, str(tmp_path)])
    storage.publish_json(str(tmp_path / "crops" / "set" / "set.json"), {})
    with pytest.raises(ValueError, match=r"not finished; run the same"):
        open_store([str(tmp_path)])
    twice = write_crop_run(tmp_path / "twice", {"s0": 3})
    with pytest.raises(ValueError, match=r"twice: has crops of slide 's0', and so has another"):
        open_store([run, twice])
    with pytest.raises(ValueError, match="none: no crops; give runs that found cells"):
        open_store([write_crop_run(tmp_path / "none", {})])
    index = storage.read_json(index_uri(twice))
    storage.publish_json(index_uri(twice), index | {"format_version": 99})
    with pytest.raises(ValueError, match="format_version is 99; this release reads 1"):
        open_store([twice])


def test_keys_of_later_releases_are_passed_over(tmp_path):
    uri = write_crop_run(tmp_path, {"s": 20})
    before, colours = open_store([uri]), colours_by_slide(uri)
    index = storage.read_json(index_uri(uri))
    (file,) = before.files
    slide = index["slides"]["s"]
    slide["file"] = storage.stamp_of(Path(file.uri)).as_json() | {"of_tomorrow": 1}
    slide["centre"] = slide["centre"] | {"of_tomorrow": [1]}
    storage.publish_json(index_uri(uri), {k: v for k, v in index.items() if k != "checksum"})
    after = open_store([uri])
    np.testing.assert_array_equal([after.mean, after.std], [before.mean, before.std])
    assert after.digest == before.digest
    assert after.files[0].stamp == storage.stamp_of(Path(file.uri))
    assert colours_by_slide(uri) == colours


def test_a_file_that_changed_is_refused(tmp_path):
    store = open_store([write_crop_run(tmp_path, {"s": 20})])
    write_crop_run(tmp_path, {"s": 21})
    with pytest.raises(ValueError, match="holds 21 crops, and held 20 when"):
        read_crops(store)
    storage.remove_tree(store.files[0].uri)
    with pytest.raises(FileNotFoundError):
        read_crops(store)


def test_a_store_on_object_storage(run):
    for name in ("crops/crops.json", *(f"crops/set/{slide_id}.parquet" for slide_id in COUNTS)):
        content = (Path(run) / name).read_bytes()
        fs, path = storage.resolve(f"memory://crop_store/{name}")
        fs.pipe_file(path, content)
    remote, local = open_store(["memory://crop_store"]), open_store([run])
    assert remote.digest == local.digest
    crops = read_crops(remote, per_slide=150)
    np.testing.assert_array_equal(crops.images_NHWC, read_crops(local, None, 150).images_NHWC)
