"""The work on one tile or one slide: plain functions without Ray."""
