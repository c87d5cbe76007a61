"""The manifest, opening slides, tissue, tiles."""
