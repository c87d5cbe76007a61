"""How well embeddings tell cell types apart."""
