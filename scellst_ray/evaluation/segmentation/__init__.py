"""How well segmentations agree with annotated nuclei."""
