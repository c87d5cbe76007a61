"""Rows between two stages as a table: one row per tile, its cells a nested column."""

import numpy as np
import pyarrow as pa

from scellst_ray import schemas
from scellst_ray.pipelines.tiles import Row


def pack(rows: list[Row]) -> pa.Table:
    """Put rows between two stages into a table, one row per tile, cells as a nested column."""
    timing = [pa.field(f"seconds_{stage}", pa.float32()) for stage in schemas.STAGES]
    fields = [*schemas.TILES, *timing]
    columns = {f.name: pa.array([row.get(f.name) for row in rows], f.type) for f in fields}
    tables = [row.get("cells") for row in rows]
    sizes = [0 if table is None else len(table) for table in tables]
    # Every block has the same columns, whether or not any of its tiles came this far.
    there = [table for table in tables if table is not None]
    joined = pa.concat_tables(there or [pa.schema(schemas.CELL_FIELDS).empty_table()])
    offsets = pa.array(np.concatenate([[0], np.cumsum(sizes)]), pa.int32())
    structs = joined.combine_chunks().to_struct_array()
    values = structs.chunk(0) if structs.num_chunks else pa.array([], structs.type)
    missing = pa.array([table is None for table in tables])
    columns["cells"] = pa.ListArray.from_arrays(offsets, values, mask=missing)
    crops = [row["crops"].tobytes() if "crops" in row else None for row in rows]
    columns["crops"] = pa.array(crops, pa.large_binary())
    return pa.table(columns)


def unpack(table: pa.Table) -> list[Row]:
    """Undo `pack`."""
    nested = [name for name in ("cells", "crops") if name in table.column_names]
    rows: list[Row] = table.drop_columns(nested).to_pylist()
    if not nested:
        return rows
    side = schemas.CROP_PX
    cells, crops = table["cells"].combine_chunks(), table["crops"]
    for index, row in enumerate(rows):
        if cells[index].is_valid:
            row["cells"] = pa.Table.from_struct_array(cells[index].values)
        if crops[index].is_valid:
            flat = np.frombuffer(crops[index].as_buffer(), np.uint8)
            row["crops"] = flat.reshape(-1, side, side, 3)
    return rows
