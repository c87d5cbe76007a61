"""S3 on loopback (moto), behind a layer that fails some of the requests.

`serving_s3` sets the environment variables by which AWS's libraries find a store and its keys, so
that processes started while it lasts, such as Ray's workers, use it too.
"""

import os
import random
import socket
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest.mock import patch

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server
from werkzeug.wsgi import get_input_stream

BUCKET = "cohort"
ANSWER = (
    "<?xml version='1.0' encoding='UTF-8'?><Error><Code>{}</Code>"
    "<Message>injected</Message><RequestId>0</RequestId></Error>"
)
STATUSES = {
    500: ("500 Internal Server Error", "InternalError"),
    503: ("503 Slow Down", "SlowDown"),
    403: ("403 Forbidden", "AccessDenied"),
}
KINDS = (500, 503, "drop", "cut", "slow")


@dataclass
class Store:
    """What goes wrong, and what was asked; a test may change it between requests.

    Attributes:
        address: Of the server.
        share: Of the requests that fail, drawn with `seed`.
        kinds: What befalls them: a status, 'drop' (closed before an answer; the request may have
            been carried out), 'cut' (closed after half of the answer) or 'slow' (half a second).
        planned: What befalls the next requests instead, one entry each, None being nothing.
        asked: Method, path and query of every request.
        failed: Which kinds befell requests, in turn.
    """

    address: str = ""
    share: float = 0.0
    kinds: tuple = KINDS
    planned: list = field(default_factory=list)
    asked: list = field(default_factory=list)
    failed: list = field(default_factory=list)
    seed: int = 0

    def __post_init__(self):
        self._random, self._lock = random.Random(self.seed), threading.Lock()

    def next_fault(self, method, path, query):
        with self._lock:
            self.asked.append((method, path, query))
            fault = self.planned.pop(0) if self.planned else None
            if not fault and self._random.random() < self.share:
                fault = self._random.choice(self.kinds)
            if fault:
                self.failed.append(fault)
            return fault


class Faulty:
    """An application that answers as another does, but for the faults."""

    def __init__(self, application, store):
        self.application, self.store = application, store

    def __call__(self, environ, start_response):
        words = (environ[name] for name in ("REQUEST_METHOD", "PATH_INFO", "QUERY_STRING"))
        fault = self.store.next_fault(*words)
        if fault in STATUSES:
            status, code = STATUSES[fault]
            get_input_stream(environ).read()  # or the client would see a reset
            is_head = environ["REQUEST_METHOD"] == "HEAD"
            body = b"" if is_head else ANSWER.format(code).encode()
            response_headers = [
                ("Content-Type", "application/xml"),
                ("Content-Length", str(len(body))),
            ]
            start_response(status, response_headers)
            return [body]
        if fault == "slow":
            time.sleep(0.5)
        answer = self.application(environ, start_response)
        if fault not in ("drop", "cut"):
            return answer
        body = b"".join(answer)
        return self._broken(environ["werkzeug.socket"], body[: len(body) // 2], fault)

    def _broken(self, connection, half, fault):
        if fault == "cut" and half:
            yield half
        connection.shutdown(socket.SHUT_RDWR)
        yield b""


class Quiet(WSGIRequestHandler):
    def log(self, *_):
        pass

    def connection_dropped(self, *_):
        pass


@contextmanager
def serving_s3(attempts=5, host="127.0.0.1", **changes):
    """Serve one empty bucket while the `with` lasts; yield what goes wrong and what was asked.

    Args:
        attempts: How often AWS's library itself sends a request; by default as it would.
        host: Address of this machine by which clients reach it.
        changes: Of the Store.
    """
    store = Store(**changes)
    share, store.share = store.share, 0.0
    application = Faulty(DomainDispatcherApplication(create_backend_app), store)
    server = make_server(host, 0, application, threaded=True, request_handler=Quiet)
    store.address = f"http://{host}:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    environment = {
        "AWS_ENDPOINT_URL": store.address,
        "AWS_ACCESS_KEY_ID": "AKIATESTING",
        "AWS_SECRET_ACCESS_KEY": "very-secret-indeed",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_MAX_ATTEMPTS": str(attempts),
    }
    try:
        with patch.dict(os.environ, environment):
            for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
                os.environ.pop(name, None)
            from moto.s3.models import s3_backends
            from s3fs import S3FileSystem

            s3_backends.reset()  # of the whole process: an earlier server's bucket is there

            S3FileSystem.clear_instance_cache()
            S3FileSystem().mkdir(BUCKET)
            store.asked.clear()
            store.share = share
            yield store
            S3FileSystem.clear_instance_cache()
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
