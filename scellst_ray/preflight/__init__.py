"""Checks and plans before a run: its tiles, its costs, and problems of slides and nodes."""
