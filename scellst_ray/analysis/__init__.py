"""What is computed from finished tables: metrics, comparison with truth, maps."""
