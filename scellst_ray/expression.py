"""The stored head without torch: its file, and expression computed from stored hidden factors.

Shape letters: N cells, H hidden (256), G genes. Who only reads results needs no network library.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, TypeVar

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as parse_arrays

# How a head file is named in the folder of `train` and in the run of `predict`.
HEAD_FILE = "head.safetensors"
HEAD_FORMAT = "scellst_ray.mil_head"
HEAD_VERSION = 1
# What a stored head must say about itself; more is kept.
INFO_KEYS = ("genes", "scaling", "embedding_dim", "encoder_digest", "training_slides", "metrics")
Array = TypeVar("Array", bound=Sized)
# Values computed at a time: 32 MB of float32, whatever the number of genes.
BLOCK_VALUES = 1 << 23


@dataclass(frozen=True)
class LastLayer:
    """The last layer of a head: all that expression needs beside the stored factor.

    Attributes:
        genes: The panel, G names in order.
        weight_GH: float32 [G, H].
        bias_G: float32 [G].
        info: What the head says about itself (see INFO_KEYS).
    """

    genes: list[str]
    weight_GH: NDArray[np.float32]
    bias_G: NDArray[np.float32]
    info: dict[str, Any]


def read_last_layer(uri: str) -> LastLayer:
    """Read the last layer of a head from a path or any fsspec address.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: see parse_head.
    """
    with fsspec.open(uri, "rb") as handle:
        data = bytes(handle.read())
    tensors, info = parse_head(data, uri, parse_arrays)
    genes = [str(gene) for gene in info["genes"]]
    return LastLayer(genes, tensors["last.weight"], tensors["last.bias"], info)


def expression_from_hidden(
    hidden_NH: NDArray[np.floating],
    weight_GH: NDArray[np.floating],
    bias_G: NDArray[np.floating],
) -> NDArray[np.float32]:
    """Compute expression from stored hidden factors, without torch.

    Args:
        hidden_NH: float16 [N, H] as stored.
        weight_GH: Rows of the last layer's weight for the genes wanted [G, H].
        bias_G: Its bias for those genes [G].

    Returns:
        float32 [N, G], equal to MilHead.from_hidden within 1e-5 relative.
    """
    z_NG = hidden_NH.astype(np.float32) @ weight_GH.astype(np.float32).T
    z_NG += bias_G.astype(np.float32)
    # log(1 + exp(z)) without overflow for large z and without cancellation for small.
    return np.asarray(np.maximum(z_NG, 0) + np.log1p(np.exp(-np.abs(z_NG))))


def known(names: Sequence[str], there: Sequence[str], where: str) -> list[str]:
    """Return `names` as a list if all of them are `there`, none twice.

    Raises:
        ValueError: Naming up to 5 that are not, and what comes close to them.
    """
    wanted, present = [names] if isinstance(names, str) else list(names), set(there)
    unknown = [name for name in wanted if name not in present]
    if unknown:
        hints = [match for name in unknown[:5] for match in get_close_matches(name, there, n=1)]
        near = f"; did you mean {', '.join(map(repr, hints))}?" if hints else ""
        some = ", ".join(map(repr, there[:5])) + (", ..." if len(there) > 5 else "")
        message = (
            f"{where}: {len(unknown)} of {len(wanted)} not found, such as "
            f"{', '.join(map(repr, unknown[:5]))}{near} (there are {len(there)}: {some or 'none'})"
        )
        raise ValueError(message)
    repeated = [name for name, times in Counter(wanted).items() if times > 1]
    if repeated:
        message = f"{where}: {repeated[:5]} asked for more than once; ask for each once"
        raise ValueError(message)
    return wanted


def expression_blocks(
    table: pa.Table, weight_GH: NDArray[np.float32], bias_G: NDArray[np.float32]
) -> Iterator[tuple[pa.Table, NDArray[np.float32]]]:
    """Yield EXPRESSION rows in blocks of bounded memory, each with its expression [N, G]."""
    size = max(1, BLOCK_VALUES // max(1, len(bias_G)))
    for start in range(0, len(table), size):
        block = table.slice(start, size)
        yield block, expression_from_hidden(vector_matrix(block["hidden"]), weight_GH, bias_G)


def row_groups(file: pq.ParquetFile, wanted: NDArray[np.int64] | None) -> Iterator[pa.Table]:
    """Yield a table's row groups, or only the rows whose cell_id is in `wanted` (ascending).

    Row groups whose range of cell ids holds none of `wanted` are not read.
    """
    column = file.schema_arrow.names.index("cell_id")
    for group in range(file.num_row_groups):
        if wanted is None:
            yield file.read_row_group(group)
            continue
        limits = file.metadata.row_group(group).column(column).statistics
        first = int(np.searchsorted(wanted, limits.min))
        if first < len(wanted) and wanted[first] <= limits.max:
            table = file.read_row_group(group)
            yield table.filter(pa.array(np.isin(table["cell_id"].to_numpy(), wanted)))


def vector_matrix(column: pa.ChunkedArray) -> NDArray[np.float16]:
    """Return a vector column as float16 [N, D]."""
    flat = [np.asarray(chunk.flatten()) for chunk in column.chunks]
    values = flat[0] if len(flat) == 1 else np.concatenate([*flat, np.zeros(0, np.float16)])
    return values.reshape(len(column), column.type.list_size)


def parse_head(
    data: bytes, source: str, parse: Callable[[bytes], dict[str, Array]]
) -> tuple[dict[str, Array], dict[str, Any]]:
    """Return the tensors and the info of a stored head.

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
    found = (metadata.get("format"), metadata.get("format_version"))
    if found != (HEAD_FORMAT, str(HEAD_VERSION)):
        message = (
            f"{source}: format {found[0]!r} version {found[1]!r}, expected {HEAD_FORMAT!r} "
            f"version {HEAD_VERSION}. Give a head written by `scellst-ray train` of this version."
        )
        raise ValueError(message)
    info: dict[str, Any] = json.loads(metadata["info"])
    check_info(info, tensors, source)
    return tensors, info


def check_info(info: Mapping[str, Any], tensors: Mapping[str, Sized], source: str) -> None:
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
    num_genes, num_features = len(tensors["last.weight"]), len(tensors["mean_D"])
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
