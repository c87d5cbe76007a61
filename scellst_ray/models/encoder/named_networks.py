"""The networks of encoders: blank, with random weights, or pretrained by timm.

timm is optional. A name of timm whose weights do not exist or cannot be loaded is refused. Only
'random:SEED' gives a random network.
"""

import hashlib
import importlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from types import ModuleType

import torch
from torch import nn

from scellst_ray.core.schemas import CROP_PX
from scellst_ray.models.encoder.backbones import new_backbone
from scellst_ray.models.encoder.header import RESNET_DIMS, TIMM
from scellst_ray.models.encoder.read_weights import UNREADABLE, value_problem

RANDOM = re.compile(r"random:([0-9]{1,18})(?::(.+))?")
# Variable that keeps torch from running code in a file, whoever calls it.
WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
# Gain of a residual branch's last norm in a random network.
RANDOM_GAIN = 0.2


def parse_random(weights: str) -> tuple[int, str] | None:
    """Return seed and architecture of 'random:SEED' or 'random:SEED:ARCH'; None for other names."""
    match = RANDOM.fullmatch(weights)
    return None if match is None else (int(match[1]), match[2] or "resnet50")


def check_arch(arch: str, source: str) -> None:
    """Refuse architectures that cannot be built on this machine.

    Raises:
        ValueError: The name is unknown, or timm is not installed.
    """
    if arch.startswith(TIMM):
        timm_name(arch, source)
    elif arch not in RESNET_DIMS:
        known = ", ".join(RESNET_DIMS)
        message = f"encoder {source}: no architecture {arch!r}; expected {known} or timm:NAME"
        raise ValueError(message)


def make_blank_network(arch: str, source: str) -> tuple[nn.Module, int]:
    """Return a network whose weights are still to be loaded, and the length of its embeddings.

    Raises:
        ValueError: See `check_arch`. Also if the network does not accept crops of CROP_PX.
    """
    check_arch(arch, source)
    if arch in RESNET_DIMS:
        with torch.device("meta"):  # shapes only: no time spent on weights that are replaced
            return new_backbone(arch, 0)
    return new_backbone(arch, 0)


def make_random_network(seed: int, arch: str, source: str) -> tuple[nn.Module, int]:
    """Return a seeded random network and the length of its embeddings.

    The gain of each residual branch's last norm is small, so that activations stay of order one.
    With a gain of one, sixteen residual sums would grow by 2^8, since untrained batch norms do
    nothing in eval mode. With a gain of zero, as pretraining starts, branches would have no effect.
    """
    check_arch(arch, source)
    network, dim = new_backbone(arch, seed)
    for module in network.modules():
        gain = getattr(module, "weight", None)
        if isinstance(module, nn.BatchNorm2d) and gain is not None and not gain.any():
            nn.init.constant_(gain, RANDOM_GAIN)
    return network, dim


def timm_name(weights: str, source: str) -> str:
    """Return timm's full name of 'timm:NAME', including the tag that identifies the weights.

    Raises:
        ValueError: timm is not installed, or has no network of that name.
    """
    timm, name = _import_timm(source), weights.removeprefix(TIMM)
    try:
        config = timm.get_pretrained_cfg(name)
    except RuntimeError:  # the architecture has no such tag
        config = None
    if config is None or not timm.is_model(name):
        near = get_close_matches(name, timm.list_models(pretrained=True), n=3)
        hint = f" (did you mean {', '.join(near)}?)" if near else ""
        message = f"encoder {source}: timm {timm.__version__} has no network {name!r}{hint}"
        raise ValueError(message)
    return f"{config.architecture}.{config.tag}" if config.tag else str(config.architecture)


@dataclass(frozen=True)
class TimmNetwork:
    """A pretrained network of timm.

    Attributes:
        network: The network.
        dim: Length of an embedding.
        mean: RGB mean that is subtracted before the network; pixel values lie in 0-1.
        std: RGB standard deviation that pixel values are divided by.
        digest: 'timm:ARCH.TAG:sha256:HEX', of the name and the weights.
    """

    network: nn.Module
    dim: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    digest: str


def load_timm_network(weights: str) -> TimmNetwork:
    """Return timm's pretrained network of 'timm:NAME'.

    The SHA-256 is that of the weights at timm's own size of images: resampling them to our crops
    may differ between CPUs in the last bits.

    Raises:
        ValueError: timm is not installed, has no such network, or could not load its weights; or
            these hold NaN.
    """
    name, timm = timm_name(weights, weights), _import_timm(weights)
    config, (_, dim) = timm.get_pretrained_cfg(name), make_blank_network(f"{TIMM}{name}", weights)
    network = own = _create_pretrained(timm, name, weights)
    if config.fixed_input_size:
        # timm resamples the position embeddings of transformers with a fixed size to our crops.
        network = _create_pretrained(timm, name, weights, img_size=CROP_PX)
    state = own.state_dict()
    problem = value_problem(state, state)
    if problem:
        message = f"encoder {weights}: {problem}; remove its file from the folder HF_HOME"
        raise ValueError(message)
    digest = f"{TIMM}{name}:sha256:{_digest_of_tensors(state)}"
    return TimmNetwork(network, dim, tuple(config.mean), tuple(config.std), digest)


def _digest_of_tensors(state: Mapping[str, torch.Tensor]) -> str:
    """Return the SHA-256 of names, types, shapes and values of tensors, in hex."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _create_pretrained(timm: ModuleType, name: str, weights: str, **size: int) -> nn.Module:
    """Return a network with the weights that timm finds; no code in their file is run.

    Raises:
        ValueError: timm could not load the weights.
    """
    before = os.environ.get(WEIGHTS_ONLY)
    os.environ[WEIGHTS_ONLY] = "1"
    try:
        network: nn.Module = timm.create_model(name, pretrained=True, num_classes=0, **size)
    except UNREADABLE as error:
        reason = " ".join(str(error).split())[:300]
        message = (
            f"encoder {weights}: timm could not load its weights ({reason}); they come from the "
            "Hugging Face hub: check the network, or fetch them once into the folder HF_HOME, or "
            "give a file"
        )
        raise ValueError(message) from error
    finally:
        if before is None:
            del os.environ[WEIGHTS_ONLY]
        else:
            os.environ[WEIGHTS_ONLY] = before
    return network


def _import_timm(source: str) -> ModuleType:
    """Return the optional package timm.

    Raises:
        ValueError: timm is not installed.
    """
    try:
        return importlib.import_module("timm")
    except ImportError as error:
        message = f"encoder {source}: it needs the package timm: pip install timm"
        raise ValueError(message) from error
