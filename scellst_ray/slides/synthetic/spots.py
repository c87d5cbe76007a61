"""Count the spots of a synthetic slide from its cells, and write them as sequencers do.

S: spots; G: genes; N: cells.
"""

import gzip
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from scipy.spatial import cKDTree

from scellst_ray.slides.synthetic.config import SyntheticConfig
from scellst_ray.slides.synthetic.layout import TissueLayout


@dataclass(frozen=True)
class SyntheticSpots:
    """S spots of one slide.

    Attributes:
        barcode: Unique name of each spot, str [S].
        array_row: Row in the grid of spots, int64 [S].
        array_col: Column in the grid, int64 [S]; hexagonal rows use every second, as in Visium.
        x0: Centre along x in level-0 px, float64 [S]; whole numbers, as the files hold them.
        y0: Centre along y in level-0 px, float64 [S]; whole numbers.
        radius0: Radius in level-0 px.
        in_tissue: Whether the centre lies in tissue, bool [S].
        num_cells: Number of cells whose centroid lies in the circle, int64 [S].
        counts_SG: Molecules captured from these cells, int32 [S, G].
    """

    barcode: NDArray[np.str_]
    array_row: NDArray[np.int64]
    array_col: NDArray[np.int64]
    x0: NDArray[np.float64]
    y0: NDArray[np.float64]
    radius0: float
    in_tissue: NDArray[np.bool_]
    num_cells: NDArray[np.int64]
    counts_SG: NDArray[np.int32]

    def __len__(self) -> int:
        """Return the number of spots."""
        return len(self.x0)


def make_spots(layout: TissueLayout, counts_NG: NDArray[np.int32]) -> SyntheticSpots:
    """Return a grid of spots over the slide, each with the counts of the cells in it.

    Args:
        layout: Tissue and nuclei of the slide.
        counts_NG: Molecules of each cell, int32 [N, G].
    """
    config = layout.config
    row, column, x_um, y_um = _grid(config)
    x0, y0 = np.rint(x_um / config.mpp), np.rint(y_um / config.mpp)
    radius0 = config.spot_diameter_um / 2 / config.mpp
    centres = np.stack([x0, y0], axis=1)
    cells_x0y0 = layout.nuclei.centroid_um / config.mpp
    links = _links(centres, cells_x0y0, radius0)
    total_SG = np.asarray(links @ counts_NG, np.int64).reshape(len(x0), counts_NG.shape[1])
    rng = config.stream("capture")
    efficiency_S = config.capture_efficiency * np.exp(rng.normal(0, config.capture_sd, len(x0)))
    captured_SG = rng.binomial(total_SG, np.minimum(efficiency_S, 1.0)[:, None])
    return SyntheticSpots(
        barcode=_barcodes(len(x0), config.seed),
        array_row=row,
        array_col=column,
        x0=x0,
        y0=y0,
        radius0=radius0,
        in_tissue=layout.edge_um.at(centres * config.mpp) > 0,
        num_cells=np.asarray(links.sum(axis=1), np.int64).reshape(-1),
        counts_SG=captured_SG.astype(np.int32),
    )


def write_space_ranger(
    folder: str | Path,
    config: SyntheticConfig,
    spots: SyntheticSpots,
    gene_names: Sequence[str],
    *,
    old_positions: bool = False,
) -> Path:
    """Write the files of a Space Ranger `outs` folder that readers use (no images).

    Args:
        folder: The `outs` folder; created if absent.
        config: Configuration of the slide, for its size in px.
        spots: All spots. The matrix holds those in tissue, the positions file holds all.
        gene_names: G gene names.
        old_positions: Write `tissue_positions_list.csv` without header (before Space Ranger 2).

    Returns:
        The folder.
    """
    folder = Path(folder)
    matrix_folder = folder / "filtered_feature_bc_matrix"
    inside = np.flatnonzero(spots.in_tissue)
    _write_gzip(matrix_folder / "matrix.mtx.gz", _matrix_market(spots.counts_SG[inside].T))
    features = [f"SYNG{g:011d}\t{name}\tGene Expression" for g, name in enumerate(gene_names)]
    _write_gzip(matrix_folder / "features.tsv.gz", _lines(features))
    _write_gzip(matrix_folder / "barcodes.tsv.gz", _lines(spots.barcode[inside].tolist()))
    name = "tissue_positions_list.csv" if old_positions else "tissue_positions.csv"
    positions = _positions_csv(spots, header=not old_positions)
    _publish(folder / "spatial" / name, positions.encode())
    longer_px = max(config.width0, config.height0)
    factors = {
        "spot_diameter_fullres": 2 * spots.radius0,
        "fiducial_diameter_fullres": 2 * spots.radius0 * 1.6154,
        "tissue_hires_scalef": min(1.0, 2000 / longer_px),
        "tissue_lowres_scalef": min(1.0, 600 / longer_px),
    }
    _publish(folder / "spatial" / "scalefactors_json.json", json.dumps(factors).encode())
    return folder


