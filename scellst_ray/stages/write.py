"""The stage that writes: from the cells of tiles to shards and receipts."""

import uuid

import pyarrow as pa

from scellst_ray.core import schemas
from scellst_ray.runs.folder import RunFolder
from scellst_ray.runs.shards import publish_shard
from scellst_ray.stages.rows import Outcome, TileRow
from scellst_ray.stages.tiles import guarded


class WriteShards:
    """Stage that writes the cells of a task, also those of several slides, to one shard."""

    def __init__(self, run: RunFolder) -> None:
        """Take the run folder."""
        self.run = run

    def __call__(self, rows: list[TileRow]) -> pa.Table:
        """Publish the cells of these tiles; return RECEIPTS."""
        self._publish(rows)
        for row in rows:
            failed = row.get("error") is not None
            cells = None if failed else row.get("cells")
            row["num_cells"] = 0 if cells is None else len(cells)
        columns = {
            field.name: pa.array([row.get(field.name) for row in rows], field.type)
            for field in schemas.RECEIPTS
        }
        return pa.table(columns, schema=schemas.RECEIPTS)

    def _publish(self, rows: list[TileRow]) -> None:
        """Write the cells of tiles that have any; if that fails, all these tiles fail."""
        rows = [
            row
            for row in rows
            if row.get("error") is None and row.get("cells") is not None and len(row["cells"])
        ]
        if not rows:
            return
        outcome = Outcome()
        name = f"{uuid.uuid4().hex}.parquet"
        with guarded(outcome, "write"):
            # To write one chunk takes two thirds of the time of a chunk for each tile.
            table = pa.concat_tables([row["cells"] for row in rows]).combine_chunks()
            publish_shard(self.run, name, table)
        start = 0
        for row in rows:
            row["seconds_write"] = outcome["seconds_write"] / len(rows)
            if outcome.get("error") is None:
                row["shard"], row["shard_row"] = name, start
            else:
                row["stage"], row["error_type"] = outcome["stage"], outcome["error_type"]
                row["error"] = outcome["error"]
            start += len(row["cells"])
