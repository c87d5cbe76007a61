"""Backbones to pretrain: torchvision's residual networks, and any of timm by name.

Shape letters: N crops, D embedding.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from scellst_ray.models.moco import Moco, MocoConfig
from scellst_ray.models.quick_conv import quicken
from scellst_ray.models.sync_norm import SyncNorm
from scellst_ray.schemas import CROP_PX

RESNETS = ("resnet18", "resnet34", "resnet50")
STAGES = ("layer1", "layer2", "layer3", "layer4")


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


def new_moco(
    arch: str, seed: int, config: MocoConfig, *, checkpointing: bool = False, crop_px: int = CROP_PX
) -> Moco:
    """Make a backbone, its convolutions quick on the CPU, with its heads, all fixed by the seed.

    Args:
        arch: As `new_backbone` takes it.
        seed: Fixes the weights.
        config: Sizes of the heads, and the rest.
        checkpointing: Compute a stage's activations again in backward, which saves memory.
        crop_px: Side of the crops.

    Raises:
        ValueError: See `new_backbone` and `checkpoint_stages`.
    """
    backbone, dim = new_backbone(arch, seed, crop_px)
    quicken(backbone)
    if checkpointing:
        checkpoint_stages(backbone)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Moco(backbone, dim, config)


class CheckpointedStage(nn.Sequential):
    """A stage whose activations are computed again in backward; names stay those of the stage."""

    def forward(self, x: Tensor) -> Tensor:
        """Return what the stage makes of x."""
        if not torch.is_grad_enabled():
            return self._stage(x)
        y: Tensor = checkpoint(
            self._stage,
            x,
            use_reentrant=False,
            preserve_rng_state=False,  # nothing random in a residual stage
            context_fn=lambda: (contextlib.nullcontext(), untracked(self)),
        )
        return y

    def _stage(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x)  # type: ignore[no-untyped-call]
        return y


@contextlib.contextmanager
def untracked(module: nn.Module) -> Iterator[None]:
    """Keep running statistics as they are: a second forward pass would move them twice.

    Norms work on copies meanwhile, so that all else they do, and keep for backward, is the same.
    """
    own = [
        (norm, name, value)
        for norm in module.modules()
        if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d | SyncNorm)
        for name, value in norm.named_buffers(recurse=False)
    ]
    for norm, name, value in own:
        setattr(norm, name, value.clone())
    try:
        yield
    finally:
        for norm, name, value in own:
            setattr(norm, name, value)


def checkpoint_stages(backbone: nn.Module) -> None:
    """Make the four stages of a residual network checkpointed, in place.

    Raises:
        ValueError: The backbone is not a residual network.
    """
    for name in STAGES:
        stage = getattr(backbone, name, None)
        if not isinstance(stage, nn.Sequential):
            message = (
                f"checkpointing: {type(backbone).__name__} has no residual stage {name!r}; use a "
                "ResNet, or train without checkpointing and with smaller micro-batches."
            )
            raise ValueError(message)
        setattr(backbone, name, CheckpointedStage(*stage))


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
