"""A run as pages that people look at: one for the cohort and one for each slide."""
