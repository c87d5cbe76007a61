"""Crops of a cohort: equal to a plain loop, with all its caps, past bad slides, and resumed."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from scellst_ray import storage
from scellst_ray.pipelines.crops import check_sample, crops_missing, make_crops, with_crops
from scellst_ray.pipelines.extract import extract
from scellst_ray.pipelines.receipts import Resources
from scellst_ray.runs.crop_files import CropSample, draw, index_uri
from scellst_ray.runs.crop_store import colours_by_slide, open_store
from scellst_ray.runs.folder import RunFolder
from scellst_ray.slides.manifest import SlideRow, read_manifest
from scellst_ray.stages.config import ExtractConfig
from scellst_ray.stages.cut_crops import CropSet, cut_slide
from tests.stages.test_cut_crops import write_cells
from tests.support.crop_runs import read_crops

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]
RESOURCES = Resources(workers=None, gpus=False, memory_gb=0.5, tiles_per_task=1)
NUM_CELLS = {"s0": 90, "s1": 60, "bad": 25}


@pytest.fixture
def cohort(small_cohort, tmp_path):
    """Return a run with cells on two slides and on one whose file is missing, and its slides."""
    run = RunFolder(str(tmp_path / "run"), "0123456789abcdef")
    uris = {row.slide_id: row.uri for row in read_manifest(str(small_cohort))}
    slides, records = [], {"none": {"num_cells": 0, "status": "empty"}}
    for number, (slide_id, num) in enumerate(NUM_CELLS.items()):
        xy0 = np.random.default_rng(number).uniform(50, 350, (num, 2))
        write_cells(run, slide_id, xy0)
        uri = uris.get(slide_id, str(tmp_path / "gone.tiff"))
        slides.append(SlideRow(slide_id, uri, 0.5))
        records[slide_id] = {
            "num_cells": num,
            "status": "done",
            "mpp": 0.5,
            "read_mpp": 0.5,
            "finished": "2030-01-01",
        }
    return run, slides, records


def ids_by_slide(store):
    crops = read_crops(store)
    return {s: set(crops.cell_id[crops.slide_id == s].tolist()) for s in store.slides}


def expected_ids(sample, num_cells):
    """Return the cells below the cutoff, and the cutoff, from all candidates at once."""
    drawn = {}
    for slide_id, num in num_cells.items():
        ids = np.arange(num) * 3
        types = pa.array(["ab"[i % 2] for i in range(num)])
        index, priority = draw(sample, slide_id, ids, types)
        drawn[slide_id] = dict(zip(priority.tolist(), ids[index].tolist(), strict=True))
    everything = sorted(number for numbers in drawn.values() for number in numbers)
    last = everything[sample.total - 1]
    return {s: {c for n, c in numbers.items() if n <= last} for s, numbers in drawn.items()}, last


def changed_at(store):
    return {file.slide_id: Path(file.uri).stat().st_mtime_ns for file in store.files}


def test_a_cohort_with_a_bad_slide_resumed_and_changed(cohort, local_ray, tmp_path):
    run, slides, records = cohort
    sample = CropSample(100, per_slide=70, per_type=32, seed=5)
    assert crops_missing(run, records, sample)
    made = make_crops(run, slides, records, sample, RESOURCES, local_ray)
    statuses = {slide_id: record["status"] for slide_id, record in made.items()}
    assert statuses == {"s0": "done", "s1": "done", "bad": "failed"}
    shown = with_crops(records, made)
    assert (shown["bad"]["status"], shown["bad"]["stage"]) == ("partial", "crops")
    assert "gone.tiff" in shown["bad"]["error"]
    store = open_store([run.uri])
    assert list(store.failed) == ["bad"]
    expected, last = expected_ids(sample, NUM_CELLS)
    assert max(len(ids) for ids in expected.values()) < 64
    assert ids_by_slide(store) == {s: expected[s] for s in ("s0", "s1")}
    # A plain loop over the slides makes the same files.
    plain = RunFolder(str(tmp_path / "plain"), run.digest)
    for row in slides[:2]:
        cells = storage.read_table(run.cells_uri(row.slide_id))
        storage.publish_table(plain.cells_uri(row.slide_id), cells)
        values = {"slide_id": row.slide_id, "uri": row.uri, "mpp": 0.5, "read_mpp": 0.5}
        values["source"] = None
        record = cut_slide(CropSet(plain, "set", sample, last), values)
        assert record["digest"] == made[row.slide_id]["digest"]
        assert record["centre"] == made[row.slide_id]["centre"]
    with pytest.raises(ValueError, match=r"another sample .*total 100 before, 5 now"):
        check_sample(run, CropSample(5, per_slide=70, per_type=32, seed=5))

    # The bad slide is repaired; a driver was killed, so a record and the index are missing. A file
    # without a record is no proof. What has a record is left alone.
    index = storage.read_json(index_uri(run.uri))
    storage.remove_tree(index_uri(run.uri))
    storage.remove_tree(CropSet(run, index["set"], sample, last).record_uri("s1"))
    with pytest.raises(ValueError, match="not finished"):
        open_store([run.uri])
    assert crops_missing(run, records, sample)
    before = changed_at(store)
    repaired = [*slides[:2], SlideRow("bad", slides[0].uri, 0.5)]
    make_crops(run, repaired, records, sample, RESOURCES, local_ray)
    again = open_store([run.uri])
    assert ids_by_slide(again) == expected
    assert (again.num_crops, again.failed) == (100, {})
    now = changed_at(again)
    assert now["s0"] == before["s0"]
    assert now["s1"] > before["s1"]
    assert not crops_missing(run, records, sample)

    # Other cells are another set, and the old one goes.
    records["s1"] |= {"finished": "2030-01-02", "num_cells": 4}
    write_cells(run, "s1", np.full((4, 2), 99.0))
    assert crops_missing(run, records, sample)
    make_crops(run, repaired, records, sample, RESOURCES, local_ray)
    expected, _ = expected_ids(CropSample(93, 70, 32, 5), NUM_CELLS | {"s1": 4})
    assert ids_by_slide(open_store([run.uri])) == expected
    assert not storage.exists(store.files[0].uri)


def test_extract_with_crops(small_cohort, tmp_path):
    config = {"manifest": str(small_cohort), "out": str(tmp_path), "encoder": "none"}
    config |= {"core_px": 480, "memory_gb": 0.5, "gpus": False}
    records = extract(ExtractConfig(**config))
    assert min(record["num_cells"] for record in records.values()) > 12
    with pytest.raises(ValueError, match="run `scellst-ray extract` with --crops"):
        open_store([str(tmp_path)])
    cells = [tmp_path / "cells" / f"{slide_id}.parquet" for slide_id in records]
    stamps = [path.stat().st_mtime_ns for path in cells]
    # Later is as good: what was extracted stays.
    records = extract(ExtractConfig(**config, crops=20))
    assert sum(record["num_crops"] for record in records.values()) == 20
    assert [path.stat().st_mtime_ns for path in cells] == stamps
    store = open_store([str(tmp_path)])
    assert store.num_crops == 20
    for slide_id, ids in ids_by_slide(store).items():
        table = storage.read_table(f"{tmp_path}/cells/{slide_id}.parquet", ["cell_id"])
        assert ids <= set(table["cell_id"].to_pylist())
    assert not list(tmp_path.glob("attempts/*"))
    # Nothing is missing: no second time.
    stamp = Path(store.files[0].uri).stat().st_mtime_ns
    assert extract(ExtractConfig(**config, crops=20)).keys() == records.keys()
    assert Path(store.files[0].uri).stat().st_mtime_ns == stamp
    with pytest.raises(ValueError, match="another sample"):
        extract(ExtractConfig(**config, crops=21))
    # Their colours may stand in for the encoder's: of each slide, and noted with it.
    own = config | {"out": str(tmp_path / "own"), "encoder": "random:0:resnet18"}
    records = extract(ExtractConfig(**own, colours_from=str(tmp_path)))
    assert {record["status"] for record in records.values()} == {"done"}
    noted = storage.read_json(f"{own['out']}/slides.json")
    for slide_id, colours in colours_by_slide(str(tmp_path)).items():
        assert noted[slide_id]["colours"] == [list(part) for part in colours]
    with pytest.raises(ValueError, match="colours"):
        extract(ExtractConfig(**own))


def test_flags_that_cannot_work_are_refused():
    for flags, text in (
        ({"crops": 0}, "crops is 0"),
        ({"crops_per_type": 5}, "need crops"),
        ({"colours_from": "run", "encoder": "none"}, "colours_from is for encoders of crops"),
    ):
        with pytest.raises(ValueError, match=text):
            ExtractConfig(manifest="m.csv", out="o", **flags)
