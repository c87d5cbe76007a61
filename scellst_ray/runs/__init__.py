"""The run folder: its tables, how they are read and finished, its lease."""
