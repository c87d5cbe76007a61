"""From pixels or maps to the outlines of nuclei."""
