"""Single-cell gene expression from cohorts of H&E whole-slide images, on Ray.

Importing this package imports neither Ray nor torch; `open_run` is loaded at its first use.
"""

from typing import TYPE_CHECKING, Any

from scellst_ray.core.version import __version__

if TYPE_CHECKING:
    from scellst_ray.runs.reading import Run, open_run

__all__ = ["Run", "__version__", "open_run"]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - any attribute
    """Load the run reader on first use (PEP 562)."""
    if name in {"Run", "open_run"}:
        from scellst_ray.runs import reading  # noqa: PLC0415 - loaded at its first use

        return getattr(reading, name)
    message = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(message)
