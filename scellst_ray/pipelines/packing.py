"""Rows of tiles as Ray Data carries them from one actor to the next."""

import time
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from scellst_ray.core import schemas
from scellst_ray.core.geometry import Frame
from scellst_ray.stages.rows import TileRow

# Arrays that a row may carry between stages next to its cells: name and element type.
ARRAYS: dict[Literal["image", "maps", "tokens", "crops", "boxes"], Any] = {
    "image": np.uint8,
    "maps": np.uint32,
    "tokens": np.float16,
    "crops": np.uint8,
    "boxes": np.int32,
}


# PADDING is a column that fills a block; PACKED is a column that holds all tiles of a task.
PADDING, PACKED = "padding", "packed"


def pack(rows: list[TileRow]) -> pa.Table:
    """Put rows of tiles into a table of one row.

    Ray Data cuts blocks between rows, and each block costs its driver milliseconds. The tiles of a
    task as one row are one block: with 8 tiles an eighth of the work.
    """
    table = _make_table(rows)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    content = sink.getvalue()
    offsets = pa.array([0, content.size], pa.int64()).buffers()[1]
    values = pa.LargeBinaryArray.from_buffers(pa.large_binary(), 1, [None, offsets, content])
    return pa.table({PACKED: values})


def _make_table(rows: list[TileRow]) -> pa.Table:
    """Return a table of one row per tile, with the cells as a nested column."""
    timing = [pa.field(f"seconds_{stage}", pa.float32()) for stage in schemas.STAGES]
    waiting = [pa.field("waited_s", pa.float32()), pa.field("queued_at", pa.float64())]
    fields = [*schemas.TILES, *timing, *waiting]
    columns = {f.name: pa.array([row.get(f.name) for row in rows], f.type) for f in fields}
    columns["cells"] = _nest_cells([row.get("cells") for row in rows])
    frames = [_list_numbers(row.get("frame")) for row in rows]
    columns["frame"] = pa.array(frames, pa.list_(pa.float64()))
    for name, dtype in ARRAYS.items():
        arrays = [row.get(name) for row in rows]
        values = [None if a is None else np.ascontiguousarray(a, dtype).data for a in arrays]
        columns[name] = pa.array(values, pa.large_binary())
        shapes = [None if a is None else a.shape for a in arrays]
        columns[f"{name}_shape"] = pa.array(shapes, pa.list_(pa.int64()))
    return pa.table(columns)


def unpack(table: pa.Table) -> list[TileRow]:
    """Undo `pack`, or read a table of plain rows. Arrays are read-only.

    A column without values gives no field: most tiles have no error, and short rows are quicker to
    make.
    """
    if PACKED not in table.column_names:
        return _make_rows(table)
    parts = [pa.ipc.open_stream(value.as_buffer()).read_all() for value in table[PACKED]]
    return [row for part in parts for row in _make_rows(part)]


def _make_rows(table: pa.Table) -> list[TileRow]:
    nested = [n for n in ("cells", "frame", *ARRAYS) if n in table.column_names]
    shapes = [f"{name}_shape" for name in nested if name in ARRAYS]
    plain = [n for n in table.column_names if n not in {*nested, *shapes, PADDING}]
    rows: list[TileRow] = table.select([n for n in plain if not _is_empty(table[n])]).to_pylist()
    if not nested:
        return rows
    cells = table["cells"].combine_chunks()
    for index, row in enumerate(rows):
        if cells[index].is_valid:
            row["cells"] = pa.Table.from_struct_array(cells[index].values)
        if table["frame"][index].is_valid:
            row["frame"] = Frame(*table["frame"][index].as_py())
        for name, dtype in ARRAYS.items():
            value = table[name][index]
            if value.is_valid:
                flat = np.frombuffer(value.as_buffer(), dtype)
                row[name] = flat.reshape(table[f"{name}_shape"][index].as_py())
    return rows


def _is_empty(column: pa.ChunkedArray) -> bool:
    return bool(column.null_count == len(column))


def stamp_queued(rows: list[TileRow]) -> list[TileRow]:
    """Note in rows the time at which they leave for another process; return the rows."""
    now = time.time()
    for row in rows:
        row["queued_at"] = now
    return rows


def add_waiting_time(rows: list[TileRow]) -> list[TileRow]:
    """Add to `waited_s` of rows the seconds since they left the last process; return the rows.

    The clocks of both processes count. Where the later clock is behind, the wait counts as 0.
    """
    now = time.time()
    for row in rows:
        queued_at = row.pop("queued_at", None)
        if queued_at is not None:
            row["waited_s"] = (row.get("waited_s") or 0.0) + max(0.0, now - queued_at)
    return rows


def _nest_cells(tables: list[pa.Table | None]) -> pa.ListArray:
    """Return the cells of each row as one nested column, null where a row has no table."""
    sizes = [0 if table is None else len(table) for table in tables]
    # Every block has the same columns, even if none of its tiles has cells.
    present = [table for table in tables if table is not None]
    joined = pa.concat_tables(present or [pa.schema(schemas.SHARD_FIELDS).empty_table()])
    offsets = pa.array(np.concatenate([[0], np.cumsum(sizes)]), pa.int32())
    structs = joined.combine_chunks().to_struct_array()
    values = structs.chunk(0) if structs.num_chunks else pa.array([], structs.type)
    missing = pa.array([table is None for table in tables])
    return pa.ListArray.from_arrays(offsets, values, mask=missing)


def _list_numbers(frame: Frame | None) -> list[float] | None:
    if frame is None:
        return None
    return [frame.origin_x0, frame.origin_y0, frame.ratio_x, frame.ratio_y]
