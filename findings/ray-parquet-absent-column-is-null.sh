#!/usr/bin/env bash
# Ray 2.60.0 (Ray Data): `read_parquet` of a folder in which one file lacks a column gives nulls for
# it in that file's rows, without a message. A table of a release before, or of another program, is
# mixed with the others. pyarrow 26.0.1 reads the same folder in the same way, and polars 1.39.0
# refuses it. Fails if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --disable-pip-version-check --quiet \
  "ray[data]==2.60.0" pyarrow==26.0.1 polars==1.39.0
cd "$folder"
RAY_DATA_DISABLE_PROGRESS_BARS=1 "$folder/venv/bin/python" - 2>ray.log <<'PY' || { tail -n 20 ray.log; exit 1; }
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import ray

Path("run").mkdir()
pq.write_table(pa.table({"cell_id": [1, 2], "CD3E": [0.5, 0.25]}), "run/a.parquet")
pq.write_table(pa.table({"cell_id": [3]}), "run/b.parquet")
ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
print("ray", ray.__version__)
rows = sorted(ray.data.read_parquet("run").take_all(), key=lambda row: row["cell_id"])
print("Ray Data:", rows)
assert rows[2] == {"cell_id": 3, "CD3E": None}, "the row is told from the others"
print("pyarrow:", pq.read_table("run").to_pylist())
assert pq.read_table("run").num_rows == 3
try:
    pl.read_parquet("run/*.parquet")
except pl.exceptions.PolarsError as error:
    print("polars:", type(error).__name__)
else:
    raise AssertionError("polars reads the folder")
PY
