#!/usr/bin/env bash
# pyarrow 26.0.1: the first `pa.array` of a process imports pandas if it is installed, although
# neither the values nor the caller have to do with pandas. The import takes more memory than pyarrow
# itself, so a small command line tool that only reads a few Parquet footers pays for it once it
# builds one array. `import pyarrow` alone does not do so. Fails if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --disable-pip-version-check --quiet pyarrow==26.0.1 pandas==2.3.3
"$folder/venv/bin/python" - <<'PY'
import resource
import sys

import pyarrow as pa


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


assert "pandas" not in sys.modules
before = peak_mb()
pa.array([1])
after = peak_mb()
print(f"pandas loaded: {'pandas' in sys.modules}; {before:.0f} MB before, {after:.0f} MB after")
assert "pandas" in sys.modules, "pa.array no longer imports pandas"
assert after - before > 20
PY
