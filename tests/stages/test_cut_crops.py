"""Crops cut by windows are those cut one by one, and their centres are what `extract` embeds."""

import os

import numpy as np
import pyarrow as pa
import pytest

from scellst_ray import storage
from scellst_ray.core.geometry import Box
from scellst_ray.nuclei.crops import crop_nuclei
from scellst_ray.runs.crop_files import NO_CUTOFF, CropSample, decode_into, encode, file_uri
from scellst_ray.runs.crop_store import CropFile, CropStore
from scellst_ray.runs.folder import RunFolder
from scellst_ray.slides.reader import Slide
from scellst_ray.slides.source import ChangedFileError
from scellst_ray.stages import cut_crops
from scellst_ray.stages.cut_crops import CropSet, candidates, cut_slide, cut_window, windows
from scellst_ray.stages.find import FindNuclei
from scellst_ray.stages.plan_slide import plan_slide
from scellst_ray.stages.read import Read
from scellst_ray.stages.tiles import CellsSpec
from scellst_ray.storage import node_cache
from tests.support.crop_runs import read_crops, write_cells


def crop_row(slide, read_mpp, source=None):
    """Return a slide as `cut_slide` takes it."""
    row = {"slide_id": "s", "uri": str(slide), "mpp": 0.5}
    return row | {"read_mpp": read_mpp, "source": source}


def crops_of(run, record):
    """Return what a record's file holds."""
    slide_id, num = record["slide_id"], record["num_crops"]
    file = CropFile(slide_id, file_uri(run.uri, "set", slide_id), num, 128)
    store = CropStore((), num, (), (), 18.0, 72, "", {slide_id: num}, {}, (file,))
    return read_crops(store)


@pytest.fixture
def run(tmp_path):
    return RunFolder(str(tmp_path / "run"), "0123456789abcdef")


@pytest.mark.parametrize("read_mpp", [0.25, 0.5, 0.21])
def test_a_slide_by_windows_equals_cell_by_cell(synthetic_slide, run, read_mpp, monkeypatch):
    monkeypatch.setattr(cut_crops, "WINDOW_PX", 100)
    rng = np.random.default_rng(0)
    with Slide(synthetic_slide.slide, mpp=0.5) as slide:
        size0 = np.array([slide.width0, slide.height0])
        # Some lie beyond the last pixels, where their crops are white.
        xy0 = np.concatenate([rng.uniform(0, 1, (24, 2)) * size0, [[0.2, 3.0], size0 - 0.5]])
        image, frame = slide.read(Box(-80, -80, *(size0 + 160)), read_mpp)
    write_cells(run, "s", xy0)
    sample = CropSample(18, seed=2)
    crops = CropSet(run, "set", sample, NO_CUTOFF)
    row = crop_row(synthetic_slide.slide, read_mpp)
    record = cut_slide(crops, row)
    found = crops_of(run, record)
    cells, priority = candidates(run, "s", sample)
    assert found.cell_id.tolist() == cells["cell_id"].to_pylist()
    assert (np.diff(priority.astype(float)) > 0).all()
    assert record["num_types"] == {t: found.nucleus_type.tolist().count(t) for t in "ab"}
    px_per_um = (1 / (frame.ratio_x * 0.5), 1 / (frame.ratio_y * 0.5))
    points = np.column_stack([cells["x0"].to_numpy(), cells["y0"].to_numpy()])
    for crop, point in zip(found.images_NHWC, points, strict=True):
        (alone,) = crop_nuclei(image, frame.from_level0(point[None]), px_per_um, 18.0, 72)
        coded = np.empty((1, 72, 72, 3), np.uint8)
        decode_into([np.frombuffer(encode(alone), np.uint8)], coded)
        difference = np.abs(crop.astype(int) - coded[0])
        # Finer than a crop's px, a window is shrunk on its own grid first.
        assert difference.mean() < (0.3 if read_mpp > 0.23 else 3)