def write_st_array(
    folder: str | Path, name: str, spots: SyntheticSpots, gene_names: Sequence[str]
) -> tuple[Path, Path]:
    """Write counts and positions in the files of older spatial transcriptomics arrays.

    Args:
        folder: Folder of the files; created if absent.
        name: Section name: the files are `<name>.tsv.gz` and `<name>_selection.tsv`.
        spots: All spots; those in tissue are written, keyed `<column>x<row>`.
        gene_names: G gene names.

    Returns:
        Paths of the counts (spots × genes) and of the positions.
    """
    inside = np.flatnonzero(spots.in_tissue).tolist()
    counts, positions = ["\t".join(["", *gene_names])], []
    for s in inside:
        x, y = spots.array_col[s], spots.array_row[s]
        counts.append("\t".join([f"{x}x{y}", *map(str, spots.counts_SG[s].tolist())]))
        positions.append(f"{x}\t{y}\t{x:.3f}\t{y:.3f}\t{spots.x0[s]:.2f}\t{spots.y0[s]:.2f}\t1")
    header = "x\ty\tnew_x\tnew_y\tpixel_x\tpixel_y\tselected"
    counts_path = Path(folder) / f"{name}.tsv.gz"
    positions_path = Path(folder) / f"{name}_selection.tsv"
    _write_gzip(counts_path, _lines(counts))
    _publish(positions_path, _lines([header, *positions]).encode())
    return counts_path, positions_path


def _positions_csv(spots: SyntheticSpots, *, header: bool) -> str:
    """Return the text of Space Ranger's positions file; its last two columns are y, then x."""
    names = "barcode,in_tissue,array_row,array_col,pxl_row_in_fullres,pxl_col_in_fullres"
    rows = [
        f"{spots.barcode[s]},{int(spots.in_tissue[s])},{spots.array_row[s]},{spots.array_col[s]},"
        f"{spots.y0[s]:.0f},{spots.x0[s]:.0f}"
        for s in range(len(spots))
    ]
    return _lines([names, *rows] if header else rows)


def _grid(
    config: SyntheticConfig,
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """Return array row, array column, x and y in um of every spot that lies on the slide."""
    pitch, start = config.spot_pitch_um, config.spot_diameter_um / 2
    hexagonal = config.spot_layout == "hex"
    step_x = pitch / 2 if hexagonal else pitch
    step_y = pitch * 0.75**0.5 if hexagonal else pitch
    num_rows = int((config.height_um - 2 * start) / step_y) + 1
    num_columns = int((config.width_um - 2 * start) / step_x) + 1
    rows = np.arange(max(0, num_rows), dtype=np.int64)
    columns = np.arange(max(0, num_columns), dtype=np.int64)
    row, column = (axis.ravel() for axis in np.meshgrid(rows, columns, indexing="ij"))
    if hexagonal:
        used = (row + column) % 2 == 0
        row, column = row[used], column[used]
    x_um, y_um = start + column.astype(np.float64) * step_x, start + row.astype(np.float64) * step_y
    return row, column, x_um, y_um


def _links(centres: NDArray[np.float64], cells: NDArray[np.float64], radius0: float) -> csr_matrix:
    """Return the 0/1 matrix [S, N] of cells within `radius0` of each centre."""
    shape = (len(centres), len(cells))
    if 0 in shape:
        return csr_matrix(shape, dtype=np.int64)
    cells_of_spots = cKDTree(cells).query_ball_point(centres, radius0, return_sorted=True)
    offsets = np.concatenate([[0], np.cumsum([len(cells) for cells in cells_of_spots])])
    indices = np.concatenate([np.asarray(cells, np.int64) for cells in cells_of_spots])
    return csr_matrix((np.ones(len(indices), np.int64), indices, offsets), shape=shape)


def _barcodes(num: int, seed: int) -> NDArray[np.str_]:
    """Return `num` unique barcodes of 16 bases: an odd factor permutes numbers below 4^16."""
    scrambled = (np.arange(num, dtype=np.uint64) * 2654435761 + seed % 2**32) % 2**32
    digits = (scrambled[:, None] >> (2 * np.arange(16, dtype=np.uint64))) & 3
    letters = np.array(list("ACGT"))[digits.astype(np.int64)]
    return np.array(["".join(row) + "-1" for row in letters])


def _matrix_market(counts_GS: NDArray[np.int32]) -> str:
    """Return the text of a matrix in Matrix Market coordinates, column after column."""
    column, row = np.nonzero(counts_GS.T)
    out = io.StringIO()
    out.write("%%MatrixMarket matrix coordinate integer general\n")
    out.write(f"{counts_GS.shape[0]} {counts_GS.shape[1]} {len(row)}\n")
    np.savetxt(out, np.stack([row + 1, column + 1, counts_GS[row, column]], axis=1), fmt="%d")
    return out.getvalue()


def _lines(lines: list[str]) -> str:
    """Return the lines as one text, with a newline after each."""
    return "".join(line + "\n" for line in lines)


def _write_gzip(path: Path, text: str) -> None:
    """Write compressed text without a time stamp, so that equal text gives equal bytes."""
    _publish(path, gzip.compress(text.encode(), mtime=0))


def _publish(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, then rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content)
    temporary.replace(path)
