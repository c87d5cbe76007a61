"""Every slide predicted by heads that never saw it."""
