"""How well predictions agree with measured expression."""
