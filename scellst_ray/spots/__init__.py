"""Supervision: spots, their counts, gene panels, and the cells under them."""