def test_windows_have_every_cell_once_and_are_small():
    xy0 = np.random.default_rng(0).uniform(-10, 5000, (500, 2))
    parts = list(windows(xy0, 2.0))
    assert sorted(np.concatenate(parts)) == list(range(500))
    assert all(np.ptp(xy0[rows], axis=0).max() <= 1024 for rows in parts)
    assert len(parts) > 20
    assert [rows.tolist() for rows in windows(xy0[:1], 2.0)] == [[0]]


def centres_and_crops(slide, mpp, core_px, num_tiles=None):
    """Return the crops that `extract` embeds, and the middle of the stored crops."""
    spec = CellsSpec(
        "hematoxylin", None, core_px, 32, "random:0", "float32", None, store_embeddings=True
    )
    row = {"slide_id": "s", "uri": str(slide), "mpp": mpp, "mpp_error": None, "done_tiles": []}
    rows = plan_slide(row | {"segmentation": None, "imported_uri": None, "source": None}, spec)
    rows = [row for row in FindNuclei(spec)(Read(spec)(rows[:num_tiles])) if len(row["cells"])]
    cells = pa.concat_tables([row["cells"] for row in rows])
    embedded = np.concatenate([row["crops"] for row in rows])
    xy0 = np.column_stack([cells["x0"].to_numpy(), cells["y0"].to_numpy()])
    stored = np.empty((len(xy0), 72, 72, 3), np.uint8)
    with Slide(slide, mpp=mpp) as opened:
        read_mpp = rows[0]["read_mpp"]
        for index in windows(xy0, read_mpp / opened.mpp):
            stored[index] = cut_window(opened, xy0[index], read_mpp)
    return embedded, stored[:, 12:60, 12:60]


def test_the_centre_is_what_extract_embeds(synthetic_slide):
    embedded, centres = centres_and_crops(synthetic_slide.slide, None, 250)
    assert len(centres) > 100
    difference = np.abs(centres.astype(int) - embedded)
    assert difference.max() <= 6
    assert difference.mean() < 0.1


@pytest.mark.parametrize(
    ("name", "mpp"),
    [
        ("slides/cmu-1-small-region.svs", None),
        ("types_crc/img20.png", 0.55),
    ],
)
def test_the_centre_is_what_extract_embeds_of_real_slides(data_dir, name, mpp):
    embedded, centres = centres_and_crops(data_dir / name, mpp, 480, 2)
    difference = np.abs(centres.astype(int) - embedded)
    assert difference.max() <= 8
    assert difference.mean() < 0.1
    # Stored crops differ by a grey level or two, on average.
    coded = np.empty((1, 48, 48, 3), np.uint8)
    decode_into([np.frombuffer(encode(centres[0]), np.uint8)], coded)
    assert np.abs(coded[0].astype(int) - embedded[0]).mean() < 3


def test_no_candidate_below_the_cutoff_is_no_file(synthetic_slide, run):
    write_cells(run, "s", np.full((5, 2), 100.0))
    row = crop_row(synthetic_slide.slide, 0.5)
    record = cut_slide(CropSet(run, "set", CropSample(3), 0), row)
    assert (record["status"], record["num_crops"]) == ("empty", 0)
    assert not storage.exists(file_uri(run.uri, "set", "s"))


def test_crops_are_cut_only_from_the_file_of_the_record(tmp_path, synthetic_slide, run):
    slide = tmp_path / "s.tiff"
    slide.write_bytes(synthetic_slide.slide.read_bytes())
    source = f"{node_cache.fingerprint(str(slide))}-rest0000"
    write_cells(run, "s", np.array([[50.0, 50.0]]))
    crops = CropSet(run, "set", CropSample(3), NO_CUTOFF)
    os.utime(slide, ns=(1, 1))  # a copy has another time
    assert cut_slide(crops, crop_row(slide, 0.5, source))["num_crops"] == 1
    slide.write_bytes(slide.read_bytes() + b"x")
    with pytest.raises(ChangedFileError, match="another one than that in which the run found"):
        cut_slide(crops, crop_row(slide, 0.5, source))
    # Records of earlier releases do not say which file it was.
    assert cut_slide(crops, crop_row(slide, 0.5))["num_crops"] == 1
