"""A MoCo model on a backbone, with the options that save memory."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from scellst_ray.core.schemas import CROP_PX
from scellst_ray.models.encoder.backbones import new_backbone
from scellst_ray.models.moco.network import Moco, MocoConfig
from scellst_ray.models.moco.quick_conv import quicken
from scellst_ray.models.moco.sync_norm import SyncNorm

STAGES = ("layer1", "layer2", "layer3", "layer4")


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
