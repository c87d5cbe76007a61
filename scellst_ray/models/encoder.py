"""The cell encoder: a ResNet-50 without its classifier, crop in, 2048 numbers out.

Shape letters: N crops, D embedding.
"""

import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.models import ResNet50_Weights, resnet50

from scellst_ray.models.digests import DAMAGE, file_digest

UNREADABLE: tuple[type[Exception], ...] = (*DAMAGE, pickle.UnpicklingError, SafetensorError)
EMBEDDING_DIM = 2048
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# How others nest a ResNet in a checkpoint: DataParallel, MoCo v3's query encoder.
PREFIXES = ("module.base_encoder.", "base_encoder.", "module.", "backbone.")


@dataclass(frozen=True)
class Encoder:
    """An encoder ready to embed.

    Attributes:
        network: uint8-normalised [N, 3, H, W] to [N, D], in eval mode.
        mean: RGB mean (of values in 0-1) subtracted before the network.
        std: RGB standard deviation divided by.
        digest: Identifies the weights and the normalisation.
    """

    network: nn.Module
    mean: tuple[float, ...]
    std: tuple[float, ...]
    digest: str


def is_named(weights: str) -> bool:
    """Tell whether weights are a name ('imagenet', 'random:SEED') and not a file."""
    return weights == "imagenet" or weights.startswith("random:")


def encoder_digest(weights: str) -> str:
    """Return what identifies an encoder's weights, without building it.

    Raises:
        ValueError: no such file or name.
    """
    kind, _, rest = weights.partition(":")
    if kind == "random" and rest.isdigit():
        return weights
    if weights == "imagenet":
        return "imagenet:IMAGENET1K_V2"
    path = Path(weights)
    if not path.is_file():
        message = f"encoder {weights!r}: no such file; give a file, 'imagenet' or 'random:SEED'"
        raise ValueError(message)
    return file_digest(path)


def load_encoder(weights: str) -> Encoder:
    """Load an encoder.

    Args:
        weights: `random:SEED`; `imagenet` (torchvision's IMAGENET1K_V2, downloaded by torchvision
            on first use); or a local file: safetensors of this project (normalisation inside), or
            a torch checkpoint of a torchvision-style ResNet-50 (ImageNet's normalisation).

    Raises:
        ValueError: unknown name, or a file that is cut off or not a ResNet-50.
    """
    digest = encoder_digest(weights)
    if digest.startswith("random:"):
        network = _random_resnet50(int(digest.removeprefix("random:")))
        return _ready(network, IMAGENET_MEAN, IMAGENET_STD, digest)
    if weights == "imagenet":
        network = resnet50(weights=ResNet50_Weights.IMAGENET1K_V2)
        return _ready(network, IMAGENET_MEAN, IMAGENET_STD, digest)
    try:
        state, mean, std = _read_weights(Path(weights))
    except UNREADABLE as error:
        message = f"encoder {weights}: cannot be read as weights ({error}); is the file cut off?"
        raise ValueError(message) from error
    with torch.device("meta"):  # shapes only: no time spent on weights that are replaced
        network = resnet50()
        network.fc = nn.Identity()
    # Counters of training steps; old checkpoints lack them.
    counter = "num_batches_tracked"
    shapes = {k: v.shape for k, v in network.state_dict().items() if not k.endswith(counter)}
    wrong = [k for k, shape in shapes.items() if k not in state or state[k].shape != shape]
    if wrong:
        message = (
            f"encoder {weights}: not a ResNet-50 as torchvision names it; {len(wrong)} tensors "
            f"are missing or of another shape, {wrong[0]} among them"
        )
        raise ValueError(message)
    network.load_state_dict({key: state[key].float() for key in shapes}, strict=False, assign=True)
    return _ready(network, mean, std, digest)


def save_encoder(
    path: Path, network: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]
) -> None:
    """Write an encoder as safetensors with its normalisation."""
    header = {"format": "scellst_ray.encoder", "version": "1", "arch": "resnet50"}
    header |= {"mean": json.dumps(mean), "std": json.dumps(std)}
    state = {key: value.contiguous() for key, value in network.state_dict().items()}
    save_file(state, path, metadata=header)


