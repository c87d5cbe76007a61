"""Frames, table schemas, log lines and guards of a process."""
