#!/usr/bin/env bash
# cyclopts 5.5.2: a parameter annotated `int` accepts a number with a fraction and rounds it.
# `--workers 1.5` calls the function with 2, and `--workers 2.9` with 3; nothing is reported.
# A count or a seed that was mistyped is thus changed silently. A converter of one's own that
# refuses fractions closes the gap. Fails if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --disable-pip-version-check --quiet cyclopts==5.5.2
"$folder/venv/bin/python" - <<'PY'
from cyclopts import App

app = App(result_action="return_value")


@app.command
def tiles(*, workers: int = 1) -> int:
    return workers


seen = {text: app(["tiles", "--workers", text]) for text in ("1.5", "2.9", "4")}
print(seen)
assert seen == {"1.5": 2, "2.9": 3, "4": 4}, "cyclopts no longer rounds"
PY
