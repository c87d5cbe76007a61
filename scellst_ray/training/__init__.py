"""Ray Train: fitting networks on one or many workers."""
