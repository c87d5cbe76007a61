"""The stored head without torch: its file, and expression computed from stored hidden factors.

A head maps embeddings of cells to expression. `predict` stores only its last hidden layer, the
hidden factor. The functions here compute expression from it, so that reading results needs no
network library.

Shape letters: N cells, K members of an ensemble (mostly 1), H hidden (256), G genes.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from scellst_ray import storage
from scellst_ray.core.halves import to_float32
from scellst_ray.models.mil.head_file import Formula, parse_head

# Name of a head file in the folder of `train` and in the run of `predict`.
HEAD_FILE = "head.safetensors"
# Number of values computed at a time: 32 MB of float32 for any number of genes.
BLOCK_VALUES = 1 << 23


@dataclass(frozen=True)
class LastLayer:
    """The last layer of a head: with the hidden factor it gives expression.

    Attributes:
        genes: The panel: G names of genes, in order.
        weight_KGH: Weights, float32 [K, G, H].
        bias_KG: Biases, float32 [K, G].
        scale_KG: Factors of the softplus, float32 [K, G]; 1 unless the head is for counts.
        formula: Computation of the head.
        info: Info of the head (see INFO_KEYS).
    """

    genes: list[str]
    weight_KGH: NDArray[np.float32]
    bias_KG: NDArray[np.float32]
    scale_KG: NDArray[np.float32]
    formula: Formula
    info: dict[str, Any]

    def select(self, index: NDArray[np.integer]) -> "LastLayer":
        """Return the layer for the genes at these indices, in the order of the indices."""
        return replace(
            self,
            genes=[self.genes[i] for i in index],
            weight_KGH=self.weight_KGH[:, index],
            bias_KG=self.bias_KG[:, index],
            scale_KG=self.scale_KG[:, index],
        )

    def expression(
        self, hidden_NKH: NDArray[np.floating], what: Literal["mean", "sd"] = "mean"
    ) -> NDArray[np.float32]:
        """Compute expression from stored hidden factors.

        Args:
            hidden_NKH: Hidden factors as stored, float16 [N, K * H].
            what: 'mean' over members, or 'sd', their standard deviation (over K, not K - 1). The
                deviation says how far networks trained on the same spots disagree about a cell.

        Returns:
            float32 [N, G], equal to MilHead.from_hidden (or the deviation of its members) within a
            relative error of 1e-5.

        Raises:
            ValueError: 'sd' is requested of a single network, or the factor does not fit the head.
        """
        num_members, _, hidden_dim = self.weight_KGH.shape
        if hidden_NKH.shape[1] != num_members * hidden_dim:
            message = (
                f"hidden factor has {hidden_NKH.shape[1]} values per cell, but this head has "
                f"{num_members} x {hidden_dim}: use the head of the run that stored the factor."
            )
            raise ValueError(message)
        if what == "sd" and num_members == 1:
            message = "this head is one network: for a deviation train with ensemble above 1."
            raise ValueError(message)
        mean_NG = np.zeros((len(hidden_NKH), len(self.genes)), np.float32)
        square_NG = np.zeros_like(mean_NG) if what == "sd" else None
        members = zip(self.weight_KGH, self.bias_KG, self.scale_KG, strict=True)
        for count, (weight_GH, bias_G, scale_G) in enumerate(members, start=1):
            h_NH = hidden_NKH[:, (count - 1) * hidden_dim : count * hidden_dim]
            y_NG = expression_from_hidden(h_NH, weight_GH, bias_G, self.formula.beta) * scale_G
            # Welford's update gives a deviation without subtracting large squares.
            step_NG = y_NG - mean_NG
            mean_NG += step_NG / count
            if square_NG is not None:
                square_NG += step_NG * (y_NG - mean_NG)
        return mean_NG if square_NG is None else np.sqrt(square_NG / num_members)


def read_last_layer(uri: str, sha256: str | None = None) -> LastLayer:
    """Read the last layer of a head from a path or any fsspec address.

    Args:
        uri: The file.
        sha256: SHA-256 of the expected head in hex; None: any head.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: See parse_head.
    """
    head = parse_head(storage.read_bytes(uri), uri, sha256)
    tensors, formula = head.tensors, head.formula
    genes: list[str] = head.info["genes"]
    shape = (formula.ensemble, len(genes))
    scale_KG = np.ones(shape, np.float32)
    if formula.counts:
        scale_KG = np.tile(tensors["gene_scale_G"], (formula.ensemble, 1))
    if formula.loss == "nb_total":
        scale_KG = scale_KG * np.exp(tensors["log_dispersion"].reshape(shape))
    weight_KGH = tensors["last.weight"].reshape(*shape, -1)
    bias_KG = tensors["last.bias"].reshape(shape)
    return LastLayer(genes, weight_KGH, bias_KG, scale_KG, formula, head.info)


def expression_from_hidden(
    hidden_NH: NDArray[np.floating],
    weight_GH: NDArray[np.floating],
    bias_G: NDArray[np.floating],
    beta: float = 1.0,
) -> NDArray[np.float32]:
    """Compute the output of one network's softplus from stored hidden factors.

    Args:
        hidden_NH: Hidden factors as stored, float16 [N, H].
        weight_GH: Rows of the last layer's weight for the requested genes [G, H].
        bias_G: The last layer's bias for these genes [G].
        beta: Sharpness of the softplus (see Formula).

    Returns:
        float32 [N, G].
    """
    z_NG = to_float32(hidden_NH) @ weight_GH.astype(np.float32).T
    z_NG += bias_G.astype(np.float32)
    if beta != 1.0:
        z_NG *= np.float32(beta)
    # log(1 + exp(z)) without overflow for large z and without cancellation for small z.
    y_NG = np.maximum(z_NG, 0) + np.log1p(np.exp(-np.abs(z_NG)))
    return np.asarray(y_NG if beta == 1.0 else y_NG / np.float32(beta))


def expression_blocks(
    table: pa.Table, layer: LastLayer, what: Literal["mean", "sd"] = "mean"
) -> Iterator[tuple[pa.Table, NDArray[np.float32]]]:
    """Yield rows of an EXPRESSION table in blocks of bounded memory, with their expression [N, G].

    Args:
        table: Rows of an EXPRESSION table.
        layer: Last layer of the head that stored the table.
        what: See LastLayer.expression.
    """
    size = max(1, BLOCK_VALUES // max(1, len(layer.genes)))
    for start in range(0, len(table), size):
        block = table.slice(start, size)
        yield block, layer.expression(vector_matrix(block["hidden"]), what)


def row_groups(file: pq.ParquetFile, wanted: NDArray[np.int64] | None) -> Iterator[pa.Table]:
    """Yield the row groups of a table's file, or only the rows of some cells.

    Args:
        file: Parquet file with the column `cell_id`.
        wanted: Ascending cell ids; None: all rows. A row group whose range of cell ids holds none
            of them is not read.
    """
    # Threads do not help: one column is nearly all of a table. They may also free memory late.
    column = file.schema_arrow.names.index("cell_id")
    for group in range(file.num_row_groups):
        if wanted is None:
            yield _read_group(file, group)
            continue
        limits = file.metadata.row_group(group).column(column).statistics
        first = int(np.searchsorted(wanted, limits.min))
        if first < len(wanted) and wanted[first] <= limits.max:
            table = _read_group(file, group)
            yield table.filter(pa.array(np.isin(table["cell_id"].to_numpy(), wanted)))


def _read_group(file: pq.ParquetFile, group: int) -> pa.Table:
    table = file.read_row_group(group, use_threads=False)
    expected = file.metadata.row_group(group).num_rows
    if len(table) != expected:
        message = f"{len(table)} of {expected} rows of row group {group} can be read"
        raise pa.ArrowInvalid(message)
    return table


def vector_matrix(column: pa.ChunkedArray) -> NDArray[np.float16]:
    """Return a column of vectors as float16 [N, D]."""
    flat = [np.asarray(chunk.flatten()) for chunk in column.chunks]
    values = flat[0] if len(flat) == 1 else np.concatenate([*flat, np.zeros(0, np.float16)])
    return values.reshape(len(column), column.type.list_size)
