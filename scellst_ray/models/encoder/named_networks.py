"""The networks encoders are made of: by architecture, at random, and timm's by name.

timm is optional. A name without weights, or weights that cannot be had, are refused: a random
network is only ever given where 'random:SEED' asks for one.
"""

import importlib
import re
from difflib import get_close_matches
from types import ModuleType
from typing import Any

import torch
from torch import nn

from scellst_ray.core.schemas import CROP_PX
from scellst_ray.models.encoder.backbones import new_backbone
from scellst_ray.models.encoder.header import RESNET_DIMS, TIMM

RANDOM = re.compile(r"random:(\d+)(?::(.+))?")
# Gain of a residual branch's last norm in a random network.
RANDOM_GAIN = 0.2


def random_of(weights: str) -> tuple[int, str] | None:
    """Return seed and architecture of 'random:SEED' or 'random:SEED:ARCH'; None for other names."""
    match = RANDOM.fullmatch(weights)
    return None if match is None else (int(match[1]), match[2] or "resnet50")


def check_arch(arch: str, source: str) -> None:
    """Refuse architectures that cannot be built here.

    Raises:
        ValueError: unknown, or timm's and timm is not installed or has none of that name.
    """
    if arch.startswith(TIMM):
        timm_name(arch, source)
    elif arch not in RESNET_DIMS:
        known = ", ".join(RESNET_DIMS)
        message = f"encoder {source}: no architecture {arch!r}; there are {known} and timm:NAME"
        raise ValueError(message)


def blank(arch: str, source: str) -> tuple[nn.Module, int]:
    """Return a network to put weights into, and the length of its embeddings.

    Raises:
        ValueError: as `check_arch`, or a network that takes no crops of our size.
    """
    check_arch(arch, source)
    if arch in RESNET_DIMS:
        with torch.device("meta"):  # shapes only: no time spent on weights that are replaced
            return new_backbone(arch, 0)
    return new_backbone(arch, 0)


def random_network(seed: int, arch: str, source: str) -> tuple[nn.Module, int]:
    """Return a seeded random network whose activations stay of order one, and its length.

    Untrained batch norms do nothing in eval mode, so sixteen residual sums would grow by 2^8; with
    a last gain of zero, as pretraining starts from, the branches would say nothing. A small one
    keeps the sum close to its input.
    """
    check_arch(arch, source)
    network, dim = new_backbone(arch, seed)
    for module in network.modules():
        gain = getattr(module, "weight", None)
        if isinstance(module, nn.BatchNorm2d) and gain is not None and not gain.any():
            nn.init.constant_(gain, RANDOM_GAIN)
    return network, dim


def timm_name(weights: str, source: str) -> str:
    """Return timm's full name, with the tag that says which weights, of 'timm:NAME'.

    Raises:
        ValueError: timm is not installed, or has no network of that name.
    """
    timm, name = _timm(source), weights.removeprefix(TIMM)
    try:
        config = timm.get_pretrained_cfg(name)
    except RuntimeError:  # of a tag that its architecture does not have
        config = None
    if config is None or not timm.is_model(name):
        near = get_close_matches(name, timm.list_models(pretrained=True), n=3)
        hint = f" (did you mean {', '.join(near)}?)" if near else ""
        message = f"encoder {source}: timm {timm.__version__} has no network {name!r}{hint}"
        raise ValueError(message)
    return f"{config.architecture}.{config.tag}" if config.tag else str(config.architecture)


def timm_network(
    weights: str,
) -> tuple[nn.Module, int, tuple[float, ...], tuple[float, ...]]:
    """Return timm's pretrained network of 'timm:NAME', its length, mean and deviation.

    Raises:
        ValueError: no timm, no such network, no weights for it, or they could not be had.
    """
    name, timm = timm_name(weights, weights), _timm(weights)
    config, (_, dim) = timm.get_pretrained_cfg(name), blank(f"{TIMM}{name}", weights)
    # Transformers of a fixed size get their position embeddings resampled to our crops.
    size: dict[str, Any] = {"img_size": CROP_PX} if config.fixed_input_size else {}
    try:
        network = timm.create_model(name, pretrained=True, num_classes=0, **size)
    except (OSError, RuntimeError, ValueError, AssertionError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        message = (
            f"encoder {weights}: timm could not load its weights ({reason}); they come from the "
            "Hugging Face hub: check the network, fetch them once where HF_HOME keeps them, or "
            "give a file"
        )
        raise ValueError(message) from error
    return network, dim, tuple(config.mean), tuple(config.std)


def _timm(source: str) -> ModuleType:
    """Return the optional package timm.

    Raises:
        ValueError: it is not installed.
    """
    try:
        return importlib.import_module("timm")
    except ImportError as error:
        message = f"encoder {source}: needs the package timm: pip install timm"
        raise ValueError(message) from error
