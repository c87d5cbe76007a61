"""Checkpoints of CellViT, as published or as trained with the published code.

A checkpoint is a dict written by `torch.save`. Three of its keys are needed: `arch` (a class
name), `model_state_dict` and `config` (flat, with dotted keys). The file is opened with
`weights_only`, so that it cannot run code. It is mapped into memory, so that all processes of a
machine share one copy.
"""

import ast
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scellst_ray.core.schemas import MAP_TYPE_SHIFT
from scellst_ray.core.text import errors_in_one_line
from scellst_ray.models.cellvit.network import ARCHS, MAP_CHANNELS, Arch, CellViT
from scellst_ray.models.encoder.read_weights import value_problem
from scellst_ray.models.weights.digests import DAMAGE, file_digest

PANNUKE_TYPES = ("Background", "Neoplastic", "Inflammatory", "Connective", "Dead", "Epithelial")
DEFAULT_MEAN = DEFAULT_STD = (0.5, 0.5, 0.5)
MAX_TYPES = 1 << (32 - MAP_TYPE_SHIFT)
ARCH_NAMES = ("CellViT256", "CellViTSAM")  # the class with a plain ViT, and that with SAM's
WRAPPERS = ("DataParallel", "DistributedDataParallel")  # a training run may save these as arch
NEEDED = ("arch", "model_state_dict", "config")
ZIP_START = b"PK\x03\x04"
# The first bytes of torch's older format: its magic number 0x1950A86A20F9469CFC6C, pickled.
LEGACY_START = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
# Training leaves plain NumPy numbers in a checkpoint (`best_metric`). They hold no code.
_SCALAR = np.float64(0).__reduce__()[0]
SAFE_NUMPY: list[Any] = [_SCALAR, (_SCALAR, "numpy.core.multiarray.scalar"), np.dtype]
SAFE_NUMPY += [type(np.dtype(name)) for name in ("float32", "float64", "int64")]
BINARY_HEAD = "nuclei_binary_map_decoder.decoder0_header.2.weight"
TYPE_HEAD = "nuclei_type_maps_decoder.decoder0_header.2.weight"


@dataclass(frozen=True)
class CellVit:
    """A CellViT ready to run.

    Attributes:
        network: Network in eval mode, without gradients, float32.
        arch: Variant and its sizes.
        type_names: Nucleus types by number, background first.
        mean: RGB mean that is subtracted before the network; pixel values lie in 0-1.
        std: RGB standard deviation that pixel values are divided by.
        mixed_precision: Whether training used mixed precision (float16 and float32).
        digest: 'sha256:...' of the file.
    """

    network: CellViT
    arch: Arch
    type_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    mixed_precision: bool
    digest: str


@errors_in_one_line()
def load_cellvit(path: str | Path) -> CellVit:
    """Load a checkpoint of a training run (12 keys) or of a release (4 keys).

    Raises:
        ValueError: The file does not exist, is cut off, is no torch file or holds code. Or the
            network is none of CellViT-256 and CellViT-SAM-B/L/H. Or its tensors or its
            configuration contradict the network.
    """
    path = Path(path)
    digest = cellvit_digest(path)
    checkpoint = _read(path)
    try:
        return _build(checkpoint, digest)
    except (ValueError, RecursionError) as error:
        message = f"CellViT checkpoint {path}: {error}"
        raise ValueError(message) from error


def cellvit_digest(path: str | Path) -> str:
    """Return 'sha256:...' of a checkpoint file.

    Raises:
        ValueError: The file does not exist.
    """
    path = Path(path)
    if not path.is_file():
        message = f"CellViT checkpoint {path}: no such file; give the path of a downloaded .pth"
        raise ValueError(message)
    return file_digest(path)


def _read(path: Path) -> object:
    """Return the object that a file holds, without running any code in it."""
    with path.open("rb") as handle:
        start = handle.read(len(LEGACY_START))
    zipped = zipfile.is_zipfile(path)
    reason = ""
    if zipped or start == LEGACY_START:
        try:
            with torch.serialization.safe_globals(SAFE_NUMPY):
                loaded: object = torch.load(
                    path, map_location="cpu", weights_only=True, mmap=zipped
                )
        except pickle.UnpicklingError as error:
            refused_object = re.search(r"GLOBAL (\S+)", str(error))
            if refused_object is None:
                reason = "is cut off or damaged"
            else:
                name = refused_object.group(1)
                reason = f"holds Python objects ({name}) whose loading would run code; not opened"
        except DAMAGE:
            reason = "is cut off or damaged"
        else:
            return loaded
    elif start.startswith(ZIP_START):
        reason = "is cut off: it starts as a torch file but its end is missing; download it again"
    else:
        reason = "is no torch file (neither torch's zip format nor its older one)"
    message = f"CellViT checkpoint {path}: the file {reason}"
    raise ValueError(message)


