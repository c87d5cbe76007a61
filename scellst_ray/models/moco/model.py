"""A MoCo model on a backbone, with options that save memory and time."""

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
    """Make a MoCo model: a backbone with quick convolutions (`quick_conv`), and its heads.

    Args:
        arch: Architecture; see `new_backbone`.
        seed: Number that fixes the weights of backbone and heads.
        config: Settings of the method, such as the sizes of the heads.
        checkpointing: Whether to compute a stage's activations again in backward, which saves
            memory.
        crop_px: Side of the crops in px.

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
    """A residual stage whose activations are computed again in backward.

    Names of parameters are those of the plain stage.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return the stage's output for x."""
        if not torch.is_grad_enabled():
            return self._run_stage(x)
        y: Tensor = checkpoint(
            self._run_stage,
            x,
            use_reentrant=False,
            preserve_rng_state=False,  # a residual stage uses no random numbers
            context_fn=lambda: (contextlib.nullcontext(), keep_statistics(self)),
        )
        return y

    def _run_stage(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x)  # type: ignore[no-untyped-call]
        return y


@contextlib.contextmanager
def keep_statistics(module: nn.Module) -> Iterator[None]:
    """Keep the running statistics of norms: a second forward pass would update them twice.

    Inside this context norms update copies of their buffers. All other computations are the same.
    """
    buffers = [
        (norm, name, value)
        for norm in module.modules()
        if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d | SyncNorm)
        for name, value in norm.named_buffers(recurse=False)
    ]
    for norm, name, value in buffers:
        setattr(norm, name, value.clone())
    try:
        yield
    finally:
        for norm, name, value in buffers:
            setattr(norm, name, value)


def checkpoint_stages(backbone: nn.Module) -> None:
    """Replace the four stages of a residual network by CheckpointedStage, in place.

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
