"""The cell encoder: a network without its classifier that turns a crop into D numbers.

| weights | meaning |
| --- | --- |
| a file | safetensors of this project, or a torch checkpoint of torchvision's ResNet-50 |
| 'imagenet' | torchvision's ResNet-50, IMAGENET1K_V2; downloaded on first use |
| 'timm:NAME' | timm's pretrained network; timm downloads it (Hugging Face) on first use |
| 'random:SEED', 'random:SEED:ARCH' | an untrained ResNet-50, or another architecture |

Shape letters: N crops, D embedding.
"""

import os
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import nn

from scellst_ray.core.text import errors_in_one_line
from scellst_ray.models.encoder.header import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    RESNET_DIMS,
    TIMM,
    Header,
    check_crops,
    read_header,
)
from scellst_ray.models.encoder.named_networks import (
    check_arch,
    load_timm_network,
    make_blank_network,
    make_random_network,
    parse_random,
)
from scellst_ray.models.encoder.read_weights import UNREADABLE, fit_tensors, read_weights
from scellst_ray.models.weights.digests import file_digest
from scellst_ray.models.weights.imagenet import find_imagenet, imagenet_path

# Values of oneDNN's variable ONEDNN_MAX_CPU_ISA that keep it from native bfloat16.
ISAS_WITHOUT_BFLOAT16 = {"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI"}


@dataclass(frozen=True)
class Encoder:
    """An encoder ready to embed.

    Attributes:
        network: Network in eval mode; it maps normalised crops [N, 3, H, W] to [N, D].
        mean: RGB mean that is subtracted before the network; pixel values lie in 0-1.
        std: RGB standard deviation that pixel values are divided by.
        digest: Identifier of the weights and the normalisation.
        dim: Length D of an embedding.
    """

    network: nn.Module
    mean: tuple[float, ...]
    std: tuple[float, ...]
    digest: str
    dim: int


def is_named(weights: str) -> bool:
    """Return whether weights are a name ('imagenet', 'random:SEED', 'timm:NAME') and not a file."""
    return weights == "imagenet" or weights.startswith(("random:", TIMM))


def encoder_digest(weights: str) -> str:
    """Return the identifier of an encoder's weights.

    For 'imagenet' the name identifies the content, since no other file is loaded. A wrong file on
    this machine is refused here already. The network of 'timm:NAME' is loaded.

    Raises:
        ValueError: There is no such file or name, or the file of 'imagenet' is not the published.
    """
    random = parse_random(weights)
    if random is not None:
        check_arch(random[1], weights)
        return weights.removesuffix(":resnet50")
    if weights == "imagenet":
        find_imagenet()
        return "imagenet:IMAGENET1K_V2"
    if weights.startswith(TIMM):
        return load_timm_network(weights).digest
    path = Path(weights)
    if not path.is_file():
        message = (
            f"encoder {weights!r}: no such file; give a file, 'imagenet' or 'random:SEED', "
            "'random:SEED:ARCH' or 'timm:NAME'"
        )
        raise ValueError(message)
    return file_digest(path)


def encoder_dim(weights: str) -> int:
    """Return the length of an encoder's embeddings, from its name or its file's header.

    Raises:
        ValueError: The name is unknown, the file cannot be read, or it is for crops of another
            size.
    """
    if not is_named(weights):
        return _read_fitting_header(weights).dim
    arch = encoder_arch(weights)
    return RESNET_DIMS.get(arch) or make_blank_network(arch, weights)[1]


def encoder_arch(weights: str) -> str:
    """Return the architecture of an encoder, from its name or its file's header.

    Raises:
        ValueError: See `encoder_dim`.
    """
    random = parse_random(weights)
    if random is not None:
        return random[1]
    if weights == "imagenet":
        return "resnet50"
    return weights if weights.startswith(TIMM) else _read_fitting_header(weights).arch


@errors_in_one_line()
def load_encoder(weights: str) -> Encoder:
    """Load an encoder.

    Args:
        weights: A local file or a name; see the table at the top of this module.

    Raises:
        ValueError: The name is unknown, or the file is cut off, or its content contradicts its
            header.
    """
    if weights.startswith(TIMM):
        loaded = load_timm_network(weights)
        loaded.network.eval().requires_grad_(requires_grad=False)
        return Encoder(loaded.network, loaded.mean, loaded.std, loaded.digest, loaded.dim)
    digest = encoder_digest(weights)
    random = parse_random(weights)
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    if random is not None:
        network, dim = make_random_network(*random, weights)
    elif weights == "imagenet":
        network, dim = _load_network(str(imagenet_path()), Header())
    else:
        header = _read_fitting_header(weights)
        network, dim = _load_network(weights, header)
        mean, std = header.mean, header.std
    network.eval().requires_grad_(requires_grad=False)
    return Encoder(network, mean, std, digest, dim)


