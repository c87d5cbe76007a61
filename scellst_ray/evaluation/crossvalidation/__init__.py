"""Cross-validation: every slide is predicted by heads that were not trained on it."""
