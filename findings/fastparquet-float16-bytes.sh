#!/usr/bin/env bash
# fastparquet 2026.9.0: a column of Parquet's logical type FLOAT16 is read as a column of bytes
# objects, b'\x00<' for 1.0, without a message. pyarrow 26.0.1 wrote it and reads numbers. A program
# that only looks at the length of the column does not notice. Fails if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --disable-pip-version-check --quiet \
  fastparquet==2026.9.0 'pandas<3' pyarrow==26.0.1
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import fastparquet
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

values = np.array([1, 2, 3], np.float16)
pq.write_table(pa.table({"distance": values}), "a.parquet")
seen = fastparquet.ParquetFile("a.parquet").to_pandas()["distance"]
print("fastparquet", fastparquet.__version__, seen.dtype, seen.tolist())
assert pq.read_table("a.parquet")["distance"].to_pylist() == [1.0, 2.0, 3.0]
assert seen.tolist() == [value.tobytes() for value in values], "fastparquet reads float16"
PY
