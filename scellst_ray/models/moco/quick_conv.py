"""Convolutions of small maps on the CPU, computed as matrix products where these are quicker.

Crops of cells are small. At 48 px the maps of a residual network are 12, 6, 3 and 2 px wide. There
torch's convolution kernels are slow, above all for the gradient of weights. Matrix products
compute the same sums faster. Two rules come from measurements of every layer of ResNet-18 and 50
(float32, AVX2):

- The gradient of weights is a product of gradients and unfolded inputs in two cases: for 1 x 1
  kernels, which need no unfolding, and for outputs of few positions.
- A 3 x 3 kernel with padding on a map of 2 x 2 is one product with a matrix of its taps (weights),
  since every output depends on the whole map. In the plain sum 5 of 9 products are with padding.

In all other cases, on other devices and in other precisions torch's convolution is used. Results
differ from it by rounding only.

Shape letters: N crops, C channels in, O out, H W map, K side of the kernel, P positions of the
output map of all crops.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

MAX_POSITIONS = 9  # largest output map, in positions, for which unfolding the input pays


class QuickConv2d(nn.Conv2d):
    """A convolution without bias whose kernel, stride and padding are square."""

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Convolve; channels last is the fastest layout."""
        if x_NCHW.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
            return super().forward(x_NCHW)
        stride, padding = self.stride[0], int(self.padding[0])
        if not torch.is_grad_enabled():
            return _convolve(x_NCHW, self.weight, stride, padding)
        y_NOHW: Tensor = _QuickConv.apply(x_NCHW, self.weight, stride, padding)
        return y_NOHW


def quicken(module: nn.Module) -> nn.Module:
    """Replace a module's plain convolutions by QuickConv2d, in place; its state dict stays.

    Convolutions with bias, groups, dilation or sides that differ are not replaced.
    """
    for name, child in module.named_children():
        if type(child) is nn.Conv2d and _is_plain(child):
            side, stride, padding = child.kernel_size[0], child.stride[0], int(child.padding[0])
            quick = QuickConv2d(
                child.in_channels, child.out_channels, side, stride, padding, bias=False,
                device="meta",
            )  # fmt: skip
            quick.weight = child.weight
            setattr(module, name, quick.train(child.training))
        else:
            quicken(child)
    return module


def _is_plain(conv: nn.Conv2d) -> bool:
    sides = [conv.kernel_size, conv.stride, conv.padding]
    return (
        conv.bias is None
        and conv.groups == 1
        and conv.dilation == (1, 1)
        and conv.padding_mode == "zeros"
        and all(isinstance(pair, tuple) and pair[0] == pair[1] for pair in sides)
    )


class _QuickConv(torch.autograd.Function):
    """The convolution and the gradients of its two inputs, each computed the quickest way."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - torch has no type for it
        x: Tensor,
        weight: Tensor,
        stride: int,
        padding: int,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        return _convolve(x, weight, stride, padding)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        x, weight = ctx.saved_tensors
        stride, padding = ctx.stride, ctx.padding
        dy = gradients[0].contiguous(memory_format=torch.channels_last)
        dx = d_weight = None
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        if _is_tap_product(x, weight, stride, padding):
            dx = _fold_rows(_flatten_maps(dy) @ _tap_matrix(weight), x.shape) if needs_x else None
            return dx, _tap_gradient(x, dy, weight) if needs_weight else None, None, None
        is_product = needs_weight and _is_product_quicker(weight, dy)
        if is_product:
            d_weight = _weight_gradient(x, dy, weight.shape[2], stride, padding)
        by_torch = [needs_x, needs_weight and not is_product, False]
        if any(by_torch):
            pair, ones = [stride, stride], [1, 1]
            dx, torch_d_weight, _ = torch.ops.aten.convolution_backward(
                dy, x, weight, None, pair, [padding, padding], ones, False, [0, 0], 1, by_torch  # noqa: FBT003
            )  # fmt: skip
            d_weight = d_weight if is_product else torch_d_weight
        return dx, d_weight, None, None


def _convolve(x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    if _is_tap_product(x, weight, stride, padding):
        shape = (len(x), len(weight), *x.shape[2:])
        return _fold_rows(_flatten_maps(x) @ _tap_matrix(weight).T, shape)
    return torch.conv2d(x, weight, None, stride, padding)


def _is_product_quicker(weight: Tensor, dy: Tensor) -> bool:
    """Return whether a product gives the gradient of weights sooner than torch's kernel."""
    return weight.shape[1] > 3 and (
        weight.shape[2] == 1 or dy.shape[2] * dy.shape[3] <= MAX_POSITIONS
    )


