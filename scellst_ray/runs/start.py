"""Starting work on an output folder: one folder is one run, and one driver works on it.

Two commands may start at the same moment on one new folder. So what a folder is, is looked up and
written only by the driver that holds its lease; whoever comes second finds either the lease or the
run of the first.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from scellst_ray import storage
from scellst_ray.runs.folder import RunFolder, begin_run, check_folder
from scellst_ray.runs.identity import Identity
from scellst_ray.runs.lease import Lease, hold_lease


@contextmanager
def hold_run(
    uri: str,
    job: str,
    identity: Identity | Mapping[str, object],
    libraries: Mapping[str, str] | None = None,
) -> Iterator[tuple[RunFolder, Lease]]:
    """Create or open a run folder, and hold its lease inside a `with`.

    Args:
        uri: The folder. It is created if it is absent.
        job: The command.
        identity: Every setting that changes results.
        libraries: Versions of the libraries that decide results, by name; None: not noted.

    Raises:
        LeaseError: another driver works on the folder.
        ValueError: the folder holds another run or other files, or its run was begun with other
            libraries. Nothing was written then.
    """
    uri = storage.absolute(uri)
    check_folder(uri, job, identity, libraries)  # first, so that a refused command leaves no trace
    with hold_lease(uri) as lease:
        yield begin_run(uri, job, identity, libraries=libraries), lease
