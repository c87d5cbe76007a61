"""A Ray on this machine for one user: it listens on the loopback address, and its files are closed.

Anyone who reaches Ray's ports with its token, or its sockets, can run code as this user.
"""

import logging
import os
import secrets
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

import ray

from scellst_ray.pipelines.ray_internals import LONGEST_TEMP_DIR, listen_on_loopback
from scellst_ray.storage.private_folder import OTHERS, is_private, make_private_folder

VARIABLE = "RAY_TMPDIR"
TOKEN_VARIABLES = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


def start_local_ray(num_cpus: int | None, *, dashboard: bool) -> None:
    """Start a Ray that only this user and this machine can reach.

    Args:
        num_cpus: CPUs that Ray hands out; None: all cores.
        dashboard: Whether it has a dashboard.

    Raises:
        OSError: the folder for Ray's files is open to other users.
        ValueError: the path of that folder is too long.
    """
    folder = temp_dir()
    close_token()
    with listen_on_loopback():
        # "local" never joins another cluster on this machine.
        ray.init(
            address="local",
            num_cpus=num_cpus,
            include_dashboard=dashboard,
            dashboard_host="127.0.0.1",
            logging_level=logging.WARNING,
            _temp_dir=str(folder),
        )


def temp_dir() -> Path:
    """Return the folder for Ray's sessions: logs, sockets, and objects that memory cannot hold.

    Ray opens its own folder to all users, so it lies in one that is closed. Its place is
    $RAY_TMPDIR, else the temporary folder, else /tmp if that is too long for the path of a socket
    or is not ASCII, which Ray cannot take.

    Raises:
        OSError: the folder is open to other users, or cannot be written.
        ValueError: $RAY_TMPDIR is too long, or is not ASCII.
    """
    given = os.environ.get(VARIABLE)
    parents = [given] if given else [tempfile.gettempdir(), "/tmp"]  # noqa: S108 - closed below
    for parent in map(Path, parents):
        closed = parent if is_private(parent) else parent / f"scellst_{os.getuid()}"
        folder = (closed / "ray").absolute()
        if str(folder).isascii() and len(str(folder)) <= LONGEST_TEMP_DIR:
            if closed != parent:
                make_private_folder(closed, f"set {VARIABLE} to a short folder of your own")
            return folder
    longest = LONGEST_TEMP_DIR - len(os.fsencode(folder)) + len(os.fsencode(parent.absolute()))
    message = (
        f"{VARIABLE} is {parent}, too long for the paths of Ray's sockets, or not ASCII; set it to "
        f"a folder on a local disk with an ASCII path of at most {longest} bytes"
    )
    raise ValueError(message)


def close_token() -> None:
    """Let no other user read the token of Ray; make it if it is absent, as Ray would.

    Ray writes it to ~/.ray/auth_token with the rights that the umask leaves, often for all to read.
    A token that the environment names is left as it is.
    """
    if any(map(os.environ.get, TOKEN_VARIABLES)):
        return
    path = Path.home() / ".ray" / "auth_token"
    # Without a home that can be written, Ray itself says what is wrong.
    with suppress(OSError):
        path.parent.mkdir(mode=0o700, exist_ok=True)
        try:
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            if stat.S_IMODE(path.stat().st_mode) & OTHERS:
                path.chmod(0o600)
        else:
            with os.fdopen(file, "w") as handle:
                handle.write(secrets.token_hex(32))
