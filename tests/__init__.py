"""Tests; folders mirror those of the package."""
