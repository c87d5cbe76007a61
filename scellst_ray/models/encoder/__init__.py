"""The cell encoder: from a crop to an embedding."""
