"""Scores against the truth, with baselines next to them."""
