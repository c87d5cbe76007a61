#!/usr/bin/env bash
# duckdb 2.0.1: `COPY (SELECT * FROM 'cells.parquet') TO 'copy.parquet'` of a GeoParquet file whose
# column says `crs: null` writes a GeoParquet file without `crs`. By the specification an absent crs
# means longitude and latitude (OGC:CRS84), so coordinates in pixels become places on Earth, without
# a message and without the extension `spatial`. geopandas 1.2.0 reads OGC:CRS84 from the copy,
# and None from the original. Fails if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --disable-pip-version-check --quiet \
  duckdb==2.0.1 geopandas==1.2.0 pyarrow==26.0.1
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import json

import duckdb
import geopandas
import pyarrow.parquet as pq
import shapely


def column_of(path: str) -> dict:
    return json.loads(pq.read_schema(path).metadata[b"geo"])["columns"]["geometry"]


squares = [shapely.box(x, 5000, x + 20, 5020) for x in (100, 9000)]
geopandas.GeoDataFrame(geometry=squares, crs=None).to_parquet("cells.parquet")
duckdb.sql("COPY (SELECT * FROM 'cells.parquet') TO 'copy.parquet' (FORMAT parquet)")
before, after = column_of("cells.parquet"), column_of("copy.parquet")
read = [geopandas.read_parquet(path).crs for path in ("cells.parquet", "copy.parquet")]
print("duckdb", duckdb.__version__)
print("crs before:", before.get("crs", "absent"), "- after:", after.get("crs", "absent"))
print("geopandas reads:", *map(str, read))
assert "crs" in before
assert before["crs"] is None
assert "crs" not in after, "duckdb keeps crs"
assert read[0] is None
assert read[1] is not None, "geopandas takes an absent crs for none"
PY
