"""The two encoders of CellViT: a plain ViT with a class token, and SAM's windowed ViT.

Parameter names are those of the published checkpoints (DINO's and SAM's). A token is the vector
of one square of 16 x 16 px. Both encoders return the input of the tissue head and four grids of
tokens. The grids are taken after four of the blocks, before the final norm.

Shape letters: B images, D channels, N tokens, C H W image, R T rows and columns of tokens,
E attention heads, K channels of a head, L = K + R + T.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TOKEN_PX = 16  # side of the square that becomes one token
WINDOW = 14  # side of a window of SAM's local attention, in tokens
MAX_TOKENS = 64  # side of the grid of SAM's positions, in tokens: 1024 px
VIT_TOKENS = 14  # side of the grid that the plain ViT's positions were learned on, in tokens
NECK_CHANNELS = 256
NORM_EPS = 1e-6


class PatchEmbed(nn.Module):
    """A layer that turns squares of 16 x 16 px into tokens."""

    def __init__(self, dim: int) -> None:
        """Make the projection to `dim` channels."""
        super().__init__()
        self.proj = nn.Conv2d(3, dim, kernel_size=TOKEN_PX, stride=TOKEN_PX)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return tokens [B, R, T, D]."""
        grid_BDRT: Tensor = self.proj(x_BCHW)
        return grid_BDRT.permute(0, 2, 3, 1)


class VitMlp(nn.Module):
    """Two linear layers with a GELU between them; parameters are named as in DINO."""

    def __init__(self, dim: int) -> None:
        """Make layers of 4 x `dim` hidden channels."""
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of the input's shape."""
        y: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return y


class SamMlp(nn.Module):
    """Two linear layers with a GELU between them; parameters are named as in SAM."""

    def __init__(self, dim: int) -> None:
        """Make layers of 4 x `dim` hidden channels."""
        super().__init__()
        self.lin1 = nn.Linear(dim, 4 * dim)
        self.lin2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of the input's shape."""
        y: Tensor = self.lin2(F.gelu(self.lin1(x)))
        return y


