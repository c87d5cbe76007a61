"""Nuclei that other tools have found."""
