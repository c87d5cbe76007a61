"""Shards and receipts of a task."""

import pyarrow as pa

from scellst_ray import storage
from scellst_ray.runs.compaction import finish_slide
from scellst_ray.runs.folder import RunFolder
from scellst_ray.stages.write import WriteShards


def test_a_shard_that_could_not_be_written_spoils_no_other(
    tmp_path, few_rows, embed_stage, monkeypatch
):
    run = RunFolder(str(tmp_path), "d1g")
    rows = [row for row in embed_stage(few_rows()[3:7]) if len(row["cells"])]
    with monkeypatch.context() as patch:
        patch.setattr("scellst_ray.storage.publish_table", lambda *_: 1 / 0)
        first = WriteShards(run)(rows[:1])
    receipts = pa.concat_tables([first, WriteShards(run)(rows[1:])])
    record = finish_slide(run, "s", receipts)
    assert (record["status"], record["error_type"]) == ("partial", "ZeroDivisionError")
    assert record["num_cells"] == storage.read_table(run.cells_uri("s")).num_rows > 0


def test_write_makes_one_shard_of_a_task(tmp_path, few_rows, embed_stage):
    run = RunFolder(str(tmp_path), "d1g")
    rows = [row for row in embed_stage(few_rows()[:5]) if len(row["cells"])]
    for row in rows[::2]:
        row["slide_id"] = "other"
    receipts = WriteShards(run)(rows)
    assert len(storage.list_files(run.shards_uri)) == 1
    for row, receipt in zip(rows, receipts.to_pylist(), strict=True):
        shard = storage.read_table(run.shard_uri(receipt["shard"]))
        assert shard.slice(receipt["shard_row"], receipt["num_cells"]).equals(row["cells"])
