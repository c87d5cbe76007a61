"""Batch norm over the batches of all workers, with exact gradients, on CPU and GPU.

torch.nn.SyncBatchNorm refuses CPU tensors; this one needs only a function that sums a tensor over
workers. Statistics equal those of torch's BatchNorm on the joined batch, also where workers hold
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
    """Of one channel each, over all workers.

    Attributes:
        mean_C: Mean.
        var_C: Variance, biased.
        count: Values in a channel, all workers together, float64. A tensor, so that a GPU is not
            waited for.
    """

    mean_C: Tensor
    var_C: Tensor
    count: Tensor


def joined_statistics(x: Tensor, all_reduce: AllReduce) -> Statistics:
    """Return mean and variance over crops and space of all workers' x [N, C, *], in one sum.

    Each worker's own mean and variance are taken first and joined in float64, so that a mean far
    from zero costs no digits.

    Raises:
        ValueError: Where all workers together hold no more than one value a channel.
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
    if num <= 1 and float(count) <= 1:  # looked at only where it can be: a GPU would be waited for
        message = (
            f"batch norm over all workers got {float(count):.0f} values a channel, expected "
            "more than 1; use a larger batch."
        )
        raise ValueError(message)
    mean_C = parts[:C] / count
    var_C = (parts[C:-1] / count - mean_C.square()).clamp_min(0)
    return Statistics(mean_C.to(_wide(x).dtype), var_C.to(_wide(x).dtype), count)


class _Normalise(torch.autograd.Function):
    """(x - mean) / sqrt(var + eps) with weight and bias, where mean and var depend on every x.

    The gradient of the joined formula, y = w xhat + b over n values a channel:
    dx = w / std (dy - sum(dy) / n - xhat sum(dy xhat) / n), sums over all workers. The gradients
    of weight and bias are this worker's share.
    """

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - torch gives no type for it
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        found: Statistics,
        eps: float,
        all_reduce: AllReduce,
    ) -> Tensor:
        y = F.batch_norm(x, found.mean_C, found.var_C, weight, bias, training=False, eps=eps)
        inverse_C = (found.var_C + eps).rsqrt()
        ctx.save_for_backward(x, weight, found.mean_C, inverse_C, found.count)
        ctx.all_reduce = all_reduce
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        x, weight, mean_C, inverse_C, count = ctx.saved_tensors
        (dy,) = gradients
        C, over = x.shape[1], _but_channels(x)
        wide, wide_dy = _wide(x), _wide(dy)
        sum_C = wide_dy.sum(over)
        # Centred before it is multiplied: cheap in digits where the mean is far from zero.
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
    """A BatchNorm1d or 2d whose training statistics are those of all workers' crops together.

    It takes over the parameters and buffers of the norm it replaces, under the same names.
    """

    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    def __init__(self, norm: nn.BatchNorm1d | nn.BatchNorm2d, all_reduce: AllReduce) -> None:
        """Take over a norm's parameters, buffers and settings."""
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
        """Normalise x [N, C, *]; every worker must call this equally often, in the same order."""
        mean_C, var_C = self.running_mean, self.running_var
        if not self.training and mean_C is not None:
            return F.batch_norm(x, mean_C, var_C, self.weight, self.bias, eps=self.eps)
        with torch.no_grad():
            found = joined_statistics(x, self.all_reduce)
            if self.training and self.track_running_stats:
                self._track(found)
        y: Tensor = _Normalise.apply(x, self.weight, self.bias, found, self.eps, self.all_reduce)
        return y

    def _track(self, found: Statistics) -> None:
        """Move the running statistics as torch's BatchNorm does, with the unbiased variance."""
        mean_C, var_C, number = self.running_mean, self.running_var, self.num_batches_tracked
        if mean_C is None or var_C is None or number is None:
            return
        number += 1
        share = 1 / float(number) if self.momentum is None else self.momentum
        unbiased_C = found.var_C * (found.count / (found.count - 1))
        mean_C.lerp_(found.mean_C.to(mean_C.dtype), share)
        var_C.lerp_(unbiased_C.to(var_C.dtype), share)


def convert(module: nn.Module, all_reduce: AllReduce | None, world_size: int) -> nn.Module:
    """Let every BatchNorm1d and BatchNorm2d in a module see the batches of all workers.

    Args:
        module: Changed in place; names and values in its state dict stay.
        all_reduce: Sums a tensor over workers; needed when world_size > 1.
        world_size: Workers; with one, nothing is changed.

    Returns:
        The module, or its replacement where the module is itself a batch norm.

    Raises:
        ValueError: Several workers and no all_reduce.
    """
    if world_size == 1:
        return module
    if all_reduce is None:
        message = f"world_size is {world_size}: pass all_reduce, or norms see one worker's batch."
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
    """Return x in float32, or float64 if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _along(x_C: Tensor, like: Tensor) -> Tensor:
    """Shape numbers a channel so that they broadcast over [N, C, *]."""
    return x_C.view(1, -1, *([1] * (like.dim() - 2)))
