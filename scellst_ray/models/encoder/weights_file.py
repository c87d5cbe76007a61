"""The local path of weights that are given as a URI or as a name of the catalogue."""

from scellst_ray import storage
from scellst_ray.models.encoder.encoder import is_named
from scellst_ray.models.weights.beside import check_beside, note_uri
from scellst_ray.models.weights.catalogue import is_catalogued, weights_path
from scellst_ray.models.weights.digests import file_digest


def local_weights(weights: str) -> str:
    """Return weights as the loaders take them: a local path, or a name that they know.

    A file of any storage is copied to this node. A name of the catalogue becomes the path of the
    fetched file.

    Raises:
        ValueError: The weights of a name of the catalogue have not been fetched on this node, or
            the note beside a file states another content.
    """
    if is_named(weights):
        return weights
    if is_catalogued(weights):
        return weights_path(weights)
    path = storage.local_copy(weights)
    if note_uri(weights) is not None and path.is_file():
        check_beside(weights, file_digest(path))
    return str(path)