class Attention(nn.Module):
    """Multi-head self-attention over all tokens given."""

    def __init__(self, dim: int, num_heads: int) -> None:
        """Make the projections; `num_heads` divides `dim`."""
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def split_heads(self, x_BND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values, each [B, E, N, K]."""
        B, N, D = x_BND.shape
        qkv = self.qkv(x_BND).view(B, N, 3, self.num_heads, D // self.num_heads)
        q_BENK, k_BENK, v_BENK = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return q_BENK, k_BENK, v_BENK

    def join_heads(self, y_BENK: Tensor) -> Tensor:
        """Return the projected values [B, N, D]."""
        y_BND: Tensor = self.proj(y_BENK.transpose(1, 2).flatten(2))
        return y_BND

    def forward(self, x_BND: Tensor) -> Tensor:
        """Return tokens of the input's shape."""
        return self.join_heads(F.scaled_dot_product_attention(*self.split_heads(x_BND)))


class VitBlock(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, dim: int, num_heads: int) -> None:
        """Make the block."""
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = VitMlp(dim)

    def forward(self, x_BND: Tensor) -> Tensor:
        """Return tokens of the input's shape."""
        x_BND = x_BND + self.attn(self.norm1(x_BND))
        y_BND: Tensor = x_BND + self.mlp(self.norm2(x_BND))
        return y_BND


class VitEncoder(nn.Module):
    """A ViT with a class token and learned positions (DINO's; HIPT's ViT-256)."""

    def __init__(
        self, dim: int, num_heads: int, depth: int, skip_blocks: Sequence[int], num_classes: int
    ) -> None:
        """Make the encoder.

        Args:
            dim: Channels of a token.
            num_heads: Attention heads; divides `dim`.
            depth: Number of blocks.
            skip_blocks: Blocks, counted from 1, after which a grid of tokens is taken.
            num_classes: Tissue classes; with 0 the class token itself is returned.
        """
        super().__init__()
        self.skip_blocks = tuple(skip_blocks)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + VIT_TOKENS**2, dim))
        self.patch_embed = PatchEmbed(dim)
        self.blocks = nn.ModuleList(VitBlock(dim, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.head = nn.Linear(dim, num_classes) if num_classes else nn.Identity()

    def positions(self, rows: int, columns: int) -> Tensor:
        """Return the positions [1, 1 + rows * columns, D], interpolated as in DINO.

        DINO adds 0.1 to the new size, so that rounding down never loses a row. Its bicubic
        interpolation uses the scale with that 0.1 in it. The weights were trained so, hence the
        same is done here.
        """
        if rows == columns == VIT_TOKENS:
            return self.pos_embed
        own, grid = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        grid = grid.reshape(1, VIT_TOKENS, VIT_TOKENS, -1).permute(0, 3, 1, 2)
        scale = ((rows + 0.1) / VIT_TOKENS, (columns + 0.1) / VIT_TOKENS)
        grid = F.interpolate(grid, scale_factor=scale, mode="bicubic")
        return torch.cat([own, grid.flatten(2).transpose(1, 2)], dim=1)

    def forward(self, x_BCHW: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return tissue logits [B, classes] and the grids of `skip_blocks`, each [B, D, R, T]."""
        grid_BRTD: Tensor = self.patch_embed(x_BCHW)
        B, R, T, D = grid_BRTD.shape
        own_B1D = self.cls_token.expand(B, -1, -1)
        x_BND = torch.cat([own_B1D, grid_BRTD.reshape(B, R * T, D)], dim=1) + self.positions(R, T)
        skips = []
        for number, block in enumerate(self.blocks, start=1):
            x_BND = block(x_BND)
            if number in self.skip_blocks:
                skips.append(x_BND[:, 1:].reshape(B, R, T, D).permute(0, 3, 1, 2))
        return self.head(self.norm(x_BND[:, 0])), skips


def relative_positions(table_LK: Tensor, size: int) -> Tensor:
    """Return, for every query and key along one axis, the vector of their offset.

    Args:
        table_LK: One vector per offset -(n - 1)..n - 1, where n is the size in training. For
            another size the table is interpolated linearly, as SAM does.
        size: Number of tokens along the axis.

    Returns:
        [size, size, K], query first.
    """
    offsets = 2 * size - 1
    if len(table_LK) != offsets:
        table_LK = F.interpolate(table_LK.T[None], size=offsets, mode="linear")[0].T
    place = torch.arange(size, device=table_LK.device)
    return table_LK[place[:, None] - place[None, :] + size - 1]


class SamAttention(Attention):
    """Self-attention over a grid, with SAM's relative positions added to the logits.

    The position term is the sum of a term for the rows and a term for the columns (MViTv2,
    arXiv:2112.01526, section 4.1). It depends on the query before scaling. Here it is part of the
    product of queries and keys:

    - A query is lengthened by its terms for every row and every column.
    - A key is lengthened by a one at its own row and a one at its own column.

    Therefore no table of all pairs of queries and keys is made. For a tile of 1024 px in SAM-B
    that saves 1.4 GiB of memory, at the same speed on a CPU.
    """

    def __init__(self, dim: int, num_heads: int, side: int) -> None:
        """Make the attention for grids of `side` x `side` tokens."""
        super().__init__(dim, num_heads)
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * side - 1, dim // num_heads))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * side - 1, dim // num_heads))

    def forward(self, x_BRTD: Tensor) -> Tensor:
        """Return a grid of the input's shape."""
        B, R, T, D = x_BRTD.shape
        q_BENK, k_BENK, v_BENK = self.split_heads(x_BRTD.reshape(B, R * T, D))
        K = q_BENK.shape[3]
        terms = self._position_terms(q_BENK.view(B, self.num_heads, R, T, K))
        place = torch.arange(R * T, device=x_BRTD.device)
        own_place = torch.cat([F.one_hot(place // T, R), F.one_hot(place % T, T)], dim=1)
        own_place = own_place.to(k_BENK.dtype).expand(B, self.num_heads, -1, -1)
        y_BENL = F.scaled_dot_product_attention(
            torch.cat([q_BENK, terms * K**0.5], dim=3),  # K**0.5 undoes the scale for the terms
            torch.cat([k_BENK, own_place], dim=3),
            F.pad(v_BENK, (0, R + T)),  # the fast kernels need values as long as keys
            scale=K**-0.5,
        )
        return self.join_heads(y_BENL[..., :K]).view(B, R, T, D)

    def _position_terms(self, q_BERTK: Tensor) -> Tensor:
        """Return the terms of every query for each row, then for each column [B, E, N, R + T]."""
        R, T = q_BERTK.shape[2:4]
        down = relative_positions(self.rel_pos_h, R).to(q_BERTK.dtype)
        across = relative_positions(self.rel_pos_w, T).to(q_BERTK.dtype)
        row_terms = torch.einsum("bertk,rsk->berts", q_BERTK, down)
        column_terms = torch.einsum("bertk,tsk->berts", q_BERTK, across)
        return torch.cat([row_terms, column_terms], dim=4).flatten(2, 3)


def to_windows(x_BRTD: Tensor) -> Tensor:
    """Cut a grid into windows [windows, 14, 14, D], zero-padded at the bottom and right."""
    B, R, T, D = x_BRTD.shape
    down, across = -(-R // WINDOW), -(-T // WINDOW)
    x_BRTD = F.pad(x_BRTD, (0, 0, 0, across * WINDOW - T, 0, down * WINDOW - R))
    windows = x_BRTD.view(B, down, WINDOW, across, WINDOW, D).transpose(2, 3)
    return windows.reshape(-1, WINDOW, WINDOW, D)


def from_windows(windows: Tensor, num_images: int, rows: int, columns: int) -> Tensor:
    """Join the windows that `to_windows` cut into the grid [B, rows, columns, D]."""
    down, across = -(-rows // WINDOW), -(-columns // WINDOW)
    grid = windows.view(num_images, down, across, WINDOW, WINDOW, -1).transpose(2, 3)
    return grid.flatten(3, 4).flatten(1, 2)[:, :rows, :columns]


class SamBlock(nn.Module):
    """A pre-norm transformer block over a grid; it attends within windows or over all tokens."""

    def __init__(self, dim: int, num_heads: int, *, windowed: bool) -> None:
        """Make the block."""
        super().__init__()
        self.windowed = windowed
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = SamAttention(dim, num_heads, WINDOW if windowed else MAX_TOKENS)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = SamMlp(dim)

    def forward(self, x_BRTD: Tensor) -> Tensor:
        """Return a grid of the input's shape."""
        B, R, T, _ = x_BRTD.shape
        y: Tensor = self.norm1(x_BRTD)
        # The padding of windows is not masked: the weights were trained with it.
        y = from_windows(self.attn(to_windows(y)), B, R, T) if self.windowed else self.attn(y)
        x_BRTD = x_BRTD + y
        out_BRTD: Tensor = x_BRTD + self.mlp(self.norm2(x_BRTD))
        return out_BRTD


class ChannelNorm(nn.Module):
    """Layer norm over the channels of a [B, C, H, W] tensor."""

    def __init__(self, num_channels: int) -> None:
        """Make the norm."""
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return a tensor of the input's shape."""
        x_BHWC = x_BCHW.permute(0, 2, 3, 1)
        y_BHWC = F.layer_norm(x_BHWC, self.weight.shape, self.weight, self.bias, NORM_EPS)
        return y_BHWC.permute(0, 3, 1, 2)


class SamEncoder(nn.Module):
    """SAM's image encoder (arXiv:2304.02643).

    Four blocks attend over the whole grid. All other blocks attend within windows of 14 x 14
    tokens.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        depth: int,
        skip_blocks: Sequence[int],
        global_blocks: Sequence[int],
    ) -> None:
        """Make the encoder.

        Args:
            dim: Channels of a token.
            num_heads: Attention heads; divides `dim`.
            depth: Number of blocks.
            skip_blocks: Blocks, counted from 1, after which a grid of tokens is taken.
            global_blocks: Blocks, counted from 0, that attend over the whole grid.
        """
        super().__init__()
        self.skip_blocks = tuple(skip_blocks)
        self.pos_embed = nn.Parameter(torch.zeros(1, MAX_TOKENS, MAX_TOKENS, dim))
        self.patch_embed = PatchEmbed(dim)
        self.blocks = nn.ModuleList(
            SamBlock(dim, num_heads, windowed=index not in global_blocks) for index in range(depth)
        )
        self.neck = nn.Sequential(
            nn.Conv2d(dim, NECK_CHANNELS, kernel_size=1, bias=False),
            ChannelNorm(NECK_CHANNELS),
            nn.Conv2d(NECK_CHANNELS, NECK_CHANNELS, kernel_size=3, padding=1, bias=False),
            ChannelNorm(NECK_CHANNELS),
        )

    def forward(self, x_BCHW: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the neck's mean [B, 256] and the grids of `skip_blocks`, each [B, D, R, T]."""
        x_BRTD: Tensor = self.patch_embed(x_BCHW)
        _, R, T, _ = x_BRTD.shape
        # SAM takes images of 1024 px only. CellViT gives a smaller image the first positions.
        x_BRTD = x_BRTD + self.pos_embed[:, :R, :T]
        skips = []
        for number, block in enumerate(self.blocks, start=1):
            x_BRTD = block(x_BRTD)
            if number in self.skip_blocks:
                skips.append(x_BRTD.permute(0, 3, 1, 2))
        neck_BCRT: Tensor = self.neck(x_BRTD.permute(0, 3, 1, 2))
        return neck_BCRT.mean(dim=(2, 3)), skips