def _weight_gradient(x: Tensor, dy: Tensor, side: int, stride: int, padding: int) -> Tensor:
    """Return the gradient of weights [O, C, K, K]: gradients [O, P] times windows [P, K K C]."""
    N, C, H, W = x.shape
    x_NHWC = x.permute(0, 2, 3, 1)
    if side == 1 and padding == 0:
        windows = x_NHWC[:, ::stride, ::stride].reshape(-1, C)
    else:
        padded = x.new_zeros(N, H + 2 * padding, W + 2 * padding, C)
        padded[:, padding : padding + H, padding : padding + W] = x_NHWC
        by_N, by_H, by_W, _ = padded.stride()
        shape = (N, dy.shape[2], dy.shape[3], side, side * C)
        strides = (by_N, by_H * stride, by_W * stride, by_H, 1)
        # A row of a window is contiguous in memory, so this copies long pieces.
        windows = padded.as_strided(shape, strides).reshape(-1, side * side * C)
    dy_PO = dy.permute(0, 2, 3, 1).reshape(-1, dy.shape[1])
    return (dy_PO.T @ windows).view(-1, side, side, C).permute(0, 3, 1, 2)


def _is_tap_product(x: Tensor, weight: Tensor, stride: int, padding: int) -> bool:
    """Return whether every output position depends on the whole map, a map of 2 x 2."""
    return tuple(x.shape[2:]) == (2, 2) and (weight.shape[2], stride, padding) == (3, 1, 1)


def _position_pairs() -> Iterator[tuple[int, int, int, int, int, int]]:
    """Yield output row and column, input row and column, and tap of all pairs of positions."""
    for o in range(4):
        for i in range(4):
            to_row, to_column, row, column = *divmod(o, 2), *divmod(i, 2)
            yield to_row, to_column, row, column, row - to_row + 1, column - to_column + 1


def _tap_matrix(weight: Tensor) -> Tensor:
    """Return the matrix [4 O, 4 C] of a kernel on a map of 2 x 2."""
    O, C = weight.shape[:2]  # noqa: E741
    matrix = weight.new_empty(2, 2, O, 2, 2, C)
    by_tap = weight.permute(2, 3, 0, 1)
    for to_row, to_column, row, column, *tap in _position_pairs():
        matrix[to_row, to_column, :, row, column] = by_tap[tuple(tap)]
    return matrix.view(4 * O, 4 * C)


def _tap_gradient(x: Tensor, dy: Tensor, weight: Tensor) -> Tensor:
    """Return the gradient of weights: that of the matrix, summed over the places of each tap."""
    O, C = weight.shape[:2]  # noqa: E741
    matrix = (_flatten_maps(dy).T @ _flatten_maps(x)).view(2, 2, O, 2, 2, C)
    by_tap = weight.new_zeros(3, 3, O, C)
    for to_row, to_column, row, column, *tap in _position_pairs():
        by_tap[tuple(tap)] += matrix[to_row, to_column, :, row, column]
    return by_tap.permute(2, 3, 0, 1)


def _flatten_maps(x_NCHW: Tensor) -> Tensor:
    """Return one row per crop, [N, H W C]; channels-last memory is not copied."""
    return x_NCHW.permute(0, 2, 3, 1).reshape(len(x_NCHW), -1)


def _fold_rows(rows: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return rows [N, H W C] as a map [N, C, H, W], channels last."""
    N, C, H, W = shape
    return rows.view(N, H, W, C).permute(0, 3, 1, 2)
