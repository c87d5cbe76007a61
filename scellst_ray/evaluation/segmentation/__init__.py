"""Scores of segmented nuclei against annotated nuclei."""