def _build(checkpoint: object, digest: str) -> CellVit:
    """Build the network from the loaded object; error messages do not name the file."""
    name, state, config = _split_parts(checkpoint)
    arch = _find_arch(name, state, config)
    num_types, num_tissues, has_regression = _count_outputs(arch, state, config)
    with torch.device("meta"):  # shapes only: no time spent on weights that are replaced
        network = CellViT(arch, num_types, num_tissues, regression_loss=has_regression)
    _check_tensors(network, state)
    expected = network.state_dict()
    problem = value_problem({key: state[key] for key in expected}, expected)
    if problem:
        message = f"{problem}; download or copy it again"
        raise ValueError(message)
    tensors = {key: state[key].to(value.dtype) for key, value in expected.items()}
    network.load_state_dict(tensors, assign=True)
    return CellVit(
        network=network.eval().requires_grad_(requires_grad=False),
        arch=arch,
        type_names=_read_type_names(config, num_types),
        mean=_read_rgb(config, "transformations.normalize.mean", DEFAULT_MEAN),
        std=_read_std(config),
        mixed_precision=_read_flag(config, "training.mixed_precision"),
        digest=digest,
    )


def _split_parts(checkpoint: object) -> tuple[str, dict[str, Tensor], dict[str, object]]:
    """Return the network's name, its tensors without prefixes, and its flat configuration."""
    content = list(checkpoint) if isinstance(checkpoint, Mapping) else type(checkpoint).__name__
    if not isinstance(checkpoint, Mapping) or any(key not in checkpoint for key in NEEDED):
        excerpt = ", ".join(map(str, content[:6])) if isinstance(content, list) else f"a {content}"
        message = f"expected a dict with {', '.join(NEEDED)}; found {excerpt or 'an empty dict'}"
        raise ValueError(message)
    name = str(checkpoint["arch"])
    state, config = checkpoint["model_state_dict"], checkpoint["config"]
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        message = f"model_state_dict is a {type(state).__name__}; expected a dict of tensors"
        raise ValueError(message)
    if not isinstance(config, Mapping):
        message = f"config is a {type(config).__name__}; expected a dict"
        raise ValueError(message)
    tensors = {str(key).removeprefix("module."): value for key, value in state.items()}
    return name, tensors, _flatten(config)


def _flatten(config: Mapping[object, object], prefix: str = "") -> dict[str, object]:
    """Return a configuration with dotted keys; published ones already have them."""
    flat: dict[str, object] = {}
    for key, value in config.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {}
        flat |= {} if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _find_arch(name: str, state: Mapping[str, Tensor], config: Mapping[str, object]) -> Arch:
    """Return the variant that the tensors fit; the checkpoint's `arch` and backbone must agree."""
    accepted = ", ".join(f"CellViT-{variant}" for variant in ARCHS)
    if name not in (*ARCH_NAMES, *WRAPPERS):
        message = f"the network is a {name!r}, which is not supported; expected {accepted}"
        raise ValueError(message)
    positions = state.get("encoder.pos_embed")
    depth = len({key.split(".")[2] for key in state if key.startswith("encoder.blocks.")})
    width = positions.shape[-1] if positions is not None and positions.ndim else 0
    is_sam = positions is not None and positions.ndim == 4
    fitting = [a for a in ARCHS.values() if (a.is_sam, a.dim, a.depth) == (is_sam, width, depth)]
    if not fitting:
        message = f"an encoder of {depth} blocks and width {width} is none of {accepted}"
        raise ValueError(message)
    arch = fitting[0]
    if name not in (*WRAPPERS, ARCH_NAMES[arch.is_sam]):
        message = f"arch is {name!r}, but the tensors are those of CellViT-{arch.variant}"
        raise ValueError(message)
    expected = arch.variant if arch.is_sam else "ViT256"
    backbone = str(config.get("model.backbone", expected))
    if backbone.lower() != expected.lower():
        message = f"model.backbone is {backbone!r}, but the tensors are those of {expected!r}"
        raise ValueError(message)
    return arch


