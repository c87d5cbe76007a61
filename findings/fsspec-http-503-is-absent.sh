#!/usr/bin/env bash
# fsspec 2026.1.0: where an HTTP server answers 503 (busy), `exists` returns False and `info` raises
# FileNotFoundError, as if the server had said 404. A program that resumes by what exists takes a
# finished file for missing, and one that looks for a slide says that it is not there. `cat_file`
# tells the truth: its error has the status 503. Fails if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --disable-pip-version-check --quiet fsspec==2026.1.0 aiohttp==3.13.3
"$folder/venv/bin/python" - <<'PY'
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import aiohttp
import fsspec


class Busy(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(503)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Busy)
threading.Thread(target=server.serve_forever, daemon=True).start()
http = fsspec.filesystem("http")
url = f"http://127.0.0.1:{server.server_port}/slide.svs"
print("fsspec", fsspec.__version__, "- exists:", http.exists(url))
assert http.exists(url) is False, "exists no longer says that the file is absent"
try:
    http.info(url)
except FileNotFoundError as error:
    print("info:", type(error).__name__)
else:
    raise AssertionError("info no longer raises FileNotFoundError")
try:
    http.cat_file(url)
except aiohttp.ClientResponseError as error:
    print("cat_file:", type(error).__name__, error.status)
    assert error.status == 503
else:
    raise AssertionError("cat_file raises nothing")
PY
