"""Ray Train: from crops and bags to weights."""
