"""Say in one line which extra of this package installs a package that is absent."""

from collections.abc import Iterator

# The extra that brings a package, by the name under which the package is imported.
EXTRAS = {
    "ray": "run",
    "tensorboardX": "run",
    "torch": "run",
    "torchvision": "run",
    "timm": "timm",
    "s3fs": "s3",
    "gcsfs": "gcs",
    "adlfs": "azure",
    "pyogrio": "gis",
    "openpyxl": "excel",
    "spatialdata": "spatialdata",
    "sopa": "explorer",
}


def install_line(package: str) -> str:
    """Return the command that installs a package of EXTRAS."""
    return f"pip install 'scellst-ray[{EXTRAS[package]}]'"


def explain_absent(error: BaseException) -> str | None:
    """Return a line that names the absent package and how to install it; None for other errors.

    Args:
        error: An error; those that caused it are looked at, too, since fsspec tells of a missing
            package in an error of its own.
    """
    for cause in _causes(error):
        if isinstance(cause, ImportError) and "pip install 'scellst-ray[" in str(cause):
            return str(cause)
        package = (getattr(cause, "name", None) or "").partition(".")[0]
        if isinstance(cause, ModuleNotFoundError) and package in EXTRAS:
            return f"{package} is needed and not installed: {install_line(package)}"
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and the errors that it was raised from."""
    seen: set[int] = set()
    now: BaseException | None = error
    while now is not None and id(now) not in seen:
        seen.add(id(now))
        yield now
        now = now.__cause__
