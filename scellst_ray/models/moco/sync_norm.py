"""Batch norm over the batches of all workers, with exact gradients, on CPU and GPU.

torch.nn.SyncBatchNorm refuses CPU tensors. SyncNorm needs only a function that sums a tensor over
workers. Its statistics equal those of torch's BatchNorm on the joined batch, also if workers hold
different numbers of crops.

Shape letters: N crops of this worker, C channels; `*` stands for no or two spatial dimensions.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Sums a tensor over all workers, in place or not, and returns it.
AllReduce = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Statistics:
    """Statistics of each channel over all workers.

    Attributes:
        mean_C: Mean.
        var_C: Biased variance.
        count: Number of values per channel over all workers, float64. It is a tensor, so that the
            CPU does not wait for a GPU.
    """

    mean_C: Tensor
    var_C: Tensor
    count: Tensor


def joined_statistics(x: Tensor, all_reduce: AllReduce) -> Statistics:
    """Return mean and variance over crops and space of all workers' x [N, C, *].

    Each worker computes its own mean and variance first. These are joined in float64 with one sum
    over workers, so that a mean far from zero loses no digits.

    Raises:
        ValueError: All workers together hold at most one value per channel.
    """
    C = x.shape[1]
    num = x.numel() // C
    parts = torch.zeros(2 * C + 1, dtype=torch.float64, device=x.device)
    if num:
        var_C, mean_C = torch.var_mean(_wide(x), _but_channels(x), correction=0)
        mean_C, var_C = mean_C.double(), var_C.double()
        parts = torch.cat(
            [mean_C * num, (var_C + mean_C.square()) * num, parts.new_full((1,), num)]
        )
    parts = all_reduce(parts)
    count = parts[-1]
    if num <= 1 and float(count) <= 1:  # float(count) waits for a GPU, hence the first condition
        message = (
            f"batch norm over all workers got {float(count):.0f} values per channel, expected "
            "more than 1; use a larger batch."
        )
        raise ValueError(message)
    mean_C = parts[:C] / count
    var_C = (parts[C:-1] / count - mean_C.square()).clamp_min(0)
    return Statistics(mean_C.to(_wide(x).dtype), var_C.to(_wide(x).dtype), count)


class _Normalise(torch.autograd.Function):
    """y = w xhat + b with xhat = (x - mean) / sqrt(var + eps); mean and var depend on every x.

    The gradient over n values per channel is dx = w / std (dy - sum(dy) / n - xhat sum(dy xhat) /
    n). Sums run over all workers. The gradients of weight and bias are this worker's share.
    """

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - torch has no type for it
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        joined: Statistics,
        eps: float,
        all_reduce: AllReduce,
    ) -> Tensor:
        y = F.batch_norm(x, joined.mean_C, joined.var_C, weight, bias, training=False, eps=eps)
        inverse_C = (joined.var_C + eps).rsqrt()
        ctx.save_for_backward(x, weight, joined.mean_C, inverse_C, joined.count)
        ctx.all_reduce = all_reduce
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        x, weight, mean_C, inverse_C, count = ctx.saved_tensors
        (dy,) = gradients
        C, over = x.shape[1], _but_channels(x)
        wide, wide_dy = _wide(x), _wide(dy)
        sum_C = wide_dy.sum(over)
        # x is centred before the product, so that a mean far from zero loses no digits.
        dot_C = ((wide - _along(mean_C, x)) * wide_dy).sum(over) * inverse_C
        sums = ctx.all_reduce(torch.cat([sum_C, dot_C]).double()) / count
        all_sum_C, all_dot_C = sums.to(wide.dtype).split(C)
        slope_C = -inverse_C * all_dot_C  # dx = scale (dy + slope x + shift)
        shift_C = -all_sum_C - slope_C * mean_C
        scale_C = inverse_C if weight is None else inverse_C * weight.to(wide.dtype)
        dx = torch.addcmul(wide_dy + _along(shift_C, x), wide, _along(slope_C, x))
        dx = dx.mul_(_along(scale_C, x)).to(x.dtype)
        d_weight = None if weight is None else dot_C.to(weight.dtype)
        d_bias = None if weight is None else sum_C.to(weight.dtype)
        return dx, d_weight, d_bias, None, None, None


class SyncNorm(nn.Module):
    """A BatchNorm1d or BatchNorm2d whose training statistics are those of all workers' crops.

    It has the parameters and buffers of the norm that it replaces, under the same names.
    """

    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    def __init__(self, norm: nn.BatchNorm1d | nn.BatchNorm2d, all_reduce: AllReduce) -> None:
        """Make the norm from another norm's parameters, buffers and settings; nothing is copied."""
        super().__init__()
        self.weight: nn.Parameter | None = norm.weight
        self.bias: nn.Parameter | None = norm.bias
        self.eps, self.momentum = norm.eps, norm.momentum
        self.track_running_stats = norm.track_running_stats
        self.register_buffer("running_mean", norm.running_mean)
        self.register_buffer("running_var", norm.running_var)
        self.register_buffer("num_batches_tracked", norm.num_batches_tracked)
        self.all_reduce = all_reduce
        self.training = norm.training

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [N, C, *]; all workers must call their norms in the same order."""
        mean_C, var_C = self.running_mean, self.running_var
        if not self.training and mean_C is not None:
            return F.batch_norm(x, mean_C, var_C, self.weight, self.bias, eps=self.eps)
        with torch.no_grad():
            joined = joined_statistics(x, self.all_reduce)
            if self.training and self.track_running_stats:
                self._update_running(joined)
        y: Tensor = _Normalise.apply(x, self.weight, self.bias, joined, self.eps, self.all_reduce)
        return y

    def _update_running(self, joined: Statistics) -> None:
        """Update the running statistics as torch's BatchNorm does, with the unbiased variance."""
        mean_C, var_C, number = self.running_mean, self.running_var, self.num_batches_tracked
        if mean_C is None or var_C is None or number is None:
            return
        number += 1
        share = 1 / float(number) if self.momentum is None else self.momentum
        unbiased_C = joined.var_C * (joined.count / (joined.count - 1))
        mean_C.lerp_(joined.mean_C.to(mean_C.dtype), share)
        var_C.lerp_(unbiased_C.to(var_C.dtype), share)


def convert(module: nn.Module, all_reduce: AllReduce | None, world_size: int) -> nn.Module:
    """Replace every BatchNorm1d and BatchNorm2d in a module by SyncNorm.

    Args:
        module: Module; it changes in place, but names and values in its state dict stay.
        all_reduce: Function that sums a tensor over workers; needed when world_size > 1.
        world_size: Number of workers; with 1 nothing changes.

    Returns:
        The module, or the new norm if the module itself is a batch norm.

    Raises:
        ValueError: There are several workers and no all_reduce.
    """
    if world_size == 1:
        return module
    if all_reduce is None:
        message = (
            f"world_size is {world_size}: pass all_reduce; without it norms see the batch of one "
            "worker."
        )
        raise ValueError(message)
    if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
        return SyncNorm(module, all_reduce)
    for name, child in module.named_children():
        setattr(module, name, convert(child, all_reduce, world_size))
    return module


def _but_channels(x: Tensor) -> list[int]:
    """Return all dimensions but the second."""
    return [0, *range(2, x.dim())]


def _wide(x: Tensor) -> Tensor:
    """Return x in float32, or in float64 if x is float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _along(x_C: Tensor, like: Tensor) -> Tensor:
    """Return one number per channel in a shape that broadcasts over [N, C, *]."""
    return x_C.view(1, -1, *([1] * (like.dim() - 2)))
