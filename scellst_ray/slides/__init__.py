"""Pixels: opening slides, finding tissue, planning tiles, making synthetic slides."""
