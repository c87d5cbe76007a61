#!/usr/bin/env bash
# pyarrow 26.0.1: `write_table` gives a column of float16 a dictionary, as it does any column. Floats
# hardly repeat, but there are only 65,536 float16, so the dictionary does not overflow and stays.
# Embeddings of normally distributed float16 become larger with zstd than without a dictionary, and
# reading them takes several times the CPU time. `use_dictionary=False` avoids both. Fails if the
# behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --disable-pip-version-check --quiet pyarrow==26.0.1 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import os
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

values = np.random.default_rng(0).standard_normal(20_000 * 64).astype(np.float16)
table = pa.table({"embedding": pa.FixedSizeListArray.from_arrays(pa.array(values), 64)})
size, seconds = {}, {}
for name, options in {"default": {}, "plain": {"use_dictionary": False}}.items():
    pq.write_table(table, name, compression="zstd", **options)
    pq.read_table(name)
    began = time.process_time()
    for _ in range(5):
        assert pq.read_table(name).equals(table)
    size[name], seconds[name] = os.path.getsize(name), time.process_time() - began
encodings = pq.read_metadata("default").row_group(0).column(0).encodings
print("pyarrow", pa.__version__, "- encodings by default:", encodings)
print("bytes, default to plain:", round(size["default"] / size["plain"], 3))
print("CPU time of reading, default to plain:", round(seconds["default"] / seconds["plain"], 1))
assert "RLE_DICTIONARY" in encodings, "float16 gets no dictionary"
assert size["default"] > size["plain"], "the dictionary makes the file smaller"
assert seconds["default"] > 1.5 * seconds["plain"], "the dictionary costs no time"
PY
