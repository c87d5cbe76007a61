"""CROPS: a second pass over the pixels, around a sample of the cells that a run has found.

Crops are no stage of the tiles, since the sample is known only when all cells are found. A second
reading of the pixels takes a few percent of `extract`. A slide is a row of the pass:

1. Each slide gives the random numbers of its candidates, the cells that it would add to the sample
   if it were alone. The driver finds the cutoff: the number up to which the cells of all slides fit
   the total.
2. Each slide is cut into crops. It is done once its record is published.
3. The driver publishes `crops.json` last. Readers see a set of crops from then on.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from typing import cast

import cv2
import numpy as np
import pyarrow as pa
from ray.data import ActorPoolStrategy

from scellst_ray import storage
from scellst_ray.core import schemas
from scellst_ray.core.logs import log_fields
from scellst_ray.pipelines import attempts
from scellst_ray.pipelines.ray_internals import configure_slide_pass, dataset_of
from scellst_ray.pipelines.receipts import Resources
from scellst_ray.pipelines.session import Cluster
from scellst_ray.runs.crop_files import (
    CODEC,
    NO_CUTOFF,
    ROW_GROUP,
    CropSample,
    Cutoff,
    crops_uri,
    index_uri,
    set_uri,
)
from scellst_ray.runs.crop_store import read_index
from scellst_ray.runs.documents import publish_document, read_document, read_records
from scellst_ray.runs.folder import RunFolder
from scellst_ray.runs.records import CropCutoff, CropIndex, CropRecord, SlideCrops, SlideRecord
from scellst_ray.slides.manifest import SlideRow
from scellst_ray.stages.cut_crops import CropSet, candidates, cut_slide, record_of
from scellst_ray.stages.rows import AttemptedCropSlide, AttemptedRow, CropSlide
from scellst_ray.stages.tiles import guarded

logger = logging.getLogger(__name__)
SlideRecords = Mapping[str, SlideRecord]
CropRecords = Mapping[str, CropRecord]
ROWS = pa.schema(
    [(name, pa.string()) for name in ("slide_id", "uri", "source")]
    + [(name, pa.float64()) for name in ("mpp", "read_mpp")]
)
# Keys of a record of crops that crops.json repeats.
IN_INDEX = ("num_crops", "num_types", "num_bytes", "digest", "centre", "file")
CANDIDATES = pa.schema(
    [
        ("slide_id", pa.string()),
        ("priority", pa.list_(pa.uint64())),
        ("error_type", pa.string()),
        ("error", pa.string()),
    ]
)


def check_sample(run: RunFolder, sample: CropSample) -> None:
    """Refuse to replace a run's crops by those of another sample.

    Raises:
        ValueError: the run has crops of another sample.
    """
    index = read_index(run.uri)
    wanted = asdict(sample)
    stored = wanted if index is None else {**index["sample"]}
    if stored != wanted:
        differences = (f"{k} {stored.get(k)} before, {v} now" for k, v in wanted.items())
        message = (
            f"{run.uri}: its crops are another sample ({', '.join(differences)}); give the "
            "settings of that sample, or remove the folder `crops` of the run"
        )
        raise ValueError(message)


def crops_missing(run: RunFolder, records: SlideRecords, sample: CropSample) -> bool:
    """Return whether crops of the slides with these records are still to be made."""
    index = read_index(run.uri)
    if index is None:
        return True
    return index["set"] != _hash_sample(run, _select_with_cells(records), sample) or bool(
        index["failed"]
    )


def make_crops(
    run: RunFolder,
    slides: Sequence[SlideRow],
    records: SlideRecords,
    sample: CropSample,
    resources: Resources,
    cluster: Cluster,
    check: Callable[[], None] = lambda: None,
) -> dict[str, CropRecord]:
    """Make the crops that a run lacks; return the records of crops by slide_id.

    Args:
        run: The run.
        slides: The manifest.
        records: The records of its slides.
        sample: The sample of cells.
        resources: The resources that workers may use.
        cluster: The resources of the cluster.
        check: Raises if another driver has taken over the run.
    """
    check_sample(run, sample)
    cells = _select_with_cells(records)
    crops = CropSet(run, _hash_sample(run, cells, sample), sample, NO_CUTOFF)
    index = read_index(run.uri)
    if index is not None and index["set"] != crops.set_id:
        logger.warning("%s: its cells have changed, so all crops are made again", run.uri)
    configure_slide_pass()
    rows: list[CropSlide] = [
        _crop_slide(slide, cells[slide.slide_id]) for slide in slides if slide.slide_id in cells
    ]
    cutoff, made = _find_cutoff(crops, rows, cells)
    crops = replace(crops, cutoff=cutoff)
    made |= _read_done_records(crops, rows)
    rows = [row for row in rows if row["slide_id"] not in made]
    if rows:
        for result in _cut_crops(crops, rows, resources, cluster):
            check()
            made[result["slide_id"]] = result
    check()
    _publish_index(crops, made)
    return made


def with_crops(records: SlideRecords, crops: CropRecords) -> dict[str, SlideRecord]:
    """Return the records of slides with the outcome of their crops.

    A slide whose crops failed is partial: the same command tries them again.
    """
    joined = {slide_id: record.copy() for slide_id, record in records.items()}
    for slide_id, of_crops in crops.items():
        record = joined[slide_id]
        record["num_crops"] = of_crops["num_crops"]
        if of_crops["status"] == "failed":
            record["status"], record["stage"] = "partial", "crops"
            record["error_type"], record["error"] = of_crops["error_type"], of_crops["error"]
    return joined


def _crop_slide(slide: SlideRow, record: SlideRecord) -> CropSlide:
    """Return a slide of the manifest, with the um per px of its record, as `cut_slide` takes it."""
    mpp, read_mpp = record.get("mpp"), record.get("read_mpp")
    assert mpp is not None, "a slide with cells was opened"
    assert read_mpp is not None, "a slide with cells was read"
    source = record.get("source")
    return CropSlide(
        slide_id=slide.slide_id, uri=slide.uri, mpp=mpp, read_mpp=read_mpp, source=source
    )


def _select_with_cells(records: SlideRecords) -> SlideRecords:
    return {s: record for s, record in records.items() if record.get("num_cells")}


def _hash_sample(run: RunFolder, cells: SlideRecords, sample: CropSample) -> str:
    """Return a hash of the sample and of the cells from which it is drawn."""
    stamps = {
        s: [r["num_cells"], r.get("finished"), *([r["source"]] if "source" in r else [])]
        for s, r in sorted(cells.items())
    }
    text = json.dumps([run.digest, asdict(sample), stamps], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _find_cutoff(
    crops: CropSet, rows: list[CropSlide], cells: SlideRecords
) -> tuple[int, dict[str, CropRecord]]:
    """Return the priority up to which cells are in, and records of slides without candidates."""
    uri = storage.join(set_uri(crops.run.uri, crops.set_id), "set.json")
    if storage.exists(uri):
        with suppress(storage.DamagedFileError):  # it is found again
            return read_document(uri, CropCutoff)["cutoff"], {}
    most = crops.sample.per_slide or crops.sample.total
    failed: dict[str, CropRecord] = {}
    cutoff = Cutoff(crops.sample.total)
    if rows and sum(min(r["num_cells"], most) for r in cells.values()) > crops.sample.total:
        candidates_of_slides = dataset_of([_make_table(row) for row in rows]).map_batches(
            partial(_candidates, run=crops.run, sample=crops.sample),
            batch_size=1,
            batch_format="pyarrow",
        )
        for batch in candidates_of_slides.iter_batches(batch_size=None, batch_format="pyarrow"):
            table: pa.Table = batch
            for number, row in enumerate(table.drop_columns("priority").to_pylist()):
                if row["error"] is None:
                    cutoff.add(table["priority"][number].values.to_numpy())
                else:
                    failed[row["slide_id"]] = _failed_record(crops, row)
    value = cutoff.value()
    if not failed:
        known = {"cutoff": value, "sample": asdict(crops.sample), "slides": sorted(cells)}
        publish_document(uri, known)
    return value, failed


def _candidates(batch: pa.Table, run: RunFolder, sample: CropSample) -> Iterable[pa.Table]:
    for slide_id in batch["slide_id"].to_pylist():
        row: AttemptedRow = {"slide_id": slide_id, "tile_id": -1}
        priority_N = np.zeros(0, np.uint64)
        with guarded(row, "crops"):
            _, priority_N = candidates(run, slide_id, sample)
        values = pa.ListArray.from_arrays([0, len(priority_N)], pa.array(priority_N))
        texts = [
            pa.array([value], pa.string())
            for value in (slide_id, row.get("error_type"), row.get("error"))
        ]
        yield pa.table([texts[0], values, *texts[1:]], schema=CANDIDATES)


def _read_done_records(crops: CropSet, rows: list[CropSlide]) -> dict[str, CropRecord]:
    """Return the records of slides whose crops are cut already."""
    folder = crops.record_uri("").rsplit("/", 1)[0]
    records = read_records(folder, CropRecord, "the crops of its slide are cut again").values()
    wanted = {row["slide_id"] for row in rows}
    return {
        record["slide_id"]: record
        for record in records
        if record["slide_id"] in wanted
        and record["status"] != "failed"
        and record["cutoff"] == crops.cutoff
    }


def _cut_crops(
    crops: CropSet, rows: list[CropSlide], resources: Resources, cluster: Cluster
) -> Iterable[CropRecord]:
    """Cut the crops of slides; yield their records."""
    memory = int(resources.memory_gb * 2**30)
    most = min(cluster.num_cpus, cluster.num_fitting(memory), len(rows))
    logger.info("crops of %d slides, up to %d", len(rows), crops.sample.total)
    results = dataset_of([_make_table(row) for row in rows]).map_batches(
        CutCrops,
        fn_constructor_kwargs={
            "crops": crops,
            "session": attempts.new_session(crops.run),
            "max_attempts": resources.limits.max_attempts,
        },
        compute=ActorPoolStrategy(size=max(1, min(most, resources.workers or most))),
        num_cpus=1,
        memory=memory,
        batch_size=1,
        batch_format="pyarrow",
    )
    for batch in results.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        table: pa.Table = batch
        for text in table["record"].to_pylist():
            yield json.loads(text)


def _make_table(row: CropSlide) -> pa.Table:
    return pa.Table.from_pylist([row], schema=ROWS)


class CutCrops:
    """Actor that cuts the crops of slides. Ray Data maps it over them."""

    def __init__(self, crops: CropSet, session: str, max_attempts: int) -> None:
        """Take the set of crops, and the folder `session` for the notes of attempts."""
        # Slides differ too much in size for a limit on their time.
        self.attempts = attempts.attempts_of_actor(session, max_attempts, None)
        self.crops = crops
        cv2.setNumThreads(1)

    def __call__(self, batch: pa.Table) -> Iterable[pa.Table]:
        """Yield the record of each slide, as JSON."""
        for slide in batch.to_pylist():
            row: AttemptedCropSlide = slide | {"tile_id": -1}
            (record,) = self.attempts.run_guarded([row], self._one)
            yield pa.table({"record": [json.dumps(record)]})

    def _one(self, rows: list[AttemptedCropSlide], begins: Callable[[str], None]) -> CropRecord:
        (row,) = rows
        if row.get("error") is None:
            begins("crops")
            with guarded(row, "crops"):
                record = cut_slide(self.crops, row)
                publish_document(self.crops.record_uri(row["slide_id"]), record)
                return record
        return _failed_record(self.crops, row)


def _failed_record(crops: CropSet, row: AttemptedRow) -> CropRecord:
    """Return the record of a slide whose row holds an error."""
    record = record_of(crops, row["slide_id"], "failed")
    record["error_type"], record["error"] = str(row["error_type"]), str(row["error"])
    return record


def _publish_index(crops: CropSet, records: CropRecords) -> None:
    """Publish `crops.json` for this set, and remove other sets.

    Slides whose crops failed have no record, so the same command tries them again.
    """
    run_uri = crops.run.uri
    done = {s: r for s, r in sorted(records.items()) if r["status"] == "done"}
    failed = {s: r for s, r in sorted(records.items()) if r["status"] == "failed"}
    for slide_id, record in failed.items():
        extra = log_fields(slide_id, None, "crops")
        logger.error("no crops of slide %s: %s", slide_id, record["error"], extra=extra)
    index: CropIndex = {
        "format_version": schemas.FORMAT_VERSION,
        "run_digest": crops.run.digest,
        "set": crops.set_id,
        "sample": crops.sample.as_json(),
        "crop_um": schemas.STORED_CROP_UM,
        "crop_px": schemas.STORED_CROP_PX,
        "codec": CODEC,
        "row_group": ROW_GROUP,
        "num_crops": sum(record["num_crops"] for record in done.values()),
        "slides": {s: _in_index(record) for s, record in done.items()},
        "failed": {s: f"{r['error_type']}: {r['error']}" for s, r in failed.items()},
    }
    publish_document(index_uri(run_uri), index)
    kept = {index_uri(run_uri), set_uri(run_uri, crops.set_id)}
    for uri in storage.list_all(crops_uri(run_uri)):
        if uri not in kept:
            storage.remove_tree(uri)


def _in_index(record: CropRecord) -> SlideCrops:
    """Return the entry of a slide in crops.json."""
    return cast("SlideCrops", {k: v for k, v in record.items() if k in IN_INDEX})
