"""Nuclei: from a tile of pixels to outlines, and from outlines to crops."""
