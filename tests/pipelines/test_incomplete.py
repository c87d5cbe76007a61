"""Receipts of slides whose file changes during the run."""

import pyarrow as pa

from scellst_ray.core import schemas
from scellst_ray.pipelines.incomplete import IncompleteSlides
from scellst_ray.pipelines.progress import Progress


def receipts(tiles, source, num_tiles=3, error=None):
    rows = [
        {
            "slide_id": "s",
            "tile_id": tile,
            "num_tiles": num_tiles,
            "num_cells": 0 if error else 5,
            "error": error,
            "source": source,
        }
        for tile in tiles
    ]
    return pa.Table.from_pylist(rows, schema=schemas.RECEIPTS)


def counts(slides):
    progress = slides.progress
    return progress.num_tiles_known, progress.num_tiles, progress.num_cells


def test_receipts_of_the_file_before_are_dropped(caplog):
    slides = IncompleteSlides(Progress(1))
    assert slides.add("s", receipts([0, 1], "a")) is None
    assert counts(slides) == (3, 2, 10)
    assert slides.add("s", receipts([0], "b", num_tiles=4)) is None
    assert counts(slides) == (4, 1, 5)
    assert "slide s: its file changed" in caplog.text
    # What comes late of the file before does not count, whether it was read in time or failed.
    assert slides.add("s", receipts([2], "a")) is None
    assert slides.add("s", receipts([1], "a", error="changed")) is None
    complete = slides.add("s", receipts([1, 2, 3], "b", num_tiles=4))
    assert complete["tile_id"].to_pylist() == [0, 1, 2, 3]
    assert set(complete["source"].to_pylist()) == {"b"}
    assert counts(slides) == (4, 4, 20)


def test_tiles_that_failed_since_the_file_changed_do_not_take_its_place():
    slides = IncompleteSlides(Progress(1))
    slides.add("s", receipts([0, 1], "b"))
    assert slides.add("s", receipts([0, 1, 2], "a", error="changed")) is None
    complete = slides.add("s", receipts([2], "b"))
    assert set(complete["source"].to_pylist()) == {"b"}


def test_both_in_one_batch():
    slides = IncompleteSlides(Progress(1))
    mixed = pa.concat_tables([receipts([0], "a"), receipts([0, 1, 2], "b")])
    assert slides.add("s", mixed)["source"].to_pylist() == ["b"] * 3
    assert counts(slides) == (3, 3, 15)


def test_receipts_without_a_source_are_of_one():
    slides = IncompleteSlides(Progress(1))
    slides.add("s", receipts([0], None))
    assert len(slides.add("s", receipts([1, 2], None))) == 3
