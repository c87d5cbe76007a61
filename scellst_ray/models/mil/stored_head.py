"""The stored head without torch: its file, and expression computed from stored hidden factors.

Shape letters: N cells, K members of an ensemble (mostly 1), H hidden (256), G genes. Who only reads
results needs no network library.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sized
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as parse_arrays

from scellst_ray import storage

# How a head file is named in the folder of `train` and in the run of `predict`.
HEAD_FILE = "head.safetensors"
HEAD_FORMAT = "scellst_ray.mil_head"
HEAD_VERSION = 2
# Version 1 knew one formula, which is what Formula() says.
READ_VERSIONS = ("1", "2")
# What a stored head must say about itself; more is kept.
INFO_KEYS = ("genes", "scaling", "embedding_dim", "encoder_digest", "training_slides", "metrics")
LOSSES = ("mse", "nb", "nb_total")
Array = TypeVar("Array", bound=Sized)
# Values computed at a time: 32 MB of float32, whatever the number of genes.
BLOCK_VALUES = 1 << 23


@dataclass(frozen=True)
class Formula:
    """How a head turns embeddings into expression; the defaults are ours.

    Attributes:
        negative_slope: Of the hidden layers' LeakyReLU; 0 is ReLU.
        dropout: Share of hidden values dropped while training.
        beta: Of the last softplus, log(1 + exp(beta z)) / beta.
        loss: What it was trained with. mse: squared error of scaled log-normalised expression;
            nb, nb_total: negative binomial likelihood of counts, of mean and inverse dispersion or
            of total count and logits (likelihood.py).
        ensemble: Members K: networks that share nothing but their inputs.
    """

    negative_slope: float = 0.0
    dropout: float = 0.0
    beta: float = 1.0
    loss: Literal["mse", "nb", "nb_total"] = "mse"
    ensemble: int = 1

    def __post_init__(self) -> None:
        """Refuse what is no head.

        Raises:
            ValueError: Naming the field, its value and what is allowed.
        """
        allowed = {
            "negative_slope": (0 <= self.negative_slope < 1, "0 up to but not 1"),
            "dropout": (0 <= self.dropout < 1, "0 up to but not 1"),
            "beta": (0 < self.beta < np.inf, "a positive number"),
            "loss": (self.loss in LOSSES, f"one of {', '.join(LOSSES)}"),
            "ensemble": (self.ensemble >= 1, "at least 1"),
        }
        for name, (is_allowed, expected) in allowed.items():
            if not is_allowed:
                message = f"{name} is {getattr(self, name)}, expected {expected}."
                raise ValueError(message)

    @property
    def counts(self) -> bool:
        """Whether it was trained on counts, and so gives counts per spot of size factor 1."""
        return self.loss != "mse"


@dataclass(frozen=True)
class LastLayer:
    """The last layer of a head: all that expression needs beside the stored factor.

    Attributes:
        genes: The panel, G names in order.
        weight_KGH: float32 [K, G, H].
        bias_KG: float32 [K, G].
        scale_KG: float32 [K, G], multiplies what the softplus gives: 1 unless trained on counts.
        beta: Of the softplus.
        info: What the head says about itself (see INFO_KEYS).
    """

    genes: list[str]
    weight_KGH: NDArray[np.float32]
    bias_KG: NDArray[np.float32]
    scale_KG: NDArray[np.float32]
    beta: float
    info: dict[str, Any]

    def select(self, index: NDArray[np.integer]) -> "LastLayer":
        """Return the layer of some genes, in the order given."""
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
            hidden_NKH: float16 [N, K * H] as stored.
            what: The mean over members, or their standard deviation (over K, not K - 1): how far
                networks trained on the same spots disagree about a cell.

        Returns:
            float32 [N, G], equal to MilHead.from_hidden (spread_from_hidden) within 1e-5 relative.

        Raises:
            ValueError: Where a deviation is asked of a single network, or the factor does not fit.
        """
        num_members, _, hidden_dim = self.weight_KGH.shape
        if hidden_NKH.shape[1] != num_members * hidden_dim:
            message = (
                f"hidden factor of {hidden_NKH.shape[1]} values a cell, but this head has "
                f"{num_members} x {hidden_dim}: it belongs to another run."
            )
            raise ValueError(message)
        if what == "sd" and num_members == 1:
            message = "this head is one network; train with ensemble above 1 for a deviation."
            raise ValueError(message)
        mean_NG = np.zeros((len(hidden_NKH), len(self.genes)), np.float32)
        square_NG = np.zeros_like(mean_NG) if what == "sd" else None
        members = zip(self.weight_KGH, self.bias_KG, self.scale_KG, strict=True)
        for count, (weight_GH, bias_G, scale_G) in enumerate(members, start=1):
            h_NH = hidden_NKH[:, (count - 1) * hidden_dim : count * hidden_dim]
            y_NG = expression_from_hidden(h_NH, weight_GH, bias_G, self.beta) * scale_G
            # Welford's update: a deviation without subtracting large squares.
            step_NG = y_NG - mean_NG
            mean_NG += step_NG / count
            if square_NG is not None:
                square_NG += step_NG * (y_NG - mean_NG)
        return mean_NG if square_NG is None else np.sqrt(square_NG / num_members)