def save_encoder(
    path: Path,
    network: nn.Module,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    arch: str = "resnet50",
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Write an encoder as safetensors with its normalisation.

    Args:
        path: Local file.
        network: Network of `new_backbone(arch, seed)`, which maps crops to embeddings.
        mean: RGB mean of the training crops; pixel values lie in 0-1.
        std: RGB standard deviation of the training crops.
        arch: 'resnet18', 'resnet34', 'resnet50' or 'timm:NAME'.
        provenance: Origin of the weights, as JSON: slides, number of cells, epochs, configuration,
            release.

    Raises:
        ValueError: The network is not of this architecture.
    """
    blank_network, dim = make_blank_network(arch, str(path))
    state = {key: value.contiguous() for key, value in network.state_dict().items()}
    fit_tensors(state, blank_network, str(path), arch)
    header = Header(arch, dim, mean, std, provenance=dict(provenance or {}))
    save_file(state, path, metadata=header.metadata())


@errors_in_one_line()
def encoder_header(weights: str) -> Header:
    """Return the header of an encoder file.

    Raises:
        ValueError: The file does not exist or cannot be read.
    """
    path = Path(weights)
    if not path.is_file():
        message = f"encoder {weights!r}: no such file"
        raise ValueError(message)
    try:
        return read_header(path)
    except UNREADABLE as error:
        raise ValueError(_explain_unreadable(weights, error)) from error


def _read_fitting_header(weights: str) -> Header:
    """Return the header of a file; refuse one for crops of another size than this release cuts."""
    header = encoder_header(weights)
    check_crops(header, weights)
    return header


def _explain_unreadable(weights: str, error: Exception) -> str:
    code = re.search(r"GLOBAL (\S+)", str(error))
    if code is not None:
        reason = f"it holds Python objects, {code.group(1)}, whose loading would run code"
    elif isinstance(error, pickle.UnpicklingError):
        reason = "it is damaged, or no file of weights"
    else:
        reason = str(error)
    return f"encoder {weights}: cannot be read as weights ({reason}); is the file cut off?"


def _load_network(weights: str, header: Header) -> tuple[nn.Module, int]:
    """Return the network of a file, with its weights, and the length of its embeddings."""
    try:
        state = read_weights(Path(weights))
    except UNREADABLE as error:
        raise ValueError(_explain_unreadable(weights, error)) from error
    network, dim = make_blank_network(header.arch, weights)
    values = fit_tensors(state, network, weights, header.arch)
    if dim != header.dim:
        message = (
            f"encoder {weights}: its header states embeddings of length {header.dim}, but "
            f"{header.arch} gives {dim}"
        )
        raise ValueError(message)
    network.load_state_dict(values, strict=False, assign=True)
    return network, dim


def best_precision(device: str) -> Literal["float32", "bfloat16", "float16"]:
    """Return 'bfloat16' where the device computes in it natively.

    Elsewhere the result is 'float16' on a GPU and 'float32' on a CPU. On a CPU oneDNN computes,
    and its variable ONEDNN_MAX_CPU_ISA limits the instructions that it uses.
    """
    if device == "cuda":
        # A driver without a GPU decides for workers with one. All GPUs since Ampere have bfloat16.
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return "bfloat16" if native or not torch.cuda.is_available() else "float16"
    if os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper() in ISAS_WITHOUT_BFLOAT16:
        return "float32"
    capabilities = torch.cpu.get_capabilities()
    native = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return "bfloat16" if native else "float32"


def embed_crops(
    encoder: Encoder, crops: NDArray[np.uint8], device: str, precision: str, batch_size: int = 64
) -> NDArray[np.float16]:
    """Embed crops.

    One call embeds the crops of one tile. They are cut into batches in their order. Therefore an
    embedding never depends on the other tiles of a task.

    Args:
        encoder: Encoder from `load_encoder`, already on `device`.
        crops: uint8 [N, H, W, 3].
        device: 'cpu' or 'cuda'.
        precision: 'float32', 'bfloat16' or 'float16'.
        batch_size: Number of crops per forward pass.

    Returns:
        float16 [N, D].

    Raises:
        ValueError: An embedding is not finite in float16.
    """
    out_ND = np.empty((len(crops), encoder.dim), np.float16)
    scale = torch.tensor(encoder.std, device=device).mul(255).view(1, 3, 1, 1)
    shift = torch.tensor(encoder.mean, device=device).mul(255).view(1, 3, 1, 1)
    dtype = getattr(torch, precision)
    with torch.inference_mode(), torch.autocast(device, dtype, enabled=dtype != torch.float32):
        for start in range(0, len(crops), batch_size):
            # torch.tensor copies: crops from Arrow are read-only.
            batch = torch.tensor(crops[start : start + batch_size], device=device)
            # [N, H, W, 3] permuted is channels-last, the fastest layout for convolutions.
            x_NCHW = (batch.permute(0, 3, 1, 2).to(torch.float32) - shift) / scale
            y_ND = encoder.network(x_NCHW.contiguous(memory_format=torch.channels_last))
            with np.errstate(over="ignore"):  # an overflow is reported below
                out_ND[start : start + batch_size] = y_ND.float().cpu().numpy()
    if not np.isfinite(out_ND).all():
        message = (
            "embedding is not finite in float16; the encoder's outputs are too large, use another "
            "encoder"
        )
        raise ValueError(message)
    return out_ND