def _read_weights(
    path: Path,
) -> tuple[dict[str, torch.Tensor], tuple[float, ...], tuple[float, ...]]:
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as handle:
            header = handle.metadata() or {}
        mean = tuple(json.loads(header["mean"])) if "mean" in header else IMAGENET_MEAN
        std = tuple(json.loads(header["std"])) if "std" in header else IMAGENET_STD
        return load_file(path), mean, std
    loaded = torch.load(path, map_location="cpu", weights_only=True)
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else loaded
    if not isinstance(state, dict):
        message = f"it holds a {type(state).__name__}, expected a state dict"
        raise RuntimeError(message)
    state = {str(key): value for key, value in state.items() if isinstance(value, torch.Tensor)}
    for prefix in PREFIXES:
        nested = {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}
        if "conv1.weight" in nested:
            return nested, IMAGENET_MEAN, IMAGENET_STD
    return state, IMAGENET_MEAN, IMAGENET_STD


def _random_resnet50(seed: int) -> nn.Module:
    """Return a seeded random network whose activations stay of order one.

    Untrained batch norms do nothing in eval mode, so sixteen residual sums would grow by 2^8;
    a small last gain in each block keeps the sum close to its input.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network: nn.Module = resnet50()
    for name, parameter in network.named_parameters():
        if name.endswith("bn3.weight"):
            nn.init.constant_(parameter, 0.2)
    return network


def _ready(
    network: nn.Module, mean: tuple[float, ...], std: tuple[float, ...], digest: str
) -> Encoder:
    network.fc = nn.Identity()
    return Encoder(network.eval().requires_grad_(requires_grad=False), mean, std, digest)


def best_precision(device: str) -> Literal["float32", "bfloat16", "float16"]:
    """Return 'bfloat16' where the device computes in it natively, else what it does quickly."""
    if device == "cuda":
        # A driver without a GPU speaks for workers that have one: all since Ampere do bfloat16.
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return "bfloat16" if native or not torch.cuda.is_available() else "float16"
    capabilities = torch.cpu.get_capabilities()
    native = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return "bfloat16" if native else "float32"


def embed_crops(
    encoder: Encoder, crops: NDArray[np.uint8], device: str, precision: str, batch_size: int = 64
) -> NDArray[np.float16]:
    """Embed crops.

    One call is one tile's crops, cut into batches in order, so an embedding never depends on what
    other tiles happened to share a task.

    Args:
        encoder: From `load_encoder`, already on `device`.
        crops: uint8 [N, H, W, 3].
        device: 'cpu' or 'cuda'.
        precision: 'float32', 'bfloat16' or 'float16'.
        batch_size: Crops per forward pass.

    Returns:
        float16 [N, D].

    Raises:
        ValueError: an embedding is not finite in float16.
    """
    out_ND = np.empty((len(crops), EMBEDDING_DIM), np.float16)
    scale = torch.tensor(encoder.std, device=device).mul(255).view(1, 3, 1, 1)
    shift = torch.tensor(encoder.mean, device=device).mul(255).view(1, 3, 1, 1)
    dtype = getattr(torch, precision)
    with torch.inference_mode(), torch.autocast(device, dtype, enabled=dtype != torch.float32):
        for start in range(0, len(crops), batch_size):
            # Copied: crops that came out of Arrow are read-only.
            batch = torch.tensor(crops[start : start + batch_size], device=device)
            # [N, H, W, 3] permuted is channels-last, which convolutions are fastest on.
            x_NCHW = (batch.permute(0, 3, 1, 2).to(torch.float32) - shift) / scale
            y_ND = encoder.network(x_NCHW.contiguous(memory_format=torch.channels_last))
            with np.errstate(over="ignore"):  # found below
                out_ND[start : start + batch_size] = y_ND.float().cpu().numpy()
    if not np.isfinite(out_ND).all():
        message = "embedding is not finite in float16; the encoder's outputs are too large"
        raise ValueError(message)
    return out_ND
