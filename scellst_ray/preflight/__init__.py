"""Before a run: what it will find, need and cost, and what is wrong."""
