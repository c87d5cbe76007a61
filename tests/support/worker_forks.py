"""Workers of Ray as forks of one process that has imported what they need.

Each worker of Ray is a new process: it imports torch, Ray Data and the package for two to four
seconds of CPU, and most tests start several. `forked_workers` puts `fork_worker.py` in the place of
Ray's `setup_worker.py`. That script asks a server for a fork, which runs Ray's `default_worker.py`
with the arguments, the environment and the open files that Ray gave. Only Rays that the process
of the tests starts are affected: commands that tests start as processes start workers as Ray does.
"""

import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.support import pretended_gpu

CLIENT = Path(__file__).with_name("fork_worker.py")
# The first job of every cluster. Ray's native part reads the job from the environment when it is
# imported, so the server serves one.
JOB = "01000000"
# Modules without polars, which starts a thread at its import: a fork would lack it.
MODULES = (
    "ray._private.workers.default_worker",
    "ray.data",
    "ray.train.torch",
    "torchvision",
    "skimage.segmentation",
    "skimage.measure",
    "scellst_ray.stages.networks",
    "scellst_ray.stages.make",
    "scellst_ray.preflight.nodes",
    "scellst_ray.training.pretrain",
)


@contextmanager
def forked_workers():
    """Let Rays that this process starts inside the `with` fork their workers."""
    from ray._private import services

    own = services.start_raylet
    setup_worker = (
        Path(find_spec("ray").origin).with_name("_private") / "workers" / "setup_worker.py"
    )
    settings = {"TESTS_FORKED_JOB": JOB, "TESTS_SETUP_WORKER": str(setup_worker)}
    # Workers that start before there is a job would start as Ray does.
    settings["RAY_prestart_worker_first_driver"] = "0"
    # Ray Train notices every 2 s that a worker is done or has died.
    settings["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.5"

    def start_raylet(*args, **kwargs):
        replaced = [str(CLIENT) if a == str(setup_worker) else a for a in args]
        assert replaced != list(args), "Ray passes the path of its setup_worker.py otherwise"
        with pytest.MonkeyPatch.context() as environment:
            for name, value in settings.items():
                environment.setenv(name, value)
            return own(*replaced, **kwargs)

    with (
        tempfile.TemporaryDirectory(prefix="f") as folder,
        pytest.MonkeyPatch.context() as patch,
        socket.socket(socket.AF_UNIX) as listener,
    ):
        settings["TESTS_FORK_ADDRESS"] = f"{folder}/s"
        listener.bind(settings["TESTS_FORK_ADDRESS"])
        listener.listen(1000)
        patch.setattr(services, "start_raylet", start_raylet)
        # A worker ends when the process that it takes for its raylet has ended.
        of_worker = {"RAY_JOB_ID": JOB, "RAY_RAYLET_PID": str(os.getpid())}
        server = subprocess.Popen(
            [sys.executable, "-m", "tests.support.worker_forks", str(listener.fileno())],
            pass_fds=[listener.fileno()],
            env=os.environ | of_worker | {"OPENBLAS_NUM_THREADS": "1"},
            cwd=CLIENT.parents[2],
        )
        try:
            yield
        finally:
            server.kill()
            server.wait()


def serve(listener):
    """Import what workers need, then fork a worker for each request."""
    import_modules()
    assert "polars" not in sys.modules
    assert draw_in_fork() != draw_in_fork(), "forks would give equal ids to different objects"
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        connection, _ = listener.accept()
        with connection:
            start, files, _, _ = socket.recv_fds(connection, 4, 3)
            message = connection.recv(int.from_bytes(start, "big"), socket.MSG_WAITALL)
            if os.fork() == 0:
                listener.close()
                connection.close()
                become_worker(files, **json.loads(message))
            for file in files:
                os.close(file)


def import_modules():
    """Import what workers need, without a draw from Ray's generator of ids.

    Forks would share the state of a generator that was used before. It is used for each class that
    is made an actor class.
    """
    import ray.actor
    from ray._raylet import ActorClassID

    class Drawn:
        @staticmethod
        def from_random():
            return ActorClassID(os.urandom(ActorClassID.size()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray.actor, "ActorClassID", Drawn)
        for name in MODULES:
            importlib.import_module(name)


def draw_in_fork():
    """Return an id as a fork of this process draws it."""
    from ray import ObjectID

    reader, writer = os.pipe()
    if os.fork() == 0:
        os.write(writer, ObjectID.from_random().binary())
        os._exit(0)
    os.wait()
    drawn = os.read(reader, 1000)
    os.close(reader)
    os.close(writer)
    return drawn


def become_worker(files, args, environment, folder):
    """Run a worker in this process, and end the process."""
    code = 1
    try:
        os.setsid()  # Ray ends a worker together with its group
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for number, file in enumerate(files):
            os.dup2(file, number)
            os.close(file)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        run_worker(args)
        code = 0
    except SystemExit as ended:
        code = ended.code or 0
    finally:
        if code:
            traceback.print_exc()
        os._exit(code)


def run_worker(args):
    """Do as `setup_worker.py` and the shell that it starts do."""
    from ray._private.runtime_env.context import RuntimeEnvContext
    from ray._private.utils import update_envs
    from ray._private.workers import setup_worker
    from ray._raylet import Config

    known, rest = setup_worker.parser.parse_known_args(args)
    context = RuntimeEnvContext.deserialize(known.serialized_runtime_env_context or "{}")
    update_envs(context.env_vars)
    Config.initialize("")  # reads RAY_AUTH_MODE again
    if os.environ.get("PYTHONPATH") == pretended_gpu.ENVIRONMENT["PYTHONPATH"]:
        # Its sitecustomize acts at the start of Python, which lies before the fork.
        pretended_gpu.pretend_in_this_process(pytest.MonkeyPatch())
    first = next(i for i, arg in enumerate(rest) if arg.endswith("default_worker.py"))
    sys.argv = rest[first:]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
