"""The local path of weights that are given as a URI or as a name of the catalogue."""

from scellst_ray import storage
from scellst_ray.models.encoder.encoder import is_named
from scellst_ray.models.weights.catalogue import is_catalogued, weights_path


def local_weights(weights: str) -> str:
    """Return weights as the loaders take them: a local path, or a name that they know.

    A file of any storage is copied to this node. A name of the catalogue becomes the path of the
    fetched file.

    Raises:
        ValueError: The weights of a name of the catalogue have not been fetched on this node.
    """
    if is_named(weights):
        return weights
    return weights_path(weights) if is_catalogued(weights) else str(storage.local_copy(weights))