def _count_outputs(
    arch: Arch, state: Mapping[str, Tensor], config: Mapping[str, object]
) -> tuple[int, int, bool]:
    """Return the numbers of types and tissues, and whether the network has a regression map."""
    tissue_head = "classifier_head.weight" if arch.is_sam else "encoder.head.weight"
    types, tissues, binary = (
        len(state[key]) if key in state and state[key].ndim else 0
        for key in (TYPE_HEAD, tissue_head, BINARY_HEAD)
    )
    layer_sizes = {"data.num_nuclei_classes": types, "data.num_tissue_classes": tissues}
    for key, count in layer_sizes.items():
        if _parse_integer(config.get(key, count), key) != count:
            message = f"{key} is {config[key]}, but the network's last layer has {count}"
            raise ValueError(message)
    if not 2 <= types <= MAX_TYPES:
        message = f"{types} nucleus types; expected 2 to {MAX_TYPES}, background included"
        raise ValueError(message)
    has_regression = binary == 2 * MAP_CHANNELS
    key = "model.regression_loss"
    if key in config and _read_flag(config, key) != has_regression:
        message = f"{key} is {config[key]}, but the binary map's last layer has {binary} channels"
        raise ValueError(message)
    return types, tissues, has_regression


def _check_tensors(network: CellViT, state: Mapping[str, Tensor]) -> None:
    """Refuse missing, unknown and misshapen tensors; the message names the first of each kind."""
    shapes = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    missing = [key for key in shapes if key not in state]
    unknown = [key for key in state if key not in shapes]
    misshapen = [key for key in shapes if key in state and tuple(state[key].shape) != shapes[key]]
    faults = []
    if missing:
        faults.append(f"{len(missing)} missing ({missing[0]}, ...)")
    if unknown:
        faults.append(f"{len(unknown)} unknown ({unknown[0]}, ...)")
    if misshapen:
        first = misshapen[0]
        shape, expected = list(state[first].shape), list(shapes[first])
        faults.append(f"{len(misshapen)} misshapen ({first}: {shape}, expected {expected})")
    if faults:
        name = f"CellViT-{network.arch.variant}"
        message = f"tensors differ from the {len(shapes)} of {name}: {'; '.join(faults)}"
        raise ValueError(message)


def _read_type_names(config: Mapping[str, object], num_types: int) -> tuple[str, ...]:
    """Return the names of the nucleus types by number."""
    start = "dataset_config.nuclei_types."
    numbers = {
        key.removeprefix(start): _parse_integer(value, key)
        for key, value in config.items()
        if key.startswith(start)
    }
    if not numbers and num_types == len(PANNUKE_TYPES):
        return PANNUKE_TYPES
    names = sorted(numbers, key=lambda name: numbers[name])
    if sorted(numbers.values()) != list(range(num_types)) or names[0].lower() != "background":
        message = (
            f"{start}* names {numbers or 'nothing'}; expected a name for each of 0 to "
            f"{num_types - 1}, with Background 0"
        )
        raise ValueError(message)
    return tuple(names)


def _parse_integer(value: object, key: str) -> int:
    """Return an integer; published configurations may write it as text."""
    try:
        return int(str(value))
    except ValueError:
        message = f"{key} is {value!r}; expected an integer"
        raise ValueError(message) from None


def _read_flag(config: Mapping[str, object], key: str) -> bool:
    return str(config.get(key, False)).lower() == "true"


def _read_rgb(
    config: Mapping[str, object], key: str, default: tuple[float, ...]
) -> tuple[float, ...]:
    """Return three numbers of a configuration; the list may be written as text."""
    value: Any = config.get(key, default)
    try:
        numbers = ast.literal_eval(value) if isinstance(value, str) else value
        red, green, blue = (float(number) for number in numbers)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError, OverflowError):
        message = f"{key} is {repr(value)[:80]}; expected three numbers"
        raise ValueError(message) from None
    return red, green, blue


def _read_std(config: Mapping[str, object]) -> tuple[float, ...]:
    key = "transformations.normalize.std"
    std = _read_rgb(config, key, DEFAULT_STD)
    if not all(value > 0 for value in std):
        message = f"{key} is {std}; expected numbers above 0"
        raise ValueError(message)
    return std
