"""Weights as the loaders take them: any storage, or a name of the catalogue, to a local path."""

from scellst_ray import storage
from scellst_ray.models.encoder.encoder import is_named
from scellst_ray.models.weights.catalogue import is_catalogued, weights_path


def local_weights(weights: str) -> str:
    """Return weights as the loaders take them: a file of any storage as a local path.

    Raises:
        ValueError: a name of the catalogue that has not been fetched on this node.
    """
    if is_named(weights):
        return weights
    return weights_path(weights) if is_catalogued(weights) else str(storage.local_copy(weights))
