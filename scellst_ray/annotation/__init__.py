"""Cell types and markers from predicted expression: the paper's downstream analysis."""
