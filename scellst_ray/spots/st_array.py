"""Read older Spatial Transcriptomics (ST) arrays: a counts TSV and a TSV of pixel positions."""

import re

import fsspec
import numpy as np
import polars as pl
from scipy import sparse

from scellst_ray.spots.features import select_genes
from scellst_ray.spots.files import read_bytes, reason_of, shown
from scellst_ray.spots.lattice import pitch_of_squares
from scellst_ray.spots.positions import marks_of, numbers_of, read_position_text
from scellst_ray.spots.resolution import StatedMpp, st_statements
from scellst_ray.spots.table import Spots, join_spots, radius_px

POSITION_COLUMNS = ("x", "y", "pixel_x", "pixel_y")
# Spots of ST arrays have 100 to 110 um.
ARRAY_DIAMETER_UM = (90.0, 115.0)
MAX_PLACE = 1e6
SPOT_NAME = re.compile(r"\d+x\d+")


def read_st_array(
    counts_uri: str, positions_uri: str, mpp: float, spot_diameter_um: float = 100.0
) -> Spots:
    """Read the spots of an ST array.

    Args:
        counts_uri: Path or fsspec address of a TSV of spots x genes, plain or gzipped. The first
            column names the spot as "AxB" (array x, array y), with or without a header cell.
        positions_uri: Path or fsspec address of a TSV with x, y (array coordinates), pixel_x,
            pixel_y (level-0 px) and optionally `selected` (spots with 0 are dropped).
        mpp: Resolution in um per level-0 px.
        spot_diameter_um: Spot diameter, 100 um on the first arrays.

    Returns:
        Selected spots that have counts. `stated_mpp` holds the resolutions that follow from the
        array's pitch of 200 um, or 150 um on later arrays.

    Raises:
        ValueError: A file is missing, cut off or transposed, or the files do not fit together.
    """
    radius0 = radius_px(spot_diameter_um, mpp, counts_uri)
    counts, spot_ids, genes = _read_counts(counts_uri)
    columns = select_genes(genes, None, counts_uri)
    counts, genes = counts[:, columns], [genes[column] for column in columns]
    positions, stated = _read_positions(positions_uri)
    # Tables in this form with other spots say nothing about the pitch.
    is_array = ARRAY_DIAMETER_UM[0] <= spot_diameter_um <= ARRAY_DIAMETER_UM[1]
    stated_mpp = tuple(stated) if is_array else ()
    return join_spots(
        counts, spot_ids, genes, positions, radius0, counts_uri, stated_mpp=stated_mpp
    )


def _read_bytes(uri: str) -> bytes:
    """Return the content of a file, decompressed if its name ends in .gz."""
    fs, path = fsspec.core.url_to_fs(uri)
    return read_bytes(fs, path)


def _read_counts(uri: str) -> tuple[sparse.csr_matrix, list[str], list[str]]:
    """Return counts [B, G], spot ids and gene names."""
    text = _read_bytes(uri)
    try:
        # The header is split off, because polars would rename repeated genes in it.
        header_line, _, body = text.partition(b"\n")
        header = header_line.decode("utf-8-sig").rstrip("\r").split("\t")
        num_columns = _read_tsv(body, 1, None).width
        genes = header[len(header) + 1 - num_columns :]
        schema = {"spot": pl.String()} | {f"gene_{i}": pl.Float32() for i in range(len(genes))}
        table = _read_tsv(body, None, schema)
    except (pl.exceptions.PolarsError, UnicodeDecodeError) as error:
        message = (
            f"{uri}: not a table of counts ({reason_of(error)}). Expected a TSV, one row "
            "per spot: its name AxB, then one number per gene, under a header of gene names."
        )
        raise ValueError(message) from error
    spot_ids = [str(name) for name in table["spot"].to_list()]
    if not any(map(SPOT_NAME.fullmatch, spot_ids)) and any(map(SPOT_NAME.fullmatch, genes)):
        message = (
            f"{uri}: rows are {shown(spot_ids[:3])} and columns {shown(genes[:3])}: genes x "
            "spots. Expected "
            "spots x genes; transpose the file."
        )
        raise ValueError(message)
    values = table.drop("spot").fill_null(np.nan).to_numpy()
    return sparse.csr_matrix(values), spot_ids, genes


def _read_tsv(
    text: bytes, num_rows: int | None, schema: dict[str, pl.String | pl.Float32] | None
) -> pl.DataFrame:
    """Read a TSV without header, as strings if the schema is None."""
    return pl.read_csv(
        text,
        separator="\t",
        has_header=False,
        quote_char=None,
        n_rows=num_rows,
        schema=schema,
        infer_schema=schema is not None,
    )


def _read_positions(uri: str) -> tuple[pl.DataFrame, list[StatedMpp]]:
    """Return the selected spots as columns spot_id, x0, y0 (level-0 px), and stated resolutions."""
    table = read_position_text(_read_bytes(uri), POSITION_COLUMNS, uri)
    missing = [name for name in POSITION_COLUMNS if name not in table.columns]
    if missing:
        found = [name for name in table.columns if name != "decimal comma"]
        message = (
            f"{uri}: columns {shown(found[:10])}, {missing} missing. Expected a TSV with "
            f"{list(POSITION_COLUMNS)} and optionally `selected`."
        )
        raise ValueError(message)
    if "selected" in table.columns:
        table = table.filter(pl.Series(marks_of(table, "selected", uri), dtype=pl.Boolean))
    x, y, x0, y0 = (numbers_of(table, name, uri) for name in POSITION_COLUMNS)
    if not np.isfinite([x, y]).all() or (np.abs([x, y]) > MAX_PLACE).any():
        message = f"{uri}: x or y is not a place in the array. Give whole numbers in every row."
        raise ValueError(message)
    spot_id = [f"{int(a)}x{int(b)}" for a, b in zip(x, y, strict=True)]
    pitch0 = pitch_of_squares(y, x, np.column_stack([x0, y0]))
    return pl.DataFrame({"spot_id": spot_id, "x0": x0, "y0": y0}), st_statements(pitch0)
