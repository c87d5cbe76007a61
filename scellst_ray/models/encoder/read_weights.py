"""Read the tensors of an encoder's file, and refuse those that cannot be its network's.

Files come from other machines and other software. They are opened without running any code in them.
"""

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from scellst_ray.models.weights.digests import DAMAGE

UNREADABLE: tuple[type[Exception], ...] = (*DAMAGE, pickle.UnpicklingError, SafetensorError)
# Prefixes of parameter names in checkpoints of other projects: DataParallel, MoCo v3.
PREFIXES = ("module.base_encoder.", "base_encoder.", "module.", "backbone.")
# Counters of training steps: old checkpoints lack them, and results do not depend on them.
COUNTER = "num_batches_tracked"


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a file by torchvision's names.

    Args:
        path: A safetensors file, or a checkpoint of torch that holds a state dict.

    Raises:
        UNREADABLE: The file is damaged, would run code, or holds no state dict or several.
    """
    if path.suffix == ".safetensors":
        return load_file(path)
    loaded = torch.load(path, map_location="cpu", weights_only=True)
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else loaded
    if not isinstance(state, dict):
        message = f"it holds a {type(state).__name__}, expected a state dict"
        raise RuntimeError(message)
    state = {str(key): value for key, value in state.items() if isinstance(value, torch.Tensor)}
    found = [prefix for prefix in ("", *PREFIXES) if f"{prefix}conv1.weight" in state]
    if len(found) > 1:
        names = " and ".join(f"{prefix}conv1.weight" for prefix in found)
        message = f"it holds several networks ({names}); store one of them alone"
        raise RuntimeError(message)
    prefix = found[0] if found else ""
    return {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}


def fit_tensors(
    state: Mapping[str, torch.Tensor], network: nn.Module, source: str, arch: str
) -> dict[str, torch.Tensor]:
    """Return the tensors that a network needs, in float32 where they are floating.

    Args:
        state: Tensors by name; further ones, such as the classifier's, are left out.
        network: Network with the names, shapes and kinds of its tensors; values do not matter.
        source: Name of the file for messages.
        arch: Name of the architecture for messages.

    Raises:
        ValueError: A tensor is missing, has another shape or kind, or holds NaN or infinity.
    """
    expected = {k: v for k, v in network.state_dict().items() if not k.endswith(COUNTER)}
    wrong = [k for k, v in expected.items() if k not in state or state[k].shape != v.shape]
    if wrong:
        named = {"resnet50": "ResNet-50", "resnet34": "ResNet-34", "resnet18": "ResNet-18"}
        kind = f"{named[arch]} as torchvision names it" if arch in named else arch
        message = (
            f"encoder {source}: not a {kind}; {len(wrong)} tensors are missing or have another "
            f"shape, for example {wrong[0]}"
        )
        raise ValueError(message)
    problem = value_problem({key: state[key] for key in expected}, expected)
    if problem:
        message = f"encoder {source}: {problem}; copy or train the encoder again"
        raise ValueError(message)
    return {k: state[k].float() if v.is_floating_point() else state[k] for k, v in expected.items()}


def value_problem(
    state: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]
) -> str | None:
    """Return which tensor is of another kind than expected, or not finite; or None.

    Args:
        state: Tensors by name.
        expected: Tensors of the network by the same names; their values do not matter.
    """
    for name, value in state.items():
        is_plain = value.layout == torch.strided and not value.is_quantized and not value.is_meta
        if not is_plain or value.is_floating_point() != expected[name].is_floating_point():
            kind = str(value.dtype) if is_plain else f"{value.layout} on {value.device}"
            wanted = str(expected[name].dtype).removeprefix("torch.")
            return f"tensor {name} is {kind.replace('torch.', '')}, expected {wanted}"
        if value.is_floating_point() and value.numel():
            limits = torch.aminmax(value)  # NaN passes on, and nothing is copied
            if not (limits.min.isfinite() and limits.max.isfinite()):
                return f"tensor {name} holds NaN or infinity"
    return None
