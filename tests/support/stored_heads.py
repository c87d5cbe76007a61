"""Files of heads written without torch."""

import json
from dataclasses import asdict

import numpy as np
from safetensors.numpy import save

from scellst_ray import storage
from scellst_ray.models.mil.head_file import HEAD_FORMAT, HEAD_VERSION, Formula, check_head


def write_head(uri, genes, *, dim=8, hidden_dim=256, seed=0):
    """Write a head of random weights: one network, with the formula that is the default."""
    rng, formula = np.random.default_rng(seed), Formula()
    shapes = {"mean_D": (dim,), "layers.0.weight": (hidden_dim, dim)}
    shapes |= {f"layers.{layer}.weight": (hidden_dim, hidden_dim) for layer in (2, 4)}
    shapes |= {f"layers.{layer}.bias": (hidden_dim,) for layer in (0, 2, 4)}
    shapes |= {"last.weight": (len(genes), hidden_dim), "last.bias": (len(genes),)}
    tensors = {
        name: rng.uniform(-1, 1, shape).astype(np.float32) / np.float32(shape[-1]) ** 0.5
        for name, shape in shapes.items()
    }
    tensors["std_D"] = np.ones(dim, np.float32)
    info = {"genes": list(genes), "scaling": {}, "embedding_dim": dim, "encoder_digest": "e"}
    info |= {"training_slides": [], "metrics": {}}
    check_head(tensors, info, formula, "head")
    metadata = {"format": HEAD_FORMAT, "format_version": str(HEAD_VERSION)}
    metadata |= {"info": json.dumps(info), "formula": json.dumps(asdict(formula))}
    storage.publish_bytes(uri, save(tensors, metadata))
