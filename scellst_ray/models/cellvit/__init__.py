"""CellViT: the network that finds and types nuclei."""
