"""Backbones to pretrain: residual networks of torchvision, and every network of timm by name.

Shape letters: N crops, D embedding.
"""

from typing import Any

import torch
import torchvision
from torch import nn

from scellst_ray.core.schemas import CROP_PX

RESNETS = ("resnet18", "resnet34", "resnet50")


def new_backbone(arch: str, seed: int, crop_px: int = CROP_PX) -> tuple[nn.Module, int]:
    """Make a randomly initialised backbone; torch's global random state does not change.

    Args:
        arch: 'resnet18', 'resnet34' or 'resnet50' of torchvision, or 'timm:NAME'. In torchvision's
            networks the last norm of each residual block starts at zero.
        seed: Number that fixes the weights.
        crop_px: Side of the crops in px.

    Returns:
        The network, which maps crops [N, 3, H, W] to embeddings [N, D], and D.

    Raises:
        ValueError: The name is unknown, timm is not installed, or the network does not accept
            crops of this size.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if arch in RESNETS:
            resnet = getattr(torchvision.models, arch)(zero_init_residual=True)
            dim = int(resnet.fc.in_features)
            resnet.fc = nn.Identity()
            return resnet, dim
        if arch.startswith("timm:"):
            network = _make_timm_network(arch.removeprefix("timm:"), crop_px)
            return network, _measure_embedding_dim(network, arch, crop_px)
    message = f"backbone is {arch!r}, expected one of {', '.join(RESNETS)} or 'timm:NAME'."
    raise ValueError(message)


def _make_timm_network(name: str, crop_px: int) -> nn.Module:
    try:
        import timm  # noqa: PLC0415 - optional
    except ImportError as error:
        message = f"backbone 'timm:{name}' needs timm, which is not installed: pip install timm."
        raise ValueError(message) from error
    if not timm.is_model(name):
        message = f"timm has no model {name!r}; timm.list_models() lists its models."
        raise ValueError(message)
    # Transformers have a fixed number of tokens. Other networks have no `img_size` argument.
    defaults = timm.get_pretrained_cfg(name)
    size_args: dict[str, Any] = (
        {"img_size": crop_px} if defaults is not None and defaults.fixed_input_size else {}
    )
    network: nn.Module = timm.create_model(name, pretrained=False, num_classes=0, **size_args)
    return network


@torch.no_grad()
def _measure_embedding_dim(network: nn.Module, arch: str, crop_px: int) -> int:
    """Return D; the function embeds one black crop to find it."""
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
