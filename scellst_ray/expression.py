"""The stored head without torch: its file, and expression computed from stored hidden factors.

Shape letters: N cells, H hidden (256), G genes. Who only reads results needs no network library.
"""

import json
from collections.abc import Callable, Mapping, Sized
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError

HEAD_FORMAT = "scellst_ray.mil_head"
HEAD_VERSION = 1
# What a stored head must say about itself; more is kept.
INFO_KEYS = ("genes", "scaling", "embedding_dim", "encoder_digest", "training_slides", "metrics")
Array = TypeVar("Array", bound=Sized)


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
