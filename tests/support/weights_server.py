"""A server on loopback that sends one file, and misbehaves on request."""

import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Behaviour:
    """What the server does; a test may change it between requests.

    Attributes:
        content: The file.
        ranges: Whether parts may be asked for.
        etag: Sent with the file, and what If-Range is compared with.
        cut_after: Cut these numbers of bytes into an answer, one entry an answer.
        statuses: Answer these codes first.
        tells_length: Whether a Content-Length is sent.
        pages: Other paths and what they hold.
        requests: Path and headers of every request.
        sent: Bytes of the file sent in each answer.
    """

    content: bytes
    ranges: bool = True
    etag: str | None = '"one"'
    cut_after: list = field(default_factory=list)
    statuses: list = field(default_factory=list)
    tells_length: bool = True
    pages: dict = field(default_factory=dict)
    requests: list = field(default_factory=list)
    sent: list = field(default_factory=list)


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        behaviour = self.server.behaviour
        behaviour.requests.append((self.path, dict(self.headers)))
        if behaviour.statuses:
            return self._answer(behaviour.statuses.pop(0), b"")
        if self.path in behaviour.pages:
            return self._answer(200, behaviour.pages[self.path])
        start = self._start(behaviour)
        if start is not None and start >= len(behaviour.content):
            return self._answer(416, b"", {"Content-Range": f"bytes */{len(behaviour.content)}"})
        extra = {"ETag": behaviour.etag} if behaviour.etag else {}
        if start is None:
            return self._answer(200, behaviour.content, extra, behaviour)
        end = len(behaviour.content)
        extra["Content-Range"] = f"bytes {start}-{end - 1}/{end}"
        return self._answer(206, behaviour.content[start:], extra, behaviour)

    def _start(self, behaviour):
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        same = self.headers.get("If-Range", behaviour.etag) == behaviour.etag
        return int(match[1]) if match and behaviour.ranges and same else None

    def _answer(self, status, body, headers=None, behaviour=None):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if behaviour is None or behaviour.tells_length:
            self.send_header("Content-Length", str(len(body)))
        else:
            self.close_connection = True
        self.end_headers()
        cut = behaviour.cut_after.pop(0) if behaviour and behaviour.cut_after else None
        self.wfile.write(body[:cut])
        self.wfile.flush()
        if behaviour:
            behaviour.sent.append(len(body[:cut]))
        if cut is not None:
            self.close_connection = True


@contextmanager
def serving(content, **changes):
    """Serve on loopback while the `with` lasts; yield the address and the behaviour."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        server.behaviour = Behaviour(content, **changes)
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", server.behaviour
        finally:
            server.shutdown()
            thread.join()
