"""Export to GeoPackage, for GIS tools: one layer a slide. Memory does not grow with the slide.

Coordinates are level-0 px without a place on Earth, and y points down: GIS tools draw the slide
upside down.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from scellst_ray import storage
from scellst_ray.export.cell_blocks import CellBlock, cell_blocks
from scellst_ray.export.free_names import free_names
from scellst_ray.export.scored import CellScores
from scellst_ray.runs.reading import Run

COLUMNS = ("slide_id", "cell_id", "area_um2", "nucleus_type", "type_prob", "polygon")
# Names that no gene may have: GeoPackage numbers the rows by a column of its own.
TAKEN = (*COLUMNS, "distance", "fid")


def write_geopackage(run: Run, out: str, slide_ids: Sequence[str], genes: Sequence[str]) -> int:
    """Write the cells of slides, a layer for each slide; return their number.

    SQLite does not regard case: of the genes CD3E and Cd3e, or the slides s1 and S1, the second
    gets `_2` after its name, as has a gene with the name of another column.

    Args:
        run: The run.
        out: Local path or fsspec URI that ends in `.gpkg`.
        slide_ids: The slides.
        genes: The genes to write, a column each.

    Raises:
        ImportError: pyogrio is not installed.
        ValueError: a slide failed, a gene is unknown, or a table is damaged. Nothing is written.
    """
    try:
        import pyogrio  # noqa: PLC0415 - an extra
    except ImportError as error:
        message = f"{out}: GeoPackage needs pyogrio: pip install 'scellst-ray[gis]'"
        raise ImportError(message) from error
    count = 0

    def write(path: Path) -> None:
        nonlocal count
        file = path.with_name(f"{path.name}.gpkg")  # GDAL warns of other suffixes
        try:
            layers = free_names(slide_ids, is_cased=False)
            scores = CellScores(run)
            for slide_id, layer in zip(slide_ids, layers, strict=True):
                blocks = cell_blocks(run, slide_id, COLUMNS, genes, scores.of(slide_id))
                for number, block in enumerate(blocks):
                    with warnings.catch_warnings():
                        warnings.filterwarnings("ignore", "'crs' was not provided", UserWarning)
                        pyogrio.write_arrow(
                            _layer(block, genes),
                            str(file),
                            layer=layer,
                            driver="GPKG",
                            geometry_name="polygon",
                            geometry_type="Polygon",
                            append=number > 0 or file.exists(),
                        )
                    count += len(block.cells)
            file.replace(path)
        finally:
            file.unlink(missing_ok=True)

    storage.publish(out, write)
    return count


def _layer(block: CellBlock, genes: Sequence[str]) -> pa.Table:
    """Return the columns of a layer."""
    table = block.cells
    if block.distance_N is not None:
        table = table.append_column("distance", pa.array(block.distance_N.astype("float32")))
    scores = (
        {}
        if block.scores is None
        else dict(zip(block.scores.column_names, block.scores.columns, strict=True))
    )
    for name, values in scores.items():
        table = table.append_column(name, values)
    for number, name in enumerate(free_names(genes, (*TAKEN, *scores), is_cased=False)):
        table = table.append_column(name, pa.array(block.values_NG[:, number].copy()))
    # Metadata of GeoParquet would be taken for that of GeoArrow.
    return table.replace_schema_metadata()
