import numpy as np
import pyarrow as pa
import pytest

from scellst_ray import storage
from scellst_ray.core import schemas
from scellst_ray.pipelines.packing import PACKED, add_waiting_time, pack, stamp_queued, unpack
from scellst_ray.runs.folder import RunFolder
from scellst_ray.stages.write import WriteShards


@pytest.fixture
def rows(segmented_rows):
    """Return four tiles: with cells, without any, failed, with cells."""
    full = [row for row in segmented_rows() if len(row["cells"]) > 3]
    first, second, third, fourth = full[:4]
    second["cells"], second["crops"] = second["cells"].slice(0, 0), second["crops"][:0]
    for name in ("cells", "crops"):
        del third[name]
    third |= {"stage": "read", "error_type": "OSError", "error": "bad sector"}
    return [first, second, third, fourth]


def test_unpacking_undoes_packing(rows):
    table = pack(rows)
    assert len(table) == 1  # Ray Data cannot cut it
    for found, row in zip(unpack(table), rows, strict=True):
        assert ("cells" in found) == ("cells" in row)
        if "cells" in row:
            assert found["cells"].equals(row["cells"])
            assert found["cells"].schema.equals(row["cells"].schema)
            np.testing.assert_array_equal(found["crops"], row["crops"])
        for name in schemas.TILES.names:
            assert found.get(name) == row.get(name)


def test_the_first_row_does_not_decide_which_columns_arrived_are(rows):
    # Neither an error nor a box of a later row may get lost.
    bare = {"slide_id": "x", "tile_id": -1, "num_tiles": 0, "uri": "u"}
    found = unpack(pack([bare, *rows]))
    assert found[0].get("error") is None
    assert found[3]["error"] == "bad sector"
    assert found[1]["core_w0"] == rows[0]["core_w0"]


def test_every_block_has_the_same_schema(rows):
    def schemas_of(some):
        packed = pack(some)
        return packed.schema, pa.ipc.open_stream(packed[PACKED][0].as_buffer()).schema

    for some in (rows[:1], rows[1:2], rows[2:3], rows[2:]):
        assert schemas_of(some) == schemas_of(rows)


@pytest.mark.parametrize("how", ["chunks", "joined", "slices", "ipc"])
def test_blocks_may_be_cut_joined_and_sent(rows, how):
    table = pack(rows)
    parts = pa.concat_tables([pack(rows[:1]), pack(rows[1:3]), pack(rows[3:])])
    if how == "chunks":
        found = unpack(parts)
    elif how == "joined":
        found = unpack(parts.combine_chunks())
    elif how == "slices":
        found = [row for i in range(3) for row in unpack(parts.combine_chunks().slice(i, 1))]
    else:
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        found = unpack(pa.ipc.open_stream(sink.getvalue()).read_all())
    for one, row in zip(found, rows, strict=True):
        assert ("cells" in one) == ("cells" in row)
        if "cells" in row:
            assert one["cells"].equals(row["cells"])
            np.testing.assert_array_equal(one["crops"], row["crops"])


def test_waiting_is_summed_over_queues_and_never_negative(rows, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.time", lambda: now[0])
    arrived = unpack(pack(stamp_queued(rows)))
    now[0] = 107.5
    arrived = add_waiting_time(arrived)
    assert all("queued_at" not in row for row in arrived)
    now[0] = 200.0
    arrived = unpack(pack(stamp_queued(arrived)))
    now[0] = 201.25
    assert [row["waited_s"] for row in add_waiting_time(arrived)] == [8.75] * 4
    # The clock of the next node is behind.
    arrived = unpack(pack(stamp_queued(arrived)))
    now[0] = 150.0
    assert [row["waited_s"] for row in add_waiting_time(arrived)] == [8.75] * 4
    # Rows that were in no queue, as in a plain loop.
    assert "waited_s" not in add_waiting_time([{"slide_id": "a"}])[0]


def test_receipts_and_shards_are_those_of_the_plain_loop(tmp_path, few_rows, rows, embed_stage):
    broken = rows[2]
    loop, packed = (RunFolder(str(tmp_path / name), "d1g") for name in ("loop", "packed"))
    tiles = [dict(row) for row in (*few_rows()[:4], broken)]
    expected = WriteShards(loop)(embed_stage([dict(row) for row in tiles]))
    found = WriteShards(packed)(embed_stage(unpack(pack(tiles))))
    timing = [name for name in found.column_names if name.startswith("seconds_")]
    assert found.drop_columns([*timing, "shard"]).equals(expected.drop_columns([*timing, "shard"]))
    for name in ("seconds_read", "seconds_segment", "seconds_crop"):  # carried over
        assert found[name].equals(expected[name])
    contents = []
    for run in (loop, packed):
        (uri,) = storage.list_files(run.shards_uri)
        contents.append(storage.read_table(uri))
    assert contents[0].equals(contents[1])
    assert contents[0].num_rows > 0
