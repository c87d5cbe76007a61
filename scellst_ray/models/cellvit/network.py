"""CellViT (Hörst et al. 2024, arXiv:2306.15350): a ViT encoder and three U-shaped decoders.

The code is written from the paper and a description of the parameters. Names and shapes are those
of the published checkpoints, so that these load unchanged. The published forward pass computes the
four skip decoders again for each of the three branches. These share their weights, so here they
are computed once.

Shape letters: B images, C channels, D channels of a token, H W image, R T rows and columns of
tokens, S tissue classes, Y nucleus types.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from scellst_ray.models.cellvit.encoders import (
    MAX_TOKENS,
    NECK_CHANNELS,
    TOKEN_PX,
    SamEncoder,
    VitEncoder,
)

MAP_CHANNELS = 2  # channels of the binary, the horizontal-vertical and the regression map
WIDE_DIM = 512  # encoders at least this wide have wider decoders, too


@dataclass(frozen=True)
class Arch:
    """The sizes of one variant.

    Attributes:
        variant: '256', 'SAM-B', 'SAM-L' or 'SAM-H'.
        dim: Number of channels of a token.
        depth: Number of blocks of the encoder.
        num_heads: Number of attention heads.
        skip_blocks: Blocks, counted from 1, after which tokens go to the decoders.
        global_blocks: Blocks of SAM, counted from 0, that attend over the whole image. Empty for
            a plain ViT.
    """

    variant: str
    dim: int
    depth: int
    num_heads: int
    skip_blocks: tuple[int, int, int, int]
    global_blocks: tuple[int, ...] = ()

    @property
    def is_sam(self) -> bool:
        """Whether the encoder is SAM's."""
        return bool(self.global_blocks)

    @property
    def max_px(self) -> int | None:
        """Largest side of an image in px; None: no limit."""
        return MAX_TOKENS * TOKEN_PX if self.is_sam else None


ARCHS = {
    arch.variant: arch
    for arch in (
        Arch("256", 384, 12, 6, (3, 6, 9, 12)),
        Arch("SAM-B", 768, 12, 12, (3, 6, 9, 12), (2, 5, 8, 11)),
        Arch("SAM-L", 1024, 24, 16, (6, 12, 18, 24), (5, 11, 17, 23)),
        Arch("SAM-H", 1280, 32, 16, (8, 16, 24, 32), (7, 15, 23, 31)),
    )
}


def arch_of(variant: str) -> Arch:
    """Return the sizes of a variant.

    Raises:
        ValueError: The variant is unknown.
    """
    if variant not in ARCHS:
        message = f"CellViT variant {variant!r} is unknown; expected one of {', '.join(ARCHS)}"
        raise ValueError(message)
    return ARCHS[variant]


class Maps(NamedTuple):
    """The network's output for a batch of images; field names are the published ones.

    Attributes:
        tissue_types: Logits of tissue types [B, S].
        nuclei_binary_map: Logits of background and nucleus [B, 2, H, W].
        hv_map: Offsets from the nucleus's centre, horizontal first [B, 2, H, W].
        nuclei_type_map: Logits of nucleus types, background first [B, Y, H, W].
        tokens: Last tokens before the final norm [B, D, H / 16, W / 16]; None if not requested.
        regression_map: Offsets [B, 2, H, W]; None if the network was trained without the
            regression loss.
    """

    tissue_types: Tensor
    nuclei_binary_map: Tensor
    hv_map: Tensor
    nuclei_type_map: Tensor
    tokens: Tensor | None
    regression_map: Tensor | None


class ConvBlock(nn.Module):
    """A 3 x 3 convolution, batch norm and ReLU."""

    def __init__(self, num_in: int, num_out: int) -> None:
        """Make the block from `num_in` to `num_out` channels."""
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv2d(num_in, num_out, kernel_size=3, padding=1),
            nn.BatchNorm2d(num_out),
            nn.ReLU(inplace=True),
        )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return [B, num_out, H, W]."""
        y_BCHW: Tensor = self.block(x_BCHW)
        return y_BCHW


class UpBlock(nn.Module):
    """A transposed convolution to twice the size, 3 x 3 convolution, batch norm and ReLU."""

    def __init__(self, num_in: int, num_out: int) -> None:
        """Make the block from `num_in` to `num_out` channels."""
        super().__init__()
        self.block = nn.Sequential(
            _double_size(num_in, num_out),
            nn.Conv2d(num_out, num_out, kernel_size=3, padding=1),
            nn.BatchNorm2d(num_out),
            nn.ReLU(inplace=True),
        )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return [B, num_out, 2 H, 2 W]."""
        y_BCHW: Tensor = self.block(x_BCHW)
        return y_BCHW


