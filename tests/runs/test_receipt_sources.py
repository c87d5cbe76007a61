import pyarrow as pa
import pytest

from scellst_ray.core import schemas
from scellst_ray.runs.receipt_sources import of_source, only_source, with_source


def receipts(*sources):
    """Return one receipt of slide s for each source."""
    rows = [
        {"slide_id": "s", "tile_id": tile, "num_tiles": 9, "num_cells": 0, "source": source}
        for tile, source in enumerate(sources)
    ]
    return pa.Table.from_pylist(rows, schema=schemas.RECEIPTS)


@pytest.mark.parametrize(
    ("sources", "now", "trusted", "tiles"),
    [
        (["a", "a"], "a", False, [0, 1]),
        (["a", "b"], "b", True, [1]),
        (["a", "a"], None, True, []),  # the file cannot be found
        ([None, None], "a", False, []),
        ([None, None], "a", True, [0, 1]),  # written by an earlier release
        ([None, "a"], "a", True, [0, 1]),
        ([None, "a"], "b", True, []),  # the file has changed since an earlier release
        ([None, "a", "b"], "b", True, [2]),
        ([], "a", True, []),
    ],
)
def test_receipts_of_another_file_do_not_count(sources, now, trusted, tiles):
    found = of_source(receipts(*sources), now, trusted=trusted)
    assert found["tile_id"].to_pylist() == tiles
    assert set(found["source"].to_pylist()) <= {now}
    assert found.schema.equals(schemas.RECEIPTS)


def test_a_table_is_of_one_file():
    assert only_source("s", receipts("a", "a")) == "a"
    assert only_source("s", receipts(None)) is None
    assert only_source("s", receipts()) is None
    for mixed in (["a", "b"], ["a", None]):
        with pytest.raises(ValueError, match=r"slide 's': its tiles are of 2 files; run the same"):
            only_source("s", receipts(*mixed))
    assert with_source(receipts("a", None), "c")["source"].to_pylist() == ["c", "c"]