def read_last_layer(uri: str) -> LastLayer:
    """Read the last layer of a head from a path or any fsspec address.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: see parse_head.
    """
    data = storage.read_bytes(uri)
    tensors, info, formula = parse_head(data, uri, parse_arrays)
    genes = [str(gene) for gene in info["genes"]]
    shape = (formula.ensemble, len(genes))
    scale_KG = np.ones(shape, np.float32)
    if formula.counts:
        scale_KG = np.tile(tensors["gene_scale_G"], (formula.ensemble, 1))
    if formula.loss == "nb_total":
        scale_KG = scale_KG * np.exp(tensors["log_dispersion"].reshape(shape))
    weight_KGH = tensors["last.weight"].reshape(*shape, -1)
    bias_KG = tensors["last.bias"].reshape(shape)
    return LastLayer(genes, weight_KGH, bias_KG, scale_KG, formula.beta, info)


def expression_from_hidden(
    hidden_NH: NDArray[np.floating],
    weight_GH: NDArray[np.floating],
    bias_G: NDArray[np.floating],
    beta: float = 1.0,
) -> NDArray[np.float32]:
    """Compute what the softplus of one network gives from stored hidden factors, without torch.

    Args:
        hidden_NH: float16 [N, H] as stored.
        weight_GH: Rows of the last layer's weight for the genes wanted [G, H].
        bias_G: Its bias for those genes [G].
        beta: Of the softplus.

    Returns:
        float32 [N, G].
    """
    z_NG = hidden_NH.astype(np.float32) @ weight_GH.astype(np.float32).T
    z_NG += bias_G.astype(np.float32)
    if beta != 1.0:
        z_NG *= np.float32(beta)
    # log(1 + exp(z)) without overflow for large z and without cancellation for small.
    y_NG = np.maximum(z_NG, 0) + np.log1p(np.exp(-np.abs(z_NG)))
    return np.asarray(y_NG if beta == 1.0 else y_NG / np.float32(beta))


