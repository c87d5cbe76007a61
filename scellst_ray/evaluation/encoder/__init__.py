"""Scores of how well embeddings tell cell types apart."""
