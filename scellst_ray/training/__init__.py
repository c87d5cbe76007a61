"""Training on Ray Train: encoders from crops, heads from bags."""
