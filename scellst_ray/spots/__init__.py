"""Measured expression: readers, genes, links to cells."""
