"""Read older Spatial Transcriptomics (ST) arrays: a counts TSV and a TSV of pixel positions."""

import re

import fsspec
import numpy as np
import polars as pl
from scipy import sparse

from scellst_ray.spots.table import Spots, join_spots, radius_px

POSITION_COLUMNS = ("x", "y", "pixel_x", "pixel_y")
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
        Selected spots that have counts.

    Raises:
        ValueError: A file is missing, cut off or transposed, or the files do not fit together.
    """
    radius0 = radius_px(spot_diameter_um, mpp, counts_uri)
    counts, spot_ids, genes = _read_counts(counts_uri)
    positions = _read_positions(positions_uri)
    return join_spots(counts, spot_ids, genes, positions, radius0, counts_uri)


def _read_bytes(uri: str) -> bytes:
    """Return the content of a file, decompressed if its name ends in .gz."""
    try:
        with fsspec.open(uri, "rb", compression="infer") as file:
            return bytes(file.read())
    except FileNotFoundError as error:
        message = f"{uri}: no such file. Check the manifest's `spots` and `spot_positions`."
        raise ValueError(message) from error
    except (EOFError, OSError) as error:
        message = f"{uri}: cannot be read ({error}). Expected a complete TSV, plain or gzipped."
        raise ValueError(message) from error


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
    except pl.exceptions.PolarsError as error:
        message = (
            f"{uri}: not a table of counts ({str(error).splitlines()[0]}). Expected a TSV, one row "
            "per spot: its name AxB, then one number per gene, under a header of gene names."
        )
        raise ValueError(message) from error
    spot_ids = [str(name) for name in table["spot"].to_list()]
    if not any(map(SPOT_NAME.fullmatch, spot_ids)) and any(map(SPOT_NAME.fullmatch, genes)):
        message = (
            f"{uri}: rows are {spot_ids[:3]} and columns {genes[:3]}: genes x spots. Expected "
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


def _read_positions(uri: str) -> pl.DataFrame:
    """Return the selected spots as columns spot_id, x0, y0 (level-0 px)."""
    text = _read_bytes(uri)
    try:
        table = pl.read_csv(text, separator="\t")
    except pl.exceptions.PolarsError as error:
        reason = str(error).splitlines()[0]
        message = f"{uri}: not a TSV ({reason}). Expected columns {list(POSITION_COLUMNS)}."
        raise ValueError(message) from error
    missing = [name for name in POSITION_COLUMNS if name not in table.columns]
    if missing:
        message = (
            f"{uri}: columns {table.columns}, {missing} missing. Expected a TSV with "
            f"{list(POSITION_COLUMNS)} and optionally `selected`."
        )
        raise ValueError(message)
    x, y = (pl.col(name).cast(pl.Int64).cast(pl.String) for name in ("x", "y"))
    try:
        if "selected" in table.columns:
            table = table.filter(pl.col("selected").cast(pl.Int64) == 1)
        return table.select(
            pl.concat_str([x, y], separator="x").alias("spot_id"),
            pl.col("pixel_x").cast(pl.Float64).alias("x0"),
            pl.col("pixel_y").cast(pl.Float64).alias("y0"),
        )
    except pl.exceptions.InvalidOperationError as error:
        reason = str(error).splitlines()[0]
        message = f"{uri}: a position is not a number ({reason}). Give a number in every row."
        raise ValueError(message) from error