def _double_size(num_in: int, num_out: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(num_in, num_out, kernel_size=2, stride=2)


class Branch(nn.Module):
    """One decoder: it enlarges the last tokens to full size and joins a skip at each size."""

    def __init__(self, dim: int, bottleneck: int, num_out: int) -> None:
        """Make the branch.

        Args:
            dim: Number of channels of a token.
            bottleneck: Number of channels at an eighth of the size.
            num_out: Number of channels of the map.
        """
        super().__init__()
        self.bottleneck_upsampler = _double_size(dim, bottleneck)
        self.decoder3_upsampler = nn.Sequential(
            ConvBlock(2 * bottleneck, bottleneck),
            ConvBlock(bottleneck, bottleneck),
            ConvBlock(bottleneck, bottleneck),
            _double_size(bottleneck, 256),
        )
        self.decoder2_upsampler = nn.Sequential(
            ConvBlock(2 * 256, 256), ConvBlock(256, 256), _double_size(256, 128)
        )
        self.decoder1_upsampler = nn.Sequential(
            ConvBlock(2 * 128, 128), ConvBlock(128, 128), _double_size(128, 64)
        )
        self.decoder0_header = nn.Sequential(
            ConvBlock(2 * 64, 64), ConvBlock(64, 64), nn.Conv2d(64, num_out, kernel_size=1)
        )

    def forward(self, last_BDRT: Tensor, skips: Sequence[Tensor]) -> Tensor:
        """Return the map [B, num_out, H, W].

        Args:
            last_BDRT: The encoder's last tokens.
            skips: Outputs of the skip decoders, full size first: 64 channels at the image's size,
                128 at half, 256 at a quarter and `bottleneck` at an eighth of it.
        """
        full, half, quarter, eighth = skips
        x: Tensor = self.bottleneck_upsampler(last_BDRT)
        x = self.decoder3_upsampler(torch.cat([eighth, x], dim=1))
        x = self.decoder2_upsampler(torch.cat([quarter, x], dim=1))
        x = self.decoder1_upsampler(torch.cat([half, x], dim=1))
        map_BCHW: Tensor = self.decoder0_header(torch.cat([full, x], dim=1))
        return map_BCHW


class CellViT(nn.Module):
    """The network; its `state_dict` has the keys and shapes of the published checkpoints."""

    def __init__(
        self,
        arch: Arch,
        num_nuclei_classes: int,
        num_tissue_classes: int,
        *,
        regression_loss: bool = False,
    ) -> None:
        """Make the network.

        Args:
            arch: Sizes from `arch_of`.
            num_nuclei_classes: Number of nucleus types, background included.
            num_tissue_classes: Number of tissue types. With 0 the tissue head's input is returned.
            regression_loss: Whether the binary decoder also gives a regression map.
        """
        super().__init__()
        self.arch = arch
        dim, heads, depth = arch.dim, arch.num_heads, arch.depth
        self.encoder: SamEncoder | VitEncoder
        self.classifier_head: nn.Module = nn.Identity()
        if arch.is_sam:
            self.encoder = SamEncoder(dim, heads, depth, arch.skip_blocks, arch.global_blocks)
            if num_tissue_classes:
                self.classifier_head = nn.Linear(NECK_CHANNELS, num_tissue_classes)
        else:
            self.encoder = VitEncoder(dim, heads, depth, arch.skip_blocks, num_tissue_classes)
        deep, mid, bottleneck = (512, 256, 512) if dim >= WIDE_DIM else (256, 128, 312)
        self.decoder0 = nn.Sequential(ConvBlock(3, 32), ConvBlock(32, 64))
        self.decoder1 = nn.Sequential(UpBlock(dim, deep), UpBlock(deep, mid), UpBlock(mid, 128))
        self.decoder2 = nn.Sequential(UpBlock(dim, deep), UpBlock(deep, 256))
        self.decoder3 = nn.Sequential(UpBlock(dim, bottleneck))
        num_binary = 2 * MAP_CHANNELS if regression_loss else MAP_CHANNELS
        self.nuclei_binary_map_decoder = Branch(dim, bottleneck, num_binary)
        self.hv_map_decoder = Branch(dim, bottleneck, MAP_CHANNELS)
        self.nuclei_type_maps_decoder = Branch(dim, bottleneck, num_nuclei_classes)

    def forward(self, x_BCHW: Tensor, *, want_tokens: bool = False) -> Maps:
        """Return the maps of normalised RGB images [B, 3, H, W].

        Raises:
            ValueError: A side is no multiple of 16, or the encoder has no positions for it.
        """
        self._check_size(*x_BCHW.shape[-2:])
        summary, grids = self.encoder(x_BCHW)
        binary, hv_map, nuclei_type_map = self.decode(x_BCHW, grids)
        return Maps(
            tissue_types=self.classifier_head(summary),
            nuclei_binary_map=binary[:, :MAP_CHANNELS],
            hv_map=hv_map,
            nuclei_type_map=nuclei_type_map,
            tokens=grids[-1] if want_tokens else None,
            regression_map=binary[:, MAP_CHANNELS:] if binary.shape[1] > MAP_CHANNELS else None,
        )

    def decode(self, x_BCHW: Tensor, grids: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the binary map (with the regression map), horizontal-vertical and type maps.

        Args:
            x_BCHW: Normalised images.
            grids: The encoder's four grids of tokens [B, D, H / 16, W / 16], in order of blocks.
        """
        first, second, third, last = grids
        skips = (
            self.decoder0(x_BCHW),
            self.decoder1(first),
            self.decoder2(second),
            self.decoder3(third),
        )
        return (
            self.nuclei_binary_map_decoder(last, skips),
            self.hv_map_decoder(last, skips),
            self.nuclei_type_maps_decoder(last, skips),
        )

    def _check_size(self, height: int, width: int) -> None:
        limit = self.arch.max_px
        if height % TOKEN_PX or width % TOKEN_PX or not height or not width:
            message = (
                f"image of {width} x {height} px: CellViT needs sides that are multiples of "
                f"{TOKEN_PX}; pad the image or choose another tile size"
            )
            raise ValueError(message)
        if limit is not None and max(height, width) > limit:
            message = (
                f"image of {width} x {height} px: CellViT-{self.arch.variant} has positions for "
                f"at most {limit} px; choose smaller tiles"
            )
            raise ValueError(message)