def expression_blocks(
    table: pa.Table, layer: LastLayer, what: Literal["mean", "sd"] = "mean"
) -> Iterator[tuple[pa.Table, NDArray[np.float32]]]:
    """Yield EXPRESSION rows in blocks of bounded memory, each with its expression [N, G]."""
    size = max(1, BLOCK_VALUES // max(1, len(layer.genes)))
    for start in range(0, len(table), size):
        block = table.slice(start, size)
        yield block, layer.expression(vector_matrix(block["hidden"]), what)


def row_groups(file: pq.ParquetFile, wanted: NDArray[np.int64] | None) -> Iterator[pa.Table]:
    """Yield a table's row groups, or only the rows whose cell_id is in `wanted` (ascending).

    Row groups whose range of cell ids holds none of `wanted` are not read. Nearly all of a table is
    one column: threads read it no sooner, and may let go of a row group late.
    """
    column = file.schema_arrow.names.index("cell_id")
    for group in range(file.num_row_groups):
        if wanted is None:
            yield file.read_row_group(group, use_threads=False)
            continue
        limits = file.metadata.row_group(group).column(column).statistics
        first = int(np.searchsorted(wanted, limits.min))
        if first < len(wanted) and wanted[first] <= limits.max:
            table = file.read_row_group(group, use_threads=False)
            yield table.filter(pa.array(np.isin(table["cell_id"].to_numpy(), wanted)))


def vector_matrix(column: pa.ChunkedArray) -> NDArray[np.float16]:
    """Return a vector column as float16 [N, D]."""
    flat = [np.asarray(chunk.flatten()) for chunk in column.chunks]
    values = flat[0] if len(flat) == 1 else np.concatenate([*flat, np.zeros(0, np.float16)])
    return values.reshape(len(column), column.type.list_size)


def parse_head(
    data: bytes, source: str, parse: Callable[[bytes], dict[str, Array]]
) -> tuple[dict[str, Array], dict[str, Any], Formula]:
    """Return the tensors, the info and the formula of a stored head.

    Args:
        data: The file's content.
        source: The name for messages.
        parse: `load` of safetensors.numpy or of safetensors.torch.

    Raises:
        ValueError: not a whole safetensors file, another format or version, or info that does not
            describe the tensors.
    """
    try:
        tensors = parse(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except (SafetensorError, ValueError) as error:
        message = (
            f"{source}: {len(data)} bytes that are not a whole safetensors file ({error}). "
            "Expected a head written by `scellst-ray train`; copy it again."
        )
        raise ValueError(message) from error
    metadata = header.get("__metadata__") or {}
    form, version = metadata.get("format"), metadata.get("format_version")
    if form != HEAD_FORMAT or version not in READ_VERSIONS:
        message = (
            f"{source}: format {form!r} version {version!r}, expected {HEAD_FORMAT!r} version "
            f"{' or '.join(READ_VERSIONS)}. Give a head written by `scellst-ray train` of this "
            "version."
        )
        raise ValueError(message)
    info: dict[str, Any] = json.loads(metadata["info"])
    formula = Formula(**json.loads(metadata.get("formula", "{}")))
    check_info(info, tensors, source, formula.ensemble)
    return tensors, info, formula


def check_info(
    info: Mapping[str, Any], tensors: Mapping[str, Sized], source: str, ensemble: int = 1
) -> None:
    """Refuse info that does not describe the tensors.

    Raises:
        ValueError: Naming `source` and what does not fit.
    """
    missing = [key for key in INFO_KEYS if key not in info]
    if missing or "last.weight" not in tensors or "mean_D" not in tensors:
        message = (
            f"{source}: holds {sorted(tensors)} and info {sorted(info)}; info lacks {missing}. "
            f"Expected the tensors of a MIL head and info with {list(INFO_KEYS)}."
        )
        raise ValueError(message)
    num_genes, num_features = len(tensors["last.weight"]) // ensemble, len(tensors["mean_D"])
    if (len(info["genes"]), info["embedding_dim"]) != (num_genes, num_features):
        message = (
            f"{source}: info names {len(info['genes'])} genes and embedding_dim "
            f"{info['embedding_dim']}, the tensors hold {num_genes} genes and {num_features} "
            "features. Save the panel and the encoder the head was trained with."
        )
        raise ValueError(message)
    wrong = [slide for slide, scale in info["scaling"].items() if len(scale) != num_genes]
    if wrong:
        message = (
            f"{source}: scaling of slides {wrong[:5]} does not have one number per gene "
            f"({num_genes}). Save the scale that robust_scale returned for this panel."
        )
        raise ValueError(message)
