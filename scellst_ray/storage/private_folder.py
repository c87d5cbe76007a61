"""Folders for this user alone below one that all users share, such as /tmp."""

import os
import stat
from contextlib import suppress
from pathlib import Path

# Rights of a folder's group and of all other users.
OTHERS, OTHERS_WRITE = stat.S_IRWXG | stat.S_IRWXO, stat.S_IWGRP | stat.S_IWOTH


def make_private_folder(folder: Path, remedy: str) -> None:
    """Make a folder for this user alone, unless it exists, and check it.

    Its name can be foretold, so another user may have made it first. Owner and mode are those of
    the opened folder, so that it cannot be exchanged in between. What other users may only read is
    closed: nobody else can have put files there.

    Args:
        folder: The folder. Its parent is made if it is absent.
        remedy: What to do if it cannot be used, for the message.

    Raises:
        OSError: it cannot be made; or it is a link, belongs to another user, or others may write to
            it, so its content cannot be trusted.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    try:
        opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        fault = "is a symbolic link or no folder that this user may read"
        raise _refusal(folder, fault, remedy) from error
    try:
        found = os.fstat(opened)
        if found.st_uid != os.geteuid():
            fault = f"belongs to user {found.st_uid}, not to user {os.geteuid()}"
            raise _refusal(folder, fault, remedy)
        mode = stat.S_IMODE(found.st_mode)
        if mode & OTHERS_WRITE:
            raise _refusal(folder, f"may be written by other users (mode {mode:o})", remedy)
        if mode & OTHERS:
            os.fchmod(opened, mode & ~OTHERS)
    finally:
        os.close(opened)


def is_private(folder: Path) -> bool:
    """Whether a folder exists, belongs to this user, and is closed to all others."""
    try:
        found = folder.lstat()
    except OSError:
        return False
    is_own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()
    return is_own and not found.st_mode & OTHERS


def _refusal(folder: Path, fault: str, remedy: str) -> PermissionError:
    message = f"{folder}: {fault}, so it cannot be used; remove it, or {remedy}"
    return PermissionError(message)
