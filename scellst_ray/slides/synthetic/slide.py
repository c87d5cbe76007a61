"""Make a synthetic slide with known nuclei, known expression, and spots counted from both.

    config = SyntheticConfig(seed=1)
    tissue = make_tissue(config)              # truth only, no pixels
    image = render_region(tissue, box)        # any part of the slide
    paths = write_synthetic_slide("folder", config)

The demo, the tests and the benchmarks use such slides. Nuclei never overlap, so that a measurement
shows the quality of the pipeline and not the difficulty of the image. N: nuclei; G: genes.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import shapely
from numpy.typing import NDArray

from scellst_ray import storage
from scellst_ray.core.geometry import Box
from scellst_ray.slides.synthetic.config import NUCLEUS_TYPES, SyntheticConfig
from scellst_ray.slides.synthetic.expression import (
    GeneProgramme,
    draw_counts,
    draw_programme,
    expected_rates,
)
from scellst_ray.slides.synthetic.layout import TissueLayout, make_layout
from scellst_ray.slides.synthetic.render import SlidePainter
from scellst_ray.slides.synthetic.spots import (
    SyntheticSpots,
    make_spots,
    write_space_ranger,
    write_st_array,
)
from scellst_ray.slides.synthetic.tiff import write_slide

__all__ = [
    "NUCLEUS_TYPES",
    "SyntheticConfig",
    "SyntheticPaths",
    "Tissue",
    "expression_table",
    "make_tissue",
    "render",
    "render_region",
    "truth_table",
    "write_synthetic_slide",
]


@dataclass(frozen=True)
class Tissue:
    """The truth of one synthetic slide: everything except its pixels.

    Attributes:
        layout: Configuration, tissue outline and nuclei (um).
        programme: Dependence of each gene on type, area and staining.
        expected_NG: Expected molecules of each cell, float32 [N, G].
        counts_NG: Molecules drawn from them, int32 [N, G].
        spots: Spots and the molecules they captured.
    """

    layout: TissueLayout
    programme: GeneProgramme
    expected_NG: NDArray[np.float32]
    counts_NG: NDArray[np.int32]
    spots: SyntheticSpots

    @property
    def config(self) -> SyntheticConfig:
        """Configuration of the slide."""
        return self.layout.config


@dataclass(frozen=True)
class SyntheticPaths:
    """The files of one written slide.

    Attributes:
        slide: Pyramidal TIFF.
        space_ranger: Space Ranger's `outs` folder of hexagonal spots; None with square spots.
        st_counts: Counts of square spots; None with hexagonal spots.
        st_positions: Positions of square spots; None with hexagonal spots.
        truth: File `truth.parquet`, see `truth_table`.
        truth_expression: File `truth_expression.parquet`, see `expression_table`.
    """

    slide: Path
    space_ranger: Path | None
    st_counts: Path | None
    st_positions: Path | None
    truth: Path
    truth_expression: Path


def make_tissue(config: SyntheticConfig) -> Tissue:
    """Return the truth of one slide: nuclei, expression, spots."""
    layout = make_layout(config)
    programme = draw_programme(config.num_genes, config.programme_seed)
    expected_NG = expected_rates(config, programme, layout.nuclei)
    counts_NG = draw_counts(config, expected_NG)
    return Tissue(layout, programme, expected_NG, counts_NG, make_spots(layout, counts_NG))


def render(tissue: Tissue) -> NDArray[np.uint8]:
    """Return the whole slide at level 0, uint8 [height0, width0, 3]."""
    return render_region(tissue, Box(0, 0, tissue.config.width0, tissue.config.height0))


def render_region(tissue: Tissue, box: Box) -> NDArray[np.uint8]:
    """Return one region at level 0, uint8 [h0, w0, 3], as `render` paints it."""
    return SlidePainter(tissue.layout).region(box)


def truth_table(tissue: Tissue) -> pa.Table:
    """Return one row per nucleus.

    Columns: cell_id int64, x0 and y0 float64 (centroid, level-0 px), area_um2 float64,
    nucleus_type string, stain float64 (staining relative to the type's mean), polygon binary (WKB,
    closed, level-0 px).
    """
    nuclei, mpp = tissue.layout.nuclei, tissue.config.mpp
    polygons = shapely.to_wkb(shapely.polygons(nuclei.outline_um / mpp))
    names = np.array(NUCLEUS_TYPES)[nuclei.type_index]
    return pa.table(
        {
            "cell_id": pa.array(np.arange(len(nuclei)), pa.int64()),
            "x0": pa.array(nuclei.centroid_um[:, 0] / mpp, pa.float64()),
            "y0": pa.array(nuclei.centroid_um[:, 1] / mpp, pa.float64()),
            "area_um2": pa.array(nuclei.area_um2, pa.float64()),
            "nucleus_type": pa.array(names.tolist(), pa.string()),
            "stain": pa.array(nuclei.stain, pa.float64()),
            "polygon": pa.array(polygons.tolist(), pa.binary()),
        }
    )


def expression_table(tissue: Tissue) -> pa.Table:
    """Return the expected molecules: cell_id int64 and one float32 column per gene."""
    columns = {"cell_id": pa.array(np.arange(len(tissue.expected_NG)), pa.int64())}
    for g, name in enumerate(tissue.programme.gene_names):
        columns[name] = pa.array(np.ascontiguousarray(tissue.expected_NG[:, g]), pa.float32())
    return pa.table(columns)


def write_synthetic_slide(
    folder: str | Path, config: SyntheticConfig, *, name: str = "slide"
) -> SyntheticPaths:
    """Make one slide and write it with its spots and its truth.

    Args:
        folder: Folder of this slide alone; created if absent.
        config: Configuration of the slide.
        name: Name of the slide and of the files of square spots: `<name>.tiff`.

    Returns:
        Paths of the files. A file appears under its name only when it is complete.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tissue = make_tissue(config)
    genes, spots = tissue.programme.gene_names, tissue.spots
    space_ranger = st_counts = st_positions = None
    if config.spot_layout == "hex":
        space_ranger = write_space_ranger(folder / "outs", config, spots, genes)
    else:
        st_counts, st_positions = write_st_array(folder, name, spots, genes)
    return SyntheticPaths(
        slide=write_slide(folder / f"{name}.tiff", tissue.layout),
        space_ranger=space_ranger,
        st_counts=st_counts,
        st_positions=st_positions,
        truth=_write_parquet(folder / "truth.parquet", truth_table(tissue)),
        truth_expression=_write_parquet(
            folder / "truth_expression.parquet", expression_table(tissue)
        ),
    )


def _write_parquet(path: Path, table: pa.Table) -> Path:
    """Publish a table; return its path."""
    storage.publish_table(str(path), table)
    return path
