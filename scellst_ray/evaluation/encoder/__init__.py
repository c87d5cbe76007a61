"""Scores of how well embeddings separate cell types."""
