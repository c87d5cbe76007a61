"""Synthetic slides with known nuclei and expression."""
