"""A slide that cannot be finished costs no other slide."""

import pyarrow as pa

from scellst_ray.core import schemas
from scellst_ray.pipelines import finishing
from scellst_ray.runs.folder import RunFolder


def test_a_slide_that_fails_has_an_unpublished_record(tmp_path, monkeypatch):
    def finish_slide(_run, slide_id, receipts, _shards, *, imported):
        assert imported
        assert set(receipts["slide_id"].to_pylist()) == {slide_id}
        if slide_id == "bad":
            message = "no space left"
            raise OSError(message)
        return {"slide_id": slide_id, "status": "done"}

    monkeypatch.setattr(finishing, "finish_slide", finish_slide)
    rows = [
        {"slide_id": slide_id, "tile_id": tile_id, "num_tiles": 2, "num_cells": 0}
        for slide_id in ("a", "bad", "c")
        for tile_id in range(2)
    ]
    receipts = pa.Table.from_pylist(rows, schema=schemas.RECEIPTS)
    run = RunFolder(str(tmp_path), "d1g")
    first, failed, last = finishing.finish_slides(run, receipts, imported=True)
    assert (first["slide_id"], last["slide_id"]) == ("a", "c")
    assert (failed["slide_id"], failed["stage"]) == ("bad", "finish")
    assert (failed["error_type"], failed["error"]) == ("OSError", "no space left")
    assert list(tmp_path.iterdir()) == []
