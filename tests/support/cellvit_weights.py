"""Checkpoint files of CellViT with deterministic weights, for tests that need one.

The rule for the weights is that of the reference outputs next to the repository, so that any
machine makes the network those outputs came from.
"""

import functools
import math
import zlib
from collections import OrderedDict

import numpy as np
import torch

from scellst_ray.models.cellvit.network import CellViT, arch_of

PANNUKE = ("Background", "Neoplastic", "Inflammatory", "Connective", "Dead", "Epithelial")
ARCH_NAMES = {"256": "CellViT256", "SAM-B": "CellViTSAM", "SAM-L": "CellViTSAM"}
ARCH_NAMES |= {"SAM-H": "CellViTSAM"}


def weight(key, shape):
    """Return the tensor of one key of a state dict: numbers drawn from a seed made of its name."""
    generator = np.random.default_rng(zlib.crc32(key.encode()))
    if key.endswith("num_batches_tracked"):
        return torch.tensor(1000)
    if key.endswith("running_var"):
        values = 0.5 + generator.random(shape)
    elif key.endswith("running_mean"):
        values = 0.1 * generator.standard_normal(shape)
    elif key.endswith(("pos_embed", "cls_token")):
        values = 0.02 * generator.standard_normal(shape)
    elif key.endswith("bias"):
        values = 0.05 * generator.standard_normal(shape)
    elif len(shape) == 1:
        values = 0.5 + generator.random(shape)
    else:
        values = generator.standard_normal(shape) / math.sqrt(math.prod(shape[1:]))
    return torch.from_numpy(values.astype(np.float32))


@functools.cache  # 47 million numbers take two seconds; nobody writes into them
def make_state(variant="256", num_types=6, num_tissues=19, *, regression_loss=False):
    """Return the state dict of a variant."""
    shapes = make_shapes(variant, num_types, num_tissues, regression_loss=regression_loss)
    return OrderedDict((key, weight(key, shape)) for key, shape in shapes.items())


@functools.cache
def make_shapes(variant="256", num_types=6, num_tissues=19, *, regression_loss=False):
    """Return the shape of every key of a variant's state dict."""
    with torch.device("meta"):
        network = CellViT(arch_of(variant), num_types, num_tissues, regression_loss=regression_loss)
    return {key: tuple(value.shape) for key, value in network.state_dict().items()}


@functools.cache
def hollow_state(variant="256", num_types=6, num_tissues=19, *, regression_loss=False):
    """Return a state dict of the right shapes that takes no memory and makes a tiny file."""
    shapes = make_shapes(variant, num_types, num_tissues, regression_loss=regression_loss)
    return OrderedDict((k, weight(k, (1,)).view(()).expand(s)) for k, s in shapes.items())


def make_config(variant="256", type_names=PANNUKE, num_tissues=19):
    """Return the part of a flat published configuration that says what a network is."""
    config = {
        "random_seed": 19,
        "data.num_nuclei_classes": len(type_names),
        "data.num_tissue_classes": num_tissues,
        "model.backbone": "ViT256" if variant == "256" else variant,
        "model.shared_skip_connections": True,
        "training.mixed_precision": True,
        "transformations.normalize.mean": [0.5, 0.5, 0.5],
        "transformations.normalize.std": [0.5, 0.5, 0.5],
        "eval_checkpoint": "latest_checkpoint.pth",
        "run_sweep": False,
        "agent": None,
    }
    names = {f"dataset_config.nuclei_types.{name}": i for i, name in enumerate(type_names)}
    return config | names


def make_checkpoint(variant="256", type_names=PANNUKE, *, training=False, prefix="", state=None):
    """Return a checkpoint as published: 4 keys of a release, or 12 keys of a training run."""
    state = make_state(variant, len(type_names)) if state is None else state
    checkpoint = {
        "arch": ARCH_NAMES[variant],
        "epoch": 130,
        "model_state_dict": OrderedDict((prefix + key, value) for key, value in state.items()),
        "config": make_config(variant, type_names),
    }
    if not training:
        return checkpoint
    moments = {0: {"step": torch.tensor(5.0), "exp_avg": torch.zeros(3)}}
    groups = [{"lr": 3e-4, "betas": (0.85, 0.95), "params": [0]}]
    return checkpoint | {
        "optimizer_state_dict": {"state": moments, "param_groups": groups},
        "scheduler_state_dict": {"gamma": 0.85, "base_lrs": [3e-4], "last_epoch": 130},
        "best_metric": np.float64(0.51),
        "best_epoch": 128,
        "wandb_id": "abc",
        "logdir": "logs",
        "run_name": "CellViT-256",
        "scaler_state_dict": {"scale": 65536.0, "growth_factor": 2.0},
    }


def write_checkpoint(path, variant="256", type_names=PANNUKE, *, training=False, prefix=""):
    """Write a checkpoint file and return its path.

    Args:
        path: Where to.
        variant: '256' (187 MB, a second), 'SAM-B', 'SAM-L' or 'SAM-H'.
        type_names: Names of the nucleus types by number, background first.
        training: The 12 keys of a training run instead of the 4 of a release.
        prefix: Before every parameter's name, as `module.` of DataParallel.
    """
    torch.save(make_checkpoint(variant, type_names, training=training, prefix=prefix), path)
    return path
