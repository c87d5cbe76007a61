#!/usr/bin/env bash
# Ray 2.60.0 (Ray Data): a table with a column fixed_size_list<float>[4] and metadata in its schema
# goes through `filter(fn)`, which changes no row. The column comes back as list<double>: it takes
# twice the bytes, its length is no longer fixed, and the metadata is gone, without a message.
# `map_batches(fn, batch_format="pyarrow")` keeps all of it. Fails if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --disable-pip-version-check --quiet "ray[data]==2.60.0" pyarrow==26.0.1
cd "$folder"
RAY_DATA_DISABLE_PROGRESS_BARS=1 "$folder/venv/bin/python" - 2>ray.log <<'PY' || { tail -n 20 ray.log; exit 1; }
import pyarrow as pa
import pyarrow.parquet as pq
import ray

values = pa.array([float(i) for i in range(40)], pa.float32())
column = pa.FixedSizeListArray.from_arrays(values, 4)
schema = pa.schema([("embedding", column.type)], metadata={"genes": "CD3E"})
pq.write_table(pa.table([column], schema=schema), "cells.parquet")
ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
print("ray", ray.__version__)


def schema_after(data: ray.data.Dataset) -> pa.Schema:
    return pa.concat_tables(ray.get(data.to_arrow_refs())).schema


whole = pq.read_table("cells.parquet")
by_row = schema_after(ray.data.from_arrow(whole).filter(lambda row: True))
by_batch = schema_after(
    ray.data.from_arrow(whole).map_batches(lambda table: table, batch_format="pyarrow")
)
for name, found in (("filter", by_row), ("map_batches", by_batch)):
    print(name, found.field("embedding").type, found.metadata)
assert by_row.field("embedding").type == pa.list_(pa.float64()), "filter keeps the type"
assert not (by_row.metadata or {}).get(b"genes"), "filter keeps the metadata"
assert by_batch.field("embedding").type == column.type
assert by_batch.metadata[b"genes"] == b"CD3E"
PY
