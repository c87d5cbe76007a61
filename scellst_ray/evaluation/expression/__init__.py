"""Scores of predicted expression against measured expression."""
