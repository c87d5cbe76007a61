"""The optimisers of MoCo v3: LARS for residual networks, AdamW for transformers.

LARS is from You, Gitman, Ginsburg 2017, "Large batch training of convolutional networks". MoCo v3
uses this form of it:

- Weight decay is added to a layer's gradient. The sum is scaled to `trust` times the length of the
  layer's weights.
- The learning rate multiplies the momentum buffer, not the update that enters it.
- Biases and the parameters of norms (one dimension or none) are neither decayed nor scaled.
"""

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor, nn


class Lars(torch.optim.Optimizer):
    """Stochastic gradient descent with momentum and a separate step length for each layer.

    For weights w of two or more dimensions with gradient g: u = g + weight_decay w, then
    u <- u trust |w| / |u| if both lengths are positive. For all other parameters u = g. For all
    parameters: b <- momentum b + u, then w <- w - lr b.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float,
        *,
        momentum: float = 0.9,
        weight_decay: float = 1e-6,
        trust: float = 1e-3,
    ) -> None:
        """Make the optimiser for parameters or groups of parameters.

        Raises:
            ValueError: A setting is below 0 or not finite, or the momentum is 1 or more.
        """
        settings = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust}
        for name, value in settings.items():
            if not 0 <= value < (1 if name == "momentum" else float("inf")):
                bound = "below 1" if name == "momentum" else "finite"
                message = f"LARS: {name} is {value}, expected 0 or above and {bound}."
                raise ValueError(message)
        super().__init__(params, settings)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step; parameters without a gradient do not change."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [parameter for parameter in group["params"] if parameter.grad is not None]
            _step_group(params, self._momentum_buffers(params), group)
        return loss

    def _momentum_buffers(self, params: list[Tensor]) -> list[Tensor]:
        """Return the momentum buffers; they are zero before the first step."""
        for parameter in params:
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(
                    parameter, memory_format=torch.preserve_format
                )
        return [self.state[parameter]["momentum_buffer"] for parameter in params]


def _step_group(params: list[Tensor], buffers: list[Tensor], group: dict[str, Any]) -> None:
    """Take the step of one group of parameters.

    torch's fused loops work on lists of tensors, as in torch's own optimisers.
    """
    if not params:
        return
    updates = [parameter.grad for parameter in params if parameter.grad is not None]
    layers = [number for number, parameter in enumerate(params) if parameter.ndim > 1]
    if layers:
        weights = [params[number] for number in layers]
        decayed = torch._foreach_add(  # noqa: SLF001
            [updates[number] for number in layers], weights, alpha=group["weight_decay"]
        )
        lengths = torch.stack(torch._foreach_norm(weights))  # noqa: SLF001
        sizes = torch.stack(torch._foreach_norm(decayed))  # noqa: SLF001
        ratios = group["trust"] * lengths / sizes
        ratios = torch.where((lengths > 0) & (sizes > 0), ratios, torch.ones_like(ratios))
        torch._foreach_mul_(decayed, list(ratios.unbind()))
        for number, update in zip(layers, decayed, strict=True):
            updates[number] = update
    torch._foreach_mul_(buffers, group["momentum"])
    torch._foreach_add_(buffers, updates)
    torch._foreach_add_(params, buffers, alpha=-group["lr"])


def new_moco_optimiser(
    name: str, model: nn.Module, *, lr: float = 0.0, weight_decay: float | None = None
) -> torch.optim.Optimizer:
    """Make an optimiser over the trainable parameters of a model.

    Args:
        name: 'lars' (momentum 0.9, weight decay 1e-6, trust 0.001) or 'adamw' (weight decay 0.1).
        model: The network. Parameters without gradients, those of the momentum encoder, are left
            out.
        lr: Learning rate of the first step; `moco_step` sets it at each step.
        weight_decay: Weight decay; None: the published value.

    Raises:
        ValueError: The name is neither 'lars' nor 'adamw'.
    """
    params = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if name == "lars":
        return Lars(params, lr, weight_decay=1e-6 if weight_decay is None else weight_decay)
    if name == "adamw":
        decay = 0.1 if weight_decay is None else weight_decay
        return torch.optim.AdamW(params, lr=lr, weight_decay=decay, fused=True)
    message = f"optimiser is {name!r}, expected 'lars' or 'adamw'."
    raise ValueError(message)
