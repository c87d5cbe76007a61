"""Records are those of the first release, key by key, and have the keys that FORMAT.md lists."""

import json
import typing

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from scellst_ray.core import schemas
from scellst_ray.runs import compaction, records
from scellst_ray.runs.compaction import TableCounts
from scellst_ray.runs.records import SlideRecord, known_mpp, known_size0

SIZE = {"mpp": 0.25, "read_mpp": 0.5, "width0": 4000, "height0": 3000}
ROWS = [
    {"slide_id": "a", "tile_id": tile_id, "num_tiles": 3, "num_cells": 5, **SIZE}
    | {"seconds_read": 0.5 + tile_id, "seconds_segment": 1.0, "waited_s": 0.25}
    for tile_id in range(3)
]
ERROR = {"stage": "read", "error_type": "OSError", "error": "a.tif: short"}
FAILED = ROWS[1] | ERROR | {"num_cells": 0}
EMPTY = {"slide_id": "a", "tile_id": -1, "num_tiles": 0, "num_cells": 0, "seconds_plan": 0.125}
SHIFT = {"score": 1.5, "limit": None, "beyond": None}
# What the first release wrote for the same receipts; `finished` is left out.
STORED = {
    "done": '{"slide_id": "a", "status": "done", "mpp": 0.25, "read_mpp": 0.5, "width0": 4000, '
    '"height0": 3000, "num_tiles": 3, "num_failed_tiles": 0, "num_cells": 9, "seconds": '
    '{"plan": 0.0, "read": 3.0, "network": 0.0, "segment": 2.0, "crop": 0.0, "embed": 0.0, '
    '"write": 0.0}, "waited_s": 0.5, "scellst_ray": "0.1.0", "tables": ["CELLS", "EXPRESSION"], '
    '"seams": {"doubled": 1, "adopted": 2}, "domain_shift": {"score": 1.5, "limit": null, '
    '"beyond": null}}',
    "partial": '{"slide_id": "a", "status": "partial", "mpp": 0.25, "read_mpp": 0.5, "width0": '
    '4000, "height0": 3000, "num_tiles": 3, "num_failed_tiles": 1, "num_cells": 9, "seconds": '
    '{"plan": 0.0, "read": 4.5, "network": 0.0, "segment": 3.0, "crop": 0.0, "embed": 0.0, '
    '"write": 0.0}, "waited_s": 0.75, "scellst_ray": "0.1.0", "stage": "read", "error_type": '
    '"OSError", "error": "a.tif: short", "tables": ["CELLS"], "seams": {"doubled": 1, '
    '"adopted": 0}}',
    "failed": '{"slide_id": "a", "status": "failed", "mpp": 0.25, "read_mpp": 0.5, "width0": '
    '4000, "height0": 3000, "num_tiles": 3, "num_failed_tiles": 1, "num_cells": 0, "seconds": '
    '{"plan": 0.0, "read": 1.5, "network": 0.0, "segment": 1.0, "crop": 0.0, "embed": 0.0, '
    '"write": 0.0}, "waited_s": 0.25, "scellst_ray": "0.1.0", "stage": "read", "error_type": '
    '"OSError", "error": "a.tif: short"}',
    "empty": '{"slide_id": "a", "status": "empty", "mpp": 0.25, "read_mpp": 0.5, "width0": 4000, '
    '"height0": 3000, "num_tiles": 0, "num_failed_tiles": 0, "num_cells": 0, "seconds": {"plan": '
    '0.125, "read": 0.0, "network": 0.0, "segment": 0.0, "crop": 0.0, "embed": 0.0, "write": '
    '0.0}, "waited_s": 0.0, "scellst_ray": "0.1.0", "tables": [], "seams": {"doubled": 0, '
    '"adopted": 0}}',
}


@pytest.mark.parametrize(
    ("status", "rows", "counts"),
    [
        ("done", [ROWS[0], ROWS[2]], TableCounts(("CELLS", "EXPRESSION"), 9, 1, 2, SHIFT)),
        ("partial", [ROWS[0], FAILED, ROWS[2]], TableCounts(("CELLS",), 9, 1, 0)),
        ("failed", [FAILED], TableCounts()),
        ("empty", [EMPTY | SIZE], TableCounts()),
    ],
)
def test_a_record_is_that_of_the_first_release(monkeypatch, status, rows, counts):
    monkeypatch.setattr(compaction, "__version__", "0.1.0")
    receipts = pa.Table.from_pylist(rows, schema=schemas.RECEIPTS)
    failed = receipts.filter(pc.is_valid(receipts["error"]))
    record = compaction._record("a", receipts, failed, counts)
    assert record.pop("finished").endswith("+00:00")
    assert json.dumps(record) == STORED[status]
    assert set(record) <= set(typing.get_type_hints(SlideRecord))


def test_an_unfinished_record_is_that_of_the_first_release():
    record = compaction.unfinished_record("a", "OSError", "full")
    assert json.dumps(record) == (
        '{"slide_id": "a", "status": "failed", "num_tiles": 0, "num_failed_tiles": 0, '
        '"num_cells": 0, "stage": "finish", "error_type": "OSError", "error": "full"}'
    )


def test_every_record_has_what_every_reader_needs():
    required = {"slide_id", "status", "num_cells", "num_tiles", "num_failed_tiles"}
    assert SlideRecord.__required_keys__ == required
    assert set(compaction.unfinished_record("a", "b", "c")) >= required


def test_resolution_and_size_of_a_slide_that_was_opened():
    record = compaction.unfinished_record("a", "OSError", "full") | SIZE
    assert known_mpp(record) == 0.25
    assert known_mpp(record, "read_mpp") == 0.5
    assert known_size0(record) == (4000, 3000)


@pytest.mark.parametrize("function", [known_mpp, known_size0])
def test_a_slide_that_was_never_opened_is_named(function):
    record = compaction.unfinished_record("a", "OSError", "full")
    for unknown in (record, record | dict.fromkeys(SIZE)):
        with pytest.raises(ValueError, match=r"slide 'a': its record does not know .*run the same"):
            function(unknown)


def test_the_types_of_json_documents_are_documented():
    for kind in vars(records).values():
        if isinstance(kind, type) and kind.__module__ == records.__name__:
            for name in kind.__annotations__:
                assert f"{name}:" in kind.__doc__ or "keys as in" in kind.__doc__, (kind, name)
