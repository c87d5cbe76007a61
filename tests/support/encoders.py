"""Embeddings as tests compute them."""

from scellst_ray.models.encoder.encoder import embed_crops


def embed(encoder, crops):
    """Return embeddings on the CPU in float32, in batches of 4 crops."""
    return embed_crops(encoder, crops, "cpu", "float32", batch_size=4)
