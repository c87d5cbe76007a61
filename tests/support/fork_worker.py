"""Runs in place of Ray's `setup_worker.py`: asks the server of `worker_forks` for a worker.

It imports next to nothing, because it runs once for each worker.
"""

import json
import os
import socket
import sys


def main():
    """Send arguments, environment and open files to the server; end once it has forked."""
    if os.environ["RAY_JOB_ID"] != os.environ["TESTS_FORKED_JOB"]:
        # The server serves one job.
        os.execv(sys.executable, [sys.executable, os.environ["TESTS_SETUP_WORKER"], *sys.argv[1:]])
    folder = os.getcwd()  # noqa: PTH109 - pathlib takes longer than the rest of this script
    request = {"args": sys.argv[1:], "environment": dict(os.environ), "folder": folder}
    message = json.dumps(request).encode()
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(os.environ["TESTS_FORK_ADDRESS"])
        socket.send_fds(server, [len(message).to_bytes(4, "big")], [0, 1, 2])
        server.sendall(message)
        server.recv(1)


if __name__ == "__main__":
    main()
