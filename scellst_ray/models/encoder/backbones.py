"""Backbones to pretrain: torchvision's residual networks, and any of timm by name.

Shape letters: N crops, D embedding.
"""

from typing import Any

import torch
import torchvision
from torch import nn

from scellst_ray.core.schemas import CROP_PX

RESNETS = ("resnet18", "resnet34", "resnet50")


def new_backbone(arch: str, seed: int, crop_px: int = CROP_PX) -> tuple[nn.Module, int]:
    """Make a randomly initialised backbone; torch's global random state is left as it was.

    Args:
        arch: 'resnet18', 'resnet34' or 'resnet50' of torchvision, the last norm of each residual
            block starting at zero; or 'timm:NAME'.
        seed: Fixes the weights.
        crop_px: Side of the crops.

    Returns:
        Crops [N, 3, H, W] to embeddings [N, D], and D.

    Raises:
        ValueError: Unknown name, timm is not installed, or the network cannot take such crops.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if arch in RESNETS:
            resnet = getattr(torchvision.models, arch)(zero_init_residual=True)
            dim = int(resnet.fc.in_features)
            resnet.fc = nn.Identity()
            return resnet, dim
        if arch.startswith("timm:"):
            network = _timm_network(arch.removeprefix("timm:"), crop_px)
            return network, _embedding_dim(network, arch, crop_px)
    message = f"backbone is {arch!r}, expected one of {', '.join(RESNETS)} or 'timm:NAME'."
    raise ValueError(message)


def _timm_network(name: str, crop_px: int) -> nn.Module:
    try:
        import timm  # noqa: PLC0415 - optional
    except ImportError as error:
        message = f"backbone 'timm:{name}' needs timm, which is not installed: pip install timm."
        raise ValueError(message) from error
    if not timm.is_model(name):
        message = f"timm has no model {name!r}; timm.list_models() names those it has."
        raise ValueError(message)
    # Transformers know the number of their tokens; others take any size and no such argument.
    defaults = timm.get_pretrained_cfg(name)
    fixed: dict[str, Any] = (
        {"img_size": crop_px} if defaults is not None and defaults.fixed_input_size else {}
    )
    network: nn.Module = timm.create_model(name, pretrained=False, num_classes=0, **fixed)
    return network


@torch.no_grad()
def _embedding_dim(network: nn.Module, arch: str, crop_px: int) -> int:
    """Return D, found by embedding one black crop."""
    network.eval()
    try:
        shape = network(torch.zeros(1, 3, crop_px, crop_px)).shape
    except (RuntimeError, ValueError, AssertionError) as error:
        message = f"backbone {arch!r} cannot take crops of {crop_px} x {crop_px} px: {error}"
        raise ValueError(message) from error
    network.train()
    if len(shape) != 2:
        message = f"backbone {arch!r} gives {tuple(shape)} for one crop, expected [1, D]."
        raise ValueError(message)
    return int(shape[1])
