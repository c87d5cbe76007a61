"""A server on loopback that stands in for an object store, and misbehaves on request."""

import socket
import struct
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote


@dataclass
class Objects:
    """What the server holds and does; a test may change it between requests.

    Attributes:
        files: Content by path.
        etags: ETag by path; its content's hash where not given, none where None.
        faults: What befalls the next GETs, one entry each: a status, 'drop' (before an answer),
            'reset' or 'cut' (after half the bytes), or None.
        head_faults: The same for HEADs.
        asked: HEAD or GET, and path, of every request.
        half_sent: Set once a held-back answer has sent half of its bytes.
        go_on: Cleared by a test to hold back the second half of every answer.
        patience_s: Seconds that an answer is held back at most.
        when: Called before a GET is answered.
    """

    files: dict
    etags: dict = field(default_factory=dict)
    faults: list = field(default_factory=list)
    head_faults: list = field(default_factory=list)
    asked: list = field(default_factory=list)
    half_sent: threading.Event = field(default_factory=threading.Event)
    go_on: threading.Event = field(default_factory=threading.Event)
    patience_s: float = 20.0
    when: object = lambda: None

    def gets(self, path=None):
        """Count the downloads asked for."""
        return sum(kind == "GET" and path in (None, name) for kind, name in self.asked)


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_HEAD(self):
        faults = self.server.objects.head_faults
        self._answer(faults.pop(0) if faults else None)

    def do_GET(self):
        objects = self.server.objects
        objects.when()
        self._answer(objects.faults.pop(0) if objects.faults else None)

    def _answer(self, fault):
        objects, path = self.server.objects, unquote(self.path.partition("?")[0])
        objects.asked.append((self.command, path))
        if fault == "drop":
            self.connection.close()
            return
        status = fault if isinstance(fault, int) else 200 if path in objects.files else 404
        body = objects.files[path] if status == 200 else b""
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        etag = objects.etags.get(path, f'"{hash(body):x}"')
        if etag:
            self.send_header("ETag", etag)
        self.end_headers()
        if self.command == "HEAD":
            return
        half = len(body) // 2
        self.wfile.write(body[:half])
        if fault in ("reset", "cut"):
            if fault == "reset":
                now = struct.pack("ii", 1, 0)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, now)
            self.connection.close()
            return
        if not objects.go_on.is_set():
            objects.half_sent.set()
            objects.go_on.wait(objects.patience_s)
        self.wfile.write(body[half:])


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_):
        """Say nothing of clients that were killed."""


@contextmanager
def serving(files, **changes):
    """Serve on loopback while the `with` lasts; yield the address and the objects."""
    with Server(("127.0.0.1", 0), Handler) as server:
        server.objects = Objects(
            {f"/{name}": content for name, content in files.items()}, **changes
        )
        server.objects.go_on.set()
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", server.objects
        finally:
            server.objects.go_on.set()
            server.shutdown()
            thread.join()


def wait_until(condition, seconds=20.0):
    """Wait for something another process or thread does."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)
