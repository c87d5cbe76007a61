"""Figures for reports: functions that make and save them, and maps of genes over a slide."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(width_inch: float, height_inch: float) -> "Figure":
    """Return an empty figure of 150 dots per inch that needs no display."""
    # Imported only when something is drawn, since matplotlib writes to the home folder.
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(width_inch, height_inch), dpi=150)
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: "Figure", path: Path) -> None:
    """Save a figure as a PNG: under a temporary name first, so the file is whole or absent."""
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, format="png")
    temporary.replace(path)


def gene_map(
    path: Path,
    panels: list[tuple[str, NDArray[np.floating], NDArray[np.floating]]],
    size0: tuple[int, int],
    mpp: float,
    background: NDArray[np.uint8] | None = None,
) -> None:
    """Draw cells coloured by expression, in panels next to each other, as a PNG.

    Args:
        path: PNG to write.
        panels: One (title, xy0 [N, 2] in level-0 px, values [N]) per panel. The colour scale of a
            panel reaches from the 1 % to the 99 % quantile of its values.
        size0: Slide (width, height) in level-0 px.
        mpp: um per level-0 px; axes are in mm.
        background: The slide, RGB [H, W, 3], shown as the first panel if given.
    """
    num_panels = len(panels) + (background is not None)
    width_mm, height_mm = (side * mpp / 1000 for side in size0)
    figure = new_figure(4.6 * num_panels, 4.2 * height_mm / width_mm + 0.6)
    axes = list(figure.subplots(1, num_panels, squeeze=False)[0])
    extent = (0.0, width_mm, height_mm, 0.0)
    if background is not None:
        axes[0].imshow(background, extent=extent)
        axes[0].set_title("slide")
    for axis, (title, xy0, values) in zip(axes[num_panels - len(panels) :], panels, strict=True):
        low, high = np.nanpercentile(values, (1, 99)) if len(values) else (0.0, 1.0)
        xy_mm = np.asarray(xy0) * mpp / 1000
        # A dot is about as large on the page as a nucleus.
        dots = axis.scatter(
            *xy_mm.T, c=values, s=3.0, cmap="viridis", vmin=low, vmax=high, linewidths=0
        )
        axis.set(xlim=extent[:2], ylim=extent[2:], title=title, facecolor="#f4f4f4")
        # An inset takes no space from the panel, so all panels keep the same size.
        figure.colorbar(dots, cax=axis.inset_axes((1.02, 0.0, 0.04, 1.0)))
    for axis in axes:
        axis.set(aspect="equal", xlabel="mm")
    figure.tight_layout()
    save_figure(figure, path)
